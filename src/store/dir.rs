//! The embedded store: a folder of one JSON file a lease (`--lease-dir`), for one machine, for labs, and for static
//! meshes whose folder another tool distributes.
//!
//! A file is named by its subnets (`10.244.1.0-24.json`) and holds flannel's value with `Node` and `Revision`. A subnet
//! is taken by creating its file, which fails where there is one; every other write replaces the node's own file under
//! the folder's lock. Nothing but a node's own file is ever written, and a folder that can't be written serves its
//! readers.
//!
//! inotify names the files that changed, and only those are read. Where it can't tell (lost events, a replaced folder, a
//! remote file system) the whole folder is gone through, at the latest every [`REREAD`]; files with the same stamp are
//! not read again then.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::watch;
use tokio::task::{AbortHandle, spawn_blocking};
use tracing::{info, warn};

use super::allocate::{Taken, choose};
use super::folder::{CONFIG, Folder, Found, Locked, file_name, parse_file_name};
use super::health::{Half, Said};
use super::mirror::{Mirror, Own};
use super::notice::{FolderWatch, Scope};
use super::{Claim, Health, Held, StoreError, Trouble, format};
use crate::lease::{BackendData, Lease, Network, NodeName, Roster, Subnets};
use crate::repeats::{self, Repeats, log_came};

/// How long the folder is trusted to report its changes.
pub const REREAD: Duration = Duration::from_secs(30);
/// How often a folder that can't be read, or not be watched, is looked at.
const RETRY: Duration = Duration::from_secs(1);
/// A file system that takes longer over one operation of ours is said not to answer.
const SLOW: Duration = Duration::from_secs(3);

/// A folder of leases, watched. Cheap to clone; the last clone to go stops the watching.
#[derive(Clone, Debug)]
pub struct Dir {
    shared: Arc<Shared>,
    _watcher: Arc<Watcher>,
}

/// What the callers and the watcher share.
#[derive(Debug)]
struct Shared {
    path: PathBuf,
    mirror: Mutex<Mirror>,
    roster: watch::Sender<Roster>,
    config: watch::Sender<Option<String>>,
    health: Mutex<Health>,
    said: Mutex<Said>,
    /// Of calls that a file system does not answer.
    slow: Mutex<Repeats>,
    /// What is being done, and since when.
    pending: Mutex<BTreeMap<u64, (Half, Instant)>>,
}

#[derive(Debug)]
struct Watcher(AbortHandle);

impl Drop for Watcher {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What the watcher has to know of a reading.
#[derive(Clone, Copy, Debug)]
struct Reading {
    /// When doubted losses are to be looked at again.
    settles: Option<Instant>,
    /// The path leads to another folder than at the reading before.
    replaced: bool,
}

impl Dir {
    /// Opens the store in the folder at `path` and reads it whole; to be called in a tokio runtime.
    ///
    /// A folder that is missing or can't be read is an error here, for a clear end of the start. Later it is an outage.
    pub async fn open(path: &Path) -> Result<Self, StoreError> {
        let shared = Arc::new(Shared {
            path: path.into(),
            mirror: Mutex::default(),
            roster: watch::Sender::new(Roster::default()),
            config: watch::Sender::new(None),
            health: Mutex::default(),
            said: Mutex::default(),
            slow: Mutex::default(),
            pending: Mutex::default(),
        });
        // Before the first reading, so that no change falls between.
        let mut watch = FolderWatch::new();
        watch.attach(path);
        let settles = shared
            .blocking(Half::Reading, |shared| shared.read(&Scope::All))
            .await?
            .settles;
        let following = tokio::spawn(follow(shared.clone(), watch, settles));
        let _watcher = Arc::new(Watcher(following.abort_handle()));
        Ok(Self { shared, _watcher })
    }

    pub(super) fn roster(&self) -> watch::Receiver<Roster> {
        self.shared.roster.subscribe()
    }

    pub(super) fn config_changes(&self) -> watch::Receiver<Option<String>> {
        self.shared.config.subscribe()
    }

    pub(super) fn health(&self) -> Health {
        let mut health = self.shared.health().clone();
        for (half, since) in self.shared.pending().values() {
            if since.elapsed() > SLOW {
                let trouble = match half {
                    Half::Reading => &mut health.reading,
                    Half::Writing => &mut health.writing,
                };
                trouble.get_or_insert_with(|| Trouble {
                    error: format!("the file system of {} does not answer", self.shared.path.display()),
                    since: *since,
                });
            }
        }
        health
    }

    pub(super) async fn config(&self) -> Result<Option<String>, StoreError> {
        let read = |shared: &Shared| Folder::open(&shared.path)?.config();
        self.shared.blocking(Half::Reading, read).await
    }

    pub(super) async fn acquire(&self, node: &NodeName, network: &Network, claim: &Claim) -> Result<Held, StoreError> {
        let (node, network, claim) = (node.clone(), *network, *claim);
        self.write(move |shared| shared.acquire(&node, &network, &claim)).await
    }

    pub(super) async fn publish(&self, lease: &Lease) -> Result<(), StoreError> {
        let lease = lease.clone();
        self.write(move |shared| shared.publish(&lease)).await
    }

    pub(super) async fn release(&self, node: &NodeName, subnets: &Subnets) -> Result<(), StoreError> {
        let (node, subnets) = (node.clone(), *subnets);
        self.write(move |shared| shared.release(&node, &subnets)).await
    }

    /// How many files were read, and how many times the whole folder was gone through.
    #[cfg(test)]
    pub(super) fn counters(&self) -> (u64, u64) {
        let mirror = self.shared.mirror();
        (mirror.files_read, mirror.full_reads)
    }

    async fn write<T: Send + 'static>(
        &self,
        action: impl FnOnce(&Shared) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let noted = |shared: &Shared| {
            let outcome = action(shared);
            shared.note(Half::Writing, outcome.as_ref().err());
            outcome
        };
        self.shared.blocking(Half::Writing, noted).await
    }
}

impl Shared {
    /// Runs `action` where it may wait for a disk, for ever if need be: whoever awaits it waits, nobody else does.
    async fn blocking<T: Send + 'static>(
        self: &Arc<Self>,
        half: Half,
        action: impl FnOnce(&Self) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let (shared, number) = (self.clone(), NUMBER.fetch_add(1, Ordering::Relaxed));
        self.pending().insert(number, (half, Instant::now()));
        let mut task = spawn_blocking(move || {
            let outcome = action(&shared);
            shared.pending().remove(&number);
            outcome
        });
        let ended = match tokio::time::timeout(SLOW, &mut task).await {
            Ok(ended) => ended,
            Err(_) => {
                let store = self.path.display();
                let slow = || self.slow.lock().expect("no holder panics");
                if let Some(told) = slow().failed("", repeats::now()) {
                    warn!(%store, times = told.times, seconds = told.seconds,
                          "the lease store's file system does not answer; going on with what is known");
                }
                let ended = task.await;
                if let Some(told) = slow().worked(repeats::now()) {
                    info!(%store, times = told.times, seconds = told.seconds,
                          "the lease store's file system answers again");
                }
                ended
            }
        };
        match ended {
            Ok(outcome) => outcome,
            Err(failed) => match failed.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(_) => Err(StoreError::Stopped),
            },
        }
    }

    fn pending(&self) -> MutexGuard<'_, BTreeMap<u64, (Half, Instant)>> {
        self.pending.lock().expect("no holder of the list panics")
    }

    /// To be called where waiting is allowed: its holder may be waiting for a disk.
    fn mirror(&self) -> MutexGuard<'_, Mirror> {
        self.mirror.lock().expect("no reader of the folder panics")
    }

    fn health(&self) -> MutexGuard<'_, Health> {
        self.health.lock().expect("no writer of the health panics")
    }

    /// Brings the roster up to date with the folder. Returns when losses that are doubted are to be looked at again.
    fn read(&self, scope: &Scope) -> Result<Reading, StoreError> {
        let outcome = self.try_read(scope);
        self.note(Half::Reading, outcome.as_ref().err());
        outcome
    }

    fn try_read(&self, scope: &Scope) -> Result<Reading, StoreError> {
        let now = Instant::now();
        let folder = Folder::open(&self.path)?;
        let mut mirror = self.mirror();
        let replaced = !mirror.shows(&folder)?;
        let config = match scope {
            Scope::Files(names) if !replaced => {
                names.iter().for_each(|name| mirror.read_one(&folder, name, now));
                names.contains(OsStr::new(CONFIG))
            }
            Scope::Files(_) | Scope::All => {
                mirror.read_all(&folder, now)?;
                true
            }
        };
        mirror.settle(&folder, now);
        mirror.publish(&self.roster);
        let settles = mirror.settles_at();
        drop(mirror);
        if config {
            let config = folder.config()?;
            self.config.send_if_modified(|held| {
                let differs = *held != config;
                *held = config;
                differs
            });
        }
        Ok(Reading { settles, replaced })
    }

    /// Keeps the health, and says once what changed in it.
    fn note(&self, half: Half, error: Option<&StoreError>) {
        let mut health = self.health();
        let Health {
            reading,
            writing,
            failures,
        } = &mut *health;
        let (trouble, failures, what) = match half {
            Half::Reading => (reading, &mut failures.reading, "read"),
            Half::Writing => (writing, &mut failures.writing, "write"),
        };
        *failures += u64::from(error.is_some());
        let (text, store) = (error.map(StoreError::chain), self.path.display());
        let mut said = self.said.lock().expect("no holder panics");
        log_came!(
            said.of(half).came(text.as_deref(), repeats::now()),
            warn,
            [%store,],
            "can't {what} the lease store; going on with what is known",
            "can {what} the lease store again"
        );
        let before = trouble.take();
        *trouble = text.map(|error| Trouble {
            error,
            since: before.map_or_else(Instant::now, |before| before.since),
        });
    }

    fn acquire(&self, node: &NodeName, network: &Network, claim: &Claim) -> Result<Held, StoreError> {
        // A lease that fits needs no write and no lock, so a folder that can't be written serves too.
        if let Some((lease, revision)) = self.own_lease(&self.open()?, node)?
            && let Some(held) = fitting(network, &lease)
        {
            self.mirror().own = Some(own(&lease, revision));
            return Ok(held);
        }
        let locked = self.lock()?;
        let before = self.own_lease(locked.folder(), node)?;
        if let Some((lease, revision)) = &before
            && let Some(held) = fitting(network, lease)
        {
            self.mirror().own = Some(own(lease, *revision));
            return Ok(held);
        }
        let names = locked.folder().names()?;
        locked.tidy(&names, SystemTime::now());
        // Its own misfit leaves its place to the new lease.
        let misfits = self.mirror().files_of(node);
        let others = names.iter().filter(|name| !misfits.contains(name));
        let mut taken: Taken = others.filter_map(|name| parse_file_name(name).ok()).collect();
        let (held, own) = loop {
            let subnets = choose(network, &taken, claim).ok_or_else(|| self.exhausted(network))?;
            let lease = Lease {
                node: node.clone(),
                subnets,
                public: claim.public,
                backend: String::new(),
                data: BackendData::NULL,
                v6_data: BackendData::NULL,
            };
            if let Some(revision) = locked.create(&lease, 0)? {
                let slot = network.slot(&subnets)?;
                break (
                    Held {
                        subnets,
                        slot,
                        previous: before.map(|(lease, _)| lease),
                    },
                    own(&lease, revision),
                );
            }
            // Someone who does not lock was quicker.
            taken.insert(subnets);
        };
        self.mirror().own = Some(own);
        self.remove_others(&locked, node, &held.subnets)?;
        Ok(held)
    }

    /// Opens the folder, if it is the store's: an empty mount point is not written to.
    fn open(&self) -> Result<Folder, StoreError> {
        let folder = Folder::open(&self.path)?;
        self.recognise(&folder)?;
        Ok(folder)
    }

    fn lock(&self) -> Result<Locked, StoreError> {
        let locked = Folder::lock(&self.path)?;
        self.recognise(locked.folder())?;
        Ok(locked)
    }

    fn recognise(&self, folder: &Folder) -> Result<(), StoreError> {
        let mut mirror = self.mirror();
        if !mirror.shows(folder)? {
            mirror.read_all(folder, Instant::now())?;
            mirror.publish(&self.roster);
        }
        Ok(())
    }

    /// The newest lease of `node` in the folder, and its revision.
    fn own_lease(&self, folder: &Folder, node: &NodeName) -> Result<Option<(Lease, u64)>, StoreError> {
        let mut mirror = self.mirror();
        mirror.read_all(folder, Instant::now())?;
        mirror.publish(&self.roster);
        let Some(name) = mirror.file_of(node) else {
            return Ok(None);
        };
        match folder.read(name) {
            Found::Lease { lease, revision, .. } if lease.node == *node => Ok(Some((lease, revision))),
            Found::Unreadable { reason } => {
                let reason = std::io::Error::other(reason);
                Err(StoreError::from_io("read own lease", &self.path.join(name), reason))
            }
            Found::Lease { .. } | Found::Garbage { .. } | Found::Absent => Ok(None),
        }
    }

    /// Removes the leases of `node` that are not of `subnets`, and shows the folder as it is then.
    fn remove_others(&self, locked: &Locked, node: &NodeName, subnets: &Subnets) -> Result<(), StoreError> {
        let (mut mirror, now, held) = (self.mirror(), Instant::now(), file_name(subnets));
        mirror.read_own(locked.folder(), OsStr::new(&held), now);
        for name in mirror.files_of(node).iter().filter(|name| **name != held.as_str()) {
            locked.remove(name)?;
            mirror.read_own(locked.folder(), name, now);
        }
        mirror.publish(&self.roster);
        Ok(())
    }

    fn exhausted(&self, network: &Network) -> StoreError {
        let remedy = format!("remove the files of nodes that are gone from {}", self.path.display());
        StoreError::Exhausted {
            total: network.slots().count(),
            network: *network,
            remedy,
        }
    }

    fn publish(&self, lease: &Lease) -> Result<(), StoreError> {
        if lease.subnets == Subnets::default() {
            return Err(StoreError::NoSubnet(lease.node.clone()));
        }
        let name = OsString::from(file_name(&lease.subnets));
        let written = self
            .mirror()
            .own
            .clone()
            .filter(|own| own.name == name && own.node == lease.node);
        let written = written.map(|own| own.revision);
        // What is there already needs no lock and no right to write.
        if let Place::Same(revision) = self.replaceable(&self.open()?, lease, &name, written)? {
            self.mirror().own = Some(own(lease, revision));
            return Ok(());
        }
        let locked = self.lock()?;
        let revision = match self.replaceable(locked.folder(), lease, &name, written)? {
            Place::Same(_) => return Ok(()),
            Place::Free => match locked.create(lease, written.unwrap_or(0))? {
                Some(revision) => revision,
                None => return Err(self.taken(locked.folder(), lease, &name)),
            },
            Place::Ours(stored) => locked.replace(lease, stored.max(written.unwrap_or(0)))?,
        };
        let mut mirror = self.mirror();
        mirror.own = Some(own(lease, revision));
        mirror.read_own(locked.folder(), &name, Instant::now());
        mirror.publish(&self.roster);
        Ok(())
    }

    /// Whether `lease` may be written, given what this process `written` there last.
    fn replaceable(
        &self,
        folder: &Folder,
        lease: &Lease,
        name: &OsStr,
        written: Option<u64>,
    ) -> Result<Place, StoreError> {
        match folder.read(name) {
            Found::Lease { lease: stored, .. } if stored.node != lease.node => Err(StoreError::Stolen {
                subnets: lease.subnets,
                holder: stored.node,
            }),
            Found::Lease { revision, .. } if written.is_some_and(|written| revision > written) => {
                let written = written.unwrap_or(0);
                Err(StoreError::Superseded {
                    node: lease.node.clone(),
                    stored: revision,
                    written,
                })
            }
            Found::Lease {
                lease: stored,
                revision,
                ..
            } if stored == *lease && written.is_none_or(|w| w == revision) => Ok(Place::Same(revision)),
            Found::Lease { revision, .. } => Ok(Place::Ours(revision)),
            // Damaged: it was ours, and is mended.
            Found::Garbage { .. } if written.is_some() => Ok(Place::Ours(0)),
            Found::Garbage { reason } => Err(self.occupied(lease, name, reason)),
            Found::Unreadable { reason } => {
                let reason = std::io::Error::other(reason);
                Err(StoreError::from_io("read own lease", &self.path.join(name), reason))
            }
            Found::Absent => match self.overlapping(folder, lease)? {
                Some(holder) => Err(StoreError::Stolen {
                    subnets: lease.subnets,
                    holder,
                }),
                None => Ok(Place::Free),
            },
        }
    }

    /// Another node whose lease, under another file name, shares an address with `lease`.
    fn overlapping(&self, folder: &Folder, lease: &Lease) -> Result<Option<NodeName>, StoreError> {
        let names = folder.names()?;
        let mut overlapping = names
            .iter()
            .filter(|name| parse_file_name(name).is_ok_and(|other| format::overlap(&other, &lease.subnets)))
            .filter_map(|name| match folder.read(name) {
                Found::Lease { lease: other, .. } => Some(other.node),
                Found::Garbage { .. } | Found::Unreadable { .. } | Found::Absent => None,
            });
        Ok(overlapping.find(|holder| *holder != lease.node))
    }

    /// Who was quicker to take the name.
    fn taken(&self, folder: &Folder, lease: &Lease, name: &OsStr) -> StoreError {
        match folder.read(name) {
            Found::Lease { lease: other, .. } => StoreError::Stolen {
                subnets: lease.subnets,
                holder: other.node,
            },
            Found::Garbage { reason } | Found::Unreadable { reason } => self.occupied(lease, name, reason),
            Found::Absent => self.occupied(lease, name, "gone again by now".into()),
        }
    }

    fn occupied(&self, lease: &Lease, name: &OsStr, reason: String) -> StoreError {
        StoreError::Occupied {
            subnets: lease.subnets,
            entry: self.path.join(name).display().to_string(),
            reason,
        }
    }

    fn release(&self, node: &NodeName, subnets: &Subnets) -> Result<(), StoreError> {
        let name = OsString::from(file_name(subnets));
        let ours = |folder: &Folder| match folder.read(&name) {
            Found::Lease { lease, .. } => lease.node == *node,
            Found::Garbage { .. } | Found::Unreadable { .. } | Found::Absent => false,
        };
        if !ours(&self.open()?) {
            return Ok(());
        }
        let locked = self.lock()?;
        if ours(locked.folder()) {
            locked.remove(&name)?;
        }
        let mut mirror = self.mirror();
        mirror.own = None;
        mirror.read_own(locked.folder(), &name, Instant::now());
        mirror.publish(&self.roster);
        Ok(())
    }
}

/// What stands where a lease is to be written.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Place {
    /// Nothing.
    Free,
    /// The same lease, of this revision.
    Same(u64),
    /// An older lease of the same node, of this revision.
    Ours(u64),
}

fn own(lease: &Lease, revision: u64) -> Own {
    Own {
        node: lease.node.clone(),
        name: file_name(&lease.subnets).into(),
        revision,
    }
}

/// What a node holds by `lease`, if its subnets are such as `network` gives out.
fn fitting(network: &Network, lease: &Lease) -> Option<Held> {
    let slot = network.slot(&lease.subnets).ok()?;
    let given = network.slots().contains(&slot.get());
    given.then(|| Held {
        subnets: lease.subnets,
        slot,
        previous: Some(lease.clone()),
    })
}

/// Keeps the roster up to date until it is aborted.
async fn follow(shared: Arc<Shared>, mut watch: FolderWatch, mut settles: Option<Instant>) {
    let mut reread = Instant::now() + REREAD;
    loop {
        let failing = shared.health().reading.is_some();
        let retry = (failing || !watch.is_attached()).then(|| Instant::now() + RETRY);
        let wake = [Some(reread), retry, settles.filter(|_| !failing)]
            .into_iter()
            .flatten()
            .min()
            .unwrap_or(reread);
        let mut scope = tokio::select! {
            scope = watch.changes() => scope,
            () = tokio::time::sleep_until(wake.into()) => Scope::Files(BTreeSet::new()),
        };
        if failing || !watch.is_attached() || Instant::now() >= reread {
            scope = Scope::All;
        }
        let whole = matches!(scope, Scope::All);
        if whole {
            // Before the reading, so that no change falls between.
            watch.attach(&shared.path);
            reread = Instant::now() + REREAD;
        }
        match shared.blocking(Half::Reading, move |shared| shared.read(&scope)).await {
            Ok(reading) => {
                settles = reading.settles;
                if reading.replaced && !whole {
                    // The watch is still on the folder before.
                    reread = Instant::now();
                }
            }
            Err(StoreError::Stopped) => return,
            Err(_) => {}
        }
    }
}
