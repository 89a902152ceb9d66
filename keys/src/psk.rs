//! The pre-shared key: who holds it can tag and check statements, and a pair's keys come out of it.

use std::fmt;
use std::str::FromStr;

use ring::hmac;
use thiserror::Error;
use zeroize::Zeroizing;

use crate::secret::{Label, Secret, expand, info, same, veiled};

/// A pre-shared key of one network. Keeps `psk_prk` (see the [crate's drawing](crate)), not the PSK.
///
/// Zeroed on drop. To hold it twice, share it by reference or `Arc`.
pub struct Psk {
    prk: Secret<32>,
    statement_info: Vec<u8>,
    kid: Kid,
}

impl Psk {
    /// The fewest bytes that a PSK may have.
    pub const MIN_LEN: usize = 32;

    /// The most bytes that a network's name may have.
    pub const MAX_NETWORK_LEN: usize = 255;

    /// The PSK `bytes`, exactly as given (white space of a file is the caller's to trim and the bytes the caller's to
    /// wipe), for the network of this name. The name of a network in statements is
    /// [`network_name`](crate::network_name).
    ///
    /// # Errors
    /// [`PskError`], when the PSK is too short or the network's name is empty or too long.
    pub fn new(bytes: &[u8], network: &str) -> Result<Self, PskError> {
        if bytes.len() < Self::MIN_LEN {
            return Err(PskError::TooShort(bytes.len()));
        }
        if network.is_empty() || network.len() > Self::MAX_NETWORK_LEN {
            return Err(PskError::NetworkLen(network.len()));
        }
        let prk = Secret::extract(PSK_SALT, bytes);
        let kid_info = info(Label::Kid, &[network.as_bytes()]);
        let mut kid = Kid([0; 8]);
        veiled(|| expand(prk.bytes(), &kid_info, &mut kid.0));
        Ok(Self {
            prk,
            statement_info: info(Label::Statement, &[network.as_bytes()]),
            kid,
        })
    }

    /// The name of this PSK in this network, which tells nothing of the PSK.
    pub fn kid(&self) -> Kid {
        self.kid
    }

    /// Authenticates an [encoded statement](crate::Encoded) as written by a holder of this PSK.
    pub fn tag(&self, statement: &[u8]) -> Tag {
        let mut tag = Tag([0; 32]);
        veiled(|| {
            let mut key = Zeroizing::new([0; 32]);
            expand(self.prk.bytes(), &self.statement_info, &mut *key);
            tag.0
                .copy_from_slice(hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, &*key), statement).as_ref());
        });
        tag
    }

    /// Whether `tag` is what [`Psk::tag`] makes of `statement`. Takes the same time wherever they differ.
    pub fn verify(&self, statement: &[u8], tag: &Tag) -> bool {
        self.tag(statement) == *tag
    }

    pub(crate) fn prk(&self) -> &Secret<32> {
        &self.prk
    }
}

impl fmt::Debug for Psk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Psk").field("kid", &self.kid).finish_non_exhaustive()
    }
}

/// Why bytes are no PSK. Carries nothing of them but their number.
#[derive(Clone, Copy, Debug, Eq, Error, PartialEq)]
pub enum PskError {
    /// Fewer bytes than [`Psk::MIN_LEN`].
    #[error("PSK is {0} bytes; at least {min} are needed: run `ringmail keygen`", min = Psk::MIN_LEN)]
    TooShort(usize),
    /// A network's name that is empty or longer than [`Psk::MAX_NETWORK_LEN`].
    #[error("network name is {0} bytes; 1 to {max} are allowed", max = Psk::MAX_NETWORK_LEN)]
    NetworkLen(usize),
}

/// The public name of a PSK in a network. Written as 16 hexadecimal digits.
#[derive(Clone, Copy, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Kid(pub [u8; 8]);

impl fmt::Display for Kid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", u64::from_be_bytes(self.0))
    }
}

impl fmt::Debug for Kid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Kid({self})")
    }
}

impl FromStr for Kid {
    type Err = KidError;

    fn from_str(text: &str) -> Result<Self, KidError> {
        let digits = text.len() == 16 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        match u64::from_str_radix(text, 16) {
            Ok(number) if digits => Ok(Self(number.to_be_bytes())),
            _ => Err(KidError(text.to_owned())),
        }
    }
}

/// A text that names no PSK.
#[derive(Clone, Debug, Eq, Error, PartialEq)]
#[error("kid {0:?} is not 16 hexadecimal digits in lower case")]
pub struct KidError(pub String);

/// The proof that a holder of a PSK wrote a statement. Public; compared in constant time all the same, because the
/// right tag of a forged statement is not.
#[derive(Clone, Copy)]
pub struct Tag(pub [u8; 32]);

impl Tag {
    /// The tag as it is published.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl PartialEq for Tag {
    fn eq(&self, other: &Self) -> bool {
        same(&self.0, &other.0)
    }
}

impl Eq for Tag {}

impl fmt::Debug for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tag(..)")
    }
}

/// The PSK of a generation between the holders of `a` and of `b`, both newest first: the newest of either side that
/// the other holds too. Of two that are equally new on their own sides, the lower kid. The same from both sides; `None`
/// if they share no PSK.
pub fn common_kid(a: &[Kid], b: &[Kid]) -> Option<Kid> {
    let shared = |own: &[Kid], other: &[Kid]| {
        own.iter()
            .enumerate()
            .find(|(_, kid)| other.contains(kid))
            .map(|(rank, &kid)| (rank, kid))
    };
    [shared(a, b), shared(b, a)]
        .into_iter()
        .flatten()
        .min()
        .map(|(_, kid)| kid)
}

/// Salt of the extraction of every PSK. The version in it changes with any change of the derivation.
const PSK_SALT: &[u8] = b"ringmail v1 psk";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_psk_is_refused_with_its_length_and_the_remedy() {
        let error = Psk::new(&[7; 31], "10.244.0.0/16").expect_err("short");
        assert_eq!(
            error.to_string(),
            "PSK is 31 bytes; at least 32 are needed: run `ringmail keygen`"
        );
        assert!(Psk::new(&[7; 32], "10.244.0.0/16").is_ok());
    }

    #[test]
    fn a_psk_prints_its_kid_and_nothing_else() {
        let psk = Psk::new(&[7; 32], "10.244.0.0/16").expect("32 bytes");
        assert_eq!(format!("{psk:?}"), format!("Psk {{ kid: Kid({}), .. }}", psk.kid()));
    }

    #[test]
    fn the_same_psk_has_another_kid_and_other_tags_in_another_network() {
        let one = Psk::new(&[7; 32], "10.244.0.0/16").expect("32 bytes");
        let other = Psk::new(&[7; 32], "10.245.0.0/16").expect("32 bytes");
        assert_ne!(one.kid(), other.kid());
        assert!(!other.verify(b"statement", &one.tag(b"statement")));
    }

    #[test]
    fn a_kid_is_read_back_from_its_text_and_from_no_other() {
        let kid = Kid([0, 1, 2, 3, 4, 5, 6, 0xff]);
        assert_eq!(kid.to_string().parse(), Ok(kid));
        for text in ["", "00010203040506FF", "+0010203040506ff", "00010203040506ff0"] {
            assert_eq!(text.parse::<Kid>(), Err(KidError(text.to_owned())));
        }
    }

    #[test]
    fn two_nodes_between_an_old_and_a_new_psk_agree_on_the_newest_that_both_hold() {
        let [old, new] = [Kid([9; 8]), Kid([1; 8])];
        assert_eq!(common_kid(&[new, old], &[new, old]), Some(new));
        assert_eq!(common_kid(&[new, old], &[old]), Some(old));
        assert_eq!(
            common_kid(&[old, new], &[new, old]),
            Some(new),
            "a tie goes to the lower kid"
        );
        assert_eq!(common_kid(&[old], &[new]), None);
    }
}
