//! The numbers that name things: epochs, slots, and the SPI that is made of them.
//!
//! ```text
//!  31   30                 12 11       6 5         0
//! +----+---------------------+----------+-----------+
//! | in | slot of the sender  | sender's | receiver's|
//! | UDP|        + 1          | epoch    | epoch     |
//! |    |                     | mod 64   | mod 64    |
//! +----+---------------------+----------+-----------+
//! ```
//! At one receiver no two senders share a slot, no two live epochs of one node share a value modulo 64, and a generation
//! has one SA a carrier, so no two SAs share an SPI. The slot's field is never 0, which keeps clear of the reserved SPIs
//! 0 to 255 (RFC 4303 section 2.1), and never all ones.

use std::collections::BTreeSet;
use std::fmt;

use thiserror::Error;

/// The life of one ephemeral key of a node. Epochs of a node only rise.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Epoch(pub u64);

impl Epoch {
    /// What an [`Spi`] shows of this epoch: 0 to 63.
    pub const fn mod64(self) -> u8 {
        (self.0 % EPOCHS) as u8
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The epoch to publish next: the smallest that is above `previous_in_store`, not below `unix_seconds` and, modulo 64,
/// not in `taken_mod64` (the values that SAs in the kernel still show; numbers above 63 mean nothing).
///
/// `previous_in_store` is to come from a statement whose tag verified: an unauthenticated one could be
/// [`u64::MAX`] and leave no number to go to.
///
/// # Errors
/// [`NoEpoch`], when all 64 values are taken or the numbers end.
pub fn next_epoch(
    previous_in_store: Option<Epoch>,
    unix_seconds: u64,
    taken_mod64: &BTreeSet<u8>,
) -> Result<Epoch, NoEpoch> {
    let above = match previous_in_store {
        Some(Epoch(previous)) => previous.checked_add(1).ok_or(NoEpoch::NumbersEnd { previous })?,
        None => 0,
    };
    let first = above.max(unix_seconds);
    let free = |epoch: &Epoch| !taken_mod64.contains(&epoch.mod64());
    match (first..=first.saturating_add(EPOCHS - 1)).map(Epoch).find(free) {
        Some(epoch) => Ok(epoch),
        None if first > u64::MAX - (EPOCHS - 1) => Err(NoEpoch::NumbersEnd { previous: first }),
        None => Err(NoEpoch::AllTaken),
    }
}

/// Why there is no next epoch.
#[derive(Clone, Copy, Debug, Eq, Error, PartialEq)]
pub enum NoEpoch {
    /// SAs of 64 epochs of this node stand in the kernel.
    #[error(
        "all 64 epoch numbers of this node are in use by SAs in the kernel: remove old SAs with `systemctl stop ringmail && \
         ringmail cleanup`, and start it again"
    )]
    AllTaken,
    /// The previous epoch, or the clock, is at the end of the numbers.
    #[error(
        "no epoch follows {previous}: correct this node's clock, take its lease out of the store with `systemctl stop \
         ringmail && ringmail cleanup`, and start it again"
    )]
    NumbersEnd {
        /// The last number that could not be gone beyond.
        previous: u64,
    },
}

/// A subnet's index in the Network: 0 to 2^19 - 3.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Slot(u32);

impl Slot {
    /// The highest slot that an SPI has room for.
    pub const MAX: Self = Self((1 << 19) - 3);

    /// # Errors
    /// [`SlotOutOfRange`], when `index` is above [`Slot::MAX`].
    pub const fn new(index: u32) -> Result<Self, SlotOutOfRange> {
        if index <= Self::MAX.0 {
            Ok(Self(index))
        } else {
            Err(SlotOutOfRange(index))
        }
    }

    /// The index.
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl fmt::Display for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// An index above [`Slot::MAX`].
#[derive(Clone, Copy, Debug, Eq, Error, PartialEq)]
#[error("slot {0} is above {max}: use a smaller Network or a shorter SubnetLen", max = Slot::MAX)]
pub struct SlotOutOfRange(pub u32);

/// What an SA's packets travel in. The kernel takes one of the two on an SA, never both.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Carrier {
    /// Plain ESP: IP protocol 50.
    Esp,
    /// ESP in UDP (RFC 3948).
    Udp,
}

impl fmt::Display for Carrier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Esp => "esp",
            Self::Udp => "udp",
        })
    }
}

/// A security parameter index as it stands in a packet and in `ip xfrm state`. Any number can be one: those of
/// foreign SAs have no [`parts`](Spi::parts) of ours, or meaningless ones.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Spi(pub u32);

impl Spi {
    /// The SPI of the generation (`sender_epoch`, `receiver_epoch`) of a sender in `sender_slot`, in plain ESP.
    pub const fn new(sender_slot: Slot, sender_epoch: Epoch, receiver_epoch: Epoch) -> Self {
        Self((sender_slot.0 + 1) << 12 | (sender_epoch.mod64() as u32) << 6 | receiver_epoch.mod64() as u32)
    }

    /// The SPI of the same generation over `carrier`.
    #[must_use]
    pub const fn over(self, carrier: Carrier) -> Self {
        match carrier {
            Carrier::Esp => Self(self.0 & !IN_UDP),
            Carrier::Udp => Self(self.0 | IN_UDP),
        }
    }

    /// Takes the SPI apart.
    ///
    /// # Errors
    /// [`ForeignSpi`], when [`Spi::new`] and [`Spi::over`] make no such number.
    pub const fn parts(self) -> Result<SpiParts, ForeignSpi> {
        let Some(index) = ((self.0 & !IN_UDP) >> 12).checked_sub(1) else {
            return Err(ForeignSpi(self));
        };
        let Ok(slot) = Slot::new(index) else {
            return Err(ForeignSpi(self));
        };
        Ok(SpiParts {
            slot,
            sender_mod64: (self.0 >> 6 & 63) as u8,
            receiver_mod64: (self.0 & 63) as u8,
            carrier: if self.0 & IN_UDP == 0 {
                Carrier::Esp
            } else {
                Carrier::Udp
            },
        })
    }
}

impl fmt::Display for Spi {
    /// As iproute2 prints it: `0x0000c0de`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "0x{:08x}", self.0)
    }
}

/// What an [`Spi`] says.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct SpiParts {
    /// The sender's slot.
    pub slot: Slot,
    /// The sender's epoch modulo 64.
    pub sender_mod64: u8,
    /// The receiver's epoch modulo 64.
    pub receiver_mod64: u8,
    /// What it travels in.
    pub carrier: Carrier,
}

/// An SPI that no node of ours makes.
#[derive(Clone, Copy, Debug, Eq, Error, PartialEq)]
#[error("SPI {0} is not of the form that ringmail makes")]
pub struct ForeignSpi(pub Spi);

/// The bit of an SPI that says "in UDP".
const IN_UDP: u32 = 1 << 31;

/// Epoch numbers that an SPI can tell apart.
const EPOCHS: u64 = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_spi_prints_as_iproute2_does() {
        let spi = Spi::new(Slot::new(11).expect("small"), Epoch(64 + 3), Epoch(30));
        assert_eq!(spi.to_string(), "0x0000c0de");
    }

    #[test]
    fn the_lowest_and_the_highest_slot_give_spis_that_the_kernel_takes() {
        assert_eq!(Spi::new(Slot(0), Epoch(0), Epoch(0)), Spi(0x1000));
        assert_eq!(Spi::new(Slot::MAX, Epoch(63), Epoch(127)), Spi(0x7fff_efff));
        assert_eq!(Spi(0x7fff_efff).over(Carrier::Udp), Spi(0xffff_efff));
        assert_eq!(Spi(0xffff_efff).over(Carrier::Esp), Spi(0x7fff_efff));
        assert_eq!(Slot::new(Slot::MAX.0 + 1), Err(SlotOutOfRange((1 << 19) - 2)));
    }

    #[test]
    fn foreign_spis_have_no_parts() {
        for spi in [0, 1, 0xfff, 0x7fff_f000, 0x8000_0fff, 0xffff_f000, u32::MAX] {
            assert_eq!(Spi(spi).parts(), Err(ForeignSpi(Spi(spi))));
        }
    }

    #[test]
    fn the_first_epoch_is_the_clock_and_a_clock_set_back_does_not_lower_it() {
        let none = BTreeSet::new();
        assert_eq!(next_epoch(None, 1_800_000_000, &none), Ok(Epoch(1_800_000_000)));
        assert_eq!(
            next_epoch(Some(Epoch(1_800_000_000)), 5, &none),
            Ok(Epoch(1_800_000_001))
        );
    }

    #[test]
    fn there_is_no_epoch_when_all_are_taken_or_the_numbers_end() {
        let all = (0..64).collect();
        assert_eq!(next_epoch(None, 7, &all), Err(NoEpoch::AllTaken));
        let none = BTreeSet::new();
        assert_eq!(
            next_epoch(Some(Epoch(u64::MAX)), 7, &none),
            Err(NoEpoch::NumbersEnd { previous: u64::MAX })
        );
        assert_eq!(next_epoch(None, u64::MAX, &none), Ok(Epoch(u64::MAX)));
        let last = BTreeSet::from([63]);
        assert_eq!(
            next_epoch(None, u64::MAX, &last),
            Err(NoEpoch::NumbersEnd { previous: u64::MAX })
        );
    }
}
