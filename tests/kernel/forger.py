"""Leases as someone writes them who can write to the store, with a PSK or without: another implementation of statement and
tag (keys/src/statement.rs, keys/src/psk.rs) from Python's standard library."""

import base64
import hashlib
import hmac
import ipaddress
import json
import os
import struct


def hkdf(prk, label, network, length):
    """HKDF-Expand (RFC 5869) of at most one hash, its info framed as ringmail frames it."""
    info = b"".join(struct.pack("!H", len(field)) + field for field in (label, network.encode()))
    return hmac.digest(prk, info + b"\1", hashlib.sha256)[:length]


class Psk:
    def __init__(self, psk, network):
        prk = hmac.digest(b"ringmail v1 psk", psk.encode(), hashlib.sha256)
        self.kid = hkdf(prk, b"kid", network, 8)
        self._auth = hkdf(prk, b"statement", network, 32)

    def tag(self, statement):
        return hmac.digest(self._auth, statement, hashlib.sha256)


def net(text):
    net = ipaddress.ip_network(text)
    return bytes([net.version, net.prefixlen]) + net.network_address.packed


def statement(node, subnet, address, epoch, kid, network="10.244.0.0/16"):
    """The bytes of a statement of plain ESP with AES-128-GCM."""
    address = ipaddress.ip_address(address)
    public = os.urandom(31) + b"\x11"
    fields = [net(network), node.encode(), net(subnet), bytes([address.version]) + address.packed]
    fields += [b"\1", b"\0" + struct.pack("!H", 4500), struct.pack("!Q", epoch), public, kid]
    return b"\1" + b"".join(struct.pack("!H", len(field)) + field for field in fields)


def lease(node, address, statement, tag, revision=0):
    """The text of a lease file."""
    encode = lambda data: base64.b64encode(data).decode()  # noqa: E731
    data = {"Statement": encode(statement), "Tags": [encode(tag)]}
    fields = {"Node": node, "PublicIP": address, "BackendType": "ipsec", "BackendData": data, "Revision": revision}
    return json.dumps(fields)
