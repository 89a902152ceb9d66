"""The container image that deploy/image wrote (RINGMAIL_IMAGE): taken apart as a registry and a runtime do, and run."""

import gzip
import hashlib
import io
import json
import os
import pathlib
import re
import subprocess
import tarfile

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
IMAGE = pathlib.Path(os.environ["RINGMAIL_IMAGE"])
NET_CONF = '{"Network": "10.244.0.0/16", "Backend": {"Type": "ipsec"}}'


class Layout:
    """The tar of an image, each blob checked against the digest that it is asked for by."""

    def __init__(self, path):
        with tarfile.open(path) as archive:
            self.files = {entry.name: archive.extractfile(entry).read() for entry in archive if entry.isfile()}
        self.asked = {"oci-layout", "index.json"}

    def json(self, name):
        return json.loads(self.files[name])

    def blob(self, descriptor):
        algorithm, digest = descriptor["digest"].split(":")
        name = f"blobs/{algorithm}/{digest}"
        data = self.files[name]
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (digest, descriptor["size"]), name
        self.asked.add(name)
        return data


@pytest.fixture(scope="module")
def layout():
    return Layout(IMAGE)


@pytest.fixture(scope="module")
def config(layout):
    assert layout.json("oci-layout") == {"imageLayoutVersion": "1.0.0"}
    (entry,) = layout.json("index.json")["manifests"]
    manifest = json.loads(layout.blob(entry))
    config = json.loads(layout.blob(manifest["config"]))
    (layer,) = manifest["layers"]
    config["tree"] = gzip.decompress(layout.blob(layer))
    assert config["rootfs"]["diff_ids"] == ["sha256:" + hashlib.sha256(config["tree"]).hexdigest()]
    assert layout.asked == set(layout.files), "nothing else is in it"
    return config


@pytest.fixture(scope="module")
def root(config, tmp_path_factory):
    """The file system of the image."""
    root = tmp_path_factory.mktemp("root")
    with tarfile.open(fileobj=io.BytesIO(config["tree"])) as archive:
        archive.extractall(root)
    return root


def run(root, *command, given=""):
    """Runs a command as in a container of the image; what it said."""
    done = subprocess.run(["/usr/sbin/chroot", root, *command], env={"PATH": "/bin"}, input=given, capture_output=True, text=True)
    assert done.returncode == 0, (command, done)
    return done.stdout


def test_it_is_small_and_has_the_name_that_the_manifests_ask_for(layout, config):
    assert IMAGE.stat().st_size < 25 << 20
    (entry,) = layout.json("index.json")["manifests"]
    image = entry["annotations"]["io.containerd.image.name"].removeprefix("docker.io/library/")
    for manifest in ("ringmail.yml", "cleanup.yml"):
        lines = (REPOSITORY / "deploy" / manifest).read_text().splitlines()
        asked = {line.split("image:")[1].strip() for line in lines if "image: ringmail" in line}
        assert asked == {image}, manifest
    assert f"appVersion: {image.split(':')[1]}\n" in (REPOSITORY / "deploy/chart/Chart.yaml").read_text()


def test_its_programs_run_with_nothing_beside_them(root, config):
    entrypoint = config["config"]["Entrypoint"]
    version = config["config"]["Labels"]["org.opencontainers.image.version"]
    assert run(root, *entrypoint, "--version") == f"ringmail {version}\n"
    key = run(root, *entrypoint, "keygen")
    (root / "net-conf.json").write_text(NET_CONF)
    (root / "psk").touch(0o600)
    (root / "psk").write_text(key)
    # A host name is looked for without a C library beside it.
    shown = run(root, *entrypoint, "config", "check", "/net-conf.json", "--psk-file", "/psk", "--", "--node-name=n1")
    assert "Backend.Type" in shown and "ipsec" in shown


def test_the_manifests_init_containers_put_plugin_and_conflist_in_their_places(root):
    (root / "etc/kube-flannel").mkdir(parents=True)
    (root / "etc/kube-flannel/cni-conf.json").write_text("{}")
    steps = re.findall(r"args: \[(install, .*)\]", (REPOSITORY / "deploy/ringmail.yml").read_text())
    assert len(steps) == 2
    for step in steps:
        run(root, "/bin/ringmail", *step.split(", "))
    for plugin in ("opt/cni/bin/ringmail-cni", "opt/cni/bin/flannel"):
        assert (root / plugin).read_bytes() == (root / "bin/ringmail-cni").read_bytes() and os.access(root / plugin, os.X_OK)
    assert (root / "etc/cni/net.d/10-flannel.conflist").read_text() == "{}"


def test_flannels_manifest_finds_its_commands(root):
    (root / "run").mkdir(exist_ok=True)
    (root / "cni-conf.json").write_text("{}")
    run(root, "cp", "-f", "/flannel", "/run/flannel-plugin")
    assert (root / "run/flannel-plugin").read_bytes() == (root / "bin/ringmail-cni").read_bytes()
    assert os.access(root / "run/flannel-plugin", os.X_OK)
    run(root, "/opt/bin/install-conf", "/cni-conf.json", "/run/10-flannel.conflist")
    assert (root / "run/10-flannel.conflist").read_text() == "{}"
    assert "--kube-subnet-mgr" in run(root, "/opt/bin/flanneld", "--help")
    plugin = subprocess.run(["/usr/sbin/chroot", root, "/flannel"], env={"CNI_COMMAND": "VERSION"}, input='{"cniVersion": "1.0.0"}', capture_output=True, text=True)
    assert "1.1.0" in json.loads(plugin.stdout)["supportedVersions"], plugin
