"""README's table "Rotation, restarts, faults": a mesh under load, and the rows that tell what was lost."""

import json
import os
import re
import signal
import socket
import subprocess
import threading

import netns
from rig import eventually, program
from running import Running, measures

PROTOCOL = 1  # of the control socket (src/admin.rs)


class Table(Running):
    """A mesh whose daemons are started and asked without a process more than needed: with the load beside it, each costs."""

    def start(self, *numbers):
        for number in numbers or range(1, self.lab.count + 1):
            node = self.lab.node(number)
            command = [program(), "run", *self.arguments(number)]
            with open(node.directory / "daemon.log", "ab") as log:
                files = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
                daemon = netns.spawn(node.namespace, command, start_new_session=True, **files)
            (node.directory / "daemon.pid").write_text(str(daemon.pid))
            threading.Thread(target=daemon.wait, daemon=True).start()

    def arguments(self, number):
        """What the daemon of a node is given."""
        node = self.lab.node(number)
        own = {"run-dir": node.run_dir, "subnet-file": node.directory / "subnet.env", "node-name": node, "iface": "eth0"}
        return [f"--{flag}={value}" for flag, value in own.items()] + self.flags

    def end(self, number, signal=signal.SIGKILL):
        """Ends a daemon and waits for its end."""
        node = self.lab.node(number)
        os.kill(node.pid, signal)
        eventually(f"{node} ends", lambda: node.pid is None, 10, 0.01)

    def ask(self, number, what):
        """What a daemon answers on its control socket (src/admin.rs)."""
        with socket.socket(socket.AF_UNIX) as asking:
            asking.settimeout(20)
            asking.connect(str(self.lab.node(number).run_dir / "control.sock"))
            asking.sendall(json.dumps({"protocol": PROTOCOL, "ask": what}).encode() + b"\n")
            reply = json.loads(asking.makefile("rb").read())
            assert reply.get("error") is None, reply
            return reply["answer"]

    def status(self, number):
        return self.ask(number, "status")

    def rotate(self, *numbers):
        """New epochs on nodes at the same time; waits until all data goes on them."""
        epochs = {number: self.ask(number, "rotate")["epoch"] for number in numbers}

        def moved():
            for number, epoch in epochs.items():
                for peer in self.status(number)["peers"]:
                    assert int(peer["generation"].split(">")[0]) >= epoch, peer
            return True

        eventually("all data has moved", moved, 20, 0.05)


def row(mesh, what, load, more=""):
    """Prints a row of README's table. Plaintext on the wire is a failure of its own (`watched`)."""
    mesh.lab.wire.settle()
    cells = [what, f"{load.sent:,}", load.lost, mesh.lab.wire.counts["plaintext"], f"{load.gap * 1000:.0f} ms", more]
    measures.append("| " + " | ".join(map(str, cells)) + " |")


def nothing_lost(load):
    """No packet, no byte of TCP, and nothing that a kernel dropped although it came in the end."""
    assert not load.lost and not load.broken and not load.behind, load
    dropped = {
        name: {what: count for what, count in counts.items() if not FORGIVEN.match(what)}
        for name, counts in load.counters.items()
    }
    assert not any(dropped.values()), dropped
    assert all(stream["twice"] == 0 for stream in load.streams), load


# TCP's own doubts: it sends again what takes long on one busy processor, and is told that it came twice. Probes of an
# epoch that the peer has not seen yet: they are sent at once, and again. And "port unreachable" about a probe, when neither
# the daemon it went to nor the one that sent it lives any more.
FORGIVEN = re.compile(r"Tcp RetransSegs|TcpExt TCPDSACKRecv|XfrmInNoStates|Icmp InErrors")
