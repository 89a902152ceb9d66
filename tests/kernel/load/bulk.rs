//! A TCP connection whose two ends send each other blocks that both can compute: nothing may be missing or changed.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd};

use anyhow::{Context as _, Result};
use nix::libc;
use serde_json::{Value, json};

use super::seconds;

const BLOCK: usize = 1024;
const READ: usize = 256 << 10;

/// One end of the connection and the way from it.
struct End {
    stream: TcpStream,
    /// Bytes that the socket took, and that came at the other end.
    sent: u64,
    received: u64,
    /// What the socket has not taken yet.
    waiting: Vec<u8>,
    blocks: u64,
    wrong: Option<u64>,
    broken: Option<String>,
    counted: u64,
    last: u64,
    gap: u64,
}

impl End {
    fn new(stream: TcpStream) -> Result<Self> {
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        Ok(Self {
            stream,
            sent: 0,
            received: 0,
            waiting: Vec::new(),
            blocks: 0,
            wrong: None,
            broken: None,
            counted: 0,
            last: 0,
            gap: 0,
        })
    }

    fn flush(&mut self) {
        while !self.waiting.is_empty() {
            match self.stream.write(&self.waiting) {
                Ok(taken) => {
                    self.sent += taken as u64;
                    self.waiting.drain(..taken);
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) => {
                    self.broken.get_or_insert_with(|| error.to_string());
                    return;
                }
            }
        }
    }

    fn retransmitted(&self) -> u32 {
        // SAFETY: all zero is a valid tcp_info.
        let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
        let mut length = size_of_val(&info) as libc::socklen_t;
        // SAFETY: pointer and length name `info`, which may be written and lives across the call.
        unsafe {
            libc::getsockopt(
                self.stream.as_raw_fd(),
                libc::IPPROTO_TCP,
                libc::TCP_INFO,
                (&raw mut info).cast(),
                &raw mut length,
            )
        };
        info.tcpi_total_retrans
    }
}

/// A connection between two places.
pub(crate) struct Bulk {
    from: usize,
    to: usize,
    /// Both ends; what one sends the other receives.
    ends: [End; 2],
    rate: f64,
    begun: u64,
    retransmitted: [u32; 2],
}

pub(crate) fn listen(address: Ipv4Addr) -> Result<TcpListener> {
    TcpListener::bind((address, 0)).context("listen for TCP")
}

impl Bulk {
    pub(crate) fn connect(
        (from, to): (usize, usize),
        address: Ipv4Addr,
        listener: &TcpListener,
        rate: f64,
    ) -> Result<Self> {
        let stream = TcpStream::connect((address, listener.local_addr()?.port())).context("connect by TCP")?;
        let (accepted, _) = listener.accept().context("accept by TCP")?;
        Ok(Self {
            from,
            to,
            ends: [End::new(stream)?, End::new(accepted)?],
            rate,
            begun: super::now(),
            retransmitted: [0; 2],
        })
    }

    pub(crate) fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.ends.iter().map(|end| end.stream.as_fd())
    }

    /// Sends the blocks that are due at `at`.
    pub(crate) fn send(&mut self, at: u64) {
        let due = (seconds(at - self.begun) * self.rate) as u64;
        let id = self.id();
        for (way, end) in self.ends.iter_mut().enumerate() {
            while end.blocks < due {
                end.waiting.extend_from_slice(&block(id + way as u32, end.blocks));
                end.blocks += 1;
            }
            end.flush();
        }
    }

    pub(crate) fn flush(&mut self) {
        self.ends.iter_mut().for_each(End::flush);
    }

    fn id(&self) -> u32 {
        (self.from << 16 | self.to << 8) as u32
    }

    /// Takes what has come at the ends that are readable, and compares every byte.
    pub(crate) fn take(&mut self, readable: [bool; 2], at: u64) {
        let id = self.id();
        let mut bytes = [0; READ];
        for (here, _) in readable.iter().enumerate().filter(|(_, readable)| **readable) {
            let other = 1 - here;
            loop {
                let length = match (&self.ends[here].stream).read(&mut bytes) {
                    Ok(0) => {
                        self.ends[here]
                            .broken
                            .get_or_insert_with(|| "closed by the other end".into());
                        break;
                    }
                    Ok(length) => length,
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    Err(error) => {
                        self.ends[here].broken.get_or_insert_with(|| error.to_string());
                        break;
                    }
                };
                let way = &mut self.ends[other];
                compare(way, id + other as u32, &bytes[..length]);
                if way.last != 0 {
                    way.gap = way.gap.max(at - way.last);
                }
                way.last = at;
            }
        }
    }

    pub(crate) fn warm(&self) -> bool {
        self.ends.iter().all(|end| end.received > 0)
    }

    pub(crate) fn count_from_here(&mut self) {
        for (end, before) in self.ends.iter_mut().zip(&mut self.retransmitted) {
            *before = end.retransmitted();
            (end.counted, end.gap) = (end.received, 0);
        }
    }

    pub(crate) fn report(&self) -> Value {
        let ways = self.ends.iter().zip(&self.retransmitted).map(|(end, before)| {
            json!({
                "bytes": end.received - end.counted,
                "missing": end.sent - end.received,
                "unsent": end.waiting.len(),
                "wrong": end.wrong,
                "broken": end.broken,
                "retransmitted": end.retransmitted() - before,
                "gap": seconds(end.gap),
            })
        });
        json!({"from": self.from + 1, "to": self.to + 1, "ways": ways.collect::<Vec<_>>()})
    }
}

/// Block `number` of a way: whose and which it is, then a byte that changes with it. Without the marker of a leak: ESP that
/// comes in UDP is decrypted in the very pages that the watcher of the wire holds (esp_input in net/ipv4/esp4.c copies
/// what is cloned, and udp encapsulation has uncloned the header alone), so that it would see marks that no wire carried.
/// The addresses in the headers tell of TCP that leaks.
fn block(id: u32, number: u64) -> [u8; BLOCK] {
    let mut block = [number as u8; BLOCK];
    block[..4].copy_from_slice(&id.to_be_bytes());
    block[4..12].copy_from_slice(&number.to_be_bytes());
    block
}

/// Compares what came next on a way with what was sent there.
fn compare(way: &mut End, id: u32, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        let (number, offset) = (way.received / BLOCK as u64, (way.received % BLOCK as u64) as usize);
        let length = bytes.len().min(BLOCK - offset);
        let (these, rest) = bytes.split_at(length);
        if these != &block(id, number)[offset..offset + length] {
            way.wrong.get_or_insert(way.received);
        }
        way.received += length as u64;
        bytes = rest;
    }
}
