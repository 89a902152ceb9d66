//! Meshes of real nodes under everything that can happen to them, in an order that a seed tells.
//!
//! The world is simulated, the nodes are real: see `sim`. A failure prints its seed and its last steps;
//! `RINGMAIL_SEED=N` runs that one alone, `RINGMAIL_STEPS=N` more or fewer steps for each.

mod sim;

use sim::chaos::Chaos;

fn number(variable: &str) -> Option<u64> {
    std::env::var_os(variable)?.to_str()?.parse().ok()
}

/// Lets things happen to a mesh of `nodes` for each of `seeds`, and then comes to rest.
fn explore(seeds: impl IntoIterator<Item = u64>, nodes: u32, begin: fn(u64, u32) -> Chaos) {
    let seeds = number("RINGMAIL_SEED").map_or_else(|| seeds.into_iter().collect::<Vec<_>>(), |seed| vec![seed]);
    let steps = number("RINGMAIL_STEPS").unwrap_or(STEPS);
    let mut count = std::collections::BTreeMap::new();
    for seed in seeds {
        let mut chaos = begin(seed, nodes);
        for step in 1..=steps {
            chaos.step();
            // Twice on the way and at the end.
            if step % (steps / 3).max(1) == 0 {
                chaos.mesh.blocked.clear();
                chaos.mesh.settle();
            }
        }
        for (what, times) in &chaos.count {
            *count.entry(*what).or_insert(0) += times;
        }
    }
    println!("{nodes} nodes: {count:?}");
}

/// Steps for each seed.
const STEPS: u64 = 300;

#[test]
fn two_nodes_never_lose_data_or_let_it_out_in_the_clear_whatever_happens() {
    // The last ones found mistakes once.
    explore((0..170).chain([6030, 6083, 6089, 6113]), 2, Chaos::new);
}

#[test]
fn three_nodes_never_lose_data_or_let_it_out_in_the_clear_whatever_happens() {
    explore((1000..1120).chain([5011, 5032, 5075, 5081, 5105]), 3, Chaos::new);
}

#[test]
fn five_nodes_never_lose_data_or_let_it_out_in_the_clear_whatever_happens() {
    explore(2000..2040, 5, Chaos::new);
}

#[test]
fn nodes_that_leave_the_carrier_open_never_lose_data_or_let_it_out_in_the_clear_whatever_happens() {
    explore(3000..3030, 2, Chaos::open);
    explore(4000..4010, 3, Chaos::open);
}
