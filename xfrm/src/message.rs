//! Reading what the kernel sends: messages in a datagram, attributes in a message, acknowledgements. Nothing here trusts
//! a length, and nothing here copies a payload.

use nix::libc;

use crate::{batch::HEADER, error::KernelError};

/// An acknowledgement, of success (error 0) or failure.
pub(crate) const NLMSG_ERROR: u16 = 2;
/// The end of a dump.
pub(crate) const NLMSG_DONE: u16 = 3;
/// The request is not echoed behind the error.
const NLM_F_CAPPED: u16 = 0x100;
/// Attributes follow the error.
const NLM_F_ACK_TLVS: u16 = 0x200;
/// The attribute with the kernel's words.
const NLMSGERR_ATTR_MSG: u16 = 1;
/// Bits of an attribute's type that are not part of it: nested, network byte order.
const NLA_TYPE_MASK: u16 = 0x3fff;

/// One message in the receive buffer. It may carry a key, so it has no `Debug` and is not to be copied out.
#[derive(Clone, Copy)]
pub struct MessageRef<'a> {
    /// `nlmsg_type`.
    pub kind: u16,
    /// `nlmsg_flags`.
    pub flags: u16,
    /// `nlmsg_seq`: the request that it answers.
    pub sequence: u32,
    /// `nlmsg_pid`: in a notification, the port of the socket whose request was the cause; 0 for the kernel itself.
    pub port: u32,
    /// What follows the header.
    pub payload: &'a [u8],
}

/// The messages of a datagram; ends at the first that claims more than there is.
pub(crate) fn messages(mut datagram: &[u8]) -> impl Iterator<Item = MessageRef<'_>> {
    std::iter::from_fn(move || {
        let header = datagram.get(..HEADER)?;
        let length = u32_at(header, 0)? as usize;
        let payload = datagram.get(HEADER..length)?;
        let message = MessageRef {
            kind: u16_at(header, 4)?,
            flags: u16_at(header, 6)?,
            sequence: u32_at(header, 8)?,
            port: u32_at(header, 12)?,
            payload,
        };
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    })
}

/// The attributes in `bytes`, as type (without its flag bits) and payload; ends at the first that claims more than
/// there is.
pub fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(bytes, 0)?);
        let kind = u16_at(bytes, 2)? & NLA_TYPE_MASK;
        let payload = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, payload))
    })
}

/// What an NLMSG_ERROR message says.
pub(crate) fn acknowledgement(message: &MessageRef<'_>) -> Result<(), KernelError> {
    let error = i32_at(message.payload, 0).unwrap_or(-libc::EBADMSG);
    // struct nlmsgerr: the number, the request's header, and the rest of the request if it is not capped.
    let echoed = if message.flags & NLM_F_CAPPED != 0 {
        HEADER
    } else {
        u32_at(message.payload, 4).map_or(HEADER, |length| (length as usize).next_multiple_of(4).max(HEADER))
    };
    outcome(error, message, 4usize.saturating_add(echoed))
}

/// What an NLMSG_DONE message says: a dump may fail on its last step.
pub(crate) fn end_of_dump(message: &MessageRef<'_>) -> Result<(), KernelError> {
    outcome(i32_at(message.payload, 0).unwrap_or(0), message, 4)
}

fn outcome(error: i32, message: &MessageRef<'_>, attributes_at: usize) -> Result<(), KernelError> {
    if error >= 0 {
        return Ok(());
    }
    let mut text = None;
    if message.flags & NLM_F_ACK_TLVS != 0 {
        let bytes = message.payload.get(attributes_at..).unwrap_or_default();
        text = attributes(bytes)
            .find(|(kind, _)| *kind == NLMSGERR_ATTR_MSG)
            .map(|(_, words)| String::from_utf8_lossy(words).trim_end_matches('\0').to_owned())
            .filter(|words| !words.is_empty());
    }
    Err(KernelError {
        errno: error.wrapping_neg(),
        text,
    })
}

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().copied().map(u16::from_ne_bytes)
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().copied().map(u32::from_ne_bytes)
}

fn i32_at(bytes: &[u8], at: usize) -> Option<i32> {
    bytes.get(at..)?.first_chunk().copied().map(i32::from_ne_bytes)
}
