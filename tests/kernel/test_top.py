"""`ringmail top` in a terminal of tmux's, `ringmail status --watch` beside it, and how little is logged in an outage."""

import json
import os
import re
import signal
import subprocess
import time

import pytest

from rig import eventually, program

PROMPT = "prompt> "
OUTAGE = 61
# A foreground colour, of 8 or of 256; 39 is none.
COLOUR = r"\x1b\[(?:[0-9;]*;)?3(?:[0-7]|8;5;[0-9]+)m"


class Terminal:
    """A shell in tmux. `name`: of tmux's socket."""

    def __init__(self, name, columns, rows):
        self.name = name
        shell = ["env", f"PS1={PROMPT}", "LC_ALL=C.UTF-8", "/bin/sh"]
        self.tmux("-f", "/dev/null", "-u", "new-session", "-d", "-x", columns, "-y", rows, *shell)
        eventually("the shell's prompt", lambda: PROMPT.strip() in self.text())

    def tmux(self, *arguments):
        command = ["tmux", "-L", self.name, *map(str, arguments)]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def press(self, *keys):
        self.tmux("send-keys", *keys)

    def type(self, text):
        self.tmux("send-keys", "-l", text)

    def text(self, *options):
        return self.tmux("capture-pane", "-p", *options)

    def shows(self, pattern, timeout=20):
        """Waits for what matches, and gives the whole screen."""
        return eventually(f"{pattern} in {self.name}", lambda: re.search(pattern, screen := self.text(), re.M) and screen, timeout)

    def rows(self):
        """The list's rows, each as its words."""
        lines = self.text().splitlines()
        title = next(n for n, line in enumerate(lines) if line.startswith("PEER"))
        titles = re.sub(r"(IN|OUT|RTT) ", r"\1_", lines[title]).split()
        return [dict(zip(titles, line.split())) for line in lines[title + 1 : -1] if line]

    def names(self):
        return [row["PEER"] for row in self.rows()]

    def state(self):
        """Alternate screen, cursor: 0 1 for a shell."""
        return self.tmux("display", "-p", "#{alternate_on} #{cursor_flag}").strip()

    def restored(self, before):
        """The shell is back, with what it showed `before`, its cursor and its echo."""
        eventually("the shell's screen", lambda: self.state() == "0 1")
        self.shows(re.escape(before))
        stamp = str(time.monotonic_ns())
        self.type(f"echo {stamp[:4]}'-'{stamp[4:]}")
        self.press("Enter")
        screen = self.shows(rf"^{stamp[:4]}-{stamp[4:]}$")
        assert f"echo {stamp[:4]}'-'" in screen, "what is typed is to be seen again"

    def program(self):
        """The process that the shell waits for."""
        shell = self.tmux("display", "-p", "#{pane_pid}").strip()
        return int(subprocess.run(["pgrep", "-P", shell], capture_output=True, text=True, check=True).stdout)

    def close(self):
        self.tmux("kill-server")


class Watch:
    """`ringmail status --watch` with its output in a file."""

    def __init__(self, node, path, *flags):
        command = [program(), "status", "--run-dir", str(node.run_dir), "--watch=0.3", *flags]
        self.path = path
        with path.open("w") as out:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)

    def lines(self):
        """The whole lines so far."""
        return self.path.read_text().split("\n")[:-1]

    def end(self):
        self.process.terminate()
        assert self.process.wait(10) == -15


@pytest.fixture
def terminal():
    terminal = Terminal(f"ringmail-top-{os.getpid()}", 80, 24)
    yield terminal
    terminal.close()


def test_top_and_watch_follow_a_mesh_through_restarts_and_an_outage_of_the_store(make_lab, terminal, tmp_path):
    lab = make_lab(3)
    lab.configure()
    one, two, three = lab.nodes
    for node in lab.nodes:
        node.start(*lab.flags, env={"RINGMAIL_LOG_FORMAT": "json"})
    lab.meshed()
    lab.pods()
    top = f"{program()} top --interval 300ms --run-dir {one.run_dir}"

    def run(command):
        terminal.type(command)
        terminal.press("Enter")

    # The store is gone for a minute, and all but the last part goes on meanwhile.
    began, before = time.monotonic(), {node: len(node.log().splitlines()) for node in lab.nodes}
    os.rename(lab.lease_dir, f"{lab.lease_dir}.gone")

    # Peers, and rates while traffic flows.
    terminal.type("echo seen before; ")
    run(top)
    screen = terminal.shows(rf"^{two} +up .*\n{three} +up ")
    terminal.shows(r"^health  plaintext 0, 1 problem \(p\): .*store")
    assert all(len(line) <= 80 for line in screen.splitlines()) and f"node    {one}, ipsec" in screen, screen
    assert terminal.state() == "1 0"
    with lab.flow(2, 1, rate=300):
        eventually("a rate", lambda: 100 < float(terminal.rows()[0]["IN_p/s"]) < 900, 20, 0.3)
        row = terminal.rows()[0]
        assert row["PEER"] == str(two) and row["IN_B/s"].endswith("K") and row["OUT_B/s"] != "-", row
        assert terminal.rows()[1]["IN_p/s"] in "0123456789", "nothing but probes comes from there"
        terminal.press("i")
        terminal.shows("^shown +all, by bytes in, most first$")
        assert terminal.names() == [str(two), str(three)]
        terminal.press("i")
        eventually("the other way around", lambda: terminal.names() == [str(three), str(two)])
        print(terminal.text())
    # By name, by text, one peer.
    terminal.press("n", "n")
    terminal.shows("^shown +all, by name, from the end$")
    assert terminal.names() == [str(three), str(two)]
    terminal.type(f"/{two}")
    terminal.shows(rf"^/{two}    Enter keeps")
    terminal.press("Enter")
    assert terminal.names() == [str(two)]
    terminal.press("Enter")
    screen = terminal.shows(r"^generation  \d+>\d+$")
    peer = next(peer for peer in one.status()["peers"] if peer["node"] == str(two))
    assert f"SPI         out {peer['spi_out']}" in screen and f"address     {two.address()}\n" in screen, screen
    print(screen)
    terminal.press("q", "Escape")
    eventually("all again", lambda: len(terminal.names()) == 2)
    # A small terminal, and a large one.
    terminal.tmux("resize-window", "-x", 40, "-y", 10)
    screen = terminal.shows(r"^PEER +STATE +IN B/s OUT B/s RTT ms$")
    assert all(len(line) <= 40 for line in screen.splitlines()), screen
    terminal.tmux("resize-window", "-x", 130, "-y", 24)
    terminal.shows(r"GENERATION +CARR. ERRORS")
    terminal.tmux("resize-window", "-x", 80, "-y", 24)
    terminal.shows("ERRORS$")

    # It ends in each way, and gives the shell back.
    terminal.press("q")
    terminal.restored("seen before")
    run(f"NO_COLOR=1 {top}")
    terminal.shows(rf"^{two} +up ")
    assert not re.search(COLOUR, terminal.text("-e")), "no colours are wanted"
    terminal.press("C-c")
    terminal.restored("seen before")
    for end in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        run(top)
        terminal.shows(rf"^{two} +up ")
        assert re.search(COLOUR + r"up\b", terminal.text("-e")), "states have colours"
        os.kill(terminal.program(), end)
        terminal.restored("seen before")
    outside = subprocess.run([program(), "top", "--run-dir", str(one.run_dir)], capture_output=True, text=True, check=False)
    assert outside.returncode == 64 and "status --watch" in outside.stderr, outside
    time.sleep(max(0.0, began + OUTAGE - time.monotonic()))
    os.rename(f"{lab.lease_dir}.gone", lab.lease_dir)
    # What was said of it is bounded, and said in JSON.

    def told(node):
        lines = [json.loads(line) for line in node.log().splitlines()[before[node] :]]
        return [line for line in lines if line["level"] in ("WARN", "ERROR") or "again" in line["message"]]

    for node in lab.nodes:
        lines = eventually("the end is said", lambda: (lines := told(node)) and "again" in lines[-1]["message"] and lines, 30)  # noqa: B023
        assert len(lines) <= 6, lines
        again = [line for line in lines if line["message"].startswith("can read the lease store again")]
        assert len(again) == 1 and again[0]["times"] > 5 and again[0]["seconds"] >= OUTAGE - 5, lines
        print(*lines, sep="\n")

    # A daemon that goes and comes back, seen by both.
    run(top)
    terminal.shows(rf"^{two} +up ")
    plain, documents = Watch(one, tmp_path / "plain"), Watch(one, tmp_path / "json", "--json")
    eventually("two documents", lambda: len(documents.lines()) >= 2)
    one.stop()
    terminal.shows("^AWAY +seen .* ago: no daemon answers at ")
    eventually("an error", lambda: "error" in json.loads(documents.lines()[-1]))
    one.start(*lab.flags, env={"RINGMAIL_LOG_FORMAT": "json"})
    lab.meshed(timeout=60)
    eventually("it is back", lambda: "AWAY" not in terminal.text(), 20)
    assert len(terminal.names()) == 2
    eventually("a report", lambda: json.loads(documents.lines()[-1])["node"] == str(one))
    plain.end()
    documents.end()
    assert all(json.loads(line).keys() & {"node", "error"} for line in documents.lines())
    sections = plain.path.read_text().split("--- ")[1:]
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ\n\S.*\n", section) for section in sections), sections
    assert len(sections) > 3 and any("no daemon answers" in section for section in sections)
