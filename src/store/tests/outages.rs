//! Folders that are missing, replaced, full, read-only or unmounted. The mounts need root and stay in a namespace of
//! their own.

use std::fs;
use std::path::Path;
use std::time::Duration;

use nix::sched::{CloneFlags, unshare};
use serde_json::json;

use super::*;
use crate::store::Health;

/// No trouble is left of the failures that there were.
fn assert_works_again(store: &Store) {
    let Health {
        reading,
        writing,
        failures,
    } = store.health();
    assert_eq!((reading, writing), (None, None));
    assert!(failures.writing > 0, "{failures:?}");
}

#[tokio::test]
async fn a_missing_folder_is_an_outage_and_a_recreated_one_is_picked_up() {
    let temp = Temp::new();
    temp.put(&lease("b", "10.244.2.0-24"), 1);
    temp.put(&lease("c", "10.244.3.0-24"), 1);
    let store = temp.open().await;
    store.acquire(&node("a"), &network(), &claim(0)).await.unwrap();
    let mine = lease("a", "10.244.1.0-24");
    store.publish(&mine).await.unwrap();
    let mut roster = store.roster();
    roster.mark_unchanged();
    fs::remove_dir_all(&temp.0).unwrap();
    tokio::time::sleep(Duration::from_millis(1200)).await;
    assert!(!roster.has_changed().unwrap(), "nothing leaves the roster in an outage");
    let trouble = store.health().reading.unwrap();
    assert!(
        trouble.error.contains("does not exist: create it with `mkdir -p"),
        "{}",
        trouble.error
    );
    let refused = store.publish(&with_data(&mine, json!(2))).await.unwrap_err();
    assert!(matches!(refused, StoreError::Missing(_)) && refused.is_transient());
    fs::create_dir(&temp.0).unwrap();
    // The node sees that its own lease is gone and writes it; the others keep theirs for a while.
    until(&mut roster, |roster| {
        names(roster) == ["b", "c"] && roster.completeness == Completeness::Partial
    })
    .await;
    store.publish(&mine).await.unwrap();
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(names(&roster.borrow()), ["a", "b", "c"]);
    temp.put(&lease("b", "10.244.2.0-24"), 1);
    until(&mut roster, |roster| {
        names(roster) == ["a", "b"] && roster.completeness == Completeness::Complete
    })
    .await;
    until_readable(&store).await;
}

#[tokio::test]
async fn a_folder_replaced_by_a_rename_is_noticed() {
    let (temp, aside) = (Temp::new(), Temp::new());
    temp.put(&lease("a", "10.244.1.0-24"), 1);
    let store = temp.open().await;
    let moved = aside.file("moved");
    fs::rename(&temp.0, &moved).unwrap();
    fs::create_dir(&temp.0).unwrap();
    temp.put(&lease("a", "10.244.1.0-24"), 1);
    temp.put(&lease("b", "10.244.2.0-24"), 1);
    until(&mut store.roster(), |roster| names(roster) == ["a", "b"]).await;
    fs::write(
        moved.join("10.244.3.0-24.json"),
        format::encode(&lease("old", "10.244.3.0-24"), 1),
    )
    .unwrap();
    temp.put(&lease("c", "10.244.4.0-24"), 1);
    until(&mut store.roster(), |roster| names(roster) == ["a", "b", "c"]).await;
}

/// The watch hangs on the folder, not on the link: it has to follow when only an event of the folder before tells of the turn.
#[tokio::test]
async fn a_link_that_is_turned_to_another_folder_is_followed() {
    let (temp, other) = (Temp::new(), Temp::new());
    let (first, link) = (temp.file("first"), temp.file("link"));
    fs::create_dir(&first).unwrap();
    std::os::unix::fs::symlink(&first, &link).unwrap();
    let store = Store::open_dir(&link).await.unwrap();
    other.put(&lease("a", "10.244.1.0-24"), 1);
    std::os::unix::fs::symlink(&other.0, temp.file("turned")).unwrap();
    fs::rename(temp.file("turned"), &link).unwrap();
    fs::write(first.join("10.244.9.0-24.json"), "").unwrap();
    until(&mut store.roster(), |roster| names(roster) == ["a"]).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let start = Instant::now();
    other.put(&lease("b", "10.244.2.0-24"), 1);
    until(&mut store.roster(), |roster| names(roster) == ["a", "b"]).await;
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
}

#[tokio::test]
async fn a_folder_that_is_none_is_named_with_the_remedy() {
    let temp = Temp::new();
    let file = temp.file("file");
    fs::write(&file, "").unwrap();
    let missing = temp.file("missing");
    let text = |error: StoreError| error.to_string();
    let (m, f) = (missing.display(), file.display());
    assert_eq!(
        text(Store::open_dir(&missing).await.unwrap_err()),
        format!("store folder {m} does not exist: create it with `mkdir -p {m}`, or correct --lease-dir")
    );
    assert_eq!(
        text(Store::open_dir(&file).await.unwrap_err()),
        format!("{f} is not a folder: --lease-dir takes a folder of leases")
    );
}

/// Runs `test` on a thread with mounts of its own, in a tokio runtime, with a tmpfs of `size` mounted on a folder.
fn on_own_mount(size: &str, test: impl AsyncFnOnce(&Path) + Send) {
    let temp = Temp::new();
    let mount = |args: &[&str]| {
        let status = std::process::Command::new("mount")
            .args(args)
            .arg(&temp.0)
            .status()
            .unwrap();
        assert!(status.success(), "mount {args:?} needs root");
    };
    std::thread::scope(|scope| {
        let body = || {
            // Mounts made by children of this thread go to its namespace.
            unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_FS).unwrap();
            let private = std::process::Command::new("mount")
                .args(["--make-rprivate", "/"])
                .status()
                .unwrap();
            assert!(private.success());
            mount(&["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"]);
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(test(&temp.0));
        };
        scope.spawn(body).join().unwrap();
    });
}

/// A file system on `path` that answers nothing until it is dropped; then every call there fails, those that wait too.
struct Silent(fs::File);

impl Silent {
    fn mount(path: &Path) -> Self {
        let fuse = fs::File::options().read(true).write(true).open("/dev/fuse").unwrap();
        let fd = std::os::fd::AsRawFd::as_raw_fd(&fuse);
        let options = format!("fd={fd},rootmode=40000,user_id=0,group_id=0");
        let text = |text: &str| std::ffi::CString::new(text).unwrap();
        let (source, target, kind, options) = (
            text("silent"),
            text(path.to_str().unwrap()),
            text("fuse"),
            text(&options),
        );
        // SAFETY: four strings that end with zero and outlive the call.
        let mounted = unsafe {
            nix::libc::mount(
                source.as_ptr(),
                target.as_ptr(),
                kind.as_ptr(),
                0,
                options.as_ptr().cast(),
            )
        };
        assert_eq!(mounted, 0, "{}", std::io::Error::last_os_error());
        Self(fuse)
    }

    fn end(self, path: &Path) {
        drop(self.0);
        let gone = std::process::Command::new("umount").arg("-l").arg(path).status();
        assert!(gone.unwrap().success());
    }
}

fn mount(args: &[&str], path: &Path) {
    let status = std::process::Command::new("mount")
        .args(args)
        .arg(path)
        .status()
        .unwrap();
    assert!(status.success(), "mount {args:?}");
}

#[test]
fn a_full_disk_is_named_and_nothing_is_lost_or_left_half_written() {
    on_own_mount("64k", async |path| {
        let store = Store::open_dir(path).await.unwrap();
        store.acquire(&node("a"), &network(), &claim(0)).await.unwrap();
        let mine = lease("a", "10.244.1.0-24");
        store.publish(&mine).await.unwrap();
        let mut filler = fs::File::create(path.join(".filler")).unwrap();
        while std::io::Write::write_all(&mut filler, &[0; 4096]).is_ok() {}
        let newer = with_data(&mine, json!("newer"));
        for error in [
            store.publish(&newer).await.unwrap_err(),
            store.acquire(&node("b"), &network(), &claim(1)).await.unwrap_err(),
        ] {
            assert!(
                matches!(error, StoreError::Full { .. }) && error.is_transient(),
                "{error}"
            );
            assert!(error.to_string().contains("ENOSPC"));
        }
        assert!(store.health().writing.is_some() && store.health().reading.is_none());
        assert_eq!(names(&store.roster().borrow()), ["a"]);
        let mut left: Vec<_> = fs::read_dir(path).unwrap().map(|e| e.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, [".filler", ".sequence", "10.244.1.0-24.json"]);
        drop(filler);
        fs::remove_file(path.join(".filler")).unwrap();
        store.publish(&newer).await.unwrap();
        assert_eq!(store.health().writing, None);
    });
}

#[test]
fn a_read_only_folder_serves_its_readers_and_a_node_whose_lease_is_in_it() {
    on_own_mount("1m", async |path| {
        let mine = lease("a", "10.244.1.0-24");
        fs::write(path.join("10.244.1.0-24.json"), format::encode(&mine, 3)).unwrap();
        mount(&["-o", "remount,ro"], path);
        let store = Store::open_dir(path).await.unwrap();
        let held = store.acquire(&node("a"), &network(), &claim(0)).await.unwrap();
        assert_eq!((held.subnets, held.previous), (mine.subnets, Some(mine.clone())));
        store.publish(&mine).await.unwrap();
        let refused = store.publish(&with_data(&mine, json!("newer"))).await.unwrap_err();
        assert!(
            matches!(refused, StoreError::ReadOnly { .. }) && refused.is_transient(),
            "{refused}"
        );
        let refused = store.acquire(&node("b"), &network(), &claim(0)).await.unwrap_err();
        assert!(
            refused.to_string().contains("read-only: remount it writable"),
            "{refused}"
        );
        let refused = store.release(&node("a"), &mine.subnets).await.unwrap_err();
        assert!(matches!(refused, StoreError::ReadOnly { .. }), "{refused}");
        assert_eq!(names(&store.roster().borrow()), ["a"]);
    });
}

#[test]
fn an_unmounted_store_is_an_outage_and_not_an_empty_roster() {
    on_own_mount("1m", async |path| {
        let store = Store::open_dir(path).await.unwrap();
        store.acquire(&node("a"), &network(), &claim(0)).await.unwrap();
        let mut roster = store.roster();
        roster.mark_unchanged();
        assert!(
            std::process::Command::new("umount")
                .arg("-l")
                .arg(path)
                .status()
                .unwrap()
                .success()
        );
        let refused = store.acquire(&node("b"), &network(), &claim(0)).await.unwrap_err();
        assert!(matches!(refused, StoreError::Unmounted(_)), "{refused}");
        let refused = store.publish(&lease("a", "10.244.1.0-24")).await.unwrap_err();
        assert!(matches!(refused, StoreError::Unmounted(_)), "{refused}");
        tokio::time::sleep(Duration::from_millis(1500)).await;
        assert!(!roster.has_changed().unwrap());
        assert_eq!(names(&roster.borrow()), ["a"]);
        assert_eq!(
            fs::read_dir(path).unwrap().count(),
            0,
            "nothing is written under the mount point"
        );
        mount(&["-t", "tmpfs", "tmpfs"], path);
        fs::write(
            path.join("10.244.2.0-24.json"),
            format::encode(&lease("b", "10.244.2.0-24"), 3),
        )
        .unwrap();
        until(&mut roster, |roster| roster.get(&node("b")).is_some()).await;
        until_readable(&store).await;
    });
}

#[test]
fn a_file_system_that_does_not_answer_is_named_and_stops_nothing_else() {
    on_own_mount("1m", async |path| {
        let store = Store::open_dir(path).await.unwrap();
        store.acquire(&node("a"), &network(), &claim(0)).await.unwrap();
        let mine = lease("a", "10.244.1.0-24");
        store.publish(&mine).await.unwrap();
        let silent = Silent::mount(path);
        let began = std::time::Instant::now();
        let publishing = tokio::spawn({
            let (store, newer) = (store.clone(), with_data(&mine, json!("newer")));
            async move { store.publish(&newer).await }
        });
        let mut longest = Duration::ZERO;
        while store.health().writing.is_none() {
            let before = std::time::Instant::now();
            tokio::time::sleep(Duration::from_millis(5)).await;
            longest = longest.max(before.elapsed());
            assert!(began.elapsed() < Duration::from_secs(10), "it is named");
        }
        assert!(
            longest < Duration::from_secs(1),
            "the runtime stood still for {longest:?}"
        );
        let trouble = store.health().writing.unwrap();
        assert!(trouble.error.ends_with("does not answer"), "{}", trouble.error);
        assert!(trouble.lasts(std::time::Instant::now()) >= Duration::from_secs(3));
        assert!(!publishing.is_finished());
        assert_eq!(*store.roster().borrow().get(&node("a")).unwrap().clone(), mine);
        // Whoever waits is told once it fails, and the next try succeeds when the store is back.
        silent.end(path);
        let failed = publishing.await.unwrap().unwrap_err();
        assert!(failed.is_transient(), "{failed}");
        store.publish(&with_data(&mine, json!("newer"))).await.unwrap();
        until_readable(&store).await;
        assert_works_again(&store);
    });
}

#[test]
fn used_up_inodes_are_named_as_a_full_disk_is() {
    on_own_mount("1m,nr_inodes=5", async |path| {
        let store = Store::open_dir(path).await.unwrap();
        store.acquire(&node("a"), &network(), &claim(0)).await.unwrap();
        for number in 0..2 {
            fs::write(path.join(format!(".filler{number}")), "").unwrap();
        }
        let newer = lease("a", "10.244.1.0-24");
        let refused = store.publish(&newer).await.unwrap_err();
        assert!(matches!(refused, StoreError::Full { .. }), "{refused}");
        assert!(
            refused.to_string().contains("no inode, is left there (ENOSPC)"),
            "{refused}"
        );
        assert_eq!(names(&store.roster().borrow()), ["a"]);
        fs::remove_file(path.join(".filler0")).unwrap();
        store.publish(&newer).await.unwrap();
        assert_works_again(&store);
    });
}

#[test]
fn a_quota_that_is_used_up_is_named() {
    let refused = StoreError::from_io("write", Path::new("/leases/x"), nix::errno::Errno::EDQUOT);
    let text = "write /leases/x: no space, or no inode, is left there (EDQUOT): free some, or raise the quota";
    assert_eq!(refused.to_string(), text);
    assert!(refused.is_transient());
}
