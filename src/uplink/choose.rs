//! The choice of the uplink: facts and flags in, an uplink or the reason out. flannel's rules (its `LookupExtIface`), but
//! an IPv6 link-local address never serves (a tunnel's address has no scope), nor one whose duplicate detection failed.

use std::net::IpAddr;

use super::{Address, Choice, Facts, Families, Family, FoundRoute, Iface, Link, LinkRoute, Unfit, Uplink, UplinkError};
use crate::lease::Addresses;

/// Chooses the uplink.
///
/// The first that can serve of `--iface`, then `--iface-regex`, then `--iface-can-reach`; without these the holder of
/// `--public-ip`, else of `--public-ipv6`; without those the interface of the default route with the lowest metric.
///
/// # Errors
/// [`UplinkError`].
pub fn choose(facts: &Facts, choice: &Choice, families: Families) -> Result<Uplink, UplinkError> {
    let candidates = || facts.describe();
    let unfit = |unfit| UplinkError::Unfit(unfit, candidates());
    if choice.ifaces.is_empty() && choice.patterns.is_empty() && choice.can_reach.is_none() {
        let by_address = families.iter().find_map(|family| of(choice.public, family));
        let found = match by_address {
            Some(address) => facts.holder(address).map_err(unfit)?,
            None => facts.default_route(families)?,
        };
        return facts.fit(&found, choice, families).map_err(unfit);
    }
    let mut tried = Vec::new();
    let mut attempt = |flag: String, found: Result<Found, Unfit>| {
        found
            .and_then(|found| facts.fit(&found, choice, families))
            .map_err(|why| tried.push(format!("{flag}: {why}")))
            .ok()
    };
    for iface in &choice.ifaces {
        let found = match iface {
            Iface::Address(address) => facts.holder(*address),
            Iface::Name(name) => facts.named(name),
        };
        if let Some(uplink) = attempt(format!("--iface={iface}"), found) {
            return Ok(uplink);
        }
    }
    for pattern in &choice.patterns {
        if let Some(uplink) = attempt(
            format!("--iface-regex={pattern}"),
            facts.matching(pattern, choice, families),
        ) {
            return Ok(uplink);
        }
    }
    if let Some(address) = choice.can_reach
        && let Some(uplink) = attempt(format!("--iface-can-reach={address}"), facts.reaching(address))
    {
        return Ok(uplink);
    }
    Err(UplinkError::NoMatch {
        tried,
        candidates: candidates(),
    })
}

/// An interface, and the addresses on it that are settled already.
struct Found {
    index: u32,
    fixed: Addresses,
}

impl Facts {
    fn named(&self, name: &str) -> Result<Found, Unfit> {
        let called = |link: &Link| link.name == name || link.other_names.iter().any(|other| other == name);
        let found = self.links.iter().find(|(_, link)| called(link));
        let (&index, _) = found.ok_or_else(|| Unfit::NoSuchName(name.to_owned()))?;
        Ok(Found {
            index,
            fixed: Addresses::default(),
        })
    }

    fn holder(&self, address: IpAddr) -> Result<Found, Unfit> {
        let held = self
            .addresses
            .iter()
            .find(|held| held.address == address && self.links.contains_key(&held.index));
        let index = held.ok_or(Unfit::NoSuchAddress(address))?.index;
        Ok(Found {
            index,
            fixed: Addresses::from_iter([address]),
        })
    }

    /// By addresses first, where an interface must match with every family, then by name.
    fn matching(&self, pattern: &regex::Regex, choice: &Choice, families: Families) -> Result<Found, Unfit> {
        let matches = |text: &str| pattern.find(text).is_some_and(|found| !found.is_empty());
        for (&index, _) in self.links.iter().filter(|(_, link)| !is_ours(link)) {
            let of_family = |family| {
                let mut held = self
                    .addresses
                    .iter()
                    .filter(|a| a.index == index && Family::of(a.address) == family);
                held.find(|a| a.serves() && !choice.is_mesh(a.address) && matches(&a.address.to_string()))
                    .map(|a| a.address)
            };
            if let Some(fixed) = families.iter().map(of_family).collect::<Option<Addresses>>() {
                return Ok(Found { index, fixed });
            }
        }
        let mut links = self.links.iter().filter(|(_, link)| !is_ours(link));
        let (&index, _) = links
            .find(|(_, link)| matches(&link.name))
            .ok_or_else(|| Unfit::NoPatternMatch(pattern.to_string()))?;
        Ok(Found {
            index,
            fixed: Addresses::default(),
        })
    }

    fn reaching(&self, address: IpAddr) -> Result<Found, Unfit> {
        let unreached = |why: &str| Unfit::Unreached {
            address,
            why: why.to_owned(),
        };
        let reach = match &self.reach {
            Some(Ok(reach)) => reach,
            Some(Err(why)) => return Err(unreached(why)),
            None => return Err(unreached("the kernel was not asked")),
        };
        let link = self
            .links
            .get(&reach.index)
            .ok_or_else(|| unreached("its interface has just gone"))?;
        if reach.own {
            return Err(unreached("it is an address of this node; name one of another node"));
        }
        if is_ours(link) {
            return Err(unreached(&format!("the way to it is the mesh's own {}", link.name)));
        }
        Ok(Found {
            index: reach.index,
            fixed: reach.source.into_iter().collect(),
        })
    }

    fn default_route(&self, families: Families) -> Result<Found, UplinkError> {
        let routes = |family| {
            let usable = |index| {
                self.links
                    .get(&index)
                    .is_some_and(|link| !is_ours(link) && !link.loopback)
            };
            let of_family = self
                .default_routes
                .iter()
                .filter(move |r| r.family == family && usable(r.index));
            let mut routes: Vec<_> = of_family.collect();
            // Stable, so that of two with one metric the kernel's first counts.
            routes.sort_by_key(|route| route.metric);
            routes
        };
        let missing = |family| UplinkError::NoDefaultRoute {
            family,
            candidates: self.describe(),
        };
        let mut fixed = Addresses::default();
        let mut chosen: Option<u32> = None;
        for family in families.iter() {
            let routes = routes(family);
            let first = *routes.first().ok_or_else(|| missing(family))?;
            let route = match chosen {
                None => first,
                Some(index) => match routes.iter().find(|route| route.index == index) {
                    Some(route) => *route,
                    None => {
                        return Err(UplinkError::RoutesDiffer {
                            v4: self.name(index),
                            v6: self.name(first.index),
                        });
                    }
                },
            };
            chosen = Some(route.index);
            let held = route.source.filter(|&source| self.is_sound(source));
            fixed = fixed.iter().chain(held).collect();
        }
        Ok(Found {
            index: chosen.expect("there is at least one family"),
            fixed,
        })
    }

    /// The uplink on the interface that was found, if it can serve.
    fn fit(&self, found: &Found, choice: &Choice, families: Families) -> Result<Uplink, Unfit> {
        let link = self
            .links
            .get(&found.index)
            .ok_or_else(|| Unfit::NoSuchName(self.name(found.index)))?;
        let name = link.name.clone();
        if !link.up {
            return Err(Unfit::Down(name));
        }
        let address = |family| {
            let taken = match of(found.fixed, family) {
                Some(fixed) => self.is_sound(fixed).then_some(fixed),
                None => self.best(found.index, family, choice),
            };
            taken.ok_or_else(|| Unfit::NoAddress {
                name: name.clone(),
                family,
                why: self.why_not(found.index, family),
            })
        };
        let local: Addresses = families.iter().map(address).collect::<Result<_, _>>()?;
        let public = families
            .iter()
            .filter_map(|family| of(choice.public, family).or_else(|| of(local, family)));
        Ok(Uplink {
            name,
            index: found.index,
            mtu: link.mtu,
            local,
            public: public.collect(),
            routes: self.routes_by(found.index, choice),
        })
    }

    /// The routes beside the mesh's own, longest first; of several to one net the one that the kernel takes.
    fn routes_by(&self, index: u32, choice: &Choice) -> Vec<LinkRoute> {
        let mut found: Vec<&FoundRoute> = (self.routes.iter())
            .filter(|route| !choice.is_mesh(route.net.addr()))
            .collect();
        found.sort_by_key(|route| (u8::MAX - route.net.prefix_len(), route.net, route.metric));
        found.dedup_by_key(|route| route.net);
        let link = |route: &FoundRoute| LinkRoute {
            net: route.net,
            direct: route.index == Some(index) && !route.routed,
        };
        found.into_iter().map(link).collect()
    }

    /// The interface's address that flannel would take: global before link-local, lasting before leased; but never an
    /// IPv6 one that changes for privacy, since every change would be a new epoch.
    fn best(&self, index: u32, family: Family, choice: &Choice) -> Option<IpAddr> {
        let serving = self
            .addresses
            .iter()
            .filter(|a| a.index == index && Family::of(a.address) == family && a.serves() && !a.is_private());
        serving
            .min_by_key(|a| {
                (
                    choice.is_mesh(a.address),
                    is_link_local(a.address),
                    !a.permanent,
                    a.temporary,
                )
            })
            .map(|a| a.address)
    }

    /// Whether this node holds the address in a state in which a tunnel can start from it.
    fn is_sound(&self, address: IpAddr) -> bool {
        self.addresses
            .iter()
            .any(|held| held.address == address && held.serves())
    }

    fn why_not(&self, index: u32, family: Family) -> String {
        let held = self
            .addresses
            .iter()
            .filter(|a| a.index == index && Family::of(a.address) == family);
        let flaw = |a: &Address| {
            if a.serves() {
                "one that changes for privacy"
            } else {
                a.flaw()
            }
        };
        let reasons: Vec<_> = held.map(|a| format!("{} is {}", a.address, flaw(a))).collect();
        if reasons.is_empty() {
            String::new()
        } else {
            format!(" ({})", reasons.join(", "))
        }
    }

    fn name(&self, index: u32) -> String {
        self.links
            .get(&index)
            .map_or_else(|| format!("number {index}"), |link| link.name.clone())
    }

    /// Every interface that could be meant, with its addresses.
    fn describe(&self) -> String {
        let shown = |(&index, link): (&u32, &Link)| {
            let held = self
                .addresses
                .iter()
                .filter(|a| a.index == index)
                .map(|a| a.address.to_string());
            let facts: Vec<_> = (!link.up).then(|| "down".to_owned()).into_iter().chain(held).collect();
            let facts = if facts.is_empty() {
                "no address".to_owned()
            } else {
                facts.join(" ")
            };
            format!("{} {facts}", link.name)
        };
        let meant = self.links.iter().filter(|(_, link)| !link.loopback && !is_ours(link));
        let all: Vec<_> = meant.take(MOST_SHOWN + 1).map(shown).collect();
        match all.len() {
            0 => "none".to_owned(),
            n if n > MOST_SHOWN => format!("{}, …", all[..MOST_SHOWN].join(", ")),
            _ => all.join(", "),
        }
    }
}

/// A node has an interface for each of its pods; a message has room for a few.
const MOST_SHOWN: usize = 12;

/// Whether the interface is the mesh's own, ours or flannel's.
pub(super) fn is_ours(link: &Link) -> bool {
    link.name == "ringmail0" || link.name.starts_with("flannel") || link.name.starts_with("cni")
}

fn of(addresses: Addresses, family: Family) -> Option<IpAddr> {
    match family {
        Family::V4 => addresses.v4.map(IpAddr::V4),
        Family::V6 => addresses.v6.map(IpAddr::V6),
    }
}

impl Choice {
    pub(super) fn is_mesh(&self, address: IpAddr) -> bool {
        self.mesh
            .is_some_and(|mesh| mesh.nets().any(|net| net.contains(&address)))
    }
}

impl Address {
    /// Whether it is an IPv6 address of a few hours or days (RFC 8981).
    fn is_private(&self) -> bool {
        self.temporary && self.address.is_ipv6()
    }

    fn serves(&self) -> bool {
        self.flaw() == SOUND
    }

    /// Why the address can't be a tunnel's.
    fn flaw(&self) -> &'static str {
        let a = self.address;
        if a.is_loopback() || a.is_unspecified() || a.is_multicast() || self.host_scope {
            "of this host only"
        } else if self.unusable {
            "tentative or a duplicate"
        } else if self.deprecated {
            "deprecated"
        } else if a.is_ipv6() && is_link_local(a) {
            "link-local"
        } else {
            SOUND
        }
    }
}

const SOUND: &str = "usable";

fn is_link_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    }
}
