//! What the daemon notes in its folder so that `ringmail cleanup` finds what lies outside the kernel.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::listen::make_folder;
use crate::lease::NodeName;
use crate::store::etcd::{Access, Endpoints};
use crate::store::kube;

/// `<run-dir>/state.json`: where this node's lease and its subnet.env are. It stays when the daemon stops.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Remembered {
    /// The folder of the embedded store, absolute; `None` with another store.
    pub lease_dir: Option<PathBuf>,
    /// The etcd cluster; `None` with another store.
    #[serde(default)]
    pub etcd: Option<RememberedEtcd>,
    /// The Kubernetes cluster; `None` with another store.
    #[serde(default)]
    pub kube: Option<RememberedKube>,
    /// The addresses that this node's lease names.
    #[serde(default)]
    pub public: Vec<std::net::IpAddr>,
    /// This node's name in the store.
    pub node: NodeName,
    /// The subnets that it holds, IPv4 first.
    pub subnets: Vec<ipnet::IpNet>,
    /// Where subnet.env was written, absolute.
    pub subnet_file: Option<PathBuf>,
}

/// An etcd cluster, and no password.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct RememberedEtcd {
    /// Its URLs, separated by commas.
    pub endpoints: String,
    /// What stands before every key.
    pub prefix: String,
    /// The file of its certificate authority.
    pub ca: Option<PathBuf>,
    /// The files of our certificate and its key.
    pub certificate: Option<(PathBuf, PathBuf)>,
    /// The user; the password is to be given again.
    pub user: Option<String>,
}

/// A Kubernetes cluster, and no credentials.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct RememberedKube {
    /// The kubeconfig, absolute.
    pub kubeconfig: Option<PathBuf>,
    /// The API server's URL, where it was given.
    pub url: Option<String>,
    /// What the annotations begin with.
    pub prefix: String,
}

impl RememberedKube {
    /// What is noted of `access`.
    pub fn of(access: &kube::Access) -> Self {
        let absolute = |path: &PathBuf| std::path::absolute(path).unwrap_or_else(|_| path.clone());
        Self {
            kubeconfig: access.kubeconfig.as_ref().map(absolute),
            url: access.url.clone(),
            prefix: access.keys.prefix().to_owned(),
        }
    }

    /// The access to the Node of `node`.
    ///
    /// # Errors
    /// What is wrong with the prefix.
    pub fn access(&self, node: NodeName) -> Result<kube::Access, String> {
        Ok(kube::Access {
            kubeconfig: self.kubeconfig.clone(),
            url: self.url.clone(),
            keys: kube::Keys::of(&self.prefix)?,
            own: kube::Own::Named(node),
        })
    }
}

impl RememberedEtcd {
    /// What is noted of `access`.
    pub fn of(access: &Access) -> Self {
        Self {
            endpoints: access.endpoints.to_string(),
            prefix: access.prefix.clone(),
            ca: access.ca.clone(),
            certificate: access.certificate.clone(),
            user: access.user.as_ref().map(|(user, _)| user.clone()),
        }
    }

    /// The access, with the password that the environment gives.
    ///
    /// # Errors
    /// What is missing.
    pub fn access(&self, password: Option<Zeroizing<String>>) -> Result<Access, String> {
        let user = match (&self.user, password) {
            (Some(user), Some(password)) => Some((user.clone(), password)),
            (None, _) => None,
            (Some(user), None) => {
                return Err(format!(
                    "etcd's user {user} has a password: give it as FLANNELD_ETCD_PASSWORD"
                ));
            }
        };
        Ok(Access {
            endpoints: Endpoints::parse(&self.endpoints)?,
            prefix: self.prefix.clone(),
            ca: self.ca.clone(),
            certificate: self.certificate.clone(),
            user,
        })
    }
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
