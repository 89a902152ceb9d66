//! Our devices and their addresses: dump and writes.
//!
//! The kernel leaves out who caused a change of a link or of an IPv6 address. So what we know of them is kept in
//! [`Known`], and a notification that says nothing new is our own echo.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;
use nix::errno::Errno;
use nix::libc;
use xfrm::{Batch, Connection, Writer};

use super::message::{
    self, AF_INET6, AF_UNSPEC, Address, IFF_NOARP, IFF_UP, Link, NLM_F_CREATE, NLM_F_EXCL, Tunnel, link_header, octets,
};
use super::neighbour::Entry;
use super::{LINK, gone_is_done, kernel_error, misfit, outcome, unread};
use crate::backend::{ipip, udp, vxlan};
use crate::kernel::device::{Device, DeviceKind, Mac, Vxlan};
use crate::kernel::{Event, Key, Kind, Object, Objects, Op, WriteError};

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

/// What is known of devices, addresses and entries of ours.
#[derive(Debug, Default)]
pub(super) struct Known {
    devices: BTreeMap<String, Held>,
    /// The forwarding entries, whose notifications don't say who caused them.
    pub(super) forwarding: BTreeMap<(u32, Mac), IpAddr>,
    /// Other devices that routes of ours lead to: the kernel takes those routes with it and says nothing.
    pub(super) carriers: BTreeSet<u32>,
    /// What our own writes took with them.
    pub(super) pending: Vec<Event>,
}

/// One device of ours.
#[derive(Debug, Default)]
pub(super) struct Held {
    pub(super) link: Option<Link>,
    pub(super) addresses: BTreeSet<IpAddr>,
    /// We have set it up, and no notification has said so yet: those before that show it down on its way.
    pub(super) rising: bool,
    /// The index of the one that we have removed, until the notification says so: it goes down on its way.
    pub(super) leaving: Option<u32>,
}

impl Known {
    /// What is known of the device of this name.
    pub(super) fn held(&mut self, name: &str) -> &mut Held {
        self.devices.entry(name.to_owned()).or_default()
    }

    /// The name of our device with this index.
    pub(super) fn name(&self, index: u32) -> Option<&str> {
        let mut devices = self.devices.iter();
        devices
            .find(|(_, held)| held.link.as_ref().is_some_and(|link| link.index == index))
            .map(|(name, _)| name.as_str())
    }

    /// The index of our device of this name.
    pub(super) fn index(&self, name: &str) -> Option<u32> {
        self.devices.get(name)?.link.as_ref().map(|link| link.index)
    }

    /// Our devices but the one that swallows, by index: what leads into them is ours, whoever made it.
    pub(super) fn tunnels(&self) -> impl Iterator<Item = u32> {
        let tunnels = self.devices.values().filter_map(|held| held.link.as_ref());
        tunnels.filter(|link| link.name != LINK).map(|link| link.index)
    }

    /// Our VXLAN devices, by index and name.
    pub(super) fn vxlans(&self) -> impl Iterator<Item = (u32, String)> {
        let links = self.devices.values().filter_map(|held| held.link.as_ref());
        let vxlan = |link: &&Link| link.kind.as_deref() == Some("vxlan");
        links.filter(vxlan).map(|link| (link.index, link.name.clone()))
    }

    /// A route of ours leads to this device.
    pub(super) fn leads_to(&mut self, link: Option<u32>) {
        if let Some(link) = link.filter(|link| self.name(*link).is_none()) {
            self.carriers.insert(link);
        }
    }

    /// An entry is there now; false where that was known.
    pub(super) fn saw(&mut self, entry: &Entry) -> bool {
        match *entry {
            Entry::Forwarding {
                index,
                mac,
                remote: Some(remote),
                ..
            } => self.forwarding.insert((index, mac), remote) != Some(remote),
            _ => true,
        }
    }

    /// An entry is gone; false where that was known.
    pub(super) fn lost(&mut self, entry: &Entry) -> bool {
        match *entry {
            Entry::Forwarding { index, mac, .. } => self.forwarding.remove(&(index, mac)).is_some(),
            Entry::Neighbour { .. } => true,
        }
    }

    /// Forgets a device and all that hung on it; what that was.
    pub(super) fn forget(&mut self, name: &str) -> Vec<Event> {
        let held = std::mem::take(self.held(name));
        let Some(link) = held.link else { return Vec::new() };
        let mut events = vec![Event::AllGone(Kind::Route)];
        self.forwarding.retain(|(index, _), _| *index != link.index);
        let address = |address| Event::Gone(Key::Address(link.name.clone(), address));
        events.extend(held.addresses.into_iter().map(address));
        events.push(Event::Gone(Key::Link(link.name)));
        events
    }
}

/// Whether a device is of our making or flannel's: by its name and kind.
pub(super) fn is_ours(link: &Link) -> bool {
    let kind = link.kind.as_deref();
    let numbered = |prefix| {
        let number = link.name.strip_prefix(prefix);
        number.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
    };
    match link.name.as_str() {
        LINK => Sink::ALL.iter().any(|sink| kind == Some(sink.kind())),
        ipip::LINK => kind == Some("ipip"),
        udp::LINK => kind == Some("tun"),
        _ => (numbered(vxlan::PREFIX) || numbered(vxlan::PREFIX_V6)) && kind == Some("vxlan"),
    }
}

/// How the device looks to the reconciler.
pub(super) fn object(link: &Link) -> Object {
    let kind = match link.tunnel {
        Some(Tunnel::Vxlan {
            vni,
            port,
            local,
            parent,
            learning,
            gbp,
        }) => DeviceKind::Vxlan(Vxlan {
            vni,
            port,
            local: local.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
            parent,
            learning,
            gbp,
            mac: link.mac.unwrap_or_default(),
        }),
        // One with a remote end of its own leads there and nowhere else: as good as none.
        Some(Tunnel::Ipip { local, remote }) => DeviceKind::Ipip {
            local: match (local, remote) {
                (Some(IpAddr::V4(local)), None) => local,
                _ => Ipv4Addr::UNSPECIFIED,
            },
        },
        None if link.kind.as_deref() == Some("tun") => DeviceKind::Tun,
        None => DeviceKind::Sink,
    };
    Object::Link(Box::new(Device {
        up: link.up,
        ..Device::new(kind, link.mtu)
    }))
}

/// Puts our devices and their addresses into `objects`, and takes them as known.
pub(super) fn dump(
    connection: &mut Connection,
    known: &RefCell<Known>,
    objects: &mut Objects,
) -> Result<(), WriteError> {
    let links: Vec<Link> = connection
        .dump(
            libc::RTM_GETLINK,
            |writer| link_header(writer, 0, 0),
            |message| Link::parse(&message).filter(is_ours),
        )
        .map_err(|error| unread("the devices", error))?;
    let mut known = known.borrow_mut();
    for held in known.devices.values_mut() {
        (held.link, held.addresses) = (None, BTreeSet::new());
    }
    for link in links {
        objects.insert(Key::Link(link.name.clone()), object(&link));
        let found = addresses(connection, link.index).map_err(|error| unread("the devices' addresses", error))?;
        let held = known.held(&link.name);
        for address in found
            .iter()
            .filter(|address| address.is_whole() && !address.is_link_local())
        {
            objects.insert(Key::Address(link.name.clone(), address.net.addr()), Object::Address);
            held.addresses.insert(address.net.addr());
        }
        held.link = Some(link);
    }
    Ok(())
}

/// Carries out an operation on a device.
pub(super) fn apply(
    connection: &mut Connection,
    sinks: &[Sink],
    known: &RefCell<Known>,
    op: &Op,
) -> Result<(), WriteError> {
    let (name, device) = match op {
        Op::Make(Key::Link(name), Object::Link(device)) | Op::Change(Key::Link(name), Object::Link(device)) => {
            (name, device)
        }
        Op::Break(Key::Link(name)) => return remove(connection, known, op, name),
        Op::Make(..) | Op::Change(..) | Op::Break(_) => return Err(misfit(op)),
    };
    let failed = |error| outcome(op, error);
    if matches!(op, Op::Make(..)) {
        create(connection, sinks, name, device).map_err(|error| refusal(op, device, error))?;
    }
    let gone = || WriteError::Refused {
        op: op.to_string(),
        source: kernel_error(Errno::ENODEV),
    };
    let mut link = find(connection, name).map_err(failed)?.ok_or_else(gone)?;
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
    if matches!(object(&link), Object::Link(there) if !there.can_become(device)) {
        // What hangs on it goes, and the reconciler hears of it as of another hand's doing.
        let lost = known.borrow_mut().forget(name);
        let hung = [Kind::Neighbour, Kind::Fdb].map(Event::AllGone);
        let lost = lost
            .into_iter()
            .filter(|event| !matches!(event, Event::Gone(Key::Link(_))));
        known.borrow_mut().pending.extend(lost.chain(hung));
        delete(connection, link.index).map_err(failed)?;
        create(connection, sinks, name, device).map_err(|error| refusal(op, device, error))?;
        link = find(connection, name).map_err(failed)?.ok_or_else(gone)?;
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
    let mac = match device.kind {
        DeviceKind::Vxlan(vxlan) => Some(vxlan.mac),
        DeviceKind::Sink | DeviceKind::Ipip { .. } | DeviceKind::Tun => None,
    };
    let flags = match device.kind {
        DeviceKind::Sink => IFF_UP | IFF_NOARP,
        DeviceKind::Vxlan(_) | DeviceKind::Ipip { .. } | DeviceKind::Tun => IFF_UP,
    };
    execute(connection, libc::RTM_NEWLINK, |writer| {
        link_header(writer, link.index, flags);
        writer.attribute_u32(libc::IFLA_MTU, device.mtu);
        if let Some(mac) = mac.filter(|mac| link.mac != Some(*mac)) {
            writer.attribute(libc::IFLA_ADDRESS, &mac.0);
        }
    })
    .map_err(failed)?;
    let mut known = known.borrow_mut();
    let held = known.held(name);
    if held.link.as_ref().is_none_or(|before| before.index != link.index) {
        held.addresses.clear();
    }
    held.rising = !link.up;
    held.link = Some(Link {
        mtu: device.mtu,
        up: true,
        mac: mac.or(link.mac),
        ..link
    });
    Ok(())
}

/// Makes the device, down; no error if there is one of that name. One that swallows is of the first kind that the kernel
/// has.
fn create(connection: &mut Connection, sinks: &[Sink], name: &str, device: &Device) -> Result<(), xfrm::Error> {
    let mtu = device.mtu;
    let make = |connection: &mut Connection, kind: &str, data: &dyn Fn(&mut Writer<'_>)| {
        let mut batch = Batch::new();
        batch.push(libc::RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, |writer| {
            link_header(writer, 0, 0);
            writer.attribute_str(libc::IFLA_IFNAME, name);
            writer.attribute_u32(libc::IFLA_MTU, mtu);
            if let DeviceKind::Vxlan(vxlan) = device.kind {
                writer.attribute(libc::IFLA_ADDRESS, &vxlan.mac.0);
            }
            writer.nested(libc::IFLA_LINKINFO, |writer| {
                writer.attribute_str(libc::IFLA_INFO_KIND, kind);
                data(writer);
            });
        });
        match connection.execute(batch).pop().unwrap_or(Err(xfrm::Error::Unknown)) {
            Err(error) if error.exists() && find(connection, name)?.is_some() => Ok(()),
            other => other,
        }
    };
    match device.kind {
        DeviceKind::Sink => {
            let mut result = Ok(());
            for sink in sinks {
                let peers = match sink {
                    Sink::Dummy => &[None][..],
                    // The good name may still be on the other end of one that was renamed; then the kernel gives it one.
                    Sink::Veth => &[Some(peer_name(name)), None],
                };
                for peer in peers {
                    result = make(connection, sink.kind(), &|writer| {
                        if *sink == Sink::Veth {
                            write_peer(writer, peer.as_deref(), mtu);
                        }
                    });
                    match &result {
                        Err(xfrm::Error::Kernel(error)) if [libc::EOPNOTSUPP, libc::EEXIST].contains(&error.errno) => {}
                        _ => return result,
                    }
                }
            }
            result
        }
        DeviceKind::Vxlan(vxlan) => make(connection, "vxlan", &|writer| write_vxlan(writer, &vxlan)),
        DeviceKind::Ipip { local } => make(connection, "ipip", &|writer| {
            writer.nested(libc::IFLA_INFO_DATA, |writer| {
                writer.attribute(message::ipip::LOCAL, &local.octets());
                writer.attribute(message::ipip::PMTUDISC, &[1]);
            });
        }),
        DeviceKind::Tun => tunnel(name),
    }
}

/// Writes what a VXLAN device is like. Whatever is not written is the kernel's default, as with flannel: no learning of
/// misses, outer checksums on.
fn write_vxlan(writer: &mut Writer<'_>, vxlan: &Vxlan) {
    writer.nested(libc::IFLA_INFO_DATA, |writer| {
        writer.attribute_u32(message::vxlan::ID, vxlan.vni);
        writer.attribute_u32(message::vxlan::LINK, vxlan.parent);
        let local = match vxlan.local {
            IpAddr::V4(_) => message::vxlan::LOCAL,
            IpAddr::V6(_) => message::vxlan::LOCAL6,
        };
        writer.attribute(local, &octets(vxlan.local));
        writer.attribute(message::vxlan::LEARNING, &[u8::from(vxlan.learning)]);
        writer.attribute(message::vxlan::PORT, &vxlan.port.to_be_bytes());
        if vxlan.gbp {
            writer.attribute(message::vxlan::GBP, &[]);
        }
    });
}

/// Why a device could not be made, with what is missing where the kernel does not know its kind.
fn refusal(op: &Op, device: &Device, error: xfrm::Error) -> WriteError {
    let module = match device.kind {
        DeviceKind::Sink => "dummy",
        DeviceKind::Vxlan(_) => "vxlan",
        DeviceKind::Ipip { .. } => "ipip",
        DeviceKind::Tun => "tun",
    };
    match &error {
        xfrm::Error::Kernel(refused) if refused.errno == libc::EOPNOTSUPP => WriteError::Failed {
            op: op.to_string(),
            why: format!("this kernel has no such device: `modprobe {module}`, or run a kernel that has it"),
        },
        _ => outcome(op, error),
    }
}

/// Makes the device that hands packets to this process.
fn tunnel(name: &str) -> Result<(), xfrm::Error> {
    crate::tunnel::device::make(name).map_err(|error| {
        xfrm::Error::Kernel(xfrm::KernelError {
            errno: error.raw_os_error().unwrap_or(libc::EIO),
            text: Some(format!("/dev/net/tun: {error}")),
        })
    })
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
            let mut known = known.borrow_mut();
            known.forget(name);
            known.held(name).leaving = Some(link.index);
            delete(connection, link.index).map_err(|error| outcome(op, error))
        }
        None => Ok(()),
    }
}

fn delete(connection: &mut Connection, index: u32) -> Result<(), xfrm::Error> {
    gone_is_done(execute(connection, libc::RTM_DELLINK, |writer| {
        link_header(writer, index, 0);
    }))
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
        known.borrow_mut().held(name).addresses.remove(address);
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
    known.borrow_mut().held(name).addresses.insert(*address);
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

/// The index of the device of this name, whoever's it is.
pub(super) fn index_of(name: &str) -> Option<u32> {
    nix::net::if_::if_nametoindex(name).ok()
}
