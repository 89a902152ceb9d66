//! Files: the configuration, subnet.env, the container runtime's, the daemon's process, who has which port.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use zeroize::Zeroizing;

use super::Look;
use crate::admin::{RememberError, Remembered};
use crate::config::{Context, NetConf};
use crate::doctor::checks::wanted_ports;
use crate::doctor::facts::{CniFile, Conf, Facts, Process, Socket};
use crate::lease::Range;
use crate::reconcile::chain;

/// Where flannel's manifests mount the configuration.
const MOUNTED: &str = "/etc/kube-flannel/net-conf.json";
/// What stands in the place of a secret.
const REMOVED: &str = "(removed)";

pub(super) fn read(look: &Look<'_>, noted: Result<Option<Remembered>, RememberError>, facts: &mut Facts) {
    match noted {
        Ok(Some(noted)) => {
            facts.lease_dir = noted.lease_dir;
            facts.subnet_file = noted.subnet_file;
        }
        Ok(None) => {}
        Err(error) => facts.unread.push(format!("what the daemon noted: {}", chain(&error))),
    }
    let file = facts.subnet_file.as_ref();
    facts.subnet_env = file.and_then(|file| fs::read_to_string(file).ok());
    let stored = facts.lease_dir.as_ref().map(|folder| folder.join("net-conf.json"));
    let found = stored.into_iter().chain([PathBuf::from(MOUNTED)]).find_map(|path| {
        let text = fs::read_to_string(&path).ok()?;
        Some((path, Zeroizing::new(text)))
    });
    facts.conf = found.map(|(path, text)| conf(path, &text));
    facts.cni = cni(look.cni_folder);
    facts.process = process(look.run_dir);
}

/// The configuration without its secret.
pub(in crate::doctor) fn conf(path: PathBuf, text: &str) -> Conf {
    let context = Context {
        file: "net-conf.json",
        // The daemon has one from somewhere, or it would not serve.
        psk_file: Some(Path::new("/")),
        psk_secret: None,
    };
    let capacity = NetConf::parse(text, &context).ok().map(|conf| {
        let mut rooms = BTreeMap::new();
        let network = conf.network;
        rooms.extend(network.v4.map(|range| ("IPv4".to_owned(), room(&range))));
        rooms.extend(network.v6.map(|range| ("IPv6".to_owned(), room(&range))));
        rooms
    });
    Conf {
        path,
        text: without_secrets(text),
        capacity,
    }
}

fn room<N>(range: &Range<N>) -> u64 {
    (u64::from(range.last) + 1).saturating_sub(range.first.into())
}

/// Whether what stands under a key may be a secret: a PSK, also under a mistyped key, an account's, as flannel's backends of
/// clouds have it, or a command of the operator's own, which may carry one.
fn is_secret(key: &str) -> bool {
    let key = key.to_lowercase();
    let harmless = ["pskfile", "pskgrace"].contains(&key.as_str());
    !harmless
        && [
            "psk",
            "secret",
            "password",
            "token",
            "credential",
            "accesskey",
            "private",
            "command",
        ]
        .iter()
        .any(|word| key.contains(word))
}

/// The same JSON with every value that [`is_secret`] taken out; what is no JSON is taken out whole.
fn without_secrets(text: &str) -> String {
    fn clear(value: &mut serde_json::Value) {
        match value {
            serde_json::Value::Object(members) => {
                for (key, value) in members.iter_mut() {
                    if is_secret(key) {
                        *value = REMOVED.into();
                    } else {
                        clear(value);
                    }
                }
            }
            serde_json::Value::Array(values) => values.iter_mut().for_each(clear),
            _ => {}
        }
    }
    match serde_json::from_str::<serde_json::Value>(text) {
        Ok(mut value) => {
            clear(&mut value);
            serde_json::to_string_pretty(&value).unwrap_or_else(|_| REMOVED.into())
        }
        Err(_) => format!("{REMOVED}: it is no JSON"),
    }
}

/// The files that a container runtime would take, by name.
fn cni(folder: &Path) -> Vec<CniFile> {
    let names = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<PathBuf> = names.map(|entry| entry.path()).collect();
    names.sort();
    let takes = |path: &PathBuf| {
        let end = path.extension().and_then(|end| end.to_str());
        end.is_some_and(|end| ["conf", "conflist", "json"].contains(&end))
    };
    let file = |path: PathBuf| {
        let value: serde_json::Value = serde_json::from_str(&fs::read_to_string(&path).ok()?).unwrap_or_default();
        let plugins = value["plugins"]
            .as_array()
            .cloned()
            .unwrap_or_else(|| vec![value.clone()]);
        let plugins = plugins
            .iter()
            .filter_map(|plugin| plugin["type"].as_str().map(str::to_owned));
        Some(CniFile {
            name: path.file_name()?.to_string_lossy().into_owned(),
            plugins: plugins.collect(),
        })
    };
    names.into_iter().filter(takes).filter_map(file).collect()
}

/// The daemon's process: whoever holds its pid file.
fn process(run_dir: &Path) -> Option<Process> {
    let text = fs::read_to_string(run_dir.join(crate::admin::PID_FILE)).ok()?;
    let pid: u32 = text.trim().parse().ok()?;
    let open = fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count();
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).ok()?;
    let limit = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    Some(Process {
        pid,
        open: u64::try_from(open).unwrap_or(u64::MAX),
        limit: limit.split_whitespace().next()?.parse().unwrap_or(u64::MAX),
    })
}

/// Who has the UDP ports that the backend wants. A user of another pid namespace is not to be seen.
pub(super) fn sockets(facts: &mut Facts) {
    let wanted = wanted_ports(facts);
    if wanted.is_empty() {
        return;
    }
    let mut found: Vec<(u16, u64)> = Vec::new();
    for table in ["net/udp", "net/udp6"] {
        let text = fs::read_to_string(Path::new("/proc").join(table)).unwrap_or_default();
        found.extend(
            text.lines()
                .filter_map(socket)
                .filter(|(port, _)| wanted.contains(port)),
        );
    }
    let inodes: BTreeSet<u64> = found
        .iter()
        .map(|(_, inode)| *inode)
        .filter(|inode| *inode > 0)
        .collect();
    let owners = if inodes.is_empty() {
        BTreeMap::new()
    } else {
        owners(&inodes)
    };
    for (port, inode) in found {
        let owner = owners.get(&inode);
        facts.sockets.push(Socket {
            port,
            program: owner.map(|(_, name)| name.clone()),
            pid: owner.map(|(pid, _)| *pid),
            kernel: inode == 0,
        });
    }
}

/// Local port and inode of a line of /proc/net/udp: `0: 00000000:1194 … inode`.
fn socket(line: &str) -> Option<(u16, u64)> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let (_, port) = words.get(1)?.rsplit_once(':')?;
    Some((u16::from_str_radix(port, 16).ok()?, words.get(9)?.parse().ok()?))
}

/// By inode, the process that has the socket open: the lowest number, which is as a rule the one that opened it.
fn owners(inodes: &BTreeSet<u64>) -> BTreeMap<u64, (u32, String)> {
    let mut owners: BTreeMap<u64, (u32, String)> = BTreeMap::new();
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    for process in processes {
        let Some(pid) = process.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        for open in fs::read_dir(process.path().join("fd")).into_iter().flatten().flatten() {
            let Ok(target) = fs::read_link(open.path()) else {
                continue;
            };
            let target = target.to_string_lossy();
            let inode = target.strip_prefix("socket:[").and_then(|rest| rest.strip_suffix(']'));
            let Some(inode) = inode.and_then(|inode| inode.parse().ok()) else {
                continue;
            };
            if inodes.contains(&inode) && owners.get(&inode).is_none_or(|(held, _)| pid < *held) {
                let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
                owners.insert(inode, (pid, name.trim().to_owned()));
            }
        }
    }
    owners
}
