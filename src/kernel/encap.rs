//! The UDP socket that makes the kernel take ESP out of UDP (RFC 3948).
//!
//! Only its existence matters: the kernel hands packets of the socket to IPsec before we would see them. What does
//! arrive here is no ESP (IKE, probes of port scanners, keepalives on kernels that pass them) and is thrown away.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, SockaddrStorage, bind, recv, setsockopt, socket, sockopt,
};

/// `UDP_ENCAP` of include/uapi/linux/udp.h.
const UDP_ENCAP: libc::c_int = 100;
/// `UDP_ENCAP_ESPINUDP`: a non-zero SPI first, or four zero bytes before what is not ESP.
const ESP_IN_UDP: libc::c_int = 2;
/// At most so many datagrams are thrown away in one call, so that a flood of them can't hold up the caller.
const DRAIN_AT_MOST: usize = 256;
/// RFC 3948 §2.3: a NAT-keepalive is this byte alone.
const KEEPALIVE: [u8; 1] = [0xff];

/// The socket of one family. Dropping it ends the reception of ESP in UDP, not the sending.
#[derive(Debug)]
pub struct Encap {
    socket: UdpSocket,
    local: SocketAddr,
}

/// Why ESP in UDP can't be received.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Another program has the port.
    #[error(
        "UDP {local} is in use by another program, and UDPEncap needs it: find the holder with `ss -ulpn 'sport = :{}'` \
         and stop it, or set EncapPort in net-conf.json on every node", local.port()
    )]
    PortInUse {
        /// The address and port that were asked for.
        local: SocketAddr,
    },
    /// The kernel has no ESP in UDP for this family.
    #[error("the kernel takes no ESP out of UDP at {local}: load the module {} (IPv6: Linux 5.8 or newer)",
        if local.is_ipv4() { "esp4" } else { "esp6" })]
    Unsupported {
        /// The address and port that were asked for.
        local: SocketAddr,
        /// The kernel's reason.
        source: Errno,
    },
    /// A descriptor that was handed over is not this socket.
    #[error("the socket that was handed over is bound to {actual} and not to {local}: it is not used")]
    Other {
        /// The address and port that were asked for.
        local: SocketAddr,
        /// What the descriptor is bound to.
        actual: SocketAddr,
    },
    /// Another step failed.
    #[error("{step} the UDP socket {local} for UDPEncap")]
    Socket {
        /// What was being done.
        step: &'static str,
        /// The address and port that were asked for.
        local: SocketAddr,
        /// The system's reason.
        source: io::Error,
    },
}

impl Encap {
    /// Binds `local` (an unspecified address stands for all of its family) and turns the kernel's reception on.
    pub fn open(local: SocketAddr) -> Result<Self, Error> {
        let failed = |step| {
            move |errno: Errno| Error::Socket {
                step,
                local,
                source: errno.into(),
            }
        };
        let family = if local.is_ipv4() {
            AddressFamily::Inet
        } else {
            AddressFamily::Inet6
        };
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(family, SockType::Datagram, flags, None).map_err(failed("open"))?;
        if local.is_ipv6() {
            // Else the unspecified IPv6 address takes the port from the IPv4 socket.
            setsockopt(&socket, sockopt::Ipv6V6Only, &true).map_err(failed("make IPv6-only"))?;
        }
        // Without SO_REUSEADDR and SO_REUSEPORT, so that a second holder is refused.
        match bind(socket.as_raw_fd(), &SockaddrStorage::from(local)) {
            Err(Errno::EADDRINUSE) => return Err(Error::PortInUse { local }),
            other => other.map_err(failed("bind"))?,
        }
        Self::turn_on(socket, local)
    }

    /// Takes over a socket that a service manager kept while we were away; `local` is what it must be bound to.
    pub fn adopt(kept: OwnedFd, local: SocketAddr) -> Result<Self, Error> {
        let socket = UdpSocket::from(kept);
        let failed = |step| move |source| Error::Socket { step, local, source };
        let actual = socket.local_addr().map_err(failed("take over"))?;
        if actual != local {
            return Err(Error::Other { local, actual });
        }
        socket.set_nonblocking(true).map_err(failed("take over"))?;
        Self::turn_on(socket.into(), local)
    }

    fn turn_on(socket: OwnedFd, local: SocketAddr) -> Result<Self, Error> {
        let value = ESP_IN_UDP;
        let length = size_of_val(&value) as libc::socklen_t;
        // SAFETY: the descriptor is open, and the pointer and length name `value`, which lives across the call.
        let result = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_UDP,
                UDP_ENCAP,
                (&raw const value).cast(),
                length,
            )
        };
        Errno::result(result).map_err(|source| Error::Unsupported { local, source })?;
        Ok(Self {
            socket: socket.into(),
            local,
        })
    }

    /// What it is bound to.
    pub fn local(&self) -> SocketAddr {
        self.local
    }

    /// Throws away what has arrived, at most 256 datagrams; says how many. Call it when the socket is readable: what
    /// nobody reads fills its queue.
    pub fn drain(&self) -> usize {
        let mut first = [0; 1];
        for thrown in 0..DRAIN_AT_MOST {
            match recv(
                self.socket.as_raw_fd(),
                &mut first,
                MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_TRUNC,
            ) {
                // An ICMP error of an earlier keepalive is told here once, and then it is gone.
                Ok(_) | Err(Errno::EINTR | Errno::ECONNREFUSED) => {}
                Err(_) => return thrown,
            }
        }
        DRAIN_AT_MOST
    }

    /// Sends a NAT-keepalive, so that the NAT on the way keeps the mapping to this socket (RFC 3948 §4).
    pub fn keep_alive(&self, peer: SocketAddr) -> io::Result<()> {
        self.socket.send_to(&KEEPALIVE, peer).map(|_| ())
    }
}

impl AsFd for Encap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
