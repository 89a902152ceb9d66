//! x
use crate::lease::{Addresses, Subnets};
use ipnet::IpNet;
/// x
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Firewall {
    /// x
    pub networks: Vec<IpNet>,
    /// x
    pub own: Subnets,
    /// x
    pub bases: Addresses,
    /// x
    pub uplink: String,
    /// x
    pub masquerade: bool,
    /// x
    pub random_fully: bool,
}
