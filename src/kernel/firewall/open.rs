//! The rules of an unencrypted mesh: flannel's masquerade and forward rules, in its order.
//!
//! One of its nf_tables rules is other than its iptables rule and hides the last one (what is from outside and goes to a
//! remote pod was never masqueraded); here both managers hold the iptables rules. kube-proxy's mark is looked at as the
//! one bit that it is.

use ipnet::IpNet;

use super::{Firewall, MULTICAST_V4, MULTICAST_V6, Rule, same_family};

/// kube-proxy's mark of what it masquerades itself, and its mask.
pub const MARK: u32 = 0x4000;

/// One rule.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct OpenRule {
    /// Whether it is about IPv6.
    pub v6: bool,
    /// What it looks at.
    pub what: Match,
    /// What becomes of the packet.
    pub act: Act,
}

/// What a rule looks at.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Match {
    /// kube-proxy's mark.
    Marked,
    /// The packet's ends; any where absent.
    Ends(Option<End>, Option<End>),
}

/// One end of a packet.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct End {
    /// The range.
    pub net: IpNet,
    /// Whether it is in the range or outside of it.
    pub inside: bool,
}

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Act {
    /// Its source stays as it is, as far as these rules go.
    Keep,
    /// It takes the address of the interface that it leaves by.
    Masquerade {
        /// Ports wholly at random.
        random_fully: bool,
    },
    /// It is let through.
    Accept,
}

impl Act {
    /// Whether the rule is about forwarding, else it is about sources.
    pub fn forwards(self) -> bool {
        self == Self::Accept
    }
}

fn inside(net: IpNet) -> Option<End> {
    Some(End { net, inside: true })
}

fn outside(net: IpNet) -> Option<End> {
    Some(End { net, inside: false })
}

/// The rules, those about sources first.
pub(super) fn rules(firewall: &Firewall, forward: bool) -> Vec<Rule> {
    let mut rules = Vec::new();
    let mut rule = |v6, what, act| rules.push(Rule::Open(OpenRule { v6, what, act }));
    let masquerade = Act::Masquerade {
        random_fully: firewall.random_fully,
    };
    for net in firewall.networks.iter().copied().filter(|_| firewall.masquerade) {
        let Some(pods) = firewall.own.iter().find(|own| same_family(own, &net)) else {
            continue;
        };
        let v6 = net.addr().is_ipv6();
        let multicast: IpNet = if v6 { MULTICAST_V6.into() } else { MULTICAST_V4.into() };
        let mut ends = |from, to, act| rule(v6, Match::Ends(from, to), act);
        ends(inside(pods), inside(net), Act::Keep);
        ends(inside(net), inside(pods), Act::Keep);
        // Pods here see who is calling.
        ends(outside(net), inside(pods), Act::Keep);
        ends(inside(net), outside(multicast), masquerade);
        // The node itself, and what comes in by it for a pod elsewhere, whose answers must come back this way.
        ends(outside(net), inside(net), masquerade);
    }
    let mut marked: Vec<Rule> = Vec::new();
    for v6 in [false, true] {
        if rules.iter().any(|rule| rule.is_v6() == v6) {
            let (what, act) = (Match::Marked, Act::Keep);
            marked.push(Rule::Open(OpenRule { v6, what, act }));
        }
    }
    marked.extend(rules);
    for net in firewall.networks.iter().copied().filter(|_| forward) {
        for what in [Match::Ends(inside(net), None), Match::Ends(None, inside(net))] {
            let (v6, act) = (net.addr().is_ipv6(), Act::Accept);
            marked.push(Rule::Open(OpenRule { v6, what, act }));
        }
    }
    marked
}
