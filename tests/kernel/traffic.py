"""Meshes of real daemons for the tests of traffic, and what is sent through them.

Echoes and datagrams are made by sockets of this process inside the namespaces: no process for a packet, so every pair of
a mesh can be tried, and what the kernel says about a packet that is too big is read in full."""

import collections
import errno
import json
import select
import socket
import struct
import time

import pytest

import netns
from frames import MARKER, checksum, take_apart
from rig import STATE, Lab, Place, eventually

PSK = "known only to the nodes of the tests' meshes"
NETWORKS = {4: "10.244.0.0/16", 6: "fd00:244::/48"}
CIPHERS = ("aes128gcm16", "aes256gcm16", "chacha20poly1305")
SO_EE_ORIGIN = {1: "local", 2: "icmp", 3: "icmp"}
IP_MTU_DISCOVER, IP_RECVERR, IPV6_MTU_DISCOVER, IPV6_RECVERR, IPV6_DONTFRAG, DO = 10, 11, 23, 25, 62, 2
MSG_ERRQUEUE, SO_RCVBUFFORCE = 0x2000, 33

TooBig = collections.namedtuple("TooBig", "origin mtu offender")


def inner_mtu(uplink, outer_family, encap):
    """The largest inner packet whose ESP is no longer than the uplink's MTU: sizes tried one by one, as on the wire."""
    return max(inner for inner in range(68, uplink) if esp_size(inner, outer_family, encap) <= uplink)


def esp_size(inner, outer_family, encap):
    """Bytes of the IP packet that carries an inner one: RFC 4303 (padding to 4), with an IV of 8 and a tag of 16, as all
    three ciphers have (RFC 4106, RFC 7634), and RFC 3948."""
    padded = (inner + 2 + 3) // 4 * 4
    return (20 if outer_family == 4 else 40) + (8 if encap else 0) + 8 + 8 + padded + 16


class Mesh(Lab):
    """A lab whose nodes run daemons of one Network. families: of the Network; outer: the family of the tunnel."""

    def __init__(self, name, count, families=(4, 6), keywatch=None, mtu=1500):
        super().__init__(name, count, mtu=mtu, keywatch=keywatch)
        self.families, self.uplink_mtu = families, mtu
        self.outer = families[0]
        self.members = []
        self.cuts = False  # whether fragments of ESP are expected, until the next check
        self.outside = []  # addresses of the world outside the mesh, whose traffic with the nodes is its own business
        self.psk_file = str(STATE / name / "psk")
        with open(self.psk_file, "w") as file:
            file.write(PSK)
        (STATE / name / "psk").chmod(0o600)
        if 4 not in families:
            for node in self.nodes:  # an underlay of IPv6 alone
                node.ip("address flush dev eth0 to 0.0.0.0/0")

    def conf(self, number, **backend):
        """Writes a net-conf.json for a node: its path."""
        conf = {"Backend": {"Type": "ipsec", **backend}}
        if 4 in self.families:
            conf |= {"Network": NETWORKS[4]}
        else:
            conf |= {"EnableIPv4": False}
        if 6 in self.families:
            conf |= {"EnableIPv6": True, "IPv6Network": NETWORKS[6]}
        path = STATE / self.name / str(number) / "net-conf.json"
        path.write_text(json.dumps(conf))
        return str(path)

    def launch(self, number, *flags, **backend):
        """Starts the daemon of a node. The packet filter is not looked at again and again: in User Mode Linux that
        takes the one processor from the traffic, and other tests are about it."""
        conf = self.conf(number, **backend)
        given = ["--lease-dir", self.lease_dir, "--psk-file", self.psk_file, "--net-config-path", conf]
        self.node(number).start(*given, "--iptables-resync=600", *flags)
        if number not in self.members:
            self.members.append(number)

    def settle(self, timeout=60):
        """Pods for the members that have none, and every member's peers up."""
        for number in self.members:
            self.node(number).ready(timeout)
            if not (STATE.parent / "netns" / self.pod(number).namespace).exists():
                self.make_pod(number)
        for number in self.members:
            eventually(f"all peers of node {number} are up", lambda: self.all_up(number), timeout, 0.2)

    def all_up(self, number):
        report = json.loads(self.node(number).ringmail("status", "--json", check=False).stdout)
        peers = {peer["node"]: peer["state"] for peer in report["peers"]}
        wanted = {f"{self.name}-node{other}" for other in self.members if other != number}
        return set(peers) == wanted and set(peers.values()) <= {"up"} and report["complete"]

    def peer(self, number, other):
        """What a node's status says of another."""
        peers = self.node(number).status()["peers"]
        return next(peer for peer in peers if peer["node"] == f"{self.name}-node{other}")

    def subnet(self, number, family):
        """The node's subnet as (base, prefix length), both as text: ("10.244.7.0", "24")."""
        text = self.node(number).subnet_env()["FLANNEL_SUBNET" if family == 4 else "FLANNEL_IPV6_SUBNET"]
        first, length = text.split("/")
        return first[:-1] + ("0" if family == 4 else ""), length

    def base(self, number, family):
        return self.subnet(number, family)[0]

    def bridge(self, number, family):
        """The address of cni0."""
        base = self.base(number, family)
        return base[:-1] + "1" if family == 4 else base + "1"

    def second_pod(self, number):
        """Another pod on a node, at the subnet's base + 11."""
        node, pod = self.node(number), Place(self, number, f"{self.name}-pod{number}b")
        netns_add = ["ip", "netns", "add", pod.namespace]
        node.run(netns_add)
        mtu = node.subnet_env()["FLANNEL_MTU"]
        node.ip(
            f"link add pod2 mtu {mtu} type veth peer name eth0 mtu {mtu} netns {pod.namespace}",
            "link set pod2 master cni0 up",
        )
        lines = ["link set lo up", "link set eth0 up"]
        at = {}
        for family in self.families:
            base, length = self.subnet(number, family)
            at[family] = base[:-1] + "11" if family == 4 else base + "b"
            lines.append(f"address add {at[family]}/{length} dev eth0" + (" nodad" if family == 6 else ""))
            lines.append(f"route add default via {self.bridge(number, family)}")
        pod.ip(*lines)
        pod.address = lambda family=4: at[family]
        return pod

    def outsider(self):
        """A host on the wire that is no node: 192.168.77.200, fd77::c8."""
        host = Place(self, 200, f"{self.name}-podless")  # a name that deploy/lab takes down too
        self.node(1).run(["ip", "netns", "add", host.namespace])
        wire = Place(self, 0, f"{self.name}-wire")
        wire.ip(
            f"link add outsider mtu {self.uplink_mtu} type veth peer name eth0 mtu {self.uplink_mtu} netns {host.namespace}",
            "link set outsider master wire up",
        )
        host.ip(
            "link set lo up",
            "link set eth0 up",
            "address add 192.168.77.200/24 dev eth0",
            "address add fd77::c8/64 dev eth0 nodad",
        )
        host.address = lambda family=4: "192.168.77.200" if family == 4 else "fd77::c8"
        self.outside += [host.address(4), host.address(6)]
        return host

    def errors(self):
        """{node: the counters of /proc/net/xfrm_stat that are not zero}, nodes without any left out."""
        return {str(node): stat for node in self.nodes if (stat := node.xfrm_stat())}

    def fragments(self):
        """How many fragments the nodes have made, of whatever, in both families."""
        made = 0
        for node in self.nodes:
            names, values = (line.split() for line in netns.read(node.namespace, "snmp").splitlines()[:2])
            made += int(dict(zip(names, values))["FragCreates"])
            made += int(dict(line.split() for line in netns.read(node.namespace, "snmp6").splitlines())["Ip6FragCreates"])
        return made

    def check(self):
        """Nothing of the pods on the wire, nothing between nodes but ESP and what finds neighbours, no fragment of ESP."""
        try:
            self.wire.assert_clean()
            # What follows the first fragment of UDP looks like UDP of any port.
            expected = lambda frame: self.of_outside(frame.data) or (self.cuts and is_fragment(frame.data))  # noqa: E731
            between = [frame for frame in self.wire.other if not expected(frame)]
            assert not between, f"between nodes, neither ESP nor a neighbour's: {between[:10]}"
            icmp = self.wire.counts["icmp"]
            assert icmp == 0, f"{icmp} ICMP packets on the wire"
            cut = [frame for frame in list(self.wire.tunnel) if is_fragment(frame.data)]
            assert self.cuts or not cut, f"fragments on the wire: {cut[:10]}"
        finally:
            self.cuts = False
            for frames in (self.wire.plaintext, self.wire.other, self.wire.tunnel):
                frames.clear()
            self.wire.counts["plaintext"] = self.wire.counts["icmp"] = 0

    def of_outside(self, frame):
        version = {0x0800: 4, 0x86DD: 6}.get(int.from_bytes(frame[12:14], "big"))
        if version is None:
            return False
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        ends = {socket.inet_ntop(family, end) for end in take_apart(version, frame[14:])[:2]}
        return bool(ends & set(self.outside))


def is_fragment(frame):
    if frame[12:14] == b"\x08\x00":
        return int.from_bytes(frame[20:22], "big") & 0x3FFF != 0
    return frame[20] == 44


# --- fixtures ---------------------------------------------------------------------------------------------------------------


_open = []


@pytest.fixture(scope="module")
def make_mesh(keywatch):
    """make_mesh(count, …): a Mesh for all tests of the module, or of a parameter of a fixture of the module's scope."""
    mine = []

    def make(count, **options):
        mesh = Mesh(f"m{len(_open)}-{time.monotonic_ns() % 10000}", count, keywatch=keywatch, **options)
        _open.append(mesh)
        mine.append(mesh)
        return mesh

    yield make
    for mesh in mine:
        close(mesh)


def close(mesh):
    if mesh in _open:
        _open.remove(mesh)
        mesh.down()


@pytest.fixture(autouse=True)
def nothing_leaks(request, keywatch):
    """After every test: the wire was clean, and no outbound key was programmed twice."""
    request.node.labs = _open
    yield
    problems = []
    for check in [mesh.check for mesh in _open] + [keywatch.check]:
        try:
            check()
        except AssertionError as error:
            problems.append(str(error))
    keywatch.faults.clear()
    assert not problems, "\n".join(problems)


# --- packets ----------------------------------------------------------------------------------------------------------------


class Echo:
    """ICMP echo from a namespace by a raw socket. With whole=True packets are never cut, and what the kernel or a router
    says about them is kept for `too_big`."""

    _identifiers = iter(range(1, 1 << 16))

    def __init__(self, place, family, whole=False):
        self.family, self.identifier = family, next(self._identifiers)
        kind, protocol = (socket.AF_INET, 1) if family == 4 else (socket.AF_INET6, 58)
        self.socket = netns.make_socket(place.namespace, kind, socket.SOCK_RAW, protocol)
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 4 << 20)
        if whole and family == 4:
            self.socket.setsockopt(socket.IPPROTO_IP, IP_MTU_DISCOVER, DO)
            self.socket.setsockopt(socket.IPPROTO_IP, IP_RECVERR, 1)
        elif whole:
            self.socket.setsockopt(socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER, DO)
            self.socket.setsockopt(socket.IPPROTO_IPV6, IPV6_DONTFRAG, 1)
            self.socket.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVERR, 1)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def send(self, address, number, size=100):
        """size: of the whole IP packet. OSError as the kernel says."""
        request = 8 if self.family == 4 else 128
        head = struct.pack("!BBHHH", request, 0, 0, self.identifier, number)
        packet = (head + MARKER * (size // 16 + 1))[: size - (20 if self.family == 4 else 40)]
        if self.family == 4:
            packet = packet[:2] + struct.pack("!H", checksum(packet)) + packet[4:]
        self.socket.sendto(packet, (address, 0))

    def replies(self):
        """What has come so far: [(address, number, size of the IP packet)]."""
        found = []
        while True:
            try:
                packet, (address, *_) = self.socket.recvfrom(1 << 16)
            except OSError as error:
                # An error of the queue is told here once too; it stays in the queue for `too_big`.
                if error.errno == errno.EAGAIN:
                    return found
                continue
            size = len(packet) + (0 if self.family == 4 else 40)
            if self.family == 4:
                packet = packet[(packet[0] & 15) * 4 :]
            kind, _, _, identifier, number = struct.unpack_from("!BBHHH", packet)
            if kind == (0 if self.family == 4 else 129) and identifier == self.identifier:
                found.append((address, number, size))

    def answered(self, address, size, timeout=3):
        """Whether an echo of this size comes back whole. False where it is too big: see `too_big`."""
        try:
            self.send(address, 0, size)
        except OSError as error:
            if error.errno != errno.EMSGSIZE:
                raise
            return False
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            if select.select([self.socket], [], [], 0.05)[0] or self._refused():
                if any(reply[2] == size for reply in self.replies()):
                    return True
                if self._refused():
                    return False
        return False

    def _refused(self):
        poll = select.poll()
        poll.register(self.socket, 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))

    def too_big(self):
        """The oldest that was said about a packet that is too big: TooBig, or None. Who said it: "local" or "icmp", then
        with the router's address."""
        while True:
            try:
                _, ancillary, _, _ = self.socket.recvmsg(1 << 16, 1 << 10, MSG_ERRQUEUE)
            except BlockingIOError:
                return None
            for _, _, data in ancillary:
                number, origin, _, _, _, info, _ = struct.unpack_from("=IBBBBII", data)
                if number != errno.EMSGSIZE:
                    continue
                offender = None
                if SO_EE_ORIGIN[origin] == "icmp":
                    family = socket.AF_INET if self.family == 4 else socket.AF_INET6
                    start, length = (20, 4) if self.family == 4 else (24, 16)
                    offender = socket.inet_ntop(family, data[start : start + length])
                return TooBig(SO_EE_ORIGIN[origin], info, offender)


def unanswered(sources, targets, family, count=3, size=100, timeout=5):
    """Echoes from every source to every target (a dict of names to Places; of names to addresses): the pairs with fewer
    than `count` replies, with how many there were."""
    echoes = {name: Echo(place, family) for name, place in sources.items()}
    got = collections.Counter()
    names = collections.defaultdict(list)
    for name, address in targets.items():
        names[address].append(name)
    pairs = [(source, target) for source in sources for target in targets if source != target]
    try:
        for number in range(count):
            for source, target in pairs:
                echoes[source].send(targets[target], number, size)
        end = time.monotonic() + timeout
        while sum(got.values()) < len(pairs) * count and time.monotonic() < end:
            for source, echo in echoes.items():
                for address, _, _ in echo.replies():
                    got.update((source, name) for name in names[address] if name != source)
            time.sleep(0.01)
    finally:
        for echo in echoes.values():
            echo.socket.close()
    return {pair: got[pair] for pair in pairs if got[pair] != count}


def numbered(places, family, count=10, size=200, port=9100, timeout=5):
    """UDP from every place to every other (a dict of names to Places), numbered: {(source, target): the numbers in order
    of arrival}, and the set of (source, address that its packets came from)."""
    kind = socket.AF_INET if family == 4 else socket.AF_INET6
    sockets = {}
    try:
        for name, place in places.items():
            sockets[name] = netns.make_socket(place.namespace, kind, socket.SOCK_DGRAM)
            sockets[name].bind(("0.0.0.0" if family == 4 else "::", port))
            sockets[name].setblocking(False)
        order = list(places)
        pairs = [(source, target) for source in order for target in order if source != target]
        for number in range(count):
            for source, target in pairs:
                packet = (MARKER + struct.pack("!HH", order.index(source), number)).ljust(size, b".")
                sockets[source].sendto(packet, (places[target].address(family), port))
            time.sleep(0.002)
        arrived, seen = {pair: [] for pair in pairs}, set()
        end = time.monotonic() + timeout
        while sum(map(len, arrived.values())) < len(pairs) * count and time.monotonic() < end:
            for target in select.select(list(sockets.values()), [], [], 0.1)[0]:
                packet, (address, *_) = target.recvfrom(1 << 16)
                source, number = struct.unpack_from("!HH", packet, len(MARKER))
                name = next(name for name, one in sockets.items() if one is target)
                arrived[order[source], name].append(number)
                seen.add((order[source], address))
        return arrived, seen
    finally:
        for one in sockets.values():
            one.close()
