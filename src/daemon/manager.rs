//! The service manager: what it is told, and the sockets that it keeps while no daemon runs.
//!
//! This is the protocol of systemd's sd_notify(3) and of its descriptor store (sd_pid_notify_with_fds(3),
//! sd_listen_fds(3)), spoken by others too: datagrams of `NAME=value` lines to the socket that `NOTIFY_SOCKET` names; kept
//! descriptors are those from 3 on, counted by `LISTEN_FDS`. Without a manager all of it does nothing.
//!
//! A kept socket goes on taking ESP out of UDP, which the kernel does without anybody reading: a restart is then no gap
//! with UDPEncap either.

use std::ffi::OsStr;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt as _;
use std::sync::Arc;

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{
    AddressFamily, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, sendmsg, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;
use tracing::{debug, warn};

use crate::config::flags::Environment;

/// The first descriptor that a manager hands over.
const FIRST: RawFd = 3;
/// How the names of our sockets begin in the store.
const PREFIX: &str = "esp-in-udp-";
/// So long a manager that is busy is waited for.
const PATIENCE: TimeVal = TimeVal::new(1, 0);

/// The manager that started this process, if there is one. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Manager(Option<Arc<Notify>>);

#[derive(Debug)]
struct Notify {
    socket: OwnedFd,
    address: UnixAddr,
}

/// Descriptors that the manager kept, by their names there.
pub type Kept = Vec<(String, OwnedFd)>;

impl Manager {
    /// The manager that `environment` names.
    pub fn of(environment: &Environment) -> Self {
        let Some(path) = value(environment, "NOTIFY_SOCKET").filter(|path| !path.is_empty()) else {
            return Self::default();
        };
        match Notify::to(path) {
            Ok(notify) => Self(Some(notify.into())),
            Err(error) => {
                warn!(socket = %path.display(), %error, "the service manager can't be told anything");
                Self::default()
            }
        }
    }

    /// Whether there is one that may keep sockets. Whether it does is its own affair (FileDescriptorStoreMax of a unit).
    pub fn is_there(&self) -> bool {
        self.0.is_some()
    }

    /// The service serves.
    pub fn ready(&self, status: &str) {
        self.tell(&format!("READY=1\nSTATUS={status}"), None);
    }

    /// The service ends.
    pub fn stopping(&self) {
        self.tell("STOPPING=1\nSTATUS=stopped; the datapath stays as it is", None);
    }

    /// Gives the manager the socket for ESP in UDP at `local` to keep.
    pub fn keep(&self, local: SocketAddr, socket: BorrowedFd<'_>) {
        // Without FDPOLL=0 the first ICMP error that comes to the socket ends the keeping.
        self.tell(
            &format!("FDSTORE=1\nFDPOLL=0\nFDNAME={}", name(local)),
            Some(socket.as_raw_fd()),
        );
    }

    /// The manager need not keep what it has under this name any more.
    pub fn forget(&self, name: &str) {
        self.tell(&format!("FDSTOREREMOVE=1\nFDNAME={name}"), None);
    }

    fn tell(&self, text: &str, descriptor: Option<RawFd>) {
        let Some(notify) = &self.0 else { return };
        debug!(text, "told the service manager");
        if let Err(error) = notify.send(text, descriptor) {
            warn!(text, %error, "the service manager could not be told");
        }
    }
}

impl Notify {
    fn to(path: &OsStr) -> nix::Result<Self> {
        let address = match path.as_bytes() {
            [b'@', name @ ..] => UnixAddr::new_abstract(name)?,
            path => UnixAddr::new(path)?,
        };
        let socket = socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
        setsockopt(&socket, sockopt::SendTimeout, &PATIENCE)?;
        Ok(Self { socket, address })
    }

    fn send(&self, text: &str, descriptor: Option<RawFd>) -> nix::Result<()> {
        let descriptors = descriptor.as_slice();
        let rights = [ControlMessage::ScmRights(descriptors)];
        let control = if descriptors.is_empty() { &[][..] } else { &rights };
        let lines = [IoSlice::new(text.as_bytes())];
        let flags = MsgFlags::MSG_NOSIGNAL;
        sendmsg(self.socket.as_raw_fd(), &lines, control, flags, Some(&self.address)).map(drop)
    }
}

/// The name of the socket at `local` in the store. A colon is not allowed there.
pub fn name(local: SocketAddr) -> String {
    format!("{PREFIX}{}-{}", local.ip().to_string().replace(':', "_"), local.port())
}

/// Takes the descriptors that the manager kept, with their names; children will not have them. To be called once, before
/// anything else is opened that could be taken for one of them.
pub fn kept(environment: &Environment) -> Kept {
    let text = |name| value(environment, name).and_then(OsStr::to_str);
    let ours = text("LISTEN_PID").is_some_and(|pid| pid == std::process::id().to_string());
    let count = text("LISTEN_FDS").and_then(|count| count.parse::<RawFd>().ok());
    let Some(count) = count.filter(|count| ours && (1..=1024).contains(count)) else {
        return Kept::new();
    };
    let mut names = text("LISTEN_FDNAMES").unwrap_or_default().split(':');
    let mut take = |number| {
        let name = names.next().filter(|name| !name.is_empty()).unwrap_or("unknown");
        adopt(number)
            .inspect_err(|error| warn!(name, number, %error, "a descriptor of the service manager is not there"))
            .ok()
            .map(|kept| (name.to_owned(), kept))
    };
    (FIRST..FIRST + count).filter_map(&mut take).collect()
}

fn adopt(number: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: only asks about the number; borrowed for the call.
    let asked = unsafe { BorrowedFd::borrow_raw(number) };
    fcntl(asked, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    // SAFETY: it is open, LISTEN_PID says that it was opened for this process, and `kept` is called before anything
    // else here opens descriptors or asks for these.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

fn value<'a>(environment: &'a Environment, name: &str) -> Option<&'a OsStr> {
    let mut variables = environment.variables.iter();
    variables
        .find(|(variable, _)| variable == name)
        .map(|(_, value)| value.as_os_str())
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::os::fd::AsFd as _;
    use std::os::unix::net::UnixDatagram;

    use nix::sys::socket::{ControlMessageOwned, recvmsg};

    use super::*;

    fn environment(variables: &[(&str, &str)]) -> Environment {
        Environment {
            variables: variables.iter().map(|(n, v)| (n.into(), v.into())).collect(),
            hostname: None,
        }
    }

    /// A message and the descriptors that came with it.
    fn heard(manager: &UnixDatagram) -> (String, Vec<OwnedFd>) {
        let mut bytes = [0; 1024];
        let mut control = nix::cmsg_space!([RawFd; 4]);
        let mut lines = [io::IoSliceMut::new(&mut bytes)];
        let message = recvmsg::<()>(
            manager.as_raw_fd(),
            &mut lines,
            Some(&mut control),
            MsgFlags::MSG_CMSG_CLOEXEC,
        )
        .expect("a message");
        let descriptors = message
            .cmsgs()
            .expect("whole")
            .flat_map(|message| match message {
                // SAFETY: the kernel has just opened them for this process.
                ControlMessageOwned::ScmRights(numbers) => numbers
                    .into_iter()
                    .map(|number| unsafe { OwnedFd::from_raw_fd(number) })
                    .collect::<Vec<_>>(),
                other => panic!("{other:?}"),
            })
            .collect();
        let length = message.bytes;
        (String::from_utf8(bytes[..length].to_vec()).expect("text"), descriptors)
    }

    #[test]
    fn a_manager_hears_all_and_gets_the_socket_itself() {
        let folder = crate::testing::Folder::new();
        let path = folder.path().join("notify");
        let listening = UnixDatagram::bind(&path).expect("a socket");
        let manager = Manager::of(&environment(&[("NOTIFY_SOCKET", path.to_str().expect("text"))]));
        assert!(manager.is_there());
        manager.ready("ready");
        assert_eq!(heard(&listening).0, "READY=1\nSTATUS=ready");
        let kept = UdpSocket::bind("127.0.0.1:0").expect("a socket");
        let local = kept.local_addr().expect("bound");
        manager.keep(local, kept.as_fd());
        let (text, mut descriptors) = heard(&listening);
        assert_eq!(text, format!("FDSTORE=1\nFDPOLL=0\nFDNAME={}", name(local)));
        drop(kept);
        let again = UdpSocket::from(descriptors.pop().expect("the socket"));
        assert_eq!(again.local_addr().expect("still bound"), local);
        assert!(descriptors.is_empty());
        manager.forget(&name(local));
        assert_eq!(heard(&listening).0, format!("FDSTOREREMOVE=1\nFDNAME={}", name(local)));
        manager.stopping();
        assert!(heard(&listening).0.starts_with("STOPPING=1\nSTATUS="));
    }

    #[test]
    fn without_a_manager_or_with_one_that_is_gone_nothing_happens() {
        let nobody = Manager::of(&environment(&[]));
        assert!(!nobody.is_there());
        nobody.ready("ready");
        for path in ["", "/nowhere/notify", "@nobody-listens-at-this-name"] {
            Manager::of(&environment(&[("NOTIFY_SOCKET", path)])).ready("ready");
        }
        let long = "x".repeat(200);
        assert!(!Manager::of(&environment(&[("NOTIFY_SOCKET", &long)])).is_there());
    }

    #[test]
    fn descriptors_for_another_process_or_that_are_not_there_are_not_taken() {
        let pid = std::process::id().to_string();
        for variables in [
            [("LISTEN_PID", "1"), ("LISTEN_FDS", "1"), ("LISTEN_FDNAMES", "a")],
            [("LISTEN_PID", &pid), ("LISTEN_FDS", "0"), ("LISTEN_FDNAMES", "")],
            [("LISTEN_PID", &pid), ("LISTEN_FDS", "-1"), ("LISTEN_FDNAMES", "a")],
            [
                ("LISTEN_PID", &pid),
                ("LISTEN_FDS", "2000000000"),
                ("LISTEN_FDNAMES", "a"),
            ],
            [("LISTEN_PID", &pid), ("LISTEN_FDS", "x"), ("LISTEN_FDNAMES", "a")],
        ] {
            assert!(kept(&environment(&variables)).is_empty(), "{variables:?}");
        }
    }

    #[test]
    fn a_name_in_the_store_has_no_colon() {
        let local = |text: &str| text.parse::<SocketAddr>().expect("an address");
        assert_eq!(name(local("192.0.2.1:4500")), "esp-in-udp-192.0.2.1-4500");
        assert_eq!(name(local("[2001:db8::1]:4500")), "esp-in-udp-2001_db8__1-4500");
    }
}
