"""Troubles with keys, plaintext and the machine, made for real: doctor names each, it is undone, and doctor finds nothing any
more. One mesh of two nodes for the file; a third joins and leaves."""

import json
import os
import pathlib
import shutil
import signal
import subprocess

import pytest

import forger
import frames
import netns
from examining import GUEST, NETWORK, clean, doctor, examined, files, leave, meanwhile, named, start
from forger import Psk
from rig import eventually, program
from running import PSK

OTHER = "QW5vdGhlciBrZXkgZm9yIHRlc3RzIG9mIHRoaXMgcmVwbw"


@pytest.fixture(scope="module")
def mesh(keywatch):
    with examined("doctor-keys", keywatch, count=4) as mesh:
        hang(mesh)
        yield mesh


def hang(mesh):
    """Node 4, alone in a mesh of its own, hangs. Doctor waits for its answer for half a minute, beside the tests."""
    four, leases = mesh.lab.node(4), mesh.folder / "four"
    leases.mkdir()
    shutil.copy(mesh.lease_dir / "net-conf.json", leases)
    four.start("--lease-dir", str(leases), "--psk-file", str(mesh.psk_file))
    eventually("node 4 serves", lambda: not four.problems(), 15)
    os.kill(four.pid, signal.SIGSTOP)
    command = [program(), "doctor", "--json", "--watch", "0", "--run-dir", str(four.run_dir), "--cni-conf-dir", str(mesh.cni)]
    mesh.waiting = netns.spawn(four.namespace, command, stdout=subprocess.PIPE)


@pytest.fixture(autouse=True)
def watched(request, mesh, keywatch):
    request.node.labs = [mesh.lab]
    yield
    mesh.lab.wire.assert_clean()
    keywatch.check()


def write_lease(path, node, subnet, epoch, psk, **addresses):
    """A lease as the node's daemon writes it."""
    (address,) = addresses.values()
    key = Psk(psk, NETWORK)
    statement = forger.statement(node, subnet, address, epoch, key.kid, NETWORK)
    lease = json.loads(forger.lease(node, address, statement, key.tag(statement)))
    del lease["PublicIP"]
    path.write_text(json.dumps(lease | addresses))


@pytest.fixture
def three(mesh):
    """The third node, with a PSK file of its own. It is gone afterwards."""
    node = mesh.lab.node(3)
    node.psk = mesh.folder / "psk3"
    yield node
    leave(mesh, 3)
    clean(mesh, 1, 2)


def test_another_psk_another_family_and_numbers_of_epochs_that_have_ended_are_named(mesh, three):
    """An earlier process of node 3 has left a lease of the epoch before the last there is, as of a clock that ran away. Ours
    takes no uplink that lacks a family of the mesh, so that the lease of ghost4 is one of another implementation."""
    last = 2**64 - 1
    mesh.write_psk(OTHER, three.psk)
    lease = mesh.lease_dir / "10.244.3.0-24.json"
    write_lease(lease, three.namespace, "10.244.3.0/24", last - 1, OTHER, PublicIP=three.address())
    start(mesh, 3)
    found = named(mesh, 3, "psk")
    assert "2 nodes have another" in found["evidence"] and "compare the PSK files" in found["command"], found
    for number in (1, 3):
        found = named(mesh, number, "peer-refused")
        assert found["evidence"].startswith("no common PSK: it has "), found
        assert found["command"].startswith("ringmail status; the same on the peer"), found
        # As it says: what status lists here and there is what the finding tells of.
        for at in (1, 3):
            (psk,) = mesh.status(at)["psks"]
            assert psk["kid"] in found["evidence"], (psk, found)

    mesh.write_psk(PSK, three.psk)
    found = named(mesh, 3, "epoch-stalled")
    assert f"no epoch follows {last}: " in found["evidence"], found
    assert found["command"] == "systemctl stop ringmail && ringmail cleanup", found
    found = named(mesh, 3, "peer-waiting")
    assert found["evidence"].startswith("no common PSK with its newest epoch"), found
    # The key that was taken away is held for a while.
    assert all(psk["kid"] in found["evidence"] for psk in mesh.status(3)["psks"]), found
    assert found["command"].startswith("ringmail status; the same on the peer"), found
    named(mesh, 3, "clock-back")
    other = mesh.lease_dir / "10.244.4.0-24.json"
    with files(other):
        write_lease(other, "ghost4", "10.244.4.0/24", 1, PSK, PublicIPv6="fd77::99")
        found = named(mesh, 1, "peer-waiting")
        assert found["subject"] == "ghost4" and found["command"], found
        assert found["evidence"] == "no common address family: it is at fd77::99, this node at 192.168.77.1", found

    # What is said of the epochs, without systemd.
    three.stop()
    three.ringmail("cleanup")
    assert not lease.exists()
    mesh.had(three)
    start(mesh, 3)
    mesh.in_order(1, 2, 3)
    clean(mesh, 3)


def test_plaintext_that_the_guard_drops_is_named_until_the_count_is_set_back(mesh):
    one, lab = mesh.lab.node(1), mesh.lab
    lab.spoof(1, frames.udp("10.244.2.10", "10.244.1.10"), count=3)
    found = named(mesh, 1, "plaintext-dropped")
    assert "the guard has dropped 3 packets of the mesh that came in by eth0 without ESP" in found["evidence"], found
    one.run(found["command"])
    assert "plaintext-dropped" not in {one["check"] for one in doctor(mesh, 1)}

    # Another program opens a way out past the policies; only the rules at the uplink are left.
    one.run("ip xfrm policy add dir out src 0.0.0.0/0 dst 10.244.9.0/24 priority 100")
    one.run("ip route add 10.244.9.0/24 via 192.168.77.254")
    try:
        with meanwhile(lambda: one.run("ping -n -c 1 -W 1 10.244.9.10", check=False)):
            found = named(mesh, 1, "plaintext-seen", 2)
        assert "counter plaintext-leaving" in found["evidence"] and "ringmail audit" in found["command"], found
    finally:
        one.run("ip xfrm policy delete dir out src 0.0.0.0/0 dst 10.244.9.0/24; ip route del 10.244.9.0/24")
    clean(mesh, 1)
    found = named(mesh, 1, "plaintext-dropped")
    assert "to other nodes' pods that would have left by eth0 without ESP" in found["evidence"], found
    one.run(found["command"])
    assert "plaintext-dropped" not in {one["check"] for one in doctor(mesh, 1)}


def available():
    """Memory that is available and all there is, KiB."""
    lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    numbers = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return numbers["MemAvailable"], numbers["MemTotal"]


def test_memory_that_is_used_up_is_named(mesh):
    if not GUEST:
        pytest.skip("this machine's own memory is left alone: RINGMAIL_KERNEL=uml shows it")
    folder = mesh.folder / "memory"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100%", "memory", folder], check=True)
    try:
        taken = 0
        with open(folder / "taken", "wb") as file:
            while (left := available()) and left[0] * 100 >= left[1] * 4:
                more = max(left[0] - left[1] * 3 // 100, 1024) * 1024
                os.posix_fallocate(file.fileno(), taken, more)
                taken += more
        found = named(mesh, 1, "memory")
        assert f"of {left[1] // 1024} MiB are available" in found["evidence"] and found["command"].startswith("ps "), found
    finally:
        subprocess.run(["umount", folder], check=True)
    clean(mesh, 1)


# In the form of /proc/cpuinfo: an Intel Core 2 Duo E8400, and a Raspberry Pi 4, whose cores lack the cryptography extension.
WITHOUT_AES = {
    "x86": "processor\t: 0\nmodel name\t: Intel(R) Core(TM)2 Duo CPU E8400  @ 3.00GHz\nflags\t\t: fpu vme de pse tsc msr pae mce"
    " cx8 apic sep mtrr pge mca cmov pat pse36 clflush dts acpi mmx fxsr sse sse2 ss ht tm pbe syscall nx lm constant_tsc ssse3"
    " cx16 xtpr pdcm sse4_1 xsave lahf_lm\n",
    "ARM": "processor\t: 0\nBogoMIPS\t: 108.00\nFeatures\t: fp asimd evtstrm crc32 cpuid\nCPU implementer\t: 0x41\n",
}


def examine_on(mesh, processor):
    """What doctor finds at node 1 where /proc/cpuinfo says this: as the kernel of such a processor has it, for doctor alone."""
    path = mesh.folder / "cpuinfo"
    path.write_text(processor)
    command = ["unshare", "--mount", "sh", "-c", 'mount --bind "$0" /proc/cpuinfo && exec "$@"', str(path)]
    command += [program(), "doctor", "--json", "--watch", "0", "--cni-conf-dir", str(mesh.cni)]
    command += ["--run-dir", str(mesh.lab.node(1).run_dir)]
    done = mesh.lab.node(1).run(command, check=False)
    assert not done.stderr, done.stderr
    return json.loads(done.stdout)["findings"]


def test_a_processor_without_aes_is_named(mesh):
    for text in WITHOUT_AES.values():
        (found,) = examine_on(mesh, text)
        assert found["check"] == "no-aes" and "chacha20poly1305" in found["command"], found
        with_aes = text.replace(" crc32", " aes crc32").replace(" xsave", " aes xsave")
        assert with_aes != text and examine_on(mesh, with_aes) == []
    clean(mesh, 1)


def test_a_daemon_that_hangs_is_named(mesh):
    (found,) = json.loads(mesh.waiting.communicate(timeout=60)[0])["findings"]
    assert found["check"] == "daemon-silent" and "did not answer within " in found["evidence"], found
    assert "systemctl restart ringmail" in found["command"], found
    four = mesh.lab.node(4)
    os.kill(four.pid, signal.SIGCONT)
    clean(mesh, 4)
