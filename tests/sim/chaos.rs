//! All that can happen to a mesh, in an order that a seed tells.

use std::time::Duration;

use keys::{Carrier, EncapMode};
use ringmail::kernel::{Event, Kind, Object};
use ringmail::node::Cause;

use super::kernel::Fault;
use super::make::{self, Families};
use super::mesh::Mesh;

/// Numbers that a seed tells (xorshift64*, Vigna 2016).
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// A number below `end`.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        let number = self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33;
        usize::try_from(number).expect("31 bits") % end
    }

    pub(crate) fn one_in(&mut self, chances: usize) -> bool {
        self.below(chances) == 0
    }
}

/// A mesh that things happen to.
pub(crate) struct Chaos {
    pub(crate) mesh: Mesh,
    dice: Dice,
    /// The newest PSK's number.
    psk: u8,
    /// The last octet of the next new public address.
    address: u8,
    /// Where it tells what the wire drops, apart from all else.
    weather: Option<Dice>,
    /// How often each kind of event came.
    pub(crate) count: std::collections::BTreeMap<&'static str, usize>,
}

impl Chaos {
    pub(crate) fn new(seed: u64, nodes: u32) -> Self {
        let mut dice = Dice::new(seed);
        let families = Families::ALL[dice.below(3)];
        let mut mesh = Mesh::new(&format!("RINGMAIL_SEED={seed}, {families:?}"), families);
        for _ in 0..nodes {
            mesh.add();
        }
        Self {
            mesh,
            dice,
            psk: 1,
            address: 100,
            weather: None,
            count: Default::default(),
        }
    }

    /// A mesh of nodes that leave the carrier open, on a wire that drops now one and now the other.
    pub(crate) fn open(seed: u64, nodes: u32) -> Self {
        let mut chaos = Self::new(seed, nodes);
        chaos.weather = Some(Dice::new(seed + 1));
        for member in &mut chaos.mesh.members {
            member.settings.encap.mode = EncapMode::Auto;
        }
        chaos
    }

    /// What the wire drops changes.
    fn blow(&mut self) {
        let Some(weather) = &mut self.weather else { return };
        if weather.one_in(20) {
            let nodes = self.mesh.members.len();
            let carrier = [Carrier::Esp, Carrier::Esp, Carrier::Udp][weather.below(3)];
            let from = weather.below(nodes);
            let way = (from, (from + 1 + weather.below(nodes - 1)) % nodes, carrier);
            if !self.mesh.blocked.remove(&way) {
                self.mesh.blocked.insert(way);
            }
            let what = format!("dropped on the wire: {:?}", self.mesh.blocked);
            self.mesh.tell(what);
            *self.count.entry("weather").or_default() += 1;
        }
    }

    /// One thing happens.
    pub(crate) fn step(&mut self) {
        self.blow();
        let what = std::iter::repeat_with(|| self.attempt()).find(|what| *what != "nothing");
        *self.count.entry(what.expect("something does")).or_default() += 1;
    }

    fn attempt(&mut self) -> &'static str {
        let x = self.dice.below(self.mesh.members.len());
        let running = self.mesh.members[x].process.is_some();
        let mut what = "nothing";
        match self.dice.below(100) {
            0..30 => what = self.travel(),
            30..52 => what = self.read(x),
            52..80 => {
                let most = [5, 60, 400, 2_000, 6_000, 20_000][self.dice.below(6)];
                let time = self.dice.below(most) as u64 + 1;
                self.mesh.wait(Duration::from_millis(time));
                what = "time";
            }
            80 if self.dice.one_in(4) => {
                let time = Duration::from_secs(64);
                self.mesh.tell("64 s pass".into());
                self.mesh.wait(time);
                what = "long time";
            }
            80 if self.dice.one_in(4) && self.mesh.is_heard() => {
                // Longer than a silent peer is waited for: nobody may be silent then.
                self.mesh.tell("700 s pass on time".into());
                self.mesh.run(Duration::from_secs(700));
                what = "very long time";
            }
            81..84 if running => {
                let cause = [Cause::Asked, Cause::Aged][self.dice.below(2)];
                self.mesh.rotate(x, cause);
                what = "rotation";
            }
            84..87 if !running => what = self.begin(x),
            84 if running => {
                self.mesh.stop(x);
                what = "stop";
            }
            87..89 if running => {
                self.mesh.stop(x);
                self.begin(x);
                what = "restart";
            }
            89 if running && self.dice.one_in(2) => {
                self.mesh.reboot(x);
                if self.dice.one_in(2) {
                    self.begin(x);
                }
                what = "reboot";
            }
            90 if self.dice.one_in(4) => {
                self.mesh.leave(x);
                what = "leave";
            }
            91..93 => what = self.rekey(x),
            93 if running => what = self.move_to_new_address(x),
            94 | 95 if running => what = self.hurt(x),
            96..99 if running => what = self.fail(x),
            _ => {}
        }
        what
    }

    /// A probe arrives, or is lost.
    fn travel(&mut self) -> &'static str {
        if self.mesh.wire.is_empty() {
            return "nothing";
        }
        let at = self.dice.below(self.mesh.wire.len());
        if self.dice.one_in(5) {
            self.mesh.wire.swap_remove(at);
            return "probe lost";
        }
        self.mesh.arrive(at);
        "probe"
    }

    /// The store tells one node of another, or of its own lease.
    fn read(&mut self, x: usize) -> &'static str {
        if self.mesh.members[x].process.is_none() {
            return "nothing";
        }
        let y = self.dice.below(self.mesh.members.len());
        if x == y && !self.mesh.is_held(x) {
            self.mesh.tell(format!("{x} holds its subnet"));
            self.mesh.hold(x);
        } else {
            // Changes come in their order, some of them as one.
            let seen = self.mesh.members[x]
                .process
                .as_ref()
                .map_or(0, |process| process.seen.get(y).copied().unwrap_or(0));
            let behind = self.mesh.members[y].versions.len().saturating_sub(seen);
            if x == y || behind == 0 {
                return "nothing";
            }
            let version = seen.max(self.mesh.members[y].bygone.min(seen + behind - 1)) + 1 + self.dice.below(2);
            self.mesh.tell(format!("{x} reads version {version} of {y}"));
            self.mesh.read(x, y, version);
        }
        self.mesh.turn(x);
        "read"
    }

    /// A daemon starts; what it reads first may be stale.
    fn begin(&mut self, x: usize) -> &'static str {
        self.mesh.boot(x);
        let late = self.dice.one_in(3);
        if !late {
            self.mesh.hold(x);
        }
        for y in 0..self.mesh.members.len() {
            let (oldest, newest) = (self.mesh.members[y].bygone + 1, self.mesh.members[y].versions.len());
            if oldest > newest {
                self.mesh.read(x, y, usize::MAX);
            } else if !self.dice.one_in(4) {
                let version = oldest + self.dice.below(newest + 1 - oldest);
                self.mesh.read(x, y, version);
            }
        }
        self.mesh.turn(x);
        "start"
    }

    /// A PSK file changes: a new key comes in front of the old; the old goes once every lease lists the new.
    fn rekey(&mut self, x: usize) -> &'static str {
        let mesh = &mut self.mesh;
        let psk = |number| make::psk(number, &mesh.network);
        let newest = psk(self.psk).kid();
        let listed = |lease: &ringmail::lease::Lease| {
            ringmail::admission::verify(lease, &mesh.network, &[psk(self.psk)]).is_ok()
        };
        let everyone = mesh.members.iter().all(|m| m.psks[0].kid() == newest);
        let mut leases = mesh.members.iter().filter_map(|m| m.versions.last()?.as_ref());
        let known = (0..mesh.members.len()).all(|y| {
            let newest = mesh.members[y].versions.len();
            let process = mesh.members[x].process.as_ref();
            x == y || process.is_some_and(|p| p.seen.get(y).copied().unwrap_or(0) == newest)
        });
        let all_list = everyone && leases.all(listed);
        let what;
        if mesh.members[x].psks[0].kid() != newest {
            let keys = vec![psk(self.psk), psk(self.psk - 1)];
            mesh.members[x].psks = keys;
            what = "PSK added";
        } else if all_list && known && mesh.members[x].psks.len() > 1 {
            mesh.members[x].psks.truncate(1);
            for member in &mut mesh.members {
                member.bygone = member.bygone.max(member.versions.len().saturating_sub(1));
            }
            what = "PSK dropped";
        } else if all_list && mesh.members.iter().all(|m| m.psks.len() == 1) {
            self.psk += 1;
            return "PSK made";
        } else {
            return "nothing";
        }
        mesh.tell(format!("{x}: {what}"));
        let psks = mesh.members[x].psks.clone();
        if let Some(process) = &mut mesh.members[x].process {
            process.reconciler.node.keyed(psks, mesh.now - process.began);
        }
        mesh.turn(x);
        what
    }

    /// The uplink gets another address; the old one stays for a while, or not.
    fn move_to_new_address(&mut self, x: usize) -> &'static str {
        if self.address == 250 {
            return "nothing";
        }
        self.address += 1;
        let stays = self.dice.one_in(2);
        let mesh = &mut self.mesh;
        mesh.tell(format!(
            "{x} moves to .{}{}",
            self.address,
            if stays { ", the old stays" } else { "" }
        ));
        let uplink = make::uplink(mesh.families, self.address);
        let addresses: Vec<_> = uplink.local.iter().collect();
        mesh.members[x].kernel.with(|machine| {
            if !stays {
                machine.addresses.clear();
            }
            machine.addresses.extend(&addresses);
            machine.sources.extend(&addresses);
        });
        {
            let mut views = mesh.views.borrow_mut();
            views[x].around.addresses = addresses;
            for view in views.iter_mut() {
                view.flows.remove(&x);
            }
        }
        mesh.members[x].uplink = uplink.clone();
        if let Some(process) = &mut mesh.members[x].process {
            process.reconciler.node.uplinked(uplink);
        }
        mesh.turn(x);
        "new address"
    }

    /// Another hand is at the kernel; never at two places before the first is mended.
    fn hurt(&mut self, x: usize) -> &'static str {
        if self.mesh.views.borrow()[x].hurt {
            return "nothing";
        }
        let objects = self.mesh.members[x].kernel.look(|machine| machine.objects.clone());
        if objects.is_empty() {
            return "nothing";
        }
        let nth = self.dice.below(objects.len());
        let (key, object) = objects.into_iter().nth(nth).expect("counted");
        let told = !self.dice.one_in(3);
        let dice = &mut self.dice;
        let what = match (dice.below(4), &object) {
            (0, _) => "flush of SAs",
            (1, _) => "flush of policies",
            (2, Object::Policy(policy)) if policy.template.is_some() => "template changed",
            _ => "removal",
        };
        self.mesh.tell(format!("{x}: {what}, {key}, told: {told}"));
        self.mesh.hurt(x, |kernel| {
            match what {
                "flush of SAs" => kernel.flush_by_hand(Kind::Sa),
                "flush of policies" => {
                    // One command, two kinds of ours.
                    kernel.flush_by_hand(Kind::Policy);
                    kernel.flush_by_hand(Kind::Guard);
                }
                "template changed" => kernel.with(|machine| {
                    let Object::Policy(mut policy) = object else { return };
                    if let Some(template) = &mut policy.template {
                        template.spi ^= 0x1000;
                    }
                    let changed = Object::Policy(policy);
                    machine.objects.insert(key.clone(), changed.clone());
                    machine.notices.push(Event::Observed(key, changed));
                }),
                _ => kernel.remove_by_hand(&key),
            }
            if !told {
                kernel.with(|machine| machine.notices = vec![Event::Overrun]);
            }
        });
        what
    }

    /// Operations to come fail.
    fn fail(&mut self, x: usize) -> &'static str {
        let fault = Fault::ALL[self.dice.below(4)];
        let at = self.dice.below(6);
        let blind = self.dice.one_in(6);
        self.mesh
            .tell(format!("{x}: operation {at} to come: {fault:?}, blind: {blind}"));
        self.mesh.members[x].kernel.with(|machine| {
            machine.faults.insert(machine.log.len() + at, fault);
            machine.blind += usize::from(blind);
        });
        "fault"
    }
}
