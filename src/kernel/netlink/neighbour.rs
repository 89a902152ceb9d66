//! Permanent neighbours and forwarding entries of our devices: dump and writes.
//!
//! Both are `struct ndmsg` on the wire; the family tells one from the other (net/core/neighbour.c,
//! drivers/net/vxlan/vxlan_core.c).

use std::cell::RefCell;
use std::net::IpAddr;

use nix::errno::Errno;
use nix::libc;
use xfrm::{Batch, Connection, MessageRef, Writer, message::attributes};

use super::link::{self, Known};
use super::message::{AF_INET, AF_INET6, NLM_F_CREATE, NLM_F_REPLACE, family, ip, number, octets};
use super::{gone_is_done, kernel_error, misfit, outcome, unread};
use crate::kernel::device::Mac;
use crate::kernel::{Key, Object, Objects, Op, Write, WriteError};

/// `AF_BRIDGE`: a forwarding entry.
const AF_BRIDGE: u8 = 7;

/// A neighbour, or a forwarding entry.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Entry {
    /// Which Ethernet address an IP address has.
    Neighbour {
        index: u32,
        address: IpAddr,
        mac: Mac,
        permanent: bool,
    },
    /// Where frames to an Ethernet address go.
    Forwarding {
        index: u32,
        mac: Mac,
        remote: Option<IpAddr>,
        permanent: bool,
    },
}

impl Entry {
    /// What RTM_NEWNEIGH or RTM_DELNEIGH shows; `None` for a bridge's entry, a proxy's, and one without an address.
    pub(super) fn parse(message: &MessageRef<'_>) -> Option<Self> {
        let header = message.payload.get(..12)?;
        let index = number(header, 4)?;
        let state = u16::from_ne_bytes(*header[8..].first_chunk()?);
        let flags = header[10];
        let permanent = state & libc::NUD_PERMANENT != 0;
        let (mut destination, mut mac, mut bridged) = (None, None, false);
        for (kind, payload) in attributes(&message.payload[12..]) {
            match kind {
                libc::NDA_DST => destination = Some(payload),
                libc::NDA_LLADDR => mac = payload.first_chunk::<6>().copied().map(Mac),
                libc::NDA_MASTER => bridged = true,
                _ => {}
            }
        }
        match header[0] {
            AF_BRIDGE => {
                if bridged || flags & libc::NTF_SELF == 0 {
                    return None;
                }
                let remote = destination.and_then(|bytes| match bytes.len() {
                    4 => ip(AF_INET, bytes),
                    _ => ip(AF_INET6, bytes),
                });
                Some(Self::Forwarding {
                    index,
                    mac: mac?,
                    remote,
                    permanent,
                })
            }
            family @ (AF_INET | AF_INET6) if flags & libc::NTF_PROXY == 0 => Some(Self::Neighbour {
                index,
                address: ip(family, destination?)?,
                mac: mac.unwrap_or_default(),
                permanent,
            }),
            _ => None,
        }
    }

    /// The index of the device that it belongs to.
    pub(super) fn index(&self) -> u32 {
        match self {
            Self::Neighbour { index, .. } | Self::Forwarding { index, .. } => *index,
        }
    }

    /// What the reconciler calls it, on the device `link`.
    pub(super) fn key(&self, link: &str) -> Key {
        match self {
            Self::Neighbour { address, .. } => Key::Neighbour(link.into(), *address),
            Self::Forwarding { mac, .. } => Key::Fdb(link.into(), *mac),
        }
    }

    /// What it says; `None` where it is none that we would make.
    pub(super) fn object(&self) -> Option<Object> {
        match *self {
            Self::Neighbour { mac, permanent, .. } => permanent.then_some(Object::Neighbour(mac)),
            Self::Forwarding { remote, permanent, .. } => remote.filter(|_| permanent).map(Object::Fdb),
        }
    }

    fn write(&self, writer: &mut Writer<'_>) {
        let (first, flags) = match self {
            Self::Neighbour { address, .. } => (family(*address), 0),
            Self::Forwarding { .. } => (AF_BRIDGE, libc::NTF_SELF),
        };
        writer.bytes(&[first, 0, 0, 0]);
        writer.u32(self.index());
        writer.bytes(&libc::NUD_PERMANENT.to_ne_bytes());
        writer.bytes(&[flags, 0]);
        match *self {
            Self::Neighbour { address, mac, .. } => {
                writer.attribute(libc::NDA_DST, &octets(address));
                writer.attribute(libc::NDA_LLADDR, &mac.0);
            }
            Self::Forwarding { mac, remote, .. } => {
                writer.attribute(libc::NDA_LLADDR, &mac.0);
                if let Some(remote) = remote {
                    writer.attribute(libc::NDA_DST, &octets(remote));
                }
            }
        }
    }
}

/// Puts the permanent entries of our VXLAN devices into `objects`.
pub(super) fn dump(
    connection: &mut Connection,
    known: &RefCell<Known>,
    objects: &mut Objects,
) -> Result<(), WriteError> {
    let devices: Vec<(u32, String)> = known.borrow().vxlans().collect();
    known.borrow_mut().forwarding.clear();
    for (index, name) in &devices {
        for family in [AF_INET, AF_INET6, AF_BRIDGE] {
            let found: Result<Vec<Entry>, xfrm::Error> = connection.dump(
                libc::RTM_GETNEIGH,
                |writer| {
                    // The device is named in the header for forwarding entries, in an attribute for neighbours.
                    let bridge = family == AF_BRIDGE;
                    writer.bytes(&[family, 0, 0, 0]);
                    writer.u32(if bridge { *index } else { 0 });
                    writer.zeros(4);
                    if !bridge {
                        writer.attribute_u32(libc::NDA_IFINDEX, *index);
                    }
                },
                |message| Entry::parse(&message).filter(|entry| entry.index() == *index),
            );
            for entry in found.map_err(|error| unread("the neighbours", error))? {
                if let Some(object) = entry.object() {
                    known.borrow_mut().saw(&entry);
                    objects.insert(entry.key(name), object);
                }
            }
        }
    }
    Ok(())
}

/// Carries operations on neighbours or forwarding entries out; one result each.
pub(super) fn apply(
    connection: &mut Connection,
    known: &RefCell<Known>,
    writes: &[Write],
) -> Vec<Result<(), WriteError>> {
    let mut batch = Batch::new();
    let mut sent: Vec<Result<Option<Entry>, WriteError>> = Vec::new();
    for Write { op, .. } in writes {
        let entry = wanted(op, &known.borrow());
        if let Ok(Some(entry)) = &entry {
            match op {
                Op::Break(_) => batch.push(libc::RTM_DELNEIGH, 0, |writer| entry.write(writer)),
                // Whoever made what stands there: it is on our device.
                Op::Make(..) | Op::Change(..) => {
                    batch.push(libc::RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, |writer| {
                        entry.write(writer);
                    });
                }
            }
        }
        sent.push(entry);
    }
    let mut results = connection.execute(batch).into_iter();
    let each = writes.iter().zip(sent).map(|(Write { op, .. }, entry)| {
        let Some(entry) = entry? else {
            return Ok(());
        };
        let result = results.next().unwrap_or(Err(xfrm::Error::Unknown));
        match op {
            Op::Break(_) => {
                known.borrow_mut().lost(&entry);
                gone_is_done(result)
            }
            Op::Make(..) | Op::Change(..) => {
                if result.is_ok() {
                    known.borrow_mut().saw(&entry);
                }
                result
            }
        }
        .map_err(|error| outcome(op, error))
    });
    each.collect()
}

/// The entry that an operation is about; `None` where it is on a device that is gone, and so gone itself.
fn wanted(op: &Op, known: &Known) -> Result<Option<Entry>, WriteError> {
    let (Key::Neighbour(name, _) | Key::Fdb(name, _)) = op.key() else {
        return Err(misfit(op));
    };
    let Some(index) = known.index(name).or_else(|| link::index_of(name)) else {
        return match op {
            Op::Break(_) => Ok(None),
            Op::Make(..) | Op::Change(..) => Err(WriteError::Refused {
                op: op.to_string(),
                source: kernel_error(Errno::ENODEV),
            }),
        };
    };
    let entry = match op {
        Op::Make(Key::Neighbour(_, address), Object::Neighbour(mac))
        | Op::Change(Key::Neighbour(_, address), Object::Neighbour(mac)) => Entry::Neighbour {
            index,
            address: *address,
            mac: *mac,
            permanent: true,
        },
        Op::Break(Key::Neighbour(_, address)) => Entry::Neighbour {
            index,
            address: *address,
            mac: Mac::default(),
            permanent: true,
        },
        Op::Make(Key::Fdb(_, mac), Object::Fdb(remote)) | Op::Change(Key::Fdb(_, mac), Object::Fdb(remote)) => {
            Entry::Forwarding {
                index,
                mac: *mac,
                remote: Some(*remote),
                permanent: true,
            }
        }
        Op::Break(Key::Fdb(_, mac)) => Entry::Forwarding {
            index,
            mac: *mac,
            remote: None,
            permanent: true,
        },
        Op::Make(..) | Op::Change(..) | Op::Break(_) => return Err(misfit(op)),
    };
    Ok(Some(entry))
}
