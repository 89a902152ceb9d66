//! What the loop reads from outside: the configuration as it changes, the node's own lease and its keeping.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use keys::Epoch;
use ring::rand::{SecureRandom as _, SystemRandom};
use tokio::sync::watch;
use tokio::time::sleep;
use tracing::{error, info, warn};
use zeroize::Zeroizing;

use super::turn::Holding;
use super::{keys_of, settings, unchangeable};
use crate::admin::Remembered;
use crate::admission::{self, Refusal};
use crate::config::{Backend, Context, Flags, NetConf, PskSource, subnet_env};
use crate::kernel::sysctl::Sysctl;
use crate::lease::{Lease, Network, NodeName, Subnets};
use crate::node::Settings;
use crate::psk;
use crate::reconcile::chain;
use crate::repeats::{self, Repeats, log_came};
use crate::store::kube::{Kube, Secrets, Troubles, Wishes};
use crate::store::{Claim, Health, Held, Store, StoreError};
use crate::uplink::{Uplink, UplinkError};
use crate::watched::{self, Watched};

/// How often net-conf.json is looked at where it lies outside the store: where inotify watches it, and where it can't.
const LOOK: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(5));
/// How long that file is left to settle after a change: a writer takes several steps.
const SETTLE: Duration = Duration::from_millis(50);
/// The first wait before a failed write to the store is tried again; it doubles up to [`SLOWEST`].
const FIRST: Duration = Duration::from_millis(200);
/// The longest such wait.
const SLOWEST: Duration = Duration::from_secs(30);
/// How often the store's health is looked at.
const PULSE: Duration = Duration::from_secs(1);

/// The configuration: what is `stored`, else the file of `--net-config-path`.
pub(super) fn net_conf(flags: &Flags, stored: Option<String>) -> Result<NetConf> {
    let (psk_file, psk_secret) = (flags.psk_file.as_deref(), flags.psk_secret.as_ref());
    match stored {
        Some(json) => {
            let json = Zeroizing::new(json);
            Ok(NetConf::parse(
                &json,
                &Context {
                    file: "the store's net-conf.json",
                    psk_file,
                    psk_secret,
                },
            )?)
        }
        None => Ok(
            NetConf::load(&flags.net_config_path, psk_file, psk_secret).with_context(|| {
                let file = flags.lease_dir.as_ref().map(|dir| dir.join("net-conf.json"));
                match file {
                    Some(file) => format!("neither {} nor --net-config-path gives a configuration", file.display()),
                    None => "--net-config-path gives no configuration".into(),
                }
            })?,
        ),
    }
}

/// The configuration that the store holds. An etcd without one is waited for, as flannel does, unless a file gives it.
pub(super) async fn stored_conf(flags: &Flags, store: &Store) -> Result<Option<String>> {
    let stored = store.config().await?;
    if stored.is_some() || !matches!(store, Store::Etcd(_)) || flags.net_config_path.exists() {
        return Ok(stored);
    }
    warn!(
        key = format!("{}/config", flags.etcd_prefix),
        "etcd holds no network configuration yet: waiting for it"
    );
    let mut changes = store.config_changes();
    let stored = changes
        .wait_for(Option::is_some)
        .await
        .context("the store has stopped")?;
    Ok(stored.clone())
}

/// Where keys come from, and which are held.
pub(super) struct Keys {
    /// As their source has them.
    pub(super) source: watch::Receiver<psk::Held>,
    /// What the loop uses.
    pub(super) sender: watch::Sender<psk::Held>,
    /// The same.
    pub(super) held: watch::Receiver<psk::Held>,
}

/// The keys of the start: there must be some. A Secret's are waited for, and why is told on the Node of `kube`.
pub(super) async fn first_keys(
    backend: &Backend,
    network: &Network,
    secrets: Option<&Secrets>,
    kube: Option<&Kube>,
) -> Result<Keys> {
    let mut source = keys_of(backend, network, secrets);
    let (told, news) = watch::channel(Troubles::new());
    let (mut telling, mut failing) = (None, Repeats::default());
    if matches!(backend.ipsec().map(|ipsec| &ipsec.psk), Some(PskSource::Secret(_))) {
        loop {
            let held = source.borrow_and_update().clone();
            if held.set.is_some() {
                break;
            }
            if let Some(error) = &held.error {
                let text = chain(error);
                if let Some(told) = failing.failed(&text, repeats::now()) {
                    error!(
                        error = text,
                        times = told.times,
                        seconds = told.seconds,
                        "there is no PSK yet: waiting for it"
                    );
                }
                told.send_replace(super::troubles::of_keys(error).into_iter().collect());
                if let Some(kube) = kube.cloned().filter(|_| telling.is_none()) {
                    let news = news.clone();
                    telling = Some(tokio::spawn(async move { kube.tell(news).await }));
                }
            }
            source.changed().await.context("the runtime ends")?;
        }
        told.send_replace(Troubles::new());
    }
    let held = source.borrow().clone();
    if let (None, Some(error)) = (&held.set, &held.error) {
        return Err(anyhow::Error::new(error.clone()).context("read the PSK"));
    }
    for warning in held.set.iter().flat_map(|set| &set.warnings) {
        warn!("{warning}");
    }
    let (sender, held) = watch::channel(held);
    Ok(Keys { source, sender, held })
}

/// Whether `link` takes router advertisements now: when IPv6 forwarding goes on, the kernel stops taking them unless
/// told otherwise, and the default route that came by one would run out.
pub(super) fn takes_advertisements(link: &str) -> bool {
    let path = format!("net/ipv6/conf/{link}/accept_ra");
    matches!(Sysctl::new(path, "2").read().as_deref(), Ok("1" | "2"))
}

/// The uplink, with the addresses that the operator wants advertised in the place of its own.
pub(super) fn advertised(
    mut uplink: watch::Receiver<Result<Uplink, UplinkError>>,
    mut wishes: watch::Receiver<Wishes>,
) -> watch::Receiver<Result<Uplink, UplinkError>> {
    let merged = |uplink: &Result<Uplink, UplinkError>, wishes: &Wishes| {
        let mut uplink = uplink.clone();
        if let Ok(uplink) = &mut uplink {
            let public = &mut uplink.public;
            public.v4 = public.v4.map(|own| wishes.advertised.v4.unwrap_or(own));
            public.v6 = public.v6.map(|own| wishes.advertised.v6.unwrap_or(own));
        }
        uplink
    };
    let first = merged(&uplink.borrow_and_update(), &wishes.borrow_and_update());
    let (sender, receiver) = watch::channel(first);
    tokio::spawn(async move {
        loop {
            tokio::select! {
                () = sender.closed() => return,
                changed = uplink.changed() => if changed.is_err() { return },
                Ok(()) = wishes.changed() => {}
            }
            let now = merged(&uplink.borrow_and_update(), &wishes.borrow_and_update());
            drop(sender.send_replace(now));
        }
    });
    receiver
}

/// Follows the configuration and the keys: what may change does, what may not is refused with the reason, and the last
/// good one stays in force. `warned` is what the configuration of the start has been warned of.
pub(super) async fn follow_conf(
    flags: Flags,
    store: Store,
    (mut backend, mut warned): (Backend, Vec<String>),
    current: watch::Sender<Settings>,
    (mut source, keys, secrets): (watch::Receiver<psk::Held>, watch::Sender<psk::Held>, Option<Secrets>),
    misconfigured: watch::Sender<Option<String>>,
) {
    let mut changes = store.config_changes();
    let network = current.borrow().network;
    let mut file = Watched::new(&flags.net_config_path);
    let mut refused = Repeats::default();
    loop {
        tokio::select! {
            changed = changes.changed() => if changed.is_err() { return },
            () = watched::changed(file.as_ref()) => sleep(SETTLE).await,
            Ok(()) = source.changed() => {
                keys.send_replace(source.borrow_and_update().clone());
                continue;
            }
            () = sleep(if file.is_some() { LOOK.0 } else { LOOK.1 }) => {}
        }
        // Watched before it is read; what the path leads to may be another file now.
        file = Watched::new(&flags.net_config_path);
        // As it was read last: a store that does not answer must not keep new keys from being taken.
        let stored = changes.borrow_and_update().clone();
        let read = net_conf(&flags, stored).and_then(|mut conf| {
            for warning in fresh(&mut warned, std::mem::take(&mut conf.warnings)) {
                warn!("{warning}");
            }
            conf.backend.served()?;
            let advertisements = current.borrow().advertisements;
            let wanted = settings(&flags, &conf, advertisements);
            unchangeable(&current.borrow(), &wanted)?;
            Ok((wanted, conf.backend))
        });
        let read = match read {
            Ok((wanted, newer)) => prepared(wanted, &current).await.map(|wanted| (wanted, newer)),
            Err(error) => Err(error),
        };
        let error = match read {
            Ok((wanted, newer)) => {
                if !same_source(&newer, &backend) {
                    source = keys_of(&newer, &network, secrets.as_ref());
                    keys.send_replace(source.borrow_and_update().clone());
                }
                backend = newer;
                let changed = current.send_if_modified(|now| {
                    let differs = *now != wanted;
                    *now = wanted;
                    differs
                });
                if changed {
                    info!("the new configuration is in force");
                }
                None
            }
            Err(error) => Some(format!("{error:#}")),
        };
        log_came!(
            refused.came(error.as_deref(), repeats::now()),
            error,
            [],
            "the new configuration is refused; the last good one stays in force",
            "the configuration is right again"
        );
        misconfigured.send_if_modified(|before| {
            let differs = *before != error;
            *before = error;
            differs
        });
    }
}

/// What of `now` was not warned of before; `warned` is `now` then, so that what was put right and comes back is news.
fn fresh(warned: &mut Vec<String>, now: Vec<String>) -> Vec<String> {
    let fresh = now
        .iter()
        .filter(|warning| !warned.contains(warning))
        .cloned()
        .collect();
    *warned = now;
    fresh
}

/// `wanted`, with what the operator's command prepares; not run again while the command is the same.
async fn prepared(wanted: Settings, current: &watch::Sender<Settings>) -> Result<Settings> {
    let kept = {
        let now = current.borrow();
        (now.plain == wanted.plain).then(|| now.prepared.clone())
    };
    let prepared = match kept {
        Some(kept) => kept,
        None => super::extension::prepare(wanted.plain.as_ref()).await?,
    };
    Ok(Settings { prepared, ..wanted })
}

fn same_source(a: &Backend, b: &Backend) -> bool {
    let (Some(a), Some(b)) = (a.ipsec(), b.ipsec()) else {
        return a.ipsec().is_none() && b.ipsec().is_none();
    };
    match (&a.psk, &b.psk) {
        (PskSource::File(a), PskSource::File(b)) => a == b,
        (PskSource::Secret(a), PskSource::Secret(b)) => a == b,
        (PskSource::Inline(a), PskSource::Inline(b)) => a.kid() == b.kid(),
        (PskSource::File(_) | PskSource::Secret(_) | PskSource::Inline(_), _) => false,
    }
}

/// Keeps the node's lease: takes a subnet, publishes what the loop says, publishes again what is lost.
pub(super) struct Keeper {
    pub(super) node: NodeName,
    pub(super) network: Network,
    pub(super) store: Store,
    pub(super) psks: watch::Receiver<psk::Held>,
    pub(super) uplink: watch::Receiver<Result<Uplink, UplinkError>>,
    pub(super) subnet_file: PathBuf,
    /// What is wrong with the lease.
    pub(super) trouble: watch::Sender<LeaseTrouble>,
}

/// What is wrong with the own lease.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct LeaseTrouble {
    /// The subnet is another by now, and the lease does not say so yet.
    pub(super) moved: Option<String>,
    /// It can't be taken or published; not where the store is away.
    pub(super) refused: Option<String>,
}

impl Keeper {
    /// Runs for the daemon's life; ends only where no lease can ever be had.
    pub(super) async fn keep(
        self,
        holding: watch::Sender<Option<Holding>>,
        mut lease: watch::Receiver<Option<Lease>>,
        health: watch::Sender<Health>,
        mut note: Remembered,
        run_dir: PathBuf,
    ) -> Result<()> {
        let mut held = self.hold(&holding, &health, &mut note, &run_dir).await?;
        let mut roster = self.store.roster();
        let (mut wait, mut failing) = (FIRST, Repeats::default());
        loop {
            // The loop may not have heard yet that the node's subnet is another.
            let wanted = lease.borrow_and_update().clone().filter(|lease| lease.subnets == held);
            let stored = roster
                .borrow_and_update()
                .get(&self.node)
                .map(|held| Lease::clone(held));
            let outcome = match &wanted {
                // After a failure also where the lease has come back by itself: only a call that succeeds ends it.
                Some(wanted) if stored.as_ref() != Some(wanted) || failing.lasts() => {
                    self.pulsing(&health, self.store.publish(wanted)).await.map(|()| {
                        let told = failing.worked(repeats::now());
                        let (times, seconds) = (told.and_then(|told| told.times), told.and_then(|told| told.seconds));
                        info!(lease = %wanted.subnets, times, seconds, "published");
                    })
                }
                _ => Ok(()),
            };
            let again = match outcome {
                Ok(()) => {
                    (wait, failing) = (FIRST, Repeats::default());
                    if wanted.is_some() {
                        let right = LeaseTrouble::default();
                        let replaced = |before: &mut LeaseTrouble| std::mem::replace(before, right.clone()) != right;
                        self.trouble.send_if_modified(replaced);
                    }
                    None
                }
                // The loop then says another lease.
                Err(moved @ StoreError::Moved { .. }) => {
                    warn!("{moved}");
                    self.trouble
                        .send_modify(|trouble| trouble.moved = Some(moved.to_string()));
                    held = self.hold(&holding, &health, &mut note, &run_dir).await?;
                    (wait, failing) = (FIRST, Repeats::default());
                    None
                }
                Err(error) => {
                    let text = chain(&error);
                    if let Some(told) = failing.failed(&text, repeats::now()) {
                        error!(
                            error = text,
                            times = told.times,
                            seconds = told.seconds,
                            "the lease can't be published; trying again"
                        );
                    }
                    self.failed(&error, &text);
                    let now = wait;
                    wait = (wait * 2).min(SLOWEST);
                    Some(now)
                }
            };
            self.pulse(&health);
            let pause = async {
                match again {
                    Some(wait) => sleep(wait).await,
                    None => std::future::pending().await,
                }
            };
            tokio::pin!(pause);
            loop {
                tokio::select! {
                    () = &mut pause => break,
                    Ok(()) = lease.changed() => break,
                    Ok(()) = roster.changed(), if again.is_none() => break,
                    () = sleep(PULSE) => self.pulse(&health),
                }
            }
        }
    }

    /// Takes a subnet and tells the loop.
    async fn hold(
        &self,
        holding: &watch::Sender<Option<Holding>>,
        health: &watch::Sender<Health>,
        note: &mut Remembered,
        run_dir: &Path,
    ) -> Result<Subnets> {
        let held = self.acquire(health).await?;
        note.subnets = held.subnets.iter().collect();
        if let Err(error) = note.write(run_dir) {
            warn!(error = chain(&error), "`ringmail cleanup` will need --lease-dir");
        }
        info!(subnets = %held.subnets, "holding a lease");
        let previous = self.previous(&held);
        holding.send_replace(Some(Holding {
            subnets: held.subnets,
            slot: held.slot,
            previous,
            lease: held.previous.clone().map(Arc::new),
        }));
        Ok(held.subnets)
    }

    /// Awaits a call of the store, which may take as long as its file system likes, and goes on telling of its health.
    async fn pulsing<T>(&self, health: &watch::Sender<Health>, call: impl Future<Output = T>) -> T {
        tokio::pin!(call);
        loop {
            tokio::select! {
                outcome = &mut call => return outcome,
                () = sleep(PULSE) => self.pulse(health),
            }
        }
    }

    /// A call of the store failed; that it is away is told by its health.
    fn failed(&self, error: &StoreError, text: &str) {
        if !matches!(error, StoreError::KubeAway { .. }) {
            self.trouble
                .send_modify(|trouble| trouble.refused = Some(text.to_owned()));
        }
    }

    fn pulse(&self, health: &watch::Sender<Health>) {
        let now = self.store.health();
        health.send_if_modified(|before| {
            let differs = *before != now;
            *before = now;
            differs
        });
    }

    async fn acquire(&self, health: &watch::Sender<Health>) -> Result<Held> {
        let previous = subnet_env::previous(&self.subnet_file);
        let previous = (previous.iter().next().is_some()).then_some(previous);
        let (mut wait, mut failing) = (FIRST, Repeats::default());
        loop {
            let mut random = [0; 8];
            SystemRandom::new()
                .fill(&mut random)
                .ok()
                .context("draw a random number")?;
            let public = self
                .uplink
                .borrow()
                .as_ref()
                .map(|uplink| uplink.public)
                .unwrap_or_default();
            let claim = Claim {
                previous,
                public,
                random: u64::from_be_bytes(random),
            };
            let acquired = self.store.acquire(&self.node, &self.network, &claim);
            match self.pulsing(health, acquired).await {
                Ok(held) => return Ok(held),
                Err(error) if !error.is_transient() => return Err(error).context("take a subnet"),
                Err(error) => {
                    let text = chain(&error);
                    if let Some(told) = failing.failed(&text, repeats::now()) {
                        error!(
                            error = text,
                            times = told.times,
                            seconds = told.seconds,
                            "no subnet can be taken; trying again"
                        );
                    }
                    self.failed(&error, &text);
                }
            }
            self.pulse(health);
            sleep(wait).await;
            wait = (wait * 2).min(SLOWEST);
        }
    }

    /// The epoch that an earlier process published, where the statement is truly ours: a forged one could name a
    /// number that leaves none above it.
    fn previous(&self, held: &Held) -> Option<Epoch> {
        let lease = held.previous.as_ref()?;
        let set = self.psks.borrow().set.clone()?;
        match admission::verify(lease, &self.network, &set.psks) {
            Ok(admitted) => Some(admitted.statement.epoch),
            Err(Refusal::Silent) => None,
            Err(refusal) => {
                warn!(reason = %refusal, "the lease that the store had of this node is not believed");
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_warning_is_news_once_and_again_after_it_was_put_right() {
        let mut warned = vec!["of the start".to_owned()];
        let mut read = |now: &[&str]| fresh(&mut warned, now.iter().map(ToString::to_string).collect());
        assert_eq!(read(&["of the start", "a typo"]), ["a typo"]);
        assert!(read(&["of the start", "a typo"]).is_empty(), "it is read every 30 s");
        assert!(read(&["of the start"]).is_empty());
        assert_eq!(read(&["another", "a typo"]), ["another", "a typo"]);
    }
}
