//! Every prefix of every pass is safe, also when an operation of it fails.
//!
//! The packets of `sim::packet` know nothing of plans: they meet the objects that are there. Each scenario brings two
//! or three real nodes to the moment before a change, then counts what is checked after every single operation of it;
//! and again for every operation and every way in which it can fail.

mod sim;

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;

use keys::EncapMode;
use ringmail::kernel::{Datapath, Event, Guard, Key, Kind, Objects, Op, Write};
use ringmail::node::Cause;
use sim::kernel::{Fault, SimKernel};
use sim::make::{self, Families};
use sim::mesh::Mesh;
use sim::packet::{Layers, Leak, Scene, Surroundings, cuts, leaks};

/// Looks at node 0 after each of its operations, in each way that its layers can stand alone; counts the looks.
fn look_closely(mesh: &Mesh) -> Rc<Cell<usize>> {
    let looks = Rc::new(Cell::new(0));
    let (counted, views) = (looks.clone(), mesh.views.clone());
    let machine = mesh.members[0].kernel.clone();
    let check = {
        let views = views.clone();
        move |op: &Op| {
            sim::watch::check_operation(&views, 0, op);
            let views = views.borrow();
            let around = &views[0].around;
            let peers: Vec<_> = views[1..].iter().flat_map(|view| view.around.own.iter()).collect();
            let wrong = machine.look(|machine| alone(machine.scene(), around, &peers, views[0].hurt));
            assert!(wrong.is_empty(), "after {}: {wrong:?}", sim::text::op(op));
            counted.set(counted.get() + 1);
        }
    };
    mesh.members[0].kernel.watch(check);
    looks
}

fn nobody() -> [ipnet::IpNet; 2] {
    ["10.244.99.0/24", "fd00:10:244:99::/64"].map(|net| net.parse().expect("a net"))
}

/// What leaks where only some layers stand: the way out is shut three times over, the way in twice.
fn alone(scene: &Scene, around: &Surroundings, peers: &[ipnet::IpNet], filter_follows: bool) -> Vec<String> {
    let none = Layers {
        firewall: false,
        policies: false,
        routes: false,
    };
    let each = [
        (
            "without the filter",
            Layers {
                firewall: false,
                ..Layers::ALL
            },
            Leak::WITHOUT_FILTER,
        ),
        (
            "without policies",
            Layers {
                policies: false,
                ..Layers::ALL
            },
            Leak::ALL,
        ),
        (
            "without routes",
            Layers {
                routes: false,
                ..Layers::ALL
            },
            Leak::ALL,
        ),
        ("by the filter alone", Layers { firewall: true, ..none }, Leak::ALL),
        (
            "by policies alone",
            Layers { policies: true, ..none },
            Leak::WITHOUT_FILTER,
        ),
        ("by routes alone", Layers { routes: true, ..none }, Leak::OUT),
    ];
    let mut wrong = Vec::new();
    for (how, layers, ways) in each {
        if filter_follows && layers.firewall {
            continue;
        }
        let found = leaks(scene, around, layers, peers, &nobody(), ways);
        wrong.extend(found.into_iter().map(|leak| format!("{how}: {leak}")));
    }
    wrong
}

type Change = fn(&mut Mesh);

/// What can happen to node 0 of two that are settled; a third is there and not yet in the mesh.
const CHANGES: [(&str, Change); 7] = [
    ("a peer is added", |mesh| {
        mesh.start(2);
        mesh.run(Duration::from_secs(1));
    }),
    ("a peer is removed", |mesh| {
        mesh.leave(1);
        mesh.flush();
    }),
    ("it rotates", |mesh| mesh.rotate(0, Cause::Asked)),
    ("its peer rotates", |mesh| mesh.rotate(1, Cause::Asked)),
    ("it restarts", |mesh| {
        mesh.stop(0);
        mesh.start(0);
    }),
    ("its uplink changes", |mesh| change_uplink(mesh)),
    ("its PSK changes", |mesh| {
        let psks = vec![make::psk(2, &mesh.network), make::psk(1, &mesh.network)];
        for member in &mut mesh.members {
            member.psks = psks.clone();
            if let Some(process) = &mut member.process {
                process.reconciler.node.keyed(psks.clone(), mesh.now - process.began);
            }
        }
        mesh.turn(0);
    }),
];

/// The mesh comes to run over another interface of the same node.
fn change_uplink(mesh: &mut Mesh) {
    let mut uplink = make::uplink(mesh.families, 77);
    uplink.name = "eth1".into();
    uplink.index = 3;
    let addresses: Vec<_> = uplink.local.iter().collect();
    mesh.members[0].kernel.with(|machine| {
        machine.addresses.extend(&addresses);
        machine.sources.extend(&addresses);
    });
    {
        let mut views = mesh.views.borrow_mut();
        views[0].around.uplink = (uplink.name.clone(), uplink.index);
        views[0].around.addresses = addresses;
        // Until the filter follows, it does not see what comes in there as from an own pod.
        views[0].hurt = true;
        // What the peer sends to the old address may be lost: the new one is not in its hands yet.
        views[1].flows.remove(&0);
    }
    mesh.members[0].uplink = uplink.clone();
    if let Some(process) = &mut mesh.members[0].process {
        process.reconciler.node.uplinked(uplink);
    }
    mesh.turn(0);
}

/// Runs a change on a fresh mesh, with one operation of node 0 failing; returns how many operations it took.
fn run(title: &str, families: Families, mode: EncapMode, change: Change, fault: Option<(usize, Fault)>) -> usize {
    let mut mesh = Mesh::new(&format!("{title}, {families:?}, {mode:?}, {fault:?}"), families);
    for x in 0..3 {
        mesh.add();
        mesh.members[x].settings.encap.mode = mode;
    }
    mesh.start(0);
    mesh.start(1);
    mesh.run(Duration::from_secs(2));
    let looks = look_closely(&mesh);
    mesh.members[0].kernel.with(|machine| {
        let next = machine.log.len();
        machine.faults.extend(fault.map(|(at, how)| (next + at, how)));
    });
    change(&mut mesh);
    mesh.run(Duration::from_secs(8));
    let took = looks.get();
    assert!(took > 0, "{title}: nothing happened");
    mesh.settle();
    took
}

#[test]
fn every_prefix_of_every_change_is_safe_and_nothing_is_cut() {
    for families in Families::ALL {
        for (title, change) in CHANGES {
            let took = run(title, families, EncapMode::Esp, change, None);
            println!("{families:?}: {title}: safe after each of {took} operations");
        }
    }
}

#[test]
fn every_prefix_is_safe_whichever_operation_fails_in_whichever_way() {
    let mut runs = 0;
    // A generation that has an SA a carrier is half made where one of the two fails.
    for (families, mode) in [(Families::Both, EncapMode::Esp), (Families::V4, EncapMode::Auto)] {
        for (title, change) in CHANGES {
            let took = run(title, families, mode, change, None);
            for at in 0..took {
                for how in Fault::ALL {
                    run(title, families, mode, change, Some((at, how)));
                    runs += 1;
                }
            }
        }
    }
    println!("{runs} runs with one failure each");
}

/// Whether the local policies are all there: made one by one, over a block that a start without a lease put there first.
fn complete(objects: &Objects) -> bool {
    let count = |guard: Guard| {
        objects
            .keys()
            .filter(|key| matches!(key, Key::Guard(held, _) if *held == guard))
            .count()
    };
    count(Guard::Local) >= count(Guard::Block)
}

/// A node that starts with nothing there: `order` is that of its inputs; empty where all are there at once.
fn cold(families: Families, order: &[&str], fault: Option<(usize, Fault)>) -> usize {
    let mut mesh = Mesh::new(&format!("cold start, {order:?}, {families:?}, {fault:?}"), families);
    mesh.add();
    mesh.add();
    mesh.start(1);
    let looks = Rc::new(Cell::new(0));
    let (counted, views) = (looks.clone(), mesh.views.clone());
    let machine = mesh.members[0].kernel.clone();
    let at_once = order.is_empty();
    mesh.members[0].kernel.watch(move |op| {
        counted.set(counted.get() + 1);
        let views = views.borrow();
        let around = &views[0].around;
        let peers: Vec<_> = views[1].around.own.iter().collect();
        machine.look(|machine| {
            let objects = &machine.objects;
            let guarded: Vec<_> = peers
                .iter()
                .chain(&nobody())
                .copied()
                .collect::<Vec<_>>()
                .into_iter()
                .filter(|net| {
                    objects.contains_key(&Key::Firewall)
                        || objects
                            .keys()
                            .any(|key| matches!(key, Key::GuardRoute(whole) if whole.contains(net)))
                })
                .collect();
            // The way out is shut from the first object of the guard on, whichever that is.
            let mut found = leaks(machine.scene(), around, Layers::ALL, &guarded, &[], Leak::OUT);
            if objects.contains_key(&Key::Firewall) {
                // The filter comes before all else, and by itself shuts the way in.
                found.extend(leaks(
                    machine.scene(),
                    around,
                    Layers::ALL,
                    &peers,
                    &nobody(),
                    Leak::ALL,
                ));
            }
            // Before there is a lease there is no own pod; where it comes first of all, none is ever cut off.
            if at_once || objects.keys().any(|key| matches!(key, Key::Guard(Guard::Local, _))) && complete(objects) {
                found.extend(cuts(machine.scene(), around));
            }
            assert!(found.is_empty(), "after {}: {found:?}", sim::text::op(op));
        });
    });
    mesh.members[0].kernel.with(|machine| machine.faults.extend(fault));
    if at_once {
        mesh.start(0);
    } else {
        mesh.boot_with(0, order);
    }
    mesh.settle();
    looks.get()
}

#[test]
fn a_cold_start_is_safe_from_its_first_guard_on_in_each_order_of_inputs() {
    let orders = [
        ["uplink", "psk", "lease", "roster"],
        ["lease", "uplink", "roster", "psk"],
        ["roster", "lease", "psk", "uplink"],
        ["psk", "roster", "lease", "uplink"],
        ["lease", "roster", "uplink", "psk"],
        ["uplink", "lease", "psk", "roster"],
        ["roster", "uplink", "lease", "psk"],
    ];
    for families in Families::ALL {
        let took = cold(families, &[], None);
        println!("{families:?}, all at once: safe after each of {took} operations");
        for order in orders {
            let took = cold(families, &order, None);
            println!("{families:?}, {order:?}: safe after each of {took} operations");
        }
    }
}

#[test]
fn a_cold_start_is_safe_whichever_operation_fails() {
    let order = ["uplink", "psk", "lease", "roster"];
    let took = cold(Families::Both, &order, None);
    for at in 0..took {
        for how in Fault::ALL {
            cold(Families::Both, &order, Some((at, how)));
        }
    }
}

/// Breaks everything in the reverse order of making, as cleanup does.
fn clean(kernel: &SimKernel) -> Vec<Op> {
    let ops: Vec<Op> = kernel.look(|machine| machine.objects.keys().rev().cloned().map(Op::Break).collect());
    for op in &ops {
        let kind = op.key().kind();
        kernel
            .clone()
            .apply(
                kind,
                &mut [Write {
                    op: op.clone(),
                    secret: None,
                }],
            )
            .pop()
            .expect("one result")
            .expect("done");
    }
    ops
}

#[test]
fn cleanup_opens_the_way_out_with_its_last_objects_only() {
    for families in Families::ALL {
        let mut mesh = Mesh::settled(&format!("cleanup, {families:?}"), families, 2);
        mesh.stop(0);
        let around = mesh.views.borrow()[0].around.clone();
        mesh.views.borrow_mut()[0].guarded = false;
        let peers: Vec<_> = mesh.views.borrow()[1].around.own.iter().collect();
        let machine = mesh.members[0].kernel.clone();
        mesh.members[0].kernel.watch(move |op| {
            machine.look(|machine| {
                let objects = &machine.objects;
                if objects.contains_key(&Key::Firewall) {
                    let found = leaks(machine.scene(), &around, Layers::ALL, &peers, &nobody(), Leak::ALL);
                    assert!(found.is_empty(), "after {}: {found:?}", sim::text::op(op));
                }
                let shut = |net: &ipnet::IpNet| {
                    let whole = |key: &Key| matches!(key, Key::GuardRoute(whole) if whole.contains(net));
                    objects.keys().any(whole)
                };
                let guarded: Vec<_> = peers.iter().copied().chain(nobody()).filter(shut).collect();
                let found = leaks(machine.scene(), &around, Layers::ALL, &guarded, &[], Leak::OUT);
                assert!(found.is_empty(), "after {}: {found:?}", sim::text::op(op));
                // Pods reach their node all the while.
                let found = cuts(machine.scene(), &around);
                assert!(found.is_empty(), "after {}: {found:?}", sim::text::op(op));
            });
        });
        let ops = clean(&mesh.members[0].kernel);
        assert_eq!(ops.last().map(|op| op.key().kind()), Some(Kind::GuardRoute));
        assert!(mesh.members[0].kernel.look(|machine| machine.objects.is_empty()));
    }
}

#[test]
fn a_flush_of_one_kind_by_hand_opens_nothing_and_is_mended_in_one_turn() {
    for families in Families::ALL {
        for kind in [
            Kind::Policy,
            Kind::Guard,
            Kind::Route,
            Kind::GuardRoute,
            Kind::Link,
            Kind::Address,
            Kind::Firewall,
            Kind::Sa,
        ] {
            let mut mesh = Mesh::settled(&format!("flush of {kind:?}, {families:?}"), families, 2);
            let around = mesh.views.borrow()[0].around.clone();
            let peers: Vec<_> = mesh.views.borrow()[1].around.own.iter().collect();
            mesh.hurt(0, |kernel| {
                let keys: Vec<Key> =
                    kernel.look(|machine| machine.objects.keys().filter(|k| k.kind() == kind).cloned().collect());
                for key in keys {
                    kernel.remove_by_hand(&key);
                }
                kernel.with(|machine| machine.notices.push(Event::Overrun));
            });
            let ways = if kind == Kind::Firewall {
                Leak::WITHOUT_FILTER
            } else {
                Leak::ALL
            };
            let found = mesh.members[0]
                .kernel
                .look(|machine| leaks(machine.scene(), &around, Layers::ALL, &peers, &nobody(), ways));
            assert!(found.is_empty(), "{kind:?}: {found:?}");
            mesh.turn(0);
            let process = mesh.members[0].process.as_ref().expect("it runs");
            assert_eq!(process.reconciler.failures().count(), 0);
            mesh.settle();
        }
    }
}
