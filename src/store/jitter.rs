//! Waits that differ from node to node: nodes that lost a server together do not come back together.

use std::time::Duration;

use ring::rand::{SecureRandom as _, SystemRandom};

/// `wait`, less up to `part` of it (0 to 1).
pub(super) fn jittered(wait: Duration, part: f64) -> Duration {
    wait.mul_f64(1.0 - f64::from(random_byte()) / 255.0 * part)
}

/// Random, and 0 where the system has no randomness: nothing secret comes of it.
pub(super) fn random_byte() -> u8 {
    let mut random = [0; 1];
    let _ = SystemRandom::new().fill(&mut random);
    random[0]
}
