"""The store misbehaves and other programs flood the kernel's notifications: no plaintext on the wire, nothing that is
served is dropped for it, and all is in order again in the time stated.

One mesh of three nodes for the file; its lease folder is a link that a test can turn to another folder. The wire and the
keys are checked after every test; each test ends with the mesh in order."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import time

import pytest

from rig import eventually
from running import Running, measured, objects, spis

class Linked(Running):
    """A mesh whose daemons find the folder of leases through a link."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.link = self.folder / "linked"
        self.link.symlink_to(self.lease_dir)
        self.flags[self.flags.index(str(self.lease_dir))] = str(self.link)
        self.frozen = self.folder / "frozen"
        self.frozen.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "frozen", self.frozen], check=True)

    def turn(self, folder):
        """Turns the link, at once, as a tool that replaces every file does. The touch is for inotify: a link tells nobody."""
        before = self.link.resolve()
        new = self.link.with_name("new")
        new.symlink_to(folder)
        new.rename(self.link)
        if before == self.frozen:
            self.freeze("rw")
        (before / "touch.json").touch()
        (before / "touch.json").unlink()

    def freeze(self, how="ro"):
        subprocess.run(["mount", "-o", f"remount,{how}", self.frozen], check=True)

    def down(self):
        subprocess.run(["umount", "-l", self.frozen], check=True)
        super().down()

    def cpu(self, number):
        """Seconds of processor time that a daemon has taken so far."""
        fields = pathlib.Path(f"/proc/{self.lab.node(number).pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def epochs(self):
        return [self.status(node.number)["epoch"] for node in self.lab.nodes]


@pytest.fixture(scope="module")
def mesh(keywatch):
    mesh = Linked(f"t{os.getpid() % 100000}-adv", 3, keywatch)
    try:
        mesh.subnets()
        mesh.start()
        mesh.in_order()
        mesh.lab.pods()
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
    mesh.in_order()
    yield
    mesh.in_order()
    mesh.lab.wire.assert_clean()
    keywatch.check()


@pytest.fixture
def frozen(mesh):
    """A second folder, in which a test puts what it likes and which takes no writes from mesh.freeze() on."""
    shutil.copy(mesh.lease_dir / "net-conf.json", mesh.frozen)
    yield mesh.frozen
    mesh.turn(mesh.lease_dir)
    for path in mesh.frozen.iterdir():
        path.unlink()


def test_nodes_whose_leases_all_vanish_are_served_while_they_answer(mesh, frozen):
    """The link leads to a folder with a configuration and no lease, that takes none: what a wrong mount looks like."""
    held = [objects(node) for node in mesh.lab.nodes]
    epochs = mesh.epochs()
    (frozen / ".sequence").write_text("9\n")
    mesh.freeze()
    gone = lambda: [peer["reason"] or "" for n in (1, 2, 3) for peer in mesh.status(n)["peers"]]  # noqa: E731
    with mesh.outage(1, 2) as outage:
        mesh.turn(frozen)
        named = lambda: all("its lease is gone from the store" in reason for reason in gone())  # noqa: E731
        eventually("every node names every other", named, 45, 0.5)
        time.sleep(12)
        assert named(), gone()
        assert "read-only" in str(mesh.status(1)["problems"]), "the own lease can't be put back"
        assert [objects(node) for node in mesh.lab.nodes] == held
        mesh.turn(mesh.lease_dir)
        mesh.in_order(timeout=45)
    assert not outage.lost, outage
    assert mesh.epochs() == epochs


def test_a_node_that_stopped_and_whose_lease_is_removed_is_let_go(mesh):
    node = mesh.lab.node(3)
    # In a folder that was put in place just now, losses are believed later (src/store/mirror.rs).
    time.sleep(11)
    node.kill()
    with mesh.outage(1, 2) as outage:
        mesh.lease(3).unlink()
        removed = time.monotonic()
        eventually("node 1 lets go of it", lambda: mesh.peer(1, 3) is None, 10)
        measured("a stopped node whose lease was removed is let go after", time.monotonic() - removed)
        assert not [sa for sa in mesh.lab.node(1).sas() if "192.168.77.3" in sa.values()]
        mesh.start(3)
        mesh.in_order()
    assert not outage.lost, outage


def test_leases_of_an_hour_ago_in_a_folder_that_takes_no_writes_are_refused_and_named(mesh, frozen):
    for path in mesh.lease_dir.glob("*-24.json"):
        shutil.copy(path, frozen)
    mesh.freeze()
    before = mesh.epochs()
    for node in mesh.lab.nodes:
        node.ringmail("rotate")
    mesh.in_order()
    assert all(after > epoch for after, epoch in zip(mesh.epochs(), before))
    held = [spis(node) for node in mesh.lab.nodes]
    with mesh.outage(1, 2) as outage:
        mesh.turn(frozen)
        reasons = lambda: [peer["reason"] or "" for peer in mesh.status(1)["peers"]]  # noqa: E731
        refused = lambda: all("a lease was rolled back" in reason for reason in reasons())  # noqa: E731
        eventually("they are named", refused, 45, 0.5)
        assert all("the newest lease is refused, its last good one serves" in reason for reason in reasons())
        assert {peer["state"] for peer in mesh.status(1)["peers"]} == {"up"}
        time.sleep(3)
        mesh.turn(mesh.lease_dir)
        mesh.in_order(timeout=45)
    assert not outage.lost, outage
    # What drained meanwhile is gone; what there is was there before.
    assert all(spis(node) <= had for node, had in zip(mesh.lab.nodes, held)), "no key was made for them"


def test_a_backup_that_is_restored_over_the_leases_is_written_over_within_a_second(mesh, tmp_path):
    names = [path.name for path in mesh.lease_dir.iterdir()]
    for name in names:
        shutil.copy(mesh.lease_dir / name, tmp_path)
    for node in mesh.lab.nodes:
        node.ringmail("rotate")
    mesh.in_order()
    epochs = mesh.epochs()
    now = {path.name: json.loads(path.read_text())["BackendData"] for path in mesh.lease_dir.glob("*-24.json")}
    with mesh.outage(1, 2) as outage:
        for name in names:
            shutil.copy(tmp_path / name, mesh.lease_dir / ".copied")
            (mesh.lease_dir / ".copied").rename(mesh.lease_dir / name)
        restored = time.monotonic()
        read = lambda path: json.loads(path.read_text())["BackendData"]  # noqa: E731
        back = lambda: {path.name: read(path) for path in mesh.lease_dir.glob("*-24.json")} == now  # noqa: E731
        eventually("each node has published again", back, 10, 0.05)
        measured("restored backup: every own lease published again after", time.monotonic() - restored)
        mesh.in_order()
    assert not outage.lost, outage
    assert mesh.epochs() == epochs


@pytest.mark.parametrize("sequence", [None, "1\n", "no number\n", "99999999999999999999999\n"])
def test_a_sequence_that_is_lost_or_rolled_back_keeps_nobody_from_publishing(mesh, sequence):
    path = mesh.lease_dir / ".sequence"
    with mesh.outage(1, 2) as outage:
        path.unlink() if sequence is None else path.write_text(sequence)
        for node in mesh.lab.nodes:
            node.ringmail("rotate")
        mesh.in_order()
    assert not outage.lost, outage
    revisions = [json.loads(path.read_text())["Revision"] for path in mesh.lease_dir.glob("*-24.json")]
    assert len(set(revisions)) == 3, revisions


def flood(node, seconds):
    """Adds and deletes foreign SAs as fast as `ip` can."""
    key = "00" * 20
    add = f"xfrm state add src 192.0.2.1 dst 192.0.2.2 proto esp spi 0x%x reqid 7 mode tunnel aead rfc4106(gcm(aes)) 0x{key} 128"
    lines = [add % (0x2000 + n) for n in range(500)]
    lines += [f"xfrm state delete src 192.0.2.1 dst 192.0.2.2 proto esp spi 0x{0x2000 + n:x}" for n in range(500)]
    end, done = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        node.ip(*lines)
        done += len(lines)
    return done


def test_notifications_that_are_lost_in_a_flood_are_made_up_for_by_one_reading(mesh):
    node = mesh.lab.node(1)
    before = objects(node)
    lost = lambda: node.log().count("notifications were lost")  # noqa: E731
    had = lost()
    os.kill(node.pid, signal.SIGSTOP)
    try:
        told = 0
        # The queue holds some thousands; what comes after it is full is lost.
        while told < 60_000:
            told += flood(node, 1)
        node.run("ip xfrm policy delete dir out src 0.0.0.0/0 dst 10.244.3.0/24; ip route del 10.244.2.0/24")
    finally:
        cpu = mesh.cpu(1)
        os.kill(node.pid, signal.SIGCONT)
    woken = time.monotonic()
    eventually("what was removed unseen is mended", lambda: objects(node) == before, 10, 0.05)
    measured("after a flood of 60,000 notifications: what was removed unseen is mended after", time.monotonic() - woken)
    measured("processor time for that", mesh.cpu(1) - cpu)
    assert 1 <= lost() - had <= 6, lost() - had
    assert mesh.cpu(1) - cpu < 3


def test_a_flood_of_foreign_sas_takes_no_packet_and_little_time(mesh):
    epochs, cpu = mesh.epochs(), mesh.cpu(1)
    with mesh.outage(1, 2, rate=200) as outage:
        done = flood(mesh.lab.node(1), 5)
    spent = mesh.cpu(1) - cpu
    measured(f"processor time of the daemon while another made and removed {done} SAs in 5 s", spent)
    assert not outage.lost, outage
    assert spent < 2.5, spent
    assert mesh.epochs() == epochs
