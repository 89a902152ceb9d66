//! Reading JSON as flannel reads it: keys in any case, unknown keys passed over, `null` as if absent.
//!
//! Every error carries line and column, because values are checked while the reader stands on them. Unknown keys are
//! collected with the nearest key that exists, so that a typo is seen. A value marked secret never enters an error.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// The members of one JSON object, set one by one.
pub(super) trait Members {
    /// The keys there are, as documented.
    fn keys(&self) -> &'static [&'static str];

    /// Reads the value of `key`, one of [`Members::keys`].
    fn set<'de, A: MapAccess<'de>>(&mut self, key: &'static str, map: &mut A) -> Result<(), A::Error>;

    /// Notes something odd; the object goes on.
    fn warn(&mut self, text: String);
}

/// Reads an object (or `null`) into its members; `Value` tells whether there was one.
pub(super) struct Object<'a, M> {
    /// What the object is called in messages; empty for the whole document.
    pub(super) name: &'static str,
    /// Where the values go.
    pub(super) members: &'a mut M,
}

impl<'de, M: Members> DeserializeSeed<'de> for Object<'_, M> {
    type Value = bool;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<bool, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<M> Object<'_, M> {
    fn no_object<E: Error>(self, got: &Scalar<'_>) -> Result<bool, E> {
        match got {
            Scalar::Null if !self.name.is_empty() => Ok(false),
            // The value stays out of the message: a text in the place of Backend may well be a secret.
            _ if self.name.is_empty() => Err(E::custom("an object { … } is needed")),
            _ => Err(E::custom(format_args!(
                "{} is {}: an object {{ … }} is needed",
                self.name,
                got.kind()
            ))),
        }
    }
}

impl<'de, M: Members> Visitor<'de> for Object<'_, M> {
    type Value = bool;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<bool, A::Error> {
        let keys = self.members.keys();
        let place = if self.name.is_empty() {
            String::new()
        } else {
            format!("{}.", self.name)
        };
        let mut seen = Vec::new();
        while let Some(given) = map.next_key::<String>()? {
            let Some(key) = keys.iter().copied().find(|key| key.eq_ignore_ascii_case(&given)) else {
                map.next_value::<IgnoredAny>()?;
                let hint = nearest(&given, keys)
                    .map(|key| format!("; did you mean {key}?"))
                    .unwrap_or_default();
                self.members.warn(format!(
                    "unknown key {:?} is ignored{hint}",
                    shorten(&format!("{place}{given}"))
                ));
                continue;
            };
            if seen.contains(&key) {
                self.members
                    .warn(format!("key {place}{key} is there more than once: the last one counts"));
            }
            seen.push(key);
            self.members.set(key, &mut map)?;
        }
        Ok(true)
    }

    fn visit_unit<E: Error>(self) -> Result<bool, E> {
        self.no_object(&Scalar::Null)
    }
    fn visit_bool<E: Error>(self, v: bool) -> Result<bool, E> {
        self.no_object(&Scalar::Bool(v))
    }
    fn visit_u64<E: Error>(self, v: u64) -> Result<bool, E> {
        self.no_object(&Scalar::Whole(v))
    }
    fn visit_i64<E: Error>(self, v: i64) -> Result<bool, E> {
        self.no_object(&Scalar::Number(v.to_string()))
    }
    fn visit_f64<E: Error>(self, v: f64) -> Result<bool, E> {
        self.no_object(&Scalar::Number(v.to_string()))
    }
    fn visit_str<E: Error>(self, v: &str) -> Result<bool, E> {
        self.no_object(&Scalar::Text(v))
    }
    fn visit_seq<A: SeqAccess<'de>>(self, _: A) -> Result<bool, A::Error> {
        self.no_object(&Scalar::List)
    }
}

/// A value that is no object, as it stands in the document.
#[derive(Debug)]
pub(super) enum Scalar<'a> {
    Null,
    Bool(bool),
    Whole(u64),
    /// Negative or with a fraction.
    Number(String),
    Text(&'a str),
    List,
    Object,
}

impl Scalar<'_> {
    fn kind(&self) -> &'static str {
        match self {
            Scalar::Null => "null",
            Scalar::Bool(_) => "a boolean",
            Scalar::Whole(_) | Scalar::Number(_) => "a number",
            Scalar::Text(_) => "a text",
            Scalar::List => "a list",
            Scalar::Object => "an object",
        }
    }
}

impl fmt::Display for Scalar<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Scalar::Bool(v) => write!(f, "{v}"),
            Scalar::Whole(v) => write!(f, "{v}"),
            Scalar::Number(v) => f.write_str(v),
            Scalar::Text(v) => write!(f, "{:?}", shorten(v)),
            Scalar::Null | Scalar::List | Scalar::Object => f.write_str(self.kind()),
        }
    }
}

/// Whether messages may show a value.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Show {
    Value,
    KindOnly,
}

/// Reads one value with `take`; `null` is `None`. `take` returns `Err` with what would be right.
pub(super) struct Value<F> {
    key: &'static str,
    show: Show,
    take: F,
}

/// Reads the value of `key` from `map`; see [`Value`].
pub(super) fn value<'de, A, T, W>(
    key: &'static str,
    show: Show,
    map: &mut A,
    take: impl FnOnce(Scalar<'_>) -> Result<T, W>,
) -> Result<Option<T>, A::Error>
where
    A: MapAccess<'de>,
    W: fmt::Display,
{
    map.next_value_seed(Value { key, show, take })
}

/// `true` or `false`.
pub(super) fn boolean<'de, A: MapAccess<'de>>(key: &'static str, map: &mut A) -> Result<Option<bool>, A::Error> {
    value(key, Show::Value, map, |v| match v {
        Scalar::Bool(v) => Ok(v),
        _ => Err("true or false is needed"),
    })
}

/// A whole number from 0 to `max`.
pub(super) fn whole<'de, A: MapAccess<'de>>(key: &'static str, max: u64, map: &mut A) -> Result<Option<u64>, A::Error> {
    value(key, Show::Value, map, |v| match v {
        Scalar::Whole(v) if v <= max => Ok(v),
        _ => Err(format!("a whole number from 0 to {max} is needed")),
    })
}

/// A text that `parse` understands; `want` says which.
pub(super) fn parsed<'de, A: MapAccess<'de>, T>(
    key: &'static str,
    want: &'static str,
    map: &mut A,
    parse: impl FnOnce(&str) -> Option<T>,
) -> Result<Option<T>, A::Error> {
    value(key, Show::Value, map, |v| match v {
        Scalar::Text(v) => parse(v).ok_or(want),
        _ => Err(want),
    })
}

impl<F> Value<F> {
    fn check<T, W: fmt::Display, E: Error>(self, got: Scalar<'_>) -> Result<Option<T>, E>
    where
        F: FnOnce(Scalar<'_>) -> Result<T, W>,
    {
        let shown = match (&got, self.show) {
            (Scalar::Null, _) => return Ok(None),
            (_, Show::Value) => got.to_string(),
            (_, Show::KindOnly) => got.kind().to_owned(),
        };
        match (self.take)(got) {
            Ok(value) => Ok(Some(value)),
            Err(want) => Err(E::custom(format_args!("{} is {shown}: {want}", self.key))),
        }
    }
}

impl<'de, T, W: fmt::Display, F: FnOnce(Scalar<'_>) -> Result<T, W>> DeserializeSeed<'de> for Value<F> {
    type Value = Option<T>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Option<T>, D::Error> {
        deserializer.deserialize_any(Reader {
            value: self,
            result: std::marker::PhantomData,
        })
    }
}

struct Reader<F, T, W> {
    value: Value<F>,
    result: std::marker::PhantomData<(T, W)>,
}

impl<'de, T, W: fmt::Display, F: FnOnce(Scalar<'_>) -> Result<T, W>> Visitor<'de> for Reader<F, T, W> {
    type Value = Option<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a value of {}", self.value.key)
    }
    fn visit_unit<E: Error>(self) -> Result<Self::Value, E> {
        self.value.check(Scalar::Null)
    }
    fn visit_bool<E: Error>(self, v: bool) -> Result<Self::Value, E> {
        self.value.check(Scalar::Bool(v))
    }
    fn visit_u64<E: Error>(self, v: u64) -> Result<Self::Value, E> {
        self.value.check(Scalar::Whole(v))
    }
    fn visit_i64<E: Error>(self, v: i64) -> Result<Self::Value, E> {
        self.value.check(Scalar::Number(v.to_string()))
    }
    fn visit_f64<E: Error>(self, v: f64) -> Result<Self::Value, E> {
        self.value.check(Scalar::Number(v.to_string()))
    }
    fn visit_str<E: Error>(self, v: &str) -> Result<Self::Value, E> {
        self.value.check(Scalar::Text(v))
    }
    fn visit_seq<A: SeqAccess<'de>>(self, _: A) -> Result<Self::Value, A::Error> {
        self.value.check(Scalar::List)
    }
    fn visit_map<A: MapAccess<'de>>(self, _: A) -> Result<Self::Value, A::Error> {
        self.value.check(Scalar::Object)
    }
}

/// Where in a text something is wrong, and what.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct Wrong {
    pub(super) line: usize,
    pub(super) column: usize,
    pub(super) text: String,
}

/// Reads the whole of `json` as one object.
pub(super) fn read<M: Members>(json: &str, members: &mut M) -> Result<(), Wrong> {
    let mut deserializer = serde_json::Deserializer::from_str(json);
    let object = Object { name: "", members };
    let read = object.deserialize(&mut deserializer).and_then(|_| deserializer.end());
    read.map_err(|error| {
        let (line, column) = (error.line(), error.column());
        let text = error.to_string();
        let text = text
            .strip_suffix(&format!(" at line {line} column {column}"))
            .unwrap_or(&text)
            .to_owned();
        Wrong { line, column, text }
    })
}

/// At most 64 characters of `text`.
pub(super) fn shorten(text: &str) -> String {
    match text.char_indices().nth(64) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// The one of `words` that `given` is most likely a slip of, if any is near.
pub(super) fn nearest<'a>(given: &str, words: &[&'a str]) -> Option<&'a str> {
    let given: Vec<char> = given.chars().take(64).flat_map(char::to_lowercase).collect();
    let near = |word: &'a str| (distance(&given, &word.to_lowercase().chars().collect::<Vec<_>>()), word);
    let (edits, word) = words.iter().map(|word| near(word)).min()?;
    (edits <= 1 + word.len() / 5 && edits < word.len()).then_some(word)
}

/// How many insertions, deletions and replacements lead from `a` to `b`.
fn distance(a: &[char], b: &[char]) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut corner = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let change = corner + usize::from(x != y);
            corner = row[j + 1];
            row[j + 1] = change.min(corner + 1).min(row[j] + 1);
        }
    }
    row[b.len()]
}
