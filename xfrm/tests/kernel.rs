//! Against a real kernel with ESP, as root: each test makes a network namespace of its own for its thread.

#![allow(clippy::unwrap_used, reason = "it is how a test fails")]

use std::{
    net::{IpAddr, UdpSocket},
    os::fd::AsRawFd,
    process::Command,
    sync::mpsc,
    thread::{self, sleep},
    time::Duration,
};

use nix::{
    libc,
    sched::{CloneFlags, unshare},
};
use xfrm::{
    Action, Aead, Batch, Direction, Encap, Error, Event, Events, Limits, Notification, Parsed, Policy, PolicyId, Sa,
    SaDirection, SaId, SaInfo, Selector, Template, Xfrm,
};

const REQID: u32 = 0x726d;
const CIPHERS: [Aead; 3] = [Aead::AES_128_GCM_16, Aead::AES_256_GCM_16, Aead::CHACHA20_POLY1305];

/// Puts the calling thread into a network namespace of its own, which ends with the thread.
fn own_namespace() {
    unshare(CloneFlags::CLONE_NEWNET).expect("needs root");
    ip("link set lo up");
}

/// Runs `ip` in this thread's namespace and gives what it printed.
fn ip(arguments: &str) -> String {
    let output = Command::new("ip")
        .args(arguments.split_whitespace())
        .output()
        .expect("ip is installed");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "ip {arguments}: {}", text(&output.stderr));
    text(&output.stdout)
}

fn address(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn sa(spi: u32) -> Sa {
    Sa {
        src: address("192.0.2.1"),
        dst: address("192.0.2.2"),
        spi,
        reqid: REQID,
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

fn key(sa: &Sa) -> Vec<u8> {
    (0..sa.algorithm.key_len())
        .map(|index| (index as u32 ^ sa.spi) as u8)
        .collect()
}

fn add(xfrm: &mut Xfrm, sa: &Sa) {
    let mut batch = Batch::new();
    batch.add_sa(sa, &key(sa));
    assert_eq!(xfrm.execute(batch), [Ok(())], "{sa:?}");
}

fn policy(direction: Direction, src: &str, dst: &str, spi: u32) -> Policy {
    let selector = Selector::between(src.parse().unwrap(), dst.parse().unwrap());
    let (src, dst) = (address("192.0.2.1"), address("192.0.2.2"));
    let (src, dst) = if direction == Direction::Out {
        (src, dst)
    } else {
        (dst, src)
    };
    Policy {
        id: PolicyId { direction, selector },
        priority: 1000,
        action: Action::Allow,
        template: Some(Template {
            src,
            dst,
            spi,
            reqid: REQID,
        }),
    }
}

fn block(direction: Direction) -> Policy {
    Policy {
        action: Action::Block,
        template: None,
        priority: 9,
        ..policy(direction, "10.4.0.0/16", "10.4.0.0/16", 0)
    }
}

fn set(xfrm: &mut Xfrm, policies: &[Policy]) {
    let mut batch = Batch::new();
    policies.iter().for_each(|policy| batch.set_policy(policy));
    assert!(xfrm.execute(batch).iter().all(Result::is_ok));
}

fn sas(xfrm: &mut Xfrm) -> Vec<SaInfo> {
    xfrm.dump_sas().unwrap().into_iter().filter_map(Parsed::known).collect()
}

fn policies(xfrm: &mut Xfrm) -> Vec<Policy> {
    let mut found: Vec<_> = xfrm
        .dump_policies()
        .unwrap()
        .into_iter()
        .filter_map(Parsed::known)
        .collect();
    found.sort_by_key(|policy| policy.id);
    found
}

fn events(events: &mut Events) -> Vec<Notification> {
    let mut seen = Vec::new();
    events.read(&mut |event| seen.push(event)).unwrap();
    seen
}

/// A dummy device with the outer and the inner source address, so that packets to 10.4.2.0/24 meet the `out` policies.
fn uplink() {
    ip("link add d0 type dummy");
    ip("addr add 192.0.2.1/24 dev d0");
    ip("link set d0 up");
    ip("neigh add 192.0.2.2 lladdr 02:00:00:00:00:02 dev d0 nud permanent");
    ip("route add 10.4.2.0/24 dev d0");
}

fn send(count: usize) {
    let socket = UdpSocket::bind("192.0.2.1:0").unwrap();
    for _ in 0..count {
        // Fails where the SA is used up, which is what some tests are after.
        let _ = socket.send_to(&[0; 100], "10.4.2.1:9");
    }
}

#[test]
#[ignore = "needs a kernel with ESP: tests/run runs it in one"]
fn sas_of_every_cipher_family_and_encapsulation_are_shown_as_they_were_added_until_they_are_deleted() {
    own_namespace();
    let mut xfrm = Xfrm::open().unwrap();
    let mut wanted = Vec::new();
    for algorithm in CIPHERS {
        for (src, dst) in [("192.0.2.1", "192.0.2.2"), ("2001:db8::1", "2001:db8::2")] {
            for encap in [
                None,
                Some(Encap {
                    sport: 4500,
                    dport: 4501,
                }),
            ] {
                for (esn, replay_window) in [(true, 1024), (false, 32), (false, 64)] {
                    let (src, dst) = (address(src), address(dst));
                    let spi = 0x1000 + wanted.len() as u32;
                    wanted.push(Sa {
                        src,
                        dst,
                        encap,
                        esn,
                        replay_window,
                        algorithm: algorithm.clone(),
                        ..sa(spi)
                    });
                }
            }
        }
    }
    wanted.push(Sa {
        af_unspec: false,
        limits: Limits::default(),
        reqid: 0,
        ..sa(0x2000)
    });
    wanted.push(Sa {
        limits: Limits {
            soft_bytes: 5,
            hard_bytes: 6,
            ..Limits::default()
        },
        ..sa(0x2001)
    });
    let mut batch = Batch::new();
    wanted.iter().for_each(|sa| batch.add_sa(sa, &key(sa)));
    assert!(xfrm.execute(batch).iter().all(Result::is_ok));

    let mut found: Vec<Sa> = sas(&mut xfrm).into_iter().map(|info| info.sa).collect();
    found.sort_by_key(|sa| sa.spi);
    assert_eq!(found, wanted);
    for sa in &wanted {
        assert_eq!(xfrm.get_sa(&sa.id()).unwrap().map(|info| info.sa), Some(sa.clone()));
    }

    let mut batch = Batch::new();
    wanted.iter().for_each(|sa| batch.delete_sa(&sa.id()));
    assert!(xfrm.execute(batch).iter().all(Result::is_ok));
    assert_eq!(xfrm.dump_sas(), Ok(vec![]));
    assert_eq!(xfrm.get_sa(&wanted[0].id()), Ok(None));
    let mut batch = Batch::new();
    batch.delete_sa(&wanted[0].id());
    let error = xfrm.execute(batch).remove(0).unwrap_err();
    assert!(error.is_gone() && !error.exists() && !error.is_unknown(), "{error}");
}

#[test]
#[ignore = "needs a kernel with ESP: tests/run runs it in one"]
fn one_refused_sa_in_a_batch_of_three_hundred_is_the_only_one_refused() {
    own_namespace();
    let mut xfrm = Xfrm::open().unwrap();
    add(&mut xfrm, &sa(0x1000 + 150));
    let mut batch = Batch::new();
    (0..300).for_each(|index| batch.add_sa(&sa(0x1000 + index), &key(&sa(0x1000 + index))));
    let results = xfrm.execute(batch);
    assert_eq!(results.len(), 300);
    for (index, result) in results.iter().enumerate() {
        match result {
            Ok(()) => assert_ne!(index, 150),
            Err(error) => assert!(index == 150 && error.exists(), "{index}: {error}"),
        }
    }
    assert_eq!(sas(&mut xfrm).len(), 300);
}

#[test]
#[ignore = "needs a kernel with ESP: tests/run runs it in one"]
fn an_unknown_cipher_is_refused_in_the_kernels_own_words() {
    own_namespace();
    let mut xfrm = Xfrm::open().unwrap();
    let sa = Sa {
        algorithm: Aead {
            name: "rfc9999(none)".into(),
            ..Aead::AES_128_GCM_16
        },
        ..sa(0x1000)
    };
    let mut batch = Batch::new();
    batch.add_sa(&sa, &key(&sa));
    let error = xfrm.execute(batch).remove(0).unwrap_err();
    assert_eq!(error.to_string(), "Requested AEAD algorithm not found (ENOSYS)");
}

#[test]
#[ignore = "needs a kernel with ESP: tests/run runs it in one"]
fn an_update_changes_limits() {
    own_namespace();
    let mut xfrm = Xfrm::open().unwrap();
    add(&mut xfrm, &sa(0x1000));
    let limits = Limits {
        soft_packets: 3,
        hard_packets: 4,
        ..Limits::default()
    };
    let changed = Sa { limits, ..sa(0x1000) };
    let mut batch = Batch::new();
    batch.update_sa(&changed, &key(&changed));
    assert_eq!(xfrm.execute(batch), [Ok(())]);
    assert_eq!(xfrm.get_sa(&changed.id()).unwrap().unwrap().sa, changed);
}

#[test]
#[ignore = "needs a kernel with ESP: tests/run runs it in one"]
fn a_direction_is_held_by_the_kernels_that_know_one_and_left_out_by_the_others() {
    own_namespace();
    let mut xfrm = Xfrm::open().unwrap();
    let knows = xfrm.knows_direction().unwrap();
    let inward = Sa {
        direction: Some(SaDirection::In),
        ..sa(0x1000)
    };
    let outward = Sa {
        direction: Some(SaDirection::Out),
        replay_window: 0,
        ..sa(0x1001)
    };
    add(&mut xfrm, &inward);
    let held = xfrm.get_sa(&inward.id()).unwrap().unwrap().sa.direction;
    assert_eq!(held, knows.then_some(SaDirection::In));
    let mut batch = Batch::new();
    batch.add_sa(&outward, &key(&outward));
    match xfrm.execute(batch).remove(0) {
        Ok(()) => assert_eq!(xfrm.get_sa(&outward.id()).unwrap().unwrap().sa, outward),
        Err(error) => assert!(
            !knows && error.to_string() == "ESN replay window must be > 0 (EINVAL)",
            "{error}"
        ),
    }
}

#[test]
#[ignore = "needs a kernel with ESP: tests/run runs it in one"]
fn the_direction_of_an_sa_is_known_from_linux_6_10_on() {
    own_namespace();
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let version: Vec<u32> = release
        .split(['.', '-'])
        .take(2)
        .map(|part| part.trim().parse().unwrap())
        .collect();
    let mut xfrm = Xfrm::open().unwrap();
    let knows = xfrm.knows_direction().unwrap();
    assert_eq!(knows, (version[0], version[1]) >= (6, 10), "{release}");
    // Checked before the cipher is looked for, so without ESP too.
    let mut batch = Batch::new();
    for replay_window in [0, 1024] {
        let sa = Sa {
            direction: Some(SaDirection::Out),
            replay_window,
            ..sa(0x1000)
        };
        batch.add_sa(&sa, &key(&sa));
    }
    let results = xfrm.execute(batch);
    let said: Vec<_> = results
        .into_iter()
        .map(|result| result.map_err(|error| error.to_string()))
        .collect();
    let refused = |index: usize| {
        said[index]
            .as_ref()
            .is_err_and(|text| text.to_lowercase().contains("replay"))
    };
    assert_eq!([refused(0), refused(1)], [!knows, knows], "{said:?}");
}

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

    let mut reasons: Vec<_> = Vec::new();
    for parsed in xfrm.dump_policies().unwrap() {
        match parsed {
            Parsed::Known(policy) => assert_eq!(policy, block(Direction::In)),
            Parsed::Other(other) => reasons.push(other.reason),
        }
    }
    reasons.sort_unstable();
    assert_eq!(
        reasons,
        [
            "a mark",
            "a template that is not a required ESP tunnel",
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
fn changes_are_told_with_the_port_of_their_author() {
    own_namespace();
    let mut xfrm = Xfrm::open().unwrap();
    let mut listener = Events::open().unwrap();
    let mine = xfrm.port();
    let policy = policy(Direction::Out, "0.0.0.0/0", "10.4.2.0/24", 0x1000);
    let mut batch = Batch::new();
    batch.add_sa(&sa(0x1000), &key(&sa(0x1000)));
    batch.set_policy(&policy);
    batch.delete_policy(&policy.id);
    batch.delete_sa(&sa(0x1000).id());
    batch.delete_sa(&sa(0x1000).id());
    let results = xfrm.execute(batch);
    assert!(results[..4].iter().all(Result::is_ok) && results[4].is_err());
    let expected = [
        Event::SaAdded(sa(0x1000)),
        Event::PolicySet(policy.clone()),
        Event::PolicyDeleted(policy.id),
        Event::SaDeleted(sa(0x1000).id()),
    ];
    let seen = events(&mut listener);
    assert!(seen.iter().all(|notification| notification.port == mine), "{seen:?}");
    assert_eq!(
        seen.into_iter()
            .map(|notification| notification.event)
            .collect::<Vec<_>>(),
        expected
    );

    add(&mut xfrm, &sa(0x1001));
    set(&mut xfrm, &[policy]);
    events(&mut listener);
    ip("xfrm policy flush");
    ip("xfrm state flush");
    let seen = events(&mut listener);
    assert!(seen.iter().all(|notification| notification.port != mine), "{seen:?}");
    let seen: Vec<_> = seen.into_iter().map(|notification| notification.event).collect();
    assert_eq!(seen, [Event::PolicyFlushed, Event::SaFlushed]);
}

#[test]
#[ignore = "needs a kernel with ESP: tests/run runs it in one"]
fn a_used_sa_is_counted_as_ip_counts_it_and_its_limits_are_told() {
    own_namespace();
    uplink();
    let mut xfrm = Xfrm::open().unwrap();
    let mut listener = Events::open().unwrap();
    let sa = Sa {
        limits: Limits {
            soft_packets: 4,
            hard_packets: 6,
            ..Limits::default()
        },
        ..sa(0x1000)
    };
    add(&mut xfrm, &sa);
    set(&mut xfrm, &[policy(Direction::Out, "0.0.0.0/0", "10.4.2.0/24", sa.spi)]);
    events(&mut listener);

    send(3);
    let info = xfrm.get_sa(&sa.id()).unwrap().unwrap();
    assert_eq!((info.packets, info.seq_out, info.seq_in), (3, 3, 0));
    assert_eq!((info.integrity_failed, info.replay, info.replay_window), (0, 0, 0));
    assert!(info.use_time >= info.add_time && info.add_time > 0);
    assert_eq!(sas(&mut xfrm), std::slice::from_ref(&info));
    let shown = ip("-s xfrm state list");
    for expected in [
        format!(
            "proto esp spi 0x{:08x}({}) reqid {REQID}(0x{REQID:08x}) mode tunnel",
            sa.spi, sa.spi
        ),
        "seq-hi 0x0, seq 0x0, oseq-hi 0x0, oseq 0x3".to_owned(),
        "replay_window 1024, bitmap-length 32".to_owned(),
        "flag af-unspec esn".to_owned(),
        "limit: soft 4(packets), hard 6(packets)".to_owned(),
        format!("{}(bytes), {}(packets)", info.bytes, info.packets),
        "replay-window 0 replay 0 failed 0".to_owned(),
    ] {
        assert!(shown.contains(&expected), "{expected:?} is not in:\n{shown}");
    }

    send(7);
    sleep(Duration::from_millis(100));
    let seen: Vec<_> = events(&mut listener);
    assert!(seen.iter().all(|notification| notification.port == 0), "{seen:?}");
    let seen: Vec<_> = seen.into_iter().map(|notification| notification.event).collect();
    let id = sa.id();
    assert_eq!(
        seen,
        [
            Event::SaExpired { id, hard: false },
            Event::SaExpired { id, hard: true }
        ]
    );
    assert_eq!(xfrm.get_sa(&id), Ok(None));
}

#[test]
#[ignore = "needs a kernel with ESP: tests/run runs it in one"]
fn a_listener_too_slow_for_a_burst_is_told_that_it_lost_some_and_reads_on() {
    own_namespace();
    let mut xfrm = Xfrm::open().unwrap();
    let mut listener = Events::open().unwrap();
    let policies = [block(Direction::In), block(Direction::Fwd)];
    let mut batches = 0;
    let (mut before, mut lost) = (0, false);
    while !lost && batches < 900 {
        let mut batch = Batch::new();
        (0..100).for_each(|_| policies.iter().for_each(|policy| batch.set_policy(policy)));
        assert!(xfrm.execute(batch).iter().all(Result::is_ok));
        batches += 1;
        if batches % 150 == 0 {
            lost = listener.read(&mut |_| before += 1) == Err(Error::Overrun);
        }
    }
    assert!(lost, "{before} of {} notifications fit the queue", batches * 200);
    listener.read(&mut |_| before += 1).unwrap();
    assert!(before < batches * 200);
    set(&mut xfrm, &[block(Direction::Out)]);
    let seen = events(&mut listener);
    assert_eq!(
        seen,
        [Notification {
            port: xfrm.port(),
            event: Event::PolicySet(block(Direction::Out))
        }]
    );
}

#[test]
#[ignore = "needs a kernel with ESP: tests/run runs it in one"]
fn a_peer_behind_a_nat_that_forgot_is_told_with_its_new_port() {
    own_namespace();
    let mut xfrm = Xfrm::open().unwrap();
    let mut listener = Events::open().unwrap();
    ip("link add v0 type veth peer name v1");
    ip("addr add 192.0.2.2/24 dev v0");
    ip("link set v0 up");
    let socket = UdpSocket::bind("192.0.2.2:4500").unwrap();
    decapsulate(&socket);
    let sa = Sa {
        encap: Some(Encap {
            sport: 4500,
            dport: 4500,
        }),
        ..sa(0x1000)
    };
    add(&mut xfrm, &sa);

    // The peer sends on the same SA, from another port than it says here.
    let (here_sender, here) = mpsc::channel();
    let (moved, arrived) = mpsc::channel::<()>();
    let peer = thread::spawn(move || {
        own_namespace();
        here_sender
            .send(std::fs::read_link("/proc/thread-self").unwrap())
            .unwrap();
        arrived.recv().unwrap();
        ip("addr add 192.0.2.1/24 dev v1");
        ip("link set v1 up");
        ip("route add 10.4.2.0/24 dev v1");
        let mut xfrm = Xfrm::open().unwrap();
        add(
            &mut xfrm,
            &Sa {
                encap: Some(Encap {
                    sport: 4577,
                    dport: 4500,
                }),
                ..self::sa(0x1000)
            },
        );
        set(&mut xfrm, &[policy(Direction::Out, "0.0.0.0/0", "10.4.2.0/24", 0x1000)]);
        send(1);
        sleep(Duration::from_secs(2));
        xfrm.get_sa(&self::sa(0x1000).id()).unwrap().unwrap().packets
    });
    let thread = here.recv().unwrap();
    ip(&format!(
        "link set v1 netns {}",
        thread.file_name().unwrap().to_str().unwrap()
    ));
    moved.send(()).unwrap();
    assert_eq!(peer.join().unwrap(), 1);

    let seen: Vec<_> = events(&mut listener)
        .into_iter()
        .map(|notification| notification.event)
        .collect();
    let mapping = Event::Mapping {
        id: sa.id(),
        reqid: REQID,
        old_src: sa.src,
        old_port: 4500,
        new_src: sa.src,
        new_port: 4577,
    };
    let info = xfrm.get_sa(&sa.id()).unwrap().unwrap();
    assert_eq!(seen, [Event::SaAdded(sa.clone()), mapping], "{info:?}");
    assert_eq!((info.packets, info.seq_in, info.sa), (1, 1, sa));
}

/// Makes a UDP socket hand its ESP to the kernel (`UDP_ENCAP`, `UDP_ENCAP_ESPINUDP`: include/uapi/linux/udp.h).
fn decapsulate(socket: &UdpSocket) {
    let esp_in_udp: libc::c_int = 2;
    // SAFETY: the value lives until the call returns and the length is its own.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_UDP,
            100,
            (&raw const esp_in_udp).cast(),
            size_of_val(&esp_in_udp) as libc::socklen_t,
        )
    };
    assert_eq!(result, 0);
}

#[test]
#[ignore = "needs a kernel with ESP: tests/run runs it in one"]
fn one_sa_of_many_is_removed_alone() {
    own_namespace();
    let mut xfrm = Xfrm::open().unwrap();
    (0..3).for_each(|index| add(&mut xfrm, &sa(0x1000 + index)));
    let mut batch = Batch::new();
    batch.delete_sa(&SaId {
        dst: address("192.0.2.2"),
        spi: 0x1001,
    });
    assert_eq!(xfrm.execute(batch), [Ok(())]);
    let mut left: Vec<_> = sas(&mut xfrm).into_iter().map(|info| info.sa.spi).collect();
    left.sort_unstable();
    assert_eq!(left, [0x1000, 0x1002]);
}
