//! The inner IP packet: what is read of it, and the time to live.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::Range;

use super::checksum;

/// IP's numbers of protocols.
pub(super) const ICMP: u8 = 1;
pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;
pub(super) const FRAGMENT: u8 = 44;
pub(super) const ICMPV6: u8 = 58;

/// What an IP header says; the packet is at least as long as `header` and `total`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Ip {
    /// IPv6, else IPv4.
    pub(super) v6: bool,
    /// Bytes of the header; of IPv6 without extension headers.
    pub(super) header: usize,
    /// Bytes of the packet, as the header says.
    pub(super) total: usize,
    /// What comes after the header; of IPv6 it may be an extension header.
    pub(super) protocol: u8,
    /// A part of an IPv4 packet, the first or a later one.
    pub(super) fragment: bool,
}

impl Ip {
    /// Reads the header of `packet`; `None` if it is not one, or says more bytes than there are.
    pub(super) fn read(packet: &[u8]) -> Option<Self> {
        let ip = match packet.first()? >> 4 {
            4 if packet.len() >= 20 => Self {
                v6: false,
                header: usize::from(packet[0] & 15) * 4,
                total: usize::from(be16(packet, 2)),
                protocol: packet[9],
                // More are to come, or some came before.
                fragment: be16(packet, 6) & 0x3fff != 0,
            },
            6 if packet.len() >= 40 => Self {
                v6: true,
                header: 40,
                total: 40 + usize::from(be16(packet, 4)),
                protocol: packet[6],
                fragment: packet[6] == FRAGMENT,
            },
            _ => return None,
        };
        (ip.header >= 20 && ip.total >= ip.header && ip.total <= packet.len()).then_some(ip)
    }

    /// Where source and destination stand in the packet, one after the other.
    pub(super) fn addresses(self) -> Range<usize> {
        if self.v6 { 8..40 } else { 12..20 }
    }

    pub(super) fn source(self, packet: &[u8]) -> IpAddr {
        address(packet, if self.v6 { 8 } else { 12 }, self.v6)
    }

    pub(super) fn destination(self, packet: &[u8]) -> IpAddr {
        address(packet, if self.v6 { 24 } else { 16 }, self.v6)
    }

    /// The sum of the pseudo-header of TCP or UDP, for a transport part of this length.
    pub(super) fn pseudo_sum(self, packet: &[u8], protocol: u8, length: usize) -> u64 {
        let length = length as u32;
        checksum::sum(&packet[self.addresses()])
            + checksum::word(u16::from(protocol))
            + checksum::word((length >> 16) as u16)
            + checksum::word(length as u16)
    }

    /// Takes one from the time to live, as each end of the tunnel does: `false`, and nothing changed, if none would be
    /// left.
    pub(super) fn decrement(self, packet: &mut [u8]) -> bool {
        let at = if self.v6 { 7 } else { 8 };
        if packet[at] <= 1 {
            return false;
        }
        packet[at] -= 1;
        if !self.v6 {
            // The sum lost 0x0100, so its complement gains it (RFC 1624).
            let sum = u32::from(be16(packet, 10)) + 0x100;
            let sum = (sum + u32::from(sum >= 0xffff)) as u16;
            packet[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        true
    }

    /// Whether routers must not cut the packet into fragments.
    pub(super) fn unfragmentable(self, packet: &[u8]) -> bool {
        self.v6 || packet[6] & 0x40 != 0
    }
}

fn address(packet: &[u8], at: usize, v6: bool) -> IpAddr {
    if v6 {
        let mut octets = [0; 16];
        octets.copy_from_slice(&packet[at..at + 16]);
        Ipv6Addr::from(octets).into()
    } else {
        Ipv4Addr::new(packet[at], packet[at + 1], packet[at + 2], packet[at + 3]).into()
    }
}

/// Two bytes in network order.
pub(super) fn be16(bytes: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([bytes[at], bytes[at + 1]])
}

/// Four bytes in network order.
pub(super) fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// Writes two bytes in network order.
pub(super) fn put16(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_be_bytes());
}

/// Writes four bytes in network order.
pub(super) fn put32(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
}

/// Writes the checksum of an IPv4 header that begins the packet.
pub(super) fn set_header_checksum(packet: &mut [u8], header: usize) {
    packet[10..12].fill(0);
    let checksum = checksum::finish(checksum::sum(&packet[..header]));
    packet[10..12].copy_from_slice(&checksum);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic_and_what_it_says_is_there(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            if let Some(ip) = Ip::read(&bytes) {
                prop_assert!(ip.header <= ip.total && ip.total <= bytes.len());
                ip.source(&bytes);
                ip.destination(&bytes);
            }
        }

        #[test]
        fn a_header_that_lost_a_hop_still_has_its_checksum(mut header in any::<[u8; 20]>()) {
            header[0] = 0x45;
            put16(&mut header, 2, 20);
            set_header_checksum(&mut header, 20);
            let ip = Ip::read(&header).expect("a header");
            let before = header;
            if ip.decrement(&mut header) {
                prop_assert_eq!(header[8], before[8] - 1);
                let patched = header;
                set_header_checksum(&mut header, 20);
                prop_assert_eq!(patched, header);
            } else {
                prop_assert!(before[8] <= 1);
                prop_assert_eq!(before, header);
            }
        }
    }

    /// All checksums that there are: the carry happens in one of 256.
    #[test]
    fn a_lost_hop_is_right_for_every_checksum() {
        for id in 0..=u16::MAX {
            let mut header = [0x45, 0, 0, 20, 0, 0, 0, 0, 64, 6, 0, 0, 10, 1, 2, 3, 10, 4, 5, 6];
            put16(&mut header, 4, id);
            set_header_checksum(&mut header, 20);
            let ip = Ip::read(&header).expect("a header");
            assert!(ip.decrement(&mut header));
            let patched = header;
            set_header_checksum(&mut header, 20);
            assert_eq!(patched, header);
        }
    }

    #[test]
    fn headers_that_promise_more_than_there_is_are_none() {
        let mut packet = [0u8; 40];
        packet[0] = 0x45;
        put16(&mut packet, 2, 41);
        assert_eq!(Ip::read(&packet), None);
        put16(&mut packet, 2, 19);
        assert_eq!(Ip::read(&packet), None);
        put16(&mut packet, 2, 40);
        assert_eq!(Ip::read(&packet).map(|ip| (ip.header, ip.total)), Some((20, 40)));
        packet[0] = 0x44;
        assert_eq!(Ip::read(&packet), None);
        packet[0] = 0x60;
        packet[4..6].fill(0);
        assert_eq!(Ip::read(&packet).map(|ip| (ip.header, ip.total)), Some((40, 40)));
        packet[5] = 1;
        assert_eq!(Ip::read(&packet), None);
    }
}
