//! The mesh device and its addresses: dump and writes.
//!
//! The kernel leaves out who caused a change of a link or of an IPv6 address. So what we know of them is kept in
//! [`Known`], and a notification that says nothing new is our own echo.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use nix::errno::Errno;
use nix::libc;
use xfrm::{Batch, Connection, Writer};

use super::message::{AF_INET6, AF_UNSPEC, Address, IFF_NOARP, IFF_UP, Link, NLM_F_CREATE, NLM_F_EXCL, link_header};
use super::{LINK, gone_is_done, kernel_error, misfit, outcome, unread};
use crate::kernel::{Key, Object, Objects, Op, WriteError};

/// include/uapi/linux/if_link.h
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
/// No address of the kernel's own making.
const IN6_ADDR_GEN_MODE_NONE: u8 = 1;
/// drivers/net/veth.c: the peer's `struct ifinfomsg` and attributes.
const VETH_INFO_PEER: u16 = 1;

/// What swallows packets.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Sink {
    /// A dummy device.
    Dummy,
    /// A veth end whose other end is down for ever: it then has no carrier and drops all. For kernels without dummy.
    Veth,
}

impl Sink {
    /// In the order in which they are tried.
    pub(super) const ALL: [Self; 2] = [Self::Dummy, Self::Veth];

    fn kind(self) -> &'static str {
        match self {
            Self::Dummy => "dummy",
            Self::Veth => "veth",
        }
    }
}

/// The mesh device as we know it.
#[derive(Debug, Default)]
pub(super) struct Known {
    pub(super) link: Option<Link>,
    pub(super) addresses: BTreeSet<IpAddr>,
    /// We have set it up, and no notification has said so yet: those before that show it down on its way.
    pub(super) rising: bool,
    /// The index of the one that we have removed, until the notification says so: it goes down on its way.
    pub(super) leaving: Option<u32>,
}

/// Whether a device of that name is of our making.
pub(super) fn is_ours(link: &Link) -> bool {
    link.name == LINK && Sink::ALL.iter().any(|sink| link.kind.as_deref() == Some(sink.kind()))
}

/// How the device looks to the reconciler.
pub(super) fn object(link: &Link) -> Object {
    Object::Link {
        mtu: link.mtu,
        up: link.up,
    }
}

/// Puts the mesh device and its addresses into `objects`, and takes them as known.
pub(super) fn dump(
    connection: &mut Connection,
    known: &RefCell<Known>,
    objects: &mut Objects,
) -> Result<(), WriteError> {
    let link = find(connection, LINK)
        .map_err(|error| unread("the mesh device", error))?
        .filter(is_ours);
    let (rising, leaving) = (known.borrow().rising, known.borrow().leaving);
    let mut fresh = Known {
        link,
        addresses: BTreeSet::new(),
        rising,
        leaving,
    };
    if let Some(link) = &fresh.link {
        objects.insert(Key::Link(link.name.clone()), object(link));
        let found = addresses(connection, link.index).map_err(|error| unread("the mesh device's addresses", error))?;
        for address in found.iter().filter(|address| address.is_whole()) {
            objects.insert(Key::Address(link.name.clone(), address.net.addr()), Object::Address);
            fresh.addresses.insert(address.net.addr());
        }
    }
    *known.borrow_mut() = fresh;
    Ok(())
}

/// Carries out an operation on a device.
pub(super) fn apply(
    connection: &mut Connection,
    sinks: &[Sink],
    known: &RefCell<Known>,
    op: &Op,
) -> Result<(), WriteError> {
    let (name, mtu) = match op {
        Op::Make(Key::Link(name), Object::Link { mtu, .. }) | Op::Change(Key::Link(name), Object::Link { mtu, .. }) => {
            (name, *mtu)
        }
        Op::Break(Key::Link(name)) => return remove(connection, known, op, name),
        Op::Make(..) | Op::Change(..) | Op::Break(_) => return Err(misfit(op)),
    };
    if matches!(op, Op::Make(..)) {
        create(connection, sinks, name, mtu).map_err(|error| outcome(op, error))?;
    }
    let Some(link) = find(connection, name).map_err(|error| outcome(op, error))? else {
        return Err(WriteError::Refused {
            op: op.to_string(),
            source: kernel_error(Errno::ENODEV),
        });
    };
    if !is_ours(&link) {
        let kind = link.kind.as_deref().unwrap_or("hardware");
        let (found, remedy) = (
            format!("device {name} of kind {kind}"),
            format!("ip link delete {name}"),
        );
        return Err(WriteError::Foreign {
            op: op.to_string(),
            found,
            remedy,
        });
    }
    if !link.up {
        // Before it is set up, so that it never has a link-local address. Fails where the kernel has no IPv6.
        let _ = execute(connection, libc::RTM_NEWLINK, |writer| {
            link_header(writer, link.index, 0);
            writer.nested(libc::IFLA_AF_SPEC, |writer| {
                writer.nested(AF_INET6.into(), |writer| {
                    writer.attribute(IFLA_INET6_ADDR_GEN_MODE, &[IN6_ADDR_GEN_MODE_NONE]);
                });
            });
        });
    }
    execute(connection, libc::RTM_NEWLINK, |writer| {
        link_header(writer, link.index, IFF_UP | IFF_NOARP);
        writer.attribute_u32(libc::IFLA_MTU, mtu);
    })
    .map_err(|error| outcome(op, error))?;
    let mut known = known.borrow_mut();
    if known.link.as_ref().is_none_or(|before| before.index != link.index) {
        known.addresses.clear();
    }
    known.rising = !link.up;
    known.link = Some(Link { mtu, up: true, ..link });
    Ok(())
}

/// Makes the device, down, of the first kind that the kernel has; no error if there is one of that name.
fn create(connection: &mut Connection, sinks: &[Sink], name: &str, mtu: u32) -> Result<(), xfrm::Error> {
    let mut result = Ok(());
    for sink in sinks {
        let peers = match sink {
            Sink::Dummy => &[None][..],
            // The good name may still be on the other end of one that was renamed; then the kernel gives it a name.
            Sink::Veth => &[Some(peer_name(name)), None],
        };
        for peer in peers {
            let mut batch = Batch::new();
            batch.push(libc::RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, |writer| {
                link_header(writer, 0, 0);
                writer.attribute_str(libc::IFLA_IFNAME, name);
                writer.attribute_u32(libc::IFLA_MTU, mtu);
                writer.nested(libc::IFLA_LINKINFO, |writer| {
                    writer.attribute_str(libc::IFLA_INFO_KIND, sink.kind());
                    if *sink == Sink::Veth {
                        write_peer(writer, peer.as_deref(), mtu);
                    }
                });
            });
            result = connection.execute(batch).pop().unwrap_or(Err(xfrm::Error::Unknown));
            match &result {
                Err(error) if error.exists() && find(connection, name)?.is_some() => return Ok(()),
                Err(xfrm::Error::Kernel(error)) if [libc::EOPNOTSUPP, libc::EEXIST].contains(&error.errno) => {}
                _ => return result,
            }
        }
    }
    result
}

/// Writes what a veth's other end is like.
fn write_peer(writer: &mut Writer<'_>, name: Option<&str>, mtu: u32) {
    writer.nested(libc::IFLA_INFO_DATA, |writer| {
        writer.nested(VETH_INFO_PEER, |writer| {
            link_header(writer, 0, 0);
            if let Some(name) = name {
                writer.attribute_str(libc::IFLA_IFNAME, name);
            }
            writer.attribute_u32(libc::IFLA_MTU, mtu);
        });
    });
}

/// The name of the other end of a veth: "ringmail0-down", within the 15 characters of a device's name.
fn peer_name(name: &str) -> String {
    let stem: String = name.chars().take(10).collect();
    format!("{stem}-down")
}

fn remove(connection: &mut Connection, known: &RefCell<Known>, op: &Op, name: &str) -> Result<(), WriteError> {
    let link = find(connection, name).map_err(|error| outcome(op, error))?;
    match link.filter(is_ours) {
        Some(link) => {
            // Known to be gone before the notification comes; routes and addresses go with it.
            *known.borrow_mut() = Known {
                leaving: Some(link.index),
                ..Known::default()
            };
            gone_is_done(execute(connection, libc::RTM_DELLINK, |writer| {
                link_header(writer, link.index, 0);
            }))
            .map_err(|error| outcome(op, error))
        }
        None => Ok(()),
    }
}

/// Carries out an operation on an address of a device.
pub(super) fn apply_address(connection: &mut Connection, known: &RefCell<Known>, op: &Op) -> Result<(), WriteError> {
    let Key::Address(name, address) = op.key() else {
        return Err(misfit(op));
    };
    let link = find(connection, name).map_err(|error| outcome(op, error))?;
    let removing = matches!(op, Op::Break(_));
    let Some(link) = link else {
        let source = kernel_error(Errno::ENODEV);
        return if removing {
            Ok(())
        } else {
            Err(WriteError::Refused {
                op: op.to_string(),
                source,
            })
        };
    };
    let wanted = Address {
        index: link.index,
        net: IpNet::from(*address),
    };
    if removing {
        known.borrow_mut().addresses.remove(address);
        return gone_is_done(execute(connection, libc::RTM_DELADDR, |writer| wanted.write(writer)))
            .map_err(|error| outcome(op, error));
    }
    let mut batch = Batch::new();
    batch.push(libc::RTM_NEWADDR, NLM_F_CREATE | NLM_F_EXCL, |writer| {
        wanted.write(writer);
    });
    match connection.execute(batch).pop().unwrap_or(Err(xfrm::Error::Unknown)) {
        Ok(()) => {}
        Err(error) if error.exists() => {
            let found = addresses(connection, link.index).map_err(|error| outcome(op, error))?;
            // IPv6 has an address once, whatever its prefix.
            let same = found
                .iter()
                .find(|there| there.net.addr() == *address && !there.is_whole());
            if let Some(Address { net, .. }) = same {
                let (found, remedy) = (
                    format!("{net} dev {name}"),
                    format!("ip address delete {net} dev {name}"),
                );
                return Err(WriteError::Foreign {
                    op: op.to_string(),
                    found,
                    remedy,
                });
            }
        }
        Err(error) => return Err(outcome(op, error)),
    }
    known.borrow_mut().addresses.insert(*address);
    Ok(())
}

fn execute(connection: &mut Connection, kind: u16, body: impl FnOnce(&mut Writer<'_>)) -> Result<(), xfrm::Error> {
    let mut batch = Batch::new();
    batch.push(kind, 0, body);
    connection.execute(batch).pop().unwrap_or(Err(xfrm::Error::Unknown))
}

/// The device of this name.
fn find(connection: &mut Connection, name: &str) -> Result<Option<Link>, xfrm::Error> {
    let found = connection.get(
        libc::RTM_GETLINK,
        0,
        |writer| {
            link_header(writer, 0, 0);
            writer.attribute_str(libc::IFLA_IFNAME, name);
        },
        |message| Link::parse(&message),
    );
    match found {
        Err(error) if error.is_gone() => Ok(None),
        other => other,
    }
}

/// The addresses of a device. A kernel that filters (4.20) sends no others.
fn addresses(connection: &mut Connection, index: u32) -> Result<Vec<Address>, xfrm::Error> {
    connection.dump(
        libc::RTM_GETADDR,
        |writer| {
            writer.bytes(&[AF_UNSPEC, 0, 0, 0]);
            writer.u32(index);
        },
        |message| Address::parse(&message).filter(|address| address.index == index),
    )
}
