//! x
use crate::lease::Addresses;
/// x
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Uplink {
    /// x
    pub name: String,
    /// x
    pub index: u32,
    /// x
    pub mtu: u32,
    /// x
    pub local: Addresses,
    /// x
    pub public: Addresses,
}
