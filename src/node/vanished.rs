//! A peer whose lease has vanished from the store while it is served.
//!
//! A node that left and a store that lost its leases look the same there: an unmounted folder would cut the whole mesh.
//! What tells them apart is the peer itself. One that answers probes is there, whatever the store says, and is served
//! on by its last good statement, named in `status`; one that is silent is let go. A lease of another node that claims
//! the same goes before one that is gone.

use std::collections::BTreeSet;
use std::time::Duration;

use keys::{Slot, Statement};

use super::{Known, Node};
use crate::epochs::Pair;
use crate::kernel::Scope;
use crate::lease::NodeName;
use crate::probe::Schedule;

/// How long a peer may take to answer after its lease vanished: about eight probes.
const FIRST_ANSWER: Duration = Duration::from_secs(5);
/// How long one that has answered may be silent: it is asked every 15 s.
const ANSWER: Duration = Duration::from_secs(45);

impl Known {
    /// When a peer whose lease vanished is let go, unless it is heard before.
    pub(super) fn let_go(&self, pair: &Pair) -> Option<Duration> {
        let since = self.vanished?;
        Some(match pair.heard().filter(|heard| *heard > since) {
            Some(heard) => heard + ANSWER,
            None => since + FIRST_ANSWER,
        })
    }
}

impl Node {
    /// The lease of `name` is gone from the store. A peer is asked whether it is still there.
    pub(super) fn vanish(&mut self, name: &NodeName, now: Duration) -> BTreeSet<NodeName> {
        let known = self.known.get_mut(name).filter(|_| self.peers.contains_key(name));
        if let Some(known) = known {
            // Perhaps another came in its place, which was refused.
            known.stored = false;
            if known.vanished.is_none() {
                known.vanished = Some(now);
                let claimed = known.admitted.as_ref().map(|held| (&held.statement, held.slot));
                self.bygone.set(name, claimed);
                self.retimed(name, |peer| peer.schedule = Schedule::at_once(now));
            }
        } else {
            self.known.remove(name);
        }
        self.claims.set(name, None)
    }

    /// Lets peers go whose leases are gone and that hold what `statement` claims.
    pub(super) fn make_way(&mut self, statement: &Statement, slot: Slot) {
        for holder in self.bygone.holders(statement, slot) {
            tracing::info!(node = %holder, by = statement.node, "let go: its lease is gone, and another node claims what it had");
            self.forget(&holder);
        }
    }

    /// Lets a peer go whose lease is gone and that does not answer any more. True if it is gone. A lease that was
    /// refused because of what was known of it is looked at anew.
    pub(super) fn let_go(&mut self, name: &NodeName, now: Duration) -> bool {
        let (Some(known), Some(peer)) = (self.known.get(name), self.peers.get(name)) else {
            return false;
        };
        if known.let_go(&peer.pair).is_none_or(|at| now < at) {
            return false;
        }
        tracing::info!(node = %name, "let go: its lease is gone and it does not answer");
        let refused = known.stored.then(|| known.lease.clone());
        self.forget(name);
        if refused.is_some() {
            self.leased(name, refused.as_ref(), now);
        }
        true
    }

    /// Whether a peer whose lease vanished has not answered since.
    pub(super) fn unsure(&self, name: &NodeName) -> bool {
        let since = self.known.get(name).and_then(|known| known.vanished);
        let heard = self.peers.get(name).and_then(|peer| peer.pair.heard());
        since.is_some_and(|since| heard.is_none_or(|heard| heard <= since))
    }

    /// Stops serving a peer whose lease is gone, and knows nothing of it any more.
    pub(super) fn forget(&mut self, name: &NodeName) {
        self.bygone.set(name, None);
        self.known.remove(name);
        self.drop_peer(name);
        self.dirty.insert(Scope::Peer(name.clone()));
    }
}
