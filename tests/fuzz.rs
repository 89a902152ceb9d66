//! Every fuzz target with its seeds and with changes to them, the same each time: that the targets are built, and bear what
//! is near the seeds. `tests/fuzz/run` has libFuzzer look further.

#[path = "fuzz/targets/mod.rs"]
mod targets;

use std::panic::catch_unwind;
use std::path::Path;
use std::thread;

/// Inputs of a target: about a second's, unoptimised.
const ROUNDS: usize = 5000;

#[test]
fn every_target_bears_its_seeds_and_what_is_near_them() {
    thread::scope(|scope| {
        for (name, target) in targets::ALL {
            scope.spawn(move || run(name, target));
        }
    });
}

fn run(name: &str, target: targets::Target) {
    let seeds = seeds(name);
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let changed = (0..ROUNDS).map(|_| random.near(&seeds));
    for input in seeds.iter().cloned().chain(changed) {
        if catch_unwind(|| target(&input)).is_err() {
            panic!("{name}: b\"{}\"", input.escape_ascii());
        }
    }
}

/// What tests/fuzz/seeds has for a target, in the order of names.
fn seeds(name: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fuzz/seeds")
        .join(name);
    let entries = std::fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut paths: Vec<_> = entries.map(|entry| entry.expect("an entry").path()).collect();
    assert!(!paths.is_empty(), "{} has no seed", folder.display());
    paths.sort();
    paths.iter().map(|path| std::fs::read(path).expect("a seed")).collect()
}

/// Numbers and signs at which code changes its mind.
const EDGES: &[u8] = b"\0\x01\x7f\x80\xff09-/:.,\"{}[] \n";

/// xorshift64.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) as usize % limit.max(1)
    }

    /// One of `seeds` with a few changes.
    fn near(&mut self, seeds: &[Vec<u8>]) -> Vec<u8> {
        let mut input = seeds[self.below(seeds.len())].clone();
        for _ in 0..=self.below(6) {
            let other = self.below(seeds.len());
            self.change(&mut input, &seeds[other]);
        }
        input
    }

    fn change(&mut self, input: &mut Vec<u8>, other: &[u8]) {
        let at = self.below(input.len() + 1);
        let piece = |random: &mut Self, of: &[u8]| {
            let from = random.below(of.len() + 1);
            of[from..(from + random.below(20)).min(of.len())].to_vec()
        };
        match self.below(6) {
            0 => {
                input.drain(at..(at + self.below(20)).min(input.len()));
            }
            1 => {
                let piece = piece(self, &input.clone());
                input.splice(at..at, piece);
            }
            2 => {
                let piece = piece(self, other);
                input.splice(at..at, piece);
            }
            3 => input.truncate(at),
            4 => input.insert(at, EDGES[self.below(EDGES.len())]),
            _ => {
                if let Some(byte) = input.get_mut(at) {
                    *byte = self.below(256) as u8;
                }
            }
        }
    }
}
