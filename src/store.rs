//! Where leases live: one contract for every store.
//!
//! A store shows all leases as one [`Roster`] in a [`watch`] channel: a snapshot, then the changes, `Complete` when
//! nothing is missing. A node takes a subnet with [`Store::acquire`], says what it is with [`Store::publish`], and gives
//! the subnet back with [`Store::release`].
//!
//! Two facts to know before using it. A store that can't be reached is an outage, never an empty roster: the roster
//! stays as it was, [`Store::health`] says so, and the store is picked up when it is back. One that does not answer at
//! all keeps the call waiting, and nothing else: [`Store::health`] says that too. And no call here tries again: an error says whether that is worthwhile ([`StoreError::is_transient`]), the caller has the loop.
//!
//! A node whose own lease is no longer in the roster publishes it again; a store does not do that by itself, since only
//! the caller knows the statement that is right by then.

mod allocate;
pub mod dir;
pub mod etcd;
mod folder;
pub mod format;
mod health;
mod jitter;
pub mod kube;
mod mirror;
mod notice;
#[cfg(test)]
mod tests;

use std::io;
use std::path::{Path, PathBuf};

use keys::Slot;
use nix::errno::Errno;
use tokio::sync::watch;

use crate::lease::{Addresses, Lease, Network, NoSlot, NodeName, Roster, Subnets};
use dir::Dir;
use etcd::{Access, Etcd, Lifetime};
pub use health::{Failures, Health, Trouble};
use kube::Kube;

/// A store of leases. Cheap to clone; the last clone to go stops the watching.
#[derive(Clone, Debug)]
pub enum Store {
    /// A folder of files.
    Dir(Dir),
    /// An etcd cluster.
    Etcd(Etcd),
    /// The Nodes of a Kubernetes cluster.
    Kube(Kube),
}

/// What a node asks of [`Store::acquire`].
#[derive(Clone, Copy, Debug)]
pub struct Claim {
    /// The subnets that the node had, from subnet.env: taken again where they are free.
    pub previous: Option<Subnets>,
    /// The addresses that the other nodes reach it at.
    pub public: Addresses,
    /// A random number: where the search for a free subnet begins.
    pub random: u64,
}

/// What a node holds after [`Store::acquire`].
#[derive(Clone, Debug)]
pub struct Held {
    /// The subnets.
    pub subnets: Subnets,
    /// Their slot in the Network.
    pub slot: Slot,
    /// The node's own lease as the store had it before, perhaps of other subnets: what an earlier process published.
    pub previous: Option<Lease>,
}

/// Why a store did not do what was asked. What it holds is unchanged, except where a variant says otherwise.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The folder is not there.
    #[error("store folder {} does not exist: create it with `mkdir -p {}`, or correct --lease-dir", .0.display(), .0.display())]
    Missing(PathBuf),
    /// The path leads to something else.
    #[error("{} is not a folder: --lease-dir takes a folder of leases", .0.display())]
    NotAFolder(PathBuf),
    /// Another, empty file system is where the store was.
    #[error("{} is an empty folder of another file system than before: mount the store again, or restart to use it as a new one", .0.display())]
    Unmounted(PathBuf),
    /// The rights do not suffice.
    #[error("{doing} {}: permission denied: give the daemon's user the right to, or run it as root", .path.display())]
    Denied {
        /// What was being done.
        doing: &'static str,
        /// To which file or folder.
        path: PathBuf,
    },
    /// The file system takes no writes.
    #[error("{doing} {}: the file system is read-only: remount it writable, or let what distributes the folder write this node's lease", .path.display())]
    ReadOnly {
        /// What was being done.
        doing: &'static str,
        /// To which file or folder.
        path: PathBuf,
    },
    /// The disk, its inodes or the quota are used up.
    #[error("{doing} {}: no space, or no inode, is left there ({errno:?}): free some, or raise the quota", .path.display())]
    Full {
        /// What was being done.
        doing: &'static str,
        /// To which file or folder.
        path: PathBuf,
        /// ENOSPC or EDQUOT.
        errno: Errno,
    },
    /// Another process has held the folder's lock for long.
    #[error("{} has been locked by another process for {seconds} s: `lsof {}` names it", .path.display(), .path.display())]
    Locked {
        /// The folder.
        path: PathBuf,
        /// How long was waited, in seconds.
        seconds: u64,
    },
    /// Any other failure of the system.
    #[error("{doing} {}", .path.display())]
    Io {
        /// What was being done.
        doing: &'static str,
        /// To which file or folder.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// No subnet is free.
    #[error("out of subnets: {total} of {total} subnets of {network} are leased: {remedy}, or enlarge Network")]
    Exhausted {
        /// How many subnets are given out.
        total: usize,
        /// The ranges.
        network: Network,
        /// How leases of nodes that are gone are removed from this store.
        remedy: String,
    },
    /// The subnet is another node's by now.
    #[error(
        "subnet {subnets} is leased to node {holder} now: acquire another, and look for a second node that was given this one"
    )]
    Stolen {
        /// What was ours.
        subnets: Subnets,
        /// Whose lease overlaps.
        holder: NodeName,
    },
    /// Something that is no lease stands where the lease goes.
    #[error("{entry} stands where the lease of {subnets} goes and is no lease ({reason}): remove it")]
    Occupied {
        /// The subnets to write.
        subnets: Subnets,
        /// The file or key.
        entry: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Another process writes the lease of this node.
    #[error(
        "lease of node {node} has revision {stored}, but this process wrote {written}: another process runs under this node's name: stop it, or give one of them another --node-name"
    )]
    Superseded {
        /// The node.
        node: NodeName,
        /// What the store holds.
        stored: u64,
        /// What this process wrote or found last.
        written: u64,
    },
    /// etcd did not do it.
    #[error("{doing}: {why}")]
    Etcd {
        /// What was being done.
        doing: &'static str,
        /// The reason, etcd's or the network's.
        why: String,
        /// Whether it may go by itself.
        transient: bool,
    },
    /// The API server of Kubernetes did not do it.
    #[error("{doing}: {why}")]
    Kube {
        /// What was being done.
        doing: &'static str,
        /// The reason, the server's or the network's.
        why: String,
        /// Whether it may go by itself.
        transient: bool,
    },
    /// The API server of Kubernetes could not be asked, or is in no state to answer.
    #[error("{doing}: {why}")]
    KubeAway {
        /// What was being done.
        doing: &'static str,
        /// The reason, the server's or the network's.
        why: String,
    },
    /// The node's subnet is another one now.
    #[error("node {node} has podCIDR {assigned} now, not {held}: its Node was made anew; the lease moves there")]
    Moved {
        /// The node.
        node: NodeName,
        /// What was to be published.
        held: Subnets,
        /// What the Node says.
        assigned: Subnets,
    },
    /// The lease does not fit into the store.
    #[error("lease of {bytes} bytes: at most {max} are stored")]
    TooBig {
        /// Its size.
        bytes: usize,
        /// What is stored at most.
        max: usize,
    },
    /// A lease without a subnet.
    #[error("lease of node {0} has no subnet")]
    NoSubnet(NodeName),
    /// A subnet that was chosen has no slot.
    #[error(transparent)]
    NoSlot(#[from] NoSlot),
    /// The runtime that the store works on is shutting down.
    #[error("the store has stopped: the daemon is shutting down")]
    Stopped,
}

impl StoreError {
    /// Whether the same call may succeed later with nothing changed by the caller: an outage. The others ask for another
    /// call or for a person.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Missing(_)
            | Self::NotAFolder(_)
            | Self::Unmounted(_)
            | Self::Denied { .. }
            | Self::ReadOnly { .. }
            | Self::Full { .. }
            | Self::Locked { .. }
            | Self::KubeAway { .. }
            | Self::Io { .. } => true,
            Self::Etcd { transient, .. } | Self::Kube { transient, .. } => *transient,
            Self::Exhausted { .. }
            | Self::Stolen { .. }
            | Self::Occupied { .. }
            | Self::Superseded { .. }
            | Self::Moved { .. }
            | Self::TooBig { .. }
            | Self::NoSubnet(_)
            | Self::NoSlot(_)
            | Self::Stopped => false,
        }
    }

    /// Names the failure of `doing` something to `path`.
    fn from_io(doing: &'static str, path: &Path, source: impl Into<io::Error>) -> Self {
        let (source, path) = (source.into(), path.to_path_buf());
        match source.raw_os_error().map(Errno::from_raw) {
            Some(Errno::EACCES | Errno::EPERM) => Self::Denied { doing, path },
            Some(Errno::EROFS) => Self::ReadOnly { doing, path },
            Some(errno @ (Errno::ENOSPC | Errno::EDQUOT)) => Self::Full { doing, path, errno },
            _ => Self::Io { doing, path, source },
        }
    }

    /// The error and its causes in one line.
    fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            text.push_str(&format!(": {error}"));
            cause = error.source();
        }
        text
    }
}

impl Store {
    /// Opens the folder at `path` as a store and reads it whole: the roster is complete on return. To be called in a
    /// tokio runtime.
    ///
    /// A folder that can't be read is an error here, so that a start ends with its name; later it is an outage.
    pub async fn open_dir(path: &Path) -> Result<Self, StoreError> {
        Ok(Self::Dir(Dir::open(path).await?))
    }

    /// Opens an etcd cluster as a store and waits until it has been read once. To be called in a tokio runtime.
    ///
    /// # Errors
    /// [`StoreError::Etcd`] for what time does not mend: unreadable files, wrong credentials.
    pub async fn open_etcd(access: Access, lifetime: Lifetime) -> Result<Self, StoreError> {
        Ok(Self::Etcd(Etcd::open(access, lifetime).await?))
    }

    /// Opens the Nodes of a Kubernetes cluster as a store and waits until they have been read once. To be called in a
    /// tokio runtime.
    ///
    /// # Errors
    /// [`StoreError::Kube`] for what time does not mend: an unreadable kubeconfig, no cluster around.
    pub async fn open_kube(access: kube::Access) -> Result<Self, StoreError> {
        Ok(Self::Kube(Kube::open(access).await?))
    }

    /// Every lease of the store. Only real changes wake a reader; [`Roster::since`] lists them.
    pub fn roster(&self) -> watch::Receiver<Roster> {
        match self {
            Self::Dir(dir) => dir.roster(),
            Self::Etcd(etcd) => etcd.roster(),
            Self::Kube(kube) => kube.roster(),
        }
    }

    /// The text of the network configuration that lies in the store, `None` where there is none.
    pub async fn config(&self) -> Result<Option<String>, StoreError> {
        match self {
            Self::Dir(dir) => dir.config().await,
            Self::Etcd(etcd) => etcd.config().await,
            Self::Kube(_) => Ok(None),
        }
    }

    /// The same, watched: changes when the text does, and stays as it is while it can't be read.
    pub fn config_changes(&self) -> watch::Receiver<Option<String>> {
        match self {
            Self::Dir(dir) => dir.config_changes(),
            Self::Etcd(etcd) => etcd.config_changes(),
            Self::Kube(kube) => kube.config_changes(),
        }
    }

    /// Takes a subnet of `network` for `node`: the one of the lease that the store has of it, else the previous one,
    /// else a free one at random. A lease of its own that does not fit `network` is replaced.
    ///
    /// What is written of a new lease has no backend yet: it says that the subnet is taken. To be repeated at will.
    pub async fn acquire(&self, node: &NodeName, network: &Network, claim: &Claim) -> Result<Held, StoreError> {
        match self {
            Self::Dir(dir) => dir.acquire(node, network, claim).await,
            Self::Etcd(etcd) => Box::pin(etcd.acquire(node, network, claim)).await,
            Self::Kube(kube) => Box::pin(kube.acquire(node, network)).await,
        }
    }

    /// Writes the node's own lease, if what the store holds in its place is what this process wrote or found last, is
    /// older, or is gone. Writes nothing where the store has it already. The roster shows it on return.
    pub async fn publish(&self, lease: &Lease) -> Result<(), StoreError> {
        match self {
            Self::Dir(dir) => dir.publish(lease).await,
            Self::Etcd(etcd) => Box::pin(etcd.publish(lease)).await,
            Self::Kube(kube) => Box::pin(kube.publish(lease)).await,
        }
    }

    /// Gives `subnets` back. A lease that is gone, or another node's by now, is left as it is, without an error.
    pub async fn release(&self, node: &NodeName, subnets: &Subnets) -> Result<(), StoreError> {
        match self {
            Self::Dir(dir) => dir.release(node, subnets).await,
            Self::Etcd(etcd) => etcd.release(node, subnets).await,
            Self::Kube(kube) => Box::pin(kube.release(node, subnets)).await,
        }
    }

    /// Whether the store works, for `status`.
    pub fn health(&self) -> Health {
        match self {
            Self::Dir(dir) => dir.health(),
            Self::Etcd(etcd) => etcd.health(),
            Self::Kube(kube) => kube.health(),
        }
    }
}
