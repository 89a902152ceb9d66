//! Secrets, statements and key derivation: from one pre-shared key (PSK) and what the nodes say about themselves to the
//! keys of every SA. No I/O, no clock, no unsafe code.
//!
//! This drawing is the specification; `tests/vectors.py` follows it in another language, with other libraries.
//! ```text
//! PSK ──▶ psk_prk = HKDF-Extract(salt "ringmail v1 psk", PSK)                                             Psk
//!            │
//!            ├──▶ HKDF-Expand(psk_prk, info("kid", network), 8)              = kid                        Kid
//!            │
//!            ├──▶ HKDF-Expand(psk_prk, info("statement", network), 32)       = auth_key
//!            │       └──▶ HMAC-SHA256(auth_key, statement)                   = tag                        Tag
//!            │
//!            ▼ salt
//! dh ──▶ pair_prk = HKDF-Extract(salt psk_prk, dh)        dh = X25519(own secret, peer's public), never all zero
//!            │
//!            ├──▶ HKDF-Expand(pair_prk, info("esp", cipher, S, R, SPI), key + 4 bytes of salt)
//!            │       S ours, R the peer's: used once, to send                = sa key          Outbound ▶ SaKey
//!            │       S the peer's, R ours: to receive                        = sa key           Inbound ▶ SaKey
//!            │
//!            └──▶ HKDF-Expand(pair_prk, info("probe", S, R), 32)             = probe key               ProbeKey
//!                    └──▶ first 16 bytes of HMAC-SHA256(probe key, message)  = tag of a probe
//!
//! S, R     SHA-256 of the sender's and of the receiver's statement
//! info     for the label and then each field: its length (u16, big endian), its bytes
//! network  network_name(); cipher: Cipher::wire_id (1 byte); SPI: u32, big endian
//! HKDF     RFC 5869 with SHA-256; X25519 and the all-zero check: RFC 7748 section 6.1
//! ```
//! The encoding of a statement is drawn in [`statement`], an SPI in [`spi`].
//!
//! A secret is zeroed before its memory is freed, lies in one heap block that never moves, and the stack of every
//! computation on it is wiped. Types that hold one have no `Clone`, no `PartialEq`, no serialisation, and a `Debug`
//! that shows nothing of it. Read [`Pair`] first, then [`Statement`], then [`Psk`].

#![forbid(unsafe_code)]

mod cipher;
mod pair;
mod psk;
mod secret;
pub mod spi;
pub mod statement;

pub use cipher::{Cipher, UnknownCipher};
pub use pair::{EpochSecret, Inbound, NoRandom, Outbound, Pair, PairError, ProbeKey, PublicKey, SaKey};
pub use psk::{Kid, KidError, Psk, PskError, Tag, common_kid};
pub use spi::{Carrier, Epoch, ForeignSpi, NoEpoch, Slot, SlotOutOfRange, Spi, SpiParts, next_epoch};
pub use statement::{Encap, EncapMode, Encoded, Field, Statement, StatementError, network_name};
