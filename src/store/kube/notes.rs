//! flannel's annotations on a Node (its `pkg/subnet/kube`), read and written: pure.
//!
//! ```text
//! <prefix>/kube-subnet-manager    "true": the Node holds a lease
//! <prefix>/backend-type           vxlan, host-gw, ipsec, …; empty for udp and alloc
//! <prefix>/backend-data           JSON, `null` where the backend has nothing to say; for ipsec the statement and its tags
//! <prefix>/backend-v6-data        the same for IPv6
//! <prefix>/public-ip, public-ipv6 where the other nodes send to
//! ```
//! The subnets are the Node's podCIDRs. A family counts where the Node has a podCIDR and a public address of it, so that a
//! fault in one leaves the other as it is.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use regex::Regex;

use crate::lease::{Addresses, BackendData, Lease, NodeName, Subnets};

const MANAGED: &str = "kube-subnet-manager";
const TYPE: &str = "backend-type";
const DATA: &str = "backend-data";
const V6_DATA: &str = "backend-v6-data";
const PUBLIC: &str = "public-ip";
const PUBLIC_V6: &str = "public-ipv6";
/// What a lease is written in.
const WRITTEN: [&str; 6] = [MANAGED, TYPE, DATA, V6_DATA, PUBLIC, PUBLIC_V6];
/// What an operator writes: the advertised addresses, and those to find the uplink by.
const ADVERTISED: [&str; 2] = ["public-ip-overwrite", "public-ipv6-overwrite"];
const UPLINK: [&str; 2] = ["node-public-ip", "node-public-ipv6"];

/// The names of the annotations, which begin with the prefix of `--kube-annotation-prefix`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Keys {
    /// Ends in `/` or `-`.
    prefix: String,
}

impl Keys {
    /// Understands a prefix by flannel's rules: `org.com` becomes `org.com/`, `org.com/9` becomes `org.com/9-`.
    ///
    /// # Errors
    /// flannel's texts.
    pub fn of(prefix: &str) -> Result<Self, String> {
        let mut prefix = prefix.to_owned();
        match prefix.matches('/').count() {
            0 => prefix.push('/'),
            1 => {}
            _ => return Err("subnet/kube: prefix can contain at most single slash".into()),
        }
        if !prefix.ends_with(['/', '-']) {
            prefix.push('-');
        }
        let form = Regex::new(r"^(?:[a-z0-9_-]+\.)+[a-z0-9_-]+/(?:[a-z0-9_-]+-)?$").expect("a right expression");
        match form.is_match(&prefix) {
            true => Ok(Self { prefix }),
            false => Err("subnet/kube: prefix must be in a format: fqdn/[0-9a-z-_]*".into()),
        }
    }

    /// What every name begins with.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// The whole name of an annotation.
    pub(super) fn name(&self, note: &str) -> String {
        format!("{}{note}", self.prefix)
    }

    /// Of all `annotations` of a Node those that are flannel's, without the prefix.
    pub(super) fn pick(&self, annotations: BTreeMap<String, String>) -> Notes {
        let ours = |name: &str| {
            WRITTEN
                .iter()
                .chain(&ADVERTISED)
                .chain(&UPLINK)
                .find(|note| **note == name)
        };
        let picked = annotations.into_iter().filter_map(|(name, value)| {
            let note = ours(name.strip_prefix(&self.prefix)?)?;
            Some((*note, value))
        });
        Notes(picked.collect())
    }
}

/// flannel's annotations of one Node, by their names without the prefix.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(super) struct Notes(BTreeMap<&'static str, String>);

/// What a Node says, and what in it is not understood.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Read {
    pub(super) lease: Option<Lease>,
    pub(super) odd: Vec<String>,
}

impl Notes {
    /// The annotations of `lease`.
    pub(super) fn of(lease: &Lease) -> Self {
        let Lease {
            node: _,
            subnets: _,
            public,
            backend,
            data,
            v6_data,
        } = lease;
        let mut notes = BTreeMap::from([(MANAGED, "true".to_owned()), (TYPE, backend.clone())]);
        // A VXLAN device has an address of its own for each family; the other backends speak for both in `backend-data`.
        if !(backend == "vxlan" && data.is_null()) {
            notes.insert(DATA, data.to_string());
        }
        notes.extend(public.v4.map(|address| (PUBLIC, address.to_string())));
        if let Some(address) = public.v6 {
            notes.insert(PUBLIC_V6, address.to_string());
            if !v6_data.is_null() || ["host-gw", "extension"].contains(&backend.as_str()) {
                notes.insert(V6_DATA, v6_data.to_string());
            }
        }
        Self(notes)
    }

    /// Whether the Node holds a lease, by its own word.
    pub(super) fn are_managed(&self) -> bool {
        self.0.get(MANAGED).is_some_and(|value| value == "true")
    }

    /// The lease that a Node of these podCIDRs holds; none where it says that it is nobody's.
    pub(super) fn read(&self, node: &NodeName, pods: &[IpNet]) -> Read {
        let mut read = Read::default();
        if !self.are_managed() {
            return read;
        }
        let public = self.addresses([PUBLIC, PUBLIC_V6], &mut read.odd);
        let both: Subnets = pods.iter().copied().collect();
        let subnets = Subnets {
            v4: both.v4.filter(|_| public.v4.is_some()),
            v6: both.v6.filter(|_| public.v6.is_some()),
        };
        if pods.is_empty() {
            read.odd
                .push(format!("node {node:?} pod cidr not assigned", node = node.as_str()));
        } else if subnets == Subnets::default() {
            read.odd.push("no public address of the family of its podCIDR".into());
        }
        let mut data = |note| match self.0.get(note).map(String::as_str) {
            None | Some("") => BackendData::NULL,
            Some(text) => serde_json::from_str(text).unwrap_or_else(|error| {
                read.odd.push(format!("{note} is no JSON: {error}"));
                BackendData::NULL
            }),
        };
        let (data, v6_data) = (data(DATA), data(V6_DATA));
        if subnets != Subnets::default() {
            read.lease = Some(Lease {
                node: node.clone(),
                subnets,
                public,
                backend: self.0.get(TYPE).cloned().unwrap_or_default(),
                data,
                v6_data,
            });
        }
        read
    }

    /// What to write so that the Node says what `wanted` says, and nothing else of a lease: `None` removes.
    pub(super) fn difference<'a>(&self, wanted: &'a Self) -> BTreeMap<&'static str, Option<&'a str>> {
        let differs = |note: &&'static str| {
            let (is, should) = (self.0.get(note), wanted.0.get(note).map(String::as_str));
            (is.map(String::as_str) != should).then_some((*note, should))
        };
        WRITTEN.iter().filter_map(differs).collect()
    }

    /// Whether something in these that a lease is written in says otherwise than `before`; what is gone says nothing.
    pub(super) fn contradict(&self, before: &Self) -> bool {
        let otherwise = |note: &&str| {
            let (is, was) = (self.0.get(*note), before.0.get(*note));
            is.is_some() && is != was
        };
        WRITTEN.iter().any(otherwise)
    }

    /// The addresses that the operator wants advertised in the place of the uplink's, and those to find the uplink by;
    /// with what is no address.
    pub(super) fn wishes(&self) -> (Addresses, Addresses, Vec<String>) {
        let mut odd = Vec::new();
        let advertised = self.addresses(ADVERTISED, &mut odd);
        (advertised, self.addresses(UPLINK, &mut odd), odd)
    }

    fn addresses(&self, [v4, v6]: [&str; 2], odd: &mut Vec<String>) -> Addresses {
        let mut of = |note: &str, fits: fn(&IpAddr) -> bool, family: &str| {
            let text = self.0.get(note).filter(|text| !text.is_empty())?;
            let parsed = text.parse().ok().filter(fits);
            if parsed.is_none() {
                let shown: String = text.chars().take(64).collect();
                odd.push(format!("{note} is {shown:?}: an {family} address is needed"));
            }
            parsed
        };
        let v4 = of(v4, IpAddr::is_ipv4, "IPv4");
        let v6 = of(v6, IpAddr::is_ipv6, "IPv6");
        v4.into_iter().chain(v6).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    fn keys() -> Keys {
        Keys::of("flannel.alpha.coreos.com").unwrap()
    }

    fn name(text: &str) -> NodeName {
        NodeName::new(text).unwrap()
    }

    fn nets(text: &str) -> Vec<IpNet> {
        text.split(' ')
            .filter(|net| !net.is_empty())
            .map(|net| net.parse().unwrap())
            .collect()
    }

    fn lease(backend: &str, subnets: &str, public: &str, data: Value, v6_data: Value) -> Lease {
        Lease {
            node: name("n1"),
            subnets: nets(subnets).into_iter().collect(),
            public: public.split(' ').map(|a| a.parse::<IpAddr>().unwrap()).collect(),
            backend: backend.into(),
            data: data.into(),
            v6_data: v6_data.into(),
        }
    }

    fn notes(pairs: &[(&'static str, &str)]) -> Notes {
        Notes(pairs.iter().map(|(note, value)| (*note, (*value).to_owned())).collect())
    }

    #[test]
    fn prefixes_are_flannels() {
        for (prefix, name) in [
            ("org.com", "org.com/backend-type"),
            ("org.com/", "org.com/backend-type"),
            ("org.com/9", "org.com/9-backend-type"),
            ("org.com/9-", "org.com/9-backend-type"),
            ("flannel.alpha.coreos.com", "flannel.alpha.coreos.com/backend-type"),
        ] {
            assert_eq!(Keys::of(prefix).unwrap().name(TYPE), name);
        }
        let single = "subnet/kube: prefix can contain at most single slash";
        let form = "subnet/kube: prefix must be in a format: fqdn/[0-9a-z-_]*";
        for (prefix, error) in [
            ("a.b/c/d", single),
            ("org", form),
            ("org.com/A", form),
            ("", form),
            (" org.com", form),
        ] {
            assert_eq!(Keys::of(prefix).unwrap_err(), error, "{prefix:?}");
        }
    }

    #[test]
    fn what_flannel_writes_is_written_byte_for_byte_and_read_again() {
        let vxlan = json!({"VNI": 1, "VtepMAC": "12:c6:65:89:b4:e3"});
        let vxlan6 = json!({"VNI": 1, "VtepMAC": "12:c6:65:89:b4:e4"});
        let statement = json!({"Statement": "AAAA", "Tags": ["BBBB"]});
        let both = ("10.244.1.0/24 fd00:244:0:1::/64", "192.168.64.3 fd00::3");
        for (lease, wanted) in [
            (
                lease("vxlan", "10.244.1.0/24", "192.168.64.3", vxlan.clone(), Value::Null),
                notes(&[
                    (MANAGED, "true"),
                    (TYPE, "vxlan"),
                    (DATA, r#"{"VNI":1,"VtepMAC":"12:c6:65:89:b4:e3"}"#),
                    (PUBLIC, "192.168.64.3"),
                ]),
            ),
            (
                lease("vxlan", both.0, both.1, vxlan, vxlan6.clone()),
                notes(&[
                    (MANAGED, "true"),
                    (TYPE, "vxlan"),
                    (DATA, r#"{"VNI":1,"VtepMAC":"12:c6:65:89:b4:e3"}"#),
                    (V6_DATA, r#"{"VNI":1,"VtepMAC":"12:c6:65:89:b4:e4"}"#),
                    (PUBLIC, "192.168.64.3"),
                    (PUBLIC_V6, "fd00::3"),
                ]),
            ),
            (
                lease("vxlan", "fd00:244:0:1::/64", "fd00::3", Value::Null, vxlan6),
                notes(&[
                    (MANAGED, "true"),
                    (TYPE, "vxlan"),
                    (V6_DATA, r#"{"VNI":1,"VtepMAC":"12:c6:65:89:b4:e4"}"#),
                    (PUBLIC_V6, "fd00::3"),
                ]),
            ),
            (
                lease("host-gw", both.0, both.1, Value::Null, Value::Null),
                notes(&[
                    (MANAGED, "true"),
                    (TYPE, "host-gw"),
                    (DATA, "null"),
                    (V6_DATA, "null"),
                    (PUBLIC, "192.168.64.3"),
                    (PUBLIC_V6, "fd00::3"),
                ]),
            ),
            (
                lease("", "10.244.1.0/24", "192.168.64.3", Value::Null, Value::Null),
                notes(&[(MANAGED, "true"), (TYPE, ""), (DATA, "null"), (PUBLIC, "192.168.64.3")]),
            ),
            (
                lease(
                    "extension",
                    "10.244.1.0/24",
                    "192.168.64.3",
                    json!("T+ojW="),
                    Value::Null,
                ),
                notes(&[
                    (MANAGED, "true"),
                    (TYPE, "extension"),
                    (DATA, r#""T+ojW=""#),
                    (PUBLIC, "192.168.64.3"),
                ]),
            ),
            (
                lease("ipsec", both.0, both.1, statement, Value::Null),
                notes(&[
                    (MANAGED, "true"),
                    (TYPE, "ipsec"),
                    (DATA, r#"{"Statement":"AAAA","Tags":["BBBB"]}"#),
                    (PUBLIC, "192.168.64.3"),
                    (PUBLIC_V6, "fd00::3"),
                ]),
            ),
        ] {
            assert_eq!(Notes::of(&lease), wanted);
            let read = wanted.read(&name("n1"), &nets("10.244.1.0/24 fd00:244:0:1::/64"));
            assert_eq!((read.lease, read.odd), (Some(lease), vec![]));
        }
    }

    #[test]
    fn a_fault_in_one_family_leaves_the_other() {
        let dual = "10.244.1.0/24 fd00:244:0:1::/64";
        let good = [(MANAGED, "true"), (TYPE, "vxlan"), (DATA, "{}"), (V6_DATA, "{}")];
        for (more, pods, subnets, odd) in [
            (&[(PUBLIC, "192.0.2.1")][..], dual, "10.244.1.0/24", ""),
            (&[(PUBLIC_V6, "fd00::1")], dual, "fd00:244:0:1::/64", ""),
            (
                &[(PUBLIC, "192.0.2.1"), (PUBLIC_V6, "x")],
                dual,
                "10.244.1.0/24",
                "public-ipv6 is \"x\"",
            ),
            (
                &[(PUBLIC, "fd00::1"), (PUBLIC_V6, "fd00::1")],
                dual,
                "fd00:244:0:1::/64",
                "public-ip is \"fd00::1\"",
            ),
            (
                &[(PUBLIC, "192.0.2.1"), (PUBLIC_V6, "fd00::1")],
                "10.244.1.0/24",
                "10.244.1.0/24",
                "",
            ),
            (
                &[(PUBLIC, "192.0.2.1"), (V6_DATA, "{")],
                dual,
                "10.244.1.0/24",
                "backend-v6-data is no JSON",
            ),
            (
                &[(PUBLIC, "192.0.2.1")],
                "fd00:244:0:1::/64",
                "",
                "no public address of the family",
            ),
            (&[(PUBLIC, "192.0.2.1")], "", "", "pod cidr not assigned"),
        ] {
            let pairs: Vec<_> = good.iter().chain(more).copied().collect();
            let read = notes(&pairs).read(&name("n1"), &nets(pods));
            let found = read.lease.map(|lease| lease.subnets.to_string()).unwrap_or_default();
            assert_eq!(found, subnets, "{more:?} {pods}");
            let told = read.odd.join("; ");
            assert!(told.contains(odd) && told.is_empty() == odd.is_empty(), "{told}");
        }
        let free = [(MANAGED, "false"), (PUBLIC, "192.0.2.1"), (DATA, "{")];
        assert_eq!(notes(&free).read(&name("n1"), &nets(dual)), Read::default());
    }

    #[test]
    fn only_what_differs_is_written_and_what_is_left_of_a_family_removed() {
        let was = notes(&[
            (MANAGED, "true"),
            (TYPE, "vxlan"),
            (DATA, "{}"),
            (V6_DATA, "{}"),
            (PUBLIC, "192.0.2.1"),
            (PUBLIC_V6, "fd00::1"),
            ("public-ip-overwrite", "192.0.2.9"),
        ]);
        let wanted = notes(&[(MANAGED, "true"), (TYPE, "vxlan"), (DATA, "{}"), (PUBLIC, "192.0.2.2")]);
        let written = [(PUBLIC, Some("192.0.2.2")), (PUBLIC_V6, None), (V6_DATA, None)];
        assert_eq!(was.difference(&wanted), BTreeMap::from(written));
        assert!(wanted.difference(&wanted).is_empty());
        assert!(wanted.contradict(&was) && !was.contradict(&was));
        assert!(
            !notes(&[(TYPE, "vxlan")]).contradict(&was),
            "what was wiped is no other's word"
        );
    }

    #[test]
    fn an_operators_wishes_are_read() {
        let (advertised, uplink, odd) = notes(&[
            ("public-ip-overwrite", "172.18.0.2"),
            ("public-ipv6-overwrite", ""),
            ("node-public-ip", "10.0.0.300"),
            ("node-public-ipv6", "fd00::7"),
        ])
        .wishes();
        assert_eq!(
            (advertised.to_string(), uplink.to_string()),
            ("172.18.0.2".into(), "fd00::7".into())
        );
        assert_eq!(odd, ["node-public-ip is \"10.0.0.300\": an IPv4 address is needed"]);
    }

    proptest! {
        #[test]
        fn no_annotation_is_a_panic(pairs in proptest::collection::vec((0..10_usize, ".{0,40}"), 0..10), own: bool) {
            let all: Vec<&str> = WRITTEN.iter().chain(&ADVERTISED).chain(&UPLINK).copied().collect();
            let pairs = pairs.into_iter().map(|(at, value)| (keys().name(all[at]), value));
            let managed = own.then(|| (keys().name(MANAGED), "true".to_owned()));
            let notes = keys().pick(pairs.chain(managed).collect());
            let read = notes.read(&name("n1"), &nets("10.244.1.0/24"));
            prop_assert!(own || read.lease.is_none());
            notes.wishes();
        }
    }
}
