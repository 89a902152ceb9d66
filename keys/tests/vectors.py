#!/usr/bin/env python3
"""Known answers for the crate: the derivation of its drawing, written a second time.

Follows the drawing in src/lib.rs, the tables in src/statement.rs and src/spi.rs, and nothing else of the crate. The
cryptography is that of Python's `cryptography` package (OpenSSL), the encoder is the one below.

    pip install cryptography
    python3 vectors.py            writes vectors.txt beside this file
    python3 vectors.py --check    exits 1 if vectors.txt is not what would be written
"""

import hashlib
import ipaddress
import pathlib
import struct
import sys

import cryptography
from cryptography.hazmat.primitives import hashes, hmac
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

FILE = pathlib.Path(__file__).with_name("vectors.txt")
CIPHERS = {"aes128gcm16": (1, 16), "aes256gcm16": (2, 32), "chacha20poly1305": (3, 32)}
MODES = {"esp": 0, "udp": 1, "auto": 2}


def hmac_sha256(key, message):
    mac = hmac.HMAC(key, hashes.SHA256())
    mac.update(message)
    return mac.finalize()


def framed(content):
    return struct.pack(">H", len(content)) + content


def expand(prk, length, label, *fields):
    info = b"".join(framed(field) for field in (label, *fields))
    return HKDFExpand(hashes.SHA256(), length, info).derive(prk)


def psk_prk(psk):
    return hmac_sha256(b"ringmail v1 psk", psk)


def kid(psk, network):
    return expand(psk_prk(psk), 8, b"kid", network.encode())


def auth_key(psk, network):
    return expand(psk_prk(psk), 32, b"statement", network.encode())


def tag(psk, network, statement):
    return hmac_sha256(auth_key(psk, network), statement)


def net(text):
    network = ipaddress.ip_network(text)
    return bytes([network.version, network.prefixlen]) + network.network_address.packed


def address(text):
    parsed = ipaddress.ip_address(text)
    return bytes([parsed.version]) + parsed.packed


def encode(node):
    return bytes([1]) + b"".join(map(framed, [
        b"".join(map(net, node["network"])),
        node["node"].encode(),
        b"".join(map(net, node["subnets"])),
        b"".join(map(address, node["addresses"])),
        bytes([CIPHERS[node["cipher"]][0]]),
        struct.pack(">BH", MODES[node["mode"]], node["port"]),
        struct.pack(">Q", node["epoch"]),
        node["public"],
        b"".join(node["kids"]),
    ]))


def spi(slot, sender, receiver):
    return (slot + 1) * 4096 + sender % 64 * 64 + receiver % 64


def seed(text):
    return hashlib.sha256(b"ringmail vectors: " + text.encode()).digest()


def inner_states(key):
    """SHA-256's state after the first block of each half of an HMAC: as good as the key to whoever finds it."""
    block = key.ljust(64, b"\0")
    for pad in (0x36, 0x5C):
        yield sha256_block(bytes(byte ^ pad for byte in block))


def sha256_block(block):
    """The state after one block (FIPS 180-4 section 6.2.2), as eight little endian words: as memory holds it."""
    def root(n, power):
        """The first 32 bits of the fraction of a root, in whole numbers."""
        scaled, low, high = n << 32 * power, 0, 1 << 40
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if middle ** power <= scaled else (low, middle)
        return low & 0xFFFFFFFF

    primes = [n for n in range(2, 312) if all(n % d for d in range(2, n))]
    start = [root(prime, 2) for prime in primes[:8]]
    constants = [root(prime, 3) for prime in primes]

    def rotated(word, *counts):
        return [(word >> n | word << 32 - n) & 0xFFFFFFFF for n in counts]

    words = list(struct.unpack(">16I", block))
    for i in range(16, 64):
        x, y, z = *rotated(words[i - 15], 7, 18), words[i - 15] >> 3
        u, v, w = *rotated(words[i - 2], 17, 19), words[i - 2] >> 10
        words.append((words[i - 16] + (x ^ y ^ z) + words[i - 7] + (u ^ v ^ w)) & 0xFFFFFFFF)
    a, b, c, d, e, f, g, h = start
    for constant, word in zip(constants, words, strict=True):
        x, y, z = rotated(e, 6, 11, 25)
        first = h + (x ^ y ^ z) + (e & f ^ ~e & g) + constant + word
        x, y, z = rotated(a, 2, 13, 22)
        second = (x ^ y ^ z) + (a & b ^ a & c ^ b & c)
        a, b, c, d, e, f, g, h = (first + second) & 0xFFFFFFFF, a, b, c, (d + first) & 0xFFFFFFFF, e, f, g
    state = [(x + y) & 0xFFFFFFFF for x, y in zip(start, (a, b, c, d, e, f, g, h), strict=True)]
    return struct.pack("<8I", *state)


assert sha256_block(b"abc\x80".ljust(63, b"\0") + b"\x18") == struct.pack(
    "<8I", *struct.unpack(">8I", hashlib.sha256(b"abc").digest()))


def case(name, psks, network, a, b, dh=None):
    """Lines of one case. The generation's PSK is the first of `psks`; a and b say which others they list."""
    name_of_network = ",".join(network)
    psk = psks[0]
    yield f"case {name}"
    yield f"psk {psk.hex()}"
    yield f"network {' '.join(network)}"
    yield f"network_name {name_of_network}"
    yield f"psk_prk {psk_prk(psk).hex()}"
    yield f"kid {kid(psk, name_of_network).hex()}"
    sides = {"a": a, "b": b}
    for side, node in sides.items():
        key = X25519PrivateKey.from_private_bytes(node["secret"])
        node["key"] = key
        node["network"] = network
        node["public"] = key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        node["kids"] = [kid(psks[i], name_of_network) for i in node["holds"]]
        node["statement"] = encode(node)
        node["digest"] = hashlib.sha256(node["statement"]).digest()
        for field in ["secret", "public"]:
            yield f"{side}.{field} {node[field].hex()}"
        for field in ["subnets", "addresses"]:
            yield f"{side}.{field} {' '.join(node[field])}"
        for field in ["node", "cipher", "mode", "port", "epoch", "slot"]:
            yield f"{side}.{field} {node[field]}"
        yield f"{side}.kids {' '.join(k.hex() for k in node['kids'])}"
        yield f"{side}.statement {node['statement'].hex()}"
        yield f"{side}.digest {node['digest'].hex()}"
        yield f"{side}.tag {tag(psk, name_of_network, node['statement']).hex()}"
    secret = a["key"].exchange(X25519PublicKey.from_public_bytes(b["public"]))
    assert secret == b["key"].exchange(X25519PublicKey.from_public_bytes(a["public"]))
    assert dh in (None, secret), "RFC 7748 says otherwise"
    pair_prk = hmac_sha256(psk_prk(psk), secret)
    yield f"dh {secret.hex()}"
    yield f"pair_prk {pair_prk.hex()}"
    keys = []
    for way, sender, receiver in [("ab", a, b), ("ba", b, a)]:
        number = spi(sender["slot"], sender["epoch"], receiver["epoch"])
        ends = sender["digest"], receiver["digest"]
        # Over plain ESP, and over UDP.
        for twin, number in [("", number), ("udp.", number + 2**31)]:
            yield f"{way}.{twin}spi 0x{number:08x}"
            for cipher, (wire_id, length) in CIPHERS.items():
                key = expand(pair_prk, length + 4, b"esp", bytes([wire_id]), *ends, struct.pack(">I", number))
                yield f"{way}.{twin}{cipher} {key.hex()}"
        probe_key = expand(pair_prk, 32, b"probe", *ends)
        yield f"{way}.probe_key {probe_key.hex()}"
        for i, message in enumerate([b"", b"ringmail probe", bytes(range(200))]):
            yield f"{way}.probe.{i} {message.hex() or '-'} {hmac_sha256(probe_key, message)[:16].hex()}"
        keys.append(probe_key)
    # Never output, only looked for in memory that should have been wiped.
    keys += [psk_prk(psk), pair_prk, auth_key(psk, name_of_network)]
    yield f"auth_key {auth_key(psk, name_of_network).hex()}"
    yield f"states {' '.join(state.hex() for key in keys for state in inner_states(key))}"


def node(name, secret, subnets, addresses, cipher, mode, port, epoch, slot, holds):
    return {"node": name, "secret": secret, "subnets": subnets, "addresses": addresses, "cipher": cipher, "mode": mode,
            "port": port, "epoch": epoch, "slot": slot, "holds": holds}


def cases():
    # The key pairs and the shared secret of RFC 7748 section 6.1.
    alice = bytes.fromhex("77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a")
    bob = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
    yield from case(
        "rfc7748", [seed("psk")], ["10.244.0.0/16"],
        node("alice", alice, ["10.244.1.0/24"], ["192.0.2.1"], "aes128gcm16", "esp", 4500, 1_800_000_000, 1, [0]),
        node("bob", bob, ["10.244.2.0/24"], ["192.0.2.2"], "aes128gcm16", "esp", 4500, 1_800_000_007, 2, [0]),
        bytes.fromhex("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742"))
    # During a change of PSK and of cipher, with two families; the PSK is longer than a block of SHA-256.
    old, new, other = seed("old") * 4, seed("new"), seed("other")
    yield from case(
        "dual stack", [old, new, other], ["10.0.0.0/8", "fd00:244::/48"],
        node("node-1.example", seed("c"), ["10.3.0.0/20", "fd00:244:0:3::/64"], ["198.51.100.7", "2001:db8::7"],
             "aes256gcm16", "auto", 4500, 1_799_999_999, 48, [1, 0]),
        node("Node_2", seed("d"), ["10.255.240.0/20", "fd00:244:0:ffff::/64"], ["2001:db8::8"],
             "chacha20poly1305", "udp", 65535, 1_800_000_063, 4095, [0, 2]))
    # The ends of every range, and a PSK that is text.
    yield from case(
        "extremes", [b"correct horse battery staple, and more"], ["0.0.0.0/0", "::/0"],
        node("~" * 253, seed("e"), ["255.255.255.255/32"] + [f"2001:db8::{i}/128" for i in range(7)],
             [f"10.0.0.{i}" for i in range(8)], "chacha20poly1305", "esp", 0, 0, 0, [0]),
        node("!", seed("f"), ["::/1"], ["::ffff:192.0.2.1"], "aes256gcm16", "udp", 1, 2**64 - 1, 2**19 - 3, [0] * 64))


HEAD = f"""\
# Written by vectors.py with Python's cryptography {cryptography.__version__}; see there. A line is a name and its values.
# a and b are two nodes; ab is what a sends to b. A probe is a message (- if empty) and its tag.
"""
text = HEAD + "\n".join(cases()) + "\n"
if sys.argv[1:] == ["--check"]:
    lines = FILE.read_text().splitlines()
    sys.exit(lines[2:] != text.splitlines()[2:] and f"{FILE.name} is not what vectors.py writes")
FILE.write_text(text)
