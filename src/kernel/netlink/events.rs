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
use std::net::{IpAddr, SocketAddr};
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
use super::{LINK, echo, route};
use crate::kernel::firewall::{self, Manager};
use crate::kernel::{Event, Guard, Key, Kind, Object, reqid_slot};

const ROUTE_GROUPS: [u32; 5] = [
    libc::RTNLGRP_LINK,
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
        let mut events = Vec::new();
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
                    route_changed(&route, message, events);
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
        if is_ours(&link) {
            known.rising &= !link.up;
            if known.link.as_ref() == Some(&link) || known.rising || known.leaving == Some(link.index) {
                return;
            }
            let was_up = known.link.as_ref().is_some_and(|known| known.up);
            events.push(Event::Observed(Key::Link(link.name.clone()), link::object(&link)));
            if was_up && !link.up {
                events.push(Event::AllGone(Kind::Route));
            }
            known.link = Some(link);
        } else if known.link.as_ref().is_some_and(|known| known.index == link.index) {
            // Renamed.
            forget_link(&mut known, events);
        }
    }

    fn link_is_gone(&self, link: &Link, events: &mut Vec<Event>) {
        let mut known = self.known.borrow_mut();
        known.leaving.take_if(|leaving| *leaving == link.index);
        // Another index is an earlier device's: what we know was made since.
        if known.link.as_ref().is_some_and(|known| known.index == link.index) {
            forget_link(&mut known, events);
        }
    }

    fn address(&self, address: &Address, there: bool, events: &mut Vec<Event>) {
        let mut known = self.known.borrow_mut();
        if known.link.as_ref().is_none_or(|link| link.index != address.index) || !address.is_whole() {
            return;
        }
        let ip = address.net.addr();
        let key = Key::Address(LINK.into(), ip);
        if there {
            if !is_link_local(ip) && known.addresses.insert(ip) {
                events.push(Event::Observed(key, Object::Address));
            }
        } else if known.addresses.remove(&ip) {
            events.extend([Event::Gone(key), Event::AllGone(Kind::Route)]);
        }
    }
}

/// The device is away, and all that hung on it.
fn forget_link(known: &mut Known, events: &mut Vec<Event>) {
    let Known {
        link,
        addresses,
        rising: _,
        leaving: _,
    } = std::mem::take(known);
    let Some(link) = link else { return };
    events.push(Event::AllGone(Kind::Route));
    events.extend(
        addresses
            .into_iter()
            .map(|address| Event::Gone(Key::Address(link.name.clone(), address))),
    );
    events.push(Event::Gone(Key::Link(link.name)));
}

fn route_changed(route: &Route, message: &MessageRef<'_>, events: &mut Vec<Event>) {
    let replaced = message.flags & NLM_F_REPLACE != 0;
    if !route.is_ours() {
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

fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}
