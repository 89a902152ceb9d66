//! `ringmail rotate`: a new epoch now, and the wait until data goes on it.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use clap::Args;
use serde::Serialize;

use super::table::{clean, count, wrap};
use super::{Common, Failure, Shown, status};
use crate::admin::{Request, Rotation, ask};
use crate::node::report::{PeerReport, Report, State};

/// How long data may take to move.
const PATIENCE: Duration = Duration::from_secs(10);

/// How often the daemon is asked whether it has.
const BETWEEN: Duration = Duration::from_millis(200);

/// Begin a new epoch, so new keys, now.
#[derive(Debug, Args)]
#[command(after_help = "\
No packet is lost by it. Waits up to 10 seconds until the data to every peer that is served goes on the new epoch.

Exit code: 0 where all of it has moved, else 1: it goes on by itself, see `ringmail status`.")]
pub struct Arguments {
    #[command(flatten)]
    common: Common,
}

/// What came of a rotation.
#[derive(Debug, Serialize)]
pub(super) struct Outcome {
    epoch: u64,
    previous: Option<u64>,
    /// Peers whose data goes on the new epoch.
    moved: Vec<String>,
    /// Peers that were served before and whose data does not go on it yet.
    waiting: Vec<String>,
}

pub(super) fn run(Arguments { common }: &Arguments) -> Result<Shown, Failure> {
    let served = served(&status::fetch(&common.run_dir)?);
    let answer = ask(&common.run_dir, Request::Rotate).map_err(Failure::other)?;
    let rotation: Rotation = serde_json::from_value(answer).map_err(Failure::other)?;
    let deadline = Instant::now() + PATIENCE;
    let outcome = loop {
        let outcome = judge(&rotation, &served, &status::fetch(&common.run_dir)?);
        if outcome.waiting.is_empty() || Instant::now() >= deadline {
            break outcome;
        }
        std::thread::sleep(BETWEEN);
    };
    let well = outcome.waiting.is_empty();
    Ok(if common.json {
        Shown::json(&outcome, well)
    } else {
        Shown::text(render(&outcome), well)
    })
}

/// The peers that data goes to.
fn served(report: &Report) -> BTreeSet<String> {
    let goes = |peer: &&PeerReport| matches!(peer.state, State::Up | State::Moving);
    report.peers.iter().filter(goes).map(|peer| peer.node.clone()).collect()
}

/// Which of `served` have moved by `report`. One that has left the mesh since is in neither list.
pub(super) fn judge(rotation: &Rotation, served: &BTreeSet<String>, report: &Report) -> Outcome {
    let (mut moved, mut waiting) = (Vec::new(), Vec::new());
    for peer in report.peers.iter().filter(|peer| served.contains(&peer.node)) {
        // A generation reads "own epoch>peer's epoch"; a later rotation counts as well.
        let own = peer
            .generation
            .as_deref()
            .and_then(|text| text.split('>').next()?.parse::<u64>().ok());
        let list = if own.is_some_and(|own| own >= rotation.epoch) {
            &mut moved
        } else {
            &mut waiting
        };
        list.push(peer.node.clone());
    }
    Outcome {
        epoch: rotation.epoch,
        previous: rotation.previous,
        moved,
        waiting,
    }
}

pub(super) fn render(outcome: &Outcome) -> String {
    let Outcome {
        epoch,
        previous,
        moved,
        waiting,
    } = outcome;
    let after = previous
        .map(|previous| format!(" after {previous}"))
        .unwrap_or_default();
    let moving = match (moved.len(), waiting.len()) {
        (0, 0) => "no peer was served, so no data had to move".to_owned(),
        (n, 0) => format!("the data to {} goes on it", count(n, "peer")),
        (n, m) => format!(
            "after {} s the data to {} of {} goes on it, not yet to {}: it goes on by itself; `ringmail status` says why \
             it takes so long",
            PATIENCE.as_secs(),
            n,
            count(n + m, "peer"),
            waiting.join(", ")
        ),
    };
    wrap(&clean(&format!("epoch {epoch} has begun{after}; {moving}"), false), 0)
}
