//! The packet filter that a node needs, as one value, and the two managers that can put it into a kernel.
//!
//! [`Firewall::rules`] is the whole meaning; [`Nft`] and [`Iptables`] only spell it. Where a packet meets the rules:
//!
//! ```text
//!  uplink ──▶ Arriving (raw) ──▶ conntrack ──▶ … ──▶ Leaving (mangle) ──▶ Source (nat) ──▶ [ESP] ──▶ uplink
//!             the mesh's source,                     the mesh's destination,   before kube-proxy's
//!             was not ESP: dropped                   will not be ESP: dropped  masquerade
//! ```
//!
//! A packet that is to be encrypted passes `Leaving` twice: first itself, bound for the uplink already but with the
//! transformation attached to its route, then as ESP between public addresses, which are not in the mesh.
//!
//! That is an encrypted mesh ([`Form::Sealed`]). Of an unencrypted one ([`Form::Open`]) the rules are flannel's: [`open`].

pub mod open;

use std::net::IpAddr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use serde::{Deserialize, Serialize};
use xfrm::netlink::Protocol;
use xfrm::{MessageRef, Monitor};

use crate::kernel::iptables::{self, Iptables};
use crate::kernel::nft::{self, Nft};
use crate::lease::{Addresses, Subnets};
pub use open::OpenRule;

/// The packet filter of one node, as it is wanted. Compare it to know whether [`Manager::apply`] has work to do.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Firewall {
    /// Which of the two it is.
    pub form: Form,
    /// The mesh's whole ranges, none inside another.
    pub networks: Vec<IpNet>,
    /// The node's own subnets. A family without one gets no source translation, only the guard.
    pub own: Subnets,
    /// The node's own addresses in the mesh: what foreign traffic to remote pods takes as source.
    pub bases: Addresses,
    /// The name of the interface that carries the mesh.
    pub uplink: String,
    /// Whether what pods send out of the mesh takes the node's address as source.
    pub masquerade: bool,
    /// Whether that masquerade picks ports wholly at random (flannel's default where the kernel can).
    pub random_fully: bool,
}

/// What a packet filter is for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Form {
    /// An encrypted mesh: nothing of the mesh crosses the uplink in plaintext, foreign traffic takes the node's address in
    /// the mesh.
    Sealed,
    /// The same where some peers' plaintext has to cross the uplink: only what claims this node's own subnet is refused
    /// there, and the policies, which know the peers, stand alone for the rest.
    Ajar,
    /// An unencrypted one: flannel's rules, and no others. `bases` and `uplink` are not looked at.
    Open {
        /// Whether what is forwarded from and to the mesh is accepted.
        forward: bool,
        /// Whether nf_tables is to program it where the kernel can, flannel's `EnableNFTables`; else iptables, in chains
        /// of flannel's names.
        nft: bool,
    },
}

/// One rule. The order of [`Firewall::rules`] is the order in the chain; the first that matches decides.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Rule {
    /// Count and drop what is not IPsec and claims to be of the mesh.
    Refuse(Way, IpNet),
    /// The new source of a connection's first packet.
    Translate {
        /// The packet's source, any if absent.
        from: Option<IpNet>,
        /// The packet's destination, any if absent.
        to: Option<IpNet>,
        /// What becomes of it.
        source: Source,
    },
    /// A rule of an unencrypted mesh.
    Open(OpenRule),
}

/// Which way a packet crosses the uplink.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Way {
    /// In, with a source of the mesh.
    Arriving,
    /// Out, with a destination of the mesh.
    Leaving,
}

/// The source that a connection gets.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Source {
    /// The one it has; other programs' rules decide.
    Kept,
    /// This address.
    Base(IpAddr),
    /// The address of the interface that it leaves by.
    Masquerade {
        /// Ports wholly at random.
        random_fully: bool,
    },
}

impl Rule {
    /// The same rule; if it masquerades, with ports wholly at random or not.
    #[must_use]
    pub fn at_random(mut self, wanted: bool) -> Self {
        if let Self::Translate {
            source: Source::Masquerade { random_fully },
            ..
        }
        | Self::Open(OpenRule {
            act: open::Act::Masquerade { random_fully },
            ..
        }) = &mut self
        {
            *random_fully = wanted;
        }
        self
    }

    /// Whether the rule is about IPv6.
    pub fn is_v6(&self) -> bool {
        let net = match self {
            Self::Refuse(_, net) => Some(net),
            Self::Translate { from, to, .. } => from.as_ref().or(to.as_ref()),
            Self::Open(rule) => return rule.v6,
        };
        matches!(net, Some(IpNet::V6(_)))
    }
}

/// Multicast, which masquerade leaves alone (RFC 5771, RFC 4291 §2.7).
const MULTICAST_V4: Ipv4Net = Ipv4Net::new_assert(std::net::Ipv4Addr::new(224, 0, 0, 0), 4);
const MULTICAST_V6: Ipv6Net = Ipv6Net::new_assert(std::net::Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0), 8);

impl Firewall {
    /// The filter of an unencrypted mesh: flannel's, for a node that holds `own`. iptables programs it where it can; see
    /// [`Firewall::by_nft`].
    pub fn plain(networks: Vec<IpNet>, own: Subnets, masquerade: bool, random_fully: bool, forward: bool) -> Self {
        Self {
            form: Form::Open { forward, nft: false },
            networks,
            own,
            bases: Addresses::default(),
            uplink: String::new(),
            masquerade,
            random_fully,
        }
    }

    /// The same, programmed by nf_tables where the kernel can if `nft`. An encrypted mesh's always is.
    #[must_use]
    pub fn by_nft(mut self, wanted: bool) -> Self {
        if let Form::Open { nft, .. } = &mut self.form {
            *nft = wanted;
        }
        self
    }

    /// Whether nf_tables is to program it where the kernel can.
    pub fn prefers_nft(&self) -> bool {
        match self.form {
            Form::Sealed | Form::Ajar => true,
            Form::Open { nft, .. } => nft,
        }
    }

    /// The rules, family by family in the order of `networks`: guard first, then source translation.
    ///
    /// Each names one source and one destination at most, because an iptables rule can't name more; exceptions
    /// therefore come as rules of their own in front.
    pub fn rules(&self) -> Vec<Rule> {
        if let Form::Open { forward, .. } = self.form {
            return open::rules(self, forward);
        }
        let guard = |way| self.networks.iter().map(move |net| Rule::Refuse(way, *net));
        let mut rules: Vec<Rule> = match self.form {
            Form::Ajar => self.own.iter().map(|own| Rule::Refuse(Way::Arriving, own)).collect(),
            _ => guard(Way::Arriving).chain(guard(Way::Leaving)).collect(),
        };
        for own in self.own.iter() {
            let Some(base) = self.bases.of_family(own.addr()) else {
                continue;
            };
            let ranges = || self.networks.iter().copied().filter(|net| same_family(net, &own));
            let mut rule = |from, to, source| rules.push(Rule::Translate { from, to, source });
            // Own pods see who is calling, whatever NodePort policy they are under.
            rule(None, Some(own), Source::Kept);
            for to in ranges() {
                for from in ranges() {
                    rule(Some(from), Some(to), Source::Kept);
                }
                // A receiver takes from this node's tunnel only sources of this node's subnet.
                rule(None, Some(to), Source::Base(base));
            }
            if self.masquerade {
                let multicast = if own.addr().is_ipv4() {
                    MULTICAST_V4.into()
                } else {
                    MULTICAST_V6.into()
                };
                rule(Some(own), Some(multicast), Source::Kept);
                rule(
                    Some(own),
                    None,
                    Source::Masquerade {
                        random_fully: self.random_fully,
                    },
                );
            }
        }
        rules
    }
}

fn same_family(a: &IpNet, b: &IpNet) -> bool {
    a.addr().is_ipv4() == b.addr().is_ipv4()
}

/// What the guard has dropped since it was first applied; a rewrite carries the numbers over.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Counters {
    /// Came in by the uplink with a source of the mesh and was not ESP: spoofed, or a peer without encryption.
    pub arriving: Tally,
    /// Would have gone out by the uplink to the mesh unencrypted.
    pub leaving: Tally,
}

impl Counters {
    /// The numbers with their names, as `nft list ruleset` shows them too.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, Tally)> + use<> {
        [
            (Way::Arriving.counter(), self.arriving),
            (Way::Leaving.counter(), self.leaving),
        ]
        .into_iter()
    }

    /// What a person is to be told of it, `None` where it has dropped nothing. `uplink` is the interface's name, `reset` the
    /// command that sets the numbers back.
    pub fn told(&self, uplink: &str, reset: &str) -> Option<String> {
        let Self { arriving, leaving } = self;
        let packets = |number: u64| format!("{number} packet{}", if number == 1 { "" } else { "s" });
        let came = (arriving.packets > 0).then(|| {
            format!(
                "{} of the mesh that came in by {uplink} without ESP, forged or from a node that does not encrypt (look on \
                 the wire who sends them)",
                packets(arriving.packets)
            )
        });
        let left = (leaving.packets > 0).then(|| {
            format!(
                "{} to other nodes' pods that would have left by {uplink} without ESP (`ringmail audit` looks for the way)",
                packets(leaving.packets)
            )
        });
        let told: Vec<String> = came.into_iter().chain(left).collect();
        (!told.is_empty()).then(|| {
            format!(
                "the guard has dropped {}; once mended, set the count back: {reset}",
                told.join(", and ")
            )
        })
    }

    /// The number of one way.
    pub fn of(&mut self, way: Way) -> &mut Tally {
        match way {
            Way::Arriving => &mut self.arriving,
            Way::Leaving => &mut self.leaving,
        }
    }
}

impl Way {
    /// Both ways.
    pub const ALL: [Self; 2] = [Self::Arriving, Self::Leaving];

    /// The name of this way's drop counter.
    pub fn counter(self) -> &'static str {
        match self {
            Self::Arriving => "plaintext-arriving",
            Self::Leaving => "plaintext-leaving",
        }
    }
}

/// A number of packets.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Tally {
    /// Packets.
    pub packets: u64,
    /// Their lengths together, network headers included.
    pub bytes: u64,
}

/// Why the packet filter is not as wanted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Neither manager works.
    #[error(
        "no packet filter can be programmed here: nf_tables: {nft}; iptables: {iptables}; \
         load the kernel modules nf_tables, nft_nat, nft_masq, nft_xfrm, or install the package iptables"
    )]
    None {
        /// Why not nf_tables.
        nft: nft::Error,
        /// Why not iptables.
        iptables: iptables::Error,
    },
    /// nf_tables failed.
    #[error("packet filter (nf_tables)")]
    Nft(#[from] nft::Error),
    /// iptables failed.
    #[error("packet filter (iptables)")]
    Iptables(#[from] iptables::Error),
}

/// The one that programs this kernel's packet filter. Works in the network namespace of the calling thread; use it on
/// the thread that opened it.
pub enum Manager {
    /// A table of our own over netlink.
    Nft(Nft),
    /// Chains of our own through `iptables-restore`.
    Iptables(Iptables),
}

impl Manager {
    /// Takes the manager that works here; of two, nf_tables if `prefer_nft`, else iptables. Changes nothing.
    pub fn open(prefer_nft: bool) -> Result<Self, Error> {
        let nft = || Nft::open().map(Self::Nft);
        let iptables = || Iptables::open().map(Self::Iptables);
        if prefer_nft {
            nft().or_else(|nft| iptables().map_err(|iptables| Error::None { nft, iptables }))
        } else {
            iptables().or_else(|iptables| nft().map_err(|nft| Error::None { nft, iptables }))
        }
    }

    /// Makes the kernel hold just these rules in our chains. Each table changes at one instant; nothing is absent
    /// meanwhile. May be repeated. On error the old rules stand (iptables: tables not yet reached).
    pub fn apply(&mut self, firewall: &Firewall) -> Result<(), Error> {
        match self {
            Self::Nft(nft) => Ok(nft.apply(firewall)?),
            Self::Iptables(iptables) => Ok(iptables.apply(firewall)?),
        }
    }

    /// Whether the kernel still holds exactly what the last [`Manager::apply`] of this value put there; false before
    /// the first.
    pub fn verify(&mut self, firewall: &Firewall) -> Result<bool, Error> {
        match self {
            Self::Nft(nft) => Ok(nft.matches(firewall)?),
            Self::Iptables(iptables) => Ok(iptables.matches(firewall)?),
        }
    }

    /// Removes all that is ours and nothing else. Nothing there is success.
    pub fn remove(&mut self) -> Result<(), Error> {
        match self {
            Self::Nft(nft) => Ok(nft.remove()?),
            Self::Iptables(iptables) => Ok(iptables.remove()?),
        }
    }

    /// Removes what an earlier run made by the other manager: call it after the first [`Manager::apply`], so that the
    /// guard is never absent. Where the other manager does not work here there is nothing to remove.
    ///
    /// flannel's own tables go with it: its rules are taken over.
    pub fn remove_other(&self) -> Result<(), Error> {
        if let Ok(mut nft) = Nft::open_unchecked() {
            nft.remove_flannels()?;
        }
        match self {
            Self::Nft(_) => Iptables::open().map_or(Ok(()), |mut iptables| Ok(iptables.remove()?)),
            Self::Iptables(_) => Nft::open_unchecked().map_or(Ok(()), |mut nft| Ok(nft.remove()?)),
        }
    }

    /// What the guard has dropped; zeros where our rules are absent.
    pub fn counters(&mut self) -> Result<Counters, Error> {
        match self {
            Self::Nft(nft) => Ok(nft.counters()?),
            Self::Iptables(iptables) => Ok(iptables.counters()?),
        }
    }

    /// The command that sets [`Manager::counters`] back.
    pub fn reset(&self) -> String {
        match self {
            Self::Nft(_) => "nft reset counters table inet ringmail".to_owned(),
            Self::Iptables(iptables) => iptables.reset(),
        }
    }

    /// Listens for changes of the rules. iptables tells nobody: call [`Manager::verify`] now and then. `None` where the
    /// kernel has no nf_tables, and so nothing to tell; another manager may take this one's place.
    pub fn monitor(&self) -> Result<Option<Monitor>, Error> {
        match (Monitor::open(Protocol::Netfilter, &[nft::GROUP]), self) {
            (Ok(monitor), _) => Ok(Some(monitor)),
            (Err(_), Self::Iptables(_)) => Ok(None),
            (Err(source), Self::Nft(_)) => Err(nft::Error::Netlink {
                step: "listen for changes",
                source,
            }
            .into()),
        }
    }

    /// Whether this is the manager that [`Manager::open`] would rather take.
    pub fn is_preferred(&self, prefer_nft: bool) -> bool {
        matches!(self, Self::Nft(_)) == prefer_nft
    }

    /// Whether a message of [`Manager::monitor`] tells of someone else's change to what is ours: verify and apply then.
    pub fn touched(&self, message: MessageRef<'_>) -> bool {
        match self {
            Self::Nft(nft) => nft.touched(message),
            Self::Iptables(_) => false,
        }
    }
}

#[cfg(test)]
pub(crate) mod lab;
#[cfg(test)]
pub(crate) mod tests;
