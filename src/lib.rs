//! Placeholder of the workspace skeleton.
pub mod config;
pub mod lease;
pub mod psk;
pub mod uplink;
