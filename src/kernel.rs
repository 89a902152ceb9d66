//! The kernel as a value: what it holds of ours, what it should hold, and the ordered difference.
//!
//! Every object is keyed as the kernel indexes it ([`Key`]), and the keys stand in dependency order: making goes up
//! through `Ord`, breaking goes down. [`diff`] compares one scope's desired objects with the actual ones; [`order`]
//! lays the operations of many scopes out as one sequence, makes before breaks. Nothing here does I/O: `netlink`
//! reads and writes.

pub mod device;
pub mod encap;
pub mod firewall;
pub mod iptables;
pub mod mtu;
pub mod netlink;
pub mod nft;
mod offload;
pub mod sysctl;
pub mod xfrm_errors;

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use xfrm::{Family, PolicyId, SaId};

use crate::epochs::Generation;
use crate::lease::NodeName;
use device::{Device, Mac};
use firewall::Firewall;

/// The protocol number of every route we make (`ip route show proto 114`); none that iproute2 or a router names.
pub const ROUTE_PROTOCOL: u8 = 114;

/// The mark in the upper 12 bits of every reqid of ours; the lower 20 are the peer's slot.
pub const REQID_MARK: u32 = 0x5240_0000;

/// Priorities of our policies; the kernel takes the lowest that matches. The guard's are also how a dump tells a guard
/// policy, which has no template and so no reqid, as ours.
pub mod priority {
    /// A probe between two base addresses: above data, since it may ride another generation.
    pub const PROBE: u32 = 0x7269_0100;
    /// A peer's data.
    pub const PEER: u32 = 0x7269_0200;
    /// A peer's data in plaintext, where that is allowed: without a template, so its priority tells that it is ours.
    pub const PLAINTEXT: u32 = 0x7269_0300;
    /// Guard: what stays on the node.
    pub const LOCAL: u32 = 0x7269_0400;
    /// Guard: all the rest of the Network.
    pub const BLOCK: u32 = 0x7269_0500;
}

/// The reqid that ties a peer's policies to its SAs and to no other peer's.
pub fn reqid(peer: keys::Slot) -> u32 {
    REQID_MARK | peer.get()
}

/// The slot of the peer that a reqid of ours is about; `None` for a reqid that is not ours.
pub fn reqid_slot(reqid: u32) -> Option<keys::Slot> {
    (reqid & 0xfff0_0000 == REQID_MARK)
        .then(|| keys::Slot::new(reqid & 0x000f_ffff).ok())
        .flatten()
}

/// Which guard policy; in the order of making, so that nothing is open or shut wrongly in between.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Guard {
    /// Allows what stays on the node.
    Local,
    /// Blocks the rest of the Network.
    Block,
}

impl Guard {
    /// The priority that stands for it in the kernel.
    pub const fn priority(self) -> u32 {
        match self {
            Self::Local => priority::LOCAL,
            Self::Block => priority::BLOCK,
        }
    }

    /// The guard that `priority` stands for.
    pub fn of_priority(priority: u32) -> Option<Self> {
        [Self::Local, Self::Block]
            .into_iter()
            .find(|guard| guard.priority() == priority)
    }
}

/// What the kernel indexes an object by, in the order of making.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Key {
    /// The unreachable route of a whole range.
    GuardRoute(IpNet),
    /// A guard policy.
    Guard(Guard, PolicyId),
    /// Our firewall table or chains.
    Firewall,
    /// A sysctl: its path below /proc/sys. After the guard: forwarding opens a way.
    Sysctl(String),
    /// A network device.
    Link(String),
    /// An address of a device.
    Address(String, IpAddr),
    /// From which prefix lengths on the kernel hashes policies: before the peers' policies, which it keeps quick to find.
    HashThreshold(Family),
    /// A security association.
    Sa(SaId),
    /// A peer's policy.
    Policy(PolicyId),
    /// Which Ethernet address has this IP address behind a device.
    Neighbour(String, IpAddr),
    /// Where frames to this Ethernet address go from a device (its forwarding database).
    Fdb(String, Mac),
    /// The route to a peer's subnet.
    Route(IpNet),
}

/// The kind of a key: operations of one kind go to the kernel together.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
#[expect(missing_docs, reason = "each is the variant of Key of the same name")]
pub enum Kind {
    GuardRoute,
    Guard,
    Firewall,
    Sysctl,
    Link,
    Address,
    HashThreshold,
    Sa,
    Policy,
    Neighbour,
    Fdb,
    Route,
}

impl Key {
    /// The key's kind.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Sysctl(_) => Kind::Sysctl,
            Self::Firewall => Kind::Firewall,
            Self::GuardRoute(_) => Kind::GuardRoute,
            Self::Guard(..) => Kind::Guard,
            Self::Link(_) => Kind::Link,
            Self::Address(..) => Kind::Address,
            Self::HashThreshold(_) => Kind::HashThreshold,
            Self::Sa(_) => Kind::Sa,
            Self::Policy(_) => Kind::Policy,
            Self::Neighbour(..) => Kind::Neighbour,
            Self::Fdb(..) => Kind::Fdb,
            Self::Route(_) => Kind::Route,
        }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sysctl(path) => write!(f, "sysctl {path}"),
            Self::Firewall => f.write_str("firewall"),
            Self::GuardRoute(net) => write!(f, "guard route {net}"),
            Self::Guard(guard, id) => write!(f, "guard policy {guard:?} {id}"),
            Self::Link(name) => write!(f, "link {name}"),
            Self::Address(link, address) => write!(f, "address {address} on {link}"),
            Self::HashThreshold(family) => write!(f, "policy hash threshold {family:?}"),
            Self::Sa(id) => write!(f, "SA {id}"),
            Self::Policy(id) => write!(f, "policy {id}"),
            Self::Neighbour(link, address) => write!(f, "neighbour {address} on {link}"),
            Self::Fdb(link, mac) => write!(f, "fdb entry {mac} on {link}"),
            Self::Route(net) => write!(f, "route {net}"),
        }
    }
}

/// What a key should hold, or holds.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Object {
    /// A sysctl's value.
    Sysctl(String),
    /// The firewall's rules.
    Firewall(Box<Firewall>),
    /// A route that answers "unreachable".
    Unreachable,
    /// A policy, of the guard or of a peer.
    Policy(Box<xfrm::Policy>),
    /// A route that swallows, of the worst metric.
    Blackhole,
    /// A device.
    Link(Box<Device>),
    /// An address of a whole prefix length (/32, /128).
    Address,
    /// Policies are hashed by these leading bits of their remote end and by none of their local end.
    HashThreshold {
        /// Prefix length, bits.
        remote: u8,
    },
    /// An SA. `born` is the generation whose key it has, where this process made it; `None` as read from a dump.
    Sa {
        /// What the kernel shows of it.
        sa: Box<xfrm::Sa>,
        /// The generation that the key belongs to.
        born: Option<Generation>,
    },
    /// The permanent address of a neighbour.
    Neighbour(Mac),
    /// The permanent outer destination of a forwarding entry.
    Fdb(IpAddr),
    /// A route to a peer's subnet.
    Route(Box<Route>),
}

/// Where packets to a subnet go.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Route {
    /// The name of the device that they leave by.
    pub link: String,
    /// The next hop; none where the device itself leads to it.
    pub via: Option<Via>,
    /// The source address that the node's own traffic takes, where it is not the kernel's choice.
    pub source: Option<IpAddr>,
    /// The route's own MTU where it is below the device's, bytes.
    pub mtu: Option<u32>,
}

/// A next hop.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Via {
    /// Its address.
    pub gateway: IpAddr,
    /// Whether it is taken to be on the device's link whatever the device's addresses are.
    pub onlink: bool,
}

/// Objects by key.
pub type Objects = BTreeMap<Key, Object>;

/// Whose objects: the node's own or one peer's. The node's come first.
#[derive(Clone, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Scope {
    /// The node: guard, device, firewall.
    Node,
    /// One peer: SAs, policies, routes.
    Peer(NodeName),
    /// What is ours by its mark and wanted by nobody.
    Orphans,
}

impl fmt::Display for Scope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Node => f.write_str("node"),
            Self::Peer(name) => write!(f, "peer {name}"),
            Self::Orphans => f.write_str("orphans"),
        }
    }
}

/// One change of the kernel.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Op {
    /// Makes what is not there; fails where something of that key exists.
    Make(Key, Object),
    /// Puts another object in the place of ours.
    Change(Key, Object),
    /// Removes ours; it is no error if it is gone.
    Break(Key),
}

impl Op {
    /// The key that it is about.
    pub fn key(&self) -> &Key {
        match self {
            Self::Make(key, _) | Self::Change(key, _) | Self::Break(key) => key,
        }
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Make(key, _) => write!(f, "make {key}"),
            Self::Change(key, _) => write!(f, "change {key}"),
            Self::Break(key) => write!(f, "break {key}"),
        }
    }
}

/// What makes the kernel, of which `actual` tells, hold `desired`, and nothing of what is only `owned`; in no particular
/// order.
pub fn diff<'k, 'o>(
    desired: Objects,
    owned: impl IntoIterator<Item = &'k Key>,
    actual: impl Fn(&Key) -> Option<&'o Object>,
) -> Vec<Op> {
    let unwanted = owned
        .into_iter()
        .filter(|key| !desired.contains_key(*key) && actual(key).is_some());
    let breaks: Vec<Op> = unwanted.map(|key| Op::Break(key.clone())).collect();
    let mut ops = Vec::with_capacity(desired.len() + breaks.len());
    ops.extend(desired.into_iter().filter_map(|(key, want)| match actual(&key) {
        None => Some(Op::Make(key, want)),
        Some(have) if *have == want => None,
        Some(_) => Some(Op::Change(key, want)),
    }));
    ops.extend(breaks);
    ops
}

/// Lays the operations of several scopes out: all makes and changes going up through the keys, then all breaks going
/// down, so that no object ever names one that is not there.
pub fn order(mut ops: Vec<(Scope, Op)>) -> Vec<(Scope, Op)> {
    let rank = |op: &Op| matches!(op, Op::Break(_));
    ops.sort_by(|(_, a), (_, b)| match (rank(a), rank(b)) {
        (false, false) => a.key().cmp(b.key()),
        (true, true) => b.key().cmp(a.key()),
        (left, right) => left.cmp(&right),
    });
    ops
}

/// One operation on its way to the kernel. A made SA carries its key, which is wiped with this value; it stays here after
/// the writing only where the kernel is sure not to have used it.
#[derive(Debug)]
pub struct Write {
    /// What to do.
    pub op: Op,
    /// The key of a made SA, `None` for all else.
    pub secret: Option<keys::SaKey>,
}

/// Why a write did not happen, or may not have.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The kernel refused: nothing was changed.
    #[error("{op}")]
    Refused {
        /// What was tried.
        op: String,
        /// The kernel's answer.
        source: xfrm::KernelError,
    },
    /// Something that is not ours stands where ours should: it is left as it is.
    #[error("{op}: {found} is in the way and is not ringmail's; remove it: {remedy}")]
    Foreign {
        /// What was tried.
        op: String,
        /// What stands there.
        found: String,
        /// The command that removes it.
        remedy: String,
    },
    /// The answer was lost; what the kernel holds now must be read.
    #[error("{op}: the kernel's answer was lost")]
    Unknown {
        /// What was tried.
        op: String,
    },
    /// Something other than netlink failed: a file below /proc/sys, the firewall.
    #[error("{op}: {why}")]
    Failed {
        /// What was tried.
        op: String,
        /// What went wrong, with the remedy.
        why: String,
    },
}

/// What a notification says happened in the kernel, by someone else's hand or by itself; never an echo of our writes.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Event {
    /// An object with one of our keys holds this now.
    Observed(Key, Object),
    /// The object of this key is gone.
    Gone(Key),
    /// Every object of this kind is gone (a flush).
    AllGone(Kind),
    /// An SA reached its soft limit: it still works.
    SoftLimit(SaId),
    /// A peer's encapsulated packets come from a new address or port.
    Moved {
        /// The receiving SA.
        id: SaId,
        /// Where they come from now.
        source: std::net::SocketAddr,
    },
    /// Notifications were lost: only a dump tells.
    Overrun,
}

/// The kernel as the reconciler sees it. One implementation talks netlink, one in tests is a map that can be told to fail.
pub trait Datapath {
    /// Everything of ours in the kernel, by key.
    fn dump(&mut self) -> Result<Objects, WriteError>;

    /// Carries out operations of one kind; one result each, in order. A failed one does not stop the others. The key of a
    /// made SA is taken out of its write, unless the kernel refused it and so has never used it.
    fn apply(&mut self, kind: Kind, writes: &mut [Write]) -> Vec<Result<(), WriteError>>;

    /// False where the packet filter is one that tells nobody of changes and no longer holds what was last written. A
    /// [`Look::Glance`] costs next to nothing and misses a rule that was put in the place of another of its length.
    fn filter_stands(&mut self, look: Look) -> bool;

    /// Whether the packet filter tells of changes by itself.
    fn filter_tells(&self) -> bool;

    /// Whether the kernel answers: the smallest of requests.
    fn answers(&mut self) -> Result<(), WriteError>;

    /// How many packets each of our SAs has carried: a dump of all SAs, of which little is kept.
    fn carried(&mut self) -> Result<Vec<(SaId, u64)>, WriteError>;

    /// The counters of our SAs, by id: a dump of all SAs.
    fn counters(&mut self) -> Result<BTreeMap<SaId, Counters>, WriteError>;
}

/// How closely the packet filter is looked at.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Look {
    /// At its size; at its rules where that has changed.
    Glance,
    /// At its rules.
    Whole,
}

/// What the kernel counts of one SA.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Counters {
    /// Inner bytes.
    pub bytes: u64,
    /// Packets.
    pub packets: u64,
    /// Packets refused: failed integrity check, replayed, outside the window.
    pub errors: u64,
    /// When it was made, seconds since 1970.
    pub made: u64,
    /// When it was last used, seconds since 1970; 0 for never.
    pub used: u64,
}
