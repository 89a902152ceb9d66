//! What happens in the kernel by someone else's hand or by itself, in the reconciler's words.
//!
//! The facts that hurt:
//! - The kernel says who caused a change of an SA, a policy or a route, but not of a link or of an IPv6 address.
//! - When a device goes down or away, its IPv4 routes go without a word. When a source address goes, the IPv4 routes
//!   that name it go without a word, and IPv6 ones lose it without a word.
//! - A removal tells the key and not whether it was ours; a replacement tells only what is there now.
//! - The queue may hold what happened before our last write.

use std::cell::RefCell;
use std::future::poll_fn;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::rc::Rc;
use std::task::{Context, Poll};

use ipnet::IpNet;
use nix::libc;
use tokio::io::unix::AsyncFd;
use tokio::io::{Interest, Ready};
use xfrm::{Error, MessageRef, Monitor, Notification, PolicyId, Protocol, SaId};

use super::ipsec::{policy_key, sa_key};
use super::link::{self, Known, is_ours};
use super::message::{Address, Link, NLM_F_REPLACE, Route};
use super::neighbour::Entry;
use super::{echo, route};
use crate::kernel::firewall::{self, Manager};
use crate::kernel::{Event, Guard, Key, Kind, Object, reqid_slot};

const ROUTE_GROUPS: [u32; 6] = [
    libc::RTNLGRP_LINK,
    libc::RTNLGRP_NEIGH,
    libc::RTNLGRP_IPV4_IFADDR,
    libc::RTNLGRP_IPV4_ROUTE,
    libc::RTNLGRP_IPV6_IFADDR,
    libc::RTNLGRP_IPV6_ROUTE,
];

/// Why the kernel can't be listened to.
#[derive(Debug, thiserror::Error)]
pub enum EventsError {
    /// A netlink socket failed.
    #[error("listen to the kernel")]
    Netlink(#[from] xfrm::Error),
    /// The packet filter's socket failed.
    #[error("listen to the packet filter")]
    Firewall(#[from] firewall::Error),
    /// The runtime refused a descriptor.
    #[error("wait for the kernel's notifications")]
    Runtime(#[source] std::io::Error),
}

/// A listener. What happened since it was opened waits in the kernel's queues, which are finite: [`Event::Overrun`]
/// says that some of it was lost.
pub struct Events {
    xfrm: AsyncFd<xfrm::Events>,
    route: AsyncFd<Monitor>,
    /// `None` where the packet filter is one that tells nobody (iptables).
    filter: Option<AsyncFd<Monitor>>,
    manager: Rc<RefCell<Manager>>,
    eyes: Eyes,
}

/// What tells our own doings from others'.
struct Eyes {
    xfrm_port: u32,
    route_port: u32,
    known: Rc<RefCell<Known>>,
}

impl Events {
    pub(super) fn open(
        xfrm_port: u32,
        route_port: u32,
        manager: Rc<RefCell<Manager>>,
        known: Rc<RefCell<Known>>,
    ) -> Result<Self, EventsError> {
        let filter = manager.borrow().monitor()?;
        let (xfrm, route) = (xfrm::Events::open()?, Monitor::open(Protocol::Route, &ROUTE_GROUPS)?);
        echo::silence_xfrm(&xfrm, xfrm_port);
        echo::silence_routes(&route, route_port);
        Ok(Self {
            xfrm: watched(xfrm)?,
            route: watched(route)?,
            filter: filter.map(watched).transpose()?,
            manager,
            eyes: Eyes {
                xfrm_port,
                route_port,
                known,
            },
        })
    }

    /// Waits for something to happen and gives all that has happened, oldest first by protocol; never nothing.
    ///
    /// Nothing is lost if it is dropped before it is done.
    pub async fn next(&mut self) -> Vec<Event> {
        loop {
            let events = self.ready();
            if !events.is_empty() {
                return events;
            }
            poll_fn(|context| self.poll_readable(context)).await;
        }
    }

    /// All that has happened so far, without waiting.
    pub fn ready(&mut self) -> Vec<Event> {
        let mut events = std::mem::take(&mut self.eyes.known.borrow_mut().pending);
        let Self {
            xfrm,
            route,
            filter,
            manager,
            eyes,
        } = self;
        drain(&mut events, |events| {
            xfrm.get_mut().read(&mut |notification| eyes.xfrm(notification, events))
        });
        drain(&mut events, |events| {
            route.get_mut().read(&mut |message| eyes.route(&message, events))
        });
        if let Some(filter) = filter {
            let manager = manager.borrow();
            drain(&mut events, |events| {
                filter.get_mut().read(&mut |message| {
                    if manager.touched(message) && !events.contains(&Event::Gone(Key::Firewall)) {
                        events.push(Event::Gone(Key::Firewall));
                    }
                })
            });
        }
        events
    }

    /// Forgets the readiness that it finds: [`Events::ready`], which empties the queues, is to be called next.
    fn poll_readable(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let mut found = Poll::Pending;
        if let Poll::Ready(result) = self.xfrm.poll_read_ready(context) {
            found = forget(result);
        }
        for monitor in [Some(&self.route), self.filter.as_ref()].into_iter().flatten() {
            if let Poll::Ready(result) = monitor.poll_read_ready(context) {
                found = forget(result);
            }
        }
        found
    }
}

fn forget<T: AsRawFd>(result: std::io::Result<tokio::io::unix::AsyncFdReadyGuard<'_, T>>) -> Poll<()> {
    if let Ok(mut guard) = result {
        guard.clear_ready_matching(Ready::ALL);
    }
    Poll::Ready(())
}

fn watched<T: AsFd + AsRawFd>(socket: T) -> Result<AsyncFd<T>, EventsError> {
    // SAFETY: the descriptor belongs to the socket, which never changes it and closes it when dropped, and the socket
    // belongs to the AsyncFd, which deregisters it first.
    let registered = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) };
    registered.map_err(|refused| EventsError::Runtime(refused.into()))
}

/// Reads a queue to its end, over every loss.
fn drain(events: &mut Vec<Event>, mut read: impl FnMut(&mut Vec<Event>) -> Result<(), Error>) {
    loop {
        match read(events) {
            Ok(()) => return,
            Err(Error::Overrun | Error::Malformed { .. } | Error::Truncated { .. }) => events.push(Event::Overrun),
            // The socket itself fails; what it would have told is lost.
            Err(_) => {
                events.push(Event::Overrun);
                return;
            }
        }
    }
}

impl Eyes {
    fn xfrm(&self, notification: Notification, events: &mut Vec<Event>) {
        let Notification { port, event } = notification;
        if port == self.xfrm_port {
            return;
        }
        match event {
            xfrm::Event::SaAdded(sa) => {
                events.extend(sa_key(&sa).map(|key| {
                    Event::Observed(
                        key,
                        Object::Sa {
                            sa: Box::new(sa),
                            born: None,
                        },
                    )
                }));
            }
            xfrm::Event::SaDeleted(id) | xfrm::Event::SaExpired { id, hard: true } if may_be_ours(&id) => {
                events.push(Event::Gone(Key::Sa(id)));
            }
            xfrm::Event::SaExpired { id, hard: false } if may_be_ours(&id) => events.push(Event::SoftLimit(id)),
            xfrm::Event::SaFlushed => events.push(Event::AllGone(Kind::Sa)),
            xfrm::Event::Mapping {
                id,
                reqid,
                new_src,
                new_port,
                ..
            } if reqid_slot(reqid).is_some() => {
                events.push(Event::Moved {
                    id,
                    source: SocketAddr::new(new_src, new_port),
                });
            }
            xfrm::Event::PolicySet(policy) => {
                let key = policy_key(&policy);
                // Whatever else of ours had this id is no longer there.
                let others = policy_keys(policy.id)
                    .into_iter()
                    .filter(|other| Some(other) != key.as_ref());
                events.extend(others.map(Event::Gone));
                events.extend(key.map(|key| Event::Observed(key, Object::Policy(Box::new(policy)))));
            }
            xfrm::Event::PolicyDeleted(id) | xfrm::Event::PolicyExpired { id, hard: true } => {
                events.extend(policy_keys(id).map(Event::Gone));
            }
            xfrm::Event::PolicyFlushed => events.extend([Kind::Policy, Kind::Guard].map(Event::AllGone)),
            xfrm::Event::SaDeleted(_)
            | xfrm::Event::SaExpired { .. }
            | xfrm::Event::Mapping { .. }
            | xfrm::Event::PolicyExpired { .. }
            | xfrm::Event::Other { .. } => {}
        }
    }

    fn route(&self, message: &MessageRef<'_>, events: &mut Vec<Event>) {
        match message.kind {
            libc::RTM_NEWROUTE | libc::RTM_DELROUTE if message.port != self.route_port => {
                if let Some(route) = Route::parse(message) {
                    self.route_changed(&route, message, events);
                }
            }
            libc::RTM_NEWNEIGH | libc::RTM_DELNEIGH => {
                if let Some(entry) = Entry::parse(message) {
                    self.entry(&entry, message, events);
                }
            }
            libc::RTM_NEWLINK => {
                if let Some(link) = Link::parse(message) {
                    self.link_is(link, events);
                }
            }
            libc::RTM_DELLINK => {
                if let Some(link) = Link::parse(message) {
                    self.link_is_gone(&link, events);
                }
            }
            libc::RTM_NEWADDR | libc::RTM_DELADDR => {
                if let Some(address) = Address::parse(message) {
                    self.address(&address, message.kind == libc::RTM_NEWADDR, events);
                }
            }
            _ => {}
        }
    }

    fn link_is(&self, link: Link, events: &mut Vec<Event>) {
        let mut known = self.known.borrow_mut();
        // Renamed: what it was called is gone.
        if let Some(before) = known
            .name(link.index)
            .filter(|before| *before != link.name)
            .map(str::to_owned)
        {
            events.extend(known.forget(&before));
        }
        if !is_ours(&link) {
            if !link.up && known.carriers.contains(&link.index) {
                events.push(Event::AllGone(Kind::Route));
            }
            return;
        }
        let held = known.held(&link.name);
        held.rising &= !link.up;
        if held.link.as_ref() == Some(&link) || held.rising || held.leaving == Some(link.index) {
            return;
        }
        let was_up = held.link.as_ref().is_some_and(|known| known.up);
        events.push(Event::Observed(Key::Link(link.name.clone()), link::object(&link)));
        if was_up && !link.up {
            events.push(Event::AllGone(Kind::Route));
        }
        held.link = Some(link);
    }

    fn link_is_gone(&self, link: &Link, events: &mut Vec<Event>) {
        let mut known = self.known.borrow_mut();
        if known.carriers.remove(&link.index) {
            events.push(Event::AllGone(Kind::Route));
        }
        known.held(&link.name).leaving.take_if(|leaving| *leaving == link.index);
        // Another index is an earlier device's: what we know was made since.
        if let Some(name) = known.name(link.index).map(str::to_owned) {
            events.extend(known.forget(&name));
        }
    }

    fn address(&self, address: &Address, there: bool, events: &mut Vec<Event>) {
        let mut known = self.known.borrow_mut();
        let Some(name) = known.name(address.index).map(str::to_owned) else {
            return;
        };
        if !address.is_whole() || address.is_link_local() {
            return;
        }
        let ip = address.net.addr();
        let held = known.held(&name);
        let key = Key::Address(name, ip);
        if there {
            if held.addresses.insert(ip) {
                events.push(Event::Observed(key, Object::Address));
            }
        } else if held.addresses.remove(&ip) {
            events.extend([Event::Gone(key), Event::AllGone(Kind::Route)]);
        }
    }

    fn entry(&self, entry: &Entry, message: &MessageRef<'_>, events: &mut Vec<Event>) {
        let mut known = self.known.borrow_mut();
        let Some(name) = known.name(entry.index()).map(str::to_owned) else {
            return;
        };
        // Of a forwarding entry the kernel does not say who caused the change.
        if matches!(entry, Entry::Neighbour { .. }) && message.port == self.route_port {
            return;
        }
        let made = message.kind == libc::RTM_NEWNEIGH;
        // Beside the device's own notification there is one that leaves the destination out (net/core/rtnetlink.c,
        // rtnl_fdb_notify).
        if made && matches!(entry, Entry::Forwarding { remote: None, .. }) {
            return;
        }
        let there = entry.object().filter(|_| made);
        match there {
            Some(object) if known.saw(entry) => events.push(Event::Observed(entry.key(&name), object)),
            None if known.lost(entry) => events.push(Event::Gone(entry.key(&name))),
            Some(_) | None => {}
        }
    }

    fn route_changed(&self, route: &Route, message: &MessageRef<'_>, events: &mut Vec<Event>) {
        let replaced = message.flags & NLM_F_REPLACE != 0;
        if !route::belongs(route, &self.known.borrow()) {
            // Put in the place of ours, perhaps.
            if message.kind == libc::RTM_NEWROUTE && replaced && route.is_in_the_way() {
                events.extend(route_keys(route.net).map(Event::Gone));
            }
            return;
        }
        let (key, object) = route::object(route, route::link_name);
        if message.kind == libc::RTM_DELROUTE {
            events.push(Event::Gone(key));
            return;
        }
        if replaced {
            events.extend(
                route_keys(route.net)
                    .into_iter()
                    .filter(|other| *other != key)
                    .map(Event::Gone),
            );
        }
        events.push(Event::Observed(key, object));
    }
}

fn route_keys(net: IpNet) -> [Key; 2] {
    [Key::Route(net), Key::GuardRoute(net)]
}

/// Every key of ours that a policy with this id can have.
fn policy_keys(id: PolicyId) -> [Key; 3] {
    let guard = |guard| Key::Guard(guard, id);
    [Key::Policy(id), guard(Guard::Block), guard(Guard::Local)]
}

/// Whether its SPI is one that we would make.
fn may_be_ours(id: &SaId) -> bool {
    keys::Spi(id.spi).parts().is_ok()
}
