//! The pre-shared keys: read from a file, a folder or a Secret, followed as they change, and made (`ringmail keygen`).
//!
//! A folder holds one key a file, the newest first by name in natural order (`key-10` before `key-9`); a Secret mounted
//! by Kubernetes is such a folder. A change that can't be read leaves the last good set in use, with the error beside
//! it. Buffers that held a key have a fixed size, so no copy is left behind by growing, and are wiped.

mod secret;
#[cfg(test)]
mod tests;
mod watch;

use std::cmp::Ordering;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use keys::{Kid, NoRandom, Psk};
use ring::rand::{SecureRandom as _, SystemRandom};
use zeroize::Zeroizing;

pub(crate) use secret::read as read_secret;
pub use secret::{BadSecretName, SecretError, SecretName};
pub use watch::{Held, watch};

/// The keys that are held, and what is odd about them.
#[derive(Clone, Debug)]
pub struct PskSet {
    /// Newest first; at least one, each only once.
    pub psks: Vec<Arc<Psk>>,
    /// For the log and `status`.
    pub warnings: Vec<PskWarning>,
}

/// What is odd about a key's file.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum PskWarning {
    /// Everyone on the machine can read the key.
    #[error("PSK file {} has mode {mode:04o}: every user of this machine can read it; chmod 0600 (a Secret: \
             defaultMode: 0400)", path.display())]
    WorldReadable {
        /// The file.
        path: PathBuf,
        /// Its mode's permission bits.
        mode: u32,
    },
    /// Two entries of a Secret hold one key.
    #[error("entry {entry:?} of Secret {secret} holds the same key as a newer one (kid {kid})")]
    TwiceIn {
        /// The Secret.
        secret: SecretName,
        /// The older entry.
        entry: String,
        /// The key.
        kid: Kid,
    },
    /// Two files hold one key.
    #[error("PSK file {} holds the same key as a newer one (kid {kid})", path.display())]
    Twice {
        /// The older file.
        path: PathBuf,
        /// The key's public name.
        kid: Kid,
    },
}

/// Why there is no set of keys. Never holds a byte of a key.
#[derive(Clone, Debug, thiserror::Error)]
pub enum PskError {
    /// Nothing there.
    #[error("PSK file {} does not exist: `ringmail keygen` makes a key", .0.display())]
    Missing(PathBuf),
    /// There, but not for us.
    #[error("PSK file {} can't be read", path.display())]
    Unreadable {
        /// The file or folder.
        path: PathBuf,
        /// The system's word.
        #[source]
        source: Arc<io::Error>,
    },
    /// A device, socket or pipe.
    #[error("PSK file {} is neither a file nor a folder", .0.display())]
    NotAFile(PathBuf),
    /// A file of no or only white bytes.
    #[error("PSK file {} is empty: `ringmail keygen` makes a key", .0.display())]
    Empty(PathBuf),
    /// A folder without a file. Hidden files, backups (`~`) and folders in it don't count.
    #[error("PSK folder {} holds no key: put a file in it that `ringmail keygen` made", .0.display())]
    EmptyFolder(PathBuf),
    /// Larger than [`MAX_FILE`].
    #[error("PSK file {} is larger than {MAX_FILE} bytes: this is hardly a key", .0.display())]
    TooLarge(PathBuf),
    /// More than [`MAX_KEYS`] keys.
    #[error("PSK folder {} holds {count} keys; at most {MAX_KEYS} can be in use: remove the oldest", path.display())]
    TooMany {
        /// The folder.
        path: PathBuf,
        /// How many there are.
        count: usize,
    },
    /// The bytes are no key.
    #[error("PSK file {}: {source}", path.display())]
    NoKey {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: keys::PskError,
    },
    /// A Secret gives no keys.
    #[error("PSK Secret {secret} {why}")]
    Secret {
        /// Which.
        secret: SecretName,
        /// Why not.
        why: SecretError,
    },
}

impl PskError {
    /// Whether it only says that the API server could not be asked.
    pub fn is_outage(&self) -> bool {
        matches!(
            self,
            Self::Secret {
                why: SecretError::Away(_),
                ..
            }
        )
    }
}

/// The most bytes that a key's file may have.
pub const MAX_FILE: usize = 64 * 1024;

/// The most keys that a folder may hold: as many as a statement has room for.
pub const MAX_KEYS: usize = 64;

impl PskSet {
    /// The set of one key, given in the configuration itself.
    pub fn of(psk: Arc<Psk>) -> Self {
        Self {
            psks: vec![psk],
            warnings: Vec::new(),
        }
    }

    /// The public names of the keys, newest first.
    pub fn kids(&self) -> Vec<Kid> {
        self.psks.iter().map(|psk| psk.kid()).collect()
    }
}

/// Two sets are equal when they name the same keys in the same order, with the same warnings.
impl PartialEq for PskSet {
    fn eq(&self, other: &Self) -> bool {
        self.kids() == other.kids() && self.warnings == other.warnings
    }
}

/// Reads the keys at `path`, a file or a folder, for the network of this name ([`keys::network_name`]).
///
/// # Errors
/// [`PskError`]. One bad file makes the whole folder an error: which keys a node holds is never a guess.
pub fn load(path: &Path, network: &str) -> Result<PskSet, PskError> {
    let about = fs::metadata(path).map_err(|source| unreadable(path, source))?;
    if !about.is_dir() {
        let mut warnings = Vec::new();
        let psk = read(path, network, &mut warnings)?;
        return Ok(PskSet {
            psks: vec![Arc::new(psk)],
            warnings,
        });
    }
    let files = files_in(path)?;
    let mut set = PskSet {
        psks: Vec::new(),
        warnings: Vec::new(),
    };
    for file in &files {
        let psk = read(file, network, &mut set.warnings)?;
        if set.kids().contains(&psk.kid()) {
            set.warnings.push(PskWarning::Twice {
                path: file.clone(),
                kid: psk.kid(),
            });
        } else {
            set.psks.push(Arc::new(psk));
        }
    }
    match set.psks.len() {
        0 => Err(PskError::EmptyFolder(path.to_owned())),
        count if count > MAX_KEYS => Err(PskError::TooMany {
            path: path.to_owned(),
            count,
        }),
        _ => Ok(set),
    }
}

/// A new key as text: 64 hexadecimal digits of 32 random bytes, and a line end.
///
/// # Errors
/// [`NoRandom`], where the system gives no random bytes.
pub fn keygen() -> Result<Zeroizing<String>, NoRandom> {
    let mut bytes = Zeroizing::new([0u8; 32]);
    SystemRandom::new().fill(&mut *bytes).map_err(|_| NoRandom)?;
    let mut text = Zeroizing::new(String::with_capacity(65));
    for byte in bytes.iter() {
        for digit in [byte >> 4, byte & 15] {
            text.push(char::from_digit(digit.into(), 16).expect("four bits are one digit"));
        }
    }
    text.push('\n');
    Ok(text)
}

/// The key within a file's bytes: of a text, all but white space at the end; of anything else, every byte, since a
/// random byte may happen to be a line end.
pub(crate) fn trim(bytes: &[u8]) -> &[u8] {
    let text = bytes.iter().all(|b| b.is_ascii_graphic() || b.is_ascii_whitespace());
    if text { bytes.trim_ascii_end() } else { bytes }
}

/// The files of a folder that count, newest first.
fn files_in(folder: &Path) -> Result<Vec<PathBuf>, PskError> {
    let unreadable = |source| unreadable(folder, source);
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).map_err(unreadable)? {
        let name = entry.map_err(unreadable)?.file_name();
        // Kubernetes keeps the content of a Secret in hidden folders behind links.
        let passed_over = name.as_bytes().starts_with(b".") || name.as_bytes().ends_with(b"~");
        if !passed_over {
            names.push(name);
        }
    }
    names.sort_unstable_by(|a, b| natural(b.as_bytes(), a.as_bytes()));
    Ok(names
        .into_iter()
        .map(|name| folder.join(name))
        .filter(|path| !path.is_dir())
        .collect())
}

/// Orders names by their parts: runs of digits as numbers, the rest byte by byte.
fn natural(a: &[u8], b: &[u8]) -> Ordering {
    let (mut x, mut y) = (a, b);
    while let (Some(p), Some(q)) = (x.first(), y.first()) {
        let order = if p.is_ascii_digit() && q.is_ascii_digit() {
            let (m, n) = (digits(&mut x), digits(&mut y));
            m.len().cmp(&n.len()).then_with(|| m.cmp(n))
        } else {
            (x, y) = (&x[1..], &y[1..]);
            p.cmp(q)
        };
        if order.is_ne() {
            return order;
        }
    }
    x.len().cmp(&y.len()).then_with(|| a.cmp(b))
}

/// Takes the digits at the start of `text`, and gives them without leading zeros.
fn digits<'a>(text: &mut &'a [u8]) -> &'a [u8] {
    let end = text.iter().position(|b| !b.is_ascii_digit()).unwrap_or(text.len());
    let (number, rest) = text.split_at(end);
    *text = rest;
    let zeros = number.iter().take_while(|&&b| b == b'0').count();
    &number[zeros..]
}

fn read(path: &Path, network: &str, warnings: &mut Vec<PskWarning>) -> Result<Psk, PskError> {
    let unreadable = |source| unreadable(path, source);
    // Not to hang on a pipe that nobody writes to.
    let flags = nix::fcntl::OFlag::O_NONBLOCK | nix::fcntl::OFlag::O_CLOEXEC;
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(flags.bits())
        .open(path)
        .map_err(unreadable)?;
    let about = file.metadata().map_err(unreadable)?;
    if !about.is_file() {
        return Err(PskError::NotAFile(path.to_owned()));
    }
    let mut buffer = Zeroizing::new(vec![0u8; MAX_FILE + 1]);
    let length = fill(file, &mut buffer).map_err(unreadable)?;
    if length > MAX_FILE {
        return Err(PskError::TooLarge(path.to_owned()));
    }
    let bytes = trim(&buffer[..length]);
    if bytes.is_empty() {
        return Err(PskError::Empty(path.to_owned()));
    }
    let psk = Psk::new(bytes, network).map_err(|source| PskError::NoKey {
        path: path.to_owned(),
        source,
    })?;
    let mode = about.permissions().mode() & 0o7777;
    if mode & 0o004 != 0 {
        warnings.push(PskWarning::WorldReadable {
            path: path.to_owned(),
            mode,
        });
    }
    Ok(psk)
}

/// Reads until the end of the file or of the buffer.
fn fill(mut file: File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut length = 0;
    while length < buffer.len() {
        match file.read(&mut buffer[length..]) {
            Ok(0) => break,
            Ok(read) => length += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(length)
}

fn unreadable(path: &Path, source: io::Error) -> PskError {
    match source.kind() {
        io::ErrorKind::NotFound => PskError::Missing(path.to_owned()),
        _ => PskError::Unreadable {
            path: path.to_owned(),
            source: Arc::new(source),
        },
    }
}
