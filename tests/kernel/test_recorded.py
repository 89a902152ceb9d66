"""The wire of vxlan and udp, byte for byte: what a node sends against frames built from the formats' descriptions, and
such frames, built by hand, as a pod gets them."""

import json
import pathlib
import socket

import pytest

import frames
import netns
from rig import eventually
from test_backends import Mesh

PAYLOAD, PORTS = b"of pod 1 for pod 2: " + frames.MARKER, (7001, 7002)


@pytest.fixture(params=["vxlan", "vxlan-both", "udp-both"])
def mesh(request, make_lab):
    mesh = Mesh(make_lab, request.param, 2)
    for place in (*mesh.lab.nodes, *mesh.pods):
        # A flow label is a hash of the day.
        place.run("echo 0 > /proc/sys/net/ipv6/auto_flowlabels")
    mesh.talks()
    return mesh


def mac(mesh, number, family):
    """Of a node's VXLAN device, as its lease says."""
    net = mesh.lab.node(number).subnet_env()["FLANNEL_SUBNET"].replace(".1/24", ".0-24")
    path = next(path for path in pathlib.Path(mesh.lab.lease_dir).glob("*.json") if path.name.startswith(net))
    data = json.loads(path.read_text())["BackendData" if family == 4 else "BackendV6Data"]
    assert data["VNI"] == mesh.backend.get("VNI", 1), data
    return bytes.fromhex(data["VtepMAC"].replace(":", ""))


def outside(mesh, source, destination, family, inner):
    """The frame from one node to another around a pod's packet, as the backend's format has it. A node's kernel gives a
    packet of its own 64 hops."""
    lab = mesh.lab
    if mesh.backend["Type"] == "vxlan":
        ethertype = b"\x08\x00" if family == 4 else b"\x86\xdd"
        inner = mac(mesh, destination, family) + mac(mesh, source, family) + ethertype + inner
        payload, ports = frames.vxlan(mesh.backend.get("VNI", 1), inner), (49152, mesh.backend.get("Port", 8472))
    else:
        # The packet, and nothing before it.
        payload, ports = inner, (8285, 8285)
    ends = [lab.node(number).address(family) for number in (source, destination)]
    macs = lab.node(source).mac, lab.node(destination).mac
    return frames.udp(*ends, payload, ports, macs, whole=mesh.backend["Type"] == "udp")


def fixed(mesh, frame, family):
    """A frame without what may be anything: IPv4's identification, checksums, which a device may still have to fill in, and
    the source port of vxlan, which is a hash."""
    frame, at = bytearray(frame), 14
    vxlan = mesh.backend["Type"] == "vxlan"
    for tunnel in (True, False):
        if family == 4:
            frame[at + 4 : at + 6] = frame[at + 10 : at + 12] = b"\0\0"
        at += 20 if family == 4 else 40
        if tunnel and vxlan:
            frame[at : at + 2] = b"\0\0"
        frame[at + 6 : at + 8] = b"\0\0"
        at += 8 + (8 + 14 if tunnel and vxlan else 0)
    return bytes(frame)


def test_a_node_sends_what_the_format_says_and_takes_that_alone(mesh):
    sends(mesh)
    takes(mesh)


def sends(mesh):
    """What a node sends for a pod is the frame that the format says."""
    wire, (here, there) = mesh.lab.wire, mesh.pods
    # One hop at the node's bridge, and one in the udp backend, which is a router too.
    hops = 63 if mesh.backend["Type"] == "vxlan" else 62
    for family in mesh.families:
        source, target = here.address(family), there.address(family)
        with netns.make_socket(here.namespace, socket.AF_INET if family == 4 else socket.AF_INET6, socket.SOCK_DGRAM) as sender:
            sender.bind((source, PORTS[0]))
            sender.sendto(PAYLOAD, (target, PORTS[1]))
        carried = lambda: [frame for frame in list(wire.plaintext) if PAYLOAD in frame.data and frame.port == "node1"]  # noqa: E731
        sent = [frame.data for frame in eventually("the frame is on the wire", carried) if bytes(frames.packed(target)) in frame.data]
        assert len(sent) == 1, sent
        inner = frames.packet(source, target, PAYLOAD, PORTS, ttl=hops, whole=True)
        wanted = outside(mesh, 1, 2, family, inner)
        assert fixed(mesh, sent[0], family) == fixed(mesh, wanted, family), f"\nsent   {sent[0].hex()}\nwanted {wanted.hex()}"
        if mesh.backend["Type"] == "vxlan":
            at = 14 + (20 if family == 4 else 40)
            port = int.from_bytes(sent[0][at : at + 2], "big")
            # RFC 7348, section 5: from the range of dynamic ports, as Linux has it by default.
            assert 32768 <= port <= 65535, port
        # The pod it is for has no socket; its answer is no part of this.
        wire.plaintext.clear()


def takes(mesh):
    """A frame that was built by hand reaches the pod, and one that is a little wrong does not."""
    lab, (here, there) = mesh.lab, mesh.pods
    for family in mesh.families:
        kind = socket.AF_INET if family == 4 else socket.AF_INET6
        good = outside(mesh, 2, 1, family, frames.packet(there.address(family), here.address(family), PAYLOAD, PORTS))
        start = 14 + (20 if family == 4 else 40) + 8
        ends = [lab.node(number).address(family) for number in (2, 1)]

        stranger = ends[0].replace(".2", ".9").replace("::2", "::9")

        def again(payload, ports, source=ends[0]):  # noqa: B008
            return frames.udp(source, ends[1], payload, ports, (lab.node(2).mac, lab.node(1).mac))  # noqa: B023

        if mesh.backend["Type"] == "vxlan":
            port, inner, vni = mesh.backend.get("Port", 8472), good[start + 8 :], mesh.backend.get("VNI", 1)
            bad = {
                "another VNI": again(frames.vxlan(vni + 1, inner), (49152, port)),
                "no VNI by its flags": again(frames.vxlan(vni, inner, flags=0), (49152, port)),
                "another port": again(frames.vxlan(vni, inner), (49152, port + 1)),
                "another device's frame": again(frames.vxlan(vni, b"\x02\0\0\0\0\x63" + inner[6:]), (49152, port)),
                "half a frame": again(frames.vxlan(vni, inner[:20]), (49152, port)),
            }
        else:
            inner = good[start:]
            bad = {
                "a header before the packet": again(b"\0\0\0\0" + inner, (8285, 8285)),
                "another port": again(inner, (8285, 8286)),
                "a packet that is cut off": again(inner[:-1], (8285, 8285)),
                "from an address that holds no lease": again(inner, (8285, 8285), stranger),
            }
        with netns.make_socket(here.namespace, kind, socket.SOCK_DGRAM) as receiver:
            receiver.bind((here.address(family), PORTS[1]))
            receiver.settimeout(0.3)
            for what, frame in bad.items():
                lab.wire.inject(1, frame)
                with pytest.raises(TimeoutError):
                    receiver.recvfrom(2000)
                    raise AssertionError(f"{what} reached the pod")
            lab.wire.inject(1, good)
            payload, caller = receiver.recvfrom(2000)
            assert payload == PAYLOAD and caller[:2] == (there.address(family), PORTS[0]), (payload, caller)
    if mesh.backend["Type"] == "udp":
        dropped, families = lab.node(1).status()["tunnel"]["dropped"], len(mesh.families)
        assert dropped["no_lease"] == families and dropped["received_malformed"] == 2 * families, dropped
