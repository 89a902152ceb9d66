//! Routes, rules and policies of other programs that stand before ours; settings that packets depend on.

use super::super::Severity::{Broken, Degraded, Notice};
use super::super::facts::{NETSTAT, Policy, Route, Rule, overlap};
use super::leases::{of_peers, touched};
use super::{Facts, Finding, at_most};
use crate::kernel::priority;

/// The table main.
const MAIN: u32 = 254;
/// The table of the kernel's own addresses.
const LOCAL: u32 = 255;
/// The priority of the kernel's rule for the table main.
const RULE_MAIN: u32 = 32_766;

fn command(family_of: &ipnet::IpNet) -> &'static str {
    if family_of.addr().is_ipv6() { "ip -6" } else { "ip" }
}

/// Routes of others within the Network.
pub(super) fn shadows(facts: &Facts) -> Vec<Finding> {
    let (network, own, peers) = (facts.network(), facts.own(), of_peers(facts));
    let inside = |route: &&Route| {
        [MAIN, LOCAL].contains(&route.table)
            && !route.is_ours()
            && !["broadcast", "anycast", "multicast"].contains(&route.kind.as_str())
            && network.iter().any(|range| range.contains(&route.net))
            && !own.iter().any(|own| own.contains(&route.net))
            && !is_ours_by_kind(facts, route)
    };
    let finding = |route: &Route| {
        let ip = command(&route.net);
        let finding = match touched(&peers, &route.net) {
            Some((subnet, node)) => Finding::new(
                Broken,
                "route-shadow",
                route.net.to_string(),
                format!("another program's route takes packets for peer {node}"),
            )
            .seen(format!(
                "{route} (proto {}), where {subnet} is {node}'s",
                route.protocol
            ))
            .why("the longest prefix wins, then the lowest metric: these packets do not go the mesh's way"),
            None => Finding::new(
                Degraded,
                "network-overlap",
                route.net.to_string(),
                "another network on this node overlaps the Network",
            )
            .seen(format!("{route} (proto {})", route.protocol))
            .why("a node whose subnet lies there can't be reached from here, nor that network from pods"),
        };
        finding.run(match route.table {
            LOCAL => format!("{ip} address show to {}; give that device another network", route.net),
            _ => format!("{ip} route delete {route}; else choose another Network, or another net for that device"),
        })
    };
    at_most(facts.routes.iter().filter(inside).map(finding).collect())
}

/// Routes that lead to the mesh's own device, and the addresses of it.
fn is_ours_by_kind(facts: &Facts, route: &Route) -> bool {
    let tunnels: &[&str] = match facts.report.as_ref().map(|report| report.backend.as_str()) {
        Some("ipsec") => &["ringmail0", "flannel.1", "flannel-v6.1"],
        _ => &["ringmail0", "flannel", "tunl0"],
    };
    let link = route.link.as_deref().unwrap_or_default();
    tunnels.iter().any(|name| link.starts_with(name))
}

/// Rules that send packets of the mesh to another table.
pub(super) fn rules(facts: &Facts) -> Vec<Finding> {
    let (network, own, peers) = (facts.network(), facts.own(), of_peers(facts));
    let finding = |rule: &Rule| {
        if rule.priority >= RULE_MAIN || rule.narrow || [MAIN, LOCAL].contains(&rule.table) && rule.action == "lookup" {
            return None;
        }
        // Sources other than pods' and the whole world are not the mesh's.
        if rule.from.is_some_and(|from| !own.iter().any(|own| overlap(own, &from))) {
            return None;
        }
        let v6 = rule.family == 6;
        let to = |net: &ipnet::IpNet| net.addr().is_ipv6() == v6 && rule.to.is_none_or(|to| overlap(&to, net));
        let ends = match rule.action.as_str() {
            "lookup" => {
                let leads =
                    |route: &&Route| route.table == rule.table && !route.is_ours() && route.net.addr().is_ipv6() == v6;
                let hits = |route: &&Route| {
                    peers
                        .iter()
                        .any(|(subnet, _)| to(subnet) && overlap(&route.net, subnet))
                };
                let route = facts.routes.iter().filter(leads).find(hits)?;
                format!("there {route}")
            }
            "blackhole" | "unreachable" | "prohibit" => {
                rule.to?;
                network.iter().find(|range| to(range))?;
                "no route is looked for".to_owned()
            }
            _ => return None,
        };
        let ip = if v6 { "ip -6" } else { "ip" };
        Some(
            Finding::new(
                Broken,
                "rule-shadow",
                format!("rule {}", rule.priority),
                "a rule takes packets of the mesh past its routes",
            )
            .seen(format!("{rule}; {ends}"))
            .why("rules are asked in order, and this one comes before the table that the mesh's routes are in")
            .run(format!("{ip} rule delete priority {}", rule.priority)),
        )
    };
    at_most(facts.rules.iter().filter_map(finding).collect())
}

/// IPsec policies that are asked before ours.
pub(super) fn policies(facts: &Facts) -> Vec<Finding> {
    if !facts.encrypts() {
        return Vec::new();
    }
    let (peers, own) = (of_peers(facts), facts.own());
    let finding = |policy: &Policy| {
        if policy.ours || policy.priority > priority::PEER {
            return None;
        }
        let (theirs, ours) = match policy.direction.as_str() {
            "out" => (policy.to, policy.from),
            _ => (policy.from, policy.to),
        };
        let (subnet, node) = touched(&peers, &theirs)?;
        let mine = ours.prefix_len() == 0 || own.iter().any(|own| overlap(own, &ours));
        mine.then(|| {
            let Policy {
                direction, from, to, ..
            } = policy;
            Finding::new(
                Broken,
                "policy-shadow",
                format!("{direction} {from} > {to}"),
                format!(
                    "another program's IPsec policy takes packets {} peer {node}",
                    if direction == "out" { "to" } else { "from" }
                ),
            )
            .seen(format!(
                "dir {direction} src {from} dst {to} priority {}: {}; ringmail's for {subnet} has {}",
                policy.priority,
                policy.action,
                priority::PEER
            ))
            .why("the lowest priority wins: these packets do not get ringmail's encryption")
            .run(format!("ip xfrm policy delete dir {direction} src {from} dst {to}"))
        })
    };
    at_most(facts.policies.iter().filter_map(finding).collect())
}

/// Settings that the daemon does not hold, and packets need.
pub(super) fn settings(facts: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    let Some(uplink) = facts.uplink() else {
        return findings;
    };
    let own = facts.own();
    let mut devices = facts.pod_devices();
    devices.push(uplink);
    devices.sort_unstable();
    devices.dedup();
    for device in devices {
        let path = format!("net/ipv4/conf/{device}/forwarding");
        if facts.number(&format!("sys/{path}")) == Some(0) && own.iter().any(|own| own.addr().is_ipv4()) {
            findings.push(
                Finding::new(
                    Broken,
                    "forwarding",
                    device,
                    format!("{device} does not forward packets"),
                )
                .seen(format!("/proc/sys/{path} is 0"))
                .why("packets between pods and the mesh are dropped where they come in")
                .run(format!("sysctl -w {path}=1")),
            );
        }
    }
    findings.extend(reverse_path(facts, uplink));
    findings
}

/// A strict reverse path filter where packets come by another device than answers leave by.
fn reverse_path(facts: &Facts, uplink: &str) -> Option<Finding> {
    let setting = |device: &str| {
        facts
            .number(&format!("sys/net/ipv4/conf/{device}/rp_filter"))
            .unwrap_or(0)
    };
    let strict = setting("all").max(setting(uplink)) == 1;
    if !strict {
        return None;
    }
    let risen = facts.risen(NETSTAT).get("TcpExt.IPReversePathFilter").copied();
    let elsewhere = facts.reached_by.iter().find(|(_, device)| *device != uplink);
    let (severity, seen) = match (elsewhere, risen) {
        (Some((address, device)), risen) => (
            if risen.is_some() { Broken } else { Degraded },
            format!("rp_filter of {uplink} is 1, and the way to {address} is by {device}"),
        ),
        (None, Some(risen)) => (
            Notice,
            format!(
                "rp_filter of {uplink} is 1, and {risen} packets were dropped by such filters in {:.0} s",
                facts.watched
            ),
        ),
        (None, None) => return None,
    };
    Some(
        Finding::new(
            severity,
            "rp-filter",
            uplink,
            format!("the reverse path filter of {uplink} is strict"),
        )
        .seen(seen)
        .why("what comes in by another device than its answer would leave by is dropped, ESP too")
        .run(format!(
            "sysctl -w net/ipv4/conf/all/rp_filter=2 net/ipv4/conf/{uplink}/rp_filter=2"
        )),
    )
}
