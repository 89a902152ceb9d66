//! The ways that a pod's packet could go unencrypted, given what the kernel holds.
//!
//! Only objects of ours are seen here: what another program adds (a policy of a lower priority number, a longer route)
//! is beyond it.

use ipnet::IpNet;
use xfrm::{Action, Direction, Policy, PolicyId};

use super::{Directory, explain};
use crate::backend::ipsec::LINK;
use crate::kernel::{Guard, Key, Object, Objects, priority};

/// Each way, one sentence with what else holds; in a fixed order.
pub(super) fn ways(actual: &Objects, directory: &Directory) -> Vec<String> {
    if let Some(backend) = directory.unencrypted {
        return vec![format!(
            "backend {backend} does not encrypt: all that pods send to other nodes is in plaintext, as configured"
        )];
    }
    let mut ways = Vec::new();
    for net in &directory.network {
        guard_of_network(actual, *net, &mut ways);
    }
    own_subnets(actual, directory, &mut ways);
    for (key, object) in actual {
        ways.extend(open(key, object, directory));
    }
    ways
}

fn guard_of_network(actual: &Objects, net: IpNet, ways: &mut Vec<String>) {
    if actual.get(&Key::GuardRoute(net)) != Some(&Object::Unreachable) {
        ways.push(format!(
            "no unreachable route for {net}: a packet to a subnet that nobody holds follows the default route, and only \
             the block policy out stops it"
        ));
    }
    for direction in [Direction::Out, Direction::In, Direction::Fwd] {
        if blocked(actual, direction, net) {
            continue;
        }
        ways.push(match direction {
            Direction::Out => format!(
                "no block policy out to {net}: a packet that no peer's policy takes leaves in plaintext wherever a \
                 route leads out; only the routes stop it"
            ),
            Direction::In => format!(
                "no block policy in from {net}: this node takes a packet that claims a pod's address and was not ESP; \
                 only the firewall stops it"
            ),
            Direction::Fwd => format!(
                "no block policy fwd from {net}: pods here take a packet that claims a pod's address and was not ESP; \
                 only the firewall stops it"
            ),
        });
    }
}

fn own_subnets(actual: &Objects, directory: &Directory, ways: &mut Vec<String>) {
    if directory.own.iter().next().is_some() {
        device(actual, ways);
    }
    let Some((uplink, _)) = &directory.uplink else { return };
    if !actual.contains_key(&Key::Firewall) {
        ways.push(format!(
            "no firewall of ours: what comes in by {uplink} unencrypted and claims a pod of this node is taken; what \
             else goes over {uplink} unencrypted from or to a pod's address only policies and routes stop"
        ));
    }
}

fn device(actual: &Objects, ways: &mut Vec<String>) {
    if !actual.contains_key(&Key::Link(LINK.into())) {
        ways.push(format!(
            "no device {LINK}: the peers' routes went with it, so their packets follow the next best route; only the \
             unreachable route and the block policy out stop them"
        ));
    }
}

/// What one object opens by itself.
fn open(key: &Key, object: &Object, directory: &Directory) -> Option<String> {
    match object {
        Object::Policy(policy) if policy.template.is_some_and(|template| template.optional) => Some(format!(
            "{key} takes packets with and without a tunnel, as AllowPlaintextPeers allows"
        )),
        Object::Policy(policy) if policy.priority == priority::PLAINTEXT => Some(format!(
            "{key} lets packets pass in plaintext, as AllowPlaintextPeers allows"
        )),
        Object::Policy(policy) => {
            let allows = policy.action == Action::Allow && policy.template.is_none();
            let stays = matches!(key, Key::Guard(Guard::Local, id) if stays_on_node(id, directory));
            (allows && !stays).then(|| {
                format!(
                    "{key} lets packets pass without a tunnel (priority {}): remove or correct it",
                    policy.priority
                )
            })
        }
        Object::Route(route) if route.link != LINK => Some(format!(
            "{key} goes to {link} instead of {LINK}: a packet that no policy takes leaves there",
            link = route.link
        )),
        Object::Sa { sa, .. } if explain::known_cipher(sa).is_none() => Some(format!(
            "{key} uses {}, which is none of ringmail's ciphers and may not encrypt",
            sa.algorithm.name
        )),
        Object::Sysctl(_)
        | Object::Firewall(_)
        | Object::Unreachable
        | Object::Blackhole
        | Object::Link(_)
        | Object::Address
        | Object::HashThreshold { .. }
        | Object::Sa { .. }
        | Object::Neighbour(_)
        | Object::Fdb(_)
        | Object::Route(_) => None,
    }
}

/// Whether a policy is about the own subnets alone: as destination on the way out, as source on the way in.
fn stays_on_node(id: &PolicyId, directory: &Directory) -> bool {
    let end = match id.direction {
        Direction::Out => id.selector.dst,
        Direction::In | Direction::Fwd => id.selector.src,
    };
    directory.own.iter().any(|own| own.contains(&end))
}

/// Whether a policy of the guard blocks all of `net`: as destination on the way out, as source on the way in.
fn blocked(actual: &Objects, direction: Direction, net: IpNet) -> bool {
    let whole = |range: &IpNet| range.prefix_len() == 0;
    let covers = |id: &PolicyId| {
        let (end, other) = match direction {
            Direction::Out => (id.selector.dst, id.selector.src),
            Direction::In | Direction::Fwd => (id.selector.src, id.selector.dst),
        };
        let narrow = id.selector.protocol != 0 || id.selector.sport.is_some() || id.selector.dport.is_some();
        id.direction == direction && end.contains(&net) && whole(&other) && !narrow && id.selector.ifindex == 0
    };
    let blocks = |policy: &Policy| policy.action == Action::Block && policy.template.is_none();
    actual.iter().any(|(key, object)| match (key, object) {
        (Key::Guard(_, id), Object::Policy(policy)) => covers(id) && blocks(policy),
        _ => false,
    })
}
