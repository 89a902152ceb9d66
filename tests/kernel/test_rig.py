"""The rig itself, on security associations made by hand: what it calls clean is clean, and what it should catch it catches."""

import socket
import time

import pytest

import frames
import netns
from flow import Flow


def subnet(number, family=4):
    return f"10.244.{number}.0/24" if family == 4 else f"fd00:244:0:{number}::/64"


def key(sender, receiver, turn=0):
    """A key of its own for each direction, test and turn."""
    return f"0x{sender:02x}{receiver:02x}{turn:02x}{time.monotonic_ns():034x}"


def sa(source, destination, spi, secret):
    return (
        f"xfrm state add src {source.address()} dst {destination.address()} proto esp spi {spi:#x} reqid 7 mode tunnel "
        f"flag af-unspec replay-window 32 aead rfc4106(gcm(aes)) {secret} 128"
    )


def plain_mesh(lab):
    """Pods on every node and routes between them, no encryption."""
    for node in lab.nodes:
        mine, mine6 = subnet(node.number).replace(".0/", ".1/"), subnet(node.number, 6).replace("::/", "::1/")
        (node.directory / "subnet.env").write_text(
            f"FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET={mine}\nFLANNEL_IPV6_NETWORK=fd00:244::/48\n"
            f"FLANNEL_IPV6_SUBNET={mine6}\nFLANNEL_MTU=1446\nFLANNEL_IPMASQ=false\n"
        )
        node.run("echo 1 >/proc/sys/net/ipv4/ip_forward; echo 1 >/proc/sys/net/ipv6/conf/all/forwarding")
        peers = [peer for peer in lab.nodes if peer is not node]
        routes = [f"route add {subnet(peer.number, f)} via {peer.address(f)}" for peer in peers for f in (4, 6)]
        node.ip(*routes or [""])
    return lab.pods()


def encrypt(lab):
    """SAs and policies between all nodes for both families, as an operator would make them."""
    lines = {node: [] for node in lab.nodes}
    for a in lab.nodes:
        for b in lab.nodes:
            if a is b:
                continue
            one = sa(a, b, a.number << 12 | b.number, key(a.number, b.number))
            lines[a].append(one)
            lines[b].append(one)
            ends = f"tmpl src {a.address()} dst {b.address()} proto esp reqid 7 mode tunnel"
            for family, wide in ((4, "0.0.0.0/0"), (6, "::/0")):
                lines[a].append(f"xfrm policy add src {wide} dst {subnet(b.number, family)} dir out {ends}")
                for direction in ("in", "fwd"):
                    lines[b].append(f"xfrm policy add src {subnet(a.number, family)} dst {wide} dir {direction} {ends}")
    for node in lab.nodes:
        node.ip(*lines[node])


@pytest.fixture
def mesh(make_lab):
    """Two nodes whose pods talk through ESP."""
    lab = make_lab(2)
    plain_mesh(lab)
    encrypt(lab)
    return lab


@pytest.mark.parametrize("family", [4, 6])
def test_the_wire_shows_esp_and_nothing_of_the_pods(mesh, family):
    assert mesh.pod(1).ping(mesh.pod(2), family, count=5, interval=0.05) == 5
    assert mesh.wire.tunnelled == 10
    assert mesh.wire.counts["esp"] == 10
    mesh.wire.assert_clean()


@pytest.mark.parametrize("family", [4, 6])
def test_plaintext_between_pods_is_seen_when_no_policy_encrypts_it(make_lab, family):
    lab = make_lab(2)
    lab.wire.allow_plaintext("that is the point")
    plain_mesh(lab)
    assert lab.pod(1).ping(lab.pod(2), family, count=3, interval=0.05) == 3
    with pytest.raises(AssertionError, match="plaintext frames on the wire"):
        lab.wire.assert_clean()
    assert lab.wire.counts["plaintext"] >= 6
    assert {frame.port for frame in lab.wire.plaintext} == {"node1", "node2"}


def test_a_packet_that_follows_the_default_route_is_seen(make_lab):
    lab = make_lab(1)
    lab.wire.allow_plaintext("that is the point")
    plain_mesh(lab)
    assert lab.pod(1).ping("10.244.9.9", timeout=1) == 0
    lab.wire.settle()
    assert any(frame.data[30:34] == frames.packed("10.244.9.9") for frame in lab.wire.plaintext), lab.wire.plaintext


def test_the_marker_is_seen_between_addresses_of_nodes_and_in_quotes_of_icmp(make_lab):
    lab = make_lab(2)
    lab.wire.allow_plaintext("that is the point")
    lab.node(1).ping("192.168.77.2")
    lab.wire.settle()
    assert lab.wire.counts["plaintext"] == 2
    kinds = lab.wire.kinds
    packet = frames.udp("10.244.1.10", "10.244.2.10", b"quoted")[14:]
    error = frames.udp("192.168.77.2", "192.168.77.1", b"")[:34]
    error = error[:23] + b"\1" + error[24:] + b"\3\1" + b"\0" * 6
    assert kinds.kind(error + packet) == "plaintext"
    assert kinds.kind(error + frames.udp("192.168.77.1", "192.168.77.2", b"")[14:]) == "icmp"


def test_other_traffic_between_nodes_is_told_apart(make_lab):
    lab = make_lab(2)
    with lab.node(2).listen(9000):
        netns.run(lab.node(1).namespace, "ping -n -c 1 192.168.77.2; ping -n -c 1 fd77::2")
        with netns.make_socket(lab.node(1).namespace, socket.AF_INET, socket.SOCK_DGRAM) as caller:
            caller.sendto(b"no marker", ("192.168.77.2", 9000))
            caller.recv(100)  # else the answer finds no one, and an ICMP error says so on the wire
    lab.wire.settle()
    assert lab.wire.counts["icmp"] == 4
    assert lab.wire.counts["arp"] >= 2 and lab.wire.counts["nd"] >= 2
    assert [frame.port for frame in lab.wire.other] == ["node1", "node2"]
    assert lab.wire.counts["tunnel"] == 0


def test_a_replayed_packet_is_counted_by_its_receiver(mesh):
    assert mesh.pod(1).ping(mesh.pod(2), count=3, interval=0.05) == 3
    before = mesh.wire.tunnelled
    mesh.replay(1, 2, count=7)
    time.sleep(0.2)
    assert mesh.node(2).xfrm_stat()["XfrmInStateSeqError"] == 7
    assert mesh.wire.tunnelled == before, "what the rig injects is not a node's"


def test_spoofed_plaintext_reaches_a_node_and_its_policy_drops_it(mesh):
    spoofed = frames.udp("10.244.1.10", "10.244.2.10")
    mesh.spoof(2, spoofed, count=5)
    time.sleep(0.2)
    assert mesh.node(2).xfrm_stat() == {"XfrmInTmplMismatch": 5}


def test_a_flow_through_a_good_wire_loses_nothing(mesh):
    with mesh.flow(1, 2, rate=1000) as flow:
        time.sleep(2)
    assert not flow.result.lost, flow.result
    assert 1500 < flow.result.sent < 2600, flow.result
    assert flow.result.gap < 0.5, flow.result


def test_a_flow_counts_what_netem_loses_and_when_it_begins(mesh):
    with mesh.flow(1, 2, rate=1000, family=6) as flow:
        time.sleep(1)
        mesh.node(1).netem("loss 20%")
        since = time.monotonic()
        time.sleep(1)
        mesh.node(1).netem(None)
        until = time.monotonic()
        time.sleep(0.5)
    result = flow.result
    assert 60 < len(result.lost) < 400, result
    assert result.lost[0].at + result.begun > since - 0.3, result
    assert result.lost[-1].at + result.begun < until + 0.1, result
    assert result.received + len(result.lost) == result.sent


def test_a_flow_tells_what_the_senders_kernel_refused(mesh):
    with mesh.flow(1, 2, rate=500) as flow:
        mesh.pod(1).run("ip route add unreachable 10.244.2.10")
        time.sleep(0.3)
        mesh.pod(1).run("ip route del unreachable 10.244.2.10")
        time.sleep(0.3)
    assert flow.result.lost
    assert {lost.reason for lost in flow.result.lost} == {"No route to host"}


def test_a_flow_that_never_starts_fails(mesh):
    mesh.node(2).run("ip xfrm state flush")
    flow = Flow(mesh.pod(1), mesh.pod(2), rate=100)
    flow._patience = 1
    with pytest.raises(AssertionError, match="no packet came"):
        flow.__enter__()


def test_an_outbound_key_programmed_twice_is_caught(mesh, keywatch):
    one, two = mesh.nodes
    secret = key(1, 2, turn=1)
    one.ip(sa(one, two, 0x5000, secret))
    assert keywatch.outbound(one.namespace)[-1].spi == 0x5000
    keywatch.check()
    one.run("ip xfrm state flush")
    one.ip(sa(one, two, 0x5001, secret))
    with pytest.raises(AssertionError, match="programmed twice: SPI 0x5000"):
        keywatch.check()
    keywatch.faults.clear()


def test_a_key_that_is_outbound_here_and_inbound_there_is_as_it_should_be(mesh, keywatch):
    one, two = mesh.nodes
    secret = key(1, 2, turn=2)
    one.ip(sa(one, two, 0x5002, secret))
    two.ip(sa(one, two, 0x5002, secret))
    keywatch.check()
    two.ip(sa(two, one, 0x5003, secret))
    with pytest.raises(AssertionError, match="programmed twice"):
        keywatch.check()
    keywatch.faults.clear()


def test_the_largest_packet_passes_and_a_larger_one_is_too_big(mesh):
    assert mesh.pod(1).ping(mesh.pod(2), size=1446) == 1
    assert mesh.pod(1).ping(mesh.pod(2), size=1447) == 0


def test_services_and_nodeports_by_iptables(mesh):
    one, two = mesh.nodes
    with mesh.pod(2).listen(8080):
        assert mesh.pod(1).ask(mesh.pod(2)) == mesh.pod(1).address()
        assert mesh.pod(1).ask(mesh.pod(2), family=6, kind="udp") == mesh.pod(1).address(6)
        one.dnat("10.96.0.1", 80, mesh.pod(2).address(), 8080)
        assert mesh.pod(1).ask("10.96.0.1", port=80) == mesh.pod(1).address()
        two.nodeport(30080, mesh.pod(2).address(), 8080)
        mesh.wire.allow_plaintext("a client outside the mesh speaks in the clear, and the rig's marker is in what it says")
        assert one.ask(two, port=30080)
    with pytest.raises(OSError):
        mesh.pod(1).ask(mesh.pod(2))


def test_throughput_through_esp(mesh):
    assert mesh.pod(1).iperf(mesh.pod(2), seconds=1, streams=8) > 0.01
    assert mesh.wire.tunnelled > 1000


def test_the_sas_of_a_node_are_listed_without_keys(mesh):
    assert {sa["spi"] for sa in mesh.node(1).sas()} == {0x1002, 0x2001}
