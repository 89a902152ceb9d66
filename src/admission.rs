//! Admission: which leases become peers, and why the others do not.
//!
//! A lease is believed only where its statement carries a tag made with a PSK that this node holds, its fields say what
//! the statement says, and no other verified lease claims the same subnet, public address or public key. One that
//! fails is left out and named; it disturbs nobody else. A verified statement outlives a bad lease that takes its place
//! in the store: who can write to the store can cut a new node off, not replace what is known of an old one.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use ipnet::IpNet;
use keys::{EncapMode, Encoded, Kid, Psk, PublicKey, Slot, Statement, Tag};
use serde::{Deserialize, Serialize};
use smallvec::SmallVec;

use crate::lease::{BackendData, Lease, Network, NoSlot, NodeName};
use crate::packed::pack;

/// What an ipsec lease carries in its `BackendData`.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Published {
    /// The canonical bytes of the statement, base64.
    statement: String,
    /// One tag for each kid of the statement, in its order, base64.
    tags: Vec<String>,
}

/// The `BackendData` of a lease that says `statement`, tagged with each of `psks`, which are those of its kids.
pub fn publish(statement: &Encoded, psks: &[Arc<Psk>]) -> BackendData {
    let tags = psks
        .iter()
        .map(|psk| BASE64.encode(psk.tag(statement.as_bytes()).as_bytes()))
        .collect();
    let published = Published {
        statement: BASE64.encode(statement.as_bytes()),
        tags,
    };
    serde_json::to_value(published).expect("strings become JSON").into()
}

/// The name that a statement in this `BackendData` gives its node, if there is one. Not verified: who believes a lease
/// compares the two.
pub fn stated_name(data: &BackendData) -> Option<NodeName> {
    let published = data.read::<Published>().ok()?;
    let bytes = BASE64.decode(&published.statement).ok()?;
    NodeName::new(&Statement::decode(&bytes).ok()?.node).ok()
}

/// A verified statement.
#[derive(Clone, Debug)]
pub struct Admitted {
    /// What the node says.
    pub statement: Statement,
    /// Its canonical bytes, which key derivation binds.
    pub encoded: Encoded,
    /// The slot of its subnets.
    pub slot: Slot,
}

/// Why a lease does not make its node a peer.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Refusal {
    /// A subnet, and no statement yet.
    #[error("it has taken a subnet and said nothing yet: its daemon is starting, or stopped before it began")]
    Silent,
    /// Another backend.
    #[error("backend type is {0:?}; this mesh is \"ipsec\"")]
    Backend(String),
    /// Not a statement and its tags.
    #[error("BackendData is no statement: {0}")]
    Garbage(String),
    /// Not one PSK in common.
    #[error("no common PSK: it has {}, this node has {}; give both nodes the same key", spaced(.theirs), spaced(.ours))]
    NoCommonPsk {
        /// The kids that it names.
        theirs: Vec<Kid>,
        /// The kids that we hold.
        ours: Vec<Kid>,
    },
    /// It has only a PSK that was taken away here.
    #[error("it has only PSK {dropped}, which was taken from this node and dropped; give it {}", spaced(.ours))]
    PskDropped {
        /// The one.
        dropped: Kid,
        /// The kids that we hold.
        ours: Vec<Kid>,
    },
    /// The tag is wrong.
    #[error("the tag of PSK {0} does not verify: the lease was changed by someone without the key")]
    WrongTag(Kid),
    /// The lease and the statement differ.
    #[error("the lease says {field} {lease}, its statement says {statement}: the lease was changed")]
    Contradiction {
        /// Which field.
        field: &'static str,
        /// What the lease says.
        lease: String,
        /// What the statement says.
        statement: String,
    },
    /// Another mesh.
    #[error("it is of Network {theirs}, this node of {ours}: make net-conf.json the same")]
    Network {
        /// Its ranges.
        theirs: String,
        /// Ours.
        ours: String,
    },
    /// No slot.
    #[error(transparent)]
    Slot(#[from] NoSlot),
    /// Claimed twice.
    #[error("{claim} is also claimed by {}: remove one of the leases", names(.others))]
    Conflict {
        /// What both claim.
        claim: Claim,
        /// Who else claims it.
        others: BTreeSet<NodeName>,
    },
    /// An older epoch than one that was seen.
    #[error(transparent)]
    Rollback(#[from] crate::epochs::Rollback),
    /// Another statement for an epoch that was seen: a statement never changes.
    #[error(
        "epoch {0} was seen with another statement: two daemons use this node's name; give each its own --node-name"
    )]
    Rewritten(keys::Epoch),
    /// No address family in common.
    #[error("no common address family: it is at {theirs}, this node at {ours}")]
    NoCommonFamily {
        /// Its public addresses.
        theirs: String,
        /// Ours.
        ours: String,
    },
}

fn names(nodes: &BTreeSet<NodeName>) -> String {
    nodes.iter().map(NodeName::as_str).collect::<Vec<_>>().join(", ")
}

/// Checks one lease by itself.
pub fn verify(lease: &Lease, network: &Network, psks: &[Arc<Psk>]) -> Result<Admitted, Refusal> {
    if lease.backend.is_empty() && lease.data.is_null() {
        return Err(Refusal::Silent);
    }
    let garbage = |why: &dyn fmt::Display| Refusal::Garbage(why.to_string());
    let published = lease.data.read::<Published>();
    // A node that allows plaintext peers shows itself to them as one of their type, with its statement beside that.
    let encrypts =
        lease.backend == "ipsec" || matches!(lease.backend.as_str(), "vxlan" | "host-gw") && published.is_ok();
    if !encrypts {
        return Err(Refusal::Backend(lease.backend.chars().take(32).collect()));
    }
    let published = published.map_err(|e| garbage(&e))?;
    let bytes = BASE64.decode(&published.statement).map_err(|e| garbage(&e))?;
    let statement = Statement::decode(&bytes).map_err(|e| garbage(&e))?;
    let encoded = statement.encode().map_err(|e| garbage(&e))?;
    let held = |kid: &Kid| psks.iter().find(|psk| psk.kid() == *kid);
    let Some((at, psk)) = statement
        .kids
        .iter()
        .enumerate()
        .find_map(|(i, kid)| Some((i, held(kid)?)))
    else {
        return Err(Refusal::NoCommonPsk {
            theirs: statement.kids,
            ours: psks.iter().map(|psk| psk.kid()).collect(),
        });
    };
    let tag = published
        .tags
        .get(at)
        .ok_or_else(|| garbage(&"a tag for each kid is needed"))?;
    let tag = BASE64
        .decode(tag)
        .ok()
        .and_then(|tag| <[u8; 32]>::try_from(tag).ok())
        .map(Tag);
    let tag = tag.ok_or_else(|| garbage(&"a tag is 32 bytes in base64"))?;
    if !psk.verify(&bytes, &tag) {
        return Err(Refusal::WrongTag(psk.kid()));
    }
    let contradiction = |field, lease: String, statement: String| {
        if lease == statement {
            Ok(())
        } else {
            Err(Refusal::Contradiction {
                field,
                lease,
                statement,
            })
        }
    };
    contradiction("node", lease.node.to_string(), statement.node.clone())?;
    contradiction("subnets", lease.subnets.to_string(), spaced(&statement.subnets))?;
    contradiction(
        "public addresses",
        lease.public.to_string(),
        spaced(&statement.addresses),
    )?;
    let ours: Vec<IpNet> = network.nets().collect();
    if statement.network != ours {
        return Err(Refusal::Network {
            theirs: spaced(&statement.network),
            ours: network.to_string(),
        });
    }
    let slot = network.slot(&lease.subnets)?;
    Ok(Admitted {
        statement,
        encoded,
        slot,
    })
}

fn spaced<T: fmt::Display>(items: &[T]) -> String {
    items.iter().map(T::to_string).collect::<Vec<_>>().join(" ")
}

/// Something that one node alone may have.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Claim {
    /// A slot, and so its subnets.
    Subnet(Slot, IpNet),
    /// A public address. Nodes that can take UDP may share one.
    Address(IpAddr),
    /// An X25519 public key.
    Key(PublicKey),
}

impl fmt::Display for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Subnet(_, net) => write!(f, "subnet {net}"),
            Self::Address(address) => write!(f, "public address {address}"),
            Self::Key(_) => f.write_str("its public key"),
        }
    }
}

fn claims(statement: &Statement, slot: Slot) -> BTreeSet<Claim> {
    let subnets = statement.subnets.iter().map(|net| Claim::Subnet(slot, *net));
    let addresses = statement.addresses.iter().map(|address| Claim::Address(*address));
    let key = std::iter::once(Claim::Key(statement.public));
    subnets.chain(addresses).chain(key).collect()
}

fn is_plain(statement: &Statement) -> bool {
    statement.encap.mode == EncapMode::Esp
}

/// Who claims what. One node's change costs as much as the claims it shares.
#[derive(Debug, Default)]
pub struct Claims {
    /// In their order, each once.
    by_node: BTreeMap<NodeName, Box<[Claim]>>,
    /// Nodes that take plain ESP alone, and so need an address of their own. Behind one NAT, UDP tells nodes apart.
    plain: BTreeSet<NodeName>,
    /// One node nearly always.
    by_claim: BTreeMap<Claim, SmallVec<[NodeName; 1]>>,
}

impl Claims {
    /// Sets what `node` claims (nothing, where it left) and returns the nodes whose conflicts may have changed.
    pub fn set(&mut self, node: &NodeName, statement: Option<(&Statement, Slot)>) -> BTreeSet<NodeName> {
        let claims = statement
            .map(|(statement, slot)| claims(statement, slot))
            .unwrap_or_default();
        let plain = statement.is_some_and(|(statement, _)| is_plain(statement));
        let changed = match plain {
            true => self.plain.insert(node.clone()),
            false => self.plain.remove(node),
        };
        let before = self.by_node.remove(node).unwrap_or_default();
        let mut touched = BTreeSet::new();
        for claim in claims.iter().filter(|_| changed) {
            touched.extend(self.by_claim.get(claim).into_iter().flatten().cloned());
        }
        for gone in before.iter().filter(|claim| !claims.contains(claim)) {
            if let Some(nodes) = self.by_claim.get_mut(gone) {
                nodes.retain(|other| other != node);
                touched.extend(nodes.iter().cloned());
                if nodes.is_empty() {
                    self.by_claim.remove(gone);
                }
            }
        }
        for claim in &claims {
            let nodes = self.by_claim.entry(*claim).or_default();
            if !nodes.contains(node) {
                touched.extend(nodes.iter().cloned());
                nodes.push(node.clone());
            }
        }
        if !claims.is_empty() {
            self.by_node.insert(node.clone(), claims.into_iter().collect());
        }
        touched.remove(node);
        touched
    }

    /// Gives up the room that many changes left empty.
    pub fn pack(&mut self) {
        pack(&mut self.by_node);
        pack(&mut self.by_claim);
    }

    /// The nodes that would be in conflict with `statement`.
    pub fn holders(&self, statement: &Statement, slot: Slot) -> BTreeSet<NodeName> {
        let mut found = BTreeSet::new();
        for claim in claims(statement, slot) {
            let nodes = self.by_claim.get(&claim).into_iter().flatten();
            let shared = matches!(claim, Claim::Address(_)) && !is_plain(statement);
            found.extend(nodes.filter(|node| !shared || self.plain.contains(*node)).cloned());
        }
        found
    }

    /// The first conflict that `node` is part of.
    pub fn conflict(&self, node: &NodeName) -> Option<Refusal> {
        let claims = self.by_node.get(node)?;
        let shared = claims.iter().find_map(|claim| {
            let nodes = self.by_claim.get(claim)?;
            let alone = match claim {
                Claim::Address(_) => nodes.iter().any(|node| self.plain.contains(node)),
                Claim::Subnet(..) | Claim::Key(_) => true,
            };
            (nodes.len() > 1 && alone).then_some((*claim, nodes))
        });
        let (claim, nodes) = shared?;
        let others = nodes.iter().filter(|other| *other != node).cloned().collect();
        Some(Refusal::Conflict { claim, others })
    }
}
