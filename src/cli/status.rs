//! `ringmail status`: the node in a few lines, a row for each peer, and below it why it is not up. `--watch` shows it
//! again and again.

use std::collections::BTreeMap;
use std::io::{ErrorKind, IsTerminal as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use k8s_openapi::jiff::Timestamp;
use serde_json::json;

use super::table::{Align, Style, Table, Tone, bytes, clean, count, span, wrap};
use super::{Failure, Shown, interval};
use crate::admin::{AskError, Request, ask};
use crate::node::report::{PeerReport, Report, State};
use crate::node::{PskReport, some};
use crate::tunnel::{self, Offload};

/// Show how this node and each of its peers stand.
#[derive(Debug, Args)]
#[command(after_help = "\
States: up (data goes, on the newest generation), moving (data goes, and is changing to a newer one), kept (data goes
on keys of an earlier process), waiting (no data yet), plain (data goes, unencrypted, as the backend has it), refused
(its lease is not believed, or can't be served). One that is up or moving and stops answering is told of below its row.

Exit code: 0 where every peer is up, moving or plain and has nothing told of it, and nothing is wrong with the node, else
1. `--watch` runs until a signal ends it, and goes on when the daemon is not there for a while.

Examples:
  ringmail status
  ringmail status --watch=5
  ringmail status --json --watch | jq -c '.peers | map(.state)'
  ringmail status --json | jq '.peers[] | select(.state != \"up\")'")]
pub struct Arguments {
    /// The daemon's folder.
    #[arg(long, value_name = "DIR", default_value = crate::admin::RUN_DIR)]
    run_dir: PathBuf,
    /// Print JSON; with --watch one document a line.
    #[arg(long)]
    json: bool,
    /// Show it again every SECONDS, 2 where none are given.
    #[arg(long, value_name = "SECONDS", num_args = 0..=1, require_equals = true, default_missing_value = "2",
          value_parser = often)]
    watch: Option<Duration>,
}

fn often(text: &str) -> Result<Duration, String> {
    interval::parse(text, Duration::from_millis(200), Duration::from_secs(3600))
}

pub(super) fn run(arguments: &Arguments, style: &Style) -> Result<Shown, Failure> {
    let Arguments { run_dir, json, watch } = arguments;
    if let Some(interval) = watch {
        return repeat(run_dir, *json, *interval, *style);
    }
    let report = fetch(run_dir)?;
    let well = well(&report);
    Ok(if *json {
        Shown::json(&report, well)
    } else {
        Shown::text(render(&report, *style), well)
    })
}

/// What came of asking the daemon.
#[derive(Debug)]
pub(super) enum Fetched {
    Report(Box<Report>),
    /// It does not answer now, as while it restarts; why.
    Away(String),
}

/// Asks the daemon for the picture.
pub(super) fn fetch(run_dir: &Path) -> Result<Report, Failure> {
    match look(run_dir)? {
        Fetched::Report(report) => Ok(*report),
        Fetched::Away(why) => Err(Failure::other(anyhow::Error::msg(why))),
    }
}

/// The same for who asks again and again: the error is one that no waiting mends.
pub(super) fn look(run_dir: &Path) -> Result<Fetched, Failure> {
    let answer = match ask(run_dir, Request::Status) {
        Ok(answer) => answer,
        Err(error @ (AskError::Denied(_) | AskError::Version { .. })) => return Err(Failure::other(error)),
        Err(error) => return Ok(Fetched::Away(format!("{:#}", anyhow::Error::from(error)))),
    };
    serde_json::from_value(answer)
        .map(Fetched::Report)
        .map_err(anyhow::Error::from)
        .map_err(|error| Failure::other(error.context("the daemon's answer is not understood: use the same version")))
}

/// Shows it every `interval` until a signal, or whoever reads it, ends that.
fn repeat(run_dir: &Path, json: bool, interval: Duration, style: Style) -> Result<Shown, Failure> {
    let mut stdout = std::io::stdout();
    let screen = stdout.is_terminal() && !json;
    loop {
        let fetched = look(run_dir)?;
        let time = Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let text = match json {
            true => document(&fetched),
            false => section(&fetched, &time, screen, style),
        };
        match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
            Ok(()) => std::thread::sleep(interval),
            Err(error) if error.kind() == ErrorKind::BrokenPipe => return Ok(Shown::from(String::new())),
            Err(error) => {
                let error = anyhow::Error::from(error).context("write to standard output");
                return Err(Failure::other(error));
            }
        }
    }
}

/// One line of JSON: the report, or an object with the one field `error`.
pub(super) fn document(fetched: &Fetched) -> String {
    let text = match fetched {
        Fetched::Report(report) => serde_json::to_string(report),
        Fetched::Away(why) => serde_json::to_string(&json!({"error": why})),
    };
    text.expect("what is shown has string keys") + "\n"
}

/// What people see of one answer: on a `screen` that is cleared first, elsewhere below a line with the time.
pub(super) fn section(fetched: &Fetched, time: &str, screen: bool, style: Style) -> String {
    let head = match screen {
        true => format!("\x1b[H\x1b[2J{time}\n\n"),
        false => format!("--- {time}\n"),
    };
    let body = match fetched {
        Fetched::Report(report) => render(report, style),
        Fetched::Away(why) => style.paint(&wrap(&clean(why, false), 0), Tone::Bad),
    };
    head + &body
}

/// Whether there is nothing to tell anybody about.
pub(super) fn well(report: &Report) -> bool {
    let peers = report.peers.iter().all(well_peer);
    report.complete && report.problems.is_empty() && report.rejected.is_empty() && peers
}

pub(super) fn well_peer(peer: &PeerReport) -> bool {
    matches!(peer.state, State::Up | State::Moving | State::Plain) && peer.reason.is_none()
}

/// How the problem begins that tells of an outage of the store.
const OUTAGE: &str = "the store can't be ";

pub(super) fn render(report: &Report, style: Style) -> String {
    let mut text = head(report);
    for problem in &report.problems {
        text += &style.paint(&wrap(&format!("problem: {}", clean(problem, false)), 0), Tone::Bad);
    }
    for (entry, why) in &report.rejected {
        let line = format!("rejected: {}: {}", clean(entry, false), clean(why, false));
        text += &style.paint(&wrap(&line, 0), Tone::Doubtful);
    }
    if report.peers.is_empty() {
        return text;
    }
    let mut table = Table::new([
        ("PEER", Align::Left),
        ("SUBNET", Align::Left),
        ("ADDRESS", Align::Left),
        ("STATE", Align::Left),
        ("HEARD", Align::Right),
        ("SENT", Align::Right),
        ("RECEIVED", Align::Right),
        ("ERRORS", Align::Right),
    ]);
    for peer in &report.peers {
        rows(peer, &mut table);
    }
    text.push('\n');
    text + &table.render(style)
}

fn head(report: &Report) -> String {
    let or = |items: &[String], none: &str| {
        if items.is_empty() {
            none.to_owned()
        } else {
            items.join(" ")
        }
    };
    let age = report
        .epoch_age
        .map(|age| format!(", {} old", span(Duration::from_secs(age))))
        .unwrap_or_default();
    let next = report.next_epoch.as_ref().map(|next| {
        let time = span(Duration::from_secs(next.seconds));
        format!(", the next in {time} at the latest ({})", next.cause)
    });
    let next = next.unwrap_or_default();
    let plain = !matches!(report.backend.as_str(), "" | "ipsec");
    let mtu = report.mtu.map_or_else(|| "unknown".into(), |mtu| mtu.to_string());
    let above = [
        (
            "node",
            format!(
                "{}, {} of {}, public {}",
                report.node,
                or(&report.subnets, "no subnet"),
                or(&report.network, "no Network"),
                or(&report.public, "unknown")
            ),
        ),
        match plain {
            true => ("backend", format!("{}: not encrypted", report.backend)),
            false => (
                "epoch",
                format!(
                    "{}{age}{next}",
                    report.epoch.map_or_else(|| "none".into(), |epoch| epoch.to_string())
                ),
            ),
        },
    ];
    let sealed = format!(", {}, UDPEncap {}", report.cipher, report.encap);
    let psks = match report.psks.is_empty() {
        _ if plain => vec![],
        true => vec!["none".into()],
        false => report.psks.iter().map(held).collect(),
    };
    let psks = psks.into_iter().enumerate();
    let psks = psks.map(|(at, text)| (if at == 0 { "PSKs" } else { "" }, text));
    let below = [
        (
            "uplink",
            format!(
                "{}, MTU in the mesh {mtu}{}{}",
                report.uplink.as_deref().unwrap_or("none"),
                if plain { "" } else { &sealed },
                match report.encap_kept {
                    Some(true) => ", its sockets kept by the service manager over a restart",
                    Some(false) =>
                        ", nothing comes in by UDP while this daemon does not run: no service manager keeps its sockets",
                    None => "",
                }
            ),
        ),
        (
            "store",
            match (
                report.complete,
                report.problems.iter().any(|problem| problem.starts_with(OUTAGE)),
            ) {
                (true, false) => "read whole",
                (true, true) => "was read whole, and can't be reached now",
                (false, _) => "not read whole yet",
            }
            .into(),
        ),
        ("peers", summary(&report.peers)),
    ];
    let tunnel = report.tunnel.as_ref().map(|tunnel| ("tunnel", carried(tunnel)));
    let line = |(name, value): &(&str, String)| {
        let wrapped = wrap(&clean(value, false), 8);
        format!("{name:8}{}", wrapped.trim_start())
    };
    let lines: Vec<(&str, String)> = above.into_iter().chain(psks).chain(below).chain(tunnel).collect();
    lines.iter().map(line).collect()
}

/// What the udp backend's tunnel has carried, what it has dropped and what of the kernel it does without.
fn carried(tunnel: &tunnel::Counters) -> String {
    let packets = |number: u64| count(usize::try_from(number).unwrap_or(usize::MAX), "packet");
    let mut text = format!(
        "sent {} ({}), received {} ({})",
        packets(tunnel.sent_packets),
        bytes(tunnel.sent_bytes),
        packets(tunnel.received_packets),
        bytes(tunnel.received_bytes)
    );
    let dropped: Vec<String> = tunnel
        .dropped
        .iter()
        .filter(|(number, _)| *number > 0)
        .map(|(number, reason)| format!("{number} {reason}"))
        .collect();
    if !dropped.is_empty() {
        text += &format!("; dropped {}", dropped.join(", "));
    }
    for (name, offload) in tunnel.offloads.iter() {
        if let Offload::Off(reason) = offload {
            text += &format!("; no {name}: {reason}");
        }
    }
    text
}

/// A PSK and who has it.
fn held(psk: &PskReport) -> String {
    let mut text = psk.kid.clone();
    match (psk.missing.as_slice(), psk.nodes) {
        ([], 0 | 1) => {}
        ([], nodes) => text += &format!(", all {nodes} nodes have it"),
        (missing, nodes) => text += &format!(", {} of {nodes} nodes have it, not {}", psk.have, some(missing)),
    }
    if psk.withdrawn {
        let time = span(Duration::from_secs(psk.dropped_in.unwrap_or_default()));
        text += &format!(", taken away, dropped in {time} at the latest");
    }
    text
}

pub(super) fn summary(peers: &[PeerReport]) -> String {
    let mut by_state: BTreeMap<State, usize> = BTreeMap::new();
    for peer in peers {
        *by_state.entry(peer.state).or_default() += 1;
    }
    let mut counts: Vec<String> = by_state
        .iter()
        .map(|(state, n)| format!("{n} {}", state.word()))
        .collect();
    let silent = peers.iter().filter(|peer| peer.silent.is_some()).count();
    if silent > 0 {
        counts.push(format!("{silent} of them silent"));
    }
    if counts.is_empty() {
        "none".into()
    } else {
        counts.join(", ")
    }
}

pub(super) fn tone(peer: &PeerReport) -> Tone {
    match peer.state {
        State::Up | State::Moving if peer.silent.is_some() => Tone::Bad,
        State::Up | State::Plain => Tone::Good,
        State::Moving | State::Kept | State::Waiting => Tone::Doubtful,
        State::Refused => Tone::Bad,
    }
}

fn rows(peer: &PeerReport, table: &mut Table) {
    let tone = tone(peer);
    let heard = peer
        .heard
        .and_then(|heard| Duration::try_from_secs_f64(heard).ok())
        .map_or_else(|| "-".into(), span);
    let plain = |text: String| (text, Tone::Plain);
    let served = peer.state != State::Refused;
    // Of packets that are not encrypted the kernel keeps no count a peer.
    let counted = served && peer.state != State::Plain;
    let amount = |number: u64| plain(if counted { bytes(number) } else { "-".into() });
    let errors = if peer.errors > 0 { Tone::Doubtful } else { Tone::Plain };
    let mut subnets = peer.subnets.iter();
    table.row([
        plain(peer.node.clone()),
        plain(subnets.next().cloned().unwrap_or_else(|| "-".into())),
        plain(peer.address.clone()),
        (peer.state.word().to_owned(), tone),
        plain(heard),
        amount(peer.bytes_out),
        amount(peer.bytes_in),
        (if counted { peer.errors.to_string() } else { "-".into() }, errors),
    ]);
    for subnet in subnets {
        let empty = || plain(String::new());
        table.row([
            empty(),
            plain(subnet.clone()),
            empty(),
            empty(),
            empty(),
            empty(),
            empty(),
            empty(),
        ]);
    }
    if served && peer.state != State::Plain {
        table.note(&detail(peer));
    } else if let Some(way) = &peer.encap {
        table.note(way);
    }
    if let Some(reason) = &peer.reason {
        table.note(reason);
    }
}

/// The second line of a peer: which keys, which way, how many packets.
fn detail(peer: &PeerReport) -> String {
    let mut parts = Vec::new();
    if let Some(generation) = &peer.generation {
        parts.push(format!("generation {generation}"));
    }
    if let Some(newest) = &peer.newest {
        parts.push(format!("newest {newest}"));
    }
    if let Some(spi) = &peer.spi_out {
        parts.push(format!("SPI out {spi}"));
    }
    if let Some(spi) = &peer.spi_in {
        parts.push(format!("in {spi}"));
    }
    if let Some(encap) = &peer.encap {
        parts.push(match &peer.detour {
            Some(why) => format!("{encap} ({why})"),
            None => encap.clone(),
        });
    }
    if let Some(learned) = &peer.learned {
        parts.push(format!("behind a NAT at {learned}"));
    }
    if let Some(time) = peer.round_trip {
        parts.push(format!("{time:.1} ms"));
    }
    if let Some(loss) = peer.loss.filter(|loss| *loss > 0.0) {
        parts.push(format!("{:.0} % of probes lost", loss * 100.0));
    }
    parts.push(format!("{} out", count_u64(peer.packets_out)));
    parts.push(format!("{} in", peer.packets_in));
    parts.join(", ")
}

fn count_u64(packets: u64) -> String {
    usize::try_from(packets).map_or_else(|_| format!("{packets} packets"), |packets| count(packets, "packet"))
}
