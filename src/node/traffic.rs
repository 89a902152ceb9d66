//! What the kernel's counters come to: its SAs come and go with every epoch, and a counter of a monitoring system only
//! rises.

use std::collections::BTreeMap;
use std::ops::AddAssign;

use xfrm::SaId;

use crate::kernel::{Counters, Key, Object};
use crate::lease::NodeName;

/// Packets and their bytes.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Flow {
    /// Packets.
    pub packets: u64,
    /// Inner bytes.
    pub bytes: u64,
}

/// What was carried between this node and one peer, or all.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
pub struct Carried {
    /// To it.
    pub sent: Flow,
    /// From it.
    pub received: Flow,
    /// Packets refused: failed integrity check, replayed, outside the window.
    pub errors: u64,
}

impl AddAssign for Carried {
    fn add_assign(&mut self, more: Self) {
        let Self { sent, received, errors } = more;
        for (to, more) in [(&mut self.sent, sent), (&mut self.received, received)] {
            to.packets += more.packets;
            to.bytes += more.bytes;
        }
        self.errors += errors;
    }
}

/// Which way an SA carries, and whose it is.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct End<'a> {
    /// The peer at its other end.
    pub peer: &'a NodeName,
    /// Whether this node sends on it.
    pub sends: bool,
}

/// What was carried since the first reading. What an SA carried after the last reading before its end is not in here.
#[derive(Clone, Debug, Default)]
pub struct Traffic {
    seen: BTreeMap<SaId, Counters>,
    peers: BTreeMap<NodeName, Carried>,
    all: Carried,
}

impl Traffic {
    /// Takes a reading. `began` is when this process did, seconds since 1970: what an SA of an earlier one carried before
    /// the first reading was told by that one. `end` knows the SAs.
    pub fn read<'a>(&mut self, counters: BTreeMap<SaId, Counters>, began: u64, end: impl Fn(&SaId) -> Option<End<'a>>) {
        if counters.is_empty() {
            // As where the kernel did not answer: they are not new when they come again.
            return;
        }
        for (id, now) in &counters {
            let before = match self.seen.get(id) {
                Some(before) if before.made == now.made && before.packets <= now.packets => *before,
                None if now.made < began => *now,
                // Another SA of the same SPI, or a new one.
                Some(_) | None => Counters::default(),
            };
            let Some(End { peer, sends }) = end(id) else { continue };
            let flow = Flow {
                packets: now.packets.saturating_sub(before.packets),
                bytes: now.bytes.saturating_sub(before.bytes),
            };
            let mut more = Carried {
                errors: now.errors.saturating_sub(before.errors),
                ..Carried::default()
            };
            *(if sends { &mut more.sent } else { &mut more.received }) = flow;
            self.all += more;
            match self.peers.get_mut(peer) {
                Some(carried) => *carried += more,
                None => {
                    self.peers.insert(peer.clone(), more);
                }
            }
        }
        self.seen = counters;
    }

    /// Forgets the peers that are not among `known`; what they carried stays in the sum of all.
    pub fn keep(&mut self, known: impl Fn(&NodeName) -> bool) {
        self.peers.retain(|name, _| known(name));
    }

    /// By peer.
    pub fn peers(&self) -> &BTreeMap<NodeName, Carried> {
        &self.peers
    }

    /// All peers together.
    pub fn all(&self) -> Carried {
        self.all
    }
}

/// How near the nearest SA is to its soft limit, at which a new epoch is wanted.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Headroom {
    /// The fewest packets that an SA has left; 0 for one that is over it.
    pub packets: u64,
    /// The largest share that an SA has carried of its limit of packets or of bytes; above 1 for one that is over it.
    pub spent: f64,
}

impl Headroom {
    /// That of the SAs among `objects`; `None` where none has a limit.
    pub fn of<'a>(
        objects: impl Iterator<Item = (&'a Key, &'a Object)>,
        counters: &BTreeMap<SaId, Counters>,
    ) -> Option<Self> {
        let each = objects.filter_map(|(key, object)| match (key, object) {
            (Key::Sa(id), Object::Sa { sa, .. }) if sa.limits.soft_packets != u64::MAX => {
                let count = counters.get(id)?;
                let share = |count: u64, limit: u64| count as f64 / limit.max(1) as f64;
                let packets = share(count.packets, sa.limits.soft_packets);
                Some(Self {
                    packets: sa.limits.soft_packets.saturating_sub(count.packets),
                    spent: packets.max(share(count.bytes, sa.limits.soft_bytes)),
                })
            }
            _ => None,
        });
        each.reduce(|one, other| Self {
            packets: one.packets.min(other.packets),
            spent: one.spent.max(other.spent),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(spi: u32) -> SaId {
        SaId {
            dst: "192.0.2.2".parse().expect("an address"),
            spi,
        }
    }

    fn count(packets: u64, made: u64) -> Counters {
        Counters {
            packets,
            bytes: packets * 100,
            errors: packets / 10,
            made,
            used: 0,
        }
    }

    #[test]
    fn what_was_carried_only_rises_while_sas_come_and_go() {
        let (a, b) = (NodeName::new("a").expect("a name"), NodeName::new("b").expect("a name"));
        let end = |id: &SaId| {
            Some(End {
                peer: match id.spi / 10 {
                    1 => &a,
                    2 => &b,
                    _ => return None,
                },
                sends: id.spi.is_multiple_of(10),
            })
        };
        let mut traffic = Traffic::default();
        let mut before = Carried::default();
        let mut read = |counters: &[(u32, Counters)], packets: [u64; 3]| {
            let counters = counters.iter().map(|(spi, count)| (id(*spi), *count)).collect();
            traffic.read(counters, 1000, end);
            let peer = |name| traffic.peers().get(name).copied().unwrap_or_default();
            let now = [peer(&a).sent, peer(&a).received, peer(&b).sent].map(|flow| flow.packets);
            assert_eq!(now, packets);
            let all = traffic.all();
            assert_eq!(all.sent.packets + all.received.packets, packets.iter().sum::<u64>());
            assert_eq!(all.sent.bytes, all.sent.packets * 100);
            assert!(all.sent.packets >= before.sent.packets && all.errors >= before.errors);
            before = all;
        };
        // One of an earlier process, one of this, one of nobody.
        read(
            &[(10, count(500, 999)), (11, count(7, 1000)), (90, count(9, 1000))],
            [0, 7, 0],
        );
        read(&[(10, count(530, 999)), (11, count(8, 1000))], [30, 8, 0]);
        // The old goes, a new one comes, of another peer too.
        read(
            &[(11, count(8, 1000)), (10, count(3, 1200)), (20, count(5, 1200))],
            [33, 8, 5],
        );
        read(&[(20, count(2, 1300))], [33, 8, 7]);
        read(&[], [33, 8, 7]);
        traffic.keep(|name| *name == b);
        assert_eq!((traffic.peers().len(), traffic.all().sent.packets), (1, 40));
    }
}
