//! Kernel settings below /proc/sys.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

/// A setting and the value that it should have. Settings below `net` are of the calling thread's network namespace.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Sysctl {
    /// The path below /proc/sys with slashes (`net/ipv4/conf/eth0.7/rp_filter`: names of interfaces may hold dots).
    pub path: String,
    /// The value, without white space around it.
    pub value: String,
}

/// Why a setting is not as it should be.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// This kernel has no such setting.
    #[error(
        "/proc/sys/{path} is not in this kernel: load the module that brings it, or boot with its protocol enabled"
    )]
    Absent {
        /// The path below /proc/sys.
        path: String,
    },
    /// It can't be read.
    #[error("read /proc/sys/{path}")]
    Read {
        /// The path below /proc/sys.
        path: String,
        /// The system's reason.
        source: io::Error,
    },
    /// It can't be written here.
    #[error(
        "/proc/sys/{path} is {actual:?} and {value:?} is needed, but it can't be written here: \
         set it on the host (sysctl -w {path}={value}) or give the container a writable /proc/sys (privileged)"
    )]
    NotWritable {
        /// The path below /proc/sys.
        path: String,
        /// What it should be.
        value: String,
        /// What it is.
        actual: String,
        /// The system's reason.
        source: io::Error,
    },
    /// The kernel refused the value or keeps another.
    #[error(
        "/proc/sys/{path} is {actual:?} and does not take {value:?}: another program may hold it, or the kernel fixes it"
    )]
    Refused {
        /// The path below /proc/sys.
        path: String,
        /// What it should be.
        value: String,
        /// What it is.
        actual: String,
        /// The system's reason, where it gave one.
        source: Option<io::Error>,
    },
}

impl Sysctl {
    /// `path` below /proc/sys with slashes, and the value it should have.
    pub fn new(path: impl Into<String>, value: impl Into<String>) -> Self {
        Self {
            path: path.into(),
            value: value.into(),
        }
    }

    /// The value that the kernel holds, without white space around it.
    pub fn read(&self) -> Result<String, Error> {
        match fs::read_to_string(self.file()) {
            Ok(text) => Ok(text.trim().to_owned()),
            Err(error) if error.kind() == ErrorKind::NotFound => Err(Error::Absent {
                path: self.path.clone(),
            }),
            Err(source) => Err(Error::Read {
                path: self.path.clone(),
                source,
            }),
        }
    }

    /// Makes the setting hold the value; says whether it had to be changed. Writes nothing where the value is right
    /// already, so a read-only /proc/sys that is set up well is no error.
    pub fn write(&self) -> Result<bool, Error> {
        let actual = self.read()?;
        if actual == self.value {
            return Ok(false);
        }
        let (path, value) = (self.path.clone(), self.value.clone());
        match fs::write(self.file(), self.value.as_bytes()) {
            Ok(()) => {}
            Err(source)
                if matches!(
                    source.kind(),
                    ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem
                ) =>
            {
                return Err(Error::NotWritable {
                    path,
                    value,
                    actual,
                    source,
                });
            }
            Err(source) => {
                return Err(Error::Refused {
                    path,
                    value,
                    actual,
                    source: Some(source),
                });
            }
        }
        let actual = self.read()?;
        if actual == self.value {
            Ok(true)
        } else {
            Err(Error::Refused {
                path,
                value,
                actual,
                source: None,
            })
        }
    }

    fn file(&self) -> PathBuf {
        Path::new("/proc/sys").join(&self.path)
    }
}
