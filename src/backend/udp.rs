//! udp: each packet as it is in a UDP datagram, carried by this process ([`crate::tunnel`]). The kernel has the device and
//! a route for each peer's subnet; where a packet goes from there the tunnel decides by [`remote`].

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use super::{Site, Unserved, device, public};
use crate::kernel::device::{Device, DeviceKind};
use crate::kernel::{Key, Object, Objects, Route};
use crate::lease::Lease;

/// The device.
pub const LINK: &str = "flannel0";

/// `Backend` of net-conf.json.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Settings {
    /// The UDP port of all nodes.
    pub port: u16,
}

/// Bytes in front of an inner packet: the outer IP header, which is IPv6's where the mesh carries IPv6, and UDP's.
pub(super) fn overhead(v6: bool) -> u32 {
    if v6 { 40 + 8 } else { 20 + 8 }
}

pub(super) fn node(site: &Site<'_>) -> Objects {
    let mut objects = Objects::new();
    let mtu = site.uplink.mtu.saturating_sub(overhead(site.network.v6.is_some()));
    for own in site.own.iter() {
        device(
            &mut objects,
            LINK,
            Device::new(DeviceKind::Tun, mtu),
            Some(own.network()),
        );
    }
    objects
}

pub(super) fn peer(site: &Site<'_>, lease: &Lease, subnet: IpNet) -> Result<Objects, Unserved> {
    public(lease, subnet)?;
    let route = Route {
        link: LINK.into(),
        via: None,
        source: site.own.bases().of_family(subnet.addr()),
        mtu: None,
    };
    Ok(Objects::from([(Key::Route(subnet), Object::Route(Box::new(route)))]))
}

/// Where packets to `subnet` of a lease go.
pub fn remote(settings: &Settings, lease: &Lease, subnet: IpNet) -> Option<SocketAddr> {
    let address: IpAddr = public(lease, subnet).ok()?;
    Some(SocketAddr::new(address, settings.port))
}
