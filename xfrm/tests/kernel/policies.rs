//! Policies, and what others made.

use xfrm::{Batch, Direction, Event, Events, Family, HashThreshold, Parsed, Policy, PolicyId, SaId, Selector, Xfrm};

use crate::{REQID, add, address, block, events, ip, own_namespace, policies, policy, sa, set};

#[test]
#[ignore = "needs a kernel with ESP: tests/run runs it in one"]
fn policies_are_shown_as_set_and_a_second_set_replaces_the_first() {
    own_namespace();
    let mut xfrm = Xfrm::open().unwrap();
    let narrow = Selector {
        protocol: 17,
        sport: Some(8473),
        dport: Some(8474),
        ifindex: 1,
        ..policy(Direction::Out, "10.4.1.0/32", "10.4.2.0/32", 0).id.selector
    };
    let mut wanted = vec![
        policy(Direction::In, "10.4.2.0/24", "0.0.0.0/0", 0),
        policy(Direction::In, "fd00:2::/64", "::/0", 0),
        block(Direction::In),
        policy(Direction::Fwd, "10.4.2.0/24", "0.0.0.0/0", 0),
        policy(Direction::Out, "0.0.0.0/0", "10.4.2.0/24", 0x1001),
        Policy {
            id: PolicyId {
                direction: Direction::Out,
                selector: narrow,
            },
            priority: 10,
            ..policy(Direction::Out, "0.0.0.0/0", "0.0.0.0/0", 0x1002)
        },
    ];
    wanted.sort_by_key(|policy| policy.id);
    set(&mut xfrm, &wanted);
    assert_eq!(policies(&mut xfrm), wanted);

    let mut changed = wanted.clone();
    for policy in &mut changed {
        policy.priority += 1;
        if let Some(template) = &mut policy.template {
            template.spi += 0x40;
        }
    }
    set(&mut xfrm, &changed);
    assert_eq!(policies(&mut xfrm), changed);

    let mut batch = Batch::new();
    batch.add_policy(&changed[0]);
    changed
        .iter()
        .chain(&changed[..1])
        .for_each(|policy| batch.delete_policy(&policy.id));
    let mut results = xfrm.execute(batch);
    assert!(results.remove(0).unwrap_err().exists());
    assert!(results.pop().unwrap().unwrap_err().is_gone());
    assert!(results.iter().all(Result::is_ok));
    assert_eq!(xfrm.dump_policies(), Ok(vec![]));
}

#[test]
#[ignore = "needs a kernel with ESP: tests/run runs it in one"]
fn what_others_made_survives_a_dump_and_is_told_from_what_we_could_have_made() {
    own_namespace();
    let mut xfrm = Xfrm::open().unwrap();
    let hex = "0x00112233445566778899aabbccddeeff";
    let peers = "src 192.0.2.1 dst 192.0.2.2 proto";
    ip(&format!(
        "xfrm state add {peers} esp spi 0x10 mode transport auth hmac(sha256) {hex} enc cbc(aes) {hex}"
    ));
    ip(&format!(
        "xfrm state add {peers} ah spi 0x11 mode tunnel auth hmac(sha256) {hex}"
    ));
    ip(&format!(
        "xfrm state add {peers} esp spi 0x12 mode tunnel aead rfc4106(gcm(aes)) {hex}01020304 128 if_id 7"
    ));
    ip(&format!(
        "xfrm state add {peers} esp spi 0x13 mode tunnel aead rfc4106(gcm(aes)) {hex}01020304 96"
    ));
    ip(&format!(
        "xfrm state add {peers} esp spi 0x14 mode tunnel flag nopmtudisc aead rfc4106(gcm(aes)) {hex}01020304 64"
    ));
    ip(
        "xfrm policy add src 10.9.0.0/16 dst 10.8.0.0/16 dir out mark 1 tmpl src 192.0.2.1 dst 192.0.2.2 proto esp mode tunnel",
    );
    ip(
        "xfrm policy add src 10.9.0.0/16 dst 10.8.0.0/16 dir in tmpl src 192.0.2.1 dst 192.0.2.2 proto ah mode transport",
    );
    ip("xfrm policy add src 10.9.0.0/16 dst 10.8.0.0/16 dir fwd flag icmp");
    // A tunnel that a packet may come without.
    ip(
        "xfrm policy add src 10.9.0.0/16 dst 10.7.0.0/16 dir in tmpl src 192.0.2.1 dst 192.0.2.2 proto esp mode tunnel \
         level use",
    );
    ip("xfrm policy add src 10.9.0.0/16 dst 10.8.0.0/16 dir out if_id 9 action block");
    add(&mut xfrm, &sa(0x1000));
    set(&mut xfrm, &[block(Direction::In)]);

    let (mut known, mut foreign) = (Vec::new(), Vec::new());
    for parsed in xfrm.dump_sas().unwrap() {
        match parsed {
            Parsed::Known(info) => known.push((info.sa.spi, info.sa.reqid, info.sa.algorithm.icv_bits)),
            Parsed::Other(other) => foreign.push((other.spi, other.protocol, other.reason)),
        }
    }
    known.sort_unstable();
    foreign.sort_unstable();
    assert_eq!(known, [(0x13, 0, 96), (0x1000, REQID, 128)]);
    let reasons = [
        (0x10, 50, "not in tunnel mode"),
        (0x11, 51, "not ESP"),
        (0x12, 50, "an interface id"),
        (0x14, 50, "flags"),
    ];
    assert_eq!(foreign, reasons);

    let (mut reasons, mut optional): (Vec<_>, _) = (Vec::new(), 0);
    for parsed in xfrm.dump_policies().unwrap() {
        match parsed {
            Parsed::Known(Policy {
                template: Some(template),
                ..
            }) => {
                assert!(template.optional);
                optional += 1;
            }
            Parsed::Known(policy) => assert_eq!(policy, block(Direction::In)),
            Parsed::Other(other) => reasons.push(other.reason),
        }
    }
    assert_eq!(optional, 1);
    reasons.sort_unstable();
    assert_eq!(
        reasons,
        [
            "a mark",
            "a template that is not an ESP tunnel",
            "an interface id",
            "flags"
        ]
    );

    let mut listener = Events::open().unwrap();
    ip(&format!("xfrm state delete {peers} esp spi 0x12"));
    ip(&format!("xfrm state delete {peers} esp spi 0x13"));
    ip(&format!("xfrm state delete {peers} ah spi 0x11"));
    ip("xfrm policy delete src 10.9.0.0/16 dst 10.8.0.0/16 dir out mark 1");
    ip("xfrm policy delete src 10.9.0.0/16 dst 10.8.0.0/16 dir out if_id 9");
    let seen: Vec<_> = events(&mut listener)
        .into_iter()
        .map(|notification| notification.event)
        .collect();
    let [other_sa, other_policy] = [0x11, 0x14].map(|kind| Event::Other { kind });
    let deleted = Event::SaDeleted(SaId {
        dst: address("192.0.2.2"),
        spi: 0x13,
    });
    assert_eq!(
        seen,
        [other_sa.clone(), deleted, other_sa, other_policy.clone(), other_policy]
    );
}

#[test]
#[ignore = "needs a kernel with ESP: tests/run runs it in one"]
fn a_hash_threshold_is_kept_and_policies_stay_as_they_are() {
    own_namespace();
    let mut xfrm = Xfrm::open().unwrap();
    let mut wanted = vec![
        policy(Direction::Out, "0.0.0.0/0", "10.4.2.0/24", 0x1001),
        block(Direction::Out),
    ];
    wanted.sort_by_key(|policy| policy.id);
    set(&mut xfrm, &wanted);
    let (local, remote) = (0, 24);
    let mut batch = Batch::new();
    batch.set_hash_threshold(Family::V4, HashThreshold { local, remote });
    assert_eq!(xfrm.execute(batch), [Ok(())]);
    assert_eq!(
        xfrm.hash_threshold(Family::V4),
        Ok(Some(HashThreshold { local, remote }))
    );
    let standard = HashThreshold::standard(Family::V6);
    assert_eq!(xfrm.hash_threshold(Family::V6), Ok(Some(standard)));
    assert!(ip("-s -s xfrm policy count").contains("SPD IPv4 thresholds: local 0 remote 24"));
    assert_eq!(policies(&mut xfrm), wanted);
}
