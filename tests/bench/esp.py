"""ESP throughput: pods behind two daemons, against pods behind the same SAs and policies made by hand, once with the packet
filter that ringmail makes and once with none, which shows what the filter and its connection tracking cost.

All pairs of nodes stand in one kernel at the same time and take turns."""

import secrets

from measure import interleaved, ratio
from rig import STATE, Lab

NETWORK = "10.244.0.0/16"


def made_by_hand(name, mtu):
    """Two nodes without ringmail: one SA each way, three policies a node, a route to the other node."""
    lab = Lab(name, 2)
    # What ringmail gives to aes128gcm16; nobody keeps these keys.
    options = "mode tunnel replay-window 1024 flag af-unspec esn"
    keys = {one: secrets.token_hex(20) for one in (1, 2)}
    for node in lab.nodes:
        own, other = node.number, 3 - node.number
        lines = [f"route add 10.244.{other}.0/24 via {lab.node(other).address()} dev eth0 mtu {mtu}"]
        for source, target in [(own, other), (other, own)]:
            ends = f"src {lab.node(source).address()} dst {lab.node(target).address()} proto esp"
            aead = f"aead rfc4106(gcm(aes)) 0x{keys[source]} 128"
            lines.append(f"xfrm state add {ends} spi 0x{source:x}0000001 reqid {other} {options} {aead}")
            subnets = f"src 10.244.{source}.0/24 dst 10.244.{target}.0/24"
            for direction in ["out"] if source == own else ["in", "fwd"]:
                lines.append(f"xfrm policy add {subnets} dir {direction} tmpl {ends} reqid {other} mode tunnel")
        node.ip(*lines)
        node.run("sysctl -qw net.ipv4.ip_forward=1")
        text = f"FLANNEL_NETWORK={NETWORK}\nFLANNEL_SUBNET=10.244.{own}.1/24\nFLANNEL_MTU={mtu}\nFLANNEL_IPMASQ=true\n"
        (STATE / name / str(own) / "subnet.env").write_text(text)
    return lab


def with_its_filter(lab, ours):
    """Gives the nodes of `lab` the packet filter of those of `ours`."""
    for node, model in zip(lab.nodes, ours.nodes, strict=True):
        node.run(["iptables-legacy-restore"], input=model.run("iptables-legacy-save"))
        node.run(["nft", "-f", "-"], input=model.run("nft list ruleset"))


def by_ringmail(name):
    """Two nodes with their daemons, confirmed both ways."""
    lab = Lab(name, 2)
    psk = STATE / name / "psk"
    psk.write_text(secrets.token_hex(32))
    psk.chmod(0o600)
    conf = STATE / name / "net-conf.json"
    conf.write_text(f'{{"Network": "{NETWORK}", "Backend": {{"Type": "ipsec"}}}}')
    lab.start("--ip-masq", f"--lease-dir={lab.lease_dir}", f"--psk-file={psk}", f"--net-config-path={conf}")
    return lab


def throughput(source, target, seconds, streams):
    """Gbit/s from pod to pod. On one busy processor iperf3's own control connection dies now and then: three tries."""
    for tries in (2, 1, 0):
        try:
            return source.iperf(target, seconds, streams)
        except (KeyError, AssertionError):
            if not tries:
                raise


def esp(_programs, quick):
    """iperf3, TCP, one stream and eight, from pod to pod."""
    labs = []
    try:
        labs.append(by_ringmail("bench-ours"))
        ours = labs[0].pods()
        mtu = labs[0].node(1).subnet_env()["FLANNEL_MTU"]
        labs += [made_by_hand("bench-hand", mtu), made_by_hand("bench-bare", mtu)]
        with_its_filter(labs[1], labs[0])
        hand, bare = labs[1].pods(), labs[2].pods()
        for lab, pods in zip(labs, (ours, hand, bare), strict=True):
            lab.wire.close()  # it watches every frame, and would be measured too
            assert any(pods[0].ping(pods[1]) for _ in range(20)), f"{lab.name}: no answer from pod to pod"
        # First probes may come before the peer has an SA for them.
        before = [node.xfrm_stat() for lab in labs for node in lab.nodes]
        rows = []
        for streams in (1, 8):
            seconds = 2 if quick else 4
            sides = [lambda pods=pods, n=streams: throughput(pods[0], pods[1], seconds, n) for pods in (ours, hand, bare)]
            interleaved(1, *sides)
            found = interleaved(4 if quick else 12, *sides)
            what = f"ESP throughput, TCP, {streams} stream{'s' if streams > 1 else ''}"
            rows.append(ratio(what, "Gbit/s", *found[:2], "the same SAs by `ip xfrm`, the same packet filter", ("at least", 0.98)))
            rows.append(ratio(what, "Gbit/s", found[0], found[2], "the same SAs, no packet filter"))
        after = [node.xfrm_stat() for lab in labs for node in lab.nodes]
        assert after == before, f"the kernel dropped packets: {before}, then {after}"
        return rows
    finally:
        for lab in labs:
            lab.down()
