//! The machine: its tables and memory, its clock, its processor, the kernel's counters of trouble.

use super::super::Severity::{Degraded, Notice};
use super::super::facts::{SNMP, XFRM_STAT};
use super::{Facts, Finding, at_most};
use crate::admin::Verdict;
use crate::kernel::xfrm_errors;

/// A table or memory that is this full, percent, is named.
const FULL: u64 = 90;
/// Memory that is left, percent of all, below which it is named.
const LEFT: u64 = 5;
/// A clock may be so much behind an epoch, seconds: epochs rise by one at least, also within a second.
const AHEAD: u64 = 300;

/// Counters that rose while they were watched.
pub(super) fn counters(facts: &Facts) -> Vec<Finding> {
    let seconds = facts.watched;
    let xfrm = facts.risen(XFRM_STAT).into_iter().map(|(name, by)| {
        let why = xfrm_errors::explain(&name).unwrap_or("a counter of a later kernel than this version knows");
        Finding::new(Degraded, "xfrm-counter", &name, "the kernel's IPsec drops packets")
            .seen(format!("{name} rose by {by} in {seconds:.0} s"))
            .why(why)
            .run("cat /proc/net/xfrm_stat; ringmail status; ringmail audit")
    });
    let mut findings: Vec<Finding> = xfrm.collect();
    let udp = facts.risen(SNMP);
    if let Some(by) = udp.get("Udp.RcvbufErrors") {
        findings.push(
            Finding::new(
                Notice,
                "udp-buffers",
                "node",
                "UDP packets are dropped for want of room in a socket's buffer",
            )
            .seen(format!("RcvbufErrors of Udp rose by {by} in {seconds:.0} s"))
            .why(
                "a program reads too slowly, or net.core.rmem_max is small; if it is ringmail's, probes and the udp \
                 backend's data are lost",
            )
            .run("ss -lunm; sysctl -w net.core.rmem_max=8388608"),
        );
    }
    at_most(findings)
}

/// Tables and memory that are nearly full.
pub(super) fn limits(facts: &Facts) -> Vec<Finding> {
    let mut findings = Vec::new();
    let full = |used: u64, room: u64| room > 0 && used.saturating_mul(100) >= room.saturating_mul(FULL);
    let tracked = facts
        .number("sys/net/netfilter/nf_conntrack_count")
        .zip(facts.number("sys/net/netfilter/nf_conntrack_max"));
    if let Some((used, room)) = tracked.filter(|(used, room)| full(*used, *room)) {
        findings.push(
            Finding::new(
                Degraded,
                "conntrack",
                "node",
                "the table of tracked connections is nearly full",
            )
            .seen(format!("{used} of {room}"))
            .why("when it is full, packets of new connections are dropped")
            .run(format!(
                "sysctl -w net.netfilter.nf_conntrack_max={}; conntrack -S",
                (room * 4).max(65_536)
            )),
        );
    }
    for (family, table) in [("ipv4", "arp_cache"), ("ipv6", "ndisc_cache")] {
        let held = neighbours(facts.text(&format!("net/stat/{table}")));
        let room = facts.number(&format!("sys/net/{family}/neigh/default/gc_thresh3"));
        if let Some((held, room)) = held.zip(room).filter(|(held, room)| full(*held, *room)) {
            findings.push(
                Finding::new(
                    Degraded,
                    "neighbours",
                    family,
                    format!("the {family} neighbour table is nearly full"),
                )
                .seen(format!("{held} entries, gc_thresh3 is {room}"))
                .why("when it is full, hosts and pods that are new can't be reached")
                .run(format!(
                    "sysctl -w net.{family}.neigh.default.gc_thresh3={}",
                    (room * 4).max(4096)
                )),
            );
        }
    }
    let memory = |name: &str| {
        let line = facts
            .text("meminfo")
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.split_whitespace().next()?.parse::<u64>().ok()
    };
    let memory = memory("MemAvailable").zip(memory("MemTotal"));
    if let Some((left, all)) = memory.filter(|(left, all)| left.saturating_mul(100) < all.saturating_mul(LEFT)) {
        findings.push(
            Finding::new(Degraded, "memory", "node", "memory is nearly used up")
                .seen(format!("{} of {} MiB are available", left / 1024, all / 1024))
                .why("the kernel then refuses SAs and policies (ENOMEM), and may end the daemon")
                .run("ps -eo pid,rss,comm --sort=-rss | head; slabtop -o | head -20"),
        );
    }
    findings
}

/// The entries of a neighbour table, by the first line of numbers below /proc/net/stat: the first column, hexadecimal.
fn neighbours(text: &str) -> Option<u64> {
    u64::from_str_radix(text.lines().nth(1)?.split_whitespace().next()?, 16).ok()
}

/// Epochs that are ahead of this clock.
pub(super) fn clock(facts: &Facts) -> Vec<Finding> {
    let now = facts.now;
    let ahead = |epoch: u64| epoch.saturating_sub(now);
    let mut findings = Vec::new();
    let own = facts.report.as_ref().and_then(|report| report.epoch);
    if let Some(epoch) = own.filter(|epoch| ahead(*epoch) > AHEAD) {
        findings.push(
            Finding::new(Notice, "clock-back", "node", "the clock was set back")
                .seen(format!("epoch {epoch} began {} s after what this clock says it is now", ahead(epoch)))
                .why(
                    "an epoch's number is the time at which it began: epochs go on above it, but leases and logs are read \
                     wrongly, and certificates may fail",
                )
                .run("timedatectl; chronyc tracking"),
        );
        // Against a clock that is wrong itself nothing can be said of others.
        return findings;
    }
    let leases = facts.leases.iter().flat_map(|leases| &leases.leases);
    for lease in leases.filter(|lease| lease.verdict != Verdict::Own) {
        if let Some(epoch) = lease.epoch.filter(|epoch| ahead(*epoch) > AHEAD) {
            let name = &lease.node;
            findings.push(
                Finding::new(
                    Notice,
                    "clock-ahead",
                    name,
                    format!("the clock of {name} is ahead, or this node's behind"),
                )
                .seen(format!(
                    "its epoch {epoch} began {} s after what this clock says it is now",
                    ahead(epoch)
                ))
                .why(
                    "if it is set right, its epochs go on above this one; a node that lost its store is refused until \
                     then",
                )
                .run("timedatectl on both nodes; chronyc tracking"),
            );
        }
    }
    at_most(findings)
}

/// A processor without instructions for the cipher.
pub(super) fn processor(facts: &Facts) -> Vec<Finding> {
    let cipher = facts.report.as_ref().map_or("", |report| report.cipher.as_str());
    let text = facts.text("cpuinfo");
    let flags = text.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        ["flags", "Features"].contains(&name.trim()).then_some(value)
    });
    let lacks = flags.is_some_and(|flags| !flags.split_whitespace().any(|flag| flag == "aes"));
    if !cipher.starts_with("aes") || !lacks || text.contains("User Mode Linux") {
        return Vec::new();
    }
    vec![
        Finding::new(Notice, "no-aes", "node", "this processor has no AES instructions")
            .seen(format!("/proc/cpuinfo names no flag aes, and the cipher is {cipher}"))
            .why("AES without them is several times slower than ChaCha20-Poly1305, and its time tells of the key")
            .run("\"ESPProposal\": \"chacha20poly1305\" in Backend of net-conf.json"),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_neighbour_table_is_counted_in_hexadecimal() {
        let text = "entries  allocs\n0000001f  00000040\n0000001f  00000000\n";
        assert_eq!(neighbours(text), Some(31));
        assert_eq!(neighbours(""), None);
    }
}
