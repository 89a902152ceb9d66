//! Peers behind a NAT: where their UDP really comes from, learned from the kernel and followed.
//!
//! The kernel tells of another source address or port once it has authenticated a packet (`km_new_mapping` in
//! net/xfrm/xfrm_state.c). The ports of an SA can be changed while its key stays (`xfrm_state_update` copies the
//! encapsulation and nothing of the key), so another port is followed at once. Its addresses can't: moving an SA by
//! XFRM_MSG_MIGRATE clones it, and a packet that leaves meanwhile repeats a nonce. So another address is for the SAs of the
//! next own epoch, which is asked for.

use std::net::{IpAddr, SocketAddr};

use keys::{Carrier, EncapMode, Epoch, Statement};
use xfrm::Sa;

use super::{Cause, Known, Node, Peer};
use crate::kernel::Scope;
use crate::lease::{Addresses, NodeName};

/// Where a peer's UDP comes from, instead of where its statement says.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Learned {
    /// The address of its statement that it stands for.
    stated: IpAddr,
    at: SocketAddr,
}

impl Learned {
    /// What an earlier process had learned, as its sending SA shows: one towards another epoch of the peer shows where it
    /// was then.
    pub(super) fn inherited(sa: &Sa, statement: &Statement) -> Option<Self> {
        let parts = keys::Spi(sa.spi).parts().ok()?;
        if parts.receiver_mod64 != statement.epoch.mod64() {
            return None;
        }
        let public: Addresses = statement.addresses.iter().copied().collect();
        let stated = public.of_family(sa.dst)?;
        let at = SocketAddr::new(sa.dst, sa.encap?.dport);
        // With the port that it says, it may have been where it then was: an epoch alike modulo 64 tells too little.
        if at.ip() != stated && at.port() == statement.encap.port {
            return None;
        }
        (at != SocketAddr::new(stated, statement.encap.port)).then_some(Self { stated, at })
    }
}

/// What was learned of one peer.
#[derive(Debug, Default)]
pub(super) struct Mapping {
    newest: Option<Learned>,
    /// Where the SAs of each own epoch go: an SA keeps its address.
    by_epoch: Vec<(Epoch, Learned)>,
}

impl Mapping {
    /// What was learned before, for each of `epochs`: none of their SAs towards the peer is made yet.
    pub(super) fn new(learned: Option<Learned>, epochs: &[Epoch]) -> Self {
        let by_epoch = learned.map(|learned| epochs.iter().map(|epoch| (*epoch, learned)).collect());
        Self {
            newest: learned,
            by_epoch: by_epoch.unwrap_or_default(),
        }
    }

    /// Our epoch `epoch` begins.
    pub(super) fn begin(&mut self, epoch: Epoch) {
        self.by_epoch.extend(self.newest.map(|learned| (epoch, learned)));
    }

    /// Forgets what was of epochs that are gone.
    pub(super) fn keep(&mut self, alive: impl Fn(Epoch) -> bool) {
        self.by_epoch.retain(|(epoch, _)| alive(*epoch));
    }

    /// Where the UDP of our epoch `epoch` goes, for a peer that says it is at `stated`.
    pub(super) fn of(&self, epoch: Epoch, stated: SocketAddr) -> SocketAddr {
        let mut learned = self.by_epoch.iter().rev();
        let found = learned.find(|(of, learned)| *of == epoch && learned.stated == stated.ip());
        found.map_or(stated, |(_, learned)| learned.at)
    }

    /// The newest that was learned of a peer that says it is at `stated`.
    pub(super) fn newest(&self, stated: IpAddr) -> Option<SocketAddr> {
        self.newest
            .filter(|learned| learned.stated == stated)
            .map(|learned| learned.at)
    }
}

impl Node {
    /// The kernel says that authenticated UDP of `name` comes from `source`.
    pub fn moved(&mut self, name: &NodeName, source: SocketAddr) {
        let Some(peer) = self.peers.get(name) else { return };
        let Some((stated, used)) = self.in_udp(peer) else {
            return;
        };
        let known = peer.mapping.newest(stated.ip()).unwrap_or(stated);
        if known == source || source.is_ipv4() != stated.is_ipv4() {
            return;
        }
        tracing::info!(peer = %name, from = %known, to = %source, "a peer's UDP comes from elsewhere: it is behind a NAT");
        let learned = Learned {
            stated: stated.ip(),
            at: source,
        };
        // The SAs of these epochs go to that address already: their port follows.
        let at_hand: Vec<Epoch> = (self.own.keys().copied())
            .filter(|epoch| peer.mapping.of(*epoch, stated).ip() == source.ip())
            .collect();
        if let Some(peer) = self.peers.get_mut(name) {
            peer.mapping.newest = Some(learned);
            for epoch in at_hand {
                peer.mapping.by_epoch.retain(|(of, _)| *of != epoch);
                peer.mapping.by_epoch.push((epoch, learned));
            }
        }
        if used.ip() != source.ip() {
            self.want(Cause::Moved);
        }
        self.dirty.insert(Scope::Peer(name.clone()));
    }

    /// Where a peer says that its UDP is, and where ours to it goes; `None` where UDP is not open.
    pub(super) fn in_udp(&self, peer: &Peer) -> Option<(SocketAddr, SocketAddr)> {
        let newest = peer.pair.newest()?;
        if !self.open(peer, newest).contains(&Carrier::Udp) {
            return None;
        }
        let used = self.path(peer, newest, Carrier::Udp)?;
        let statement = &peer.epochs.get(&newest.receiver)?.statement;
        let public: Addresses = statement.addresses.iter().copied().collect();
        let stated = SocketAddr::new(public.of_family(used.local)?, statement.encap.port);
        Some((stated, SocketAddr::new(used.remote, used.udp?.1)))
    }

    /// The epoch of a node that says it is at our own public address, as behind one NAT. Who sends to both needs SPIs that
    /// differ: the epochs must, modulo 64.
    fn housemate(&self, known: &Known) -> Option<Epoch> {
        let public = self.uplink.as_ref()?.public;
        let statement = &known.admitted.as_ref()?.statement;
        let mut theirs = statement.addresses.iter();
        let here = theirs.any(|theirs| public.of_family(*theirs) == Some(*theirs));
        here.then_some(statement.epoch)
    }

    /// What our next epoch's number had better not be modulo 64, where several nodes may turn out to be behind one NAT: the
    /// numbers of nodes in other slots.
    pub fn left_to_others(&self) -> impl Iterator<Item = u8> {
        let apart = self.settings.encap.mode != EncapMode::Esp;
        let slot = self.slot().filter(|_| apart);
        (0..64).filter(move |number| slot.is_some_and(|slot| u32::from(*number) % 16 != slot.get() % 16))
    }

    /// What our next epoch's number must not be modulo 64 for the sake of nodes at the same public address.
    pub fn avoided(&self) -> impl Iterator<Item = u8> {
        self.known
            .values()
            .filter_map(|known| Some(self.housemate(known)?.mod64()))
    }

    /// Gives way to `other` if it is at our public address and its epoch has the number of ours modulo 64: the greater name
    /// does.
    pub(super) fn give_way(&mut self, other: &NodeName) {
        let theirs = self.known.get(other).and_then(|known| self.housemate(known));
        let alike = theirs
            .zip(self.epoch())
            .is_some_and(|(theirs, own)| theirs.mod64() == own.mod64());
        if alike && *other < self.settings.name {
            self.want(Cause::Alike);
        }
    }
}
