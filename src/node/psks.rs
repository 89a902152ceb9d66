//! The PSKs that the node holds: its file's, and those taken out of it that peers have nothing newer than.
//!
//! ```text
//!  in the file ──▶ taken out: still held, and listed last ──▶ nobody needs it, or PSKGrace is over
//!       ▲                          │                                      │
//!       └────── put back ──────────┘          an epoch begins whose statement does not list it: wiped, and
//!                                             who has nothing newer is cut
//! ```
//! So a file whose one key is replaced node by node loses nothing, in whatever order, and a key that was taken away
//! ends on every node.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use keys::{Kid, Psk};
use serde::{Deserialize, Serialize};
use tracing::{info, warn};

use super::{Cause, Known, Node};
use crate::admission::{Refusal, verify};
use crate::lease::{Lease, NodeName};
use crate::psk::MAX_KEYS;

/// How often it is looked at who needs a key that was taken away.
const LOOK: Duration = Duration::from_secs(1);

/// Once nobody needs it, a key that was taken away is dropped after a random time up to this and [`EACH`] for each peer.
/// All nodes see that at once, and dropping is an epoch: so the mesh has ten of them a second at most.
const SPREAD: Duration = Duration::from_secs(10);

/// See [`SPREAD`].
const EACH: Duration = Duration::from_millis(100);

/// Who changes the keys of one node after the other needs time for it: it is no news before this part of PSKGrace has
/// passed that others still need a key.
const PATIENCE: u32 = 4;

/// So many nodes that need a key are named: they are the last, where the keys change everywhere.
const LAST: usize = 3;

/// How many names of dropped keys are remembered, to say why a peer is cut.
const REMEMBERED: usize = 64;

/// A key that is no longer in the file.
#[derive(Debug)]
struct Withdrawn {
    since: Duration,
    /// When it is dropped because nobody needs it.
    unneeded: Option<Duration>,
    /// It is in no statement from the next on, and dropped with it.
    ending: bool,
    /// Whether it was said who needs it.
    told: bool,
}

#[derive(Debug, Default)]
pub(super) struct Psks {
    /// The file's, newest first, then those that were withdrawn, newest first.
    all: Vec<Arc<Psk>>,
    /// In the order in which they stand at the end of `all`.
    withdrawn: Vec<Withdrawn>,
    dropped: BTreeSet<Kid>,
    looked: Duration,
}

impl Psks {
    /// All that are held, in the order of preference.
    pub(super) fn all(&self) -> &[Arc<Psk>] {
        &self.all
    }

    pub(super) fn get(&self, kid: Kid) -> Option<&Arc<Psk>> {
        self.all.iter().find(|psk| psk.kid() == kid)
    }

    fn filed(&self) -> usize {
        self.all.len() - self.withdrawn.len()
    }

    /// What a statement that is written now lists.
    pub(super) fn kids(&self) -> Vec<Kid> {
        let ending = self.withdrawn.iter().map(|withdrawn| withdrawn.ending);
        let ending = std::iter::repeat_n(false, self.filed()).chain(ending);
        let kept = self.all.iter().zip(ending).filter(|(_, ending)| !ending);
        kept.map(|(psk, _)| psk.kid()).collect()
    }

    /// The file holds `psks` now, newest first. False if nothing changes.
    fn set(&mut self, psks: Vec<Arc<Psk>>, now: Duration) -> bool {
        let same = self.filed() == psks.len() && self.all.iter().zip(&psks).all(|(a, b)| a.kid() == b.kid());
        if same {
            return false;
        }
        let filed = self.filed();
        let fresh = |_: &Arc<Psk>| Withdrawn {
            since: now,
            unneeded: None,
            ending: false,
            told: false,
        };
        let earlier = std::mem::take(&mut self.withdrawn);
        let states: Vec<Withdrawn> = self.all[..filed].iter().map(fresh).chain(earlier).collect();
        let before = std::mem::replace(&mut self.all, psks);
        for psk in &self.all {
            self.dropped.remove(&psk.kid());
        }
        for (psk, state) in before.into_iter().zip(states) {
            if self.get(psk.kid()).is_some() {
                continue;
            }
            if self.all.len() == MAX_KEYS {
                // A statement has no room for it. The newer ones go before.
                warn!(kid = %psk.kid(), "too many PSKs: this one was taken away and is dropped at once");
                self.remember(psk.kid());
                continue;
            }
            self.all.push(psk);
            self.withdrawn.push(state);
        }
        true
    }

    fn remember(&mut self, kid: Kid) {
        if self.dropped.len() == REMEMBERED {
            self.dropped.pop_first();
        }
        self.dropped.insert(kid);
    }

    /// Wipes what is in no statement any more; returns the names.
    fn end(&mut self) -> Vec<Kid> {
        let filed = self.filed();
        let mut ended = Vec::new();
        for at in (0..self.withdrawn.len()).rev() {
            if self.withdrawn[at].ending {
                self.withdrawn.remove(at);
                ended.push(self.all.remove(filed + at).kid());
            }
        }
        for kid in &ended {
            self.remember(*kid);
        }
        ended
    }

    /// When it is next looked at who needs what was withdrawn.
    pub(super) fn deadline(&self) -> Option<Duration> {
        (!self.withdrawn.is_empty()).then_some(self.looked + LOOK)
    }

    /// `refusal`, or the better reason where the peer has only a key that was dropped here.
    pub(super) fn explain(&self, refusal: Refusal) -> Refusal {
        match refusal {
            Refusal::NoCommonPsk { theirs, ours } => match theirs.iter().find(|kid| self.dropped.contains(kid)) {
                Some(&dropped) => Refusal::PskDropped { dropped, ours },
                None => Refusal::NoCommonPsk { theirs, ours },
            },
            other => other,
        }
    }
}

/// A PSK and who has it, as JSON shows it.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct PskReport {
    /// Its public name.
    pub kid: String,
    /// Whether it is in the file no longer, and held for those who have nothing newer.
    pub withdrawn: bool,
    /// Seconds until a withdrawn one is dropped at the latest.
    pub dropped_in: Option<u64>,
    /// How many nodes have it, this one counted.
    pub have: usize,
    /// How many nodes there are that say which keys they have, this one counted.
    pub nodes: usize,
    /// Those that have not.
    pub missing: Vec<String>,
    /// Of a withdrawn one: the peers that have nothing newer, and are cut when it is dropped.
    pub needed_by: Vec<String>,
}

impl Node {
    /// The file's PSKs are these now, newest first. One that was there before is held on as withdrawn.
    pub fn keyed(&mut self, psks: Vec<Arc<Psk>>, now: Duration) {
        if self.psks.set(psks, now) {
            self.psks.looked = now;
            self.check_statement();
            self.judge_anew(now);
        }
    }

    /// Every lease is judged anew, under the PSKs that are held now. Who was believed under one that is gone, and under
    /// no other, is so no longer.
    fn judge_anew(&mut self, now: Duration) {
        let all: Vec<(NodeName, Arc<Lease>)> = (self.known.iter())
            .map(|(name, known)| (name.clone(), known.lease.clone()))
            .collect();
        for (name, lease) in all {
            let unproved = |known: &&mut Known| {
                let proof = known.proof.as_ref();
                proof.is_some_and(|proof| verify(proof, &self.settings.network, self.psks.all()).is_err())
            };
            if let Some(known) = self.known.get_mut(&name).filter(unproved) {
                (known.admitted, known.proof) = (None, None);
                for other in self.claims.set(&name, None) {
                    self.reconsider(&other, now);
                }
            }
            match self.known.get(&name) {
                Some(known) if known.stored => self.leased(&name, Some(&lease), now),
                Some(known) if known.admitted.is_none() => self.forget(&name),
                Some(_) | None => {}
            }
        }
    }

    /// The peers that have `kid` and no key that stands before it here.
    fn needers(&self, kid: Kid) -> Vec<&NodeName> {
        let newer: Vec<Kid> = self.psks.kids().into_iter().take_while(|other| *other != kid).collect();
        let needs = |known: &Known| {
            known.admitted.as_ref().is_some_and(|admitted| {
                let theirs = &admitted.statement.kids;
                theirs.contains(&kid) && keys::common_kid(&newer, theirs).is_none()
            })
        };
        self.known
            .iter()
            .filter(|(_, known)| needs(known))
            .map(|(name, _)| name)
            .collect()
    }

    /// What is doubtful at `now` about keys that were taken away and that others need after some of PSKGrace.
    pub(super) fn overdue(&self, now: Duration) -> Option<String> {
        let grace = self.settings.psk_grace;
        let mut overdue = Vec::new();
        for (psk, withdrawn) in self.psks.all[self.psks.filed()..].iter().zip(&self.psks.withdrawn) {
            if withdrawn.ending || now < withdrawn.since + grace / PATIENCE {
                continue;
            }
            let needers: Vec<String> = self.needers(psk.kid()).into_iter().map(ToString::to_string).collect();
            let needers = match needers.len() {
                0 => continue,
                1 => format!("node {} still needs", needers[0]),
                2..=LAST => format!("nodes {} still need", needers.join(", ")),
                // A number, or the first names, would be others every second while nodes change their keys.
                _ => format!("more than {LAST} nodes, which `ringmail status` names, still need"),
            };
            overdue.push(format!(
                "{needers} key {}, which was taken from this node: give them a newer one, before they are cut {} s after \
                 that (PSKGrace)",
                psk.kid(),
                grace.as_secs()
            ));
        }
        (!overdue.is_empty()).then(|| overdue.join("; "))
    }

    /// Looks at who needs what was withdrawn, and ends what nobody needs or has been held long enough.
    pub(super) fn look_at_psks(&mut self, now: Duration, jitter: &mut dyn FnMut() -> f64) {
        if self.psks.deadline().is_none_or(|due| due > now) {
            return;
        }
        self.psks.looked = now;
        let peers = u32::try_from(self.peers.len()).unwrap_or(u32::MAX);
        for at in 0..self.psks.withdrawn.len() {
            let kid = self.psks.all[self.psks.filed() + at].kid();
            let needers: Vec<String> = self.needers(kid).into_iter().map(ToString::to_string).collect();
            let state = &mut self.psks.withdrawn[at];
            if state.ending {
                continue;
            }
            let until = state.since + self.settings.psk_grace;
            if needers.is_empty() {
                if state.unneeded.is_none() {
                    info!(%kid, "a PSK that was taken away is needed by nobody; it is dropped soon");
                }
                let spread = (SPREAD + EACH.saturating_mul(peers)).mul_f64(jitter().clamp(0.0, 1.0));
                state.unneeded.get_or_insert(now + spread);
            } else {
                state.unneeded = None;
                if !std::mem::replace(&mut state.told, true) {
                    let left = format!("{:?}", Duration::from_secs(until.saturating_sub(now).as_secs()));
                    let (count, nodes) = (needers.len(), some(&needers));
                    warn!(%kid, count, nodes, left, "a PSK was taken away that peers still need; then they are cut");
                }
            }
            if now >= state.unneeded.map_or(until, |unneeded| unneeded.min(until)) {
                if !needers.is_empty() {
                    let (count, nodes) = (needers.len(), some(&needers));
                    warn!(%kid, count, nodes, "PSKGrace is over: the PSK is dropped, and who needs it is cut");
                }
                state.ending = true;
                self.want(Cause::Changed);
            }
        }
    }

    /// An epoch has begun whose statement does not list what ends: that is wiped, and who has nothing else is cut.
    pub(super) fn end_psks(&mut self, now: Duration) {
        let ended = self.psks.end();
        for kid in &ended {
            info!(%kid, "a PSK is dropped");
        }
        if !ended.is_empty() {
            self.judge_anew(now);
        }
    }

    /// How many nodes have none of this node's PSKs.
    pub(super) fn foreign(&self) -> usize {
        self.known.values().filter(|known| known.lacks_psk()).count()
    }

    pub(super) fn psk_reports(&self, now: Duration) -> Vec<PskReport> {
        let statements = || {
            self.known.iter().filter_map(|(name, known)| {
                let kids = known
                    .admitted
                    .as_ref()
                    .map(|admitted| admitted.statement.kids.as_slice());
                let kids = if known.lacks_psk() { Some([].as_slice()) } else { kids };
                Some((name, kids?))
            })
        };
        let filed = self.psks.filed();
        let report = |(at, psk): (usize, &Arc<Psk>)| {
            let kid = psk.kid();
            let withdrawn = at.checked_sub(filed).map(|at| &self.psks.withdrawn[at]);
            let until = withdrawn.map(|withdrawn| {
                let until = withdrawn.since + self.settings.psk_grace;
                withdrawn.unneeded.map_or(until, |unneeded| unneeded.min(until))
            });
            let missing = statements().filter(|(_, kids)| !kids.contains(&kid));
            let missing: Vec<String> = missing.map(|(name, _)| name.to_string()).collect();
            let nodes = 1 + statements().count();
            PskReport {
                kid: kid.to_string(),
                withdrawn: withdrawn.is_some(),
                dropped_in: until.map(|until| until.saturating_sub(now).as_secs()),
                have: nodes - missing.len(),
                nodes,
                missing,
                needed_by: match withdrawn {
                    Some(_) => self.needers(kid).into_iter().map(ToString::to_string).collect(),
                    None => Vec::new(),
                },
            }
        };
        self.psks.all.iter().enumerate().map(report).collect()
    }
}

/// What is wrong with a node's PSKs, where `foreign` others have none of them.
pub(super) fn problems(psks: &[PskReport], foreign: usize) -> Vec<String> {
    if psks.is_empty() {
        return vec!["no PSK".into()];
    }
    let mut problems = Vec::from_iter(alone(psks, foreign));
    for psk in psks.iter().filter(|psk| !psk.needed_by.is_empty()) {
        let needers = match psk.needed_by.len() {
            1 => "1 node still needs".to_owned(),
            count => format!("{count} nodes still need"),
        };
        problems.push(format!(
            "{needers} key {}, which was taken from this node: {}; it is dropped in {} s: give them a newer one before",
            psk.kid,
            some(&psk.needed_by),
            psk.dropped_in.unwrap_or_default()
        ));
    }
    problems
}

/// What is doubtful where no other node has one of the PSKs, and `foreign` others have none of them.
pub(super) fn alone(psks: &[PskReport], foreign: usize) -> Option<String> {
    let others = match foreign {
        0 => return None,
        1 => "1 node has".to_owned(),
        count => format!("{count} nodes have"),
    };
    psks.iter()
        .all(|psk| psk.have == 1)
        .then(|| format!("no other node has a PSK of this one, {others} another: is this node's the right one?"))
}

/// The first names of many.
pub(crate) fn some(names: &[String]) -> String {
    const SHOWN: usize = 10;
    let mut text = names.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
    if names.len() > SHOWN {
        text += &format!(" and {} more", names.len() - SHOWN);
    }
    text
}
