//! Objects and operations in the words of `ip`, for people to compare.

use std::collections::BTreeMap;

use ipnet::IpNet;
use keys::Spi;
use ringmail::kernel::device::{Device, DeviceKind};
use ringmail::kernel::firewall::open::{End, Match};
use ringmail::kernel::firewall::{Form, OpenRule, Rule, Source, Way};
use ringmail::kernel::{Key, Object, Objects, Op, Route, priority, reqid_slot};
use xfrm::{Action, Policy, Sa};

/// One line for each object, more for the firewall.
pub(crate) fn objects(objects: &Objects) -> String {
    objects
        .iter()
        .map(|(key, object)| format!("{}\n", line(key, object)))
        .collect()
}

/// What one holds and the other does not: `-` for the first, `+` for the second.
pub(crate) fn difference(first: &Objects, second: &Objects) -> String {
    let mut lines = BTreeMap::new();
    for (mark, these, those) in [("-", first, second), ("+", second, first)] {
        for (key, object) in these.iter().filter(|(key, object)| those.get(*key) != Some(*object)) {
            lines.insert((key.clone(), mark), format!("{mark} {}\n", line(key, object)));
        }
    }
    lines.into_values().collect()
}

/// An operation: `make`, `change` or `break`, and what.
pub(crate) fn op(op: &Op) -> String {
    match op {
        Op::Make(key, object) => format!("make   {}", line(key, object)),
        Op::Change(key, object) => format!("change {}", line(key, object)),
        Op::Break(Key::Sa(id)) => format!("break  state dst {} spi {}", id.dst, Spi(id.spi)),
        Op::Break(Key::Policy(id) | Key::Guard(_, id)) => format!("break  policy {id}"),
        Op::Break(key) => format!("break  {key}"),
    }
}

fn line(key: &Key, object: &Object) -> String {
    match (key, object) {
        (Key::Sysctl(path), Object::Sysctl(value)) => format!("sysctl {path} = {value}"),
        (Key::Firewall, Object::Firewall(firewall)) => {
            let mut text = match firewall.form {
                Form::Sealed | Form::Ajar => format!("firewall on {}", firewall.uplink),
                Form::Open { nft: true, .. } => "rules of nf_tables".into(),
                Form::Open { nft: false, .. } => "rules of iptables".into(),
            };
            for rule in firewall.rules() {
                text.push_str(&format!("\n         {}", self::rule(&rule)));
            }
            text
        }
        (Key::GuardRoute(net), Object::Unreachable) => format!("route unreachable {net}"),
        (Key::Guard(..) | Key::Policy(_), Object::Policy(policy)) => self::policy(policy),
        (Key::GuardRoute(net), Object::Blackhole) => format!("route blackhole {net}"),
        (Key::Link(name), Object::Link(device)) => link(name, device),
        (Key::Neighbour(link, address), Object::Neighbour(mac)) => {
            format!("neighbour {address} lladdr {mac} dev {link}")
        }
        (Key::Fdb(link, mac), Object::Fdb(remote)) => format!("fdb {mac} dst {remote} dev {link}"),
        (Key::Address(link, address), Object::Address) => format!("address {} dev {link}", IpNet::from(*address)),
        (Key::HashThreshold(family), Object::HashThreshold { remote }) => {
            format!("policy hash threshold {family:?} local 0 remote {remote}")
        }
        (Key::Sa(_), Object::Sa { sa, born }) => {
            let born = born.map_or_else(
                || "of an earlier process".to_owned(),
                |born| format!("generation {born}"),
            );
            format!("{} {born}", state(sa))
        }
        (Key::Route(net), Object::Route(route)) => format!("route {net}{}", self::route(route)),
        (key, object) => panic!("{key} holds {object:?}"),
    }
}

fn link(name: &str, Device { kind, mtu, up, .. }: &Device) -> String {
    let kind = match kind {
        DeviceKind::Sink => "dummy".into(),
        DeviceKind::Vxlan(vxlan) => format!(
            "vxlan id {} local {} dev if{} dstport {} address {}{}{}",
            vxlan.vni,
            vxlan.local,
            vxlan.parent,
            vxlan.port,
            vxlan.mac,
            if vxlan.learning { " learning" } else { " nolearning" },
            if vxlan.gbp { " gbp" } else { "" },
        ),
        DeviceKind::Ipip { local } => format!("ipip local {local} remote any"),
        DeviceKind::Tun => "tun".into(),
    };
    format!("link {name} type {kind} mtu {mtu} {}", if *up { "up" } else { "down" })
}

fn route(Route { link, via, source, mtu }: &Route) -> String {
    let mut text = String::new();
    text.extend(via.map(|via| format!(" via {}", via.gateway)));
    text.push_str(&format!(" dev {link}"));
    text.push_str(if via.is_some_and(|via| via.onlink) {
        " onlink"
    } else {
        ""
    });
    text.extend(source.map(|source| format!(" src {source}")));
    text.extend(mtu.map(|mtu| format!(" mtu {mtu}")));
    text
}

fn open_rule(rule: &OpenRule) -> String {
    let family = if rule.v6 { "IPv6" } else { "IPv4" };
    let side = |name, end: Option<End>| {
        let text = |end: End| format!(" {name} {}{}", if end.inside { "" } else { "not " }, end.net);
        end.map(text).unwrap_or_default()
    };
    let what = match rule.what {
        Match::Marked => " marked by kube-proxy".into(),
        Match::Ends(from, to) => side("from", from) + &side("to", to),
    };
    format!("{family}{what}: {:?}", rule.act)
}

fn rule(rule: &Rule) -> String {
    match rule {
        Rule::Open(rule) => open_rule(rule),
        Rule::Refuse(Way::Arriving, net) => format!("arriving: from {net}, not ESP: drop"),
        Rule::Refuse(Way::Leaving, net) => format!("leaving: to {net}, not for ESP: drop"),
        Rule::Translate { from, to, source } => {
            let side = |net: &Option<IpNet>| net.map_or_else(|| "any".to_owned(), |net| net.to_string());
            let source = match source {
                Source::Kept => "as it is".to_owned(),
                Source::Base(base) => format!("source {base}"),
                Source::Masquerade { random_fully: true } => "masquerade, ports at random".to_owned(),
                Source::Masquerade { random_fully: false } => "masquerade".to_owned(),
            };
            format!("source: {} to {}: {source}", side(from), side(to))
        }
    }
}

fn policy(policy: &Policy) -> String {
    let Policy {
        id,
        priority,
        action,
        template,
    } = policy;
    let priority = match *priority {
        priority::PROBE => "probe",
        priority::PEER => "peer",
        priority::LOCAL => "local",
        priority::BLOCK => "block",
        other => return format!("policy {id} priority {other:#x}"),
    };
    let mut text = format!("policy {id} priority {priority}");
    if *action == Action::Block {
        text.push_str(" action block");
    }
    if let Some(template) = template {
        text.push_str(&format!(" tmpl src {} dst {}", template.src, template.dst));
        if template.spi != 0 {
            text.push_str(&format!(" spi {}", Spi(template.spi)));
        }
        text.push_str(&format!(" reqid {}", self::reqid(template.reqid)));
    }
    text
}

fn reqid(reqid: u32) -> String {
    reqid_slot(reqid).map_or_else(|| format!("{reqid:#x}"), |slot| format!("slot {}", slot.get()))
}

fn state(sa: &Sa) -> String {
    let Sa {
        src,
        dst,
        spi,
        reqid,
        algorithm,
        encap,
        replay_window,
        esn,
        direction,
        limits: _,
        af_unspec,
    } = sa;
    let mut text = format!(
        "state src {src} dst {dst} spi {} reqid {}",
        Spi(*spi),
        self::reqid(*reqid)
    );
    text.push_str(&format!(" aead {} {}", algorithm.name, algorithm.key_bits));
    if let Some(encap) = encap {
        text.push_str(&format!(" encap espinudp {} {}", encap.sport, encap.dport));
    }
    text.push_str(&format!(" window {replay_window}"));
    for (flag, set) in [("esn", esn), ("af-unspec", af_unspec)] {
        if *set {
            text.push_str(&format!(" {flag}"));
        }
    }
    if let Some(direction) = direction {
        text.push_str(&format!(" dir {direction:?}").to_lowercase());
    }
    text
}
