//! The `ringmail` command: give up what is not needed, understand the arguments, then run the daemon or a verb.

use std::process::ExitCode;

use ringmail::cli::{self, Failure, Invocation, Shown, log, process};
use ringmail::config::flags::{Environment, Flags};
use ringmail::daemon::{self, StartError};
use ringmail::wiping::{self, Wiping};

#[global_allocator]
static MEMORY: Wiping = Wiping;

fn main() -> ExitCode {
    cli::finish(start())
}

fn start() -> Result<Shown, Failure> {
    process::harden()?;
    let environment = Environment::of_process();
    match Invocation::parse(std::env::args_os(), &environment)? {
        Invocation::Run(flags) => run(&flags, &environment),
        Invocation::Verb(verb) => verb.execute(&environment),
        Invocation::Text(text) => Ok(text.into()),
        Invocation::Version => {
            eprintln!("{}", env!("CARGO_PKG_VERSION"));
            Ok(Shown::from(String::new()))
        }
    }
}

/// The daemon, until it is told to stop.
fn run(flags: &Flags, environment: &Environment) -> Result<Shown, Failure> {
    process::save_memory();
    if flags.psk_secret.is_some() {
        wiping::begin();
    }
    log::start(flags.v, environment)?;
    match daemon::run(flags, environment) {
        Ok(()) => Ok(Shown::from(String::new())),
        Err(error @ StartError::Configuration(_)) => Err(Failure::config(error)),
        Err(error @ StartError::Other(_)) => Err(Failure::other(error)),
    }
}
