//! What the kernel says happened by another hand or by itself, and what a whole reading of it shows.

use keys::Spi;
use tracing::{debug, warn};

use super::Reconciler;
use crate::kernel::{Datapath, Event, Key, Kind, Object, Scope, WriteError};
use crate::repeats;

impl<D: Datapath> Reconciler<D> {
    /// Takes what a notification says.
    pub fn notice(&mut self, event: Event) {
        match event {
            Event::Observed(key, object) => self.observed(key, object),
            Event::Gone(key) => self.gone(&key),
            Event::AllGone(kind) => {
                let keys: Vec<Key> = self.keys(|key| key.kind() == kind);
                if !keys.is_empty() {
                    warn!(?kind, count = keys.len(), "flushed by another hand");
                }
                for key in keys {
                    self.forget(&key);
                }
            }
            Event::SoftLimit(id) => {
                if !self.ledger.holds(&Key::Sa(id)) {
                    return;
                }
                if self.node.limited(&id) {
                    debug!(spi = %Spi(id.spi), "an SA reached its soft limit");
                } else {
                    warn!(
                        spi = %Spi(id.spi),
                        "an SA of an older epoch reached its soft limit, and its peer has not moved; the kernel ends it \
                         at the hard limit"
                    );
                }
            }
            Event::Moved { id, source } => {
                if let Some(Scope::Peer(name)) = self.ledger.owner(&Key::Sa(id)) {
                    self.node.moved(name, source);
                }
            }
            Event::Overrun => self.stale = true,
        }
    }

    fn observed(&mut self, key: Key, object: Object) {
        let before = self.ledger.get(&key);
        let same = match (before, &object) {
            (Some(Object::Sa { sa: before, .. }), Object::Sa { sa: now, .. }) => before == now,
            (before, now) => before == Some(now),
        };
        if same {
            return;
        }
        if let (Key::Sa(_), Some(_)) = (&key, before) {
            // Its key is whatever the other hand gave it, or still ours: neither may be used on.
            self.gone(&key);
            return;
        }
        if let Some(told) = self.said.meddled.failed(&key, "changed", repeats::now()) {
            warn!(%key, times = told.times, seconds = told.seconds, "changed by another hand");
        }
        self.touched(&key);
        self.ledger.put(key, object);
    }

    fn gone(&mut self, key: &Key) {
        if self.ledger.holds(key) {
            if let Some(told) = self.said.meddled.failed(key, "removed", repeats::now()) {
                warn!(%key, times = told.times, seconds = told.seconds, "removed by another hand or by its limit");
            }
            self.forget(key);
        }
    }

    pub(super) fn forget(&mut self, key: &Key) {
        let Some(object) = self.ledger.take(key) else { return };
        self.touched(key);
        if let Key::Link(link) = key {
            // Its addresses and routes went with it; once another device has its name, nothing tells of them.
            let hung = |other: &Key| match other {
                Key::Address(device, _) | Key::Neighbour(device, _) | Key::Fdb(device, _) => device == link,
                other => other.kind() == Kind::Route,
            };
            for other in self.keys(hung) {
                self.forget(&other);
            }
        }
        if let (Key::Sa(id), Object::Sa { born, .. }, Some(Scope::Peer(name))) = (key, object, self.ledger.owner(key)) {
            let name = name.clone();
            self.node.lost(&name, id, born);
        }
    }

    fn touched(&mut self, key: &Key) {
        let scope = self.ledger.owner(key).cloned().unwrap_or(Scope::Orphans);
        self.node.mark(scope);
        if key.kind() != Kind::Sa {
            self.drifted.insert(key.clone());
        }
    }

    /// Reads the kernel anew and takes every difference as noticed.
    pub fn resync(&mut self) -> Result<(), WriteError> {
        let fresh = self.kernel.dump()?;
        self.stale = false;
        for key in self.keys(|key| !fresh.contains_key(key)) {
            self.gone(&key);
        }
        for (key, object) in fresh {
            if matches!((&key, self.ledger.get(&key)), (Key::Sa(_), Some(_))) {
                // The kernel's own view of an SA's attributes may be narrower than what was written.
                continue;
            }
            self.observed(key, object);
        }
        Ok(())
    }

    /// Whether notifications were lost, so that only [`Reconciler::resync`] tells what the kernel holds.
    pub fn is_stale(&self) -> bool {
        self.stale
    }

    /// The keys that the kernel holds and `fits` takes.
    fn keys(&self, fits: impl Fn(&Key) -> bool) -> Vec<Key> {
        let held = self.ledger.objects().map(|(key, _)| key);
        held.filter(|key| fits(key)).cloned().collect()
    }
}
