//! The audit: the kernel's objects against the plan, every SA explained, and every way that plaintext could go.
//!
//! Two questions, answered apart. [`Audit::differences`] compares what the kernel holds with what this daemon wants.
//! [`Audit::plaintext`] does not ask what is wanted: it looks at the kernel's objects alone, so that a plan that is
//! wrong is found too. The guard has several layers, and each that is missing is named although the others may hold.
//! Pure; the daemon brings both sides, and no key is in either.

mod explain;
mod plaintext;
#[cfg(test)]
pub(crate) mod tests;

use std::collections::BTreeMap;

use ipnet::IpNet;
use keys::Slot;
use serde::{Deserialize, Serialize};

use crate::kernel::{Guard, Key, Object, Objects, firewall};
use crate::lease::{NodeName, Subnets};
use crate::reconcile::chain;

pub use explain::{Association, Use};

/// What the audit must know to name things: never what should be in the kernel.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Directory {
    /// This node's name.
    pub node: Option<NodeName>,
    /// The mesh's ranges.
    pub network: Vec<IpNet>,
    /// The own subnets; none while there is no lease.
    pub own: Subnets,
    /// The uplink's name and index, once there is one. Without it the checks of what comes in by it are left out.
    pub uplink: Option<(String, u32)>,
    /// The unencrypted backend that carries the mesh, if it is one.
    pub unencrypted: Option<&'static str>,
    /// Every other node with a readable lease, by the slot of its subnets.
    pub nodes: BTreeMap<Slot, NodeName>,
}

impl Directory {
    /// What the kernel's objects alone tell: the ranges that its guard is about, and the own subnets, no names.
    pub fn from_objects(actual: &Objects) -> Self {
        let mut network = std::collections::BTreeSet::new();
        let mut own = Subnets::default();
        for key in actual.keys() {
            match key {
                Key::GuardRoute(net) => {
                    network.insert(*net);
                }
                Key::Guard(Guard::Block, id) => {
                    let ends = [id.selector.src, id.selector.dst];
                    network.extend(ends.into_iter().filter(|net| net.prefix_len() > 0));
                }
                Key::Guard(Guard::Local, id) => {
                    let ends = [id.selector.src, id.selector.dst];
                    own = own
                        .iter()
                        .chain(ends.into_iter().filter(|net| net.prefix_len() > 0))
                        .collect();
                }
                _ => {}
            }
        }
        Self {
            network: network.into_iter().collect(),
            own,
            ..Self::default()
        }
    }

    /// The name of the node in `slot`, or what can be said without one.
    fn name(&self, slot: Slot) -> String {
        match self.nodes.get(&slot) {
            Some(name) => name.to_string(),
            None if self.node.is_none() => format!("slot {slot}"),
            None => format!("slot {slot}, no lease"),
        }
    }

    fn own_name(&self) -> String {
        self.node
            .as_ref()
            .map_or_else(|| "this node".into(), ToString::to_string)
    }
}

/// What the audit found.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Audit {
    /// No difference, and no way for plaintext. What the guard has dropped does not count: anybody on the network can forge a
    /// packet.
    pub ok: bool,
    /// This node's name.
    pub node: Option<String>,
    /// Each way that a pod's packet could leave or enter unencrypted, one sentence with what else holds.
    pub plaintext: Vec<String>,
    /// What the guard has dropped of plaintext: it was stopped, and so is no way. `None` where nothing is encrypted, or where
    /// it can't be read.
    #[serde(default)]
    pub dropped: Option<firewall::Counters>,
    /// What is to be said of that: who may have sent it, or why it can't be read.
    #[serde(default)]
    pub dropped_told: Option<String>,
    /// Each object that is not as wanted, in the order of making.
    pub differences: Vec<Difference>,
    /// Every SA of ours in the kernel.
    pub associations: Vec<Association>,
    /// How many objects of ours the kernel holds, by kind.
    pub objects: BTreeMap<String, usize>,
}

/// How an object differs.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Differs {
    /// Wanted and not there.
    Missing,
    /// There, marked as ours, and not wanted.
    Extra,
    /// There with other content.
    Different,
}

/// One object that is not as wanted.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Difference {
    /// In which way.
    pub differs: Differs,
    /// Which object.
    pub object: String,
    /// What it should hold.
    pub wanted: Option<String>,
    /// What it holds.
    pub found: Option<String>,
    /// The command that shows it; none prints a key.
    pub show: String,
}

/// Compares what the kernel holds with what is wanted, explains its SAs, and looks for ways that plaintext could go.
pub fn audit(desired: &Objects, actual: &Objects, directory: &Directory) -> Audit {
    let plaintext = plaintext::ways(actual, directory);
    let differences = differences(desired, actual);
    Audit {
        ok: plaintext.is_empty() && differences.is_empty(),
        node: directory.node.as_ref().map(ToString::to_string),
        plaintext,
        dropped: None,
        dropped_told: None,
        differences,
        associations: explain::associations(Some(desired), actual, directory),
        objects: census(actual),
    }
}

/// The audit of a kernel without a daemon: there is no plan to compare with, so `differences` is empty, `ok` is false,
/// and an SA is explained by its numbers.
pub fn unplanned(actual: &Objects) -> Audit {
    let directory = Directory::from_objects(actual);
    Audit {
        ok: false,
        node: None,
        plaintext: plaintext::ways(actual, &directory),
        dropped: None,
        dropped_told: None,
        differences: Vec::new(),
        associations: explain::associations(None, actual, &directory),
        objects: census(actual),
    }
}

/// What is said where the guard's counters can't be read.
pub fn unread(error: &firewall::Error) -> String {
    format!("what the guard has dropped can't be read: {}", chain(error))
}

fn census(actual: &Objects) -> BTreeMap<String, usize> {
    let mut census = BTreeMap::new();
    for key in actual.keys() {
        *census.entry(format!("{:?}", key.kind())).or_default() += 1;
    }
    census
}

fn differences(desired: &Objects, actual: &Objects) -> Vec<Difference> {
    let keys: std::collections::BTreeSet<&Key> = desired.keys().chain(actual.keys()).collect();
    let differ = |key: &&Key| {
        let (wanted, found) = (desired.get(*key), actual.get(*key));
        let differs = match (wanted, found) {
            (Some(wanted), Some(found)) if same(wanted, found) => return None,
            (Some(_), Some(_)) => Differs::Different,
            (Some(_), None) => Differs::Missing,
            (None, _) => Differs::Extra,
        };
        Some(Difference {
            differs,
            object: key.to_string(),
            wanted: wanted.map(explain::describe),
            found: found.map(explain::describe),
            show: explain::command(key, found.or(wanted)),
        })
    };
    keys.iter().filter_map(differ).collect()
}

/// Whether two objects show alike in the kernel: which process made an SA is not to be seen there.
fn same(wanted: &Object, found: &Object) -> bool {
    match (wanted, found) {
        (Object::Sa { sa: wanted, .. }, Object::Sa { sa: found, .. }) => wanted == found,
        _ => wanted == found,
    }
}
