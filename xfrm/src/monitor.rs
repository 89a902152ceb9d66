//! Listening to what changes in the kernel: one socket in some of a protocol's multicast groups.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use netlink_sys::Socket;

use crate::{
    error::{Error, errno},
    message::MessageRef,
    netlink::{Protocol, ReceiveBuffer, Received, Wait, open},
};

/// A listener. It becomes readable when something changed; [`Monitor::read`] never waits.
///
/// The queue is finite: a reader too slow for a burst loses notifications and is told so once ([`Error::Overrun`]).
pub struct Monitor {
    socket: Socket,
    buffer: ReceiveBuffer,
}

impl Monitor {
    /// Joins the groups (numbers, not masks: `RTNLGRP_LINK` is 1) in the network namespace of the calling thread.
    /// What changes after this call is seen; so open the monitor first and take the dump then.
    pub fn open(protocol: Protocol, groups: &[u32]) -> Result<Self, Error> {
        let (socket, _) = open(protocol)?;
        for &group in groups {
            socket.add_membership(group).map_err(|error| Error::Open {
                protocol,
                step: "NETLINK_ADD_MEMBERSHIP",
                source: errno(&error),
            })?;
        }
        socket.set_non_blocking(true).map_err(|error| Error::Open {
            protocol,
            step: "FIONBIO",
            source: errno(&error),
        })?;
        Ok(Self {
            socket,
            buffer: ReceiveBuffer::new(),
        })
    }

    /// Gives out every message in the queue, oldest first, until it is empty.
    ///
    /// [`Error::Overrun`] says that messages were lost between those given out before and those still in the queue;
    /// call again for the rest (an edge-triggered poll does not report them anew).
    pub fn read(&mut self, each: &mut dyn FnMut(MessageRef<'_>)) -> Result<(), Error> {
        loop {
            match self.buffer.receive(&self.socket, Wait::Not, &mut *each)? {
                Received::Datagram => {}
                Received::Nothing => return Ok(()),
                Received::Lost => return Err(Error::Overrun),
            }
        }
    }
}

impl AsFd for Monitor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for Monitor {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}
