//! Runs the commands of the extension backend, one at a time: no shell, bounded in time, tried again where they fail.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
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
use crate::reconcile::chain;
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

/// Why a command has not done what it is for.
#[derive(Debug, thiserror::Error)]
enum CommandError {
    #[error("the command is empty")]
    Empty,
    #[error("start {program:?}: it is run without a shell, so that `;`, `|` and `$( )` mean nothing")]
    Start {
        program: String,
        #[source]
        source: io::Error,
    },
    #[error("run {program:?}")]
    Run {
        program: String,
        #[source]
        source: io::Error,
    },
    #[error("{program:?} was ended after {} s", LONGEST.as_secs())]
    Long { program: String },
    #[error("{program:?}: {status}: {said}")]
    Status {
        program: String,
        status: ExitStatus,
        said: String,
    },
}

impl CommandError {
    /// Without what the command printed, which may be anything, and other every time.
    fn brief(&self) -> String {
        match self {
            Self::Status { program, status, .. } => format!("{program:?}: {status}"),
            Self::Empty | Self::Start { .. } | Self::Run { .. } | Self::Long { .. } => chain(self),
        }
    }
}

/// A command that has failed and not done since.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct CommandFailed {
    /// The key that it is under.
    pub(super) what: &'static str,
    /// The node that it is about; empty where it is about none.
    pub(super) peer: String,
    pub(super) error: String,
    /// Without what it printed.
    pub(super) brief: String,
}

impl fmt::Display for CommandFailed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.peer.is_empty() {
            write!(f, "node {}: ", self.peer)?;
        }
        let (what, seconds, error) = (self.what, AGAIN.as_secs(), &self.error);
        write!(f, "{what} failed and is tried again every {seconds} s: {error}")
    }
}

/// What is told of `failed` on the Node, where many can read it: not what a command printed. It stays the same while the
/// first that fails does so in the same way.
pub(super) fn told(failed: &[CommandFailed]) -> Option<String> {
    let first = failed.first()?;
    let others = if failed.len() > 1 { " and others" } else { "" };
    let about = match first.peer.as_str() {
        "" => String::new(),
        peer => format!(" for node {peer}{others}"),
    };
    Some(format!(
        "{} fails{about}, and is tried again every {} s: {}; `ringmail status` on this node has what it printed",
        first.what,
        AGAIN.as_secs(),
        first.brief
    ))
}

/// Runs `command` with `variables` in its words and in its environment, and nothing else of ours but PATH.
async fn run(command: &str, variables: &Variables, stdin: &str) -> Result<Vec<u8>, CommandError> {
    let words = words(command, variables);
    let (program, arguments) = words.split_first().ok_or(CommandError::Empty)?;
    let named = || program.clone();
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
        .map_err(|source| CommandError::Start {
            program: named(),
            source,
        })?;
    let pipe = child.stdin.take();
    let fed = async {
        // A command need not read what it is given.
        if let Some(mut pipe) = pipe {
            let _ = pipe.write_all(stdin.as_bytes()).await;
        }
        child.wait_with_output().await
    };
    let Ok(output) = timeout(LONGEST, fed).await else {
        return Err(CommandError::Long { program: named() });
    };
    let output = output.map_err(|source| CommandError::Run {
        program: named(),
        source,
    })?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(CommandError::Status {
        program: named(),
        status: output.status,
        said: said.trim().chars().take(200).collect(),
    })
}

/// What was said of commands that fail: of which, about which peer.
type Failing = BTreeMap<(&'static str, String), Repeats>;

/// What is followed.
pub(super) struct Extension {
    pub(super) settings: watch::Receiver<Settings>,
    pub(super) roster: watch::Receiver<Roster>,
    pub(super) holding: watch::Receiver<Option<Holding>>,
    pub(super) uplink: watch::Receiver<Result<Uplink, UplinkError>>,
    /// Told of every command that has failed and not done since.
    pub(super) troubles: watch::Sender<Vec<CommandFailed>>,
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
    ) -> Vec<CommandFailed> {
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

/// Runs a command about a peer.
async fn tell_of(what: &'static str, command: &str, lease: &Lease, failing: &mut Failing) -> Result<(), CommandFailed> {
    let variables = variables(None, &lease.subnets, &lease.public);
    let input = input(&lease.data.value());
    tell(what, lease.node.as_str(), command, &variables, &input, failing).await
}

/// Runs one command, about `peer` where it has a name, and logs what came of it; good also where there is none.
async fn tell(
    what: &'static str,
    peer: &str,
    command: &str,
    variables: &Variables,
    stdin: &str,
    failing: &mut Failing,
) -> Result<(), CommandFailed> {
    if command.is_empty() {
        return Ok(());
    }
    match run(command, variables, stdin).await {
        Ok(_) => {
            failing.remove(&(what, peer.to_owned()));
            info!(peer, command, ?variables, "{what} has run");
            Ok(())
        }
        Err(wrong) => {
            let error = chain(&wrong);
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
            Err(CommandFailed {
                what,
                peer: peer.to_owned(),
                brief: wrong.brief(),
                error,
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn failed(peer: &str, command: &str) -> CommandFailed {
        let (none, mut failing) = (Variables::new(), Failing::new());
        let outcome = tell("SubnetAddCommand", peer, command, &none, "", &mut failing);
        outcome.await.expect_err("it fails")
    }

    #[tokio::test]
    async fn what_a_command_printed_is_in_status_and_not_on_the_node() {
        let refused = failed("b", "/bin/ls /the/secret").await;
        let told = |all: &[CommandFailed]| told(all).expect("it is told");
        let text = "SubnetAddCommand fails for node b, and is tried again every 5 s: \"/bin/ls\": exit status: 2; \
                    `ringmail status` on this node has what it printed";
        assert_eq!(told(std::slice::from_ref(&refused)), text);
        let status = refused.to_string();
        let begins = "node b: SubnetAddCommand failed and is tried again every 5 s: \"/bin/ls\": exit status: 2: ";
        assert!(status.starts_with(begins) && status.contains("/the/secret"), "{status}");
        let all = [refused, failed("c", "/bin/false").await];
        assert_eq!(told(&all), text.replace("node b", "node b and others"));
        let absent = told(&[failed("", "/no/program").await]);
        assert!(
            absent
                .starts_with("SubnetAddCommand fails, and is tried again every 5 s: start \"/no/program\": it is run"),
            "{absent}"
        );
        assert_eq!(super::told(&[]), None);
    }
}
