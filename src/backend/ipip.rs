//! ipip: IPv4 in IPv4 (RFC 2003) by one device without a remote end; each peer's route names the peer as next hop.

use ipnet::IpNet;

use super::{Site, Unserved, device, public};
use crate::kernel::device::{Device, DeviceKind};
use crate::kernel::{Key, Object, Objects, Route, Via};
use crate::lease::Lease;

/// The device.
pub const LINK: &str = "flannel.ipip";

/// Bytes of the outer IPv4 header.
pub(super) const OVERHEAD: u32 = 20;

/// `Backend` of net-conf.json.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Settings {
    /// Whether a peer on the uplink's own link is routed to without a tunnel.
    pub direct: bool,
}

pub(super) fn node(site: &Site<'_>) -> Objects {
    let mut objects = Objects::new();
    if let (Some(own), Some(local)) = (site.own.v4, site.uplink.local.v4) {
        let mtu = site.uplink.mtu.saturating_sub(OVERHEAD);
        let ipip = Device::new(DeviceKind::Ipip { local }, mtu);
        device(&mut objects, LINK, ipip, Some(own.network().into()));
    }
    objects
}

pub(super) fn peer(settings: &Settings, site: &Site<'_>, lease: &Lease, subnet: IpNet) -> Result<Objects, Unserved> {
    if subnet.addr().is_ipv6() {
        return Err(Unserved::Family {
            backend: "ipip",
            family: "IPv6",
        });
    }
    let gateway = public(lease, subnet)?;
    if settings.direct && site.uplink.on_link(gateway) {
        return Ok(super::hostgw::route(site, subnet, gateway));
    }
    let route = Route {
        link: LINK.into(),
        via: Some(Via { gateway, onlink: true }),
        source: None,
        mtu: None,
    };
    Ok(Objects::from([(Key::Route(subnet), Object::Route(Box::new(route)))]))
}
