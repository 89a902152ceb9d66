//! Whether a store works, and how an outage is told of.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use super::StoreError;
use crate::repeats::{self, Repeats, log_came};

/// Whether a store works, one answer for reading and one for writing.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Health {
    /// Why the roster may be old.
    pub reading: Option<Trouble>,
    /// Why the last acquire, publish or release failed.
    pub writing: Option<Trouble>,
    /// How many calls have failed since the start.
    pub failures: Failures,
}

/// Calls of a store that failed, since the start.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Failures {
    /// Those that read.
    pub reading: u64,
    /// Those that write.
    pub writing: u64,
}

/// What fails, and how long already.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Trouble {
    /// The last error, with its causes.
    pub error: String,
    /// When the first of an unbroken row of errors came.
    pub since: Instant,
}

impl Trouble {
    /// How long already, at `now`.
    pub fn lasts(&self, now: Instant) -> Duration {
        now.saturating_duration_since(self.since)
    }
}

/// Which half of [`Health`] an outcome belongs to.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Half {
    Reading,
    Writing,
}

/// The health of a server that holds leases, as its calls come out.
#[derive(Debug)]
pub(super) struct Pulse {
    /// The server's name in the log.
    server: &'static str,
    health: Mutex<Health>,
    said: Mutex<Said>,
}

/// What was said of each half.
#[derive(Debug, Default)]
pub(super) struct Said {
    reading: Repeats,
    writing: Repeats,
}

impl Said {
    pub(super) fn of(&mut self, half: Half) -> &mut Repeats {
        match half {
            Half::Reading => &mut self.reading,
            Half::Writing => &mut self.writing,
        }
    }
}

impl Pulse {
    pub(super) fn of(server: &'static str) -> Self {
        Self {
            server,
            health: Mutex::default(),
            said: Mutex::default(),
        }
    }

    pub(super) fn health(&self) -> Health {
        self.health.lock().expect("no holder panics").clone()
    }

    /// Takes in how a call came out.
    pub(super) fn note(&self, half: Half, error: Option<&StoreError>) {
        let server = self.server;
        let mut health = self.health.lock().expect("no holder panics");
        let Health {
            reading,
            writing,
            failures,
        } = &mut *health;
        let (trouble, failures) = match half {
            Half::Reading => (reading, &mut failures.reading),
            Half::Writing => (writing, &mut failures.writing),
        };
        *failures += u64::from(error.is_some());
        let text = error.map(StoreError::chain);
        let mut said = self.said.lock().expect("no holder panics");
        log_came!(
            said.of(half).came(text.as_deref(), repeats::now()),
            warn,
            [],
            "{server}: going on with what is known",
            "{server} answers again"
        );
        let before = trouble.take();
        *trouble = text.map(|error| Trouble {
            error,
            since: before.map_or_else(Instant::now, |before| before.since),
        });
    }
}
