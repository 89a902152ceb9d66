use proptest::prelude::*;

use super::*;

/// A network between two nodes, as one direction sees it, and a choice that asks through it as the node does.
struct World {
    choice: Choice,
    now: Duration,
    ticket: u64,
    /// The time a question and its answer take.
    round_trip: Duration,
    /// Which questions arrive.
    passes: [bool; 2],
    /// Answers under way.
    answers: Vec<(Duration, u64)>,
    step: Duration,
    next: Duration,
    resting: bool,
    changes: Vec<(Duration, Change)>,
    /// Questions so far.
    questions: usize,
}

const MS: Duration = Duration::from_millis(1);

impl World {
    fn new(esp: bool, udp: bool) -> Self {
        Self {
            choice: Choice::new(None),
            now: Duration::ZERO,
            ticket: 0,
            round_trip: 2 * MS,
            passes: [esp, udp],
            answers: Vec::new(),
            step: 50 * MS,
            next: Duration::ZERO,
            resting: false,
            changes: Vec::new(),
            questions: 0,
        }
    }

    fn changed(&mut self, change: Option<Change>) {
        if let Some(change) = change {
            self.changes.push((self.now, change));
            self.step = 50 * MS;
            self.next = self.now;
        }
    }

    /// Lets `time` go by; each turn late by nothing.
    fn run(&mut self, time: Duration) {
        let end = self.now + time;
        let mut turns = 0;
        loop {
            turns += 1;
            assert!(turns < 100_000, "it never comes to rest");
            let due = self.choice.deadline().into_iter().chain([self.next]);
            let due = due.chain(self.answers.iter().map(|(at, _)| *at)).min().unwrap_or(end);
            if due > end {
                self.now = end;
                return;
            }
            self.now = self.now.max(due);
            let (come, coming): (Vec<_>, Vec<_>) = self.answers.iter().partition(|(at, _)| *at <= self.now);
            self.answers = coming;
            for (_, ticket) in come {
                let change = self.choice.answered(ticket, self.round_trip, self.now);
                self.changed(change);
            }
            let change = self.choice.look(self.now);
            self.changed(change);
            if self.choice.doubtful(self.now) && self.resting {
                (self.resting, self.step, self.next) = (false, 50 * MS, self.now);
            }
            if self.next <= self.now {
                self.round();
            }
        }
    }

    fn round(&mut self) {
        let sure = !self.choice.doubtful(self.now);
        for carrier in self.choice.asks(self.now) {
            self.ticket += 1;
            self.questions += 1;
            self.choice.asked(*carrier, self.ticket, self.now);
            if self.passes[usize::from(*carrier == Carrier::Udp)] {
                self.answers.push((self.now + self.round_trip, self.ticket));
            }
        }
        let wait = if sure { rest(3) } else { self.step };
        self.resting = sure;
        self.step = if sure {
            50 * MS
        } else {
            (self.step * 2).min(10_000 * MS)
        };
        self.next = self.now + wait;
    }

    /// When data last took another carrier.
    fn changed_at(&self) -> Duration {
        self.changes.last().expect("it took one").0
    }
}

#[test]
fn the_matrix_of_what_is_open() {
    use EncapMode::{Auto, Esp, Udp};
    let (plain, in_udp, both) = (
        &[Carrier::Esp][..],
        &[Carrier::Udp][..],
        &[Carrier::Esp, Carrier::Udp][..],
    );
    for (ours, theirs, what) in [
        (Esp, Esp, plain),
        (Esp, Auto, plain),
        (Esp, Udp, in_udp),
        (Auto, Esp, plain),
        (Auto, Auto, both),
        (Auto, Udp, in_udp),
        (Udp, Esp, in_udp),
        (Udp, Auto, in_udp),
        (Udp, Udp, in_udp),
    ] {
        assert_eq!(open(ours, theirs), what, "{ours:?} and {theirs:?}");
        assert_eq!(open(ours, theirs), open(theirs, ours), "both ends decide alike");
    }
}

#[test]
fn plain_esp_that_passes_is_taken_at_the_first_answer_and_udp_is_never_asked() {
    let mut world = World::new(true, true);
    world.run(3 * MS);
    assert_eq!(world.choice.chosen(), Some(Carrier::Esp));
    world.run(Duration::from_secs(600));
    assert_eq!(world.changes.len(), 1);
    assert!(world.choice.udp.is_none(), "nothing was asked on it");
    assert!(world.questions <= 302, "{}", world.questions);
}

#[test]
fn plain_esp_that_never_passed_is_given_up_in_half_a_second() {
    let mut world = World::new(false, true);
    world.run(Duration::from_secs(5));
    assert_eq!(world.choice.chosen(), Some(Carrier::Udp));
    assert!(world.changed_at() <= 500 * MS, "{:?}", world.changed_at());
    assert_eq!(world.changes.len(), 1);
    assert!(
        world
            .choice
            .plain_silent(world.now)
            .is_some_and(|silent| silent > Duration::from_secs(4))
    );
}

#[test]
fn nothing_is_taken_until_something_is_answered() {
    let mut world = World::new(false, false);
    world.run(Duration::from_secs(100));
    assert_eq!((world.choice.chosen(), world.changes.len()), (None, 0));
    assert!(
        world.questions < 40,
        "{} questions to a node that is away",
        world.questions
    );
}

#[test]
fn data_leaves_plain_esp_that_no_longer_passes_within_three_seconds_and_comes_back_when_it_has_proved_itself() {
    let mut world = World::new(true, true);
    world.run(Duration::from_secs(60));
    let blocked = world.now;
    world.passes = [false, true];
    world.run(Duration::from_secs(10));
    assert_eq!(world.choice.chosen(), Some(Carrier::Udp));
    assert!(
        world.changed_at() - blocked <= Duration::from_secs(3),
        "{:?}",
        world.changed_at() - blocked
    );
    world.run(Duration::from_secs(60));
    assert_eq!(world.changes.len(), 2, "it stays");
    let opened = world.now;
    world.passes = [true, true];
    world.run(Duration::from_secs(30));
    assert_eq!(world.choice.chosen(), Some(Carrier::Esp));
    let back = world.changed_at() - opened;
    assert!(
        back >= Duration::from_secs(6) && back <= Duration::from_secs(15),
        "{back:?}"
    );
    assert_eq!(world.changes[2].1.reason, Reason::Passes(PROOFS));
}

#[test]
fn udp_that_no_longer_passes_is_left_at_once_where_plain_esp_is_answered() {
    let mut world = World::new(false, true);
    world.run(Duration::from_secs(30));
    let swapped = world.now;
    world.passes = [true, false];
    world.run(Duration::from_secs(4));
    assert_eq!(world.choice.chosen(), Some(Carrier::Esp));
    assert!(world.changed_at() - swapped <= Duration::from_secs(3));
}

#[test]
fn a_peer_that_is_away_moves_nothing_and_is_not_flooded() {
    for chosen in [Carrier::Esp, Carrier::Udp] {
        let mut world = World::new(chosen == Carrier::Esp, true);
        world.run(Duration::from_secs(30));
        assert_eq!(world.choice.chosen(), Some(chosen));
        let (changes, before) = (world.changes.len(), world.questions);
        world.passes = [false, false];
        world.run(Duration::from_secs(600));
        assert_eq!(world.changes.len(), changes);
        assert!(world.questions - before < 160, "{}", world.questions - before);
    }
}

#[test]
fn plain_esp_that_comes_and_goes_is_asked_for_ever_more_proof() {
    let mut world = World::new(false, true);
    world.run(Duration::from_secs(5));
    // It passes for half a minute and is blocked for ten seconds, for an hour.
    for _ in 0..90 {
        world.passes[0] = true;
        world.run(Duration::from_secs(30));
        world.passes[0] = false;
        world.run(Duration::from_secs(10));
    }
    assert!(world.changes.len() <= 8, "{} changes", world.changes.len());
    // Once it lasts it is taken, and then trusted as before.
    world.passes[0] = true;
    world.run(Duration::from_secs(400));
    assert_eq!(world.choice.chosen(), Some(Carrier::Esp));
    world.passes[0] = false;
    world.run(Duration::from_secs(10));
    assert_eq!(world.choice.wanted, PROOFS);
}

#[test]
fn what_an_earlier_process_used_stays_in_use_until_it_is_refuted() {
    for presumed in [Carrier::Esp, Carrier::Udp] {
        let mut world = World::new(true, true);
        world.choice = Choice::new(Some(presumed));
        assert_eq!(world.choice.chosen(), Some(presumed));
        world.passes = [presumed == Carrier::Esp, presumed == Carrier::Udp];
        world.run(Duration::from_secs(20));
        assert_eq!((world.choice.chosen(), world.changes.len()), (Some(presumed), 0));
    }
}

#[test]
fn the_more_peers_the_longer_the_rest_and_never_beyond_its_bounds() {
    assert_eq!(rest(1), ALERT);
    assert_eq!(rest(500), ALERT);
    assert_eq!(rest(1_000), Duration::from_secs(4));
    assert_eq!(rest(100_000), CALM);
}

proptest! {
    /// Whatever the network did before: once it stays as it is, data is on a carrier that passes, and stays there.
    #[test]
    fn data_ends_on_a_carrier_that_passes(
        story in prop::collection::vec((any::<bool>(), any::<bool>(), 0_u64..20_000), 0..12),
        end in prop_oneof![Just([true, true]), Just([true, false]), Just([false, true])],
        round_trip in 0_u64..300,
    ) {
        let mut world = World::new(true, true);
        world.round_trip = round_trip as u32 * MS;
        for (esp, udp, time) in story {
            world.passes = [esp, udp];
            world.run(time as u32 * MS);
        }
        world.passes = end;
        // The longest: a peer that was away is asked every 10 s; the most proofs, a round each two seconds.
        world.run(Duration::from_secs(240));
        let changes = world.changes.len();
        let chosen = world.choice.chosen();
        prop_assert!(chosen.is_some());
        prop_assert!(end[usize::from(chosen == Some(Carrier::Udp))], "{chosen:?} of {end:?}");
        prop_assert!(!end[0] || chosen == Some(Carrier::Esp), "plain ESP is preferred");
        world.run(Duration::from_secs(120));
        prop_assert_eq!(world.changes.len(), changes);
    }

    /// An answer to what was never asked proves nothing.
    #[test]
    fn foreign_answers_prove_nothing(tickets in prop::collection::vec(100_u64.., 0..20)) {
        let mut choice = Choice::new(None);
        choice.asked(Carrier::Esp, 1, Duration::ZERO);
        for ticket in tickets {
            prop_assert_eq!(choice.answered(ticket, MS, MS), None);
        }
        prop_assert_eq!(choice.chosen(), None);
    }
}
