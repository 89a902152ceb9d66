//! Network namespaces for tests: they have no names and vanish with the test.

use std::fs::File;
use std::io::Read as _;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use nix::sched::{CloneFlags, setns, unshare};

/// A network namespace.
pub(crate) struct Net(File);

impl Net {
    pub(crate) fn new() -> Self {
        let made = thread::spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET).expect("a network namespace (root)");
            File::open("/proc/thread-self/ns/net").expect("the namespace's file")
        });
        let net = Self(made.join().expect("the namespace is made"));
        net.ip("link set lo up");
        net
    }

    /// Runs `work` on a thread in the namespace.
    pub(crate) fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let inside = scope.spawn(|| {
                setns(self.0.as_fd(), CloneFlags::CLONE_NEWNET).expect("enter the namespace");
                work()
            });
            inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Runs a command line without quotes in the namespace; gives its output.
    pub(crate) fn sh(&self, command: &str) -> String {
        self.feed(command, "")
    }

    /// The same with standard input.
    pub(crate) fn feed(&self, command: &str, input: &str) -> String {
        self.run(|| {
            let mut words = command.split_whitespace();
            let mut child = Command::new(words.next().expect("a command"))
                .args(words)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap_or_else(|error| panic!("{command}: {error}"));
            std::io::Write::write_all(&mut child.stdin.take().expect("piped"), input.as_bytes()).expect(command);
            let mut output = String::new();
            child
                .stdout
                .take()
                .expect("piped")
                .read_to_string(&mut output)
                .expect("text");
            assert!(child.wait().expect("ends").success(), "{command}");
            output
        })
    }

    pub(crate) fn ip(&self, arguments: &str) -> String {
        self.sh(&format!("ip {arguments}"))
    }

    /// Joins two namespaces by a cable whose ends have these names and addresses, IPv4 and IPv6.
    pub(crate) fn cable(&self, name: &str, addresses: [&str; 2], other: &Self, other_name: &str, others: [&str; 2]) {
        let file = format!("/proc/{}/fd/{}", std::process::id(), other.0.as_raw_fd());
        self.ip(&format!(
            "link add {name} type veth peer name {other_name} netns {file}"
        ));
        for (net, name, addresses) in [(self, name, addresses), (other, other_name, others)] {
            for address in addresses {
                net.address(address, name);
            }
            net.ip(&format!("link set {name} up"));
        }
    }

    pub(crate) fn address(&self, address: &str, device: &str) {
        let nodad = if address.contains(':') { "nodad" } else { "" };
        self.ip(&format!("address add {address} dev {device} {nodad}"));
    }

    /// A UDP socket in the namespace.
    pub(crate) fn socket(&self, local: &str) -> UdpSocket {
        let socket = self
            .run(|| UdpSocket::bind(local))
            .unwrap_or_else(|error| panic!("bind {local}: {error}"));
        socket
            .set_read_timeout(Some(Duration::from_secs(3)))
            .expect("a timeout");
        socket
    }
}

/// Sends a datagram and gives the source that its receiver saw; `None` if none came within `wait`.
pub(crate) fn seen(from: &UdpSocket, receiver: &UdpSocket, wait: Duration) -> Option<IpAddr> {
    let to = receiver.local_addr().expect("bound");
    let _ = from.send_to(b"?", to);
    receiver.set_read_timeout(Some(wait)).expect("a timeout");
    let (_, source) = receiver.recv_from(&mut [0; 16]).ok()?;
    Some(source.ip())
}

/// The same, and the answer must come back to the sender from the address that it sent to.
pub(crate) fn seen_and_answered(from: &UdpSocket, receiver: &UdpSocket) -> IpAddr {
    let to: SocketAddr = receiver.local_addr().expect("bound");
    from.send_to(b"?", to).expect("sent");
    let (_, source) = receiver
        .recv_from(&mut [0; 16])
        .unwrap_or_else(|error| panic!("nothing came to {to}: {error}"));
    receiver.send_to(b"!", source).expect("answered");
    let (_, answerer) = from
        .recv_from(&mut [0; 16])
        .unwrap_or_else(|error| panic!("no answer from {to}: {error}"));
    assert_eq!(answerer, to);
    source.ip()
}
