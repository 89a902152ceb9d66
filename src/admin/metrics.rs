//! What a monitoring system reads: pure, from one picture of the daemon to text in OpenMetrics 1.0, which Prometheus
//! reads. Names are of Prometheus' conventions (base units, `_total` on counters). No series has a peer's name: in a mesh
//! of 5,000 nodes that would be 25 million of them.

use std::fmt;
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::{Registry, Unit};

use crate::node::report::{Report, State};
use crate::store::kube::Datapath;

/// What health and metrics are made of, as the daemon's loop tells it.
#[derive(Clone, Debug, PartialEq)]
pub struct Measures {
    /// How the node and its peers stand.
    pub report: Report,
    /// Why the kernel does not answer, if it does not.
    pub kernel: Result<(), String>,
    /// Whether pods on this node have a network.
    pub datapath: Datapath,
    /// Operations written to the kernel since the start.
    pub writes: u64,
    /// Whether a configuration is refused, and an older one in force.
    pub configuration_refused: bool,
    /// For how long the store has not been readable; `None` where it is.
    pub unread: Option<Duration>,
    /// The same of writing.
    pub unwritten: Option<Duration>,
}

/// What the system says of this process and of IPsec.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Host {
    /// Resident memory, bytes.
    pub memory: u64,
    /// Processor time, seconds.
    pub processor: f64,
    /// Open descriptors.
    pub descriptors: u64,
    /// The kernel's counters of IPsec's errors, by their names there.
    pub xfrm: Vec<(String, u64)>,
}

impl Host {
    /// Reads it of the calling process and of its network namespace. What can't be read is zero, or not there.
    pub fn read() -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let per = |name| {
            nix::unistd::sysconf(name)
                .ok()
                .flatten()
                .and_then(|value| u64::try_from(value).ok())
        };
        let page = per(nix::unistd::SysconfVar::PAGE_SIZE).unwrap_or(4096);
        let ticks = per(nix::unistd::SysconfVar::CLK_TCK).unwrap_or(100);
        Self {
            memory: resident_pages(&read("/proc/self/statm")) * page,
            processor: processor_ticks(&read("/proc/self/stat")) as f64 / ticks as f64,
            descriptors: std::fs::read_dir("/proc/self/fd").map_or(0, |entries| entries.count() as u64),
            xfrm: xfrm_counters(&read("/proc/thread-self/net/xfrm_stat")),
        }
    }
}

/// The second number of /proc/PID/statm (proc(5)).
fn resident_pages(statm: &str) -> u64 {
    let resident = statm.split_whitespace().nth(1);
    resident.and_then(|pages| pages.parse().ok()).unwrap_or_default()
}

/// `utime` and `stime` of /proc/PID/stat (proc(5)), the 14th and 15th field; the second is a name that may hold spaces.
fn processor_ticks(stat: &str) -> u64 {
    let Some((_, after_name)) = stat.rsplit_once(") ") else {
        return 0;
    };
    let times = after_name.split(' ').skip(11).take(2);
    times.filter_map(|ticks| ticks.parse::<u64>().ok()).sum()
}

/// /proc/net/xfrm_stat (Documentation/networking/xfrm_proc.rst): a name and a number a line.
fn xfrm_counters(text: &str) -> Vec<(String, u64)> {
    let line = |line: &str| {
        let (name, number) = line.trim().split_once(char::is_whitespace)?;
        Some((name.to_owned(), number.trim().parse().ok()?))
    };
    text.lines().filter_map(line).collect()
}

/// The text of all metrics. `measures` is absent while the daemon starts.
pub fn text(measures: Option<&Measures>, host: &Host) -> String {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(Picture {
        measures: measures.cloned(),
        host: host.clone(),
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
}

impl Collector for Picture {
    fn encode(&self, encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut families = Families(encoder);
        process(&mut families, &self.host)?;
        let version: Labels<'_> = &[("version", env!("CARGO_PKG_VERSION"))];
        families.gauge("ringmail_build_info", "The version that runs", None, &[(version, 1.0)])?;
        let Some(measures) = &self.measures else {
            return families.gauge("ringmail_ready", READY, None, &[(&[], 0.0)]);
        };
        node(&mut families, measures)?;
        mesh(&mut families, &measures.report)?;
        tunnel(&mut families, &measures.report)
    }
}

const READY: &str = "Whether a lease is held, the node's part of the datapath stands and subnet.env is written";

fn process(families: &mut Families<'_>, host: &Host) -> fmt::Result {
    let Host {
        memory,
        processor,
        descriptors,
        xfrm,
    } = host;
    let bytes = Some(&Unit::Bytes);
    families.gauge(
        "process_resident_memory",
        "Resident memory",
        bytes,
        &[(&[], *memory as f64)],
    )?;
    let mut family = families.0.encode_descriptor(
        "process_cpu",
        "Processor time",
        Some(&Unit::Seconds),
        MetricType::Counter,
    )?;
    ConstCounter::new(*processor).encode(family.encode_family(&NO_LABELS)?)?;
    families.gauge(
        "process_open_fds",
        "Open descriptors",
        None,
        &[(&[], *descriptors as f64)],
    )?;
    let labels: Vec<[(&str, &str); 1]> = xfrm.iter().map(|(name, _)| [("reason", name.as_str())]).collect();
    let series: Vec<(Labels<'_>, u64)> = labels
        .iter()
        .zip(xfrm)
        .map(|(labels, (_, number))| (labels.as_slice(), *number))
        .collect();
    let help = "Packets that IPsec dropped, by the kernel's counter in /proc/net/xfrm_stat";
    families.counter("ringmail_xfrm_errors", help, None, &series)
}

const NO_LABELS: [(&str, &str); 0] = [];

fn node(families: &mut Families<'_>, measures: &Measures) -> fmt::Result {
    let truth = |truth: bool| f64::from(u8::from(truth));
    let seconds = |span: Option<Duration>| span.unwrap_or_default().as_secs_f64();
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
    families.gauge("ringmail_problems", help, None, &[(&[], report.problems.len() as f64)])?;
    let (read, write): (Labels<'_>, Labels<'_>) = (&[("direction", "read")], &[("direction", "write")]);
    let outages = [(read, seconds(measures.unread)), (write, seconds(measures.unwritten))];
    let help = "For how long the store has failed; 0 while it works";
    families.gauge("ringmail_store_outage", help, Some(&Unit::Seconds), &outages)?;
    let help = "Operations written to the kernel";
    families.counter("ringmail_kernel_writes", help, None, &[(&[], measures.writes)])?;
    if let Some(dropped) = &report.plaintext {
        let (arriving, leaving): (Labels<'_>, Labels<'_>) = (&[("way", "arriving")], &[("way", "leaving")]);
        let series = [(arriving, dropped.arriving.packets), (leaving, dropped.leaving.packets)];
        let help = "Packets of the mesh that crossed the uplink without ESP, and were dropped";
        families.counter("ringmail_plaintext_dropped_packets", help, None, &series)?;
    }
    Ok(())
}

fn mesh(families: &mut Families<'_>, report: &Report) -> fmt::Result {
    let states = [
        ("up", State::Up),
        ("moving", State::Moving),
        ("kept", State::Kept),
        ("waiting", State::Waiting),
        ("plain", State::Plain),
        ("refused", State::Refused),
    ];
    let labels = states.map(|(name, _)| [("state", name)]);
    let count = |state| report.peers.iter().filter(|peer| peer.state == state).count() as f64;
    let series: Vec<(Labels<'_>, f64)> = labels
        .iter()
        .zip(states)
        .map(|(labels, (_, state))| (labels.as_slice(), count(state)))
        .collect();
    families.gauge("ringmail_peers", "Other nodes, by how they stand", None, &series)?;
    let rejected = report.rejected.len() as f64;
    families.gauge(
        "ringmail_leases_rejected",
        "What the store holds that is no lease",
        None,
        &[(&[], rejected)],
    )?;
    let (epoch, age) = (report.epoch.unwrap_or_default(), report.epoch_age.unwrap_or_default());
    let help = "The number of the newest own epoch, at least the Unix time of its birth; 0 where there is none";
    families.gauge("ringmail_epoch", help, None, &[(&[], epoch as f64)])?;
    let help = "The age of the newest own epoch";
    families.gauge("ringmail_epoch_age", help, Some(&Unit::Seconds), &[(&[], age as f64)])?;
    let withdrawn = report.psks.iter().filter(|psk| psk.withdrawn).count();
    let (held, gone): (Labels<'_>, Labels<'_>) = (&[("state", "held")], &[("state", "withdrawn")]);
    let series = [(held, (report.psks.len() - withdrawn) as f64), (gone, withdrawn as f64)];
    families.gauge("ringmail_psks", "Pre-shared keys", None, &series)
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
    let dropped: Vec<(u64, &str)> = tunnel.dropped.iter().collect();
    let labels: Vec<[(&str, &str); 1]> = dropped.iter().map(|(_, reason)| [("reason", *reason)]).collect();
    let series: Vec<(Labels<'_>, u64)> = labels
        .iter()
        .zip(&dropped)
        .map(|(labels, (number, _))| (labels.as_slice(), *number))
        .collect();
    families.counter(
        "ringmail_tunnel_dropped_packets",
        "Packets that the udp backend dropped",
        None,
        &series,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_proc_says_is_read() {
        assert_eq!(resident_pages("2501 1210 900 300 0 400 0\n"), 1210);
        let stat = "7 (a b) c) S 1 7 7 0 -1 4194560 100 0 0 0 250 31 0 0 20 0 3 0 99 1 2 3";
        assert_eq!(processor_ticks(stat), 281);
        let xfrm = "XfrmInError             \t0\nXfrmInNoStates          \t17\nnonsense\n";
        let wanted = vec![("XfrmInError".to_owned(), 0), ("XfrmInNoStates".to_owned(), 17)];
        assert_eq!(xfrm_counters(xfrm), wanted);
        for text in ["", " ", ")", "1 (x) S", "\u{0}\n\n"] {
            assert_eq!((resident_pages(text), processor_ticks(text)), (0, 0), "{text:?}");
            assert_eq!(xfrm_counters(text), Vec::new(), "{text:?}");
        }
        let here = Host::read();
        assert!(here.memory > 1 << 20 && here.descriptors > 2, "{here:?}");
    }
}
