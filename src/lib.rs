//! Placeholder of the workspace skeleton.
pub mod config;
pub mod lease;
pub mod psk;
#[cfg(test)]
mod testing;
pub mod uplink;
