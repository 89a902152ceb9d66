//! Meshes of real nodes under everything that can happen to them, in an order that a seed tells.
//!
//! The world is simulated, the nodes are real: see `sim`. Two to eight of them, more than 100,000 steps in all. A failure
//! prints its seed and its last steps; `RINGMAIL_SEED=N` runs that one alone, `RINGMAIL_STEPS=N` more or fewer steps for
//! each. Then each rule is broken, by what the nodes are told: the mesh must object.

mod sim;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};

use sim::broken::Broken;
use sim::chaos::{Chaos, KINDS};
use sim::watch::{LOST, STUCK, TWICE};

/// Steps for each seed.
const STEPS: u64 = 300;

fn number(variable: &str) -> Option<u64> {
    std::env::var_os(variable)?.to_str()?.parse().ok()
}

/// Lets things happen to meshes of so many nodes, one for each of the seeds, and then comes to rest. Of each kind of
/// event one must have come.
fn explore(meshes: &[(u32, Range<u64>)], begin: fn(u64, u32) -> Chaos) {
    let alone = number("RINGMAIL_SEED");
    let steps = number("RINGMAIL_STEPS").unwrap_or(STEPS);
    let mut count: BTreeMap<&str, usize> = KINDS.iter().map(|kind| (*kind, 0)).collect();
    for (nodes, seeds) in meshes {
        for seed in alone.map_or_else(|| seeds.clone(), |seed| seed..seed + 1) {
            let mut chaos = begin(seed, *nodes);
            for step in 1..=steps {
                chaos.step();
                // Twice on the way and at the end.
                if step % (steps / 3).max(1) == 0 {
                    chaos.rest();
                }
            }
            for (what, times) in &chaos.count {
                *count.entry(*what).or_insert(0) += times;
            }
        }
    }
    println!("{meshes:?}: {} steps, {count:?}", count.values().sum::<usize>());
    let never: Vec<_> = count.iter().filter(|(_, times)| **times == 0).collect();
    assert!(alone.is_some() || never.is_empty(), "what never came: {never:?}");
}

#[test]
fn two_nodes_never_lose_data_or_let_it_out_in_the_clear_whatever_happens() {
    explore(&[(2, 0..150)], Chaos::new);
}

#[test]
fn three_nodes_never_lose_data_or_let_it_out_in_the_clear_whatever_happens() {
    explore(&[(3, 1000..1080)], Chaos::new);
}

#[test]
fn four_nodes_never_lose_data_or_let_it_out_in_the_clear_whatever_happens() {
    explore(&[(4, 2000..2040)], Chaos::new);
}

#[test]
fn five_nodes_never_lose_data_or_let_it_out_in_the_clear_whatever_happens() {
    explore(&[(5, 3000..3030)], Chaos::new);
}

#[test]
fn six_to_eight_nodes_never_lose_data_or_let_it_out_in_the_clear_whatever_happens() {
    explore(&[(6, 4000..4020), (7, 5000..5014), (8, 6000..6012)], Chaos::new);
}

#[test]
fn nodes_that_leave_the_carrier_open_never_lose_data_or_let_it_out_in_the_clear_whatever_happens() {
    explore(&[(2, 7000..7030), (3, 8000..8020)], Chaos::open);
}

/// Breaks a rule, or none, in one mesh after the other until one objects. How many steps that took, and what it said.
fn objection(rule: Option<Broken>) -> (u64, Option<String>) {
    let steps = Cell::new(0);
    let said = (0..100).find_map(|seed| {
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            let mut chaos = Chaos::calm(seed, 2, rule);
            for _ in 0..100 {
                steps.set(steps.get() + 1);
                chaos.step();
            }
            chaos.rest();
        }));
        let panic = outcome.err()?;
        Some(panic.downcast_ref::<String>().expect("an assertion's text").clone())
    });
    (steps.get(), said)
}

/// The mesh must object to a broken rule, with `expected` first.
fn caught(rule: Broken, expected: &str) {
    let (steps, said) = objection(Some(rule));
    println!("{rule:?}, in step {steps}: {said:?}");
    assert!(said.is_some_and(|said| said.starts_with(expected)), "not {expected}");
}

#[test]
fn with_every_rule_kept_nobody_objects() {
    assert_eq!(objection(None), (10_000, None));
}

#[test]
fn publishing_before_receiving_loses_data() {
    caught(Broken::PublishFirst, LOST);
}

#[test]
fn switching_without_a_probe_loses_data() {
    caught(Broken::SwitchAtOnce, LOST);
}

#[test]
fn dropping_the_old_epoch_on_sight_of_the_new_loses_data() {
    caught(Broken::DropOnSight, LOST);
}

#[test]
fn retiring_all_but_the_newest_own_epoch_loses_data() {
    caught(Broken::RetireEarly, LOST);
}

#[test]
fn taking_half_the_evidence_loses_data() {
    caught(Broken::HalfEvidence, LOST);
}

#[test]
fn taking_a_probe_for_data_loses_data() {
    caught(Broken::ProbeIsData, LOST);
}

#[test]
fn without_probes_the_ends_never_meet() {
    caught(Broken::NoProbe, STUCK);
}

#[test]
fn making_a_lost_sending_sa_again_spends_its_key_twice() {
    caught(Broken::Remake, TWICE);
}
