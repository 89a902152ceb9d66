//! The CNI plugin `ringmail-cni`, installed also as `flannel`: it makes a delegate's configuration of the network's and of
//! the node's lease, by flannel's rules, and calls the delegate (`bridge`, mostly), which attaches the container.
//!
//! ```text
//!  CNI_… ────── call ─┐
//!  stdin ────── conf ─┼─▶ delegate (pure) ─▶ state kept ─▶ plugin run ─▶ its result, or its error
//!  subnet.env ─ subnet ┘
//! ```
//! Texts and defaults are those of flannel-io/cni-plugin 1.9.1. It differs where that one loses something: a state is kept
//! for each attachment and goes only after the delegate's DEL has done well ([`state`]); without one, DEL makes the
//! delegate's configuration anew; CHECK, STATUS and GC are done and passed on; nothing of the configuration goes to
//! standard error, for it may hold secrets.
//!
//! Nothing here is asynchronous, and nothing of the daemon is used: the program is started for every pod.

pub mod call;
pub mod conf;
pub mod delegate;
pub mod error;
pub mod netns;
pub mod plugin;
pub mod state;
pub mod subnet;
pub mod verbs;

use std::ffi::OsString;
use std::io::Read;

use call::{Call, Command, VERSIONS};
use conf::{Conf, Document};
use error::Error;

/// What is to be printed.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Answer {
    /// A result, for standard output.
    Result(Vec<u8>),
    /// What the program is, for standard error: somebody called it by hand.
    About(String),
}

/// Does what the variables `CNI_…`, which `lookup` gives, and the configuration on `stdin` ask for.
///
/// # Errors
/// An [`Error`] for standard output; the process then ends with 1.
pub fn run(lookup: impl Fn(&str) -> Option<OsString>, mut stdin: impl Read) -> Result<Answer, Error> {
    let Some(call) = Call::read(lookup)? else {
        return Ok(Answer::About(format!(
            "CNI Plugin flannel (ringmail-cni) version {} (linux/{})\nCNI protocol versions supported: {}\n",
            env!("CARGO_PKG_VERSION"),
            std::env::consts::ARCH,
            VERSIONS.join(", ")
        )));
    };
    if call.command == Command::Version {
        return Ok(Answer::Result(verbs::version()));
    }
    let mut text = Vec::new();
    let read = stdin.read_to_end(&mut text);
    read.map_err(|error| Error::new(Error::IO, format!("error reading from stdin: {error}")))?;
    let document = Document::read(&text)?;
    if let Command::Unknown(name) = &call.command {
        return Err(Error::new(Error::ENVIRONMENT, format!("unknown CNI_COMMAND: {name}")));
    }
    document.check_version(&call.command)?;
    let conf = Conf::load(document);
    let conf = match call.command {
        Command::Add => conf.map_err(|error| error.within("failed to load flannel netconf file: "))?,
        _ => conf?,
    };
    let verb = match call.command {
        Command::Add => verbs::add,
        Command::Del => verbs::del,
        Command::Check => verbs::check,
        Command::Status => verbs::status,
        _ => verbs::gc,
    };
    verb(&call, &conf).map(Answer::Result)
}
