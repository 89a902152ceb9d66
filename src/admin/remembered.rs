//! What the daemon notes in its folder so that `ringmail cleanup` finds what lies outside the kernel.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::listen::make_folder;
use crate::lease::NodeName;

/// `<run-dir>/state.json`: where this node's lease and its subnet.env are. It stays when the daemon stops.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Remembered {
    /// The folder of the embedded store, absolute; `None` with another store.
    pub lease_dir: Option<PathBuf>,
    /// This node's name in the store.
    pub node: NodeName,
    /// The subnets that it holds, IPv4 first.
    pub subnets: Vec<ipnet::IpNet>,
    /// Where subnet.env was written, absolute.
    pub subnet_file: Option<PathBuf>,
}

/// Why the note can't be written or read.
#[derive(Debug, thiserror::Error)]
pub enum RememberError {
    /// The file system.
    #[error("{doing} {}", path.display())]
    Io {
        /// What was tried.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// The system's word.
        source: io::Error,
    },
    /// The content.
    #[error("{} is not what ringmail wrote: remove it, and give --lease-dir and --node-name", path.display())]
    Garbage {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: serde_json::Error,
    },
}

impl Remembered {
    /// The file in `run_dir`.
    pub fn path(run_dir: &Path) -> PathBuf {
        run_dir.join("state.json")
    }

    /// Writes the note, by rename: a reader sees the old or the new one.
    pub fn write(&self, run_dir: &Path) -> Result<(), RememberError> {
        let path = Self::path(run_dir);
        let mut text = serde_json::to_vec_pretty(self).expect("names and paths become JSON");
        text.push(b'\n');
        let aside = path.with_extension("new");
        let write = || {
            make_folder(run_dir)?;
            fs::write(&aside, &text)?;
            fs::rename(&aside, &path)
        };
        write().map_err(|source| RememberError::Io {
            doing: "write",
            path: path.clone(),
            source,
        })
    }

    /// Reads the note; `None` where there is none.
    pub fn read(run_dir: &Path) -> Result<Option<Self>, RememberError> {
        let path = Self::path(run_dir);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => {
                return Err(RememberError::Io {
                    doing: "read",
                    path,
                    source,
                });
            }
        };
        let note = serde_json::from_slice(&text).map_err(|source| RememberError::Garbage { path, source })?;
        Ok(Some(note))
    }
}
