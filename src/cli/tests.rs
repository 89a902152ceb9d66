//! What the verbs show, as golden files in tests/golden/cli (RINGMAIL_REWRITE_GOLDEN=1 rewrites them), how command
//! lines are understood, and cleanup against this machine's kernel.

use std::ffi::OsString;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use serde_json::json;

use super::table::{Style, bytes, clean, span, wrap};
use super::*;
use crate::admin::{Leases, Rotation};
use crate::audit;
use crate::config::UsageError;
use crate::kernel::firewall::{self, Counters as Dropped, Tally};
use crate::kernel::iptables;
use crate::kernel::netlink::{Netlink, Options};
use crate::kernel::{Datapath as _, Key, Kind, Look, Object, Objects, Op, Write, WriteError};
use crate::node::PskReport;
use crate::node::report::Report;
use crate::testing::Folder;
use crate::tunnel::{Counters, Offload};

mod doctor;
mod removal;

const PLAIN: Style = Style { colour: false };

/// Compares `text` with the golden file `name`, or rewrites that.
pub(super) fn golden(name: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden/cli")
        .join(name);
    if std::env::var_os("RINGMAIL_REWRITE_GOLDEN").is_some() {
        std::fs::write(&path, text).unwrap();
    }
    let wanted = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(text == wanted, "{} differs; it would be:\n{text}", path.display());
}

const RESET: &str = "nft reset counters table inet ringmail";

/// A guard that has seen plaintext both ways.
fn dropped() -> Dropped {
    let tally = |packets| Tally {
        packets,
        bytes: packets * 84,
    };
    Dropped {
        arriving: tally(3),
        leaving: tally(1),
    }
}

pub(super) fn report() -> Report {
    let peer = |name: &str, number: u8, state: &str, more: serde_json::Value| {
        let mut peer = json!({
            "node": name, "subnets": [format!("10.244.{number}.0/24")], "address": format!("192.0.2.{number}"),
            "state": state, "reason": null, "generation": null, "newest": null, "spi_out": null, "spi_in": null,
            "encap": null, "heard": null, "round_trip": null, "bytes_out": 0, "bytes_in": 0, "packets_out": 0,
            "packets_in": 0, "errors": 0
        });
        peer.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        peer
    };
    let sending = json!({
        "generation": "1764000001>1764000002", "spi_out": "0x00002041", "spi_in": "0x00003081", "encap": "esp",
        "heard": 4.25, "round_trip": 0.41, "bytes_out": 1_234_567, "bytes_in": 98_765_432_109u64,
        "packets_out": 1200, "packets_in": 70_000_000
    });
    let mut moving = sending.clone();
    moving["newest"] = "1764003601>1764000003".into();
    moving["encap"] = "udp".into();
    moving["detour"] = "plain ESP has not been answered for 12 s".into();
    moving["learned"] = "203.0.113.9:41001".into();
    moving["errors"] = 3.into();
    moving["loss"] = 0.15.into();
    moving["reason"] =
        "packets of 1446 bytes do not pass to it, those of 1357 do: set MTU to 1357 or less in net-conf.json, \
                        or raise the MTU on the path to it"
            .into();
    moving["subnets"] = json!(["10.244.4.0/24", "fd00:244:0:4::/64"]);
    let value = json!({
        "node": "node-a", "network": ["10.244.0.0/16"], "subnets": ["10.244.1.0/24"], "public": ["192.0.2.1"],
        "uplink": "eth0", "mtu": 1446, "cipher": "aes128gcm16", "encap": "false", "epoch": 1_764_000_001u64,
        "epoch_age": 11_520, "next_epoch": {"seconds": 73_000, "cause": "RekeyAfter"}, "psks": [
            {"kid": "0011223344556677", "withdrawn": false, "dropped_in": null, "have": 4, "nodes": 6,
             "missing": ["node-e", "node-g"], "needed_by": []},
            {"kid": "8899aabbccddeeff", "withdrawn": false, "dropped_in": null, "have": 6, "nodes": 6, "missing": [],
             "needed_by": []}],
        "complete": true, "problems": [],
        "rejected": {}, "peers": [
            peer("node-b", 2, "up", sending),
            peer("node-d", 4, "moving", moving),
            peer("node-e", 5, "kept", json!({
                "reason": "keys of an earlier process, until a probe comes back", "spi_out": "0x00002042",
                "newest": "1764000001>1764000002", "encap": "esp"})),
            peer("node-f", 6, "waiting", json!({
                "reason": "no probe came back yet: is its daemon running, does it see this node's lease, does ESP (or \
                           UDP) pass?", "newest": "1764000001>1764000002", "encap": "esp"})),
            peer("node-g", 7, "refused", json!({
                "reason": "no common PSK: it has 0000000000000000, this node has 0011223344556677; give both nodes the \
                           same key"})),
        ]
    });
    serde_json::from_value(value).unwrap()
}

#[test]
fn a_silent_peer_and_a_store_that_is_away_are_not_well() {
    let mut report = report();
    report.peers.truncate(1);
    let shown = status::render(&report, Style::default());
    assert!(
        status::well(&report) && shown.contains("peers   1 up\n") && shown.contains("read whole\n"),
        "{shown}"
    );
    (report.peers[0].silent, report.peers[0].reason) = (
        Some(crate::node::report::Comes::Nothing),
        Some("silent for 52 s".into()),
    );
    let shown = status::render(&report, Style::default());
    assert!(
        !status::well(&report) && shown.contains("peers   1 up, 1 of them silent\n"),
        "{shown}"
    );
    assert!(shown.contains("\n    silent for 52 s\n"), "{shown}");
    report.peers.clear();
    report
        .problems
        .push("the store can't be read for 4 s now: no such folder".into());
    let shown = status::render(&report, Style::default());
    assert!(
        !status::well(&report) && shown.contains("store   was read whole, and can't be reached now\n"),
        "{shown}"
    );
}

#[test]
fn status_shows_each_state_with_its_reason() {
    golden("status.txt", &status::render(&report(), PLAIN));
    assert!(!status::well(&report()));
}

#[test]
fn a_repeated_status_says_when_it_is_and_that_the_daemon_is_away() {
    let away = status::Fetched::Away("no daemon answers at /run/x: is ringmail running?\x1b[2J".into());
    let there = status::Fetched::Report(Box::new(report()));
    let time = "2026-11-29T21:43:02Z";
    let sections = [&there, &away].map(|each| status::section(each, time, false, PLAIN));
    let wanted = format!("--- {time}\n{}", status::render(&report(), PLAIN));
    assert_eq!(sections[0], wanted);
    assert_eq!(
        sections[1],
        format!("--- {time}\nno daemon answers at /run/x: is ringmail running?\u{fffd}[2J\n")
    );
    let screen = status::section(&away, time, true, Style { colour: true });
    assert!(
        screen.starts_with(&format!("\x1b[H\x1b[2J{time}\n\n\x1b[31mno daemon")),
        "{screen:?}"
    );
    let lines = [&there, &away].map(status::document);
    for line in &lines {
        assert_eq!(line.lines().count(), 1, "{line}");
    }
    assert_eq!(serde_json::from_str::<Report>(&lines[0]).unwrap(), report());
    let away: serde_json::Value = serde_json::from_str(&lines[1]).unwrap();
    assert!(
        away["error"].as_str().unwrap().starts_with("no daemon answers"),
        "{away}"
    );
}

#[test]
fn status_names_who_has_not_got_the_new_key_and_what_becomes_of_the_old() {
    let mut report = report();
    let many: Vec<String> = (10..22).map(|n| format!("node-{n}")).collect();
    report.psks = vec![
        PskReport {
            kid: "9f31000000000001".into(),
            withdrawn: false,
            dropped_in: None,
            have: 1,
            nodes: 13,
            missing: many.clone(),
            needed_by: Vec::new(),
        },
        PskReport {
            kid: "0011223344556677".into(),
            withdrawn: true,
            dropped_in: Some(3541),
            have: 13,
            nodes: 13,
            missing: Vec::new(),
            needed_by: many,
        },
    ];
    report.peers.clear();
    report.problems = vec![
        "12 nodes still need key 0011223344556677, which was taken from this node: node-10, node-11; it is dropped in \
         3541 s: give them a newer one before"
            .into(),
    ];
    golden("status-rotation.txt", &status::render(&report, PLAIN));
    assert!(!status::well(&report));
}

#[test]
fn status_shows_what_is_wrong_with_the_node() {
    let mut report = report();
    report.peers.clear();
    report.complete = false;
    report.subnets.clear();
    (report.uplink, report.mtu, report.epoch, report.epoch_age) = (None, None, None, None);
    report.psks.clear();
    report.next_epoch = None;
    report.public.clear();
    report.problems = vec![
        "no uplink yet: no interface fits; see --iface".into(),
        "no lease yet".into(),
    ];
    report.problems.extend(dropped().told("eth0", RESET));
    assert_eq!(Dropped::default().told("eth0", RESET), None);
    let evil = "10.244.9.0-24.json\u{1b}[2J".to_owned();
    report
        .rejected
        .insert(evil, "line 1 column 3: no JSON\nfaked line".into());
    let text = status::render(&report, PLAIN);
    golden("status-problems.txt", &text);
    assert!(
        !text.contains('\u{1b}') && !text.contains("\nfaked"),
        "a store can't drive the terminal"
    );
}

#[test]
fn status_of_an_unencrypted_mesh_says_so_and_what_its_tunnel_dropped() {
    let mut report = report();
    report.backend = "udp".into();
    report.peers.truncate(1);
    let peer = &mut report.peers[0];
    peer.state = crate::node::report::State::Plain;
    (peer.generation, peer.spi_out, peer.spi_in, peer.encap, peer.heard) = (None, None, None, None, None);
    let mut tunnel = Counters {
        sent_packets: 12_345,
        sent_bytes: 17_000_000,
        received_packets: 1,
        received_bytes: 1400,
        ..Counters::default()
    };
    (tunnel.dropped.no_lease, tunnel.dropped.too_big) = (7, 3);
    tunnel.offloads.udp_gro = Offload::Off("Protocol not available (os error 92)".into());
    let through_json = serde_json::to_value(&tunnel).unwrap();
    assert_eq!(serde_json::from_value::<Counters>(through_json).unwrap(), tunnel);
    report.tunnel = Some(tunnel);
    golden("status-udp.txt", &status::render(&report, PLAIN));
    assert!(status::well(&report));
}

#[test]
fn status_is_well_only_where_nothing_is_to_be_told() {
    let mut good = report();
    good.peers.truncate(2);
    good.peers[1].reason = None;
    assert!(status::well(&good));
    let broken: [&dyn Fn(&mut Report); 5] = [
        &|r| r.complete = false,
        &|r| r.problems.push("no PSK".into()),
        &|r| drop(r.rejected.insert("x".into(), "y".into())),
        &|r| r.peers[0].reason = Some("the newest lease is refused".into()),
        &|r| r.peers[0].state = crate::node::report::State::Kept,
    ];
    for change in broken {
        let mut report = good.clone();
        change(&mut report);
        assert!(!status::well(&report), "{report:?}");
    }
}

#[test]
fn no_line_of_a_table_is_wider_than_a_terminal() {
    let text = status::render(&report(), PLAIN);
    let alone = super::audit::render(&audit::unplanned(&audit::tests::desired()), Some("no daemon"), PLAIN);
    for line in text.lines().chain(alone.lines()) {
        assert!(line.chars().count() <= 80, "{line}");
    }
}

#[test]
fn colours_change_nothing_but_colours() {
    let painted = status::render(&report(), Style { colour: true });
    let mut plain = String::new();
    let mut rest = painted.as_str();
    while let Some((before, after)) = rest.split_once('\u{1b}') {
        plain += before;
        rest = after.split_once('m').expect("a colour ends").1;
    }
    assert_eq!(plain + rest, status::render(&report(), PLAIN));
    assert!(painted.contains("\u{1b}[32mup\u{1b}[0m"));
}

#[test]
fn audit_shows_order_and_disorder() {
    use audit::tests::{desired, directory, dumped};
    let desired = desired();
    let actual = dumped(&desired);
    let whole = audit::Audit {
        dropped: Some(Dropped::default()),
        ..audit::audit(&desired, &actual, &directory())
    };
    assert!(whole.ok);
    golden("audit.txt", &super::audit::render(&whole, None, PLAIN));

    let mut broken = actual.clone();
    broken.retain(|key, _| !matches!(key, Key::GuardRoute(net) if net.addr().is_ipv4()));
    broken.retain(|key, _| key.kind() != Kind::Link);
    let key = broken.keys().find(|key| key.kind() == Kind::Policy).cloned().unwrap();
    let Some(Object::Policy(policy)) = broken.get_mut(&key) else {
        panic!("a policy")
    };
    policy.priority = 5;
    let route = Key::Route("10.244.77.0/24".parse().unwrap());
    broken.insert(route, Object::Unreachable);
    let broken = audit::Audit {
        dropped: Some(dropped()),
        dropped_told: dropped().told("eth0", RESET),
        ..audit::audit(&desired, &broken, &directory())
    };
    golden("audit-broken.txt", &super::audit::render(&broken, None, PLAIN));

    let alone = Some("no daemon answers at /run/ringmail/control.sock: is ringmail running?");
    golden(
        "audit-alone.txt",
        &super::audit::render(&audit::unplanned(&actual), alone, PLAIN),
    );
    golden(
        "audit-nothing.txt",
        &super::audit::render(&audit::unplanned(&Objects::new()), alone, PLAIN),
    );
}

#[test]
fn that_the_guard_can_not_be_read_is_said_by_status_and_audit() {
    let error = firewall::Error::Iptables(iptables::Error::Failed {
        program: "/usr/sbin/iptables-legacy-save".into(),
        code: "4".into(),
        message: "Another app is currently holding the xtables lock.".into(),
    });
    let told = audit::unread(&error);
    assert_eq!(
        told,
        "what the guard has dropped can't be read: packet filter (iptables): /usr/sbin/iptables-legacy-save (exit code \
         4): Another app is currently holding the xtables lock."
    );
    let begins = "what the guard has dropped can't be read: packet filter (iptables):\n";
    let audited = audit::Audit {
        dropped_told: Some(told.clone()),
        ..audit::unplanned(&Objects::new())
    };
    let text = super::audit::render(&audited, None, PLAIN);
    assert!(text.contains(&format!("dropped: {begins}")), "{text}");
    let mut report = report();
    report.peers.clear();
    (report.problems, report.complete) = (vec![told], true);
    report.rejected.clear();
    assert!(!super::status::well(&report), "not known is not well");
    let text = super::status::render(&report, PLAIN);
    assert!(text.contains(&format!("problem: {begins}")), "{text}");
}

#[test]
fn leases_shows_every_verdict() {
    let lease = |node: &str, verdict: &str, reason: Option<&str>| {
        json!({"node": node, "subnets": ["10.244.1.0/24"], "public": ["192.0.2.1"], "backend": "ipsec",
               "epoch": 1_764_000_000u64, "verdict": verdict, "reason": reason})
    };
    let mut dual = lease("node-c", "unchecked", None);
    dual["subnets"] = json!(["10.244.3.0/24", "fd00:244:0:3::/64"]);
    dual["public"] = json!(["192.0.2.3", "2001:db8::3"]);
    let mut bare = lease("node-e", "unchecked", None);
    (bare["backend"], bare["epoch"]) = ("".into(), serde_json::Value::Null);
    let leases: Leases = serde_json::from_value(json!({
        "own": "node-a", "complete": false,
        "leases": [lease("node-a", "own", None), lease("node-b", "verified", None), dual,
                   lease("node-d", "refused", Some("the tag of PSK 0011223344556677 does not verify: the lease was \
                                                    changed by someone without the key")), bare],
        "rejected": {"notes.txt": "not a lease's file name"}
    }))
    .unwrap();
    golden("leases.txt", &leases::render(&leases, PLAIN));
    golden(
        "leases-none.txt",
        &leases::render(
            &Leases {
                complete: true,
                ..Leases::default()
            },
            PLAIN,
        ),
    );
}

#[test]
fn rotate_waits_for_those_that_were_served_and_names_who_has_not_moved() {
    let rotation = Rotation {
        epoch: 1_764_000_002,
        previous: Some(1_764_000_001),
    };
    let served = ["node-b", "node-d", "gone"].map(str::to_owned).into();
    let mut report = report();
    let none = rotate::judge(&rotation, &served, &report);
    golden("rotate-waiting.txt", &rotate::render(&none));
    report.peers[0].generation = Some("1764000002>1764000002".into());
    // A later rotation took it further.
    report.peers[1].generation = Some("1764000009>1764000002".into());
    golden(
        "rotate.txt",
        &rotate::render(&rotate::judge(&rotation, &served, &report)),
    );
    golden(
        "rotate-alone.txt",
        &rotate::render(&rotate::judge(&rotation, &Default::default(), &report)),
    );
}

#[test]
fn numbers_read_well() {
    let spans = [
        (0.0, "0.0 s"),
        (0.99, "0.9 s"),
        (1.0, "1 s"),
        (119.9, "119 s"),
        (120.0, "2 min"),
        (7199.0, "119 min"),
        (7200.0, "2 h"),
        (172_799.0, "47 h"),
        (172_800.0, "2 d"),
    ];
    for (seconds, text) in spans {
        assert_eq!(span(std::time::Duration::from_secs_f64(seconds)), text);
    }
    let amounts = [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1_048_575, "1.0 MiB"),
        (u64::MAX, "16.0 EiB"),
    ];
    for (amount, text) in amounts {
        assert_eq!(bytes(amount), text);
    }
    assert_eq!(clean("a\u{1b}[1m\nb\u{9b}", false), "a\u{fffd}[1m\u{fffd}b\u{fffd}");
    assert_eq!(wrap(&"word ".repeat(17), 4).lines().map(str::len).max(), Some(78));
}

fn parse(arguments: &[&str]) -> Result<Invocation, Failure> {
    let environment = Environment {
        variables: vec![],
        hostname: Some("host".into()),
    };
    Invocation::parse(arguments.iter().map(OsString::from), &environment)
}

#[test]
fn flags_without_a_verb_mean_the_daemon() {
    for arguments in [
        &["ringmail", "run", "--lease-dir", "/l", "-v", "3"][..],
        &["ringmail", "--lease-dir=/l"],
        &["ringmail", "-lease-dir", "/l", "-ip-masq"],
        &["/opt/bin/flanneld", "--ip-masq", "--lease-dir", "/l"],
    ] {
        let Ok(Invocation::Run(flags)) = parse(arguments) else {
            panic!("{arguments:?}")
        };
        assert_eq!(flags.lease_dir.as_deref(), Some(Path::new("/l")));
    }
    for arguments in [
        &["flanneld", "--version"][..],
        &["ringmail", "-version"],
        &["ringmail", "run", "--version"],
    ] {
        assert!(matches!(parse(arguments), Ok(Invocation::Version)), "{arguments:?}");
    }
    for arguments in [
        &["ringmail", "--version"][..],
        &["ringmail", "-h"],
        &["ringmail", "status", "--help"],
        &["ringmail", "run", "-h"],
        &["flanneld", "--help"],
    ] {
        assert!(matches!(parse(arguments), Ok(Invocation::Text(_))), "{arguments:?}");
    }
    let Ok(Invocation::Verb(verb)) = parse(&["flanneld", "status"]) else {
        panic!("a verb under flanneld's name");
    };
    assert!(matches!(*verb, Verb::Status(_)));
}

#[test]
fn a_wrong_command_line_is_64_and_says_what_is_wrong() {
    for (arguments, text) in [
        (&["ringmail"][..], "no verb is given"),
        (&["ringmail", "config"], "no verb is given"),
        (&["ringmail", "statsu"], "unrecognized subcommand 'statsu'"),
        (&["ringmail", "status", "--jason"], "unexpected argument '--jason'"),
        (
            &["ringmail", "run", "--ifaec", "eth0"],
            "flag --ifaec is unknown; did you mean --iface?",
        ),
        (
            &["ringmail", "--kube-subnet-mgr", "--lease-dir=/d"],
            "--kube-subnet-mgr and --lease-dir name two stores",
        ),
        (
            &["flanneld", "--etcd-keyfile=/k"],
            "--etcd-keyfile needs --etcd-certfile beside it",
        ),
    ] {
        let failure = parse(arguments).expect_err("wrong");
        assert_eq!(failure.code, 64, "{arguments:?}");
        assert!(failure.to_string().starts_with(text), "{arguments:?}: {failure}");
    }
    assert_eq!(UsageError::EXIT_CODE, 64);
}

#[test]
fn every_verb_explains_itself_with_its_exit_codes() {
    use clap::CommandFactory as _;
    Cli::command().debug_assert();
    for verb in ["status", "audit", "doctor", "leases", "rotate", "cleanup"] {
        let Ok(Invocation::Text(text)) = parse(&["ringmail", verb, "--help"]) else {
            panic!("{verb}")
        };
        for part in ["Exit code", "--json", "--run-dir"] {
            assert!(text.contains(part), "{verb}: {part} in {text}");
        }
    }
}

fn execute(arguments: &[&str]) -> Result<Shown, Failure> {
    match parse(arguments)? {
        Invocation::Verb(verb) => verb.execute(&Environment::default()),
        other => panic!("{other:?}"),
    }
}

#[test]
fn install_replaces_a_file_as_a_whole_also_under_the_names_that_flannels_manifest_calls() {
    let folder = Folder::new();
    let at = |name: &str| folder.join(name).to_str().unwrap().to_owned();
    std::fs::write(at("plugin"), "program").unwrap();
    std::fs::set_permissions(at("plugin"), std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::create_dir(at("bin")).unwrap();
    std::fs::write(at("bin/flannel"), "an older one").unwrap();
    let in_use = std::fs::File::open(at("bin/flannel")).unwrap();
    execute(&[
        "ringmail",
        "install",
        &at("plugin"),
        &at("bin/flannel"),
        &at("new/ringmail-cni"),
    ])
    .unwrap();
    for place in ["bin/flannel", "new/ringmail-cni"] {
        assert_eq!(std::fs::read_to_string(at(place)).unwrap(), "program");
        assert_eq!(
            std::fs::metadata(at(place)).unwrap().permissions().mode() & 0o7777,
            0o755
        );
    }
    assert_eq!(
        std::io::read_to_string(in_use).unwrap(),
        "an older one",
        "who runs it keeps it whole"
    );
    std::fs::write(at("conf"), "{}").unwrap();
    execute(&["/opt/bin/install-conf", &at("conf"), &at("one")]).unwrap();
    execute(&["cp", "-f", &at("conf"), &at("two")]).unwrap();
    assert!(
        ["one", "two"]
            .iter()
            .all(|name| std::fs::read_to_string(at(name)).unwrap() == "{}")
    );
    let refused = execute(&["ringmail", "install", &at("absent"), &at("three")]).unwrap_err();
    assert!(refused.to_string().contains("absent: is it a file?"), "{refused}");
}

#[test]
fn keygen_writes_a_key_that_only_its_owner_reads_and_never_over_another() {
    let folder = Folder::new();
    let path = folder.join("psk");
    let shown = execute(&["ringmail", "keygen", "--out", path.to_str().unwrap()]).unwrap();
    let key = std::fs::read_to_string(&path).unwrap();
    assert_eq!((key.len(), &key[64..]), (65, "\n"));
    assert!(key[..64].bytes().all(|b| b.is_ascii_hexdigit()));
    assert!(!shown.text.contains(&key[..8]), "the key is not shown as well");
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
    let refused = execute(&["ringmail", "keygen", "--out", path.to_str().unwrap()]).unwrap_err();
    assert!(
        refused.to_string().contains("exists and may be a key in use"),
        "{refused}"
    );
    assert_eq!(std::fs::read_to_string(&path).unwrap(), key);
    let shown = execute(&["ringmail", "keygen"]).unwrap();
    assert!(shown.text.len() == 65 && *shown.text != key);
}

#[test]
fn config_check_says_what_it_comes_to_or_what_is_wrong() {
    let folder = Folder::new();
    let (conf, psk) = (folder.join("net-conf.json"), folder.join("psk"));
    let (conf, psk) = (conf.to_str().unwrap(), psk.to_str().unwrap());
    std::fs::write(psk, "0123456789abcdef0123456789abcdef\n").unwrap();
    std::fs::set_permissions(psk, std::fs::Permissions::from_mode(0o600)).unwrap();
    std::fs::write(
        conf,
        r#"{"Network": "10.244.0.0/16", "Backend": {"Type": "ipsec", "UDPEncap": true}}"#,
    )
    .unwrap();
    let check = |more: &[&str]| {
        let all = [&["ringmail", "config", "check"], more].concat();
        execute(&all)
    };
    let shown = check(&[conf, "--psk-file", psk]).unwrap();
    assert_eq!(shown.code, 0);
    golden(
        "config-check.txt",
        &shown
            .text
            .replace(folder.path().to_str().unwrap(), "FOLDER")
            .replace(&hostname(), "HOST"),
    );
    assert!(!shown.text.contains("0123456789abcdef"), "no key is shown");
    // Without FILE, the store's own configuration counts, as for the daemon.
    let lease_dir = folder.path().to_str().unwrap();
    let json = check(&["--json", "--lease-dir", lease_dir, "--psk-file", psk]).unwrap();
    let value: serde_json::Value = serde_json::from_str(&json.text).unwrap();
    assert_eq!(value["Backend"]["UDPEncap"], true);
    assert_eq!(value["store"]["dir"], lease_dir);

    std::fs::write(psk, "short\n").unwrap();
    let short = check(&[conf, "--psk-file", psk]).unwrap_err();
    assert_eq!(short.code, 78);
    assert!(short.to_string().contains("at least 32 are needed"), "{short}");
    std::fs::write(conf, r#"{"Network": "10.244.0.0/31"}"#).unwrap();
    assert_eq!(check(&[conf, "--psk-file", psk]).unwrap_err().code, 78);
    assert_eq!(check(&[conf, "--", "--ifaec", "x"]).unwrap_err().code, 64);
    assert_eq!(check(&["--lease-dir", "/nonexistent/folder"]).unwrap_err().code, 69);
}

fn hostname() -> String {
    nix::unistd::gethostname().unwrap().into_string().unwrap()
}

#[test]
fn leases_of_a_folder_need_no_daemon() {
    let folder = Folder::new();
    let path = folder.path().to_str().unwrap();
    let none = execute(&["ringmail", "leases", "--lease-dir", path]).unwrap();
    assert_eq!((none.code, none.text.as_str()), (0, "no leases\n"));
    let missing = execute(&["ringmail", "leases", "--lease-dir", "/nonexistent/folder"]).unwrap_err();
    assert_eq!(missing.code, 69);
    let asked = execute(&["ringmail", "leases", "--run-dir", path]).unwrap_err();
    assert_eq!(asked.code, 1);
    assert!(asked.to_string().starts_with("no daemon answers at"), "{asked}");
}
