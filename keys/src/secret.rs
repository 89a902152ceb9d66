//! The room where key bytes are handled: one place in memory per secret, and HKDF-SHA256 (RFC 5869) over it.
//!
//! `ring` wipes nothing it puts on the stack, and a value that moves leaves its bytes where it was. So a secret here is
//! made in its final place on the heap and never moves, and every computation on it runs under [`veiled`], which wipes
//! the stack the computation used.

use ring::{hkdf, hmac};
use zeroize::Zeroizing;

/// `N` secret bytes in one heap block that is filled in place and zeroed before it is freed.
///
/// Moving a `Secret` moves a pointer. It has no `Clone`, `Debug` or `PartialEq`.
pub(crate) struct Secret<const N: usize>(Box<Zeroizing<[u8; N]>>);

impl<const N: usize> Secret<N> {
    /// Makes the block, lets `fill` write it, and wipes the stack that `fill` used.
    ///
    /// # Errors
    /// Those of `fill`; the block is then wiped like any other.
    pub(crate) fn make<E>(fill: impl FnOnce(&mut [u8; N]) -> Result<(), E>) -> Result<Self, E> {
        let mut block = Box::new(Zeroizing::new([0; N]));
        veiled(|| fill(&mut block))?;
        Ok(Self(block))
    }

    /// HKDF-Expand of this secret, for one purpose, into a secret of its own.
    pub(crate) fn expand<const M: usize>(&self, len: usize, label: Label, fields: &[&[u8]]) -> Secret<M> {
        let info = info(label, fields);
        let Ok(out) = Secret::make::<std::convert::Infallible>(|out| {
            expand(self.bytes(), &info, &mut out[..len]);
            Ok(())
        });
        out
    }

    pub(crate) fn bytes(&self) -> &[u8; N] {
        &self.0
    }
}

impl Secret<32> {
    /// HKDF-Extract: HMAC-SHA256 of `input` under `salt`.
    pub(crate) fn extract(salt: &[u8], input: &[u8]) -> Self {
        let Ok(prk) = Self::make::<std::convert::Infallible>(|prk| {
            extract(salt, input, prk);
            Ok(())
        });
        prk
    }
}

/// What a derived value is for. No two purposes share a key, whatever the other fields say.
#[derive(Clone, Copy)]
pub(crate) enum Label {
    /// The public name of a PSK.
    Kid,
    /// The key of statements' tags.
    Statement,
    /// The key and salt of one SA.
    Esp,
    /// The key of one direction's probes.
    Probe,
}

impl Label {
    fn to_bytes(self) -> &'static [u8] {
        match self {
            Self::Kid => b"kid",
            Self::Statement => b"statement",
            Self::Esp => b"esp",
            Self::Probe => b"probe",
        }
    }
}

/// The info of an HKDF-Expand: label and fields, each behind its length (u16, big endian).
pub(crate) fn info(label: Label, fields: &[&[u8]]) -> Vec<u8> {
    let mut info = Vec::new();
    for field in std::iter::once(label.to_bytes()).chain(fields.iter().copied()) {
        let len = u16::try_from(field.len()).expect("every field of a derivation is bounded far below 64 KiB");
        info.extend_from_slice(&len.to_be_bytes());
        info.extend_from_slice(field);
    }
    info
}

/// HKDF-Extract into `prk`. Leaves key material on the stack: call it under [`veiled`].
pub(crate) fn extract(salt: &[u8], input: &[u8], prk: &mut [u8; 32]) {
    prk.copy_from_slice(hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, salt), input).as_ref());
}

/// HKDF-Expand into all of `out`. Leaves key material on the stack: call it under [`veiled`].
pub(crate) fn expand(prk: &[u8], info: &[u8], out: &mut [u8]) {
    let prk = hkdf::Prk::new_less_safe(hkdf::HKDF_SHA256, prk);
    let info = [info];
    let okm = prk
        .expand(&info, Len(out.len()))
        .expect("no output here is longer than 255 hashes");
    okm.fill(out).expect("the output has the length that was asked for");
}

struct Len(usize);

impl hkdf::KeyType for Len {
    fn len(&self) -> usize {
        self.0
    }
}

/// Compares in a time that does not depend on where the first difference is.
pub(crate) fn same(a: &[u8], b: &[u8]) -> bool {
    let differences = a
        .iter()
        .zip(b)
        .fold(0, |seen, (a, b)| std::hint::black_box(seen | (a ^ b)));
    a.len() == b.len() && differences == 0
}

/// Runs `work`, then wipes the stack that it used.
///
/// `work` takes secrets by reference and writes them by reference: what it returns by value is not covered.
pub(crate) fn veiled<T>(work: impl FnOnce() -> T) -> T {
    let result = apart(work);
    scrub();
    result
}

/// Gives `work` a frame below [`veiled`]'s, so that [`scrub`]'s frame covers it.
#[inline(never)]
fn apart<T>(work: impl FnOnce() -> T) -> T {
    work()
}

#[inline(never)]
fn scrub() {
    // Whoever might look at it must find zeros, so they are written.
    std::hint::black_box(&mut [0_u8; SCRUBBED]);
}

/// Bytes of stack that [`veiled`] wipes. With 2 KiB an unoptimised build leaves keys behind (`tests/wiped.rs` finds
/// them), with 4 KiB none does; four times that is room for other compilers.
const SCRUBBED: usize = 16 * 1024;
