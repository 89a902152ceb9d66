//! The Node's condition NetworkUnavailable, as the datapath has it. Where it is True, Kubernetes starts no pods there.

use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use kube::Api;
use kube::api::{Object, Patch};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use tracing::info;

use super::connect::{Failure, Spec};
use super::{FIRST, Half, SLOWEST, SPREAD, Shared};
use crate::store::StoreError;
use crate::store::jitter::jittered;

/// How long the datapath must be broken before the Node is said to have no network: what is repaired at once is no news.
const GRACE: Duration = Duration::from_secs(10);
/// How long a text may be: an event of the kernel may name much.
const LONGEST: usize = 1000;
const TYPE: &str = "NetworkUnavailable";

/// Whether pods on this node have a network.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub enum Datapath {
    /// Nothing is known yet: what the Node says stays.
    #[default]
    Starting,
    /// It is as it should be.
    Works,
    /// It is not, and why.
    Broken(String),
}

/// What the Node is to say.
#[derive(Clone, Debug, Eq, PartialEq)]
struct Wanted {
    status: &'static str,
    reason: &'static str,
    message: String,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct Conditions {
    #[serde(default)]
    conditions: Vec<Condition>,
}

#[derive(Clone, Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
struct Condition {
    r#type: String,
    status: String,
    #[serde(default)]
    reason: String,
    #[serde(default)]
    message: String,
    #[serde(default)]
    last_transition_time: Option<String>,
}

impl Wanted {
    fn of(datapath: &Datapath) -> Option<Self> {
        match datapath {
            Datapath::Starting => None,
            Datapath::Works => Some(Self {
                status: "False",
                reason: "RingmailIsUp",
                message: "ringmail is running on this node, and the datapath is in order".into(),
            }),
            Datapath::Broken(why) => Some(Self {
                status: "True",
                reason: "RingmailDatapathBroken",
                message: why.chars().take(LONGEST).collect(),
            }),
        }
    }

    fn is_said_by(&self, condition: &Condition) -> bool {
        (self.status, self.reason, self.message.as_str())
            == (
                condition.status.as_str(),
                condition.reason.as_str(),
                condition.message.as_str(),
            )
    }
}

/// Keeps the condition true to `datapath`; looked at whenever either changes, and until it could be written.
pub(super) async fn report(shared: &Shared, mut datapath: watch::Receiver<Datapath>) {
    let (mut wait, mut broken_since) = (FIRST, None);
    loop {
        let now = datapath.borrow_and_update().clone();
        let mut due = None;
        let mut wanted = Wanted::of(&now);
        broken_since = match now {
            Datapath::Broken(_) => Some(broken_since.unwrap_or_else(Instant::now)),
            _ => None,
        };
        if let Some(since) = broken_since.filter(|since| since.elapsed() < GRACE) {
            (wanted, due) = (None, Some(since + GRACE));
        }
        if let Some(wanted) = wanted {
            match say(shared, &wanted).await {
                Ok(()) => wait = FIRST,
                Err(_) => {
                    wait = (wait * 2).min(SLOWEST);
                    due = Some(Instant::now() + jittered(wait, SPREAD));
                }
            }
        }
        let pause = async {
            match due {
                Some(at) => sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            changed = datapath.changed() => if changed.is_err() { return },
            () = shared.touched.notified() => {}
            () = pause => {}
        }
    }
}

/// Writes what is `wanted`, if the Node does not say it.
async fn say(shared: &Shared, wanted: &Wanted) -> Result<(), StoreError> {
    let nodes: Api<Object<Spec, Conditions>> = shared.connector.nodes();
    let own = shared.own.as_str();
    let read = shared
        .connector
        .call("read the Node's conditions", nodes.get(own))
        .await;
    let node = match shared.noted(Half::Reading, read) {
        Ok(node) => node,
        // There is nothing to say it on; it is said when there is.
        Err(Failure { code: Some(404), .. }) => return Ok(()),
        Err(failure) => return Err(failure.into()),
    };
    let conditions = node.status.unwrap_or_default().conditions;
    let before = conditions.iter().find(|condition| condition.r#type == TYPE);
    if before.is_some_and(|before| wanted.is_said_by(before)) {
        return Ok(());
    }
    let now = Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    let turned = before
        .filter(|before| before.status == wanted.status)
        .and_then(|before| before.last_transition_time.clone());
    let patch = json!({
        "metadata": {"uid": node.metadata.uid},
        "status": {"conditions": [{
            "type": TYPE,
            "status": wanted.status,
            "reason": wanted.reason,
            "message": wanted.message,
            "lastHeartbeatTime": now,
            "lastTransitionTime": turned.as_ref().unwrap_or(&now),
        }]},
    });
    shared
        .patch(&shared.own, "write the Node's condition", &Patch::Strategic(patch))
        .await?;
    info!(
        status = wanted.status,
        reason = wanted.reason,
        "the Node's condition {TYPE} is written"
    );
    Ok(())
}
