//! The derivation gives what another implementation gives (`vectors.py`, with OpenSSL underneath).

#![expect(clippy::unwrap_used, reason = "a test may")]

use keys::{Carrier, Cipher, Encoded, Kid, Pair, Psk, Spi, Statement, Tag, common_kid, network_name};

mod cases;

use cases::{Side, bytes, cases};

#[test]
fn psks_have_the_kids_and_make_the_tags_of_another_implementation() {
    for case in cases() {
        let network = network_name(&case.list("network"));
        assert_eq!(network, case.text("network_name"));
        let psk = Psk::new(&case.bytes("psk"), &network).unwrap();
        assert_eq!(psk.kid(), case.read::<Kid>("kid"));
        for side in ["a", "b"] {
            let statement = case.bytes(&format!("{side}.statement"));
            let tag = case.array(&format!("{side}.tag"));
            assert_eq!(psk.tag(&statement).as_bytes(), &tag);
            assert!(psk.verify(&statement, &Tag(tag)));
        }
    }
}

#[test]
fn statements_have_the_bytes_of_another_implementation_and_are_read_back() {
    for case in cases() {
        for side in ["a", "b"] {
            let Side {
                secret,
                statement,
                encoded,
                ..
            } = case.side(side);
            let bytes = case.bytes(&format!("{side}.statement"));
            assert_eq!(encoded.as_bytes(), bytes);
            assert_eq!(encoded.digest(), case.array(&format!("{side}.digest")));
            assert_eq!(Statement::decode(&bytes), Ok(statement));
            assert_eq!(Encoded::try_from(&*bytes), Ok(encoded));
            assert_eq!(secret.public().0, case.array(&format!("{side}.public")));
        }
    }
}

#[test]
fn the_psk_of_every_case_is_the_one_that_both_ends_choose() {
    for case in cases() {
        let [a, b] = [case.list("a.kids"), case.list("b.kids")];
        assert_eq!(common_kid(&a, &b), Some(case.read("kid")));
    }
}

#[test]
fn both_ends_derive_the_sa_keys_of_another_implementation_in_both_directions() {
    for case in cases() {
        for cipher in Cipher::ALL {
            let psk = Psk::new(&case.bytes("psk"), case.text("network_name")).unwrap();
            for (own, peer) in [("a", "b"), ("b", "a")] {
                let [own_side, peer_side] = [case.side(own), case.side(peer)];
                let pair = pair(&psk, &own_side, &peer_side);
                let spi = spi(&own_side, &peer_side);
                let back = self::spi(&peer_side, &own_side);
                assert_eq!(spi.to_string(), case.text(&format!("{own}{peer}.spi")));
                let sent = pair.outbound.into_key(cipher, spi);
                assert_eq!(sent.as_bytes(), case.bytes(&format!("{own}{peer}.{cipher}")));
                assert_eq!(sent.as_bytes().len(), cipher.key_len() + Cipher::SALT_LEN);
                let received = pair.inbound.key(cipher, back);
                assert_eq!(received.as_bytes(), case.bytes(&format!("{peer}{own}.{cipher}")));
                let [plain, in_udp] = self::pair(&psk, &own_side, &peer_side).outbound.into_keys(cipher, spi);
                assert_eq!(plain.as_bytes(), sent.as_bytes());
                assert_eq!((plain.spi(), in_udp.spi()), (spi, spi.over(Carrier::Udp)));
                assert_eq!(in_udp.spi().to_string(), case.text(&format!("{own}{peer}.udp.spi")));
                assert_eq!(in_udp.as_bytes(), case.bytes(&format!("{own}{peer}.udp.{cipher}")));
                let received = pair.inbound.key(cipher, back.over(Carrier::Udp));
                assert_eq!(received.as_bytes(), case.bytes(&format!("{peer}{own}.udp.{cipher}")));
            }
        }
    }
}

#[test]
fn both_ends_seal_and_open_the_probes_of_another_implementation() {
    for case in cases() {
        let psk = Psk::new(&case.bytes("psk"), case.text("network_name")).unwrap();
        for (own, peer) in [("a", "b"), ("b", "a")] {
            let probe = pair(&psk, &case.side(own), &case.side(peer)).probe;
            for i in 0..3 {
                let [(message, sealed), (same, received)] = [format!("{own}{peer}"), format!("{peer}{own}")]
                    .map(|way| case.text(&format!("{way}.probe.{i}")).split_once(' ').unwrap());
                assert_eq!(message, same);
                let message = if message == "-" { Vec::new() } else { bytes(message) };
                let [sealed, received] = [sealed, received].map(|tag| bytes(tag).try_into().unwrap());
                assert_eq!(probe.seal(&message), sealed);
                assert!(probe.open(&message, &received));
                assert!(!probe.open(&message, &sealed), "our own probe, sent back to us");
            }
        }
    }
}

fn pair(psk: &Psk, own: &Side, peer: &Side) -> Pair {
    Pair::derive(psk, &own.secret, &own.encoded, &peer.secret.public(), &peer.encoded).unwrap()
}

fn spi(sender: &Side, receiver: &Side) -> Spi {
    Spi::new(sender.slot, sender.statement.epoch, receiver.statement.epoch)
}
