//! What is kept of the Nodes, and the leases that they hold: pure.
//!
//! A Node weighs tens of kilobytes, mostly the images on it; kept are its uid, its version, its podCIDRs and flannel's
//! annotations. What is older than what is known is not taken: an answer to our own write may be here before the watch
//! tells of what was there before it.

use std::collections::BTreeMap;

use ipnet::IpNet;

use super::notes::{Notes, Read};
use crate::lease::{Lease, NodeName};

/// A Node.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Record {
    /// Which Node of this name: one that is deleted and made anew has another.
    pub(super) uid: String,
    /// Its `resourceVersion`, which the API has compared as a number since Kubernetes 1.35, and etcd always.
    pub(super) version: u64,
    pub(super) notes: Notes,
    /// Its podCIDRs; `None` while they are not known. A Node gets them once and keeps them for life (the API server's
    /// ValidateNodeUpdate), so that they need to be read but once for a uid.
    pub(super) pods: Option<Vec<IpNet>>,
}

/// What the watch says of a Node: everything but its podCIDRs.
#[derive(Clone, Debug)]
pub(super) struct Glimpse {
    pub(super) uid: String,
    pub(super) version: u64,
    pub(super) notes: Notes,
}

/// What is to be done about a Node that changed.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Next {
    /// Nothing: it says what it said.
    Nothing,
    /// Its lease is to be published.
    Show,
    /// Its podCIDRs are to be read first.
    Ask,
}

/// All Nodes.
#[derive(Debug, Default)]
pub(super) struct View {
    nodes: BTreeMap<NodeName, Record>,
    /// What is not understood, by Node.
    rejected: BTreeMap<String, String>,
}

impl View {
    pub(super) fn get(&self, node: &NodeName) -> Option<&Record> {
        self.nodes.get(node)
    }

    /// `nodes` is all there was at `version`. What is newer stays.
    pub(super) fn replace(&mut self, nodes: BTreeMap<NodeName, Record>, version: u64) {
        let newer: Vec<_> = std::mem::take(&mut self.nodes)
            .into_iter()
            .filter(|(_, record)| record.version > version)
            .collect();
        self.nodes = nodes;
        self.nodes.extend(newer);
        self.rejected.clear();
    }

    /// The watch has shown `node`. A Node that is to be asked for is taken in by [`View::put`].
    pub(super) fn glimpse(&mut self, node: &NodeName, glimpse: &Glimpse) -> Next {
        let Glimpse { uid, version, notes } = glimpse;
        let before = self.nodes.get(node);
        if before.is_some_and(|before| before.version >= *version) {
            return Next::Nothing;
        }
        let same = before.filter(|before| before.uid == *uid);
        // One that was read before it had podCIDRs is asked for again with every change of it.
        let pods = same
            .and_then(|before| before.pods.clone())
            .filter(|pods| !pods.is_empty());
        if pods.is_none() && notes.are_managed() {
            if same.is_none() {
                self.nodes.remove(node);
            }
            return Next::Ask;
        }
        let says_the_same = same.is_some_and(|before| before.notes == *notes);
        let record = Record {
            uid: uid.clone(),
            version: *version,
            notes: notes.clone(),
            pods,
        };
        self.nodes.insert(node.clone(), record);
        if says_the_same { Next::Nothing } else { Next::Show }
    }

    /// `node` was read whole.
    pub(super) fn put(&mut self, node: &NodeName, record: Record) {
        if self
            .nodes
            .get(node)
            .is_none_or(|before| before.version <= record.version)
        {
            self.nodes.insert(node.clone(), record);
        }
    }

    /// `node` was deleted at `version`; whether that is news.
    pub(super) fn remove(&mut self, node: &NodeName, version: u64) -> bool {
        let known = self.nodes.get(node).is_some_and(|record| record.version <= version);
        known && self.nodes.remove(node).is_some()
    }

    /// What the Nodes hold that is no lease, each with the reason.
    pub(super) fn rejected(&self) -> &BTreeMap<String, String> {
        &self.rejected
    }

    /// The lease that `node` holds, what is odd about it being noted; and whether that note differs.
    pub(super) fn lease(&mut self, node: &NodeName) -> (Option<Lease>, bool) {
        let read = match self.nodes.get(node) {
            Some(Record {
                pods: Some(pods),
                notes,
                ..
            }) => notes.read(node, pods),
            _ => Read::default(),
        };
        let why = read.odd.join("; ");
        let differs = self.rejected.get(node.as_str()).map_or("", String::as_str) != why;
        match why.is_empty() {
            true => self.rejected.remove(node.as_str()),
            false => self.rejected.insert(node.to_string(), why),
        };
        (read.lease, differs)
    }

    /// Every lease.
    pub(super) fn leases(&mut self) -> Vec<Lease> {
        let all: Vec<NodeName> = self.nodes.keys().cloned().collect();
        all.iter().filter_map(|node| self.lease(node).0).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::super::notes::Keys;
    use super::*;

    fn name(text: &str) -> NodeName {
        NodeName::new(text).unwrap()
    }

    fn notes(public: &str) -> Notes {
        let pairs = [
            ("kube-subnet-manager", "true"),
            ("backend-type", "host-gw"),
            ("public-ip", public),
        ];
        let all = pairs.map(|(note, value)| (format!("x.y/{note}"), value.to_owned()));
        Keys::of("x.y").unwrap().pick(all.into())
    }

    fn glimpse(uid: &str, version: u64, public: &str) -> Glimpse {
        Glimpse {
            uid: uid.into(),
            version,
            notes: notes(public),
        }
    }

    fn record(uid: &str, version: u64, public: &str, pods: &[&str]) -> Record {
        Record {
            uid: uid.into(),
            version,
            notes: notes(public),
            pods: Some(pods.iter().map(|net| net.parse().unwrap()).collect()),
        }
    }

    /// The subnet and the public address that the lease of `n` has.
    fn shown(view: &mut View) -> Option<String> {
        let lease = view.lease(&name("n")).0?;
        Some(format!("{} {}", lease.subnets, lease.public))
    }

    #[test]
    fn pod_cidrs_are_asked_for_once_a_uid_and_again_while_there_are_none() {
        let (mut view, n) = (View::default(), name("n"));
        assert_eq!(view.glimpse(&n, &glimpse("a", 5, "192.0.2.1")), Next::Ask);
        assert_eq!(shown(&mut view), None);
        view.put(&n, record("a", 5, "192.0.2.1", &[]));
        assert!(view.rejected().is_empty());
        assert_eq!(shown(&mut view), None);
        assert_eq!(view.rejected()["n"], "node \"n\" pod cidr not assigned");
        assert_eq!(view.glimpse(&n, &glimpse("a", 6, "192.0.2.1")), Next::Ask);
        view.put(&n, record("a", 6, "192.0.2.1", &["10.0.1.0/24"]));
        assert_eq!(shown(&mut view).as_deref(), Some("10.0.1.0/24 192.0.2.1"));
        assert!(view.rejected().is_empty());
        assert_eq!(
            view.glimpse(&n, &glimpse("a", 7, "192.0.2.1")),
            Next::Nothing,
            "a heartbeat"
        );
        assert_eq!(view.glimpse(&n, &glimpse("a", 8, "192.0.2.2")), Next::Show);
        assert_eq!(shown(&mut view).as_deref(), Some("10.0.1.0/24 192.0.2.2"));
        assert_eq!(view.glimpse(&n, &glimpse("b", 9, "192.0.2.2")), Next::Ask, "made anew");
        assert_eq!(shown(&mut view), None, "not the podCIDR of the one before");
    }

    #[test]
    fn what_is_older_is_not_taken() {
        let (mut view, n) = (View::default(), name("n"));
        view.put(&n, record("a", 9, "192.0.2.9", &["10.0.1.0/24"]));
        assert_eq!(view.glimpse(&n, &glimpse("a", 8, "192.0.2.8")), Next::Nothing);
        view.put(&n, record("a", 7, "192.0.2.7", &["10.0.1.0/24"]));
        assert!(!view.remove(&n, 8), "that was the Node before this one");
        let others = [(n.clone(), record("a", 8, "192.0.2.8", &["10.0.1.0/24"]))];
        view.replace(others.into(), 8);
        assert_eq!(shown(&mut view).as_deref(), Some("10.0.1.0/24 192.0.2.9"));
        view.replace(BTreeMap::new(), 9);
        assert_eq!(shown(&mut view), None, "a deletion that was missed");
        view.put(&n, record("a", 9, "192.0.2.9", &["10.0.1.0/24"]));
        assert!(view.remove(&n, 10) && !view.remove(&n, 11));
    }
}
