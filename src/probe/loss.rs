//! Which of the last questions to one peer were answered: a bit each.

use std::time::Duration;

/// So many questions are remembered.
pub const WINDOW: u32 = 20;

/// The last questions to one peer.
#[derive(Clone, Copy, Debug, Default)]
pub struct Record {
    /// How many were asked.
    asked: u64,
    /// How many of them are forgotten.
    forgotten: u64,
    /// Which of the last ones were answered, the newest in the lowest bit.
    answered: u32,
    /// When the first was asked after the last that was answered.
    since: Duration,
}

impl Record {
    /// One more question, at `now`; returns its number, from 1.
    pub fn ask(&mut self, now: Duration) -> u64 {
        if self.is_answered() {
            self.since = now;
        }
        self.asked += 1;
        self.answered <<= 1;
        self.asked
    }

    /// Forgets the questions so far; what is answered of them later counts for nothing.
    pub fn forget(&mut self) {
        (self.forgotten, self.answered) = (self.asked, 0);
    }

    /// Whether the newest question was answered, or there is none.
    pub fn is_answered(&self) -> bool {
        self.asked == self.forgotten || self.answered & 1 == 1
    }

    /// Where the newest question is not answered: when the first was asked of those that, one after the other, are not.
    pub fn since(&self) -> Option<Duration> {
        (!self.is_answered()).then_some(self.since)
    }

    /// Question `number` was answered, perhaps late or again. One that is not remembered changes nothing.
    pub fn answer(&mut self, number: u64) {
        let age = self.asked.checked_sub(number).filter(|_| number > self.forgotten);
        let age = age.and_then(|age| u32::try_from(age).ok());
        let bit = age.and_then(|age| 1_u32.checked_shl(age));
        self.answered |= bit.unwrap_or_default();
    }

    /// How many of the last questions got no answer, and how many those are, at most [`WINDOW`]. The newest counts once
    /// it is answered or followed by another: until then its answer may be under way.
    pub fn lost(&self) -> (u32, u32) {
        let pending = u32::from(!self.is_answered());
        let known = (self.asked - self.forgotten).saturating_sub(u64::from(pending));
        let counted = u32::try_from(known).map_or(WINDOW, |known| known.min(WINDOW));
        let mask = (1 << counted) - 1;
        let answered = (self.answered >> pending & mask).count_ones();
        (counted - answered, counted)
    }

    /// How many of the newest questions, one after the other, got no answer; those that count in [`Record::lost`].
    pub fn unanswered(&self) -> u32 {
        let pending = u32::from(!self.is_answered());
        let (_, counted) = self.lost();
        (self.answered >> pending).trailing_zeros().min(counted)
    }

    /// The share that got no answer, 0 to 1; `None` where none counts yet.
    pub fn share(&self) -> Option<f64> {
        let (lost, counted) = self.lost();
        (counted > 0).then(|| f64::from(lost) / f64::from(counted))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_newest_question_counts_once_it_is_answered_or_followed() {
        let mut record = Record::default();
        assert_eq!((record.lost(), record.share()), ((0, 0), None));
        let first = record.ask(Duration::ZERO);
        assert_eq!(record.share(), None, "its answer may be under way");
        record.answer(first);
        assert_eq!(record.lost(), (0, 1));
        let second = record.ask(Duration::ZERO);
        assert_eq!(record.lost(), (0, 1));
        record.ask(Duration::ZERO);
        assert_eq!((record.lost(), record.share()), ((1, 2), Some(0.5)));
        record.answer(second);
        assert_eq!(record.lost(), (0, 2), "a late answer is one");
    }

    #[test]
    fn unanswered_are_those_since_the_last_answer_without_the_one_under_way() {
        let mut record = Record::default();
        assert_eq!(record.unanswered(), 0);
        let told: Vec<u32> = (0..30)
            .map(|_| {
                record.ask(Duration::ZERO);
                record.unanswered()
            })
            .collect();
        let expected: Vec<u32> = (0..30).map(|asked| asked.min(WINDOW)).collect();
        assert_eq!(told, expected);
        record.answer(30);
        assert_eq!(record.unanswered(), 0);
        record.ask(Duration::ZERO);
        assert_eq!(
            (record.unanswered(), record.ask(Duration::ZERO), record.unanswered()),
            (0, 32, 1)
        );
    }

    #[test]
    fn what_is_forgotten_is_neither_lost_nor_answered_later() {
        let at = Duration::from_secs;
        let mut record = Record::default();
        assert!(record.is_answered() && record.since().is_none());
        let first = record.ask(at(1));
        let second = record.ask(at(2));
        record.ask(at(3));
        assert_eq!(
            (record.lost(), record.unanswered(), record.since()),
            ((2, 2), 2, Some(at(1)))
        );
        record.answer(second);
        assert_eq!(record.since(), Some(at(1)), "late: the newest is open");
        record.forget();
        record.answer(first);
        assert_eq!((record.lost(), record.share(), record.since()), ((0, 0), None, None));
        let fourth = record.ask(at(4));
        assert_eq!((record.lost(), record.since()), ((0, 0), Some(at(4))));
        record.answer(fourth);
        assert_eq!((record.lost(), record.since()), ((0, 1), None));
    }

    proptest! {
        #[test]
        fn the_loss_is_the_share_of_the_last_twenty_without_an_answer(
            answered in prop::collection::vec(any::<bool>(), 0..60), strange: u64,
        ) {
            let mut record = Record::default();
            for answered in &answered {
                let number = record.ask(Duration::ZERO);
                if *answered {
                    record.answer(number);
                    record.answer(number);
                }
                if strange == 0 || strange > number {
                    record.answer(strange);
                }
            }
            let pending = usize::from(answered.last() == Some(&false));
            let window: Vec<&bool> = answered.iter().rev().skip(pending).take(20).collect();
            let lost = window.iter().filter(|answered| !***answered).count();
            let (told, counted) = record.lost();
            prop_assert_eq!((told as usize, counted as usize), (lost, window.len()));
            prop_assert!(record.share().is_none_or(|share| (0.0..=1.0).contains(&share)));
        }
    }
}
