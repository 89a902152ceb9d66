//! What `ringmail doctor` reads of other programs and the kernel: any text is judged, and every finding says all that it has
//! to. The input is a byte for what it is of, and the text.

use std::sync::LazyLock;

use ringmail::doctor::facts::{FilterKind, FilterText, NETSTAT, SNMP, XFRM_STAT};
use ringmail::doctor::{Facts, examine, notes};
use serde_json::{Value, json};

const FILTERS: [(FilterKind, &str); 3] = [
    (FilterKind::Nft, "nft"),
    (FilterKind::Iptables4, "iptables-legacy"),
    (FilterKind::Iptables6, "ip6tables-legacy"),
];

const TEXTS: [&str; 8] = [
    XFRM_STAT,
    SNMP,
    NETSTAT,
    "cpuinfo",
    "meminfo",
    "net/stat/arp_cache",
    "sys/net/netfilter/nf_conntrack_count",
    "sys/net/ipv4/conf/eth0/rp_filter",
];

/// A node with a peer of both families, in order.
static HEALTHY: LazyLock<Facts> = LazyLock::new(|| {
    let peer = json!({
        "node": "node-b", "subnets": ["10.244.2.0/24", "fd00:10:244:2::/64"], "address": "192.0.2.2", "state": "up",
        "reason": null, "generation": null, "newest": null, "spi_out": null, "spi_in": null, "encap": "esp", "heard": 4.0,
        "round_trip": 0.4, "loss": 0.0, "full_size": true, "bytes_out": 0, "bytes_in": 0, "packets_out": 0, "packets_in": 0,
        "errors": 0
    });
    let report: Value = json!({
        "node": "node-a", "network": ["10.244.0.0/16", "fd00:10:244::/48"], "subnets": ["10.244.1.0/24", "fd00:10:244:1::/64"],
        "public": ["192.0.2.1", "2001:db8::1"], "uplink": "eth0", "mtu": 1446, "backend": "ipsec", "cipher": "aes128gcm16",
        "encap": "auto", "plaintext": null, "epoch": null, "epoch_age": null, "next_epoch": null, "psks": [], "complete": true,
        "problems": [], "rejected": {}, "peers": [peer]
    });
    Facts {
        report: Some(serde_json::from_value(report).expect("a report")),
        ..Facts::default()
    }
});

pub(crate) fn run(data: &[u8]) {
    let Some((kind, text)) = data.split_first() else {
        return;
    };
    let (kind, text) = (usize::from(*kind), String::from_utf8_lossy(text).into_owned());
    let mut facts = HEALTHY.clone();
    match FILTERS.get(kind % 16) {
        Some((by, program)) => facts.filters.push(FilterText {
            by: *by,
            program: (*program).to_owned(),
            text,
        }),
        None => {
            let path = TEXTS[kind % TEXTS.len()].to_owned();
            // Watched from the first half of its lines to all of them.
            let half = text.lines().count() / 2;
            let before: String = text.lines().take(half).flat_map(|line| [line, "\n"]).collect();
            facts.later.insert(path.clone(), text);
            facts.texts.insert(path, before);
        }
    }
    for finding in examine(&facts) {
        for said in [&finding.title, &finding.evidence, &finding.why, &finding.command] {
            assert!(!said.is_empty(), "{finding:?}");
        }
    }
    drop(notes(&facts));
}
