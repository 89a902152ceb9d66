//! Running `iptables-save` and `iptables-restore`: which ones, with a clean environment, for a bounded time.

use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use super::text::{self, Table};
use super::{Error, Family, LIMIT};

/// Seconds that a program itself waits for the xtables lock; below [`LIMIT`], so that it can say so.
const LOCK_WAIT: &str = "--wait=5";
/// Where to look if the environment names no folders.
const USUAL_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Longest text of a program that goes into an error, in characters.
const MESSAGE_LENGTH: usize = 400;

/// A pair of programs that works on this kernel.
#[derive(Debug)]
pub(super) struct Programs {
    save: PathBuf,
    restore: PathBuf,
}

impl Programs {
    /// The plain ones if they can change every table that we use, else `-legacy`, else `-nft`: what the administrator
    /// chose goes first, since rules of two kinds on one node surprise everyone.
    pub(super) fn find(family: Family) -> Result<Self, Error> {
        let path = std::env::var_os("PATH").unwrap_or_else(|| USUAL_PATH.into());
        let installed = |name: &str| {
            std::env::split_paths(&path)
                .map(|dir| dir.join(name))
                .find(|file| file.is_file())
        };
        let mut last = None;
        for variant in ["", "-legacy", "-nft"] {
            let pair = (
                installed(&format!("{family}tables{variant}-save")),
                installed(&format!("{family}tables{variant}-restore")),
            );
            let (Some(save), Some(restore)) = pair else { continue };
            let programs = Self { save, restore };
            match programs.works() {
                Ok(()) => return Ok(programs),
                Err(error) => last = Some(error),
            }
        }
        let path = path.to_string_lossy().into_owned();
        Err(last.unwrap_or(Error::Missing { family, path }))
    }

    /// Makes and deletes a chain in one commit, in each table. Reading alone says too little: the nft variant shows
    /// tables of families that the kernel's nf_tables lacks.
    fn works(&self) -> Result<(), Error> {
        for table in Table::ALL {
            self.restore(&text::question(table)).map_err(|error| match error {
                Error::Failed { program, message, .. } => Error::Unusable {
                    program,
                    table: table.name(),
                    message,
                },
                other => other,
            })?;
        }
        Ok(())
    }

    /// What stands between `iptables` and `-save` in the programs' names.
    #[cfg(test)]
    pub(super) fn variant(&self) -> String {
        let name = self.save.file_name().expect("a file").to_string_lossy().into_owned();
        name.trim_start_matches("iptables").trim_end_matches("-save").to_owned()
    }

    /// What `iptables-save` shows of `table`, counters included.
    pub(super) fn save(&self, table: Table) -> Result<String, Error> {
        run(&self.save, &["--counters", "-t", table.name()], "")
    }

    /// Has `iptables-restore` carry out `script`, one commit a table.
    pub(super) fn restore(&self, script: &str) -> Result<(), Error> {
        run(&self.restore, &["--noflush", "--counters", LOCK_WAIT], script).map(|_| ())
    }

    /// For messages.
    pub(super) fn save_name(&self) -> String {
        self.save.display().to_string()
    }
}

/// Runs `program` with `input` and gives what it wrote. Its environment holds PATH alone.
fn run(program: &PathBuf, arguments: &[&str], input: &str) -> Result<String, Error> {
    run_for(program, arguments, input, LIMIT)
}

fn run_for(program: &PathBuf, arguments: &[&str], input: &str, limit: Duration) -> Result<String, Error> {
    let name = || program.display().to_string();
    let failed = |source| Error::Run {
        program: name(),
        source,
    };
    let deadline = Instant::now() + limit;
    let mut child = Command::new(program)
        .args(arguments)
        .env_clear()
        .env("PATH", USUAL_PATH)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let (mut stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    // Its input is below the 64 KiB that a pipe takes at once, so this does not wait for it to read. One that ends
    // without reading is told by its exit code.
    debug_assert!(input.len() < 65_536, "a script of ours is a few lines");
    if let Some(stdin) = &mut stdin {
        let _ = stdin.write_all(input.as_bytes());
    }
    drop(stdin);
    let (stdout, stderr) = (collect(stdout), collect(stderr));
    let left =
        |channel: &mpsc::Receiver<Vec<u8>>| channel.recv_timeout(deadline.saturating_duration_since(Instant::now()));
    // Both ends of output come with its end, or nearly; a program that closes them early is waited for below.
    let (Ok(stdout), Ok(stderr)) = (left(&stdout), left(&stderr)) else {
        let _ = child.kill();
        let _ = child.wait();
        return Err(Error::Slow { program: name() });
    };
    let status = loop {
        match child.try_wait().map_err(failed)? {
            Some(status) => break status,
            None if Instant::now() < deadline => thread::sleep(Duration::from_millis(1)),
            None => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(Error::Slow { program: name() });
            }
        }
    };
    if status.success() {
        Ok(String::from_utf8_lossy(&stdout).into_owned())
    } else {
        Err(refusal(name(), status, &stderr))
    }
}

fn refusal(program: String, status: ExitStatus, stderr: &[u8]) -> Error {
    let code = status
        .code()
        .map_or_else(|| "signal".to_owned(), |code| code.to_string());
    let message = String::from_utf8_lossy(stderr)
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ");
    Error::Failed {
        program,
        code,
        message: message.chars().take(MESSAGE_LENGTH).collect(),
    }
}

fn collect(stream: Option<impl Read + Send + 'static>) -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel();
    // It ends with the stream, at the latest when the program is killed.
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut stream) = stream {
            let _ = stream.read_to_end(&mut bytes);
        }
        let _ = sender.send(bytes);
    });
    receiver
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str, input: &str, limit: Duration) -> Result<String, Error> {
        run_for(&PathBuf::from("/bin/sh"), &["-c", script], input, limit)
    }

    #[test]
    fn a_program_gets_its_input_and_no_environment_but_path() {
        assert!(std::env::vars_os().count() > 3, "there is something to keep out");
        let output = sh("cat; /usr/bin/env", "hello\n", LIMIT).expect("sh works");
        let mut lines: Vec<&str> = output
            .lines()
            .filter(|line| !line.starts_with("PWD=") && !line.starts_with("_="))
            .collect();
        lines.retain(|line| !line.starts_with("SHLVL=") && !line.starts_with("OLDPWD="));
        assert_eq!(lines, ["hello", &format!("PATH={USUAL_PATH}")]);
    }

    #[test]
    fn a_program_that_hangs_is_ended() {
        let begun = Instant::now();
        let error = sh("exec sleep 100", "", Duration::from_millis(200)).expect_err("it hangs");
        assert!(matches!(error, Error::Slow { .. }), "{error}");
        assert!(begun.elapsed() < Duration::from_secs(5));
    }

    #[test]
    fn a_refusal_says_what_the_program_said() {
        let error = sh("echo line 3 failed >&2; exit 2", "", LIMIT).expect_err("it fails");
        assert_eq!(error.to_string(), "/bin/sh (exit code 2): line 3 failed");
    }
}
