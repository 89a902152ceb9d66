"""The udp backend's packet path against flannel's own: two nodes that run a real flanneld (FLANNELD=/path), its leases in a
real etcd, beside two of ours, taking turns."""

import os
import pathlib
import shutil
import subprocess
import tempfile
import time

from measure import interleaved, ratio
from udp import OURS, Nodes

ETCD = "http://192.0.2.1:2379"
CONFIG = '{"Network": "10.244.0.0/16", "SubnetLen": 24, "Backend": {"Type": "udp", "Port": 8285}}'


class Flannel(Nodes):
    """Two nodes whose packets go through flannel's proxy: the same devices, addresses and pods as ours."""

    def __init__(self, helper, flanneld):
        self.flanneld, self.folder = flanneld, pathlib.Path(tempfile.mkdtemp(prefix="ringmail-bench-"))
        super().__init__(helper)

    def start_tunnels(self, *_):
        self.store()
        for number, node in self.node.items():
            # flanneld takes the subnet that it had before.
            env = self.folder / f"subnet{number}.env"
            env.write_text(f"FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.{number}.1/24\nFLANNEL_MTU=1472\n")
            flags = [f"--etcd-endpoints={ETCD}", "--iface=eth0", f"--subnet-file={env}", "--iptables-forward-rules=false"]
            self.tunnels[number] = self.silent(node, self.flanneld, *flags)
        for number, node in self.node.items():
            self.until(lambda node=node: "10.244." in node.run("sh", "-c", "ip -4 address show dev flannel0 2>&1 || :"))
            shown = node.run("ip", "-4", "address", "show", "dev", "flannel0")
            assert f"10.244.{number}.0/" in shown, shown

    def store(self):
        folder = self.folder / "etcd"
        self.silent(self.node[1], "etcd", "--data-dir", folder, "--listen-client-urls", ETCD, "--advertise-client-urls", ETCD,
                    "--listen-peer-urls", "http://192.0.2.1:2380")  # fmt: skip
        put = ["env", "ETCDCTL_API=3", "etcdctl", f"--endpoints={ETCD}", "put", "/coreos.com/network/config", CONFIG]

        def written():
            try:
                return "OK" in self.node[1].run(*put)
            except subprocess.CalledProcessError:
                return False

        self.until(written)

    def silent(self, space, *command):
        command = ["ip", "netns", "exec", space.name, *map(str, command)]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.running.append(process)
        return process

    @staticmethod
    def until(holds):
        for _ in range(100):
            if holds():
                return
            time.sleep(0.2)
        raise TimeoutError("flanneld or etcd is not ready after 20 s")

    def down(self):
        super().down()
        shutil.rmtree(self.folder, ignore_errors=True)


def against_flannel(nodes, helper, rounds, seconds):
    """Rows against flannel's proxy; none where no flanneld is given."""
    flanneld = os.environ.get("FLANNELD")
    if not flanneld:
        return []
    theirs = Flannel(helper, os.path.realpath(flanneld))
    try:
        both = (nodes, theirs)
        rows = []
        for pods, least in ((False, 9), (True, 10)):
            where = "pod to pod" if pods else "host to host"
            sides = [lambda side=side: side.tcp(OURS, pods, 1, seconds) for side in both]  # noqa: B023
            interleaved(1, *sides)
            found = interleaved(rounds, *sides)
            rates, costs = ([[one[at] for one in side] for side in found] for at in (0, 2))
            what = f"udp: TCP, {where}, 1 stream"
            rows.append(ratio(what, "Gbit/s", *rates, "flannel's proxy", ("at least", least)))
            rows.append(ratio(f"the daemons' processor time a gigabyte, {what}", "s", *costs, "flannel's proxy", ("at most", 0.11)))
        sides = [lambda side=side: side.packets(OURS, False, seconds) for side in both]
        interleaved(1, *sides)
        what = "udp: datagrams of 64 bytes, host to host"
        rows.append(ratio(what, "thousand/s", *interleaved(rounds, *sides), "flannel's proxy", ("at least", 3.5)))
        sides = [lambda side=side: side.asking(OURS, False, seconds) for side in both]
        interleaved(1, *sides)
        found = interleaved(rounds, *sides)
        rows.append(ratio("udp: question and answer, median", "µs", *found, "flannel's proxy", ("at most", 1)))
        return rows
    finally:
        theirs.down()
