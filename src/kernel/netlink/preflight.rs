//! Asks the kernel, before anything is built on it, whether it does what we need: by doing it once.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use keys::Cipher;
use nix::libc;
use xfrm::{Aead, Batch, KernelError, Limits, Sa, SaDirection, Xfrm};

use super::{Netlink, ipsec::random_key};
use crate::lease::Addresses;

/// Replay window of the trial, packets: as wide as ours are.
const WINDOW: u32 = 1024;
/// Below every SPI of ours and above the reserved ones (RFC 4303 §2.1).
const TRIAL_SPIS: std::ops::Range<u32> = 256..4096;

/// What this kernel has of what not every kernel has.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Features {
    /// SAs have a direction, which the kernel holds them to (linux 6.10).
    pub sa_direction: bool,
}

/// Why the kernel can't carry the mesh.
#[derive(Debug, thiserror::Error)]
pub enum PreflightError {
    /// We may not program IPsec.
    #[error("CAP_NET_ADMIN is missing: run as root or grant it")]
    Capability,
    /// It refused the trial SA. The source is the kernel's own words.
    #[error(
        "this kernel takes no ESP over {family} with {cipher}: load what is missing (`modprobe -a {modules}`), or run a \
         kernel that has it"
    )]
    Kernel {
        /// The configured cipher.
        cipher: Cipher,
        /// "IPv4" or "IPv6", of the outer packet.
        family: &'static str,
        /// The modules that together bring it.
        modules: String,
        /// The refusal.
        source: KernelError,
    },
    /// The trial SA was accepted and is not there.
    #[error("this kernel took an ESP SA over {family} with {cipher} and does not show it")]
    Lost {
        /// The configured cipher.
        cipher: Cipher,
        /// "IPv4" or "IPv6", of the outer packet.
        family: &'static str,
    },
    /// The system gave no random numbers for the trial's key.
    #[error("the system gives no random numbers")]
    Random,
    /// The kernel did not answer as it should.
    #[error("ask the kernel for a trial SA")]
    Netlink(#[source] xfrm::Error),
}

impl Netlink {
    /// Makes, reads back and removes a throwaway SA between loopback addresses, with a random key, for each family of
    /// `public`. What it shows of the kernel is for the plan to use.
    pub fn preflight(&mut self, cipher: Cipher, public: &Addresses) -> Result<Features, PreflightError> {
        let mut features = Features { sa_direction: false };
        for address in public.iter() {
            features = attempt(&mut self.xfrm, cipher, address.is_ipv6())?;
        }
        Ok(features)
    }
}

pub(super) fn attempt(xfrm: &mut Xfrm, cipher: Cipher, v6: bool) -> Result<Features, PreflightError> {
    let (loopback, family) = match v6 {
        false => (IpAddr::V4(Ipv4Addr::LOCALHOST), "IPv4"),
        true => (IpAddr::V6(Ipv6Addr::LOCALHOST), "IPv6"),
    };
    let seed = random_key(4).ok_or(PreflightError::Random)?;
    let seed = seed.iter().fold(0, |seed, byte| seed << 8 | u32::from(*byte));
    let sa = Sa {
        src: loopback,
        dst: loopback,
        spi: TRIAL_SPIS.start + seed % (TRIAL_SPIS.end - TRIAL_SPIS.start),
        reqid: 0,
        algorithm: aead(cipher),
        encap: None,
        replay_window: WINDOW,
        esn: true,
        direction: Some(SaDirection::In),
        limits: Limits::default(),
        af_unspec: true,
    };
    let key = random_key(sa.algorithm.key_len()).ok_or(PreflightError::Random)?;
    let mut batch = Batch::new();
    batch.add_sa(&sa, &key);
    match xfrm.execute(batch).pop().unwrap_or(Err(xfrm::Error::Unknown)) {
        Ok(()) => {}
        Err(xfrm::Error::Kernel(error)) if error.errno == libc::EPERM => return Err(PreflightError::Capability),
        Err(xfrm::Error::Kernel(source)) => {
            return Err(PreflightError::Kernel {
                cipher,
                family,
                modules: modules(cipher, v6),
                source,
            });
        }
        Err(error) => return Err(PreflightError::Netlink(error)),
    }
    let read = xfrm.get_sa(&sa.id());
    let mut batch = Batch::new();
    batch.delete_sa(&sa.id());
    let removed = xfrm.execute(batch).pop().unwrap_or(Err(xfrm::Error::Unknown));
    let info = read
        .map_err(PreflightError::Netlink)?
        .ok_or(PreflightError::Lost { cipher, family })?;
    removed.map_err(PreflightError::Netlink)?;
    Ok(Features {
        sa_direction: info.sa.direction == sa.direction,
    })
}

/// The kernel's algorithm for a cipher.
pub(super) fn aead(cipher: Cipher) -> Aead {
    match cipher {
        Cipher::Aes128Gcm16 => Aead::AES_128_GCM_16,
        Cipher::Aes256Gcm16 => Aead::AES_256_GCM_16,
        Cipher::ChaCha20Poly1305 => Aead::CHACHA20_POLY1305,
    }
}

/// The modules that ESP with this cipher needs, as modprobe takes them.
fn modules(cipher: Cipher, v6: bool) -> String {
    let esp = if v6 { "esp6" } else { "esp4" };
    let cipher = match cipher {
        Cipher::Aes128Gcm16 | Cipher::Aes256Gcm16 => "gcm ghash_generic ctr",
        Cipher::ChaCha20Poly1305 => "chacha20poly1305 chacha_generic poly1305_generic",
    };
    format!("{esp} xfrm_user {cipher} seqiv drbg")
}
