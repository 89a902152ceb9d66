//! The daemon, and what it says of its own parts.

use super::super::Severity::{Broken, Degraded, Notice};
use super::{Facts, Finding, Severity, at_most};
use crate::audit::Differs;

/// Whether a daemon answers.
pub(super) fn daemon(facts: &Facts) -> Vec<Finding> {
    let Some(unanswered) = &facts.unanswered else {
        return Vec::new();
    };
    let finding = if unanswered.absent {
        Finding::new(Broken, "daemon-absent", "node", "no daemon answers")
            .why(
                "what a daemon left in the kernel goes on and stays encrypted, but no key is changed, no peer is added \
                 and nothing is mended",
            )
            .run(facts.start())
    } else {
        Finding::new(
            Broken,
            "daemon-silent",
            "node",
            "the daemon does not answer as it should",
        )
        .why("its loop stands still, or it is of another version")
        .run(format!("{}; {}", facts.log(), facts.restart()))
    };
    vec![finding.seen(&unanswered.why)]
}

/// Whether this kernel can carry ESP, where there is no daemon that has tried.
pub(super) fn kernel(facts: &Facts) -> Vec<Finding> {
    let lacks = facts.kernel_lacks.iter();
    let finding = |why: &String| {
        Finding::new(
            Broken,
            "kernel-lacks",
            "node",
            "this kernel takes no ESP with the configured cipher",
        )
        .seen(why)
        .why("a module or a cipher is missing, so the daemon can't start")
        .run(
            after_backtick(why)
                .unwrap_or("modprobe -a esp4 esp6 xfrm_user gcm seqiv")
                .to_owned(),
        )
    };
    lacks.map(finding).collect()
}

/// The first command between backticks.
fn after_backtick(text: &str) -> Option<&str> {
    text.split('`').nth(1)
}

/// What the report calls a problem: which words stand for what. `LOG` in a command is what shows the daemon's.
const PROBLEMS: [(&str, &str, Severity, &str, &str, &str); 14] = [
    (
        "no uplink",
        "uplink-missing",
        Broken,
        "there is no uplink",
        "without an interface and its address nothing can be sent",
        "ip -br address; ringmail config check",
    ),
    (
        "no lease yet",
        "lease-missing",
        Broken,
        "this node holds no lease",
        "pods get no addresses here, and no other node knows this one",
        "ringmail leases",
    ),
    (
        "the store can't be",
        "store-outage",
        Degraded,
        "the store of leases is out of reach",
        "what is known stays in use; no node can join, and none learns of a new epoch of this one",
        "ringmail leases; LOG",
    ),
    (
        "the PSK can't be read",
        "psk-unreadable",
        Degraded,
        "the PSK can't be read",
        "the keys in use stay, and a restart of the daemon would fail",
        "ringmail config check",
    ),
    (
        "the new configuration is refused",
        "configuration-refused",
        Degraded,
        "the new configuration is refused",
        "the last good one stays in force until net-conf.json is right",
        "ringmail config check",
    ),
    (
        "no new epoch can begin",
        "epoch-stalled",
        Degraded,
        "no new epoch can begin",
        "keys grow old, and a peer that needs new ones is not served",
        "LOG",
    ),
    (
        "also claimed by",
        "claimed-twice",
        Broken,
        "another lease claims what is this node's",
        "neither is served by the others, since nobody can tell who is right",
        "ringmail leases",
    ),
    (
        "AllowPlaintextPeers",
        "plaintext-allowed",
        Degraded,
        "plaintext is allowed",
        "whoever can write leases can have traffic sent in plaintext",
        "take AllowPlaintextPeers out of net-conf.json",
    ),
    (
        "the guard has dropped",
        "plaintext-dropped",
        Degraded,
        "packets of the mesh came to the uplink without ESP, and were dropped",
        "nothing got out or in; somebody sends without encryption, or forges a pod's address, or did since the count began",
        "ringmail audit",
    ),
    (
        "which was taken from this node",
        "psk-needed",
        Notice,
        "a PSK that was taken away is still needed",
        "peers that have nothing newer are cut when it is dropped",
        "give the nodes that are named the newer key",
    ),
    (
        "PSK",
        "psk",
        Broken,
        "the PSK of this node does not do",
        "without a key in common no peer can be served",
        "ringmail status; compare the PSK files of the nodes",
    ),
    (
        "is in the way and is not ringmail's",
        "in-the-way",
        Broken,
        "another program's object is in the way",
        "ringmail leaves what others made, and what should stand there does not",
        "ringmail status",
    ),
    (
        "is in use by another program, and UDPEncap",
        "port-refused",
        Broken,
        "a port is in use by another program",
        "what comes in by UDP does not reach the daemon",
        "ss -lunp",
    ),
    (
        "",
        "problem",
        Degraded,
        "the daemon names a problem",
        "`ringmail status` shows it too",
        "LOG",
    ),
];

/// What the daemon says is wrong with its own parts.
pub(super) fn problems(facts: &Facts) -> Vec<Finding> {
    let problems = facts.report.iter().flat_map(|report| &report.problems);
    let finding = |text: &String| {
        let lower = text.to_lowercase();
        let known = PROBLEMS
            .iter()
            .find(|(words, ..)| text.contains(words) || lower.contains(words))?;
        let (_, check, severity, title, why, command) = *known;
        // An error that names its own remedy knows better, where nothing in it comes from the store: who can write there
        // must not choose what root runs.
        let local = [
            "uplink-missing",
            "lease-missing",
            "epoch-stalled",
            "psk-unreadable",
            "port-refused",
        ]
        .contains(&check);
        let own = after_backtick(text).filter(|own| local && own.contains(' '));
        let ends = match check {
            "in-the-way" => text.split_once("remove it: "),
            "plaintext-dropped" => text.split_once("set the count back: "),
            _ => None,
        };
        let own = ends.map(|(_, command)| command).or(own);
        let command = match (check, &facts.lease_dir) {
            // To make a folder where a file system is to be mounted would hide that it is not.
            ("store-outage", Some(folder)) => {
                let folder = folder.display();
                format!("ls -ld {folder}; findmnt -T {folder}; ringmail leases --lease-dir {folder}")
            }
            ("configuration-refused" | "psk-unreadable", Some(folder)) if own.is_none() => {
                format!("ringmail config check --lease-dir {} --psk-file FILE", folder.display())
            }
            _ => match own {
                // The error speaks of a daemon under systemd.
                Some(own) if own.starts_with("systemctl ") => facts.clear().unwrap_or_else(|| own.to_owned()),
                Some(own) => own.to_owned(),
                None => command.replace("LOG", &facts.log()),
            },
        };
        Some(
            Finding::new(severity, check, "node", title)
                .seen(text)
                .why(why)
                .run(command),
        )
    };
    problems.filter_map(finding).collect()
}

/// Whether the kernel holds what the daemon wants.
pub(super) fn drift(facts: &Facts) -> Vec<Finding> {
    let differences = facts.audit.iter().flat_map(|audit| &audit.differences);
    let finding = |difference: &crate::audit::Difference| {
        let (severity, what) = match difference.differs {
            Differs::Missing => (Broken, "is missing from the kernel"),
            Differs::Different => (Broken, "is not as it should be"),
            Differs::Extra => (Notice, "is left over in the kernel"),
        };
        let sides = [("wanted", &difference.wanted), ("found", &difference.found)];
        let sides: Vec<String> = sides
            .iter()
            .filter_map(|(side, value)| Some(format!("{side}: {}", value.as_ref()?)))
            .collect();
        Finding::new(
            severity,
            "drift",
            &difference.object,
            format!("{} {what}", difference.object),
        )
        .seen(sides.join("; "))
        .why(
            "the daemon mends what differs within a second: what still differs is kept so by another program, or the \
                 kernel refuses it",
        )
        .run(&difference.show)
    };
    at_most(differences.map(finding).collect())
}

/// Ways that plaintext could go, and plaintext that was seen.
pub(super) fn plaintext(facts: &Facts) -> Vec<Finding> {
    let ways = facts.audit.iter().flat_map(|audit| &audit.plaintext);
    let mut findings: Vec<Finding> = ways
        .map(|way| {
            Finding::new(Broken, "plaintext-open", "node", "plaintext has a way out or in")
                .seen(way)
                .why("the guard has several layers, and this one does not hold")
                .run("ringmail audit")
        })
        .collect();
    let both = facts.report.as_ref().zip(facts.later_report.as_ref());
    let both = both.and_then(|(before, after)| before.plaintext.zip(after.plaintext));
    for ((way, before), (_, after)) in both.iter().flat_map(|(b, a)| b.iter().zip(a.iter())) {
        let rise = after.packets.saturating_sub(before.packets);
        if rise == 0 {
            continue;
        }
        let leaving = way.contains("leav") || way.contains("out");
        let (why, command) = if leaving {
            (
                "a pod or program here sends to the mesh by a way that no policy takes; nothing got out",
                "ringmail audit; ip xfrm policy; ip route",
            )
        } else {
            (
                "a node sends without encryption, or somebody forges a pod's address; nothing got in",
                "tcpdump -ni UPLINK 'not esp and not udp port PORT'",
            )
        };
        let uplink = facts.uplink().unwrap_or("the uplink");
        findings.push(
            Finding::new(
                Broken,
                "plaintext-seen",
                uplink,
                "packets of the mesh came to the uplink without ESP",
            )
            .seen(format!(
                "the guard dropped {rise} in {:.0} s (counter {way}, {} in all)",
                facts.watched, after.packets
            ))
            .why(why)
            .run(
                command
                    .replace("UPLINK", uplink)
                    .replace("PORT", &encap_port(facts).to_string()),
            ),
        );
    }
    at_most(findings)
}

/// Ports that the backend wants and another program has.
pub(super) fn ports(facts: &Facts) -> Vec<Finding> {
    let Some(report) = &facts.report else {
        return Vec::new();
    };
    let daemon = facts.process.as_ref().map(|process| process.pid);
    let wanted = wanted_ports(facts);
    let theirs = facts.sockets.iter().filter(|socket| {
        wanted.contains(&socket.port) && !socket.kernel && socket.pid.is_some() && socket.pid != daemon
    });
    let finding = |socket: &super::super::facts::Socket| {
        let program = socket.program.as_deref().unwrap_or("an unknown program");
        Finding::new(
            Broken,
            "port-taken",
            format!("UDP {}", socket.port),
            format!("UDP port {} is another program's", socket.port),
        )
        .seen(format!(
            "{program} (pid {}) listens there",
            socket.pid.unwrap_or_default()
        ))
        .why(format!(
            "what other nodes send to it under {} does not reach ringmail",
            report.backend
        ))
        .run(format!(
            "ss -lunp 'sport = :{}'; stop {program}, or choose another port in net-conf.json",
            socket.port
        ))
    };
    theirs.map(finding).collect()
}

/// The UDP ports that a backend needs here.
pub(in crate::doctor) fn wanted_ports(facts: &Facts) -> Vec<u16> {
    let Some(report) = &facts.report else {
        return Vec::new();
    };
    match report.backend.as_str() {
        "ipsec" if report.encap != "false" => vec![encap_port(facts)],
        "vxlan" => vec![named_port(facts, "Port", 8472)],
        "udp" => vec![named_port(facts, "Port", 8285)],
        _ => Vec::new(),
    }
}

/// The UDP port that ESP in UDP goes to.
pub(super) fn encap_port(facts: &Facts) -> u16 {
    named_port(facts, "EncapPort", 4500)
}

/// A port that net-conf.json names, or `default`.
fn named_port(facts: &Facts, key: &str, default: u16) -> u16 {
    let conf = facts.conf.as_ref();
    let conf: serde_json::Value = conf
        .and_then(|conf| serde_json::from_str(&conf.text).ok())
        .unwrap_or_default();
    let port = conf["Backend"][key].as_u64().and_then(|port| port.try_into().ok());
    port.filter(|port| *port > 0).unwrap_or(default)
}

/// Whether the daemon's process runs out of descriptors.
pub(super) fn resources(facts: &Facts) -> Vec<Finding> {
    let tight = facts
        .process
        .iter()
        .filter(|process| process.open * 5 >= process.limit * 4);
    let finding = |process: &super::super::facts::Process| {
        Finding::new(
            Degraded,
            "descriptors",
            "node",
            "the daemon is running out of file descriptors",
        )
        .seen(format!(
            "{} of {} are open (pid {})",
            process.open, process.limit, process.pid
        ))
        .why("without one the store, the socket and the PSK can't be opened")
        .run(format!(
            "ls -l /proc/{}/fd; raise LimitNOFILE of {}",
            process.pid,
            match facts.pod {
                Some(_) => "the container runtime's service",
                None => "the service",
            }
        ))
    };
    tight.map(finding).collect()
}
