//! `ringmail install`: a file into its place, whole or not at all. An image without a shell has no `cp`, and what the
//! container runtime reads while it is written must never be half there.
//!
//! Under the name `install-conf`, and under `cp`, it is what the init containers of flannel's DaemonSet call.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::Args;

use super::{Failure, Shown};
use crate::config::subnet_env;

/// Copy a file to where the container runtime looks for it, by rename, with its mode.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  ringmail install /ringmail-cni /opt/cni/bin/ringmail-cni /opt/cni/bin/flannel
  ringmail install cni-conf.json /etc/cni/net.d/10-flannel.conflist")]
pub struct Arguments {
    /// The file
    #[arg(value_name = "FROM")]
    from: PathBuf,
    /// Its new places, with the name; missing folders are made
    #[arg(value_name = "TO", required = true)]
    to: Vec<PathBuf>,
    /// As in `cp -f`, which is always so here
    #[arg(short = 'f', hide = true)]
    _force: bool,
}

/// The arguments of `ringmail install`, where the program's name or its first argument asks for it by one of flannel's.
pub(super) fn under_flannels_name(arguments: &[OsString]) -> Option<Vec<OsString>> {
    let (program, rest) = arguments.split_first()?;
    let name = Path::new(program).file_name()?;
    [OsStr::new("install-conf"), OsStr::new("cp")].contains(&name).then(|| {
        ["ringmail".into(), "install".into()]
            .into_iter()
            .chain(rest.iter().cloned())
            .collect()
    })
}

pub(super) fn run(Arguments { from, to, _force }: &Arguments) -> Result<Shown, Failure> {
    let read = || {
        let mode = fs::metadata(from)?.permissions().mode() & 0o777;
        std::io::Result::Ok((fs::read(from)?, mode))
    };
    let read = read().with_context(|| format!("read {}: is it a file?", from.display()));
    let (bytes, mode) = read.map_err(Failure::other)?;
    let mut text = String::new();
    for place in to {
        let written = subnet_env::replace(place, &bytes, mode);
        written
            .with_context(|| format!("write {}: is its folder mounted, and writable?", place.display()))
            .map_err(Failure::other)?;
        text += &format!("installed {}\n", place.display());
    }
    Ok(text.into())
}
