//! Keys that change: PSKs that come, go and come back, who still needs one, and when epochs follow one another.

mod sim;

use std::sync::Arc;
use std::time::Duration;

use keys::{Cipher, Encap, EncapMode, Epoch, EpochSecret, Psk, Statement};
use ring::rand::SystemRandom;
use ringmail::admission::publish;
use ringmail::backend::ipsec::{MOST, Soft, limits};
use ringmail::kernel::{Key, Kind, Object, Objects, Scope};
use ringmail::lease::{BackendData, Lease};
use ringmail::node::report::{Report, State};
use ringmail::node::{Cause, Node};
use sim::make::{self, Families};
use sim::mesh::Mesh;
use xfrm::SaId;

const GRACE: Duration = Duration::from_secs(3600);

const fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn psks(numbers: &[u8]) -> Vec<Arc<Psk>> {
    let network = make::network(Families::V4);
    numbers.iter().map(|number| make::psk(*number, &network)).collect()
}

fn kid(number: u8) -> String {
    psks(&[number])[0].kid().to_string()
}

/// The lease of node `number` in epoch `epoch`, which has `listed` and tags with each of `tagged`.
fn forged(number: u32, epoch: u64, listed: &[u8], tagged: &[u8]) -> Lease {
    let network = make::network(Families::V4);
    let secret = EpochSecret::generate(&SystemRandom::new()).expect("random numbers");
    let statement = Statement {
        network: network.nets().collect(),
        node: format!("node{number}"),
        subnets: make::subnets(&network, number).iter().collect(),
        addresses: vec![[192, 0, 2, u8::try_from(number).expect("small")].into()],
        cipher: Cipher::Aes128Gcm16,
        encap: Encap {
            mode: EncapMode::Esp,
            port: 4500,
        },
        epoch: Epoch(epoch),
        public: secret.public(),
        kids: psks(listed).iter().map(|psk| psk.kid()).collect(),
    };
    Lease {
        node: make::name(&statement.node),
        subnets: statement.subnets.iter().copied().collect(),
        public: statement.addresses.iter().copied().collect(),
        backend: "ipsec".into(),
        data: publish(&statement.encode().expect("a good statement"), &psks(tagged)),
        v6_data: BackendData::NULL,
    }
}

/// Node 1 with its clock.
struct One {
    node: Node,
    now: Duration,
    epochs: u64,
}

impl One {
    /// With these PSKs and its first epoch.
    fn with(numbers: &[u8]) -> Self {
        let network = make::network(Families::V4);
        let mut node = Node::new(make::settings("node1", network), &Objects::new());
        node.uplinked(make::uplink(Families::V4, 1));
        node.keyed(psks(numbers), Duration::ZERO);
        node.holds(make::subnets(&network, 1), make::slot(1));
        let mut one = Self {
            node,
            now: Duration::ZERO,
            epochs: 0,
        };
        one.run(Duration::ZERO);
        one
    }

    /// Lets time go by; what is due happens, epochs begin.
    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        loop {
            if let Some(_cause) = self.node.wants_epoch(self.now) {
                self.epochs += 1;
                let secret = EpochSecret::generate(&SystemRandom::new()).expect("random numbers");
                self.node.begin_epoch(Epoch(self.epochs), secret, self.now, 0.0);
            }
            self.node.looks(self.now);
            self.node.tick(self.now, &mut || 0.5);
            let due = self.node.deadline(self.now).unwrap_or(end);
            if self.now >= end {
                return;
            }
            self.now = due.max(self.now + Duration::from_millis(1)).min(end);
        }
    }

    fn offer(&mut self, lease: Lease) {
        let name = lease.node.clone();
        self.node.leased(&name, Some(&Arc::new(lease)), self.now);
    }

    /// Node `number` has these PSKs in a new epoch.
    fn peer(&mut self, number: u32, epoch: u64, numbers: &[u8]) {
        self.offer(forged(number, epoch, numbers, numbers));
    }

    fn file(&mut self, numbers: &[u8]) {
        self.node.keyed(psks(numbers), self.now);
    }

    fn report(&self) -> Report {
        self.node.report(&Default::default(), self.now)
    }

    /// The kids that its lease lists now.
    fn listed(&self) -> Vec<String> {
        let lease = self.node.lease().expect("it has an epoch");
        let all: Vec<u8> = (1..200).collect();
        let admitted = ringmail::admission::verify(&lease, &make::network(Families::V4), &psks(&all));
        let kids = admitted.expect("its own lease is good").statement.kids;
        kids.iter().map(ToString::to_string).collect()
    }

    fn held(&self) -> Vec<String> {
        self.report().psks.iter().map(|psk| psk.kid.clone()).collect()
    }

    fn stands(&self, number: u32) -> (State, Option<String>) {
        let name = format!("node{number}");
        let peers = self.report().peers;
        let peer = peers.into_iter().find(|peer| peer.node == name).expect("it is known");
        (peer.state, peer.reason)
    }

    fn serves(&self, number: u32) -> bool {
        let scope = Scope::Peer(make::name(&format!("node{number}")));
        self.node.desired(&scope).keys().any(|key| key.kind() == Kind::Sa)
    }
}

#[test]
fn a_key_taken_away_is_held_until_every_peer_has_the_newer_one_and_then_dropped() {
    let mut one = One::with(&[1]);
    one.peer(2, 1, &[1]);
    one.peer(3, 1, &[1]);
    one.run(secs(10));
    one.file(&[2]);
    one.run(secs(2));
    assert_eq!(
        one.listed(),
        [kid(2), kid(1)],
        "the new one is preferred, the old still listed"
    );
    assert!(one.serves(2) && one.serves(3));
    let report = one.report();
    let [new, old] = &report.psks[..] else {
        panic!("two keys: {report:?}")
    };
    assert_eq!(
        (new.have, new.nodes, new.missing.join(" ")),
        (1, 3, "node2 node3".into())
    );
    assert_eq!((new.withdrawn, old.withdrawn), (false, true));
    assert_eq!((old.have, old.needed_by.join(" ")), (3, "node2 node3".into()));
    assert_eq!(
        report.problems,
        [format!(
            "2 nodes still need key {}, which was taken from this node: node2, node3; it is dropped in 3598 s: give \
             them a newer one before",
            kid(1)
        )]
    );
    one.peer(2, 2, &[2, 1]);
    one.run(secs(100));
    let report = one.report();
    assert_eq!(
        (report.psks[0].have, report.psks[0].missing.join(" ")),
        (2, "node3".into())
    );
    assert_eq!(one.listed(), [kid(2), kid(1)]);
    let epochs = one.epochs;
    one.peer(3, 2, &[2, 1]);
    one.run(secs(2));
    assert_eq!(one.report().problems, Vec::<String>::new(), "nobody needs it");
    assert_eq!(one.held().len(), 2, "not all nodes drop it at the same moment");
    one.run(secs(20));
    assert_eq!((one.listed(), one.held()), (vec![kid(2)], vec![kid(2)]));
    assert_eq!(one.epochs, epochs + 1);
    assert!(one.serves(2) && one.serves(3));
}

#[test]
fn when_its_grace_is_over_who_has_only_the_old_key_is_cut_and_named_and_the_others_go_on() {
    let mut one = One::with(&[1]);
    one.peer(2, 1, &[1]);
    one.peer(3, 1, &[1]);
    one.file(&[2]);
    one.run(secs(1));
    one.peer(2, 2, &[2, 1]);
    one.run(GRACE - secs(2));
    assert!(one.serves(3), "its grace is not over");
    one.run(secs(4));
    assert!(one.serves(2) && !one.serves(3));
    let why = format!(
        "it has only PSK {}, which was taken from this node and dropped; give it {}",
        kid(1),
        kid(2)
    );
    assert_eq!(one.stands(3), (State::Refused, Some(why)));
    assert_eq!((one.listed(), one.held()), (vec![kid(2)], vec![kid(2)]));
    // What it says under the dropped key alone changes nothing; once it has the new one, it is served.
    one.peer(3, 2, &[1]);
    assert!(!one.serves(3));
    one.peer(3, 3, &[2, 1]);
    one.run(secs(1));
    assert!(one.serves(3) && one.serves(2));
}

#[test]
fn a_key_that_others_need_after_a_quarter_of_its_grace_is_doubtful_in_a_text_that_stays() {
    let mut one = One::with(&[1]);
    for number in 2..=6 {
        one.peer(number, 1, &[1]);
    }
    one.file(&[2]);
    let told = |one: &One| one.node.doubts(one.now).withdrawn;
    one.run(GRACE / 4 - secs(1));
    assert_eq!(told(&one), None, "who changes node by node needs time");
    one.run(secs(1));
    let text = |who: &str| {
        let kid = kid(1);
        Some(format!(
            "{who} key {kid}, which was taken from this node: give them a newer one, before they are cut 3600 s after \
             that (PSKGrace)"
        ))
    };
    let many = "more than 3 nodes, which `ringmail status` names, still need";
    assert_eq!(told(&one), text(many));
    one.peer(2, 2, &[2, 1]);
    one.run(secs(30));
    assert_eq!(told(&one), text(many), "neither a number nor the time is in it");
    one.peer(3, 2, &[2, 1]);
    assert_eq!(told(&one), text("nodes node4, node5, node6 still need"));
    one.peer(4, 2, &[2, 1]);
    one.peer(5, 2, &[2, 1]);
    assert_eq!(told(&one), text("node node6 still needs"));
    one.run(GRACE);
    assert_eq!(told(&one), None, "it is dropped");
    let refused = |one: &One| one.node.doubts(one.now).peers.expect("it is cut");
    let alone = refused(&one);
    assert!(
        alone.starts_with("the lease of node node6 is refused: it has only PSK"),
        "{alone}"
    );
    one.peer(7, 1, &[1]);
    let both = alone + "; and others are: `ringmail status` names them";
    assert_eq!(refused(&one), both);
    one.peer(8, 1, &[1]);
    assert_eq!(refused(&one), both, "no number is in it");
}

#[test]
fn that_no_epoch_can_begin_is_doubtful_until_one_does() {
    let mut one = One::with(&[1]);
    let told = |one: &One| one.node.doubts(one.now).epoch;
    assert_eq!(told(&one), None);
    one.node.stall("no number is left".into(), one.now);
    let text = "no new epoch can begin: no number is left";
    assert_eq!(told(&one).as_deref(), Some(text));
    assert_eq!(one.report().problems, [text]);
    one.node.want(Cause::Changed);
    one.run(secs(120));
    assert_eq!(told(&one), None);
}

#[test]
fn a_key_is_held_as_long_as_the_configuration_says_now() {
    let mut one = One::with(&[1]);
    one.peer(2, 1, &[1]);
    one.file(&[2]);
    one.run(secs(100));
    assert!(one.serves(2));
    let settings = one.node.settings().clone();
    one.node.configure(ringmail::node::Settings {
        psk_grace: Duration::ZERO,
        ..settings
    });
    one.run(secs(3));
    assert!(!one.serves(2));
}

#[test]
fn a_key_that_comes_back_is_held_as_before() {
    let mut one = One::with(&[1]);
    one.peer(2, 1, &[1]);
    one.file(&[2]);
    one.run(GRACE - secs(5));
    one.file(&[2, 1]);
    one.run(GRACE * 2);
    assert!(one.serves(2));
    assert_eq!(one.listed(), [kid(2), kid(1)]);
    assert_eq!(one.report().problems, Vec::<String>::new());
    assert!(one.report().psks.iter().all(|psk| !psk.withdrawn));
    // Also one that was dropped, and is then no longer named as such.
    one.file(&[2]);
    one.run(GRACE + secs(5));
    assert!(!one.serves(2));
    one.file(&[1, 2]);
    one.run(secs(2));
    assert!(one.serves(2));
}

#[test]
fn a_node_that_nobody_answers_drops_it_as_well() {
    let mut one = One::with(&[1]);
    one.file(&[2]);
    one.run(secs(30));
    assert_eq!((one.listed(), one.held()), (vec![kid(2)], vec![kid(2)]));
}

#[test]
fn of_a_row_of_keys_each_is_held_for_those_alone_who_have_nothing_newer() {
    let mut one = One::with(&[1]);
    one.peer(2, 1, &[1]);
    one.file(&[2]);
    one.run(secs(1));
    one.peer(2, 2, &[2, 1]);
    one.file(&[3]);
    one.run(secs(60));
    assert_eq!(one.listed(), [kid(3), kid(2)], "2 serves who has 1 as well");
    assert!(one.serves(2));
    one.peer(2, 3, &[3, 2]);
    one.run(secs(60));
    assert_eq!(one.listed(), [kid(3)]);
}

#[test]
fn a_dropped_key_is_wiped() {
    let mut one = One::with(&[1]);
    one.peer(2, 1, &[1]);
    let network = make::network(Families::V4);
    let old = make::psk(9, &network);
    let gone = Arc::downgrade(&old);
    one.node.keyed(vec![old], one.now);
    one.run(secs(1));
    one.peer(2, 2, &[9]);
    one.file(&[2]);
    one.run(secs(10));
    assert!(gone.upgrade().is_some(), "it is needed");
    one.peer(2, 3, &[2, 9]);
    one.run(secs(30));
    assert!(gone.upgrade().is_none(), "somebody holds it still");
}

#[test]
fn more_keys_than_a_statement_has_room_for_are_no_end() {
    let many: Vec<u8> = (1..=64).collect();
    let mut one = One::with(&many);
    let others: Vec<u8> = (65..=128).collect();
    one.peer(2, 1, &[1]);
    one.file(&others);
    one.run(secs(5));
    assert_eq!(one.listed().len(), 64);
    assert!(!one.serves(2), "there is no room for what it needs");
    one.file(&others[..63]);
    one.run(secs(5));
    assert_eq!(one.listed().len(), 64);
}

#[test]
fn a_node_with_a_wrong_key_is_named_by_the_others_and_names_itself() {
    let mut one = One::with(&[7]);
    for number in 2..5 {
        one.peer(number, 1, &[1]);
    }
    one.run(secs(1));
    let text = "no other node has a PSK of this one, 3 nodes have another: is this node's the right one?";
    assert_eq!(one.report().problems, [text]);
    assert_eq!(one.report().psks[0].missing.join(" "), "node2 node3 node4");
    one.file(&[1]);
    one.run(secs(2));
    assert!((2..5).all(|number| one.serves(number)));
    assert_eq!(one.report().problems, Vec::<String>::new());
    one.run(secs(30));
    assert_eq!(one.held(), [kid(1)], "the wrong one is dropped");
    // What the others see of it.
    one.peer(5, 1, &[7]);
    let why = format!(
        "it has only PSK {}, which was taken from this node and dropped; give it {}",
        kid(7),
        kid(1)
    );
    assert_eq!(one.stands(5), (State::Refused, Some(why)));
    assert_eq!(
        one.report().problems,
        Vec::<String>::new(),
        "one other is no reason to doubt the own"
    );
}

#[test]
fn a_node_that_has_not_followed_is_told_though_it_serves_the_others_by_what_they_said_before() {
    let mut one = One::with(&[1]);
    for number in 2..4 {
        one.peer(number, 1, &[2, 1]);
    }
    one.run(secs(1));
    for number in 2..4 {
        one.peer(number, 2, &[2]);
    }
    one.run(secs(1));
    let text = "no other node has a PSK of this one, 2 nodes have another: is this node's the right one?";
    assert_eq!(one.report().problems, [text]);
    assert!(one.serves(2), "whether the newest lease is true can't be told");
    let reason = one.stands(2).1.expect("it is named");
    assert!(
        reason.starts_with("the newest lease is refused, its last good one serves: no common PSK"),
        "{reason}"
    );
}

#[test]
fn a_process_that_starts_in_a_rotation_has_what_the_file_has_and_names_the_rest() {
    let mut one = One::with(&[2]);
    one.peer(2, 2, &[2, 1]);
    one.peer(3, 1, &[1]);
    one.run(secs(1));
    assert!(one.serves(2) && !one.serves(3));
    let why = format!(
        "no common PSK: it has {}, this node has {}; give both nodes the same key",
        kid(1),
        kid(2)
    );
    assert_eq!(one.stands(3), (State::Refused, Some(why)));
    let psk = &one.report().psks[0];
    assert_eq!((psk.have, psk.nodes, psk.missing.join(" ")), (2, 3, "node3".into()));
}

#[test]
fn who_has_the_old_key_alone_can_not_speak_for_a_node_once_the_new_one_is_here() {
    let mut one = One::with(&[1]);
    // It lists the new key, whose tag it can't make.
    one.offer(forged(2, 9, &[2, 1], &[7, 1]));
    one.run(secs(1));
    assert!(one.serves(2), "under the old key it is good");
    one.file(&[2]);
    one.run(secs(1));
    assert!(!one.serves(2));
    assert_eq!(one.stands(2).0, State::Refused);
    one.peer(2, 3, &[2]);
    assert!(one.serves(2), "the lie about its epochs is forgotten with it");
}

/// The SAs that a peer's scope wants, with their limits.
fn sas(one: &One, number: u32) -> Vec<(SaId, xfrm::Limits)> {
    let scope = Scope::Peer(make::name(&format!("node{number}")));
    let sa = |(key, object): (&Key, &Object)| match (key, object) {
        (Key::Sa(id), Object::Sa { sa, .. }) => Some((*id, sa.limits)),
        _ => None,
    };
    one.node.desired(&scope).iter().filter_map(sa).collect()
}

#[test]
fn all_sas_that_reach_their_limits_together_ask_for_one_epoch() {
    let mut one = One::with(&[1]);
    for number in 2..20 {
        one.peer(number, 1, &[1]);
    }
    one.run(secs(120));
    let before = one.epochs;
    let all: Vec<SaId> = (2..20).flat_map(|number| sas(&one, number)).map(|(id, _)| id).collect();
    assert!(all.len() >= 18);
    assert!(all.iter().all(|id| one.node.limited(id)));
    one.run(Duration::ZERO);
    assert_eq!(one.epochs, before + 1);
    // Those that are told late are of an epoch that is on its way out.
    assert!(!all.iter().any(|id| one.node.limited(id)));
    one.run(secs(300));
    assert_eq!(one.epochs, before + 1);
}

#[test]
fn a_limit_that_is_reached_again_within_a_minute_waits_for_it_and_is_shown() {
    let mut one = One::with(&[1]);
    one.peer(2, 1, &[1]);
    one.run(secs(10));
    let (id, _) = sas(&one, 2)[0];
    assert!(one.node.limited(&id));
    one.run(secs(10));
    assert_eq!(one.epochs, 1);
    let next = one.report().next_epoch.expect("it is wanted");
    assert_eq!(
        (next.seconds, &*next.cause),
        (40, "an SA reached RekeyPackets or RekeyBytes")
    );
    one.run(secs(41));
    assert_eq!(one.epochs, 2);
}

#[test]
fn sas_keep_the_limits_of_their_epoch_and_new_ones_come_with_a_new_epoch() {
    let mut one = One::with(&[1]);
    one.peer(2, 1, &[1]);
    one.run(secs(10));
    let before = sas(&one, 2);
    assert!(!before.is_empty() && before.iter().all(|(_, limit)| *limit == limits(MOST)));
    let soft = Soft {
        packets: 1000,
        bytes: 1 << 20,
    };
    let settings = one.node.settings().clone();
    one.node.configure(ringmail::node::Settings {
        rekey: soft,
        ..settings
    });
    assert_eq!(sas(&one, 2), before, "an SA can't be changed");
    one.run(secs(2));
    assert_eq!(one.epochs, 2);
    let fresh: Vec<_> = sas(&one, 2).into_iter().filter(|sa| !before.contains(sa)).collect();
    assert!(!fresh.is_empty() && fresh.iter().all(|(_, limit)| *limit == limits(soft)));
}

#[test]
fn an_sa_that_nears_its_hard_limit_is_named() {
    let mut one = One::with(&[1]);
    one.peer(2, 1, &[1]);
    one.run(secs(10));
    let (id, limit) = sas(&one, 2)[0];
    let said = |packets, bytes| {
        let count = ringmail::kernel::Counters {
            packets,
            bytes,
            ..Default::default()
        };
        let counters = [(id, count)].into();
        one.node.report(&counters, one.now).peers[0]
            .reason
            .clone()
            .unwrap_or_default()
    };
    assert!(!said(limit.soft_packets, limit.soft_bytes).contains("% of"));
    assert!(said(limit.hard_packets / 8 * 7, 0).contains("87 % of what the kernel lets it"));
    assert!(said(0, limit.hard_bytes / 4 * 3).contains("75 % of what the kernel lets it"));
}

#[test]
fn hard_limits_leave_a_minute_at_any_speed() {
    assert_eq!(limits(MOST).hard_packets, 1 << 34);
    assert_eq!(limits(MOST).hard_bytes, 1 << 43);
    for packets in [1000, 1 << 20, 1 << 31, 1 << 33] {
        for bytes in [1 << 20, 1 << 40, 1 << 42] {
            let limits = limits(Soft { packets, bytes });
            assert!(limits.hard_packets - limits.soft_packets >= 60 * 30_000_000);
            assert!(limits.hard_bytes - limits.soft_bytes >= 60 * 100_000_000_000 / 8);
        }
    }
}

#[test]
fn an_epoch_ages_by_rekey_after_less_up_to_a_tenth_and_nobody_is_kept_awake() {
    for (jitter, at) in [(0.0, 600), (0.5, 570), (1.0, 540)] {
        let mut one = One::with(&[1]);
        let settings = one.node.settings().clone();
        one.node.configure(ringmail::node::Settings {
            rekey_after: secs(600),
            ..settings
        });
        let secret = EpochSecret::generate(&SystemRandom::new()).expect("random numbers");
        one.node.begin_epoch(Epoch(7), secret, Duration::ZERO, jitter);
        assert_eq!(one.node.wants_epoch(secs(at - 1)), None);
        assert_eq!(one.node.wants_epoch(secs(at)), Some(Cause::Aged));
    }
    // A minute that jitter makes shorter than the least time between two epochs.
    let mut one = One::with(&[1]);
    let settings = one.node.settings().clone();
    one.node.configure(ringmail::node::Settings {
        rekey_after: secs(60),
        ..settings
    });
    let secret = EpochSecret::generate(&SystemRandom::new()).expect("random numbers");
    one.node.begin_epoch(Epoch(7), secret, Duration::ZERO, 1.0);
    for now in 54..60 {
        let idle = one.node.deadline(secs(now)).is_none_or(|due| due > secs(now));
        assert!(idle || now == 54, "awake at {now} s for nothing");
        one.node.looks(secs(now));
        one.node.tick(secs(now), &mut || 0.5);
    }
    assert_eq!(one.node.wants_epoch(secs(60)), Some(Cause::Aged));
}

#[test]
fn a_file_changed_in_place_node_by_node_in_every_order_loses_nothing() {
    let mut key = 1;
    let mut mesh = Mesh::settled("in place", Families::V4, 3);
    for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
        key += 1;
        for x in order {
            mesh.file(x, &[key]);
            mesh.run(secs(3));
            let flows = |x: usize| mesh.views.borrow()[x].flows.len();
            assert!((0..3).all(|x| flows(x) == 2), "order {order:?} after {x}");
        }
        // In two of the orders the old key is still held when the next comes.
        mesh.run(secs(if key % 3 == 0 { 0 } else { 30 }));
    }
    mesh.run(secs(60));
    for x in 0..3 {
        let process = mesh.members[x].process.as_ref().expect("it runs");
        let held = process.reconciler.node.report(&Default::default(), mesh.now).psks;
        assert_eq!(held.iter().map(|psk| psk.kid.clone()).collect::<Vec<_>>(), [kid(key)]);
        assert_eq!((held[0].have, held[0].nodes), (3, 3));
    }
    mesh.settle();
}

fn epoch(mesh: &Mesh, x: usize) -> Option<Epoch> {
    mesh.members[x].process.as_ref()?.reconciler.node.epoch()
}

/// How many of a node's epochs have a secret that lives.
fn alive(mesh: &Mesh, x: usize) -> usize {
    let process = mesh.members[x].process.as_ref().expect("it runs");
    process.reconciler.node.epochs().count()
}

#[test]
fn an_epochs_secret_goes_when_no_generation_needs_it() {
    let mut mesh = Mesh::settled("secrets", Families::V4, 3);
    for _ in 0..5 {
        mesh.rotate(0, Cause::Asked);
        mesh.run(secs(1));
    }
    assert!(alive(&mesh, 0) > 1, "packets on the older may be under way");
    mesh.run(secs(15));
    assert_eq!((0..3).map(|x| alive(&mesh, x)).collect::<Vec<_>>(), [1, 1, 1]);
    // Also where nobody else is there to wake the node up.
    let mut one = One::with(&[1]);
    one.node.want(Cause::Asked);
    one.run(Duration::ZERO);
    assert_eq!((one.epochs, one.node.epochs().count()), (2, 2));
    assert!(one.node.deadline(one.now).is_some_and(|due| due <= one.now + secs(5)));
    one.run(secs(10));
    assert_eq!(one.node.epochs().count(), 1);
}

#[test]
fn sixty_rotations_in_a_minute_are_all_done_where_all_answer() {
    let mut mesh = Mesh::settled("sixty rotations", Families::V4, 3);
    for _ in 0..60 {
        let before = epoch(&mesh, 0);
        mesh.rotate(0, Cause::Asked);
        assert!(epoch(&mesh, 0) > before);
        mesh.run(secs(1));
    }
    mesh.settle();
}

#[test]
fn rotations_that_a_silent_peer_does_not_follow_are_refused_before_numbers_run_out() {
    let mut mesh = Mesh::settled("silent peer", Families::V4, 3);
    mesh.stop(2);
    let mut begun = 0;
    for _ in 0..70 {
        let before = epoch(&mesh, 0);
        mesh.rotate(0, Cause::Asked);
        begun += usize::from(epoch(&mesh, 0) > before);
        mesh.run(secs(1));
    }
    assert!((50..=56).contains(&begun), "{begun} begun");
    {
        let node = &mesh.members[0].process.as_ref().expect("it runs").reconciler.node;
        let why = node.declined().expect("it says why");
        assert!(
            why.contains("epochs of this node are still in use") && why.contains("node3"),
            "{why}"
        );
        let late = node.deadline(mesh.now).expect("it has things to do");
        assert!(late > mesh.now, "a refusal keeps nobody busy");
    }
    // What must have one still gets one.
    let before = epoch(&mesh, 0);
    mesh.hurt(0, |kernel| kernel.flush_by_hand(Kind::Sa));
    mesh.turn(0);
    mesh.run(secs(3));
    assert!(epoch(&mesh, 0) > before);
    assert!(mesh.views.borrow()[0].flows.contains(&1));
    // The silent peer is not waited for without end.
    mesh.run(secs(700));
    let before = epoch(&mesh, 0);
    mesh.rotate(0, Cause::Asked);
    assert!(epoch(&mesh, 0) > before);
    mesh.settle();
}

#[test]
fn another_hand_that_keeps_deleting_sas_does_not_make_the_mesh_churn() {
    let mut mesh = Mesh::settled("deleting", Families::V4, 3);
    let first = epoch(&mesh, 0).expect("it has one").0;
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..600 {
        mesh.hurt(0, |kernel| kernel.flush_by_hand(Kind::Sa));
        mesh.turn(0);
        mesh.run(secs(1));
        seen.insert(epoch(&mesh, 0));
    }
    assert!((14..=18).contains(&seen.len()), "{} epochs in ten minutes", seen.len());
    assert!(epoch(&mesh, 0).expect("it has one").0 > first);
    mesh.run(secs(60));
    assert!(
        (0..3).all(|x| mesh.views.borrow()[x].flows.len() == 2),
        "once it stops, all goes on"
    );
    mesh.settle();
}
