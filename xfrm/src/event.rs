//! What changes in the kernel's IPsec, as it happens.
//!
//! Never listens for ACQUIRE: one listener is enough to make the kernel create larval SAs, and adding ours then fails.

use std::{
    net::IpAddr,
    os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd},
};

use netlink_packet_core::Emitable;
use netlink_packet_xfrm::{
    UserExpire, UserMapping, UserPolicyExpire, UserPolicyId, UserPolicyInfo, UserSaId, UserSaInfo,
    constants::{
        IPPROTO_ESP, IPSEC_PROTO_ANY, XFRM_MSG_DELPOLICY, XFRM_MSG_DELSA, XFRM_MSG_EXPIRE, XFRM_MSG_FLUSHPOLICY,
        XFRM_MSG_FLUSHSA, XFRM_MSG_MAPPING, XFRM_MSG_NEWPOLICY, XFRM_MSG_NEWSA, XFRM_MSG_POLEXPIRE, XFRM_MSG_UPDPOLICY,
        XFRM_MSG_UPDSA, XFRMA_IF_ID, XFRMA_MARK, XFRMA_POLICY, XFRMA_POLICY_TYPE, XFRMNLGRP_EXPIRE, XFRMNLGRP_MAPPING,
        XFRMNLGRP_POLICY, XFRMNLGRP_SA,
    },
};

use crate::{
    Error, MessageRef, Monitor, Parsed, Policy, PolicyId, Protocol, Sa, SaId, address::ip, message::attributes, policy,
    sa,
};

/// The groups that are listened to.
const GROUPS: [u32; 4] = [XFRMNLGRP_SA, XFRMNLGRP_POLICY, XFRMNLGRP_EXPIRE, XFRMNLGRP_MAPPING];

/// A change and whose doing it was.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Notification {
    /// The port of the socket whose request was the cause ([`crate::Connection::port`]); 0 for the kernel itself, and
    /// for programs that leave it out, as `ip` does.
    pub port: u32,
    /// What changed.
    pub event: Event,
}

/// A change.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Event {
    /// An SA was made or updated.
    SaAdded(Sa),
    /// An SA was removed.
    SaDeleted(SaId),
    /// Every ESP SA was removed.
    SaFlushed,
    /// An SA reached a limit.
    SaExpired {
        /// Which one.
        id: SaId,
        /// It reached the hard limit and is gone; otherwise the soft one and it goes on.
        hard: bool,
    },
    /// A peer's packets on an SA with ESP in UDP come from another address or port than the SA says: a NAT between has
    /// forgotten. The SA is unchanged. The kernel says so once a packet was authenticated.
    Mapping {
        /// The inbound SA.
        id: SaId,
        /// Its reqid.
        reqid: u32,
        /// The source address that the SA says.
        old_src: IpAddr,
        /// The source port that the SA says.
        old_port: u16,
        /// Where the packets come from.
        new_src: IpAddr,
        /// Their source port.
        new_port: u16,
    },
    /// A policy was made or replaced.
    PolicySet(Policy),
    /// A policy was removed.
    PolicyDeleted(PolicyId),
    /// Every policy was removed.
    PolicyFlushed,
    /// A policy reached a limit.
    PolicyExpired {
        /// Which one.
        id: PolicyId,
        /// It is gone.
        hard: bool,
    },
    /// A change of something that our types cannot express, so none of ours.
    Other {
        /// The netlink message type.
        kind: u16,
    },
}

/// A listener for IPsec changes. What it was told before an error is kept; see [`Events::read`].
pub struct Events(Monitor);

impl Events {
    /// Starts listening in the network namespace of the calling thread.
    pub fn open() -> Result<Self, Error> {
        Monitor::open(Protocol::Xfrm, &GROUPS).map(Self)
    }

    /// Gives out every change in the queue, oldest first; never waits.
    ///
    /// [`Error::Overrun`] and [`Error::Malformed`] say that changes were missed: read the state anew, and call again.
    pub fn read(&mut self, each: &mut dyn FnMut(Notification)) -> Result<(), Error> {
        let mut malformed = None;
        self.0.read(&mut |message| match parse(&message) {
            Ok(event) => each(Notification {
                port: message.port,
                event,
            }),
            Err(error) => malformed = Some(error),
        })?;
        malformed.map_or(Ok(()), Err)
    }
}

impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl AsRawFd for Events {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// What a notification says.
pub(crate) fn parse(message: &MessageRef<'_>) -> Result<Event, Error> {
    let malformed = || Error::Malformed {
        kind: message.kind,
        length: message.payload.len(),
    };
    let event = match message.kind {
        XFRM_MSG_NEWSA | XFRM_MSG_UPDSA => match sa::parse(message)? {
            Parsed::Known(info) => Some(Event::SaAdded(info.sa)),
            Parsed::Other(_) => None,
        },
        XFRM_MSG_DELSA => {
            let id = UserSaId::parse(message.payload).map_err(|_| malformed())?;
            let unmarked = is_unmarked(&message.payload[id.buffer_len()..]);
            sa_id(&id).filter(|_| unmarked).map(Event::SaDeleted)
        }
        XFRM_MSG_FLUSHSA => {
            let protocol = *message.payload.first().ok_or_else(malformed)?;
            [0, IPPROTO_ESP, IPSEC_PROTO_ANY]
                .contains(&protocol)
                .then_some(Event::SaFlushed)
        }
        XFRM_MSG_EXPIRE => {
            let UserExpire { state, hard } = UserExpire::parse(message.payload).map_err(|_| malformed())?;
            let unmarked = is_unmarked(&message.payload[UserExpire { state, hard }.buffer_len()..]);
            expired(&state)
                .filter(|_| unmarked)
                .map(|id| Event::SaExpired { id, hard: hard != 0 })
        }
        XFRM_MSG_MAPPING => mapping(&UserMapping::parse(message.payload).map_err(|_| malformed())?),
        XFRM_MSG_NEWPOLICY | XFRM_MSG_UPDPOLICY => match policy::parse(message)? {
            Parsed::Known(policy) => Some(Event::PolicySet(policy)),
            Parsed::Other(_) => None,
        },
        XFRM_MSG_DELPOLICY => {
            let id = UserPolicyId::parse(message.payload).map_err(|_| malformed())?;
            let rest = &message.payload[id.buffer_len()..];
            // Removed by its number, a policy is named in the attribute alone.
            let (_, info) = attributes(rest)
                .find(|(kind, _)| *kind == XFRMA_POLICY)
                .ok_or_else(malformed)?;
            let info = UserPolicyInfo::parse(info).map_err(|_| malformed())?;
            policy_id(&info, rest).map(Event::PolicyDeleted)
        }
        XFRM_MSG_FLUSHPOLICY => {
            let main = attributes(message.payload)
                .find(|(kind, _)| *kind == XFRMA_POLICY_TYPE)
                .is_none_or(|(_, kind)| kind.first().is_none_or(|kind| *kind == 0));
            main.then_some(Event::PolicyFlushed)
        }
        XFRM_MSG_POLEXPIRE => {
            let expire = UserPolicyExpire::parse(message.payload).map_err(|_| malformed())?;
            policy_id(&expire.pol, &message.payload[expire.buffer_len()..]).map(|id| Event::PolicyExpired {
                id,
                hard: expire.hard != 0,
            })
        }
        _ => None,
    };
    Ok(event.unwrap_or(Event::Other { kind: message.kind }))
}

fn sa_id(id: &UserSaId) -> Option<SaId> {
    let dst = ip(&id.daddr, id.family)?;
    (id.proto == IPPROTO_ESP).then_some(SaId { dst, spi: id.spi })
}

fn expired(state: &UserSaInfo) -> Option<SaId> {
    let dst = ip(&state.id.daddr, state.family)?;
    (state.id.proto == IPPROTO_ESP).then_some(SaId { dst, spi: state.id.spi })
}

fn mapping(mapping: &UserMapping) -> Option<Event> {
    Some(Event::Mapping {
        id: sa_id(&mapping.id)?,
        reqid: mapping.reqid,
        old_src: ip(&mapping.old_saddr, mapping.id.family)?,
        old_port: mapping.old_sport,
        new_src: ip(&mapping.new_saddr, mapping.id.family)?,
        new_port: mapping.new_sport,
    })
}

fn policy_id(info: &UserPolicyInfo, rest: &[u8]) -> Option<PolicyId> {
    match policy::read(info, rest) {
        Parsed::Known(policy) => Some(policy.id),
        Parsed::Other(_) => None,
    }
}

/// Whether neither a mark nor an interface id makes this another object than the one with the same index of ours.
fn is_unmarked(rest: &[u8]) -> bool {
    attributes(rest)
        .filter(|(kind, _)| [XFRMA_MARK, XFRMA_IF_ID].contains(kind))
        .all(|(_, payload)| payload.iter().all(|byte| *byte == 0))
}
