//! rtnetlink: the few fields of links, addresses and routes that are ours to write and to read.
//!
//! Written by hand because a pass reads thousands of routes of which it needs six fields, and because one transport
//! ([`xfrm::Connection`]) serves all protocols.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use nix::libc;
use xfrm::message::attributes;
use xfrm::{MessageRef, Writer};

use crate::kernel::device::Mac;

pub(super) const AF_UNSPEC: u8 = 0;
pub(super) const AF_INET: u8 = 2;
pub(super) const AF_INET6: u8 = 10;
/// Both families, IPv4 first.
pub(super) const FAMILIES: [u8; 2] = [AF_INET, AF_INET6];

pub(super) const NLM_F_REPLACE: u16 = 0x100;
pub(super) const NLM_F_EXCL: u16 = 0x200;
pub(super) const NLM_F_CREATE: u16 = 0x400;

pub(super) const IFF_UP: u32 = 0x1;
pub(super) const IFF_NOARP: u32 = 0x80;

/// The metric that the kernel gives an IPv6 route without one (include/uapi/linux/ipv6_route.h, `IP6_RT_PRIO_USER`).
const V6_METRIC: u32 = 1024;

/// The worst metric that is left to routes with a metric (ip-route(8)).
const WORST_METRIC: u32 = u32::MAX - 1;
/// include/uapi/linux/rtnetlink.h
const RTNH_F_ONLINK: u32 = 4;

/// include/uapi/linux/if_addr.h
const IFA_FLAGS: u16 = 8;
const IFA_F_NODAD: u32 = 0x02;
const IFA_F_NOPREFIXROUTE: u32 = 0x200;
/// include/uapi/linux/rtnetlink.h
const RTAX_MTU: u16 = 2;

/// A network device.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    /// What made it: "dummy", "veth"; `None` for hardware.
    pub(super) kind: Option<String>,
    pub(super) mtu: u32,
    pub(super) up: bool,
    /// Its link-layer address, where that is an Ethernet one.
    pub(super) mac: Option<Mac>,
    /// What tells one tunnel from another, of a kind that we make.
    pub(super) tunnel: Option<Tunnel>,
}

/// The settings of a tunnel, as far as they are ours to compare.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Tunnel {
    Vxlan {
        vni: u32,
        port: u16,
        local: Option<IpAddr>,
        parent: u32,
        learning: bool,
        gbp: bool,
    },
    Ipip {
        local: Option<IpAddr>,
        remote: Option<IpAddr>,
    },
}

impl Tunnel {
    /// What IFLA_INFO_DATA of a device of this kind says.
    fn parse(kind: &str, data: &[u8]) -> Option<Self> {
        match kind {
            "vxlan" => {
                let (mut vni, mut port, mut local, mut parent, mut learning, mut gbp) = (0, 0, None, 0, false, false);
                for (kind, payload) in attributes(data) {
                    match kind {
                        vxlan::ID => vni = number(payload, 0)?,
                        vxlan::PORT => port = u16::from_be_bytes(*payload.first_chunk()?),
                        vxlan::LOCAL => local = ip(AF_INET, payload),
                        vxlan::LOCAL6 => local = ip(AF_INET6, payload),
                        vxlan::LINK => parent = number(payload, 0)?,
                        vxlan::LEARNING => learning = payload.first() != Some(&0),
                        vxlan::GBP => gbp = true,
                        _ => {}
                    }
                }
                Some(Self::Vxlan {
                    vni,
                    port,
                    local,
                    parent,
                    learning,
                    gbp,
                })
            }
            "ipip" => {
                let given = |wanted| {
                    let mut all = attributes(data).filter(|(kind, _)| *kind == wanted);
                    all.next()
                        .and_then(|(_, payload)| ip(AF_INET, payload))
                        .filter(|address| !address.is_unspecified())
                };
                Some(Self::Ipip {
                    local: given(ipip::LOCAL),
                    remote: given(ipip::REMOTE),
                })
            }
            _ => None,
        }
    }
}

/// include/uapi/linux/if_link.h, `IFLA_VXLAN_*`
pub(super) mod vxlan {
    pub(in super::super) const ID: u16 = 1;
    pub(in super::super) const LINK: u16 = 3;
    pub(in super::super) const LOCAL: u16 = 4;
    pub(in super::super) const LEARNING: u16 = 7;
    pub(in super::super) const PORT: u16 = 15;
    pub(in super::super) const LOCAL6: u16 = 17;
    pub(in super::super) const GBP: u16 = 23;
}

/// include/uapi/linux/if_tunnel.h, `IFLA_IPTUN_*`
pub(super) mod ipip {
    pub(in super::super) const LOCAL: u16 = 2;
    pub(in super::super) const REMOTE: u16 = 3;
    pub(in super::super) const PMTUDISC: u16 = 10;
}

impl Link {
    /// What RTM_NEWLINK or RTM_DELLINK shows; `None` for one that is about a bridge's port and not about the device.
    pub(super) fn parse(message: &MessageRef<'_>) -> Option<Self> {
        let header = message.payload.get(..16)?;
        if header[0] != AF_UNSPEC {
            return None;
        }
        let mut link = Self {
            index: number(header, 4)?,
            name: String::new(),
            kind: None,
            mtu: 0,
            up: number(header, 8)? & IFF_UP != 0,
            mac: None,
            tunnel: None,
        };
        for (kind, payload) in attributes(&message.payload[16..]) {
            match kind {
                libc::IFLA_IFNAME => link.name = text(payload),
                libc::IFLA_MTU => link.mtu = number(payload, 0)?,
                libc::IFLA_ADDRESS => {
                    link.mac = payload
                        .first_chunk::<6>()
                        .filter(|_| payload.len() == 6)
                        .map(|m| Mac(*m));
                }
                libc::IFLA_LINKINFO => {
                    let info = |wanted| {
                        attributes(payload)
                            .find(|(kind, _)| *kind == wanted)
                            .map(|(_, data)| data)
                    };
                    link.kind = info(libc::IFLA_INFO_KIND).map(text);
                    link.tunnel = link
                        .kind
                        .as_deref()
                        .zip(info(libc::IFLA_INFO_DATA))
                        .and_then(|(kind, data)| Tunnel::parse(kind, data));
                }
                _ => {}
            }
        }
        Some(link)
    }
}

/// Writes `struct ifinfomsg`; `flags` are set, none is cleared.
pub(super) fn link_header(writer: &mut Writer<'_>, index: u32, flags: u32) {
    writer.zeros(4);
    writer.u32(index);
    writer.u32(flags);
    writer.u32(flags);
}

/// An address of a device.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Address {
    pub(super) index: u32,
    pub(super) net: IpNet,
}

impl Address {
    /// What RTM_NEWADDR or RTM_DELADDR shows.
    pub(super) fn parse(message: &MessageRef<'_>) -> Option<Self> {
        let header = message.payload.get(..8)?;
        // Of a point-to-point address IFA_ADDRESS is the other end, and IPv6 has IFA_LOCAL only then.
        let (mut local, mut address) = (None, None);
        for (kind, payload) in attributes(&message.payload[8..]) {
            match kind {
                libc::IFA_LOCAL => local = ip(header[0], payload),
                libc::IFA_ADDRESS => address = ip(header[0], payload),
                _ => {}
            }
        }
        let net = IpNet::new(local.or(address)?, header[1]).ok()?;
        Some(Self {
            index: number(header, 4)?,
            net,
        })
    }

    /// Whether its prefix is whole, as of all that we make.
    pub(super) fn is_whole(&self) -> bool {
        self.net.prefix_len() == self.net.max_prefix_len()
    }

    /// Whether it is one that a device gives itself.
    pub(super) fn is_link_local(&self) -> bool {
        match self.net.addr() {
            IpAddr::V4(v4) => v4.is_link_local(),
            IpAddr::V6(v6) => v6.is_unicast_link_local(),
        }
    }

    /// Writes `struct ifaddrmsg` and its attributes. Usable at once (no duplicate detection), without a route.
    pub(super) fn write(&self, writer: &mut Writer<'_>) {
        let address = octets(self.net.addr());
        writer.bytes(&[
            family(self.net.addr()),
            self.net.prefix_len(),
            0,
            libc::RT_SCOPE_UNIVERSE,
        ]);
        writer.u32(self.index);
        writer.attribute(libc::IFA_LOCAL, &address);
        writer.attribute(libc::IFA_ADDRESS, &address);
        writer.attribute_u32(IFA_FLAGS, IFA_F_NODAD | IFA_F_NOPREFIXROUTE);
    }
}

/// A route.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Route {
    pub(super) net: IpNet,
    /// `RTN_UNICAST`, `RTN_UNREACHABLE`, …
    pub(super) kind: u8,
    /// Who made it.
    pub(super) protocol: u8,
    pub(super) table: u32,
    pub(super) metric: u32,
    pub(super) gateway: Option<IpAddr>,
    /// Whether the gateway is taken to be on the link, whatever the device's addresses are.
    pub(super) onlink: bool,
    pub(super) link: Option<u32>,
    pub(super) source: Option<IpAddr>,
    pub(super) mtu: Option<u32>,
}

impl Route {
    /// A route of ours without a device.
    pub(super) fn ours(net: IpNet, kind: u8) -> Self {
        Self {
            net,
            kind,
            protocol: crate::kernel::ROUTE_PROTOCOL,
            table: libc::RT_TABLE_MAIN.into(),
            metric: metric(net, kind),
            gateway: None,
            onlink: false,
            link: None,
            source: None,
            mtu: None,
        }
    }

    /// Whether it bears our mark in the table that ours are in.
    pub(super) fn is_ours(&self) -> bool {
        self.protocol == crate::kernel::ROUTE_PROTOCOL && self.table == u32::from(libc::RT_TABLE_MAIN)
    }

    /// Whether it takes the place that one of ours for the same net would have.
    pub(super) fn is_in_the_way(&self) -> bool {
        let ours = [libc::RTN_UNREACHABLE, libc::RTN_BLACKHOLE].map(|kind| metric(self.net, kind));
        self.table == u32::from(libc::RT_TABLE_MAIN) && ours.contains(&self.metric)
    }

    /// What RTM_NEWROUTE or RTM_DELROUTE shows; `None` for what is no route of a table (a cached exception).
    pub(super) fn parse(message: &MessageRef<'_>) -> Option<Self> {
        let header = message.payload.get(..12)?;
        let [family, length, _, _, table, protocol, _, kind] = *header.first_chunk::<8>()?;
        if number(header, 8)? & libc::RTM_F_CLONED != 0 {
            return None;
        }
        let unspecified = match family {
            AF_INET => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            AF_INET6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
            _ => return None,
        };
        let mut route = Self {
            net: IpNet::new(unspecified, length).ok()?,
            kind,
            protocol,
            table: table.into(),
            metric: 0,
            gateway: None,
            onlink: number(header, 8)? & RTNH_F_ONLINK != 0,
            link: None,
            source: None,
            mtu: None,
        };
        for (kind, payload) in attributes(&message.payload[12..]) {
            match kind {
                libc::RTA_DST => route.net = IpNet::new(ip(family, payload)?, length).ok()?,
                libc::RTA_TABLE => route.table = number(payload, 0)?,
                libc::RTA_PRIORITY => route.metric = number(payload, 0)?,
                libc::RTA_GATEWAY => route.gateway = ip(family, payload),
                libc::RTA_OIF => route.link = number(payload, 0),
                libc::RTA_PREFSRC => route.source = ip(family, payload),
                libc::RTA_METRICS => {
                    route.mtu = attributes(payload)
                        .find(|(kind, _)| *kind == RTAX_MTU)
                        .and_then(|(_, mtu)| number(mtu, 0));
                }
                _ => {}
            }
        }
        Some(route)
    }

    /// Writes `struct rtmsg` and its attributes.
    pub(super) fn write(&self, writer: &mut Writer<'_>) {
        let on_link = self.kind == libc::RTN_UNICAST && self.net.addr().is_ipv4() && self.gateway.is_none();
        self.header(
            writer,
            if on_link {
                libc::RT_SCOPE_LINK
            } else {
                libc::RT_SCOPE_UNIVERSE
            },
        );
        if let Some(link) = self.link {
            writer.attribute_u32(libc::RTA_OIF, link);
        }
        if let Some(gateway) = self.gateway {
            writer.attribute(libc::RTA_GATEWAY, &octets(gateway));
        }
        if self.kind == libc::RTN_BLACKHOLE {
            writer.attribute_u32(libc::RTA_PRIORITY, self.metric);
        }
        if let Some(source) = self.source {
            writer.attribute(libc::RTA_PREFSRC, &octets(source));
        }
        if let Some(mtu) = self.mtu {
            writer.nested(libc::RTA_METRICS, |writer| writer.attribute_u32(RTAX_MTU, mtu));
        }
    }

    /// Writes what finds this route and no one else's: the protocol is part of it.
    pub(super) fn write_key(&self, writer: &mut Writer<'_>) {
        self.header(writer, libc::RT_SCOPE_NOWHERE);
        if let Some(link) = self.link {
            writer.attribute_u32(libc::RTA_OIF, link);
        }
    }

    fn header(&self, writer: &mut Writer<'_>, scope: u8) {
        let family = family(self.net.addr());
        writer.bytes(&[
            family,
            self.net.prefix_len(),
            0,
            0,
            libc::RT_TABLE_MAIN,
            self.protocol,
            scope,
            self.kind,
        ]);
        writer.u32(if self.onlink { RTNH_F_ONLINK } else { 0 });
        writer.attribute(libc::RTA_DST, &octets(self.net.network()));
    }
}

/// Writes the `struct rtmsg` of a dump of one family; with a protocol other than 0 the kernel leaves out all others.
pub(super) fn route_filter(writer: &mut Writer<'_>, family: u8, protocol: u8) {
    writer.bytes(&[family, 0, 0, 0, 0, protocol, 0, 0]);
    writer.u32(0);
}

/// The metric of a route of ours: the kernel's own, and of one that swallows the worst, so that a pod bridge's own route
/// goes before it.
fn metric(net: IpNet, kind: u8) -> u32 {
    match (kind, net) {
        (libc::RTN_BLACKHOLE, _) => WORST_METRIC,
        (_, IpNet::V4(_)) => 0,
        (_, IpNet::V6(_)) => V6_METRIC,
    }
}

pub(super) fn family(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => AF_INET,
        IpAddr::V6(_) => AF_INET6,
    }
}

pub(super) fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

pub(super) fn ip(family: u8, bytes: &[u8]) -> Option<IpAddr> {
    match family {
        AF_INET => Some(Ipv4Addr::from(*bytes.first_chunk::<4>()?).into()),
        AF_INET6 => Some(Ipv6Addr::from(*bytes.first_chunk::<16>()?).into()),
        _ => None,
    }
}

pub(super) fn number(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().copied().map(u32::from_ne_bytes)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim_end_matches('\0').to_owned()
}
