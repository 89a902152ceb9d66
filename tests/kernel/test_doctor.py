"""Each trouble is made for real, doctor names it, it is undone, and doctor finds nothing any more.

One mesh of two nodes for the file; a third joins and leaves. What is about keys, plaintext and the machine is made in
test_doctor_keys.py. Rules of nftables, whose families User Mode Linux lacks, are made in this machine's kernel by
src/doctor/tests.rs.

The guest's clock is an hour behind until the tests of clocks: epochs, which only rise, leave room for them."""

import json
import os
import re
import signal
import socket
import subprocess
import tarfile

import pytest

import frames
import netns
from examining import GUEST, NETWORK, clean, conf, doctor, examined, files, ghost, leave, meanwhile, named, set_clock
from examining import set_clock_back, start
from rig import eventually, program
from running import PSK, spellings


@pytest.fixture(scope="module")
def mesh(keywatch):
    set_clock(-3600)
    try:
        with examined("doctor", keywatch) as mesh:
            yield mesh
    finally:
        set_clock_back()


@pytest.fixture(autouse=True)
def watched(request, mesh, keywatch):
    request.node.labs = [mesh.lab]
    yield
    mesh.lab.wire.assert_clean()
    keywatch.check()


def test_a_healthy_mesh_has_no_finding(mesh):
    clean(mesh, 1, 2)
    assert doctor(mesh, 1, 2) == [], "and while its counters are watched"
    text = mesh.lab.node(1).ringmail("doctor", "--watch", "0", "--cni-conf-dir", str(mesh.cni))
    assert text.startswith("nothing is found\n"), text


# What is done to node 1 with commands there, what undoes it, and the findings: each with a part of its command. The
# faults of a group are made together.
BY_COMMAND = {
    "policies": {
        "another program's in our place": (
            "ip xfrm policy update dir out src 0.0.0.0/0 dst 10.244.2.0/24 priority 100",
            "ip xfrm policy delete dir out src 0.0.0.0/0 dst 10.244.2.0/24",
            [("policy-shadow", "src 0.0.0.0/0 dst 10.244.2.0/24"), ("drift", "ip xfrm policy get dir out src 0.0.0.0/0")],
        ),
        "another program's before ours": (
            "ip xfrm policy add dir out src 0.0.0.0/0 dst 10.244.2.128/25 priority 100",
            "ip xfrm policy delete dir out src 0.0.0.0/0 dst 10.244.2.128/25",
            [("policy-shadow", "ip xfrm policy delete dir out src 0.0.0.0/0 dst 10.244.2.128/25")],
        ),
        "another program's before ours, on the way in": (
            "ip xfrm policy add dir in src 10.244.2.128/25 dst 0.0.0.0/0 priority 100",
            "ip xfrm policy delete dir in src 10.244.2.128/25 dst 0.0.0.0/0",
            [("policy-shadow", "ip xfrm policy delete dir in src 10.244.2.128/25 dst 0.0.0.0/0")],
        ),
        "another program's in the guard's place": (
            "ip xfrm policy update dir out src 0.0.0.0/0 dst 10.244.0.0/20 priority 4000000000",
            "ip xfrm policy delete dir out src 0.0.0.0/0 dst 10.244.0.0/20",
            [
                ("plaintext-open", "ringmail audit"),
                ("in-the-way", "ip xfrm policy delete dir out src 0.0.0.0/0 dst 10.244.0.0/20"),
            ],
        ),
    },
    "routes, devices, settings": {
        "a longer route": (
            "ip route add 10.244.2.128/25 via 192.168.77.254",
            "ip route del 10.244.2.128/25",
            [("route-shadow", "ip route delete 10.244.2.128/25 via 192.168.77.254 dev eth0")],
        ),
        "an address of a peer's here": (
            "ip address add 10.244.2.9/32 dev lo",
            "ip address del 10.244.2.9/32 dev lo",
            [("route-shadow", "ip address show to 10.244.2.9/32")],
        ),
        "another network within the Network": (
            "ip link add docker0 type dummy; ip address add 10.244.9.1/24 dev docker0; ip link set docker0 up",
            "ip link del docker0",
            [("network-overlap", "ip route delete 10.244.9.0/24 dev docker0")],
        ),
        "a rule before the table main": (
            "ip rule add to 10.244.2.0/24 lookup 77 priority 100; ip route add default via 192.168.77.254 table 77",
            "ip rule del priority 100; ip route flush table 77",
            [("rule-shadow", "ip rule delete priority 100")],
        ),
        "a rule that ends the search": (
            "ip rule add to 10.244.2.0/24 blackhole priority 101",
            "ip rule del priority 101",
            [("rule-shadow", "ip rule delete priority 101")],
        ),
        "a pod's device too large": (
            "ip link set pod mtu 1500",
            "ip link set pod mtu 1446",
            [("pod-mtu", "ip link set dev pod mtu 1446")],
        ),
        "no forwarding": (
            "echo 0 >/proc/sys/net/ipv4/conf/cni0/forwarding",
            "echo 1 >/proc/sys/net/ipv4/conf/cni0/forwarding",
            [("forwarding", "sysctl -w net/ipv4/conf/cni0/forwarding=1")],
        ),
        "a strict reverse path filter": (
            "echo 1 >/proc/sys/net/ipv4/conf/eth0/rp_filter; ip link add other type dummy; ip link set other up;"
            " ip route add 192.168.77.2/32 dev other",
            "ip link del other; echo 0 >/proc/sys/net/ipv4/conf/eth0/rp_filter",
            [("rp-filter", "net/ipv4/conf/eth0/rp_filter=2")],
        ),
        "a device of another network program": (
            "ip link add cilium_host type dummy",
            "ip link del cilium_host",
            [("leftover-device", "ip link delete cilium_host")],
        ),
        "rules of another network program": (
            "iptables-legacy -w -N cali-INPUT",
            "iptables-legacy -w -X cali-INPUT",
            [("leftover-rules", "Calico")],
        ),
    },
    "a packet filter's rules": {
        "ESP dropped by iptables": (
            "iptables-legacy -w -A INPUT -p esp -j DROP",
            "iptables-legacy -w -D INPUT -p esp -j DROP",
            [("filter-drops", "iptables-legacy -t filter -D INPUT -p esp -j DROP")],
        ),
        "ESP dropped on the way out, by a chain of another program": (
            "iptables-legacy -w -N HOST; iptables-legacy -w -A HOST -d 192.168.77.2 -p esp -j REJECT;"
            " iptables-legacy -w -A OUTPUT -o eth+ -j HOST",
            "iptables-legacy -w -F HOST; iptables-legacy -w -D OUTPUT -o eth+ -j HOST; iptables-legacy -w -X HOST",
            [("filter-drops", "iptables-legacy -t filter -D HOST -d 192.168.77.2/32 -p esp -j REJECT")],
        ),
        "what pods receive dropped": (
            "iptables-legacy -w -A FORWARD -d 10.244.1.0/24 -j DROP",
            "iptables-legacy -w -D FORWARD -d 10.244.1.0/24 -j DROP",
            [("filter-drops", "iptables-legacy -t filter -D FORWARD -d 10.244.1.0/24 -j DROP")],
        ),
        "what pods send not accepted": (
            "iptables-legacy -w -A FORWARD -s 10.9.0.0/16 -j ACCEPT; iptables-legacy -w -P FORWARD DROP",
            "iptables-legacy -w -P FORWARD ACCEPT; iptables-legacy -w -D FORWARD -s 10.9.0.0/16 -j ACCEPT",
            [("filter-drops", "iptables-legacy -t filter -I FORWARD -s 10.244.0.0/20 -j ACCEPT")],
        ),
    },
    "a packet filter's policy": {
        "what is not accepted dropped by iptables": (
            "iptables-legacy -w -A INPUT -p tcp --dport 22 -j ACCEPT; iptables-legacy -w -P INPUT DROP",
            "iptables-legacy -w -P INPUT ACCEPT; iptables-legacy -w -D INPUT -p tcp --dport 22 -j ACCEPT",
            [("filter-drops", "iptables-legacy -t filter -I INPUT -p esp -j ACCEPT")],
        ),
    },
}


@pytest.mark.parametrize("group", BY_COMMAND)
def test_what_is_done_by_a_command_is_named_with_the_command_that_undoes_it(mesh, group):
    node, faults = mesh.lab.node(1), BY_COMMAND[group].values()
    expected = [one for _, _, findings in faults for one in findings]
    last = []

    def missing():
        last[:] = [(one["check"], one["command"]) for one in doctor(mesh, 1)]
        return [(check, part) for check, part in expected if not any(check == c and part in text for c, text in last)]

    try:
        node.run("; ".join(make for make, _, _ in faults))
        eventually(f"doctor finds all of {expected}", lambda: not missing(), 15)
    except AssertionError as error:
        raise AssertionError(f"{error}; it found {last}") from None
    finally:
        node.run("; ".join(undo for _, undo, _ in faults), check=False)
    clean(mesh, 1)


def test_what_lies_in_files_is_named(mesh):
    node = mesh.lab.node(1)
    env = node.directory / "subnet.env"
    good = env.read_text()
    with files(mesh.cni / "05-cilium.conflist"):
        (mesh.cni / "05-cilium.conflist").write_text(json.dumps({"plugins": [{"type": "cilium-cni"}]}))
        assert "05-cilium.conflist" in named(mesh, 1, "cni-order")["command"]
    # Seen by doctor alone: the daemon, in a mount namespace of its own, would put it right at once.
    for check, text in [
        ("subnet-env-mtu", good.replace("1446", "1500")),
        ("subnet-env-subnet", good.replace("10.244.1.1/24", "10.244.7.1/24")),
    ]:
        other = mesh.folder / "other.env"
        other.write_text(text)
        subprocess.run(["mount", "--bind", other, env], check=True)
        try:
            named(mesh, 1, check)
        finally:
            subprocess.run(["umount", env], check=True)
    env.unlink()
    env.mkdir()
    try:
        named(mesh, 1, "subnet-env-missing")
        named(mesh, 1, "problem")
    finally:
        env.rmdir()
    clean(mesh, 1)


def test_what_is_wrong_with_leases_is_named(mesh):
    bad = mesh.lease_dir / "10.244.13.0-24.json"
    with files(bad):
        bad.write_text("no lease")
        assert named(mesh, 1, "lease-unreadable")["subject"] == bad.name
    with files(ghost(mesh, 20, "10.99.5.0-24"), ghost(mesh, 21, "10.244.2.0-25")):
        assert "ghost20 holds it, the Network is" in named(mesh, 1, "subnet-outside")["evidence"]
        assert "has a lease of 10.244.2.0/24, ghost21" in named(mesh, 1, "subnet-twice")["evidence"]
    ghosts = [mesh.lease_dir / f"10.244.{number}.0-24.json" for number in range(3, 16)]
    with files(*ghosts):
        for number in range(3, 15):
            ghost(mesh, number)
        assert "14 of 15" in named(mesh, 1, "subnets-nearly-used-up")["evidence"]
        assert "ghost" in named(mesh, 1, "peer-refused")["subject"]
        ghost(mesh, 15)
        assert "15 of 15" in named(mesh, 1, "subnets-used-up")["evidence"]
        start(mesh, 3)
        named(mesh, 3, "lease-missing")
        mesh.lab.node(3).stop()
    clean(mesh, 1, 2)


def test_another_node_with_this_ones_address_is_named(mesh):
    start(mesh, 3, "--public-ip", "192.168.77.1")
    try:
        assert "192.168.77.1" in named(mesh, 1, "claimed-twice")["evidence"]
        named(mesh, 2, "peer-refused")
    finally:
        leave(mesh, 3)
    clean(mesh, 1, 2)


def test_store_configuration_and_psk_are_named(mesh):
    node = mesh.lab.node(1)
    away = mesh.lease_dir.with_name("away")
    os.rename(mesh.lease_dir, away)
    try:
        named(mesh, 1, "store-outage", timeout=40)
    finally:
        os.rename(away, mesh.lease_dir)
    clean(mesh, 1, timeout=60)
    subprocess.run(["mount", "-o", "remount,ro", mesh.store], check=True)
    asker = netns.spawn(node.namespace, [program(), "rotate", "--run-dir", str(node.run_dir)], stderr=subprocess.DEVNULL)
    try:
        assert "can't be written" in named(mesh, 1, "store-outage")["evidence"]
    finally:
        asker.kill()
        asker.wait()
        subprocess.run(["mount", "-o", "remount,rw", mesh.store], check=True)
    clean(mesh, 1, timeout=60)
    conf(mesh, UDPEncap="maybe")
    named(mesh, 1, "configuration-refused")
    conf(mesh)
    clean(mesh, 1)
    conf(mesh, AllowPlaintextPeers=True)
    assert "no peer needs it" in named(mesh, 1, "plaintext-allowed")["evidence"]
    flannels = mesh.lease_dir / "10.244.9.0-24.json"
    with files(flannels):
        data = {"VNI": 1, "VtepMAC": "02:00:00:00:00:09"}
        lease = {"Node": "flannels", "PublicIP": "192.168.77.109", "BackendType": "vxlan", "BackendData": data}
        flannels.write_text(json.dumps(lease))
        said = lambda: named(mesh, 1, "plaintext-allowed")["evidence"].startswith("1 of 2 peers in PLAINTEXT")  # noqa: E731
        eventually("the peer in plaintext is counted", said)
    conf(mesh)
    clean(mesh, 1, 2)
    node.psk.unlink()
    named(mesh, 1, "psk-unreadable")
    mesh.write_psk(PSK, node.psk)
    clean(mesh, 1)
    mesh.write_psk("QW5vdGhlciBrZXkgZm9yIHRlc3RzIG9mIHRoaXMgcmVwbw", node.psk)
    assert "give" in named(mesh, 1, "psk-needed")["command"]
    mesh.write_psk(PSK, node.psk)
    clean(mesh, 1, 2)


def test_a_daemon_that_hangs_or_is_gone_is_named_and_a_silent_peer_with_what_silences_it(mesh):
    one, two = mesh.lab.node(1), mesh.lab.node(2)
    os.kill(two.pid, signal.SIGSTOP)
    lease = mesh.lease(2)
    kept = lease.read_text()
    lease.unlink()
    try:
        assert "gone from the store" in named(mesh, 1, "peer-doubtful")["evidence"]
    finally:
        lease.write_text(kept)
        os.kill(two.pid, signal.SIGCONT)
    mesh.in_order(1, 2)
    one.stop()
    assert "systemctl" in named(mesh, 1, "daemon-absent")["command"]
    # As the DaemonSet's container has it.
    pod = ["env", "KUBERNETES_SERVICE_HOST=10.96.0.1", "POD_NAMESPACE=net", "NODE_NAME=node-x"]
    told = one.run([*pod, program(), "doctor", "--json", "--watch", "0", "--run-dir", str(one.run_dir)], check=False).stdout
    (absent,) = [found for found in json.loads(told)["findings"] if found["check"] == "daemon-absent"]
    assert absent["command"].endswith("kubectl -n net delete pod -l app=flannel --field-selector spec.nodeName=node-x"), absent
    silenced = "iptables-legacy -w -{0} INPUT -p esp -j DROP; iptables-legacy -w -{0} OUTPUT -p esp -j DROP"
    two.run(silenced.format("A"))
    start(mesh, 1)
    named(mesh, 1, "peer-kept")
    one.stop()
    # Without what the process before left there is nothing to go on with.
    one.ringmail("cleanup")
    mesh.had(one)
    start(mesh, 1)
    assert '"UDPEncap": "auto"' in named(mesh, 1, "esp-filtered")["command"]
    two.run("iptables-legacy -w -I INPUT -s 192.168.77.1 -j DROP")
    named(mesh, 1, "peer-unreachable")
    two.run("iptables-legacy -w -D INPUT -s 192.168.77.1 -j DROP; " + silenced.format("D"))
    mesh.in_order(1, 2)
    clean(mesh, 1, 2)


def test_peers_that_stop_answering_are_named_with_what_silences_each(mesh):
    """The daemon of node 3 hangs, and is killed then; of node 2 only what goes there is dropped."""
    two, three = mesh.lab.node(2), mesh.lab.node(3)
    conf(mesh, EncapPort=4600)
    start(mesh, 3)
    mesh.in_order(1, 2, 3)
    os.kill(three.pid, signal.SIGSTOP)
    cut = "iptables-legacy -w -{0} INPUT -s 192.168.77.1 -p esp -j DROP"
    two.run(cut.format("A"))

    def silent(number):
        found = [one for one in doctor(mesh, number) if one["check"] == "peer-silent"]
        return {one["subject"]: one for one in found}

    try:
        eventually("node 1 finds both silent", lambda: silent(1).keys() == {str(two), str(three)}, 120, 1)
        found = silent(1)
        for peer in (two, three):
            part = f"'host {peer.address()} and (esp or udp port 4600)'"
            assert part in found[str(peer)]["command"], found
        assert found[str(two)]["evidence"].startswith("it is heard, and does not answer the last "), found
        assert "does not get what pods send" in found[str(two)]["why"], found
        hangs = found[str(three)]
        assert hangs["evidence"].startswith("silent for ") and "answers ping" in hangs["evidence"], found
        assert hangs["why"].startswith("its daemon does not run "), found
        # The other end of the way that is cut hears nothing.
        one = str(mesh.lab.node(1))
        eventually("node 2 finds node 1 silent", lambda: one in silent(2), 60, 1)
        three.kill()
        assert silent(1)[str(three)]["why"] == hangs["why"]
        two.run(cut.format("D"))
        start(mesh, 3)
        mesh.in_order(1, 2, 3)
    finally:
        two.run(cut.format("D"), check=False)
        leave(mesh, 3)
        conf(mesh)
    mesh.in_order(1, 2)
    clean(mesh, 1, 2, timeout=60)


def test_an_uplink_that_is_gone_is_named(mesh):
    node, wire = mesh.lab.node(1), mesh.lab.name + "-wire"
    node.run("ip link del eth0")
    try:
        named(mesh, 1, "uplink-missing")
    finally:
        netns.run(wire, f"ip link add node1 type veth peer name eth0 netns {node.namespace}")
        netns.run(wire, "ip link set node1 master wire up")
        node.ip(
            "link set eth0 up",
            "address add 192.168.77.1/24 dev eth0",
            "address add fd77::1/64 dev eth0 nodad",
            "route add default via 192.168.77.254",
        )
        node.__dict__.pop("mac", None)
    mesh.in_order(1, 2)
    clean(mesh, 1, 2)


def test_udp_a_taken_port_and_a_detour_are_named(mesh):
    two = mesh.lab.node(2)
    with netns.make_socket(two.namespace, socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("", 4600))
        conf(mesh, UDPEncap="auto", EncapPort=4600)
        found = named(mesh, 2, "port-taken")
        assert found["subject"] == "UDP 4600" and f"pid {os.getpid()}" in found["evidence"], found
        named(mesh, 2, "port-refused")
    mesh.in_order(1, 2)
    # The mesh MTU is smaller by a UDP header, and the pods were there before.
    named(mesh, 1, "pod-mtu")
    two.run("iptables-legacy -w -A INPUT -p esp -j DROP")
    try:
        assert "UDPEncap" in named(mesh, 1, "esp-detour", timeout=40)["command"]
    finally:
        two.run("iptables-legacy -w -D INPUT -p esp -j DROP")
    # A node that nothing reaches, on either carrier.
    three = mesh.lab.node(3)
    unreached = "iptables-legacy -w -{0} INPUT -p esp -j DROP; iptables-legacy -w -{0} INPUT -p udp --dport 4600 -j DROP"
    three.run(unreached.format("A"))
    start(mesh, 3)
    try:
        found = named(mesh, 3, "esp-filtered")
        assert "no probe in ESP or UDP came back" in found["evidence"] and "udp port 4600" in found["command"], found
        three.run(unreached.format("D"))
        mesh.in_order(1, 2, 3)
    finally:
        three.run(unreached.format("D"), check=False)
        leave(mesh, 3)
    conf(mesh)
    mesh.in_order(1, 2)
    clean(mesh, 1, 2)


def test_what_probes_tell_of_a_path_is_named(mesh):
    one, two, wire = mesh.lab.node(1), mesh.lab.node(2), mesh.lab.name + "-wire"
    # A bridge tells nobody of what is too large for a port.
    netns.run(wire, "ip link set node2 mtu 1400")
    try:
        one.ringmail("rotate", check=False)
        assert "MTU" in named(mesh, 1, "path-mtu", timeout=60)["command"]
    finally:
        netns.run(wire, "ip link set node2 mtu 1500")
    conf(mesh, UDPEncap="auto")  # asks every 2 s, and not every 15
    mesh.in_order(1, 2)
    two.netem("loss 50%")
    try:
        assert "%" in named(mesh, 1, "loss", timeout=90)["evidence"]
    finally:
        two.netem(None)
        conf(mesh)
    mesh.in_order(1, 2)
    clean(mesh, 1, 2, timeout=60)


def test_counters_that_rise_are_named_and_explained(mesh):
    one, lab = mesh.lab.node(1), mesh.lab
    spoofed = frames.udp("10.244.2.10", "10.244.1.10")
    with meanwhile(lambda: lab.spoof(1, spoofed)):
        assert "counter plaintext-arriving" in named(mesh, 1, "plaintext-seen", 2)["evidence"]
    assert lab.pod(1).ping(lab.pod(2)) == 1
    with meanwhile(lambda: lab.replay(2, 1)):
        found = named(mesh, 1, "xfrm-counter", 2)
        assert found["subject"] == "XfrmInStateSeqError" and "replay" in found["why"], found
        named(mesh, 1, "peer-errors", 2)
    # By the reverse path another device would be theirs.
    other = "ip link add other type dummy; ip address add 10.99.0.1/24 dev other; ip link set other up"
    one.run(f"{other}; echo 1 >/proc/sys/net/ipv4/conf/eth0/rp_filter")
    try:
        with meanwhile(lambda: lab.spoof(1, frames.udp("10.99.0.9", "192.168.77.1"))):
            assert "packets were dropped by such filters" in named(mesh, 1, "rp-filter", 2)["evidence"]
    finally:
        one.run("ip link del other; echo 0 >/proc/sys/net/ipv4/conf/eth0/rp_filter")
    # A question over a path that takes long: in the time that rotate waits for.
    two = mesh.lab.node(2)
    two.netem("delay 600ms")
    one.ringmail("rotate", check=False)
    try:
        assert "the last probe took" in named(mesh, 1, "latency")["evidence"]
    finally:
        two.netem(None)
    one.ringmail("rotate", check=False)
    reader = netns.make_socket(one.namespace, socket.AF_INET, socket.SOCK_DGRAM)
    writer = netns.make_socket(one.namespace, socket.AF_INET, socket.SOCK_DGRAM)
    with reader, writer:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        reader.bind(("127.0.0.1", 9999))
        with meanwhile(lambda: writer.sendto(bytes(1000), ("127.0.0.1", 9999))):
            named(mesh, 1, "udp-buffers", 2)
    clean(mesh, 1)
    text = one.ringmail("doctor", "--watch", "0", "--cni-conf-dir", str(mesh.cni), check=False).stdout
    assert "XfrmInStateSeqError stands at" in text and "plaintext-arriving stands at" in text, text


def test_what_runs_out_is_named(mesh):
    one = mesh.lab.node(1)
    few = len(os.listdir(f"/proc/{one.pid}/fd")) + 3
    before = subprocess.run(
        ["prlimit", "--pid", str(one.pid), "--nofile", "--output=SOFT,HARD", "--noheadings"], capture_output=True, text=True
    ).stdout.split()
    subprocess.run(["prlimit", "--pid", str(one.pid), f"--nofile={few}:"], check=True)
    try:
        named(mesh, 1, "descriptors")
    finally:
        subprocess.run(["prlimit", "--pid", str(one.pid), f"--nofile={before[0]}:"], check=True)
    room = "/proc/sys/net/netfilter/nf_conntrack_max"
    before = open(room).read()
    mesh.lab.pod(1).ping(mesh.lab.pod(2))
    held = int(one.run("cat /proc/sys/net/netfilter/nf_conntrack_count"))
    open(room, "w").write(str(max(held, 1)))
    try:
        named(mesh, 1, "conntrack")
    finally:
        open(room, "w").write(before)
    # The tables of neighbours are one for all namespaces, and are to be seen from the first.
    limits = {family: f"/proc/sys/net/{family}/neigh/default/gc_thresh3" for family in ("ipv4", "ipv6")}
    before = {limit: open(limit).read() for limit in limits.values()}
    try:
        for limit in before:
            open(limit, "w").write("1")
        command = [program(), "doctor", "--json", "--watch", "0", "--run-dir", str(one.run_dir)]
        done = subprocess.run(command, capture_output=True, text=True)
        found = {one["subject"] for one in json.loads(done.stdout)["findings"] if one["check"] == "neighbours"}
        assert found == set(limits), done
    finally:
        for limit, text in before.items():
            open(limit, "w").write(text)
    clean(mesh, 1)


def test_a_kernel_without_the_cipher_is_named_where_no_daemon_could_start(mesh):
    node = mesh.lab.node(3)
    folder = mesh.folder / "chacha"
    folder.mkdir()
    backend = {"Type": "ipsec", "ESPProposal": "chacha20poly1305"}
    (folder / "net-conf.json").write_text(json.dumps({"Network": NETWORK, "Backend": backend}))
    note = {"lease_dir": str(folder), "node": "n", "subnets": [], "subnet_file": None}
    node.run_dir.mkdir(exist_ok=True)
    (node.run_dir / "state.json").write_text(json.dumps(note))
    helper = open("/proc/sys/kernel/modprobe").read()
    assert not any(one["check"] == "kernel-lacks" for one in doctor(mesh, 3))
    elsewhere = ["-d", "/run/kernel"] if os.path.exists("/run/kernel") else []
    subprocess.run(["modprobe", *elsewhere, "-r", "chacha20poly1305"], check=True)
    open("/proc/sys/kernel/modprobe", "w").write("/bin/false")
    try:
        assert "modprobe -a" in named(mesh, 3, "kernel-lacks")["command"]
    finally:
        open("/proc/sys/kernel/modprobe", "w").write(helper)
        (node.run_dir / "state.json").unlink()


def test_a_bundle_holds_what_is_asked_for_and_neither_the_psk_nor_a_key(mesh):
    """Node 1 has the PSK in net-conf.json too; the bundle is looked through as it is and unpacked."""
    one = mesh.lab.node(1)
    conf(mesh, PSK=PSK)
    path = mesh.folder / "bundle.tar"
    try:
        one.ringmail("doctor", "--watch", "0", "--bundle", str(path), check=False)
        again = one.ringmail("doctor", "--watch", "0", "--bundle", str(path), check=False)
        assert again.returncode == 1 and "is there already" in again.stderr, again
        one.ringmail("doctor", "--watch", "0", "--bundle", str(path), "--force", check=False)
    finally:
        conf(mesh)
    assert path.stat().st_mode & 0o7777 == 0o600
    secrets = {PSK.encode()}
    for key in re.findall(r"aead \S+ 0x([0-9a-f]+) 128", one.run("ip xfrm state")):
        secrets |= {bytes.fromhex(key), bytes.fromhex(key[:-8])}
    assert len(secrets) >= 5, "each way has a key"
    texts = {"the file": path.read_bytes()}
    with tarfile.open(path) as archive:
        for member in archive:
            texts[member.name] = archive.extractfile(member).read()
    for where, text in texts.items():
        for secret in secrets:
            assert not any(spelling in text for spelling in spellings(secret)), f"a secret shows in {where}"
    names = {name.removeprefix("ringmail-bundle/") for name in texts}
    wanted = {"README.txt", "findings.json", "report.json", "audit.json", "leases.json", "facts.json", "net-conf.json"}
    wanted |= {"subnet.env", "network/policies.txt", "network/routes.txt", "proc/net/xfrm_stat", "filter/0-nft.json"}
    assert wanted <= names, wanted - names
    assert b"(removed)" in texts["ringmail-bundle/net-conf.json"]
    assert b"10.244.2.0/24" in texts["ringmail-bundle/network/routes.txt"]
    clean(mesh, 1, 2)


def test_clocks_that_disagree_are_named(mesh):
    """Last: the clock is right from here on."""
    if not GUEST:
        pytest.skip("this machine's own clock is left alone: RINGMAIL_KERNEL=uml shows it")
    set_clock(3600)
    mesh.lab.node(2).ringmail("rotate")
    mesh.in_order(1, 2)
    set_clock(-3600)
    try:
        assert mesh.lab.node(2).namespace == named(mesh, 1, "clock-ahead")["subject"]
        named(mesh, 2, "clock-back")
    finally:
        set_clock(3600)
    clean(mesh, 1, 2)
