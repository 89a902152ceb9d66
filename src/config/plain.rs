//! The `Backend` objects of the unencrypted types: flannel's keys.

use std::fmt;

use serde::de::value::MapAccessDeserializer;
use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, Visitor};

use super::backend::{Kind, UnencryptedType};
use super::conf_error::Rule;
use super::json::{Members, Object, boolean, parsed, whole};
use crate::backend::{Plain, extension, ipip, udp, vxlan};

/// flannel's default of `Port` of udp.
const UDP_PORT: u16 = 8285;

/// The longest name that the kernel gives a device, in bytes (IFNAMSIZ with its final zero is 16).
const NAME: usize = 15;

/// The members of any of them, as read.
#[derive(Default)]
pub(super) struct Raw {
    vni: Option<u64>,
    port: Option<u64>,
    mtu: Option<u64>,
    gbp: Option<bool>,
    learning: Option<bool>,
    direct: Option<bool>,
    pre_startup: Option<String>,
    post_startup: Option<String>,
    subnet_add: Option<String>,
    subnet_remove: Option<String>,
}

impl Raw {
    /// Reads the value of `key`, one of the type's.
    pub(super) fn set<'de, A: MapAccess<'de>>(&mut self, key: &'static str, map: &mut A) -> Result<(), A::Error> {
        let mut command = |into: &mut Option<String>| {
            *into = parsed(key, "a command is needed", map, |text| Some(text.to_owned()))?;
            Ok(())
        };
        match key {
            "PreStartupCommand" => return command(&mut self.pre_startup),
            "PostStartupCommand" => return command(&mut self.post_startup),
            "SubnetAddCommand" => return command(&mut self.subnet_add),
            "SubnetRemoveCommand" => return command(&mut self.subnet_remove),
            _ => {}
        }
        match key {
            "VNI" => self.vni = whole(key, (1 << 24) - 1, map)?,
            "Port" => self.port = whole(key, u16::MAX.into(), map)?,
            "MTU" => self.mtu = whole(key, u16::MAX.into(), map)?,
            "GBP" => self.gbp = boolean(key, map)?,
            "Learning" => self.learning = boolean(key, map)?,
            "DirectRouting" => self.direct = boolean(key, map)?,
            _ => drop(map.next_value::<serde::de::IgnoredAny>()?),
        }
        Ok(())
    }

    /// The backend of this type; `None` where it is not served. `v6`: whether the mesh carries IPv6.
    pub(super) fn finish(
        self,
        kind: UnencryptedType,
        v6: bool,
        warnings: &mut Vec<String>,
    ) -> Result<Option<Plain>, Rule> {
        let port = |default| {
            let given = self.port.and_then(|port| u16::try_from(port).ok());
            given.filter(|port| *port != 0).unwrap_or(default)
        };
        let v4_only = |backend: &str| {
            format!("backend {backend} carries no IPv6: the mesh's IPv6Network is given out and not connected")
        };
        Ok(Some(match kind {
            UnencryptedType::Vxlan => {
                let settings = vxlan::Settings {
                    vni: self.vni.map_or(1, |vni| u32::try_from(vni).expect("read as 24 bits")),
                    port: port(vxlan::PORT),
                    outer_mtu: self
                        .mtu
                        .filter(|mtu| *mtu != 0)
                        .map(|mtu| u32::try_from(mtu).expect("read as 16 bits")),
                    gbp: self.gbp.unwrap_or(false),
                    learning: self.learning.unwrap_or(false),
                    direct: self.direct.unwrap_or(false),
                };
                check(&settings, v6)?;
                Plain::Vxlan(settings)
            }
            UnencryptedType::HostGw => Plain::HostGw,
            UnencryptedType::Udp => Plain::Udp(udp::Settings { port: port(UDP_PORT) }),
            UnencryptedType::Ipip => {
                warnings.extend(v6.then(|| v4_only("ipip")));
                Plain::Ipip(ipip::Settings {
                    direct: self.direct.unwrap_or(false),
                })
            }
            UnencryptedType::Alloc => Plain::Alloc,
            UnencryptedType::Extension => Plain::Extension(extension::Commands {
                pre_startup: self.pre_startup.unwrap_or_default(),
                post_startup: self.post_startup.unwrap_or_default(),
                subnet_add: self.subnet_add.unwrap_or_default(),
                subnet_remove: self.subnet_remove.unwrap_or_default(),
            }),
            UnencryptedType::Wireguard | UnencryptedType::TencentVpc => return Ok(None),
        }))
    }
}

/// `AllowPlaintextPeers`: false, true for flannel's own defaults, or the Backend that the other nodes have.
#[derive(Default)]
pub(super) struct Allowed {
    all: bool,
    backend: Option<(Option<Kind>, Raw)>,
    warnings: Vec<String>,
}

impl Allowed {
    /// Reads the value that `map` stands on.
    pub(super) fn read<'de, A: MapAccess<'de>>(map: &mut A) -> Result<Self, A::Error> {
        map.next_value_seed(AllowedValue)
    }

    /// The backend that peers without encryption are served with; `None` where that is not allowed. `v6`: whether the mesh
    /// carries IPv6.
    pub(super) fn finish(self, v6: bool, warnings: &mut Vec<String>) -> Result<Option<Plain>, Rule> {
        warnings.extend(self.warnings);
        let kind = match self.backend {
            None if self.all => return Ok(Some(Plain::Vxlan(vxlan::Settings::default()))),
            None => return Ok(None),
            Some((Some(Kind::Other(kind @ (UnencryptedType::Vxlan | UnencryptedType::HostGw))), raw)) => {
                return raw.finish(kind, v6, warnings);
            }
            Some((Some(Kind::Other(kind)), _)) => Some(kind.name()),
            Some((Some(Kind::Ipsec), _)) => Some("ipsec"),
            Some((None, _)) => None,
        };
        Err(Rule::PlaintextType(kind))
    }
}

impl Members for Allowed {
    fn keys(&self) -> &'static [&'static str] {
        UnencryptedType::Vxlan.keys()
    }

    fn set<'de, A: MapAccess<'de>>(&mut self, key: &'static str, map: &mut A) -> Result<(), A::Error> {
        let (kind, raw) = self.backend.get_or_insert_default();
        if key == "Type" {
            *kind = Kind::read(key, map)?;
            return Ok(());
        }
        raw.set(key, map)
    }

    fn warn(&mut self, text: String) {
        self.warnings.push(text);
    }
}

struct AllowedValue;

impl<'de> DeserializeSeed<'de> for AllowedValue {
    type Value = Allowed;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Allowed, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for AllowedValue {
    type Value = Allowed;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            "AllowPlaintextPeers to be true, false or the Backend of before, such as {\"Type\": \"vxlan\", \"VNI\": 1}",
        )
    }

    fn visit_unit<E: Error>(self) -> Result<Allowed, E> {
        Ok(Allowed::default())
    }

    fn visit_bool<E: Error>(self, all: bool) -> Result<Allowed, E> {
        Ok(Allowed {
            all,
            ..Allowed::default()
        })
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Allowed, A::Error> {
        let mut allowed = Allowed {
            backend: Some(Default::default()),
            ..Allowed::default()
        };
        let object = Object {
            name: "AllowPlaintextPeers",
            members: &mut allowed,
        };
        object.deserialize(MapAccessDeserializer::new(map))?;
        Ok(allowed)
    }
}

fn check(settings: &vxlan::Settings, v6: bool) -> Result<(), Rule> {
    let prefix = if v6 { vxlan::PREFIX_V6 } else { vxlan::PREFIX };
    let digits = u32::try_from(NAME - prefix.len()).expect("a few");
    let most = 10_u32.pow(digits) - 1;
    if settings.vni > most {
        return Err(Rule::Vni {
            vni: settings.vni,
            prefix,
            most,
        });
    }
    // What is left inside must be an MTU of its family.
    let least = if v6 { 1280 + 70 } else { 576 + 50 };
    match settings.outer_mtu.and_then(|mtu| u16::try_from(mtu).ok()) {
        Some(mtu) if mtu < least => Err(Rule::Mtu { mtu, least }),
        _ => Ok(()),
    }
}
