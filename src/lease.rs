//! Leases: which node holds which subnet, at which addresses, and what it says of itself.
//!
//! A [`Lease`] is what a store holds of a node, as the store holds it: nothing in it is believed yet. The [`Roster`]
//! is all of them, published whole, with a log of revisions so that a reader finds what changed since it last looked
//! at a cost that does not grow with the number of nodes. The [`Network`] turns subnets into slots and back.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::{Bound, RangeInclusive};
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use keys::Slot;
use serde::{Deserialize, Serialize};

use crate::packed::{MANY, pack};

mod data;

pub use data::BackendData;

/// A node's name: 1 to 253 printable ASCII characters without space or slash. Cheap to clone.
#[derive(Clone, Debug, Deserialize, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(try_from = "String", into = "String")]
pub struct NodeName(Arc<str>);

/// A text that can't be a node's name.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[error("node name {0:?}: 1 to 253 printable ASCII characters without space or slash are needed")]
pub struct BadNodeName(String);

impl NodeName {
    /// Checks `name`; see the type for the rule.
    pub fn new(name: &str) -> Result<Self, BadNodeName> {
        let good = (1..=253).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_graphic() && b != b'/');
        if good {
            Ok(Self(name.into()))
        } else {
            Err(BadNodeName(name.chars().take(64).collect()))
        }
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl TryFrom<String> for NodeName {
    type Error = BadNodeName;
    fn try_from(name: String) -> Result<Self, BadNodeName> {
        Self::new(&name)
    }
}

impl From<NodeName> for String {
    fn from(name: NodeName) -> Self {
        name.0.as_ref().into()
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The subnets of a lease, one a family at most.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Subnets {
    /// The IPv4 subnet, host bits zero.
    pub v4: Option<Ipv4Net>,
    /// The IPv6 subnet, host bits zero.
    pub v6: Option<Ipv6Net>,
}

impl Subnets {
    /// The subnets there are, IPv4 first.
    pub fn iter(&self) -> impl Iterator<Item = IpNet> + use<> {
        self.v4.map(IpNet::V4).into_iter().chain(self.v6.map(IpNet::V6))
    }

    /// Each subnet's base address (10.244.1.0 of 10.244.1.0/24): the node's own address in the mesh.
    pub fn bases(&self) -> Addresses {
        Addresses {
            v4: self.v4.map(|n| n.network()),
            v6: self.v6.map(|n| n.network()),
        }
    }
}

impl FromIterator<IpNet> for Subnets {
    /// The last of each family wins.
    fn from_iter<I: IntoIterator<Item = IpNet>>(nets: I) -> Self {
        nets.into_iter().fold(Self::default(), |subnets, net| match net {
            IpNet::V4(v4) => Self {
                v4: Some(v4),
                ..subnets
            },
            IpNet::V6(v6) => Self {
                v6: Some(v6),
                ..subnets
            },
        })
    }
}

impl fmt::Display for Subnets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        join(f, self.iter())
    }
}

/// Addresses, one a family at most.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd, Serialize)]
pub struct Addresses {
    /// The IPv4 address.
    pub v4: Option<Ipv4Addr>,
    /// The IPv6 address.
    pub v6: Option<Ipv6Addr>,
}

impl Addresses {
    /// The addresses there are, IPv4 first.
    pub fn iter(&self) -> impl Iterator<Item = IpAddr> + use<> {
        self.v4.map(IpAddr::V4).into_iter().chain(self.v6.map(IpAddr::V6))
    }

    /// The address of the family that `like` is of.
    pub fn of_family(&self, like: IpAddr) -> Option<IpAddr> {
        match like {
            IpAddr::V4(_) => self.v4.map(IpAddr::V4),
            IpAddr::V6(_) => self.v6.map(IpAddr::V6),
        }
    }
}

impl FromIterator<IpAddr> for Addresses {
    /// The last of each family wins.
    fn from_iter<I: IntoIterator<Item = IpAddr>>(addresses: I) -> Self {
        addresses
            .into_iter()
            .fold(Self::default(), |all, address| match address {
                IpAddr::V4(v4) => Self { v4: Some(v4), ..all },
                IpAddr::V6(v6) => Self { v6: Some(v6), ..all },
            })
    }
}

impl fmt::Display for Addresses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        join(f, self.iter())
    }
}

fn join<T: fmt::Display>(f: &mut fmt::Formatter<'_>, items: impl Iterator<Item = T>) -> fmt::Result {
    for (i, item) in items.enumerate() {
        if i > 0 {
            f.write_str(" ")?;
        }
        write!(f, "{item}")?;
    }
    Ok(())
}

/// A lease as a store holds it; nothing in it is verified.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Lease {
    /// Whose lease this is.
    pub node: NodeName,
    /// The subnets it holds.
    pub subnets: Subnets,
    /// The addresses that other nodes reach it at.
    pub public: Addresses,
    /// flannel's `BackendType`: `ipsec`, `vxlan`, `host-gw`, …; empty where flannel leaves it so.
    pub backend: String,
    /// flannel's `BackendData`: for `ipsec` the statement and its tags, else what the backend publishes.
    pub data: BackendData,
    /// flannel's `BackendV6Data`.
    pub v6_data: BackendData,
}

/// When a lease last changed: rises with every change of a roster, starts at 1.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Revision(u64);

/// Whether a roster shows all that its store holds.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub enum Completeness {
    /// The first snapshot is still coming: an absent node may exist.
    #[default]
    Partial,
    /// An absent node holds no lease.
    Complete,
}

/// All leases of a store, as one value.
///
/// [`Roster::since`] lists the nodes that changed after a revision in the order of their last change, so a reader that
/// remembers [`Roster::revision`] works through the changes alone. A node that left stays in the log, without a lease,
/// until as many nodes have left as a roster remembers ([`FORGET_AFTER`]).
#[derive(Clone, Debug, Default)]
pub struct Roster {
    nodes: BTreeMap<NodeName, (Revision, Option<Arc<Lease>>)>,
    log: BTreeMap<Revision, NodeName>,
    rejected: BTreeMap<String, String>,
    left: usize,
    forgotten: Revision,
    revision: Revision,
    /// Whether the roster shows all that the store holds.
    pub completeness: Completeness,
}

/// How many departed nodes a roster remembers before it forgets them all at once.
pub const FORGET_AFTER: usize = 1024;

impl Roster {
    /// The revision of the newest change.
    pub fn revision(&self) -> Revision {
        self.revision
    }

    /// The lease of `node`.
    pub fn get(&self, node: &NodeName) -> Option<&Arc<Lease>> {
        self.nodes.get(node)?.1.as_ref()
    }

    /// Every lease, by node name.
    pub fn leases(&self) -> impl Iterator<Item = &Arc<Lease>> {
        self.nodes.values().filter_map(|(_, lease)| lease.as_ref())
    }

    /// What the store holds that is no lease, each with the reason: key or file name → why.
    pub fn rejected(&self) -> &BTreeMap<String, String> {
        &self.rejected
    }

    /// Replaces the list of what is no lease. Returns whether it was another.
    pub fn set_rejected(&mut self, rejected: BTreeMap<String, String>) -> bool {
        let differs = self.rejected != rejected;
        self.rejected = rejected;
        differs
    }

    /// Puts `lease` in; false and no new revision where it is there already.
    pub fn insert(&mut self, lease: Lease) -> bool {
        if self.get(&lease.node).is_some_and(|held| **held == lease) {
            return false;
        }
        let node = lease.node.clone();
        self.record(node, Some(Arc::new(lease)));
        true
    }

    /// Takes the lease of `node` out; false where there was none.
    pub fn remove(&mut self, node: &NodeName) -> bool {
        if self.get(node).is_none() {
            return false;
        }
        self.record(node.clone(), None);
        true
    }

    /// Makes the roster hold just `leases`, complete; only what differs gets a new revision. Returns whether any did.
    pub fn replace(&mut self, leases: impl IntoIterator<Item = Lease>) -> bool {
        let mut gone: std::collections::BTreeSet<NodeName> = self.leases().map(|l| l.node.clone()).collect();
        let mut changed = self.completeness == Completeness::Partial;
        let before = self.revision;
        for lease in leases {
            gone.remove(&lease.node);
            changed |= self.insert(lease);
        }
        for node in gone {
            changed |= self.remove(&node);
        }
        self.completeness = Completeness::Complete;
        if self.revision.0 - before.0 >= MANY as u64 {
            self.pack();
        }
        changed
    }

    /// The nodes that changed after `seen`, oldest change first, each with its lease or `None` where it left.
    ///
    /// `Err` where the log no longer reaches back to `seen`: read [`Roster::leases`] and take who is absent as gone.
    pub fn since(
        &self,
        seen: Revision,
    ) -> Result<impl Iterator<Item = (&NodeName, Option<&Arc<Lease>>)>, LogForgotten> {
        if seen < self.forgotten {
            return Err(LogForgotten);
        }
        let changed = self
            .log
            .range((Bound::Excluded(seen), Bound::Unbounded))
            .map(|(_, node)| node);
        Ok(changed.map(|node| (node, self.get(node))))
    }

    /// Gives up the room that many changes left empty.
    pub fn pack(&mut self) {
        pack(&mut self.nodes);
        pack(&mut self.log);
    }

    fn record(&mut self, node: NodeName, lease: Option<Arc<Lease>>) {
        self.revision.0 += 1;
        let leaves = lease.is_none();
        match self.nodes.insert(node.clone(), (self.revision, lease)) {
            Some((before, held)) => {
                self.log.remove(&before);
                self.left -= usize::from(held.is_none());
            }
            None => debug_assert!(!leaves, "only a node that is there leaves"),
        }
        self.log.insert(self.revision, node);
        self.left += usize::from(leaves);
        if self.left > FORGET_AFTER {
            self.nodes.retain(|_, (_, lease)| lease.is_some());
            let nodes = &self.nodes;
            self.log.retain(|_, node| nodes.contains_key(node));
            self.left = 0;
            self.forgotten = self.revision;
        }
    }
}

/// The roster's log does not reach back that far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogForgotten;

/// One family's address range and how it is cut into subnets.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Range<N> {
    /// The whole range, host bits zero.
    pub net: N,
    /// The prefix length of each subnet.
    pub subnet_len: u8,
    /// The first slot that is given out.
    pub first: u32,
    /// The last slot that is given out.
    pub last: u32,
}

/// The address ranges of the mesh. At least one family is there.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Network {
    /// The IPv4 range.
    pub v4: Option<Range<Ipv4Net>>,
    /// The IPv6 range.
    pub v6: Option<Range<Ipv6Net>>,
}

/// Why subnets have no slot in a network.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
pub enum NoSlot {
    /// A family of the network has no subnet, or the other way round.
    #[error("subnets {0}: one subnet for each family of the Network is needed")]
    Families(Subnets),
    /// The subnet lies outside.
    #[error("subnet {0} is not in the Network")]
    Outside(IpNet),
    /// The subnet has another size.
    #[error("subnet {0} is not a /{1}, the Network's SubnetLen")]
    Length(IpNet, u8),
    /// The slot is above what an SPI can name.
    #[error("subnet {0} has too high an index in the Network: at most {max} subnets can be told apart", max = Slot::MAX.get())]
    TooHigh(IpNet),
}

impl Network {
    /// The ranges, IPv4 first.
    pub fn nets(&self) -> impl Iterator<Item = IpNet> + use<> {
        let v4 = self.v4.map(|r| IpNet::V4(r.net));
        v4.into_iter().chain(self.v6.map(|r| IpNet::V6(r.net)))
    }

    /// The range that `subnet` is of.
    pub fn net_of(&self, subnet: IpNet) -> Option<IpNet> {
        self.nets().find(|net| net.contains(&subnet))
    }

    /// The slot of `subnets`: the IPv4 subnet's index in the IPv4 range, or the IPv6 one's where there is no IPv4.
    pub fn slot(&self, subnets: &Subnets) -> Result<Slot, NoSlot> {
        if (self.v4.is_some(), self.v6.is_some()) != (subnets.v4.is_some(), subnets.v6.is_some()) {
            return Err(NoSlot::Families(*subnets));
        }
        let v6 = match (self.v6, subnets.v6) {
            (Some(range), Some(subnet)) => {
                let bits = |net: Ipv6Net| u128::from(net.network());
                let index = bits(subnet).wrapping_sub(bits(range.net)) >> (128 - u32::from(range.subnet_len)).min(127);
                let inside = range.net.contains(&subnet);
                Some(index_of(
                    subnet.into(),
                    inside,
                    range.subnet_len,
                    u64::try_from(index).unwrap_or(u64::MAX),
                ))
            }
            _ => None,
        };
        let v4 = match (self.v4, subnets.v4) {
            (Some(range), Some(subnet)) => {
                let bits = |net: Ipv4Net| u32::from(net.network());
                let index = bits(subnet).wrapping_sub(bits(range.net)) >> (32 - u32::from(range.subnet_len)).min(31);
                Some(index_of(
                    subnet.into(),
                    range.net.contains(&subnet),
                    range.subnet_len,
                    u64::from(index),
                ))
            }
            _ => None,
        };
        match (v4, v6) {
            (Some(v4), Some(v6)) => {
                // The IPv6 subnet needs no slot of its own, only to be a right one.
                if let Err(wrong @ (NoSlot::Outside(_) | NoSlot::Length(..))) = v6 {
                    return Err(wrong);
                }
                v4
            }
            (Some(one), None) | (None, Some(one)) => one,
            (None, None) => Err(NoSlot::Families(*subnets)),
        }
    }

    /// The subnets at `slot`, or `None` where a family has not so many.
    pub fn subnets(&self, slot: Slot) -> Option<Subnets> {
        let slot = slot.get();
        let v4 = match self.v4 {
            Some(r) => {
                let offset = u64::from(slot) << (32 - u32::from(r.subnet_len));
                let base = u64::from(u32::from(r.net.network())) + offset;
                let subnet = Ipv4Net::new(Ipv4Addr::from(u32::try_from(base).ok()?), r.subnet_len).ok()?;
                Some(r.net.contains(&subnet).then_some(subnet)?)
            }
            None => None,
        };
        let v6 = match self.v6 {
            Some(r) => {
                let offset = match u128::from(slot) {
                    0 => 0,
                    // A shift of the slot itself would lose its high bits and name a low slot's subnet.
                    slot => 1_u128.checked_shl(128 - u32::from(r.subnet_len))?.checked_mul(slot)?,
                };
                let base = u128::from(r.net.network()).checked_add(offset)?;
                let subnet = Ipv6Net::new(Ipv6Addr::from(base), r.subnet_len).ok()?;
                Some(r.net.contains(&subnet).then_some(subnet)?)
            }
            None => None,
        };
        Some(Subnets { v4, v6 })
    }

    /// The slots that are given out to nodes: those that every family gives out.
    pub fn slots(&self) -> RangeInclusive<u32> {
        let max = Slot::MAX.get();
        let v4 = self.v4.map_or(0..=max, |r| r.first..=r.last);
        let v6 = self.v6.map_or(0..=max, |r| r.first..=r.last);
        *v4.start().max(v6.start())..=*v4.end().min(v6.end()).min(&max)
    }
}

fn index_of(subnet: IpNet, inside: bool, len: u8, index: u64) -> Result<Slot, NoSlot> {
    if !inside {
        return Err(NoSlot::Outside(subnet));
    }
    if subnet.prefix_len() != len {
        return Err(NoSlot::Length(subnet, len));
    }
    u32::try_from(index)
        .ok()
        .and_then(|i| Slot::new(i).ok())
        .ok_or(NoSlot::TooHigh(subnet))
}

impl fmt::Display for Network {
    /// The canonical text that goes into key derivation: the ranges, IPv4 first, separated by a comma.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, net) in self.nets().enumerate() {
            write!(f, "{}{net}", if i > 0 { "," } else { "" })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {

    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn lease(node: u16, data: u8) -> Lease {
        Lease {
            node: NodeName::new(&format!("n{node}")).unwrap(),
            subnets: Subnets::default(),
            public: Addresses::default(),
            backend: String::new(),
            data: serde_json::Value::from(data).into(),
            v6_data: BackendData::NULL,
        }
    }

    #[derive(Clone, Debug)]
    enum Change {
        Insert(u16, u8),
        Remove(u16),
        /// Enough come and go for the log to be cut.
        Crowd,
        Replace(BTreeSet<u16>),
        /// The reader at this index looks.
        Look(usize),
    }

    fn change() -> impl Strategy<Value = Change> {
        prop_oneof![
            8 => (0..12_u16, 0..3_u8).prop_map(|(node, data)| Change::Insert(node, data)),
            4 => (0..12_u16).prop_map(Change::Remove),
            1 => Just(Change::Crowd),
            1 => proptest::collection::btree_set(0..12_u16, 0..12).prop_map(Change::Replace),
            8 => (0..3_usize).prop_map(Change::Look),
        ]
    }

    type View = BTreeMap<NodeName, Arc<Lease>>;

    fn all(roster: &Roster) -> View {
        roster
            .leases()
            .map(|lease| (lease.node.clone(), lease.clone()))
            .collect()
    }

    fn look(roster: &Roster, seen: &mut Revision, view: &mut View) {
        match roster.since(*seen) {
            Ok(changes) => {
                for (node, lease) in changes {
                    match lease {
                        Some(lease) => view.insert(node.clone(), lease.clone()),
                        None => view.remove(node),
                    };
                }
            }
            Err(LogForgotten) => *view = all(roster),
        }
        *seen = roster.revision();
    }

    proptest! {
        #[test]
        fn who_follows_the_changes_sees_what_who_reads_all_sees(
            changes in proptest::collection::vec(change(), 0..60),
        ) {
            let mut roster = Roster::default();
            let mut readers: [(Revision, View); 3] = Default::default();
            for change in changes {
                let (before, revision) = (all(&roster), roster.revision());
                match change {
                    Change::Insert(node, data) => { roster.insert(lease(node, data)); }
                    Change::Remove(node) => { roster.remove(&lease(node, 0).node); }
                    Change::Crowd => for node in 1000..1000 + u16::try_from(FORGET_AFTER).unwrap() {
                        roster.insert(lease(node, 0));
                        roster.remove(&lease(node, 0).node);
                    },
                    Change::Replace(nodes) => { roster.replace(nodes.into_iter().map(|node| lease(node, 9))); }
                    Change::Look(reader) => {
                        let (seen, view) = &mut readers[reader];
                        look(&roster, seen, view);
                        prop_assert_eq!(&*view, &all(&roster));
                        prop_assert_eq!(roster.since(*seen).map(Iterator::count), Ok(0));
                    }
                }
                prop_assert!(before == all(&roster) || revision < roster.revision());
            }
            for (seen, view) in &mut readers {
                look(&roster, seen, view);
                prop_assert_eq!(&*view, &all(&roster));
            }
        }
    }

    #[test]
    fn what_changes_nothing_is_no_change() {
        let mut roster = Roster::default();
        assert!(roster.insert(lease(1, 1)) && roster.replace([lease(1, 1)]));
        let revision = roster.revision();
        assert!(!roster.insert(lease(1, 1)));
        assert!(!roster.remove(&lease(2, 0).node));
        assert!(!roster.replace([lease(1, 1)]));
        assert_eq!(roster.revision(), revision);
    }

    #[test]
    fn a_roster_forgets_departed_nodes_and_says_so_to_who_missed_them() {
        let mut roster = Roster::default();
        let seen = roster.revision();
        for node in 0..u16::try_from(FORGET_AFTER + 1).unwrap() {
            assert!(roster.since(seen).is_ok());
            roster.insert(lease(node, 0));
            roster.remove(&lease(node, 0).node);
        }
        assert_eq!(roster.since(seen).map(Iterator::count), Err(LogForgotten));
        assert_eq!((roster.nodes.len(), roster.log.len(), roster.left), (0, 0, 0));
        assert_eq!(roster.since(roster.revision()).map(Iterator::count), Ok(0));
    }

    #[test]
    fn a_node_name_is_printable_ascii_without_space_and_slash() {
        for good in ["a", "node-1.example", "NODE", &"x".repeat(253)] {
            assert_eq!(NodeName::new(good).unwrap().as_str(), good);
        }
        for bad in ["", "a b", "a/b", "a\n", "é", "\u{1b}", &"x".repeat(254)] {
            assert!(NodeName::new(bad).is_err(), "{bad:?}");
        }
    }

    /// A network of one family from its parts; every slot is given out.
    fn v4(address: u32, prefix: u8, subnet_len: u8) -> Network {
        let net = Ipv4Net::new(address.into(), prefix).unwrap().trunc();
        let last = last_slot(subnet_len - prefix);
        Network {
            v4: Some(Range {
                net,
                subnet_len,
                first: 0,
                last,
            }),
            v6: None,
        }
    }

    fn v6(address: u128, prefix: u8, subnet_len: u8) -> Network {
        let net = Ipv6Net::new(address.into(), prefix).unwrap().trunc();
        let last = last_slot(subnet_len - prefix);
        Network {
            v4: None,
            v6: Some(Range {
                net,
                subnet_len,
                first: 0,
                last,
            }),
        }
    }

    fn last_slot(bits: u8) -> u32 {
        (2_u32.checked_pow(bits.into()).unwrap_or(u32::MAX).saturating_sub(1)).min(Slot::MAX.get())
    }

    fn any_v4() -> impl Strategy<Value = Network> {
        (any::<u32>(), 0..=32_u8, 0..=32_u8).prop_map(|(a, x, y)| v4(a, x.min(y), x.max(y)))
    }

    fn any_v6() -> impl Strategy<Value = Network> {
        (any::<u128>(), 0..=128_u8, 0..=128_u8).prop_map(|(a, x, y)| v6(a, x.min(y), x.max(y)))
    }

    fn any_network() -> impl Strategy<Value = Network> {
        let dual = (any_v4(), any_v6()).prop_map(|(a, b)| Network { v4: a.v4, v6: b.v6 });
        prop_oneof![any_v4(), any_v6(), dual]
    }

    proptest! {
        #[test]
        fn a_slot_and_its_subnets_name_each_other(network in any_network(), random: u32) {
            let slots = network.slots();
            prop_assert!(!slots.is_empty());
            for index in [*slots.start(), *slots.end(), random % (slots.end() + 1)] {
                let slot = Slot::new(index).unwrap();
                let subnets = network.subnets(slot);
                prop_assert!(subnets.is_some(), "{index}");
                let subnets = subnets.unwrap();
                prop_assert_eq!(network.slot(&subnets), Ok(slot));
                for subnet in subnets.iter() {
                    prop_assert_eq!(subnet, subnet.trunc());
                    prop_assert!(network.net_of(subnet).is_some());
                }
            }
        }

        #[test]
        fn beyond_the_last_slot_there_are_no_subnets(network in any_network(), random: u32) {
            let last = *network.slots().end();
            prop_assume!(last < Slot::MAX.get());
            let beyond = [last + 1, Slot::MAX.get(), last + 1 + random % (Slot::MAX.get() - last)];
            for index in beyond {
                prop_assert_eq!(network.subnets(Slot::new(index).unwrap()), None);
            }
        }

        #[test]
        fn subnets_that_have_a_slot_are_in_the_network_and_of_its_length(
            network in any_network(),
            a: u32, a_len in 0..=32_u8, b: u128, b_len in 0..=128_u8,
        ) {
            let subnets = Subnets {
                v4: network.v4.map(|_| Ipv4Net::new(a.into(), a_len).unwrap().trunc()),
                v6: network.v6.map(|_| Ipv6Net::new(b.into(), b_len).unwrap().trunc()),
            };
            let fits = |subnet: IpNet| {
                let len = match subnet {
                    IpNet::V4(_) => network.v4.unwrap().subnet_len,
                    IpNet::V6(_) => network.v6.unwrap().subnet_len,
                };
                subnet.prefix_len() == len && network.net_of(subnet).is_some()
            };
            match network.slot(&subnets) {
                Ok(_) | Err(NoSlot::TooHigh(_)) => prop_assert!(subnets.iter().all(fits)),
                Err(NoSlot::Outside(subnet)) => prop_assert_eq!(network.net_of(subnet), None),
                Err(NoSlot::Length(subnet, _)) => prop_assert!(!fits(subnet)),
                Err(NoSlot::Families(_)) => prop_assert!(false, "one subnet for each family is given"),
            }
        }
    }

    #[test]
    fn odd_networks_count_their_subnets_right() {
        let text = |network: Network, slot| network.subnets(Slot::new(slot).unwrap()).map(|s| s.to_string());
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(text(v4(0, 0, 0), 0), some("0.0.0.0/0"));
        assert_eq!(text(v4(0, 0, 0), 1), None);
        assert_eq!(text(v4(0x0af4_0000, 28, 30), 3), some("10.244.0.12/30"));
        assert_eq!(text(v4(0xffff_ff00, 24, 30), 63), some("255.255.255.252/30"));
        assert_eq!(text(v4(0xffff_ff00, 24, 30), 64), None);
        assert_eq!(text(v6(0, 0, 0), 0), some("::/0"));
        assert_eq!(text(v6(0, 0, 0), 1), None);
        assert_eq!(text(v6(0xfd << 120, 124, 126), 3), some("fd00::c/126"));
        assert_eq!(text(v6(0, 0, 8), 255), some("ff00::/8"));
        assert_eq!(text(v6(0, 0, 8), 256), None);
        assert_eq!(text(v6(u128::MAX, 64, 128), 5), some("ffff:ffff:ffff:ffff::5/128"));
        let slots = Network {
            v6: v6(0xfd << 120, 124, 126).v6,
            ..v4(0x0af4_0000, 16, 24)
        }
        .slots();
        assert_eq!(slots, 0..=3, "the smaller family bounds both");
    }

    #[test]
    fn subnets_of_the_wrong_families_have_no_slot() {
        let network = v4(0x0af4_0000, 16, 24);
        let v6 = Subnets {
            v4: None,
            v6: Some("fd00::/64".parse().unwrap()),
        };
        let both = Subnets {
            v4: Some("10.244.1.0/24".parse().unwrap()),
            ..v6
        };
        for subnets in [v6, both, Subnets::default()] {
            assert_eq!(network.slot(&subnets), Err(NoSlot::Families(subnets)));
        }
    }
}
