//! What goes on by itself: the roster follows etcd, and the etcd lease of our own key is kept alive.

use std::sync::Arc;
use std::time::{Duration, Instant};

use etcd_client::{Client, EventType, WatchOptions};
use tokio::time::{sleep, timeout};
use tracing::info;

use super::{FIRST, LARGEST, Place, SLOWEST, Shared, connect};
use crate::store::StoreError;
use crate::store::health::Half;
use crate::store::jitter::jittered;

/// How long a watch may say nothing before etcd is asked whether it is still there.
const SILENCE: Duration = Duration::from_secs(30);
/// By how much of it a wait is shortened at most.
const SPREAD: f64 = 0.2;

/// Reads all, then follows the changes, for ever.
pub(super) async fn follow(shared: Arc<Shared>) {
    let mut wait = FIRST;
    loop {
        let began = Instant::now();
        if let Err(error) = follow_once(&shared).await {
            shared.pulse.note(Half::Reading, Some(&error));
        }
        wait = if began.elapsed() > SLOWEST {
            FIRST
        } else {
            (wait * 2).min(SLOWEST)
        };
        sleep(jittered(wait, SPREAD)).await;
    }
}

/// One snapshot and one watch, until it ends.
async fn follow_once(shared: &Shared) -> Result<(), StoreError> {
    let (view, config, mut revision) = shared.snapshot().await?;
    shared.state().view = view;
    shared.configured(config);
    shared.show(true);
    let options = WatchOptions::new()
        .with_prefix()
        .with_start_revision(revision + 1)
        .with_progress_notify();
    let prefix = format!("{}/", shared.prefix);
    let mut stream = shared
        .call("watch the leases", Half::Reading, async |client: &mut Client| {
            let mut watcher = client.watch_client().max_decoding_message_size(LARGEST);
            watcher.watch(prefix, Some(options)).await
        })
        .await?;
    loop {
        let heard = match timeout(SILENCE, stream.message()).await {
            Ok(heard) => heard.map_err(|error| connect::refused("watch the leases", &error))?,
            Err(_) => {
                // Nothing may have changed; a call tells whether etcd is there, and whether it is the one that we follow.
                if shared.revision().await? < revision {
                    return Ok(());
                }
                stream
                    .request_progress()
                    .await
                    .map_err(|error| connect::refused("watch the leases", &error))?;
                continue;
            }
        };
        let Some(response) = heard else { return Ok(()) };
        if response.compact_revision() != 0 {
            return Ok(());
        }
        if response.canceled() {
            // No rights any more, or no leader: it says so, or not.
            let why = match response.cancel_reason() {
                "" => "etcd ended the watch",
                reason => reason,
            };
            return Err(StoreError::Etcd {
                doing: "watch the leases",
                why: why.into(),
                transient: true,
            });
        }
        revision = response
            .header()
            .map_or(revision, |header| revision.max(header.revision()));
        let mut changed = false;
        for event in response.events() {
            let Some(kv) = event.kv() else { continue };
            let Some(place) = shared.place(kv) else { continue };
            let there = event.event_type() == EventType::Put;
            match place {
                Place::Config => shared.configured(there.then(|| String::from_utf8_lossy(kv.value()).into_owned())),
                Place::Lease(key) if there => shared.state().view.put(&key, kv.value(), kv.mod_revision(), kv.lease()),
                Place::Lease(key) => shared.state().view.remove(&key, kv.mod_revision()),
            }
            changed = true;
        }
        if changed {
            shared.show(true);
        }
    }
}

impl Shared {
    fn configured(&self, config: Option<String>) {
        self.config.send_if_modified(|held| {
            let differs = *held != config;
            *held = config;
            differs
        });
    }
}

/// Keeps the etcd lease of what this process holds alive. One that has run out takes its key along; the roster then lacks
/// it, and whoever reads that publishes again.
pub(super) async fn renew(shared: Arc<Shared>) {
    let (mut kept, mut wait) = (0, FIRST);
    loop {
        let own = shared.state().own.clone();
        let pause = match own.map(|own| own.alive_by).filter(|id| *id != 0) {
            None => Duration::from_secs(3600),
            Some(id) => {
                let renewed = shared.call("renew the lease", Half::Writing, async |client: &mut Client| {
                    let (mut keeper, mut stream) = client.lease_keep_alive(id).await?;
                    keeper.keep_alive().await?;
                    Ok(stream.message().await?.map_or(0, |answer| answer.ttl()))
                });
                match renewed.await {
                    Ok(_) => {
                        if kept != id {
                            info!(ttl = shared.lifetime.ttl, "the lease is kept alive");
                        }
                        (kept, wait) = (id, FIRST);
                        jittered(shared.lifetime.renewal(), SPREAD)
                    }
                    Err(_) => {
                        wait = (wait * 2).min(SLOWEST);
                        jittered(wait, SPREAD)
                    }
                }
            }
        };
        tokio::select! {
            () = sleep(pause) => {}
            () = shared.renew.notified() => {}
        }
    }
}
