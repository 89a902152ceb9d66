"""The CNI plugin's own share of an ADD: with a delegate that does nothing, less what that takes when it is called alone.

`CNI_FLANNEL=/path` is flannel's own plugin (github.com/flannel-io/cni-plugin, `go build`), which is no part of this
repository; it takes turns with ours on the same files. Without it the row is a plain figure."""

import json
import os
import pathlib
import subprocess
import tempfile
import time

from measure import Row, interleaved, median, ratio, shown, spread

DELEGATE = """
#include <unistd.h>
int main(void) {
    static char text[65536];
    static const char result[] = "{\\"cniVersion\\": \\"1.0.0\\", \\"ips\\": []}\\n";
    while (read(0, text, sizeof text) > 0)
        ;
    return write(1, result, sizeof result - 1) < 0;
}
"""
SUBNET_ENV = "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"


class Calls:
    """A node's files, and what an ADD takes there."""

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        (self.folder / "bin").mkdir()
        (self.folder / "delegate.c").write_text(DELEGATE)
        self.delegate = self.folder / "bin" / "bridge"
        subprocess.run(["cc", "-O2", "-static", "-o", self.delegate, self.folder / "delegate.c"], check=True)
        (self.folder / "subnet.env").write_text(SUBNET_ENV)
        conf = {"name": "cbr0", "cniVersion": "1.0.0", "type": "flannel", "delegate": {"hairpinMode": True, "isDefaultGateway": True}}
        conf |= {"subnetFile": f"{folder}/subnet.env", "dataDir": f"{folder}/data"}
        (self.folder / "conf").write_text(json.dumps(conf))
        variables = {"CNI_COMMAND": "ADD", "CNI_IFNAME": "eth0", "CNI_NETNS": "/nonexistent", "CNI_PATH": f"{folder}/bin"}
        self.environment = {"PATH": os.environ["PATH"], **variables}
        self.number = 0

    def time(self, program):
        """Milliseconds from the start of a program to its end; each time another container."""
        self.number += 1
        conf, out = self.folder / "conf", self.folder / "out"
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, conf, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600),
            (os.POSIX_SPAWN_OPEN, 2, "/dev/null", os.O_WRONLY, 0),
        ]
        environment = {**self.environment, "CNI_CONTAINERID": f"c{self.number}"}
        began = time.perf_counter()
        pid = os.posix_spawn(program, [program], environment, file_actions=actions)
        _, status = os.waitpid(pid, 0)
        took = (time.perf_counter() - began) * 1000
        assert status == 0 and '"1.0.0"' in out.read_text(), (program, status, out.read_text())
        return took

    def quickest(self, program):
        """That of ten calls: so short a thing is otherwise made of what else the machine does."""
        return min(self.time(program) for _ in range(10))


def cni(programs, quick):
    """Our plugin's share of an ADD, against flannel's where it is given."""
    flannel = os.environ.get("CNI_FLANNEL")
    with tempfile.TemporaryDirectory() as folder:
        calls = Calls(folder)
        sides = [str(calls.delegate), programs.plugin, *([flannel] if flannel else [])]
        timed = [lambda program=program: calls.quickest(program) for program in sides]
        interleaved(1, *timed)
        alone, *plugins = interleaved(5 if quick else 40, *timed)
        shares = [[one - less for one, less in zip(whole, alone, strict=True)] for whole in plugins]
        size = os.path.getsize(programs.plugin) / 1024
        what = f"CNI ADD, the plugin's own share ({size:,.0f} KiB)"
        if flannel:
            against = f"flannel's plugin, {os.path.getsize(flannel) / 1024:,.0f} KiB"
            return [ratio(what, "ms", shares[0], shares[1], against, ("at most", 0.3))]
        return [Row(what, f"{shown(median(shares[0]))} ms", "", median(shares[0]), "ms", spread(shares[0]))]
