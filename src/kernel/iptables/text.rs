//! What `iptables-restore` reads and `iptables-save` writes: pure.
//!
//! Rules are spelled as `iptables-save` spells them, in its order of options, so both sides can be compared by eye.

use std::fmt::Write as _;

use crate::kernel::firewall::open::{Act, End, MARK, Match};
use crate::kernel::firewall::{Firewall, Form, Rule, Source, Tally, Way};

/// A chain of ours, and the table that it is in.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) enum Chain {
    /// In `raw`, before conntrack.
    Raw,
    /// In `mangle`, in POSTROUTING before source translation; the destination is final there.
    Mangle,
    /// In `nat`: source translation.
    Nat,
    /// In `nat`: flannel's masquerade.
    Masquerade,
    /// In `filter`: flannel's accept rules.
    Forward,
}

impl Chain {
    /// In the order of writing: the guard first.
    pub(super) const ALL: [Self; 5] = [Self::Raw, Self::Mangle, Self::Nat, Self::Masquerade, Self::Forward];

    /// Those of an encrypted mesh.
    #[cfg(test)]
    pub(super) const NEEDED: [Self; 3] = [Self::Raw, Self::Mangle, Self::Nat];

    /// Whether a filter of this form has the chain.
    pub(super) fn is_of(self, firewall: &Firewall) -> bool {
        match (firewall.form, self) {
            (Form::Sealed | Form::Ajar, Self::Raw | Self::Mangle | Self::Nat) => true,
            (Form::Open { .. }, Self::Masquerade) => firewall.masquerade,
            (Form::Open { forward, .. }, Self::Forward) => forward,
            _ => false,
        }
    }

    /// The chain that guards this way.
    pub(super) fn of(way: Way) -> Self {
        match way {
            Way::Arriving => Self::Raw,
            Way::Leaving => Self::Mangle,
        }
    }

    /// The way that this chain guards.
    pub(super) fn way(self) -> Option<Way> {
        Way::ALL.into_iter().find(|way| Self::of(*way) == self)
    }

    /// The name of its table.
    pub(super) fn table(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Mangle => "mangle",
            Self::Nat | Self::Masquerade => "nat",
            Self::Forward => "filter",
        }
    }

    /// Its name.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Raw => "RINGMAIL-PREROUTING",
            Self::Mangle => "RINGMAIL-GUARD",
            Self::Nat => "RINGMAIL-POSTROUTING",
            Self::Masquerade => "FLANNEL-POSTRTG",
            Self::Forward => "FLANNEL-FWD",
        }
    }

    /// The built-in chain that jumps to it.
    fn hook(self) -> &'static str {
        match self {
            Self::Raw => "PREROUTING",
            Self::Mangle | Self::Nat | Self::Masquerade => "POSTROUTING",
            Self::Forward => "FORWARD",
        }
    }

    /// Whether the jump must stand first. flannel's are appended: what a host's own firewall or kube-proxy decides before
    /// goes before, and that is where flannel's users look for them.
    fn goes_first(self) -> bool {
        !matches!(self, Self::Masquerade | Self::Forward)
    }

    fn comment(self) -> &'static str {
        match self {
            Self::Raw | Self::Mangle | Self::Nat => "ringmail",
            Self::Masquerade => "\"flanneld masq\"",
            Self::Forward => "\"flanneld forward\"",
        }
    }

    fn jump(self) -> String {
        format!("-m comment --comment {} -j {}", self.comment(), self.name())
    }
}

/// What a table shows of ours.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(super) struct Shown {
    /// Our chain is there.
    pub(super) there: bool,
    /// The rules of our chain, without `-A CHAIN`.
    pub(super) rules: Vec<String>,
    /// What its drop rules have counted.
    pub(super) dropped: Tally,
    /// Every jump to our chain in the built-in one: its place, from 0, and the rule.
    found: Vec<(usize, String)>,
    wanted_jump: String,
    first: bool,
}

impl Shown {
    /// Reads the output of `iptables-save --counters -t TABLE`.
    pub(super) fn parse(chain: Chain, output: &str) -> Self {
        let mut shown = Self {
            wanted_jump: chain.jump(),
            first: chain.goes_first(),
            ..Self::default()
        };
        let own = format!("-A {} ", chain.name());
        let hook = format!("-A {} ", chain.hook());
        let declared = format!(":{} ", chain.name());
        let jump = format!("-j {}", chain.name());
        let mut place = 0;
        for line in output.lines() {
            let (tally, rule) = tally_and_rule(line);
            if line.starts_with(&declared) {
                shown.there = true;
            } else if let Some(rule) = rule.strip_prefix(&own) {
                if rule.ends_with(" -j DROP") {
                    shown.dropped.packets += tally.packets;
                    shown.dropped.bytes += tally.bytes;
                }
                shown.rules.push(rule.to_owned());
            } else if let Some(rule) = rule.strip_prefix(&hook) {
                if rule.ends_with(&jump) {
                    shown.found.push((place, rule.to_owned()));
                }
                place += 1;
            }
        }
        shown
    }

    /// There is just one jump to our chain, and it stands where it should.
    pub(super) fn jumps(&self) -> bool {
        matches!(&self.found[..], [(place, jump)] if *jump == self.wanted_jump && (!self.first || *place == 0))
    }
}

/// The part of the output of `iptables-save` that is about the chain's table; nothing where there is no such table.
pub(super) fn part(chain: Chain, output: &str) -> String {
    let begin = format!("*{}", chain.table());
    let lines = output.lines().skip_while(|line| *line != begin);
    let lines: Vec<&str> = lines.take_while(|line| *line != "COMMIT").collect();
    lines.join("\n")
}

/// `[12:340] -A CHAIN …` → the numbers and the rest.
fn tally_and_rule(line: &str) -> (Tally, &str) {
    let parsed = line.strip_prefix('[').and_then(|line| {
        let (numbers, rule) = line.split_once("] ")?;
        let (packets, bytes) = numbers.split_once(':')?;
        Some((
            Tally {
                packets: packets.parse().ok()?,
                bytes: bytes.parse().ok()?,
            },
            rule,
        ))
    });
    parsed.unwrap_or_else(|| (Tally::default(), line))
}

/// The rules of our chain in `table`, without `-A CHAIN`.
pub(super) fn rules(chain: Chain, rules: &[Rule], uplink: &str) -> Vec<String> {
    rules
        .iter()
        .filter(|rule| chain_of(rule) == chain)
        .map(|rule| spelled(rule, uplink))
        .collect()
}

fn chain_of(rule: &Rule) -> Chain {
    match rule {
        Rule::Refuse(way, _) => Chain::of(*way),
        Rule::Translate { .. } => Chain::Nat,
        Rule::Open(rule) if rule.act.forwards() => Chain::Forward,
        Rule::Open(_) => Chain::Masquerade,
    }
}

fn spelled(rule: &Rule, uplink: &str) -> String {
    const COMMENT: &str = "-m comment --comment ringmail";
    match rule {
        Rule::Refuse(Way::Arriving, net) => {
            format!("-s {net} -i {uplink} -m policy --dir in --pol none {COMMENT} -j DROP")
        }
        Rule::Refuse(Way::Leaving, net) => {
            format!("-d {net} -o {uplink} -m policy --dir out --pol none {COMMENT} -j DROP")
        }
        Rule::Translate { from, to, source } => {
            let from = from.map(|net| format!("-s {net} ")).unwrap_or_default();
            let to = to.map(|net| format!("-d {net} ")).unwrap_or_default();
            let target = match source {
                Source::Kept => "RETURN".to_owned(),
                Source::Base(address) => format!("SNAT --to-source {address}"),
                Source::Masquerade { random_fully: true } => "MASQUERADE --random-fully".to_owned(),
                Source::Masquerade { random_fully: false } => "MASQUERADE".to_owned(),
            };
            format!("{from}{to}{COMMENT} -j {target}")
        }
        Rule::Open(open) => {
            let side = |flag, end: Option<End>| {
                let not = |end: &End| if end.inside { "" } else { "! " };
                end.map(|end| format!("{}{flag} {} ", not(&end), end.net))
                    .unwrap_or_default()
            };
            let what = match open.what {
                Match::Marked => format!("-m mark --mark {MARK:#x}/{MARK:#x} "),
                Match::Ends(from, to) => side("-s", from) + &side("-d", to),
            };
            let target = match open.act {
                Act::Keep => "RETURN",
                Act::Masquerade { random_fully: true } => "MASQUERADE --random-fully",
                Act::Masquerade { random_fully: false } => "MASQUERADE",
                Act::Accept => "ACCEPT",
            };
            format!("{what}-m comment --comment {} -j {target}", chain_of(rule).comment())
        }
    }
}

/// Input of `iptables-restore --noflush` that changes nothing and works only if the kernel can change `table`.
pub(super) fn question(chain: Chain) -> String {
    format!(
        "*{}\n:RINGMAIL-QUESTION - [0:0]\n-X RINGMAIL-QUESTION\nCOMMIT\n",
        chain.table()
    )
}

/// The same, and only where `--random-fully` is known.
pub(super) fn random_fully_question() -> String {
    "*nat\n:RINGMAIL-QUESTION - [0:0]\n-A RINGMAIL-QUESTION -j MASQUERADE --random-fully\n\
     -F RINGMAIL-QUESTION\n-X RINGMAIL-QUESTION\nCOMMIT\n"
        .into()
}

/// Input of `iptables-restore --noflush --counters` that makes our chain hold `rules` and puts one jump to it first, or
/// last where it need not be first. What others append behind it later stays behind it.
/// Declaring a chain empties it, in the same commit. The first drop rule begins at what has been counted so far.
pub(super) fn replacement(chain: Chain, rules: &[String], shown: &Shown) -> String {
    let (name, hook) = (chain.name(), chain.hook());
    let mut script = format!("*{}\n:{name} - [0:0]\n", chain.table());
    if !shown.jumps() {
        remove_jumps(&mut script, chain, shown);
        let place = if chain.goes_first() {
            format!("-I {hook} 1")
        } else {
            format!("-A {hook}")
        };
        line(&mut script, format_args!("{place} {}", chain.jump()));
    }
    let mut counted = shown.dropped;
    for rule in rules {
        let begin = if rule.ends_with(" -j DROP") {
            std::mem::take(&mut counted)
        } else {
            Tally::default()
        };
        line(
            &mut script,
            format_args!("[{}:{}] -A {name} {rule}", begin.packets, begin.bytes),
        );
    }
    script.push_str("COMMIT\n");
    script
}

/// Input of `iptables-restore --noflush` that removes our chain and the jumps to it; `None` where there is nothing.
pub(super) fn removal(chain: Chain, shown: &Shown) -> Option<String> {
    if !shown.there {
        return None;
    }
    let name = chain.name();
    let mut script = format!("*{}\n", chain.table());
    remove_jumps(&mut script, chain, shown);
    line(&mut script, format_args!("-F {name}"));
    line(&mut script, format_args!("-X {name}"));
    script.push_str("COMMIT\n");
    Some(script)
}

fn remove_jumps(script: &mut String, chain: Chain, shown: &Shown) {
    for (_, jump) in &shown.found {
        line(script, format_args!("-D {} {jump}", chain.hook()));
    }
}

fn line(script: &mut String, text: std::fmt::Arguments<'_>) {
    // Writing to a String can't fail.
    let _ = writeln!(script, "{text}");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::firewall::tests::dual_stack;

    fn script(shown: &[(Chain, &str)]) -> String {
        let firewall = dual_stack();
        let v4: Vec<Rule> = firewall.rules().into_iter().filter(|rule| !rule.is_v6()).collect();
        let tables = Chain::NEEDED.map(|table| {
            let saved = shown.iter().find(|(t, _)| *t == table).map_or("", |(_, saved)| saved);
            replacement(table, &rules(table, &v4, &firewall.uplink), &Shown::parse(table, saved))
        });
        tables.concat()
    }

    #[test]
    fn an_empty_kernel_gets_the_chains_and_the_jumps_to_them() {
        assert_eq!(
            script(&[]),
            "\
*raw
:RINGMAIL-PREROUTING - [0:0]
-I PREROUTING 1 -m comment --comment ringmail -j RINGMAIL-PREROUTING
[0:0] -A RINGMAIL-PREROUTING -s 10.244.0.0/16 -i wan -m policy --dir in --pol none -m comment --comment ringmail -j DROP
COMMIT
*mangle
:RINGMAIL-GUARD - [0:0]
-I POSTROUTING 1 -m comment --comment ringmail -j RINGMAIL-GUARD
[0:0] -A RINGMAIL-GUARD -d 10.244.0.0/16 -o wan -m policy --dir out --pol none -m comment --comment ringmail -j DROP
COMMIT
*nat
:RINGMAIL-POSTROUTING - [0:0]
-I POSTROUTING 1 -m comment --comment ringmail -j RINGMAIL-POSTROUTING
[0:0] -A RINGMAIL-POSTROUTING -d 10.244.1.0/24 -m comment --comment ringmail -j RETURN
[0:0] -A RINGMAIL-POSTROUTING -s 10.244.0.0/16 -d 10.244.0.0/16 -m comment --comment ringmail -j RETURN
[0:0] -A RINGMAIL-POSTROUTING -d 10.244.0.0/16 -m comment --comment ringmail -j SNAT --to-source 10.244.1.0
[0:0] -A RINGMAIL-POSTROUTING -s 10.244.1.0/24 -d 224.0.0.0/4 -m comment --comment ringmail -j RETURN
[0:0] -A RINGMAIL-POSTROUTING -s 10.244.1.0/24 -m comment --comment ringmail -j MASQUERADE --random-fully
COMMIT
"
        );
    }

    #[test]
    fn a_rewrite_keeps_the_number_of_drops_and_a_jump_that_stands_first() {
        let saved = "\
*raw
:PREROUTING ACCEPT [0:0]
:RINGMAIL-PREROUTING - [0:0]
[9:900] -A PREROUTING -m comment --comment ringmail -j RINGMAIL-PREROUTING
[1:2] -A PREROUTING -j OTHER
[7:588] -A RINGMAIL-PREROUTING -s 10.244.0.0/16 -i old -m policy --dir in --pol none -m comment --comment ringmail -j DROP
COMMIT
";
        let script = script(&[(Chain::Raw, saved)]);
        assert!(
            script.contains("\n[7:588] -A RINGMAIL-PREROUTING -s 10.244.0.0/16 -i wan "),
            "{script}"
        );
        assert!(!script.contains(" PREROUTING "), "the jump stays: {script}");
    }

    #[test]
    fn a_jump_that_slipped_behind_another_rule_is_put_first_in_the_same_commit() {
        let saved = "\
:RINGMAIL-POSTROUTING - [0:0]
[0:0] -A POSTROUTING -m comment --comment \"kubernetes postrouting rules\" -j KUBE-POSTROUTING
[0:0] -A POSTROUTING -m comment --comment ringmail -j RINGMAIL-POSTROUTING
[0:0] -A POSTROUTING -s 10.0.0.0/8 -j RINGMAIL-POSTROUTING
";
        let shown = Shown::parse(Chain::Nat, saved);
        assert!(!shown.jumps());
        let expected = "\
*nat
:RINGMAIL-POSTROUTING - [0:0]
-D POSTROUTING -m comment --comment ringmail -j RINGMAIL-POSTROUTING
-D POSTROUTING -s 10.0.0.0/8 -j RINGMAIL-POSTROUTING
-I POSTROUTING 1 -m comment --comment ringmail -j RINGMAIL-POSTROUTING
COMMIT
";
        assert_eq!(replacement(Chain::Nat, &[], &shown), expected);
        assert_eq!(
            removal(Chain::Nat, &shown).as_deref(),
            Some(
                "\
*nat
-D POSTROUTING -m comment --comment ringmail -j RINGMAIL-POSTROUTING
-D POSTROUTING -s 10.0.0.0/8 -j RINGMAIL-POSTROUTING
-F RINGMAIL-POSTROUTING
-X RINGMAIL-POSTROUTING
COMMIT
"
            )
        );
    }

    /// What `iptables -S` shows of ours, POSTROUTING's and FORWARD's jumps first.
    fn listed(firewall: &Firewall, v6: bool) -> String {
        let of_family: Vec<Rule> = firewall.rules().into_iter().filter(|rule| rule.is_v6() == v6).collect();
        let mut text = String::new();
        for chain in Chain::ALL.into_iter().filter(|chain| chain.is_of(firewall)) {
            line(&mut text, format_args!("-A {} {}", chain.hook(), chain.jump()));
            line(&mut text, format_args!("-N {}", chain.name()));
            for rule in rules(chain, &of_family, "") {
                line(&mut text, format_args!("-A {} {rule}", chain.name()));
            }
        }
        text
    }

    #[test]
    fn rules_of_an_unencrypted_mesh_are_flannels_word_for_word() {
        for (v6, golden) in [
            (false, include_str!("golden.flannel")),
            (true, include_str!("golden.flannel6")),
        ] {
            let (masq, fwd) = golden.split_at(golden.find("-A FORWARD").expect("both parts"));
            let text = |masquerade, random_fully, forward| {
                let Firewall { networks, own, .. } = dual_stack();
                listed(&Firewall::plain(networks, own, masquerade, random_fully, forward), v6)
            };
            assert_eq!(text(true, true, true), golden);
            assert_eq!(text(true, false, true), golden.replace(" --random-fully", ""));
            assert_eq!(text(true, true, false), masq);
            assert_eq!(text(false, true, true), fwd);
            assert_eq!(text(false, false, false), "");
        }
    }

    #[test]
    fn flannels_jump_is_appended_once_and_stays_where_others_append_behind_it() {
        let shown = Shown::parse(Chain::Forward, "[0:0] -A FORWARD -j KUBE-FORWARD\n");
        assert_eq!(
            replacement(Chain::Forward, &[], &shown),
            "*filter\n:FLANNEL-FWD - [0:0]\n-A FORWARD -m comment --comment \"flanneld forward\" -j FLANNEL-FWD\nCOMMIT\n"
        );
        let jump = "[0:0] -A FORWARD -m comment --comment \"flanneld forward\" -j FLANNEL-FWD\n";
        let shown = |saved: &str| Shown::parse(Chain::Forward, saved);
        assert!(shown(&format!("[0:0] -A FORWARD -j A\n{jump}[0:0] -A FORWARD -j B\n")).jumps());
        assert!(!shown(&format!("{jump}{jump}")).jumps(), "twice");
        assert!(!shown("[0:0] -A FORWARD -j FLANNEL-FWD\n").jumps(), "another jump");
    }

    #[test]
    fn where_our_chain_is_absent_there_is_nothing_to_remove() {
        let shown = Shown::parse(
            Chain::Nat,
            "*nat\n:POSTROUTING ACCEPT [0:0]\n[0:0] -A POSTROUTING -j OTHER\nCOMMIT\n",
        );
        assert_eq!(removal(Chain::Nat, &shown), None);
    }
}
