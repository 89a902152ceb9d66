//! The rules as values, and both managers in real kernels. The latter need root and make namespaces of their own.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use super::lab::{Net, seen, seen_and_answered};
use super::*;

mod plain;

/// How long a packet that must not come is waited for.
const SILENCE: Duration = Duration::from_millis(200);

pub(crate) fn dual_stack() -> Firewall {
    let net = |text: &str| text.parse::<IpNet>().expect("a network");
    let own: Subnets = [net("10.244.1.0/24"), net("fd00:244:0:1::/64")].into_iter().collect();
    Firewall {
        form: Form::Sealed,
        networks: vec![net("10.244.0.0/16"), net("fd00:244::/48")],
        own,
        bases: own.bases(),
        uplink: "wan".into(),
        masquerade: true,
        random_fully: true,
    }
}

/// A node, a pod of its own, a foreign host behind it, and a remote node with a pod's address on it. The mesh's path
/// to the remote pod is a cable of its own, as these kernels need no ESP: the guard looks at the uplink.
struct Lab {
    node: Net,
    pod: Net,
    host: Net,
    remote: Net,
}

impl Lab {
    fn new() -> Self {
        let (node, pod, host, remote) = (Net::new(), Net::new(), Net::new(), Net::new());
        node.cable(
            "wan",
            ["198.51.100.1/24", "2001:db8:1::1/64"],
            &remote,
            "wan",
            ["198.51.100.2/24", "2001:db8:1::2/64"],
        );
        node.cable(
            "mesh",
            ["198.51.101.1/24", "2001:db8:2::1/64"],
            &remote,
            "mesh",
            ["198.51.101.2/24", "2001:db8:2::2/64"],
        );
        node.cable(
            "cni0",
            ["10.244.1.1/24", "fd00:244:0:1::1/64"],
            &pod,
            "eth0",
            ["10.244.1.5/24", "fd00:244:0:1::5/64"],
        );
        node.cable(
            "lan",
            ["192.0.2.1/24", "2001:db8:3::1/64"],
            &host,
            "eth0",
            ["192.0.2.9/24", "2001:db8:3::9/64"],
        );
        for net in [&node, &remote] {
            net.run(|| {
                for path in ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"] {
                    crate::kernel::sysctl::Sysctl::new(path, "1")
                        .write()
                        .expect("forwarding");
                }
            });
        }
        for address in ["10.244.1.0/32", "fd00:244:0:1::/128"] {
            node.address(address, "lo");
        }
        for address in [
            "10.244.2.5/32",
            "fd00:244:0:2::5/128",
            "203.0.113.5/32",
            "2001:db8:5::5/128",
        ] {
            remote.address(address, "lo");
        }
        for (net, v4, v6) in [
            (&pod, "10.244.1.1", "fd00:244:0:1::1"),
            (&host, "192.0.2.1", "2001:db8:3::1"),
            (&node, "198.51.100.2", "2001:db8:1::2"),
        ] {
            net.ip(&format!("route add default via {v4}"));
            net.ip(&format!("-6 route add default via {v6}"));
        }
        node.ip("route add 10.244.2.0/24 via 198.51.101.2");
        node.ip("-6 route add fd00:244:0:2::/64 via 2001:db8:2::2");
        remote.ip("route add 10.244.1.0/24 via 198.51.101.1");
        remote.ip("-6 route add fd00:244:0:1::/64 via 2001:db8:2::1");
        Self {
            node,
            pod,
            host,
            remote,
        }
    }
}

/// The addresses of one family in the lab.
struct Addressed {
    pod: &'static str,
    host: &'static str,
    remote_pod: &'static str,
    outside: &'static str,
    spoofed: &'static str,
    spoofed_own: &'static str,
    public: &'static str,
    base: &'static str,
}

const FAMILIES: [Addressed; 2] = [
    Addressed {
        pod: "10.244.1.5",
        host: "192.0.2.9",
        remote_pod: "10.244.2.5",
        outside: "203.0.113.5",
        spoofed: "10.244.3.3",
        spoofed_own: "10.244.1.77",
        public: "198.51.100.1",
        base: "10.244.1.0",
    },
    Addressed {
        pod: "fd00:244:0:1::5",
        host: "2001:db8:3::9",
        remote_pod: "fd00:244:0:2::5",
        outside: "2001:db8:5::5",
        spoofed: "fd00:244:0:3::3",
        spoofed_own: "fd00:244:0:1::77",
        public: "2001:db8:1::1",
        base: "fd00:244:0:1::",
    },
];

fn at(address: &str, port: u16) -> String {
    SocketAddr::new(address.parse().expect("an address"), port).to_string()
}

fn ip(address: &str) -> IpAddr {
    address.parse().expect("an address")
}

/// Runs `check` on the managers that work in this kernel, in the node of a fresh lab each.
fn with_managers(check: impl Fn(&Lab, &mut Manager) + Sync) {
    let mut seen = Vec::new();
    for prefer_nft in [true, false] {
        let lab = Lab::new();
        let opened = lab.node.run(|| {
            let mut manager = Manager::open(prefer_nft).expect("a manager");
            let name = if matches!(manager, Manager::Nft(_)) {
                "nft"
            } else {
                "iptables"
            };
            if !seen.contains(&name) {
                check(&lab, &mut manager);
            }
            name
        });
        seen.push(opened);
    }
    eprintln!("checked with {seen:?}");
}

/// Which iptables works in this kernel, as it stands in the programs' names.
fn variant() -> String {
    Iptables::open().expect("iptables").variant()
}

fn number(tally: Tally) -> u64 {
    assert!(
        tally.bytes >= tally.packets * 29,
        "bytes are counted with headers: {tally:?}"
    );
    tally.packets
}

#[test]
fn a_node_without_a_lease_has_the_guard_and_nothing_else() {
    let firewall = Firewall {
        own: Subnets::default(),
        bases: Addresses::default(),
        ..dual_stack()
    };
    let rules = firewall.rules();
    assert_eq!(rules.len(), 4);
    assert!(rules.iter().all(|rule| matches!(rule, Rule::Refuse(..))), "{rules:?}");
}

#[test]
fn without_masquerade_what_pods_send_outside_is_not_named() {
    let rules = Firewall {
        masquerade: false,
        ..dual_stack()
    }
    .rules();
    let multicast_or_outside = |rule: &Rule| match rule {
        Rule::Translate {
            from: Some(from), to, ..
        } => dual_stack().own.iter().any(|own| own == *from) && to != &Some(*from),
        _ => false,
    };
    assert!(!rules.iter().any(multicast_or_outside), "{rules:?}");
}

#[test]
#[ignore = "needs root and a kernel with nf_tables"]
fn nft_lists_the_table_as_it_is_meant() {
    let node = Net::new();
    let listing = node.run(|| {
        Nft::open().expect("nf_tables").apply(&dual_stack()).expect("applied");
        node.sh("nft list ruleset")
    });
    assert_eq!(listing, include_str!("golden.nft"));
}

#[test]
#[ignore = "needs root and a kernel with nf_tables or iptables"]
fn sources_are_translated_where_they_must_be_and_nowhere_else() {
    with_managers(|lab, manager| {
        manager.apply(&dual_stack()).expect("applied");
        for family in &FAMILIES {
            let remote = lab.remote.socket(&at(family.remote_pod, 7000));
            let host = lab.host.socket(&at(family.host, 0));
            let pod = lab.pod.socket(&at(family.pod, 7000));
            let outside = lab.remote.socket(&at(family.outside, 7000));
            assert_eq!(
                seen_and_answered(&host, &remote),
                ip(family.base),
                "foreign to remote pod"
            );
            let node = lab.node.socket(&at(family.public, 0));
            assert_eq!(
                seen_and_answered(&node, &remote),
                ip(family.base),
                "the node itself to remote pod"
            );
            assert_eq!(
                seen_and_answered(&pod, &remote),
                ip(family.pod),
                "own pod to remote pod"
            );
            assert_eq!(seen_and_answered(&host, &pod), ip(family.host), "foreign to own pod");
            assert_eq!(
                seen_and_answered(&pod, &outside),
                ip(family.public),
                "own pod to the outside"
            );
        }
        // Without masquerade: the pod's own source. Another port, as a known connection keeps its translation.
        manager
            .apply(&Firewall {
                masquerade: false,
                ..dual_stack()
            })
            .expect("applied");
        for family in &FAMILIES {
            let (pod, outside) = (
                lab.pod.socket(&at(family.pod, 0)),
                lab.remote.socket(&at(family.outside, 7001)),
            );
            assert_eq!(seen(&pod, &outside, Duration::from_secs(3)), Some(ip(family.pod)));
        }
    });
}

#[test]
#[ignore = "needs root and a kernel with nf_tables or iptables"]
fn ours_comes_before_a_masquerade_of_kube_proxy() {
    with_managers(|lab, manager| {
        lab.node.feed(
            &format!("iptables{}-restore --noflush", variant()),
            "*nat\n-A POSTROUTING -j MASQUERADE\nCOMMIT\n",
        );
        manager.apply(&dual_stack()).expect("applied");
        let family = &FAMILIES[0];
        let remote = lab.remote.socket(&at(family.remote_pod, 7000));
        let host = lab.host.socket(&at(family.host, 0));
        assert_eq!(seen_and_answered(&host, &remote), ip(family.base));
    });
}

#[test]
#[ignore = "needs root and a kernel with nf_tables or iptables"]
fn plaintext_of_the_mesh_is_counted_and_dropped_at_the_uplink_both_ways() {
    with_managers(|lab, manager| {
        manager.apply(&dual_stack()).expect("applied");
        let mut expected = Counters::default();
        for family in &FAMILIES {
            let length = if family.pod.contains(':') { "-6 " } else { "" };
            let gateway = if family.pod.contains(':') {
                "2001:db8:1::1"
            } else {
                "198.51.100.1"
            };
            let bits = if family.pod.contains(':') { 128 } else { 32 };
            lab.remote
                .ip(&format!("{length}route replace {}/{bits} via {gateway}", family.pod));
            let pod = lab.pod.socket(&at(family.pod, 7000));
            for source in [family.spoofed, family.spoofed_own, family.remote_pod] {
                if source != family.remote_pod {
                    lab.remote.address(&format!("{source}/{bits}"), "lo");
                }
                let liar = lab.remote.socket(&at(source, 0));
                assert_eq!(seen(&liar, &pod, SILENCE), None, "{source} in plaintext");
                expected.arriving.packets += 1;
            }
            let honest = lab.remote.socket(&at(family.outside, 0));
            assert_eq!(seen(&honest, &pod, Duration::from_secs(3)), Some(ip(family.outside)));

            // A route that sends the mesh out of the uplink, as no guard of routes or policies stops it here.
            let remote = lab.remote.socket(&at(family.remote_pod, 7000));
            let via = if family.pod.contains(':') {
                "2001:db8:1::2"
            } else {
                "198.51.100.2"
            };
            lab.node
                .ip(&format!("{length}route add {}/{bits} via {via}", family.remote_pod));
            for sender in [
                lab.pod.socket(&at(family.pod, 0)),
                lab.node.socket(&at(family.base, 0)),
                lab.host.socket(&at(family.host, 0)),
            ] {
                assert_eq!(seen(&sender, &remote, SILENCE), None, "{sender:?} out in plaintext");
                expected.leaving.packets += 1;
            }
        }
        let counted = manager.counters().expect("counters");
        assert_eq!(number(counted.arriving), expected.arriving.packets);
        assert_eq!(number(counted.leaving), expected.leaving.packets);
        manager
            .apply(&Firewall {
                masquerade: false,
                ..dual_stack()
            })
            .expect("applied");
        assert_eq!(
            manager.counters().expect("counters"),
            counted,
            "a rewrite keeps the numbers"
        );
        // Where peers' plaintext is let in, the own subnet is still nobody else's.
        let ajar = Firewall {
            form: Form::Ajar,
            ..dual_stack()
        };
        manager.apply(&ajar).expect("applied");
        assert!(manager.verify(&ajar).expect("read") && !manager.verify(&dual_stack()).expect("read"));
        for family in &FAMILIES {
            let pod = lab.pod.socket(&at(family.pod, 7000));
            let liar = lab.remote.socket(&at(family.spoofed_own, 0));
            assert_eq!(seen(&liar, &pod, SILENCE), None, "as one of its own");
            let peer = lab.remote.socket(&at(family.remote_pod, 0));
            assert_eq!(seen(&peer, &pod, Duration::from_secs(3)), Some(ip(family.remote_pod)));
            let sender = lab.pod.socket(&at(family.pod, 0));
            let remote = lab.remote.socket(&at(family.remote_pod, 7000));
            assert_eq!(seen(&sender, &remote, Duration::from_secs(3)), Some(ip(family.pod)));
        }
        manager.remove().expect("removed");
        assert_eq!(manager.counters().expect("counters"), Counters::default());
    });
}

#[test]
#[ignore = "needs root and a kernel with nf_tables or iptables"]
fn what_others_made_stays_as_it_was() {
    const THEIRS: &str = "\
*raw
-A PREROUTING -s 192.0.2.77/32 -j DROP
COMMIT
*mangle
-A POSTROUTING -s 192.0.2.77/32 -j MARK --set-xmark 0x1/0x1
COMMIT
*nat
:KUBE-POSTROUTING - [0:0]
-A POSTROUTING -m comment --comment \"kubernetes postrouting rules\" -j KUBE-POSTROUTING
-A KUBE-POSTROUTING -j MASQUERADE
COMMIT
";
    let ruleset = |lab: &Lab| {
        let variant = variant();
        let all = lab.node.sh(&format!("iptables{variant}-save")) + &lab.node.sh(&format!("ip6tables{variant}-save"));
        all.lines()
            .filter(|line| !line.starts_with('#') && !line.starts_with(':'))
            .collect::<Vec<_>>()
            .join("\n")
    };
    with_managers(|lab, manager| {
        let variant = variant();
        lab.node.feed(&format!("iptables{variant}-restore --noflush"), THEIRS);
        lab.node.feed(
            &format!("ip6tables{variant}-restore --noflush"),
            &THEIRS.replace("192.0.2.77/32", "2001:db8::77/128"),
        );
        let before = ruleset(lab);
        for _ in 0..2 {
            manager.apply(&dual_stack()).expect("applied");
            manager.apply(&dual_stack()).expect("applied again");
            assert!(manager.verify(&dual_stack()).expect("read"));
            let with_ours = ruleset(lab);
            let theirs: Vec<&str> = with_ours.lines().filter(|line| !line.contains("RINGMAIL")).collect();
            assert_eq!(theirs.join("\n"), before);
            manager.remove().expect("removed");
            manager.remove().expect("nothing to remove");
            assert_eq!(ruleset(lab), before);
        }
    });
}

#[test]
#[ignore = "needs root and a kernel with nf_tables and iptables"]
fn nft_and_iptables_leave_nothing_when_the_other_has_taken_over() {
    with_managers(|lab, manager| {
        let mut other = match manager {
            Manager::Nft(_) => Manager::open(false).expect("iptables"),
            Manager::Iptables(_) => Manager::open(true).expect("nf_tables"),
        };
        other.apply(&dual_stack()).expect("applied");
        manager.apply(&dual_stack()).expect("applied");
        manager.remove_other().expect("removed");
        assert!(manager.verify(&dual_stack()).expect("read"));
        assert!(!other.verify(&dual_stack()).expect("read"));
        let left = lab.node.sh("nft list ruleset");
        assert_eq!(
            left.contains("RINGMAIL"),
            matches!(manager, Manager::Iptables(_)),
            "{left}"
        );
        assert_eq!(
            left.contains("inet ringmail"),
            matches!(manager, Manager::Nft(_)),
            "{left}"
        );
    });
}

#[test]
#[ignore = "needs root and a kernel with nf_tables"]
fn nft_is_asked_what_it_can_do_without_leaving_a_trace() {
    let node = Net::new();
    let listing = node.run(|| {
        Nft::open().expect("nf_tables");
        node.sh("nft list ruleset")
    });
    assert_eq!(listing, "");
}

/// Changes by hand to the table, each undone by the next apply.
const NFT_BY_HAND: [&str; 8] = [
    "flush chain inet ringmail arriving",
    "add rule inet ringmail source accept",
    "insert rule inet ringmail arriving accept",
    "delete table inet ringmail",
    "flush ruleset",
    "add chain inet ringmail mine",
    "add table inet ringmail { flags dormant; }",
    "add chain inet ringmail arriving { policy drop; }",
];

#[test]
#[ignore = "needs root and a kernel with nf_tables"]
fn nft_tells_and_shows_a_change_by_hand_and_ours_is_none() {
    let node = Net::new();
    node.run(|| {
        let mut manager = Manager::open(true).expect("nf_tables");
        let mut monitor = manager.monitor().expect("monitor").expect("nf_tables tells");
        let mut touched = |manager: &Manager| {
            let mut any = false;
            monitor
                .read(&mut |message| any |= manager.touched(message))
                .expect("notifications");
            any
        };
        assert!(!manager.verify(&dual_stack()).expect("read"), "before the first apply");
        for change in NFT_BY_HAND {
            manager.apply(&dual_stack()).expect("applied");
            assert_eq!(
                node.sh("nft list table inet ringmail"),
                include_str!("golden.nft"),
                "mended"
            );
            assert!(manager.verify(&dual_stack()).expect("read"));
            assert!(
                !manager
                    .verify(&Firewall {
                        masquerade: false,
                        ..dual_stack()
                    })
                    .expect("read")
            );
            assert!(!touched(&manager), "our own change");
            node.feed("nft -f -", "add table inet foreign\nadd chain inet foreign ringmail\n");
            assert!(!touched(&manager), "another's table");
            assert!(manager.verify(&dual_stack()).expect("read"), "another's table");
            node.feed("nft -f -", change);
            assert!(touched(&manager), "{change}");
            assert!(!manager.verify(&dual_stack()).expect("read"), "{change}");
        }
        let rule = |handle: &str| {
            let line = node
                .sh("nft -a list chain inet ringmail leaving")
                .lines()
                .find(|line| line.contains(handle))
                .map(str::to_owned);
            line.expect("a rule").rsplit(' ').next().expect("a handle").to_owned()
        };
        manager.apply(&dual_stack()).expect("applied");
        node.sh(&format!(
            "nft delete rule inet ringmail leaving handle {}",
            rule("ip6 daddr")
        ));
        assert!(
            touched(&manager) && !manager.verify(&dual_stack()).expect("read"),
            "one rule deleted"
        );
    });
}

#[test]
#[ignore = "needs root and a kernel with iptables"]
fn a_change_of_the_chains_by_hand_is_seen() {
    let node = Net::new();
    node.run(|| {
        let mut manager = Manager::Iptables(Iptables::open().expect("iptables"));
        let variant = variant();
        for change in [
            "iptables -t raw -F RINGMAIL-PREROUTING",
            "iptables -t raw -I PREROUTING -j ACCEPT",
            "iptables -t nat -I POSTROUTING -j MASQUERADE",
            "ip6tables -t mangle -D RINGMAIL-GUARD 1",
            "ip6tables -t nat -A RINGMAIL-POSTROUTING -j ACCEPT",
            "iptables -t nat -D POSTROUTING -m comment --comment ringmail -j RINGMAIL-POSTROUTING",
            "iptables -t nat -F",
        ] {
            manager.apply(&dual_stack()).expect("applied");
            assert!(manager.verify(&dual_stack()).expect("read"));
            node.sh(&change.replacen("tables", &format!("tables{variant}"), 1));
            assert!(!manager.verify(&dual_stack()).expect("read"), "{change}");
        }
        manager.apply(&dual_stack()).expect("applied");
        assert!(manager.verify(&dual_stack()).expect("read"));
    });
}

#[test]
#[ignore = "needs root and a kernel with nf_tables or iptables"]
fn a_rewrite_under_traffic_loses_no_packet_and_lets_no_spoofed_one_in() {
    use std::sync::atomic::{AtomicBool, Ordering};
    with_managers(|lab, manager| {
        let family = &FAMILIES[0];
        manager.apply(&dual_stack()).expect("applied");
        lab.remote
            .ip(&format!("route replace {}/32 via 198.51.100.1", family.pod));
        lab.remote.address(&format!("{}/32", family.spoofed), "lo");
        let liar = lab.remote.socket(&at(family.spoofed, 0));
        let pod = lab.pod.socket(&at(family.pod, 7000));
        let done = AtomicBool::new(false);
        let (rewrites, flows) = std::thread::scope(|scope| {
            let spoof = scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    let _ = liar.send_to(b"?", at(family.pod, 7000));
                    // A kernel with one processor has other work too.
                    std::thread::sleep(Duration::from_micros(200));
                }
            });
            // A new flow each time: each one asks the rules for its source anew.
            let flows = scope.spawn(|| {
                let remote = lab.remote.socket(&at(family.remote_pod, 7000));
                let mut flows = 0;
                while !done.load(Ordering::Relaxed) {
                    let host = lab.host.socket(&at(family.host, 0));
                    assert_eq!(seen_and_answered(&host, &remote), ip(family.base), "flow {flows}");
                    flows += 1;
                }
                flows
            });
            let begun = std::time::Instant::now();
            let mut rewrites = 0;
            while (rewrites < 3 || begun.elapsed() < Duration::from_secs(3)) && !flows.is_finished() {
                manager
                    .apply(&Firewall {
                        random_fully: rewrites % 2 == 0,
                        ..dual_stack()
                    })
                    .expect("applied");
                rewrites += 1;
            }
            done.store(true, Ordering::Relaxed);
            spoof.join().expect("it ends");
            (
                rewrites,
                flows.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            )
        });
        pod.set_read_timeout(Some(SILENCE)).expect("a timeout");
        assert!(
            pod.recv_from(&mut [0; 16]).is_err(),
            "a spoofed packet came in during {rewrites} rewrites"
        );
        let dropped = manager.counters().expect("counters").arriving.packets;
        eprintln!("{rewrites} rewrites, {flows} flows, {dropped} spoofed packets dropped");
        assert!(flows > 100 && dropped > 100);
    });
}

#[test]
#[ignore = "needs root and a kernel with ESP"]
fn esp_passes_the_guard_both_ways_and_the_same_packets_in_plaintext_do_not() {
    let lab = Lab::new();
    let (a, b) = ("198.51.100.1", "198.51.100.2");
    let sides = [(&lab.node, a, b, "10.244.2.0/24"), (&lab.remote, b, a, "10.244.1.0/24")];
    let encrypt = || {
        for (net, me, peer, subnet) in sides {
            for (from, to, spi, direction) in [
                (me, peer, if me == a { 1 } else { 2 }, "out"),
                (peer, me, if me == a { 2 } else { 1 }, "in"),
            ] {
                let key = "0x000102030405060708090a0b0c0d0e0f10111213";
                net.ip(&format!("xfrm state add src {from} dst {to} proto esp spi 0x100{spi} reqid 1 mode tunnel aead rfc4106(gcm(aes)) {key} 128"));
                let (selector, directions): (_, &[_]) = if direction == "out" {
                    (format!("src 0.0.0.0/0 dst {subnet}"), &["out"])
                } else {
                    (format!("src {subnet} dst 0.0.0.0/0"), &["in", "fwd"])
                };
                for direction in directions {
                    net.ip(&format!("xfrm policy add {selector} dir {direction} tmpl src {from} dst {to} proto esp reqid 1 mode tunnel"));
                }
            }
        }
    };
    encrypt();
    // Through the uplink itself, so that the guard alone tells plaintext from ESP.
    lab.node.ip("route replace 10.244.2.0/24 via 198.51.100.2");
    lab.remote.ip("route replace 10.244.1.0/24 via 198.51.100.1");
    lab.node.run(|| {
        let mut manager = Manager::open(true).expect("a manager");
        manager.apply(&dual_stack()).expect("applied");
        let name = if matches!(manager, Manager::Nft(_)) {
            "nft"
        } else {
            "iptables"
        };
        eprintln!("checked with {name}");
        let family = &FAMILIES[0];
        let remote = lab.remote.socket(&at(family.remote_pod, 7000));
        let pod = lab.pod.socket(&at(family.pod, 7000));
        let host = lab.host.socket(&at(family.host, 0));
        let base = lab.node.socket(&at(family.base, 7000));
        assert_eq!(seen_and_answered(&pod, &remote), ip(family.pod));
        assert_eq!(seen_and_answered(&remote, &pod), ip(family.remote_pod));
        assert_eq!(
            seen_and_answered(&host, &remote),
            ip(family.base),
            "translated, then encrypted"
        );
        assert_eq!(seen_and_answered(&base, &remote), ip(family.base));
        assert_eq!(seen_and_answered(&remote, &base), ip(family.remote_pod));
        assert_eq!(
            manager.counters().expect("counters"),
            Counters::default(),
            "no ESP was taken for plaintext"
        );
        let encrypted = lab.node.ip("-s xfrm state");
        assert!(
            !encrypted.contains(" 0(packets)") && !encrypted.contains(", 0(packets)"),
            "{encrypted}"
        );

        lab.node.ip("xfrm policy flush");
        for sender in [&pod, &host, &base] {
            assert_eq!(seen(sender, &remote, SILENCE), None, "out without a policy");
        }
        assert_eq!(number(manager.counters().expect("counters").leaving), 3);
        assert_eq!(manager.counters().expect("counters").arriving.packets, 0);
        lab.remote.ip("xfrm policy flush");
        assert_eq!(seen(&remote, &pod, SILENCE), None, "in as plaintext");
        assert_eq!(seen(&remote, &base, SILENCE), None, "in as plaintext");
        assert_eq!(number(manager.counters().expect("counters").arriving), 2);
    });
}
