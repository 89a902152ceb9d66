//! The probe: a datagram between two daemons inside the tunnel, and when to send one.
//!
//! ```text
//!   0      4     5      6        14       22       30       38       46     62
//!   | RMP1 | ask | rsvd | sender | receiver | sender | receiver | ticket | tag |
//!                       |  sent on          |  data goes on     |
//! ```
//! Numbers are big endian, 64 bits; a data generation of zeros says "nowhere yet". The tag is made with the probe key
//! of the generation it is sent on: a pod that forges its node's base address can't make one. Zeros may follow a question,
//! to see whether so much passes; an answer is never longer than this.

use std::time::Duration;

use keys::{Carrier, Epoch, ProbeKey};

use crate::epochs::{Generation, SILENCE};

pub mod arrivals;
pub mod loss;
pub mod size;

/// The UDP port that probes go to; only packets inside the tunnel reach it.
pub const PORT: u16 = 8474;

/// The UDP port that a probe comes from: by it the `out` policies tell on which carrier it is to travel.
pub const fn source(carrier: Carrier) -> u16 {
    match carrier {
        Carrier::Esp => PORT,
        Carrier::Udp => PORT + 1,
    }
}

/// The size of a probe without zeros behind it, bytes.
pub const LEN: usize = 62;

/// The most that a probe and its zeros can be: all that UDP carries, bytes.
pub const MOST: usize = 65_507;

const MAGIC: &[u8; 4] = b"RMP1";
const TAG: usize = 46;

/// What one daemon tells another.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Probe {
    /// Whether an answer is asked for; an answer asks for none.
    pub ask: bool,
    /// The generation that this probe is sent on.
    pub sent: Generation,
    /// The generation that the sender's data goes on.
    pub data: Option<Generation>,
    /// The asker's own number, given back in the answer.
    pub ticket: u64,
}

impl Probe {
    /// The datagram, sealed with the key of [`Probe::sent`].
    pub fn seal(&self, key: &ProbeKey) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        bytes[..4].copy_from_slice(MAGIC);
        bytes[4] = u8::from(self.ask);
        let data = self.data.map_or((0, 0), |g| (g.sender.0, g.receiver.0));
        let numbers = [self.sent.sender.0, self.sent.receiver.0, data.0, data.1, self.ticket];
        for (field, number) in bytes[6..TAG].chunks_exact_mut(8).zip(numbers) {
            field.copy_from_slice(&number.to_be_bytes());
        }
        let tag = key.seal(&bytes[..TAG]);
        bytes[TAG..].copy_from_slice(&tag);
        bytes
    }

    /// Reads a datagram; the tag is checked by [`Probe::genuine`], once the key is known. `None` if it is no probe.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let (bytes, padding) = bytes.split_first_chunk::<LEN>()?;
        if &bytes[..4] != MAGIC || bytes[4] > 1 || bytes[5] != 0 {
            return None;
        }
        // The tag is not about the padding: nothing may be said in it.
        if !padding.is_empty() && (bytes[4] == 0 || padding.iter().any(|byte| *byte != 0)) {
            return None;
        }
        let mut numbers = [0; 5];
        for (number, field) in numbers.iter_mut().zip(bytes[6..TAG].chunks_exact(8)) {
            *number = u64::from_be_bytes(field.try_into().ok()?);
        }
        let [sender, receiver, data_sender, data_receiver, ticket] = numbers;
        let generation = |s, r| Generation {
            sender: Epoch(s),
            receiver: Epoch(r),
        };
        let data = (data_sender != 0 || data_receiver != 0).then(|| generation(data_sender, data_receiver));
        Some(Self {
            ask: bytes[4] == 1,
            sent: generation(sender, receiver),
            data,
            ticket,
        })
    }

    /// Whether the peer that shares `key` made this datagram; of its padding [`Probe::parse`] has judged.
    pub fn genuine(bytes: &[u8], key: &ProbeKey) -> bool {
        let probe = bytes.first_chunk::<LEN>();
        let Some((message, tag)) = probe.and_then(|probe| probe.split_last_chunk::<16>()) else {
            return false;
        };
        key.open(message, tag)
    }
}

/// When one peer is probed next: at once after a change, then backing off; slowly while all is settled.
#[derive(Clone, Copy, Debug)]
pub struct Schedule {
    /// When it last began anew.
    since: Duration,
    due: Duration,
    step: Duration,
    /// How long it rests while all is settled.
    rest: Option<Duration>,
}

/// The first wait for an answer; it doubles with each unanswered probe.
const FIRST: Duration = Duration::from_millis(50);
/// The longest wait between two probes to a peer that has begun not to answer.
const SLOWEST: Duration = Duration::from_secs(10);
/// Later the wait is this part of the time that it has been silent for, so that a path that comes back is noticed within a
/// quarter of the time it was gone. A daemon that comes back says so itself.
const PART: u32 = 4;
/// The longest wait of all.
const LONGEST: Duration = Duration::from_secs(60);
/// Between two probes while both ends are settled. A NAT on the way keeps its mapping meanwhile (RFC 3948 section 4: 20 s).
pub const SETTLED: Duration = Duration::from_secs(15);
/// A settled peer that does not answer is asked again after this, some times: a daemon that is started anew answers within it.
pub const AGAIN: Duration = Duration::from_secs(5);
/// A node asks its settled peers at most one question in this time, all together, where no NAT is to be kept open.
const SHARE: Duration = Duration::from_millis(25);
/// The longest rest: no peer that answers counts as silent.
const LONGEST_REST: Duration = Duration::from_secs(SILENCE.as_secs() / 2);

/// How long to rest after an answer, among `peers` peers that are reached by plain ESP alone.
pub fn rest(peers: usize) -> Duration {
    SHARE
        .saturating_mul(u32::try_from(peers).unwrap_or(u32::MAX))
        .clamp(SETTLED, LONGEST_REST)
}

impl Schedule {
    /// Due at `now`.
    pub fn at_once(now: Duration) -> Self {
        Self {
            since: now,
            due: now,
            step: FIRST,
            rest: None,
        }
    }

    /// When the next probe is due.
    pub fn due(&self) -> Duration {
        self.due
    }

    /// Whether all was settled when the last probe was sent, and nothing has woken it since.
    pub fn rests(&self) -> bool {
        self.rest.is_some()
    }

    /// The peer answered while all is settled: the next probe is due `rest` after the last, whatever was said before.
    pub fn answered(&mut self, rest: Duration) {
        if let Some(before) = self.rest.filter(|before| !before.is_zero()) {
            let wait = self.due.saturating_sub(self.since);
            self.due = self.since + wait.mul_f64(rest.div_duration_f64(before));
            self.rest = Some(rest);
        }
    }

    /// Due at `now`, if it rests while all is well.
    pub fn wake(&mut self, now: Duration) {
        if self.rests() {
            *self = Self::at_once(now);
        }
    }

    /// Something came from the peer at `now`, or may come through again: due then, if the waits had grown long. That they
    /// take their time to grow keeps this from being done often.
    pub fn hope(&mut self, now: Duration) {
        if !self.rests() && self.due.saturating_sub(now) > SLOWEST {
            *self = Self::at_once(now);
        }
    }

    /// A probe was sent at `now`; where all is settled the next follows after `rest`. `jitter` lies in 0..1 and spreads
    /// the next one over a quarter of its wait.
    pub fn sent(&mut self, now: Duration, rest: Option<Duration>, jitter: f64) {
        self.rest = rest;
        let most = SLOWEST.max(now.saturating_sub(self.since) / PART).min(LONGEST);
        let wait = rest.unwrap_or_else(|| self.step.min(most));
        if self.rests() {
            (self.since, self.step) = (now, FIRST);
        } else {
            self.step = (self.step * 2).min(LONGEST);
        }
        self.due = now + wait.mul_f64(1.0 - jitter.clamp(0.0, 1.0) / 4.0);
    }
}
