//! Network devices of ours, as values.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;

/// A device of ours, as it should be or as it is.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Device {
    /// What it is and does.
    pub kind: DeviceKind,
    /// The largest packet that a pod may send through the mesh, bytes.
    pub mtu: u32,
    /// Whether it is set up; a device that is down has lost its routes. False only as read, nobody wants it so.
    pub up: bool,
    /// Whether checksums of what it sends come out right. False only as read, where the kernel spoils what it leaves to
    /// the device.
    pub sound: bool,
}

impl Device {
    /// A device that is up.
    pub fn new(kind: DeviceKind, mtu: u32) -> Self {
        Self {
            kind,
            mtu,
            up: true,
            sound: true,
        }
    }

    /// Whether the kernel leaves checksums of what it wraps to it.
    pub fn leaves_checksums(&self) -> bool {
        matches!(self.kind, DeviceKind::Vxlan(_))
    }

    /// Whether `self` becomes `wanted` by setting MTU, address or state, and need not be made anew.
    pub fn can_become(&self, wanted: &Self) -> bool {
        match (&self.kind, &wanted.kind) {
            (DeviceKind::Vxlan(have), DeviceKind::Vxlan(want)) => Vxlan { mac: want.mac, ..*have } == *want,
            (have, want) => have == want,
        }
    }
}

/// What a device is and does.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum DeviceKind {
    /// Swallows what reaches it (dummy, or a veth end whose other end is down).
    Sink,
    /// Sends Ethernet frames in UDP (RFC 7348).
    Vxlan(Vxlan),
    /// Sends IPv4 in IPv4 (RFC 2003) to the next hop of its routes.
    Ipip {
        /// The outer source.
        local: Ipv4Addr,
    },
    /// Hands packets to this process.
    Tun,
}

/// What tells one VXLAN device from another.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Vxlan {
    /// The network identifier, 24 bits.
    pub vni: u32,
    /// The UDP port, both ends.
    pub port: u16,
    /// The outer source.
    pub local: IpAddr,
    /// The index of the device that its packets leave by.
    pub parent: u32,
    /// Whether it learns which address is behind which peer from what comes in.
    pub learning: bool,
    /// Whether the group policy extension (a packet's mark) travels with a frame.
    pub gbp: bool,
    /// Its own address.
    pub mac: Mac,
}

/// An Ethernet address.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// An address made of `bytes`, marked as one that no vendor gave out and that one device has (IEEE 802: the second
    /// lowest bit of the first byte set, the lowest clear).
    pub fn local(mut bytes: [u8; 6]) -> Self {
        bytes[0] = bytes[0] & 0xfe | 0x02;
        Self(bytes)
    }

    /// Whether one device can have it: not a group's, not zero.
    pub fn is_unicast(&self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// A text that is no Ethernet address.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("six bytes such as 12:c6:65:89:b4:e3 are needed")]
pub struct BadMac;

impl FromStr for Mac {
    type Err = BadMac;

    fn from_str(text: &str) -> Result<Self, BadMac> {
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let digits = |part: &&str| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
            let part = parts.next().filter(digits).ok_or(BadMac)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| BadMac)?;
        }
        parts.next().map_or(Ok(Self(bytes)), |_| Err(BadMac))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mac_is_read_as_it_is_written() {
        let text = "12:c6:65:89:b4:e3";
        assert_eq!(text.parse::<Mac>().map(|mac| mac.to_string()).as_deref(), Ok(text));
        for bad in [
            "",
            "12:c6:65:89:b4",
            "12:c6:65:89:b4:e3:00",
            "1:c6:65:89:b4:e3",
            "zz:c6:65:89:b4:e3",
            "+1:c6:65:89:b4:e3",
        ] {
            assert_eq!(bad.parse::<Mac>(), Err(BadMac), "{bad:?}");
        }
    }

    #[test]
    fn a_local_mac_is_one_devices_and_no_vendors() {
        for first in 0..=255 {
            let mac = Mac::local([first, 1, 2, 3, 4, 5]);
            assert!(mac.is_unicast() && mac.0[0] & 2 == 2, "{mac}");
        }
        assert!(!Mac::default().is_unicast());
    }
}
