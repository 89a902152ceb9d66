//! Policies: which traffic must go through which SA, and its codec.

use std::net::IpAddr;

use ipnet::IpNet;
use netlink_packet_core::Emitable;
use netlink_packet_xfrm::{
    Address, Id, LifetimeConfig, Selector as UserSelector, UserPolicyId, UserPolicyInfo, UserTemplate,
    constants::{
        AF_INET, AF_INET6, IPPROTO_ESP, XFRM_MODE_TUNNEL, XFRM_MSG_DELPOLICY, XFRM_MSG_NEWPOLICY, XFRM_MSG_UPDPOLICY,
        XFRM_POLICY_ALLOW, XFRM_POLICY_BLOCK, XFRM_POLICY_FWD, XFRM_POLICY_IN, XFRM_POLICY_OUT, XFRM_SHARE_ANY,
        XFRMA_IF_ID, XFRMA_MARK, XFRMA_OFFLOAD_DEV, XFRMA_POLICY_TYPE, XFRMA_SEC_CTX, XFRMA_TMPL,
    },
};

use crate::{
    Batch, Error, MessageRef, Parsed, Writer,
    address::{family, ip},
    message::attributes,
};

/// Length of `struct xfrm_user_tmpl`.
const TEMPLATE: usize = 64;

/// Where a policy is looked up. In the order in which ours are made: what lets a peer in comes before what sends to it.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub enum Direction {
    /// For packets to this machine.
    In,
    /// For packets that pass through.
    Fwd,
    /// For packets that leave, passing ones included.
    Out,
}

impl Direction {
    const ALL: [(Self, u8); 3] = [
        (Self::In, XFRM_POLICY_IN),
        (Self::Fwd, XFRM_POLICY_FWD),
        (Self::Out, XFRM_POLICY_OUT),
    ];

    fn number(self) -> u8 {
        match self {
            Self::In => XFRM_POLICY_IN,
            Self::Fwd => XFRM_POLICY_FWD,
            Self::Out => XFRM_POLICY_OUT,
        }
    }

    fn from_number(number: u8) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|(_, known)| *known == number)
            .map(|(direction, _)| direction)
    }
}

/// The traffic that a policy is for.
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct Selector {
    /// Inner source addresses.
    pub src: IpNet,
    /// Inner destination addresses, of the same family as the source.
    pub dst: IpNet,
    /// IP protocol number; 0 for any.
    pub protocol: u8,
    /// Source port; `None` for any.
    pub sport: Option<u16>,
    /// Destination port; `None` for any.
    pub dport: Option<u16>,
    /// Index of the interface that the traffic goes through; 0 for any.
    pub ifindex: u32,
}

impl Selector {
    /// All traffic from `src` to `dst`.
    pub fn between(src: IpNet, dst: IpNet) -> Self {
        Self {
            src,
            dst,
            protocol: 0,
            sport: None,
            dport: None,
            ifindex: 0,
        }
    }
}

/// The kernel's index of policies: direction and selector (and mark and interface id, always 0 here).
#[derive(Clone, Copy, Debug, Eq, Hash, Ord, PartialEq, PartialOrd)]
pub struct PolicyId {
    /// Where it is looked up.
    pub direction: Direction,
    /// What it is for.
    pub selector: Selector,
}

/// What happens to the traffic of a selector.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Policy {
    /// What the kernel finds it by. The priority is no part of it.
    pub id: PolicyId,
    /// The lowest number wins.
    pub priority: u32,
    /// Whether the traffic may pass.
    pub action: Action,
    /// The tunnel that it must go through or must have come through; `None` for neither.
    pub template: Option<Template>,
}

/// Whether traffic may pass.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Action {
    /// Passes, through the template if there is one.
    Allow,
    /// Is dropped.
    Block,
}

/// An ESP tunnel. Its family may differ from the selector's.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Template {
    /// Outer source address.
    pub src: IpAddr,
    /// Outer destination address, of the same family as the source.
    pub dst: IpAddr,
    /// The one SA that serves; 0 for any between the two with this reqid, and then the newest at once.
    pub spi: u32,
    /// The reqid of the SAs that serve; 0 for any.
    pub reqid: u32,
    /// Whether a packet may come without it, too; where it goes out, it is then skipped as long as no SA serves.
    pub optional: bool,
}

/// A policy of someone else's that [`Policy`] cannot express.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct ForeignPolicy {
    /// Where it is looked up; `None` for a socket's own policy.
    pub direction: Option<Direction>,
    /// What it is for, as far as [`Selector`] can say.
    pub selector: Option<Selector>,
    /// Its priority.
    pub priority: u32,
    /// The first thing found that [`Policy`] has no place for.
    pub reason: &'static str,
}

impl Batch {
    /// Makes the policy, or replaces the one with its [`PolicyId`] in one step: no packet finds neither.
    ///
    /// # Panics
    /// If the two nets of the selector or the two addresses of the template are not of one family.
    pub fn set_policy(&mut self, policy: &Policy) {
        self.push(XFRM_MSG_UPDPOLICY, 0, |writer| write(writer, policy));
    }

    /// Makes the policy. Refused (EEXIST) if there is one with its [`PolicyId`].
    ///
    /// # Panics
    /// As [`Batch::set_policy`].
    pub fn add_policy(&mut self, policy: &Policy) {
        self.push(XFRM_MSG_NEWPOLICY, 0, |writer| write(writer, policy));
    }

    /// Removes a policy. Refused (ENOENT) if there is none.
    ///
    /// # Panics
    /// As [`Batch::set_policy`].
    pub fn delete_policy(&mut self, id: &PolicyId) {
        self.push(XFRM_MSG_DELPOLICY, 0, |writer| {
            writer.emit(&UserPolicyId {
                selector: user_selector(&id.selector),
                index: 0,
                direction: id.direction.number(),
            });
        });
    }
}

fn user_selector(selector: &Selector) -> UserSelector {
    let Selector {
        src,
        dst,
        protocol,
        sport,
        dport,
        ifindex,
    } = selector;
    assert_eq!(
        family(src.addr()),
        family(dst.addr()),
        "a selector's nets are of one family"
    );
    let port = |port: &Option<u16>| port.map_or((0, 0), |port| (port, u16::MAX));
    let ((sport, sport_mask), (dport, dport_mask)) = (port(sport), port(dport));
    UserSelector {
        daddr: Address::from_ip(&dst.addr()),
        saddr: Address::from_ip(&src.addr()),
        dport,
        dport_mask,
        sport,
        sport_mask,
        family: family(dst.addr()),
        prefixlen_d: dst.prefix_len(),
        prefixlen_s: src.prefix_len(),
        proto: *protocol,
        ifindex: ifindex.cast_signed(),
        user: 0,
    }
}

/// Writes `struct xfrm_userpolicy_info` and its template.
fn write(writer: &mut Writer<'_>, policy: &Policy) {
    let Policy {
        id: PolicyId { direction, selector },
        priority,
        action,
        template,
    } = policy;
    writer.emit(&UserPolicyInfo {
        selector: user_selector(selector),
        lifetime_cfg: LifetimeConfig::default(),
        priority: *priority,
        direction: direction.number(),
        action: match action {
            Action::Allow => XFRM_POLICY_ALLOW,
            Action::Block => XFRM_POLICY_BLOCK,
        },
        share: XFRM_SHARE_ANY,
        ..UserPolicyInfo::default()
    });
    let Some(Template {
        src,
        dst,
        spi,
        reqid,
        optional,
    }) = template
    else {
        return;
    };
    assert_eq!(family(*src), family(*dst), "a template's addresses are of one family");
    writer.attribute_with(XFRMA_TMPL, |writer| {
        writer.emit(&UserTemplate {
            id: Id {
                daddr: Address::from_ip(dst),
                spi: *spi,
                proto: IPPROTO_ESP,
            },
            family: family(*dst),
            saddr: Address::from_ip(src),
            reqid: *reqid,
            mode: XFRM_MODE_TUNNEL,
            optional: (*optional).into(),
            ..UserTemplate::default()
        });
    });
}

/// What a NEWPOLICY or UPDPOLICY message shows.
pub(crate) fn parse(message: &MessageRef<'_>) -> Result<Parsed<Policy, ForeignPolicy>, Error> {
    let malformed = || Error::Malformed {
        kind: message.kind,
        length: message.payload.len(),
    };
    let info = UserPolicyInfo::parse(message.payload).map_err(|_| malformed())?;
    Ok(read(&info, &message.payload[info.buffer_len()..]))
}

/// What the fixed part and the attributes of a policy say.
pub(crate) fn read(info: &UserPolicyInfo, rest: &[u8]) -> Parsed<Policy, ForeignPolicy> {
    let direction = Direction::from_number(info.direction);
    let selector = read_selector(&info.selector);
    let foreign = |reason| {
        Parsed::Other(ForeignPolicy {
            direction,
            selector,
            priority: info.priority,
            reason,
        })
    };
    let Some(direction) = direction else {
        return foreign("a socket's own");
    };
    let Some(selector) = selector else {
        return foreign("a selector by user, port range or unknown family");
    };
    let action = match info.action {
        XFRM_POLICY_ALLOW => Action::Allow,
        XFRM_POLICY_BLOCK => Action::Block,
        _ => return foreign("an action that is neither allow nor block"),
    };
    if info.flags != 0 {
        return foreign("flags");
    }
    if info.share != XFRM_SHARE_ANY {
        return foreign("restricted sharing");
    }
    if info.lifetime_cfg != LifetimeConfig::default() {
        return foreign("limits");
    }
    let mut template = None;
    for (kind, payload) in attributes(rest) {
        match kind {
            XFRMA_TMPL => match read_template(payload) {
                Ok(found) => template = found,
                Err(reason) => return foreign(reason),
            },
            XFRMA_POLICY_TYPE if payload.first().is_some_and(|kind| *kind != 0) => return foreign("a sub policy"),
            XFRMA_SEC_CTX => return foreign("a security context"),
            XFRMA_OFFLOAD_DEV => return foreign("offload to a device"),
            XFRMA_MARK if payload.iter().any(|byte| *byte != 0) => return foreign("a mark"),
            XFRMA_IF_ID if payload.iter().any(|byte| *byte != 0) => return foreign("an interface id"),
            _ => {}
        }
    }
    Parsed::Known(Policy {
        id: PolicyId { direction, selector },
        priority: info.priority,
        action,
        template,
    })
}

/// The index that a DELPOLICY notification or an expiry names, if ours can be it.
pub(crate) fn read_selector(selector: &UserSelector) -> Option<Selector> {
    if selector.user != 0 {
        return None;
    }
    let port = |port: u16, mask: u16| match (port, mask) {
        (0, 0) => Some(None),
        (port, u16::MAX) => Some(Some(port)),
        _ => None,
    };
    let net =
        |address: &Address, prefix| ip(address, selector.family).and_then(|address| IpNet::new(address, prefix).ok());
    Some(Selector {
        src: net(&selector.saddr, selector.prefixlen_s)?,
        dst: net(&selector.daddr, selector.prefixlen_d)?,
        protocol: selector.proto,
        sport: port(selector.sport, selector.sport_mask)?,
        dport: port(selector.dport, selector.dport_mask)?,
        ifindex: selector.ifindex.cast_unsigned(),
    })
}

/// The template in an XFRMA_TMPL attribute, or why it is none of ours.
fn read_template(payload: &[u8]) -> Result<Option<Template>, &'static str> {
    if payload.is_empty() {
        return Ok(None);
    }
    if payload.len() != TEMPLATE {
        return Err("several templates");
    }
    let Ok(template) = UserTemplate::parse(payload) else {
        return Err("an unreadable template");
    };
    let expected = UserTemplate {
        id: Id {
            proto: IPPROTO_ESP,
            ..template.id
        },
        family: template.family,
        saddr: template.saddr,
        reqid: template.reqid,
        mode: XFRM_MODE_TUNNEL,
        optional: template.optional,
        ..UserTemplate::default()
    };
    if template != expected || ![AF_INET, AF_INET6].contains(&template.family) {
        return Err("a template that is not an ESP tunnel");
    }
    let (Some(src), Some(dst)) = (
        ip(&template.saddr, template.family),
        ip(&template.id.daddr, template.family),
    ) else {
        return Err("a template of an unknown family");
    };
    Ok(Some(Template {
        src,
        dst,
        spi: template.id.spi,
        reqid: template.reqid,
        optional: template.optional != 0,
    }))
}
