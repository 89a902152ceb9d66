//! The codecs against bytes from elsewhere: what iproute2 sent, what a kernel said. Each file in `tests/wire` opens with
//! the command behind it.

#![allow(clippy::unwrap_used, reason = "it is how a test fails")]

use std::net::IpAddr;

use crate::{
    Action, Aead, Batch, Direction, Encap, Error, Event, Family, HashThreshold, Limits, MessageRef, Parsed, Policy,
    PolicyId, Sa, SaDirection, SaId, Selector, Template, event, message, policy, sa, threshold,
};

const KEY_160: &[u8] = &[
    0x00, 0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x07, 0x08, 0x09, 0x0a, 0x0b, 0x0c, 0x0d, 0x0e, 0x0f, 0xa0, 0xa1, 0xa2,
    0xa3,
];
const KEY_288: &[u8] = &[
    0x00, 0x01, 0x02, 0x03, 0x04, 0x05, 0x06, 0x07, 0x08, 0x09, 0x0a, 0x0b, 0x0c, 0x0d, 0x0e, 0x0f, 0x10, 0x11, 0x12,
    0x13, 0x14, 0x15, 0x16, 0x17, 0x18, 0x19, 0x1a, 0x1b, 0x1c, 0x1d, 0x1e, 0x1f, 0xa0, 0xa1, 0xa2, 0xa3,
];

/// The messages of a capture.
fn capture(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text
        .lines()
        .filter(|line| !line.starts_with('#'))
        .flat_map(str::bytes)
        .filter(u8::is_ascii_hexdigit)
        .collect();
    let nibble = |digit: u8| char::from(digit).to_digit(16).unwrap() as u8;
    digits
        .chunks(2)
        .map(|pair| nibble(pair[0]) << 4 | nibble(pair[1]))
        .collect()
}

macro_rules! capture {
    ($name:literal) => {
        capture(include_str!(concat!("../tests/wire/", $name, ".hex")))
    };
}

/// The one request that `fill` writes, as it goes on the wire but for its sequence number and port.
fn request(fill: impl FnOnce(&mut Batch)) -> Vec<u8> {
    let mut batch = Batch::new();
    fill(&mut batch);
    assert_eq!(batch.len(), 1);
    batch.wire(0, 1).to_vec()
}

/// A captured request without its sequence number (a time) and port (0 in iproute2's).
fn unstamped(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes[8..16].fill(0);
    bytes
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn selector(src: &str, dst: &str) -> Selector {
    Selector::between(src.parse().unwrap(), dst.parse().unwrap())
}

fn template(src: &str, dst: &str, spi: u32) -> Option<Template> {
    Some(Template {
        src: ip(src),
        dst: ip(dst),
        spi,
        reqid: 0x726d,
        optional: false,
    })
}

fn tunnel() -> Sa {
    Sa {
        src: ip("192.0.2.1"),
        dst: ip("192.0.2.2"),
        spi: 0x1041,
        reqid: 0x726d,
        algorithm: Aead::AES_128_GCM_16,
        encap: None,
        replay_window: 1024,
        esn: true,
        direction: None,
        limits: Limits {
            soft_packets: 1 << 33,
            hard_packets: 1 << 34,
            ..Limits::default()
        },
        af_unspec: true,
    }
}

fn tunnel_in_udp() -> Sa {
    Sa {
        src: ip("2001:db8::1"),
        dst: ip("2001:db8::2"),
        spi: 0x2082,
        algorithm: Aead::CHACHA20_POLY1305,
        encap: Some(Encap {
            sport: 4500,
            dport: 4501,
        }),
        replay_window: 64,
        limits: Limits::default(),
        ..tunnel()
    }
}

fn tunnel_with_old_replay_state(hard_bytes: u64) -> Sa {
    Sa {
        spi: 0x3003,
        reqid: 1,
        algorithm: Aead::AES_256_GCM_16,
        replay_window: 32,
        esn: false,
        limits: Limits {
            soft_bytes: 1000,
            hard_bytes,
            ..Limits::default()
        },
        af_unspec: false,
        ..tunnel()
    }
}

fn to_peer() -> Policy {
    Policy {
        id: PolicyId {
            direction: Direction::Out,
            selector: selector("0.0.0.0/0", "10.244.2.0/24"),
        },
        priority: 1000,
        action: Action::Allow,
        template: template("192.0.2.1", "192.0.2.2", 0x1041),
    }
}

fn six_in_four() -> Policy {
    Policy {
        id: PolicyId {
            direction: Direction::Fwd,
            selector: selector("fd00:2::/64", "::/0"),
        },
        template: template("192.0.2.2", "192.0.2.1", 0),
        ..to_peer()
    }
}

fn block() -> Policy {
    Policy {
        id: PolicyId {
            direction: Direction::In,
            selector: selector("10.244.0.0/16", "10.244.0.0/16"),
        },
        priority: 4_000_000,
        action: Action::Block,
        template: None,
    }
}

fn probe() -> Policy {
    let selector = Selector {
        protocol: 17,
        sport: Some(8473),
        dport: Some(8474),
        ifindex: 1,
        ..selector("10.244.1.0/32", "10.244.2.0/32")
    };
    Policy {
        id: PolicyId {
            direction: Direction::Out,
            selector,
        },
        priority: 10,
        template: template("192.0.2.1", "192.0.2.2", 0x1042),
        ..to_peer()
    }
}

#[test]
fn an_sa_is_written_as_iproute2_writes_it() {
    assert_eq!(
        request(|batch| batch.add_sa(&tunnel(), KEY_160)),
        unstamped(capture!("sa-add"))
    );
    assert_eq!(
        request(|batch| batch.add_sa(&tunnel_in_udp(), KEY_288)),
        unstamped(capture!("sa-add-udp6"))
    );
    let old = tunnel_with_old_replay_state(2000);
    assert_eq!(
        request(|batch| batch.add_sa(&old, KEY_288)),
        unstamped(capture!("sa-add-old-replay"))
    );
    let updated = tunnel_with_old_replay_state(3000);
    assert_eq!(
        request(|batch| batch.update_sa(&updated, KEY_288)),
        unstamped(capture!("sa-update"))
    );
}

#[test]
fn an_sa_is_removed_as_iproute2_does_it_without_the_source_that_the_kernel_does_not_look_at() {
    let mut theirs = unstamped(capture!("sa-delete"));
    // XFRMA_SRCADDR, which the kernel needs for IPv6 mobility only, is the last 20 bytes.
    theirs.truncate(theirs.len() - 20);
    theirs[0] -= 20;
    assert_eq!(
        request(|batch| batch.delete_sa(&SaId {
            dst: ip("192.0.2.2"),
            spi: 0x3003
        })),
        theirs
    );
}

#[test]
fn a_direction_is_the_last_attribute_and_out_wants_an_empty_window() {
    let sa = Sa {
        replay_window: 0,
        direction: Some(SaDirection::Out),
        ..tunnel()
    };
    let bytes = request(|batch| batch.add_sa(&sa, KEY_160));
    let length = bytes.len();
    // struct xfrm_replay_state_esn: bitmap length 0, window 0; then XFRMA_SA_DIR 33 with XFRM_SA_DIR_OUT 2. iproute2 6.1
    // knows no direction; the layout is include/uapi/linux/xfrm.h of linux 6.10.
    assert_eq!(
        bytes[length - 36..length - 8],
        [[28, 0, 23, 0].as_slice(), &[0; 24]].concat()
    );
    assert_eq!(bytes[length - 8..], [5, 0, 33, 0, 2, 0, 0, 0]);
}

#[test]
fn a_policy_is_written_as_iproute2_writes_it() {
    assert_eq!(
        request(|batch| batch.set_policy(&to_peer())),
        unstamped(capture!("policy-set"))
    );
    assert_eq!(
        request(|batch| batch.add_policy(&six_in_four())),
        unstamped(capture!("policy-add-6in4"))
    );
    assert_eq!(
        request(|batch| batch.add_policy(&block())),
        unstamped(capture!("policy-add-block"))
    );
    assert_eq!(
        request(|batch| batch.add_policy(&probe())),
        unstamped(capture!("policy-add-port"))
    );
    assert_eq!(
        request(|batch| batch.delete_policy(&probe().id)),
        unstamped(capture!("policy-delete"))
    );
}

#[test]
fn a_hash_threshold_is_set_and_read_as_ip_does() {
    let (local, remote) = (0, 24);
    let set = request(|batch| batch.set_hash_threshold(Family::V4, HashThreshold { local, remote }));
    assert_eq!(set, unstamped(capture!("threshold-set")));
    let bytes = capture!("threshold-get");
    let message = message::messages(&bytes).next().unwrap();
    for family in [Family::V4, Family::V6] {
        assert_eq!(
            threshold::parse(&message, family),
            Some(HashThreshold::standard(family))
        );
    }
}

#[test]
fn a_dump_shows_the_sas_that_ip_added_and_names_what_is_foreign_about_the_others() {
    let bytes = capture!("sa-list");
    let found: Vec<_> = message::messages(&bytes)
        .map(|message| sa::parse(&message).unwrap())
        .collect();
    let [marked, transport, old, udp, plain] = found.as_slice() else {
        panic!("{} SAs", found.len())
    };
    for (shown, added) in [
        (old, tunnel_with_old_replay_state(3000)),
        (udp, tunnel_in_udp()),
        (plain, tunnel()),
    ] {
        let Parsed::Known(info) = shown else {
            panic!("{shown:?}")
        };
        assert_eq!(info.sa, added);
        assert_eq!(
            (info.bytes, info.packets, info.use_time, info.seq_in, info.seq_out),
            (0, 0, 0, 0, 0)
        );
        assert!(info.add_time > 1_790_000_000, "{}", info.add_time);
    }
    let Parsed::Other(marked) = marked else {
        panic!("{marked:?}")
    };
    assert_eq!(
        (marked.dst, marked.spi, marked.reqid, marked.reason),
        (Some(ip("192.0.2.2")), 0x1046, 2, "a mark")
    );
    let Parsed::Other(transport) = transport else {
        panic!("{transport:?}")
    };
    assert_eq!(
        (transport.spi, transport.protocol, transport.reason),
        (0x4004, 50, "not in tunnel mode")
    );
}

#[test]
fn a_single_sa_is_read_as_in_a_dump() {
    let bytes = capture!("sa-get");
    let message = message::messages(&bytes).next().unwrap();
    let info = sa::parse(&message).unwrap().known().unwrap();
    assert_eq!(info.sa, tunnel());
}

#[test]
fn a_dump_shows_the_policies_that_ip_added_and_names_what_is_foreign_about_the_others() {
    let bytes = capture!("policy-list");
    let mut found: Vec<_> = message::messages(&bytes)
        .map(|message| policy::parse(&message).unwrap())
        .collect();
    let Parsed::Other(foreign) = found.remove(0) else {
        panic!("the first has a mark and two templates")
    };
    assert_eq!(foreign.direction, Some(Direction::Out));
    assert_eq!(foreign.selector, Some(selector("10.9.0.0/16", "10.8.0.0/16")));
    assert_eq!((foreign.priority, foreign.reason), (7, "several templates"));
    let known: Vec<_> = found.into_iter().map(|found| found.known().unwrap()).collect();
    assert_eq!(known, [probe(), block(), six_in_four(), to_peer()]);
}

#[test]
fn a_policy_for_a_user_or_a_range_of_ports_is_foreign() {
    let bytes = request(|batch| batch.set_policy(&probe()));
    // Bytes of struct xfrm_selector: last of the destination port's mask, last of the source port's, a prefix length that
    // IPv4 does not have, first of the user.
    for (at, value) in [(35, 0xf0), (39, 0xf0), (42, 33), (52, 1)] {
        let mut bytes = bytes.clone();
        bytes[16 + at] = value;
        let message = message::messages(&bytes).next().unwrap();
        let Parsed::Other(foreign) = policy::parse(&message).unwrap() else {
            panic!("byte {at} does not matter")
        };
        assert_eq!((foreign.direction, foreign.selector), (Some(Direction::Out), None));
    }
}

#[test]
fn notifications_say_what_ip_did() {
    let bytes = capture!("monitor");
    let events: Vec<_> = message::messages(&bytes)
        .map(|message| event::parse(&message).unwrap())
        .collect();
    let added = |limit| {
        let limits = Limits {
            soft_packets: 2,
            hard_packets: limit,
            ..Limits::default()
        };
        Event::SaAdded(Sa { limits, ..tunnel() })
    };
    let id = tunnel().id();
    let second = SaId { spi: 0x1042, ..id };
    let foreign = Policy {
        id: PolicyId {
            direction: Direction::Out,
            selector: selector("10.9.0.0/16", "10.8.0.0/16"),
        },
        priority: 7,
        action: Action::Allow,
        template: None,
    };
    let with_nat = Sa {
        src: ip("198.51.100.2"),
        dst: ip("198.51.100.1"),
        spi: 0x1051,
        encap: Some(Encap {
            sport: 4500,
            dport: 4500,
        }),
        replay_window: 32,
        esn: false,
        limits: Limits::default(),
        af_unspec: false,
        ..tunnel()
    };
    let expected = [
        added(4),
        added(3),
        Event::PolicySet(block()),
        Event::PolicySet(to_peer()),
        Event::SaExpired { id, hard: false },
        Event::SaExpired { id, hard: true },
        Event::PolicyDeleted(block().id),
        // By its number: the header of the message names no selector.
        Event::PolicyDeleted(to_peer().id),
        // With a limit of time, so none that we could have made.
        Event::Other { kind: 0x13 },
        Event::Other { kind: 0x1b },
        Event::SaAdded(Sa {
            spi: 0x1042,
            limits: Limits::default(),
            ..tunnel()
        }),
        Event::SaDeleted(second),
        Event::PolicySet(foreign),
        Event::SaAdded(with_nat),
        Event::PolicyFlushed,
        Event::SaFlushed,
    ];
    assert_eq!(events, expected);
}

#[test]
fn every_message_cut_short_is_an_error_or_something_less_and_never_a_panic() {
    for bytes in [capture!("monitor"), capture!("sa-list"), capture!("policy-list")] {
        for message in message::messages(&bytes) {
            for length in 0..message.payload.len() {
                let cut = MessageRef {
                    payload: &message.payload[..length],
                    ..message
                };
                let _ = event::parse(&cut);
                let _ = sa::parse(&cut);
                let _ = policy::parse(&cut);
            }
        }
    }
    let short = MessageRef {
        kind: 0x10,
        flags: 0,
        sequence: 0,
        port: 0,
        payload: &[0; 223],
    };
    assert_eq!(
        event::parse(&short),
        Err(Error::Malformed {
            kind: 0x10,
            length: 223
        })
    );
}

#[test]
fn the_kernels_words_are_found_whether_it_echoes_the_request_or_not() {
    let words = b"\x0c\0\x01\0too bad\0";
    let header = 40u32.to_ne_bytes();
    let capped = [&(-22i32).to_ne_bytes()[..], &header, &[0; 12], words].concat();
    let echoed = [&(-22i32).to_ne_bytes()[..], &header, &[0; 12], &[0xff; 24], words].concat();
    for (flags, payload) in [(0x300, capped), (0x200, echoed)] {
        let message = MessageRef {
            kind: 2,
            flags,
            sequence: 0,
            port: 0,
            payload: &payload,
        };
        let error = message::acknowledgement(&message).unwrap_err();
        assert_eq!(error.to_string(), "too bad (EINVAL)");
    }
}

mod properties {
    use ipnet::IpNet;
    use proptest::prelude::*;

    use super::*;

    /// Addresses of one family.
    fn pair() -> impl Strategy<Value = (IpAddr, IpAddr)> {
        prop_oneof![
            any::<([u8; 4], [u8; 4])>().prop_map(|(a, b)| (IpAddr::from(a), IpAddr::from(b))),
            any::<([u8; 16], [u8; 16])>().prop_map(|(a, b)| (IpAddr::from(a), IpAddr::from(b))),
        ]
    }

    fn any_sa() -> impl Strategy<Value = (Sa, Vec<u8>)> {
        let limits = any::<[u64; 4]>().prop_map(|[soft_packets, hard_packets, soft_bytes, hard_bytes]| Limits {
            soft_packets,
            hard_packets,
            soft_bytes,
            hard_bytes,
        });
        let algorithm = ("[ -~]{1,63}", 0u32..600, any::<u32>()).prop_map(|(name, key_bits, icv_bits)| Aead {
            name: name.into(),
            key_bits,
            icv_bits,
        });
        let encap = proptest::option::of(any::<(u16, u16)>().prop_map(|(sport, dport)| Encap { sport, dport }));
        let direction = proptest::option::of(prop_oneof![Just(SaDirection::In), Just(SaDirection::Out)]);
        let rest = (any::<u32>(), any::<u32>(), 0..131_072u32, any::<bool>(), any::<bool>());
        (pair(), algorithm, encap, direction, limits, rest).prop_map(
            |((src, dst), algorithm, encap, direction, limits, (spi, reqid, replay_window, esn, af_unspec))| {
                let key = vec![0x5a; algorithm.key_len()];
                let sa = Sa {
                    src,
                    dst,
                    spi,
                    reqid,
                    algorithm,
                    encap,
                    replay_window,
                    esn,
                    direction,
                    limits,
                    af_unspec,
                };
                (sa, key)
            },
        )
    }

    fn any_policy() -> impl Strategy<Value = Policy> {
        let direction = prop_oneof![Just(Direction::In), Just(Direction::Fwd), Just(Direction::Out)];
        let selector = (pair(), any::<(u8, u8)>(), any::<(u8, Option<u16>, Option<u16>, u32)>()).prop_map(
            |((src, dst), (src_prefix, dst_prefix), (protocol, sport, dport, ifindex))| {
                let net = |address: IpAddr, prefix: u8| {
                    IpNet::new(address, prefix % if address.is_ipv4() { 33 } else { 129 }).unwrap()
                };
                Selector {
                    src: net(src, src_prefix),
                    dst: net(dst, dst_prefix),
                    protocol,
                    sport,
                    dport,
                    ifindex,
                }
            },
        );
        let template = proptest::option::of((pair(), any::<(u32, u32, bool)>()).prop_map(
            |((src, dst), (spi, reqid, optional))| Template {
                src,
                dst,
                spi,
                reqid,
                optional,
            },
        ));
        let action = prop_oneof![Just(Action::Allow), Just(Action::Block)];
        (direction, selector, template, action, any::<u32>()).prop_map(
            |(direction, selector, template, action, priority)| Policy {
                id: PolicyId { direction, selector },
                priority,
                action,
                template,
            },
        )
    }

    fn only(bytes: &[u8]) -> MessageRef<'_> {
        let mut found = message::messages(bytes);
        let first = found.next().unwrap();
        assert!(found.next().is_none());
        first
    }

    proptest! {
        #[test]
        fn an_sa_is_read_as_it_was_written((sa, key) in any_sa()) {
            let bytes = request(|batch| batch.add_sa(&sa, &key));
            let found = sa::parse(&only(&bytes)).unwrap().known().map(|info| info.sa);
            prop_assert_eq!(found, Some(sa));
        }

        #[test]
        fn a_policy_is_read_as_it_was_written(policy in any_policy()) {
            let bytes = request(|batch| batch.set_policy(&policy));
            prop_assert_eq!(policy::parse(&only(&bytes)).unwrap().known(), Some(policy));
        }

        #[test]
        fn no_bytes_make_a_parser_panic(
            kind in 0u16..0x30,
            flags in any::<u16>(),
            payload in proptest::collection::vec(any::<u8>(), 0..700),
        ) {
            let message = MessageRef { kind, flags, sequence: 0, port: 0, payload: &payload };
            let _ = event::parse(&message);
            let _ = sa::parse(&message);
            let _ = policy::parse(&message);
            let _ = message::acknowledgement(&message);
            let _ = message::end_of_dump(&message);
            prop_assert!(message::messages(&payload).count() <= payload.len());
            prop_assert!(message::attributes(&payload).count() <= payload.len());
        }

        #[test]
        fn no_attributes_behind_a_whole_header_make_a_parser_panic(
            kind in 0x10u16..0x29,
            (start, header) in prop_oneof![
                Just((capture!("sa-add"), 224)),
                Just((capture!("policy-set"), 168)),
                (0usize..260).prop_map(|length| (vec![0; 276], length)),
            ],
            attributes in proptest::collection::vec(
                (0u16..50, proptest::collection::vec(any::<u8>(), 0..90), 0u16..3), 0..6),
        ) {
            let mut payload = start[16..16 + header].to_vec();
            for (kind, body, lie) in attributes {
                payload.extend((body.len() as u16 + 4 + lie).to_ne_bytes());
                payload.extend(kind.to_ne_bytes());
                payload.extend(body);
                payload.resize(payload.len().next_multiple_of(4), 0);
            }
            let message = MessageRef { kind, flags: 0, sequence: 0, port: 0, payload: &payload };
            let _ = event::parse(&message);
            let _ = sa::parse(&message);
            let _ = policy::parse(&message);
        }
    }
}
