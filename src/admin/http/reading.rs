//! The text of `/metrics`, made once for all who ask for it at one time or soon after another.

use std::sync::Arc;
use std::time::Duration;

use hyper::body::Bytes;
use tokio::sync::{Mutex, Semaphore};
use tokio::time::{Instant, sleep_until};

/// How many may wait for metrics at a time: health is to have room beside them.
pub(super) const READERS: usize = 4;
/// A text is served again for so many times as long as it took to make: of the loop's time readings get a fifth.
const SHARE: u32 = 4;
/// And for no longer than this: it is about now.
const FRESH: Duration = Duration::from_secs(1);

/// The last text, for all listeners.
#[derive(Clone, Debug)]
pub struct Readings {
    places: Arc<Semaphore>,
    last: Arc<Mutex<Option<Text>>>,
}

#[derive(Debug)]
struct Text {
    text: Bytes,
    until: Instant,
}

impl Default for Readings {
    fn default() -> Self {
        Self {
            places: Arc::new(Semaphore::new(READERS)),
            last: Arc::default(),
        }
    }
}

impl Readings {
    /// The last text while it is fresh, else what `make` makes; who asks meanwhile waits for that. `None` where
    /// [`READERS`] wait already.
    pub(super) async fn text(&self, make: impl Future<Output = String> + Send + 'static) -> Option<Bytes> {
        let place = self.places.clone().try_acquire_owned().ok()?;
        let last = self.last.clone();
        // A task of its own: the loop answers also where the client has gone, and that answer is for the next one.
        let made = tokio::spawn(async move {
            let _place = place;
            let mut held = last.lock().await;
            if let Some(held) = held.as_ref().filter(|held| Instant::now() < held.until) {
                return held.text.clone();
            }
            let begun = Instant::now();
            let text = Bytes::from(make.await);
            let until = Instant::now() + (begun.elapsed() * SHARE).min(FRESH);
            *held = Some(Text {
                text: text.clone(),
                until,
            });
            tokio::spawn(forget(last.clone(), until));
            text
        });
        made.await.ok()
    }
}

/// Lets the text go that is served until `until`: of 5,000 peers it is five megabytes.
async fn forget(last: Arc<Mutex<Option<Text>>>, until: Instant) {
    sleep_until(until).await;
    last.lock().await.take_if(|held| held.until <= until);
}
