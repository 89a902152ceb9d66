//! The UDP sockets: one a worker and a family, many datagrams a system call.

use std::io::{self, Error};
use std::mem::{size_of, zeroed};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd as _, OwnedFd};

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::counters::Offload;
use super::{Config, TunnelError};

/// Bytes of a receive buffer: with `UDP_GRO` the kernel cuts silently what does not fit.
pub(super) const RECEIVE_BUFFER: usize = 65_536;

/// Messages of one receiving system call where they come one by one, as from an interface that merges nothing.
const RECEIVE_MANY: usize = 64;

/// Where they come merged: these buffers stay in the cache.
const RECEIVE_FEW: usize = 8;

/// Bytes of a message from which on it counts as merged.
const MERGED: usize = 4096;

/// Messages of one sending system call.
pub(super) const SEND_MESSAGES: usize = 64;

/// Payload bytes of one UDP message over IPv4; over IPv6 20 more would fit.
pub(super) const LARGEST_MESSAGE: usize = 65_507;

/// What the kernel may hold for us: some thirty full messages of the worker's pause.
const RECEIVE_QUEUE: i32 = 16 << 20;
const SEND_QUEUE: i32 = 4 << 20;

/// Of linux/udp.h; the message's segment size goes as a u16 and comes as an int.
const UDP_SEGMENT: i32 = 103;
const UDP_GRO: i32 = 104;

/// A worker's sockets.
#[derive(Debug)]
pub(super) struct Sockets {
    pub(super) v4: Option<Socket>,
    pub(super) v6: Option<Socket>,
}

impl Sockets {
    /// The socket that reaches this peer.
    pub(super) fn towards(&self, peer: &SocketAddr) -> Option<&Socket> {
        if peer.ip().to_canonical().is_ipv4() {
            self.v4.as_ref()
        } else {
            self.v6.as_ref()
        }
    }
}

/// Opens the sockets of a worker.
pub(super) fn open_all(config: &Config) -> Result<Sockets, TunnelError> {
    let open = |address: IpAddr| {
        Socket::open(address, config).map_err(|source| TunnelError::Socket {
            address,
            port: config.port,
            source,
        })
    };
    Ok(Sockets {
        v4: config.local_v4.map(|address| open(address.into())).transpose()?,
        v6: config.local_v6.map(|address| open(address.into())).transpose()?,
    })
}

/// A bound UDP socket.
#[derive(Debug)]
pub(super) struct Socket {
    fd: OwnedFd,
    /// The address that it is bound to.
    pub(super) local: IpAddr,
    pub(super) udp_segment: Offload,
    pub(super) udp_gro: Offload,
}

impl Socket {
    fn open(local: IpAddr, config: &Config) -> io::Result<Self> {
        let fd = unbound(local)?;
        let mut socket = Self {
            fd,
            local,
            udp_segment: Offload::On,
            udp_gro: Offload::On,
        };
        if local.is_ipv6() {
            socket.set(libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, 1)?;
        }
        if config.workers > 1 {
            socket.set(libc::SOL_SOCKET, libc::SO_REUSEPORT, 1)?;
        }
        for (force, plain, size) in [
            (libc::SO_RCVBUFFORCE, libc::SO_RCVBUF, RECEIVE_QUEUE),
            (libc::SO_SNDBUFFORCE, libc::SO_SNDBUF, SEND_QUEUE),
        ] {
            // Without CAP_NET_ADMIN as much as net.core.rmem_max allows.
            if socket.set(libc::SOL_SOCKET, force, size).is_err() {
                socket.set(libc::SOL_SOCKET, plain, size)?;
            }
        }
        socket.udp_segment = if !config.features.udp_segment {
            Offload::Off("switched off".to_owned())
        } else if kernel_damages_segments(&kernel_release()) {
            Offload::Off("Linux 7.0.0 to 7.1.4 damages headers of segmented UDP".to_owned())
        } else {
            // 0 is no segmentation for what does not ask; it only shows whether the kernel knows the option.
            refusal(socket.set(libc::SOL_UDP, UDP_SEGMENT, 0))
        };
        socket.udp_gro = if config.features.udp_gro {
            refusal(socket.set(libc::SOL_UDP, UDP_GRO, 1))
        } else {
            Offload::Off("switched off".to_owned())
        };
        bind(&socket.fd, SocketAddr::new(local, config.port))?;
        Ok(socket)
    }

    fn set(&self, level: i32, option: i32, value: i32) -> io::Result<()> {
        // SAFETY: the descriptor is open, and the kernel reads one int at the address.
        let code = unsafe {
            libc::setsockopt(
                self.fd.as_raw_fd(),
                level,
                option,
                (&raw const value).cast(),
                size_of::<i32>() as libc::socklen_t,
            )
        };
        if code == 0 { Ok(()) } else { Err(Error::last_os_error()) }
    }

    /// Whether the node still has the address that the socket is bound to. Asked with a bind of its own, which needs no
    /// more than the kernel's own answer.
    pub(super) fn has_address(&self) -> bool {
        let bound = unbound(self.local).and_then(|fd| bind(&fd, SocketAddr::new(self.local, 0)));
        !matches!(bound, Err(error) if error.raw_os_error() == Some(libc::EADDRNOTAVAIL))
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn unbound(local: IpAddr) -> io::Result<OwnedFd> {
    let family = if local.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    // SAFETY: no memory is involved.
    let fd = unsafe { libc::socket(family, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK, 0) };
    if fd < 0 {
        return Err(Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn bind(fd: &OwnedFd, address: SocketAddr) -> io::Result<()> {
    let (raw, length) = raw_address(address);
    // SAFETY: the descriptor is open, and `length` bytes of `raw` are an address.
    let code = unsafe { libc::bind(fd.as_raw_fd(), (&raw const raw).cast(), length) };
    if code == 0 { Ok(()) } else { Err(Error::last_os_error()) }
}

fn refusal(outcome: io::Result<()>) -> Offload {
    match outcome {
        Ok(()) => Offload::On,
        Err(error) => Offload::Off(format!("the kernel refuses it: {error}")),
    }
}

/// The running kernel's version, or zeros.
pub(super) fn kernel_release() -> (u32, u32, u32) {
    release(&std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default())
}

/// The first three numbers of a version; what is not there is 0.
fn release(text: &str) -> (u32, u32, u32) {
    let mut numbers = text
        .split(|c: char| !c.is_ascii_digit())
        .map(|part| part.parse().unwrap_or(0));
    let mut next = || numbers.next().unwrap_or(0);
    (next(), next(), next())
}

/// b10b446 of 7.0-rc1 damages UDP headers where the last segment is full; 78effd8 and 5f17ae0 of 7.1.5 repair it. It
/// can't be seen from here whether a packet was damaged.
fn kernel_damages_segments(release: &(u32, u32, u32)) -> bool {
    ((7, 0, 0)..=(7, 1, 4)).contains(release)
}

/// Segments of one message at most: one less than the kernel's `UDP_MAX_SEGMENTS`, which rose in 6.9.
pub(super) fn most_segments() -> usize {
    if kernel_release() >= (6, 9, 0) { 127 } else { 63 }
}

/// A message to send: `length` bytes of the arena from `start` on, in datagrams of `segment` bytes, the last of what is
/// left.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Message {
    pub(super) peer: SocketAddr,
    pub(super) start: usize,
    pub(super) length: usize,
    pub(super) segment: usize,
}

/// A control message that holds one number.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
struct Control([u8; 64]);

/// Memory for sending [`SEND_MESSAGES`] at a time.
pub(super) struct Sender {
    headers: Vec<libc::mmsghdr>,
    vectors: Vec<libc::iovec>,
    addresses: Vec<libc::sockaddr_storage>,
    controls: Vec<Control>,
}

// SAFETY: the pointers within are set and used in one call of `send`, and point nowhere between calls.
unsafe impl Send for Sender {}

impl Sender {
    pub(super) fn new() -> Self {
        // SAFETY: these are integers, arrays and pointers, for all of which zero bytes are a value.
        let (header, vector, address) = unsafe { (zeroed(), zeroed(), zeroed()) };
        Self {
            headers: vec![header; SEND_MESSAGES],
            vectors: vec![vector; SEND_MESSAGES],
            addresses: vec![address; SEND_MESSAGES],
            controls: vec![Control([0; 64]); SEND_MESSAGES],
        }
    }

    /// Gives the first of `messages`, at most [`SEND_MESSAGES`], to the kernel: how many it took. An error is about the
    /// first alone.
    pub(super) fn send(&mut self, socket: &Socket, arena: &[u8], messages: &[Message]) -> io::Result<usize> {
        let count = messages.len().min(SEND_MESSAGES);
        for (index, message) in messages[..count].iter().enumerate() {
            let payload = &arena[message.start..message.start + message.length];
            let (address, length) = raw_address(message.peer);
            self.addresses[index] = address;
            self.vectors[index] = libc::iovec {
                iov_base: payload.as_ptr().cast_mut().cast(),
                iov_len: payload.len(),
            };
            let header = &mut self.headers[index].msg_hdr;
            header.msg_name = (&raw mut self.addresses[index]).cast();
            header.msg_namelen = length;
            header.msg_iov = &raw mut self.vectors[index];
            header.msg_iovlen = 1;
            header.msg_control = std::ptr::null_mut();
            header.msg_controllen = 0;
            if message.length > message.segment {
                header.msg_control = (&raw mut self.controls[index]).cast();
                // SAFETY: CMSG_SPACE and CMSG_LEN only add; the control buffer is aligned, and 64 bytes hold a header
                // and a u16.
                unsafe {
                    header.msg_controllen = libc::CMSG_SPACE(2) as _;
                    let control = libc::CMSG_FIRSTHDR(&raw const *header);
                    (*control).cmsg_level = libc::SOL_UDP;
                    (*control).cmsg_type = UDP_SEGMENT;
                    (*control).cmsg_len = libc::CMSG_LEN(2) as _;
                    libc::CMSG_DATA(control)
                        .cast::<u16>()
                        .write_unaligned(message.segment as u16);
                }
            }
        }
        // SAFETY: `count` headers point at addresses, vectors, controls and payload that outlive the call; the kernel
        // only reads them, and writes the headers' lengths.
        let sent = unsafe {
            libc::sendmmsg(
                socket.fd.as_raw_fd(),
                self.headers.as_mut_ptr(),
                count as u32,
                libc::MSG_NOSIGNAL as _,
            )
        };
        if sent < 0 {
            Err(Error::last_os_error())
        } else {
            Ok(sent as usize)
        }
    }
}

/// A message that came.
pub(super) struct Received<'a> {
    pub(super) from: IpAddr,
    /// Bytes of a datagram; the last may be shorter.
    pub(super) segment: usize,
    pub(super) payload: &'a mut [u8],
}

/// Memory for receiving up to [`RECEIVE_MANY`] at a time; what is not written to is not there.
pub(super) struct Receiver {
    /// How many the next call takes.
    batch: usize,
    buffers: Vec<u8>,
    headers: Vec<libc::mmsghdr>,
    vectors: Vec<libc::iovec>,
    addresses: Vec<libc::sockaddr_storage>,
    controls: Vec<Control>,
}

// SAFETY: the pointers within are set and used in one call of `receive`, and not followed between calls but for control
// messages, which are the receiver's own memory.
unsafe impl Send for Receiver {}

impl Receiver {
    pub(super) fn new() -> Self {
        // SAFETY: these are integers, arrays and pointers, for all of which zero bytes are a value.
        let (header, vector, address) = unsafe { (zeroed(), zeroed(), zeroed()) };
        Self {
            batch: RECEIVE_FEW,
            buffers: vec![0; RECEIVE_MANY * RECEIVE_BUFFER],
            headers: vec![header; RECEIVE_MANY],
            vectors: vec![vector; RECEIVE_MANY],
            addresses: vec![address; RECEIVE_MANY],
            controls: vec![Control([0; 64]); RECEIVE_MANY],
        }
    }

    /// Takes what is there, as far as there is memory: how many came, and whether there may be more. `WouldBlock` if
    /// none.
    pub(super) fn receive(&mut self, socket: &Socket) -> io::Result<(usize, bool)> {
        for (index, buffer) in self
            .buffers
            .chunks_exact_mut(RECEIVE_BUFFER)
            .enumerate()
            .take(self.batch)
        {
            self.vectors[index] = libc::iovec {
                iov_base: buffer.as_mut_ptr().cast(),
                iov_len: buffer.len(),
            };
            let header = &mut self.headers[index].msg_hdr;
            header.msg_name = (&raw mut self.addresses[index]).cast();
            header.msg_namelen = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
            header.msg_iov = &raw mut self.vectors[index];
            header.msg_iovlen = 1;
            header.msg_control = (&raw mut self.controls[index]).cast();
            header.msg_controllen = size_of::<Control>() as _;
        }
        // SAFETY: the headers point at addresses, vectors, controls and buffers of this receiver, each of the length
        // that is said, which outlive the call.
        let count = unsafe {
            libc::recvmmsg(
                socket.fd.as_raw_fd(),
                self.headers.as_mut_ptr(),
                self.batch as u32,
                libc::MSG_DONTWAIT as _,
                std::ptr::null_mut(),
            )
        };
        if count < 0 {
            return Err(Error::last_os_error());
        }
        let (count, asked) = (count as usize, self.batch);
        let bytes: usize = self.headers[..count].iter().map(|header| header.msg_len as usize).sum();
        self.batch = if bytes >= count * MERGED {
            RECEIVE_FEW
        } else {
            RECEIVE_MANY
        };
        Ok((count, count == asked))
    }

    /// A message of the last [`Self::receive`], by its number; `None` if the kernel had to cut it or its sender has no
    /// IP address.
    pub(super) fn message(&mut self, index: usize) -> Option<Received<'_>> {
        let length = self.headers[index].msg_len as usize;
        let header = &self.headers[index].msg_hdr;
        if header.msg_flags & libc::MSG_TRUNC != 0 {
            return None;
        }
        let from = address(&self.addresses[index])?;
        let mut segment = length;
        // SAFETY: the kernel wrote this header and the control buffer that it points to, which is this receiver's.
        unsafe {
            let mut control = libc::CMSG_FIRSTHDR(&raw const *header);
            while !control.is_null() {
                if (*control).cmsg_level == libc::SOL_UDP && (*control).cmsg_type == UDP_GRO {
                    let told = libc::CMSG_DATA(control).cast::<i32>().read_unaligned();
                    segment = usize::try_from(told).unwrap_or(0);
                }
                control = libc::CMSG_NXTHDR(&raw const *header, control);
            }
        }
        let start = index * RECEIVE_BUFFER;
        Some(Received {
            from,
            // A datagram without payload is one of no bytes.
            segment: segment.clamp(1, RECEIVE_BUFFER),
            payload: &mut self.buffers[start..start + length],
        })
    }
}

/// An address as the kernel takes it, and its length.
fn raw_address(address: SocketAddr) -> (libc::sockaddr_storage, libc::socklen_t) {
    // SAFETY: a sockaddr_storage is integers and arrays, for which zero bytes are a value.
    let mut storage: libc::sockaddr_storage = unsafe { zeroed() };
    let length = match canonical(address) {
        SocketAddr::V4(address) => {
            let raw = libc::sockaddr_in {
                sin_family: libc::AF_INET as libc::sa_family_t,
                sin_port: address.port().to_be(),
                sin_addr: libc::in_addr {
                    s_addr: u32::from_ne_bytes(address.ip().octets()),
                },
                sin_zero: [0; 8],
            };
            // SAFETY: a sockaddr_storage is as large as any address and aligned for all.
            unsafe { (&raw mut storage).cast::<libc::sockaddr_in>().write(raw) };
            size_of::<libc::sockaddr_in>()
        }
        SocketAddr::V6(address) => {
            let raw = libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as libc::sa_family_t,
                sin6_port: address.port().to_be(),
                sin6_flowinfo: 0,
                sin6_addr: libc::in6_addr {
                    s6_addr: address.ip().octets(),
                },
                sin6_scope_id: address.scope_id(),
            };
            // SAFETY: as above.
            unsafe { (&raw mut storage).cast::<libc::sockaddr_in6>().write(raw) };
            size_of::<libc::sockaddr_in6>()
        }
    };
    (storage, length as libc::socklen_t)
}

fn canonical(address: SocketAddr) -> SocketAddr {
    match (address.ip().to_canonical(), address) {
        (IpAddr::V4(ip), _) => SocketAddrV4::new(ip, address.port()).into(),
        (IpAddr::V6(_), SocketAddr::V6(address)) => {
            SocketAddrV6::new(*address.ip(), address.port(), 0, address.scope_id()).into()
        }
        (IpAddr::V6(ip), SocketAddr::V4(_)) => SocketAddr::new(ip.into(), address.port()),
    }
}

fn address(raw: &libc::sockaddr_storage) -> Option<IpAddr> {
    match i32::from(raw.ss_family) {
        libc::AF_INET => {
            // SAFETY: the kernel wrote an address of this family.
            let raw = unsafe { (&raw const *raw).cast::<libc::sockaddr_in>().read() };
            Some(Ipv4Addr::from(raw.sin_addr.s_addr.to_ne_bytes()).into())
        }
        libc::AF_INET6 => {
            // SAFETY: the kernel wrote an address of this family.
            let raw = unsafe { (&raw const *raw).cast::<libc::sockaddr_in6>().read() };
            Some(IpAddr::from(Ipv6Addr::from(raw.sin6_addr.s6_addr)).to_canonical())
        }
        _ => None,
    }
}

/// Wakes a worker to end it.
#[derive(Debug)]
pub(super) struct Wake(EventFd);

impl Wake {
    pub(super) fn new() -> io::Result<Self> {
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        Ok(Self(EventFd::from_value_and_flags(0, flags)?))
    }

    /// Ends the worker; it stays readable, so that it can't be missed.
    pub(super) fn stop(&self) {
        // Fails only where 2^64 stops were called for already.
        let _ = self.0.write(1);
    }
}

impl AsFd for Wake {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_that_damage_segmented_udp_are_known_by_their_version() {
        for (text, damages) in [
            ("6.18.44-fc-v669", false),
            ("7.0.0-10-generic", true),
            ("7.0", true),
            ("7.1.4", true),
            ("7.1.5", false),
            ("7.2.0-rc1", false),
            ("", false),
        ] {
            assert_eq!(kernel_damages_segments(&release(text)), damages, "{text}");
        }
    }

    #[test]
    fn addresses_go_to_the_kernel_and_come_back() {
        for (text, back) in [
            ("192.0.2.7:8285", "192.0.2.7"),
            ("[2001:db8::7]:8285", "2001:db8::7"),
            ("[::ffff:192.0.2.7]:8285", "192.0.2.7"),
        ] {
            let (raw, _) = raw_address(text.parse().expect("an address"));
            assert_eq!(address(&raw), Some(back.parse().expect("an address")), "{text}");
        }
    }
}
