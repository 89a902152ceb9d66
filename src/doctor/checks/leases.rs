//! Subnets and who holds them.

use std::collections::BTreeMap;

use ipnet::IpNet;

use super::super::Severity::{Broken, Degraded, Notice};
use super::super::facts::{overlap, parsed};
use super::{Facts, Finding, at_most};
use crate::admin::LeaseReport;

/// From this share on, percent, a Network is nearly used up.
const NEARLY: u64 = 90;

fn leases(facts: &Facts) -> &[LeaseReport] {
    facts.leases.as_ref().map_or(&[], |leases| leases.leases.as_slice())
}

/// Subnets that two leases claim.
pub(super) fn duplicates(facts: &Facts) -> Vec<Finding> {
    let mut claims: Vec<(IpNet, &str)> = leases(facts)
        .iter()
        .flat_map(|lease| parsed(&lease.subnets).into_iter().map(|net| (net, lease.node.as_str())))
        .collect();
    // Nets that overlap stand beside each other: the shorter prefix first.
    claims.sort();
    let mut findings = Vec::new();
    let mut widest: Option<(IpNet, &str)> = None;
    for (net, node) in claims {
        match widest {
            Some((held, holder)) if held.contains(&net) && holder != node => findings.push(
                Finding::new(
                    Broken,
                    "subnet-twice",
                    net.to_string(),
                    format!("subnet {net} is claimed twice"),
                )
                .seen(if held == net {
                    format!("{holder} and {node} have a lease of it")
                } else {
                    format!("{holder} has a lease of {held}, {node} of {net}")
                })
                .why("neither is served: nobody can tell which node has the pods")
                .run("ringmail leases; remove the lease of the node that is wrong"),
            ),
            Some((held, _)) if held.contains(&net) => {}
            _ => widest = Some((net, node)),
        }
    }
    at_most(findings)
}

/// Subnets outside the Network.
pub(super) fn outside(facts: &Facts) -> Vec<Finding> {
    let network = facts.network();
    if network.is_empty() {
        return Vec::new();
    }
    let within = |net: &IpNet| network.iter().any(|range| range.contains(net));
    let findings = leases(facts).iter().flat_map(|lease| {
        let strays = parsed(&lease.subnets).into_iter().filter(|net| !within(net));
        strays.map(|net| {
            let network: Vec<String> = network.iter().map(ToString::to_string).collect();
            Finding::new(
                Broken,
                "subnet-outside",
                &lease.node,
                format!("subnet {net} lies outside the Network"),
            )
            .seen(format!(
                "{} holds it, the Network is {}",
                lease.node,
                network.join(" and ")
            ))
            .why("what is outside the Network is not encrypted, so it is not served")
            .run(
                "correct Network in net-conf.json, or the podCIDR of the Node (kube-controller-manager --cluster-cidr)",
            )
        })
    });
    at_most(findings.collect())
}

/// Whether there is room for more nodes.
pub(super) fn exhaustion(facts: &Facts) -> Vec<Finding> {
    let capacity = facts.conf.iter().filter_map(|conf| conf.capacity.as_ref()).flatten();
    let mut held: BTreeMap<&str, u64> = BTreeMap::new();
    for net in leases(facts).iter().flat_map(|lease| parsed(&lease.subnets)) {
        let family = if net.addr().is_ipv6() { "IPv6" } else { "IPv4" };
        *held.entry(family).or_default() += 1;
    }
    let finding = |(family, room): (&String, &u64)| {
        let held = held.get(family.as_str()).copied().unwrap_or(0);
        if *room == 0 || held.saturating_mul(100) < room.saturating_mul(NEARLY) {
            return None;
        }
        let (severity, check, title) = if held >= *room {
            (Degraded, "subnets-used-up", format!("no {family} subnet is left"))
        } else {
            (
                Notice,
                "subnets-nearly-used-up",
                format!("few {family} subnets are left"),
            )
        };
        Some(
            Finding::new(severity, check, family, title)
                .seen(format!("{held} of {room} are held"))
                .why("a node that comes then gets no lease and starts no pods")
                .run("remove leases of nodes that are gone (ringmail leases), or plan a larger Network"),
        )
    };
    capacity.filter_map(finding).collect()
}

/// What the store holds that is no lease.
pub(super) fn unreadable(facts: &Facts) -> Vec<Finding> {
    let rejected = facts.leases.iter().flat_map(|leases| &leases.rejected);
    let finding = |(name, why): (&String, &String)| {
        Finding::new(
            Degraded,
            "lease-unreadable",
            name,
            format!("{name} in the store is no lease"),
        )
        .seen(why)
        .why("the node that it is meant for is not known to this one")
        .run("remove or correct it; its node's daemon writes its own anew")
    };
    at_most(rejected.map(finding).collect())
}

/// Nets of the mesh that are in use elsewhere on this node, for the checks of routes.
pub(super) fn of_peers(facts: &Facts) -> Vec<(IpNet, &str)> {
    let peers = facts.peers().iter();
    let nets = peers.flat_map(|peer| parsed(&peer.subnets).into_iter().map(|net| (net, peer.node.as_str())));
    nets.collect()
}

/// The first peer whose subnet has an address in common with `net`.
pub(super) fn touched<'a>(peers: &[(IpNet, &'a str)], net: &IpNet) -> Option<(IpNet, &'a str)> {
    peers.iter().find(|(subnet, _)| overlap(subnet, net)).copied()
}
