//! What this node asks of its kernel.

pub mod encap;
pub mod firewall;
pub mod iptables;
pub mod nft;
pub mod sysctl;
