//! Every problem that the code names, by the code that names it, and the finding that doctor makes of it. Doctor tells them
//! apart by their words: one that is worded anew and not known any more would be a `problem` without a remedy of its own.

mod sim;

use std::sync::Arc;
use std::time::Duration;

use keys::{Cipher, Encap, EncapMode, Epoch, EpochSecret, Statement};
use ring::rand::SystemRandom;
use ringmail::admission::{Refusal, publish};
use ringmail::backend::{Plain, vxlan};
use ringmail::doctor::{Facts, Finding, examine};
use ringmail::kernel::encap;
use ringmail::kernel::firewall::{Counters, Tally};
use ringmail::kernel::{Objects, Scope, WriteError};
use ringmail::lease::{BackendData, Lease};
use ringmail::node::Node;
use ringmail::node::report::Report;
use sim::make::{self, Families};

/// The finding that quotes `problem`.
fn finding(problem: &str) -> Finding {
    let report = Report {
        problems: vec![problem.to_owned()],
        ..report(&node(&[1], None))
    };
    let facts = Facts {
        report: Some(report),
        ..Facts::default()
    };
    let found = examine(&facts).into_iter().find(|one| one.evidence == problem);
    found.unwrap_or_else(|| panic!("no finding quotes {problem:?}"))
}

fn names(problems: &[String]) -> Vec<&'static str> {
    problems.iter().map(|problem| finding(problem).check).collect()
}

fn report(node: &Node) -> Report {
    node.report(&Default::default(), Duration::ZERO)
}

fn keyed(node: &mut Node, psks: &[u8]) {
    let network = make::network(Families::V4);
    let psks = psks.iter().map(|number| make::psk(*number, &network)).collect();
    node.keyed(psks, Duration::ZERO);
}

/// Node 1 with these PSKs and its first epoch.
fn node(psks: &[u8], plaintext: Option<Plain>) -> Node {
    let network = make::network(Families::V4);
    let settings = ringmail::node::Settings {
        plaintext,
        ..make::settings("node1", network)
    };
    let mut node = Node::new(settings, &Objects::new());
    node.uplinked(make::uplink(Families::V4, 1));
    keyed(&mut node, psks);
    node.holds(make::subnets(&network, 1), make::slot(1));
    let secret = EpochSecret::generate(&SystemRandom::new()).expect("random numbers");
    node.begin_epoch(Epoch(1), secret, Duration::ZERO, 0.0);
    node
}

/// The lease of node 2, of node `holder`'s subnet, under a PSK.
fn offer(node: &mut Node, holder: u32, psk: u8) {
    let network = make::network(Families::V4);
    let secret = EpochSecret::generate(&SystemRandom::new()).expect("random numbers");
    let psk = make::psk(psk, &network);
    let statement = Statement {
        network: network.nets().collect(),
        node: "node2".into(),
        subnets: make::subnets(&network, holder).iter().collect(),
        addresses: vec![[192, 0, 2, 2].into()],
        cipher: Cipher::Aes128Gcm16,
        encap: Encap {
            mode: EncapMode::Esp,
            port: 4500,
        },
        epoch: Epoch(2),
        public: secret.public(),
        kids: vec![psk.kid()],
    };
    let lease = Lease {
        node: make::name(&statement.node),
        subnets: statement.subnets.iter().copied().collect(),
        public: statement.addresses.iter().copied().collect(),
        backend: "ipsec".into(),
        data: publish(&statement.encode().expect("a good statement"), &[psk]),
        v6_data: BackendData::NULL,
    };
    node.leased(&lease.node, Some(&Arc::new(lease.clone())), Duration::ZERO);
}

#[test]
fn what_a_node_lacks_has_a_finding_of_its_own() {
    let bare = Node::new(make::settings("node1", make::network(Families::V4)), &Objects::new());
    let problems = report(&bare).problems;
    assert_eq!(
        names(&problems),
        ["uplink-missing", "lease-missing", "psk"],
        "{problems:?}"
    );

    let mut stalled = node(&[1], None);
    stalled.stall("the reason".into(), Duration::ZERO);
    assert_eq!(names(&report(&stalled).problems), ["epoch-stalled"]);
}

#[test]
fn what_is_wrong_with_psks_and_claims_has_a_finding_of_its_own() {
    let mut alone = node(&[1], None);
    offer(&mut alone, 2, 2);
    assert_eq!(names(&report(&alone).problems), ["psk"]);

    let mut facts = Facts {
        report: Some(report(&alone)),
        ..Facts::default()
    };
    let found = examine(&facts);
    let refused = found.iter().find(|one| one.check == "peer-refused");
    let refused = refused.expect("it has no key in common");
    assert!(refused.command.starts_with("ringmail status; "), "{refused:?}");
    for psk in [1, 2] {
        let kid = make::psk(psk, &make::network(Families::V4)).kid().to_string();
        assert!(refused.evidence.contains(&kid), "{refused:?}");
    }
    // What is refused for another reason has to do with the leases.
    let kid = |psk| make::psk(psk, &make::network(Families::V4)).kid();
    let dropped = Refusal::PskDropped {
        dropped: kid(2),
        ours: vec![kid(1)],
    };
    for (reason, command) in [(dropped, "ringmail status; "), (Refusal::Silent, "ringmail leases")] {
        facts.report.as_mut().expect("it is there").peers[0].reason = Some(reason.to_string());
        let found = examine(&facts);
        let refused = found.iter().find(|one| one.check == "peer-refused");
        let refused = refused.expect("it is refused");
        assert!(refused.command.starts_with(command), "{refused:?}");
    }

    let mut needed = node(&[1], None);
    offer(&mut needed, 2, 1);
    keyed(&mut needed, &[2]);
    assert_eq!(names(&report(&needed).problems), ["psk-needed"]);

    let mut claimed = node(&[1], None);
    offer(&mut claimed, 1, 1);
    assert_eq!(names(&report(&claimed).problems), ["claimed-twice"]);
}

#[test]
fn plaintext_has_a_finding_of_its_own() {
    let allowed = Plain::Vxlan(vxlan::Settings {
        vni: 1,
        port: vxlan::PORT,
        outer_mtu: None,
        gbp: false,
        learning: false,
        direct: false,
    });
    let mut node = node(&[1], Some(allowed));
    assert_eq!(names(&report(&node).problems), ["plaintext-allowed"]);
    let lease = Lease {
        node: make::name("node2"),
        subnets: make::subnets(&make::network(Families::V4), 2),
        public: make::uplink(Families::V4, 2).public,
        backend: "vxlan".into(),
        data: serde_json::json!({"VNI": 1, "VtepMAC": "02:00:00:00:04:02"}).into(),
        v6_data: BackendData::NULL,
    };
    node.leased(&lease.node, Some(&Arc::new(lease.clone())), Duration::ZERO);
    let problems = report(&node).problems;
    assert!(problems[0].starts_with("1 of 1 peers"), "{problems:?}");
    assert_eq!(names(&problems), ["plaintext-allowed"]);

    for (arriving, leaving) in [(1, 0), (0, 1), (2, 2)] {
        let tally = |packets| Tally { packets, bytes: 0 };
        let counters = Counters {
            arriving: tally(arriving),
            leaving: tally(leaving),
        };
        let told = counters.told("eth0", "the reset").expect("it has dropped some");
        let found = finding(&told);
        assert_eq!(
            (found.check, found.command.as_str()),
            ("plaintext-dropped", "the reset")
        );
    }
}

#[test]
fn what_other_programs_hold_has_a_finding_of_its_own_with_its_own_remedy() {
    let error = WriteError::Foreign {
        op: "make route 10.244.2.0/24".into(),
        found: "route 10.244.2.0/24".into(),
        remedy: "ip route delete 10.244.2.0/24".into(),
    };
    let found = finding(&format!("{}: {error}", Scope::Node));
    assert_eq!(
        (found.check, found.command.as_str()),
        ("in-the-way", "ip route delete 10.244.2.0/24")
    );
    let error = encap::Error::PortInUse {
        local: "192.0.2.1:4500".parse().expect("an address"),
    };
    let found = finding(&error.to_string());
    assert_eq!(found.check, "port-refused");
    assert!(found.command.starts_with("ss "), "{found:?}");
}

/// The loop's own are made in the middle of it: their words are read from its text.
#[test]
fn what_the_loop_names_has_a_finding_of_its_own() {
    let source = include_str!("../src/daemon/answer.rs");
    let (_, function) = source.split_once("fn problems(").expect("it is there");
    let (function, _) = function.split_once("\n}\n").expect("it ends");
    let made = regex::Regex::new(r#"problem\(format!\(\s*"([^"]*)""#).expect("a good pattern");
    let words: Vec<&str> = made
        .captures_iter(function)
        .filter_map(|found| Some(found.get(1)?.as_str()))
        .collect();
    assert_eq!(words.len(), function.matches("problem(format!(").count(), "{words:?}");
    let hole = regex::Regex::new(r"\{[^}]*\}").expect("a good pattern");
    let found: Vec<&str> = words
        .iter()
        .map(|words| finding(&hole.replace_all(words, "x")).check)
        .collect();
    // Only the first says nothing itself: what it quotes does.
    let expected = [
        "problem",
        "store-outage",
        "psk-unreadable",
        "uplink-missing",
        "configuration-refused",
    ];
    assert_eq!(found, expected, "{words:?}");
}
