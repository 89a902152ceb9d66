//! Command lines as Go's `flag` package reads them: `-x` is `--x`, `--x value` is `--x=value`, switches take `=value`.
//!
//! [`normalise`] brings every flag into the one form `--x=value`, in which nothing is ambiguous; variables are added in
//! the same form, and clap reads values.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};

use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{CommandFactory as _, Parser as _};

use super::flags::{Environment, Flags, Wanted, origin, variable};
use super::json::{nearest, shorten};

/// A command line or environment that can't be followed.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum UsageError {
    /// No such flag.
    #[error("flag {flag} is unknown{hint}; `ringmail run --help` lists all flags")]
    Unknown {
        /// The flag as given, without its value.
        flag: String,
        /// A flag that was perhaps meant.
        hint: String,
    },
    /// A word that belongs to no flag.
    #[error("argument {0:?} belongs to no flag; `ringmail run --help` lists all flags")]
    Stray(String),
    /// A flag at the end that needs a value.
    #[error("flag --{flag} needs a value: --{flag}={name}")]
    NoValue {
        /// The flag's name.
        flag: String,
        /// What the value is called.
        name: String,
    },
    /// A value that the flag can't have.
    #[error("{origin} is {value:?}: {want}")]
    Value {
        /// The flag, and the variable where it came from one.
        origin: String,
        /// The value.
        value: String,
        /// What would be right.
        want: String,
    },
    /// Neither flag nor variable nor host name says who this node is.
    #[error("this host has no name: give --node-name NAME or the variable NODE_NAME")]
    NoNodeName,
    /// The flags for the store do not go together, or can't be.
    #[error("{0}")]
    Store(String),
    /// What clap found beside.
    #[error("{0}")]
    Other(String),
}

impl UsageError {
    /// The exit code for a command line that can't be followed: EX_USAGE of sysexits.h.
    pub const EXIT_CODE: u8 = 64;
}

/// Where a value came from.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Source {
    Flag,
    Variable,
    Hostname,
}

/// Whether a flag has a value.
#[derive(Clone, Debug, Eq, PartialEq)]
enum Shape {
    Switch,
    /// What the value is called in the help.
    Takes(String),
}

fn shapes() -> BTreeMap<String, Shape> {
    let command = Flags::command();
    let shape = |arg: &clap::Arg| match arg.get_num_args() {
        Some(range) if range.min_values() == 0 => Shape::Switch,
        _ => Shape::Takes(
            arg.get_value_names()
                .and_then(|names| names.first())
                .map_or_else(|| "VALUE".to_owned(), ToString::to_string),
        ),
    };
    let named = command
        .get_arguments()
        .filter_map(|arg| Some((arg.get_long()?.to_owned(), shape(arg))));
    let help = [("help".to_owned(), Shape::Switch)];
    named.chain(help).collect()
}

/// Brings arguments into the form `--name=value`, or `--name` for a switch, a flag that is unknown, or one at the end
/// without a value. An empty value is dropped, which leaves variable and default. What follows `--` stays as it is.
pub fn normalise(arguments: Vec<OsString>) -> Vec<OsString> {
    let shapes = shapes();
    let mut rest = arguments.into_iter();
    let mut result = Vec::new();
    while let Some(argument) = rest.next() {
        let Some((name, value)) = split(&argument) else {
            let end = argument == "--";
            result.push(argument);
            if end {
                break;
            }
            continue;
        };
        let name = if name == OsStr::new("h") {
            OsStr::new("help")
        } else {
            name
        };
        let takes = name
            .to_str()
            .is_some_and(|name| matches!(shapes.get(name), Some(Shape::Takes(_))));
        let value = match value {
            None if takes => rest.next(),
            given => given.map(OsStr::to_owned),
        };
        match value {
            Some(empty) if takes && empty.is_empty() => {}
            Some(value) => result.push(join(name, &value)),
            None => result.push([OsStr::new("--"), name].into_iter().collect()),
        }
    }
    result.extend(rest);
    result
}

/// A flag's name without dashes, and its value after `=`. `None` for what is no flag.
fn split(argument: &OsStr) -> Option<(&OsStr, Option<&OsStr>)> {
    let bytes = argument.as_bytes();
    let flag = bytes
        .strip_prefix(b"--")
        .or_else(|| bytes.strip_prefix(b"-"))
        .filter(|name| !name.is_empty())?;
    let mut parts = flag.splitn(2, |&b| b == b'=').map(OsStr::from_bytes);
    Some((parts.next()?, parts.next()))
}

fn join(name: &OsStr, value: &OsStr) -> OsString {
    OsString::from_vec([b"--", name.as_bytes(), b"=", value.as_bytes()].concat())
}

pub(super) fn parse(arguments: Vec<OsString>, environment: &Environment) -> Result<Wanted, UsageError> {
    let shapes = shapes();
    let mut arguments = normalise(arguments);
    let given = check(&arguments, &shapes)?;
    let asks_help = given.contains(&"help".to_owned());
    let mut sources = BTreeMap::new();
    let lookup = |variable: &str| {
        let found = environment.variables.iter().rev().find(|(name, _)| name == variable);
        found.map(|(_, value)| value).filter(|value| !value.is_empty())
    };
    for flag in shapes.keys().filter(|flag| !given.contains(flag)) {
        let from_variable = variable(flag)
            .and_then(|variable| lookup(&variable))
            .map(|v| (v, Source::Variable));
        let from_host = environment
            .hostname
            .as_ref()
            .filter(|_| flag == "node-name")
            .map(|v| (v, Source::Hostname));
        if let Some((value, source)) = from_variable.or(from_host) {
            sources.insert(flag.clone(), source);
            arguments.push(join(OsStr::new(flag), value));
        }
    }
    if asks_help {
        return Ok(Wanted::Help(help()));
    }
    match Flags::try_parse_from(std::iter::once(OsString::from("ringmail run")).chain(arguments)) {
        Ok(flags) if flags.version => Ok(Wanted::Version),
        Ok(mut flags) => {
            // What names the node goes before the Pod, which the API server has to be asked about.
            if sources.get("node-name") == Some(&Source::Hostname) {
                let text = |variable| lookup(variable).and_then(|value| value.to_str()).map(str::to_owned);
                flags.pod = text("POD_NAMESPACE").zip(text("POD_NAME"));
            }
            Ok(Wanted::Run(Box::new(flags)))
        }
        // Without a host name, asking for the version still works.
        Err(error) if error.kind() == ErrorKind::MissingRequiredArgument && given.contains(&"version".to_owned()) => {
            Ok(Wanted::Version)
        }
        Err(error) => Err(understood(&error, &sources)),
    }
}

/// The names of the flags that are there.
fn check(arguments: &[OsString], shapes: &BTreeMap<String, Shape>) -> Result<Vec<String>, UsageError> {
    let mut given = Vec::new();
    for argument in arguments {
        let text = argument.to_string_lossy();
        let Some((name, value)) = split(argument).filter(|_| argument != "--") else {
            return Err(UsageError::Stray(shorten(&text)));
        };
        let name = name.to_string_lossy().into_owned();
        match (shapes.get(&name), value) {
            (None, _) => {
                let names: Vec<&str> = shapes.keys().map(String::as_str).collect();
                let hint = nearest(&name, &names)
                    .map(|near| format!("; did you mean --{near}?"))
                    .unwrap_or_default();
                return Err(UsageError::Unknown {
                    flag: format!("--{}", shorten(&name)),
                    hint,
                });
            }
            (Some(Shape::Takes(value)), None) => {
                return Err(UsageError::NoValue {
                    flag: name,
                    name: value.clone(),
                });
            }
            (Some(_), _) => given.push(name),
        }
    }
    Ok(given)
}

fn understood(error: &clap::Error, sources: &BTreeMap<String, Source>) -> UsageError {
    let context = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.clone()),
        _ => None,
    };
    // clap calls the flag "--name <VALUE>" or "--name[=<VALUE>]".
    let flag = context(ContextKind::InvalidArg).map(|arg| {
        let name = arg.trim_start_matches('-');
        name[..name.find([' ', '[', '=', '<']).unwrap_or(name.len())].to_owned()
    });
    match (error.kind(), flag) {
        (ErrorKind::ValueValidation | ErrorKind::InvalidValue, Some(flag)) => {
            let source = sources.get(&flag).copied().unwrap_or(Source::Flag);
            let want = std::error::Error::source(error)
                .map_or_else(|| "another value is needed".to_owned(), ToString::to_string);
            let value = shorten(&context(ContextKind::InvalidValue).unwrap_or_default());
            UsageError::Value {
                origin: origin(&flag, source),
                value,
                want,
            }
        }
        (ErrorKind::MissingRequiredArgument, _) => UsageError::NoNodeName,
        (ErrorKind::InvalidUtf8, _) => UsageError::Other("a flag or FLANNELD_* variable is not UTF-8 text".into()),
        _ => {
            let text = error.to_string();
            UsageError::Other(
                text.lines()
                    .next()
                    .unwrap_or_default()
                    .trim_start_matches("error: ")
                    .to_owned(),
            )
        }
    }
}

/// The help, with each flag's variable.
fn help() -> String {
    let with_variable = |arg: clap::Arg| match (
        arg.get_help().map(ToString::to_string),
        arg.get_long().and_then(variable),
    ) {
        (Some(help), Some(variable)) => arg.help(format!("{} [{variable}]", help.trim_end_matches('.'))),
        _ => arg,
    };
    Flags::command().mut_args(with_variable).render_help().to_string()
}

/// A text for each `FLANNELD_*` variable that names no flag but is near one that does.
pub fn odd_variables(environment: &Environment) -> Vec<String> {
    let known: Vec<String> = shapes().keys().filter_map(|flag| variable(flag)).collect();
    let known: Vec<&str> = known.iter().map(String::as_str).collect();
    let names = environment.variables.iter().filter_map(|(name, _)| name.to_str());
    let odd = names.filter(|name| name.starts_with("FLANNELD_") && !known.contains(name));
    odd.filter_map(|name| {
        Some(format!(
            "variable {name} is ignored; did you mean {}?",
            nearest(name, &known)?
        ))
    })
    .collect()
}
