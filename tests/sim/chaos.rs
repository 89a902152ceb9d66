//! All that can happen to a mesh, in an order that a seed tells.

use std::sync::Arc;
use std::time::Duration;

use keys::{Carrier, Cipher, EncapMode};
use ringmail::epochs::SILENCE;
use ringmail::kernel::{Event, Kind, Object};
use ringmail::lease::Lease;
use ringmail::node::Cause;

use super::broken::Broken;
use super::kernel::Fault;
use super::make::{self, Families};
use super::mesh::{Member, Mesh};
use super::watch::STUCK;

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

/// All that can happen, by the names it is counted under.
pub(crate) const KINDS: [&str; 35] = [
    "PSK added",
    "PSK dropped",
    "PSK in place everywhere",
    "PSK made",
    "PSK replaced",
    "all read",
    "clock back",
    "clock forward",
    "configuration",
    "crossing rotation",
    "fault",
    "flush of SAs",
    "flush of policies",
    "leave",
    "long time",
    "new address",
    "overrun",
    "probe",
    "probe lost",
    "read",
    "reboot",
    "removal",
    "restart",
    "restored store",
    "rollback",
    "rotation",
    "soft limit",
    "start",
    "start without store",
    "stop",
    "store back",
    "store lost",
    "template changed",
    "time",
    "very long time",
];

/// A mesh that things happen to.
pub(crate) struct Chaos {
    pub(crate) mesh: Mesh,
    dice: Dice,
    /// The newest PSK's number.
    psk: u8,
    /// How it comes: in place of the old one, not beside it.
    in_place: bool,
    /// Nobody hurts the kernels, and settings stay.
    calm: bool,
    /// The last octet of the next new public address.
    address: u8,
    /// Where it tells what the wire drops, apart from all else.
    weather: Option<Dice>,
    /// When the store last was lost, or came back, by node.
    outages: Vec<Duration>,
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
            in_place: false,
            calm: false,
            outages: vec![Duration::ZERO; nodes as usize],
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

    /// The same with nothing but what the rules are about (epochs, statements, probes, time), and perhaps one broken.
    pub(crate) fn calm(seed: u64, nodes: u32, broken: Option<Broken>) -> Self {
        let mut chaos = Self::new(seed, nodes);
        chaos.calm = true;
        if let Some(rule) = broken {
            chaos.mesh.break_rule(rule);
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
        if self.calm && self.dice.one_in(4) {
            self.mesh.catch_up();
            let x = self.dice.below(self.mesh.members.len());
            if self.mesh.breaks(Broken::Remake) {
                self.fail(x);
            }
        }
        let what = std::iter::repeat_with(|| self.attempt()).find(|what| *what != "nothing");
        self.counted(what.expect("something does"));
    }

    fn counted(&mut self, what: &'static str) {
        if what != "nothing" {
            *self.count.entry(what).or_default() += 1;
        }
    }

    /// Nothing happens any more: the mesh must come to rest.
    pub(crate) fn rest(&mut self) {
        self.mesh.blocked.clear();
        for x in 0..self.mesh.members.len() {
            self.mesh.members[x].away = false;
            if self.mesh.members[x].process.is_some() {
                self.mesh.hold(x);
                self.mesh.turn(x);
            }
        }
        for round in 0.. {
            if !self.in_place {
                break;
            }
            assert!(round < 200, "{STUCK}: not every lease lists the new PSK");
            for x in 0..self.mesh.members.len() {
                // Once it is over, the next would begin.
                if self.in_place {
                    let what = self.rekey(x);
                    self.counted(what);
                }
            }
            self.mesh.run(Duration::from_secs(1));
        }
        self.mesh.settle();
    }

    fn attempt(&mut self) -> &'static str {
        let x = self.dice.below(self.mesh.members.len());
        let running = self.mesh.members[x].process.is_some();
        let mut what = "nothing";
        match self.dice.below(if self.calm { 90 } else { 120 }) {
            0..30 => what = self.travel(),
            30..52 => what = self.read(x),
            52..80 => {
                self.end_outages();
                let most = [5, 60, 400, 2_000, 6_000, 20_000][self.dice.below(6)];
                let time = self.dice.below(most) as u64 + 1;
                self.mesh.wait(Duration::from_millis(time));
                what = "time";
            }
            80 if self.dice.one_in(4) => {
                self.end_outages();
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
            // In a change of PSKs in place, a node that starts has nothing in common with one that is behind.
            84..93 if self.in_place => {}
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
            93 if running => what = self.move_to_new_address(x),
            94 | 95 if running => what = self.hurt(x),
            96..99 if running => what = self.fail(x),
            99..103 => what = self.rekey(x),
            103 | 104 if running => what = self.cross(x),
            105 | 106 => what = self.lose_store(x),
            107 if running => what = self.roll_back(x),
            108 if running => what = self.restore(x),
            109 if running => what = self.limit(x),
            110 if running => {
                self.mesh.tell(format!("{x}: notifications are lost"));
                self.mesh.members[x]
                    .kernel
                    .with(|machine| machine.notices.push(Event::Overrun));
                what = "overrun";
            }
            111 => what = self.set_clock(),
            112 if running => what = self.configure(x),
            113..116 => what = self.catch_up_with_store(x),
            _ => {}
        }
        what
    }

    /// Two nodes begin epochs at the same moment.
    fn cross(&mut self, x: usize) -> &'static str {
        let y = self.dice.below(self.mesh.members.len());
        if x == y || self.mesh.members[y].process.is_none() {
            return "nothing";
        }
        self.mesh.rotate(x, Cause::Asked);
        self.mesh.rotate(y, Cause::Asked);
        "crossing rotation"
    }

    /// The store answers a node no longer, or again.
    fn lose_store(&mut self, x: usize) -> &'static str {
        let member = &mut self.mesh.members[x];
        member.away = !member.away;
        let what = if member.away { "store lost" } else { "store back" };
        self.outages[x] = self.mesh.now;
        self.mesh.tell(format!("{x}: {what}"));
        self.mesh.turn(x);
        what
    }

    /// Outages end before anyone waits no longer: a node's new epoch that is not published is all that it probes on, so
    /// others take it for silent.
    fn end_outages(&mut self) {
        for x in 0..self.mesh.members.len() {
            if self.mesh.members[x].away && self.mesh.now >= self.outages[x] + SILENCE / 2 {
                self.lose_store(x);
            }
        }
    }

    /// A node reads all that it missed at once; of each lease the newest alone.
    fn catch_up_with_store(&mut self, x: usize) -> &'static str {
        if self.mesh.members[x].away || self.mesh.members[x].process.is_none() {
            return "nothing";
        }
        self.mesh.tell(format!("{x} reads all"));
        self.mesh.hold(x);
        for y in 0..self.mesh.members.len() {
            self.mesh.read(x, y, usize::MAX);
        }
        self.mesh.turn(x);
        "all read"
    }

    /// A node reads what a lease said before.
    fn roll_back(&mut self, x: usize) -> &'static str {
        let y = self.dice.below(self.mesh.members.len());
        if x == y || self.mesh.members[x].away {
            return "nothing";
        }
        let Some(process) = &self.mesh.members[x].process else {
            return "nothing";
        };
        let seen = process.seen.get(y).copied().unwrap_or(0);
        let member = &self.mesh.members[y];
        // Since it last joined; before that, it was another.
        let read = &member.versions[..seen];
        let first = read
            .iter()
            .rposition(Option::is_none)
            .map_or(0, |gone| gone + 1)
            .max(member.bygone);
        if first + 1 >= seen {
            return "nothing";
        }
        let version = first + 1 + self.dice.below(seen - first - 1);
        self.mesh
            .tell(format!("{x} reads version {version} of {y} again, has read {seen}"));
        self.mesh.read_again(x, y, version);
        self.mesh.turn(x);
        "rollback"
    }

    /// The store is restored from a backup: it has an older lease of a node, which puts its own there again.
    fn restore(&mut self, x: usize) -> &'static str {
        let clock = (self.mesh.clock + self.mesh.now).as_secs();
        let member = &mut self.mesh.members[x];
        let newest = member
            .process
            .as_ref()
            .and_then(|process| process.reconciler.node.epoch());
        // Numbers follow the clock unless a node rotates more often than once a second; where it did, a process that
        // starts with the older lease begins an epoch that others take for a rollback, until the clock has passed.
        let behind = newest.is_none_or(|epoch| epoch.0 >= clock);
        let first = member
            .versions
            .iter()
            .rposition(Option::is_none)
            .map_or(0, |gone| gone + 1)
            .max(member.bygone);
        if behind || first + 1 >= member.versions.len() {
            return "nothing";
        }
        let version = first + self.dice.below(member.versions.len() - first - 1);
        let older = member.versions[version].clone();
        member.versions.push(older);
        member.restored = true;
        self.mesh
            .tell(format!("the store has version {} of {x} again", version + 1));
        "restored store"
    }

    /// An SA has carried as much as it may.
    fn limit(&mut self, x: usize) -> &'static str {
        let sas = self.mesh.members[x]
            .kernel
            .look(|machine| machine.keys.keys().copied().collect::<Vec<_>>());
        if sas.is_empty() {
            return "nothing";
        }
        let id = sas[self.dice.below(sas.len())];
        self.mesh.members[x]
            .kernel
            .with(|machine| machine.notices.push(Event::SoftLimit(id)));
        self.mesh.turn(x);
        "soft limit"
    }

    /// The wall clock is set.
    fn set_clock(&mut self) -> &'static str {
        let mesh = &mut self.mesh;
        let step = Duration::from_secs(self.dice.below(5_000) as u64);
        if self.dice.one_in(2) {
            mesh.clock += step;
            mesh.tell(format!("the clock is set forward by {step:?}"));
            return "clock forward";
        }
        if mesh.members.iter().any(|member| member.restored) {
            return "nothing";
        }
        mesh.clock -= step;
        mesh.tell(format!("the clock is set back by {step:?}"));
        "clock back"
    }

    /// The configuration changes.
    fn configure(&mut self, x: usize) -> &'static str {
        let mesh = &mut self.mesh;
        let settings = &mut mesh.members[x].settings;
        if self.weather.is_some() || self.dice.one_in(2) {
            let ciphers = [Cipher::Aes128Gcm16, Cipher::Aes256Gcm16, Cipher::ChaCha20Poly1305];
            settings.cipher = ciphers[self.dice.below(3)];
        } else {
            settings.encap.mode = [EncapMode::Esp, EncapMode::Udp][self.dice.below(2)];
        }
        let settings = settings.clone();
        mesh.tell(format!("{x} has {:?} and {:?}", settings.cipher, settings.encap));
        if let Some(process) = &mut mesh.members[x].process {
            process.reconciler.node.configure(settings);
        }
        mesh.turn(x);
        "configuration"
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
        if self.mesh.members[x].process.is_none() || self.mesh.members[x].away {
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
        if self.mesh.members[x].away {
            self.mesh.turn(x);
            return "start without store";
        }
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

    /// A PSK file changes, on one node after the other. Either a new key comes in front of the old, and the old goes once
    /// every lease lists the new; or the new one takes the old one's place, which the node holds on for the others.
    fn rekey(&mut self, x: usize) -> &'static str {
        let network = self.mesh.network;
        let psk = |number| make::psk(number, &network);
        let newest = psk(self.psk).kid();
        let has = |member: &Member| member.psks[0].kid() == newest;
        if !has(&self.mesh.members[x]) {
            let (keys, what) = match self.in_place {
                true => (vec![psk(self.psk)], "PSK replaced"),
                false => (vec![psk(self.psk), psk(self.psk - 1)], "PSK added"),
            };
            self.file(x, keys);
            return what;
        }
        let mesh = &mut self.mesh;
        let lists = |lease: &Lease| ringmail::admission::verify(lease, &network, &[psk(self.psk)]).is_ok();
        let leases = mesh
            .members
            .iter()
            .filter_map(|member| member.versions.last()?.as_ref());
        if !mesh.members.iter().all(has) || !leases.into_iter().all(lists) {
            return "nothing";
        }
        let knows = |x: usize| {
            let process = mesh.members[x].process.as_ref();
            let seen = |y: usize| process.map_or(0, |p| p.seen.get(y).copied().unwrap_or(0));
            (0..mesh.members.len()).all(|y| x == y || seen(y) == mesh.members[y].versions.len())
        };
        let older = |member: &mut Member| member.bygone = member.bygone.max(member.versions.len().saturating_sub(1));
        if self.in_place {
            // Over for those who start from now on, too.
            if !(0..mesh.members.len()).all(|x| mesh.members[x].process.is_none() || knows(x)) {
                return "nothing";
            }
            mesh.members.iter_mut().for_each(older);
            self.in_place = false;
            return "PSK in place everywhere";
        }
        if mesh.members[x].psks.len() > 1 {
            if !knows(x) {
                return "nothing";
            }
            mesh.members.iter_mut().for_each(older);
            let keys = vec![psk(self.psk)];
            self.file(x, keys);
            return "PSK dropped";
        }
        if mesh.members.iter().any(|member| member.psks.len() > 1) {
            return "nothing";
        }
        self.psk += 1;
        self.in_place = self.dice.one_in(2) && (0..self.mesh.members.len()).all(|x| self.mesh.is_running_or_gone(x));
        "PSK made"
    }

    fn file(&mut self, x: usize, keys: Vec<Arc<keys::Psk>>) {
        let mesh = &mut self.mesh;
        mesh.tell(format!(
            "{x} has PSKs {:?}",
            keys.iter().map(|psk| psk.kid()).collect::<Vec<_>>()
        ));
        mesh.members[x].psks = keys.clone();
        if let Some(process) = &mut mesh.members[x].process {
            process.reconciler.node.keyed(keys, mesh.now - process.began);
        }
        mesh.turn(x);
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
        let fault = match self.mesh.breaks(Broken::Remake) {
            true => Fault::RefusedDone,
            false => Fault::ALL[self.dice.below(4)],
        };
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
