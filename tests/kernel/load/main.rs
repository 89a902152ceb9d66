//! The load of the tests in tests/kernel/test_table.py: between every two places a flood of echoes and a stream of UDP,
//! both numbered, and a TCP connection whose every byte is known to both ends. One thread does all of it, with many
//! packets a system call: in User Mode Linux, with its one slow processor, that leaves time for what is tested.
//!
//! ```text
//! kernel-load ECHOES DATAGRAMS BLOCKS NAMESPACE=ADDRESS...     a pair's rates, each a second
//! ```
//! Echoes go from the first place of a pair to the second; both places tell which came. UDP goes one way, from each of
//! three places to the next. TCP goes both ways, each at the rate, in blocks of 1,024 bytes. Writes `ready` once all that
//! flows has arrived; what was sent before does not count. A line on standard input begins the end: nothing more is sent, what
//! is under way is waited for, and a JSON object is written with what was sent and what came. Times are CLOCK_MONOTONIC.

mod bulk;
mod datagrams;
mod numbered;

use std::fs::{self, File};
use std::io::Write as _;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, BorrowedFd};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns};
use nix::time::{ClockId, clock_gettime};
use serde_json::json;

use bulk::Bulk;
use datagrams::{Inbox, Stream, echo_socket};

/// How often is sent, and looked for what came.
const TICK: Duration = Duration::from_millis(1);
/// What has not come after this is lost.
const PATIENCE: Duration = Duration::from_secs(2);
/// What ends the waiting early: nothing has come for so long.
const QUIET: Duration = Duration::from_millis(400);
/// Without traffic on every way after this, the load fails.
const WARM_UP: Duration = Duration::from_secs(30);

/// Nanoseconds of CLOCK_MONOTONIC.
fn now() -> u64 {
    let time = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("the clock is there");
    time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64
}

fn seconds(nanoseconds: u64) -> f64 {
    nanoseconds as f64 / 1e9
}

/// One end: sockets are made in its namespace.
struct Place {
    namespace: File,
    address: Ipv4Addr,
}

impl Place {
    fn parse(argument: &str) -> Result<Self> {
        let (name, address) = argument.split_once('=').context("NAMESPACE=ADDRESS")?;
        Ok(Self {
            namespace: File::open(format!("/run/netns/{name}")).with_context(|| format!("open namespace {name}"))?,
            address: address.parse().with_context(|| format!("address {address}"))?,
        })
    }

    /// Does `work` here. The thread stays: each place is entered anew before its sockets are made.
    fn within<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<T> {
        setns(&self.namespace, CloneFlags::CLONE_NEWNET).context("enter the namespace")?;
        work()
    }
}

/// Whether the places' kernels answer echoes.
fn answer_echoes(places: &[Place], whether: bool) -> Result<()> {
    let ignore = if whether { "0" } else { "1" };
    places.iter().try_for_each(|place| {
        place.within(|| fs::write("/proc/sys/net/ipv4/icmp_echo_ignore_all", ignore).context("icmp_echo_ignore_all"))
    })
}

/// Everything that flows.
struct Load {
    streams: Vec<Stream>,
    inboxes: Vec<Inbox>,
    bulks: Vec<Bulk>,
}

impl Load {
    fn open(places: &[Place], [echoes, datagrams, blocks]: [f64; 3]) -> Result<Self> {
        answer_echoes(places, false)?;
        let (mut streams, mut bulks, mut inboxes) = (Vec::new(), Vec::new(), Vec::new());
        for place in places {
            inboxes.push(place.within(|| Inbox::datagrams(place.address))?);
            inboxes.push(place.within(Inbox::echoes)?);
        }
        for (first, one) in places.iter().enumerate() {
            for (second, two) in places.iter().enumerate().skip(first + 1) {
                let id = streams.len() as u32;
                let near = one.within(|| echo_socket(two.address))?;
                let far = two.within(|| echo_socket(one.address))?;
                streams.push(Stream::echoes(id, (first, second), near, far, echoes));
                // Round, so that each of three places sends one and receives one.
                streams.push(if (second - first) % 2 == 1 {
                    one.within(|| Stream::datagrams(id + 1, (first, second), two.address, datagrams))?
                } else {
                    two.within(|| Stream::datagrams(id + 1, (second, first), one.address, datagrams))?
                });
                let listener = two.within(|| bulk::listen(two.address))?;
                bulks.push(one.within(|| Bulk::connect((first, second), two.address, &listener, blocks))?);
            }
        }
        Ok(Self {
            streams,
            inboxes,
            bulks,
        })
    }

    /// Sends what is due by now.
    fn send(&mut self, at: u64) {
        self.streams.iter_mut().for_each(|stream| stream.send(at));
        self.bulks.iter_mut().for_each(|bulk| bulk.send(at));
    }

    /// Takes what has come; whether there was any.
    fn take(&mut self) -> bool {
        let readable: Vec<bool> = {
            let inboxes = self.inboxes.iter().map(AsFd::as_fd);
            let all: Vec<BorrowedFd<'_>> = inboxes.chain(self.bulks.iter().flat_map(Bulk::descriptors)).collect();
            let mut asked: Vec<_> = all.iter().map(|fd| PollFd::new(*fd, PollFlags::POLLIN)).collect();
            let _ = poll(&mut asked, PollTimeout::ZERO);
            asked.iter().map(|one| one.any() == Some(true)).collect()
        };
        let at = now();
        let (of_inboxes, of_bulks) = readable.split_at(self.inboxes.len());
        for (inbox, _) in self
            .inboxes
            .iter_mut()
            .zip(of_inboxes)
            .filter(|(_, readable)| **readable)
        {
            inbox.take(&mut self.streams, at);
        }
        self.streams.iter_mut().for_each(Stream::answer);
        for (bulk, readable) in self.bulks.iter_mut().zip(of_bulks.chunks(2)) {
            bulk.take([readable[0], readable[1]], at);
        }
        readable.contains(&true)
    }

    fn warm(&self) -> bool {
        self.streams.iter().all(Stream::warm) && self.bulks.iter().all(Bulk::warm)
    }

    fn report(&self) -> serde_json::Value {
        let streams = self.streams.iter().flat_map(Stream::report);
        json!({
            "streams": streams.collect::<Vec<_>>(),
            "connections": self.bulks.iter().map(Bulk::report).collect::<Vec<_>>(),
        })
    }
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args_os()
        .skip(1)
        .map(|argument| argument.to_string_lossy().into_owned())
        .collect();
    let [echoes, datagrams, blocks, places @ ..] = &arguments[..] else {
        bail!("usage: kernel-load ECHOES DATAGRAMS BLOCKS NAMESPACE=ADDRESS...");
    };
    let rates = [echoes.parse()?, datagrams.parse()?, blocks.parse()?];
    let places = places
        .iter()
        .map(|place| Place::parse(place))
        .collect::<Result<Vec<_>>>()?;
    let mut load = Load::open(&places, rates)?;

    let input = std::io::stdin();
    let told = || {
        let mut asked = [PollFd::new(input.as_fd(), PollFlags::POLLIN)];
        matches!(poll(&mut asked, PollTimeout::ZERO), Ok(1))
    };
    let (begun, mut counting, mut ticks, mut spent) = (now(), false, 0_u64, 0);
    loop {
        // A part of the processor is left to what is tested.
        thread::sleep(TICK.max(Duration::from_nanos(spent) / 2));
        let tick = now();
        load.send(tick);
        load.take();
        spent = now() - tick;
        ticks += 1;
        if !counting && load.warm() {
            counting = true;
            load.streams.iter_mut().for_each(Stream::count_from_here);
            load.bulks.iter_mut().for_each(Bulk::count_from_here);
            println!("ready");
            std::io::stdout().flush()?;
        }
        if !counting && now() - begun > WARM_UP.as_nanos() as u64 {
            bail!("not every way carries traffic after {WARM_UP:?}: {}", load.report());
        }
        if ticks.is_multiple_of(20) && told() {
            break;
        }
    }
    let (over, mut last) = (now(), now());
    while now() - over < PATIENCE.as_nanos() as u64 && now() - last < QUIET.as_nanos() as u64 {
        thread::sleep(TICK);
        load.bulks.iter_mut().for_each(Bulk::flush);
        if load.take() {
            last = now();
        }
    }
    answer_echoes(&places, true)?;
    println!("{}", load.report());
    Ok(())
}
