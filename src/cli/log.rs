//! The daemon's log: text or JSON lines on standard error.

use std::ffi::OsStr;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::FmtSpan;
use tracing_subscriber::util::SubscriberInitExt as _;

use super::Failure;
use crate::config::flags::Environment;

/// What to log, as tracing-subscriber's directives: `info`, `ringmail=debug`, ...; goes before `-v`.
pub const FILTER: &str = "RINGMAIL_LOG";

/// `json` for one JSON object a line, `text` (the default) for people.
pub const FORMAT: &str = "RINGMAIL_LOG_FORMAT";

/// Whose failures are told by whoever called it, once an outage and not with each attempt.
const SILENT: &str = "kube_client";

/// Starts the log. `verbosity` is flanneld's `-v`: 0 is info, from 1 debug, from 6 trace.
pub fn start(verbosity: i32, environment: &Environment) -> Result<(), Failure> {
    let variable = |name: &str| {
        let found = environment.variables.iter().find(|(variable, _)| variable == name);
        found
            .map(|(_, value)| value.as_os_str())
            .filter(|value| !value.is_empty())
    };
    let filter = filter(variable(FILTER), verbosity)?;
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_span_events(FmtSpan::NONE)
        .with_ansi(false);
    let started = match variable(FORMAT).map(OsStr::to_string_lossy).as_deref() {
        None | Some("text") => log.with_target(false).finish().try_init(),
        Some("json") => log.json().flatten_event(true).finish().try_init(),
        Some(other) => {
            return Err(Failure::usage(anyhow::anyhow!(
                "{FORMAT} is {other:?}: text or json is needed"
            )));
        }
    };
    started.map_err(Failure::other)
}

fn filter(directives: Option<&OsStr>, verbosity: i32) -> Result<EnvFilter, Failure> {
    let Some(directives) = directives else {
        let level = match verbosity {
            ..=0 => "info",
            1..=5 => "debug",
            6.. => "trace",
        };
        return Ok(EnvFilter::new(format!("{level},{SILENT}=off")));
    };
    let directives = directives.to_string_lossy();
    EnvFilter::try_new(&directives).map_err(|error| {
        Failure::usage(anyhow::anyhow!(
            "{FILTER} is {directives:?}: {error}; `info` or `ringmail=debug,info` would be right"
        ))
    })
}
