//! A kernel that is a map: it refuses what the real one refuses, fails when told to, and forgets no key.
//!
//! A [`SimKernel`] is a handle, as a netlink socket is: the machine's state outlives the process that holds it. After
//! every single operation the machine's watch is called, so a test sees each state that packets could meet.

use std::cell::{OnceCell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::rc::Rc;

use ringmail::kernel::{Counters, Datapath, Event, Key, Kind, Look, Object, Objects, Op, Write, WriteError};
use xfrm::{KernelError, PolicyId, SaId};

use super::packet::Scene;
use super::watch::TWICE;

/// The bit of an SPI that tells the carrier.
const OTHER_CARRIER: u32 = 1 << 31;

/// How an operation fails.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Fault {
    /// The kernel says no; nothing happened.
    Refused,
    /// The answer is lost; nothing happened.
    Lost,
    /// The answer is lost; it happened.
    LostDone,
    /// Something before the kernel failed; nothing happened, and no key comes back.
    Failed,
    /// What no kernel does: it says no to a sending SA, although it was made; and then it is lost.
    RefusedDone,
}

impl Fault {
    /// What kernels do.
    pub(crate) const ALL: [Self; 4] = [Self::Refused, Self::Lost, Self::LostDone, Self::Failed];
}

/// The sending keys that were ever programmed on any machine of a test, by their bytes.
pub(crate) type Spent = Rc<RefCell<BTreeMap<Vec<u8>, String>>>;

type Watch = Rc<dyn Fn(&Op)>;

/// One machine's kernel.
#[derive(Default)]
pub(crate) struct Machine {
    pub(crate) name: String,
    pub(crate) objects: Objects,
    /// The key of each SA that is there.
    pub(crate) keys: BTreeMap<SaId, Vec<u8>>,
    /// The addresses that the machine has on its uplink.
    pub(crate) addresses: BTreeSet<IpAddr>,
    /// All addresses that it ever sent from: what tells a sending SA.
    pub(crate) sources: BTreeSet<IpAddr>,
    /// SAs with their keys that went by a reboot or another hand: what is sent on them may be lost.
    pub(crate) torn: BTreeSet<(SaId, Vec<u8>)>,
    /// Every operation that was tried, in order, with how it failed.
    pub(crate) log: Vec<(Op, Option<Fault>)>,
    /// Failures to come, by the number of the operation (0 for the next).
    pub(crate) faults: BTreeMap<usize, Fault>,
    /// Keys whose every operation fails.
    pub(crate) cursed: BTreeMap<Key, Fault>,
    /// The next so many dumps fail.
    pub(crate) blind: usize,
    /// How many dumps were asked for so far.
    pub(crate) dumps: usize,
    /// How often it was asked whether it answers.
    pub(crate) questions: usize,
    /// The packets that came on each receiving SA.
    pub(crate) carried: BTreeMap<SaId, u64>,
    pub(crate) notices: Vec<Event>,
    /// Whether it says that a receiving SA is there before it is.
    pub(crate) tardy: bool,
    /// The receiving SAs that it has promised.
    promised: BTreeMap<SaId, (Object, Vec<u8>)>,
    watch: Option<Watch>,
    spent: Spent,
    /// The objects as packets meet them, until something changes.
    scene: OnceCell<Scene>,
}

/// A process's handle on its machine.
#[derive(Clone)]
pub(crate) struct SimKernel {
    machine: Rc<RefCell<Machine>>,
    /// The firewall and the sysctls are shown to the process that wrote them only.
    wrote: BTreeSet<Key>,
}

impl SimKernel {
    pub(crate) fn new(name: &str, spent: &Spent) -> Self {
        let machine = Machine {
            name: name.to_owned(),
            spent: spent.clone(),
            ..Machine::default()
        };
        Self {
            machine: Rc::new(RefCell::new(machine)),
            wrote: BTreeSet::new(),
        }
    }

    /// The handle of a process that has just started.
    pub(crate) fn reopened(&self) -> Self {
        Self {
            machine: self.machine.clone(),
            wrote: BTreeSet::new(),
        }
    }

    pub(crate) fn look<T>(&self, at: impl FnOnce(&Machine) -> T) -> T {
        at(&self.machine.borrow())
    }

    pub(crate) fn with<T>(&self, change: impl FnOnce(&mut Machine) -> T) -> T {
        let mut machine = self.machine.borrow_mut();
        machine.scene.take();
        change(&mut machine)
    }

    /// A packet came on a receiving SA.
    pub(crate) fn carry(&self, id: SaId) {
        *self.machine.borrow_mut().carried.entry(id).or_default() += 1;
    }

    /// What the process hears when it next listens.
    pub(crate) fn notices(&self) -> Vec<Event> {
        std::mem::take(&mut self.machine.borrow_mut().notices)
    }

    /// Calls `watch` after every single operation from now on.
    pub(crate) fn watch(&self, watch: impl Fn(&Op) + 'static) {
        self.machine.borrow_mut().watch = Some(Rc::new(watch));
    }

    /// The machine starts anew: nothing is there.
    pub(crate) fn reboot(&self) {
        self.with(|machine| {
            let keys = std::mem::take(&mut machine.keys);
            machine.torn.extend(keys);
            machine.objects.clear();
            machine.promised.clear();
            machine.notices.clear();
            machine.faults.clear();
        });
    }

    /// Another hand removes `key`; the process is told when it next listens.
    pub(crate) fn remove_by_hand(&self, key: &Key) {
        self.with(|machine| {
            for gone in machine.take(key) {
                machine.notices.push(Event::Gone(gone));
            }
        });
    }

    /// Another hand flushes every object of `kind`.
    pub(crate) fn flush_by_hand(&self, kind: Kind) {
        self.with(|machine| {
            let keys: Vec<Key> = machine
                .objects
                .keys()
                .filter(|key| key.kind() == kind)
                .cloned()
                .collect();
            for key in keys {
                machine.take(&key);
            }
            machine.notices.push(Event::AllGone(kind));
        });
    }

    fn one(&mut self, write: &mut Write) -> Result<(), WriteError> {
        let Write { op, secret } = write;
        let op = &*op;
        let (result, watch) = {
            let mut machine = self.machine.borrow_mut();
            machine.scene.take();
            let number = machine.log.len();
            let fault = machine
                .faults
                .remove(&number)
                .or_else(|| machine.cursed.get(op.key()).copied())
                .filter(|fault| *fault != Fault::RefusedDone || machine.sends(op));
            machine.log.push((op.clone(), fault));
            let done = match fault {
                None => machine.carry_out(op, secret.as_ref()),
                Some(Fault::LostDone) => machine
                    .carry_out(op, secret.as_ref())
                    .and_then(|()| Err(WriteError::Unknown { op: op.to_string() })),
                Some(Fault::Lost) => Err(WriteError::Unknown { op: op.to_string() }),
                Some(Fault::Refused) => Err(refused(op, nix::libc::ENOMEM)),
                Some(Fault::RefusedDone) => machine.carry_out(op, secret.as_ref()).and_then(|()| {
                    machine.take(op.key());
                    Err(refused(op, nix::libc::ENOMEM))
                }),
                Some(Fault::Failed) => Err(WriteError::Failed {
                    op: op.to_string(),
                    why: "told to".into(),
                }),
            };
            (done, machine.watch.clone())
        };
        if result.is_ok() {
            self.wrote.insert(op.key().clone());
        }
        if let Some(watch) = watch {
            watch(op);
        }
        let unused = matches!(result, Err(WriteError::Refused { .. } | WriteError::Foreign { .. }));
        if !unused {
            *secret = None;
        }
        result
    }
}

impl Machine {
    /// The objects as packets meet them.
    pub(crate) fn scene(&self) -> &Scene {
        self.scene.get_or_init(|| Scene::of(&self.objects))
    }

    /// What the real kernel and its adapter do with one operation.
    fn carry_out(&mut self, op: &Op, secret: Option<&keys::SaKey>) -> Result<(), WriteError> {
        match op {
            Op::Break(key) => {
                // The key of what its maker removes is not torn: who still sends on it was not waited for.
                if let Key::Sa(id) = key {
                    self.keys.remove(id);
                    self.promised.remove(id);
                }
                self.take(key);
            }
            Op::Change(key @ Key::Sa(_), object @ Object::Sa { sa, .. }) if secret.is_none() => {
                // The key stays, and so must all that the kernel does not update.
                let Some(Object::Sa { sa: held, .. }) = self.objects.get(key) else {
                    return Err(refused(op, nix::libc::ESRCH));
                };
                let updated = xfrm::Sa {
                    encap: sa.encap,
                    ..(**held).clone()
                };
                assert_eq!(updated, **sa, "an update changes ports alone");
                self.objects.insert(key.clone(), unborn(object));
            }
            Op::Make(key @ Key::Sa(id), object @ Object::Sa { sa, .. })
            | Op::Change(key @ Key::Sa(id), object @ Object::Sa { sa, .. }) => {
                let secret = secret.expect("an SA is made with a key");
                assert_eq!(secret.spi().0, sa.spi, "the key of another SA");
                assert_eq!(
                    secret.as_bytes().len(),
                    sa.algorithm.key_len(),
                    "a key of another cipher"
                );
                if matches!(op, Op::Make(..)) && self.objects.contains_key(key) {
                    return Err(refused(op, nix::libc::EEXIST));
                }
                let bytes = secret.as_bytes().to_vec();
                if self.sources.contains(&sa.src) {
                    let what = format!("{} as {key}", self.name);
                    if let Some(before) = self.spent.borrow_mut().insert(bytes.clone(), what.clone()) {
                        panic!("{TWICE}: a sending key is programmed twice: by {what}, before by {before}");
                    }
                }
                if self.tardy && !self.sources.contains(&sa.src) {
                    self.promised.insert(*id, (unborn(object), bytes));
                    return Ok(());
                }
                self.keys.insert(*id, bytes);
                self.objects.insert(key.clone(), unborn(object));
            }
            Op::Make(key, object) | Op::Change(key, object) => {
                match (key, object) {
                    (Key::Address(link, _), _) if !self.has_link(link) => return Err(refused(op, nix::libc::ENODEV)),
                    (Key::Route(_), Object::Route(route)) if !self.has_link(&route.link) => {
                        return Err(refused(op, nix::libc::ENODEV));
                    }
                    (Key::Route(_), Object::Route(route))
                        if route.source.is_some_and(|source| {
                            !self.objects.contains_key(&Key::Address(route.link.clone(), source))
                        }) =>
                    {
                        return Err(refused(op, nix::libc::EINVAL));
                    }
                    (Key::Policy(id) | Key::Guard(_, id), _) => self.vacate(id),
                    _ => {}
                }
                self.objects.insert(key.clone(), object.clone());
            }
        }
        Ok(())
    }

    /// Whether an operation makes a sending SA.
    fn sends(&self, op: &Op) -> bool {
        matches!(op, Op::Make(_, Object::Sa { sa, .. }) if self.sources.contains(&sa.src))
    }

    /// What was promised is done.
    pub(crate) fn catch_up(&mut self) {
        for (id, (object, bytes)) in std::mem::take(&mut self.promised) {
            self.keys.insert(id, bytes);
            self.objects.insert(Key::Sa(id), object);
        }
    }

    /// Whether there is a device of this name: of ours, or the uplink.
    fn has_link(&self, link: &str) -> bool {
        link == "eth0" || self.objects.contains_key(&Key::Link(link.into()))
    }

    /// The kernel tells policies apart by direction and selector alone: a new one takes the place of the old.
    fn vacate(&mut self, id: &PolicyId) {
        self.objects
            .retain(|key, _| !matches!(key, Key::Policy(held) | Key::Guard(_, held) if held == id));
    }

    /// Removes an object and what the kernel removes with it; returns all that went.
    fn take(&mut self, key: &Key) -> Vec<Key> {
        let mut gone = Vec::new();
        match key {
            Key::Sa(id) => {
                if let Some(bytes) = self.keys.remove(id) {
                    self.torn.insert((*id, bytes));
                    // A generation is lost whole: its SA for the other carrier goes as well, by its maker.
                    let twin = SaId {
                        spi: id.spi ^ OTHER_CARRIER,
                        ..*id
                    };
                    let bytes = self.keys.get(&twin).cloned();
                    self.torn.extend(bytes.map(|bytes| (twin, bytes)));
                }
            }
            Key::Policy(id) | Key::Guard(_, id) => self.vacate(id),
            Key::Link(link) => {
                let with = |key: &Key, object: &Object| match (key, object) {
                    (Key::Address(on, _), _) => on == link,
                    (Key::Route(_), Object::Route(route)) => route.link == *link,
                    _ => false,
                };
                gone.extend(self.objects.iter().filter(|(k, o)| with(k, o)).map(|(k, _)| k.clone()));
            }
            Key::Address(_, address) => {
                let from = |object: &Object| matches!(object, Object::Route(route) if route.source == Some(*address));
                gone.extend(self.objects.iter().filter(|(_, o)| from(o)).map(|(k, _)| k.clone()));
            }
            _ => {}
        }
        for also in &gone {
            self.objects.remove(also);
        }
        self.objects.remove(key);
        gone.push(key.clone());
        gone
    }
}

impl Datapath for SimKernel {
    fn dump(&mut self) -> Result<Objects, WriteError> {
        let wrote = &self.wrote;
        let mut machine = self.machine.borrow_mut();
        machine.dumps += 1;
        if machine.blind > 0 {
            machine.blind -= 1;
            return Err(WriteError::Failed {
                op: "read the kernel".into(),
                why: "told to".into(),
            });
        }
        let shown = |key: &Key| !matches!(key, Key::Firewall | Key::Sysctl(_)) || wrote.contains(key);
        let all = machine.objects.iter().filter(|(key, _)| shown(key));
        Ok(all.map(|(key, object)| (key.clone(), object.clone())).collect())
    }

    fn apply(&mut self, kind: Kind, writes: &mut [Write]) -> Vec<Result<(), WriteError>> {
        assert!(
            writes.iter().all(|write| write.op.key().kind() == kind),
            "a batch is of one kind"
        );
        writes.iter_mut().map(|write| self.one(write)).collect()
    }

    fn filter_stands(&mut self, _: Look) -> bool {
        true
    }

    fn filter_tells(&self) -> bool {
        true
    }

    fn answers(&mut self) -> Result<(), WriteError> {
        self.machine.borrow_mut().questions += 1;
        Ok(())
    }

    fn carried(&mut self) -> Result<Vec<(SaId, u64)>, WriteError> {
        let machine = self.machine.borrow();
        let sas = machine.objects.keys().filter_map(|key| match key {
            Key::Sa(id) => Some((*id, machine.carried.get(id).copied().unwrap_or_default())),
            _ => None,
        });
        Ok(sas.collect())
    }

    fn counters(&mut self) -> Result<BTreeMap<SaId, Counters>, WriteError> {
        let mut machine = self.machine.borrow_mut();
        machine.dumps += 1;
        let sas = machine.objects.keys().filter_map(|key| match key {
            Key::Sa(id) => Some(*id),
            _ => None,
        });
        // Each has carried a packet more than the one before.
        let count = |(before, id): (u64, SaId)| {
            let counters = Counters {
                bytes: 100 * (before + 1),
                packets: before + 1,
                ..Counters::default()
            };
            (id, counters)
        };
        Ok((0..).zip(sas).map(count).collect())
    }
}

/// An object as a dump shows it: nobody can tell of which generation an SA's key is.
pub(crate) fn unborn(object: &Object) -> Object {
    match object {
        Object::Sa { sa, .. } => Object::Sa {
            sa: sa.clone(),
            born: None,
        },
        other => other.clone(),
    }
}

fn refused(op: &Op, errno: i32) -> WriteError {
    WriteError::Refused {
        op: op.to_string(),
        source: KernelError { errno, text: None },
    }
}
