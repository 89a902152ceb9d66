//! Packets of the udp backend: from peers to the device, and from the device to peers.
//!
//! The input is a list of packets, each a byte that says how it is meant, one of its length, and its bytes: raw, or made
//! good (lengths, checksums), or the next of the flow of the one before. Without that nothing would ever be merged.

use ringmail::tunnel::fuzz;

/// The packet's bytes are used as they are.
const RAW: u8 = 1;
/// It follows the packet before, with these bytes as its payload.
const NEXT: u8 = 2;
/// It is IPv6.
const V6: u8 = 4;
/// It is UDP, else TCP.
const UDP: u8 = 8;
/// It goes out by the device, with a header from the input's last ten bytes.
const OUT: u8 = 16;
/// It is sixteen times as long.
const LONG: u8 = 32;

pub(crate) fn run(data: &[u8]) {
    let (packets, header) = data.split_at(data.len().saturating_sub(10));
    let Some(header) = header.first_chunk::<10>() else {
        return;
    };
    let (mut rest, mut received, mut before) = (packets, Vec::new(), Vec::new());
    while let [kind, length, more @ ..] = rest {
        let (bytes, more) = more.split_at(more.len().min(usize::from(*length)));
        rest = more;
        let packet = match kind & (RAW | NEXT) {
            NEXT if !before.is_empty() => next(&before, bytes),
            RAW => bytes.to_vec(),
            _ => good(*kind, bytes),
        };
        before.clone_from(&packet);
        if kind & OUT == 0 {
            received.push(packet);
        } else {
            let mut packet = packet;
            fuzz::outwards(header, &mut packet);
        }
    }
    fuzz::inwards(received);
}

/// A TCP or UDP packet whose lengths and checksums are right; `bytes` are ports and the like, and its payload.
fn good(kind: u8, bytes: &[u8]) -> Vec<u8> {
    let (v6, udp) = (kind & V6 != 0, kind & UDP != 0);
    let mut bytes = bytes.to_vec();
    if kind & LONG != 0 {
        bytes = bytes.repeat(16);
    }
    bytes.resize(bytes.len().max(20), 0);
    let mut packet = if v6 {
        let mut header = vec![0x60, 0, 0, 0, 0, 0, if udp { 17 } else { 6 }, 64];
        header.extend([0xfd; 32]);
        header
    } else {
        let mut header = vec![0x45, 0, 0, 0, 0, 1, 0x40, 0, 64, if udp { 17 } else { 6 }, 0, 0];
        header.extend([10, 244, 2, 9, 10, 244, 1, 9]);
        header
    };
    let at = packet.len();
    packet.extend(bytes);
    if !udp {
        packet[at + 12] = 0x50 | packet[at + 12] & 0x0f;
    }
    repaired(packet)
}

/// The packet after `before`: its number, its place in the stream, `payload`.
fn next(before: &[u8], payload: &[u8]) -> Vec<u8> {
    let mut packet = before.to_vec();
    let v6 = packet[0] >> 4 == 6;
    let at = if v6 { 40 } else { 20 };
    if packet.len() < at + 20 {
        return packet;
    }
    let udp = packet[if v6 { 6 } else { 9 }] == 17;
    let headers = at + if udp { 8 } else { 20 };
    let sent = (packet.len() - headers) as u32;
    packet.truncate(headers);
    packet.extend(payload);
    if !v6 {
        let number = u16::from_be_bytes([packet[4], packet[5]]).wrapping_add(1);
        packet[4..6].copy_from_slice(&number.to_be_bytes());
    }
    if !udp {
        let place =
            u32::from_be_bytes([packet[at + 4], packet[at + 5], packet[at + 6], packet[at + 7]]).wrapping_add(sent);
        packet[at + 4..at + 8].copy_from_slice(&place.to_be_bytes());
    }
    repaired(packet)
}

fn repaired(mut packet: Vec<u8>) -> Vec<u8> {
    let v6 = packet[0] >> 4 == 6;
    let at = if v6 { 40 } else { 20 };
    let udp = packet[if v6 { 6 } else { 9 }] == 17;
    let (total, length) = (packet.len(), packet.len() - at);
    let addresses = if v6 {
        packet[4..6].copy_from_slice(&(length as u16).to_be_bytes());
        8..40
    } else {
        packet[2..4].copy_from_slice(&(total as u16).to_be_bytes());
        packet[10..12].fill(0);
        let sum = checksum(&[&packet[..20]]);
        packet[10..12].copy_from_slice(&sum);
        12..20
    };
    if udp {
        packet[at + 4..at + 6].copy_from_slice(&(length as u16).to_be_bytes());
    }
    let field = at + if udp { 6 } else { 16 };
    if field + 2 <= total {
        packet[field..field + 2].fill(0);
        let pseudo = [0, if udp { 17 } else { 6 }, (length >> 8) as u8, length as u8];
        let sum = checksum(&[&packet[addresses], &pseudo, &packet[at..]]);
        packet[field..field + 2].copy_from_slice(&sum);
    }
    packet
}

/// The Internet checksum (RFC 1071), as simple as can be. All parts but the last are of even length.
fn checksum(parts: &[&[u8]]) -> [u8; 2] {
    let mut sum = 0u32;
    for pair in parts.iter().flat_map(|part| part.chunks(2)) {
        sum += u32::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}
