//! Whether a packet filter lets the mesh's packets pass: rules of nftables and of iptables in one form, followed for one
//! packet. What a rule asks that is not understood makes the answer "not sure", and that is never a finding.

mod iptables;
mod nft;

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;

use super::facts::{FilterKind, FilterText};

/// Chains that call each other deeper than this are not followed.
const DEPTH: u32 = 16;

/// A packet filter. kube-proxy alone makes tens of thousands of chains where there are as many Services.
#[derive(Clone, Debug, Default)]
pub(super) struct Filter {
    chains: Vec<Chain>,
    /// Where in `chains` each id is.
    by_id: BTreeMap<String, usize>,
}

/// A chain of rules.
#[derive(Clone, Debug)]
pub(super) struct Chain {
    /// What makes it one of many: family, table and name.
    pub(super) id: String,
    /// Family of addresses that it sees; `None` for both.
    pub(super) v6: Option<bool>,
    /// Where packets enter it, if they do by themselves.
    pub(super) hook: Option<Hook>,
    /// Whether what no rule takes is dropped.
    pub(super) drops: bool,
    pub(super) rules: Vec<Rule>,
    /// For people: `chain INPUT of table filter (iptables-legacy)`.
    pub(super) name: String,
    /// The command that inserts a rule that accepts; `{}` stands for what the packet is.
    pub(super) accept: String,
}

/// Where packets enter a chain.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Hook {
    Prerouting,
    Input,
    Forward,
    Output,
    Postrouting,
}

/// A rule: what it asks for, and what then happens.
#[derive(Clone, Debug)]
pub(super) struct Rule {
    pub(super) asks: Vec<Ask>,
    pub(super) verdict: Verdict,
    /// Packets that it has taken, where it counts.
    pub(super) packets: Option<u64>,
    /// As its program shows it.
    pub(super) text: String,
    /// The command that removes it.
    pub(super) remove: String,
}

/// One thing that a rule asks for.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Ask {
    Protocol(Vec<u8>, bool),
    Source(Vec<IpNet>, bool),
    Destination(Vec<IpNet>, bool),
    /// A device that it came in by; a `+` or `*` at the end stands for the rest.
    In(Vec<String>, bool),
    Out(Vec<String>, bool),
    /// Ranges of destination ports.
    Port(Vec<(u16, u16)>, bool),
    V6(bool),
    /// Something that is not understood.
    Unknown,
}

/// What happens to a packet that a rule takes.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Verdict {
    Accept,
    Drop,
    /// To another chain of the same table, by its id, and back.
    Jump(String),
    /// The same without coming back.
    Goto(String),
    Return,
    /// That depends on what is not looked at, such as a map of verdicts.
    Unsure,
    /// It goes on: counted, logged, marked.
    Continue,
}

/// A packet of the mesh.
#[derive(Clone, Copy, Debug)]
pub(super) struct Packet<'a> {
    pub(super) src: IpAddr,
    pub(super) dst: IpAddr,
    /// The range that such sources are of, where a rule that accepts them should be for all.
    pub(super) range: Option<IpNet>,
    /// 50 for ESP, 17 for UDP; 0 for whatever pods send.
    pub(super) protocol: u8,
    pub(super) dport: Option<u16>,
    /// The devices that it may have come in by; none where that is not known, or it came in by none.
    pub(super) iif: &'a [&'a str],
    pub(super) oif: &'a [&'a str],
}

/// Who drops a packet.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Dropped {
    /// The rule, or the chain's policy, for people.
    pub(super) by: String,
    /// Packets that the rule has taken.
    pub(super) packets: Option<u64>,
    /// The command that ends it.
    pub(super) remedy: String,
}

/// How a packet left a chain.
enum End {
    Accepted,
    Dropped(Dropped),
    Returned,
    Unsure,
}

impl Filter {
    /// What a text says; nothing where it can't be understood.
    pub(super) fn parse(text: &FilterText) -> Self {
        match text.by {
            FilterKind::Nft => nft::parse(&text.text),
            FilterKind::Iptables4 => iptables::parse(&text.text, &text.program, false),
            FilterKind::Iptables6 => iptables::parse(&text.text, &text.program, true),
        }
    }

    /// Adds a chain, which has no rules yet.
    fn add(&mut self, chain: Chain) {
        self.by_id.insert(chain.id.clone(), self.chains.len());
        self.chains.push(chain);
    }

    fn chain(&self, id: &str) -> Option<&Chain> {
        self.by_id.get(id).and_then(|at| self.chains.get(*at))
    }

    fn chain_mut(&mut self, id: &str) -> Option<&mut Chain> {
        self.by_id.get(id).and_then(|at| self.chains.get_mut(*at))
    }

    /// Who surely drops the packet at these hooks.
    pub(super) fn drops(&self, packet: &Packet<'_>, hooks: &[Hook]) -> Option<Dropped> {
        let enters = |chain: &&Chain| {
            chain.hook.is_some_and(|hook| hooks.contains(&hook)) && chain.v6.is_none_or(|v6| v6 == packet.src.is_ipv6())
        };
        self.chains
            .iter()
            .filter(enters)
            .find_map(|chain| match self.walk(chain, packet, 0) {
                End::Dropped(dropped) => Some(dropped),
                End::Returned if chain.drops => Some(Dropped {
                    by: format!("the policy of {}, which drops what no rule accepts", chain.name),
                    packets: None,
                    remedy: chain.accept.replace("{}", &packet.said(&chain.accept)),
                }),
                End::Accepted | End::Returned | End::Unsure => None,
            })
    }

    fn walk(&self, chain: &Chain, packet: &Packet<'_>, depth: u32) -> End {
        if depth > DEPTH {
            return End::Unsure;
        }
        for rule in &chain.rules {
            let fits = rule.fits(packet);
            if fits == Some(false) || rule.verdict == Verdict::Continue {
                continue;
            }
            let end = match &rule.verdict {
                Verdict::Accept => End::Accepted,
                Verdict::Return => End::Returned,
                Verdict::Unsure => End::Unsure,
                Verdict::Drop => End::Dropped(Dropped {
                    by: rule.text.clone(),
                    packets: rule.packets,
                    remedy: rule.remove.clone(),
                }),
                Verdict::Jump(id) | Verdict::Goto(id) => {
                    let goes = matches!(rule.verdict, Verdict::Goto(_));
                    match self.chain(id) {
                        None => End::Unsure,
                        Some(next) => match self.walk(next, packet, depth + 1) {
                            End::Returned if !goes => continue,
                            end => end,
                        },
                    }
                }
                Verdict::Continue => continue,
            };
            match (fits, end) {
                (Some(true), end) => return end,
                // It may be dropped here, and may not: the rules after it tell.
                (_, End::Dropped(_)) => {}
                // It may be accepted here.
                (_, End::Accepted | End::Returned | End::Unsure) => return End::Unsure,
            }
        }
        End::Returned
    }
}

impl Rule {
    /// Whether it takes the packet; `None` where that can't be said.
    fn fits(&self, packet: &Packet<'_>) -> Option<bool> {
        let answers: Vec<Option<bool>> = self.asks.iter().map(|ask| ask.fits(packet)).collect();
        if answers.contains(&Some(false)) {
            Some(false)
        } else if answers.contains(&None) {
            None
        } else {
            Some(true)
        }
    }
}

impl Ask {
    fn fits(&self, packet: &Packet<'_>) -> Option<bool> {
        let device = |names: &[String], devices: &[&str]| {
            let named = |device: &str| {
                names.iter().any(|name| match name.strip_suffix(['+', '*']) {
                    Some(start) => device.starts_with(start),
                    None => name == device,
                })
            };
            let fitting = devices.iter().filter(|device| named(device)).count();
            match fitting {
                0 if devices.is_empty() => None,
                0 => Some(false),
                all if all == devices.len() => Some(true),
                _ => None,
            }
        };
        let (found, not) = match self {
            Self::Protocol(_, _) if packet.protocol == 0 => (None, false),
            Self::Protocol(protocols, not) => (Some(protocols.contains(&packet.protocol)), *not),
            Self::Source(nets, not) => (Some(nets.iter().any(|net| net.contains(&packet.src))), *not),
            Self::Destination(nets, not) => (Some(nets.iter().any(|net| net.contains(&packet.dst))), *not),
            Self::In(names, not) => (device(names, packet.iif), *not),
            Self::Out(names, not) => (device(names, packet.oif), *not),
            Self::Port(ranges, not) => {
                let within = |port: u16| ranges.iter().any(|(low, high)| (*low..=*high).contains(&port));
                (packet.dport.map(within), *not)
            }
            Self::V6(v6) => (Some(*v6 == packet.src.is_ipv6()), false),
            Self::Unknown => (None, false),
        };
        found.map(|found| found != not)
    }
}

impl Packet<'_> {
    /// What it is, in the words of the program whose command is given.
    fn said(&self, command: &str) -> String {
        let nft = command.starts_with("nft");
        match (self.protocol, self.dport) {
            (50, _) if nft => "meta l4proto esp".into(),
            (50, _) => "-p esp".into(),
            (17, Some(port)) if nft => format!("udp dport {port}"),
            (17, Some(port)) => format!("-p udp --dport {port}"),
            _ => {
                let range = self.range.unwrap_or_else(|| self.src.into());
                match (nft, self.src.is_ipv6()) {
                    (true, true) => format!("ip6 saddr {range}"),
                    (true, false) => format!("ip saddr {range}"),
                    (false, _) => format!("-s {range}"),
                }
            }
        }
    }
}
