//! Placeholder of the workspace skeleton.
pub mod lease;
pub mod store;
