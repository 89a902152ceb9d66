//! One large packet of the device into the packets that it stands for, each with its checksums.

use super::checksum;
use super::packet::{FRAGMENT, Ip, TCP, UDP, be16, be32, put16, put32, set_header_checksum};
use super::virtio::{Gso, Header};

/// TCP's flags, in byte 13 of its header.
mod flag {
    pub(super) const FIN: u8 = 0x01;
    pub(super) const PSH: u8 = 0x08;
    pub(super) const CWR: u8 = 0x80;
}

/// Where the checksum stands in a UDP header; in no other that has one.
const UDP_FIELD: usize = 6;

/// How a packet is to be taken apart; all that could be wrong with it has been looked at.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Split {
    ip: Ip,
    kind: Kind,
    /// Where the transport header begins.
    transport: usize,
    /// Bytes of all headers.
    headers: usize,
    /// Payload bytes of each segment but the last.
    size: usize,
    /// Segments, at least 1.
    count: usize,
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Kind {
    /// As it is.
    Whole,
    /// As it is, with the checksum at this place, over what begins at `transport`.
    Checksum(usize),
    Tcp,
    Udp,
}

impl Split {
    /// Looks at a packet of exactly the length that its IP header says; `None` if it can't be what its header says.
    pub(super) fn plan(header: &Header, ip: Ip, packet: &[u8]) -> Option<Self> {
        if packet.len() != ip.total {
            return None;
        }
        let start = usize::from(header.csum_start);
        let field = start + usize::from(header.csum_offset);
        if header.needs_csum && (start < ip.header || field + 2 > packet.len()) {
            return None;
        }
        let whole = |kind| Self {
            ip,
            kind,
            transport: start,
            headers: 0,
            size: packet.len(),
            count: 1,
        };
        let (kind, protocol, offset, least) = match header.gso {
            Gso::None if header.needs_csum => return Some(whole(Kind::Checksum(field))),
            Gso::None => return Some(whole(Kind::Whole)),
            Gso::Unknown => return None,
            Gso::Tcp4 if ip.v6 => return None,
            Gso::Tcp6 if !ip.v6 => return None,
            Gso::Tcp4 | Gso::Tcp6 => (Kind::Tcp, TCP, 16, 20),
            Gso::Udp => (Kind::Udp, UDP, UDP_FIELD, 8),
        };
        let options = ip.v6 && start > ip.header;
        // Behind extension headers of IPv6 the protocol is taken from the kind.
        let fits = header.needs_csum
            && usize::from(header.csum_offset) == offset
            && (start == ip.header && ip.protocol == protocol || options && ip.protocol != FRAGMENT)
            && !ip.fragment
            && start + least <= packet.len()
            && header.gso_size > 0;
        if !fits {
            return None;
        }
        let transport_header = match kind {
            Kind::Tcp => usize::from(packet[start + 12] >> 4) * 4,
            _ => 8,
        };
        let headers = start + transport_header;
        if transport_header < least || headers > packet.len() {
            return None;
        }
        let size = usize::from(header.gso_size);
        Some(Self {
            ip,
            kind,
            transport: start,
            headers,
            size,
            count: (packet.len() - headers).div_ceil(size).max(1),
        })
    }

    /// How many packets it makes.
    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// Bytes of the largest.
    pub(super) fn largest(&self) -> usize {
        self.length(0)
    }

    /// Bytes of one of the packets.
    pub(super) fn length(&self, index: usize) -> usize {
        let payload = self.ip.total - self.headers;
        self.headers + self.size.min(payload - (index * self.size).min(payload))
    }

    /// Writes one of the packets to `to`, which has its [`Self::length`].
    pub(super) fn write(&self, packet: &[u8], index: usize, to: &mut [u8]) {
        match self.kind {
            Kind::Whole => to.copy_from_slice(packet),
            Kind::Checksum(field) => {
                to[..self.transport].copy_from_slice(&packet[..self.transport]);
                let sum = checksum::copy(&mut to[self.transport..], &packet[self.transport..]);
                // The field holds the sum of the pseudo-header and is part of the sum so.
                set_checksum(to, field, sum, field == self.transport + UDP_FIELD);
            }
            Kind::Tcp | Kind::Udp => self.write_segment(packet, index, to),
        }
    }

    fn write_segment(&self, packet: &[u8], index: usize, to: &mut [u8]) {
        let start = self.headers + index * self.size;
        let (head, payload) = to.split_at_mut(self.headers);
        head.copy_from_slice(&packet[..self.headers]);
        let mut sum = checksum::copy(payload, &packet[start..start + payload.len()]);
        let total = head.len() + payload.len();
        if self.ip.v6 {
            put16(head, 4, (total - 40) as u16);
        } else {
            put16(head, 2, total as u16);
            put16(head, 4, be16(head, 4).wrapping_add(index as u16));
            set_header_checksum(head, self.ip.header);
        }
        let length = total - self.transport;
        let transport = &mut head[self.transport..];
        let (field, protocol) = if self.kind == Kind::Tcp {
            put32(
                transport,
                4,
                be32(transport, 4).wrapping_add((index * self.size) as u32),
            );
            if index > 0 {
                transport[13] &= !flag::CWR;
            }
            if index + 1 < self.count {
                transport[13] &= !(flag::FIN | flag::PSH);
            }
            (16, TCP)
        } else {
            put16(transport, 4, length as u16);
            (UDP_FIELD, UDP)
        };
        transport[field..field + 2].fill(0);
        sum += checksum::sum(transport) + self.ip.pseudo_sum(packet, protocol, length);
        set_checksum(transport, field, sum, protocol == UDP);
    }
}

/// UDP says "no checksum" with 0, and 0xffff is the same number.
fn set_checksum(bytes: &mut [u8], field: usize, sum: u64, udp: bool) {
    let checksum = match checksum::finish(sum) {
        [0, 0] if udp => [0xff, 0xff],
        other => other,
    };
    bytes[field..field + 2].copy_from_slice(&checksum);
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::tunnel::sample::{self, Made};
    use proptest::prelude::*;

    /// All packets that a large one stands for.
    pub(crate) fn split(header: &Header, packet: &[u8]) -> Option<Vec<Vec<u8>>> {
        let plan = Split::plan(header, Ip::read(packet)?, packet)?;
        let packets = (0..plan.count()).map(|index| {
            let mut to = vec![0; plan.length(index)];
            plan.write(packet, index, &mut to);
            to
        });
        Some(packets.collect())
    }

    proptest! {
        #[test]
        fn a_large_packet_is_the_packets_that_a_slow_sender_would_have_made(made in sample::made(), size in 1u16..1500) {
            let (header, large) = made.large(size);
            prop_assert_eq!(split(&header, &large).expect("a good packet"), made.slowly(size));
        }

        #[test]
        fn a_checksum_that_was_left_to_do_is_done(made in sample::made()) {
            let (mut header, large) = made.large(u16::MAX);
            header.gso = Gso::None;
            prop_assert_eq!(split(&header, &large).expect("a good packet"), made.slowly(u16::MAX));
        }

        #[test]
        fn what_asks_for_nothing_goes_as_it_came(made in sample::made()) {
            for packet in made.slowly(1000) {
                prop_assert_eq!(split(&Header::default(), &packet), Some(vec![packet]));
            }
        }

        /// Whatever the header and the packet say: no panic, and no byte more than the large packet's and a header for
        /// each segment.
        #[test]
        fn no_header_and_no_packet_make_it_panic_or_invent_bytes(
            made in sample::made(), bytes in any::<[u8; 10]>(), known in any::<bool>(),
            damage in proptest::collection::vec((0usize..80, any::<u8>()), 0..4), cut in 0usize..200,
        ) {
            let (good, mut packet) = made.large(400);
            let header = if known { good } else { Header::from_bytes(&bytes) };
            for (at, byte) in damage {
                if let Some(place) = packet.get_mut(at) {
                    *place = byte;
                }
            }
            packet.truncate(packet.len().saturating_sub(cut));
            if let Some(packets) = split(&header, &packet) {
                let ip = Ip::read(&packet).expect("it was read before");
                for one in &packets {
                    let read = Ip::read(one).expect("each is an IP packet");
                    prop_assert_eq!(read.total, one.len());
                    prop_assert_eq!(read.v6, ip.v6);
                    prop_assert_eq!(&one[ip.addresses()], &packet[ip.addresses()]);
                }
            }
        }
    }

    #[test]
    fn a_header_that_does_not_fit_its_packet_is_refused() {
        let (good, packet) = Made::tcp(100).large(50);
        let with = |change: fn(&mut Header)| {
            let mut header = good;
            change(&mut header);
            split(&header, &packet).is_some()
        };
        assert!(with(|_| {}));
        assert!(!with(|header| header.csum_start = 19), "in the IP header");
        assert!(!with(|header| header.csum_start = 0xffff), "behind the packet");
        assert!(!with(|header| header.csum_offset = 17), "not TCP's place");
        assert!(!with(|header| header.gso_size = 0), "no end");
        assert!(!with(|header| header.needs_csum = false), "a checksum of many packets");
        assert!(!with(|header| header.gso = Gso::Tcp6), "another family");
        assert!(!with(|header| header.gso = Gso::Udp), "another protocol");
        assert!(!with(|header| header.gso = Gso::Unknown), "never asked for");
        assert!(
            with(|header| (header.gso, header.csum_offset) = (Gso::None, 118)),
            "the last two bytes"
        );
        assert!(
            !with(|header| (header.gso, header.csum_offset) = (Gso::None, 119)),
            "one byte outside"
        );
    }

    #[test]
    fn flags_that_count_once_stand_on_one_segment() {
        let made = Made {
            flags: 0x10 | flag::FIN | flag::PSH | flag::CWR,
            ..Made::tcp(3000)
        };
        let (header, large) = made.large(1000);
        let flags: Vec<u8> = split(&header, &large)
            .expect("a good packet")
            .iter()
            .map(|one| one[33])
            .collect();
        assert_eq!(flags, [0x10 | flag::CWR, 0x10, 0x10 | flag::FIN | flag::PSH]);
    }

    #[test]
    fn udp_never_says_that_it_has_no_checksum() {
        // A payload is looked for whose sum is 0.
        let found = (0..=u16::MAX).any(|word| {
            let made = Made {
                payload: word.to_be_bytes().to_vec(),
                ..Made::udp(0)
            };
            let (header, large) = made.large(2);
            let packets = split(&header, &large).expect("a good packet");
            assert_ne!(packets[0][26..28], [0, 0]);
            packets[0][26..28] == [0xff, 0xff]
        });
        assert!(found);
    }
}
