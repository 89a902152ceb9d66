//! Other plugins: finding and running them.

use std::fs;
use std::io::{self, Seek as _, Write as _};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::Duration;

use nix::sys::memfd::{MFdFlags, memfd_create};

use super::call::Call;
use super::error::Error;

/// How often, and how far apart, a program that is being written just now is tried again.
const BUSY: (u32, Duration) = (50, Duration::from_millis(100));

/// A plugin on this machine.
#[derive(Clone, Debug)]
pub struct Plugin {
    path: PathBuf,
}

impl Plugin {
    /// Looks in the folders of `CNI_PATH`.
    ///
    /// # Errors
    /// Code 999, with the texts of Go's plugins.
    pub fn find(kind: &str, call: &Call) -> Result<Self, Error> {
        if kind.is_empty() {
            return Err(Error::internal("no plugin name provided"));
        }
        if kind.contains('/') {
            return Err(Error::internal(format!("invalid plugin name: {kind}")));
        }
        let is_file = |path: &PathBuf| fs::metadata(path).is_ok_and(|about| about.is_file());
        match call.folders().map(|folder| folder.join(kind)).find(is_file) {
            Some(path) => Ok(Self { path }),
            None => {
                let folders: Vec<_> = call.folders().map(|folder| folder.display().to_string()).collect();
                let folders = folders.join(" ");
                Err(Error::internal(format!(
                    "failed to find plugin {kind:?} in path [{folders}]"
                )))
            }
        }
    }

    /// Runs it with `conf` on its standard input, in this process's environment with `variables` changed; what it printed.
    /// What it says on standard error goes to ours.
    ///
    /// # Errors
    /// Its own error; or code 0, with what Go's plugins say of one that failed without a word.
    pub fn run(&self, variables: &[(&str, &str)], conf: &[u8]) -> Result<Vec<u8>, Error> {
        let output = self.output(variables, conf).map_err(|error| {
            Error::new(
                0,
                format!(
                    "netplugin failed with no error message: run {}: {error}",
                    self.path.display()
                ),
            )
        })?;
        let good = output.status.success();
        if good || !output.stdout.is_empty() {
            // It is for people; whether somebody reads it does not matter.
            drop(io::stderr().write_all(&output.stderr));
        }
        if good { Ok(output.stdout) } else { Err(failure(&output)) }
    }

    fn output(&self, variables: &[(&str, &str)], conf: &[u8]) -> io::Result<Output> {
        // A pipe would have to be filled while the answer is read.
        let mut input = fs::File::from(memfd_create("conf", MFdFlags::MFD_CLOEXEC)?);
        input.write_all(conf)?;
        let (mut tries, pause) = BUSY;
        loop {
            input.rewind()?;
            let done = Command::new(&self.path)
                .envs(variables.iter().copied())
                .stdin(Stdio::from(input.try_clone()?))
                .output();
            match done {
                Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy && tries > 0 => {
                    tries -= 1;
                    thread::sleep(pause);
                }
                done => return done,
            }
        }
    }
}

fn failure(output: &Output) -> Error {
    let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
    if output.stdout.is_empty() && output.stderr.is_empty() {
        return Error::new(0, format!("netplugin failed with no error message: {}", output.status));
    }
    if output.stdout.is_empty() {
        return Error::new(0, format!("netplugin failed: {:?}", text(&output.stderr)));
    }
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| {
        let said = text(&output.stdout);
        Error::new(
            0,
            format!("netplugin failed but error parsing its diagnostic message {said:?}: {error}"),
        )
    })
}
