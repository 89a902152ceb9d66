"""The wire between the nodes, watched for a whole test.

Frames are taken where they come in from a node's port, so each counts once and only what a node sent counts. Two sockets,
told apart by a filter in the kernel: tunnel frames (ESP, UDP 4500) are counted to the last one by the kernel and sampled
for the marker, so that a throughput test does not drown the watcher; every other frame is read, and a single one missed
fails the test."""

import collections
import ctypes
import select
import socket
import struct
import threading
import time

import netns
from frames import Kinds, describe, packed

ETH_P_ALL = 3
SOL_PACKET, PACKET_STATISTICS = 263, 6
SO_ATTACH_FILTER, SO_RCVBUFFORCE = 26, 33
SAMPLES_A_TICK, TICK = 40, 0.05

# Classic BPF: (code, jump if true, jump if false, k); a jump is a label, an end (accept, drop), or None for the next.
LD_B, LD_H, LD_W, LDX_IP, LD_H_X = 0x30, 0x28, 0x20, 0xB1, 0x48
JEQ, JSET, RET = 0x15, 0x45, 0x06
PKTTYPE, IFINDEX, OUTGOING = 0xFFFFF004, 0xFFFFF008, 4


def bpf(tunnel, wire_index):
    """The filter for tunnel frames, or for all others. `wire_index`: the bridge, which sees frames for itself again."""
    on_tunnel, on_other = ("accept", "drop") if tunnel else ("drop", "accept")
    lines = [
        (None, LD_B, None, None, PKTTYPE),
        (None, JEQ, "drop", None, OUTGOING),
        (None, LD_W, None, None, IFINDEX),
        (None, JEQ, "drop", None, wire_index),
        (None, LD_H, None, None, 12),
        (None, JEQ, "v4", None, 0x0800),
        (None, JEQ, "v6", on_other, 0x86DD),
        ("v4", LD_B, None, None, 23),
        (None, JEQ, on_tunnel, None, 50),
        (None, JEQ, None, on_other, 17),
        (None, LD_H, None, None, 20),
        (None, JSET, on_other, None, 0x1FFF),
        (None, LDX_IP, None, None, 14),
        (None, LD_H_X, None, None, 14),
        (None, JEQ, on_tunnel, None, 4500),
        (None, LD_H_X, None, None, 16),
        (None, JEQ, on_tunnel, on_other, 4500),
        ("v6", LD_B, None, None, 20),
        (None, JEQ, on_tunnel, None, 50),
        (None, JEQ, None, on_other, 17),
        (None, LD_H, None, None, 54),
        (None, JEQ, on_tunnel, None, 4500),
        (None, LD_H, None, None, 56),
        (None, JEQ, on_tunnel, on_other, 4500),
        ("accept", RET, None, None, 0xFFFF),
        ("drop", RET, None, None, 0),
    ]
    at = {label: number for number, (label, *_) in enumerate(lines) if label}
    program = b""
    for number, (_, code, yes, no, k) in enumerate(lines):
        jumps = [0 if target is None else at[target] - number - 1 for target in (yes, no)]
        program += struct.pack("HBBI", code, *jumps, k)
    return program, len(lines)


class Frame:
    """A frame that a node sent: `at` (monotonic seconds), `port` (node1 …), `data`."""

    def __init__(self, at, port, data):
        self.at, self.port, self.data = at, port, data

    def __repr__(self):
        return f"{self.port}: {describe(self.data)}"


class Wire:
    """counts: how many frames of each kind (frames.Kinds.kind; esp and udp4500 together as "tunnel", exact, and apart as
    far as sampled); plaintext, other: the frames themselves, the first thousand; tunnel: the newest sampled tunnel frames."""

    def __init__(self, namespace, networks=("10.244.0.0/16", "fd00:244::/48")):
        self.namespace = namespace
        self.kinds = Kinds(networks)
        self.counts = collections.Counter()
        self.plaintext, self.other = [], []
        self.tunnel = collections.deque(maxlen=512)
        self.missed = 0
        self.allowed = None
        self._lock = threading.Lock()
        self._stop = threading.Event()
        wire_index = netns.within(namespace, lambda: socket.if_nametoindex("wire"))
        self._rest = self._listen(*bpf(False, wire_index), buffer=16 << 20)
        # A small one: what is sampled is then recent.
        self._tunnel = self._listen(*bpf(True, wire_index), buffer=64 << 10)
        self._injector = netns.make_socket(namespace, socket.AF_PACKET, socket.SOCK_RAW, 0)
        self._thread = threading.Thread(target=self._watch, name="wire", daemon=True)
        self._thread.start()

    def _listen(self, program, length, buffer):
        # Protocol 0: nothing comes in before the filter stands.
        listener = netns.make_socket(self.namespace, socket.AF_PACKET, socket.SOCK_RAW, 0)
        code = ctypes.create_string_buffer(program)
        listener.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HP", length, ctypes.addressof(code)))
        listener.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, buffer)
        listener.setblocking(False)
        any_interface = struct.pack("@HHiHBB8s", socket.AF_PACKET, socket.htons(ETH_P_ALL), 0, 0, 0, 0, b"")
        if ctypes.CDLL(None, use_errno=True).bind(listener.fileno(), any_interface, len(any_interface)) != 0:
            raise OSError(ctypes.get_errno(), "bind the watcher of the wire")
        return listener

    def _watch(self):
        while not self._stop.is_set():
            select.select([self._rest], [], [], TICK)
            self._take()
        self._take()

    def _take(self):
        with self._lock:
            while frame := self._next(self._rest):
                self._sort(frame)
            self.missed += self._statistics(self._rest)[1]
            for _ in range(SAMPLES_A_TICK):
                frame = self._next(self._tunnel)
                if frame is None:
                    break
                self._sort(frame)
                self.tunnel.append(frame)
            self.counts["tunnel"] += self._statistics(self._tunnel)[0]

    def _next(self, listener):
        try:
            data, address = listener.recvfrom(65536)
        except BlockingIOError:
            return None
        return Frame(time.monotonic(), address[0], data)

    def _sort(self, frame):
        kind, _, detail = self.kinds.kind(frame.data).partition(":")
        self.counts[kind] += 1
        if detail:
            self.counts[f"other:{detail}"] += 1
        kept = {"plaintext": self.plaintext, "other": self.other}.get(kind)
        if kept is not None and len(kept) < 1000:
            kept.append(frame)

    @staticmethod
    def _statistics(listener):
        """(frames since the last call, of them dropped): the kernel counts from zero each time."""
        return struct.unpack("II", listener.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))

    def settle(self, seconds=0.1):
        """Waits for what is under way and takes it in; the counts are then up to date."""
        time.sleep(seconds)
        self._take()

    @property
    def tunnelled(self):
        """How many tunnel frames the nodes have sent, exactly."""
        self.settle()
        return self.counts["tunnel"]

    def allow_plaintext(self, reason):
        """For a test whose point is that there is some: the check at the end of the test is then left out."""
        assert reason
        self.allowed = reason

    def assert_clean(self):
        """No frame with an address or the payload of a pod so far, and none missed."""
        self.settle()
        assert self.missed == 0, f"the watcher of the wire missed {self.missed} frames that are no tunnel frames"
        shown = "\n".join(f"  {frame!r}" for frame in self.plaintext[:20])
        assert not self.plaintext, f"{self.counts['plaintext']} plaintext frames on the wire:\n{shown}"

    def tunnel_frame(self, source, destination, timeout=5):
        """The newest tunnel frame from one node's address to another's, waited for."""
        end = time.monotonic() + timeout
        wanted = packed(source) + packed(destination)
        while time.monotonic() < end:
            self.settle(0.05)
            for frame in reversed(list(self.tunnel)):
                if frame.data[26:34] == wanted or frame.data[22:54] == wanted:
                    return frame
        raise AssertionError(f"no tunnel frame from {source} to {destination} in {timeout} s")

    def inject(self, node, data, count=1):
        """Puts a raw frame on the wire so that it arrives at the node with this number; it is not counted as a node's."""
        for _ in range(count):
            self._injector.sendto(data, (f"node{node}", 0))

    def close(self):
        self._stop.set()
        self._thread.join()
        for one in (self._rest, self._tunnel, self._injector):
            one.close()
