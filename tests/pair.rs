//! The rules of two nodes, searched exhaustively with the real transition code.
//!
//! Every order of new epochs, of their publication, of store reads (late, coalesced, stale after a restart), of probes
//! (and their loss), one restart of each node (memory and secrets lost, kernel kept), one reboot (kernel lost too) and, in
//! one of the searches, one sending SA lost. In every state: what a node sends as data its receiver's kernel can read,
//! unless it is meant for a kernel state that is gone; when events stop, both ends come to the newest generation and keep
//! nothing older; no sending key is programmed twice.
//!
//! Then each rule is broken, by what the real code is told: a search must find how that goes wrong.

#![expect(
    clippy::disallowed_types,
    reason = "states are only looked up, and hashing is what makes the search fast"
)]

use std::cell::RefCell;
use std::collections::hash_map::{DefaultHasher, Entry};
use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::fmt;
use std::hash::{BuildHasherDefault, Hash, Hasher};
use std::net::{IpAddr, Ipv4Addr};
use std::rc::Rc;
use std::time::Duration;

use keys::Epoch;
use ringmail::epochs::{DRAIN, Data, Generation, Inherited, Pair};
use xfrm::SaId;

/// A rule that a search breaks, and how the code is brought to break it.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Broken {
    /// It is told that receiving SAs are there, and they come later.
    PublishFirst,
    /// It is told of a probe on the newest generation that nobody sent.
    SwitchAtOnce,
    /// It is told, when it sees an epoch, that the peer's data goes there.
    DropOnSight,
    /// It is told of every probe that says where data goes that it goes to the newest own epoch.
    RetireEarly,
    /// It is told, once data goes, of a probe from the peer's newest epoch to the own one that data goes on.
    HalfEvidence,
    /// It is told of every probe that data goes where the probe does.
    ProbeIsData,
    /// It is told of no probe.
    NoProbe,
    /// It is told of a lost sending SA that the kernel refused it, and that its key is unused.
    Remake,
}

/// What a search goes through.
#[derive(Clone, Copy, Debug)]
struct Bounds {
    /// Epochs of each node, those of a restart and a reboot included; one more for each SA lost.
    epochs: u64,
    /// Whether an epoch is published some time after it began, not in the same step.
    late: bool,
    /// Sending SAs that are lost to another hand, on one node or the other.
    losses: u32,
    broken: Option<Broken>,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Wrong {
    /// The receiver can't read what is sent.
    Lost,
    /// A sending key is programmed again.
    Twice,
    /// When events stop, the ends are not on the newest generation, or keep an older one.
    Stuck,
}

#[derive(Clone, Debug, Eq, Hash, PartialEq)]
struct Node {
    pair: Pair,
    /// Epochs begun on this machine so far.
    begun: u64,
    /// Whether the newest of them is still to be published.
    unpublished: bool,
    /// Its statements in the store.
    published: Vec<Statement>,
    /// How many of the peer's statements were read.
    view: usize,
    /// A new epoch is wanted, because only its keys can serve.
    wants: bool,
    /// SAs in the kernel.
    inbound: BTreeSet<SaId>,
    outbound: BTreeSet<SaId>,
    /// The SA that data goes on, by the policy.
    out: Option<SaId>,
    /// Sending keys that were programmed, ever.
    spent: BTreeSet<SaId>,
    boot: u32,
    restarts: u32,
    reboots: u32,
    losses: u32,
}

/// A published epoch and the kernel state it was begun on.
type Statement = (u64, u32);

/// Two nodes; each stands for many worlds that it is part of.
#[derive(Clone)]
struct World([Rc<Side>; 2]);

/// A node, and what is asked of it in every world that it is part of.
struct Side {
    node: Node,
    hash: u64,
    /// The SA that its data goes on.
    sends: Option<SaId>,
    /// The generation that its probes go on.
    probes: Option<Generation>,
    /// What its probes say of its data.
    says: Option<Generation>,
    /// What became of it by each change so far: the real code is run once for each.
    known: RefCell<Vec<(Change, Became)>>,
}

type Became = Result<Rc<Side>, Wrong>;

/// What can happen; the number is the node's.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Event {
    Begins(usize),
    Publishes(usize),
    Installs(usize),
    Sees(usize, usize),
    Probes(usize, Generation),
    Loses(usize, Generation),
    Restarts(usize, usize),
    Reboots(usize, usize),
}

/// An event as the one node sees it that it changes.
#[derive(Clone, Copy, Debug, Eq, Hash, PartialEq)]
enum Change {
    Begins,
    Publishes,
    Installs,
    Sees(usize, Epoch),
    /// A probe came: on which it was sent, and on which the peer's data goes.
    Probed(Generation, Option<Generation>),
    Loses(Generation),
    Restarts(usize, Option<Epoch>),
    Reboots(usize, Option<Epoch>),
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Begins(x) => write!(f, "{x} begins an epoch"),
            Self::Publishes(x) => write!(f, "{x} publishes"),
            Self::Installs(x) => write!(f, "{x} installs late"),
            Self::Sees(x, view) => write!(f, "{x} sees {view}"),
            Self::Probes(x, sent) => write!(f, "{x} probes {sent}"),
            Self::Loses(x, generation) => write!(f, "{x} loses {generation}"),
            Self::Restarts(x, view) => write!(f, "{x} restarts on read {view}"),
            Self::Reboots(x, view) => write!(f, "{x} reboots on read {view}"),
        }
    }
}

/// The SA of a generation. Epochs are small here, so the SPI holds them whole; who sends tells the set that it is in.
fn sa(generation: Generation) -> SaId {
    let part = |epoch: Epoch| u32::try_from(epoch.0).expect("small");
    SaId {
        dst: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        spi: part(generation.sender) << 16 | part(generation.receiver),
    }
}

fn receiver_epoch(id: SaId) -> u64 {
    u64::from(id.spi & 0xffff)
}

impl Node {
    fn new() -> Self {
        Self {
            pair: Pair::default(),
            begun: 0,
            unpublished: false,
            published: Vec::new(),
            view: 0,
            wants: false,
            inbound: BTreeSet::new(),
            outbound: BTreeSet::new(),
            out: None,
            spent: BTreeSet::new(),
            boot: 0,
            restarts: 0,
            reboots: 0,
            losses: 0,
        }
    }

    /// Brings the kernel to what the pair wants.
    fn reconcile(&mut self, broken: Option<Broken>) -> Result<(), Wrong> {
        if broken == Some(Broken::SwitchAtOnce)
            && let Some(newest) = self.pair.newest()
        {
            self.pair.probed(newest.reverse(), None, Duration::ZERO);
        }
        if broken == Some(Broken::HalfEvidence)
            && let (Some(newest), Data::On(data)) = (self.pair.newest(), self.pair.data())
        {
            let half = Generation {
                sender: newest.receiver,
                receiver: data.sender,
            };
            self.pair.probed(half, None, Duration::ZERO);
        }
        for generation in self.pair.receiving().collect::<Vec<_>>() {
            self.pair.installed(generation);
        }
        for generation in self.pair.sending() {
            if self.outbound.insert(sa(generation)) {
                if !self.spent.insert(sa(generation)) {
                    return Err(Wrong::Twice);
                }
                self.pair.programmed(generation);
            }
            self.pair.sent(generation);
        }
        self.pair.tick(DRAIN);
        let wanted = self.receives();
        if broken == Some(Broken::PublishFirst) {
            self.inbound.retain(|id| wanted.contains(id));
        } else {
            self.inbound = wanted;
        }
        let sending: BTreeSet<SaId> = self.pair.sending().into_iter().map(sa).collect();
        let inherited = self.pair.inherited().data;
        self.outbound
            .retain(|id| sending.contains(id) || Some(*id) == inherited);
        self.out = match self.pair.data() {
            Data::Held => None,
            Data::Inherited(id) => Some(id),
            Data::On(generation) => Some(sa(generation)),
        };
        Ok(())
    }

    /// The receiving SAs that the kernel should hold.
    fn receives(&self) -> BTreeSet<SaId> {
        let own = self.pair.receiving().map(sa);
        own.chain(self.pair.inherited().inbound.iter().copied()).collect()
    }

    fn begin(&mut self) {
        self.begun += 1;
        self.unpublished = true;
        self.wants = false;
    }

    /// A probe arrives.
    fn probed(&mut self, sent: Generation, said: Option<Generation>, broken: Option<Broken>) {
        let newest = self.pair.newest();
        let data = match (broken, newest, said) {
            (Some(Broken::ProbeIsData), _, _) => Some(sent),
            (Some(Broken::RetireEarly), Some(newest), Some(said)) => Some(Generation {
                sender: said.sender,
                receiver: newest.sender,
            }),
            (_, _, said) => said,
        };
        self.pair.probed(sent, data, Duration::ZERO);
    }
}

impl Node {
    /// What becomes of the node.
    fn after(&self, change: Change, bounds: &Bounds) -> Result<Self, Wrong> {
        let mut node = self.clone();
        match change {
            Change::Begins => {
                node.begin();
                node.pair.own_epoch(Epoch(node.begun));
            }
            Change::Publishes => {}
            Change::Installs => node.inbound = node.receives(),
            Change::Sees(view, epoch) => {
                node.view = view;
                node.pair.peer_epoch(epoch).expect("epochs rise");
                if bounds.broken == Some(Broken::DropOnSight)
                    && let Some(newest) = node.pair.newest()
                {
                    let nowhere = Generation {
                        sender: Epoch(0),
                        receiver: Epoch(0),
                    };
                    node.pair.probed(nowhere, Some(newest.reverse()), Duration::ZERO);
                }
            }
            Change::Probed(sent, said) => node.probed(sent, said, bounds.broken),
            Change::Loses(generation) => {
                node.losses += 1;
                node.outbound.remove(&sa(generation));
                if bounds.broken == Some(Broken::Remake) {
                    node.pair.refused(generation);
                } else {
                    node.wants |= node.pair.lost_sending(generation);
                }
            }
            Change::Restarts(view, seen) => {
                node.restarts += 1;
                let inherited = Inherited {
                    inbound: node.inbound.clone(),
                    data: node.out.filter(|out| node.outbound.contains(out)),
                };
                node.start(view, seen, inherited);
            }
            Change::Reboots(view, seen) => {
                node.reboots += 1;
                node.boot += 1;
                node.inbound.clear();
                node.outbound.clear();
                node.start(view, seen, Inherited::default());
            }
        }
        node.reconcile(bounds.broken)?;
        if node.unpublished && (!bounds.late || change == Change::Publishes) {
            node.unpublished = false;
            node.published.push((node.begun, node.boot));
        }
        Ok(node)
    }

    /// A new process starts: only what the kernel holds is left.
    fn start(&mut self, view: usize, seen: Option<Epoch>, inherited: Inherited) {
        self.view = view;
        self.begin();
        self.pair = Pair::new([Epoch(self.begun)], inherited);
        if let Some(seen) = seen {
            self.pair.peer_epoch(seen).expect("it is the first");
        }
    }

    fn sends_on(&self, generation: Generation) -> bool {
        self.outbound.contains(&sa(generation))
    }
}

impl World {
    /// Which of two nodes it is does not matter: a world and its mirror image are one.
    fn fingerprint(&self) -> u64 {
        let [a, b] = [0, 1].map(|x| self.0[x].hash);
        mixed(a.min(b), a.max(b))
    }

    fn node(&self, x: usize) -> &Node {
        &self.0[x].node
    }

    /// What happens by itself, as long as events do not stop it from happening.
    fn goes_on(&self, bounds: &Bounds) -> Vec<Event> {
        let mut events = Vec::new();
        for x in 0..2 {
            let (node, peer) = (self.node(x), self.node(1 - x));
            if node.wants {
                events.push(Event::Begins(x));
            }
            if node.unpublished {
                events.push(Event::Publishes(x));
            }
            if bounds.broken == Some(Broken::PublishFirst) && node.inbound != node.receives() {
                events.push(Event::Installs(x));
            }
            events.extend((node.view + 1..=peer.published.len()).map(|view| Event::Sees(x, view)));
            let probe = self.0[x].probes.filter(|sent| peer.inbound.contains(&sa(*sent)));
            events.extend(
                probe
                    .filter(|_| bounds.broken != Some(Broken::NoProbe))
                    .map(|sent| Event::Probes(x, sent)),
            );
        }
        events
    }

    /// What can happen besides.
    fn may_come(&self, bounds: &Bounds) -> Vec<Event> {
        let mut events = Vec::new();
        for x in 0..2 {
            let (node, peer) = (self.node(x), self.node(1 - x));
            let more = node.begun < bounds.epochs + u64::from(node.losses);
            if more && !node.wants {
                events.push(Event::Begins(x));
            }
            if node.losses + peer.losses < bounds.losses {
                let there = node.pair.sending().into_iter().filter(|g| node.sends_on(*g));
                events.extend(there.map(|generation| Event::Loses(x, generation)));
            }
            if more && !node.published.is_empty() {
                // The first read of a new process may be stale.
                for view in usize::from(!peer.published.is_empty())..=peer.published.len() {
                    events.extend((node.restarts == 0).then_some(Event::Restarts(x, view)));
                    events.extend((node.reboots == 0).then_some(Event::Reboots(x, view)));
                }
            }
        }
        events
    }

    /// Which node an event changes, and how.
    fn change(&self, event: Event) -> (usize, Change) {
        let seen = |x: usize, view: usize| view.checked_sub(1).map(|at| Epoch(self.node(1 - x).published[at].0));
        match event {
            Event::Begins(x) => (x, Change::Begins),
            Event::Publishes(x) => (x, Change::Publishes),
            Event::Installs(x) => (x, Change::Installs),
            Event::Sees(x, view) => (x, Change::Sees(view, seen(x, view).expect("views begin at 1"))),
            Event::Probes(x, sent) => (1 - x, Change::Probed(sent, self.0[x].says)),
            Event::Loses(x, generation) => (x, Change::Loses(generation)),
            Event::Restarts(x, view) => (x, Change::Restarts(view, seen(x, view))),
            Event::Reboots(x, view) => (x, Change::Reboots(view, seen(x, view))),
        }
    }

    /// Whether what `x` sends as data is lost, though it is for a kernel state that lives.
    fn loses(&self, x: usize) -> bool {
        let peer = self.node(1 - x);
        self.0[x].sends.is_some_and(|out| {
            let mut statements = peer.published.iter();
            let statement = statements.find(|(epoch, _)| *epoch == receiver_epoch(out));
            !peer.inbound.contains(&out) && statement.is_some_and(|(_, boot)| *boot == peer.boot)
        })
    }

    fn is_settled(&self) -> bool {
        if self.0.iter().any(|side| side.node.published.is_empty()) {
            return true;
        }
        (0..2).all(|x| {
            let newest = |x: usize| Epoch(self.node(x).published.last().expect("checked above").0);
            let newest = Generation {
                sender: newest(x),
                receiver: newest(1 - x),
            };
            let node = self.node(x);
            let alone = |all: &BTreeSet<SaId>, id| all.len() == 1 && all.contains(&id);
            node.out == Some(sa(newest))
                && alone(&node.outbound, sa(newest))
                && alone(&node.inbound, sa(newest.reverse()))
        })
    }
}

/// A search under way.
struct Search {
    bounds: Bounds,
    sides: HashMap<u64, Rc<Side>, Hashed>,
    /// Worlds that are known to come to rest.
    quiet: HashSet<u64, Hashed>,
}

impl Search {
    fn side(&mut self, node: Node) -> Rc<Side> {
        let mut hasher = DefaultHasher::new();
        node.hash(&mut hasher);
        let hash = hasher.finish();
        let side = || Side {
            hash,
            sends: node.out.filter(|out| node.outbound.contains(out)),
            probes: node.pair.probe().filter(|sent| node.sends_on(*sent)),
            says: match node.pair.data() {
                Data::On(generation) => Some(generation),
                Data::Held | Data::Inherited(_) => None,
            },
            known: RefCell::default(),
            node,
        };
        self.sides.entry(hash).or_insert_with(|| Rc::new(side())).clone()
    }

    fn after(&mut self, world: &World, event: Event) -> Result<World, Wrong> {
        let (x, change) = world.change(event);
        let before = &world.0[x];
        let known = before
            .known
            .borrow()
            .iter()
            .find(|(known, _)| *known == change)
            .map(|(_, side)| side.clone());
        let side = known.unwrap_or_else(|| {
            let side = before.node.after(change, &self.bounds).map(|node| self.side(node));
            before.known.borrow_mut().push((change, side.clone()));
            side
        });
        let mut next = world.clone();
        next.0[x] = side?;
        if (0..2).any(|x| next.loses(x)) {
            Err(Wrong::Lost)
        } else {
            Ok(next)
        }
    }

    /// Events stop; what goes on by itself goes on until nothing changes.
    fn settle(&mut self, world: &World) -> Result<(), (Wrong, Vec<Event>)> {
        let mut world = world.clone();
        let mut way = Vec::new();
        'more: while self.quiet.insert(mixed(world.0[0].hash, world.0[1].hash)) {
            for event in world.goes_on(&self.bounds) {
                way.push(event);
                let next = self.after(&world, event).map_err(|wrong| (wrong, way.clone()))?;
                if next.fingerprint() != world.fingerprint() {
                    world = next;
                    continue 'more;
                }
                way.pop();
            }
            return if world.is_settled() {
                Ok(())
            } else {
                Err((Wrong::Stuck, way))
            };
        }
        Ok(())
    }
}

/// One hash of two (Stafford's mix 13, as in splitmix64).
fn mixed(a: u64, b: u64) -> u64 {
    let mut z = a.rotate_left(17).wrapping_add(b).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// What is a hash already is not hashed again.
#[derive(Default)]
struct Same(u64);

type Hashed = BuildHasherDefault<Same>;

impl Hasher for Same {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, _: &[u8]) {
        panic!("only hashes are keys here");
    }

    fn write_u64(&mut self, hash: u64) {
        self.0 = hash;
    }
}

type Came = HashMap<u64, Option<(u64, Event)>, Hashed>;

/// A search's result: how many states there are, or the shortest way into what is wrong.
type Found = Result<usize, (Wrong, Vec<Event>, usize)>;

/// Goes through all states, breadth first. States are told apart by 64 bits of hash.
fn search(bounds: Bounds) -> Found {
    let mut search = Search {
        bounds,
        sides: HashMap::default(),
        quiet: HashSet::default(),
    };
    let node = search.side(Node::new());
    let start = World([node.clone(), node]);
    let mut came = Came::from_iter([(start.fingerprint(), None)]);
    let mut queue = VecDeque::from([start]);
    let mut states = 0;
    while let Some(world) = queue.pop_front() {
        states += 1;
        let here = world.fingerprint();
        let wrong = |wrong: Wrong, last: &[Event], came: &Came| {
            let (mut way, mut at) = (Vec::new(), here);
            while let Some(Some((before, event))) = came.get(&at) {
                way.push(*event);
                at = *before;
            }
            way.reverse();
            way.extend(last);
            Err((wrong, way, states))
        };
        if let Err((what, last)) = search.settle(&world) {
            return wrong(what, &last, &came);
        }
        for event in world.goes_on(&bounds).into_iter().chain(world.may_come(&bounds)) {
            match search.after(&world, event) {
                Ok(after) => {
                    if let Entry::Vacant(new) = came.entry(after.fingerprint()) {
                        new.insert(Some((here, event)));
                        queue.push_back(after);
                    }
                }
                Err(what) => return wrong(what, &[event], &came),
            }
        }
    }
    Ok(states)
}

fn told(way: &[Event]) -> String {
    way.iter().map(ToString::to_string).collect::<Vec<_>>().join(" | ")
}

/// Searches all; returns how many states there are.
fn holds(what: &str, bounds: Bounds) -> usize {
    match search(bounds) {
        Ok(states) => {
            println!("{what}: the rules hold in all {states} states");
            states
        }
        Err((wrong, way, states)) => panic!("{what}: {wrong:?} after {states} states: {}", told(&way)),
    }
}

const RULES: Bounds = Bounds {
    epochs: 2,
    late: false,
    losses: 0,
    broken: None,
};

#[test]
fn whatever_one_node_sends_the_other_can_read_in_every_order_of_two_epochs_each() {
    assert!(holds("two epochs each", RULES) > 1_000);
}

#[test]
fn nor_does_it_matter_how_late_two_epochs_are_published() {
    let bounds = Bounds { late: true, ..RULES };
    assert!(holds("two epochs each, published late", bounds) > 5_000);
}

#[test]
fn nor_which_sending_sa_is_lost_to_another_hand() {
    let bounds = Bounds { losses: 1, ..RULES };
    assert!(holds("two epochs each, a sending SA lost", bounds) > 10_000);
}

#[test]
fn whatever_one_node_sends_the_other_can_read_in_every_order_of_three_epochs_each() {
    let bounds = Bounds { epochs: 3, ..RULES };
    assert!(holds("three epochs each", bounds) > 100_000);
}

/// Breaks a rule: the search must find what is wrong, in few steps.
fn caught(broken: Broken, expected: Wrong) {
    let losses = u32::from(broken == Broken::Remake);
    let bounds = Bounds {
        broken: Some(broken),
        losses,
        ..RULES
    };
    let (wrong, way, states) = search(bounds).expect_err("a broken rule goes wrong");
    println!("{broken:?}: {wrong:?} after {states} states: {}", told(&way));
    assert_eq!(wrong, expected, "{}", told(&way));
    assert!(states < 2_000, "{states} states");
}

#[test]
fn publishing_before_receiving_loses_data() {
    caught(Broken::PublishFirst, Wrong::Lost);
}

#[test]
fn switching_without_a_probe_loses_data() {
    caught(Broken::SwitchAtOnce, Wrong::Lost);
}

#[test]
fn dropping_the_old_epoch_on_sight_of_the_new_loses_data() {
    caught(Broken::DropOnSight, Wrong::Lost);
}

#[test]
fn retiring_all_but_the_newest_own_epoch_loses_data() {
    caught(Broken::RetireEarly, Wrong::Lost);
}

#[test]
fn taking_half_the_evidence_loses_data() {
    caught(Broken::HalfEvidence, Wrong::Lost);
}

#[test]
fn taking_a_probe_for_data_loses_data() {
    caught(Broken::ProbeIsData, Wrong::Lost);
}

#[test]
fn without_probes_the_ends_never_meet() {
    caught(Broken::NoProbe, Wrong::Stuck);
}

#[test]
fn making_a_lost_sending_sa_again_spends_its_key_twice() {
    caught(Broken::Remake, Wrong::Twice);
}
