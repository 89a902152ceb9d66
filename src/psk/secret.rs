//! The keys in a Secret of Kubernetes, as the API server writes one: pure.
//!
//! One key an entry, the newest first by the entry's name in natural order, as in a folder; a Secret that is mounted and
//! one that is read here are the same set.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use keys::Psk;
use serde::Deserialize;
use zeroize::Zeroizing;

use super::{MAX_FILE, MAX_KEYS, PskError, PskSet, PskWarning, natural, trim};

/// Which Secret: `namespace/name`.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct SecretName {
    namespace: String,
    name: String,
}

impl SecretName {
    /// The namespace.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The name in it.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl fmt::Display for SecretName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// A text that names no Secret.
#[derive(Clone, Copy, Debug, Eq, PartialEq, thiserror::Error)]
#[error("a namespace and a name such as kube-system/ringmail-psk are needed")]
pub struct BadSecretName;

impl FromStr for SecretName {
    type Err = BadSecretName;

    fn from_str(text: &str) -> Result<Self, BadSecretName> {
        let (namespace, name) = text.split_once('/').ok_or(BadSecretName)?;
        let label = |text: &str, dots: bool| {
            let ends = |end: Option<char>| end.is_some_and(|end| end.is_ascii_alphanumeric());
            let within = |letter: char| {
                letter.is_ascii_lowercase() || letter.is_ascii_digit() || letter == '-' || dots && letter == '.'
            };
            text.chars().all(within) && ends(text.chars().next()) && ends(text.chars().next_back())
        };
        // RFC 1123, as the API server has it.
        let good = namespace.len() <= 63 && label(namespace, false) && name.len() <= 253 && label(name, true);
        good.then(|| Self {
            namespace: namespace.into(),
            name: name.into(),
        })
        .ok_or(BadSecretName)
    }
}

/// Why a Secret gives no keys. Never holds a byte of a key.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum SecretError {
    /// Nothing there.
    #[error("does not exist: `ringmail keygen` makes a key, `kubectl create secret generic` a Secret of it")]
    Missing,
    /// The API server does not show it.
    #[error("is not shown: {0}: this account needs list and watch on this Secret")]
    Refused(String),
    /// The API server could not be asked.
    #[error("can't be read now: {0}")]
    Away(String),
    /// What came is not what the API server writes.
    #[error("can't be understood, at line {0}, column {1} of the API server's answer")]
    Garbage(usize, usize),
    /// Larger than any Secret.
    #[error("has an answer of more than {0} bytes: no Secret is as large")]
    Huge(usize),
    /// No entry.
    #[error("holds no key: put one in it that `ringmail keygen` made")]
    Empty,
    /// An entry of no or only white bytes.
    #[error("has nothing in its entry {0:?}: `ringmail keygen` makes a key")]
    EmptyKey(String),
    /// An entry that is larger than [`MAX_FILE`].
    #[error("has more than {MAX_FILE} bytes in its entry {0:?}: this is hardly a key")]
    TooLarge(String),
    /// The bytes are no key.
    #[error("has no key in its entry {entry:?}: {why}")]
    NoKey {
        /// The entry's name.
        entry: String,
        /// Why not.
        why: keys::PskError,
    },
    /// More than [`MAX_KEYS`] keys.
    #[error("holds {0} keys; at most {MAX_KEYS} can be in use: remove the oldest")]
    TooMany(usize),
}

/// The list of the one Secret that was asked for. Values are borrowed from the answer, so that no copy of them is made.
#[derive(Deserialize)]
struct Answer<'a> {
    #[serde(default)]
    metadata: Metadata,
    #[serde(default, borrow)]
    items: Option<Vec<Item<'a>>>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Metadata {
    #[serde(default)]
    resource_version: String,
}

#[derive(Deserialize)]
struct Item<'a> {
    #[serde(default, borrow)]
    data: Option<BTreeMap<Cow<'a, str>, &'a str>>,
}

/// Reads `answer`, the API server's list of the Secret `secret` alone, for the network of this name. Returns the list's
/// version and the keys.
pub(crate) fn read(answer: &[u8], secret: &SecretName, network: &str) -> (String, Result<PskSet, PskError>) {
    let wrong = |why| PskError::Secret {
        secret: secret.clone(),
        why,
    };
    let Answer { metadata, items } = match serde_json::from_slice(answer) {
        Ok(answer) => answer,
        // Its text may quote what it found.
        Err(error) => {
            let why = SecretError::Garbage(error.line(), error.column());
            return (String::new(), Err(wrong(why)));
        }
    };
    let set = match items.unwrap_or_default().into_iter().next() {
        Some(item) => keys(&item.data.unwrap_or_default(), secret, network),
        None => Err(SecretError::Missing),
    };
    (metadata.resource_version, set.map_err(wrong))
}

fn keys(data: &BTreeMap<Cow<'_, str>, &str>, secret: &SecretName, network: &str) -> Result<PskSet, SecretError> {
    // Where it is mounted these would be hidden files.
    let mut entries: Vec<_> = data.iter().filter(|(entry, _)| !entry.starts_with('.')).collect();
    entries.sort_unstable_by(|(a, _), (b, _)| natural(b.as_bytes(), a.as_bytes()));
    let mut set = PskSet {
        psks: Vec::new(),
        warnings: Vec::new(),
    };
    for (entry, text) in entries {
        let psk = key(entry, text, network)?;
        if set.kids().contains(&psk.kid()) {
            set.warnings.push(PskWarning::TwiceIn {
                secret: secret.clone(),
                entry: entry.clone().into_owned(),
                kid: psk.kid(),
            });
        } else {
            set.psks.push(Arc::new(psk));
        }
    }
    match set.psks.len() {
        0 => Err(SecretError::Empty),
        count if count > MAX_KEYS => Err(SecretError::TooMany(count)),
        _ => Ok(set),
    }
}

fn key(entry: &str, text: &str, network: &str) -> Result<Psk, SecretError> {
    if text.len() > MAX_FILE.div_ceil(3) * 4 {
        return Err(SecretError::TooLarge(entry.to_owned()));
    }
    let mut buffer = Zeroizing::new(vec![0_u8; MAX_FILE + 3]);
    // The server has made it base64 itself; how this fails would quote a letter of it.
    let length = BASE64
        .decode_slice(text, &mut buffer)
        .map_err(|_| SecretError::Garbage(0, 0))?;
    let bytes = trim(&buffer[..length]);
    if bytes.is_empty() {
        return Err(SecretError::EmptyKey(entry.to_owned()));
    }
    Psk::new(bytes, network).map_err(|why| SecretError::NoKey {
        entry: entry.to_owned(),
        why,
    })
}

#[cfg(test)]
mod tests {
    use keys::Kid;
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    const NET: &str = "10.244.0.0/16";

    fn text(n: u8) -> String {
        format!("{n:02}-0123456789abcdef0123456789abcdef")
    }

    fn kid(bytes: &[u8]) -> Kid {
        Psk::new(bytes, NET).unwrap().kid()
    }

    fn name() -> SecretName {
        "kube-system/psk".parse().unwrap()
    }

    fn answer(entries: &[(&str, &[u8])]) -> Vec<u8> {
        let data: BTreeMap<_, _> = entries
            .iter()
            .map(|(entry, bytes)| (*entry, BASE64.encode(bytes)))
            .collect();
        let item = json!({"metadata": {"resourceVersion": "7", "annotations": {"a\"b": "c\"d"}}, "data": data});
        list(&[item])
    }

    fn list(items: &[Value]) -> Vec<u8> {
        let list = json!({"kind": "SecretList", "metadata": {"resourceVersion": "1234"}, "items": items});
        serde_json::to_vec(&list).unwrap()
    }

    fn error(answer: &[u8]) -> String {
        read(answer, &name(), NET).1.unwrap_err().to_string()
    }

    #[test]
    fn every_entry_is_a_key_and_the_newest_by_name_is_first() {
        let texts: Vec<String> = (0..4).map(|n| text(n) + "\n").collect();
        let binary = [0xff_u8; 32];
        let body = answer(&[
            ("key-9", texts[0].as_bytes()),
            ("key-10", texts[1].as_bytes()),
            ("a", texts[2].as_bytes()),
            (".hidden", b"x"),
            ("b", &binary),
            ("key-8", texts[1].as_bytes()),
        ]);
        let (version, set) = read(&body, &name(), NET);
        let set = set.unwrap();
        assert_eq!(version, "1234", "the list's version, not the Secret's");
        let expected = [
            kid(text(1).as_bytes()),
            kid(text(0).as_bytes()),
            kid(&binary),
            kid(text(2).as_bytes()),
        ];
        assert_eq!(set.kids(), expected);
        let twice = format!(
            "entry \"key-8\" of Secret kube-system/psk holds the same key as a newer one (kid {})",
            expected[0]
        );
        assert_eq!(
            set.warnings.iter().map(ToString::to_string).collect::<Vec<_>>(),
            [twice]
        );
    }

    #[test]
    fn what_is_wrong_is_named_without_a_byte_of_it() {
        for (entries, wanted) in [
            (vec![], "holds no key"),
            (vec![("a", &b" \n"[..])], "has nothing in its entry \"a\""),
            (
                vec![("a", b"hunter2-hunter2")],
                "has no key in its entry \"a\": PSK is 15 bytes",
            ),
            (
                vec![("a", &[b'h'; MAX_FILE + 4])],
                "has more than 65536 bytes in its entry \"a\"",
            ),
        ] {
            let said = error(&answer(&entries));
            assert!(
                said.starts_with("PSK Secret kube-system/psk ") && said.contains(wanted),
                "{said}"
            );
            assert!(!said.contains("hunter"));
        }
        assert!(error(&list(&[])).contains("does not exist"));
        let many: Vec<_> = (0..=MAX_KEYS)
            .map(|n| (format!("k{n}"), text(u8::try_from(n).unwrap())))
            .collect();
        let many: Vec<_> = many
            .iter()
            .map(|(entry, text)| (entry.as_str(), text.as_bytes()))
            .collect();
        assert!(error(&answer(&many)).contains("holds 65 keys"));
        // What serde and base64 would say quotes what they found.
        for garbage in [
            json!({"data": {"a": "hunter!"}}),
            json!({"data": {"a": "hunter\n"}}),
            json!({"data": {"a": ["hunter"]}}),
            json!({"data": "hunter"}),
        ] {
            let said = error(&list(&[garbage]));
            assert!(
                said.contains("can't be understood, at line") && !said.contains("hunter"),
                "{said}"
            );
        }
        assert!(error(b"hunter").contains("line 1"));
    }

    #[test]
    fn a_secret_is_named_by_namespace_and_name() {
        assert_eq!(name().to_string(), "kube-system/psk");
        let long = "a".repeat(64);
        for wrong in [
            "psk",
            "/psk",
            "kube-system/",
            "a/b/c",
            "A/b",
            "a/B",
            "a.b/c",
            "a/-b",
            "a/b.",
            "a/..",
            &format!("{long}/b"),
        ] {
            assert_eq!(wrong.parse::<SecretName>(), Err(BadSecretName), "{wrong}");
        }
        assert!("a-1/b.c-2".parse::<SecretName>().is_ok());
    }

    proptest! {
        #[test]
        fn no_answer_is_a_panic(body in proptest::collection::vec(any::<u8>(), 0..200), cut in 0..400_usize) {
            drop(read(&body, &name(), NET));
            let whole = answer(&[("a", text(1).as_bytes()), ("b", text(2).as_bytes())]);
            let (_, set) = read(&whole[..cut.min(whole.len())], &name(), NET);
            prop_assert!(set.is_err() || cut >= whole.len());
        }
    }
}
