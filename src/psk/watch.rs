//! Following the keys' file or folder as it changes.
//!
//! A slow re-read finds what inotify does not show.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch as channel;
use tokio::task::spawn_blocking;
use tokio::time::{sleep, timeout};

use super::{PskError, PskSet, load};
use crate::watched::{Watched, changed};

/// The keys in use, and why a newer state of the file is not.
#[derive(Clone, Debug)]
pub struct Held {
    /// The last good set; `None` until there is one.
    pub set: Option<Arc<PskSet>>,
    /// Why the file can't be used as it is now; the set above stays in use.
    pub error: Option<PskError>,
}

impl Held {
    fn after(&self, read: Result<PskSet, PskError>) -> Self {
        match read {
            Ok(set) => Self {
                set: Some(Arc::new(set)),
                error: None,
            },
            Err(error) => Self {
                set: self.set.clone(),
                error: Some(error),
            },
        }
    }

    /// Publishes what was `read`, if that makes a difference; `trouble` where nothing is wrong with that.
    pub(crate) fn update(sender: &channel::Sender<Self>, read: Result<PskSet, PskError>, trouble: Option<&PskError>) {
        sender.send_if_modified(|held| {
            let mut next = held.after(read);
            next.error = next.error.or_else(|| trouble.cloned());
            let differs = !held.says_the_same(&next);
            if differs {
                *held = next;
            }
            differs
        });
    }

    /// The `trouble` is over.
    pub(crate) fn recovered(sender: &channel::Sender<Self>, trouble: &PskError) {
        let text = trouble.to_string();
        sender.send_if_modified(|held| {
            let over = held.error.as_ref().is_some_and(|error| error.to_string() == text);
            if over {
                held.error = None;
            }
            over
        });
    }

    fn says_the_same(&self, other: &Self) -> bool {
        let text = |held: &Self| held.error.as_ref().map(ToString::to_string);
        self.set == other.set && text(self) == text(other)
    }
}

/// How long the file is left to settle after a change: a writer takes several steps.
const SETTLE: Duration = Duration::from_millis(50);

/// Reads the keys at `path` now, and again whenever it changes and every `reread` (60 s is a good value).
///
/// The receiver holds the first reading at once. A change is published when it makes a difference, and no sooner. The
/// task ends when the last receiver is gone. Must be called within a tokio runtime with I/O and time.
pub fn watch(path: PathBuf, network: String, reread: Duration) -> channel::Receiver<Held> {
    // Watched before read: a change between the two is then seen.
    let watched = Watched::new(&path);
    let first = Held { set: None, error: None }.after(load(&path, &network));
    let (sender, receiver) = channel::channel(first);
    tokio::spawn(follow(path, network, reread, sender, watched));
    receiver
}

async fn follow(
    path: PathBuf,
    network: String,
    reread: Duration,
    sender: channel::Sender<Held>,
    mut watched: Option<Watched>,
) {
    loop {
        tokio::select! {
            () = sender.closed() => return,
            _ = timeout(reread, changed(watched.as_ref())) => {}
        }
        sleep(SETTLE).await;
        // Watches are made anew each time: what a path leads to may be another folder now.
        let (path, network) = (path.clone(), network.clone());
        let read = spawn_blocking(move || (Watched::new(&path), load(&path, &network)));
        let Ok((now_watched, read)) = read.await else { return };
        watched = now_watched;
        Held::update(&sender, read, None);
    }
}
