"""A mesh whose leases are annotations on the Nodes of a real API server: three daemons, real ESP. `tests/run kube` runs it,
which builds the server."""

import base64
import hashlib
import hmac
import json
import os
import re
import threading
import time

import pytest

import frames
from cluster import APISERVER, PREFIX, Cluster, PluginPod, account, arguments, confined, key, mount
from flow import Flow
from rig import eventually
from running import in_memory, measured, measures, spellings


# The podCIDRs of a Node, by the number in them.
SUBNETS = ["10.244.{}.0/24", "fd00:244:0:{}::/64"]


@pytest.fixture
def cluster(request, make_lab):
    """A lab and its API server, with a Node for each node, of one family or of as many as asked for; no daemon started."""
    assert os.path.exists(APISERVER), f"{APISERVER} is missing: tests/run kube builds it"
    lab = make_lab(3)
    cluster = Cluster(lab)
    for node in lab.nodes:
        cluster.add(str(node), *(net.format(node.number) for net in SUBNETS[: getattr(request, "param", 1)]))
    yield lab, cluster
    for node in lab.nodes:
        node.stop()
    cluster.stop()
    cluster.etcd.kill()
    cluster.etcd.wait()


def test_three_daemons_hold_an_encrypted_mesh_over_nodes(cluster):
    lab, kube = cluster
    conf, secret = kube.folder / "conf", kube.folder / "secret"
    mount(conf, ("net-conf.json", b'{"Network": "10.244.0.0/16", "Backend": {"Type": "ipsec"}}'))
    mount(secret, ("1", key()))
    flags = ["--kube-subnet-mgr", "--kubeconfig-file", kube.kubeconfig, "--net-config-path", conf / "net-conf.json"]
    flags += ["--psk-file", secret]
    for node in lab.nodes:
        node.start(*flags, env={"NODE_NAME": str(node), "RINGMAIL": confined(kube.folder)})
    for node in lab.nodes:
        node.ready(60)
    lab.meshed(timeout=60)
    pods = lab.pods()
    talk = lambda: all(a.ping(b) == 1 for a in pods for b in pods if a is not b)  # noqa: E731
    eventually("every pod reaches every other", talk, 20)
    for node in lab.nodes:
        assert node.subnet_env()["FLANNEL_SUBNET"] == f"10.244.{node.number}.1/24"
        notes = kube.notes(node)
        assert (notes["backend-type"], notes["public-ip"]) == ("ipsec", node.address()), notes
        assert set(json.loads(notes["backend-data"])) == {"Statement", "Tags"}, notes
        eventually(f"the condition of {node}", lambda: kube.condition(node) == ["False"], 10)  # noqa: B023

    # The Secret changes: every node rotates to the new key by itself.
    before = {str(node): node.status()["epoch"] for node in lab.nodes}
    mount(secret, ("1", key()))
    moved = lambda: all(node.status()["epoch"] > before[str(node)] for node in lab.nodes)  # noqa: E731
    eventually("a new epoch everywhere", moved, 40)
    lab.meshed(timeout=40)
    assert talk()

    # An outage takes nothing away, and a Node's advertised address is one that its statement names.
    kube.stop()
    eventually("it is told", lambda: "the store can't be read" in lab.node(1).ringmail("status", check=False).stdout, 30)
    assert talk()
    kube.start()
    overwrite = {"metadata": {"annotations": {f"{PREFIX}public-ip-overwrite": "192.168.77.77"}}}
    kube.ask("PATCH", f"nodes/{lab.node(3)}", overwrite, "application/merge-patch+json")
    eventually("it is advertised", lambda: kube.notes(lab.node(3))["public-ip"] == "192.168.77.77", 40)
    peer = lambda: next(peer for peer in lab.node(1).status()["peers"] if peer["node"] == str(lab.node(3)))  # noqa: E731
    eventually("and believed", lambda: peer()["address"] == "192.168.77.77" and peer()["state"] != "refused", 20)
    overwrite["metadata"]["annotations"][f"{PREFIX}public-ip-overwrite"] = None
    kube.ask("PATCH", f"nodes/{lab.node(3)}", overwrite, "application/merge-patch+json")
    lab.meshed(timeout=60)
    eventually("pods talk", talk, 20)


def test_keys_of_a_secret_are_watched_through_the_api(cluster):
    lab, kube = cluster
    conf, keys = kube.folder / "conf", {number: key() for number in (1, 2)}
    mount(conf, ("net-conf.json", b'{"Network": "10.244.0.0/16", "Backend": {"Type": "ipsec", "PSKGrace": "80s"}}'))
    flags = ["--kubeconfig-file", kube.kubeconfig, "--net-config-path", conf / "net-conf.json", "--psk-secret", "default/psk"]
    # All there is to log.
    env = {"RINGMAIL_LOG": "trace"}
    for node in lab.nodes[:2]:
        node.start("--kube-subnet-mgr", *flags, env={"NODE_NAME": str(node), **env})
    # Without that store, and alone: the keys come from there all the same.
    (kube.folder / "leases-3").mkdir()
    lab.node(3).start("--lease-dir", kube.folder / "leases-3", *flags, env=env)

    # The Secret is waited for, and said so.
    for node in lab.nodes:
        eventually("it waits", lambda: "waiting for it" in node.log() and "does not exist" in node.log(), 60)  # noqa: B023
    told = lambda what: all(what in kube.events(node) for node in lab.nodes[:2])  # noqa: E731
    eventually("the Nodes say so", lambda: told("Warning PSKRefused: the PSK can't be read"), 30)
    kube.give("psk", {"key-1": keys[1]})
    for node in lab.nodes:
        node.ready(60)
    lab.meshed(lab.nodes[:2], timeout=60)
    eventually("the Nodes say so", lambda: told("Normal PSKAccepted"), 30)
    one, two, _ = lab.pods()
    eventually("pods talk", lambda: one.ping(two) == 1, 20)
    kids = lambda node: [psk["kid"] for psk in node.status()["psks"] if not psk["withdrawn"]]  # noqa: E731
    (first,) = kids(lab.node(1))
    assert [kids(node) for node in lab.nodes] == [[first]] * 3

    # A second key, then without the first, under traffic.
    answers = []
    flow = threading.Thread(target=lambda: answers.append(one.ping(two, count=3000, interval=0.01, timeout=20)))
    flow.start()
    began = time.monotonic()
    kube.give("psk", {"key-1": keys[1], "key-2": keys[2]})
    eventually("the newer key is there", lambda: all(len(kids(node)) == 2 for node in lab.nodes), 10, 0.05)
    measured("from a Secret's change to both keys on three nodes", time.monotonic() - began)
    second = kids(lab.node(1))[0]
    assert second != first
    lab.meshed(lab.nodes[:2], timeout=40)
    kube.give("psk", {"key-2": keys[2]})
    held = lambda: {psk["kid"] for node in lab.nodes for psk in node.status()["psks"]}  # noqa: E731
    eventually("the old key is dropped", lambda: held() == {second}, 60)
    flow.join()
    assert answers == [3000], "packets were lost"

    # A wrong edit: the last good one stays in use, and it is said.
    kube.give("psk", {"key-3": b"hunter2"})
    problem = "the PSK can't be read, those in use stay: PSK Secret default/psk has no key in its entry \"key-3\""
    for node in lab.nodes:
        eventually("it is told", lambda: any(problem in text for text in node.status()["problems"]), 20)  # noqa: B023
    eventually("the Nodes say so", lambda: told(f"Warning PSKRefused: {problem}"), 20)
    assert held() == {second} and one.ping(two) == 1
    kube.give("psk", {"key-2": keys[2]})
    for node in lab.nodes:
        eventually("it is over", lambda: not any("PSK" in text for text in node.status()["problems"]), 20)  # noqa: B023

    # No key in anything that is shown, and no byte of the Secret in memory: what is derived from the key is.
    shown = "\n".join(node.log() + str(node.status()) for node in lab.nodes) + "".join(map(kube.events, lab.nodes[:2]))
    texts = [text.strip() for text in keys.values()]
    assert "psk" in shown.lower()
    for text in [*texts, b"hunter2"]:
        assert not any(spelling in shown.encode() for spelling in spellings(text)), "a key shows"
    prk = lambda text: hmac.digest(b"ringmail v1 psk", text, hashlib.sha256)  # noqa: E731
    for node in lab.nodes:
        assert in_memory(node.pid, prk(texts[1])), "what is held can be found"
        gone = [prk(texts[0]), *texts, *(base64.b64encode(text + b"\n")[:64] for text in texts)]
        left = [at for at, secret in enumerate(gone) if in_memory(node.pid, secret)]
        assert not left, f"{node} has {left} in its memory"
    a_node_tells_of_a_key_that_a_peer_still_needs_and_of_plaintext(lab, kube, second, ["--kube-subnet-mgr", *flags])


def a_node_tells_of_a_key_that_a_peer_still_needs_and_of_plaintext(lab, kube, kid, flags):
    """Nobody asks the daemon meanwhile: it reads the guard's numbers by itself."""
    one, two, _ = lab.nodes
    two.stop()
    kube.give("psk", {"key-3": key()})
    lab.spoof(1, frames.udp(lab.pod(2).address(), lab.pod(1).address()), count=3)
    tells = lambda what, timeout=70: eventually(f"{what} on the Node", lambda: what in (shown := kube.events(one)) and shown, timeout, 1)  # noqa: E731
    shown = tells("Warning PlaintextDropped: the guard has dropped 3 packets of the mesh that came in by eth0 without ESP")
    one.run(re.search("PlaintextDropped: .*set the count back: (.*)", shown)[1])
    tells(f"Warning PSKStillNeeded: node {two} still needs key {kid}, which was taken from this node: give them a newer one")
    tells("Normal PlaintextCleared: the guard counts no dropped plaintext any more")
    two.start(*flags, env={"NODE_NAME": str(two)})
    tells("Normal PSKLetGo: no pre-shared key that was taken from this node is held any more")
    assert kube.events(one).count("Plaintext") == 2, "neither is told twice"


BACKENDS = {"udp": "E6", "host-gw": "E4", "vxlan": "E1"}

# flannel's own text (FLANNEL-POSTRTG of `iptables -t nat -S`), which its end-to-end tests compare too.
MASQUERADE = """-N FLANNEL-POSTRTG
-A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s POD -d NET -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s NET -d POD -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG ! -s NET -d POD -m comment --comment "flanneld masq" -j RETURN
-A FLANNEL-POSTRTG -s NET ! -d MANY -m comment --comment "flanneld masq" -j MASQUERADE --random-fully
-A FLANNEL-POSTRTG ! -s NET -d NET -m comment --comment "flanneld masq" -j MASQUERADE --random-fully
"""


@pytest.mark.parametrize("cluster", [2], ids=["both-families"], indirect=True)
def test_pods_of_the_plugin_talk_on_every_backend_and_over_a_minute_without_the_server(cluster):
    """The DaemonSet's account, rights, flags and capability, and pods as a kubelet makes them. flannel's scenarios E1, E4, E6
    and E8 (each backend, both families), E9 (a pod is made anew), E10 (the DaemonSet is restarted node by node); then the same
    pods on ipsec, and the API server away for a minute and back without its history, for the Nodes and for a Secret."""
    lab, kube = cluster
    lab.wire.allow_plaintext("the mesh begins on backends that do not encrypt")
    networks = {"Network": "10.244.0.0/16", "EnableIPv6": True, "IPv6Network": "fd00:244::/48"}
    conf, secret, keys = kube.folder / "conf", kube.folder / "secret", [key(), key()]
    use = lambda backend: mount(conf, ("net-conf.json", json.dumps({**networks, "Backend": {"Type": backend}}).encode()))  # noqa: E731
    use("udp")
    mount(secret, ("1", keys[0]))
    kube.give("ringmail-psk", {"1": keys[0]}, "kube-system")
    token = kube.install()
    kube.let_watch("ringmail-psk")
    with account(kube, token) as around:
        program = confined(kube.folder)

        def start(node):
            # The third takes its keys from the Secret itself.
            keys = {"psk_file": secret} if node.number < 3 else {"psk_file": None, "psk_secret": "kube-system/ringmail-psk"}
            flags = arguments(net_config_path=conf / "net-conf.json", **keys)
            node.start(*flags, env={**around, "NODE_NAME": str(node), "RINGMAIL": program, "RINGMAIL_LOG": "debug"})

        for node in lab.nodes:
            start(node)
        for node in lab.nodes:
            node.ready(60)
        lab.meshed(state="plain", timeout=60)
        pods = [PluginPod(lab, node.number).make() for node in lab.nodes]
        reach = lambda: [(a, b, f) for a in pods for b in pods for f in (4, 6) if a is not b and a.ping(b, f, 3, interval=0.05) < 3]  # noqa: E731
        talk = lambda what: eventually(f"{what}: all pods reach all", lambda: reach() == [], 30)  # noqa: E731
        for backend, scenario in BACKENDS.items():
            use(backend)
            for node in lab.nodes:
                eventually(f"{backend} on {node}", lambda: node.status()["backend"] == backend, 30)  # noqa: B023
            lab.meshed(state="plain", timeout=30)
            talk(f"{scenario}, {backend}")
            for node in lab.nodes:
                eventually(f"the condition of {node}", lambda: kube.condition(node) == ["False"], 10)  # noqa: B023
                for family, (tool, net, many) in {4: ("iptables", "10.244.0.0/16", "224.0.0.0/4"), 6: ("ip6tables", "fd00:244::/48", "ff00::/8")}.items():
                    pod = SUBNETS[family == 6].format(node.number)
                    text = MASQUERADE.replace("POD", pod).replace("NET", net).replace("MANY", many)
                    assert node.run(f"{tool}-legacy -t nat -S FLANNEL-POSTRTG") == text, f"{scenario}: {tool}"

        # E9.
        pods[1].remove()
        pods[1].make()
        talk("E9, a pod made anew")
        # E10, and nothing is lost meanwhile.
        before = [node.subnet_env() for node in lab.nodes]
        with Flow(pods[0], pods[1], rate=100) as out, Flow(pods[2], pods[0], rate=100, port=7701) as back:
            for node in lab.nodes:
                node.stop()
                start(node)
                eventually(f"{node} is back", lambda: len(node.peers("plain")) == 2, 30)  # noqa: B023
        assert not out.result.lost and not back.result.lost, f"E10: {out.result}, {back.result}"
        assert [node.subnet_env() for node in lab.nodes] == before, "E10: a restart changes no subnet"

        # The same pods on ipsec: from here on no packet of theirs is to be seen on the wire.
        use("ipsec")
        lab.meshed(timeout=60)
        lab.wire.settle()
        lab.wire.plaintext.clear()
        lab.wire.allowed = None
        tunnelled = lab.wire.tunnelled
        talk("ipsec")
        assert lab.wire.tunnelled >= tunnelled + 60, "all of it is ESP"
        a_minute_without_the_server(lab, kube, pods, secret, keys)


def a_minute_without_the_server(lab, kube, pods, secret, keys):
    logs = [len(node.log()) for node in lab.nodes]
    kids = lambda node: len([psk for psk in node.status()["psks"] if not psk["withdrawn"]])  # noqa: E731
    epochs = [node.status()["epoch"] for node in lab.nodes]
    with Flow(pods[0], pods[2], rate=100) as out, Flow(pods[1], pods[0], rate=100, port=7701) as back:
        kube.stop()
        away = time.monotonic()
        eventually("it is told", lambda: all("the store can't be read" in str(node.status()["problems"]) for node in lab.nodes), 40)
        # Nobody tells the nodes of what happens meanwhile, and its history is gone.
        kube.start("127.0.0.1")
        kube.give("ringmail-psk", {"1": keys[0], "2": keys[1]}, "kube-system")
        kube.ask("PATCH", f"nodes/{lab.node(3)}", {"metadata": {"annotations": {"test/other": "x"}}}, "application/merge-patch+json")
        kube.compact()
        kube.stop()
        time.sleep(max(0, away + 60 - time.monotonic()))
        measured("the API server was away for", time.monotonic() - away)
        kube.start()
        returned = time.monotonic()
        eventually("the Secret's keys are read anew", lambda: kids(lab.node(3)) == 2, 40)
        measured("from its return to a Secret's new key", time.monotonic() - returned)
        mount(secret, ("1", keys[0]), ("2", keys[1]))
        for node, epoch in zip(lab.nodes, epochs):
            eventually(f"{node} has both keys", lambda: kids(node) == 2 and node.status()["epoch"] > epoch, 40)  # noqa: B023
        well = lambda: all(not node.problems() for node in lab.nodes)  # noqa: E731
        eventually("nothing is wrong", well, 40)
        lab.meshed(timeout=40)
    assert not out.result.lost and not back.result.lost, f"{out.result}, {back.result}"
    measures.append(f"a minute without the API server: {out.result}; {back.result}")
    said = [node.log()[at:] for node, at in zip(lab.nodes, logs)]
    assert all("the Nodes are listed anew" in text for text in said), "the server could not go on where it was"
