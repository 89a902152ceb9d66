//! Devices, routes and rules, over rtnetlink.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use futures_util::TryStreamExt as _;
use ipnet::IpNet;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkInfo, LinkMessage};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteType};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleFlags, RuleMessage};
use rtnetlink::{Handle, IpVersion, new_connection};

use super::some_of;
use crate::doctor::facts::{Facts, Link, Route, Rule};
use crate::node::report::State;

/// Reads them all, and by which device the peers are reached.
pub(super) fn read(facts: &mut Facts) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (connection, handle, _) = new_connection()?;
        let task = tokio::spawn(connection);
        let result = dump(&handle, facts).await.map_err(io::Error::other);
        task.abort();
        result
    })
}

async fn dump(handle: &Handle, facts: &mut Facts) -> Result<(), rtnetlink::Error> {
    let mut links = Box::pin(handle.link().get().execute());
    while let Some(message) = links.try_next().await? {
        facts.links.push(link(&message));
    }
    drop(links);
    let names: BTreeMap<u32, String> = facts.links.iter().map(|link| (link.index, link.name.clone())).collect();
    for (family, version) in [
        (AddressFamily::Inet, IpVersion::V4),
        (AddressFamily::Inet6, IpVersion::V6),
    ] {
        let mut all = RouteMessage::default();
        all.header.address_family = family;
        let mut routes = Box::pin(handle.route().get(all).execute());
        while let Some(message) = routes.try_next().await? {
            facts.routes.extend(route(&message, &names));
        }
        let mut rules = Box::pin(handle.rule().get(version).execute());
        while let Some(message) = rules.try_next().await? {
            facts.rules.push(rule(&message));
        }
    }
    let peers = some_of(facts, "by which device {} more peers are reached", |peer| {
        peer.state != State::Refused
    });
    for peer in peers {
        // No way to it is no finding of the way: the peer itself is named as out of reach.
        if let Ok(Some(index)) = way(handle, peer).await
            && let Some(name) = names.get(&index)
        {
            facts.reached_by.insert(peer, name.clone());
        }
    }
    Ok(())
}

async fn way(handle: &Handle, to: IpAddr) -> Result<Option<u32>, rtnetlink::Error> {
    let mut question = RouteMessage::default();
    (
        question.header.address_family,
        question.header.destination_prefix_length,
    ) = match to {
        IpAddr::V4(_) => (AddressFamily::Inet, 32),
        IpAddr::V6(_) => (AddressFamily::Inet6, 128),
    };
    question.attributes.push(RouteAttribute::Destination(to.into()));
    let mut answer = Box::pin(handle.route().get(question).execute());
    Ok(answer.try_next().await?.and_then(|message| oif(&message)))
}

fn link(message: &LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        kind: String::new(),
        mtu: 0,
        up: message.header.flags.contains(LinkFlags::Up),
        master: None,
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::Controller(master) => link.master = Some(*master).filter(|master| *master > 0),
            LinkAttribute::LinkInfo(infos) => {
                let kind = infos.iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(kind.to_string()),
                    _ => None,
                });
                link.kind = kind.unwrap_or_default();
            }
            _ => {}
        }
    }
    link
}

fn route(message: &RouteMessage, names: &BTreeMap<u32, String>) -> Option<Route> {
    let header = &message.header;
    let any: IpAddr = match header.address_family {
        AddressFamily::Inet => Ipv4Addr::UNSPECIFIED.into(),
        AddressFamily::Inet6 => Ipv6Addr::UNSPECIFIED.into(),
        _ => return None,
    };
    let kind = match header.kind {
        RouteType::Unicast => "unicast",
        RouteType::Local => "local",
        RouteType::Broadcast => "broadcast",
        RouteType::Anycast => "anycast",
        RouteType::Multicast => "multicast",
        RouteType::BlackHole => "blackhole",
        RouteType::Unreachable => "unreachable",
        RouteType::Prohibit => "prohibit",
        RouteType::Throw => "throw",
        _ => "other",
    };
    let mut route = Route {
        net: IpNet::from(any),
        kind: kind.into(),
        table: header.table.into(),
        protocol: header.protocol.into(),
        link: oif(message).and_then(|index| names.get(&index).cloned()),
        gateway: None,
        metric: 0,
    };
    let mut destination = any;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => destination = ip(address)?,
            RouteAttribute::Gateway(address) => route.gateway = ip(address),
            RouteAttribute::Priority(metric) => route.metric = *metric,
            RouteAttribute::Table(table) => route.table = *table,
            _ => {}
        }
    }
    route.net = IpNet::new(destination, header.destination_prefix_length).ok()?;
    Some(route)
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(v4) => Some((*v4).into()),
        RouteAddress::Inet6(v6) => Some((*v6).into()),
        _ => None,
    }
}

/// The device of a route; of one with several ways, the first way's.
fn oif(message: &RouteMessage) -> Option<u32> {
    message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Oif(index) => Some(*index),
        RouteAttribute::MultiPath(hops) => hops.first().map(|hop| hop.interface_index),
        _ => None,
    })
}

fn rule(message: &RuleMessage) -> Rule {
    let header = &message.header;
    let action = match header.action {
        RuleAction::ToTable => "lookup",
        RuleAction::Blackhole => "blackhole",
        RuleAction::Unreachable => "unreachable",
        RuleAction::Prohibit => "prohibit",
        RuleAction::Goto => "goto",
        _ => "other",
    };
    let mut rule = Rule {
        family: if header.family == AddressFamily::Inet6 { 6 } else { 4 },
        priority: 0,
        from: None,
        to: None,
        // Turned round, it takes all but what it names.
        narrow: header.tos != 0 || header.flags.contains(RuleFlags::Invert),
        action: action.into(),
        table: header.table.into(),
    };
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Source(address) => rule.from = IpNet::new(*address, header.src_len).ok(),
            RuleAttribute::Destination(address) => rule.to = IpNet::new(*address, header.dst_len).ok(),
            RuleAttribute::Priority(priority) => rule.priority = *priority,
            RuleAttribute::Table(table) => rule.table = *table,
            RuleAttribute::FwMark(mark) => rule.narrow |= *mark != 0,
            RuleAttribute::Iifname(_)
            | RuleAttribute::Oifname(_)
            | RuleAttribute::L3MDev(_)
            | RuleAttribute::UidRange(_)
            | RuleAttribute::IpProtocol(_)
            | RuleAttribute::SourcePortRange(_)
            | RuleAttribute::DestinationPortRange(_)
            | RuleAttribute::TunId(_) => rule.narrow = true,
            _ => {}
        }
    }
    // `suppress_prefixlength` and the mask of no mark come with every rule: neither narrows it.
    rule
}
