"""The udp backend's packet path: two nodes joined by veth, MTU 1500, pods behind each; against VXLAN of the same kernel
between the same nodes, taking turns.

Needs no ESP, and so runs in the machine's own kernel. Where FLANNELD=/path names a flanneld, its proxy is measured too
(proxy.py); in any case the tunnel with all its offloads off is, which does what that proxy does: a packet, a datagram, a
system call each."""

import contextlib
import itertools
import json
import os
import pathlib
import select
import subprocess
import time

from measure import Row, interleaved, median, ratio, shown

# Device, MTU, and the second number of the addresses: 10.<number>.<node>.
OURS = ("flannel0", 1472, 244)
THEIRS = ("vxlan0", 1450, 245)
NAMES = itertools.count(1)


def run(*command, **more):
    return subprocess.run([str(word) for word in command], check=True, text=True, stdout=subprocess.PIPE, **more).stdout


class Space:
    """A network namespace with a name, removed at the end."""

    def __init__(self, what):
        self.name = f"rmbench{os.getpid()}-{next(NAMES)}-{what}"
        run("ip", "netns", "add", self.name)

    def sh(self, text):
        for line in filter(None, map(str.strip, text.splitlines())):
            run("ip", "netns", "exec", self.name, *line.split())

    def start(self, *command):
        command = ["ip", "netns", "exec", self.name, *map(str, command)]
        return subprocess.Popen(command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=1)

    def run(self, *command):
        return run("ip", "netns", "exec", self.name, *command, timeout=120)

    def remove(self):
        run("ip", "netns", "delete", self.name)


class Nodes:
    """Two nodes, each with both overlays, and two pods each, one an overlay."""

    def __init__(self, helper):
        self.helper, self.spaces, self.running = str(helper), [], []
        self.node = {number: self.space(f"node{number}") for number in (1, 2)}
        one, two = self.node[1], self.node[2]
        run("ip", "-n", one.name, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", two.name)
        self.pod = {}
        for number, node in self.node.items():
            other = 3 - number
            node.sh(f"""ip link set lo up
                ip address add 192.0.2.{number}/24 dev eth0
                ip link set eth0 up
                sysctl -qw net.ipv4.ip_forward=1
                ip link add vxlan0 type vxlan id 1 dstport 8472 local 192.0.2.{number} dev eth0 nolearning
                ip link set vxlan0 address 02:00:00:00:00:0{number} mtu 1450 up
                ip address add 10.245.{number}.0/32 dev vxlan0
                ip neigh add 10.245.{other}.0 lladdr 02:00:00:00:00:0{other} dev vxlan0
                bridge fdb add 02:00:00:00:00:0{other} dev vxlan0 dst 192.0.2.{other}
                ip route add 10.245.{other}.0/24 via 10.245.{other}.0 dev vxlan0 onlink""")
            for device, mtu, net in (OURS, THEIRS):
                pod = self.pod[device, number] = self.space(f"pod{net}-{number}")
                run("ip", "-n", node.name, "link", "add", f"pod{net}", "type", "veth",
                    "peer", "name", "eth0", "netns", pod.name)  # fmt: skip
                node.sh(f"""ip link set pod{net} mtu {mtu} up
                    ip address add 10.{net}.{number}.1/24 dev pod{net}""")
                pod.sh(f"""ip link set lo up
                    ip link set eth0 mtu {mtu} up
                    ip address add 10.{net}.{number}.2/24 dev eth0
                    ip route add default via 10.{net}.{number}.1""")
        self.tunnels = {}
        self.start_tunnels()

    def without_segmentation(self):
        """The interface between the nodes takes no more than a packet; checksums it does."""
        for node in self.node.values():
            node.sh("ip link set eth0 gso_max_segs 1")

    def space(self, what):
        self.spaces.append(Space(what))
        return self.spaces[-1]

    def start_tunnels(self, *words):
        """Both, in place of those that run; with `words` switched off."""
        for process in self.tunnels.values():
            self.stop(process)
        self.tunnels = {number: self.tunnel(number, words) for number in (1, 2)}

    def tunnel(self, number, off):
        other, node = 3 - number, self.node[number]
        words = ["run", "flannel0", 1472, f"192.0.2.{number}", f"10.244.{number}.0", f"10.244.{other}.0/24=192.0.2.{other}"]
        process = self.start(node, self.helper, *words, *off)
        node.sh(f"""ip link set flannel0 mtu 1472 up
            ip address replace 10.244.{number}.0/32 dev flannel0
            ip route replace 10.244.{other}.0/24 dev flannel0""")
        return process

    def start(self, space, *command):
        """A process that has said that it is ready."""
        process = space.start(*command)
        self.running.append(process)
        assert select.select([process.stdout], [], [], 20)[0], f"{command}: silent"
        line = process.stdout.readline()
        assert "ready" in line, f"{command}: {line}"
        return process

    def stop(self, process):
        self.running.remove(process)
        process.kill()
        process.wait()

    def ends(self, side, pods):
        """Where to send from, where to, and the address there."""
        device, _, net = side
        if pods:
            return self.pod[device, 1], self.pod[device, 2], f"10.{net}.2.2"
        return self.node[1], self.node[2], f"10.{net}.2.0"

    def down(self):
        for process in list(self.running):
            with contextlib.suppress(OSError):
                self.stop(process)
        for space in self.spaces:
            with contextlib.suppress(subprocess.CalledProcessError):
                space.remove()

    # --- measurements --------------------------------------------------------------------------------------------------

    def tcp(self, side, pods, streams, seconds):
        """(Gbit/s, processor seconds of the whole machine a gigabyte, of the daemons alone a gigabyte)."""
        source, target, address = self.ends(side, pods)
        server = target.start("iperf3", "-s", "-1", "-B", address)
        self.running.append(server)
        time.sleep(0.3)
        busy, daemons = machine_seconds(), self.daemon_seconds()
        text = source.run("iperf3", "-J", "-c", address, "-t", seconds, "-P", streams)
        busy, daemons = machine_seconds() - busy, self.daemon_seconds() - daemons
        self.stop(server)
        end = json.loads(text)["end"]["sum_received"]
        return end["bits_per_second"] / 1e9, busy / end["bytes"] * 1e9, daemons / end["bytes"] * 1e9

    def packets(self, side, pods, seconds):
        """Datagrams of 64 bytes a second that arrive, thousands, while as many as possible are sent."""
        source, target, address = self.ends(side, pods)
        receiver = self.start(target, self.helper, "count", f"{address}:9000", seconds)
        source.run(self.helper, "flood", f"{address}:9000", seconds + 0.5, 64)
        got = float(receiver.stdout.readline())
        self.stop(receiver)
        return got / 1e3

    def asking(self, side, pods, seconds):
        """Median microseconds from a datagram to its answer."""
        source, target, address = self.ends(side, pods)
        server = self.start(target, self.helper, "echo", f"{address}:9000")
        took = float(source.run(self.helper, "ask", f"{address}:9000", seconds))
        self.stop(server)
        return took

    def daemon_seconds(self):
        return sum(process_seconds(process.pid) for process in self.tunnels.values())


def process_seconds(pid):
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def machine_seconds():
    """Processor time that was not idle, of all processors."""
    fields = [int(field) for field in pathlib.Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def throughput(nodes, rounds, seconds, pods, streams, what, limit):
    sides = [lambda side=side: nodes.tcp(side, pods, streams, seconds) for side in (OURS, THEIRS)]
    interleaved(1, *sides)
    found = interleaved(rounds, *sides)
    rates = [[one[0] for one in side] for side in found]
    row = ratio(what, "Gbit/s", *rates, "VXLAN", ("at least", limit))
    costs = [[one[1] for one in side] for side in found]
    daemons = median([one[2] for one in found[0]])
    cost = ratio(f"processor time a gigabyte, {what}", "s", *costs, "VXLAN")
    cost.ours += f", daemons {shown(daemons)} s"
    return [row, cost]


def udp(programs, quick):
    """All rows of the table."""
    import proxy  # it is made of what is here

    rounds, seconds = (2, 1) if quick else (5, 3)
    nodes = Nodes(programs.tunnel)
    try:
        for side, pods in itertools.product((OURS, THEIRS), (False, True)):
            source, _, address = nodes.ends(side, pods)
            source.run("ping", "-n", "-q", "-c", 3, "-i", "0.1", "-W", 2, address)
        rows = []
        for pods, streams, limit in ((False, 1, 0.5), (False, 8, 0.33), (True, 1, 0.6), (True, 8, 0.4)):
            what = f"udp: TCP, {'pod to pod' if pods else 'host to host'}, {streams} stream{'s' if streams > 1 else ''}"
            rows += throughput(nodes, rounds, seconds, pods, streams, what, limit)
        for pods in (False, True):
            sides = [lambda side=side: nodes.packets(side, pods, seconds) for side in (OURS, THEIRS)]
            interleaved(1, *sides)
            what = f"udp: datagrams of 64 bytes, {'pod to pod' if pods else 'host to host'}"
            rows.append(ratio(what, "thousand/s", *interleaved(rounds, *sides), "VXLAN", ("at least", 1.5)))
        sides = [lambda side=side: nodes.asking(side, False, seconds) for side in (OURS, THEIRS)]
        interleaved(1, *sides)
        rows.append(ratio("udp: question and answer, median", "µs", *interleaved(rounds, *sides), "VXLAN"))
        rows += [merging(nodes)]
        rows.append(plain(nodes, rounds, seconds))
        rows += proxy.against_flannel(nodes, programs.tunnel, rounds, seconds)
        nodes.without_segmentation()
        for streams, limit in ((1, 0.85), (8, 1.0)):
            what = f"udp: TCP, underlay without segmentation, {streams} stream{'s' if streams > 1 else ''}"
            rows += throughput(nodes, rounds, seconds, False, streams, what, limit)
        return rows
    finally:
        nodes.down()


def merging(nodes):
    """How large the messages were; the tunnels are started anew."""
    told = []
    for process in nodes.tunnels.values():
        out, _ = process.communicate("", timeout=20)
        nodes.running.remove(process)
        told.append(json.loads(out.splitlines()[-1]))
    nodes.tunnels = {}
    nodes.start_tunnels()
    sent = sum(one["sent_packets"] for one in told) / sum(one["sent_messages"] for one in told)
    written = sum(one["received_packets"] for one in told) / sum(one["device_writes"] for one in told)
    return Row(
        "udp: packets a UDP message, and a write to the device, over all of the above",
        shown(sent),
        f"{shown(written)} a write",
        min(sent, written),
        "packets",
    )


def plain(nodes, rounds, seconds):
    """Against the same tunnel without offloads, both ends."""

    def measured(*words):
        nodes.start_tunnels(*words)
        return nodes.tcp(OURS, False, 1, seconds)[0]

    off = ("no-vnet", "no-segment", "no-gro", "no-tcp", "no-udp")
    found = interleaved(rounds, measured, lambda: measured(*off))
    nodes.start_tunnels()
    return ratio("udp: TCP, host to host, 1 stream, with all offloads", "Gbit/s", *found, "with none", ("at least", 5))
