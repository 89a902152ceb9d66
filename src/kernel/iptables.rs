//! The packet filter as iptables chains: of our own, for kernels without address translation in nf_tables; of flannel's
//! names and rules for an unencrypted mesh, so that a node is taken over in place.
//!
//! Each table is changed by one `iptables-restore --noflush`, which the kernel commits at one instant; `iptables-save`
//! shows what stands. iptables tells nobody of changes: whoever uses this looks at the tables' sizes (or, where the
//! programs keep their rules in nf_tables, at its generation) often
//! ([`Iptables::may_differ`]) and compares the rules now and then.

mod program;
mod size;
mod text;

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use xfrm::{Connection, Protocol};

use crate::kernel::firewall::{Counters, Firewall, Rule};
use crate::kernel::nft;

use program::Programs;
use size::Size;
use text::{Chain, Shown};

/// How long one run of a program may take.
pub const LIMIT: Duration = Duration::from_secs(10);

/// Why iptables does not hold what it should.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No set of programs is installed.
    #[error(
        "{family}tables-save and {family}tables-restore are not installed in {path}: \
         install the package iptables (Debian, Ubuntu, Alpine; Fedora: iptables-legacy or iptables-nft)"
    )]
    Missing {
        /// Which family's.
        family: Family,
        /// Where they were looked for.
        path: String,
    },
    /// Programs are there, and none works on this kernel.
    #[error(
        "no iptables works on this kernel; the last that was tried: {program} -t {table}: {message}; \
         load the kernel modules nf_tables, nft_nat, nft_masq, nft_xfrm, or ip_tables and iptable_{table} \
         (IPv6: ip6_tables, ip6table_{table})"
    )]
    Unusable {
        /// The program.
        program: String,
        /// The table.
        table: &'static str,
        /// What it said.
        message: String,
    },
    /// A program refused.
    #[error("{program} (exit code {code}): {message}")]
    Failed {
        /// The program.
        program: String,
        /// Its exit code; `signal` where it was ended by one.
        code: String,
        /// What it said.
        message: String,
    },
    /// A program did not end in time and was ended.
    #[error("{program} did not end within {} s: another program may hold the xtables lock (/run/xtables.lock)", LIMIT.as_secs())]
    Slow {
        /// The program.
        program: String,
    },
    /// A program could not be run.
    #[error("run {program}")]
    Run {
        /// The program.
        program: String,
        /// The system's reason.
        source: std::io::Error,
    },
    /// What was written is not what stands.
    #[error("{program} shows other rules in {chain} than were written a moment ago: another program is changing them")]
    Disturbed {
        /// The program.
        program: String,
        /// The chain.
        chain: &'static str,
    },
}

/// An address family, with the prefix of its programs' names.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    const ALL: [Self; 2] = [Self::V4, Self::V6];
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "ip",
            Self::V6 => "ip6",
        })
    }
}

/// The chains of both families, and what we last put there.
#[derive(Default)]
pub struct Iptables {
    /// Those that rules were last written with.
    programs: BTreeMap<Family, Programs>,
    written: Option<(Firewall, Standing)>,
    /// The tables' signs when they were last seen to be right.
    signs: Signs,
    /// To ask nf_tables with; `None` until it was, and where it can't be.
    nf_tables: Option<Connection>,
    /// Drops counted by rules that were rewritten by a program that does not carry the numbers over (ip6tables-nft 1.8.9).
    lost: Counters,
}

/// What differs once another hand has changed a table.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
struct Signs {
    /// How large each table is.
    sizes: BTreeMap<(Family, Chain), Size>,
    /// The generation of nf_tables, where the rules are there.
    generation: Option<u32>,
}

/// What `iptables-save` shows of each of our chains.
type Standing = BTreeMap<(Family, Chain), Vec<String>>;

impl Iptables {
    /// Makes sure that programs are installed, for IPv4 at least. Which of them work is found out when there are rules to
    /// write, since asking makes the kernel set a table up.
    pub fn open() -> Result<Self, Error> {
        Programs::find(Family::V4, &[]).map(|_| Self::default())
    }

    /// Makes our chains hold `firewall` and puts the jumps to them first in their built-in chains. The drop counters
    /// keep their numbers.
    pub fn apply(&mut self, firewall: &Firewall) -> Result<(), Error> {
        self.written = None;
        let rules = firewall.rules();
        let (mut written, mut sizes) = (BTreeMap::new(), BTreeMap::new());
        for family in Family::ALL {
            let rules: Vec<Rule> = rules
                .iter()
                .copied()
                .filter(|rule| rule.is_v6() == (family == Family::V6))
                .collect();
            if rules.is_empty() {
                remove(family, &Chain::ALL)?;
                continue;
            }
            let (chains, others): (Vec<_>, Vec<_>) = Chain::ALL.into_iter().partition(|chain| chain.is_of(firewall));
            let programs = self.working(family, &chains)?;
            let random_fully = firewall.masquerade && firewall.random_fully && programs.takes_random_fully();
            let rules: Vec<Rule> = rules.into_iter().map(|rule| rule.at_random(random_fully)).collect();
            for table in chains {
                let programs = self.working(family, &[table])?;
                let wanted = text::rules(table, &rules, &firewall.uplink);
                let before = Shown::parse(table, &programs.save(table)?);
                programs.restore(&text::replacement(table, &wanted, &before))?;
                // Before the rules are shown: what changes in between is not taken for ours.
                sizes.extend(size::sizes(std::iter::once((family, table))));
                let shown = Shown::parse(table, &programs.save(table)?);
                if !shown.jumps() || shown.rules.len() != wanted.len() {
                    return Err(Error::Disturbed {
                        program: programs.save_name(),
                        chain: table.name(),
                    });
                }
                if let Some(way) = table.way() {
                    let lost = self.lost.of(way);
                    lost.packets += before.dropped.packets.saturating_sub(shown.dropped.packets);
                    lost.bytes += before.dropped.bytes.saturating_sub(shown.dropped.bytes);
                }
                written.insert((family, table), shown.rules);
            }
            // What the other form left goes once this one stands.
            remove(family, &others)?;
        }
        self.written = Some((firewall.clone(), written));
        // In nf_tables our own writes count too, and another hand may have come between two of them: with no generation
        // the next look is at the rules.
        self.signs = Signs {
            sizes,
            generation: None,
        };
        Ok(())
    }

    /// Whether our chains and the jumps to them are as [`Iptables::apply`] left them when it was last called with
    /// `firewall`. Runs six programs with both families.
    pub fn matches(&mut self, firewall: &Firewall) -> Result<bool, Error> {
        // Looked at before the rules: a change in between is seen the next time.
        let signs = self.current_signs();
        let Some((_, written)) = self.written.as_ref().filter(|(written, _)| written == firewall) else {
            return Ok(false);
        };
        for ((family, table), rules) in written {
            let Some(programs) = self.programs.get(family) else {
                return Ok(false);
            };
            let shown = Shown::parse(*table, &programs.save(*table)?);
            if !shown.jumps() || shown.rules != *rules {
                return Ok(false);
            }
        }
        self.signs = signs;
        Ok(true)
    }

    /// Whether a table that we have a chain in is no longer as large as when [`Iptables::matches`] last was true: somebody
    /// added or removed a rule, of ours or of theirs. In nf_tables that is any change of any table. Six system calls.
    pub fn may_differ(&mut self) -> bool {
        self.current_signs() != self.signs
    }

    fn current_signs(&mut self) -> Signs {
        let tables = self.written.iter().flat_map(|(_, standing)| standing.keys().copied());
        Signs {
            sizes: size::sizes(tables),
            generation: self.generation(),
        }
    }

    fn generation(&mut self) -> Option<u32> {
        if !self.programs.values().any(Programs::by_nft) {
            return None;
        }
        if self.nf_tables.is_none() {
            self.nf_tables = Connection::open(Protocol::Netfilter).ok();
        }
        nft::generation(self.nf_tables.as_mut()?).ok()
    }

    /// Removes our chains and the jumps to them, in both families.
    pub fn remove(&mut self) -> Result<(), Error> {
        self.written = None;
        self.lost = Counters::default();
        Family::ALL
            .into_iter()
            .try_for_each(|family| remove(family, &Chain::ALL))
    }

    /// What the guard has dropped, both families together; zeros where our chains are absent.
    pub fn counters(&mut self) -> Result<Counters, Error> {
        let mut counters = self.lost;
        let mut count = |chain: Chain, saved: &str| {
            if let Some(way) = chain.way() {
                let dropped = Shown::parse(chain, &text::part(chain, saved)).dropped;
                let tally = counters.of(way);
                tally.packets += dropped.packets;
                tally.bytes += dropped.bytes;
            }
        };
        if let Some((_, standing)) = &self.written {
            for (family, chain) in standing.keys().filter(|(_, chain)| chain.way().is_some()) {
                count(*chain, &self.programs[family].save(*chain)?);
            }
        } else {
            // Another process wrote them, if they are there: with whichever programs.
            for (_, saved) in Family::ALL.into_iter().flat_map(every_table) {
                Chain::ALL.into_iter().for_each(|chain| count(chain, &saved));
            }
        }
        Ok(counters)
    }

    /// The command that sets what [`Iptables::counters`] reads back to zero.
    pub fn reset(&self) -> String {
        let chains = || Chain::ALL.into_iter().filter(|chain| chain.way().is_some());
        let programs = self.programs.values().map(Programs::single);
        let each = programs.flat_map(|program| {
            chains().map(move |chain| format!("{program} -w -t {} -Z {}", chain.table(), chain.name()))
        });
        each.collect::<Vec<_>>().join(" && ")
    }

    /// `-legacy`, `-nft` or nothing: of the programs that work on the tables of an encrypted mesh.
    #[cfg(test)]
    pub(crate) fn variant(&mut self) -> String {
        let programs = self.working(Family::V4, &Chain::NEEDED).expect("iptables works");
        programs.variant()
    }

    /// Programs that can change the tables of `chains`.
    fn working(&mut self, family: Family, chains: &[Chain]) -> Result<&Programs, Error> {
        let known = self.programs.get_mut(&family).map(|programs| programs.works(chains));
        if !matches!(known, Some(Ok(()))) {
            self.programs.insert(family, Programs::find(family, chains)?);
        }
        Ok(&self.programs[&family])
    }
}

/// Removes these of our chains, and the jumps to them, by whichever programs they were written.
fn remove(family: Family, chains: &[Chain]) -> Result<(), Error> {
    for (programs, saved) in every_table(family) {
        for &table in chains {
            let shown = Shown::parse(table, &text::part(table, &saved));
            if let Some(script) = text::removal(table, &shown) {
                programs.restore(&script)?;
            }
        }
    }
    Ok(())
}

/// What each of the installed programs shows of all tables that are there. Where one does not work, it has no rules either.
fn every_table(family: Family) -> impl Iterator<Item = (Programs, String)> {
    Programs::installed(family).into_iter().filter_map(|programs| {
        let saved = programs.save_all().ok()?;
        Some((programs, saved))
    })
}
