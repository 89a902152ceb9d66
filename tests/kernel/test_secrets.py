"""Neither a PSK nor the key of an SA shows anywhere but in the PSK's file and in the kernel."""

import os
import pathlib
import re
import subprocess
import time

import pytest

from rig import eventually, program
from running import PSK, Running, spellings

CANARY = "this-is-for-the-daemon-alone"
NOBODY = 65534


@pytest.fixture(scope="module")
def mesh(keywatch, tmp_path_factory):
    """Two nodes that log all there is to log, and whose iptables notes what it was given. Node 2 has the PSK in net-conf.json."""
    mesh = Running(f"t{os.getpid() % 100000}-secrets", 2, keywatch)
    mesh.notes = mesh.folder / "children"
    mesh.notes.touch()
    wrappers = mesh.folder / "bin"
    wrappers.mkdir()
    for family in ("iptables", "ip6tables"):
        for variant in ("", "-legacy", "-nft"):
            for what in ("save", "restore"):
                real = f"/usr/sbin/{family}{variant}-{what}"
                if os.path.exists(real):
                    wrapper = wrappers / os.path.basename(real)
                    wrapper.write_text(
                        f'#!/bin/sh\n(echo "$0 $*"; cat /proc/$$/environ; echo) >>{mesh.notes}\nexec {real} "$@"\n'
                    )
                    wrapper.chmod(0o755)
    environment = {"RINGMAIL_LOG": "trace", "PATH": f"{wrappers}:{os.environ['PATH']}", "RINGMAIL_CANARY": CANARY}
    try:
        mesh.start(env=environment)
        mesh.in_order()
        yield mesh
    finally:
        mesh.down()


def keys(mesh):
    """The keys of all SAs, salt included, as bytes."""
    found = set()
    for node in mesh.lab.nodes:
        for key in re.findall(r"aead \S+ 0x([0-9a-f]+) 128", node.run("ip xfrm state")):
            found |= {bytes.fromhex(key), bytes.fromhex(key[:-8])}
    assert len(found) >= 4, "each way has a key"
    return found


def assert_hidden(secrets, **texts):
    assert secrets
    for where, text in texts.items():
        text = text if isinstance(text, bytes) else text.encode()
        for secret in secrets:
            assert not any(spelling in text for spelling in spellings(secret)), f"a secret shows in {where}"


def test_no_secret_in_logs_outputs_and_environments(mesh):
    secrets = {PSK.encode()} | keys(mesh)
    outputs = {}
    for node in mesh.lab.nodes:
        for verb in ("status", "audit", "leases", "rotate"):
            for json in ([], ["--json"]):
                done = node.ringmail(verb, *json, check=False)
                assert done.stdout and not done.stderr, done
                outputs[f"{verb} {json} of {node}"] = done.stdout + done.stderr
        for json in ([], ["--json"]):
            flags = ["--lease-dir", str(mesh.lease_dir), "--psk-file", str(mesh.psk_file)]
            done = node.run([program(), "config", "check", *json, *flags], check=False)
            assert done.stdout, done
            outputs[f"config check {json} of {node}"] = done.stdout + done.stderr
    mesh.in_order()
    secrets |= keys(mesh)
    for node in mesh.lab.nodes:
        log = node.log()
        assert " TRACE " in log or " DEBUG " in log, "all is logged"
        assert "a new epoch begins" in log
        outputs[f"log of {node}"] = log
        for name in ("environ", "cmdline", "status"):
            outputs[f"{name} of {node}"] = pathlib.Path(f"/proc/{node.pid}/{name}").read_bytes()
        for file in node.run_dir.iterdir():
            if file.is_file():
                outputs[f"{file}"] = file.read_bytes()
    for lease in mesh.lease_dir.iterdir():
        outputs[f"{lease}"] = lease.read_bytes()
    outputs["children"] = mesh.notes.read_bytes()
    assert_hidden(secrets, **outputs)


def test_children_get_nothing_of_the_daemons_environment(mesh):
    assert CANARY.encode() in pathlib.Path(f"/proc/{mesh.lab.node(1).pid}/environ").read_bytes()
    notes = mesh.notes.read_bytes()
    assert notes.count(b"-restore --noflush") >= 2, notes[:500]
    assert CANARY.encode() not in notes and b"RINGMAIL_LOG" not in notes and b"NODE" not in notes


def test_the_daemon_leaves_no_core(mesh):
    for node in mesh.lab.nodes:
        limits = pathlib.Path(f"/proc/{node.pid}/limits").read_text()
        assert re.search(r"Max core file size +0 +0 ", limits), limits


def test_no_process_of_ringmail_can_be_looked_into_by_its_own_user(tmp_path):
    """The kernel gives what belongs to a process that is not dumpable to root; the daemon gives that up in its first
    line, as every verb does, and a verb that can't print stands still long enough to look."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        while os.write(writer, bytes(4096)):
            pass
    except BlockingIOError:
        os.set_blocking(writer, True)
    user = [
        "setpriv",
        f"--reuid={NOBODY}",
        f"--regid={NOBODY}",
        "--clear-groups",
        "--inh-caps=-all",
        "--bounding-set=-all",
    ]
    copy = tmp_path / "ringmail"
    subprocess.run(["install", "-m", "755", program(), copy], check=True)
    for folder in [tmp_path, *tmp_path.parents]:
        if str(folder).startswith("/tmp/"):
            folder.chmod(0o755)
    other = subprocess.Popen([*user, "sleep", "60"])
    ours = subprocess.Popen([*user, copy, "keygen"], stdout=writer)
    try:
        waits = lambda: pathlib.Path(f"/proc/{ours.pid}/wchan").read_text() and pathlib.Path(
            f"/proc/{ours.pid}/cmdline"
        ).read_bytes().startswith(
            bytes(copy)
        )  # noqa: E731
        eventually("keygen waits for its pipe", waits, 5)
        time.sleep(0.5)
        look = lambda pid, name: subprocess.run(
            [*user, "cat", f"/proc/{pid}/{name}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )  # noqa: E731
        assert look(other.pid, "environ").returncode == 0, "the user can look into another process of his"
        for name in ("environ", "maps", "auxv"):
            refused = look(ours.pid, name)
            assert refused.returncode != 0 and b"Permission denied" in refused.stderr, (name, refused)
        assert (
            os.stat(f"/proc/{ours.pid}/environ").st_uid == 0 and os.stat(f"/proc/{other.pid}/environ").st_uid == NOBODY
        )
    finally:
        for process in (other, ours):
            process.kill()
            process.wait()
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize(
    "text",
    [
        '{"Network": "10.244.0.0/16", "Backend": {"Type": "ipsec", "PSK": "%s", "UDPEncap": "maybe"}}',
        '{"Network": "10.244.0.0/16", "Backend": {"Type": "ipsec", "PSK": "%s"',
        '{"Network": "10.244.0.0/16", "Backend": {"Type": "ipsec", "PSK": "%s" "X"}}',
        '{"Network": "10.244.0.0/16", "Backend": {"PSKK": "%s"}}',
        '{"Network": "10.244.0.0/16", "Backend": {"Type": "ipsec", "PSK": ["%s"]}}',
        '{"Network": "10.244.0.0/16", "Backend": "%s"}',
    ],
)
def test_an_error_in_a_configuration_with_a_psk_does_not_show_it(tmp_path, text):
    (tmp_path / "net-conf.json").write_text(text % PSK)
    for json in ([], ["--json"]):
        done = subprocess.run(
            [program(), "config", "check", *json, "--lease-dir", tmp_path],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert done.returncode == 78 or (done.returncode == 0 and b"PSKK" in text.encode()), done
        assert_hidden({PSK.encode()}, outcome=done.stdout + done.stderr)


def test_an_error_about_a_psk_file_does_not_show_what_is_in_it(tmp_path):
    (tmp_path / "net-conf.json").write_text('{"Network": "10.244.0.0/16"}')
    (tmp_path / "psk").write_text("too-short-but-secret")
    done = subprocess.run(
        [program(), "run", "--lease-dir", tmp_path, "--psk-file", tmp_path / "psk", "--run-dir", tmp_path / "run"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert done.returncode == 78 and b"20 bytes; at least 32 are needed" in done.stderr, done
    assert_hidden({b"too-short-but-secret"}, outcome=done.stdout + done.stderr)
