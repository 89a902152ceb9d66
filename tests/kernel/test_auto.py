"""UDPEncap "auto": plain ESP where it passes, UDP where it does not, and back, for each pair and direction by itself.

What the wire between two nodes drops is dropped at the receiver's uplink, before its IPsec sees it (iptables, table raw).
Losses are counted by the numbers of the packets. A change that is noticed by probes costs what is sent until then; all
other changes cost nothing."""

import json
import os
import re
import time

import pytest

from rig import eventually
from running import Running, measured

BLOCKED = 5  # seconds at most from the first packet lost to the last when a carrier stops passing: 3, and what a busy machine adds


@pytest.fixture(scope="module")
def mesh(keywatch):
    """Three nodes in auto mode, up for each other."""
    mesh = Running(f"t{os.getpid() % 100000}-auto", 3, keywatch, UDPEncap="auto")
    mesh.subnets()
    try:
        mesh.start()
        mesh.in_order()
        for node in mesh.lab.nodes:
            mesh.lab.make_pod(node.number)
        yield mesh
    finally:
        mesh.down()


@pytest.fixture(autouse=True)
def checked(request, keywatch):
    """Nothing in plaintext and no key twice, after every test."""
    if "mesh" not in request.fixturenames:
        yield
        return
    mesh = request.getfixturevalue("mesh")
    request.node.labs = [mesh.lab]
    yield
    mesh.lab.wire.assert_clean()
    keywatch.check()


def carriers(mesh):
    """{(from, to): "esp" or "udp"}: what each node says that its data goes in."""
    number = {str(node): node.number for node in mesh.lab.nodes}
    peers = {one: mesh.status(one)["peers"] for one in number.values()}
    return {(one, number[peer["node"]]): peer["encap"] for one in peers for peer in peers[one]}


def in_udp(mesh, *pairs, timeout=20):
    """Waits until the data of these ordered pairs goes in UDP, and all other in plain ESP."""

    def as_wanted():
        return all((carrier == "udp") == (pair in pairs) for pair, carrier in carriers(mesh).items())

    eventually(f"{pairs or 'none'} use UDP", as_wanted, timeout, 0.5)


class Block:
    """Plain ESP, or another protocol, from one node to another is dropped while the `with` runs, but for between `lift`
    and `put`."""

    def __init__(self, mesh, *ways, protocol="esp"):
        self.there = False
        self.rules = [
            (mesh.lab.node(to), f"PREROUTING -i eth0 -s {mesh.lab.node(source).address()} -p {protocol} -j DROP")
            for source, to in ways
        ]

    def _each(self, verb, there):
        if self.there != there:
            for node, rule in self.rules:
                node.iptables(f"-t raw {verb} {rule}")
        self.there = there

    def put(self):
        self._each("-I", True)

    def lift(self):
        self._each("-D", False)

    def __enter__(self):
        self.put()
        return self

    def __exit__(self, *_):
        self.lift()


def seen_on_wire(mesh, source, to, count):
    """What large packets from one node to another travel in: more than probes do, but for those of full size, which go as data
    does."""
    mesh.lab.wire.tunnel.clear()
    mesh.lab.pod(source).ping(mesh.lab.pod(to), count=count, interval=0.01, size=600)
    mesh.lab.wire.settle()
    address = [bytes(map(int, mesh.lab.node(number).address().split("."))) for number in (source, to)]
    frames = [frame.data for frame in mesh.lab.wire.tunnel if frame.data[26:34] == b"".join(address)]
    return {{50: "esp", 17: "udp"}[frame[23]] for frame in frames if len(frame) > 600}


def test_where_plain_esp_passes_it_is_used_and_room_is_kept_for_udp(mesh):
    in_udp(mesh, timeout=5)
    assert mesh.lab.pod(1).ping(mesh.lab.pod(2), count=5, interval=0.05) == 5
    assert seen_on_wire(mesh, 1, 2, 20) == {"esp"}
    env = mesh.lab.node(1).subnet_env()
    assert env["FLANNEL_MTU"] == "1438", env
    sas = [sa["spi"] >> 31 for sa in mesh.lab.node(1).sas()]
    assert sorted(sas) == [0] * 4 + [1] * 4, "a generation has an SA a carrier, each way"
    for number in (1, 2, 3):
        assert mesh.lab.node(number).audit()["differences"] == []


@pytest.mark.parametrize("signal", ["TERM", "KILL"])
def test_a_restart_loses_nothing_on_plain_esp(mesh, signal):
    with mesh.outage(1, 2, rate=200) as outage:
        mesh.lab.node(2).stop(signal)
        time.sleep(0.5)
        mesh.start(2)
        mesh.in_order()
        time.sleep(0.5)
    assert not outage.lost, outage
    in_udp(mesh, timeout=5)
    assert "takes another carrier" not in mesh.lab.node(2).log()


def test_esp_blocked_both_ways_takes_that_pair_to_udp_and_rotations_lose_nothing_there_nor_the_way_back(mesh):
    with Block(mesh, (1, 2), (2, 1)) as block:
        block.lift()
        with mesh.lab.flow(3, 1, rate=200, port=7710) as beside, mesh.outage(1, 2, rate=200) as outage:
            block.put()
            in_udp(mesh, (1, 2), (2, 1))
        assert not beside.result.lost, beside.result
        assert 0 < outage.seconds < BLOCKED, outage
        measured("plain ESP blocked both ways, until data is on UDP", outage.seconds)
        line = next(line for line in mesh.lab.node(1).log().splitlines() if "takes another carrier" in line)
        assert "node2" in line and "not answered" in line, line
        with mesh.lab.flow(3, 1, rate=200, port=7710) as beside, mesh.outage(1, 2, rate=200) as outage:
            for number in (1, 2, 3, 1):
                mesh.lab.node(number).ringmail("rotate")
                time.sleep(1.2)
            mesh.in_order()
        assert not outage.lost and not beside.result.lost, (outage, beside.result)
        in_udp(mesh, (1, 2), (2, 1))
    for number in (1, 2, 3):
        assert mesh.lab.node(number).audit()["differences"] == []
    with mesh.outage(1, 2, rate=200) as outage:
        in_udp(mesh, timeout=60)
        time.sleep(0.5)
    assert not outage.lost, outage
    assert seen_on_wire(mesh, 1, 2, 20) == {"esp"}


def test_esp_blocked_one_way_moves_that_way_alone_and_a_restart_keeps_it(mesh):
    with Block(mesh, (1, 2)) as block:
        block.lift()
        with mesh.outage(1, 2, rate=200) as outage:
            block.put()
            in_udp(mesh, (1, 2))
        there, back = outage.results
        assert not back.lost, back
        assert 0 < outage.seconds < BLOCKED, outage
        measured("plain ESP blocked one way, until data is on UDP", outage.seconds)
        assert mesh.peer(1, of=2)["state"] == "up"
        time.sleep(2)
        why = mesh.peer(1, of=2)["detour"]
        assert re.fullmatch(r"plain ESP has not been answered for \d+ s", why), why
        assert why.rsplit(" ", 2)[0] in " ".join(mesh.lab.node(1).ringmail("status").split())
        in_udp(mesh, (1, 2))
        assert seen_on_wire(mesh, 2, 1, 10) == {"esp"}
        assert seen_on_wire(mesh, 1, 2, 10) == {"udp"}
        # The one that goes on sends in plain ESP, and has its socket: nothing is lost either way.
        with mesh.outage(1, 2, rate=200) as outage:
            mesh.lab.node(1).stop()
            time.sleep(0.5)
            mesh.start(1)
            mesh.in_order()
            time.sleep(0.5)
        assert not outage.lost, outage
        in_udp(mesh, (1, 2))
        # UDP fails instead.
        with mesh.outage(1, 2, rate=200) as outage, Block(mesh, (1, 2), protocol="udp --dport 4500"):
            block.lift()
            in_udp(mesh)
        assert outage.seconds < BLOCKED, outage
        measured("UDP blocked one way and plain ESP free, until data is on plain ESP", outage.seconds)


def test_first_contact_with_esp_blocked_takes_half_a_second_more(mesh):
    mesh.lab.node(3).stop()
    mesh.lab.node(3).ringmail("cleanup")
    with Block(mesh, (1, 3), (3, 1), (2, 3), (3, 2)):
        mesh.had(mesh.lab.node(3))
        begun = time.monotonic()
        mesh.start(3)
        mesh.in_order()
        measured("first contact with plain ESP blocked, from the start of the daemon", time.monotonic() - begun)
        in_udp(mesh, (1, 3), (3, 1), (2, 3), (3, 2))
        lines = [line for line in mesh.lab.node(3).log().splitlines() if "data has a carrier" in line]
        assert len(lines) >= 2 and all(re.search(r"carrier.*udp", line) for line in lines[-2:]), lines
    in_udp(mesh, timeout=40)


# --- nodes of different minds -----------------------------------------------------------------------------------------


def test_nodes_of_different_modes_agree(keywatch, request):
    """One wants UDP, one plain ESP, two leave it open: each pair does what the table in the README says."""
    mesh = Running(f"t{os.getpid() % 100000}-mixed", 4, keywatch)
    request.node.labs = [mesh.lab]
    mesh.subnets()
    try:
        (mesh.lease_dir / "net-conf.json").unlink()
        for node, mode in zip(mesh.lab.nodes, [True, False, "auto", "auto"], strict=True):
            conf = node.directory / "net-conf.json"
            conf.write_text(json.dumps({"Network": "10.244.0.0/16", "Backend": {"Type": "ipsec", "UDPEncap": mode}}))
            node.start(*mesh.flags, "--net-config-path", str(conf))
        mesh.in_order()
        wanted = {pair: "udp" if 1 in pair else "esp" for pair in carriers(mesh)}
        assert carriers(mesh) == wanted
        pods = mesh.lab.pods()
        for one in pods:
            for other in pods:
                assert one is other or one.ping(other) == 1
        spis = {sa["spi"] >> 31 for sa in mesh.lab.node(2).sas() if sa["reqid"] & 0xFFFFF == 3}
        assert spis == {0}, "between plain ESP and open there is no second SA"
        mesh.lab.wire.assert_clean()
        keywatch.check()
    finally:
        mesh.down()
