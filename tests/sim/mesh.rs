//! A mesh of real nodes: real reconcilers with real keys, on simulated kernels, a simulated store and wire, one clock.
//!
//! A probe arrives only if the sender's kernel sends it as ESP and the receiver's kernel reads it: the SA with the same
//! key must be there, and a policy that takes it. After every single operation on any kernel, and after every step:
//!
//! - nothing of the mesh leaves or enters any node in the clear;
//! - what a node sends as data its receiver reads, unless the receiver's SA was torn out by a reboot or another hand;
//! - data that flowed goes on flowing, unless the sender's own kernel was damaged.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;
use std::time::Duration;

use keys::{Carrier, Epoch};
use ringmail::kernel::Scope;
use ringmail::lease::{Completeness, Lease, Network, Subnets};
use ringmail::node::{Cause, Datagram, Node, Settings};
use ringmail::probe::{self, PORT};
use ringmail::reconcile::Reconciler;
use ringmail::uplink::Uplink;
use xfrm::Sa;

use super::broken::{Broken, Liar};
use super::kernel::{SimKernel, Spent};
use super::make::{self, Families};
use super::packet::{Fate, From, Layers, Packet, Surroundings, fate};
use super::watch::{View, Views, check_all, check_operation, read_by};

/// The clock of the world at its begin, seconds since 1970.
const UNIX: Duration = Duration::from_secs(1_700_000_000);

/// The daemon of a node while it runs.
pub(crate) struct Process {
    pub(crate) reconciler: Reconciler<SimKernel>,
    pub(crate) began: Duration,
    /// How many versions of each node's lease it has read.
    pub(crate) seen: Vec<usize>,
    published: Option<Epoch>,
    previous: Option<Epoch>,
    answers: Vec<Datagram>,
    held: bool,
    complete: bool,
}

pub(crate) struct Member {
    pub(crate) settings: Settings,
    pub(crate) number: u32,
    pub(crate) subnets: Subnets,
    pub(crate) uplink: Uplink,
    /// What its PSK file holds, newest first.
    pub(crate) psks: Vec<std::sync::Arc<keys::Psk>>,
    pub(crate) kernel: SimKernel,
    pub(crate) process: Option<Process>,
    /// Its lease's versions in the store; `None` where it left.
    pub(crate) versions: Vec<Option<Lease>>,
    /// So many versions nobody reads any more who has not yet: those before it last joined, and before a PSK was dropped.
    pub(crate) bygone: usize,
    /// The store does not answer it.
    pub(crate) away: bool,
    /// The store was restored from a backup, and has an older lease of it.
    pub(crate) restored: bool,
}

/// A probe on the wire.
pub(crate) struct Flight {
    sa: Sa,
    key: Vec<u8>,
    packet: Packet,
    bytes: Vec<u8>,
}

pub(crate) struct Mesh {
    pub(crate) network: Network,
    pub(crate) families: Families,
    pub(crate) members: Vec<Member>,
    pub(crate) views: Views,
    pub(crate) wire: Vec<Flight>,
    /// What is dropped on the wire: from, to, in what.
    pub(crate) blocked: BTreeSet<(usize, usize, Carrier)>,
    /// Packets larger than this are swallowed: from, to → bytes of the inner packet.
    pub(crate) narrow: BTreeMap<(usize, usize), usize>,
    pub(crate) now: Duration,
    /// Probes sent so far.
    pub(crate) probes: u64,
    /// The wall clock less `now`, since 1970: it can be set.
    pub(crate) clock: Duration,
    /// Epochs so far, each with a secret of its own.
    secrets: u64,
    pub(super) liar: Option<Liar>,
    spent: Spent,
    pub(super) story: VecDeque<String>,
    /// What is printed with the story when a test fails, such as the seed.
    pub(crate) title: String,
}

impl Mesh {
    pub(crate) fn new(title: &str, families: Families) -> Self {
        Self {
            network: make::network(families),
            families,
            members: Vec::new(),
            views: Views::default(),
            wire: Vec::new(),
            blocked: BTreeSet::new(),
            narrow: BTreeMap::new(),
            now: Duration::ZERO,
            probes: 0,
            clock: UNIX,
            secrets: 0,
            liar: None,
            spent: Spent::default(),
            story: VecDeque::new(),
            title: title.to_owned(),
        }
    }

    /// `count` nodes, all started and settled.
    pub(crate) fn settled(title: &str, families: Families, count: u32) -> Self {
        let mut mesh = Self::new(title, families);
        for _ in 0..count {
            let x = mesh.add();
            mesh.start(x);
        }
        mesh.settle();
        mesh
    }

    pub(crate) fn tell(&mut self, what: String) {
        if self.story.len() == 40 {
            self.story.pop_front();
        }
        self.story.push_back(format!("{:>9.3} {what}", self.now.as_secs_f64()));
    }

    /// Adds a machine that runs nothing yet; returns its number.
    pub(crate) fn add(&mut self) -> usize {
        let number = u32::try_from(self.members.len()).expect("few nodes") + 1;
        let name = format!("node{number}");
        let kernel = SimKernel::new(&name, &self.spent);
        let uplink = make::uplink(self.families, u8::try_from(number).expect("few nodes"));
        let subnets = make::subnets(&self.network, number);
        let addresses: Vec<IpAddr> = uplink.local.iter().collect();
        kernel.with(|machine| {
            machine.addresses.extend(&addresses);
            machine.sources.extend(&addresses);
        });
        self.views.borrow_mut().push(View {
            kernel: kernel.clone(),
            around: Surroundings {
                own: subnets,
                uplink: (uplink.name.clone(), uplink.index),
                addresses,
            },
            guarded: false,
            present: false,
            hurt: false,
            flows: BTreeSet::new(),
        });
        let (views, x) = (self.views.clone(), self.members.len());
        kernel.watch(move |op| check_operation(&views, x, op));
        self.members.push(Member {
            settings: make::settings(&name, self.network),
            number,
            subnets,
            uplink,
            psks: vec![make::psk(1, &self.network)],
            kernel,
            process: None,
            versions: Vec::new(),
            bygone: 0,
            away: false,
            restored: false,
        });
        x
    }

    /// Starts the daemon; it reads the newest of the store at once.
    pub(crate) fn start(&mut self, x: usize) {
        self.boot(x);
        self.hold(x);
        for y in 0..self.members.len() {
            self.read(x, y, usize::MAX);
        }
        self.turn(x);
    }

    /// Starts the daemon; it knows nothing yet.
    fn launch(&mut self, x: usize) {
        self.tell(format!("{x} starts"));
        let count = self.members.len();
        let now = self.now;
        let member = &mut self.members[x];
        let settings = member.settings.clone();
        member.kernel.with(|machine| {
            machine.notices.clear();
            machine.blind = 0;
        });
        let reconciler = Reconciler::new(member.kernel.reopened(), |left| Node::new(settings, left))
            .expect("the kernel can be read");
        let newest = member.versions.iter().rev().flatten().next();
        let process = Process {
            reconciler,
            began: now,
            seen: vec![0; count],
            published: None,
            previous: newest.and_then(|lease| epoch_of(lease, &member.psks, &self.network)),
            answers: Vec::new(),
            held: false,
            complete: false,
        };
        member.process = Some(process);
        self.forget_heard(x);
    }

    /// Starts the daemon with its uplink and PSKs; it knows nothing of lease and store yet.
    pub(crate) fn boot(&mut self, x: usize) {
        self.launch(x);
        self.input(x, "uplink");
        self.input(x, "psk");
    }

    /// Starts the daemon and gives it its inputs in `order`, a turn after each.
    pub(crate) fn boot_with(&mut self, x: usize, order: &[&str]) {
        self.launch(x);
        self.turn(x);
        for input in order {
            self.input(x, input);
            self.turn(x);
        }
    }

    fn input(&mut self, x: usize, input: &str) {
        let now = self.now;
        let member = &mut self.members[x];
        let Some(process) = &mut member.process else { return };
        match input {
            "uplink" => process.reconciler.node.uplinked(member.uplink.clone()),
            "psk" => process.reconciler.node.keyed(member.psks.clone(), now - process.began),
            "lease" => self.hold(x),
            "roster" => {
                for y in 0..self.members.len() {
                    self.read(x, y, usize::MAX);
                }
            }
            other => panic!("no such input: {other}"),
        }
    }

    /// The PSK file of `x` holds these keys now, newest first.
    pub(crate) fn file(&mut self, x: usize, numbers: &[u8]) {
        self.tell(format!("{x} has PSKs {numbers:?}"));
        self.members[x].psks = numbers.iter().map(|number| make::psk(*number, &self.network)).collect();
        self.input(x, "psk");
        self.turn(x);
    }

    /// The store says which subnets it holds.
    pub(crate) fn hold(&mut self, x: usize) {
        let member = &mut self.members[x];
        if let Some(process) = &mut member.process {
            process.held = true;
            process.reconciler.node.holds(member.subnets, make::slot(member.number));
        }
        let mut views = self.views.borrow_mut();
        views[x].present = true;
    }

    pub(crate) fn is_held(&self, x: usize) -> bool {
        self.members[x].process.as_ref().is_some_and(|process| process.held)
    }

    /// Process `x` reads version number `version` (from 1; the newest if there are fewer) of node `y`'s lease.
    pub(crate) fn read(&mut self, x: usize, y: usize, version: usize) {
        let version = version.min(self.members[y].versions.len());
        if x == y || version == 0 {
            self.complete(x);
            return;
        }
        let lease = self.members[y].versions[version - 1].clone().map(std::sync::Arc::new);
        let name = self.members[y].settings.name.clone();
        let now = self.now;
        let Some(process) = &mut self.members[x].process else {
            return;
        };
        process.seen.resize(process.seen.len().max(y + 1), 0);
        if version <= process.seen[y] {
            return;
        }
        process.seen[y] = version;
        process
            .reconciler
            .node
            .leased(&name, lease.as_ref(), now - process.began);
        self.mislead_of(x, y);
        if lease.is_none() {
            self.views.borrow_mut()[x].flows.remove(&y);
        }
        self.complete(x);
    }

    /// Process `x` reads an older version of `y`'s lease than it has read, as if it came last.
    pub(crate) fn read_again(&mut self, x: usize, y: usize, version: usize) {
        if let Some(process) = &mut self.members[x].process {
            process.seen[y] = version - 1;
            self.read(x, y, version);
        }
    }

    /// Whether a daemon runs there, or there is nothing of a node.
    pub(crate) fn is_running_or_gone(&self, x: usize) -> bool {
        self.members[x].process.is_some() || !self.views.borrow()[x].present
    }

    /// The roster of `x` is complete once every node that holds a lease was read.
    fn complete(&mut self, x: usize) {
        let there: Vec<usize> = (0..self.members.len())
            .filter(|y| *y != x && !self.members[*y].versions.is_empty())
            .collect();
        if let Some(process) = &mut self.members[x].process
            && there.iter().all(|y| process.seen.get(*y).is_some_and(|seen| *seen > 0))
        {
            process.complete = true;
            process.reconciler.completed(Completeness::Complete);
        }
    }

    /// What the daemon does whenever anything changed, in its order.
    pub(crate) fn turn(&mut self, x: usize) {
        self.mislead(x);
        let secret = make::bytes(self.secrets);
        let begun = self.begin_epoch(x, &secret);
        if begun {
            self.secrets += 1;
            self.learn(x, secret);
        }
        self.finish_turn(x);
    }

    /// The first half of a turn; returns whether an epoch began.
    fn begin_epoch(&mut self, x: usize, secret: &[u8; 32]) -> bool {
        let now = self.now;
        let member = &mut self.members[x];
        let Some(process) = &mut member.process else {
            return false;
        };
        let clock = now - process.began;
        for event in member.kernel.notices() {
            process.reconciler.notice(event);
        }
        process.reconciler.pass(clock);
        if process.reconciler.node.wants_epoch(clock).is_none() {
            return false;
        }
        let unix = self.clock.as_secs() + now.as_secs();
        let before = process.reconciler.node.epoch();
        let all: [&[u8]; 2] = [secret, &[0x80, 0]];
        process
            .reconciler
            .begin_epoch(process.previous, unix, &*make::random(&all), clock);
        if process.reconciler.node.epoch() == before {
            return false;
        }
        process.reconciler.pass(clock);
        true
    }

    /// The second half of a turn: what follows from the pass.
    fn finish_turn(&mut self, x: usize) {
        let now = self.now;
        let away = self.members[x].away;
        let member = &mut self.members[x];
        let Some(process) = &mut member.process else { return };
        let clock = now - process.began;
        let epoch = process.reconciler.node.epoch();
        if epoch.is_some()
            && !away
            && (epoch != process.published || member.restored)
            && let Some(lease) = process.reconciler.node.lease()
        {
            process.published = epoch;
            process.previous = process.previous.max(epoch);
            member.versions.push(Some(lease));
            member.restored = false;
        }
        let mut datagrams = std::mem::take(&mut process.answers);
        datagrams.extend(process.reconciler.tick(clock, &mut || 0.5));
        process.reconciler.pass(clock);
        // Where the kernel could not be read nothing was written, and so nothing failed.
        let stale = process.reconciler.is_stale();
        let broken = process.reconciler.failures().next().is_some() || stale;
        let guarded = process.held && !stale && !process.reconciler.failures().any(|(scope, _)| *scope == Scope::Node);
        {
            let mut views = self.views.borrow_mut();
            views[x].guarded |= guarded;
            views[x].hurt &= broken || !process.held || !process.complete;
        }
        for datagram in datagrams {
            self.send(x, &datagram);
        }
        check_all(&self.views);
    }

    fn send(&mut self, x: usize, datagram: &Datagram) {
        let member = &self.members[x];
        let Some(process) = &member.process else { return };
        self.probes += 1;
        if self.breaks(Broken::NoProbe) {
            return;
        }
        if !process.reconciler.carries(datagram) {
            return;
        }
        let src = process.reconciler.node.base(datagram.to).expect("a probe has a family");
        let packet = Packet {
            src,
            dst: datagram.to,
            udp: Some((probe::source(datagram.carrier), PORT)),
        };
        let views = self.views.borrow();
        let sent = member.kernel.look(|machine| {
            match fate(machine.scene(), &views[x].around, Layers::ALL, From::Node, packet) {
                Fate::Sealed(id) => machine
                    .scene()
                    .sas()
                    .iter()
                    .find(|sa| sa.id() == id)
                    .cloned()
                    .zip(machine.keys.get(&id).cloned()),
                Fate::Dropped(_) => None,
                fate => panic!("{x}'s probe to {} is {fate:?}", datagram.to),
            }
        });
        if let Some((sa, key)) = sent {
            if !views[x].hurt {
                let slot = make::slot(member.number);
                assert_eq!(
                    sa.spi,
                    ringmail::backend::ipsec::spi(slot, datagram.sent, datagram.carrier).0,
                    "a probe says where it travels"
                );
            }
            self.wire.push(Flight {
                sa,
                key,
                packet,
                bytes: datagram.payload().into_owned(),
            });
        }
    }

    /// Probe number `at` on the wire arrives where it is for, if that node can read it.
    pub(crate) fn arrive(&mut self, at: usize) {
        let mut flight = self.wire.swap_remove(at);
        let to = (0..self.members.len()).find(|y| {
            let kernel = &self.members[*y].kernel;
            kernel.look(|machine| machine.addresses.contains(&flight.sa.dst))
        });
        let Some(y) = to else { return };
        let carrier = if flight.sa.encap.is_some() {
            Carrier::Udp
        } else {
            Carrier::Esp
        };
        let from = (0..self.members.len()).find(|x| {
            let kernel = &self.members[*x].kernel;
            kernel.look(|machine| machine.sources.contains(&flight.sa.src))
        });
        if from.is_some_and(|x| self.blocked.contains(&(x, y, carrier))) {
            return;
        }
        let headers = if flight.packet.dst.is_ipv4() { 28 } else { 48 };
        let fits = |limit: &usize| flight.bytes.len() + headers <= *limit;
        if !from.is_none_or(|x| self.narrow.get(&(x, y)).is_none_or(fits)) {
            return;
        }
        if read_by(&self.views.borrow()[y], &flight.sa, &flight.key, flight.packet).is_err() {
            return;
        }
        self.members[y].kernel.carry(flight.sa.id());
        self.twist(y, flight.packet.src, &mut flight.bytes);
        let now = self.now;
        if let Some(process) = &mut self.members[y].process {
            let answer = process
                .reconciler
                .node
                .probed(flight.packet.src, &flight.bytes, now - process.began);
            process.answers.extend(answer);
        }
        self.turn(y);
    }

    /// When `x` next has something to do.
    pub(crate) fn due(&self, x: usize) -> Option<Duration> {
        let process = self.members[x].process.as_ref()?;
        let node = process.reconciler.node.deadline(self.now - process.began);
        let pass = process.reconciler.deadline();
        node.into_iter().chain(pass).min().map(|at| at + process.began)
    }

    /// Time goes on; whoever has something to do by then does it late, at the end.
    pub(crate) fn wait(&mut self, time: Duration) {
        self.now += time;
        for x in 0..self.members.len() {
            if self.due(x).is_some_and(|due| due <= self.now) {
                self.turn(x);
            }
        }
    }

    /// Wants a new epoch of `x`.
    pub(crate) fn rotate(&mut self, x: usize, cause: Cause) {
        self.tell(format!("{x} rotates: {cause:?}"));
        if let Some(process) = &mut self.members[x].process {
            process.reconciler.node.want(cause);
        }
        self.turn(x);
    }

    /// The daemon stops; the kernel stays as it is.
    pub(crate) fn stop(&mut self, x: usize) {
        self.tell(format!("{x} stops"));
        self.members[x].process = None;
    }

    /// The machine loses all it had.
    pub(crate) fn reboot(&mut self, x: usize) {
        self.stop(x);
        self.tell(format!("{x} reboots"));
        self.members[x].kernel.reboot();
        let mut views = self.views.borrow_mut();
        views[x].guarded = false;
        views[x].flows.clear();
        for view in views.iter_mut() {
            view.flows.remove(&x);
        }
    }

    /// The node leaves for good: nothing of it stays, and its lease is gone.
    pub(crate) fn leave(&mut self, x: usize) {
        self.reboot(x);
        self.tell(format!("{x} leaves"));
        let member = &mut self.members[x];
        if member.versions.last().is_some_and(Option::is_some) {
            member.versions.push(None);
        }
        member.bygone = member.versions.len();
        let mut views = self.views.borrow_mut();
        views[x].present = false;
    }

    /// Another hand is at the kernel of `x`.
    pub(crate) fn hurt(&mut self, x: usize, how: impl FnOnce(&SimKernel)) {
        how(&self.members[x].kernel);
        let mut views = self.views.borrow_mut();
        views[x].hurt = true;
        views[x].flows.clear();
        for view in views.iter_mut() {
            view.flows.remove(&x);
        }
    }
}

fn epoch_of(lease: &Lease, psks: &[std::sync::Arc<keys::Psk>], network: &Network) -> Option<Epoch> {
    let admitted = ringmail::admission::verify(lease, network, psks).ok()?;
    Some(admitted.statement.epoch)
}
