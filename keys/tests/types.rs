//! What the compiler refuses to do with a secret. A wrong answer here is a compile error, so that this file tests by
//! being built.

use keys::{EpochSecret, Inbound, Outbound, Pair, ProbeKey, Psk, SaKey};

/// Does not compile if the type has the trait: `<T as Probe<_>>` is then ambiguous.
macro_rules! has_not {
    ($trait:path: $($type:ty),*) => {$(
        const _: fn() = || {
            trait Probe<A> { fn item() {} }
            impl<T: ?Sized> Probe<()> for T {}
            struct Has;
            impl<T: ?Sized + $trait> Probe<Has> for T {}
            <$type as Probe<_>>::item();
        };
    )*};
}

has_not!(Clone: Psk, EpochSecret, Pair, Outbound, Inbound, ProbeKey, SaKey);
has_not!(PartialEq: Psk, EpochSecret, Pair, Outbound, Inbound, ProbeKey, SaKey);
has_not!(std::hash::Hash: Psk, EpochSecret, Pair, Outbound, Inbound, ProbeKey, SaKey);
has_not!(std::fmt::Display: Psk, EpochSecret, Pair, Outbound, Inbound, ProbeKey, SaKey);
has_not!(AsRef<[u8]>: Psk, EpochSecret, Pair, Outbound, Inbound, ProbeKey, SaKey);
has_not!(std::ops::Deref: Psk, EpochSecret, Pair, Outbound, Inbound, ProbeKey, SaKey);

/// Secrets go to the thread that programs the kernel.
const fn crosses_threads<T: Send + Sync>() {}
const _: () = {
    crosses_threads::<Psk>();
    crosses_threads::<EpochSecret>();
    crosses_threads::<Pair>();
    crosses_threads::<SaKey>();
};
