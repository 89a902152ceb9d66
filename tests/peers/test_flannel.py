"""One node of ours and two of flannel's in one cluster over etcd: pods reach pods whoever's they are; also on the way from
flannel's vxlan to ipsec, which needs a kernel with ESP (the tests with esp in their name)."""

import json
import os
import pathlib
import shutil
import subprocess

import pytest

import netns
from rig import eventually, program
from test_etcd import AT, NETWORK, PREFIX, Etcd

OURS, THEIRS = 1, (2, 3)

# Backend: the largest packet of a pod.
BACKENDS = {"vxlan": 1450, "host-gw": 1500, "udp": 1472}


class Flanneld:
    """flannel's daemon on a node of the lab, with flannel's flags and files in our places."""

    def __init__(self, node):
        self.node = node
        # Where nf_tables is not all there, iptables must be the old one; flannel takes what is in PATH.
        tools = node.directory / "tools"
        tools.mkdir(exist_ok=True)
        for name in ("iptables", "ip6tables", "iptables-save", "ip6tables-save", "iptables-restore", "ip6tables-restore"):
            legacy = shutil.which(name.replace("tables", "tables-legacy", 1))
            assert legacy, f"{name} (legacy) is needed: apt install iptables"
            (tools / name).unlink(missing_ok=True)
            (tools / name).symlink_to(legacy)
        # What the kubelet does on flannel's nodes.
        node.run("echo 1 > /proc/sys/net/ipv4/ip_forward")
        self.start()

    def start(self):
        command = [os.environ["FLANNELD"], f"--etcd-endpoints={AT}", f"--etcd-prefix={PREFIX}", "--iface=eth0", "--ip-masq", "-v=4"]
        command += [f"--subnet-file={self.node.directory}/subnet.env"]
        env = {"PATH": f"{self.node.directory}/tools:{os.environ['PATH']}"}
        with open(self.node.directory / "flanneld.log", "ab") as log:
            self.process = netns.spawn(self.node.namespace, command, env=env, stdout=log, stderr=subprocess.STDOUT)

    def ready(self):
        def written():
            assert self.process.poll() is None, self.log()
            return (self.node.directory / "subnet.env").exists()

        eventually(f"flanneld of {self.node} serves", written, 40)

    def log(self):
        return (self.node.directory / "flanneld.log").read_text()[-3000:]

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def load_br_netfilter():
    """flannel does not start without its folder under /proc. The kernel itself knows by what it loads modules."""
    loader = pathlib.Path("/proc/sys/kernel/modprobe")
    # A kernel without modules has no such file, and nothing to load.
    if loader.exists():
        subprocess.run([loader.read_text().strip(), "-a", "br_netfilter"], check=False)
    assert pathlib.Path("/proc/sys/net/bridge").exists(), "flannel wants the kernel's module br_netfilter"


@pytest.mark.parametrize("backend", BACKENDS)
def test_pods_of_both_programs_reach_each_other(lab, backend):
    lab.wire.allow_plaintext("the backend does not encrypt")
    load_br_netfilter()
    etcd = Etcd(lab)
    theirs = []
    try:
        etcd.ctl("put", f"{PREFIX}/config", json.dumps({"Network": NETWORK, "Backend": {"Type": backend}}))
        # One of theirs is there before ours, one comes after.
        theirs.append(Flanneld(lab.node(2)))
        theirs[0].ready()
        lab.node(OURS).start("--etcd-endpoints", AT, "--ip-masq")
        lab.node(OURS).ready(40)
        theirs.append(Flanneld(lab.node(3)))
        theirs[1].ready()
        others = {lab.node(number).address() for number in THEIRS}
        eventually("ours serves both", lambda: others <= lab.node(OURS).peers("plain"), 20)
        assert {lab.node(number).subnet_env()["FLANNEL_MTU"] for number in (1, 2, 3)} == {str(BACKENDS[backend])}
        check(lab, backend, "at first")

        # Leases of both are of one form, ours word for word what flannel writes.
        leases = {lease["PublicIP"]: lease for lease in etcd.leases().values()}
        assert set(leases) == {lab.node(number).address() for number in (1, 2, 3)}, leases
        shape = lambda lease: [(key, type(value), list(value) if isinstance(value, dict) else []) for key, value in lease.items()]  # noqa: E731
        assert shape(leases[lab.node(1).address()]) == shape(leases[lab.node(2).address()]), leases

        # Each program stops and comes back: the lease stays, and all is as it was.
        lab.node(OURS).stop()
        lab.node(OURS).start("--etcd-endpoints", AT, "--ip-masq")
        eventually("ours serves both again", lambda: others <= lab.node(OURS).peers("plain"), 20)
        theirs[0].stop()
        theirs[0].start()
        eventually("flannel has started anew", lambda: theirs[0].process.poll() is None and pairs(lab, [(1, 2), (2, 1)], BACKENDS[backend]) == [], 30)
        check(lab, backend, "after restarts")
        assert not lab.node(OURS).status()["problems"]

        # Ours leaves for good: flannel has no route to it any more.
        subnet = lab.node(OURS).subnet_env()["FLANNEL_SUBNET"].replace(".1/24", ".0/24")
        route = lambda: subnet in lab.node(3).run("ip route")  # noqa: E731
        assert route() or backend == "udp", "udp's routes are in flannel's own process"
        lab.node(OURS).stop()
        lab.node(OURS).ringmail("cleanup")
        eventually("flannel lets go of who left", lambda: not route(), 10)
    except AssertionError as error:
        logs = "".join(f"\n--- {one.node}: {one.log()}" for one in theirs)
        raise AssertionError(f"{error}{logs}\n--- ours: {lab.node(OURS).log()[-3000:]}") from error
    finally:
        lab.node(OURS).stop()
        for one in theirs:
            one.stop()
        etcd.stop()


def test_a_node_on_esp_serves_flannels_nodes_in_plaintext_until_they_come_over(lab):
    """As an operator migrates: the configuration in etcd changes under flannel, which does not look, and each node then gets
    our program. Each pair uses the best that both have at every step."""
    lab.wire.allow_plaintext("flannel does not encrypt")
    load_br_netfilter()
    lab.write_psk(subprocess.run([program(), "keygen"], stdout=subprocess.PIPE, check=True).stdout)
    configure = lambda backend: etcd.ctl("put", f"{PREFIX}/config", json.dumps({"Network": NETWORK, "Backend": backend}))  # noqa: E731
    start = lambda node: node.start("--etcd-endpoints", AT, "--ip-masq", "--psk-file", lab.psk_file)  # noqa: E731
    etcd, ours, theirs = Etcd(lab), [lab.node(1)], {}
    try:
        configure({"Type": "vxlan"})
        for number in THEIRS:
            theirs[number] = Flanneld(lab.node(number))
            theirs[number].ready()
        start(lab.node(1))
        lab.node(1).ready(40)
        addresses = {lab.node(number).address() for number in THEIRS}
        eventually("ours serves both", lambda: addresses <= lab.node(1).peers("plain"), 20)
        for number in (1, 2, 3):
            lab.make_pod(number)
        every = [(a, b) for a in (1, 2, 3) for b in (1, 2, 3) if a != b]
        talk = lambda when: eventually(f"{when}: all pods reach all", lambda: pairs(lab, every, 1400) == [], 30)  # noqa: E731
        talk("on vxlan")
        subnets = [lab.node(number).subnet_env()["FLANNEL_SUBNET"] for number in (1, 2, 3)]

        configure({"Type": "ipsec", "AllowPlaintextPeers": True})
        eventually("ours is on ipsec", lambda: lab.node(1).status()["backend"] == "ipsec", 20)
        eventually("and serves both", lambda: addresses <= lab.node(1).peers("plain"), 20)
        talk("one on ipsec")
        lease = next(one for one in etcd.leases().values() if one["PublicIP"] == lab.node(1).address())
        assert lease["BackendType"] == "vxlan" and {"VNI", "VtepMAC", "Statement", "Tags"} <= set(lease["BackendData"]), lease

        for number in THEIRS:
            theirs.pop(number).stop()
            start(lab.node(number))
            ours.append(lab.node(number))
            for node in ours:
                others = {str(other) for other in ours if other is not node}
                eventually(f"{node} has {others} up", lambda: others <= node.peers("up"), 40)  # noqa: B023
            assert lab.node(1).peers("plain") == {one.node.address() for one in theirs.values()}
            talk(f"{len(ours)} on ipsec")
            lab.wire.settle()
            lab.wire.plaintext.clear()
            assert lab.pod(1).ping(lab.pod(number), count=3, interval=0.05) == 3
            lab.wire.settle()
            assert not lab.wire.plaintext, "a pair of ours is encrypted"
        assert [lab.node(number).subnet_env()["FLANNEL_SUBNET"] for number in (1, 2, 3)] == subnets
        configure({"Type": "ipsec"})
        for node in ours:
            eventually(f"nothing of {node} is open", lambda: node.audit()["ok"] and not node.status()["problems"], 30)  # noqa: B023
        talk("all on ipsec")
    except AssertionError as error:
        logs = "".join(f"\n--- {one.node}: {one.log()}" for one in theirs.values())
        raise AssertionError(f"{error}{logs}\n--- ours: {lab.node(OURS).log()[-3000:]}") from error
    finally:
        for node in ours:
            node.stop()
        for one in theirs.values():
            one.stop()
        etcd.stop()


def pairs(lab, wanted, size):
    """Which of these pairs of pods do not reach each other, with packets of this size and with small ones."""
    return [(a, b) for a, b in wanted if not (lab.pod(a).ping(lab.pod(b)) and lab.pod(a).ping(lab.pod(b), size=size))]


def check(lab, backend, when):
    for number in (1, 2, 3):
        if not os.path.exists(f"/run/netns/{lab.pod(number)}"):
            lab.call("pod", number)
    wanted = [(a, b) for a in (1, 2, 3) for b in (1, 2, 3) if a != b]
    eventually(f"{backend}, {when}: all pods reach all", lambda: pairs(lab, wanted, BACKENDS[backend]) == [], 30)
    for node in lab.nodes:
        for number in (1, 2, 3):
            assert node.ping(lab.pod(number)) == 1, f"{backend}, {when}: {node} to pod {number}"
    with lab.pod(2).listen(8080), lab.pod(1).listen(8080):
        assert lab.pod(1).ask(lab.pod(2)) == lab.pod(1).address()
        assert lab.pod(2).ask(lab.pod(1)) == lab.pod(2).address()
