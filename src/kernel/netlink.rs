//! The real [`Datapath`]: reads what is ours in the kernel and carries operations out.
//!
//! ```text
//!              ┌─ ipsec ─────▶ NETLINK_XFRM       SAs, policies, counters, preflight
//!  Netlink ────┼─ route, link ▶ NETLINK_ROUTE     routes, the mesh device, its addresses
//!     │        ├─ firewall ──▶ nf_tables or iptables
//!     │        └─ sysctl ────▶ /proc/sys
//!     └─ Events ◀───────────── notifications of the first three
//! ```
//!
//! What is ours is told by its mark alone ([`reqid_slot`], [`ROUTE_PROTOCOL`], the priority of a guard policy, name and
//! kind of the mesh device). Nothing else is shown, changed or removed; where it stands in the way it is named.
//!
//! Order matters to the reader of both: open [`Netlink::events`] first, dump then; take what [`Events::ready`] gives
//! before trusting a dump made after it. A [`Event::Gone`] may name what never was ours (a notification of a removal
//! does not tell), and may be older than our last write: making again what is there is no error, except for an SA.
//! Take a dump whole: of the mesh device and its addresses, events after it tell what differs from it.

mod echo;
mod events;
mod ipsec;
mod link;
mod message;
mod neighbour;
mod preflight;
mod route;

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use xfrm::{Connection, KernelError, Protocol, SaId, Xfrm};

use super::firewall::{self, Firewall, Manager};
use super::offload;
use super::sysctl::Sysctl;
use super::{Counters, Datapath, Key, Kind, Look, Object, Objects, Op, Write, WriteError};
#[cfg(doc)]
use super::{Event, ROUTE_PROTOCOL, reqid_slot};

pub use events::{Events, EventsError};
pub use preflight::{Features, PreflightError};

/// The name of the mesh device.
pub const LINK: &str = "ringmail0";

/// How to open the datapath.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Options {
    /// Program the packet filter with nf_tables where both it and iptables work; otherwise with iptables.
    pub prefer_nft: bool,
}

/// Why the kernel can't be talked to.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// We may not program the kernel's network.
    #[error("CAP_NET_ADMIN is missing: run as root or grant it")]
    Capability,
    /// No socket for IPsec.
    #[error("talk to the kernel's IPsec: where this kernel lacks it, load it with `modprobe xfrm_user`")]
    Xfrm(#[source] xfrm::Error),
    /// No socket for links and routes.
    #[error("talk to the kernel's routing")]
    Route(#[source] xfrm::Error),
    /// No packet filter.
    #[error("talk to the kernel's packet filter")]
    Firewall(#[source] firewall::Error),
}

/// The kernel of the network namespace in which it was opened. Used by the thread that opened it.
///
/// Dropping it leaves everything in the kernel as it is.
pub struct Netlink {
    xfrm: Xfrm,
    route: Connection,
    firewall: Rc<RefCell<Manager>>,
    /// The rules that were last applied: the kernel's own form of them can't be read back into a [`Firewall`].
    rules: Option<Firewall>,
    sysctls: BTreeSet<String>,
    known: Rc<RefCell<link::Known>>,
    sinks: &'static [link::Sink],
    /// Whether checksums must be kept from VXLAN devices; see [`offload`].
    spoils_checksums: bool,
}

impl Netlink {
    /// Opens the sockets; changes nothing.
    pub fn open(options: &Options) -> Result<Self, OpenError> {
        let Options { prefer_nft } = options;
        if !may_administrate() {
            return Err(OpenError::Capability);
        }
        Ok(Self {
            xfrm: Xfrm::open().map_err(OpenError::Xfrm)?,
            route: Connection::open(Protocol::Route).map_err(OpenError::Route)?,
            firewall: Rc::new(RefCell::new(Manager::open(*prefer_nft).map_err(OpenError::Firewall)?)),
            rules: None,
            sysctls: BTreeSet::new(),
            known: Rc::default(),
            sinks: &link::Sink::ALL,
            spoils_checksums: Sysctl::new("kernel/osrelease", "")
                .read()
                .is_ok_and(|release| offload::spoils_checksums(&release)),
        })
    }

    /// Starts listening. Must be called within a tokio runtime; before the first dump, so that nothing is missed.
    pub fn events(&self) -> Result<Events, EventsError> {
        Events::open(
            self.xfrm.port(),
            self.route.port(),
            Rc::clone(&self.firewall),
            Rc::clone(&self.known),
        )
    }

    /// Adds to the sysctls that a dump shows: paths below /proc/sys with slashes. Those that were written are shown
    /// without this.
    pub fn watch_sysctls(&mut self, paths: impl IntoIterator<Item = String>) {
        self.sysctls.extend(paths);
    }

    /// What the packet filter's guard has dropped.
    pub fn dropped(&mut self) -> Result<firewall::Counters, firewall::Error> {
        self.firewall.borrow_mut().counters()
    }

    /// The command that sets that back.
    pub fn dropped_reset(&self) -> String {
        self.firewall.borrow().reset()
    }

    fn dump_firewall(&mut self) -> Result<Option<Object>, WriteError> {
        let Some(rules) = &self.rules else { return Ok(None) };
        let held = self.firewall.borrow_mut().verify(rules);
        let held = held.map_err(|error| failed("read the packet filter", &error))?;
        Ok(held.then(|| Object::Firewall(Box::new(rules.clone()))))
    }

    fn apply_firewall(&mut self, op: &Op) -> Result<(), WriteError> {
        let mut manager = self.firewall.borrow_mut();
        let rules = match op {
            Op::Make(_, Object::Firewall(rules)) | Op::Change(_, Object::Firewall(rules)) => rules,
            Op::Break(_) => {
                self.rules = None;
                return manager.remove().map_err(|error| failed(op, &error));
            }
            Op::Make(..) | Op::Change(..) => return Err(misfit(op)),
        };
        let prefers = rules.prefers_nft();
        let first = self.rules.as_ref().is_none_or(|rules| rules.prefers_nft() != prefers);
        if first && !manager.is_preferred(prefers) {
            *manager = Manager::open(prefers).map_err(|error| failed(op, &error))?;
            if !manager.is_preferred(prefers) {
                let (wanted, used) = if prefers {
                    ("nf_tables", "iptables")
                } else {
                    ("iptables", "nf_tables")
                };
                tracing::info!("{wanted} can't be used here: {used} holds the packet filter");
            }
        }
        manager.apply(rules).map_err(|error| failed(op, &error))?;
        // What the other manager holds, of an earlier run or of other settings, would go on acting beside ours.
        if first && let Err(error) = manager.remove_other() {
            // The next pass tries again: without rules on record it makes these anew.
            self.rules = None;
            return Err(failed(op, &error));
        }
        self.rules = Some(Firewall::clone(rules));
        Ok(())
    }

    fn apply_link(&mut self, op: &Op) -> Result<(), WriteError> {
        link::apply(&mut self.route, self.sinks, &self.known, op)?;
        match op {
            Op::Make(Key::Link(name), Object::Link(device)) | Op::Change(Key::Link(name), Object::Link(device))
                if self.spoils_checksums && device.leaves_checksums() =>
            {
                offload::turn_off(name).map_err(|error| failed(op, &error))
            }
            _ => Ok(()),
        }
    }

    fn apply_sysctl(&mut self, op: &Op) -> Result<(), WriteError> {
        let (path, value) = match op {
            Op::Make(Key::Sysctl(path), Object::Sysctl(value))
            | Op::Change(Key::Sysctl(path), Object::Sysctl(value)) => (path, value),
            // No one knows what it was before, or who else relies on it by now.
            Op::Break(_) => return Ok(()),
            Op::Make(..) | Op::Change(..) => return Err(misfit(op)),
        };
        self.sysctls.insert(path.clone());
        Sysctl::new(path, value)
            .write()
            .map(drop)
            .map_err(|error| failed(op, &error))
    }
}

impl Datapath for Netlink {
    /// Everything of ours. Sysctls: those written or watched, as far as they can be read. The firewall: if it is still
    /// exactly as this process wrote it; one that an earlier process left is not shown, and is to be written anew.
    fn dump(&mut self) -> Result<Objects, WriteError> {
        let mut objects = Objects::new();
        for path in &self.sysctls {
            if let Ok(value) = Sysctl::new(path, "").read() {
                objects.insert(Key::Sysctl(path.clone()), Object::Sysctl(value));
            }
        }
        objects.extend(self.dump_firewall()?.map(|firewall| (Key::Firewall, firewall)));
        link::dump(&mut self.route, &self.known, &mut objects)?;
        if self.spoils_checksums {
            for (key, object) in &mut objects {
                if let (Key::Link(name), Object::Link(device)) = (key, object) {
                    device.sound = !device.leaves_checksums() || !offload::is_on(name).unwrap_or(false);
                }
            }
        }
        route::dump(&mut self.route, &self.known, &mut objects)?;
        neighbour::dump(&mut self.route, &self.known, &mut objects)?;
        ipsec::dump(&mut self.xfrm, &mut objects)?;
        Ok(objects)
    }

    fn apply(&mut self, kind: Kind, writes: &mut [Write]) -> Vec<Result<(), WriteError>> {
        match kind {
            Kind::Sysctl => each(writes, |op| self.apply_sysctl(op)),
            Kind::Firewall => each(writes, |op| self.apply_firewall(op)),
            Kind::Link => each(writes, |op| self.apply_link(op)),
            Kind::Address => each(writes, |op| link::apply_address(&mut self.route, &self.known, op)),
            Kind::GuardRoute | Kind::Route => route::apply(&mut self.route, &self.known, writes),
            Kind::Neighbour | Kind::Fdb => neighbour::apply(&mut self.route, &self.known, writes),
            Kind::Guard | Kind::Policy => ipsec::apply_policies(&mut self.xfrm, writes),
            Kind::HashThreshold => each(writes, |op| ipsec::apply_threshold(&mut self.xfrm, op)),
            Kind::Sa => ipsec::apply_sas(&mut self.xfrm, writes),
        }
    }

    fn filter_stands(&mut self, look: Look) -> bool {
        let Some(rules) = &self.rules else { return true };
        let mut manager = self.firewall.borrow_mut();
        let suspect = match &mut *manager {
            Manager::Nft(_) => false,
            Manager::Iptables(iptables) => look == Look::Whole || iptables.may_differ(),
        };
        // A filter that can't be read is left alone: the write would fail too.
        !suspect || manager.verify(rules).unwrap_or(true)
    }

    fn filter_tells(&self) -> bool {
        matches!(&*self.firewall.borrow(), Manager::Nft(_))
    }

    fn answers(&mut self) -> Result<(), WriteError> {
        ipsec::answers(&mut self.xfrm)
    }

    fn carried(&mut self) -> Result<Vec<(SaId, u64)>, WriteError> {
        ipsec::carried(&mut self.xfrm)
    }

    fn counters(&mut self) -> Result<BTreeMap<SaId, Counters>, WriteError> {
        ipsec::counters(&mut self.xfrm)
    }
}

/// Whether this thread has CAP_NET_ADMIN; true where /proc does not tell.
fn may_administrate() -> bool {
    /// include/uapi/linux/capability.h
    const CAP_NET_ADMIN: u32 = 12;
    let status = std::fs::read_to_string("/proc/thread-self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    effective.is_none_or(|mask| mask & (1 << CAP_NET_ADMIN) != 0)
}

/// One operation after the other.
fn each(writes: &[Write], apply: impl FnMut(&Op) -> Result<(), WriteError>) -> Vec<Result<(), WriteError>> {
    writes.iter().map(|write| &write.op).map(apply).collect()
}

/// What became of a write, from what became of its request.
fn outcome(op: &Op, error: xfrm::Error) -> WriteError {
    let op = op.to_string();
    match error {
        xfrm::Error::Kernel(source) => WriteError::Refused { op, source },
        // Nothing was sent, for want of memory as a rule: as sure a refusal as the kernel's own.
        xfrm::Error::Send(errno) => WriteError::Refused {
            op,
            source: kernel_error(errno),
        },
        // The request was on its way when the answer failed to come.
        xfrm::Error::Unknown | xfrm::Error::Timeout | xfrm::Error::Receive(_) | xfrm::Error::Truncated { .. } => {
            WriteError::Unknown { op }
        }
        other => failed(op, &other),
    }
}

/// Why a reading failed; nothing was changed by it.
fn unread(what: &str, error: xfrm::Error) -> WriteError {
    match error {
        xfrm::Error::Kernel(source) => WriteError::Refused {
            op: format!("read {what}"),
            source,
        },
        other => failed(format_args!("read {what}"), &other),
    }
}

/// A failure without an errno of a request.
fn failed(op: impl ToString, error: &dyn std::error::Error) -> WriteError {
    WriteError::Failed {
        op: op.to_string(),
        why: chain(error),
    }
}

/// An error and its causes in one line.
fn chain(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        line = format!("{line}: {error}");
        cause = error.source();
    }
    line
}

/// An operation whose key and object don't belong together: a mistake of the planner's, told and not carried out.
fn misfit(op: &Op) -> WriteError {
    WriteError::Failed {
        op: op.to_string(),
        why: "the object is not of the key's kind".into(),
    }
}

/// Removing what is gone is success.
fn gone_is_done(result: Result<(), xfrm::Error>) -> Result<(), xfrm::Error> {
    match result {
        Err(error) if error.is_gone() => Ok(()),
        other => other,
    }
}

/// A refusal in the kernel's form, where we look before the kernel does.
fn kernel_error(errno: nix::errno::Errno) -> KernelError {
    KernelError {
        errno: errno as i32,
        text: None,
    }
}

#[cfg(test)]
mod tests;
