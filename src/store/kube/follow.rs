//! The roster follows the Nodes: a list, then a watch of metadata from where the list was.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::{StreamExt as _, pin_mut};
use kube::Api;
use kube::api::{ListParams, NotUsed, Object, ObjectMeta, WatchEvent, WatchParams};
use tokio::time::{sleep, timeout};
use tracing::debug;

use super::connect::{Failure, Spec};
use super::view::{Glimpse, Next};
use super::{FIRST, Half, Node, SLOWEST, SPREAD, Shared, version};
use crate::lease::NodeName;
use crate::store::StoreError;
use crate::store::jitter::jittered;

/// How many Nodes are read at a time: what a page weighs is what a list costs in memory.
const PAGE: u32 = 50;
/// How long the server is asked to keep a watch open, seconds.
const WATCH: u32 = 300;
/// How long a watch may say nothing. The server sends a bookmark every minute.
const SILENCE: Duration = Duration::from_secs(150);

/// Why a watch ended.
enum End {
    /// The server has closed it, as it does after a while.
    Closed,
    /// It could not be asked, or did not go on; it is taken up again where it was.
    Broken(Failure),
    /// The server can't go on from there.
    Anew(Failure),
}

impl From<Failure> for End {
    fn from(failure: Failure) -> Self {
        match failure.code {
            // Overloaded, or in the middle of starting or stopping.
            None | Some(401 | 403 | 429 | 500 | 502 | 503) => Self::Broken(failure),
            Some(_) => Self::Anew(failure),
        }
    }
}

/// Reads all, then follows the changes, for ever.
pub(super) async fn follow(shared: Arc<Shared>) {
    let (mut wait, mut at) = (FIRST, None);
    loop {
        let began = Instant::now();
        let end = match at.take() {
            None => match snapshot(&shared).await {
                Ok(version) => {
                    at = Some(version);
                    continue;
                }
                Err(failure) => End::Broken(failure),
            },
            Some(mut version) => {
                let end = watch(&shared, &mut version).await;
                if !matches!(end, End::Anew(_)) {
                    at = Some(version);
                }
                end
            }
        };
        match &end {
            End::Closed => {}
            End::Broken(failure) => shared.pulse.note(Half::Reading, Some(&failure.error)),
            End::Anew(failure) => debug!(error = %failure.error, "the Nodes are listed anew"),
        }
        wait = if began.elapsed() > SLOWEST {
            FIRST
        } else {
            (wait * 2).min(SLOWEST)
        };
        sleep(jittered(wait, SPREAD)).await;
    }
}

/// Reads all Nodes; returns the version to watch from.
async fn snapshot(shared: &Shared) -> Result<String, Failure> {
    let mut all = BTreeMap::new();
    let mut page = ListParams::default().limit(PAGE);
    loop {
        let nodes: Api<Node> = shared.connector.nodes();
        let read = shared.connector.call("list the Nodes", nodes.list(&page)).await;
        let list = shared.noted(Half::Reading, read)?;
        for node in &list.items {
            let name = node.metadata.name.as_deref().unwrap_or_default();
            match (NodeName::new(name), shared.record(node)) {
                (Ok(name), Ok(record)) => {
                    all.insert(name, record);
                }
                (named, record) => {
                    let error = named.err().map(|error| error.to_string());
                    let error = error.or_else(|| Some(record.err()?.chain()));
                    debug!(name, error, "a Node is left out");
                }
            }
        }
        let version = list.metadata.resource_version.unwrap_or_default();
        match list.metadata.continue_.filter(|more| !more.is_empty()) {
            Some(more) => page = page.continue_token(&more),
            None => {
                let number = version.parse().unwrap_or(0);
                shared.state().view.replace(all, number);
                shared.show_all();
                return Ok(version);
            }
        }
    }
}

/// Follows the changes after `version` until the watch ends, keeping `version` at what was taken in.
async fn watch(shared: &Shared, from: &mut String) -> End {
    let parameters = WatchParams::default().timeout(WATCH);
    let nodes: Api<Object<Spec, NotUsed>> = shared.connector.nodes();
    let opened = shared
        .connector
        .call("watch the Nodes", nodes.watch_metadata(&parameters, from))
        .await;
    let stream = match shared.noted(Half::Reading, opened) {
        Ok(stream) => stream,
        Err(failure) => return failure.into(),
    };
    pin_mut!(stream);
    loop {
        let event = match timeout(SILENCE, stream.next()).await {
            Ok(Some(Ok(event))) => event,
            Ok(Some(Err(error))) => return Failure::of("watch the Nodes", &error).into(),
            Ok(None) => return End::Closed,
            Err(_) => {
                shared.connector.forget();
                let why = format!("nothing came for {} s", SILENCE.as_secs());
                return End::Broken(Failure::lost("watch the Nodes", why));
            }
        };
        let (metadata, there) = match event {
            WatchEvent::Added(node) | WatchEvent::Modified(node) => (node.metadata, true),
            WatchEvent::Deleted(node) => (node.metadata, false),
            WatchEvent::Bookmark(mark) => {
                *from = mark.metadata.resource_version;
                continue;
            }
            WatchEvent::Error(status) => {
                return Failure::answered("watch the Nodes", status.code, &status.message).into();
            }
        };
        let reached = metadata.resource_version.clone();
        // What could not be taken in whole is told again.
        if let Err(error) = take(shared, metadata, there).await {
            return End::Broken(Failure { error, code: None });
        }
        *from = reached.unwrap_or_else(|| from.clone());
    }
}

/// Takes in what the watch says of one Node.
async fn take(shared: &Shared, metadata: ObjectMeta, there: bool) -> Result<(), StoreError> {
    let Ok(name) = NodeName::new(metadata.name.as_deref().unwrap_or_default()) else {
        return Ok(());
    };
    if !there {
        if shared.state().view.remove(&name, version(&metadata)) {
            shared.show(&name);
        }
        return Ok(());
    }
    let glimpse = Glimpse {
        version: version(&metadata),
        uid: metadata.uid.unwrap_or_default(),
        notes: shared.keys.pick(metadata.annotations.unwrap_or_default()),
    };
    let next = shared.state().view.glimpse(&name, &glimpse);
    match next {
        Next::Nothing => {
            if name == shared.own {
                shared.touched.notify_one();
            }
        }
        Next::Show => shared.show(&name),
        Next::Ask => match shared.read(&name, Half::Reading).await? {
            Some((record, _)) => shared.learn(&name, record),
            // Deleted meanwhile: the watch tells.
            None => shared.show(&name),
        },
    }
    Ok(())
}
