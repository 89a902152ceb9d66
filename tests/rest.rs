//! What a node sends while all is well: how often it asks among how many peers, and which questions it leaves out.
//! The node and its datapath are real, the kernel is simulated, the peers are made up: what they say is sealed as real
//! ones seal it.

#[path = "bench/made_up.rs"]
#[allow(dead_code, reason = "the benches use all of it")]
mod made_up;
mod sim;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use keys::{EncapMode, ProbeKey};
use made_up::{Mesh, Peer};
use ring::rand::SystemRandom;
use ringmail::admission::Admitted;
use ringmail::kernel::Objects;
use ringmail::lease::{Completeness, NodeName};
use ringmail::node::report::{Comes, PeerReport};
use ringmail::node::{Datagram, Node};
use ringmail::probe::{self, LEN, Probe};
use ringmail::reconcile::Reconciler;
use sim::kernel::{SimKernel, Spent};
use sim::make::{self, Families};
use xfrm::SaId;

const fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// Time here goes on by a millisecond at least.
const LATE: Duration = Duration::from_millis(100);

/// A node among made-up peers.
struct World {
    reconciler: Reconciler<SimKernel>,
    kernel: SimKernel,
    own: Admitted,
    /// By base address: where it answers, and where it does not.
    peers: BTreeMap<IpAddr, (Peer, ProbeKey, bool)>,
    /// What comes of these is counted by the kernel.
    counted: BTreeMap<IpAddr, SaId>,
    now: Duration,
    luck: f64,
}

/// What a node sent in a time.
#[derive(Default)]
struct Sent {
    /// When which peer was asked.
    small: BTreeMap<NodeName, Vec<Duration>>,
    /// How many questions of full size there were.
    padded: usize,
}

impl Sent {
    fn questions(&self) -> usize {
        self.small.values().map(Vec::len).sum()
    }

    /// The longest time without a question to one peer.
    fn gap(&self) -> Duration {
        let gaps = self
            .small
            .values()
            .flat_map(|at| at.windows(2).map(|two| two[1] - two[0]));
        gaps.max().expect("there are some")
    }
}

impl World {
    /// A node and `count` peers, all settled.
    fn new(count: usize, mode: EncapMode) -> Self {
        let mesh = Mesh::new(&[7; 32]).expect("a mesh");
        let kernel = SimKernel::new("node", &Spent::default());
        let mut settings = make::settings("node", mesh.network);
        settings.encap.mode = mode;
        let mut reconciler =
            Reconciler::new(kernel.clone(), |left: &Objects| Node::new(settings, left)).expect("it is read");
        let (subnets, slot) = mesh.own().expect("a subnet");
        let node = &mut reconciler.node;
        node.keyed(vec![mesh.psk.clone()], Duration::ZERO);
        node.uplinked(make::uplink(Families::V4, 1));
        node.holds(subnets, slot);
        reconciler.completed(Completeness::Complete);
        let now = secs(1);
        let begun = reconciler.begin_epoch(None, 1_700_000_000, &SystemRandom::new(), now);
        assert!(begun.is_some());
        let own = mesh.admit(&reconciler.node.lease().expect("a lease")).expect("its own");
        let mut peers = BTreeMap::new();
        for peer in mesh.peers(count).expect("peers") {
            reconciler.node.leased(&peer.name, Some(&peer.life.lease), now);
            let key = peer.probe_key(&mesh, &own).expect("a key");
            peers.insert(peer.base().expect("an address"), (peer, key, true));
        }
        let mut world = Self {
            reconciler,
            kernel,
            own,
            peers,
            counted: BTreeMap::new(),
            now,
            luck: 0.0,
        };
        world.turn();
        for (base, (peer, key, _)) in &world.peers {
            let first = peer.say(&world.own, key, false, 0);
            world.reconciler.node.probed(*base, &first, now);
        }
        world.run(secs(120), |_, _| ());
        world
    }

    fn turn(&mut self) -> Vec<Datagram> {
        for event in self.kernel.notices() {
            self.reconciler.notice(event);
        }
        self.reconciler.pass(self.now);
        assert_eq!(self.reconciler.failures().count(), 0);
        let luck = &mut self.luck;
        self.reconciler.tick(self.now, &mut || {
            // A golden-section sequence spreads them evenly.
            *luck = (*luck + 0.618_034) % 1.0;
            *luck
        })
    }

    /// Time passes; `each` is told before each moment at which something is due.
    fn run(&mut self, time: Duration, mut each: impl FnMut(&SimKernel, Duration)) -> Sent {
        let (end, mut sent) = (self.now + time, Sent::default());
        while self.now < end {
            each(&self.kernel, self.now);
            for question in self.turn() {
                let (peer, key, answers) = &self.peers[&question.to];
                if question.padding > 0 {
                    sent.padded += 1;
                } else {
                    sent.small.entry(peer.name.clone()).or_default().push(self.now);
                }
                let probe = Probe::parse(&question.bytes).expect("a probe");
                let answer: [u8; LEN] = peer.say(&self.own, key, false, probe.ticket);
                // An answer, or its kernel's word that nobody listens.
                if let Some(id) = self.counted.get(&question.to) {
                    self.kernel.carry(*id);
                }
                if *answers {
                    self.reconciler.node.probed(question.to, &answer, self.now);
                }
            }
            let due = self.reconciler.node.deadline(self.now).unwrap_or(end);
            self.now = due.max(self.now + Duration::from_millis(1));
        }
        sent
    }

    /// The SA on which data of the peer with the base address comes; from now on its packets are counted.
    fn inbound(&mut self, base: IpAddr) -> SaId {
        let peer = &self.peers[&base].0;
        let name = &peer.name;
        let report = self.report(name);
        let spi = report.spi_in.expect("it has said where its data goes");
        let spi = u32::from_str_radix(spi.trim_start_matches("0x"), 16).expect("a number");
        let id = SaId {
            dst: [192, 0, 2, 1].into(),
            spi,
        };
        self.counted.insert(base, id);
        id
    }

    fn report(&self, name: &NodeName) -> PeerReport {
        let report = self.reconciler.node.report(&Default::default(), self.now);
        report
            .peers
            .into_iter()
            .find(|peer| peer.node == name.as_str())
            .expect("it is known")
    }

    fn first(&self) -> IpAddr {
        *self.peers.keys().next().expect("there is one")
    }
}

#[test]
fn the_more_peers_the_longer_they_rest_and_who_does_not_answer_is_asked_soon() {
    for (count, rest) in [(20, 15), (1000, 25)] {
        let mut world = World::new(count, EncapMode::Esp);
        let sent = world.run(secs(600), |_, _| ());
        assert_eq!(sent.small.len(), count, "each is asked");
        let gap = sent.gap();
        assert!(
            gap <= secs(rest) + LATE && gap > secs(rest * 9 / 10),
            "{gap:?} among {count}"
        );
        let least = count * 600 / rest as usize;
        assert!(
            (least..least * 4 / 3 + count).contains(&sent.questions()),
            "{}",
            sent.questions()
        );
        // Of full size one each minute, and eight to eleven a second at most.
        let least = count * 600 / 60.max(count * 120 / 1000);
        assert!(
            (least..least * 4 / 3 + count).contains(&sent.padded),
            "{} of full size",
            sent.padded
        );
        // Who does not answer is asked again soon, though all others rest for long.
        let base = world.first();
        world.peers.get_mut(&base).expect("it is there").2 = false;
        let sent = world.run(secs(300), |_, _| ());
        let asked = &sent.small[&world.peers[&base].0.name];
        // Small ones beside those of full size are among them.
        assert!((18..=40).contains(&asked.len()), "{asked:?}");
        assert!(sent.gap() <= secs(rest) + LATE);
    }
}

#[test]
fn a_rest_is_fifteen_seconds_up_to_600_peers_and_five_minutes_at_most() {
    let rests = [0, 1, 600, 1000, 5000, 12_000, 100_000].map(|peers| probe::rest(peers).as_secs());
    assert_eq!(rests, [15, 15, 15, 25, 125, 300, 300]);
    let sizes = [1, 500, 1000, 5000].map(|peers| probe::size::rest(peers).as_secs());
    assert_eq!(sizes, [60, 60, 120, 600]);
}

#[test]
fn a_question_is_left_out_where_data_proves_the_peer_and_the_fourth_is_not() {
    let mut world = World::new(3, EncapMode::Esp);
    let base = world.first();
    let (name, id) = (world.peers[&base].0.name.clone(), world.inbound(base));
    let sent = world.run(secs(1200), |kernel, _| kernel.carry(id));
    for (peer, asked) in &sent.small {
        let times = if *peer == name { 20..36 } else { 80..108 };
        assert!(times.contains(&asked.len()), "{peer}: {}", asked.len());
    }
    assert!(sent.gap() <= secs(60) + LATE);
    let left_out = world.reconciler.node.left_out();
    assert!((50..80).contains(&left_out), "{left_out}");
    let seen = world.report(&name);
    assert!(seen.heard.expect("heard") <= 15.0, "its data is heard");
    assert_eq!(seen.loss, Some(0.0));
    // Data comes no more: it is asked as the others are.
    let sent = world.run(secs(1200), |_, _| ());
    assert!((80..108).contains(&sent.small[&name].len()));
    assert!(world.reconciler.node.left_out() <= left_out + 1);
}

#[test]
fn silence_is_named_within_half_a_minute_and_a_restart_is_none() {
    let mut world = World::new(3, EncapMode::Esp);
    let base = world.first();
    let name = world.peers[&base].0.name.clone();
    world.inbound(base);
    for down in [11, 31] {
        world.peers.get_mut(&base).expect("it is there").2 = false;
        world.run(secs(down), |_, _| ());
        let seen = world.report(&name);
        assert_eq!(seen.silent.is_some(), down > 30, "{seen:?}");
        assert_eq!(seen.reason.is_some_and(|why| why.starts_with("silent for ")), down > 30);
        world.peers.get_mut(&base).expect("it is there").2 = true;
        world.run(secs(15), |_, _| ());
        assert!(world.report(&name).silent.is_none(), "it is back");
        world.run(secs(300), |_, _| ());
    }
}

#[test]
fn a_daemon_that_hangs_while_its_kernel_sends_is_told_from_a_path_that_is_cut() {
    let mut world = World::new(3, EncapMode::Esp);
    let base = world.first();
    let (name, id) = (world.peers[&base].0.name.clone(), world.inbound(base));
    world.peers.get_mut(&base).expect("it is there").2 = false;
    world.run(secs(90), |kernel, _| kernel.carry(id));
    let seen = world.report(&name);
    let reason = seen.reason.expect("it is named");
    assert!(
        seen.silent == Some(Comes::Data) && reason.starts_with("its data comes, and its daemon does not answer"),
        "{reason}"
    );
    // It asks, and does not get our answers.
    let (peer, key, _) = &world.peers[&base];
    let question = peer.say(&world.own, key, true, 7);
    world.reconciler.node.probed(base, &question, world.now);
    let reason = world.report(&name).reason.expect("it is named");
    assert!(reason.starts_with("it is heard, and does not answer"), "{reason}");
}

#[test]
fn the_way_there_is_asked_for_though_data_comes() {
    let mut world = World::new(1, EncapMode::Esp);
    let base = world.first();
    let (name, id) = (world.peers[&base].0.name.clone(), world.inbound(base));
    world.peers.get_mut(&base).expect("it is there").2 = false;
    let sent = world.run(secs(135), |kernel, _| kernel.carry(id));
    assert!(
        sent.gap() <= secs(15) + LATE,
        "none is left out once one was not answered"
    );
    let seen = world.report(&name);
    assert!(seen.loss.expect("asked") > 0.0, "{seen:?}");
    assert!(seen.heard.expect("heard") <= 15.0, "{seen:?}");
}

#[test]
fn a_peer_that_lost_probes_is_asked_often_until_they_are_history() {
    let mut world = World::new(1000, EncapMode::Esp);
    let base = world.first();
    let (name, id) = (world.peers[&base].0.name.clone(), world.inbound(base));
    world.peers.get_mut(&base).expect("it is there").2 = false;
    world.run(secs(60), |_, _| ());
    world.peers.get_mut(&base).expect("it is there").2 = true;
    let sent = world.run(secs(270), |kernel, _| kernel.carry(id));
    assert!((18..=25).contains(&sent.small[&name].len()), "{:?}", sent.small[&name]);
    assert!(world.report(&name).loss.expect("asked") <= 0.05);
}

#[test]
fn where_a_nat_may_have_to_be_kept_open_nobody_rests_longer_nor_is_a_question_left_out() {
    let mut world = World::new(900, EncapMode::Udp);
    let id = world.inbound(world.first());
    let sent = world.run(secs(200), |kernel, _| kernel.carry(id));
    assert_eq!(sent.small.len(), 900);
    assert!(sent.gap() <= secs(15) + LATE, "{:?}", sent.gap());
    assert_eq!(world.reconciler.node.left_out(), 0);
}

#[test]
fn a_peer_without_a_lease_is_kept_by_its_answers_and_not_by_its_data() {
    let mut world = World::new(2, EncapMode::Esp);
    let base = world.first();
    let (name, id) = (world.peers[&base].0.name.clone(), world.inbound(base));
    let left_out = world.reconciler.node.left_out();
    world.reconciler.node.leased(&name, None, world.now);
    world.run(secs(600), |kernel, _| kernel.carry(id));
    assert_eq!(world.reconciler.node.left_out(), left_out);
    assert!(
        world.reconciler.node.slots().values().any(|held| *held == name),
        "it answers"
    );
    world.peers.get_mut(&base).expect("it is there").2 = false;
    world.run(secs(60), |kernel, _| kernel.carry(id));
    assert!(
        world.reconciler.node.slots().values().all(|held| *held != name),
        "it sends, and does not answer"
    );
}
