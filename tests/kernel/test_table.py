"""Rotation, restarts, faults: what each costs between the pods of three nodes, under load on every way.

One mesh for the file; `load.Load` counts every packet at both ends. Each test prints a row of README's table at the end of
the session. `PYTEST_ARGS=-ktest_table tests/run build kernel` runs this file alone."""

import json
import os
import re
import signal
import statistics
import subprocess
import time

import pytest

import netns
from load import Load
from moves import Moves
from rig import eventually
from running import log_time, measures, milliseconds, objects
from table import Table, nothing_lost, row

ROTATIONS = 20
RESTARTS = 10


@pytest.fixture(scope="module")
def mesh(keywatch):
    mesh = Table(f"t{os.getpid() % 100000}-table", 3, keywatch)
    try:
        mesh.subnets()
        mesh.start()
        mesh.in_order()
        mesh.places = mesh.lab.pods()
        yield mesh
    finally:
        mesh.down()


@pytest.fixture(autouse=True)
def watched(request, keywatch):
    """After each test: nothing of the pods was on the wire, and no outbound key was programmed twice."""
    if "mesh" not in request.fixturenames:
        yield
        return
    mesh = request.getfixturevalue("mesh")
    request.node.labs = [mesh.lab]
    yield
    mesh.lab.wire.assert_clean()
    keywatch.check()


def began(node):
    """When each epoch of a node began: {epoch: monotonic seconds}."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", node.log())
    lines = [line for line in text.splitlines() if "a new epoch begins" in line]
    return {int(re.search(r"epoch=(\d+)", line)[1]): log_time(line) for line in lines}


def times_to_all(mesh, moves, number, since):
    """For each epoch that a node began after `since`: seconds from its begin until the data of the node to all peers, and
    of all peers to it, was on it."""
    others = [node.number for node in mesh.lab.nodes if node.number != number]
    found = []
    for epoch, begin in began(mesh.lab.node(number)).items():
        if begin < since:
            continue
        mod = epoch % 64
        own = {move.subnet: move.at for move in reversed(moves.seen) if move.node == number and move.sender == mod and move.at > begin}
        theirs = {
            move.node: move.at
            for move in reversed(moves.seen)
            if move.node != number and move.subnet == f"10.244.{number}.0/24" and move.receiver == mod and move.at > begin
        }
        assert len(own) == len(others) and len(theirs) == len(others), (epoch, own, theirs)
        found.append(max([*own.values(), *theirs.values()]) - begin)
    return found


def probes(mesh):
    """How many datagrams the daemons have sent: nothing else on a node speaks UDP."""
    lines = [netns.read(node.namespace, "snmp").splitlines() for node in mesh.lab.nodes]
    udp = [[line.split() for line in of if line.startswith("Udp: ")] for of in lines]
    return sum(int(values[names.index("OutDatagrams")]) for names, values in udp)


def writes(mesh):
    """The store's count of its writes."""
    return max(json.loads(path.read_text())["Revision"] for path in mesh.lease_dir.glob("*-24.json"))


def test_rotations_of_one_node(mesh):
    written, sent, since = writes(mesh), probes(mesh), time.monotonic()
    with Moves(mesh.lab.nodes) as moves, Load(mesh, mesh.places) as load:
        for _ in range(ROTATIONS):
            mesh.rotate(1)
            time.sleep(0.2)
    nothing_lost(load)
    times = times_to_all(mesh, moves, 1, since)
    assert len(times) == ROTATIONS
    written, sent = writes(mesh) - written, probes(mesh) - sent
    assert written == ROTATIONS, written
    row(
        mesh,
        f"{ROTATIONS} rotations of one node",
        load,
        f"new epoch on all peers both ways after {milliseconds(statistics.median(times))} (median; at most "
        f"{milliseconds(max(times))}); a rotation: {written / ROTATIONS:.0f} write, {sent / ROTATIONS:.0f} probes",
    )
    mesh.in_order()


def test_rotation_of_an_idle_mesh_is_a_matter_of_round_trips(mesh):
    since = time.monotonic()
    with Moves(mesh.lab.nodes) as moves:
        for _ in range(5):
            mesh.rotate(1)
            time.sleep(0.2)
            time.sleep(0.5)
    times = times_to_all(mesh, moves, 1, since)
    measures.append(f"without load, from a new epoch's begin to all peers' data both ways: {milliseconds(statistics.median(times))}")


def test_crossing_rotations_of_all(mesh):
    written, sent, since = writes(mesh), probes(mesh), time.monotonic()
    with Load(mesh, mesh.places) as load:
        for _ in range(ROTATIONS):
            mesh.rotate(1, 2, 3)
            time.sleep(0.2)
    nothing_lost(load)
    assert all(len([at for at in began(node).values() if at > since]) == ROTATIONS for node in mesh.lab.nodes)
    written, sent = writes(mesh) - written, probes(mesh) - sent
    assert written == 3 * ROTATIONS, written
    row(
        mesh,
        f"{ROTATIONS} crossing rotations of all",
        load,
        f"a rotation of all three: {written / ROTATIONS:.0f} writes, {sent / ROTATIONS:.0f} probes",
    )
    mesh.in_order()


@pytest.mark.parametrize("way", [signal.SIGTERM, signal.SIGKILL])
def test_restarts_of_each_daemon_in_turn(mesh, way):
    with Load(mesh, mesh.places) as load:
        for turn in range(RESTARTS):
            mesh.end(turn % 3 + 1, way)
            mesh.start(turn % 3 + 1)
            mesh.in_order()
    nothing_lost(load)
    row(mesh, f"{way.name} and restart, {RESTARTS} times, each daemon in turn", load)


def test_restarts_at_the_worst_moments(mesh):
    """In the middle of a rotation; twice within a second; while a peer restarts; after a hang in which the peers went on to
    newer epochs, so that the kernel is behind the store."""
    with Load(mesh, mesh.places) as load:
        for delay in (0, 0.005, 0.01, 0.02, 0.05, 0.1):
            mesh.ask(1, "rotate")
            time.sleep(delay)
            mesh.end(1)
            mesh.start(1)
            mesh.in_order()
        for _ in range(3):
            mesh.end(1)
            mesh.start(1)
            time.sleep(0.3)
            mesh.end(1)
            mesh.start(1)
            mesh.in_order()
        for together in ((1, 2), (1, 2, 3)):
            for number in together:
                os.kill(mesh.lab.node(number).pid, signal.SIGKILL)
            for number in together:
                eventually("its end", lambda: mesh.lab.node(number).pid is None, 10, 0.01)  # noqa: B023
                mesh.start(number)
            mesh.in_order()
        os.kill(mesh.lab.node(1).pid, signal.SIGSTOP)
        for _ in range(2):
            for number in (2, 3):
                mesh.ask(number, "rotate")
                time.sleep(0.5)
        mesh.end(1)
        mesh.start(1)
        mesh.in_order()
    nothing_lost(load)
    row(mesh, "restarts in the middle of rotations, twice within a second, of two and of all at once, after a hang", load)


def remount(mesh, how):
    subprocess.run(["mount", "-o", f"remount,{how}", mesh.store], check=True)


def test_a_store_that_is_away_for_half_a_minute(mesh):
    """First the folder is gone, and a daemon that is started meanwhile ends; then it can be read and not written, and one
    that is started serves and can't publish."""
    one, away = mesh.lab.node(1), mesh.lease_dir.with_name("away")
    with Load(mesh, mesh.places) as load:
        begun = time.monotonic()
        mesh.lease_dir.rename(away)
        time.sleep(5)
        mesh.end(1)
        mesh.start(1)
        eventually("the daemon ends without a store", lambda: one.pid is None, 10)
        assert "open the store" in one.log().splitlines()[-1], one.log()[-500:]
        time.sleep(max(0, begun + 15 - time.monotonic()))
        away.rename(mesh.lease_dir)
        remount(mesh, "ro")
        try:
            mesh.start(1)
            eventually("status names it", lambda: "read-only" in str(mesh.status(1)["problems"]), 20)
            time.sleep(max(0, begun + 30 - time.monotonic()))
        finally:
            remount(mesh, "rw")
        mesh.in_order(timeout=60)
    nothing_lost(load)
    row(mesh, "store away for 15 s and read-only for 15 s, one daemon restarted in each", load)


def test_a_state_flush(mesh):
    node, since = mesh.lab.node(1), time.monotonic()
    time.sleep(1)
    with Load(mesh, mesh.places) as load:
        time.sleep(1)
        node.run("ip xfrm state flush")
        eventually("a new epoch", lambda: max(began(node).values()) > since, 5, 0.02)
        mesh.in_order()
        time.sleep(1)
    assert 0 < load.lost and not load.broken, load
    assert load.outage() < 1, load
    row(mesh, "`ip xfrm state flush` on a node", load, f"outage {milliseconds(load.outage())}")


# What a reboot takes from a node, all but its pods' veths, which stand for the pods that come back.
REBOOT = """
ip link set cni0 down
ip xfrm state flush
ip xfrm policy flush
ip link del ringmail0
ip route flush proto 114
iptables-legacy -t raw -F; iptables-legacy -t raw -X; iptables-legacy -t mangle -F; iptables-legacy -t mangle -X
iptables-legacy -t nat -F; iptables-legacy -t nat -X; iptables-legacy -t filter -F; iptables-legacy -t filter -X
rm -r {directory}/run {directory}/subnet.env
mkdir {directory}/run
"""


def test_a_reboot(mesh):
    """Killed, wiped, started: its pods go on once the daemon has written subnet.env, as on a node that comes back."""
    node = mesh.lab.node(3)
    with Load(mesh, mesh.places) as load:
        time.sleep(1)
        mesh.end(3)
        down = time.monotonic()
        node.run(REBOOT.format(directory=node.directory))
        assert not node.sas() and not [line for line in objects(node) if "10.244" in line and "cni0" not in line]
        mesh.start(3)
        node.ready(60)
        node.run("ip link set cni0 up")
        back = time.monotonic()
        mesh.in_order()
        time.sleep(1)
    epoch = max(began(node).values())
    assert not load.broken, load
    assert 0 < load.lost and load.over() - max(epoch, back) < 1, load
    others = [stream for stream in load.streams if 3 not in (stream["from"], stream["to"])]
    assert not any(stream["lost"] for stream in others), load
    row(
        mesh,
        "reboot of a node",
        load,
        f"all lost between that node's pods and others, none else; down for {milliseconds(back - down)}, "
        f"the last packet lost {milliseconds(load.over() - epoch)} after its new epoch began",
    )
