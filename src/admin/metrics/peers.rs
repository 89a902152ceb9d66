//! Series of single peers, by the label `peer`.

use std::fmt;

use prometheus_client::encoding::EncodeMetric as _;
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Unit;

use super::{Families, Measures};
use crate::node::Carried;
use crate::node::report::PeerReport;

pub(super) fn each(families: &mut Families<'_>, measures: &Measures) -> fmt::Result {
    let peers = &measures.report.peers;
    let help = "1 at the state that a peer is in";
    let mut family = families
        .0
        .encode_descriptor("ringmail_peer_state", help, None, MetricType::Gauge)?;
    for peer in peers {
        let labels = [("peer", peer.node.as_str()), ("state", peer.state.word())];
        ConstGauge::new(1.0).encode(family.encode_family(&labels)?)?;
    }
    carried(families, measures)?;
    let seconds = Some(&Unit::Seconds);
    let help = "The last probe's round trip";
    gauge(families, "ringmail_peer_round_trip", help, seconds, peers, |peer| {
        peer.round_trip.map(|milliseconds| milliseconds / 1000.0)
    })?;
    let help = "Of the last probes, the share that got no answer";
    gauge(families, "ringmail_peer_loss_ratio", help, None, peers, |peer| {
        peer.loss
    })?;
    let help = "How long ago a probe last came from the peer";
    gauge(families, "ringmail_peer_heard_age", help, seconds, peers, |peer| {
        peer.heard
    })?;
    let help = "Whether a packet of the mesh MTU passes to the peer";
    gauge(families, "ringmail_peer_full_size", help, None, peers, |peer| {
        peer.full_size.map(|passes| f64::from(u8::from(passes)))
    })?;
    let help = "The peer's epoch that data to it goes on, at least the Unix time of its birth";
    let mut family = families
        .0
        .encode_descriptor("ringmail_peer_epoch", help, None, MetricType::Gauge)?;
    for (name, generation) in &measures.generations {
        let labels = [("peer", name.as_str())];
        ConstGauge::new(generation.receiver.0 as f64).encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}

fn gauge(
    families: &mut Families<'_>,
    name: &str,
    help: &str,
    unit: Option<&Unit>,
    peers: &[PeerReport],
    value: impl Fn(&PeerReport) -> Option<f64>,
) -> fmt::Result {
    let mut family = families.0.encode_descriptor(name, help, unit, MetricType::Gauge)?;
    for peer in peers {
        if let Some(value) = value(peer) {
            let labels = [("peer", peer.node.as_str())];
            ConstGauge::new(value).encode(family.encode_family(&labels)?)?;
        }
    }
    Ok(())
}

fn carried(families: &mut Families<'_>, measures: &Measures) -> fmt::Result {
    type Number = fn(&Carried) -> u64;
    let mut both = |name: &str, help: &str, unit: Option<&Unit>, ways: [(&str, Number); 2]| -> fmt::Result {
        let mut family = families.0.encode_descriptor(name, help, unit, MetricType::Counter)?;
        for (peer, carried) in &measures.traffic {
            for (way, number) in ways {
                let labels = [("peer", peer.as_str()), ("way", way)];
                ConstCounter::new(number(carried)).encode(family.encode_family(&labels)?)?;
            }
        }
        Ok(())
    };
    let packets: [(&str, Number); 2] = [("sent", |c| c.sent.packets), ("received", |c| c.received.packets)];
    both(
        "ringmail_peer_packets",
        "Inner packets that the peer's SAs carried",
        None,
        packets,
    )?;
    let bytes: [(&str, Number); 2] = [("sent", |c| c.sent.bytes), ("received", |c| c.received.bytes)];
    both("ringmail_peer", "Their bytes", Some(&Unit::Bytes), bytes)?;
    let help = "Packets that the peer's SAs refused: changed on the way, forged, replayed, or too late";
    let each = measures
        .traffic
        .iter()
        .map(|(peer, carried)| (peer.as_str(), carried.errors));
    families.counted("ringmail_peer_refused_packets", help, "peer", each)
}
