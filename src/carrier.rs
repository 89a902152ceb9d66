//! Which carrier our data to one peer takes, where plain ESP and UDP are both open: a state machine without I/O or clock.
//!
//! A carrier is proved by the answer to a question that went on it; answers come back on both carriers, so what is
//! learned is of our direction alone. Plain ESP is preferred:
//!
//! ```text
//!   nothing proved ──▶ plain is asked; unanswered a few times, UDP too ──▶ the first that is answered
//!   on plain ─ one question unanswered ──▶ both are asked, quickly; UDP answered and plain not ──▶ on UDP
//!   on UDP ─ both are asked; plain answered some times in a row ──▶ on plain, with more patience if that was too early
//! ```
//! It is no matter of generations: the network between two nodes does not know of keys.

use std::fmt;
use std::time::Duration;

use keys::{Carrier, EncapMode};

/// What is open to a pair, by what its ends say: UDP alone where either wants it, the choice where both leave it open,
/// else plain ESP alone. An end that says "plain" keeps no UDP socket for one that can do without.
pub fn open(ours: EncapMode, theirs: EncapMode) -> &'static [Carrier] {
    match (ours, theirs) {
        (EncapMode::Udp, _) | (_, EncapMode::Udp) => &[Carrier::Udp],
        (EncapMode::Auto, EncapMode::Auto) => &[Carrier::Esp, Carrier::Udp],
        (EncapMode::Esp | EncapMode::Auto, EncapMode::Esp | EncapMode::Auto) => &[Carrier::Esp],
    }
}

/// So many questions stay without an answer before a carrier counts as silent.
const TRIES: u32 = 3;
/// An answer may take this long, or three times the usual round trip, before its question counts as unanswered.
const WAIT: Duration = Duration::from_millis(250);
/// The last of several questions is given this long, or twice the usual round trip.
const GRACE: Duration = Duration::from_millis(100);
/// No round trip counts for more: a peer that was busy once is not waited for the next time.
const SLOW: Duration = Duration::from_millis(300);
/// So many answers in a row bring data back to plain ESP.
const PROOFS: u32 = 5;
/// The most that this grows to while plain ESP comes and goes.
const MOST_PROOFS: u32 = 80;
/// Plain ESP that lasted shorter than this came back too early: twice as many answers are wanted the next time.
const LASTING: Duration = Duration::from_secs(60);

/// The least time between two rounds of questions to a peer whose carrier is open, while all is well: what bounds the
/// time to notice that a carrier no longer passes.
const ALERT: Duration = Duration::from_secs(2);
/// The most such time.
const CALM: Duration = Duration::from_secs(15);
/// A node asks its peers at most one question in this time, all together, while all is well.
const SHARE: Duration = Duration::from_millis(4);

/// How long to rest between two rounds of questions to one of `peers` peers, while all is well.
pub fn rest(peers: usize) -> Duration {
    SHARE
        .saturating_mul(u32::try_from(peers).unwrap_or(u32::MAX))
        .clamp(ALERT, CALM)
}

/// Why data takes another carrier.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Reason {
    /// It was the first to be answered.
    First,
    /// The other is not answered, and this one is.
    OtherSilent,
    /// Plain ESP was answered so many times in a row.
    Passes(u32),
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::First => f.write_str("the first to be answered"),
            Self::OtherSilent => f.write_str("the other is not answered, this is"),
            Self::Passes(times) => write!(f, "plain ESP was answered {times} times in a row"),
        }
    }
}

/// Data takes another carrier from now on.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Change {
    /// What it took before; `None` if nothing was proved.
    pub from: Option<Carrier>,
    /// What it takes now.
    pub to: Carrier,
    /// Why.
    pub reason: Reason,
}

/// What was asked on one carrier and answered.
#[derive(Clone, Debug, Default)]
struct Trail {
    /// The last question: its number and when it was sent.
    last: Option<(u64, Duration)>,
    /// Questions since the last answer.
    unanswered: u32,
    /// When the first of them was sent.
    since: Duration,
    /// When the newest question that was answered had been sent.
    proved: Option<Duration>,
}

/// Of a carrier that nothing was asked on.
const NEVER: Trail = Trail {
    last: None,
    unanswered: 0,
    since: Duration::ZERO,
    proved: None,
};

impl Trail {
    fn asked(&mut self, ticket: u64, now: Duration) {
        if self.unanswered == 0 {
            self.since = now;
        }
        self.unanswered += 1;
        self.last = Some((ticket, now));
    }

    fn answered(&mut self, ticket: u64) -> bool {
        let Some((_, sent)) = self.last.take_if(|(last, _)| *last == ticket) else {
            return false;
        };
        self.unanswered = 0;
        self.proved = Some(sent);
        true
    }

    /// Whether the last question has been unanswered for `time` by `now`.
    fn waited(&self, time: Duration, now: Duration) -> bool {
        self.last.is_some_and(|(_, sent)| now >= sent + time)
    }
}

/// The carrier of our data to one peer. Times are durations on one monotonic clock.
#[derive(Clone, Debug)]
pub struct Choice {
    chosen: Option<Carrier>,
    esp: Trail,
    /// There once anything was asked on it.
    udp: Option<Box<Trail>>,
    /// Answers on plain ESP in a row, while data is on UDP.
    proofs: u32,
    /// How many of them bring data back.
    wanted: u32,
    /// When data last came back to plain ESP.
    returned: Option<Duration>,
    round_trip: Duration,
    looked: Duration,
}

impl Choice {
    /// A choice that takes `presumed` for proved: what an earlier process used.
    pub fn new(presumed: Option<Carrier>) -> Self {
        Self {
            chosen: presumed,
            esp: Trail::default(),
            udp: None,
            proofs: 0,
            wanted: PROOFS,
            returned: None,
            round_trip: Duration::ZERO,
            looked: Duration::ZERO,
        }
    }

    /// What data takes; `None` until a carrier is proved.
    pub fn chosen(&self) -> Option<Carrier> {
        self.chosen
    }

    /// On which carriers the next round of questions goes.
    pub fn asks(&self, now: Duration) -> &'static [Carrier] {
        let plain_first = match self.chosen {
            None => self.esp.unanswered < TRIES,
            Some(Carrier::Esp) => !self.doubtful(now),
            Some(Carrier::Udp) => false,
        };
        if plain_first {
            &[Carrier::Esp]
        } else {
            &[Carrier::Esp, Carrier::Udp]
        }
    }

    /// The question `ticket` went out on `carrier`.
    pub fn asked(&mut self, carrier: Carrier, ticket: u64, now: Duration) {
        if carrier == Carrier::Esp && self.esp.unanswered > 0 {
            self.proofs = 0;
        }
        self.trail(carrier).asked(ticket, now);
    }

    /// The question `ticket` was answered, `round_trip` after it was sent.
    pub fn answered(&mut self, ticket: u64, round_trip: Duration, now: Duration) -> Option<Change> {
        self.round_trip = (self.round_trip * 7 + round_trip.min(SLOW)) / 8;
        if self.esp.answered(ticket) {
            self.proofs += 1;
        } else if let Some(udp) = &mut self.udp {
            udp.answered(ticket);
        }
        self.look(now)
    }

    /// Decides by what is known at `now`.
    pub fn look(&mut self, now: Duration) -> Option<Change> {
        self.looked = now;
        let instead = |silent: &Trail, other: &Trail| {
            self.silent(silent, now) && other.proved.is_some_and(|sent| sent >= silent.since)
        };
        let udp = self.of(Carrier::Udp);
        let (to, reason) = match self.chosen {
            None if self.esp.proved.is_some() => (Carrier::Esp, Reason::First),
            None if instead(&self.esp, udp) => (Carrier::Udp, Reason::OtherSilent),
            Some(Carrier::Esp) if instead(&self.esp, udp) => (Carrier::Udp, Reason::OtherSilent),
            Some(Carrier::Udp) if self.proofs >= self.wanted => (Carrier::Esp, Reason::Passes(self.proofs)),
            Some(Carrier::Udp) if instead(udp, &self.esp) => (Carrier::Esp, Reason::OtherSilent),
            None | Some(_) => return None,
        };
        let from = self.chosen.replace(to);
        match (from, to) {
            (Some(_), Carrier::Esp) => self.returned = Some(now),
            (_, Carrier::Udp) => {
                let early = self.returned.is_some_and(|returned| now < returned + LASTING);
                self.wanted = if early {
                    (self.wanted * 2).min(MOST_PROOFS)
                } else {
                    PROOFS
                };
            }
            (None, Carrier::Esp) => {}
        }
        self.proofs = 0;
        Some(Change { from, to, reason })
    }

    /// Whether what data takes has left a question unanswered for longer than an answer may take, or nothing is proved:
    /// rounds are to follow quickly.
    pub fn doubtful(&self, now: Duration) -> bool {
        self.chosen.is_none_or(|chosen| {
            let trail = self.of(chosen);
            trail.unanswered > 0 && now >= trail.since + self.wait()
        })
    }

    /// When [`Choice::look`] may decide what it does not decide now, or doubt begins.
    pub fn deadline(&self) -> Option<Duration> {
        let doubt = self.chosen.map(|chosen| self.of(chosen)).and_then(|trail| {
            let at = trail.since + self.wait();
            (trail.unanswered > 0).then_some(at)
        });
        let silent = [&self.esp, self.of(Carrier::Udp)].into_iter().filter_map(|trail| {
            let (_, sent) = trail.last?;
            (trail.unanswered >= TRIES).then(|| sent + self.grace())
        });
        silent.chain(doubt).filter(|at| *at > self.looked).min()
    }

    /// For how long plain ESP has not been answered, while data is on UDP; zero where it is answered.
    pub fn plain_silent(&self, now: Duration) -> Option<Duration> {
        let silent = self.esp.unanswered > 0 || self.esp.proved.is_none();
        (self.chosen == Some(Carrier::Udp)).then(|| {
            if silent {
                now.saturating_sub(self.esp.since)
            } else {
                Duration::ZERO
            }
        })
    }

    fn silent(&self, trail: &Trail, now: Duration) -> bool {
        trail.unanswered >= TRIES && trail.waited(self.grace(), now)
    }

    fn wait(&self) -> Duration {
        WAIT.max(self.round_trip.saturating_mul(3))
    }

    fn grace(&self) -> Duration {
        GRACE.max(self.round_trip.saturating_mul(2))
    }

    fn of(&self, carrier: Carrier) -> &Trail {
        match carrier {
            Carrier::Esp => &self.esp,
            Carrier::Udp => self.udp.as_deref().unwrap_or(&NEVER),
        }
    }

    fn trail(&mut self, carrier: Carrier) -> &mut Trail {
        match carrier {
            Carrier::Esp => &mut self.esp,
            Carrier::Udp => self.udp.get_or_insert_default(),
        }
    }
}

#[cfg(test)]
mod tests;
