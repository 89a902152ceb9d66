//! A worker: one thread that owns a queue of the device and its sockets, and serves both directions.
//!
//! It waits for whatever can be read, serves that for a while, and waits anew; under load the waiting costs one system
//! call in a hundred. Nothing that a peer or the network does ends it: only the device's end, the loss of the address
//! and the owner do.

mod inwards;
mod outwards;

use std::io::Error;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::counters::Cell;
use super::device::Queue;
use super::icmp::Problem;
use super::raw::Answers;
use super::shared::{Shared, View};
use super::socket::{self, Sockets, Wake};
use super::{Config, Offload, Offloads, State};
use inwards::Inwards;
use outwards::Outwards;

/// How often the addresses are looked at; a send that fails for want of one looks at once.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// How long an IPv6 address may be missing: after its link was down the kernel looks for a duplicate, and nobody can be
/// bound to it meanwhile.
const TENTATIVE: Duration = Duration::from_secs(3);

/// The pause after an error that should not have been, lest it be had again at once and for ever.
const PAUSE: Duration = Duration::from_millis(10);

/// What both directions use.
pub(super) struct Common {
    shared: Arc<Shared>,
    index: usize,
    queue: Queue,
    sockets: Sockets,
    view: View,
    answers: Answers,
    mtu: usize,
    /// A send failed as one does whose source address is gone.
    doubtful: bool,
    /// An error that should not have been.
    strange: bool,
}

impl Common {
    fn cell(&self) -> &Cell {
        &self.shared.cells[self.index]
    }

    /// Answers a packet that goes nowhere.
    fn tell(&mut self, problem: Problem, packet: &[u8]) {
        if self.answers.tell(problem, packet) {
            self.cell().icmp_sent.add(1);
        }
    }
}

pub(super) struct Worker {
    common: Common,
    wake: Arc<Wake>,
    outwards: Outwards,
    inwards: Inwards,
    looked: Instant,
    /// Since when an address has been missing.
    missing: Option<Instant>,
}

/// Whether a direction has more to do at once.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Left {
    Nothing,
    More,
}

/// Who can be read: the device, the sockets.
#[derive(Clone, Copy, Debug)]
struct Ready {
    stop: bool,
    device: bool,
    v4: bool,
    v6: bool,
}

/// What is in use, seen from the first worker's queue and sockets; all workers' are alike.
pub(super) fn offloads(config: &Config, queue: &Queue, sockets: &Sockets) -> Offloads {
    let mut offloads = queue.offloads.clone();
    if let Some(socket) = sockets.v4.as_ref().or(sockets.v6.as_ref()) {
        offloads.udp_segment = socket.udp_segment.clone();
        offloads.udp_gro = socket.udp_gro.clone();
    }
    let off = |reason: &str| Offload::Off(reason.to_owned());
    offloads.tcp_coalescing = match () {
        () if !config.features.tcp_coalescing => off("switched off"),
        () if offloads.vnet_header != Offload::On => off("needs virtio_net_hdr"),
        () => Offload::On,
    };
    offloads.udp_coalescing = match () {
        () if !config.features.udp_coalescing => off("switched off"),
        () if offloads.udp_split != Offload::On => off("the device does not segment UDP"),
        () if socket::kernel_release() < (6, 9, 0) => off("Linux before 6.9"),
        () => Offload::On,
    };
    offloads
}

impl Worker {
    pub(super) fn new(
        config: &Config,
        shared: Arc<Shared>,
        index: usize,
        queue: Queue,
        sockets: Sockets,
        wake: Arc<Wake>,
    ) -> Self {
        let offloads = offloads(config, &queue, &sockets);
        let view = shared.view();
        Self {
            common: Common {
                shared,
                index,
                queue,
                sockets,
                view,
                answers: Answers::new(config.inner_v4, config.inner_v6),
                mtu: config.mtu as usize,
                doubtful: false,
                strange: false,
            },
            wake,
            outwards: Outwards::new(offloads.udp_segment == Offload::On),
            inwards: Inwards::new(
                offloads.tcp_coalescing == Offload::On,
                offloads.udp_coalescing == Offload::On,
            ),
            looked: Instant::now(),
            missing: None,
        }
    }

    /// Serves until the tunnel ends or is dropped.
    pub(super) fn run(mut self) {
        let _fall = Fall(self.common.shared.clone());
        let mut left = Left::Nothing;
        loop {
            let ready = match self.wait(left) {
                Ok(ready) => ready,
                Err(error) => {
                    return self.common.shared.end(State::Broken(format!("poll: {error}")));
                }
            };
            // Another worker's end is this one's.
            if ready.stop || self.common.shared.ended() {
                return;
            }
            self.common.shared.refresh(&mut self.common.view);
            left = Left::Nothing;
            if ready.device {
                match self.outwards.serve(&mut self.common) {
                    Ok(Left::More) => left = Left::More,
                    Ok(Left::Nothing) => {}
                    Err(state) => return self.common.shared.end(state),
                }
            }
            for (ready, v6) in [(ready.v4, false), (ready.v6, true)] {
                if ready {
                    match self.inwards.serve(&mut self.common, v6) {
                        Ok(Left::More) => left = Left::More,
                        Ok(Left::Nothing) => {}
                        Err(state) => return self.common.shared.end(state),
                    }
                }
            }
            if let Some(state) = self.look() {
                return self.common.shared.end(state);
            }
        }
    }

    fn wait(&self, left: Left) -> Result<Ready, Errno> {
        let common = &self.common;
        let wait = |fd| PollFd::new(fd, PollFlags::POLLIN);
        let (v4, v6) = (common.sockets.v4.as_ref(), common.sockets.v6.as_ref());
        // A family without a socket waits for the wake-up a second time.
        let mut fds = [
            wait(self.wake.as_fd()),
            wait(common.queue.as_fd()),
            wait(v4.map_or_else(|| self.wake.as_fd(), |socket| socket.as_fd())),
            wait(v6.map_or_else(|| self.wake.as_fd(), |socket| socket.as_fd())),
        ];
        let timeout = match left {
            Left::More => PollTimeout::ZERO,
            Left::Nothing => PollTimeout::try_from(LOOK_EVERY).unwrap_or(PollTimeout::MAX),
        };
        match poll(&mut fds, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error),
        }
        // An error is told by the read that it makes fail.
        let ready = |index: usize| fds[index].any().unwrap_or(true);
        Ok(Ready {
            stop: ready(0),
            device: ready(1),
            v4: v4.is_some() && ready(2),
            v6: v6.is_some() && ready(3),
        })
    }

    /// Looks whether the node still has the addresses, now and then or where there is doubt.
    fn look(&mut self) -> Option<State> {
        if std::mem::take(&mut self.common.strange) {
            std::thread::sleep(PAUSE);
        }
        let since = self.looked.elapsed();
        // Doubt is not looked into for every packet: a route that is missing raises it too.
        if since < LOOK_EVERY && !(self.common.doubtful && since > PAUSE) {
            return None;
        }
        self.looked = Instant::now();
        self.common.doubtful = false;
        let sockets = [&self.common.sockets.v4, &self.common.sockets.v6];
        let Some(lost) = sockets.into_iter().flatten().find(|socket| !socket.has_address()) else {
            self.missing = None;
            return None;
        };
        let since = *self.missing.get_or_insert(self.looked);
        let patience = if lost.local.is_ipv6() {
            TENTATIVE
        } else {
            Duration::ZERO
        };
        (since.elapsed() >= patience).then_some(State::AddressGone(lost.local))
    }
}

/// Says that the tunnel has ended if its thread panics: the daemon would wait for packets for ever.
struct Fall(Arc<Shared>);

impl Drop for Fall {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.end(State::Broken("a worker panicked".to_owned()));
        }
    }
}

/// What an error of the device means: `None` that it is about one packet alone.
fn device_end(error: &Error) -> Option<State> {
    match error.raw_os_error() {
        // The descriptor has no device any more, or is about to lose it.
        Some(libc::EBADFD | libc::EFAULT) => Some(State::DeviceGone),
        // Down; no memory; a packet that it can't take or give.
        Some(libc::EIO | libc::ENOMEM | libc::ENOBUFS | libc::EAGAIN | libc::EINVAL | libc::EINTR) => None,
        Some(libc::EMSGSIZE | libc::E2BIG | libc::EPERM | libc::ENETDOWN) => None,
        _ => Some(State::Broken(format!("the device: {error}"))),
    }
}
