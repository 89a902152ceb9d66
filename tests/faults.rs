//! Faults of the store and of the kernel, in a simulated mesh: leases that vanish while their nodes are there,
//! notifications that are lost again and again, writes for which the kernel has no memory.

mod sim;

use std::time::Duration;

use ringmail::kernel::{Event, Key, Kind};
use ringmail::lease::Lease;
use ringmail::node::Cause;
use ringmail::node::report::{PeerReport, State};
use sim::kernel::Fault;
use sim::make::Families;
use sim::mesh::Mesh;

/// What node `x` says of node `y`; `None` where it knows nothing of it.
fn seen(mesh: &Mesh, x: usize, y: usize) -> Option<PeerReport> {
    let process = mesh.members[x].process.as_ref().expect("it runs");
    let report = process
        .reconciler
        .node
        .report(&Default::default(), mesh.now - process.began);
    let name = mesh.members[y].settings.name.as_str();
    report.peers.into_iter().find(|peer| peer.node == name)
}

fn flows(mesh: &Mesh, x: usize, y: usize) -> bool {
    mesh.views.borrow()[x].flows.contains(&y)
}

/// Takes the newest lease of each of `nodes` out of the store, and returns them.
fn take_away(mesh: &mut Mesh, nodes: impl IntoIterator<Item = usize>) -> Vec<Option<Lease>> {
    let mut leases = Vec::new();
    for y in nodes {
        leases.push(mesh.members[y].versions.last().cloned().expect("it has a lease"));
        mesh.members[y].versions.push(None);
    }
    leases
}

fn writes(mesh: &Mesh) -> Vec<u64> {
    let writes = |member: &sim::mesh::Member| member.process.as_ref().map_or(0, |p| p.reconciler.writes());
    mesh.members.iter().map(writes).collect()
}

#[test]
fn nodes_whose_leases_all_vanish_are_served_while_they_answer_and_named() {
    let mut mesh = Mesh::settled("all leases vanish", Families::Both, 3);
    let before = writes(&mesh);
    let leases = take_away(&mut mesh, 0..3);
    mesh.run(Duration::from_secs(1000));
    for (x, y) in [(0, 1), (1, 0), (1, 2), (2, 1), (0, 2), (2, 0)] {
        let peer = seen(&mesh, x, y).expect("it is named");
        assert_eq!(peer.state, State::Up);
        let reason = peer.reason.expect("it is no usual thing");
        assert!(
            reason.starts_with("its lease is gone from the store for 1000 s, and it is served while it answers"),
            "{reason}"
        );
        assert!(flows(&mesh, x, y));
    }
    assert_eq!(writes(&mesh), before, "nothing in the kernel changed");
    for (y, lease) in leases.into_iter().enumerate() {
        mesh.members[y].versions.push(lease);
    }
    mesh.run(Duration::from_secs(1));
    assert_eq!(writes(&mesh), before, "the leases that are back say nothing new");
    mesh.settle();
}

#[test]
fn a_node_whose_lease_vanished_and_that_does_not_answer_is_let_go() {
    let mut mesh = Mesh::settled("a node leaves", Families::V4, 3);
    mesh.leave(2);
    mesh.run(Duration::from_secs(4));
    assert!(seen(&mesh, 0, 2).is_some());
    mesh.run(Duration::from_secs(2));
    assert_eq!(seen(&mesh, 0, 2), None);
    mesh.settle();
}

#[test]
fn a_node_without_a_lease_that_falls_silent_later_is_let_go() {
    let mut mesh = Mesh::settled("lease first, node later", Families::V4, 2);
    take_away(&mut mesh, [1]);
    mesh.run(Duration::from_secs(100));
    assert!(flows(&mesh, 0, 1));
    mesh.leave(1);
    mesh.run(Duration::from_secs(30));
    assert!(seen(&mesh, 0, 1).is_some(), "three of its answers may be lost");
    mesh.run(Duration::from_secs(31));
    assert_eq!(seen(&mesh, 0, 1), None);
    mesh.settle();
}

#[test]
fn a_node_without_a_lease_makes_way_at_once_for_one_that_has_a_lease_of_its_subnet() {
    let mut mesh = Mesh::settled("subnet taken again", Families::V4, 2);
    let theirs = take_away(&mut mesh, [1]).remove(0).expect("a lease");
    mesh.run(Duration::from_secs(1));
    assert!(flows(&mesh, 0, 1));
    let new = mesh.add();
    mesh.views.borrow_mut()[1].present = false;
    let (subnets, around) = (mesh.members[1].subnets, mesh.views.borrow()[1].around.own);
    (mesh.members[new].subnets, mesh.members[new].number) = (subnets, mesh.members[1].number);
    mesh.views.borrow_mut()[new].around.own = around;
    mesh.start(new);
    mesh.run(Duration::from_secs(1));
    assert_eq!(seen(&mesh, 0, 1), None);
    assert_eq!(seen(&mesh, 0, new).expect("it is there").state, State::Up);
    // Who comes late to a subnet that is taken is in conflict, as ever.
    mesh.members[1].versions.push(Some(theirs));
    mesh.read(0, 1, usize::MAX);
    let reason = seen(&mesh, 0, 1).expect("it is named").reason.expect("refused");
    assert!(reason.contains("is also claimed by"), "{reason}");
}

#[test]
fn a_lower_epoch_in_place_of_a_lease_that_vanished_is_believed_once_the_node_is_silent_on_the_higher() {
    let mut mesh = Mesh::settled("clock back and lease lost", Families::V4, 2);
    // A machine whose clock was set back starts with nothing: its number is below what the mesh has seen.
    let old = mesh.members[1].versions.first().cloned().expect("its first lease");
    mesh.rotate(1, Cause::Asked);
    mesh.run(Duration::from_secs(10));
    take_away(&mut mesh, [1]);
    mesh.read(0, 1, usize::MAX);
    mesh.members[1].versions.push(old);
    mesh.run(Duration::from_secs(30));
    let reason = seen(&mesh, 0, 1).expect("it is named").reason.expect("refused");
    assert!(
        reason.contains("the newest lease is refused, its last good one serves"),
        "{reason}"
    );
    assert!(flows(&mesh, 0, 1), "a lease that was rolled back costs nothing");
    mesh.views.borrow_mut()[1].present = false;
    mesh.reboot(1);
    mesh.run(Duration::from_secs(61));
    let peer = seen(&mesh, 0, 1).expect("it is named");
    assert_eq!(
        peer.state,
        State::Waiting,
        "its lower epoch is what there is, and nothing goes by it unconfirmed"
    );
    assert!(!flows(&mesh, 0, 1));
}

#[test]
fn notifications_that_are_lost_all_the_time_cost_few_readings_of_the_kernel() {
    let mut mesh = Mesh::settled("overruns", Families::V4, 3);
    let kernel = mesh.members[0].kernel.clone();
    let before = kernel.look(|machine| machine.dumps);
    let policy = |key: &&Key| key.kind() == Kind::Policy;
    // Another program floods our queue for ten seconds: each millisecond tells that something was lost.
    for millisecond in 0..10_000 {
        kernel.with(|machine| machine.notices.push(Event::Overrun));
        if millisecond == 5_000 {
            let key = kernel.look(|machine| machine.objects.keys().find(policy).cloned().expect("there are some"));
            mesh.hurt(0, |kernel| {
                kernel.remove_by_hand(&key);
                kernel.with(|machine| machine.notices = vec![Event::Overrun]);
            });
        }
        mesh.turn(0);
        mesh.wait(Duration::from_millis(1));
    }
    let dumps = kernel.look(|machine| machine.dumps) - before;
    assert!((8..=20).contains(&dumps), "{dumps} readings in ten seconds");
    mesh.run(Duration::from_secs(6));
    assert!(!mesh.views.borrow()[0].hurt, "what was removed unseen is mended");
    // Rare losses are looked at at once.
    mesh.run(Duration::from_secs(20));
    let before = kernel.look(|machine| machine.dumps);
    kernel.with(|machine| machine.notices.push(Event::Overrun));
    mesh.turn(0);
    assert_eq!(kernel.look(|machine| machine.dumps), before + 1);
    mesh.settle();
}

#[test]
fn a_kernel_that_can_not_be_read_is_asked_rarely_and_not_written_to() {
    let mut mesh = Mesh::settled("unreadable", Families::V4, 2);
    let kernel = mesh.members[0].kernel.clone();
    let before = kernel.look(|machine| machine.dumps);
    kernel.with(|machine| {
        machine.blind = usize::MAX;
        machine.notices.push(Event::Overrun);
    });
    let written = writes(&mesh)[0];
    mesh.turn(0);
    mesh.rotate(0, Cause::Asked);
    mesh.run(Duration::from_secs(60));
    let dumps = kernel.look(|machine| machine.dumps) - before;
    assert!((12..=25).contains(&dumps), "{dumps} tries in a minute");
    assert_eq!(writes(&mesh)[0], written);
    kernel.with(|machine| machine.blind = 0);
    mesh.settle();
}

#[test]
fn a_peer_whose_sa_finds_no_memory_is_tried_again_ever_more_rarely_on_the_key_it_had_and_stops_nobody() {
    let mut mesh = Mesh::settled("ENOMEM", Families::V4, 3);
    let kernel = mesh.members[0].kernel.clone();
    let epoch = |mesh: &Mesh| mesh.members[0].process.as_ref().and_then(|p| p.reconciler.node.epoch());
    // Node 1 rotates; the SA that node 0 would send to it on finds no memory for a minute.
    mesh.rotate(1, Cause::Asked);
    let (own, theirs) = (epoch(&mesh).expect("one"), {
        let process = mesh.members[1].process.as_ref().expect("it runs");
        process.reconciler.node.epoch().expect("one")
    });
    let spi = keys::Spi::new(sim::make::slot(mesh.members[0].number), own, theirs).0;
    let dst = mesh.members[1].uplink.public.v4.expect("it has one").into();
    let sa = Key::Sa(xfrm::SaId { dst, spi });
    kernel.with(|machine| machine.cursed.insert(sa.clone(), Fault::Refused));
    mesh.run(Duration::from_secs(60));
    let tries = kernel.look(|machine| machine.log.iter().filter(|(op, _)| *op.key() == sa).count());
    assert!((8..=16).contains(&tries), "{tries} tries in a minute");
    assert!(flows(&mesh, 0, 1) && flows(&mesh, 0, 2) && flows(&mesh, 1, 0));
    let reason = seen(&mesh, 0, 1)
        .expect("it is named")
        .reason
        .expect("the kernel's words");
    assert!(reason.contains("ENOMEM"), "{reason}");
    assert_eq!(seen(&mesh, 0, 2).expect("it is there").reason, None);
    let before = epoch(&mesh);
    kernel.with(|machine| machine.cursed.clear());
    mesh.settle();
    assert_eq!(
        epoch(&mesh),
        before,
        "the key that the kernel refused for sure served in the end"
    );
}
