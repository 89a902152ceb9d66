//! The packet path of the unencrypted `udp` backend: IP packets between a TUN device and UDP sockets, in user space.
//!
//! ```text
//!             one packet, or 64 KiB of segments       one datagram a packet, up to 64 KiB of them a message
//!            ┌────────┐ ──▶ split ──▶ outbox ──────────────────────────────▶ ┌────────┐
//!  kernel ◀─▶│ device │               worker/outwards, worker/inwards        │ socket │◀─▶ peers
//!            └────────┘ ◀── coalesce ◀────────────────────────────────────── └────────┘
//!                 routes: an inner address to its peer; whose datagrams are taken
//! ```
//! The wire format is flannel's: the payload of a UDP datagram is one inner IP packet and nothing else. There is no
//! header, no version, no authentication and no encryption. What the speed comes from is that the kernel hands over and
//! takes many segments at once: segmentation and receive offload of the TUN (`virtio_net_hdr`) and of UDP
//! (`UDP_SEGMENT`, `UDP_GRO`). Each is tried and, where the kernel has it not, done without ([`Counters::offloads`]).
//!
//! Pure, and tested as such: `packet`, `checksum`, `virtio`, `split`, `coalesce`, `outbox`, `icmp`, [`Routes`]. System
//! calls are in [`device`], `socket`, `raw` and `worker`. A worker is one thread that owns a queue of the device and its
//! sockets, and serves both directions. It allocates nothing for a packet.

pub mod device;
pub mod routes;

mod checksum;
mod coalesce;
mod counters;
#[cfg(any(test, debug_assertions))]
pub mod fuzz;
mod icmp;
#[cfg(test)]
mod noise;
mod outbox;
mod packet;
mod raw;
#[cfg(test)]
mod sample;
mod shared;
mod socket;
mod split;
mod virtio;
mod worker;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::thread::JoinHandle;

use tokio::sync::watch;

pub use counters::{Counters, Dropped, Offload, Offloads};
pub use routes::Routes;

use device::Queue;
use shared::Shared;
use socket::Wake;
use worker::Worker;

/// What a tunnel is made of. The device must be there ([`device::make`]); its MTU, addresses, routes and being up are
/// the caller's.
#[derive(Clone, Debug)]
pub struct Config {
    /// The TUN device, flannel's `flannel0`.
    pub device: String,
    /// The largest inner packet in bytes: the underlay's MTU less 28 (IPv4 outside) or 48 (IPv6 outside).
    pub mtu: u32,
    /// The node's address towards peers with IPv4; without one those are not reached.
    pub local_v4: Option<Ipv4Addr>,
    /// The node's address towards peers with IPv6; without one those are not reached.
    pub local_v6: Option<Ipv6Addr>,
    /// The UDP port that is listened at and sent from; flannel's is 8285.
    pub port: u16,
    /// The device's own IPv4 address, source of ICMP errors; without one there are none.
    pub inner_v4: Option<Ipv4Addr>,
    /// The device's own IPv6 address, source of ICMPv6 errors; without one there are none.
    pub inner_v6: Option<Ipv6Addr>,
    /// Threads, 1 to 64; each serves both directions. One is best but for nodes with many peers and many processors.
    pub workers: usize,
    /// What may be used of the kernel's offloads.
    pub features: Features,
}

/// Off switches, for kernels and drivers that have an offload and do it wrong. All are on by default.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Features {
    /// `virtio_net_hdr` at the device; without it one packet a system call both ways, and no coalescing.
    pub vnet_header: bool,
    /// `UDP_SEGMENT` at the sockets. Left off on Linux 7.0.0 to 7.1.4 whatever stands here: those damage headers.
    pub udp_segment: bool,
    /// `UDP_GRO` at the sockets.
    pub udp_gro: bool,
    /// Merging received TCP segments into one large packet for the device.
    pub tcp_coalescing: bool,
    /// The same for UDP datagrams, from Linux 6.9 on.
    pub udp_coalescing: bool,
}

impl Default for Features {
    fn default() -> Self {
        Self {
            vnet_header: true,
            udp_segment: true,
            udp_gro: true,
            tcp_coalescing: true,
            udp_coalescing: true,
        }
    }
}

/// How a tunnel is. All but `Running` are final: drop the tunnel and start a new one.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum State {
    /// Packets pass.
    Running,
    /// The device was deleted.
    DeviceGone,
    /// The node has lost this address, which the socket is bound to.
    AddressGone(IpAddr),
    /// A system call failed as none should; its name and the system's reason.
    Broken(String),
}

/// Why a tunnel could not be started.
#[derive(Debug, thiserror::Error)]
pub enum TunnelError {
    /// The configuration makes no sense.
    #[error("tunnel: {0}")]
    Config(&'static str),
    /// The device is not there, is not a TUN, or another program holds it.
    #[error("tunnel: device {name}")]
    Device {
        /// The device's name.
        name: String,
        /// The system's reason.
        source: io::Error,
    },
    /// The socket could not be made or bound.
    #[error("tunnel: UDP socket at {address} port {port}")]
    Socket {
        /// The local address.
        address: IpAddr,
        /// The local port.
        port: u16,
        /// The system's reason.
        source: io::Error,
    },
    /// A thread or its wake-up could not be made.
    #[error("tunnel: worker")]
    Worker(#[source] io::Error),
}

/// A running tunnel; dropping it stops the threads, within milliseconds, and leaves the device as it is.
#[derive(Debug)]
pub struct Tunnel {
    shared: Arc<Shared>,
    threads: Vec<(Arc<Wake>, JoinHandle<()>)>,
}

impl Tunnel {
    /// Opens a queue of the device and the sockets for each worker and starts the threads, with no routes: until
    /// [`Self::set_routes`] all is dropped. Uses the network namespace of the calling thread. An IPv6 address that is
    /// looked for a duplicate of can't be bound yet (`AddrNotAvailable`): try again after a second.
    pub fn start(config: Config) -> Result<Self, TunnelError> {
        if config.local_v4.is_none() && config.local_v6.is_none() {
            return Err(TunnelError::Config("no local address to bind"));
        }
        if !(1..=64).contains(&config.workers) {
            return Err(TunnelError::Config("workers must be 1 to 64"));
        }
        if !(576..=65_507).contains(&config.mtu) {
            return Err(TunnelError::Config("the MTU must be 576 to 65507"));
        }
        let device = |source| TunnelError::Device {
            name: config.device.clone(),
            source,
        };
        device::expect_tun(&config.device).map_err(device)?;
        // All are opened before the first thread runs, so that an error leaves nothing behind.
        let mut parts = Vec::new();
        for _ in 0..config.workers {
            let queue = Queue::attach(&config.device, config.features).map_err(device)?;
            let sockets = socket::open_all(&config)?;
            let wake = Arc::new(Wake::new().map_err(TunnelError::Worker)?);
            parts.push((queue, sockets, wake));
        }
        let offloads = worker::offloads(&config, &parts[0].0, &parts[0].1);
        let shared = Arc::new(Shared::new(config.workers, offloads));
        let mut tunnel = Self {
            shared: shared.clone(),
            threads: Vec::new(),
        };
        for (index, (queue, sockets, wake)) in parts.into_iter().enumerate() {
            let worker = Worker::new(&config, shared.clone(), index, queue, sockets, wake.clone());
            let thread = std::thread::Builder::new()
                .name(format!("tunnel-{index}"))
                .spawn(move || worker.run())
                .map_err(TunnelError::Worker)?;
            tunnel.threads.push((wake, thread));
        }
        Ok(tunnel)
    }

    /// Replaces all routes at once. A packet sees the old ones or the new ones, never a mix.
    pub fn set_routes(&self, routes: Routes) {
        self.shared.set_routes(routes);
    }

    /// The state, to read or to await.
    pub fn state(&self) -> watch::Receiver<State> {
        self.shared.state.subscribe()
    }

    /// What has passed and what has been dropped since the start.
    pub fn counters(&self) -> Counters {
        self.shared.counters()
    }
}

impl Drop for Tunnel {
    fn drop(&mut self) {
        for (wake, _) in &self.threads {
            wake.stop();
        }
        for (_, thread) in self.threads.drain(..) {
            // A thread that panicked has said so on standard error.
            drop(thread.join());
        }
    }
}
