"""When data moved to which SA, as the kernels told: each change of an `out` policy for a subnet names an SPI.

    with Moves(nodes) as moves: ...
    moves.seen                               # [Move], in order of time for each node"""

import collections
import ipaddress
import select
import socket
import struct
import threading
import time

import netns
from keywatch import NETLINK_XFRM, SO_RCVBUFFORCE, attributes

GROUP_POLICY = 8
NEW, UPDATE = 0x13, 0x19
TEMPLATE = 5
OUT = 1

# node: its number. subnet: of the peer. at: monotonic seconds. The SPI's parts (keys/src/spi.rs): the sender's slot, and
# both epochs modulo 64.
Move = collections.namedtuple("Move", "node subnet at slot sender receiver")


class Moves:
    """nodes: rig.Nodes."""

    def __init__(self, nodes):
        self.seen = []
        self._listeners = {}
        for node in nodes:
            listener = netns.make_socket(node.namespace, socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_XFRM)
            listener.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 4 << 20)
            listener.bind((0, GROUP_POLICY))
            self._listeners[listener] = node.number
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._listen, name="moves", daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        time.sleep(0.1)
        self._over.set()
        self._thread.join()
        for listener in self._listeners:
            listener.close()

    def _listen(self):
        while not self._over.is_set():
            for listener in select.select(list(self._listeners), [], [], 0.1)[0]:
                data, at = listener.recv(1 << 16), time.monotonic()
                while len(data) >= 16:
                    length, kind = struct.unpack_from("=IH", data)
                    if kind in (NEW, UPDATE):
                        self._take(self._listeners[listener], data[16:length], at)
                    data = data[(length + 3) & ~3 :]

    def _take(self, node, body, at):
        # struct xfrm_userpolicy_info (linux/xfrm.h): selector 56 (destination 0, family 40, prefix 42, protocol 44) …
        # direction 160, in all 168; struct xfrm_user_tmpl: destination 16, SPI.
        protocol, direction, prefix = body[44], body[160], body[42]
        templates = [payload for kind, payload in attributes(body[168:]) if kind == TEMPLATE]
        if direction != OUT or protocol or not templates:
            return
        spi = struct.unpack_from("!I", templates[0], 16)[0]
        family = struct.unpack_from("=H", body, 40)[0]
        destination = ipaddress.ip_address(body[: 4 if family == socket.AF_INET else 16])
        subnet = f"{destination}/{prefix}"
        self.seen.append(Move(node, subnet, at, (spi >> 12) - 1, spi >> 6 & 63, spi & 63))
