//! Which of the last questions to one peer were answered: a bit each.

/// So many questions are remembered.
pub const WINDOW: u32 = 20;

/// The last questions to one peer.
#[derive(Clone, Copy, Debug, Default)]
pub struct Record {
    /// How many were asked.
    asked: u64,
    /// Which of the last ones were answered, the newest in the lowest bit.
    answered: u32,
}

impl Record {
    /// One more question; returns its number, from 1.
    pub fn ask(&mut self) -> u64 {
        self.asked += 1;
        self.answered <<= 1;
        self.asked
    }

    /// Question `number` was answered, perhaps late or again. One that is not remembered changes nothing.
    pub fn answer(&mut self, number: u64) {
        let age = self.asked.checked_sub(number).and_then(|age| u32::try_from(age).ok());
        let bit = age.and_then(|age| 1_u32.checked_shl(age));
        self.answered |= bit.unwrap_or_default();
    }

    /// How many of the last questions got no answer, and how many those are, at most [`WINDOW`]. The newest counts once
    /// it is answered or followed by another: until then its answer may be under way.
    pub fn lost(&self) -> (u32, u32) {
        let pending = u32::from(self.answered & 1 == 0);
        let known = self.asked.saturating_sub(u64::from(pending));
        let counted = u32::try_from(known).map_or(WINDOW, |known| known.min(WINDOW));
        let mask = (1 << counted) - 1;
        let answered = (self.answered >> pending & mask).count_ones();
        (counted - answered, counted)
    }

    /// How many of the newest questions, one after the other, got no answer; those that count in [`Record::lost`].
    pub fn unanswered(&self) -> u32 {
        let pending = u32::from(self.answered & 1 == 0);
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
        let first = record.ask();
        assert_eq!(record.share(), None, "its answer may be under way");
        record.answer(first);
        assert_eq!(record.lost(), (0, 1));
        let second = record.ask();
        assert_eq!(record.lost(), (0, 1));
        record.ask();
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
                record.ask();
                record.unanswered()
            })
            .collect();
        let expected: Vec<u32> = (0..30).map(|asked| asked.min(WINDOW)).collect();
        assert_eq!(told, expected);
        record.answer(30);
        assert_eq!(record.unanswered(), 0);
        record.ask();
        assert_eq!((record.unanswered(), record.ask(), record.unanswered()), (0, 32, 1));
    }

    proptest! {
        #[test]
        fn the_loss_is_the_share_of_the_last_twenty_without_an_answer(
            answered in prop::collection::vec(any::<bool>(), 0..60), strange: u64,
        ) {
            let mut record = Record::default();
            for answered in &answered {
                let number = record.ask();
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
