//! Who may send on which generation: the rules of one pair of nodes, as a state machine without I/O or clock.
//!
//! A node's life has epochs, each with a key pair of its own. A pair of nodes has a generation for every (sender's
//! epoch, receiver's epoch) whose two secrets are alive; each names one SA. [`Pair`] is one node's view of one peer:
//!
//! ```text
//!   own epoch begins ──▶ receive on (b, new) for every b ──▶ [published] ──▶ probe on (new, newest b)
//!   peer's epoch seen ─▶ receive on (new, a) for every a ──────────────────▶ probe on (newest a, new)
//!   probe came on (b, a), both held here ──▶ (a, b) is confirmed: the peer has our a, and its own b is alive
//!   data goes on the newest confirmed generation, never back in either part
//!   the peer said that its data goes on (b, a) ──▶ what it can no longer send on drains, and is dropped
//! ```
//!
//! Nothing else confirms: not the store, not time, not a packet on another generation, not what an earlier process
//! left in the kernel. A sending SA's key is programmed once: a generation whose sending SA is gone is never made
//! again, and its loss asks for a new epoch.

use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

use keys::Epoch;
use litemap::LiteMap;
use xfrm::SaId;

/// An ordered pair of epochs; it names one SA.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Generation {
    /// The sender's epoch.
    pub sender: Epoch,
    /// The receiver's epoch.
    pub receiver: Epoch,
}

impl Generation {
    /// The generation of the other direction.
    pub fn reverse(self) -> Self {
        Self {
            sender: self.receiver,
            receiver: self.sender,
        }
    }

    /// Whether it is older than `other` in neither part.
    pub fn reaches(self, other: Self) -> bool {
        self.sender >= other.sender && self.receiver >= other.receiver
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}>{}", self.sender, self.receiver)
    }
}

/// How long an inbound SA is kept after the peer said that it sends on a newer one: packets may still be under way.
pub const DRAIN: Duration = Duration::from_secs(5);

/// How long a silent peer keeps us from dropping all but the newest two of either side's epochs, and what its data was
/// last on.
pub const SILENCE: Duration = Duration::from_secs(600);

/// What an earlier process left in the kernel for this peer. Its keys are not known here; it serves until the first
/// generation of this process is confirmed.
#[derive(Clone, Debug, Default, Eq, Hash, PartialEq)]
pub struct Inherited {
    /// SAs that the peer may still send on.
    pub inbound: BTreeSet<SaId>,
    /// The SA that our data goes on, named by the `out` policy.
    pub data: Option<SaId>,
}

#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
enum Receive {
    /// To be installed.
    Wanted,
    /// The kernel has it.
    Installed,
    /// The peer has left it; it goes at this time.
    Draining(Duration),
}

#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
enum Send {
    /// Its key is on the way to the kernel.
    Making,
    /// The kernel has it.
    Live,
    /// It is gone or no longer needed; its key is spent.
    Spent,
}

/// Where data goes.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Data {
    /// Nowhere yet: the guard drops it.
    Held,
    /// On the SA that an earlier process made.
    Inherited(SaId),
    /// On a confirmed generation.
    On(Generation),
}

/// An epoch of a peer that is older than, or clashes with, what we have seen of it.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error(
    "epoch {seen} is older than {newest}, which it had before: a lease was rolled back; publish a new one with `ringmail rotate` there"
)]
pub struct Rollback {
    /// The epoch offered.
    pub seen: Epoch,
    /// The newest that is known.
    pub newest: Epoch,
}

/// One node's view of one peer. Times are durations on one monotonic clock.
#[derive(Clone, Debug, Default, Eq, Hash, PartialEq)]
pub struct Pair {
    /// Ascending, as the next.
    own: Vec<Epoch>,
    held: Vec<Epoch>,
    newest_held: Option<Epoch>,
    confirmed: Vec<Generation>,
    inbound: LiteMap<Generation, Receive>,
    outbound: LiteMap<Generation, Send>,
    data: Option<Generation>,
    said: Option<Generation>,
    known: Option<Generation>,
    inherited: Inherited,
    inherited_until: Option<Duration>,
    heard: Option<Duration>,
    /// The first tick: who was never heard is silent since then.
    since: Option<Duration>,
}

impl Pair {
    /// A pair that knows `own`, our live epochs, and what an earlier process left.
    pub fn new(own: impl IntoIterator<Item = Epoch>, inherited: Inherited) -> Self {
        let mut own: Vec<_> = own.into_iter().collect::<BTreeSet<_>>().into_iter().collect();
        own.shrink_to_fit();
        Self {
            own,
            // One of each nearly always: left to itself, a list makes room for four.
            held: Vec::with_capacity(1),
            confirmed: Vec::with_capacity(1),
            inbound: LiteMap::with_capacity(1),
            outbound: LiteMap::with_capacity(1),
            inherited,
            ..Self::default()
        }
    }

    /// Our epoch `epoch` begins. Publish it only after [`Pair::installed`] came for what this makes wanted.
    pub fn own_epoch(&mut self, epoch: Epoch) {
        add(&mut self.own, epoch);
        for &peer in &self.held {
            self.inbound
                .entry(Generation {
                    sender: peer,
                    receiver: epoch,
                })
                .or_insert(Receive::Wanted);
        }
    }

    /// The peer's epoch `epoch` was seen. Seeing the newest again changes nothing.
    ///
    /// An epoch that equals an older one modulo 64 has the same SPIs. The peer starts one only when its kernel holds
    /// nothing of the older any more, so the older is forgotten on the spot.
    pub fn peer_epoch(&mut self, epoch: Epoch) -> Result<(), Rollback> {
        match self.newest_held {
            Some(newest) if epoch < newest => return Err(Rollback { seen: epoch, newest }),
            Some(newest) if epoch == newest => return Ok(()),
            _ => {}
        }
        let clash = |e: Epoch| e.mod64() == epoch.mod64();
        self.held.retain(|&e| !clash(e));
        self.inbound.retain(|g, _| !clash(g.sender));
        self.outbound.retain(|g, _| !clash(g.receiver));
        self.confirmed.retain(|g| !clash(g.receiver));
        self.data = self.data.filter(|g| !clash(g.receiver));
        add(&mut self.held, epoch);
        self.newest_held = Some(epoch);
        for &own in &self.own {
            self.inbound
                .entry(Generation {
                    sender: epoch,
                    receiver: own,
                })
                .or_insert(Receive::Wanted);
        }
        Ok(())
    }

    /// The kernel has the inbound SA of `generation`.
    pub fn installed(&mut self, generation: Generation) {
        if let Some(state @ Receive::Wanted) = self.inbound.get_mut(&generation) {
            *state = Receive::Installed;
        }
        self.choose();
    }

    /// The sending SA of `generation` is being programmed: its key is spent from here on.
    pub fn programmed(&mut self, generation: Generation) {
        self.outbound.entry(generation).or_insert(Send::Making);
    }

    /// The kernel has the sending SA of `generation`: data may move to it.
    pub fn sent(&mut self, generation: Generation) {
        if let Some(state @ Send::Making) = self.outbound.get_mut(&generation) {
            *state = Send::Live;
        }
        self.choose();
    }

    /// The kernel refused the sending SA of `generation` for sure: its key was never used.
    pub fn refused(&mut self, generation: Generation) {
        self.outbound.remove(&generation);
    }

    /// The sending SA of `generation` is gone. True if only a new epoch of ours can mend it.
    pub fn lost_sending(&mut self, generation: Generation) -> bool {
        self.confirmed.retain(|g| *g != generation);
        match self.outbound.insert(generation, Send::Spent) {
            Some(Send::Making | Send::Live) => true,
            Some(Send::Spent) | None => false,
        }
    }

    /// The receiving SA of `generation` is gone. True if only a new epoch of ours can mend it: made again, its replay
    /// window would be empty, and a packet that was captured before would pass.
    pub fn lost_receiving(&mut self, generation: Generation) -> bool {
        matches!(self.inbound.remove(&generation), Some(Receive::Installed))
    }

    /// An SA of an earlier process is gone from the kernel.
    pub fn lost_inherited(&mut self, id: &SaId) {
        self.inherited.inbound.remove(id);
        self.inherited.data.take_if(|data| data == id);
    }

    /// A probe arrived that was sent on `sent`, by a peer whose data goes on `data`; each is (its epoch, ours).
    /// False if it says nothing of what this process holds.
    pub fn probed(&mut self, sent: Generation, data: Option<Generation>, now: Duration) -> bool {
        let mut telling = false;
        if self.held.contains(&sent.sender) && self.own.contains(&sent.receiver) {
            let ours = sent.reverse();
            if self.outbound.get(&ours) != Some(&Send::Spent) {
                add(&mut self.confirmed, ours);
            }
            self.heard = Some(now);
            telling = true;
        }
        if let Some(data) = data
            && self.held.contains(&data.sender)
            && self.own.contains(&data.receiver)
        {
            self.said = Some(data);
            self.retire(data, now);
        }
        self.choose();
        telling
    }

    /// The peer answered a probe of ours that said our data goes on `data`.
    pub fn peer_knows(&mut self, data: Option<Generation>) {
        self.known = data;
    }

    /// Drops what has drained, and a silent peer's old epochs. Returns whether anything changed.
    pub fn tick(&mut self, now: Duration) -> bool {
        let before = (
            self.inbound.len(),
            self.own.len(),
            self.held.len(),
            self.inherited.inbound.len(),
        );
        self.inbound
            .retain(|_, state| !matches!(state, Receive::Draining(until) if *until <= now));
        if self.inherited_until.take_if(|until| *until <= now).is_some() {
            self.inherited.inbound.clear();
        }
        let since = *self.since.get_or_insert(now);
        let silent = now.saturating_sub(self.heard.unwrap_or(since)) >= SILENCE;
        if silent && self.outdated() {
            let data = self.data;
            keep_newest_two(&mut self.own, data.map(|g| g.sender));
            keep_newest_two(&mut self.held, data.map(|g| g.receiver));
            // A peer without a daemon still sends, on what it last said.
            let (own, held, said) = (&self.own, &self.held, self.said);
            self.inbound
                .retain(|g, _| held.contains(&g.sender) && own.contains(&g.receiver) || Some(*g) == said);
            self.forget_unreachable();
        }
        before
            != (
                self.inbound.len(),
                self.own.len(),
                self.held.len(),
                self.inherited.inbound.len(),
            )
    }

    /// When [`Pair::tick`] next has something to do.
    pub fn deadline(&self) -> Option<Duration> {
        let drains = self.inbound.values().filter_map(|state| match state {
            Receive::Draining(until) => Some(*until),
            Receive::Wanted | Receive::Installed => None,
        });
        let silence = self
            .outdated()
            .then(|| self.heard.or(self.since).unwrap_or_default() + SILENCE);
        drains.chain(self.inherited_until).chain(silence).min()
    }

    /// Whether there are epochs beyond the newest two and those in use.
    fn outdated(&self) -> bool {
        let excess =
            |epochs: &[Epoch], used: Option<Epoch>| epochs.iter().rev().skip(2).any(|epoch| Some(*epoch) != used);
        excess(&self.own, self.data.map(|g| g.sender)) || excess(&self.held, self.data.map(|g| g.receiver))
    }

    /// Rule 6: the peer's data goes on `data`, and it never goes back.
    fn retire(&mut self, data: Generation, now: Duration) {
        for (generation, state) in self.inbound.iter_mut() {
            if data.reaches(*generation) && *generation != data && !matches!(state, Receive::Draining(_)) {
                *state = Receive::Draining(now + DRAIN);
            }
        }
        if !self.inherited.inbound.is_empty() {
            self.inherited_until.get_or_insert(now + DRAIN);
        }
        let sending = self.data.map(|g| g.sender);
        self.own
            .retain(|&epoch| epoch >= data.receiver || Some(epoch) == sending);
        self.held.retain(|&epoch| epoch >= data.sender);
        self.forget_unreachable();
    }

    fn forget_unreachable(&mut self) {
        let (own, held) = (&self.own, &self.held);
        self.confirmed
            .retain(|g| own.contains(&g.sender) && held.contains(&g.receiver));
    }

    /// The newest confirmed generation that data may go to, of those that `fit`; never back in either part.
    fn best(&self, fit: impl Fn(Option<&Send>) -> bool) -> Option<Generation> {
        let reachable = self.confirmed.iter().copied().filter(|g| {
            let forward = self.data.is_none_or(|floor| g.reaches(floor));
            forward && fit(self.outbound.get(g))
        });
        reachable.max_by_key(|g| (g.receiver, g.sender))
    }

    /// Rule 4: data goes on the newest confirmed generation, never back in either part; and only once the kernel has
    /// its SA, so that one whose making fails costs nothing.
    fn choose(&mut self) {
        let Some(best) = self.best(|state| state == Some(&Send::Live)) else {
            return;
        };
        self.data = Some(best);
        self.inherited.data = None;
        for (generation, state) in self.outbound.iter_mut() {
            if !generation.reaches(best) {
                *state = Send::Spent;
            }
        }
    }

    /// Rule 5: the generation that probes go on, the newest held, once the peer's answer can be received.
    pub fn probe(&self) -> Option<Generation> {
        let newest = self.newest()?;
        let hears = self.inbound.get(&newest.reverse()) == Some(&Receive::Installed);
        (hears && self.outbound.get(&newest) != Some(&Send::Spent)).then_some(newest)
    }

    /// The newest generation there is: of the newest epochs of both.
    pub fn newest(&self) -> Option<Generation> {
        Some(Generation {
            sender: *self.own.last()?,
            receiver: *self.held.last()?,
        })
    }

    /// Where data goes.
    pub fn data(&self) -> Data {
        match (self.data, self.inherited.data) {
            (Some(generation), _) => Data::On(generation),
            (None, Some(id)) => Data::Inherited(id),
            (None, None) => Data::Held,
        }
    }

    /// Where the peer last said that its data goes: (its epoch, ours).
    pub fn said(&self) -> Option<Generation> {
        self.said
    }

    /// The generations whose receiving SA the kernel should hold.
    pub fn receiving(&self) -> impl Iterator<Item = Generation> {
        self.inbound.keys().copied()
    }

    /// The generations whose sending SA the kernel should hold: those in use, those to be programmed, and those that
    /// were programmed and may yet carry data, since they can't be made again.
    pub fn sending(&self) -> BTreeSet<Generation> {
        let live = self
            .outbound
            .iter()
            .filter(|(_, state)| **state != Send::Spent)
            .map(|(g, _)| *g);
        let next = self.best(|state| state != Some(&Send::Spent));
        let fresh = next
            .into_iter()
            .chain(self.probe())
            .filter(|g| !self.outbound.contains_key(g));
        live.chain(fresh).collect()
    }

    /// What an earlier process left and is still of use.
    pub fn inherited(&self) -> &Inherited {
        &self.inherited
    }

    /// Whether our epoch `epoch` may still be needed to make a key.
    pub fn needs(&self, epoch: Epoch) -> bool {
        self.own.contains(&epoch)
    }

    /// Whether the peer's epoch `epoch` is in use.
    pub fn holds(&self, epoch: Epoch) -> bool {
        self.held.contains(&epoch)
    }

    /// When a probe last confirmed something.
    pub fn heard(&self) -> Option<Duration> {
        self.heard
    }

    /// Whether both ends are on the newest generation and each knows it of the other: no probe is needed.
    pub fn settled(&self) -> bool {
        let newest = self.newest();
        newest.is_some() && self.data == newest && self.said == newest.map(Generation::reverse) && self.known == newest
    }
}

/// Puts `one` at its place in an ascending list, unless it is there.
fn add<T: Ord>(list: &mut Vec<T>, one: T) {
    if let Err(at) = list.binary_search(&one) {
        list.insert(at, one);
    }
}

fn keep_newest_two(epochs: &mut Vec<Epoch>, also: Option<Epoch>) {
    let newest: Vec<Epoch> = epochs.iter().rev().take(2).copied().collect();
    epochs.retain(|e| newest.contains(e) || Some(*e) == also);
}
