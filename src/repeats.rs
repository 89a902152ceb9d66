//! An error that lasts is logged once, then as a count at growing intervals, and once more when it is over.
//!
//! ```text
//!  failed("no route")   ──▶ said, times=None                       at once
//!  failed("no route")   ──▶ not said                               however often
//!  failed("refused")    ──▶ said, times=None                       another error, at once; the first of eight that differ
//!  failed("no route")   ──▶ said, times=120, seconds=60            after 1 min, 5 min, 20 min, then every hour
//!  worked()             ──▶ said, times=121, seconds=75            once
//! ```
//! Who logs has one line for it, since a field that is `None` is not written:
//! `if let Some(Told { times, seconds }) = repeats.failed(&text, now) { warn!(error = text, times, seconds, "…") }`;
//! or, where both outcomes are told in one place, [`log_came`].

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// How long a trouble lasts when it is spoken of again; then every [`HOURLY`].
const AGAIN: [Duration; 3] = [
    Duration::from_secs(60),
    Duration::from_secs(300),
    Duration::from_secs(1200),
];
const HOURLY: Duration = Duration::from_secs(3600);
/// After so long without a failure the next is a new trouble, for who is not told of successes. Longer than any wait
/// between two tries.
const CALM: Duration = Duration::from_secs(600);
/// So many texts are told apart in one trouble: one that names a new number each time must not fill the log.
const TEXTS: usize = 8;

/// One thing that can go wrong again and again.
#[derive(Clone, Debug, Default)]
pub(crate) struct Repeats {
    trouble: Option<Trouble>,
}

#[derive(Clone, Debug)]
struct Trouble {
    since: Duration,
    times: u64,
    texts: BTreeSet<String>,
    /// When it failed last.
    last: Duration,
    /// When it is spoken of again.
    due: Duration,
    /// How often that has been.
    reminders: usize,
}

/// What a line says beside the error. Both are `None` where it is new.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Told {
    /// How often it has failed.
    pub(crate) times: Option<u64>,
    /// For how long.
    pub(crate) seconds: Option<u64>,
}

impl Repeats {
    /// It failed at `now`, a monotonic time. What to say of it, if anything.
    pub(crate) fn failed(&mut self, text: &str, now: Duration) -> Option<Told> {
        if !self.lasts_at(now) {
            self.trouble = None;
        }
        let trouble = self.trouble.get_or_insert_with(|| Trouble {
            since: now,
            times: 0,
            texts: BTreeSet::new(),
            last: now,
            due: now + AGAIN[0],
            reminders: 0,
        });
        trouble.times = trouble.times.saturating_add(1);
        trouble.last = now;
        if trouble.texts.len() < TEXTS && trouble.texts.insert(text.to_owned()) {
            return Some(Told {
                times: None,
                seconds: None,
            });
        }
        if now < trouble.due {
            return None;
        }
        trouble.reminders += 1;
        trouble.due = match AGAIN.get(trouble.reminders) {
            Some(after) => (trouble.since + *after).max(now + AGAIN[0]),
            None => now + HOURLY,
        };
        Some(trouble.told(now))
    }

    /// It works at `now`; what to say, where it did not before.
    pub(crate) fn worked(&mut self, now: Duration) -> Option<Told> {
        self.trouble.take().map(|trouble| trouble.told(now))
    }

    /// Whether it failed last.
    pub(crate) fn lasts(&self) -> bool {
        self.trouble.is_some()
    }

    fn lasts_at(&self, now: Duration) -> bool {
        let calm = |trouble: &Trouble| now.saturating_sub(trouble.last) > CALM;
        self.trouble.as_ref().is_some_and(|trouble| !calm(trouble))
    }

    /// It failed or worked, as `outcome` has it; the text and what to say of it.
    pub(crate) fn came<'a>(&mut self, error: Option<&'a str>, now: Duration) -> Came<'a> {
        match error {
            Some(text) => self
                .failed(text, now)
                .map_or(Came::Unchanged, |told| Came::Failed(text, told)),
            None => self.worked(now).map_or(Came::Unchanged, Came::Over),
        }
    }
}

/// What there is to say of an outcome.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Came<'a> {
    /// Nothing.
    Unchanged,
    /// This error is new, or is to be spoken of again.
    Failed(&'a str, Told),
    /// It is over.
    Over(Told),
}

/// Logs a [`Came`] where it is news: a failure at the level that is named, the end of it as info. Both lines begin with the
/// fields in brackets, and are of the module that this stands in.
macro_rules! log_came {
    ($came:expr, $level:ident, [$($field:tt)*], $failed:literal, $over:literal) => {
        match $came {
            $crate::repeats::Came::Unchanged => {}
            $crate::repeats::Came::Failed(error, told) => {
                tracing::$level!($($field)* error, times = told.times, seconds = told.seconds, $failed);
            }
            $crate::repeats::Came::Over(told) => {
                tracing::info!($($field)* times = told.times, seconds = told.seconds, $over);
            }
        }
    };
}
pub(crate) use log_came;

/// So many keys are told apart in [`Each`].
const KEYS: usize = 256;

/// Many things of one kind that can go wrong again and again, by what sets them apart. Beyond [`KEYS`] that fail at one
/// time the rest is one.
#[derive(Clone, Debug)]
pub(crate) struct Each<K> {
    each: BTreeMap<K, Repeats>,
    rest: Repeats,
}

impl<K> Default for Each<K> {
    fn default() -> Self {
        Self {
            each: BTreeMap::new(),
            rest: Repeats::default(),
        }
    }
}

impl<K: Clone + Ord> Each<K> {
    /// What `key` names failed; as [`Repeats::failed`].
    pub(crate) fn failed(&mut self, key: &K, text: &str, now: Duration) -> Option<Told> {
        if let Some(repeats) = self.each.get_mut(key) {
            return repeats.failed(text, now);
        }
        if self.each.len() >= KEYS {
            self.each.retain(|_, repeats| repeats.lasts_at(now));
        }
        if self.each.len() >= KEYS {
            return self.rest.failed(text, now);
        }
        self.each.entry(key.clone()).or_default().failed(text, now)
    }
}

impl Trouble {
    fn told(&self, now: Duration) -> Told {
        Told {
            times: Some(self.times),
            seconds: Some(now.saturating_sub(self.since).as_secs()),
        }
    }
}

/// The time since the process first asked, for who has no clock of its own.
pub(crate) fn now() -> Duration {
    static BEGAN: std::sync::OnceLock<std::time::Instant> = std::sync::OnceLock::new();
    BEGAN.get_or_init(std::time::Instant::now).elapsed()
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEW: Option<Told> = Some(Told {
        times: None,
        seconds: None,
    });

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn told(times: u64, seconds: u64) -> Option<Told> {
        Some(Told {
            times: Some(times),
            seconds: Some(seconds),
        })
    }

    #[test]
    fn an_error_is_said_once_then_counted_and_its_end_is_said() {
        let mut repeats = Repeats::default();
        assert_eq!(repeats.worked(at(0)), None);
        assert_eq!(repeats.failed("a", at(10)), NEW);
        assert_eq!(repeats.failed("a", at(11)), None);
        assert_eq!(repeats.failed("b", at(12)), NEW);
        assert_eq!(
            repeats.failed("a", at(13)),
            None,
            "two that take turns are each said once"
        );
        assert_eq!(repeats.worked(at(15)), told(4, 5));
        assert_eq!(repeats.worked(at(16)), None);
        assert_eq!(repeats.failed("a", at(20)), NEW, "a new trouble");
    }

    #[test]
    fn reminders_come_at_growing_intervals() {
        let mut repeats = Repeats::default();
        let said: Vec<u64> = (0..4 * 3600)
            .filter(|second| repeats.failed("a", at(*second)).is_some())
            .collect();
        assert_eq!(said, [0, 60, 300, 1200, 4800, 8400, 12000]);
        assert_eq!(repeats.worked(at(4 * 3600)), told(4 * 3600, 4 * 3600));
    }

    #[test]
    fn reminders_do_not_come_together_after_a_long_silence() {
        let mut repeats = Repeats::default();
        repeats.failed("a", at(0));
        let said: Vec<u64> = (299..500)
            .filter(|second| repeats.failed("a", at(*second)).is_some())
            .collect();
        assert_eq!(said, [299, 359], "a minute apart at least");
    }

    #[test]
    fn after_a_calm_it_is_a_new_trouble() {
        let mut repeats = Repeats::default();
        repeats.failed("a", at(0));
        repeats.failed("a", at(30));
        assert_eq!(repeats.failed("a", at(631)), NEW);
    }

    #[test]
    fn texts_that_always_differ_do_not_fill_the_log() {
        let mut repeats = Repeats::default();
        let said = (0..60).filter(|n| repeats.failed(&format!("port {n}"), at(*n)).is_some());
        assert_eq!(said.count(), TEXTS);
        assert_eq!(repeats.failed("port 60", at(60)), told(61, 60));
    }

    #[test]
    fn each_key_has_its_own_line_and_a_flood_has_a_bound() {
        let mut each = Each::default();
        assert_eq!(each.failed(&1, "a", at(0)), NEW);
        assert_eq!(each.failed(&2, "a", at(0)), NEW);
        assert_eq!(each.failed(&1, "a", at(1)), None);
        let said = (0..5000).filter(|key| each.failed(key, "a", at(2)).is_some()).count();
        assert_eq!(said, KEYS - 2 + 1);
        assert_eq!(each.failed(&6000, "a", at(700)), NEW, "the others have calmed down");
        assert_eq!(each.each.len(), 1);
    }

    #[test]
    fn an_outcome_is_said_where_it_is_news() {
        let mut repeats = Repeats::default();
        assert_eq!(repeats.came(None, at(0)), Came::Unchanged);
        assert_eq!(repeats.came(Some("a"), at(1)), Came::Failed("a", NEW.unwrap()));
        assert_eq!(repeats.came(Some("a"), at(2)), Came::Unchanged);
        assert_eq!(repeats.came(None, at(3)), Came::Over(told(2, 2).unwrap()));
    }
}
