//! Whether a store works, and how an outage is told of: at its beginning, every ten minutes, at its end.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use tracing::{info, warn};

use super::StoreError;

/// How often an outage that lasts is spoken of again.
const REMIND: Duration = Duration::from_secs(600);

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
#[derive(Clone, Copy)]
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
    /// When an outage was last spoken of.
    said: Mutex<Option<Instant>>,
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
        match error {
            None => {
                if trouble.take().is_some() {
                    info!("{server} answers again");
                }
            }
            Some(error) => {
                let (text, now) = (error.chain(), Instant::now());
                let mut said = self.said.lock().expect("no holder panics");
                let recently = said.is_some_and(|said| now.duration_since(said) < REMIND);
                if trouble.is_none() || !recently {
                    warn!(error = text, "{server}: going on with what is known");
                    *said = Some(now);
                }
                let since = trouble.as_ref().map_or(now, |trouble| trouble.since);
                *trouble = Some(Trouble { error: text, since });
            }
        }
    }
}
