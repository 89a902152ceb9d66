//! Keys on their way to the kernel: derived when first needed, a sending one handed out once.

use keys::SaKey;
use xfrm::Sa;

use super::{Keys, Node, Unused, sender};
use crate::backend::ipsec;
use crate::epochs::Generation;
use crate::lease::NodeName;

impl Node {
    /// The key of an SA of `name` that is about to be made. A sending SA's key is handed out once: `None` from then on,
    /// unless [`Node::refused`] brings it back.
    pub fn key(&mut self, name: &NodeName, sa: &Sa, born: Generation) -> Option<SaKey> {
        let own_slot = self.held?.1;
        let outgoing = sender(&sa.id()) == Some(own_slot);
        let sending = if outgoing { born } else { born.reverse() };
        self.derive(name, sending)?;
        let own_cipher = self.own.get(&sending.sender)?.statement.cipher;
        let peer = self.peers.get_mut(name)?;
        let theirs = &peer.epochs.get(&sending.receiver)?.statement;
        let keys = peer.keys.get_mut(&sending)?;
        if !outgoing {
            return Some(keys.inbound.key(theirs.cipher, ipsec::spi(peer.slot, born)));
        }
        let key = match std::mem::replace(&mut keys.outbound, Unused::Spent) {
            Unused::Fresh(outbound) => outbound.into_key(own_cipher, ipsec::spi(own_slot, born)),
            Unused::Back(key) => key,
            Unused::Spent => return None,
        };
        self.spent.entry(sending.sender).or_default().insert(theirs.public);
        peer.pair.programmed(sending);
        Some(key)
    }

    /// The kernel refused the SA that `key` was for, so it was never used: a sending one may be tried again.
    pub fn refused(&mut self, name: &NodeName, born: Generation, key: SaKey) {
        if key.spi().parts().ok().map(|parts| parts.slot) != self.slot() {
            return;
        }
        if let Some(peer) = self.peers.get_mut(name) {
            if let Some(keys) = peer.keys.get_mut(&born) {
                keys.outbound = Unused::Back(key);
            }
            peer.pair.refused(born);
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
                    Unused::Spent
                } else {
                    Unused::Fresh(Box::new(outbound))
                };
                peer.keys.insert(
                    sending,
                    Keys {
                        outbound,
                        inbound,
                        probe,
                    },
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
