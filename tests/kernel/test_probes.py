"""What probes tell of the way to a peer: what is lost, whether full packets pass. And the guard's count of plaintext.

UDPEncap "auto", under which a peer is asked every two seconds and not every fifteen."""

import json
import os
import re
import shutil
import subprocess

import pytest

import frames
import netns
from rig import Lab, eventually

FULL = 1438  # the mesh MTU over an uplink of 1500
NARROW = 1400  # what the wire's port to node 2 takes
FITS = 1342, 1350  # the largest inner packet for it, in UDP and in plain ESP: a port lets 4 bytes more through, for a VLAN tag


@pytest.fixture(scope="module")
def lab(keywatch):
    lab = Lab(f"t{os.getpid() % 100000}-probes", 2, keywatch=keywatch)
    try:
        lab.configure(UDPEncap="auto")
        lab.start()
        lab.pods()
        yield lab
    finally:
        lab.down()


@pytest.fixture(autouse=True)
def checked(request, lab, keywatch):
    """Nothing in plaintext and no key twice, after every test."""
    request.node.labs = [lab]
    yield
    lab.wire.assert_clean()
    keywatch.check()


def peer(lab, number):
    """How a node sees the other."""
    (one,) = lab.node(number).status()["peers"]
    return one


def test_a_path_that_swallows_full_packets_is_named_with_the_size_that_passes_until_it_is_mended(lab):
    for number in (1, 2):
        eventually("full packets pass", lambda: peer(lab, number)["full_size"], 20, 0.5)  # noqa: B023
        assert lab.node(number).ringmail("status", check=False).returncode == 0
    # A bridge tells nobody of what is too large for a port.
    wire = f"{lab.name}-wire"
    netns.run(wire, f"ip link set node2 mtu {NARROW}")
    assert lab.pod(1).ping(lab.pod(2), size=FULL, timeout=1) == 0, "the path is narrow"
    lab.node(1).ringmail("rotate")
    named = eventually("it is named", lambda: (one := peer(lab, 1))["full_size"] is False and one, 60, 0.5)
    assert named["state"] == "up" and f"packets of {FULL} bytes do not pass" in named["reason"], named
    assert lab.pod(1).ping(lab.pod(2), size=400, count=3) == 3, "data goes on"
    shown = lab.node(1).ringmail("status", check=False)
    assert shown.returncode == 1 and "net-conf.json" in shown.stdout
    text = eventually("what passes is found", lambda: (why := peer(lab, 1)["reason"]) and "those of" in why and why, 120, 1)
    size = int(text.split("those of ")[1].split()[0])
    assert FITS[0] - 4 <= size <= FITS[1], text
    netns.run(wire, "ip link set node2 mtu 1500")
    mended = eventually("it is mended", lambda: (one := peer(lab, 1))["full_size"] and one, 90, 1)
    assert mended["reason"] is None, mended
    assert lab.pod(1).ping(lab.pod(2), size=FULL) == 1
    # What the kernel knows of the path it is asked for, and not made to cut in pieces.
    lab.node(1).ip(f"route add {lab.node(2).address()} dev eth0 mtu {NARROW}")
    lab.node(1).ringmail("rotate")
    eventually("the kernel's word is taken", lambda: peer(lab, 1)["full_size"] is False, 30, 0.5)
    lab.node(1).ip(f"route del {lab.node(2).address()} dev eth0")


def test_plaintext_that_the_guard_drops_is_told_by_status_and_audit_until_the_count_is_set_back(lab):
    node = lab.node(1)
    assert node.status()["problems"] == [] and node.audit()["dropped"]["arriving"]["packets"] == 0
    assert "dropped: nothing" in node.ringmail("audit")
    lab.spoof(1, frames.udp(lab.pod(2).address(), lab.pod(1).address()), count=3)
    (told,) = eventually("status tells", lambda: node.status()["problems"], 10)
    assert "dropped 3 packets of the mesh that came in by eth0 without ESP" in told, told
    assert node.status()["plaintext"]["arriving"]["packets"] == 3 and node.status()["plaintext"]["leaving"]["packets"] == 0
    shown = node.ringmail("status", check=False)
    assert shown.returncode == 1 and "problem: the guard has dropped 3 packets" in shown.stdout
    audit = json.loads(node.ringmail("audit", "--json"))
    assert audit["ok"] and audit["dropped"]["arriving"]["packets"] == 3 and audit["dropped_told"] == told, "stopped: no way"
    assert "dropped 3 packets" in node.ringmail("audit")
    assert lab.node(2).status()["problems"] == []
    node.run(told.split("set the count back: ")[1])
    eventually("it is forgotten", lambda: node.status()["problems"] == [], 5)
    assert node.audit()["ok"], "and nothing else of the packet filter was changed"


def test_a_guard_whose_numbers_can_not_be_read_is_told_by_status_and_audit(lab):
    node = lab.node(1)
    program = os.path.realpath(shutil.which("iptables-legacy-save"))
    # As the daemon sees it: what it runs to read them fails.
    inside = ["nsenter", "--mount", "--target", str(node.pid)]
    subprocess.run([*inside, "mount", "--bind", "/bin/false", program], check=True)
    try:
        (told,) = node.status()["problems"]
        assert re.match(r"what the guard has dropped can't be read: packet filter \(iptables\): \S+-save \(exit code 1\)", told), told
        assert node.status()["plaintext"] is None, "not known is not none"
        shown = node.ringmail("status", check=False)
        assert shown.returncode == 1 and "problem: what the guard has dropped can't be read" in shown.stdout, shown
        audit = node.ringmail("audit", check=False)
        assert audit.returncode != 0 and "read the packet filter" in audit.stderr, audit
        assert lab.pod(1).ping(lab.pod(2)) == 1, "the guard itself stands"
    finally:
        subprocess.run([*inside, "umount", program], check=True)
    assert node.status()["problems"] == [] and node.status()["plaintext"]["arriving"]["packets"] == 0
    assert node.audit()["ok"]


def test_loss_on_the_way_is_shown_as_the_share_of_probes_without_an_answer(lab):
    before = peer(lab, 1)["loss"]
    assert before is not None and before < 0.3, "nothing is lost on a wire, but a daemon may be slow under load"
    lab.node(1).netem("loss 30%")
    try:
        lost = eventually("it is shown", lambda: (loss := peer(lab, 1)["loss"]) > before + 0.1 and loss, 90, 1)
        assert lost < 0.8 and "% of probes lost" in " ".join(lab.node(1).ringmail("status", check=False).stdout.split())
        assert peer(lab, 1)["state"] == "up"
    finally:
        lab.node(1).netem(None)
