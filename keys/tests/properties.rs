//! What holds for every statement, PSK, pair and number.

#![expect(clippy::unwrap_used, reason = "a test may")]

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use keys::{
    Carrier, Cipher, Encap, EncapMode, Encoded, Epoch, EpochSecret, Kid, Pair, PairError, Psk, PublicKey, Slot, Spi,
    SpiParts, Statement, StatementError, common_kid, next_epoch,
};
use proptest::array::uniform8;
use proptest::collection::{btree_set, vec};
use proptest::prelude::*;

#[expect(dead_code, reason = "the vectors themselves are for other tests")]
mod cases;

fn net() -> impl Strategy<Value = IpNet> {
    (any::<IpAddr>(), 0..=128_u8).prop_map(|(address, prefix)| {
        let prefix = if address.is_ipv4() { prefix % 33 } else { prefix };
        IpNet::new(address, prefix).unwrap().trunc()
    })
}

fn encap() -> impl Strategy<Value = Encap> {
    prop_oneof![
        any::<u16>().prop_map(|port| Encap {
            mode: EncapMode::Esp,
            port
        }),
        (1..=u16::MAX).prop_map(|port| Encap {
            mode: EncapMode::Udp,
            port
        }),
        (1..=u16::MAX).prop_map(|port| Encap {
            mode: EncapMode::Auto,
            port
        }),
    ]
}

fn secret() -> impl Strategy<Value = [u8; 32]> {
    any::<[u8; 32]>()
}

fn cipher() -> impl Strategy<Value = Cipher> {
    prop::sample::select(&Cipher::ALL)
}

fn slot() -> impl Strategy<Value = Slot> {
    (0..=Slot::MAX.get()).prop_map(|index| Slot::new(index).unwrap())
}

fn kids() -> impl Strategy<Value = Vec<Kid>> {
    vec(uniform8(0..3_u8).prop_map(Kid), 1..=64)
}

prop_compose! {
    fn statement()(
        network in vec(net(), 1..=8),
        node in "[!-.0-~]{1,253}",
        subnets in vec(net(), 1..=8),
        addresses in vec(any::<IpAddr>(), 1..=8),
        cipher in cipher(),
        encap in encap(),
        epoch in any::<u64>().prop_map(Epoch),
        mut public in any::<[u8; 32]>(),
        kids in kids(),
    ) -> Statement {
        public[31] &= 0x3f;
        Statement { network, node, subnets, addresses, cipher, encap, epoch, public: PublicKey(public), kids }
    }
}

/// A node: its secret and the statement that names its public key.
fn node() -> impl Strategy<Value = (EpochSecret, Statement)> {
    (secret(), statement()).prop_map(|(secret, statement)| {
        let secret = cases::secret(&secret);
        let public = secret.public();
        (secret, Statement { public, ..statement })
    })
}

fn psk() -> impl Strategy<Value = Psk> {
    vec(any::<u8>(), 32..200).prop_map(|bytes| Psk::new(&bytes, "10.244.0.0/16").unwrap())
}

fn pair(psk: &Psk, own: &EpochSecret, own_statement: &Statement, peer_statement: &Statement) -> Pair {
    let [own_statement, peer_statement] = [own_statement, peer_statement].map(|statement| statement.encode().unwrap());
    Pair::derive(psk, own, &own_statement, &peer_statement.public(), &peer_statement).unwrap()
}

/// What reading arbitrary bytes must hold to.
fn reads_strictly(bytes: &[u8]) {
    match Statement::decode(bytes) {
        Ok(statement) => assert_eq!(statement.encode().unwrap().as_bytes(), bytes),
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_statement_is_read_back_as_it_was(statement in statement()) {
        let encoded = statement.encode().unwrap();
        prop_assert!(encoded.as_bytes().len() <= Statement::MAX_LEN);
        prop_assert_eq!(Statement::decode(encoded.as_bytes()), Ok(statement));
        prop_assert_eq!(Encoded::try_from(encoded.as_bytes()), Ok(encoded));
    }

    #[test]
    fn a_statement_that_is_cut_or_continued_is_refused(statement in statement(), more in vec(any::<u8>(), 1..9)) {
        let mut bytes = statement.encode().unwrap().as_bytes().to_vec();
        for len in 0..bytes.len() {
            prop_assert!(Statement::decode(&bytes[..len]).is_err());
        }
        bytes.extend(&more);
        prop_assert_eq!(Statement::decode(&bytes), Err(StatementError::Trailing(more.len())));
    }

    #[test]
    fn a_statement_with_any_one_byte_changed_does_not_verify(psk in psk(), statement in statement(), flip in 1..=255_u8) {
        let mut bytes = statement.encode().unwrap().as_bytes().to_vec();
        let tag = psk.tag(&bytes);
        prop_assert!(psk.verify(&bytes, &tag));
        for i in 0..bytes.len() {
            bytes[i] ^= flip;
            prop_assert!(!psk.verify(&bytes, &tag), "byte {}", i);
            reads_strictly(&bytes);
            bytes[i] ^= flip;
        }
        for i in 0..32 {
            let mut other = tag;
            other.0[i] ^= flip;
            prop_assert!(!psk.verify(&bytes, &other), "byte {} of the tag", i);
        }
    }

    #[test]
    fn a_statement_does_not_verify_under_another_psk(one in psk(), other in psk(), statement in statement()) {
        prop_assume!(one.kid() != other.kid());
        let encoded = statement.encode().unwrap();
        prop_assert!(!other.verify(encoded.as_bytes(), &one.tag(encoded.as_bytes())));
    }

    #[test]
    fn both_ends_derive_the_same_keys(
        psk in psk(), (a, a_says) in node(), (b, b_says) in node(), cipher in cipher(), spi in any::<u32>().prop_map(Spi),
        message in vec(any::<u8>(), 0..100),
    ) {
        prop_assume!(a.public() != b.public());
        let at_a = pair(&psk, &a, &a_says, &b_says);
        let at_b = pair(&psk, &b, &b_says, &a_says);
        prop_assert!(at_b.probe.open(&message, &at_a.probe.seal(&message)));
        prop_assert!(at_a.probe.open(&message, &at_b.probe.seal(&message)));
        let [received_by_a, received_by_b] = [at_a.inbound.key(cipher, spi), at_b.inbound.key(cipher, spi)];
        let [sent_by_a, sent_by_b] = [at_a.outbound.into_key(cipher, spi), at_b.outbound.into_key(cipher, spi)];
        prop_assert_eq!(sent_by_a.as_bytes(), received_by_b.as_bytes());
        prop_assert_eq!(sent_by_b.as_bytes(), received_by_a.as_bytes());
        prop_assert_ne!(sent_by_a.as_bytes(), sent_by_b.as_bytes());
    }

    #[test]
    fn whatever_differs_makes_other_keys(
        psk in psk(), other_psk in psk(), (a, a_says) in node(), (b, b_says) in node(), (c, c_says) in node(),
        spi in any::<u32>(), flip in 1..=u32::MAX,
    ) {
        prop_assume!(psk.kid() != other_psk.kid());
        prop_assume!(BTreeSet::from([a.public(), b.public(), c.public()]).len() == 3);
        let later = Statement { epoch: Epoch(b_says.epoch.0 ^ 1), ..b_says.clone() };
        let mut made = Vec::new();
        for (psk, own, own_says, peer_says) in [
            (&psk, &a, &a_says, &b_says),
            (&psk, &b, &b_says, &a_says),
            (&psk, &a, &a_says, &later),
            (&psk, &b, &later, &a_says),
            (&psk, &a, &a_says, &c_says),
            (&psk, &c, &c_says, &b_says),
            (&other_psk, &a, &a_says, &b_says),
        ] {
            for cipher in Cipher::ALL {
                for spi in [Spi(spi), Spi(spi ^ flip)] {
                    made.push(pair(psk, own, own_says, peer_says).outbound.into_key(cipher, spi));
                }
            }
        }
        // The first 16 bytes: a key must not be another cipher's, cut short.
        let different: BTreeSet<&[u8]> = made.iter().map(|key| &key.as_bytes()[..16]).collect();
        prop_assert_eq!(different.len(), made.len());
    }

    #[test]
    fn a_changed_probe_does_not_open(
        psk in psk(), (a, a_says) in node(), (b, b_says) in node(), mut message in vec(any::<u8>(), 1..50),
        flip in 1..=255_u8,
    ) {
        prop_assume!(a.public() != b.public());
        let sealed = pair(&psk, &a, &a_says, &b_says).probe.seal(&message);
        let at_b = pair(&psk, &b, &b_says, &a_says).probe;
        for i in 0..16 {
            let mut other = sealed;
            other[i] ^= flip;
            prop_assert!(!at_b.open(&message, &other));
        }
        for i in 0..message.len() {
            message[i] ^= flip;
            prop_assert!(!at_b.open(&message, &sealed));
            message[i] ^= flip;
        }
        prop_assert!(at_b.open(&message, &sealed));
    }

    #[test]
    fn an_spi_says_what_it_was_made_of(slot in slot(), sender in any::<u64>(), receiver in any::<u64>()) {
        let spi = Spi::new(slot, Epoch(sender), Epoch(receiver));
        prop_assert!(spi.0 >= 256);
        let parts = spi.parts().unwrap();
        prop_assert_eq!(parts.slot, slot);
        prop_assert_eq!(u64::from(parts.sender_mod64), sender % 64);
        prop_assert_eq!(u64::from(parts.receiver_mod64), receiver % 64);
        prop_assert_eq!(parts.carrier, Carrier::Esp);
        let in_udp = spi.over(Carrier::Udp);
        prop_assert_eq!(in_udp.parts().unwrap(), SpiParts { carrier: Carrier::Udp, ..parts });
        prop_assert_eq!(in_udp.over(Carrier::Esp), spi);
    }

    #[test]
    fn any_number_is_foreign_or_the_spi_of_its_parts(number in any::<u32>()) {
        match Spi(number).parts() {
            Ok(parts) => {
                let [sender, receiver] = [parts.sender_mod64, parts.receiver_mod64].map(|n| Epoch(n.into()));
                prop_assert_eq!(Spi::new(parts.slot, sender, receiver).over(parts.carrier), Spi(number));
            }
            Err(_) => prop_assert!(matches!(number << 1 >> 13, 0 | 0x7_ffff)),
        }
    }

    #[test]
    fn the_next_epoch_is_the_smallest_that_may_be(
        previous in prop::option::of(0..10_000_u64), seconds in 0..10_000_u64, taken in btree_set(0..64_u8, 0..64),
    ) {
        let may_be = |n: &u64| {
            previous.is_none_or(|previous| *n > previous) && *n >= seconds && !taken.contains(&((*n % 64) as u8))
        };
        let smallest = (0..20_000_u64).find(may_be).unwrap();
        prop_assert_eq!(next_epoch(previous.map(Epoch), seconds, &taken), Ok(Epoch(smallest)));
    }

    #[test]
    fn both_ends_choose_the_same_psk_and_none_is_passed_over(a in kids(), b in kids()) {
        let chosen = common_kid(&a, &b);
        prop_assert_eq!(chosen, common_kid(&b, &a));
        let rank = |kid: &Kid| {
            let [a, b] = [&a, &b].map(|kids| kids.iter().position(|other| other == kid));
            Some((a?.min(b?), *kid))
        };
        let best = a.iter().filter_map(rank).min().map(|(_, kid)| kid);
        prop_assert_eq!(chosen, best);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 20_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn arbitrary_bytes_are_read_strictly(bytes in vec(any::<u8>(), 0..600)) {
        reads_strictly(&bytes);
    }

    #[test]
    fn arbitrary_frames_are_read_strictly(frames in vec(vec(prop_oneof![Just(4_u8), Just(6), 0..33_u8], 0..40), 0..12)) {
        let mut bytes = vec![1];
        for frame in frames {
            bytes.extend(u16::try_from(frame.len()).unwrap().to_be_bytes());
            bytes.extend(frame);
        }
        reads_strictly(&bytes);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_damaged_statement_is_read_strictly(
        statement in statement(),
        damage in vec((any::<prop::sample::Index>(), any::<u8>(), 0..3_u8), 1..6),
    ) {
        let mut bytes = statement.encode().unwrap().as_bytes().to_vec();
        for (place, byte, kind) in damage {
            let place = place.index(bytes.len());
            match kind {
                0 => bytes[place] = byte,
                1 => bytes.insert(place, byte),
                _ => drop(bytes.remove(place)),
            }
        }
        reads_strictly(&bytes);
    }
}

/// A valid statement to bend.
fn plain() -> Statement {
    Statement {
        network: vec!["10.244.0.0/16".parse().unwrap()],
        node: "alpha".to_owned(),
        subnets: vec!["10.244.1.0/24".parse().unwrap()],
        addresses: vec!["192.0.2.1".parse().unwrap()],
        cipher: Cipher::Aes128Gcm16,
        encap: Encap {
            mode: EncapMode::Udp,
            port: 4500,
        },
        epoch: Epoch(1_800_000_000),
        public: PublicKey([9; 32]),
        kids: vec![Kid([1; 8])],
    }
}

#[test]
fn a_statement_with_a_wrong_field_is_not_encoded_and_the_error_names_it() {
    let wrong = |bend: fn(&mut Statement)| {
        let mut statement = plain();
        bend(&mut statement);
        statement.encode().unwrap_err().to_string()
    };
    assert_eq!(
        wrong(|s| s.subnets = vec!["10.244.1.7/24".parse().unwrap()]),
        "statement's subnets has a net with a prefix too long or host bits that are not zero"
    );
    assert_eq!(
        wrong(|s| s.network.clear()),
        "statement has 0 entries in its network; 1 to 8 are allowed"
    );
    assert_eq!(
        wrong(|s| s.addresses = vec![s.addresses[0]; 9]),
        "statement has 9 entries in its addresses; 1 to 8 are allowed"
    );
    assert_eq!(
        wrong(|s| s.kids = vec![s.kids[0]; 65]),
        "statement has 65 entries in its kids; 1 to 64 are allowed"
    );
    for node in ["", "a b", "a/b", "\u{e4}", "a\n", &"a".repeat(254)] {
        let statement = Statement {
            node: node.to_owned(),
            ..plain()
        };
        assert_eq!(statement.encode(), Err(StatementError::Node), "{node:?}");
    }
    assert_eq!(wrong(|s| s.encap.port = 0), "statement's encapsulation port is 0");
    assert_eq!(
        wrong(|s| s.public.0 = [0xff; 32]),
        "statement's public key is not below 2^255 - 19"
    );
}

#[test]
fn a_statement_of_another_version_is_refused_as_such() {
    let mut bytes = plain().encode().unwrap().as_bytes().to_vec();
    bytes[0] = 2;
    let error = Statement::decode(&bytes).unwrap_err();
    assert_eq!(
        error.to_string(),
        "statement has version 2; this ringmail reads version 1"
    );
}

#[test]
fn more_than_4096_bytes_are_not_looked_at() {
    assert_eq!(Statement::decode(&[1; 4097]), Err(StatementError::TooLong(4097)));
}

/// All points of low order (RFC 7748 section 7; eight in number, five of them in reduced spelling).
#[test]
fn a_public_key_that_gives_everybody_the_same_secret_is_refused() {
    let psk = Psk::new(&[7; 32], "10.244.0.0/16").unwrap();
    let own = cases::secret(&[1; 32]);
    let own_statement = Statement {
        public: own.public(),
        ..plain()
    }
    .encode()
    .unwrap();
    for (low_order, reduced) in [
        ("0000000000000000000000000000000000000000000000000000000000000000", true),
        ("0100000000000000000000000000000000000000000000000000000000000000", true),
        ("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800", true),
        ("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157", true),
        ("ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f", true),
        (
            "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
            false,
        ),
        (
            "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
            false,
        ),
    ] {
        let public = PublicKey(cases::bytes(low_order).try_into().unwrap());
        let statement = Statement {
            public,
            node: "mallory".to_owned(),
            ..plain()
        };
        match statement.encode() {
            Ok(peer_statement) if reduced => {
                let refused = Pair::derive(&psk, &own, &own_statement, &public, &peer_statement).unwrap_err();
                assert_eq!(refused, PairError::NotContributory, "{low_order}");
            }
            other => assert_eq!((other, reduced), (Err(StatementError::Public), false), "{low_order}"),
        }
    }
}

#[test]
fn keys_and_statements_that_do_not_belong_together_make_no_pair() {
    let psk = Psk::new(&[7; 32], "10.244.0.0/16").unwrap();
    let [a, b] = [[1; 32], [2; 32]].map(|bytes| cases::secret(&bytes));
    let [a_says, b_says] = [&a, &b].map(|secret| {
        Statement {
            public: secret.public(),
            ..plain()
        }
        .encode()
        .unwrap()
    });
    let refused = |own: &EpochSecret, own_says: &Encoded, peer: PublicKey, peer_says: &Encoded| {
        Pair::derive(&psk, own, own_says, &peer, peer_says).unwrap_err()
    };
    assert_eq!(refused(&b, &a_says, b.public(), &b_says), PairError::OwnPublic);
    assert_eq!(refused(&a, &a_says, a.public(), &b_says), PairError::PeerPublic);
    assert_eq!(refused(&a, &a_says, a.public(), &a_says), PairError::SameStatement);
}

#[test]
fn what_holds_a_secret_prints_nothing_of_it() {
    let psk = Psk::new(&[7; 32], "10.244.0.0/16").unwrap();
    let [a, b] = [[1; 32], [2; 32]].map(|bytes| cases::secret(&bytes));
    let pair = pair(
        &psk,
        &a,
        &Statement {
            public: a.public(),
            ..plain()
        },
        &Statement {
            public: b.public(),
            ..plain()
        },
    );
    assert_eq!(
        format!("{a:?}"),
        format!("EpochSecret {{ public: PublicKey({}), .. }}", a.public())
    );
    assert_eq!(
        format!("{pair:?}"),
        "Pair { outbound: Outbound [redacted], inbound: Inbound [redacted], probe: ProbeKey [redacted] }"
    );
    assert_eq!(
        format!("{:?}", pair.inbound.key(Cipher::Aes128Gcm16, Spi(4096))),
        "SaKey [redacted]"
    );
    assert_eq!(format!("{:?}", psk.tag(b"")), "Tag(..)");
}
