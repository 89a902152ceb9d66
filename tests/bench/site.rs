//! The measured node: the daemon's real parts, Node, Reconciler and Netlink, in a network namespace of their own.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use keys::{Cipher, Encap, EncapMode};
use nix::sched::{CloneFlags, unshare};
use ring::rand::SystemRandom;
use ringmail::admission::Admitted;
use ringmail::backend::ipsec::MOST;
use ringmail::epochs::DRAIN;
use ringmail::kernel::netlink::{Events, Netlink, Options};
use ringmail::kernel::{Datapath as _, Key, Object, Objects};
use ringmail::lease::{Addresses, Completeness, NodeName};
use ringmail::node::{Node, Settings};
use ringmail::probe::{self, Probe};
use ringmail::reconcile::Reconciler;
use ringmail::uplink::Uplink;

use crate::made_up::{Mesh, Peer};

/// Seconds since 1970 at which the node's epoch begins: the same in every run, so that every run makes the same SPIs.
const EPOCH: u64 = 1_750_000_000;

/// How many packets are sent for [`Change::packets`].
const PACKETS: usize = 500;

/// After so long without an answer a peer whose lease has vanished is let go.
const SILENT: Duration = Duration::from_secs(6);

/// Moves this thread into a network namespace of its own, which lives as long as the file.
pub(crate) fn enter_new_namespace() -> Result<File> {
    unshare(CloneFlags::CLONE_NEWNET).context("make a network namespace (needs root)")?;
    File::open("/proc/thread-self/ns/net").context("hold the network namespace")
}

/// A node whose own objects stand, and that knows no peer yet.
pub(crate) struct Site {
    pub(crate) reconciler: Reconciler<Netlink>,
    events: Events,
    own: Admitted,
    now: Duration,
}

/// How long the parts of one peer's change took.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Change {
    /// A new epoch: from the lease until the peer's objects are those of the new epoch alone, without the waiting.
    pub(crate) rotate: Duration,
    /// From the vanished lease until nothing of the peer is left, without the waiting for an answer.
    pub(crate) leave: Duration,
    /// From the lease until data flows.
    pub(crate) join: Duration,
    /// [`PACKETS`] packets from the node to the peer: looked up, encrypted, out by the uplink.
    pub(crate) packets: Duration,
}

/// What a time of rest cost.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Rest {
    /// In the node's own decisions: what is due, questions and answers read, answers made.
    pub(crate) decide: Duration,
    /// In sending, the kernel's encryption included.
    pub(crate) send: Duration,
    /// Reading the counters of all SAs once.
    pub(crate) dump: Duration,
    /// Questions and answers sent.
    pub(crate) probes: u64,
    /// Their bytes, without headers.
    pub(crate) bytes: u64,
}

impl Site {
    /// Opens the datapath in the namespace of this thread, within a tokio runtime. The uplink is a device that swallows.
    pub(crate) fn open(mesh: &Mesh) -> Result<Self> {
        let index = make_uplink()?;
        let kernel = Netlink::open(&Options { prefer_nft: true })?;
        let events = kernel.events()?;
        let settings = Settings {
            name: NodeName::new("measured")?,
            network: mesh.network,
            cipher: Cipher::Aes128Gcm16,
            encap: Encap {
                mode: EncapMode::Esp,
                port: 4500,
            },
            rekey_after: Duration::from_secs(1 << 40),
            rekey: MOST,
            psk_grace: Duration::from_secs(3600),
            mtu: None,
            masquerade: true,
            random_fully: true,
            advertisements: false,
            directed: false,
            plain: None,
            plaintext: None,
            prepared: None,
            forward: true,
            blackhole: false,
            nft: false,
        };
        let mut reconciler = Reconciler::new(kernel, |left| Node::new(settings, left))?;
        let address = Addresses {
            v4: Some(Ipv4Addr::new(192, 168, 77, 1)),
            v6: None,
        };
        let (subnets, slot) = mesh.own()?;
        let node = &mut reconciler.node;
        node.keyed(vec![Arc::clone(&mesh.psk)], Duration::ZERO);
        node.uplinked(Uplink {
            name: UPLINK.into(),
            index,
            mtu: 1500,
            local: address,
            public: address,
            routes: Vec::new(),
        });
        node.holds(subnets, slot);
        reconciler.completed(Completeness::Complete);
        let now = Duration::from_secs(1);
        let began = reconciler.begin_epoch(None, EPOCH, &SystemRandom::new(), now);
        ensure!(began.is_some(), "no epoch began");
        reconciler.pass(now);
        let lease = reconciler.node.lease().context("a lease of its own")?;
        let own = mesh.admit(&lease)?;
        let mut site = Self {
            reconciler,
            events,
            own,
            now,
        };
        site.listen()?;
        site.check()?;
        Ok(site)
    }

    /// This node's own statement.
    pub(crate) fn own(&self) -> &Admitted {
        &self.own
    }

    /// Gives the node a roster of all `peers` at once and writes until nothing is left to write. Returns how long it
    /// took, and the part of it before the first write.
    pub(crate) fn program(&mut self, peers: &[Peer]) -> Result<(Duration, Duration)> {
        let began = Instant::now();
        for peer in peers {
            self.reconciler
                .node
                .leased(&peer.name, Some(&peer.life.lease), self.now);
        }
        let admitted = began.elapsed();
        self.reconciler.pass(self.now);
        self.listen()?;
        let took = began.elapsed();
        self.check()?;
        Ok((took, admitted))
    }

    /// Each peer confirms, and everyone's data flows. Returns how long it took.
    pub(crate) fn confirm(&mut self, mesh: &Mesh, peers: &[Peer]) -> Result<Duration> {
        let probes = peers
            .iter()
            .map(|peer| Ok((peer.base()?, peer.probe(mesh, &self.own, 0)?)));
        let probes = probes.collect::<Result<Vec<_>>>()?;
        let began = Instant::now();
        for (from, probe) in &probes {
            self.reconciler.node.probed(*from, probe, self.now);
        }
        self.reconciler.pass(self.now);
        self.listen()?;
        let took = began.elapsed();
        self.check()?;
        self.settle(mesh, peers)?;
        Ok(took)
    }

    /// What `time` costs among `peers`, who are settled, answer at once and ask as often as they are asked.
    pub(crate) fn rest(&mut self, mesh: &Mesh, peers: &[Peer], time: Duration) -> Result<Rest> {
        let mut by_base = BTreeMap::new();
        for peer in peers {
            by_base.insert(peer.base()?, (peer, peer.probe_key(mesh, &self.own)?));
        }
        let own = self.reconciler.node.base(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        let socket = UdpSocket::bind((own.context("a base address")?, probe::PORT))?;
        let mut rest = Rest::default();
        let end = self.now + time;
        let mut jitter = 0.0;
        while self.now < end {
            // A golden-section sequence spreads them evenly.
            let mut next = || {
                jitter = (jitter + 0.618_034_f64) % 1.0;
                jitter
            };
            let began = Instant::now();
            let mut out = self.reconciler.tick(self.now, &mut next);
            rest.decide += began.elapsed();
            for question in out.clone() {
                let (peer, key) = by_base.get(&question.to).context("one of the peers")?;
                let ticket = Probe::parse(&question.bytes).context("a probe of ours")?.ticket;
                let answer = peer.say(&self.own, key, false, ticket);
                let asks = peer.say(&self.own, key, true, 1);
                let began = Instant::now();
                self.reconciler.node.probed(question.to, &answer, self.now);
                out.extend(self.reconciler.node.probed(question.to, &asks, self.now));
                rest.decide += began.elapsed();
            }
            for datagram in &out {
                let began = Instant::now();
                socket
                    .send_to(&datagram.payload(), (datagram.to, probe::PORT))
                    .context("send a probe")?;
                rest.send += began.elapsed();
                rest.probes += 1;
                rest.bytes += datagram.payload().len() as u64;
            }
            let due = self.reconciler.node.deadline(self.now).unwrap_or(end);
            self.now = due.max(self.now + Duration::from_millis(1));
        }
        let began = Instant::now();
        ensure!(
            self.reconciler.counters().len() >= 2 * peers.len(),
            "not every SA was read"
        );
        rest.dump = began.elapsed();
        Ok(rest)
    }

    /// One peer's new epoch, its leaving, its coming back under a new key; the site ends as it began.
    pub(crate) fn change(&mut self, mesh: &Mesh, peer: &mut Peer) -> Result<Change> {
        let before = self.reconciler.actual().count();
        mesh.renew(peer)?;
        let mut rotate = self.appear(mesh, peer)?;
        self.now += DRAIN;
        self.settle(mesh, std::slice::from_ref(peer))?;
        rotate += self.timed(|_| ())?;
        ensure!(
            self.reconciler.actual().count() == before,
            "the old epoch did not go: {} objects, {before} before",
            self.reconciler.actual().count()
        );

        let (name, now) = (peer.name.clone(), self.now);
        let mut leave = self.timed(|node| node.leased(&name, None, now))?;
        self.now += SILENT;
        self.settle(mesh, &[])?;
        leave += self.timed(|_| ())?;
        ensure!(
            self.reconciler.actual().count() < before,
            "the peer's objects did not go"
        );

        mesh.renew(peer)?;
        let join = self.appear(mesh, peer)?;
        self.settle(mesh, std::slice::from_ref(peer))?;
        self.timed(|_| ())?;
        ensure!(self.reconciler.actual().count() == before, "the peer did not come back");
        let packets = self.send(peer)?;
        Ok(Change {
            rotate,
            leave,
            join,
            packets,
        })
    }

    /// Sends to a pod of `peer`; fails where a packet does not leave as ESP.
    fn send(&mut self, peer: &Peer) -> Result<Duration> {
        let IpAddr::V4(base) = peer.base()? else {
            bail!("an IPv4 mesh")
        };
        let pod = Ipv4Addr::from(u32::from(base) + 5);
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        socket.connect((pod, 9))?;
        let sent = |site: &mut Self| {
            site.reconciler
                .counters()
                .values()
                .map(|count| count.packets)
                .sum::<u64>()
        };
        let before = sent(self);
        let began = Instant::now();
        for _ in 0..PACKETS {
            socket.send(&[0; 64]).context("send to a pod")?;
        }
        let took = began.elapsed();
        ensure!(
            sent(self) == before + PACKETS as u64,
            "not every packet went through an SA"
        );
        Ok(took)
    }

    /// A peer's new lease and its first probe, until data goes on its new epoch.
    fn appear(&mut self, mesh: &Mesh, peer: &Peer) -> Result<Duration> {
        let (name, lease, now) = (peer.name.clone(), Arc::clone(&peer.life.lease), self.now);
        let (from, probe) = (peer.base()?, peer.probe(mesh, &self.own, 0)?);
        let made = self.timed(|node| node.leased(&name, Some(&lease), now))?;
        let confirmed = self.timed(|node| {
            node.probed(from, &probe, now);
        })?;
        Ok(made + confirmed)
    }

    /// One turn of the daemon's loop: an input, a pass, our own echoes read. Fails where a scope fails.
    fn timed(&mut self, input: impl FnOnce(&mut Node)) -> Result<Duration> {
        let began = Instant::now();
        input(&mut self.reconciler.node);
        self.reconciler.pass(self.now);
        self.listen()?;
        let took = began.elapsed();
        self.check()?;
        Ok(took)
    }

    /// Lets time-driven work happen and answers the questions that go to `peers`. Writes nothing.
    fn settle(&mut self, mesh: &Mesh, peers: &[Peer]) -> Result<()> {
        for _ in 0..2 {
            let asked = self.reconciler.tick(self.now, &mut || 0.0);
            for peer in peers {
                let base = peer.base()?;
                for question in asked.iter().filter(|datagram| datagram.to == base) {
                    let ticket = Probe::parse(&question.bytes).context("a probe of ours")?.ticket;
                    let answer = peer.probe(mesh, &self.own, ticket)?;
                    self.reconciler.node.probed(base, &answer, self.now);
                }
            }
        }
        Ok(())
    }

    fn listen(&mut self) -> Result<()> {
        for event in self.events.ready() {
            self.reconciler.notice(event);
        }
        Ok(())
    }

    fn check(&mut self) -> Result<()> {
        if let Some((scope, error)) = self.reconciler.failures().next() {
            bail!("{scope}: {error}");
        }
        Ok(())
    }
}

/// The node's uplink.
const UPLINK: &str = "up0";

/// Makes the uplink, with a way to every peer; returns its index.
fn make_uplink() -> Result<u32> {
    let commands = "link add up0 type dummy\naddress add 192.168.77.1/24 dev up0\nlink set up0 up\nlink set lo up\n\
                    route add default dev up0\n";
    let mut ip = Command::new("ip")
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .spawn()
        .context("run ip")?;
    ip.stdin.take().context("its input")?.write_all(commands.as_bytes())?;
    ensure!(ip.wait()?.success(), "ip could not make {UPLINK}");
    Ok(nix::net::if_::if_nametoindex(UPLINK)?)
}

/// What the namespace of this thread holds of peers, without the generations that only its maker knows.
pub(crate) fn peers_objects() -> Result<Objects> {
    let mut found = Netlink::open(&Options { prefer_nft: true })?.dump()?;
    found.retain(|key, _| matches!(key, Key::Sa(_) | Key::Policy(_) | Key::Route(_)));
    for object in found.values_mut() {
        if let Object::Sa { born, .. } = object {
            *born = None;
        }
    }
    Ok(found)
}
