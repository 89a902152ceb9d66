//! A container's network namespace: is it a container's, and what does its interface look like?

use std::fs::{self, File};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use ipnet::IpNet;
use nix::libc;
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use super::error::{Error, system};

/// Where the kernel shows this thread's namespace.
const OWN: &str = "/proc/thread-self/ns/net";

/// What an interface looks like from inside.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Seen {
    /// Its MTU in bytes.
    pub mtu: u64,
    /// Where the container's routes lead, over any interface.
    pub routes: Vec<IpNet>,
}

/// Whether `path` is the namespace that this process is in. What is gone or unreadable is not.
pub fn is_own(path: &Path) -> bool {
    let place = |path: &Path| fs::metadata(path).map(|about| (about.dev(), about.ino()));
    matches!((place(path), place(Path::new(OWN))), (Ok(one), Ok(other)) if one == other)
}

/// Enters the namespace and looks. The calling thread stays in it: to be done last.
///
/// # Errors
/// Code 8: no namespace, or not to be entered. Code 999: there is no such interface.
pub fn look(path: &Path, interface: &str) -> Result<Seen, Error> {
    let entered = File::open(path).and_then(|file| setns(file, CloneFlags::CLONE_NEWNET).map_err(io::Error::from));
    entered.map_err(|error| Error::new(Error::NETNS, system("enter", path, &error)))?;
    let mtu = mtu(interface).map_err(|error| {
        let what = Path::new(interface).to_owned();
        Error::internal(format!(
            "{} in the container",
            system("find the interface", &what, &error)
        ))
    })?;
    let mut routes = Vec::new();
    for (file, parse) in [
        ("/proc/thread-self/net/route", v4 as fn(&str) -> Option<IpNet>),
        ("/proc/thread-self/net/ipv6_route", v6),
    ] {
        match fs::read_to_string(file) {
            Ok(text) => routes.extend(text.lines().filter_map(parse)),
            // A kernel without IPv6.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(Error::new(Error::IO, system("read", Path::new(file), &error))),
        }
    }
    Ok(Seen { mtu, routes })
}

/// SIOCGIFMTU (netdevice(7)).
fn mtu(interface: &str) -> io::Result<u64> {
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    // SAFETY: an ifreq is integers and pointers in a union, for all of which zero is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let letters = interface.bytes().take(libc::IFNAMSIZ - 1);
    for (place, letter) in request.ifr_name.iter_mut().zip(letters) {
        *place = letter as libc::c_char;
    }
    // SAFETY: the descriptor is open, and the request is what SIOCGIFMTU reads and writes.
    let done = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFMTU as libc::Ioctl, &raw mut request) };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: SIOCGIFMTU has set this member.
    let mtu = unsafe { request.ifr_ifru.ifru_mtu };
    Ok(mtu.try_into().unwrap_or(0))
}

/// Whether a packet to anywhere in `net` finds a route.
pub fn is_covered(routes: &[IpNet], net: &IpNet) -> bool {
    routes.iter().any(|route| route.contains(net))
}

/// A line of net/route: hexadecimal words of the machine's order. RTF_UP is needed, RTF_REJECT leads nowhere.
fn v4(line: &str) -> Option<IpNet> {
    let fields: Vec<_> = line.split_whitespace().collect();
    let word = |index: usize| u32::from_str_radix(fields.get(index)?, 16).ok();
    let (to, flags, mask) = (word(1)?, word(3)?, word(7)?);
    let leads = flags & u32::from(libc::RTF_UP) != 0 && flags & u32::from(libc::RTF_REJECT) == 0;
    let address = |word: u32| Ipv4Addr::from(word.to_ne_bytes());
    let net = IpNet::with_netmask(IpAddr::V4(address(to)), IpAddr::V4(address(mask))).ok()?;
    leads.then_some(net)
}

/// A line of net/ipv6_route: destination, length of its prefix, six more fields, flags.
fn v6(line: &str) -> Option<IpNet> {
    let fields: Vec<_> = line.split_whitespace().collect();
    let address = u128::from_str_radix(fields.first()?, 16).ok()?;
    let length = u8::from_str_radix(fields.get(1)?, 16).ok()?;
    let flags = u32::from_str_radix(fields.get(8)?, 16).ok()?;
    let leads = flags & u32::from(libc::RTF_UP) != 0 && flags & u32::from(libc::RTF_REJECT) == 0;
    let net = IpNet::new(IpAddr::V6(Ipv6Addr::from(address)), length).ok()?;
    leads.then_some(net)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_kernels_lists_of_routes_are_read() {
        let head = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT";
        assert_eq!(v4(head), None);
        // Bytes of an address stand in the machine's order.
        let word = |address: [u8; 4]| format!("{:08X}", u32::from_ne_bytes(address));
        let line = |flags: &str| {
            let (net, gateway, mask) = (word([10, 244, 0, 0]), word([10, 244, 1, 1]), word([255, 255, 0, 0]));
            format!("eth0\t{net}\t{gateway}\t{flags}\t0\t0\t0\t{mask}\t0\t0\t0")
        };
        assert_eq!(v4(&line("0003")), Some("10.244.0.0/16".parse().unwrap()));
        assert_eq!(v4(&line("0200")), None, "down");
        assert_eq!(v4(&line("0201")), None, "unreachable");
        let line = |flags: &str| {
            let zero = "0".repeat(32);
            format!("fd000010024400010000000000000000 40 {zero} 00 {zero} 00000100 00000001 00000000 {flags} eth0")
        };
        assert_eq!(v6(&line("00000001")), Some("fd00:10:244:1::/64".parse().unwrap()));
        assert_eq!(v6(&line("00200200")), None);
    }

    #[test]
    fn a_wider_route_is_a_route() {
        let routes = ["0.0.0.0/0", "fd00:1::/32"].map(|net| net.parse().unwrap());
        let covered = |net: &str| is_covered(&routes, &net.parse().unwrap());
        assert!(covered("10.244.0.0/16") && covered("0.0.0.0/0") && covered("fd00:1:2::/48"));
        assert!(!covered("fd00::/16") && !covered("::/0"));
    }

    #[test]
    fn ones_own_namespace_is_known_and_what_is_gone_is_not() {
        assert!(is_own(Path::new("/proc/self/ns/net")));
        assert!(!is_own(Path::new("/proc/self/ns/uts")) && !is_own(Path::new("/nonexistent")));
    }

    #[test]
    fn an_mtu_is_read_and_a_missing_interface_is_an_error() {
        assert!(mtu("lo").unwrap() >= 1500);
        assert_eq!(mtu("none0").unwrap_err().raw_os_error(), Some(libc::ENODEV));
    }

    proptest! {
        #[test]
        fn arbitrary_lines_never_panic(line in any::<String>(), fields in proptest::collection::vec("[0-9a-fA-F]{1,33}", 0..12)) {
            for line in [line, fields.join(" ")] {
                v4(&line);
                v6(&line);
            }
        }
    }
}
