//! Golden plans: what a node wants of its kernel, and the operations that bring it there, as text for people to review.
//!
//! `RINGMAIL_GOLDEN=write cargo test --test plan` rewrites `tests/plan/*.txt`; review reads the difference.

mod sim;

use std::path::PathBuf;
use std::time::Duration;

use keys::{Carrier, Cipher, EncapMode};
use ringmail::node::Cause;
use sim::make::{self, Families};
use sim::mesh::Mesh;

/// Compares what was written with the file of this name.
fn golden(name: &str, written: &str) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("tests/plan")
        .join(format!("{name}.txt"));
    if std::env::var_os("RINGMAIL_GOLDEN").is_some_and(|value| value == "write") {
        std::fs::write(&path, written).expect("the folder is there");
        return;
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    if let Some((number, (old, new))) = (expected
        .lines()
        .chain(std::iter::repeat(""))
        .zip(written.lines())
        .enumerate())
    .find(|(_, (old, new))| old != new)
    {
        panic!(
            "{name}.txt, line {}:\n- {old}\n+ {new}\nRINGMAIL_GOLDEN=write rewrites it",
            number + 1
        );
    }
    assert_eq!(expected, written, "{name}.txt ends differently");
}

/// The story of node1, as text: what it did since it was last asked, and what it wants.
struct Story {
    text: String,
    told: usize,
}

impl Story {
    fn new(title: &str) -> Self {
        Self {
            text: format!("{title}\n"),
            told: 0,
        }
    }

    /// What node1 did since.
    fn did(&mut self, what: &str, mesh: &Mesh) {
        self.text.push_str(&format!("\n== {what} ==\n"));
        mesh.members[0].kernel.look(|machine| {
            for (op, _) in &machine.log[self.told..] {
                self.text.push_str(&sim::text::op(op));
                self.text.push('\n');
            }
            self.told = machine.log.len();
        });
    }

    /// What node1 wants now.
    fn wants(&mut self, what: &str, mesh: &Mesh) {
        self.text.push_str(&format!("\n== wanted: {what} ==\n"));
        let process = mesh.members[0].process.as_ref().expect("it runs");
        self.text.push_str(&sim::text::objects(&process.reconciler.desired()));
    }

    fn skip(&mut self, mesh: &Mesh) {
        self.told = mesh.members[0].kernel.look(|machine| machine.log.len());
    }

    fn end(self, name: &str) {
        // Epochs count from the world's begin: 1700000042 reads e42.
        golden(name, &self.text.replace("17000000", "e"));
    }
}

fn second() -> Duration {
    Duration::from_secs(1)
}

#[test]
fn a_lone_node_builds_its_guard_and_device() {
    let mut mesh = Mesh::new("lone", Families::V4);
    mesh.add();
    mesh.start(0);
    let mut story = Story::new("A node alone in an IPv4 mesh starts.");
    story.did("operations", &mesh);
    story.wants("all", &mesh);
    story.end("lone");
}

#[test]
fn two_nodes_meet() {
    for (families, name) in [
        (Families::V4, "two-v4"),
        (Families::V6, "two-v6"),
        (Families::Both, "two-dual"),
    ] {
        let mut mesh = Mesh::new(name, families);
        mesh.add();
        mesh.add();
        mesh.start(0);
        let mut story = Story::new(&format!("Node1 of two, {families:?}: its peer node2 comes."));
        story.skip(&mesh);
        mesh.start(1);
        mesh.read(0, 1, usize::MAX);
        mesh.wire.clear();
        mesh.turn(0);
        story.did(
            "node2's lease is read; no probe has come back: nothing is sent yet",
            &mesh,
        );
        mesh.run(second());
        story.did("a probe came back", &mesh);
        story.wants("all", &mesh);
        story.end(name);
    }
}

#[test]
fn two_nodes_that_leave_the_carrier_open() {
    let mut mesh = Mesh::new("auto", Families::V4);
    for x in 0..2 {
        mesh.add();
        mesh.members[x].settings.encap.mode = EncapMode::Auto;
    }
    mesh.start(0);
    let mut story = Story::new("Node1 of two, both with UDPEncap \"auto\": its peer node2 comes.");
    story.skip(&mesh);
    mesh.start(1);
    mesh.run(second());
    story.did("node2 came, and plain ESP passes", &mesh);
    story.wants("all", &mesh);
    mesh.blocked.insert((0, 1, Carrier::Esp));
    mesh.run(4 * second());
    story.did("plain ESP to node2 is blocked on the way", &mesh);
    mesh.blocked.clear();
    mesh.run(20 * second());
    story.did("it passes again", &mesh);
    story.end("auto");
}

#[test]
fn udp_encapsulation_at_one_end_is_used_by_both() {
    let mut mesh = Mesh::new("udp", Families::V4);
    mesh.add();
    mesh.add();
    mesh.members[1].settings.encap.mode = EncapMode::Udp;
    mesh.members[1].settings.encap.port = 4501;
    mesh.start(0);
    mesh.start(1);
    mesh.run(second());
    let mut story = Story::new("Node2 wants ESP in UDP at port 4501, node1 does not ask for it and is at 4500.");
    story.wants("all of node1", &mesh);
    story.end("udp-encap");
}

#[test]
fn each_end_sends_with_its_own_cipher() {
    let mut mesh = Mesh::new("ciphers", Families::V4);
    mesh.add();
    mesh.add();
    mesh.members[1].settings.cipher = Cipher::ChaCha20Poly1305;
    mesh.start(0);
    mesh.start(1);
    mesh.run(second());
    let mut story = Story::new("Node1 sends with aes128gcm16, node2 with chacha20poly1305.");
    story.wants("all of node1", &mesh);
    story.end("ciphers");
}

#[test]
fn a_rotation_makes_before_it_breaks() {
    let mut mesh = Mesh::new("rotation", Families::V4);
    for _ in 0..2 {
        mesh.add();
    }
    mesh.start(0);
    mesh.start(1);
    mesh.run(Duration::from_secs(42));
    let mut story = Story::new("Node1 of two rotates, 42 s after the start.");
    story.skip(&mesh);
    mesh.rotate(0, Cause::Asked);
    mesh.wire.clear();
    story.did("before its lease is published", &mesh);
    story.wants("mid-rotation: data on the old, both received", &mesh);
    mesh.run(second());
    story.did("node2 has answered on the new", &mesh);
    mesh.run(Duration::from_secs(8));
    story.did("the old has drained", &mesh);
    story.end("rotation");
}

#[test]
fn a_restart_keeps_what_it_finds_until_a_probe_comes_back() {
    let mut mesh = Mesh::new("restart", Families::V4);
    mesh.add();
    mesh.add();
    mesh.start(0);
    mesh.start(1);
    mesh.run(Duration::from_secs(42));
    let mut story = Story::new("The daemon of node1 restarts, 42 s after the start.");
    mesh.stop(0);
    story.skip(&mesh);
    mesh.start(0);
    mesh.wire.clear();
    story.did("before a probe comes back", &mesh);
    story.wants("what it inherited stays in use", &mesh);
    mesh.run(Duration::from_secs(8));
    story.did("a probe came back, and the old has drained", &mesh);
    story.end("restart");
}

#[test]
fn a_peer_that_left_is_taken_apart_in_the_reverse_order() {
    let mut mesh = Mesh::new("left", Families::Both);
    for _ in 0..3 {
        mesh.add();
    }
    for x in 0..3 {
        mesh.start(x);
    }
    mesh.run(second());
    let mut story = Story::new("Node2 leaves a mesh of three, dual stack.");
    story.skip(&mesh);
    mesh.leave(1);
    mesh.flush();
    story.did("its lease is gone", &mesh);
    mesh.run(Duration::from_secs(6));
    story.did("it does not answer", &mesh);
    story.wants("all", &mesh);
    story.end("peer-left");
}

#[test]
fn templates_go_wide_while_a_peer_changes_its_address() {
    let mut mesh = Mesh::new("address", Families::V4);
    mesh.add();
    mesh.add();
    mesh.start(0);
    mesh.start(1);
    mesh.run(Duration::from_secs(42));
    let mut story = Story::new("Node2 moves from 192.0.2.2 to 192.0.2.102.");
    story.skip(&mesh);
    let uplink = make::uplink(Families::V4, 102);
    mesh.members[1].kernel.with(|machine| {
        machine.addresses.extend(uplink.local.iter());
        machine.sources.extend(uplink.local.iter());
    });
    mesh.members[1].uplink = uplink.clone();
    if let Some(process) = &mut mesh.members[1].process {
        process.reconciler.node.uplinked(uplink);
    }
    mesh.turn(1);
    mesh.read(0, 1, usize::MAX);
    mesh.turn(0);
    story.did("node2's new lease is read: both addresses are taken", &mesh);
    mesh.run(Duration::from_secs(8));
    story.did(
        "it sends from the new one, and the old has drained: one address again",
        &mesh,
    );
    story.end("address");
}
