//! The asking end of the control socket: blocking, for one-shot verbs.

use std::io::{self, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{PATIENCE, PROTOCOL, Question, REPLY_MAX, Reply, Request};

/// Why the daemon did not answer. Each says what to do next.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// No socket, or nobody behind it.
    #[error(
        "no daemon answers at {}: is ringmail running? See `systemctl status ringmail`, or `kubectl -n kube-system \
         logs` of this node's pod; if it runs with another folder, give it as --run-dir", .0.display()
    )]
    NoDaemon(PathBuf),
    /// The socket is not for this user.
    #[error("permission denied at {}: run as root, with sudo", .0.display())]
    Denied(PathBuf),
    /// The daemon is there and does not answer.
    #[error("the daemon at {} did not answer within {} s: see its log", path.display(), waited.as_secs())]
    Silent {
        /// The socket.
        path: PathBuf,
        /// How long was waited.
        waited: Duration,
    },
    /// Another version's daemon.
    #[error(
        "the daemon at {} is ringmail {daemon} and speaks protocol {theirs}, this command is ringmail {} and speaks \
         {PROTOCOL}: use the same version for both", path.display(), env!("CARGO_PKG_VERSION")
    )]
    Version {
        /// The socket.
        path: PathBuf,
        /// The daemon's version.
        daemon: String,
        /// Its protocol.
        theirs: u64,
    },
    /// What answers is no ringmail.
    #[error("what answers at {} is no ringmail daemon: {why}", path.display())]
    Garbage {
        /// The socket.
        path: PathBuf,
        /// What is wrong with the reply.
        why: String,
    },
    /// The daemon says no.
    #[error("{0}")]
    Refused(String),
    /// Anything else.
    #[error("ask the daemon at {}", path.display())]
    Io {
        /// The socket.
        path: PathBuf,
        /// The system's word.
        source: io::Error,
    },
}

impl AskError {
    fn from_io(path: PathBuf, source: io::Error, waited: Duration) -> Self {
        match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused | io::ErrorKind::NotADirectory => {
                Self::NoDaemon(path)
            }
            io::ErrorKind::PermissionDenied => Self::Denied(path),
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Self::Silent { path, waited },
            _ => Self::Io { path, source },
        }
    }
}

/// Asks the daemon whose folder is `run_dir` and waits for its answer; [`Request`] says what the answer is.
pub fn ask(run_dir: &Path, request: Request) -> Result<serde_json::Value, AskError> {
    // A little longer than the daemon allows itself, so that its own words come first.
    ask_within(run_dir, request, PATIENCE.answer + Duration::from_secs(5))
}

pub(super) fn ask_within(run_dir: &Path, request: Request, wait: Duration) -> Result<serde_json::Value, AskError> {
    let path = super::socket(run_dir);
    let garbage = |why: String| AskError::Garbage {
        path: path.clone(),
        why,
    };
    let line = converse(&path, request, wait).map_err(|error| AskError::from_io(path.clone(), error, wait))?;
    if line.is_empty() {
        return Err(garbage("it closed the connection without a reply".into()));
    }
    if line.len() as u64 >= REPLY_MAX {
        return Err(garbage(format!("its reply is longer than {REPLY_MAX} bytes")));
    }
    let reply: serde_json::Value = serde_json::from_slice(&line).map_err(|error| garbage(error.to_string()))?;
    // The version before all else: what another one's reply looks like is not known.
    let theirs = reply.get("protocol").and_then(serde_json::Value::as_u64);
    match theirs {
        Some(theirs) if theirs == u64::from(PROTOCOL) => {}
        Some(theirs) => {
            let daemon = reply.get("version").and_then(serde_json::Value::as_str);
            let daemon = daemon.unwrap_or("of unknown version").to_owned();
            return Err(AskError::Version { path, daemon, theirs });
        }
        None => return Err(garbage("its reply names no protocol".into())),
    }
    let reply: Reply = serde_json::from_value(reply).map_err(|error| garbage(error.to_string()))?;
    match (reply.answer, reply.error) {
        (_, Some(error)) => Err(AskError::Refused(error)),
        (Some(answer), None) => Ok(answer),
        (None, None) => Err(garbage("its reply has neither an answer nor an error".into())),
    }
}

fn converse(path: &Path, request: Request, wait: Duration) -> io::Result<Vec<u8>> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(wait))?;
    stream.set_write_timeout(Some(wait))?;
    let question = Question {
        protocol: PROTOCOL,
        ask: serde_json::to_value(request)?,
    };
    let mut line = serde_json::to_vec(&question)?;
    line.push(b'\n');
    match stream.write_all(&line) {
        // A refusal may stand there to be read already.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
        written => written?,
    }
    let mut reply = Vec::new();
    stream.take(REPLY_MAX).read_to_end(&mut reply)?;
    Ok(reply)
}
