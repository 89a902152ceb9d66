//! Placeholder of the workspace skeleton.
pub mod admin;
pub mod admission;
pub mod audit;
pub mod backend;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod epochs;
pub mod kernel;
pub mod lease;
pub mod node;
pub mod probe;
pub mod psk;
pub mod reconcile;
pub mod store;
#[cfg(test)]
mod testing;
pub mod uplink;
