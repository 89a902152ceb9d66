//! What each command does.

use std::io::{self, Write as _};
use std::path::Path;

use serde_json::Value;

use super::call::{Call, VERSIONS};
use super::conf::{Attachment, Conf, VALID_ATTACHMENTS};
use super::delegate::Delegate;
use super::error::Error;
use super::netns;
use super::plugin::Plugin;
use super::state::{Key, Saved, States};
use super::subnet::SubnetFile;

/// Reported where nobody can be told otherwise: a person may read it in the runtime's log.
fn warn(text: &str) {
    drop(writeln!(io::stderr(), "{text}"));
}

fn key(call: &Call, conf: &Conf) -> Key {
    Key {
        network: conf.name.clone(),
        container: call.container.clone(),
        interface: Some(call.interface.clone()),
    }
}

/// As an ADD would make it now.
fn delegate(conf: &Conf) -> Result<Delegate, Error> {
    Delegate::of(conf, &SubnetFile::load(&conf.subnet_file)?)
}

/// The runtime is not to be served with its own namespace: the delegate would change the node's interfaces.
fn not_our_netns(call: &Call) -> Result<(), Error> {
    let own = call.netns.as_deref().is_some_and(netns::is_own);
    if own && !call.own_netns {
        let message = "plugin's netns and netns from CNI_NETNS should not be the same";
        return Err(Error::new(Error::NETNS, message));
    }
    Ok(())
}

/// VERSION: what is served.
pub fn version() -> Vec<u8> {
    let newest = VERSIONS[VERSIONS.len() - 1];
    format!(
        "{}\n",
        serde_json::json!({ "cniVersion": newest, "supportedVersions": VERSIONS })
    )
    .into_bytes()
}

/// ADD: the state is kept before the delegate is called, and stays if that fails, for the DEL that follows.
///
/// # Errors
/// flannel's, the delegate's, code 8 for the runtime's own namespace.
pub fn add(call: &Call, conf: &Conf) -> Result<Vec<u8>, Error> {
    let delegate = delegate(conf)?;
    not_our_netns(call)?;
    let plugin = Plugin::find(&delegate.kind, call).map_err(|error| error.within("failed to delegate add: "))?;
    let text = delegate.text();
    States::new(&conf.data_dir).save(&key(call, conf), &text)?;
    let answer = plugin.run(&[("CNI_COMMAND", "ADD")], &text)?;
    result(answer, conf)
}

/// A delegate's result, with the configuration's version where it names none.
fn result(answer: Vec<u8>, conf: &Conf) -> Result<Vec<u8>, Error> {
    let json = serde_json::from_slice::<Value>(&answer).map_err(|error| {
        Error::internal(format!(
            "failed to delegate add: failed to unmarshal raw result: {error}"
        ))
    })?;
    let mut json = match json {
        Value::Object(json) => json,
        Value::Null => Default::default(),
        _ => {
            return Err(Error::internal(
                "failed to delegate add: failed to unmarshal raw result: it is no object",
            ));
        }
    };
    if json
        .get("cniVersion")
        .and_then(Value::as_str)
        .is_some_and(|version| !version.is_empty())
    {
        return Ok(answer);
    }
    let version = conf.version.as_deref().unwrap_or(VERSIONS[0]);
    json.insert("cniVersion".to_owned(), version.into());
    Ok(Value::from(json).to_string().into_bytes())
}

/// DEL: with what the ADD kept, which goes once the delegate has done its part, or else as an ADD would be made now.
/// Where there is neither, nothing was attached.
///
/// # Errors
/// The delegate's; the state is then still there, and the next DEL goes on. Code 5: a state can't be read or removed.
pub fn del(call: &Call, conf: &Conf) -> Result<Vec<u8>, Error> {
    not_our_netns(call)?;
    let (states, key) = (States::new(&conf.data_dir), key(call, conf));
    let run = |kind: &str, text: &[u8]| Plugin::find(kind, call)?.run(&[("CNI_COMMAND", "DEL")], text);
    let saved = states.find(&key)?;
    match saved.as_ref().map(|saved| (saved, &saved.delegate)) {
        Some((saved, Some(delegate))) => drop(run(&delegate.kind, &saved.text)?),
        unknown => match (delegate(conf), unknown) {
            (Ok(delegate), _) => drop(run(&delegate.kind, &delegate.text())?),
            (Err(error), Some((saved, _))) => return Err(unreadable(saved, &error)),
            (Err(error), None) => warn(&format!(
                "nothing is kept of {} in {}, and nothing can be made anew: {}",
                key.container, key.network, error.message
            )),
        },
    }
    states.clear_aside(&key);
    saved.map_or(Ok(()), |saved| saved.remove())?;
    Ok(Vec::new())
}

fn unreadable(saved: &Saved, error: &Error) -> Error {
    let path = saved.path.display();
    Error::internal(format!(
        "failed to parse netconf: {path} is no delegate's configuration, and none can be made anew: {}",
        error.message
    ))
    .with(format!("remove {path} if the container is gone"))
}

/// CHECK: the delegate's own, then the container's MTU and routes.
///
/// # Errors
/// The delegate's; code 7 without `prevResult`; code 999, with what is not as ADD made it.
pub fn check(call: &Call, conf: &Conf) -> Result<Vec<u8>, Error> {
    not_our_netns(call)?;
    let Some(previous) = &conf.previous else {
        return Err(Error::new(
            Error::CONFIGURATION,
            "CHECK needs prevResult, the result of the ADD",
        ));
    };
    let saved = States::new(&conf.data_dir).find(&key(call, conf))?;
    let mut delegate = match saved.and_then(|saved| saved.delegate) {
        Some(delegate) => delegate,
        None => delegate(conf)?,
    };
    // The ADD may have been under an older version, whose results the runtime has converted.
    if let Some(version) = &conf.version {
        delegate.json.insert("cniVersion".to_owned(), version.as_str().into());
    }
    delegate
        .json
        .insert("prevResult".to_owned(), with_gateways(previous.clone()));
    Plugin::find(&delegate.kind, call)?.run(&[("CNI_COMMAND", "CHECK")], &delegate.text())?;

    let netns = call.netns.as_deref().unwrap_or_else(|| Path::new(""));
    let seen = netns::look(netns, &call.interface)?;
    if let Some(mtu) = delegate.mtu().filter(|mtu| seen.mtu > *mtu) {
        return Err(Error::internal(format!(
            "{} has an MTU of {}, and the network carries {mtu}: larger packets are lost",
            call.interface, seen.mtu
        )));
    }
    let lost: Vec<_> = delegate
        .destinations()
        .filter(|net| !netns::is_covered(&seen.routes, net))
        .map(|net| net.to_string())
        .collect();
    if !lost.is_empty() {
        return Err(Error::internal(format!(
            "the container has no route to {}, which ADD made",
            lost.join(", ")
        )));
    }
    Ok(Vec::new())
}

/// A result whose routes name the gateway that they were made with: without one, that is the first of their family among
/// the addresses' gateways. Plugins before containernetworking/plugins 1.3 look for a route without a gateway and find
/// none.
fn with_gateways(mut result: Value) -> Value {
    let is_v6 = |net: &Value| net.as_str().is_some_and(|net| net.contains(':'));
    let ips = result.get("ips").and_then(Value::as_array).cloned().unwrap_or_default();
    let gateways: Vec<_> = ips.iter().filter_map(|ip| ip.get("gateway")).collect();
    let routes = result.get_mut("routes").and_then(Value::as_array_mut);
    for route in routes.into_iter().flatten().filter_map(Value::as_object_mut) {
        let Some(v6) = route.get("dst").map(is_v6) else {
            continue;
        };
        if let Some(gateway) = gateways.iter().find(|gateway| is_v6(gateway) == v6) {
            route.entry("gw").or_insert_with(|| (*gateway).clone());
        }
    }
    result
}

/// STATUS: whether an ADD would find what it needs.
///
/// # Errors
/// Code 50 with the reason; the delegate's own.
pub fn status(call: &Call, conf: &Conf) -> Result<Vec<u8>, Error> {
    let unavailable = |error: Error| Error {
        code: Error::UNAVAILABLE,
        ..error
    };
    let delegate = delegate(conf).map_err(unavailable)?;
    let plugin = Plugin::find(&delegate.kind, call).map_err(unavailable)?;
    plugin.run(&[("CNI_COMMAND", "STATUS")], &delegate.text())?;
    Ok(Vec::new())
}

/// GC: a DEL for each attachment of the network that is kept and no longer valid, then the delegate's own.
///
/// # Errors
/// Code 7 where no list of valid attachments is given. Else all is tried, and what failed is told together, under the
/// first one's code.
pub fn gc(call: &Call, conf: &Conf) -> Result<Vec<u8>, Error> {
    let Some(valid) = &conf.valid else {
        let message = format!("GC needs {VALID_ATTACHMENTS}: without it everything would be removed");
        return Err(Error::new(Error::CONFIGURATION, message));
    };
    let states = States::new(&conf.data_dir);
    let (kept, mut errors) = states.all(&conf.name);
    for saved in kept.iter().filter(|saved| !is_valid(&saved.key, valid)) {
        if let Err(error) = collect(call, saved) {
            errors.push(error.within(&format!("{} in {}: ", saved.key.container, conf.name)));
        }
    }
    states.clear_all_aside(&conf.name);
    let forwarded = delegate(conf).and_then(|mut delegate| {
        let list: Vec<_> = valid
            .iter()
            .map(|one| serde_json::json!({ "containerID": one.container, "ifname": one.interface }))
            .collect();
        delegate.json.insert(VALID_ATTACHMENTS.to_owned(), list.into());
        Plugin::find(&delegate.kind, call)?.run(&[("CNI_COMMAND", "GC")], &delegate.text())
    });
    errors.extend(forwarded.err());
    let Some(first) = errors.first() else {
        return Ok(Vec::new());
    };
    let told: Vec<_> = errors.iter().map(|error| error.message.as_str()).collect();
    Err(Error::new(first.code, told.join("; ")).with(first.details.clone()))
}

/// Whether the runtime still has the attachment. A file of flannel's plugin names no interface: any of its container's
/// will do.
fn is_valid(key: &Key, valid: &[Attachment]) -> bool {
    let same = |one: &Attachment| {
        one.container == key.container
            && key
                .interface
                .as_ref()
                .is_none_or(|interface| *interface == one.interface)
    };
    valid.iter().any(same)
}

/// DEL of what is kept. Its namespace is gone, as CNI lets a GC take for granted.
fn collect(call: &Call, saved: &Saved) -> Result<(), Error> {
    let Some(delegate) = &saved.delegate else {
        // What it would have said can't be known; addresses are the delegate's to collect.
        warn(&format!(
            "{} is no delegate's configuration and is removed",
            saved.path.display()
        ));
        return saved.remove();
    };
    let variables = [
        ("CNI_COMMAND", "DEL"),
        ("CNI_CONTAINERID", saved.key.container.as_str()),
        // Kubernetes has no other, and flannel's plugin does not say.
        ("CNI_IFNAME", saved.key.interface.as_deref().unwrap_or("eth0")),
        ("CNI_NETNS", ""),
    ];
    Plugin::find(&delegate.kind, call)?.run(&variables, &saved.text)?;
    saved.remove()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_attachment_is_valid_by_container_and_interface() {
        let valid = [Attachment {
            container: "c".to_owned(),
            interface: "eth0".to_owned(),
        }];
        let is_valid = |container: &str, interface: Option<&str>| {
            let key = Key {
                network: "n".to_owned(),
                container: container.to_owned(),
                interface: interface.map(str::to_owned),
            };
            super::is_valid(&key, &valid)
        };
        assert!(is_valid("c", Some("eth0")) && is_valid("c", None));
        assert!(!is_valid("c", Some("net1")) && !is_valid("d", Some("eth0")) && !is_valid("d", None));
    }

    #[test]
    fn routes_are_checked_with_the_gateway_that_they_were_made_with() {
        let result = serde_json::json!({
            "ips": [{ "address": "10.1.0.2/24" }, { "gateway": "fd00::1" }, { "gateway": "10.1.0.1" }, { "gateway": "10.1.0.9" }],
            "routes": [{ "dst": "10.0.0.0/8" }, { "dst": "::/0" }, { "dst": "1.1.1.1/32", "gw": "10.1.0.7" }, {}, 1],
        });
        let expected = serde_json::json!([
            { "dst": "10.0.0.0/8", "gw": "10.1.0.1" }, { "dst": "::/0", "gw": "fd00::1" },
            { "dst": "1.1.1.1/32", "gw": "10.1.0.7" }, {}, 1
        ]);
        assert_eq!(with_gateways(result)["routes"], expected);
        for odd in [
            serde_json::json!(null),
            serde_json::json!({ "routes": 1, "ips": {} }),
            serde_json::json!([1]),
        ] {
            assert_eq!(with_gateways(odd.clone()), odd);
        }
    }

    #[test]
    fn a_result_without_a_version_gets_the_configurations() {
        let of = |answer: &str, version: Option<&str>| {
            let text = serde_json::json!({ "name": "n", "cniVersion": version }).to_string();
            let conf = super::super::conf::Document::read(text.as_bytes())
                .and_then(Conf::load)
                .unwrap();
            result(answer.into(), &conf).map(|text| String::from_utf8(text).unwrap())
        };
        let whole = r#"{ "cniVersion": "1.0.0", "more": [1] }"#;
        assert_eq!(of(whole, Some("0.3.1")).unwrap(), whole, "byte for byte");
        assert_eq!(of("{}", Some("0.3.1")).unwrap(), r#"{"cniVersion":"0.3.1"}"#);
        assert_eq!(of("null", None).unwrap(), r#"{"cniVersion":"0.1.0"}"#);
        for bad in ["", "[]", "{"] {
            let error = of(bad, None).unwrap_err();
            assert!(
                error
                    .message
                    .starts_with("failed to delegate add: failed to unmarshal raw result: ")
            );
        }
    }
}
