"""UDPEncap and restarts: under systemd, with deploy/ringmail.service, and without a service manager.

Node 1 runs under systemd, node 2 does not. The rows that are printed stand in README's table."""

import os
import signal
import time

import pytest

from load import Load
from rig import REPOSITORY, eventually, program
from running import milliseconds
from systemd import Systemd
from table import Table, nothing_lost, row

UNIT = "ringmail-1"
RESTARTS = 6
FILES = (
    "ProtectSystem ProtectHome PrivateTmp PrivateDevices ProtectClock ProtectControlGroups ProtectHostname "
    "ProtectKernelLogs ProtectKernelModules"
).split()


@pytest.fixture(scope="module")
def mesh(keywatch):
    mesh = Table(f"t{os.getpid() % 100000}-sd", 2, keywatch, UDPEncap=True)
    manager = None
    try:
        mesh.subnets()
        node = mesh.lab.node(1)
        mesh.systemd = manager = Systemd(f"/run/sd{os.getpid() % 100000}")
        manager.unit(
            UNIT,
            REPOSITORY / "deploy" / "ringmail.service",
            "[Service]",
            "ExecStart=",
            f"ExecStart={program()} run {' '.join(mesh.arguments(1))}",
            f"NetworkNamespacePath=/run/netns/{node.namespace}",
            f"StandardError=append:{node.directory}/daemon.log",
            "StateDirectory=",
            # Its own view of the file system is no part of this: the checkout may lie anywhere, and User Mode Linux can't
            # make one on the machine's files. Capabilities, address families and system calls are as in the unit.
            *(f"{one}=no" for one in FILES),
            "ReadWritePaths=",
        )
        mesh.start(2)
        manager.call("start", UNIT)
        mesh.in_order()
        mesh.places = mesh.lab.pods()
        yield mesh
    finally:
        if manager:
            manager.close()
        mesh.down()


@pytest.fixture(autouse=True)
def watched(request, mesh, keywatch):
    """After each test: nothing of the pods was on the wire, all of it was in UDP, and no outbound key came twice."""
    request.node.labs = [mesh.lab]
    yield
    mesh.lab.wire.assert_clean()
    assert mesh.lab.wire.counts["udp4500"] and not mesh.lab.wire.counts["esp"]
    keywatch.check()


def main_pid(mesh):
    return int(mesh.systemd.show(UNIT, "MainPID")["MainPID"])


def sockets(mesh):
    """Where node 1 takes ESP out of UDP."""
    return {line.split()[3] for line in mesh.lab.node(1).run("ss -Hlun").splitlines() if ":45" in line}


def closes_on_exec(pid, descriptor):
    with open(f"/proc/{pid}/fdinfo/{descriptor}") as info:
        flags = next(line.split()[1] for line in info if line.startswith("flags:"))
    return int(flags, 8) & os.O_CLOEXEC


def test_systemd_is_told_and_keeps_the_socket(mesh):
    shown = mesh.systemd.show(UNIT, "ActiveState", "SubState", "StatusText", "NFileDescriptorStore")
    assert shown["ActiveState"] == "active" and shown["SubState"] == "running" and "serving" in shown["StatusText"], shown
    assert int(shown["NFileDescriptorStore"]) == len(sockets(mesh)) == 1, (shown, sockets(mesh))
    assert mesh.status(1)["encap_kept"] is True
    assert mesh.status(2)["encap_kept"] is False
    assert "kept by the service manager" in " ".join(mesh.lab.node(1).ringmail("status").split())
    assert "nothing comes in by UDP while this daemon does not run" in " ".join(mesh.lab.node(2).ringmail("status").split())


def test_under_systemd_restarts_lose_nothing_with_udp_encapsulation(mesh):
    with Load(mesh, mesh.places) as load:
        for turn in range(RESTARTS):
            pid = main_pid(mesh)
            if turn % 2:
                os.kill(pid, signal.SIGKILL)
            else:
                mesh.systemd.call("restart", UNIT)
            eventually("another daemon", lambda: main_pid(mesh) not in (0, pid), 20)  # noqa: B023
            mesh.in_order()
    nothing_lost(load)
    assert "goes on with the socket for ESP in UDP that the service manager kept" in mesh.lab.node(1).log()
    assert int(mesh.systemd.show(UNIT, "NFileDescriptorStore")["NFileDescriptorStore"]) == 1
    inherited = [fd for fd in os.listdir(f"/proc/{main_pid(mesh)}/fd") if int(fd) > 2 and not closes_on_exec(main_pid(mesh), fd)]
    assert not inherited, "a child would have them"
    row(mesh, f"UDPEncap, `systemctl restart` and SIGKILL in turn, {RESTARTS} times, under systemd", load)


def test_a_kept_socket_that_no_longer_fits_is_closed_there_too(mesh):
    """The port has changed while nobody looked."""
    pid = main_pid(mesh)
    os.kill(pid, signal.SIGSTOP)
    mesh.configure(UDPEncap=True, EncapPort=4555)
    os.kill(pid, signal.SIGKILL)
    eventually("another daemon", lambda: main_pid(mesh) not in (0, pid), 20)
    mesh.in_order()
    assert {local.rsplit(":", 1)[1] for local in sockets(mesh)} == {"4555"}, sockets(mesh)
    assert "closes what the service manager kept" in mesh.lab.node(1).log()
    kept = lambda: mesh.systemd.show(UNIT, "NFileDescriptorStore")["NFileDescriptorStore"]  # noqa: E731
    eventually("the store has the new one alone", lambda: kept() == "1", 5)
    mesh.configure(UDPEncap=True)
    eventually("back at the usual port", lambda: {local.rsplit(":", 1)[1] for local in sockets(mesh)} == {"4500"}, 20)
    eventually("and so in the store", lambda: kept() == "1", 5)
    mesh.in_order()


@pytest.mark.parametrize("way", [signal.SIGTERM, signal.SIGKILL])
def test_without_a_service_manager_the_gap_is_the_restarts_length(mesh, way):
    with Load(mesh, mesh.places) as load:
        time.sleep(1)
        ended = time.monotonic()
        mesh.end(2, way)
        mesh.start(2)
        mesh.in_order()
        time.sleep(1)
    assert load.lost and not load.broken, load
    towards = [stream["lost"] for stream in load.streams if stream["to"] == 2 and stream["lost"]]
    assert towards and not any(stream["lost"] for stream in load.streams if stream["kind"] == "udp" and stream["to"] == 1)
    row(mesh, f"UDPEncap, {way.name} and restart of a daemon, without a service manager", load, f"gap {milliseconds(load.over() - ended)}, one way")
