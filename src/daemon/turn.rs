//! The one loop: whatever changes, the same turn follows. Inputs are taken, an epoch begins where one is wanted, a
//! pass brings the kernel in order, the lease is published, probes go out.
//!
//! It runs on a thread of its own, with the kernel's sockets; a turn is synchronous. Stopping it leaves the datapath as
//! it is.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use keys::{Epoch, Slot};
use ring::rand::{SecureRandom, SystemRandom};
use tokio::net::UdpSocket;
use tokio::sync::{mpsc, watch};
use tracing::{debug, error, info, warn};

use crate::admin::Command;
use crate::config::SubnetEnv;
use crate::config::subnet_env::Written;
use crate::kernel::Scope;
use crate::kernel::encap::Encap;
use crate::kernel::netlink::{Events, Netlink};
use crate::lease::{Lease, Revision, Roster, Subnets};
use crate::node::{Cause, Datagram, Settings};
use crate::reconcile::{Reconciler, chain};
use crate::store::Health;
use crate::uplink::{Uplink, UplinkError};
use crate::{probe, psk};

/// What the node holds, as the store gave it.
#[derive(Clone, Debug)]
pub struct Holding {
    /// The subnets.
    pub subnets: Subnets,
    /// Their slot.
    pub slot: Slot,
    /// The epoch of the node's own statement that the store had before.
    pub previous: Option<Epoch>,
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
}

/// A full look at the kernel, whatever the notifications said.
const RESYNC: Duration = Duration::from_secs(300);
/// A socket that could not be opened is tried again after this.
const REOPEN: Duration = Duration::from_secs(2);
/// So many datagrams are read in one go before the loop looks elsewhere.
const BURST: usize = 256;

/// The loop's own state.
pub(super) struct Turn {
    pub(super) reconciler: Reconciler<Netlink>,
    pub(super) inputs: Inputs,
    outputs: Outputs,
    random: SystemRandom,
    began: Instant,
    seen: Revision,
    previous: Option<Epoch>,
    published: Option<Epoch>,
    probes: Vec<(IpAddr, UdpSocket)>,
    encaps: Vec<Encap>,
    pub(super) encap_error: Option<String>,
    reopen: Option<Duration>,
    resync: Duration,
    /// Whether the kernel keeps a direction on an SA.
    directed: bool,
    /// How often a packet filter that tells nobody is looked at, and when next.
    filter_every: Duration,
    filter: Duration,
    answers: Vec<Datagram>,
    pub(super) subnet_env_error: Option<String>,
}

enum Woken {
    Stop,
    Input,
    Kernel(Vec<crate::kernel::Event>),
    Datagrams(usize),
    Command(Command),
    Time,
}

impl Turn {
    pub(super) fn new(
        reconciler: Reconciler<Netlink>,
        inputs: Inputs,
        outputs: Outputs,
        directed: bool,
        filter_every: Duration,
    ) -> Self {
        Self {
            reconciler,
            directed,
            filter_every,
            filter: filter_every,
            inputs,
            outputs,
            random: SystemRandom::new(),
            began: Instant::now(),
            seen: Revision::default(),
            previous: None,
            published: None,
            probes: Vec::new(),
            encaps: Vec::new(),
            encap_error: None,
            reopen: None,
            resync: RESYNC,
            answers: Vec::new(),
            subnet_env_error: None,
        }
    }

    /// The loop's monotonic time.
    pub(super) fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// Turns until told to stop.
    pub(super) async fn run(mut self, mut events: Events) {
        self.take_inputs();
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
                Woken::Datagrams(socket) => self.read_probes(socket),
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
            self.reopen,
            Some(self.resync),
            Some(self.filter),
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
            socket = readable(&self.probes) => Woken::Datagrams(socket),
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
        let node = &mut self.reconciler.node;
        let settings = self.inputs.settings.borrow_and_update().clone();
        node.configure(Settings {
            directed: self.directed,
            ..settings
        });
        match &*self.inputs.uplink.borrow_and_update() {
            Ok(uplink) => node.uplinked(uplink.clone()),
            Err(error) => warn!(error = chain(error), "no uplink now; the last one stays in use"),
        }
        let held = self.inputs.psks.borrow_and_update().clone();
        if let Some(error) = &held.error {
            error!(error = chain(error), "the PSK can't be read; those in use stay");
        }
        if let Some(set) = held.set {
            node.keyed(set.psks.clone());
        }
        if let Some(holding) = self.inputs.holding.borrow_and_update().clone() {
            node.holds(holding.subnets, holding.slot);
            self.previous = self.previous.max(holding.previous);
        }
        let roster = self.inputs.roster.borrow_and_update();
        match roster.since(self.seen) {
            Ok(changes) => {
                for (name, lease) in changes {
                    node.leased(name, lease, now);
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

    fn turn(&mut self) {
        let now = self.now();
        if now >= self.resync {
            self.resync = now + RESYNC;
            if let Err(error) = self.reconciler.resync() {
                error!(error = chain(&error), "the kernel can't be read");
            }
        }
        if now >= self.filter {
            self.filter = now + self.filter_every;
            self.reconciler.look_at_filter();
        }
        self.reconciler.pass(now);
        let unix = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_secs());
        if self
            .reconciler
            .begin_epoch(self.previous, unix, &self.random, now)
            .is_some()
        {
            // Rule 1: what the peers may send from now on can be received before they learn of it.
            self.reconciler.pass(self.now());
        }
        self.publish();
        self.open_sockets();
        for encap in &self.encaps {
            // What is no ESP, such as a peer's NAT keepalive, comes up to the socket; nobody wants it.
            encap.drain();
        }
        let jitter = &mut || {
            let mut bytes = [0; 2];
            let _ = self.random.fill(&mut bytes);
            f64::from(u16::from_be_bytes(bytes)) / 65536.0
        };
        let mut datagrams = std::mem::take(&mut self.answers);
        datagrams.extend(self.reconciler.node.tick(self.now(), jitter));
        self.reconciler.pass(self.now());
        for datagram in datagrams {
            self.send(&datagram);
        }
    }

    fn publish(&mut self) {
        let epoch = self.reconciler.node.epoch();
        if epoch.is_some()
            && epoch != self.published
            && let Some(lease) = self.reconciler.node.lease()
        {
            self.published = epoch;
            self.previous = self.previous.max(epoch);
            self.outputs.lease.send_replace(Some(lease));
        }
        // What the node had before this turn's pass: a lease that came during it has no device yet.
        let subnets = self.reconciler.node.subnets();
        let broken = self.reconciler.failures().any(|(scope, _)| *scope == Scope::Node);
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
        match env.write(&self.outputs.subnet_file) {
            Ok(Written::Unchanged) => self.subnet_env_error = None,
            Ok(_) => {
                self.subnet_env_error = None;
                info!(file = %self.outputs.subnet_file.display(), %subnets, mtu, "wrote subnet.env");
            }
            Err(error) => {
                let text = chain(&error);
                if self.subnet_env_error.as_ref() != Some(&text) {
                    error!(error = text, "subnet.env can't be written: no pod can be started");
                }
                self.subnet_env_error = Some(text);
                return;
            }
        }
        self.outputs
            .ready
            .send_if_modified(|ready| !std::mem::replace(ready, true));
    }

    /// Opens what is missing: the probe sockets on the base addresses, the UDP encapsulation sockets.
    fn open_sockets(&mut self) {
        let now = self.now();
        if self.reopen.is_some_and(|at| now < at) {
            return;
        }
        self.reopen = None;
        let bases: Vec<IpAddr> = self
            .inputs
            .holding
            .borrow()
            .iter()
            .flat_map(|h| h.subnets.bases().iter())
            .collect();
        self.probes.retain(|(base, _)| bases.contains(base));
        for base in bases {
            if self.probes.iter().any(|(open, _)| *open == base) {
                continue;
            }
            match probe_socket(base) {
                Ok(socket) => self.probes.push((base, socket)),
                Err(error) => {
                    debug!(%base, %error, "the probe socket can't be opened yet");
                    self.reopen = Some(now + REOPEN);
                }
            }
        }
        let (locals, port) = self.reconciler.node.encapsulates().unwrap_or_default();
        let wanted: Vec<SocketAddr> = locals.iter().map(|local| SocketAddr::new(local, port)).collect();
        self.encaps.retain(|encap| wanted.contains(&encap.local()));
        let before = self.encap_error.take();
        for local in wanted {
            if self.encaps.iter().any(|encap| encap.local() == local) {
                continue;
            }
            match Encap::open(local).map_err(|error| chain(&error)) {
                Ok(encap) => self.encaps.push(encap),
                Err(text) => {
                    if before.as_ref() != Some(&text) {
                        error!(error = text, "ESP in UDP can't be received");
                    }
                    self.encap_error = Some(text);
                    self.reopen = Some(now + REOPEN);
                }
            }
        }
    }

    fn read_probes(&mut self, socket: usize) {
        let now = self.now();
        let mut bytes = [0; probe::LEN + 1];
        for _ in 0..BURST {
            match self.probes[socket].1.try_recv_from(&mut bytes) {
                Ok((len, from)) => {
                    self.answers
                        .extend(self.reconciler.node.probed(from.ip(), &bytes[..len], now));
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                // An ICMP answer to an earlier probe.
                Err(error) => debug!(%error, "a probe came back"),
            }
        }
    }

    /// Sends a probe, if the kernel carries it on the generation that it names: on another it would tell a lie.
    fn send(&self, datagram: &Datagram) {
        if !self.reconciler.carries(datagram) {
            debug!(to = %datagram.to, sent = %datagram.sent, "a probe waits for its policy");
            return;
        }
        let socket = self
            .probes
            .iter()
            .find(|(base, _)| base.is_ipv4() == datagram.to.is_ipv4());
        if let Some((_, socket)) = socket
            && let Err(error) = socket.try_send_to(&datagram.bytes, SocketAddr::new(datagram.to, probe::PORT))
        {
            debug!(to = %datagram.to, %error, "a probe was not sent");
        }
    }

    /// Asks for a new epoch at once.
    pub(super) fn rotate(&mut self) -> Option<Epoch> {
        self.reconciler.node.want(Cause::Asked);
        self.turn();
        self.reconciler.node.epoch()
    }
}

fn probe_socket(base: IpAddr) -> std::io::Result<UdpSocket> {
    let socket = std::net::UdpSocket::bind((base, probe::PORT))?;
    socket.set_nonblocking(true)?;
    UdpSocket::from_std(socket)
}

async fn readable(sockets: &[(IpAddr, UdpSocket)]) -> usize {
    let each = sockets.iter().enumerate().map(|(i, (_, socket))| {
        Box::pin(async move {
            // An error shows again at the read.
            let _ = socket.readable().await;
            i
        })
    });
    first(each.collect()).await
}

async fn first<F: Future<Output = usize> + Unpin>(each: Vec<F>) -> usize {
    if each.is_empty() {
        return std::future::pending().await;
    }
    futures_util::future::select_all(each).await.0
}
