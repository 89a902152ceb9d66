//! Whether packets of the mesh MTU pass to each peer: what is asked for it, and what is told of it.

use std::time::Duration;

use super::{Datagram, Node, Peer};
use crate::lease::NodeName;
use crate::probe::size::{self, Round, Sizes};
use crate::probe::{LEN, SETTLED};

/// After a new generation all peers are asked within so much for each of them.
const SHARE: Duration = Duration::from_millis(4);
/// At least.
const SOON: Duration = Duration::from_secs(1);
/// Bytes of an IPv4 header and a UDP header (RFC 791, RFC 768).
const IPV4_UDP: usize = 28;
/// Bytes of an IPv6 header and a UDP header (RFC 8200).
const IPV6_UDP: usize = 48;

impl Node {
    /// The size of the largest packet that a pod may send to a peer as our data goes now, bytes.
    fn full_size(&self, peer: &Peer) -> Option<u16> {
        let mesh = self.mtu()?;
        let fits = peer.pair.newest().and_then(|newest| self.narrower(peer, newest));
        u16::try_from(fits.unwrap_or(mesh)).ok()
    }

    /// Asks a peer that is settled whether full size passes, if that is due.
    pub(super) fn ask_sizes(
        &mut self,
        name: &NodeName,
        now: Duration,
        jitter: &mut dyn FnMut() -> f64,
        out: &mut Vec<Datagram>,
    ) {
        let Some(peer) = self.peers.get(name).filter(|peer| peer.pair.settled()) else {
            return;
        };
        let (data, full, unsure) = (self.data(peer), self.full_size(peer), self.unsure(name));
        let rest = size::rest(self.peers.len());
        let peers = u32::try_from(self.peers.len()).unwrap_or(u32::MAX);
        let other = self.ticket();
        let Some(peer) = self.peers.get_mut(name) else { return };
        let (Some(on), Some(full), false) = (data, full, unsure) else {
            return peer.sizes.postpone(now + SETTLED);
        };
        if !peer.sizes.is_about(on, full) {
            let spread = SHARE.saturating_mul(peers).max(SOON);
            peer.sizes
                .begin(on, full, now + spread.mul_f64(jitter().clamp(0.0, 1.0)));
        }
        if peer.sizes.due() > now {
            return;
        }
        let (lost, _) = peer.record.lost();
        let round_trip = peer.round_trip.unwrap_or_default();
        // The small one's is told apart from the other's by the bit below the highest.
        let tickets = [other, other | 1 << 62];
        let mut round = None;
        self.sized(name, |sizes| {
            let mut tickets = tickets.into_iter();
            round = sizes.round(now, rest, lost, round_trip, jitter(), || {
                tickets.next().unwrap_or_default()
            });
        });
        let Some(Round { size, ticket, small }) = round else {
            return;
        };
        if let Some(peer) = self.peers.get_mut(name) {
            (0..=u32::from(small.is_some())).for_each(|_| peer.arrivals.probe());
        }
        out.extend(small.and_then(|ticket| self.datagram(name, true, on.1, ticket)));
        out.extend(self.datagram(name, true, on.1, ticket).map(|datagram| {
            let headers = if datagram.to.is_ipv4() { IPV4_UDP } else { IPV6_UDP };
            Datagram {
                padding: usize::from(size).saturating_sub(headers + LEN),
                ..datagram
            }
        }));
    }

    /// The kernel did not send a datagram because of its size.
    pub fn too_large(&mut self, datagram: &Datagram, now: Duration) {
        let name = self.bases.get(&datagram.to).filter(|_| datagram.padding > 0).cloned();
        if let Some(name) = name {
            self.sized(&name, |sizes| sizes.refused(now));
            self.retimed(&name, |_| {});
        }
    }

    /// Changes what is known of sizes towards a peer, and logs what that comes to.
    pub(super) fn sized(&mut self, name: &NodeName, change: impl FnOnce(&mut Sizes)) {
        let Some(peer) = self.peers.get_mut(name) else { return };
        let before = peer.sizes.passes();
        change(&mut peer.sizes);
        let (after, full) = (peer.sizes.passes(), peer.sizes.full());
        match (before, after) {
            (None | Some(true), Some(false)) => {
                tracing::warn!(peer = %name, bytes = full, "packets of full size do not pass to a peer, small ones do");
            }
            (Some(false), Some(true)) => tracing::info!(peer = %name, bytes = full, "packets of full size pass again"),
            _ => {}
        }
    }

    /// What is to be said where full size does not pass to a peer.
    pub(super) fn too_narrow(&self, peer: &Peer) -> Option<String> {
        if peer.sizes.passes() != Some(false) {
            return None;
        }
        let full = peer.sizes.full();
        let largest = peer.sizes.largest();
        let small = largest.map_or_else(
            || "small ones do".to_owned(),
            |largest| format!("those of {largest} do"),
        );
        let lower = largest.map_or_else(
            || "lower MTU".to_owned(),
            |largest| format!("set MTU to {largest} or less"),
        );
        Some(format!(
            "packets of {full} bytes do not pass to it, {small}: {lower} in net-conf.json, or raise the MTU on the path to it"
        ))
    }
}
