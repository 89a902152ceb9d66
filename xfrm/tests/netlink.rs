//! The transport against a real kernel, as root: each test makes a network namespace of its own for its thread.

#![allow(clippy::unwrap_used, reason = "it is how a test fails")]

use std::{
    collections::BTreeSet,
    net::Ipv4Addr,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use nix::sched::{CloneFlags, unshare};
use xfrm::{Batch, Connection, Protocol, message::attributes};

const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_GETADDR: u16 = 22;
const IFA_LOCAL: u16 = 2;

/// Puts the calling thread, and those that it starts, into a network namespace of its own.
fn own_namespace() {
    unshare(CloneFlags::CLONE_NEWNET).expect("needs root");
}

/// A request about one address of the loopback device.
fn address(batch: &mut Batch, kind: u16, flags: u16, address: Ipv4Addr) {
    batch.push(kind, flags, |writer| {
        // struct ifaddrmsg: family, prefix length, flags, scope, interface.
        writer.bytes(&[2, 32, 0, 0]);
        writer.u32(1);
        writer.attribute(IFA_LOCAL, &address.octets());
    });
}

/// The addresses, and how many were read to find them: more if the dump was started anew.
fn addresses(route: &mut Connection) -> (Vec<Ipv4Addr>, usize) {
    let mut read = 0;
    let found = route.dump(
        RTM_GETADDR,
        |writer| writer.bytes(&[2, 0, 0, 0, 0, 0, 0, 0]),
        |message| {
            read += 1;
            let (_, bytes) = attributes(&message.payload[8..]).find(|(kind, _)| *kind == IFA_LOCAL)?;
            Some(Ipv4Addr::from(*bytes.first_chunk::<4>()?))
        },
    );
    (found.unwrap(), read)
}

#[test]
#[ignore = "needs root: tests/run runs it"]
fn a_dump_that_a_change_interrupted_is_started_anew_and_misses_nothing() {
    own_namespace();
    let all: Vec<Ipv4Addr> = (0..1000u32).map(|index| Ipv4Addr::from(0x0a00_0001 + index)).collect();
    let mut route = Connection::open(Protocol::Route).unwrap();
    let mut batch = Batch::new();
    all.iter().for_each(|one| address(&mut batch, RTM_NEWADDR, 0x600, *one));
    assert!(route.execute(batch).iter().all(Result::is_ok));

    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let _end = SetOnDrop(&done);
        // The oldest address goes and comes back as the newest: what a dump has skipped by number is no more what it has
        // shown.
        scope.spawn(|| {
            let mut route = Connection::open(Protocol::Route).unwrap();
            for oldest in all.iter().cycle() {
                let mut batch = Batch::new();
                address(&mut batch, RTM_DELADDR, 0, *oldest);
                address(&mut batch, RTM_NEWADDR, 0x600, *oldest);
                assert!(route.execute(batch).iter().all(Result::is_ok));
                thread::sleep(Duration::from_millis(2));
                if done.load(Ordering::Relaxed) {
                    return;
                }
            }
        });
        let start = Instant::now();
        let mut restarts = 0;
        while restarts < 50 && start.elapsed() < Duration::from_secs(5) {
            let (found, read) = addresses(&mut route);
            restarts += usize::from(read > found.len());
            // A change within the last part of a dump has no flag: the one address on the move may be there twice or not at
            // all, the others are there.
            let distinct: BTreeSet<_> = found.into_iter().collect();
            assert!(distinct.len() + 1 >= all.len(), "{} of {}", distinct.len(), all.len());
        }
        println!("{restarts} restarts");
    });
}

/// Ends the other thread however this one ends.
struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
#[ignore = "needs root: tests/run runs it"]
fn nft_transactions_happen_whole_or_not_at_all() {
    own_namespace();
    let mut netfilter = Connection::open(Protocol::Netfilter).unwrap();
    let general = |family: u8, resource: u16| [&[family, 0][..], &resource.to_be_bytes()].concat();
    let transaction = |family: u8, tables: &[(&str, u16)]| {
        let mut batch = Batch::new();
        // NFNL_MSG_BATCH_BEGIN and END around NFT_MSG_NEWTABLE; nf_tables is subsystem 10.
        batch.push_unacknowledged(0x10, 0, |writer| writer.bytes(&general(0, 10)));
        for (name, flags) in tables {
            batch.push(0xa00, 0x400 | flags, |writer| {
                writer.bytes(&general(family, 0));
                writer.attribute_str(1, name);
            });
        }
        batch.push_unacknowledged(0x11, 0, |writer| writer.bytes(&general(0, 10)));
        batch
    };
    let tables = |netfilter: &mut Connection| {
        let found = netfilter.dump(
            0xa01,
            |writer| writer.bytes(&general(0, 0)),
            |message| {
                let (_, name) = xfrm::message::attributes(&message.payload[4..]).find(|(kind, _)| *kind == 1)?;
                Some(String::from_utf8_lossy(name).trim_end_matches('\0').to_owned())
            },
        );
        found.unwrap()
    };
    // NFPROTO_INET, or NFPROTO_BRIDGE for a kernel with little else.
    let two = |family| transaction(family, &[("one", 0), ("two", 0)]);
    let family = [1, 7]
        .into_iter()
        .find(|family| netfilter.transact(two(*family)) == Ok(()));
    let family = family.expect("nf_tables has one of the two");
    assert_eq!(tables(&mut netfilter), ["one", "two"]);
    // NLM_F_EXCL on a table that exists.
    let error = netfilter
        .transact(transaction(family, &[("three", 0), ("two", 0x200)]))
        .unwrap_err();
    assert!(error.exists(), "{error}");
    assert_eq!(tables(&mut netfilter), ["one", "two"]);
}
