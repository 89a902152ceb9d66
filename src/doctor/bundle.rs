//! The support bundle: all that an engineer needs, as one tar file, and no secret.
//!
//! It is made of the facts alone, which hold no key: SAs are in it as the audit explains them, never as the kernel dumps
//! them, the configuration is without a PSK, and no PSK file, Secret or environment is read for it.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::facts::{Facts, FilterKind};
use super::{Finding, notes};

/// The folder that it unpacks into.
const FOLDER: &str = "ringmail-bundle";

/// Why there is no bundle.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// The file is there already.
    #[error("{} is there already: give another name, or --force to replace it", .0.display())]
    Exists(PathBuf),
    /// It can't be written.
    #[error("write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

/// A file of the bundle.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Entry {
    /// Its path within the bundle.
    pub path: String,
    /// Its content.
    pub text: String,
}

/// What is in it; `findings` as text as the verb shows them.
pub fn entries(facts: &Facts, findings: &[Finding], shown: &str) -> Vec<Entry> {
    let mut entries = Vec::new();
    let mut add = |path: &str, text: String| {
        entries.push(Entry {
            path: path.to_owned(),
            text,
        });
    };
    add("README.txt", readme(facts));
    add("findings.txt", shown.to_owned());
    add("findings.json", json(&findings));
    add("notes.json", json(&notes(facts)));
    add("report.json", json(&facts.report));
    add("audit.json", json(&facts.audit));
    add("leases.json", json(&facts.leases));
    // Parts that have a file of their own are left out here.
    let rest = Facts {
        report: None,
        audit: None,
        leases: None,
        texts: Default::default(),
        later: Default::default(),
        filters: Vec::new(),
        ..facts.clone()
    };
    add("facts.json", json(&rest));
    add("network/links.json", json(&facts.links));
    add(
        "network/routes.txt",
        lines(
            facts
                .routes
                .iter()
                .map(|route| format!("{route} proto {}", route.protocol)),
        ),
    );
    add(
        "network/rules.txt",
        lines(facts.rules.iter().map(|rule| format!("IPv{} {rule}", rule.family))),
    );
    add(
        "network/policies.txt",
        lines(facts.policies.iter().map(|policy| {
            format!(
                "dir {} src {} dst {} priority {} {}{}",
                policy.direction,
                policy.from,
                policy.to,
                policy.priority,
                policy.action,
                if policy.ours { "" } else { " (not ringmail's)" }
            )
        })),
    );
    if let Some(conf) = &facts.conf {
        add("net-conf.json", conf.text.clone());
    }
    if let Some(text) = &facts.subnet_env {
        add("subnet.env", text.clone());
    }
    for (number, filter) in facts.filters.iter().enumerate() {
        let end = match filter.by {
            FilterKind::Nft => "json",
            FilterKind::Iptables4 | FilterKind::Iptables6 => "txt",
        };
        add(
            &format!("filter/{number}-{}.{end}", filter.program),
            filter.text.clone(),
        );
    }
    for (folder, texts) in [("proc", &facts.texts), ("proc-later", &facts.later)] {
        for (path, text) in texts {
            add(&format!("{folder}/{path}"), text.clone());
        }
    }
    entries
}

fn readme(facts: &Facts) -> String {
    format!(
        "A support bundle of ringmail {}, made by `ringmail doctor --bundle` at {} seconds after 1970.\n\
         \n\
         findings.txt    what is wrong, worst first\n\
         report.json     what `ringmail status` shows; audit.json and leases.json likewise\n\
         network/        devices, routes, rules, IPsec policies; SAs stand in audit.json, without their keys\n\
         filter/         the packet filters\n\
         proc/           texts of the kernel, proc-later/ those of {:.0} s later\n\
         net-conf.json   the configuration, in the place of a PSK \"(removed)\"\n\
         \n\
         No key, PSK, Secret, password or environment variable is in it. Names and addresses of nodes are, and what a command\n\
         of the extension backend printed when it failed: report.json has it, as `ringmail status` does.\n\
         The log is not in it, since it lies with the service manager or the kubelet. To send it too:\n\
         {} > ringmail.log\n",
        facts.version,
        facts.now,
        facts.watched,
        match &facts.pod {
            Some(pod) => pod.log("--since=1h"),
            None => "journalctl -u ringmail --since -1h".to_owned(),
        }
    )
}

fn json(value: &impl Serialize) -> String {
    let mut text = serde_json::to_string_pretty(value).unwrap_or_else(|error| format!("\"{error}\""));
    text.push('\n');
    text
}

fn lines(lines: impl Iterator<Item = String>) -> String {
    lines.map(|line| line + "\n").collect()
}

/// Writes the entries to a new file of mode 0600; one that is there is only replaced where that is asked for.
///
/// # Errors
/// [`BundleError`]; no half of a bundle is left.
pub fn write(path: &Path, entries: &[Entry], now: u64, replace: bool) -> Result<(), BundleError> {
    let failed = |source: io::Error| BundleError::Write {
        path: path.to_owned(),
        source,
    };
    if replace {
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
    }
    // Never through a link that somebody has put there.
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
    let mut file = file.map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => BundleError::Exists(path.to_owned()),
        _ => failed(error),
    })?;
    let written = archive(entries, now).and_then(|bytes| {
        file.write_all(&bytes)?;
        file.sync_all()
    });
    written.map_err(|error| {
        let _ = fs::remove_file(path);
        failed(error)
    })
}

/// The entries as a tar file.
pub fn archive(entries: &[Entry], now: u64) -> io::Result<Vec<u8>> {
    let mut archive = tar::Builder::new(Vec::new());
    for Entry { path, text } in entries {
        let mut header = tar::Header::new_gnu();
        header.set_size(u64::try_from(text.len()).unwrap_or(u64::MAX));
        header.set_mode(0o600);
        header.set_mtime(now);
        archive.append_data(&mut header, format!("{FOLDER}/{path}"), text.as_bytes())?;
    }
    archive.into_inner()
}
