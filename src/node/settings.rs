//! The settings that a node decides by.

use std::time::Duration;

use keys::{Cipher, Encap};

use crate::backend::Plain;
use crate::backend::ipsec::Soft;
use crate::lease::{Network, NodeName};

/// What the configuration fixes for the node's decisions.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// This node's name.
    pub name: NodeName,
    /// The mesh's ranges.
    pub network: Network,
    /// The cipher that this node sends with.
    pub cipher: Cipher,
    /// Whether ESP travels in UDP, and this node's port for it.
    pub encap: Encap,
    /// An epoch's life at most.
    pub rekey_after: Duration,
    /// After how much on one SA a new epoch begins.
    pub rekey: Soft,
    /// How long a PSK that was taken away is held for peers that have nothing newer.
    pub psk_grace: Duration,
    /// The mesh MTU where it is not computed, bytes.
    pub mtu: Option<u32>,
    /// Whether pods' traffic to the outside takes the node's address.
    pub masquerade: bool,
    /// Whether masquerading picks random ports.
    pub random_fully: bool,
    /// Whether the uplink takes IPv6 router advertisements, and so must go on to when forwarding is on.
    pub advertisements: bool,
    /// Whether the kernel keeps a direction on an SA.
    pub directed: bool,
    /// The unencrypted backend that carries the mesh; `None` for ipsec, which all about keys above is for.
    pub plain: Option<Plain>,
    /// Under ipsec, the unencrypted backend that peers of that type are served with, where that is allowed.
    pub plaintext: Option<Plain>,
    /// `BackendData` that the operator's command prepared, in the place of the backend's.
    pub prepared: Option<serde_json::Value>,
    /// Whether forwarded packets of the mesh are accepted, whatever the policy of the host's own chain.
    pub forward: bool,
    /// Whether what no pod of this node takes is swallowed.
    pub blackhole: bool,
    /// flannel's `EnableNFTables`, for an unencrypted backend.
    pub nft: bool,
}
