//! What an object of ours means, in words, and the command that shows it.

use std::collections::BTreeMap;
use std::net::IpAddr;

use keys::{Cipher, Slot, Spi};
use serde::{Deserialize, Serialize};
use xfrm::{Action, Direction, Limits, Policy, Sa, SaId, Selector};

use super::Directory;
use crate::epochs::Generation;
use crate::kernel::device::{Device, DeviceKind};
use crate::kernel::firewall::{Firewall, Form};
use crate::kernel::{Key, Object, Objects, Route, reqid_slot};

/// What an SA is used for.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Use {
    /// Sending: the `out` policy names it, data goes on it.
    Sending,
    /// Sending: only probes go on it.
    Probing,
    /// Sending: no policy names it (yet, or any more).
    Idle,
    /// Receiving, on the newest generation of the peer.
    Receiving,
    /// Receiving what is still under way on an older generation.
    Draining,
    /// An earlier process made it, and it serves until a generation of this process is confirmed.
    Inherited,
    /// The plan does not know it.
    Stray,
    /// Receiving, but there is no plan that says more.
    Unplanned,
}

/// One SA, explained.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Association {
    /// The SPI as `ip xfrm state` prints it.
    pub spi: String,
    /// Outer source.
    pub src: String,
    /// Outer destination.
    pub dst: String,
    /// `in` or `out`, seen from this node.
    pub direction: String,
    /// The node that sends on it.
    pub sender: String,
    /// The node that receives on it.
    pub receiver: String,
    /// The sender's epoch modulo 64, as the SPI shows it.
    pub sender_epoch_mod64: Option<u8>,
    /// The receiver's epoch modulo 64.
    pub receiver_epoch_mod64: Option<u8>,
    /// The whole epochs, sender's > receiver's, where this process made the SA.
    pub generation: Option<String>,
    /// The cipher.
    pub cipher: String,
    /// `esp`, or `udp` with its two ports.
    pub encap: String,
    /// What it is used for.
    #[serde(rename = "use")]
    pub usage: Use,
}

/// Every SA of `actual`, by its id. Without `desired` only the policies in the kernel tell what is used.
pub(super) fn associations(desired: Option<&Objects>, actual: &Objects, directory: &Directory) -> Vec<Association> {
    let newest = desired.map(newest_received).unwrap_or_default();
    let named = named_by_policies(actual);
    let all = actual.iter().filter_map(|(key, object)| match (key, object) {
        (Key::Sa(id), Object::Sa { sa, .. }) => Some((id, &**sa)),
        _ => None,
    });
    all.map(|(id, sa)| {
        let wanted = desired.map(|desired| desired.get(&Key::Sa(*id)));
        let born = match wanted {
            Some(Some(Object::Sa { born, .. })) => *born,
            _ => None,
        };
        let inward = inward(sa);
        let usage = match (wanted, inward) {
            (Some(None), _) => Use::Stray,
            (Some(Some(_)), _) if born.is_none() => Use::Inherited,
            (None, true) => Use::Unplanned,
            (Some(Some(_)), true) if newest.get(&sa.reqid) == born.as_ref() => Use::Receiving,
            (Some(Some(_)), true) => Use::Draining,
            (_, false) => match named.get(id) {
                Some(Named::Data) => Use::Sending,
                Some(Named::Probe) => Use::Probing,
                None => Use::Idle,
            },
        };
        explained(sa, inward, born, usage, directory)
    })
    .collect()
}

fn explained(sa: &Sa, inward: bool, born: Option<Generation>, usage: Use, directory: &Directory) -> Association {
    let parts = Spi(sa.spi).parts().ok();
    let peer = reqid_slot(sa.reqid).map_or_else(|| "no node's reqid".into(), |slot| directory.name(slot));
    let own = directory.own_name();
    let (sender, receiver) = if inward { (peer, own) } else { (own, peer) };
    Association {
        spi: Spi(sa.spi).to_string(),
        src: sa.src.to_string(),
        dst: sa.dst.to_string(),
        direction: if inward { "in" } else { "out" }.into(),
        sender,
        receiver,
        sender_epoch_mod64: parts.map(|parts| parts.sender_mod64),
        receiver_epoch_mod64: parts.map(|parts| parts.receiver_mod64),
        generation: born.map(|born| born.to_string()),
        cipher: cipher(sa),
        encap: sa
            .encap
            .map_or_else(|| "esp".into(), |encap| format!("udp {}>{}", encap.sport, encap.dport)),
        usage,
    }
}

/// Whether this node receives on it: the reqid is the peer's slot, the SPI shows the sender's.
fn inward(sa: &Sa) -> bool {
    let sender: Option<Slot> = Spi(sa.spi).parts().ok().map(|parts| parts.slot);
    sender.is_some() && sender == reqid_slot(sa.reqid)
}

/// By reqid, the newest generation that is received on.
fn newest_received(desired: &Objects) -> BTreeMap<u32, Generation> {
    let mut newest: BTreeMap<u32, Generation> = BTreeMap::new();
    for object in desired.values() {
        if let Object::Sa { sa, born: Some(born) } = object
            && inward(sa)
        {
            let held = newest.entry(sa.reqid).or_insert(*born);
            *held = (*held).max(*born);
        }
    }
    newest
}

#[derive(Clone, Copy, Eq, Ord, PartialEq, PartialOrd)]
enum Named {
    Probe,
    Data,
}

fn named_by_policies(actual: &Objects) -> BTreeMap<SaId, Named> {
    let mut named = BTreeMap::new();
    for (key, object) in actual {
        if let (Key::Policy(id), Object::Policy(policy)) = (key, object)
            && id.direction == Direction::Out
            && let Some(template) = policy.template
        {
            let by = if id.selector.protocol == 0 {
                Named::Data
            } else {
                Named::Probe
            };
            let sa = SaId {
                dst: template.dst,
                spi: template.spi,
            };
            let held = named.entry(sa).or_insert(by);
            *held = (*held).max(by);
        }
    }
    named
}

/// The cipher's configured name, or the kernel's where it is none of ours.
pub(super) fn cipher(sa: &Sa) -> String {
    known_cipher(sa).map_or_else(|| sa.algorithm.name.to_string(), |cipher| cipher.to_string())
}

/// Which of the ciphers that ringmail speaks the SA has.
pub(super) fn known_cipher(sa: &Sa) -> Option<Cipher> {
    Cipher::ALL.into_iter().find(|cipher| {
        sa.algorithm.name == cipher.kernel_name()
            && usize::try_from(sa.algorithm.key_bits) == Ok((cipher.key_len() + Cipher::SALT_LEN) * 8)
            && sa.algorithm.icv_bits == cipher.icv_bits()
    })
}

/// What an object holds, in the words of `ip`.
pub(super) fn describe(object: &Object) -> String {
    match object {
        Object::Sysctl(value) => value.clone(),
        Object::Firewall(firewall) => describe_firewall(firewall),
        Object::Unreachable => "unreachable".into(),
        Object::Policy(policy) => describe_policy(policy),
        Object::Blackhole => "blackhole".into(),
        Object::Link(device) => describe_device(device),
        Object::Neighbour(mac) => format!("lladdr {mac}"),
        Object::Fdb(remote) => format!("dst {remote}"),
        Object::Address => "present".into(),
        Object::HashThreshold { remote } => format!("local 0, remote {remote} bits"),
        Object::Sa { sa, .. } => describe_sa(sa),
        Object::Route(route) => describe_route(route),
    }
}

fn describe_device(Device { kind, mtu, up, sound }: &Device) -> String {
    let down = if *up { "" } else { ", down" };
    let sound = if *sound {
        ""
    } else {
        ", checksums spoiled by this kernel"
    };
    let kind = match kind {
        DeviceKind::Sink => String::new(),
        DeviceKind::Vxlan(vxlan) => format!(
            ", vxlan id {} local {} dstport {} address {}{}{}",
            vxlan.vni,
            vxlan.local,
            vxlan.port,
            vxlan.mac,
            if vxlan.learning { "" } else { " nolearning" },
            if vxlan.gbp { " gbp" } else { "" }
        ),
        DeviceKind::Ipip { local } => format!(", ipip local {local}"),
        DeviceKind::Tun => ", tun".into(),
    };
    format!("mtu {mtu}{kind}{down}{sound}")
}

fn describe_route(Route { link, via, source, mtu }: &Route) -> String {
    let onlink = if via.is_some_and(|via| via.onlink) {
        " onlink"
    } else {
        ""
    };
    let via = via.map(|via| format!("via {} ", via.gateway)).unwrap_or_default();
    let source = source.map(|source| format!(" src {source}")).unwrap_or_default();
    let mtu = mtu.map(|mtu| format!(" mtu {mtu}")).unwrap_or_default();
    format!("{via}dev {link}{onlink}{source}{mtu}")
}

fn describe_firewall(firewall: &Firewall) -> String {
    let Firewall {
        form,
        own,
        uplink,
        masquerade,
        ..
    } = firewall;
    let masquerade = if *masquerade { ", masquerade" } else { "" };
    if let Form::Open { forward, .. } = form {
        let forward = if *forward { ", forwarding accepted" } else { "" };
        return format!("own subnets {own}{masquerade}{forward}");
    }
    format!("the guard at {uplink}, own subnets {own}{masquerade}")
}

fn describe_policy(policy: &Policy) -> String {
    let action = match policy.action {
        Action::Allow => "allow",
        Action::Block => "block",
    };
    let template = policy.template.map(|t| {
        let spi = if t.spi == 0 {
            String::new()
        } else {
            format!(" spi {}", Spi(t.spi))
        };
        let level = if t.optional { " optional" } else { "" };
        format!(
            " tmpl src {} dst {} proto esp{spi} reqid {}{level}",
            t.src, t.dst, t.reqid
        )
    });
    format!("{action} priority {}{}", policy.priority, template.unwrap_or_default())
}

fn describe_sa(sa: &Sa) -> String {
    let Sa {
        src,
        dst: _,
        spi: _,
        reqid,
        algorithm: _,
        encap,
        replay_window,
        esn,
        direction,
        limits,
        af_unspec,
    } = sa;
    let mut text = format!("src {src} reqid {reqid} {} replay-window {replay_window}", cipher(sa));
    if let Some(encap) = encap {
        text += &format!(" encap espinudp {} {}", encap.sport, encap.dport);
    }
    if let Some(direction) = direction {
        text += match direction {
            xfrm::SaDirection::In => " dir in",
            xfrm::SaDirection::Out => " dir out",
        };
    }
    text += if *esn { " esn" } else { " no esn" };
    text += if *af_unspec { " af-unspec" } else { " one family" };
    let Limits {
        soft_packets,
        hard_packets,
        soft_bytes,
        hard_bytes,
    } = limits;
    for (name, limit) in [
        ("packet-soft", soft_packets),
        ("packet-hard", hard_packets),
        ("byte-soft", soft_bytes),
        ("byte-hard", hard_bytes),
    ] {
        if *limit != u64::MAX {
            text += &format!(" {name} {limit}");
        }
    }
    text
}

/// The command that shows what the kernel holds under `key`. SAs are listed with `nokeys`.
pub(super) fn command(key: &Key, object: Option<&Object>) -> String {
    match key {
        Key::Sysctl(path) => format!("sysctl {path}"),
        Key::Firewall => "nft list table inet ringmail || iptables-save".into(),
        Key::GuardRoute(net) | Key::Route(net) => {
            format!("ip {}route show exact {net}", v6(net.addr()))
        }
        Key::Guard(_, id) | Key::Policy(id) => {
            let direction = match id.direction {
                Direction::In => "in",
                Direction::Fwd => "fwd",
                Direction::Out => "out",
            };
            // `get` wants the device's name, which is not known here; `list` shows it among its like.
            let verb = if id.selector.ifindex == 0 { "get" } else { "list" };
            format!("ip xfrm policy {verb} dir {direction} {}", selector(&id.selector))
        }
        Key::Link(name) => format!("ip -d link show dev {name}"),
        Key::Neighbour(link, address) => format!("ip neighbour show {address} dev {link}"),
        Key::Fdb(link, mac) => format!("bridge fdb show dev {link} | grep {mac}"),
        Key::Address(link, _) => format!("ip address show dev {link}"),
        // Twice counted shows the thresholds.
        Key::HashThreshold(_) => "ip -s -s xfrm policy count".into(),
        Key::Sa(id) => {
            let src = match object {
                Some(Object::Sa { sa, .. }) => format!("src {} ", sa.src),
                _ => String::new(),
            };
            format!(
                "ip -s xfrm state list nokeys {src}dst {} proto esp spi {}",
                id.dst,
                Spi(id.spi)
            )
        }
    }
}

fn v6(address: IpAddr) -> &'static str {
    if address.is_ipv6() { "-6 " } else { "" }
}

fn selector(selector: &Selector) -> String {
    let Selector {
        src,
        dst,
        protocol,
        sport,
        dport,
        ifindex: _,
    } = selector;
    let mut text = format!("src {src} dst {dst}");
    if *protocol != 0 {
        text += &format!(" proto {protocol}");
    }
    for (word, port) in [("sport", sport), ("dport", dport)] {
        if let Some(port) = port {
            text += &format!(" {word} {port}");
        }
    }
    text
}
