//! nf_tables messages as bytes: a [`Firewall`] becomes one transaction. Pure.
//!
//! Source of all numbers: include/uapi/linux/netfilter/nf_tables.h and nfnetlink.h. nf_tables writes every number of
//! its own in network order; data in registers is as in the packet, interface names padded to 16 bytes.

use std::net::IpAddr;

use ipnet::IpNet;
use xfrm::{Batch, Writer};

use crate::kernel::firewall::open::{Act, End, MARK, Match};
use crate::kernel::firewall::{Counters, Firewall, Form, OpenRule, Rule, Source, Way};

/// `NFPROTO_INET`: one table for both families.
pub(super) const INET: u8 = 1;
const NFPROTO_IPV4: u8 = 2;
const NFPROTO_IPV6: u8 = 10;

/// `NFNL_SUBSYS_NFTABLES`.
pub(super) const SUBSYSTEM: u16 = 10;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const fn kind(message: u16) -> u16 {
    SUBSYSTEM << 8 | message
}
const NEW_TABLE: u16 = kind(0);
pub(super) const GET_TABLE: u16 = kind(1);
const DEL_TABLE: u16 = kind(2);
const NEW_CHAIN: u16 = kind(3);
pub(super) const GET_CHAIN: u16 = kind(4);
const NEW_RULE: u16 = kind(6);
pub(super) const GET_RULE: u16 = kind(7);
pub(super) const NEW_GENERATION: u16 = kind(15);
pub(super) const GET_GENERATION: u16 = kind(16);
const NEW_OBJECT: u16 = kind(18);
pub(super) const GET_OBJECT: u16 = kind(19);

const NLM_F_EXCL: u16 = 0x200;
const NLM_F_CREATE: u16 = 0x400;
const NLM_F_APPEND: u16 = 0x800;

/// In every message of nf_tables but those about the generation, attribute 1 is the table's name.
pub(super) const TABLE: u16 = 1;
pub(super) const GENERATION_ID: u16 = 1;
pub(super) const TABLE_FLAGS: u16 = 2;
pub(super) const TABLE_HANDLE: u16 = 4;
const TABLE_USERDATA: u16 = 6;
pub(super) const CHAIN_HANDLE: u16 = 2;
pub(super) const CHAIN_NAME: u16 = 3;
pub(super) const CHAIN_HOOK: u16 = 4;
pub(super) const CHAIN_POLICY: u16 = 5;
pub(super) const CHAIN_TYPE: u16 = 7;
pub(super) const CHAIN_FLAGS: u16 = 10;
const CHAIN_USERDATA: u16 = 12;
pub(super) const RULE_CHAIN: u16 = 2;
pub(super) const RULE_HANDLE: u16 = 3;
pub(super) const RULE_EXPRESSIONS: u16 = 4;
const RULE_USERDATA: u16 = 7;
pub(super) const OBJECT_NAME: u16 = 2;
const OBJECT_TYPE: u16 = 3;
pub(super) const OBJECT_DATA: u16 = 4;
const OBJECT_COUNTER: u32 = 1;
pub(super) const COUNTER_BYTES: u16 = 1;
pub(super) const COUNTER_PACKETS: u16 = 2;

const HOOK_PREROUTING: u32 = 0;
const HOOK_FORWARD: u32 = 2;
const HOOK_POSTROUTING: u32 = 4;
/// NF_IP_PRI_RAW: before conntrack (-200), so that what is refused leaves no state behind.
const PRIORITY_RAW: i32 = -300;
/// NF_IP_PRI_MANGLE, where iptables can do the same. The destination is final in this hook.
const PRIORITY_MANGLE: i32 = -150;
/// NF_IP_PRI_FILTER.
const PRIORITY_FILTER: i32 = 0;
/// 10 before NF_IP_PRI_NAT_SRC, where kube-proxy and iptables masquerade: the first translation of a connection stays.
const PRIORITY_SOURCE: i32 = 90;
/// NF_IP_PRI_NAT_SRC, flannel's: kube-proxy's packets are told by their mark.
const PRIORITY_SRCNAT: i32 = 100;

/// Comments in our objects are read by people in `nft list ruleset`.
const TABLE_COMMENT: &str = "written whole by ringmail, mended when changed";

struct Chain {
    name: &'static str,
    comment: &'static str,
    kind: &'static str,
    hook: u32,
    priority: i32,
}

const ARRIVING: Chain = Chain {
    name: "arriving",
    comment: "what claims to come from the mesh has been ESP",
    kind: "filter",
    hook: HOOK_PREROUTING,
    priority: PRIORITY_RAW,
};
const LEAVING: Chain = Chain {
    name: "leaving",
    comment: "what goes to the mesh will be ESP",
    kind: "filter",
    hook: HOOK_POSTROUTING,
    priority: PRIORITY_MANGLE,
};
const SOURCE: Chain = Chain {
    name: "source",
    comment: "before kube-proxy: foreign traffic to the mesh takes this node's address in it",
    kind: "nat",
    hook: HOOK_POSTROUTING,
    priority: PRIORITY_SOURCE,
};

const MASQUERADE: Chain = Chain {
    // Not "masquerade": a listing with a word of the language as a name can't be loaded again.
    name: "leaving-mesh",
    comment: "what leaves the mesh, or enters it from outside, takes this node's address",
    kind: "nat",
    hook: HOOK_POSTROUTING,
    priority: PRIORITY_SRCNAT,
};
const FORWARD: Chain = Chain {
    name: "forward",
    comment: "what pods send and get is accepted, as far as this table goes",
    kind: "filter",
    hook: HOOK_FORWARD,
    priority: PRIORITY_FILTER,
};

/// The transaction that makes table `table` hold `firewall` and nothing else, whatever it held before. The old rules
/// work until the kernel commits, the new ones from then on. The counters begin at `counters`.
pub(super) fn replacement(table: &str, firewall: &Firewall, counters: Counters) -> Batch {
    transaction(|batch| {
        // A table has to be there for its deletion to succeed.
        message(batch, NEW_TABLE, NLM_F_CREATE, |w| w.attribute_str(TABLE, table));
        message(batch, DEL_TABLE, 0, |w| w.attribute_str(TABLE, table));
        contents(batch, table, firewall, counters);
    })
}

/// A transaction that the kernel refuses with EEXIST, and so leaves no trace, if and only if it knows all that `firewall`
/// needs.
pub(super) fn question(table: &str, firewall: &Firewall) -> Batch {
    transaction(|batch| {
        contents(batch, table, firewall, Counters::default());
        message(batch, NEW_TABLE, NLM_F_CREATE | NLM_F_EXCL, |w| {
            w.attribute_str(TABLE, table);
        });
    })
}

/// The transaction that deletes the table; refused with ENOENT where there is none.
pub(super) fn removal(table: &str) -> Batch {
    removal_in(INET, table)
}

/// The same of a table of another family.
pub(super) fn removal_in(family: u8, table: &str) -> Batch {
    transaction(|batch| {
        batch.push(DEL_TABLE, 0, |w| {
            header(w, family, 0);
            w.attribute_str(TABLE, table);
        });
    })
}

/// flannel's tables, each with its family.
pub(super) const FLANNELS: [(u8, &str); 2] = [(NFPROTO_IPV4, "flannel-ipv4"), (NFPROTO_IPV6, "flannel-ipv6")];

/// What a request about `table` holds after its netlink header.
pub(super) fn about(table: &str) -> impl FnOnce(&mut Writer<'_>) {
    move |w| {
        header(w, INET, 0);
        w.attribute_str(TABLE, table);
    }
}

/// `struct nfgenmsg`.
pub(super) fn header(w: &mut Writer<'_>, family: u8, resource: u16) {
    w.u8(family);
    w.u8(0);
    w.bytes(&resource.to_be_bytes());
}

fn transaction(body: impl FnOnce(&mut Batch)) -> Batch {
    let mut batch = Batch::new();
    batch.push_unacknowledged(BATCH_BEGIN, 0, |w| header(w, 0, SUBSYSTEM));
    body(&mut batch);
    batch.push_unacknowledged(BATCH_END, 0, |w| header(w, 0, SUBSYSTEM));
    batch
}

fn message(batch: &mut Batch, kind: u16, flags: u16, body: impl FnOnce(&mut Writer<'_>)) {
    batch.push(kind, flags, |w| {
        header(w, INET, 0);
        body(w);
    });
}

fn contents(batch: &mut Batch, table: &str, firewall: &Firewall, mut counters: Counters) {
    message(batch, NEW_TABLE, NLM_F_CREATE, |w| {
        w.attribute_str(TABLE, table);
        comment(w, TABLE_USERDATA, TABLE_COMMENT);
    });
    let sealed = matches!(firewall.form, Form::Sealed | Form::Ajar);
    for way in Way::ALL.into_iter().filter(|_| sealed) {
        let tally = *counters.of(way);
        message(batch, NEW_OBJECT, NLM_F_CREATE, |w| {
            w.attribute_str(TABLE, table);
            w.attribute_str(OBJECT_NAME, way.counter());
            w.attribute_be32(OBJECT_TYPE, OBJECT_COUNTER);
            w.nested(OBJECT_DATA, |w| {
                w.attribute(COUNTER_BYTES, &tally.bytes.to_be_bytes());
                w.attribute(COUNTER_PACKETS, &tally.packets.to_be_bytes());
            });
        });
    }
    let chains: &[Chain] = match sealed {
        true => &[ARRIVING, LEAVING, SOURCE],
        false => &[MASQUERADE, FORWARD],
    };
    for chain in chains {
        message(batch, NEW_CHAIN, NLM_F_CREATE, |w| {
            w.attribute_str(TABLE, table);
            w.attribute_str(CHAIN_NAME, chain.name);
            w.nested(CHAIN_HOOK, |w| {
                w.attribute_be32(1, chain.hook);
                w.attribute_be32(2, chain.priority.cast_unsigned());
            });
            w.attribute_be32(CHAIN_POLICY, NF_ACCEPT);
            w.attribute_str(CHAIN_TYPE, chain.kind);
            comment(w, CHAIN_USERDATA, chain.comment);
        });
    }
    for rule in firewall.rules() {
        let chain = match rule {
            Rule::Refuse(Way::Arriving, _) => ARRIVING,
            Rule::Refuse(Way::Leaving, _) => LEAVING,
            Rule::Translate { .. } => SOURCE,
            Rule::Open(rule) if rule.act.forwards() => FORWARD,
            Rule::Open(_) => MASQUERADE,
        };
        message(batch, NEW_RULE, NLM_F_CREATE | NLM_F_APPEND, |w| {
            w.attribute_str(TABLE, table);
            w.attribute_str(RULE_CHAIN, chain.name);
            w.nested(RULE_EXPRESSIONS, |w| {
                expressions(&mut Expressions(w), &rule, &firewall.uplink);
            });
            if let Some(why) = reason(&rule) {
                comment(w, RULE_USERDATA, why);
            }
        });
    }
}

fn reason(rule: &Rule) -> Option<&'static str> {
    match rule {
        // The chain's comment says it.
        Rule::Refuse(..) | Rule::Open(_) => None,
        Rule::Translate { from, to, source } => Some(match (from, to, source) {
            (None, _, Source::Kept) => "to own pods",
            (Some(_), Some(to), Source::Kept) if to.addr().is_multicast() => "multicast",
            (Some(_), _, Source::Kept) => "inside the mesh",
            (_, _, Source::Base(_)) => "foreign traffic to remote pods",
            (_, _, Source::Masquerade { .. }) => "own pods to the outside",
        }),
    }
}

/// A comment as nft(8) keeps it in user data: type 0, length with the closing zero, text.
fn comment(w: &mut Writer<'_>, attribute: u16, text: &str) {
    let length = u8::try_from(text.len() + 1).expect("our comments are short");
    w.attribute_with(attribute, |w| {
        w.u8(0);
        w.u8(length);
        w.bytes(text.as_bytes());
        w.u8(0);
    });
}

const NF_DROP: u32 = 0;
const NF_ACCEPT: u32 = 1;
/// `NFT_RETURN`: from a base chain, to the chain's policy.
const NFT_RETURN: u32 = (-5i32).cast_unsigned();
/// `NFT_REG_VERDICT`.
const VERDICT: u32 = 0;
/// `NFT_REG_1`, the one register that we use.
const REGISTER: u32 = 1;
const META_MARK: u32 = 3;
const META_IIFNAME: u32 = 6;
const META_OIFNAME: u32 = 7;
const META_NFPROTO: u32 = 15;
const META_SECPATH: u32 = 25;
const RT_XFRM: u32 = 4;
const EQUAL: u32 = 0;
const NOT_EQUAL: u32 = 1;
const NETWORK_HEADER: u32 = 1;
const NAT_SOURCE: u32 = 0;
/// `NF_NAT_RANGE_PROTO_RANDOM_FULLY`.
const RANDOM_FULLY: u32 = 1 << 4;

fn expressions(e: &mut Expressions<'_, '_>, rule: &Rule, uplink: &str) {
    match *rule {
        Rule::Refuse(way @ Way::Arriving, net) => {
            e.interface(META_IIFNAME, uplink);
            e.family(&net);
            e.address(Field::Source, &net);
            e.load("meta", META_SECPATH);
            e.compare(&[0]);
            e.count(way.counter());
            e.verdict(NF_DROP);
        }
        Rule::Refuse(way @ Way::Leaving, net) => {
            e.interface(META_OIFNAME, uplink);
            e.family(&net);
            e.address(Field::Destination, &net);
            e.load("rt", RT_XFRM);
            e.compare(&[0]);
            e.count(way.counter());
            e.verdict(NF_DROP);
        }
        Rule::Translate { from, to, source } => {
            if let Some(net) = from.or(to) {
                e.family(&net);
            }
            if let Some(net) = from {
                e.address(Field::Source, &net);
            }
            if let Some(net) = to {
                e.address(Field::Destination, &net);
            }
            match source {
                Source::Kept => e.verdict(NFT_RETURN),
                Source::Base(address) => e.source(address),
                Source::Masquerade { random_fully } => e.masquerade(random_fully),
            }
        }
        Rule::Open(OpenRule { v6, what, act }) => {
            e.load("meta", META_NFPROTO);
            e.compare(&[if v6 { NFPROTO_IPV6 } else { NFPROTO_IPV4 }]);
            match what {
                Match::Marked => e.mark(MARK),
                Match::Ends(from, to) => {
                    for (field, end) in [(Field::Source, from), (Field::Destination, to)] {
                        if let Some(End { net, inside }) = end {
                            e.address_that(field, &net, if inside { EQUAL } else { NOT_EQUAL });
                        }
                    }
                }
            }
            match act {
                Act::Keep => e.verdict(NFT_RETURN),
                Act::Masquerade { random_fully } => e.masquerade(random_fully),
                Act::Accept => e.verdict(NF_ACCEPT),
            }
        }
    }
}

enum Field {
    Source,
    Destination,
}

/// Appends the expressions of one rule.
struct Expressions<'a, 'b>(&'a mut Writer<'b>);

impl Expressions<'_, '_> {
    fn expression(&mut self, name: &str, data: impl FnOnce(&mut Writer<'_>)) {
        self.0.nested(1, |w| {
            w.attribute_str(1, name);
            w.nested(2, data);
        });
    }

    /// Loads `key` of `meta` or `rt` into the register.
    fn load(&mut self, name: &str, key: u32) {
        self.expression(name, |w| {
            w.attribute_be32(1, REGISTER);
            w.attribute_be32(2, key);
        });
    }

    fn compare(&mut self, value: &[u8]) {
        self.compare_as(EQUAL, value);
    }

    fn compare_as(&mut self, how: u32, value: &[u8]) {
        self.expression("cmp", |w| {
            w.attribute_be32(1, REGISTER);
            w.attribute_be32(2, how);
            w.nested(3, |w| w.attribute(1, value));
        });
    }

    fn interface(&mut self, key: u32, name: &str) {
        let mut padded = [0; 16];
        let length = name.len().min(padded.len() - 1);
        padded[..length].copy_from_slice(&name.as_bytes()[..length]);
        self.load("meta", key);
        self.compare(&padded);
    }

    fn family(&mut self, net: &IpNet) {
        self.load("meta", META_NFPROTO);
        self.compare(&[family_of(net.addr())]);
    }

    /// The packet has this bit in its mark, which is in the machine's order.
    fn mark(&mut self, bit: u32) {
        self.load("meta", META_MARK);
        self.mask(&bit.to_ne_bytes());
        self.compare(&bit.to_ne_bytes());
    }

    fn mask(&mut self, mask: &[u8]) {
        let length = u32::try_from(mask.len()).expect("an address is 16 bytes at most");
        self.expression("bitwise", |w| {
            w.attribute_be32(1, REGISTER);
            w.attribute_be32(2, REGISTER);
            w.attribute_be32(3, length);
            w.nested(4, |w| w.attribute(1, mask));
            w.nested(5, |w| w.attribute(1, &vec![0; mask.len()]));
        });
    }

    /// The packet's address is in `net`.
    fn address(&mut self, field: Field, net: &IpNet) {
        self.address_that(field, net, EQUAL);
    }

    /// The packet's address is in `net`, or is not. Offsets: RFC 791 §3.1, RFC 8200 §3.
    fn address_that(&mut self, field: Field, net: &IpNet, how: u32) {
        let offset = match (field, net) {
            (Field::Source, IpNet::V4(_)) => 12,
            (Field::Destination, IpNet::V4(_)) => 16,
            (Field::Source, IpNet::V6(_)) => 8,
            (Field::Destination, IpNet::V6(_)) => 24,
        };
        let mask = octets(net.netmask());
        let length = u32::try_from(mask.len()).expect("an address is 16 bytes at most");
        self.expression("payload", |w| {
            w.attribute_be32(1, REGISTER);
            w.attribute_be32(2, NETWORK_HEADER);
            w.attribute_be32(3, offset);
            w.attribute_be32(4, length);
        });
        if net.prefix_len() != net.max_prefix_len() {
            self.mask(&mask);
        }
        self.compare_as(how, &octets(net.network()));
    }

    fn count(&mut self, counter: &str) {
        self.expression("objref", |w| {
            w.attribute_be32(1, OBJECT_COUNTER);
            w.attribute_str(2, counter);
        });
    }

    fn verdict(&mut self, code: u32) {
        self.expression("immediate", |w| {
            w.attribute_be32(1, VERDICT);
            w.nested(2, |w| w.nested(2, |w| w.attribute_be32(1, code)));
        });
    }

    fn source(&mut self, address: IpAddr) {
        self.expression("immediate", |w| {
            w.attribute_be32(1, REGISTER);
            w.nested(2, |w| w.attribute(1, &octets(address)));
        });
        self.expression("nat", |w| {
            w.attribute_be32(1, NAT_SOURCE);
            w.attribute_be32(2, family_of(address).into());
            w.attribute_be32(3, REGISTER);
        });
    }

    fn masquerade(&mut self, random_fully: bool) {
        self.expression("masq", |w| {
            if random_fully {
                w.attribute_be32(1, RANDOM_FULLY);
            }
        });
    }
}

fn family_of(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => NFPROTO_IPV4,
        IpAddr::V6(_) => NFPROTO_IPV6,
    }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}
