//! The facts, read from the kernel over rtnetlink and followed by its notifications.
//!
//! A notification carries no facts here, it only says when to read again, so that one that is lost costs nothing but
//! the next one. Routes are looked at only where they can matter: a mesh changes thousands that lead to its own device.

use std::net::IpAddr;
use std::time::Duration;

use futures_util::{StreamExt as _, TryStreamExt as _};
use ipnet::IpNet;
use netlink_packet_core::{NetlinkMessage, NetlinkPayload};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage, Prop};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteType};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::{Handle, MulticastGroup, new_connection, new_multicast_connection};
use tokio::sync::watch as channel;
use tokio::time::sleep;

use super::choose::is_ours;
use super::{
    Address, Choice, DefaultRoute, Facts, Families, Family, FoundRoute, Link, Reach, Uplink, UplinkError, choose,
};
use crate::kernel::ROUTE_PROTOCOL;

/// How long changes are gathered: an interface that comes up sends a dozen notifications.
const SETTLE: Duration = Duration::from_millis(50);

/// How long to wait before a lost connection to the kernel is made anew, and before a failed reading is repeated.
const AGAIN: Duration = Duration::from_secs(1);

/// Follows the uplink: the receiver holds the first choice at once, and a new one whenever it differs.
///
/// An error is published like an uplink, since the interface may come back. The task ends when the last receiver is
/// gone. The network namespace is that of the thread that polls; a runtime whose threads are in different ones is no
/// place for this.
pub async fn watch(choice: Choice, families: Families) -> channel::Receiver<Result<Uplink, UplinkError>> {
    let events = Events::new();
    let (chosen, facts) = choose_now(&choice, families).await;
    let (sender, receiver) = channel::channel(chosen);
    tokio::spawn(follow(choice, families, sender, events, facts));
    receiver
}

async fn follow(
    choice: Choice,
    families: Families,
    sender: channel::Sender<Result<Uplink, UplinkError>>,
    mut events: Option<Events>,
    mut facts: Facts,
) {
    loop {
        let again = async {
            let unread = matches!(*sender.borrow(), Err(UplinkError::Read(_)));
            if unread {
                sleep(AGAIN).await;
            } else {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            () = sender.closed() => return,
            () = again => {}
            heard = next_relevant(events.as_mut(), &facts, &choice) => match heard {
                Heard::Change => {}
                Heard::End => {
                    sleep(AGAIN).await;
                    events = Events::new();
                }
            },
        }
        sleep(SETTLE).await;
        if let Some(events) = &mut events {
            events.drain();
        }
        let (next, now) = choose_now(&choice, families).await;
        facts = now;
        sender.send_if_modified(|held| {
            let differs = *held != next;
            *held = next;
            differs
        });
    }
}

async fn choose_now(choice: &Choice, families: Families) -> (Result<Uplink, UplinkError>, Facts) {
    match read(choice.can_reach).await {
        Ok(facts) => (choose(&facts, choice, families), facts),
        Err(error) => (Err(error), Facts::default()),
    }
}

/// Reads the facts, and asks for the way to `can_reach`.
///
/// # Errors
/// [`UplinkError::Read`].
pub async fn read(can_reach: Option<IpAddr>) -> Result<Facts, UplinkError> {
    let (connection, handle, _) = new_connection().map_err(|error| UplinkError::Read(error.to_string()))?;
    let task = tokio::spawn(connection);
    let facts = dump(&handle, can_reach)
        .await
        .map_err(|error| UplinkError::Read(error.to_string()));
    task.abort();
    facts
}

async fn dump(handle: &Handle, can_reach: Option<IpAddr>) -> Result<Facts, rtnetlink::Error> {
    let mut facts = Facts::default();
    let mut links = Box::pin(handle.link().get().execute());
    while let Some(message) = links.try_next().await? {
        facts.links.insert(message.header.index, link(&message));
    }
    let mut addresses = Box::pin(handle.address().get().execute());
    while let Some(message) = addresses.try_next().await? {
        facts.addresses.extend(address(&message));
    }
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut all = RouteMessage::default();
        all.header.address_family = family;
        let mut routes = Box::pin(handle.route().get(all).execute());
        while let Some(message) = routes.try_next().await? {
            facts.default_routes.extend(default_route(&message));
            facts.routes.extend(found_route(&message));
        }
    }
    if let Some(to) = can_reach {
        facts.reach = Some(reach(handle, to).await);
    }
    Ok(facts)
}

async fn reach(handle: &Handle, to: IpAddr) -> Result<Reach, String> {
    let mut question = RouteMessage::default();
    let (family, length) = match to {
        IpAddr::V4(_) => (AddressFamily::Inet, 32),
        IpAddr::V6(_) => (AddressFamily::Inet6, 128),
    };
    (
        question.header.address_family,
        question.header.destination_prefix_length,
    ) = (family, length);
    question.attributes.push(RouteAttribute::Destination(to.into()));
    let mut answer = Box::pin(handle.route().get(question).execute());
    let no_route = || "the kernel has no route to it".to_owned();
    let message = match answer.try_next().await {
        Ok(message) => message.ok_or_else(no_route)?,
        Err(rtnetlink::Error::NetlinkError(error)) => return Err(error.to_io().to_string()),
        Err(error) => return Err(error.to_string()),
    };
    if !matches!(message.header.kind, RouteType::Unicast | RouteType::Local) {
        return Err(no_route());
    }
    let index = oif(&message).ok_or_else(no_route)?;
    Ok(Reach {
        index,
        source: source(&message),
        own: message.header.kind == RouteType::Local,
    })
}

fn link(message: &LinkMessage) -> Link {
    let flags = message.header.flags;
    let mut link = Link {
        name: String::new(),
        other_names: Vec::new(),
        mtu: 0,
        up: flags.contains(LinkFlags::Up),
        loopback: flags.contains(LinkFlags::Loopback),
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::PropList(props) => link.other_names.extend(props.iter().filter_map(|prop| match prop {
                Prop::AltIfName(name) => Some(name.clone()),
                _ => None,
            })),
            _ => {}
        }
    }
    link
}

fn address(message: &AddressMessage) -> Option<Address> {
    let mut flags = AddressFlags::from_bits_retain(message.header.flags.bits().into());
    let (mut local, mut other) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(address) => local = Some(*address),
            AddressAttribute::Address(address) => other = Some(*address),
            AddressAttribute::Flags(all) => flags = *all,
            _ => {}
        }
    }
    Some(Address {
        index: message.header.index,
        // On a point-to-point link, IFA_ADDRESS is the peer's.
        address: local.or(other)?,
        host_scope: message.header.scope == AddressScope::Host,
        permanent: flags.contains(AddressFlags::Permanent),
        deprecated: flags.contains(AddressFlags::Deprecated),
        temporary: flags.contains(AddressFlags::Secondary),
        // An optimistic address may be used while it is still tentative (RFC 4429).
        unusable: flags.contains(AddressFlags::Dadfailed)
            || flags.contains(AddressFlags::Tentative) && !flags.contains(AddressFlags::Optimistic),
    })
}

/// A route that can say what is on a link: not the default, not ours, and not one that every link has.
fn found_route(message: &RouteMessage) -> Option<FoundRoute> {
    let header = &message.header;
    let length = header.destination_prefix_length;
    if length == 0 || !is_main(message) || u8::from(header.protocol) == ROUTE_PROTOCOL {
        return None;
    }
    let destination = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(v4)) => Some(IpAddr::V4(*v4)),
        RouteAttribute::Destination(RouteAddress::Inet6(v6)) if !v6.is_unicast_link_local() && !v6.is_multicast() => {
            Some(IpAddr::V6(*v6))
        }
        _ => None,
    });
    let by_router = |attribute: &RouteAttribute| {
        matches!(
            attribute,
            RouteAttribute::Gateway(_) | RouteAttribute::Via(_) | RouteAttribute::MultiPath(_)
        )
    };
    Some(FoundRoute {
        net: IpNet::new(destination?, length).ok()?,
        index: oif(message).filter(|_| header.kind == RouteType::Unicast),
        routed: message.attributes.iter().any(by_router),
        metric: metric(message),
    })
}

fn is_main(message: &RouteMessage) -> bool {
    let main = message.attributes.iter().find_map(|a| {
        if let RouteAttribute::Table(t) = a {
            Some(*t)
        } else {
            None
        }
    });
    main.unwrap_or_else(|| message.header.table.into()) == u32::from(RouteHeader::RT_TABLE_MAIN)
}

fn metric(message: &RouteMessage) -> u32 {
    let metric = message.attributes.iter().find_map(|a| {
        if let RouteAttribute::Priority(m) = a {
            Some(*m)
        } else {
            None
        }
    });
    metric.unwrap_or(0)
}

fn default_route(message: &RouteMessage) -> Option<DefaultRoute> {
    let header = &message.header;
    if header.destination_prefix_length != 0 || header.kind != RouteType::Unicast || !is_main(message) {
        return None;
    }
    let family = if header.address_family == AddressFamily::Inet {
        Family::V4
    } else {
        Family::V6
    };
    Some(DefaultRoute {
        family,
        index: oif(message)?,
        metric: metric(message),
        source: source(message),
    })
}

/// The interface of a route; of one with several ways, the first way's.
fn oif(message: &RouteMessage) -> Option<u32> {
    message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Oif(index) => Some(*index),
        RouteAttribute::MultiPath(hops) => hops.first().map(|hop| hop.interface_index),
        _ => None,
    })
}

fn source(message: &RouteMessage) -> Option<IpAddr> {
    message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::PrefSource(RouteAddress::Inet(v4)) => Some(IpAddr::V4(*v4)),
        RouteAttribute::PrefSource(RouteAddress::Inet6(v6)) => Some(IpAddr::V6(*v6)),
        _ => None,
    })
}

type Message = NetlinkMessage<RouteNetlinkMessage>;

/// The kernel's notifications on links, addresses and routes.
struct Events {
    messages: futures_util::stream::BoxStream<'static, Message>,
    connection: tokio::task::JoinHandle<()>,
}

enum Heard {
    Change,
    /// The connection is gone.
    End,
}

impl Events {
    fn new() -> Option<Self> {
        let groups = [
            MulticastGroup::Link,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
        ];
        let (connection, _, messages) = new_multicast_connection(&groups).ok()?;
        let messages = messages.map(|(message, _)| message).boxed();
        Some(Self {
            messages,
            connection: tokio::spawn(connection),
        })
    }

    /// Forgets what has come in already.
    fn drain(&mut self) {
        use futures_util::FutureExt as _;
        while let Some(Some(_)) = self.messages.next().now_or_never() {}
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

async fn next_relevant(events: Option<&mut Events>, facts: &Facts, choice: &Choice) -> Heard {
    let Some(events) = events else { return Heard::End };
    while let Some(message) = events.messages.next().await {
        if is_relevant(&message, facts, choice) {
            return Heard::Change;
        }
    }
    Heard::End
}

fn is_relevant(message: &Message, facts: &Facts, choice: &Choice) -> bool {
    match &message.payload {
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route)) => {
            let ours = oif(route)
                .and_then(|index| facts.links.get(&index))
                .is_some_and(is_ours);
            let tells = found_route(route).is_some_and(|found| !choice.is_mesh(found.net.addr()));
            !ours && (route.header.destination_prefix_length == 0 || choice.can_reach.is_some() || tells)
        }
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(message)) => {
            // Counters, carrier and bridge state come this way too.
            facts.links.get(&message.header.index) != Some(&link(message))
        }
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelLink(_)) => true,
        NetlinkPayload::InnerMessage(
            RouteNetlinkMessage::NewAddress(message) | RouteNetlinkMessage::DelAddress(message),
        ) => !facts.links.get(&message.header.index).is_some_and(is_ours),
        // Some were lost, or something new came.
        _ => true,
    }
}
