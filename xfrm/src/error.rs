//! What can go wrong between us and the kernel. Every value here is plain text and numbers: no error ever holds a
//! message, so none can hold a key.

use std::fmt;

use nix::errno::Errno;

use crate::netlink::Protocol;

/// The kernel's refusal of one request.
///
/// `Display` gives the kernel's own words where it gave any: "Requested AEAD algorithm not found (ENOSYS)".
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct KernelError {
    /// The positive error number, as in errno(3).
    pub errno: i32,
    /// The text of the extended acknowledgement (NLMSGERR_ATTR_MSG), a fixed string of the kernel.
    pub text: Option<String>,
}

impl KernelError {
    /// The object is not there (ENOENT, ESRCH, ENODEV, EADDRNOTAVAIL are four words for it; the last two belong to
    /// links and addresses): on a removal this is success.
    pub fn is_gone(&self) -> bool {
        matches!(
            self.code(),
            Errno::ENOENT | Errno::ESRCH | Errno::ENODEV | Errno::EADDRNOTAVAIL
        )
    }

    /// An object with the same key is there already (EEXIST).
    pub fn exists(&self) -> bool {
        self.code() == Errno::EEXIST
    }

    fn code(&self) -> Errno {
        Errno::from_raw(self.errno)
    }
}

impl fmt::Display for KernelError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let code = self.code();
        match &self.text {
            Some(text) => f.write_str(text)?,
            None => f.write_str(code.desc())?,
        }
        match code {
            Errno::UnknownErrno => write!(f, " (errno {})", self.errno),
            code => write!(f, " ({code:?})"),
        }
    }
}

impl std::error::Error for KernelError {}

/// Why a netlink operation did not do what was asked.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Error {
    /// No socket: the protocol is not in this kernel, or descriptors have run out.
    #[error("open a netlink socket ({protocol}): {step}")]
    Open {
        /// The protocol that was asked for.
        protocol: Protocol,
        /// The call that failed.
        step: &'static str,
        /// What it said.
        source: Errno,
    },
    /// The kernel refused the request.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// The request was sent and its acknowledgement was lost: it may or may not have been carried out.
    #[error("the kernel's answer was lost, so the outcome is unknown: read the object back")]
    Unknown,
    /// The request was not sent, so it was not carried out.
    #[error("send to the kernel")]
    Send(#[source] Errno),
    /// Nothing can be read from the socket any more.
    #[error("receive from the kernel")]
    Receive(#[source] Errno),
    /// The kernel did not answer in [`crate::netlink::TIMEOUT`].
    #[error("the kernel gave no answer within {} s", crate::netlink::TIMEOUT.as_secs())]
    Timeout,
    /// Every attempt at a dump was interrupted by a change of what was dumped.
    #[error("the dump was interrupted by changes {attempts} times in a row: try again later")]
    Interrupted {
        /// How often it was tried.
        attempts: u32,
    },
    /// Notifications were lost: what is known of the kernel's state must be read anew by a dump. The monitor goes on.
    #[error("notifications were lost: read the state again")]
    Overrun,
    /// A datagram longer than the receive buffer.
    #[error("a datagram of {length} bytes from the kernel does not fit the receive buffer")]
    Truncated {
        /// Its true length in bytes.
        length: usize,
    },
    /// A message too short or inconsistent for its type: the kernel is not one we know.
    #[error("a malformed message of type {kind:#x} and {length} bytes from the kernel")]
    Malformed {
        /// The netlink message type.
        kind: u16,
        /// The length of its payload in bytes.
        length: usize,
    },
}

impl Error {
    /// The kernel says that the object is not there; see [`KernelError::is_gone`].
    pub fn is_gone(&self) -> bool {
        matches!(self, Self::Kernel(error) if error.is_gone())
    }

    /// The kernel says that the object is there already; see [`KernelError::exists`].
    pub fn exists(&self) -> bool {
        matches!(self, Self::Kernel(error) if error.exists())
    }

    /// The request may have been carried out or not: only reading the object back tells.
    pub fn is_unknown(&self) -> bool {
        matches!(self, Self::Unknown | Self::Timeout)
    }
}

/// The error number of a failed system call.
pub(crate) fn errno(error: &std::io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(nix::libc::EIO))
}
