//! The files of a store folder: reading one lease file safely, and writing so that no one ever sees half of one.
//!
//! Everything happens relative to one open descriptor of the folder, so a folder that is replaced meanwhile is never
//! written by mistake. Writers exclude each other with a lock on that descriptor (flock(2)): it needs no file of its own
//! and ends with its holder. Other files of the folder: `.sequence` (the last revision given out), `.new-*` (a lease
//! being written; left over where its writer died), `net-conf.json`. All names with a leading dot are passed over.

use std::ffi::{OsStr, OsString};
use std::fs::{File, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat, renameat};
use nix::sys::stat::{FileStat, Mode, SFlag, fstatat};
use nix::unistd::{UnlinkatFlags, linkat, unlinkat};

use super::{StoreError, format};
use crate::lease::{Lease, Subnets};

/// What a file holds at most, in bytes. A statement is below 1 KiB.
pub(super) const MAX_BYTES: usize = 64 * 1024;
/// The network configuration's name in the folder.
pub(super) const CONFIG: &str = "net-conf.json";
const SEQUENCE: &str = ".sequence";
const UNFINISHED: &str = ".new-";
const SUFFIX: &str = ".json";
/// A lock is held for a few writes; who waits longer waits for a process that hangs.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);
/// A live writer finishes its file within the lock's patience, by far.
const UNFINISHED_AGE: Duration = Duration::from_secs(300);
/// Two writes within a file system's clock tick (up to 10 ms; 2 s on FAT) leave equal stamps.
const STAMP_TICK: Duration = Duration::from_secs(2);

/// Which folder. Inode numbers are used again, so the time of birth belongs to it where the file system has one.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Identity {
    /// The file system.
    pub(super) device: u64,
    inode: u64,
    born: Option<SystemTime>,
}

/// What changes when a file does: device, inode, size, and the times of the last change of content and inode.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) struct Stamp(u64, u64, i64, (i64, i64), (i64, i64));

/// What stands under a name.
#[derive(Debug)]
pub(super) enum Found {
    /// A lease and its revision. Without a stamp the file is too young to tell the next change by it.
    Lease {
        lease: Lease,
        revision: u64,
        stamp: Option<Stamp>,
    },
    /// Something else, and why it is no lease.
    Garbage { reason: String },
    /// Something that can't be read now; it may be a lease.
    Unreadable { reason: String },
    /// Nothing.
    Absent,
}

/// What a file holds.
enum Content {
    /// Its bytes, and its stamp as before they were read.
    Bytes(Vec<u8>, Option<Stamp>),
    /// Nothing that could be a text.
    Garbage(String),
    /// Bytes that can't be had now.
    Unreadable(String),
    /// No file.
    Absent,
}

/// An open store folder.
#[derive(Debug)]
pub(super) struct Folder {
    path: PathBuf,
    dir: File,
}

/// A folder that no other process writes to until this is dropped.
#[derive(Debug)]
pub(super) struct Locked(Folder);

/// The file name of the lease of `subnets`.
pub(super) fn file_name(subnets: &Subnets) -> String {
    format::key(subnets) + SUFFIX
}

/// Whether `name` may be a lease's: neither hidden nor the configuration.
pub(super) fn is_entry(name: &OsStr) -> bool {
    !name.as_encoded_bytes().starts_with(b".") && name != CONFIG
}

/// The subnets that a file name stands for, or what is wrong with it.
pub(super) fn parse_file_name(name: &OsStr) -> Result<Subnets, String> {
    let wrong = "not a lease's name: 10.244.1.0-24.json or fd00:244:0:1::-64.json is, or both subnets with & between";
    let key = name.to_str().and_then(|name| name.strip_suffix(SUFFIX)).ok_or(wrong)?;
    let subnets = format::parse_key(key).map_err(|bad| match bad {
        format::BadKey::Form(_) => wrong.to_owned(),
        bad @ format::BadKey::HostBits(..) => bad.to_string(),
    })?;
    let right = file_name(&subnets);
    if name == right.as_str() {
        Ok(subnets)
    } else {
        Err(format!("this subnet's file is named {right}"))
    }
}

impl Folder {
    /// Opens the folder at `path`.
    pub(super) fn open(path: &Path) -> Result<Self, StoreError> {
        let missing_or = |error: io::Error| match error.raw_os_error().map(Errno::from_raw) {
            Some(Errno::ENOENT) => StoreError::Missing(path.into()),
            Some(Errno::ENOTDIR) => StoreError::NotAFolder(path.into()),
            _ => StoreError::from_io("open store folder", path, error),
        };
        // Before the open, which would wait for the writer of a FIFO.
        if !std::fs::metadata(path).map_err(missing_or)?.is_dir() {
            return Err(StoreError::NotAFolder(path.into()));
        }
        Ok(Self {
            path: path.into(),
            dir: File::open(path).map_err(missing_or)?,
        })
    }

    /// Where the folder is.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Which folder this is.
    pub(super) fn identity(&self) -> Result<Identity, StoreError> {
        let meta = self
            .dir
            .metadata()
            .map_err(|e| StoreError::from_io("look at store folder", &self.path, e))?;
        Ok(Identity {
            device: meta.dev(),
            inode: meta.ino(),
            born: meta.created().ok(),
        })
    }

    /// Whether the path leads to this folder.
    fn is_current(&self) -> Result<bool, StoreError> {
        Ok(Self::open(&self.path)?.identity()? == self.identity()?)
    }

    /// Whether a store has been written here at any time.
    pub(super) fn has_sequence(&self) -> bool {
        self.stat(OsStr::new(SEQUENCE), AtFlags::AT_SYMLINK_NOFOLLOW).is_ok()
    }

    /// Every name in the folder, hidden ones too.
    pub(super) fn names(&self) -> Result<Vec<OsString>, StoreError> {
        let fail = |e| StoreError::from_io("list store folder", &self.path, e);
        let names: io::Result<Vec<OsString>> = std::fs::read_dir(&self.path)
            .map_err(fail)?
            .map(|entry| Ok(entry?.file_name()))
            .collect();
        let names = names.map_err(fail)?;
        // The listing went by the path: it counts if that still leads here.
        if self.is_current()? {
            Ok(names)
        } else {
            Err(StoreError::Missing(self.path.clone()))
        }
    }

    /// What tells the file's next change, or `None` where only reading tells.
    pub(super) fn stamp(&self, name: &OsStr) -> Option<Stamp> {
        settled(&self.stat(name, AtFlags::empty()).ok()?)
    }

    /// Reads what stands under `name`. Waits for nothing: a FIFO, a device or a folder is not opened.
    pub(super) fn read(&self, name: &OsStr) -> Found {
        let subnets = match parse_file_name(name) {
            Ok(subnets) => subnets,
            Err(reason) => return self.present(name, Found::Garbage { reason }),
        };
        match self.content(name) {
            Content::Bytes(bytes, stamp) => match format::decode(subnets, &bytes) {
                Ok((lease, revision)) => Found::Lease { lease, revision, stamp },
                Err(bad) => Found::Garbage {
                    reason: bad.to_string(),
                },
            },
            Content::Garbage(reason) => Found::Garbage { reason },
            Content::Unreadable(reason) => Found::Unreadable { reason },
            Content::Absent => Found::Absent,
        }
    }

    /// The text of the network configuration in the folder, if there is one.
    pub(super) fn config(&self) -> Result<Option<String>, StoreError> {
        let fail = |reason: String| {
            StoreError::from_io(
                "read",
                &self.path.join(CONFIG),
                io::Error::new(io::ErrorKind::InvalidData, reason),
            )
        };
        match self.content(OsStr::new(CONFIG)) {
            Content::Bytes(bytes, _) => String::from_utf8(bytes)
                .map(Some)
                .map_err(|_| fail("not UTF-8 text".into())),
            Content::Garbage(reason) | Content::Unreadable(reason) => Err(fail(reason)),
            Content::Absent => Ok(None),
        }
    }

    /// The bytes of the regular file `name`.
    fn content(&self, name: &OsStr) -> Content {
        let stat = match self.stat(name, AtFlags::empty()) {
            Ok(stat) => stat,
            Err(Errno::ENOENT) => {
                return match self.stat(name, AtFlags::AT_SYMLINK_NOFOLLOW) {
                    Ok(_) => Content::Garbage("a symbolic link to nothing".into()),
                    Err(_) => Content::Absent,
                };
            }
            Err(Errno::ELOOP) => return Content::Garbage("a symbolic link in a loop".into()),
            Err(errno) => return Content::Unreadable(unreadable(errno)),
        };
        if SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits()) != SFlag::S_IFREG {
            return Content::Garbage("not a regular file".into());
        }
        let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
        let file = match openat(&self.dir, name, flags, Mode::empty()) {
            Ok(fd) => File::from(fd),
            Err(Errno::ENOENT) => return Content::Absent,
            Err(errno) => return Content::Unreadable(unreadable(errno)),
        };
        let mut bytes = Vec::new();
        let limit = u64::try_from(MAX_BYTES).expect("64 KiB") + 1;
        match file.take(limit).read_to_end(&mut bytes) {
            Ok(_) if bytes.len() > MAX_BYTES => Content::Garbage(format!("larger than {MAX_BYTES} bytes")),
            Ok(_) => Content::Bytes(bytes, settled(&stat)),
            Err(error) => Content::Unreadable(format!("can't be read now: {error}")),
        }
    }

    fn stat(&self, name: &OsStr, flags: AtFlags) -> nix::Result<FileStat> {
        fstatat(&self.dir, name, flags)
    }

    /// `found`, if there is anything under `name`.
    fn present(&self, name: &OsStr, found: Found) -> Found {
        match self.stat(name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Err(Errno::ENOENT) => Found::Absent,
            _ => found,
        }
    }

    /// Keeps every other writer out, those of other processes too.
    pub(super) fn lock(path: &Path) -> Result<Locked, StoreError> {
        let deadline = Instant::now() + LOCK_PATIENCE;
        loop {
            let folder = Self::open(path)?;
            match folder.dir.try_lock() {
                // While we waited the folder may have been replaced.
                Ok(()) if folder.is_current()? => return Ok(Locked(folder)),
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(5)),
                Err(TryLockError::Error(error)) => return Err(StoreError::from_io("lock store folder", path, error)),
            }
            if Instant::now() > deadline {
                return Err(StoreError::Locked {
                    path: path.into(),
                    seconds: LOCK_PATIENCE.as_secs(),
                });
            }
        }
    }
}

fn unreadable(errno: Errno) -> String {
    match errno {
        Errno::EACCES | Errno::EPERM => "can't be read: permission denied".into(),
        errno => format!("can't be read now: {}", errno.desc()),
    }
}

/// The stamp of a file whose last change is long enough ago that the next one must differ.
fn settled(stat: &FileStat) -> Option<Stamp> {
    let changed = stat.st_mtime.max(stat.st_ctime);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).ok()?;
    let age = i64::try_from(now.as_secs()).ok()?.checked_sub(changed)?;
    let tick = i64::try_from(STAMP_TICK.as_secs()).ok()?;
    let (modified, inode) = ((stat.st_mtime, stat.st_mtime_nsec), (stat.st_ctime, stat.st_ctime_nsec));
    (age > tick).then_some(Stamp(stat.st_dev, stat.st_ino, stat.st_size, modified, inode))
}

impl Locked {
    /// The folder.
    pub(super) fn folder(&self) -> &Folder {
        &self.0
    }

    /// Writes a new lease, complete when it appears; `None` where its name is taken. Returns the lease's revision,
    /// which is above `written`.
    pub(super) fn create(&self, lease: &Lease, written: u64) -> Result<Option<u64>, StoreError> {
        self.write(lease, written, |unfinished, name| {
            let dir = &self.0.dir;
            match linkat(dir, unfinished, dir, name, AtFlags::empty()) {
                // A file system without hard links: the lock has to do.
                Err(Errno::EPERM | Errno::EOPNOTSUPP | Errno::ENOSYS) => {
                    match self.0.stat(OsStr::new(name), AtFlags::AT_SYMLINK_NOFOLLOW) {
                        Err(Errno::ENOENT) => renameat(dir, unfinished, dir, name),
                        Err(errno) => Err(errno),
                        Ok(_) => Err(Errno::EEXIST),
                    }
                }
                linked => linked,
            }
        })
    }

    /// Writes a lease over what stands in its place, as a revision above `stored`. Returns the revision.
    pub(super) fn replace(&self, lease: &Lease, stored: u64) -> Result<u64, StoreError> {
        let revision = self.write(lease, stored, |unfinished, name| {
            renameat(&self.0.dir, unfinished, &self.0.dir, name)
        })?;
        // Only a folder refuses to be replaced.
        revision.ok_or_else(|| StoreError::Occupied {
            subnets: lease.subnets,
            entry: file_name(&lease.subnets),
            reason: "not a regular file".into(),
        })
    }

    /// Removes a file; one that is gone is no error.
    pub(super) fn remove(&self, name: &OsStr) -> Result<(), StoreError> {
        let path = self.0.path.join(name);
        match unlinkat(&self.0.dir, name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) => self.sync(),
            Err(Errno::ENOENT) => Ok(()),
            Err(errno) => Err(StoreError::from_io("remove", &path, errno)),
        }
    }

    /// Removes what writers that died have left unfinished.
    pub(super) fn tidy(&self, names: &[OsString], now: SystemTime) {
        for name in names
            .iter()
            .filter(|name| name.as_encoded_bytes().starts_with(UNFINISHED.as_bytes()))
        {
            let changed = self
                .0
                .stat(name, AtFlags::AT_SYMLINK_NOFOLLOW)
                .map_or(i64::MAX, |stat| stat.st_ctime);
            let changed = SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(changed).unwrap_or(0));
            if now.duration_since(changed).is_ok_and(|age| age > UNFINISHED_AGE) {
                tracing::debug!(file = %name.display(), "removing an unfinished file of a writer that died");
                // It takes no harm to stay: the next writer tries again.
                let _ = unlinkat(&self.0.dir, name.as_os_str(), UnlinkatFlags::NoRemoveDir);
            }
        }
    }

    /// Writes `lease` into a file of its own, then has `place` put it under its name; `None` where that is taken.
    fn write(
        &self,
        lease: &Lease,
        stored: u64,
        place: impl FnOnce(&str, &str) -> nix::Result<()>,
    ) -> Result<Option<u64>, StoreError> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let revision = self.next_revision(stored)?;
        let text = format::encode(lease, revision);
        if text.len() > MAX_BYTES {
            return Err(StoreError::TooBig {
                bytes: text.len(),
                max: MAX_BYTES,
            });
        }
        let name = file_name(&lease.subnets);
        let (dir, path) = (&self.0.dir, self.0.path.join(&name));
        let unfinished = format!(
            "{UNFINISHED}{}-{}",
            std::process::id(),
            COUNT.fetch_add(1, Ordering::Relaxed)
        );
        // A left-over of this name may be linked to a lease: it is never written to.
        let _ = unlinkat(dir, unfinished.as_str(), UnlinkatFlags::NoRemoveDir);
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
        let mode = Mode::from_bits_truncate(0o644);
        let fd = openat(dir, unfinished.as_str(), flags, mode).map_err(|e| StoreError::from_io("write", &path, e))?;
        let mut file = File::from(fd);
        let placed = match file.write_all(text.as_bytes()).and_then(|()| file.sync_all()) {
            Ok(()) => place(&unfinished, &name).map_err(io::Error::from),
            Err(error) => Err(error),
        };
        // After a rename there is nothing left of it, and a failure to tidy up is no failure to write.
        let _ = unlinkat(dir, unfinished.as_str(), UnlinkatFlags::NoRemoveDir);
        match placed {
            Ok(()) => self.sync().map(|()| Some(revision)),
            Err(error) => match error.raw_os_error().map(Errno::from_raw) {
                Some(Errno::EEXIST | Errno::EISDIR | Errno::ENOTEMPTY) => Ok(None),
                _ => Err(StoreError::from_io("write", &path, error)),
            },
        }
    }

    /// The next revision, above `stored` and above all that were given out.
    fn next_revision(&self, stored: u64) -> Result<u64, StoreError> {
        let path = self.0.path.join(SEQUENCE);
        let fail = |error: io::Error| StoreError::from_io("write", &path, error);
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let mode = Mode::from_bits_truncate(0o644);
        let file = File::from(openat(&self.0.dir, SEQUENCE, flags, mode).map_err(|e| fail(e.into()))?);
        let mut text = String::new();
        let last = match (&file).take(64).read_to_string(&mut text) {
            Ok(_) => text.trim().parse::<u64>().ok(),
            Err(error) if error.kind() == io::ErrorKind::InvalidData => None,
            Err(error) => return Err(fail(error)),
        };
        let last = match last {
            Some(last) => last,
            None => self.highest_revision()?,
        };
        let next = last.max(stored).saturating_add(1);
        // Of fixed length and in place: a full disk can't leave it empty. It need not reach the disk before the lease:
        // if the machine stops between, the next writer of that lease goes by the lease's own revision.
        file.write_all_at(format!("{next:020}\n").as_bytes(), 0).map_err(fail)?;
        Ok(next)
    }

    /// The highest revision of any lease, for when the sequence is lost.
    fn highest_revision(&self) -> Result<u64, StoreError> {
        let names = self.0.names()?;
        let revisions = names
            .iter()
            .filter(|name| is_entry(name))
            .map(|name| match self.0.read(name) {
                Found::Lease { revision, .. } => revision,
                Found::Garbage { .. } | Found::Unreadable { .. } | Found::Absent => 0,
            });
        Ok(revisions.max().unwrap_or(0))
    }

    fn sync(&self) -> Result<(), StoreError> {
        self.0
            .dir
            .sync_all()
            .map_err(|e| StoreError::from_io("write store folder", &self.0.path, e))
    }
}
