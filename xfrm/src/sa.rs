//! Security associations: what one is, and its codec.
//!
//! The encoder writes the key straight into the batch. The decoder never looks at a key: it reads the algorithm's name
//! and lengths and steps over the rest.

use std::{borrow::Cow, net::IpAddr};

use netlink_packet_core::Emitable;
use netlink_packet_xfrm::{
    Address, EncapTmpl, Id, LifetimeConfig, Selector as UserSelector, UserSaId, UserSaInfo,
    constants::{
        AF_UNSPEC, IPPROTO_ESP, UDP_ENCAP_ESPINUDP, XFRM_MODE_TUNNEL, XFRM_MSG_DELSA, XFRM_MSG_NEWSA, XFRM_MSG_UPDSA,
        XFRM_STATE_AF_UNSPEC, XFRM_STATE_ESN, XFRMA_ALG_AEAD, XFRMA_ALG_AUTH, XFRMA_ALG_AUTH_TRUNC, XFRMA_ALG_COMP,
        XFRMA_ALG_CRYPT, XFRMA_COADDR, XFRMA_ENCAP, XFRMA_IF_ID, XFRMA_MARK, XFRMA_OFFLOAD_DEV, XFRMA_REPLAY_ESN_VAL,
        XFRMA_REPLAY_VAL, XFRMA_SA_EXTRA_FLAGS, XFRMA_SEC_CTX, XFRMA_SET_MARK, XFRMA_SET_MARK_MASK, XFRMA_TFCPAD,
    },
};

use crate::{
    Batch, Error, MessageRef, Parsed, Writer,
    address::{family, ip},
    message::{attributes, u32_at},
};

/// `XFRMA_SA_DIR` (linux 6.10): which way an SA is used.
pub(crate) const XFRMA_SA_DIR: u16 = 33;
/// `XFRMA_NAT_KEEPALIVE_INTERVAL` (linux 6.11).
const XFRMA_NAT_KEEPALIVE_INTERVAL: u16 = 34;
/// `XFRMA_SA_PCPU` (linux 6.13).
const XFRMA_SA_PCPU: u16 = 35;
/// The first and last of the IP-TFS attributes (linux 6.14).
const XFRMA_IPTFS: std::ops::RangeInclusive<u16> = 36..=41;
/// `XFRM_SA_DIR_IN` and `XFRM_SA_DIR_OUT`.
const DIRECTION_NUMBERS: [(SaDirection, u8); 2] = [(SaDirection::In, 1), (SaDirection::Out, 2)];
/// Length of an algorithm's name in its structure, closing zero included.
const ALGORITHM_NAME: usize = 64;
/// The widest window that fits the old replay state, one 32-bit map.
const OLD_REPLAY_WINDOW: u32 = 32;
/// Length of `struct xfrm_replay_state_esn` before its bitmap.
const REPLAY_ESN: usize = 24;

/// An SA: ESP in tunnel mode with an authenticated cipher, for all traffic that a policy sends into it.
///
/// The key is no part of it. What hurts:
/// - The kernel finds an SA by [`SaId`] alone; nothing else tells two apart.
/// - An update with another key succeeds and changes nothing: one SPI, one key, for ever.
/// - With [`SaDirection::Out`] the window must be 0; without a direction, ESN wants one above 0.
/// - A kernel before 6.10 ignores the direction and does not say so: see [`crate::Xfrm::knows_direction`].
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Sa {
    /// Outer source address.
    pub src: IpAddr,
    /// Outer destination address, of the same family as the source.
    pub dst: IpAddr,
    /// Security parameter index; 0 is no SPI and 1 to 255 are reserved (RFC 4303, section 2.1).
    pub spi: u32,
    /// The number by which templates select it, and by which ours are known; 0 for none.
    pub reqid: u32,
    /// Cipher and the lengths of its key and tag.
    pub algorithm: Aead,
    /// ESP in UDP (RFC 3948), or plain ESP.
    pub encap: Option<Encap>,
    /// Replay window in packets; 0 for none, at most 131,072.
    pub replay_window: u32,
    /// Extended (64-bit) sequence numbers.
    pub esn: bool,
    /// Which way it is used, where the kernel knows the difference.
    pub direction: Option<SaDirection>,
    /// When the kernel says that it is nearly used up, and when it stops it.
    pub limits: Limits,
    /// Carries both inner families; otherwise only the outer one.
    pub af_unspec: bool,
}

impl Sa {
    /// What the kernel finds it by.
    pub fn id(&self) -> SaId {
        SaId {
            dst: self.dst,
            spi: self.spi,
        }
    }
}

/// The kernel's index of ESP SAs: destination and SPI (and mark, always 0 here).
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct SaId {
    /// Outer destination address.
    pub dst: IpAddr,
    /// Security parameter index.
    pub spi: u32,
}

/// A cipher with authentication, by its name in the kernel's crypto API.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Aead {
    /// For instance "rfc4106(gcm(aes))"; at most 63 bytes.
    pub name: Cow<'static, str>,
    /// Key length in bits, the salt of 32 bits included.
    pub key_bits: u32,
    /// Tag length in bits.
    pub icv_bits: u32,
}

impl Aead {
    /// AES-128-GCM with a tag of 16 bytes (RFC 4106).
    pub const AES_128_GCM_16: Self = Self::standard("rfc4106(gcm(aes))", 128);
    /// AES-256-GCM with a tag of 16 bytes (RFC 4106).
    pub const AES_256_GCM_16: Self = Self::standard("rfc4106(gcm(aes))", 256);
    /// ChaCha20-Poly1305 (RFC 7634).
    pub const CHACHA20_POLY1305: Self = Self::standard("rfc7539esp(chacha20,poly1305)", 256);

    const fn standard(name: &'static str, cipher_key_bits: u32) -> Self {
        Self {
            name: Cow::Borrowed(name),
            key_bits: cipher_key_bits + 32,
            icv_bits: 128,
        }
    }

    /// Key length in bytes, salt included.
    pub fn key_len(&self) -> usize {
        self.key_bits.div_ceil(8) as usize
    }
}

/// The UDP ports of ESP in UDP.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Encap {
    /// Source port.
    pub sport: u16,
    /// Destination port.
    pub dport: u16,
}

/// Which way an SA is used. The kernel refuses a packet that goes the other.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum SaDirection {
    /// Decrypts.
    In,
    /// Encrypts.
    Out,
}

/// How much an SA may carry. At a soft limit the kernel sends a notification, at a hard one it removes the SA.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Limits {
    /// Packets until the soft expiry; `u64::MAX` for none.
    pub soft_packets: u64,
    /// Packets until the hard expiry; `u64::MAX` for none.
    pub hard_packets: u64,
    /// Bytes until the soft expiry; `u64::MAX` for none.
    pub soft_bytes: u64,
    /// Bytes until the hard expiry; `u64::MAX` for none.
    pub hard_bytes: u64,
}

impl Default for Limits {
    /// None.
    fn default() -> Self {
        Self {
            soft_packets: u64::MAX,
            hard_packets: u64::MAX,
            soft_bytes: u64::MAX,
            hard_bytes: u64::MAX,
        }
    }
}

/// An SA as the kernel shows it, with what it has counted.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct SaInfo {
    /// The SA as the kernel holds it: what it did not understand is missing here.
    pub sa: Sa,
    /// Bytes carried.
    pub bytes: u64,
    /// Packets carried.
    pub packets: u64,
    /// When it was made, in seconds since 1970.
    pub add_time: u64,
    /// When it was first used, in seconds since 1970; 0 for never.
    pub use_time: u64,
    /// Packets whose tag was wrong.
    pub integrity_failed: u32,
    /// Packets seen before.
    pub replay: u32,
    /// Packets too old for the window.
    pub replay_window: u32,
    /// The last sequence number sent.
    pub seq_out: u64,
    /// The highest sequence number received.
    pub seq_in: u64,
}

/// An SA of someone else's that [`Sa`] cannot express.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ForeignSa {
    /// Outer destination address, if it is an IP address.
    pub dst: Option<IpAddr>,
    /// Security parameter index; 0 for one that the kernel made while it waits for an SA (larval).
    pub spi: u32,
    /// 50 for ESP, 51 for AH, 108 for IPComp.
    pub protocol: u8,
    /// Its reqid.
    pub reqid: u32,
    /// The first thing found that [`Sa`] has no place for.
    pub reason: &'static str,
}

impl Batch {
    /// Adds an SA. Refused (EEXIST) if there is one with this [`SaId`], a larval one included.
    ///
    /// # Panics
    /// If the key is not as long as the algorithm says, or the name of the algorithm is longer than 63 bytes.
    pub fn add_sa(&mut self, sa: &Sa, key: &[u8]) {
        self.push(XFRM_MSG_NEWSA, 0, |writer| write(writer, sa, key));
    }

    /// Replaces a larval SA, or changes limits and ports of one that exists. The key of an existing SA stays what it was,
    /// and the kernel does not say so.
    ///
    /// # Panics
    /// As [`Batch::add_sa`].
    pub fn update_sa(&mut self, sa: &Sa, key: &[u8]) {
        self.push(XFRM_MSG_UPDSA, 0, |writer| write(writer, sa, key));
    }

    /// Removes an SA. Refused (ESRCH) if there is none.
    pub fn delete_sa(&mut self, id: &SaId) {
        self.push(XFRM_MSG_DELSA, 0, |writer| writer.emit(&user_id(id)));
    }
}

/// The structure that names an SA to the kernel.
pub(crate) fn user_id(id: &SaId) -> UserSaId {
    UserSaId {
        daddr: Address::from_ip(&id.dst),
        spi: id.spi,
        family: family(id.dst),
        proto: IPPROTO_ESP,
    }
}

/// Writes `struct xfrm_usersa_info` and its attributes.
fn write(writer: &mut Writer<'_>, sa: &Sa, key: &[u8]) {
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
        limits,
        af_unspec,
    } = sa;
    assert_eq!(
        key.len(),
        algorithm.key_len(),
        "the key is as long as its algorithm says"
    );
    let wide_replay = *esn || *replay_window > OLD_REPLAY_WINDOW;
    let mut flags = 0;
    if *esn {
        flags |= XFRM_STATE_ESN;
    }
    if *af_unspec {
        flags |= XFRM_STATE_AF_UNSPEC;
    }
    writer.emit(&UserSaInfo {
        // Without a family in the selector the kernel takes the outer one, unless the SA carries both.
        selector: UserSelector::default(),
        id: Id {
            daddr: Address::from_ip(dst),
            spi: *spi,
            proto: IPPROTO_ESP,
        },
        saddr: Address::from_ip(src),
        lifetime_cfg: LifetimeConfig {
            soft_byte_limit: limits.soft_bytes,
            hard_byte_limit: limits.hard_bytes,
            soft_packet_limit: limits.soft_packets,
            hard_packet_limit: limits.hard_packets,
            ..LifetimeConfig::default()
        },
        reqid: *reqid,
        family: family(*dst),
        mode: XFRM_MODE_TUNNEL,
        replay_window: if wide_replay {
            0
        } else {
            u8::try_from(*replay_window).expect("at most 32")
        },
        flags,
        ..UserSaInfo::default()
    });
    writer.attribute_with(XFRMA_ALG_AEAD, |writer| {
        let padding = ALGORITHM_NAME
            .checked_sub(algorithm.name.len())
            .filter(|padding| *padding > 0);
        writer.bytes(algorithm.name.as_bytes());
        writer.zeros(padding.expect("the name of an algorithm is at most 63 bytes"));
        writer.u32(algorithm.key_bits);
        writer.u32(algorithm.icv_bits);
        writer.bytes(key);
    });
    if let Some(Encap { sport, dport }) = encap {
        writer.attribute_with(XFRMA_ENCAP, |writer| {
            writer.emit(&EncapTmpl {
                encap_type: UDP_ENCAP_ESPINUDP,
                encap_sport: *sport,
                encap_dport: *dport,
                encap_oa: Address::default(),
            });
        });
    }
    if wide_replay {
        writer.attribute_with(XFRMA_REPLAY_ESN_VAL, |writer| {
            // The bitmap behind it may be left out: the kernel makes an empty one of this length.
            writer.u32(replay_window.div_ceil(32));
            writer.zeros(16);
            writer.u32(*replay_window);
        });
    }
    if let Some(direction) = direction {
        let number = DIRECTION_NUMBERS
            .iter()
            .find(|(known, _)| known == direction)
            .map(|(_, number)| *number);
        writer.attribute(XFRMA_SA_DIR, &[number.expect("every direction has a number")]);
    }
}

/// What a NEWSA or UPDSA message shows.
pub(crate) fn parse(message: &MessageRef<'_>) -> Result<Parsed<SaInfo, ForeignSa>, Error> {
    let malformed = || Error::Malformed {
        kind: message.kind,
        length: message.payload.len(),
    };
    let info = UserSaInfo::parse(message.payload).map_err(|_| malformed())?;
    let rest = &message.payload[info.buffer_len()..];
    Ok(read(&info, rest))
}

/// What the fixed part and the attributes of an SA say.
fn read(info: &UserSaInfo, rest: &[u8]) -> Parsed<SaInfo, ForeignSa> {
    let dst = ip(&info.id.daddr, info.family);
    let foreign = |reason| {
        Parsed::Other(ForeignSa {
            dst,
            spi: info.id.spi,
            protocol: info.id.proto,
            reqid: info.reqid,
            reason,
        })
    };
    let (Some(src), Some(dst)) = (ip(&info.saddr, info.family), dst) else {
        return foreign("not of IPv4 or IPv6");
    };
    if let Some(reason) = foreign_base(info) {
        return foreign(reason);
    }
    let mut algorithm = None;
    let mut encap = None;
    let mut direction = None;
    let (mut replay_window, mut seq_out, mut seq_in) = (u32::from(info.replay_window), 0, 0);
    for (kind, payload) in attributes(rest) {
        match kind {
            XFRMA_ALG_AEAD => match read_algorithm(payload) {
                Some(found) => algorithm = Some(found),
                None => return foreign("an algorithm without a name"),
            },
            XFRMA_ENCAP => match EncapTmpl::parse(payload) {
                Ok(EncapTmpl {
                    encap_type: UDP_ENCAP_ESPINUDP,
                    encap_sport: sport,
                    encap_dport: dport,
                    ..
                }) => {
                    encap = Some(Encap { sport, dport });
                }
                _ => return foreign("an encapsulation other than ESP in UDP"),
            },
            XFRMA_REPLAY_VAL => {
                let (Some(out), Some(inward)) = (u32_at(payload, 0), u32_at(payload, 4)) else {
                    continue;
                };
                (seq_out, seq_in) = (u64::from(out), u64::from(inward));
            }
            XFRMA_REPLAY_ESN_VAL => {
                let Some(state) = payload.get(..REPLAY_ESN) else {
                    continue;
                };
                let word = |index: usize| u32_at(state, index * 4).unwrap_or_default();
                seq_out = u64::from(word(3)) << 32 | u64::from(word(1));
                seq_in = u64::from(word(4)) << 32 | u64::from(word(2));
                replay_window = word(5);
            }
            XFRMA_SA_DIR => {
                let number = payload.first().copied();
                match DIRECTION_NUMBERS.iter().find(|(_, known)| Some(*known) == number) {
                    Some((found, _)) => direction = Some(*found),
                    None => return foreign("a direction that is neither in nor out"),
                }
            }
            _ => {
                if let Some(reason) = foreign_attribute(kind, payload) {
                    return foreign(reason);
                }
            }
        }
    }
    let Some(algorithm) = algorithm else {
        return foreign("no authenticated cipher (AEAD)");
    };
    Parsed::Known(SaInfo {
        sa: Sa {
            src,
            dst,
            spi: info.id.spi,
            reqid: info.reqid,
            algorithm,
            encap,
            replay_window,
            esn: info.flags & XFRM_STATE_ESN != 0,
            direction,
            limits: Limits {
                soft_packets: info.lifetime_cfg.soft_packet_limit,
                hard_packets: info.lifetime_cfg.hard_packet_limit,
                soft_bytes: info.lifetime_cfg.soft_byte_limit,
                hard_bytes: info.lifetime_cfg.hard_byte_limit,
            },
            af_unspec: info.flags & XFRM_STATE_AF_UNSPEC != 0,
        },
        bytes: info.lifetime_cur.bytes,
        packets: info.lifetime_cur.packets,
        add_time: info.lifetime_cur.add_time,
        use_time: info.lifetime_cur.use_time,
        integrity_failed: info.stats.integrity_failed,
        replay: info.stats.replay,
        replay_window: info.stats.replay_window,
        seq_out,
        seq_in,
    })
}

/// Why the fixed part is none of ours, if so.
fn foreign_base(info: &UserSaInfo) -> Option<&'static str> {
    let wildcard = UserSelector {
        family: info.selector.family,
        ..UserSelector::default()
    };
    let times = LifetimeConfig {
        soft_byte_limit: info.lifetime_cfg.soft_byte_limit,
        hard_byte_limit: info.lifetime_cfg.hard_byte_limit,
        soft_packet_limit: info.lifetime_cfg.soft_packet_limit,
        hard_packet_limit: info.lifetime_cfg.hard_packet_limit,
        ..LifetimeConfig::default()
    };
    if info.id.proto != IPPROTO_ESP {
        Some("not ESP")
    } else if info.mode != XFRM_MODE_TUNNEL {
        Some("not in tunnel mode")
    } else if info.flags & !(XFRM_STATE_ESN | XFRM_STATE_AF_UNSPEC) != 0 {
        Some("flags")
    } else if info.selector != wildcard || ![AF_UNSPEC, info.family].contains(&wildcard.family) {
        Some("a selector")
    } else if info.lifetime_cfg != times {
        Some("limits of time")
    } else {
        None
    }
}

/// Why an attribute is none of ours, if so. One that this crate has never heard of is no reason: newer kernels add
/// attributes to every SA.
fn foreign_attribute(kind: u16, payload: &[u8]) -> Option<&'static str> {
    let zero = payload.iter().all(|byte| *byte == 0);
    match kind {
        XFRMA_ALG_AUTH | XFRMA_ALG_AUTH_TRUNC | XFRMA_ALG_CRYPT | XFRMA_ALG_COMP => {
            Some("an algorithm other than AEAD")
        }
        XFRMA_SEC_CTX => Some("a security context"),
        XFRMA_OFFLOAD_DEV => Some("offload to a device"),
        XFRMA_COADDR if !zero => Some("a care-of address"),
        XFRMA_MARK if !zero => Some("a mark"),
        XFRMA_SET_MARK | XFRMA_SET_MARK_MASK if !zero => Some("an output mark"),
        XFRMA_IF_ID if !zero => Some("an interface id"),
        XFRMA_TFCPAD if !zero => Some("traffic flow padding"),
        XFRMA_SA_EXTRA_FLAGS if !zero => Some("extra flags"),
        XFRMA_NAT_KEEPALIVE_INTERVAL if !zero => Some("keepalives"),
        XFRMA_SA_PCPU if payload != u32::MAX.to_ne_bytes() => Some("a processor of its own"),
        kind if XFRMA_IPTFS.contains(&kind) => Some("IP-TFS"),
        _ => None,
    }
}

/// Name and lengths of `struct xfrm_algo_aead`; the key behind them is not looked at.
fn read_algorithm(payload: &[u8]) -> Option<Aead> {
    let name = payload.get(..ALGORITHM_NAME)?;
    let name = std::str::from_utf8(name.split(|byte| *byte == 0).next()?).ok()?;
    let key_bits = u32_at(payload, ALGORITHM_NAME)?;
    let icv_bits = u32_at(payload, ALGORITHM_NAME + 4)?;
    Some(Aead {
        name: Cow::Owned(name.to_owned()),
        key_bits,
        icv_bits,
    })
}
