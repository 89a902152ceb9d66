//! What `iptables-restore` reads and `iptables-save` writes: pure.
//!
//! Rules are spelled as `iptables-save` spells them, in its order of options, so both sides can be compared by eye.

use std::fmt::Write as _;

use crate::kernel::firewall::{Rule, Source, Tally, Way};

/// A table that we have a chain in.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub(super) enum Table {
    /// Before conntrack.
    Raw,
    /// In POSTROUTING before source translation; the destination is final there.
    Mangle,
    /// Source translation.
    Nat,
}

impl Table {
    /// In the order of writing: the guard first.
    pub(super) const ALL: [Self; 3] = [Self::Raw, Self::Mangle, Self::Nat];

    /// The table that guards this way.
    pub(super) fn of(way: Way) -> Self {
        match way {
            Way::Arriving => Self::Raw,
            Way::Leaving => Self::Mangle,
        }
    }

    /// The way that this table guards.
    pub(super) fn way(self) -> Option<Way> {
        Way::ALL.into_iter().find(|way| Self::of(*way) == self)
    }

    /// Its name.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Mangle => "mangle",
            Self::Nat => "nat",
        }
    }

    /// Our chain in it.
    pub(super) fn chain(self) -> &'static str {
        match self {
            Self::Raw => "RINGMAIL-PREROUTING",
            Self::Mangle => "RINGMAIL-GUARD",
            Self::Nat => "RINGMAIL-POSTROUTING",
        }
    }

    /// The built-in chain that jumps to ours.
    fn hook(self) -> &'static str {
        match self {
            Self::Raw => "PREROUTING",
            Self::Mangle | Self::Nat => "POSTROUTING",
        }
    }

    fn jump(self) -> String {
        format!("-m comment --comment ringmail -j {}", self.chain())
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
    jumps: Vec<(usize, String)>,
    wanted_jump: String,
}

impl Shown {
    /// Reads the output of `iptables-save --counters -t TABLE`.
    pub(super) fn parse(table: Table, output: &str) -> Self {
        let mut shown = Self {
            wanted_jump: table.jump(),
            ..Self::default()
        };
        let own = format!("-A {} ", table.chain());
        let hook = format!("-A {} ", table.hook());
        let declared = format!(":{} ", table.chain());
        let jump = format!("-j {}", table.chain());
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
                    shown.jumps.push((place, rule.to_owned()));
                }
                place += 1;
            }
        }
        shown
    }

    /// There is just one jump to our chain, and it stands first.
    pub(super) fn jumps_first(&self) -> bool {
        matches!(&self.jumps[..], [(0, jump)] if *jump == self.wanted_jump)
    }
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
pub(super) fn rules(table: Table, rules: &[Rule], uplink: &str) -> Vec<String> {
    rules
        .iter()
        .filter(|rule| table_of(rule) == table)
        .map(|rule| spelled(rule, uplink))
        .collect()
}

fn table_of(rule: &Rule) -> Table {
    match rule {
        Rule::Refuse(way, _) => Table::of(*way),
        Rule::Translate { .. } => Table::Nat,
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
    }
}

/// Input of `iptables-restore --noflush` that changes nothing and works only if the kernel can change `table`.
pub(super) fn question(table: Table) -> String {
    format!(
        "*{}\n:RINGMAIL-QUESTION - [0:0]\n-X RINGMAIL-QUESTION\nCOMMIT\n",
        table.name()
    )
}

/// Input of `iptables-restore --noflush --counters` that makes our chain hold `rules` and puts one jump to it first.
/// Declaring a chain empties it, in the same commit. The first drop rule begins at what has been counted so far.
pub(super) fn replacement(table: Table, rules: &[String], shown: &Shown) -> String {
    let (chain, hook) = (table.chain(), table.hook());
    let mut script = format!("*{}\n:{chain} - [0:0]\n", table.name());
    if !shown.jumps_first() {
        remove_jumps(&mut script, table, shown);
        line(&mut script, format_args!("-I {hook} 1 {}", table.jump()));
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
            format_args!("[{}:{}] -A {chain} {rule}", begin.packets, begin.bytes),
        );
    }
    script.push_str("COMMIT\n");
    script
}

/// Input of `iptables-restore --noflush` that removes our chain and the jumps to it; `None` where there is nothing.
pub(super) fn removal(table: Table, shown: &Shown) -> Option<String> {
    if !shown.there {
        return None;
    }
    let chain = table.chain();
    let mut script = format!("*{}\n", table.name());
    remove_jumps(&mut script, table, shown);
    line(&mut script, format_args!("-F {chain}"));
    line(&mut script, format_args!("-X {chain}"));
    script.push_str("COMMIT\n");
    Some(script)
}

fn remove_jumps(script: &mut String, table: Table, shown: &Shown) {
    for (_, jump) in &shown.jumps {
        line(script, format_args!("-D {} {jump}", table.hook()));
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

    fn script(shown: &[(Table, &str)]) -> String {
        let firewall = dual_stack();
        let v4: Vec<Rule> = firewall.rules().into_iter().filter(|rule| !rule.is_v6()).collect();
        let tables = Table::ALL.map(|table| {
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
        let script = script(&[(Table::Raw, saved)]);
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
        let shown = Shown::parse(Table::Nat, saved);
        assert!(!shown.jumps_first());
        let expected = "\
*nat
:RINGMAIL-POSTROUTING - [0:0]
-D POSTROUTING -m comment --comment ringmail -j RINGMAIL-POSTROUTING
-D POSTROUTING -s 10.0.0.0/8 -j RINGMAIL-POSTROUTING
-I POSTROUTING 1 -m comment --comment ringmail -j RINGMAIL-POSTROUTING
COMMIT
";
        assert_eq!(replacement(Table::Nat, &[], &shown), expected);
        assert_eq!(
            removal(Table::Nat, &shown).as_deref(),
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

    #[test]
    fn where_our_chain_is_absent_there_is_nothing_to_remove() {
        let shown = Shown::parse(
            Table::Nat,
            "*nat\n:POSTROUTING ACCEPT [0:0]\n[0:0] -A POSTROUTING -j OTHER\nCOMMIT\n",
        );
        assert_eq!(removal(Table::Nat, &shown), None);
    }
}
