//! Numbered packets, many a system call: streams of UDP, and of echoes.
//!
//! The far end answers echoes itself: a kernel has room for some hundred replies on their way (128 KiB,
//! net/ipv4/icmp.c) and drops what is more, which is no fault of what is tested.

use std::io;
use std::mem::zeroed;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use anyhow::{Context as _, Result};
use nix::libc;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockProtocol, SockType, SockaddrIn, connect, setsockopt, socket, sockopt,
};
use serde_json::{Value, json};

use super::numbered::{Arrivals, HEADER, mark, marked};
use super::seconds;

const PORT: u16 = 7790;
/// Bytes of a UDP payload.
const DATAGRAM: usize = 100;
/// Bytes of an ICMP message: as ping's.
const ECHO: usize = 64;
const ICMP_HEADER: usize = 8;
/// At most so many go in one system call.
const BATCH: usize = 64;
/// Seconds of packets that are caught up with after a delay.
const DEBT: f64 = 0.02;
/// What a socket may hold while this process waits for the processor.
const BUFFER: usize = 32 << 20;
/// `ICMP_FILTER` of include/uapi/linux/icmp.h.
const ICMP_FILTER: libc::c_int = 1;
const ECHO_REPLY: u8 = 0;
const ECHO_REQUEST: u8 = 8;

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Echo,
    Udp,
}

/// One sender and what came of it.
pub(crate) struct Stream {
    kind: Kind,
    id: u32,
    from: usize,
    to: usize,
    socket: OwnedFd,
    rate: f64,
    begun: u64,
    sent: Vec<u64>,
    first: usize,
    refused: u64,
    refusal: Option<String>,
    there: Arrivals,
    back: Arrivals,
    /// The far end's socket for echoes' replies, and those to be sent.
    far: Option<OwnedFd>,
    replies: Vec<Vec<u8>>,
}

/// A raw socket at a place that sends echoes to an address, and takes nothing in.
pub(crate) fn echo_socket(to: Ipv4Addr) -> Result<OwnedFd> {
    let socket = raw_socket()?;
    filter(&socket, !0)?;
    connect(socket.as_raw_fd(), &SockaddrIn::from(SocketAddrV4::new(to, 0))).context("connect a raw socket")?;
    setsockopt(&socket, sockopt::SndBufForce, &BUFFER).context("SO_SNDBUFFORCE")?;
    Ok(socket)
}

impl Stream {
    pub(crate) fn datagrams(id: u32, ends: (usize, usize), to: Ipv4Addr, rate: f64) -> Result<Self> {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).context("a UDP socket")?;
        socket.connect((to, PORT)).context("connect a UDP socket")?;
        setsockopt(&socket, sockopt::SndBufForce, &BUFFER).context("SO_SNDBUFFORCE")?;
        Ok(Self::new(Kind::Udp, id, ends, socket.into(), rate))
    }

    /// `near` and `far`: the two ends' [`echo_socket`]s.
    pub(crate) fn echoes(id: u32, ends: (usize, usize), near: OwnedFd, far: OwnedFd, rate: f64) -> Self {
        Self {
            far: Some(far),
            ..Self::new(Kind::Echo, id, ends, near, rate)
        }
    }

    fn new(kind: Kind, id: u32, (from, to): (usize, usize), socket: OwnedFd, rate: f64) -> Self {
        Self {
            kind,
            id,
            from,
            to,
            socket,
            rate,
            begun: super::now(),
            sent: Vec::new(),
            first: 0,
            refused: 0,
            refusal: None,
            there: Arrivals::default(),
            back: Arrivals::default(),
            far: None,
            replies: Vec::new(),
        }
    }

    /// Sends what is due at `at`. Behind, it catches up, but not with what it could not send for longer than [`DEBT`]:
    /// on a processor that has no time to spare, bursts would only take more.
    pub(crate) fn send(&mut self, at: u64) {
        let owed = |begun: u64| (seconds(at.saturating_sub(begun)) * self.rate) as usize;
        let most = self.sent.len() + (DEBT * self.rate).ceil() as usize;
        if owed(self.begun) > most {
            self.begun = at - (most as f64 / self.rate * 1e9) as u64;
        }
        let due = owed(self.begun).min(most);
        while self.sent.len() < due {
            let count = (due - self.sent.len()).min(BATCH);
            let packets: Vec<Vec<u8>> = (0..count)
                .map(|ahead| self.packet((self.sent.len() + ahead) as u64))
                .collect();
            let gone = match send_many(self.socket.as_fd(), &packets) {
                Ok(gone) => gone,
                Err(error) => {
                    // This one is lost; the next is tried.
                    self.refused += 1;
                    self.refusal.get_or_insert_with(|| error.to_string());
                    1
                }
            };
            self.sent.extend(std::iter::repeat_n(at, gone));
        }
    }

    fn packet(&self, number: u64) -> Vec<u8> {
        match self.kind {
            Kind::Udp => {
                let mut packet = vec![b'.'; DATAGRAM];
                mark(&mut packet, self.id, number);
                packet
            }
            Kind::Echo => echo(ECHO_REQUEST, self.id, number),
        }
    }

    /// Answers the requests that have come.
    pub(crate) fn answer(&mut self) {
        let Some(far) = &self.far else { return };
        while !self.replies.is_empty() {
            let batch = self.replies.len().min(BATCH);
            // What is refused is lost, and shows as that.
            let gone = send_many(far.as_fd(), &self.replies[..batch]).unwrap_or(1);
            self.replies.drain(..gone);
        }
    }

    fn came(&mut self, number: usize, back: bool, at: u64) {
        if let Some(sent) = self.sent.get(number).copied() {
            let way = if back { &mut self.back } else { &mut self.there };
            way.came(number, sent, at);
            if self.kind == Kind::Echo && !back {
                self.replies.push(echo(ECHO_REPLY, self.id, number as u64));
            }
        }
    }

    pub(crate) fn warm(&self) -> bool {
        self.there.any() && (self.kind == Kind::Udp || self.back.any())
    }

    pub(crate) fn count_from_here(&mut self) {
        self.first = self.sent.len();
        (self.refused, self.refusal) = (0, None);
        self.there.count_from_here();
        self.back.count_from_here();
    }

    pub(crate) fn report(&self) -> Vec<Value> {
        let tell = |kind: &str, from: usize, to: usize, figures: Value| {
            let head =
                json!({"kind": kind, "from": from + 1, "to": to + 1, "refused": self.refused, "refusal": self.refusal});
            let (Value::Object(mut all), Value::Object(figures)) = (head, figures) else {
                unreachable!("both are objects");
            };
            all.extend(figures);
            Value::Object(all)
        };
        let there = self.there.report(&self.sent, self.first, |_| true);
        match self.kind {
            Kind::Udp => vec![tell("udp", self.from, self.to, there)],
            Kind::Echo => {
                // A request that was lost has no answer to lose.
                let back = self
                    .back
                    .report(&self.sent, self.first, |number| self.there.has(number));
                vec![
                    tell("request", self.from, self.to, there),
                    tell("reply", self.to, self.from, back),
                ]
            }
        }
    }
}

/// What comes in at a place.
pub(crate) struct Inbox {
    kind: Kind,
    socket: OwnedFd,
    buffers: Vec<[u8; 512]>,
}

impl Inbox {
    pub(crate) fn datagrams(address: Ipv4Addr) -> Result<Self> {
        let socket = UdpSocket::bind((address, PORT)).context("a UDP socket")?;
        Self::new(Kind::Udp, socket.into())
    }

    pub(crate) fn echoes() -> Result<Self> {
        let socket = raw_socket()?;
        filter(&socket, !(1 << ECHO_REPLY | 1 << ECHO_REQUEST))?;
        Self::new(Kind::Echo, socket)
    }

    fn new(kind: Kind, socket: OwnedFd) -> Result<Self> {
        setsockopt(&socket, sockopt::RcvBufForce, &BUFFER).context("SO_RCVBUFFORCE")?;
        Ok(Self {
            kind,
            socket,
            buffers: vec![[0; 512]; BATCH],
        })
    }

    /// Takes all that is there.
    pub(crate) fn take(&mut self, streams: &mut [Stream], at: u64) {
        loop {
            let lengths = receive_many(self.socket.as_fd(), &mut self.buffers);
            for (buffer, length) in self.buffers.iter().zip(&lengths) {
                let packet = &buffer[..*length];
                let (payload, back) = match self.kind {
                    Kind::Udp => (packet, false),
                    Kind::Echo => {
                        let header = usize::from(packet.first().map_or(0, |first| first & 15)) * 4;
                        let Some(message) = packet.get(header..).filter(|m| m.len() >= ICMP_HEADER + HEADER) else {
                            continue;
                        };
                        (&message[ICMP_HEADER..], message[0] == ECHO_REPLY)
                    }
                };
                if let Some((id, number)) = marked(payload)
                    && let Some(stream) = streams.get_mut(id)
                {
                    stream.came(number, back, at);
                }
            }
            if lengths.len() < BATCH {
                return;
            }
        }
    }
}

impl AsFd for Inbox {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// An ICMP message, numbered.
fn echo(kind: u8, id: u32, number: u64) -> Vec<u8> {
    let mut packet = vec![0; ECHO];
    packet[0] = kind;
    packet[4..6].copy_from_slice(&(id as u16).to_be_bytes());
    packet[6..8].copy_from_slice(&(number as u16).to_be_bytes());
    mark(&mut packet[ICMP_HEADER..], id, number);
    let sum = checksum(&packet);
    packet[2..4].copy_from_slice(&sum.to_be_bytes());
    packet
}

fn raw_socket() -> Result<OwnedFd> {
    socket(
        AddressFamily::Inet,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::Icmp,
    )
    .context("a raw socket")
}

/// Keeps the ICMP types whose bit is set away from the socket.
fn filter(socket: &OwnedFd, types: u32) -> Result<()> {
    // SAFETY: the descriptor is open, and pointer and length name `types`, which lives across the call.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_RAW,
            ICMP_FILTER,
            (&raw const types).cast(),
            size_of_val(&types) as libc::socklen_t,
        )
    };
    nix::errno::Errno::result(result).map(|_| ()).context("ICMP_FILTER")
}

/// The Internet checksum (RFC 1071).
fn checksum(data: &[u8]) -> u16 {
    let words = data.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1]));
    let mut sum: u32 = words.sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// How many of `packets` the kernel took; an error is that of the first.
fn send_many(socket: BorrowedFd<'_>, packets: &[Vec<u8>]) -> io::Result<usize> {
    let mut vectors: Vec<libc::iovec> = packets
        .iter()
        .map(|packet| libc::iovec {
            iov_base: packet.as_ptr().cast_mut().cast(),
            iov_len: packet.len(),
        })
        .collect();
    let mut messages = headers(&mut vectors);
    // SAFETY: each header names one vector, each vector a packet; all outlive the call, which only reads them.
    let gone = unsafe { libc::sendmmsg(socket.as_raw_fd(), messages.as_mut_ptr(), messages.len() as u32, 0) };
    usize::try_from(gone).map_err(|_| io::Error::last_os_error())
}

/// The lengths of what came, at most one a buffer.
fn receive_many(socket: BorrowedFd<'_>, buffers: &mut [[u8; 512]]) -> Vec<usize> {
    let mut vectors: Vec<libc::iovec> = buffers
        .iter_mut()
        .map(|buffer| libc::iovec {
            iov_base: buffer.as_mut_ptr().cast(),
            iov_len: buffer.len(),
        })
        .collect();
    let mut messages = headers(&mut vectors);
    // SAFETY: each header names one vector, each vector a buffer of its own that may be written; all outlive the call.
    let came = unsafe {
        libc::recvmmsg(
            socket.as_raw_fd(),
            messages.as_mut_ptr(),
            messages.len() as u32,
            libc::MSG_DONTWAIT,
            std::ptr::null_mut(),
        )
    };
    let came = usize::try_from(came).unwrap_or(0);
    messages[..came]
        .iter()
        .map(|message| message.msg_len as usize)
        .collect()
}

fn headers(vectors: &mut [libc::iovec]) -> Vec<libc::mmsghdr> {
    let header = |vector: &mut libc::iovec| {
        // SAFETY: all zero is a valid header: no name, no vector, no control data.
        let mut header: libc::mmsghdr = unsafe { zeroed() };
        header.msg_hdr.msg_iov = vector;
        header.msg_hdr.msg_iovlen = 1;
        header
    };
    vectors.iter_mut().map(header).collect()
}
