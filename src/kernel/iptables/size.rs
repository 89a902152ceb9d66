//! How large a table is: the cheapest sign that another hand has changed it, since the kernel sends none.
//!
//! One getsockopt a table, no process, no lock. Asked only of tables that /proc names already: asking for another would
//! load it. The nft variants of the programs keep their rules in nf_tables, whose generation tells the same.

use std::collections::BTreeMap;
use std::fs;
use std::os::fd::{AsRawFd as _, OwnedFd};

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};

use super::{Chain, Family};

/// `IPT_SO_GET_INFO` and `IP6T_SO_GET_INFO` (linux/netfilter_ipv4/ip_tables.h, netfilter_ipv6/ip6_tables.h).
const GET_INFO: libc::c_int = 64;
/// `struct ipt_getinfo`: the table's name (32 bytes), 11 numbers about its hooks, then the two that are read here.
const INFO: usize = 84;
/// Where the number of entries and their bytes stand in it.
const SIZE: usize = 76;

/// The number of entries and their bytes, as the kernel writes them.
pub(super) type Size = [u8; INFO - SIZE];

/// The sizes of those of `tables` that the kernel holds in the calling thread's network namespace.
pub(super) fn sizes(tables: impl Iterator<Item = (Family, Chain)>) -> BTreeMap<(Family, Chain), Size> {
    let mut sockets: BTreeMap<Family, Option<(OwnedFd, String)>> = BTreeMap::new();
    let mut sizes = BTreeMap::new();
    for (family, table) in tables {
        let Some((socket, names)) = sockets.entry(family).or_insert_with(|| open(family)) else {
            continue;
        };
        if names.lines().any(|name| name == table.table()) {
            sizes.extend(size(socket, family, table).ok().map(|size| ((family, table), size)));
        }
    }
    sizes
}

/// A socket to ask with, and the names of the family's tables; `None` where there is neither.
fn open(family: Family) -> Option<(OwnedFd, String)> {
    let (names, domain) = match family {
        Family::V4 => ("ip_tables_names", AddressFamily::Inet),
        Family::V6 => ("ip6_tables_names", AddressFamily::Inet6),
    };
    let names = fs::read_to_string(format!("/proc/thread-self/net/{names}")).ok()?;
    let socket = socket(domain, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Raw).ok()?;
    Some((socket, names))
}

fn size(socket: &OwnedFd, family: Family, table: Chain) -> Result<Size, Errno> {
    let level = match family {
        Family::V4 => libc::IPPROTO_IP,
        Family::V6 => libc::IPPROTO_IPV6,
    };
    let mut info = [0u8; INFO];
    info[..table.table().len()].copy_from_slice(table.table().as_bytes());
    let mut length = INFO as libc::socklen_t;
    // SAFETY: the descriptor is open; `info` and `length` live across the call, and `length` is the size of `info`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            level,
            GET_INFO,
            info.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    Errno::result(result)?;
    Ok(*info.last_chunk().expect("the size is the end of it"))
}
