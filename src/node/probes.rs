//! Probes in and out, and all that happens because time passes.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use keys::{Carrier, Epoch};

use super::{Datagram, Node, Peer, Way};
use crate::backend::ipsec;
use crate::carrier;
use crate::epochs::{Data, Generation, SILENCE};
use crate::histogram::Histogram;
use crate::kernel::Scope;
use crate::lease::NodeName;
use crate::probe::{self, AGAIN, Probe, SETTLED, Schedule};

/// So many probes in a row are hardly lost by chance: on paths that lose 1 %, to one of a thousand peers every few hours.
pub(super) const UNANSWERED: u32 = 3;

/// How often own epochs are looked through for what can be wiped.
const TIDY: Duration = Duration::from_secs(5);

/// Upper bounds of round trips, seconds: from one rack to halfway round the earth.
pub(super) const ROUND_TRIPS: &[f64] = &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0];

impl Node {
    /// The round trips of all answered probes, seconds.
    pub fn round_trips(&self) -> &Histogram {
        &self.answered
    }

    /// How many questions were left out, because data that came proved the peer.
    pub fn left_out(&self) -> u64 {
        self.left_out
    }

    /// A datagram came from `from` to the probe port. Returns the answers, where one is due: on every carrier that is
    /// open, so that a question's carrier is judged by the way there alone.
    pub fn probed(&mut self, from: IpAddr, bytes: &[u8], now: Duration) -> Vec<Datagram> {
        let Some((name, probe)) = self.read(from, bytes) else {
            return Vec::new();
        };
        let Some(peer) = self.peers.get_mut(&name) else {
            return Vec::new();
        };
        let before = (peer.pair.data(), peer.pair.said(), peer.pair.probe());
        peer.pair.probed(probe.sent, probe.data, now);
        if probe.ask {
            peer.arrivals.probe();
        }
        let epoch = |data| match data {
            Data::On(Generation { receiver, .. }) => Some(receiver),
            Data::Held | Data::Inherited(_) => None,
        };
        if epoch(peer.pair.data()) != epoch(before.0) {
            // While it was started anew it could not answer.
            peer.record.forget();
        }
        let asked = peer.asked.iter().find(|(_, (ticket, ..))| *ticket == probe.ticket);
        let (answers, mut change) = (asked.is_some(), None);
        if !probe.ask {
            peer.record.answer(probe.ticket);
        }
        if !probe.ask
            && let Some((&carrier, &(ticket, said, at))) = asked
        {
            peer.asked.remove(&carrier);
            let round_trip = now.saturating_sub(at);
            peer.round_trip = Some(round_trip);
            self.answered.observe(round_trip.as_secs_f64());
            peer.pair.peer_knows(said);
            change = peer.choice.answered(ticket, round_trip, now);
        }
        self.diverted(&name, change, now);
        if !probe.ask {
            self.sized(&name, |sizes| sizes.answered(probe.ticket, now));
            if answers {
                self.relax(&name);
            }
        }
        let Some(peer) = self.peers.get(&name) else {
            return Vec::new();
        };
        if (peer.pair.data(), peer.pair.said(), peer.pair.probe()) != before {
            self.dirty.insert(Scope::Peer(name.clone()));
            // The peer learns at once where our data goes now, and the old can go.
            self.retimed(&name, |peer| peer.schedule = Schedule::at_once(now));
        } else {
            self.retimed(&name, |peer| peer.schedule.hope(now));
        }
        if !probe.ask {
            return Vec::new();
        }
        let open = self
            .peers
            .get(&name)
            .and_then(|peer| Some(self.open(peer, peer.pair.probe()?)));
        let answer = |carrier: &Carrier| self.datagram(&name, false, *carrier, probe.ticket);
        open.unwrap_or_default().iter().filter_map(answer).collect()
    }

    /// Who sent a datagram and what it says, if it is genuine.
    fn read(&mut self, from: IpAddr, bytes: &[u8]) -> Option<(NodeName, Probe)> {
        let name = self.bases.get(&from)?.clone();
        let probe = Probe::parse(bytes)?;
        let sent = probe.sent.reverse();
        self.derive(&name, sent)?;
        let keys = self.peers.get(&name)?.keys.get(&sent)?;
        Probe::genuine(bytes, &keys.probe).then_some((name, probe))
    }

    /// Data to a peer takes another carrier.
    fn diverted(&mut self, name: &NodeName, change: Option<carrier::Change>, now: Duration) {
        let Some(carrier::Change { from, to, reason }) = change else {
            return;
        };
        let open = self
            .peers
            .get(name)
            .and_then(|peer| Some(self.open(peer, peer.pair.newest()?)));
        if open.is_none_or(|open| open.len() < 2) {
            return;
        }
        match from {
            Some(from) => tracing::warn!(peer = %name, %from, %to, %reason, "data takes another carrier"),
            None => tracing::info!(peer = %name, carrier = %to, %reason, "data has a carrier"),
        }
        self.dirty.insert(Scope::Peer(name.clone()));
        self.retimed(name, |peer| peer.schedule = Schedule::at_once(now));
    }

    pub(super) fn datagram(&mut self, name: &NodeName, ask: bool, carrier: Carrier, ticket: u64) -> Option<Datagram> {
        let own = self.held?.0.bases();
        let sent = self.peers.get(name)?.pair.probe()?;
        self.derive(name, sent)?;
        let peer = self.peers.get(name)?;
        let data = self.data(peer).map(|(generation, _)| generation);
        let to = own.iter().find_map(|own| peer.subnets.bases().of_family(own))?;
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
            carrier,
            subnets: peer.subnets,
            padding: 0,
        })
    }

    /// A question to a peer. One that goes as its data does counts for what is lost: on another generation the peer may not
    /// have the keys yet, and the other carrier may not pass.
    fn question(&mut self, name: &NodeName, carrier: Carrier, now: Duration) -> Option<Datagram> {
        let peer = self.peers.get(name)?;
        let sent = peer.pair.probe()?;
        let counts = self.data(peer) == Some((sent, carrier));
        let other = self.ticket();
        let peer = self.peers.get_mut(name)?;
        let ticket = if counts { peer.record.ask(now) } else { other };
        let datagram = self.datagram(name, true, carrier, ticket)?;
        let peer = self.peers.get_mut(name)?;
        peer.arrivals.probe();
        peer.asked.insert(carrier, (ticket, datagram.data, now));
        peer.choice.asked(carrier, ticket, now);
        Some(datagram)
    }

    /// The ticket of a question that does not count for what is lost: apart from the numbers of those that do.
    pub(super) fn ticket(&mut self) -> u64 {
        self.ticket = self.ticket.wrapping_add(1);
        self.ticket | 1 << 63
    }

    /// When [`Node::tick`] next has something to do.
    pub fn deadline(&self, now: Duration) -> Option<Duration> {
        let epoch = self.next_epoch().map(|(at, _)| at);
        let first = self.due.first().map(|(due, _)| *due);
        let tidy = (self.own.len() > 1).then_some(self.tidied + TIDY);
        let each = [epoch, first, tidy, self.look(), self.psks.deadline()];
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
            if let Some(peer) = self.peers.get_mut(&name) {
                peer.queued = None;
            }
            if self.let_go(&name, now) {
                continue;
            }
            let Some(peer) = self.peers.get_mut(&name) else {
                continue;
            };
            if peer.pair.tick(now) {
                self.dirty.insert(Scope::Peer(name.clone()));
            }
            self.diverge(&name, now);
            self.ask(&name, now, jitter, &mut datagrams);
            self.ask_sizes(&name, now, jitter, &mut datagrams);
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

    /// Looks whether the carrier of a peer's data is to change, or in doubt.
    fn diverge(&mut self, name: &NodeName, now: Duration) {
        let Some(peer) = self.peers.get_mut(name) else { return };
        let change = peer.choice.look(now);
        if peer.choice.doubtful(now) && self.choosing(name) {
            self.retimed(name, |peer| peer.schedule.wake(now));
        }
        self.diverted(name, change, now);
    }

    /// Whether both carriers are open to a peer.
    fn choosing(&self, name: &NodeName) -> bool {
        let open = self
            .peers
            .get(name)
            .and_then(|peer| Some(self.open(peer, peer.pair.newest()?)));
        open.is_some_and(|open| open.len() > 1)
    }

    /// Whether all is settled with a peer that is reached by plain ESP alone, so that its answers prove no carrier, keep no
    /// NAT open and do not stand for its lease.
    fn is_plain(&self, name: &NodeName) -> bool {
        self.peers.get(name).is_some_and(|peer| {
            let open = peer.pair.newest().map(|newest| self.open(peer, newest));
            let stored = self.known.get(name).is_some_and(|known| known.vanished.is_none());
            stored && peer.pair.settled() && open == Some(&[Carrier::Esp])
        })
    }

    /// A peer has answered: it may rest for as long as the number of peers asks for.
    fn relax(&mut self, name: &NodeName) {
        let rest = match self.is_plain(name) {
            true => probe::rest(self.peers.len()),
            false if self.choosing(name) => return,
            false => SETTLED,
        };
        self.retimed(name, |peer| {
            if peer.answers() {
                peer.schedule.answered(rest);
            }
        });
    }

    /// When it is next to be told what the kernel counts ([`Node::carried`]).
    fn look(&self) -> Option<Duration> {
        (!self.peers.is_empty()).then_some(self.looked + SETTLED)
    }

    /// Whether it is to be told now what the kernel counts.
    pub fn looks(&mut self, now: Duration) -> bool {
        let looks = self.look().is_some_and(|at| at <= now);
        if looks {
            self.looked = now;
        }
        looks
    }

    /// The kernel counts so many `packets` on the SA `spi` of a peer's scope.
    pub fn carried(&mut self, name: &NodeName, spi: u32, packets: u64, now: Duration) {
        let Some(peer) = self.peers.get_mut(name) else { return };
        let data = peer.pair.said().map(|said| ipsec::spi(peer.slot, said, Carrier::Esp).0);
        if data == Some(spi) {
            let open = !peer.record.is_answered();
            peer.arrivals.look(spi, packets, open, now);
        }
    }

    /// Asks a peer, if that is due.
    fn ask(&mut self, name: &NodeName, now: Duration, jitter: &mut dyn FnMut() -> f64, out: &mut Vec<Datagram>) {
        let Some(peer) = self.peers.get(name) else { return };
        if peer.schedule.due() > now {
            return;
        }
        // Its probes are heard now and then, so that its epochs are not dropped as a silent peer's are.
        let probed = peer.pair.heard().is_some_and(|heard| now < heard + SILENCE / 2);
        if peer.schedule.rests() && probed && peer.answers() && self.is_plain(name) {
            let rest = probe::rest(self.peers.len());
            let Some(peer) = self.peers.get_mut(name) else { return };
            if peer.arrivals.leave_out() {
                self.left_out += 1;
                return peer.schedule.sent(now, Some(rest), jitter());
            }
        }
        let Some(peer) = self.peers.get(name) else { return };
        let open = peer
            .pair
            .newest()
            .map(|newest| self.open(peer, newest))
            .unwrap_or_default();
        let (carriers, rest) = match open {
            [_, _] => {
                let sure = peer.pair.settled() && !peer.choice.doubtful(now);
                (peer.choice.asks(now), sure.then(|| carrier::rest(self.peers.len())))
            }
            _ => (open, peer.pair.settled().then_some(SETTLED)),
        };
        // One without a lease is served by its answers alone.
        let rest = match self.known.get(name).and_then(|known| known.vanished) {
            Some(_) => rest.filter(|_| !self.unsure(name)).map(|rest| rest.min(SETTLED)),
            None => rest,
        };
        for carrier in carriers {
            out.extend(self.question(name, *carrier, now));
        }
        let one = !self.choosing(name);
        if let Some(peer) = self.peers.get_mut(name) {
            // Where there is a choice, that asks anew as soon as it doubts. Once it answers, [`Node::relax`] says how long.
            let soon = one && peer.record.unanswered() < UNANSWERED;
            let rest = rest.map(|rest| if soon { rest.min(AGAIN) } else { rest });
            peer.schedule.sent(now, rest, jitter());
        }
    }

    /// What could not pass may pass now, such as over another uplink: who has been silent for long is asked at once.
    pub fn hope(&mut self, now: Duration) {
        for name in self.peers.keys().cloned().collect::<Vec<_>>() {
            self.retimed(&name, |peer| peer.schedule.hope(now));
        }
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
        let in_use = |g: &Generation, way: &Way| {
            used.contains(&match way {
                Way::In => g.reverse(),
                Way::Out => *g,
            })
        };
        peer.made.retain(|(g, way, _)| in_use(g, way));
        peer.torn.retain(|(g, way, _)| in_use(g, way));
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
        for peer in self.peers.values_mut() {
            peer.mapping.keep(|epoch| needed.contains(&epoch));
        }
        self.spent.retain(|epoch, _| needed.contains(epoch));
    }

    /// Changes a peer and puts it at its right place among what is due.
    pub(super) fn retimed(&mut self, name: &NodeName, change: impl FnOnce(&mut Peer)) {
        let Some(peer) = self.peers.get_mut(name) else { return };
        change(peer);
        let let_go = self.known.get(name).and_then(|known| known.let_go(&peer.pair));
        let sizes = peer.pair.settled().then(|| peer.sizes.due());
        let deadlines = [peer.pair.deadline(), peer.choice.deadline(), sizes, let_go];
        let due = deadlines.into_iter().flatten().fold(peer.schedule.due(), Duration::min);
        if let Some(queued) = peer.queued.replace(due) {
            self.due.remove(&(queued, name.clone()));
        }
        self.due.insert((due, name.clone()));
    }
}
