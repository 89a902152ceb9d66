//! Nodes as network namespaces, joined by a bridge-less pair of Ethernet devices; nothing of the machine's own network is
//! touched, and all is gone with the last descriptor of a namespace.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd as _;
use std::thread;
use std::time::{Duration, Instant};

use super::namespace::Namespace;
use ringmail::tunnel::{Config, Features, Routes, State, Tunnel, device};

/// flannel's port.
pub(crate) const PORT: u16 = 8285;

/// One of two nodes.
pub(crate) struct Node {
    pub(crate) namespace: Namespace,
    pub(crate) number: u8,
}

/// Two nodes, 1 and 2: eth0 with 192.0.2.N/24 and 2001:db8::N/64, flannel0 with 10.244.N.0 and fd00:10:244:N::.
pub(crate) struct Lab {
    pub(crate) one: Node,
    pub(crate) two: Node,
}

impl Lab {
    pub(crate) fn new() -> Self {
        let lab = Self::bare();
        for node in [&lab.one, &lab.two] {
            node.namespace.run(|| device::make("flannel0").expect("a TUN"));
            node.address();
        }
        lab
    }

    /// Without flannel0.
    pub(crate) fn bare() -> Self {
        let node = |number| Node {
            namespace: Namespace::new(),
            number,
        };
        let lab = Self {
            one: node(1),
            two: node(2),
        };
        let other = lab.two.namespace.path();
        lab.one
            .namespace
            .command(&format!("ip link add eth0 type veth peer name eth0 netns {other}"));
        for node in [&lab.one, &lab.two] {
            let (ns, number) = (&node.namespace, node.number);
            ns.command("ip link set lo up");
            ns.command(&format!("ip address add 192.0.2.{number}/24 dev eth0"));
            ns.command(&format!("ip address add 2001:db8::{number}/64 dev eth0 nodad"));
            ns.command("ip link set eth0 up");
        }
        lab
    }

    /// Both tunnels, each with a route to the other node.
    pub(crate) fn start(&self, change: impl Fn(&mut Config)) -> (Tunnel, Tunnel) {
        (self.one.start(&change), self.two.start(&change))
    }
}

/// Which family is outside.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) enum Outer {
    V4,
    V6,
}

impl Node {
    /// Brings flannel0 up with its addresses and routes, as the daemon would.
    pub(crate) fn address(&self) {
        let (ns, number) = (&self.namespace, self.number);
        ns.command("ip link set flannel0 mtu 1452 up");
        ns.command(&format!("ip address add 10.244.{number}.0/32 dev flannel0"));
        ns.command(&format!("ip address add fd00:10:244:{number}::/128 dev flannel0 nodad"));
        ns.command("ip route add 10.244.0.0/16 dev flannel0");
        ns.command("ip route add fd00:10:244::/48 dev flannel0");
    }

    pub(crate) fn v4(&self) -> IpAddr {
        Ipv4Addr::new(10, 244, self.number, 0).into()
    }

    pub(crate) fn v6(&self) -> IpAddr {
        Ipv6Addr::new(0xfd00, 0x10, 0x244, u16::from(self.number), 0, 0, 0, 0).into()
    }

    pub(crate) fn public(&self, outer: Outer) -> IpAddr {
        match outer {
            Outer::V4 => Ipv4Addr::new(192, 0, 2, self.number).into(),
            Outer::V6 => Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, u16::from(self.number)).into(),
        }
    }

    fn config(&self) -> Config {
        let number = self.number;
        Config {
            device: "flannel0".to_owned(),
            mtu: 1452,
            local_v4: Some(Ipv4Addr::new(192, 0, 2, number)),
            local_v6: Some(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, u16::from(number))),
            port: PORT,
            inner_v4: Some(Ipv4Addr::new(10, 244, number, 0)),
            inner_v6: Some(Ipv6Addr::new(0xfd00, 0x10, 0x244, u16::from(number), 0, 0, 0, 0)),
            workers: 1,
            features: Features::default(),
        }
    }

    /// A tunnel with a route to the other node by IPv4.
    pub(crate) fn start(&self, change: impl Fn(&mut Config)) -> Tunnel {
        let mut config = self.config();
        change(&mut config);
        let tunnel = self.namespace.run(|| Tunnel::start(config)).expect("a tunnel");
        tunnel.set_routes(self.routes(Outer::V4));
        tunnel
    }

    /// To the other node, both families inside.
    pub(crate) fn routes(&self, outer: Outer) -> Routes {
        let other = Self {
            namespace: Namespace(self.namespace.0.try_clone().expect("a descriptor")),
            number: 3 - self.number,
        };
        let peer = SocketAddr::new(other.public(outer), PORT);
        let nets = [format!("{}/24", other.v4()), format!("{}/64", other.v6())];
        Routes::new(nets.map(|net| (net.parse().expect("a net"), peer)))
    }

    /// Whether an address answers, within two seconds; what ping prints.
    pub(crate) fn ping(&self, target: IpAddr, more: &str) -> (bool, String) {
        self.namespace
            .try_command(&format!("ping -n -c 1 -W 2 {more} {target}"))
    }

    pub(crate) fn must_ping(&self, target: IpAddr, more: &str) -> String {
        let (good, text) = self.ping(target, more);
        assert!(good, "node {} to {target} {more}: {text}", self.number);
        text
    }

    /// Turns off an offload of eth0, by its number in linux/ethtool.h.
    pub(crate) fn ethtool_off(&self, command: u32) {
        self.namespace.run(|| {
            let mut value = [command, 0u32];
            // SAFETY: an ifreq is integers, arrays and a pointer, for all of which zero bytes are a value.
            let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
            for (to, from) in request.ifr_name.iter_mut().zip(*b"eth0") {
                *to = from as libc::c_char;
            }
            request.ifr_ifru.ifru_data = (&raw mut value).cast();
            let socket = std::net::UdpSocket::bind("0.0.0.0:0").expect("a socket");
            // SAFETY: SIOCETHTOOL takes an ifreq, whose data are the two words of a struct ethtool_value.
            let code = unsafe { libc::ioctl(socket.as_raw_fd(), 0x8946 as libc::Ioctl, &raw mut request) };
            assert_eq!(code, 0, "ethtool {command:#x}: {}", std::io::Error::last_os_error());
        });
    }
}

/// Sends `size` bytes over TCP from one node to an address of the other; panics if they do not arrive as they were sent.
pub(crate) fn transfer(from: &Node, to: &Node, target: IpAddr, size: usize) {
    let listener = to.namespace.run(|| TcpListener::bind((target, 0)).expect("a listener"));
    let address = listener.local_addr().expect("an address");
    let limit = Some(Duration::from_secs(30));
    let received = thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a connection");
        stream.set_read_timeout(limit).expect("a timeout");
        let mut hash = ring::digest::Context::new(&ring::digest::SHA256);
        let (mut buffer, mut total) = (vec![0; 1 << 18], 0);
        loop {
            match stream.read(&mut buffer).expect("data in time") {
                0 => return (total, hash.finish().as_ref().to_vec()),
                length => {
                    hash.update(&buffer[..length]);
                    total += length;
                }
            }
        }
    });
    let mut stream = from
        .namespace
        .run(|| TcpStream::connect_timeout(&address, Duration::from_secs(10)).expect("a connection"));
    stream.set_write_timeout(limit).expect("a timeout");
    let mut hash = ring::digest::Context::new(&ring::digest::SHA256);
    let (mut state, mut block) = (0x9e37_79b9_7f4a_7c15u64, vec![0; 1 << 18]);
    let mut left = size;
    while left > 0 {
        for word in block.chunks_exact_mut(8) {
            // xorshift64: no two blocks alike.
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_ne_bytes());
        }
        let part = &block[..left.min(block.len())];
        hash.update(part);
        stream.write_all(part).expect("data go out in time");
        left -= part.len();
    }
    drop(stream);
    let sent = (size, hash.finish().as_ref().to_vec());
    assert_eq!(received.join().expect("the receiver"), sent);
}

/// Waits until it holds; panics after three seconds.
pub(crate) fn eventually(what: &str, holds: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(3);
    while !holds() {
        assert!(Instant::now() < end, "not within three seconds: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// Whether it is running; the reason if not.
pub(crate) fn state(tunnel: &Tunnel) -> State {
    tunnel.state().borrow().clone()
}
