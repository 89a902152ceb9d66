//! Packets for tests, made the slow way.

use proptest::prelude::*;

use super::packet::{TCP, UDP};
use super::virtio::{Gso, Header};

/// One TCP or UDP flow's next bytes.
#[derive(Clone, Debug)]
pub(super) struct Made {
    pub(super) v6: bool,
    pub(super) udp: bool,
    pub(super) ports: (u16, u16),
    pub(super) id: u16,
    pub(super) ttl: u8,
    pub(super) tos: u8,
    pub(super) seq: u32,
    pub(super) ack: u32,
    pub(super) flags: u8,
    pub(super) window: u16,
    /// A multiple of four bytes, of TCP.
    pub(super) options: Vec<u8>,
    pub(super) payload: Vec<u8>,
}

impl Made {
    pub(super) fn tcp(payload: usize) -> Self {
        Self {
            v6: false,
            udp: false,
            ports: (1000, 2000),
            id: 7,
            ttl: 64,
            tos: 0,
            seq: 1,
            ack: 2,
            flags: 0x10,
            window: 500,
            options: vec![],
            payload: (0..payload).map(|index| (index * 7 + index / 251) as u8).collect(),
        }
    }

    pub(super) fn udp(payload: usize) -> Self {
        Self {
            udp: true,
            ..Self::tcp(payload)
        }
    }

    fn protocol(&self) -> u8 {
        if self.udp { UDP } else { TCP }
    }

    fn ip_header(&self) -> usize {
        if self.v6 { 40 } else { 20 }
    }

    /// IP and transport header, with lengths for this payload and checksums 0.
    fn headers(&self, index: usize, count: usize, size: usize, payload: usize) -> Vec<u8> {
        let transport = if self.udp { 8 } else { 20 + self.options.len() };
        let mut bytes = Vec::new();
        if self.v6 {
            bytes.extend([0x60 | self.tos >> 4, self.tos << 4, 0, 9]);
            bytes.extend(((transport + payload) as u16).to_be_bytes());
            bytes.extend([self.protocol(), self.ttl]);
            bytes.extend([0xfd, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
            bytes.extend([0xfd, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
        } else {
            bytes.extend([0x45, self.tos]);
            bytes.extend(((20 + transport + payload) as u16).to_be_bytes());
            bytes.extend(self.id.wrapping_add(index as u16).to_be_bytes());
            bytes.extend([0x40, 0, self.ttl, self.protocol(), 0, 0, 10, 244, 1, 5, 10, 244, 2, 6]);
            let sum = !rfc1071(&bytes);
            bytes[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        bytes.extend(self.ports.0.to_be_bytes());
        bytes.extend(self.ports.1.to_be_bytes());
        if self.udp {
            bytes.extend(((8 + payload) as u16).to_be_bytes());
            bytes.extend([0, 0]);
        } else {
            let mut flags = self.flags;
            if index > 0 {
                flags &= !0x80;
            }
            if index + 1 < count {
                flags &= !0x09;
            }
            bytes.extend(self.seq.wrapping_add((index * size) as u32).to_be_bytes());
            bytes.extend(self.ack.to_be_bytes());
            bytes.extend([((transport / 4) << 4) as u8, flags]);
            bytes.extend(self.window.to_be_bytes());
            bytes.extend([0, 0, 0, 0]);
            bytes.extend(&self.options);
        }
        bytes
    }

    fn pseudo(&self, headers: &[u8], length: usize) -> Vec<u8> {
        let mut pseudo = headers[if self.v6 { 8..40 } else { 12..20 }].to_vec();
        pseudo.extend((length as u32).to_be_bytes());
        pseudo.extend([0, self.protocol()]);
        pseudo
    }

    fn checksum_offset(&self) -> usize {
        if self.udp { 6 } else { 16 }
    }

    /// The packets of a sender without offloads, `size` bytes of payload each.
    pub(super) fn slowly(&self, size: u16) -> Vec<Vec<u8>> {
        let size = usize::from(size);
        let mut parts: Vec<&[u8]> = self.payload.chunks(size).collect();
        if parts.is_empty() {
            parts.push(&[]);
        }
        let count = parts.len();
        let packets = parts.iter().enumerate().map(|(index, part)| {
            let mut packet = self.headers(index, count, size, part.len());
            packet.extend(*part);
            let (start, field) = (self.ip_header(), self.ip_header() + self.checksum_offset());
            let mut summed = self.pseudo(&packet, packet.len() - start);
            summed.extend(&packet[start..]);
            let sum = match !rfc1071(&summed) {
                0 if self.udp => 0xffff,
                sum => sum,
            };
            packet[field..field + 2].copy_from_slice(&sum.to_be_bytes());
            packet
        });
        packets.collect()
    }

    /// The same as one large packet, as a kernel hands it over.
    pub(super) fn large(&self, size: u16) -> (Header, Vec<u8>) {
        let mut packet = self.headers(0, 1, 0, self.payload.len());
        let start = self.ip_header();
        let header = Header {
            needs_csum: true,
            gso: match (self.udp, self.v6) {
                (true, _) => Gso::Udp,
                (false, true) => Gso::Tcp6,
                (false, false) => Gso::Tcp4,
            },
            header_length: packet.len() as u16,
            gso_size: size,
            csum_start: start as u16,
            csum_offset: self.checksum_offset() as u16,
        };
        packet.extend(&self.payload);
        let sum = rfc1071(&self.pseudo(&packet, packet.len() - start));
        let field = start + self.checksum_offset();
        packet[field..field + 2].copy_from_slice(&sum.to_be_bytes());
        (header, packet)
    }
}

/// RFC 1071, in network order, not complemented.
pub(super) fn rfc1071(data: &[u8]) -> u16 {
    let mut sum = 0u32;
    for pair in data.chunks(2) {
        sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

pub(super) fn made() -> impl Strategy<Value = Made> {
    let options = prop_oneof![Just(vec![]), Just(vec![1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2])];
    let payload = proptest::collection::vec(any::<u8>(), 0..6000);
    let words = (
        any::<u16>(),
        2..=255u8,
        0..=255u8,
        any::<u32>(),
        any::<u32>(),
        any::<u16>(),
    );
    let flags = prop_oneof![Just(0x10u8), Just(0x18), any::<u8>()];
    (any::<bool>(), any::<bool>(), 0..3u16, words, flags, options, payload).prop_map(
        |(v6, udp, port, (id, ttl, tos, seq, ack, window), flags, options, payload)| Made {
            v6,
            udp,
            ports: (1000 + port, 2000),
            id,
            ttl,
            tos,
            seq,
            ack,
            flags,
            window,
            options,
            payload,
        },
    )
}
