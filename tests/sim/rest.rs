//! What a mesh comes to: time that passes with nothing lost, and the rest after all events.

use std::time::Duration;

use keys::{EncapMode, Epoch};
use ringmail::kernel::Objects;
use ringmail::node::report::State;

use super::kernel::unborn;
use super::mesh::Mesh;
use super::text;
use super::watch::STUCK;

impl Mesh {
    /// Lets `time` go by, with everyone on time and nothing lost.
    pub(crate) fn run(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.flush();
            let next = (0..self.members.len()).filter_map(|x| self.due(x)).min().unwrap_or(end);
            self.now = next.max(self.now + Duration::from_millis(1)).min(end);
            for x in 0..self.members.len() {
                if self.due(x).is_some_and(|due| due <= self.now) {
                    self.turn(x);
                }
            }
        }
        self.flush();
    }

    /// Whether every node that holds a lease can be heard by the others.
    pub(crate) fn is_heard(&self) -> bool {
        let heard = |x: usize| !self.members[x].away && (self.is_held(x) || !self.views.borrow()[x].present);
        (0..self.members.len()).all(heard)
    }

    /// Delivers all that is under way at this moment.
    pub(crate) fn flush(&mut self) {
        for round in 0.. {
            assert!(round < 200, "the mesh does not come to rest");
            let mut quiet = true;
            for x in 0..self.members.len() {
                for y in 0..self.members.len() {
                    let newest = self.members[y].versions.len();
                    let fresh = self.members[x]
                        .process
                        .as_ref()
                        .is_some_and(|p| p.seen.get(y).copied().unwrap_or(0) < newest);
                    if x != y && fresh && !self.members[x].away {
                        quiet = false;
                        self.read(x, y, newest);
                        self.turn(x);
                    }
                }
                if self.members[x].process.is_some()
                    && self.members[x].kernel.look(|machine| !machine.notices.is_empty())
                {
                    quiet = false;
                    self.turn(x);
                }
            }
            while !self.wire.is_empty() {
                quiet = false;
                self.arrive(0);
            }
            if quiet {
                return;
            }
        }
    }

    /// Events stop: faults end, all runs, everything arrives. Then every pair must be on its newest generation, with
    /// nothing older left, each knowing it of the other.
    pub(crate) fn settle(&mut self) {
        self.tell("settles".into());
        self.catch_up();
        for x in 0..self.members.len() {
            self.members[x].away = false;
            self.members[x].kernel.with(|machine| {
                machine.tardy = false;
                machine.faults.clear();
                machine.cursed.clear();
                machine.blind = 0;
            });
            let present = self.views.borrow()[x].present;
            if present && self.members[x].process.is_none() {
                self.start(x);
            } else if self.members[x].process.is_some() {
                self.hold(x);
                self.turn(x);
            }
        }
        self.run(Duration::from_secs(200));
        let before = self.probes;
        self.run(Duration::from_secs(60));
        let wrong = self.unrest(self.probes - before);
        assert!(wrong.is_empty(), "{STUCK}: {wrong:?}");
    }

    /// What is not as it must be once events have stopped.
    fn unrest(&self, probes: u64) -> Vec<String> {
        let mut wrong = Vec::new();
        let running: Vec<usize> = (0..self.members.len())
            .filter(|x| self.members[*x].process.is_some())
            .collect();
        let pairs = running.len() * running.len().saturating_sub(1);
        // One and its answer each 11.25 s, and one of full size each 45 s at least: a pair that is not settled asks more often.
        // Where the carrier is open: one each 1.5 s, and an answer on each carrier.
        let open = self
            .members
            .iter()
            .any(|member| member.settings.encap.mode == EncapMode::Auto);
        if probes > if open { 124 } else { 16 } * pairs as u64 {
            wrong.push(format!("{probes} probes in a quiet minute of {pairs} directions"));
        }
        for &x in &running {
            let member = &self.members[x];
            let process = member.process.as_ref().expect("it runs");
            let node = &process.reconciler.node;
            wrong.extend(
                process
                    .reconciler
                    .failures()
                    .map(|(scope, why)| format!("{x} fails: {scope}: {why}")),
            );
            let desired: Objects = process
                .reconciler
                .desired()
                .iter()
                .map(|(key, object)| (key.clone(), unborn(object)))
                .collect();
            member.kernel.look(|machine| {
                let difference = text::difference(&desired, &machine.objects);
                if !difference.is_empty() {
                    wrong.push(format!("{x}'s kernel is not as it wants it:\n{difference}"));
                }
                let each = if open { 4 } else { 2 };
                if machine.scene().sas().len() != each * (running.len() - 1) {
                    let all = text::objects(&process.reconciler.desired());
                    wrong.push(format!(
                        "{x} has not the SAs of one generation each way for each peer: {all}"
                    ));
                }
            });
            let epochs: Vec<Epoch> = node.epochs().collect();
            if epochs.len() != 1 {
                wrong.push(format!("{x} keeps the secrets of {epochs:?}"));
            }
            let report = node.report(&Default::default(), self.now - process.began);
            wrong.extend(report.problems.iter().map(|problem| format!("{x}: {problem}")));
            for &y in running.iter().filter(|y| **y != x) {
                let theirs = self.members[y].process.as_ref().expect("it runs");
                let (Some(own), Some(their)) = (node.epoch(), theirs.reconciler.node.epoch()) else {
                    wrong.push(format!("{x} or {y} has no epoch"));
                    continue;
                };
                let newest = format!("{own}>{their}");
                let name = self.members[y].settings.name.as_str();
                let Some(peer) = report.peers.iter().find(|peer| peer.node == name) else {
                    wrong.push(format!("{x} does not know {y}"));
                    continue;
                };
                if (peer.state, &peer.reason, &peer.generation) != (State::Up, &None, &Some(newest.clone())) {
                    let (state, reason, generation) = (peer.state, &peer.reason, &peer.generation);
                    wrong.push(format!(
                        "{x} to {y} is {state:?} on {generation:?}, the newest is {newest}; {reason:?}"
                    ));
                }
                if !self.views.borrow()[x].flows.contains(&y) {
                    wrong.push(format!("{x}'s data does not reach {y}"));
                }
            }
        }
        wrong
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("in {}:", self.title);
            for line in &self.story {
                eprintln!("  {line}");
            }
            for (x, member) in self.members.iter().enumerate() {
                eprintln!("the last operations of {x}:");
                member.kernel.look(|machine| {
                    let last = machine.log.len().saturating_sub(12);
                    for (op, fault) in &machine.log[last..] {
                        eprintln!(
                            "  {}{}",
                            text::op(op),
                            fault.map(|f| format!(" [{f:?}]")).unwrap_or_default()
                        );
                    }
                });
            }
        }
    }
}
