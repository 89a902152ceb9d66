//! The measurements that need the library itself and not the daemon's program: `tests/bench/run` starts them.
//!
//! ```text
//! bench-peers program PEERS ROUNDS       a roster of PEERS to programmed, and the kernel's own part of it
//! bench-peers change ROUNDS SIZE...      one peer's change among SIZE peers
//! bench-peers rest PEERS SECONDS         what probes cost among PEERS who answer, in so many simulated seconds
//! bench-peers leases FOLDER PEERS PSK    writes the leases of PEERS nodes that are not there; PSK is a file
//! ```
//! Each line of standard output is one JSON object of milliseconds. Needs root and a kernel with ESP.

mod bare;
mod made_up;
mod site;

use std::fs;
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::json;

use bare::{Bare, Prebuilt};
use made_up::Mesh;
use site::{Change, Site, enter_new_namespace, peers_objects};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args_os()
        .skip(1)
        .map(|a| a.to_string_lossy().into_owned())
        .collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["program", peers, rounds] => program(peers.parse()?, rounds.parse()?),
        ["change", rounds, ref sizes @ ..] if !sizes.is_empty() => {
            let sizes = sizes.iter().map(|size| size.parse()).collect::<Result<Vec<_>, _>>()?;
            change(rounds.parse()?, &sizes)
        }
        ["rest", peers, seconds] => rest(peers.parse()?, Duration::from_secs(seconds.parse()?)),
        ["leases", folder, peers, psk] => leases(Path::new(folder), peers.parse()?, Path::new(psk)),
        _ => bail!(
            "usage: bench-peers program PEERS ROUNDS | change ROUNDS SIZE... | rest PEERS SECONDS | leases FOLDER PEERS PSK"
        ),
    }
}

fn in_milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// Runs `work` in a network namespace of its own, on a thread of its own, in a runtime.
fn in_namespace<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<(T, fs::File)> {
    let enter = || {
        let namespace = enter_new_namespace()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let _context = runtime.enter();
        Ok((work()?, namespace))
    };
    thread::scope(|scope| scope.spawn(enter).join()).map_err(|_| anyhow::anyhow!("a measuring thread panicked"))?
}

/// Touches half of the machine's free memory and gives it back: an emulated machine's is not there before its first use,
/// which costs whichever side comes upon it.
fn touch_memory() -> Result<()> {
    let text = fs::read_to_string("/proc/meminfo").context("read /proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kilobytes: usize = line
        .and_then(|line| line.split_whitespace().next())
        .context("MemAvailable")?
        .parse()?;
    let mut touched = vec![0_u8; kilobytes / 2 * 1024];
    touched.iter_mut().step_by(4096).for_each(|byte| *byte = 1);
    std::hint::black_box(&touched);
    Ok(())
}

/// Both sides in turn, each in a fresh namespace. The first round of both warms up and is not told.
fn program(peers: usize, rounds: usize) -> Result<()> {
    let mesh = Mesh::new(&[7; 32])?;
    let peers = mesh.peers(peers)?;
    touch_memory()?;
    // A namespace that goes away is taken down in the background, beside the next measurement: all stay to the end.
    let mut kept = Vec::new();
    for round in 0..=rounds {
        let (ours, namespace) = in_namespace(|| {
            let mut site = Site::open(&mesh)?;
            let (programmed, admitted) = site.program(&peers)?;
            let writes = site.reconciler.writes();
            let made = (Prebuilt::read()?, peers_objects()?);
            let began = Instant::now();
            for peer in &peers {
                std::hint::black_box(mesh.sa_keys(peer, site.own())?);
            }
            let keys = began.elapsed();
            let confirmed = site.confirm(&mesh, &peers)?;
            Ok((programmed, admitted, keys, confirmed, writes, made))
        })?;
        kept.push(namespace);
        let (programmed, admitted, keys, confirmed, writes, (prebuilt, objects)) = ours;
        ensure!(prebuilt.len() == objects.len(), "not every object was read back");
        let (bare, namespace) = in_namespace(|| {
            // Its objects stay and its sockets go: nobody listens to what the bare loop does.
            drop(Site::open(&mesh)?);
            let mut bare = Bare::open()?;
            let began = Instant::now();
            bare.send(&prebuilt)?;
            let took = began.elapsed();
            ensure!(peers_objects()? == objects, "the bare loop made other objects");
            Ok(took)
        })?;
        kept.push(namespace);
        if round > 0 {
            let line = json!({
                "ours": in_milliseconds(programmed), "bare": in_milliseconds(bare), "keys": in_milliseconds(keys),
                "admitted": in_milliseconds(admitted), "confirmed": in_milliseconds(confirmed),
                "objects": objects.len(), "writes": writes,
            });
            println!("{line}");
        }
    }
    Ok(())
}

/// Meshes of several sizes side by side, a thread and a namespace each; their changes take turns.
fn change(rounds: usize, sizes: &[usize]) -> Result<()> {
    thread::scope(|scope| {
        let mut sites = Vec::new();
        for &size in sizes {
            let (go, turns) = mpsc::channel::<()>();
            let (told, results) = mpsc::channel::<Result<Change>>();
            scope.spawn(move || {
                let failed = told.clone();
                let done = in_namespace(move || {
                    let mesh = Mesh::new(&[7; 32])?;
                    let mut peers = mesh.peers(size)?;
                    let mut site = Site::open(&mesh)?;
                    site.program(&peers)?;
                    site.confirm(&mesh, &peers)?;
                    // Spread over the whole mesh, none twice in a row.
                    for turn in 0.. {
                        if turns.recv().is_err() {
                            break;
                        }
                        let at = (turn * 7 + size / 2) % size;
                        let changed = site.change(&mesh, &mut peers[at]);
                        if told.send(changed).is_err() {
                            break;
                        }
                    }
                    Ok(())
                });
                if let Err(error) = done {
                    // The other end may be gone for a reason of its own.
                    drop(failed.send(Err(error)));
                }
            });
            sites.push((size, go, results));
        }
        // The first changes also wait for the meshes to stand, and are not told.
        for round in 0..rounds + 3 {
            for (size, go, results) in &sites {
                // A thread that ended has said why.
                let _ = go.send(());
                let Change {
                    rotate,
                    leave,
                    join,
                    packets,
                } = results.recv().context("a measuring thread ended")??;
                if round >= 3 {
                    let line = json!({
                        "peers": size, "rotate": in_milliseconds(rotate), "leave": in_milliseconds(leave),
                        "join": in_milliseconds(join), "packets": in_milliseconds(packets),
                    });
                    println!("{line}");
                }
            }
        }
        Ok(())
    })
}

/// A settled mesh at rest: the first minute, in which all come to their rest, is not told.
fn rest(peers: usize, time: Duration) -> Result<()> {
    let mesh = Mesh::new(&[7; 32])?;
    let peers = mesh.peers(peers)?;
    let (rest, _namespace) = in_namespace(|| {
        let mut site = Site::open(&mesh)?;
        site.program(&peers)?;
        site.confirm(&mesh, &peers)?;
        site.rest(&mesh, &peers, Duration::from_secs(60))?;
        site.rest(&mesh, &peers, time)
    })?;
    let line = json!({
        "peers": peers.len(), "seconds": time.as_secs(), "probes": rest.probes, "bytes": rest.bytes,
        "decide": in_milliseconds(rest.decide), "send": in_milliseconds(rest.send), "dump": in_milliseconds(rest.dump),
    });
    println!("{line}");
    Ok(())
}

fn leases(folder: &Path, peers: usize, psk: &Path) -> Result<()> {
    let psk = fs::read(psk).with_context(|| format!("read {}", psk.display()))?;
    let mesh = Mesh::new(psk.trim_ascii())?;
    for peer in mesh.peers(peers)? {
        let lease = &peer.life.lease;
        let name = format!("{}.json", ringmail::store::format::key(&lease.subnets));
        fs::write(folder.join(name), ringmail::store::format::encode(lease, 1))?;
    }
    Ok(())
}
