//! The socket's place in the file system, and who may talk to it.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use nix::unistd::Uid;
use tokio::net::{UnixListener, UnixStream};

/// Why the control socket can't be made.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The path does not fit into an address (unix(7): 108 bytes with the closing zero).
    #[error("{} is {} bytes long, a socket's path has at most {SUN_PATH}: give a shorter --run-dir", path.display(), path.as_os_str().len())]
    TooLong {
        /// The path of the socket, with room for the temporary name.
        path: PathBuf,
    },
    /// The folder.
    #[error("make the folder {}: give a --run-dir that can be written", path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// The system's word.
        source: io::Error,
    },
    /// The socket.
    #[error("listen at {}: give a --run-dir that can be written", path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// The system's word.
        source: io::Error,
    },
}

/// What `sockaddr_un` has room for besides the closing zero.
const SUN_PATH: usize = 107;

/// The listening control socket. Dropping it removes the socket's file, if that is still this one's.
#[derive(Debug)]
pub struct Listener {
    inner: UnixListener,
    path: PathBuf,
    /// Device and inode of the file.
    file: (u64, u64),
}

impl Listener {
    pub(super) async fn accept(&self) -> io::Result<UnixStream> {
        Ok(self.inner.accept().await?.0)
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|meta| (meta.dev(), meta.ino()) == self.file) {
            // Nothing depends on it: the next daemon replaces what is left.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Makes `<run-dir>/control.sock`, mode 0600, and listens; the folder is made, mode 0755, where it is missing. A socket
/// that an earlier daemon left is replaced, so claim [`super::Single`] first. To be called in a tokio runtime.
pub fn listen(run_dir: &Path) -> Result<Listener, ListenError> {
    let path = super::socket(run_dir);
    // Made aside and moved into place: at its name it is never missing, and never has another mode.
    let aside = path.with_extension("new");
    if path.as_os_str().as_bytes().len() > SUN_PATH {
        return Err(ListenError::TooLong { path });
    }
    make_folder(run_dir).map_err(|source| ListenError::Folder {
        path: run_dir.into(),
        source,
    })?;
    let make = || {
        match fs::remove_file(&aside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let inner = UnixListener::bind(&aside)?;
        fs::set_permissions(&aside, Permissions::from_mode(0o600))?;
        let meta = fs::symlink_metadata(&aside)?;
        fs::rename(&aside, &path)?;
        Ok((inner, (meta.dev(), meta.ino())))
    };
    match make() {
        Ok((inner, file)) => Ok(Listener { inner, path, file }),
        Err(source) => Err(ListenError::Socket { path, source }),
    }
}

/// Makes `path` and what is missing above it, mode 0755.
pub(super) fn make_folder(path: &Path) -> io::Result<()> {
    DirBuilder::new().recursive(true).mode(0o755).create(path)
}

/// Whether the process at the other end is root's or this daemon's own user's; else the refusal that it is told.
pub(super) fn admits(stream: &UnixStream) -> Result<(), String> {
    let peer = stream
        .peer_cred()
        .map_err(|error| format!("who asks can't be told: {error}"))?
        .uid();
    let own = Uid::effective().as_raw();
    if peer == 0 || peer == own {
        Ok(())
    } else {
        Err(format!("user {peer} may not ask this daemon: run as root, with sudo"))
    }
}
