//! The checks: each a pure function of the facts, a file a subject.

mod filters;
mod leases;
mod leftovers;
mod machine;
mod mtu;
mod node;
mod peers;
mod routes;

use super::{Facts, Finding, Severity};
pub(super) use node::wanted_ports;

/// A check.
pub(super) type Check = fn(&Facts) -> Vec<Finding>;

/// Every check. What the kernel's own answer to each is, the files say.
pub(super) const ALL: [Check; 29] = [
    node::daemon,
    node::kernel,
    node::problems,
    node::drift,
    node::plaintext,
    node::ports,
    node::resources,
    peers::state,
    peers::loss,
    peers::latency,
    peers::errors,
    leases::duplicates,
    leases::outside,
    leases::exhaustion,
    leases::unreadable,
    mtu::pods,
    mtu::subnet_env,
    mtu::path,
    routes::shadows,
    routes::rules,
    routes::policies,
    routes::settings,
    filters::drops,
    leftovers::found,
    leftovers::cni,
    machine::counters,
    machine::limits,
    machine::clock,
    machine::processor,
];

/// Most findings of one check; the last says how many more there are.
const MOST: usize = 10;

impl Finding {
    fn new(severity: Severity, check: &'static str, subject: impl Into<String>, title: impl Into<String>) -> Self {
        Self {
            severity,
            check,
            subject: subject.into(),
            title: title.into(),
            evidence: String::new(),
            why: String::new(),
            command: String::new(),
        }
    }

    fn seen(self, evidence: impl Into<String>) -> Self {
        Self {
            evidence: evidence.into(),
            ..self
        }
    }

    fn why(self, why: impl Into<String>) -> Self {
        Self {
            why: why.into(),
            ..self
        }
    }

    fn run(self, command: impl Into<String>) -> Self {
        Self {
            command: command.into(),
            ..self
        }
    }
}

/// The worst findings, the first of those that are as bad, and how many more there are.
fn at_most(mut findings: Vec<Finding>) -> Vec<Finding> {
    findings.sort_by_key(|finding| finding.severity);
    let more = findings.len().saturating_sub(MOST);
    findings.truncate(MOST);
    if let (true, Some(last)) = (more > 0, findings.last_mut()) {
        last.evidence += &format!("; and {more} more of this kind");
    }
    findings
}
