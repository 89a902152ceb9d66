//! The reconciler: what is dirty is planned, compared with the kernel and written, in order, scope by scope.
//!
//! One pass is synchronous. The first failure in a peer's scope ends that scope for the pass, so that a failed SA is
//! never followed by the removal of the old one; the other peers go on. A failure in the node's scope stops the peers
//! too: without the guard nothing is opened. A scope that failed is tried again, backing off. What is ours by its mark
//! and wanted by nobody is swept, but only once the roster is complete.

mod ledger;
mod noticed;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use keys::{Carrier, Epoch, EpochSecret, Spi};
use ring::rand::SecureRandom;
use tracing::{debug, error, info, warn};
use xfrm::SaId;

use crate::backend::ipsec;
use crate::kernel::{
    Counters, Datapath, Event, Key, Look, Object, Objects, Op, Scope, Write, WriteError, diff, order, reqid_slot,
};
use crate::lease::Completeness;
use crate::node::report::Report;
use crate::node::{Cause, Datagram, End, Headroom, Node, Traffic, some};
use crate::repeats::{self, Each, Repeats, Told, log_came};

use ledger::Ledger;

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
/// So many operations a batch at most: one send's.
const BATCH: usize = xfrm::netlink::REQUESTS_PER_SEND;
/// So many rounds a pass at most: each lets what the one before made known take effect.
const ROUNDS: usize = 8;

#[derive(Clone, Debug)]
struct Failing {
    error: String,
    /// Whether something was said of it.
    said: bool,
    wait: Duration,
    next: Duration,
}

/// What was said of what may fail again and again.
#[derive(Debug, Default)]
struct Said {
    counters: Repeats,
    /// That notifications were lost.
    lost: Repeats,
    unread: Repeats,
    declined: Repeats,
    /// Scopes that are not in order, and those that stay so.
    failed: Each<Scope>,
    broken: Each<Scope>,
    /// What another hand changes or removes, again and again where it fights with us.
    meddled: Each<Key>,
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
    ledger: Ledger,
    failing: BTreeMap<Scope, Failing>,
    /// Peers whose SA would be another's, of this pass.
    alike: BTreeMap<Scope, String>,
    said: Said,
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
            ledger: Ledger::new(actual),
            failing: BTreeMap::new(),
            alike: BTreeMap::new(),
            complete: false,
            stale: false,
            reread: Reread::default(),
            said: Said::default(),
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
    pub fn actual(&self) -> impl Iterator<Item = (&Key, &Object)> {
        self.ledger.objects()
    }

    /// What the kernel holds there, as far as is known.
    pub fn holds(&self, key: &Key) -> Option<&Object> {
        self.ledger.get(key)
    }

    /// The kernel itself.
    pub fn kernel(&mut self) -> &mut D {
        &mut self.kernel
    }

    /// Puts what is kept of the kernel together anew: after many changes half of its room is empty.
    pub fn compact(&mut self) {
        self.ledger.compact();
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
        let peers = self.ledger.scopes().filter(|scope| matches!(scope, Scope::Peer(_)));
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
        let counters = self.kernel.counters();
        self.counted(counters)
    }

    /// What was counted; logs that it can't be read, or can be again.
    fn counted<T: Default>(&mut self, counted: Result<T, WriteError>) -> T {
        let error = counted.as_ref().err().map(ToString::to_string);
        log_came!(
            self.said.counters.came(error.as_deref(), repeats::now()),
            warn,
            [],
            "the SAs' counters can't be read",
            "the SAs' counters can be read again"
        );
        counted.unwrap_or_default()
    }

    /// Does what is due in the node ([`Node::tick`]), which is told before what the kernel counts, where it wants to know.
    pub fn tick(&mut self, now: Duration, jitter: &mut dyn FnMut() -> f64) -> Vec<Datagram> {
        if self.node.looks(now) {
            let carried = self.kernel.carried();
            for (id, packets) in self.counted(carried) {
                if let Some(Scope::Peer(name)) = self.ledger.owner(&Key::Sa(id)) {
                    self.node.carried(name, id.spi, packets, now);
                }
            }
        }
        self.node.tick(now, jitter)
    }

    /// How the node and its peers stand at `now`, and how near its SAs are to their limits, with what they carried taken
    /// into `traffic`. One dump. `opened` is when `traffic` was new, seconds since 1970.
    pub fn read(&mut self, traffic: &mut Traffic, opened: u64, now: Duration) -> (Report, Option<Headroom>) {
        let counters = self.counters();
        let report = self.node.report(&counters, now);
        let headroom = Headroom::of(self.ledger.objects(), &counters);
        traffic.read(counters, opened, |id| self.end(id));
        traffic.keep(|name| self.node.knows(name));
        (report, headroom)
    }

    /// The other end of an SA that a peer's scope has.
    fn end(&self, id: &SaId) -> Option<End<'_>> {
        let Some(Scope::Peer(peer)) = self.ledger.owner(&Key::Sa(*id)) else {
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
            let Some(Object::Policy(policy)) = self.ledger.get(&Key::Policy(id)) else {
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
            if let Some(told) = self.said.declined.failed("", now) {
                warn!(
                    why,
                    times = told.times,
                    seconds = told.seconds,
                    "no new epoch is begun for who asks"
                );
            }
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
        let named = self.ledger.objects().filter_map(|(_, object)| match object {
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
            if now > self.reread.due + RARELY * 2 {
                // After a pause it is news again.
                let _ = self.said.lost.worked(now);
            }
            if let Some(told) = self.said.lost.failed("", now) {
                warn!(
                    times = told.times,
                    seconds = told.seconds,
                    "the kernel's notifications were lost, or an answer: reading all of it anew"
                );
            }
            let error = self.resync().err().map(|error| chain(&error));
            self.reread.done(now, error.is_some());
            log_came!(
                self.said.unread.came(error.as_deref(), now),
                error,
                [],
                "the kernel can't be read",
                "the kernel can be read again"
            );
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
                let theirs = |key| self.ledger.owner(key).is_some_and(|owner| owner != scope);
                !matches!(op, Op::Break(key) if theirs(key))
            });
            // Without the guard nothing is opened, also while the node's own scope waits for its next try.
            let guardless = self.failing.contains_key(&Scope::Node) && !scopes.contains(&Scope::Node);
            let failed = self.write(order(ops), guardless, now);
            self.settle(&scopes, failed, now, &mut tried);
        }
        if self.failing.is_empty() {
            // What is left is no longer wanted.
            self.drifted.clear();
        }
    }

    fn plan(&mut self, scope: &Scope) -> Vec<Op> {
        if *scope == Scope::Orphans {
            // Before the first epoch no peer is planned, and what an earlier process left is still in use.
            let known = self.complete && self.node.settled();
            let orphans = self.ledger.orphans().filter(|_| known);
            return orphans.map(|key| Op::Break(key.clone())).collect();
        }
        let mut desired = self.still_possible(scope);
        let taken: Vec<(Key, Scope)> = (desired.keys().filter(|key| matches!(key, Key::Sa(_))))
            .filter_map(|key| {
                Some((
                    key.clone(),
                    self.ledger.owner(key).filter(|other| *other != scope)?.clone(),
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
        self.ledger.claim(scope, &desired);
        diff(desired, self.ledger.owned(scope), |key| self.ledger.get(key))
    }

    /// What a scope wants, without what an earlier process made and has gone since: nobody can make it again.
    fn still_possible(&mut self, scope: &Scope) -> Objects {
        let desired = self.node.desired(scope);
        let Scope::Peer(name) = scope else { return desired };
        let gone: Vec<SaId> = desired
            .iter()
            .filter_map(|(key, object)| match (key, object) {
                (Key::Sa(id), Object::Sa { born: None, .. }) if !self.ledger.holds(key) => Some(*id),
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
        let (mut scopes, mut batch) = (Vec::new(), Vec::new());
        let mut ops = ops.into_iter().peekable();
        while let Some((_, first)) = ops.peek() {
            let run = (first.key().kind(), matches!(first, Op::Break(_)));
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
            let results = self.kernel.apply(run.0, &mut batch);
            for ((scope, Write { op, secret }), result) in scopes.drain(..).zip(batch.drain(..)).zip(results) {
                match result {
                    Ok(()) => self.written(&scope, op, now),
                    Err(error) => {
                        self.tally.failures += 1;
                        let why = chain(&error);
                        self.unwritten(&scope, &op, &error, secret);
                        failed.entry(scope).or_insert(why);
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
        if let Some(Object::Sa { sa: held, born: made }) = self.ledger.get(op.key())
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
                self.ledger.put(key, object);
            }
            Op::Break(key) => self.ledger.broken(scope, &key),
        }
    }

    fn unwritten(&mut self, scope: &Scope, op: &Op, error: &WriteError, secret: Option<keys::SaKey>) {
        match (error, op) {
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
            let before = self.failing.remove(scope);
            let Some(why) = why else {
                if before.is_some_and(|before| before.said) {
                    info!(%scope, "in order again");
                }
                continue;
            };
            let wait = before.as_ref().map_or(FIRST, |before| (before.wait * 2).min(SLOWEST));
            let mut said = before.as_ref().is_some_and(|before| before.said);
            let loud = before.as_ref().is_some_and(|before| before.wait >= LOUD);
            let repeats = if loud {
                &mut self.said.broken
            } else {
                &mut self.said.failed
            };
            if let Some(Told { times, seconds }) = repeats.failed(scope, &why, now) {
                said = true;
                // Most first failures are races with another hand, mended by the next try.
                match loud {
                    false => warn!(%scope, error = why, times, seconds, "not in order; trying again"),
                    true => error!(%scope, error = why, times, seconds, "can't be brought in order; trying again"),
                }
            }
            self.failing.insert(
                scope.clone(),
                Failing {
                    error: why,
                    said,
                    wait,
                    next: now + wait,
                },
            );
            tried.insert(scope.clone());
        }
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
