//! The text of every finding.

use super::super::doctor::render;
use super::*;
use crate::doctor::pod::Pod;
use crate::doctor::{examine, notes, tests};

#[test]
fn every_finding_reads_as_its_golden_file_says() {
    for (name, facts) in tests::cases() {
        let text = render(&examine(&facts), &[], PLAIN);
        golden(&format!("../doctor/{name}.txt"), &text);
    }
}

/// In a container of the DaemonSet there is no systemd.
#[test]
fn in_a_pod_the_commands_are_kubectls() {
    let mut differ = Vec::new();
    for (name, mut facts) in tests::cases() {
        let outside = examine(&facts);
        facts.pod = Some(Pod {
            namespace: "kube-system".into(),
            name: None,
            node: "node-a".into(),
        });
        let within = examine(&facts);
        for finding in &within {
            for word in ["systemctl", "journalctl", "of the service"] {
                assert!(!finding.command.contains(word), "{finding:?}");
            }
        }
        if within != outside {
            differ.push(name);
            golden(&format!("../doctor/{name}-pod.txt"), &render(&within, &[], PLAIN));
        }
    }
    let expected = [
        "daemon-absent",
        "daemon-silent",
        "epoch-stalled",
        "problem",
        "descriptors",
        "subnet-env-missing",
        "subnet-env-mtu",
        "subnet-env-subnet",
    ];
    assert_eq!(differ, expected);
}

#[test]
fn a_healthy_node_is_told_so_with_what_its_counters_mean() {
    let mut facts = tests::healthy();
    facts
        .unread
        .push("the packet filter: neither nft nor iptables-save is here or answers".into());
    golden(
        "../doctor/healthy.txt",
        &render(&examine(&facts), &notes(&facts), PLAIN),
    );
}

#[test]
fn nothing_that_a_finding_quotes_reaches_the_terminal_as_a_command() {
    let mut facts = tests::healthy();
    facts
        .report
        .as_mut()
        .unwrap()
        .problems
        .push("no lease yet\x1b[2J\nbroken: fine".into());
    let text = render(&examine(&facts), &[], PLAIN);
    assert!(!text.contains('\x1b') && !text.contains("\nbroken: fine"), "{text}");
}
