//! The ipsec datapath: guard, mesh device, and for each peer its SAs, policies and routes.
//!
//! Plaintext has no way out: a peer's subnet is routed to a device that swallows, and only a policy turns the packet
//! into ESP before it gets there; block policies and an unreachable route stand behind. On the way in, `in` and `fwd`
//! policies accept a peer's subnet from SAs with that peer's reqid alone, and the guard drops the rest of the Network.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use keys::{Carrier, Cipher, Slot, Spi};
use xfrm::{
    Action, Aead, Direction, Encap, Family, Limits, Policy, PolicyId, Sa, SaDirection, SaId, Selector, Template,
};

use crate::epochs::Generation;
use crate::kernel::device::{Device, DeviceKind};
use crate::kernel::firewall::{Firewall, Form};
use crate::kernel::{Guard, Key, Object, Objects, Route, priority, reqid};
use crate::lease::{Network, Subnets};
use crate::probe;

/// The device that holds the subnet's base address and swallows what no policy takes.
pub const LINK: &str = "ringmail0";

/// Packets that a receiving SA remembers against replay; the largest reordering it forgives.
pub const REPLAY_WINDOW: u32 = 1024;

/// After how much on one SA, either way, a new epoch is asked for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Soft {
    /// Packets.
    pub packets: u64,
    /// Bytes, as the kernel counts them: with the inner header, without the outer.
    pub bytes: u64,
}

/// The most that an SA may carry before it is followed by another. 2^42 bytes are 2^38 blocks of a cipher with blocks of
/// 128 bits: what AES-GCM gives an attacker who saw them all is below 2^-50 (blocks squared / 2^129; Luykx and Paterson, to whom
/// RFC 8446 section 5.5 refers), also at the hard limit of twice that. 2^33 packets of 512 bytes are as many.
pub const MOST: Soft = Soft {
    packets: 1 << 33,
    bytes: 1 << 42,
};

/// More than an SA carries in [`crate::node::pace::CALM`], a minute: 35 million packets a second, 146 Gbit/s. The kernel
/// ends an SA at its hard limit and tells nobody before, so that whatever the soft one is, the next epoch has its minute.
const ROOM: Soft = Soft {
    packets: 1 << 31,
    bytes: 1 << 40,
};

/// The limits of an SA whose soft one is `soft`: the hard one is twice that, or as much above as a minute can carry.
pub fn limits(soft: Soft) -> Limits {
    Limits {
        soft_packets: soft.packets,
        hard_packets: soft.packets.saturating_add(soft.packets.max(ROOM.packets)),
        soft_bytes: soft.bytes,
        hard_bytes: soft.bytes.saturating_add(soft.bytes.max(ROOM.bytes)),
    }
}

/// What the node's own objects follow from.
#[derive(Clone, Debug)]
pub struct NodeFacts {
    /// The mesh's ranges.
    pub network: Network,
    /// The own subnets, once there is a lease.
    pub own: Option<Subnets>,
    /// The uplink's name and index, once there is one.
    pub uplink: Option<(String, u32)>,
    /// The mesh MTU, bytes.
    pub mtu: u32,
    /// Whether pods' traffic to the outside takes the node's address.
    pub masquerade: bool,
    /// Whether masquerading picks random ports.
    pub random_fully: bool,
    /// Whether the uplink takes router advertisements.
    pub advertisements: bool,
    /// Whether peers in plaintext are allowed whose packets cross the uplink as they are.
    pub bare: bool,
}

/// What the node needs, whoever its peers are.
pub fn node(facts: &NodeFacts) -> Objects {
    let mut objects = Objects::new();
    if facts.network.v4.is_some() {
        objects.insert(Key::Sysctl("net/ipv4/ip_forward".into()), Object::Sysctl("1".into()));
    }
    if facts.network.v6.is_some() {
        objects.insert(
            Key::Sysctl("net/ipv6/conf/all/forwarding".into()),
            Object::Sysctl("1".into()),
        );
        if let (Some((uplink, _)), true) = (&facts.uplink, facts.advertisements) {
            objects.insert(
                Key::Sysctl(format!("net/ipv6/conf/{uplink}/accept_ra")),
                Object::Sysctl("2".into()),
            );
        }
    }
    // The guard's wide policies would else put all peers' into one list, which the kernel walks for every packet.
    let lengths = [
        (Family::V4, facts.network.v4.map(|range| range.subnet_len)),
        (Family::V6, facts.network.v6.map(|range| range.subnet_len)),
    ];
    for (family, length) in lengths {
        objects.extend(length.map(|remote| (Key::HashThreshold(family), Object::HashThreshold { remote })));
    }
    for net in facts.network.nets() {
        objects.insert(Key::GuardRoute(net), Object::Unreachable);
        // Local policies come first: a block alone would cut pods off from their own node. That our own subnet can't be
        // a source on the uplink is the firewall's to see: a policy's interface is always the one that a packet leaves
        // by (decode_session4), so one for `in` and `fwd` on the uplink would stop pods on their way out instead.
        if let Some(own) = facts.own.and_then(|own| own.iter().find(|subnet| net.contains(subnet))) {
            guard(&mut objects, Guard::Local, Direction::In, own, any(net));
            guard(&mut objects, Guard::Local, Direction::Fwd, own, any(net));
            guard(&mut objects, Guard::Local, Direction::Out, any(net), own);
        }
        guard(&mut objects, Guard::Block, Direction::In, net, any(net));
        guard(&mut objects, Guard::Block, Direction::Fwd, net, any(net));
        guard(&mut objects, Guard::Block, Direction::Out, any(net), net);
    }
    if let Some((uplink, _)) = &facts.uplink {
        let own = facts.own.unwrap_or_default();
        let firewall = Firewall {
            form: if facts.bare { Form::Ajar } else { Form::Sealed },
            networks: facts.network.nets().collect(),
            own,
            bases: own.bases(),
            uplink: uplink.clone(),
            masquerade: facts.masquerade,
            random_fully: facts.random_fully,
        };
        objects.insert(Key::Firewall, Object::Firewall(Box::new(firewall)));
    }
    if let Some(own) = facts.own {
        objects.insert(
            Key::Link(LINK.into()),
            Object::Link(Box::new(Device::new(DeviceKind::Sink, facts.mtu))),
        );
        for base in own.bases().iter() {
            objects.insert(Key::Address(LINK.into(), base), Object::Address);
        }
    }
    objects
}

fn guard(objects: &mut Objects, which: Guard, direction: Direction, src: IpNet, dst: IpNet) {
    let id = between(direction, src, dst);
    let action = match which {
        Guard::Local => Action::Allow,
        Guard::Block => Action::Block,
    };
    let policy = Policy {
        id,
        priority: which.priority(),
        action,
        template: None,
    };
    objects.insert(Key::Guard(which, id), Object::Policy(Box::new(policy)));
}

/// The range that holds every address of `like`'s family.
fn any(like: IpNet) -> IpNet {
    match like {
        IpNet::V4(_) => Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 0).into(),
        IpNet::V6(_) => Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 0).into(),
    }
}

/// The two outer ends of one generation and how its packets travel.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Path {
    /// Our address on the uplink.
    pub local: IpAddr,
    /// The peer's public address.
    pub remote: IpAddr,
    /// UDP ports, ours and the peer's, where ESP travels in UDP.
    pub udp: Option<(u16, u16)>,
}

impl Path {
    /// What its packets travel in.
    pub fn carrier(&self) -> Carrier {
        match self.udp {
            None => Carrier::Esp,
            Some(_) => Carrier::Udp,
        }
    }
}

/// One SA as it should be.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Association {
    /// The generation that it belongs to.
    pub generation: Generation,
    /// Which way.
    pub direction: Direction,
    /// The cipher that the sender chose.
    pub cipher: Cipher,
    /// Between which ends.
    pub path: Path,
    /// When it is to be followed by another.
    pub soft: Soft,
}

/// What a policy names as its SA's: outer source, outer destination, SPI.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Through {
    /// Outer source.
    pub src: IpAddr,
    /// Outer destination.
    pub dst: IpAddr,
    /// The SPI.
    pub spi: u32,
}

/// What one peer's objects follow from.
#[derive(Clone, Debug)]
pub struct PeerFacts {
    /// The own slot.
    pub own_slot: Slot,
    /// The own subnets.
    pub own: Subnets,
    /// The peer's slot.
    pub slot: Slot,
    /// The peer's subnets.
    pub subnets: Subnets,
    /// The SAs of this process.
    pub associations: Vec<Association>,
    /// SAs that an earlier process left and that stay.
    pub inherited: Vec<Sa>,
    /// Where data goes; `None` while the guard holds it.
    pub data: Option<Through>,
    /// Where probes go, on each carrier.
    pub probes: Vec<(Carrier, Through)>,
    /// The newest path, for the policies' templates.
    pub path: Path,
    /// The route's MTU where this peer's path takes less than the mesh MTU.
    pub mtu: Option<u32>,
    /// Whether the kernel keeps a direction on an SA (6.10 and later).
    pub directed: bool,
}

/// What one peer needs.
pub fn peer(facts: &PeerFacts) -> Objects {
    let mut objects = Objects::new();
    for association in &facts.associations {
        let sa = sa(association, facts);
        let id = SaId {
            dst: sa.dst,
            spi: sa.spi,
        };
        objects.insert(
            Key::Sa(id),
            Object::Sa {
                sa: Box::new(sa),
                born: Some(association.generation),
            },
        );
    }
    for sa in &facts.inherited {
        let id = SaId {
            dst: sa.dst,
            spi: sa.spi,
        };
        objects.entry(Key::Sa(id)).or_insert_with(|| Object::Sa {
            sa: Box::new(sa.clone()),
            born: None,
        });
    }
    let reqid = reqid(facts.slot);
    let from = incoming(facts);
    for subnet in facts.subnets.iter() {
        let any = any(subnet);
        for direction in [Direction::In, Direction::Fwd] {
            let template = Template {
                src: from.0,
                dst: from.1,
                spi: 0,
                reqid,
                optional: false,
            };
            policy(&mut objects, between(direction, subnet, any), priority::PEER, template);
        }
        if let Some(through) = facts.data {
            let template = Template {
                src: through.src,
                dst: through.dst,
                spi: through.spi,
                reqid,
                optional: false,
            };
            policy(&mut objects, data_policy(subnet), priority::PEER, template);
        }
    }
    // One family is enough for probes: the first that both have.
    let bases = facts
        .own
        .bases()
        .iter()
        .find_map(|own| Some((own, facts.subnets.bases().of_family(own)?)));
    for ((carrier, through), (own, remote)) in facts.probes.iter().zip(bases.iter().cycle()) {
        let template = Template {
            src: through.src,
            dst: through.dst,
            spi: through.spi,
            reqid,
            optional: false,
        };
        policy(
            &mut objects,
            probe_policy(*own, *remote, *carrier),
            priority::PROBE,
            template,
        );
    }
    for subnet in facts.subnets.iter() {
        if let Some(source) = facts.own.bases().of_family(subnet.addr()) {
            let route = Route {
                link: LINK.into(),
                via: None,
                source: Some(source),
                mtu: facts.mtu,
            };
            objects.insert(Key::Route(subnet), Object::Route(Box::new(route)));
        }
    }
    objects
}

/// Opens a peer's `subnets` in `objects`, which hold what ipsec has for it, to plaintext: where no policy sends its data into
/// a tunnel yet, that goes as it is, and what comes from it may come without one.
pub fn open_to_plaintext(objects: &mut Objects, subnets: &Subnets) {
    for subnet in subnets.iter() {
        let any = any(subnet);
        let inwards = [Direction::In, Direction::Fwd].map(|direction| between(direction, subnet, any));
        for id in inwards.into_iter().chain([data_policy(subnet)]) {
            match objects.get_mut(&Key::Policy(id)) {
                Some(Object::Policy(policy)) if id.direction != Direction::Out => {
                    if let Some(template) = &mut policy.template {
                        template.optional = true;
                    }
                }
                Some(_) => {}
                None => {
                    let policy = Policy {
                        id,
                        priority: priority::PLAINTEXT,
                        action: Action::Allow,
                        template: None,
                    };
                    objects.insert(Key::Policy(id), Object::Policy(Box::new(policy)));
                }
            }
        }
    }
}

/// Whether what goes to a peer's `subnet` goes unencrypted by `objects`.
pub fn sends_plaintext(objects: &Objects, subnet: IpNet) -> bool {
    let policy = objects.get(&Key::Policy(data_policy(subnet)));
    matches!(policy, Some(Object::Policy(policy)) if policy.action == Action::Allow && policy.template.is_none())
}

/// The id of the policy that carries data to a peer's subnet.
pub fn data_policy(subnet: IpNet) -> PolicyId {
    between(Direction::Out, any(subnet), subnet)
}

/// The id of the policy for the probes that go from our base address to a peer's on `carrier`.
pub fn probe_policy(own: IpAddr, remote: IpAddr, carrier: Carrier) -> PolicyId {
    let selector = Selector {
        src: own.into(),
        dst: remote.into(),
        protocol: UDP,
        sport: Some(probe::source(carrier)),
        dport: Some(probe::PORT),
        ifindex: 0,
    };
    PolicyId {
        direction: Direction::Out,
        selector,
    }
}

fn policy(objects: &mut Objects, id: PolicyId, priority: u32, template: Template) {
    let policy = Policy {
        id,
        priority,
        action: Action::Allow,
        template: Some(template),
    };
    objects.insert(Key::Policy(id), Object::Policy(Box::new(policy)));
}

/// A policy for all traffic between two ranges.
fn between(direction: Direction, src: IpNet, dst: IpNet) -> PolicyId {
    PolicyId {
        direction,
        selector: Selector::between(src, dst),
    }
}

/// IPPROTO_UDP.
const UDP: u8 = 17;

/// The outer source and destination of the `in` and `fwd` templates: the peer's address where all its SAs agree on
/// one, else any. It is the reqid that ties the peer's SAs to its subnet, so nothing is opened, and while a node
/// changes its address the SAs of both addresses are accepted.
fn incoming(facts: &PeerFacts) -> (IpAddr, IpAddr) {
    let made = facts.associations.iter().filter(|a| a.direction == Direction::In);
    let mut ends: BTreeSet<(IpAddr, IpAddr)> = made.map(|a| (a.path.remote, a.path.local)).collect();
    let left = facts
        .inherited
        .iter()
        .filter(|sa| Spi(sa.spi).parts().is_ok_and(|p| p.slot == facts.slot));
    ends.extend(left.map(|sa| (sa.src, sa.dst)));
    ends.insert((facts.path.remote, facts.path.local));
    match ends.pop_first() {
        Some(only) if ends.is_empty() => only,
        _ => match facts.path.remote {
            IpAddr::V4(_) => (Ipv4Addr::UNSPECIFIED.into(), Ipv4Addr::UNSPECIFIED.into()),
            IpAddr::V6(_) => (Ipv6Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()),
        },
    }
}

/// The SPI of a generation sent by the node at `sender` over `carrier`.
pub fn spi(sender: Slot, generation: Generation, carrier: Carrier) -> Spi {
    Spi::new(sender, generation.sender, generation.receiver).over(carrier)
}

fn sa(association: &Association, facts: &PeerFacts) -> Sa {
    let Association {
        generation,
        direction,
        cipher,
        path,
        soft,
    } = *association;
    let inward = direction == Direction::In;
    let (src, dst) = if inward {
        (path.remote, path.local)
    } else {
        (path.local, path.remote)
    };
    let sender = if inward { facts.slot } else { facts.own_slot };
    let encap = path.udp.map(|(ours, theirs)| match inward {
        true => Encap {
            sport: theirs,
            dport: ours,
        },
        false => Encap {
            sport: ours,
            dport: theirs,
        },
    });
    let directed = facts
        .directed
        .then_some(if inward { SaDirection::In } else { SaDirection::Out });
    Sa {
        src,
        dst,
        spi: spi(sender, generation, path.carrier()).0,
        reqid: reqid(facts.slot),
        algorithm: Aead {
            name: cipher.kernel_name().into(),
            key_bits: u32::try_from((cipher.key_len() + Cipher::SALT_LEN) * 8).expect("a key is short"),
            icv_bits: cipher.icv_bits(),
        },
        encap,
        // A directed sending SA has no window; the kernel refuses one.
        replay_window: if directed == Some(SaDirection::Out) {
            0
        } else {
            REPLAY_WINDOW
        },
        esn: true,
        direction: directed,
        limits: limits(soft),
        af_unspec: true,
    }
}
