//! The audit of a node with two peers, whole and with each piece broken.

use std::net::IpAddr;

use keys::{Cipher, Epoch};
use proptest::prelude::*;
use xfrm::{Action, Direction, Selector};

use super::*;
use crate::backend::ipsec::{self, LINK, NodeFacts, Path, PeerFacts, Through};
use crate::epochs::Generation;
use crate::kernel::Kind;
use crate::lease::{Network, Range};

pub(crate) fn network() -> Network {
    Network {
        v4: Some(Range {
            net: "10.244.0.0/16".parse().unwrap(),
            subnet_len: 24,
            first: 1,
            last: 255,
        }),
        v6: Some(Range {
            net: "fd00:244::/48".parse().unwrap(),
            subnet_len: 64,
            first: 1,
            last: 255,
        }),
    }
}

fn subnets(number: u8) -> Subnets {
    Subnets {
        v4: Some(format!("10.244.{number}.0/24").parse().unwrap()),
        v6: Some(format!("fd00:244:0:{number}::/64").parse().unwrap()),
    }
}

fn slot(number: u32) -> Slot {
    Slot::new(number).unwrap()
}

fn generation(sender: u64, receiver: u64) -> Generation {
    Generation {
        sender: Epoch(sender),
        receiver: Epoch(receiver),
    }
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A peer in slot `number` with data on (100, 200), an older generation draining and a newer one probed.
fn peer(number: u8) -> Objects {
    let path = Path {
        local: address("192.0.2.1"),
        remote: address(&format!("192.0.2.{number}")),
        udp: None,
    };
    let association = |direction, generation| ipsec::Association {
        generation,
        direction,
        cipher: Cipher::Aes128Gcm16,
        path,
        soft: ipsec::MOST,
    };
    let through = |generation| Through {
        src: path.local,
        dst: path.remote,
        spi: ipsec::spi(slot(1), generation, keys::Carrier::Esp).0,
    };
    ipsec::peer(&PeerFacts {
        own_slot: slot(1),
        own: subnets(1),
        slot: slot(number.into()),
        subnets: subnets(number),
        associations: vec![
            association(Direction::Out, generation(100, 200)),
            association(Direction::Out, generation(101, 200)),
            association(Direction::In, generation(200, 100)),
            association(Direction::In, generation(200, 101)),
        ],
        inherited: vec![],
        data: Some(through(generation(100, 200))),
        probes: vec![(keys::Carrier::Esp, through(generation(101, 200)))],
        path,
        mtu: None,
        directed: false,
    })
}

fn node() -> Objects {
    ipsec::node(&NodeFacts {
        network: network(),
        own: Some(subnets(1)),
        uplink: Some(("eth0".into(), 2)),
        mtu: 1446,
        masquerade: true,
        random_fully: true,
        advertisements: false,
        bare: false,
    })
}

/// What a node with the peers node-b and node-c wants.
pub(crate) fn desired() -> Objects {
    [node(), peer(2), peer(3)].into_iter().flatten().collect()
}

/// The same as a dump shows it: no process is seen behind an SA.
pub(crate) fn dumped(desired: &Objects) -> Objects {
    let mut actual = desired.clone();
    for object in actual.values_mut() {
        if let Object::Sa { born, .. } = object {
            *born = None;
        }
    }
    actual
}

pub(crate) fn directory() -> Directory {
    Directory {
        node: Some(NodeName::new("node-a").unwrap()),
        network: network().nets().collect(),
        own: subnets(1),
        uplink: Some(("eth0".into(), 2)),
        unencrypted: None,
        nodes: [(2, "node-b"), (3, "node-c")]
            .map(|(number, name)| (slot(number), NodeName::new(name).unwrap()))
            .into(),
    }
}

/// Whether the object keeps plaintext in or out by itself; a `Local` policy opens what stays on the node.
fn guards(key: &Key) -> bool {
    match key {
        Key::Firewall | Key::GuardRoute(_) | Key::Guard(Guard::Block, _) | Key::Link(_) => true,
        Key::Guard(Guard::Local, _)
        | Key::Sysctl(_)
        | Key::Address(..)
        | Key::HashThreshold(_)
        | Key::Sa(_)
        | Key::Policy(_)
        | Key::Neighbour(..)
        | Key::Fdb(..)
        | Key::Route(_) => false,
    }
}

#[test]
fn a_kernel_that_holds_what_is_wanted_is_in_order() {
    let desired = desired();
    let audit = audit(&desired, &dumped(&desired), &directory());
    assert_eq!(audit.plaintext, Vec::<String>::new());
    assert_eq!(audit.differences, vec![]);
    assert!(audit.ok);
    assert_eq!(audit.associations.len(), 8);
    assert_eq!(audit.objects.values().sum::<usize>(), desired.len());
}

#[test]
fn each_guard_that_is_missing_is_a_way_for_plaintext_whatever_the_plan_says() {
    let whole = desired();
    let guards: Vec<&Key> = whole.keys().filter(|key| guards(key)).collect();
    assert_eq!(guards.len(), 1 + 2 + 6 + 1, "firewall, routes, block, device");
    for key in guards {
        // The plan is as wrong as the kernel, so that only the kernel can tell.
        let mut broken = whole.clone();
        broken.remove(key);
        let audit = audit(&broken, &dumped(&broken), &directory());
        assert_eq!(audit.differences, vec![], "{key}");
        assert_eq!(audit.plaintext.len(), 1, "{key}: {:?}", audit.plaintext);
        assert!(!audit.ok);
    }
}

#[test]
fn a_guard_that_lets_pass_is_none() {
    let whole = desired();
    for key in whole.keys().filter(|key| matches!(key, Key::Guard(Guard::Block, _))) {
        let mut broken = whole.clone();
        let Some(Object::Policy(policy)) = broken.get_mut(key) else {
            panic!("{key}")
        };
        policy.action = Action::Allow;
        let audit = audit(&broken, &broken, &directory());
        assert_eq!(
            audit.plaintext.len(),
            2,
            "it neither blocks nor may it allow: {:?}",
            audit.plaintext
        );
    }
}

#[test]
fn what_opens_a_way_is_named() {
    let whole = desired();
    let ways = |change: &dyn Fn(&mut Objects)| {
        let mut broken = whole.clone();
        change(&mut broken);
        audit(&broken, &broken, &directory()).plaintext
    };
    let policy = |selector: Selector| xfrm::PolicyId {
        direction: Direction::Out,
        selector,
    };
    let open = policy(Selector::between(
        "0.0.0.0/0".parse().unwrap(),
        "10.244.2.0/24".parse().unwrap(),
    ));
    let bypass = ways(&|objects| {
        let Some(Object::Policy(policy)) = objects.get_mut(&Key::Policy(open)) else {
            panic!("peer's policy")
        };
        policy.template = None;
    });
    assert_eq!(bypass.len(), 1);
    assert!(bypass[0].contains("lets packets pass without a tunnel"), "{bypass:?}");
    let wide = ways(&|objects| {
        let local = xfrm::Policy {
            id: policy(Selector::between(
                "0.0.0.0/0".parse().unwrap(),
                "10.244.0.0/16".parse().unwrap(),
            )),
            priority: Guard::Local.priority(),
            action: Action::Allow,
            template: None,
        };
        objects.insert(Key::Guard(Guard::Local, local.id), Object::Policy(Box::new(local)));
    });
    assert_eq!(wide.len(), 1, "a local policy wider than the own subnet: {wide:?}");
    let astray = ways(&|objects| {
        let key = Key::Route("10.244.2.0/24".parse().unwrap());
        let Some(Object::Route(route)) = objects.get_mut(&key) else {
            panic!("peer's route")
        };
        route.link = "eth0".into();
    });
    assert!(
        astray[0].contains(&format!("goes to eth0 instead of {LINK}")),
        "{astray:?}"
    );
    let clear = ways(&|objects| {
        let sa = objects.values_mut().find_map(|object| match object {
            Object::Sa { sa, .. } => Some(sa),
            _ => None,
        });
        // RFC 4543: authenticates and does not encrypt.
        sa.expect("an SA").algorithm.name = "rfc4543(gcm(aes))".into();
    });
    assert!(clear[0].contains("rfc4543(gcm(aes))"), "{clear:?}");
}

#[test]
fn an_sa_is_explained_by_both_sides_and_its_use() {
    let desired = desired();
    let mut actual = dumped(&desired);
    let explained = |audit: &Audit, use_: Use| {
        let found = audit.associations.iter().filter(|sa| sa.usage == use_).cloned();
        found.collect::<Vec<_>>()
    };
    let whole = audit(&desired, &actual, &directory());
    let sending = &explained(&whole, Use::Sending)[0];
    assert_eq!(
        (sending.sender.as_str(), sending.receiver.as_str()),
        ("node-a", "node-b")
    );
    assert_eq!(
        (sending.sender_epoch_mod64, sending.receiver_epoch_mod64),
        (Some(36), Some(8))
    );
    assert_eq!(sending.generation.as_deref(), Some("100>200"));
    assert_eq!((sending.direction.as_str(), sending.encap.as_str()), ("out", "esp"));
    let receiving = &explained(&whole, Use::Receiving)[0];
    assert_eq!(
        (receiving.sender.as_str(), receiving.receiver.as_str()),
        ("node-b", "node-a")
    );
    assert_eq!(receiving.generation.as_deref(), Some("200>101"));
    assert_eq!(
        explained(&whole, Use::Draining)[0].generation.as_deref(),
        Some("200>100")
    );
    assert_eq!(explained(&whole, Use::Probing).len(), 2);
    // A stray one: ours by its mark, in no plan.
    let mut stray = actual.iter().find_map(|(_, object)| match object {
        Object::Sa { sa, .. } => Some((**sa).clone()),
        _ => None,
    });
    let stray = stray.as_mut().expect("an SA");
    stray.spi ^= 0x3f;
    actual.insert(
        Key::Sa(stray.id()),
        Object::Sa {
            sa: Box::new(stray.clone()),
            born: None,
        },
    );
    let found = audit(&desired, &actual, &directory());
    assert_eq!(explained(&found, Use::Stray).len(), 1);
    assert_eq!(found.differences.len(), 1);
    assert_eq!(found.differences[0].differs, Differs::Extra);
}

#[test]
fn no_command_would_print_a_key() {
    let desired = desired();
    for difference in audit(&desired, &Objects::new(), &directory()).differences {
        let shows_states = difference.show.contains("xfrm state");
        assert!(
            !shows_states || difference.show.contains("nokeys"),
            "{}",
            difference.show
        );
    }
}

#[test]
fn without_a_plan_the_kernel_alone_is_judged() {
    let actual = dumped(&desired());
    let whole = unplanned(&actual);
    assert_eq!(
        (whole.ok, whole.plaintext.len(), whole.differences.len()),
        (false, 0, 0)
    );
    assert_eq!(
        whole.associations.iter().filter(|sa| sa.usage == Use::Sending).count(),
        2
    );
    let out = |key: &Key| matches!(key, Key::Guard(Guard::Block, id) if id.direction == Direction::Out);
    let mut broken = actual.clone();
    broken.retain(|key, _| !out(key));
    assert_eq!(unplanned(&broken).plaintext.len(), 2, "one a family");
    assert_eq!(unplanned(&Objects::new()).plaintext, Vec::<String>::new());
}

fn changed(object: &mut Object) {
    match object {
        Object::Sysctl(value) => value.push('0'),
        Object::Firewall(firewall) => firewall.masquerade = !firewall.masquerade,
        Object::Policy(policy) => policy.priority += 1,
        Object::Link(device) => device.mtu += 1,
        Object::Sa { sa, .. } => sa.replay_window += 1,
        Object::HashThreshold { remote } => *remote += 1,
        Object::Route(route) => route.source = Some(address("192.0.2.99")),
        Object::Neighbour(mac) => mac.0[5] += 1,
        Object::Fdb(remote) => *remote = address("192.0.2.99"),
        Object::Unreachable | Object::Blackhole | Object::Address => *object = Object::Sysctl("odd".into()),
    }
}

proptest! {
    /// Whatever is taken out, changed or put in is reported, each as what it is and nothing else.
    #[test]
    fn every_difference_is_reported_and_nothing_else(
        fates in proptest::collection::vec(0..4u8, desired().len()),
    ) {
        let whole = desired();
        let (mut wanted, mut found) = (whole.clone(), dumped(&whole));
        let mut expected = Vec::new();
        for (key, fate) in whole.keys().zip(fates) {
            match fate {
                0 => { found.remove(key); expected.push((key.to_string(), Differs::Missing)); }
                1 => { wanted.remove(key); expected.push((key.to_string(), Differs::Extra)); }
                2 => { found.get_mut(key).into_iter().for_each(changed); expected.push((key.to_string(), Differs::Different)); }
                _ => {}
            }
        }
        let audit = audit(&wanted, &found, &directory());
        let reported: Vec<_> = audit.differences.iter().map(|d| (d.object.clone(), d.differs)).collect();
        prop_assert_eq!(reported, expected);
        let sas = found.keys().filter(|key| key.kind() == Kind::Sa).count();
        prop_assert_eq!(audit.associations.len(), sas);
        for guard in whole.keys().filter(|key| guards(key) && !found.contains_key(key)) {
            prop_assert!(!audit.plaintext.is_empty(), "{} is missing", guard);
        }
    }
}
