//! The udp backend's packet path in a real kernel: two nodes in namespaces of their own, real devices, real TCP.
//!
//! They need root, TUN and veth but no ESP, and so run in the machine's own kernel (`tests/run ignored`).

mod lab;
#[path = "../namespace/mod.rs"]
mod namespace;
mod plain;

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::thread;
use std::time::{Duration, Instant};

use lab::{Lab, Outer, PORT, eventually, state, transfer};
use plain::Plain;
use ringmail::tunnel::{Features, Offload, Routes, State, Tunnel, TunnelError, device};

const MIB: usize = 1 << 20;

/// All that this kernel has is in use: without it the tests of the fast path would show the slow one.
fn assert_fast(tunnel: &Tunnel) {
    let offloads = tunnel.counters().offloads;
    assert_eq!(offloads.vnet_header, Offload::On);
    assert_eq!(offloads.tcp_coalescing, Offload::On);
    assert_eq!(offloads.udp_segment, Offload::On);
    assert_eq!(offloads.udp_gro, Offload::On);
}

#[test]
#[ignore = "needs root and a kernel with TUN"]
fn tunnel_answers_pings_of_both_families_inside_and_outside_two_hops_on() {
    let lab = Lab::new();
    let (one, two) = lab.start(|_| {});
    for outer in [Outer::V4, Outer::V6] {
        one.set_routes(lab.one.routes(outer));
        two.set_routes(lab.two.routes(outer));
        for (from, to) in [(&lab.one, &lab.two), (&lab.two, &lab.one)] {
            assert!(
                from.must_ping(to.v4(), "-t 64").contains("ttl=62"),
                "flannel takes one hop at each end"
            );
            assert!(from.must_ping(to.v6(), "-t 64").contains("ttl=62"));
        }
    }
    assert!(one.counters().sent_packets >= 8 && one.counters().received_packets >= 8);
}

#[test]
#[ignore = "needs root and a kernel with TUN"]
fn tunnel_carries_64_mib_unharmed_each_way_in_large_packets() {
    let lab = Lab::new();
    let (one, two) = lab.start(|_| {});
    assert_fast(&one);
    transfer(&lab.one, &lab.two, lab.two.v4(), 64 * MIB);
    transfer(&lab.two, &lab.one, lab.one.v4(), 64 * MIB);
    let (one, two) = (one.counters(), two.counters());
    // Acknowledgements are among them, one packet each.
    assert!(one.sent_packets / one.sent_messages >= 4, "{one:?}");
    assert!(two.received_packets / two.device_writes >= 4, "{two:?}");
    assert_eq!(
        two.dropped.received_malformed + two.dropped.device + one.dropped.malformed,
        0,
        "{one:?} {two:?}"
    );
}

#[test]
#[ignore = "needs root and a kernel with TUN"]
fn tunnel_carries_ipv6_inside_and_outside() {
    let lab = Lab::new();
    let (one, two) = lab.start(|_| {});
    for outer in [Outer::V4, Outer::V6] {
        one.set_routes(lab.one.routes(outer));
        two.set_routes(lab.two.routes(outer));
        transfer(&lab.one, &lab.two, lab.two.v6(), 16 * MIB);
        transfer(&lab.two, &lab.one, lab.one.v4(), 16 * MIB);
    }
    let counters = two.counters();
    assert!(counters.received_packets / counters.device_writes >= 4, "{counters:?}");
}

#[test]
#[ignore = "needs root and a kernel with TUN"]
fn tunnel_keeps_the_order_of_a_udp_flow_and_its_datagrams() {
    let lab = Lab::new();
    let (one, two) = lab.start(|_| {});
    for target in [lab.two.v4(), lab.two.v6()] {
        let receiver = lab
            .two
            .namespace
            .run(|| UdpSocket::bind((target, 0)).expect("a socket"));
        nix::sys::socket::setsockopt(&receiver, nix::sys::socket::sockopt::RcvBufForce, &(16 << 20)).expect("room");
        receiver
            .set_read_timeout(Some(Duration::from_millis(500)))
            .expect("a timeout");
        let address = receiver.local_addr().expect("an address");
        let sender = lab.one.namespace.run(|| {
            let any: SocketAddr = if target.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" }
                .parse()
                .expect("an address");
            UdpSocket::bind(any).expect("a socket")
        });
        const COUNT: u32 = 100_000;
        // Runs of one size, as a stream has, and lengths that change.
        let length = |number: u32| {
            if number % 100 < 80 {
                1000
            } else {
                20 + (number * 7 % 1300) as usize
            }
        };
        let sending = thread::spawn(move || {
            let mut datagram = vec![0; 2000];
            for number in 0..COUNT {
                let part = &mut datagram[..length(number)];
                part.fill(number as u8);
                part[..4].copy_from_slice(&number.to_be_bytes());
                sender.send_to(part, address).expect("a datagram goes out");
                if number % 64 == 0 {
                    thread::sleep(Duration::from_millis(1));
                }
            }
        });
        let (mut got, mut last) = (0, None);
        let mut datagram = vec![0; 2000];
        while let Ok(bytes) = receiver.recv(&mut datagram) {
            let number = u32::from_be_bytes([datagram[0], datagram[1], datagram[2], datagram[3]]);
            assert!(last.is_none_or(|last| number > last), "{number} after {last:?}");
            assert_eq!(bytes, length(number));
            assert!(datagram[4..bytes].iter().all(|byte| *byte == number as u8));
            last = Some(number);
            got += 1;
        }
        sending.join().expect("the sender");
        assert!(
            got > COUNT / 2,
            "{got} of {COUNT}: {:?} {:?}",
            one.counters(),
            two.counters()
        );
    }
}

#[test]
#[ignore = "needs root and a kernel with TUN"]
fn tunnel_splits_udp_that_the_sender_left_to_segment() {
    let lab = Lab::new();
    let (one, _two) = lab.start(|_| {});
    if one.counters().offloads.udp_split != Offload::On {
        panic!("this kernel does not segment UDP: {:?}", one.counters().offloads);
    }
    for target in [lab.two.v4(), lab.two.v6()] {
        let receiver = lab
            .two
            .namespace
            .run(|| UdpSocket::bind((target, 0)).expect("a socket"));
        receiver
            .set_read_timeout(Some(Duration::from_secs(2)))
            .expect("a timeout");
        let address = receiver.local_addr().expect("an address");
        let sender = lab.one.namespace.run(|| {
            let any = if target.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            UdpSocket::bind(any).expect("a socket")
        });
        let size = 1001i32;
        // SAFETY: UDP_SEGMENT (103) takes an int.
        let code = unsafe { libc::setsockopt(sender.as_raw_fd(), libc::SOL_UDP, 103, (&raw const size).cast(), 4) };
        assert_eq!(code, 0);
        let data: Vec<u8> = (0..30_500u32).map(|at| (at * 31 / 7) as u8).collect();
        let before = one.counters();
        sender.send_to(&data, address).expect("a message goes out");
        let mut got: Vec<u8> = Vec::new();
        let mut datagram = vec![0; 2000];
        while got.len() < data.len() {
            let length = receiver.recv(&mut datagram).expect("all datagrams");
            assert_eq!(length, (data.len() - got.len()).min(1001));
            got.extend_from_slice(&datagram[..length]);
        }
        assert_eq!(got, data);
        eventually("all that arrived is counted as sent", || {
            one.counters().sent_packets - before.sent_packets >= 31
        });
        let after = one.counters();
        assert!(
            after.device_reads - before.device_reads < 10,
            "it was not the device that split it: {after:?}"
        );
    }
}

#[test]
#[ignore = "needs root and a kernel with TUN"]
fn tunnel_takes_packets_up_to_the_mtu_and_fragments_of_larger_ones() {
    let lab = Lab::new();
    let (_one, _two) = lab.start(|_| {});
    lab.one.must_ping(lab.two.v4(), &format!("-M do -s {}", 1452 - 28));
    lab.one.must_ping(lab.two.v6(), &format!("-M do -s {}", 1452 - 48));
    assert!(
        !lab.one.ping(lab.two.v4(), &format!("-M do -s {}", 1452 - 27)).0,
        "the device's MTU"
    );
    for target in [lab.two.v4(), lab.two.v6()] {
        lab.one.must_ping(target, "-s 8000");
        lab.one.must_ping(target, "-s 1");
    }
}

#[test]
#[ignore = "needs root and a kernel with TUN"]
fn tunnel_drops_strangers_and_a_source_in_another_nodes_subnet_and_counts_them() {
    let lab = Lab::new();
    let (one, two) = lab.start(|_| {});
    lab.one.namespace.command("ip address add 192.0.2.77/24 dev eth0");
    let target = SocketAddr::new(lab.two.public(Outer::V4), PORT);
    let inbox = lab
        .two
        .namespace
        .run(|| UdpSocket::bind((lab.two.v4(), 9)).expect("a socket"));
    inbox
        .set_read_timeout(Some(Duration::from_millis(200)))
        .expect("a timeout");
    let send = |from: &str, source: [u8; 4]| {
        let socket = lab.one.namespace.run(|| UdpSocket::bind((from, 0)).expect("a socket"));
        socket
            .send_to(&datagram(source, [10, 244, 2, 0]), target)
            .expect("a datagram goes out");
        let mut text = [0; 100];
        inbox.recv(&mut text).is_ok()
    };
    // From any port, as flannel's proxy.
    assert!(send("192.0.2.1", [10, 244, 1, 5]), "a peer's pod");
    // Not in anyone's subnet: a node that does not masquerade, a Service's client.
    two.set_routes(
        Routes::new([
            (
                "10.244.1.0/24".parse().expect("a net"),
                SocketAddr::new(lab.one.public(Outer::V4), PORT),
            ),
            (
                "10.244.9.0/24".parse().expect("a net"),
                "192.0.2.9:8285".parse().expect("an address"),
            ),
        ])
        .with_own(["10.244.2.0/24".parse().expect("a net")]),
    );
    lab.two
        .namespace
        .command("sysctl -qw net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.flannel0.rp_filter=0");
    assert!(send("192.0.2.1", [192, 0, 2, 200]), "the source of a Service's client");
    let before = two.counters().dropped;
    assert!(!send("192.0.2.77", [10, 244, 1, 5]), "an address without a lease");
    assert!(!send("192.0.2.1", [10, 244, 9, 5]), "another peer's pod");
    assert!(!send("192.0.2.1", [10, 244, 2, 5]), "this node's own pod");
    let after = two.counters().dropped;
    assert_eq!(after.no_lease - before.no_lease, 1);
    assert_eq!(after.foreign_source - before.foreign_source, 2);
    // No packets at all.
    let socket = lab
        .one
        .namespace
        .run(|| UdpSocket::bind(("192.0.2.1", 0)).expect("a socket"));
    for bytes in [
        &[][..],
        &[0x45],
        &[0x45; 19],
        &[0x45; 400],
        &[0x60; 39],
        &[0; 1400],
        &[0xff; 30],
    ] {
        socket.send_to(bytes, target).expect("a datagram goes out");
    }
    eventually("all are counted", || two.counters().dropped.received_malformed == 7);
    lab.one.must_ping(lab.two.v4(), "");
    two.set_routes(Routes::default());
    assert!(!send("192.0.2.1", [10, 244, 1, 5]), "a peer that has no lease any more");
    assert_eq!(state(&two), State::Running);
    drop(one);
}

/// A UDP datagram to the discard port, without a checksum of its own.
fn datagram(source: [u8; 4], target: [u8; 4]) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 32, 0, 1, 0x40, 0, 64, 17, 0, 0];
    packet.extend(source);
    packet.extend(target);
    let sum: u32 = packet
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    packet[10..12].copy_from_slice(&(!((sum & 0xffff) + (sum >> 16)) as u16).to_be_bytes());
    packet.extend([0, 9, 0, 9, 0, 12, 0, 0, b't', b'e', b's', b't']);
    packet
}

#[test]
#[ignore = "needs root and a kernel with TUN"]
fn tunnel_speaks_with_a_plain_peer_of_flannels_format_both_ways() {
    let lab = Lab::bare();
    lab.one.namespace.run(|| device::make("flannel0").expect("a TUN"));
    lab.one.address();
    let plain = Plain::start(&lab.two, &lab.one);
    let tunnel = lab.one.start(|_| {});
    assert!(lab.one.must_ping(lab.two.v4(), "-t 64").contains("ttl=62"));
    assert!(lab.two.must_ping(lab.one.v4(), "-t 64").contains("ttl=62"));
    lab.one.must_ping(lab.two.v6(), "-s 1400");
    lab.two.must_ping(lab.one.v4(), "-s 8000");
    transfer(&lab.one, &lab.two, lab.two.v4(), 64 * MIB);
    transfer(&lab.two, &lab.one, lab.one.v4(), 64 * MIB);
    transfer(&lab.two, &lab.one, lab.one.v6(), 16 * MIB);
    assert_eq!(tunnel.counters().dropped.received_malformed, 0);
    drop(plain);
}

#[test]
#[ignore = "needs root and a kernel with TUN"]
fn tunnel_says_that_its_device_was_deleted_and_ends_in_peace() {
    let lab = Lab::new();
    let (one, _two) = lab.start(|config| config.workers = 2);
    lab.one.must_ping(lab.two.v4(), "");
    lab.one.namespace.command("ip link delete flannel0");
    eventually("the state says so", || state(&one) == State::DeviceGone);
    let begun = Instant::now();
    drop(one);
    assert!(begun.elapsed() < Duration::from_secs(1));
    let again = lab.one.namespace.run(|| Tunnel::start(config_without_device()));
    assert!(matches!(again, Err(TunnelError::Device { .. })), "{again:?}");
    lab.one.namespace.run(|| device::make("flannel0").expect("a TUN"));
    lab.one.address();
    let _one = lab.one.start(|_| {});
    lab.one.must_ping(lab.two.v4(), "");
}

fn config_without_device() -> ringmail::tunnel::Config {
    ringmail::tunnel::Config {
        device: "flannel0".to_owned(),
        mtu: 1452,
        local_v4: Some([192, 0, 2, 1].into()),
        local_v6: None,
        port: PORT,
        inner_v4: None,
        inner_v6: None,
        workers: 1,
        features: Features::default(),
    }
}

#[test]
#[ignore = "needs root and a kernel with TUN"]
fn tunnel_says_that_the_nodes_address_is_gone_idle_or_not() {
    for busy in [false, true] {
        let lab = Lab::new();
        let (one, _two) = lab.start(|config| config.local_v6 = None);
        lab.one.must_ping(lab.two.v4(), "");
        lab.one.namespace.command("ip address add 192.0.2.99/24 dev eth0");
        lab.one.namespace.command("ip address delete 192.0.2.1/24 dev eth0");
        lab.one.namespace.command("ip address replace 192.0.2.99/24 dev eth0");
        if busy {
            lab.one.ping(lab.two.v4(), "");
        }
        let gone = State::AddressGone(lab.one.public(Outer::V4));
        eventually("the state says so", || state(&one) == gone);
    }
    // An IPv6 address may be looked for a duplicate of, and is missing for a second or two then.
    let lab = Lab::new();
    let (one, _two) = lab.start(|_| {});
    lab.one.namespace.command("ip address delete 2001:db8::1/64 dev eth0");
    thread::sleep(Duration::from_millis(2300));
    assert_eq!(state(&one), State::Running);
    let gone = State::AddressGone(lab.one.public(Outer::V6));
    eventually("the state says so", || state(&one) == gone);
}

#[test]
#[ignore = "needs root and a kernel with TUN"]
fn tunnel_outlives_a_peer_that_vanishes_and_comes_back_and_its_own_restart_keeps_connections() {
    let lab = Lab::new();
    let (one, two) = lab.start(|_| {});
    lab.one.must_ping(lab.two.v4(), "");
    drop(two);
    for _ in 0..3 {
        // The kernel of the peer answers with port unreachable.
        assert!(
            !lab.one
                .namespace
                .try_command(&format!("ping -n -c 5 -i 0.05 -W 1 {}", lab.two.v4()))
                .0
        );
    }
    assert_eq!(state(&one), State::Running);
    let _two = lab.two.start(|_| {});
    lab.one.must_ping(lab.two.v4(), "");
    drop(one);
    let addresses = lab.one.namespace.command("ip address show dev flannel0");
    assert!(
        addresses.contains("10.244.1.0/32") && addresses.contains("qlen 1000"),
        "{addresses}"
    );
    assert!(
        lab.one
            .namespace
            .command("ip route show dev flannel0")
            .contains("10.244.0.0/16")
    );
    let _one = lab.one.start(|_| {});
    lab.one.must_ping(lab.two.v4(), "");
    transfer(&lab.two, &lab.one, lab.one.v4(), MIB);
}

/// `ETHTOOL_STXCSUM`, `ETHTOOL_SGSO`, `ETHTOOL_STSO` of linux/ethtool.h.
const OFFLOADS: [u32; 3] = [0x17, 0x24, 0x1f];

#[test]
#[ignore = "needs root and a kernel with TUN"]
fn tunnel_works_where_the_underlay_has_no_offloads() {
    let lab = Lab::new();
    let (one, two) = lab.start(|_| {});
    for offload in OFFLOADS {
        lab.one.ethtool_off(offload);
        lab.two.ethtool_off(offload);
        transfer(&lab.one, &lab.two, lab.two.v4(), 8 * MIB);
        transfer(&lab.two, &lab.one, lab.one.v6(), 8 * MIB);
    }
    assert_eq!(one.counters().dropped.send, 0, "{:?}", one.counters());
    assert_eq!(two.counters().dropped.received_malformed, 0);
}

#[test]
#[ignore = "needs root and a kernel with TUN"]
fn tunnel_sends_single_datagrams_where_the_paths_mtu_shrank_below_a_segment() {
    let lab = Lab::new();
    let (one, _two) = lab.start(|_| {});
    transfer(&lab.one, &lab.two, lab.two.v4(), MIB);
    for node in [&lab.one, &lab.two] {
        node.namespace.command("ip link set eth0 mtu 1300");
    }
    transfer(&lab.one, &lab.two, lab.two.v4(), 4 * MIB);
    let counters = one.counters();
    assert!(counters.segment_refusals > 0, "{counters:?}");
    assert!(
        matches!(&counters.offloads.udp_segment, Offload::Off(_)),
        "{counters:?}"
    );
    assert!(counters.segment_refusals < 10, "a refusal is remembered: {counters:?}");
}

#[test]
#[ignore = "needs root and a kernel with TUN"]
fn tunnel_answers_what_it_can_not_forward_as_a_router_does() {
    let lab = Lab::new();
    let (one, two) = lab.start(|config| config.mtu = 1300);
    let nowhere: IpAddr = "10.244.200.1".parse().expect("an address");
    let (_, text) = lab.one.ping(nowhere, "");
    assert!(
        text.contains("From 10.244.1.0") && text.contains("Net Unreachable"),
        "{text}"
    );
    let (_, text) = lab.one.ping("fd00:10:244:200::1".parse().expect("an address"), "");
    assert!(
        text.contains("From fd00:10:244:1::") && text.contains("No route"),
        "{text}"
    );
    for target in [lab.two.v4(), lab.two.v6()] {
        let (_, text) = lab.one.ping(target, "-t 1");
        assert!(
            text.contains("Time to live exceeded") || text.contains("Hop limit"),
            "{text}"
        );
        // One hop is left for the far end.
        let (_, text) = lab.one.ping(target, "-t 2");
        assert!(
            text.contains("From 10.244.2.0") || text.contains("From fd00:10:244:2::"),
            "{text}"
        );
        let (_, text) = lab.one.ping(target, "-M do -s 1350");
        assert!(text.contains("mtu = 1300") || text.contains("mtu=1300"), "{text}");
        // And who was told makes them smaller.
        lab.one.must_ping(target, "-M do -s 1200");
        transfer(&lab.one, &lab.two, target, 4 * MIB);
    }
    assert!(one.counters().icmp_sent >= 6, "{:?}", one.counters());
    assert!(one.counters().dropped.no_route >= 2 && one.counters().dropped.too_big >= 2);
    assert!(two.counters().dropped.ttl >= 2, "{:?}", two.counters());
    // A flood is not answered one by one.
    let before = one.counters().icmp_sent;
    let socket = lab
        .one
        .namespace
        .run(|| UdpSocket::bind("0.0.0.0:0").expect("a socket"));
    for _ in 0..2000 {
        drop(socket.send_to(b"x", (nowhere, 9)));
    }
    thread::sleep(Duration::from_millis(100));
    let told = one.counters().icmp_sent - before;
    assert!((1..=200).contains(&told), "{told}");
}

#[test]
#[ignore = "needs root and a kernel with TUN"]
fn tunnel_works_with_every_feature_off_and_with_each_off_at_one_end() {
    let all = Features::default();
    let none = Features {
        vnet_header: false,
        udp_segment: false,
        udp_gro: false,
        tcp_coalescing: false,
        udp_coalescing: false,
    };
    let each = [
        none,
        Features {
            vnet_header: false,
            ..all
        },
        Features {
            udp_segment: false,
            ..all
        },
        Features { udp_gro: false, ..all },
        Features {
            tcp_coalescing: false,
            ..all
        },
        Features {
            udp_coalescing: false,
            ..all
        },
    ];
    let lab = Lab::new();
    for features in each {
        let _one = lab.one.start(|config| config.features = features);
        let _two = lab.two.start(|_| {});
        lab.one.must_ping(lab.two.v4(), "");
        transfer(&lab.one, &lab.two, lab.two.v4(), 8 * MIB);
        transfer(&lab.two, &lab.one, lab.one.v6(), 8 * MIB);
    }
    let _both = lab.start(|config| config.features = none);
    transfer(&lab.one, &lab.two, lab.two.v4(), 8 * MIB);
}

#[test]
#[ignore = "needs root and a kernel with TUN"]
fn tunnel_with_several_workers_carries_several_streams() {
    let lab = Lab::new();
    let (one, two) = lab.start(|config| config.workers = 3);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| transfer(&lab.one, &lab.two, lab.two.v4(), 8 * MIB));
            scope.spawn(|| transfer(&lab.two, &lab.one, lab.one.v6(), 8 * MIB));
        }
    });
    assert_eq!((state(&one), state(&two)), (State::Running, State::Running));
}

#[test]
#[ignore = "needs root and a kernel with TUN"]
fn tunnel_devices_are_made_once_and_no_other_kind_is_taken() {
    let lab = Lab::bare();
    let ns = &lab.one.namespace;
    ns.run(|| device::make("flannel0").expect("a TUN"));
    let before = ns.command("ip -d link show flannel0");
    assert!(
        before.contains("persist on") && before.contains("qlen 1000") && before.contains("multi_queue"),
        "{before}"
    );
    ns.run(|| device::make("flannel0").expect("it is there"));
    assert_eq!(ns.command("ip -d link show flannel0"), before);
    ns.command("ip link add other type bridge");
    ns.command("ip tuntap add dev tap mode tap");
    ns.command("ip tuntap add dev single mode tun");
    for name in ["other", "tap", "eth0"] {
        let error = ns.run(|| device::make(name)).expect_err(name);
        assert_eq!(error.kind(), std::io::ErrorKind::AlreadyExists, "{name}");
    }
    for name in ["", "a-name-that-is-too-long", "tun%d"] {
        ns.run(|| device::make(name)).expect_err(name);
    }
    // One queue, without a header so far: it will do.
    ns.run(|| device::make("single").expect("it is there"));
    let tunnel = lab.one.start(|config| config.device = "single".to_owned());
    assert_eq!(tunnel.counters().offloads.vnet_header, Offload::On);
}

#[test]
#[ignore = "needs root and a kernel with TUN"]
fn tunnel_idle_costs_no_processor_time() {
    let lab = Lab::new();
    let (_one, _two) = lab.start(|_| {});
    lab.one.must_ping(lab.two.v4(), "");
    let spent = || -> u64 {
        let threads = std::fs::read_dir("/proc/self/task").expect("threads");
        let ticks = threads.flatten().filter_map(|thread| {
            let name = std::fs::read_to_string(thread.path().join("comm")).ok()?;
            let stat = std::fs::read_to_string(thread.path().join("stat")).ok()?;
            let fields: Vec<&str> = stat.rsplit(") ").next()?.split(' ').collect();
            let ticks: u64 = fields[11].parse::<u64>().ok()? + fields[12].parse::<u64>().ok()?;
            name.starts_with("tunnel-").then_some(ticks)
        });
        ticks.sum()
    };
    let before = spent();
    thread::sleep(Duration::from_secs(3));
    // Hundredths of a second.
    assert!(spent() - before <= 3, "{}", spent() - before);
}
