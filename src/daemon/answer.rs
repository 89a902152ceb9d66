//! Answers to what the verbs ask of the running daemon.

use std::collections::BTreeMap;
use std::time::Instant;

use tracing::debug;

use super::turn::Turn;
use crate::admin::metrics::{Measures, Vitals};
use crate::admin::{Command, LeaseReport, Leases, Rotation};
use crate::audit::{Audit, Directory, audit, unread};
use crate::backend::Plain;
use crate::kernel::{Datapath as _, Scope, firewall};
use crate::lease::Completeness;
use crate::node::report::Report;
use crate::reconcile::chain;
use crate::store::Trouble;

/// Answers one command; a reply that nobody waits for is dropped.
pub(super) fn answer(turn: &mut Turn, command: Command) {
    // All but these two go through all peers, and leave as much behind.
    if !matches!(command, Command::Health { .. } | Command::Rotate { .. }) {
        turn.tidy_soon();
    }
    let gone = match command {
        Command::Status { reply } => reply.send(status(turn)).is_err(),
        Command::Audit { reply } => reply.send(compare(turn)).is_err(),
        Command::Rotate { reply } => reply.send(rotate(turn)).is_err(),
        Command::Health { reply } => reply.send(vitals(turn)).is_err(),
        Command::Measure { reply } => reply.send(measure(turn)).is_err(),
        Command::Leases { reply } => reply.send(leases(turn)).is_err(),
    };
    if gone {
        debug!("the asker has gone");
    }
}

fn status(turn: &mut Turn) -> Report {
    let (counters, now) = (turn.reconciler.counters(), turn.now());
    let report = turn.reconciler.node.report(&counters, now);
    completed(turn, report)
}

/// The node's own report with what the loop knows beside it.
fn completed(turn: &mut Turn, mut report: Report) -> Report {
    let (dropped, told) = dropped(turn);
    report.plaintext = dropped;
    report.problems.extend(told);
    let roster = turn.inputs.roster.borrow();
    report.encap_kept = turn.sockets.kept_over_restart();
    report.tunnel = turn.tunnels.counters();
    report.complete = roster.completeness == Completeness::Complete;
    report.rejected.clone_from(roster.rejected());
    drop(roster);
    report.problems.extend(problems(turn));
    report
}

/// What is wrong with the node's sources and its own objects: nothing of peers, and no more work for more of them.
fn problems(turn: &Turn) -> Vec<String> {
    let mut problems = Vec::new();
    let mut problem = |text: String| problems.push(text);
    for scope in [Scope::Node, Scope::Orphans] {
        if let Some(error) = turn.reconciler.failure(&scope) {
            problem(format!("{scope}: {error}"));
        }
    }
    let health = turn.inputs.health.borrow();
    for (what, trouble) in [("read", &health.reading), ("written", &health.writing)] {
        if let Some(trouble) = trouble {
            let lasts = trouble.lasts(Instant::now()).as_secs();
            problem(format!(
                "the store can't be {what} for {lasts} s now: {}",
                trouble.error
            ));
        }
    }
    if let Some(error) = turn.inputs.psks.borrow().error.as_ref() {
        problem(format!("the PSK can't be read, those in use stay: {}", chain(error)));
    }
    if let Err(error) = &*turn.inputs.uplink.borrow() {
        problem(format!("no uplink now: {}", chain(error)));
    }
    if let Some(error) = turn.inputs.misconfigured.borrow().as_ref() {
        problem(format!(
            "the new configuration is refused, the last good one is in force: {error}"
        ));
    }
    let failed = turn.inputs.commands_failed.borrow();
    failed.iter().map(ToString::to_string).for_each(&mut problem);
    let tunnel = turn.tunnels.error().into_iter().chain(&turn.unfit);
    for error in turn
        .sockets
        .error()
        .into_iter()
        .chain(&turn.subnet_env_error)
        .chain(tunnel)
    {
        problem(error.clone());
    }
    problems
}

fn vitals(turn: &mut Turn) -> Vitals {
    let kernel = turn.reconciler.answers().map_err(|error| chain(&error));
    let lacks = turn.reconciler.node.lacks();
    Vitals {
        kernel,
        datapath: turn.datapath(),
        uplink: turn.inputs.uplink.borrow().as_ref().err().map(|error| chain(error)),
        problems: lacks.into_iter().chain(problems(turn)).collect(),
    }
}

/// What the guard has dropped, and what is to be said of it: nothing while that is none.
fn dropped(turn: &mut Turn) -> (Option<firewall::Counters>, Option<String>) {
    match turn.dropped() {
        None => (None, None),
        Some(Ok(dropped)) => (Some(dropped), turn.told_of(&dropped)),
        Some(Err(error)) => (None, Some(unread(&error))),
    }
}

fn measure(turn: &mut Turn) -> Measures {
    let (now, opened) = (turn.now(), turn.books.opened);
    let (report, headroom) = turn.reconciler.read(&mut turn.books.traffic, opened, now);
    let report = completed(turn, report);
    let node = &turn.reconciler.node;
    let health = turn.inputs.health.borrow();
    let lasts = |trouble: &Option<Trouble>| trouble.as_ref().map(|trouble| trouble.lasts(Instant::now()));
    let generations = node.generations();
    Measures {
        report,
        datapath: turn.datapath(),
        tally: turn.reconciler.tally(),
        passes: turn.books.passes.clone(),
        rotations: turn.books.rotations.clone(),
        probes: turn.books.probes,
        probes_left_out: node.left_out(),
        round_trips: node.round_trips().clone(),
        traffic: turn.books.traffic.peers().clone(),
        carried: turn.books.traffic.all(),
        generations: generations
            .map(|(name, generation)| (name.clone(), generation))
            .collect(),
        headroom,
        rekey_after: node.plain().is_none().then_some(node.settings().rekey_after),
        configuration_refused: turn.inputs.misconfigured.borrow().is_some(),
        unread: lasts(&health.reading),
        unwritten: lasts(&health.writing),
        store_failures: health.failures,
    }
}

fn compare(turn: &mut Turn) -> Result<Audit, String> {
    let desired = turn.reconciler.desired();
    let actual = turn.reconciler.kernel().dump().map_err(|error| chain(&error))?;
    let node = &turn.reconciler.node;
    let directory = Directory {
        node: Some(node.settings().name.clone()),
        network: node.settings().network.nets().collect(),
        own: node.subnets().unwrap_or_default(),
        uplink: node.uplink().map(|uplink| (uplink.name.clone(), uplink.index)),
        unencrypted: node.plain().map(Plain::name),
        nodes: node.slots(),
    };
    let (dropped, told) = dropped(turn);
    Ok(Audit {
        dropped,
        dropped_told: told,
        ..audit(&desired, &actual, &directory)
    })
}

fn rotate(turn: &mut Turn) -> Result<Rotation, String> {
    let previous = turn.reconciler.node.epoch();
    match turn.rotate() {
        Some(epoch) if Some(epoch) != previous => Ok(Rotation {
            epoch: epoch.0,
            previous: previous.map(|p| p.0),
        }),
        _ => Err(match turn.reconciler.node.declined() {
            Some(why) => format!("no epoch can begin now: {why}"),
            None => "no epoch can begin now: `ringmail status` says what is missing".into(),
        }),
    }
}

fn leases(turn: &mut Turn) -> Leases {
    let roster = turn.inputs.roster.borrow();
    let node = &turn.reconciler.node;
    let refusals: BTreeMap<_, _> = node
        .refusals()
        .map(|(name, refusal)| (name, refusal.to_string()))
        .collect();
    let own = &node.settings().name;
    let judged: Vec<LeaseReport> = Leases::judged(own, roster.leases(), |name| refusals.get(name).cloned());
    Leases {
        own: Some(own.to_string()),
        complete: roster.completeness == Completeness::Complete,
        leases: judged,
        rejected: roster.rejected().clone(),
    }
}
