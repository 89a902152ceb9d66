"""A mesh of nodes on this kernel, for tests: the topology of deploy/lab, its daemons, pods and wire.

    lab = make_lab(3)                        # the fixture of conftest.py: watched, and taken down after the test
    lab.configure(UDPEncap=True)             # net-conf.json and a PSK
    lab.start()                              # a daemon on every node, until each has every other up
    lab.pods()                               # a pod on every node
    assert lab.pod(1).ping(lab.pod(2)) == 1
    lab.wire.assert_clean()                  # also done after every test

Numbers of nodes begin at 1, as in deploy/lab."""

import collections
import functools
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import threading
import time

import netns
from flow import Flow
from frames import MARKER
from wire import Wire

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
STATE = pathlib.Path("/run/ringmail-lab")


def eventually(what, condition, timeout=10, every=0.1):
    """The first true value of `condition()`, or an AssertionError that says `what` did not happen and what was last."""
    end, last = time.monotonic() + timeout, None
    while True:
        try:
            last = condition()
            if last:
                return last
        except (AssertionError, OSError, LookupError, ValueError) as error:
            last = error
        if time.monotonic() > end:
            raise AssertionError(f"not within {timeout} s: {what} (last: {last})")
        time.sleep(every)


@functools.cache
def program():
    """The daemon's binary, chosen as deploy/lab chooses it."""
    if path := os.environ.get("RINGMAIL"):
        return path
    release, debug = (REPOSITORY / "target" / kind / "ringmail" for kind in ("release", "debug"))
    there = [path for path in (release, debug) if path.exists()]
    assert there, "no ringmail: cargo build, or RINGMAIL=PATH"
    return str(max(there, key=lambda path: path.stat().st_mtime))


class Place:
    """A namespace with an address in each family: what Node and Pod share."""

    def __init__(self, lab, number, namespace):
        self.lab, self.number, self.namespace = lab, number, namespace

    def __repr__(self):
        return self.namespace

    def run(self, command, **options):
        """A command's standard output (netns.run); a string goes through the shell."""
        return netns.run(self.namespace, command, **options)

    def ip(self, *lines):
        """Commands for `ip`, without its name, in one process."""
        return self.run(["ip", "-batch", "-"], input="\n".join(lines) + "\n")

    def ping(self, target, family=4, count=1, size=None, timeout=2, source=None, interval=None):
        """How many of `count` echoes came back. target: an address or a Place. size: of the whole IP packet, sent with
        "don't fragment" and without local cutting. The payload holds the marker."""
        address = target if isinstance(target, str) else target.address(family)
        command = ["ping", "-n", "-q", "-c", str(count), "-W", str(timeout), "-p", MARKER.hex()]
        if size is not None:
            command += ["-M", "do", "-s", str(size - (48 if ":" in address else 28))]
        if source is not None:
            command += ["-I", source]
        if interval is not None:
            command += ["-i", str(interval)]
        done = self.run(command + [address], check=False, timeout=count * timeout + 10)
        answer = re.search(r"(\d+) received", done.stdout)
        return int(answer.group(1)) if answer else 0

    def listen(self, port=8080):
        """A TCP and UDP server, of both families, that answers each caller with the address it sees: use in a `with`.
        See `ask`."""
        return Answering(self, port)

    def ask(self, target, port=8080, family=4, kind="tcp", timeout=3, source=None, payload=MARKER):
        """Calls such a server: the address that it saw us come from. OSError if no answer. payload: without the marker
        where the call is one that the wire may show, as from outside the mesh."""
        address = target if isinstance(target, str) else target.address(family)
        kind = {"tcp": socket.SOCK_STREAM, "udp": socket.SOCK_DGRAM}[kind]
        with netns.make_socket(self.namespace, socket.AF_INET6 if ":" in address else socket.AF_INET, kind) as caller:
            caller.settimeout(timeout)
            if source:
                caller.bind((source, 0))
            caller.connect((address, port))
            caller.sendall(payload)
            return caller.recv(1000).decode()

    def iperf(self, target, seconds=2, streams=1, family=4, arguments=()):
        """TCP throughput to another place, Gbit/s as received."""
        server = netns.spawn(target.namespace, ["iperf3", "-s", "-1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            command = ["iperf3", "-J", "-t", str(seconds), "-P", str(streams), *arguments, "-c", target.address(family)]
            # Its port, any peer, the state LISTEN: connections of the server before it stay in the table for a minute.
            listening = lambda: re.search(r":1451 0+:0000 0A ", netns.read(target.namespace, "tcp6"))  # noqa: E731
            eventually("iperf3 listens", listening, 5, 0.05)
            report = json.loads(self.run(command, timeout=seconds + 30))
            assert "error" not in report, report["error"]
            return report["end"]["sum_received"]["bits_per_second"] / 1e9
        finally:
            server.kill()
            server.wait()

    def iptables(self, rule, family=4):
        """A rule for iptables-legacy, whose nat every kernel of ours has: "-t nat -A POSTROUTING …"."""
        self.run(("iptables-legacy -w " if family == 4 else "ip6tables-legacy -w ") + rule)

    def dnat(self, service, port, target, to_port, chain="PREROUTING", protocol="tcp"):
        """As kube-proxy does for a Service: chain PREROUTING for pods, OUTPUT for the node itself."""
        family = 6 if ":" in service else 4
        to = f"[{target}]:{to_port}" if family == 6 else f"{target}:{to_port}"
        self.iptables(f"-t nat -A {chain} -d {service} -p {protocol} --dport {port} -j DNAT --to-destination {to}", family)

    def nodeport(self, port, target, to_port, protocol="tcp"):
        """As kube-proxy does for a NodePort: DNAT on arrival, and masquerade by mark 0x4000 on the way out."""
        family = 6 if ":" in target else 4
        to = f"[{target}]:{to_port}" if family == 6 else f"{target}:{to_port}"
        match = f"-i eth0 -p {protocol} --dport {port}"
        self.iptables(f"-t mangle -A PREROUTING {match} -j MARK --set-xmark 0x4000/0x4000", family)
        self.iptables(f"-t nat -A PREROUTING {match} -j DNAT --to-destination {to}", family)
        self.iptables("-t nat -A POSTROUTING -m mark --mark 0x4000/0x4000 -j MASQUERADE", family)

    def netem(self, rule, device="eth0"):
        """Makes what leaves here worse: "loss 10%", "delay 20ms"; None takes it off."""
        self.run(f"tc qdisc replace dev {device} root netem {rule}" if rule else f"tc qdisc del dev {device} root")

    def xfrm_stat(self):
        """The counters of /proc/net/xfrm_stat that are not zero."""
        lines = (line.split() for line in netns.read(self.namespace, "xfrm_stat").splitlines())
        return {name: int(value) for name, value in lines if value != "0"}

    @functools.cached_property
    def mac(self):
        """Of eth0, as bytes."""
        link = json.loads(self.run("ip -j link show eth0"))
        return bytes.fromhex(link[0]["address"].replace(":", ""))


class Node(Place):
    """A node: its uplink's addresses, its daemon."""

    def __init__(self, lab, number):
        super().__init__(lab, number, f"{lab.name}-node{number}")
        self.directory = STATE / lab.name / str(number)
        self.run_dir = self.directory / "run"

    def address(self, family=4):
        return f"192.168.77.{self.number}" if family == 4 else f"fd77::{self.number:x}"

    def start(self, *flags, env=None):
        """Starts the daemon (deploy/lab start) and returns at once: see `ready`."""
        self.lab.call("start", self.number, "--", *flags, env=env)

    def stop(self, signal="TERM"):
        """Ends the daemon and waits for its end."""
        self.lab.call("stop", self.number, signal)

    def kill(self):
        self.stop("KILL")

    @property
    def pid(self):
        """The daemon's process, None when it does not run."""
        try:
            pid = int((self.directory / "daemon.pid").read_text())
            os.kill(pid, 0)
            return pid
        except (OSError, ValueError):
            return None

    def log(self):
        path = self.directory / "daemon.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def subnet_env(self):
        """subnet.env as a dict; FileNotFoundError while it is not there."""
        lines = (self.directory / "subnet.env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)

    def ready(self, timeout=15):
        """Waits for subnet.env, which the daemon writes once it serves. A daemon that has ended fails at once."""

        def written():
            if (self.directory / "subnet.env").exists():
                return True
            if self.pid is None:
                raise RuntimeError(f"the daemon of {self} has ended:\n{self.log()[-3000:]}")
            return False

        eventually(f"subnet.env of {self}", written, timeout)

    def ringmail(self, verb, *flags, check=True, timeout=20):
        """A verb of the CLI on this node's daemon: its standard output."""
        command = [program(), *verb.split(), "--run-dir", str(self.run_dir), *flags]
        return self.run(command, check=check, timeout=timeout)

    def status(self):
        """What `ringmail status --json` says, whatever its exit code."""
        return json.loads(self.ringmail("status", "--json", check=False).stdout)

    def problems(self):
        """What `status` names as wrong with the node, but for what the guard has dropped: a test that forges packets, or turns
        encryption on under traffic, leaves that count behind."""
        return [text for text in self.status()["problems"] if not text.startswith("the guard has dropped")]

    def peers(self, state):
        """The names of the peers that `status` shows in a state: up, moving, kept, waiting, refused."""
        return {peer["node"] for peer in self.status()["peers"] if peer["state"] == state}

    def audit(self):
        """What `ringmail audit --json` says, whatever its exit code."""
        return json.loads(self.ringmail("audit", "--json", check=False).stdout)

    def sas(self):
        """The kernel's SAs as [{source, destination, spi, reqid}], without their keys."""
        found = []
        for line in self.run("ip xfrm state list nokeys").splitlines():
            if match := re.match(r"src (\S+) dst (\S+)", line):
                found.append({"source": match[1], "destination": match[2]})
            elif match := re.search(r"spi (0x[0-9a-f]+) reqid (\d+)", line):
                found[-1] |= {"spi": int(match[1], 16), "reqid": int(match[2])}
        return found


class Pod(Place):
    """The pod of a node."""

    def __init__(self, lab, number):
        super().__init__(lab, number, f"{lab.name}-pod{number}")

    def address(self, family=4):
        subnet = self.lab.node(self.number).subnet_env()["FLANNEL_SUBNET" if family == 4 else "FLANNEL_IPV6_SUBNET"]
        first = subnet.split("/")[0]
        return first.rsplit(".", 1)[0] + f".{int(first.rsplit('.', 1)[1]) + 9}" if family == 4 else first[:-1] + "a"


class Answering:
    """The server of Place.listen, in threads of this process, with sockets in the other namespace."""

    def __init__(self, place, port):
        self.callers = collections.Counter()
        self._tcp = netns.make_socket(place.namespace, socket.AF_INET6, socket.SOCK_STREAM)
        self._udp = netns.make_socket(place.namespace, socket.AF_INET6, socket.SOCK_DGRAM)
        self._tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        for one in (self._tcp, self._udp):
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            one.bind(("::", port))
            one.settimeout(0.1)
        self._tcp.listen(64)
        self._over = threading.Event()
        self._threads = [threading.Thread(target=serve, daemon=True) for serve in (self._serve_tcp, self._serve_udp)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        for thread in self._threads:
            thread.join()
        self._tcp.close()
        self._udp.close()

    def _note(self, address):
        seen = address[0].removeprefix("::ffff:")
        self.callers[seen] += 1
        return seen.encode()

    def _serve_tcp(self):
        while not self._over.is_set():
            try:
                caller, address = self._tcp.accept()
            except TimeoutError:
                continue
            with caller:
                try:
                    caller.settimeout(3)
                    caller.recv(1000)
                    caller.sendall(self._note(address))
                except OSError:
                    continue

    def _serve_udp(self):
        while not self._over.is_set():
            try:
                _, address = self._udp.recvfrom(2000)
                self._udp.sendto(self._note(address), address)
            except OSError:
                continue


class Lab:
    """N nodes on one wire. keywatch: a KeyWatch that outlives the lab, or None."""

    def __init__(self, name, count, mtu=1500, keywatch=None):
        self.name, self.count, self.keywatch = name, count, keywatch
        self.call("up", count, "--mtu", mtu)
        self.nodes = [Node(self, number) for number in range(1, count + 1)]
        for node in self.nodes if keywatch else []:
            keywatch.attach(node.namespace, node.namespace, [node.address(4), node.address(6)])
        self.wire = Wire(f"{name}-wire")
        self.lease_dir, self.psk_file = str(STATE / name / "leases"), str(STATE / name / "psk")
        os.makedirs(self.lease_dir)

    def call(self, verb, *arguments, env=None):
        """A verb of deploy/lab."""
        command = [str(REPOSITORY / "deploy" / "lab"), verb, self.name, *map(str, arguments)]
        files = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        done = subprocess.run(command, text=True, timeout=60, env={**os.environ, **(env or {})}, **files)
        assert done.returncode == 0, f"deploy/lab {verb} {self.name} {arguments}: {done.stdout}"

    def node(self, number):
        return self.nodes[number - 1]

    def pod(self, number):
        return Pod(self, number)

    def configure(self, network="10.244.0.0/16", network6=None, psk=None, **backend):
        """Writes net-conf.json into the folder of leases and a PSK (a new one, if none is given) into `psk_file`.
        network6 alone: give network=None."""
        conf = {"Backend": {"Type": "ipsec", **backend}}
        conf |= {"Network": network} if network else {"EnableIPv4": False}
        conf |= {"EnableIPv6": True, "IPv6Network": network6} if network6 else {}
        pathlib.Path(self.lease_dir, "net-conf.json").write_text(json.dumps(conf))
        self.write_psk(psk or subprocess.run([program(), "keygen"], stdout=subprocess.PIPE, check=True).stdout)

    def write_psk(self, psk, path=None):
        """A PSK file that only root reads: the lab's own, or another."""
        path = pathlib.Path(path or self.psk_file)
        path.touch(mode=0o600)
        path.write_bytes(psk)
        return str(path)

    @property
    def flags(self):
        """What every daemon of the lab is given."""
        return ["--lease-dir", self.lease_dir, "--psk-file", self.psk_file]

    def start(self, *flags, state="up"):
        """A daemon on every node, waits until each is ready, and until each has every other in this state."""
        for node in self.nodes:
            node.start(*self.flags, *flags)
        for node in self.nodes:
            node.ready()
        self.meshed(state=state)

    def meshed(self, nodes=None, timeout=20, state="up"):
        """Waits until each of the nodes (all) shows every other of them in this state."""
        nodes = nodes or self.nodes
        for node in nodes:
            others = {str(other) for other in nodes if other is not node}
            eventually(f"{node} has {sorted(others)} {state}", lambda: others <= node.peers(state), timeout)  # noqa: B023

    def pods(self):
        """The pods of all nodes."""
        for node in self.nodes:
            self.make_pod(node.number)
        return [self.pod(node.number) for node in self.nodes]

    def make_pod(self, number):
        """The pod of one node, made (anew) from its subnet.env."""
        self.node(number).ready()
        self.call("pod", number)
        return self.pod(number)

    def flow(self, source, destination, **options):
        """A Flow between two pods, given as numbers."""
        return Flow(self.pod(source), self.pod(destination), **options)

    def spoof(self, number, data, count=1):
        """A raw frame with this node's MAC as destination (frames.udp makes one), put on the wire towards it."""
        self.wire.inject(number, self.node(number).mac + data[6:], count)

    def replay(self, source, destination, count=1, family=4):
        """Sends the newest tunnel frame from one node to another once more, `count` times."""
        source, destination = self.node(source), self.node(destination)
        frame = self.wire.tunnel_frame(source.address(family), destination.address(family))
        self.wire.inject(destination.number, frame.data, count)

    def down(self):
        self.wire.close()
        for node in self.nodes if self.keywatch else []:
            self.keywatch.detach(node.namespace)
        self.call("down")
        shutil.rmtree(STATE / self.name, ignore_errors=True)
