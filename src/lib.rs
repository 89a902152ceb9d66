//! ringmail: an encrypted overlay network for containers. This is the map; the command is `main.rs`.
//!
//! ```text
//!  store ─────────────────── roster ─┐
//!  uplink ────────────────── uplink ─┤              plan (pure)              diff (pure)         apply
//!  psk ───────────────────────  keys ┼──▶ node ──────────────────▶ desired ─┐
//!  config ──────────────── settings ─┤     ▲                                ├──▶ ordered ops ──▶ kernel
//!  probes in ────────────────────────┘     │             kernel as read ────┘◀─────────────────────┤
//!                                          └──────────── what was made, refused, lost ◀────────────┘
//! ```
//! Inputs are latest whole values ([`tokio::sync::watch`]). [`node`] decides and does no I/O: it says what the kernel
//! should hold, named by generations, with no key in it. [`reconcile`] compares that with what the kernel holds and
//! writes the difference, makes before breaks, one scope (the node, or one peer) apart from the others. A key is derived
//! at the moment of the write and wiped after it. Stopping leaves everything in the kernel as it is.
//!
//! Words, one an idea:
//!
//! | word | what it is |
//! |---|---|
//! | lease | a node's subnets, addresses and statement, as a store holds it; not believed yet |
//! | roster | all leases |
//! | store | where leases live |
//! | statement | what a node says about itself for one epoch, authenticated with the PSK |
//! | epoch | the life of one ephemeral key of a node; its number only rises |
//! | generation | an ordered pair of epochs, the sender's and the receiver's; it names one SA |
//! | carrier | what an SA's packets travel in: plain ESP, or UDP |
//! | slot | a subnet's index in the Network |
//! | uplink | the interface that carries the mesh |
//! | desired | what the kernel should hold, from the plan |
//! | scope | whose objects: the node's, or one peer's |
//! | pass | one round of plan, compare, write |
//! | guard | what stops plaintext: policies, an unreachable route, rules at the uplink |
//! | probe | a datagram between two daemons inside the tunnel |
//! | confirmed | a generation whose reverse a probe came on: data may go on it |
//! | sweep | removing what is ours by its mark and no longer wanted |
//! | kid | the public name of a PSK |
//! | tunnel | the packet path of the `udp` backend, in user space |
//! | withdrawn | of a PSK: no longer in its file, held for peers that have nothing newer |
//!
//! Where to read first: [`epochs`] (the rules that the rest serves), [`node`], [`backend::ipsec`] (the datapath),
//! [`kernel`] and [`reconcile`], then [`daemon`], which joins them. What a lease must prove stands in [`admission`], and
//! how keys are derived in the crate [`keys`]. [`tunnel`] stands alone: it knows routes and counters, and no leases. So
//! does [`cni`], the CNI plugin, a program of its own that knows the daemon by its subnet.env. [`doctor`] asks the daemon and
//! the kernel as any operator could, and judges what they say.

pub mod admin;
pub mod admission;
pub mod audit;
pub mod backend;
pub mod carrier;
pub mod cli;
pub mod cni;
pub mod config;
pub mod daemon;
pub mod doctor;
pub mod epochs;
pub mod histogram;
pub mod kernel;
pub mod lease;
pub mod node;
pub mod packed;
pub mod probe;
pub mod psk;
pub mod reconcile;
mod repeats;
pub mod store;
#[cfg(test)]
mod testing;
pub mod tunnel;
pub mod uplink;
mod watched;
pub mod wiping;
