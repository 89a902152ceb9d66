//! This node's own epochs, and what it says of itself: its statement and its lease.

use std::sync::Arc;
use std::time::Duration;

use keys::{Epoch, EpochSecret, Kid, Psk, PublicKey, Statement};
use xfrm::SaId;

use super::{Cause, Node, OwnEpoch, Peer};
use crate::admission;
use crate::kernel::Scope;
use crate::lease::{BackendData, Lease, NodeName, Subnets};
use crate::probe::Schedule;
use crate::uplink::Uplink;

impl Node {
    /// A new epoch is wanted for `cause`.
    pub fn want(&mut self, cause: Cause) {
        self.pace.want(cause);
    }

    /// Why an epoch should begin now; `None` if none should, or not yet, or the node has not what it takes.
    pub fn wants_epoch(&self, now: Duration) -> Option<Cause> {
        self.next_epoch().filter(|(at, _)| *at <= now).map(|(_, cause)| cause)
    }

    /// When the next epoch begins, and why.
    pub(super) fn next_epoch(&self) -> Option<(Duration, Cause)> {
        let newest = self.own.values().next_back().map(|own| (own.begun, own.ages));
        self.pace.next(newest).filter(|_| self.ready())
    }

    /// Whether there is all that an epoch's statement says.
    pub(super) fn ready(&self) -> bool {
        self.plain().is_none() && self.held.is_some() && self.uplink.is_some() && !self.psks.all().is_empty()
    }

    /// No epoch can begin at `now`, and `why`. True if that was not known yet.
    pub fn stall(&mut self, why: String, now: Duration) -> bool {
        let known = self.pace.stalled() == Some(&*why);
        self.pace.stall(why, now);
        !known
    }

    /// What somebody asked for is not done, and `why`.
    pub fn decline(&mut self, why: String) {
        self.pace.decline(why);
    }

    /// Why what was last asked for was not done, until an epoch begins.
    pub fn declined(&self) -> Option<&str> {
        self.pace.declined()
    }

    /// Why no epoch could begin, until one does.
    pub fn stalled(&self) -> Option<&str> {
        self.pace.stalled()
    }

    /// An SA has reached its soft limit. False if a new epoch would not help: the SA is of an older one already, and
    /// stays in use because the peer has not moved.
    pub fn limited(&mut self, id: &SaId) -> bool {
        let (Ok(parts), Some(newest)) = (keys::Spi(id.spi).parts(), self.epoch()) else {
            return false;
        };
        let own = match Some(parts.slot) == self.slot() {
            true => parts.sender_mod64,
            false => parts.receiver_mod64,
        };
        let helps = own == newest.mod64();
        if helps {
            self.want(Cause::Limit);
        }
        helps
    }

    /// The peers for whose sake more than `few` own epochs are kept.
    pub fn behind(&self, few: usize) -> Vec<String> {
        let kept = |peer: &Peer| self.own.keys().filter(|epoch| peer.pair.needs(**epoch)).count();
        let behind = self.peers.iter().filter(|(_, peer)| kept(peer) > few);
        behind.map(|(name, _)| name.to_string()).collect()
    }

    /// The newest epoch there is.
    pub fn epoch(&self) -> Option<Epoch> {
        self.own.keys().next_back().copied()
    }

    /// Every own epoch whose secret lives.
    pub fn epochs(&self) -> impl Iterator<Item = Epoch> {
        self.own.keys().copied()
    }

    /// An epoch begins. `number` is above every earlier one. Publish [`Node::lease`] once a pass has made what this
    /// makes wanted: before, a peer could send what nobody can read.
    /// `jitter` in 0..1 shortens its life by up to a tenth, so that nodes do not rotate together.
    pub fn begin_epoch(&mut self, number: Epoch, secret: EpochSecret, now: Duration, jitter: f64) {
        let (Some((subnets, slot)), Some(uplink)) = (self.held, self.uplink.clone()) else {
            return;
        };
        let before = self.own.values().next_back().map(|own| own.begun);
        let statement = self.statement(number, secret.public(), subnets, &uplink);
        let encoded = match statement.encode() {
            Ok(encoded) => encoded,
            Err(error) => {
                if self.stall(format!("this node's own statement can't be written: {error}"), now) {
                    tracing::error!(%error, "this node's own statement can't be written");
                }
                return;
            }
        };
        self.pace.began(before, now);
        let touched = self.claims.set(&self.settings.name.clone(), Some((&statement, slot)));
        self.make_way(&statement, slot);
        let ages = now + self.settings.rekey_after.mul_f64(1.0 - jitter.clamp(0.0, 1.0) / 10.0);
        self.own.insert(
            number,
            OwnEpoch {
                secret,
                statement,
                encoded,
                local: uplink.local,
                soft: self.settings.rekey,
                begun: now,
                ages,
            },
        );
        for other in touched {
            self.reconsider(&other, now);
        }
        let names: Vec<NodeName> = self.peers.keys().cloned().collect();
        for name in names {
            if let Some(peer) = self.peers.get_mut(&name) {
                peer.pair.own_epoch(number);
                peer.mapping.begin(number);
            }
            self.retimed(&name, |peer| peer.schedule = Schedule::at_once(now));
            self.dirty.insert(Scope::Peer(name));
        }
        self.dirty.insert(Scope::Node);
        self.end_psks(now);
    }

    pub(super) fn statement(&self, epoch: Epoch, public: PublicKey, subnets: Subnets, uplink: &Uplink) -> Statement {
        Statement {
            network: self.settings.network.nets().collect(),
            node: self.settings.name.as_str().into(),
            subnets: subnets.iter().collect(),
            addresses: uplink.public.iter().collect(),
            cipher: self.settings.cipher,
            encap: self.settings.encap,
            epoch,
            public,
            kids: self.psks.kids(),
        }
    }

    /// A statement never changes, nor do an SA's limits: if what they say has changed, a new epoch is wanted.
    pub(super) fn check_statement(&mut self) {
        let (Some((subnets, _)), Some(uplink)) = (self.held, self.uplink.as_ref()) else {
            return;
        };
        let Some((epoch, newest)) = self.own.last_key_value() else {
            return;
        };
        let same = self.statement(*epoch, newest.statement.public, subnets, uplink) == newest.statement
            && newest.local == uplink.local
            && newest.soft == self.settings.rekey;
        if !same {
            self.want(Cause::Changed);
        }
    }

    /// The lease to publish: that of the newest epoch.
    pub fn lease(&self) -> Option<Lease> {
        if let Some(plain) = &self.settings.plain {
            return self.plain_lease(plain);
        }
        let newest = self.own.values().next_back()?;
        let kid_holder = |kid: &Kid| self.psks.get(*kid).cloned();
        let psks: Option<Vec<Arc<Psk>>> = newest.statement.kids.iter().map(kid_holder).collect();
        let data = admission::publish(&newest.encoded, &psks?);
        if let Some(shown) = self.shown_to_plaintext(&data) {
            return Some(shown);
        }
        Some(Lease {
            node: self.settings.name.clone(),
            subnets: newest.statement.subnets.iter().copied().collect(),
            public: newest.statement.addresses.iter().copied().collect(),
            backend: "ipsec".into(),
            data,
            v6_data: BackendData::NULL,
        })
    }
}
