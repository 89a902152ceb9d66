//! `ringmail run`: sources are opened, the one loop gets a thread of its own, and everything ends at a signal.
//!
//! This thread's small runtime holds what waits for files and sockets: the store, the PSK, the uplink, the control
//! socket. The loop ([`turn`]) holds the kernel. They share latest values ([`tokio::sync::watch`]) and nothing else.

mod answer;
mod books;
mod doubts;
mod extension;
pub mod manager;
mod sockets;
mod sources;
mod troubles;
mod tunnels;
pub mod turn;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, oneshot, watch};
use tracing::{info, warn};

use crate::admin::metrics::PerPeer;
use crate::admin::{self, Remembered, RememberedEtcd, RememberedKube, Single, http};
use crate::config::flags::Environment;
use crate::config::{self, Backend, Flags, NetConf, PskSource, Tuning, check_overlap};
use crate::kernel::netlink::{Netlink, Options};
use crate::lease::Network;
use crate::node::{Node, Settings};
use crate::psk;
use crate::reconcile::Reconciler;
use crate::store::Store;
use crate::store::kube::{Datapath, Kube, Secrets, Troubles};
use crate::uplink::{self, Families};

use manager::{Kept, Manager};
use sockets::Sockets;
use turn::{Inputs, Outputs, Turn};

/// How often the PSK's file is read again, whatever inotify said.
const REREAD: Duration = Duration::from_secs(60);

/// Why a start failed, where the exit code depends on it.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The configuration is wrong.
    #[error("configuration")]
    Configuration(#[source] anyhow::Error),
    /// Something else.
    #[error(transparent)]
    Other(#[from] anyhow::Error),
}

/// Runs until SIGTERM or SIGINT. What it made in the kernel stays.
///
/// `environment` names the service manager, which is told and may have kept sockets over a restart.
pub fn run(flags: &Flags, environment: &Environment) -> Result<(), StartError> {
    let (manager, kept) = (Manager::of(environment), manager::kept(environment));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start the runtime")?;
    let outcome = runtime.block_on(start(flags, manager, kept));
    // A file system that does not answer must not keep the process from ending.
    runtime.shutdown_background();
    outcome
}

async fn start(flags: &Flags, manager: Manager, kept: Kept) -> Result<(), StartError> {
    let wrong = |error: anyhow::Error| StartError::Configuration(error);
    for warning in flags.warnings() {
        warn!("{warning}");
    }
    let _single = Single::claim(&flags.run_dir).context("be this node's only daemon")?;
    let (way, readings) = (http::Loop::default(), http::Readings::default());
    let per_peer = if flags.metrics_peers {
        PerPeer::Shown
    } else {
        PerPeer::Hidden
    };
    for address in flags.http() {
        let listener = http::bind(address).await.map_err(anyhow::Error::from)?;
        tokio::spawn(http::serve(listener, way.clone(), readings.clone(), per_peer));
    }
    let chosen = flags.store().map_err(|e| wrong(e.into()))?;
    let mut flags = flags.clone();
    let mut kube = None;
    let (store, remembered) = match chosen {
        config::Store::Dir(folder) => {
            let store = Store::open_dir(&folder).await.context("open the store")?;
            (store, (Some(absolute(&folder)), None, None))
        }
        config::Store::Etcd(access, lifetime) => {
            info!(endpoints = %access.endpoints, prefix = access.prefix, "leases are in etcd");
            let remembered = RememberedEtcd::of(&access);
            let store = Store::open_etcd(access, lifetime).await.context("open the store")?;
            (store, (None, Some(remembered), None))
        }
        config::Store::Kube(access) => {
            info!(server = %access, prefix = access.keys.prefix(), "leases are on the Nodes of Kubernetes");
            let remembered = RememberedKube::of(&access);
            let opened = Kube::open(access).await.context("open the store")?;
            flags.node_name = opened.node().clone();
            // What an operator says of one Node goes before what the flags say of all.
            let asked = opened.wishes().borrow().uplink;
            flags.public_ip = asked.v4.or(flags.public_ip);
            flags.public_ipv6 = asked.v6.or(flags.public_ipv6);
            kube = Some(opened.clone());
            (Store::Kube(opened), (None, None, Some(remembered)))
        }
    };
    let flags = &flags;
    let stored = sources::stored_conf(flags, &store).await.map_err(wrong)?;
    let conf = sources::net_conf(flags, stored).map_err(wrong)?;
    for warning in &conf.warnings {
        warn!("{warning}");
    }
    let backend = conf.backend.served().map_err(|e| wrong(e.into()))?.clone();
    let secrets = match flags.secret().map_err(|e| wrong(e.into()))? {
        Some((access, secret)) => Some(Secrets::open(&access, secret).await.context("open the Secret")?),
        None => None,
    };
    let keys = sources::first_keys(&backend, &conf.network, secrets.as_ref(), kube.as_ref())
        .await
        .map_err(wrong)?;
    let psks = keys.held;
    let mut uplink = uplink::watch(flags.choice(conf.network), Families::of(&conf.network)).await;
    if let Some(kube) = &kube {
        uplink = sources::advertised(uplink, kube.wishes());
    }
    let chosen = uplink.borrow().clone().context("choose the uplink")?;
    let addresses: Vec<_> = chosen.local.iter().chain(chosen.public.iter()).collect();
    check_overlap(&conf.network, &addresses).map_err(|e| wrong(e.into()))?;
    let chosen_public: Vec<_> = chosen.public.iter().collect();
    info!(uplink = chosen.name, public = %chosen.public, mtu = chosen.mtu, "the uplink is chosen");

    let mut settings = settings(flags, &conf, sources::takes_advertisements(&chosen.name));
    settings.prepared = extension::prepare(settings.plain.as_ref()).await?;
    let network = conf.network;
    let warned = conf.warnings;
    // It may hold a PSK, which is to go when another takes its place.
    drop(conf.backend);
    let (settings_in, settings) = watch::channel(settings);
    let (misconfigured_in, misconfigured) = watch::channel(None);
    let (failed_in, commands_failed) = watch::channel(Vec::new());
    let (holding_in, holding) = watch::channel(None);
    let (health_in, health) = watch::channel(store.health());
    let (command_in, commands) = mpsc::channel(64);
    let (stop_in, stop) = watch::channel(false);
    let (lease_out, lease) = watch::channel(None);
    let (ready_out, mut ready) = watch::channel(false);
    let (datapath_out, datapath) = watch::channel(Datapath::default());
    let (doubts_out, seen) = watch::channel(doubts::Seen::default());
    let (trouble, lease_trouble) = watch::channel(sources::LeaseTrouble::default());
    let troubles = kube.is_some().then(|| troubles::Sources {
        misconfigured: misconfigured.clone(),
        psks: psks.clone(),
        lease: lease_trouble,
        uplink: uplink.clone(),
        commands: commands_failed.clone(),
        seen,
        datapath: datapath.clone(),
    });

    let inputs = Inputs {
        settings,
        roster: store.roster(),
        uplink: uplink.clone(),
        psks: psks.clone(),
        holding,
        health,
        misconfigured,
        commands_failed,
        commands,
        stop,
    };
    let outputs = Outputs {
        lease: lease_out,
        subnet_file: flags.subnet_file.clone(),
        ready: ready_out,
        datapath: datapath_out,
        doubts: doubts_out,
    };
    let listener = admin::listen(&flags.run_dir).context("open the control socket")?;
    let (started_in, started) = oneshot::channel();
    let sockets = Sockets::new(manager.clone(), kept);
    let options = Options { prefer_nft: true };
    let resync = Duration::from_secs(u64::from(flags.iptables_resync.max(1)));
    let thread = std::thread::Builder::new().name("reconcile".into());
    let turning = thread
        .spawn(move || turn_thread(options, inputs, outputs, sockets, resync, started_in))
        .context("start the loop")?;
    started.await.context("the loop ended at its start")??;
    let _ = way.set(command_in.clone());
    tokio::spawn(admin::serve(listener, command_in));

    // The guard stands; now a subnet may be taken.
    let extension = extension::Extension {
        settings: settings_in.subscribe(),
        roster: store.roster(),
        holding: holding_in.subscribe(),
        uplink: uplink.clone(),
        troubles: failed_in,
    };
    let keeper = sources::Keeper {
        node: settings_in.borrow().name.clone(),
        network,
        store: store.clone(),
        psks,
        uplink,
        subnet_file: flags.subnet_file.clone(),
        trouble,
    };
    let note = Remembered {
        lease_dir: remembered.0,
        etcd: remembered.1,
        kube: remembered.2,
        public: chosen_public,
        node: keeper.node.clone(),
        subnets: Vec::new(),
        subnet_file: Some(absolute(&flags.subnet_file)),
    };
    let run_dir = flags.run_dir.clone();
    let keep = tokio::spawn(keeper.keep(holding_in, lease, health_in, note, run_dir));
    tokio::spawn(sources::follow_conf(
        flags.clone(),
        store,
        (backend, warned),
        settings_in,
        (keys.source, keys.sender, secrets),
        misconfigured_in,
    ));
    tokio::spawn(extension.follow());
    if let (Some(kube), Some(troubles)) = (kube.clone(), troubles) {
        let (told, news) = watch::channel(Troubles::new());
        tokio::spawn(troubles.follow(told));
        tokio::spawn(async move { kube.tell(news).await });
    }
    if let Some(kube) = kube.filter(|_| flags.set_node_network_unavailable) {
        tokio::spawn(async move { kube.report(datapath).await });
    }
    let told = manager.clone();
    tokio::spawn(async move {
        if ready.wait_for(|ready| *ready).await.is_ok() {
            info!("ready: lease held, datapath in order, subnet.env written");
            told.ready("serving: `ringmail status` shows the peers");
        }
    });

    let (mut terminated, mut interrupted) = (
        signal(SignalKind::terminate()).context("listen for SIGTERM")?,
        signal(SignalKind::interrupt()).context("listen for SIGINT")?,
    );
    let outcome = tokio::select! {
        _ = terminated.recv() => Ok(()),
        _ = interrupted.recv() => Ok(()),
        kept = keep => kept.context("the lease's task ended").and_then(|kept| kept),
    };
    manager.stopping();
    stop_in.send_replace(true);
    // The loop finishes its turn; it never blocks for long.
    tokio::task::spawn_blocking(move || turning.join()).await.ok();
    Ok(outcome?)
}

/// The thread of the loop: the kernel's sockets are made and used here alone.
fn turn_thread(
    options: Options,
    inputs: Inputs,
    outputs: Outputs,
    sockets: Sockets,
    resync: Duration,
    started: oneshot::Sender<Result<()>>,
) {
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            let _ = started.send(Err(error.into()));
            return;
        }
    };
    runtime.block_on(async {
        let opened = (|| -> Result<_> {
            let mut kernel = Netlink::open(&options)?;
            let settings = inputs.settings.borrow().clone();
            let local = inputs
                .uplink
                .borrow()
                .as_ref()
                .map(|uplink| uplink.local)
                .unwrap_or_default();
            // Without encryption nothing is asked of the kernel's.
            let directed = match settings.plain {
                Some(_) => false,
                None => kernel.preflight(settings.cipher, &local)?.sa_direction,
            };
            let events = kernel.events()?;
            let settings = Settings { directed, ..settings };
            let reconciler = Reconciler::new(kernel, |left| Node::new(settings, left)).context("read the kernel")?;
            Ok((reconciler, events, directed))
        })();
        match opened {
            Ok((reconciler, events, directed)) => {
                Turn::new(reconciler, inputs, outputs, sockets, directed, resync)
                    .run(events, started)
                    .await;
            }
            Err(error) => {
                let _ = started.send(Err(error));
            }
        }
    });
}

/// Reads the keys where `backend` says they are, and follows them; none where it has no use for any.
fn keys_of(backend: &Backend, network: &Network, secrets: Option<&Secrets>) -> watch::Receiver<psk::Held> {
    let none = || watch::channel(psk::Held { set: None, error: None }).1;
    let Some(ipsec) = backend.ipsec() else {
        return none();
    };
    match &ipsec.psk {
        PskSource::File(path) => psk::watch(path.clone(), network.to_string(), REREAD),
        PskSource::Secret(_) => secrets.map_or_else(none, |secrets| secrets.watch(network.to_string())),
        PskSource::Inline(psk) => {
            let set = psk::PskSet::of(psk.clone());
            watch::channel(psk::Held {
                set: Some(set.into()),
                error: None,
            })
            .1
        }
    }
}

/// What the node decides by, from flags and net-conf.json.
fn settings(flags: &Flags, conf: &NetConf, advertisements: bool) -> Settings {
    let (tuning, plain) = match &conf.backend {
        Backend::Ipsec(ipsec) => (ipsec.tuning.clone(), None),
        Backend::Plain(plain) => (Tuning::default(), Some(plain.clone())),
        Backend::Other(_) => (Tuning::default(), None),
    };
    Settings {
        name: flags.node_name.clone(),
        network: conf.network,
        cipher: tuning.cipher,
        encap: tuning.encap,
        rekey_after: tuning.rekey_after,
        rekey: tuning.rekey,
        psk_grace: tuning.psk_grace,
        mtu: tuning.mtu.map(u32::from),
        masquerade: flags.ip_masq,
        random_fully: !flags.ip_masq_fully_random_disable,
        advertisements,
        // What the kernel knows is found by the loop.
        directed: false,
        plain,
        plaintext: tuning.plaintext,
        prepared: None,
        forward: flags.iptables_forward_rules,
        blackhole: flags.ip_blackhole_route,
        nft: conf.nftables,
    }
}

fn absolute(path: &std::path::Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.into())
}

/// Refuses what can't change while the daemon runs.
fn unchangeable(now: &Settings, wanted: &Settings) -> Result<()> {
    if now.network != wanted.network {
        bail!(
            "Network can't change from {} to {} while the daemon runs: stop it, `ringmail cleanup`, start it again",
            now.network,
            wanted.network
        );
    }
    Ok(())
}
