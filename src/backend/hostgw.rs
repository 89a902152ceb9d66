//! host-gw: each peer's subnet is routed to the peer itself, which must be on the uplink's link.

use std::net::IpAddr;

use ipnet::IpNet;

use super::{Site, Unserved, public};
use crate::kernel::{Key, Object, Objects, Route, Via};
use crate::lease::Lease;

pub(super) fn peer(site: &Site<'_>, lease: &Lease, subnet: IpNet, backend: &'static str) -> Result<Objects, Unserved> {
    let address = public(lease, subnet)?;
    if !site.uplink.on_link(address) {
        return Err(Unserved::OffLink {
            address,
            uplink: site.uplink.name.clone(),
            backend,
        });
    }
    Ok(route(site, subnet, address))
}

/// The route to `subnet` by a peer that is on the uplink's link.
pub(super) fn route(site: &Site<'_>, subnet: IpNet, gateway: IpAddr) -> Objects {
    let route = Route {
        link: site.uplink.name.clone(),
        via: Some(Via { gateway, onlink: false }),
        source: None,
        mtu: None,
    };
    Objects::from([(Key::Route(subnet), Object::Route(Box::new(route)))])
}
