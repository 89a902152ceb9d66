//! The udp backend's tunnel, as the plan has it: started once its device stands, started anew when the device or an
//! address goes, stopped under another backend. What it can't do is kept for `status`.

use std::time::Duration;

use tokio::sync::watch;
use tracing::{error, info, warn};

use crate::backend::udp;
use crate::node::plain::TunnelPlan;
use crate::reconcile::chain;
use crate::repeats::Repeats;
use crate::tunnel::{Config, Counters, Features, Routes, State, Tunnel};

/// The first wait before a tunnel that failed is started anew; it doubles up to [`SLOWEST`].
const FIRST: Duration = Duration::from_millis(50);
/// The longest such wait.
const SLOWEST: Duration = Duration::from_secs(2);

/// The one tunnel.
#[derive(Default)]
pub(super) struct Tunnels {
    plan: Option<TunnelPlan>,
    running: Option<Running>,
    error: Option<String>,
    failing: Repeats,
    ended: Repeats,
    wait: Option<Duration>,
    again: Option<Duration>,
}

struct Running {
    tunnel: Tunnel,
    state: watch::Receiver<State>,
    plan: TunnelPlan,
}

impl Tunnels {
    /// Takes what it is to do from now on; none where no tunnel is wanted.
    pub(super) fn plan(&mut self, plan: Option<TunnelPlan>) {
        self.plan = plan;
    }

    /// Brings the tunnel to its plan. `stands` says whether the device is there and up.
    pub(super) fn follow(&mut self, stands: bool, now: Duration) {
        let Some(plan) = self.plan.clone().filter(|_| stands) else {
            let plan = self.plan.take();
            *self = Self {
                plan,
                ..Self::default()
            };
            return;
        };
        if let Some(running) = &mut self.running {
            let state = running.state.borrow_and_update().clone();
            let same = TunnelPlan {
                routes: running.plan.routes.clone(),
                ..plan.clone()
            } == running.plan;
            if state == State::Running && same {
                if running.plan.routes != plan.routes {
                    running.tunnel.set_routes(routes(&plan));
                    running.plan = plan;
                }
                (self.wait, self.error) = (None, None);
                return;
            }
            if state != State::Running
                && let Some(told) = self.ended.failed(&format!("{state:?}"), now)
            {
                warn!(
                    ?state,
                    times = told.times,
                    seconds = told.seconds,
                    "the tunnel has ended; starting it anew"
                );
            }
            self.running = None;
        }
        if self.again.is_some_and(|again| now < again) {
            return;
        }
        match start(&plan) {
            Ok(tunnel) => {
                let told = self.failing.worked(now);
                let (times, seconds) = (told.and_then(|told| told.times), told.and_then(|told| told.seconds));
                info!(port = plan.port, local = %plan.local, times, seconds, "the tunnel runs");
                let state = tunnel.state();
                self.running = Some(Running { tunnel, state, plan });
                (self.error, self.again) = (None, None);
            }
            Err(text) => {
                if let Some(told) = self.failing.failed(&text, now) {
                    error!(
                        error = text,
                        times = told.times,
                        seconds = told.seconds,
                        "the tunnel can't be started; trying again"
                    );
                }
                let wait = self.wait.map_or(FIRST, |wait| (wait * 2).min(SLOWEST));
                (self.wait, self.again, self.error) = (Some(wait), Some(now + wait), Some(text));
            }
        }
    }

    /// When it is to be looked at again of its own accord.
    pub(super) fn deadline(&self) -> Option<Duration> {
        self.again
    }

    /// Waits until a running tunnel ends.
    pub(super) async fn ended(&mut self) {
        let ended = match &mut self.running {
            Some(running) => running.state.changed().await.is_ok(),
            None => false,
        };
        if !ended {
            std::future::pending::<()>().await;
        }
    }

    /// What the tunnel that runs has carried and dropped.
    pub(super) fn counters(&self) -> Option<Counters> {
        self.running.as_ref().map(|running| running.tunnel.counters())
    }

    /// Why there is no tunnel where one is wanted.
    pub(super) fn error(&self) -> Option<&String> {
        self.error.as_ref()
    }
}

fn routes(plan: &TunnelPlan) -> Routes {
    Routes::new(plan.routes.iter().copied()).with_own(plan.own.iter())
}

fn start(plan: &TunnelPlan) -> Result<Tunnel, String> {
    let config = Config {
        device: udp::LINK.into(),
        mtu: plan.mtu,
        local_v4: plan.local.v4,
        local_v6: plan.local.v6,
        port: plan.port,
        inner_v4: plan.bases.v4,
        inner_v6: plan.bases.v6,
        workers: 1,
        features: Features::default(),
    };
    let tunnel = Tunnel::start(config).map_err(|error| chain(&error))?;
    tunnel.set_routes(routes(plan));
    Ok(tunnel)
}
