"""Keys change under traffic between all pairs of three nodes: not one packet lost, none in plaintext (the fixture looks)."""

import contextlib
import hashlib
import hmac
import itertools
import os
import time

import pytest

from flow import PORT
from forger import Psk
from rig import eventually
from running import Running, in_memory, measured, measures

NETWORK = "10.244.0.0/16"
NODES = (1, 2, 3)
ORDERS = list(itertools.permutations(NODES))


def key(number):
    """PSK number `number`; all differ."""
    return f"key number {number:04} of these tests, long enough"


def kid(number):
    return Psk(key(number), NETWORK).kid.hex()


class Mesh(Running):
    """Every node has a PSK file of its own, to be changed in place."""

    def __init__(self, name, keywatch):
        super().__init__(name, 3, keywatch)
        self.number = 1
        for number in NODES:
            self.give(number, 1)

    def file(self, number):
        return self.folder / f"psk{number}"

    def give(self, number, psk):
        """Writes PSK number `psk` into a node's file, in place."""
        self.write_psk(key(psk), self.file(number))

    def anew(self):
        """New processes, which have begun no epoch lately: what repeats is answered ever more slowly."""
        for number in NODES:
            self.lab.node(number).stop()
        for number in NODES:
            self.run(number)
        self.in_order()

    def run(self, number, psk_file=None):
        flags = ["--lease-dir", str(self.lease_dir), "--psk-file", str(psk_file or self.file(number))]
        self.lab.node(number).start(*flags)

    def psks(self, number):
        """What a node says of its PSKs, by kid."""
        return {psk["kid"]: psk for psk in self.status(number)["psks"]}

    def hold(self, *numbers, timeout=40):
        """Waits until every node holds just these PSKs."""
        wanted = [kid(number) for number in numbers]
        for number in NODES:
            same = lambda: [psk["kid"] for psk in self.status(number)["psks"]] == wanted  # noqa: B023, E731
            eventually(f"node {number} holds {wanted}", same, timeout, 0.5)
        self.in_order()

    @contextlib.contextmanager
    def flows(self, pairs=None, rate=100, size=100, port=PORT + 10):
        """Flows between all pairs while the body runs, on ports from `port` on; a list of them."""
        pairs = pairs or list(itertools.permutations(NODES, 2))
        with contextlib.ExitStack() as stack:
            flows = [
                self.lab.flow(one, two, rate=rate, size=size, port=port + at)
                for at, (one, two) in enumerate(pairs)
            ]
            for flow in flows:
                stack.enter_context(flow)
            yield flows

    def name(self, number):
        return self.lab.node(number).namespace

    def reason(self, one, other):
        return (self.peer(one, other) or {}).get("reason") or ""


def assert_none_lost(what, flows):
    results = [flow.result for flow in flows]
    sent, lost = (sum(count) for count in zip(*((result.sent, len(result.lost)) for result in results)))
    longest = max(result.gap for result in results)
    measures.append(f"{what}: {lost} of {sent} packets lost, longest gap {longest * 1000:.0f} ms")
    assert sent > 100 and not lost, "\n".join(map(repr, results))


@pytest.fixture(scope="module")
def mesh(keywatch):
    mesh = Mesh(f"t{os.getpid() % 100000}-psk", keywatch)
    try:
        mesh.subnets()
        for number in NODES:
            mesh.run(number)
        mesh.lab.pods()
        mesh.in_order()
        yield mesh
        mesh.lab.wire.assert_clean()
    finally:
        mesh.down()


@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_a_psk_changed_in_place_node_after_node_loses_no_packet_and_is_wiped(mesh, order):
    mesh.anew()
    old, mesh.number = mesh.number, mesh.number + 1
    prk = lambda number: hmac.digest(b"ringmail v1 psk", key(number).encode(), hashlib.sha256)  # noqa: E731
    pids = [node.pid for node in mesh.lab.nodes]
    assert all(in_memory(pid, prk(old)) for pid in pids), "what is held can be found"
    with mesh.flows() as flows:
        for at, number in enumerate(order):
            mesh.give(number, mesh.number)
            changed = time.monotonic()
            time.sleep(3)
            psk = mesh.psks(number)[kid(mesh.number)]
            late = sorted(mesh.name(other) for other in order[at + 1 :])
            assert (psk["have"], psk["nodes"], sorted(psk["missing"])) == (at + 1, 3, late), (number, psk)
        mesh.hold(mesh.number)
        measured("from the last node's new PSK until no node holds the old", time.monotonic() - changed)
    assert_none_lost(f"PSK changed in place, 3 s apart, on nodes {order}", flows)
    assert [node.pid for node in mesh.lab.nodes] == pids
    assert all(in_memory(pid, prk(mesh.number)) for pid in pids)
    for secret in (prk(old), key(old).encode(), key(mesh.number).encode()):
        assert not any(in_memory(pid, secret) for pid in pids), "a dropped PSK, or a file's bytes, are still there"


def swap(folder, *numbers):
    """What Kubernetes does to a mounted Secret: a new hidden folder, and one link swapped."""
    content = folder / f"..{time.monotonic_ns()}"
    content.mkdir(parents=True)
    for number in numbers:
        file = content / f"key-{number}"
        file.touch(mode=0o600)
        file.write_text(key(number))
        link = folder / file.name
        if not link.is_symlink():
            link.symlink_to(f"..data/{file.name}")
    fresh = folder / "..data_tmp"
    fresh.symlink_to(content.name)
    fresh.rename(folder / "..data")
    for link in folder.glob("key-*"):
        if not link.exists():
            link.unlink()


def test_a_secret_with_two_keys_changes_node_by_node_without_loss(mesh):
    old, new = mesh.number, mesh.number + 1
    mesh.number = new
    folders = {number: mesh.folder / f"secret{number}" for number in NODES}
    with mesh.flows() as flows:
        for number, folder in folders.items():
            swap(folder, old)
            mesh.lab.node(number).stop()
            mesh.run(number, folder)
        mesh.hold(old)
        for at, number in enumerate(NODES):
            swap(folders[number], old, new)
            known = lambda: kid(new) in mesh.psks(number)  # noqa: B023, E731
            eventually(f"node {number} has both", known, 5)
            psk = mesh.psks(number)[kid(new)]
            assert psk["have"] == at + 1 and not psk["withdrawn"], psk
        mesh.hold(new, old)
        text = mesh.lab.node(1).ringmail("status")
        assert f"{kid(new)}, all 3 nodes have it" in text and f"{kid(old)}, all 3 nodes have it" in text, text
        for number in NODES:
            swap(folders[number], new)
        mesh.hold(new)
        for number in NODES:
            mesh.give(number, new)
            mesh.lab.node(number).stop()
            mesh.run(number)
        mesh.hold(new)
    assert_none_lost("a Secret with a second key, then without the first, and two restarts of each node", flows)


def test_who_has_only_a_removed_key_is_warned_of_then_cut_and_comes_back_with_the_new(mesh):
    mesh.anew()
    old = mesh.number
    mesh.number += 1
    mesh.configure(PSKGrace="15s")
    time.sleep(2)
    with mesh.flows([(1, 2), (2, 1)]) as flows:
        for number in (1, 2):
            mesh.give(number, mesh.number)
        begun = time.monotonic()
        text = f"1 node still needs key {kid(old)}, which was taken from this node: {mesh.name(3)}; it is dropped in"
        for number in (1, 2):
            warned = lambda: any(text in problem for problem in mesh.status(number)["problems"])  # noqa: B023, E731
            eventually(f"node {number} warns", warned, 5)
            assert "a PSK was taken away that peers still need" in mesh.lab.node(number).log()
        assert mesh.lab.pod(1).ping(mesh.lab.pod(3)) == 1, "it is served meanwhile"
        why = f"it has only PSK {kid(old)}, which was taken from this node and dropped; give it {kid(mesh.number)}"
        for number in (1, 2):
            eventually(f"node {number} cuts node 3", lambda: mesh.reason(number, 3) == why, 30, 0.2)  # noqa: B023
        measured("PSKGrace of 15 s, until who has only the old key is cut", time.monotonic() - begun)
        address = mesh.lab.node(3).address()
        gone = lambda: address not in mesh.lab.node(1).run("ip xfrm state list nokeys")  # noqa: E731
        eventually("no SA of it is left", gone, 5)
        assert mesh.lab.pod(1).ping(mesh.lab.pod(3), timeout=1) == 0
        assert mesh.lab.pod(3).ping(mesh.lab.pod(1), timeout=1) == 0
        alone = "no other node has a PSK of this one, 2 nodes have another: is this node's the right one?"
        eventually("node 3 doubts its own", lambda: alone in mesh.status(3)["problems"], 5)
        assert mesh.psks(1)[kid(mesh.number)]["missing"] == [mesh.name(3)]
        begun = time.monotonic()
        mesh.give(3, mesh.number)
        mesh.in_order()
        measured("from the new PSK on the last node until all are up", time.monotonic() - begun)
    assert_none_lost("a node without the new PSK is cut and comes back: the others", flows)
    assert mesh.lab.pod(1).ping(mesh.lab.pod(3)) == 1
    mesh.hold(mesh.number)


def test_a_wrong_psk_is_named_by_the_others_and_by_itself_and_picked_up_when_corrected(mesh):
    mesh.anew()
    right, wrong = mesh.number, 9999
    mesh.configure(PSKGrace="10s")
    time.sleep(2)
    with mesh.flows([(1, 2), (2, 1)]) as flows:
        with mesh.flows([(1, 3), (3, 1)], port=PORT + 20) as meanwhile:
            mesh.give(3, wrong)
            said = lambda: any(f"2 nodes still need key {kid(right)}" in one for one in mesh.status(3)["problems"])  # noqa: E731
            eventually("it says at once that nobody else has it", said, 5)
            time.sleep(2)
        assert_none_lost("a wrong PSK, while the right one is held on", meanwhile)
        text = f"no common PSK: it has {kid(wrong)}, this node has {kid(right)}; give both nodes the same key"
        for number in (1, 2):
            eventually(f"node {number} names it", lambda: text in mesh.reason(number, 3), 30, 0.2)  # noqa: B023
        alone = "no other node has a PSK of this one, 2 nodes have another: is this node's the right one?"
        eventually("it doubts its own", lambda: alone in mesh.status(3)["problems"], 5)
        assert f"it has only PSK {kid(right)}, which was taken from this node" in mesh.reason(3, 1)
        begun = time.monotonic()
        mesh.give(3, right)
        mesh.in_order()
        measured("from the corrected PSK until all are up", time.monotonic() - begun)
    assert_none_lost("a node with a wrong PSK, and corrected: the others", flows)
    mesh.hold(right)


def test_a_restart_in_a_rotation_names_who_has_only_the_old_key_and_goes_on_with_the_new(mesh):
    mesh.anew()
    mesh.configure()
    old = mesh.number
    mesh.number += 1
    with mesh.flows([(2, 3), (3, 2)]) as flows:
        mesh.give(1, mesh.number)
        eventually("node 1 has it", lambda: kid(mesh.number) in mesh.psks(1), 5)
        mesh.lab.node(1).kill()
        mesh.run(1)
        text = f"no common PSK: it has {kid(old)}, this node has {kid(mesh.number)}; give both nodes the same key"
        for number in (2, 3):
            eventually(f"node {number} is named", lambda: mesh.reason(1, number) == text, 10)  # noqa: B023
        for number in (2, 3):
            mesh.give(number, mesh.number)
        mesh.in_order()
    assert_none_lost("a restart in a rotation: the others", flows)
    mesh.hold(mesh.number)


def epochs(mesh, number, cause):
    """How many epochs of a node began for a cause."""
    begun = (line for line in mesh.lab.node(number).log().splitlines() if "a new epoch begins" in line)
    return sum(cause in line for line in begun)


@pytest.mark.parametrize(
    "limit, size",
    [({"RekeyPackets": 1500}, 100), ({"RekeyBytes": 1 << 20}, 800)],
    ids=["packets", "bytes"],
)
def test_a_rotation_by_a_limit_loses_no_packet_and_is_one_epoch_a_minute(mesh, limit, size):
    mesh.anew()
    before = {number: (mesh.status(number)["epoch"], epochs(mesh, number, "Limit")) for number in NODES}
    with mesh.flows(size=size) as flows:
        mesh.configure(**limit)
        for number in NODES:
            begun = lambda: mesh.status(number)["epoch"] > before[number][0]  # noqa: B023, E731
            eventually(f"an epoch of node {number} with the limit", begun, 10)
        begun = time.monotonic()
        waits = lambda: "RekeyPackets" in mesh.status(1)["next_epoch"]["cause"]  # noqa: E731
        eventually("a limit is reached and waits for the minute to be over", waits, 50)
        measured(f"{limit}: from the epoch to its first limit", time.monotonic() - begun)
        for number in NODES:
            more = lambda: epochs(mesh, number, "Limit") > before[number][1]  # noqa: B023, E731
            eventually(f"node {number} rotates", more, 70, 0.5)
        measured(f"{limit}: from the epoch to the next on every node", time.monotonic() - begun)
        time.sleep(5)
        counts = [epochs(mesh, number, "Limit") - before[number][1] for number in NODES]
        assert counts == [1, 1, 1], "every SA of every peer has reached it, and that is one epoch"
        text = mesh.lab.node(1).run("ip -s xfrm state list nokeys")
        soft = next(iter(limit.values()))
        assert f"limit: soft {soft}(" in text, text
    assert_none_lost(f"a rotation by {limit}", flows)
    mesh.configure()
    mesh.in_order()
