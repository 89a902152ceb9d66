//! How a lease is written down: flannel's subnet key and flannel's value, with the two fields that flannel lacks.
//!
//! Reading accepts all that flannel writes; writing yields one spelling. Nothing here touches a file or a socket, and
//! no input panics.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};

use crate::lease::{Addresses, BackendData, Lease, NodeName, Subnets};

/// A text that is no subnet key.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum BadKey {
    /// Not of the form at all.
    #[error("{0:?} is no subnet key: 10.244.1.0-24, fd00:244:0:1::-64 or both with & between is needed")]
    Form(String),
    /// The address is not the first of its subnet.
    #[error("{0} has host bits: the subnet is {1}")]
    HostBits(IpNet, IpNet),
}

/// A value that is no lease.
#[derive(Debug, thiserror::Error)]
pub enum BadValue {
    /// Not the JSON of a lease.
    #[error("not the JSON of a lease: {0}")]
    Json(serde_json::Error),
    /// No node is named.
    #[error("no \"Node\" is named")]
    NoNode,
}

/// The value of a lease. flannel (`pkg/lease`, `LeaseAttrs`) always writes both addresses, `0.0.0.0` where IPv4 is off,
/// and leaves out what is empty of the rest.
#[derive(Deserialize, Serialize)]
struct Wire {
    #[serde(rename = "Node", default, skip_serializing_if = "Option::is_none")]
    node: Option<NodeName>,
    #[serde(rename = "PublicIP", default)]
    public: Option<Ipv4Addr>,
    #[serde(rename = "PublicIPv6", default)]
    public_v6: Option<Ipv6Addr>,
    #[serde(rename = "BackendType", default, skip_serializing_if = "String::is_empty")]
    backend: String,
    #[serde(rename = "BackendData", default, skip_serializing_if = "BackendData::is_null")]
    data: BackendData,
    #[serde(rename = "BackendV6Data", default, skip_serializing_if = "BackendData::is_null")]
    v6_data: BackendData,
    #[serde(rename = "Revision", default, skip_serializing_if = "is_zero")]
    revision: u64,
}

fn is_zero(number: &u64) -> bool {
    *number == 0
}

/// flannel's key of `subnets`: `10.244.1.0-24`, `10.244.1.0-24&fd00:244:0:1::-64`, and for IPv6 alone
/// `fd00:244:0:1::-64` (where flannel writes `0.0.0.0-0&…`).
pub fn key(subnets: &Subnets) -> String {
    let nets: Vec<String> = subnets
        .iter()
        .map(|net| format!("{}-{}", net.network(), net.prefix_len()))
        .collect();
    nets.join("&")
}

/// The subnets that `text` names; the opposite of [`key`], and reads flannel's IPv6-only form too.
pub fn parse_key(text: &str) -> Result<Subnets, BadKey> {
    let form = || BadKey::Form(text.chars().take(100).collect());
    let (first, second) = match text.split_once('&') {
        Some((v4, v6)) => (v4, Some(v6)),
        None => (text, None),
    };
    let first = parse_net(first).ok_or_else(form)?;
    let subnets = match (first, second.map(|text| parse_net(text).ok_or_else(form)).transpose()?) {
        (IpNet::V4(any), Some(IpNet::V6(v6))) if any == Ipv4Net::default() => Subnets { v4: None, v6: Some(v6) },
        (IpNet::V4(v4), Some(IpNet::V6(v6))) => Subnets {
            v4: Some(v4),
            v6: Some(v6),
        },
        (one, None) => Subnets::from_iter([one]),
        (_, Some(_)) => return Err(form()),
    };
    match subnets.iter().find(|net| *net != net.trunc()) {
        Some(net) => Err(BadKey::HostBits(net, net.trunc())),
        None => Ok(subnets),
    }
}

/// `ADDRESS-LENGTH`, host bits as they are.
fn parse_net(text: &str) -> Option<IpNet> {
    let (address, length) = text.rsplit_once('-')?;
    if length.is_empty() || length.len() > 3 || !length.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    IpNet::new(address.parse().ok()?, length.parse().ok()?).ok()
}

/// The value of `lease` as flannel itself writes it: on one line, and without the node's name, which flannel does not know.
pub fn encode_flannel(lease: &Lease) -> String {
    serde_json::to_string(&wire(lease, None, 0)).expect("a lease is plain JSON")
}

/// The value of `lease`, as JSON for people and programs, with `revision` (left out where it is 0).
pub fn encode(lease: &Lease, revision: u64) -> String {
    let wire = wire(lease, Some(lease.node.clone()), revision);
    let mut text = serde_json::to_string_pretty(&wire).expect("a lease is plain JSON");
    text.push('\n');
    text
}

fn wire(lease: &Lease, node: Option<NodeName>, revision: u64) -> Wire {
    let Lease {
        node: _,
        subnets: _,
        public,
        backend,
        data,
        v6_data,
    } = lease;
    Wire {
        node,
        public: Some(public.v4.unwrap_or(Ipv4Addr::UNSPECIFIED)),
        public_v6: public.v6,
        backend: backend.clone(),
        data: data.clone(),
        v6_data: v6_data.clone(),
        revision,
    }
}

/// The lease of `subnets` that `value` describes, and its revision (0 where none is given).
pub fn decode(subnets: Subnets, value: &[u8]) -> Result<(Lease, u64), BadValue> {
    decode_named(subnets, value, |_| None)
}

/// The same, where a value that names no node is given the name that `name` makes of what it says.
pub fn decode_named(
    subnets: Subnets,
    value: &[u8],
    name: impl FnOnce(&Unnamed<'_>) -> Option<NodeName>,
) -> Result<(Lease, u64), BadValue> {
    let Wire {
        node,
        public,
        public_v6,
        backend,
        data,
        v6_data,
        revision,
    } = serde_json::from_slice(value).map_err(BadValue::Json)?;
    let public = Addresses {
        v4: public.filter(|address| !address.is_unspecified()),
        v6: public_v6.filter(|address| !address.is_unspecified()),
    };
    let unnamed = Unnamed {
        public: &public,
        backend: &backend,
        data: &data,
    };
    let node = node.or_else(|| name(&unnamed)).ok_or(BadValue::NoNode)?;
    Ok((
        Lease {
            node,
            subnets,
            public,
            backend,
            data,
            v6_data,
        },
        revision,
    ))
}

/// What a value without a node's name says that a name can be made of.
#[derive(Clone, Copy, Debug)]
pub struct Unnamed<'a> {
    /// The public addresses.
    pub public: &'a Addresses,
    /// `BackendType`.
    pub backend: &'a str,
    /// `BackendData`.
    pub data: &'a BackendData,
}

/// Whether two sets of subnets share an address.
pub fn overlap(a: &Subnets, b: &Subnets) -> bool {
    let v4 = |a: Ipv4Net, b: Ipv4Net| a.contains(&b) || b.contains(&a);
    let v6 = |a: Ipv6Net, b: Ipv6Net| a.contains(&b) || b.contains(&a);
    a.v4.zip(b.v4).is_some_and(|(a, b)| v4(a, b)) || a.v6.zip(b.v6).is_some_and(|(a, b)| v6(a, b))
}
