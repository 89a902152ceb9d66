//! What `nft -j list ruleset` shows (libnftables-json(5)).

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::Value;

use super::{Ask, Chain, Filter, Hook, Rule, Verdict};
use crate::kernel::nft::TABLE;

/// Reads a text; our own table is left out.
pub(super) fn parse(text: &str) -> Filter {
    let mut filter = Filter::default();
    let Ok(all) = serde_json::from_str::<Value>(text) else {
        return filter;
    };
    let objects = all["nftables"].as_array().map_or(&[][..], Vec::as_slice);
    let foreign = |value: &&Value| value.is_object() && value["table"] != TABLE;
    for chain in objects.iter().map(|object| &object["chain"]).filter(foreign) {
        if let Some(chain) = self::chain(chain) {
            filter.add(chain);
        }
    }
    for rule in objects.iter().map(|object| &object["rule"]).filter(foreign) {
        let at = id(rule, rule["chain"].as_str().unwrap_or_default());
        if let Some(chain) = filter.chain_mut(&at) {
            chain.rules.push(self::rule(rule));
        }
    }
    filter
}

fn word<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

fn id(of: &Value, chain: &str) -> String {
    format!("{} {} {chain}", word(of, "family"), word(of, "table"))
}

fn chain(value: &Value) -> Option<Chain> {
    let (family, table, name) = (word(value, "family"), word(value, "table"), word(value, "name"));
    let v6 = match family {
        "ip" => Some(false),
        "ip6" => Some(true),
        "inet" => None,
        _ => return None,
    };
    let hook = match word(value, "hook") {
        _ if word(value, "type") == "nat" => None,
        "prerouting" => Some(Hook::Prerouting),
        "input" => Some(Hook::Input),
        "forward" => Some(Hook::Forward),
        "output" => Some(Hook::Output),
        "postrouting" => Some(Hook::Postrouting),
        _ => None,
    };
    Some(Chain {
        id: id(value, name),
        v6,
        hook,
        drops: word(value, "policy") == "drop",
        rules: Vec::new(),
        name: format!("chain {name} of table {family} {table} (nft)"),
        accept: format!("nft insert rule {family} {table} {name} {{}} accept"),
    })
}

fn rule(value: &Value) -> Rule {
    let (family, table, chain) = (word(value, "family"), word(value, "table"), word(value, "chain"));
    let (mut asks, mut verdict, mut packets) = (Vec::new(), Verdict::Continue, None);
    for part in value["expr"].as_array().map_or(&[][..], Vec::as_slice) {
        let Some((kind, inner)) = part.as_object().and_then(|part| part.iter().next()) else {
            continue;
        };
        match kind.as_str() {
            "match" => asks.extend(self::asks(inner)),
            "counter" => packets = inner["packets"].as_u64(),
            "accept" => verdict = Verdict::Accept,
            "drop" | "reject" => verdict = Verdict::Drop,
            "return" => verdict = Verdict::Return,
            "jump" => verdict = Verdict::Jump(id(value, word(inner, "target"))),
            "goto" => verdict = Verdict::Goto(id(value, word(inner, "target"))),
            // A map may accept what it names, and so may a program that the packet is queued for.
            "vmap" | "queue" => verdict = Verdict::Unsure,
            "log" | "mangle" | "notrack" => {}
            _ => asks.push(Ask::Unknown),
        }
    }
    let handle = value["handle"].as_u64().unwrap_or_default();
    Rule {
        asks,
        verdict,
        packets,
        text: format!("rule {handle} in chain {chain} of table {family} {table} (nft)"),
        remove: format!("nft delete rule {family} {table} {chain} handle {handle}"),
    }
}

/// What a match asks for; a port is asked of its protocol alone.
fn asks(value: &Value) -> Vec<Ask> {
    let not = match word(value, "op") {
        "==" | "in" => false,
        "!=" => true,
        _ => return vec![Ask::Unknown],
    };
    let right = &value["right"];
    let meta = word(&value["left"]["meta"], "key");
    let payload = &value["left"]["payload"];
    let (protocol, field) = (word(payload, "protocol"), word(payload, "field"));
    let known = match (meta, protocol, field) {
        ("l4proto", ..) | (_, "ip", "protocol") | (_, "ip6", "nexthdr") => {
            each(right, self::protocol).map(|protocols| vec![Ask::Protocol(protocols, not)])
        }
        ("iifname" | "iif", ..) => each(right, name).map(|names| vec![Ask::In(names, not)]),
        ("oifname" | "oif", ..) => each(right, name).map(|names| vec![Ask::Out(names, not)]),
        ("nfproto", ..) => match right.as_str() {
            Some("ipv4") => Some(vec![Ask::V6(not)]),
            Some("ipv6") => Some(vec![Ask::V6(!not)]),
            _ => None,
        },
        (_, "ip" | "ip6", "saddr" | "daddr") => each(right, net).map(|nets| {
            let ask = match field {
                "saddr" => Ask::Source(nets, not),
                _ => Ask::Destination(nets, not),
            };
            vec![Ask::V6(protocol == "ip6"), ask]
        }),
        (_, "udp" | "tcp", "dport") => each(right, port).and_then(|ports| {
            let protocol = self::protocol(&Value::from(protocol))?;
            Some(vec![Ask::Protocol(vec![protocol], false), Ask::Port(ports, not)])
        }),
        (_, "esp", _) => Some(vec![Ask::Protocol(vec![50], false), Ask::Unknown]),
        (_, "udp" | "tcp", _) => {
            self::protocol(&Value::from(protocol)).map(|number| vec![Ask::Protocol(vec![number], false), Ask::Unknown])
        }
        _ => None,
    };
    known.unwrap_or_else(|| vec![Ask::Unknown])
}

/// One value or each of a set; `None` where one is not understood.
fn each<T>(value: &Value, one: impl Fn(&Value) -> Option<T>) -> Option<Vec<T>> {
    match value["set"].as_array() {
        Some(all) => all.iter().map(one).collect(),
        None => one(value).map(|one| vec![one]),
    }
}

fn name(value: &Value) -> Option<String> {
    value.as_str().map(str::to_owned)
}

fn protocol(value: &Value) -> Option<u8> {
    match value.as_str() {
        Some("esp") => Some(50),
        Some("ah") => Some(51),
        Some("udp") => Some(17),
        Some("tcp") => Some(6),
        Some("icmp") => Some(1),
        Some("ipv6-icmp" | "icmpv6") => Some(58),
        Some("sctp") => Some(132),
        Some(_) => None,
        None => value.as_u64()?.try_into().ok(),
    }
}

fn net(value: &Value) -> Option<IpNet> {
    if let Some(address) = value.as_str() {
        return Some(address.parse::<IpAddr>().ok()?.into());
    }
    let prefix = &value["prefix"];
    let address: IpAddr = prefix["addr"].as_str()?.parse().ok()?;
    IpNet::new(address, prefix["len"].as_u64()?.try_into().ok()?).ok()
}

fn port(value: &Value) -> Option<(u16, u16)> {
    let number = |value: &Value| value.as_u64()?.try_into().ok();
    match value["range"].as_array() {
        Some(range) => Some((number(range.first()?)?, number(range.get(1)?)?)),
        None => number(value).map(|port| (port, port)),
    }
}
