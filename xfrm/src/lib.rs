//! The kernel's IPsec as typed values over netlink, and the netlink transport itself.
//!
//! ```text
//!  Sa, Policy ──▶ Batch ──▶ Connection ──▶ kernel ──▶ Monitor ──▶ Event
//!      ▲        (requests)     │  dump, get                        │
//!      └───────── Parsed ◀─────┘                                   └──▶ Sa, SaId, Policy, PolicyId
//! ```
//!
//! Read [`netlink`] for the transport (it serves rtnetlink and nf_tables too), [`sa`] and [`policy`] for the values,
//! [`Xfrm`] for the two together, [`event`] for notifications.
//!
//! Keys: one goes in through [`Batch::add_sa`] and none ever comes out. Dumps and notifications of the kernel carry the
//! keys of all SAs; the parsers step over them and every buffer is wiped. No type that could hold a key has `Debug`,
//! and errors hold numbers and the kernel's fixed texts only.

#![forbid(unsafe_code)]

mod address;
mod batch;
mod display;
mod error;
pub mod event;
pub mod message;
mod monitor;
pub mod netlink;
pub mod policy;
pub mod sa;
mod threshold;
#[cfg(test)]
mod wire_tests;
mod xfrm;

pub use batch::{Batch, Writer};
pub use error::{Error, KernelError};
pub use event::{Event, Events, Notification};
pub use message::MessageRef;
pub use monitor::Monitor;
pub use netlink::{Connection, Protocol};
pub use policy::{Action, Direction, ForeignPolicy, Policy, PolicyId, Selector, Template};
pub use sa::{Aead, Encap, ForeignSa, Limits, Sa, SaDirection, SaId, SaInfo};
pub use threshold::{Family, HashThreshold};
pub use xfrm::{Parsed, Xfrm};
