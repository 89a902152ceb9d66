//! Whether addresses answer an echo request: one datagram each, all at once.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, recvfrom, sendto, socket,
};
use std::os::fd::AsFd as _;

/// How long an answer may take.
const WAIT: Duration = Duration::from_secs(1);
/// What tells our requests from others': an identifier that another pinger is unlikely to have, and a payload.
const IDENTIFIER: [u8; 2] = *b"rm";
const PAYLOAD: &[u8] = b"ringmail doctor";

/// Each address, and whether it answered within a second. Nothing is sent where there is none.
pub(super) fn ask(addresses: &[IpAddr]) -> io::Result<BTreeMap<IpAddr, bool>> {
    let mut answers: BTreeMap<IpAddr, bool> = addresses.iter().map(|address| (*address, false)).collect();
    for v6 in [false, true] {
        let asked: Vec<IpAddr> = answers
            .keys()
            .copied()
            .filter(|address| address.is_ipv6() == v6)
            .collect();
        if asked.is_empty() {
            continue;
        }
        let socket = open(v6)?;
        for address in &asked {
            let to = SockaddrStorage::from(std::net::SocketAddr::new(*address, 0));
            // One that can't be sent to does not answer either.
            let _ = sendto(socket.as_raw_fd(), &request(v6), &to, MsgFlags::empty());
        }
        collect(&socket, v6, &mut answers)?;
    }
    Ok(answers)
}

fn open(v6: bool) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let (family, protocol) = match v6 {
        false => (AddressFamily::Inet, SockProtocol::Icmp),
        true => (AddressFamily::Inet6, SockProtocol::IcmpV6),
    };
    Ok(socket(family, SockType::Raw, flags, protocol)?)
}

/// RFC 792, RFC 4443 §4.1. Of ICMPv6 the kernel writes the checksum.
fn request(v6: bool) -> Vec<u8> {
    let mut message = vec![if v6 { 128 } else { 8 }, 0, 0, 0, IDENTIFIER[0], IDENTIFIER[1], 0, 1];
    message.extend(PAYLOAD);
    if !v6 {
        let sum: u32 = message
            .chunks(2)
            .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)])))
            .sum();
        let folded = (sum & 0xffff) + (sum >> 16);
        let sum = !u16::try_from((folded & 0xffff) + (folded >> 16)).unwrap_or(u16::MAX);
        message[2..4].copy_from_slice(&sum.to_be_bytes());
    }
    message
}

fn collect(socket: &OwnedFd, v6: bool, answers: &mut BTreeMap<IpAddr, bool>) -> io::Result<()> {
    let deadline = Instant::now() + WAIT;
    let mut buffer = [0; 1500];
    while answers
        .iter()
        .any(|(address, answered)| address.is_ipv6() == v6 && !answered)
    {
        let left = deadline.saturating_duration_since(Instant::now());
        let Some(left) = PollTimeout::try_from(left).ok().filter(|_| !left.is_zero()) else {
            break;
        };
        let mut ready = [PollFd::new(socket.as_fd(), PollFlags::POLLIN)];
        match poll(&mut ready, left) {
            Ok(0) => break,
            Ok(_) => {}
            Err(Errno::EINTR) => continue,
            Err(error) => return Err(error.into()),
        }
        // A port that is unreachable and the like is told by the silence.
        let Ok((length, from)) = recvfrom::<SockaddrStorage>(socket.as_raw_fd(), &mut buffer) else {
            continue;
        };
        let from = from.and_then(|from| {
            let v4 = from.as_sockaddr_in().map(|from| IpAddr::from(from.ip()));
            v4.or_else(|| Some(IpAddr::from(from.as_sockaddr_in6()?.ip())))
        });
        if is_answer(&buffer[..length.min(buffer.len())], v6)
            && let Some(answered) = from.and_then(|from| answers.get_mut(&from))
        {
            *answered = true;
        }
    }
    Ok(())
}

/// Whether these bytes are an echo reply to ours; those of IPv4 have their IP header in front.
fn is_answer(bytes: &[u8], v6: bool) -> bool {
    let message = match v6 {
        true => Some(bytes),
        false => bytes
            .first()
            .and_then(|first| bytes.get(usize::from(first & 0xf) * 4..)),
    };
    let kind = if v6 { 129 } else { 0 };
    message.is_some_and(|message| {
        message.first() == Some(&kind) && message.get(4..6) == Some(&IDENTIFIER) && message.get(8..) == Some(PAYLOAD)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_has_the_checksum_of_rfc_792() {
        let sum: u32 = request(false)
            .chunks(2)
            .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)])))
            .sum();
        assert_eq!((sum & 0xffff) + (sum >> 16), 0xffff);
    }

    #[test]
    fn only_a_reply_with_our_payload_is_an_answer() {
        let mut reply = request(true);
        assert!(!is_answer(&reply, true), "a request is none");
        reply[0] = 129;
        assert!(is_answer(&reply, true));
        let mut v4 = vec![0x45; 20];
        v4.extend(request(false));
        v4[20] = 0;
        assert!(is_answer(&v4, false));
        v4.truncate(30);
        assert!(!is_answer(&v4, false) && !is_answer(&[], false) && !is_answer(&[0x4f], false));
    }
}
