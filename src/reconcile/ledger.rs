//! What the kernel holds of ours, and whose it is: one tree by key, and each scope's keys. A key has 64 bytes and there are
//! six or more of them a peer, so that no more copies of them are kept than these two.

use std::collections::BTreeMap;

use crate::kernel::{Key, Object, Objects, Scope};

/// An entry stays while either is there.
#[derive(Debug, Default)]
struct Entry {
    /// What the kernel holds, as far as is known.
    object: Option<Object>,
    /// Who wants it, or wanted it last.
    owner: Option<Scope>,
}

/// The kernel's objects as last known, and their owners.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    entries: BTreeMap<Key, Entry>,
    /// In their order. A list: a set has room for eleven keys from its first on, in every scope.
    owned: BTreeMap<Scope, Vec<Key>>,
}

impl Ledger {
    /// What a dump shows; nobody's yet.
    pub(super) fn new(actual: Objects) -> Self {
        let entry = |(key, object)| {
            let (object, owner) = (Some(object), None);
            (key, Entry { object, owner })
        };
        Self {
            entries: actual.into_iter().map(entry).collect(),
            owned: BTreeMap::new(),
        }
    }

    /// What the kernel holds there.
    pub(super) fn get(&self, key: &Key) -> Option<&Object> {
        self.entries.get(key)?.object.as_ref()
    }

    /// Whether the kernel holds anything there.
    pub(super) fn holds(&self, key: &Key) -> bool {
        self.get(key).is_some()
    }

    /// What the kernel holds, by key.
    pub(super) fn objects(&self) -> impl Iterator<Item = (&Key, &Object)> {
        self.entries
            .iter()
            .filter_map(|(key, entry)| Some((key, entry.object.as_ref()?)))
    }

    /// What the kernel holds and nobody wants.
    pub(super) fn orphans(&self) -> impl Iterator<Item = &Key> {
        let orphan = |entry: &Entry| entry.object.is_some() && entry.owner.is_none();
        self.entries
            .iter()
            .filter(move |(_, entry)| orphan(entry))
            .map(|(key, _)| key)
    }

    /// Whose it is.
    pub(super) fn owner(&self, key: &Key) -> Option<&Scope> {
        self.entries.get(key)?.owner.as_ref()
    }

    /// The keys of a scope: what it wants, and what it wanted and the kernel still holds.
    pub(super) fn owned(&self, scope: &Scope) -> &[Key] {
        self.owned.get(scope).map_or(&[], Vec::as_slice)
    }

    /// The scopes that own anything.
    pub(super) fn scopes(&self) -> impl Iterator<Item = &Scope> {
        self.owned.keys()
    }

    /// The kernel holds this now.
    pub(super) fn put(&mut self, key: Key, object: Object) {
        self.entries.entry(key).or_default().object = Some(object);
    }

    /// The kernel holds nothing there any more; gives what it held. The owner stays: it still wants it.
    pub(super) fn take(&mut self, key: &Key) -> Option<Object> {
        let entry = self.entries.get_mut(key)?;
        let object = entry.object.take();
        if entry.owner.is_none() {
            self.entries.remove(key);
        }
        object
    }

    /// `scope` wants these keys and, of what it owned before, keeps what the kernel still holds. What another scope owned
    /// goes over to it.
    pub(super) fn claim(&mut self, scope: &Scope, wanted: &Objects) {
        for key in wanted.keys() {
            let entry = self.entries.entry(key.clone()).or_default();
            if entry.owner.as_ref() == Some(scope) {
                continue;
            }
            if let Some(other) = entry.owner.replace(scope.clone()) {
                self.disown(&other, key);
            }
        }
        let mut before = self.owned.remove(scope).unwrap_or_default();
        before.retain(|key| !wanted.contains_key(key));
        for key in before
            .iter()
            .filter(|key| !self.holds(key))
            .cloned()
            .collect::<Vec<_>>()
        {
            self.release(scope, &key);
        }
        before.retain(|key| self.holds(key));
        let mut keys = Vec::with_capacity(wanted.len() + before.len());
        keys.extend(wanted.keys().cloned());
        if !before.is_empty() {
            keys.append(&mut before);
            keys.sort_unstable();
        }
        if !keys.is_empty() {
            self.owned.insert(scope.clone(), keys);
        }
    }

    /// `scope` broke it: it is gone from the kernel and from what the scope owns.
    pub(super) fn broken(&mut self, scope: &Scope, key: &Key) {
        self.take(key);
        self.release(scope, key);
        self.disown(scope, key);
    }

    /// Ends the ownership, where it is this scope's.
    fn release(&mut self, scope: &Scope, key: &Key) {
        if let Some(entry) = self.entries.get_mut(key)
            && entry.owner.as_ref() == Some(scope)
        {
            entry.owner = None;
            if entry.object.is_none() {
                self.entries.remove(key);
            }
        }
    }

    fn disown(&mut self, scope: &Scope, key: &Key) {
        if let Some(keys) = self.owned.get_mut(scope) {
            keys.retain(|held| held != key);
            if keys.is_empty() {
                self.owned.remove(scope);
            }
        }
    }

    /// A tree that grew key by key is half empty; made of all its keys it is full.
    pub(super) fn compact(&mut self) {
        self.entries = std::mem::take(&mut self.entries).into_iter().collect();
        self.owned = std::mem::take(&mut self.owned).into_iter().collect();
    }
}
