"""The load of test_table.py: between every two pods of a mesh a ping flood, a stream of UDP and a TCP connection.

    with Load(mesh, pods, datagrams=5000) as load:
        ...                                   # what must not lose a packet
    assert not load.lost, load

One program does all of it (load/main.rs, built as the example kernel-load). Every packet has a number and is counted
where it is sent and where it comes; every byte of TCP is compared. Where a packet was lost is told by the kernel's
counters, taken before and after. Times are CLOCK_MONOTONIC seconds, as time.monotonic()."""

import json
import os
import pathlib
import re
import subprocess
import time

import netns
from rig import REPOSITORY, program

ECHOES = 1000  # a second and pair: a ping flood at 1 ms
DATAGRAMS = 5000  # a second and pair, one way: from each of three pods to the next
BLOCKS = 200  # of 1,024 bytes, a second and way of a TCP connection
# Between two devices on one processor a packet waits in a queue that holds 1,000 (netdev_max_backlog) and in one of as
# many for what came out of ESP; with everything on one processor that is a quarter of a millisecond's worth a pair.
BACKLOG = "/proc/sys/net/core/netdev_max_backlog"


def generator():
    """The program: beside the daemon's, or as cargo leaves it."""
    folders = [pathlib.Path(program()).parent, REPOSITORY / "target" / "debug", REPOSITORY / "target" / "release"]
    there = [folder / "examples" / "kernel-load" for folder in folders]
    found = [path for path in there if path.exists()]
    assert found, "no kernel-load: cargo build --example kernel-load"
    return str(found[0])


class Load:
    """streams: per way of an echo or UDP stream what was sent, what came, runs of lost ones [count, sent from, sent to].
    connections: per TCP connection what came of each way. counters: what has risen, by namespace, of what a kernel counts
    when it drops a packet."""

    def __init__(self, mesh, places, echoes=ECHOES, datagrams=DATAGRAMS, blocks=BLOCKS):
        self.mesh, self.places, self.rates = mesh, places, (echoes, datagrams, blocks)
        self.streams, self.connections, self.counters = [], [], {}

    def __enter__(self):
        pathlib.Path(BACKLOG).write_text("100000")
        self.namespaces = [place.namespace for place in self.places] + [str(node) for node in self.mesh.lab.nodes]
        ends = [f"{place.namespace}={place.address()}" for place in self.places]
        command = [generator(), *map(str, self.rates), *ends]
        self._program = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._program.stdout.readline() == "ready\n", "the load did not flow on every way"
        self._begun = time.monotonic()
        self._before = self._count()
        return self

    def __exit__(self, kind, *_):
        self.seconds = time.monotonic() - self._begun
        self._program.stdin.write("\n")
        self._program.stdin.flush()
        answer = self._program.stdout.readline()
        self._program.communicate(timeout=30)
        if answer:
            told = json.loads(answer)
            self.streams, self.connections = told["streams"], told["connections"]
            self.counters = rises(self._before, self._count())
            print(repr(self))  # pytest shows it where the test fails
        elif kind is None:
            raise AssertionError(f"the load ended with {self._program.returncode} and said nothing")

    def _count(self):
        return {name: drops(name) for name in self.namespaces if os.path.exists(f"/run/netns/{name}")} | {
            "processor": {"backlog": backlog_drops()}
        }

    @property
    def sent(self):
        return sum(stream["sent"] for stream in self.streams)

    @property
    def lost(self):
        """How many packets of streams did not come."""
        return sum(run[0] for stream in self.streams for run in stream["lost"])

    @property
    def broken(self):
        """TCP connections that were reset, or whose bytes are not what was sent."""
        return [one | way for one in self.connections for way in one["ways"] if way["wrong"] is not None or way["broken"]]

    @property
    def behind(self):
        """TCP connections that had not yet all across when the load ended: an outage makes TCP wait."""
        return [one | way for one in self.connections for way in one["ways"] if way["missing"] or way["unsent"]]

    @property
    def retransmitted(self):
        return sum(way["retransmitted"] for one in self.connections for way in one["ways"])

    @property
    def gap(self):
        """The longest time between two arrivals on one way, seconds."""
        return max(stream["gap"] for stream in self.streams)

    def outage(self, *nodes):
        """From the first lost packet to the last, seconds, of the way that suffered longest; nodes: of ways from or to
        these (all)."""
        runs = [stream["lost"] for stream in self.streams if stream["lost"] and self._of(stream, nodes)]
        return max((lost[-1][2] - lost[0][1] for lost in runs), default=0.0)

    def over(self, *nodes):
        """When the last lost packet was sent; None where none was."""
        runs = [stream["lost"] for stream in self.streams if stream["lost"] and self._of(stream, nodes)]
        return max((lost[-1][2] for lost in runs), default=None)

    @staticmethod
    def _of(stream, nodes):
        return not nodes or stream["from"] in nodes or stream["to"] in nodes

    def __repr__(self):
        lines = [f"{self.sent} sent in {self.seconds:.1f} s, {self.lost} lost, longest gap {self.gap * 1000:.0f} ms, dropped: {self.counters}"]
        for stream in self.streams:
            if stream["lost"] or stream["twice"]:
                shown = stream | {"lost": stream["lost"][:10]}
                lines.append(str(shown))
        return "\n".join(lines + [str(one) for one in self.broken + self.behind])


def drops(namespace):
    """What this namespace's kernel counts when it drops a packet: IPsec's errors, full sockets, devices."""
    counts = {}
    for line in netns.read(namespace, "xfrm_stat").splitlines():
        name, value = line.split()
        counts[name] = int(value)
    for table in ("snmp", "netstat"):
        lines = netns.read(namespace, table).splitlines()
        for names, values in zip(lines[::2], lines[1::2]):
            protocol = names.split(":")[0]
            for name, value in zip(names.split()[1:], values.split()[1:]):
                if re.search(r"Discards|Errors|Drop|NoRoutes|RetransSegs|InErrs|DSACKRecv", name) and value.lstrip("-").isdigit():
                    counts[f"{protocol} {name}"] = int(value)
    for line in netns.read(namespace, "dev").splitlines()[2:]:
        device, _, figures = line.partition(":")
        figures = figures.split()
        # ringmail0 drops by design: it counts what the policies did not catch.
        counts[f"{device.strip()} dropped in"], counts[f"{device.strip()} dropped out"] = int(figures[3]), int(figures[11])
    return counts


def backlog_drops():
    """Packets that the queue between devices had no room for, of all processors."""
    with open("/proc/net/softnet_stat") as file:
        return sum(int(line.split()[1], 16) for line in file)


def rises(before, after):
    """What has risen, by namespace."""
    risen = {}
    for name, counts in after.items():
        was = before.get(name, {})
        more = {what: value - was.get(what, 0) for what, value in counts.items() if value > was.get(what, 0)}
        if more:
            risen[name] = more
    return risen

