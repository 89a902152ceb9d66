//! When a new epoch may begin. Every epoch costs every peer some probes and SAs, so each cause has a pace of its own:
//! nobody but who asks for it by hand can make a mesh churn.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// Why a new epoch is wanted.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Cause {
    /// The process starts.
    Start,
    /// `ringmail rotate`.
    Asked,
    /// Address, subnet, PSK set, cipher, encapsulation or limits changed.
    Changed,
    /// An SA is gone, and its key may not be used again.
    Lost,
    /// A peer came back whose sending key is spent.
    Returned,
    /// A peer behind a NAT has another address, and an SA keeps the one that it was made with.
    Moved,
    /// Another node at our public address has an epoch of the same number modulo 64.
    Alike,
    /// An SA of the newest epoch reached its limit of packets or bytes.
    Limit,
    /// `RekeyAfter`.
    Aged,
}

impl Cause {
    /// For people, as the cause of an epoch.
    pub fn text(self) -> &'static str {
        match self {
            Self::Start => "the daemon starts",
            Self::Asked => "asked for",
            Self::Changed => "PSKs, addresses or settings changed",
            Self::Lost => "an SA was lost",
            Self::Returned => "a peer came back",
            Self::Moved => "a peer behind a NAT has another address",
            Self::Alike => "another node at this address has an epoch of the same SPIs",
            Self::Limit => "an SA reached RekeyPackets or RekeyBytes",
            Self::Aged => "RekeyAfter",
        }
    }

    /// Whether it is waited for until [`CALM`] after the newest epoch: what it is for has time.
    fn has_time(self) -> bool {
        match self {
            Self::Limit | Self::Aged => true,
            Self::Start | Self::Asked | Self::Changed | Self::Lost | Self::Returned | Self::Moved | Self::Alike => {
                false
            }
        }
    }

    /// Whether it backs off where it repeats. Start comes once, and who asks spares nobody but himself.
    fn backs_off(self) -> bool {
        match self {
            Self::Changed | Self::Lost | Self::Returned | Self::Moved | Self::Alike => true,
            Self::Start | Self::Asked | Self::Limit | Self::Aged => false,
        }
    }
}

/// An epoch that has time begins this long after the one before at the earliest, whatever that one's cause. A hard
/// limit leaves room for more traffic than that ([`crate::backend::ipsec::limits`]). Also the longest wait of a cause
/// that backs off.
pub const CALM: Duration = Duration::from_secs(60);

/// The shortest time from any epoch to one that something forced: what comes at once is answered by one epoch.
const TOGETHER: Duration = Duration::from_secs(1);

/// A cause that did not come for so long is taken as one that never came.
const QUIET: Duration = Duration::from_secs(300);

/// How long an epoch that could not begin is put off.
const STALL: Duration = Duration::from_secs(5);

/// What is wanted, and what has begun lately.
#[derive(Debug, Default)]
pub(super) struct Pace {
    wanted: BTreeSet<Cause>,
    /// For each cause that backs off: when an epoch last began for it, and how long the next one waits from then.
    lately: BTreeMap<Cause, (Duration, Duration)>,
    /// Why no epoch could begin, and until when none is tried.
    stalled: Option<(Duration, String)>,
    /// Why what was last asked for was not done.
    declined: Option<String>,
}

impl Pace {
    pub(super) fn want(&mut self, cause: Cause) {
        self.wanted.insert(cause);
    }

    /// When the next epoch begins and why, where one is wanted. `newest` is when the newest began and when it is too
    /// old.
    pub(super) fn next(&self, newest: Option<(Duration, Duration)>) -> Option<(Duration, Cause)> {
        let begun = newest.map(|(begun, _)| begun);
        let aged = newest.map(|(begun, ages)| (ages.max(begun + CALM), Cause::Aged));
        let wanted = self.wanted.iter().map(|cause| (self.soonest(*cause, begun), *cause));
        let stalled = self.stalled.as_ref().map_or(Duration::ZERO, |(until, _)| *until);
        wanted.chain(aged).min().map(|(at, cause)| (at.max(stalled), cause))
    }

    fn soonest(&self, cause: Cause, begun: Option<Duration>) -> Duration {
        let after = |gap| begun.map_or(Duration::ZERO, |begun| begun + gap);
        if cause.has_time() {
            return after(CALM);
        }
        match self.lately.get(&cause) {
            Some((last, gap)) if cause.backs_off() => after(TOGETHER).max(*last + *gap),
            _ if cause.backs_off() => after(TOGETHER),
            _ => Duration::ZERO,
        }
    }

    /// An epoch begins at `now`, for all that is wanted. `begun` is when the one before began.
    pub(super) fn began(&mut self, begun: Option<Duration>, now: Duration) {
        for cause in std::mem::take(&mut self.wanted) {
            if !cause.backs_off() || self.soonest(cause, begun) > now {
                continue;
            }
            let gap = match self.lately.get(&cause) {
                Some((last, gap)) if now < *last + QUIET => (*gap * 2).min(CALM),
                _ => TOGETHER,
            };
            self.lately.insert(cause, (now, gap));
        }
        (self.stalled, self.declined) = (None, None);
    }

    /// No epoch can begin at `now`, and `why`. What is wanted stays so and is tried again after a while, but for what
    /// somebody asked for: he is told.
    pub(super) fn stall(&mut self, why: String, now: Duration) {
        self.wanted.remove(&Cause::Asked);
        self.stalled = Some((now + STALL, why));
    }

    /// What somebody asked for is not done, and `why`.
    pub(super) fn decline(&mut self, why: String) {
        self.wanted.remove(&Cause::Asked);
        self.declined = Some(why);
    }

    /// Why what was last asked for was not done, until an epoch begins.
    pub(super) fn declined(&self) -> Option<&str> {
        self.declined.as_deref().or_else(|| self.stalled())
    }

    /// Why no epoch could begin, until one does.
    pub(super) fn stalled(&self) -> Option<&str> {
        self.stalled.as_ref().map(|(_, why)| why.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn secs(s: u64) -> Duration {
        Duration::from_secs(s)
    }

    /// When epochs begin until `end` if `cause` comes every second.
    fn epochs(pace: &mut Pace, cause: Cause, from: u64, end: u64) -> Vec<u64> {
        let mut begun: Vec<u64> = Vec::new();
        for now in from..end {
            pace.want(cause);
            let last = begun.last().map(|s| secs(*s));
            if pace
                .next(last.map(|last| (last, last + secs(1 << 30))))
                .is_some_and(|(at, _)| at <= secs(now))
            {
                pace.began(last, secs(now));
                begun.push(now);
            }
        }
        begun
    }

    #[test]
    fn what_repeats_is_answered_at_once_then_ever_slower_down_to_once_a_minute() {
        for cause in [Cause::Changed, Cause::Lost, Cause::Returned] {
            let begun = epochs(&mut Pace::default(), cause, 0, 300);
            assert_eq!(begun, [0, 1, 3, 7, 15, 31, 63, 123, 183, 243], "{cause:?}");
        }
    }

    #[test]
    fn after_quiet_it_is_answered_at_once_again() {
        let mut pace = Pace::default();
        assert_eq!(epochs(&mut pace, Cause::Lost, 0, 100).last(), Some(&63));
        assert_eq!(epochs(&mut pace, Cause::Lost, 200, 300).first(), Some(&200));
        // Not yet quiet: it goes on as slowly as it was.
        assert_eq!(epochs(&mut pace, Cause::Lost, 300, 400), [320, 380]);
        assert_eq!(epochs(&mut pace, Cause::Lost, 1000, 1004), [1000, 1001, 1003]);
    }

    #[test]
    fn one_cause_does_not_wait_for_another() {
        let mut pace = Pace::default();
        epochs(&mut pace, Cause::Lost, 0, 300);
        pace.want(Cause::Changed);
        assert_eq!(
            pace.next(Some((secs(300), secs(1 << 30)))),
            Some((secs(301), Cause::Changed))
        );
    }

    #[test]
    fn age_and_limits_begin_one_epoch_a_minute_at_most() {
        let begun = epochs(&mut Pace::default(), Cause::Limit, 0, 200);
        assert_eq!(begun, [0, 60, 120, 180]);
        // An epoch that is too old before its minute is over waits for it as well, and is due no sooner.
        let pace = Pace::default();
        assert_eq!(pace.next(Some((secs(10), secs(64)))), Some((secs(70), Cause::Aged)));
        assert_eq!(pace.next(Some((secs(10), secs(100)))), Some((secs(100), Cause::Aged)));
    }

    #[test]
    fn who_asks_is_served_each_time() {
        assert_eq!(epochs(&mut Pace::default(), Cause::Asked, 0, 60).len(), 60);
    }

    #[test]
    fn what_can_not_begin_is_tried_every_few_seconds_and_not_all_the_time() {
        let mut pace = Pace::default();
        pace.want(Cause::Lost);
        pace.want(Cause::Asked);
        pace.stall("no number".into(), secs(100));
        assert_eq!(
            pace.next(None),
            Some((secs(105), Cause::Lost)),
            "who asked is told instead"
        );
        assert_eq!(pace.stalled(), Some("no number"));
        pace.began(None, secs(105));
        assert_eq!((pace.next(None), pace.stalled()), (None, None));
    }
}
