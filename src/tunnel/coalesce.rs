//! Packets of a flow that follow each other into one large packet for the device: the reverse of `split`, and only where
//! `split` would give back the very same packets.
//!
//! A large packet is written with the checksum left to do, which tells the kernel to trust it. So every checksum is
//! looked at before: what is damaged goes on alone, and the kernel drops it.

use super::checksum;
use super::packet::{FRAGMENT, Ip, TCP, UDP, be16, be32, put16, set_header_checksum};
use super::virtio::{Gso, Header};

/// Flows that are gathered at one time. They are all given out at the end of a batch of messages.
const FLOWS: usize = 16;

/// Bytes of a large packet, so that its length fits its header.
const LARGEST: usize = 65_535;

/// Segments of a large packet at most.
const MOST_SEGMENTS: usize = 128;

/// UDP ports of tunnels (VXLAN, flannel's VXLAN, Geneve): until 6.8.4 a kernel that ends such a tunnel itself loses large
/// packets of them (tailscale/tailscale#11026).
const TUNNEL_PORTS: [u16; 3] = [4789, 8472, 6081];

const ACK: u8 = 0x10;
const PSH: u8 = 0x08;

/// Where large packets go, and all others: header, packet, how many it stands for.
pub(super) trait Sink {
    /// Takes one packet.
    fn take(&mut self, header: &Header, packet: &[u8], segments: usize);
}

/// Gathers packets of a batch.
#[derive(Debug)]
pub(super) struct Coalescer {
    /// Whether TCP is gathered.
    pub(super) tcp: bool,
    /// Whether UDP is gathered.
    pub(super) udp: bool,
    slots: Vec<Slot>,
    /// Slots in use in order of their opening, then those that are free; the last used of those first, since its memory
    /// is in the cache.
    order: Vec<usize>,
    used: usize,
}

/// One flow's packet that grows.
#[derive(Debug)]
struct Slot {
    buffer: Vec<u8>,
    length: usize,
    shape: Shape,
    size: usize,
    segments: usize,
}

/// What was read of a TCP or UDP packet.
#[derive(Clone, Copy, Debug)]
struct Shape {
    ip: Ip,
    udp: bool,
    /// Bytes of all headers; up to the end of the ports where nothing can be merged.
    headers: usize,
    /// It may open a large packet or be added to one, as far as can be seen of it alone.
    mergeable: bool,
}

/// What may happen to other flows' packets before a packet goes on.
enum Class {
    /// It belongs to a flow that may be gathered.
    Flow(Shape),
    /// Of no such flow: it may pass by all.
    Apart,
    /// It may belong to any flow.
    Unclear,
}

impl Coalescer {
    pub(super) fn new(tcp: bool, udp: bool) -> Self {
        let empty = Shape {
            ip: Ip {
                v6: false,
                header: 20,
                total: 20,
                protocol: TCP,
                fragment: false,
            },
            udp: false,
            headers: 20,
            mergeable: false,
        };
        let slot = || Slot {
            buffer: vec![0; LARGEST],
            length: 0,
            shape: empty,
            size: 0,
            segments: 0,
        };
        let count = if tcp || udp { FLOWS } else { 0 };
        Self {
            tcp,
            udp,
            slots: (0..count).map(|_| slot()).collect(),
            order: (0..count).collect(),
            used: 0,
        }
    }

    /// Takes a packet of exactly the length that its IP header says. What can't wait goes to `sink` at once, behind what
    /// of its flow was held.
    pub(super) fn push(&mut self, ip: Ip, packet: &[u8], sink: &mut impl Sink) {
        let shape = match self.class(ip, packet) {
            Class::Flow(shape) => shape,
            Class::Apart => return sink.take(&Header::default(), packet, 1),
            Class::Unclear => {
                self.flush(sink);
                return sink.take(&Header::default(), packet, 1);
            }
        };
        let found = (0..self.used)
            .rev()
            .find(|place| self.slots[self.order[*place]].is_flow_of(&shape, packet));
        if !shape.mergeable || !intact(&shape, packet) {
            if let Some(place) = found {
                self.give(place, sink);
            }
            return sink.take(&Header::default(), packet, 1);
        }
        if let Some(place) = found {
            let slot = &mut self.slots[self.order[place]];
            if slot.fits(&shape, packet) {
                if slot.add(&shape, packet) {
                    self.give(place, sink);
                }
                return;
            }
            self.give(place, sink);
        }
        if ends(&shape, packet) {
            return sink.take(&Header::default(), packet, 1);
        }
        if self.used == self.slots.len() {
            self.give(0, sink);
        }
        self.slots[self.order[self.used]].open(shape, packet);
        self.used += 1;
    }

    /// Gives all that is held to `sink`, the oldest first.
    pub(super) fn flush(&mut self, sink: &mut impl Sink) {
        while self.used > 0 {
            self.give(0, sink);
        }
    }

    fn give(&mut self, place: usize, sink: &mut impl Sink) {
        self.slots[self.order[place]].give(sink);
        // To the first free place, so that it is opened next.
        self.order[place..self.used].rotate_left(1);
        self.used -= 1;
    }

    fn class(&self, ip: Ip, packet: &[u8]) -> Class {
        let udp = ip.protocol == UDP;
        if ip.fragment {
            return Class::Unclear;
        }
        match ip.protocol {
            TCP if !self.tcp => return Class::Apart,
            UDP if !self.udp => return Class::Apart,
            TCP | UDP => {}
            // Extension headers, behind which there may be anything; 59 is "nothing".
            0 | 43 | FRAGMENT | 51 | 60 | 135 if ip.v6 => return Class::Unclear,
            _ => return Class::Apart,
        }
        let Some(transport) = packet.get(ip.header..).filter(|transport| transport.len() >= 8) else {
            return Class::Unclear;
        };
        let plain = ip.v6 || ip.header == 20;
        let (headers, mergeable) = if udp {
            let tunnel = [0, 2].iter().any(|at| TUNNEL_PORTS.contains(&be16(transport, *at)));
            let whole = usize::from(be16(transport, 4)) == transport.len();
            (ip.header + 8, plain && whole && !tunnel && be16(transport, 6) != 0)
        } else if transport.len() >= 20 {
            let header = usize::from(transport[12] >> 4) * 4;
            let good = (20..=transport.len()).contains(&header);
            // Anything else a segment says, it says at this place of the stream.
            let bare = transport[13] & !PSH == ACK && transport[12] & 15 == 0 && transport[18..20] == [0, 0];
            (ip.header + header, plain && good && bare)
        } else {
            (ip.header, false)
        };
        Class::Flow(Shape {
            ip,
            udp,
            headers,
            // Without payload there is nothing to merge: acknowledgements go on alone.
            mergeable: mergeable && packet.len() > headers,
        })
    }
}

/// Whether both checksums are right.
fn intact(shape: &Shape, packet: &[u8]) -> bool {
    let ip = shape.ip;
    let transport = &packet[ip.header..];
    let protocol = if shape.udp { UDP } else { TCP };
    (ip.v6 || checksum::holds(checksum::sum(&packet[..ip.header])))
        && checksum::holds(checksum::sum(transport) + ip.pseudo_sum(packet, protocol, transport.len()))
}

/// Whether nothing may be added behind this packet.
fn ends(shape: &Shape, packet: &[u8]) -> bool {
    !shape.udp && packet[shape.ip.header + 13] & PSH != 0
}

impl Slot {
    fn is_flow_of(&self, shape: &Shape, packet: &[u8]) -> bool {
        let (own, other) = (self.shape.ip, shape.ip);
        own.v6 == other.v6
            && self.shape.udp == shape.udp
            && self.buffer[own.header..own.header + 4] == packet[other.header..other.header + 4]
            && self.buffer[own.addresses()] == packet[other.addresses()]
    }

    fn open(&mut self, shape: Shape, packet: &[u8]) {
        self.buffer[..packet.len()].copy_from_slice(packet);
        self.length = packet.len();
        self.shape = shape;
        self.size = packet.len() - shape.headers;
        self.segments = 1;
    }

    /// Whether the packet is the next of this flow, and `split` would make it again.
    fn fits(&self, shape: &Shape, packet: &[u8]) -> bool {
        let payload = packet.len() - shape.headers;
        let (held, at) = (&self.buffer, shape.ip.header);
        let same = |range: std::ops::Range<usize>| held[range.clone()] == packet[range];
        if shape.headers != self.shape.headers
            || payload > self.size
            || self.length + payload > LARGEST
            || self.segments == MOST_SEGMENTS
        {
            return false;
        }
        let ip_fits = if shape.ip.v6 {
            // Traffic class and flow label, hop limit.
            same(0..4) && same(7..8)
        } else {
            // Type of service, flags, time to live; and numbers that follow each other.
            let next = be16(held, 4).wrapping_add(self.segments as u16);
            same(0..2) && same(6..9) && be16(packet, 4) == next
        };
        if shape.udp {
            return ip_fits;
        }
        // All that `split` gives to each: acknowledgement, window, options.
        let next = be32(held, at + 4).wrapping_add((self.length - self.shape.headers) as u32);
        ip_fits
            && be32(packet, at + 4) == next
            && same(at + 8..at + 13)
            && same(at + 14..at + 16)
            && same(at + 20..shape.headers)
    }

    /// Adds a packet that fits; whether nothing may follow it.
    fn add(&mut self, shape: &Shape, packet: &[u8]) -> bool {
        let payload = &packet[shape.headers..];
        self.buffer[self.length..self.length + payload.len()].copy_from_slice(payload);
        self.length += payload.len();
        self.segments += 1;
        if !shape.udp {
            // Only PSH can differ, and then this is the last.
            self.buffer[shape.ip.header + 13] = packet[shape.ip.header + 13];
        }
        payload.len() < self.size || ends(shape, packet)
    }

    fn give(&mut self, sink: &mut impl Sink) {
        let (ip, udp) = (self.shape.ip, self.shape.udp);
        let packet = &mut self.buffer[..self.length];
        if self.segments == 1 {
            return sink.take(&Header::default(), packet, 1);
        }
        let total = packet.len();
        if ip.v6 {
            put16(packet, 4, (total - 40) as u16);
        } else {
            put16(packet, 2, total as u16);
            set_header_checksum(packet, ip.header);
        }
        let length = total - ip.header;
        let (field, protocol) = if udp { (6, UDP) } else { (16, TCP) };
        if udp {
            put16(packet, ip.header + 4, length as u16);
        }
        // The sum of the pseudo-header as it is, which the kernel goes on from.
        let sum = checksum::fold(ip.pseudo_sum(packet, protocol, length));
        packet[ip.header + field..ip.header + field + 2].copy_from_slice(&sum.to_ne_bytes());
        let header = Header {
            needs_csum: true,
            gso: match (udp, ip.v6) {
                (true, _) => Gso::Udp,
                (false, true) => Gso::Tcp6,
                (false, false) => Gso::Tcp4,
            },
            header_length: self.shape.headers as u16,
            gso_size: self.size as u16,
            csum_start: ip.header as u16,
            csum_offset: field as u16,
        };
        sink.take(&header, packet, self.segments);
    }
}

#[cfg(test)]
mod tests;
