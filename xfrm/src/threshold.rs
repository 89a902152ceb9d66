//! The thresholds of the kernel's policy hash: from which prefix lengths on a policy is found by hashing.
//!
//! A policy whose prefixes are both at least as long as the threshold is in a hash table; the others are in trees whose
//! nodes hold lists. One wide policy merges every policy below it into one list (`xfrm_policy_inexact_insert_node`), which
//! is then walked for each packet and for each change: with a block for the whole mesh, the cost of a packet grows with the
//! number of peers. Lower thresholds (`ip xfrm policy set hthresh4 0 24`) take the peers' policies out of that list. They
//! change how fast a policy is found and never which one.

use netlink_packet_xfrm::constants::{
    XFRM_MSG_GETSPDINFO, XFRM_MSG_NEWSPDINFO, XFRMA_SPD_IPV4_HTHRESH, XFRMA_SPD_IPV6_HTHRESH,
};

use crate::{Batch, Error, MessageRef, Xfrm, message::attributes};

/// The flags that these messages begin with; the kernel has no use for them, and `ip` sets all.
const UNUSED: u32 = u32::MAX;

/// An address family of policies.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    fn attribute(self) -> u16 {
        match self {
            Self::V4 => XFRMA_SPD_IPV4_HTHRESH,
            Self::V6 => XFRMA_SPD_IPV6_HTHRESH,
        }
    }
}

/// `struct xfrmu_spdhthresh`: prefix lengths, bits. The local end is the source of an outgoing packet.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct HashThreshold {
    /// Of the selector's local end.
    pub local: u8,
    /// Of the selector's remote end.
    pub remote: u8,
}

impl HashThreshold {
    /// The kernel's own: addresses alone are hashed.
    pub const fn standard(family: Family) -> Self {
        let bits = match family {
            Family::V4 => 32,
            Family::V6 => 128,
        };
        Self {
            local: bits,
            remote: bits,
        }
    }
}

impl Batch {
    /// Sets the threshold of a family; the kernel then sorts its policies anew, while they go on serving.
    pub fn set_hash_threshold(&mut self, family: Family, threshold: HashThreshold) {
        self.push(XFRM_MSG_NEWSPDINFO, 0, |writer| {
            writer.u32(UNUSED);
            writer.attribute(family.attribute(), &[threshold.local, threshold.remote]);
        });
    }
}

impl Xfrm {
    /// The threshold of a family; `None` where the kernel has none (before Linux 3.18).
    pub fn hash_threshold(&mut self, family: Family) -> Result<Option<HashThreshold>, Error> {
        self.connection().get(
            XFRM_MSG_GETSPDINFO,
            0,
            |writer| writer.u32(UNUSED),
            |message| parse(&message, family),
        )
    }
}

/// What XFRM_MSG_NEWSPDINFO shows: 32 bits of flags, then attributes.
pub(crate) fn parse(message: &MessageRef<'_>, family: Family) -> Option<HashThreshold> {
    let (_, payload) = attributes(message.payload.get(4..)?).find(|(kind, _)| *kind == family.attribute())?;
    let [local, remote] = *payload.first_chunk()?;
    Some(HashThreshold { local, remote })
}
