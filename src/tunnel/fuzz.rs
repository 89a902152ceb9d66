//! The pure parts of the packet path as one, for packets that somebody made up: `noise` has random ones, and
//! `tests/fuzz` those of a fuzzer. That is another crate, to which these modules are closed but for this door, which no
//! release has.
//!
//! Both panic where what comes out is not what it should be.

use std::net::IpAddr;

use super::checksum;
use super::coalesce::{Coalescer, Sink};
use super::icmp::{self, Problem};
use super::packet::{Ip, TCP, UDP};
use super::split::Split;
use super::virtio::{HEADER, Header};

/// Takes what would be written to the device, looks whether it is what it says, and takes it apart again.
#[derive(Default)]
struct Looker {
    packets: Vec<Vec<u8>>,
}

impl Sink for Looker {
    fn take(&mut self, header: &Header, packet: &[u8], segments: usize) {
        let ip = Ip::read(packet).expect("an IP packet goes to the device");
        assert_eq!(ip.total, packet.len());
        let split = Split::plan(header, ip, packet).expect("the kernel could split it");
        assert_eq!(split.count(), segments);
        for index in 0..segments {
            let mut to = vec![0; split.length(index)];
            split.write(packet, index, &mut to);
            self.packets.push(to);
        }
    }
}

/// One batch of packets from a peer to the device: as many must come to it as may, each as it was, in the order of its
/// flow.
pub fn inwards(packets: impl IntoIterator<Item = Vec<u8>>) {
    let (mut coalescer, mut looker, mut pushed) = (Coalescer::new(true, true), Looker::default(), Vec::new());
    for mut packet in packets {
        let Some(ip) = Ip::read(&packet) else { continue };
        packet.truncate(ip.total);
        if !ip.decrement(&mut packet) {
            answer(&packet);
            continue;
        }
        coalescer.push(ip, &packet, &mut looker);
        pushed.push(packet);
    }
    coalescer.flush(&mut looker);
    assert_eq!(by_flow(&looker.packets), by_flow(&pushed));
}

/// A packet of the device on its way to a peer, with the header that stood before it: nothing of it may be lost.
pub fn outwards(header: &[u8; HEADER], packet: &mut [u8]) {
    out(&Header::from_bytes(header), packet);
}

pub(super) fn out(header: &Header, packet: &mut [u8]) {
    let Some(ip) = Ip::read(packet) else { return };
    let packet = &mut packet[..ip.total];
    answer(packet);
    let Some(split) = Split::plan(header, ip, packet) else {
        return;
    };
    if !ip.decrement(packet) {
        return;
    }
    let mut payload = 0;
    for index in 0..split.count() {
        let length = split.length(index);
        assert!(length <= split.largest() && length <= packet.len());
        let mut to = vec![0; length];
        split.write(packet, index, &mut to);
        assert_eq!(Ip::read(&to).expect("an IP packet goes to the peer").total, length);
        payload += length;
    }
    assert!(payload >= packet.len(), "nothing of it is lost");
}

fn answer(packet: &[u8]) {
    let sources: [IpAddr; 2] = ["10.244.1.0", "fd00::1"].map(|text| text.parse().expect("an address"));
    for problem in [Problem::TimeExceeded, Problem::NoRoute, Problem::TooBig(1280)] {
        for source in sources {
            let mut to = [0; icmp::LARGEST];
            if let Some((length, _)) = icmp::answer(problem, packet, source, &mut to) {
                assert_eq!(Ip::read(&to[..length]).expect("an IP packet").total, length);
            }
        }
    }
}

/// What tells one flow from another: protocol, addresses, ports.
pub(super) fn flow(packet: &[u8]) -> Vec<u8> {
    let ip = Ip::read(packet).expect("an IP packet");
    let mut flow = vec![ip.protocol];
    flow.extend(&packet[ip.addresses()]);
    if !ip.fragment {
        flow.extend(packet[ip.header..].iter().take(4));
    }
    flow
}

/// Packets by their flow, each flow's in order. A checksum that holds has two ways to be written where it is zero, so it is
/// left out; one that does not stays.
fn by_flow(packets: &[Vec<u8>]) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut all: Vec<_> = packets
        .iter()
        .map(|packet| (flow(packet), without_good_checksums(packet)))
        .collect();
    // Stable: packets of one flow keep their order.
    all.sort_by(|one, other| one.0.cmp(&other.0));
    all
}

fn without_good_checksums(packet: &[u8]) -> Vec<u8> {
    let ip = Ip::read(packet).expect("an IP packet");
    let mut bare = packet.to_vec();
    if !ip.v6 && checksum::holds(checksum::sum(&packet[..ip.header])) {
        bare[10..12].fill(0);
    }
    let transport = &packet[ip.header..];
    let field = match ip.protocol {
        TCP => 16,
        UDP => 6,
        _ => return bare,
    };
    // UDP's zero is "none", and no checksum.
    let none = ip.protocol == UDP && transport.get(6..8) == Some(&[0, 0]);
    let sum = checksum::sum(transport) + ip.pseudo_sum(packet, ip.protocol, transport.len());
    if transport.len() >= field + 2 && !none && checksum::holds(sum) {
        bare[ip.header + field..ip.header + field + 2].fill(0);
    }
    bare
}
