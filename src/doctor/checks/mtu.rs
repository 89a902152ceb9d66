//! Sizes of packets: of the uplink, of pods, in subnet.env, on the path.

use super::super::Severity::{Broken, Degraded};
use super::super::facts::{Link, overlap};
use super::{Facts, Finding, at_most};
use crate::kernel::netlink::LINK;

/// Devices of pods that take packets too large for the mesh.
pub(super) fn pods(facts: &Facts) -> Vec<Finding> {
    let Some(mesh) = facts.report.as_ref().and_then(|report| report.mtu) else {
        return Vec::new();
    };
    let leads = facts.pod_devices().into_iter().filter_map(|name| facts.link(name));
    let mut leads: Vec<&Link> = leads
        .filter(|link| link.name != LINK && Some(link.name.as_str()) != facts.uplink())
        .collect();
    let ports: Vec<&Link> = facts
        .links
        .iter()
        .filter(|port| leads.iter().any(|bridge| port.master == Some(bridge.index)))
        .collect();
    leads.extend(ports);
    leads.sort_by(|a, b| a.name.cmp(&b.name));
    leads.dedup();
    let finding = |link: &Link| {
        Finding::new(
            Degraded,
            "pod-mtu",
            &link.name,
            format!("{} takes larger packets than the mesh", link.name),
        )
        .seen(format!("{} has an MTU of {}, the mesh of {mesh}", link.name, link.mtu))
        .why(
            "a pod that sends full packets is told of the smaller size by ICMP at best: connections that hang after \
                 they began",
        )
        .run(format!(
            "ip link set dev {} mtu {mesh}; start the pods of this node anew",
            link.name
        ))
    };
    at_most(leads.into_iter().filter(|link| link.mtu > mesh).map(finding).collect())
}

/// What subnet.env tells the CNI plugin.
pub(super) fn subnet_env(facts: &Facts) -> Vec<Finding> {
    let Some((report, file)) = facts.report.as_ref().zip(facts.subnet_file.as_ref()) else {
        return Vec::new();
    };
    let file = file.display().to_string();
    let Some(text) = &facts.subnet_env else {
        if report.subnets.is_empty() {
            return Vec::new();
        }
        return vec![
            Finding::new(Broken, "subnet-env-missing", &file, format!("{file} is not there"))
                .seen("the daemon holds a lease, and the file can't be read")
                .why("the CNI plugin starts no pod without it")
                .run(format!("ls -ld {file}; {}", facts.log())),
        ];
    };
    let value = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    let mut findings = Vec::new();
    if let (Some(told), Some(mesh)) = (value("FLANNEL_MTU").and_then(|mtu| mtu.parse::<u32>().ok()), report.mtu)
        && told != mesh
    {
        findings.push(
            Finding::new(
                Degraded,
                "subnet-env-mtu",
                &file,
                format!("{file} has another MTU than the mesh"),
            )
            .seen(format!("FLANNEL_MTU={told}, the mesh has {mesh}"))
            .why("pods that start now send packets of a size that does not fit; another program wrote the file")
            .run(format!("cat {file}; {}", facts.restart())),
        );
    }
    let own = facts.own();
    let told = value("FLANNEL_SUBNET").and_then(|net| net.parse::<ipnet::IpNet>().ok());
    if let Some(told) = told
        && !own.is_empty()
        && !own.iter().any(|own| overlap(own, &told))
    {
        findings.push(
            Finding::new(
                Broken,
                "subnet-env-subnet",
                &file,
                format!("{file} names another subnet than the lease"),
            )
            .seen(format!(
                "FLANNEL_SUBNET={told}, the lease is of {}",
                report.subnets.join(" and ")
            ))
            .why("pods that start now get addresses that no other node sends to this one")
            .run(format!("cat {file}; {}", facts.restart())),
        );
    }
    findings
}

/// Peers that a packet of the mesh MTU does not reach.
pub(super) fn path(facts: &Facts) -> Vec<Finding> {
    let report = facts.report.as_ref();
    let mesh = report.and_then(|report| report.mtu);
    let uplink = facts.uplink().and_then(|name| facts.link(name)).map(|link| link.mtu);
    let short = facts.peers().iter().filter(|peer| peer.full_size == Some(false));
    let finding = |peer: &crate::node::report::PeerReport| {
        let (name, address) = (&peer.node, &peer.address);
        let size = |mtu: Option<u32>| mtu.map_or_else(|| "?".to_owned(), |mtu| mtu.to_string());
        let payload = uplink.map_or(1472, |mtu| mtu.saturating_sub(28));
        Finding::new(
            Broken,
            "path-mtu",
            name,
            format!("full packets do not reach peer {name}"),
        )
        .seen(format!(
            "small probes come back and those of {} bytes do not; the uplink's MTU is {}",
            size(mesh),
            size(uplink)
        ))
        .why("the path or the peer's uplink has a smaller MTU: connections hang once they send much")
        .run(format!(
            "ping -M do -s {payload} {address}; set \"MTU\" of Backend in net-conf.json on all nodes"
        ))
    };
    at_most(short.map(finding).collect())
}
