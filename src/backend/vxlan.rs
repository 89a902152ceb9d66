//! VXLAN (RFC 7348), in flannel's form: a device a family, and for each peer a permanent neighbour, a permanent
//! forwarding entry and an onlink route, so that nothing is ever asked for or learned.

use std::net::IpAddr;

use ipnet::IpNet;
use ring::digest;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Site, Unserved, device, public};
use crate::kernel::device::{Device, DeviceKind, Mac, Vxlan};
use crate::kernel::{Key, Object, Objects, Route, Via};
use crate::lease::{BackendData, Lease};
use crate::uplink::Uplink;

/// What stands before the VNI in the name of the device that carries IPv4.
pub const PREFIX: &str = "flannel.";
/// The same of the one that carries IPv6.
pub const PREFIX_V6: &str = "flannel-v6.";

/// The kernel's own default port; the one that IANA gave VXLAN is 4789.
pub const PORT: u16 = 8472;

/// Bytes in front of an inner packet: outer IPv4, UDP, VXLAN and the inner Ethernet header.
const OVERHEAD_V4: u32 = 20 + 8 + 8 + 14;
/// The same with outer IPv6.
const OVERHEAD_V6: u32 = 40 + 8 + 8 + 14;

/// `Backend` of net-conf.json.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Settings {
    /// The network identifier, 1 to 2^24 - 1.
    pub vni: u32,
    /// The UDP port.
    pub port: u16,
    /// The MTU of the outer packets where it is not the uplink's, bytes.
    pub outer_mtu: Option<u32>,
    /// The group policy extension.
    pub gbp: bool,
    /// Whether the devices learn.
    pub learning: bool,
    /// Whether a peer on the uplink's own link is routed to without VXLAN.
    pub direct: bool,
}

impl Default for Settings {
    /// flannel's.
    fn default() -> Self {
        Self {
            vni: 1,
            port: PORT,
            outer_mtu: None,
            gbp: false,
            learning: false,
            direct: false,
        }
    }
}

impl Settings {
    /// The largest inner packet, bytes. In a dual-stack mesh that is IPv6's: a pod has one MTU for both.
    pub fn mtu(&self, uplink: &Uplink, v6: bool) -> u32 {
        let overhead = if v6 { OVERHEAD_V6 } else { OVERHEAD_V4 };
        self.outer_mtu.unwrap_or(uplink.mtu).saturating_sub(overhead)
    }

    /// The name of the device that carries the family of `like`: 15 characters at most.
    pub fn link(&self, like: IpAddr) -> String {
        let prefix = if like.is_ipv4() { PREFIX } else { PREFIX_V6 };
        format!("{prefix}{}", self.vni)
    }
}

/// flannel's `BackendData`.
#[derive(Debug, Deserialize, Serialize)]
struct Data {
    #[serde(rename = "VNI")]
    vni: u32,
    #[serde(rename = "VtepMAC")]
    mac: String,
}

/// `BackendData` and `BackendV6Data`.
pub(super) fn data(settings: &Settings, site: &Site<'_>) -> (Value, Value) {
    let of = |net: Option<IpNet>| {
        net.map_or(Value::Null, |net| {
            let data = Data {
                vni: settings.vni,
                mac: mac(settings, site, net).to_string(),
            };
            serde_json::to_value(data).expect("a number and a text become JSON")
        })
    };
    (of(site.own.v4.map(IpNet::V4)), of(site.own.v6.map(IpNet::V6)))
}

/// The address of the own device for the family of `own`. The one that an earlier process left, so that the peers'
/// entries stay right while they have not heard of another; else one that follows from the node's name, which it has
/// again after a reboot.
fn mac(settings: &Settings, site: &Site<'_>, own: IpNet) -> Mac {
    let (left, family) = match own {
        IpNet::V4(_) => (site.macs.v4, 4),
        IpNet::V6(_) => (site.macs.v6, 6),
    };
    left.filter(Mac::is_unicast).unwrap_or_else(|| {
        let text = format!(
            "ringmail vxlan {family} {} {} {}",
            settings.vni, site.network, site.name
        );
        let digest = digest::digest(&digest::SHA256, text.as_bytes());
        Mac::local(*digest.as_ref().first_chunk().expect("SHA-256 has 32 bytes"))
    })
}

/// The address that a lease's `BackendData` gives, without a look at the VNI.
pub fn vtep(data: &BackendData) -> Option<(u32, Mac)> {
    let data = data.read::<Data>().ok()?;
    Some((data.vni, data.mac.parse().ok()?))
}

pub(super) fn node(settings: &Settings, site: &Site<'_>) -> Objects {
    let mut objects = Objects::new();
    for own in site.own.iter() {
        let Some(local) = site.uplink.local.of_family(own.addr()) else {
            continue;
        };
        let kind = DeviceKind::Vxlan(Vxlan {
            vni: settings.vni,
            port: settings.port,
            local,
            parent: site.uplink.index,
            learning: settings.learning,
            gbp: settings.gbp,
            mac: mac(settings, site, own),
        });
        let mtu = settings.mtu(site.uplink, own.addr().is_ipv6());
        device(
            &mut objects,
            &settings.link(own.addr()),
            Device::new(kind, mtu),
            Some(own.network()),
        );
    }
    objects
}

pub(super) fn peer(settings: &Settings, site: &Site<'_>, lease: &Lease, subnet: IpNet) -> Result<Objects, Unserved> {
    let remote = public(lease, subnet)?;
    if settings.direct && site.uplink.on_link(remote) {
        return Ok(super::hostgw::route(site, subnet, remote));
    }
    let (field, data) = match subnet {
        IpNet::V4(_) => ("BackendData", &lease.data),
        IpNet::V6(_) => ("BackendV6Data", &lease.v6_data),
    };
    let unread = |why: String| Unserved::NoVtep { field, why };
    let data = data.read::<Data>().map_err(|error| unread(error.to_string()))?;
    let mac: Mac = data.mac.parse().map_err(|error| unread(format!("VtepMAC: {error}")))?;
    if !mac.is_unicast() {
        return Err(unread(format!("VtepMAC {mac} is not one device's")));
    }
    if data.vni != settings.vni {
        return Err(Unserved::OtherVni {
            theirs: data.vni,
            ours: settings.vni,
        });
    }
    let link = settings.link(subnet.addr());
    let gateway = subnet.network();
    let route = Route {
        link: link.clone(),
        via: Some(Via { gateway, onlink: true }),
        source: None,
        mtu: None,
    };
    Ok(Objects::from([
        (Key::Neighbour(link.clone(), gateway), Object::Neighbour(mac)),
        (Key::Fdb(link, mac), Object::Fdb(remote)),
        (Key::Route(subnet), Object::Route(Box::new(route))),
    ]))
}
