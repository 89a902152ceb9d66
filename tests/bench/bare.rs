//! The other side of the comparison: what the kernel alone needs for the same objects.
//!
//! The messages are the kernel's own: a dump of SAs, policies and routes has the form of the requests that make them, so
//! what the daemon's code made is read back once and sent again as it is. Nothing of the daemon's transport is used.

use std::collections::VecDeque;

use anyhow::{Context as _, Result, bail, ensure};
use netlink_sys::{Socket, SocketAddr, protocols};
use ringmail::kernel::{ROUTE_PROTOCOL, priority, reqid_slot};

/// Requests in one send, as many as the daemon's.
const BATCH: usize = 128;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
/// include/uapi/linux/xfrm.h, include/uapi/linux/rtnetlink.h
const XFRM_MSG_NEWSA: u16 = 16;
const XFRM_MSG_GETSA: u16 = 18;
const XFRM_MSG_NEWPOLICY: u16 = 19;
const XFRM_MSG_GETPOLICY: u16 = 21;
const RTM_NEWROUTE: u16 = 24;
const RTM_GETROUTE: u16 = 26;
/// NLM_F_REQUEST, NLM_F_ACK, NLM_F_EXCL, NLM_F_CREATE.
const MAKE: u16 = 0x1 | 0x4 | 0x200 | 0x400;
/// NLM_F_REQUEST, NLM_F_DUMP.
const DUMP: u16 = 0x1 | 0x300;

const HEADER: usize = 16;
/// Offsets in the messages after the header: `reqid` of `struct xfrm_usersa_info`, `priority` and `index` of `struct
/// xfrm_userpolicy_info`, `rtm_protocol` and `rtm_type` of `struct rtmsg`.
const SA_REQID: usize = HEADER + 208;
const POLICY_PRIORITY: usize = HEADER + 152;
const POLICY_INDEX: usize = HEADER + 156;
const ROUTE_PROTOCOL_AT: usize = HEADER + 5;
const ROUTE_KIND_AT: usize = HEADER + 7;
const RTN_UNICAST: u8 = 1;

/// Requests that make the peers' objects, ready to be sent: a buffer for each send.
pub(crate) struct Prebuilt {
    xfrm: Vec<(usize, Vec<u8>)>,
    route: Vec<(usize, Vec<u8>)>,
}

impl Prebuilt {
    /// What the namespace of this thread holds of peers.
    pub(crate) fn read() -> Result<Self> {
        let mut sas = dump(protocols::NETLINK_XFRM, XFRM_MSG_GETSA, XFRM_MSG_NEWSA, &[])?;
        sas.retain(|sa| number(sa, SA_REQID).and_then(reqid_slot).is_some());
        // The kernel lists the newest first.
        sas.reverse();
        let mut policies = dump(protocols::NETLINK_XFRM, XFRM_MSG_GETPOLICY, XFRM_MSG_NEWPOLICY, &[])?;
        policies.retain(|policy| {
            number(policy, POLICY_PRIORITY).is_some_and(|at| at == priority::PEER || at == priority::PROBE)
        });
        policies.sort_by_key(|policy| number(policy, POLICY_INDEX));
        for policy in &mut policies {
            // It would be searched for, where the daemon leaves the choice to the kernel.
            policy[POLICY_INDEX..POLICY_INDEX + 4].fill(0);
        }
        // `struct rtmsg` of an IPv4 dump.
        let mut filter = [0; 12];
        filter[0] = 2;
        let mut routes = dump(protocols::NETLINK_ROUTE, RTM_GETROUTE, RTM_NEWROUTE, &filter)?;
        routes.retain(|route| route[ROUTE_PROTOCOL_AT] == ROUTE_PROTOCOL && route[ROUTE_KIND_AT] == RTN_UNICAST);
        sas.append(&mut policies);
        Ok(Self {
            xfrm: batches(sas),
            route: batches(routes),
        })
    }

    /// How many requests there are.
    pub(crate) fn len(&self) -> usize {
        self.xfrm.iter().chain(&self.route).map(|(count, _)| count).sum()
    }
}

/// The two sockets of the loop.
pub(crate) struct Bare {
    xfrm: Socket,
    route: Socket,
    buffer: Vec<u8>,
}

impl Bare {
    /// Opens the sockets in the namespace of this thread.
    pub(crate) fn open() -> Result<Self> {
        Ok(Self {
            xfrm: open(protocols::NETLINK_XFRM)?,
            route: open(protocols::NETLINK_ROUTE)?,
            buffer: vec![0; 128 << 10],
        })
    }

    /// Sends each buffer and reads its acknowledgements.
    pub(crate) fn send(&mut self, messages: &Prebuilt) -> Result<()> {
        let Self { xfrm, route, buffer } = self;
        for (socket, batches) in [(xfrm, &messages.xfrm), (route, &messages.route)] {
            for (count, wire) in batches {
                socket.send_to(wire, &SocketAddr::new(0, 0), 0)?;
                let mut open = *count;
                while open > 0 {
                    let length = socket.recv(&mut &mut buffer[..], 0)?;
                    for message in Messages(&buffer[..length]) {
                        ensure!(kind(message) == NLMSG_ERROR, "an answer that is no acknowledgement");
                        let errno = number(message, HEADER).context("an errno")?;
                        ensure!(errno == 0, "the kernel refused: errno {}", errno.cast_signed());
                        open -= 1;
                    }
                }
            }
        }
        Ok(())
    }
}

fn open(protocol: isize) -> Result<Socket> {
    let mut socket = Socket::new(protocol)?;
    socket.bind_auto()?;
    socket.set_cap_ack(true)?;
    socket.set_rx_buf_sz(4_u32 << 20)?;
    Ok(socket)
}

/// Turns dumped messages into requests, in sends of [`BATCH`].
fn batches(messages: Vec<Vec<u8>>) -> Vec<(usize, Vec<u8>)> {
    let mut left = VecDeque::from(messages);
    let mut batches = Vec::new();
    while !left.is_empty() {
        let now: Vec<Vec<u8>> = left.drain(..left.len().min(BATCH)).collect();
        let mut wire = Vec::new();
        for (sequence, mut message) in (1_u32..).zip(now.iter().cloned()) {
            message[6..8].copy_from_slice(&MAKE.to_ne_bytes());
            message[8..12].copy_from_slice(&sequence.to_ne_bytes());
            message[12..16].fill(0);
            wire.extend(message);
        }
        batches.push((now.len(), wire));
    }
    batches
}

/// Every message of type `wanted` that the dump `request` gives.
fn dump(protocol: isize, request: u16, wanted: u16, body: &[u8]) -> Result<Vec<Vec<u8>>> {
    let mut socket = Socket::new(protocol)?;
    socket.bind_auto()?;
    let mut wire = Vec::new();
    wire.extend(u32::try_from(HEADER + body.len())?.to_ne_bytes());
    wire.extend(request.to_ne_bytes());
    wire.extend(DUMP.to_ne_bytes());
    wire.extend([0; 8]);
    wire.extend(body);
    socket.send_to(&wire, &SocketAddr::new(0, 0), 0)?;
    let mut buffer = vec![0; 128 << 10];
    let mut found = Vec::new();
    loop {
        let length = socket.recv(&mut &mut buffer[..], 0)?;
        for message in Messages(&buffer[..length]) {
            match kind(message) {
                NLMSG_DONE => return Ok(found),
                NLMSG_ERROR => bail!("the kernel refuses the dump {request}"),
                kind if kind == wanted => found.push(message.to_vec()),
                _ => {}
            }
        }
    }
}

/// The messages of a datagram, headers included.
struct Messages<'a>(&'a [u8]);

impl<'a> Iterator for Messages<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        let length = usize::try_from(number(self.0, 0)?).ok()?;
        let message = self.0.get(..length).filter(|message| message.len() >= HEADER)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    }
}

fn kind(message: &[u8]) -> u16 {
    u16::from_ne_bytes([message[4], message[5]])
}

fn number(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().copied().map(u32::from_ne_bytes)
}
