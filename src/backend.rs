//! Backends: what a node needs and what a peer needs in the kernel, as pure functions.
//!
//! [`ipsec`] stands apart, because its objects follow from epochs. The unencrypted ones are [`Plain`]: each follows from
//! this node's [`Site`] and from a peer's lease alone, and none is encrypted.

pub mod extension;
pub mod hostgw;
pub mod ipip;
pub mod ipsec;
#[cfg(test)]
mod tests;
pub mod udp;
pub mod vxlan;

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::Value;

use crate::kernel::device::{Device, Mac};
use crate::kernel::firewall::Firewall;
use crate::kernel::{Key, Object, Objects};
use crate::lease::{Lease, Network, NodeName, Subnets};
use crate::uplink::Uplink;

/// An unencrypted backend and its settings.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Plain {
    /// Ethernet frames in UDP, by the kernel.
    Vxlan(vxlan::Settings),
    /// Routes to the nodes themselves.
    HostGw,
    /// IPv4 in IPv4, by the kernel.
    Ipip(ipip::Settings),
    /// Packets in UDP, by this process.
    Udp(udp::Settings),
    /// Leases alone.
    Alloc,
    /// The operator's own commands.
    Extension(extension::Commands),
}

/// What an unencrypted backend's objects follow from on this node.
#[derive(Clone, Copy, Debug)]
pub struct Site<'a> {
    /// This node's name.
    pub name: &'a NodeName,
    /// The mesh's ranges.
    pub network: &'a Network,
    /// The own subnets.
    pub own: Subnets,
    /// The interface that carries the mesh.
    pub uplink: &'a Uplink,
    /// The addresses of VXLAN devices that an earlier process left: for IPv4, for IPv6.
    pub macs: Macs,
}

/// The Ethernet addresses of the two VXLAN devices.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Macs {
    /// Of the one that carries IPv4.
    pub v4: Option<Mac>,
    /// Of the one that carries IPv6.
    pub v6: Option<Mac>,
}

/// What a peer needs, and what could not be done for it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Served {
    /// The objects.
    pub objects: Objects,
    /// Why a subnet of it is left out; the last such reason.
    pub lacks: Option<Unserved>,
}

/// Why a peer's subnet is not served.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Unserved {
    /// A subnet, and no more.
    #[error("it has taken a subnet and said nothing yet: its daemon is starting, or stopped before it began")]
    Silent,
    /// Another backend.
    #[error("backend type is {theirs:?}; this node's is {ours:?}: give all nodes the same Backend")]
    OtherBackend {
        /// Its type.
        theirs: String,
        /// This node's.
        ours: &'static str,
    },
    /// Nowhere to send to.
    #[error("its lease has no public {family} address, which its subnet {subnet} needs")]
    NoPublic {
        /// "IPv4" or "IPv6".
        family: &'static str,
        /// The subnet.
        subnet: IpNet,
    },
    /// No way without a router.
    #[error(
        "its address {address} is not on the link of {uplink}: {backend} needs all nodes in one network; use vxlan or ipsec, \
         which do not"
    )]
    OffLink {
        /// Its public address.
        address: IpAddr,
        /// The uplink's name.
        uplink: String,
        /// This backend.
        backend: &'static str,
    },
    /// Not what a VXLAN lease says.
    #[error("{field} of its lease has no VtepMAC and VNI: {why}")]
    NoVtep {
        /// `BackendData` or `BackendV6Data`.
        field: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// Another virtual network.
    #[error("its VNI is {theirs}, this node's {ours}: give all nodes the same Backend")]
    OtherVni {
        /// Its VNI.
        theirs: u32,
        /// This node's.
        ours: u32,
    },
    /// A lease of this node's own.
    #[error("it is at this node's own address {0}: an earlier lease of this node")]
    Own(IpAddr),
    /// A subnet of a family, or a place, that this mesh has not.
    #[error("its subnet {0} is not in this node's Network: make net-conf.json the same")]
    Outside(IpNet),
    /// Two leases of one subnet.
    #[error("its subnet {subnet} is also leased to {}: remove one of the leases", .others.join(", "))]
    Claimed {
        /// The subnet.
        subnet: IpNet,
        /// Who else holds it.
        others: Vec<String>,
    },
    /// It can't be carried.
    #[error("backend {backend} carries no {family}")]
    Family {
        /// This backend.
        backend: &'static str,
        /// "IPv4" or "IPv6".
        family: &'static str,
    },
}

impl Plain {
    /// Its name in net-conf.json.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Vxlan(_) => "vxlan",
            Self::HostGw => "host-gw",
            Self::Ipip(_) => "ipip",
            Self::Udp(_) => "udp",
            Self::Alloc => "alloc",
            Self::Extension(_) => "extension",
        }
    }

    /// Its `BackendType` in a lease, which flannel leaves empty for some.
    pub const fn lease_type(&self) -> &'static str {
        match self {
            Self::Udp(_) | Self::Alloc => "",
            _ => self.name(),
        }
    }

    /// Whether a pod's packet may cross the uplink as it is.
    pub const fn is_bare(&self) -> bool {
        match self {
            Self::HostGw => true,
            Self::Vxlan(settings) => settings.direct,
            Self::Ipip(settings) => settings.direct,
            Self::Udp(_) | Self::Alloc | Self::Extension(_) => false,
        }
    }

    /// The largest inner packet, bytes.
    pub fn mtu(&self, network: &Network, uplink: &Uplink) -> u32 {
        let v6 = network.v6.is_some();
        let less = match self {
            Self::Vxlan(settings) => return settings.mtu(uplink, v6),
            Self::Ipip(_) => ipip::OVERHEAD,
            Self::Udp(_) => udp::overhead(v6),
            Self::HostGw | Self::Alloc | Self::Extension(_) => 0,
        };
        uplink.mtu.saturating_sub(less)
    }

    /// `BackendData` and `BackendV6Data` of this node's lease.
    pub fn data(&self, site: &Site<'_>) -> (Value, Value) {
        match self {
            Self::Vxlan(settings) => vxlan::data(settings, site),
            Self::HostGw | Self::Ipip(_) | Self::Udp(_) | Self::Alloc | Self::Extension(_) => {
                (Value::Null, Value::Null)
            }
        }
    }

    /// The devices that the node needs, and their addresses.
    pub fn node(&self, site: &Site<'_>) -> Objects {
        match self {
            Self::Vxlan(settings) => vxlan::node(settings, site),
            Self::Ipip(_) => ipip::node(site),
            Self::Udp(_) => udp::node(site),
            Self::HostGw | Self::Alloc | Self::Extension(_) => Objects::new(),
        }
    }

    /// What the node of `lease` needs.
    pub fn peer(&self, site: &Site<'_>, lease: &Lease) -> Served {
        let mut served = Served::default();
        if lease.backend.is_empty() && lease.data.is_null() && !self.lease_type().is_empty() {
            served.lacks = Some(Unserved::Silent);
            return served;
        }
        // flannel leaves some types out of a lease; one that says such a type means it.
        if lease.backend != self.lease_type() && lease.backend != self.name() {
            served.lacks = Some(Unserved::OtherBackend {
                theirs: lease.backend.chars().take(32).collect(),
                ours: self.name(),
            });
            return served;
        }
        for subnet in lease.subnets.iter() {
            if site.network.net_of(subnet).is_none() {
                served.lacks = Some(Unserved::Outside(subnet));
                continue;
            }
            let objects = match self {
                Self::Vxlan(settings) => vxlan::peer(settings, site, lease, subnet),
                Self::HostGw => hostgw::peer(site, lease, subnet, self.name()),
                Self::Ipip(settings) => ipip::peer(settings, site, lease, subnet),
                Self::Udp(_) => udp::peer(site, lease, subnet),
                Self::Alloc | Self::Extension(_) => Ok(Objects::new()),
            };
            match objects {
                Ok(objects) => served.objects.extend(objects),
                Err(why) => served.lacks = Some(why),
            }
        }
        served
    }
}

/// Traffic rules that all unencrypted backends share.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Rules {
    /// Whether pods' traffic to the outside takes the node's address.
    pub masquerade: bool,
    /// Whether masquerading picks random ports.
    pub random_fully: bool,
    /// Whether forwarded packets of the mesh are accepted.
    pub forward: bool,
    /// Whether what no pod of this node takes is swallowed.
    pub blackhole: bool,
    /// Whether nf_tables programs the rules, where the kernel can.
    pub nft: bool,
}

/// What every unencrypted mesh needs on the node: forwarding, and rules for what passes.
pub fn common(site: &Site<'_>, rules: &Rules) -> Objects {
    let mut objects = Objects::new();
    let forwarding = [
        (site.network.v4.is_some(), "net/ipv4/ip_forward"),
        (site.network.v6.is_some(), "net/ipv6/conf/all/forwarding"),
    ];
    for (_, path) in forwarding.into_iter().filter(|(on, _)| *on) {
        objects.insert(Key::Sysctl(path.into()), Object::Sysctl("1".into()));
    }
    let Rules {
        masquerade,
        random_fully,
        forward,
        blackhole,
        nft,
    } = *rules;
    let networks = site.network.nets().collect();
    let firewall = Firewall::plain(networks, site.own, masquerade, random_fully, forward).by_nft(nft);
    objects.insert(Key::Firewall, Object::Firewall(Box::new(firewall)));
    if blackhole {
        objects.extend(site.own.iter().map(|own| (Key::GuardRoute(own), Object::Blackhole)));
    }
    objects
}

/// A device and the base address of the own subnet of the family that `like` is of.
fn device(objects: &mut Objects, name: &str, device: Device, address: Option<IpAddr>) {
    objects.insert(Key::Link(name.into()), Object::Link(Box::new(device)));
    objects.extend(address.map(|address| (Key::Address(name.into(), address), Object::Address)));
}

/// The public address that packets to `subnet` of a lease go to.
fn public(lease: &Lease, subnet: IpNet) -> Result<IpAddr, Unserved> {
    lease.public.of_family(subnet.addr()).ok_or_else(|| Unserved::NoPublic {
        family: family(subnet),
        subnet,
    })
}

fn family(subnet: IpNet) -> &'static str {
    match subnet {
        IpNet::V4(_) => "IPv4",
        IpNet::V6(_) => "IPv6",
    }
}
