#!/usr/bin/env python3
"""What flannel's own plugin makes of a list of configurations: writes flannel.json beside this file, which
golden.rs holds ringmail's plugin against.

    tests/cni/measure.py /path/to/flannel        (github.com/flannel-io/cni-plugin, `go build`; 1.9.1 made what is there)

Each case has a configuration and a subnet.env; the delegate is a script that keeps what it is given. {dir} stands for a
folder of the case's own, so that texts with a path compare."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile

V4 = "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
V6 = "FLANNEL_IPV6_NETWORK=fd00::/48\nFLANNEL_IPV6_SUBNET=fd00:0:0:1::1/64\nFLANNEL_MTU=1280\nFLANNEL_IPMASQ=false\n"
DUAL = "FLANNEL_NETWORK=10.244.0.0/16,10.244.0.0/16,10.245.0.0/16\nFLANNEL_IPV6_NETWORK=fd00::/48\n" + (
    "FLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_IPV6_SUBNET=fd00:0:0:1::1/64\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
)
# As kube-flannel.yml has it.
KUBE = {"name": "cbr0", "cniVersion": "0.3.1", "type": "flannel", "delegate": {"hairpinMode": True, "isDefaultGateway": True}}


def conf(**more):
    return {"name": "cbr0", "cniVersion": "1.0.0", "type": "flannel", **more}


def routes(*list_):
    return conf(ipam={"routes": list(list_)})


def without(text, *keys):
    return "".join(line + "\n" for line in text.splitlines() if line.split("=")[0].removeprefix("FLANNEL_") not in keys)


CASES = [
    # name, configuration, subnet.env (None: there is none), command
    ("kube-flannel.yml, dual stack, a host port", {**KUBE, "runtimeConfig": {"portMappings": [{"hostPort": 1}]}}, DUAL),
    ("kube-flannel.yml", KUBE, V4),
    ("nothing said", conf(), V4),
    ("IPv6 alone", conf(), V6),
    ("no version", {"name": "n"}, V4),
    ("an empty version", {"name": "n", "cniVersion": ""}, V4),
    ("version 0.4.0", {"name": "n", "cniVersion": "0.4.0"}, V4),
    ("another delegate", conf(delegate={"type": "ptp"}), V4),
    ("a delegate's own words go first", conf(delegate={"type": "bridge", "ipMasq": True, "mtu": 1400, "isGateway": False}), V4),
    ("null is a word", conf(delegate={"mtu": None, "ipMasq": None, "isGateway": None}), V4),
    ("numbers and nested values", conf(delegate={"vlan": 7, "bandwidth": {"rate": 1.5, "list": [1, "a", None, {}]}}), V4),
    ("an empty delegate", conf(delegate={}), V4),
    ("a null delegate", conf(delegate=None), V4),
    ("the delegate's runtimeConfig is replaced", conf(delegate={"runtimeConfig": {"a": 1}}, runtimeConfig={"b": 2}), V4),
    ("the delegate's runtimeConfig", conf(delegate={"runtimeConfig": {"a": 1}}), V4),
    ("an empty runtimeConfig", conf(runtimeConfig={}), V4),
    ("the delegate's version is replaced", conf(delegate={"cniVersion": "0.3.1"}), V4),
    ("the delegate's version without one", {"name": "n", "delegate": {"cniVersion": "0.3.1"}}, V4),
    ("prevResult, dns, args, capabilities stay behind", conf(dns={"domain": "x"}, args={"a": 1}, capabilities={"b": True}), V4),
    ("ipam of its own", conf(ipam={"type": "dhcp", "ranges": [["gone"]], "dataDir": "/x", "more": {"a": [1]}}), V4),
    ("an empty ipam", conf(ipam={}), V4),
    ("a null ipam", conf(ipam=None), V4),
    ("routes", routes({"dst": "0.0.0.0/0"}, {"dst": "10.1.2.3/8", "gw": "10.244.1.9"}), V4),
    ("routes, dual", routes({"dst": "fd00:0::1/64", "gw": "fd00:0:0:1::9", "mtu": 1300}, {"dst": "10.244.0.0/16"}), DUAL),
    ("routes, every key", routes({"dst": "1.2.3.0/24", "mtu": 1, "advmss": 2, "priority": 3, "table": 0, "scope": 0}), V4),
    ("routes, zeros and nulls", routes({"dst": "1.2.3.0/24", "mtu": 0, "advmss": 0, "priority": 0, "table": None, "gw": ""}), V4),
    ("null routes", conf(ipam={"routes": None}), V4),
    ("no routes", routes(), V4),
    ("keys in another case", {"Name": "n", "CNIVERSION": "1.0.0", "Delegate": {"type": "bridge"}, "IPAM": {"type": "x"}}, V4),
    ("not masqueraded", conf(), V4.replace("=true", "=false")),
    ("masqueraded means true to the letter", conf(), V4.replace("=true", "=True")),
    ("unknown lines, blank lines", conf(), "\n# FLANNEL_MTU=9\nFLANNEL_X\n=\n\n" + V4 + "\n FLANNEL_MTU=7\n"),
    ("the last of a key counts", conf(), V4 + "FLANNEL_MTU=1300\nFLANNEL_NETWORK=10.0.0.0/8\n"),
    ("lines of Windows", conf(), V4.replace("\n", "\r\n")),
    ("host bits in a network", conf(), V4.replace("10.244.0.0/16", "10.244.7.9/16,10.244.0.0/16")),
    ("IPv6 under the keys of IPv4", conf(), V4.replace("10.244.0.0/16", "fd00::/48").replace("10.244.1.1/24", "fd00::1:1/112")),
    ("the largest MTU", conf(), V4.replace("1450", "4294967295")),
    # What goes wrong.
    ("no subnet.env", conf(), None),
    ("an empty subnet.env", conf(), ""),
    *((f"without {key}", conf(), without(V4, key)) for key in ["NETWORK", "SUBNET", "MTU", "IPMASQ"]),
    ("without MTU, IPMASQ", conf(), without(V4, "MTU", "IPMASQ")),
    ("an MTU of letters", conf(), V4.replace("1450", "abc")),
    ("no MTU", conf(), V4.replace("1450", "")),
    ("a signed MTU", conf(), V4.replace("1450", "+1450")),
    ("a quoted MTU", conf(), V4.replace("1450", '"1450"')),
    ("too large an MTU", conf(), V4.replace("1450", "4294967296")),
    ("no network", conf(), V4.replace("10.244.0.0/16", "")),
    ("a bad network", conf(), V4.replace("10.244.0.0/16", "10.244.0.0/33")),
    ("a bad network in a list", conf(), V4.replace("10.244.0.0/16", "10.244.0.0/16, 10.245.0.0/16")),
    ("a bad subnet", conf(), V4.replace("10.244.1.1/24", "10.244.1.1")),
    ("the delegate's type is no string", conf(delegate={"type": 1}), V4),
    ("the delegate's type is null", conf(delegate={"type": None}), V4),
    ("the delegate has a name", conf(delegate={"name": "x"}), V4),
    ("the delegate has ipam", conf(delegate={"ipam": {}}), V4),
    ("the delegate's type comes before its name", conf(delegate={"name": "x", "type": 1}), V4),
    ("a bad destination", routes({"dst": "10.0.0.0"}), V4),
    ("incompatible version", {"name": "n", "cniVersion": "9.9.9"}, V4),
    ("no name", {"cniVersion": "1.0.0"}, V4),
    ("an empty name", {"name": ""}, V4),
    ("a bad name", {"name": "a/b"}, V4),
    ("no such delegate", conf(delegate={"type": "none"}), V4),
    ("a delegate elsewhere", conf(delegate={"type": "../bridge"}), V4),
    ("an empty delegate's type", conf(delegate={"type": ""}), V4),
    ("CHECK under 0.3.1", KUBE, V4, "CHECK"),
    ("STATUS under 1.0.0", conf(), V4, "STATUS"),
    ("GC under 1.0.0", conf(), V4, "GC"),
    ("CHECK under a version to come", {"name": "n", "cniVersion": "1.2.0"}, V4, "CHECK"),
    ("an unknown command", conf(), V4, "FOO"),
    ("an unknown command, no name", {}, V4, "FOO"),
    ("VERSION", conf(), V4, "VERSION"),
]


def run(plugin, name, given, env, command="ADD"):
    with tempfile.TemporaryDirectory() as folder:
        at = pathlib.Path(folder)
        (at / "bin").mkdir()
        for kind in ["bridge", "ptp"]:
            stub = at / "bin" / kind
            stub.write_text(f"#!/bin/sh\ncat >{folder}/given\necho '{{}}'\n")
            stub.chmod(0o755)
        if env is not None:
            (at / "subnet.env").write_text(env)
        text = json.dumps({**given, "subnetFile": f"{folder}/subnet.env", "dataDir": f"{folder}/data"})
        variables = {"CNI_COMMAND": command, "CNI_CONTAINERID": "c", "CNI_IFNAME": "eth0", "CNI_NETNS": "/none"}
        environment = {**os.environ, **variables, "CNI_PATH": f"{folder}/bin"}
        done = subprocess.run([plugin], input=text, env=environment, capture_output=True, text=True)
        case = {"name": name, "command": command, "conf": given, "env": env}
        if (at / "given").exists():
            return case | {"delegate": json.loads((at / "given").read_text())}
        return case | {"exit": done.returncode, "says": json.loads(done.stdout.replace(folder, "{dir}"))}


def main():
    plugin = os.path.abspath(sys.argv[1])
    cases = [run(plugin, *case) for case in CASES]
    lines = ",\n".join(json.dumps(case, sort_keys=True) for case in cases)
    (pathlib.Path(__file__).parent / "flannel.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
