//! `struct virtio_net_hdr`: what stands before a packet at a TUN with `IFF_VNET_HDR`, 10 bytes, native byte order.

/// Bytes of a header.
pub(super) const HEADER: usize = 10;

/// `VIRTIO_NET_HDR_F_NEEDS_CSUM`: the checksum field holds the sum of the pseudo-header alone.
const NEEDS_CSUM: u8 = 1;

/// `VIRTIO_NET_HDR_GSO_ECN`, added to the type.
const ECN: u8 = 0x80;

/// What the kernel says of a packet, or is told of one. `hdr_len` is not kept: of packets that were forwarded it is wrong.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) struct Header {
    /// The checksum is to be completed, over the bytes from `csum_start` on, at `csum_start + csum_offset`.
    pub(super) needs_csum: bool,
    /// Whether and how the packet is many.
    pub(super) gso: Gso,
    /// Bytes of headers; only a hint for the kernel, and only written.
    pub(super) header_length: u16,
    /// Payload bytes of each segment but the last.
    pub(super) gso_size: u16,
    /// Where the checksummed part begins, from the IP header on.
    pub(super) csum_start: u16,
    /// Where in it the checksum stands.
    pub(super) csum_offset: u16,
}

/// The kind of a packet that stands for many.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub(super) enum Gso {
    /// One packet.
    #[default]
    None,
    /// TCP over IPv4.
    Tcp4,
    /// TCP over IPv6.
    Tcp6,
    /// UDP datagrams, over either.
    Udp,
    /// Something that was never asked for.
    Unknown,
}

impl Header {
    pub(super) fn from_bytes(bytes: &[u8; HEADER]) -> Self {
        let word = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        Self {
            needs_csum: bytes[0] & NEEDS_CSUM != 0,
            gso: match bytes[1] & !ECN {
                0 => Gso::None,
                1 => Gso::Tcp4,
                4 => Gso::Tcp6,
                5 => Gso::Udp,
                _ => Gso::Unknown,
            },
            header_length: word(2),
            gso_size: word(4),
            csum_start: word(6),
            csum_offset: word(8),
        }
    }

    pub(super) fn to_bytes(self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        bytes[0] = if self.needs_csum { NEEDS_CSUM } else { 0 };
        bytes[1] = match self.gso {
            Gso::None | Gso::Unknown => 0,
            Gso::Tcp4 => 1,
            Gso::Tcp6 => 4,
            Gso::Udp => 5,
        };
        bytes[2..4].copy_from_slice(&self.header_length.to_ne_bytes());
        bytes[4..6].copy_from_slice(&self.gso_size.to_ne_bytes());
        bytes[6..8].copy_from_slice(&self.csum_start.to_ne_bytes());
        bytes[8..10].copy_from_slice(&self.csum_offset.to_ne_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_ten_bytes_are_a_header_and_what_is_written_is_read(bytes in any::<[u8; HEADER]>()) {
            let header = Header::from_bytes(&bytes);
            if header.gso != Gso::Unknown {
                prop_assert_eq!(Header::from_bytes(&header.to_bytes()), header);
            }
        }
    }

    #[test]
    fn the_bytes_are_the_kernels() {
        let header = Header {
            needs_csum: true,
            gso: Gso::Tcp4,
            header_length: 52,
            gso_size: 1420,
            csum_start: 20,
            csum_offset: 16,
        };
        let mut expected = vec![1, 1];
        for word in [52u16, 1420, 20, 16] {
            expected.extend(word.to_ne_bytes());
        }
        assert_eq!(header.to_bytes()[..], expected[..]);
        // The kernel adds 0x80 where a segment has CWR: still TCP.
        assert_eq!(Header::from_bytes(&[1, 0x81, 0, 0, 0, 0, 0, 0, 0, 0]).gso, Gso::Tcp4);
    }
}
