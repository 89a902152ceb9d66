//! Peers, as the daemon sees them.

use std::collections::BTreeMap;

use super::super::Severity::{Broken, Degraded, Notice};
use super::node::encap_port;
use super::{Facts, Finding, at_most};
use crate::node::report::{Comes, PeerReport, State};

/// One lost probe of the last 20 is not worth a finding.
const LOSS: f64 = 0.05;
/// A round trip this many times the median of all is an outlier, if it is this much longer too, milliseconds.
const OUTLIER: f64 = 5.0;
const LONGER: f64 = 20.0;
/// A round trip that is long whatever the others' are, milliseconds.
const LONG: f64 = 500.0;

/// How it begins where two nodes have no key in common: of a lease, and of an epoch.
const NO_COMMON_PSK: &str = "no common PSK";
/// How it begins where the peer has only a key that was dropped here.
const PSK_DROPPED: &str = "it has only PSK";
/// What helps then. The store has nothing to tell of it.
const COMPARE: &str =
    "ringmail status; the same on the peer: compare the ids that PSKs lists, and give both nodes a key in common";

/// Peers that data does not go to, or not as it should.
pub(super) fn state(facts: &Facts) -> Vec<Finding> {
    at_most(facts.peers().iter().filter_map(|peer| of_state(facts, peer)).collect())
}

fn of_state(facts: &Facts, peer: &PeerReport) -> Option<Finding> {
    let name = &peer.node;
    let reason = peer.reason.as_deref().unwrap_or("no reason is given");
    match peer.state {
        State::Refused if reason.starts_with(NO_COMMON_PSK) || reason.starts_with(PSK_DROPPED) => Some(
            Finding::new(Broken, "peer-refused", name, format!("peer {name} is refused"))
                .seen(format!("{reason} (keys by the ids that `ringmail status` shows)"))
                .why("without a key in common its lease can't be believed, so nothing is sent to its pods")
                .run(COMPARE),
        ),
        State::Refused => Some(
            Finding::new(Broken, "peer-refused", name, format!("peer {name} is refused"))
                .seen(reason)
                .why("its lease is not believed or can't be served, so nothing is sent to its pods")
                .run("ringmail leases"),
        ),
        State::Waiting => Some(waiting(facts, peer, reason)),
        State::Kept => Some(
            Finding::new(
                Degraded,
                "peer-kept",
                name,
                format!("peer {name} has not answered since this daemon began"),
            )
            .seen(reason)
            .why("data goes on the keys of the process before, until a probe comes back")
            .run("ringmail status"),
        ),
        State::Up | State::Moving | State::Plain if peer.silent.is_some() => Some(silent(facts, peer, reason)),
        State::Up | State::Moving | State::Plain => doubtful(peer),
    }
}

/// A peer that no probe has come back from.
fn waiting(facts: &Facts, peer: &PeerReport, reason: &str) -> Finding {
    let (name, address) = (&peer.node, &peer.address);
    let title = format!("nothing can be sent to peer {name}");
    if reason.starts_with(NO_COMMON_PSK) {
        let ids = facts.report.iter().flat_map(|report| &report.psks);
        let ids: Vec<&str> = ids.map(|psk| psk.kid.as_str()).collect();
        let ids = if ids.is_empty() {
            "none".to_owned()
        } else {
            ids.join(" ")
        };
        return Finding::new(Broken, "peer-waiting", name, title)
            .seen(format!("{reason} (the ids of this node's keys: {ids})"))
            .why("data waits until the peer has proved that it has the keys")
            .run(COMPARE);
    }
    if !reason.starts_with("no probe came back") {
        return Finding::new(Broken, "peer-waiting", name, title)
            .seen(reason)
            .why("data waits until the peer has proved that it has the keys")
            .run("ringmail status");
    }
    let answers = address.parse().ok().and_then(|address| facts.echoes.get(&address));
    let encap = facts.report.as_ref().map_or("", |report| report.encap.as_str());
    match answers {
        Some(true) => {
            let finding = Finding::new(Broken, "esp-filtered", name, title).seen(format!(
                "{name} answers ping at {address}, its lease is in order, and no probe in {} came back",
                match encap {
                    "true" => "UDP",
                    "auto" => "ESP or UDP",
                    _ => "ESP",
                }
            ));
            match encap {
                "false" => finding
                    .why("something on the path or at the peer drops IP protocol 50 (ESP), or its daemon does not run")
                    .run("put \"UDPEncap\": \"auto\" into Backend of net-conf.json; tcpdump -ni any esp at both ends"),
                _ => finding
                    .why("something on the path or at the peer drops the UDP port, or its daemon does not run")
                    .run(format!(
                        "tcpdump -ni any 'esp or udp port {}' at both ends",
                        encap_port(facts)
                    )),
            }
        }
        Some(false) | None => Finding::new(Broken, "peer-unreachable", name, title)
            .seen(match answers {
                Some(_) => format!("{address} does not answer ping, and no probe came back"),
                None => format!("no probe came back from {address}"),
            })
            .why("the node is down, or the network between the two does not carry packets")
            .run(format!("ping -c 3 {address}; ip route get {address}")),
    }
}

/// A peer that data goes to and that has stopped answering.
fn silent(facts: &Facts, peer: &PeerReport, reason: &str) -> Finding {
    let (name, address) = (&peer.node, &peer.address);
    let answers = address.parse().ok().and_then(|address| facts.echoes.get(&address));
    let finding = Finding::new(
        Broken,
        "peer-silent",
        name,
        format!("peer {name} has stopped answering"),
    );
    let tcpdump = format!(
        "tcpdump -ni any 'host {address} and (esp or udp port {})'; the same, and ringmail doctor, on the peer",
        encap_port(facts)
    );
    let ping = match answers {
        Some(true) => format!("{reason} ({address} answers ping)"),
        Some(false) => format!("{reason} ({address} does not answer ping)"),
        None => reason.to_owned(),
    };
    match (peer.silent, answers) {
        // What its daemon sends comes, so it is the other way that is cut.
        (Some(Comes::Probes), _) => finding
            .seen(reason)
            .why("something at the peer, or on the way there alone, drops ESP or its UDP port: it does not get what pods send")
            .run(tcpdump),
        (Some(Comes::Data), _) | (_, Some(true)) => finding
            .seen(ping)
            .why(
                "its daemon does not run (what it left in its kernel still carries data, on keys that grow old), or something \
                 on the path or at the peer drops ESP or its UDP port",
            )
            .run(tcpdump),
        (_, Some(false)) => finding
            .seen(ping)
            .why("the node is down, or the network between the two does not carry packets: its pods are out of reach")
            .run(format!("ping -c 3 {address}; ip route get {address}")),
        (_, None) => finding
            .seen(ping)
            .why("the node or its daemon is down, or the network between the two does not carry packets")
            .run(format!("ping -c 3 {address}; ip route get {address}")),
    }
}

/// A peer that data goes to, with something to say.
fn doubtful(peer: &PeerReport) -> Option<Finding> {
    let name = &peer.node;
    // What its size is the reason of has a finding of its own.
    if let Some(reason) = peer.reason.as_ref().filter(|_| peer.full_size != Some(false)) {
        return Some(
            Finding::new(
                Degraded,
                "peer-doubtful",
                name,
                format!("peer {name} is served, with a doubt"),
            )
            .seen(reason)
            .why("what is in use serves on until this is right")
            .run("ringmail status; ringmail leases"),
        );
    }
    peer.detour.as_ref().map(|why| {
        Finding::new(
            Notice,
            "esp-detour",
            name,
            format!("plain ESP does not reach peer {name}: its data goes in UDP"),
        )
        .seen(why)
        .why("something on the path drops IP protocol 50; UDP costs 8 bytes a packet")
        .run("let IP protocol 50 pass between the nodes, or set \"UDPEncap\": true")
    })
}

/// Peers whose probes are lost, and those that full packets do not reach.
pub(super) fn loss(facts: &Facts) -> Vec<Finding> {
    // Of one that is silent another finding tells.
    let lossy = facts
        .peers()
        .iter()
        .filter(|peer| peer.silent.is_none())
        .filter_map(|peer| {
            let loss = peer.loss.filter(|loss| *loss > LOSS)?;
            // A bad time that is over stays in the count for some minutes.
            let answered = peer.unanswered == 0;
            let severity = if loss >= 0.5 && !answered { Broken } else { Degraded };
            let (name, address) = (&peer.node, &peer.address);
            let lost = if answered {
                "were lost within the last minutes"
            } else {
                "are lost"
            };
            Some(
                Finding::new(severity, "loss", name, format!("packets to peer {name} {lost}"))
                    .seen(format!(
                        "{:.0} % of the last 20 probes got no answer; the newest {}",
                        loss * 100.0,
                        if answered { "did" } else { "neither" }
                    ))
                    .why("the network between the two drops packets, or one end has no time for them")
                    .run(format!(
                        "ping -i 0.2 -c 50 {address}; ip -s link show dev {}",
                        facts.uplink().unwrap_or("UPLINK")
                    )),
            )
        });
    at_most(lossy.collect())
}

/// Peers that answer much later than the others.
pub(super) fn latency(facts: &Facts) -> Vec<Finding> {
    let mut all: Vec<f64> = facts.peers().iter().filter_map(|peer| peer.round_trip).collect();
    all.sort_by(f64::total_cmp);
    let median = (all.len() >= 3).then(|| all[all.len() / 2]);
    let slow = facts.peers().iter().filter_map(|peer| {
        let took = peer.round_trip?;
        let outlier = median.is_some_and(|median| took > median * OUTLIER && took > median + LONGER);
        let usual = match median {
            Some(median) if outlier => format!("; the median of all peers is {median:.1} ms"),
            _ if took > LONG => String::new(),
            _ => return None,
        };
        let (name, address) = (&peer.node, &peer.address);
        Some(
            Finding::new(Notice, "latency", name, format!("peer {name} answers late"))
                .seen(format!("the last probe took {took:.1} ms{usual}"))
                .why("a long or crowded path, or a node that is busy")
                .run(format!("ping -c 10 {address}; mtr {address}")),
        )
    });
    at_most(slow.collect())
}

/// Peers whose packets the kernel refuses, now.
pub(super) fn errors(facts: &Facts) -> Vec<Finding> {
    let before: BTreeMap<&str, &PeerReport> = facts.peers().iter().map(|peer| (peer.node.as_str(), peer)).collect();
    let later = facts.later_report.iter().flat_map(|report| &report.peers);
    let rising = later.filter_map(|after| {
        let before = before.get(after.node.as_str())?;
        let rise = after.errors.saturating_sub(before.errors);
        let name = &after.node;
        (rise > 0).then(|| {
            Finding::new(
                Degraded,
                "peer-errors",
                name,
                format!("the kernel refuses packets that come on peer {name}'s SAs"),
            )
            .seen(format!(
                "{rise} in {:.0} s: integrity check failed, replayed, or too old",
                facts.watched
            ))
            .why("they were changed, doubled or much delayed on the way, or somebody plays them back")
            .run("ip -s xfrm state list nokeys; ringmail rotate")
        })
    });
    at_most(rising.collect())
}
