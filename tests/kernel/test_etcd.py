"""A mesh whose leases lie in a real etcd: three daemons with the real program, and the verbs that look for the store."""

import json
import os
import pathlib
import shutil
import subprocess

import pytest

import netns
from rig import eventually, program

PREFIX = "/coreos.com/network"
# The wire answers for the default gateway of every node, so it is where etcd can be reached from all of them.
AT = "http://192.168.77.254:2379"
NETWORK = "10.244.0.0/16"
# The first of flannel's two default endpoints is nobody's as a rule; the mesh must not mind.
ENDPOINTS = f"http://192.168.77.254:4001,{AT}"


class Etcd:
    """An etcd on the wire of a lab, in a folder of its own."""

    def __init__(self, lab):
        self.namespace, self.folder = f"{lab.name}-wire", pathlib.Path("/run/ringmail-lab") / lab.name / "etcd"
        self.folder.mkdir(mode=0o700)
        self.process = None
        self.start()

    def start(self):
        command = ["etcd", "--data-dir", str(self.folder), "--listen-client-urls", f"{AT},http://127.0.0.1:2379"]
        command += ["--advertise-client-urls", AT, "--listen-peer-urls", "http://127.0.0.1:2380"]
        command += ["--logger", "zap", "--log-level", "error", "--heartbeat-interval", "500", "--election-timeout", "5000"]
        with open(self.folder.parent / "etcd.log", "ab") as log:
            self.process = netns.spawn(self.namespace, command, stdout=log, stderr=subprocess.STDOUT)
        eventually("etcd serves", lambda: self.ctl("endpoint", "health") or True, 30)

    def stop(self):
        self.process.kill()
        self.process.wait()

    def ctl(self, *arguments):
        command = ["env", "ETCDCTL_API=3", "etcdctl", "--endpoints", "http://127.0.0.1:2379", *arguments]
        return netns.run(self.namespace, command, timeout=20)

    def leases(self):
        """What etcd holds: {key without the prefix: value}."""
        lines = self.ctl("get", "--prefix", f"{PREFIX}/subnets/").splitlines()
        keys = (key.removeprefix(f"{PREFIX}/subnets/") for key in lines[::2])
        return dict(zip(keys, map(json.loads, lines[1::2]), strict=True))


@pytest.fixture
def mesh(make_lab):
    """A lab and its etcd, no daemon started."""
    for name in ("etcd", "etcdctl"):
        assert shutil.which(name), f"{name} is needed: apt install etcd-server etcd-client"
    lab = make_lab(3)
    etcd = Etcd(lab)
    yield lab, etcd
    for node in lab.nodes:
        node.stop()
    etcd.stop()


def configure(lab, etcd, backend):
    lab.write_psk(subprocess.run([program(), "keygen"], stdout=subprocess.PIPE, check=True).stdout)
    etcd.ctl("put", f"{PREFIX}/config", json.dumps({"Network": NETWORK, "Backend": {"Type": backend}}))


def start(lab, named, state):
    """A daemon on every node, until each has every other, which it calls `named(other)`, in this state."""
    for node in lab.nodes:
        node.start("--etcd-endpoints", ENDPOINTS, "--psk-file", lab.psk_file)
    for node in lab.nodes:
        node.ready(40)
    meshed(lab, named, state)


def meshed(lab, named, state):
    for node in lab.nodes:
        others = {named(other) for other in lab.nodes if other is not node}
        eventually(f"{node} has {sorted(others)} {state}", lambda: others <= node.peers(state), 40)  # noqa: B023


def test_three_daemons_hold_an_encrypted_mesh_over_etcd(mesh):
    lab, etcd = mesh
    configure(lab, etcd, "ipsec")
    start(lab, str, "up")
    pods = lab.pods()
    talk = lambda: all(a.ping(b) == 1 for a in pods for b in pods if a is not b)  # noqa: E731
    eventually("every pod reaches every other", talk, 10)
    leases = etcd.leases()
    held = {node.subnet_env()["FLANNEL_SUBNET"].replace(".1/", ".0/").replace("/", "-") for node in lab.nodes}
    assert set(leases) == held, leases
    assert {lease["PublicIP"] for lease in leases.values()} == {node.address() for node in lab.nodes}
    for lease in leases.values():
        assert list(lease) == ["PublicIP", "PublicIPv6", "BackendType", "BackendData"], lease
    shown = lab.node(1).ringmail("leases")
    assert all(str(node) in shown for node in lab.nodes), shown

    # An outage takes nothing away, and a node that starts anew meanwhile waits for etcd, and has its subnet again.
    etcd.stop()
    before = lab.node(3).subnet_env()["FLANNEL_SUBNET"]
    eventually("node 1 says that the store is away", lambda: "etcd" in lab.node(1).ringmail("status", check=False).stdout, 30)
    assert talk()
    lab.meshed()
    lab.node(3).kill()
    lab.node(3).start("--etcd-endpoints", ENDPOINTS, "--psk-file", lab.psk_file)
    eventually("node 3 says what it waits for", lambda: "etcd: going on" in lab.node(3).log().rpartition("leases are in")[2], 20)
    assert lab.node(3).pid is not None
    assert lab.pod(1).ping(lab.pod(2)) == 1
    etcd.start()
    lab.meshed(timeout=40)
    assert lab.node(3).subnet_env()["FLANNEL_SUBNET"] == before
    eventually("and pods talk", talk, 20)

    # The lease is given back by what the daemon noted, and where the note is gone by the flags.
    leaving = lab.node(3)
    leaving.stop()
    said = leaving.ringmail("cleanup")
    assert "gave the lease back" in said, said
    assert len(etcd.leases()) == 2
    eventually("node 1 forgets node 3", lambda: lab.node(1).peers("up") == {str(lab.node(2))}, 10)
    leaving = lab.node(2)
    leaving.stop()
    os.remove(leaving.run_dir / "state.json")
    said = leaving.ringmail("cleanup", "--etcd-endpoints", AT, "--node-name", str(leaving))
    assert "gave the lease back" in said, said
    assert [lease["PublicIP"] for lease in etcd.leases().values()] == [lab.node(1).address()]


def test_a_lease_that_names_no_node_is_flannels_and_is_given_back_by_its_address(mesh):
    lab, etcd = mesh
    lab.wire.allow_plaintext("the backend does not encrypt")
    configure(lab, etcd, "vxlan")
    start(lab, lambda node: node.address(), "plain")
    leases = etcd.leases()
    assert {lease["PublicIP"] for lease in leases.values()} == {node.address() for node in lab.nodes}
    for lease in leases.values():
        assert list(lease) == ["PublicIP", "PublicIPv6", "BackendType", "BackendData"], lease
        assert list(lease["BackendData"]) == ["VNI", "VtepMAC"], lease
    shown = json.loads(lab.node(1).ringmail("leases", "--json"))["leases"]
    assert {one["node"] for one in shown} == {str(lab.node(1)), lab.node(2).address(), lab.node(3).address()}, shown
    leaving = lab.node(3)
    leaving.stop()
    os.remove(leaving.run_dir / "state.json")
    said = leaving.ringmail("cleanup", "--etcd-endpoints", AT, "--public-ip", leaving.address())
    assert "gave the lease back" in said, said
    assert {lease["PublicIP"] for lease in etcd.leases().values()} == {node.address() for node in lab.nodes[:2]}
