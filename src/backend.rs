//! Backends: what a node needs and what a peer needs in the kernel, as pure functions.

pub mod ipsec;
