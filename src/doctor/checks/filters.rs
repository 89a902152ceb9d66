//! Packet filters that drop what the mesh sends.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::super::Severity::Broken;
use super::super::facts::parsed;
use super::super::filter::{Filter, Hook, Packet};
use super::{Facts, Finding, at_most};
use crate::kernel::netlink::LINK;
use crate::node::report::{PeerReport, State};

/// So many peers are tried; rules that name one of thousands are rare.
const PEERS: usize = 64;

/// Rules and policies that surely drop ESP, its UDP, or what pods send each other.
pub(super) fn drops(facts: &Facts) -> Vec<Finding> {
    let Some(report) = &facts.report else {
        return Vec::new();
    };
    let filters: Vec<Filter> = facts.filters.iter().map(Filter::parse).collect();
    let public: Vec<IpAddr> = report.public.iter().filter_map(|text| text.parse().ok()).collect();
    let uplink: Vec<&str> = facts.uplink().into_iter().collect();
    let (network, pods_here) = (facts.network(), facts.pod_devices());
    // A packet to a peer's pod is routed to the mesh's device, and leaves by the uplink.
    let out: Vec<&str> = uplink.iter().copied().chain([LINK]).collect();
    let mut findings = Vec::new();
    let mut named = BTreeSet::new();
    let mut look = |what: &str, packet: &Packet<'_>, hooks: &[Hook], node: &str| {
        for dropped in filters.iter().filter_map(|filter| filter.drops(packet, hooks)) {
            if !named.insert((what.to_owned(), dropped.by.clone())) {
                continue;
            }
            let counted = dropped
                .packets
                .map(|packets| format!("; it has taken {packets} packets"));
            findings.push(
                Finding::new(Broken, "filter-drops", what, format!("a packet filter drops {what}"))
                    .seen(format!(
                        "{}{}, for one, {}",
                        dropped.by,
                        counted.unwrap_or_default(),
                        said(packet, node)
                    ))
                    .why("the peer's packets do not get through, whatever the daemons agree on")
                    .run(dropped.remedy),
            );
        }
    };
    let served = report.peers.iter().filter(|peer| !matches!(peer.state, State::Refused));
    for peer in served.take(PEERS) {
        let Ok(there) = peer.address.parse::<IpAddr>() else {
            continue;
        };
        let Some(here) = public.iter().copied().find(|own| own.is_ipv6() == there.is_ipv6()) else {
            continue;
        };
        for (what, protocol, dport) in carried(facts, peer) {
            let packet = |src, dst, iif, oif| Packet {
                src,
                dst,
                range: None,
                protocol,
                dport,
                iif,
                oif,
            };
            let arriving = packet(there, here, &uplink, &[]);
            look(
                &format!("{what} that arrives"),
                &arriving,
                &[Hook::Prerouting, Hook::Input],
                &peer.node,
            );
            let leaving = packet(here, there, &[], &uplink);
            look(
                &format!("{what} that leaves"),
                &leaving,
                &[Hook::Output, Hook::Postrouting],
                &peer.node,
            );
        }
        for (mine, theirs) in addresses_of_pods(facts, peer) {
            let packet = |src: IpAddr, dst, iif, oif| Packet {
                src,
                dst,
                range: network.iter().copied().find(|range| range.contains(&src)),
                protocol: 0,
                dport: None,
                iif,
                oif,
            };
            let sent = packet(mine, theirs, &pods_here, &out);
            let received = packet(theirs, mine, &uplink, &pods_here);
            look("what pods send", &sent, &[Hook::Forward], &peer.node);
            look("what pods receive", &received, &[Hook::Forward], &peer.node);
        }
    }
    at_most(findings)
}

fn said(packet: &Packet<'_>, node: &str) -> String {
    format!("{} > {} (peer {node})", packet.src, packet.dst)
}

/// What data to and from the peer travels in: words, protocol, port.
fn carried(facts: &Facts, peer: &PeerReport) -> Vec<(String, u8, Option<u16>)> {
    let Some(report) = &facts.report else {
        return Vec::new();
    };
    let udp = super::node::wanted_ports(facts);
    let udp = udp.into_iter().map(|port| (format!("UDP port {port}"), 17, Some(port)));
    let esp = report.backend == "ipsec" && report.encap != "true" && peer.encap.as_deref() != Some("udp");
    let esp = esp.then(|| ("ESP".to_owned(), 50, None));
    esp.into_iter().chain(udp).collect()
}

/// An address of a pod here and one of a pod there, in each family that both have.
fn addresses_of_pods(facts: &Facts, peer: &PeerReport) -> Vec<(IpAddr, IpAddr)> {
    let tenth = |net: &ipnet::IpNet| net.hosts().nth(9).unwrap_or_else(|| net.addr());
    let theirs = parsed(&peer.subnets);
    let pair = |own: &ipnet::IpNet| {
        let there = theirs.iter().find(|net| net.addr().is_ipv6() == own.addr().is_ipv6())?;
        Some((tenth(own), tenth(there)))
    };
    facts.own().iter().filter_map(pair).collect()
}
