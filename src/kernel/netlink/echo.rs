//! The echoes of our own writes, kept out of the listeners' queues by the kernel.
//!
//! A roster of thousands would fill the queues with what we know already, and reading an echo takes as long as making
//! its object. The filters are classic BPF on the netlink header: cheap, and no more than the reader would pass over
//! by itself.

use std::os::fd::AsRawFd;

use nix::libc;

/// Keeps out every message about IPsec that the writing socket with this port caused.
pub(super) fn silence_xfrm(listener: &impl AsRawFd, port: u32) {
    attach(
        listener,
        &[load(WORD, PORT_AT), equal(word(port), 0, 1), end(DROP), end(PASS)],
    );
}

/// Keeps out every message about routes that the writing socket with this port caused. Those about links and addresses
/// stay: what is known of them is kept by them.
pub(super) fn silence_routes(listener: &impl AsRawFd, port: u32) {
    let program = [
        load(HALF, KIND_AT),
        equal(half(libc::RTM_NEWROUTE), 1, 0),
        equal(half(libc::RTM_DELROUTE), 0, 3),
        load(WORD, PORT_AT),
        equal(word(port), 0, 1),
        end(DROP),
        end(PASS),
    ];
    attach(listener, &program);
}

/// Gives a socket a filter. Where that fails the echoes are read, and passed over by the reader.
fn attach(socket: &impl AsRawFd, program: &[libc::sock_filter]) {
    let program = libc::sock_fprog {
        len: u16::try_from(program.len()).expect("a program of a few lines"),
        filter: program.as_ptr().cast_mut(),
    };
    let length = libc::socklen_t::try_from(size_of_val(&program)).expect("a few bytes");
    // SAFETY: the kernel reads `length` bytes of the structure and the lines that it points to, writes to neither, and
    // keeps a copy; both outlive the call.
    let attached = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            length,
        )
    };
    if attached != 0 {
        tracing::debug!(error = %std::io::Error::last_os_error(), "the echoes of our own writes will be read");
    }
}

/// Where `struct nlmsghdr` (linux/netlink.h) has the type and the sender's port. A notification is alone in its buffer.
const KIND_AT: u32 = 4;
const PORT_AT: u32 = 12;
/// Sizes of a load, and verdicts: how many bytes stay.
const WORD: u32 = libc::BPF_W;
const HALF: u32 = libc::BPF_H;
const DROP: u32 = 0;
const PASS: u32 = u32::MAX;

fn load(size: u32, at: u32) -> libc::sock_filter {
    line(libc::BPF_LD | size | libc::BPF_ABS, 0, 0, at)
}

/// Skips so many lines, by whether what was loaded is `value`.
fn equal(value: u32, so: u8, otherwise: u8) -> libc::sock_filter {
    line(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, so, otherwise, value)
}

fn end(verdict: u32) -> libc::sock_filter {
    line(libc::BPF_RET | libc::BPF_K, 0, 0, verdict)
}

fn line(code: u32, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
    let code = u16::try_from(code).expect("codes of classic BPF have 16 bits");
    libc::sock_filter { code, jt, jf, k }
}

/// A number of the machine's order as a load, which is in network order, shows it.
fn word(value: u32) -> u32 {
    u32::from_be_bytes(value.to_ne_bytes())
}

fn half(value: u16) -> u32 {
    u16::from_be_bytes(value.to_ne_bytes()).into()
}
