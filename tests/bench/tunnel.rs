//! The tunnel alone, and what measures it: `tests/bench/udp.py` starts them, each in a network namespace.
//!
//! ```text
//! bench-tunnel run DEVICE MTU LOCAL INNER [no-FEATURE...] SUBNET=PEER...
//!                                         a tunnel until standard input ends; then its counters
//! bench-tunnel flood TARGET SECONDS SIZE  datagrams as fast as it goes; prints how many
//! bench-tunnel count LOCAL SECONDS        how many datagrams a second come, from the first on
//! bench-tunnel echo LOCAL                 sends back what comes, until it is killed
//! bench-tunnel ask TARGET SECONDS         one datagram and its answer after the other: the median in microseconds
//! ```
//! TARGET and LOCAL of the last four are address:port. Needs root for `run`.

use std::io::Read as _;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use ipnet::IpNet;
use nix::sys::socket::{setsockopt, sockopt};
use ringmail::tunnel::{Config, Features, Routes, Tunnel, device};
use serde_json::json;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args_os()
        .skip(1)
        .map(|a| a.to_string_lossy().into_owned())
        .collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["run", device, mtu, local, inner, ref rest @ ..] => {
            run(device, mtu.parse()?, local.parse()?, inner.parse()?, rest)
        }
        ["flood", target, seconds, size] => flood(target.parse()?, seconds_of(seconds)?, size.parse()?),
        ["count", local, seconds] => count(local.parse()?, seconds_of(seconds)?),
        ["echo", local] => echo(local.parse()?),
        ["ask", target, seconds] => ask(target.parse()?, seconds_of(seconds)?),
        _ => bail!("usage: bench-tunnel run | flood | count | echo | ask"),
    }
}

fn seconds_of(text: &str) -> Result<Duration> {
    Ok(Duration::from_secs_f64(text.parse()?))
}

fn run(name: &str, mtu: u32, local: IpAddr, inner: IpAddr, rest: &[&str]) -> Result<()> {
    let mut features = Features::default();
    let (mut routes, mut workers) = (Vec::new(), 1);
    for word in rest {
        match word.split_once('=') {
            None => match *word {
                "no-vnet" => features.vnet_header = false,
                "no-segment" => features.udp_segment = false,
                "no-gro" => features.udp_gro = false,
                "no-tcp" => features.tcp_coalescing = false,
                "no-udp" => features.udp_coalescing = false,
                _ => bail!("what is {word}?"),
            },
            Some(("workers", number)) => workers = number.parse()?,
            Some((subnet, peer)) => {
                let subnet: IpNet = subnet.parse().context("a subnet")?;
                routes.push((subnet, SocketAddr::new(peer.parse().context("a peer")?, 8285)));
            }
        }
    }
    device::make(name).context("make the device")?;
    let of_v4 = |address| {
        if let IpAddr::V4(address) = address {
            Some(address)
        } else {
            None
        }
    };
    let of_v6 = |address| {
        if let IpAddr::V6(address) = address {
            Some(address)
        } else {
            None
        }
    };
    let config = Config {
        device: name.to_owned(),
        mtu,
        local_v4: of_v4(local),
        local_v6: of_v6(local),
        port: 8285,
        inner_v4: of_v4(inner),
        inner_v6: of_v6(inner),
        workers,
        features,
    };
    let tunnel = Tunnel::start(config)?;
    tunnel.set_routes(Routes::new(routes));
    println!("ready");
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text)?;
    let counters = tunnel.counters();
    let dropped = format!("{:?}", counters.dropped);
    let told = json!({
        "sent_packets": counters.sent_packets, "sent_messages": counters.sent_messages,
        "device_reads": counters.device_reads, "received_packets": counters.received_packets,
        "received_messages": counters.received_messages, "device_writes": counters.device_writes,
        "dropped": dropped, "offloads": format!("{:?}", counters.offloads),
    });
    println!("{told}");
    Ok(())
}

fn connected(target: SocketAddr) -> Result<UdpSocket> {
    let socket = UdpSocket::bind(if target.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
    socket.connect(target)?;
    Ok(socket)
}

fn flood(target: SocketAddr, time: Duration, size: usize) -> Result<()> {
    let (socket, datagram) = (connected(target)?, vec![7; size]);
    let end = Instant::now() + time;
    let mut sent = 0u64;
    while Instant::now() < end {
        for _ in 0..64 {
            sent += u64::from(socket.send(&datagram).is_ok());
        }
    }
    println!("{sent}");
    Ok(())
}

fn count(local: SocketAddr, time: Duration) -> Result<()> {
    let socket = UdpSocket::bind(local)?;
    // What is measured is the way here, not this program's pauses.
    setsockopt(&socket, sockopt::RcvBufForce, &(8 << 20))?;
    println!("ready");
    socket.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut datagram = [0; 2000];
    socket.recv(&mut datagram).context("the first datagram")?;
    socket.set_read_timeout(Some(Duration::from_millis(100)))?;
    let begun = Instant::now();
    let mut got = 0u64;
    while begun.elapsed() < time {
        for _ in 0..64 {
            match socket.recv(&mut datagram) {
                Ok(_) => got += 1,
                Err(_) => break,
            }
        }
    }
    println!("{}", got as f64 / begun.elapsed().as_secs_f64());
    Ok(())
}

fn echo(local: SocketAddr) -> Result<()> {
    let socket = UdpSocket::bind(local)?;
    println!("ready");
    let mut datagram = [0; 2000];
    loop {
        let (length, from) = socket.recv_from(&mut datagram)?;
        socket.send_to(&datagram[..length], from)?;
    }
}

fn ask(target: SocketAddr, time: Duration) -> Result<()> {
    let socket = connected(target)?;
    socket.set_read_timeout(Some(Duration::from_secs(2)))?;
    let mut datagram = [0; 64];
    let mut taken = Vec::with_capacity(1 << 20);
    let end = Instant::now() + time;
    while Instant::now() < end {
        let begun = Instant::now();
        socket.send(&datagram)?;
        socket.recv(&mut datagram).context("the answer")?;
        taken.push(begun.elapsed());
    }
    ensure!(!taken.is_empty(), "no time to ask");
    taken.sort_unstable();
    println!("{}", taken[taken.len() / 2].as_secs_f64() * 1e6);
    Ok(())
}
