//! The network configuration on standard input: flannel's keys and CNI's.

use std::path::PathBuf;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::call::{Command, VERSIONS, is_name};
use super::error::Error;

/// A JSON object.
pub type Object = Map<String, Value>;

/// Where the daemon writes the node's lease, without `subnetFile`.
const SUBNET_FILE: &str = "/run/flannel/subnet.env";

/// Where delegates' configurations are kept, without `dataDir`.
const DATA_DIR: &str = "/var/lib/cni/flannel";

/// The list of attachments that GC is to leave alone.
pub const VALID_ATTACHMENTS: &str = "cni.dev/valid-attachments";

/// A configuration whose network name is good; nothing else is known of it yet.
#[derive(Clone, Debug, PartialEq)]
pub struct Document {
    name: String,
    json: Object,
}

/// What the plugin makes of a configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct Conf {
    /// The network, checked by [`is_name`].
    pub name: String,
    /// `cniVersion`; none if it is missing or empty.
    pub version: Option<String>,
    /// `subnetFile`.
    pub subnet_file: PathBuf,
    /// `dataDir`.
    pub data_dir: PathBuf,
    /// `delegate`: what the delegate's configuration begins with. May hold secrets.
    pub delegate: Object,
    /// `ipam`: what the delegate's begins with.
    pub ipam: Object,
    /// `runtimeConfig`, for the delegate.
    pub runtime: Option<Object>,
    /// `prevResult`: what ADD answered.
    pub previous: Option<Value>,
    /// `cni.dev/valid-attachments`; none where the key is missing, which is not the same as an empty list.
    pub valid: Option<Vec<Attachment>>,
}

/// A container's interface, as GC names it.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq)]
pub struct Attachment {
    /// `CNI_CONTAINERID` of its ADD.
    #[serde(rename = "containerID")]
    pub container: String,
    /// `CNI_IFNAME` of its ADD.
    #[serde(rename = "ifname")]
    pub interface: String,
}

impl Document {
    /// Reads the configuration as far as every command needs it.
    ///
    /// # Errors
    /// Code 6: no JSON object. Code 7: the network has no name or a bad one.
    pub fn read(text: &[u8]) -> Result<Self, Error> {
        let undecodable = |why: &dyn std::fmt::Display| {
            Error::new(Error::DECODING, format!("error unmarshall network config: {why}"))
        };
        let json = match serde_json::from_slice(text) {
            Ok(Value::Object(json)) => json,
            Ok(Value::Null) => Object::new(),
            Ok(other) => return Err(undecodable(&format!("it is {}, an object is needed", kind(&other)))),
            Err(error) => return Err(undecodable(&error)),
        };
        let name = string(&json, "name")
            .map_err(|why| undecodable(&why))?
            .unwrap_or_default();
        if name.is_empty() {
            return Err(Error::new(Error::CONFIGURATION, "missing network name"));
        }
        if !is_name(&name) {
            let message = "invalid characters found in network name";
            return Err(Error::new(Error::CONFIGURATION, message).with(name));
        }
        Ok(Self { name, json })
    }

    /// Whether `command` may be followed under the configuration's `cniVersion`.
    ///
    /// # Errors
    /// Code 6: the version is none. Code 1: it is not served, or has not got the command.
    pub fn check_version(&self, command: &Command) -> Result<(), Error> {
        let undecodable = |why: String| Error::new(Error::DECODING, why);
        let version = string(&self.json, "cniVersion")
            .map_err(|why| undecodable(format!("decoding version from network config: {why}")))?
            .filter(|version| !version.is_empty())
            .unwrap_or_else(|| VERSIONS[0].to_owned());
        let name = command.name();
        let since = match command {
            Command::Check => Some([0, 4, 0]),
            Command::Gc | Command::Status => Some([1, 1, 0]),
            _ => None,
        };
        if let Some(since) = since {
            let numbers = numbers(&version).map_err(undecodable)?;
            if numbers < since {
                return Err(Error::new(
                    Error::VERSION,
                    format!("config version does not allow {name}"),
                ));
            }
            if numbers > [1, 1, 0] {
                return Err(Error::new(
                    Error::VERSION,
                    format!("plugin version does not allow {name}"),
                ));
            }
        }
        if VERSIONS.contains(&version.as_str()) {
            return Ok(());
        }
        let served: Vec<_> = VERSIONS.iter().map(|version| format!("{version:?}")).collect();
        let details = format!("config is {version:?}, plugin supports [{}]", served.join(" "));
        Err(Error::new(Error::VERSION, "incompatible CNI versions").with(details))
    }
}

impl Conf {
    /// What is in a configuration.
    ///
    /// # Errors
    /// Code 999: a key has a value of a wrong kind. No value is in the text: it may be a secret.
    pub fn load(document: Document) -> Result<Self, Error> {
        Self::take(document).map_err(|why| Error::internal(format!("failed to load netconf: {why}")))
    }

    fn take(document: Document) -> Result<Self, String> {
        let Document { name, mut json } = document;
        let valid = match take(&mut json, VALID_ATTACHMENTS) {
            // What Go's library writes for an empty list.
            Some(Value::Null) => Some(Vec::new()),
            Some(list) => {
                Some(Vec::<Attachment>::deserialize(list).map_err(|error| format!("{VALID_ATTACHMENTS}: {error}"))?)
            }
            None => None,
        };
        Ok(Self {
            name,
            version: string(&json, "cniVersion")?.filter(|version| !version.is_empty()),
            subnet_file: string(&json, "subnetFile")?
                .unwrap_or_else(|| SUBNET_FILE.to_owned())
                .into(),
            data_dir: string(&json, "dataDir")?.unwrap_or_else(|| DATA_DIR.to_owned()).into(),
            delegate: object(&mut json, "delegate")?.unwrap_or_default(),
            ipam: object(&mut json, "ipam")?.unwrap_or_default(),
            runtime: object(&mut json, "runtimeConfig")?,
            previous: take(&mut json, "prevResult").filter(|value| !value.is_null()),
            valid,
        })
    }
}

/// A key's value, the key in any case as Go's reader takes it; its own spelling goes first.
fn take(json: &mut Object, key: &str) -> Option<Value> {
    json.remove(key).or_else(|| {
        let other = json.keys().find(|other| other.eq_ignore_ascii_case(key))?.clone();
        json.remove(&other)
    })
}

fn string(json: &Object, key: &str) -> Result<Option<String>, String> {
    let found = json.get(key).or_else(|| {
        let mut others = json.iter().filter(|(other, _)| other.eq_ignore_ascii_case(key));
        others.next().map(|(_, value)| value)
    });
    match found {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(other) => Err(format!("{key} is {}, a string is needed", kind(other))),
    }
}

fn object(json: &mut Object, key: &str) -> Result<Option<Object>, String> {
    match take(json, key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Object(object)) => Ok(Some(object)),
        Some(other) => Err(format!("{key} is {}, an object is needed", kind(&other))),
    }
}

/// What a value is, without its content.
pub(super) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// The three numbers of a version; what is missing is 0.
fn numbers(version: &str) -> Result<[u32; 3], String> {
    let parts: Vec<_> = version.split('.').collect();
    if parts.len() > 3 {
        return Err(format!("invalid version {version:?}: too many parts"));
    }
    let mut numbers = [0; 3];
    for ((number, part), name) in numbers.iter_mut().zip(parts).zip(["major", "minor", "micro"]) {
        *number = part.parse().map_err(|_| {
            format!("failed to convert {name} version part {part:?}: strconv.Atoi: parsing {part:?}: invalid syntax")
        })?;
    }
    Ok(numbers)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn load(text: &str) -> Result<Conf, Error> {
        Document::read(text.as_bytes()).and_then(Conf::load)
    }

    fn told(result: Result<impl std::fmt::Debug, Error>) -> (u32, String) {
        let error = result.unwrap_err();
        (error.code, error.message)
    }

    #[test]
    fn what_is_not_said_is_flannels_default() {
        let conf = load(r#"{"name": "n", "delegate": null, "subnetFile": null}"#).unwrap();
        assert_eq!(conf.subnet_file, PathBuf::from("/run/flannel/subnet.env"));
        assert_eq!(conf.data_dir, PathBuf::from("/var/lib/cni/flannel"));
        assert_eq!(
            (conf.version, conf.runtime, conf.valid, conf.previous),
            (None, None, None, None)
        );
        assert!(conf.delegate.is_empty() && conf.ipam.is_empty());
    }

    #[test]
    fn keys_are_taken_in_any_case_as_go_takes_them() {
        let conf = load(r#"{"NAME": "n", "SubnetFile": "/a", "datadir": "/b", "Delegate": {"x": 1}}"#).unwrap();
        assert_eq!((conf.name.as_str(), conf.delegate.len()), ("n", 1));
        assert_eq!((conf.subnet_file, conf.data_dir), ("/a".into(), "/b".into()));
    }

    #[test]
    fn a_bad_configuration_is_named_with_the_code_of_its_kind() {
        let (code, message) = told(load("{"));
        assert_eq!(code, 6);
        assert!(message.starts_with("error unmarshall network config: "), "{message}");
        assert_eq!(
            told(load("[]")),
            (
                6,
                "error unmarshall network config: it is a list, an object is needed".into()
            )
        );
        assert_eq!(told(load(r#"{"name": 5}"#)).0, 6);
        for text in ["null", "{}", r#"{"name": ""}"#, r#"{"name": null}"#] {
            assert_eq!(told(load(text)), (7, "missing network name".into()), "{text}");
        }
        for name in ["a/b", "../a", "a:b", " a"] {
            let error = load(&format!(r#"{{"name": "{name}"}}"#)).unwrap_err();
            assert_eq!((error.code, error.details.as_str()), (7, name));
        }
    }

    #[test]
    fn a_value_of_a_wrong_kind_is_named_and_never_shown() {
        for key in [
            "subnetFile",
            "dataDir",
            "delegate",
            "ipam",
            "runtimeConfig",
            VALID_ATTACHMENTS,
        ] {
            let (code, message) = told(load(&format!(r#"{{"name": "n", "{key}": 4711}}"#)));
            assert_eq!(code, 999);
            assert!(
                message.starts_with(&format!("failed to load netconf: {key}")),
                "{message}"
            );
        }
        let (_, message) = told(load(r#"{"name": "n", "delegate": "hunter2"}"#));
        assert_eq!(
            message,
            "failed to load netconf: delegate is a string, an object is needed"
        );
    }

    #[test]
    fn no_list_of_attachments_is_not_an_empty_one() {
        let valid = |text: &str| load(&format!(r#"{{"name": "n"{text}}}"#)).unwrap().valid;
        assert_eq!(valid(""), None);
        assert_eq!(valid(r#", "cni.dev/valid-attachments": null"#), Some(vec![]));
        let one = valid(r#", "cni.dev/valid-attachments": [{"containerID": "c", "ifname": "eth0", "more": 1}]"#);
        assert_eq!(one.unwrap()[0].container, "c");
    }

    #[test]
    fn a_command_is_followed_under_the_versions_that_have_it() {
        let check = |version: &str, command: Command| {
            let text = format!(r#"{{"name": "n", "cniVersion": {version}}}"#);
            Document::read(text.as_bytes()).unwrap().check_version(&command)
        };
        for version in ["\"\"", "null", "\"0.1.0\"", "\"0.3.1\"", "\"1.1.0\""] {
            assert_eq!(check(version, Command::Add), Ok(()), "{version}");
            assert_eq!(check(version, Command::Del), Ok(()), "{version}");
        }
        for (version, command, name) in [
            ("\"0.3.1\"", Command::Check, "CHECK"),
            ("\"\"", Command::Check, "CHECK"),
            ("\"1.0.0\"", Command::Status, "STATUS"),
            ("\"1.0.0\"", Command::Gc, "GC"),
        ] {
            let expected = (1, format!("config version does not allow {name}"));
            assert_eq!(told(check(version, command)), expected);
        }
        assert_eq!(check("\"0.4.0\"", Command::Check), Ok(()));
        assert_eq!(check("\"1.1.0\"", Command::Gc), Ok(()));
        assert_eq!(
            told(check("\"1.2.0\"", Command::Gc)),
            (1, "plugin version does not allow GC".into())
        );
        let error = check("\"9.9\"", Command::Add).unwrap_err();
        assert_eq!((error.code, error.message.as_str()), (1, "incompatible CNI versions"));
        assert_eq!(
            error.details,
            r#"config is "9.9", plugin supports ["0.1.0" "0.2.0" "0.3.0" "0.3.1" "0.4.0" "1.0.0" "1.1.0"]"#
        );
        assert_eq!(told(check("\"x\"", Command::Check)).0, 6);
        assert_eq!(told(check("\"1.1.0.0\"", Command::Check)).0, 6);
        assert_eq!(told(check("7", Command::Add)).0, 6);
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            drop(Document::read(&bytes).and_then(Conf::load));
        }

        #[test]
        fn arbitrary_values_never_panic(key in "[a-zA-Z./-]{0,30}", version in "\\PC{0,12}", value in "[0-9\\[\\]{}\":,a-z]{0,20}") {
            for value in [value.as_str(), "null", "1e999", "[[]]"] {
                let json = serde_json::json!({"name": "n", "cniVersion": version});
                let text = json.to_string().replace('}', &format!(",{key:?}:{value}}}"));
                if let Ok(document) = Document::read(text.as_bytes()) {
                    drop(document.check_version(&Command::Gc));
                    drop(Conf::load(document));
                }
            }
        }
    }
}
