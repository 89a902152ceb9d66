//! `ringmail cleanup`: all that ringmail made on this node goes, and nothing else.
//!
//! What is ours is read from the kernel by its marks, so it does not matter which process made it or how it ended. The
//! guard goes last, and stays where something before it could not be removed. May be repeated.

use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use serde::Serialize;
use tokio::time::timeout;
use xfrm::netlink::Protocol;
use xfrm::{Connection, Writer};

use super::etcd::{self, EtcdFlags};
use super::table::{clean, wrap};
use super::{Common, Failure, Shown};
use crate::admin::{Remembered, RememberedKube, Single};
use crate::config::flags::Environment;
use crate::config::subnet_env;
use crate::kernel::firewall::Manager;
use crate::kernel::netlink::{Netlink, Options};
use crate::kernel::{Datapath, Key, Kind, Objects, Op, Scope, Write, nft, order};
use crate::lease::{Addresses, NodeName, Subnets};
use crate::reconcile::chain;
use crate::store::Store;
use crate::store::etcd::Access;

/// How long an API server may take to answer.
const LIMIT: Duration = Duration::from_secs(10);

/// Remove all that ringmail made on this node, and nothing else.
#[derive(Debug, Args)]
#[command(after_help = "\
Removes SAs, policies, routes, device, firewall rules, subnet.env, the files in the daemon's folder, and gives the
node's lease back. Pods on this node then reach no other node's. Forwarding stays switched on: something else may
need it. The daemon must be stopped first.

Where the daemon's folder was emptied (a restart of the machine does that), --lease-dir or --etcd-endpoints says where
the lease is. A lease in etcd that names no node, which is all but ipsec's, is then found by --public-ip. The password
for etcd comes from the variable FLANNELD_ETCD_PASSWORD.

Exit code: 0 where nothing of ringmail is left, 69 where the store can't be reached, else 1.

Examples:
  systemctl stop ringmail && ringmail cleanup
  ringmail cleanup --lease-dir /var/lib/ringmail --node-name node-a
  ringmail cleanup --etcd-endpoints http://192.0.2.1:2379 --public-ip 192.0.2.3")]
pub struct Arguments {
    #[command(flatten)]
    common: Common,
    /// The folder of leases [default: as the daemon noted it]
    #[arg(long, value_name = "DIR")]
    lease_dir: Option<PathBuf>,
    #[command(flatten)]
    etcd: EtcdFlags,
    /// An address that this node's lease in etcd names; may be repeated [default: as the daemon noted them]
    #[arg(long, value_name = "IP")]
    public_ip: Vec<IpAddr>,
    /// This node's name [default: as the daemon noted it, else NODE_NAME, else the host name]
    #[arg(long, value_name = "NAME")]
    node_name: Option<String>,
    /// subnet.env [default: as the daemon noted it]
    #[arg(long, value_name = "FILE")]
    subnet_file: Option<PathBuf>,
    /// A file to be removed too, such as an installed CNI plugin, or a folder, which must be empty; may be repeated: in this
    /// order, and what can't be removed keeps those after it
    #[arg(long, value_name = "PATH")]
    also: Vec<PathBuf>,
}

/// What was removed, and what could not be.
#[derive(Debug, Default, Serialize)]
pub(super) struct Outcome {
    /// Objects of the kernel, in the order of removal.
    pub(super) kernel: Vec<String>,
    /// Files.
    pub(super) files: Vec<PathBuf>,
    /// The lease that was given back.
    pub(super) lease: Option<String>,
    /// What is left, with the reason.
    pub(super) failed: Vec<String>,
    /// Whether the store could not be reached.
    #[serde(skip)]
    store_failed: bool,
}

pub(super) fn run(arguments: &Arguments) -> Result<Shown, Failure> {
    let Arguments { common, .. } = arguments;
    let given = arguments.etcd.access()?;
    // The claim makes the folder where it is missing, and that is nothing to tell of.
    let folder_was_there = common.run_dir.exists();
    // Held to the end, so that no daemon starts in between.
    let single = Single::claim(&common.run_dir).map_err(|error| {
        let error = anyhow::Error::from(error);
        Failure::other(error.context("cleanup works on a stopped node (`systemctl stop ringmail`)"))
    })?;
    let mut outcome = Outcome::default();
    let note = Remembered::read(&common.run_dir).unwrap_or_else(|error| {
        outcome.failed.push(chain(&error));
        None
    });
    clear_kernel(&mut outcome)?;
    let subnets = release_lease(arguments, given, note.as_ref(), &mut outcome);
    remove_subnet_env(arguments, note.as_ref(), subnets, &mut outcome);
    drop(single);
    remove_run_files(&common.run_dir, folder_was_there, &mut outcome);
    remove_also(&arguments.also, &mut outcome);
    let code = match (outcome.failed.is_empty(), outcome.store_failed) {
        (true, _) => 0,
        (false, true) => 69,
        (false, false) => 1,
    };
    let shown = if common.json {
        Shown::json(&outcome, true)
    } else {
        Shown::from(render(&outcome))
    };
    Ok(Shown { code, ..shown })
}

fn clear_kernel(outcome: &mut Outcome) -> Result<(), Failure> {
    let mut kernel = Netlink::open(&Options { prefer_nft: true }).map_err(Failure::other)?;
    let actual = kernel.dump().map_err(Failure::other)?;
    let guarded = clear(&mut kernel, &actual, outcome);
    if guarded {
        return Ok(());
    }
    if let Err(error) = clear_firewall(outcome) {
        outcome.failed.push(format!("{error:#}"));
    }
    Ok(())
}

/// Breaks all of `actual`, what was made last first. True where the guard was left standing, because something that it
/// guards could not be removed.
pub(super) fn clear(kernel: &mut impl Datapath, actual: &Objects, outcome: &mut Outcome) -> bool {
    let breaks = actual.keys().map(|key| (Scope::Node, Op::Break(key.clone()))).collect();
    let mut by_kind: Vec<(Kind, Vec<Key>)> = Vec::new();
    for (_, op) in order(breaks) {
        let key = op.key().clone();
        match by_kind.last_mut() {
            Some((kind, keys)) if *kind == key.kind() => keys.push(key),
            _ => by_kind.push((key.kind(), vec![key])),
        }
    }
    for (kind, keys) in by_kind {
        if kind <= Kind::Guard && !outcome.failed.is_empty() {
            outcome
                .failed
                .push("the guard, which stays while something behind it does".into());
            return true;
        }
        let write = |key: &Key| Write {
            op: Op::Break(key.clone()),
            secret: None,
        };
        let mut writes: Vec<Write> = keys.iter().map(write).collect();
        let results = kernel.apply(kind, &mut writes);
        for (key, result) in keys.iter().zip(results) {
            match result {
                Ok(()) => outcome.kernel.push(key.to_string()),
                Err(error) => outcome.failed.push(chain(&error)),
            }
        }
    }
    false
}

/// Both managers' rules go: an earlier run may have used the other one.
fn clear_firewall(outcome: &mut Outcome) -> anyhow::Result<()> {
    let there = has_nft_table();
    let mut manager = Manager::open(true)?;
    manager.remove()?;
    manager.remove_other()?;
    if there {
        outcome.kernel.push(format!("firewall table inet {}", nft::TABLE));
    }
    Ok(())
}

/// Whether nf_tables holds our table; where it can't be asked there is none.
fn has_nft_table() -> bool {
    // linux/netfilter/nf_tables.h: NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETTABLE, NFTA_TABLE_NAME; struct nfgenmsg.
    const GET_TABLE: u16 = 10 << 8 | 1;
    const NAME: u16 = 1;
    const INET: u8 = 1;
    let body = |writer: &mut Writer<'_>| {
        writer.u8(INET);
        writer.zeros(3);
        writer.attribute_str(NAME, nft::TABLE);
    };
    let asked = Connection::open(Protocol::Netfilter)
        .and_then(|mut connection| connection.get(GET_TABLE, 0, body, |_| Some(())));
    matches!(asked, Ok(Some(())))
}

/// Gives the lease back; returns the subnets that this node held, as far as they are known.
fn release_lease(
    arguments: &Arguments,
    given: Option<Access>,
    note: Option<&Remembered>,
    outcome: &mut Outcome,
) -> Subnets {
    let noted: Subnets = note.iter().flat_map(|note| note.subnets.iter().copied()).collect();
    let folder = arguments.lease_dir.as_deref().or_else(|| note?.lease_dir.as_deref());
    let noted_etcd = || {
        let etcd = note.and_then(|note| note.etcd.as_ref())?;
        (arguments.lease_dir.is_none()).then(|| etcd.access(etcd::password()).map_err(anyhow::Error::msg))
    };
    let released = match (given.map(Ok).or_else(noted_etcd), folder) {
        (Some(access), _) => access.and_then(|access| release_in_etcd(arguments, note, access, &noted)),
        (None, Some(folder)) => release(arguments, note, folder),
        (None, None) => match note.and_then(|note| Some((note, note.kube.as_ref()?))) {
            Some((note, kube)) => release_in_kube(note, kube),
            None => return noted,
        },
    };
    match released {
        Ok(Some((node, subnets))) => {
            outcome.lease = Some(format!("{subnets} of {node}"));
            subnets
        }
        Ok(None) => noted,
        Err(error) => {
            outcome.failed.push(format!("the lease of this node: {error:#}"));
            outcome.store_failed = true;
            noted
        }
    }
}

fn release(
    arguments: &Arguments,
    note: Option<&Remembered>,
    folder: &Path,
) -> anyhow::Result<Option<(NodeName, Subnets)>> {
    let node = node_name(arguments, note)?;
    let work = async {
        let store = Store::open_dir(folder).await?;
        // The store's word, not the note's: the subnet may be another node's by now.
        let held = store.roster().borrow().get(&node).map(|lease| lease.subnets);
        if let Some(subnets) = held {
            store.release(&node, &subnets).await?;
        }
        anyhow::Ok(held)
    };
    let held = super::blocking(work).map_err(|failure| failure.error)??;
    Ok(held.map(|subnets| (node, subnets)))
}

fn release_in_etcd(
    arguments: &Arguments,
    note: Option<&Remembered>,
    access: Access,
    noted: &Subnets,
) -> anyhow::Result<Option<(NodeName, Subnets)>> {
    let node = node_name(arguments, note)?;
    let public: Addresses = match arguments.public_ip.is_empty() {
        true => note.iter().flat_map(|note| note.public.iter().copied()).collect(),
        false => arguments.public_ip.iter().copied().collect(),
    };
    let work = async {
        let store = etcd::open(access).await?;
        let held = store.recall(&node, public, noted).await?;
        if let Some(subnets) = held {
            Store::Etcd(store).release(&node, &subnets).await?;
        }
        anyhow::Ok(held)
    };
    let held = super::blocking(work).map_err(|failure| failure.error)??;
    Ok(held.map(|subnets| (node, subnets)))
}

fn release_in_kube(note: &Remembered, kube: &RememberedKube) -> anyhow::Result<Option<(NodeName, Subnets)>> {
    let node = note.node.clone();
    let access = kube.access(node.clone()).map_err(anyhow::Error::msg)?;
    let work = async {
        let server = access.to_string();
        let opened = timeout(LIMIT, Store::open_kube(access)).await;
        let unanswered = || {
            format!(
                "the API server of {server} does not let us in within {} s",
                LIMIT.as_secs()
            )
        };
        let store = opened.with_context(unanswered)??;
        let held = store.roster().borrow().get(&node).map(|lease| lease.subnets);
        if let Some(subnets) = held {
            store.release(&node, &subnets).await?;
        }
        anyhow::Ok(held)
    };
    let held = super::blocking(work).map_err(|failure| failure.error)??;
    Ok(held.map(|subnets| (note.node.clone(), subnets)))
}

fn node_name(arguments: &Arguments, note: Option<&Remembered>) -> anyhow::Result<NodeName> {
    if let (None, Some(note)) = (&arguments.node_name, note) {
        return Ok(note.node.clone());
    }
    let environment = Environment::of_process();
    let variable = environment
        .variables
        .iter()
        .find(|(name, _)| name == "NODE_NAME")
        .map(|(_, value)| value);
    let given = arguments.node_name.clone();
    let found = given.or_else(|| variable.or(environment.hostname.as_ref())?.to_str().map(str::to_owned));
    let name = found.context("this host has no name: give --node-name")?;
    Ok(NodeName::new(&name)?)
}

/// Removes subnet.env where it names this node's subnets; another program's stays.
fn remove_subnet_env(arguments: &Arguments, note: Option<&Remembered>, own: Subnets, outcome: &mut Outcome) {
    let path = arguments.subnet_file.clone().or_else(|| note?.subnet_file.clone());
    let Some(path) = path else { return };
    let named = subnet_env::previous(&path);
    if named == own && own != Subnets::default() {
        remove(&path, outcome);
    }
}

fn remove_run_files(run_dir: &Path, folder_was_there: bool, outcome: &mut Outcome) {
    // A lease that could not be given back is found by the note when this is done again.
    let note = (!outcome.store_failed).then_some("state.json");
    for name in ["control.sock", "control.new", "state.new"].into_iter().chain(note) {
        remove(&run_dir.join(name), outcome);
    }
    // Only where it is empty: whatever else is in there is not ours.
    if fs::remove_dir(run_dir).is_ok() && folder_was_there {
        outcome.files.push(run_dir.into());
    }
}

/// A folder of states that is not empty belongs to pods, whose end needs the plugin that is named after it.
fn remove_also(paths: &[PathBuf], outcome: &mut Outcome) {
    let before = outcome.failed.len();
    for path in paths {
        remove(path, outcome);
        if outcome.failed.len() > before {
            return;
        }
    }
}

fn remove(path: &Path, outcome: &mut Outcome) {
    let removed = match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => fs::remove_dir(path),
        _ => fs::remove_file(path),
    };
    match removed {
        Ok(()) => outcome.files.push(path.into()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => outcome.failed.push(format!("remove {}: {error}", path.display())),
    }
}

pub(super) fn render(outcome: &Outcome) -> String {
    let Outcome {
        kernel,
        files,
        lease,
        failed,
        store_failed: _,
    } = outcome;
    let mut text = String::new();
    for object in kernel {
        text += &format!("removed {}\n", clean(object, false));
    }
    if let Some(lease) = lease {
        text += &format!("gave the lease back: {}\n", clean(lease, false));
    }
    for file in files {
        text += &format!("removed {}\n", clean(&file.display().to_string(), false));
    }
    for failure in failed {
        text += &wrap(&clean(&format!("still there: {failure}"), false), 0);
    }
    if text.is_empty() {
        text += "nothing of ringmail was here\n";
    }
    text
}
