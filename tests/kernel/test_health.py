"""/healthz, /readyz and /metrics of a daemon, over its life."""

import json
import os
import pathlib
import signal

import pytest

import frames
from rig import eventually

PORT = 8081
ASK = """
import sys, urllib.error, urllib.request
try:
    answer = urllib.request.urlopen(sys.argv[1], timeout=20)
except urllib.error.HTTPError as error:
    answer = error
print(answer.status, answer.read().decode())
"""


def ask(node, path, at="127.0.0.1"):
    """Status and body."""
    status, _, body = node.run(["/usr/bin/python3", "-c", ASK, f"http://{at}:{PORT}{path}"]).partition(" ")
    return int(status), body


def metrics(node):
    status, body = ask(node, "/metrics")
    assert status == 200
    lines = [line.rsplit(" ", 1) for line in body.splitlines() if line and not line.startswith("#")]
    return {name: float(value) for name, value in lines}


@pytest.fixture
def lab(make_lab):
    lab = make_lab(2)
    lab.configure()
    return lab


def test_health_readiness_and_metrics_follow_what_becomes_of_a_daemon(lab):
    node, peer, folder = lab.node(1), lab.node(2), pathlib.Path(lab.lease_dir)
    conf = folder / "net-conf.json"
    good = conf.read_text()
    lab.start(f"--healthz-port={PORT}")
    lab.pods()
    assert ask(node, "/healthz", node.address())[0] == 200
    status, body = ask(node, "/readyz")
    assert status == 200 and body.startswith("ready: "), body
    told = metrics(node)
    assert told['ringmail_peers{state="up"}'] == 1 and told["ringmail_ready"] == 1, told
    assert told["ringmail_kernel_writes_total"] > 10 and told["process_resident_memory_bytes"] > 1 << 20
    assert told['ringmail_xfrm_errors_total{reason="XfrmInNoStates"}'] >= 0
    assert told["ringmail_configuration_refused"] == 0

    # The peer is gone; that is told while other things go on.
    lines = lambda text: [line for line in node.log().splitlines() if text in line]  # noqa: E731
    peer.ip("link set eth0 down")
    assert not lines("silent")

    conf.write_text(json.dumps({**json.loads(good), "Backend": {"Type": "ipsec", "UDPEncap": "perhaps"}}))
    eventually("the edit is refused", lambda: metrics(node)["ringmail_configuration_refused"] == 1, 10, 0.2)
    assert ask(node, "/readyz")[0] == 200, "the last good one is in force"
    conf.write_text(good)
    eventually("it is taken again", lambda: metrics(node)["ringmail_configuration_refused"] == 0, 10, 0.2)
    mistyped = json.loads(good)
    mistyped["Backend"]["UDPEncapp"] = True
    assert not lines("UDPEncapp")
    conf.write_text(json.dumps(mistyped))
    [line] = eventually("a mistyped key is warned of", lambda: lines("UDPEncapp"), 10, 0.2)
    assert "WARN" in line and "did you mean" in line, line
    conf.write_text(good)

    # Pods of the node still reach each other.
    node.ip("link set eth0 down")
    eventually("the uplink's absence is told", lambda: "no uplink now" in ask(node, "/readyz")[1], 5, 0.2)
    assert ask(node, "/readyz")[0] == 200
    node.ip("link set eth0 up", "route replace default via 192.168.77.254 dev eth0")
    eventually("it is back", lambda: "uplink" not in ask(node, "/readyz")[1], 5, 0.2)

    # Spoofed, and not ESP.
    before = metrics(node)['ringmail_plaintext_dropped_packets_total{way="arriving"}']
    lab.spoof(1, frames.udp(lab.pod(2).address(), lab.pod(1).address()), count=3)
    eventually(
        "the guard's drops are counted",
        lambda: metrics(node)['ringmail_plaintext_dropped_packets_total{way="arriving"}'] >= before + 3,
    )
    # subnet.env can't be written: pods can't start.
    (node.directory / "subnet.env").unlink()
    (node.directory / "subnet.env").mkdir()
    status, body = eventually("it is not ready", lambda: (found := ask(node, "/readyz"))[0] == 503 and found, 10, 0.2)
    assert "subnet.env" in body and ask(node, "/healthz")[0] == 200, body
    (node.directory / "subnet.env").rmdir()
    eventually("it is ready again", lambda: ask(node, "/readyz")[0] == 200, 15, 0.2)

    [line] = eventually("the peer's silence is told", lambda: lines("a peer has fallen silent"), 60, 0.5)
    assert "WARN" in line and peer.namespace in line and "is the node up" in line, line
    peer.ip("link set eth0 up", "route replace default via 192.168.77.254 dev eth0")
    eventually("and its return", lambda: any(peer.namespace in line for line in lines("a peer is heard again")), 30, 0.5)
    assert len(lines("a peer has fallen silent")) == len(lines("UDPEncapp")) == 1


def of_peer(told, name, peer, **labels):
    """The value of a series of one peer."""
    chosen = ",".join(f'{key}="{value}"' for key, value in {"peer": peer, **labels}.items())
    return told[f"{name}{{{chosen}}}"]


def test_metrics_count_what_a_mesh_carries_renews_and_mends(lab):
    one, two = lab.node(1), lab.node(2)
    lab.start(f"--healthz-port={PORT}")
    lab.pods()
    peer = two.namespace
    told = metrics(one)
    assert told['ringmail_rotations_total{cause="start"}'] == 1 and told['ringmail_rotations_total{cause="asked"}'] == 0
    assert 0 < told["ringmail_probes_answered_total"] <= told["ringmail_probes_sent_total"], told
    assert told["ringmail_probe_round_trip_seconds_count"] == told["ringmail_probes_answered_total"]
    assert told["ringmail_pass_duration_seconds_count"] > 2 and told["ringmail_drift_repaired_total"] == 0, told
    assert told["ringmail_soft_limit_remaining_packets"] > 1 << 32 and told["ringmail_soft_limit_used_ratio"] < 0.01
    assert of_peer(told, "ringmail_peer_state", peer, state="up") == 1
    assert 0 < of_peer(told, "ringmail_peer_round_trip_seconds", peer) < 5
    assert of_peer(told, "ringmail_peer_heard_age_seconds", peer) < 60
    assert of_peer(told, "ringmail_peer_epoch", peer) == metrics(two)["ringmail_epoch"]

    # What went before a rotation is still counted after the SAs that carried it are gone.
    lab.pod(1).ping(lab.pod(2).address(), count=10, interval=0.05)
    before = metrics(one)
    for way in ("sent", "received"):
        assert of_peer(before, "ringmail_peer_packets_total", peer, way=way) >= 10, before
        assert of_peer(before, "ringmail_peer_bytes_total", peer, way=way) >= 10 * 84, before
    one.ringmail("rotate")

    def rotated():
        told = metrics(one)
        assert told['ringmail_rotations_total{cause="asked"}'] == 1, told
        assert told["ringmail_rotation_duration_seconds_count"] == 1, told
        return told if len(one.sas()) <= 2 else None

    told = eventually("the rotation is over, and the old SAs are gone", rotated, 30, 0.5)
    assert 0 < told["ringmail_rotation_duration_seconds_sum"] < 20 and told["ringmail_rotations_unfinished_total"] == 0
    assert told["ringmail_epoch"] > before["ringmail_epoch"] and told["ringmail_drift_repaired_total"] == 0, told
    for name in ("ringmail_peer_packets_total", "ringmail_peer_bytes_total"):
        for way in ("sent", "received"):
            assert of_peer(told, name, peer, way=way) >= of_peer(before, name, peer, way=way), (name, way)

    # Another hand takes a route, and all policies.
    subnet = lab.pod(2).address().rpartition(".")[0] + ".0/24"
    one.ip(f"route del {subnet}")
    eventually("the route is back", lambda: metrics(one)["ringmail_drift_repaired_total"] == 1, 10, 0.2)
    one.ip("xfrm policy flush")
    eventually("the policies are back", lambda: metrics(one)["ringmail_drift_repaired_total"] >= 4, 10, 0.2)
    assert metrics(one)["ringmail_kernel_write_errors_total"] == 0

    # A packet that is played back.
    before = metrics(one)
    lab.replay(2, 1, count=3)
    eventually(
        "it is counted",
        lambda: metrics(one)['ringmail_xfrm_errors_total{reason="XfrmInStateSeqError"}']
        >= before['ringmail_xfrm_errors_total{reason="XfrmInStateSeqError"}'] + 3,
    )
    told = metrics(one)
    refused = of_peer(told, "ringmail_peer_refused_packets_total", peer)
    assert refused >= of_peer(before, "ringmail_peer_refused_packets_total", peer) + 3, (before, told)
    meant = [name for name in told if name.startswith('ringmail_xfrm_error_info{reason="XfrmInStateSeqError",meaning="')]
    assert len(meant) == 1 and "a replay is refused" in meant[0], told

    # The same without series of single peers, by a new process.
    began = metrics(two)["process_start_time_seconds"]
    two.stop()
    two.start(*lab.flags, f"--healthz-port={PORT}", "--metrics-peers=false")
    two.ready()
    told = eventually(
        "it has its peer again", lambda: (told := metrics(two))['ringmail_peers{state="up"}'] == 1 and told, 20, 0.2
    )
    assert told["process_start_time_seconds"] > began and told['ringmail_esp_packets_total{way="received"}'] >= 0
    assert not [name for name in told if "peer=" in name], told


def test_data_that_comes_spares_questions_and_a_daemon_that_hangs_beside_it_is_told_from_a_cut(lab):
    one, two = lab.node(1), lab.node(2)
    lab.start(f"--healthz-port={PORT}")
    lab.pods()
    with lab.flow(2, 1, rate=20):
        eventually("questions are left out", lambda: metrics(one)["ringmail_probes_left_out_total"] >= 1, 60, 0.5)
        told = metrics(one)
        assert of_peer(told, "ringmail_peer_heard_age_seconds", two.namespace) < 20, told
        assert of_peer(told, "ringmail_peer_loss_ratio", two.namespace) == 0, told
        # What it sends only: nothing comes to it but answers, so it goes on to ask.
        assert metrics(two)["ringmail_probes_left_out_total"] == 0
        os.kill(two.pid, signal.SIGSTOP)
        try:
            told = eventually("its silence is named", lambda: one.status()["peers"][0]["reason"], 120, 0.5)
        finally:
            os.kill(two.pid, signal.SIGCONT)
        assert told.startswith("its data comes, and its daemon does not answer the last "), told
    eventually("it answers", lambda: one.status()["peers"][0]["reason"] is None, 30, 0.5)
