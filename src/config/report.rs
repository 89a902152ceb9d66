//! The effective configuration, for `ringmail config check`: every default filled in, no secret in it.

use serde_json::{Value, json};

use super::backend::{Backend, PskSource};
use super::flags::{Flags, Store};
use super::netconf::NetConf;
use crate::backend::Plain;
use crate::lease::Range;
use keys::EncapMode;

/// The effective configuration as one JSON object; the keys of net-conf.json keep their names.
pub fn effective(flags: &Flags, conf: &NetConf) -> Value {
    let store = flags.store().ok().map(|store| match store {
        Store::Dir(folder) => json!({ "dir": folder.display().to_string() }),
        Store::Etcd(access, _) => json!({
            "etcd": access.endpoints.to_string(),
            "prefix": access.prefix,
            "user": access.user.map(|(user, _)| user),
        }),
        Store::Kube(access) => json!({ "kube": access.to_string(), "prefix": access.keys.prefix() }),
    });
    let path = |path: &std::path::Path| path.display().to_string();
    let list = |items: Vec<String>| Value::from(items);
    json!({
        "node": flags.node_name.as_str(),
        "store": store,
        "run_dir": path(&flags.run_dir),
        "subnet_file": path(&flags.subnet_file),
        "net_config_path": path(&flags.net_config_path),
        "metrics": flags.metrics.map(|address| address.to_string()),
        "metrics-peers": flags.metrics_peers,
        "ip_masq": flags.ip_masq,
        "uplink": {
            "iface": list(flags.iface.iter().map(ToString::to_string).collect()),
            "iface_regex": list(flags.iface_regex.iter().map(ToString::to_string).collect()),
            "iface_can_reach": flags.iface_can_reach,
            "public_ip": flags.public_ip,
            "public_ipv6": flags.public_ipv6,
        },
        "Network": conf.network.v4.map(|r| range(&r, r.net)),
        "IPv6Network": conf.network.v6.map(|r| range(&r, r.net)),
        "EnableNFTables": conf.nftables,
        "Backend": backend(&conf.backend),
        "warnings": flags.warnings().into_iter().chain(conf.warnings.iter().cloned()).collect::<Vec<_>>(),
    })
}

fn range<N>(range: &Range<N>, net: impl ToString) -> Value {
    json!({ "net": net.to_string(), "SubnetLen": range.subnet_len, "first": range.first, "last": range.last })
}

fn backend(backend: &Backend) -> Value {
    let ipsec = match backend {
        Backend::Ipsec(ipsec) => ipsec,
        Backend::Plain(plain) => return self::plain(plain),
        Backend::Other(_) => return json!({ "Type": backend.name() }),
    };
    let tuning = &ipsec.tuning;
    let psk = match &ipsec.psk {
        PskSource::File(path) => json!({ "file": path.display().to_string() }),
        PskSource::Secret(secret) => json!({ "secret": secret.to_string() }),
        PskSource::Inline(psk) => json!({ "kid": psk.kid().to_string() }),
    };
    let encap = match tuning.encap.mode {
        EncapMode::Esp => json!(false),
        EncapMode::Udp => json!(true),
        EncapMode::Auto => json!("auto"),
    };
    json!({
        "Type": "ipsec",
        "PSK": psk,
        "UDPEncap": encap,
        "EncapPort": tuning.encap.port,
        "ESPProposal": tuning.cipher.name(),
        "RekeyAfter": format!("{}s", tuning.rekey_after.as_secs()),
        "RekeyPackets": tuning.rekey.packets,
        "RekeyBytes": tuning.rekey.bytes,
        "PSKGrace": format!("{}s", tuning.psk_grace.as_secs()),
        "AllowPlaintextPeers": tuning.plaintext.as_ref().map_or(Value::Bool(false), self::plain),
        "MTU": tuning.mtu.map_or_else(|| json!("computed"), |mtu| json!(mtu)),
    })
}

fn plain(plain: &Plain) -> Value {
    match plain {
        Plain::Vxlan(vxlan) => json!({
            "Type": plain.name(),
            "VNI": vxlan.vni,
            "Port": vxlan.port,
            "GBP": vxlan.gbp,
            "Learning": vxlan.learning,
            "DirectRouting": vxlan.direct,
            "MTU": vxlan.outer_mtu.map_or_else(|| json!("the uplink's"), |mtu| json!(mtu)),
        }),
        Plain::Ipip(ipip) => json!({ "Type": plain.name(), "DirectRouting": ipip.direct }),
        Plain::Udp(udp) => json!({ "Type": plain.name(), "Port": udp.port }),
        Plain::Extension(commands) => json!({
            "Type": plain.name(),
            "PreStartupCommand": commands.pre_startup,
            "PostStartupCommand": commands.post_startup,
            "SubnetAddCommand": commands.subnet_add,
            "SubnetRemoveCommand": commands.subnet_remove,
        }),
        Plain::HostGw | Plain::Alloc => json!({ "Type": plain.name() }),
    }
}

/// `value` for people: one line a setting, `Backend.Type  ipsec`. What is not set is left out.
pub fn text(value: &Value) -> String {
    let mut rows = Vec::new();
    flatten("", value, &mut rows);
    let width = rows.iter().map(|(key, _)| key.len()).max().unwrap_or(0);
    rows.into_iter()
        .map(|(key, value)| format!("{key:width$}  {value}\n"))
        .collect()
}

fn flatten(key: &str, value: &Value, rows: &mut Vec<(String, String)>) {
    let below = |part: &str| {
        if key.is_empty() {
            part.to_owned()
        } else {
            format!("{key}.{part}")
        }
    };
    match value {
        Value::Null => {}
        Value::Object(members) => members
            .iter()
            .for_each(|(part, value)| flatten(&below(part), value, rows)),
        Value::Array(items) => items.iter().for_each(|item| flatten(key, item, rows)),
        Value::String(text) => rows.push((key.to_owned(), text.clone())),
        Value::Bool(_) | Value::Number(_) => rows.push((key.to_owned(), value.to_string())),
    }
}
