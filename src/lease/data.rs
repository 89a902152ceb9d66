//! What a backend publishes with a lease.

use serde::de::DeserializeOwned;
use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// flannel's `BackendData`, any JSON.
///
/// Kept as its text, which is a third of the tree's size: a mesh holds one a lease, and looks at it once.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
#[serde(from = "Value", into = "Value")]
pub struct BackendData(Option<Box<str>>);

impl BackendData {
    /// JSON's `null`: nothing is published.
    pub const NULL: Self = Self(None);

    /// Whether nothing is published.
    pub fn is_null(&self) -> bool {
        self.0.is_none()
    }

    /// The JSON as a tree.
    pub fn value(&self) -> Value {
        let text = self.0.as_deref();
        text.map_or(Value::Null, |text| {
            serde_json::from_str(text).expect("it was written from a tree")
        })
    }

    /// The JSON as a `T`.
    ///
    /// # Errors
    /// The JSON is no `T`.
    pub fn read<T: DeserializeOwned>(&self) -> serde_json::Result<T> {
        T::deserialize(self.value())
    }
}

/// The JSON, on one line.
impl fmt::Display for BackendData {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0.as_deref().unwrap_or("null"))
    }
}

impl From<Value> for BackendData {
    fn from(value: Value) -> Self {
        Self((!value.is_null()).then(|| value.to_string().into_boxed_str()))
    }
}

impl From<BackendData> for Value {
    fn from(data: BackendData) -> Self {
        data.value()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_goes_in_comes_out_and_null_is_nothing() {
        for value in [
            json!(null),
            json!("x"),
            json!({"VNI": 1, "VtepMAC": "02:00:00:00:00:01", "n": [1.5, {}, ""]}),
        ] {
            let data = BackendData::from(value.clone());
            assert_eq!(data.value(), value);
            assert_eq!(data.is_null(), value.is_null());
            assert_eq!(data.to_string(), value.to_string());
            assert_eq!(serde_json::from_value::<BackendData>(value).unwrap(), data);
        }
        assert_eq!(BackendData::default(), BackendData::NULL);
        assert!(BackendData::from(json!("x")).read::<u8>().is_err());
    }

    #[test]
    fn the_order_of_the_keys_does_not_matter() {
        let read = |text: &str| serde_json::from_str::<BackendData>(text).unwrap();
        assert_eq!(read(r#"{"a": 1, "b": 2}"#), read(r#"{"b":2,"a":1}"#));
    }
}
