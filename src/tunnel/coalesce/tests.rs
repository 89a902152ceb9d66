use super::*;
use crate::tunnel::fuzz::flow;
use crate::tunnel::sample::{self, Made};
use crate::tunnel::split::tests::split;
use proptest::prelude::*;

/// What came out: large packets, split again by the other half of this module.
#[derive(Default)]
struct Out {
    packets: Vec<Vec<u8>>,
    writes: Vec<(Header, Vec<u8>, usize)>,
}

impl Sink for Out {
    fn take(&mut self, header: &Header, packet: &[u8], segments: usize) {
        let parts = split(header, packet).expect("what is given to the kernel is well formed");
        assert_eq!(parts.len(), segments);
        self.packets.extend(parts);
        self.writes.push((*header, packet.to_vec(), segments));
    }
}

fn coalesce(packets: &[Vec<u8>]) -> Out {
    let (mut coalescer, mut out) = (Coalescer::new(true, true), Out::default());
    for packet in packets {
        coalescer.push(Ip::read(packet).expect("an IP packet"), packet, &mut out);
    }
    coalescer.flush(&mut out);
    out
}

fn in_order_of_each_flow(packets: &[Vec<u8>]) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut all: Vec<(Vec<u8>, Vec<u8>)> = packets.iter().map(|packet| (flow(packet), packet.clone())).collect();
    // Stable: packets of one flow keep their order.
    all.sort_by(|one, other| one.0.cmp(&other.0));
    all
}

/// Packets of a few flows, mixed, some damaged, doubled or lost.
fn traffic() -> impl Strategy<Value = Vec<Vec<u8>>> {
    let flows = proptest::collection::vec((sample::made(), 1u16..1500), 1..8);
    let events = proptest::collection::vec((any::<proptest::sample::Index>(), 0u8..20, any::<u16>()), 0..200);
    (flows, events).prop_map(|(flows, events)| {
        let mut queues: Vec<std::collections::VecDeque<Vec<u8>>> = flows
            .into_iter()
            .map(|(made, size)| made.slowly(size.max(40)).into_iter().take(80).collect())
            .collect();
        let mut packets = Vec::new();
        for (which, event, noise) in events {
            let which = which.index(queues.len());
            // Runs, as a sender makes them.
            for _ in 0..=(noise % 12) {
                let Some(mut packet) = queues[which].pop_front() else {
                    break;
                };
                match event {
                    0 => continue,
                    1 => packets.push(packet.clone()),
                    2 => {
                        let at = usize::from(noise) % packet.len();
                        let before = Ip::read(&packet);
                        packet[at] ^= 1 << (noise >> 13);
                        if Ip::read(&packet).map(|ip| ip.total) != before.map(|ip| ip.total) {
                            continue;
                        }
                    }
                    _ => {}
                }
                packets.push(packet);
            }
        }
        packets
    })
}

proptest! {
    #[test]
    fn splitting_what_was_merged_gives_the_same_packets_in_the_order_of_each_flow(packets in traffic()) {
        let out = coalesce(&packets);
        prop_assert_eq!(in_order_of_each_flow(&out.packets), in_order_of_each_flow(&packets));
    }

    #[test]
    fn merging_what_was_split_gives_the_large_packet_again(
        made in sample::made().prop_map(|made| Made { flags: made.flags & PSH | ACK, ..made }), size in 100u16..1500
    ) {
        let (header, large) = made.large(size);
        let out = coalesce(&made.slowly(size));
        if made.payload.len() > usize::from(size) {
            prop_assert_eq!(out.writes.len(), 1);
            prop_assert_eq!(out.writes[0].0, header);
            // Lengths and IP checksum of the sample's large packet are not all set.
            prop_assert_eq!(out.writes[0].1.len(), large.len());
            prop_assert_eq!(&out.writes[0].1[made_headers(&made)..], &large[made_headers(&made)..]);
        }
    }
}

fn made_headers(made: &Made) -> usize {
    (if made.v6 { 40 } else { 20 }) + if made.udp { 8 } else { 20 + made.options.len() }
}

#[test]
fn a_bulk_stream_is_merged_up_to_the_largest_packet() {
    let out = coalesce(&Made::tcp(64_000).slowly(1420));
    assert_eq!(out.writes.iter().map(|write| write.2).collect::<Vec<_>>(), [46]);
    let out = coalesce(&Made::udp(64_000).slowly(1420));
    assert_eq!(out.writes.iter().map(|write| write.2).collect::<Vec<_>>(), [46]);
}

#[test]
fn a_damaged_segment_goes_on_alone_and_is_not_declared_good() {
    for made in [Made::tcp(5000), Made::udp(5000)] {
        let mut packets = made.slowly(1000);
        packets[2][700] ^= 1;
        let out = coalesce(&packets);
        assert_eq!(out.writes.iter().map(|write| write.2).collect::<Vec<_>>(), [2, 1, 2]);
        assert!(!out.writes[1].0.needs_csum, "the kernel must look at it");
        assert_eq!(out.writes[1].1, packets[2]);
    }
}

#[test]
fn a_damaged_ip_header_is_not_repaired() {
    let mut packets = Made::tcp(5000).slowly(1000);
    packets[2][10] ^= 1;
    assert_eq!(coalesce(&packets).writes[1].1, packets[2]);
}

#[test]
fn udp_without_a_checksum_stays_alone() {
    let mut packets = Made::udp(5000).slowly(1000);
    for packet in &mut packets {
        packet[26..28].fill(0);
    }
    assert_eq!(coalesce(&packets).writes.len(), 5);
}

#[test]
fn udp_of_tunnels_stays_alone() {
    for port in TUNNEL_PORTS {
        let made = Made {
            ports: (1000, port),
            ..Made::udp(5000)
        };
        assert_eq!(coalesce(&made.slowly(1000)).writes.len(), 5);
    }
}

#[test]
fn what_differs_in_more_than_its_place_is_not_merged() {
    // Byte and change, each of the third segment: type of service, flags, time to live, acknowledgement, window.
    for (at, change) in [(1, 1), (6, 0x40), (8, 1), (28, 1), (34, 1), (24, 1), (4, 1)] {
        let made = Made::tcp(3000);
        let mut packets = made.slowly(1000);
        let packet = &mut packets[2];
        packet[at] ^= change;
        set_header_checksum(packet, 20);
        packet[36..38].fill(0);
        let ip = Ip::read(packet).expect("an IP packet");
        let sum = checksum::sum(&packet[20..]) + ip.pseudo_sum(packet, TCP, packet.len() - 20);
        packet[36..38].copy_from_slice(&checksum::finish(sum));
        let out = coalesce(&packets);
        assert_eq!(
            out.writes.iter().map(|write| write.2).collect::<Vec<_>>(),
            [2, 1],
            "byte {at}"
        );
    }
}

#[test]
fn more_flows_than_are_held_lose_nothing_and_the_oldest_goes_first() {
    let flows: Vec<Vec<Vec<u8>>> = (0..40)
        .map(|port| {
            let made = Made {
                ports: (port, 2000),
                ..Made::tcp(3000)
            };
            made.slowly(1000)
        })
        .collect();
    let packets: Vec<Vec<u8>> = (0..3)
        .flat_map(|turn| flows.iter().map(move |flow| flow[turn].clone()))
        .collect();
    let out = coalesce(&packets);
    assert_eq!(in_order_of_each_flow(&out.packets), in_order_of_each_flow(&packets));
    assert_eq!(out.packets[..24], packets[..24]);
}

#[test]
fn a_fragment_waits_for_all_that_came_before() {
    let mut packets = Made::udp(4000).slowly(1000);
    packets[3][6] = 0x20;
    set_header_checksum(&mut packets[3], 20);
    let out = coalesce(&packets);
    assert_eq!(out.packets, packets);
    assert_eq!(out.writes.len(), 2);
}

#[test]
fn switched_off_it_hands_on_one_by_one() {
    let (mut coalescer, mut out) = (Coalescer::new(false, false), Out::default());
    let packets = Made::tcp(5000).slowly(1000);
    for packet in &packets {
        coalescer.push(Ip::read(packet).expect("an IP packet"), packet, &mut out);
    }
    assert_eq!(out.packets, packets);
}
