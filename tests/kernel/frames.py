"""Ethernet frames: what one on the wire is, and frames of our own to put there."""

import ipaddress
import socket
import struct

# Sixteen bytes that every traffic generator of the rig puts into its payload. On the wire they prove a leak, whatever the
# headers around them are.
MARKER = b"ringmail-leaked!"

ESP, UDP, TCP, ICMP, ICMPV6, FRAGMENT = 50, 17, 6, 1, 58, 44
EXTENSIONS = {0, 43, FRAGMENT, 60}
NEIGHBOUR = range(130, 138)  # MLD, router and neighbour discovery


class Kinds:
    """Sorts frames by what they are for a mesh whose pods live in `networks`."""

    def __init__(self, networks):
        self.networks = [ipaddress.ip_network(network) for network in networks]

    def of_pods(self, packed):
        address = ipaddress.ip_address(packed)
        return any(address in network for network in self.networks if network.version == address.version)

    def kind(self, frame):
        """One of: plaintext, esp, udp4500, arp, nd, icmp, other:DETAIL.

        plaintext: an address of a pod, as source or destination, in an ARP or ND question, or in the packet that an ICMP
        error quotes; or the marker anywhere."""
        if MARKER in frame:
            return "plaintext"
        ethertype = int.from_bytes(frame[12:14], "big")
        body = frame[14:]
        try:
            if ethertype == 0x0806:
                return "plaintext" if self.of_pods(body[14:18]) or self.of_pods(body[24:28]) else "arp"
            if ethertype == 0x0800:
                return self._kind_of_packet(4, body)
            if ethertype == 0x86DD:
                return self._kind_of_packet(6, body)
        except (IndexError, ValueError):
            return "other:short"
        return f"other:ethertype {ethertype:#06x}"

    def _kind_of_packet(self, version, packet):
        source, destination, protocol, payload = take_apart(version, packet)
        if self.of_pods(source) or self.of_pods(destination):
            return "plaintext"
        if protocol == ESP:
            return "esp"
        if protocol == UDP and 4500 in struct.unpack("!HH", payload[:4]):
            return "udp4500"
        if protocol == ICMP:
            quotes = payload[0] in (3, 4, 5, 11, 12)
            return "plaintext" if quotes and self._quotes_pods(4, payload[8:]) else "icmp"
        if protocol == ICMPV6:
            if payload[0] in (135, 136) and self.of_pods(payload[8:24]):
                return "plaintext"
            if payload[0] in NEIGHBOUR or payload[0] == 143:
                return "nd"
            return "plaintext" if payload[0] < 128 and self._quotes_pods(6, payload[8:]) else "icmp"
        name = {TCP: "tcp", UDP: "udp"}.get(protocol, f"protocol {protocol}")
        ports = " %d > %d" % struct.unpack("!HH", payload[:4]) if protocol in (TCP, UDP) else ""
        return f"other:{name}{ports}"

    def _quotes_pods(self, version, quoted):
        source, destination, _, _ = take_apart(version, quoted)
        return self.of_pods(source) or self.of_pods(destination)


def take_apart(version, packet):
    """(source, destination, protocol, payload) of an IP packet, behind IPv6 extension headers. Addresses are packed."""
    if version == 4:
        return packet[12:16], packet[16:20], packet[9], packet[(packet[0] & 15) * 4 :]
    protocol, payload = packet[6], packet[40:]
    while protocol in EXTENSIONS:
        length = 8 if protocol == FRAGMENT else (payload[1] + 1) * 8
        protocol, payload = payload[0], payload[length:]
    return packet[8:24], packet[24:40], protocol, payload


def describe(frame):
    """One line for people: addresses, protocol, length."""
    ethertype = int.from_bytes(frame[12:14], "big")
    if ethertype not in (0x0800, 0x86DD):
        return f"ethertype {ethertype:#06x}, {len(frame)} bytes: {frame[14:54].hex()}"
    source, destination, protocol, payload = take_apart(4 if ethertype == 0x0800 else 6, frame[14:])
    marked = ", with the marker" if MARKER in frame else ""
    source, destination = ipaddress.ip_address(source), ipaddress.ip_address(destination)
    return f"{source} > {destination} protocol {protocol}, {len(frame)} bytes{marked}: {payload[:16].hex()}"


def udp(source, destination, payload=MARKER, ports=(4000, 4000), macs=(b"\2\0\0\0\0\1", b"\xff" * 6), **header):
    """An Ethernet frame with a UDP packet, IPv4 or IPv6 as the addresses are. macs: (source, destination). header: see
    `packet`."""
    ethertype = b"\x86\xdd" if ":" in str(source) else b"\x08\x00"
    return macs[1] + macs[0] + ethertype + packet(source, destination, payload, ports, **header)


def packet(source, destination, payload=MARKER, ports=(4000, 4000), ttl=64, whole=False):
    """An IP packet with a UDP datagram, its checksums right. whole: with IPv4's "don't fragment"."""
    source, destination = ipaddress.ip_address(source), ipaddress.ip_address(destination)
    length = 8 + len(payload)
    datagram = struct.pack("!HHHH", *ports, length, 0) + payload
    pseudo = source.packed + destination.packed + struct.pack("!II", length, UDP)
    datagram = datagram[:6] + struct.pack("!H", checksum(pseudo + datagram) or 0xFFFF) + datagram[8:]
    if source.version == 6:
        return struct.pack("!IHBB", 6 << 28, length, UDP, ttl) + source.packed + destination.packed + datagram
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + length, 1, 0x4000 * whole, ttl, UDP, 0) + source.packed + destination.packed
    return header[:10] + struct.pack("!H", checksum(header)) + header[12:] + datagram


def vxlan(vni, inner, flags=0x08):
    """A VXLAN header (RFC 7348, section 5) before an Ethernet frame: eight flags, of which I says that the VNI counts, 24
    reserved bits, 24 bits of VNI, 8 reserved bits."""
    return struct.pack("!II", flags << 24, vni << 8) + inner


def checksum(data):
    """The Internet checksum (RFC 1071)."""
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def packed(address):
    """Network-order bytes of an address of either family."""
    return socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)
