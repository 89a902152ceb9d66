//! Keys on their way to the kernel: derived when first needed, a sending one handed out once.

use keys::{Carrier, SaKey};
use litemap::LiteMap;
use xfrm::Sa;

use super::{Keys, Node, Sending, Way, sender};
use crate::backend::ipsec;
use crate::epochs::Generation;
use crate::lease::NodeName;

impl Node {
    /// The key of an SA of `name` that is about to be made. A sending SA's key is handed out once: `None` from then on,
    /// unless [`Node::refused`] brings it back. Where a generation has an SA a carrier, both keys are made with the first.
    pub fn key(&mut self, name: &NodeName, sa: &Sa, born: Generation) -> Option<SaKey> {
        let own_slot = self.held?.1;
        let outgoing = sender(&sa.id()) == Some(own_slot);
        let sending = if outgoing { born } else { born.reverse() };
        self.derive(name, sending)?;
        let own_cipher = self.own.get(&sending.sender)?.statement.cipher;
        let carrier = keys::Spi(sa.spi).parts().ok()?.carrier;
        let open = self.open(self.peers.get(name)?, sending);
        let peer = self.peers.get_mut(name)?;
        let theirs = &peer.epochs.get(&sending.receiver)?.statement;
        let keys = peer.keys.get_mut(&sending)?;
        if !outgoing {
            return Some(keys.inbound.key(theirs.cipher, ipsec::spi(peer.slot, born, carrier)));
        }
        let spi = ipsec::spi(own_slot, born, carrier);
        let mut unused = match std::mem::replace(&mut keys.outbound, Sending::Made(LiteMap::new_vec())) {
            Sending::Fresh(outbound) if open.len() > 1 => {
                let [plain, in_udp] = outbound.into_keys(own_cipher, spi);
                LiteMap::from_iter([(Carrier::Esp, plain), (Carrier::Udp, in_udp)])
            }
            Sending::Fresh(outbound) => LiteMap::from_iter([(carrier, outbound.into_key(own_cipher, spi))]),
            Sending::Made(unused) => unused,
        };
        let key = unused.remove(&carrier);
        if !unused.is_empty() {
            keys.outbound = Sending::Made(unused);
        }
        let key = key?;
        self.spent.entry(sending.sender).or_default().insert(theirs.public);
        peer.pair.programmed(sending);
        Some(key)
    }

    /// The kernel refused the SA that `key` was for, so it was never used: a sending one may be tried again.
    pub fn refused(&mut self, name: &NodeName, born: Generation, key: SaKey) {
        let Ok(parts) = key.spi().parts() else { return };
        if Some(parts.slot) != self.slot() {
            return;
        }
        if let Some(peer) = self.peers.get_mut(name) {
            if let Some(keys) = peer.keys.get_mut(&born)
                && let Sending::Made(unused) = &mut keys.outbound
            {
                unused.insert(parts.carrier, key);
            }
            // Where the kernel has its twin, the generation is half made.
            if !peer.has_made(born, Way::Out) {
                peer.pair.refused(born);
            }
        }
    }

    pub(super) fn derive(&mut self, name: &NodeName, sending: Generation) -> Option<()> {
        let peer = self.peers.get_mut(name)?;
        if peer.keys.contains_key(&sending) {
            return Some(());
        }
        let own = self.own.get(&sending.sender)?;
        let theirs = peer.epochs.get(&sending.receiver)?;
        let kid = keys::common_kid(&own.statement.kids, &theirs.statement.kids)?;
        let psk = self.psks.get(kid)?;
        let derived = keys::Pair::derive(
            psk,
            &own.secret,
            &own.encoded,
            &theirs.statement.public,
            &theirs.encoded,
        );
        match derived {
            Ok(keys::Pair {
                outbound,
                inbound,
                probe,
            }) => {
                let spent = self
                    .spent
                    .get(&sending.sender)
                    .is_some_and(|all| all.contains(&theirs.statement.public));
                let outbound = if spent {
                    Sending::Made(LiteMap::new_vec())
                } else {
                    Sending::Fresh(Box::new(outbound))
                };
                peer.keys.insert(
                    sending,
                    Box::new(Keys {
                        outbound,
                        inbound,
                        probe,
                    }),
                );
                Some(())
            }
            Err(error) => {
                peer.trouble = Some(error.to_string());
                None
            }
        }
    }
}
