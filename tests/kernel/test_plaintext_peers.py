"""From vxlan to ipsec node by node, with "AllowPlaintextPeers": each pair uses the best that both have, and what is not
encrypted is said; taken out of the configuration, it is closed."""

import json
import pathlib

import pytest

import frames
from rig import eventually
from running import dropped, measures, more

VXLAN = {"Type": "vxlan"}
MIXED = {"Type": "ipsec", "AllowPlaintextPeers": True}
IPSEC = {"Type": "ipsec"}


class Mesh:
    """Three nodes with a configuration each."""

    def __init__(self, lab):
        self.lab = lab
        lab.configure()
        self.psk = lab.psk_file
        self.folder = pathlib.Path(lab.psk_file).parent / "mixed"
        (self.folder / "leases").mkdir(parents=True)

    def conf(self, number):
        return self.folder / f"conf-{number}" / "net-conf.json"

    def give(self, number, backend):
        path = self.conf(number)
        path.parent.mkdir(exist_ok=True)
        new = path.with_name("new")
        new.write_text(json.dumps({"Network": "10.244.0.0/16", "Backend": backend}))
        new.rename(path)

    def start(self):
        for node in self.lab.nodes:
            flags = ["--lease-dir", self.folder / "leases", "--psk-file", self.psk, "--net-config-path", self.conf(node.number)]
            node.start(*flags, "--ip-masq")
        for node in self.lab.nodes:
            node.ready()

    def states(self, number):
        """How the node's peers stand, by their numbers."""
        report = self.lab.node(number).status()
        numbers = {str(node): node.number for node in self.lab.nodes}
        return {numbers[peer["node"]]: peer["state"] for peer in report["peers"]}

    def come_to(self, number, states, timeout=30):
        eventually(f"node {number} has {states}", lambda: self.states(number) == states, timeout)

    def problems(self, number):
        return self.lab.node(number).problems()


def note(what, flow):
    lost, longest = len(flow.result.lost), flow.result.gap * 1000
    measures.append(f"{what}: {lost} of {flow.result.sent} packets lost, longest gap {longest:.0f} ms")


@pytest.fixture
def mesh(request, make_lab):
    """Three nodes on the backend that the test asks for, flannel's own else."""
    lab = make_lab(3)
    lab.wire.allow_plaintext("the mesh begins unencrypted")
    mesh = Mesh(lab)
    for node in lab.nodes:
        mesh.give(node.number, getattr(request, "param", VXLAN))
    mesh.start()
    return mesh


def test_each_pair_uses_the_best_of_both_until_plaintext_is_closed(mesh):
    lab = mesh.lab
    pods = lab.pods()
    talk = lambda: all(a.ping(b, size=1400) == 1 for a in pods for b in pods if a is not b)  # noqa: E731
    eventually("pods talk on vxlan", talk, 20)

    # One node after the other. A node that has moved serves those that have not in VXLAN, as they serve it.
    with lab.flow(3, 1) as flow:
        mesh.give(1, MIXED)
        mesh.come_to(1, {2: "plain", 3: "plain"})
        eventually("pods talk", talk, 20)
    note("a vxlan peer of a node that goes over to ipsec", flow)
    assert mesh.states(3) == {1: "plain", 2: "plain"}
    (told,) = mesh.problems(1)
    assert told.startswith(f"2 of 2 peers in PLAINTEXT, as AllowPlaintextPeers allows: {lab.node(2)}, {lab.node(3)}"), told
    assert lab.node(1).ringmail("status", check=False).returncode == 1
    with lab.flow(1, 2) as flow:
        mesh.give(2, MIXED)
        mesh.come_to(1, {2: "up", 3: "plain"})
        mesh.come_to(2, {1: "up", 3: "plain"})
        eventually("pods talk", talk, 20)
    note("a pair that goes over from vxlan to ipsec", flow)
    (told,) = mesh.problems(1)
    assert told.startswith(f"1 of 2 peers in PLAINTEXT, as AllowPlaintextPeers allows: {lab.node(3)};"), told
    audit = lab.node(1).audit()
    ways = [way for way in audit["plaintext"] if "AllowPlaintextPeers" in way]
    assert not audit["ok"] and not audit["differences"] and any("10.244" in way for way in ways), audit
    mesh.give(3, MIXED)
    for number, others in {1: (2, 3), 2: (1, 3), 3: (1, 2)}.items():
        mesh.come_to(number, dict.fromkeys(others, "up"))
    eventually("pods talk", talk, 20)
    assert all("no peer needs it" in told for number in (1, 2, 3) for told in mesh.problems(number))

    # What is encrypted stays so, and a restart finds it.
    lab.node(2).stop()
    mesh.lab.node(2).start("--lease-dir", mesh.folder / "leases", "--psk-file", mesh.psk, "--net-config-path", mesh.conf(2), "--ip-masq")
    mesh.come_to(2, {1: "up", 3: "up"})

    # Taken out, in any order: all is encrypted, and nothing of VXLAN is left.
    for number in (2, 3, 1):
        mesh.give(number, IPSEC)
    for number in (1, 2, 3):
        node = lab.node(number)
        eventually("nothing is wrong", lambda: mesh.problems(number) == [], 20)  # noqa: B023
        eventually("nothing is open", lambda: node.audit()["ok"], 20)  # noqa: B023
        assert "flannel" not in node.run("ip link"), node.run("ip link")
    assert talk()

    # A node that goes back is shut out.
    mesh.give(3, VXLAN)
    reason = lambda number: next(p["reason"] or "" for p in lab.node(number).status()["peers"] if p["node"] == str(lab.node(3)))  # noqa: E731
    for number in (1, 2):
        refused = lambda: "refused" in reason(number) and "backend" in reason(number)  # noqa: B023, E731
        eventually("its lease is refused", refused, 20)
    shut = lambda: pods[2].ping(pods[0], timeout=1) == 0 and pods[0].ping(pods[2], timeout=1) == 0  # noqa: E731
    eventually("no packet passes", shut, 20)
    assert pods[0].ping(pods[1]) == 1
    # And is served again where that is allowed.
    mesh.give(1, MIXED)
    mesh.come_to(1, {2: "up", 3: "plain"})
    eventually("packets pass", lambda: pods[2].ping(pods[0]) == 1 and pods[0].ping(pods[2]) == 1, 20)
    mesh.give(1, IPSEC)
    mesh.come_to(1, {2: "up", 3: "refused"})
    eventually("no packet passes", shut, 20)
    assert lab.node(1).audit()["ok"]


BEFORE = {"vxlan-4096": {"Type": "vxlan", "VNI": 4096, "Port": 4789}, "host-gw": {"Type": "host-gw"}}


@pytest.mark.parametrize("mesh, before", [(one, one) for one in BEFORE.values()], ids=list(BEFORE), indirect=["mesh"])
def test_the_backend_of_before_may_be_another_than_flannels_default(mesh, before):
    lab, mixed = mesh.lab, {"Type": "ipsec", "AllowPlaintextPeers": before}
    pods = lab.pods()
    talk = lambda: all(a.ping(b, size=1400) == 1 for a in pods for b in pods if a is not b)  # noqa: E731
    eventually("pods talk", talk, 20)
    for number in (1, 2):
        mesh.give(number, mixed)
    mesh.come_to(1, {2: "up", 3: "plain"})
    mesh.come_to(2, {1: "up", 3: "plain"})
    eventually("pods talk", talk, 20)
    (told,) = mesh.problems(1)
    assert told.startswith(f"1 of 2 peers in PLAINTEXT, as AllowPlaintextPeers allows: {lab.node(3)};"), told
    assert any("AllowPlaintextPeers" in way for way in lab.node(1).audit()["plaintext"])
    seen = []
    for target in (pods[1], pods[2]):
        lab.wire.settle()
        lab.wire.plaintext.clear()
        assert pods[0].ping(target, count=3, interval=0.05) == 3
        lab.wire.settle()
        seen.append(len(lab.wire.plaintext) > 0)
    assert seen == [False, True], "what the wire shows of each pair"

    # The third comes without a word for plaintext. Who sends as its pods, the own ones or nobody's is not heard.
    mesh.give(3, IPSEC)
    mesh.come_to(1, {2: "up", 3: "up"})
    mesh.come_to(3, {1: "up", 2: "up"})
    eventually("pods talk", talk, 20)
    taken = {pod.address().split(".")[2] for pod in pods}
    nobodys = next(f"10.244.{number}.10" for number in range(1, 255) if str(number) not in taken)
    with pods[0].listen(4000) as listener:
        for source in (pods[2].address(), pods[0].address().rsplit(".", 1)[0] + ".77", nobodys):
            before_it = dropped(lab.node(1))
            lab.spoof(1, frames.udp(source, pods[0].address()), count=5)
            eventually(f"{source} is dropped", lambda: sum(more(before_it, dropped(lab.node(1))).values()) >= 5, 5)  # noqa: B023
        assert not listener.callers, listener.callers

    for number in (1, 2):
        mesh.give(number, IPSEC)
    for node in lab.nodes:
        eventually("nothing is wrong", lambda: mesh.problems(node.number) == [], 20)  # noqa: B023
        eventually("nothing is open", lambda: node.audit()["ok"], 20)  # noqa: B023
        assert "flannel" not in node.run("ip link") and "via 192.168.77" not in node.run("ip route show proto 114")
    assert talk()
