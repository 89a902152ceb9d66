"""Whatever happens to a node or its kernel: no plaintext on the wire, and traffic goes on, or again within a second.

One mesh of four nodes for the file, the fourth of which joins and leaves. The wire and the keys are checked after every
test; each test ends with the mesh in order."""

import json
import os
import re
import signal
import subprocess
import time

import pytest

import frames
import netns
from rig import eventually
from running import Running, dropped, log_time, measured, more, objects, spis


@pytest.fixture(scope="module")
def mesh(keywatch):
    """Nodes 1 to 3, started out of order while their pods send already."""
    mesh = Running(f"t{os.getpid() % 100000}-faults", 4, keywatch)
    mesh.subnets()
    for number in (1, 2, 3):
        mesh.lab.call("pod", number)
    pairs = [(1, 2), (2, 3), (3, 1)]
    mesh.flows = [mesh.lab.flow(a, b, rate=200, warm_up=False, port=7710 + a) for a, b in pairs]
    for flow in mesh.flows:
        flow.__enter__()
    mesh.begun = time.monotonic()
    try:
        for number in (3, 1, 2):
            mesh.start(number)
            time.sleep(0.3)
        mesh.in_order(1, 2, 3)
        mesh.up = time.monotonic()
        time.sleep(1)
        for flow in mesh.flows:
            flow.__exit__(None)
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


def test_nodes_start_in_any_order_while_pods_send_already(mesh):
    mesh.lab.wire.assert_clean()
    assert mesh.lab.wire.counts["tunnel"] > 100
    for flow in mesh.flows:
        result = flow.result
        assert result.received > 100, result
        late = [lost for lost in result.lost if result.begun + lost.at > mesh.up]
        assert not late, result


def test_a_policy_flush_is_mended_within_a_second(mesh):
    node = mesh.lab.node(1)
    before = objects(node)
    with mesh.outage(1, 2) as outage:
        node.run("ip xfrm policy flush")
        time.sleep(1.5)
    measured("outage after ip xfrm policy flush", outage.seconds)
    assert outage.seconds < 1, outage
    assert objects(node) == before


def test_after_a_state_flush_a_new_epoch_carries_the_traffic(mesh, keywatch):
    node = mesh.lab.node(1)
    epoch, held = mesh.status(1)["epoch"], len(keywatch.outbound(node.namespace))
    time.sleep(1)
    with mesh.outage(1, 2) as outage:
        flushed = time.monotonic()
        node.run("ip xfrm state flush")
        eventually("a new epoch", lambda: mesh.status(1)["epoch"] > epoch, 10)
        time.sleep(2)
    begins = [line for line in node.log().splitlines() if "a new epoch begins" in line and "Lost" in line]
    began = log_time(begins[-1])
    measured("from ip xfrm state flush to the new epoch", began - flushed)
    assert outage.lost, "all SAs were gone for a moment"
    measured("from the new epoch to the last lost packet", outage.over - began)
    assert outage.over - began < 1, outage
    assert began > flushed - 0.1
    assert len(keywatch.outbound(node.namespace)) >= held + 2
    mesh.in_order(1, 2, 3)


def spi_to(mesh, source, destination):
    """The SPI that data goes on from one node to another."""
    return mesh.peer(source, destination)["spi_out"]


# What is done to node 1, and whether traffic may be out for it (never longer than a second).
BY_HAND = {
    "an outgoing policy deleted": ("ip xfrm policy delete dir out src 0.0.0.0/0 dst 10.244.2.0/24", True),
    "an incoming policy deleted": ("ip xfrm policy delete dir fwd src 10.244.2.0/24 dst 0.0.0.0/0", True),
    "a policy's SPI changed": (
        "ip xfrm policy update dir out src 0.0.0.0/0 dst 10.244.2.0/24 priority 1919484416 "
        "tmpl src 192.168.77.1 dst 192.168.77.2 proto esp spi 0x1234 reqid {reqid} mode tunnel",
        True,
    ),
    "the route deleted": ("ip route del 10.244.2.0/24", True),
    "the route pointed elsewhere": ("ip route replace 10.244.2.0/24 via 192.168.77.2 proto 114", True),
    "the device deleted": ("ip link del ringmail0", True),
    "the device set down": ("ip link set ringmail0 down", True),
    "the device's MTU changed": ("ip link set ringmail0 mtu 1300", False),
    "the device's address removed": ("ip address del 10.244.1.0/32 dev ringmail0", True),
    "a blocking policy of the guard deleted": ("ip xfrm policy delete dir out src 0.0.0.0/0 dst 10.244.0.0/16", False),
    "an allowing policy of the guard deleted": ("ip xfrm policy delete dir out src 0.0.0.0/0 dst 10.244.1.0/24", True),
    "the guard's route deleted": ("ip route del unreachable 10.244.0.0/16", False),
}


def test_what_is_changed_by_hand_is_mended_within_a_second(mesh):
    node = mesh.lab.node(1)
    mesh.in_order(1, 2, 3)
    before = objects(node)
    reqid = next(sa["reqid"] for sa in node.sas() if sa["destination"] == "192.168.77.2")
    done, wrong, looks = {}, [], []
    with mesh.outage(1, 2, rate=200) as outage:
        for what, (command, _) in BY_HAND.items():
            begun = time.monotonic()
            node.run(command.format(reqid=reqid))
            at = time.monotonic()

            def same():
                looks.append(time.monotonic())
                return objects(node) == before

            try:
                eventually(what, same, 10, 0.01)
            except AssertionError:
                wrong.append(f"{what}: not mended: without {before - objects(node)}, with {objects(node) - before}")
                break
            # Until the beginning of the look that found it mended: what a look takes, long on a busy machine, is left out.
            mended = looks[-1] - at
            done[what] = begun, time.monotonic()
            measured(f"{what}: mended, not counting the look that saw it", mended)
            if mended > 1:
                wrong.append(f"{what}: mended after {mended:.3f} s")
            time.sleep(0.3)
    for what, (begun, mended) in done.items():
        lost = [r.begun + one.at for r in outage.results for one in r.lost if begun <= r.begun + one.at <= mended + 0.2]
        out = max(lost) - min(lost) if lost else 0
        if lost:
            measured(f"{what}: outage", out)
        if out > 1 or (lost and not BY_HAND[what][1]):
            wrong.append(f"{what}: {len(lost)} packets lost in {out:.3f} s")
    assert not wrong, "\n".join(wrong)
    assert node.log().count("by another hand") >= len(BY_HAND) - 1
    assert json.loads(node.ringmail("audit --json"))["ok"]
    assert node.ping("10.244.2.10") == 1, "the node itself reaches the pod by the mended address and route"


@pytest.mark.parametrize("way", ["out", "in"])
def test_a_deleted_sa_is_followed_by_a_new_epoch(mesh, way):
    node, epoch = mesh.lab.node(1), mesh.status(1)["epoch"]
    spi = mesh.peer(1, 2)["spi_out" if way == "out" else "spi_in"]
    destination = "192.168.77.2" if way == "out" else "192.168.77.1"
    time.sleep(1)
    with mesh.outage(1, 2) as outage:
        node.run(f"ip xfrm state delete src 0.0.0.0 dst {destination} proto esp spi {spi}")
        eventually("a new epoch", lambda: mesh.status(1)["epoch"] > epoch, 5)
        time.sleep(1)
    measured(f"outage after an SA ({way}) is deleted", outage.seconds)
    # None, where the new epoch's keys were there before the next packet.
    assert outage.seconds < 1.5, outage
    mesh.in_order(1, 2, 3)
    assert int(spi, 16) not in spis(node) or way == "in"


def test_a_policy_of_another_hand_in_our_place_is_named_and_leaks_nothing(mesh):
    node = mesh.lab.node(1)
    place = "dir out src 0.0.0.0/0 dst 10.244.3.0/24"
    with mesh.lab.flow(1, 3, rate=200) as flow:
        node.run(f"ip xfrm policy update {place} priority 100")
        named = eventually("status names it", lambda: mesh.peer(1, 3)["reason"], 5)
        assert "in the way and is not ringmail's" in named and f"ip xfrm policy delete {place}" in named, named
        node.run(f"ip xfrm policy delete {place}")
        mesh.in_order(1, 3)
    assert flow.result.lost


def test_iptables_rules_are_put_back_within_a_second(mesh):
    node = mesh.lab.node(1)
    rules = lambda: re.sub(r"\[\d+:\d+\]|^#.*", "", node.run("iptables-legacy-save"), flags=re.M)  # noqa: E731
    before = rules()
    with mesh.outage(1, 2) as outage:
        node.iptables("-t raw -F RINGMAIL-PREROUTING")
        node.iptables("-t mangle -D POSTROUTING -m comment --comment ringmail -j RINGMAIL-GUARD")
        assert rules() != before
        done = time.monotonic()
        eventually("the rules are back", lambda: rules() == before, 10)
        back = time.monotonic() - done
    measured("iptables rules put back after", back)
    assert back < 1
    assert not outage.lost, outage


@pytest.mark.parametrize("signal", ["TERM", "KILL"])
def test_a_daemon_that_is_ended_and_started_again_loses_no_packet(mesh, signal):
    node = mesh.lab.node(1)
    mesh.in_order(1, 2, 3)
    epoch, held = mesh.status(1)["epoch"], spis(node)
    with mesh.lab.flow(1, 2, rate=1000) as there, mesh.lab.flow(2, 1, rate=300, port=7701) as back:
        node.stop(signal)
        kernel = spis(node)
        time.sleep(1)
        mesh.start(1)
        mesh.in_order(1, 2, 3)
    assert kernel == held, "the datapath stays as it is"
    assert not there.result.lost, there.result
    assert not back.result.lost, back.result
    measured(f"longest gap over SIG{signal} and a start", max(there.result.gap, back.result.gap))
    status = mesh.status(1)
    assert status["epoch"] > epoch
    for peer in status["peers"]:
        assert peer["state"] != "up" or peer["generation"].startswith(str(status["epoch"])), peer
    eventually("the old SAs drain away", lambda: not spis(node) & held, 15, 0.5)
    assert json.loads(node.ringmail("audit --json"))["ok"]


def test_nodes_that_know_each_other_lose_nothing_while_the_store_is_gone(mesh):
    away = mesh.lease_dir.with_name("away")
    mesh.in_order(1, 2, 3)
    with mesh.outage(1, 2) as outage:
        mesh.lease_dir.rename(away)
        eventually("status names it", lambda: "does not exist" in str(mesh.status(1)["problems"]), 5)
        time.sleep(1)
        away.rename(mesh.lease_dir)
        mesh.in_order(1, 2, 3)
    assert not outage.lost, outage


def test_nodes_that_know_each_other_lose_nothing_while_the_store_is_read_only(mesh):
    epoch = mesh.status(1)["epoch"]
    remount = lambda how: subprocess.run(["mount", "-o", f"remount,{how}", mesh.store], check=True)  # noqa: E731
    with mesh.outage(1, 2) as outage:
        remount("ro")
        try:
            asked = mesh.lab.node(1).ringmail("rotate", check=False)
            assert asked.returncode == 1 and "the data to 0 of 2 peers" in " ".join(asked.stdout.split()), asked
            eventually("status names it", lambda: "read-only" in str(mesh.status(1)["problems"]), 5)
        finally:
            remount("rw")
        mesh.in_order(1, 2, 3)
    assert not outage.lost, outage
    assert mesh.status(1)["epoch"] > epoch


def test_a_store_that_is_emptied_is_filled_again_without_loss(mesh):
    with mesh.outage(1, 2) as outage:
        conf = (mesh.lease_dir / "net-conf.json").read_bytes()
        subprocess.run(["rm", "-r", mesh.lease_dir], check=True)
        mesh.lease_dir.mkdir()
        (mesh.lease_dir / "net-conf.json").write_bytes(conf)
        eventually("all leases are back", lambda: all(mesh.lease(number) for number in (1, 2, 3)), 15)
        mesh.in_order(1, 2, 3)
    assert not outage.lost, outage


def test_leases_that_are_overwritten_with_garbage_are_written_again_without_loss(mesh):
    with mesh.outage(1, 2) as outage:
        for path in mesh.lease_dir.glob("*-24.json"):
            path.write_bytes(os.urandom(300))
        eventually("all leases are back", lambda: all(mesh.lease(number) for number in (1, 2, 3)), 15)
        mesh.in_order(1, 2, 3)
    assert not outage.lost, outage


def test_a_node_joins_and_leaves_without_a_packet_lost_elsewhere(mesh):
    node = mesh.lab.node(4)
    with mesh.outage(1, 2) as outage:
        mesh.start(4)
        mesh.lab.make_pod(4)
        mesh.in_order()
        assert mesh.lab.pod(1).ping(mesh.lab.pod(4)) == 1
        with mesh.lab.flow(3, 4, rate=100, port=7702):
            node.stop()
            node.ringmail("cleanup")
            eventually("node 3 lets go of it", lambda: mesh.peer(3, 4) is None, 10)
            time.sleep(0.5)
        netns.run(mesh.lab.name + "-pod3", ["ping", "-n", "-c", "1", "-W", "1", "10.244.4.10"], check=False)
    assert not outage.lost, outage
    assert not [sa for sa in mesh.lab.node(3).sas() if "192.168.77.4" in sa.values()]


def test_a_rebooted_node_is_back_with_nothing_of_before(mesh):
    """Its namespaces are removed and made anew: no kernel state, no files but what the store has."""
    lab, node = mesh.lab, mesh.lab.node(3)
    with mesh.outage(1, 2) as outage:
        node.kill()
        lab.keywatch.detach(node.namespace)
        subprocess.run(
            f"ip netns del {lab.name}-pod3; ip netns del {node.namespace}; rm -r {node.directory}", shell=True
        )
        time.sleep(0.5)
        make_node(lab, 3)
        lab.keywatch.attach(node.namespace, node.namespace, [node.address(4), node.address(6)])
        begun = time.monotonic()
        mesh.start(3)
        mesh.in_order(1, 2, 3)
        measured("from the start of a rebooted node to all peers up", time.monotonic() - begun)
        lab.make_pod(3)
        assert lab.pod(3).ping(lab.pod(1)) == 1 and lab.pod(2).ping(lab.pod(3)) == 1
    assert not outage.lost, outage


def make_node(lab, number):
    """A node as deploy/lab makes it, on a wire that is there already."""
    node = lab.node(number)
    (node.directory / "run").mkdir(parents=True)
    commands = f"""
        ip netns add {node.namespace}
        ip -n {lab.name}-wire link add node{number} type veth peer name eth0 netns {node.namespace}
        ip -n {lab.name}-wire link set node{number} master wire up
        ip -n {node.namespace} link set lo up
        ip -n {node.namespace} link set eth0 up
        ip -n {node.namespace} address add {node.address()}/24 dev eth0
        ip -n {node.namespace} address add {node.address(6)}/64 dev eth0 nodad
        ip -n {node.namespace} route add default via 192.168.77.254
    """
    subprocess.run(["sh", "-ec", commands], check=True)
    node.__dict__.pop("mac", None)


@pytest.mark.parametrize(
    "source", ["10.244.1.10", "10.244.2.77", "10.244.9.9"], ids=["a peer's", "our own", "nobody's"]
)
@pytest.mark.parametrize("destination", ["10.244.2.10", "192.168.77.2"], ids=["pod", "node"])
def test_plaintext_that_claims_an_address_of_the_mesh_is_dropped_and_counted(mesh, source, destination):
    node = mesh.lab.node(2)
    place = mesh.lab.pod(2) if destination == "10.244.2.10" else node
    before = dropped(node)
    with place.listen(4000) as listener:
        mesh.lab.spoof(2, frames.udp(source, destination), count=5)
        rise = eventually("counted", lambda: more(before, dropped(node)), 3)
        time.sleep(0.1)
        assert not listener.callers
    assert sum(rise.values()) >= 5, rise
    assert set(rise) <= {"raw RINGMAIL-PREROUTING", "XfrmInTmplMismatch", "XfrmInPolBlock", "XfrmInNoPols"}, rise


def test_a_peer_that_sends_as_another_peers_pod_is_dropped_and_counted(mesh):
    """Node 2's pod takes an address of node 3's. Its own node refuses it; with that node's policies out of the way, as on
    one that was taken over, the receiver does."""
    node, pod = mesh.lab.node(2), mesh.lab.pod(2)
    pod.ip("address add 10.244.3.10/32 dev lo")
    try:
        before = more({}, node.xfrm_stat())
        assert pod.ping("10.244.1.10", source="10.244.3.10", timeout=1, count=2, interval=0.1) == 0
        assert more(before, node.xfrm_stat()).get("XfrmInTmplMismatch", 0) >= 2
        os.kill(node.pid, signal.SIGSTOP)
        try:
            node.ip(
                "xfrm policy delete dir fwd src 10.244.3.0/24 dst 0.0.0.0/0",
                "xfrm policy delete dir fwd src 10.244.0.0/16 dst 0.0.0.0/0",
            )
            before = mesh.lab.node(1).xfrm_stat()
            sent = mesh.lab.wire.tunnelled
            assert pod.ping("10.244.1.10", source="10.244.3.10", timeout=1, count=3, interval=0.1) == 0
            assert mesh.lab.wire.tunnelled >= sent + 3, "they went through node 2's own tunnel"
            assert more(before, mesh.lab.node(1).xfrm_stat()).get("XfrmInTmplMismatch", 0) >= 3
        finally:
            os.kill(node.pid, signal.SIGCONT)
    finally:
        pod.ip("address del 10.244.3.10/32 dev lo")
    mesh.in_order(1, 2, 3)


def test_a_replayed_packet_is_dropped_and_counted(mesh):
    assert mesh.lab.pod(1).ping(mesh.lab.pod(2), count=3, interval=0.05) == 3
    before = mesh.lab.node(2).xfrm_stat()
    mesh.lab.replay(1, 2, count=7)
    time.sleep(0.2)
    assert more(before, mesh.lab.node(2).xfrm_stat()) == {"XfrmInStateSeqError": 7}
    assert mesh.peer(2, 1)["errors"] >= 7


def test_with_udp_encapsulation_a_dead_daemon_is_a_gap_and_no_leak(request, keywatch):
    mesh = Running(f"t{os.getpid() % 100000}-udp", 2, keywatch, UDPEncap=True)
    request.node.labs = [mesh.lab]
    try:
        mesh.start()
        mesh.in_order()
        mesh.lab.pods()
        with mesh.outage(1, 2, rate=200) as outage:
            mesh.lab.node(1).kill()
            killed = time.monotonic()
            time.sleep(1)
            started = time.monotonic()
            mesh.start(1)
            mesh.in_order()
            time.sleep(0.5)
        assert 0.9 < outage.seconds, outage
        assert outage.over > started and outage.over - killed < 20, outage
        measured("UDPEncap: outage of a daemon that was away for a second", outage.seconds)
        assert mesh.lab.wire.counts["udp4500"] and not mesh.lab.wire.counts["esp"]
        mesh.lab.wire.assert_clean()
        keywatch.check()
    finally:
        mesh.down()


FOREIGN = """
xfrm state add src 192.0.2.1 dst 192.0.2.2 proto esp spi 0x2001 reqid 7 mode tunnel aead rfc4106(gcm(aes)) 0x{key} 128
xfrm policy add src 192.0.2.0/24 dst 198.51.100.0/24 dir out tmpl src 192.0.2.1 dst 192.0.2.2 proto esp reqid 7 mode tunnel
xfrm policy add src 203.0.113.0/24 dst 198.51.100.0/24 dir fwd priority 77
xfrm policy add src 10.244.200.7/32 dst 198.51.100.7/32 dir out action block priority 5
link add theirs0 type dummy
link set theirs0 up
address add 172.31.0.1/24 dev theirs0
route add 198.51.100.0/24 dev theirs0
route add 10.244.250.0/24 dev theirs0
route add 10.243.0.0/16 via 172.31.0.9 proto 113
"""


def foreign(node):
    text = objects(node)
    links = node.run("ip -o link show dev theirs0; ip -o address show dev theirs0")
    rules = re.sub(r"\[\d+:\d+\]|^#.*", "", node.run("iptables-legacy-save; nft list ruleset"), flags=re.M)
    states = [line for line in node.run("ip -o xfrm state list nokeys").splitlines() if "0x00002001" in line]
    states = [line.split("lifetime")[0] for line in states]
    # A table that someone has looked at is there, with its chains, for ever: only chains and rules of someone count.
    rules = [line for line in rules.splitlines() if line and not re.match(r"[*]|:\S+ ACCEPT|COMMIT", line)]
    return text, links, sorted(rules), states


def test_what_is_foreign_survives_everything_and_cleanup_leaves_nothing_of_ours(request, keywatch):
    mesh = Running(f"t{os.getpid() % 100000}-clean", 2, keywatch)
    request.node.labs = [mesh.lab]
    node = mesh.lab.node(1)
    try:
        node.ip(*FOREIGN.format(key=os.urandom(20).hex()).strip().splitlines())
        # User Mode Linux has no nftables for inet, ip and ip6; a kernel for use has.
        add = "nft add table {0} theirs && nft add chain {0} theirs c && nft add rule {0} theirs c counter accept"
        node.run(" || ".join(f"({add.format(family)})" for family in ("inet", "ip", "ip6", "bridge", "netdev", "arp")))
        node.iptables("-t filter -A FORWARD -s 10.244.0.0/16 -j ACCEPT")
        node.iptables("-t nat -N THEIRS")
        before = foreign(node)
        thresholds = lambda: re.findall(r"thresholds: (.*)", node.run("ip -s -s xfrm policy count"))  # noqa: E731
        standard = thresholds()
        mesh.subnets()
        mesh.start()
        mesh.in_order()
        busy = node.ringmail("cleanup", check=False)
        assert busy.returncode == 1 and "stop it first" in busy.stderr and str(node.pid) in busy.stderr, busy.stderr
        mesh.in_order()
        node.run("ip link del ringmail0; ip xfrm policy delete dir out src 0.0.0.0/0 dst 10.244.2.0/24")
        mesh.in_order()
        assert thresholds() == ["local 0 remote 24", standard[1]]
        now = foreign(node)
        for had, has in zip(before, now):
            assert set(had) <= set(has), set(had) - set(has)
        node.stop()
        gone = json.loads(node.ringmail("cleanup --json"))
        assert not gone["failed"] and gone["lease"] and len(gone["kernel"]) > 15, gone
        assert foreign(node) == before
        assert not [sa for sa in node.sas() if sa["reqid"] != 7]
        assert thresholds() == standard
        assert not (node.directory / "subnet.env").exists()
        assert not node.run_dir.exists() or not list(node.run_dir.iterdir())
        assert [path.name for path in mesh.lease_dir.glob("*-24.json")] == ["10.244.2.0-24.json"]
        assert "nothing of ringmail was here" in node.ringmail("cleanup")
        assert foreign(node) == before
        mesh.lab.wire.assert_clean()
    finally:
        mesh.down()
