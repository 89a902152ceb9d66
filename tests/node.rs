//! Scenes from the life of a mesh, each told step by step. The world is simulated, the nodes are real: see `sim`.

mod sim;

use std::time::Duration;

use keys::Carrier;
use ringmail::kernel::{Guard, Key, Kind};
use ringmail::node::report::{Comes, PeerReport, State};
use ringmail::node::silence::{Line, Silence, Silent};
use ringmail::node::{Cause, Rotations, Traffic};
use sim::kernel::Fault;
use sim::make::Families;
use sim::mesh::Mesh;

#[test]
fn three_nodes_come_to_their_newest_generations() {
    for families in Families::ALL {
        Mesh::settled("three nodes", families, 3);
    }
}

#[test]
fn a_rotation_takes_few_probes() {
    for nodes in [2, 4, 6] {
        let mut mesh = Mesh::settled("probes of a rotation", Families::V4, nodes);
        let pairs = u64::from(nodes - 1);
        // Past the questions of full size that all pairs ask every five minutes.
        mesh.run(Duration::from_secs(40));
        let before = mesh.probes;
        mesh.rotate(0, Cause::Asked);
        mesh.run(Duration::from_secs(5));
        let rotation = mesh.probes - before;
        println!(
            "{nodes} nodes: {rotation} probes for a rotation, {} for each peer",
            rotation / pairs
        );
        // Two questions of full size and their answers are among them.
        assert!(rotation <= 28 * pairs, "{rotation} probes for {pairs} peers");
        let before = mesh.probes;
        mesh.stop(0);
        mesh.start(0);
        mesh.run(Duration::from_secs(5));
        let restart = mesh.probes - before;
        println!(
            "{nodes} nodes: {restart} probes for a restart, {} for each peer",
            restart / pairs
        );
        assert!(restart <= 28 * pairs, "{restart} probes for {pairs} peers");
        mesh.settle();
    }
}

#[test]
fn a_restart_in_the_middle_of_a_rotation_leaves_no_sa_of_the_past() {
    let mut mesh = Mesh::settled("restart in a rotation", Families::V4, 2);
    mesh.rotate(0, Cause::Asked);
    // Its probe is lost: the sending SA of the new epoch is there, and no data goes on it.
    mesh.wire.clear();
    mesh.stop(0);
    mesh.start(0);
    mesh.settle();
}

#[test]
fn a_guard_that_was_made_though_its_answer_was_lost_counts_as_made() {
    let mut mesh = Mesh::settled("answer lost", Families::V4, 2);
    let block = mesh.members[0].kernel.look(|machine| {
        let guard = |key: &&Key| matches!(key, Key::Guard(Guard::Block, _));
        machine.objects.keys().find(guard).cloned().expect("it is there")
    });
    mesh.hurt(0, |kernel| {
        kernel.remove_by_hand(&block);
        kernel.with(|machine| machine.faults.insert(machine.log.len(), Fault::LostDone));
    });
    mesh.turn(0);
    mesh.settle();
}

#[test]
fn a_node_without_a_daemon_is_still_heard_after_others_rotated_twice() {
    let mut mesh = Mesh::settled("daemon down", Families::V4, 2);
    mesh.rotate(0, Cause::Asked);
    mesh.wire.clear();
    mesh.read(1, 0, usize::MAX);
    mesh.turn(1);
    // Node 0 hears that its new epoch is known and moves; that it did so never comes back, and then nobody listens.
    while !mesh.wire.is_empty() {
        mesh.arrive(0);
        mesh.wire.clear();
    }
    mesh.stop(1);
    for _ in 0..3 {
        mesh.rotate(0, Cause::Asked);
        mesh.run(Duration::from_secs(700));
    }
    let flows = |x: usize, y: usize| mesh.views.borrow()[x].flows.contains(&y);
    assert!(flows(1, 0) && flows(0, 1));
    mesh.settle();
}

#[test]
fn a_lease_that_vanishes_and_comes_back_unchanged_brings_no_key_back_to_life() {
    let mut mesh = Mesh::settled("lease lost", Families::V4, 2);
    let same = mesh.members[1].versions.last().cloned().expect("it has a lease");
    let epoch = |mesh: &Mesh| {
        mesh.members[0]
            .process
            .as_ref()
            .and_then(|process| process.reconciler.node.epoch())
    };
    let before = epoch(&mesh);
    mesh.views.borrow_mut()[1].present = false;
    mesh.members[1].versions.push(None);
    mesh.read(0, 1, usize::MAX);
    mesh.turn(0);
    // Its answers are lost for so long that it is let go.
    for _ in 0..10 {
        mesh.wait(Duration::from_secs(1));
        mesh.wire.clear();
    }
    mesh.members[1].versions.push(same);
    mesh.read(0, 1, usize::MAX);
    mesh.turn(0);
    mesh.run(Duration::from_secs(5));
    assert!(epoch(&mesh) > before, "only new keys can serve");
    mesh.views.borrow_mut()[1].present = true;
    mesh.settle();
}

#[test]
fn a_new_epoch_never_takes_the_spis_of_one_that_a_policy_still_names() {
    let mut mesh = Mesh::settled("64 seconds", Families::V4, 2);
    mesh.stop(1);
    let next = Duration::from_secs(320);
    mesh.run(next - mesh.now);
    // The kernel shows nothing of the first epoch any more, which was 5 times 64 ago.
    mesh.hurt(0, |kernel| kernel.flush_by_hand(Kind::Sa));
    mesh.turn(0);
    mesh.turn(0);
    mesh.settle();
}

#[test]
fn a_peer_whose_inherited_sas_were_flushed_before_it_was_read_is_served_at_once() {
    let mut mesh = Mesh::settled("flush in a restart", Families::V4, 2);
    // Each of these epochs is known to the peer and none confirmed, so a good many SAs are there.
    for _ in 0..12 {
        mesh.rotate(0, Cause::Asked);
        mesh.read(1, 0, usize::MAX);
        mesh.turn(1);
        mesh.wire.clear();
        mesh.now += Duration::from_secs(1);
    }
    mesh.stop(1);
    mesh.boot(1);
    mesh.hurt(1, |kernel| kernel.flush_by_hand(Kind::Sa));
    mesh.turn(1);
    mesh.hold(1);
    mesh.read(1, 0, usize::MAX);
    mesh.turn(1);
    mesh.run(Duration::from_secs(2));
    assert!(mesh.views.borrow()[1].flows.contains(&0));
    mesh.settle();
}

#[test]
fn no_peer_is_opened_while_the_guard_can_not_be_made() {
    let mut mesh = Mesh::new("no guard", Families::V4);
    for _ in 0..2 {
        mesh.add();
    }
    mesh.start(1);
    let guard = Key::GuardRoute("10.244.0.0/16".parse().expect("a net"));
    mesh.members[0]
        .kernel
        .with(|machine| machine.cursed.insert(guard.clone(), Fault::Refused));
    mesh.start(0);
    mesh.run(Duration::from_secs(120));
    mesh.members[0].kernel.look(|machine| {
        let open = |key: &&Key| matches!(key.kind(), Kind::Sa | Kind::Policy | Kind::Route);
        assert_eq!(machine.objects.keys().find(open), None);
        let tries = machine.log.iter().filter(|(op, _)| *op.key() == guard).count();
        assert!((8..40).contains(&tries), "tried {tries} times in two minutes");
    });
    mesh.settle();
}

/// What the daemon's probes and its metrics cost the kernel.
#[test]
fn health_asks_the_kernel_one_question_and_metrics_take_one_dump_whatever_the_number_of_peers() {
    for nodes in [2, 7] {
        let mut mesh = Mesh::settled("questions", Families::V4, nodes);
        let kernel = mesh.members[0].kernel.clone();
        let asked = || kernel.look(|machine| (machine.questions, machine.dumps));
        let clock = mesh.now;
        let process = mesh.members[0].process.as_mut().expect("it runs");
        let (questions, dumps) = asked();
        process.reconciler.answers().expect("it answers");
        assert!(process.reconciler.node.lacks().is_empty());
        assert_eq!(asked(), (questions + 1, dumps), "health");
        let mut traffic = Traffic::default();
        let (report, headroom) = process.reconciler.read(&mut traffic, 0, clock - process.began);
        assert_eq!(asked(), (questions + 1, dumps + 1), "metrics");
        // The kernel of this world has it that each SA has carried a packet more than the one before.
        assert_eq!(report.peers.len(), nodes as usize - 1);
        assert_eq!(traffic.peers().len(), nodes as usize - 1);
        let all = traffic.all();
        assert!(all.sent.packets > 0 && all.received.packets > 0);
        let shown = |way: fn(&PeerReport) -> u64| report.peers.iter().map(way).sum::<u64>();
        assert_eq!(all.sent.packets, shown(|peer| peer.packets_out));
        assert_eq!(all.received.packets, shown(|peer| peer.packets_in));
        let headroom = headroom.expect("there are SAs");
        assert!(
            (0.0..1.0).contains(&headroom.spent) && headroom.packets > 1 << 32,
            "{headroom:?}"
        );
    }
}

#[test]
fn a_rotation_is_over_when_all_data_is_on_the_new_epoch() {
    let mut mesh = Mesh::settled("rotations", Families::V4, 4);
    let mut rotations = Rotations::default();
    mesh.rotate(0, Cause::Asked);
    let began = mesh.members[0].process.as_ref().expect("it runs").began;
    let at = |mesh: &Mesh| mesh.now - began;
    let old = {
        let process = mesh.members[0].process.as_ref().expect("it runs");
        rotations.began(Cause::Asked, &process.reconciler.node, at(&mesh));
        process.reconciler.node.epoch()
    };
    let mut steps = 0;
    while rotations.took.count() == 0 {
        let process = mesh.members[0].process.as_ref().expect("it runs");
        let moved = process
            .reconciler
            .node
            .generations()
            .filter(|(_, on)| Some(on.sender) == old)
            .count();
        rotations.look(&process.reconciler.node, at(&mesh));
        assert_eq!(rotations.took.count(), u64::from(moved == 3), "{moved} of 3 have moved");
        mesh.run(Duration::from_millis(1));
        steps += 1;
        assert!(steps < 10_000, "it is never over");
    }
    assert!(steps > 1, "it took no time");
    // One that nobody follows is given up when the next begins.
    for _ in 0..2 {
        mesh.rotate(0, Cause::Asked);
        let process = mesh.members[0].process.as_ref().expect("it runs");
        rotations.began(Cause::Asked, &process.reconciler.node, at(&mesh));
    }
    assert_eq!((rotations.took.count(), rotations.unfinished), (1, 1));
    assert_eq!(rotations.begun, [(Cause::Asked, 3)].into());
    mesh.settle();
}

#[test]
fn a_start_while_a_peer_is_gone_for_long_is_no_rotation_that_somebody_holds_up() {
    let mut mesh = Mesh::settled("gone-before", Families::V4, 3);
    mesh.stop(2);
    mesh.run(Duration::from_secs(30));
    mesh.stop(0);
    mesh.start(0);
    let mut rotations = Rotations::default();
    let process = mesh.members[0].process.as_ref().expect("it runs");
    let began = process.began;
    rotations.began(Cause::Start, &process.reconciler.node, mesh.now - began);
    for _ in 0..120 {
        mesh.run(Duration::from_secs(6));
        let process = mesh.members[0].process.as_ref().expect("it runs");
        rotations.look(&process.reconciler.node, mesh.now - began);
    }
    let process = mesh.members[0].process.as_ref().expect("it runs");
    let report = process.reconciler.node.report(&Default::default(), mesh.now - began);
    assert!(
        report.peers.iter().any(|peer| peer.state == State::Kept),
        "{:?}",
        report.peers
    );
    assert_eq!(rotations.unfinished, 0);
}

/// How node `x` sees its first peer.
fn seen(mesh: &Mesh, x: usize) -> PeerReport {
    let process = mesh.members[x].process.as_ref().expect("it runs");
    let report = process
        .reconciler
        .node
        .report(&Default::default(), mesh.now - process.began);
    report.peers.into_iter().next().expect("it has a peer")
}

#[test]
fn loss_is_counted_where_data_goes_and_neither_rotation_nor_restart_is_a_loss() {
    let mut mesh = Mesh::settled("loss", Families::V4, 2);
    for _ in 0..3 {
        // The peer reads of the new epoch late: until then it can't answer on it.
        mesh.members[1].away = true;
        mesh.rotate(0, Cause::Asked);
        mesh.run(Duration::from_secs(10));
        mesh.members[1].away = false;
        mesh.run(Duration::from_secs(61));
        mesh.stop(1);
        mesh.start(1);
        mesh.run(Duration::from_secs(61));
    }
    let losses = |mesh: &Mesh| [0, 1].map(|x| seen(mesh, x).loss);
    assert_eq!(losses(&mesh), [Some(0.0), Some(0.0)]);
    mesh.blocked.insert((0, 1, Carrier::Esp));
    mesh.run(Duration::from_secs(70));
    let peer = seen(&mesh, 0);
    let reason = peer.reason.expect("its silence is named");
    assert!(
        peer.silent == Some(Comes::Probes) && peer.state == State::Up,
        "{reason}"
    );
    assert!(
        reason.starts_with("it is heard, and does not answer the last"),
        "{reason}"
    );
    mesh.blocked.clear();
    mesh.run(Duration::from_secs(30));
    let peer = seen(&mesh, 0);
    let lost = peer.loss.expect("it was asked");
    assert!((0.15..0.5).contains(&lost), "{lost}");
    assert_eq!(
        (peer.state, peer.reason, peer.silent),
        (State::Up, None, None),
        "it answers again: a number is left"
    );
    mesh.run(Duration::from_secs(360));
    assert_eq!(losses(&mesh), [Some(0.0), Some(0.0)], "the window has moved on");
}

#[test]
fn a_peer_that_is_gone_is_called_silent_within_a_minute_also_in_the_middle_of_a_rotation() {
    for rotate in [false, true] {
        let mut mesh = Mesh::settled("gone", Families::V4, 2);
        mesh.run(Duration::from_secs(300));
        mesh.stop(1);
        if rotate {
            mesh.rotate(0, Cause::Asked);
        }
        mesh.run(Duration::from_secs(10));
        assert!(seen(&mesh, 0).silent.is_none(), "it may be a restart");
        mesh.run(Duration::from_secs(if rotate { 55 } else { 22 }));
        let peer = seen(&mesh, 0);
        let reason = peer.reason.expect("it is named");
        assert!(
            peer.silent == Some(Comes::Nothing) && reason.starts_with("silent for "),
            "{reason}"
        );
        assert_eq!(
            peer.state,
            if rotate { State::Moving } else { State::Up },
            "data goes on"
        );
        mesh.start(1);
        mesh.run(Duration::from_secs(30));
        let peer = seen(&mesh, 0);
        assert_eq!((peer.state, peer.reason, peer.silent), (State::Up, None, None));
        assert_eq!(peer.loss, Some(0.0), "while it was down it could not answer");
    }
}

/// What node 0 would log at its next look.
fn news(mesh: &Mesh, silent: &mut Silent) -> Vec<Line> {
    let process = mesh.members[0].process.as_ref().expect("it runs");
    silent.look(&process.reconciler.node, mesh.now - process.began)
}

#[test]
fn a_peer_that_falls_silent_is_news_once_and_again_when_it_answers_and_not_for_epochs_of_ours_in_between() {
    let mut mesh = Mesh::settled("silence told", Families::V4, 2);
    mesh.run(Duration::from_secs(300));
    let (mut silent, mut lines) = (Silent::default(), Vec::new());
    let mut run = |mesh: &mut Mesh, seconds: u64, lines: &mut Vec<Line>| {
        for _ in 0..seconds / 10 {
            mesh.run(Duration::from_secs(10));
            lines.extend(news(mesh, &mut silent));
        }
    };
    run(&mut mesh, 100, &mut lines);
    assert_eq!(lines, [], "it answers");
    mesh.stop(1);
    run(&mut mesh, 70, &mut lines);
    let [Line::Fallen(peer, Silence::Quiet(quiet))] = lines.as_slice() else {
        panic!("{lines:?}");
    };
    assert_eq!(peer.as_str(), seen(&mesh, 0).node);
    assert!((30..60).contains(&quiet.as_secs()), "{quiet:?}");
    lines.clear();
    mesh.rotate(0, Cause::Asked);
    assert!(seen(&mesh, 0).silent.is_none(), "it is asked anew");
    run(&mut mesh, 200, &mut lines);
    assert!(seen(&mesh, 0).silent.is_some() && lines.is_empty(), "{lines:?}");
    mesh.start(1);
    run(&mut mesh, 60, &mut lines);
    let [Line::Back(peer, silent_for)] = lines.as_slice() else {
        panic!("{lines:?}");
    };
    assert_eq!(peer.as_str(), seen(&mesh, 0).node);
    assert!((270..340).contains(&silent_for.as_secs()), "{silent_for:?}");
    lines.clear();
    // One way alone: an epoch of ours is no answer either.
    mesh.blocked.insert((0, 1, Carrier::Esp));
    run(&mut mesh, 70, &mut lines);
    assert!(
        matches!(lines.as_slice(), [Line::Fallen(_, Silence::Unanswered(3..))]),
        "{lines:?}"
    );
    lines.clear();
    mesh.rotate(0, Cause::Asked);
    run(&mut mesh, 100, &mut lines);
    assert_eq!(lines, []);
    mesh.blocked.clear();
    run(&mut mesh, 60, &mut lines);
    assert!(matches!(lines.as_slice(), [Line::Back(..)]), "{lines:?}");
}

#[test]
fn many_peers_that_fall_silent_at_one_time_are_one_line_and_those_that_leave_are_none() {
    let mut mesh = Mesh::settled("many silent", Families::V4, 6);
    let mut silent = Silent::default();
    assert_eq!(news(&mesh, &mut silent), []);
    for x in 1..6 {
        mesh.stop(x);
    }
    mesh.run(Duration::from_secs(70));
    let lines = news(&mesh, &mut silent);
    let [Line::ManyFallen(5, names)] = lines.as_slice() else {
        panic!("{lines:?}");
    };
    assert_eq!(names.split(", ").count(), 5, "{names}");
    assert_eq!(news(&mesh, &mut silent), []);
    mesh.leave(5);
    for x in 1..3 {
        mesh.start(x);
    }
    mesh.run(Duration::from_secs(30));
    let lines = news(&mesh, &mut silent);
    assert!(
        matches!(lines.as_slice(), [Line::Back(..), Line::Back(..)]),
        "{lines:?}"
    );
    for x in 3..5 {
        mesh.start(x);
    }
    mesh.run(Duration::from_secs(30));
    let lines = news(&mesh, &mut silent);
    assert!(
        matches!(lines.as_slice(), [Line::Back(..), Line::Back(..)]),
        "none of the one that left: {lines:?}"
    );
}

#[test]
fn a_path_that_swallows_full_packets_is_named_with_what_passes_and_data_goes_on() {
    for families in Families::ALL {
        let mut mesh = Mesh::settled("narrow", families, 2);
        assert_eq!([seen(&mesh, 0).full_size, seen(&mesh, 1).full_size], [Some(true); 2]);
        mesh.narrow.insert((0, 1), 1358);
        mesh.run(Duration::from_secs(330));
        let (peer, back) = (seen(&mesh, 0), seen(&mesh, 1));
        assert_eq!(
            (peer.state, peer.full_size, peer.loss),
            (State::Up, Some(false), Some(0.0))
        );
        let reason = peer.reason.expect("it is named");
        let told: Vec<u32> = reason
            .split(|c: char| !c.is_ascii_digit())
            .filter_map(|word| word.parse().ok())
            .collect();
        assert!(
            told.len() == 3 && told[1] == told[2] && told[0] > 1400 && (1354..=1358).contains(&told[1]),
            "{reason}"
        );
        assert!(reason.contains("in net-conf.json"), "{reason}");
        assert_eq!(
            (back.full_size, back.reason),
            (Some(true), None),
            "one direction is not the other"
        );
        assert!(mesh.views.borrow()[0].flows.contains(&1));
        // A rotation does not mend it.
        mesh.rotate(0, Cause::Asked);
        mesh.run(Duration::from_secs(1));
        assert_eq!(seen(&mesh, 0).full_size, Some(false));
        mesh.run(Duration::from_secs(60));
        mesh.narrow.clear();
        mesh.run(Duration::from_secs(31));
        assert_eq!((seen(&mesh, 0).full_size, seen(&mesh, 0).reason), (Some(true), None));
        mesh.settle();
    }
}

#[test]
fn a_new_generation_asks_for_full_size_soon_and_a_peer_without_a_daemon_is_not_blamed() {
    let mut mesh = Mesh::settled("sizes", Families::V4, 2);
    mesh.narrow.insert((0, 1), 1000);
    mesh.rotate(1, Cause::Asked);
    mesh.run(Duration::from_secs(15));
    assert_eq!(seen(&mesh, 0).full_size, Some(false));
    mesh.narrow.clear();
    mesh.run(Duration::from_secs(60));
    assert_eq!(seen(&mesh, 0).full_size, Some(true));
    mesh.stop(1);
    let before = mesh.probes;
    mesh.run(Duration::from_secs(3600));
    let peer = seen(&mesh, 0);
    assert_eq!(
        (peer.state, peer.full_size, peer.loss),
        (State::Up, Some(true), Some(1.0))
    );
    let probes = mesh.probes - before;
    assert!(probes < 500, "{probes} to one that does not answer");
    mesh.settle();
}

#[test]
fn what_another_hand_did_is_counted_when_it_is_put_right_and_what_the_node_does_is_not() {
    let mut mesh = Mesh::settled("drift", Families::V4, 2);
    let tally = |mesh: &Mesh| mesh.members[0].process.as_ref().expect("it runs").reconciler.tally();
    mesh.rotate(0, Cause::Asked);
    mesh.settle();
    assert_eq!(tally(&mesh).repaired, 0, "rotations are no drift");
    let kernel = mesh.members[0].kernel.clone();
    for kind in [Kind::Policy, Kind::Route, Kind::Link] {
        let key = kernel.look(|machine| machine.objects.keys().find(|key| key.kind() == kind).cloned());
        let key = key.expect("there are some");
        let before = tally(&mesh);
        mesh.hurt(0, |kernel| kernel.remove_by_hand(&key));
        mesh.settle();
        let after = tally(&mesh);
        assert!(after.repaired > before.repaired, "{key}");
        assert!(after.passes > before.passes && after.writes > before.writes);
    }
    // An SA is never made again: a new epoch follows.
    let before = tally(&mesh).repaired;
    let sa = kernel.look(|machine| machine.objects.keys().find(|key| key.kind() == Kind::Sa).cloned());
    mesh.hurt(0, |kernel| kernel.remove_by_hand(&sa.expect("there are some")));
    mesh.settle();
    assert_eq!(tally(&mesh).repaired, before);
}

#[test]
fn a_peer_that_was_never_there_is_asked_ever_more_rarely_and_found_at_once_when_it_starts() {
    let mut mesh = Mesh::settled("silent", Families::V4, 2);
    mesh.reboot(1);
    mesh.rotate(0, Cause::Asked);
    mesh.run(Duration::from_secs(1000));
    let before = mesh.probes;
    mesh.run(Duration::from_secs(600));
    let probes = mesh.probes - before;
    assert!((9..=13).contains(&probes), "{probes} in ten minutes");
    assert_eq!(seen(&mesh, 0).loss, Some(0.0), "it never had the keys of this epoch");
    mesh.start(1);
    mesh.run(Duration::from_secs(1));
    assert_eq!([seen(&mesh, 0).state, seen(&mesh, 1).state], [State::Up; 2]);
    mesh.settle();
}
