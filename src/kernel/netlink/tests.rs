//! Against the kernel itself: each test in a network namespace of its own, with `ip` as the other hand.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::process::Command;

use ipnet::{Ipv4Net, Ipv6Net};
use nix::sched::{CloneFlags, unshare};
use xfrm::{Action, Direction, Limits, Policy, PolicyId, Sa, SaDirection, Selector, Template};

use super::link::Sink;
use super::preflight::aead;
use super::*;
use crate::epochs::Generation;
use crate::kernel::device::{Device, DeviceKind};
use crate::kernel::{Event, Guard, Scope, order, priority, reqid};
use crate::lease::Addresses;

mod drift;
mod echo;
mod esp;
mod route_link_policy;

/// Runs a test in a new network namespace, which ends with its thread.
fn in_namespace(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("root makes a network namespace");
        ip("link set lo up");
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Runs `ip` with these arguments in the calling thread's namespace.
fn ip(arguments: &str) -> String {
    let output = Command::new("ip")
        .args(arguments.split_whitespace())
        .output()
        .expect("iproute2 is installed");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {arguments}: {said}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn open() -> Netlink {
    Netlink::open(&Options { prefer_nft: true }).expect("open")
}

/// A tokio runtime on this thread, as the daemon's.
fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("runtime")
}

fn net(text: &str) -> IpNet {
    text.parse().expect("a net")
}

fn addr(text: &str) -> std::net::IpAddr {
    text.parse().expect("an address")
}

use ipnet::IpNet;

fn own_bases() -> Addresses {
    Addresses {
        v4: Some(Ipv4Addr::new(10, 244, 1, 0)),
        v6: Some("fd00:244:0:1::".parse().expect("address")),
    }
}

fn link(mtu: u32) -> Object {
    Object::Link(Box::new(Device::new(DeviceKind::Sink, mtu)))
}

fn down(mtu: u32) -> Object {
    Object::Link(Box::new(Device {
        up: false,
        ..Device::new(DeviceKind::Sink, mtu)
    }))
}

/// The node's objects: guard, device, addresses.
fn node() -> Objects {
    let mut objects = Objects::new();
    for (whole, own) in [
        ("10.244.0.0/16", "10.244.1.0/24"),
        ("fd00:244::/48", "fd00:244:0:1::/64"),
    ] {
        objects.insert(Key::GuardRoute(net(whole)), Object::Unreachable);
        for direction in [Direction::In, Direction::Fwd, Direction::Out] {
            for (guard, src, dst, action) in [
                (Guard::Local, own, own, Action::Allow),
                (
                    Guard::Block,
                    if own.contains(':') { "::/0" } else { "0.0.0.0/0" },
                    whole,
                    Action::Block,
                ),
            ] {
                let id = PolicyId {
                    direction,
                    selector: Selector::between(net(src), net(dst)),
                };
                let policy = Policy {
                    id,
                    priority: guard.priority(),
                    action,
                    template: None,
                };
                objects.insert(Key::Guard(guard, id), Object::Policy(Box::new(policy)));
            }
        }
    }
    objects.insert(Key::Link(LINK.into()), link(1446));
    for base in own_bases().iter() {
        objects.insert(Key::Address(LINK.into(), base), Object::Address);
    }
    objects
}

/// A peer's subnets: 10.244.`n`.0/24 and beyond (slot `n`), and the IPv6 one.
fn subnets(slot: u32) -> [IpNet; 2] {
    let v4 = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 244, 0, 0)) + (slot << 8));
    let v6 = Ipv6Addr::from((0xfd00_0244_0000_u128 << 80) + (u128::from(slot) << 64));
    [
        Ipv4Net::new(v4, 24).expect("net").into(),
        Ipv6Net::new(v6, 64).expect("net").into(),
    ]
}

/// What the peer in this slot needs without its SAs: policies and routes, both families inside.
fn peer_without_sas(slot: u32) -> Objects {
    let (own, public) = (addr("192.0.2.1"), peer_address(slot));
    let mark = reqid(keys::Slot::new(slot).expect("slot"));
    let spi = keys::Spi::new(keys::Slot::new(1).expect("slot"), keys::Epoch(1), keys::Epoch(1)).0;
    let mut objects = Objects::new();
    for (subnet, base) in subnets(slot).into_iter().zip(own_bases().iter()) {
        let any = net(if base.is_ipv4() { "0.0.0.0/0" } else { "::/0" });
        let tunnels = [
            (
                Direction::In,
                Selector::between(subnet, any),
                Template {
                    src: public,
                    dst: own,
                    spi: 0,
                    reqid: mark,
                    optional: false,
                },
            ),
            (
                Direction::Fwd,
                Selector::between(subnet, any),
                Template {
                    src: public,
                    dst: own,
                    spi: 0,
                    reqid: mark,
                    optional: false,
                },
            ),
            (
                Direction::Out,
                Selector::between(any, subnet),
                Template {
                    src: own,
                    dst: public,
                    spi,
                    reqid: mark,
                    optional: false,
                },
            ),
        ];
        for (direction, selector, template) in tunnels {
            let id = PolicyId { direction, selector };
            let (priority, template) = (priority::PEER, Some(template));
            let policy = Policy {
                id,
                priority,
                action: Action::Allow,
                template,
            };
            objects.insert(Key::Policy(id), Object::Policy(Box::new(policy)));
        }
        let mtu = base.is_ipv4().then_some(1400);
        objects.insert(
            Key::Route(subnet),
            Object::Route(Box::new(crate::kernel::Route {
                link: LINK.into(),
                via: None,
                source: Some(base),
                mtu,
            })),
        );
    }
    objects
}

/// The SAs of one generation with the peer in this slot, in and out.
fn peer_sas(slot: u32, epoch: u64) -> Objects {
    let (own, public) = (addr("192.0.2.1"), peer_address(slot));
    let (us, peer) = (keys::Slot::new(1).expect("slot"), keys::Slot::new(slot).expect("slot"));
    let sides = [
        (SaDirection::Out, us, own, public),
        (SaDirection::In, peer, public, own),
    ];
    let sas = sides.map(|(direction, sender, src, dst)| Sa {
        src,
        dst,
        spi: keys::Spi::new(sender, keys::Epoch(epoch), keys::Epoch(epoch)).0,
        reqid: reqid(peer),
        algorithm: aead(keys::Cipher::Aes128Gcm16),
        encap: (slot % 2 == 1).then_some(xfrm::Encap {
            sport: 4500,
            dport: 4500,
        }),
        // As the kernels of the tests have it; with directions, an outbound SA has none.
        replay_window: if direction == SaDirection::Out && has_direction() {
            0
        } else {
            1024
        },
        esn: true,
        direction: has_direction().then_some(direction),
        limits: Limits {
            soft_packets: 1 << 33,
            hard_packets: 1 << 34,
            ..Limits::default()
        },
        af_unspec: true,
    });
    let born = Generation {
        sender: keys::Epoch(epoch),
        receiver: keys::Epoch(epoch),
    };
    let object = |sa: Sa| {
        (
            Key::Sa(sa.id()),
            Object::Sa {
                sa: Box::new(sa),
                born: Some(born),
            },
        )
    };
    sas.into_iter().map(object).collect()
}

fn has_direction() -> bool {
    Xfrm::open()
        .and_then(|mut xfrm| xfrm.knows_direction())
        .expect("an answer")
}

fn peer_address(slot: u32) -> std::net::IpAddr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(198, 18, 0, 0)) + slot).into()
}

/// Objects as a dump shows them.
fn as_dumped(objects: &Objects) -> Objects {
    let bare = |object: &Object| match object {
        Object::Sa { sa, .. } => Object::Sa {
            sa: sa.clone(),
            born: None,
        },
        other => other.clone(),
    };
    objects
        .iter()
        .map(|(key, object)| (key.clone(), bare(object)))
        .collect()
}

/// Makes keys for any SPI.
struct Keys(keys::Inbound);

impl Keys {
    fn new() -> Self {
        let random = ring::rand::SystemRandom::new();
        let psk = keys::Psk::new(&[7; 32], "10.244.0.0/16").expect("psk");
        let secrets = [(); 2].map(|()| keys::EpochSecret::generate(&random).expect("random"));
        let statement = |index: usize| {
            let statement = keys::Statement {
                network: vec![net("10.244.0.0/16")],
                node: format!("n{index}"),
                subnets: vec![subnets(1)[0]],
                addresses: vec![addr("192.0.2.1")],
                cipher: keys::Cipher::Aes128Gcm16,
                encap: keys::Encap {
                    mode: keys::EncapMode::Esp,
                    port: 4500,
                },
                epoch: keys::Epoch(1),
                public: secrets[index].public(),
                kids: vec![psk.kid()],
            };
            statement.encode().expect("a statement")
        };
        let pair = keys::Pair::derive(&psk, &secrets[0], &statement(0), &secrets[1].public(), &statement(1));
        Self(pair.expect("a pair").inbound)
    }

    fn of(&self, spi: u32) -> keys::SaKey {
        self.0.key(keys::Cipher::Aes128Gcm16, keys::Spi(spi))
    }

    fn write(&self, op: Op) -> Write {
        let secret = match &op {
            Op::Make(_, Object::Sa { sa, .. }) | Op::Change(_, Object::Sa { sa, .. }) => Some(self.of(sa.spi)),
            _ => None,
        };
        Write { op, secret }
    }
}

fn make(objects: &Objects) -> Vec<Op> {
    objects
        .iter()
        .map(|(key, object)| Op::Make(key.clone(), object.clone()))
        .collect()
}

fn breaks(objects: &Objects) -> Vec<Op> {
    objects.keys().map(|key| Op::Break(key.clone())).collect()
}

/// Carries operations out in their order, one `apply` a run of one kind. Gives the results by operation.
fn carry_out(netlink: &mut Netlink, ops: Vec<Op>, keys: &Keys) -> Vec<(Op, Result<(), WriteError>)> {
    let ops = order(ops.into_iter().map(|op| (Scope::Node, op)).collect());
    let ops: Vec<Op> = ops.into_iter().map(|(_, op)| op).collect();
    let mut done = Vec::new();
    for run in ops.chunk_by(|a, b| a.key().kind() == b.key().kind()) {
        let mut writes: Vec<Write> = run.iter().map(|op| keys.write(op.clone())).collect();
        let results = netlink.apply(run[0].key().kind(), &mut writes);
        assert_eq!(results.len(), run.len(), "one result each");
        done.extend(run.iter().cloned().zip(results));
    }
    done
}

fn must(netlink: &mut Netlink, ops: Vec<Op>, keys: &Keys) {
    for (op, result) in carry_out(netlink, ops, keys) {
        if let Err(error) = result {
            panic!("{op}: {}", chain(&error));
        }
    }
}

fn one(netlink: &mut Netlink, op: Op) -> Result<(), WriteError> {
    carry(netlink, &mut Write { op, secret: None })
}

/// Carries one operation out; its key stays where it was surely not used.
fn carry(netlink: &mut Netlink, write: &mut Write) -> Result<(), WriteError> {
    let kind = write.op.key().kind();
    netlink
        .apply(kind, std::slice::from_mut(write))
        .pop()
        .expect("one result")
}

/// What differs, for a message that can be read.
#[track_caller]
fn assert_same(actual: &Objects, expected: &Objects) {
    let ops = crate::kernel::diff(expected.clone(), actual.keys(), |key| actual.get(key));
    let lines: Vec<String> = ops
        .iter()
        .map(|op| format!("{op:?} where there is {:?}", actual.get(op.key())))
        .collect();
    assert!(lines.is_empty(), "{}", lines.join("\n"));
}

#[test]
fn what_was_never_sent_counts_as_refused_and_a_lost_answer_does_not() {
    let op = Op::Break(Key::GuardRoute(net("10.244.0.0/16")));
    let refused = outcome(&op, xfrm::Error::Send(nix::errno::Errno::ENOBUFS));
    assert!(
        matches!(&refused, WriteError::Refused { source, .. } if source.to_string().contains("ENOBUFS")),
        "{refused:?}"
    );
    for lost in [
        xfrm::Error::Unknown,
        xfrm::Error::Timeout,
        xfrm::Error::Receive(nix::errno::Errno::ENOMEM),
    ] {
        assert!(matches!(outcome(&op, lost), WriteError::Unknown { .. }));
    }
}
