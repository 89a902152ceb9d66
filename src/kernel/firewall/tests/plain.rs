//! The filter of an unencrypted mesh in real kernels.

use super::*;

/// Each check as two tests: one for the machine's own kernel, where names with `nft_` run, and one for a kernel with ESP,
/// which may have iptables alone.
macro_rules! in_both_kernels {
    ($($check:ident),* $(,)?) => {
        mod nft_or_iptables {
            $(#[test] #[ignore = "needs root and a kernel with nf_tables or iptables"] fn $check() { super::$check(); })*
        }
        mod iptables {
            $(#[test] #[ignore = "needs root and a kernel with nf_tables or iptables"] fn $check() { super::$check(); })*
        }
    };
}

in_both_kernels!(
    iptables_lists_flannels_chains_word_for_word,
    sources_are_those_of_flannels_iptables_rules,
    flannels_leftovers_go_and_others_rules_stay,
    each_form_leaves_nothing_of_the_other,
    a_change_of_flannels_chains_by_hand_is_seen,
    no_table_is_set_up_that_no_rule_is_in,
);

fn plain() -> Firewall {
    let Firewall { networks, own, .. } = dual_stack();
    Firewall::plain(networks, own, true, true, true)
}

/// Everything in the lab's node that iptables shows, both families; chains' counters and dates left out.
fn chains(node: &Net) -> String {
    let variant = variant();
    let saved = node.sh(&format!("iptables{variant}-save")) + &node.sh(&format!("ip6tables{variant}-save"));
    let kept = saved
        .lines()
        .filter(|line| line.starts_with("-A") || line.starts_with(":FLANNEL") || line.starts_with(":RINGMAIL"));
    kept.collect::<Vec<_>>().join("\n")
}

/// Whether the kernel's nf_tables has what our tables need.
fn has_nft() -> bool {
    Nft::open().is_ok()
}

#[test]
#[ignore = "needs root and a kernel with nf_tables"]
fn nft_lists_the_plain_table_as_it_is_meant() {
    let node = Net::new();
    node.run(|| {
        let mut nft = Nft::open().expect("nf_tables");
        nft.apply(&plain()).expect("applied");
        let golden = include_str!("../golden.plain.nft");
        assert_eq!(node.sh("nft list ruleset"), golden);
        // What an operator has saved can be loaded again.
        node.feed("nft --check --file -", golden);
        let without = |words: &[&str]| {
            let kept = golden
                .lines()
                .filter(|line| !words.iter().any(|word| line.ends_with(word)));
            kept.map(|line| format!("{line}\n")).collect::<String>()
        };
        let mut listing = |masquerade, random_fully, forward| {
            let Firewall { networks, own, .. } = plain();
            let rules = Firewall::plain(networks, own, masquerade, random_fully, forward);
            nft.apply(&rules).expect("applied");
            node.sh("nft list ruleset")
        };
        assert_eq!(listing(true, true, false), without(&[" accept"]));
        assert_eq!(listing(true, false, true), golden.replace(" fully-random", ""));
        assert_eq!(
            listing(false, true, true),
            without(&[" return", " masquerade fully-random"])
        );
    });
}

fn iptables_lists_flannels_chains_word_for_word() {
    let node = Net::new();
    node.run(|| {
        let mut iptables = Iptables::open().expect("iptables");
        iptables.apply(&plain()).expect("applied");
        for (program, golden) in [
            ("iptables", include_str!("../../iptables/golden.flannel")),
            ("ip6tables", include_str!("../../iptables/golden.flannel6")),
        ] {
            let show = |table: &str, chain: &str| node.sh(&format!("{program}{} -t {table} -S {chain}", variant()));
            let jumps = |text: String| {
                let lines = text
                    .lines()
                    .filter(|line| line.contains("FLANNEL"))
                    .map(|line| format!("{line}\n"));
                lines.collect::<String>()
            };
            let listing = jumps(show("nat", "POSTROUTING"))
                + &show("nat", "FLANNEL-POSTRTG")
                + &jumps(show("filter", "FORWARD"))
                + &show("filter", "FLANNEL-FWD");
            assert_eq!(listing, golden, "{program}");
        }
    });
}

/// An empty table costs every packet of the namespace a look.
fn no_table_is_set_up_that_no_rule_is_in() {
    let node = Net::new();
    node.run(|| {
        let tables = || {
            let names = std::fs::read_to_string("/proc/thread-self/net/ip_tables_names").unwrap_or_default();
            names.lines().map(str::to_owned).collect::<BTreeSet<_>>()
        };
        let before = tables();
        let mut manager = Manager::open(false).expect("a manager");
        let Firewall { networks, own, .. } = plain();
        let mut apply = |masquerade, forward| {
            let rules = Firewall::plain(networks.clone(), own, masquerade, true, forward);
            manager.apply(&rules).expect("applied");
            manager.remove_other().expect("removed");
            manager.counters().expect("counted");
            &tables() - &before
        };
        assert_eq!(apply(false, false), BTreeSet::new());
        assert!(apply(false, true).is_subset(&BTreeSet::from(["filter".to_owned()])));
        assert!(apply(true, false).is_subset(&BTreeSet::from(["filter".to_owned(), "nat".to_owned()])));
    });
}

fn sources_are_those_of_flannels_iptables_rules() {
    with_managers(|lab, manager| {
        let mark = "*mangle\n-A PREROUTING -p udp --dport 7009 -j MARK --set-xmark 0x4001/0xffffffff\nCOMMIT\n";
        for program in ["iptables", "ip6tables"] {
            lab.node
                .feed(&format!("{program}{}-restore --noflush", variant()), mark);
        }
        manager.apply(&plain()).expect("applied");
        for (family, mesh) in FAMILIES.iter().zip(["198.51.101.1", "2001:db8:2::1"]) {
            let remote = lab.remote.socket(&at(family.remote_pod, 7000));
            let host = lab.host.socket(&at(family.host, 0));
            let pod = lab.pod.socket(&at(family.pod, 7000));
            let outside = lab.remote.socket(&at(family.outside, 7000));
            let node = lab.node.socket(&at(family.public, 0));
            assert_eq!(seen_and_answered(&host, &remote), ip(mesh), "foreign to remote pod");
            assert_eq!(seen_and_answered(&node, &remote), ip(mesh), "the node to remote pod");
            assert_eq!(
                seen_and_answered(&pod, &remote),
                ip(family.pod),
                "own pod to remote pod"
            );
            assert_eq!(
                seen_and_answered(&remote, &pod),
                ip(family.remote_pod),
                "remote pod to own"
            );
            assert_eq!(seen_and_answered(&host, &pod), ip(family.host), "foreign to own pod");
            assert_eq!(
                seen_and_answered(&pod, &outside),
                ip(family.public),
                "own pod to the outside"
            );
            let pod = lab.pod.socket(&at(family.pod, 0));
            let marked = lab.remote.socket(&at(family.outside, 7009));
            assert_eq!(
                seen(&pod, &marked, Duration::from_secs(3)),
                Some(ip(family.pod)),
                "kube-proxy's mark among others"
            );
        }
    });
}

fn flannels_leftovers_go_and_others_rules_stay() {
    const THEIRS: &str =
        "*nat\n:OTHER - [0:0]\n-A POSTROUTING -j OTHER\nCOMMIT\n*filter\n-A FORWARD -p sctp -j DROP\nCOMMIT\n";
    const FLANNELS: &str = "*nat\n:FLANNEL-POSTRTG - [0:0]\n-A POSTROUTING -m comment --comment \"flanneld masq\" -j FLANNEL-POSTRTG\n\
        -A FLANNEL-POSTRTG -s 10.9.0.0/16 -j MASQUERADE\nCOMMIT\n*filter\n:FLANNEL-FWD - [0:0]\n\
        -A FORWARD -m comment --comment \"flanneld forward\" -j FLANNEL-FWD\n-A FLANNEL-FWD -s 10.9.0.0/16 -j ACCEPT\nCOMMIT\n";
    with_managers(|lab, manager| {
        let node = &lab.node;
        let nft = has_nft();
        node.feed(&format!("iptables{}-restore --noflush", variant()), THEIRS);
        if nft {
            node.feed("nft -f -", "table ip foreign {}\n");
        }
        let before = chains(node);
        node.feed(&format!("iptables{}-restore --noflush", variant()), FLANNELS);
        if nft {
            node.feed("nft -f -", "table ip flannel-ipv4 { chain postrtg { type nat hook postrouting priority srcnat; }; }\ntable ip6 flannel-ipv6 {}\n");
        }
        manager.apply(&plain()).expect("applied");
        manager.remove_other().expect("removed");
        assert!(manager.verify(&plain()).expect("read"));
        let after = chains(node);
        assert!(!after.contains("10.9.0.0"), "{after}");
        let foreign: Vec<&str> = after.lines().filter(|line| !line.contains("FLANNEL")).collect();
        assert_eq!(foreign.join("\n"), before);
        if matches!(manager, Manager::Nft(_)) {
            assert_eq!(after, before, "neither chains nor jumps of flannel's are left");
        }
        if nft {
            let tables = node.sh("nft list tables");
            assert!(
                !tables.contains("flannel") && tables.contains("table ip foreign"),
                "{tables}"
            );
        }
        manager.remove().expect("removed");
        assert_eq!(chains(node), before);
    });
}

fn each_form_leaves_nothing_of_the_other() {
    with_managers(|lab, manager| {
        let listing = |manager: &Manager| match manager {
            Manager::Nft(_) => lab.node.sh("nft list ruleset"),
            Manager::Iptables(_) => chains(&lab.node),
        };
        manager.apply(&dual_stack()).expect("applied");
        let sealed = listing(manager);
        manager.apply(&plain()).expect("applied");
        let open = listing(manager);
        assert!(!open.contains("RINGMAIL") && !open.contains("plaintext"), "{open}");
        assert!(manager.verify(&plain()).expect("read"));
        assert!(!manager.verify(&plain().by_nft(true)).expect("read"), "another wish");
        manager.apply(&dual_stack()).expect("applied");
        assert_eq!(listing(manager), sealed);
        let Firewall { networks, own, .. } = plain();
        manager
            .apply(&Firewall::plain(networks, own, false, true, false))
            .expect("applied");
        assert_eq!(chains(&lab.node), "", "neither rules nor chains");
    });
}

fn a_change_of_flannels_chains_by_hand_is_seen() {
    let node = Net::new();
    node.run(|| {
        let mut manager = Manager::Iptables(Iptables::open().expect("iptables"));
        let variant = variant();
        let mark = "-m mark --mark 0x4000/0x4000 -m comment --comment x -j RETURN";
        for change in [
            "iptables -t nat -F FLANNEL-POSTRTG",
            "ip6tables -t filter -D FLANNEL-FWD 1",
            "iptables -t nat -D FLANNEL-POSTRTG 1",
            &format!("iptables -t nat -I FLANNEL-POSTRTG 3 {mark}"),
            "iptables -t nat -F POSTROUTING",
            "ip6tables -t filter -F FORWARD",
        ] {
            manager.apply(&plain()).expect("applied");
            assert!(manager.verify(&plain()).expect("read"));
            node.sh(&change.replacen("tables", &format!("tables{variant}"), 1));
            assert!(!manager.verify(&plain()).expect("read"), "{change}");
        }
        manager.apply(&plain()).expect("applied");
        // The same rules in another order.
        let restore = format!("iptables{variant}-restore --noflush");
        let jumbled = "*filter\n-F FLANNEL-FWD\n-A FLANNEL-FWD -d 10.244.0.0/16 -m comment --comment \"flanneld forward\" -j ACCEPT\n\
            -A FLANNEL-FWD -s 10.244.0.0/16 -m comment --comment \"flanneld forward\" -j ACCEPT\nCOMMIT\n";
        node.feed(&restore, jumbled);
        assert!(!manager.verify(&plain()).expect("read"), "order");
        manager.apply(&plain()).expect("applied");
        // What others append behind our jump is no drift: both would take turns.
        node.feed(&restore, "*filter\n-A FORWARD -p sctp -j DROP\nCOMMIT\n");
        assert!(manager.verify(&plain()).expect("read"));
    });
}
