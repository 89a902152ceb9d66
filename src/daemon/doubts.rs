//! What the loop has seen that a person should look at, for those who are told of it.

use std::time::Duration;

use super::turn::Turn;
use crate::kernel::firewall::{self, Counters};
use crate::node::report::Doubts;
use crate::node::silence::Silent;

/// How often all peers are gone through for what is doubtful.
const EVERY: Duration = Duration::from_secs(10);
/// How old the guard's numbers may be; where `status` or /metrics is asked they are read anyway.
const READ: Duration = Duration::from_secs(30);
/// Plaintext that comes again after so long is news again.
const QUIET: Duration = Duration::from_secs(3600);

/// What the loop has seen that a person should look at. The texts stay the same while it lasts.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Seen {
    /// Why the newest configuration is not in force although it was accepted.
    pub unfit: Option<String>,
    /// What the guard has dropped.
    pub plaintext: Option<String>,
    /// In the keys and the roster.
    pub doubts: Doubts,
}

/// When all peers are gone through next, and what is known for that.
#[derive(Debug, Default)]
pub(super) struct Looks {
    due: Duration,
    silent: Silent,
    plaintext: Plaintext,
}

/// What the guard has dropped, as it is told: the numbers of when it was news, since those that rise would be news every
/// time. It is so until they are set back, as in `status`.
#[derive(Debug, Default)]
struct Plaintext {
    last: Counters,
    /// When `last` was read; `None` before the first time.
    read: Option<Duration>,
    told: Counters,
    /// When they last rose.
    risen: Duration,
}

impl Plaintext {
    fn due(&self, now: Duration) -> bool {
        self.read.is_none_or(|read| now >= read + READ)
    }

    fn looked(&mut self, counters: Counters, now: Duration) {
        let packets = |counters: &Counters| counters.iter().map(|(_, tally)| tally.packets).collect::<Vec<_>>();
        let (before, after, told) = (packets(&self.last), packets(&counters), packets(&self.told));
        let any = |differs: fn(&u64, &u64) -> bool, from: &[u64]| from.iter().zip(&after).any(|(a, b)| differs(a, b));
        let rose = any(|before, after| after > before, &before);
        let set_back = any(|before, after| after < before, &before);
        let other_way = any(|told, after| *told == 0 && *after > 0, &told);
        if set_back || other_way || rose && now >= self.risen + QUIET {
            self.told = counters;
        }
        if rose {
            self.risen = now;
        }
        (self.last, self.read) = (counters, Some(now));
    }
}

impl Turn {
    /// What the guard has dropped; `None` where there is none.
    pub(super) fn dropped(&mut self) -> Option<Result<Counters, firewall::Error>> {
        if self.reconciler.node.plain().is_some() {
            self.looks.plaintext = Plaintext::default();
            return None;
        }
        let (read, now) = (self.reconciler.kernel().dropped(), self.now());
        if let Ok(counters) = &read {
            self.looks.plaintext.looked(*counters, now);
        }
        Some(read)
    }

    /// What is to be said of what the guard has dropped.
    pub(super) fn told_of(&mut self, dropped: &Counters) -> Option<String> {
        let uplink = self.reconciler.node.uplink();
        let uplink = uplink.map_or_else(|| "the uplink".to_owned(), |uplink| uplink.name.clone());
        dropped.told(&uplink, &self.reconciler.kernel().dropped_reset())
    }

    /// Logs which peers fell silent or are heard again, and says what is doubtful, where anyone listens.
    pub(super) fn tell_doubts(&mut self) {
        let now = self.now();
        if self.doubts_due().is_none_or(|due| now < due) {
            return;
        }
        self.looks.due = now + EVERY;
        for line in self.looks.silent.look(&self.reconciler.node, now) {
            line.log();
        }
        if self.outputs.doubts.is_closed() {
            return;
        }
        if self.looks.plaintext.due(now) {
            let _ = self.dropped();
        }
        let dropped = self.looks.plaintext.told;
        let seen = Seen {
            unfit: self.unfit.clone(),
            plaintext: self.told_of(&dropped),
            doubts: self.reconciler.node.doubts(now),
        };
        self.outputs.doubts.send_if_modified(|before| {
            let differs = *before != seen;
            *before = seen;
            differs
        });
    }

    /// When they are looked for next.
    pub(super) fn doubts_due(&self) -> Option<Duration> {
        let encrypts = self.reconciler.node.plain().is_none();
        (encrypts || !self.outputs.doubts.is_closed()).then_some(self.looks.due)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::firewall::Way;

    fn counters(arriving: u64, leaving: u64) -> Counters {
        let mut counters = Counters::default();
        counters.of(Way::Arriving).packets = arriving;
        counters.of(Way::Leaving).packets = leaving;
        counters
    }

    /// What is told after each reading: seconds, arriving, leaving → arriving, leaving.
    #[track_caller]
    fn check(readings: &[[u64; 5]]) {
        let mut plaintext = Plaintext::default();
        for [at, arriving, leaving, told_arriving, told_leaving] in readings {
            plaintext.looked(counters(*arriving, *leaving), Duration::from_secs(*at));
            assert_eq!(plaintext.told, counters(*told_arriving, *told_leaving), "at {at} s");
        }
    }

    #[test]
    fn plaintext_that_goes_on_is_told_once_and_until_the_count_is_set_back() {
        check(&[
            [0, 0, 0, 0, 0],
            [30, 2, 0, 2, 0],
            [60, 500, 0, 2, 0],
            [3000, 9000, 0, 2, 0],
            [6500, 9001, 0, 2, 0],
            [6530, 9001, 0, 2, 0],
            [90_000, 0, 0, 0, 0],
            [90_030, 1, 0, 1, 0],
        ]);
    }

    #[test]
    fn plaintext_is_news_again_after_a_quiet_hour_in_the_other_direction_and_after_the_count_was_set_back() {
        check(&[
            // What an earlier process counted.
            [0, 7, 0, 7, 0],
            [3599, 7, 0, 7, 0],
            [3600, 8, 0, 8, 0],
            [3630, 9, 1, 9, 1],
            [3660, 10, 2, 9, 1],
            // Set back, and risen again before it was looked at.
            [3690, 3, 2, 3, 2],
            [3720, 4, 0, 4, 0],
        ]);
    }

    #[test]
    fn the_guard_is_read_every_half_minute_where_nobody_else_has() {
        let mut plaintext = Plaintext::default();
        assert!(plaintext.due(Duration::ZERO));
        plaintext.looked(counters(0, 0), Duration::from_secs(5));
        assert!(!plaintext.due(Duration::from_secs(34)));
        assert!(plaintext.due(Duration::from_secs(35)));
    }
}
