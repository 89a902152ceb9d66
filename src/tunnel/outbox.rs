//! What goes to peers next: packets one behind the other, and where the kernel's messages begin and end among them.

use std::net::SocketAddr;

use super::socket::{LARGEST_MESSAGE, Message, SEND_MESSAGES};

/// Bytes that are gathered before they are sent. More than two large packets, so that what is left of one, which does not
/// fit a message of 65,507 bytes, goes with the next.
const ENOUGH: usize = 128 << 10;

/// Packets that wait to be sent.
#[derive(Debug)]
pub(super) struct Outbox {
    arena: Vec<u8>,
    used: usize,
    messages: Vec<Message>,
    /// Datagrams of the last message.
    count: usize,
    /// More may be added to the last message.
    open: bool,
    /// Datagrams of a message at most; 1 for no segmentation.
    most: usize,
}

impl Outbox {
    /// With at most so many datagrams a message.
    pub(super) fn new(most: usize) -> Self {
        Self {
            arena: vec![0; ENOUGH + LARGEST_MESSAGE],
            used: 0,
            messages: Vec::with_capacity(SEND_MESSAGES),
            count: 0,
            open: false,
            most,
        }
    }

    /// Whether it should be sent before anything is added.
    pub(super) fn is_full(&self) -> bool {
        self.used >= ENOUGH || self.messages.len() == SEND_MESSAGES
    }

    /// Room for the next packet of `length` bytes, 1 to 65,507, which is to be filled: behind the last in its message if
    /// it may be, else in one of its own. `alone`: this peer's path takes no segmentation. Not to be called when full.
    pub(super) fn add(&mut self, peer: SocketAddr, length: usize, alone: bool) -> &mut [u8] {
        let start = self.used;
        self.used += length;
        match self.messages.last_mut() {
            Some(last)
                if self.open
                    && !alone
                    && last.peer == peer
                    && length <= last.segment
                    && last.length + length <= LARGEST_MESSAGE
                    && self.count < self.most =>
            {
                last.length += length;
                self.count += 1;
                // Only the last datagram may be shorter.
                self.open = length == last.segment;
            }
            _ => {
                self.messages.push(Message {
                    peer,
                    start,
                    length,
                    segment: length,
                });
                self.count = 1;
                self.open = !alone && self.most > 1;
            }
        }
        &mut self.arena[start..start + length]
    }

    /// What is to be sent.
    pub(super) fn messages(&self) -> (&[u8], &[Message]) {
        (&self.arena, &self.messages)
    }

    pub(super) fn clear(&mut self) {
        self.used = 0;
        self.messages.clear();
        self.open = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The datagrams that the kernel makes of a message.
    fn datagrams(outbox: &Outbox) -> Vec<(SocketAddr, Vec<u8>)> {
        let (arena, messages) = outbox.messages();
        messages
            .iter()
            .flat_map(|message| {
                let bytes = &arena[message.start..message.start + message.length];
                bytes
                    .chunks(message.segment)
                    .map(|datagram| (message.peer, datagram.to_vec()))
            })
            .collect()
    }

    proptest! {
        #[test]
        fn the_datagrams_are_the_packets_in_order_whatever_their_sizes(
            packets in proptest::collection::vec((0u8..3, prop_oneof![Just(1472usize), 20..1500usize, Just(60)], 0u8..10), 1..300),
            most in prop_oneof![Just(1usize), Just(63), Just(127)],
        ) {
            let mut outbox = Outbox::new(most);
            let mut expected = Vec::new();
            for (number, (peer, length, alone)) in packets.into_iter().enumerate() {
                if outbox.is_full() {
                    break;
                }
                let peer = SocketAddr::from(([192, 0, 2, peer], 8285));
                outbox.add(peer, length, alone == 0).fill(number as u8);
                expected.push((peer, vec![number as u8; length]));
            }
            prop_assert_eq!(datagrams(&outbox), expected);
            for message in outbox.messages().1 {
                prop_assert!(message.length <= LARGEST_MESSAGE);
                prop_assert!(message.length.div_ceil(message.segment) <= most);
            }
        }
    }

    #[test]
    fn a_bulk_stream_fills_its_messages() {
        let mut outbox = Outbox::new(127);
        let peer = SocketAddr::from(([192, 0, 2, 1], 8285));
        while !outbox.is_full() {
            outbox.add(peer, 1472, false);
        }
        let counts: Vec<usize> = outbox
            .messages()
            .1
            .iter()
            .map(|message| message.length / 1472)
            .collect();
        assert_eq!(counts, [44, 44, 2]);
        outbox.clear();
        assert_eq!(outbox.messages().1, []);
    }
}
