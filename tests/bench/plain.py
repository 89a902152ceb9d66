"""The unencrypted backends: what passes between pods behind two daemons, against the same objects made by hand; 1,000
leases, from the daemon's start until all are programmed, against `ip` and `bridge` with the same objects; memory; and what
a restart costs the udp backend, the one whose packets pass through the daemon."""

import contextlib
import json
import pathlib
import time

from measure import Row, interleaved, median, ratio, shown
from rig import Lab, eventually
from esp import throughput

NETWORK = "10.0.0.0/8"
PEERS = 1000
# Without rules in the packet filter: what is compared are the objects that carry packets.
PLAIN = ["--iptables-forward-rules=false"]
MTU = {"vxlan": 1450, "host-gw": 1500}


def quiet(name, count):
    lab = Lab(name, count)
    lab.wire.close()
    return lab


# --- throughput -------------------------------------------------------------------------------------------------------------


def by_ringmail(backend):
    lab = quiet(f"bench-{backend}", 2)
    lab.configure(network=NETWORK, SubnetLen=24, Type=backend)
    lab.start(*PLAIN, state="plain")
    return lab


def by_hand(backend):
    """The device, neighbour, fdb entry and route that ringmail makes, and nothing else."""
    lab = quiet(f"hand-{backend}", 2)
    for node in lab.nodes:
        own, other = node.number, 3 - node.number
        net, peer = f"10.244.{other}.0", lab.node(other).address()
        if backend == "vxlan":
            node.ip(
                f"link add flannel.1 type vxlan id 1 local {node.address()} dev eth0 dstport 8472 nolearning",
                f"link set flannel.1 address 02:00:00:00:00:0{own} mtu {MTU[backend]} up",
                f"address add 10.244.{own}.0/32 dev flannel.1",
                f"neigh add {net} lladdr 02:00:00:00:00:0{other} dev flannel.1 nud permanent",
                f"route add {net}/24 via {net} dev flannel.1 onlink",
            )
            node.run(f"bridge fdb add 02:00:00:00:00:0{other} dev flannel.1 dst {peer}")
        else:
            node.ip(f"route add {net}/24 via {peer} dev eth0")
        node.run("sysctl -qw net.ipv4.ip_forward=1")
        text = f"FLANNEL_NETWORK={NETWORK}\nFLANNEL_SUBNET=10.244.{own}.1/24\nFLANNEL_MTU={MTU[backend]}\nFLANNEL_IPMASQ=false\n"
        (node.directory / "subnet.env").write_text(text)
    return lab


def through(backend, quick):
    with contextlib.ExitStack() as stack:
        labs = []
        for make in (by_ringmail, by_hand):
            labs.append(make(backend))
            stack.callback(labs[-1].down)
        pods = [lab.pods() for lab in labs]
        for one, two in pods:
            assert any(one.ping(two) for _ in range(20)), f"{one}: no answer from pod to pod"
        rows = []
        for streams in (1, 8):
            sides = [lambda pair=pair, n=streams: throughput(*pair, 1 if quick else 3, n) for pair in pods]
            interleaved(1, *sides)
            found = interleaved(2 if quick else 10, *sides)
            what = f"{backend}: TCP, pod to pod, {streams} stream{'s' if streams > 1 else ''}"
            rows.append(ratio(what, "Gbit/s", *found, "the same objects by `ip`", ("at least", 0.98)))
        return rows


# --- 1,000 leases -----------------------------------------------------------------------------------------------------------


def peer(number):
    """Subnet, public address and MAC of a peer, on the link of 172.20.0.1/16."""
    high, low = divmod(number, 250)
    return f"10.{100 + high}.{low}.0", f"172.20.{high}.{low + 2}", f"02:00:00:00:{high:02x}:{low:02x}"


def objects(backend, link):
    """Lines for `ip -batch`, and for `bridge -batch`."""
    routes, entries = [], []
    for net, address, mac in map(peer, range(PEERS)):
        if backend == "vxlan":
            routes += [f"neigh add {net} lladdr {mac} dev {link} nud permanent", f"route add {net}/24 via {net} dev {link} onlink"]
            entries.append(f"fdb add {mac} dev {link} dst {address}")
        elif backend == "udp":
            routes.append(f"route add {net}/24 dev {link}")
        else:
            routes.append(f"route add {net}/24 via {address} dev {link}" + (" onlink" if backend == "ipip" else ""))
    return routes, entries


class Thousand:
    """A node whose folder has the leases of 1,000 nodes that are not there."""

    def __init__(self, backend, link):
        self.backend, self.link = backend, link
        self.lab = quiet(f"bench-1000-{backend}", 1)
        self.node = self.lab.node(1)
        self.node.ip("address add 172.20.0.1/16 dev eth0")
        self.lab.configure(network=NETWORK, SubnetLen=24, Type=backend)
        for number in range(PEERS):
            net, address, mac = peer(number)
            lease = {"Node": f"node{number}", "PublicIP": address, "BackendType": backend, "Revision": number + 1}
            lease |= {"BackendData": {"VNI": 1, "VtepMAC": mac}} if backend == "vxlan" else {}
            pathlib.Path(self.lab.lease_dir, f"{net}-24.json").write_text(json.dumps(lease))

    def ours(self):
        """Seconds from exec until every peer's route is there, MiB resident after it; then it is all taken away again."""
        begun = time.monotonic()
        self.node.start(*self.lab.flags, *PLAIN)
        eventually("every peer is programmed", lambda: self.routes() >= PEERS, 60, 0.02)
        took = time.monotonic() - begun
        time.sleep(2)
        status = pathlib.Path(f"/proc/{self.node.pid}/status").read_text()
        memory = int(status.split("VmRSS:")[1].split()[0]) / 1024
        self.node.stop()
        self.node.ringmail("cleanup", timeout=60)
        assert not self.routes()
        return took, memory

    def theirs(self):
        """Seconds that `ip` and `bridge` take."""
        make = {
            "vxlan": ["link add flannel.1 type vxlan id 1 local 192.168.77.1 dev eth0 dstport 8472 nolearning"],
            "ipip": ["link add flannel.ipip type ipip local 192.168.77.1 dev eth0"],
            "udp": ["tuntap add dev flannel0 mode tun"],
        }.get(self.backend, [])
        if make:
            self.node.ip(*make, f"link set {self.link} up", f"address add 10.244.1.0/32 dev {self.link}")
        routes, entries = objects(self.backend, self.link)
        begun = time.monotonic()
        self.node.ip(*routes)
        if entries:
            self.node.run(["bridge", "-batch", "-"], input="\n".join(entries) + "\n")
        took = time.monotonic() - begun
        assert self.routes() >= PEERS
        self.node.run(f"ip link delete {self.link}" if make else "ip route flush root 10.100.0.0/14")
        return took

    def routes(self):
        """How many routes to peers there are."""
        return self.node.run("ip route show type unicast root 10.100.0.0/14").count("/24 ")


def thousand(backend, link, quick):
    subject = Thousand(backend, link)
    try:
        ours, theirs = interleaved(1 if quick else 5, subject.ours, subject.theirs)
        count = sum(map(len, objects(backend, link)))
        what = f"{backend}: start of the daemon until {PEERS:,} leases are programmed ({count:,} objects)"
        seconds = [one * 1000 for one, _ in ours]
        row = ratio(what, "ms", seconds, [one * 1000 for one in theirs], "`ip` and `bridge`, the objects alone")
        row.ours += f"; {shown(median([memory for _, memory in ours]))} MiB resident"
        return row
    finally:
        subject.lab.down()


# --- a restart of udp -------------------------------------------------------------------------------------------------------


def restarts(quick):
    """What a flow of 1,000 packets a second loses while the daemon that carries it is ended and started again."""
    lab = quiet("bench-restart", 2)
    try:
        lab.configure(network=NETWORK, SubnetLen=24, Type="udp")
        lab.start(*PLAIN, state="plain")
        one, two = lab.pods()
        assert any(one.ping(two) for _ in range(20))
        lost = []
        for _ in range(2 if quick else 9):
            with lab.flow(1, 2, rate=1000) as flow:
                time.sleep(0.5)
                lab.node(1).stop()
                lab.node(1).start(*lab.flags, *PLAIN)
                lab.meshed(state="plain")
                time.sleep(0.5)
            lost.append(flow.result.gap * 1000)
        return Row("udp: longest gap of a flow over a restart of the daemon", f"{shown(median(lost))} ms", "", median(lost), "ms")
    finally:
        lab.down()


def plain(_programs, quick):
    """All rows of the table."""
    rows = [row for backend in ("vxlan", "host-gw") for row in through(backend, quick)]
    links = {"vxlan": "flannel.1", "host-gw": "eth0", "ipip": "flannel.ipip", "udp": "flannel0"}
    rows += [thousand(backend, link, quick) for backend, link in links.items()]
    return [*rows, restarts(quick)]
