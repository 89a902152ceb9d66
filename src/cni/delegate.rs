//! The delegate's configuration, made of the network's and the node's lease by flannel's rules.

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::{Value, json};

use super::conf::{Conf, Object, kind};
use super::error::Error;
use super::subnet::SubnetFile;

/// A configuration for the plugin that does the work.
#[derive(Clone, Debug, PartialEq)]
pub struct Delegate {
    /// The plugin's name.
    pub kind: String,
    /// Its configuration. May hold secrets: it goes to the plugin and into the state's file, nowhere else.
    pub json: Object,
}

impl Delegate {
    /// The delegate of a network on this node.
    ///
    /// # Errors
    /// Code 999, with flannel's texts: `delegate` or `ipam.routes` can't be used.
    pub fn of(conf: &Conf, file: &SubnetFile) -> Result<Self, Error> {
        let mut json = conf.delegate.clone();
        let kind = match json.get("type") {
            None => "bridge".to_owned(),
            Some(Value::String(kind)) => kind.clone(),
            Some(_) => {
                return Err(Error::internal(
                    "'delegate' dictionary, if present, must have (string) 'type' field",
                ));
            }
        };
        for key in ["name", "ipam"] {
            if json.contains_key(key) {
                return Err(Error::internal(format!(
                    "'delegate' dictionary must not have '{key}' field, it'll be set by flannel"
                )));
            }
        }
        let mut default = |key: &str, value: Value| {
            json.entry(key).or_insert(value);
        };
        default("type", kind.as_str().into());
        // Where the daemon does not masquerade, the delegate does.
        default("ipMasq", (!file.masquerade).into());
        default("mtu", file.mtu.into());
        if kind == "bridge" {
            default("isGateway", true.into());
        }
        json.insert("name".to_owned(), conf.name.as_str().into());
        if let Some(version) = &conf.version {
            json.insert("cniVersion".to_owned(), version.as_str().into());
        }
        if let Some(runtime) = &conf.runtime {
            json.insert("runtimeConfig".to_owned(), runtime.clone().into());
        }
        let ipam = ipam(conf, file).map_err(|why| {
            Error::internal(format!(
                "failed to assemble Delegate IPAM: failed to read IPAM routes: {why}"
            ))
        })?;
        json.insert("ipam".to_owned(), ipam.into());
        Ok(Self { kind, json })
    }

    /// What an ADD gave its delegate; none if that is not a configuration with a type.
    pub fn from_saved(text: &[u8]) -> Option<Self> {
        let json: Object = serde_json::from_slice(text).ok()?;
        let kind = json.get("type")?.as_str()?.to_owned();
        Some(Self { kind, json })
    }

    /// For the plugin's standard input.
    pub fn text(&self) -> Vec<u8> {
        // The keys are strings and nothing in it is foreign to JSON.
        serde_json::to_vec(&self.json).unwrap_or_default()
    }

    /// The MTU that its interfaces should have.
    pub fn mtu(&self) -> Option<u64> {
        self.json.get("mtu").and_then(Value::as_u64).filter(|mtu| *mtu > 0)
    }

    /// Destinations that a container should have a route to.
    pub fn destinations(&self) -> impl Iterator<Item = IpNet> {
        let routes = self.json.get("ipam").and_then(|ipam| ipam.get("routes"));
        let routes = routes.and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        routes
            .iter()
            .filter_map(|route| route.get("dst")?.as_str()?.parse().ok())
    }
}

fn ipam(conf: &Conf, file: &SubnetFile) -> Result<Object, String> {
    let mut ipam = conf.ipam.clone();
    ipam.entry("type").or_insert_with(|| "host-local".into());
    let subnets = [file.subnet, file.subnet6].into_iter().flatten();
    let ranges: Vec<_> = subnets.map(|subnet| json!([{ "subnet": subnet }])).collect();
    ipam.insert("ranges".to_owned(), ranges.into());
    let mut routes = match ipam.remove("routes") {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::Array(routes)) => routes
            .into_iter()
            .map(route)
            .collect::<Result<_, _>>()
            .map_err(unreadable)?,
        Some(other) => return Err(unreadable(format!("they are {}, a list is needed", kind(&other)))),
    };
    let networks = file.networks.iter().chain(&file.networks6);
    routes.extend(networks.map(|network| json!({ "dst": network })));
    ipam.insert("routes".to_owned(), routes.into());
    Ok(ipam)
}

fn unreadable(why: String) -> String {
    format!("failed to parse ipam.routes: {why}")
}

/// A route of the user's, its addresses read and written again, what says nothing left out.
fn route(route: Value) -> Result<Value, String> {
    let Value::Object(mut route) = route else {
        return Err(format!("a route is {}, an object is needed", kind(&route)));
    };
    let Some(Value::String(text)) = route.get("dst") else {
        return Err("a route has no dst".to_owned());
    };
    let net: IpNet = text.parse().map_err(|_| format!("invalid CIDR address: {text}"))?;
    route.insert("dst".to_owned(), net.to_string().into());
    match route.get("gw") {
        None => {}
        Some(Value::Null) => drop(route.remove("gw")),
        Some(Value::String(text)) if text.is_empty() => drop(route.remove("gw")),
        Some(Value::String(text)) => {
            let gateway: IpAddr = text.parse().map_err(|_| format!("invalid IP address: {text}"))?;
            route.insert("gw".to_owned(), gateway.to_string().into());
        }
        Some(other) => return Err(format!("gw is {}, an address is needed", kind(other))),
    }
    for key in ["mtu", "advmss", "priority", "table", "scope"] {
        let Some(value) = route.get(key) else { continue };
        let says_nothing = match value {
            Value::Null => true,
            Value::Number(number) if number.is_i64() => number.as_i64() == Some(0) && !matches!(key, "table" | "scope"),
            other => return Err(format!("{key} is {}, a whole number is needed", kind(other))),
        };
        if says_nothing {
            route.remove(key);
        }
    }
    Ok(route.into())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;

    use super::super::conf::Document;
    use super::*;

    const ENV: &str =
        "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n";

    fn of(conf: &Value) -> Result<Delegate, Error> {
        let file = SubnetFile::parse(ENV, Path::new("/s")).unwrap();
        let conf = Document::read(conf.to_string().as_bytes()).and_then(Conf::load)?;
        Delegate::of(&conf, &file)
    }

    #[test]
    fn what_was_made_is_understood_when_it_is_read_back() {
        let conf = json!({ "name": "n", "delegate": { "mtu": 1400 }, "ipam": { "routes": [{ "dst": "10.0.0.0/8" }] } });
        let made = of(&conf).unwrap();
        let saved = Delegate::from_saved(&made.text()).unwrap();
        assert_eq!(saved, made);
        assert_eq!(saved.mtu(), Some(1400));
        let destinations: Vec<_> = saved.destinations().map(|net| net.to_string()).collect();
        assert_eq!(destinations, ["10.0.0.0/8", "10.244.0.0/16"]);
        for text in ["", "[]", "{}", r#"{"type": 1}"#, r#"{"type": "bridge""#] {
            assert_eq!(Delegate::from_saved(text.as_bytes()), None, "{text}");
        }
    }

    #[test]
    fn a_route_that_leads_nowhere_is_refused_and_a_key_to_come_is_kept() {
        let routes = |routes: Value| of(&json!({ "name": "n", "ipam": { "routes": routes } }));
        let told = |value: Value| routes(value).unwrap_err().message;
        let prefix = "failed to assemble Delegate IPAM: failed to read IPAM routes: failed to parse ipam.routes: ";
        assert_eq!(told(json!({})), format!("{prefix}they are an object, a list is needed"));
        assert_eq!(told(json!([{}])), format!("{prefix}a route has no dst"));
        assert_eq!(
            told(json!([1])),
            format!("{prefix}a route is a number, an object is needed")
        );
        assert_eq!(
            told(json!([{ "dst": "::/0", "gw": "x" }])),
            format!("{prefix}invalid IP address: x")
        );
        assert_eq!(
            told(json!([{ "dst": "::/0", "mtu": "x" }])),
            format!("{prefix}mtu is a string, a whole number is needed")
        );
        let kept = routes(json!([{ "dst": "::/0", "to come": true }])).unwrap();
        assert_eq!(
            kept.json["ipam"]["routes"][0],
            json!({ "dst": "::/0", "to come": true })
        );
    }

    fn value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            "[0-9a-f.:/]{0,12}".prop_map(Value::from),
        ];
        let key = prop_oneof!["[a-z]{1,4}", "dst|gw|mtu|routes|type|name|ipam|table"];
        leaf.prop_recursive(4, 24, 4, move |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                proptest::collection::btree_map(key.clone(), inner, 0..4)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn whatever_is_asked_it_is_made_or_refused(delegate in value(), ipam in value(), runtime in value()) {
            let conf = json!({ "name": "n", "delegate": delegate, "ipam": ipam, "runtimeConfig": runtime });
            if let Ok(made) = of(&conf) {
                prop_assert_eq!(Delegate::from_saved(&made.text()), Some(made.clone()));
                // The network's own come last, whatever the user's are.
                prop_assert_eq!(made.destinations().last().map(|net| net.to_string()), Some("10.244.0.0/16".to_owned()));
                prop_assert_eq!(&made.json["name"], "n");
            }
        }
    }
}
