"""One dual-stack mesh of plain ESP and what a cluster sends through it: pods, nodes, services, masquerading, TCP; nodes
that come and go, keys that change, and what the verbs say meanwhile.

Node 3 masquerades (--ip-masq). Nodes 4 and 5 join while the others talk."""

import json
import os
import pathlib
import subprocess
import threading
import time

import pytest

import netns
from rig import eventually, program
from traffic import NETWORKS, Place, make_mesh, nothing_leaks, numbered, unanswered  # noqa: F401

BOTH = pytest.mark.parametrize("family", [4, 6])


@pytest.fixture(scope="module")
def mesh(make_mesh):
    """Three nodes; two more are there to be started."""
    mesh = make_mesh(5)
    for number in (1, 2, 3):
        mesh.launch(number, *(["--ip-masq"] if number == 3 else []))
    mesh.settle()
    return mesh


@pytest.fixture(scope="module")
def grown(mesh):
    """The mesh with five nodes, and the flows between the first three that ran while the others joined."""
    flows = [mesh.flow(1, 2, rate=400), mesh.flow(2, 3, rate=400, family=6)]
    with flows[0], flows[1]:
        mesh.launch(4)
        mesh.launch(5)
        mesh.settle()
    mesh.flows_at_join = [flow.result for flow in flows]
    return mesh


@pytest.fixture(scope="module")
def outsider(mesh):
    return mesh.outsider()


def pods(mesh):
    return {f"pod{number}": mesh.pod(number) for number in mesh.members}


def nodes(mesh):
    return {f"node{number}": mesh.node(number) for number in mesh.members}


# --- three nodes ------------------------------------------------------------------------------------------------------------


@BOTH
def test_every_pod_of_three_nodes_reaches_every_pod(mesh, family):
    every_pod_reaches_every_pod(mesh, family)


def every_pod_reaches_every_pod(mesh, family):
    places = pods(mesh)
    pairs = len(places) * (len(places) - 1)
    before = mesh.wire.tunnelled
    assert not unanswered(places, {name: pod.address(family) for name, pod in places.items()}, family)
    arrived, seen = numbered(places, family)
    assert all(numbers == list(range(10)) for numbers in arrived.values()), arrived
    assert seen == {(name, pod.address(family)) for name, pod in places.items()}, "a pod is seen by its own address"
    # Three echoes and their replies, ten datagrams: each was ESP. Probes may come on top.
    assert mesh.wire.tunnelled - before >= pairs * 16


@BOTH
def test_nodes_and_pods_reach_each_other_and_are_seen_by_their_mesh_address(mesh, family):
    node_names, pod_names = nodes(mesh), pods(mesh)
    assert not unanswered(node_names, {name: pod.address(family) for name, pod in pod_names.items()}, family)
    for number in mesh.members:
        own = {"cni0": mesh.bridge(number, family), "uplink": mesh.node(number).address(family)}
        assert not unanswered({"pod": mesh.pod(number)}, own, family)
    others = {f"cni0 of {number}": mesh.bridge(number, family) for number in (2, 3)}
    others |= {f"base of {number}": mesh.base(number, family) for number in (2, 3)}
    assert not unanswered({"pod1": mesh.pod(1), "node1": mesh.node(1)}, others, family)
    with mesh.pod(2).listen(8081):
        for kind in ("tcp", "udp"):
            seen = mesh.node(1).ask(mesh.pod(2), 8081, family, kind)
            assert seen == mesh.base(1, family), "a node is seen by its base address"
            assert mesh.node(2).ask(mesh.pod(2), 8081, family, kind) == mesh.bridge(2, family)
            assert mesh.pod(1).ask(mesh.pod(2), 8081, family, kind) == mesh.pod(1).address(family)
        # A program on the node that has bound itself to the uplink's address.
        bound = mesh.node(1).ask(mesh.pod(2), 8081, family, source=mesh.node(1).address(family))
        assert bound == mesh.base(1, family)
    with mesh.node(1).listen(8082):
        for address in (mesh.bridge(1, family), mesh.node(1).address(family)):
            assert mesh.pod(1).ask(address, 8082, family) == mesh.pod(1).address(family)


@BOTH
def test_two_pods_of_a_node_talk_without_the_wire(mesh, family):
    if not hasattr(mesh, "neighbour"):
        mesh.neighbour = mesh.second_pod(1)
    places = {"pod1": mesh.pod(1), "pod1b": mesh.neighbour}
    before = mesh.wire.tunnelled
    assert not unanswered(places, {name: place.address(family) for name, place in places.items()}, family)
    # Through the node too: as with a service, or a CNI plugin without a bridge.
    with mesh.neighbour.listen(8083):
        service = "10.96.0.9" if family == 4 else "fd00:96::9"
        mesh.node(1).dnat(service, 80, mesh.neighbour.address(family), 8083)
        assert mesh.node(1).ask(mesh.neighbour, 8083, family) == mesh.bridge(1, family)
    assert mesh.wire.tunnelled - before < 20, "only probes"
    # And the second pod is as much in the mesh as the first.
    assert not unanswered({"pod1b": mesh.neighbour}, {"pod2": mesh.pod(2).address(family)}, family)


@BOTH
def test_a_service_answers_pods_and_nodes(mesh, family):
    service = "10.96.0.1" if family == 4 else "fd00:96::1"
    node, target = mesh.node(1), mesh.pod(2)
    with target.listen(8084):
        for chain in ("PREROUTING", "OUTPUT"):
            for protocol in ("tcp", "udp"):
                node.dnat(service, 80, target.address(family), 8084, chain, protocol)
        for kind in ("tcp", "udp"):
            assert mesh.pod(1).ask(service, 80, family, kind) == mesh.pod(1).address(family), "a pod keeps its address"
            assert node.ask(service, 80, family, kind) == mesh.base(1, family), "the node takes its base address"


@BOTH
@pytest.mark.parametrize("masquerade", [True, False], ids=["kube-proxy masquerades", "nobody masquerades"])
def test_a_nodeport_answers_from_a_pod_of_another_node(mesh, outsider, family, masquerade):
    node, target, port = mesh.node(1), mesh.pod(2), 30080 if masquerade else 30081
    if masquerade:
        node.nodeport(port, target.address(family), 8085)
    else:
        to = target.address(family) if family == 4 else f"[{target.address(family)}]"
        node.iptables(f"-t nat -A PREROUTING -i eth0 -p tcp --dport {port} -j DNAT --to-destination {to}:8085", family)
    before = mesh.wire.tunnelled
    with target.listen(8085):
        for _ in range(5):
            seen = outsider.ask(node, port, family, payload=b"from outside")
            assert seen == mesh.base(1, family), "the pod's answer must come back through the node that translated"
    # SYN, SYN+ACK, ACK, question, answer, FINs: nothing of it went past the tunnel.
    assert mesh.wire.tunnelled - before >= 5 * 7


@BOTH
def test_a_nodeport_of_an_own_pod_shows_the_caller(mesh, outsider, family):
    to = mesh.pod(2).address(family) if family == 4 else f"[{mesh.pod(2).address(family)}]"
    rule = f"-t nat -A PREROUTING -i eth0 -p tcp --dport 30082 -j DNAT --to-destination {to}:8086"
    mesh.node(2).iptables(rule, family)
    with mesh.pod(2).listen(8086):
        assert outsider.ask(mesh.node(2), 30082, family, payload=b"from outside") == outsider.address(family)


@BOTH
def test_pods_are_masqueraded_outside_the_mesh_and_only_there(mesh, outsider, family):
    with outsider.listen(8087), mesh.pod(1).listen(8087):
        seen = mesh.pod(3).ask(outsider, 8087, family, payload=b"to outside")
        assert seen == mesh.node(3).address(family), "node 3 runs with --ip-masq"
        assert mesh.pod(3).ask(mesh.pod(1), 8087, family) == mesh.pod(3).address(family)
    # Without --ip-masq a pod keeps its address everywhere: an outsider with a route back sees it.
    env = {number: mesh.node(number).subnet_env()["FLANNEL_IPMASQ"] for number in (1, 3)}
    assert env == {1: "false", 3: "true"}


@BOTH
def test_eight_streams_of_tcp_go_both_ways_without_an_error(mesh, family, capsys):
    source, target = mesh.pod(1), mesh.pod(2)
    errors, fragments, before = mesh.errors(), mesh.fragments(), mesh.wire.tunnelled
    rates = [source.iperf(target, 2, 8, family), source.iperf(target, 2, 8, family, ["-R"])]
    frames = mesh.wire.tunnelled - before
    with capsys.disabled():
        print(f" [IPv{family}: {rates[0]:.3f} and {rates[1]:.3f} Gbit/s, {frames} ESP frames]", end="")
    assert min(rates) > 0.01 and frames > 2000
    assert mesh.errors() == errors
    assert mesh.fragments() == fragments


# --- the verbs --------------------------------------------------------------------------------------------------------------


def test_status_counts_what_was_sent(mesh):
    before = mesh.peer(1, 2), mesh.peer(2, 1)
    pairs = {"pod1": mesh.pod(1)}, {"pod2": mesh.pod(2).address()}
    assert not unanswered(*pairs, family=4, count=50, size=1000)
    after = mesh.peer(1, 2), mesh.peer(2, 1)
    for first, then, ways in zip(before, after, (("out", "in"), ("out", "in"))):
        assert then["state"] == "up" and then["reason"] is None and then["errors"] == 0, then
        assert then["encap"] == "esp" and then["generation"] and then["spi_out"] and then["spi_in"]
        assert 0 <= then["heard"] < 600 and 0 < then["round_trip"] < 2000, then
        for way in ways:
            packets = then[f"packets_{way}"] - first[f"packets_{way}"]
            carried = then[f"bytes_{way}"] - first[f"bytes_{way}"]
            assert 50 <= packets <= 70, f"50 echoes and a few probes: {packets}"
            assert 50 * 1000 <= carried <= 70 * 1080, carried
    assert after[0]["spi_out"] == after[1]["spi_in"] and after[1]["spi_out"] == after[0]["spi_in"]
    text = mesh.node(1).ringmail("status")
    assert "2 up" in text or "4 up" in text


def test_a_healthy_mesh_passes_its_audit(mesh):
    for number in mesh.members:
        audit = json.loads(mesh.node(number).ringmail("audit", "--json"))
        assert audit["ok"] is True and audit["differences"] == [] and audit["plaintext"] == []
        uses = [one["use"] for one in audit["associations"]]
        assert len(uses) == 2 * (len(mesh.members) - 1), uses
    assert "plaintext: has no way out or in" in mesh.node(1).ringmail("audit")


def test_leases_lists_every_node_as_verified(mesh):
    leases = json.loads(mesh.node(1).ringmail("leases", "--json"))
    assert leases["complete"] is True and leases["rejected"] == {}
    found = {lease["node"]: (lease["verdict"], sorted(lease["subnets"])) for lease in leases["leases"]}
    assert found == {
        f"{mesh.name}-node{number}": (
            "own" if number == 1 else "verified",
            sorted("/".join(mesh.subnet(number, family)) for family in mesh.families),
        )
        for number in mesh.members
    }
    unchecked = mesh.node(1).run([program(), "leases", "--lease-dir", mesh.lease_dir, "--json"])
    assert {lease["verdict"] for lease in json.loads(unchecked)["leases"]} == {"unchecked"}


def test_config_check_takes_what_the_daemon_took_and_names_what_it_would_not(mesh):
    node = mesh.node(1)
    conf = str(node.directory / "net-conf.json")
    command = [program(), "config", "check", conf, "--psk-file", mesh.psk_file]
    checked = json.loads(node.run(command + ["--json"]))
    assert [checked[key]["net"] for key in ("Network", "IPv6Network")] == list(NETWORKS.values()), checked
    assert checked["Backend"]["PSK"]["kids"] == [psk["kid"] for psk in node.status()["psks"]]
    bad = node.directory / "bad.json"
    bad.write_text('{"Network": "10.244.0.0/16", "Backend": {"Type": "ipsec", "ESPProposal": "des"}}')
    refused = node.run([program(), "config", "check", str(bad), "--psk-file", mesh.psk_file], check=False)
    assert refused.returncode == 78 and "des" in refused.stderr, refused


# --- keys and nodes that come and go ----------------------------------------------------------------------------------------


def test_rotations_lose_no_packet(mesh, keywatch):
    first = len(keywatch.outbound())
    before = {number: mesh.node(number).status()["epoch"] for number in mesh.members}
    flows = [mesh.flow(1, 2, rate=1000), mesh.flow(2, 1, rate=1000, family=6, port=7701)]
    with flows[0], flows[1]:
        for _ in range(5):
            outcome = json.loads(mesh.node(1).ringmail("rotate", "--json"))
            assert len(outcome["moved"]) == len(mesh.members) - 1 and not outcome["waiting"], outcome
        for _ in range(3):
            rotate_all(mesh)
    for flow in flows:
        assert not flow.result.lost and flow.result.sent > 2000, flow.result
        assert not flow.result.duplicated, flow.result
    after = {number: mesh.node(number).status()["epoch"] for number in mesh.members}
    assert after[1] >= before[1] + 8 and after[2] >= before[2] + 3, (before, after)
    # Every rotation made new sending keys at both ends, and the check after the test finds none twice.
    assert len(keywatch.outbound()) - first >= 5 * 2 * (len(mesh.members) - 1)
    every_pod_reaches_every_pod(mesh, 4)


def rotate_all(mesh):
    """Every node at the same time."""
    command = [program(), "rotate", "--json", "--run-dir"]
    running = [
        netns.spawn(mesh.node(number).namespace, command + [str(mesh.node(number).run_dir)], stdout=subprocess.PIPE)
        for number in mesh.members
    ]
    for one in running:
        answer = one.communicate(timeout=40)[0]
        assert one.returncode == 0 and not json.loads(answer)["waiting"], answer


def test_nodes_join_without_a_lost_packet_between_the_others(grown):
    for result in grown.flows_at_join:
        assert not result.lost and result.sent > 400, result


@BOTH
def test_every_pod_of_five_nodes_reaches_every_pod(grown, family):
    every_pod_reaches_every_pod(grown, family)


def traces(mesh, number, gone):
    """What a node's kernel still holds about another: lines that name its address or its subnets."""
    node, names = mesh.node(number), [mesh.node(gone).address(4), mesh.node(gone).address(6)]
    names += [f"{base}/{length}" for base, length in (mesh.subnet(gone, family) for family in mesh.families)]
    shown = node.ip("xfrm state list nokeys", "xfrm policy list", "route list", "-6 route list".removeprefix("-6 "))
    shown += node.run("ip -6 route list")
    words = [line for line in shown.splitlines() if any(name in line.split() for name in names)]
    return words


def test_a_node_that_leaves_is_forgotten_when_it_does_not_answer_and_nobody_else_notices(grown):
    mesh, gone = grown, 5
    assert all(traces(mesh, number, gone) for number in (1, 2, 3, 4)), "the question finds something before"
    flows = [mesh.flow(1, 2, rate=400), mesh.flow(3, 4, rate=400, family=6)]
    mesh.node(gone).stop()
    lease = [path for path in pathlib.Path(mesh.lease_dir).rglob("*.json") if f"{mesh.name}-node{gone}" in path.read_text()]
    assert len(lease) == 1, lease
    with flows[0], flows[1]:
        os.remove(lease[0])
        removed = time.monotonic()
        # Five seconds for an answer, and half a second for a loss to be believed.
        for number in (1, 2, 3, 4):
            eventually(f"node {number} has forgotten", lambda: not traces(mesh, number, gone), 10 - (time.monotonic() - removed), 0.05)
        time.sleep(0.5)
    for flow in flows:
        assert not flow.result.lost, flow.result
    mesh.members.remove(gone)
    assert set(peer["node"] for peer in mesh.node(1).status()["peers"]) == {f"{mesh.name}-node{n}" for n in (2, 3, 4)}
    # The guard has the subnet now: its pod is out of reach, and nothing of the attempt is on the wire.
    assert unanswered({"pod1": mesh.pod(1)}, {"pod5": mesh.pod(gone).address()}, 4, count=1, timeout=1)
    assert json.loads(mesh.node(1).ringmail("audit", "--json"))["ok"] is True
