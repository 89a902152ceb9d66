//! Peers in plaintext beside encrypted ones, where `AllowPlaintextPeers` is on: what the node wants of its kernel for each.

mod sim;

use std::sync::Arc;
use std::time::Duration;

use keys::{Epoch, EpochSecret};
use ring::rand::SystemRandom;
use ringmail::backend::{Plain, vxlan};
use ringmail::kernel::device::DeviceKind;
use ringmail::kernel::firewall::Rule;
use ringmail::kernel::{Key, Object, Objects, Scope, priority};
use ringmail::lease::{BackendData, Lease, NodeName};
use ringmail::node::report::State;
use ringmail::node::{Node, Settings};
use ringmail::uplink::LinkRoute;
use serde_json::json;
use sim::make::{self, Families};

const ALLOWED: Plain = Plain::Vxlan(vxlan::Settings {
    vni: 1,
    port: vxlan::PORT,
    outer_mtu: None,
    gbp: false,
    learning: false,
    direct: false,
});

fn settings(number: u32, allowed: bool) -> Settings {
    Settings {
        plaintext: allowed.then_some(ALLOWED),
        ..make::settings(&format!("node{number}"), make::network(Families::V4))
    }
}

/// Node `number` in its first epoch.
fn node(number: u32, allowed: bool) -> Node {
    let network = make::network(Families::V4);
    let mut node = Node::new(settings(number, allowed), &Objects::new());
    node.uplinked(make::uplink(Families::V4, u8::try_from(number).expect("small")));
    node.keyed(vec![make::psk(1, &network)], Duration::ZERO);
    node.holds(make::subnets(&network, number), make::slot(number));
    let secret = EpochSecret::generate(&SystemRandom::new()).expect("random numbers");
    node.begin_epoch(Epoch(u64::from(number)), secret, Duration::ZERO, 0.0);
    node
}

/// A lease as flannel publishes it, of the subnet of node `number`, under a name.
fn flannels(name: &str, number: u32) -> Arc<Lease> {
    Arc::new(Lease {
        node: make::name(name),
        subnets: make::subnets(&make::network(Families::V4), number),
        public: make::uplink(Families::V4, u8::try_from(number).expect("small")).public,
        backend: "vxlan".into(),
        data: json!({"VNI": 1, "VtepMAC": format!("02:00:00:00:04:{number:02x}")}).into(),
        v6_data: BackendData::NULL,
    })
}

fn hear(node: &mut Node, lease: &Lease) {
    node.leased(&lease.node, Some(&Arc::new(lease.clone())), Duration::ZERO);
}

fn wants(node: &Node, peer: &NodeName) -> Objects {
    node.desired(&Scope::Peer(peer.clone()))
}

/// How many policies let a peer's packets pass in plaintext, and how many take them with and without a tunnel.
fn open(objects: &Objects) -> (usize, usize) {
    let policies = || {
        objects.values().filter_map(|object| match object {
            Object::Policy(policy) => Some(policy),
            _ => None,
        })
    };
    let without = policies().filter(|policy| policy.template.is_none());
    assert!(without.clone().all(|policy| policy.priority == priority::PLAINTEXT));
    let both = policies().filter(|policy| policy.template.is_some_and(|template| template.optional));
    (without.count(), both.count())
}

fn links(objects: &Objects) -> Vec<String> {
    let link = |object: &Object| match object {
        Object::Route(route) => Some(route.link.clone()),
        _ => None,
    };
    objects.values().filter_map(link).collect()
}

fn state(node: &Node, peer: &NodeName) -> State {
    let report = node.report(&Default::default(), Duration::ZERO);
    let found = report.peers.iter().find(|found| found.node == peer.as_str());
    found.expect("it is known").state
}

#[test]
fn a_peer_without_a_statement_is_served_in_plaintext_only_while_that_is_allowed() {
    let peer = flannels("node2", 2);
    let mut strict = node(1, false);
    hear(&mut strict, &peer);
    assert!(wants(&strict, &peer.node).is_empty());
    assert_eq!(state(&strict, &peer.node), State::Refused);
    assert!(strict.report(&Default::default(), Duration::ZERO).problems.is_empty());

    // It is allowed, and no longer, without a restart.
    assert!(strict.configure(settings(1, true)), "the leases are to be told anew");
    hear(&mut strict, &peer);
    let objects = wants(&strict, &peer.node);
    assert_eq!(open(&objects), (3, 0), "in, fwd and out");
    assert_eq!(links(&objects), ["flannel.1"]);
    assert_eq!(state(&strict, &peer.node), State::Plain);
    assert!(
        strict
            .desired(&Scope::Node)
            .contains_key(&Key::Link("flannel.1".into()))
    );
    let problems = strict.report(&Default::default(), Duration::ZERO).problems;
    assert!(
        problems[0].starts_with("1 of 1 peers in PLAINTEXT, as AllowPlaintextPeers allows: node2;"),
        "{problems:?}"
    );
    strict.take_dirty();
    assert!(strict.configure(settings(1, false)));
    assert!(
        strict.take_dirty().contains(&Scope::Peer(peer.node.clone())),
        "it is looked at again"
    );
    assert!(wants(&strict, &peer.node).is_empty());
    assert!(
        !strict
            .desired(&Scope::Node)
            .contains_key(&Key::Link("flannel.1".into()))
    );
    hear(&mut strict, &peer);
    assert_eq!(state(&strict, &peer.node), State::Refused);
}

#[test]
fn a_node_shows_itself_to_both_kinds_and_is_believed_by_its_statement() {
    let (allows, strict) = (node(2, true), node(3, false));
    let shown = allows.lease().expect("it has one");
    assert_eq!(shown.backend, "vxlan");
    let data = shown.data.value();
    assert_eq!(data["VNI"], 1);
    assert!(data["VtepMAC"].is_string() && data["Statement"].is_string() && data["Tags"].is_array());
    assert_eq!(strict.lease().expect("it has one").backend, "ipsec");
    // One that does not allow plaintext takes the statement, and nothing else of it.
    let mut other = node(1, false);
    hear(&mut other, &shown);
    assert_eq!(open(&wants(&other, &shown.node)), (0, 0));
    assert_eq!(links(&wants(&other, &shown.node)), ["ringmail0"]);
}

#[test]
fn a_pair_that_can_do_both_sends_plaintext_until_it_is_encrypted_and_one_that_is_strict_never_does() {
    let mut node1 = node(1, true);
    let (both, strict) = (
        node(2, true).lease().expect("a lease"),
        node(3, false).lease().expect("a lease"),
    );
    hear(&mut node1, &both);
    hear(&mut node1, &strict);
    // No probe has come back yet: data goes as before, and what comes may be either.
    let objects = wants(&node1, &both.node);
    assert_eq!(open(&objects), (1, 2));
    assert_eq!(links(&objects), ["flannel.1"]);
    assert!(
        objects.keys().any(|key| matches!(key, Key::Sa(_))),
        "its SAs are there too"
    );
    assert_eq!(state(&node1, &both.node), State::Plain);
    assert_eq!(open(&wants(&node1, &strict.node)), (0, 0));
    assert_eq!(state(&node1, &strict.node), State::Waiting);
    // It goes back to vxlan.
    hear(&mut node1, &flannels("node2", 2));
    let objects = wants(&node1, &both.node);
    assert_eq!(open(&objects), (3, 0));
    assert!(!objects.keys().any(|key| matches!(key, Key::Sa(_))));
}

/// The node as it is, with another backend of before.
fn beside(number: u32, allowed: &Plain) -> Node {
    let mut node = node(number, true);
    let mut uplink = make::uplink(Families::V4, u8::try_from(number).expect("small"));
    uplink.routes = vec![LinkRoute {
        net: "192.0.2.0/24".parse().expect("a net"),
        direct: true,
    }];
    node.uplinked(uplink);
    node.configure(Settings {
        plaintext: Some(allowed.clone()),
        ..settings(number, true)
    });
    node
}

fn refuses(node: &Node) -> Vec<String> {
    let objects = node.desired(&Scope::Node);
    let Some(Object::Firewall(firewall)) = objects.get(&Key::Firewall) else {
        panic!("{objects:?}")
    };
    let refused = firewall.rules().into_iter().filter_map(|rule| match rule {
        Rule::Refuse(way, net) => Some(format!("{way:?} {net}")),
        Rule::Translate { .. } | Rule::Open(_) => None,
    });
    refused.collect()
}

#[test]
fn peers_of_another_vni_are_served_where_the_backend_of_before_is_given() {
    let Plain::Vxlan(usual) = ALLOWED else { unreachable!() };
    let allowed = Plain::Vxlan(vxlan::Settings {
        vni: 4096,
        port: 4789,
        ..usual
    });
    let mut node1 = beside(1, &allowed);
    let mut peer = Lease::clone(&flannels("node2", 2));
    hear(&mut node1, &peer);
    assert!(wants(&node1, &peer.node).is_empty(), "its VNI is 1");
    let report = node1.report(&Default::default(), Duration::ZERO);
    let reason = report.peers[0].reason.clone().unwrap_or_default();
    assert!(reason.starts_with("its VNI is 1, this node's 4096"), "{reason}");
    peer.data = json!({"VNI": 4096, "VtepMAC": "02:00:00:00:04:02"}).into();
    hear(&mut node1, &peer);
    assert_eq!(open(&wants(&node1, &peer.node)), (3, 0));
    assert_eq!(links(&wants(&node1, &peer.node)), ["flannel.4096"]);
    let objects = node1.desired(&Scope::Node);
    let Some(Object::Link(device)) = objects.get(&Key::Link("flannel.4096".into())) else {
        panic!("{objects:?}")
    };
    let DeviceKind::Vxlan(device) = &device.kind else {
        panic!("{device:?}")
    };
    assert_eq!((device.vni, device.port), (4096, 4789));
    assert_eq!(node1.lease().expect("it has one").data.value()["VNI"], 4096);
    assert_eq!(refuses(&node1), ["Arriving 10.244.0.0/16", "Leaving 10.244.0.0/16"]);
}

#[test]
fn peers_of_host_gw_are_routed_to_and_the_uplink_refuses_what_claims_the_own_subnet_alone() {
    let mut node1 = beside(1, &Plain::HostGw);
    let own = make::subnets(&make::network(Families::V4), 1);
    assert_eq!(
        refuses(&node1),
        [format!("Arriving {}", own.v4.expect("it is of IPv4"))]
    );
    let mut peer = Lease::clone(&flannels("node2", 2));
    (peer.backend, peer.data) = ("host-gw".into(), BackendData::NULL);
    hear(&mut node1, &peer);
    let objects = wants(&node1, &peer.node);
    assert_eq!((open(&objects), links(&objects)), ((3, 0), vec!["eth0".to_owned()]));
    assert_eq!(state(&node1, &peer.node), State::Plain);
    // One of vxlan is not, nor does anything else open.
    hear(&mut node1, &flannels("node3", 3));
    assert!(wants(&node1, &make::name("node3")).is_empty());
    // Both ways: a node that shows itself so is believed by its statement, and served as it is until it is confirmed.
    let both = beside(4, &Plain::HostGw).lease().expect("it has one");
    assert_eq!((both.backend.as_str(), both.v6_data.is_null()), ("host-gw", true));
    hear(&mut node1, &both);
    let objects = wants(&node1, &both.node);
    assert_eq!((open(&objects), links(&objects)), ((1, 2), vec!["eth0".to_owned()]));
    let mut strict = node(3, false);
    hear(&mut strict, &both);
    assert_eq!(links(&wants(&strict, &both.node)), ["ringmail0"]);
    // One that is not on the link can't be reached so, and is named.
    peer.public = ["198.51.100.9".parse().expect("an address")].into_iter().collect();
    hear(&mut node1, &peer);
    assert!(wants(&node1, &peer.node).is_empty());
    assert_eq!(state(&node1, &peer.node), State::Refused);
    // Taken out, the uplink refuses all of it again.
    node1.configure(settings(1, false));
    assert_eq!(refuses(&node1), ["Arriving 10.244.0.0/16", "Leaving 10.244.0.0/16"]);
}

#[test]
fn what_is_proved_goes_before_what_a_lease_only_says() {
    let mut node1 = node(1, true);
    let (forged, real) = (flannels("thief", 2), node(2, true).lease().expect("a lease"));
    hear(&mut node1, &forged);
    assert_eq!(open(&wants(&node1, &forged.node)), (3, 0));
    node1.take_dirty();
    hear(&mut node1, &real);
    assert!(node1.take_dirty().contains(&Scope::Peer(forged.node.clone())));
    assert!(wants(&node1, &forged.node).is_empty(), "the subnet is another's");
    assert_eq!(
        links(&wants(&node1, &real.node)),
        ["ringmail0"],
        "and it is sent nothing in plaintext for now"
    );
    // Its lease vanishes while it is served; once it is let go, the subnet is free.
    node1.leased(&real.node, None, Duration::ZERO);
    assert!(wants(&node1, &forged.node).is_empty());
    node1.take_dirty();
    node1.tick(Duration::from_secs(60), &mut || 0.5);
    assert!(node1.take_dirty().contains(&Scope::Peer(forged.node.clone())));
    assert_eq!(open(&wants(&node1, &forged.node)), (3, 0));
    // A statement that is not believed is no lack of one.
    let mut contradicted = node(4, true).lease().expect("a lease");
    contradicted.public = make::uplink(Families::V4, 44).public;
    hear(&mut node1, &contradicted);
    assert_eq!(state(&node1, &contradicted.node), State::Refused);
    assert!(wants(&node1, &contradicted.node).is_empty());
    // The own subnet, one of no slot, one that is too large.
    for (number, subnets) in [(1, None), (9, Some("10.99.0.0/24")), (9, Some("10.244.32.0/20"))] {
        let mut lease = Lease::clone(&flannels("odd", number));
        if let Some(net) = subnets {
            lease.subnets = [net.parse().expect("a net")].into_iter().collect();
        }
        hear(&mut node1, &lease);
        assert!(wants(&node1, &lease.node).is_empty(), "{}", lease.subnets);
    }
}
