//! The node's decisions: inputs go in as events, desired kernel state comes out as values. No I/O, no clock.
//!
//! [`Node`] holds what this process knows of itself and of every peer: own epochs with their secrets, the peers'
//! verified statements, one [`Pair`] a peer, and the keys derived for it. Events mark scopes dirty; [`Node::desired`]
//! says what the kernel should hold for a scope; [`Node::key`] hands out the key of an SA that is about to be made,
//! a sending one once and never again.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use keys::{Carrier, Encoded, Epoch, EpochSecret, Inbound, Outbound, ProbeKey, PublicKey, SaKey, Slot, Statement};
use litemap::LiteMap;
use xfrm::{Sa, SaId};

use crate::admission::{self, Admitted, Claims, Refusal};
use crate::backend::Plain;
use crate::backend::ipsec::Soft;
use crate::carrier::Choice;
use crate::epochs::{Generation, Inherited, Pair, Rollback};
use crate::histogram::Histogram;
use crate::kernel::{Objects, Scope};
use crate::lease::{Lease, NodeName, Subnets};
use crate::packed::pack;
use crate::probe::arrivals::Arrivals;
use crate::probe::loss::Record;
use crate::probe::size::Sizes;
use crate::probe::{self, Schedule};
use crate::uplink::Uplink;

mod keyring;
mod left;
mod nat;
mod own;
pub mod pace;
pub mod plain;
mod plan;
mod probes;
mod psks;
pub mod report;
mod rotations;
mod settings;
pub mod silence;
mod sizes;
mod traffic;
mod vanished;

use left::{Leftover, leftovers};
use nat::{Learned, Mapping};
pub use pace::Cause;
use pace::Pace;
pub use psks::PskReport;
use psks::Psks;
pub(crate) use psks::some;
pub use rotations::Rotations;
pub use settings::Settings;
pub use traffic::{Carried, End, Flow, Headroom, Traffic};

/// One life of our ephemeral key.
#[derive(Debug)]
struct OwnEpoch {
    secret: EpochSecret,
    statement: Statement,
    encoded: Encoded,
    /// Where the kernel sends from and receives: behind a NAT not the public addresses.
    local: crate::lease::Addresses,
    /// The limits of its SAs, which an SA keeps as it was made.
    soft: Soft,
    begun: Duration,
    /// When it is old enough to be followed by another.
    ages: Duration,
}

/// The keys of one pair of epochs.
#[derive(Debug)]
struct Keys {
    outbound: Sending,
    inbound: Inbound,
    probe: ProbeKey,
}

/// Sending keys on their way to their one use.
#[derive(Debug)]
enum Sending {
    Fresh(Box<Outbound>),
    /// Made, and not handed out yet, or refused by the kernel before any use; what is not here is spent.
    Made(LiteMap<Carrier, SaKey>),
}

/// Which way an SA is used.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Way {
    In,
    Out,
}

/// A peer that is served.
#[derive(Debug)]
struct Peer {
    slot: Slot,
    subnets: Subnets,
    /// Its statements. Here and below a flat map: there are one or two, and a tree has room for eleven from its first on.
    epochs: LiteMap<Epoch, Arc<Admitted>>,
    pair: Pair,
    /// By the sending generation.
    keys: LiteMap<Generation, Box<Keys>>,
    leftovers: BTreeMap<SaId, Sa>,
    /// On which carriers the kernel has a generation's SA.
    made: Vec<(Generation, Way, Carrier)>,
    /// SAs that another hand took, whose twin on the other carrier stays until a new epoch follows.
    torn: BTreeSet<(Generation, Way, Carrier)>,
    /// What our data takes where both carriers are open.
    choice: Choice,
    mapping: Mapping,
    schedule: Schedule,
    /// Under which time it stands among what is due.
    queued: Option<Duration>,
    /// The last question on each carrier: its number, what it said of our data, when it was sent.
    asked: LiteMap<Carrier, (u64, Option<Generation>, Duration)>,
    round_trip: Option<Duration>,
    /// Of the questions that went as our data does.
    record: Record,
    arrivals: Arrivals,
    sizes: Sizes,
    trouble: Option<String>,
}

/// So many of the last questions to a peer without an answer are a loss to look after; one is chance.
const FEW: u32 = 2;

impl Peer {
    /// Whether its answers come. While they do not it is asked often: what was lost is soon history, or news.
    fn answers(&self) -> bool {
        self.record.is_answered() && self.record.lost().0 < FEW
    }

    /// When it was last heard, by its probes or its data.
    fn heard(&self) -> Option<Duration> {
        self.pair.heard().max(self.arrivals.heard())
    }

    /// Whether the kernel has a generation's SA on any carrier.
    fn has_made(&self, generation: Generation, way: Way) -> bool {
        self.made.iter().any(|(g, w, _)| (*g, *w) == (generation, way))
    }
}

/// What a store holds under a node's name, and what came of it.
#[derive(Debug)]
struct Known {
    lease: Arc<Lease>,
    admitted: Option<Arc<Admitted>>,
    /// The lease that what is admitted was read from.
    proof: Option<Arc<Lease>>,
    /// By itself: hardly any lease is refused.
    refusal: Option<Box<Refusal>>,
    /// Whether the store has the lease now.
    stored: bool,
    /// Since when the lease that was admitted is gone, where the peer is served on.
    vanished: Option<Duration>,
}

impl Known {
    fn says(&self, other: &Admitted) -> bool {
        self.admitted
            .as_ref()
            .is_some_and(|held| held.encoded.as_bytes() == other.encoded.as_bytes())
    }

    /// Whether its newest lease says that it has no PSK of ours, also where an earlier one serves.
    fn lacks_psk(&self) -> bool {
        let refusal = self.refusal.as_deref();
        matches!(refusal, Some(Refusal::NoCommonPsk { .. } | Refusal::PskDropped { .. }))
    }
}

/// A probe to send.
#[derive(Clone, Debug)]
pub struct Datagram {
    /// The peer's base address.
    pub to: IpAddr,
    /// The sealed probe.
    pub bytes: [u8; probe::LEN],
    /// The generation that it names, and so must be carried on.
    pub sent: Generation,
    /// The generation that it says our data goes on.
    pub data: Option<Generation>,
    /// What it is to travel in.
    pub carrier: Carrier,
    /// The subnets that this data is for.
    pub subnets: Subnets,
    /// How many zeros follow it, so that its packet has the size that is asked about.
    pub padding: usize,
}

impl Datagram {
    /// What goes out: the probe and its zeros.
    pub fn payload(&self) -> Cow<'_, [u8]> {
        if self.padding == 0 {
            return Cow::Borrowed(&self.bytes);
        }
        let mut padded = self.bytes.to_vec();
        padded.resize(probe::LEN + self.padding, 0);
        Cow::Owned(padded)
    }
}

/// Everything the node knows and decides.
#[derive(Debug)]
pub struct Node {
    settings: Settings,
    uplink: Option<Uplink>,
    held: Option<(Subnets, Slot)>,
    psks: Psks,
    own: BTreeMap<Epoch, OwnEpoch>,
    known: BTreeMap<NodeName, Known>,
    claims: Claims,
    /// What peers claimed whose leases have vanished and that are served on.
    bygone: Claims,
    peers: BTreeMap<NodeName, Box<Peer>>,
    bases: BTreeMap<IpAddr, NodeName>,
    due: BTreeSet<(Duration, NodeName)>,
    leftovers: BTreeMap<Slot, Leftover>,
    /// Peers' public keys towards which a sending key of our epoch was handed out.
    spent: BTreeMap<Epoch, BTreeSet<PublicKey>>,
    pace: Pace,
    /// What an unencrypted backend keeps.
    open: plain::Leased,
    ticket: u64,
    /// The round trips of all answered probes, seconds.
    answered: Histogram,
    /// Questions that were left out.
    left_out: u64,
    /// When it was last told what the kernel counts.
    looked: Duration,
    tidied: Duration,
    dirty: BTreeSet<Scope>,
}

impl Node {
    /// A node that knows nothing yet but its settings and what is `left` in the kernel by an earlier process.
    pub fn new(settings: Settings, left: &Objects) -> Self {
        let mut node = Self {
            settings,
            uplink: None,
            held: None,
            psks: Psks::default(),
            own: BTreeMap::new(),
            known: BTreeMap::new(),
            claims: Claims::default(),
            bygone: Claims::default(),
            peers: BTreeMap::new(),
            bases: BTreeMap::new(),
            due: BTreeSet::new(),
            leftovers: leftovers(left),
            spent: BTreeMap::new(),
            pace: Pace::default(),
            open: plain::Leased::of(left),
            ticket: 0,
            answered: Histogram::new(probes::ROUND_TRIPS),
            left_out: 0,
            looked: Duration::ZERO,
            tidied: Duration::ZERO,
            dirty: BTreeSet::from([Scope::Node]),
        };
        node.want(Cause::Start);
        node
    }

    /// The settings in force.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Takes new settings. The Network can't change while the node lives; the caller refuses that. True where encryption
    /// begins or ends with it, or plaintext peers are allowed or no longer: then every lease is to be told anew ([`Node::leased`]) before the next pass.
    pub fn configure(&mut self, settings: Settings) -> bool {
        if settings == self.settings {
            return false;
        }
        let switches = settings.plain.is_some() != self.settings.plain.is_some();
        let opens = settings.plaintext != self.settings.plaintext;
        self.everything_dirty();
        self.settings = settings;
        if opens {
            self.open.clear();
            self.everything_dirty();
        }
        if switches {
            for name in self.peers.keys().cloned().collect::<Vec<_>>() {
                self.drop_peer(&name);
            }
            self.known.clear();
            self.open.clear();
            self.own.clear();
            (self.claims, self.bygone) = Default::default();
            self.want(Cause::Changed);
        }
        self.check_statement();
        switches || opens
    }

    /// The uplink is this now.
    pub fn uplinked(&mut self, uplink: Uplink) {
        if self.uplink.as_ref() != Some(&uplink) {
            self.uplink = Some(uplink);
            self.everything_dirty();
            self.check_statement();
        }
    }

    /// This node holds `subnets`.
    pub fn holds(&mut self, subnets: Subnets, slot: Slot) {
        if self.held != Some((subnets, slot)) {
            self.held = Some((subnets, slot));
            self.everything_dirty();
            self.check_statement();
        }
    }

    /// Gives up the room that many new leases left empty.
    pub fn pack(&mut self) {
        pack(&mut self.known);
        pack(&mut self.peers);
        pack(&mut self.bases);
        self.claims.pack();
    }

    /// The lease of `name` is this now; `None` where it is gone.
    pub fn leased(&mut self, name: &NodeName, lease: Option<&Arc<Lease>>, now: Duration) {
        if *name == self.settings.name {
            return;
        }
        if self.settings.plain.is_some() {
            return self.leased_plain(name, lease);
        }
        let allowed = self.settings.plaintext.as_ref().map(Plain::lease_type);
        if allowed.is_some() {
            self.claim(name, lease);
        }
        let touched = match lease {
            None => self.vanish(name, now),
            Some(lease) => {
                let verdict = admission::verify(lease, &self.settings.network, self.psks.all());
                let known = self.known.entry(name.clone()).or_insert_with(|| Known {
                    lease: lease.clone(),
                    admitted: None,
                    proof: None,
                    refusal: None,
                    stored: true,
                    vanished: None,
                });
                (known.lease, known.stored) = (lease.clone(), true);
                match verdict {
                    Ok(admitted) => {
                        let admitted = Arc::new(admitted);
                        known.refusal = None;
                        let newest = known.admitted.as_ref().map(|held| held.statement.epoch);
                        match newest {
                            Some(newest) if admitted.statement.epoch < newest => {
                                let seen = admitted.statement.epoch;
                                known.refusal = Some(Box::new(Rollback { seen, newest }.into()));
                                BTreeSet::new()
                            }
                            Some(newest) if admitted.statement.epoch == newest && !known.says(&admitted) => {
                                known.refusal = Some(Box::new(Refusal::Rewritten(newest)));
                                BTreeSet::new()
                            }
                            _ => {
                                let touched = self.claims.set(name, Some((&admitted.statement, admitted.slot)));
                                (known.admitted, known.proof) = (Some(admitted.clone()), Some(lease.clone()));
                                known.vanished = None;
                                self.bygone.set(name, None);
                                self.make_way(&admitted.statement, admitted.slot);
                                touched
                            }
                        }
                    }
                    // It has gone back to plaintext, or never was without.
                    Err(Refusal::Backend(_)) if allowed == Some(lease.backend.as_str()) => {
                        (known.admitted, known.proof, known.refusal) = (None, None, None);
                        known.vanished = None;
                        self.bygone.set(name, None);
                        self.claims.set(name, None)
                    }
                    Err(refusal) => {
                        known.refusal = Some(Box::new(self.psks.explain(refusal)));
                        BTreeSet::new()
                    }
                }
            }
        };
        self.dirty.extend(allowed.is_some().then(|| Scope::Peer(name.clone())));
        self.reconsider(name, now);
        for other in touched {
            self.reconsider(&other, now);
        }
        self.give_way(name);
    }

    /// Serves a node or stops serving it, by what is known of it.
    fn reconsider(&mut self, name: &NodeName, now: Duration) {
        if *name == self.settings.name {
            return;
        }
        let conflict = self.claims.conflict(name);
        let admitted = match self.known.get_mut(name) {
            Some(known) if conflict.is_none() => {
                known
                    .refusal
                    .take_if(|refusal| matches!(**refusal, Refusal::Conflict { .. }));
                known.admitted.clone()
            }
            Some(known) => {
                known.refusal = conflict.map(Box::new);
                None
            }
            None => None,
        };
        match admitted {
            Some(admitted) => self.serve(name, admitted, now),
            None => self.drop_peer(name),
        }
    }

    fn serve(&mut self, name: &NodeName, admitted: Arc<Admitted>, now: Duration) {
        if self.peers.get(name).is_some_and(|peer| peer.slot != admitted.slot) {
            self.drop_peer(name);
        }
        let public = admitted.statement.public;
        if !self.peers.contains_key(name) {
            let returned = |epoch: &Epoch| self.spent.get(epoch).is_some_and(|keys| keys.contains(&public));
            let fit: Vec<Epoch> = self.own.keys().filter(|epoch| !returned(epoch)).copied().collect();
            if self.own.keys().next_back().is_some_and(returned) {
                self.want(Cause::Returned);
            }
            let left = self.leftovers.remove(&admitted.slot).unwrap_or_default();
            let own_slot = self.slot();
            let used = left.data.and_then(|id| left.sas.get(&id));
            let learned = used.and_then(|sa| Learned::inherited(sa, &admitted.statement));
            let mapping = Mapping::new(learned, &fit);
            let presumed = used.map(|sa| if sa.encap.is_some() { Carrier::Udp } else { Carrier::Esp });
            let inbound = left.sas.keys().filter(|id| sender(id) != own_slot).copied().collect();
            let inherited = Inherited {
                inbound,
                data: left.data,
            };
            let subnets = admitted.statement.subnets.iter().copied().collect::<Subnets>();
            for base in subnets.bases().iter() {
                self.bases.insert(base, name.clone());
            }
            let peer = Peer {
                slot: admitted.slot,
                subnets,
                epochs: LiteMap::with_capacity(1),
                pair: Pair::new(fit, inherited),
                keys: LiteMap::with_capacity(1),
                leftovers: left.sas,
                made: Vec::with_capacity(2),
                torn: BTreeSet::new(),
                choice: Choice::new(presumed),
                mapping,
                schedule: Schedule::at_once(now),
                queued: None,
                asked: LiteMap::with_capacity(1),
                round_trip: None,
                record: Record::default(),
                arrivals: Arrivals::default(),
                sizes: Sizes::default(),
                trouble: None,
            };
            self.peers.insert(name.clone(), Box::new(peer));
        }
        let peer = self.peers.get_mut(name).expect("it was just put in");
        let epoch = admitted.statement.epoch;
        if peer.epochs.contains_key(&epoch) {
            return;
        }
        if let Err(rollback) = peer.pair.peer_epoch(epoch) {
            if let Some(known) = self.known.get_mut(name) {
                known.refusal = Some(Box::new(rollback.into()));
            }
            return;
        }
        peer.epochs.insert(epoch, admitted);
        self.retimed(name, |peer| peer.schedule = Schedule::at_once(now));
        self.dirty.insert(Scope::Peer(name.clone()));
    }

    fn drop_peer(&mut self, name: &NodeName) {
        if let Some(peer) = self.peers.remove(name) {
            for base in peer.subnets.bases().iter() {
                self.bases.remove(&base);
            }
            self.contend(&peer.subnets);
            if let Some(queued) = peer.queued {
                self.due.remove(&(queued, name.clone()));
            }
            // What an earlier process left may serve again if the peer comes back before it is swept.
            let sas = peer
                .leftovers
                .into_iter()
                .filter(|(id, _)| peer.pair.inherited().inbound.contains(id))
                .collect();
            self.leftovers.insert(peer.slot, Leftover { sas, data: None });
            self.dirty.insert(Scope::Peer(name.clone()));
        }
    }

    /// Takes the scopes whose desired state may have changed.
    pub fn take_dirty(&mut self) -> BTreeSet<Scope> {
        std::mem::take(&mut self.dirty)
    }

    /// Marks `scope` for a new look.
    pub fn mark(&mut self, scope: Scope) {
        self.dirty.insert(scope);
    }

    /// The own slot, once there is a lease.
    pub fn slot(&self) -> Option<Slot> {
        self.held.map(|(_, slot)| slot)
    }

    /// The own base address of the family that `like` is of.
    pub fn base(&self, like: IpAddr) -> Option<IpAddr> {
        self.held?.0.bases().of_family(like)
    }

    /// The own subnets, once there is a lease.
    pub fn subnets(&self) -> Option<Subnets> {
        self.held.map(|(subnets, _)| subnets)
    }

    /// The uplink, once there is one.
    pub fn uplink(&self) -> Option<&Uplink> {
        self.uplink.as_ref()
    }

    /// The names of the nodes by slot, this one's included.
    pub fn slots(&self) -> BTreeMap<Slot, NodeName> {
        let own = self.slot().map(|slot| (slot, self.settings.name.clone()));
        self.peers
            .iter()
            .map(|(name, peer)| (peer.slot, name.clone()))
            .chain(own)
            .collect()
    }

    /// The leases that are refused, each with the reason.
    pub fn refusals(&self) -> impl Iterator<Item = (&NodeName, &Refusal)> {
        self.known
            .iter()
            .filter_map(|(name, known)| Some((name, known.refusal.as_deref()?)))
    }

    /// Every other node that the store has a lease of.
    pub fn known(&self) -> impl Iterator<Item = NodeName> {
        self.known.keys().cloned()
    }

    /// Marks everything for a new look.
    pub fn everything_dirty(&mut self) {
        self.dirty.insert(Scope::Node);
        self.dirty.extend(self.peers.keys().cloned().map(Scope::Peer));
        if self.settings.plaintext.is_some() {
            self.dirty.extend(self.known.keys().cloned().map(Scope::Peer));
        }
        if self.plain().is_some() {
            self.dirty.extend(self.known.keys().cloned().map(Scope::Peer));
            // What was left while this was not known yet can be told now.
            self.dirty.insert(Scope::Orphans);
        }
    }

    /// Whether all that this node wants is known, so that what nobody wants is nobody's: for ipsec only with an epoch,
    /// before which no peer is planned.
    pub fn settled(&self) -> bool {
        match self.plain() {
            Some(_) => self.held.is_some() && self.uplink.is_some(),
            None => self.epoch().is_some(),
        }
    }

    /// The kernel holds an SA of this process that it did not hold before.
    pub fn made(&mut self, name: &NodeName, sa: &SaId, born: Generation, now: Duration) {
        let (way, sending) = if sender(sa) == self.slot() {
            (Way::Out, born)
        } else {
            (Way::In, born.reverse())
        };
        let Ok(parts) = keys::Spi(sa.spi).parts() else { return };
        let Some(open) = self.peers.get(name).map(|peer| self.open(peer, sending)) else {
            return;
        };
        if let Some(peer) = self.peers.get_mut(name) {
            let before = (peer.pair.probe(), peer.pair.data());
            if !peer.made.contains(&(born, way, parts.carrier)) {
                peer.made.push((born, way, parts.carrier));
            }
            let whole = open.iter().all(|carrier| peer.made.contains(&(born, way, *carrier)));
            match way {
                // Also where its twin was refused: what is half made is not to be forgotten.
                Way::Out if !whole => peer.pair.programmed(born),
                Way::Out => peer.pair.sent(born),
                Way::In if !whole => {}
                Way::In => peer.pair.installed(born),
            }
            if (peer.pair.probe(), peer.pair.data()) != before {
                self.retimed(name, |peer| peer.schedule = Schedule::at_once(now));
            }
            self.dirty.insert(Scope::Peer(name.clone()));
        }
    }

    /// An SA is gone from the kernel by another's hand, or by its limit.
    pub fn lost(&mut self, name: &NodeName, sa: &SaId, born: Option<Generation>) {
        let own_slot = self.slot();
        let Some(peer) = self.peers.get_mut(name) else { return };
        let mends = match (born, keys::Spi(sa.spi).parts()) {
            (Some(generation), Ok(parts)) => {
                let way = if Some(parts.slot) == own_slot {
                    Way::Out
                } else {
                    Way::In
                };
                let known = peer.has_made(generation, way);
                peer.made.retain(|made| *made != (generation, way, parts.carrier));
                if peer.has_made(generation, way) {
                    // Its twin serves until a new epoch follows.
                    peer.torn.insert((generation, way, parts.carrier));
                    true
                } else {
                    match way {
                        Way::Out => peer.pair.lost_sending(generation),
                        Way::In => peer.pair.lost_receiving(generation) || known,
                    }
                }
            }
            _ => {
                peer.pair.lost_inherited(sa);
                false
            }
        };
        if mends {
            self.want(Cause::Lost);
        }
        self.dirty.insert(Scope::Peer(name.clone()));
    }

    /// The last pass left this trouble for a peer, or none.
    pub fn troubled(&mut self, name: &NodeName, trouble: Option<String>) {
        if self.plain().is_some() || !self.peers.contains_key(name) {
            return self.open.troubled(name, trouble);
        }
        if let Some(peer) = self.peers.get_mut(name) {
            peer.trouble = trouble;
        }
    }
}

/// The slot of the node that sends on an SA.
fn sender(id: &SaId) -> Option<Slot> {
    keys::Spi(id.spi).parts().ok().map(|parts| parts.slot)
}
