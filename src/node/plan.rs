//! What the kernel should hold for each scope, from what the node knows.

use std::net::IpAddr;

use keys::{Encap, EncapMode, Statement};
use xfrm::{Direction, Sa};

use super::{Node, OwnEpoch, Peer};
use crate::backend::ipsec::{self, Association, NodeFacts, Path, PeerFacts, Through};
use crate::epochs::{Data, Generation};
use crate::kernel::mtu::inner_mtu;
use crate::kernel::{Objects, Scope};
use crate::lease::{Addresses, NodeName};

impl Node {
    /// The mesh MTU: the largest inner packet whose ESP fits the uplink, bytes.
    pub fn mtu(&self) -> Option<u32> {
        let uplink = self.uplink.as_ref()?;
        let computed = inner_mtu(
            uplink.mtu,
            self.settings.cipher,
            uplink.public.v4.is_none(),
            self.udp(None),
        );
        self.settings.mtu.or(computed)
    }

    /// Whether ESP travels in UDP: where either end wants it.
    pub(super) fn udp(&self, peer: Option<&Statement>) -> bool {
        let wants = |encap: &Encap| encap.mode == EncapMode::Udp;
        wants(&self.settings.encap) || peer.is_some_and(|peer| wants(&peer.encap))
    }

    /// Whether any pair needs the UDP encapsulation socket, and the local addresses and port it is for.
    pub fn encapsulates(&self) -> Option<(Addresses, u16)> {
        let any = self.udp(None)
            || self
                .peers
                .values()
                .any(|peer| peer.epochs.values().any(|epoch| self.udp(Some(&epoch.statement))));
        let local = self.uplink.as_ref()?.local;
        any.then_some((local, self.settings.encap.port))
    }

    /// What the kernel should hold for `scope`.
    pub fn desired(&self, scope: &Scope) -> Objects {
        match scope {
            Scope::Node => ipsec::node(&NodeFacts {
                network: self.settings.network,
                own: self.held.map(|(subnets, _)| subnets),
                uplink: self.uplink.as_ref().map(|uplink| (uplink.name.clone(), uplink.index)),
                mtu: self.mtu().unwrap_or(1280),
                masquerade: self.settings.masquerade,
                random_fully: self.settings.random_fully,
                advertisements: self.settings.advertisements,
            }),
            Scope::Peer(name) => self
                .peer_facts(name)
                .map(|facts| ipsec::peer(&facts))
                .unwrap_or_default(),
            Scope::Orphans => Objects::new(),
        }
    }

    fn peer_facts(&self, name: &NodeName) -> Option<PeerFacts> {
        let peer = self.peers.get(name)?;
        let (own, own_slot) = self.held?;
        let newest = peer.pair.newest()?;
        let path = self.path(peer, newest)?;
        let mut associations = Vec::new();
        for generation in peer.pair.sending() {
            associations.extend(self.association(peer, generation, Direction::Out));
        }
        for generation in peer.pair.receiving() {
            associations.extend(self.association(peer, generation.reverse(), Direction::In));
        }
        let inherited: Vec<Sa> = (peer.pair.inherited().inbound.iter().chain(&peer.pair.inherited().data))
            .filter_map(|id| peer.leftovers.get(id).cloned())
            .collect();
        let through = |generation: Generation| {
            let path = self.path(peer, generation)?;
            Some(Through {
                src: path.local,
                dst: path.remote,
                spi: ipsec::spi(own_slot, generation).0,
            })
        };
        let data = match peer.pair.data() {
            Data::Held => None,
            Data::On(generation) => through(generation),
            Data::Inherited(id) => peer.leftovers.get(&id).map(|sa| Through {
                src: sa.src,
                dst: sa.dst,
                spi: sa.spi,
            }),
        };
        let statement = &peer.epochs.get(&newest.receiver)?.statement;
        let mesh = self.mtu()?;
        let uplink = self.uplink.as_ref()?;
        let fits = inner_mtu(uplink.mtu, statement.cipher, path.remote.is_ipv6(), path.udp.is_some());
        Some(PeerFacts {
            own_slot,
            own,
            slot: peer.slot,
            subnets: peer.subnets,
            associations,
            inherited,
            data,
            probe: peer.pair.probe().and_then(through),
            path,
            mtu: fits.filter(|fits| *fits < mesh),
            directed: self.settings.directed,
        })
    }

    /// The outer path of our sending `generation`: IPv4 where both have it.
    pub(super) fn path(&self, peer: &Peer, generation: Generation) -> Option<Path> {
        let own = self.own.get(&generation.sender)?;
        let theirs = &peer.epochs.get(&generation.receiver)?.statement;
        let (local, remote) = outer(own.local, theirs)?;
        let udp = (own.statement.encap.mode == EncapMode::Udp || theirs.encap.mode == EncapMode::Udp)
            .then_some((own.statement.encap.port, theirs.encap.port));
        Some(Path { local, remote, udp })
    }

    /// The SA of our sending `generation` or of its reverse; `None` where no key can be made for it.
    pub(super) fn association(&self, peer: &Peer, sending: Generation, direction: Direction) -> Option<Association> {
        let path = self.path(peer, sending)?;
        let OwnEpoch {
            statement: own, soft, ..
        } = self.own.get(&sending.sender)?;
        let theirs = &peer.epochs.get(&sending.receiver)?.statement;
        if !peer.keys.contains_key(&sending) {
            let kid = keys::common_kid(&own.kids, &theirs.kids)?;
            self.psks.get(kid)?;
        }
        let (generation, cipher) = match direction {
            Direction::Out => (sending, own.cipher),
            Direction::In | Direction::Fwd => (sending.reverse(), theirs.cipher),
        };
        Some(Association {
            generation,
            direction,
            cipher,
            path,
            soft: *soft,
        })
    }
}

/// The addresses that a generation's outer packets go between: IPv4 where both ends have it.
fn outer(local: Addresses, theirs: &Statement) -> Option<(IpAddr, IpAddr)> {
    let public: Addresses = theirs.addresses.iter().copied().collect();
    local.iter().find_map(|local| Some((local, public.of_family(local)?)))
}
