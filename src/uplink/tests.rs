//! The choice, by tables; and the kernel's facts, in a network namespace of the test's own.

use proptest::prelude::*;

use super::*;

fn net(links: &[(u32, &str, &[&str])]) -> Facts {
    let mut facts = Facts::default();
    for &(index, name, addresses) in links {
        let (name, up) = name.strip_prefix('!').map_or((name, true), |name| (name, false));
        let link = Link {
            name: name.into(),
            other_names: vec![],
            mtu: 1500,
            up,
            loopback: name == "lo",
        };
        facts.links.insert(index, link);
        for address in addresses {
            let (text, flags) = address.split_once('+').unwrap_or((address, ""));
            facts.addresses.push(Address {
                index,
                address: text.parse().unwrap(),
                host_scope: flags.contains("host"),
                permanent: !flags.contains("dynamic"),
                deprecated: flags.contains("deprecated"),
                temporary: flags.contains("temporary"),
                unusable: flags.contains("tentative"),
            });
        }
    }
    facts
}

/// lo, eth0, eth1, and the mesh's own.
fn node() -> Facts {
    let mut facts = net(&[
        (1, "lo", &["127.0.0.1+host", "::1+host"]),
        (2, "eth0", &["192.168.1.5", "fd00:1::5", "fe80::5"]),
        (3, "eth1", &["10.9.0.5", "fd00:9::5", "fe80::9"]),
        (4, "ringmail0", &["10.244.1.0"]),
        (5, "flannel.1", &["10.244.1.0"]),
        (6, "cni0", &["10.244.1.1"]),
        (7, "!eth2", &["172.16.0.5"]),
        (8, "eth3", &[]),
    ]);
    facts.default_routes = vec![
        route(Family::V4, 3, 200),
        route(Family::V4, 2, 100),
        route(Family::V6, 2, 1024),
    ];
    facts
}

fn route(family: Family, index: u32, metric: u32) -> DefaultRoute {
    DefaultRoute {
        family,
        index,
        metric,
        source: None,
    }
}

fn flags(text: &str) -> Choice {
    let mut choice = Choice::default();
    for flag in text.split_whitespace() {
        let (name, value) = flag.split_once('=').unwrap();
        match name {
            "iface" => choice.ifaces.push(value.parse().unwrap()),
            "regex" => choice.patterns.push(Regex::new(value).unwrap()),
            "reach" => choice.can_reach = Some(value.parse().unwrap()),
            "public" => choice.public = choice.public.iter().chain([value.parse().unwrap()]).collect(),
            _ => panic!("{flag}"),
        }
    }
    choice
}

fn chosen(facts: &Facts, text: &str, families: Families) -> String {
    match choose(facts, &flags(text), families) {
        Ok(uplink) if uplink.public == uplink.local => format!("{} {}", uplink.name, uplink.local),
        Ok(uplink) => format!("{} {} public {}", uplink.name, uplink.local, uplink.public),
        Err(error) => format!("error: {error}"),
    }
}

const ALL: &str =
    "eth0 192.168.1.5 fd00:1::5 fe80::5, eth1 10.9.0.5 fd00:9::5 fe80::9, eth2 down 172.16.0.5, eth3 no address";

#[test]
fn flags_choose_as_flannels_do() {
    use Families::{Both, V4, V6};
    let facts = node();
    for (text, families, expected) in [
        ("", V4, "eth0 192.168.1.5"),
        ("", V6, "eth0 fd00:1::5"),
        ("", Both, "eth0 192.168.1.5 fd00:1::5"),
        ("iface=eth1", V4, "eth1 10.9.0.5"),
        ("iface=eth1", Both, "eth1 10.9.0.5 fd00:9::5"),
        ("iface=10.9.0.5", V4, "eth1 10.9.0.5"),
        ("iface=10.9.0.5", Both, "eth1 10.9.0.5 fd00:9::5"),
        ("iface=fd00:9::5", Both, "eth1 10.9.0.5 fd00:9::5"),
        (
            "iface=nope iface=eth2 iface=eth3 iface=eth1 iface=eth0",
            V4,
            "eth1 10.9.0.5",
        ),
        ("iface=nope regex=eth1", V4, "eth1 10.9.0.5"),
        ("regex=^10\\. regex=eth0", V4, "eth1 10.9.0.5"),
        ("regex=10\\.244", V4, "error"),
        ("regex=ringmail|flannel|cni", V4, "error"),
        ("regex=.", V4, "eth0 192.168.1.5"),
        ("iface=127.0.0.1", V4, "error"),
        ("iface=fe80::5", V6, "error"),
        ("regex=(^192|^fd00:1)", Both, "eth0 192.168.1.5 fd00:1::5"),
        ("regex=^192", Both, "error"),
        ("regex=eth regex=x", V4, "eth0 192.168.1.5"),
        ("regex=x*", V4, "error"),
        ("public=10.9.0.5", V4, "eth1 10.9.0.5"),
        ("public=fd00:9::5", V6, "eth1 fd00:9::5"),
        (
            "public=203.0.113.1 iface=eth0",
            V4,
            "eth0 192.168.1.5 public 203.0.113.1",
        ),
        (
            "public=203.0.113.1 iface=eth0",
            Both,
            "eth0 192.168.1.5 fd00:1::5 public 203.0.113.1 fd00:1::5",
        ),
        ("public=203.0.113.1 iface=eth0", V6, "eth0 fd00:1::5"),
        ("iface=ringmail0", V4, "ringmail0 10.244.1.0"),
        ("iface=eth3", V4, "error"),
    ] {
        let found = chosen(&facts, text, families);
        let same = if expected == "error" {
            found.starts_with("error: ")
        } else {
            found == expected
        };
        assert!(same, "{text} {families:?}: {found}");
    }
}

/// The golden list: each way to have no uplink and the whole text.
#[test]
fn every_failure_names_the_candidates_and_the_flags_that_help() {
    let mut bare = node();
    bare.default_routes.clear();
    assert_eq!(
        chosen(&bare, "", Families::V4),
        format!(
            "error: no IPv4 default route to find the uplink by: add one, or give --iface, --iface-regex, \
             --iface-can-reach or --public-ip (interfaces: {ALL})"
        )
    );
    let mut apart = node();
    apart.default_routes[2].index = 3;
    assert_eq!(
        chosen(&apart, "", Families::Both),
        "error: v6 default route interface eth1 must be the same with v4 default route interface eth0: name the \
         uplink with --iface"
    );
    apart.default_routes.push(route(Family::V6, 2, 4096));
    assert_eq!(
        chosen(&apart, "", Families::Both),
        "eth0 192.168.1.5 fd00:1::5",
        "any route of that interface will do"
    );
    let why = "Failed to find interface to use that matches the interfaces and/or regexes provided";
    for (text, tried) in [
        ("iface=nope", "--iface=nope: no interface is called nope"),
        (
            "iface=10.0.0.1",
            "--iface=10.0.0.1: no interface with given IP found: 10.0.0.1",
        ),
        (
            "iface=eth2",
            "--iface=eth2: interface eth2 is down: `ip link set eth2 up`, or name another with --iface",
        ),
        (
            "iface=eth3 regex=wlan",
            "--iface=eth3: interface eth3 has no usable IPv4 address: give it one, or name another with --iface; \
             --iface-regex=wlan: could not match pattern wlan to any of the available network interfaces",
        ),
        (
            "iface=lo",
            "--iface=lo: interface lo has no usable IPv4 address (127.0.0.1 is of this host only): give it one, or \
             name another with --iface",
        ),
        (
            "reach=1.1.1.1",
            "--iface-can-reach=1.1.1.1: 1.1.1.1 is not reached through an uplink: the kernel was not asked",
        ),
    ] {
        assert_eq!(
            chosen(&node(), text, Families::V4),
            format!("error: {why}: {tried} (interfaces: {ALL})"),
            "{text}"
        );
    }
    assert_eq!(
        chosen(&node(), "public=203.0.113.1", Families::V4),
        format!("error: no interface with given IP found: 203.0.113.1 (interfaces: {ALL})")
    );
    assert_eq!(
        chosen(&Facts::default(), "iface=x", Families::V4).split(" (").last(),
        Some("interfaces: none)")
    );
}

#[test]
fn of_several_addresses_the_lasting_global_one_is_taken() {
    for (addresses, expected) in [
        (["169.254.1.1", "10.0.0.2+dynamic", "10.0.0.3"].as_slice(), "10.0.0.3"),
        (&["169.254.1.1", "10.0.0.2+dynamic"], "10.0.0.2"),
        (&["169.254.1.1"], "169.254.1.1"),
        (&["10.0.0.2+deprecated", "10.0.0.3+temporary", "10.0.0.4"], "10.0.0.4"),
        (&["10.244.3.1", "10.0.0.4+temporary"], "10.0.0.4"),
        (&["10.244.3.1"], "10.244.3.1"),
    ] {
        let facts = net(&[(2, "eth0", addresses)]);
        let conf = crate::config::NetConf::parse(
            r#"{"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}}"#,
            &crate::config::Context {
                file: "x",
                psk_file: None,
                psk_secret: None,
            },
        );
        let choice = Choice {
            mesh: Some(conf.unwrap().network),
            ..flags("iface=eth0")
        };
        let uplink = choose(&facts, &choice, Families::V4).unwrap();
        assert_eq!(uplink.local.to_string(), expected, "{addresses:?}");
    }
    let facts = net(&[(
        2,
        "eth0",
        &[
            "fe80::1",
            "fd00::2+tentative",
            "fd00::3+temporary+dynamic",
            "fd00::4+dynamic",
        ],
    )]);
    assert_eq!(chosen(&facts, "iface=eth0", Families::V6), "eth0 fd00::4");
    let facts = net(&[(2, "eth0", &["fe80::1", "fd00::3+temporary+dynamic"])]);
    let text = chosen(&facts, "iface=eth0", Families::V6);
    assert!(text.contains("fd00::3 is one that changes for privacy"), "{text}");
    let facts = net(&[(2, "eth0", &["fe80::1", "fd00::2+tentative", "fd00::3+deprecated"])]);
    let text = chosen(&facts, "iface=eth0", Families::V6);
    assert!(
        text.contains("(fe80::1 is link-local, fd00::2 is tentative or a duplicate, fd00::3 is deprecated)"),
        "{text}"
    );
}

#[test]
fn the_default_routes_own_source_and_our_own_devices_are_minded() {
    let mut facts = node();
    facts.addresses.push(Address {
        index: 1,
        address: "203.0.113.7".parse().unwrap(),
        ..facts.addresses[2]
    });
    facts.default_routes[1].source = Some("203.0.113.7".parse().unwrap());
    assert_eq!(
        chosen(&facts, "", Families::V4),
        "eth0 203.0.113.7",
        "an address on lo that the route names"
    );
    facts.addresses.last_mut().unwrap().deprecated = true;
    assert_eq!(
        chosen(&facts, "", Families::V4),
        "eth0 192.168.1.5",
        "a deprecated one is passed over"
    );
    facts.default_routes[1].source = Some("203.0.113.8".parse().unwrap());
    assert_eq!(
        chosen(&facts, "", Families::V4),
        "eth0 192.168.1.5",
        "an address that is not held is none"
    );
    facts.default_routes = vec![
        route(Family::V4, 4, 0),
        route(Family::V4, 6, 1),
        route(Family::V4, 3, 500),
    ];
    assert_eq!(chosen(&facts, "", Families::V4), "eth1 10.9.0.5");
}

#[test]
fn the_way_to_an_address_leads_to_an_uplink_or_is_explained() {
    let mut facts = node();
    let mut with = |reach| {
        facts.reach = Some(reach);
        chosen(&facts, "reach=8.8.8.8", Families::V4)
    };
    let source = Some("10.9.0.5".parse().unwrap());
    assert_eq!(
        with(Ok(Reach {
            index: 3,
            source,
            own: false
        })),
        "eth1 10.9.0.5"
    );
    assert_eq!(
        with(Ok(Reach {
            index: 3,
            source: None,
            own: false
        })),
        "eth1 10.9.0.5"
    );
    for (reach, why) in [
        (
            Err("Network is unreachable (os error 101)".to_owned()),
            "Network is unreachable",
        ),
        (
            Ok(Reach {
                index: 1,
                source,
                own: true,
            }),
            "it is an address of this node; name one of another node",
        ),
        (
            Ok(Reach {
                index: 5,
                source,
                own: false,
            }),
            "the way to it is the mesh's own flannel.1",
        ),
        (
            Ok(Reach {
                index: 99,
                source,
                own: false,
            }),
            "its interface has just gone",
        ),
    ] {
        let text = with(reach);
        assert!(
            text.contains(&format!("8.8.8.8 is not reached through an uplink: {why}")),
            "{text}"
        );
    }
}

proptest! {
    #[test]
    fn arbitrary_facts_never_panic_and_an_uplink_has_every_family(
        links in prop::collection::vec((1..6u32, "[a-c]{1,2}", any::<bool>(), any::<bool>()), 0..5),
        addresses in prop::collection::vec((1..6u32, any::<u8>(), any::<[bool; 6]>()), 0..8),
        routes in prop::collection::vec((any::<bool>(), 1..7u32, 0..3u32), 0..5),
        text in prop::sample::select(vec!["", "iface=a", "regex=b", "regex=10", "reach=1.1.1.1", "public=10.0.0.1"]),
        families in prop::sample::select(vec![Families::V4, Families::V6, Families::Both]),
    ) {
        let link = |(index, name, up, loopback)| (index, Link { name, other_names: vec![], mtu: 1500, up, loopback });
        let facts = Facts {
            links: links.into_iter().map(link).collect(),
            addresses: addresses.into_iter().map(|(index, n, [six, host_scope, permanent, deprecated, temporary, unusable])| {
                let address = if six { format!("fd00::{n:x}") } else { format!("10.0.0.{n}") };
                Address { index, address: address.parse().unwrap(), host_scope, permanent, deprecated, temporary, unusable }
            }).collect(),
            routes: Vec::new(),
            default_routes: routes.into_iter().map(|(six, index, metric)| {
                route(if six { Family::V6 } else { Family::V4 }, index, metric)
            }).collect(),
            reach: None,
        };
        if let Ok(uplink) = choose(&facts, &flags(text), families) {
            prop_assert!(facts.links[&uplink.index].up);
            for family in families.iter() {
                prop_assert!(uplink.local.iter().any(|a| Family::of(a) == family));
                prop_assert!(uplink.public.iter().any(|a| Family::of(a) == family));
            }
        }
    }
}

mod in_a_namespace {
    //! Needs root: each test runs on a thread that has entered a network namespace of its own, which ends with it.

    use std::process::Command;
    use std::time::Duration;

    use nix::sched::{CloneFlags, unshare};
    use tokio::sync::watch::Receiver;
    use tokio::time::timeout;

    use super::*;

    fn apart<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
        let thread = std::thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("root makes a network namespace");
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .expect("a runtime");
            runtime.block_on(test());
        });
        thread.join().expect("the test passes");
    }

    fn ip(arguments: &str) {
        let status = Command::new("ip")
            .args(arguments.split_whitespace())
            .status()
            .expect("iproute2 is installed");
        assert!(status.success(), "ip {arguments}");
    }

    type Uplinks = Receiver<Result<Uplink, UplinkError>>;

    async fn until(uplinks: &mut Uplinks, what: &str, good: impl Fn(&Result<Uplink, UplinkError>) -> bool) {
        let waited = timeout(Duration::from_secs(5), uplinks.wait_for(good)).await.is_ok();
        assert!(waited, "{what}: still {:?}", uplinks.borrow());
    }

    fn is(text: &'static str) -> impl Fn(&Result<Uplink, UplinkError>) -> bool {
        move |held| {
            held.as_ref()
                .is_ok_and(|u| format!("{} {} {}", u.name, u.local, u.mtu) == text)
        }
    }

    #[test]
    fn the_kernels_facts_are_read_as_they_are() {
        apart(|| async {
            ip("link set lo up");
            ip("link add up0 type veth peer name up1");
            ip("link property add dev up0 altname uplink-of-this-node");
            ip("link set up0 mtu 1400 up");
            ip("link set up1 up");
            ip("address add 192.0.2.1 peer 192.0.2.2/32 dev up0");
            ip("address add 198.51.100.1/24 dev up0");
            ip("-6 address add fd00:5::1/64 dev up0 nodad");
            ip("route add default via 198.51.100.9 dev up0 metric 7 src 198.51.100.1");
            ip("-6 route add default via fd00:5::9 dev up0");
            ip("route add default via 198.51.100.9 dev up0 table 100");
            let facts = read(Some("203.0.113.1".parse().unwrap())).await.unwrap();
            let (&index, link) = facts.links.iter().find(|(_, l)| l.name == "up0").unwrap();
            assert_eq!((link.mtu, link.up, link.loopback), (1400, true, false));
            assert_eq!(link.other_names, ["uplink-of-this-node"]);
            assert!(facts.links.values().any(|l| l.loopback));
            let held = |text: &str| {
                facts
                    .addresses
                    .iter()
                    .find(|a| a.address == text.parse::<IpAddr>().unwrap())
                    .copied()
            };
            assert!(
                held("192.0.2.1").is_some() && held("192.0.2.2").is_none(),
                "the peer's address is not ours"
            );
            assert!(held("127.0.0.1").unwrap().host_scope);
            assert!(held("fd00:5::1").unwrap().permanent);
            let source = Some("198.51.100.1".parse().unwrap());
            assert_eq!(
                facts.default_routes,
                [
                    DefaultRoute {
                        family: Family::V4,
                        index,
                        metric: 7,
                        source
                    },
                    DefaultRoute {
                        family: Family::V6,
                        index,
                        metric: 1024,
                        source: None
                    }
                ]
            );
            assert_eq!(
                facts.reach,
                Some(Ok(Reach {
                    index,
                    source,
                    own: false
                }))
            );
            let own = read(source).await.unwrap().reach.unwrap().unwrap();
            assert!(own.own);
            let choice = flags("iface=uplink-of-this-node");
            let uplink = choose(&facts, &choice, Families::Both).unwrap();
            assert_eq!(uplink.local.to_string(), "192.0.2.1 fd00:5::1");
        });
    }

    #[test]
    fn an_unreachable_address_has_the_kernels_reason() {
        apart(|| async {
            let facts = read(Some("203.0.113.1".parse().unwrap())).await.unwrap();
            assert!(facts.reach.unwrap().unwrap_err().contains("unreachable"));
        });
    }

    #[test]
    fn the_uplink_is_followed_through_addresses_routes_mtu_and_loss() {
        apart(|| async {
            let mut uplinks = watch(Choice::default(), Families::V4).await;
            assert!(matches!(
                *uplinks.borrow_and_update(),
                Err(UplinkError::NoDefaultRoute { .. })
            ));
            ip("link add up0 type veth peer name up1");
            ip("link set up0 up");
            ip("link set up1 up");
            ip("address add 198.51.100.1/24 dev up0");
            ip("route add default via 198.51.100.9");
            until(&mut uplinks, "it comes up", is("up0 198.51.100.1 1500")).await;
            ip("link set up0 mtu 1400");
            until(&mut uplinks, "the MTU changes", is("up0 198.51.100.1 1400")).await;
            ip("address add 203.0.113.1/24 dev up0");
            ip("address del 198.51.100.1/24 dev up0");
            ip("route replace default via 203.0.113.9");
            until(&mut uplinks, "the address changes", is("up0 203.0.113.1 1400")).await;
            // The kernel tells nothing of IPv4 routes that go with an interface.
            ip("link set up0 down");
            until(&mut uplinks, "it goes down", Result::is_err).await;
            ip("link set up0 up");
            ip("route add default via 203.0.113.9");
            until(&mut uplinks, "it comes back", is("up0 203.0.113.1 1400")).await;
        });
    }

    #[test]
    fn a_change_whose_notification_is_lost_in_a_flood_is_noticed() {
        apart(|| async {
            ip("link add up0 type veth peer name up1");
            ip("link add ringmail0 type veth peer name ringmail1");
            for link in ["up0", "up1", "ringmail0", "ringmail1"] {
                // Without link-local addresses, whose detection ends with a notification of its own.
                ip(&format!("link set {link} addrgenmode none up"));
            }
            ip("address add 198.51.100.1/24 dev up0");
            let mut uplinks = watch(flags("iface=up0"), Families::V4).await;
            until(&mut uplinks, "it is there", is("up0 198.51.100.1 1500")).await;
            let folder = crate::testing::Folder::new();
            let flood = (0..20_000u32).map(|n| format!("route add 10.{}.{}.0/24 dev ringmail0\n", n / 256, n % 256));
            // The socket's buffer is full by now, so this comes through to nobody.
            let batch = flood.collect::<String>() + "link set up0 mtu 1300\n";
            std::fs::write(folder.join("batch"), batch).unwrap();
            // Blocks this thread, so nothing reads the socket meanwhile.
            ip(&format!("-batch {}", folder.join("batch").display()));
            until(&mut uplinks, "the kernel is read again", is("up0 198.51.100.1 1300")).await;
            ip("link set up0 mtu 1200");
            until(&mut uplinks, "changes are still noticed", is("up0 198.51.100.1 1200")).await;
        });
    }
}
