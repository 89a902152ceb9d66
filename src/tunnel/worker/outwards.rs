//! From the device to the peers.

use std::collections::BTreeMap;
use std::io::Error;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use super::{Common, Left, device_end};
use crate::tunnel::State;
use crate::tunnel::counters::{Cell, Offload};
use crate::tunnel::icmp::Problem;
use crate::tunnel::outbox::Outbox;
use crate::tunnel::packet::Ip;
use crate::tunnel::shared::Shared;
use crate::tunnel::socket::{LARGEST_MESSAGE, Message, Sender, Sockets, most_segments};
use crate::tunnel::split::Split;
use crate::tunnel::virtio::{HEADER, Header};

/// Reads at one time, before the other direction gets its turn.
const READS: usize = 256;

/// Bytes that are read at one time, roughly.
const BYTES: usize = 512 << 10;

/// The largest packet that the device hands over, IPv6 with its header on top.
const LARGEST: usize = 65_536 + 40;

/// How long a peer whose path refuses segmentation gets single datagrams.
const REFUSED_FOR: Duration = Duration::from_secs(300);

/// Errors of peers that may stand before a message, each taken by one send.
const ERRORS_BEFORE: usize = 8;

pub(super) struct Outwards {
    /// Room for a header, then the packet that was read last.
    buffer: Vec<u8>,
    outbox: Outbox,
    sending: Sending,
}

/// What it takes to send, apart from the packets.
struct Sending {
    sender: Sender,
    /// Peers whose path refuses segmentation, and until when they are believed to.
    refused: BTreeMap<IpAddr, Instant>,
    /// Single datagrams of a message that was refused.
    singles: Vec<Message>,
}

impl Outwards {
    pub(super) fn new(segment: bool) -> Self {
        Self {
            buffer: vec![0; HEADER + LARGEST],
            outbox: Outbox::new(if segment { most_segments() } else { 1 }),
            sending: Sending {
                sender: Sender::new(),
                refused: BTreeMap::new(),
                singles: Vec::with_capacity(most_segments()),
            },
        }
    }

    /// Reads and sends until there is nothing to read, or for its share of time.
    pub(super) fn serve(&mut self, common: &mut Common) -> Result<Left, State> {
        let mut bytes = 0;
        let mut left = Left::More;
        for _ in 0..READS {
            let (header, length) = match common.queue.read(&mut self.buffer) {
                Ok(read) => read,
                Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {
                    left = Left::Nothing;
                    break;
                }
                Err(error) => match device_end(&error) {
                    Some(state) => return Err(state),
                    None => {
                        // It took the packet with it.
                        common.cell().malformed.add(1);
                        common.strange = true;
                        left = Left::Nothing;
                        break;
                    }
                },
            };
            common.cell().device_reads.add(1);
            self.forward(common, &header, length);
            bytes += length;
            if bytes >= BYTES {
                break;
            }
        }
        self.flush(common);
        Ok(left)
    }

    fn forward(&mut self, common: &mut Common, header: &Header, length: usize) {
        let packet = &mut self.buffer[HEADER..HEADER + length];
        let Some(ip) = Ip::read(packet) else {
            return common.cell().malformed.add(1);
        };
        let packet = &mut packet[..ip.total];
        let Some(split) = Split::plan(header, ip, packet) else {
            return common.cell().malformed.add(1);
        };
        let Some(peer) = common.view.routes.peer(ip.destination(packet)) else {
            common.cell().no_route.add(split.count() as u64);
            return common.tell(Problem::NoRoute, packet);
        };
        // What may be fragmented goes as it is, and the kernel fragments the datagram.
        let too_big = split.largest() > common.mtu && ip.unfragmentable(packet);
        if too_big || split.largest() > LARGEST_MESSAGE {
            common.cell().too_big.add(split.count() as u64);
            return common.tell(Problem::TooBig(common.mtu as u32), packet);
        }
        if !ip.decrement(packet) {
            common.cell().ttl.add(split.count() as u64);
            return common.tell(Problem::TimeExceeded, packet);
        }
        let alone = self.sending.is_refused(&common.shared, &peer);
        for index in 0..split.count() {
            if self.outbox.is_full() {
                self.flush(common);
            }
            let to = self.outbox.add(peer, split.length(index), alone);
            split.write(&self.buffer[HEADER..HEADER + ip.total], index, to);
        }
    }

    /// Sends what waits.
    fn flush(&mut self, common: &mut Common) {
        let (arena, messages) = self.outbox.messages();
        let mut at = 0;
        while at < messages.len() {
            // A run of one family, which is one socket's.
            let v4 = is_v4(&messages[at].peer);
            let run = messages[at..]
                .iter()
                .take_while(|message| is_v4(&message.peer) == v4)
                .count();
            self.sending.send(common, arena, &messages[at..at + run]);
            at += run;
        }
        self.outbox.clear();
    }
}

impl Sending {
    /// Whether this peer gets single datagrams.
    fn is_refused(&mut self, shared: &Shared, peer: &SocketAddr) -> bool {
        if self.refused.is_empty() {
            return false;
        }
        let now = Instant::now();
        if self.refused.get(&peer.ip()).is_some_and(|until| *until <= now) {
            self.refused.remove(&peer.ip());
            if self.refused.is_empty() {
                shared.note_udp_segment(Offload::On);
            }
        }
        self.refused.contains_key(&peer.ip())
    }

    /// Sends messages of one family; each is sent or counted as dropped.
    fn send(&mut self, common: &mut Common, arena: &[u8], messages: &[Message]) {
        let Common {
            shared,
            index,
            sockets,
            doubtful,
            ..
        } = common;
        let cell = &shared.cells[*index];
        let mut left = messages;
        let mut errors = 0;
        while let Some(first) = left.first() {
            let Some(socket) = sockets.towards(&first.peer) else {
                count_dropped(cell, left);
                return;
            };
            match self.sender.send(socket, arena, left) {
                Ok(sent) => {
                    count_sent(cell, &left[..sent]);
                    left = &left[sent..];
                    errors = 0;
                }
                Err(error) => {
                    match failure(&error, first.length > first.segment) {
                        Failure::Again if errors < ERRORS_BEFORE => {
                            cell.peer_errors.add(1);
                            errors += 1;
                            continue;
                        }
                        Failure::Segmentation => {
                            cell.segment_refusals.add(1);
                            self.refuse(shared, first, &error);
                            self.send_singly(cell, sockets, arena, first, doubtful);
                        }
                        failure => {
                            count_dropped(cell, &left[..1]);
                            *doubtful |= failure == Failure::Address;
                        }
                    }
                    left = &left[1..];
                }
            }
        }
    }

    fn refuse(&mut self, shared: &Shared, message: &Message, error: &Error) {
        let now = Instant::now();
        self.refused.retain(|_, until| *until > now);
        self.refused.insert(message.peer.ip(), now + REFUSED_FOR);
        let many = self.refused.len();
        let reason = format!("refused towards {} and {} more: {error}", message.peer.ip(), many - 1);
        tracing::info!("tunnel: segmentation of UDP {reason}; single datagrams for {REFUSED_FOR:?}");
        shared.note_udp_segment(Offload::Off(reason));
    }

    /// A message that the kernel would not segment, datagram by datagram.
    fn send_singly(&mut self, cell: &Cell, sockets: &Sockets, arena: &[u8], message: &Message, doubtful: &mut bool) {
        self.singles.clear();
        for start in (0..message.length).step_by(message.segment) {
            let length = message.segment.min(message.length - start);
            self.singles.push(Message {
                start: message.start + start,
                length,
                ..*message
            });
        }
        let mut left = &self.singles[..];
        while let (Some(first), Some(socket)) = (left.first(), sockets.towards(&message.peer)) {
            match self.sender.send(socket, arena, left) {
                Ok(sent) => {
                    count_sent(cell, &left[..sent]);
                    left = &left[sent..];
                }
                Err(error) => {
                    count_dropped(cell, std::slice::from_ref(first));
                    *doubtful |= failure(&error, false) == Failure::Address;
                    left = &left[1..];
                }
            }
        }
    }
}

/// What a failed send is about.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Failure {
    /// Not about this message: an error that a peer's ICMP left at the socket, or a signal.
    Again,
    /// The path does not take segmentation.
    Segmentation,
    /// Perhaps the source address is gone.
    Address,
    /// The kernel holds enough already, or does not let it out.
    Refused,
}

fn failure(error: &Error, segmented: bool) -> Failure {
    match error.raw_os_error() {
        // EIO: no checksum offload at the interface, or an IPsec policy. EINVAL, EMSGSIZE: larger than the path's MTU.
        Some(libc::EIO | libc::EINVAL | libc::EMSGSIZE | libc::EOPNOTSUPP) if segmented => Failure::Segmentation,
        Some(libc::EINTR | libc::ECONNREFUSED | libc::EPROTO | libc::ENOPROTOOPT | libc::ECONNRESET) => Failure::Again,
        Some(libc::EINVAL | libc::EADDRNOTAVAIL | libc::ENETUNREACH | libc::EHOSTUNREACH | libc::ENODEV) => {
            Failure::Address
        }
        _ => Failure::Refused,
    }
}

fn is_v4(peer: &SocketAddr) -> bool {
    peer.ip().to_canonical().is_ipv4()
}

fn count_sent(cell: &Cell, messages: &[Message]) {
    for message in messages {
        cell.sent_packets.add(message.length.div_ceil(message.segment) as u64);
        cell.sent_bytes.add(message.length as u64);
    }
    cell.sent_messages.add(messages.len() as u64);
}

fn count_dropped(cell: &Cell, messages: &[Message]) {
    for message in messages {
        cell.send.add(message.length.div_ceil(message.segment) as u64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_is_about_segmentation_only_where_there_was_some() {
        for (number, segmented, single) in [
            (libc::EIO, Failure::Segmentation, Failure::Refused),
            (libc::EINVAL, Failure::Segmentation, Failure::Address),
            (libc::EMSGSIZE, Failure::Segmentation, Failure::Refused),
            (libc::ECONNREFUSED, Failure::Again, Failure::Again),
            (libc::EAGAIN, Failure::Refused, Failure::Refused),
            (libc::EPERM, Failure::Refused, Failure::Refused),
            (libc::ENETUNREACH, Failure::Address, Failure::Address),
        ] {
            let error = Error::from_raw_os_error(number);
            assert_eq!(failure(&error, true), segmented, "{error}");
            assert_eq!(failure(&error, false), single, "{error}");
        }
    }
}
