//! The unencrypted backends in the pure half: golden plans of every backend and family, and what leases that share or
//! contradict one another come to.
//!
//! `RINGMAIL_GOLDEN=write cargo test --test plain` rewrites `tests/plan/plain-*.txt`; review reads the difference.

mod sim;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use ringmail::backend::{Plain, ipip, udp, vxlan};
use ringmail::kernel::{Key, Objects, Scope};
use ringmail::lease::{BackendData, Completeness, Lease};
use ringmail::node::{Node, Settings};
use ringmail::reconcile::Reconciler;
use ringmail::uplink::LinkRoute;
use serde_json::{Value, json};
use sim::kernel::{SimKernel, Spent};
use sim::make::{self, Families};

const VXLAN: vxlan::Settings = vxlan::Settings {
    vni: 1,
    port: vxlan::PORT,
    outer_mtu: None,
    gbp: false,
    learning: false,
    direct: false,
};

fn backends() -> Vec<(&'static str, Plain)> {
    vec![
        ("vxlan", Plain::Vxlan(VXLAN)),
        (
            "vxlan-direct",
            Plain::Vxlan(vxlan::Settings {
                vni: 42,
                port: 4789,
                outer_mtu: Some(9000),
                gbp: true,
                learning: true,
                direct: true,
            }),
        ),
        ("host-gw", Plain::HostGw),
        ("ipip", Plain::Ipip(ipip::Settings { direct: false })),
        ("ipip-direct", Plain::Ipip(ipip::Settings { direct: true })),
        ("udp", Plain::Udp(udp::Settings { port: 8285 })),
        ("alloc", Plain::Alloc),
    ]
}

fn settings(families: Families, plain: Plain) -> Settings {
    Settings {
        plain: Some(plain),
        ..make::settings("node1", make::network(families))
    }
}

/// node1 on a link with 192.0.2.0/25 and 2001:db8::/64, its subnets held.
fn node(families: Families, plain: Plain, left: &Objects) -> Node {
    let mut node = Node::new(settings(families, plain), left);
    let mut uplink = make::uplink(families, 1);
    uplink.routes = ["2001:db8::/64", "192.0.2.0/25"]
        .iter()
        .map(|net| LinkRoute {
            net: net.parse::<IpNet>().expect("a net"),
            direct: true,
        })
        .collect();
    node.uplinked(uplink);
    node.holds(make::subnets(&make::network(families), 1), make::slot(1));
    node
}

/// The lease of node `number`, as its own daemon or flannel's publishes it, at 192.0.2.`last`.
fn lease(families: Families, plain: &Plain, number: u32, last: u8) -> Arc<Lease> {
    let subnets = make::subnets(&make::network(families), number);
    let data = |family: u32| match plain {
        Plain::Vxlan(settings) => {
            json!({"VNI": settings.vni, "VtepMAC": format!("02:00:00:00:{family:02x}:{number:02x}")})
        }
        _ => Value::Null,
    };
    Arc::new(Lease {
        node: make::name(&format!("node{number}")),
        subnets,
        public: make::uplink(families, last).public,
        backend: plain.lease_type().into(),
        data: if subnets.v4.is_some() {
            data(4).into()
        } else {
            BackendData::NULL
        },
        v6_data: if subnets.v6.is_some() {
            data(6).into()
        } else {
            BackendData::NULL
        },
    })
}

fn hear(node: &mut Node, lease: &Arc<Lease>) {
    node.leased(&lease.node, Some(lease), Duration::ZERO);
}

fn golden(name: &str, written: &str) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/plan")
        .join(format!("plain-{name}.txt"));
    if std::env::var_os("RINGMAIL_GOLDEN").is_some_and(|value| value == "write") {
        std::fs::write(&path, written).expect("the folder is there");
        return;
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    assert_eq!(expected, written, "plain-{name}.txt; RINGMAIL_GOLDEN=write rewrites it");
}

#[test]
fn every_backend_and_family_wants_what_its_golden_plan_says() {
    for (name, plain) in backends() {
        let mut text = String::new();
        for families in Families::ALL {
            let mut node = node(families, plain.clone(), &Objects::new());
            // On the link; behind a router; of another backend.
            hear(&mut node, &lease(families, &plain, 2, 2));
            hear(&mut node, &lease(families, &plain, 3, 203));
            let stranger = Lease {
                backend: "wireguard".into(),
                ..Lease::clone(&lease(families, &plain, 4, 4))
            };
            hear(&mut node, &Arc::new(stranger));
            text += &format!(
                "==== {families:?}, MTU {} ====\n",
                node.mtu().expect("there is an uplink")
            );
            let own = node.lease().expect("it has one");
            text += &format!(
                "publishes {:?} {} {}\n",
                own.backend,
                own.data.value(),
                own.v6_data.value()
            );
            text += &format!("-- node\n{}", sim::text::objects(&node.desired(&Scope::Node)));
            for number in [2, 3, 4] {
                let peer = make::name(&format!("node{number}"));
                let wants = sim::text::objects(&node.desired(&Scope::Peer(peer.clone())));
                text += &format!("-- {peer}\n{wants}");
            }
            for peer in node.report(&BTreeMap::new(), Duration::ZERO).peers {
                let reason = peer.reason.unwrap_or_default();
                text += &format!(
                    "{} {:?} {} {reason}\n",
                    peer.node,
                    peer.state,
                    peer.encap.unwrap_or_default()
                );
            }
            text.push('\n');
        }
        golden(name, &text);
    }
}

/// A reconciler of node1 on a kernel that is a map, brought in order.
fn running(plain: &Plain, leases: &[Arc<Lease>]) -> Reconciler<SimKernel> {
    let plain = plain.clone();
    let kernel = SimKernel::new("node1", &Spent::default());
    let mut reconciler = Reconciler::new(kernel, |left| node(Families::V4, plain, left)).expect("a map is read");
    for lease in leases {
        hear(&mut reconciler.node, lease);
    }
    reconciler.completed(Completeness::Complete);
    reconciler.pass(Duration::from_secs(1));
    reconciler
}

/// What the reconciler takes the kernel to hold.
fn held(reconciler: &Reconciler<SimKernel>) -> Objects {
    let held = reconciler.actual().map(|(key, object)| (key.clone(), object.clone()));
    held.collect()
}

fn in_order(reconciler: &Reconciler<SimKernel>) -> bool {
    held(reconciler) == reconciler.desired()
}

#[test]
fn an_entry_that_two_leases_share_stays_when_one_of_them_goes() {
    let plain = Plain::Vxlan(VXLAN);
    // A node that came back with another subnet, before its old lease has run out.
    let old = lease(Families::V4, &plain, 2, 2);
    let new = Lease {
        node: make::name("node2~again"),
        subnets: make::subnets(&make::network(Families::V4), 7),
        ..Lease::clone(&old)
    };
    for first in [&old.node, &new.node] {
        let mut reconciler = running(&plain, &[old.clone(), Arc::new(new.clone())]);
        assert!(in_order(&reconciler));
        let entries = |reconciler: &Reconciler<SimKernel>| {
            let fdb = |key: &&Key| matches!(key, Key::Fdb(..));
            held(reconciler).keys().filter(fdb).count()
        };
        assert_eq!(entries(&reconciler), 1);
        reconciler.node.leased(first, None, Duration::from_secs(2));
        reconciler.pass(Duration::from_secs(2));
        assert!(
            in_order(&reconciler),
            "{first} left: {}",
            sim::text::objects(&held(&reconciler))
        );
        assert_eq!(entries(&reconciler), 1);
    }
}

#[test]
fn a_subnet_that_moves_to_another_node_in_one_pass_stays_routed() {
    // The new holder's turn comes before the old one's, and after it.
    let cases = backends()
        .into_iter()
        .flat_map(|case| ["another", "zeta"].map(|to| (case.clone(), to)));
    for ((name, plain), to) in cases {
        let old = lease(Families::V4, &plain, 2, 2);
        let mut reconciler = running(&plain, std::slice::from_ref(&old));
        let new = Arc::new(Lease {
            node: make::name(to),
            subnets: old.subnets,
            ..Lease::clone(&lease(Families::V4, &plain, 3, 3))
        });
        reconciler.node.leased(&old.node, None, Duration::from_secs(2));
        hear(&mut reconciler.node, &new);
        reconciler.pass(Duration::from_secs(2));
        assert!(in_order(&reconciler), "{name} to {to}");
        let routed = |key: &&Key| matches!(key, Key::Route(_));
        assert_eq!(
            held(&reconciler).keys().filter(routed).count(),
            usize::from(plain != Plain::Alloc),
            "{name} to {to}"
        );
    }
}

#[test]
fn a_lease_that_says_a_type_which_flannel_leaves_out_means_it() {
    let plain = Plain::Udp(udp::Settings { port: 8285 });
    let said = Arc::new(Lease {
        backend: "udp".into(),
        ..Lease::clone(&lease(Families::V4, &plain, 2, 2))
    });
    let reconciler = running(&plain, &[said]);
    assert!(held(&reconciler).keys().any(|key| matches!(key, Key::Route(_))));
}

#[test]
fn a_subnet_that_two_nodes_claim_is_served_to_neither() {
    let plain = Plain::HostGw;
    let one = lease(Families::V4, &plain, 2, 2);
    let two = Arc::new(Lease {
        node: make::name("node9"),
        ..Lease::clone(&lease(Families::V4, &plain, 2, 9))
    });
    let own = Arc::new(Lease {
        node: make::name("thief"),
        ..Lease::clone(&lease(Families::V4, &plain, 1, 8))
    });
    let reconciler = running(&plain, &[one, two, own]);
    assert!(!held(&reconciler).keys().any(|key| matches!(key, Key::Route(_))));
    let peers = reconciler.node.report(&BTreeMap::new(), Duration::ZERO).peers;
    let reasons: Vec<String> = peers.into_iter().filter_map(|peer| peer.reason).collect();
    assert!(
        reasons.iter().all(|reason| reason.contains("is also leased to")),
        "{reasons:?}"
    );
    assert_eq!(reasons.len(), 3);
}

#[test]
fn a_change_of_backend_leaves_nothing_of_the_old_and_makes_before_it_breaks() {
    let all = backends();
    for (from, before) in &all {
        for (to, after) in &all {
            let mut reconciler = running(before, &[lease(Families::V4, before, 2, 2)]);
            assert!(
                !reconciler.node.configure(settings(Families::V4, after.clone())),
                "both are unencrypted"
            );
            hear(&mut reconciler.node, &lease(Families::V4, after, 2, 2));
            reconciler.pass(Duration::from_secs(2));
            assert!(in_order(&reconciler), "{from} to {to}");
            let fresh = running(after, &[lease(Families::V4, after, 2, 2)]);
            let macs_aside = |objects: &Objects| {
                let links = |key: &&Key| !matches!(key, Key::Link(_));
                objects.keys().filter(links).cloned().collect::<Vec<_>>()
            };
            assert_eq!(
                macs_aside(&held(&reconciler)),
                macs_aside(&held(&fresh)),
                "{from} to {to}"
            );
        }
    }
}

#[test]
fn encryption_ends_what_was_open_at_once_and_the_guard_stands_first() {
    for (name, plain) in backends() {
        let mut reconciler = running(&plain, &[lease(Families::V4, &plain, 2, 2)]);
        let sealed = make::settings("node1", make::network(Families::V4));
        assert!(reconciler.node.configure(sealed), "every lease is to be told anew");
        reconciler.pass(Duration::from_secs(2));
        let actual = &held(&reconciler);
        let guard = |key: &Key| matches!(key, Key::GuardRoute(_) | Key::Guard(..));
        assert!(actual.keys().any(guard), "{name}: {}", sim::text::objects(actual));
        let open = |key: &&Key| match key {
            Key::Route(_) | Key::Neighbour(..) | Key::Fdb(..) => true,
            Key::Link(link) => link != "ringmail0",
            _ => false,
        };
        assert_eq!(
            actual.keys().filter(open).collect::<Vec<_>>(),
            Vec::<&Key>::new(),
            "{name}"
        );
    }
}

#[test]
fn a_mac_is_the_nodes_own_and_one_that_was_there_is_kept() {
    let plain = Plain::Vxlan(VXLAN);
    let of = |node: &Node| node.lease().expect("it has one").data.value();
    let fresh = node(Families::V4, plain.clone(), &Objects::new());
    assert_eq!(
        of(&fresh),
        of(&node(Families::V4, plain.clone(), &Objects::new())),
        "after a reboot too"
    );
    let mut left = fresh.desired(&Scope::Node);
    for object in left.values_mut() {
        if let ringmail::kernel::Object::Link(device) = object
            && let ringmail::kernel::device::DeviceKind::Vxlan(vxlan) = &mut device.kind
        {
            vxlan.mac = "0a:00:00:00:00:77".parse().expect("an address");
        }
    }
    let taken = node(Families::V4, plain.clone(), &left);
    assert_eq!(of(&taken)["VtepMAC"], "0a:00:00:00:00:77");
    let mut told = node(Families::V4, plain.clone(), &Objects::new());
    told.remembers(&lease(Families::V4, &plain, 1, 1));
    assert_eq!(of(&told)["VtepMAC"], "02:00:00:00:04:01", "what the peers know of it");
}
