//! Peers that data goes to and that do not answer any more, and when that is news.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use super::probes::UNANSWERED;
use super::report::Comes;
use super::{Node, Peer, some};
use crate::epochs::Data;
use crate::lease::NodeName;

/// For so long nothing comes from a peer with which something is to be settled only if it is silent: it is asked every few
/// seconds.
const QUIET: Duration = Duration::from_secs(30);
/// So many peers that changed at one time have a line each; of more there is one line, as when the uplink is gone.
const EACH: usize = 3;

/// How a peer that data goes to is silent.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Silence {
    /// Nothing has come from it for so long.
    Quiet(Duration),
    /// Its probes come, and so many of the newest of ours got no answer.
    Unanswered(u32),
    /// Only its data comes, and so many of the newest probes got no answer.
    DataAlone(u32),
}

impl Silence {
    /// What still comes.
    pub fn comes(self) -> Comes {
        match self {
            Self::Quiet(_) => Comes::Nothing,
            Self::Unanswered(_) => Comes::Probes,
            Self::DataAlone(_) => Comes::Data,
        }
    }
}

impl fmt::Display for Silence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Quiet(silent) => write!(
                f,
                "silent for {} s: is the node up, does its daemon run, does ESP (or UDP) pass?",
                silent.as_secs()
            ),
            Self::Unanswered(probes) => write!(
                f,
                "it is heard, and does not answer the last {probes} probes: what this node sends does not arrive there; look \
                 for a packet filter there or on the path"
            ),
            Self::DataAlone(probes) => write!(
                f,
                "its data comes, and its daemon does not answer the last {probes} probes: does the daemon run, or does what \
                 this node sends not arrive there?"
            ),
        }
    }
}

impl Node {
    /// How a peer is silent at `now`, if data goes to it and it is.
    pub(super) fn silence(&self, peer: &Peer, now: Duration) -> Option<Silence> {
        if !matches!(peer.pair.data(), Data::On(_)) || self.data(peer).is_none() {
            return None;
        }
        let heard = peer.heard()?;
        let unanswered = peer.record.unanswered();
        let silent = Silence::Quiet(now.saturating_sub(heard));
        if !peer.pair.settled() {
            let newest = self.own.last_key_value().map_or(Duration::ZERO, |(_, own)| own.begun);
            // A rest may have been long; an epoch of ours that began in it asks anew.
            return (now.saturating_sub(heard.max(newest)) >= QUIET).then_some(silent);
        }
        let since = peer.record.since().filter(|_| unanswered >= UNANSWERED)?;
        // Of two carriers the one that is asked quickly is in doubt, and the other takes its place.
        let choosing = peer
            .pair
            .newest()
            .is_some_and(|newest| self.open(peer, newest).len() > 1);
        if choosing && now.saturating_sub(heard) < QUIET {
            None
        } else if peer.pair.heard() > Some(since) {
            Some(Silence::Unanswered(unanswered))
        } else if heard > since {
            Some(Silence::DataAlone(unanswered))
        } else {
            Some(silent)
        }
    }
}

/// The peers that were last found silent, with the time that each was heard before.
#[derive(Debug, Default)]
pub struct Silent(BTreeMap<NodeName, Duration>);

/// A line of the log.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Line {
    /// A peer has fallen silent.
    Fallen(NodeName, Silence),
    /// So many have at one time; the names of the first.
    ManyFallen(usize, String),
    /// A peer answers again, after so long.
    Back(NodeName, Duration),
    /// So many do; the names of the first.
    ManyBack(usize, String),
}

impl Silent {
    /// What is news at `now` since it was last asked. Goes through all peers, and takes a comparison or two for each.
    pub fn look(&mut self, node: &Node, now: Duration) -> Vec<Line> {
        let mut back = Vec::new();
        self.0.retain(|name, before| {
            // Who is let go has a line of its own.
            let Some(peer) = served(node, name) else { return false };
            // An epoch of ours that begins while a peer is silent is no answer.
            let answers = node.silence(peer, now).is_none()
                && peer.pair.settled()
                && peer.pair.heard().is_some_and(|heard| heard > *before);
            if answers {
                back.push((name.clone(), now.saturating_sub(*before)));
            }
            !answers
        });
        let mut fallen = Vec::new();
        for (name, peer) in &node.peers {
            let Some(silence) = node.silence(peer, now) else {
                continue;
            };
            if self.0.contains_key(name) || served(node, name).is_none() {
                continue;
            }
            self.0.insert(name.clone(), peer.pair.heard().unwrap_or(now));
            fallen.push((name.clone(), silence));
        }
        let mut lines = gathered(fallen, Line::Fallen, Line::ManyFallen);
        lines.extend(gathered(back, Line::Back, Line::ManyBack));
        lines
    }
}

/// The peer of this name; `None` where it is not served, or its lease is gone and it is served while it answers.
fn served<'a>(node: &'a Node, name: &NodeName) -> Option<&'a Peer> {
    let vanished = |known: &super::Known| known.refusal.is_none() && known.vanished.is_some();
    let peer = node.peers.get(name)?;
    (!node.known.get(name).is_some_and(vanished)).then_some(peer)
}

/// A line for each, or one for all.
fn gathered<T>(news: Vec<(NodeName, T)>, one: fn(NodeName, T) -> Line, many: fn(usize, String) -> Line) -> Vec<Line> {
    if news.len() > EACH {
        let names: Vec<String> = news.iter().map(|(name, _)| name.to_string()).collect();
        return vec![many(names.len(), some(&names))];
    }
    news.into_iter().map(|(name, what)| one(name, what)).collect()
}

impl Line {
    /// Writes it.
    pub fn log(&self) {
        match self {
            Self::Fallen(peer, reason) => tracing::warn!(%peer, %reason, "a peer has fallen silent"),
            Self::ManyFallen(count, peers) => tracing::warn!(
                count,
                peers,
                "peers have fallen silent at one time: is this node's own uplink in order, and what lies behind it?"
            ),
            Self::Back(peer, silent) => tracing::info!(%peer, seconds = silent.as_secs(), "a peer is heard again"),
            Self::ManyBack(count, peers) => tracing::info!(count, peers, "peers are heard again"),
        }
    }
}
