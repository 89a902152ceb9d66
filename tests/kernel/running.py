"""A mesh with running daemons, shared by the tests of a file, and how to tell that it is in order.

    mesh = Running(name, 3, keywatch)        # nodes on a wire, net-conf.json, PSK
    mesh.start(); mesh.lab.pods(); mesh.in_order()
    with mesh.outage(1, 2) as outage: ...    # traffic both ways; what was lost, and for how long

The lease folder lies on a file system of its own, mounted before any daemon starts (a later mount would not reach their
mount namespaces), so that a test can make it read-only or full."""

import base64
import contextlib
import json
import os
import pathlib
import re
import subprocess
import time

import netns
from rig import Lab, eventually

PSK = "Zm9yIHRlc3RzIG9mIHRoaXMgcmVwb3NpdG9yeSBvbmx5"
measures = []


def measured(what, seconds):
    """Keeps a figure for the end of the session, in milliseconds."""
    measures.append(f"{what}: {milliseconds(seconds)}")


def milliseconds(seconds):
    return f"{seconds * 1000:.0f} ms"


class Outage:
    """What traffic both ways lost while something was done. results: [flow.Result], there and back."""

    def __init__(self, flows):
        self.flows = flows

    @property
    def results(self):
        return [flow.result for flow in self.flows]

    @property
    def lost(self):
        return [lost for result in self.results for lost in result.lost]

    @property
    def seconds(self):
        """From the first packet that was lost to the last, of the way that suffered longer."""
        return max((r.lost[-1].at - r.lost[0].at for r in self.results if r.lost), default=0.0)

    @property
    def over(self):
        """When the last lost packet was sent, monotonic seconds; None where none was."""
        return max((r.begun + r.lost[-1].at for r in self.results if r.lost), default=None)

    def __repr__(self):
        return f"{self.seconds * 1000:.0f} ms; " + "; ".join(map(repr, self.results))


class Running:
    """lab: the rig's Lab. flags: what every daemon gets."""

    def __init__(self, name, count, keywatch, psk=PSK, **backend):
        self.lab = Lab(name, count, keywatch=keywatch)
        self.folder = self.lab.nodes[0].directory.parent
        self.store = self.folder / "store"
        self.store.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "leases", self.store], check=True)
        self.lease_dir = self.store / "leases"
        self.lease_dir.mkdir()
        self.psk_file = self.folder / "psk"
        self.write_psk(psk)
        self.configure(**backend)
        self.flags = ["--lease-dir", str(self.lease_dir), "--psk-file", str(self.psk_file)]

    def write_psk(self, psk, path=None):
        path = path or self.psk_file
        path.touch(mode=0o600)
        path.write_text(psk + "\n")

    def configure(self, network="10.244.0.0/16", **backend):
        conf = {"Network": network} | ({"Backend": {"Type": "ipsec"} | backend} if backend else {})
        (self.lease_dir / "net-conf.json").write_text(json.dumps(conf))

    def subnets(self):
        """Makes each node ask for 10.244.NUMBER.0/24, as one that had it before."""
        for node in self.lab.nodes:
            self.had(node)

    def had(self, node):
        (node.directory / "subnet.env").write_text(
            f"FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.{node.number}.1/24\nFLANNEL_MTU=1446\nFLANNEL_IPMASQ=false\n"
        )

    def start(self, *numbers, env=None):
        for number in numbers or range(1, self.lab.count + 1):
            self.lab.node(number).start(*self.flags, env=env)

    def lease(self, number):
        """The file of a node's lease."""
        for path in self.lease_dir.glob("*-24.json"):
            if json.loads(path.read_text()).get("Node") == self.lab.node(number).namespace:
                return path
        raise LookupError(f"node {number} has no lease")

    def peer(self, number, of, name=None):
        """What node `number` says of node `of`."""
        name = name or self.lab.node(of).namespace
        found = [peer for peer in self.status(number)["peers"] if peer["node"] == name]
        return found[0] if found else None

    def status(self, number):
        return json.loads(self.lab.node(number).ringmail("status --json", check=False).stdout)

    def ups(self, number):
        """The numbers of the nodes that are up for this one."""
        ups = [peer["node"] for peer in self.status(number)["peers"] if peer["state"] == "up" and not peer["reason"]]
        return {int(name.rsplit("node", 1)[1]) for name in ups if "node" in name}

    def in_order(self, *numbers, timeout=30):
        """Waits until each of the nodes is up for each other and reports no problem."""
        numbers = set(numbers or range(1, self.lab.count + 1))

        def each():
            for number in numbers:
                problems = self.lab.node(number).problems()
                assert not problems, problems
                status = self.status(number)
                assert self.ups(number) >= numbers - {number}, status["peers"]
            return True

        eventually(f"nodes {numbers} are up for each other", each, timeout, 0.2)

    @contextlib.contextmanager
    def outage(self, one, two, rate=500):
        """Traffic both ways between two pods while the body runs."""
        flows = [self.lab.flow(one, two, rate=rate), self.lab.flow(two, one, rate=rate, port=7701)]
        with flows[0], flows[1]:
            yield (outage := Outage(flows))

    def down(self):
        self.lab.down_quietly = True
        for node in self.lab.nodes:
            node.stop("KILL")
        subprocess.run(["umount", "-l", self.store], check=False)
        self.lab.down()


def objects(node):
    """What of ours a node's kernel has, without what counts or changes by itself: a set of lines."""
    lines = "xfrm policy\nroute\nroute show table local\naddress show dev ringmail0\nlink show dev ringmail0\n"
    text = netns.run(node.namespace, ["ip", "-o", "-force", "-batch", "-"], input=lines, check=False).stdout
    text = re.sub(r"\\ +(valid_lft|link/).*|group default|qlen \d+", "", text)
    # Without the number of a device, which one that is made anew has not kept.
    return {re.sub(r"^\d+: ", "", line).strip() for line in text.splitlines()}


def spis(node):
    return {sa["spi"] for sa in node.sas()}


def log_time(line):
    """The monotonic time of a line of the log, seconds."""
    import datetime

    wall = datetime.datetime.fromisoformat(line.split()[0].replace("Z", "+00:00")).timestamp()
    return wall - time.time() + time.monotonic()


def dropped(node):
    """What the node has dropped at its gate: the kernel's IPsec counters and our packet filter's, by name."""
    counts = dict(node.xfrm_stat())
    for table in ("raw", "mangle"):
        for line in node.run(f"iptables-legacy-save -c -t {table}").splitlines():
            if match := re.match(r"\[(\d+):\d+\] -A (\S*RINGMAIL\S*|\S*ringmail\S*) .*-j DROP", line):
                counts[f"{table} {match[2]}"] = counts.get(f"{table} {match[2]}", 0) + int(match[1])
    return counts


def more(before, after):
    """The counters that have risen, and by how much."""
    return {name: after[name] - before.get(name, 0) for name in after if after[name] > before.get(name, 0)}


def environment(pid):
    """A process's environment, arguments and limits as root sees them: bytes."""
    return b"".join(open(f"/proc/{pid}/{name}", "rb").read() for name in ("environ", "cmdline", "limits"))


def in_memory(pid, secret):
    """Whether a process's memory has these bytes."""
    with open(f"/proc/{pid}/mem", "rb", 0) as memory:
        for line in pathlib.Path(f"/proc/{pid}/maps").read_text().splitlines():
            start, end, rights = re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S+)", line).groups()
            if "w" in rights:
                with contextlib.suppress(OSError, OverflowError):
                    memory.seek(int(start, 16))
                    if secret in memory.read(int(end, 16) - int(start, 16)):
                        return True
    return False


def spellings(secret):
    """What a secret could look like in a text."""
    hexadecimal = secret.hex()
    encoded = base64.b64encode(secret).rstrip(b"=")
    listed = ", ".join(map(str, secret)).encode()
    return {
        secret,
        hexadecimal.encode(),
        hexadecimal.upper().encode(),
        encoded,
        base64.urlsafe_b64encode(secret).rstrip(b"="),
        listed,
        listed.replace(b" ", b""),
    }


__all__ = [name for name in dir() if not name.startswith("_") and name not in ("contextlib", "os")]
