//! Real files, real folders, real inotify.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;
use std::time::Duration;

use keys::{Kid, Psk};
use proptest::prelude::*;
use tokio::time::timeout;

use super::*;
use crate::testing::Folder;

const NET: &str = "10.244.0.0/16";

fn key(n: u8) -> String {
    format!("{n:02}-0123456789abcdef0123456789abcdef")
}

fn kid(text: &str) -> Kid {
    Psk::new(text.as_bytes(), NET).unwrap().kid()
}

fn put(path: &Path, bytes: impl AsRef<[u8]>) {
    fs::write(path, bytes).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
}

fn kids(path: &Path) -> Vec<Kid> {
    load(path, NET).unwrap().kids()
}

fn error(path: &Path) -> String {
    load(path, NET).unwrap_err().to_string()
}

#[test]
fn a_file_is_one_key_without_the_white_space_at_its_end() {
    let folder = Folder::new();
    let path = folder.join("psk");
    for end in ["", "\n", "\r\n", " \n\n"] {
        put(&path, key(1) + end);
        assert_eq!(kids(&path), [kid(&key(1))], "{end:?}");
    }
    assert!(load(&path, NET).unwrap().warnings.is_empty());
    // Of random bytes, the last may happen to be a line end.
    let binary = [[0xff; 31].as_slice(), b"\n"].concat();
    put(&path, &binary);
    assert_eq!(kids(&path), [Psk::new(&binary, NET).unwrap().kid()]);
}

#[test]
fn a_folder_is_read_newest_first_in_natural_order() {
    let folder = Folder::new();
    for (name, n) in [
        ("key-9", 9),
        ("key-10", 10),
        ("key-2b", 3),
        ("key-2", 2),
        ("key-010", 11),
        ("a", 1),
    ] {
        put(&folder.join(name), key(n));
    }
    put(&folder.join(".hidden"), "x");
    put(&folder.join("key-11~"), "x");
    fs::create_dir(folder.join("key-99")).unwrap();
    let expected = [10, 11, 9, 3, 2, 1].map(|n| kid(&key(n)));
    assert_eq!(kids(folder.path()), expected);
}

#[test]
fn a_key_that_is_there_twice_counts_once_as_its_newer_file() {
    let folder = Folder::new();
    put(&folder.join("2"), key(1));
    put(&folder.join("1"), key(1) + "\n");
    let set = load(folder.path(), NET).unwrap();
    assert_eq!(set.kids(), [kid(&key(1))]);
    let path = folder.join("1");
    assert_eq!(
        set.warnings,
        [PskWarning::Twice {
            path,
            kid: kid(&key(1))
        }]
    );
}

#[test]
fn a_file_that_everyone_can_read_is_warned_of() {
    let folder = Folder::new();
    let path = folder.join("psk");
    put(&path, key(1));
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    let warnings = load(&path, NET).unwrap().warnings;
    assert_eq!(
        warnings.iter().map(ToString::to_string).collect::<Vec<_>>(),
        [format!(
            "PSK file {} has mode 0644: every user of this machine can read it; chmod 0600 (a Secret: defaultMode: 0400)",
            path.display()
        )]
    );
}

#[test]
fn every_file_that_is_no_key_is_refused_naming_it_and_the_remedy() {
    let folder = Folder::new();
    let path = folder.join("psk");
    let shown = path.display().to_string();
    assert_eq!(
        error(&path),
        format!("PSK file {shown} does not exist: `ringmail keygen` makes a key")
    );
    for empty in ["", "\n", " \r\n\n"] {
        put(&path, empty);
        assert_eq!(
            error(&path),
            format!("PSK file {shown} is empty: `ringmail keygen` makes a key")
        );
    }
    put(&path, "too-short-by-far\n");
    assert_eq!(
        error(&path),
        format!("PSK file {shown}: PSK is 16 bytes; at least 32 are needed: run `ringmail keygen`")
    );
    put(&path, vec![b'x'; MAX_FILE]);
    assert_eq!(kids(&path).len(), 1, "the limit itself is allowed");
    put(&path, vec![b'x'; MAX_FILE + 1]);
    assert_eq!(
        error(&path),
        format!("PSK file {shown} is larger than 65536 bytes: this is hardly a key")
    );
    fs::remove_file(&path).unwrap();
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRUSR).unwrap();
    assert_eq!(error(&path), format!("PSK file {shown} is neither a file nor a folder"));
    fs::remove_file(&path).unwrap();
    symlink(&path, &path).unwrap();
    let looped = load(&path, NET).unwrap_err();
    assert_eq!(looped.to_string(), format!("PSK file {shown} can't be read"));
    assert!(
        std::error::Error::source(&looped).is_some(),
        "the system's word is kept"
    );
    fs::remove_file(&path).unwrap();
    assert!(error(folder.path()).starts_with(&format!("PSK folder {} holds no key: ", folder.path().display())));
    for n in 0..=MAX_KEYS {
        put(&folder.join(&n.to_string()), format!("{n}{}", key(1)));
    }
    assert!(error(folder.path()).contains("holds 65 keys; at most 64"));
    put(&folder.join("0"), "short");
    assert!(
        error(folder.path()).contains("PSK is 5 bytes"),
        "one bad file is an error of the folder"
    );
}

#[test]
fn nothing_that_is_printed_shows_a_key() {
    let folder = Folder::new();
    put(&folder.join("1"), key(1));
    let text = format!("{:?}", load(folder.path(), NET).unwrap());
    assert!(!text.contains("0123456789"), "{text}");
}

#[test]
fn a_made_key_is_good_and_never_made_again() {
    let (a, b) = (keygen().unwrap(), keygen().unwrap());
    assert_ne!(*a, *b);
    assert_eq!(a.len(), 65);
    assert_eq!(a.capacity(), 65, "the text never moved");
    assert!(a.ends_with('\n') && a[..64].bytes().all(|b| b.is_ascii_hexdigit()));
    let folder = Folder::new();
    put(&folder.join("psk"), a.as_bytes());
    assert_eq!(kids(&folder.join("psk")), [kid(&a[..64])]);
}

async fn next(held: &mut tokio::sync::watch::Receiver<Held>) -> Held {
    timeout(Duration::from_secs(5), held.changed())
        .await
        .expect("a change is noticed")
        .expect("the task runs");
    held.borrow_and_update().clone()
}

/// So slow that only inotify can be what noticed.
const NEVER: Duration = Duration::from_secs(3600);

fn kids_of(held: &Held) -> Vec<Kid> {
    held.set.as_ref().expect("there is a set").kids()
}

#[tokio::test]
async fn a_replaced_or_edited_file_is_noticed_and_a_bad_one_leaves_the_good_set_in_use() {
    let folder = Folder::new();
    let path = folder.join("psk");
    put(&path, key(1));
    let mut held = watch(path.clone(), NET.into(), NEVER);
    assert_eq!(kids_of(&held.borrow_and_update()), [kid(&key(1))]);

    put(&folder.join("new"), key(2));
    fs::rename(folder.join("new"), &path).unwrap();
    assert_eq!(kids_of(&next(&mut held).await), [kid(&key(2))]);

    put(&path, key(4));
    while kids_of(&held.borrow()) != [kid(&key(4))] {
        // Between its steps the file may have been seen empty.
        assert_eq!(kids_of(&next(&mut held).await).len(), 1);
    }

    put(&path, "short");
    let now = next(&mut held).await;
    assert_eq!(kids_of(&now), [kid(&key(4))], "the last good set stays");
    assert!(
        matches!(now.error, Some(PskError::NoKey { .. } | PskError::Empty(_))),
        "{:?}",
        now.error
    );

    fs::remove_file(&path).unwrap();
    while !matches!(held.borrow().error, Some(PskError::Missing(_))) {
        next(&mut held).await;
    }
    put(&path, key(3));
    while held.borrow().error.is_some() {
        next(&mut held).await;
    }
    assert_eq!(kids_of(&held.borrow()), [kid(&key(3))]);
}

#[tokio::test]
async fn the_swap_of_a_mounted_secret_is_noticed() {
    let folder = Folder::new();
    let generation = |name: &str, keys: &[(&str, u8)]| {
        fs::create_dir(folder.join(name)).unwrap();
        for (file, n) in keys {
            put(&folder.join(name).join(file), key(*n));
        }
    };
    let swap = |name: &str| {
        symlink(name, folder.join("..data_tmp")).unwrap();
        fs::rename(folder.join("..data_tmp"), folder.join("..data")).unwrap();
    };
    generation("..2026_1", &[("key-1", 1)]);
    swap("..2026_1");
    symlink("..data/key-1", folder.join("key-1")).unwrap();
    let mut all = watch(folder.path().to_owned(), NET.into(), NEVER);
    let mut one = watch(folder.join("key-1"), NET.into(), NEVER);
    assert_eq!(kids_of(&all.borrow_and_update()), [kid(&key(1))]);
    assert_eq!(kids_of(&one.borrow_and_update()), [kid(&key(1))]);

    // The kubelet swaps first and links new names afterwards.
    generation("..2026_2", &[("key-1", 7), ("key-2", 8)]);
    swap("..2026_2");
    symlink("..data/key-2", folder.join("key-2")).unwrap();
    assert_eq!(kids_of(&next(&mut one).await), [kid(&key(7))]);
    while kids_of(&all.borrow()).len() < 2 {
        next(&mut all).await;
    }
    assert_eq!(kids_of(&all.borrow()), [kid(&key(8)), kid(&key(7))]);
}

#[tokio::test]
async fn a_folder_that_comes_later_is_noticed_and_a_touch_publishes_nothing() {
    let folder = Folder::new();
    let path = folder.join("keys");
    let mut held = watch(path.clone(), NET.into(), NEVER);
    assert!(held.borrow_and_update().set.is_none());
    fs::create_dir(&path).unwrap();
    put(&path.join("1"), key(1));
    while held.borrow().set.is_none() {
        next(&mut held).await;
    }
    held.borrow_and_update();
    put(&path.join("1"), key(1));
    put(&path.join(".swp"), "x");
    assert!(
        timeout(Duration::from_millis(400), held.changed()).await.is_err(),
        "nothing is different"
    );
}

#[tokio::test]
async fn keys_that_come_into_a_folder_and_a_folder_that_takes_its_place_are_noticed() {
    let folder = Folder::new();
    let (path, other) = (folder.join("keys"), folder.join("other"));
    fs::create_dir(&path).unwrap();
    fs::create_dir(&other).unwrap();
    put(&path.join("1"), key(1));
    put(&other.join("1"), key(2));
    let mut held = watch(path.clone(), NET.into(), NEVER);
    let mut until = async |n: usize, newest: u8| {
        while kids_of(&held.borrow_and_update()).len() != n || kids_of(&held.borrow())[0] != kid(&key(newest)) {
            next(&mut held).await;
        }
    };
    put(&path.join("2"), key(3));
    until(2, 3).await;
    fs::remove_file(path.join("2")).unwrap();
    until(1, 1).await;
    fs::rename(&path, folder.join("old")).unwrap();
    fs::rename(&other, &path).unwrap();
    until(1, 2).await;
    put(&path.join("2"), key(4));
    until(2, 4).await;
}

#[tokio::test]
async fn a_change_that_inotify_does_not_show_is_found_by_the_slow_reading() {
    let (folder, elsewhere) = (Folder::new(), Folder::new());
    put(&elsewhere.join("psk"), key(1));
    fs::create_dir(folder.join("keys")).unwrap();
    symlink(elsewhere.join("psk"), folder.join("keys/1")).unwrap();
    let mut held = watch(folder.join("keys"), NET.into(), Duration::from_millis(100));
    put(&elsewhere.join("psk"), key(2));
    while kids_of(&held.borrow()) != [kid(&key(2))] {
        next(&mut held).await;
    }
}

proptest! {
    #[test]
    fn arbitrary_bytes_are_a_key_or_an_error_and_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
        let folder = Folder::new();
        put(&folder.join("psk"), &bytes);
        let trimmed = trim(&bytes);
        prop_assert!(bytes.starts_with(trimmed));
        prop_assert_eq!(load(&folder.join("psk"), NET).is_ok(), trimmed.len() >= 32);
    }

    #[test]
    fn the_natural_order_is_an_order(names in prop::collection::vec("[a0-2]{0,5}", 3)) {
        let order = |a: usize, b: usize| natural(names[a].as_bytes(), names[b].as_bytes());
        prop_assert_eq!(order(0, 1), order(1, 0).reverse());
        prop_assert_eq!(order(0, 1).is_eq(), names[0] == names[1]);
        if order(0, 1).is_le() && order(1, 2).is_le() {
            prop_assert!(order(0, 2).is_le());
        }
    }
}
