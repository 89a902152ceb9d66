//! Addresses as xfrm writes them: 16 bytes with the family somewhere else.

use std::net::IpAddr;

use netlink_packet_xfrm::{
    Address,
    constants::{AF_INET, AF_INET6},
};

/// The family number of an address.
pub(crate) fn family(address: IpAddr) -> u16 {
    match address {
        IpAddr::V4(_) => AF_INET,
        IpAddr::V6(_) => AF_INET6,
    }
}

/// The address of this family, `None` for a family that is neither IPv4 nor IPv6.
pub(crate) fn ip(address: &Address, family: u16) -> Option<IpAddr> {
    match family {
        AF_INET => Some(IpAddr::V4(address.to_ipv4())),
        AF_INET6 => Some(IpAddr::V6(address.to_ipv6())),
        _ => None,
    }
}
