"""The backends that program nothing of their own: extension, which runs the operator's commands, and alloc."""

import json
import pathlib

from rig import eventually
from test_backends import foreign_lease

# What a shell would run, and what is run without one: see `nothing_ran`.
HOSTILE = "$(touch /run/ran-1); touch /run/ran-2 | touch /run/ran-3 && `touch /run/ran-4`\n\ntouch /run/ran-5 ' \" $SUBNET"

# Notes each call, in a file of its own for each node, with the arguments, the variables and the standard input as they
# came. Of few processes: in User Mode Linux each costs 30 ms.
SCRIPT = """#!/bin/sh
read -r mac </sys/class/net/eth0/address
{ echo "call $*"; export -p; echo stdin; cat; echo; echo end; } >>"FOLDER/calls.$mac"
[ "$1" != pre ] || printf '%s\\n' 'DATA'
[ "$1" != add ] || ! [ -e FOLDER/broken ] || { echo "no such gateway today" >&2; exit 3; }
[ "$1" != add ] || exec ip route replace "$2" via "$3"
"""


class Commands:
    """A lab whose backend is extension, with `SCRIPT` beside its leases. data: what PreStartupCommand prints."""

    def __init__(self, make_lab, count, data="hello"):
        self.lab = make_lab(count)
        self.lab.wire.allow_plaintext("the operator's commands do not encrypt")
        self.folder = pathlib.Path(self.lab.lease_dir).parent
        self.script = self.folder / "script"
        self.script.write_text(SCRIPT.replace("FOLDER", str(self.folder)).replace("DATA", data))
        self.script.chmod(0o755)

    def configure(self, **commands):
        names = {name + "Command": command.replace("SCRIPT", str(self.script)) for name, command in commands.items()}
        self.lab.configure(Type="extension", **names)

    def calls(self, number):
        """What the script was called with on a node: (arguments, variables, standard input) of each call."""
        path = self.folder / f"calls.{self.lab.node(number).mac.hex(':')}"
        found = []
        for call in path.read_text().split("end\n")[:-1] if path.exists() else []:
            head, stdin = call.split("stdin\n", 1)
            words, *variables = head.splitlines()
            names = (line.removeprefix("export ").split("=", 1) for line in variables)
            # The shell's own two, which it makes by itself.
            given = {name: value[0].strip("'") for name, *value in names if name not in ("PWD", "OLDPWD")}
            found.append((words.removeprefix("call "), given, stdin.rstrip("\n")))
        return found

    def route(self, number, of):
        """Whether a node has the route to another's subnet that the commands make."""
        return f"{subnet(self.lab.node(of))} via {self.lab.node(of).address()} dev eth0" in self.lab.node(number).run("ip route")


def subnet(node):
    return node.subnet_env()["FLANNEL_SUBNET"].replace(".1/24", ".0/24")


def state(node):
    """What the node's kernel holds of links, addresses, routes and neighbours, but for link-local addresses, which come
    when they like."""
    text = node.run("ip -o link; ip -o address; ip route show table all; ip -6 route show table all; ip neigh show nud permanent")
    return {line for line in text.splitlines() if "fe80::" not in line}


def ran():
    return list(pathlib.Path("/run").glob("ran-*"))


def test_the_operators_own_commands_carry_a_mesh_and_follow_who_comes_and_goes(make_lab):
    """host-gw, made of flannel's four commands: pods reach pods, and what was made for a node that leaves goes."""
    mesh = Commands(make_lab, 3)
    mesh.configure(
        PreStartup="SCRIPT pre",
        PostStartup="SCRIPT post ${NETWORK} $SUBNET-$NONE",
        SubnetAdd="ip route add $SUBNET via $PUBLIC_IP",
        SubnetRemove="ip route del $SUBNET via ${PUBLIC_IP}",
    )
    lab = mesh.lab
    lab.start("--ip-masq", state="plain")
    pods = lab.pods()
    assert lab.node(1).subnet_env()["FLANNEL_MTU"] == "1500"
    for source in pods:
        for target in pods:
            if source is not target:
                talk = lambda: source.ping(target, size=1500)  # noqa: E731, B023
                eventually(f"{source} reaches {target}", talk, 10)
    for number in (1, 2, 3):
        own = subnet(lab.node(number))
        # Each once, before and after the lease was had, with nothing of the daemon's own environment.
        pre, post = mesh.calls(number)
        assert pre[0] == "pre" and set(pre[1]) == {"PATH"} and pre[2] == "", pre
        assert post[0] == f"post 10.244.0.0/16 {own}-", post
        del post[1]["PATH"]
        assert post[1] == {"NETWORK": "10.244.0.0/16", "SUBNET": own, "IPV6SUBNET": "", "IPV6NETWORK": "", "PUBLIC_IP": lab.node(number).address(), "PUBLIC_IPV6": ""}, post
    leases = [json.loads(path.read_text()) for path in pathlib.Path(lab.lease_dir).glob("*-24.json")]
    assert [(lease["BackendType"], lease["BackendData"]) for lease in leases] == [("extension", "hello")] * 3, leases
    report = lab.node(1).status()
    assert report["backend"] == "extension" and not report["problems"], report
    assert "not encrypted" in lab.node(1).ringmail("status")

    assert mesh.route(1, 3) and mesh.route(2, 3)
    gone = f"{subnet(lab.node(3))} via"
    lab.node(3).stop()
    assert mesh.route(1, 3), "a daemon that stops leaves its lease, and so the others their routes"
    lab.node(3).ringmail("cleanup")
    for number in (1, 2):
        eventually("the route of who left goes", lambda: gone not in lab.node(number).run("ip route"))  # noqa: B023
    assert mesh.route(1, 2) and mesh.route(2, 1)
    assert pods[0].ping(pods[1]) == 1


def test_a_command_that_fails_is_named_until_it_does(make_lab):
    mesh = Commands(make_lab, 2)
    lab, (one, two) = mesh.lab, mesh.lab.nodes
    mesh.configure(SubnetAdd="SCRIPT add $SUBNET $PUBLIC_IP", SubnetRemove="SCRIPT remove")
    broken = mesh.folder / "broken"
    broken.touch()
    lab.start(state="plain")

    def named():
        problems = one.status()["problems"]
        return problems if len(problems) == 1 and "SubnetAddCommand" in problems[0] else None

    problem = eventually("the command is named", named)[0]
    for part in (str(two), str(mesh.script), "exit status: 3", "no such gateway today", "again every 5 s"):
        assert part in problem, problem
    assert "SubnetAddCommand" in one.ringmail("status", check=False).stdout
    assert one.ringmail("status", check=False).returncode == 1
    assert not mesh.route(1, 2)
    broken.unlink()
    eventually("it is tried again, and done", lambda: mesh.route(1, 2) and not one.status()["problems"], 10)
    # A program that is not there; the commands of a changed configuration take effect without a restart.
    mesh.configure(PostStartup="/nowhere/at-all $SUBNET | tee", SubnetAdd="SCRIPT add $SUBNET $PUBLIC_IP")
    eventually("what can't be started is named", lambda: "/nowhere/at-all" in "".join(one.status()["problems"]), 15)
    assert "PostStartupCommand" in one.status()["problems"][0] and "without a shell" in one.status()["problems"][0]


def test_nothing_that_a_lease_says_is_run(make_lab):
    """Shell's metacharacters in a node's own data, in a stranger's lease and in the command itself stay text."""
    mesh = Commands(make_lab, 2, data=HOSTILE.replace("\n", " ").replace("'", ""))
    lab, one = mesh.lab, mesh.lab.node(1)
    mesh.configure(PreStartup="SCRIPT pre", SubnetAdd="SCRIPT add $SUBNET $PUBLIC_IP ; touch /run/ran-6 $(touch /run/ran-7)")
    lab.start(state="plain")
    eventually("both are served", lambda: mesh.route(1, 2) and mesh.route(2, 1))
    said = foreign_lease(mesh, "10.244.200.0/24", Node="said", PublicIP="192.168.77.2", BackendType="extension", BackendData=HOSTILE)
    nested = {"a": [HOSTILE, None], "$(touch /run/ran-8)": True}
    foreign_lease(mesh, "10.244.201.0/24", Node="nested", PublicIP="192.168.77.2", BackendType="extension", BackendData=nested)
    foreign_lease(mesh, "10.244.202.0/24", Node="odd", PublicIP="192.168.77.2;touch /run/ran-9", BackendType="extension")
    foreign_lease(mesh, "10.244.203.0/24", Node="od$(touch /run/ran-0)d", PublicIP="192.168.77.2", BackendType="extension")
    taken = lambda: {words.split()[1]: (words, stdin) for words, _, stdin in mesh.calls(1) if words.startswith("add ")}  # noqa: E731
    eventually("the strangers are served", lambda: said() and {"10.244.200.0/24", "10.244.201.0/24"} <= taken().keys())
    calls = taken()
    # The words of the command itself come as they stand: there is no shell to read them.
    assert calls["10.244.200.0/24"][0] == "add 10.244.200.0/24 192.168.77.2 ; touch /run/ran-6 $(touch /run/ran-7)", calls
    assert calls["10.244.200.0/24"][1] == HOSTILE
    assert json.loads(calls["10.244.201.0/24"][1]) == nested
    own = HOSTILE.replace("\n", " ").replace("'", "")
    assert calls[subnet(lab.node(2))][1] == own, calls
    assert "10.244.202.0/24" not in calls
    assert any("10.244.202.0" in name for name in one.status()["rejected"]), one.status()["rejected"]
    assert not ran(), ran()


def test_alloc_gives_a_subnet_and_programs_nothing(make_lab):
    lab = make_lab(2)
    lab.configure(Type="alloc")
    before = [state(node) for node in lab.nodes]
    lab.start("--iptables-forward-rules=false", state="plain")
    for node, was in zip(lab.nodes, before, strict=True):
        assert state(node) == was, state(node) ^ was
    rules = lab.node(1).run("iptables-legacy-save; ip6tables-legacy-save; nft list ruleset", check=False).stdout
    assert "flannel" not in rules.lower() and "ringmail" not in rules.lower(), rules
    subnets = {subnet(node) for node in lab.nodes}
    assert len(subnets) == 2
    for node in lab.nodes:
        env = node.subnet_env()
        assert env == {"FLANNEL_NETWORK": "10.244.0.0/16", "FLANNEL_SUBNET": env["FLANNEL_SUBNET"], "FLANNEL_MTU": "1500", "FLANNEL_IPMASQ": "false"}
        lease = json.loads(pathlib.Path(lab.lease_dir, subnet(node).replace("/", "-") + ".json").read_text())
        assert lease["PublicIP"] == node.address() and not lease.keys() & {"BackendType", "BackendData"}, lease
        assert not node.status()["problems"] and not node.audit()["differences"]
    # What the operator makes is let be.
    lab.node(1).run(f"ip route add {subnet(lab.node(2))} via 192.168.77.2")
    assert lab.pods()[0].ping(lab.pod(2)) == 0, "node 2 has no route back"
    lab.node(2).run(f"ip route add {subnet(lab.node(1))} via 192.168.77.1")
    lab.node(1).stop()
    lab.node(1).start(*lab.flags, "--iptables-forward-rules=false")
    lab.meshed(state="plain")
    lab.wire.allow_plaintext("alloc carries nothing; the operator's routes do not encrypt")
    assert lab.pod(1).ping(lab.pod(2)) == 1
