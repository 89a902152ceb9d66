//! The flags by which a verb finds an etcd cluster without the daemon. They are the daemon's.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use tokio::time::timeout;
use zeroize::Zeroizing;

use super::Failure;
use crate::config::flags::{ETCD_PREFIX, Environment};
use crate::store::etcd::{Access, Etcd, Lifetime, TTL};

/// How long etcd may take to answer a verb.
const LIMIT: Duration = Duration::from_secs(10);

/// Where etcd is. The password comes from the environment alone: what is on a command line, every user reads.
#[derive(Clone, Debug, Args)]
pub(super) struct EtcdFlags {
    /// etcd's addresses, separated by commas
    #[arg(long, value_name = "URLS", conflicts_with = "lease_dir")]
    etcd_endpoints: Option<String>,
    /// The prefix of etcd's keys
    #[arg(long, value_name = "KEY", requires = "etcd_endpoints", default_value = ETCD_PREFIX)]
    etcd_prefix: String,
    /// The key of etcd's client certificate
    #[arg(long, value_name = "FILE", requires = "etcd_endpoints")]
    etcd_keyfile: Option<PathBuf>,
    /// The client certificate for etcd
    #[arg(long, value_name = "FILE", requires = "etcd_endpoints")]
    etcd_certfile: Option<PathBuf>,
    /// The certificate authority of etcd
    #[arg(long, value_name = "FILE", requires = "etcd_endpoints")]
    etcd_cafile: Option<PathBuf>,
    /// The user at etcd, whose password the variable FLANNELD_ETCD_PASSWORD holds
    #[arg(long, value_name = "NAME", requires = "etcd_endpoints")]
    etcd_username: Option<String>,
}

impl EtcdFlags {
    /// The cluster that is asked for, if one is.
    pub(super) fn access(&self) -> Result<Option<Access>, Failure> {
        let Some(endpoints) = &self.etcd_endpoints else {
            return Ok(None);
        };
        // One that is there for the daemon is no error where no user is named.
        let password = self.etcd_username.as_ref().and_then(|_| password());
        let access = Access::of_flags(
            endpoints,
            &self.etcd_prefix,
            self.etcd_cafile.clone(),
            (self.etcd_certfile.clone(), self.etcd_keyfile.clone()),
            (self.etcd_username.clone(), password),
        );
        access.map(Some).map_err(|why| Failure::usage(anyhow::Error::msg(why)))
    }
}

/// The password in the environment.
pub(super) fn password() -> Option<Zeroizing<String>> {
    let environment = Environment::of_process();
    let mut variables = environment.variables.iter();
    let (_, value) = variables.find(|(name, value)| name == "FLANNELD_ETCD_PASSWORD" && !value.is_empty())?;
    value.to_str().map(|text| Zeroizing::new(text.to_owned()))
}

/// Opens the cluster; one that does not answer is an error, unlike at the daemon's start.
pub(super) async fn open(access: Access) -> anyhow::Result<Etcd> {
    let endpoints = access.endpoints.to_string();
    let lifetime = Lifetime { ttl: TTL, margin: 3600 };
    let opened = timeout(LIMIT, Etcd::open(access, lifetime)).await;
    let opened = opened.with_context(|| format!("etcd at {endpoints} does not answer within {} s", LIMIT.as_secs()))?;
    opened.context("open etcd")
}
