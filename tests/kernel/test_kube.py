"""A mesh whose leases are annotations on the Nodes of a real API server: three daemons, real ESP. `tests/run kube` runs it,
which builds the server."""

import base64
import hashlib
import hmac
import json
import os
import pathlib
import re
import ssl
import subprocess
import threading
import time
import urllib.error
import urllib.request

import pytest

import netns
from rig import REPOSITORY, eventually, program
from running import in_memory, measured, spellings

# The wire answers for the default gateway of every node, so it is where the server can be reached from all of them.
WIRE = "192.168.77.254"
PREFIX = "flannel.alpha.coreos.com/"
CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
APISERVER = os.environ.get("RINGMAIL_APISERVER") or str(CACHE / "ringmail-tools/bin/kube-apiserver-1.36.3")


class Cluster:
    """An API server and its etcd on the wire of a lab, in a folder of their own."""

    def __init__(self, lab):
        self.namespace, self.folder = f"{lab.name}-wire", pathlib.Path("/run/ringmail-lab") / lab.name / "kube"
        self.folder.mkdir(mode=0o700)
        self.kubeconfig = self.folder / "kubeconfig"
        subprocess.run(["openssl", "genrsa", "-out", self.folder / "key", "2048"], check=True, stderr=subprocess.DEVNULL)
        (self.folder / "tokens").write_text("token,admin,1,system:masters\n")
        etcd = ["etcd", "--data-dir", str(self.folder / "etcd"), "--logger", "zap", "--log-level", "error"]
        etcd += ["--heartbeat-interval", "500", "--election-timeout", "5000"]
        self.etcd = self.spawn("etcd.log", etcd)
        self.server = None
        self.start()
        authority = self.folder / "apiserver.crt"
        self.kubeconfig.write_text(
            "{apiVersion: v1, kind: Config, current-context: c, "
            f"clusters: [{{name: c, cluster: {{server: 'https://{WIRE}:6443', certificate-authority: '{authority}'}}}}], "
            "users: [{name: c, user: {token: token}}], contexts: [{name: c, context: {cluster: c, user: c}}]}"
        )

    def spawn(self, log, command):
        with open(self.folder / log, "ab") as file:
            return netns.spawn(self.namespace, command, stdout=file, stderr=subprocess.STDOUT)

    def start(self):
        key = self.folder / "key"
        command = [APISERVER, "--etcd-servers=http://127.0.0.1:2379", "--bind-address=0.0.0.0", f"--advertise-address={WIRE}"]
        command += [f"--cert-dir={self.folder}", f"--token-auth-file={self.folder / 'tokens'}", "--authorization-mode=RBAC"]
        command += [f"--service-account-key-file={key}", f"--service-account-signing-key-file={key}"]
        command += ["--service-account-issuer=https://kubernetes.default.svc", "--service-cluster-ip-range=10.96.0.0/24"]
        command += ["--endpoint-reconciler-type=none", "--disable-admission-plugins=ServiceAccount"]
        self.server = self.spawn("server.log", command)
        eventually("the API server serves", lambda: self.ask("GET", "nodes"), 180)

    def stop(self):
        self.server.kill()
        self.server.wait()

    def ask(self, method, path, body=None, kind="application/json"):
        """A call, from the wire."""
        url = f"https://127.0.0.1:6443/api/v1/{path}"
        headers = {"Authorization": "Bearer token", "Content-Type": kind}
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(url, data, headers, method=method)
        trusting = ssl._create_unverified_context()

        def call():
            with urllib.request.urlopen(request, timeout=20, context=trusting) as answer:
                return json.load(answer)

        return netns.within(self.namespace, call)

    def add(self, name, pods):
        spec = {"podCIDR": pods, "podCIDRs": [pods]}
        return self.ask("POST", "nodes", {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}, "spec": spec})

    def notes(self, name):
        """flannel's annotations on a Node, without their prefix."""
        found = self.ask("GET", f"nodes/{name}")["metadata"].get("annotations", {})
        return {note.removeprefix(PREFIX): value for note, value in found.items() if note.startswith(PREFIX)}

    def give(self, name, entries):
        """Makes a Secret of these keys, or gives it them, as `kubectl apply` does: with a second copy in an annotation."""
        data = {entry: base64.b64encode(text).decode() for entry, text in entries.items()}
        body = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "data": data}
        body["metadata"]["annotations"] = {"kubectl.kubernetes.io/last-applied-configuration": json.dumps(body)}
        path = f"namespaces/default/secrets/{name}?fieldManager=test&force=true"
        self.ask("PATCH", path, body, "application/apply-patch+yaml")

    def events(self, name):
        """What `kubectl describe node` shows of Events."""
        found = self.ask("GET", f"events?fieldSelector=involvedObject.kind=Node,involvedObject.name={name}")["items"]
        return "\n".join(f"{event['type']} {event['reason']}: {event['message']}" for event in found)

    def condition(self, name):
        conditions = self.ask("GET", f"nodes/{name}")["status"].get("conditions", [])
        return [one["status"] for one in conditions if one["type"] == "NetworkUnavailable"]


@pytest.fixture
def cluster(make_lab):
    """A lab and its API server, with a Node for each node, no daemon started."""
    assert os.path.exists(APISERVER), f"{APISERVER} is missing: tests/run kube builds it"
    lab = make_lab(3)
    cluster = Cluster(lab)
    for node in lab.nodes:
        cluster.add(str(node), f"10.244.{node.number}.0/24")
    yield lab, cluster
    for node in lab.nodes:
        node.stop()
    cluster.stop()
    cluster.etcd.kill()
    cluster.etcd.wait()


def mount(folder, name, content):
    """Changes a mounted ConfigMap or Secret as the kubelet does: a new folder, and a link to it that is turned."""
    folder.mkdir(exist_ok=True)
    new = f"..{len(list(folder.iterdir()))}"
    (folder / new).mkdir(mode=0o700)
    (folder / new / name).touch(mode=0o600)
    (folder / new / name).write_bytes(content)
    (folder / "..turning").symlink_to(new)
    (folder / "..turning").rename(folder / "..data")
    if not (folder / name).exists():
        (folder / name).symlink_to(f"..data/{name}")


def key():
    return subprocess.run([program(), "keygen"], stdout=subprocess.PIPE, check=True).stdout


def confined(folder):
    """The daemon with the capabilities that deploy/ringmail.yml gives it and no way to more, as a program. Programs of
    iptables, which User Mode Linux needs in the place of nf_tables and the image does not hold, want NET_RAW."""
    daemon = (REPOSITORY / "deploy/ringmail.yml").read_text().split("- name: kube-flannel\n")[1]
    added = re.search(r"drop: \[ALL\], add: \[(.*?)\]", daemon)[1].lower().replace(", ", ",+")
    path = folder / "confined"
    path.write_text(f'#!/bin/sh\nexec setpriv --no-new-privs --inh-caps=-all --bounding-set=-all,+net_raw,+{added} {program()} "$@"\n')
    path.chmod(0o755)
    return str(path)


def test_three_daemons_hold_an_encrypted_mesh_over_nodes(cluster):
    lab, kube = cluster
    conf, secret = kube.folder / "conf", kube.folder / "secret"
    mount(conf, "net-conf.json", b'{"Network": "10.244.0.0/16", "Backend": {"Type": "ipsec"}}')
    mount(secret, "1", key())
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
    mount(secret, "1", key())
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
    mount(conf, "net-conf.json", b'{"Network": "10.244.0.0/16", "Backend": {"Type": "ipsec"}}')
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
