"""What someone can do who can write to the folder of leases: cut nodes off, and no more. Each forgery is named with its
reason in `status`, nobody else is disturbed, and what is put right is served without a restart."""

import json
import os
import re
import signal
import time

import pytest

from forger import Psk, lease, statement
from rig import eventually
from running import PSK, Running

MALLORY, AT = "mallory", "192.168.77.66"
OTHER_PSK = "another key, which nobody in this mesh holds"


@pytest.fixture(scope="module")
def mesh(keywatch):
    mesh = Running(f"t{os.getpid() % 100000}-leases", 4, keywatch)
    try:
        mesh.subnets()
        mesh.start(1, 2, 3)
        mesh.in_order(1, 2, 3)
        for number in (1, 2, 3):
            mesh.lab.make_pod(number)
        yield mesh
    finally:
        mesh.down()


@pytest.fixture(autouse=True)
def watched(request, mesh, keywatch):
    request.node.labs = [mesh.lab]
    yield
    mesh.lab.wire.assert_clean()
    keywatch.check()


def forged(subnet="10.244.66.0/24", address=AT, psk=PSK, network="10.244.0.0/16", epoch=2**31, node=MALLORY, **changed):
    """A lease of mallory's with a right tag under `psk`, but for what is `changed` of the lease afterwards."""
    key = Psk(psk, "10.244.0.0/16")
    said = statement(node, subnet, address, epoch, key.kid, network)
    return lease(changed.get("name", node), changed.get("public", address), said, changed.get("tag") or key.tag(said))


def with_data(data):
    return json.dumps(json.loads(forged()) | {"BackendData": data})


# What is written to 10.244.66.0-24.json, and what `status` of every node says of mallory.
FORGERIES = {
    "a wrong tag": (
        forged(tag=bytes(32)),
        "the tag of PSK .* does not verify: the lease was changed by someone without the key",
    ),
    "another subnet than the statement's": (
        forged(subnet="10.244.67.0/24"),
        "the lease says subnets 10.244.66.0/24, its statement says 10.244.67.0/24: the lease was changed",
    ),
    "another address than the statement's": (
        forged(public="192.168.77.99"),
        "the lease says public addresses 192.168.77.99, its statement says 192.168.77.66: the lease was changed",
    ),
    "another node's statement": (
        forged(node="somebody", name=MALLORY),
        "the lease says node mallory, its statement says somebody",
    ),
    "another Network": (
        forged(network="10.240.0.0/12"),
        "it is of Network 10.240.0.0/12, this node of 10.244.0.0/16: make net-conf.json the same",
    ),
    "another PSK": (
        forged(psk=OTHER_PSK),
        "no common PSK: it has [0-9a-f]{16}, this node has [0-9a-f]{16}; give both nodes the same key",
    ),
    "no statement": (with_data({"Statement": "!", "Tags": []}), "BackendData is no statement: "),
    "no tag": (
        with_data(json.loads(forged())["BackendData"] | {"Tags": []}),
        "BackendData is no statement: a tag for each kid is needed",
    ),
    "another backend": (
        json.dumps({"Node": MALLORY, "PublicIP": AT, "BackendType": "vxlan"}),
        'backend type is "vxlan"; this mesh is "ipsec"',
    ),
    "nothing but a subnet": (
        json.dumps({"Node": MALLORY, "PublicIP": AT}),
        "it has taken a subnet and said nothing yet",
    ),
}
# What stands there instead of a lease, and what `status` says of the file.
RUBBISH = {
    "garbage": (lambda path: path.write_bytes(os.urandom(500)), "not the JSON of a lease"),
    "an empty file": (lambda path: path.write_bytes(b""), "not the JSON of a lease"),
    "a FIFO": (os.mkfifo, "not a regular file"),
    "a folder": (os.mkdir, "not a regular file"),
    "a loop of links": (lambda path: path.symlink_to(path), "symbolic link in a loop"),
    "a huge file": (lambda path: path.write_bytes(b" " * 300_000), "larger than 65536 bytes"),
    "no node": (lambda path: path.write_text("{}"), 'no "Node" is named'),
}


def put(path, text):
    """As a careful writer does, so that no half of it is read."""
    path.with_name(".forging").write_text(text)
    path.with_name(".forging").rename(path)


def remove(path):
    os.rmdir(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def nothing_to(mesh, address):
    for number in (1, 2, 3):
        assert address not in mesh.lab.node(number).run("ip xfrm state list nokeys; ip xfrm policy"), address


def test_no_forged_lease_is_programmed_and_each_is_named(mesh):
    path = mesh.lease_dir / "10.244.66.0-24.json"
    wrong = []
    with mesh.outage(1, 2, rate=200) as outage:
        for what, (text, reason) in FORGERIES.items():
            put(path, text)
            said = lambda: re.search(reason, (mesh.peer(1, 0, MALLORY) or {}).get("reason") or "")  # noqa: E731
            try:
                eventually(what, said, 3)
                peer = mesh.peer(1, 0, MALLORY)
                assert peer["state"] == "refused", peer
                assert AT not in mesh.lab.node(1).run("ip xfrm state list nokeys; ip xfrm policy")
            except AssertionError as error:
                wrong.append(f"{what}: {error}: {mesh.peer(1, 0, MALLORY)}")
        remove(path)
        eventually("mallory is forgotten", lambda: mesh.peer(1, 0, MALLORY) is None, 5)
        for what, (make, reason) in RUBBISH.items():
            make(path)
            try:
                eventually(what, lambda: reason in mesh.status(1)["rejected"].get(path.name, ""), 3)
            except AssertionError as error:
                wrong.append(f"{what}: {error}: {mesh.status(1)['rejected']}")
            remove(path)
            eventually(f"{what} is forgotten", lambda: not mesh.status(1)["rejected"], 3)
        text = mesh.lab.node(1).ringmail("leases", check=False).stdout
        assert MALLORY not in text, text
    assert not wrong, "\n".join(wrong)
    assert not outage.lost, outage
    nothing_to(mesh, AT)
    mesh.in_order(1, 2, 3)


def test_a_forged_lease_that_is_put_right_is_served_without_a_restart(mesh):
    """The tag is computed by another implementation, so this is also a vector: the daemon derives an SA for it."""
    path = mesh.lease_dir / "10.244.66.0-24.json"
    put(path, forged(tag=bytes(32)))
    eventually("refused", lambda: mesh.peer(1, 0, MALLORY)["state"] == "refused", 3)
    put(path, forged(epoch=2**31 + 1))
    eventually("accepted", lambda: mesh.peer(1, 0, MALLORY)["state"] == "waiting", 3)
    eventually("and programmed", lambda: AT in mesh.lab.node(1).run("ip xfrm state list nokeys"), 3)
    put(path, forged(epoch=2**31))
    rolled = eventually(
        "a lower epoch is refused", lambda: "is older than" in (mesh.peer(1, 0, MALLORY)["reason"] or ""), 3
    )
    assert rolled and "rolled back" in mesh.peer(1, 0, MALLORY)["reason"]
    path.unlink()
    # It never answered a probe, so it is let go 5 s after its lease.
    eventually("gone", lambda: AT not in mesh.lab.node(1).run("ip xfrm state list nokeys; ip xfrm policy"), 15)
    mesh.in_order(1, 2, 3)


def test_what_is_known_of_a_node_outlives_forged_and_restored_leases(mesh):
    """Node 3's daemon is stopped, so that it can't write its lease again at once."""
    path, node = mesh.lease(3), mesh.lab.node(3)
    old = path.read_text()
    node.ringmail("rotate")
    eventually("the new epoch is published", lambda: path.read_text() != old, 5)
    mesh.in_order(1, 2, 3)
    now = json.loads(path.read_text())
    os.kill(node.pid, signal.SIGSTOP)
    try:
        with mesh.outage(1, 3, rate=200) as outage:
            for what, text, reason in [
                ("an old lease", old, "a lease was rolled back"),
                ("a wrong tag", forged(node=node.namespace, subnet="10.244.3.0/24", tag=bytes(32)), "does not verify"),
                (
                    "a changed address",
                    json.dumps(now | {"PublicIP": "192.168.77.66"}),
                    "the lease says public addresses 192.168.77.66",
                ),
            ]:
                put(path, text)
                said = eventually(what, lambda: reason in (mesh.peer(1, 3)["reason"] or "") and mesh.peer(1, 3), 3)
                assert said["reason"].startswith("the newest lease is refused, its last good one serves: "), said
                assert said["state"] == "up" and said["address"] == node.address(), said
    finally:
        os.kill(node.pid, signal.SIGCONT)
    assert not outage.lost, outage
    mesh.in_order(1, 2, 3)
    assert json.loads(path.read_text())["PublicIP"] == node.address(), "node 3 has put its lease right itself"


def test_a_thief_without_the_psk_can_cut_a_node_off_and_not_redirect_its_subnet(mesh):
    path = mesh.lease(3)
    with mesh.outage(1, 2, rate=200) as outage:
        put(path, forged(subnet="10.244.3.0/24", psk=OTHER_PSK))
        eventually(
            "mallory is refused", lambda: "no common PSK" in (mesh.peer(1, 0, MALLORY) or {}).get("reason", ""), 3
        )
        assert AT not in mesh.lab.node(1).run("ip xfrm state list nokeys; ip xfrm policy; ip route")
        assert mesh.lab.pod(1).ping("10.244.3.10", timeout=1) in (0, 1)
        if mesh.lease_dir.joinpath("10.244.3.0-24.json").read_text().find(MALLORY) > 0:
            path.unlink()
        mesh.in_order(1, 2, 3, timeout=45)
    assert not outage.lost, outage
    assert mesh.lab.pod(1).ping("10.244.3.10") == 1


def test_two_nodes_at_one_address_are_both_named_and_the_rest_goes_on(mesh):
    """With the PSK, so the statement is right; who of the two lies, nobody can tell."""
    path = mesh.lease_dir / "10.244.66.0-24.json"
    node = mesh.lab.node(3)
    with mesh.outage(1, 2, rate=200) as outage:
        put(path, forged(address=node.address()))
        for name, other in ((MALLORY, node.namespace), (node.namespace, MALLORY)):
            said = lambda: (mesh.peer(1, 0, name) or {}).get("reason")  # noqa: B023, E731
            eventually(f"{name} is named", said, 3)
            assert (
                f"public address {node.address()} is also claimed by {other}: remove one of the leases" in said()
            ), said()
            assert mesh.peer(1, 0, name)["state"] == "refused"
        own = eventually("its own status says so", lambda: mesh.status(3)["problems"], 3)
        assert f"also claimed by {MALLORY}" in own[0], own
        path.unlink()
        mesh.in_order(1, 2, 3)
    assert not outage.lost, outage
    assert mesh.lab.pod(1).ping("10.244.3.10") == 1


def test_a_node_with_another_psk_is_served_once_it_has_the_right_one(mesh):
    node, psk = mesh.lab.node(4), mesh.folder / "psk4"
    mesh.write_psk(OTHER_PSK, psk)
    with mesh.outage(1, 2, rate=200) as outage:
        node.start("--lease-dir", str(mesh.lease_dir), "--psk-file", str(psk))
        reason = lambda one, other: (mesh.peer(one, other) or {}).get("reason") or ""  # noqa: E731
        eventually("node 1 names it", lambda: "no common PSK" in reason(1, 4), 20)
        eventually("it names node 1", lambda: "no common PSK" in reason(4, 1), 5)
        assert node.address() not in mesh.lab.node(1).run("ip xfrm state list nokeys; ip xfrm policy")
        begun = time.monotonic()
        mesh.write_psk(PSK, psk)
        mesh.in_order()
        assert time.monotonic() - begun < 30
    assert not outage.lost, outage
    node.stop()
    node.ringmail("cleanup")
