//! What must hold on every node at every moment, looked at after every operation and every step.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;

use ringmail::kernel::{Kind, Op};
use xfrm::Sa;

use super::kernel::SimKernel;
use super::packet::{Fate, From, Layers, Leak, Packet, Surroundings, cuts, fate, leaks, pod};

/// How what goes wrong is called, at the begin of a panic's message.
pub(crate) const LOST: &str = "LOST";
/// In the clear, or let in from there.
pub(crate) const PLAIN: &str = "PLAIN";
/// A sending key was programmed again.
pub(crate) const TWICE: &str = "TWICE";
/// Events stopped, and the mesh did not come to its newest generations.
pub(crate) const STUCK: &str = "STUCK";

/// A node as its packets see it; shared with the watch of every kernel.
pub(crate) struct View {
    pub(crate) kernel: SimKernel,
    pub(crate) around: Surroundings,
    /// In the mesh, and its guard has stood since it came up.
    pub(crate) guarded: bool,
    /// Holds a lease.
    pub(crate) present: bool,
    /// Another hand was at its kernel, and the process has not mended all of it yet.
    pub(crate) hurt: bool,
    /// Where its data flows.
    pub(crate) flows: BTreeSet<usize>,
}

/// Every node as its packets see it.
pub(crate) type Views = Rc<RefCell<Vec<View>>>;

/// Whether the kernel of `to` reads a packet of this SA and key, and why not.
pub(crate) fn read_by(to: &View, sa: &Sa, key: &[u8], packet: Packet) -> Result<(), String> {
    to.kernel.look(|machine| {
        // The kernel compares no ports on the way in; a NAT may have changed them.
        let mirrored = |theirs: &Sa| theirs.encap.is_some() == sa.encap.is_some();
        let same = |theirs: &Sa| {
            mirrored(theirs)
                && theirs.algorithm == sa.algorithm
                && theirs.esn == sa.esn
                && theirs.af_unspec == sa.af_unspec
        };
        match machine.scene().sas().iter().find(|theirs| theirs.id() == sa.id()) {
            None => Err("has no such SA".into()),
            Some(_) if machine.keys.get(&sa.id()).is_none_or(|held| held != key) => Err("has another key".into()),
            Some(theirs) if !same(theirs) => Err(format!("has it as {theirs:?}, sent is {sa:?}")),
            Some(theirs) => match fate(machine.scene(), &to.around, Layers::ALL, From::Tunnel(theirs), packet) {
                Fate::Delivered => Ok(()),
                fate => Err(format!("decrypts it, then: {fate:?}")),
            },
        }
    })
}

/// Looks at what `x`'s packets meet now, and at what is sent to it.
pub(crate) fn check_operation(views: &Views, x: usize, op: &Op) {
    if op.key().kind() != Kind::Sa {
        check_leaks(&views.borrow(), x, &op.to_string());
    }
    let count = views.borrow().len();
    for y in 0..count {
        check_data(views, x, y, &op.to_string());
        check_data(views, y, x, &op.to_string());
    }
}

pub(crate) fn check_all(views: &Views) {
    let count = views.borrow().len();
    for x in 0..count {
        for y in 0..count {
            check_data(views, x, y, "a step");
        }
    }
}

fn check_leaks(views: &[View], x: usize, after: &str) {
    let view = &views[x];
    if !view.guarded {
        return;
    }
    let peers: Vec<_> = (views.iter().filter(|other| !std::ptr::eq(*other, view)))
        .flat_map(|other| other.around.own.iter())
        .collect();
    let nobody: Vec<_> = ["10.244.99.0/24", "fd00:10:244:99::/64"]
        .iter()
        .map(|net| net.parse().expect("a net"))
        .collect();
    view.kernel.look(|machine| {
        // A forged own address is for the filter alone to see, and another hand may have removed that.
        let ways = if view.hurt { Leak::WITHOUT_FILTER } else { Leak::ALL };
        let mut found = leaks(machine.scene(), &view.around, Layers::ALL, &peers, &nobody, ways);
        if !view.hurt {
            found.extend(cuts(machine.scene(), &view.around));
        }
        assert!(found.is_empty(), "{PLAIN}: {x} after {after}: {found:?}");
    });
}

/// What `x` sends to `y` as data must be readable; what flowed must flow on.
fn check_data(views: &Views, x: usize, y: usize, after: &str) {
    let mut flowing = {
        let views = views.borrow();
        let (from, to) = (&views[x], &views[y]);
        if x == y || !from.present || !from.guarded || !to.present {
            return;
        }
        from.around.own.iter().all(|own| {
            let dst = to
                .around
                .own
                .iter()
                .find(|net| net.addr().is_ipv4() == own.addr().is_ipv4());
            let packet = Packet {
                src: pod(own),
                dst: pod(dst.expect("both have each family of the mesh")),
                udp: None,
            };
            from.kernel.look(|machine| {
                let id = match fate(machine.scene(), &from.around, Layers::ALL, From::Behind, packet) {
                    Fate::Sealed(id) => id,
                    Fate::Dropped(why) => {
                        assert!(
                            !from.flows.contains(&y),
                            "{LOST}: {x}'s data to {y} flowed; after {after} it is dropped: {why}"
                        );
                        return false;
                    }
                    fate => panic!("{PLAIN}: {x}'s data to {y} is {fate:?} after {after}"),
                };
                let sa = machine
                    .scene()
                    .sas()
                    .iter()
                    .find(|sa| sa.id() == id)
                    .expect("it was found");
                let key = &machine.keys[&id];
                let Err(why) = read_by(to, sa, key, packet) else {
                    return true;
                };
                let torn = to
                    .kernel
                    .look(|theirs| theirs.torn.contains(&(id, key.clone())) || !theirs.addresses.contains(&sa.dst));
                assert!(
                    torn || to.hurt,
                    "{LOST}: {x} sends to {y} on {} after {after}; it {why}",
                    keys::Spi(id.spi)
                );
                false
            })
        })
    };
    flowing &= !views.borrow()[x].hurt;
    if flowing {
        views.borrow_mut()[x].flows.insert(y);
    }
}
