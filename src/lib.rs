//! Placeholder of the workspace skeleton.
pub mod kernel;
pub mod lease;
