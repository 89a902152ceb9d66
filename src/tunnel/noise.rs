//! Random packets through all of the pure parts, for as long as is wanted: what a fuzzer would do, on stable Rust and
//! without its tools (tests/fuzz has those). A seed that failed is in the panic's message.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::fuzz;
use super::packet::{FRAGMENT, ICMP, ICMPV6, TCP, UDP};
use super::sample::Made;
use super::virtio::{HEADER, Header};

/// xorshift64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() >> 16) as usize % limit
    }

    fn one_in(&mut self, number: usize) -> bool {
        self.below(number) == 0
    }

    /// Numbers at which code changes its mind.
    fn edge(&mut self) -> u8 {
        let edges = [0, 1, 4, 5, 6, 15, 16, 20, 40, 0x45, 0x60, 0x7f, 0x80, 0xff];
        if self.one_in(3) {
            self.next() as u8
        } else {
            edges[self.below(edges.len())]
        }
    }

    fn made(&mut self) -> Made {
        let size = self.below(4000);
        Made {
            v6: self.one_in(2),
            udp: self.one_in(2),
            ports: (self.below(3) as u16, 2000),
            ttl: 1 + self.below(4) as u8,
            flags: if self.one_in(4) { self.next() as u8 } else { 0x10 },
            options: vec![1; 4 * self.below(4)],
            ..Made::tcp(size)
        }
    }

    fn damage(&mut self, packet: &mut Vec<u8>) {
        for _ in 0..self.below(5) {
            let reach = packet.len().min(if self.one_in(8) { 4000 } else { 80 });
            if reach > 0 {
                let at = self.below(reach);
                packet[at] = self.edge();
            }
        }
        if self.one_in(6) {
            let protocols = [TCP, UDP, ICMP, ICMPV6, FRAGMENT, 0, 43, 51, 59, 60, 135];
            let at = if packet.first().is_some_and(|byte| byte >> 4 == 6) {
                6
            } else {
                9
            };
            if let Some(place) = packet.get_mut(at) {
                *place = protocols[self.below(protocols.len())];
            }
        }
        if self.one_in(5) {
            packet.truncate(self.below(packet.len() + 1));
        }
        if self.one_in(9) {
            packet.extend([0xaa; 30]);
        }
    }
}

/// A few packets in and out.
fn round(random: &mut Random) {
    let mut packets = Vec::new();
    for _ in 0..4 {
        let made = random.made();
        let size = 1 + random.below(1500) as u16;
        for mut packet in made.slowly(size.max(100)) {
            if random.one_in(3) {
                random.damage(&mut packet);
            }
            packets.push(packet);
        }
        let (mut header, mut large) = made.large(size);
        if random.one_in(2) {
            random.damage(&mut large);
        }
        if random.one_in(3) {
            let mut bytes = [0; HEADER];
            bytes.fill_with(|| random.edge());
            header = Header::from_bytes(&bytes);
        }
        fuzz::out(&header, &mut large);
    }
    fuzz::inwards(packets);
}

fn noise(time: Duration, mut seed: u64) -> u64 {
    let end = Instant::now() + time;
    let mut rounds = 0;
    while Instant::now() < end {
        let outcome = catch_unwind(AssertUnwindSafe(|| round(&mut Random(seed | 1))));
        assert!(outcome.is_ok(), "seed {seed}");
        seed = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(12345);
        rounds += 1;
    }
    rounds
}

#[test]
fn random_packets_come_out_well_formed_or_not_at_all() {
    assert!(noise(Duration::from_secs(1), 1) > 0);
}

#[test]
#[ignore = "takes half a minute, and other packets every time"]
fn tunnel_takes_random_packets_for_half_a_minute() {
    let seed = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(1, |since| since.as_nanos() as u64);
    assert!(noise(Duration::from_secs(30), seed) > 0);
}
