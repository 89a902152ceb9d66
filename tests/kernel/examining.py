"""A mesh that `ringmail doctor` looks at: what the tests of its findings have in common."""

import contextlib
import json
import os
import pathlib
import threading
import time

from rig import eventually
from running import PSK, Running

NETWORK = "10.244.0.0/20"


@contextlib.contextmanager
def examined(name, keywatch, count=3):
    """A mesh of two nodes with pods, and room for more. The Network has room for 15 nodes. Every node has a PSK file of its
    own where it has the attribute `psk`; `cni` is the folder of the container runtime's configurations."""
    mesh = Running(f"t{os.getpid() % 100000}-{name}", count, keywatch)
    mesh.configure(network=NETWORK)
    mesh.cni = mesh.folder / "cni"
    mesh.cni.mkdir()
    (mesh.cni / "10-flannel.conflist").write_text(json.dumps({"plugins": [{"type": "flannel"}, {"type": "portmap"}]}))
    mesh.subnets()
    try:
        for number in (1, 2):
            psk = mesh.folder / f"psk{number}"
            mesh.write_psk(PSK, psk)
            mesh.lab.node(number).psk = psk
            start(mesh, number)
        mesh.in_order(1, 2)
        for number in (1, 2):
            mesh.lab.make_pod(number)
        assert mesh.lab.pod(1).ping(mesh.lab.pod(2), count=2, interval=0.2) == 2
        yield mesh
    finally:
        mesh.down()


# A clock that others live by, of a machine that is no guest of its own, is not moved.
GUEST = "User Mode Linux" in pathlib.Path("/proc/cpuinfo").read_text()
moved = 0


def set_clock(by):
    """Moves the guest's clock, seconds."""
    global moved
    if GUEST:
        time.clock_settime(time.CLOCK_REALTIME, time.time() + by)
        moved += by


def set_clock_back():
    """Undoes all that `set_clock` did."""
    set_clock(-moved)


def start(mesh, number, *flags):
    node = mesh.lab.node(number)
    node.start("--lease-dir", str(mesh.lease_dir), "--psk-file", str(getattr(node, "psk", mesh.psk_file)), *flags)


def leave(mesh, number):
    """A node goes, and leaves nothing."""
    node = mesh.lab.node(number)
    node.stop()
    node.ringmail("cleanup", "--lease-dir", str(mesh.lease_dir), check=False)


def doctor(mesh, number, watch=0, *flags):
    """The findings of a node, as JSON has them."""
    arguments = ["--json", "--watch", str(watch), "--cni-conf-dir", str(mesh.cni), *flags]
    done = mesh.lab.node(number).ringmail("doctor", *arguments, check=False, timeout=90)
    assert not done.stderr, done.stderr
    findings = json.loads(done.stdout)["findings"]
    assert done.returncode == bool(findings), done
    return findings


def named(mesh, number, check, watch=0, timeout=15):
    """The finding of this name, once doctor has it."""
    last = []

    def found():
        last[:] = doctor(mesh, number, watch)
        return next((one for one in last if one["check"] == check), None)

    try:
        return eventually(f"doctor finds {check}", found, timeout)
    except AssertionError as error:
        raise AssertionError(f"{error}; it found {last}") from None


# What tells of the last 20 probes, so of minutes, and what stays until the count is set back.
LASTING = {"loss", "plaintext-dropped"}


def clean(mesh, *numbers, timeout=30):
    for number in numbers or (1, 2):
        last = []

        def nothing(number=number, last=last):
            last[:] = [one for one in doctor(mesh, number) if one["check"] not in LASTING]
            return not last

        try:
            eventually(f"doctor finds nothing at node {number}", nothing, timeout)
        except AssertionError:
            raise AssertionError(f"doctor goes on to find {last}") from None


def conf(mesh, **backend):
    mesh.configure(network=NETWORK, **backend)


def ghost(mesh, number, key=None):
    """A lease of a node that is not there."""
    path = mesh.lease_dir / f"{key or f'10.244.{number}.0-24'}.json"
    path.write_text(json.dumps({"Node": f"ghost{number}", "PublicIP": f"192.168.77.{100 + number}", "BackendType": "ipsec"}))
    return path


@contextlib.contextmanager
def files(*paths):
    try:
        yield
    finally:
        for path in paths:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def meanwhile(action):
    """Repeats an action while the body runs."""
    over = threading.Event()

    def repeat():
        while not over.wait(0.1):
            action()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
