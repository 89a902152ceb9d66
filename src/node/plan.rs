//! What the kernel should hold for each scope, from what the node knows.

use std::net::{IpAddr, SocketAddr};

use keys::{Carrier, EncapMode, Statement};
use xfrm::{Direction, Sa};

use super::{Node, OwnEpoch, Peer, Way};
use crate::backend::Plain;
use crate::backend::ipsec::{self, Association, NodeFacts, Path, PeerFacts, Through};
use crate::carrier;
use crate::epochs::{Data, Generation};
use crate::kernel::mtu::inner_mtu;
use crate::kernel::{Objects, Scope};
use crate::lease::{Addresses, NodeName};

impl Node {
    /// The mesh MTU: the largest inner packet whose ESP fits the uplink, bytes. Where UDP is open it counts, also while
    /// data is on plain ESP: a pod keeps the MTU that it began with, and the carrier changes under it.
    pub fn mtu(&self) -> Option<u32> {
        let uplink = self.uplink.as_ref()?;
        if let Some(plain) = &self.settings.plain {
            return Some(plain.mtu(&self.settings.network, uplink));
        }
        let computed = inner_mtu(
            uplink.mtu,
            self.settings.cipher,
            uplink.public.v4.is_none(),
            self.settings.encap.mode != EncapMode::Esp,
        );
        let encrypted = self.settings.mtu.or(computed);
        let plaintext = self.settings.plaintext.as_ref();
        let plaintext = plaintext.map(|plain| plain.mtu(&self.settings.network, uplink));
        encrypted.map(|mtu| plaintext.map_or(mtu, |plaintext| plaintext.min(mtu)))
    }

    /// The carriers that are open to a sending generation and its reverse; none where a statement is gone.
    pub(super) fn open(&self, peer: &Peer, sending: Generation) -> &'static [Carrier] {
        let ours = self.own.get(&sending.sender).map(|own| own.statement.encap.mode);
        let theirs = peer
            .epochs
            .get(&sending.receiver)
            .map(|epoch| epoch.statement.encap.mode);
        match (ours, theirs) {
            (Some(ours), Some(theirs)) => carrier::open(ours, theirs),
            _ => &[],
        }
    }

    /// What our data to a peer goes on, where this process made it and its carrier is known to pass.
    pub(super) fn data(&self, peer: &Peer) -> Option<(Generation, Carrier)> {
        let Data::On(generation) = peer.pair.data() else {
            return None;
        };
        match self.open(peer, generation) {
            [only] => Some((generation, *only)),
            _ => Some((generation, peer.choice.chosen()?)),
        }
    }

    /// Whether any pair needs the UDP encapsulation socket, and the local addresses and port it is for.
    pub fn encapsulates(&self) -> Option<(Addresses, u16)> {
        if self.plain().is_some() {
            return None;
        }
        let any = self.settings.encap.mode != EncapMode::Esp
            || self.peers.values().any(|peer| {
                let mut statements = peer.epochs.values().map(|epoch| epoch.statement.encap.mode);
                statements.any(|theirs| theirs == EncapMode::Udp)
            });
        let local = self.uplink.as_ref()?.local;
        any.then_some((local, self.settings.encap.port))
    }

    /// What the kernel should hold for `scope`.
    pub fn desired(&self, scope: &Scope) -> Objects {
        if let Some(plain) = &self.settings.plain {
            return match scope {
                Scope::Node => self.plain_node(plain),
                Scope::Peer(name) => self.plain_peer(plain, name).objects,
                Scope::Orphans => Objects::new(),
            };
        }
        match scope {
            Scope::Node => self.sealed_node(),
            Scope::Peer(name) => {
                let facts = self.peer_facts(name);
                let mut objects = facts.map(|facts| ipsec::peer(&facts)).unwrap_or_default();
                self.add_plaintext(name, &mut objects);
                objects
            }
            Scope::Orphans => Objects::new(),
        }
    }

    fn sealed_node(&self) -> Objects {
        let mut objects = ipsec::node(&NodeFacts {
            network: self.settings.network,
            own: self.held.map(|(subnets, _)| subnets),
            uplink: self.uplink.as_ref().map(|uplink| (uplink.name.clone(), uplink.index)),
            mtu: self.mtu().unwrap_or(1280),
            masquerade: self.settings.masquerade,
            random_fully: self.settings.random_fully,
            advertisements: self.settings.advertisements,
            bare: self.settings.plaintext.as_ref().is_some_and(Plain::is_bare),
        });
        if let (Some(plain), Some(site)) = (&self.settings.plaintext, self.site().filter(|_| self.held.is_some())) {
            objects.extend(plain.node(&site));
        }
        objects
    }

    fn peer_facts(&self, name: &NodeName) -> Option<PeerFacts> {
        let peer = self.peers.get(name)?;
        let (own, own_slot) = self.held?;
        let newest = peer.pair.newest()?;
        let open = self.open(peer, newest);
        // UDP where it is open: it takes more room.
        let path = self.path(peer, newest, *open.last()?)?;
        let sending = peer.pair.sending().into_iter().map(|sent| (sent, Direction::Out));
        let receiving = peer.pair.receiving().map(|sent| (sent.reverse(), Direction::In));
        let mut associations = Vec::new();
        for (generation, direction) in sending.chain(receiving) {
            let (born, way) = match direction {
                Direction::Out => (generation, Way::Out),
                Direction::In | Direction::Fwd => (generation.reverse(), Way::In),
            };
            let whole = |carrier: &&Carrier| !peer.torn.contains(&(born, way, **carrier));
            for carrier in self.open(peer, generation).iter().filter(whole) {
                associations.extend(self.association(peer, generation, direction, *carrier));
            }
        }
        let inherited: Vec<Sa> = (peer.pair.inherited().inbound.iter().chain(&peer.pair.inherited().data))
            .filter_map(|id| peer.leftovers.get(id).cloned())
            .collect();
        let through = |generation: Generation, carrier: Carrier| {
            let path = self.path(peer, generation, carrier)?;
            Some(Through {
                src: path.local,
                dst: path.remote,
                spi: ipsec::spi(own_slot, generation, carrier).0,
            })
        };
        let probe = peer.pair.probe();
        let probed = probe.map(|generation| self.open(peer, generation)).unwrap_or_default();
        let data = match peer.pair.data() {
            Data::Held => None,
            Data::On(_) => self
                .data(peer)
                .and_then(|(generation, carrier)| through(generation, carrier)),
            Data::Inherited(id) => peer.leftovers.get(&id).map(|sa| Through {
                src: sa.src,
                dst: sa.dst,
                spi: sa.spi,
            }),
        };
        // Where ESP leaves no room for any packet, nobody is served.
        self.mtu()?;
        Some(PeerFacts {
            own_slot,
            own,
            slot: peer.slot,
            subnets: peer.subnets,
            associations,
            inherited,
            data,
            probes: probed
                .iter()
                .filter_map(|carrier| Some((*carrier, through(probe?, *carrier)?)))
                .collect(),
            path,
            mtu: self.narrower(peer, newest),
            directed: self.settings.directed,
        })
    }

    /// The MTU towards a peer, where its path takes less than the mesh MTU, bytes.
    pub(super) fn narrower(&self, peer: &Peer, newest: Generation) -> Option<u32> {
        // UDP where it is open: it takes more room.
        let path = self.path(peer, newest, *self.open(peer, newest).last()?)?;
        let statement = &peer.epochs.get(&newest.receiver)?.statement;
        let uplink = self.uplink.as_ref()?;
        let fits = inner_mtu(uplink.mtu, statement.cipher, path.remote.is_ipv6(), path.udp.is_some());
        let mesh = self.mtu()?;
        fits.filter(|fits| *fits < mesh)
    }

    /// The outer path of our sending `generation` over `carrier`: IPv4 where both have it.
    pub(super) fn path(&self, peer: &Peer, generation: Generation, carrier: Carrier) -> Option<Path> {
        let own = self.own.get(&generation.sender)?;
        let theirs = &peer.epochs.get(&generation.receiver)?.statement;
        let (local, stated) = outer(own.local, theirs)?;
        if carrier == Carrier::Esp {
            return Some(Path {
                local,
                remote: stated,
                udp: None,
            });
        }
        let remote = peer
            .mapping
            .of(generation.sender, SocketAddr::new(stated, theirs.encap.port));
        Some(Path {
            local,
            remote: remote.ip(),
            udp: Some((own.statement.encap.port, remote.port())),
        })
    }

    /// The SA of our sending `generation` or of its reverse over `carrier`; `None` where no key can be made for it.
    pub(super) fn association(
        &self,
        peer: &Peer,
        sending: Generation,
        direction: Direction,
        carrier: Carrier,
    ) -> Option<Association> {
        let path = self.path(peer, sending, carrier)?;
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
