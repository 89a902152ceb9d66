//! Probes in and out, and all that happens because time passes.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use keys::Epoch;

use super::{Datagram, Node, Peer};
use crate::epochs::{Data, Generation};
use crate::kernel::Scope;
use crate::lease::NodeName;
use crate::probe::{Probe, Schedule};

/// How often own epochs are looked through for what can be wiped.
const TIDY: Duration = Duration::from_secs(5);

impl Node {
    /// A datagram came from `from` to the probe port. Returns the answer, where one is due.
    pub fn probed(&mut self, from: IpAddr, bytes: &[u8], now: Duration) -> Option<Datagram> {
        let name = self.bases.get(&from)?.clone();
        let probe = Probe::parse(bytes)?;
        self.derive(&name, probe.sent.reverse())?;
        let peer = self.peers.get_mut(&name)?;
        let keys = peer.keys.get(&probe.sent.reverse())?;
        if !Probe::genuine(bytes, &keys.probe) {
            return None;
        }
        let before = (peer.pair.data(), peer.pair.said(), peer.pair.probe());
        peer.pair.probed(probe.sent, probe.data, now);
        if !probe.ask
            && let Some((ticket, said, at)) = peer.asked
            && ticket == probe.ticket
        {
            peer.asked = None;
            peer.round_trip = Some(now.saturating_sub(at));
            peer.pair.peer_knows(said);
        }
        if (peer.pair.data(), peer.pair.said(), peer.pair.probe()) != before {
            self.dirty.insert(Scope::Peer(name.clone()));
            // The peer learns at once where our data goes now, and the old can go.
            self.retimed(&name, |peer| peer.schedule = Schedule::at_once(now));
        } else {
            self.retimed(&name, |_| {});
        }
        if probe.ask {
            self.datagram(&name, false, probe.ticket, now)
        } else {
            None
        }
    }

    fn datagram(&mut self, name: &NodeName, ask: bool, ticket: u64, now: Duration) -> Option<Datagram> {
        let own = self.held?.0.bases();
        let sent = self.peers.get(name)?.pair.probe()?;
        self.derive(name, sent)?;
        let peer = self.peers.get_mut(name)?;
        let to = own.iter().find_map(|own| peer.subnets.bases().of_family(own))?;
        let data = match peer.pair.data() {
            Data::On(generation) => Some(generation),
            Data::Held | Data::Inherited(_) => None,
        };
        if ask {
            peer.asked = Some((ticket, data, now));
        }
        let probe = Probe {
            ask,
            sent,
            data,
            ticket,
        };
        Some(Datagram {
            to,
            bytes: probe.seal(&peer.keys.get(&sent)?.probe),
            sent,
            data,
            subnets: peer.subnets,
        })
    }

    /// When [`Node::tick`] next has something to do.
    pub fn deadline(&self, now: Duration) -> Option<Duration> {
        let epoch = self.next_epoch().map(|(at, _)| at);
        let first = self.due.first().map(|(due, _)| *due);
        let tidy = (self.own.len() > 1).then_some(self.tidied + TIDY);
        let each = [epoch, first, tidy, self.psks.deadline()];
        each.into_iter().flatten().min().map(|at| at.max(now))
    }

    /// Does what is due: drops what has drained and returns the probes to send. `jitter` yields numbers in 0..1.
    pub fn tick(&mut self, now: Duration, jitter: &mut dyn FnMut() -> f64) -> Vec<Datagram> {
        let mut datagrams = Vec::new();
        while let Some((due, name)) = self.due.first().cloned() {
            if due > now {
                break;
            }
            self.due.pop_first();
            let Some(peer) = self.peers.get_mut(&name) else {
                continue;
            };
            peer.queued = None;
            if peer.pair.tick(now) {
                self.dirty.insert(Scope::Peer(name.clone()));
            }
            if peer.schedule.due() <= now {
                let settled = peer.pair.settled();
                peer.schedule.sent(now, settled, jitter());
                self.ticket += 1;
                datagrams.extend(self.datagram(&name, true, self.ticket, now));
            }
            self.forget_keys(&name);
            self.retimed(&name, |_| {});
        }
        self.look_at_psks(now, jitter);
        if self.own.len() > 1 && now >= self.tidied + TIDY {
            self.tidied = now;
            self.forget_epochs();
        }
        datagrams
    }

    /// Wipes a peer's keys and statements that no live generation needs.
    fn forget_keys(&mut self, name: &NodeName) {
        let Some(peer) = self.peers.get_mut(name) else { return };
        let (pair, epochs) = (&peer.pair, &mut peer.epochs);
        let used: BTreeSet<Generation> = pair
            .sending()
            .into_iter()
            .chain(pair.receiving().map(Generation::reverse))
            .collect();
        let alive = |g: &Generation| pair.needs(g.sender) && pair.holds(g.receiver);
        peer.keys.retain(|g, _| used.contains(g) || alive(g));
        epochs.retain(|epoch, _| pair.holds(*epoch) || used.iter().any(|g| g.receiver == *epoch));
    }

    /// Wipes own secrets that no live generation needs.
    fn forget_epochs(&mut self) {
        let mut needed: BTreeSet<Epoch> = self.epoch().into_iter().collect();
        for peer in self.peers.values() {
            needed.extend(self.own.keys().filter(|epoch| peer.pair.needs(**epoch)));
            needed.extend(peer.pair.sending().iter().map(|g| g.sender));
            needed.extend(peer.pair.receiving().map(|g| g.receiver));
        }
        self.own.retain(|epoch, _| needed.contains(epoch));
        self.spent.retain(|epoch, _| needed.contains(epoch));
    }

    /// Changes a peer and puts it at its right place among what is due.
    pub(super) fn retimed(&mut self, name: &NodeName, change: impl FnOnce(&mut Peer)) {
        let Some(peer) = self.peers.get_mut(name) else { return };
        change(peer);
        let probe = peer.schedule.due();
        let due = peer.pair.deadline().map_or(probe, |deadline| deadline.min(probe));
        if let Some(queued) = peer.queued.replace(due) {
            self.due.remove(&(queued, name.clone()));
        }
        self.due.insert((due, name.clone()));
    }
}
