//! The ciphers of ESP that ringmail speaks: authenticated ones only, all with a 16 byte tag and a 4 byte salt.

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

/// How an SA encrypts and authenticates. Each node names in its statement the one it sends with.
#[derive(Clone, Copy, Debug, Default, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Cipher {
    /// AES-128 in GCM (RFC 4106), the default.
    #[default]
    Aes128Gcm16,
    /// AES-256 in GCM (RFC 4106).
    Aes256Gcm16,
    /// ChaCha20 and Poly1305 (RFC 7634).
    ChaCha20Poly1305,
}

impl Cipher {
    /// Every cipher, the default first.
    pub const ALL: [Self; 3] = [Self::Aes128Gcm16, Self::Aes256Gcm16, Self::ChaCha20Poly1305];

    /// Bytes of salt that follow the key in what the kernel takes (RFC 4106 section 4, RFC 7634 section 2).
    pub const SALT_LEN: usize = 4;

    /// Bytes of the key, without the salt: 16 or 32.
    pub const fn key_len(self) -> usize {
        match self {
            Self::Aes128Gcm16 => 16,
            Self::Aes256Gcm16 | Self::ChaCha20Poly1305 => 32,
        }
    }

    /// Bits of the integrity check value at the end of a packet.
    pub const fn icv_bits(self) -> u32 {
        match self {
            Self::Aes128Gcm16 | Self::Aes256Gcm16 | Self::ChaCha20Poly1305 => 128,
        }
    }

    /// The kernel's name of the AEAD (`alg_name` of `xfrm_algo_aead`; net/xfrm/xfrm_algo.c, `aead_list`).
    pub const fn kernel_name(self) -> &'static str {
        match self {
            Self::Aes128Gcm16 | Self::Aes256Gcm16 => "rfc4106(gcm(aes))",
            Self::ChaCha20Poly1305 => "rfc7539esp(chacha20,poly1305)",
        }
    }

    /// The byte that stands for this cipher in statements and derivations.
    pub const fn wire_id(self) -> u8 {
        match self {
            Self::Aes128Gcm16 => 1,
            Self::Aes256Gcm16 => 2,
            Self::ChaCha20Poly1305 => 3,
        }
    }

    /// The cipher of a [`wire_id`](Self::wire_id), `None` for a byte that stands for none.
    pub fn from_wire_id(id: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|cipher| cipher.wire_id() == id)
    }

    /// The configured name: `aes128gcm16`, `aes256gcm16`, `chacha20poly1305`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Aes128Gcm16 => "aes128gcm16",
            Self::Aes256Gcm16 => "aes256gcm16",
            Self::ChaCha20Poly1305 => "chacha20poly1305",
        }
    }
}

impl fmt::Display for Cipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Cipher {
    type Err = UnknownCipher;

    fn from_str(name: &str) -> Result<Self, UnknownCipher> {
        Self::ALL
            .into_iter()
            .find(|cipher| cipher.name() == name)
            .ok_or_else(|| UnknownCipher(name.to_owned()))
    }
}

/// A name that is no [`Cipher`].
#[derive(Clone, Debug, Eq, Error, PartialEq)]
#[error("cipher {0:?} is unknown: use aes128gcm16, aes256gcm16 or chacha20poly1305")]
pub struct UnknownCipher(pub String);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cipher_is_found_again_by_its_name_and_by_its_byte() {
        for cipher in Cipher::ALL {
            assert_eq!(cipher.to_string().parse(), Ok(cipher));
            assert_eq!(Cipher::from_wire_id(cipher.wire_id()), Some(cipher));
        }
        assert_eq!(
            (0..=u8::MAX).filter_map(Cipher::from_wire_id).count(),
            Cipher::ALL.len()
        );
    }

    #[test]
    fn a_name_without_authenticated_encryption_is_refused_with_the_remedy() {
        let error = "aes128-sha256".parse::<Cipher>().expect_err("no AEAD");
        assert_eq!(
            error.to_string(),
            "cipher \"aes128-sha256\" is unknown: use aes128gcm16, aes256gcm16 or chacha20poly1305"
        );
    }
}
