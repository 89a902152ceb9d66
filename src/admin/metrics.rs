//! What a monitoring system reads: pure, from one picture of the daemon to text in OpenMetrics 1.0, which Prometheus
//! reads. Names are of Prometheus' conventions (base units, `_total` on counters). Series of single peers are written only
//! where they are wanted ([`PerPeer`]): in a mesh of 5,000 nodes they are 275 million.

mod host;
mod peers;

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};

use crate::epochs::Generation;
use crate::histogram::Histogram;
use crate::kernel::xfrm_errors;
use crate::lease::NodeName;
use crate::node::report::{Report, State};
use crate::node::{Carried, Cause, Headroom, Rotations};
use crate::reconcile::Tally;
use crate::store::Failures;
use crate::store::kube::Datapath;

pub use host::Host;

/// What health is made of, as the daemon's loop tells it. It costs the same for one peer and for 5,000.
#[derive(Clone, Debug, PartialEq)]
pub struct Vitals {
    /// Why the kernel does not answer, if it does not.
    pub kernel: Result<(), String>,
    /// Whether pods on this node have a network.
    pub datapath: Datapath,
    /// Why there is no uplink now, while the last one stays in use.
    pub uplink: Option<String>,
    /// What the node lacks or what is wrong with it; nothing of single peers.
    pub problems: Vec<String>,
}

/// What metrics are made of, as the daemon's loop tells it.
#[derive(Clone, Debug, PartialEq)]
pub struct Measures {
    /// How the node and its peers stand.
    pub report: Report,
    /// Whether pods on this node have a network.
    pub datapath: Datapath,
    /// What was written to the kernel since the start.
    pub tally: Tally,
    /// How long passes took that had something to plan, seconds.
    pub passes: Histogram,
    /// The epochs since the start.
    pub rotations: Rotations,
    /// How many probes asked for an answer.
    pub probes: u64,
    /// How many did not, because data proved the peer.
    pub probes_left_out: u64,
    /// The round trips of those that were answered, seconds.
    pub round_trips: Histogram,
    /// What was carried, by peer.
    pub traffic: BTreeMap<NodeName, Carried>,
    /// What was carried to and from all peers together, gone ones included.
    pub carried: Carried,
    /// The generation that data goes on, by peer.
    pub generations: BTreeMap<NodeName, Generation>,
    /// How near the nearest SA is to its limit.
    pub headroom: Option<Headroom>,
    /// How old an epoch gets; `None` where nothing is encrypted.
    pub rekey_after: Option<Duration>,
    /// Whether a configuration is refused, and an older one in force.
    pub configuration_refused: bool,
    /// For how long the store has not been readable; `None` where it is.
    pub unread: Option<Duration>,
    /// The same of writing.
    pub unwritten: Option<Duration>,
    /// How many calls of the store failed.
    pub store_failures: Failures,
}

/// Whether series of single peers are written.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum PerPeer {
    /// They are: eleven a peer.
    Shown,
    /// Only what is of the node.
    Hidden,
}

/// The text of all metrics. `measures` is absent while the daemon starts.
pub fn text(measures: Option<Measures>, host: Host, per_peer: PerPeer) -> String {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Picture {
        measures,
        host,
        per_peer,
    }));
    let mut text = String::new();
    // Writing to a String can't fail.
    let _ = encode(&mut text, &registry);
    text
}

#[derive(Debug)]
struct Picture {
    measures: Option<Measures>,
    host: Host,
    per_peer: PerPeer,
}

/// Writes families one after the other.
struct Families<'a>(DescriptorEncoder<'a>);

/// Names and values that tell a series from the others of its family.
type Labels<'a> = &'a [(&'a str, &'a str)];
/// The labels and the value of each series of a family.
type Series<'a, T> = &'a [(Labels<'a>, T)];

impl Families<'_> {
    fn gauge(&mut self, name: &str, help: &str, unit: Option<&Unit>, series: Series<'_, f64>) -> fmt::Result {
        let mut family = self.0.encode_descriptor(name, help, unit, MetricType::Gauge)?;
        for (labels, value) in series {
            ConstGauge::new(*value).encode(family.encode_family(labels)?)?;
        }
        Ok(())
    }

    fn counter(&mut self, name: &str, help: &str, unit: Option<&Unit>, series: Series<'_, u64>) -> fmt::Result {
        let mut family = self.0.encode_descriptor(name, help, unit, MetricType::Counter)?;
        for (labels, value) in series {
            ConstCounter::new(*value).encode(family.encode_family(labels)?)?;
        }
        Ok(())
    }

    /// A counter with one label: its name, and the value that it has with each number.
    fn counted<'b>(
        &mut self,
        name: &str,
        help: &str,
        label: &str,
        each: impl IntoIterator<Item = (&'b str, u64)>,
    ) -> fmt::Result {
        let mut family = self.0.encode_descriptor(name, help, None, MetricType::Counter)?;
        for (value, number) in each {
            ConstCounter::new(number).encode(family.encode_family(&[(label, value)])?)?;
        }
        Ok(())
    }

    /// Of seconds.
    fn histogram(&mut self, name: &str, help: &str, seen: &Histogram) -> fmt::Result {
        let unit = Some(&Unit::Seconds);
        let mut family = self.0.encode_descriptor(name, help, unit, MetricType::Histogram)?;
        family.encode_histogram::<[(&str, &str); 0]>(seen.sum(), seen.count(), &seen.buckets(), None)
    }
}

impl Collector for Picture {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let Self {
            measures,
            host,
            per_peer,
        } = self;
        let mut families = Families(encoder);
        process(&mut families, host)?;
        kernel_errors(&mut families, host)?;
        let version: Labels<'_> = &[("version", env!("CARGO_PKG_VERSION"))];
        families.gauge("ringmail_build_info", "The version that runs", None, &[(version, 1.0)])?;
        let Some(measures) = measures else {
            return families.gauge("ringmail_ready", READY, None, &[(&[], 0.0)]);
        };
        node(&mut families, measures)?;
        store(&mut families, measures)?;
        kernel(&mut families, measures)?;
        mesh(&mut families, &measures.report)?;
        keys(&mut families, measures)?;
        traffic(&mut families, measures)?;
        probes(&mut families, measures)?;
        tunnel(&mut families, &measures.report)?;
        match per_peer {
            PerPeer::Shown => peers::each(&mut families, measures),
            PerPeer::Hidden => Ok(()),
        }
    }
}

const READY: &str = "Whether a lease is held, the node's part of the datapath stands and subnet.env is written";

fn process(families: &mut Families<'_>, host: &Host) -> fmt::Result {
    let bytes = Some(&Unit::Bytes);
    let memory = host.memory as f64;
    families.gauge("process_resident_memory", "Resident memory", bytes, &[(&[], memory)])?;
    let seconds = Some(&Unit::Seconds);
    let mut family = families
        .0
        .encode_descriptor("process_cpu", "Processor time", seconds, MetricType::Counter)?;
    ConstCounter::new(host.processor).encode(family.encode_family(&NO_LABELS)?)?;
    let help = "When the process began, since 1970";
    families.gauge("process_start_time", help, seconds, &[(&[], host.began)])?;
    let descriptors = host.descriptors as f64;
    families.gauge("process_open_fds", "Open descriptors", None, &[(&[], descriptors)])
}

const NO_LABELS: [(&str, &str); 0] = [];

/// What the kernel's IPsec dropped; what each counter means stands beside those that are not zero.
fn kernel_errors(families: &mut Families<'_>, host: &Host) -> fmt::Result {
    let counters = host.xfrm.iter().map(|(name, number)| (name.as_str(), *number));
    let help = "Packets that IPsec dropped, by the kernel's counter in /proc/net/xfrm_stat";
    families.counted("ringmail_xfrm_errors", help, "reason", counters)?;
    let help = "What a counter of ringmail_xfrm_errors_total that is not zero means, and what to do";
    let mut family = families
        .0
        .encode_descriptor("ringmail_xfrm_error_info", help, None, MetricType::Gauge)?;
    for (name, _) in host.xfrm.iter().filter(|(_, number)| *number > 0) {
        let meaning = xfrm_errors::explain(name).unwrap_or("a counter of a newer kernel");
        let labels: Labels<'_> = &[("reason", name), ("meaning", meaning)];
        ConstGauge::new(1.0).encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}

fn node(families: &mut Families<'_>, measures: &Measures) -> fmt::Result {
    let truth = |truth: bool| f64::from(u8::from(truth));
    let report = &measures.report;
    families.gauge(
        "ringmail_ready",
        READY,
        None,
        &[(&[], truth(measures.datapath == Datapath::Works))],
    )?;
    let kind: Labels<'_> = &[("backend", &report.backend), ("cipher", &report.cipher)];
    families.gauge(
        "ringmail_backend_info",
        "The backend; without a cipher nothing is encrypted",
        None,
        &[(kind, 1.0)],
    )?;
    let refused = truth(measures.configuration_refused);
    let help = "Whether the newest configuration is refused and an older one in force";
    families.gauge("ringmail_configuration_refused", help, None, &[(&[], refused)])?;
    let help = "What `ringmail status` names as wrong with the node";
    families.gauge("ringmail_problems", help, None, &[(&[], report.problems.len() as f64)])
}

fn store(families: &mut Families<'_>, measures: &Measures) -> fmt::Result {
    let seconds = |span: Option<Duration>| span.unwrap_or_default().as_secs_f64();
    let (read, write): (Labels<'_>, Labels<'_>) = (&[("direction", "read")], &[("direction", "write")]);
    let outages = [(read, seconds(measures.unread)), (write, seconds(measures.unwritten))];
    let help = "For how long the store has failed, and so how old what is known of it may be; 0 while it works";
    families.gauge("ringmail_store_outage", help, Some(&Unit::Seconds), &outages)?;
    let Failures { reading, writing } = measures.store_failures;
    let help = "Calls of the store that failed";
    families.counted(
        "ringmail_store_errors",
        help,
        "direction",
        [("read", reading), ("write", writing)],
    )
}

fn kernel(families: &mut Families<'_>, measures: &Measures) -> fmt::Result {
    let Tally {
        passes: _,
        writes,
        failures,
        repaired,
    } = measures.tally;
    let help = "Operations written to the kernel";
    families.counter("ringmail_kernel_writes", help, None, &[(&[], writes)])?;
    let help = "Of those, which the kernel did not carry out";
    families.counter("ringmail_kernel_write_errors", help, None, &[(&[], failures)])?;
    let help = "Objects in the kernel that another hand had changed, made or removed, and that were put right";
    families.counter("ringmail_drift_repaired", help, None, &[(&[], repaired)])?;
    let help = "How long a pass took that had something to plan";
    families.histogram("ringmail_pass_duration", help, &measures.passes)?;
    let Some(dropped) = &measures.report.plaintext else {
        return Ok(());
    };
    let series = [
        ("arriving", dropped.arriving.packets),
        ("leaving", dropped.leaving.packets),
    ];
    let help = "Packets of the mesh that crossed the uplink without ESP, and were dropped";
    families.counted("ringmail_plaintext_dropped_packets", help, "way", series)
}

const STATES: [State; 6] = [
    State::Up,
    State::Moving,
    State::Kept,
    State::Waiting,
    State::Plain,
    State::Refused,
];

fn mesh(families: &mut Families<'_>, report: &Report) -> fmt::Result {
    let labels = STATES.map(|one| [("state", one.word())]);
    let count = |state| report.peers.iter().filter(|peer| peer.state == state).count() as f64;
    let series: Vec<(Labels<'_>, f64)> = labels
        .iter()
        .zip(STATES)
        .map(|(labels, state)| (labels.as_slice(), count(state)))
        .collect();
    families.gauge("ringmail_peers", "Other nodes, by how they stand", None, &series)?;
    let silent = report.peers.iter().filter(|peer| peer.silent.is_some()).count() as f64;
    let help = "Peers that data goes to and that have stopped answering probes";
    families.gauge("ringmail_silent_peers", help, None, &[(&[], silent)])?;
    let rejected = report.rejected.len() as f64;
    families.gauge(
        "ringmail_leases_rejected",
        "What the store holds that is no lease",
        None,
        &[(&[], rejected)],
    )
}

/// A cause of an epoch as the label has it.
fn cause(cause: Cause) -> &'static str {
    match cause {
        Cause::Start => "start",
        Cause::Asked => "asked",
        Cause::Changed => "changed",
        Cause::Lost => "lost",
        Cause::Returned => "returned",
        Cause::Moved => "moved",
        Cause::Alike => "alike",
        Cause::Limit => "limit",
        Cause::Aged => "aged",
    }
}

const CAUSES: [Cause; 9] = [
    Cause::Start,
    Cause::Asked,
    Cause::Changed,
    Cause::Lost,
    Cause::Returned,
    Cause::Moved,
    Cause::Alike,
    Cause::Limit,
    Cause::Aged,
];

fn keys(families: &mut Families<'_>, measures: &Measures) -> fmt::Result {
    let report = &measures.report;
    let seconds = Some(&Unit::Seconds);
    let (epoch, age) = (report.epoch.unwrap_or_default(), report.epoch_age.unwrap_or_default());
    let help = "The number of the newest own epoch, at least the Unix time of its birth; 0 where there is none";
    families.gauge("ringmail_epoch", help, None, &[(&[], epoch as f64)])?;
    let help = "The age of the newest own epoch";
    families.gauge("ringmail_epoch_age", help, seconds, &[(&[], age as f64)])?;
    if let Some(after) = measures.rekey_after {
        let help = "The age at which an epoch is followed by another: RekeyAfter";
        families.gauge("ringmail_rekey_after", help, seconds, &[(&[], after.as_secs_f64())])?;
    }
    let rotations = &measures.rotations;
    let begun = |one| rotations.begun.get(&one).copied().unwrap_or_default();
    let series = CAUSES.map(|one| (cause(one), begun(one)));
    let help = "Epochs that began, by the cause";
    families.counted("ringmail_rotations", help, "cause", series)?;
    let help = "From an epoch's begin until the data of every peer that had any is on it";
    families.histogram("ringmail_rotation_duration", help, &rotations.took)?;
    let help = "Epochs that a peer did not move to before the next one, or in ten minutes";
    families.counter(
        "ringmail_rotations_unfinished",
        help,
        None,
        &[(&[], rotations.unfinished)],
    )?;
    if let Some(Headroom { packets, spent }) = measures.headroom {
        let help = "The fewest packets that an SA may carry until a new epoch is wanted";
        families.gauge(
            "ringmail_soft_limit_remaining_packets",
            help,
            None,
            &[(&[], packets as f64)],
        )?;
        let help = "The largest share of packets or bytes that an SA has carried of its soft limit; the hard one is at 2 or above";
        families.gauge("ringmail_soft_limit_used_ratio", help, None, &[(&[], spent)])?;
    }
    let withdrawn = report.psks.iter().filter(|psk| psk.withdrawn);
    let (gone, needed) = withdrawn.fold((0, 0), |(gone, needed), psk| (gone + 1, needed + psk.needed_by.len()));
    let (held, left): (Labels<'_>, Labels<'_>) = (&[("state", "held")], &[("state", "withdrawn")]);
    let series = [(held, (report.psks.len() - gone) as f64), (left, gone as f64)];
    families.gauge("ringmail_psks", "Pre-shared keys", None, &series)?;
    let help = "Peers that have nothing newer than a withdrawn PSK, and are cut when it is dropped";
    families.gauge(
        "ringmail_psk_withdrawn_needed_peers",
        help,
        None,
        &[(&[], needed as f64)],
    )
}

/// Sums over all peers, gone ones included.
fn traffic(families: &mut Families<'_>, measures: &Measures) -> fmt::Result {
    if measures.rekey_after.is_none() {
        // No SA counts where nothing is encrypted.
        return Ok(());
    }
    let Carried { sent, received, errors } = measures.carried;
    let (out, within): (Labels<'_>, Labels<'_>) = (&[("way", "sent")], &[("way", "received")]);
    let help = "Inner packets that SAs carried";
    let packets = [(out, sent.packets), (within, received.packets)];
    families.counter("ringmail_esp_packets", help, None, &packets)?;
    let bytes = [(out, sent.bytes), (within, received.bytes)];
    families.counter("ringmail_esp", "Their bytes", Some(&Unit::Bytes), &bytes)?;
    let help = "Packets that SAs refused: changed on the way, forged, replayed, or too late";
    families.counter("ringmail_esp_refused_packets", help, None, &[(&[], errors)])
}

fn probes(families: &mut Families<'_>, measures: &Measures) -> fmt::Result {
    if measures.rekey_after.is_none() {
        return Ok(());
    }
    let (asked, answered) = (measures.probes, measures.round_trips.count());
    let help = "Probes that asked a peer for an answer";
    families.counter("ringmail_probes_sent", help, None, &[(&[], asked)])?;
    families.counter(
        "ringmail_probes_answered",
        "Of those, which were answered",
        None,
        &[(&[], answered)],
    )?;
    let help = "Probes that were not sent, because data from the peer proved it";
    families.counter(
        "ringmail_probes_left_out",
        help,
        None,
        &[(&[], measures.probes_left_out)],
    )?;
    let help = "Round trips of the answered probes, through the tunnels";
    families.histogram("ringmail_probe_round_trip", help, &measures.round_trips)
}

fn tunnel(families: &mut Families<'_>, report: &Report) -> fmt::Result {
    let Some(tunnel) = &report.tunnel else { return Ok(()) };
    let (sent, received): (Labels<'_>, Labels<'_>) = (&[("way", "sent")], &[("way", "received")]);
    let packets = [(sent, tunnel.sent_packets), (received, tunnel.received_packets)];
    families.counter(
        "ringmail_tunnel_packets",
        "Inner packets that the udp backend carried",
        None,
        &packets,
    )?;
    let bytes = [(sent, tunnel.sent_bytes), (received, tunnel.received_bytes)];
    families.counter("ringmail_tunnel", "Their bytes", Some(&Unit::Bytes), &bytes)?;
    let dropped = tunnel.dropped.iter().map(|(number, reason)| (reason, number));
    let help = "Packets that the udp backend dropped";
    families.counted("ringmail_tunnel_dropped_packets", help, "reason", dropped)
}

#[cfg(test)]
pub(crate) mod sample;
#[cfg(test)]
mod tests;
