//! extension: the operator's own commands carry the traffic. Here is what each is called with; who runs them is
//! `daemon::extension`.
//!
//! flannel's keys. A command is split at white space and run without a shell; `$NAME` and `${NAME}` in a word are replaced
//! by the variables that the command is given, so that nothing a lease says is ever read as a command.

use serde_json::Value;

/// `Backend` of net-conf.json. Empty: nothing is run.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Commands {
    /// Before the lease is published. Its output is the lease's `BackendData`.
    pub pre_startup: String,
    /// Once the lease is held.
    pub post_startup: String,
    /// For each peer that comes; its `BackendData` on standard input.
    pub subnet_add: String,
    /// For each peer that goes.
    pub subnet_remove: String,
}

/// The words of `command` with `variables` filled in; empty where there is nothing to run. A name that is none of
/// `variables` becomes nothing, as in a shell.
pub fn words(command: &str, variables: &[(&str, String)]) -> Vec<String> {
    command.split_whitespace().map(|word| expand(word, variables)).collect()
}

fn expand(word: &str, variables: &[(&str, String)]) -> String {
    let mut text = String::new();
    let mut rest = word;
    while let Some(at) = rest.find('$') {
        text.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        let (name, after) = match rest.strip_prefix('{') {
            Some(braced) => match braced.split_once('}') {
                Some((name, after)) => (name, after),
                // No name: as it stands.
                None => {
                    text.push('$');
                    continue;
                }
            },
            None => {
                let end = rest
                    .find(|c: char| !c.is_ascii_alphanumeric() && c != '_')
                    .unwrap_or(rest.len());
                if end == 0 {
                    text.push('$');
                    continue;
                }
                rest.split_at(end)
            }
        };
        let value = variables
            .iter()
            .find(|(known, _)| *known == name)
            .map(|(_, value)| value.as_str());
        text.push_str(value.unwrap_or_default());
        rest = after;
    }
    text.push_str(rest);
    text
}

/// `BackendData` from what PreStartupCommand printed: a JSON text, without the last line's end.
pub fn data(output: &[u8]) -> Value {
    let text = String::from_utf8_lossy(output);
    Value::String(text.trim_end_matches(['\n', '\r']).to_owned())
}

/// What a command reads of a peer's `BackendData`.
pub fn input(data: &Value) -> String {
    match data {
        Value::Null => String::new(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}
