//! Runs the commands of the extension backend, one at a time: no shell, bounded in time, tried again where they fail.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tracing::{error, info};

use super::turn::Holding;
use crate::backend::Plain;
use crate::backend::extension::{Commands, data, input, words};
use crate::lease::{Addresses, Lease, Network, NodeName, Roster, Subnets};
use crate::node::Settings;
use crate::repeats::{self, Repeats};
use crate::uplink::{Uplink, UplinkError};

/// A command that runs longer is ended.
const LONGEST: Duration = Duration::from_secs(120);
/// The wait before what failed is tried again.
const AGAIN: Duration = Duration::from_secs(5);

/// A command's variables, in the names of flannel's documentation.
type Variables = Vec<(&'static str, String)>;

fn variables(network: Option<&Network>, subnets: &Subnets, public: &Addresses) -> Variables {
    let text = |item: Option<String>| item.unwrap_or_default();
    let mut all = vec![
        ("SUBNET", text(subnets.v4.map(|net| net.to_string()))),
        ("IPV6SUBNET", text(subnets.v6.map(|net| net.to_string()))),
        ("PUBLIC_IP", text(public.v4.map(|address| address.to_string()))),
        ("PUBLIC_IPV6", text(public.v6.map(|address| address.to_string()))),
    ];
    if let Some(network) = network {
        all.push(("NETWORK", text(network.v4.map(|range| range.net.to_string()))));
        all.push(("IPV6NETWORK", text(network.v6.map(|range| range.net.to_string()))));
    }
    all
}

/// Runs PreStartupCommand, if there is one: what it prints is to be published.
pub(super) async fn prepare(plain: Option<&Plain>) -> Result<Option<Value>> {
    let Some(Plain::Extension(commands)) = plain else {
        return Ok(None);
    };
    if commands.pre_startup.is_empty() {
        return Ok(None);
    }
    let output = run(&commands.pre_startup, &Variables::new(), "").await;
    Ok(Some(data(&output.context("PreStartupCommand")?)))
}

/// Runs `command` with `variables` in its words and in its environment, and nothing else of ours but PATH.
async fn run(command: &str, variables: &Variables, stdin: &str) -> Result<Vec<u8>> {
    let words = words(command, variables);
    let (program, arguments) = words.split_first().context("the command is empty")?;
    let mut child = Command::new(program)
        .args(arguments)
        .env_clear()
        .envs(std::env::var_os("PATH").map(|path| ("PATH", path)))
        .envs(variables.iter().map(|(name, value)| (*name, value.as_str())))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .with_context(|| {
            format!("start {program:?}: it is run without a shell, so that `;`, `|` and `$( )` mean nothing")
        })?;
    let mut pipe = child.stdin.take().context("its standard input")?;
    let fed = async {
        // A command need not read what it is given.
        let _ = pipe.write_all(stdin.as_bytes()).await;
        drop(pipe);
        child.wait_with_output().await
    };
    let Ok(output) = timeout(LONGEST, fed).await else {
        bail!("{program:?} was ended after {} s", LONGEST.as_secs());
    };
    let output = output.with_context(|| format!("run {program:?}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    let said: String = said.trim().chars().take(200).collect();
    ensure!(output.status.success(), "{program:?}: {}: {said}", output.status);
    Ok(output.stdout)
}

/// What was said of commands that fail: of which, about which peer.
type Failing = BTreeMap<(&'static str, String), Repeats>;

/// What is followed.
pub(super) struct Extension {
    pub(super) settings: watch::Receiver<Settings>,
    pub(super) roster: watch::Receiver<Roster>,
    pub(super) holding: watch::Receiver<Option<Holding>>,
    pub(super) uplink: watch::Receiver<Result<Uplink, UplinkError>>,
    /// Told of every command that has failed and not done since, for `status`.
    pub(super) troubles: watch::Sender<Vec<String>>,
}

impl Extension {
    /// Runs for the daemon's life.
    pub(super) async fn follow(mut self) {
        let mut done: BTreeMap<NodeName, Arc<Lease>> = BTreeMap::new();
        let mut started: Option<Commands> = None;
        let mut failing = Failing::new();
        loop {
            let commands = match &self.settings.borrow_and_update().plain {
                Some(Plain::Extension(commands)) => Some(commands.clone()),
                _ => None,
            };
            let troubles = match &commands {
                Some(commands) => self.round(commands, &mut started, &mut done, &mut failing).await,
                None => {
                    (started, done, failing) = (None, BTreeMap::new(), Failing::new());
                    Vec::new()
                }
            };
            let failed = !troubles.is_empty();
            self.troubles.send_replace(troubles);
            let pause = async {
                match failed {
                    true => sleep(AGAIN).await,
                    false => std::future::pending().await,
                }
            };
            tokio::select! {
                () = pause => {}
                Ok(()) = self.settings.changed() => {}
                Ok(()) = self.roster.changed() => {}
                Ok(()) = self.holding.changed() => {}
            }
        }
    }

    /// Runs what is due; what failed.
    async fn round(
        &mut self,
        commands: &Commands,
        started: &mut Option<Commands>,
        done: &mut BTreeMap<NodeName, Arc<Lease>>,
        failing: &mut Failing,
    ) -> Vec<String> {
        let Some(own) = self.holding.borrow_and_update().as_ref().map(|holding| holding.subnets) else {
            return Vec::new();
        };
        let (network, name) = {
            let settings = self.settings.borrow();
            (settings.network, settings.name.clone())
        };
        let public = self
            .uplink
            .borrow()
            .as_ref()
            .map(|uplink| uplink.public)
            .unwrap_or_default();
        if started.as_ref() != Some(commands) {
            let variables = variables(Some(&network), &own, &public);
            if let Err(trouble) = tell(
                "PostStartupCommand",
                "",
                &commands.post_startup,
                &variables,
                "",
                failing,
            )
            .await
            {
                return vec![trouble];
            }
            *started = Some(commands.clone());
        }
        let wanted: BTreeMap<NodeName, Arc<Lease>> = {
            let roster = self.roster.borrow_and_update();
            let peers = roster
                .leases()
                .filter(|lease| lease.node != name && lease.backend == "extension");
            peers.map(|lease| (lease.node.clone(), lease.clone())).collect()
        };
        let names: BTreeSet<&str> = wanted.keys().chain(done.keys()).map(NodeName::as_str).collect();
        failing.retain(|(_, peer), _| peer.is_empty() || names.contains(peer.as_str()));
        let mut troubles = Vec::new();
        let changed = |name: &NodeName, lease: &Arc<Lease>| wanted.get(name) != Some(lease);
        let gone: Vec<_> = done
            .iter()
            .filter(|(name, lease)| changed(name, lease))
            .map(|(name, _)| name.clone())
            .collect();
        for name in gone {
            let Some(lease) = done.get(&name) else { continue };
            match tell_of("SubnetRemoveCommand", &commands.subnet_remove, lease, failing).await {
                Ok(()) => drop(done.remove(&name)),
                Err(trouble) => troubles.push(trouble),
            }
        }
        for (name, lease) in wanted {
            if done.contains_key(&name) {
                continue;
            }
            match tell_of("SubnetAddCommand", &commands.subnet_add, &lease, failing).await {
                Ok(()) => drop(done.insert(name, lease)),
                Err(trouble) => troubles.push(trouble),
            }
        }
        troubles
    }
}

/// Runs a command about a peer; the error names both.
async fn tell_of(what: &'static str, command: &str, lease: &Lease, failing: &mut Failing) -> Result<(), String> {
    let variables = variables(None, &lease.subnets, &lease.public);
    let input = input(&lease.data.value());
    let told = tell(what, lease.node.as_str(), command, &variables, &input, failing).await;
    told.map_err(|trouble| format!("node {}: {trouble}", lease.node))
}

/// Runs one command, about `peer` where it has a name, and logs what came of it; good also where there is none.
async fn tell(
    what: &'static str,
    peer: &str,
    command: &str,
    variables: &Variables,
    stdin: &str,
    failing: &mut Failing,
) -> Result<(), String> {
    if command.is_empty() {
        return Ok(());
    }
    match run(command, variables, stdin).await {
        Ok(_) => {
            failing.remove(&(what, peer.to_owned()));
            info!(peer, command, ?variables, "{what} has run");
            Ok(())
        }
        Err(error) => {
            let error = format!("{error:#}");
            let repeats = failing.entry((what, peer.to_owned())).or_default();
            if let Some(told) = repeats.failed(&error, repeats::now()) {
                error!(
                    peer,
                    command,
                    error,
                    times = told.times,
                    seconds = told.seconds,
                    "{what} failed; trying again"
                );
            }
            Err(format!(
                "{what} failed and is tried again every {} s: {error}",
                AGAIN.as_secs()
            ))
        }
    }
}
