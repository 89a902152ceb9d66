//! Sends ICMP errors. Through a raw socket, since the kernel takes no packet from a device whose source is an address of
//! the node's own; so they also go the way that packets of the node go, to a pod here as to one behind a peer.

use std::io;
use std::mem::{size_of, zeroed};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::time::Instant;

use super::icmp::{self, LARGEST, Limiter, Problem};

/// Errors a second, and as many at once, of each worker.
const RATE: u32 = 100;

/// Answers what can't be forwarded.
#[derive(Debug)]
pub(super) struct Answers {
    v4: Option<(OwnedFd, Ipv4Addr)>,
    v6: Option<(OwnedFd, Ipv6Addr)>,
    limiter: Limiter,
    buffer: Box<[u8; LARGEST]>,
}

impl Answers {
    /// With these sources; a family without one, or without `CAP_NET_RAW`, gets no answers.
    pub(super) fn new(v4: Option<Ipv4Addr>, v6: Option<Ipv6Addr>) -> Self {
        let open =
            |family| open(family).inspect_err(|error| tracing::warn!("tunnel: no ICMP errors will be sent: {error}"));
        Self {
            v4: v4.and_then(|source| Some((open(libc::AF_INET).ok()?, source))),
            v6: v6.and_then(|source| Some((open(libc::AF_INET6).ok()?, source))),
            limiter: Limiter::new(RATE, Instant::now()),
            buffer: Box::new([0; LARGEST]),
        }
    }

    /// Tells the source of `packet`, if it may be told and the rate allows: whether it was.
    pub(super) fn tell(&mut self, problem: Problem, packet: &[u8]) -> bool {
        let (fd, source) = match (packet.first().map(|byte| byte >> 4), &self.v4, &self.v6) {
            (Some(4), Some((fd, source)), _) => (fd, IpAddr::V4(*source)),
            (Some(6), _, Some((fd, source))) => (fd, IpAddr::V6(*source)),
            _ => return false,
        };
        let Some((length, target)) = icmp::answer(problem, packet, source, &mut self.buffer) else {
            return false;
        };
        self.limiter.allows(Instant::now()) && send(fd, &self.buffer[..length], target).is_ok()
    }
}

/// `IPPROTO_RAW`: packets come with their header, and none are received.
fn open(family: i32) -> io::Result<OwnedFd> {
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
    // SAFETY: no memory is involved.
    let fd = unsafe { libc::socket(family, kind, libc::IPPROTO_RAW) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn send(fd: &OwnedFd, packet: &[u8], target: IpAddr) -> io::Result<()> {
    // SAFETY: these are integers and arrays, for all of which zero bytes are a value.
    let (mut v4, mut v6): (libc::sockaddr_in, libc::sockaddr_in6) = unsafe { (zeroed(), zeroed()) };
    let (address, length) = match target {
        IpAddr::V4(target) => {
            v4.sin_family = libc::AF_INET as libc::sa_family_t;
            v4.sin_addr.s_addr = u32::from_ne_bytes(target.octets());
            ((&raw const v4).cast::<libc::sockaddr>(), size_of::<libc::sockaddr_in>())
        }
        IpAddr::V6(target) => {
            v6.sin6_family = libc::AF_INET6 as libc::sa_family_t;
            v6.sin6_addr.s6_addr = target.octets();
            (
                (&raw const v6).cast::<libc::sockaddr>(),
                size_of::<libc::sockaddr_in6>(),
            )
        }
    };
    // SAFETY: packet and address outlive the call and have the lengths that are said.
    let sent = unsafe {
        libc::sendto(
            fd.as_raw_fd(),
            packet.as_ptr().cast(),
            packet.len(),
            libc::MSG_NOSIGNAL,
            address,
            length as libc::socklen_t,
        )
    };
    if sent < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
