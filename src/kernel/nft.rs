//! The packet filter as one nf_tables table of our own, `inet ringmail`, over netlink without the nft program.
//!
//! It is written whole in one transaction and compared whole. What the kernel shows after our write, handles included,
//! is remembered; a table that shows anything else has been changed by someone. Nothing outside the table is read or
//! written; flannel's own two tables are deleted, since their rules are taken over.

mod wire;

use std::net::Ipv4Addr;

use ipnet::{IpNet, Ipv4Net};
use xfrm::message::attributes;
use xfrm::{Connection, MessageRef, Protocol};

use crate::kernel::firewall::{Counters, Firewall, Form, Tally, Way};
use crate::lease::{Addresses, Subnets};

/// Our table's name, in the family `inet`.
pub const TABLE: &str = "ringmail";
/// `NFNLGRP_NFTABLES`: the group that tells of every change.
pub const GROUP: u32 = 7;
/// The table of [`Nft::open`]'s question, which the kernel never gets to make.
const QUESTION_TABLE: &str = "ringmail-question";
/// How often a write is repeated because another program's transaction came between it and the reading back.
const ATTEMPTS: u32 = 5;

/// Why nf_tables does not hold what it should.
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// The kernel refused or did not answer.
    #[error("{step}")]
    Netlink {
        /// What we were doing.
        step: &'static str,
        /// The kernel's reason.
        source: xfrm::Error,
    },
    /// The kernel lacks a part of what our rules need.
    #[error("this kernel's nf_tables lacks what source translation in the inet family needs ({source})")]
    Unsupported {
        /// The kernel's reason.
        source: xfrm::Error,
    },
    /// We may not.
    #[error("nf_tables may not be changed by this process: it needs CAP_NET_ADMIN")]
    Forbidden,
}

/// The table, and what we last put there.
pub struct Nft {
    connection: Connection,
    written: Option<(Firewall, Standing)>,
}

/// What the kernel shows of our table: of each object what makes it work, handles included, and no counters.
type Standing = Vec<Vec<u8>>;

impl Nft {
    /// Asks the kernel, without changing anything, whether it can hold all kinds of rules that we write.
    pub fn open() -> Result<Self, Error> {
        let mut nft = Self::open_unchecked()?;
        match nft
            .connection
            .transact(wire::question(QUESTION_TABLE, &every_kind_of_rule()))
        {
            Err(error) if error.exists() => Ok(nft),
            Err(xfrm::Error::Kernel(error)) if error.errno == nix::libc::EPERM => Err(Error::Forbidden),
            Err(source) => Err(Error::Unsupported { source }),
            // It can't be: the transaction makes a table twice. Should it be, the table goes.
            Ok(()) => nft.delete(QUESTION_TABLE).map(|()| nft),
        }
    }

    /// Opens without asking: enough for [`Nft::remove`].
    pub(super) fn open_unchecked() -> Result<Self, Error> {
        let connection = Connection::open(Protocol::Netfilter).map_err(at("open a netfilter socket"))?;
        Ok(Self {
            connection,
            written: None,
        })
    }

    /// Replaces the table by `firewall` in one transaction. The drop counters keep their numbers.
    pub fn apply(&mut self, firewall: &Firewall) -> Result<(), Error> {
        self.written = None;
        for _ in 0..ATTEMPTS {
            let counters = self.counters()?;
            let before = self.generation()?;
            self.connection
                .transact(wire::replacement(TABLE, firewall, counters))
                .map_err(at("write the table inet ringmail"))?;
            let (standing, generations) = self.read()?;
            // Every transaction, whoever's, makes the next generation: this reading shows ours and no later one.
            if generations.iter().all(|seen| *seen == before.wrapping_add(1)) {
                self.written = Some((firewall.clone(), standing));
                return Ok(());
            }
        }
        // Written it is; what stands is only not known to be ours, so the next comparison asks for another write.
        Ok(())
    }

    /// Whether the table is as [`Nft::apply`] left it when it was last called with `firewall`.
    pub fn matches(&mut self, firewall: &Firewall) -> Result<bool, Error> {
        let Some((written, _)) = &self.written else {
            return Ok(false);
        };
        if written != firewall {
            return Ok(false);
        }
        let (standing, _) = self.read()?;
        Ok(self.written.as_ref().is_some_and(|(_, written)| *written == standing))
    }

    /// Deletes the table.
    pub fn remove(&mut self) -> Result<(), Error> {
        self.written = None;
        self.delete(TABLE)
    }

    /// Deletes the tables that flannel makes when it programs nf_tables.
    pub fn remove_flannels(&mut self) -> Result<(), Error> {
        for (family, table) in wire::FLANNELS {
            match self.connection.transact(wire::removal_in(family, table)) {
                Err(error) if error.is_gone() => {}
                // A kernel whose nf_tables lacks a family holds none of its tables.
                Err(xfrm::Error::Kernel(error))
                    if [nix::libc::EAFNOSUPPORT, nix::libc::EOPNOTSUPP].contains(&error.errno) => {}
                other => other.map_err(at("delete flannel's tables"))?,
            }
        }
        Ok(())
    }

    /// What the guard has dropped; zeros where there is no table.
    pub fn counters(&mut self) -> Result<Counters, Error> {
        let found = self.connection.dump(wire::GET_OBJECT, wire::about(TABLE), |message| {
            let body = ours(&message)?;
            let name = attribute(body, wire::OBJECT_NAME)?;
            let way = Way::ALL.into_iter().find(|way| text_is(name, way.counter()))?;
            let data = attribute(body, wire::OBJECT_DATA)?;
            let number = |kind| Some(u64::from_be_bytes(attribute(data, kind)?.try_into().ok()?));
            Some((
                way,
                Tally {
                    packets: number(wire::COUNTER_PACKETS)?,
                    bytes: number(wire::COUNTER_BYTES)?,
                },
            ))
        });
        let mut counters = Counters::default();
        match found {
            Ok(found) => found.into_iter().for_each(|(way, tally)| *counters.of(way) = tally),
            Err(error) if error.is_gone() => {}
            Err(source) => {
                return Err(Error::Netlink {
                    step: "read the counters of inet ringmail",
                    source,
                });
            }
        }
        Ok(counters)
    }

    /// Whether a notification of [`GROUP`] tells of a change of our table that was not made through this value.
    pub fn touched(&self, message: MessageRef<'_>) -> bool {
        message.port != self.connection.port() && message.kind != wire::NEW_GENERATION && ours(&message).is_some()
    }

    fn delete(&mut self, table: &str) -> Result<(), Error> {
        match self.connection.transact(wire::removal(table)) {
            Err(error) if error.is_gone() => Ok(()),
            other => other.map_err(at("delete the table inet ringmail")),
        }
    }

    /// The lower half of the rule set's generation, which the kernel shows in every answer.
    fn generation(&mut self) -> Result<u16, Error> {
        Ok((generation(&mut self.connection)? & 0xffff) as u16)
    }

    /// What stands in the kernel, and the generation of each answer.
    fn read(&mut self) -> Result<(Standing, Vec<u16>), Error> {
        const TABLE_PARTS: &[u16] = &[wire::TABLE, wire::TABLE_FLAGS, wire::TABLE_HANDLE];
        const CHAIN_PARTS: &[u16] = &[
            wire::TABLE,
            wire::CHAIN_HANDLE,
            wire::CHAIN_NAME,
            wire::CHAIN_HOOK,
            wire::CHAIN_POLICY,
            wire::CHAIN_TYPE,
            wire::CHAIN_FLAGS,
        ];
        const RULE_PARTS: &[u16] = &[wire::TABLE, wire::RULE_CHAIN, wire::RULE_HANDLE, wire::RULE_EXPRESSIONS];
        let mut standing = Vec::new();
        let mut generations = Vec::new();
        for (kind, parts) in [
            (wire::GET_TABLE, TABLE_PARTS),
            (wire::GET_CHAIN, CHAIN_PARTS),
            (wire::GET_RULE, RULE_PARTS),
        ] {
            let found = self.connection.dump(kind, wire::about(TABLE), |message| {
                let body = ours(&message)?;
                let mut object = message.kind.to_be_bytes().to_vec();
                for (kind, value) in attributes(body).filter(|(kind, _)| parts.contains(kind)) {
                    object.extend_from_slice(&kind.to_be_bytes());
                    object.extend_from_slice(&(value.len() as u64).to_be_bytes());
                    object.extend_from_slice(value);
                }
                let generation = u16::from_be_bytes(message.payload.get(2..4)?.try_into().ok()?);
                Some((object, generation))
            });
            match found {
                Ok(found) => found.into_iter().for_each(|(object, generation)| {
                    standing.push(object);
                    generations.push(generation);
                }),
                Err(error) if error.is_gone() => {}
                Err(source) => {
                    return Err(Error::Netlink {
                        step: "read the table inet ringmail",
                        source,
                    });
                }
            }
        }
        Ok((standing, generations))
    }
}

/// The number of the rule set's generation: every change of any table in the network namespace adds one.
pub(super) fn generation(connection: &mut Connection) -> Result<u32, Error> {
    let step = "read the rule set's generation";
    let id = connection.get(
        wire::GET_GENERATION,
        0,
        |w| wire::header(w, 0, 0),
        |message| {
            let id = attribute(message.payload.get(4..)?, wire::GENERATION_ID)?;
            Some(u32::from_be_bytes(id.try_into().ok()?))
        },
    );
    let malformed = xfrm::Error::Malformed {
        kind: wire::NEW_GENERATION,
        length: 0,
    };
    id.and_then(|id| id.ok_or(malformed)).map_err(at(step))
}

/// The attributes of a message that is about our table.
fn ours<'a>(message: &MessageRef<'a>) -> Option<&'a [u8]> {
    let payload = message.payload;
    let about_nftables = message.kind >> 8 == wire::SUBSYSTEM;
    let body = payload.get(4..)?;
    (about_nftables && payload[0] == wire::INET && text_is(attribute(body, wire::TABLE)?, TABLE)).then_some(body)
}

fn attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes)
        .find(|(found, _)| *found == kind)
        .map(|(_, value)| value)
}

fn text_is(value: &[u8], text: &str) -> bool {
    value.strip_suffix(&[0]) == Some(text.as_bytes())
}

fn at(step: &'static str) -> impl FnOnce(xfrm::Error) -> Error {
    move |source| Error::Netlink { step, source }
}

/// For the question: addresses of documentation (RFC 5737). One family is enough, as the kernel has the expressions of
/// the inet family for both or for none.
fn every_kind_of_rule() -> Firewall {
    let net = |c| Ipv4Net::new_assert(Ipv4Addr::new(192, 0, 2, 0), c);
    let own = Subnets {
        v4: Some(net(25)),
        v6: None,
    };
    Firewall {
        form: Form::Sealed,
        networks: vec![IpNet::V4(net(24))],
        own,
        bases: Addresses {
            v4: Some(Ipv4Addr::new(192, 0, 2, 0)),
            v6: None,
        },
        uplink: "lo".into(),
        masquerade: true,
        random_fully: true,
    }
}
