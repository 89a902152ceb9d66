//! One daemon a node: two would take each other's SAs and policies for strangers' and sweep them.
//!
//! Two claims, because each has a hole: an abstract unix socket is one a network namespace, whatever folder a daemon
//! runs in; a lock on the pid file is one a folder, whatever namespace. Both go with the process, however it ends.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};

use super::listen::make_folder;

/// The abstract socket's name.
const NAME: &[u8] = b"ringmail";

/// The pid file's name in the run folder.
pub const PID_FILE: &str = "ringmail.pid";

/// How long an earlier daemon may take to be gone. A child that it has just forked holds its claims until it executes
/// its program, however dead the daemon is.
const PATIENCE: Duration = Duration::from_secs(1);

/// How often it is looked at.
const BETWEEN: Duration = Duration::from_millis(20);

/// Why this process may not be the node's daemon.
#[derive(Debug, thiserror::Error)]
pub enum SingleError {
    /// There is one already.
    #[error(
        "another ringmail daemon serves this node ({other}): stop it first; one daemon serves all of a node's pods"
    )]
    Taken {
        /// Who it is, as far as can be told.
        other: Other,
    },
    /// A claim can't be made.
    #[error("{doing}: give a --run-dir that can be written")]
    Io {
        /// What was tried, with the path.
        doing: String,
        /// The system's word.
        source: io::Error,
    },
}

/// The daemon that was there first.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub struct Other {
    /// Its pid; `None` where it can't be seen from here, in another container.
    pub pid: Option<i32>,
    /// Its folder.
    pub run_dir: Option<PathBuf>,
}

impl std::fmt::Display for Other {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.pid {
            Some(pid) => write!(f, "pid {pid}")?,
            None => f.write_str("pid not visible from here: in another container?")?,
        }
        match &self.run_dir {
            Some(run_dir) => write!(f, ", --run-dir {}", run_dir.display()),
            None => Ok(()),
        }
    }
}

/// The claim to be this node's daemon; it ends when dropped, or with the process.
#[derive(Debug)]
pub struct Single {
    /// Never accepted from: its name is the claim, and its credentials tell who holds it.
    _name: UnixListener,
    pid_file: Flock<File>,
    path: PathBuf,
}

impl Single {
    /// Claims the network namespace and `run_dir`, which is made, mode 0755, where it is missing, and writes the pid
    /// file. Waits a second for another daemon that is on its way out.
    pub fn claim(run_dir: &Path) -> Result<Self, SingleError> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match Self::claim_now(run_dir) {
                Err(SingleError::Taken { .. }) if Instant::now() < deadline => thread::sleep(BETWEEN),
                claimed => return claimed,
            }
        }
    }

    pub(super) fn claim_now(run_dir: &Path) -> Result<Self, SingleError> {
        let name = claim_name()?;
        let path = run_dir.join(PID_FILE);
        let failed = |source| SingleError::Io {
            doing: format!("lock {}", path.display()),
            source,
        };
        make_folder(run_dir).map_err(failed)?;
        let mut pid_file = lock(&path, run_dir)?;
        let write = |file: &mut File| {
            file.set_len(0)?;
            writeln!(file, "{}", std::process::id())
        };
        write(&mut pid_file).map_err(failed)?;
        Ok(Self {
            _name: name,
            pid_file,
            path,
        })
    }
}

impl Drop for Single {
    fn drop(&mut self) {
        // Under the lock, so that it is never the next daemon's that goes.
        if same_file(&self.pid_file, &self.path) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn claim_name() -> Result<UnixListener, SingleError> {
    let failed = |source| SingleError::Io {
        doing: "claim the abstract socket \"ringmail\" of this network namespace".into(),
        source,
    };
    let address = SocketAddr::from_abstract_name(NAME).map_err(failed)?;
    match UnixListener::bind_addr(&address) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => Err(SingleError::Taken {
            other: holder(&address),
        }),
        bound => bound.map_err(failed),
    }
}

/// Who listens at `address`: a connection's credentials are those of the process that called listen (unix(7)), even
/// before it is accepted.
fn holder(address: &SocketAddr) -> Other {
    let connected = UnixStream::connect_addr(address).ok();
    let credentials = connected.and_then(|stream| getsockopt(&stream, PeerCredentials).ok());
    // The kernel says 0 where the process has no number in our pid namespace.
    let pid = credentials.map(|credentials| credentials.pid()).filter(|pid| *pid > 0);
    Other {
        pid,
        run_dir: pid.and_then(run_dir_of),
    }
}

/// The folder of the pid file that process `pid` holds open.
fn run_dir_of(pid: i32) -> Option<PathBuf> {
    let descriptors = fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
    let mut open = descriptors.filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
    open.find(|path| path.file_name().is_some_and(|name| name == PID_FILE))?
        .parent()
        .map(Path::to_path_buf)
}

/// Opens and locks the pid file. One that its last holder removed in between is let go, and its successor taken.
fn lock(path: &Path, run_dir: &Path) -> Result<Flock<File>, SingleError> {
    let failed = |source| SingleError::Io {
        doing: format!("lock {}", path.display()),
        source,
    };
    loop {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o644)
            .open(path)
            .map_err(failed)?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(locked) if same_file(&locked, path) => return Ok(locked),
            Ok(_) => {}
            Err((mut file, Errno::EWOULDBLOCK)) => {
                let other = Other {
                    pid: written_pid(&mut file),
                    run_dir: Some(run_dir.into()),
                };
                return Err(SingleError::Taken { other });
            }
            Err((_, Errno::EINTR)) => {}
            Err((_, errno)) => return Err(failed(errno.into())),
        }
    }
}

fn written_pid(file: &mut File) -> Option<i32> {
    let mut text = String::new();
    file.rewind().ok()?;
    file.take(32).read_to_string(&mut text).ok()?;
    text.trim().parse().ok()
}

fn same_file(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::metadata(path)) {
        (Ok(open), Ok(named)) => (open.dev(), open.ino()) == (named.dev(), named.ino()),
        _ => false,
    }
}
