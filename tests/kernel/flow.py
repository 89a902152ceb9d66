"""A stream of numbered UDP packets between two pods, and which of them were lost, when.

    with Flow(source, destination, rate=500) as flow:
        ...                                   # what must not lose a packet
    assert not flow.result.lost, flow.result

The two ends are processes (this file, run), so that they keep their pace whatever the test does. All times are
CLOCK_MONOTONIC seconds, comparable with time.monotonic() in the test: the namespaces share one kernel."""

import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time

MARKER = b"ringmail-leaked!"
HEADER = struct.Struct("!16s16sQd")
PORT = 7700


class Lost:
    """A packet that was sent (or refused by the sender's kernel: `reason` is then its error) and never received."""

    def __init__(self, number, at, reason):
        self.number, self.at, self.reason = number, at, reason

    def __repr__(self):
        return f"#{self.number} at {self.at:.3f} s ({self.reason})"


class Result:
    """sent, received: counts. lost: [Lost]. duplicated, reordered: counts. gap: the longest time between two arrivals, in
    seconds. delay: the longest way of a packet, in seconds. begun: when the first was sent."""

    def __init__(self, sent, arrived):
        received = arrived["numbers"]
        seen = set(received)
        refused = {number: error for number, error in sent["refused"]}
        self.sent, self.received = len(sent["times"]), len(seen)
        self.begun = sent["times"][0] if sent["times"] else None
        self.lost = [
            Lost(number, at - self.begun, refused.get(number, "on the way"))
            for number, at in enumerate(sent["times"])
            if number not in seen
        ]
        self.duplicated = len(received) - len(seen)
        self.reordered = sum(1 for before, after in zip(received, received[1:]) if after < before)
        self.gap, self.delay = arrived["gap"], arrived["delay"]

    def __repr__(self):
        shown = ", ".join(repr(one) for one in self.lost[:10]) + (" …" if len(self.lost) > 10 else "")
        return (
            f"{self.sent} sent, {self.received} received, {len(self.lost)} lost, {self.duplicated} twice, "
            f"{self.reordered} out of order, longest gap {self.gap * 1000:.0f} ms, "
            f"longest delay {self.delay * 1000:.0f} ms{': ' + shown if self.lost else ''}"
        )


class Flow:
    """source, destination: anything with `namespace` and `address(family)`. rate: packets a second; size: of the UDP
    payload, 48 or more. `warm_up`: waits until the first packet has arrived before the `with` body runs (and forgets what
    was sent before it)."""

    def __init__(self, source, destination, rate=500, size=100, family=4, port=PORT, warm_up=True):
        self.source, self.destination, self.family = source, destination, family
        self.rate, self.size, self.port, self.warm_up = rate, size, port, warm_up
        self.result, self._patience = None, 30

    def __enter__(self):
        self._id = os.urandom(8).hex()
        address = self.destination.address(self.family)
        self._receiver = self._start(self.destination, "receive", address)
        assert self._receiver.stdout.readline() == b"ready\n", f"the receiving end in {self.destination} did not start"
        self._sender = self._start(self.source, "send", address)
        if self.warm_up and not select.select([self._receiver.stdout], [], [], self._patience)[0]:
            self._end()
            raise AssertionError(f"no packet came from {self.source} to {self.destination} in {self._patience} s")
        if self.warm_up:
            self._receiver.stdout.readline()
            self._sender.send_signal(signal.SIGUSR1)
        return self

    def __exit__(self, kind, *_):
        self._end()
        if kind is None and self.result is None:
            raise AssertionError(f"an end of the flow {self.source} > {self.destination} has died")

    def _start(self, end, role, address):
        import netns

        command = [sys.executable, "-I", "-S", __file__, role, address, str(self.port), self._id]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE}
        return netns.spawn(end.namespace, command + [str(self.rate), str(self.size)], **pipes)

    def _end(self):
        self._sender.send_signal(signal.SIGTERM)
        sent = self._sender.communicate(timeout=30)[0]
        time.sleep(0.5)
        self._receiver.send_signal(signal.SIGTERM)
        arrived = self._receiver.communicate(timeout=30)[0]
        arrived = arrived.removeprefix(b"first\n")
        if sent and arrived:
            sent, arrived = json.loads(sent), json.loads(arrived)
            arrived["numbers"] = [number - sent["from"] for number in arrived["numbers"] if number >= sent["from"]]
            self.result = Result(sent, arrived)


def send(address, port, identity, rate, size):
    """Sends until SIGTERM; SIGUSR1 makes the next packet the first that counts. Falls behind? Then it catches up.

    As few system calls a packet as can be, here and in `receive`: User Mode Linux has one processor and slow ones."""
    sender = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    over, start = [], [0]
    signal.signal(signal.SIGTERM, lambda *_: over.append(True))
    signal.signal(signal.SIGUSR1, lambda *_: start.__setitem__(0, len(times)))
    times, refused, begun = [], [], time.monotonic()
    while not over:
        now = time.monotonic()
        due = int((now - begun) * rate) + 1
        for number in range(len(times), due):
            times.append(now)
            try:
                sender.sendto(HEADER.pack(MARKER, identity, number, now).ljust(size, b"."), (address, port))
            except OSError as error:
                refused.append((number, error.strerror))
        time.sleep(max(0, begun + due / rate - now))
    first = start[0]
    refused = [(number - first, error) for number, error in refused if number >= first]
    print(json.dumps({"from": first, "times": times[first:], "refused": refused}))


def receive(address, port, identity):
    """Takes packets in until SIGTERM; prints "ready", "first" at the first packet, and at the end what came, in order."""
    receiver = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    receiver.setsockopt(socket.SOL_SOCKET, 33, 16 << 20)  # SO_RCVBUFFORCE
    receiver.bind((address, port))
    receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", 0, 200_000))
    over = []
    signal.signal(signal.SIGTERM, lambda *_: over.append(True))
    print("ready", flush=True)
    numbers, last, gap, delay = [], None, 0.0, 0.0
    while True:
        try:
            packet = receiver.recv(65536)
        except BlockingIOError:  # none for 0.2 s
            if over:
                break
            continue
        _, whose, number, at = HEADER.unpack_from(packet)
        if whose != identity:
            continue
        now = time.monotonic()
        if last is None:
            print("first", flush=True)
        else:
            gap = max(gap, now - last)
        last, delay = now, max(delay, now - at)
        numbers.append(number)
    print(json.dumps({"numbers": numbers, "gap": gap, "delay": delay}))


if __name__ == "__main__":
    role, address, port, identity, rate, size = sys.argv[1:]
    if role == "send":
        send(address, int(port), identity.encode(), float(rate), max(int(size), HEADER.size))
    else:
        receive(address, int(port), identity.encode())
