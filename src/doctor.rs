//! The doctor: what is wrong with this node and its mesh, worst first, each with the command to run next.
//!
//! ```text
//!   daemon's answers ─┐
//!   /proc, /sys ──────┤
//!   netlink dumps ────┼──▶ Facts ──▶ checks (pure) ──▶ findings, worst first ──▶ text, JSON, bundle
//!   packet filters ───┤
//!   files ────────────┘
//! ```
//! [`read`] fills [`Facts`], a value without a secret in it, and judges nothing. Each check is a pure function of the
//! facts. A counter that stands above zero is no finding: it may tell of last year. What rises while the doctor looks is
//! one, so what counts is read twice; the rest is explained in [`notes`].

pub mod bundle;
mod checks;
pub mod facts;
mod filter;
pub mod pod;
pub mod read;
#[cfg(test)]
pub(crate) mod tests;

use serde::Serialize;

use crate::kernel::xfrm_errors;
pub use facts::Facts;

/// How bad a finding is; the worst first.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Severity {
    /// Traffic stands still, or could go in plaintext.
    Broken,
    /// It goes, and not as it should.
    Degraded,
    /// It will not go for long, or could go better.
    Notice,
}

/// One thing that is wrong.
#[derive(Clone, Debug, Eq, PartialEq, Serialize)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// Which check found it: one of a fixed set of names, for programs.
    pub check: &'static str,
    /// What it is about: a peer, a device, a file; `node` for the node.
    pub subject: String,
    /// What is wrong.
    pub title: String,
    /// What was seen.
    pub evidence: String,
    /// What comes of it, or how it comes about.
    pub why: String,
    /// The command to run, or the line to write.
    pub command: String,
}

/// Everything that is wrong by these facts, worst first; without a finding the node is well as far as can be seen.
pub fn examine(facts: &Facts) -> Vec<Finding> {
    let mut findings: Vec<Finding> = checks::ALL.iter().flat_map(|check| check(facts)).collect();
    findings.sort_by(|a, b| (a.severity, a.check, &a.subject).cmp(&(b.severity, b.check, &b.subject)));
    findings.dedup();
    findings
}

/// What is worth saying and is no finding: what could not be read, and counters that stand still above zero.
pub fn notes(facts: &Facts) -> Vec<String> {
    let mut notes: Vec<String> = facts
        .unread
        .iter()
        .map(|what| format!("not looked at: {what}"))
        .collect();
    let dropped = facts.report.iter().filter_map(|report| report.plaintext);
    for (way, tally) in dropped.flat_map(|counters| counters.iter().collect::<Vec<_>>()) {
        if tally.packets > 0 {
            notes.push(format!(
                "the guard's counter {way} stands at {}: packets of the mesh without ESP, dropped since the guard was made",
                tally.packets
            ));
        }
    }
    for (name, value) in facts::counters(facts.text(facts::XFRM_STAT)) {
        if value > 0 {
            let meaning = xfrm_errors::explain(&name).unwrap_or("this version does not know it");
            notes.push(format!("{name} stands at {value} since this network began: {meaning}"));
        }
    }
    notes
}
