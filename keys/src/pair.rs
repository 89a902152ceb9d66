//! Two statements and a PSK become the keys of one pair of epochs, each in a type that serves its purpose only.

use std::fmt;
use std::sync::Arc;

use ring::hmac;
use ring::rand::SecureRandom;
use thiserror::Error;
use x25519_dalek::StaticSecret;

use crate::secret::{Label, Secret, extract, same, veiled};
use crate::{Carrier, Cipher, Encoded, Psk, Spi};

/// The X25519 secret of one epoch of this process. Never leaves it; zeroed on drop, after which nothing that was
/// encrypted for this epoch can be opened again.
pub struct EpochSecret {
    secret: Secret<32>,
    public: PublicKey,
}

impl EpochSecret {
    /// A new secret.
    ///
    /// # Errors
    /// [`NoRandom`], when the source gives no bytes.
    pub fn generate(random: &dyn SecureRandom) -> Result<Self, NoRandom> {
        let secret = Secret::make(|bytes| random.fill(bytes).map_err(|_| NoRandom))?;
        let mut public = PublicKey([0; 32]);
        veiled(|| public.0 = x25519_dalek::PublicKey::from(&StaticSecret::from(*secret.bytes())).to_bytes());
        Ok(Self { secret, public })
    }

    /// What the statement of this epoch names.
    pub fn public(&self) -> PublicKey {
        self.public
    }
}

impl fmt::Debug for EpochSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EpochSecret")
            .field("public", &self.public)
            .finish_non_exhaustive()
    }
}

/// The source of random bytes failed.
#[derive(Clone, Copy, Debug, Eq, Error, PartialEq)]
#[error("the system gives no random bytes")]
pub struct NoRandom;

/// The X25519 public key of an epoch (RFC 7748, little endian u).
#[derive(Clone, Copy, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct PublicKey(pub [u8; 32]);

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({self})")
    }
}

/// The keys between one epoch of ours and one of a peer's, by what they may do.
///
/// Deriving the same pair twice gives a second [`Outbound`] of the same keys: derive a pair of epochs once in the life
/// of its own epoch, and keep what is still needed.
#[derive(Debug)]
pub struct Pair {
    /// Makes the key of the one SA that sends on this pair.
    pub outbound: Outbound,
    /// Makes the key of the SA that receives on this pair.
    pub inbound: Inbound,
    /// Authenticates the probes of this pair.
    pub probe: ProbeKey,
}

impl Pair {
    /// Derives the keys. The peer's statement must have been verified with the same `psk`, the one of the
    /// [common kid](crate::common_kid).
    ///
    /// # Errors
    /// [`PairError`], when a public key is not the one its statement names, when both statements are one, and when the
    /// peer's public key is one of those that give the same secret with everybody's.
    pub fn derive(
        psk: &Psk,
        own: &EpochSecret,
        own_statement: &Encoded,
        peer_public: &PublicKey,
        peer_statement: &Encoded,
    ) -> Result<Self, PairError> {
        if own.public() != own_statement.public() {
            return Err(PairError::OwnPublic);
        }
        if *peer_public != peer_statement.public() {
            return Err(PairError::PeerPublic);
        }
        if own_statement.digest() == peer_statement.digest() {
            return Err(PairError::SameStatement);
        }
        let prk = Secret::make(|prk| {
            let secret = StaticSecret::from(*own.secret.bytes());
            let dh = secret.diffie_hellman(&x25519_dalek::PublicKey::from(peer_public.0));
            if !dh.was_contributory() {
                return Err(PairError::NotContributory);
            }
            extract(psk.prk().bytes(), dh.as_bytes(), prk);
            Ok(())
        })?;
        let prk = Arc::new(prk);
        let forth = Direction {
            prk: Arc::clone(&prk),
            from: own_statement.digest(),
            to: peer_statement.digest(),
        };
        let back = Direction {
            prk,
            from: peer_statement.digest(),
            to: own_statement.digest(),
        };
        let probe = ProbeKey {
            seal: forth.probe_key(),
            open: back.probe_key(),
        };
        Ok(Self {
            outbound: Outbound(forth),
            inbound: Inbound(back),
            probe,
        })
    }
}

/// Why there are no keys between two epochs.
#[derive(Clone, Copy, Debug, Eq, Error, PartialEq)]
pub enum PairError {
    /// The own secret belongs to another statement.
    #[error("own statement names another public key than the epoch's secret has")]
    OwnPublic,
    /// The peer's public key belongs to another statement.
    #[error("peer's statement names another public key")]
    PeerPublic,
    /// A node has no keys with itself: both directions would be one.
    #[error("peer's statement is our own")]
    SameStatement,
    /// RFC 7748 section 6.1: the shared secret is all zero.
    #[error("peer's public key is of low order and gives no secret")]
    NotContributory,
}

/// One direction of a pair. The pair's PRK is held once, by whichever parts are left.
struct Direction {
    prk: Arc<Secret<32>>,
    from: [u8; 32],
    to: [u8; 32],
}

impl Direction {
    fn sa_key(&self, cipher: Cipher, spi: Spi) -> SaKey {
        let len = cipher.key_len() + Cipher::SALT_LEN;
        let fields: [&[u8]; 4] = [&[cipher.wire_id()], &self.from, &self.to, &spi.0.to_be_bytes()];
        SaKey {
            bytes: self.prk.expand(len, Label::Esp, &fields),
            len,
            cipher,
            spi,
        }
    }

    fn probe_key(&self) -> Secret<32> {
        self.prk.expand(32, Label::Probe, &[&self.from, &self.to])
    }
}

/// The right to make the key of the sending SA of a pair, or of its two SAs, once: a nonce must not repeat under a key, and an SA that is
/// made again begins with the same nonces.
///
/// ```compile_fail,E0382
/// # fn twice(outbound: keys::Outbound, cipher: keys::Cipher, spi: keys::Spi) {
/// let first = outbound.into_key(cipher, spi);
/// let again = outbound.into_key(cipher, spi); // use of moved value
/// # }
/// ```
/// The same with one use compiles:
/// ```
/// # fn once(outbound: keys::Outbound, cipher: keys::Cipher, spi: keys::Spi) {
/// let first = outbound.into_key(cipher, spi);
/// # }
/// ```
/// A copy to use later can't be made:
/// ```compile_fail,E0599
/// # fn copy(outbound: keys::Outbound) {
/// let copy: keys::Outbound = outbound.clone(); // no method named `clone`
/// # }
/// ```
/// Nor are secrets compared in variable time:
/// ```compile_fail,E0369
/// # fn compare(a: keys::SaKey, b: keys::SaKey) {
/// let equal = a == b; // binary operation `==` cannot be applied
/// # }
/// ```
pub struct Outbound(Direction);

impl Outbound {
    /// The key to send with.
    pub fn into_key(self, cipher: Cipher, spi: Spi) -> SaKey {
        self.0.sa_key(cipher, spi)
    }

    /// The keys of a generation that has an SA for each carrier, `spi` over plain ESP and over UDP, in this order.
    pub fn into_keys(self, cipher: Cipher, spi: Spi) -> [SaKey; 2] {
        [Carrier::Esp, Carrier::Udp].map(|carrier| self.0.sa_key(cipher, spi.over(carrier)))
    }
}

/// Makes the key of the receiving SA of a pair, as often as that SA has to be made.
pub struct Inbound(Direction);

impl Inbound {
    /// The key to receive with; `cipher` is the one of the peer's statement.
    pub fn key(&self, cipher: Cipher, spi: Spi) -> SaKey {
        self.0.sa_key(cipher, spi)
    }
}

/// The key of one SA. Zeroed on drop: write it to the kernel from [`SaKey::as_bytes`] and let go of it.
pub struct SaKey {
    bytes: Secret<{ 32 + Cipher::SALT_LEN }>,
    len: usize,
    cipher: Cipher,
    spi: Spi,
}

impl SaKey {
    /// The bytes that the kernel takes: the cipher's key, then its salt.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes.bytes()[..self.len]
    }

    /// The cipher that this key is for.
    pub fn cipher(&self) -> Cipher {
        self.cipher
    }

    /// The SPI that this key is for.
    pub fn spi(&self) -> Spi {
        self.spi
    }
}

/// Authenticates the probes between the two epochs of a pair, so that a pod that takes a base address for its source
/// can't forge one. Each direction has its own key: a probe sent back to its sender does not open.
pub struct ProbeKey {
    seal: Secret<32>,
    open: Secret<32>,
}

impl ProbeKey {
    /// The tag of a probe that we send: HMAC-SHA256, truncated to its first 16 bytes.
    pub fn seal(&self, message: &[u8]) -> [u8; 16] {
        mac(&self.seal, message)
    }

    /// Whether the peer made `tag` for `message`. Takes the same time wherever they differ.
    pub fn open(&self, message: &[u8], tag: &[u8; 16]) -> bool {
        same(&mac(&self.open, message), tag)
    }
}

fn mac(key: &Secret<32>, message: &[u8]) -> [u8; 16] {
    let mut tag = [0; 16];
    veiled(|| {
        let whole = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, key.bytes()), message);
        tag.copy_from_slice(&whole.as_ref()[..16]);
    });
    tag
}

/// `Debug` by name alone, for types that hold secrets.
macro_rules! redact {
    ($($name:ident),*) => {$(
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(concat!(stringify!($name), " [redacted]"))
            }
        }
    )*};
}

redact!(Outbound, Inbound, SaKey, ProbeKey);
