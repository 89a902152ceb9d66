//! The Kubernetes store: leases are flannel's annotations on Nodes, and a Node's podCIDRs its subnets.
//!
//! ```text
//!  follow ── list, then watch from there ──▶ View ──▶ roster, wishes
//!  publish ── read, patch what differs ──▶ the own Node
//!  report ── NetworkUnavailable, as the datapath has it ──▶ the own Node
//!  tell ── what became wrong, or right again ──▶ Events on the own Node
//! ```
//! What is asked of the API server grows with the number of Nodes, not with their size. The list is read in pages, of
//! each Node the few fields that count. The watch is one of metadata alone: a Node's heartbeats come without the images
//! that it holds. Metadata lacks the podCIDRs, but a Node has the same ones for life, so they are in the list, and are
//! read once for a Node that the watch is the first to show.
//!
//! A watch that breaks is taken up again where it was. Where the server can't do that (410: its history is compacted) a
//! new list is read; it is the whole truth, so a deletion that nobody told of is none the less seen.
//!
//! Nothing is allocated here and nothing expires: Kubernetes gives each Node its podCIDRs, and a Node that is deleted
//! takes its lease along. Writes are patches of `nodes/<name>/status`, which flannel's ClusterRole allows, against the
//! version that was read; where nothing differs nothing is written.

mod condition;
mod connect;
mod events;
mod follow;
mod news;
mod notes;
mod own;
mod secret;
mod view;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use kube::Api;
use kube::api::{NotUsed, Object, ObjectMeta, Patch, PatchParams};
use serde_json::json;
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;
use tracing::warn;

use super::health::{Half, Pulse};
use super::{Health, Held, StoreError};
use crate::lease::{Addresses, Completeness, Lease, Network, NoSlot, NodeName, Roster, Subnets};
use crate::repeats::{self, Repeats};
pub use condition::Datapath;
pub use connect::{Access, Own};
use connect::{Connector, Failure, Spec};
pub use news::{Topic, Troubles};
pub use notes::Keys;
use notes::Notes;
use own::{assigned, node_of_pod};
pub use secret::Secrets;
use view::{Record, View};

/// The first wait after a failure; it doubles up to [`SLOWEST`].
const FIRST: Duration = Duration::from_millis(200);
/// The longest such wait: thousands of nodes that lost one server must not bring it down when it is back.
const SLOWEST: Duration = Duration::from_secs(15);
/// By how much of it a wait is shortened at most.
const SPREAD: f64 = 0.5;
/// How often a write is tried against a Node that changes meanwhile: a kubelet writes it now and then.
const TRIES: usize = 5;
/// How soon another hand's annotations are overwritten once more.
const CONTESTED: Duration = Duration::from_secs(10);
/// Who writes, in a Node's `managedFields`.
const MANAGER: &str = "ringmail";

/// A Node with what is read of it.
type Node = Object<Spec, NotUsed>;

/// The Nodes of a cluster, which hold leases. Cheap to clone; the last clone to go stops the watching.
#[derive(Clone)]
pub struct Kube {
    shared: Arc<Shared>,
    _tasks: Arc<Tasks>,
}

impl std::fmt::Debug for Kube {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Kube({}, {})", self.shared.connector.server(), self.shared.own)
    }
}

struct Tasks(AbortHandle);

impl Drop for Tasks {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What an operator asks of a node by annotations on its Node.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Wishes {
    /// `public-ip-overwrite`, `public-ipv6-overwrite`: advertised in the place of the uplink's own addresses.
    pub advertised: Addresses,
    /// `node-public-ip`, `node-public-ipv6`: as `--public-ip` and `--public-ipv6`, before which they go.
    pub uplink: Addresses,
}

struct Shared {
    connector: Connector,
    keys: Keys,
    own: NodeName,
    state: Mutex<State>,
    roster: watch::Sender<Roster>,
    wishes: watch::Sender<Wishes>,
    /// Never holds anything: the configuration is in a file.
    config: watch::Sender<Option<String>>,
    pulse: Pulse,
    /// The own Node has changed.
    touched: Notify,
}

#[derive(Default)]
struct State {
    view: View,
    /// What the own Node said when this process last wrote or found it right.
    written: Option<Notes>,
    /// When another hand's annotations were last overwritten.
    overwrote: Option<Instant>,
    contested: Repeats,
    /// What is wrong with the operator's wishes, as it was last logged.
    odd: Vec<String>,
}

impl Kube {
    /// Opens the store and waits until all Nodes have been read once: a server that does not answer is waited for, and
    /// said so.
    ///
    /// # Errors
    /// [`StoreError::Kube`] for a kubeconfig or URL that can't be right, and where there is no cluster around.
    pub async fn open(access: Access) -> Result<Self, StoreError> {
        let connector = Connector::new(&access).await?;
        let pulse = Pulse::of("the API server");
        let own = match access.own {
            Own::Named(name) => name,
            Own::OfPod { namespace, name } => node_of_pod(&connector, &pulse, &namespace, &name).await?,
        };
        let shared = Arc::new(Shared {
            connector,
            keys: access.keys,
            own,
            state: Mutex::default(),
            roster: watch::Sender::new(Roster::default()),
            wishes: watch::Sender::new(Wishes::default()),
            config: watch::Sender::new(None),
            pulse,
            touched: Notify::new(),
        });
        let mut roster = shared.roster.subscribe();
        let task = tokio::spawn(follow::follow(shared.clone())).abort_handle();
        let kube = Self {
            shared,
            _tasks: Arc::new(Tasks(task)),
        };
        let complete = |roster: &Roster| roster.completeness == Completeness::Complete;
        roster.wait_for(complete).await.map_err(|_| StoreError::Stopped)?;
        Ok(kube)
    }

    /// The name of this node's Node.
    pub fn node(&self) -> &NodeName {
        &self.shared.own
    }

    /// What the operator asks for on this node's Node.
    pub fn wishes(&self) -> watch::Receiver<Wishes> {
        self.shared.wishes.subscribe()
    }

    /// Keeps the Node's condition NetworkUnavailable true to `datapath`, for ever.
    pub async fn report(&self, datapath: watch::Receiver<Datapath>) {
        condition::report(&self.shared, datapath).await;
    }

    /// Tells of `troubles` by Events on the Node, for ever.
    pub async fn tell(&self, troubles: watch::Receiver<Troubles>) {
        events::tell(&self.shared, troubles).await;
    }

    pub(super) fn roster(&self) -> watch::Receiver<Roster> {
        self.shared.roster.subscribe()
    }

    pub(super) fn config_changes(&self) -> watch::Receiver<Option<String>> {
        self.shared.config.subscribe()
    }

    pub(super) fn health(&self) -> Health {
        self.shared.pulse.health()
    }

    /// The podCIDRs of the own Node, of the families of `network`. Writes nothing: they are taken already.
    pub(super) async fn acquire(&self, node: &NodeName, network: &Network) -> Result<Held, StoreError> {
        let shared = &self.shared;
        let (record, _) = shared.read_own(node).await?;
        let subnets = assigned(&record, node, network)?;
        let slot = network.slot(&subnets).map_err(|why| match why {
            NoSlot::Length(net, _) => StoreError::Kube {
                doing: "use the Node's podCIDR",
                why: format!(
                    "{why}: set {} to {} in net-conf.json, as the cluster has it",
                    if net.addr().is_ipv4() {
                        "SubnetLen"
                    } else {
                        "IPv6SubnetLen"
                    },
                    net.prefix_len()
                ),
                transient: false,
            },
            why => why.into(),
        })?;
        let previous = record
            .notes
            .read(node, record.pods.as_deref().unwrap_or_default())
            .lease;
        shared.state().written = Some(record.notes.clone());
        shared.learn(node, record);
        Ok(Held {
            subnets,
            slot,
            previous,
        })
    }

    pub(super) async fn publish(&self, lease: &Lease) -> Result<(), StoreError> {
        let shared = &self.shared;
        if lease.subnets.iter().next().is_none() {
            return Err(StoreError::NoSubnet(lease.node.clone()));
        }
        let wanted = Notes::of(lease);
        for _ in 0..TRIES {
            let (record, version) = shared.read_own(&lease.node).await?;
            let pods: Subnets = record.pods.iter().flatten().copied().collect();
            let kept = |held: Option<IpNet>, now: Option<IpNet>| held.is_none() || held == now;
            let same = kept(lease.subnets.v4.map(Into::into), pods.v4.map(Into::into))
                && kept(lease.subnets.v6.map(Into::into), pods.v6.map(Into::into));
            if !same {
                return Err(StoreError::Moved {
                    node: lease.node.clone(),
                    held: lease.subnets,
                    assigned: pods,
                });
            }
            let changes: BTreeMap<String, Option<&str>> = record
                .notes
                .difference(&wanted)
                .into_iter()
                .map(|(note, value)| (shared.keys.name(note), value))
                .collect();
            if !changes.is_empty() {
                shared.contest(&record.notes)?;
                let patch =
                    json!({"metadata": {"uid": record.uid, "resourceVersion": version, "annotations": changes}});
                match shared.patch(&lease.node, "write the lease", &Patch::Merge(patch)).await {
                    Ok(written) => shared.learn(&lease.node, written),
                    // The Node has changed since it was read.
                    Err(Failure { code: Some(409), .. }) => continue,
                    Err(failure) => return Err(failure.into()),
                }
            } else {
                shared.learn(&lease.node, record);
            }
            shared.state().written = Some(wanted);
            return Ok(());
        }
        Err(StoreError::Kube {
            doing: "write the lease",
            why: format!("the Node changed {TRIES} times meanwhile"),
            transient: true,
        })
    }

    /// Takes the lease's annotations off the own Node; its podCIDRs stay its own.
    pub(super) async fn release(&self, node: &NodeName, subnets: &Subnets) -> Result<(), StoreError> {
        let shared = &self.shared;
        let none = Notes::default();
        for _ in 0..TRIES {
            let Some((record, version)) = shared.read(node, Half::Writing).await? else {
                return Ok(());
            };
            let held = record
                .notes
                .read(node, record.pods.as_deref().unwrap_or_default())
                .lease;
            if held.is_none_or(|held| held.subnets != *subnets) {
                return Ok(());
            }
            let gone: BTreeMap<String, Option<&str>> = record
                .notes
                .difference(&none)
                .into_iter()
                .map(|(note, value)| (shared.keys.name(note), value))
                .collect();
            let patch = json!({"metadata": {"uid": record.uid, "resourceVersion": version, "annotations": gone}});
            match shared.patch(node, "take the lease back", &Patch::Merge(patch)).await {
                Ok(record) => {
                    shared.learn(node, record);
                    return Ok(());
                }
                Err(Failure { code: Some(409), .. }) => {}
                Err(failure) => return Err(failure.into()),
            }
        }
        Err(StoreError::Kube {
            doing: "take the lease back",
            why: format!("the Node changed {TRIES} times meanwhile"),
            transient: true,
        })
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder panics")
    }

    /// The own Node, which there must be, and its version as the server writes it.
    async fn read_own(&self, node: &NodeName) -> Result<(Record, String), StoreError> {
        self.read(node, Half::Writing).await?.ok_or_else(|| {
            let error = StoreError::Kube {
                doing: "read the Node",
                why: format!(
                    "there is no Node {node:?}: the kubelet makes it; else correct --node-name or NODE_NAME",
                    node = node.as_str()
                ),
                transient: true,
            };
            self.pulse.note(Half::Writing, Some(&error));
            error
        })
    }

    /// A Node and its version; `None` where there is no such Node.
    async fn read(&self, node: &NodeName, half: Half) -> Result<Option<(Record, String)>, StoreError> {
        let nodes: Api<Node> = self.connector.nodes();
        let read = self.connector.call("read the Node", nodes.get(node.as_str())).await;
        match self.noted(half, read) {
            Ok(found) => Ok(Some((
                self.record(&found)?,
                found.metadata.resource_version.unwrap_or_default(),
            ))),
            Err(Failure { code: Some(404), .. }) => Ok(None),
            Err(failure) => Err(failure.into()),
        }
    }

    /// Writes to a Node's `status`, where flannel writes its annotations too.
    async fn patch(
        &self,
        node: &NodeName,
        doing: &'static str,
        patch: &Patch<serde_json::Value>,
    ) -> Result<Record, Failure> {
        let nodes: Api<Node> = self.connector.nodes();
        let parameters = PatchParams {
            field_manager: Some(MANAGER.into()),
            ..PatchParams::default()
        };
        let written = self
            .connector
            .call(doing, nodes.patch_status(node.as_str(), &parameters, patch))
            .await;
        let written = self.noted(Half::Writing, written)?;
        self.record(&written).map_err(|error| Failure { error, code: None })
    }

    /// An outcome, taken into the health. That a Node is not there or has changed is an answer like another.
    fn noted<T>(&self, half: Half, outcome: Result<T, Failure>) -> Result<T, Failure> {
        let trouble = outcome
            .as_ref()
            .err()
            .filter(|failure| !matches!(failure.code, Some(404 | 409 | 410)));
        self.pulse.note(half, trouble.map(|failure| &failure.error));
        outcome
    }

    fn record(&self, node: &Node) -> Result<Record, StoreError> {
        let Spec { pod_cidr, pod_cidrs } = &node.spec;
        let one = [pod_cidr.clone()];
        let texts: &[String] = if pod_cidrs.is_empty() { &one } else { pod_cidrs };
        let pods: Result<Vec<IpNet>, _> = texts
            .iter()
            .filter(|text| !text.is_empty())
            .map(|text| text.parse::<IpNet>().map(|net| net.trunc()))
            .collect();
        let pods = pods.map_err(|error| StoreError::Kube {
            doing: "read the Node's podCIDRs",
            why: format!("{texts:?}: {error}"),
            transient: true,
        })?;
        let metadata = &node.metadata;
        Ok(Record {
            uid: metadata.uid.clone().unwrap_or_default(),
            version: version(metadata),
            notes: self.keys.pick(metadata.annotations.clone().unwrap_or_default()),
            pods: Some(pods),
        })
    }

    /// Another hand's annotations are overwritten at once, then every [`CONTESTED`]: two processes that both take the
    /// Node for theirs must not write as fast as they can.
    fn contest(&self, found: &Notes) -> Result<(), StoreError> {
        let (mut state, now) = (self.state(), Instant::now());
        if !state.written.as_ref().is_some_and(|written| found.contradict(written)) {
            return Ok(());
        }
        let recently = state.overwrote.is_some_and(|at| now.duration_since(at) < CONTESTED);
        if recently {
            return Err(StoreError::Kube {
                doing: "write the lease",
                why: format!(
                    "something else writes the annotations of Node {:?} too: look for a second daemon of this name",
                    self.own.as_str()
                ),
                transient: true,
            });
        }
        state.overwrote = Some(now);
        if let Some(told) = state.contested.failed("", repeats::now()) {
            warn!(node = %self.own, times = told.times, seconds = told.seconds,
                  "another hand changed this Node's annotations; they are put back");
        }
        Ok(())
    }

    /// `node` was read whole.
    fn learn(&self, node: &NodeName, record: Record) {
        self.state().view.put(node, record);
        self.show(node);
    }

    /// Publishes what is known of `node`.
    fn show(&self, node: &NodeName) {
        let (lease, odd) = {
            let mut state = self.state();
            let (lease, differs) = state.view.lease(node);
            (lease, differs.then(|| state.view.rejected().clone()))
        };
        self.roster.send_if_modified(|roster| {
            if roster.completeness == Completeness::Partial {
                return false;
            }
            let changed = match lease {
                Some(lease) => roster.insert(lease),
                None => roster.remove(node),
            };
            changed | odd.is_some_and(|odd| roster.set_rejected(odd))
        });
        if *node == self.own {
            self.wish();
            self.touched.notify_one();
        }
    }

    /// Publishes all that is known.
    fn show_all(&self) {
        let (leases, odd) = {
            let mut state = self.state();
            (state.view.leases(), state.view.rejected().clone())
        };
        self.wish();
        self.roster
            .send_if_modified(|roster| roster.set_rejected(odd) | roster.replace(leases));
        self.touched.notify_one();
    }

    /// Publishes what the operator asks for. A Node that is gone asks for what it asked for.
    fn wish(&self) {
        let mut state = self.state();
        let Some(own) = state.view.get(&self.own) else { return };
        let (advertised, uplink, odd) = own.notes.wishes();
        if state.odd != odd {
            for why in &odd {
                warn!(node = %self.own, "annotation {why}");
            }
            state.odd = odd;
        }
        let wishes = Wishes { advertised, uplink };
        self.wishes
            .send_if_modified(|before| std::mem::replace(before, wishes) != wishes);
    }
}

fn version(metadata: &ObjectMeta) -> u64 {
    let text = metadata.resource_version.as_deref().unwrap_or_default();
    text.parse().unwrap_or(0)
}
