//! The largest inner packet whose ESP still fits the uplink: exactly the kernel's own sum. And a socket whose packets are
//! never cut, to see what passes.

use std::io;
use std::net::UdpSocket;
use std::os::fd::AsRawFd as _;

use keys::Cipher;
use nix::errno::Errno;
use nix::libc;

/// Bytes of an IPv4 header without options (RFC 791), as xfrm puts in front.
const IPV4_HEADER: u32 = 20;
/// Bytes of an IPv6 header (RFC 8200).
const IPV6_HEADER: u32 = 40;
/// Bytes of SPI and sequence number (RFC 4303 §2; of an extended number only the lower half travels).
const ESP_HEADER: u32 = 8;
/// Bytes of the explicit IV of every cipher here (RFC 4106 §3.1, RFC 7634 §2).
const IV: u32 = 8;
/// Bytes of a UDP header (RFC 3948).
const UDP_HEADER: u32 = 8;
/// Bytes of pad length and next header at the end of what is encrypted (RFC 4303 §2).
const ESP_TRAILER: u32 = 2;
/// The smallest MTU that IPv4 allows (RFC 791).
const SMALLEST: u32 = 68;

/// The inner MTU, in bytes, of a tunnel over an uplink of `outer_mtu` bytes; `None` if not even the smallest IPv4 MTU
/// (68) is left.
///
/// What is encrypted is padded to 4 bytes; net/xfrm/xfrm_state.c, `__xfrm_state_mtu`:
/// `((mtu - header_len - icv) & ~3) - 2`. Over IPv6 the kernel itself says at least 1280 and then sends fragments of
/// ESP (`xfrm_state_mtu`); here it is the sum all the same. An inner IPv6 needs 1280, which is the caller's to check.
pub fn inner_mtu(outer_mtu: u32, cipher: Cipher, outer_is_v6: bool, encap: bool) -> Option<u32> {
    let ip = if outer_is_v6 { IPV6_HEADER } else { IPV4_HEADER };
    let udp = if encap { UDP_HEADER } else { 0 };
    let header = ip + udp + ESP_HEADER + IV;
    let encrypted = outer_mtu.checked_sub(header + cipher.icv_bits() / 8)? & !3;
    encrypted.checked_sub(ESP_TRAILER).filter(|inner| *inner >= SMALLEST)
}

/// What `socket` sends carries "don't fragment" and is cut nowhere; what the kernel knows to be too large for the path is
/// refused with EMSGSIZE (ip(7), `IP_MTU_DISCOVER`).
pub fn never_fragment(socket: &UdpSocket, v6: bool) -> io::Result<()> {
    let (level, option, value) = if v6 {
        (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_DO)
    } else {
        (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DO)
    };
    // SAFETY: the descriptor is open, and the pointer and length name `value`, which lives across the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            option,
            (&raw const value).cast(),
            size_of_val(&value) as libc::socklen_t,
        )
    };
    Errno::result(result).map(drop).map_err(Into::into)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_of_a_usual_uplink() {
        for cipher in Cipher::ALL {
            for (v6, encap, expected) in [
                (false, false, 1446),
                (false, true, 1438),
                (true, false, 1426),
                (true, true, 1418),
            ] {
                assert_eq!(
                    inner_mtu(1500, cipher, v6, encap),
                    Some(expected),
                    "{cipher} v6 {v6} encap {encap}"
                );
            }
        }
    }

    #[test]
    fn the_packet_fits_and_one_byte_more_does_not() {
        for outer in 120..9100 {
            let Some(inner) = inner_mtu(outer, Cipher::Aes128Gcm16, false, false) else {
                continue;
            };
            let esp = |inner: u32| 20 + 8 + 8 + (inner + 2).next_multiple_of(4) + 16;
            assert!(esp(inner) <= outer && esp(inner + 1) > outer, "{outer}");
        }
    }

    #[test]
    fn too_small_an_uplink_has_none() {
        assert_eq!(inner_mtu(0, Cipher::Aes128Gcm16, false, false), None);
        assert_eq!(
            inner_mtu(u32::MAX, Cipher::Aes128Gcm16, true, true),
            Some(((u32::MAX - 80) & !3) - 2)
        );
        let first = (0..).find(|mtu| inner_mtu(*mtu, Cipher::Aes128Gcm16, false, false).is_some());
        assert_eq!(
            first,
            Some(20 + 8 + 8 + 72 + 16),
            "70 bytes: 68 is not of the form 4n + 2"
        );
    }
}
