//! The node under an unencrypted backend: leases become objects by [`Plain`] alone; there are no epochs, keys or probes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ipnet::IpNet;
use serde_json::{Map, Value};

use super::report::{PeerReport, State};
use super::{Known, Node};
use crate::backend::{self, Macs, Plain, Rules, Served, Site, Unserved, ipsec, udp};
use crate::kernel::device::{DeviceKind, Mac};
use crate::kernel::{Key, Object, Objects, Scope};
use crate::lease::{Addresses, BackendData, Lease, NodeName, Subnets};

/// What is kept beside the leases.
#[derive(Debug, Default)]
pub(super) struct Leased {
    /// The Ethernet addresses of VXLAN devices that an earlier process left, by device.
    macs: BTreeMap<String, Mac>,
    /// Who says what, where two should not, or share what the kernel has once.
    claims: BTreeMap<Claim, BTreeSet<NodeName>>,
    /// Why the last pass left a peer's objects undone.
    troubles: BTreeMap<NodeName, String>,
}

#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Claim {
    Subnet(IpNet),
    Public(IpAddr),
}

fn claims(lease: &Lease) -> impl Iterator<Item = Claim> {
    let subnets = lease.subnets.iter().map(Claim::Subnet);
    subnets.chain(lease.public.iter().map(Claim::Public))
}

/// What the tunnel of the udp backend is to do.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct TunnelPlan {
    /// The largest inner packet, bytes.
    pub mtu: u32,
    /// The addresses on the uplink that datagrams come to and go from.
    pub local: Addresses,
    /// The UDP port.
    pub port: u16,
    /// This node's addresses in the mesh.
    pub bases: Addresses,
    /// This node's subnets.
    pub own: Subnets,
    /// Where packets to each subnet go.
    pub routes: Vec<(IpNet, SocketAddr)>,
}

impl Leased {
    /// What an earlier process left.
    pub(super) fn of(left: &Objects) -> Self {
        let macs = left.iter().filter_map(|(key, object)| match (key, object) {
            (Key::Link(name), Object::Link(device)) => match device.kind {
                DeviceKind::Vxlan(vxlan) => Some((name.clone(), vxlan.mac)),
                DeviceKind::Sink | DeviceKind::Ipip { .. } | DeviceKind::Tun => None,
            },
            _ => None,
        });
        Self {
            macs: macs.collect(),
            ..Self::default()
        }
    }

    /// Forgets all leases.
    pub(super) fn clear(&mut self) {
        self.claims.clear();
        self.troubles.clear();
    }

    /// The last pass left this trouble for a peer, or none.
    pub(super) fn troubled(&mut self, name: &NodeName, trouble: Option<String>) {
        match trouble {
            Some(trouble) => drop(self.troubles.insert(name.clone(), trouble)),
            None => drop(self.troubles.remove(name)),
        }
    }
}

impl Node {
    /// The unencrypted backend in force, if it is one.
    pub fn plain(&self) -> Option<&Plain> {
        self.settings.plain.as_ref()
    }

    /// What an earlier process published of this node: its VXLAN devices' addresses stay as the peers know them.
    pub fn remembers(&mut self, lease: &Lease) {
        let Some(Plain::Vxlan(settings)) = self.settings.plain.as_ref().or(self.settings.plaintext.as_ref()) else {
            return;
        };
        for (net, data) in [
            (lease.subnets.v4.map(IpNet::V4), &lease.data),
            (lease.subnets.v6.map(IpNet::V6), &lease.v6_data),
        ] {
            if let (Some(net), Some((vni, mac))) = (net, backend::vxlan::vtep(data))
                && vni == settings.vni
            {
                self.open.macs.entry(settings.link(net.addr())).or_insert(mac);
            }
        }
    }

    pub(super) fn site(&self) -> Option<Site<'_>> {
        let mac = |name: String| self.open.macs.get(&name).copied();
        let macs = match self.settings.plain.as_ref().or(self.settings.plaintext.as_ref()) {
            Some(Plain::Vxlan(settings)) => Macs {
                v4: mac(settings.link(std::net::Ipv4Addr::UNSPECIFIED.into())),
                v6: mac(settings.link(std::net::Ipv6Addr::UNSPECIFIED.into())),
            },
            _ => Macs::default(),
        };
        Some(Site {
            name: &self.settings.name,
            network: &self.settings.network,
            own: self.held.map(|(subnets, _)| subnets).unwrap_or_default(),
            uplink: self.uplink.as_ref()?,
            macs,
        })
    }

    /// The lease of `name` is this now, under an unencrypted backend.
    pub(super) fn leased_plain(&mut self, name: &NodeName, lease: Option<&Arc<Lease>>) {
        self.claim(name, lease);
        match lease {
            Some(lease) => {
                let known = Known {
                    lease: lease.clone(),
                    admitted: None,
                    proof: None,
                    refusal: None,
                    stored: true,
                    vanished: None,
                };
                self.known.insert(name.clone(), known);
            }
            None => drop(self.known.remove(name)),
        }
        self.dirty.insert(Scope::Peer(name.clone()));
    }

    /// Notes what the lease of `name` claims in the place of the one that is known.
    pub(super) fn claim(&mut self, name: &NodeName, lease: Option<&Arc<Lease>>) {
        let before = self.known.get(name).map(|known| known.lease.clone());
        for claim in before.iter().flat_map(|lease| claims(lease)) {
            if let Some(names) = self.open.claims.get_mut(&claim) {
                names.remove(name);
                self.dirty.extend(names.iter().cloned().map(Scope::Peer));
                if names.is_empty() {
                    self.open.claims.remove(&claim);
                }
            }
        }
        for claim in lease.into_iter().flat_map(|lease| claims(lease)) {
            let names = self.open.claims.entry(claim).or_default();
            self.dirty.extend(names.iter().cloned().map(Scope::Peer));
            names.insert(name.clone());
        }
    }

    pub(super) fn plain_node(&self, plain: &Plain) -> Objects {
        let Some(site) = self.site() else { return Objects::new() };
        let rules = Rules {
            masquerade: self.settings.masquerade,
            random_fully: self.settings.random_fully,
            forward: self.settings.forward,
            blackhole: self.settings.blackhole,
            nft: self.settings.nft,
        };
        let mut objects = backend::common(&site, &rules);
        objects.extend(plain.node(&site));
        objects
    }

    /// What the node of this name needs, and what can't be done for it.
    pub(super) fn plain_peer(&self, plain: &Plain, name: &NodeName) -> Served {
        let (Some(site), Some(known)) = (self.site().filter(|_| self.held.is_some()), self.known.get(name)) else {
            return Served::default();
        };
        let lease = &known.lease;
        let refused = |why| Served {
            objects: Objects::new(),
            lacks: Some(why),
        };
        if let Some(own) = lease
            .public
            .iter()
            .find(|address| site.uplink.public.iter().any(|own| own == *address))
        {
            return refused(Unserved::Own(own));
        }
        for subnet in lease.subnets.iter() {
            let holders = self.open.claims.get(&Claim::Subnet(subnet)).into_iter().flatten();
            let mut others: Vec<String> = holders
                .filter(|holder| *holder != name)
                .map(ToString::to_string)
                .collect();
            if site
                .own
                .iter()
                .any(|own| own.contains(&subnet) || subnet.contains(&own))
            {
                others.push(site.name.to_string());
            }
            if !others.is_empty() {
                return refused(Unserved::Claimed { subnet, others });
            }
        }
        plain.peer(&site, lease)
    }

    pub(super) fn plain_lease(&self, plain: &Plain) -> Option<Lease> {
        let site = self.site().filter(|_| self.held.is_some())?;
        let (data, v6_data) = match &self.settings.prepared {
            Some(prepared) => (prepared.clone(), prepared.clone()),
            None => plain.data(&site),
        };
        Some(Lease {
            node: site.name.clone(),
            subnets: site.own,
            public: site.uplink.public,
            backend: plain.lease_type().into(),
            data: if site.own.v4.is_some() {
                data.into()
            } else {
                BackendData::NULL
            },
            v6_data: if site.own.v6.is_some() {
                v6_data.into()
            } else {
                BackendData::NULL
            },
        })
    }

    /// Has those looked at whose leases of the type that is allowed in plaintext claim one of `subnets`: what a peer has
    /// proved goes before what a lease only says.
    pub(super) fn contend(&mut self, subnets: &Subnets) {
        for subnet in subnets.iter() {
            let names = self.open.claims.get(&Claim::Subnet(subnet)).into_iter().flatten();
            self.dirty.extend(names.cloned().map(Scope::Peer));
        }
    }

    /// The lease that shows this node to peers that know nothing of ipsec, where they are served: of their type, with its
    /// `statement` beside what they look for.
    pub(super) fn shown_to_plaintext(&self, statement: &BackendData) -> Option<Lease> {
        let mut lease = self.plain_lease(self.settings.plaintext.as_ref()?)?;
        let mut data = match lease.data.value() {
            Value::Object(data) => data,
            _ => Map::new(),
        };
        if let Value::Object(statement) = statement.value() {
            data.extend(statement);
        }
        lease.data = Value::Object(data).into();
        Some(lease)
    }

    /// Opens what ipsec has for a peer to plaintext, where it is served so: its lease is of the type that is allowed, and
    /// says nothing that is refused.
    pub(super) fn add_plaintext(&self, name: &NodeName, objects: &mut Objects) {
        let (Some(plain), Some(known)) = (&self.settings.plaintext, self.known.get(name)) else {
            return;
        };
        let lease = &known.lease;
        let fits = known.stored && known.refusal.is_none() && lease.backend == plain.lease_type();
        // Subnets as the Network has them are the same or apart.
        let proved = |base| self.bases.get(&base).is_some_and(|holder| holder != name);
        let anothers = lease.subnets.bases().iter().any(proved);
        if !fits || anothers || self.settings.network.slot(&lease.subnets).is_err() {
            return;
        }
        let Served { objects: ways, .. } = self.plain_peer(plain, name);
        let served: Subnets = lease
            .subnets
            .iter()
            .filter(|subnet| ways.contains_key(&Key::Route(*subnet)))
            .collect();
        ipsec::open_to_plaintext(objects, &served);
        // Where all goes into tunnels, the peer may not know yet, and still send as before.
        if served.iter().any(|subnet| ipsec::sends_plaintext(objects, subnet)) {
            objects.extend(ways);
        }
    }

    /// Whether anything that goes to `name` goes in plaintext under ipsec.
    pub(super) fn in_plaintext(&self, name: &NodeName) -> bool {
        let Some(known) = self.known.get(name).filter(|_| self.settings.plaintext.is_some()) else {
            return false;
        };
        let objects = self.desired(&Scope::Peer(name.clone()));
        known
            .lease
            .subnets
            .iter()
            .any(|subnet| ipsec::sends_plaintext(&objects, subnet))
    }

    /// What the tunnel of the udp backend is to do; `None` under another.
    pub fn tunnel(&self) -> Option<TunnelPlan> {
        let Some(plain @ Plain::Udp(settings)) = &self.settings.plain else {
            return None;
        };
        let site = self.site().filter(|_| self.held.is_some())?;
        let routes = self.known.iter().flat_map(|(name, known)| {
            let served = self.plain_peer(plain, name).objects;
            let subnets = known
                .lease
                .subnets
                .iter()
                .filter(move |net| served.contains_key(&Key::Route(*net)));
            subnets.filter_map(|net| Some((net, udp::remote(settings, &known.lease, net)?)))
        });
        Some(TunnelPlan {
            mtu: plain.mtu(site.network, site.uplink),
            local: site.uplink.local,
            port: settings.port,
            bases: site.own.bases(),
            own: site.own,
            routes: routes.collect(),
        })
    }

    /// How a peer stands.
    pub(super) fn plain_report(&self, plain: &Plain, name: &NodeName, report: &mut PeerReport) {
        let Served { objects, lacks } = self.plain_peer(plain, name);
        report.reason = lacks.map(|why| why.to_string());
        report.encap = Some(self.way(plain, &objects));
        let leases_alone = matches!(plain, Plain::Alloc | Plain::Extension(_));
        report.state = match (objects.is_empty() && !leases_alone, &report.reason) {
            (true, Some(_)) => State::Refused,
            (true, None) => State::Waiting,
            (false, _) => State::Plain,
        };
        if report.state == State::Refused {
            report.encap = None;
        }
        if let Some(trouble) = self.open.troubles.get(name) {
            (report.state, report.reason) = (State::Waiting, Some(trouble.clone()));
        }
    }

    /// `direct` where a peer on the link is routed to without the tunnel, else the backend's name.
    fn way(&self, plain: &Plain, objects: &Objects) -> String {
        let uplink = self.uplink.as_ref().map(|uplink| uplink.name.as_str());
        let direct = |object: &Object| matches!(object, Object::Route(route) if Some(route.link.as_str()) == uplink);
        match plain {
            Plain::Vxlan(_) | Plain::Ipip(_) if objects.values().any(direct) => "direct".into(),
            _ => plain.name().into(),
        }
    }
}
