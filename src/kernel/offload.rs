//! Checksums of a device that the kernel leaves to hardware, where it then spoils them.
//!
//! Before Linux 5.7 netfilter writes a checksum into packets that VXLAN has wrapped and masquerade meets a second time
//! (commit ea64d8d6c675, "netfilter: nat: never update the UDP checksum when it's 0"): what goes from a node to a service
//! waits for 63 s. Later kernels keep the offload, which is most of the throughput. Distributions mend older ones without
//! telling; those lose throughput and nothing else.

use std::ffi::c_char;
use std::io;
use std::os::fd::AsRawFd as _;

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

/// The first kernel that is right.
const MENDED: (u32, u32) = (5, 7);

/// include/uapi/linux/ethtool.h: whether checksums of what is sent are the device's; ask, and set.
const ETHTOOL_GTXCSUM: u32 = 0x16;
const ETHTOOL_STXCSUM: u32 = 0x17;
/// include/uapi/linux/sockios.h
const SIOCETHTOOL: libc::Ioctl = 0x8946;

/// `struct ethtool_value`.
#[repr(C)]
struct Value {
    command: u32,
    data: u32,
}

/// Whether a kernel of this release (`uname -r`) spoils checksums. One that is not understood does not.
pub(super) fn spoils_checksums(release: &str) -> bool {
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map_while(|part| part.parse::<u32>().ok());
    match (numbers.next(), numbers.next()) {
        (Some(major), Some(minor)) => (major, minor) < MENDED,
        _ => false,
    }
}

/// Has the kernel compute all checksums of what `device` sends, in the calling thread's network namespace. May be repeated.
pub(super) fn turn_off(device: &str) -> io::Result<()> {
    ethtool(device, ETHTOOL_STXCSUM, 0).map(drop)
}

fn ethtool(device: &str, command: u32, data: u32) -> io::Result<u32> {
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let mut value = Value { command, data };
    // SAFETY: all zeros is a value of this plain structure.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays zero.
    if device.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (place, byte) in request.ifr_name.iter_mut().zip(device.bytes()) {
        *place = byte as c_char;
    }
    request.ifr_ifru.ifru_data = (&raw mut value).cast();
    // SAFETY: the descriptor is open; `request` and the `value` that it points to live across the call.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) };
    Errno::result(result)?;
    Ok(value.data)
}

/// Whether checksums of what `device` sends are left to it.
pub(super) fn is_on(device: &str) -> io::Result<bool> {
    ethtool(device, ETHTOOL_GTXCSUM, 0).map(|data| data != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_before_5_7_spoil_checksums() {
        for (release, spoils) in [
            ("4.18.0-553.el8_10.x86_64", true),
            ("5.4.0-190-generic", true),
            ("5.6.19", true),
            ("5.7.0", false),
            ("5.10.0-32-amd64", false),
            ("6.1.176", false),
            ("10.0", false),
            ("5", false),
            ("", false),
            ("five.seven", false),
            ("99999999999.1", false),
        ] {
            assert_eq!(spoils_checksums(release), spoils, "{release:?}");
        }
    }

    #[test]
    fn a_name_that_no_device_can_have_is_refused() {
        for name in ["ringmail-no-such", &"x".repeat(100)] {
            assert!(turn_off(name).is_err(), "{name}");
        }
    }
}
