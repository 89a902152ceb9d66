//! What others do is told, what we do is not.

use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

use super::route_link_policy::foreigners;
use super::*;
use crate::kernel::diff;

/// A node as the reconciler has it: what it wants, what it knows, and its ears.
struct Node {
    netlink: Netlink,
    events: Events,
    keys: Keys,
    desired: Objects,
    actual: Objects,
    /// Declared last, so that it is dropped last.
    runtime: tokio::runtime::Runtime,
}

impl Node {
    /// Opens in the order of the daemon and makes what is desired.
    fn new(desired: Objects) -> Self {
        let (runtime, mut netlink) = (runtime(), open());
        let events = {
            let _entered = runtime.enter();
            netlink.events().expect("events")
        };
        let actual = netlink.dump().expect("dump");
        let mut node = Self {
            netlink,
            events,
            keys: Keys::new(),
            desired,
            actual,
            runtime,
        };
        node.mend();
        node
    }

    /// One pass without a dump.
    fn mend(&mut self) {
        let ops = diff(self.desired.clone(), self.actual.keys(), |key| self.actual.get(key));
        must(&mut self.netlink, ops, &self.keys);
        self.actual = as_dumped(&self.desired);
    }

    /// What has happened, taken in.
    fn hear(&mut self) -> Vec<Event> {
        let events = self.events.ready();
        for event in &events {
            match event {
                Event::Observed(key, object) => drop(self.actual.insert(key.clone(), object.clone())),
                Event::Gone(key) => drop(self.actual.remove(key)),
                Event::AllGone(kind) => self.actual.retain(|key, _| key.kind() != *kind),
                Event::SoftLimit(_) | Event::Moved { .. } => {}
                Event::Overrun => self.actual = self.netlink.dump().expect("dump"),
            }
        }
        events
    }
}

/// Everything but SAs.
fn all() -> Objects {
    let mut objects = node();
    objects.extend(peer_without_sas(2));
    objects.extend(peer_without_sas(3));
    objects
}

#[test]
#[ignore = "needs root"]
fn our_own_writes_are_not_told() {
    for sinks in [&Sink::ALL[..], &Sink::ALL[1..]] {
        let sinks: &'static [Sink] = sinks;
        in_namespace(move || {
            let mut node = Node::new(Objects::new());
            node.netlink.sinks = sinks;
            let quiet = |node: &mut Node, what| {
                // The kernel tells of a carrier a little later.
                std::thread::sleep(Duration::from_millis(50));
                assert_eq!(node.events.ready(), [], "{what}");
            };
            for round in 0..2 {
                must(&mut node.netlink, make(&all()), &node.keys);
                quiet(&mut node, format!("made {round}"));
                must(&mut node.netlink, make(&all()), &node.keys);
                quiet(&mut node, format!("made again {round}"));
                let mut other = all();
                other.insert(Key::Link(LINK.into()), link(1300));
                must(
                    &mut node.netlink,
                    other.into_iter().map(|(k, o)| Op::Change(k, o)).collect(),
                    &node.keys,
                );
                quiet(&mut node, format!("changed {round}"));
                must(&mut node.netlink, breaks(&all()), &node.keys);
                quiet(&mut node, format!("broken {round}"));
            }
        });
    }
}

const MARKED: &str = "tmpl src 192.0.2.1 dst 198.18.0.2 proto esp reqid 1379926018 mode tunnel";

/// What a hand may do to what is ours.
fn mischief() -> Vec<String> {
    let policy = "dir out src 0.0.0.0/0 dst 10.244.2.0/24";
    let guard = "dir in src 0.0.0.0/0 dst 10.244.0.0/16";
    [
        "route delete 10.244.2.0/24",
        "-6 route delete fd00:244:0:2::/64",
        "route delete unreachable 10.244.0.0/16",
        "-6 route delete unreachable fd00:244::/48",
        "route change 10.244.2.0/24 dev ringmail0 src 10.244.1.0 proto 114",
        "-6 route change fd00:244:0:2::/64 dev ringmail0 src fd00:244:0:1:: proto 114 mtu 1290",
        "route add 10.244.7.0/24 dev ringmail0 proto 114",
        "route add unreachable 10.250.0.0/16 proto 114",
        "route flush proto 114",
        "-6 route flush proto 114",
        "address delete 10.244.1.0/32 dev ringmail0",
        "-6 address delete fd00:244:0:1::/128 dev ringmail0",
        "address add 10.244.5.5/32 dev ringmail0",
        "address flush dev ringmail0",
        "link set ringmail0 mtu 9000",
        "link set ringmail0 down",
        "link delete ringmail0",
        "link set ringmail0 mtu 1300 down",
        "xfrm policy flush",
    ]
    .map(str::to_owned)
    .into_iter()
    .chain([
        format!("xfrm policy delete {policy}"),
        format!("xfrm policy delete {guard}"),
        format!("xfrm policy update {policy} priority {} {MARKED}", priority::PEER),
        format!("xfrm policy update {guard} action allow priority {}", priority::BLOCK),
        format!("xfrm policy update {guard} action block priority {}", priority::LOCAL),
        format!("xfrm policy add dir out src 10.9.0.0/16 dst 10.8.0.0/16 {MARKED}"),
    ])
    .collect()
}

#[test]
#[ignore = "needs root"]
fn whatever_of_ours_is_changed_by_hand_is_told_and_can_be_mended_from_what_is_told() {
    in_namespace(|| {
        let mut node = Node::new(all());
        assert_eq!(node.hear(), []);
        for arguments in mischief() {
            ip(&arguments);
            let events = node.hear();
            assert!(
                !events.is_empty() && !events.contains(&Event::Overrun),
                "{arguments}: {events:?}"
            );
            let ops = diff(node.desired.clone(), node.actual.keys(), |key| node.actual.get(key));
            assert!(!ops.is_empty(), "{arguments}: {events:?} leave nothing to do");
            node.mend();
            assert_same(&node.netlink.dump().expect("dump"), &node.desired);
            std::thread::sleep(Duration::from_millis(20));
            assert_eq!(node.hear(), [], "after {arguments} was mended");
        }
    });
}

#[test]
#[ignore = "needs root"]
fn a_route_or_policy_that_someone_puts_in_the_place_of_ours_is_told_as_ours_gone() {
    in_namespace(|| {
        let mut node = Node::new(all());
        ip("link add up0 type veth peer name up1");
        ip("link set up0 up");
        let route = Key::Route(net("10.244.2.0/24"));
        let (v6, guard) = (
            Key::Route(net("fd00:244:0:2::/64")),
            Key::GuardRoute(net("10.244.0.0/16")),
        );
        let own = node
            .desired
            .keys()
            .find(|key| key.to_string().ends_with("out src 0.0.0.0/0 dst 10.244.2.0/24"));
        let policy = own.expect("the policy").clone();
        for (arguments, key) in [
            ("route replace 10.244.2.0/24 dev up0", &route),
            ("-6 route replace fd00:244:0:2::/64 dev up0", &v6),
            ("route replace blackhole 10.244.0.0/16", &guard),
            (
                "xfrm policy update dir out src 0.0.0.0/0 dst 10.244.2.0/24 action allow priority 1",
                &policy,
            ),
        ] {
            node.hear();
            ip(arguments);
            assert!(node.hear().contains(&Event::Gone(key.clone())), "{arguments}");
            let object = node.desired[key].clone();
            let error = one(&mut node.netlink, Op::Make(key.clone(), object)).expect_err("in the way");
            assert!(matches!(error, WriteError::Foreign { .. }), "{error:?}");
        }
    });
}

#[test]
#[ignore = "needs root"]
fn going_down_and_away_are_told_with_all_that_goes_along() {
    in_namespace(|| {
        let mut node = Node::new(all());
        node.hear();
        ip("link set ringmail0 down");
        let events = node.hear();
        assert_eq!(events[0], Event::Observed(Key::Link(LINK.into()), down(1446)));
        assert!(events.contains(&Event::AllGone(Kind::Route)), "{events:?}");
        assert!(events.contains(&Event::Gone(Key::Address(
            LINK.into(),
            own_bases().v6.expect("v6").into()
        ))));
        assert!(!events.contains(&Event::Gone(Key::Address(
            LINK.into(),
            own_bases().v4.expect("v4").into()
        ))));
        node.mend();

        // Read before it is heard of.
        ip("link set ringmail0 down");
        node.actual = node.netlink.dump().expect("dump");
        assert_eq!(node.actual[&Key::Link(LINK.into())], down(1446));
        node.hear();
        node.mend();
        assert_same(&node.netlink.dump().expect("dump"), &node.desired);

        ip("link set ringmail0 down");
        ip("link set ringmail0 name other0");
        node.hear();
        assert!(
            !node
                .actual
                .keys()
                .any(|key| matches!(key.kind(), Kind::Link | Kind::Address | Kind::Route))
        );
        node.mend();
        assert_same(&node.netlink.dump().expect("dump"), &node.desired);
        ip("link delete other0");
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(node.hear(), [], "another device's end");

        ip("link delete ringmail0");
        let events = node.hear();
        for base in own_bases().iter() {
            assert!(
                events.contains(&Event::Gone(Key::Address(LINK.into(), base))),
                "{events:?}"
            );
        }
        assert!(events.contains(&Event::AllGone(Kind::Route)));
        assert_eq!(events.last(), Some(&Event::Gone(Key::Link(LINK.into()))));
    });
}

#[test]
#[ignore = "needs root"]
fn without_ipv6_a_device_that_goes_down_takes_its_routes_along_all_the_same() {
    in_namespace(|| {
        let mut desired = all();
        desired.retain(|key, _| !key.to_string().contains("fd00"));
        let mut node = Node::new(desired);
        node.hear();
        ip("link set ringmail0 down");
        let link = Event::Observed(Key::Link(LINK.into()), down(1446));
        assert_eq!(node.hear(), [link, Event::AllGone(Kind::Route)]);
        node.mend();
        assert_same(&node.netlink.dump().expect("dump"), &node.desired);
    });
}

#[test]
#[ignore = "needs root"]
fn what_happens_to_things_of_others_is_no_news_of_ours() {
    in_namespace(|| {
        let mut node = Node::new(all());
        node.hear();
        for arguments in foreigners() {
            ip(arguments);
            node.hear();
            assert_eq!(node.actual, as_dumped(&node.desired), "{arguments}");
        }
        ip("link set up0 down");
        ip("link delete up0");
        ip("xfrm policy delete dir in src 10.2.0.0/16 dst 10.1.0.0/16");
        node.hear();
        assert_eq!(node.actual, as_dumped(&node.desired));
    });
}

#[test]
#[ignore = "needs root"]
fn waiting_ends_when_something_happens_and_not_before() {
    in_namespace(|| {
        let mut node = Node::new(all());
        node.hear();
        let Node { events, runtime, .. } = &mut node;
        runtime.block_on(async {
            let nothing = tokio::time::timeout(Duration::from_millis(200), events.next()).await;
            assert!(nothing.is_err(), "{nothing:?}");
            for _ in 0..3 {
                let (told, ()) = tokio::join!(tokio::time::timeout(Duration::from_secs(5), events.next()), async {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    ip("route add 10.244.7.0/24 dev ringmail0 proto 114");
                });
                assert!(matches!(
                    &told.expect("in time")[..],
                    [Event::Observed(Key::Route(_), _)]
                ));
                ip("route delete 10.244.7.0/24 proto 114");
                let told = tokio::time::timeout(Duration::from_secs(5), events.next()).await;
                assert_eq!(told.expect("in time"), [Event::Gone(Key::Route(net("10.244.7.0/24")))]);
            }
            let before = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("the time");
            let nothing = tokio::time::timeout(Duration::from_millis(400), events.next()).await;
            assert!(nothing.is_err(), "{nothing:?}");
            let spent = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("the time") - before;
            assert!(
                Duration::from(spent) < Duration::from_millis(100),
                "it sleeps while it waits: {spent:?}"
            );
        });
    });
}

#[test]
#[ignore = "needs root"]
fn a_flood_is_told_as_an_overrun_and_what_comes_after_it_is_heard() {
    in_namespace(|| {
        let mut node = Node::new(all());
        node.hear();
        let mut other = Connection::open(Protocol::Route).expect("another program");
        let mut batch = xfrm::Batch::new();
        for index in 0..40_000_u32 {
            let net = Ipv4Net::new(Ipv4Addr::from((172 << 24) + (index << 8)), 24).expect("net");
            let route = super::super::message::Route::ours(net.into(), nix::libc::RTN_UNREACHABLE);
            batch.push(nix::libc::RTM_NEWROUTE, 0x600, |writer| route.write(writer));
        }
        assert!(other.execute(batch).iter().all(Result::is_ok));
        let events = node.hear();
        assert_eq!(events.iter().filter(|event| **event == Event::Overrun).count(), 1);
        assert_eq!(node.hear(), []);
        ip("route delete 10.244.2.0/24");
        assert_eq!(node.hear(), [Event::Gone(Key::Route(net("10.244.2.0/24")))]);
    });
}

#[test]
#[ignore = "needs root"]
fn a_touched_packet_filter_is_told_and_is_made_again() {
    in_namespace(|| {
        let rules = Firewall {
            form: crate::kernel::firewall::Form::Sealed,
            networks: vec![net("10.244.0.0/16")],
            own: [net("10.244.1.0/24")].into_iter().collect(),
            bases: Addresses {
                v6: None,
                ..own_bases()
            },
            uplink: "up0".into(),
            masquerade: true,
            random_fully: false,
        };
        let desired = Objects::from([(Key::Firewall, Object::Firewall(Box::new(rules)))]);
        let mut node = Node::new(desired.clone());
        assert_same(&node.netlink.dump().expect("dump"), &desired);
        assert_eq!(node.hear(), []);
        // Another program's hand. iptables tells nobody: there a dump alone shows it.
        Manager::open(true)
            .and_then(|mut other| other.remove())
            .expect("removed");
        let told = match &*node.netlink.firewall.borrow() {
            Manager::Nft(_) => vec![Event::Gone(Key::Firewall)],
            Manager::Iptables(_) => Vec::new(),
        };
        assert_eq!(node.hear(), told);
        node.actual = node.netlink.dump().expect("dump");
        assert_same(&node.netlink.dump().expect("dump"), &Objects::new());
        node.mend();
        assert_same(&node.netlink.dump().expect("dump"), &desired);
        assert_eq!(node.hear(), []);
        must(&mut node.netlink, breaks(&desired), &node.keys);
        assert_same(&node.netlink.dump().expect("dump"), &Objects::new());
        assert_eq!(node.hear(), []);
    });
}

#[test]
#[ignore = "needs root and a kernel with nf_tables and iptables"]
fn nft_and_iptables_take_turns_as_the_filter_wishes() {
    in_namespace(|| {
        let plain = |nft| {
            let own = [net("10.244.1.0/24")].into_iter().collect();
            let rules = Firewall::plain(vec![net("10.244.0.0/16")], own, true, true, true).by_nft(nft);
            Objects::from([(Key::Firewall, Object::Firewall(Box::new(rules)))])
        };
        let mut node = Node::new(plain(false));
        for nft in [false, true, false, true] {
            node.desired = plain(nft);
            node.mend();
            assert_same(&node.netlink.dump().expect("dump"), &plain(nft));
            assert_eq!(node.netlink.filter_tells(), nft);
            // Whatever the old manager left would be seen by another of its kind.
            let shown = Command::new("nft").args(["list", "ruleset"]).output().expect("nft");
            let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
            assert_eq!(shown.contains("table inet ringmail"), nft, "{shown}");
            assert_eq!(shown.contains("FLANNEL"), !nft, "{shown}");
            node.hear();
        }
        let removed = Command::new("nft")
            .args(["delete", "table", "inet", "ringmail"])
            .status();
        assert!(removed.expect("nft").success());
        assert_eq!(
            node.hear(),
            [Event::Gone(Key::Firewall)],
            "heard though iptables came first"
        );
        node.mend();
        assert_same(&node.netlink.dump().expect("dump"), &plain(true));
    });
}
