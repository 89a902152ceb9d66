//! Notifications, and what a used SA counts.

use std::{
    net::UdpSocket,
    os::fd::AsRawFd,
    sync::mpsc,
    thread::{self, sleep},
    time::Duration,
};

use nix::libc;
use xfrm::{Batch, Direction, Encap, Error, Event, Events, Limits, Notification, Sa, Xfrm};

use crate::{REQID, add, block, events, ip, key, own_namespace, policy, sa, sas, set};

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
                ..crate::sa(0x1000)
            },
        );
        set(&mut xfrm, &[policy(Direction::Out, "0.0.0.0/0", "10.4.2.0/24", 0x1000)]);
        send(1);
        sleep(Duration::from_secs(2));
        xfrm.get_sa(&crate::sa(0x1000).id()).unwrap().unwrap().packets
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
