//! What `iptables-save -c` shows.

use ipnet::IpNet;

use super::{Ask, Chain, Filter, Hook, Rule, Verdict};

/// Reads a text; chains of ringmail's own are left out.
pub(super) fn parse(text: &str, program: &str, v6: bool) -> Filter {
    let mut filter = Filter::default();
    let mut table = "";
    for line in text.lines() {
        if let Some(name) = line.strip_prefix('*') {
            table = name.trim();
        } else if let Some(chain) = line.strip_prefix(':') {
            let mut words = chain.split_whitespace();
            let (Some(name), policy) = (words.next(), words.next()) else {
                continue;
            };
            filter.add(Chain {
                id: id(table, name),
                v6: Some(v6),
                hook: hook(table, name),
                drops: policy == Some("DROP"),
                rules: Vec::new(),
                name: format!("chain {name} of table {table} ({program})"),
                accept: format!("{program} -t {table} -I {name} {{}} -j ACCEPT"),
            });
        } else if let Some((name, rule)) = rule(line, table, program)
            && let Some(chain) = filter.chain_mut(&id(table, &name))
        {
            chain.rules.push(rule);
        }
    }
    let ours = |chain: &Chain| chain.name.to_ascii_lowercase().starts_with("chain ringmail");
    for chain in filter.chains.iter_mut().filter(|chain| ours(chain)) {
        // Whatever the guard does not take comes back.
        chain.rules.clear();
    }
    filter
}

fn id(table: &str, chain: &str) -> String {
    format!("{table} {chain}")
}

fn hook(table: &str, name: &str) -> Option<Hook> {
    match (table, name) {
        // What translates addresses drops nothing.
        ("nat", _) => None,
        (_, "PREROUTING") => Some(Hook::Prerouting),
        (_, "INPUT") => Some(Hook::Input),
        (_, "FORWARD") => Some(Hook::Forward),
        (_, "OUTPUT") => Some(Hook::Output),
        (_, "POSTROUTING") => Some(Hook::Postrouting),
        _ => None,
    }
}

/// `[5:300] -A INPUT -p udp -m udp --dport 4500 -j DROP`: the chain's name and the rule.
fn rule(line: &str, table: &str, program: &str) -> Option<(String, Rule)> {
    let (packets, rest) = match line.strip_prefix('[') {
        Some(rest) => {
            let (counts, rest) = rest.split_once("] ")?;
            (counts.split(':').next()?.parse().ok(), rest)
        }
        None => (None, line),
    };
    let words = words(rest);
    let mut words = words.iter().map(String::as_str);
    if words.next() != Some("-A") {
        return None;
    }
    let chain = words.next()?.to_owned();
    let (mut asks, mut verdict, mut not) = (Vec::new(), Verdict::Continue, false);
    while let Some(word) = words.next() {
        match word {
            "!" => {
                not = true;
                continue;
            }
            "-m" => match words.next()? {
                "tcp" | "udp" | "esp" | "multiport" | "comment" => {}
                _ => asks.push(Ask::Unknown),
            },
            "--comment" => drop(words.next()),
            "-s" => asks.push(net(words.next()?).map_or(Ask::Unknown, |nets| Ask::Source(nets, not))),
            "-d" => asks.push(net(words.next()?).map_or(Ask::Unknown, |nets| Ask::Destination(nets, not))),
            "-i" => asks.push(Ask::In(vec![words.next()?.to_owned()], not)),
            "-o" => asks.push(Ask::Out(vec![words.next()?.to_owned()], not)),
            "-p" => asks.push(protocol(words.next()?).map_or(Ask::Unknown, |number| Ask::Protocol(vec![number], not))),
            "--dport" | "--dports" => {
                asks.push(ports(words.next()?).map_or(Ask::Unknown, |ports| Ask::Port(ports, not)));
            }
            "-j" | "-g" => {
                let target = words.next()?;
                verdict = match target {
                    "ACCEPT" => Verdict::Accept,
                    "DROP" | "REJECT" => Verdict::Drop,
                    "RETURN" => Verdict::Return,
                    _ if word == "-g" => Verdict::Goto(id(table, target)),
                    // A target that is no chain goes on: LOG, MARK, CT, …
                    _ if target.chars().all(|c| c.is_ascii_uppercase()) && is_target(target) => Verdict::Continue,
                    _ => Verdict::Jump(id(table, target)),
                };
                // What follows are the target's options.
                break;
            }
            _ => {
                asks.push(Ask::Unknown);
            }
        }
        not = false;
    }
    Some((
        chain,
        Rule {
            asks,
            verdict,
            packets,
            text: format!("rule {rest} of table {table} ({program})"),
            remove: format!("{program} -t {table} {}", rest.replacen("-A", "-D", 1)),
        },
    ))
}

/// Targets that let a packet go on.
fn is_target(name: &str) -> bool {
    matches!(
        name,
        "LOG"
            | "NFLOG"
            | "ULOG"
            | "MARK"
            | "CONNMARK"
            | "CT"
            | "NOTRACK"
            | "TRACE"
            | "TCPMSS"
            | "CLASSIFY"
            | "DSCP"
            | "TOS"
            | "SET"
            | "AUDIT"
            | "CHECKSUM"
            | "SECMARK"
            | "CONNSECMARK"
            | "TTL"
            | "HL"
            | "TEE"
    )
}

fn net(word: &str) -> Option<Vec<IpNet>> {
    word.parse::<IpNet>()
        .ok()
        .or_else(|| Some(word.parse::<std::net::IpAddr>().ok()?.into()))
        .map(|net| vec![net])
}

fn protocol(word: &str) -> Option<u8> {
    match word {
        "esp" => Some(50),
        "ah" => Some(51),
        "udp" => Some(17),
        "tcp" => Some(6),
        "icmp" => Some(1),
        "ipv6-icmp" | "icmpv6" => Some(58),
        "sctp" => Some(132),
        _ => word.parse().ok(),
    }
}

/// `4500`, `1:1024`, `22,80:90`.
fn ports(word: &str) -> Option<Vec<(u16, u16)>> {
    let one = |word: &str| match word.split_once(':') {
        Some((low, high)) => Some((low.parse().ok()?, high.parse().ok()?)),
        None => word.parse().ok().map(|port| (port, port)),
    };
    word.split(',').map(one).collect()
}

/// Words as a shell splits them, quotes taken away.
fn words(line: &str) -> Vec<String> {
    let (mut words, mut word, mut quoted, mut any) = (Vec::new(), String::new(), false, false);
    let mut letters = line.chars();
    while let Some(c) = letters.next() {
        match c {
            '"' => (quoted, any) = (!quoted, true),
            '\\' if quoted => word.extend(letters.next()),
            ' ' if !quoted => {
                if any || !word.is_empty() {
                    words.push(std::mem::take(&mut word));
                }
                any = false;
            }
            _ => word.push(c),
        }
    }
    if any || !word.is_empty() {
        words.push(word);
    }
    words
}
