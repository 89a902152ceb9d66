//! Whether what comes from a peer by itself shows that it is there and has the keys: then a question can be left out.
//!
//! What came through the peer's newest SA was sealed with a key that only it has. It says nothing of the way there; the peer
//! sees that one, and asks where nothing comes. So every fourth question is sent in any case, for the round trip as well.

use std::time::Duration;

/// So many questions in a row are left out at most.
const MOST: u8 = 3;

/// What has come from one peer, as far as it was looked at.
#[derive(Clone, Copy, Debug, Default)]
pub struct Arrivals {
    /// The SPI of the SA that it came on; 0 for none yet.
    spi: u32,
    /// The packets on it at the last look, modulo 2³².
    packets: u32,
    /// How many packets have come since, at most, that are no data: a peer's questions, and what each of ours brings, an
    /// answer or its kernel's word that nobody is there.
    probes: u32,
    /// Whether more than probes had come by the last look since the one before.
    came: bool,
    /// The last look before which data had come.
    heard: Option<Duration>,
    /// How many questions in a row were left out.
    left_out: u8,
}

impl Arrivals {
    /// A question came, or went out.
    pub fn probe(&mut self) {
        self.probes = self.probes.saturating_add(1);
    }

    /// Looks at `now` at how many `packets` the inbound SA `spi` has carried: whether data came since the last look. `open`:
    /// the answer to a question is still to come.
    pub fn look(&mut self, spi: u32, packets: u64, open: bool, now: Duration) -> bool {
        let packets = packets as u32;
        self.came = self.spi == spi && packets.wrapping_sub(self.packets) > self.probes;
        (self.spi, self.packets, self.probes) = (spi, packets, open.into());
        if self.came {
            self.heard = Some(now);
        }
        self.came
    }

    /// Until when data came, as far as it was looked at.
    pub fn heard(&self) -> Option<Duration> {
        self.heard
    }

    /// Whether the question that is due now is left out; what one look showed is good for one.
    pub fn leave_out(&mut self) -> bool {
        let leaves = std::mem::take(&mut self.came) && self.left_out < MOST;
        self.left_out = if leaves { self.left_out + 1 } else { 0 };
        leaves
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn look(arrivals: &mut Arrivals, spi: u32, packets: u64) -> bool {
        let came = arrivals.look(spi, packets, false, Duration::from_secs(packets));
        assert_eq!(came, arrivals.heard() == Some(Duration::from_secs(packets)));
        came
    }

    #[test]
    fn data_proves_a_peer_and_its_probes_do_not() {
        let mut arrivals = Arrivals::default();
        assert!(!look(&mut arrivals, 7, 1000), "nothing is known of what came before");
        assert!(!look(&mut arrivals, 7, 1000), "nothing came");
        arrivals.probe();
        arrivals.probe();
        assert!(!look(&mut arrivals, 7, 1002), "two probes");
        assert!(!arrivals.leave_out());
        arrivals.probe();
        assert!(look(&mut arrivals, 7, 1004), "a probe and a packet of data");
        assert!(arrivals.leave_out());
        assert!(!look(&mut arrivals, 8, 5000), "another SA");
        assert!(look(&mut arrivals, 8, u64::from(u32::MAX)));
        assert!(look(&mut arrivals, 8, u64::from(u32::MAX) + 1), "the count passes 2³²");
        arrivals.probe();
        assert!(!arrivals.look(8, 1 << 32, true, Duration::ZERO));
        assert!(
            !look(&mut arrivals, 8, (1 << 32) + 1),
            "the answer was on its way at the last look"
        );
    }

    #[test]
    fn no_more_than_three_questions_in_a_row_are_left_out() {
        let mut arrivals = Arrivals::default();
        look(&mut arrivals, 7, 1);
        let left_out = (2..11).map(|packets| look(&mut arrivals, 7, packets) && arrivals.leave_out());
        assert_eq!(
            left_out.collect::<Vec<_>>(),
            [true, true, true, false, true, true, true, false, true]
        );
        assert!(!arrivals.leave_out(), "one look, one question");
    }
}
