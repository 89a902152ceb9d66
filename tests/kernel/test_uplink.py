"""The uplink goes and comes, gets another address, another MTU. No plaintext on the wire, no storm of epochs, and traffic goes
on, or again in the time stated.

A mesh of two nodes for each test: what changes often is answered ever more slowly (src/node/pace.rs), and one test is not to
wait for another's changes. What a network manager would do after the kernel took routes away (the default route),
each test does itself; what is ringmail's is ringmail's to mend."""

import json
import os
import time

import pytest

import netns
from rig import eventually
from running import Running, measured, objects


@pytest.fixture
def mesh(keywatch):
    mesh = Running(f"t{os.getpid() % 100000}-up", 2, keywatch)
    try:
        mesh.subnets()
        mesh.start()
        mesh.in_order()
        mesh.lab.pods()
        yield mesh
    finally:
        mesh.down()


@pytest.fixture(autouse=True)
def watched(request, mesh, keywatch):
    request.node.labs = [mesh.lab]
    mesh.in_order()
    yield
    mesh.in_order()
    assert json.loads(mesh.lab.node(1).ringmail("audit --json"))["ok"]
    mesh.lab.wire.assert_clean()
    keywatch.check()


def epoch(mesh):
    return mesh.status(1)["epoch"]


def begun(mesh):
    return mesh.lab.node(1).log().count("a new epoch begins")


def default_routes(node):
    """What the kernel takes away with a link or an address, and a network manager puts back."""
    node.ip("route replace default via 192.168.77.254 dev eth0", "address replace fd77::1/64 dev eth0 nodad")
    node.run("ip -6 route replace default via fd77::254 dev eth0")


def over_in(outage, since):
    """How long after `since` the last packet was lost, seconds; 0 where none was."""
    return max(0.0, (outage.over or since) - since)


def test_an_uplink_that_goes_down_and_up_changes_no_key_and_nothing_of_ours(mesh):
    node, before, stood = mesh.lab.node(1), epoch(mesh), objects(mesh.lab.node(1))
    with mesh.outage(1, 2) as outage:
        node.run("ip link set eth0 down")
        eventually("status names it", lambda: "no uplink now" in str(mesh.status(1)["problems"]), 5)
        time.sleep(1)
        node.run("ip link set eth0 up")
        default_routes(node)
        up = time.monotonic()
        mesh.in_order()
        time.sleep(1)
    measured("uplink down and up: last packet lost after it was up", over_in(outage, up))
    assert outage.lost and over_in(outage, up) < 1.5, outage
    assert epoch(mesh) == before
    assert objects(node) == stood


def test_carrier_that_flaps_brings_no_epoch_and_costs_only_its_time(mesh):
    before, count = epoch(mesh), begun(mesh)
    wire = mesh.lab.name + "-wire"
    with mesh.outage(1, 2) as outage:
        for _ in range(15):
            netns.run(wire, "ip link set node1 down")
            time.sleep(0.1)
            netns.run(wire, "ip link set node1 up")
            time.sleep(0.1)
        up = time.monotonic()
        mesh.in_order()
        time.sleep(1)
    measured("carrier flapping for 3 s: last packet lost after it was over", over_in(outage, up))
    assert over_in(outage, up) < 1.5, outage
    assert (epoch(mesh), begun(mesh)) == (before, count)


def test_an_address_that_comes_and_goes_quickly_is_no_storm_of_epochs(mesh):
    node, count = mesh.lab.node(1), begun(mesh)
    node.run("sysctl -qw net.ipv4.conf.eth0.promote_secondaries=1")
    started = time.monotonic()
    for _ in range(12):
        node.ip("address add 192.168.77.71/24 dev eth0", "address del 192.168.77.1/24 dev eth0")
        default_routes(node)
        time.sleep(0.15)
        node.ip("address add 192.168.77.1/24 dev eth0", "address del 192.168.77.71/24 dev eth0")
        default_routes(node)
        time.sleep(0.15)
    took = time.monotonic() - started
    mesh.in_order(timeout=90)
    epochs = begun(mesh) - count
    measured(f"an address changed 24 times in {took:.1f} s: epochs, in thousandths of a second each", epochs / 1000)
    assert epochs <= took + 3, epochs


WAYS = {
    "new-first": ("address add 192.168.77.{new}/24 dev eth0", "address del 192.168.77.{old}/24 dev eth0"),
    "old-first": ("address del 192.168.77.{old}/24 dev eth0", "address add 192.168.77.{new}/24 dev eth0"),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_changed_address_is_followed_by_a_new_epoch_and_traffic_goes_on(mesh, way):
    node = mesh.lab.node(1)
    old, new = 1, 81
    before, count = epoch(mesh), begun(mesh)
    time.sleep(2)
    with mesh.outage(1, 2) as outage:
        node.run("sysctl -qw net.ipv4.conf.eth0.promote_secondaries=1")
        node.ip(*(line.format(old=old, new=new) for line in WAYS[way]))
        default_routes(node)
        changed = time.monotonic()
        eventually("a new epoch", lambda: epoch(mesh) > before, 5, 0.05)
        mesh.in_order()
        time.sleep(1)
    measured(f"address changed, {way}: last packet lost after", over_in(outage, changed))
    assert over_in(outage, changed) < 2.5, outage
    assert begun(mesh) == count + 1
    assert mesh.status(1)["public"] == [f"192.168.77.{new}"]
    assert mesh.peer(2, 1)["address"] == f"192.168.77.{new}"


def test_a_lowered_and_raised_mtu_is_followed_and_tcp_goes_on(mesh):
    node, before = mesh.lab.node(1), epoch(mesh)
    link = lambda: json.loads(node.run("ip -j link show dev ringmail0"))[0]["mtu"]  # noqa: E731
    assert link() == 1446
    import threading

    rates = []
    stream = threading.Thread(target=lambda: rates.append(mesh.lab.pod(1).iperf(mesh.lab.pod(2), seconds=6)))
    stream.start()
    time.sleep(2)
    node.run("ip link set eth0 mtu 1300")
    eventually("ringmail0 follows", lambda: link() < 1300, 3, 0.05)
    assert node.subnet_env()["FLANNEL_MTU"] == str(link())
    lowered = link()
    # What no longer fits is told to the pod, which learns it.
    assert mesh.lab.pod(1).ping(mesh.lab.pod(2), size=lowered) == 1
    time.sleep(2)
    node.run("ip link set eth0 mtu 1500")
    eventually("ringmail0 follows", lambda: link() == 1446, 3, 0.05)
    stream.join(60)
    assert rates and rates[0] > 0.001, rates
    assert epoch(mesh) == before


def test_an_uplink_that_is_removed_and_made_anew_is_taken_again(mesh):
    lab, node, before = mesh.lab, mesh.lab.node(1), epoch(mesh)
    with mesh.outage(1, 2) as outage:
        node.run("ip link del eth0")
        eventually("status names it", lambda: "no uplink now" in str(mesh.status(1)["problems"]), 5)
        netns.run(lab.name + "-wire", f"ip link add node1 type veth peer name eth0 netns {node.namespace}")
        netns.run(lab.name + "-wire", "ip link set node1 master wire up")
        node.ip("link set eth0 up", "address add 192.168.77.1/24 dev eth0", "address add fd77::1/64 dev eth0 nodad")
        default_routes(node)
        node.__dict__.pop("mac", None)
        up = time.monotonic()
        mesh.in_order()
        time.sleep(1)
    measured("uplink removed and made anew: last packet lost after it was up", over_in(outage, up))
    assert outage.lost and over_in(outage, up) < 1.5, outage
    assert epoch(mesh) == before


def test_a_node_starts_on_an_uplink_without_carrier_and_serves_once_there_is_one(mesh):
    node, wire = mesh.lab.node(1), mesh.lab.name + "-wire"
    node.stop()
    netns.run(wire, "ip link set node1 down")
    try:
        mesh.start(1)
        eventually("it runs and waits", lambda: {p["state"] for p in mesh.status(1)["peers"]} & {"kept", "waiting"}, 15)
    finally:
        netns.run(wire, "ip link set node1 up")
    up = time.monotonic()
    mesh.in_order()
    measured("from carrier to all peers up", time.monotonic() - up)


def test_an_address_that_another_node_has_too_cuts_those_two_alone_and_is_named(mesh):
    node = mesh.lab.node(1)
    node.run("sysctl -qw net.ipv4.conf.eth0.promote_secondaries=1")
    node.ip("address add 192.168.77.2/24 dev eth0", "address del 192.168.77.1/24 dev eth0")
    default_routes(node)
    try:
        named = lambda: "is also claimed by" in str(mesh.status(1)["problems"])  # noqa: E731
        eventually("status names it", named, 10)
    finally:
        node.ip("address add 192.168.77.1/24 dev eth0", "address del 192.168.77.2/24 dev eth0")
        default_routes(node)
    mesh.in_order()
