//! The store against real folders: leases taken, published, stolen, lost; what is no lease; what is read when.

mod outages;
mod text;

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nix::sys::stat::Mode;
use nix::unistd::mkfifo;
use serde_json::json;
use tokio::sync::watch;

use super::folder::{Folder, file_name};
use super::{Claim, Store, StoreError, format};
use crate::lease::{Addresses, BackendData, Completeness, Lease, Network, NodeName, Range, Roster, Subnets};

/// A folder of its own for a test, removed at the end.
struct Temp(PathBuf);

impl Temp {
    fn new() -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("ringmail-store-{}-{count}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn put(&self, lease: &Lease, revision: u64) {
        fs::write(self.file(&file_name(&lease.subnets)), format::encode(lease, revision)).unwrap();
    }

    async fn open(&self) -> Store {
        Store::open_dir(&self.0).await.unwrap()
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn node(name: &str) -> NodeName {
    NodeName::new(name).unwrap()
}

fn v4_network(net: &str, subnet_len: u8, first: u32, last: u32) -> Network {
    Network {
        v4: Some(Range {
            net: net.parse().unwrap(),
            subnet_len,
            first,
            last,
        }),
        v6: None,
    }
}

fn network() -> Network {
    v4_network("10.244.0.0/16", 24, 1, 255)
}

fn claim(random: u64) -> Claim {
    let public = Addresses {
        v4: Some([192, 168, 77, 1].into()),
        v6: None,
    };
    Claim {
        previous: None,
        public,
        random,
    }
}

fn subnets(key: &str) -> Subnets {
    format::parse_key(key).unwrap()
}

fn lease(name: &str, key: &str) -> Lease {
    Lease {
        node: node(name),
        subnets: subnets(key),
        public: Addresses {
            v4: Some([192, 168, 77, 9].into()),
            v6: None,
        },
        backend: "ipsec".into(),
        data: json!({"epoch": 7}).into(),
        v6_data: BackendData::NULL,
    }
}

fn with_data(lease: &Lease, data: serde_json::Value) -> Lease {
    Lease {
        data: data.into(),
        ..lease.clone()
    }
}

async fn until(roster: &mut watch::Receiver<Roster>, what: impl FnMut(&Roster) -> bool) {
    tokio::time::timeout(Duration::from_secs(20), roster.wait_for(what))
        .await
        .expect("the roster gets there")
        .unwrap();
}

async fn until_readable(store: &Store) {
    let start = Instant::now();
    while store.health().reading.is_some() {
        assert!(start.elapsed() < Duration::from_secs(20), "{:?}", store.health());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn names(roster: &Roster) -> Vec<&str> {
    roster.leases().map(|lease| lease.node.as_str()).collect()
}

fn counters(store: &Store) -> (u64, u64) {
    let Store::Dir(dir) = store else { panic!("a folder") };
    dir.counters()
}

#[tokio::test]
async fn a_node_takes_a_subnet_publishes_and_is_seen_by_the_others() {
    let temp = Temp::new();
    let (a, b) = (temp.open().await, temp.open().await);
    let held = a.acquire(&node("a"), &network(), &claim(41)).await.unwrap();
    assert_eq!(
        (held.subnets, held.slot.get(), held.previous),
        (subnets("10.244.42.0-24"), 42, None)
    );
    let mine = Lease {
        subnets: held.subnets,
        ..lease("a", "10.244.42.0-24")
    };
    a.publish(&mine).await.unwrap();
    assert_eq!(
        a.roster().borrow().get(&node("a")).map(|l| (**l).clone()),
        Some(mine.clone())
    );
    until(&mut b.roster(), |roster| {
        roster.get(&node("a")).is_some_and(|l| **l == mine)
    })
    .await;
    let text = fs::read_to_string(temp.file("10.244.42.0-24.json")).unwrap();
    let json: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(
        json,
        json!({"Node": "a", "PublicIP": "192.168.77.9", "PublicIPv6": null, "BackendType": "ipsec",
            "BackendData": {"epoch": 7}, "Revision": 2})
    );
    let again = b.acquire(&node("a"), &network(), &claim(0)).await.unwrap();
    assert_eq!((again.subnets, again.previous), (held.subnets, Some(mine)));
    b.release(&node("a"), &held.subnets).await.unwrap();
    until(&mut a.roster(), |roster| roster.get(&node("a")).is_none()).await;
    assert!(!temp.file("10.244.42.0-24.json").exists());
}

#[tokio::test]
async fn a_free_previous_subnet_is_taken_again_and_a_taken_or_unfit_one_is_not() {
    let temp = Temp::new();
    temp.put(&lease("other", "10.244.9.0-24"), 1);
    let store = temp.open().await;
    let previous = |key| Claim {
        previous: Some(subnets(key)),
        ..claim(0)
    };
    for (name, previous, expected) in [
        ("free", previous("10.244.77.0-24"), "10.244.77.0-24"),
        ("taken", previous("10.244.9.0-24"), "10.244.1.0-24"),
        ("outside", previous("10.9.9.0-24"), "10.244.2.0-24"),
        ("length", previous("10.244.80.0-25"), "10.244.3.0-24"),
        ("reserved", previous("10.244.0.0-24"), "10.244.4.0-24"),
    ] {
        let held = store.acquire(&node(name), &network(), &previous).await.unwrap();
        assert_eq!(held.subnets, subnets(expected), "{name}");
    }
}

#[tokio::test]
async fn a_lease_that_no_longer_fits_the_network_is_replaced_and_handed_back() {
    let temp = Temp::new();
    let old = lease("a", "10.99.1.0-24");
    temp.put(&old, 5);
    let store = temp.open().await;
    let held = store.acquire(&node("a"), &network(), &claim(7)).await.unwrap();
    assert_eq!((held.subnets, held.previous), (subnets("10.244.8.0-24"), Some(old)));
    assert!(!temp.file("10.99.1.0-24.json").exists());
    assert_eq!(store.roster().borrow().get(&node("a")).unwrap().subnets, held.subnets);
}

#[tokio::test]
async fn a_subnet_that_overlaps_a_lease_of_another_size_is_not_given_out() {
    let temp = Temp::new();
    temp.put(&lease("wide", "10.244.0.0-17"), 1);
    temp.put(&lease("inside", "10.244.1.0-24"), 1);
    temp.put(&lease("narrow", "10.244.130.128-25"), 1);
    temp.put(&lease("dual", "10.244.131.0-24&fd00:244:0:1::-64"), 1);
    let store = temp.open().await;
    let network = v4_network("10.244.0.0/16", 24, 1, 131);
    for expected in ["10.244.128.0-24", "10.244.129.0-24"] {
        let held = store.acquire(&node(expected), &network, &claim(0)).await.unwrap();
        assert_eq!(held.subnets, subnets(expected));
    }
    let full = store.acquire(&node("late"), &network, &claim(0)).await.unwrap_err();
    assert!(matches!(full, StoreError::Exhausted { total: 131, .. }), "{full}");
}

#[test]
fn twenty_nodes_that_race_get_twenty_subnets_and_the_next_is_told_that_none_is_left() {
    let temp = Temp::new();
    let network = v4_network("10.244.0.0/16", 24, 1, 20);
    let acquire = |name: String| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let store = Store::open_dir(&temp.0).await.unwrap();
            let held = store.acquire(&node(&name), &network, &claim(3)).await?;
            store
                .publish(&Lease {
                    subnets: held.subnets,
                    ..lease(&name, "10.244.1.0-24")
                })
                .await?;
            Ok::<_, StoreError>(held.subnets)
        })
    };
    let taken: BTreeSet<Subnets> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..20)
            .map(|i| scope.spawn(move || acquire(format!("node-{i}"))))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap().unwrap())
            .collect()
    });
    assert_eq!(taken.len(), 20);
    let revisions: BTreeSet<u64> = taken
        .iter()
        .map(|subnets| {
            format::decode(*subnets, &fs::read(temp.file(&file_name(subnets))).unwrap())
                .unwrap()
                .1
        })
        .collect();
    assert_eq!(
        (revisions.len(), revisions.last()),
        (20, Some(&40)),
        "every write has a revision of its own"
    );
    let full = acquire("one-too-many".into()).unwrap_err();
    assert!(!full.is_transient());
    assert_eq!(
        full.to_string(),
        format!(
            "out of subnets: 20 of 20 subnets of 10.244.0.0/16 are leased: remove the files of nodes that are gone from \
             {}, or enlarge Network",
            temp.0.display()
        )
    );
    let left: Vec<_> = fs::read_dir(&temp.0).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), 21, "20 leases and .sequence: {left:?}");
}

#[tokio::test]
async fn a_creation_that_another_program_wins_fails_and_leaves_its_file_alone() {
    let temp = Temp::new();
    let theirs = lease("b", "10.244.1.0-24");
    temp.put(&theirs, 4);
    let locked = Folder::lock(&temp.0).unwrap();
    assert_eq!(locked.create(&lease("a", "10.244.1.0-24"), 0).unwrap(), None);
    let bytes = fs::read(temp.file("10.244.1.0-24.json")).unwrap();
    assert_eq!(format::decode(theirs.subnets, &bytes).unwrap(), (theirs, 4));
}

#[tokio::test]
async fn a_stolen_lease_is_not_written_over() {
    let temp = Temp::new();
    let store = temp.open().await;
    let held = store.acquire(&node("a"), &network(), &claim(0)).await.unwrap();
    let mine = lease("a", &format::key(&held.subnets));
    store.publish(&mine).await.unwrap();
    let thief = with_data(
        &Lease {
            node: node("thief"),
            ..mine.clone()
        },
        json!(1),
    );
    temp.put(&thief, 99);
    until(&mut store.roster(), |roster| names(roster) == ["thief"]).await;
    let refused = store.publish(&with_data(&mine, json!(2))).await.unwrap_err();
    assert!(
        matches!(&refused, StoreError::Stolen { holder, .. } if *holder == node("thief")),
        "{refused}"
    );
    assert!(!refused.is_transient());
    assert!(store.health().writing.unwrap().error.contains("thief"));
    assert_eq!(
        format::decode(thief.subnets, &fs::read(temp.file("10.244.1.0-24.json")).unwrap()).unwrap(),
        (thief, 99)
    );
    store.release(&node("a"), &mine.subnets).await.unwrap();
    assert!(
        temp.file("10.244.1.0-24.json").exists(),
        "another's lease is not released"
    );
    assert_eq!(store.health().writing, None);
}

#[tokio::test]
async fn a_subnet_stolen_under_another_file_name_is_not_taken_back() {
    let temp = Temp::new();
    let store = temp.open().await;
    let held = store.acquire(&node("a"), &network(), &claim(0)).await.unwrap();
    fs::remove_file(temp.file("10.244.1.0-24.json")).unwrap();
    temp.put(&lease("b", "10.244.1.0-24&fd00:244:0:1::-64"), 9);
    let refused = store
        .publish(&lease("a", &format::key(&held.subnets)))
        .await
        .unwrap_err();
    assert!(
        matches!(&refused, StoreError::Stolen { holder, .. } if *holder == node("b")),
        "{refused}"
    );
}

#[tokio::test]
async fn a_second_process_of_the_same_name_is_found_out() {
    let temp = Temp::new();
    let (first, second) = (temp.open().await, temp.open().await);
    let held = first.acquire(&node("a"), &network(), &claim(0)).await.unwrap();
    second.acquire(&node("a"), &network(), &claim(0)).await.unwrap();
    let mine = lease("a", &format::key(&held.subnets));
    second.publish(&mine).await.unwrap();
    let refused = first.publish(&with_data(&mine, json!("first"))).await.unwrap_err();
    assert!(
        matches!(
            refused,
            StoreError::Superseded {
                stored: 2,
                written: 1,
                ..
            }
        ),
        "{refused}"
    );
    second.publish(&with_data(&mine, json!("second"))).await.unwrap();
}

#[tokio::test]
async fn a_vanished_or_damaged_own_lease_is_written_again() {
    let temp = Temp::new();
    let store = temp.open().await;
    let held = store.acquire(&node("a"), &network(), &claim(0)).await.unwrap();
    let mine = lease("a", &format::key(&held.subnets));
    let file = temp.file("10.244.1.0-24.json");
    store.publish(&mine).await.unwrap();
    fs::remove_file(&file).unwrap();
    fs::remove_file(temp.file(".sequence")).unwrap();
    until(&mut store.roster(), |roster| roster.get(&node("a")).is_none()).await;
    store.publish(&mine).await.unwrap();
    assert_eq!(names(&store.roster().borrow()), ["a"]);
    fs::write(&file, "{").unwrap();
    until(&mut store.roster(), |roster| {
        roster.rejected().contains_key("10.244.1.0-24.json")
    })
    .await;
    store.publish(&mine).await.unwrap();
    assert_eq!(names(&store.roster().borrow()), ["a"]);
    assert!(store.roster().borrow().rejected().is_empty());
    let (_, revision) = format::decode(mine.subnets, &fs::read(&file).unwrap()).unwrap();
    assert!(revision >= 3, "{revision}");
}

#[tokio::test]
async fn an_older_lease_from_a_backup_is_shown_as_it_is_and_may_be_written_over_by_its_node() {
    let temp = Temp::new();
    let store = temp.open().await;
    store.acquire(&node("a"), &network(), &claim(0)).await.unwrap();
    let mine = lease("a", "10.244.1.0-24");
    store.publish(&mine).await.unwrap();
    let backup = fs::read(temp.file("10.244.1.0-24.json")).unwrap();
    let newer = with_data(&mine, json!("newer"));
    store.publish(&newer).await.unwrap();
    fs::write(temp.file("10.244.1.0-24.json"), &backup).unwrap();
    until(&mut store.roster(), |roster| **roster.get(&node("a")).unwrap() == mine).await;
    store.publish(&newer).await.unwrap();
    assert_eq!(**store.roster().borrow().get(&node("a")).unwrap(), newer);
}

#[tokio::test]
async fn publishing_what_is_there_writes_nothing() {
    let temp = Temp::new();
    let store = temp.open().await;
    store.acquire(&node("a"), &network(), &claim(0)).await.unwrap();
    store.publish(&lease("a", "10.244.1.0-24")).await.unwrap();
    let before = fs::read(temp.file("10.244.1.0-24.json")).unwrap();
    store.publish(&lease("a", "10.244.1.0-24")).await.unwrap();
    assert_eq!(fs::read(temp.file("10.244.1.0-24.json")).unwrap(), before);
    let huge = with_data(&lease("a", "10.244.1.0-24"), json!("x".repeat(70_000)));
    assert!(matches!(
        store.publish(&huge).await,
        Err(StoreError::TooBig {
            bytes: 70_000..,
            max: 65_536
        })
    ));
    let none = Lease {
        subnets: Subnets::default(),
        ..lease("a", "10.244.1.0-24")
    };
    assert!(matches!(store.publish(&none).await, Err(StoreError::NoSubnet(_))));
    assert_eq!(fs::read(temp.file("10.244.1.0-24.json")).unwrap(), before);
}

#[tokio::test]
async fn garbage_is_listed_with_the_reason_and_stops_nobody() {
    let temp = Temp::new();
    temp.put(&lease("good", "10.244.1.0-24"), 1);
    let json = |text: &str| text.as_bytes().to_vec();
    let good = |name: &str| format::encode(&lease(name, "10.244.1.0-24"), 1).into_bytes();
    let cases = [
        ("10.244.2.0-24.json", json("not JSON at all"), "not the JSON of a lease"),
        (
            "10.244.3.0-24.json",
            json(r#"{"PublicIP": "192.168.1.1"}"#),
            "no \"Node\" is named",
        ),
        (
            "10.244.4.0-24.json",
            json(r#"{"Node": "a", "PublicIP": 7}"#),
            "not the JSON of a lease",
        ),
        ("10.244.5.0-24.json", json(r#"{"Node": "a b"}"#), "node name"),
        ("10.244.6.0-24.json", vec![b'['; 60_000], "not the JSON of a lease"),
        ("10.244.7.0-24.json", vec![b' '; 65_537], "larger than 65536 bytes"),
        ("10.244.8.0-24.json", vec![], "not the JSON of a lease"),
        ("10.244.9.0-24.json", vec![0xff, 0xfe, 0], "not the JSON of a lease"),
        (
            "10.244.10.7-24.json",
            good("x"),
            "host bits: the subnet is 10.244.10.0/24",
        ),
        ("10.244.11.0-33.json", good("x"), "not a lease's name"),
        ("010.244.11.0-24.json", good("x"), "not a lease's name"),
        ("0.0.0.0-0&fd00::-64.json", good("x"), "named fd00::-64.json"),
        ("FD00::-64.json", good("x"), "named fd00::-64.json"),
        ("notes.txt", good("x"), "not a lease's name"),
    ];
    for (name, bytes, _) in &cases {
        fs::write(temp.file(name), bytes).unwrap();
    }
    fs::write(temp.0.join(OsString::from_vec(b"\xff\x1b[2J.json".to_vec())), "").unwrap();
    fs::create_dir(temp.file("10.244.20.0-24.json")).unwrap();
    mkfifo(&temp.file("10.244.21.0-24.json"), Mode::from_bits_truncate(0o600)).unwrap();
    std::os::unix::fs::symlink("10.244.22.0-24.json", temp.file("10.244.22.0-24.json")).unwrap();
    std::os::unix::fs::symlink("/dev/zero", temp.file("10.244.23.0-24.json")).unwrap();
    std::os::unix::fs::symlink("nowhere", temp.file("10.244.24.0-24.json")).unwrap();
    for hidden in [".lock", ".new-1-1", ".nfs0001"] {
        fs::write(temp.file(hidden), "x").unwrap();
    }
    let store = temp.open().await;
    let roster = store.roster().borrow().clone();
    assert_eq!(
        (names(&roster), roster.completeness),
        (vec!["good"], Completeness::Complete)
    );
    let mut expected: Vec<(&str, &str)> = cases.iter().map(|(name, _, reason)| (*name, *reason)).collect();
    expected.extend([
        ("10.244.20.0-24.json", "not a regular file"),
        ("10.244.21.0-24.json", "not a regular file"),
        ("10.244.22.0-24.json", "loop"),
        ("10.244.23.0-24.json", "not a regular file"),
        ("10.244.24.0-24.json", "link to nothing"),
        ("\u{fffd}\\u{1b}[2J.json", "not a lease's name"),
    ]);
    for (name, reason) in &expected {
        let said = roster
            .rejected()
            .get(*name)
            .unwrap_or_else(|| panic!("{name} in {:?}", roster.rejected()));
        assert!(said.contains(reason), "{name}: {said}");
    }
    assert_eq!(roster.rejected().len(), expected.len());
    // Corrected, it is served.
    temp.put(&lease("late", "10.244.2.0-24"), 1);
    until(&mut store.roster(), |roster| names(roster) == ["good", "late"]).await;
    let held = store
        .acquire(&node("a"), &v4_network("10.244.0.0/16", 24, 20, 25), &claim(0))
        .await
        .unwrap();
    assert_eq!(
        held.subnets,
        subnets("10.244.25.0-24"),
        "a subnet whose file is garbage is not given out"
    );
}

#[tokio::test]
async fn of_two_files_that_name_a_node_the_newer_counts_and_the_other_is_listed() {
    let temp = Temp::new();
    temp.put(&lease("a", "10.244.1.0-24"), 5);
    temp.put(&lease("a", "10.244.2.0-24"), 6);
    let store = temp.open().await;
    let subnet = |roster: &Roster| roster.get(&node("a")).unwrap().subnets;
    assert_eq!(subnet(&store.roster().borrow()), subnets("10.244.2.0-24"));
    let listed = store.roster().borrow().rejected().clone();
    assert_eq!(
        listed["10.244.1.0-24.json"],
        "revision 5 of node a: 10.244.2.0-24.json has 6"
    );
    temp.put(&lease("a", "10.244.1.0-24"), 7);
    until(&mut store.roster(), |roster| subnet(roster) == subnets("10.244.1.0-24")).await;
    assert!(store.roster().borrow().rejected().contains_key("10.244.2.0-24.json"));
    fs::remove_file(temp.file("10.244.1.0-24.json")).unwrap();
    until(&mut store.roster(), |roster| subnet(roster) == subnets("10.244.2.0-24")).await;
    assert!(store.roster().borrow().rejected().is_empty());
    temp.put(&lease("b", "10.244.2.0-24"), 8);
    until(&mut store.roster(), |roster| names(roster) == ["b"]).await;
}

#[tokio::test]
async fn a_file_rewritten_in_place_does_not_make_its_node_leave() {
    let temp = Temp::new();
    temp.put(&lease("a", "10.244.1.0-24"), 1);
    let store = temp.open().await;
    let mut roster = store.roster();
    roster.mark_unchanged();
    let file = temp.file("10.244.1.0-24.json");
    fs::write(&file, "").unwrap();
    tokio::time::sleep(Duration::from_millis(200)).await;
    fs::remove_file(&file).unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    temp.put(&lease("a", "10.244.1.0-24"), 1);
    tokio::time::sleep(Duration::from_millis(1000)).await;
    assert!(!roster.has_changed().unwrap());
}

#[tokio::test]
async fn one_changed_file_among_5000_is_the_only_one_read() {
    let temp = Temp::new();
    let key = |i: usize| format!("10.{}.{}.0-24", i / 256, i % 256);
    for i in 0..5000 {
        temp.put(&lease(&format!("n{i}"), &key(i)), 1);
    }
    let store = temp.open().await;
    assert_eq!(store.roster().borrow().leases().count(), 5000);
    let (read, full) = counters(&store);
    assert_eq!(read, 5000);
    let revision = store.roster().borrow().revision();
    temp.put(&with_data(&lease("n17", &key(17)), json!("new")), 2);
    until(&mut store.roster(), |roster| {
        roster.get(&node("n17")).unwrap().data.value() == json!("new")
    })
    .await;
    let (after, full_after) = counters(&store);
    assert!(after - read <= 2, "{} files read", after - read);
    assert_eq!(full_after, full);
    let roster = store.roster();
    let roster = roster.borrow();
    let changed: Vec<&str> = roster.since(revision).unwrap().map(|(node, _)| node.as_str()).collect();
    assert_eq!(changed, ["n17"]);
}

#[tokio::test]
async fn lost_events_lead_to_a_full_reading() {
    let temp = Temp::new();
    temp.put(&lease("a", "10.244.1.0-24"), 1);
    let store = temp.open().await;
    let (_, full) = counters(&store);
    let limit = fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").unwrap();
    let limit: usize = limit.trim().parse().unwrap();
    // This thread is the runtime's only one, so the events pile up until the next await.
    let files = [temp.file(".new-x"), temp.file(".new-y")];
    for i in 0..=limit {
        fs::write(&files[i % 2], "").unwrap();
    }
    temp.put(&lease("b", "10.244.2.0-24"), 1);
    until(&mut store.roster(), |roster| names(roster) == ["a", "b"]).await;
    assert!(counters(&store).1 > full);
}

#[tokio::test]
async fn what_a_dead_writer_left_is_removed_when_old() {
    let temp = Temp::new();
    let (old, young) = (temp.file(".new-1-1"), temp.file(".new-1-2"));
    fs::write(&young, "half a le").unwrap();
    fs::write(&old, "half a le").unwrap();
    let locked = Folder::lock(&temp.0).unwrap();
    let names = locked.folder().names().unwrap();
    locked.tidy(&names, std::time::SystemTime::now() + Duration::from_secs(200));
    assert!(old.exists() && young.exists());
    locked.tidy(&names, std::time::SystemTime::now() + Duration::from_secs(400));
    assert!(!old.exists() && !young.exists());
}

#[tokio::test]
async fn the_configuration_in_the_folder_is_read_and_watched() {
    let temp = Temp::new();
    let store = temp.open().await;
    let mut config = store.config_changes();
    assert_eq!((store.config().await.unwrap(), config.borrow().clone()), (None, None));
    fs::write(temp.file("net-conf.json"), "{}").unwrap();
    config.wait_for(|text| text.as_deref() == Some("{}")).await.unwrap();
    assert_eq!(store.config().await.unwrap().as_deref(), Some("{}"));
    assert!(store.roster().borrow().rejected().is_empty());
    fs::write(temp.file("net-conf.json"), [0xff]).unwrap();
    let refused = store.config().await.unwrap_err();
    assert!(refused.to_string().contains("net-conf.json"));
    assert_eq!(config.borrow().as_deref(), Some("{}"));
}

#[tokio::test]
async fn a_locked_folder_makes_a_writer_wait() {
    let temp = Temp::new();
    let store = temp.open().await;
    let locked = Folder::lock(&temp.0).unwrap();
    let holder = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(300));
        drop(locked);
    });
    let start = Instant::now();
    store.acquire(&node("a"), &network(), &claim(0)).await.unwrap();
    assert!(start.elapsed() >= Duration::from_millis(290));
    holder.join().unwrap();
}
