"""Nodes behind a NAT: their address and port are learned from the kernel, followed, and kept open; two share one address.

    node1, node2        on the wire, 192.168.77.0/24
    node3, node4        behind a router with MASQUERADE: 10.9.0.0/24 inside, 192.168.77.200 outside

Nodes 3 and 4 tell their inner addresses: nobody has told them of the NAT."""

import contextlib
import os
import socket
import struct
import subprocess
import time

import pytest

import netns
from rig import eventually
from running import Running, measured

OUTSIDE, TIMEOUT = "192.168.77.200", 20  # the router's address; its timeout of a UDP mapping, seconds


class Router:
    """Takes nodes from the wire and puts them behind a NAT. ports: what its MASQUERADE gives out."""

    def __init__(self, mesh, *numbers):
        self.namespace, self.rule = f"{mesh.lab.name}-nat", None
        wire = mesh.lab.wire.namespace
        self.mesh = mesh
        lines = [f"netns add {self.namespace}", f"-n {wire} link add nat type veth peer name out netns {self.namespace}"]
        lines += [f"-n {wire} link set nat master wire up"]
        lines += [f"-n {wire} link set node{number} nomaster netns {self.namespace}" for number in numbers]
        for line in lines:
            subprocess.run(["ip", *line.split()], check=True)
        inside = ["link add in type bridge", "address add 10.9.0.254/24 dev in", "link set in up", "link set lo up"]
        inside += [f"link set node{number} master in up" for number in numbers]
        inside += [f"address add {OUTSIDE}/24 dev out", "link set out up"]
        self.run(["ip", "-batch", "-"], input="\n".join(inside) + "\n")
        self.run("echo 1 > /proc/sys/net/ipv4/ip_forward")
        for name in ("udp_timeout", "udp_timeout_stream"):
            self.run(f"echo {TIMEOUT} > /proc/sys/net/netfilter/nf_conntrack_{name}")
        for number in numbers:
            node = mesh.lab.node(number)
            node.ip(
                "address flush dev eth0",
                f"address add 10.9.0.{number}/24 dev eth0",
                "route add default via 10.9.0.254",
            )
            mesh.lab.keywatch.detach(node.namespace)
            mesh.lab.keywatch.attach(node.namespace, node.namespace, [f"10.9.0.{number}"])
        self.run("iptables-legacy -w -t nat -A POSTROUTING -o out -p esp -j MASQUERADE")

    def run(self, command, **options):
        return netns.run(self.namespace, command, **options)

    def ports(self, first, last):
        """New mappings of UDP take these ports from now on; those there are stay."""
        rule = f"POSTROUTING -o out -p udp -j MASQUERADE --to-ports {first}-{last}"
        if self.rule:
            self.run(f"iptables-legacy -w -t nat -D {self.rule}")
        self.run(f"iptables-legacy -w -t nat -A {rule}")
        self.rule = rule

    def flush(self):
        """Forgets every mapping (ctnetlink: IPCTNL_MSG_CT_DELETE without a tuple)."""
        with netns.make_socket(self.namespace, socket.AF_NETLINK, socket.SOCK_RAW, 12) as asking:
            asking.send(struct.pack("=IHHIIBBH", 20, 1 << 8 | 2, 5, 1, 0, socket.AF_INET, 0, 0))
            answer = asking.recv(4096)
            assert struct.unpack_from("=i", answer, 16)[0] == 0, answer


@pytest.fixture(scope="module", params=["auto", True], ids=["auto", "udp"])
def mesh(request, keywatch):
    mode = request.param
    subprocess.run(["modprobe", "-a", "nf_conntrack_netlink", "xt_MASQUERADE", "nf_nat"], check=False)
    mesh = Running(f"t{os.getpid() % 100000}-nat", 4, keywatch, UDPEncap=mode)
    mesh.mode = "auto" if mode == "auto" else "true"
    mesh.subnets()
    try:
        mesh.router = Router(mesh, 3, 4)
        mesh.router.ports(41000, 41009)
        mesh.start()
        mesh.in_order(timeout=60)
        mesh.lab.pods()
        yield mesh
    finally:
        mesh.down()
        subprocess.run(["ip", "netns", "delete", f"{mesh.lab.name}-nat"], check=False)


@pytest.fixture(autouse=True)
def checked(request, keywatch):
    if "mesh" not in request.fixturenames:
        yield
        return
    mesh = request.getfixturevalue("mesh")
    request.node.labs = [mesh.lab]
    yield
    mesh.lab.wire.assert_clean()
    keywatch.check()


def learned(mesh, at, of):
    """The address and port that a node has learned of another, and uses."""
    address, port = (mesh.peer(at, of)["learned"] or ":0").rsplit(":", 1)
    return address, int(port)


@contextlib.contextmanager
def no_loss(mesh, one, two, rate=100):
    with mesh.outage(one, two, rate=rate) as outage:
        yield outage
    assert not outage.lost, outage


def test_two_nodes_behind_one_nat_reach_all_and_are_reached(mesh):
    pods = [mesh.lab.pod(number) for number in (1, 2, 3, 4)]
    for one in pods:
        for other in pods:
            assert one is other or one.ping(other) == 1, f"{one} > {other}"
    (address, port), (same, other) = learned(mesh, 1, 3), learned(mesh, 1, 4)
    assert address == same == OUTSIDE and port != other, (port, other)
    assert {port, other} <= set(range(41000, 41010))
    assert mesh.peer(3, of=4)["learned"] is None, "they reach each other directly"
    assert f"behind a NAT at {OUTSIDE}:{port}" in " ".join(mesh.lab.node(1).ringmail("status").split())
    for node in mesh.lab.nodes:
        assert node.audit()["differences"] == [], node


def test_a_mapping_that_nobody_used_but_the_daemons_is_still_open_after_its_timeout(mesh):
    time.sleep(2 * TIMEOUT + 5)
    for number in (3, 4):
        assert mesh.lab.pod(1).ping(mesh.lab.pod(number), count=5, interval=0.1) == 5


def test_another_port_is_followed_without_a_new_epoch(mesh):
    before = learned(mesh, 1, 3)
    epochs = [mesh.status(number)["epoch"] for number in (1, 2, 3, 4)]
    mesh.router.ports(42000, 42009)
    with mesh.outage(1, 3, rate=100) as outage:
        mesh.router.flush()
        eventually("1 has learned the new port", lambda: learned(mesh, 1, 3)[1] in range(42000, 42010), 30, 0.3)
        time.sleep(0.5)
    assert learned(mesh, 1, 3) != before
    assert outage.seconds < 5, outage
    measured(f"UDPEncap {mesh.mode}: the NAT gives another port under traffic, until it is followed", outage.seconds)
    assert [mesh.status(number)["epoch"] for number in (1, 2, 3, 4)] == epochs
    for number in (1, 2):
        assert mesh.lab.node(number).audit()["differences"] == []


def test_what_was_learned_outlives_rotations_and_restarts(mesh):
    before = learned(mesh, 1, 3)
    with no_loss(mesh, 1, 3):
        mesh.lab.node(1).ringmail("rotate")
        time.sleep(1.5)
        mesh.lab.node(3).ringmail("rotate")
        time.sleep(1.5)
        mesh.in_order()
    assert learned(mesh, 1, 3) == before
    with mesh.outage(1, 3, rate=100) as outage:
        mesh.lab.node(1).stop()
        time.sleep(0.3)
        mesh.start(1)
        mesh.in_order()
        time.sleep(0.5)
    there, back = outage.results
    assert not there.lost, outage
    assert learned(mesh, 1, 3) == before
    measured(f"UDPEncap {mesh.mode}: lost from behind the NAT while the daemon outside restarts", outage.seconds)


def test_two_nodes_that_say_the_nats_address_cost_nobody_an_epoch(keywatch, request):
    """With --public-ip the port alone is to be learned. The two give their epochs different numbers for those outside."""
    mesh = Running(f"t{os.getpid() % 100000}-said", 4, keywatch, UDPEncap=True)
    request.node.labs = [mesh.lab]
    mesh.subnets()
    try:
        router = Router(mesh, 3, 4)
        router.ports(41000, 41009)
        mesh.start(1, 2)
        mesh.in_order(1, 2)
        epochs = [mesh.status(number)["epoch"] for number in (1, 2)]
        mesh.start(3, 4, env={"FLANNELD_PUBLIC_IP": OUTSIDE})
        for number in (3, 4):
            mesh.in_order(1, 2, number, timeout=60)
        assert mesh.status(3)["epoch"] % 64 != mesh.status(4)["epoch"] % 64
        assert learned(mesh, 1, 3)[0] == learned(mesh, 1, 4)[0] == OUTSIDE
        assert learned(mesh, 1, 3)[1] != learned(mesh, 1, 4)[1]
        pods = mesh.lab.pods()
        for outside in pods[:2]:
            for inside in pods[2:]:
                assert outside.ping(inside) == 1 and inside.ping(outside) == 1
        assert [mesh.status(number)["epoch"] for number in (1, 2)] == epochs
        mesh.lab.wire.assert_clean()
        keywatch.check()
    finally:
        mesh.down()
        subprocess.run(["ip", "netns", "delete", f"{mesh.lab.name}-nat"], check=False)
