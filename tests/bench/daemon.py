"""The daemon's own cost with many peers: start, resident memory, what it does while nothing happens."""

import os
import secrets
import subprocess
import time

from measure import Row, median, shown, spread
from rig import STATE, Lab, eventually

NETWORK = "10.0.0.0/8"
IDLE = 30
METRICS = "127.0.0.1:9600"
ASK = """
import sys, urllib.request
for _ in range(int(sys.argv[2])):
    size = len(urllib.request.urlopen(sys.argv[1], timeout=60).read())
print(size)
"""


class Daemon:
    """A daemon on a node of its own, in a folder with the leases of `peers` nodes that are not there: what it sends them
    reaches the wire and nobody answers, so it goes on asking, at its slowest."""

    def __init__(self, programs, peers):
        self.peers = peers
        self.lab = Lab(f"bench-{peers}", 1)
        self.lab.wire.close()
        at = STATE / self.lab.name
        self.psk, self.conf = at / "psk", at / "net-conf.json"
        self.psk.write_text(secrets.token_hex(32))
        self.psk.chmod(0o600)
        self.conf.write_text(f'{{"Network": "{NETWORK}", "SubnetLen": 24, "Backend": {{"Type": "ipsec"}}}}')
        leases = [programs.helper, "leases", self.lab.lease_dir, str(peers), str(self.psk)]
        subprocess.run(leases, check=True, timeout=120)
        self.node = self.lab.node(1)

    def start(self, *more):
        """Starts it with more flags; seconds from exec until subnet.env is there, and until every peer's route is."""
        env = self.node.directory / "subnet.env"
        env.unlink(missing_ok=True)
        flags = [f"--lease-dir={self.lab.lease_dir}", f"--psk-file={self.psk}", f"--net-config-path={self.conf}"]
        flags += [f"--metrics={METRICS}", *more]
        began = time.monotonic()
        self.node.start("--ip-masq", *flags)
        eventually("the daemon is ready", env.exists, 60, 0.002)
        ready = time.monotonic() - began
        eventually("every peer is programmed", lambda: self.routes() >= self.peers, 120, 0.05)
        return ready, time.monotonic() - began

    def routes(self):
        """How many peers have a route."""
        return self.node.run("ip route show proto 114 type unicast").count("\n")

    def status(self):
        """Fields of /proc/PID/status, kB as numbers."""
        with open(f"/proc/{self.node.pid}/status") as file:
            return {line.split(":")[0]: int(line.split()[1]) for line in file if line.rstrip().endswith("kB")}

    def processor(self):
        """Seconds of processor time so far."""
        with open(f"/proc/{self.node.pid}/stat") as file:
            fields = file.read().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def asked(self, path, times=20):
        """One answer's processor time, seconds, of the daemon and of the kernel for it; and its size, bytes."""
        before = self.processor()
        size = self.node.run(["/usr/bin/python3", "-c", ASK, f"http://{METRICS}{path}", str(times)], timeout=300)
        return (self.processor() - before) / times, int(size)


def metrics(subject, peers):
    """What /metrics and /healthz cost, with series of single peers and without."""
    shown_cost, shown_size = subject.asked("/metrics")
    health, _ = subject.asked("/healthz", 200)
    subject.node.stop()
    subject.start("--metrics-peers=false")
    hidden_cost, hidden_size = subject.asked("/metrics")
    costs = f"{shown(shown_cost * 1000)} ms, {shown_size:,} bytes; without single peers {shown(hidden_cost * 1000)} ms, {hidden_size:,}"
    return [
        Row(f"processor time and size of one /metrics, {peers:,} peers", costs, "", shown_cost * 1000, "ms"),
        Row(f"processor time of one /healthz, {peers:,} peers", f"{health * 1000:.2f} ms", "", health * 1000, "ms"),
    ]


def daemon(programs, quick):
    """1,000 and 5,000 peers through `ringmail run`."""
    rows = []
    for peers in [1000] if quick else [1000, 5000]:
        subject = Daemon(programs, peers)
        try:
            starts = []
            for turn in range(1 if quick else 3):
                if turn:
                    subject.node.stop()
                    subject.node.ringmail("cleanup", timeout=120)
                starts.append(subject.start())
            # Its first probes are out, and their waits have grown to the longest.
            time.sleep(10 if quick else 25)
            before = subject.processor()
            time.sleep(IDLE)
            idle = subject.processor() - before
            memory = subject.status()
            ready, programmed = (median(column) for column in zip(*starts, strict=True))
            rest = f"{memory['RssAnon'] / 1024:.1f} MiB its own, {memory['RssFile'] / 1024:.1f} MiB of files"
            limit = ("at most", 40)
            rows += [
                Row(f"resident memory, {peers:,} peers", rest, "", memory["VmRSS"] / 1024, "MiB", limit=limit),
                Row(f"processor time while idle, {peers:,} silent peers", f"{idle:.2f} s in {IDLE} s", "", idle / IDLE * 100, "%"),
                Row(
                    f"start with {peers:,} leases, exec to subnet.env",
                    f"{shown(ready * 1000)} ms; every peer programmed after {shown(programmed * 1000)} ms",
                    "",
                    ready * 1000,
                    "ms",
                    spread([one * 1000 for one, _ in starts]),
                ),
            ]
            rows += metrics(subject, peers)
            assert subject.node.pid, subject.node.log()[-2000:]
        finally:
            subject.lab.down()
    return rows
