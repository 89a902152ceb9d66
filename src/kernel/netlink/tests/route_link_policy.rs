//! What needs root and no ESP: policies, routes, device, addresses.

use super::*;
use crate::kernel::device::{Mac, Vxlan};
use crate::kernel::diff;

#[test]
#[ignore = "needs root"]
fn what_was_written_is_what_a_dump_shows() {
    in_namespace(|| {
        let (mut netlink, keys) = (open(), Keys::new());
        let mut desired = node();
        desired.extend(peer_without_sas(2));
        must(&mut netlink, make(&desired), &keys);
        assert_same(&netlink.dump().expect("dump"), &desired);

        // A second time: nothing of it is an error, nothing changes.
        must(&mut netlink, make(&desired), &keys);
        assert_same(&netlink.dump().expect("dump"), &desired);

        must(&mut netlink, breaks(&desired), &keys);
        assert_same(&netlink.dump().expect("dump"), &Objects::new());
        must(&mut netlink, breaks(&desired), &keys);
    });
}

#[test]
#[ignore = "needs root"]
fn every_kind_of_object_can_be_changed() {
    in_namespace(|| {
        let (mut netlink, keys) = (open(), Keys::new());
        let mut desired = node();
        desired.extend(peer_without_sas(2));
        must(&mut netlink, make(&desired), &keys);
        for (key, object) in &mut desired {
            match object {
                Object::Link(device) => device.mtu = 1418,
                Object::Route(route) => route.mtu = Some(1300),
                Object::Policy(policy) => match &mut policy.template {
                    Some(template) => template.spi = 0x2042,
                    None => policy.action = Action::Allow,
                },
                Object::Unreachable | Object::Address => {}
                other => panic!("{key} {other:?}"),
            }
        }
        let before = netlink.dump().expect("dump");
        let changes = crate::kernel::diff(desired.clone(), [], |key| before.get(key));
        assert_eq!(changes.len(), 6 + 1 + 6 + 2, "{changes:?}");
        must(&mut netlink, changes, &keys);
        assert_same(&netlink.dump().expect("dump"), &desired);
        must(
            &mut netlink,
            desired.iter().map(|(k, o)| Op::Change(k.clone(), o.clone())).collect(),
            &keys,
        );
        assert_same(&netlink.dump().expect("dump"), &desired);
    });
}

/// As a change of the backend asks for, from host-gw or ipsec to VXLAN and from there to VXLAN of another VNI.
#[test]
#[ignore = "needs root"]
fn a_peers_route_is_led_to_another_device_by_a_gateway_that_only_that_device_has() {
    in_namespace(|| {
        let (mut netlink, keys) = (open(), Keys::new());
        for (device, address) in [("wan", "fd77::1/64"), ("vxlan-1", ""), ("vxlan-2", "")] {
            ip(&format!("link add {device} type veth peer name {device}-far"));
            ip(&format!("link set {device} up"));
            ip(&format!("link set {device}-far up"));
            if !address.is_empty() {
                ip(&format!("address add {address} dev {device} nodad"));
                ip(&format!("address add 192.168.77.1/24 dev {device}"));
            }
        }
        for (subnet, neighbour) in subnets(2).into_iter().zip(["192.168.77.2", "fd77::2"]) {
            let route = |link: &str, gateway: std::net::IpAddr, onlink| {
                let via = Some(crate::kernel::Via { gateway, onlink });
                Object::Route(Box::new(crate::kernel::Route {
                    link: link.into(),
                    via,
                    source: None,
                    mtu: None,
                }))
            };
            let key = Key::Route(subnet);
            let ways = [
                route("wan", addr(neighbour), false),
                route("vxlan-1", subnet.network(), true),
                route("vxlan-2", subnet.network(), true),
                route("wan", addr(neighbour), false),
            ];
            let mut ways = ways.into_iter();
            let first = ways.next().expect("the first");
            must(&mut netlink, vec![Op::Make(key.clone(), first)], &keys);
            for way in ways {
                must(&mut netlink, vec![Op::Change(key.clone(), way.clone())], &keys);
                assert_eq!(netlink.dump().expect("dump").get(&key), Some(&way));
            }
            must(&mut netlink, vec![Op::Break(key)], &keys);
        }
    });
}

/// Things of other programs that resemble ours, and how `ip` shows them.
pub(super) fn foreigners() -> Vec<&'static str> {
    vec![
        "link add up0 type veth peer name up1",
        "link set up0 up",
        "link set up1 up",
        "address add 192.0.2.1/24 dev up0 noprefixroute",
        "address add 10.244.9.0/32 dev up0",
        "route add 10.244.9.0/24 dev up0 proto static",
        "route add 10.244.2.0/24 dev up0 metric 50",
        "route add 10.244.3.0/24 dev up0 proto 114 table 99",
        "route add unreachable 10.245.0.0/16",
        "-6 route add fd00:244:0:9::/64 dev up0",
        "-6 route add unreachable fd00:245::/48 proto static",
        "xfrm policy add dir out src 10.1.0.0/16 dst 10.2.0.0/16 tmpl src 192.0.2.1 dst 192.0.2.9 proto esp reqid 7 mode tunnel",
        "xfrm policy add dir in src 10.2.0.0/16 dst 10.1.0.0/16 action block priority 100",
        "xfrm policy add dir out src 10.1.0.0/16 dst 10.3.0.0/16 mark 5 action block priority 1919485952",
    ]
}

fn what_ip_shows() -> String {
    let shows = [
        "route show table all",
        "-6 route show table all",
        "address show up0",
        "xfrm policy",
    ];
    let lines = shows.map(ip);
    lines
        .iter()
        .flat_map(|lines| lines.lines())
        // Lifetimes pass by themselves, and link-local addresses settle by themselves.
        .filter(|line| !line.contains("lft") && !line.contains("fe80"))
        .collect::<Vec<_>>()
        .join("\n")
}

#[test]
#[ignore = "needs root"]
fn what_is_not_ours_is_neither_shown_nor_touched() {
    in_namespace(|| {
        foreigners().into_iter().for_each(|arguments| drop(ip(arguments)));
        let before = what_ip_shows();
        let (mut netlink, keys) = (open(), Keys::new());
        assert_same(&netlink.dump().expect("dump"), &Objects::new());
        let mut desired = node();
        desired.extend(peer_without_sas(2));
        must(&mut netlink, make(&desired), &keys);
        assert_same(&netlink.dump().expect("dump"), &desired);
        must(&mut netlink, breaks(&desired), &keys);
        assert_same(&netlink.dump().expect("dump"), &Objects::new());
        assert_eq!(what_ip_shows(), before);
    });
}

fn foreign(result: Result<(), WriteError>) -> (String, String) {
    match result.expect_err("it is in the way") {
        WriteError::Foreign { found, remedy, .. } => (found, remedy),
        other => panic!("{other:?}"),
    }
}

#[test]
#[ignore = "needs root"]
fn a_foreign_route_in_the_way_is_named_and_the_remedy_removes_it() {
    in_namespace(|| {
        ip("link add flannel.1 type veth peer name other");
        ip("link set flannel.1 up");
        ip("address add 10.244.1.0/32 dev flannel.1");
        ip("route add 10.244.2.0/24 via 10.244.2.0 dev flannel.1 onlink");
        ip("-6 route add fd00:244:0:2::/64 dev flannel.1 proto static");
        ip("route add blackhole 10.244.0.0/16");
        let (mut netlink, keys) = (open(), Keys::new());
        let mut base = node();
        base.retain(|key, _| matches!(key, Key::Link(_) | Key::Address(..)));
        must(&mut netlink, make(&base), &keys);

        for (key, object, found) in [
            (
                Key::GuardRoute(net("10.244.0.0/16")),
                Object::Unreachable,
                "blackhole 10.244.0.0/16 proto 3",
            ),
            (
                Key::Route(net("10.244.2.0/24")),
                peer_without_sas(2)[&Key::Route(net("10.244.2.0/24"))].clone(),
                "10.244.2.0/24 via 10.244.2.0 dev flannel.1 proto 3",
            ),
            (
                Key::Route(net("fd00:244:0:2::/64")),
                peer_without_sas(2)[&Key::Route(net("fd00:244:0:2::/64"))].clone(),
                "fd00:244:0:2::/64 dev flannel.1 proto 4",
            ),
        ] {
            let shown = what_shows(&key);
            for op in [
                Op::Make(key.clone(), object.clone()),
                Op::Change(key.clone(), object.clone()),
            ] {
                let (text, remedy) = foreign(one(&mut netlink, op));
                assert_eq!(text, found);
                assert_eq!(remedy, format!("ip route delete {found}"));
            }
            one(&mut netlink, Op::Break(key.clone())).expect("nothing of ours is there");
            assert_eq!(what_shows(&key), shown);
            ip(&format!("route delete {found}"));
            one(&mut netlink, Op::Make(key, object)).expect("the way is free");
        }
    });
}

fn what_shows(key: &Key) -> String {
    let (Key::Route(net) | Key::GuardRoute(net)) = key else {
        panic!("{key}")
    };
    ip(&format!(
        "{} route show {net}",
        if net.addr().is_ipv4() { "-4" } else { "-6" }
    ))
}

#[test]
#[ignore = "needs root"]
fn a_foreign_policy_in_the_way_is_named_and_the_remedy_removes_it() {
    in_namespace(|| {
        let (mut netlink, keys) = (open(), Keys::new());
        let desired = peer_without_sas(2);
        let (key, object) = desired
            .iter()
            .find(|(key, _)| key.to_string().contains("out src 0.0.0.0/0"))
            .expect("it");
        for (arguments, words) in [
            ("priority 100 action block", " action block priority 100"),
            (
                "priority 100 tmpl src 192.0.2.1 dst 192.0.2.9 proto esp reqid 7 mode tunnel",
                " priority 100 reqid 7",
            ),
            ("priority 9 limit packet-soft 10", " priority 9 (limits)"),
        ] {
            ip(&format!(
                "xfrm policy add dir out src 0.0.0.0/0 dst 10.244.2.0/24 {arguments}"
            ));
            let before = ip("xfrm policy");
            let (found, remedy) = foreign(one(&mut netlink, Op::Make(key.clone(), object.clone())));
            assert_eq!(found, format!("policy dir out src 0.0.0.0/0 dst 10.244.2.0/24{words}"));
            assert_eq!(ip("xfrm policy"), before);
            ip(remedy.strip_prefix("ip ").expect("a command of ip"));
        }
        must(
            &mut netlink,
            make(&desired.into_iter().filter(|(k, _)| k.kind() == Kind::Policy).collect()),
            &keys,
        );
    });
}

#[test]
#[ignore = "needs root"]
fn a_foreign_device_of_our_name_is_named_and_left() {
    in_namespace(|| {
        ip("link add ringmail0 type bridge");
        let mut netlink = open();
        assert_same(&netlink.dump().expect("dump"), &Objects::new());
        for op in [
            Op::Make(Key::Link(LINK.into()), link(1446)),
            Op::Change(Key::Link(LINK.into()), link(1446)),
        ] {
            let (found, remedy) = foreign(one(&mut netlink, op));
            assert_eq!(
                (&*found, &*remedy),
                ("device ringmail0 of kind bridge", "ip link delete ringmail0")
            );
        }
        one(&mut netlink, Op::Break(Key::Link(LINK.into()))).expect("nothing of ours is there");
        let shown = ip("link show ringmail0");
        assert!(shown.contains("mtu 1500") && !shown.contains("UP"), "{shown}");
    });
}

#[test]
#[ignore = "needs root"]
fn an_address_with_another_prefix_is_foreign_in_ipv6_and_beside_ours_in_ipv4() {
    in_namespace(|| {
        let (mut netlink, keys) = (open(), Keys::new());
        let mut desired = node();
        desired.retain(|key, _| matches!(key, Key::Link(_)));
        must(&mut netlink, make(&desired), &keys);
        ip("address add 10.244.1.0/24 dev ringmail0 noprefixroute");
        ip("address add fd00:244:0:1::/64 dev ringmail0 nodad noprefixroute");
        assert_same(&netlink.dump().expect("dump"), &desired);
        one(
            &mut netlink,
            Op::Make(Key::Address(LINK.into(), addr("10.244.1.0")), Object::Address),
        )
        .expect("beside");
        let v6 = Op::Make(Key::Address(LINK.into(), addr("fd00:244:0:1::")), Object::Address);
        let (found, remedy) = foreign(one(&mut netlink, v6));
        assert_eq!(found, "fd00:244:0:1::/64 dev ringmail0");
        ip(remedy.strip_prefix("ip ").expect("a command of ip"));
    });
}

#[test]
#[ignore = "needs root"]
fn a_missing_device_is_said_so_and_the_other_operations_go_on() {
    in_namespace(|| {
        let mut netlink = open();
        let route = peer_without_sas(2)[&Key::Route(net("10.244.2.0/24"))].clone();
        let guard = Op::Make(Key::GuardRoute(net("10.244.0.0/16")), Object::Unreachable);
        let ops = [Op::Make(Key::Route(net("10.244.2.0/24")), route), guard];
        let mut writes = ops.map(|op| Write { op, secret: None });
        let results = netlink.apply(Kind::Route, &mut writes);
        let error = chain(results[0].as_ref().expect_err("no device"));
        assert_eq!(error, "make route 10.244.2.0/24: there is no device ringmail0 (ENODEV)");
        assert!(results[1].is_ok());
        let address = Op::Make(Key::Address(LINK.into(), addr("10.244.1.0")), Object::Address);
        assert!(matches!(
            one(&mut netlink, address).expect_err("no device"),
            WriteError::Refused { .. }
        ));
        one(&mut netlink, Op::Change(Key::Link(LINK.into()), link(1400))).expect_err("no device");
    });
}

#[test]
#[ignore = "needs root"]
fn every_kind_of_mesh_device_swallows_all_that_reaches_it_and_has_no_address_of_its_own() {
    // The ways that this kernel has, at least the last.
    for sinks in [&Sink::ALL[..], &Sink::ALL[1..]] {
        let sinks: &'static [Sink] = sinks;
        in_namespace(move || {
            let (mut netlink, keys) = (open(), Keys::new());
            netlink.sinks = sinks;
            ip("link add up0 type veth peer name up1");
            // Silent by itself.
            for end in ["up0", "up1"] {
                std::fs::write(format!("/proc/sys/net/ipv6/conf/{end}/disable_ipv6"), "1").expect("sysctl");
                ip(&format!("link set {end} up"));
            }
            ip("address add 192.0.2.1/24 dev up0");
            ip("route add default via 192.0.2.2");
            let mut desired = node();
            desired.retain(|key, _| !matches!(key, Key::Guard(..)));
            let routes = peer_without_sas(2)
                .into_iter()
                .filter(|(key, _)| key.kind() == Kind::Route);
            desired.extend(routes);
            must(&mut netlink, make(&desired), &keys);
            assert_same(&netlink.dump().expect("dump"), &desired);
            assert!(
                !ip("address show dev ringmail0").contains("fe80"),
                "no link-local address"
            );

            let sent = |device: &str| counter(device, "tx_packets") + counter(device, "rx_packets");
            let before = sent("up1");
            for (from, to) in [("0.0.0.0:0", "10.244.2.9:9"), ("[::]:0", "[fd00:244:0:2::9]:9")] {
                let socket = std::net::UdpSocket::bind(from).expect("bind");
                socket.connect(to).expect("a route and a source");
                let expected = own_bases().of_family(socket.local_addr().expect("address").ip());
                assert_eq!(
                    Some(socket.local_addr().expect("address").ip()),
                    expected,
                    "the base address is the source"
                );
                for _ in 0..10 {
                    // The veth says ENOBUFS or takes it; it does not arrive.
                    let _ = socket.send(b"plaintext");
                }
            }
            assert_eq!(sent("up1"), before, "no packet has left");
            if sinks.len() == 1 {
                assert_eq!(counter("ringmail0-down", "rx_packets"), 0);
            }
        });
    }
}

fn counter(device: &str, name: &str) -> u64 {
    let shown = ip(&format!("-s -s link show dev {device}"));
    let mut lines = shown
        .lines()
        .skip_while(|line| !line.trim_start().starts_with(&name[..2].to_uppercase()));
    let numbers = lines.nth(1).expect("a line of numbers");
    numbers
        .split_whitespace()
        .nth(1)
        .expect("packets")
        .parse()
        .expect("a number")
}

#[test]
#[ignore = "needs root"]
fn a_sysctl_is_written_shown_and_left_as_it_is_when_no_longer_wanted() {
    in_namespace(|| {
        let mut netlink = open();
        let path = "net/ipv4/ip_forward".to_owned();
        netlink.watch_sysctls([path.clone(), "net/ipv4/no_such_thing".to_owned()]);
        let key = Key::Sysctl(path);
        let value = |netlink: &mut Netlink| netlink.dump().expect("dump").remove(&key);
        assert_eq!(value(&mut netlink), Some(Object::Sysctl("0".into())));
        one(&mut netlink, Op::Make(key.clone(), Object::Sysctl("1".into()))).expect("written");
        assert_eq!(value(&mut netlink), Some(Object::Sysctl("1".into())));
        one(&mut netlink, Op::Break(key.clone())).expect("left");
        assert_eq!(value(&mut netlink), Some(Object::Sysctl("1".into())));
        let missing = Key::Sysctl("net/ipv4/no_such_thing".into());
        let refused = one(&mut netlink, Op::Make(missing, Object::Sysctl("1".into()))).expect_err("absent");
        assert!(chain(&refused).contains("no_such_thing"));
    });
}

#[test]
#[ignore = "needs root"]
fn a_vxlan_device_keeps_no_checksums_where_the_kernel_would_spoil_them() {
    in_namespace(|| {
        ip("link add eth0 type dummy");
        ip("link set eth0 up");
        let mut netlink = open();
        let kind = DeviceKind::Vxlan(Vxlan {
            vni: 1,
            port: 8472,
            local: addr("192.0.2.1"),
            parent: nix::net::if_::if_nametoindex("eth0").expect("eth0"),
            learning: false,
            gbp: false,
            mac: Mac([2, 0, 0, 0, 0, 1]),
        });
        let wanted = Objects::from([(
            Key::Link("flannel.1".into()),
            Object::Link(Box::new(Device::new(kind, 1450))),
        )]);
        let pass = |netlink: &mut Netlink| {
            let actual = netlink.dump().expect("dump");
            let ops = diff(wanted.clone(), actual.keys(), |key| actual.get(key));
            must(netlink, ops.clone(), &Keys::new());
            ops.len()
        };
        assert_eq!(pass(&mut netlink), 1, "made");
        assert_eq!(offload::is_on("flannel.1").ok(), Some(true), "this kernel is right");
        assert_eq!(pass(&mut netlink), 0, "as it should be");
        netlink.spoils_checksums = true;
        assert_eq!(pass(&mut netlink), 1, "changed");
        assert_eq!(offload::is_on("flannel.1").ok(), Some(false));
        assert_eq!(pass(&mut netlink), 0, "as it should be");
    });
}
