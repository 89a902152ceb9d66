//! The loop's UDP sockets: one a family for probes, on the base addresses, and those that let the kernel take ESP out
//! of UDP. What can't be opened is tried again, and the reason is kept for `status`. The latter are given to the service
//! manager to keep, and taken back from it after a restart.

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd as _;
use std::time::Duration;

use keys::Carrier;
use tokio::net::UdpSocket;
use tracing::{debug, info, warn};

use super::manager::{self, Kept, Manager};
use crate::kernel::encap::{self, Encap};
use crate::kernel::mtu;
use crate::lease::Addresses;
use crate::node::Datagram;
use crate::probe;
use crate::reconcile::chain;
use crate::repeats::{Repeats, log_came};

/// A socket that could not be opened is tried again after this.
const REOPEN: Duration = Duration::from_secs(2);
/// So many datagrams are read in one go before the loop looks elsewhere.
const BURST: usize = 256;
/// So long after the start a socket that the manager kept may turn out to be wanted: a peer may want ESP in UDP.
const UNCLAIMED: Duration = Duration::from_secs(60);

/// Every UDP socket of the daemon.
#[derive(Default)]
pub(super) struct Sockets {
    manager: Manager,
    kept: Kept,
    probes: Vec<(SocketAddr, UdpSocket)>,
    encaps: Vec<Encap>,
    error: Option<String>,
    failing: Repeats,
    reopen: Option<Duration>,
    /// Room for the largest datagram.
    room: Vec<u8>,
}

/// What became of a datagram.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Sent {
    /// It is out, or lost as any may be.
    Gone,
    /// The kernel knows that its size does not pass.
    TooLarge,
}

impl Sockets {
    /// None is open yet; `kept` are those that `manager` kept from an earlier process.
    pub(super) fn new(manager: Manager, kept: Kept) -> Self {
        Self {
            manager,
            kept,
            room: vec![0; probe::MOST],
            ..Self::default()
        }
    }

    /// Opens what is missing of the probe sockets, one a carrier for each of `bases`, and closes what is not wanted.
    pub(super) fn open_probes(&mut self, bases: Addresses, now: Duration) {
        let sources = [Carrier::Esp, Carrier::Udp].map(probe::source);
        let wanted: Vec<SocketAddr> = bases
            .iter()
            .flat_map(|base| sources.map(|port| SocketAddr::new(base, port)))
            .collect();
        self.probes.retain(|(local, _)| wanted.contains(local));
        let missing = |local: &SocketAddr| !self.probes.iter().any(|(open, _)| open == local);
        for local in wanted.into_iter().filter(missing).collect::<Vec<_>>() {
            match probe_socket(local) {
                Ok(socket) => self.probes.push((local, socket)),
                // The base address comes with the first pass.
                Err(error) => {
                    debug!(%local, %error, "the probe socket can't be opened yet");
                    self.reopen = Some(now + REOPEN);
                }
            }
        }
    }

    /// Opens what is missing of the sockets for ESP in UDP, one for each of the addresses at the port, and closes what
    /// is not wanted.
    pub(super) fn open_encaps(&mut self, wanted: Option<(Addresses, u16)>, now: Duration) {
        self.reopen = None;
        let wanted_any = wanted.is_some();
        let (locals, port) = wanted.unwrap_or_default();
        let wanted: Vec<SocketAddr> = locals.iter().map(|local| SocketAddr::new(local, port)).collect();
        let manager = &self.manager;
        self.encaps.retain(|encap| {
            let stays = wanted.contains(&encap.local());
            if !stays {
                manager.forget(&manager::name(encap.local()));
            }
            stays
        });
        let mut errors = Vec::new();
        let missing = |local: &SocketAddr| !self.encaps.iter().any(|encap| encap.local() == *local);
        for local in wanted.into_iter().filter(missing).collect::<Vec<_>>() {
            match self.take_back(local).map_or_else(|| self.open_encap(local), Ok) {
                Ok(encap) => self.encaps.push(encap),
                Err(wrong) => {
                    errors.push(chain(&wrong));
                    self.reopen = Some(now + REOPEN);
                }
            }
        }
        self.error = (!errors.is_empty()).then(|| errors.join("; "));
        log_came!(
            self.failing.came(self.error.as_deref(), now),
            error,
            [],
            "ESP in UDP can't be received",
            "ESP in UDP can be received again"
        );
        if !wanted_any && now < UNCLAIMED && !self.kept.is_empty() {
            self.reopen.get_or_insert(UNCLAIMED);
        } else {
            self.close_unclaimed();
        }
    }

    fn open_encap(&self, local: SocketAddr) -> Result<Encap, encap::Error> {
        let encap = Encap::open(local)?;
        self.manager.keep(local, encap.as_fd());
        Ok(encap)
    }

    /// The socket at `local` that the manager kept. One that is not what its name says is closed, there too.
    fn take_back(&mut self, local: SocketAddr) -> Option<Encap> {
        let name = manager::name(local);
        let at = self.kept.iter().position(|(kept, _)| *kept == name)?;
        let (_, kept) = self.kept.swap_remove(at);
        match Encap::adopt(kept, local) {
            Ok(encap) => {
                info!(%local, "goes on with the socket for ESP in UDP that the service manager kept");
                Some(encap)
            }
            Err(error) => {
                warn!(
                    error = chain(&error),
                    "the service manager kept a socket that does not fit"
                );
                self.manager.forget(&name);
                None
            }
        }
    }

    /// Closes what the manager kept and nobody wants, there too.
    fn close_unclaimed(&mut self) {
        for (name, _) in std::mem::take(&mut self.kept) {
            info!(name, "closes what the service manager kept: it is not wanted any more");
            self.manager.forget(&name);
        }
    }

    /// Whether a service manager is there to keep the sockets for ESP in UDP over a restart; `None` where there are none.
    pub(super) fn kept_over_restart(&self) -> Option<bool> {
        (!self.encaps.is_empty()).then(|| self.manager.is_there())
    }

    /// When what could not be opened should be tried again; `None` where all is open.
    pub(super) fn reopen(&self) -> Option<Duration> {
        self.reopen
    }

    /// Why ESP in UDP can't be received.
    pub(super) fn error(&self) -> Option<&String> {
        self.error.as_ref()
    }

    /// Waits until a probe has come.
    pub(super) async fn readable(&self) {
        let each: Vec<_> = self
            .probes
            .iter()
            .map(|(_, socket)| Box::pin(socket.readable()))
            .collect();
        if each.is_empty() {
            return std::future::pending().await;
        }
        // An error shows again at the read.
        let _ = futures_util::future::select_all(each).await;
    }

    /// Reads what has come; `each` gets the source and the datagram.
    pub(super) fn read(&mut self, mut each: impl FnMut(IpAddr, &[u8])) {
        let bytes = &mut self.room;
        for (_, socket) in &self.probes {
            for _ in 0..BURST {
                match socket.try_recv_from(bytes) {
                    Ok((len, from)) => each(from.ip(), &bytes[..len]),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    // An ICMP answer to an earlier probe.
                    Err(error) => debug!(%error, "a probe came back"),
                }
            }
        }
        for encap in &self.encaps {
            // What is no ESP, such as a peer's NAT keepalive, comes up to the socket; nobody wants it.
            encap.drain();
        }
    }

    /// Sends a probe.
    pub(super) fn send(&self, datagram: &Datagram) -> Sent {
        let socket = self.probes.iter().find(|(local, _)| {
            local.is_ipv4() == datagram.to.is_ipv4() && local.port() == probe::source(datagram.carrier)
        });
        if let Some((_, socket)) = socket
            && let Err(error) = socket.try_send_to(&datagram.payload(), SocketAddr::new(datagram.to, probe::PORT))
        {
            debug!(to = %datagram.to, padding = datagram.padding, %error, "a probe was not sent");
            if error.raw_os_error() == Some(nix::libc::EMSGSIZE) {
                return Sent::TooLarge;
            }
        }
        Sent::Gone
    }
}

fn probe_socket(local: SocketAddr) -> std::io::Result<UdpSocket> {
    let socket = std::net::UdpSocket::bind(local)?;
    socket.set_nonblocking(true)?;
    mtu::never_fragment(&socket, local.is_ipv6())?;
    UdpSocket::from_std(socket)
}
