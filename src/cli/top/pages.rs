//! The pages beside the list: all of one peer, what is wrong, the keys.

use std::time::Duration;

use ratatui::style::{Modifier, Style};
use ratatui::text::{Line, Span};

use super::model::{Model, Page};
use super::rows::{Rate, Sort, counted, percent, short};
use super::view::{painted, wrapped};
use crate::cli::status;
use crate::cli::table::{Tone, bytes, clean, span};
use crate::node::report::{PeerReport, Report};

/// The columns that a label takes.
const LABEL: u16 = 12;

/// All lines of the page; none of the list.
pub(super) fn lines(model: &Model, width: u16) -> Vec<Line<'static>> {
    match &model.page {
        Page::List => Vec::new(),
        Page::Peer(name) => match model.peer(name) {
            Some((peer, rate)) => peer_page(model, peer, rate, width),
            None => pairs(
                &[(
                    "peer",
                    format!("{} has no lease any more", clean(name, false)),
                    Tone::Doubtful,
                )],
                model,
                width,
            ),
        },
        Page::Problems => {
            let troubles = model
                .report
                .as_ref()
                .map(|(report, _)| troubles(report))
                .unwrap_or_default();
            let lines: Vec<_> = troubles.into_iter().map(|text| ("problem", text, Tone::Bad)).collect();
            match lines.is_empty() {
                true => pairs(&[("problem", "none".into(), Tone::Plain)], model, width),
                false => pairs(&lines, model, width),
            }
        }
        Page::Help => help(model, width),
    }
}

/// What is wrong with this node, and what the store holds that is no lease.
pub(super) fn troubles(report: &Report) -> Vec<String> {
    let partial = (!report.complete).then(|| "the store is not read whole yet".to_owned());
    let rejected = report
        .rejected
        .iter()
        .map(|(entry, why)| format!("rejected: {}: {}", clean(entry, false), clean(why, false)));
    let problems = report.problems.iter().map(|problem| clean(problem, false));
    problems.chain(partial).chain(rejected).collect()
}

/// Each label with its text beside it, wrapped.
fn pairs(pairs: &[(&str, String, Tone)], model: &Model, width: u16) -> Vec<Line<'static>> {
    let mut lines = Vec::new();
    for (label, text, tone) in pairs {
        let mut label = *label;
        for part in wrapped(text, width.saturating_sub(LABEL)) {
            let shown = format!("{label:0$}", usize::from(LABEL));
            lines.push(Line::from(vec![
                Span::styled(shown, Style::new().add_modifier(Modifier::BOLD)),
                Span::styled(part, painted(model, *tone)),
            ]));
            label = "";
        }
    }
    lines
}

fn peer_page(model: &Model, peer: &PeerReport, rate: Option<Rate>, width: u16) -> Vec<Line<'static>> {
    let none = || "-".to_owned();
    let plain = |label, text: String| (label, text, Tone::Plain);
    let mut all = vec![
        plain("peer", peer.node.clone()),
        ("state", peer.state.word().to_owned(), status::tone(peer)),
    ];
    if let Some(reason) = &peer.reason {
        all.push(("why", reason.clone(), status::tone(peer)));
    }
    all.push(plain("subnets", peer.subnets.join(" ")));
    all.push(plain("address", peer.address.clone()));
    if let Some(encap) = &peer.encap {
        let detour = peer.detour.as_ref().map(|why| format!(" ({why})"));
        all.push(plain("carrier", format!("{encap}{}", detour.unwrap_or_default())));
    }
    if let Some(learned) = &peer.learned {
        all.push(plain("behind NAT", format!("at {learned}")));
    }
    all.push(plain("generation", peer.generation.clone().unwrap_or_else(none)));
    if let Some(newest) = &peer.newest {
        all.push(plain("newest", newest.clone()));
    }
    let spis = [("out", &peer.spi_out), ("in", &peer.spi_in)];
    let spis: Vec<String> = spis
        .into_iter()
        .filter_map(|(way, spi)| Some(format!("{way} {}", spi.as_ref()?)))
        .collect();
    if !spis.is_empty() {
        all.push(plain("SPI", spis.join(", ")));
    }
    let heard = peer.heard.and_then(|heard| Duration::try_from_secs_f64(heard).ok());
    all.push(plain(
        "heard",
        heard.map_or_else(none, |heard| format!("{} ago", span(heard))),
    ));
    all.push(plain(
        "round trip",
        peer.round_trip.map_or_else(none, |time| format!("{time:.2} ms")),
    ));
    let lossy = if peer.loss.unwrap_or_default() > 0.0 {
        Tone::Doubtful
    } else {
        Tone::Plain
    };
    all.push(("loss", peer.loss.map_or_else(none, percent), lossy));
    if let Some(passes) = peer.full_size {
        let (text, tone) = match passes {
            true => ("packets of the mesh MTU pass", Tone::Plain),
            false => ("packets of the mesh MTU do not pass: see `ringmail doctor`", Tone::Bad),
        };
        all.push(("full size", text.into(), tone));
    }
    if counted(peer) {
        let amount = |sum: u64, packets: u64, per_second: Option<(f64, f64)>| {
            let now = per_second
                .map(|(sum, packets)| format!("; now {}/s, {} packets/s", bytes(sum as u64), short(packets, 1000.0)));
            format!("{}, {packets} packets{}", bytes(sum), now.unwrap_or_default())
        };
        let (inwards, outwards) = (
            rate.map(|rate| (rate.bytes_in, rate.packets_in)),
            rate.map(|rate| (rate.bytes_out, rate.packets_out)),
        );
        all.push(plain("received", amount(peer.bytes_in, peer.packets_in, inwards)));
        all.push(plain("sent", amount(peer.bytes_out, peer.packets_out, outwards)));
        let errors = if peer.errors > 0 { Tone::Doubtful } else { Tone::Plain };
        all.push(("errors", peer.errors.to_string(), errors));
    }
    pairs(&all, model, width)
}

fn help(model: &Model, width: u16) -> Vec<Line<'static>> {
    let sorts: Vec<String> = Sort::ALL
        .into_iter()
        .map(|(key, _, name)| format!("{key} {name}"))
        .collect();
    let plain = |label, text: &str| (label, text.to_owned(), Tone::Plain);
    let every = format!(
        "asked every {}, and no more than a fifth of the daemon's time",
        in_words(model.interval)
    );
    pairs(
        &[
            plain("arrows", "move; also j, k, PageUp, PageDown, Home, End, g, G"),
            plain(
                "Enter",
                "all of the peer under the cursor; left and right go on to others",
            ),
            plain("/", "shows peers with a text in their name, subnets, address or reason"),
            plain(
                "f",
                "shows peers of one state: all, those that are not well, refused, waiting, ...",
            ),
            plain("Esc", "shows all again"),
            (
                "sort",
                format!("{}; again: turned around", sorts.join(", ")),
                Tone::Plain,
            ),
            plain("p", "what is wrong with the node"),
            plain("q", "back; from the list: quits, as Ctrl-C does anywhere"),
            plain("", ""),
            ("up", "data goes, on the newest generation".into(), Tone::Good),
            (
                "plain",
                "data goes unencrypted, as the backend has it".into(),
                Tone::Good,
            ),
            (
                "moving",
                "data goes, and is changing to a newer generation".into(),
                Tone::Doubtful,
            ),
            ("silent", "data goes, and it has stopped answering".into(), Tone::Bad),
            ("kept", "data goes on keys of an earlier process".into(), Tone::Doubtful),
            ("waiting", "no data yet: no probe has come back".into(), Tone::Doubtful),
            (
                "refused",
                "its lease is not believed, or can't be served".into(),
                Tone::Bad,
            ),
            plain("", ""),
            plain(
                "IN, OUT",
                "per second between the last two answers; - where an old SA went, and its count with it",
            ),
            plain(
                "GEN.",
                "the last digits of the two epochs, own > peer's; a wide terminal shows all",
            ),
            plain("LOSS", "of the last probes, those that got no answer"),
            plain("ERRORS", "packets that failed the integrity check, or were replayed"),
            plain(
                "plaintext",
                "packets of the mesh that came or would have gone without ESP, and were dropped",
            ),
            ("answers", every, Tone::Plain),
        ],
        model,
        width,
    )
}

fn in_words(time: Duration) -> String {
    match time.subsec_millis() {
        0 => format!("{} s", time.as_secs()),
        _ => format!("{} ms", time.as_millis()),
    }
}
