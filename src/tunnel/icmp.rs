//! ICMP errors, as a router answers what it can't forward (RFC 792, RFC 1812 section 4.3.2, RFC 4443).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use super::checksum;
use super::packet::{FRAGMENT, ICMP, ICMPV6, Ip, be16, put16, put32, set_header_checksum};

/// Bytes of an error at most: as much of the packet as fits is quoted (RFC 1812 4.3.2.3, RFC 4443 3.1).
const LARGEST_V4: usize = 576;
const LARGEST_V6: usize = 1280;

/// Room for any error.
pub(super) const LARGEST: usize = LARGEST_V6;

/// What is wrong with a packet.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Problem {
    /// No peer has its destination.
    NoRoute,
    /// Its time to live ran out.
    TimeExceeded,
    /// It is larger than this MTU and must not be fragmented.
    TooBig(u32),
}

/// Writes the error about `packet`, from `source`, to the front of `to`: its length, and whom it is for. `None` if the
/// packet must not be answered: an ICMP error, a later fragment, what is not from one host or not to one.
pub(super) fn answer(
    problem: Problem,
    packet: &[u8],
    source: IpAddr,
    to: &mut [u8; LARGEST],
) -> Option<(usize, IpAddr)> {
    let ip = Ip::read(packet)?;
    match (ip.source(packet), source) {
        (IpAddr::V4(target), IpAddr::V4(source)) => {
            let length = answer_v4(problem, packet, ip, source, target, to)?;
            Some((length, target.into()))
        }
        (IpAddr::V6(target), IpAddr::V6(source)) => {
            let length = answer_v6(problem, packet, ip, source, target, to)?;
            Some((length, target.into()))
        }
        _ => None,
    }
}

fn answer_v4(
    problem: Problem,
    packet: &[u8],
    ip: Ip,
    source: Ipv4Addr,
    target: Ipv4Addr,
    to: &mut [u8],
) -> Option<usize> {
    let IpAddr::V4(destination) = ip.destination(packet) else {
        return None;
    };
    let host = !(target.is_unspecified() || target.is_multicast() || target.is_broadcast() || target.is_loopback());
    let reachable = !(destination.is_multicast() || destination.is_broadcast());
    let later = be16(packet, 6) & 0x1fff != 0;
    // Queries are answered: echo, timestamp, information, address mask.
    let query = |kind: &u8| matches!(kind, 0 | 8 | 13..=18);
    let error = ip.protocol == ICMP && !packet.get(ip.header).is_some_and(query);
    if !host || !reachable || later || error {
        return None;
    }
    let (kind, code, rest) = match problem {
        Problem::NoRoute => (3, 0, 0),
        Problem::TimeExceeded => (11, 0, 0),
        Problem::TooBig(mtu) => (3, 4, mtu.min(0xffff)),
    };
    let quoted = ip.total.min(LARGEST_V4 - 28);
    let length = 28 + quoted;
    to[..28].fill(0);
    to[0] = 0x45;
    put16(to, 2, length as u16);
    to[8] = 64;
    to[9] = ICMP;
    to[12..16].copy_from_slice(&source.octets());
    to[16..20].copy_from_slice(&target.octets());
    set_header_checksum(to, 20);
    (to[20], to[21]) = (kind, code);
    put32(to, 24, rest);
    to[28..length].copy_from_slice(&packet[..quoted]);
    let checksum = checksum::finish(checksum::sum(&to[20..length]));
    to[22..24].copy_from_slice(&checksum);
    Some(length)
}

fn answer_v6(
    problem: Problem,
    packet: &[u8],
    ip: Ip,
    source: Ipv6Addr,
    target: Ipv6Addr,
    to: &mut [u8],
) -> Option<usize> {
    let IpAddr::V6(destination) = ip.destination(packet) else {
        return None;
    };
    let host = !(target.is_unspecified() || target.is_multicast() || target.is_loopback());
    // "Packet too big" is for multicast too, or its path would never be found (RFC 4443 2.4 e.3).
    let reachable = !destination.is_multicast() || matches!(problem, Problem::TooBig(_));
    if !host || !reachable || !may_answer_v6(packet, ip) {
        return None;
    }
    let (kind, code, rest) = match problem {
        Problem::NoRoute => (1, 0, 0),
        Problem::TimeExceeded => (3, 0, 0),
        Problem::TooBig(mtu) => (2, 0, mtu),
    };
    let quoted = ip.total.min(LARGEST_V6 - 48);
    let length = 48 + quoted;
    to[..48].fill(0);
    to[0] = 0x60;
    put16(to, 4, (length - 40) as u16);
    to[6] = ICMPV6;
    to[7] = 64;
    to[8..24].copy_from_slice(&source.octets());
    to[24..40].copy_from_slice(&target.octets());
    (to[40], to[41]) = (kind, code);
    put32(to, 44, rest);
    to[48..length].copy_from_slice(&packet[..quoted]);
    let answer = Ip {
        v6: true,
        header: 40,
        total: length,
        protocol: ICMPV6,
        fragment: false,
    };
    let sum = checksum::sum(&to[40..length]) + answer.pseudo_sum(to, ICMPV6, length - 40);
    to[42..44].copy_from_slice(&checksum::finish(sum));
    Some(length)
}

/// Not a later fragment and not an ICMPv6 error, behind whatever extension headers.
fn may_answer_v6(packet: &[u8], ip: Ip) -> bool {
    let (mut next, mut at) = (ip.protocol, ip.header);
    loop {
        let Some(rest) = packet.get(at..).filter(|rest| rest.len() >= 8) else {
            // Nothing more to read: what is unclear is not answered, but for a header that has no more to say.
            return !matches!(next, ICMPV6 | FRAGMENT | 0 | 43 | 60);
        };
        match next {
            0 | 43 | 60 => at += 8 + usize::from(rest[1]) * 8,
            FRAGMENT if be16(rest, 2) & 0xfff8 != 0 => return false,
            FRAGMENT => at += 8,
            // Errors are below 128; 137 is a redirect.
            ICMPV6 => return rest[0] >= 128 && rest[0] != 137,
            _ => return true,
        }
        next = rest[0];
    }
}

/// How often errors are sent, as routers limit them: so many a second, as many at once.
#[derive(Debug)]
pub(super) struct Limiter {
    each: Duration,
    /// When the next would be due if each waited for the one before.
    next: Instant,
    burst: Duration,
}

impl Limiter {
    pub(super) fn new(a_second: u32, now: Instant) -> Self {
        let each = Duration::from_secs(1) / a_second;
        Self {
            each,
            next: now,
            burst: Duration::from_secs(1) - each,
        }
    }

    /// Whether one may be sent now; it counts as sent then.
    pub(super) fn allows(&mut self, now: Instant) -> bool {
        let next = self.next.max(now);
        let allowed = next - now <= self.burst;
        if allowed {
            self.next = next + self.each;
        }
        allowed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tunnel::sample::{self, Made, rfc1071};
    use proptest::prelude::*;

    const V4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 244, 1, 0));
    const V6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd00, 1, 0, 0, 0, 0, 0, 9));

    fn answered(problem: Problem, packet: &[u8]) -> Option<Vec<u8>> {
        let mut to = [0xaa; LARGEST];
        let source = if packet[0] >> 4 == 4 { V4 } else { V6 };
        answer(problem, packet, source, &mut to).map(|(length, _)| to[..length].to_vec())
    }

    proptest! {
        #[test]
        fn an_answer_is_whole_and_quotes_the_packet(made in sample::made(), big in 1280u32..9000) {
            for problem in [Problem::NoRoute, Problem::TimeExceeded, Problem::TooBig(big)] {
                let packet = &made.slowly(1400)[0];
                let text = answered(problem, packet).expect("it may be answered");
                let ip = Ip::read(&text).expect("an IP packet");
                prop_assert_eq!(ip.total, text.len());
                prop_assert_eq!(ip.destination(&text), Ip::read(packet).expect("an IP packet").source(packet));
                let body = &text[ip.header..];
                let mut summed = Vec::new();
                if ip.v6 {
                    summed.extend(&text[8..40]);
                    summed.extend((body.len() as u32).to_be_bytes());
                    summed.extend([0, 0, 0, ICMPV6]);
                } else {
                    prop_assert_eq!(rfc1071(&text[..20]), 0xffff);
                }
                summed.extend(body);
                prop_assert_eq!(rfc1071(&summed), 0xffff);
                let most = if ip.v6 { LARGEST_V6 } else { LARGEST_V4 };
                prop_assert_eq!(text.len(), (ip.header + 8 + packet.len()).min(most));
                prop_assert_eq!(&body[8..], &packet[..body.len() - 8]);
                prop_assert!(answered(problem, &text).is_none(), "no error about an error");
            }
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 1..200), version in 0u8..16) {
            let mut bytes = bytes;
            bytes[0] = bytes[0] & 15 | version << 4;
            let total = (bytes.len() as u16).to_be_bytes();
            if bytes.len() > 40 {
                bytes[2..4].copy_from_slice(&total);
                if version == 6 {
                    bytes[4..6].copy_from_slice(&(total[1].saturating_sub(40) as u16).to_be_bytes());
                }
            }
            for problem in [Problem::NoRoute, Problem::TimeExceeded, Problem::TooBig(1400)] {
                answered(problem, &bytes);
            }
        }
    }

    #[test]
    fn types_and_codes_are_the_rfcs() {
        let v4 = Made::udp(10).slowly(10).remove(0);
        let v6 = Made {
            v6: true,
            ..Made::udp(10)
        }
        .slowly(10)
        .remove(0);
        for (problem, four, six) in [
            (Problem::NoRoute, [3, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]),
            (Problem::TimeExceeded, [11, 0, 0, 0, 0, 0], [3, 0, 0, 0, 0, 0]),
            (Problem::TooBig(1472), [3, 4, 0, 0, 5, 0xc0], [2, 0, 0, 0, 5, 0xc0]),
        ] {
            let told = |text: &[u8]| [text[0], text[1], text[4], text[5], text[6], text[7]];
            assert_eq!(
                told(&answered(problem, &v4).expect("an answer")[20..]),
                four,
                "{problem:?}"
            );
            assert_eq!(
                told(&answered(problem, &v6).expect("an answer")[40..]),
                six,
                "{problem:?}"
            );
        }
    }

    #[test]
    fn what_must_not_be_answered_is_not() {
        let good = Made::udp(100).slowly(100).remove(0);
        let with = |at: usize, bytes: &[u8]| {
            let mut packet = good.clone();
            packet[at..at + bytes.len()].copy_from_slice(bytes);
            answered(Problem::NoRoute, &packet).is_some()
        };
        assert!(with(0, &[0x45]));
        assert!(with(6, &[0x20, 0]), "a first fragment");
        assert!(!with(6, &[0, 1]), "a later fragment");
        assert!(!with(16, &[224, 0, 0, 1]), "to many");
        assert!(!with(16, &[255, 255, 255, 255]), "to all");
        assert!(!with(12, &[0, 0, 0, 0]), "from nobody");
        assert!(!with(12, &[224, 0, 0, 1]), "from many");
        let icmp = |kind: u8| {
            let mut packet = good.clone();
            packet[9] = ICMP;
            packet[20] = kind;
            answered(Problem::NoRoute, &packet).is_some()
        };
        assert!(icmp(8) && icmp(0), "queries");
        assert!(!icmp(3) && !icmp(11) && !icmp(5), "errors");
        let six = Made {
            v6: true,
            ..Made::udp(100)
        }
        .slowly(100)
        .remove(0);
        let behind = |chain: &[u8]| {
            let mut packet = six.clone();
            packet[6] = chain[0];
            packet[40..40 + chain.len() - 1].copy_from_slice(&chain[1..]);
            answered(Problem::NoRoute, &packet).is_some()
        };
        assert!(behind(&[ICMPV6, 128]) && !behind(&[ICMPV6, 1]) && !behind(&[ICMPV6, 137]));
        assert!(
            !behind(&[60, ICMPV6, 0, 0, 0, 0, 0, 0, 0, 3]),
            "an error behind options"
        );
        assert!(behind(&[60, ICMPV6, 0, 0, 0, 0, 0, 0, 0, 129]));
        assert!(!behind(&[FRAGMENT, 17, 0, 0, 8, 0, 0, 0, 0]), "a later fragment");
        assert!(behind(&[FRAGMENT, 17, 0, 0, 1, 0, 0, 0, 0]), "a first fragment");
    }

    #[test]
    fn errors_are_limited_to_so_many_a_second() {
        let start = Instant::now();
        let mut limiter = Limiter::new(100, start);
        let at = |limiter: &mut Limiter, milliseconds| limiter.allows(start + Duration::from_millis(milliseconds));
        assert_eq!((0..1000).filter(|_| at(&mut limiter, 0)).count(), 100);
        assert_eq!((0..1000).filter(|_| at(&mut limiter, 100)).count(), 10);
        assert_eq!((0..1000).filter(|_| at(&mut limiter, 60_000)).count(), 100);
    }
}
