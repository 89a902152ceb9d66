"""A mesh of IPv6 alone, over nodes that have no other address: doctor finds nothing while it is well, and names what is done
to it with commands for IPv6."""

import contextlib
import json
import os

import pytest

from examining import clean, doctor, leave, named, start
from rig import eventually
from running import Running

NETWORK = "fd00:244::/48"


@pytest.fixture(scope="module")
def mesh(keywatch):
    mesh = Running(f"t{os.getpid() % 100000}-doctor6", 2, keywatch)
    conf = {"EnableIPv4": False, "EnableIPv6": True, "IPv6Network": NETWORK, "Backend": {"Type": "ipsec"}}
    (mesh.lease_dir / "net-conf.json").write_text(json.dumps(conf))
    mesh.cni = mesh.folder / "cni"
    mesh.cni.mkdir()
    (mesh.cni / "10-flannel.conflist").write_text(json.dumps({"plugins": [{"type": "flannel"}]}))
    try:
        for node in mesh.lab.nodes:
            node.ip("address flush dev eth0 to 0.0.0.0/0")
            start(mesh, node.number)
        mesh.in_order(1, 2)
        for number in (1, 2):
            mesh.lab.make_pod(number)
        assert mesh.lab.pod(1).ping(mesh.lab.pod(2), 6, count=2, interval=0.2) == 2
        yield mesh
    finally:
        mesh.down()


@pytest.fixture(autouse=True)
def watched(request, mesh, keywatch):
    request.node.labs = [mesh.lab]
    yield
    mesh.lab.wire.assert_clean()
    keywatch.check()


def subnet(mesh, number):
    (net,) = mesh.status(number)["subnets"]
    return net.split("/")[0]


def test_a_healthy_mesh_has_no_finding(mesh):
    clean(mesh, 1, 2)
    assert doctor(mesh, 1, 2) == [], "and while its counters are watched"


def test_what_is_done_by_a_command_is_named_with_the_command_that_undoes_it(mesh):
    one, two = mesh.lab.node(1), subnet(mesh, 2)
    faults = {
        "ip6tables-legacy -w -A INPUT -p esp -j DROP": ("filter-drops", "ip6tables-legacy -t filter -D INPUT -p esp -j DROP"),
        f"ip -6 route add {two}80/122 via fd77::254": (
            "route-shadow",
            f"ip -6 route delete {two}80/122 via fd77::254 dev eth0 metric 1024",
        ),
        f"ip -6 rule add to {two}/64 lookup 77 priority 100; ip -6 route add default via fd77::254 table 77": (
            "rule-shadow",
            "ip -6 rule delete priority 100",
        ),
        f"ip xfrm policy add dir out src ::/0 dst {two}80/122 priority 100": (
            "policy-shadow",
            f"ip xfrm policy delete dir out src ::/0 dst {two}80/122",
        ),
        "ip link set pod mtu 1500": ("pod-mtu", f"ip link set dev pod mtu {mesh.status(1)['mtu']}"),
    }
    last = []

    def all_found():
        last[:] = [(found["check"], found["command"]) for found in doctor(mesh, 1)]
        return all(any(check == c and text.startswith(command) for c, text in last) for check, command in faults.values())

    try:
        one.run("; ".join(faults))
        eventually(f"doctor finds all of {faults.values()}", all_found, 15)
    except AssertionError as error:
        raise AssertionError(f"{error}; it found {last}") from None
    finally:
        one.run("; ".join(command for _, command in faults.values()), check=False)
        one.run("ip -6 route flush table 77", check=False)
    clean(mesh, 1, 2)


def test_esp_that_is_dropped_and_a_node_that_is_out_of_reach_are_told_apart(mesh):
    """Node 1 comes anew: without what the process before left there is nothing to go on with."""
    one, two = mesh.lab.node(1), mesh.lab.node(2)
    silenced = "ip6tables-legacy -w -{0} INPUT -p esp -j DROP; ip6tables-legacy -w -{0} OUTPUT -p esp -j DROP"
    unreached = "ip6tables-legacy -w -{0} INPUT -s fd77::1 -j DROP"
    with contextlib.ExitStack() as undone:
        two.run(silenced.format("A"))
        undone.callback(lambda: two.run(silenced.format("D"), check=False))
        env = one.directory / "subnet.env"
        kept = env.read_text()
        leave(mesh, 1)
        env.write_text(kept)
        start(mesh, 1)
        found = named(mesh, 1, "esp-filtered")
        assert "answers ping at fd77::2" in found["evidence"] and '"UDPEncap": "auto"' in found["command"], found
        two.run(unreached.format("I"))
        undone.callback(lambda: two.run(unreached.format("D"), check=False))
        found = named(mesh, 1, "peer-unreachable")
        assert "fd77::2 does not answer ping" in found["evidence"], found
        assert found["command"] == "ping -c 3 fd77::2; ip route get fd77::2", found
    mesh.in_order(1, 2)
    clean(mesh, 1, 2)
