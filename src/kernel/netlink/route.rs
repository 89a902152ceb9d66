//! Routes: dump and writes.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use nix::libc;
use nix::net::if_::{if_indextoname, if_nametoindex};
use xfrm::{Batch, Connection};

use super::link::Known;
use super::message::{AF_INET6, FAMILIES, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, Route, family, route_filter};
use super::{gone_is_done, kernel_error, misfit, outcome, unread};
use crate::kernel::{self, Key, Object, Objects, Op, ROUTE_PROTOCOL, Via, Write, WriteError};

/// Whether a route is ours: by its mark, or because it leads into a tunnel of ours (flannel's, in a node that was its).
pub(super) fn belongs(route: &Route, known: &Known) -> bool {
    let tunnel = |link: u32| known.tunnels().any(|index| index == link);
    route.is_ours()
        || route.table == u32::from(libc::RT_TABLE_MAIN)
            && route.kind == libc::RTN_UNICAST
            && [libc::RTPROT_BOOT, libc::RTPROT_STATIC].contains(&route.protocol)
            && route.link.is_some_and(tunnel)
}

/// Puts every route of ours into `objects`.
pub(super) fn dump(
    connection: &mut Connection,
    known: &RefCell<Known>,
    objects: &mut Objects,
) -> Result<(), WriteError> {
    let mut names = BTreeMap::new();
    let tunnels = known.borrow().tunnels().next().is_some();
    for family in FAMILIES {
        // Where there is no tunnel the kernel may leave out all that others made.
        let found = read(connection, family, if tunnels { 0 } else { ROUTE_PROTOCOL })?;
        let mut known = known.borrow_mut();
        for route in found
            .iter()
            .filter(|route| belongs(route, &known))
            .cloned()
            .collect::<Vec<_>>()
        {
            let route = &route;
            known.leads_to(route.link);
            let (key, object) = object(route, |link| {
                names.entry(link).or_insert_with(|| link_name(link)).clone()
            });
            objects.insert(key, object);
        }
    }
    Ok(())
}

/// How a route of ours looks to the reconciler; `name` gives a device's name. One that lost its device or source shows so, and is changed back.
pub(super) fn object(route: &Route, name: impl FnMut(u32) -> String) -> (Key, Object) {
    match route.kind {
        libc::RTN_UNICAST => {}
        libc::RTN_BLACKHOLE => return (Key::GuardRoute(route.net), Object::Blackhole),
        _ => return (Key::GuardRoute(route.net), Object::Unreachable),
    }
    let onlink = route.onlink;
    let object = kernel::Route {
        link: route.link.map(name).unwrap_or_default(),
        via: route.gateway.map(|gateway| Via { gateway, onlink }),
        source: route.source,
        mtu: route.mtu,
    };
    (Key::Route(route.net), Object::Route(Box::new(object)))
}

/// Carries operations on routes out; one result each.
///
/// A place that is taken is looked at: a route of ours is replaced, someone else's is named and left.
pub(super) fn apply(
    connection: &mut Connection,
    known: &RefCell<Known>,
    writes: &[Write],
) -> Vec<Result<(), WriteError>> {
    let known = &mut *known.borrow_mut();
    let mut results: Vec<Option<Result<(), WriteError>>> = writes.iter().map(|_| None).collect();
    let mut links = BTreeMap::new();
    let mut first = Round::default();
    let mut occupied = Vec::new();
    for (index, Write { op, .. }) in writes.iter().enumerate() {
        match (op, wanted(op, &mut links)) {
            (_, Err(error)) => results[index] = Some(Err(error)),
            (Op::Break(_), Ok(route)) => first.remove(index, &route, known),
            (Op::Make(..), Ok(route)) => {
                known.leads_to(route.link);
                first.make(index, &route, NLM_F_CREATE | NLM_F_EXCL);
            }
            // To replace is to trust that what is there is ours.
            (Op::Change(..), Ok(route)) => {
                known.leads_to(route.link);
                occupied.push((index, route));
            }
        }
    }
    for (index, result) in first.execute(connection) {
        match result {
            Err(error) if error.exists() => match wanted(&writes[index].op, &mut links) {
                Ok(route) => occupied.push((index, route)),
                Err(error) => results[index] = Some(Err(error)),
            },
            other => results[index] = Some(other.map_err(|error| outcome(&writes[index].op, error))),
        }
    }
    let mut second = Round::default();
    match standing(connection, &occupied) {
        Err(error) => {
            let why = super::chain(&error);
            for (index, _) in occupied {
                results[index] = Some(Err(WriteError::Failed {
                    op: writes[index].op.to_string(),
                    why: why.clone(),
                }));
            }
        }
        Ok(standing) => {
            for (index, route) in occupied {
                let there = standing.get(&route.net).map_or(&[][..], Vec::as_slice);
                // flannel's own route to the same next hop says what ours says: it is taken over.
                let same = |there: &Route| {
                    there.protocol == libc::RTPROT_BOOT
                        && route.gateway.is_some()
                        && (there.gateway, there.link) == (route.gateway, route.link)
                };
                let ours = |there: &Route| belongs(there, known) || same(there);
                let flags = if there.iter().any(|there| ours(there) && there.is_in_the_way()) {
                    NLM_F_CREATE | NLM_F_REPLACE
                } else {
                    NLM_F_CREATE | NLM_F_EXCL
                };
                if let Some(theirs) = there.iter().find(|there| there.is_in_the_way() && !ours(there)) {
                    results[index] = Some(Err(foreign(&writes[index].op, theirs)));
                    continue;
                }
                // IPv6 asks the route that is to be replaced for an onlink gateway's device, and refuses another one
                // (net/ipv6/route.c, ip6_route_check_nh_onlink). So the device changes first, which leaves no gap.
                if flags & NLM_F_REPLACE != 0 && looks_itself_up(&route) {
                    let device_alone = Route {
                        gateway: None,
                        onlink: false,
                        ..route.clone()
                    };
                    second.make(index, &device_alone, flags);
                }
                second.make(index, &route, flags);
            }
        }
    }
    for (index, result) in second.execute(connection) {
        results[index] = Some(result.map_err(|error| outcome(&writes[index].op, error)));
    }
    results
        .into_iter()
        .map(|result| result.expect("every operation has gone one way"))
        .collect()
}

/// Whether the gateway lies in the net that the route is to, in IPv6.
fn looks_itself_up(route: &Route) -> bool {
    route.net.addr().is_ipv6() && route.gateway.is_some_and(|gateway| route.net.contains(&gateway))
}

/// Requests that go together, each with the operation it is for.
#[derive(Default)]
struct Round {
    batch: Batch,
    indexes: Vec<usize>,
    breaks: BTreeSet<usize>,
}

impl Round {
    fn make(&mut self, index: usize, route: &Route, flags: u16) {
        self.batch.push(libc::RTM_NEWROUTE, flags, |writer| route.write(writer));
        self.indexes.push(index);
    }

    fn remove(&mut self, index: usize, route: &Route, known: &Known) {
        let tunnels = known.tunnels().map(|link| Route {
            protocol: libc::RTPROT_BOOT,
            link: Some(link),
            ..route.clone()
        });
        let flannels = (route.kind == libc::RTN_UNICAST)
            .then_some(tunnels)
            .into_iter()
            .flatten();
        for route in std::iter::once(route.clone()).chain(flannels) {
            self.batch.push(libc::RTM_DELROUTE, 0, |writer| route.write_key(writer));
            self.indexes.push(index);
        }
        self.breaks.insert(index);
    }

    fn execute(self, connection: &mut Connection) -> Vec<(usize, Result<(), xfrm::Error>)> {
        let Self { batch, indexes, breaks } = self;
        let results = connection.execute(batch).into_iter();
        let done = |index, result| {
            if breaks.contains(&index) {
                gone_is_done(result)
            } else {
                result
            }
        };
        indexes
            .into_iter()
            .zip(results)
            .map(|(index, result)| (index, done(index, result)))
            .collect()
    }
}

/// The route that an operation is about. The device's index is looked up here, once for all operations.
fn wanted(op: &Op, links: &mut BTreeMap<String, Option<u32>>) -> Result<Route, WriteError> {
    match op {
        Op::Make(Key::GuardRoute(net), Object::Unreachable) | Op::Change(Key::GuardRoute(net), Object::Unreachable) => {
            Ok(Route::ours(*net, libc::RTN_UNREACHABLE))
        }
        Op::Make(Key::GuardRoute(net), Object::Blackhole) | Op::Change(Key::GuardRoute(net), Object::Blackhole) => {
            Ok(Route::ours(*net, libc::RTN_BLACKHOLE))
        }
        Op::Make(Key::Route(net), Object::Route(route)) | Op::Change(Key::Route(net), Object::Route(route)) => {
            let kernel::Route { link, via, source, mtu } = &**route;
            let index = *links
                .entry(link.clone())
                .or_insert_with(|| if_nametoindex(link.as_str()).ok());
            let Some(index) = index else {
                let source = xfrm::KernelError {
                    text: Some(format!("there is no device {link}")),
                    ..kernel_error(nix::errno::Errno::ENODEV)
                };
                return Err(WriteError::Refused {
                    op: op.to_string(),
                    source,
                });
            };
            Ok(Route {
                link: Some(index),
                gateway: via.map(|via| via.gateway),
                onlink: via.is_some_and(|via| via.onlink),
                source: *source,
                mtu: *mtu,
                ..Route::ours(*net, libc::RTN_UNICAST)
            })
        }
        // A type of 0 is any.
        Op::Break(Key::GuardRoute(net)) => Ok(Route::ours(*net, libc::RTN_UNSPEC)),
        Op::Break(Key::Route(net)) => Ok(Route::ours(*net, libc::RTN_UNICAST)),
        Op::Make(..) | Op::Change(..) | Op::Break(_) => Err(misfit(op)),
    }
}

/// All routes to the nets of these, whoever made them.
fn standing(
    connection: &mut Connection,
    occupied: &[(usize, Route)],
) -> Result<BTreeMap<IpNet, Vec<Route>>, WriteError> {
    let mut standing: BTreeMap<IpNet, Vec<Route>> = BTreeMap::new();
    let nets: BTreeSet<IpNet> = occupied.iter().map(|(_, route)| route.net).collect();
    let families: BTreeSet<u8> = nets.iter().map(|net| family(net.addr())).collect();
    for family in families {
        for route in read(connection, family, 0)? {
            if nets.contains(&route.net) {
                standing.entry(route.net).or_default().push(route);
            }
        }
    }
    Ok(standing)
}

/// The routes of a family that `protocol` made; 0 for anyone.
fn read(connection: &mut Connection, family: u8, protocol: u8) -> Result<Vec<Route>, WriteError> {
    let found = connection.dump(
        libc::RTM_GETROUTE,
        |writer| route_filter(writer, family, protocol),
        |message| Route::parse(&message).filter(|route| super::message::family(route.net.addr()) == family),
    );
    match found {
        // A kernel without IPv6 has no such table.
        Err(xfrm::Error::Kernel(error)) if family == AF_INET6 && error.errno == libc::EOPNOTSUPP => Ok(Vec::new()),
        other => other.map_err(|error| unread("the routes", error)),
    }
}

/// Names the route in the way as `ip route` shows it, and the command that removes it.
fn foreign(op: &Op, route: &Route) -> WriteError {
    let kind = match route.kind {
        libc::RTN_UNICAST => "",
        libc::RTN_UNREACHABLE => "unreachable ",
        libc::RTN_BLACKHOLE => "blackhole ",
        libc::RTN_PROHIBIT => "prohibit ",
        libc::RTN_THROW => "throw ",
        _ => "local ",
    };
    let via = route
        .gateway
        .map(|gateway| format!(" via {gateway}"))
        .unwrap_or_default();
    let device = route
        .link
        .map(|link| format!(" dev {}", link_name(link)))
        .unwrap_or_default();
    let found = format!("{kind}{}{via}{device} proto {}", route.net, route.protocol);
    let remedy = format!("ip route delete {found}");
    WriteError::Foreign {
        op: op.to_string(),
        found,
        remedy,
    }
}

/// A device's name; its number in words where it has just gone.
pub(super) fn link_name(index: u32) -> String {
    match if_indextoname(index) {
        Ok(name) => name.to_string_lossy().into_owned(),
        Err(_) => format!("if{index}"),
    }
}
