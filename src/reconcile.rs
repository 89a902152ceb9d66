//! The reconciler: what is dirty is planned, compared with the kernel and written, in order, scope by scope.
//!
//! One pass is synchronous. The first failure in a peer's scope ends that scope for the pass, so that a failed SA is
//! never followed by the removal of the old one; the other peers go on. A failure in the node's scope stops the peers
//! too: without the guard nothing is opened. A scope that failed is tried again, backing off. What is ours by its mark
//! and wanted by nobody is swept, but only once the roster is complete.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use keys::{Carrier, Epoch, EpochSecret, Spi};
use ring::rand::SecureRandom;
use tracing::{debug, error, info, warn};
use xfrm::SaId;

use crate::backend::ipsec;
use crate::kernel::{
    Counters, Datapath, Event, Key, Kind, Look, Object, Objects, Op, Refused, Scope, Write, WriteError, diff, order,
    reqid_slot,
};
use crate::lease::{Completeness, NodeName};
use crate::node::report::Report;
use crate::node::{Cause, Datagram, End, Headroom, Node, Traffic, some};

/// The first wait before a failed scope is tried again; it doubles up to [`SLOWEST`].
const FIRST: Duration = Duration::from_millis(20);
/// The longest such wait.
const SLOWEST: Duration = Duration::from_secs(30);
/// A scope that still fails after this wait is an error in the log, not a warning.
const LOUD: Duration = Duration::from_millis(300);
/// So many of the 64 numbers that tell a node's epochs apart in the kernel are left to what forces a new one; who asks
/// for one gets none of them.
const RESERVED: usize = 8;
/// A peer for whose sake more epochs than these are kept has not moved for a while.
const FEW: usize = 8;
/// The longest wait between two readings of the whole kernel where notifications go on being lost.
const RARELY: Duration = Duration::from_secs(5);
/// So many operations a batch at most: their messages, and a second copy of them, are in memory at one time.
const BATCH: usize = 512;
/// So many rounds a pass at most: each lets what the one before made known take effect.
const ROUNDS: usize = 8;

#[derive(Clone, Debug)]
struct Failing {
    error: String,
    wait: Duration,
    next: Duration,
}

/// When the whole kernel may be read anew after notifications were lost: it costs what the mesh is large.
#[derive(Clone, Copy, Debug, Default)]
struct Reread {
    /// Not before this.
    due: Duration,
    /// The wait after the next one.
    wait: Duration,
    /// Whether the last one failed: what is there is not known then.
    failed: bool,
}

impl Reread {
    /// One was done at `now`. Each that follows soon waits twice as long.
    fn done(&mut self, now: Duration, failed: bool) {
        let soon = now <= self.due + self.wait * 2;
        self.wait = if soon {
            (self.wait * 2).clamp(FIRST, RARELY)
        } else {
            FIRST
        };
        self.due = now + self.wait;
        self.failed = failed;
    }
}

/// The node, its kernel, and what is known of either.
#[derive(Debug)]
pub struct Reconciler<D> {
    /// The node's decisions.
    pub node: Node,
    kernel: D,
    actual: Objects,
    owner: BTreeMap<Key, Scope>,
    /// In their order. A list: a set has room for eleven keys from its first on, in every scope.
    owned: BTreeMap<Scope, Vec<Key>>,
    failing: BTreeMap<Scope, Failing>,
    /// Peers whose SA would be another's, of this pass.
    alike: BTreeMap<Scope, String>,
    complete: bool,
    stale: bool,
    reread: Reread,
    /// What another hand changed or took, until it is put right; without SAs, which a new epoch replaces.
    drifted: BTreeSet<Key>,
    tally: Tally,
}

/// What a reconciler has done since it began.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Tally {
    /// Passes that had something to plan.
    pub passes: u64,
    /// Operations given to the kernel.
    pub writes: u64,
    /// Of those, which the kernel did not carry out, or may not have.
    pub failures: u64,
    /// Objects that another hand had changed, made or taken, and that are as they should be again.
    pub repaired: u64,
}

impl<D: Datapath> Reconciler<D> {
    /// Reads the kernel; `node` is made from what an earlier process left there.
    pub fn new(mut kernel: D, node: impl FnOnce(&Objects) -> Node) -> Result<Self, WriteError> {
        let actual = kernel.dump()?;
        Ok(Self {
            node: node(&actual),
            kernel,
            actual,
            owner: BTreeMap::new(),
            owned: BTreeMap::new(),
            failing: BTreeMap::new(),
            alike: BTreeMap::new(),
            complete: false,
            stale: false,
            reread: Reread::default(),
            drifted: BTreeSet::new(),
            tally: Tally::default(),
        })
    }

    /// Whether the roster shows all there is: only then is what nobody wants swept.
    pub fn completed(&mut self, completeness: Completeness) {
        let complete = completeness == Completeness::Complete;
        if complete && !self.complete {
            self.node.mark(Scope::Orphans);
        }
        self.complete = complete;
    }

    /// Looks at the packet filter where it tells nobody of changes.
    pub fn look_at_filter(&mut self, look: Look) {
        if !self.kernel.filter_stands(look) {
            self.notice(Event::Gone(Key::Firewall));
        }
    }

    /// Whether the packet filter tells of changes by itself; if not, [`Reconciler::look_at_filter`] is to be called.
    pub fn filter_tells(&self) -> bool {
        self.kernel.filter_tells()
    }

    /// What the kernel holds of ours, as far as is known.
    pub fn actual(&self) -> &Objects {
        &self.actual
    }

    /// The kernel itself.
    pub fn kernel(&mut self) -> &mut D {
        &mut self.kernel
    }

    /// How many operations were written so far.
    pub fn writes(&self) -> u64 {
        self.tally.writes
    }

    /// What was done so far.
    pub fn tally(&self) -> Tally {
        self.tally
    }

    /// Whether the kernel answers: one small request, however many peers there are.
    pub fn answers(&mut self) -> Result<(), WriteError> {
        self.kernel.answers()
    }

    /// What every scope wants now.
    pub fn desired(&self) -> Objects {
        let peers = self.owned.keys().filter(|scope| matches!(scope, Scope::Peer(_)));
        let scopes = std::iter::once(&Scope::Node).chain(peers);
        scopes.flat_map(|scope| self.node.desired(scope)).collect()
    }

    /// What fails at present, by scope.
    pub fn failures(&self) -> impl Iterator<Item = (&Scope, &str)> {
        self.failing
            .iter()
            .map(|(scope, failing)| (scope, failing.error.as_str()))
    }

    /// Why a scope fails at present, if it does.
    pub fn failure(&self, scope: &Scope) -> Option<&str> {
        self.failing.get(scope).map(|failing| failing.error.as_str())
    }

    /// The counters of our SAs: one dump.
    pub fn counters(&mut self) -> BTreeMap<SaId, Counters> {
        self.kernel.counters().unwrap_or_else(|error| {
            warn!(%error, "the SAs' counters can't be read");
            BTreeMap::new()
        })
    }

    /// How the node and its peers stand at `now`, and how near its SAs are to their limits, with what they carried taken
    /// into `traffic`. One dump. `opened` is when `traffic` was new, seconds since 1970.
    pub fn read(&mut self, traffic: &mut Traffic, opened: u64, now: Duration) -> (Report, Option<Headroom>) {
        let counters = self.counters();
        let report = self.node.report(&counters, now);
        let headroom = Headroom::of(&self.actual, &counters);
        traffic.read(counters, opened, |id| self.end(id));
        traffic.keep(|name| self.node.knows(name));
        (report, headroom)
    }

    /// The other end of an SA that a peer's scope has.
    fn end(&self, id: &SaId) -> Option<End<'_>> {
        let Some(Scope::Peer(peer)) = self.owner.get(&Key::Sa(*id)) else {
            return None;
        };
        let sender = Spi(id.spi).parts().ok()?.slot;
        Some(End {
            peer,
            sends: Some(sender) == self.node.slot(),
        })
    }

    /// When the next pass has something to do of its own accord.
    pub fn deadline(&self) -> Option<Duration> {
        let tries = self.failing.values().map(|failing| failing.next);
        tries.chain(self.stale.then_some(self.reread.due)).min()
    }

    /// Whether `datagram` tells the truth: the kernel carries it on the generation that it names and on no other, and
    /// data on the one that it says, on whatever carrier. The peer drops what it believes is no longer sent on.
    pub fn carries(&self, datagram: &Datagram) -> bool {
        let (Some(own), Some(slot)) = (self.node.base(datagram.to), self.node.slot()) else {
            return false;
        };
        let through = |id| {
            let Some(Object::Policy(policy)) = self.actual.get(&Key::Policy(id)) else {
                return None;
            };
            policy.template.as_ref().map(|template| Spi(template.spi))
        };
        let mut subnets = datagram.subnets.iter();
        let on = |generation, carrier| Some(ipsec::spi(slot, generation, carrier));
        let probe = ipsec::probe_policy(own, datagram.to, datagram.carrier);
        through(probe) == on(datagram.sent, datagram.carrier)
            && datagram.data.is_none_or(|data| {
                subnets.all(|subnet| {
                    let spi = through(ipsec::data_policy(subnet));
                    spi.map(|spi| spi.over(Carrier::Esp)) == on(data, Carrier::Esp)
                })
            })
    }

    /// Takes what a notification says.
    pub fn notice(&mut self, event: Event) {
        match event {
            Event::Observed(key, object) => self.observed(key, object),
            Event::Gone(key) => self.gone(&key),
            Event::AllGone(kind) => {
                let keys: Vec<Key> = self.actual.keys().filter(|key| key.kind() == kind).cloned().collect();
                if !keys.is_empty() {
                    warn!(?kind, count = keys.len(), "flushed by another hand");
                }
                for key in keys {
                    self.forget(&key);
                }
            }
            Event::SoftLimit(id) => {
                if !self.actual.contains_key(&Key::Sa(id)) {
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
                if let Some(Scope::Peer(name)) = self.owner.get(&Key::Sa(id)) {
                    self.node.moved(name, source);
                }
            }
            Event::Overrun => self.stale = true,
        }
    }

    fn observed(&mut self, key: Key, object: Object) {
        let before = self.actual.get(&key);
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
        warn!(%key, "changed by another hand");
        self.touched(&key);
        self.actual.insert(key, object);
    }

    fn gone(&mut self, key: &Key) {
        if self.actual.contains_key(key) {
            warn!(%key, "removed by another hand or by its limit");
            self.forget(key);
        }
    }

    fn forget(&mut self, key: &Key) {
        let Some(object) = self.actual.remove(key) else { return };
        self.touched(key);
        if let Key::Link(link) = key {
            // Its addresses and routes went with it; once another device has its name, nothing tells of them.
            let hung = |other: &&Key| match other {
                Key::Address(device, _) | Key::Neighbour(device, _) | Key::Fdb(device, _) => device == link,
                other => other.kind() == Kind::Route,
            };
            for other in self.actual.keys().filter(hung).cloned().collect::<Vec<_>>() {
                self.forget(&other);
            }
        }
        if let (Key::Sa(id), Object::Sa { born, .. }, Some(Scope::Peer(name))) = (key, object, self.owner.get(key)) {
            let name = name.clone();
            self.node.lost(&name, id, born);
        }
    }

    fn touched(&mut self, key: &Key) {
        let scope = self.owner.get(key).cloned().unwrap_or(Scope::Orphans);
        self.node.mark(scope);
        if key.kind() != Kind::Sa {
            self.drifted.insert(key.clone());
        }
    }

    /// Reads the kernel anew and takes every difference as noticed.
    pub fn resync(&mut self) -> Result<(), WriteError> {
        let fresh = self.kernel.dump()?;
        self.stale = false;
        let gone: Vec<Key> = self
            .actual
            .keys()
            .filter(|key| !fresh.contains_key(*key))
            .cloned()
            .collect();
        for key in gone {
            self.gone(&key);
        }
        for (key, object) in fresh {
            if matches!((&key, self.actual.get(&key)), (Key::Sa(_), Some(_))) {
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

    /// Begins an epoch where one is wanted: the number follows `previous`, the store's, and the clock's `unix`
    /// seconds. Publish the node's lease after the next pass. Returns why it began.
    pub fn begin_epoch(
        &mut self,
        previous: Option<Epoch>,
        unix: u64,
        random: &dyn SecureRandom,
        now: Duration,
    ) -> Option<Cause> {
        let mut cause = self.node.wants_epoch(now)?;
        let taken = self.taken();
        if cause == Cause::Asked && taken.len() + RESERVED >= 64 {
            let why = format!(
                "{} epochs of this node are still in use, for peers that have not moved: {}; ask again in a few minutes",
                taken.len(),
                some(&self.node.behind(FEW))
            );
            warn!(why, "no new epoch is begun for who asks");
            self.node.decline(why);
            cause = self.node.wants_epoch(now)?;
        }
        let previous = previous.max(self.node.epoch());
        let avoided = taken.iter().copied().chain(self.node.left_to_others()).collect();
        let next = keys::next_epoch(previous, unix, &avoided).or_else(|_| keys::next_epoch(previous, unix, &taken));
        let number = match next {
            Ok(number) => number,
            Err(error) => return self.no_epoch(&error, now),
        };
        let mut jitter = [0; 2];
        let secret = EpochSecret::generate(random).and_then(|secret| {
            random.fill(&mut jitter).map_err(|_| keys::NoRandom)?;
            Ok(secret)
        });
        let secret = match secret {
            Ok(secret) => secret,
            Err(error) => return self.no_epoch(&error, now),
        };
        info!(epoch = %number, ?cause, "a new epoch begins");
        self.node
            .begin_epoch(number, secret, now, f64::from(u16::from_be_bytes(jitter)) / 65536.0);
        if self.complete {
            // What the first look could not sweep because no peer was planned yet.
            self.node.mark(Scope::Orphans);
        }
        Some(cause)
    }

    fn no_epoch(&mut self, error: &dyn std::error::Error, now: Duration) -> Option<Cause> {
        let error = chain(error);
        if self.node.stall(error.clone(), now) {
            error!(error, "no new epoch can begin; trying again");
        }
        None
    }

    /// What our own epochs' numbers are modulo 64 in every SA that the kernel holds, in every policy that names one that
    /// may be gone, and in what this process remembers: a new SA must not come to stand where an old one is still named.
    fn taken(&self) -> BTreeSet<u8> {
        let own = self.node.slot();
        let named = self.actual.values().filter_map(|object| match object {
            Object::Sa { sa, .. } => Some((sa.reqid, sa.spi)),
            Object::Policy(policy) => policy.template.map(|template| (template.reqid, template.spi)),
            _ => None,
        });
        let parts = named.filter_map(|(reqid, spi)| reqid_slot(reqid).and_then(|_| Spi(spi).parts().ok()));
        parts
            .map(|parts| {
                if Some(parts.slot) == own {
                    parts.sender_mod64
                } else {
                    parts.receiver_mod64
                }
            })
            .chain(self.node.epochs().map(Epoch::mod64))
            .chain(self.node.avoided())
            .collect()
    }

    /// Plans, compares and writes all that is dirty or due.
    pub fn pass(&mut self, now: Duration) {
        if self.stale && self.reread.due <= now {
            warn!("the kernel's notifications were lost, or an answer: reading all of it anew");
            let read = self.resync();
            self.reread.done(now, read.is_err());
            if let Err(error) = read {
                error!(error = chain(&error), "the kernel can't be read");
            }
        }
        if self.stale && self.reread.failed {
            return;
        }
        let due = self
            .failing
            .iter()
            .filter(|(_, failing)| failing.next <= now)
            .map(|(scope, _)| scope.clone());
        for scope in due.collect::<Vec<_>>() {
            self.node.mark(scope);
        }
        let mut tried = BTreeSet::new();
        for round in 0..ROUNDS {
            let mut scopes = self.node.take_dirty();
            // What failed in this pass waits for its time.
            scopes.retain(|scope| !tried.contains(scope));
            if scopes.is_empty() {
                break;
            }
            self.tally.passes += u64::from(round == 0);
            let mut ops = Vec::new();
            for scope in &scopes {
                ops.extend(self.plan(scope).into_iter().map(|op| (scope.clone(), op)));
            }
            // What has gone over to another scope in this very pass is that one's.
            ops.retain(|(scope, op)| {
                let theirs = |key| self.owner.get(key).is_some_and(|owner| owner != scope);
                !matches!(op, Op::Break(key) if theirs(key))
            });
            // Without the guard nothing is opened, also while the node's own scope waits for its next try.
            let guardless = self.failing.contains_key(&Scope::Node) && !scopes.contains(&Scope::Node);
            let many = ops.len() >= BATCH;
            let failed = self.write(order(ops), guardless, now);
            self.settle(&scopes, failed, now, &mut tried);
            if many {
                self.compact();
            }
        }
        if self.failing.is_empty() {
            // What is left is no longer wanted.
            self.drifted.clear();
        }
    }

    /// A tree that grew key by key is half empty; made of all its keys it is full.
    fn compact(&mut self) {
        self.actual = std::mem::take(&mut self.actual).into_iter().collect();
        self.owner = std::mem::take(&mut self.owner).into_iter().collect();
        self.owned = std::mem::take(&mut self.owned).into_iter().collect();
    }

    fn plan(&mut self, scope: &Scope) -> Vec<Op> {
        if *scope == Scope::Orphans {
            // Before the first epoch no peer is planned, and what an earlier process left is still in use.
            let known = self.complete && self.node.settled();
            let sweep = |key: &&Key| known && !self.owner.contains_key(*key);
            return self
                .actual
                .keys()
                .filter(sweep)
                .map(|key| Op::Break(key.clone()))
                .collect();
        }
        let mut desired = self.still_possible(scope);
        let taken: Vec<(Key, Scope)> = (desired.keys().filter(|key| matches!(key, Key::Sa(_))))
            .filter_map(|key| {
                Some((
                    key.clone(),
                    self.owner.get(key).filter(|other| *other != scope)?.clone(),
                ))
            })
            .collect();
        for (key, other) in taken {
            if self.node.desired(&other).contains_key(&key) {
                let why = format!(
                    "{key} is in use for {other}, which is at the same address and has an epoch of the same number modulo \
                     64: `ringmail rotate` on one of them"
                );
                self.alike.insert(scope.clone(), why);
                desired.remove(&key);
            }
        }
        let mut owned: BTreeSet<Key> = self.owned.remove(scope).into_iter().flatten().collect();
        for key in desired.keys() {
            if let Some(other) = self.owner.insert(key.clone(), scope.clone())
                && other != *scope
                && let Some(keys) = self.owned.get_mut(&other)
            {
                keys.retain(|held| held != key);
            }
        }
        let ops = diff(&desired, &owned, &self.actual);
        owned.retain(|key| {
            let there = self.actual.contains_key(key);
            if !there && !desired.contains_key(key) && self.owner.get(key) == Some(scope) {
                self.owner.remove(key);
            }
            there
        });
        owned.extend(desired.into_keys());
        if !owned.is_empty() {
            self.owned.insert(scope.clone(), owned.into_iter().collect());
        }
        ops
    }

    /// What a scope wants, without what an earlier process made and has gone since: nobody can make it again.
    fn still_possible(&mut self, scope: &Scope) -> Objects {
        let desired = self.node.desired(scope);
        let Scope::Peer(name) = scope else { return desired };
        let gone: Vec<SaId> = desired
            .iter()
            .filter_map(|(key, object)| match (key, object) {
                (Key::Sa(id), Object::Sa { born: None, .. }) if !self.actual.contains_key(key) => Some(*id),
                _ => None,
            })
            .collect();
        if gone.is_empty() {
            return desired;
        }
        for id in &gone {
            self.node.lost(name, id, None);
        }
        self.node.desired(scope)
    }

    /// Writes ordered operations, a batch for each run of one kind, or several; returns the scopes that failed. Where the node is
    /// `guardless`, its own scope counts as failed from the start.
    fn write(&mut self, ops: Vec<(Scope, Op)>, guardless: bool, now: Duration) -> BTreeMap<Scope, String> {
        let mut failed: BTreeMap<Scope, String> = BTreeMap::new();
        if guardless {
            failed.insert(Scope::Node, String::new());
        }
        let mut ops = ops.into_iter().peekable();
        while let Some((_, first)) = ops.peek() {
            let run = (first.key().kind(), matches!(first, Op::Break(_)));
            let (mut scopes, mut batch) = (Vec::new(), Vec::new());
            let same = |(_, op): &(Scope, Op)| (op.key().kind(), matches!(op, Op::Break(_))) == run;
            while batch.len() < BATCH
                && let Some((scope, op)) = ops.next_if(same)
            {
                if failed.contains_key(&scope) || failed.contains_key(&Scope::Node) {
                    continue;
                }
                match self.secret(&scope, &op) {
                    Ok(secret) => {
                        scopes.push(scope);
                        batch.push(Write { op, secret });
                    }
                    Err(why) => {
                        failed.insert(scope, why);
                    }
                }
            }
            if batch.is_empty() {
                continue;
            }
            self.tally.writes += batch.len() as u64;
            let done: Vec<Op> = batch.iter().map(|write| write.op.clone()).collect();
            let results = self.kernel.apply(run.0, batch);
            for ((scope, op), result) in scopes.into_iter().zip(done).zip(results) {
                match result {
                    Ok(()) => self.written(&scope, op, now),
                    Err(refused) => {
                        self.tally.failures += 1;
                        let error = chain(&refused.error);
                        self.unwritten(&scope, &op, refused);
                        failed.entry(scope).or_insert(error);
                    }
                }
            }
        }
        failed
    }

    /// The key of an SA that is to be made.
    fn secret(&mut self, scope: &Scope, op: &Op) -> Result<Option<keys::SaKey>, String> {
        let (Op::Make(Key::Sa(id), Object::Sa { sa, born }) | Op::Change(Key::Sa(id), Object::Sa { sa, born })) = op
        else {
            return Ok(None);
        };
        let Scope::Peer(name) = scope else {
            return Err(format!("SA {} belongs to no peer", Spi(id.spi)));
        };
        if let Some(Object::Sa { sa: held, born: made }) = self.actual.get(op.key())
            && made == born
            && (xfrm::Sa {
                encap: sa.encap,
                ..(**held).clone()
            }) == **sa
        {
            // Its ports alone change, and its key stays.
            return Ok(None);
        }
        let Some(born) = born else {
            // What an earlier process made can't be made again.
            self.node.lost(name, id, None);
            return Err(format!("SA {} of an earlier process is gone", Spi(id.spi)));
        };
        match self.node.key(name, sa, *born) {
            Some(key) => Ok(Some(key)),
            None => Err(format!("no key for SA {}: a new epoch brings one", Spi(id.spi))),
        }
    }

    fn written(&mut self, scope: &Scope, op: Op, now: Duration) {
        debug!(%scope, %op, "done");
        self.tally.repaired += u64::from(self.drifted.remove(op.key()));
        match op {
            Op::Make(key, object) | Op::Change(key, object) => {
                if let (Key::Sa(id), Object::Sa { born: Some(born), .. }, Scope::Peer(name)) = (&key, &object, scope) {
                    self.node.made(name, id, *born, now);
                }
                self.actual.insert(key, object);
            }
            Op::Break(key) => {
                self.actual.remove(&key);
                if self.owner.get(&key) == Some(scope) {
                    self.owner.remove(&key);
                }
                if let Some(owned) = self.owned.get_mut(scope) {
                    owned.retain(|held| *held != key);
                    if owned.is_empty() {
                        self.owned.remove(scope);
                    }
                }
            }
        }
    }

    fn unwritten(&mut self, scope: &Scope, op: &Op, refused: Refused) {
        let Refused { error, secret } = refused;
        match (&error, op) {
            (WriteError::Unknown { .. }, _) => self.stale = true,
            // It went before the notification of its end came.
            (WriteError::Refused { source, .. }, Op::Change(key, _)) if source.is_gone() => self.forget(key),
            _ => {}
        }
        let (
            Op::Make(Key::Sa(id), Object::Sa { sa, born: Some(born) })
            | Op::Change(Key::Sa(id), Object::Sa { sa, born: Some(born) }),
            Scope::Peer(name),
        ) = (op, scope)
        else {
            return;
        };
        let sends = Spi(sa.spi).parts().ok().map(|parts| parts.slot) == self.node.slot();
        match secret {
            Some(key) => self.node.refused(name, *born, key),
            // It may have been used: only a receiving one may be tried again.
            None if sends => self.node.lost(name, id, Some(*born)),
            None => {}
        }
    }

    fn settle(
        &mut self,
        scopes: &BTreeSet<Scope>,
        failed: BTreeMap<Scope, String>,
        now: Duration,
        tried: &mut BTreeSet<Scope>,
    ) {
        let stopped = failed.contains_key(&Scope::Node);
        for scope in scopes {
            let alike = self.alike.remove(scope);
            let why = failed.get(scope).cloned().or(alike);
            let why = why.or_else(|| stopped.then(|| "the node's own objects could not be made".to_owned()));
            if let Scope::Peer(name) = scope {
                self.node.troubled(name, why.clone());
            }
            let Some(why) = why else {
                if self.failing.remove(scope).is_some() {
                    info!(%scope, "in order again");
                }
                continue;
            };
            let before = self.failing.get(scope);
            match before {
                // Most first failures are races with another hand, mended by the next try.
                None => warn!(%scope, error = why, "not in order; trying again"),
                Some(before) if before.wait < LOUD => {}
                Some(before) if before.wait < LOUD * 2 || before.error != why => {
                    error!(%scope, error = why, "can't be brought in order; trying again");
                }
                Some(_) => {}
            }
            let wait = before.map_or(FIRST, |before| (before.wait * 2).min(SLOWEST));
            self.failing.insert(
                scope.clone(),
                Failing {
                    error: why,
                    wait,
                    next: now + wait,
                },
            );
            tried.insert(scope.clone());
        }
    }

    /// The kinds of what is ours in the kernel, counted: for the log.
    pub fn census(&self) -> BTreeMap<Kind, usize> {
        let mut census = BTreeMap::new();
        for key in self.actual.keys() {
            *census.entry(key.kind()).or_default() += 1;
        }
        census
    }

    /// The names of the peers that are served.
    pub fn served(&self) -> impl Iterator<Item = &NodeName> {
        self.owned.keys().filter_map(|scope| match scope {
            Scope::Peer(name) => Some(name),
            Scope::Node | Scope::Orphans => None,
        })
    }
}

/// An error and all that caused it, in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
