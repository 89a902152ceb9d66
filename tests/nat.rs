//! Peers behind a NAT: what the kernel tells of their UDP is followed. Real nodes on simulated kernels, told by hand of
//! what a NAT would do.

mod sim;

use std::net::SocketAddr;
use std::time::Duration;

use keys::EncapMode;
use ringmail::kernel::{Event, Key, Object};
use ringmail::node::Cause;
use ringmail::node::report::PeerReport;
use sim::make::Families;
use sim::mesh::Mesh;
use xfrm::Sa;

fn mesh(mode: EncapMode) -> Mesh {
    let mut mesh = Mesh::new("behind a NAT", Families::V4);
    for x in 0..2 {
        mesh.add();
        mesh.members[x].settings.encap.mode = mode;
        mesh.start(x);
    }
    mesh.settle();
    mesh
}

/// The SAs of node 0 in UDP: those that send, those that receive.
fn in_udp(mesh: &Mesh) -> (Vec<Sa>, Vec<Sa>) {
    let own = mesh.members[0].uplink.local.v4.expect("it has one");
    let all: Vec<Sa> = mesh.members[0].kernel.look(|machine| {
        let sas = machine.objects.values().filter_map(|object| match object {
            Object::Sa { sa, .. } => Some((**sa).clone()),
            _ => None,
        });
        sas.collect()
    });
    let in_udp = all.into_iter().filter(|sa| sa.encap.is_some());
    in_udp.partition(|sa| sa.src == std::net::IpAddr::from(own))
}

/// The kernel of node 0 says that node 1's UDP comes from `source`, `times` times.
fn tell(mesh: &mut Mesh, source: &str, times: usize) {
    let (_, receiving) = in_udp(mesh);
    let id = receiving.last().expect("there is one").id();
    let source: SocketAddr = source.parse().expect("an address");
    mesh.members[0].kernel.with(|machine| {
        let told = std::iter::repeat_n(Event::Moved { id, source }, times);
        machine.notices.extend(told);
    });
    mesh.turn(0);
}

fn epoch(mesh: &Mesh) -> u64 {
    let process = mesh.members[0].process.as_ref().expect("it runs");
    process.reconciler.node.epoch().expect("one has begun").0
}

fn report(mesh: &Mesh) -> PeerReport {
    let process = mesh.members[0].process.as_ref().expect("it runs");
    let report = process.reconciler.node.report(&Default::default(), mesh.now);
    report.peers.into_iter().next().expect("it has a peer")
}

/// Where UDP goes, by the SAs that send.
fn ends(mesh: &Mesh) -> Vec<String> {
    let (sending, _) = in_udp(mesh);
    let end = |sa: &Sa| format!("{}:{}", sa.dst, sa.encap.expect("in UDP").dport);
    sending.iter().map(end).collect()
}

#[test]
fn another_port_is_followed_on_the_sas_that_are_there_and_their_keys_stay() {
    for mode in [EncapMode::Udp, EncapMode::Auto] {
        let mut mesh = mesh(mode);
        let keys = |mesh: &Mesh| mesh.members[0].kernel.look(|machine| machine.keys.clone());
        let (before, begun) = (keys(&mesh), epoch(&mesh));
        assert_eq!(
            (ends(&mesh), report(&mesh).learned),
            (vec!["192.0.2.2:4500".into()], None)
        );
        tell(&mut mesh, "192.0.2.2:41000", 3);
        assert_eq!(ends(&mesh), ["192.0.2.2:41000"]);
        let (_, receiving) = in_udp(&mesh);
        assert_eq!(
            receiving[0].encap.map(|encap| encap.sport),
            Some(41000),
            "the kernel is told, and is silent then"
        );
        assert_eq!(keys(&mesh), before);
        mesh.wait(Duration::from_secs(5));
        assert_eq!(epoch(&mesh), begun, "no epoch for a port");
        assert_eq!(report(&mesh).learned, Some("192.0.2.2:41000".into()));
        tell(&mut mesh, "192.0.2.2:4500", 1);
        assert_eq!(
            (ends(&mesh), report(&mesh).learned),
            (vec!["192.0.2.2:4500".into()], None),
            "back at home"
        );
    }
}

#[test]
fn another_address_is_for_the_next_epoch_and_a_flood_of_them_makes_few() {
    let mut mesh = mesh(EncapMode::Udp);
    let begun = epoch(&mesh);
    tell(&mut mesh, "203.0.113.9:41000", 5);
    assert_eq!(
        ends(&mesh),
        ["192.0.2.2:4500", "203.0.113.9:41000"],
        "an SA keeps its address"
    );
    assert!(epoch(&mesh) > begun);
    assert_eq!(report(&mesh).learned, Some("203.0.113.9:41000".into()));
    tell(&mut mesh, "203.0.113.10:41000", 1);
    let waits = "203.0.113.10:41000, from the next epoch on";
    assert_eq!(report(&mesh).learned, Some(waits.into()), "not two epochs in a second");
    tell(&mut mesh, "203.0.113.9:41000", 1);
    // A port of the new address is followed there, and not on the SA of the old.
    tell(&mut mesh, "203.0.113.9:41001", 1);
    let ends = ends(&mesh);
    assert!(ends.contains(&"203.0.113.9:41001".into()), "{ends:?}");
    assert!(!ends.contains(&"192.0.2.2:41001".into()), "{ends:?}");
    let begun = epoch(&mesh);
    for second in 0..120 {
        tell(&mut mesh, &format!("203.0.113.{}:500", second % 100 + 10), 1);
        mesh.wait(Duration::from_secs(1));
    }
    let published = mesh.members[0].versions.len();
    assert!(published < 14, "{published} epochs for a peer that moves each second");
    assert!(epoch(&mesh) > begun);
}

#[test]
fn what_was_learned_stays_over_own_epochs_and_a_restart() {
    let mut mesh = mesh(EncapMode::Udp);
    tell(&mut mesh, "192.0.2.2:41000", 1);
    mesh.rotate(0, Cause::Asked);
    assert!(
        ends(&mesh).iter().all(|end| end == "192.0.2.2:41000"),
        "{:?}",
        ends(&mesh)
    );
    mesh.stop(0);
    mesh.start(0);
    let ends = ends(&mesh);
    assert!(
        ends.len() > 1 && ends.iter().all(|end| end == "192.0.2.2:41000"),
        "{ends:?}"
    );
}

#[test]
fn another_family_or_an_sa_of_nobody_teaches_nothing() {
    let mut mesh = mesh(EncapMode::Udp);
    tell(&mut mesh, "[2001:db8::9]:4500", 1);
    assert_eq!(
        (ends(&mesh), report(&mesh).learned),
        (vec!["192.0.2.2:4500".into()], None)
    );
    mesh.members[0].kernel.with(|machine| {
        let id = xfrm::SaId {
            dst: [192, 0, 2, 1].into(),
            spi: 0x8000_9999,
        };
        let source = "203.0.113.9:1".parse().expect("an address");
        machine.notices.push(Event::Moved { id, source });
    });
    mesh.turn(0);
    assert_eq!(ends(&mesh), ["192.0.2.2:4500"]);
}

#[test]
fn of_two_peers_at_one_address_with_like_epochs_one_is_served_and_the_other_named_until_it_rotates() {
    let mut mesh = Mesh::new("alike", Families::V4);
    for x in 0..18 {
        mesh.add();
        mesh.members[x].settings.encap.mode = EncapMode::Udp;
    }
    // Nodes 2 and 18, whose slots are alike modulo 16, say that they are at .2, and begin in the same second.
    mesh.members[17].uplink.public = mesh.members[1].uplink.public;
    for x in [0, 1, 17] {
        mesh.boot(x);
        mesh.hold(x);
        mesh.turn(x);
    }
    for y in [1, 17] {
        mesh.read(0, y, usize::MAX);
    }
    mesh.turn(0);
    let process = mesh.members[0].process.as_ref().expect("it runs");
    let failures: Vec<String> = process
        .reconciler
        .failures()
        .map(|(scope, why)| format!("{scope}: {why}"))
        .collect();
    assert!(
        failures.len() == 1 && failures[0].contains("peer node2") && failures[0].contains("in use for peer node18"),
        "{failures:?}"
    );
    // Node 2 sees node 18's lease, and as the greater name gives way.
    mesh.read(1, 17, usize::MAX);
    let versions = |mesh: &Mesh| [mesh.members[1].versions.len(), mesh.members[17].versions.len()];
    mesh.wait(Duration::from_secs(2));
    assert_eq!(versions(&mesh), [2, 1]);
    mesh.read(0, 1, usize::MAX);
    mesh.wait(Duration::from_secs(40));
    let process = mesh.members[0].process.as_ref().expect("it runs");
    assert_eq!(process.reconciler.failures().count(), 0);
    let receivers = mesh.members[0].kernel.look(|machine| {
        let sending = machine.objects.iter().filter_map(|(key, object)| match (key, object) {
            (Key::Sa(id), Object::Sa { sa, .. }) if id.dst == std::net::IpAddr::from([192, 0, 2, 2]) => Some(sa.reqid),
            _ => None,
        });
        sending.collect::<std::collections::BTreeSet<_>>().len()
    });
    assert_eq!(receivers, 2, "both are sent to");
}

#[test]
fn nodes_of_different_slots_that_begin_in_one_second_choose_epochs_that_differ_modulo_64() {
    let mut mesh = Mesh::new("apart", Families::V4);
    for x in 0..16 {
        mesh.add();
        mesh.members[x].settings.encap.mode = EncapMode::Auto;
        mesh.boot(x);
        mesh.hold(x);
        mesh.turn(x);
    }
    let epochs = mesh.members.iter().map(|member| {
        let process = member.process.as_ref().expect("it runs");
        process.reconciler.node.epoch().expect("one has begun").mod64()
    });
    assert_eq!(epochs.collect::<std::collections::BTreeSet<_>>().len(), 16);
}

#[test]
fn an_sa_that_another_hand_takes_leaves_its_twin_in_use_until_the_new_epoch_is() {
    for out in [false, true] {
        let mut mesh = mesh(EncapMode::Auto);
        let (sending, receiving) = in_udp(&mesh);
        let lost = if out { &sending } else { &receiving }[0].id();
        let twin = xfrm::SaId {
            spi: lost.spi & !(1 << 31),
            ..lost
        };
        let begun = epoch(&mesh);
        mesh.members[0].kernel.remove_by_hand(&Key::Sa(lost));
        mesh.turn(0);
        let there = |id| {
            mesh.members[0]
                .kernel
                .look(|machine| machine.objects.contains_key(&Key::Sa(id)))
        };
        assert!(there(twin), "the twin stays");
        assert!(!there(lost), "and the lost is not made again");
        assert!(epoch(&mesh) > begun);
        mesh.settle();
        let there = |id| {
            mesh.members[0]
                .kernel
                .look(|machine| machine.objects.contains_key(&Key::Sa(id)))
        };
        assert!(!there(twin), "then both are gone");
    }
}
