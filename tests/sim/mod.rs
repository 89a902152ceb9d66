//! What the tests of the pure half share: a kernel that is a map, packets through it, a mesh of real nodes on it.
//!
//! ```text
//!   kernel   SimKernel: objects with the kernel's rules, faults on demand, a look after every operation
//!   packet   what becomes of a packet, given only the objects that are there
//!   make     networks, settings, uplinks, PSKs
//!   broken   rules broken on purpose
//!   chaos    all that can happen to it, in an order that a seed tells
//!   mesh     N real reconcilers, a store, a wire, one clock
//!   rest     what it comes to when events stop
//!   watch    what must hold on every node, after every operation
//!   text     objects and operations in the words of `ip`
//! ```
#![allow(dead_code, reason = "each test binary uses its part")]

pub(crate) mod broken;
pub(crate) mod chaos;
pub(crate) mod kernel;
pub(crate) mod make;
pub(crate) mod mesh;
pub(crate) mod packet;
pub(crate) mod rest;
pub(crate) mod text;
pub(crate) mod watch;
