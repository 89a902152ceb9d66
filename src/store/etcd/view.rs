//! What etcd holds below our prefix, as leases: pure.
//!
//! flannel's values name no node. A node is called by the name in its statement where it has one (ipsec), else by its
//! public address, which is flannel's own notion of who it is. Of several leases with one name (a node that came back
//! with another subnet, while its old lease has not run out) the one that was written last has it, the others have their
//! key behind it: `192.168.64.3~10.5.52.0-24`. Our own lease is called by our own name whatever it says.

use std::collections::BTreeMap;

use crate::admission::stated_name;
use crate::lease::{Addresses, Lease, Network, NodeName, Subnets};
use crate::store::format;

/// What one key holds.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Entry {
    /// The lease, called by what it says itself.
    pub(super) lease: Lease,
    /// etcd's revision of the last write, the key's `mod_revision`.
    pub(super) revision: i64,
    /// The etcd lease that it lives by; 0 for a reservation, which lives for ever.
    pub(super) alive_by: i64,
}

/// All keys below the prefix.
#[derive(Clone, Debug, Default)]
pub(super) struct View {
    entries: BTreeMap<String, Entry>,
    rejected: BTreeMap<String, String>,
}

/// Who this node is.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Identity {
    pub(super) node: NodeName,
    pub(super) public: Addresses,
}

impl Identity {
    /// Whether a lease is this node's: by name, else by its public address, as flannel has it.
    fn owns(&self, lease: &Lease) -> bool {
        let same = |address| self.public.iter().any(|own| own == address);
        lease.node == self.node || stated_name(&lease.data).is_none() && lease.public.iter().any(same)
    }
}

impl View {
    /// `key` (without the prefix) holds this since `revision`. Nothing changes where something newer is known: what this
    /// process has written itself may be here before etcd's watch tells of what was there before.
    pub(super) fn put(&mut self, key: &str, value: &[u8], revision: i64, alive_by: i64) {
        if self.entries.get(key).is_some_and(|entry| entry.revision > revision) {
            return;
        }
        let read = format::parse_key(key)
            .map_err(|error| error.to_string())
            .and_then(|subnets| {
                let named = format::decode_named(subnets, value, |unnamed| {
                    let address = unnamed.public.iter().next().map(|address| address.to_string());
                    stated_name(unnamed.data).or_else(|| NodeName::new(&address?).ok())
                });
                named.map(|(lease, _)| lease).map_err(|error| error.to_string())
            });
        match read {
            Ok(lease) => {
                self.rejected.remove(key);
                let entry = Entry {
                    lease,
                    revision,
                    alive_by,
                };
                self.entries.insert(key.to_owned(), entry);
            }
            Err(why) => {
                self.entries.remove(key);
                self.rejected.insert(key.to_owned(), why);
            }
        }
    }

    /// `key` is gone since `revision`; it stays where something newer is known.
    pub(super) fn remove(&mut self, key: &str, revision: i64) {
        if self.entries.get(key).is_some_and(|entry| entry.revision > revision) {
            return;
        }
        self.entries.remove(key);
        self.rejected.remove(key);
    }

    /// What is there that is no lease.
    pub(super) fn rejected(&self) -> &BTreeMap<String, String> {
        &self.rejected
    }

    /// What `key` holds.
    pub(super) fn get(&self, key: &str) -> Option<&Entry> {
        self.entries.get(key)
    }

    /// Every lease, each node under a name of its own; the one at `own.1` under `own.0`.
    pub(super) fn leases(&self, own: Option<(&NodeName, &str)>) -> Vec<Lease> {
        let mut newest: BTreeMap<&NodeName, (i64, &str)> = BTreeMap::new();
        for (key, entry) in &self.entries {
            let this = (entry.revision, key.as_str());
            let newer = newest.entry(&entry.lease.node).or_insert(this);
            *newer = (*newer).max(this);
        }
        let named = |(key, entry): (&String, &Entry)| {
            let is_newest = newest.get(&entry.lease.node).is_some_and(|(_, at)| at == key);
            let is_free = own.is_none_or(|(node, _)| *node != entry.lease.node);
            let node = match own {
                Some((node, at)) if at == key => node.clone(),
                _ if is_newest && is_free => entry.lease.node.clone(),
                _ => NodeName::new(&format!("{}~{key}", entry.lease.node)).unwrap_or_else(|_| entry.lease.node.clone()),
            };
            Lease {
                node,
                ..entry.lease.clone()
            }
        };
        self.entries.iter().map(named).collect()
    }

    /// All subnets that are given out.
    pub(super) fn taken(&self) -> impl Iterator<Item = Subnets> {
        self.entries.values().map(|entry| entry.lease.subnets)
    }

    /// This node's leases: those that `network` gives out, and those that do not fit it, each by its key. A reservation
    /// that does not fit is in neither: it is not ours to remove.
    pub(super) fn of<'a>(&'a self, who: &Identity, network: &Network) -> (Vec<&'a str>, Vec<&'a str>) {
        let fits = |entry: &Entry| {
            let slot = network.slot(&entry.lease.subnets);
            slot.is_ok_and(|slot| network.slots().contains(&slot.get()))
        };
        let (mut good, mut bad) = (Vec::new(), Vec::new());
        for (key, entry) in self.entries.iter().filter(|(_, entry)| who.owns(&entry.lease)) {
            if fits(entry) {
                good.push(key.as_str());
            } else if entry.alive_by != 0 {
                bad.push(key.as_str());
            }
        }
        // A reservation is what an operator wants; then the one that this node wrote last.
        good.sort_by_key(|key| {
            let entry = &self.entries[*key];
            (entry.alive_by != 0, -entry.revision)
        });
        (good, bad)
    }

    /// Whether what `key` holds is this node's.
    pub(super) fn owns(&self, who: &Identity, key: &str) -> bool {
        self.entries.get(key).is_some_and(|entry| who.owns(&entry.lease))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn name(text: &str) -> NodeName {
        NodeName::new(text).unwrap()
    }

    const VXLAN: &str = r#"{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}}"#;

    #[test]
    fn flannels_values_are_read_and_written_byte_for_byte() {
        let mut view = View::default();
        for (key, value) in [
            ("10.5.52.0-24", VXLAN),
            ("10.5.53.0-24", r#"{"PublicIP":"1.2.3.4","PublicIPv6":null}"#),
            (
                "10.12.13.0-24&fd00:12:13::-56",
                r#"{"PublicIP":"1.2.3.5","PublicIPv6":"fd00::5","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:45"},"BackendV6Data":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:46"}}"#,
            ),
            (
                "10.5.54.0-24",
                r#"{"PublicIP":"1.2.3.6","PublicIPv6":null,"BackendType":"host-gw"}"#,
            ),
        ] {
            view.put(key, value.as_bytes(), 1, 1);
            let entry = view.get(key).unwrap_or_else(|| panic!("{key}: {:?}", view.rejected()));
            assert_eq!(format::encode_flannel(&entry.lease), value);
            assert_eq!(format::key(&entry.lease.subnets), key);
        }
    }

    #[test]
    fn two_leases_of_one_address_have_two_names_and_the_own_one_has_the_nodes() {
        let mut view = View::default();
        view.put("10.5.52.0-24", VXLAN.as_bytes(), 1, 7);
        view.put("10.5.60.0-24", VXLAN.as_bytes(), 2, 8);
        let names = |own| {
            view.leases(own)
                .iter()
                .map(|lease| lease.node.to_string())
                .collect::<Vec<_>>()
        };
        assert_eq!(names(None), ["192.168.64.3~10.5.52.0-24", "192.168.64.3"]);
        let own = name("node-a");
        assert_eq!(
            names(Some((&own, "10.5.60.0-24"))),
            ["192.168.64.3~10.5.52.0-24", "node-a"]
        );
        assert_eq!(names(Some((&own, "10.5.52.0-24"))), ["node-a", "192.168.64.3"]);
        let own = name("192.168.64.3");
        assert_eq!(
            names(Some((&own, "10.5.52.0-24"))),
            ["192.168.64.3", "192.168.64.3~10.5.60.0-24"]
        );
    }

    #[test]
    fn what_came_later_is_not_undone_by_what_is_heard_late() {
        let mut view = View::default();
        let newer = VXLAN.replace("c6:d2", "c6:d3");
        view.put("10.5.52.0-24", newer.as_bytes(), 9, 7);
        view.put("10.5.52.0-24", VXLAN.as_bytes(), 4, 7);
        view.remove("10.5.52.0-24", 8);
        let held = view.get("10.5.52.0-24").expect("it is there");
        assert_eq!((held.revision, format::encode_flannel(&held.lease)), (9, newer));
        view.remove("10.5.52.0-24", 10);
        assert_eq!(view.get("10.5.52.0-24"), None);
    }

    #[test]
    fn a_reservation_is_taken_before_what_was_leased_last() {
        let mut view = View::default();
        view.put("10.5.52.0-24", VXLAN.as_bytes(), 9, 7);
        view.put("10.5.60.0-24", VXLAN.as_bytes(), 2, 0);
        view.put("10.9.1.0-24", VXLAN.as_bytes(), 3, 4);
        view.put("10.9.2.0-24", VXLAN.as_bytes(), 4, 0);
        let conf = crate::config::NetConf::parse(
            r#"{"Network": "10.5.0.0/16", "Backend": {"Type": "vxlan"}}"#,
            &crate::config::Context {
                file: "test",
                psk_file: None,
                psk_secret: None,
            },
        );
        let who = Identity {
            node: name("node-a"),
            public: ["192.168.64.3".parse().unwrap()].into_iter().collect(),
        };
        let (good, bad) = view.of(&who, &conf.unwrap().network);
        assert_eq!(good, ["10.5.60.0-24", "10.5.52.0-24"]);
        assert_eq!(bad, ["10.9.1.0-24"], "of another Network");
    }

    proptest! {
        #[test]
        fn garbage_is_named_and_never_a_panic(key in ".{0,40}", value in proptest::collection::vec(any::<u8>(), 0..80)) {
            let mut view = View::default();
            view.put(&key, &value, 1, 1);
            prop_assert_eq!(view.leases(None).len() + view.rejected().len(), 1);
            view.remove(&key, 2);
            prop_assert!(view.leases(None).is_empty() && view.rejected().is_empty());
        }
    }
}
