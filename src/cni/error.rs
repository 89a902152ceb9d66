//! What goes wrong, as CNI wants it said: a code, a message, details.

use std::io;
use std::path::Path;

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

/// An error result (CNI 1.1.0, section 5, "Error"). A delegate's is passed on as it is.
#[derive(Clone, Debug, Default, Deserialize, Eq, PartialEq, Serialize)]
pub struct Error {
    /// One of the constants of this type, or what a delegate said.
    #[serde(default)]
    pub code: u32,
    /// What went wrong.
    #[serde(default, rename = "msg")]
    pub message: String,
    /// More of it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub details: String,
}

impl Error {
    /// The configuration's version is not served, or has not got the command.
    pub const VERSION: u32 = 1;
    /// A `CNI_…` variable is missing or wrong.
    pub const ENVIRONMENT: u32 = 4;
    /// Reading or writing failed.
    pub const IO: u32 = 5;
    /// The configuration is not JSON, or a key of it is not what it should be.
    pub const DECODING: u32 = 6;
    /// The configuration is well formed and can't be followed.
    pub const CONFIGURATION: u32 = 7;
    /// CNI_NETNS is not a container's.
    pub const NETNS: u32 = 8;
    /// STATUS: an ADD would fail now.
    pub const UNAVAILABLE: u32 = 50;
    /// All else, as in flannel's plugin.
    pub const INTERNAL: u32 = 999;

    /// An error without details.
    pub fn new(code: u32, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            details: String::new(),
        }
    }

    /// An error of code [`Error::INTERNAL`].
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(Self::INTERNAL, message)
    }

    /// The same with details.
    #[must_use]
    pub fn with(mut self, details: impl Into<String>) -> Self {
        self.details = details.into();
        self
    }

    /// The same with `prefix` before its message.
    #[must_use]
    pub fn within(mut self, prefix: &str) -> Self {
        self.message.insert_str(0, prefix);
        self
    }

    /// For standard output: indented by four, without a newline, as plugins in Go print it.
    pub fn json(&self) -> Vec<u8> {
        let mut text = Vec::new();
        let indent = serde_json::ser::PrettyFormatter::with_indent(b"    ");
        let mut serializer = serde_json::Serializer::with_formatter(&mut text, indent);
        // Three fields of text and number into memory: nothing in it can fail.
        drop(self.serialize(&mut serializer));
        text
    }
}

/// A failed call of the system in Go's words, which flannel's users search for: `open /a/b: no such file or directory`.
pub(super) fn system(call: &str, path: &Path, error: &io::Error) -> String {
    let why = match error.raw_os_error() {
        Some(number) => {
            let text = Errno::from_raw(number).desc();
            let mut letters = text.chars();
            letters
                .next()
                .map(|first| first.to_ascii_lowercase().to_string() + letters.as_str())
                .unwrap_or_default()
        }
        None => error.to_string(),
    };
    format!("{call} {}: {why}", path.display())
}
