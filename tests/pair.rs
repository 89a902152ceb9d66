//! The rules of two nodes, searched exhaustively with the real transition code.
//!
//! Every order of new epochs, store reads (late, coalesced, stale after a restart), probes (and their loss), one restart
//! of each node (memory and secrets lost, kernel kept) and one reboot (kernel lost too). After every step: what a node
//! sends as data its receiver's kernel can read, unless it is meant for a kernel state that is gone. From every state:
//! when events stop, both ends come to the newest generation and keep nothing older. No sending key is programmed twice.

#![expect(
    clippy::disallowed_types,
    reason = "states are only looked up, and hashing is what makes the search fast"
)]

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr};

use keys::Epoch;
use ringmail::epochs::{DRAIN, Data, Generation, Inherited, Pair};
use xfrm::SaId;

#[derive(Clone, Debug, Eq, Hash, PartialEq)]
struct Node {
    pair: Pair,
    /// How many of the peer's statements were read.
    view: usize,
    /// The newest own epoch, 0 for none.
    epoch: u64,
    /// Receiving SAs in the kernel.
    inbound: BTreeSet<SaId>,
    /// The SA that data goes on, in the kernel.
    out: Option<SaId>,
    /// Sending keys that were programmed, ever.
    spent: BTreeSet<SaId>,
    boot: u32,
    restarts: u32,
    reboots: u32,
}

/// An epoch and the kernel state it was begun on.
type Statement = (u64, u32);

#[derive(Clone, Debug, Eq, Hash, PartialEq)]
struct World {
    nodes: [Node; 2],
    store: [Vec<Statement>; 2],
}

/// The SA that node `sender` sends on with `generation`: epochs are small here, so the SPI holds them whole.
fn sa(sender: usize, generation: Generation) -> SaId {
    let spi = (u32::try_from(sender).expect("small") + 1) << 16
        | u32::try_from(generation.sender.0).expect("small") << 8
        | u32::try_from(generation.receiver.0).expect("small");
    SaId {
        dst: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        spi,
    }
}

fn receiver_epoch(id: SaId) -> u64 {
    u64::from(id.spi & 0xff)
}

/// Brings the node's kernel to what its pair wants; `Err` where a key would be programmed twice.
fn reconcile(node: &mut Node, me: usize) -> Result<(), String> {
    for generation in node.pair.receiving().collect::<Vec<_>>() {
        node.pair.installed(generation);
    }
    for generation in node.pair.sending() {
        let before = node.pair.clone();
        node.pair.programmed(generation);
        if node.pair != before && !node.spent.insert(sa(me, generation)) {
            return Err(format!("{me} programs the sending key of {generation} twice"));
        }
        node.pair.sent(generation);
    }
    node.pair.tick(DRAIN);
    let receiving = node.pair.receiving().map(|generation| sa(1 - me, generation));
    node.inbound = receiving.chain(node.pair.inherited().inbound.iter().copied()).collect();
    node.out = match node.pair.data() {
        Data::Held => None,
        Data::Inherited(id) => Some(id),
        Data::On(generation) => Some(sa(me, generation)),
    };
    Ok(())
}

fn data_of(pair: &Pair) -> Option<Generation> {
    match pair.data() {
        Data::On(generation) => Some(generation),
        Data::Held | Data::Inherited(_) => None,
    }
}

type Step = (String, Result<World, String>);

fn steps(world: &World, epochs: u64) -> Vec<Step> {
    let mut steps: Vec<Step> = Vec::new();
    for x in 0..2 {
        let y = 1 - x;
        let (node, peer) = (&world.nodes[x], &world.nodes[y]);
        let mut changed = |label: String, change: &dyn Fn(&mut World)| {
            let mut next = world.clone();
            change(&mut next);
            let fine = (0..2).try_for_each(|who| reconcile(&mut next.nodes[who], who));
            steps.push((label, fine.map(|()| next)));
        };
        let next = world.store[x].len() as u64 + 1;
        if next <= epochs {
            changed(format!("{x} begins {next}"), &|w: &mut World| {
                w.nodes[x].pair.own_epoch(Epoch(next));
                w.nodes[x].epoch = next;
                let boot = w.nodes[x].boot;
                w.store[x].push((next, boot));
            });
        }
        for view in node.view + 1..=world.store[y].len() {
            changed(format!("{x} sees {view}"), &|w: &mut World| {
                w.nodes[x].view = view;
                w.nodes[x]
                    .pair
                    .peer_epoch(Epoch(w.store[y][view - 1].0))
                    .expect("epochs rise");
            });
        }
        if let Some(out) = node.out
            && !peer.inbound.contains(&out)
            && world.store[y][receiver_epoch(out) as usize - 1].1 == peer.boot
        {
            steps.push((
                format!("{x} sends on {:#x}", out.spi),
                Err("the receiver can't read it".into()),
            ));
            continue;
        }
        let mut changed = |label: String, change: &dyn Fn(&mut World)| {
            let mut next = world.clone();
            change(&mut next);
            let fine = (0..2).try_for_each(|who| reconcile(&mut next.nodes[who], who));
            if fine.is_err() || next != *world {
                steps.push((label, fine.map(|()| next)));
            }
        };
        if let Some(sent) = node.pair.probe()
            && peer.inbound.contains(&sa(x, sent))
        {
            let data = data_of(&node.pair);
            changed(format!("{x} probes {sent}"), &|w: &mut World| {
                w.nodes[y].pair.probed(sent, data, std::time::Duration::ZERO);
            });
        }
        if !world.store[x].is_empty() && next <= epochs {
            // The first read of a new process may be stale.
            let first = usize::from(!world.store[y].is_empty());
            for view in first..=world.store[y].len() {
                for reboot in [false, true] {
                    if (if reboot { node.reboots } else { node.restarts }) > 0 {
                        continue;
                    }
                    let label = if reboot { "reboots" } else { "restarts" };
                    changed(format!("{x} {label} on read {view}"), &|w: &mut World| {
                        let inherited = if reboot {
                            Inherited::default()
                        } else {
                            Inherited {
                                inbound: w.nodes[x].inbound.clone(),
                                data: w.nodes[x].out,
                            }
                        };
                        let seen = view.checked_sub(1).map(|at| Epoch(w.store[y][at].0));
                        let node = &mut w.nodes[x];
                        node.boot += u32::from(reboot);
                        node.reboots += u32::from(reboot);
                        node.restarts += u32::from(!reboot);
                        node.view = view;
                        node.epoch = next;
                        node.pair = Pair::new([Epoch(next)], inherited);
                        if let Some(seen) = seen {
                            node.pair.peer_epoch(seen).expect("it is the first");
                        }
                        let boot = node.boot;
                        w.store[x].push((next, boot));
                    });
                }
            }
        }
    }
    steps
}

/// No more events: reads and probes go on until nothing changes. `Err` where the ends do not meet.
fn settle(world: &World, epochs: u64) -> Result<(), String> {
    let mut world = world.clone();
    'more: loop {
        for (label, next) in steps(&world, epochs) {
            let next = next.map_err(|why| format!("{label}: {why}"))?;
            if (label.contains("sees") || label.contains("probes")) && next != world {
                world = next;
                continue 'more;
            }
        }
        break;
    }
    if world.store.iter().any(Vec::is_empty) {
        return Ok(());
    }
    for x in 0..2 {
        let newest = Generation {
            sender: Epoch(world.store[x].len() as u64),
            receiver: Epoch(world.store[1 - x].len() as u64),
        };
        let node = &world.nodes[x];
        if node.out != Some(sa(x, newest)) {
            return Err(format!("{x} is stuck on {:?}, the newest is {newest}", node.out));
        }
        if node.inbound.len() != 1 {
            return Err(format!("{x} keeps {} inbound SAs", node.inbound.len()));
        }
    }
    Ok(())
}

#[test]
fn whatever_one_node_sends_the_other_can_read_in_every_order_of_two_epochs_each() {
    assert!(search(2, usize::MAX) > 1_000);
}

#[test]
fn whatever_one_node_sends_the_other_can_read_in_the_first_orders_of_three_epochs_each() {
    assert!(search(3, 15_000) >= 15_000);
}

/// Goes through at most `limit` states, breadth first; returns how many there were.
fn search(epochs: u64, limit: usize) -> usize {
    let node = Node {
        pair: Pair::default(),
        view: 0,
        epoch: 0,
        inbound: BTreeSet::new(),
        out: None,
        spent: BTreeSet::new(),
        boot: 0,
        restarts: 0,
        reboots: 0,
    };
    let start = World {
        nodes: [node.clone(), node],
        store: [Vec::new(), Vec::new()],
    };
    let mut came: HashMap<World, Option<(World, String)>> = HashMap::from([(start.clone(), None)]);
    let mut queue = VecDeque::from([start]);
    let mut states = 0;
    while let Some(world) = queue.pop_front() {
        states += 1;
        let wrong = settle(&world, epochs)
            .err()
            .map(|why| ("when events stop".to_owned(), why));
        let wrong = wrong.or_else(|| {
            steps(&world, epochs)
                .into_iter()
                .find_map(|(label, next)| Some((label, next.err()?)))
        });
        if let Some((label, why)) = wrong {
            let mut path = vec![format!("{label}: {why}")];
            let mut at = world;
            while let Some(Some((before, label))) = came.get(&at) {
                path.push(label.clone());
                at = before.clone();
            }
            path.reverse();
            panic!("after {states} states: {}", path.join(" | "));
        }
        for (label, next) in steps(&world, epochs) {
            let next = next.expect("checked above");
            if states + queue.len() < limit && !came.contains_key(&next) {
                came.insert(next.clone(), Some((world.clone(), label)));
                queue.push_back(next);
            }
        }
    }
    states
}
