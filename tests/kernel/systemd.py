"""A systemd of our own, as a user's manager of root in this kernel: the real one, with the real protocol.

    manager = Systemd(folder)
    manager.unit("ringmail-1", deploy / "ringmail.service", "[Service]", "NetworkNamespacePath=/run/netns/x", …)
    manager.call("restart", "ringmail-1")
    manager.show("ringmail-1", "NFileDescriptorStore")"""

import os
import pathlib
import shutil
import subprocess

from rig import eventually

CGROUPS = pathlib.Path("/sys/fs/cgroup")
BOOTED = pathlib.Path("/run/systemd/system")  # there is no user's manager without it (sd_booted(3))


class Systemd:
    """folder: for its units and its socket; a short path."""

    def __init__(self, folder):
        self.runtime, self.units = pathlib.Path(folder, "runtime"), pathlib.Path(folder, "units")
        self.log_path = pathlib.Path(folder, "systemd.log")
        self.runtime.mkdir(parents=True)
        self.units.mkdir()
        (self.units / "basic.target").write_text("[Unit]\nDescription=Nothing\n")
        self._mounted = not (CGROUPS / "cgroup.controllers").exists()
        if self._mounted:
            subprocess.run(["mount", "-t", "cgroup2", "cgroup2", CGROUPS], check=True)
        self._booted = BOOTED.exists()
        BOOTED.mkdir(parents=True, exist_ok=True)
        self._environment = {
            **os.environ,
            "XDG_RUNTIME_DIR": str(self.runtime),
            "HOME": str(folder),
            "SYSTEMD_UNIT_PATH": str(self.units),
            "SYSTEMD_LOG_TARGET": "console",
        }
        with open(self.log_path, "wb") as log:
            self._process = subprocess.Popen(
                [shutil.which("systemd", path="/usr/bin:/usr/lib/systemd:/lib/systemd"), "--user", "--unit=basic.target"],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        eventually("systemd answers", lambda: self.call("is-active", "basic.target"), 30)

    def call(self, verb, *arguments):
        """systemctl; its output."""
        command = ["systemctl", "--user", verb, *arguments]
        done = subprocess.run(
            command, env=self._environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60
        )
        if done.returncode != 0:
            raise AssertionError(f"{command}: {done.stdout}\n{self.log()}")
        return done.stdout

    def unit(self, name, source, *changes):
        """A unit as `source` says, with lines that change it."""
        shutil.copy(source, self.units / f"{name}.service")
        folder = self.units / f"{name}.service.d"
        folder.mkdir()
        (folder / "test.conf").write_text("\n".join(changes) + "\n")
        self.call("daemon-reload")

    def show(self, name, *properties):
        """A unit's properties: a dict."""
        lines = self.call("show", name, *(f"--property={one}" for one in properties)).splitlines()
        return dict(line.split("=", 1) for line in lines)

    def log(self):
        return self.log_path.read_text(errors="replace")[-3000:]

    def close(self):
        for unit in self.units.glob("*.service"):
            self.call("stop", unit.name)
        self._process.kill()
        self._process.wait(30)
        if not self._booted:
            BOOTED.rmdir()
        if self._mounted:
            subprocess.run(["umount", "-l", CGROUPS], check=False)
