//! Events on the own Node, where `kubectl describe node` shows them. Best effort: what can't be written is tried again,
//! and neither waited for nor any trouble of the store.

use std::time::Duration;

use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::{ObjectMeta, Patch, PatchParams, PostParams};
use serde_json::json;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use tracing::{debug, info, warn};

use super::connect::Failure;
use super::news::{News, Next, Said, Troubles};
use super::{FIRST, MANAGER, SPREAD, Shared};
use crate::repeats::Repeats;
use crate::store::StoreError;
use crate::store::jitter::{jittered, random_byte};

/// Where Events of what belongs to no namespace are.
const NAMESPACE: &str = "default";
/// The longest wait after a failure: who may not write Events asks seldom.
const SLOWEST: Duration = Duration::from_secs(300);
/// How much of the Node's name an Event's name has: both have 253 characters at most.
const NAME: usize = 220;

/// Tells of `troubles` as they come and go, for ever.
pub(super) async fn tell(shared: &Shared, mut troubles: watch::Receiver<Troubles>) {
    let (began, mut said) = (Instant::now(), Said::default());
    let (mut wait, mut failing) = (FIRST, Repeats::default());
    loop {
        let now = troubles.borrow_and_update().clone();
        let mut waiting = false;
        let due = match said.next(&now, began.elapsed()) {
            Next::Wait(at) => at.map(|at| began + at),
            Next::Say(news) => match say(shared, &news).await {
                Ok((name, count)) => {
                    said.said(news, name, count, began.elapsed());
                    wait = FIRST;
                    if let Some(told) = failing.worked(began.elapsed()) {
                        info!(
                            times = told.times,
                            seconds = told.seconds,
                            "Events can be written again"
                        );
                    }
                    continue;
                }
                Err(Failure { error, .. }) => {
                    let text = error.chain();
                    match error {
                        // The store says that it is away.
                        StoreError::KubeAway { .. } => debug!(error = text, "an Event waits"),
                        _ => {
                            if let Some(told) = failing.failed(&text, began.elapsed()) {
                                warn!(
                                    error = text,
                                    times = told.times,
                                    seconds = told.seconds,
                                    "an Event can't be written; trying again now and then"
                                );
                            }
                        }
                    }
                    waiting = true;
                    wait = (wait * 2).min(SLOWEST);
                    Some(Instant::now() + jittered(wait, SPREAD))
                }
            },
        };
        let pause = async {
            match due {
                Some(at) => sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = pause => {}
            // After a failure the wait is kept, whatever happens meanwhile.
            changed = troubles.changed(), if !waiting => if changed.is_err() { return },
        }
    }
}

/// Says `news`; returns the Event's name and how often it has said so.
async fn say(shared: &Shared, news: &News) -> Result<(String, i32), Failure> {
    let now = Timestamp::now();
    let events: Api<Event> = Api::namespaced(shared.connector.client(), NAMESPACE);
    let field_manager = Some(MANAGER.to_owned());
    if let Some((name, count)) = &news.again {
        let patch = Patch::Merge(json!({"count": count, "lastTimestamp": Time(now)}));
        let by = PatchParams {
            field_manager: field_manager.clone(),
            ..PatchParams::default()
        };
        let patched = shared
            .connector
            .call("count an Event", events.patch(name, &by, &patch))
            .await;
        match patched {
            Ok(_) => return Ok((name.clone(), *count)),
            // The server has dropped it: it is made anew.
            Err(Failure { code: Some(404), .. }) => debug!(name, "an Event is gone"),
            Err(failure) => return Err(failure),
        }
    }
    let own = shared.own.as_str();
    // The kubelet's own Events name the Node in the place of its uid; `kubectl describe` looks for both.
    let uid = shared.state().view.get(&shared.own).map(|record| record.uid.clone());
    let uid = uid.unwrap_or_else(|| own.to_owned());
    let random = (0..8).fold(0_u64, |number, _| number << 8 | u64::from(random_byte()));
    let short: String = own.chars().take(NAME).collect();
    let name = format!("{}.{random:016x}", short.trim_end_matches(['.', '-']));
    let event = Event {
        metadata: ObjectMeta {
            name: Some(name.clone()),
            namespace: Some(NAMESPACE.to_owned()),
            ..ObjectMeta::default()
        },
        involved_object: ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Node".to_owned()),
            name: Some(own.to_owned()),
            uid: Some(uid),
            ..ObjectReference::default()
        },
        type_: Some(if news.warning { "Warning" } else { "Normal" }.to_owned()),
        reason: Some(news.reason.to_owned()),
        message: Some(news.message.clone()),
        count: Some(1),
        first_timestamp: Some(Time(now)),
        last_timestamp: Some(Time(now)),
        source: Some(EventSource {
            component: Some(MANAGER.to_owned()),
            host: Some(own.to_owned()),
        }),
        reporting_component: Some(MANAGER.to_owned()),
        reporting_instance: Some(own.to_owned()),
        ..Event::default()
    };
    let by = PostParams {
        field_manager,
        ..PostParams::default()
    };
    shared
        .connector
        .call("write an Event", events.create(&by, &event))
        .await?;
    Ok((name, 1))
}
