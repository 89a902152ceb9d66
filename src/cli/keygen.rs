//! `ringmail keygen`: a new pre-shared key, on standard output or in a file that only its owner reads.

use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use clap::Args;

use super::{Failure, Shown};
use crate::psk;

/// Make a pre-shared key: 64 hexadecimal digits of 32 random bytes, and a line end.
#[derive(Debug, Args)]
#[command(after_help = "\
Every node of a mesh needs the same key. To change it, put a second file beside the first in a folder that --psk-file
names; the newest is first by file name in natural order.

Examples:
  ringmail keygen --out /etc/ringmail/psk
  kubectl create secret generic ringmail-psk --from-file=1=<(ringmail keygen)")]
pub struct Arguments {
    /// Write it to this file, mode 0600, which must not exist yet.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

pub(super) fn run(Arguments { out }: &Arguments) -> Result<Shown, Failure> {
    let text = psk::keygen().map_err(Failure::other)?;
    let Some(path) = out else {
        return Ok(Shown { text, code: 0 });
    };
    match write(path, text.as_bytes()) {
        Ok(()) => Ok(format!("wrote a new key to {}: give it to every node\n", path.display()).into()),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Err(Failure::other(anyhow::anyhow!(
            "{} exists and may be a key in use: choose another name, or move it away",
            path.display()
        ))),
        Err(error) => Err(Failure::other(
            anyhow::Error::from(error).context(format!("write {}: is its folder there and writable?", path.display())),
        )),
    }
}

fn write(path: &Path, text: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    let written = file.write_all(text).and_then(|()| file.sync_all());
    if written.is_err() {
        // Half a key is worse than none; it was not there before.
        let _ = std::fs::remove_file(path);
    }
    written
}
