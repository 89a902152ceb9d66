"""What a user gets wrong: a clear error that names the thing, the value and the remedy, an exit code, and a kernel as it
was before."""

import os
import pathlib
import subprocess

import pytest

import netns
from rig import Lab, eventually, program
from running import PSK

NETWORK = '{"Network": "10.244.0.0/16"}'


@pytest.fixture(scope="module")
def lab(keywatch):
    lab = Lab(f"t{os.getpid() % 100000}-input", 1, keywatch=keywatch)
    yield lab
    lab.down()


@pytest.fixture
def place(lab, request, tmp_path):
    """A node that has all a daemon needs; a test takes one thing away."""
    place = Place(lab.node(1), tmp_path)
    request.node.labs = [lab]
    yield place
    place.end()
    lab.wire.assert_clean()


class Place:
    def __init__(self, node, folder):
        self.node, self.folder = node, folder
        self.leases, self.psk, self.conf = folder / "leases", folder / "psk", folder / "leases" / "net-conf.json"
        self.leases.mkdir()
        self.psk.touch(mode=0o600)
        self.psk.write_text(PSK + "\n")
        self.conf.write_text(NETWORK)
        self.flags = {
            "--lease-dir": self.leases,
            "--psk-file": self.psk,
            "--run-dir": folder / "run",
            "--subnet-file": folder / "subnet.env",
            "--iface": "eth0",
            "--node-name": "tester",
        }
        self.daemons = []
        self.together = False

    def each(self, lines, attempt):
        """Makes each attempt, and looks at the kernel once for all: a look takes longer than they do."""
        before, wrong, self.together = kernel(self.node), [], True
        for line in lines:
            try:
                attempt(line)
            except AssertionError as error:
                wrong.append(f"{line[0]}: {error}")
        assert not wrong, "\n".join(wrong)
        assert kernel(self.node) == before

    def command(self, *more, wrap=(), **flags):
        """The command line of a daemon; a flag given as None is left out."""
        flags = self.flags | {f"--{name.replace('_', '-')}": value for name, value in flags.items()}
        return [
            *wrap,
            program(),
            "run",
            *(f"{name}={value}" for name, value in flags.items() if value is not None),
            *more,
        ]

    def start(self, *more, **options):
        """A daemon that lives: its log as a path."""
        log = self.folder / f"log{len(self.daemons)}"
        with open(log, "wb") as file:
            self.daemons.append(
                netns.spawn(self.node.namespace, self.command(*more, **options), stdout=file, stderr=file)
            )
        return log

    def ready(self):
        log = self.start()
        eventually("a daemon that is ready", lambda: "ready:" in log.read_text(), 20)

    def refused(self, code, *texts, arguments=(), timeout=20, env=None, left=(), **flags):
        """The daemon ends with this code and says these texts, and the kernel is as before."""
        before = None if self.together else kernel(self.node)
        done = netns.run(
            self.node.namespace,
            self.command(*arguments, **flags),
            check=False,
            timeout=timeout,
            env={**os.environ, **(env or {})},
        )
        said = done.stdout + done.stderr
        assert done.returncode == code, said
        for text in texts:
            assert text in said, f"{text!r} is not in {said!r}"
        assert "panicked" not in said
        assert self.together or kernel(self.node) == before, said
        assert not (self.folder / "subnet.env").exists()
        names = {path.name for path in self.leases.iterdir()} if self.leases.is_dir() else set()
        assert names <= {"net-conf.json", *left}, names
        return said

    def end(self):
        for daemon in self.daemons:
            daemon.kill()
            daemon.wait()
        if self.daemons:
            self.node.run([program(), "cleanup", "--run-dir", str(self.folder / "run")], check=False)


def kernel(node):
    """All that a daemon could have left half-made."""
    text = node.run(
        "ip xfrm state list nokeys; ip xfrm policy; ip route show table all; ip -o link; ip -o -4 address; nft list ruleset 2>/dev/null"
    )
    rules = node.run("for t in raw mangle nat filter; do iptables-legacy-save -t $t; done")
    rules = [line for line in rules.splitlines() if not line.startswith(("#", ":"))]
    # The uplink's own link-local address comes when the kernel likes.
    text = "\n".join(line for line in text.splitlines() if "fe80:" not in line)
    return text + "\n".join(rules) + node.run("cat /proc/sys/net/ipv4/ip_forward")


COMMAND_LINES = [
    (["--ifcae=eth0"], 64, ["--ifcae is unknown; did you mean --iface?"]),
    (["--mtu=9000"], 64, ["flag --mtu is unknown", "--help"]),
    (["eth0"], 64, ['argument "eth0" belongs to no flag']),
    (["--iface"], 64, ["flag --iface needs a value", "--iface="]),
    (["--ip-masq=perhaps"], 64, ['--ip-masq is "perhaps"', "true or false is needed"]),
    (["--public-ip=1.2.3"], 64, ['--public-ip is "1.2.3"', "IPv4"]),
    (["--iface-regex=(["], 64, ['--iface-regex is "(["']),
    (["--healthz-port=70000"], 64, ['--healthz-port is "70000"']),
    (["--node-name=a b"], 64, ['--node-name is "a b"', "1 to 253 printable"]),
    (["--kube-subnet-mgr"], 64, ["--kube-subnet-mgr and --lease-dir name two stores: leave one of them out"]),
]


def test_a_wrong_command_line_ends_with_64(place):
    place.each(COMMAND_LINES, lambda line: place.refused(line[1], *line[2], arguments=line[0]))


def test_a_wrong_variable_is_named_with_its_value(place):
    place.refused(64, "FLANNELD_IP_MASQ", '"perhaps"', env={"FLANNELD_IP_MASQ": "perhaps"})
    place.refused(64, "RINGMAIL_LOG", '"x=y=z"', env={"RINGMAIL_LOG": "x=y=z"})
    place.refused(64, '"x:2379" is no URL of etcd', arguments=["--etcd-endpoints=x:2379"], lease_dir=None)


CONFIGURATIONS = [
    ("{", ["net-conf.json:1:"]),
    ("", ["net-conf.json"]),
    ("[]", ["net-conf.json:1:"]),
    ('{"Network": 5}', ["net-conf.json:1:", "Network"]),
    ('{"Network": "10.244.0.0"}', ["net-conf.json:1:", "10.244.0.0"]),
    ("{}", ["please define a correct Network parameter", "10.244.0.0/16"]),
    ('{"Network": "10.244.0.0/29"}', ["10.244.0.0/29", "too small", "/28"]),
    ('{"Network": "10.244.0.0/16", "SubnetLen": 15}', ["SubnetLen", "15"]),
    (
        '{"Network": "10.244.0.0/16", "SubnetMin": "10.245.0.0"}',
        ["SubnetMin 10.245.0.0", "not in the range", "10.244.0.0/16"],
    ),
    ('{"Network": "10.244.0.0/16", "SubnetMax": "10.244.7.3"}', ["SubnetMax", "10.244.7.3", "boundary", "10.244.7.0"]),
    ('{"Network": "10.244.0.0/16", "SubnetMin": "10.244.9.0", "SubnetMax": "10.244.3.0"}', ["is above", "exchange"]),
    ('{"Network": "127.0.0.0/8"}', ["127.0.0.0/8", "choose another"]),
    ('{"Network": "192.168.0.0/16"}', ["192.168.0.0/16", "192.168.77.1"]),
    (
        '{"Network": "10.244.0.0/16", "Backend": {"Type": "vxlann"}}',
        ['unknown backend type: "vxlann"', 'did you mean "vxlan"?'],
    ),
    ('{"Network": "10.244.0.0/16", "Backend": {"Type": "wireguard"}}', ['backend type "wireguard" is not in this version']),
    ('{"Network": "10.244.0.0/16", "Backend": {"UDPEncap": 1}}', ["UDPEncap", "true, false"]),
    ('{"Network": "10.244.0.0/16", "Backend": {"EncapPort": 0}}', ["EncapPort", "a port from 1 to 65535 is needed"]),
    (
        '{"Network": "10.244.0.0/16", "Backend": {"ESPProposal": "aes128-sha1"}}',
        ["ESPProposal", "no authenticated encryption", "aes128gcm16"],
    ),
    ('{"Network": "10.244.0.0/16", "Backend": {"RekeyAfter": "1s"}}', ["RekeyAfter", "at least"]),
    ('{"Network": "10.244.0.0/16", "Backend": {"MTU": 100}}', ["MTU is 100", "576"]),
]


def test_a_wrong_configuration_ends_with_78(place):
    def configured(line):
        place.conf.write_text(line[0])
        place.refused(78, *line[1])

    place.each(CONFIGURATIONS, configured)


def test_no_configuration_at_all_is_named_with_both_places(place):
    place.conf.unlink()
    place.refused(78, str(place.conf), "/etc/kube-flannel/net-conf.json")


def test_a_psk_that_is_missing_short_or_unreadable_ends_with_78(place):
    place.refused(78, "nothing is sent unencrypted by default", "--psk-file", psk_file=None)
    place.refused(
        78, f"PSK file {place.folder}/nowhere does not exist", "ringmail keygen", psk_file=place.folder / "nowhere"
    )
    place.psk.write_text("x" * 31 + "\n")
    place.refused(78, str(place.psk), "31 bytes; at least 32 are needed: run `ringmail keygen`")
    place.psk.write_text("\n")
    place.refused(78, str(place.psk), "is empty")
    place.psk.unlink()
    os.mkfifo(place.psk)
    place.refused(78, str(place.psk), "neither a file nor a folder")
    place.psk.unlink()
    place.psk.mkdir()
    place.refused(78, str(place.psk), "holds no key")
    folder = place.folder / "secret"
    folder.mkdir(mode=0o700)
    os.chown(folder, 4242, 4242)
    (folder / "psk").write_text(PSK)
    os.chown(folder / "psk", 4242, 4242)
    (folder / "psk").chmod(0o600)
    without = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    place.refused(78, f"{folder}/psk", "Permission denied", psk_file=folder / "psk", wrap=without)


def test_a_psk_that_all_may_read_is_a_warning_with_the_remedy(place):
    place.psk.chmod(0o644)
    log = place.start()
    eventually(
        "the warning",
        lambda: "has mode 0644: every user of this machine can read it; chmod 0600" in log.read_text(),
        10,
    )
    eventually("and it runs", lambda: "ready:" in log.read_text(), 20)


def test_an_uplink_that_is_missing_or_has_no_address_is_named_with_the_choices(place):
    node = place.node
    place.refused(1, "no interface is called eth9", "eth0 192.168.77.1", iface="eth9")
    place.refused(1, "no interface with given IP found: 192.0.2.1", iface="192.0.2.1")
    place.refused(1, "could not match pattern wlan", "eth0", iface=None, arguments=["--iface-regex=wlan"])
    node.run("ip link add bare0 type dummy; ip link set bare0 up")
    try:
        place.refused(1, "interface bare0 has no usable IPv4 address", "--iface", iface="bare0")
        node.run("ip link set bare0 down")
        place.refused(1, "interface bare0 is down", "ip link set bare0 up", iface="bare0")
    finally:
        node.run("ip link del bare0")
    node.run("ip route del default")
    try:
        place.refused(1, "no IPv4 default route to find the uplink by", "--iface", iface=None)
    finally:
        node.run("ip route add default via 192.168.77.254")


def test_missing_capabilities_are_named(place):
    place.refused(1, "CAP_NET_ADMIN is missing: run as root or grant it", wrap=["setpriv", "--bounding-set=-net_admin"])


@pytest.fixture
def no_modprobe():
    path = pathlib.Path("/proc/sys/kernel/modprobe")
    before = path.read_text()
    path.write_text("/bin/false\n")
    yield
    path.write_text(before)


@pytest.mark.parametrize(
    "module, proposal, names",
    [("chacha20poly1305", "chacha20poly1305", "chacha20poly1305"), ("esp4", "aes128gcm16", "esp4")],
)
def test_a_kernel_without_the_cipher_or_esp_is_named_with_its_modules(place, no_modprobe, module, proposal, names):
    for one in ("chacha20poly1305",) if module != "esp4" else ("esp4_offload", "esp4"):
        subprocess.run(["rmmod", one], stderr=subprocess.DEVNULL)
    loaded = {line.split()[0] for line in open("/proc/modules")}
    assert module not in loaded, f"{module} can't be unloaded here"
    place.conf.write_text('{"Network": "10.244.0.0/16", "Backend": {"Type": "ipsec", "ESPProposal": "%s"}}' % proposal)
    try:
        place.refused(1, f"this kernel takes no ESP over IPv4 with {proposal}", "modprobe -a", names)
    finally:
        for command in (["modprobe", "-a", module], ["modprobe", "-d", "/run/kernel", "-a", module]):
            subprocess.run(command, stderr=subprocess.DEVNULL)


def test_a_store_that_is_missing_or_no_folder_is_named_with_the_remedy(place):
    nowhere = place.folder / "nowhere"
    place.refused(1, f"store folder {nowhere} does not exist", f"mkdir -p {nowhere}", lease_dir=nowhere)
    place.refused(1, f"{place.psk} is not a folder", "--lease-dir", lease_dir=place.psk)


@pytest.mark.parametrize("kind", ["read-only", "full"])
def test_a_store_that_takes_no_writes_is_named_and_waited_for(place, kind):
    small = place.folder / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "small", small], check=True)
    try:
        (small / "net-conf.json").write_text(NETWORK)
        if kind == "full":
            with pytest.raises(OSError):
                (small / "fill").write_bytes(bytes(1 << 20))
        else:
            subprocess.run(["mount", "-o", "remount,ro", small], check=True)
        log = place.start(lease_dir=small)
        said = {
            "read-only": "the file system is read-only: remount it writable",
            "full": "no space, or no inode, is left there (ENOSPC): free some",
        }[kind]
        eventually("the log names it", lambda: said in log.read_text(), 10)
        assert str(small) in log.read_text()
        status = place.node.run([program(), "status", "--run-dir", str(place.folder / "run")], check=False)
        assert status.returncode == 1 and "problem: " in status.stdout and "no lease yet" in status.stdout, status
        assert not (place.folder / "subnet.env").exists()
        if kind == "full":
            (small / "fill").unlink()
        else:
            subprocess.run(["mount", "-o", "remount,rw", small], check=True)
        eventually("and it goes on by itself", lambda: "ready:" in log.read_text(), 40)
        assert len(list(small.glob("*-24.json"))) == 1
    finally:
        place.end()
        place.daemons.clear()
        subprocess.run(["umount", "-l", small], check=True)


def test_a_second_daemon_is_refused_with_the_first_ones_pid_and_folder(place):
    place.ready()
    pid = place.daemons[0].pid
    before, leases = kernel(place.node), sorted(path.name for path in place.leases.iterdir())
    for run_dir in (place.folder / "run", place.folder / "another"):
        done = place.node.run(place.command(run_dir=run_dir), check=False)
        assert done.returncode == 1, done
        assert (
            f"another ringmail daemon serves this node (pid {pid}, --run-dir {place.folder}/run): stop it first"
            in done.stderr
        ), done
    assert place.daemons[0].poll() is None
    assert kernel(place.node) == before
    assert sorted(path.name for path in place.leases.iterdir()) == leases
    assert place.node.run([program(), "status", "--run-dir", str(place.folder / "run")])


def test_a_network_without_a_free_subnet_is_named_with_the_remedy(place):
    place.conf.write_text('{"Network": "10.244.0.0/22"}')
    taken = [f"10.244.{number}.0-24.json" for number in range(4)]
    for name in taken:
        (place.leases / name).write_text('{"Node": "gone-%s", "PublicIP": "192.168.77.9"}' % name[7])
    done = place.node.run(place.command(), check=False)
    assert done.returncode == 1, done
    assert (
        "out of subnets" in done.stderr
        and "10.244.0.0/22 are leased" in done.stderr
        and "enlarge Network" in done.stderr
    ), done
    assert not (place.folder / "subnet.env").exists()
    assert "/24" not in place.node.run("ip xfrm policy") and "ringmail0" not in place.node.run("ip link")
    # The guard stood before the store was asked, and stays until it is told to go: it is safe, not half.
    place.node.run([program(), "cleanup", "--run-dir", str(place.folder / "run")], check=False)
    assert "block" not in place.node.run("ip xfrm policy")


def test_an_encapsulation_port_in_use_is_named_and_taken_when_it_is_free(place):
    place.conf.write_text('{"Network": "10.244.0.0/16", "Backend": {"Type": "ipsec", "UDPEncap": true}}')
    with place.node.listen(4500):
        log = place.start()
        eventually("the log names it", lambda: "192.168.77.1:4500 is in use by another program" in log.read_text(), 20)
        assert "ss -ulpn" in log.read_text() and "EncapPort" in log.read_text()
        status = place.node.run([program(), "status", "--run-dir", str(place.folder / "run")], check=False)
        assert status.returncode == 1 and "is in use by another program" in " ".join(status.stdout.split()), status
    free = (
        lambda: "problem"
        not in place.node.run([program(), "status", "--run-dir", str(place.folder / "run")], check=False).stdout
    )  # noqa: E731
    eventually("it takes the port", free, 10, 0.3)
