//! The `Backend` object of net-conf.json: which datapath, and ipsec's settings.
//!
//! Every type that flannel has is recognised, so that a refusal can say that it is known and not a slip of the pen.

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use keys::{Cipher, EncapMode};
use serde::de::MapAccess;
use zeroize::Zeroizing;

use super::conf_error::Rule;
use super::json::{Members, Scalar, Show, nearest, parsed, shorten, value, whole};
use super::plain;
use crate::backend::Plain;
use crate::backend::ipsec::{self, Soft};
use crate::psk::SecretName;

/// How the mesh's packets travel.
#[derive(Clone, Debug)]
pub enum Backend {
    /// Inside ESP of the kernel.
    Ipsec(Ipsec),
    /// As it is.
    Plain(Plain),
    /// One of flannel's types that is not served. What its object says beside `Type` is not looked at.
    Other(UnencryptedType),
}

impl Backend {
    /// Itself, or the refusal of a type that is known but not served.
    ///
    /// # Errors
    /// [`NotInThisVersion`] with the type's name.
    pub fn served(&self) -> Result<&Self, NotInThisVersion> {
        match self {
            Self::Ipsec(_) | Self::Plain(_) => Ok(self),
            Self::Other(kind) => Err(NotInThisVersion(*kind)),
        }
    }

    /// The ipsec settings, where it is that.
    pub fn ipsec(&self) -> Option<&Ipsec> {
        match self {
            Self::Ipsec(ipsec) => Some(ipsec),
            Self::Plain(_) | Self::Other(_) => None,
        }
    }

    /// The type's name as flannel writes it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Ipsec(_) => "ipsec",
            Self::Plain(plain) => plain.name(),
            Self::Other(kind) => kind.name(),
        }
    }
}

/// A backend type that is known but not served.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("backend type {:?} is not in this version: ipsec, vxlan, host-gw, udp, ipip, alloc and extension are", .0.name())]
pub struct NotInThisVersion(pub UnencryptedType);

/// flannel's types other than ipsec (wireguard among them, which encrypts, but with no key of ours).
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum UnencryptedType {
    /// VXLAN in the kernel.
    Vxlan,
    /// Plain routes.
    HostGw,
    /// UDP through this process.
    Udp,
    /// WireGuard.
    Wireguard,
    /// IP in IP.
    Ipip,
    /// Leases alone.
    Alloc,
    /// Commands of the operator.
    Extension,
    /// Routes in Tencent's cloud.
    TencentVpc,
}

impl UnencryptedType {
    /// Every one of them.
    pub const ALL: [Self; 8] = [
        Self::Vxlan,
        Self::HostGw,
        Self::Udp,
        Self::Wireguard,
        Self::Ipip,
        Self::Alloc,
        Self::Extension,
        Self::TencentVpc,
    ];

    /// The name in net-conf.json, in lower case.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Vxlan => "vxlan",
            Self::HostGw => "host-gw",
            Self::Udp => "udp",
            Self::Wireguard => "wireguard",
            Self::Ipip => "ipip",
            Self::Alloc => "alloc",
            Self::Extension => "extension",
            Self::TencentVpc => "tencent-vpc",
        }
    }

    pub(super) const fn keys(self) -> &'static [&'static str] {
        match self {
            Self::Vxlan => &[
                "Type",
                "VNI",
                "Port",
                "MTU",
                "GBP",
                "Learning",
                "DirectRouting",
                "MacPrefix",
            ],
            // flannel reads nothing here; DirectRouting is often written all the same, and changes nothing.
            Self::HostGw => &["Type", "DirectRouting"],
            Self::Udp => &["Type", "Port"],
            Self::Wireguard => &[
                "Type",
                "ListenPort",
                "ListenPortV6",
                "MTU",
                "PSK",
                "PersistentKeepaliveInterval",
                "Mode",
            ],
            Self::Ipip => &["Type", "DirectRouting"],
            Self::Alloc => &["Type"],
            Self::Extension => &[
                "Type",
                "PreStartupCommand",
                "PostStartupCommand",
                "SubnetAddCommand",
                "SubnetRemoveCommand",
                "ShutdownCommand",
            ],
            Self::TencentVpc => &["Type", "AccessKeyID", "AccessKeySecret"],
        }
    }
}

/// ipsec's settings, all of them decided.
#[derive(Clone, Debug)]
pub struct Ipsec {
    /// Where the pre-shared keys come from.
    pub psk: PskSource,
    /// The rest.
    pub tuning: Tuning,
}

/// How keys are used.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Tuning {
    /// Plain ESP, ESP in UDP or what passes, and the UDP port, 1 to 65535.
    pub encap: keys::Encap,
    /// The cipher this node sends with.
    pub cipher: Cipher,
    /// How long an epoch is used, at least a minute.
    pub rekey_after: Duration,
    /// After how many packets on one SA, or bytes, a new epoch begins.
    pub rekey: Soft,
    /// How long a PSK that was taken away is held for peers that have no newer one.
    pub psk_grace: Duration,
    /// The largest inner packet in bytes, where it is not to be computed: 576 to 65535, from 1280 on with IPv6.
    pub mtu: Option<u16>,
    /// The unencrypted backend that peers of that type are served with in plaintext, vxlan or host-gw; `None`: none is.
    pub plaintext: Option<Plain>,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            encap: keys::Encap {
                mode: EncapMode::Esp,
                port: 4500,
            },
            cipher: Cipher::Aes128Gcm16,
            rekey_after: Duration::from_secs(24 * 3600),
            rekey: ipsec::MOST,
            psk_grace: PSK_GRACE,
            mtu: None,
            plaintext: None,
        }
    }
}

/// `RekeyPackets` from 1,000: an epoch lasts a minute at least, so that less would only be reached sooner and change
/// nothing. Up to 2^33, the default: with AES-GCM's largest packets its bound is far away, and no SA of any speed gets
/// there within the minute.
const PACKETS: RangeInclusive<u64> = 1000..=ipsec::MOST.packets;

/// `RekeyBytes` from 1 MiB up to 4 TiB, the default.
const BYTES: RangeInclusive<u64> = 1 << 20..=ipsec::MOST.bytes;

/// The default of `PSKGrace`: a mounted Secret is everywhere within minutes, and a key that was taken away because it
/// became known should not count for a day.
const PSK_GRACE: Duration = Duration::from_secs(3600);

/// The longest `PSKGrace`, a week: who needs a key for longer should leave it in the folder.
const LONGEST_GRACE: Duration = Duration::from_secs(7 * 24 * 3600);

/// Where the pre-shared keys come from.
#[derive(Clone, Debug)]
pub enum PskSource {
    /// A file, or a folder of files.
    File(PathBuf),
    /// A Secret of Kubernetes, through the API.
    Secret(SecretName),
    /// net-conf.json itself.
    Inline(Arc<keys::Psk>),
}

/// A backend's `Type`.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Kind {
    Ipsec,
    Other(UnencryptedType),
}

impl Kind {
    /// Reads a `Type`; `None` where it is empty or not there.
    pub(super) fn read<'de, A: MapAccess<'de>>(key: &'static str, map: &mut A) -> Result<Option<Self>, A::Error> {
        let kind = value(key, Show::Value, map, |v| match v {
            Scalar::Text("") => Ok(None),
            Scalar::Text(name) => name.parse().map(Some).map_err(|rule: Rule| rule.to_string()),
            _ => Err("a text such as \"ipsec\" is needed".to_owned()),
        })?;
        Ok(kind.flatten())
    }
}

impl FromStr for Kind {
    type Err = Rule;

    /// Case does not matter, as in flannel.
    fn from_str(given: &str) -> Result<Self, Rule> {
        let name = given.to_lowercase();
        if name == "ipsec" {
            return Ok(Self::Ipsec);
        }
        let found = UnencryptedType::ALL.into_iter().find(|kind| kind.name() == name);
        found.map(Self::Other).ok_or_else(|| Rule::UnknownType(shorten(given)))
    }
}

/// The types that [`Rule::UnknownType`] lists, and the one that was likely meant.
pub(super) fn types_hint(given: &str) -> String {
    let names: Vec<_> = std::iter::once("ipsec")
        .chain(UnencryptedType::ALL.map(UnencryptedType::name))
        .collect();
    let hint = nearest(given, &names)
        .map(|near| format!("; did you mean {near:?}?"))
        .unwrap_or_default();
    format!("the types are {}{hint}", names.join(", "))
}

/// The members of a `Backend` object as read.
#[derive(Default)]
pub(super) struct Raw {
    /// Decides which members there are; absent: ipsec's.
    pub(super) kind: Option<Kind>,
    psk: Option<Zeroizing<Vec<u8>>>,
    psk_file: Option<PathBuf>,
    mode: Option<EncapMode>,
    port: Option<u16>,
    cipher: Option<Cipher>,
    rekey_after: Option<Duration>,
    rekey_packets: Option<u64>,
    rekey_bytes: Option<u64>,
    psk_grace: Option<Duration>,
    mtu: Option<u16>,
    plaintext: plain::Allowed,
    plain: plain::Raw,
    pub(super) warnings: Vec<String>,
}

const IPSEC_KEYS: &[&str] = &[
    "Type",
    "PSK",
    "PSKFile",
    "UDPEncap",
    "EncapPort",
    "ESPProposal",
    "RekeyAfter",
    "RekeyPackets",
    "RekeyBytes",
    "PSKGrace",
    "MTU",
    "AllowPlaintextPeers",
];

impl Members for Raw {
    fn keys(&self) -> &'static [&'static str] {
        match self.kind {
            Some(Kind::Other(kind)) => kind.keys(),
            Some(Kind::Ipsec) | None => IPSEC_KEYS,
        }
    }

    fn set<'de, A: MapAccess<'de>>(&mut self, key: &'static str, map: &mut A) -> Result<(), A::Error> {
        if let Some(Kind::Other(_)) = self.kind {
            return self.plain.set(key, map);
        }
        match key {
            "PSK" => self.psk = value(key, Show::KindOnly, map, psk)?,
            "PSKFile" => {
                self.psk_file = parsed(key, "a path is needed", map, |v| (!v.is_empty()).then(|| v.into()))?;
            }
            "UDPEncap" => self.mode = value(key, Show::Value, map, encap_mode)?,
            "EncapPort" => self.port = value(key, Show::Value, map, port)?,
            "ESPProposal" => {
                let warnings = &mut self.warnings;
                self.cipher = value(key, Show::Value, map, |v| proposal(&v, warnings))?;
            }
            "RekeyAfter" => self.rekey_after = value(key, Show::Value, map, rekey_after)?,
            "RekeyPackets" => self.rekey_packets = value(key, Show::Value, map, |v| within(&v, PACKETS))?,
            "RekeyBytes" => self.rekey_bytes = value(key, Show::Value, map, |v| within(&v, BYTES))?,
            "PSKGrace" => self.psk_grace = value(key, Show::Value, map, psk_grace)?,
            "MTU" => self.mtu = whole(key, u16::MAX.into(), map)?.and_then(|v| u16::try_from(v).ok()),
            "AllowPlaintextPeers" => self.plaintext = plain::Allowed::read(map)?,
            // The type was read before, by TypeOf.
            _ => drop(map.next_value::<serde::de::IgnoredAny>()?),
        }
        Ok(())
    }

    fn warn(&mut self, text: String) {
        self.warnings.push(text);
    }
}

/// What [`Raw::finish`] needs to know beside the object.
pub(super) struct Around<'a> {
    /// `--psk-file`.
    pub(super) psk_file: Option<&'a Path>,
    /// `--psk-secret`.
    pub(super) psk_secret: Option<&'a SecretName>,
    /// The Network as text, which a PSK is bound to.
    pub(super) network: &'a str,
    /// Whether the mesh carries IPv6.
    pub(super) v6: bool,
}

impl Raw {
    /// An object of this kind, before it is read.
    pub(super) fn of(kind: Option<Kind>) -> Self {
        Self {
            kind,
            ..Self::default()
        }
    }

    /// Whether the object itself gives a PSK.
    pub(super) fn has_psk(&self) -> bool {
        self.psk.is_some() || self.psk_file.is_some()
    }

    pub(super) fn finish(mut self, around: &Around<'_>) -> Result<(Backend, Vec<String>), Rule> {
        if let Some(Kind::Other(kind)) = self.kind {
            let plain = self.plain.finish(kind, around.v6, &mut self.warnings)?;
            return Ok((plain.map_or(Backend::Other(kind), Backend::Plain), self.warnings));
        }
        let psk = self.source(around)?;
        let least = if around.v6 { 1280 } else { 576 };
        let mtu = self.mtu.filter(|&mtu| mtu != 0);
        if let Some(mtu) = mtu.filter(|&mtu| mtu < least) {
            return Err(Rule::Mtu { mtu, least });
        }
        let usual = Tuning::default();
        let tuning = Tuning {
            encap: keys::Encap {
                mode: self.mode.unwrap_or(usual.encap.mode),
                port: self.port.unwrap_or(usual.encap.port),
            },
            cipher: self.cipher.unwrap_or(usual.cipher),
            rekey_after: self.rekey_after.unwrap_or(usual.rekey_after),
            rekey: Soft {
                packets: self.rekey_packets.unwrap_or(usual.rekey.packets),
                bytes: self.rekey_bytes.unwrap_or(usual.rekey.bytes),
            },
            psk_grace: self.psk_grace.unwrap_or(usual.psk_grace),
            mtu,
            plaintext: self.plaintext.finish(around.v6, &mut self.warnings)?,
        };
        self.warnings.extend(tuning.plaintext.as_ref().map(|plain| {
            format!(
                "Backend.AllowPlaintextPeers: peers of backend {} are served unencrypted; take it out when none is left",
                plain.name()
            )
        }));
        Ok((Backend::Ipsec(Ipsec { psk, tuning }), self.warnings))
    }

    fn source(&mut self, around: &Around<'_>) -> Result<PskSource, Rule> {
        if let Some(secret) = around.psk_secret {
            if self.has_psk() {
                self.warnings
                    .push("--psk-secret counts: the Backend's own PSK is not used".into());
            }
            return Ok(PskSource::Secret(secret.clone()));
        }
        match (around.psk_file, self.psk_file.take(), self.psk.take()) {
            (None, None, None) => Err(Rule::NoPsk),
            (None, Some(_), Some(_)) => Err(Rule::TwoPsks),
            (Some(flag), file, inline) => {
                if file.is_some_and(|file| file != flag) || inline.is_some() {
                    self.warnings
                        .push("--psk-file counts: the Backend's own PSK is not used".into());
                }
                Ok(PskSource::File(flag.into()))
            }
            (None, Some(file), None) => Ok(PskSource::File(file)),
            (None, None, Some(bytes)) => {
                let psk = keys::Psk::new(crate::psk::trim(&bytes), around.network).map_err(Rule::Psk)?;
                self.warnings.push(
                    "Backend.PSK: whoever reads this configuration (a ConfigMap, say) has the key; PSKFile or \
                     --psk-file with a Secret or a file of mode 0600 is the place for it"
                        .into(),
                );
                Ok(PskSource::Inline(Arc::new(psk)))
            }
        }
    }
}

/// Finds a `Backend`'s `Type`, which decides how the rest of it is read.
#[derive(Default)]
pub(super) struct TypeOf {
    pub(super) kind: Option<Kind>,
    depth: u8,
}

impl Members for TypeOf {
    fn keys(&self) -> &'static [&'static str] {
        if self.depth == 0 { &["Backend"] } else { &["Type"] }
    }

    fn set<'de, A: MapAccess<'de>>(&mut self, key: &'static str, map: &mut A) -> Result<(), A::Error> {
        if key == "Backend" {
            (self.depth, self.kind) = (1, None);
            map.next_value_seed(super::json::Object {
                name: "Backend",
                members: self,
            })?;
            self.depth = 0;
            return Ok(());
        }
        self.kind = Kind::read(key, map)?;
        Ok(())
    }

    fn warn(&mut self, _: String) {}
}

fn psk(v: Scalar<'_>) -> Result<Zeroizing<Vec<u8>>, &'static str> {
    match v {
        Scalar::Text(text) => Ok(Zeroizing::new(text.as_bytes().to_vec())),
        _ => Err("a text of at least 32 bytes is needed: run `ringmail keygen`"),
    }
}

fn encap_mode(v: Scalar<'_>) -> Result<EncapMode, &'static str> {
    match v {
        Scalar::Bool(false) => Ok(EncapMode::Esp),
        Scalar::Bool(true) => Ok(EncapMode::Udp),
        Scalar::Text(text) if text.eq_ignore_ascii_case("auto") => Ok(EncapMode::Auto),
        _ => Err("true, false or \"auto\" is needed"),
    }
}

fn port(v: Scalar<'_>) -> Result<u16, &'static str> {
    match v {
        Scalar::Whole(port @ 1..=65535) => Ok(u16::try_from(port).expect("the arm's range is that of a port")),
        _ => Err("a port from 1 to 65535 is needed"),
    }
}

fn rekey_after(v: Scalar<'_>) -> Result<Duration, &'static str> {
    let want = "a time such as \"24h\", \"90m\" or \"1h30m\", at least \"1m\", is needed";
    match v {
        Scalar::Text(text) => duration(text).filter(|&d| d >= Duration::from_secs(60)).ok_or(want),
        _ => Err(want),
    }
}

fn within(v: &Scalar<'_>, range: RangeInclusive<u64>) -> Result<u64, String> {
    match v {
        Scalar::Whole(v) if range.contains(v) => Ok(*v),
        _ => Err(format!(
            "a whole number from {} to {} is needed",
            range.start(),
            range.end()
        )),
    }
}

fn psk_grace(v: Scalar<'_>) -> Result<Duration, &'static str> {
    let want = "a time such as \"1h\", \"10m\" or \"0s\", at most \"168h\", is needed";
    match v {
        Scalar::Text(text) => duration(text).filter(|&d| d <= LONGEST_GRACE).ok_or(want),
        _ => Err(want),
    }
}

/// A time as Go writes it, in whole hours, minutes and seconds: `24h`, `1h30m`, `90m0s`.
pub(super) fn duration(text: &str) -> Option<Duration> {
    let (mut rest, mut total, mut smaller_than) = (text, 0u64, u64::MAX);
    while !rest.is_empty() {
        let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let unit = match rest.as_bytes().get(digits)? {
            b'h' => 3600,
            b'm' => 60,
            b's' => 1,
            _ => return None,
        };
        if unit >= smaller_than {
            return None;
        }
        smaller_than = unit;
        total = total.checked_add(rest[..digits].parse::<u64>().ok()?.checked_mul(unit)?)?;
        rest = &rest[digits + 1..];
    }
    (!text.is_empty()).then_some(Duration::from_secs(total))
}

/// The cipher of a proposal in strongSwan's notation: algorithms joined by `-`, alternatives by `,`.
///
/// What stands after the cipher is IKE's business (integrity, PRF, group), of which there is none here.
fn proposal(v: &Scalar<'_>, warnings: &mut Vec<String>) -> Result<Cipher, String> {
    let Scalar::Text(text) = v else {
        return Err(format!("a text is needed: {}", accepted()));
    };
    let (first, others) = text
        .split_once(',')
        .map_or((*text, None), |(first, rest)| (first, Some(rest)));
    let mut parts = first
        .trim()
        .trim_end_matches('!')
        .split('-')
        .map(str::to_ascii_lowercase);
    let name = parts.next().unwrap_or_default();
    let cipher = match name.as_str() {
        // strongSwan names the length of the check value in bytes or in bits.
        "aes128gcm128" => Cipher::Aes128Gcm16,
        "aes256gcm128" => Cipher::Aes256Gcm16,
        _ => name.parse().map_err(|_| refused(&name))?,
    };
    if let Some(odd) = parts.find(|part| !IKE_PARTS.iter().any(|known| part.starts_with(known))) {
        return Err(format!("part {:?} is not understood; {}", shorten(&odd), accepted()));
    }
    if others.is_some() {
        warnings.push(format!(
            "Backend.ESPProposal: of its alternatives the first counts: {cipher}"
        ));
    }
    Ok(cipher)
}

const IKE_PARTS: [&str; 11] = [
    "sha", "prf", "modp", "ecp", "curve", "x25519", "x448", "ke", "esn", "noesn", "aesxcbc",
];

fn refused(name: &str) -> String {
    // The ones with a check value shorter than 16 bytes are authenticated, but weaker than what every kernel offers.
    let combined = ["gcm", "ccm", "poly1305"].iter().any(|mode| name.contains(mode));
    let known = [
        "aes", "3des", "des", "null", "cast", "blowfish", "camellia", "serpent", "twofish",
    ];
    if !combined && known.iter().any(|prefix| name.starts_with(prefix)) {
        format!("no authenticated encryption; {}", accepted())
    } else {
        format!("cipher {:?} is not known here; {}", shorten(name), accepted())
    }
}

fn accepted() -> String {
    format!("{} are accepted", Cipher::ALL.map(Cipher::name).join(", "))
}
