//! Which peer has which subnet: a whole table, never changed, looked up once a packet.

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

/// Entries of an array at most: 4 bytes each. A Network of more subnets than that is searched by halving.
const LARGEST_ARRAY: u128 = 1 << 18;

/// No peer, in an array.
const NONE: u32 = u32::MAX;

/// A snapshot of all routes: subnet to the public address and port of the peer that holds it.
///
/// Where all subnets have one length, as a Network's have, a lookup is one access to an array. Others are found by
/// longest prefix, one search a length that occurs.
#[derive(Clone, Debug, Default)]
pub struct Routes {
    peers: Vec<SocketAddr>,
    /// Sorted, without repetition.
    addresses: Vec<IpAddr>,
    v4: Vec<Level>,
    v6: Vec<Level>,
    own: Vec<IpNet>,
}

/// All subnets of one length; levels stand in order of falling length.
#[derive(Clone, Debug)]
struct Level {
    /// Bits to the right of a subnet's number: 0 to 128.
    shift: u32,
    table: Table,
}

#[derive(Clone, Debug)]
enum Table {
    /// Peers by subnet number less `first`.
    Array { first: u128, peers: Vec<u32> },
    /// Subnet numbers and peers, sorted.
    Sorted(Vec<(u128, u32)>),
}

impl Routes {
    /// A table of these. Host bits of a subnet do not count; of two routes for one subnet the last counts.
    pub fn new(routes: impl IntoIterator<Item = (IpNet, SocketAddr)>) -> Self {
        let mut routes: Vec<(IpNet, SocketAddr)> = routes.into_iter().map(|(net, peer)| (net.trunc(), peer)).collect();
        // Stable, so that the last of equals stays last.
        routes.sort_by_key(|(net, _)| (std::cmp::Reverse(net.prefix_len()), net.network()));
        let mut peers: Vec<SocketAddr> = routes.iter().map(|(_, peer)| *peer).collect();
        peers.sort_unstable();
        peers.dedup();
        let mut addresses: Vec<IpAddr> = peers.iter().map(|peer| peer.ip().to_canonical()).collect();
        addresses.sort_unstable();
        addresses.dedup();
        let levels = |v6: bool| {
            let width = if v6 { 128 } else { 32 };
            let chosen: Vec<(u32, u128, u32)> = routes
                .iter()
                .filter(|(net, _)| matches!(net, IpNet::V6(_)) == v6)
                .map(|(net, peer)| {
                    let shift = width - u32::from(net.prefix_len());
                    let index = peers.binary_search(peer).expect("every peer was collected above");
                    (shift, number(bits(net.network()), shift), index as u32)
                })
                .collect();
            chosen
                .chunk_by(|one, other| one.0 == other.0)
                .map(Level::new)
                .collect::<Vec<_>>()
        };
        let (v4, v6) = (levels(false), levels(true));
        Self {
            peers,
            addresses,
            v4,
            v6,
            own: Vec::new(),
        }
    }

    /// The same table of a node that holds these subnets itself: one a family.
    #[must_use]
    pub fn with_own(mut self, own: impl IntoIterator<Item = IpNet>) -> Self {
        self.own = own.into_iter().collect();
        self
    }

    /// Whether a packet with this inner source may come from `public`: not one of this node's own subnets, nor of another
    /// peer's. What is in nobody's subnet, a Service's client for instance, may come from every peer.
    pub fn admits(&self, inner: IpAddr, public: IpAddr) -> bool {
        let owner = self.peer(inner);
        owner.is_none_or(|peer| peer.ip().to_canonical() == public) && !self.own.iter().any(|net| net.contains(&inner))
    }

    /// The peer whose subnet has this inner address.
    pub fn peer(&self, inner: IpAddr) -> Option<SocketAddr> {
        let levels = if inner.is_ipv4() { &self.v4 } else { &self.v6 };
        let bits = bits(inner);
        levels
            .iter()
            .find_map(|level| level.find(bits))
            .map(|index| self.peers[index as usize])
    }

    /// Whether a peer has this public address.
    pub fn knows(&self, public: IpAddr) -> bool {
        self.addresses.binary_search(&public.to_canonical()).is_ok()
    }

    /// Whether there is no route at all.
    pub fn is_empty(&self) -> bool {
        self.peers.is_empty()
    }
}

fn bits(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u128::from(address.to_bits()),
        IpAddr::V6(address) => address.to_bits(),
    }
}

/// The number of a subnet; a shift of 128 is the one of length 0.
fn number(bits: u128, shift: u32) -> u128 {
    bits.checked_shr(shift).unwrap_or(0)
}

impl Level {
    /// From routes of one length, not empty, in order of subnets.
    fn new(routes: &[(u32, u128, u32)]) -> Self {
        let (shift, first, _) = routes[0];
        let span = routes[routes.len() - 1].1 - first + 1;
        let table = if span <= LARGEST_ARRAY {
            let mut peers = vec![NONE; span as usize];
            for (_, number, peer) in routes {
                peers[(number - first) as usize] = *peer;
            }
            Table::Array { first, peers }
        } else {
            let mut sorted: Vec<(u128, u32)> = Vec::with_capacity(routes.len());
            for (_, number, peer) in routes {
                match sorted.last_mut() {
                    Some(last) if last.0 == *number => last.1 = *peer,
                    _ => sorted.push((*number, *peer)),
                }
            }
            Table::Sorted(sorted)
        };
        Self { shift, table }
    }

    fn find(&self, bits: u128) -> Option<u32> {
        let number = number(bits, self.shift);
        match &self.table {
            Table::Array { first, peers } => {
                let offset = usize::try_from(number.checked_sub(*first)?).ok()?;
                peers.get(offset).copied().filter(|peer| *peer != NONE)
            }
            Table::Sorted(sorted) => {
                let at = sorted.binary_search_by_key(&number, |(number, _)| *number).ok()?;
                Some(sorted[at].1)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn peer(number: u32) -> SocketAddr {
        SocketAddr::from((number.to_be_bytes(), 8285))
    }

    /// The slow truth: all routes looked at, the longest that fits, the last of equals.
    fn naive(routes: &[(IpNet, SocketAddr)], inner: IpAddr) -> Option<SocketAddr> {
        let fits = routes.iter().filter(|(net, _)| net.contains(&inner));
        fits.max_by_key(|(net, _)| net.prefix_len()).map(|(_, peer)| *peer)
    }

    fn net() -> impl Strategy<Value = IpNet> {
        // Few bits set, so that subnets nest and repeat.
        let v4 = (any::<u32>(), 0u8..=32).prop_map(|(bits, length)| {
            let address = IpAddr::from((0x0a00_0000 | bits & 0x0003_0703).to_be_bytes());
            IpNet::new(address, length).expect("a length in range")
        });
        let v6 = (any::<u128>(), 0u8..=128).prop_map(|(bits, length)| {
            let bits = 0xfd00 << 112 | bits & (0x3 << 64 | 0x7 << 80 | 0x3 | 0x1 << 126);
            IpNet::new(IpAddr::from(bits.to_be_bytes()), length).expect("a length in range")
        });
        prop_oneof![v4, v6]
    }

    proptest! {
        #[test]
        fn the_longest_prefix_wins_as_by_looking_at_all(
            nets in proptest::collection::vec((net(), 1u32..6), 0..40),
            asked in proptest::collection::vec(net(), 1..40),
        ) {
            let list: Vec<(IpNet, SocketAddr)> = nets.into_iter().map(|(net, number)| (net, peer(number))).collect();
            let routes = Routes::new(list.clone());
            let inside = list.iter().map(|(net, _)| net.broadcast());
            for inner in asked.iter().map(IpNet::addr).chain(inside) {
                prop_assert_eq!(routes.peer(inner), naive(&list, inner), "{}", inner);
            }
        }
    }

    #[test]
    fn a_network_of_equal_subnets_is_one_array_for_each_family() {
        let routes = (0..=255u8).map(|number| {
            let net: IpNet = format!("10.244.{number}.0/24").parse().expect("a net");
            (net, peer(u32::from(number) + 1))
        });
        let routes = Routes::new(routes);
        assert!(matches!(&routes.v4[..], [Level { table: Table::Array { peers, .. }, .. }] if peers.len() == 256));
        assert_eq!(routes.peer("10.244.7.9".parse().expect("an address")), Some(peer(8)));
        assert_eq!(routes.peer("10.245.0.1".parse().expect("an address")), None);
        assert_eq!(routes.peer("10.243.255.1".parse().expect("an address")), None);
    }

    #[test]
    fn subnets_far_apart_take_no_memory_for_what_lies_between() {
        let routes = Routes::new(["fd00::/64", "fe00::/64"].map(|net| (net.parse().expect("a net"), peer(1))));
        assert!(matches!(&routes.v6[..], [Level { table: Table::Sorted(sorted), .. }] if sorted.len() == 2));
    }

    #[test]
    fn an_address_is_known_only_while_a_route_leads_to_it() {
        let routes = Routes::new([("10.244.1.0/24".parse().expect("a net"), peer(1))]);
        assert!(routes.knows("0.0.0.1".parse().expect("an address")));
        assert!(routes.knows("::ffff:0.0.0.1".parse().expect("an address")));
        assert!(!routes.knows("0.0.0.2".parse().expect("an address")));
        assert!(!Routes::default().knows("0.0.0.1".parse().expect("an address")));
    }
}
