//! Requests on their way to the kernel: one buffer that never leaves a copy of a key behind.
//!
//! A `Vec` that grows by itself may move and leave its old bytes in the freed heap. The buffer here moves by its own
//! hand: allocate the new, copy, wipe the old. It is wiped once more when it is dropped.

use netlink_packet_core::Emitable;
use zeroize::{Zeroize as _, Zeroizing};

/// `NLM_F_REQUEST`: every request carries it.
const NLM_F_REQUEST: u16 = 0x01;
/// `NLM_F_ACK`: the kernel answers each request, a success too.
const NLM_F_ACK: u16 = 0x04;
/// `NLA_F_NESTED`: an attribute's payload is attributes.
const NLA_F_NESTED: u16 = 1 << 15;
/// Length of `struct nlmsghdr` in bytes.
pub(crate) const HEADER: usize = 16;
/// Length of `struct nlattr` in bytes.
const ATTRIBUTE_HEADER: usize = 4;
/// What a new batch allocates: eight SAs or twelve policies.
const FIRST_ALLOCATION: usize = 4096;

/// Requests to be sent together, in order. Each gets its own result; there is no transaction unless the protocol has
/// one ([`crate::Connection::transact`]).
#[derive(Default)]
pub struct Batch {
    pub(crate) buffer: Buffer,
    pub(crate) requests: Vec<Request>,
}

/// Where one request lies in the buffer.
#[derive(Clone, Copy)]
pub(crate) struct Request {
    pub(crate) start: usize,
    pub(crate) end: usize,
    pub(crate) acknowledged: bool,
}

impl Batch {
    /// A batch without requests.
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes room for `bytes` more of requests at once: what grows is copied, and wiped where it was.
    pub fn make_room(&mut self, bytes: usize) {
        self.buffer.make_room(bytes);
    }

    /// The batch without its requests, wiped; it keeps the room that they had.
    pub(crate) fn emptied(mut self) -> Self {
        self.requests.clear();
        self.buffer.empty();
        self
    }

    /// For how many bytes it has room.
    pub(crate) fn room(&self) -> usize {
        self.buffer.0.capacity()
    }

    /// Appends a request of type `kind`; `flags` are those of the type (`NLM_F_CREATE` and so on), the ones that make it
    /// a request with an answer are added. `body` writes what follows the header.
    pub fn push(&mut self, kind: u16, flags: u16, body: impl FnOnce(&mut Writer<'_>)) {
        self.append(kind, flags | NLM_F_ACK, body);
    }

    /// Appends a request that the kernel answers only if it fails. Its result is then `Ok` unless a failure came back
    /// before the batch was answered: for the brackets of a transaction, not for single requests.
    pub fn push_unacknowledged(&mut self, kind: u16, flags: u16, body: impl FnOnce(&mut Writer<'_>)) {
        self.append(kind, flags, body);
    }

    /// How many requests it holds.
    pub fn len(&self) -> usize {
        self.requests.len()
    }

    /// Whether it holds no request.
    pub fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }

    fn append(&mut self, kind: u16, flags: u16, body: impl FnOnce(&mut Writer<'_>)) {
        let start = self.buffer.len();
        let mut writer = Writer {
            buffer: &mut self.buffer,
            origin: start,
        };
        writer.zeros(4);
        writer.u16(kind);
        writer.u16(flags | NLM_F_REQUEST);
        writer.zeros(8);
        body(&mut writer);
        writer.align();
        let end = self.buffer.len();
        let length = u32::try_from(end - start).expect("a request is shorter than 4 GiB");
        self.buffer.put(start, &length.to_ne_bytes());
        self.requests.push(Request {
            start,
            end,
            acknowledged: flags & NLM_F_ACK != 0,
        });
    }

    /// Gives request `index` its sequence number and sender's port.
    pub(crate) fn stamp(&mut self, index: usize, sequence: u32, port: u32) {
        let start = self.requests[index].start;
        self.buffer.put(start + 8, &sequence.to_ne_bytes());
        self.buffer.put(start + 12, &port.to_ne_bytes());
    }

    /// The bytes of requests `first..end`, which lie side by side.
    pub(crate) fn wire(&self, first: usize, end: usize) -> &[u8] {
        match (self.requests.get(first), self.requests.get(end.wrapping_sub(1))) {
            (Some(first), Some(last)) => &self.buffer.bytes()[first.start..last.end],
            _ => &[],
        }
    }
}

/// Appends to a message: numbers in the machine's order unless said otherwise, attributes aligned to 4 bytes.
pub struct Writer<'a> {
    buffer: &'a mut Buffer,
    origin: usize,
}

impl Writer<'_> {
    /// Bytes as they are.
    pub fn bytes(&mut self, bytes: &[u8]) {
        self.buffer.append(bytes);
    }

    /// `count` zero bytes.
    pub fn zeros(&mut self, count: usize) {
        self.buffer.extend(count);
    }

    /// One byte.
    pub fn u8(&mut self, value: u8) {
        self.bytes(&[value]);
    }

    /// A 16-bit number in the machine's order.
    pub fn u16(&mut self, value: u16) {
        self.bytes(&value.to_ne_bytes());
    }

    /// A 32-bit number in the machine's order.
    pub fn u32(&mut self, value: u32) {
        self.bytes(&value.to_ne_bytes());
    }

    /// A 64-bit number in the machine's order.
    pub fn u64(&mut self, value: u64) {
        self.bytes(&value.to_ne_bytes());
    }

    /// A structure that knows its own layout. Not for one that holds a key: it may copy itself on the way.
    pub fn emit(&mut self, value: &impl Emitable) {
        let at = self.buffer.len();
        self.buffer.extend(value.buffer_len());
        value.emit(self.buffer.tail(at));
    }

    /// An attribute with these bytes. Panics above 65,531 bytes, as [`Writer::attribute_with`] does.
    pub fn attribute(&mut self, kind: u16, bytes: &[u8]) {
        self.attribute_with(kind, |writer| writer.bytes(bytes));
    }

    /// An attribute with a 32-bit number in the machine's order.
    pub fn attribute_u32(&mut self, kind: u16, value: u32) {
        self.attribute(kind, &value.to_ne_bytes());
    }

    /// An attribute with a 32-bit number in network order, as nf_tables writes all its numbers.
    pub fn attribute_be32(&mut self, kind: u16, value: u32) {
        self.attribute(kind, &value.to_be_bytes());
    }

    /// An attribute with a text and its closing zero byte.
    pub fn attribute_str(&mut self, kind: u16, text: &str) {
        self.attribute_with(kind, |writer| {
            writer.bytes(text.as_bytes());
            writer.u8(0);
        });
    }

    /// An attribute whose payload is attributes, marked as nested.
    pub fn nested(&mut self, kind: u16, body: impl FnOnce(&mut Writer<'_>)) {
        self.attribute_with(kind | NLA_F_NESTED, body);
    }

    /// An attribute whose payload `body` writes. The padding after it is not part of its length.
    ///
    /// # Panics
    /// If the payload is longer than an attribute can be (65,531 bytes).
    pub fn attribute_with(&mut self, kind: u16, body: impl FnOnce(&mut Writer<'_>)) {
        self.align();
        let start = self.buffer.len();
        self.zeros(2);
        self.u16(kind);
        body(&mut Writer {
            buffer: self.buffer,
            origin: start + ATTRIBUTE_HEADER,
        });
        let length = u16::try_from(self.buffer.len() - start).expect("an attribute is shorter than 64 KiB");
        self.buffer.put(start, &length.to_ne_bytes());
        self.align();
    }

    fn align(&mut self) {
        let over = (self.buffer.len() - self.origin) % 4;
        if over != 0 {
            self.zeros(4 - over);
        }
    }
}

/// Bytes that are wiped wherever they have been.
#[derive(Default)]
pub(crate) struct Buffer(Zeroizing<Vec<u8>>);

impl Buffer {
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }

    fn len(&self) -> usize {
        self.0.len()
    }

    fn append(&mut self, bytes: &[u8]) {
        self.make_room(bytes.len());
        self.0.extend_from_slice(bytes);
    }

    fn extend(&mut self, count: usize) {
        self.make_room(count);
        let length = self.0.len() + count;
        self.0.resize(length, 0);
    }

    fn empty(&mut self) {
        self.0.zeroize();
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn tail(&mut self, at: usize) -> &mut [u8] {
        &mut self.0[at..]
    }

    /// Makes sure that the next `more` bytes fit without the vector moving by itself.
    fn make_room(&mut self, more: usize) {
        let need = self.0.len() + more;
        if need <= self.0.capacity() {
            return;
        }
        let mut bigger = Vec::with_capacity(need.next_power_of_two().max(FIRST_ALLOCATION));
        bigger.extend_from_slice(&self.0);
        self.0 = Zeroizing::new(bigger);
    }
}
