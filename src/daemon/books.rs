//! What the loop counts of its own doing, for /metrics: plain numbers, since one thread has them.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::histogram::Histogram;
use crate::node::{Cause, Node, Rotations, Traffic};

/// Upper bounds of a pass's duration, seconds: one peer's change takes a millisecond, the start in a mesh of 5,000 seconds.
const PASSES: &[f64] = &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0];

/// The loop's own numbers.
#[derive(Debug)]
pub(super) struct Books {
    /// How long passes took that had something to plan, seconds.
    pub(super) passes: Histogram,
    /// The epochs.
    pub(super) rotations: Rotations,
    /// How many probes went out that ask for an answer.
    pub(super) probes: u64,
    /// What was carried.
    pub(super) traffic: Traffic,
    /// When the books were opened, seconds since 1970.
    pub(super) opened: u64,
}

impl Books {
    pub(super) fn open() -> Self {
        Self {
            passes: Histogram::new(PASSES),
            rotations: Rotations::default(),
            probes: 0,
            traffic: Traffic::default(),
            opened: unix(),
        }
    }

    /// A pass that had something to plan began at `begun` and is done.
    pub(super) fn passed(&mut self, begun: Instant) {
        self.passes.observe(begun.elapsed().as_secs_f64());
    }

    /// An epoch began for `cause`.
    pub(super) fn began(&mut self, cause: Cause, node: &Node, now: Duration) {
        self.rotations.began(cause, node, now);
    }
}

/// Seconds since 1970; 0 before.
pub(super) fn unix() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}
