//! What needs a kernel with ESP: SAs, their events and counters, the preflight, the MTU.

use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use nix::sys::socket::{getsockopt, sockopt};

use super::*;
use crate::kernel::mtu::inner_mtu;

fn whole_peer(slot: u32, epoch: u64) -> Objects {
    let mut objects = peer_without_sas(slot);
    objects.extend(peer_sas(slot, epoch));
    objects
}

#[test]
#[ignore = "needs root and a kernel with ESP"]
fn whole_peers_come_back_as_they_were_written_and_go_without_a_trace() {
    in_namespace(|| {
        let (mut netlink, keys) = (open(), Keys::new());
        let mut desired = node();
        for slot in [2, 3] {
            desired.extend(whole_peer(slot, 1));
        }
        must(&mut netlink, make(&desired), &keys);
        assert_same(&netlink.dump().expect("dump"), &as_dumped(&desired));
        must(&mut netlink, breaks(&desired), &keys);
        assert_same(&netlink.dump().expect("dump"), &Objects::new());
        must(&mut netlink, breaks(&desired), &keys);
        assert_eq!(ip("xfrm state"), "");
        assert_eq!(ip("xfrm policy"), "");
    });
}

#[test]
#[ignore = "needs root and a kernel with ESP"]
fn sas_between_ipv6_addresses_and_of_every_cipher_come_back_as_they_were_written() {
    in_namespace(|| {
        let mut netlink = open();
        for (index, cipher) in keys::Cipher::ALL.into_iter().enumerate() {
            let features = netlink.preflight(cipher, &own_bases()).expect("this kernel has it");
            assert_eq!(features.sa_direction, has_direction());
            let key = Keys::new();
            let (key_id, object) = peer_sas(2, 1 + index as u64).pop_first().expect("an SA");
            let (Key::Sa(_), Object::Sa { mut sa, .. }) = (key_id, object) else {
                panic!("an SA")
            };
            (sa.src, sa.dst, sa.algorithm) = (addr("2001:db8::1"), addr("2001:db8::2"), aead(cipher));
            let (id, secret) = (sa.id(), key.0.key(cipher, keys::Spi(sa.spi)));
            let object = Object::Sa { sa, born: None };
            let mut write = Write {
                op: Op::Make(Key::Sa(id), object.clone()),
                secret: Some(secret),
            };
            carry(&mut netlink, &mut write).expect("made");
            assert!(write.secret.is_none(), "its key is used");
            assert_eq!(netlink.dump().expect("dump").get(&Key::Sa(id)), Some(&object));
        }
        assert_eq!(
            ip("xfrm state").matches("proto esp").count(),
            3,
            "the preflight leaves nothing"
        );
    });
}

#[test]
#[ignore = "needs root and a kernel with ESP"]
fn an_sa_can_be_changed_with_a_key_to_another_generation_and_without_one_in_its_ports() {
    in_namespace(|| {
        let (mut netlink, keys) = (open(), Keys::new());
        let mut desired = peer_sas(3, 1);
        must(&mut netlink, make(&desired), &keys);
        let key_shown = || {
            ip("xfrm state")
                .lines()
                .filter(|l| l.contains("aead"))
                .map(str::to_owned)
                .collect::<Vec<_>>()
        };
        let before = key_shown();
        for object in desired.values_mut() {
            let Object::Sa { sa, .. } = object else { panic!("an SA") };
            sa.encap = Some(xfrm::Encap {
                sport: 4501,
                dport: 4502,
            });
        }
        for op in changes(&desired) {
            one(&mut netlink, op).expect("changed");
        }
        assert_same(&netlink.dump().expect("dump"), &as_dumped(&desired));
        assert_eq!(key_shown(), before, "the key is what it was");

        let other = Keys::new();
        must(&mut netlink, changes(&desired), &other);
        assert_same(&netlink.dump().expect("dump"), &as_dumped(&desired));
        assert_ne!(key_shown(), before);

        ip("xfrm state flush");
        for op in changes(&desired) {
            let refused = one(&mut netlink, op).expect_err("there is none");
            assert!(matches!(refused, WriteError::Refused { source, .. } if source.is_gone()));
        }
        assert_eq!(ip("xfrm state"), "", "no SA comes to be with a key that nobody has");
    });
}

fn changes(desired: &Objects) -> Vec<Op> {
    desired
        .iter()
        .map(|(key, object)| Op::Change(key.clone(), object.clone()))
        .collect()
}

const KEY: &str = "0x000102030405060708090a0b0c0d0e0f10111213";

#[test]
#[ignore = "needs root and a kernel with ESP"]
fn a_refused_key_comes_back_and_a_foreign_sa_is_named_and_left() {
    in_namespace(|| {
        let (mut netlink, keys) = (open(), Keys::new());
        let desired = peer_sas(2, 1);
        let (key, object) = desired.first_key_value().expect("an SA");
        let Key::Sa(id) = key else { panic!("{key}") };
        let make = || Write {
            op: Op::Make(key.clone(), object.clone()),
            secret: Some(keys.of(id.spi)),
        };

        carry(&mut netlink, &mut make()).expect("made");
        let mut again = make();
        let refused = carry(&mut netlink, &mut again).expect_err("it is there");
        assert!(
            matches!(refused, WriteError::Refused { ref source, .. } if source.exists()),
            "{refused:?}"
        );
        assert_eq!(again.secret.expect("never used").as_bytes(), keys.of(id.spi).as_bytes());
        one(&mut netlink, Op::Break(key.clone())).expect("ours");

        for body in [
            format!("reqid 7 mode tunnel aead rfc4106(gcm(aes)) {KEY} 128"),
            format!("reqid 7 mode transport aead rfc4106(gcm(aes)) {KEY} 128"),
        ] {
            let whose = format!("src 192.0.2.77 dst {} proto esp spi 0x{:x}", id.dst, id.spi);
            ip(&format!("xfrm state add {whose} {body}"));
            let before = ip("xfrm state");
            assert_same(&netlink.dump().expect("dump"), &Objects::new());
            let mut write = make();
            let refused = carry(&mut netlink, &mut write).expect_err("in the way");
            let WriteError::Foreign { found, remedy, .. } = &refused else {
                panic!("{refused:?}")
            };
            assert!(found.contains("reqid 7") && found.contains(&id.to_string()), "{found}");
            assert_eq!(write.secret.expect("never used").as_bytes(), keys.of(id.spi).as_bytes());
            assert_eq!(ip("xfrm state"), before);
            ip(remedy.strip_prefix("ip ").expect("a command of ip"));
        }

        let mut unknown = object.clone();
        let Object::Sa { sa, .. } = &mut unknown else {
            panic!("an SA")
        };
        sa.algorithm.name = "rfc4106(gcm(none))".into();
        let mut write = Write {
            op: Op::Make(key.clone(), unknown),
            secret: Some(keys.of(id.spi)),
        };
        let refused = carry(&mut netlink, &mut write).expect_err("no such cipher");
        assert!(chain(&refused).contains("ENOSYS"), "{}", chain(&refused));
        assert!(write.secret.is_some());
        assert!(!format!("{refused:?}").contains("0001"), "no key in a message");

        let bare = one(&mut netlink, Op::Make(key.clone(), object.clone())).expect_err("without a key");
        assert!(matches!(bare, WriteError::Failed { .. }));
        let mut wrong = Write {
            op: Op::Make(key.clone(), object.clone()),
            secret: Some(keys.of(id.spi + 1)),
        };
        carry(&mut netlink, &mut wrong).expect_err("another SA's key");
        assert_eq!(ip("xfrm state"), "");
    });
}

#[test]
#[ignore = "needs root and a kernel with ESP"]
fn what_others_do_to_sas_is_told_and_what_we_do_is_not() {
    in_namespace(|| {
        let (runtime, mut netlink, keys) = (runtime(), open(), Keys::new());
        let entered = runtime.enter();
        let mut events = netlink.events().expect("events");
        let desired = whole_peer(2, 1);
        let sas = peer_sas(2, 1);
        let node = node();
        must(&mut netlink, make(&node), &keys);
        must(&mut netlink, make(&desired), &keys);
        must(
            &mut netlink,
            sas.iter().map(|(k, o)| Op::Change(k.clone(), o.clone())).collect(),
            &keys,
        );
        must(&mut netlink, breaks(&sas), &keys);
        must(&mut netlink, make(&sas), &keys);
        netlink.preflight(keys::Cipher::Aes128Gcm16, &own_bases()).expect("ESP");
        assert_eq!(events.ready(), []);

        let (key, _) = sas.first_key_value().expect("an SA");
        let Key::Sa(id) = key else { panic!("{key}") };
        ip(&format!(
            "xfrm state delete dst {} proto esp spi 0x{:x}",
            id.dst, id.spi
        ));
        assert_eq!(events.ready(), [Event::Gone(key.clone())]);

        // One with our mark that nobody wants, and one of another program.
        ip(&format!(
            "xfrm state add src 192.0.2.1 dst 192.0.2.5 proto esp spi 0x5041 reqid 1379926018 mode tunnel aead rfc4106(gcm(aes)) {KEY} 128"
        ));
        assert!(matches!(
            &events.ready()[..],
            [Event::Observed(Key::Sa(_), Object::Sa { born: None, .. })]
        ));
        ip(&format!(
            "xfrm state add src 192.0.2.1 dst 192.0.2.5 proto esp spi 0x99 reqid 7 mode tunnel aead rfc4106(gcm(aes)) {KEY} 128"
        ));
        ip("xfrm state delete dst 192.0.2.5 proto esp spi 0x99");
        assert_eq!(events.ready(), []);

        ip("xfrm state flush");
        assert_eq!(events.ready(), [Event::AllGone(Kind::Sa)]);
        ip("xfrm policy flush");
        assert_eq!(
            events.ready(),
            [Event::AllGone(Kind::Policy), Event::AllGone(Kind::Guard)]
        );
        drop(entered);
    });
}

/// A second machine: a thread in a network namespace of its own, at the other end of a veth.
fn with_peer(here: &str, there: &str, work: impl FnOnce() + Send + 'static, after: impl FnOnce()) {
    let (tell, hear) = mpsc::channel();
    let (go, wait) = mpsc::channel::<()>();
    let there = there.to_owned();
    ip("link add up0 type veth peer name up1");
    let peer = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).expect("root makes a network namespace");
        tell.send(nix::unistd::gettid()).expect("heard");
        wait.recv().expect("told to go");
        ip(&format!("address add {there} dev up1"));
        ip("link set lo up");
        ip("link set up1 up");
        work();
    });
    ip(&format!("link set up1 netns {}", hear.recv().expect("its id")));
    ip(&format!("address add {here} dev up0"));
    ip("link set up0 up");
    go.send(()).expect("heard");
    peer.join().expect("the peer's work");
    after();
}

/// Waits up to two seconds for events.
fn await_events(runtime: &tokio::runtime::Runtime, events: &mut Events) -> Vec<Event> {
    let told = runtime.block_on(async { tokio::time::timeout(Duration::from_secs(2), events.next()).await });
    told.expect("told in time")
}

#[test]
#[ignore = "needs root and a kernel with ESP"]
fn limits_counters_and_a_moved_peer_are_told() {
    in_namespace(|| {
        let (runtime, mut netlink, keys) = (runtime(), open(), Keys::new());
        let mut events = {
            let _entered = runtime.enter();
            netlink.events().expect("events")
        };
        // The receiving side, with ESP in UDP; the peer in slot 3 sends from a port that the SA does not say.
        let sas = peer_sas(3, 1);
        let (key, object) = sas
            .iter()
            .find(|(key, _)| matches!(key, Key::Sa(id) if id.dst == addr("192.0.2.1")))
            .expect("it");
        let Key::Sa(id) = *key else { panic!("{key}") };
        must(&mut netlink, vec![Op::Make(key.clone(), object.clone())], &keys);
        let policies = peer_without_sas(3)
            .into_iter()
            .filter(|(key, _)| key.kind() == Kind::Policy);
        must(&mut netlink, make(&policies.collect()), &keys);
        let socket = crate::kernel::encap::Encap::open("0.0.0.0:4500".parse().expect("address")).expect("ESP in UDP");
        let Object::Sa { sa, .. } = object.clone() else {
            panic!("an SA")
        };
        let secret: String = keys
            .of(sa.spi)
            .as_bytes()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let state = format!(
            "xfrm state add src {} dst {} proto esp spi 0x{:x} reqid 9 mode tunnel flag esn af-unspec replay-window 1024 \
             aead rfc4106(gcm(aes)) 0x{secret} 128 encap espinudp 4999 4500 0.0.0.0 limit packet-soft 5 limit packet-hard 8",
            sa.src, sa.dst, sa.spi
        );
        let policy = format!(
            "xfrm policy add dir out src 0.0.0.0/0 dst 192.0.2.0/24 proto udp dport 9 tmpl src {} dst {} proto esp reqid 9 mode tunnel",
            sa.src, sa.dst
        );
        let source = format!("{}/15", peer_address(3));
        with_peer(
            "192.0.2.1/24",
            &source,
            move || {
                ip("address add 10.244.3.7/32 dev lo");
                ip("route add 192.0.2.0/24 dev up1");
                ip(&state);
                ip(&policy);
                let sender = UdpSocket::bind("10.244.3.7:0").expect("bind");
                for _ in 0..3 {
                    sender.send_to(b"0123456789", "192.0.2.1:9").expect("sent");
                    std::thread::sleep(Duration::from_millis(50));
                }
            },
            || {},
        );
        let told = await_events(&runtime, &mut events);
        let moved = Event::Moved {
            id,
            source: (peer_address(3), 4999).into(),
        };
        assert!(told.contains(&moved), "{told:?}");
        drop(socket);
        let counters = netlink.counters().expect("counters");
        let ours = counters[&id];
        assert_eq!(
            (ours.packets, ours.bytes, ours.errors),
            (3, 3 * 38, 0),
            "inner packets of 20 + 8 + 10 bytes"
        );
        assert!(ours.made > 1_600_000_000 && ours.used >= ours.made);
        assert_eq!(counters.len(), 1);
    });
}

#[test]
#[ignore = "needs root and a kernel with ESP"]
fn a_soft_limit_is_told_and_a_hard_one_is_the_end() {
    in_namespace(|| {
        let (runtime, mut netlink, keys) = (runtime(), open(), Keys::new());
        let mut events = {
            let _entered = runtime.enter();
            netlink.events().expect("events")
        };
        let mut desired = node();
        desired.extend(peer_without_sas(2));
        let mut sas = peer_sas(2, 1);
        sas.retain(|key, _| matches!(key, Key::Sa(id) if id.dst == peer_address(2)));
        for object in sas.values_mut() {
            let Object::Sa { sa, .. } = object else { panic!("an SA") };
            sa.limits = Limits {
                soft_packets: 3,
                hard_packets: 6,
                ..Limits::default()
            };
        }
        desired.extend(sas.clone());
        ip("link add up0 type veth peer name up1");
        ip("address add 192.0.2.1/24 dev up0");
        ip("link set up0 up");
        ip("link set up1 up");
        ip("route add default dev up0");
        must(&mut netlink, make(&desired), &keys);
        let (key, _) = sas.first_key_value().expect("an SA");
        let Key::Sa(id) = *key else { panic!("{key}") };
        let socket = UdpSocket::bind("10.244.1.0:0").expect("bind");
        let mut told = Vec::new();
        for _ in 0..8 {
            let _ = socket.send_to(b"x", "10.244.2.2:9");
        }
        // The kernel's timer removes it and tells.
        while !told.contains(&Event::Gone(key.clone())) {
            told.extend(await_events(&runtime, &mut events));
        }
        assert_eq!(
            told.iter().filter(|event| **event == Event::SoftLimit(id)).count(),
            1,
            "{told:?}"
        );
        assert_eq!(told.last(), Some(&Event::Gone(key.clone())), "{told:?}");
        assert!(!netlink.dump().expect("dump").contains_key(key));
    });
}

#[test]
#[ignore = "needs root and a kernel with ESP"]
fn an_sa_that_an_acquire_has_begun_is_filled_in() {
    in_namespace(|| {
        let (mut netlink, keys) = (open(), Keys::new());
        let mut desired = node();
        desired.extend(peer_without_sas(2));
        ip("link add up0 type veth peer name up1");
        ip("address add 192.0.2.1/24 dev up0");
        ip("link set up0 up");
        ip("link set up1 up");
        ip("route add default dev up0");
        must(&mut netlink, make(&desired), &keys);
        let listener = xfrm::Monitor::open(Protocol::Xfrm, &[1]).expect("as an IKE daemon listens for acquires");
        let socket = UdpSocket::bind("10.244.1.0:0").expect("bind");
        let _ = socket.send_to(b"x", "10.244.2.2:9");
        let mut sas = peer_sas(2, 1);
        sas.retain(|key, _| matches!(key, Key::Sa(id) if id.dst == peer_address(2)));
        let (Key::Sa(id), _) = sas.first_key_value().expect("an SA") else {
            panic!("an SA")
        };
        assert!(
            ip("xfrm state").contains(&format!("spi 0x{:08x}", id.spi)),
            "a larval one"
        );
        assert_same(&netlink.dump().expect("dump"), &desired);
        must(&mut netlink, make(&sas), &keys);
        desired.extend(sas.clone());
        assert_same(&netlink.dump().expect("dump"), &as_dumped(&desired));
        let secret: String = keys
            .of(id.spi)
            .as_bytes()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        assert!(ip("xfrm state").contains(&secret), "with its key");
        drop(listener);
    });
}

#[test]
#[ignore = "needs root and a kernel with ESP"]
fn the_mtu_is_what_the_kernel_says() {
    for cipher in keys::Cipher::ALL {
        for (v6, encap) in [(false, false), (false, true), (true, false), (true, true)] {
            in_namespace(move || the_kernel_says(cipher, v6, encap));
        }
    }
}

fn the_kernel_says(cipher: keys::Cipher, v6: bool, encap: bool) {
    let (mut netlink, keys) = (open(), Keys::new());
    let (own, public) = if v6 {
        ("2001:db8::1", "2001:db8:1::2")
    } else {
        ("192.0.2.1", "198.18.0.2")
    };
    ip("link add up0 type veth peer name up1");
    ip("link set up0 up");
    ip("link set up1 up");
    ip(&format!("address add {own} dev up0 {}", if v6 { "nodad" } else { "" }));
    ip(&format!("route add {public} dev up0"));
    let mut desired = node();
    desired.extend(peer_without_sas(2));
    desired.insert(Key::Link(LINK.into()), link(9000));
    desired.retain(|key, _| !matches!(key, Key::Guard(..) | Key::GuardRoute(_)));
    let mut policies = desired.clone();
    policies.retain(|key, _| key.to_string().contains("out src 0.0.0.0"));
    let (id, object) = policies.pop_first().expect("the policy out");
    desired.retain(|key, _| !matches!(key, Key::Policy(_)));
    let Object::Policy(mut policy) = object else {
        panic!("a policy")
    };
    let (_, object) = peer_sas(2, 1)
        .into_iter()
        .find(|(k, _)| matches!(k, Key::Sa(id) if id.dst == peer_address(2)))
        .expect("out");
    let Object::Sa { mut sa, born } = object else {
        panic!("an SA")
    };
    (sa.src, sa.dst, sa.algorithm) = (addr(own), addr(public), aead(cipher));
    sa.encap = encap.then_some(xfrm::Encap {
        sport: 4500,
        dport: 4500,
    });
    policy.template = Some(Template {
        src: sa.src,
        dst: sa.dst,
        spi: sa.spi,
        reqid: sa.reqid,
        optional: false,
    });
    desired.insert(id, Object::Policy(policy));
    for object in desired.values_mut() {
        if let Object::Route(route) = object {
            route.mtu = None;
        }
    }
    must(&mut netlink, make(&desired), &keys);
    let secret = Some(keys.0.key(cipher, keys::Spi(sa.spi)));
    let op = Op::Make(Key::Sa(sa.id()), Object::Sa { sa, born });
    carry(&mut netlink, &mut Write { op, secret }).expect("made");
    // Each remainder of the padding.
    for outer in 1400..1404 {
        ip(&format!("link set up0 mtu {outer}"));
        let socket = UdpSocket::bind("10.244.1.0:0").expect("bind");
        socket.connect("10.244.2.9:9").expect("a way");
        let says = getsockopt(&socket.as_fd(), sockopt::IpMtu).expect("the kernel says");
        assert_eq!(
            inner_mtu(outer, cipher, v6, encap),
            u32::try_from(says).ok(),
            "{cipher} v6 {v6} encap {encap} {outer}"
        );
    }
}

#[test]
#[ignore = "needs root and a kernel with ESP"]
fn a_thousand_peers_are_written_read_and_removed() {
    in_namespace(|| {
        let (mut netlink, keys) = (open(), Keys::new());
        let mut desired = node();
        for slot in 2..1002 {
            desired.extend(whole_peer(slot, 1));
        }
        let ops = order(make(&desired).into_iter().map(|op| (Scope::Node, op)).collect());
        let writes: Vec<Write> = ops.into_iter().map(|(_, op)| keys.write(op)).collect();
        let mut runs: Vec<(Kind, Vec<Write>)> = Vec::new();
        for write in writes {
            let kind = write.op.key().kind();
            match runs.last_mut() {
                Some((last, run)) if *last == kind => run.push(write),
                _ => runs.push((kind, vec![write])),
            }
        }
        let begun = Instant::now();
        for (kind, mut run) in runs {
            let (count, begun) = (run.len(), Instant::now());
            assert!(netlink.apply(kind, &mut run).iter().all(Result::is_ok), "{kind:?}");
            println!("make {count} {kind:?}: {:?}", begun.elapsed());
        }
        println!("make {} objects of 1,000 peers: {:?}", desired.len(), begun.elapsed());
        let begun = Instant::now();
        let shown = netlink.dump().expect("dump");
        println!("dump: {:?}", begun.elapsed());
        assert_same(&shown, &as_dumped(&desired));
        let begun = Instant::now();
        assert_eq!(netlink.counters().expect("counters").len(), 2000);
        println!("counters: {:?}", begun.elapsed());
        let begun = Instant::now();
        must(&mut netlink, breaks(&desired), &keys);
        println!("break: {:?}", begun.elapsed());
        assert_same(&netlink.dump().expect("dump"), &Objects::new());
    });
}

#[test]
#[ignore = "needs root"]
fn the_preflight_says_what_is_missing() {
    in_namespace(|| {
        let mut netlink = open();
        match netlink.preflight(keys::Cipher::ChaCha20Poly1305, &own_bases()) {
            Ok(_) => {}
            Err(PreflightError::Kernel {
                cipher,
                family,
                modules,
                source,
            }) => {
                assert_eq!((cipher, family), (keys::Cipher::ChaCha20Poly1305, "IPv4"));
                assert!(modules.starts_with("esp4 xfrm_user chacha20poly1305"), "{modules}");
                assert!(source.to_string().contains('('), "the kernel's words: {source}");
            }
            Err(other) => panic!("{other}"),
        }
    });
}

#[test]
#[ignore = "needs root"]
fn without_the_capability_the_preflight_says_so() {
    const MARK: &str = "RINGMAIL_TEST_POWERLESS";
    if std::env::var_os(MARK).is_none() {
        // Root without CAP_NET_ADMIN, in a process of its own: this test once more.
        let program = std::env::current_exe().expect("this program");
        let mut powerless = Command::new("setpriv");
        powerless
            .args(["--bounding-set=-net_admin", "--inh-caps=-net_admin"])
            .arg(program)
            .env(MARK, "1");
        let name = "kernel::netlink::tests::esp::without_the_capability_the_preflight_says_so";
        let output = powerless
            .args(["--ignored", "--exact", name])
            .output()
            .expect("setpriv is installed");
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && said.contains("1 passed"), "{said}");
        return;
    }
    let refused =
        super::super::preflight::attempt(&mut Xfrm::open().expect("a socket"), keys::Cipher::Aes128Gcm16, false);
    assert!(matches!(refused, Err(PreflightError::Capability)), "{refused:?}");
}
