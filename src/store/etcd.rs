//! The etcd v3 store, with flannel's keys, values and lifetime: `<prefix>/config` and `<prefix>/subnets/<subnets>`.
//!
//! ```text
//!  follow ── snapshot, then watch from the next revision ──▶ View ──▶ roster, config
//!  acquire, publish, release ── compare-and-set ──▶ etcd
//!  renew ── keeps the etcd lease of our own key alive
//! ```
//! A watch that ends for whatever reason (a member or the leader is gone, history is compacted, the data was restored from
//! an older snapshot) is followed by a new snapshot, whose differences alone are published. While etcd can't be reached
//! the roster stays as it was. Every write names the revision that it replaces. A key without an etcd lease is an
//! operator's reservation: its node takes it and it stays one.

mod connect;
mod follow;
mod view;

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use etcd_client::{Client, Compare, CompareOp, GetOptions, KeyValue, PutOptions, Txn, TxnOp};
use tokio::sync::watch;
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};
use tracing::info;

use super::allocate::{Taken, choose};
use super::health::{Half, Pulse};
use super::jitter::random_byte;
use super::{Claim, Health, Held, StoreError, format};
use crate::lease::{Addresses, BackendData, Lease, Network, NodeName, Roster, Subnets};
use connect::Connector;
pub use connect::{Access, Endpoints};
use follow::{follow, renew};
use view::{Identity, View};

/// flannel's lifetime of a lease, seconds.
pub const TTL: i64 = 24 * 3600;
/// How long one call may take.
const LIMIT: Duration = Duration::from_secs(5);
/// The first wait after a failure; it doubles up to [`SLOWEST`].
const FIRST: Duration = Duration::from_millis(100);
/// The longest such wait.
const SLOWEST: Duration = Duration::from_secs(5);
/// A node that loses so many races for a subnet in a row is told so.
const RACES: usize = 1000;

/// How many identities of its own a process recognises in data restored from an older snapshot, and how many values
/// whose writing had no known outcome.
const REMEMBERED: usize = 16;
/// The largest message that is taken from etcd, bytes, as flannel's client has it; tonic's own limit is 4 MiB, and a
/// roster of some thousand nodes is larger.
const LARGEST: usize = i32::MAX as usize;

/// How leases live.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Lifetime {
    /// Seconds from one renewal.
    pub ttl: i64,
    /// Seconds before the end at which it is renewed at the latest.
    pub margin: i64,
}

impl Lifetime {
    /// When a lease is renewed after it was last: with the margin, and after a third at the latest, since a node that
    /// begins to ask too late has nothing left when etcd is away.
    fn renewal(&self) -> Duration {
        let seconds = (self.ttl - self.margin).min(self.ttl / 3).max(1);
        Duration::from_secs(seconds.unsigned_abs())
    }
}

/// An etcd cluster that holds leases. Cheap to clone; the last clone to go stops the watching.
#[derive(Clone)]
pub struct Etcd {
    shared: Arc<Shared>,
    _tasks: Arc<Tasks>,
}

impl std::fmt::Debug for Etcd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Etcd({}, {})", self.shared.connector.endpoints(), self.shared.prefix)
    }
}

struct Tasks([AbortHandle; 2]);

impl Drop for Tasks {
    fn drop(&mut self) {
        self.0.iter().for_each(AbortHandle::abort);
    }
}

struct Shared {
    connector: Connector,
    prefix: String,
    lifetime: Lifetime,
    state: Mutex<State>,
    roster: watch::Sender<Roster>,
    config: watch::Sender<Option<String>>,
    pulse: Pulse,
    renew: tokio::sync::Notify,
}

#[derive(Default)]
struct State {
    view: View,
    own: Option<Own>,
    /// Who this process was, newest last, while it held the key of `own`: its public address may have changed. At most
    /// [`REMEMBERED`].
    formerly: Vec<Identity>,
    /// What this process began to write as its lease since it last knew the outcome: etcd may hold it though the answer
    /// was lost. Key and value, newest last, at most [`REMEMBERED`].
    attempted: Vec<(String, String)>,
}

/// What this process holds.
#[derive(Clone, Debug)]
struct Own {
    who: Identity,
    key: String,
    revision: i64,
    alive_by: i64,
}

impl State {
    /// Notes that `own` is what this process holds.
    fn take(&mut self, own: Own) {
        if self.own.as_ref().is_some_and(|before| before.key != own.key) {
            self.formerly.clear();
        }
        self.formerly.retain(|who| *who != own.who);
        if self.formerly.len() == REMEMBERED {
            self.formerly.remove(0);
        }
        self.formerly.push(own.who.clone());
        self.attempted.clear();
        self.own = Some(own);
    }

    /// Notes that `value` is about to be written to `key`.
    fn attempt(&mut self, key: &str, value: &str) {
        if self.attempted.len() == REMEMBERED {
            self.attempted.remove(0);
        }
        self.attempted.push((key.to_owned(), value.to_owned()));
    }
}

impl Etcd {
    /// Opens the store and waits until it has been read once: an etcd that does not answer is waited for, and said so.
    ///
    /// # Errors
    /// [`StoreError::Etcd`] for endpoints, files or credentials that can't be right.
    pub async fn open(access: Access, lifetime: Lifetime) -> Result<Self, StoreError> {
        let prefix = access.prefix.trim_end_matches('/').to_owned();
        let shared = Arc::new(Shared {
            connector: Connector::new(access, usize::from(random_byte())).await?,
            prefix,
            lifetime,
            state: Mutex::default(),
            roster: watch::Sender::new(Roster::default()),
            config: watch::Sender::new(None),
            pulse: Pulse::of("etcd"),
            renew: tokio::sync::Notify::new(),
        });
        let mut roster = shared.roster.subscribe();
        let tasks = [
            tokio::spawn(follow(shared.clone())).abort_handle(),
            tokio::spawn(renew(shared.clone())).abort_handle(),
        ];
        let etcd = Self {
            shared,
            _tasks: Arc::new(Tasks(tasks)),
        };
        let complete = |roster: &Roster| roster.completeness == crate::lease::Completeness::Complete;
        tokio::select! {
            _ = roster.wait_for(complete) => Ok(etcd),
            error = etcd.shared.hopeless() => Err(error),
        }
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

    pub(super) async fn config(&self) -> Result<Option<String>, StoreError> {
        let key = format!("{}/config", self.shared.prefix);
        let found = self
            .shared
            .call("read the configuration", Half::Reading, async |client: &mut Client| {
                client.get(key.clone(), None).await
            });
        let found = found.await?;
        Ok(found
            .kvs()
            .first()
            .map(|kv| String::from_utf8_lossy(kv.value()).into_owned()))
    }

    pub(super) async fn acquire(&self, node: &NodeName, network: &Network, claim: &Claim) -> Result<Held, StoreError> {
        let shared = &self.shared;
        let who = Identity {
            node: node.clone(),
            public: claim.public,
        };
        let mut lost = Vec::new();
        for _ in 0..RACES {
            let view = shared.snapshot().await?.0;
            let (good, bad) = view.of(&who, network);
            let previous = good
                .first()
                .or_else(|| bad.first())
                .and_then(|key| view.get(key))
                .map(|entry| Lease {
                    node: node.clone(),
                    ..entry.lease.clone()
                });
            if let Some(key) = good.first() {
                let entry = view.get(key).expect("it was just found");
                let subnets = entry.lease.subnets;
                let own = Own {
                    who,
                    key: (*key).to_owned(),
                    revision: entry.revision,
                    alive_by: entry.alive_by,
                };
                shared.holds(own, &format::encode_flannel(&entry.lease));
                let slot = network.slot(&subnets)?;
                return Ok(Held {
                    subnets,
                    slot,
                    previous,
                });
            }
            for key in &bad {
                let entry = view.get(key).expect("it was just found");
                info!(key, "this node's lease does not fit the Network; it is given back");
                shared.delete(key, entry.revision).await?;
            }
            let taken: Taken = view.taken().chain(lost.iter().copied()).collect();
            let Some(subnets) = choose(network, &taken, claim) else {
                return Err(StoreError::Exhausted {
                    total: view.taken().count(),
                    network: *network,
                    remedy: format!("remove the keys of nodes that are gone below {}/subnets", shared.prefix),
                });
            };
            let lease = Lease {
                node: node.clone(),
                subnets,
                public: claim.public,
                backend: String::new(),
                data: BackendData::NULL,
                v6_data: BackendData::NULL,
            };
            let key = format::key(&subnets);
            match shared.create(&key, &lease).await? {
                Some((revision, alive_by)) => {
                    let slot = network.slot(&subnets)?;
                    let own = Own {
                        who,
                        key,
                        revision,
                        alive_by,
                    };
                    shared.holds(own, &format::encode_flannel(&lease));
                    return Ok(Held {
                        subnets,
                        slot,
                        previous,
                    });
                }
                // Another node was quicker: the next free one.
                None => lost.push(subnets),
            }
        }
        Err(StoreError::Etcd {
            doing: "take a subnet",
            why: format!("{RACES} subnets in a row were taken by others meanwhile"),
            transient: true,
        })
    }

    pub(super) async fn publish(&self, lease: &Lease) -> Result<(), StoreError> {
        let shared = &self.shared;
        let key = format::key(&lease.subnets);
        if lease.subnets.iter().next().is_none() {
            return Err(StoreError::NoSubnet(lease.node.clone()));
        }
        let who = Identity {
            node: lease.node.clone(),
            public: lease.public,
        };
        let own = shared.state().own.clone().filter(|own| own.key == key);
        // Whoever had it before an address changed is this node too.
        let before = own.as_ref().map_or_else(|| who.clone(), |own| own.who.clone());
        let view = shared.snapshot().await?.0;
        let value = format::encode_flannel(lease);
        let stored = view.get(&key).map(|entry| format::encode_flannel(&entry.lease));
        let unanswered = stored.is_some_and(|stored| {
            let state = shared.state();
            state.attempted.iter().any(|(at, said)| *at == key && *said == stored)
        });
        shared.state().attempt(&key, &value);
        let Some(entry) = view.get(&key) else {
            if let Some(reason) = view.rejected().get(&key) {
                return Err(StoreError::Occupied {
                    subnets: lease.subnets,
                    entry: format!("{}/subnets/{key}", shared.prefix),
                    reason: reason.clone(),
                });
            }
            let taken = view
                .leases(None)
                .into_iter()
                .find(|other| format::overlap(&other.subnets, &lease.subnets));
            if let Some(other) = taken {
                return Err(StoreError::Stolen {
                    subnets: lease.subnets,
                    holder: other.node,
                });
            }
            return match shared.create(&key, lease).await? {
                Some((revision, alive_by)) => {
                    let own = Own {
                        who,
                        key,
                        revision,
                        alive_by,
                    };
                    shared.holds(own, &value);
                    Ok(())
                }
                None => Err(StoreError::Etcd {
                    doing: "publish the lease",
                    why: "another node wrote it at the same moment".into(),
                    transient: true,
                }),
            };
        };
        // After a restore, what is older than our own last word may be what this process said itself under another
        // address. It may as well be another node's: revisions also begin anew with a new cluster.
        let formerly = shared.state().formerly.clone();
        let older = own.as_ref().is_some_and(|own| entry.revision <= own.revision)
            && formerly.iter().any(|who| view.owns(who, &key));
        if !unanswered && !older && !view.owns(&who, &key) && !view.owns(&before, &key) {
            return Err(StoreError::Stolen {
                subnets: lease.subnets,
                holder: entry.lease.node.clone(),
            });
        }
        if let Some(own) = own.filter(|own| entry.revision > own.revision && !unanswered) {
            let same = format::encode_flannel(&entry.lease) == value;
            if !same {
                return Err(StoreError::Superseded {
                    node: lease.node.clone(),
                    stored: entry.revision.unsigned_abs(),
                    written: own.revision.unsigned_abs(),
                });
            }
        }
        let (revision, alive_by) = match format::encode_flannel(&entry.lease) == value {
            true => (entry.revision, entry.alive_by),
            false => shared.replace(&key, &value, entry.revision, entry.alive_by).await?,
        };
        let own = Own {
            who,
            key,
            revision,
            alive_by,
        };
        shared.holds(own, &value);
        Ok(())
    }

    pub(super) async fn release(&self, node: &NodeName, subnets: &Subnets) -> Result<(), StoreError> {
        let shared = &self.shared;
        let key = format::key(subnets);
        let public = shared
            .state()
            .own
            .as_ref()
            .map(|own| own.who.public)
            .unwrap_or_default();
        let who = Identity {
            node: node.clone(),
            public,
        };
        let view = shared.snapshot().await?.0;
        shared.state().own.take_if(|own| own.key == key);
        match view.get(&key) {
            // A reservation is the operator's.
            Some(entry) if entry.alive_by != 0 && view.owns(&who, &key) => shared.delete(&key, entry.revision).await,
            _ => Ok(()),
        }
    }

    /// The subnets that `node` has leased, found by its name or by one of `public`; those of `noted` before others. They
    /// may then be released. A reservation is none of them.
    pub async fn recall(
        &self,
        node: &NodeName,
        public: Addresses,
        noted: &Subnets,
    ) -> Result<Option<Subnets>, StoreError> {
        let who = Identity {
            node: node.clone(),
            public,
        };
        let view = self.shared.snapshot().await?.0;
        let owned = |lease: &Lease| {
            let key = format::key(&lease.subnets);
            view.owns(&who, &key) && view.get(&key).is_some_and(|entry| entry.alive_by != 0)
        };
        let mut all: Vec<Subnets> = view
            .leases(None)
            .iter()
            .filter(|lease| owned(lease))
            .map(|lease| lease.subnets)
            .collect();
        all.sort_by_key(|subnets| subnets != noted);
        let found = all.first().copied();
        if let Some((key, entry)) = found.and_then(|subnets| {
            let key = format::key(&subnets);
            Some((key.clone(), view.get(&key)?))
        }) {
            self.shared.state().own = Some(Own {
                who,
                key,
                revision: entry.revision,
                alive_by: 0,
            });
        }
        Ok(found)
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder panics")
    }

    /// What this process holds is `own` now, with `value`. The roster shows it at once, under its name.
    fn holds(&self, own: Own, value: &str) {
        {
            let mut state = self.state();
            state.view.put(&own.key, value.as_bytes(), own.revision, own.alive_by);
            state.take(own);
        }
        self.show(false);
        self.renew.notify_one();
    }

    /// Publishes what the view holds; `whole` where that is all there is.
    fn show(&self, whole: bool) {
        let (leases, rejected) = {
            let state = self.state();
            let own = state.own.as_ref().map(|own| (&own.who.node, own.key.as_str()));
            (state.view.leases(own), state.view.rejected().clone())
        };
        self.roster.send_if_modified(|roster| {
            if roster.completeness == crate::lease::Completeness::Partial && !whole {
                return false;
            }
            roster.set_rejected(rejected) | roster.replace(leases)
        });
    }

    /// One call of etcd, bounded in time, its outcome noted.
    async fn call<T>(
        &self,
        doing: &'static str,
        half: Half,
        call: impl AsyncFnOnce(&mut Client) -> Result<T, etcd_client::Error>,
    ) -> Result<T, StoreError> {
        let outcome = async {
            let mut client = self.connector.client(LIMIT).await?;
            match timeout(LIMIT, call(&mut client)).await {
                Ok(Ok(value)) => Ok(value),
                Ok(Err(error)) => {
                    self.connector.failed(&error);
                    Err(connect::refused(doing, &error))
                }
                Err(_) => {
                    self.connector.forget();
                    Err(StoreError::Etcd {
                        doing,
                        why: format!("no answer within {} s", LIMIT.as_secs()),
                        transient: true,
                    })
                }
            }
        };
        let outcome = outcome.await;
        self.pulse.note(half, outcome.as_ref().err());
        outcome
    }

    /// Waits for a failure at the start that time does not mend: wrong credentials, a wrong certificate.
    async fn hopeless(&self) -> StoreError {
        loop {
            sleep(FIRST).await;
            if let Some(error) = self.connector.hopeless() {
                return error;
            }
        }
    }

    /// Everything below the prefix, and the revision at which it was so.
    async fn snapshot(&self) -> Result<(View, Option<String>, i64), StoreError> {
        let found = self.call("read the leases", Half::Reading, async |client: &mut Client| {
            let mut reader = client.kv_client().max_decoding_message_size(LARGEST);
            let all = GetOptions::new().with_prefix();
            reader.get(format!("{}/", self.prefix), Some(all)).await
        });
        let mut found = found.await?;
        let revision = found.header().map_or(0, etcd_client::ResponseHeader::revision);
        let (mut view, mut config) = (View::default(), None);
        for kv in found.take_kvs() {
            match self.place(&kv) {
                Some(Place::Config) => config = Some(String::from_utf8_lossy(kv.value()).into_owned()),
                Some(Place::Lease(key)) => view.put(&key, kv.value(), kv.mod_revision(), kv.lease()),
                None => {}
            }
        }
        Ok((view, config, revision))
    }

    /// etcd's revision now. It need not read the leases for that.
    async fn revision(&self) -> Result<i64, StoreError> {
        let key = format!("{}/config", self.prefix);
        let found = self.call("ask for the revision", Half::Reading, async |client: &mut Client| {
            client.get(key, Some(GetOptions::new().with_keys_only())).await
        });
        Ok(found.await?.header().map_or(0, etcd_client::ResponseHeader::revision))
    }

    fn place(&self, kv: &KeyValue) -> Option<Place> {
        let key = String::from_utf8_lossy(kv.key());
        let rest = key.strip_prefix(self.prefix.as_str())?.strip_prefix('/')?;
        match rest.strip_prefix("subnets/") {
            Some(lease) => Some(Place::Lease(lease.to_owned())),
            None => (rest == "config").then_some(Place::Config),
        }
    }

    fn key(&self, key: &str) -> String {
        format!("{}/subnets/{key}", self.prefix)
    }

    async fn grant(&self) -> Result<i64, StoreError> {
        let ttl = self.lifetime.ttl;
        let granted = self.call("get a lease", Half::Writing, async |client: &mut Client| {
            client.lease_grant(ttl, None).await
        });
        Ok(granted.await?.id())
    }

    /// Creates `key`; `None` where there is one by now.
    async fn create(&self, key: &str, lease: &Lease) -> Result<Option<(i64, i64)>, StoreError> {
        let alive_by = self.grant().await?;
        let at = self.key(key);
        let put = TxnOp::put(
            at.clone(),
            format::encode_flannel(lease),
            Some(PutOptions::new().with_lease(alive_by)),
        );
        let txn = Txn::new()
            .when([Compare::version(at, CompareOp::Equal, 0)])
            .and_then([put]);
        let done = self.call("create the lease", Half::Writing, async |client: &mut Client| {
            client.txn(txn).await
        });
        let done = done.await?;
        let revision = done.header().map_or(0, etcd_client::ResponseHeader::revision);
        if done.succeeded() {
            return Ok(Some((revision, alive_by)));
        }
        // Nobody lives by it; that it stays is no harm.
        let _ = self
            .call("give a lease back", Half::Writing, async |client: &mut Client| {
                client.lease_revoke(alive_by).await
            })
            .await;
        Ok(None)
    }

    /// Writes `key` if it is still of `revision`. It goes on living by the same etcd lease, or by a new one where that
    /// has run out; a reservation by none.
    async fn replace(&self, key: &str, value: &str, revision: i64, alive_by: i64) -> Result<(i64, i64), StoreError> {
        let mut alive_by = alive_by;
        for _ in 0..2 {
            let at = self.key(key);
            let options = (alive_by != 0).then(|| PutOptions::new().with_lease(alive_by));
            let put = TxnOp::put(at.clone(), value, options);
            let same = Compare::mod_revision(at, CompareOp::Equal, revision);
            let txn = Txn::new().when([same]).and_then([put]);
            let done = self.call("write the lease", Half::Writing, async |client: &mut Client| {
                client.txn(txn).await
            });
            match done.await {
                Ok(done) if done.succeeded() => {
                    let revision = done.header().map_or(0, etcd_client::ResponseHeader::revision);
                    return Ok((revision, alive_by));
                }
                Ok(_) => break,
                Err(StoreError::Etcd { why, .. }) if why.contains("lease not found") => alive_by = self.grant().await?,
                Err(error) => return Err(error),
            }
        }
        Err(StoreError::Etcd {
            doing: "write the lease",
            why: "it changed meanwhile".into(),
            transient: true,
        })
    }

    /// Deletes `key` if it is still of `revision`.
    async fn delete(&self, key: &str, revision: i64) -> Result<(), StoreError> {
        let at = self.key(key);
        let same = Compare::mod_revision(at.clone(), CompareOp::Equal, revision);
        let txn = Txn::new().when([same]).and_then([TxnOp::delete(at, None)]);
        self.call("delete the lease", Half::Writing, async |client: &mut Client| {
            client.txn(txn).await
        })
        .await
        .map(drop)
    }
}

enum Place {
    Config,
    Lease(String),
}
