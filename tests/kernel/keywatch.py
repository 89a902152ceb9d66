"""Every SA that any kernel of the lab was given, over the whole session: no outbound key twice.

A key that is programmed into a sending SA a second time starts its counter again, and AES-GCM's nonces repeat. So the
kernel's own notifications are read (they hold the key; only its hash is kept), in every node, from before its daemon
starts until its namespace goes."""

import collections
import errno
import hashlib
import ipaddress
import select
import socket
import struct
import threading

import netns

NETLINK_XFRM = 6
# Expire, SA and policy: never acquire (1), whose listener makes the kernel create larval SAs.
GROUP_EXPIRE, GROUP_SA = 2, 4
NEW, DELETE, EXPIRE, UPDATE, FLUSH = 0x10, 0x11, 0x18, 0x1A, 0x1C
ATTRIBUTE_CRYPT, ATTRIBUTE_AEAD = 2, 18
SO_RCVBUFFORCE = 33

Programmed = collections.namedtuple("Programmed", "node source destination spi key outbound event")


def attributes(data):
    """(type, payload) of each netlink attribute."""
    while len(data) >= 4:
        length, kind = struct.unpack_from("=HH", data)
        if length < 4:
            return
        yield kind & 0x3FFF, data[4:length]
        data = data[(length + 3) & ~3 :]


def parse_sa(body):
    """(source, destination, SPI, hash of the key) of a struct xfrm_usersa_info and its attributes (linux/xfrm.h)."""
    # sel 56 · id.daddr 16, spi 4, proto 1 + 3 · saddr 16 · lft 64 · curlft 32 · stats 12 · seq 4, reqid 4, family 2 … = 224
    family = struct.unpack_from("=H", body, 212)[0]
    width = 4 if family == socket.AF_INET else 16
    destination = ipaddress.ip_address(body[56 : 56 + width])
    source = ipaddress.ip_address(body[80 : 80 + width])
    spi = struct.unpack_from("!I", body, 72)[0]
    key = None
    for kind, payload in attributes(body[224:]):
        if kind in (ATTRIBUTE_AEAD, ATTRIBUTE_CRYPT):
            bits = struct.unpack_from("=I", payload, 64)[0]
            start = 72 if kind == ATTRIBUTE_AEAD else 68
            key = hashlib.sha256(payload[start : start + bits // 8]).hexdigest()[:24]
    return str(source), str(destination), spi, key


class KeyWatch:
    """programmed: every SA added, in order. faults: what went wrong, as sentences; `check()` fails on them."""

    def __init__(self):
        self.programmed, self.faults, self.events = [], [], collections.Counter()
        self._outbound = {}
        self._nodes = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="keywatch", daemon=True)
        self._thread.start()

    def attach(self, node, namespace, addresses):
        """Watches a node; `addresses`: its own, by which an SA is known to be outbound."""
        listener = netns.make_socket(namespace, socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_XFRM)
        listener.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 16 << 20)
        listener.setblocking(False)
        listener.bind((0, GROUP_SA | GROUP_EXPIRE))
        with self._lock:
            self._nodes[listener] = (node, {str(ipaddress.ip_address(one)) for one in addresses})

    def detach(self, node):
        """Stops watching a node, after all that it has said."""
        with self._lock:
            for listener in [one for one, (name, _) in self._nodes.items() if name == node]:
                self._drain(listener)
                del self._nodes[listener]
                listener.close()

    def settle(self):
        """Takes in what has been said so far."""
        with self._lock:
            for listener in self._nodes:
                self._drain(listener)

    def check(self):
        self.settle()
        assert not self.faults, "\n".join(self.faults)

    def outbound(self, node=None):
        """The outbound SAs programmed so far, of one node or of all."""
        self.settle()
        return [one for one in self.programmed if one.outbound and node in (None, one.node)]

    def close(self):
        self._stop.set()
        self._thread.join()
        for listener in self._nodes:
            listener.close()

    def _watch(self):
        while not self._stop.is_set():
            with self._lock:
                listeners = list(self._nodes)
            try:
                ready = select.select(listeners, [], [], 0.05)[0]
            except (OSError, ValueError):  # one was detached meanwhile
                continue
            with self._lock:
                for listener in ready:
                    if listener in self._nodes:
                        self._drain(listener)

    def _drain(self, listener):
        node, addresses = self._nodes[listener]
        while True:
            try:
                data = listener.recv(1 << 18)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self.faults.append(f"{node}: the kernel dropped notifications, so a key may have gone unseen")
                continue
            while len(data) >= 16:
                length, kind = struct.unpack_from("=IH", data)
                self.events[kind] += 1
                if kind in (NEW, UPDATE):
                    self._seen(node, addresses, kind, data[16:length])
                data = data[(length + 3) & ~3 :]

    def _seen(self, node, addresses, event, body):
        source, destination, spi, key = parse_sa(body)
        if key is None:
            return  # larval: no key yet
        this = Programmed(node, source, destination, spi, key, source in addresses, event)
        # An update of the same SA changes limits and addresses; key and counter stay.
        if event == UPDATE and any(one[:5] == this[:5] for one in self.programmed):
            return
        self.programmed.append(this)
        if not this.outbound:
            return
        first = self._outbound.setdefault(key, this)
        if first is not this:
            self.faults.append(
                f"outbound key {key} programmed twice: SPI {first.spi:#x} {first.source} > {first.destination} on "
                f"{first.node}, then SPI {spi:#x} {source} > {destination} on {node}"
            )
