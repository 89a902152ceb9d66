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
const DRAIN_AT_MOST: usize = 64;
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

    /// Throws away what has arrived, at most 64 datagrams; says how many. Call it when the socket is readable: what
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::kernel::firewall::lab::{Net, seen_and_answered};

    fn at(text: &str) -> SocketAddr {
        text.parse().expect("an address and port")
    }

    #[test]
    #[ignore = "needs root and a kernel with ESP"]
    fn esp_in_udp_reaches_the_other_side_while_the_socket_is_there() {
        for (public, other_public, subnets) in [
            ("198.51.100.1", "198.51.100.2", ["10.244.1.0/32", "10.244.2.0/32"]),
            (
                "2001:db8::1",
                "2001:db8::2",
                ["fd00:244:0:1::/128", "fd00:244:0:2::/128"],
            ),
        ] {
            let (net, other) = (Net::new(), Net::new());
            let addresses = |last| [format!("198.51.100.{last}/24"), format!("2001:db8::{last}/64")];
            let (ours, theirs) = (addresses(1), addresses(2));
            net.cable("wan", [&ours[0], &ours[1]], &other, "wan", [&theirs[0], &theirs[1]]);
            let sides = [(&net, public, other_public, 0), (&other, other_public, public, 1)];
            for (net, me, peer, index) in sides {
                net.address(subnets[index], "lo");
                let key = "0x000102030405060708090a0b0c0d0e0f10111213";
                for (from, to) in [(me, peer), (peer, me)] {
                    net.ip(&format!(
                        "xfrm state add src {from} dst {to} proto esp spi 0x1000 reqid 1 mode tunnel \
                         encap espinudp 4500 4500 0.0.0.0 aead rfc4106(gcm(aes)) {key} 128"
                    ));
                }
                let (own, far) = (subnets[index], subnets[1 - index]);
                let template = |from, to| format!("tmpl src {from} dst {to} proto esp reqid 1 mode tunnel");
                net.ip(&format!(
                    "xfrm policy add src {own} dst {far} dir out {}",
                    template(me, peer)
                ));
                net.ip(&format!(
                    "xfrm policy add src {far} dst {own} dir in {}",
                    template(peer, me)
                ));
                let family = if me.contains(':') { "-6 " } else { "" };
                let bare = own.split('/').next().expect("an address");
                net.ip(&format!("{family}route add {far} via {peer} src {bare}"));
            }
            let local = |address: &str| SocketAddr::new(address.parse().expect("an address"), 4500);
            let first = net.run(|| Encap::open(local(public))).expect("the socket");
            let second = other.run(|| Encap::open(local(other_public))).expect("the socket");
            let pod = |index: usize| {
                SocketAddr::new(
                    subnets[index].split('/').next().expect("one").parse().expect("one"),
                    7000,
                )
            };
            let (here, there) = (net.socket(&pod(0).to_string()), other.socket(&pod(1).to_string()));
            assert_eq!(seen_and_answered(&here, &there), pod(0).ip());
            assert_eq!((first.drain(), second.drain()), (0, 0), "the kernel took the ESP");

            drop(second);
            here.send_to(b"?", pod(1)).expect("sent");
            there
                .set_read_timeout(Some(Duration::from_millis(200)))
                .expect("a timeout");
            assert!(
                there.recv_from(&mut [0; 8]).is_err(),
                "nobody takes ESP out of UDP without the socket"
            );
        }
    }

    #[test]
    #[ignore = "needs root and network namespaces"]
    fn encap_throws_away_what_is_no_esp() {
        let net = Net::new();
        let (encap, sender) = net.run(|| {
            (
                Encap::open(at("127.0.0.1:4500")).expect("the socket"),
                UdpSocket::bind("127.0.0.1:0").expect("a socket"),
            )
        });
        assert_eq!(encap.drain(), 0);
        // The kernel may deliver a moment after the send.
        let drained = |count| {
            let mut thrown = 0;
            for _ in 0..100 {
                thrown += encap.drain();
                if thrown >= count {
                    break;
                }
                std::thread::sleep(Duration::from_millis(10));
            }
            thrown
        };
        for _ in 0..3 {
            sender.send_to(&[0, 0, 0, 0, 1, 2, 3, 4], encap.local()).expect("sent");
        }
        assert_eq!(drained(3), 3);
        for _ in 0..DRAIN_AT_MOST + 1 {
            sender.send_to(&[0, 0, 0, 0, 1], encap.local()).expect("sent");
        }
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(encap.drain(), DRAIN_AT_MOST, "a flood does not hold the caller");
        assert_eq!(drained(1), 1);
        encap.keep_alive(sender.local_addr().expect("bound")).expect("sent");
        let mut received = [0; 4];
        assert_eq!(sender.recv(&mut received).expect("a keepalive"), 1);
        assert_eq!(received[0], 0xff);
    }

    #[test]
    #[ignore = "needs root and network namespaces"]
    fn encap_names_a_port_in_use_and_how_to_find_its_holder() {
        let net = Net::new();
        net.run(|| {
            let _v4 = Encap::open(at("0.0.0.0:4500")).expect("IPv4");
            let _v6 = Encap::open(at("[::]:4500")).expect("IPv6 beside it");
            let error = Encap::open(at("0.0.0.0:4500")).expect_err("taken");
            assert!(matches!(error, Error::PortInUse { .. }), "{error:?}");
            let text = error.to_string();
            assert!(
                text.contains("UDP 0.0.0.0:4500 is in use") && text.contains("ss -ulpn 'sport = :4500'"),
                "{text}"
            );
            assert!(text.contains("EncapPort"), "{text}");
        });
    }

    #[test]
    #[ignore = "needs root and network namespaces"]
    fn encap_takes_over_a_socket_only_if_it_is_the_right_one() {
        let net = Net::new();
        net.run(|| {
            let kept = || OwnedFd::from(UdpSocket::bind("127.0.0.1:4500").expect("a socket"));
            let adopted = Encap::adopt(kept(), at("127.0.0.1:4500")).expect("taken over");
            assert_eq!(adopted.drain(), 0, "it does not wait");
            drop(adopted);
            let error = Encap::adopt(kept(), at("127.0.0.1:4501")).expect_err("another port");
            assert!(matches!(error, Error::Other { .. }), "{error:?}");
        });
    }
}
