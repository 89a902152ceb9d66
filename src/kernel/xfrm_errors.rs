//! What each counter of `/proc/net/xfrm_stat` says, and what to do about it: a packet that the kernel's IPsec drops leaves
//! no other trace. The counters are of a network namespace, never of one peer, and only rise.
//!
//! Sources: Documentation/networking/xfrm_proc.rst, net/xfrm/xfrm_proc.c, and the places in net/xfrm that raise each.

/// Every counter that a kernel has, in its order there, with what it means in a mesh of ours and what to do. The last four
/// came later: the two of an SA's direction with Linux 6.10, the two of IP-TFS with 6.14.
pub const COUNTERS: [(&str, &str); 32] = [
    (
        "XfrmInError",
        "a packet came in that no other counter describes: the kernel could not track its way through IPsec; look for a \
         lack of memory (`dmesg`)",
    ),
    (
        "XfrmInBufferError",
        "no memory for a packet that came in: give the node more, or look at what holds it (`dmesg`, `slabtop`)",
    ),
    (
        "XfrmInHdrError",
        "the outer or the inner header of what came in makes no sense: a damaged packet, or one of another program's; capture \
         with `tcpdump esp or udp port 4500`",
    ),
    (
        "XfrmInNoStates",
        "ESP came for an SA that is not here: a few while a peer restarts are normal; if it rises, the sender holds a peer's \
         state that this node has lost, or sends to a wrong address: `ringmail status` on both, then `ringmail rotate` here",
    ),
    (
        "XfrmInStateProtoError",
        "the integrity check failed: the packet was changed on its way, forged, or the two ends hold different keys; if it \
         rises with ordinary traffic, look at the network's hardware (checksum and ESP offload) and `ringmail rotate`",
    ),
    (
        "XfrmInStateModeError",
        "what was decrypted does not fit the SA's mode: another program's SA, or a forged inner packet; `ringmail audit` names \
         SAs that are not as they should be",
    ),
    (
        "XfrmInStateSeqError",
        "a packet came twice, or later than 1,024 others: a replay is refused as it should be; if it rises with ordinary \
         traffic, the path duplicates or reorders packets (bonding, ECMP, several queues), or somebody plays packets back",
    ),
    (
        "XfrmInStateExpired",
        "a packet came on an SA that has reached its hard limit: its peer does not move to the new epoch; see it in `ringmail \
         status`, and whether it sees this node's lease",
    ),
    (
        "XfrmInStateMismatch",
        "ESP came in UDP where the SA wants it plain, or the reverse: the two ends disagree on UDPEncap, or a NAT stands \
         between them; compare `UDPEncap` of both nodes and `ringmail status`",
    ),
    (
        "XfrmInStateInvalid",
        "a packet came on an SA that is being removed: a few at a rotation are normal",
    ),
    (
        "XfrmInTmplMismatch",
        "a packet of the mesh came without ESP, or from another peer than its addresses say, and was dropped: somebody forges, \
         or a node sends plaintext; capture on the uplink, and run `ringmail audit` at the sender",
    ),
    (
        "XfrmInNoPols",
        "a packet was decrypted, and no policy lets it in: the policies were flushed by another program, or the SA is another \
         program's; `ringmail audit`",
    ),
    (
        "XfrmInPolBlock",
        "the guard dropped a packet of the mesh that came without ESP or from a node that is not served: `ringmail status` \
         names the peers that are not up",
    ),
    (
        "XfrmInPolError",
        "a policy could not be looked up for a packet that came in: look for a lack of memory (`dmesg`)",
    ),
    (
        "XfrmOutError",
        "a packet could not be sent for a reason that no other counter has: look at the uplink (`ip -s link`, `dmesg`)",
    ),
    (
        "XfrmOutBundleGenError",
        "no way out could be built for a packet: no route to the peer's public address, or no memory; `ip route get` with the \
         peer's address",
    ),
    (
        "XfrmOutBundleCheckError",
        "a way out became void while in use (a route or address changed) and was built anew: a few are normal",
    ),
    (
        "XfrmOutNoStates",
        "a policy names an SA that is not there, and the packet was dropped rather than sent in plaintext: the SA was removed \
         by another hand; `ringmail audit`, and ringmail begins a new epoch by itself",
    ),
    (
        "XfrmOutStateProtoError",
        "encryption failed: a cipher's driver, or no memory; `dmesg`, and `ethtool -k` on the uplink for ESP offload",
    ),
    (
        "XfrmOutStateModeError",
        "a packet does not fit in the tunnel: larger than the mesh MTU with Don't Fragment set; compare the pods' MTU with \
         `ringmail status`, and whether path MTU discovery's ICMP passes",
    ),
    (
        "XfrmOutStateSeqError",
        "an SA's sequence numbers ran out: new epochs do not begin; see `ringmail status`, then `ringmail rotate`",
    ),
    (
        "XfrmOutStateExpired",
        "an SA reached its hard limit of packets or bytes: the peer has not moved to a new epoch; see it in `ringmail status`",
    ),
    (
        "XfrmOutPolBlock",
        "the guard dropped a packet towards a subnet that no peer holds, or whose peer is not up yet, rather than send it in \
         plaintext: `ringmail status` names the peers, `ringmail leases` the subnets",
    ),
    (
        "XfrmOutPolDead",
        "a packet met a policy that was just removed: a few at a change of peers are normal",
    ),
    (
        "XfrmOutPolError",
        "a policy could not be looked up for a packet: look for a lack of memory (`dmesg`)",
    ),
    (
        "XfrmFwdHdrError",
        "a packet to be forwarded has a header that makes no sense: damaged or forged; capture it at the pod",
    ),
    (
        "XfrmOutStateInvalid",
        "a packet met an SA that is being removed: a few at a rotation are normal",
    ),
    (
        "XfrmAcquireError",
        "a packet waited for an SA that an IKE daemon should have brought: ringmail has none; another program's policy stands \
         here (`ip xfrm policy`)",
    ),
    (
        "XfrmOutStateDirError",
        "an SA for receiving was found where one for sending is needed: another program's SA has the same SPI; `ringmail audit`",
    ),
    (
        "XfrmInStateDirError",
        "ESP came with the SPI of an SA that sends: reflected, or forged; capture on the uplink",
    ),
    (
        "XfrmInIptfsError",
        "an IP-TFS payload makes no sense: ringmail's SAs are never of that mode, another program's are (`ip xfrm state`)",
    ),
    (
        "XfrmOutNoQueueSpace",
        "the queue of an SA is full: of another program's in IP-TFS mode, or packets come faster than the processor encrypts",
    ),
];

/// What a counter of `/proc/net/xfrm_stat` means and what to do; `None` for one that a later kernel brought.
pub fn explain(counter: &str) -> Option<&'static str> {
    let mut known = COUNTERS.iter();
    known.find_map(|(name, text)| (*name == counter).then_some(*text))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// The names of Documentation/networking/xfrm_proc.rst of Linux 6.1, in its order.
    const DOCUMENTED: &str = "XfrmInError XfrmInBufferError XfrmInHdrError XfrmInNoStates XfrmInStateProtoError \
        XfrmInStateModeError XfrmInStateSeqError XfrmInStateExpired XfrmInStateMismatch XfrmInStateInvalid \
        XfrmInTmplMismatch XfrmInNoPols XfrmInPolBlock XfrmInPolError XfrmAcquireError XfrmFwdHdrError XfrmOutError \
        XfrmOutBundleGenError XfrmOutBundleCheckError XfrmOutNoStates XfrmOutStateProtoError XfrmOutStateModeError \
        XfrmOutStateSeqError XfrmOutStateExpired XfrmOutPolBlock XfrmOutPolDead XfrmOutPolError XfrmOutStateInvalid";

    #[test]
    fn every_counter_that_the_kernel_documents_is_explained_once() {
        for name in DOCUMENTED.split_whitespace() {
            assert!(explain(name).is_some(), "{name} is not explained");
        }
        let names: BTreeSet<&str> = COUNTERS.iter().map(|(name, _)| *name).collect();
        let texts: BTreeSet<&str> = COUNTERS.iter().map(|(_, text)| *text).collect();
        assert_eq!((names.len(), texts.len()), (COUNTERS.len(), COUNTERS.len()));
        for unknown in ["", "XfrmInErro", "XfrmInErrors", "xfrminerror"] {
            assert_eq!(explain(unknown), None);
        }
    }
}
