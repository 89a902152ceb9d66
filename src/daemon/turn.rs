//! The one loop: whatever changes, the same turn follows. Inputs are taken, an epoch begins where one is wanted, a
//! pass brings the kernel in order, the lease is published, probes go out.
//!
//! It runs on a thread of its own, with the kernel's sockets; a turn is synchronous. Stopping it leaves the datapath as
//! it is.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use keys::{Epoch, Slot};
use ring::rand::{SecureRandom, SystemRandom};
use tokio::sync::{mpsc, oneshot, watch};
use tracing::{debug, info};

use super::books::{self, Books};
use super::doubts::{Looks, Seen};
use super::extension::CommandFailed;
use super::sockets::{Sent, Sockets};
use super::tunnels::Tunnels;
use crate::admin::Command;
use crate::backend::udp;
use crate::config::SubnetEnv;
use crate::config::subnet_env::Written;
use crate::kernel::netlink::{Events, Netlink};
use crate::kernel::{Key, Look, Object, Scope};
use crate::lease::{Lease, Revision, Roster, Subnets};
use crate::node::{Cause, Datagram, Settings};
use crate::packed::MANY;
use crate::psk;
use crate::reconcile::{Reconciler, chain};
use crate::repeats::{Repeats, log_came};
use crate::store::Health;
use crate::store::kube::Datapath;
use crate::uplink::{Uplink, UplinkError};
use crate::wiping;

/// What the node holds, as the store gave it.
#[derive(Clone, Debug)]
pub struct Holding {
    /// The subnets.
    pub subnets: Subnets,
    /// Their slot.
    pub slot: Slot,
    /// The epoch of the node's own statement that the store had before.
    pub previous: Option<Epoch>,
    /// The node's own lease that the store had before.
    pub lease: Option<Arc<Lease>>,
}

/// Everything that a turn follows from; each is the latest complete value of its source.
#[derive(Debug)]
pub struct Inputs {
    /// What the configuration fixes.
    pub settings: watch::Receiver<Settings>,
    /// All leases.
    pub roster: watch::Receiver<Roster>,
    /// The interface that carries the mesh.
    pub uplink: watch::Receiver<Result<Uplink, UplinkError>>,
    /// The PSKs.
    pub psks: watch::Receiver<psk::Held>,
    /// The node's subnets, once there is a lease.
    pub holding: watch::Receiver<Option<Holding>>,
    /// Whether the store works.
    pub health: watch::Receiver<Health>,
    /// The last error of a configuration that is not in force because of it.
    pub misconfigured: watch::Receiver<Option<String>>,
    /// Which of the operator's commands fail.
    pub commands_failed: watch::Receiver<Vec<CommandFailed>>,
    /// What the verbs ask.
    pub commands: mpsc::Receiver<Command>,
    /// Turns true when the daemon ends.
    pub stop: watch::Receiver<bool>,
}

/// Where a turn's results go.
#[derive(Debug)]
pub struct Outputs {
    /// The lease to publish.
    pub lease: watch::Sender<Option<Lease>>,
    /// subnet.env.
    pub subnet_file: PathBuf,
    /// Turns true when the first pass is done and subnet.env stands.
    pub ready: watch::Sender<bool>,
    /// Whether pods have a network.
    pub datapath: watch::Sender<Datapath>,
    /// What is doubtful, for those who are told of it.
    pub doubts: watch::Sender<Seen>,
}

/// A full look at the kernel, whatever the notifications said.
const RESYNC: Duration = Duration::from_secs(300);
/// How often the size of a packet filter that tells nobody is looked at.
const GLANCE: Duration = Duration::from_millis(200);
/// How often subnet.env is looked at: another hand may have changed it.
const LOOK: Duration = Duration::from_secs(5);
/// How long after a burst of changes memory is put in order: it may go on.
const REST: Duration = Duration::from_secs(2);

/// The words for settings that the kernel can't do, and for their end.
const UNFIT: (&str, &str) = ("the new configuration can't be used", "the configuration can be used");

/// The loop's own state.
pub(super) struct Turn {
    pub(super) reconciler: Reconciler<Netlink>,
    /// When memory is put in order, and how many operations were written when that was last asked for.
    tidy: (Option<Duration>, u64),
    pub(super) inputs: Inputs,
    pub(super) outputs: Outputs,
    random: SystemRandom,
    began: Instant,
    seen: Revision,
    previous: Option<Epoch>,
    published: Option<Epoch>,
    pub(super) sockets: Sockets,
    pub(super) tunnels: Tunnels,
    pub(super) books: Books,
    /// Why the newest settings are not in force.
    pub(super) unfit: Option<String>,
    /// Whether what the sockets follow from may have changed.
    reopen: bool,
    resync: Duration,
    /// Whether the kernel keeps a direction on an SA.
    directed: bool,
    /// How often the rules of a packet filter that tells nobody are read, and when next.
    filter_every: Duration,
    filter: Duration,
    /// When its size is looked at next; `None` where it tells of changes.
    glance: Option<Duration>,
    pub(super) looks: Looks,
    answers: Vec<Datagram>,
    pub(super) subnet_env_error: Option<String>,
    /// What was last seen in subnet.env, and when.
    env: Option<(SubnetEnv, Duration)>,
    /// What was said of each thing that may fail again and again.
    troubles: BTreeMap<&'static str, Repeats>,
}

enum Woken {
    Stop,
    Input,
    Kernel(Vec<crate::kernel::Event>),
    Datagrams,
    Command(Command),
    Time,
}

impl Turn {
    pub(super) fn new(
        reconciler: Reconciler<Netlink>,
        inputs: Inputs,
        outputs: Outputs,
        sockets: Sockets,
        directed: bool,
        filter_every: Duration,
    ) -> Self {
        let glance = (!reconciler.filter_tells()).then_some(GLANCE);
        Self {
            reconciler,
            tidy: (None, 0),
            directed,
            filter_every,
            filter: filter_every,
            glance,
            looks: Looks::default(),
            inputs,
            outputs,
            random: SystemRandom::new(),
            began: Instant::now(),
            seen: Revision::default(),
            previous: None,
            published: None,
            sockets,
            tunnels: Tunnels::default(),
            books: Books::open(),
            unfit: None,
            reopen: true,
            env: None,
            troubles: BTreeMap::new(),
            resync: RESYNC,
            answers: Vec::new(),
            subnet_env_error: None,
        }
    }

    /// The loop's monotonic time.
    pub(super) fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// Turns until told to stop. `started` is told when the first turn is done: the guard has been made, or the reason
    /// why not is in the log and tried again.
    pub(super) async fn run(mut self, mut events: Events, started: oneshot::Sender<anyhow::Result<()>>) {
        self.take_inputs();
        self.turn();
        let _ = started.send(Ok(()));
        loop {
            self.turn();
            match self.wait(&mut events).await {
                Woken::Stop => break,
                Woken::Input => self.take_inputs(),
                Woken::Kernel(events) => {
                    for event in events {
                        self.reconciler.notice(event);
                    }
                }
                Woken::Datagrams => self.read_probes(),
                Woken::Command(command) => super::answer::answer(&mut self, command),
                Woken::Time => {}
            }
        }
        info!("stopped; the datapath stays as it is, `ringmail cleanup` removes it");
    }

    async fn wait(&mut self, events: &mut Events) -> Woken {
        let now = self.now();
        let due = [
            self.reconciler.node.deadline(now),
            self.reconciler.deadline(),
            self.sockets.reopen(),
            self.tunnels.deadline(),
            Some(self.resync),
            Some(self.filter),
            self.glance,
            self.tidy.0,
            self.doubts_due(),
        ];
        let due = due.into_iter().flatten().min().unwrap_or(self.resync);
        let sleep = tokio::time::sleep(due.saturating_sub(now).max(Duration::from_millis(1)));
        let Inputs {
            settings,
            roster,
            uplink,
            psks,
            holding,
            commands,
            stop,
            ..
        } = &mut self.inputs;
        // A source that ended keeps its last value; its arm must not spin.
        tokio::select! {
            biased;
            Ok(()) = stop.changed() => Woken::Stop,
            events = events.next() => Woken::Kernel(events),
            () = self.sockets.readable() => Woken::Datagrams,
            () = self.tunnels.ended() => Woken::Time,
            Some(command) = commands.recv() => Woken::Command(command),
            Ok(()) = roster.changed() => Woken::Input,
            Ok(()) = psks.changed() => Woken::Input,
            Ok(()) = uplink.changed() => Woken::Input,
            Ok(()) = settings.changed() => Woken::Input,
            Ok(()) = holding.changed() => Woken::Input,
            () = sleep => Woken::Time,
        }
    }

    /// Takes whatever is new; what is not costs nothing.
    fn take_inputs(&mut self) {
        let now = self.now();
        let settings = self.inputs.settings.borrow_and_update().clone();
        self.configure(settings);
        let node = &mut self.reconciler.node;
        self.reopen = true;
        if self.inputs.uplink.has_changed().is_ok_and(|changed| changed) {
            node.hope(now);
        }
        let trouble = match &*self.inputs.uplink.borrow_and_update() {
            Ok(uplink) => {
                node.uplinked(uplink.clone());
                None
            }
            Err(error) => Some(chain(error)),
        };
        let what = ("no uplink now; the last one stays in use", "there is an uplink again");
        told(&mut self.troubles, what, trouble.as_deref(), now);
        let held = self.inputs.psks.borrow_and_update().clone();
        let trouble = held.error.as_ref().map(|error| chain(error));
        let what = ("the PSK can't be read; those in use stay", "the PSK can be read again");
        told(&mut self.troubles, what, trouble.as_deref(), now);
        if let Some(set) = held.set {
            node.keyed(set.psks.clone(), now);
        }
        if let Some(holding) = self.inputs.holding.borrow_and_update().clone() {
            node.holds(holding.subnets, holding.slot);
            self.previous = self.previous.max(holding.previous);
            if let Some(lease) = &holding.lease {
                node.remembers(lease);
            }
        }
        let roster = self.inputs.roster.borrow_and_update();
        match roster.since(self.seen) {
            Ok(changes) => {
                let mut count = 0;
                for (name, lease) in changes {
                    node.leased(name, lease, now);
                    count += 1;
                }
                if count >= MANY {
                    node.pack();
                }
            }
            Err(_) => {
                let there: BTreeSet<_> = roster.leases().map(|lease| lease.node.clone()).collect();
                for gone in node.known().filter(|name| !there.contains(name)).collect::<Vec<_>>() {
                    node.leased(&gone, None, now);
                }
                for lease in roster.leases() {
                    node.leased(&lease.node, Some(lease), now);
                }
            }
        }
        self.seen = roster.revision();
        self.reconciler.completed(roster.completeness);
    }

    /// Takes settings, unless the kernel can't do what they ask for.
    fn configure(&mut self, settings: Settings) {
        let reconciler = &mut self.reconciler;
        let encrypts = settings.plain.is_none();
        if encrypts && reconciler.node.plain().is_some() {
            let local = reconciler.node.uplink().map(|uplink| uplink.local).unwrap_or_default();
            match reconciler.kernel().preflight(settings.cipher, &local) {
                Ok(features) => self.directed = features.sa_direction,
                Err(error) => {
                    let text = format!(
                        "backend ipsec can't be used, the last one stays in force: {}",
                        chain(&error)
                    );
                    told(&mut self.troubles, UNFIT, Some(&text), self.began.elapsed());
                    self.unfit = Some(text);
                    return;
                }
            }
        }
        told(&mut self.troubles, UNFIT, None, self.began.elapsed());
        self.unfit = None;
        let directed = self.directed;
        let backend = settings.plain.as_ref().map_or("ipsec", |plain| plain.name());
        let plaintext = settings.plaintext.is_some();
        if reconciler.node.configure(Settings { directed, ..settings }) {
            info!(
                backend,
                plaintext, "what may go unencrypted has changed with the new configuration"
            );
            self.seen = Revision::default();
            self.published = None;
        }
    }

    fn turn(&mut self) {
        let now = self.now();
        let reopen = std::mem::take(&mut self.reopen) || self.sockets.reopen().is_some_and(|at| now >= at);
        if reopen {
            // First of all: after a restart, what the peers send in UDP is lost until this socket is open.
            self.sockets.open_encaps(self.reconciler.node.encapsulates(), now);
        }
        if now >= self.resync {
            self.resync = now + RESYNC;
            let trouble = self.reconciler.resync().err().map(|error| chain(&error));
            let what = ("the kernel can't be read", "the kernel can be read again");
            told(&mut self.troubles, what, trouble.as_deref(), now);
        }
        if now >= self.filter {
            self.filter = now + self.filter_every;
            self.reconciler.look_at_filter(Look::Whole);
        }
        // The manager of the packet filter may be another by now.
        match (self.reconciler.filter_tells(), self.glance) {
            (true, Some(_)) => self.glance = None,
            (false, None) => self.glance = Some(now + GLANCE),
            _ => {}
        }
        if self.glance.is_some_and(|at| now >= at) {
            self.glance = Some(now + GLANCE);
            self.reconciler.look_at_filter(Look::Glance);
        }
        self.pass(now);
        let begun = self
            .reconciler
            .begin_epoch(self.previous, books::unix(), &self.random, now);
        if let Some(cause) = begun {
            self.books.began(cause, &self.reconciler.node, now);
            // Rule 1: what the peers may send from now on can be received before they learn of it.
            self.pass(self.now());
        }
        self.publish();
        if reopen {
            self.tunnels.plan(self.reconciler.node.tunnel());
        }
        let device = self.reconciler.holds(&Key::Link(udp::LINK.into()));
        let stands = matches!(device, Some(Object::Link(device)) if device.up);
        self.tunnels.follow(stands, self.now());
        if reopen && self.reconciler.node.plain().is_none() {
            let bases = self.reconciler.node.subnets().unwrap_or_default().bases();
            self.sockets.open_probes(bases, self.now());
        }
        let jitter = &mut || {
            let mut bytes = [0; 2];
            let _ = self.random.fill(&mut bytes);
            f64::from(u16::from_be_bytes(bytes)) / 65536.0
        };
        let answers = std::mem::take(&mut self.answers);
        let now = self.now();
        let questions = self.reconciler.tick(now, jitter);
        self.pass(self.now());
        for datagram in &answers {
            self.send(datagram);
        }
        for datagram in &questions {
            let sent = self.send(datagram);
            // What a padded one is answered says of its size alone.
            self.books.probes += u64::from(sent && datagram.padding == 0);
        }
        self.books.rotations.look(&self.reconciler.node, self.now());
        self.tell_datapath();
        self.tell_doubts();
        self.tidy();
    }

    /// Has memory put in order after work that went through all peers, where these are many.
    pub(super) fn tidy_soon(&mut self) {
        if self.inputs.roster.borrow().leases().nth(MANY).is_some() {
            let due = self.now() + REST;
            // Who asks again and again does not put it off.
            self.tidy.0.get_or_insert(due);
        }
    }

    /// Keeps no more memory than is in use, once a burst of changes is over.
    fn tidy(&mut self) {
        let (now, writes) = (self.now(), self.reconciler.writes());
        let (due, asked) = &mut self.tidy;
        if writes - *asked >= MANY as u64 {
            (*due, *asked) = (Some(now + REST), writes);
        } else if due.is_some_and(|at| now >= at) {
            *due = None;
            self.reconciler.compact();
            wiping::give_back();
        }
    }

    fn pass(&mut self, now: Duration) {
        let (before, begun) = (self.reconciler.tally().passes, Instant::now());
        self.reconciler.pass(now);
        if self.reconciler.tally().passes > before {
            self.books.passed(begun);
        }
    }

    /// Sends a probe; false where the kernel would carry it on another generation than it names, and make it a lie.
    fn send(&mut self, datagram: &Datagram) -> bool {
        let carried = self.reconciler.carries(datagram);
        if carried {
            if self.sockets.send(datagram) == Sent::TooLarge {
                let now = self.now();
                self.reconciler.node.too_large(datagram, now);
            }
        } else {
            debug!(to = %datagram.to, sent = %datagram.sent, "a probe waits for its policy");
        }
        carried
    }

    fn read_probes(&mut self) {
        let now = self.now();
        let (node, answers) = (&mut self.reconciler.node, &mut self.answers);
        self.sockets
            .read(|from, bytes| answers.extend(node.probed(from, bytes, now)));
    }

    fn publish(&mut self) {
        let node = &self.reconciler.node;
        let epoch = node.epoch();
        // Without epochs a lease is whatever follows from the node now.
        if (node.plain().is_some() || epoch.is_some() && epoch != self.published)
            && let Some(lease) = node.lease()
        {
            self.published = epoch;
            self.previous = self.previous.max(epoch);
            self.outputs.lease.send_if_modified(|held| {
                let differs = held.as_ref() != Some(&lease);
                *held = Some(lease);
                differs
            });
        }
        self.write_subnet_env();
    }

    /// Whether pods on this node have a network.
    pub(super) fn datapath(&self) -> Datapath {
        let failure = self.reconciler.failure(&Scope::Node);
        let failure = failure.map(|error| format!("{}: {error}", Scope::Node));
        match failure.or_else(|| self.subnet_env_error.clone()) {
            Some(why) => Datapath::Broken(why),
            None if *self.outputs.ready.borrow() => Datapath::Works,
            None => Datapath::Starting,
        }
    }

    /// Tells whoever reports it.
    fn tell_datapath(&self) {
        let datapath = self.datapath();
        self.outputs.datapath.send_if_modified(|before| {
            let differs = *before != datapath;
            *before = datapath;
            differs
        });
    }

    /// Keeps subnet.env as it should be, once the node's own objects stand.
    fn write_subnet_env(&mut self) {
        let subnets = self.reconciler.node.subnets();
        let broken = self.reconciler.failure(&Scope::Node).is_some();
        let (Some(subnets), Some(mtu), false) = (subnets, self.reconciler.node.mtu(), broken) else {
            return;
        };
        let settings = self.reconciler.node.settings();
        let env = SubnetEnv {
            network: settings.network,
            subnets,
            mtu,
            ip_masq: settings.masquerade,
        };
        let now = self.now();
        if self
            .env
            .as_ref()
            .is_some_and(|(seen, at)| *seen == env && now < *at + LOOK)
        {
            return;
        }
        self.env = Some((env, now));
        let written = env.write(&self.outputs.subnet_file);
        self.subnet_env_error = written.as_ref().err().map(|error| chain(error));
        let what = (
            "subnet.env can't be written: no pod can be started",
            "subnet.env can be written again",
        );
        told(&mut self.troubles, what, self.subnet_env_error.as_deref(), now);
        match written {
            Ok(Written::Unchanged) => {}
            Ok(_) => info!(file = %self.outputs.subnet_file.display(), %subnets, mtu, "wrote subnet.env"),
            Err(_) => return,
        }
        self.outputs
            .ready
            .send_if_modified(|ready| !std::mem::replace(ready, true));
    }

    /// Asks for a new epoch at once.
    pub(super) fn rotate(&mut self) -> Option<Epoch> {
        self.reconciler.node.want(Cause::Asked);
        self.turn();
        self.reconciler.node.epoch()
    }
}

/// Logs a trouble, and that it is over; `what` has the words for both.
fn told(
    troubles: &mut BTreeMap<&'static str, Repeats>,
    (what, over): (&'static str, &'static str),
    trouble: Option<&str>,
    now: Duration,
) {
    log_came!(
        troubles.entry(what).or_default().came(trouble, now),
        error,
        [],
        "{what}",
        "{over}"
    );
}
