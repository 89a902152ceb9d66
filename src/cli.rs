//! The command line: what was asked for, and a file for each verb that answers it.
//!
//! [`Invocation::parse`] turns arguments into one of three things: run the daemon, run a verb, or print a text. A verb
//! gives [`Shown`], its text and exit code, or a [`Failure`], so that nothing here prints or exits but [`finish`].
//!
//! Exit codes: 0 clean, 64 usage, 78 configuration, 69 store unreachable at a one-shot verb, 1 the rest.

mod audit;
mod cleanup;
mod config;
mod doctor;
mod etcd;
mod install;
mod interval;
mod keygen;
mod leases;
pub mod log;
pub mod process;
mod rotate;
mod status;
mod table;
#[cfg(test)]
mod tests;
mod top;

use std::ffi::{OsStr, OsString};
use std::io::{IsTerminal as _, Write as _};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{Args, CommandFactory as _, Parser, Subcommand};

use crate::config::flags::{Environment, Flags, Wanted};
use table::Style;

/// An encrypted overlay network for containers: flannel's job, done with the kernel's IPsec.
#[derive(Debug, Parser)]
#[command(
    name = "ringmail",
    version,
    disable_help_subcommand = true,
    subcommand_required = true,
    arg_required_else_help = true,
    after_help = "\
Flanneld's flags without a verb mean `run`, so that flannel's manifests work with the image changed alone.

Examples:
  ringmail keygen --out /etc/ringmail/psk           a new key, to be given to every node
  ringmail run --lease-dir /var/lib/ringmail --psk-file /etc/ringmail/psk
  ringmail status                                   every peer, and why one is not up
  ringmail top                                      the same, live: who sends how much, how fast, how well
  ringmail audit                                    is everything encrypted?
  ringmail doctor                                   what is wrong, and what to do?

Exit codes: 0 clean, 64 usage, 78 configuration, 69 store unreachable, 1 the rest."
)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
}

/// What can be asked for, beside `run`.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Run the daemon: `ringmail run --help` lists its flags.
    Run(Everything),
    /// Show how this node and each of its peers stand.
    Status(status::Arguments),
    /// Watch the peers in the terminal: rates, round trips, loss, errors.
    Top(top::Arguments),
    /// Compare the kernel with the plan, explain every SA, look for ways that plaintext could go.
    Audit(audit::Arguments),
    /// Look for what is wrong with this node and its mesh, worst first, with the command to run.
    Doctor(doctor::Arguments),
    /// List all leases and what this node makes of them.
    Leases(leases::Arguments),
    /// Begin a new epoch, so new keys, now.
    Rotate(rotate::Arguments),
    /// Make a pre-shared key.
    Keygen(keygen::Arguments),
    /// Remove all that ringmail made on this node, and nothing else.
    Cleanup(cleanup::Arguments),
    /// Put a file where the container runtime looks for it.
    Install(install::Arguments),
    /// Look at the configuration.
    #[command(subcommand_required = true, arg_required_else_help = true)]
    Config {
        /// What about it.
        #[command(subcommand)]
        verb: ConfigVerb,
    },
}

/// What can be asked of the configuration.
#[derive(Debug, Subcommand)]
pub enum ConfigVerb {
    /// Check net-conf.json and the flags, and show what they come to.
    Check(config::Arguments),
}

/// The daemon's flags: taken here unread, since they are read as flanneld reads them.
#[derive(Debug, Args)]
#[command(disable_help_flag = true)]
pub struct Everything {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, num_args = 0..)]
    flags: Vec<OsString>,
}

/// What verbs that talk to the daemon, or print, have in common.
#[derive(Clone, Debug, Args)]
pub struct Common {
    /// The daemon's folder.
    #[arg(long, value_name = "DIR", default_value = crate::admin::RUN_DIR)]
    run_dir: PathBuf,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

/// What a command line comes to.
#[derive(Debug)]
pub enum Invocation {
    /// Run the daemon.
    Run(Box<Flags>),
    /// Run a verb.
    Verb(Box<Verb>),
    /// Print a help or version text on standard output.
    Text(String),
    /// Print the version on standard error, as flanneld does.
    Version,
}

impl Invocation {
    /// Understands the arguments of this process, the program's name first, completed from `environment`.
    pub fn parse(arguments: impl IntoIterator<Item = OsString>, environment: &Environment) -> Result<Self, Failure> {
        let mut arguments: Vec<OsString> = arguments.into_iter().collect();
        if let Some(meant) = install::under_flannels_name(&arguments) {
            arguments = meant;
        }
        if let Some(flags) = daemon_flags(&arguments) {
            let wanted = Flags::from_args(flags.iter().cloned(), environment).map_err(Failure::usage)?;
            return Ok(match wanted {
                Wanted::Run(flags) => Self::Run(flags),
                Wanted::Help(text) => Self::Text(text),
                Wanted::Version => Self::Version,
            });
        }
        match Cli::try_parse_from(&arguments) {
            Ok(Cli { verb }) => Ok(Self::Verb(Box::new(verb))),
            Err(error) => match error.kind() {
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => Ok(Self::Text(error.to_string())),
                ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
                    let help = error.to_string();
                    Err(Failure::usage(anyhow::anyhow!(
                        "no verb is given\n\n{}",
                        help.trim_end()
                    )))
                }
                _ => {
                    let text = error.to_string();
                    let text = text.strip_prefix("error: ").unwrap_or(&text).trim_end().to_owned();
                    Err(Failure::usage(anyhow::Error::msg(text)))
                }
            },
        }
    }
}

/// The daemon's flags, where the arguments ask for the daemon: after `run`, under flanneld's name, or a flag of the
/// daemon's with no verb before it.
fn daemon_flags(arguments: &[OsString]) -> Option<&[OsString]> {
    let (program, rest) = arguments.split_first()?;
    if rest.first().is_some_and(|first| first == "run") {
        return Some(&rest[1..]);
    }
    let name = std::path::Path::new(program).file_name();
    let verbs: Vec<String> = Cli::command()
        .get_subcommands()
        .map(|verb| verb.get_name().to_owned())
        .collect();
    let is_verb = |word: &OsStr| verbs.iter().any(|verb| word == verb.as_str());
    if name == Some(OsStr::new("flanneld")) && !rest.first().is_some_and(|first| is_verb(first)) {
        return Some(rest);
    }
    let own = ["-h", "--help", "-V", "--version"];
    let first = rest.first()?.to_str()?;
    (first.starts_with('-') && !own.contains(&first)).then_some(rest)
}

impl Verb {
    /// Does what was asked, in this environment.
    pub fn execute(self, environment: &Environment) -> Result<Shown, Failure> {
        let style = Style::of_stdout();
        match self {
            Self::Run(Everything { flags }) => Err(Failure::usage(anyhow::anyhow!(
                "run comes first: `ringmail run {}`",
                flags.join(OsStr::new(" ")).display()
            ))),
            Self::Status(arguments) => status::run(&arguments, &style),
            Self::Top(arguments) => top::run(&arguments, style),
            Self::Audit(arguments) => audit::run(&arguments, &style),
            Self::Doctor(arguments) => doctor::run(&arguments, &style, environment),
            Self::Leases(arguments) => leases::run(&arguments, &style),
            Self::Rotate(arguments) => rotate::run(&arguments),
            Self::Keygen(arguments) => keygen::run(&arguments),
            Self::Cleanup(arguments) => cleanup::run(&arguments),
            Self::Install(arguments) => install::run(&arguments),
            Self::Config {
                verb: ConfigVerb::Check(arguments),
            } => config::run(&arguments),
        }
    }
}

/// What a verb shows, and how it ends.
#[derive(Debug)]
pub struct Shown {
    /// For standard output; wiped after it, since it may be a key.
    text: zeroize::Zeroizing<String>,
    code: u8,
}

impl Shown {
    /// A text, and exit code 0 or 1 for whether all is `well`.
    fn text(text: String, well: bool) -> Self {
        Self {
            text: zeroize::Zeroizing::new(text),
            code: u8::from(!well),
        }
    }

    /// A value as JSON, indented, and the same exit code.
    fn json(value: &impl serde::Serialize, well: bool) -> Self {
        let mut text = serde_json::to_string_pretty(value).expect("what is shown has string keys");
        text.push('\n');
        Self::text(text, well)
    }
}

/// An error on its way to the user, and the exit code for it.
#[derive(Debug, thiserror::Error)]
#[error("{error:#}")]
pub struct Failure {
    /// The process's exit code.
    pub code: u8,
    /// What went wrong, with its causes.
    pub error: anyhow::Error,
}

impl Failure {
    /// The command line is wrong: 64 (EX_USAGE of sysexits.h).
    pub fn usage(error: impl Into<anyhow::Error>) -> Self {
        Self {
            code: 64,
            error: error.into(),
        }
    }

    /// The configuration is wrong: 78 (EX_CONFIG).
    pub fn config(error: impl Into<anyhow::Error>) -> Self {
        Self {
            code: 78,
            error: error.into(),
        }
    }

    /// The store can't be reached by a one-shot verb: 69 (EX_UNAVAILABLE).
    pub fn store(error: impl Into<anyhow::Error>) -> Self {
        Self {
            code: 69,
            error: error.into(),
        }
    }

    /// All else: 1.
    pub fn other(error: impl Into<anyhow::Error>) -> Self {
        Self {
            code: 1,
            error: error.into(),
        }
    }
}

/// Prints what came of it, and gives the exit code. Errors go to standard error, with their causes.
pub fn finish(outcome: Result<Shown, Failure>) -> ExitCode {
    match outcome {
        Ok(Shown { text, code }) => {
            let mut stdout = std::io::stdout().lock();
            // A reader that has seen enough, as `head` has, is no failure.
            match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
                Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
                    eprintln!("ringmail: write to standard output: {error}");
                    ExitCode::FAILURE
                }
                _ => code.into(),
            }
        }
        Err(failure) => {
            eprintln!("ringmail: {}", table::clean(&failure.to_string(), true));
            failure.code.into()
        }
    }
}

/// Runs a future that waits for files, on a runtime of its own.
fn blocking<T>(work: impl Future<Output = T>) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    Ok(runtime.map_err(Failure::other)?.block_on(work))
}

impl From<String> for Shown {
    /// A text, all well.
    fn from(text: String) -> Self {
        Self::text(text, true)
    }
}

impl Style {
    fn of_stdout() -> Self {
        let colour = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|set| set.is_empty());
        Self { colour }
    }
}
