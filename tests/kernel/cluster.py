"""A real API server and its etcd on the wire of a lab, what a kubelet does on a node, and pods made by the CNI plugin."""

import base64
import contextlib
import ipaddress
import json
import os
import pathlib
import re
import shutil
import ssl
import subprocess
import urllib.request

import netns
from rig import REPOSITORY, Pod, eventually, program

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

    def start(self, bind="0.0.0.0"):
        """Starts the server; at 127.0.0.1 the nodes do not reach it."""
        key = self.folder / "key"
        command = [APISERVER, "--etcd-servers=http://127.0.0.1:2379", f"--bind-address={bind}", f"--advertise-address={WIRE}"]
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
        """A call, from the wire; a path is of /api/v1 or begins with apis/. A body that is a text goes as it is."""
        url = f"https://127.0.0.1:6443/{path if path.startswith('apis/') else f'api/v1/{path}'}"
        headers = {"Authorization": "Bearer token", "Content-Type": kind}
        data = (body if isinstance(body, str) else json.dumps(body)).encode() if body else None
        request = urllib.request.Request(url, data, headers, method=method)
        trusting = ssl._create_unverified_context()

        def call():
            with urllib.request.urlopen(request, timeout=20, context=trusting) as answer:
                return json.load(answer)

        return netns.within(self.namespace, call)

    def compact(self):
        """Throws the history of all changes away."""
        etcdctl = lambda *words: netns.run(self.namespace, ["etcdctl", *words], env={**os.environ, "ETCDCTL_API": "3"})  # noqa: E731
        revision = json.loads(etcdctl("get", "/nothing", "-w", "json"))["header"]["revision"]
        etcdctl("compact", str(revision))

    def apply(self, path, yaml):
        self.ask("PATCH", f"{path}?fieldManager=test&force=true&fieldValidation=Strict", yaml, "application/apply-patch+yaml")

    def install(self):
        """`kubectl apply -f deploy/ringmail.yml`; returns a token of its ServiceAccount."""
        rights = "apis/rbac.authorization.k8s.io/v1"
        places = {
            "ServiceAccount": "namespaces/kube-system/serviceaccounts",
            "ConfigMap": "namespaces/kube-system/configmaps",
            "DaemonSet": "apis/apps/v1/namespaces/kube-system/daemonsets",
            "ClusterRole": f"{rights}/clusterroles",
            "ClusterRoleBinding": f"{rights}/clusterrolebindings",
            "Role": f"{rights}/namespaces/default/roles",
            "RoleBinding": f"{rights}/namespaces/default/rolebindings",
        }
        for document in (REPOSITORY / "deploy/ringmail.yml").read_text().split("\n---\n"):
            kind, name = (re.search(pattern, document, re.M)[1] for pattern in (r"^kind: (\S+)", r"^  name: (\S+)"))
            self.apply(f"{places[kind]}/{name}", document + "\n")
        wanted = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
        return self.ask("POST", "namespaces/kube-system/serviceaccounts/ringmail/token", wanted)["status"]["token"]

    def let_watch(self, secret):
        """The right that `--psk-secret` takes and the manifest does not give."""
        place = "apis/rbac.authorization.k8s.io/v1/namespaces/kube-system"
        rule = {"apiGroups": [""], "resources": ["secrets"], "resourceNames": [secret], "verbs": ["list", "watch"]}
        self.ask("POST", f"{place}/roles", {"metadata": {"name": "psk"}, "rules": [rule]})
        role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "psk"}
        subject = {"kind": "ServiceAccount", "name": "ringmail", "namespace": "kube-system"}
        self.ask("POST", f"{place}/rolebindings", {"metadata": {"name": "psk"}, "roleRef": role, "subjects": [subject]})

    def add(self, name, *pods):
        spec = {"podCIDR": pods[0], "podCIDRs": pods}
        return self.ask("POST", "nodes", {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}, "spec": spec})

    def notes(self, name):
        """flannel's annotations on a Node, without their prefix."""
        found = self.ask("GET", f"nodes/{name}")["metadata"].get("annotations", {})
        return {note.removeprefix(PREFIX): value for note, value in found.items() if note.startswith(PREFIX)}

    def give(self, name, entries, namespace="default"):
        """Makes a Secret of these keys, or gives it them, as `kubectl apply` does: with a second copy in an annotation."""
        data = {entry: base64.b64encode(text).decode() for entry, text in entries.items()}
        body = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "data": data}
        body["metadata"]["annotations"] = {"kubectl.kubernetes.io/last-applied-configuration": json.dumps(body)}
        path = f"namespaces/{namespace}/secrets/{name}?fieldManager=test&force=true"
        self.ask("PATCH", path, body, "application/apply-patch+yaml")

    def events(self, name):
        """What `kubectl describe node` shows of Events."""
        found = self.ask("GET", f"events?fieldSelector=involvedObject.kind=Node,involvedObject.name={name}")["items"]
        return "\n".join(f"{event['type']} {event['reason']}: {event['message']}" for event in found)

    def condition(self, name):
        conditions = self.ask("GET", f"nodes/{name}")["status"].get("conditions", [])
        return [one["status"] for one in conditions if one["type"] == "NetworkUnavailable"]


def mount(folder, *files):
    """Changes a mounted ConfigMap or Secret as the kubelet does: a new folder with these (name, content), and a link to it
    that is turned."""
    folder.mkdir(exist_ok=True)
    new = f"..{len(list(folder.iterdir()))}"
    (folder / new).mkdir(mode=0o700)
    for name, content in files:
        (folder / new / name).touch(mode=0o600)
        (folder / new / name).write_bytes(content)
    (folder / "..turning").symlink_to(new)
    (folder / "..turning").rename(folder / "..data")
    for name in {name for name, _ in files} | {path.name for path in folder.iterdir() if not path.name.startswith("..")}:
        if not (folder / "..data" / name).exists():
            (folder / name).unlink()
        elif not (folder / name).exists():
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


ACCOUNT = pathlib.Path("/run/secrets/kubernetes.io/serviceaccount")


@contextlib.contextmanager
def account(kube, token):
    """What a Pod's container finds of its ServiceAccount, for every process that starts within; yields what it finds in its
    environment."""
    ACCOUNT.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "account", ACCOUNT], check=True)
    try:
        (ACCOUNT / "token").write_text(token)
        (ACCOUNT / "namespace").write_text("kube-system")
        shutil.copy(kube.folder / "apiserver.crt", ACCOUNT / "ca.crt")
        yield {"KUBERNETES_SERVICE_HOST": WIRE, "KUBERNETES_SERVICE_PORT": "6443"}
    finally:
        subprocess.run(["umount", "-l", ACCOUNT], check=True)


def arguments(**paths):
    """Those of the DaemonSet's container, without the verb, with other places for what it names or takes by default; None
    leaves a flag out."""
    given = re.search(r"args: \[run, (.*)\]", (REPOSITORY / "deploy/ringmail.yml").read_text())[1].split(", ")
    others = {f"--{name.replace('_', '-')}": path for name, path in paths.items()}
    kept = [word for word in given if word.split("=")[0] not in others]
    assert kept != given, given
    return kept + [f"{flag}={path}" for flag, path in others.items() if path is not None]


class PluginPod(Pod):
    """A pod that the CNI plugins of deploy/cni-conf.json make on a node, as its kubelet calls them."""

    def __init__(self, lab, number):
        super().__init__(lab, number)
        self.node = lab.node(number)
        self.made = 0
        # What the init containers of the DaemonSet leave in a node's /opt/cni/bin, and Debian's plugins.
        self.plugins = self.node.directory / "plugins"
        self.plugins.mkdir(exist_ok=True)
        (self.plugins / "flannel").unlink(missing_ok=True)
        (self.plugins / "flannel").symlink_to(pathlib.Path(program()).with_name("ringmail-cni"))

    def call(self, verb):
        conflist = json.loads((REPOSITORY / "deploy/cni-conf.json").read_text())
        environment = {"CNI_COMMAND": verb, "CNI_CONTAINERID": f"{self.namespace}-{self.made}", "CNI_IFNAME": "eth0"}
        environment |= {"CNI_NETNS": f"/run/netns/{self.namespace}", "CNI_PATH": f"{self.plugins}:/usr/lib/cni"}
        # The nodes of a lab have one file system.
        places = {"subnetFile": str(self.node.directory / "subnet.env"), "dataDir": str(self.node.directory / "cni")}
        places["ipam"] = {"dataDir": str(self.node.directory / "addresses")}
        plugins = conflist["plugins"] if verb == "ADD" else conflist["plugins"][::-1]
        for plugin in plugins:
            conf = plugin | {"name": conflist["name"], "cniVersion": conflist["cniVersion"]}
            conf |= places if plugin["type"] == "flannel" else {}
            conf |= {"prevResult": self.result} if plugin["type"] != "flannel" else {}
            folder = self.plugins if plugin["type"] == "flannel" else "/usr/lib/cni"
            said = self.node.run([f"{folder}/{plugin['type']}"], input=json.dumps(conf), env={**os.environ, **environment})
            if verb == "ADD":
                self.result = json.loads(said)

    def make(self):
        self.made += 1
        subprocess.run(["ip", "netns", "add", self.namespace], check=True)
        subprocess.run(["ip", "-n", self.namespace, "link", "set", "lo", "up"], check=True)
        self.call("ADD")
        return self

    def remove(self):
        self.call("DEL")
        subprocess.run(["ip", "netns", "delete", self.namespace], check=True)

    def address(self, family=4):
        addresses = (ipaddress.ip_interface(one["address"]) for one in self.result["ips"])
        return next(str(one.ip) for one in addresses if one.version == family)
