"""/healthz, /readyz and /metrics of a daemon, over its life."""

import json
import pathlib

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


def ask(node, path):
    """Status and body."""
    status, _, body = node.run(["/usr/bin/python3", "-c", ASK, f"http://{node.address()}:{PORT}{path}"]).partition(" ")
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
    node, folder = lab.node(1), pathlib.Path(lab.lease_dir)
    conf = folder / "net-conf.json"
    good = conf.read_text()
    lab.start(f"--healthz-port={PORT}")
    lab.pods()
    assert ask(node, "/healthz")[0] == 200
    status, body = ask(node, "/readyz")
    assert status == 200 and body.startswith("ready: "), body
    told = metrics(node)
    assert told['ringmail_peers{state="up"}'] == 1 and told["ringmail_ready"] == 1, told
    assert told["ringmail_kernel_writes_total"] > 10 and told["process_resident_memory_bytes"] > 1 << 20
    assert told['ringmail_xfrm_errors_total{reason="XfrmInNoStates"}'] >= 0
    assert told["ringmail_configuration_refused"] == 0

    conf.write_text(json.dumps({**json.loads(good), "Backend": {"Type": "ipsec", "UDPEncap": "perhaps"}}))
    eventually("the edit is refused", lambda: metrics(node)["ringmail_configuration_refused"] == 1, 10, 0.2)
    assert ask(node, "/readyz")[0] == 200, "the last good one is in force"
    conf.write_text(good)
    eventually("it is taken again", lambda: metrics(node)["ringmail_configuration_refused"] == 0, 10, 0.2)

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
