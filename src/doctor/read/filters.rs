//! Packet filters, by the programs that show them, where they are installed.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use crate::doctor::facts::{Facts, FilterKind, FilterText};

/// Where to look if the environment names no folders.
const USUAL_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// How long a program may take.
const LIMIT: Duration = Duration::from_secs(10);

/// Reads what is installed: nft's rules, and those of iptables that nft does not show.
pub(in crate::doctor) fn read(facts: &mut Facts) {
    let path = std::env::var_os("PATH").unwrap_or_else(|| USUAL_PATH.into());
    let nft = installed(&path, "nft");
    let mut seen = false;
    if let Some(nft) = &nft {
        seen |= show(nft, &["-j", "list", "ruleset"], FilterKind::Nft, "nft", facts);
    }
    for (family, by, tables) in [
        ("iptables", FilterKind::Iptables4, "net/ip_tables_names"),
        ("ip6tables", FilterKind::Iptables6, "net/ip6_tables_names"),
    ] {
        // Where no table is there, asking would load one, and it would stand in the way of every packet.
        let legacy =
            std::fs::read_to_string(Path::new("/proc").join(tables)).is_ok_and(|names| !names.trim().is_empty());
        let name = format!("{family}-legacy");
        match installed(&path, &format!("{name}-save")) {
            Some(program) if legacy => seen |= show(&program, &["-c"], by, &name, facts),
            None if legacy => match installed(&path, &format!("{family}-save")) {
                Some(program) => seen |= show(&program, &["-c"], by, family, facts),
                None => facts
                    .unread
                    .push(format!("the rules of {family}: there is no {family}-save here")),
            },
            _ => {}
        }
        if nft.is_none()
            && let Some(program) = installed(&path, &format!("{family}-nft-save"))
        {
            seen |= show(&program, &["-c"], by, &format!("{family}-nft"), facts);
        }
    }
    if !seen {
        let why = "the packet filter: neither nft nor iptables-save is here or answers";
        facts.unread.push(why.to_owned());
    }
}

fn installed(path: &OsString, name: &str) -> Option<PathBuf> {
    std::env::split_paths(path)
        .map(|folder| folder.join(name))
        .find(|file| file.is_file())
}

/// Keeps what a program shows; true where it showed anything.
fn show(program: &Path, arguments: &[&str], by: FilterKind, name: &str, facts: &mut Facts) -> bool {
    match run(program, arguments) {
        Ok(text) => {
            facts.filters.push(FilterText {
                by,
                program: name.to_owned(),
                text,
            });
            true
        }
        Err(why) => {
            facts.unread.push(format!("what {} shows: {why}", program.display()));
            false
        }
    }
}

/// Runs a program to its end, with PATH alone as environment, and gives what it wrote.
fn run(program: &Path, arguments: &[&str]) -> Result<String, String> {
    let child = Command::new(program)
        .args(arguments)
        .env_clear()
        .env("PATH", USUAL_PATH)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| error.to_string())?;
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id()).unwrap_or(i32::MAX));
    let (sender, receiver) = mpsc::channel();
    std::thread::spawn(move || drop(sender.send(child.wait_with_output())));
    let output = match receiver.recv_timeout(LIMIT) {
        Ok(output) => output.map_err(|error| error.to_string())?,
        Err(_) => {
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
            return Err(format!("no answer within {} s", LIMIT.as_secs()));
        }
    };
    if output.status.success() {
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    } else {
        let said = String::from_utf8_lossy(&output.stderr);
        Err(said
            .split_whitespace()
            .collect::<Vec<_>>()
            .join(" ")
            .chars()
            .take(200)
            .collect())
    }
}
