//! Packets with numbers: which were sent when, which came when, and so which were lost.

use serde_json::{Value, json};

use super::seconds;

/// Sixteen bytes that prove a leak wherever they are seen on the wire (frames.py).
pub(crate) const MARKER: &[u8; 16] = b"ringmail-leaked!";
/// MARKER, the stream's id, the packet's number.
pub(crate) const HEADER: usize = 28;

/// Puts the header into a packet.
pub(crate) fn mark(packet: &mut [u8], id: u32, number: u64) {
    packet[..16].copy_from_slice(MARKER);
    packet[16..20].copy_from_slice(&id.to_be_bytes());
    packet[20..28].copy_from_slice(&number.to_be_bytes());
}

/// The stream and number of a packet of ours.
pub(crate) fn marked(packet: &[u8]) -> Option<(usize, usize)> {
    let (header, _) = packet.split_at_checked(HEADER)?;
    let (marker, rest) = header.split_at(16);
    let id = u32::from_be_bytes(rest[..4].try_into().ok()?);
    let number = u64::from_be_bytes(rest[4..].try_into().ok()?);
    (marker == MARKER).then_some((id as usize, number as usize))
}

/// What came of one way of a stream.
#[derive(Default)]
pub(crate) struct Arrivals {
    /// When each number came first; 0: it did not.
    at: Vec<u64>,
    twice: u64,
    reordered: u64,
    highest: usize,
    last: u64,
    gap: u64,
    gap_began: u64,
    delay: u64,
}

impl Arrivals {
    /// Packet `number`, sent at `sent`, came at `at`.
    pub(crate) fn came(&mut self, number: usize, sent: u64, at: u64) {
        if number >= self.at.len() {
            self.at.resize(number + 1, 0);
        }
        if std::mem::replace(&mut self.at[number], at) != 0 {
            self.twice += 1;
        }
        if number < self.highest {
            self.reordered += 1;
        }
        self.highest = self.highest.max(number);
        if self.last != 0 && at - self.last > self.gap {
            (self.gap, self.gap_began) = (at - self.last, self.last);
        }
        self.last = at;
        self.delay = self.delay.max(at.saturating_sub(sent));
    }

    pub(crate) fn any(&self) -> bool {
        self.last != 0
    }

    pub(crate) fn has(&self, number: usize) -> bool {
        self.at.get(number).is_some_and(|at| *at != 0)
    }

    /// Forgets the figures so far; what has come has come.
    pub(crate) fn count_from_here(&mut self) {
        (self.twice, self.reordered, self.gap, self.delay) = (0, 0, 0, 0);
    }

    /// `sent`: when each packet was sent. `first`: the first that counts. `expected`: whether it had to come.
    /// Losses are runs of consecutive numbers: [how many, when the first was sent, when the last was sent].
    pub(crate) fn report(&self, sent: &[u64], first: usize, expected: impl Fn(usize) -> bool) -> Value {
        let mut runs: Vec<(usize, usize)> = Vec::new();
        for number in (first..sent.len()).filter(|number| expected(*number) && !self.has(*number)) {
            match runs.last_mut() {
                Some((_, last)) if *last + 1 == number => *last = number,
                _ => runs.push((number, number)),
            }
        }
        let lost: Vec<_> = runs
            .iter()
            .map(|(from, to)| (to - from + 1, seconds(sent[*from]), seconds(sent[*to])))
            .collect();
        let expected = (first..sent.len()).filter(|number| expected(*number)).count();
        let received = (first..sent.len()).filter(|number| self.has(*number)).count();
        json!({
            "sent": expected,
            "received": received,
            "lost": lost,
            "twice": self.twice,
            "reordered": self.reordered,
            "gap": seconds(self.gap),
            "gap_began": seconds(self.gap_began),
            "delay": seconds(self.delay),
        })
    }
}
