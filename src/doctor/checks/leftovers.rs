//! What another network program left on this node.

use super::super::Severity::{Degraded, Notice};
use super::super::facts::{CniFile, FilterKind, Link};
use super::{Facts, Finding, at_most};

/// Devices by the start of their names, and whose they are.
const DEVICES: [(&str, &str); 13] = [
    ("flannel.", "flannel"),
    ("flannel-v6.", "flannel"),
    ("flannel-wg", "flannel"),
    ("flannel0", "flannel"),
    ("cilium_", "Cilium"),
    ("cali", "Calico"),
    ("vxlan.calico", "Calico"),
    ("wireguard.cali", "Calico"),
    ("kube-bridge", "kube-router"),
    ("weave", "Weave"),
    ("vxlan-6784", "Weave"),
    ("antrea-gw0", "Antrea"),
    ("ovn-k8s-mp0", "OVN"),
];

/// Chains and tables of packet filters by the start of their names, and whose they are.
const CHAINS: [(&str, &str); 6] = [
    ("FLANNEL-", "flannel"),
    ("flannel-", "flannel"),
    ("cali-", "Calico"),
    ("CILIUM_", "Cilium"),
    ("WEAVE-", "Weave"),
    ("KUBE-ROUTER-", "kube-router"),
];

/// Devices and rules of other network programs, and of flannel where ringmail does not use its names.
pub(super) fn found(facts: &Facts) -> Vec<Finding> {
    if facts.report.is_none() {
        return Vec::new();
    }
    let owner = |names: &[(&'static str, &'static str)], name: &str| {
        names
            .iter()
            .find(|(start, _)| name.starts_with(start))
            .map(|(_, owner)| *owner)
    };
    let uses_flannels = uses_flannels(facts);
    // Whose devices lead to pods of this mesh works beside ringmail, as Calico's policies do (Canal), and left nothing over.
    let devices = facts.pod_devices();
    let beside: Vec<&str> = devices.iter().filter_map(|name| owner(&DEVICES, name)).collect();
    let left = |owner: &&str| !beside.contains(owner) && (*owner != "flannel" || !uses_flannels);
    let device = |link: &Link| {
        let owner = owner(&DEVICES, &link.name).filter(left)?;
        let name = &link.name;
        Some(
            Finding::new(Degraded, "leftover-device", name, format!("{name} of {owner} is here"))
                .seen(format!(
                    "device {name}, MTU {}, {}",
                    link.mtu,
                    if link.up { "up" } else { "down" }
                ))
                .why("two network programs on a node take each other's packets; a route to it goes past the mesh")
                .run(format!(
                    "make sure that {owner} does not run here, then: ip link delete {name}"
                )),
        )
    };
    let mut findings: Vec<Finding> = facts.links.iter().filter_map(device).collect();
    for filter in &facts.filters {
        let names = chain_names(filter.by, &filter.text);
        let theirs = names.iter().find_map(|name| {
            let owner = owner(&CHAINS, name).filter(left)?;
            Some((name, owner))
        });
        let Some((name, owner)) = theirs else { continue };
        findings.push(
            Finding::new(
                Notice,
                "leftover-rules",
                &filter.program,
                format!("rules of {owner} are in the packet filter"),
            )
            .seen(format!("{name}, as {} shows it", filter.program))
            .why("they accept, drop or translate what the mesh carries by another program's idea of it")
            .run(format!(
                "make sure that {owner} does not run here, then remove them, or restart the node"
            )),
        );
    }
    at_most(findings)
}

/// Whether ringmail itself goes by flannel's names: it does under all backends but ipsec, and while it lets peers be
/// served in plaintext.
fn uses_flannels(facts: &Facts) -> bool {
    let allows = |problem: &String| problem.contains("AllowPlaintextPeers");
    !facts.encrypts() || facts.report.iter().any(|report| report.problems.iter().any(allows))
}

/// Names of chains and tables.
fn chain_names(by: FilterKind, text: &str) -> Vec<String> {
    match by {
        FilterKind::Iptables4 | FilterKind::Iptables6 => {
            let name = |line: &str| line.strip_prefix(':')?.split_whitespace().next().map(str::to_owned);
            text.lines().filter_map(name).collect()
        }
        FilterKind::Nft => {
            let all: serde_json::Value = serde_json::from_str(text).unwrap_or_default();
            let objects = all["nftables"].as_array().cloned().unwrap_or_default();
            let name = |object: &serde_json::Value| {
                let object = [&object["table"], &object["chain"]]
                    .into_iter()
                    .find(|object| object.is_object())?;
                object["name"].as_str().map(str::to_owned)
            };
            objects.iter().filter_map(name).collect()
        }
    }
}

/// A configuration of the container runtime that comes before ours.
pub(super) fn cni(facts: &Facts) -> Vec<Finding> {
    let Some(ours) = facts.cni.iter().position(CniFile::is_ours) else {
        return Vec::new();
    };
    // Multus calls what comes behind it.
    let delegates = |file: &&CniFile| !file.plugins.iter().any(|name| name.starts_with("multus"));
    let Some(first) = facts.cni[..ours].iter().find(delegates) else {
        return Vec::new();
    };
    let (folder, ours) = (facts.cni_folder.display(), &facts.cni[ours].name);
    vec![
        Finding::new(
            Degraded,
            "cni-order",
            &first.name,
            format!("the container runtime takes {} in the place of ringmail's", first.name),
        )
        .seen(format!(
            "{folder}/{} (plugins: {}) comes before {ours}",
            first.name,
            first.plugins.join(", ")
        ))
        .why("a runtime takes the first file by name: pods that start now are not of the mesh")
        .run(format!(
            "mv {folder}/{} /root/; start the pods that began meanwhile anew",
            first.name
        )),
    ]
}
