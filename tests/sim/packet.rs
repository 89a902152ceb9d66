//! What becomes of a packet, given only the objects that are there. Knows nothing of how they were decided.
//!
//! ```text
//!   out of a pod, through the node:  route ─▶ fwd policy ─▶ out policy ─▶ [ESP] ─▶ device
//!   out of the node itself:          route ────────────────▶ out policy ─▶ [ESP] ─▶ device
//!   in by the uplink:                filter ─▶ route ─▶ in or fwd policy (was it ESP, of whom?) ─▶ node or pod
//! ```
//! As in Linux 6.1: the longest route wins; the policy with the lowest priority number that matches decides; a
//! policy's interface is compared with the one that the packet leaves by, on the way in too (`decode_session4`); a
//! packet that came through a tunnel needs a policy that wants one (`secpath_has_nontransport`).

use std::net::IpAddr;

use ipnet::IpNet;
use ringmail::kernel::firewall::Firewall;
use ringmail::kernel::{Key, Object, Objects};
use ringmail::lease::Subnets;
use xfrm::{Action, Direction, Policy, Sa, SaId, Selector, Template};

const LO: u32 = 1;
const PODS: u32 = 900;
const MESH: u32 = 901;
const UDP: u8 = 17;

/// What a node is beside our objects.
#[derive(Clone, Debug)]
pub(crate) struct Surroundings {
    /// Behind the pods' bridge, by a connected route.
    pub(crate) own: Subnets,
    /// The uplink's name and index; the default route goes there.
    pub(crate) uplink: (String, u32),
    /// The node's addresses on the uplink.
    pub(crate) addresses: Vec<IpAddr>,
}

/// Which parts of our objects count: a test takes one away to see that the others hold.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Layers {
    pub(crate) firewall: bool,
    pub(crate) policies: bool,
    pub(crate) routes: bool,
}

impl Layers {
    pub(crate) const ALL: Self = Self {
        firewall: true,
        policies: true,
        routes: true,
    };
}

/// Where a packet comes from.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum From<'a> {
    /// A pod of this node, or another machine that is routed through it.
    Behind,
    /// The node itself.
    Node,
    /// The uplink, in the clear.
    Uplink,
    /// The uplink, as ESP of this SA.
    Tunnel(&'a Sa),
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Packet {
    pub(crate) src: IpAddr,
    pub(crate) dst: IpAddr,
    /// Source and destination port, if it is UDP.
    pub(crate) udp: Option<(u16, u16)>,
}

/// What becomes of it.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(crate) enum Fate {
    /// It leaves by the uplink as it is.
    Plain,
    /// It leaves by the uplink as ESP of this SA.
    Sealed(SaId),
    /// It reaches the node or one of its pods.
    Delivered,
    Dropped(&'static str),
}

#[derive(Clone, Copy)]
enum Way {
    Local,
    Pods,
    Mesh,
    Uplink,
    Unreachable,
}

/// Objects as packets meet them: sorted once, so that many packets can be sent through.
#[derive(Debug, Default)]
pub(crate) struct Scene {
    firewall: Option<Firewall>,
    /// Of each direction, the lowest priority number first.
    policies: [Vec<Policy>; 3],
    sas: Vec<Sa>,
    unreachable: Vec<IpNet>,
    routes: Vec<IpNet>,
    addresses: Vec<IpAddr>,
}

impl Scene {
    pub(crate) fn of(objects: &Objects) -> Self {
        let mut scene = Self::default();
        for (key, object) in objects {
            match (key, object) {
                (Key::Firewall, Object::Firewall(rules)) => scene.firewall = Some((**rules).clone()),
                (_, Object::Policy(policy)) => scene.policies[policy.id.direction as usize].push((**policy).clone()),
                (_, Object::Sa { sa, .. }) => scene.sas.push((**sa).clone()),
                (Key::GuardRoute(net), Object::Unreachable) => scene.unreachable.push(*net),
                (Key::Route(net), Object::Route(_)) => scene.routes.push(*net),
                (Key::Address(_, address), _) => scene.addresses.push(*address),
                _ => {}
            }
        }
        for policies in &mut scene.policies {
            policies.sort_by_key(|policy| policy.priority);
        }
        scene
    }

    /// The SAs that are there.
    pub(crate) fn sas(&self) -> &[Sa] {
        &self.sas
    }

    fn way(&self, around: &Surroundings, layers: Layers, dst: IpAddr) -> Way {
        if around.addresses.contains(&dst) || layers.routes && self.addresses.contains(&dst) {
            return Way::Local;
        }
        let all = |nets: &[IpNet], way| {
            let net = nets
                .iter()
                .filter(|net| net.contains(&dst))
                .map(|net| net.prefix_len())
                .max();
            net.map(|len| (len, way))
        };
        let own = around
            .own
            .iter()
            .find(|net| net.contains(&dst))
            .map(|net| (net.prefix_len(), Way::Pods));
        let ours = [all(&self.unreachable, Way::Unreachable), all(&self.routes, Way::Mesh)];
        let ways = own
            .into_iter()
            .chain(ours.into_iter().flatten().filter(|_| layers.routes));
        ways.max_by_key(|(len, _)| *len).map_or(Way::Uplink, |(_, way)| way)
    }

    fn lookup(&self, layers: Layers, direction: Direction, packet: Packet, device: u32) -> Option<Verdict> {
        let policies = layers.policies.then_some(&self.policies[direction as usize])?;
        let policy = policies
            .iter()
            .find(|policy| selects(&policy.id.selector, packet, device))?;
        Some((policy.action, policy.template))
    }
}

type Verdict = (Action, Option<Template>);

/// Sends `packet` through a node that holds what is on the `scene`.
pub(crate) fn fate(scene: &Scene, around: &Surroundings, layers: Layers, from: From<'_>, packet: Packet) -> Fate {
    let Packet { src, dst, .. } = packet;
    let filtered = |address: IpAddr| {
        layers.firewall
            && scene.firewall.as_ref().is_some_and(|rules| {
                rules.uplink == around.uplink.0 && rules.networks.iter().any(|net| net.contains(&address))
            })
    };
    if from == From::Uplink && filtered(src) {
        return Fate::Dropped("filter: arriving");
    }
    let way = scene.way(around, layers, dst);
    let device = match way {
        Way::Unreachable => return Fate::Dropped("unreachable"),
        Way::Local => LO,
        Way::Pods => PODS,
        Way::Mesh => MESH,
        Way::Uplink => around.uplink.1,
    };
    let inward = match (from, &way) {
        (From::Node, _) => None,
        (_, Way::Local) => Some(Direction::In),
        _ => Some(Direction::Fwd),
    };
    if let Some(direction) = inward {
        let sa = match from {
            From::Tunnel(sa) => Some(sa),
            _ => None,
        };
        if let Err(why) = admit(scene.lookup(layers, direction, packet, device), sa) {
            return Fate::Dropped(why);
        }
    }
    if matches!(way, Way::Local) {
        return Fate::Delivered;
    }
    match scene.lookup(layers, Direction::Out, packet, device) {
        Some((Action::Block, _)) => return Fate::Dropped("block out"),
        Some((Action::Allow, Some(template))) => {
            let serves = |sa: &Sa| {
                (sa.src, sa.dst, sa.reqid) == (template.src, template.dst, template.reqid)
                    && (template.spi == 0 || template.spi == sa.spi)
            };
            return match scene.sas.iter().find(|sa| serves(sa)) {
                Some(sa) => Fate::Sealed(sa.id()),
                None => Fate::Dropped("no SA"),
            };
        }
        Some((Action::Allow, None)) | None => {}
    }
    match way {
        Way::Pods => Fate::Delivered,
        Way::Mesh => Fate::Dropped("swallowed by the device"),
        _ if filtered(dst) => Fate::Dropped("filter: leaving"),
        _ => Fate::Plain,
    }
}

fn selects(selector: &Selector, packet: Packet, device: u32) -> bool {
    let Selector {
        src,
        dst,
        protocol,
        sport,
        dport,
        ifindex,
    } = selector;
    let ports = packet.udp.unwrap_or_default();
    src.contains(&packet.src)
        && dst.contains(&packet.dst)
        && (*protocol == 0 || (*protocol == UDP && packet.udp.is_some()))
        && sport.is_none_or(|port| port == ports.0)
        && dport.is_none_or(|port| port == ports.1)
        && (*ifindex == 0 || *ifindex == device)
}

fn admit(verdict: Option<Verdict>, came_by: Option<&Sa>) -> Result<(), &'static str> {
    match (verdict, came_by) {
        (Some((Action::Block, _)), _) => Err("block in or fwd"),
        (Some((Action::Allow, Some(_))), None) => Err("was not ESP"),
        (Some((Action::Allow, Some(template))), Some(sa)) => {
            let src = template.src.is_unspecified() || template.src == sa.src;
            let right = src && template.reqid == sa.reqid && (template.spi == 0 || template.spi == sa.spi);
            if right { Ok(()) } else { Err("of another peer's SA") }
        }
        (Some((Action::Allow, None)) | None, Some(_)) => Err("came through a tunnel that nobody wants"),
        (Some((Action::Allow, None)) | None, None) => Ok(()),
    }
}

/// The first address of `net` that a pod may have.
pub(crate) fn pod(net: IpNet) -> IpAddr {
    net.hosts().nth(4).expect("a subnet has room for pods")
}

/// What must never happen on a node, given what it holds: each violation in words. `nobody` is a subnet of the Network
/// that no one holds; `layers` what counts.
pub(crate) fn leaks(
    scene: &Scene,
    around: &Surroundings,
    layers: Layers,
    peers: &[IpNet],
    nobody: &[IpNet],
    ways: Leak,
) -> Vec<String> {
    let mut found = Vec::new();
    let same = |a: &IpNet, b: &IpNet| a.addr().is_ipv4() == b.addr().is_ipv4();
    let mut see = |what: String, from: From<'_>, packet: Packet, bad: Fate| {
        if fate(scene, around, layers, from, packet) == bad {
            found.push(format!("{what}: {} to {} is {bad:?}", packet.src, packet.dst));
        }
    };
    for own in around.own.iter() {
        let node = around
            .addresses
            .iter()
            .copied()
            .find(|a| a.is_ipv4() == own.addr().is_ipv4());
        let foreign: IpAddr = if own.addr().is_ipv4() {
            [198, 51, 100, 9].into()
        } else {
            [0x20, 1, 0xd, 0xb8, 9, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 9].into()
        };
        let packet = |src, dst| Packet { src, dst, udp: None };
        for net in peers.iter().chain(nobody).filter(|net| same(net, &own)) {
            let to = pod(*net);
            if ways.out {
                see(
                    "a pod's packet leaves".into(),
                    From::Behind,
                    packet(pod(own), to),
                    Fate::Plain,
                );
                see(
                    "a foreign packet leaves".into(),
                    From::Behind,
                    packet(foreign, to),
                    Fate::Plain,
                );
                see(
                    "a packet that came in leaves".into(),
                    From::Uplink,
                    packet(foreign, to),
                    Fate::Plain,
                );
                see(
                    "the base address's packet leaves".into(),
                    From::Node,
                    packet(own.network(), to),
                    Fate::Plain,
                );
                if let Some(node) = node {
                    see(
                        "the node's packet leaves".into(),
                        From::Node,
                        packet(node, to),
                        Fate::Plain,
                    );
                }
            }
            if ways.inward {
                see(
                    "a forged packet reaches a pod".into(),
                    From::Uplink,
                    packet(to, pod(own)),
                    Fate::Delivered,
                );
                if let Some(node) = node {
                    see(
                        "a forged packet reaches the node".into(),
                        From::Uplink,
                        packet(to, node),
                        Fate::Delivered,
                    );
                }
            }
        }
        if ways.own {
            let forged = packet(pod(own), own.hosts().nth(7).expect("room for pods"));
            see(
                "a packet forged as an own pod's reaches a pod".into(),
                From::Uplink,
                forged,
                Fate::Delivered,
            );
        }
    }
    found
}

/// Which leaks to look for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Leak {
    /// Traffic to the Network in the clear.
    pub(crate) out: bool,
    /// Traffic in by the uplink, in the clear, as from another node's pod.
    pub(crate) inward: bool,
    /// The same, as from an own pod: the filter alone can tell.
    pub(crate) own: bool,
}

impl Leak {
    pub(crate) const ALL: Self = Self {
        out: true,
        inward: true,
        own: true,
    };
    pub(crate) const OUT: Self = Self {
        out: true,
        inward: false,
        own: false,
    };
    pub(crate) const WITHOUT_FILTER: Self = Self {
        out: true,
        inward: true,
        own: false,
    };
}

/// What must go on working on a node whatever else happens: each failure in words.
pub(crate) fn cuts(scene: &Scene, around: &Surroundings) -> Vec<String> {
    let mut found = Vec::new();
    let mut need = |what: &str, from: From<'_>, src: IpAddr, dst: IpAddr, good: Fate| {
        let packet = Packet { src, dst, udp: None };
        let fate = fate(scene, around, Layers::ALL, from, packet);
        if fate != good {
            found.push(format!("{what}: {src} to {dst} is {fate:?}"));
        }
    };
    for own in around.own.iter() {
        let internet: IpAddr = if own.addr().is_ipv4() {
            [203, 0, 113, 80].into()
        } else {
            [0x20, 1, 0xd, 0xb8, 0xff, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1].into()
        };
        let pod = pod(own);
        for node in around.addresses.iter().filter(|a| a.is_ipv4() == pod.is_ipv4()) {
            need("a pod to its node", From::Behind, pod, *node, Fate::Delivered);
            need("a node to its pod", From::Node, *node, pod, Fate::Delivered);
        }
        if scene.addresses.contains(&own.network()) {
            need(
                "a pod to its node's base",
                From::Behind,
                pod,
                own.network(),
                Fate::Delivered,
            );
            need("a base to its pod", From::Node, own.network(), pod, Fate::Delivered);
        }
        need("a pod to the world", From::Behind, pod, internet, Fate::Plain);
        need("the world to a pod", From::Behind, internet, pod, Fate::Delivered);
    }
    found
}
