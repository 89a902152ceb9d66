//! A blocking conversation with the kernel over one netlink socket: batches of requests, dumps, single reads.
//!
//! The kernel carries out netlink requests inside the send itself, so their answers are in the receive queue when the
//! send returns; the time limits below are a last resort and no part of normal running.

use std::{fmt, os::fd::AsFd, time::Duration};

use netlink_sys::{Socket, SocketAddr};
use nix::{
    errno::Errno,
    libc,
    sys::{
        socket::{setsockopt, sockopt},
        time::TimeVal,
    },
};
use zeroize::Zeroize;

use crate::{
    batch::{Batch, Writer},
    error::{Error, errno},
    message::{self, MessageRef},
};

/// How long a send or a receive may wait. Reached only if the kernel does not answer at all.
pub const TIMEOUT: Duration = Duration::from_secs(5);
/// Requests in one send. 200 still keep their acknowledgements with the default receive buffer, 400 lose some.
pub const REQUESTS_PER_SEND: usize = 128;
/// Asked for the receive queue, in bytes: room for the acknowledgements of a send, and for a burst of notifications.
const RECEIVE_QUEUE: usize = 4 << 20;
/// Asked for the send queue, in bytes: a transaction has to fit into one send.
const SEND_QUEUE: usize = 2 << 20;
/// The longest datagram: a dump fills at most 32 KiB at a time, a single object may be longer.
const RECEIVE_BUFFER: usize = 128 << 10;
/// The largest batch whose memory is kept for the next, bytes: room for the SAs of a send.
const SPARE: usize = 128 << 10;
/// How often an interrupted dump is started anew.
const DUMP_ATTEMPTS: u32 = 10;

/// `NLM_F_DUMP`.
const NLM_F_DUMP: u16 = 0x300;
/// `NLM_F_DUMP_INTR`: what is being dumped changed meanwhile.
const NLM_F_DUMP_INTR: u16 = 0x10;

/// A netlink protocol.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Protocol {
    /// Links, addresses, routes, neighbours (rtnetlink(7)).
    Route,
    /// IPsec.
    Xfrm,
    /// nf_tables and its relatives.
    Netfilter,
}

impl Protocol {
    fn number(self) -> isize {
        match self {
            Self::Route => netlink_sys::protocols::NETLINK_ROUTE,
            Self::Xfrm => netlink_sys::protocols::NETLINK_XFRM,
            Self::Netfilter => netlink_sys::protocols::NETLINK_NETFILTER,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Route => "route",
            Self::Xfrm => "xfrm",
            Self::Netfilter => "netfilter",
        })
    }
}

/// One socket, used by one thread at a time. Dropping it closes the socket and wipes its buffer.
pub struct Connection {
    socket: Socket,
    port: u32,
    sequence: u32,
    buffer: ReceiveBuffer,
    /// The last batch, empty: its memory is there already.
    spare: Batch,
}

impl Connection {
    /// Opens a socket in the network namespace of the calling thread.
    pub fn open(protocol: Protocol) -> Result<Self, Error> {
        let (socket, port) = open(protocol)?;
        let failed = |step| {
            move |error: std::io::Error| Error::Open {
                protocol,
                step,
                source: errno(&error),
            }
        };
        // Without it the kernel answers a refused request with a copy of it, key included.
        socket.set_cap_ack(true).map_err(failed("NETLINK_CAP_ACK"))?;
        socket.set_ext_ack(true).map_err(failed("NETLINK_EXT_ACK"))?;
        if protocol == Protocol::Route {
            // Dumps then filter in the kernel and refuse nonsense. Kernels before 4.20 lack it and dump everything.
            let _ = socket.set_netlink_get_strict_chk(true);
        }
        let limit = TimeVal::new(TIMEOUT.as_secs().cast_signed(), 0);
        setsockopt(&socket, sockopt::SendTimeout, &limit).map_err(|source| Error::Open {
            protocol,
            step: "SO_SNDTIMEO",
            source,
        })?;
        setsockopt(&socket, sockopt::ReceiveTimeout, &limit).map_err(|source| Error::Open {
            protocol,
            step: "SO_RCVTIMEO",
            source,
        })?;
        if setsockopt(&socket, sockopt::SndBufForce, &SEND_QUEUE).is_err() {
            let _ = setsockopt(&socket, sockopt::SndBuf, &SEND_QUEUE);
        }
        Ok(Self {
            socket,
            port,
            sequence: 0,
            buffer: ReceiveBuffer::new(),
            spare: Batch::new(),
        })
    }

    /// This socket's port. Notifications that carry it tell of our own changes.
    pub fn port(&self) -> u32 {
        self.port
    }

    /// A batch without requests, with room for `bytes` of them, in the memory of the last one.
    pub fn batch(&mut self, bytes: usize) -> Batch {
        let mut batch = std::mem::take(&mut self.spare);
        batch.make_room(bytes);
        batch
    }

    /// Sends the requests, at most [`REQUESTS_PER_SEND`] at a time, and gives each its result, in order.
    ///
    /// A refused request does not keep the later ones from being carried out. [`Error::Unknown`] stands where the
    /// acknowledgement was lost. The batch is wiped.
    pub fn execute(&mut self, mut batch: Batch) -> Vec<Result<(), Error>> {
        let mut results = Vec::with_capacity(batch.len());
        while results.len() < batch.len() {
            let first = results.len();
            let end = batch.len().min(first + REQUESTS_PER_SEND);
            match self.send(&mut batch, first, end) {
                Ok(sequence) => results.extend(self.collect(&batch, first, end, sequence, Patience::Timeout)),
                Err(error) => results.extend((first..end).map(|_| Err(error.clone()))),
            }
        }
        if batch.room() <= SPARE {
            self.spare = batch.emptied();
        }
        results
    }

    /// Sends all requests at once as the one transaction that the protocol makes of them (nf_tables, between batch begin
    /// and batch end), and gives the first refusal. [`Error::Unknown`] if the kernel's answer was lost.
    pub fn transact(&mut self, mut batch: Batch) -> Result<(), Error> {
        let end = batch.len();
        let sequence = self.send(&mut batch, 0, end)?;
        let results = self.collect(&batch, 0, end, sequence, Patience::UntilRefused);
        let mut unknown = false;
        for result in results {
            match result {
                Ok(()) => {}
                Err(Error::Unknown) => unknown = true,
                Err(error) => return Err(error),
            }
        }
        if unknown { Err(Error::Unknown) } else { Ok(()) }
    }

    /// Asks for a dump and gives what `parse` makes of each message, in the kernel's order. `body` writes the request
    /// after its netlink header.
    ///
    /// If the kernel says that a change came between, all is thrown away and the dump starts anew, up to ten times.
    pub fn dump<T>(
        &mut self,
        kind: u16,
        body: impl FnOnce(&mut Writer<'_>),
        mut parse: impl FnMut(MessageRef<'_>) -> Option<T>,
    ) -> Result<Vec<T>, Error> {
        let mut request = Batch::new();
        request.push_unacknowledged(kind, NLM_F_DUMP, body);
        for _ in 0..DUMP_ATTEMPTS {
            let sequence = self.send(&mut request, 0, 1)?;
            if let Some(found) = self.read_dump(sequence, &mut parse)? {
                return Ok(found);
            }
        }
        Err(Error::Interrupted {
            attempts: DUMP_ATTEMPTS,
        })
    }

    /// Asks for one object and gives what `parse` makes of the reply, `None` if the kernel had nothing to say.
    pub fn get<T>(
        &mut self,
        kind: u16,
        flags: u16,
        body: impl FnOnce(&mut Writer<'_>),
        mut parse: impl FnMut(MessageRef<'_>) -> Option<T>,
    ) -> Result<Option<T>, Error> {
        let mut request = Batch::new();
        request.push(kind, flags, body);
        let sequence = self.send(&mut request, 0, 1)?;
        let mut found = None;
        let mut outcome = None;
        while outcome.is_none() {
            match self.receive(Wait::Timeout, |message| {
                if message.sequence != sequence {
                } else if message.kind == message::NLMSG_ERROR {
                    outcome = Some(message::acknowledgement(&message));
                } else if found.is_none() {
                    found = parse(message);
                }
            })? {
                Received::Datagram => {}
                Received::Nothing => return Err(Error::Timeout),
                Received::Lost => return Err(Error::Unknown),
            }
        }
        match outcome {
            Some(Err(error)) => Err(error.into()),
            Some(Ok(())) | None => Ok(found),
        }
    }

    /// Stamps and sends requests `first..end`; gives the first one's sequence number.
    fn send(&mut self, batch: &mut Batch, first: usize, end: usize) -> Result<u32, Error> {
        let start = self.sequence.wrapping_add(1);
        for index in first..end {
            self.sequence = self.sequence.wrapping_add(1);
            batch.stamp(index, self.sequence, self.port);
        }
        let wire = batch.wire(first, end);
        loop {
            match self.socket.send_to(wire, &SocketAddr::new(0, 0), 0) {
                Ok(_) => return Ok(start),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::Send(errno(&error))),
            }
        }
    }

    /// Reads the answers to requests `first..end`, the first of which has this sequence number.
    fn collect(
        &mut self,
        batch: &Batch,
        first: usize,
        end: usize,
        sequence: u32,
        patience: Patience,
    ) -> Vec<Result<(), Error>> {
        let requests = &batch.requests[first..end];
        let mut results: Vec<Option<Result<(), Error>>> = requests
            .iter()
            .map(|request| (!request.acknowledged).then_some(Ok(())))
            .collect();
        let mut open = results.iter().filter(|result| result.is_none()).count();
        let mut wait = if open == 0 { Wait::Not } else { Wait::Timeout };
        loop {
            let mut refused = false;
            let received = self.receive(wait, |message| {
                let index = message.sequence.wrapping_sub(sequence) as usize;
                if message.kind != message::NLMSG_ERROR || index >= results.len() {
                    return;
                }
                let outcome = message::acknowledgement(&message);
                refused |= outcome.is_err();
                open -= usize::from(results[index].is_none());
                // A commit that fails after its parts were accepted is told as a second answer to the first request.
                if outcome.is_err() || results[index].is_none() {
                    results[index] = Some(outcome.map_err(Error::from));
                }
            });
            match received {
                Ok(Received::Datagram) => {}
                // What else was answered before the loss is still in the queue.
                Ok(Received::Lost) => wait = Wait::Not,
                Ok(Received::Nothing) => break,
                Err(error) => {
                    return results
                        .into_iter()
                        .map(|result| result.unwrap_or_else(|| Err(error.clone())))
                        .collect();
                }
            }
            if refused && patience == Patience::UntilRefused {
                wait = Wait::Not;
            }
            if open == 0 {
                match patience {
                    Patience::Timeout => break,
                    Patience::UntilRefused => wait = Wait::Not,
                }
            }
        }
        results
            .into_iter()
            .map(|result| result.unwrap_or(Err(Error::Unknown)))
            .collect()
    }

    /// One attempt at a dump; `None` if it was interrupted.
    fn read_dump<T>(
        &mut self,
        sequence: u32,
        parse: &mut impl FnMut(MessageRef<'_>) -> Option<T>,
    ) -> Result<Option<Vec<T>>, Error> {
        let mut found = Vec::new();
        let mut whole = true;
        let mut too_long = None;
        let mut outcome = None;
        while outcome.is_none() {
            let received = self.receive(Wait::Timeout, |message| {
                if message.sequence != sequence || outcome.is_some() {
                    return;
                }
                whole &= message.flags & NLM_F_DUMP_INTR == 0;
                match message.kind {
                    message::NLMSG_DONE => outcome = Some(message::end_of_dump(&message)),
                    message::NLMSG_ERROR => outcome = Some(message::acknowledgement(&message)),
                    _ => found.extend(parse(message)),
                }
            });
            // Whatever was lost, the rest has to be read: the kernel keeps one dump a socket and refuses the next.
            match received {
                Ok(Received::Datagram) => {}
                Ok(Received::Nothing) => return Err(Error::Timeout),
                Ok(Received::Lost) => whole = false,
                Err(error @ Error::Truncated { .. }) => too_long = Some(error),
                Err(error) => return Err(error),
            }
        }
        if let Some(error) = too_long {
            return Err(error);
        }
        match outcome {
            Some(Err(error)) if error.errno == libc::EINTR => Ok(None),
            Some(Err(error)) => Err(error.into()),
            Some(Ok(())) | None => Ok(whole.then_some(found)),
        }
    }

    fn receive(&mut self, wait: Wait, each: impl FnMut(MessageRef<'_>)) -> Result<Received, Error> {
        self.buffer.receive(&self.socket, wait, each)
    }
}

/// How long `collect` goes on reading.
#[derive(Clone, Copy, Eq, PartialEq)]
enum Patience {
    /// Until every request is answered.
    Timeout,
    /// Until every request is answered or one is refused (a transaction then answers for no other), then what is there.
    UntilRefused,
}

#[derive(Clone, Copy, Eq, PartialEq)]
pub(crate) enum Wait {
    Timeout,
    Not,
}

#[derive(Clone, Copy, Eq, PartialEq)]
pub(crate) enum Received {
    /// A datagram was read and its messages were given out.
    Datagram,
    /// The queue is empty.
    Nothing,
    /// The queue ran over and messages are gone.
    Lost,
}

/// Opens and binds a socket with a large receive queue; also gives its port.
pub(crate) fn open(protocol: Protocol) -> Result<(Socket, u32), Error> {
    let failed = |step| {
        move |error: std::io::Error| Error::Open {
            protocol,
            step,
            source: errno(&error),
        }
    };
    let mut socket = Socket::new(protocol.number()).map_err(failed("socket"))?;
    let port = socket.bind_auto().map_err(failed("bind"))?.port_number();
    // The forced size needs CAP_NET_ADMIN in the first user namespace; the plain one is cut to net.core.rmem_max.
    if setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_QUEUE).is_err() {
        setsockopt(&socket.as_fd(), sockopt::RcvBuf, &RECEIVE_QUEUE).map_err(|source| Error::Open {
            protocol,
            step: "SO_RCVBUF",
            source,
        })?;
    }
    Ok((socket, port))
}

/// Where datagrams arrive. What was received is wiped as soon as it has been given out: dumps and notifications of SAs
/// carry their keys.
pub(crate) struct ReceiveBuffer(Box<[u8]>);

impl ReceiveBuffer {
    pub(crate) fn new() -> Self {
        Self(vec![0; RECEIVE_BUFFER].into_boxed_slice())
    }

    /// Reads one datagram and gives out its messages.
    pub(crate) fn receive(
        &mut self,
        socket: &Socket,
        wait: Wait,
        mut each: impl FnMut(MessageRef<'_>),
    ) -> Result<Received, Error> {
        let flags = libc::MSG_TRUNC
            | match wait {
                Wait::Timeout => 0,
                Wait::Not => libc::MSG_DONTWAIT,
            };
        let (length, sender) = loop {
            match socket.recv_from(&mut &mut self.0[..], flags) {
                Ok(received) => break received,
                Err(error) => match errno(&error) {
                    Errno::EINTR => {}
                    Errno::EAGAIN => return Ok(Received::Nothing),
                    Errno::ENOBUFS => return Ok(Received::Lost),
                    source => return Err(Error::Receive(source)),
                },
            }
        };
        let Some(datagram) = self.0.get_mut(..length) else {
            self.0.zeroize();
            return Err(Error::Truncated { length });
        };
        // Port 0 is the kernel; another process may write to us too, and is not believed.
        if sender.port_number() == 0 {
            message::messages(datagram).for_each(&mut each);
        }
        datagram.zeroize();
        Ok(Received::Datagram)
    }
}

impl Drop for ReceiveBuffer {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "it is how a test fails")]
mod tests {
    use super::*;
    use crate::KernelError;

    const RTM_GETLINK: u16 = 18;
    const IFLA_IFNAME: u16 = 3;

    /// `struct ifinfomsg` that asks for the interface with this index; 0 asks for all.
    fn link(writer: &mut Writer<'_>, index: u32) {
        writer.zeros(4);
        writer.u32(index);
        writer.zeros(8);
    }

    fn name(message: MessageRef<'_>) -> Option<String> {
        let (_, name) = message::attributes(message.payload.get(16..)?).find(|(kind, _)| *kind == IFLA_IFNAME)?;
        Some(String::from_utf8_lossy(name).trim_end_matches('\0').to_owned())
    }

    #[test]
    fn all_links_are_dumped_and_one_is_read() {
        let mut route = Connection::open(Protocol::Route).unwrap();
        assert!(
            route.socket.get_cap_ack().unwrap(),
            "a refusal would echo the request, key and all"
        );
        let all = route.dump(RTM_GETLINK, |writer| link(writer, 0), name).unwrap();
        assert!(all.contains(&"lo".to_owned()), "{all:?}");
        assert_eq!(
            route.get(RTM_GETLINK, 0, |writer| link(writer, 1), name),
            Ok(Some("lo".to_owned()))
        );
        let error = route
            .get(RTM_GETLINK, 0, |writer| link(writer, 0x7fff_fff0), name)
            .unwrap_err();
        assert!(error.is_gone(), "{error}");
        // A dump that the kernel refuses ends too, and the connection goes on.
        let error = route.dump(RTM_GETLINK, |writer| link(writer, 1), name).unwrap_err();
        assert!(
            matches!(
                error,
                Error::Kernel(KernelError {
                    errno: libc::EINVAL,
                    ..
                })
            ),
            "{error}"
        );
        assert_eq!(route.dump(RTM_GETLINK, |writer| link(writer, 0), name), Ok(all));
    }

    #[test]
    fn a_lost_acknowledgement_makes_an_outcome_unknown_at_once_and_the_next_request_is_answered() {
        let mut route = Connection::open(Protocol::Route).unwrap();
        setsockopt(&route.socket, sockopt::RcvBuf, &1).unwrap();
        let mut batch = Batch::new();
        (0..40).for_each(|_| batch.push(RTM_GETLINK, 0, |writer| link(writer, 1)));
        let start = std::time::Instant::now();
        let results = route.execute(batch);
        assert!(start.elapsed() < TIMEOUT);
        assert_eq!(results.len(), 40);
        let unknown = results.iter().filter(|result| **result == Err(Error::Unknown)).count();
        assert!(
            unknown > 0
                && results
                    .iter()
                    .all(|result| matches!(result, Ok(()) | Err(Error::Unknown)))
        );
        setsockopt(&route.socket, sockopt::RcvBuf, &RECEIVE_QUEUE).unwrap();
        assert_eq!(
            route.get(RTM_GETLINK, 0, |writer| link(writer, 1), name),
            Ok(Some("lo".to_owned()))
        );
    }

    #[test]
    fn what_the_socket_has_no_room_for_is_not_sent_and_said_to_be_so() {
        let mut route = Connection::open(Protocol::Route).unwrap();
        setsockopt(&route.socket, sockopt::SndBuf, &1).unwrap();
        let batch = |padding: usize| {
            let mut batch = Batch::new();
            (0..128).for_each(|_| {
                batch.push(RTM_GETLINK, 0, |writer| {
                    link(writer, 1);
                    writer.zeros(padding);
                });
            });
            batch
        };
        // The kernel leaves 4608 bytes at least.
        let results = route.execute(batch(64));
        assert_eq!(results, vec![Err(Error::Send(Errno::EMSGSIZE)); 128]);
        setsockopt(&route.socket, sockopt::SndBufForce, &SEND_QUEUE).unwrap();
        assert_eq!(route.execute(batch(0)), vec![Ok(()); 128]);
    }

    #[test]
    fn each_request_of_several_sends_gets_its_own_result() {
        let mut route = Connection::open(Protocol::Route).unwrap();
        let mut batch = Batch::new();
        let asked: Vec<u32> = (0..300)
            .map(|index| if index % 7 == 3 { 0x7fff_0000 + index } else { 1 })
            .collect();
        asked
            .iter()
            .for_each(|index| batch.push(RTM_GETLINK, 0, |writer| link(writer, *index)));
        let results = route.execute(batch);
        assert_eq!(results.len(), 300);
        for (index, result) in asked.iter().zip(results) {
            assert_eq!(result.is_ok(), *index == 1, "{index}: {result:?}");
        }
        assert_eq!(route.execute(Batch::new()), []);
    }
}
