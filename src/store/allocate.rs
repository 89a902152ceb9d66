//! Which free subnets a node takes. Pure: what is taken and a random number go in.

use ipnet::{Ipv4Net, Ipv6Net};
use keys::Slot;

use super::Claim;
use crate::lease::{Network, Subnets};

/// The address ranges that are leased, whatever their sizes.
#[derive(Clone, Debug, Default)]
pub(super) struct Taken {
    v4: Ranges,
    v6: Ranges,
}

/// Ranges from first to last address: sorted, apart from each other.
#[derive(Clone, Debug, Default)]
struct Ranges(Vec<(u128, u128)>);

/// The subnets to take: the previous ones where `network` gives them out and they are free, else the first free ones at
/// or after a random slot. `None` where all are taken.
pub(super) fn choose(network: &Network, taken: &Taken, claim: &Claim) -> Option<Subnets> {
    let given = |subnets: &Subnets| {
        network
            .slot(subnets)
            .is_ok_and(|slot| network.slots().contains(&slot.get()))
    };
    let previous = claim
        .previous
        .filter(|subnets| given(subnets) && !taken.overlaps(subnets));
    previous.or_else(|| {
        let slots = network.slots();
        let count = u64::from(slots.end().checked_sub(*slots.start())?) + 1;
        let start = slots.start() + u32::try_from(claim.random % count).expect("below 2^20");
        let around = (start..=*slots.end()).chain(*slots.start()..start);
        let mut all = around.filter_map(|slot| network.subnets(Slot::new(slot).ok()?));
        all.find(|subnets| !taken.overlaps(subnets))
    })
}

impl Taken {
    /// Adds `subnets` to what is taken.
    pub(super) fn insert(&mut self, subnets: Subnets) {
        self.extend([subnets]);
    }

    /// Whether any address of `subnets` is taken.
    fn overlaps(&self, subnets: &Subnets) -> bool {
        subnets.v4.is_some_and(|net| self.v4.overlaps(ends_v4(net)))
            || subnets.v6.is_some_and(|net| self.v6.overlaps(ends_v6(net)))
    }
}

impl Extend<Subnets> for Taken {
    fn extend<I: IntoIterator<Item = Subnets>>(&mut self, all: I) {
        for Subnets { v4, v6 } in all {
            self.v4.0.extend(v4.map(ends_v4));
            self.v6.0.extend(v6.map(ends_v6));
        }
        self.v4.merge();
        self.v6.merge();
    }
}

impl FromIterator<Subnets> for Taken {
    fn from_iter<I: IntoIterator<Item = Subnets>>(all: I) -> Self {
        let mut taken = Self::default();
        taken.extend(all);
        taken
    }
}

impl Ranges {
    fn merge(&mut self) {
        self.0.sort_unstable();
        self.0.dedup_by(|next, kept| {
            let touches = next.0 <= kept.1;
            kept.1 = if touches { kept.1.max(next.1) } else { kept.1 };
            touches
        });
    }

    fn overlaps(&self, (first, last): (u128, u128)) -> bool {
        let after = self.0.partition_point(|range| range.0 <= last);
        after.checked_sub(1).is_some_and(|before| self.0[before].1 >= first)
    }
}

fn ends_v4(net: Ipv4Net) -> (u128, u128) {
    (u32::from(net.network()).into(), u32::from(net.broadcast()).into())
}

fn ends_v6(net: Ipv6Net) -> (u128, u128) {
    (net.network().into(), net.broadcast().into())
}
