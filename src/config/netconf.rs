//! net-conf.json: the Network, how it is cut into subnets, and the backend.
//!
//! flannel's keys, defaults and texts (its `CheckNetworkConfig`), applied to every store alike, with the value and the
//! remedy added. Two passes: the first finds the backend's type, the second reads the rest, so that every wrong value
//! is found where it stands.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use keys::Slot;
use serde::de::MapAccess;
use zeroize::Zeroizing;

use super::backend::{Around, Backend, Kind, Raw as RawBackend, TypeOf};
use super::conf_error::{ConfError, Rule};
use super::json::{Members, Object, boolean, parsed, read, whole};
use crate::lease::{Network, Range};
use crate::psk::SecretName;

/// net-conf.json, understood.
#[derive(Clone, Debug)]
pub struct NetConf {
    /// The address ranges of the mesh.
    pub network: Network,
    /// flannel's `EnableNFTables`.
    pub nftables: bool,
    /// The datapath.
    pub backend: Backend,
    /// What is odd but understood, one text each, for the log.
    pub warnings: Vec<String>,
}

/// What net-conf.json does not say itself.
#[derive(Clone, Copy, Debug)]
pub struct Context<'a> {
    /// What the text is called in errors: a path or a key of a store.
    pub file: &'a str,
    /// `--psk-file`, where it is given: it makes `ipsec` the default backend and goes before the Backend's own PSK.
    pub psk_file: Option<&'a Path>,
    /// `--psk-secret`, where it is given: the same for a Secret.
    pub psk_secret: Option<&'a SecretName>,
}

/// The Network holds an address of the uplink, so packets to it would be caught by the mesh.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error(
    "Network {net} holds {address}, an address of the uplink: choose a Network apart from the nodes' own addresses, \
     or another uplink with --iface"
)]
pub struct Overlap {
    /// The range.
    pub net: IpNet,
    /// The address in it.
    pub address: IpAddr,
}

/// Checks that none of the uplink's `addresses` lies in the Network.
///
/// # Errors
/// [`Overlap`], with the first that does.
pub fn check_overlap(network: &Network, addresses: &[IpAddr]) -> Result<(), Overlap> {
    let overlap = |&address: &IpAddr| {
        Some(Overlap {
            net: network.nets().find(|net| net.contains(&address))?,
            address,
        })
    };
    addresses.iter().find_map(overlap).map_or(Ok(()), Err)
}

impl NetConf {
    /// Understands `json`.
    ///
    /// # Errors
    /// [`ConfError::Json`] or [`ConfError::Rule`].
    pub fn parse(json: &str, context: &Context<'_>) -> Result<Self, ConfError> {
        let mut type_of = TypeOf::default();
        let mut raw = Raw::default();
        let both = read(json, &mut type_of).and_then(|()| {
            raw.kind = type_of.kind;
            read(json, &mut raw)
        });
        both.map_err(|wrong| ConfError::Json {
            file: context.file.to_owned(),
            line: wrong.line,
            column: wrong.column,
            text: wrong.text,
        })?;
        raw.finish(context).map_err(|rule| ConfError::Rule {
            file: context.file.to_owned(),
            rule,
        })
    }

    /// Reads and understands the file at `path`.
    ///
    /// # Errors
    /// [`ConfError`].
    pub fn load(path: &Path, psk_file: Option<&Path>, psk_secret: Option<&SecretName>) -> Result<Self, ConfError> {
        let file = path.display().to_string();
        let unread = |source| ConfError::Read {
            file: file.clone(),
            source: Arc::new(source),
        };
        // It may hold a PSK, so the text is wiped.
        let json = std::fs::read_to_string(path).map(Zeroizing::new).map_err(unread)?;
        Self::parse(
            &json,
            &Context {
                file: &file,
                psk_file,
                psk_secret,
            },
        )
    }
}

/// The members of the document as read.
#[derive(Default)]
struct Raw {
    kind: Option<Kind>,
    v4: Option<bool>,
    v6: Option<bool>,
    nftables: Option<bool>,
    network: Option<Ipv4Net>,
    len: Option<u64>,
    min: Option<Ipv4Addr>,
    max: Option<Ipv4Addr>,
    network6: Option<Ipv6Net>,
    len6: Option<u64>,
    min6: Option<Ipv6Addr>,
    max6: Option<Ipv6Addr>,
    backend: Option<RawBackend>,
    warnings: Vec<String>,
}

const KEYS: &[&str] = &[
    "EnableIPv4",
    "EnableIPv6",
    "EnableNFTables",
    "Network",
    "SubnetLen",
    "SubnetMin",
    "SubnetMax",
    "IPv6Network",
    "IPv6SubnetLen",
    "IPv6SubnetMin",
    "IPv6SubnetMax",
    "Backend",
];

const CIDR4: &str = "invalid IPv4 CIDR format, one such as \"10.244.0.0/16\" is needed";
const CIDR6: &str = "invalid IPv6 CIDR format, one such as \"fd00:244::/48\" is needed";
const ADDRESS4: &str = "an IPv4 address such as \"10.244.1.0\" is needed";
const ADDRESS6: &str = "an IPv6 address such as \"fd00:244:0:1::\" is needed";

impl Members for Raw {
    fn keys(&self) -> &'static [&'static str] {
        KEYS
    }

    fn set<'de, A: MapAccess<'de>>(&mut self, key: &'static str, map: &mut A) -> Result<(), A::Error> {
        match key {
            "EnableIPv4" => self.v4 = boolean(key, map)?,
            "EnableIPv6" => self.v6 = boolean(key, map)?,
            "EnableNFTables" => self.nftables = boolean(key, map)?,
            "Network" => self.network = parsed(key, CIDR4, map, |v| v.parse().ok())?,
            "SubnetLen" => self.len = whole(key, u32::MAX.into(), map)?,
            "SubnetMin" => self.min = parsed(key, ADDRESS4, map, |v| v.parse().ok())?,
            "SubnetMax" => self.max = parsed(key, ADDRESS4, map, |v| v.parse().ok())?,
            "IPv6Network" => self.network6 = parsed(key, CIDR6, map, |v| v.parse().ok())?,
            "IPv6SubnetLen" => self.len6 = whole(key, u32::MAX.into(), map)?,
            "IPv6SubnetMin" => self.min6 = parsed(key, ADDRESS6, map, |v| v.parse().ok())?,
            "IPv6SubnetMax" => self.max6 = parsed(key, ADDRESS6, map, |v| v.parse().ok())?,
            _ => {
                let mut backend = RawBackend::of(self.kind);
                let there = map.next_value_seed(Object {
                    name: "Backend",
                    members: &mut backend,
                })?;
                self.backend = there.then_some(backend);
            }
        }
        Ok(())
    }

    fn warn(&mut self, text: String) {
        self.warnings.push(text);
    }
}

impl Raw {
    fn finish(mut self, context: &Context<'_>) -> Result<NetConf, Rule> {
        let network = self.network()?;
        if self.backend.as_ref().is_none_or(|b| b.kind.is_none() && !b.has_psk())
            && context.psk_file.is_none()
            && context.psk_secret.is_none()
        {
            return Err(Rule::NoBackend);
        }
        let text = network.to_string();
        let around = Around {
            psk_file: context.psk_file,
            psk_secret: context.psk_secret,
            network: &text,
            v6: network.v6.is_some(),
        };
        let (backend, warnings) = self.backend.unwrap_or_default().finish(&around)?;
        self.warnings.extend(warnings);
        Ok(NetConf {
            network,
            nftables: self.nftables.unwrap_or(false),
            backend,
            warnings: self.warnings,
        })
    }

    fn network(&mut self) -> Result<Network, Rule> {
        let (v4, v6) = (self.v4.unwrap_or(true), self.v6.unwrap_or(false));
        if !v4 && !v6 {
            return Err(Rule::NoFamily);
        }
        for (on, given, key, switch) in [
            (v4, self.network.is_some(), "Network", "EnableIPv4"),
            (v6, self.network6.is_some(), "IPv6Network", "EnableIPv6"),
        ] {
            if given && !on {
                self.warnings.push(format!(
                    "{key} is there but {switch} is not true: that family stays off"
                ));
            }
        }
        let v4 = v4.then(|| self.range4()).transpose()?;
        let v6 = v6.then(|| self.range6()).transpose()?;
        let network = Network { v4, v6 };
        match (v4, v6) {
            (Some(v4), Some(v6)) if network.slots().is_empty() => Err(Rule::NothingInCommon {
                v4: (v4.first, v4.last),
                v6: (v6.first, v6.last),
            }),
            _ => Ok(network),
        }
    }

    fn range4(&mut self) -> Result<Range<Ipv4Net>, Rule> {
        let given = self
            .network
            .filter(|net| net.prefix_len() > 0)
            .ok_or(Rule::NoNetwork("Network"))?;
        let net = given.trunc();
        let (subnet_len, first, last) = self.cut(&Cut {
            keys: Keys {
                net: "Network",
                small: "network",
                len: "SubnetLen",
                min: "SubnetMin",
                max: "SubnetMax",
            },
            given: given.into(),
            special: &[
                "0.0.0.0/8",
                "127.0.0.0/8",
                "169.254.0.0/16",
                "224.0.0.0/4",
                "240.0.0.0/4",
            ],
            len: self.len.filter(|&len| len != 0),
            min: self.min.filter(|a| !a.is_unspecified()).map(IpAddr::V4),
            max: self.max.filter(|a| !a.is_unspecified()).map(IpAddr::V4),
            usual: 24,
        })?;
        Ok(Range {
            net,
            subnet_len,
            first,
            last,
        })
    }

    fn range6(&mut self) -> Result<Range<Ipv6Net>, Rule> {
        let given = self
            .network6
            .filter(|net| net.prefix_len() > 0)
            .ok_or(Rule::NoNetwork("IPv6Network"))?;
        let net = given.trunc();
        let (subnet_len, first, last) = self.cut(&Cut {
            keys: Keys {
                net: "IPv6Network",
                small: "IPv6Network",
                len: "IPv6SubnetLen",
                min: "IPv6SubnetMin",
                max: "IPv6SubnetMax",
            },
            given: given.into(),
            special: &["::/96", "::ffff:0:0/96", "fe80::/10", "ff00::/8"],
            len: self.len6.filter(|&len| len != 0),
            min: self.min6.filter(|a| !a.is_unspecified()).map(IpAddr::V6),
            max: self.max6.filter(|a| !a.is_unspecified()).map(IpAddr::V6),
            usual: 64,
        })?;
        Ok(Range {
            net,
            subnet_len,
            first,
            last,
        })
    }

    /// The subnets' length, and the first and last slot.
    fn cut(&mut self, cut: &Cut<'_>) -> Result<(u8, u32, u32), Rule> {
        let Cut {
            ref keys,
            given,
            special,
            len,
            min,
            max,
            usual,
        } = *cut;
        let net = given.trunc();
        if given != net {
            self.warnings.push(format!("{} {given} is read as {net}", keys.net));
        }
        let parsed = special
            .iter()
            .map(|net| net.parse::<IpNet>().expect("a literal of this file"));
        if let Some(special) = parsed.into_iter().find(|s| s.contains(&net) || net.contains(s)) {
            return Err(Rule::Special {
                key: keys.net,
                net,
                special,
            });
        }
        let (bits, prefix) = (net.max_prefix_len(), net.prefix_len());
        let subnet_len = match len {
            Some(len) if len > u64::from(bits - 2) => {
                return Err(Rule::SubnetTooLong {
                    key: keys.len,
                    len,
                    limit: bits - 1,
                });
            }
            Some(len) => match u8::try_from(len).ok().filter(|&len| len >= prefix + 2) {
                Some(len) => len,
                None => {
                    return Err(Rule::TooFewSubnets {
                        key: keys.len,
                        len,
                        net,
                        least: prefix + 2,
                    });
                }
            },
            None if prefix > bits - 4 => {
                return Err(Rule::TooSmall {
                    key: keys.small,
                    net,
                    least: bits - 4,
                });
            }
            None => usual.max(prefix + 2),
        };
        let host_bits = u32::from(bits - subnet_len);
        let base = number(net.network());
        let index = |key, address: Option<IpAddr>, otherwise: u128| {
            let Some(address) = address else { return Ok(otherwise) };
            if !net.contains(&address) {
                return Err(Rule::OutOfRange {
                    key,
                    address,
                    of: keys.net,
                    net,
                });
            }
            let subnet = IpNet::new(address, subnet_len)
                .expect("checked to be a length of this family")
                .trunc();
            if subnet.addr() != address {
                return Err(Rule::NotOnBoundary {
                    key,
                    address,
                    len: subnet_len,
                    nearest: subnet.addr(),
                });
            }
            Ok((number(address) - base) >> host_bits)
        };
        let first = index(keys.min, min, 1)?;
        let last = index(keys.max, max, (1 << (subnet_len - prefix)) - 1)?;
        let highest = u128::from(Slot::MAX.get());
        match (min, max) {
            (Some(min), Some(max)) if first > last => {
                return Err(Rule::MinAboveMax {
                    min_key: keys.min,
                    min,
                    max_key: keys.max,
                    max,
                });
            }
            // Only the range's own first subnet lies before the usual first one.
            (None, Some(max)) if first > last => {
                let second = net.subnets(subnet_len).ok().and_then(|mut subnets| subnets.nth(1));
                let min = second.map_or(max, |subnet| subnet.addr());
                return Err(Rule::MinAboveMax {
                    min_key: keys.min,
                    min,
                    max_key: keys.max,
                    max,
                });
            }
            (Some(address), _) if first > highest => {
                return Err(Rule::TooHigh {
                    key: keys.min,
                    address,
                    index: first,
                    net,
                });
            }
            _ => {}
        }
        if last > highest {
            self.warnings.push(format!(
                "{} {net} has {} subnets of /{subnet_len}: the first {} can be told apart, the others stay unused",
                keys.net,
                last + 1,
                highest + 1
            ));
        }
        let slot = |index: u128| u32::try_from(index.min(highest)).expect("the highest slot is a u32");
        Ok((subnet_len, slot(first), slot(last)))
    }
}

/// One family's part of the document.
struct Cut<'a> {
    keys: Keys,
    given: IpNet,
    special: &'a [&'a str],
    len: Option<u64>,
    min: Option<IpAddr>,
    max: Option<IpAddr>,
    /// The length that flannel gives subnets where there is room for it.
    usual: u8,
}

struct Keys {
    net: &'static str,
    /// What flannel calls the range in its text on size.
    small: &'static str,
    len: &'static str,
    min: &'static str,
    max: &'static str,
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u32::from(v4).into(),
        IpAddr::V6(v6) => v6.into(),
    }
}
