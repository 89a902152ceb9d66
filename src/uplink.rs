//! The uplink: the interface that carries the mesh, this node's addresses on it, and its MTU.
//!
//! [`choose`] decides from [`Facts`], by flannel's rules, without I/O; [`read`] gets the facts from the kernel and
//! [`watch`] follows them. The one thing to know: our own devices (`ringmail0`, `flannel*`, `cni*`) and addresses of the
//! mesh are no candidates unless they are named, or the mesh would come to run over itself.

mod choose;
mod kernel;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;
use regex::Regex;

pub use choose::choose;
pub use kernel::{read, watch};

use crate::lease::{Addresses, Network};

/// The interface that carries the mesh. Holds one local and one public address of each family of the mesh.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Uplink {
    /// The interface's name.
    pub name: String,
    /// The interface's index.
    pub index: u32,
    /// The largest packet that it carries, in bytes.
    pub mtu: u32,
    /// The addresses that tunnels start from; this node holds them.
    pub local: Addresses,
    /// The addresses that other nodes send to: `--public-ip` and `--public-ipv6`, else the local ones.
    pub public: Addresses,
    /// The main table's routes, longest first: which networks are on the interface's own link.
    pub routes: Vec<LinkRoute>,
}

/// A route, as far as it says what is on the uplink's link.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct LinkRoute {
    /// Where to.
    pub net: IpNet,
    /// Whether what is there is reached by the uplink without a router.
    pub direct: bool,
}

impl Uplink {
    /// Whether `address` is reached by the uplink without a router.
    pub fn on_link(&self, address: IpAddr) -> bool {
        let best = self.routes.iter().find(|route| route.net.contains(&address));
        best.is_some_and(|route| route.direct)
    }
}

/// How the operator wants the uplink to be chosen.
#[derive(Clone, Debug, Default)]
pub struct Choice {
    /// `--iface`, in their order; the first that can serve wins.
    pub ifaces: Vec<Iface>,
    /// `--iface-regex`, tried after all of `ifaces`.
    pub patterns: Vec<Regex>,
    /// `--iface-can-reach`, tried last.
    pub can_reach: Option<IpAddr>,
    /// `--public-ip` and `--public-ipv6`: advertised, and, where nothing above is given, the address to find the
    /// interface by.
    pub public: Addresses,
    /// The mesh's Network: an address in it is passed over where another can serve.
    pub mesh: Option<Network>,
}

/// An interface as `--iface` names it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Iface {
    /// By an address it holds.
    Address(IpAddr),
    /// By its name or another name of it.
    Name(String),
}

/// A text that names no interface.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("an interface's name (1 to 127 characters without space or slash) or address is needed")]
pub struct BadIface;

impl FromStr for Iface {
    type Err = BadIface;

    fn from_str(text: &str) -> Result<Self, BadIface> {
        if let Ok(address) = text.parse() {
            return Ok(Self::Address(address));
        }
        // ALTIFNAMSIZ of include/uapi/linux/if.h is 128 with the final zero.
        let good = (1..=127).contains(&text.len()) && !text.contains(|c: char| c.is_whitespace() || c == '/');
        if good {
            Ok(Self::Name(text.to_owned()))
        } else {
            Err(BadIface)
        }
    }
}

impl fmt::Display for Iface {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Name(name) => f.write_str(name),
        }
    }
}

/// The families that the mesh carries and that the uplink needs an address of.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Families {
    /// IPv4 alone.
    V4,
    /// IPv6 alone.
    V6,
    /// Both, on one interface.
    Both,
}

/// One family.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Families {
    /// The families of `network`.
    pub fn of(network: &Network) -> Self {
        match (network.v4, network.v6) {
            (Some(_), Some(_)) => Self::Both,
            (None, Some(_)) => Self::V6,
            (_, None) => Self::V4,
        }
    }

    /// One by one, IPv4 first.
    pub fn iter(self) -> impl Iterator<Item = Family> {
        let (v4, v6) = (self != Self::V6, self != Self::V4);
        v4.then_some(Family::V4).into_iter().chain(v6.then_some(Family::V6))
    }
}

impl Family {
    /// The family of `address`.
    pub fn of(address: IpAddr) -> Self {
        if address.is_ipv4() { Self::V4 } else { Self::V6 }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// What the kernel says, as far as the choice needs it.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Facts {
    /// The interfaces by index.
    pub links: BTreeMap<u32, Link>,
    /// The addresses, in the kernel's order.
    pub addresses: Vec<Address>,
    /// The other routes of the main table that are none of the mesh's.
    pub routes: Vec<FoundRoute>,
    /// The default routes of the main table.
    pub default_routes: Vec<DefaultRoute>,
    /// What `ip route get` says of [`Choice::can_reach`], or the reason why nothing.
    pub reach: Option<Result<Reach, String>>,
}

/// An interface.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Link {
    /// Its name.
    pub name: String,
    /// Its other names (`ip link property`).
    pub other_names: Vec<String>,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Whether it is administratively up. A cable that is out for a moment changes nothing here.
    pub up: bool,
    /// Whether it is the loopback device.
    pub loopback: bool,
}

/// An address that this node holds.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Address {
    /// The interface that holds it.
    pub index: u32,
    /// The node's own address, not the peer's of a point-to-point link.
    pub address: IpAddr,
    /// Whether its scope is no wider than this host.
    pub host_scope: bool,
    /// Whether it stays for good (as opposed to a lease's time).
    pub permanent: bool,
    /// Whether new connections should no longer use it.
    pub deprecated: bool,
    /// IPv6: of limited life, for privacy. IPv4: second in its subnet.
    pub temporary: bool,
    /// Whether duplicate address detection is running or has failed, so that it can't be used.
    pub unusable: bool,
}

/// A route that is not the default.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct FoundRoute {
    /// Where to.
    pub net: IpNet,
    /// The interface it leads to; none where it leads nowhere.
    pub index: Option<u32>,
    /// Whether it names a router.
    pub routed: bool,
    /// Its metric; the lowest counts.
    pub metric: u32,
}

/// A default route.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct DefaultRoute {
    /// The family it is of.
    pub family: Family,
    /// The interface it leads to.
    pub index: u32,
    /// Its metric; the lowest counts.
    pub metric: u32,
    /// The source address that it prefers.
    pub source: Option<IpAddr>,
}

/// Where packets to an address go.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Reach {
    /// The interface.
    pub index: u32,
    /// The source address that the kernel would take.
    pub source: Option<IpAddr>,
    /// Whether the address is this node's own.
    pub own: bool,
}

/// Why there is no uplink. Every text names the candidates or what is missing, and what to do.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum UplinkError {
    /// Nothing is said about the uplink, and there is no default route to find it by.
    #[error(
        "no {family} default route to find the uplink by: add one, or give --iface, --iface-regex, \
         --iface-can-reach or --public-ip (interfaces: {candidates})"
    )]
    NoDefaultRoute {
        /// The family that lacks it.
        family: Family,
        /// The interfaces and their addresses.
        candidates: String,
    },
    /// The default routes of the two families lead to different interfaces.
    #[error(
        "v6 default route interface {v6} must be the same with v4 default route interface {v4}: name the uplink \
         with --iface"
    )]
    RoutesDiffer {
        /// The IPv4 route's interface.
        v4: String,
        /// The IPv6 route's interface.
        v6: String,
    },
    /// None of the flags led to an interface that can serve.
    #[error(
        "Failed to find interface to use that matches the interfaces and/or regexes provided: {} (interfaces: \
         {candidates})", .tried.join("; ")
    )]
    NoMatch {
        /// Each flag, and why it did not.
        tried: Vec<String>,
        /// The interfaces and their addresses.
        candidates: String,
    },
    /// The interface was found but can't serve.
    #[error("{0} (interfaces: {1})")]
    Unfit(Unfit, String),
    /// The kernel can't be asked.
    #[error("the kernel's interfaces, addresses and routes can't be read: {0}")]
    Read(String),
}

/// Why an interface can't be the uplink.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Unfit {
    /// There is none of this name.
    #[error("no interface is called {0}")]
    NoSuchName(String),
    /// No interface holds the address.
    #[error("no interface with given IP found: {0}")]
    NoSuchAddress(IpAddr),
    /// It is down.
    #[error("interface {0} is down: `ip link set {0} up`, or name another with --iface")]
    Down(String),
    /// It has no usable address of a family.
    #[error("interface {name} has no usable {family} address{why}: give it one, or name another with --iface")]
    NoAddress {
        /// The interface.
        name: String,
        /// The family that the mesh needs.
        family: Family,
        /// What is wrong with the addresses that it has; starts with a space where not empty.
        why: String,
    },
    /// The expression matches nothing.
    #[error("could not match pattern {0} to any of the available network interfaces")]
    NoPatternMatch(String),
    /// The way to the address leads nowhere useful.
    #[error("{address} is not reached through an uplink: {why}")]
    Unreached {
        /// `--iface-can-reach`.
        address: IpAddr,
        /// The kernel's reason or ours.
        why: String,
    },
}
