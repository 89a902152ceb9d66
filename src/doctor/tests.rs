//! A healthy node's facts, and each trouble done to them: what is found, and that nothing else is. The texts stand in
//! tests/golden/doctor, tests/kernel/test_doctor.py and test_doctor_keys.py make the troubles for real.

mod judged;

use std::collections::BTreeSet;
use std::io::Read as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use serde_json::{Value, json};

use super::facts::*;
use super::read::conf;
use super::{Facts, bundle, examine, notes};
use crate::kernel::firewall::lab::Net;
use crate::testing::Folder;

/// A PSK and a key of an SA that must never show.
const PSK: &str = "Zm9yIHRlc3RzIG9mIHRoaXMgcmVwb3NpdG9yeSBvbmx5";

fn peer(name: &str, number: u8) -> Value {
    json!({
        "node": name, "subnets": [format!("10.244.{number}.0/24")], "address": format!("192.0.2.{number}"), "state": "up",
        "reason": null, "generation": "1764000001>1764000002", "newest": null, "spi_out": "0x00002042",
        "spi_in": "0x00003042", "encap": "esp", "heard": 4.0, "round_trip": 0.4 + f64::from(number) / 10.0, "loss": 0.0,
        "full_size": true, "bytes_out": 1000, "bytes_in": 1000, "packets_out": 10, "packets_in": 10, "errors": 0
    })
}

fn lease(name: &str, number: u8) -> Value {
    json!({
        "node": name, "subnets": [format!("10.244.{number}.0/24")], "public": [format!("192.0.2.{number}")],
        "backend": "ipsec", "epoch": 1_764_000_000u64 + u64::from(number),
        "verdict": if number == 1 { "own" } else { "verified" }, "reason": null
    })
}

fn link(index: u32, name: &str, kind: &str, mtu: u32, master: Option<u32>) -> Link {
    Link {
        index,
        name: name.into(),
        kind: kind.into(),
        mtu,
        up: true,
        master,
    }
}

fn route(net: &str, link: &str, protocol: u8) -> Route {
    Route {
        net: net.parse().unwrap(),
        kind: "unicast".into(),
        table: 254,
        protocol,
        link: Some(link.into()),
        gateway: None,
        metric: 0,
    }
}

fn policy(ours: bool, direction: &str, from: &str, to: &str, priority: u32) -> Policy {
    Policy {
        ours,
        direction: direction.into(),
        from: from.parse().unwrap(),
        to: to.parse().unwrap(),
        narrow: false,
        priority,
        action: "tunnel 192.0.2.1 > 192.0.2.2 reqid 1379926018".into(),
    }
}

fn rule(priority: u32, table: u32) -> Rule {
    Rule {
        family: 4,
        priority,
        from: None,
        to: None,
        narrow: false,
        action: "lookup".into(),
        table,
    }
}

/// Node node-a and its peers node-b to node-d, all in order.
pub(crate) fn healthy() -> Facts {
    let report: crate::node::report::Report = serde_json::from_value(report_of_a_healthy_node()).unwrap();
    let leases = json!({
        "own": "node-a", "complete": true, "rejected": {},
        "leases": [lease("node-a", 1), lease("node-b", 2), lease("node-c", 3), lease("node-d", 4)]
    });
    let audit = json!({
        "ok": true, "node": "node-a", "plaintext": [], "differences": [], "associations": [], "objects": {"Sa": 6}
    });
    let texts = [
        ("cpuinfo", "processor\t: 0\nflags\t\t: fpu vme sse2 aes avx\n"),
        (
            "meminfo",
            "MemTotal:       2048000 kB\nMemFree: 100000 kB\nMemAvailable:   1500000 kB\n",
        ),
        (XFRM_STAT, "XfrmInError             \t0\nXfrmInNoStates          \t3\n"),
        (SNMP, "Udp: InDatagrams RcvbufErrors\nUdp: 100 7\n"),
        (NETSTAT, "TcpExt: SyncookiesSent IPReversePathFilter\nTcpExt: 0 5\n"),
        ("net/stat/arp_cache", "entries  allocs\n00000004 00000040\n"),
        ("sys/net/netfilter/nf_conntrack_count", "100\n"),
        ("sys/net/netfilter/nf_conntrack_max", "65536\n"),
        ("sys/net/ipv4/neigh/default/gc_thresh3", "1024\n"),
        ("sys/net/ipv4/conf/eth0/rp_filter", "1\n"),
        ("sys/net/ipv4/conf/eth0/forwarding", "1\n"),
        ("sys/net/ipv4/conf/cni0/forwarding", "1\n"),
    ];
    let texts: std::collections::BTreeMap<String, String> = texts
        .iter()
        .map(|(path, text)| ((*path).to_owned(), (*text).to_owned()))
        .collect();
    let watched = [XFRM_STAT, SNMP, NETSTAT];
    Facts {
        version: "0.1.0".into(),
        now: 1_764_000_200,
        watched: 2.0,
        report: Some(report.clone()),
        later_report: Some(report),
        audit: serde_json::from_value(audit).unwrap(),
        leases: serde_json::from_value(leases).unwrap(),
        process: Some(Process {
            pid: 4711,
            open: 20,
            limit: 1024,
        }),
        lease_dir: Some("/var/lib/ringmail".into()),
        subnet_file: Some("/run/flannel/subnet.env".into()),
        subnet_env: Some("FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_MTU=1446\n".into()),
        conf: Some(conf(
            PathBuf::from("/var/lib/ringmail/net-conf.json"),
            &format!(r#"{{"Network": "10.244.0.0/16", "Backend": {{"Type": "ipsec", "PSK": "{PSK}"}}}}"#),
        )),
        later: watched
            .iter()
            .map(|path| ((*path).to_owned(), texts[*path].clone()))
            .collect(),
        texts,
        links: vec![
            link(2, "eth0", "", 1500, None),
            link(3, "ringmail0", "dummy", 1446, None),
            link(4, "cni0", "bridge", 1446, None),
            link(5, "veth1", "veth", 1446, Some(4)),
        ],
        routes: vec![
            route("0.0.0.0/0", "eth0", 3),
            route("192.0.2.0/24", "eth0", 2),
            route("10.244.1.0/24", "cni0", 2),
            route("10.244.2.0/24", "ringmail0", 114),
            route("10.0.0.0/8", "eth0", 3),
            route("172.17.0.0/16", "docker0", 2),
        ],
        rules: vec![rule(0, 255), rule(32_766, 254), rule(32_767, 253)],
        policies: vec![
            policy(true, "out", "0.0.0.0/0", "10.244.2.0/24", 0x7269_0200),
            policy(false, "out", "192.168.0.0/16", "10.99.0.0/16", 10),
        ],
        associations: (6, 0),
        reached_by: [("192.0.2.2".parse().unwrap(), "eth0".to_owned())].into(),
        filters: vec![
            nft(
                "forward",
                "drop",
                json!([{"match": {"op": "==", "left": {"payload": {"protocol": "ip", "field": "saddr"}},
                        "right": {"prefix": {"addr": "10.244.0.0", "len": 16}}}}, {"accept": null}]),
            ),
            iptables(&[
                "[7:700] -A INPUT -i lo -j ACCEPT",
                "[7:700] -A INPUT -p tcp -m tcp --dport 22 -m comment --comment \"to \\\"administer\\\"\" -j ACCEPT",
                "[7:700] -A INPUT -m conntrack --ctstate INVALID -j DROP",
                "[7:700] -A INPUT -s 192.0.2.0/24 -p esp -j ACCEPT",
                "[7:700] -A INPUT -s 192.0.2.0/24 -p udp -m multiport --dports 4500,8472 -j ACCEPT",
                "[0:0] -A INPUT -j DROP",
                "[0:0] -A OUTPUT ! -o lo -j KUBE-OUT",
                "[0:0] -A KUBE-OUT -d 203.0.113.0/24 -j REJECT --reject-with icmp-port-unreachable",
            ]),
        ],
        cni_folder: "/etc/cni/net.d".into(),
        cni: vec![
            CniFile {
                name: "10-flannel.conflist".into(),
                plugins: vec!["flannel".into(), "portmap".into()],
            },
            CniFile {
                name: "99-loopback.conf".into(),
                plugins: vec!["loopback".into()],
            },
        ],
        ..Facts::default()
    }
}

fn nft(hook: &str, policy: &str, expression: Value) -> FilterText {
    let text = json!({"nftables": [
        {"metainfo": {"version": "1.0.6"}},
        {"table": {"family": "inet", "name": "host", "handle": 1}},
        {"chain": {"family": "inet", "table": "host", "name": hook, "handle": 1, "type": "filter", "hook": hook,
                   "prio": 0, "policy": policy}},
        {"rule": {"family": "inet", "table": "host", "chain": hook, "handle": 5, "expr": expression}},
    ]});
    FilterText {
        by: FilterKind::Nft,
        program: "nft".into(),
        text: text.to_string(),
    }
}

fn iptables(rules: &[&str]) -> FilterText {
    let chains = ":INPUT ACCEPT [0:0]\n:FORWARD ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n:KUBE-OUT - [0:0]";
    FilterText {
        by: FilterKind::Iptables4,
        program: "iptables-legacy".into(),
        text: format!("*filter\n{chains}\n{}\nCOMMIT\n", rules.join("\n")),
    }
}

/// Every finding there is, and facts that have it and no other.
pub(crate) fn cases() -> Vec<(&'static str, Facts)> {
    let with = |name: &'static str, change: &dyn Fn(&mut Facts)| {
        let mut facts = healthy();
        change(&mut facts);
        (name, facts)
    };
    let problem =
        |name: &'static str, text: &'static str| with(name, &move |f| report(f).problems.push(text.to_owned()));
    let silent = |f: &mut Facts| {
        let peer = &mut report(f).peers[0];
        peer.state = crate::node::report::State::Waiting;
        peer.reason = Some(
            "no probe came back yet: is its daemon running, does it see this node's lease, does ESP (or UDP) pass?"
                .into(),
        );
    };
    let grown = |f: &mut Facts, path: &str, text: &str| f.later.insert(path.to_owned(), text.to_owned());
    vec![
        with("daemon-absent", &|f| {
            absent(
                f,
                true,
                "no daemon answers at /run/ringmail/control.sock: is ringmail running?",
            );
        }),
        with("daemon-silent", &|f| {
            absent(
                f,
                false,
                "the daemon at /run/ringmail/control.sock did not answer within 35 s: see its log",
            );
        }),
        with("kernel-lacks", &|f| {
            f.kernel_lacks = Some(
                "this kernel takes no ESP over IPv4 with chacha20poly1305: load what is missing (`modprobe -a esp4 \
                 chacha20poly1305`), or run a kernel that has it: Function not implemented (os error 38)"
                    .into(),
            );
        }),
        problem("uplink-missing", "no uplink now: no interface fits; see --iface"),
        problem("lease-missing", "no lease yet"),
        problem(
            "store-outage",
            "the store can't be read for 12 s now: open /var/lib/ringmail: No such file or directory",
        ),
        problem(
            "psk-unreadable",
            "the PSK can't be read, those in use stay: /etc/ringmail/psk: Permission denied",
        ),
        problem(
            "configuration-refused",
            "the new configuration is refused, the last good one is in force: UDPEncap \"maybe\": true, false or auto",
        ),
        problem(
            "epoch-stalled",
            "no new epoch can begin: all 64 epoch numbers of this node are in use by SAs in the kernel: remove old SAs with \
             `systemctl stop ringmail && ringmail cleanup`, and start it again",
        ),
        problem(
            "claimed-twice",
            "subnet 10.244.1.0/24 of this node is also claimed by node-x: remove that lease",
        ),
        problem(
            "plaintext-allowed",
            "AllowPlaintextPeers is on, and no peer needs it: take it out of net-conf.json",
        ),
        problem(
            "psk-needed",
            "1 node still needs key 0011223344556677, which was taken from this node: node-b; it is dropped in 60 s",
        ),
        problem(
            "psk",
            "no other node has a PSK of this one, 2 nodes have another: is this node's the right one?",
        ),
        problem(
            "plaintext-dropped",
            "the guard has dropped 3 packets of the mesh that came in by eth0 without ESP, forged or from a node that does not \
             encrypt (look on the wire who sends them); once mended, set the count back: nft reset counters table inet ringmail",
        ),
        problem(
            "in-the-way",
            "node: make guard policy Block dir out src 0.0.0.0/0 dst 10.244.0.0/16: policy dir out src 0.0.0.0/0 dst \
             10.244.0.0/16 priority 5 is in the way and is not ringmail's; remove it: ip xfrm policy delete dir out src \
             0.0.0.0/0 dst 10.244.0.0/16",
        ),
        problem(
            "port-refused",
            "UDP 192.0.2.1:4500 is in use by another program, and UDPEncap needs it: find the holder with `ss -ulpn 'sport = \
             :4500'` and stop it, or set EncapPort in net-conf.json on every node",
        ),
        problem("problem", "something that this version of the doctor has not heard of"),
        with("drift", &|f| {
            let difference = json!({"differs": "missing", "object": "route 10.244.2.0/24",
                "wanted": "dev ringmail0 src 10.244.1.0", "found": null, "show": "ip route show exact 10.244.2.0/24"});
            f.audit
                .as_mut()
                .unwrap()
                .differences
                .push(serde_json::from_value(difference).unwrap());
        }),
        with("plaintext-open", &|f| {
            f.audit
                .as_mut()
                .unwrap()
                .plaintext
                .push("no block policy out to 10.244.0.0/16: only the routes stop it".into());
        }),
        with("plaintext-seen", &|f| {
            let counters = f.later_report.as_mut().unwrap().plaintext.as_mut().unwrap();
            counters.arriving.packets = 3;
        }),
        with("port-taken", &|f| {
            report(f).encap = "auto".into();
            f.sockets.push(Socket {
                port: 4500,
                program: Some("charon".into()),
                pid: Some(99),
                kernel: false,
            });
        }),
        with("descriptors", &|f| f.process.as_mut().unwrap().open = 1000),
        with("peer-refused", &|f| {
            let peer = &mut report(f).peers[0];
            peer.state = crate::node::report::State::Refused;
            peer.reason = Some(
                "no common PSK: it has 0000000000000000, this node has 0011223344556677; give both nodes the same key"
                    .into(),
            );
        }),
        with("peer-waiting", &|f| {
            silent(f);
            let psk = json!({"kid": "0011223344556677", "withdrawn": false, "dropped_in": null, "have": 1, "nodes": 1,
                "missing": [], "needed_by": []});
            report(f).psks.push(serde_json::from_value(psk).unwrap());
            report(f).peers[0].reason =
                Some("no common PSK with its newest epoch: give both nodes the same key".into());
        }),
        with("peer-unreachable", &|f| {
            silent(f);
            f.echoes.insert("192.0.2.2".parse().unwrap(), false);
        }),
        with("esp-filtered", &|f| {
            silent(f);
            f.echoes.insert("192.0.2.2".parse().unwrap(), true);
        }),
        with("peer-kept", &|f| {
            let peer = &mut report(f).peers[0];
            peer.state = crate::node::report::State::Kept;
            peer.reason = Some("keys of an earlier process, until a probe comes back".into());
        }),
        with("peer-doubtful", &|f| {
            report(f).peers[0].reason =
                Some("its lease is gone from the store for 40 s, and it is served while it answers".into());
        }),
        with("peer-silent", &|f| {
            let peer = &mut report(f).peers[0];
            (peer.silent, peer.loss, peer.heard) = (Some(crate::node::report::Comes::Nothing), Some(0.6), Some(52.0));
            peer.reason = Some("silent for 52 s: is the node up, does its daemon run, does ESP (or UDP) pass?".into());
            f.echoes.insert("192.0.2.2".parse().unwrap(), true);
        }),
        with("esp-detour", &|f| {
            report(f).peers[0].detour = Some("plain ESP is not answered since 40 s".into());
        }),
        with("loss", &|f| {
            let peer = &mut report(f).peers[0];
            (peer.loss, peer.unanswered) = (Some(0.25), 1);
        }),
        with("latency", &|f| report(f).peers[0].round_trip = Some(90.0)),
        with("peer-errors", &|f| {
            f.later_report.as_mut().unwrap().peers[0].errors = 12;
        }),
        with("subnet-twice", &|f| add_lease(f, lease("node-x", 3))),
        with("subnet-outside", &|f| {
            let mut stray = lease("node-x", 5);
            stray["subnets"] = json!(["10.99.5.0/24"]);
            add_lease(f, stray);
        }),
        with("subnets-used-up", &|f| room(f, 4)),
        with("subnets-nearly-used-up", &|f| {
            room(f, 40);
            for number in 5..=38 {
                add_lease(f, lease("node-x", number));
            }
        }),
        with("lease-unreadable", &|f| {
            let rejected = &mut f.leases.as_mut().unwrap().rejected;
            rejected.insert(
                "10.244.9.0-24.json".into(),
                "no JSON: expected value at line 1 column 1".into(),
            );
        }),
        with("pod-mtu", &|f| f.links[3].mtu = 1500),
        with("subnet-env-missing", &|f| f.subnet_env = None),
        with("subnet-env-mtu", &|f| {
            f.subnet_env = Some("FLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_MTU=1500\n".into());
        }),
        with("subnet-env-subnet", &|f| {
            f.subnet_env = Some("FLANNEL_SUBNET=10.244.7.1/24\nFLANNEL_MTU=1446\n".into());
        }),
        with("path-mtu", &|f| report(f).peers[0].full_size = Some(false)),
        with("route-shadow", &|f| f.routes.push(route("10.244.2.128/25", "eth0", 3))),
        with("network-overlap", &|f| {
            f.routes.push(route("10.244.200.0/24", "docker0", 2));
        }),
        with("rule-shadow", &|f| {
            f.rules.push(rule(100, 7));
            let there = Route {
                table: 7,
                ..route("0.0.0.0/0", "eth1", 3)
            };
            f.routes.push(there);
        }),
        with("policy-shadow", &|f| {
            f.policies.push(policy(false, "out", "0.0.0.0/0", "10.244.2.0/25", 100));
        }),
        with("forwarding", &|f| set(f, "sys/net/ipv4/conf/cni0/forwarding", "0\n")),
        with("rp-filter", &|f| {
            f.reached_by.insert("192.0.2.3".parse().unwrap(), "eth1".into());
        }),
        with("filter-drops", &|f| {
            f.filters.push(iptables(&["[12:1400] -A INPUT -p esp -j DROP"]));
        }),
        with("leftover-device", &|f| {
            f.links.push(link(9, "flannel.1", "vxlan", 1450, None));
        }),
        with("leftover-rules", &|f| {
            let mut theirs = iptables(&[]);
            theirs.text = theirs.text.replace(":KUBE-OUT", ":FLANNEL-FWD");
            f.filters.push(theirs);
        }),
        with("cni-order", &|f| {
            let first = CniFile {
                name: "05-cilium.conflist".into(),
                plugins: vec!["cilium-cni".into()],
            };
            f.cni.insert(0, first);
        }),
        with("xfrm-counter", &|f| {
            grown(f, XFRM_STAT, "XfrmInError 0\nXfrmInNoStates 9\n");
        }),
        with("udp-buffers", &|f| {
            grown(f, SNMP, "Udp: InDatagrams RcvbufErrors\nUdp: 200 47\n");
        }),
        with("conntrack", &|f| {
            set(f, "sys/net/netfilter/nf_conntrack_count", "65000\n");
        }),
        with("neighbours", &|f| {
            set(f, "net/stat/arp_cache", "entries  allocs\n000003f0 00000040\n");
        }),
        with("memory", &|f| {
            set(f, "meminfo", "MemTotal:       2048000 kB\nMemAvailable:   50000 kB\n");
        }),
        with("clock-back", &|f| f.now -= 3600),
        with("clock-ahead", &|f| {
            f.leases.as_mut().unwrap().leases[1].epoch = Some(1_764_009_000);
        }),
        // /proc/cpuinfo of a Raspberry Pi 4: its cores have no cryptography extension.
        with("no-aes", &|f| {
            set(
                f,
                "cpuinfo",
                "processor\t: 0\nFeatures\t: fp asimd evtstrm crc32 cpuid\n",
            );
        }),
    ]
}

fn report_of_a_healthy_node() -> Value {
    json!({
        "node": "node-a", "network": ["10.244.0.0/16"], "subnets": ["10.244.1.0/24"], "public": ["192.0.2.1"],
        "uplink": "eth0", "mtu": 1446, "backend": "ipsec", "cipher": "aes128gcm16", "encap": "false",
        "plaintext": {"arriving": {"packets": 0, "bytes": 0}, "leaving": {"packets": 0, "bytes": 0}},
        "epoch": 1_764_000_001u64, "epoch_age": 100, "next_epoch": null, "psks": [], "complete": true, "problems": [],
        "rejected": {}, "peers": [peer("node-b", 2), peer("node-c", 3), peer("node-d", 4)]
    })
}

fn report(facts: &mut Facts) -> &mut crate::node::report::Report {
    facts.report.as_mut().expect("the healthy node has one")
}

fn absent(facts: &mut Facts, absent: bool, why: &str) {
    facts.unanswered = Some(Unanswered {
        absent,
        why: why.into(),
    });
    (facts.report, facts.later_report, facts.audit, facts.leases) = (None, None, None, None);
}

fn add_lease(facts: &mut Facts, lease: Value) {
    facts
        .leases
        .as_mut()
        .unwrap()
        .leases
        .push(serde_json::from_value(lease).unwrap());
}

fn room(facts: &mut Facts, subnets: u64) {
    facts.conf.as_mut().unwrap().capacity = Some([("IPv4".to_owned(), subnets)].into());
}

fn set(facts: &mut Facts, path: &str, text: &str) {
    facts.texts.insert(path.into(), text.into());
}

#[test]
fn a_healthy_node_has_no_finding_and_its_old_counters_are_explained() {
    assert_eq!(examine(&healthy()), []);
    let notes = notes(&healthy());
    assert_eq!(notes.len(), 1, "{notes:?}");
    assert!(
        notes[0].starts_with("XfrmInNoStates stands at 3 since this network began: ESP came for an SA"),
        "{notes:?}"
    );
}

#[test]
fn each_trouble_is_found_by_its_name_and_nothing_else_is() {
    for (name, facts) in cases() {
        let found = examine(&facts);
        assert!(!found.is_empty(), "{name} is not found");
        for finding in &found {
            assert_eq!(finding.check, name, "{finding:?}");
            for (what, text) in [
                ("title", &finding.title),
                ("evidence", &finding.evidence),
                ("why", &finding.why),
                ("command", &finding.command),
                ("subject", &finding.subject),
            ] {
                assert!(!text.is_empty(), "{name} has no {what}");
            }
        }
    }
}

#[test]
fn every_finding_that_a_check_can_make_has_a_case() {
    let sources = [
        "node",
        "peers",
        "leases",
        "mtu",
        "routes",
        "filters",
        "leftovers",
        "machine",
    ];
    let made = regex::Regex::new(r#"(?:Severity::)?(?:Broken|Degraded|Notice|severity),\s*"([a-z-]+)""#).unwrap();
    let table = regex::Regex::new(r#""([a-z-]+)",\s*(?:Broken|Degraded|Notice),"#).unwrap();
    let chosen = regex::Regex::new(r#"\((?:Degraded|Notice), "([a-z-]+)", format"#).unwrap();
    let mut names = BTreeSet::new();
    for source in sources {
        let path = format!("{}/src/doctor/checks/{source}.rs", env!("CARGO_MANIFEST_DIR"));
        let text = std::fs::read_to_string(path).unwrap();
        for found in [&made, &table, &chosen]
            .iter()
            .flat_map(|pattern| pattern.captures_iter(&text))
        {
            names.insert(found[1].to_owned());
        }
    }
    let cases: BTreeSet<String> = cases().iter().map(|(name, _)| (*name).to_owned()).collect();
    assert_eq!(names, cases);
}

#[test]
fn the_worst_comes_first() {
    let mut facts = healthy();
    facts.now -= 3600;
    report(&mut facts).peers[0].loss = Some(0.25);
    report(&mut facts).peers[1].loss = Some(0.75);
    report(&mut facts).peers[1].unanswered = 2;
    report(&mut facts).peers[2].loss = Some(0.75);
    let found: Vec<_> = examine(&facts)
        .into_iter()
        .map(|one| (one.check, one.subject))
        .collect();
    let expected = [
        ("loss", "node-c"),
        ("loss", "node-b"),
        ("loss", "node-d"),
        ("clock-back", "node"),
    ];
    assert_eq!(found, expected.map(|(check, subject)| (check, subject.to_owned())));
}

#[test]
#[ignore = "needs root and network namespaces"]
fn nft_rules_of_a_real_kernel_that_drop_the_mesh_are_found_and_the_remedies_end_it() {
    let run = |command: &str| {
        let done = std::process::Command::new("sh").args(["-c", command]).status().unwrap();
        assert!(done.success(), "{command}");
    };
    let look = || {
        let mut facts = healthy();
        facts.filters.clear();
        super::read::filters_now(&mut facts);
        examine(&facts)
    };
    Net::new().run(|| {
        assert_eq!(look(), []);
        run("nft add table inet host; nft 'add chain inet host out { type filter hook output priority 0; }'");
        run("nft add rule inet host out tcp dport '{ 22, 80-90 }' accept; nft add rule inet host out meta l4proto esp counter drop");
        run("nft add table ip host; nft 'add chain ip host pods { type filter hook forward priority 0; policy drop; }'");
        run("nft add rule ip host pods ip saddr 10.9.0.0/16 oifname eth0 accept");
        let found = look();
        let commands: BTreeSet<&str> = found.iter().map(|finding| finding.command.as_str()).collect();
        let expected = ["nft delete rule inet host out handle 4", "nft insert rule ip host pods ip saddr 10.244.0.0/16 accept"];
        assert_eq!(commands, expected.into(), "{found:?}");
        commands.iter().for_each(|command| run(command));
        assert_eq!(look(), []);
    });
}

#[test]
fn a_bundle_is_a_readable_tar_for_its_owner_alone_and_holds_no_psk() {
    let folder = Folder::new();
    let path = folder.join("bundle.tar");
    let facts = healthy();
    let entries = bundle::entries(&facts, &examine(&facts), "nothing is found\n");
    bundle::write(&path, &entries, facts.now, false).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
    let mut seen = BTreeSet::new();
    let mut archive = tar::Archive::new(std::fs::File::open(&path).unwrap());
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let mut text = String::new();
        entry.read_to_string(&mut text).unwrap();
        let name = entry.path().unwrap().to_string_lossy().into_owned();
        assert!(!text.contains(PSK), "{name} holds the PSK");
        if name.ends_with("net-conf.json") {
            assert!(text.contains("(removed)") && text.contains("10.244.0.0/16"), "{text}");
        }
        if name.ends_with(".json") {
            serde_json::from_str::<Value>(&text).unwrap_or_else(|error| panic!("{name}: {error}"));
        }
        seen.insert(name);
    }
    for wanted in [
        "README.txt",
        "findings.txt",
        "findings.json",
        "report.json",
        "audit.json",
        "leases.json",
        "facts.json",
        "net-conf.json",
        "subnet.env",
        "network/policies.txt",
        "filter/0-nft.json",
        "filter/1-iptables-legacy.txt",
        "proc/net/xfrm_stat",
        "proc-later/net/xfrm_stat",
    ] {
        assert!(
            seen.contains(&format!("ringmail-bundle/{wanted}")),
            "{wanted} is missing: {seen:?}"
        );
    }
}

#[test]
fn a_bundle_replaces_what_is_there_only_when_asked_and_follows_no_link() {
    let folder = Folder::new();
    let (path, elsewhere) = (folder.join("bundle.tar"), folder.join("elsewhere"));
    std::os::unix::fs::symlink(&elsewhere, &path).unwrap();
    let entries = bundle::entries(&healthy(), &[], "");
    let error = bundle::write(&path, &entries, 0, false).unwrap_err();
    assert!(
        error
            .to_string()
            .ends_with("is there already: give another name, or --force to replace it"),
        "{error}"
    );
    bundle::write(&path, &entries, 0, true).unwrap();
    assert!(!elsewhere.exists() && !path.is_symlink());
    let error = bundle::write(&folder.join("no/bundle.tar"), &entries, 0, true).unwrap_err();
    assert!(error.to_string().starts_with("write "), "{error}");
}

#[test]
fn a_configuration_that_is_no_json_is_left_out_whole() {
    for text in [
        format!("{{\"Backend\": {{\"PSK\": \"{PSK}\""),
        format!("PSK={PSK}"),
        format!("[\"psk\", {{\"pSk\": \"{PSK}\"}}]"),
    ] {
        assert!(!conf("x".into(), &text).text.contains(PSK), "{text}");
    }
    assert!(!format!("{:?}", healthy()).contains(PSK));
}
