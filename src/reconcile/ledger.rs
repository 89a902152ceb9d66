//! What the kernel holds of ours, and whose it is. A key has 64 bytes and a peer has six of them or more: each is kept once,
//! in a list without gaps; a scope and what it owns name each other by their places.

use indexmap::IndexMap;

use crate::kernel::{Key, Object, Objects, Scope};

/// What is known of a key. An entry stays while either is there.
#[derive(Debug, Default)]
struct Entry {
    /// What the kernel holds, as far as is known.
    object: Option<Object>,
    /// The place in `owned` of who wants it, or wanted it last and has not broken it yet.
    owner: Option<u32>,
}

/// Objects and their owners, by key, in no order.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    entries: IndexMap<Key, Entry>,
    /// Scopes that own something, each with the places in `entries` of all that it owns, in no order.
    owned: IndexMap<Scope, Vec<u32>>,
}

/// An index as it is kept.
fn place(index: usize) -> u32 {
    u32::try_from(index).expect("fewer than 2^32 objects")
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
            owned: IndexMap::new(),
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

    /// What the kernel holds.
    pub(super) fn objects(&self) -> impl Iterator<Item = (&Key, &Object)> {
        self.entries
            .iter()
            .filter_map(|(key, entry)| Some((key, entry.object.as_ref()?)))
    }

    /// What the kernel holds and nobody wants.
    pub(super) fn orphans(&self) -> impl Iterator<Item = &Key> {
        let entries = self.entries.iter();
        entries
            .filter(|(_, entry)| entry.object.is_some() && entry.owner.is_none())
            .map(|(key, _)| key)
    }

    /// Whose it is.
    pub(super) fn owner(&self, key: &Key) -> Option<&Scope> {
        let owner = self.entries.get(key)?.owner?;
        Some(self.owned.get_index(owner as usize)?.0)
    }

    /// The keys of a scope: what it wants, and what it wanted and the kernel still holds.
    pub(super) fn owned(&self, scope: &Scope) -> impl Iterator<Item = &Key> {
        let places = self.owned.get(scope).into_iter().flatten();
        places.filter_map(|place| Some(self.entries.get_index(*place as usize)?.0))
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
        let (at, _, entry) = self.entries.get_full_mut(key)?;
        let object = entry.object.take();
        self.drop_empty(at);
        object
    }

    /// `scope` wants these keys and, of what it owned before, keeps what the kernel still holds. What another scope owned
    /// goes over to it.
    pub(super) fn claim(&mut self, scope: &Scope, wanted: &Objects) {
        let gone = |key: &&Key| !wanted.contains_key(*key) && !self.holds(key);
        for key in self.owned(scope).filter(gone).cloned().collect::<Vec<_>>() {
            self.disown(&key);
        }
        for key in wanted.keys() {
            if self.owner(key) == Some(scope) {
                continue;
            }
            self.disown(key);
            let owner = self.owned.entry(scope.clone());
            let at = place(owner.index());
            let places = owner.or_insert_with(|| Vec::with_capacity(wanted.len()));
            let entry = self.entries.entry(key.clone());
            places.push(place(entry.index()));
            entry.or_default().owner = Some(at);
        }
    }

    /// `scope` broke it: it is gone from the kernel and from what the scope owns.
    pub(super) fn broken(&mut self, scope: &Scope, key: &Key) {
        self.take(key);
        if self.owner(key) == Some(scope) {
            self.disown(key);
        }
    }

    /// Nobody owns it any more.
    fn disown(&mut self, key: &Key) {
        let Some((at, _, entry)) = self.entries.get_full_mut(key) else {
            return;
        };
        if let Some(owner) = entry.owner.take()
            && let Some((_, places)) = self.owned.get_index_mut(owner as usize)
        {
            places.retain(|held| *held != place(at));
            if places.is_empty() {
                self.drop_scope(owner);
            }
        }
        self.drop_empty(at);
    }

    /// Lets go of a scope that owns nothing; the last one takes its place.
    fn drop_scope(&mut self, at: u32) {
        self.owned.swap_remove_index(at as usize);
        let moved = self.owned.get_index(at as usize);
        for held in moved.into_iter().flat_map(|(_, places)| places) {
            if let Some((_, entry)) = self.entries.get_index_mut(*held as usize) {
                entry.owner = Some(at);
            }
        }
    }

    /// Lets go of an entry that says nothing any more; the last one takes its place.
    fn drop_empty(&mut self, at: usize) {
        let empty = |(_, entry): (&Key, &Entry)| entry.object.is_none() && entry.owner.is_none();
        if !self.entries.get_index(at).is_some_and(empty) {
            return;
        }
        self.entries.swap_remove_index(at);
        let last = place(self.entries.len());
        let owner = self.entries.get_index(at).and_then(|(_, moved)| moved.owner);
        let places = owner.and_then(|owner| self.owned.get_index_mut(owner as usize));
        if let Some(held) = places.and_then(|(_, places)| places.iter_mut().find(|held| **held == last)) {
            *held = place(at);
        }
    }

    /// Gives up the room that was kept for more.
    pub(super) fn compact(&mut self) {
        self.entries.shrink_to_fit();
        self.owned.shrink_to_fit();
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use ipnet::IpNet;
    use proptest::prelude::*;

    use super::*;
    use crate::lease::NodeName;

    fn key(number: u8) -> Key {
        let net: IpNet = format!("10.0.{number}.0/24").parse().expect("a net");
        Key::GuardRoute(net)
    }

    fn scope(number: u8) -> Scope {
        match number {
            0 => Scope::Node,
            _ => Scope::Peer(NodeName::new(&format!("node{number}")).expect("a name")),
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Put(u8),
        Take(u8),
        Claim(u8, Vec<u8>),
        Broken(u8, u8),
    }

    fn step() -> impl Strategy<Value = Step> {
        let (keys, scopes) = (0..8_u8, 0..4_u8);
        prop_oneof![
            keys.clone().prop_map(Step::Put),
            keys.clone().prop_map(Step::Take),
            (scopes.clone(), prop::collection::vec(keys.clone(), 0..5)).prop_map(|(s, k)| Step::Claim(s, k)),
            (scopes, keys).prop_map(|(s, k)| Step::Broken(s, k)),
        ]
    }

    proptest! {
        /// Two plain maps say the same.
        #[test]
        fn it_says_what_a_map_of_objects_and_a_map_of_owners_say(steps in prop::collection::vec(step(), 0..60)) {
            let mut ledger = Ledger::default();
            let (mut held, mut owner) = (BTreeMap::new(), BTreeMap::<Key, Scope>::new());
            for step in steps {
                match step {
                    Step::Put(k) => {
                        ledger.put(key(k), Object::Unreachable);
                        held.insert(key(k), Object::Unreachable);
                    }
                    Step::Take(k) => prop_assert_eq!(ledger.take(&key(k)), held.remove(&key(k))),
                    Step::Claim(s, keys) => {
                        let wanted: Objects = keys.into_iter().map(|k| (key(k), Object::Unreachable)).collect();
                        ledger.claim(&scope(s), &wanted);
                        owner.retain(|key, whose| *whose != scope(s) || held.contains_key(key));
                        owner.extend(wanted.into_keys().map(|key| (key, scope(s))));
                    }
                    Step::Broken(s, k) => {
                        ledger.broken(&scope(s), &key(k));
                        held.remove(&key(k));
                        if owner.get(&key(k)) == Some(&scope(s)) {
                            owner.remove(&key(k));
                        }
                    }
                }
                let objects: BTreeMap<_, _> = ledger.objects().map(|(k, o)| (k.clone(), o.clone())).collect();
                prop_assert_eq!(&objects, &held);
                for k in 0..8 {
                    prop_assert_eq!(ledger.owner(&key(k)), owner.get(&key(k)));
                }
                let mut orphans: Vec<_> = ledger.orphans().cloned().collect();
                orphans.sort();
                prop_assert_eq!(orphans, held.keys().filter(|k| !owner.contains_key(*k)).cloned().collect::<Vec<_>>());
                for s in 0..4 {
                    let mut owned: Vec<_> = ledger.owned(&scope(s)).cloned().collect();
                    owned.sort();
                    let wanted = owner.iter().filter(|(_, whose)| **whose == scope(s)).map(|(k, _)| k.clone());
                    prop_assert_eq!(&owned, &wanted.collect::<Vec<_>>());
                    prop_assert_eq!(ledger.scopes().any(|whose| *whose == scope(s)), !owned.is_empty());
                }
                let named = held.keys().chain(owner.keys()).collect::<std::collections::BTreeSet<_>>();
                prop_assert_eq!(ledger.entries.len(), named.len(), "an entry that says nothing stays");
            }
        }
    }
}
