"""Meshes of every address family, with ESP alone and with ESP in UDP, whose nodes use three ciphers side by side: all
pairs talk, and the MTU is the largest that fits, to the byte. One of them becomes a mesh in which only one node wants UDP."""

import json

import pytest

from rig import eventually
from traffic import CIPHERS, Echo, TooBig, close, esp_size, inner_mtu, make_mesh, nothing_leaks, numbered, unanswered  # noqa: F401

MESHES = {
    "IPv4 in UDP": ((4,), True),
    "IPv4": ((4,), False),
    "IPv6": ((6,), False),
    "IPv6 in UDP": ((6,), True),
    "both in UDP": ((4, 6), True),
}


@pytest.fixture(scope="module", params=MESHES, ids=lambda name: name.replace(" ", "-"))
def mesh(request, make_mesh):
    """Three nodes, each with a cipher of its own. mesh.encap: whether ESP travels in UDP."""
    families, encap = MESHES[request.param]
    mesh = make_mesh(3, families=families)
    mesh.encap = encap
    for number, cipher in enumerate(CIPHERS, 1):
        mesh.launch(number, UDPEncap=encap, ESPProposal=cipher)
    mesh.settle()
    yield mesh
    close(mesh)


def pods(mesh):
    return {f"pod{number}": mesh.pod(number) for number in mesh.members}


def all_pairs_talk(mesh):
    places = pods(mesh)
    for family in mesh.families:
        addresses = {name: pod.address(family) for name, pod in places.items()}
        assert not unanswered(places, addresses, family)
        assert not unanswered({f"node{n}": mesh.node(n) for n in mesh.members}, addresses, family)
        arrived, seen = numbered(places, family)
        assert all(numbers == list(range(10)) for numbers in arrived.values()), arrived
        assert seen == set(addresses.items())


def test_all_pairs_of_all_ciphers_talk(mesh):
    all_pairs_talk(mesh)
    mesh.wire.settle()
    used, unused = ("udp4500", "esp") if mesh.encap else ("esp", "udp4500")
    assert mesh.wire.counts[used] > 50 and mesh.wire.counts[unused] == 0, mesh.wire.counts
    assert mesh.wire.counts["tunnel"] >= mesh.wire.counts[used]


def test_a_packet_that_is_cut_arrives(mesh):
    """Where the node's connection tracking puts IPv4 together before it is encrypted, the kernel cuts the ESP."""
    mesh.cuts = 4 in mesh.families
    for family in mesh.families:
        places = pods(mesh)
        addresses = {name: pod.address(family) for name, pod in places.items()}
        assert not unanswered(places, addresses, family, count=2, size=3000)


def test_each_direction_has_the_senders_cipher_and_the_audit_is_content(mesh):
    for number, cipher in enumerate(CIPHERS, 1):
        status = mesh.node(number).status()
        assert status["cipher"] == cipher and [peer["state"] for peer in status["peers"]] == ["up", "up"]
        assert {peer["encap"] for peer in status["peers"]} == {"udp" if mesh.encap else "esp"}
        assert {":" in peer["address"] for peer in status["peers"]} == {mesh.outer == 6}
        audit = json.loads(mesh.node(number).ringmail("audit", "--json"))
        assert audit["ok"] is True and audit["plaintext"] == [] and audit["differences"] == []
        found = sorted((sa["direction"], sa["sender"][-1], sa["cipher"]) for sa in audit["associations"])
        others = [other for other in (1, 2, 3) if other != number]
        inward = [("in", str(other), CIPHERS[other - 1]) for other in others]
        assert found == inward + [("out", str(number), cipher)] * 2, found


def test_the_mtu_is_the_largest_that_fits_to_the_byte(mesh):
    mtu = inner_mtu(mesh.uplink_mtu, mesh.outer, mesh.encap)
    assert esp_size(mtu, mesh.outer, mesh.encap) <= mesh.uplink_mtu < esp_size(mtu + 1, mesh.outer, mesh.encap)
    fragments = mesh.fragments()
    mesh.wire.settle()
    mesh.wire.tunnel.clear()
    for number in mesh.members:
        assert int(mesh.node(number).subnet_env()["FLANNEL_MTU"]) == mtu
        target = mesh.pod(number % 3 + 1)
        for family in mesh.families:
            for place in (mesh.pod(number), mesh.node(number)):
                with Echo(place, family, whole=True) as echo:
                    assert echo.answered(target.address(family), mtu), f"{place} IPv{family}: {mtu} bytes are lost"
                    assert not echo.answered(target.address(family), mtu + 1), f"{place} IPv{family}: {mtu + 1} bytes fit"
                    assert echo.too_big() == TooBig("local", mtu, None), f"{place} IPv{family}"
    mesh.wire.settle()
    largest = max(len(frame.data) - 14 for frame in list(mesh.wire.tunnel))
    assert largest == esp_size(mtu, mesh.outer, mesh.encap)
    assert mesh.pod(1).ping(mesh.pod(2), mesh.outer, size=mtu) == 1
    assert mesh.pod(1).ping(mesh.pod(2), mesh.outer, size=mtu + 1, timeout=1) == 0
    assert mesh.fragments() == fragments


def widen(mesh, number, mtu):
    """Gives the way between a pod and its node another MTU, so that the node is a router with a narrow way out."""
    mesh.node(number).ip(f"link set cni0 mtu {mtu}", f"link set pod mtu {mtu}")
    mesh.pod(number).ip(f"link set eth0 mtu {mtu}")


def test_a_node_tells_a_pod_with_a_wide_device_how_much_fits(mesh):
    mtu = inner_mtu(mesh.uplink_mtu, mesh.outer, mesh.encap)
    fragments = mesh.fragments()
    for number in mesh.members:
        target = mesh.pod(number % 3 + 1)
        widen(mesh, number, mesh.uplink_mtu)
        for family in mesh.families:
            with Echo(mesh.pod(number), family, whole=True) as echo:
                assert echo.answered(target.address(family), mtu)
                assert echo.too_big() is None
                assert not echo.answered(target.address(family), mtu + 1)
                assert echo.too_big() == TooBig("icmp", mtu, mesh.bridge(number, family))
                assert not echo.answered(target.address(family), mtu + 1), "learned"
                assert echo.too_big() == TooBig("local", mtu, None)
                assert echo.answered(target.address(family), mtu)
    assert mesh.pod(2).iperf(mesh.pod(3), 1, family=mesh.outer) > 0.005, "TCP whose MSS is too large at first"
    assert mesh.fragments() == fragments
    for number in mesh.members:
        widen(mesh, number, mtu)


# --- one node wants UDP, the others do not ----------------------------------------------------------------------------------

ONLY_IN_UDP = pytest.mark.parametrize("mesh", ["IPv4 in UDP"], indirect=True)


@pytest.fixture(scope="module")
def mixed(mesh):
    """Nodes 2 and 3 have changed their minds, by their configuration, without a restart."""
    for number in (2, 3):
        mesh.conf(number, UDPEncap=False, ESPProposal=CIPHERS[number - 1])
    for number in (2, 3):
        eventually(f"node {number} does not want UDP", lambda: mesh.node(number).status()["encap"] == "false", 20, 0.3)
    for number in (2, 3):
        between = lambda: mesh.peer(number, 5 - number)["encap"] == "esp"  # noqa: E731
        eventually("nodes 2 and 3 talk without UDP", lambda: between() and mesh.all_up(number), 20, 0.3)
    for number in (1, 2, 3):
        mesh.make_pod(number)
    return mesh


@ONLY_IN_UDP
def test_a_node_that_wants_udp_talks_with_nodes_that_do_not(mixed):
    mixed.wire.tunnel.clear()
    all_pairs_talk(mixed)
    for number, expected in ((1, {2: "udp", 3: "udp"}), (2, {1: "udp", 3: "esp"}), (3, {1: "udp", 2: "esp"})):
        assert {other: mixed.peer(number, other)["encap"] for other in expected} == expected
        assert json.loads(mixed.node(number).ringmail("audit", "--json"))["ok"] is True
    mixed.wire.settle()
    assert mixed.wire.counts["esp"] > 20
    kinds = {frozenset(ends(frame)): mixed.wire.kinds.kind(frame.data) for frame in list(mixed.wire.tunnel)}
    assert kinds == {
        frozenset({"192.168.77.1", "192.168.77.2"}): "udp4500",
        frozenset({"192.168.77.1", "192.168.77.3"}): "udp4500",
        frozenset({"192.168.77.2", "192.168.77.3"}): "esp",
    }


def ends(frame):
    return [".".join(map(str, frame.data[at : at + 4])) for at in (26, 30)]


@ONLY_IN_UDP
def test_the_way_to_the_node_that_wants_udp_is_narrower_than_the_mesh(mixed):
    wide, narrow = inner_mtu(1500, 4, False), inner_mtu(1500, 4, True)
    assert [int(mixed.node(number).subnet_env()["FLANNEL_MTU"]) for number in (1, 2, 3)] == [narrow, wide, wide]
    fragments = mixed.fragments()
    with Echo(mixed.pod(2), 4, whole=True) as echo:
        assert echo.answered(mixed.pod(3).address(), wide)
        assert echo.answered(mixed.pod(1).address(), narrow)
        assert not echo.answered(mixed.pod(1).address(), narrow + 1)
        assert echo.too_big() == TooBig("icmp", narrow, mixed.bridge(2, 4))
    with Echo(mixed.node(2), 4, whole=True) as echo:
        assert echo.answered(mixed.pod(1).address(), narrow)
        assert not echo.answered(mixed.pod(1).address(), narrow + 1)
        assert echo.too_big() == TooBig("local", narrow, None)
    assert mixed.fragments() == fragments
