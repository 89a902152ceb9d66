"""A mesh whose leases are annotations on the Nodes of a real API server: three daemons, real ESP. `tests/run kube` runs it,
which builds the server."""

import json
import os
import pathlib
import re
import ssl
import subprocess
import urllib.error
import urllib.request

import pytest

import netns
from rig import REPOSITORY, eventually, program

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
