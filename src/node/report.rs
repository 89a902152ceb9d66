//! What the node shows of itself and of every peer: the value behind `status`, its JSON and the audit.

use std::collections::BTreeMap;
use std::time::Duration;

use keys::Carrier;
use serde::{Deserialize, Serialize};
use xfrm::{Limits, SaId};

use super::psks::{self, PskReport};
use super::{Known, Node, Peer, some};
use crate::admission::Refusal;
use crate::backend::{Plain, ipsec};
use crate::epochs::{Data, Generation};
use crate::kernel::{Counters, Key, Object, Scope, firewall};
use crate::lease::NodeName;
use crate::tunnel;

/// What comes from a peer that does not answer.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Comes {
    /// Nothing.
    Nothing,
    /// Data, and no probe of its daemon.
    Data,
    /// Probes, so that it is the way there that is cut.
    Probes,
}

/// The whole picture, as JSON shows it.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Report {
    /// This node's name.
    pub node: String,
    /// The mesh's ranges.
    pub network: Vec<String>,
    /// The own subnets; empty while there is no lease.
    pub subnets: Vec<String>,
    /// The own public addresses.
    pub public: Vec<String>,
    /// The uplink's name.
    pub uplink: Option<String>,
    /// The mesh MTU, bytes.
    pub mtu: Option<u32>,
    /// The backend's type.
    #[serde(default)]
    pub backend: String,
    /// The cipher that this node sends with; empty where nothing is encrypted.
    pub cipher: String,
    /// Whether ESP travels in UDP: `false`, `true` or `auto`.
    pub encap: String,
    /// Whether a service manager is there to keep the sockets for ESP in UDP over a restart; where none is, nothing comes
    /// in by UDP while the daemon does not run. `None` where there are no such sockets.
    #[serde(default)]
    pub encap_kept: Option<bool>,
    /// What the udp backend's tunnel has carried and dropped since its start; `None` under the others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tunnel: Option<tunnel::Counters>,
    /// Packets of the mesh that crossed the uplink without ESP, and were dropped; `None` where nothing is encrypted, or the
    /// guard can't be read.
    #[serde(default)]
    pub plaintext: Option<firewall::Counters>,
    /// The newest own epoch.
    pub epoch: Option<u64>,
    /// Its age, seconds.
    pub epoch_age: Option<u64>,
    /// When the next epoch begins.
    pub next_epoch: Option<NextEpoch>,
    /// The PSKs held, newest first, those that were withdrawn last.
    pub psks: Vec<PskReport>,
    /// Whether the roster is complete.
    pub complete: bool,
    /// What is wrong with this node; empty where nothing is.
    pub problems: Vec<String>,
    /// What the store holds that is no lease → why.
    pub rejected: BTreeMap<String, String>,
    /// Every other node, by name.
    pub peers: Vec<PeerReport>,
}

/// What a person should look at, beside what is wrong with this node's own parts. The texts stay the same while it lasts.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Doubts {
    /// About the PSKs held.
    pub psks: Option<String>,
    /// About PSKs that were taken away, and that others still need.
    pub withdrawn: Option<String>,
    /// About the next epoch.
    pub epoch: Option<String>,
    /// About the own lease.
    pub lease: Option<String>,
    /// About the leases of others.
    pub peers: Option<String>,
}

/// An epoch to come, as JSON shows it.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct NextEpoch {
    /// In how many seconds.
    pub seconds: u64,
    /// Why.
    pub cause: String,
}

/// How a peer stands.
#[derive(Clone, Copy, Debug, Deserialize, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Data goes, on the newest generation.
    Up,
    /// Data goes, and is moving to a newer generation.
    Moving,
    /// Data goes on what an earlier process left, until the first generation is confirmed.
    Kept,
    /// No data yet: no probe has come back.
    Waiting,
    /// Data goes, and is not encrypted, as the backend has it.
    Plain,
    /// Its lease is not believed, or can't be served.
    Refused,
}

impl State {
    /// Its name, as JSON has it too.
    pub fn word(self) -> &'static str {
        match self {
            Self::Up => "up",
            Self::Moving => "moving",
            Self::Kept => "kept",
            Self::Waiting => "waiting",
            Self::Plain => "plain",
            Self::Refused => "refused",
        }
    }
}

/// One peer.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct PeerReport {
    /// Its name.
    pub node: String,
    /// Its subnets.
    pub subnets: Vec<String>,
    /// The address that its ESP goes to, or its public addresses where it is not served.
    pub address: String,
    /// How it stands.
    pub state: State,
    /// Why it is not up, or what was refused although it is; with the remedy.
    pub reason: Option<String>,
    /// The generation that data goes on: own epoch > peer's.
    pub generation: Option<String>,
    /// The newest generation there is, where data is not on it.
    pub newest: Option<String>,
    /// The SPI that we send on.
    pub spi_out: Option<String>,
    /// The SPI that the peer said it sends on.
    pub spi_in: Option<String>,
    /// `esp` or `udp`.
    pub encap: Option<String>,
    /// Where its UDP comes from, where that is not what its statement says: it is behind a NAT.
    #[serde(default)]
    pub learned: Option<String>,
    /// Why data goes in UDP, where plain ESP is open too.
    #[serde(default)]
    pub detour: Option<String>,
    /// Seconds since a probe last came from it.
    pub heard: Option<f64>,
    /// The last probe's round trip, milliseconds.
    pub round_trip: Option<f64>,
    /// Of the last 20 probes that asked for an answer on what data goes on, the share that got none, 0 to 1; `None` where
    /// none has yet.
    #[serde(default)]
    pub loss: Option<f64>,
    /// How many of those in a row, the newest ones, got none.
    #[serde(default)]
    pub unanswered: u32,
    /// What still comes from it where data goes to it although it has stopped answering; `reason` says so too.
    #[serde(default)]
    pub silent: Option<Comes>,
    /// Whether a packet of the mesh MTU passes to it, or of what its path takes by its cipher and family, if that is less;
    /// `None` where that is not known yet.
    #[serde(default)]
    pub full_size: Option<bool>,
    /// Bytes sent, over the SAs that the kernel holds.
    pub bytes_out: u64,
    /// Bytes received.
    pub bytes_in: u64,
    /// Packets sent.
    pub packets_out: u64,
    /// Packets received.
    pub packets_in: u64,
    /// Packets refused: failed integrity check, replayed, outside the window.
    pub errors: u64,
}

impl Node {
    /// The picture at `now`. `counters` are the kernel's, by SA.
    pub fn report(&self, counters: &BTreeMap<SaId, Counters>, now: Duration) -> Report {
        let newest = self.own.last_key_value();
        let texts = |items: &mut dyn Iterator<Item = String>| items.collect::<Vec<_>>();
        let mut problems = self.lacks();
        let held = match self.plain() {
            Some(_) => Vec::new(),
            None => self.psk_reports(now),
        };
        if self.plain().is_none() {
            problems.extend(psks::problems(&held, self.foreign()));
        }
        problems.extend(self.contested());
        problems.extend(self.exposed());
        Report {
            node: self.settings.name.to_string(),
            network: texts(&mut self.settings.network.nets().map(|net| net.to_string())),
            subnets: texts(
                &mut self
                    .held
                    .iter()
                    .flat_map(|(subnets, _)| subnets.iter())
                    .map(|n| n.to_string()),
            ),
            public: texts(&mut self.uplink.iter().flat_map(|u| u.public.iter()).map(|a| a.to_string())),
            uplink: self.uplink.as_ref().map(|uplink| uplink.name.clone()),
            mtu: self.mtu(),
            backend: self.plain().map_or("ipsec", Plain::name).into(),
            cipher: match self.plain() {
                Some(_) => String::new(),
                None => self.settings.cipher.to_string(),
            },
            encap: mode(self.settings.encap.mode).into(),
            encap_kept: None,
            tunnel: None,
            plaintext: None,
            epoch: newest.map(|(epoch, _)| epoch.0),
            epoch_age: newest.map(|(_, own)| now.saturating_sub(own.begun).as_secs()),
            next_epoch: self.next_epoch().map(|(at, cause)| NextEpoch {
                seconds: at.saturating_sub(now).as_secs(),
                cause: cause.text().to_owned(),
            }),
            psks: held,
            complete: false,
            problems,
            rejected: BTreeMap::new(),
            peers: self
                .known
                .iter()
                .map(|(name, known)| self.peer_report(name, known, counters, now))
                .collect(),
        }
    }

    /// What the node itself lacks; takes no longer for more peers.
    pub fn lacks(&self) -> Vec<String> {
        let mut lacks = Vec::new();
        if self.uplink.is_none() {
            lacks.push("no uplink yet: no interface fits; see --iface".to_owned());
        }
        if self.held.is_none() {
            lacks.push("no lease yet".to_owned());
        }
        lacks.extend(self.no_epoch());
        lacks
    }

    fn no_epoch(&self) -> Option<String> {
        self.stalled().map(|why| format!("no new epoch can begin: {why}"))
    }

    /// Which peers are served in plaintext, where that is allowed.
    fn exposed(&self) -> Option<String> {
        self.settings.plaintext.as_ref()?;
        let names = self.known.keys().filter(|name| self.in_plaintext(name));
        let names: Vec<String> = names.map(ToString::to_string).collect();
        Some(match names.as_slice() {
            [] => "AllowPlaintextPeers is on, and no peer needs it: take it out of net-conf.json".to_owned(),
            names => format!(
                "{} of {} peers in PLAINTEXT, as AllowPlaintextPeers allows: {}; whoever can write leases can add to them: \
                 take it out of net-conf.json when they have moved",
                names.len(),
                self.known.len(),
                some(names)
            ),
        })
    }

    /// What another lease takes from this node.
    fn contested(&self) -> Option<String> {
        let Some(Refusal::Conflict { claim, others }) = self.claims.conflict(&self.settings.name) else {
            return None;
        };
        let others: Vec<String> = others.iter().map(ToString::to_string).collect();
        Some(format!(
            "{claim} of this node is also claimed by {}: remove that lease",
            others.join(", ")
        ))
    }

    /// What is doubtful about PSKs, epochs and leases at `now`. Goes through all peers.
    pub fn doubts(&self, now: Duration) -> Doubts {
        let held = match self.plain() {
            Some(_) => return Doubts::default(),
            None => self.psk_reports(now),
        };
        // A lease that says nothing yet is no one's mistake.
        let mut refused = self
            .refusals()
            .filter(|(_, refusal)| !matches!(refusal, Refusal::Silent));
        let first = refused
            .next()
            .map(|(name, refusal)| format!("the lease of node {name} is refused: {refusal}"));
        // No number: while many change it would be another one every time.
        let more = match refused.next() {
            None => "",
            Some(_) => "; and others are: `ringmail status` names them",
        };
        Doubts {
            psks: psks::alone(&held, self.foreign()),
            withdrawn: self.overdue(now),
            epoch: self.no_epoch(),
            lease: self.contested(),
            peers: first.map(|first| first + more),
        }
    }

    fn peer_report(
        &self,
        name: &NodeName,
        known: &Known,
        counters: &BTreeMap<SaId, Counters>,
        now: Duration,
    ) -> PeerReport {
        let mut report = PeerReport {
            node: name.to_string(),
            subnets: known.lease.subnets.iter().map(|net| net.to_string()).collect(),
            address: known.lease.public.to_string(),
            state: State::Refused,
            reason: known.refusal.as_ref().map(ToString::to_string),
            generation: None,
            newest: None,
            spi_out: None,
            spi_in: None,
            encap: None,
            detour: None,
            learned: None,
            heard: None,
            round_trip: None,
            loss: None,
            unanswered: 0,
            silent: None,
            full_size: None,
            bytes_out: 0,
            bytes_in: 0,
            packets_out: 0,
            packets_in: 0,
            errors: 0,
        };
        if let Some(plain) = self.plain() {
            self.plain_report(plain, name, &mut report);
            return report;
        }
        let plaintext = self.in_plaintext(name);
        let Some(peer) = self.peers.get(name) else {
            if let Some(plain) = self.settings.plaintext.as_ref().filter(|_| report.reason.is_none()) {
                self.plain_report(plain, name, &mut report);
            }
            return report;
        };
        self.serving(peer, &mut report, now);
        if plaintext {
            report.state = State::Plain;
        }
        if let Some(refusal) = &known.refusal {
            report.reason = Some(format!(
                "the newest lease is refused, its last good one serves: {refusal}"
            ));
        } else if let Some(since) = known.vanished {
            // It is let go before it counts as silent.
            report.silent = None;
            report.reason = Some(format!(
                "its lease is gone from the store for {} s, and it is served while it answers: look at the store; to \
                 let it go, stop its daemon",
                now.saturating_sub(since).as_secs()
            ));
        }
        if let Some(narrow) = self.too_narrow(peer) {
            also(&mut report.reason, &narrow);
        }
        for (key, object) in &self.desired(&Scope::Peer(name.clone())) {
            let (Key::Sa(id), Object::Sa { sa, .. }) = (key, object) else {
                continue;
            };
            let Some(count) = counters.get(id) else { continue };
            if let Some(percent) = nearly_spent(&sa.limits, count) {
                let spent = format!(
                    "SA {} has carried {percent} % of what the kernel lets it, and the peer has not moved to a newer \
                     epoch: does it see this node's lease?",
                    keys::Spi(id.spi)
                );
                also(&mut report.reason, &spent);
            }
            if super::sender(id) == self.held.map(|(_, slot)| slot) {
                report.bytes_out += count.bytes;
                report.packets_out += count.packets;
            } else {
                report.bytes_in += count.bytes;
                report.packets_in += count.packets;
            }
            report.errors += count.errors;
        }
        report
    }

    fn serving(&self, peer: &Peer, report: &mut PeerReport, now: Duration) {
        let newest = peer.pair.newest();
        let data = self.data(peer);
        let on = data.or_else(|| newest.and_then(|newest| Some((newest, *self.open(peer, newest).first()?))));
        let path = on.and_then(|(generation, carrier)| self.path(peer, generation, carrier));
        let spi = |slot, generation, carrier| Some(ipsec::spi(slot, generation, carrier).to_string());
        let own_slot = self.held.map(|(_, slot)| slot);
        (report.state, report.reason) = match peer.pair.data() {
            Data::On(_) if data.is_none() => (State::Waiting, Some(self.why_waiting(peer, newest))),
            Data::On(generation) if Some(generation) == newest => (State::Up, None),
            Data::On(_) => (State::Moving, None),
            Data::Inherited(_) => (
                State::Kept,
                Some("keys of an earlier process, until a probe comes back".into()),
            ),
            Data::Held => (State::Waiting, Some(self.why_waiting(peer, newest))),
        };
        if let Some((generation, carrier)) = data {
            report.generation = Some(generation.to_string());
            report.spi_out = own_slot.and_then(|slot| spi(slot, generation, carrier));
            if self.open(peer, generation).len() > 1 {
                report.detour = peer.choice.plain_silent(now).map(|silent| match silent.as_secs() {
                    0 => "plain ESP is answered again, and has to go on so for a while".to_owned(),
                    silent => format!("plain ESP has not been answered for {silent} s"),
                });
            }
        }
        if let Data::Inherited(id) = peer.pair.data() {
            report.spi_out = Some(keys::Spi(id.spi).to_string());
        }
        report.newest = newest
            .filter(|_| report.state != State::Up)
            .map(|newest| newest.to_string());
        // On which of two carriers the peer sends it does not say.
        report.spi_in = peer.pair.said().and_then(|said| match self.open(peer, said.reverse()) {
            [only] => spi(peer.slot, said, *only),
            _ => None,
        });
        report.encap = path.map(|path| if path.udp.is_some() { "udp" } else { "esp" }.into());
        if let Some(path) = path {
            report.address = path.remote.to_string();
        }
        report.learned = self.in_udp(peer).and_then(|(stated, used)| {
            let learned = peer.mapping.newest(stated.ip()).filter(|at| *at != stated)?;
            Some(match learned == used {
                true => learned.to_string(),
                false => format!("{learned}, from the next epoch on"),
            })
        });
        report.heard = peer.heard().map(|heard| now.saturating_sub(heard).as_secs_f64());
        report.round_trip = peer.round_trip.map(|time| time.as_secs_f64() * 1000.0);
        report.loss = peer.record.share();
        report.unanswered = peer.record.unanswered();
        report.full_size = peer.sizes.passes();
        if let Some(silence) = self.silence(peer, now) {
            report.silent = Some(silence.comes());
            report.reason = Some(silence.to_string());
        }
        if let Some(trouble) = &peer.trouble {
            report.reason = Some(trouble.clone());
        }
    }

    fn why_waiting(&self, peer: &Peer, newest: Option<Generation>) -> String {
        let Some(newest) = newest else {
            return "this node has no epoch yet".into();
        };
        let carrier = self.open(peer, newest).first().copied().unwrap_or(Carrier::Esp);
        if self.path(peer, newest, carrier).is_none() {
            let theirs = peer
                .epochs
                .get(&newest.receiver)
                .map(|epoch| epoch.statement.addresses.as_slice());
            let theirs = theirs
                .unwrap_or_default()
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
                .join(" ");
            let ours = self
                .uplink
                .as_ref()
                .map(|uplink| uplink.public.to_string())
                .unwrap_or_default();
            return Refusal::NoCommonFamily { theirs, ours }.to_string();
        }
        if self.association(peer, newest, xfrm::Direction::Out, carrier).is_none() {
            return "no common PSK with its newest epoch: give both nodes the same key".into();
        }
        "no probe came back yet: is its daemon running, does it see this node's lease, does ESP (or UDP) pass?".into()
    }
}

/// Puts one more reason behind what is there.
fn also(reason: &mut Option<String>, more: &str) {
    let before = reason.take().map(|reason| reason + "; ");
    *reason = Some(before.unwrap_or_default() + more);
}

/// How much of its hard limit an SA has carried, percent, where it is more than half way there from the soft one.
fn nearly_spent(limits: &Limits, count: &Counters) -> Option<u64> {
    let spent = |count: u64, soft: u64, hard: u64| {
        let percent = u64::try_from(u128::from(count) * 100 / u128::from(hard.max(1))).unwrap_or(u64::MAX);
        (count >= soft.saturating_add(hard.saturating_sub(soft) / 2)).then_some(percent)
    };
    let packets = spent(count.packets, limits.soft_packets, limits.hard_packets);
    packets.max(spent(count.bytes, limits.soft_bytes, limits.hard_bytes))
}

fn mode(mode: keys::EncapMode) -> &'static str {
    match mode {
        keys::EncapMode::Esp => "false",
        keys::EncapMode::Udp => "true",
        keys::EncapMode::Auto => "auto",
    }
}
