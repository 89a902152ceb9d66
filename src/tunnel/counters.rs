//! What passed and what was dropped, counted by each worker and read by anyone.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

/// What a tunnel has done since its start, over all workers.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct Counters {
    /// Inner packets that were sent to peers, each of a segmented one counted.
    pub sent_packets: u64,
    /// Their bytes, from the inner IP header on.
    pub sent_bytes: u64,
    /// UDP messages that were given to the kernel; packets over messages is how well `UDP_SEGMENT` does.
    pub sent_messages: u64,
    /// Packets, large or not, that were read from the device.
    pub device_reads: u64,
    /// Inner packets that were given to the device, before they were merged.
    pub received_packets: u64,
    /// Their bytes, from the inner IP header on.
    pub received_bytes: u64,
    /// UDP messages that came, merged by `UDP_GRO` or not.
    pub received_messages: u64,
    /// Writes to the device; packets over writes is how well coalescing does.
    pub device_writes: u64,
    /// What was dropped, by reason.
    pub dropped: Dropped,
    /// ICMP errors that were sent to inner sources.
    pub icmp_sent: u64,
    /// Errors of peers that the sockets told (connection refused, host unreachable); nothing is dropped for them.
    pub peer_errors: u64,
    /// Messages that the kernel refused to segment and that went as single datagrams.
    pub segment_refusals: u64,
    /// What is in use, and why not.
    pub offloads: Offloads,
}

/// Packets that were dropped, by reason. From [`Self::no_lease`] on those that came from peers.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct Dropped {
    /// No peer has a subnet with the destination.
    pub no_route: u64,
    /// From the device, and not an IP packet or of a shape that can't be split.
    pub malformed: u64,
    /// Larger than the MTU and not to be fragmented.
    pub too_big: u64,
    /// The time to live had run out, either way.
    pub ttl: u64,
    /// The socket refused it: no route to the peer, no memory, no socket of the peer's family.
    pub send: u64,
    /// From an address that holds no lease.
    pub no_lease: u64,
    /// From a peer, with an inner source in another peer's subnet or in this node's own.
    pub foreign_source: u64,
    /// From a peer, and not a whole IP packet.
    pub received_malformed: u64,
    /// The device took it not: it is down, or the kernel has no memory.
    pub device: u64,
}

/// Whether an offload is in use; as JSON a text, "on" or "off: …".
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(from = "String", into = "String")]
pub enum Offload {
    /// It is.
    #[default]
    On,
    /// It is not, and why.
    Off(String),
}

/// What is in use of the kernel's offloads.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(default)]
pub struct Offloads {
    /// `virtio_net_hdr` and segmentation of TCP at the device.
    pub vnet_header: Offload,
    /// Segmentation of UDP at the device (USO, Linux 6.2).
    pub udp_split: Offload,
    /// Large TCP packets written to the device.
    pub tcp_coalescing: Offload,
    /// Large UDP packets written to the device.
    pub udp_coalescing: Offload,
    /// Many datagrams in one sent message.
    pub udp_segment: Offload,
    /// Many datagrams in one received message.
    pub udp_gro: Offload,
}

impl Dropped {
    /// The numbers, each with its reason in words.
    pub fn iter(&self) -> impl Iterator<Item = (u64, &'static str)> + use<> {
        [
            (self.no_lease, "from an address without a lease"),
            (self.foreign_source, "with a source of another node's"),
            (self.received_malformed, "not a whole packet"),
            (self.no_route, "without a route"),
            (self.too_big, "larger than the MTU"),
            (self.ttl, "with no time to live left"),
            (self.malformed, "malformed by a pod"),
            (self.send, "refused by the socket"),
            (self.device, "refused by the device"),
        ]
        .into_iter()
    }
}

impl Offloads {
    /// Each with its name.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, &Offload)> {
        [
            ("segmentation at the device", &self.vnet_header),
            ("segmentation of UDP at the device", &self.udp_split),
            ("coalescing of TCP", &self.tcp_coalescing),
            ("coalescing of UDP", &self.udp_coalescing),
            ("UDP_SEGMENT", &self.udp_segment),
            ("UDP_GRO", &self.udp_gro),
        ]
        .into_iter()
    }
}

impl From<String> for Offload {
    fn from(text: String) -> Self {
        match text.strip_prefix("off: ") {
            Some(reason) => Self::Off(reason.to_owned()),
            None => Self::On,
        }
    }
}

impl From<Offload> for String {
    fn from(offload: Offload) -> Self {
        offload.to_string()
    }
}

impl fmt::Display for Offload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::On => f.write_str("on"),
            Self::Off(reason) => write!(f, "off: {reason}"),
        }
    }
}

/// A counter with one writer.
#[derive(Debug, Default)]
pub(super) struct Count(AtomicU64);

impl Count {
    /// Adds; not a read-modify-write of the bus, since only the owning worker writes.
    pub(super) fn add(&self, more: u64) {
        self.0
            .store(self.0.load(Ordering::Relaxed).wrapping_add(more), Ordering::Relaxed);
    }

    pub(super) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// One worker's counters; the fields are those of [`Counters`] and [`Dropped`]. Aligned so that neighbours do not share
/// a cache line (128 bytes where lines come in pairs).
#[derive(Debug, Default)]
#[repr(align(128))]
pub(super) struct Cell {
    pub(super) sent_packets: Count,
    pub(super) sent_bytes: Count,
    pub(super) sent_messages: Count,
    pub(super) device_reads: Count,
    pub(super) received_packets: Count,
    pub(super) received_bytes: Count,
    pub(super) received_messages: Count,
    pub(super) device_writes: Count,
    pub(super) icmp_sent: Count,
    pub(super) peer_errors: Count,
    pub(super) segment_refusals: Count,
    pub(super) no_route: Count,
    pub(super) malformed: Count,
    pub(super) too_big: Count,
    pub(super) ttl: Count,
    pub(super) send: Count,
    pub(super) no_lease: Count,
    pub(super) foreign_source: Count,
    pub(super) received_malformed: Count,
    pub(super) device: Count,
}

impl Cell {
    pub(super) fn add_to(&self, sum: &mut Counters) {
        sum.sent_packets += self.sent_packets.get();
        sum.sent_bytes += self.sent_bytes.get();
        sum.sent_messages += self.sent_messages.get();
        sum.device_reads += self.device_reads.get();
        sum.received_packets += self.received_packets.get();
        sum.received_bytes += self.received_bytes.get();
        sum.received_messages += self.received_messages.get();
        sum.device_writes += self.device_writes.get();
        sum.icmp_sent += self.icmp_sent.get();
        sum.peer_errors += self.peer_errors.get();
        sum.segment_refusals += self.segment_refusals.get();
        sum.dropped.no_route += self.no_route.get();
        sum.dropped.malformed += self.malformed.get();
        sum.dropped.too_big += self.too_big.get();
        sum.dropped.ttl += self.ttl.get();
        sum.dropped.send += self.send.get();
        sum.dropped.no_lease += self.no_lease.get();
        sum.dropped.foreign_source += self.foreign_source.get();
        sum.dropped.received_malformed += self.received_malformed.get();
        sum.dropped.device += self.device.get();
    }
}
