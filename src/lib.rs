//! Placeholder of the workspace skeleton.
pub mod epochs;
pub mod kernel;
pub mod lease;
