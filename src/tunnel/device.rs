//! The TUN device: made to stay, and opened one queue a worker.

use std::fs::{File, OpenOptions};
use std::io::{self, Error, ErrorKind, IoSlice, Read as _, Write as _};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use super::counters::Offload;
use super::virtio::{HEADER, Header};
use super::{Features, Offloads};

/// Packets that the device holds for a queue that is not read at the moment; the kernel's own default is 500.
const QUEUE_LENGTH: i32 = 1000;

/// `SIOCETHTOOL` of linux/sockios.h.
const SIOCETHTOOL: u64 = 0x8946;

/// `ETHTOOL_GDRVINFO` of linux/ethtool.h.
const ETHTOOL_GDRVINFO: u32 = 3;

/// `TUN_F_*` of linux/if_tun.h: what a reader of the device can take.
mod flag {
    pub(super) const CSUM: u32 = 0x01;
    pub(super) const TSO4: u32 = 0x02;
    pub(super) const TSO6: u32 = 0x04;
    pub(super) const TSO_ECN: u32 = 0x08;
    pub(super) const USO4: u32 = 0x20;
    pub(super) const USO6: u32 = 0x40;
}

/// Makes the TUN device `name` in the calling thread's network namespace, to stay when the daemon ends: its addresses and
/// routes survive a restart. A TUN of that name that is there already is left as it is. MTU, addresses, routes and `up`
/// are the caller's. Needs `CAP_NET_ADMIN` and /dev/net/tun.
///
/// Fails with `AlreadyExists` if the name belongs to a device that is not a TUN, else with the system's reason.
pub fn make(name: &str) -> io::Result<()> {
    match expect_tun(name) {
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        other => return other,
    }
    let (file, _, _) = open(name, true)?;
    ioctl_value(&file, libc::TUNSETPERSIST, 1, "TUNSETPERSIST")?;
    let mut request = Request::new(name)?;
    request.0.ifr_ifru.ifru_metric = QUEUE_LENGTH;
    request.call(&control_socket()?, libc::SIOCSIFTXQLEN, "SIOCSIFTXQLEN")
}

/// Whether `name` is a TUN: `NotFound` if there is no such device, `AlreadyExists` if it is something else.
pub(super) fn expect_tun(name: &str) -> io::Result<()> {
    if nix::net::if_::if_nametoindex(name).is_err() {
        return Err(Error::new(ErrorKind::NotFound, "there is no such device"));
    }
    // Asked of the driver and not by opening: another queue would get packets that nobody reads.
    let mut info = DriverInfo {
        command: ETHTOOL_GDRVINFO,
        driver: [0; 32],
        version: [0; 32],
        firmware: [0; 32],
        bus: [0; 32],
        rest: [0; 64],
    };
    let mut request = Request::new(name)?;
    request.0.ifr_ifru.ifru_data = (&raw mut info).cast();
    let told = request.call(&control_socket()?, SIOCETHTOOL, "ETHTOOL_GDRVINFO");
    let is = |field: &[u8; 32], word: &[u8]| field.starts_with(word) && field[word.len()] == 0;
    match told {
        Ok(()) if is(&info.driver, b"tun") && is(&info.bus, b"tun") => Ok(()),
        Ok(()) => Err(Error::new(
            ErrorKind::AlreadyExists,
            "there is a device of that name, and it is no TUN",
        )),
        // A device without a driver to ask, such as a dummy of old kernels.
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Err(Error::new(
            ErrorKind::AlreadyExists,
            "there is a device of that name, and it is no TUN",
        )),
        Err(error) => Err(error),
    }
}

/// One queue of the device. Dropping it gives the queue back; the device stays.
#[derive(Debug)]
pub(super) struct Queue {
    file: File,
    /// Packets have a [`Header`] in front.
    vnet: bool,
    /// What [`Offloads`] says of the device.
    pub(super) offloads: Offloads,
}

impl Queue {
    /// Opens a queue of a device that is there, which stays when the queue is closed.
    pub(super) fn attach(name: &str, features: Features) -> io::Result<Self> {
        let (file, vnet, refused) = open(name, features.vnet_header)?;
        // Also where somebody else made it: the routes on it should outlive this process.
        ioctl_value(&file, libc::TUNSETPERSIST, 1, "TUNSETPERSIST")?;
        let mut offloads = Offloads::default();
        if vnet {
            ioctl_pointer(&file, libc::TUNSETVNETHDRSZ, HEADER as i32, "TUNSETVNETHDRSZ")?;
            offloads.udp_split = negotiate(&file, &mut offloads.vnet_header)?;
        } else {
            // The device keeps what was agreed with an earlier reader.
            ioctl_value(&file, libc::TUNSETOFFLOAD, 0, "TUNSETOFFLOAD")?;
            let reason = match refused {
                Some(error) => format!("the device has no virtio_net_hdr: {error}"),
                None => "switched off".to_owned(),
            };
            offloads.vnet_header = Offload::Off(reason);
            offloads.udp_split = Offload::Off("needs virtio_net_hdr".to_owned());
        }
        Ok(Self { file, vnet, offloads })
    }

    /// Reads one packet to `buffer[HEADER..]`: its header and length. `WouldBlock` if there is none. What stands before it
    /// is overwritten, so that one read, without a vector, does for both.
    pub(super) fn read(&self, buffer: &mut [u8]) -> io::Result<(Header, usize)> {
        if !self.vnet {
            return Ok((Header::default(), (&self.file).read(&mut buffer[HEADER..])?));
        }
        let length = (&self.file).read(buffer)?;
        let header = buffer.first_chunk().map_or_else(Header::default, Header::from_bytes);
        Ok((header, length.saturating_sub(HEADER)))
    }

    /// Writes one packet, as a whole or not at all: the bytes that the device took.
    pub(super) fn write(&self, header: &Header, packet: &[u8]) -> io::Result<usize> {
        if self.vnet {
            (&self.file).write_vectored(&[IoSlice::new(&header.to_bytes()), IoSlice::new(packet)])
        } else {
            (&self.file).write(packet)
        }
    }
}

impl AsFd for Queue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Opens a queue, with as many of the features as the kernel has: the file, whether packets have a header, and the
/// refusal where they have none against the wish.
fn open(name: &str, vnet: bool) -> io::Result<(File, bool, Option<Error>)> {
    let attempts = [
        (vnet, true),
        (vnet, false), // a device that was made with a single queue
        (false, true),
        (false, false),
    ];
    let mut first = None;
    for (vnet, multi) in attempts {
        // A descriptor takes one device, also where it failed.
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/net/tun")?;
        let mut flags = libc::IFF_TUN | libc::IFF_NO_PI;
        if vnet {
            flags |= libc::IFF_VNET_HDR;
        }
        if multi {
            flags |= libc::IFF_MULTI_QUEUE;
        }
        let mut request = Request::new(name)?;
        request.0.ifr_ifru.ifru_flags = flags as i16;
        match request.call(&file, libc::TUNSETIFF, "TUNSETIFF") {
            Ok(()) => return Ok((file, vnet, first.filter(|_| !vnet))),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => first = first.or(Some(error)),
            Err(error) => return Err(error),
        }
    }
    Err(first.unwrap_or_else(|| Error::from(ErrorKind::Unsupported)))
}

/// Asks for as many offloads as the kernel has; it refuses a set with one that it does not know. What is off about
/// splitting UDP is returned, and what is off altogether set in `tcp`.
fn negotiate(file: &File, tcp: &mut Offload) -> io::Result<Offload> {
    let base = flag::CSUM | flag::TSO4 | flag::TSO6;
    let udp = flag::USO4 | flag::USO6;
    let mut refused = None;
    for set in [base | flag::TSO_ECN | udp, base | flag::TSO_ECN, base, flag::CSUM, 0] {
        match ioctl_value(file, libc::TUNSETOFFLOAD, u64::from(set), "TUNSETOFFLOAD") {
            Ok(()) => {
                let why = |refused: &Option<Error>| refused.as_ref().map_or_else(String::new, Error::to_string);
                if set & base != base {
                    *tcp = Offload::Off(why(&refused));
                }
                return Ok(if set & udp == udp {
                    Offload::On
                } else {
                    Offload::Off(why(&refused))
                });
            }
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => refused = Some(error),
            Err(error) => return Err(error),
        }
    }
    Err(refused.unwrap_or_else(|| Error::from(ErrorKind::Unsupported)))
}

/// `struct ethtool_drvinfo` of linux/ethtool.h: 196 bytes.
#[repr(C)]
struct DriverInfo {
    command: u32,
    driver: [u8; 32],
    version: [u8; 32],
    firmware: [u8; 32],
    bus: [u8; 32],
    /// `erom_version`, reserved bytes and counts, which are not looked at.
    rest: [u8; 64],
}

/// A `struct ifreq` with a name.
struct Request(libc::ifreq);

impl Request {
    fn new(name: &str) -> io::Result<Self> {
        if name.is_empty() || name.len() >= libc::IFNAMSIZ || name.bytes().any(|byte| byte == 0 || byte == b'%') {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "a device's name is 1 to 15 bytes, without %",
            ));
        }
        // SAFETY: an ifreq is integers, arrays and a pointer, for all of which zero bytes are a value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        Ok(Self(request))
    }

    /// `request` must be one that takes an ifreq; the error names it.
    fn call(&mut self, file: &impl AsRawFd, request: u64, what: &str) -> io::Result<()> {
        // SAFETY: the descriptor is open, and the kernel reads and writes no more than an ifreq at this address, and
        // what `ifru_data` points to where the caller has set it, which outlives the call.
        let code = unsafe { libc::ioctl(file.as_raw_fd(), request as libc::Ioctl, &raw mut self.0) };
        checked(code, what)
    }
}

fn ioctl_value(file: &File, request: libc::Ioctl, value: u64, what: &str) -> io::Result<()> {
    // SAFETY: the descriptor is open, and the requests that this is called with take the argument as a number.
    let code = unsafe { libc::ioctl(file.as_raw_fd(), request, value as libc::c_ulong) };
    checked(code, what)
}

fn ioctl_pointer(file: &File, request: libc::Ioctl, value: i32, what: &str) -> io::Result<()> {
    // SAFETY: the descriptor is open, and the kernel reads one int at the address.
    let code = unsafe { libc::ioctl(file.as_raw_fd(), request, &raw const value) };
    checked(code, what)
}

/// The error with the name of the call, and its number kept for [`Error::raw_os_error`]'s readers where it matters.
fn checked(code: libc::c_int, what: &str) -> io::Result<()> {
    if code >= 0 {
        return Ok(());
    }
    let error = Error::last_os_error();
    tracing::debug!("{what}: {error}");
    Err(error)
}

/// A socket to ask about devices with.
fn control_socket() -> io::Result<OwnedFd> {
    Ok(socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?)
}
