//! The text of every finding.

use super::super::doctor::render;
use super::*;
use crate::doctor::{examine, notes, tests};

#[test]
fn every_finding_reads_as_its_golden_file_says() {
    for (name, facts) in tests::cases() {
        let text = render(&examine(&facts), &[], PLAIN);
        golden(&format!("../doctor/{name}.txt"), &text);
    }
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
