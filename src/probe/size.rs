//! Whether packets of full size pass to one peer, told by padded questions: a state machine without I/O or clock.
//!
//! ```text
//!   due ─▶ a question of full size ─ answered ─▶ it passes; again after a minute
//!              │ no answer
//!              ▼
//!   again and again, a small one beside each ─ only the small ones answered, so many times ─▶ it does not pass
//!              ▼
//!   halving between what passes and what does not ─▶ the largest that passes; full size again after half a minute
//! ```
//! Where the small one is not answered either, a question says nothing of sizes. What the kernel refuses to send for its
//! size does not pass at once. The answer is always small: what is learned is of our direction alone.

use std::time::Duration;

use keys::Carrier;

use crate::epochs::Generation;

/// Between two questions of full size while it passes, at least.
const EVERY: Duration = Duration::from_secs(60);
/// A node asks its peers at most one such question in this time, all together.
const SHARE: Duration = Duration::from_millis(120);
/// Between two questions of full size while it does not pass.
const MENDED: Duration = Duration::from_secs(30);
/// An answer may take this long, or three times the usual round trip.
const WAIT: Duration = Duration::from_secs(1);
/// So many questions in a row stay unanswered, their small companions answered, before a size counts as too large; one more
/// for each small question of late that got no answer: where much is lost, chance takes longer to rule out.
const TRIES: u32 = 5;
/// Where a small one is not answered either, the next question follows after this, and twice as long each time.
const UNCLEAR: Duration = Duration::from_secs(5);
/// The most doublings.
const DOUBLINGS: u32 = 4;
/// So exactly the largest size that passes is looked for, bytes: ESP pads to as much.
const STEP: u16 = 4;
/// No size below this is tried, bytes: a probe in IPv6 has 110.
const LEAST: u16 = 128;

/// What is to be sent.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Round {
    /// The size of the padded question, bytes of the whole packet.
    pub size: u16,
    /// Its ticket.
    pub ticket: u64,
    /// The ticket of the small question beside it.
    pub small: Option<u64>,
}

/// A round that was sent.
#[derive(Clone, Copy, Debug)]
struct Sent {
    round: Round,
    ends: Duration,
    small_answered: bool,
}

/// What is known of sizes towards one peer. Times are durations on one monotonic clock.
#[derive(Clone, Debug, Default)]
pub struct Sizes {
    /// What data goes on.
    on: Option<(Generation, Carrier)>,
    /// Full size, bytes; 0 where it is not known yet.
    full: u16,
    /// Whether it passes.
    verdict: Option<bool>,
    /// The largest size known to pass, and the smallest known not to, since full size does not.
    between: Option<(u16, u16)>,
    /// There for a second in a minute, and so by itself.
    sent: Option<Box<Sent>>,
    misses: u32,
    unclear: u32,
    due: Duration,
}

/// How long to rest between two questions of full size to one of `peers` peers, while it passes.
pub fn rest(peers: usize) -> Duration {
    SHARE
        .saturating_mul(u32::try_from(peers).unwrap_or(u32::MAX))
        .max(EVERY)
}

impl Sizes {
    /// Whether it is about full size `full` and data on `on`.
    pub fn is_about(&self, on: (Generation, Carrier), full: u16) -> bool {
        (self.on, self.full) == (Some(on), full)
    }

    /// Data goes on `on` and full size is `full` bytes from here on, which is to be asked for at `at`. What was known of
    /// another size is forgotten.
    pub fn begin(&mut self, on: (Generation, Carrier), full: u16, at: Duration) {
        let verdict = self.verdict.filter(|_| self.full == full);
        *self = Self {
            on: Some(on),
            full,
            verdict,
            due: at,
            ..Self::default()
        };
    }

    /// Full size, bytes; 0 where it is not known yet.
    pub fn full(&self) -> u16 {
        self.full
    }

    /// Whether packets of full size pass; `None` where that is not known.
    pub fn passes(&self) -> Option<bool> {
        self.verdict
    }

    /// Where full size does not pass, the largest size that does, as far as it is known, bytes.
    pub fn largest(&self) -> Option<u16> {
        let (passes, fails) = self.between?;
        (passes > 0 && fails.saturating_sub(passes) <= STEP).then_some(passes)
    }

    /// When [`Sizes::round`] next has something to do.
    pub fn due(&self) -> Duration {
        self.sent.as_ref().map_or(self.due, |sent| sent.ends)
    }

    /// Nothing is to be done before `at`.
    pub fn postpone(&mut self, at: Duration) {
        (self.sent, self.due) = (None, at);
    }

    /// What is to be sent at `now`, if anything is due; nothing for `rest` while it passes. `lost` of the last small questions got no answer, `round_trip` is
    /// the usual one, `jitter` in 0..1 shortens the next wait by up to a quarter, `ticket` yields numbers.
    pub fn round(
        &mut self,
        now: Duration,
        rest: Duration,
        lost: u32,
        round_trip: Duration,
        jitter: f64,
        mut ticket: impl FnMut() -> u64,
    ) -> Option<Round> {
        let wait = |wait: Duration| now + wait.mul_f64(1.0 - jitter.clamp(0.0, 1.0) / 4.0);
        if let Some(sent) = self.sent.take_if(|sent| sent.ends <= now) {
            self.missed(&sent, lost, wait);
        }
        if self.sent.is_some() || self.due > now || self.full == 0 {
            return None;
        }
        let round = Round {
            size: self.next().unwrap_or(self.full),
            ticket: ticket(),
            small: (self.misses > 0 || self.next().is_some()).then(&mut ticket),
        };
        self.sent = Some(Box::new(Sent {
            round,
            ends: now + WAIT.max(round_trip.saturating_mul(3)),
            small_answered: false,
        }));
        // Where nothing else is decided on the way.
        self.due = wait(if self.between.is_some() { MENDED } else { rest });
        Some(round)
    }

    /// The question `ticket` was answered.
    pub fn answered(&mut self, ticket: u64, now: Duration) {
        let Some(sent) = &mut self.sent else { return };
        if sent.round.small == Some(ticket) {
            (sent.small_answered, self.unclear) = (true, 0);
        } else if sent.round.ticket == ticket {
            let size = sent.round.size;
            (self.sent, self.misses, self.unclear) = (None, 0, 0);
            if size >= self.full {
                (self.verdict, self.between) = (Some(true), None);
            } else if let Some((passes, _)) = &mut self.between {
                *passes = size.max(*passes);
                self.search(now);
            }
        }
    }

    /// The kernel did not send the padded question, because it knows that its size does not pass.
    pub fn refused(&mut self, now: Duration) {
        if let Some(sent) = self.sent.take() {
            self.too_large(sent.round.size, now);
        }
    }

    fn missed(&mut self, sent: &Sent, lost: u32, wait: impl Fn(Duration) -> Duration) {
        let now = sent.ends;
        // What is known not to pass is asked for again and again: no news.
        if self.between.is_some_and(|(_, fails)| sent.round.size >= fails) {
            return;
        }
        if sent.round.small.is_some() && !sent.small_answered {
            self.due = wait(UNCLEAR * (1 << self.unclear.min(DOUBLINGS)));
            self.unclear += 1;
            return;
        }
        (self.misses, self.due) = (self.misses + 1, now);
        if self.misses >= TRIES + lost {
            self.too_large(sent.round.size, now);
        }
    }

    fn too_large(&mut self, size: u16, now: Duration) {
        self.misses = 0;
        if size >= self.full {
            self.verdict = Some(false);
        }
        let passes = self.between.map_or(0, |(passes, _)| passes);
        let fails = self.between.map_or(size, |(_, fails)| fails.min(size));
        self.between = Some((passes, fails));
        self.search(now);
    }

    /// The search goes on at `now`, if it is not at its end.
    fn search(&mut self, now: Duration) {
        if self.next().is_some() {
            self.due = now;
        }
    }

    /// The next size to try, while the largest that passes is looked for.
    fn next(&self) -> Option<u16> {
        let (passes, fails) = self.between?;
        let passes = passes.max(LEAST);
        (fails > passes + STEP).then(|| passes.midpoint(fails))
    }
}

#[cfg(test)]
mod tests {
    use keys::Epoch;
    use proptest::prelude::*;

    use super::*;

    const ON: (Generation, Carrier) = (
        Generation {
            sender: Epoch(1),
            receiver: Epoch(2),
        },
        Carrier::Esp,
    );
    const FULL: u16 = 1446;

    /// A path, and what is asked through it.
    struct World {
        sizes: Sizes,
        now: Duration,
        /// The largest packet that passes.
        limit: u16,
        /// What the node's own kernel does not send.
        refuses: bool,
        /// Whether the peer's daemon is there.
        answers: bool,
        /// Of so many packets one is lost, by a fixed pattern; 0: none.
        loses: u64,
        packets: u64,
        tickets: u64,
        bytes: u64,
        rounds: Vec<Round>,
    }

    impl World {
        fn new(limit: u16) -> Self {
            let mut sizes = Sizes::default();
            sizes.begin(ON, FULL, Duration::ZERO);
            Self {
                sizes,
                now: Duration::ZERO,
                limit,
                refuses: false,
                answers: true,
                loses: 0,
                packets: 0,
                tickets: 0,
                bytes: 0,
                rounds: Vec::new(),
            }
        }

        fn passes(&mut self, size: u16) -> bool {
            self.packets += 1;
            self.bytes += u64::from(size);
            // A multiplicative hash: no pattern that a period of two or five would meet.
            let luck = self.packets.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33;
            size <= self.limit && self.answers && (self.loses == 0 || luck % 100 >= self.loses)
        }

        fn run(&mut self, time: Duration) {
            let end = self.now + time;
            let mut turns = 0;
            while self.sizes.due() <= end {
                turns += 1;
                assert!(turns < 10_000, "it never comes to rest");
                self.now = self.now.max(self.sizes.due());
                let tickets = &mut self.tickets;
                let ticket = || {
                    *tickets += 1;
                    *tickets
                };
                let lost = u32::try_from(self.loses / 5).expect("few");
                let Some(round) = self.sizes.round(self.now, EVERY, lost, Duration::ZERO, 0.5, ticket) else {
                    continue;
                };
                assert!((LEAST..=FULL).contains(&round.size));
                self.rounds.push(round);
                if let Some(small) = round.small.filter(|_| self.passes(90)) {
                    self.sizes.answered(small, self.now);
                }
                if self.refuses && round.size > self.limit {
                    self.sizes.refused(self.now);
                } else if self.passes(round.size) {
                    self.sizes.answered(round.ticket, self.now);
                }
            }
            self.now = end;
        }
    }

    #[test]
    fn where_all_passes_one_question_a_minute_is_enough() {
        let mut world = World::new(FULL);
        world.run(Duration::from_secs(1));
        assert_eq!(world.sizes.passes(), Some(true));
        world.run(Duration::from_secs(3600));
        assert!((60..=80).contains(&world.rounds.len()), "{}", world.rounds.len());
        assert!(world.rounds.iter().all(|round| round.small.is_none()));
    }

    #[test]
    fn a_path_that_swallows_large_packets_is_found_measured_and_found_mended() {
        let mut world = World::new(1358);
        world.run(Duration::from_secs(8));
        assert_eq!(world.sizes.passes(), Some(false));
        world.run(Duration::from_secs(60));
        let largest = world.sizes.largest().expect("it has been looked for");
        assert!((1354..=1358).contains(&largest), "{largest}");
        let bytes = world.bytes;
        assert!(bytes < 150_000, "{bytes}");
        world.run(Duration::from_secs(3600));
        assert!(world.bytes - bytes < 160 * 1446, "{}", world.bytes - bytes);
        world.limit = FULL;
        world.run(MENDED);
        assert_eq!((world.sizes.passes(), world.sizes.largest()), (Some(true), None));
    }

    #[test]
    fn what_the_kernel_refuses_to_send_is_too_large_at_once() {
        let mut world = World::new(1000);
        world.refuses = true;
        world.run(Duration::ZERO);
        assert_eq!(world.sizes.passes(), Some(false));
        world.run(Duration::from_secs(1));
        assert!((996..=1000).contains(&world.sizes.largest().expect("it has been looked for")));
    }

    #[test]
    fn a_peer_that_answers_nothing_is_no_matter_of_sizes_and_is_asked_rarely() {
        let mut world = World::new(FULL);
        world.run(Duration::from_secs(1));
        world.answers = false;
        world.run(Duration::from_secs(3600));
        assert_eq!(world.sizes.passes(), Some(true));
        assert!(world.rounds.len() < 80, "{}", world.rounds.len());
        world.answers = true;
        let before = world.rounds.len();
        world.run(Duration::from_secs(90));
        assert!(world.rounds.len() > before && world.rounds.last().expect("one").size == FULL);
    }

    #[test]
    fn another_generation_keeps_what_is_known_and_another_size_does_not() {
        let mut world = World::new(1358);
        world.run(Duration::from_secs(60));
        let mut sizes = world.sizes;
        assert!(sizes.is_about(ON, FULL));
        sizes.begin((ON.0.reverse(), ON.1), FULL, Duration::from_secs(60));
        assert_eq!(sizes.passes(), Some(false));
        sizes.begin(ON, 1400, Duration::from_secs(60));
        assert_eq!(sizes.passes(), None);
    }

    proptest! {
        #[test]
        fn neither_loss_nor_chance_makes_a_path_narrow_and_a_narrow_one_is_found(
            limit in 600_u16..=FULL, loses in 0_u64..45, mended: bool,
        ) {
            let mut world = World::new(limit);
            world.loses = loses;
            world.run(Duration::from_secs(3600));
            prop_assert_eq!(world.sizes.passes(), Some(limit == FULL));
            if let Some(largest) = world.sizes.largest() {
                prop_assert!(largest <= limit, "{} of {}", largest, limit);
            }
            if mended {
                world.limit = FULL;
                world.run(Duration::from_secs(600));
                prop_assert_eq!(world.sizes.passes(), Some(true));
            }
        }
    }
}
