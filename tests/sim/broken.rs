//! Rules broken on purpose, to see that the mesh objects: the real nodes are told what is not so.
//!
//! The driver knows every epoch's secret, since the seed tells it, and so can seal probes that nobody sent.

use std::collections::BTreeMap;
use std::net::IpAddr;

use keys::{Encoded, Epoch, ProbeKey, Statement};
use ringmail::epochs::Generation;
use ringmail::probe::{LEN, Probe};

use super::make;
use super::mesh::Mesh;

/// A rule that is broken.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Broken {
    /// Kernels say that a receiving SA is there, and it comes later.
    PublishFirst,
    /// Nodes are told of a probe on the newest generation that nobody sent.
    SwitchAtOnce,
    /// Nodes are told, when they see an epoch, that the peer's data goes there.
    DropOnSight,
    /// Every probe that says where data goes is made to say that it goes to the newest epoch of who reads it.
    RetireEarly,
    /// Nodes are told of each confirming probe once more, as if it came from the peer's newest epoch.
    HalfEvidence,
    /// Every probe is made to say that data goes where the probe does.
    ProbeIsData,
    /// Every probe is lost.
    NoProbe,
    /// Kernels say of a sending SA that was there and is lost that they refused it, so that its key is taken for unused.
    Remake,
}

/// An epoch as its own node knows it.
#[derive(Debug)]
struct Life {
    secret: [u8; 32],
    statement: Statement,
    encoded: Encoded,
}

/// What the driver of a mesh with a broken rule knows.
#[derive(Debug)]
pub(super) struct Liar {
    pub(super) rule: Broken,
    lives: BTreeMap<(usize, Epoch), Life>,
    /// The generation of the last true probe, by who read it and who sent it.
    heard: BTreeMap<(usize, usize), Generation>,
}

impl Mesh {
    /// From here on `rule` is broken.
    pub(crate) fn break_rule(&mut self, rule: Broken) {
        self.title = format!("{}, {rule:?}", self.title);
        self.liar = Some(Liar {
            rule,
            lives: BTreeMap::new(),
            heard: BTreeMap::new(),
        });
        for member in &self.members {
            member
                .kernel
                .with(|machine| machine.tardy = rule == Broken::PublishFirst);
        }
    }

    pub(crate) fn breaks(&self, rule: Broken) -> bool {
        self.liar.as_ref().is_some_and(|liar| liar.rule == rule)
    }

    /// `x` begins its newest epoch with `secret`.
    pub(super) fn learn(&mut self, x: usize, secret: [u8; 32]) {
        let member = &self.members[x];
        let (Some(liar), Some(process)) = (&mut self.liar, &member.process) else {
            return;
        };
        let lease = process.reconciler.node.lease().expect("it has an epoch");
        let admitted = ringmail::admission::verify(&lease, &self.network, &member.psks);
        if let Ok(ringmail::admission::Admitted { statement, encoded, .. }) = admitted {
            let life = Life {
                secret,
                statement,
                encoded,
            };
            liar.lives.insert((x, life.statement.epoch), life);
        }
    }

    /// The newest epoch of `y` that `x` has read.
    fn sees(&self, x: usize, y: usize) -> Option<Epoch> {
        let seen = self.members[x].process.as_ref()?.seen.get(y)?.checked_sub(1)?;
        let lease = self.members[y].versions[seen].as_ref()?;
        let admitted = ringmail::admission::verify(lease, &self.network, &self.members[x].psks).ok()?;
        Some(admitted.statement.epoch)
    }

    fn own(&self, x: usize) -> Option<Epoch> {
        self.members[x].process.as_ref()?.reconciler.node.epoch()
    }

    /// The key of probes from one epoch to another.
    fn probe_key(&self, own: (usize, Epoch), peer: (usize, Epoch)) -> Option<ProbeKey> {
        let lives = &self.liar.as_ref()?.lives;
        let (own, peer) = (lives.get(&own)?, lives.get(&peer)?);
        let kid = keys::common_kid(&own.statement.kids, &peer.statement.kids)?;
        let psk = (1..=u8::MAX)
            .map(|number| make::psk(number, &self.network))
            .find(|psk| psk.kid() == kid)?;
        let secret = make::epoch_secret(&own.secret);
        let derived = keys::Pair::derive(&psk, &secret, &own.encoded, &peer.statement.public, &peer.encoded);
        Some(derived.ok()?.probe)
    }

    /// A probe from `y` to `x` that nobody sent.
    fn forged(&self, x: usize, y: usize, sent: Generation, data: Option<Generation>) -> Option<[u8; LEN]> {
        let probe = Probe {
            ask: false,
            sent,
            data,
            ticket: 0,
        };
        Some(probe.seal(&self.probe_key((y, sent.sender), (x, sent.receiver))?))
    }

    fn deliver(&mut self, x: usize, y: usize, bytes: Option<[u8; LEN]>) {
        let from = self.members[y]
            .subnets
            .bases()
            .iter()
            .next()
            .expect("a mesh has a family");
        let now = self.now;
        if let (Some(bytes), Some(process)) = (bytes, &mut self.members[x].process) {
            process.reconciler.node.probed(from, &bytes, now - process.began);
        }
    }

    /// What `x` is told before each turn.
    pub(super) fn mislead(&mut self, x: usize) {
        let Some(rule) = self.liar.as_ref().map(|liar| liar.rule) else {
            return;
        };
        for y in (0..self.members.len()).filter(|y| *y != x) {
            let (Some(own), Some(seen)) = (self.own(x), self.sees(x, y)) else {
                continue;
            };
            let heard = self.liar.as_ref().and_then(|liar| liar.heard.get(&(x, y))).copied();
            let receiver = match (rule, heard) {
                (Broken::SwitchAtOnce, _) => own,
                (Broken::HalfEvidence, Some(heard)) if heard.sender < seen => heard.receiver,
                _ => continue,
            };
            let sent = Generation { sender: seen, receiver };
            let bytes = self.forged(x, y, sent, None);
            self.deliver(x, y, bytes);
        }
    }

    /// What `x` is told when it has read something of `y`.
    pub(super) fn mislead_of(&mut self, x: usize, y: usize) {
        let heard = self.liar.as_ref().and_then(|liar| liar.heard.get(&(x, y))).copied();
        if let (true, Some(sent)) = (self.breaks(Broken::DropOnSight), heard)
            && let (Some(own), Some(seen)) = (self.own(x), self.sees(x, y))
        {
            let data = Generation {
                sender: seen,
                receiver: own,
            };
            let bytes = self.forged(x, y, sent, Some(data));
            self.deliver(x, y, bytes);
        }
    }

    /// What a probe from the base address `from` says by the time that `x` reads it.
    pub(super) fn twist(&mut self, x: usize, from: IpAddr, bytes: &mut [u8]) {
        let own = self.own(x);
        let Some(liar) = &mut self.liar else { return };
        let sender = self
            .members
            .iter()
            .position(|member| member.subnets.bases().iter().any(|base| base == from));
        let (Some(y), Some(probe), Some(own)) = (sender, Probe::parse(bytes), own) else {
            return;
        };
        liar.heard.insert((x, y), probe.sent);
        let data = match (liar.rule, probe.data) {
            (Broken::ProbeIsData, _) => Some(probe.sent),
            (Broken::RetireEarly, Some(data)) => Some(Generation {
                sender: data.sender,
                receiver: own,
            }),
            _ => return,
        };
        let key = self.probe_key((y, probe.sent.sender), (x, probe.sent.receiver));
        if let Some(key) = key {
            bytes[..LEN].copy_from_slice(&Probe { data, ..probe }.seal(&key));
        }
    }

    /// The receiving SAs that kernels said they have are there now.
    pub(super) fn catch_up(&mut self) {
        for member in &self.members {
            member.kernel.with(super::kernel::Machine::catch_up);
        }
    }

    /// The process of `x` starts anew: it has heard nothing.
    pub(super) fn forget_heard(&mut self, x: usize) {
        if let Some(liar) = &mut self.liar {
            liar.heard.retain(|(reader, _), _| *reader != x);
        }
    }
}
