//! How often an epoch began and why, and how long it takes until every peer's data is on it.

use std::collections::BTreeMap;
use std::time::Duration;

use keys::Epoch;

use super::{Cause, Node};
use crate::epochs::{Data, Generation, SILENCE};
use crate::histogram::Histogram;
use crate::lease::NodeName;

/// Upper bounds of durations, seconds: two round trips and a write of the store at best, a store's outage at worst.
const BOUNDS: &[f64] = &[0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0];

/// The epochs of this process.
#[derive(Clone, Debug, PartialEq)]
pub struct Rotations {
    /// How many began, by what they began for.
    pub begun: BTreeMap<Cause, u64>,
    /// How long each took until all data was on it, seconds; of those with peers whose data was on an earlier one.
    pub took: Histogram,
    /// How many were followed by another, or had [`SILENCE`], before all data was on them.
    pub unfinished: u64,
    under_way: Option<UnderWay>,
}

#[derive(Clone, Debug, Eq, PartialEq)]
struct UnderWay {
    epoch: Epoch,
    since: Duration,
    /// One peer that was found to lag: while it does, no other need be looked at.
    straggler: NodeName,
}

impl Default for Rotations {
    fn default() -> Self {
        Self {
            begun: BTreeMap::new(),
            took: Histogram::new(BOUNDS),
            unfinished: 0,
            under_way: None,
        }
    }
}

impl Rotations {
    /// The newest epoch of `node` began at `now` for `cause`.
    pub fn began(&mut self, cause: Cause, node: &Node, now: Duration) {
        *self.begun.entry(cause).or_default() += 1;
        self.unfinished += u64::from(self.under_way.take().is_some());
        self.under_way = node.epoch().and_then(|epoch| {
            Some(UnderWay {
                epoch,
                since: now,
                straggler: node.straggler(epoch, now)?,
            })
        });
    }

    /// To be called whenever something may have moved: while a rotation is under way it costs a look at one peer.
    pub fn look(&mut self, node: &Node, now: Duration) {
        let Some(under_way) = &mut self.under_way else { return };
        let UnderWay {
            epoch,
            since,
            straggler,
        } = under_way;
        let took = now.saturating_sub(*since);
        if node.lags(straggler, *epoch, now) {
            if took >= SILENCE {
                // Those that this process never heard may be gone for long.
                self.unfinished += u64::from(node.holds_back(*epoch, now));
                self.under_way = None;
            }
            return;
        }
        match node.straggler(*epoch, now) {
            Some(other) => *straggler = other,
            None => {
                self.took.observe(took.as_secs_f64());
                self.under_way = None;
            }
        }
    }
}

impl Node {
    /// Whether data to a peer that is alive, or may be, goes on another own epoch than `epoch`.
    fn lags(&self, name: &NodeName, epoch: Epoch, now: Duration) -> bool {
        let Some(peer) = self.peers.get(name) else { return false };
        match peer.pair.data() {
            Data::Held => false,
            Data::Inherited(_) => true,
            // Where it was never heard there is no data on any generation.
            Data::On(Generation { sender, .. }) => {
                let heard = peer.pair.heard().unwrap_or_default();
                sender != epoch && now.saturating_sub(heard) < SILENCE
            }
        }
    }

    /// Whether the store has a lease of `name`, or had one and it is served on.
    pub fn knows(&self, name: &NodeName) -> bool {
        self.known.contains_key(name)
    }

    /// Whether a peer lags that has been heard.
    fn holds_back(&self, epoch: Epoch, now: Duration) -> bool {
        let mut heard = self.peers.iter().filter(|(_, peer)| peer.pair.heard().is_some());
        heard.any(|(name, _)| self.lags(name, epoch, now))
    }

    fn straggler(&self, epoch: Epoch, now: Duration) -> Option<NodeName> {
        let mut names = self.peers.keys();
        names.find(|name| self.lags(name, epoch, now)).cloned()
    }

    /// The generation that data goes on, of each peer that has one.
    pub fn generations(&self) -> impl Iterator<Item = (&NodeName, Generation)> {
        self.peers.iter().filter_map(|(name, peer)| match peer.pair.data() {
            Data::On(generation) => Some((name, generation)),
            Data::Inherited(_) | Data::Held => None,
        })
    }
}
