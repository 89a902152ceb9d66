//! Against a real kernel with ESP, as root: each test makes a network namespace of its own for its thread.

#![allow(clippy::unwrap_used, reason = "it is how a test fails")]

mod events;
mod policies;
mod sas;

use std::{net::IpAddr, process::Command};

use nix::sched::{CloneFlags, unshare};
use xfrm::{
    Action, Aead, Batch, Direction, Events, Limits, Notification, Parsed, Policy, PolicyId, Sa, SaInfo, Selector,
    Template, Xfrm,
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
            optional: false,
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
