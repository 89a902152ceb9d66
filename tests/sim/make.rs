//! Networks, settings, uplinks and PSKs that tests begin with.

use std::mem::ManuallyDrop;
use std::sync::Arc;
use std::time::Duration;

use keys::{Cipher, Encap, EncapMode, EpochSecret, Psk, Slot};
use ringmail::backend::ipsec::MOST;
use ringmail::lease::{Addresses, Network, NodeName, Range, Subnets};
use ringmail::node::Settings;
use ringmail::uplink::Uplink;

/// The families of a mesh.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Families {
    V4,
    V6,
    Both,
}

impl Families {
    pub(crate) const ALL: [Self; 3] = [Self::V4, Self::V6, Self::Both];
}

/// 10.244.0.0/16 and fd00:10:244::/48, a /24 and a /64 a node.
pub(crate) fn network(families: Families) -> Network {
    let v4 = Range {
        net: "10.244.0.0/16".parse().expect("a net"),
        subnet_len: 24,
        first: 1,
        last: 255,
    };
    let v6 = Range {
        net: "fd00:10:244::/48".parse().expect("a net"),
        subnet_len: 64,
        first: 1,
        last: 255,
    };
    Network {
        v4: (families != Families::V6).then_some(v4),
        v6: (families != Families::V4).then_some(v6),
    }
}

pub(crate) fn slot(number: u32) -> Slot {
    Slot::new(number).expect("a small slot")
}

pub(crate) fn name(text: &str) -> NodeName {
    NodeName::new(text).expect("a good name")
}

pub(crate) fn subnets(network: &Network, number: u32) -> Subnets {
    network.subnets(slot(number)).expect("a slot of the network")
}

/// 192.0.2.N and 2001:db8::N, on uplink `eth0`.
pub(crate) fn uplink(families: Families, last: u8) -> Uplink {
    let addresses = Addresses {
        v4: (families != Families::V6).then(|| [192, 0, 2, last].into()),
        v6: (families != Families::V4).then(|| [0x2001, 0xdb8, 0, 0, 0, 0, 0, u16::from(last)].into()),
    };
    Uplink {
        name: "eth0".into(),
        index: 2,
        mtu: 1500,
        local: addresses,
        public: addresses,
        routes: Vec::new(),
    }
}

/// PSK number `number` of the network; all differ.
pub(crate) fn psk(number: u8, network: &Network) -> Arc<Psk> {
    Arc::new(Psk::new(&[number; 32], &network.to_string()).expect("long enough"))
}

/// Bytes that a number tells, and no two numbers alike (splitmix64).
pub(crate) fn bytes(number: u64) -> [u8; 32] {
    let mut all = [0; 32];
    for (word, at) in all.chunks_exact_mut(8).zip(1..) {
        let mut z = number
            .wrapping_mul(4)
            .wrapping_add(at)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word.copy_from_slice(&(z ^ (z >> 31)).to_be_bytes());
    }
    all
}

/// The secret of an epoch that has these bytes.
#[expect(
    deprecated,
    reason = "ring seals SecureRandom; its own source of fixed bytes is the only one there is"
)]
pub(crate) fn epoch_secret(bytes: &[u8; 32]) -> EpochSecret {
    EpochSecret::generate(&ring::test::rand::FixedSliceRandom { bytes }).expect("fixed bytes do not fail")
}

/// A source of random numbers for one epoch: its secret, and a jitter of a half. Not dropped, where it would insist that
/// all were taken: an epoch that is declined takes none.
#[expect(
    deprecated,
    reason = "ring seals SecureRandom; its own source of fixed bytes is the only one there is"
)]
pub(crate) fn random<'a>(all: &'a [&'a [u8]]) -> ManuallyDrop<ring::test::rand::FixedSliceSequenceRandom<'a>> {
    ManuallyDrop::new(ring::test::rand::FixedSliceSequenceRandom {
        bytes: all,
        current: std::cell::UnsafeCell::new(0),
    })
}

pub(crate) fn settings(node: &str, network: Network) -> Settings {
    Settings {
        name: name(node),
        network,
        cipher: Cipher::Aes128Gcm16,
        encap: Encap {
            mode: EncapMode::Esp,
            port: 4500,
        },
        // Epochs end by events alone, so that a seed tells the whole story.
        rekey_after: Duration::from_secs(1 << 30),
        rekey: MOST,
        psk_grace: Duration::from_secs(3600),
        mtu: None,
        masquerade: true,
        random_fully: true,
        directed: false,
        advertisements: true,
        plain: None,
        plaintext: None,
        prepared: None,
        forward: true,
        blackhole: false,
        nft: false,
    }
}
