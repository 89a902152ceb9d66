//! What the files of a store folder say, kept as a roster.
//!
//! A [`Mirror`] reads only the files it is told of, or those whose stamp differs. It is slow to believe in a loss: a
//! lease leaves the roster when its file is still gone [`SETTLE`] later; a folder that is being removed looks just like
//! nodes that leave. A file that is no lease any more is named, and what it said last stays.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::sync::Arc;
use std::time::{Duration, Instant};

use smallvec::SmallVec;
use tokio::sync::watch;

use super::StoreError;
use super::folder::{Folder, Found, Identity, Stamp, is_entry};
use crate::lease::{Completeness, Lease, NodeName, Roster};
use crate::packed::{MANY, pack};

/// How long no further loss must come before losses are believed.
pub(super) const SETTLE: Duration = Duration::from_millis(500);
/// How long a row of losses can put that off.
const SETTLE_MOST: Duration = Duration::from_secs(5);
/// The same after the folder was replaced by another: every node writes its lease again by then.
pub(super) const SETTLE_REPLACED: Duration = Duration::from_secs(10);
/// How many files that are no leases are listed by name.
const LISTED: usize = 1000;

/// What this process knows of its own lease.
#[derive(Clone, Debug)]
pub(super) struct Own {
    /// The node's name.
    pub(super) node: NodeName,
    /// The lease's file.
    pub(super) name: OsString,
    /// The revision it was found at or written as last.
    pub(super) revision: u64,
}

#[derive(Debug)]
enum Entry {
    Lease {
        node: NodeName,
        revision: u64,
        stamp: Option<Stamp>,
        trouble: Option<String>,
    },
    Rejected {
        reason: String,
    },
}

/// Files that name one node, each with its revision; one nearly always.
type Claims = SmallVec<[(u64, Arc<OsStr>); 1]>;

/// What the files say.
#[derive(Debug, Default)]
pub(super) struct Mirror {
    files: BTreeMap<Arc<OsStr>, Entry>,
    /// Every file that names a node, in the order of revisions: the last one counts.
    claims: BTreeMap<NodeName, Claims>,
    /// What `status` says of files that don't count.
    notes: BTreeMap<OsString, String>,
    notes_changed: bool,
    changes: BTreeMap<NodeName, Option<Lease>>,
    /// Files whose loss is not believed yet.
    doubted: BTreeSet<OsString>,
    settle: Option<Settle>,
    folder: Option<Identity>,
    /// The own lease, once acquired or published.
    pub(super) own: Option<Own>,
    /// How many files were read so far.
    pub(super) files_read: u64,
    /// How many times the whole folder was gone through so far.
    pub(super) full_reads: u64,
}

#[derive(Clone, Copy, Debug)]
struct Settle {
    at: Instant,
    latest: Instant,
    /// Whether this is about a folder that replaced another.
    replaced: bool,
}

/// Whether what a file no longer says is believed at once.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Loss {
    Doubted,
    Believed,
}

impl Mirror {
    /// Whether `folder` is the one that was read last.
    pub(super) fn shows(&self, folder: &Folder) -> Result<bool, StoreError> {
        Ok(self.folder == Some(folder.identity()?))
    }

    /// When doubted losses are to be looked at again.
    pub(super) fn settles_at(&self) -> Option<Instant> {
        self.settle.map(|settle| settle.at)
    }

    /// The file that counts for `node`.
    pub(super) fn file_of(&self, node: &NodeName) -> Option<&OsStr> {
        self.claims.get(node)?.last().map(|(_, name)| &**name)
    }

    /// Every file that names `node`.
    pub(super) fn files_of(&self, node: &NodeName) -> Vec<OsString> {
        self.claims
            .get(node)
            .into_iter()
            .flatten()
            .map(|(_, name)| name.to_os_string())
            .collect()
    }

    /// Goes through the whole folder, reading what changed.
    pub(super) fn read_all(&mut self, folder: &Folder, now: Instant) -> Result<(), StoreError> {
        self.full_reads += 1;
        let identity = folder.identity()?;
        let names: BTreeSet<OsString> = folder.names()?.into_iter().filter(|name| is_entry(name)).collect();
        let replaced = self.folder.filter(|before| *before != identity);
        if let Some(Identity { device, .. }) = replaced {
            // An empty mount point is what an unmounted store leaves behind.
            if device != identity.device && names.is_empty() && !folder.has_sequence() && !self.claims.is_empty() {
                return Err(StoreError::Unmounted(folder.path().into()));
            }
            self.settle = Some(Settle {
                at: now + SETTLE_REPLACED,
                latest: now + SETTLE_REPLACED,
                replaced: true,
            });
        }
        self.folder = Some(identity);
        for name in &names {
            let unchanged = match self.files.get(name.as_os_str()) {
                Some(Entry::Lease {
                    stamp: Some(stamp),
                    trouble: None,
                    ..
                }) => folder.stamp(name) == Some(*stamp),
                _ => false,
            };
            if !unchanged {
                self.read(folder, name, Loss::Doubted, now);
            }
        }
        // A listing may miss a file that is renamed meanwhile, so those are looked at one by one.
        let unlisted: Vec<OsString> = self
            .files
            .keys()
            .filter(|name| !names.contains(&***name))
            .map(|name| name.to_os_string())
            .collect();
        for name in unlisted {
            // The own lease is written again by its owner, which has to see that it is gone.
            let own = self.own.as_ref().is_some_and(|own| own.name == name);
            let loss = if own && replaced.is_some() {
                Loss::Believed
            } else {
                Loss::Doubted
            };
            self.read(folder, &name, loss, now);
        }
        Ok(())
    }

    /// Reads one file.
    pub(super) fn read_one(&mut self, folder: &Folder, name: &OsStr, now: Instant) {
        if is_entry(name) {
            self.read(folder, name, Loss::Doubted, now);
        }
    }

    /// Reads one file that this process has written or removed itself.
    pub(super) fn read_own(&mut self, folder: &Folder, name: &OsStr, now: Instant) {
        self.read(folder, name, Loss::Believed, now);
    }

    /// Looks at the doubted losses again, if it is time, and believes in those that remain.
    pub(super) fn settle(&mut self, folder: &Folder, now: Instant) {
        if self.settle.is_some_and(|settle| settle.at <= now) {
            self.settle = None;
            for name in std::mem::take(&mut self.doubted) {
                self.read(folder, &name, Loss::Believed, now);
            }
        }
    }

    /// Brings the roster up to date, waking its readers if anything differs.
    pub(super) fn publish(&mut self, roster: &watch::Sender<Roster>) {
        let changes = std::mem::take(&mut self.changes);
        let many = changes.len() >= MANY;
        if many {
            pack(&mut self.files);
            pack(&mut self.claims);
        }
        let rejected = std::mem::take(&mut self.notes_changed).then(|| self.listed_notes());
        // Until the nodes had the time to write their leases again, an absent one may exist.
        let replaced = self.settle.is_some_and(|settle| settle.replaced);
        let completeness = if replaced {
            Completeness::Partial
        } else {
            Completeness::Complete
        };
        roster.send_if_modified(|roster| {
            let mut changed = roster.completeness != completeness;
            roster.completeness = completeness;
            for (node, lease) in changes {
                changed |= match lease {
                    Some(lease) => roster.insert(lease),
                    None => roster.remove(&node),
                };
            }
            if many {
                roster.pack();
            }
            changed | rejected.is_some_and(|rejected| roster.set_rejected(rejected))
        });
    }

    /// Reads `name`, and whatever file counts for a node because of it.
    fn read(&mut self, folder: &Folder, name: &OsStr, loss: Loss, now: Instant) {
        let mut next = Some(name.to_os_string());
        while let Some(name) = next {
            self.files_read += 1;
            next = self.learn(name.clone(), folder.read(&name), loss, now);
        }
    }

    /// Takes in what stands under `name`. Returns the file to read next, where another one counts for the node now.
    fn learn(&mut self, name: OsString, found: Found, loss: Loss, now: Instant) -> Option<OsString> {
        let before = match self.files.get(&*name) {
            Some(Entry::Lease { node, revision, .. }) => Some((node.clone(), *revision)),
            Some(Entry::Rejected { .. }) | None => None,
        };
        let unreadable = matches!(found, Found::Unreadable { .. });
        let (entry, lease) = match (found, &before) {
            (Found::Lease { lease, revision, stamp }, _) => (
                Some(Entry::Lease {
                    node: lease.node.clone(),
                    revision,
                    stamp,
                    trouble: None,
                }),
                Some(lease),
            ),
            (Found::Garbage { .. } | Found::Absent, Some(_)) if loss == Loss::Doubted => {
                self.doubt(name, now);
                return None;
            }
            // It may be the lease still, or was overwritten by someone who can only write to the store, which is no way
            // to make a node leave: what was read last stays. The own lease is written again by its owner, which has
            // to see that it is lost.
            (Found::Unreadable { reason } | Found::Garbage { reason }, Some((node, revision)))
                if unreadable || self.own.as_ref().is_none_or(|own| own.name != name) =>
            {
                let (node, trouble) = (node.clone(), Some(reason));
                self.files.insert(
                    name.as_os_str().into(),
                    Entry::Lease {
                        node,
                        revision: *revision,
                        stamp: None,
                        trouble,
                    },
                );
                self.note(name);
                return None;
            }
            (Found::Garbage { reason } | Found::Unreadable { reason }, _) => (Some(Entry::Rejected { reason }), None),
            (Found::Absent, _) => (None, None),
        };
        self.doubted.remove(&name);
        let after = lease.as_ref().map(|lease| lease.node.clone());
        let counted = before
            .as_ref()
            .is_some_and(|(node, _)| self.file_of(node) == Some(&name));
        if let Some((node, revision)) = &before {
            let claims = self.claims.get_mut(node).expect("a lease's node has a claim");
            claims.retain(|(at, file)| (*at, &**file) != (*revision, &*name));
            if claims.is_empty() {
                self.claims.remove(node);
            }
        }
        match entry {
            Some(entry) => {
                let known = self.files.get_key_value(&*name).map(|(known, _)| known.clone());
                let kept = known.unwrap_or_else(|| name.as_os_str().into());
                if let Entry::Lease { node, revision, .. } = &entry {
                    let claims = self.claims.entry(node.clone()).or_default();
                    claims.push((*revision, kept.clone()));
                    claims.sort();
                }
                self.files.insert(kept, entry);
            }
            None => {
                self.files.remove(&*name);
            }
        }
        let mut next = None;
        if let Some(lease) = lease
            && self.file_of(&lease.node) == Some(&name)
        {
            self.changes.insert(lease.node.clone(), Some(lease));
        }
        // Where the file counted for a node and counts no more, an older one does, if any.
        if let Some((node, _)) = before.as_ref().filter(|_| counted)
            && self.file_of(node) != Some(&name)
        {
            next = self.file_of(node).map(OsStr::to_os_string);
            if next.is_none() {
                self.changes.insert(node.clone(), None);
            }
        }
        let nodes: BTreeSet<NodeName> = before.into_iter().map(|(node, _)| node).chain(after).collect();
        let mut touched: BTreeSet<OsString> = nodes.iter().flat_map(|node| self.files_of(node)).collect();
        touched.insert(name);
        for name in touched {
            self.note(name);
        }
        next
    }

    fn doubt(&mut self, name: OsString, now: Instant) {
        if self.doubted.insert(name) {
            let first = Settle {
                at: now,
                latest: now + SETTLE_MOST,
                replaced: false,
            };
            let settle = self.settle.get_or_insert(first);
            settle.at = (now + SETTLE).max(settle.at).min(settle.latest);
        }
    }

    /// Writes anew what there is to say of a file.
    fn note(&mut self, name: OsString) {
        let note = match self.files.get(&*name) {
            Some(Entry::Rejected { reason }) => Some(reason.clone()),
            Some(Entry::Lease {
                trouble: Some(trouble), ..
            }) => Some(trouble.clone()),
            Some(Entry::Lease { node, revision, .. }) => self.claims[node].last().and_then(|(newest, counts)| {
                let reason = || format!("revision {revision} of node {node}: {} has {newest}", counts.display());
                (**counts != *name).then(reason)
            }),
            None => None,
        };
        if self.notes.get(&name) != note.as_ref() {
            self.notes_changed = true;
            match note {
                Some(note) => self.notes.insert(name, note),
                None => self.notes.remove(&name),
            };
        }
    }

    fn listed_notes(&self) -> BTreeMap<String, String> {
        let mut listed: BTreeMap<String, String> = self
            .notes
            .iter()
            .take(LISTED)
            .map(|(name, note)| (printable(name), note.clone()))
            .collect();
        if let Some(more) = self.notes.len().checked_sub(LISTED).filter(|more| *more > 0) {
            listed.insert("…".into(), format!("and {more} more"));
        }
        listed
    }
}

/// A file name that does no harm to a terminal.
fn printable(name: &OsStr) -> String {
    let name = name.to_string_lossy();
    if name.chars().any(char::is_control) {
        name.escape_debug().to_string()
    } else {
        name.into_owned()
    }
}
