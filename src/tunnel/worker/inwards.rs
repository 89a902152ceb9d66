//! From the peers to the device.
//!
//! A datagram counts only if it comes from the address of a peer, at whatever port, as flannel's does. Inner sources
//! are not held to the peer's subnet: a flannel node without masquerading sends with its public address, and a Service's
//! client keeps its own. Only a source in another peer's subnet, or in this node's own, is refused: nothing honest has one,
//! since an answer to it would go to that other peer, or to a pod here.

use std::io::Error;
use std::net::IpAddr;

use super::{Common, Left, device_end};
use crate::tunnel::State;
use crate::tunnel::coalesce::{Coalescer, Sink};
use crate::tunnel::counters::{Cell, Offload};
use crate::tunnel::device::Queue;
use crate::tunnel::icmp::Problem;
use crate::tunnel::packet::Ip;
use crate::tunnel::shared::Shared;
use crate::tunnel::socket::Receiver;
use crate::tunnel::split::Split;
use crate::tunnel::virtio::{Gso, Header};

/// Receiving system calls at one time, before the other direction gets its turn. What they bring is merged as one.
const CALLS: usize = 4;

/// Packets at one time, likewise.
const PACKETS: u64 = 512;

pub(super) struct Inwards {
    receiver: Receiver,
    coalescer: Coalescer,
    /// Room for one packet of a large one that the device refused.
    single: Vec<u8>,
}

impl Inwards {
    pub(super) fn new(tcp: bool, udp: bool) -> Self {
        Self {
            receiver: Receiver::new(),
            coalescer: Coalescer::new(tcp, udp),
            single: vec![0; 65_536],
        }
    }

    /// Receives and writes until there is nothing to receive, or for its share of time.
    pub(super) fn serve(&mut self, common: &mut Common, v6: bool) -> Result<Left, State> {
        let mut refusals = Refusals::default();
        let mut left = Left::More;
        let before = common.cell().received_packets.get();
        for _ in 0..CALLS {
            let socket = if v6 { &common.sockets.v6 } else { &common.sockets.v4 };
            let received = socket.as_ref().map(|socket| self.receiver.receive(socket));
            let more = match received {
                Some(Ok((count, more))) => {
                    self.batch(common, count, &mut refusals);
                    more
                }
                Some(Err(error)) => {
                    note(common, &error);
                    false
                }
                None => false,
            };
            if !more {
                left = Left::Nothing;
                break;
            }
            if common.cell().received_packets.get() - before >= PACKETS {
                break;
            }
        }
        self.coalescer
            .flush(&mut Writer::new(common, &mut self.single, &mut refusals));
        if refusals.tcp || refusals.udp {
            self.refused(&common.shared, &refusals);
        }
        refusals.end.map_or(Ok(left), Err)
    }

    /// All messages of one call.
    fn batch(&mut self, common: &mut Common, count: usize, refusals: &mut Refusals) {
        for index in 0..count {
            let cell = &common.shared.cells[common.index];
            cell.received_messages.add(1);
            let Some(message) = self.receiver.message(index) else {
                cell.received_malformed.add(1);
                continue;
            };
            if !common.view.routes.knows(message.from) {
                cell.no_lease
                    .add(message.payload.len().div_ceil(message.segment).max(1) as u64);
                continue;
            }
            if message.payload.is_empty() {
                cell.received_malformed.add(1);
            }
            for packet in message.payload.chunks_mut(message.segment) {
                let Some((ip, packet)) = accepted(common, message.from, packet) else {
                    continue;
                };
                let mut sink = Writer::new(common, &mut self.single, refusals);
                self.coalescer.push(ip, packet, &mut sink);
            }
        }
    }

    /// The device takes no large packets of this kind: single ones from now on.
    fn refused(&mut self, shared: &Shared, refusals: &Refusals) {
        self.coalescer.tcp &= !refusals.tcp;
        self.coalescer.udp &= !refusals.udp;
        for (udp, refused) in [(false, refusals.tcp), (true, refusals.udp)] {
            if refused {
                tracing::info!("tunnel: the device refuses large packets, udp: {udp}; single ones from now on");
                shared.note_coalescing(udp, Offload::Off("the device refused a large packet".to_owned()));
            }
        }
    }
}

/// Counts an error of a socket. Those of peers are told once, and then gone.
fn note(common: &mut Common, error: &Error) {
    match error.raw_os_error() {
        Some(libc::EAGAIN) => {}
        Some(libc::ECONNREFUSED | libc::EHOSTUNREACH | libc::ENETUNREACH | libc::EINTR) => {
            common.cell().peer_errors.add(1);
        }
        _ => {
            common.cell().peer_errors.add(1);
            common.strange = true;
        }
    }
}

/// A packet that may go to the device, one hop older; what may not is counted.
fn accepted<'a>(common: &mut Common, from: IpAddr, packet: &'a mut [u8]) -> Option<(Ip, &'a [u8])> {
    let Some(ip) = Ip::read(packet) else {
        common.cell().received_malformed.add(1);
        return None;
    };
    // What stands behind the packet is padding.
    let packet = &mut packet[..ip.total];
    if !common.view.routes.admits(ip.source(packet), from) {
        common.cell().foreign_source.add(1);
        return None;
    }
    if !ip.decrement(packet) {
        common.cell().ttl.add(1);
        common.tell(Problem::TimeExceeded, packet);
        return None;
    }
    let cell = common.cell();
    cell.received_packets.add(1);
    cell.received_bytes.add(packet.len() as u64);
    Some((ip, packet))
}

/// What came up while writing.
#[derive(Default)]
struct Refusals {
    tcp: bool,
    udp: bool,
    end: Option<State>,
}

/// Writes to the device.
struct Writer<'a> {
    queue: &'a Queue,
    cell: &'a Cell,
    single: &'a mut [u8],
    refusals: &'a mut Refusals,
}

impl<'a> Writer<'a> {
    fn new(common: &'a Common, single: &'a mut [u8], refusals: &'a mut Refusals) -> Self {
        Self {
            queue: &common.queue,
            cell: common.cell(),
            single,
            refusals,
        }
    }

    fn write(&mut self, header: &Header, packet: &[u8], segments: usize) {
        match self.queue.write(header, packet) {
            Ok(_) => self.cell.device_writes.add(1),
            Err(error) => {
                self.cell.device.add(segments as u64);
                if let Some(state) = device_end(&error) {
                    self.refusals.end.get_or_insert(state);
                }
            }
        }
    }

    /// A large packet that was refused, packet by packet: some kernels refuse one whose last segment is short.
    fn write_singly(&mut self, header: &Header, packet: &[u8]) {
        let Some(split) = Ip::read(packet).and_then(|ip| Split::plan(header, ip, packet)) else {
            return self.cell.device.add(1);
        };
        let single = std::mem::take(&mut self.single);
        for index in 0..split.count() {
            let to = &mut single[..split.length(index)];
            split.write(packet, index, to);
            self.write(&Header::default(), to, 1);
        }
        self.single = single;
    }
}

impl Sink for Writer<'_> {
    fn take(&mut self, header: &Header, packet: &[u8], segments: usize) {
        if self.refusals.end.is_some() {
            return;
        }
        if segments == 1 {
            return self.write(header, packet, 1);
        }
        match self.queue.write(header, packet) {
            Ok(_) => self.cell.device_writes.add(1),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                let refused = match header.gso {
                    Gso::Udp => &mut self.refusals.udp,
                    _ => &mut self.refusals.tcp,
                };
                *refused = true;
                self.write_singly(header, packet);
            }
            Err(error) => {
                self.cell.device.add(segments as u64);
                if let Some(state) = device_end(&error) {
                    self.refusals.end.get_or_insert(state);
                }
            }
        }
    }
}
