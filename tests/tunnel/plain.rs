//! A peer as simple as can be, of flannel's wire format: one packet, one datagram, both ways, with its own code.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crate::lab::{Node, Outer, PORT};

/// Two threads, one a direction; ends when dropped.
pub(crate) struct Plain {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Plain {
    /// On a node without flannel0, towards the other.
    pub(crate) fn start(node: &Node, peer: &Node) -> Self {
        let (tun, socket) = node.namespace.run(|| {
            let tun = open();
            let socket = UdpSocket::bind((node.public(Outer::V4), PORT)).expect("a socket");
            (tun, socket)
        });
        node.address();
        socket
            .set_read_timeout(Some(Duration::from_millis(20)))
            .expect("a timeout");
        let target = SocketAddr::new(peer.public(Outer::V4), PORT);
        let stop = Arc::new(AtomicBool::new(false));
        let out = {
            let (mut tun, socket, stop) = (
                tun.try_clone().expect("a file"),
                socket.try_clone().expect("a socket"),
                stop.clone(),
            );
            thread::spawn(move || {
                let mut packet = vec![0; 65_536];
                while !stop.load(Ordering::Relaxed) {
                    match tun.read(&mut packet) {
                        Ok(length) if hop(&mut packet[..length]) => drop(socket.send_to(&packet[..length], target)),
                        Ok(_) => {}
                        Err(_) => thread::sleep(Duration::from_micros(50)),
                    }
                }
            })
        };
        let stopped = stop.clone();
        let mut tun = tun;
        let back = thread::spawn(move || {
            let mut packet = vec![0; 65_536];
            while !stopped.load(Ordering::Relaxed) {
                if let Ok((length, _)) = socket.recv_from(&mut packet)
                    && hop(&mut packet[..length])
                {
                    drop(tun.write(&packet[..length]));
                }
            }
        });
        Self {
            stop,
            threads: vec![out, back],
        }
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            drop(thread.join());
        }
    }
}

/// A plain TUN, gone when closed.
fn open() -> File {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .expect("/dev/net/tun");
    // SAFETY: an ifreq is integers, arrays and a pointer, for all of which zero bytes are a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(*b"flannel0") {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as i16;
    // SAFETY: TUNSETIFF takes an ifreq; F_SETFL takes a number.
    unsafe {
        assert_eq!(libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request), 0);
        assert_eq!(libc::fcntl(file.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK), 0);
    }
    file
}

/// One hop less, the IPv4 checksum anew.
fn hop(packet: &mut [u8]) -> bool {
    if packet.len() >= 40 && packet[0] >> 4 == 6 {
        packet[7] -= 1;
        return packet[7] > 0;
    }
    if packet.len() < 20 {
        return false;
    }
    packet[8] -= 1;
    packet[10..12].fill(0);
    let mut sum = 0u32;
    for pair in packet[..20].chunks(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], pair[1]]));
    }
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    packet[10..12].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    packet[8] > 0
}
