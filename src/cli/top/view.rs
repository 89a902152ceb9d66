//! What the screen shows of the model: a head, the list or another page, and a line of keys. Only rows that are seen are
//! made.

use std::time::Duration;

use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};

use super::model::{Model, Page};
use super::pages;
use super::rows::{self, Only, Rate, Sort, milliseconds, percent, short};
use crate::cli::status;
use crate::cli::table::{self, Tone, bytes, clean, count, span};
use crate::node::report::{PeerReport, Report};

/// Rows that the list keeps before the head gets its last lines.
const ROWS: usize = 5;
/// Columns that a name has at least, before a column that is not needed is shown.
const NAME: u16 = 13;
/// Columns that a name has at most.
const LONG_NAME: u16 = 44;

/// Draws all of it.
pub(super) fn render(model: &Model, area: Rect, buffer: &mut Buffer) {
    let (width, height) = (area.width, usize::from(area.height));
    let mut lines = head(model, width, height);
    let body = height.saturating_sub(lines.len() + 1);
    lines.extend(match &model.page {
        Page::List => list(model, width, body),
        Page::Peer(_) | Page::Problems | Page::Help => {
            let from = model.top;
            pages::lines(model, width).into_iter().skip(from).take(body).collect()
        }
    });
    lines.truncate(height.saturating_sub(1));
    for (y, line) in (area.y..).zip(&lines) {
        buffer.set_line(area.x, y, line, width);
    }
    if let Some(last) = area.height.checked_sub(1) {
        buffer.set_line(area.x, area.y + last, &foot(model, width), width);
    }
}

/// How many rows of the list, or of another page, are to be seen on a terminal of that size.
pub(super) fn body_rows(model: &Model, (width, height): (u16, u16)) -> usize {
    let height = usize::from(height);
    let titles = usize::from(model.page == Page::List);
    height.saturating_sub(head(model, width, height).len() + 1 + titles)
}

/// How many rows the page that is not the list has.
pub(super) fn page_rows(model: &Model, width: u16) -> usize {
    pages::lines(model, width).len()
}

/// Which row is seen first, that `cursor` is seen and nothing moves that need not.
pub(super) fn window(first: usize, cursor: usize, seen: usize, rows: usize) -> usize {
    let first = first.min(rows.saturating_sub(seen));
    first.clamp((cursor + 1).saturating_sub(seen).min(cursor), cursor)
}

pub(super) fn painted(model: &Model, tone: Tone) -> Style {
    let colour = match tone {
        Tone::Plain => None,
        Tone::Good => Some(Color::Green),
        Tone::Doubtful => Some(Color::Yellow),
        Tone::Bad => Some(Color::Red),
    };
    match colour.filter(|_| model.style.colour) {
        Some(colour) => Style::new().fg(colour),
        None => Style::new(),
    }
}

/// `label` in eight columns as in `status`, and a text.
pub(super) fn labelled(label: &str, text: impl Into<String>, style: Style) -> Line<'static> {
    let label = Span::styled(format!("{label:8}"), Style::new().add_modifier(Modifier::BOLD));
    Line::from(vec![label, Span::styled(text.into(), style)])
}

/// The lines above the list, as many as there is room for.
fn head(model: &Model, width: u16, height: usize) -> Vec<Line<'static>> {
    let room = height.saturating_sub(ROWS + 2).max(usize::from(height > 3));
    let mut lines = Vec::new();
    if let Some(why) = &model.away {
        lines.push((0, away(model, why)));
    }
    match &model.report {
        Some((report, _)) => {
            lines.push((1, labelled("node", node(report), Style::new())));
            lines.push((4, labelled("peers", status::summary(&report.peers), Style::new())));
            lines.push((5, labelled("traffic", traffic(model, report), Style::new())));
            lines.push((2, health(model, report)));
        }
        None => lines.push((1, labelled("node", "the daemon has not answered yet", Style::new()))),
    }
    if model.page == Page::List {
        lines.push((3, labelled("shown", shown(model), Style::new())));
    }
    let mut ranks: Vec<u8> = lines.iter().map(|(rank, _)| *rank).collect();
    ranks.sort_unstable();
    ranks.truncate(room);
    let kept = lines.into_iter().filter(|(rank, _)| ranks.contains(rank));
    kept.map(|(_, line)| shortened(line, width)).collect()
}

/// A line that is too long ends in `…`.
fn shortened(mut line: Line<'static>, width: u16) -> Line<'static> {
    let mut left = usize::from(width);
    for span in &mut line.spans {
        let content = cut(&span.content, left);
        left = left.saturating_sub(Span::raw(content.as_str()).width());
        span.content = content.into();
    }
    line
}

/// `text` in at most `width` columns, with `…` where something is missing.
pub(super) fn cut(text: &str, width: usize) -> String {
    if Span::raw(text).width() <= width {
        return text.to_owned();
    }
    let mut kept = String::new();
    let mut used = 0;
    for letter in text.chars() {
        let wide = Span::raw(letter.to_string()).width();
        if used + wide + 1 > width {
            break;
        }
        used += wide;
        kept.push(letter);
    }
    if width > 0 {
        kept.push('…');
    }
    kept
}

fn away(model: &Model, why: &str) -> Line<'static> {
    let old = match &model.report {
        Some((_, at)) => format!("seen {} ago", span(model.now.saturating_sub(*at))),
        None => "nothing seen".into(),
    };
    labelled(
        "AWAY",
        format!("{old}: {}", clean(why, false)),
        painted(model, Tone::Bad).add_modifier(Modifier::BOLD),
    )
}

fn node(report: &Report) -> String {
    let mut parts = vec![clean(&report.node, false)];
    match report.backend.as_str() {
        "" | "ipsec" => {
            let age = report
                .epoch_age
                .map(|age| format!(", {} old", span(Duration::from_secs(age))));
            parts.push(format!("ipsec {}", clean(&report.cipher, false)));
            parts.push(match report.epoch {
                Some(epoch) => format!("epoch {epoch}{}", age.unwrap_or_default()),
                None => "no epoch".into(),
            });
        }
        other => parts.push(format!("{}: not encrypted", clean(other, false))),
    }
    parts.join(", ")
}

/// What is wrong in a number and its first text.
fn health(model: &Model, report: &Report) -> Line<'static> {
    let plaintext = report.plaintext.map(|counters| {
        counters
            .iter()
            .fold(0_u64, |sum, (_, tally)| sum.saturating_add(tally.packets))
    });
    let dropped = match plaintext {
        Some(packets) => packets.to_string(),
        None => "-".into(),
    };
    let troubles = pages::troubles(report);
    let (text, tone) = match troubles.first() {
        None if plaintext.unwrap_or_default() > 0 => ("no problem".to_owned(), Tone::Bad),
        None => ("no problem".to_owned(), Tone::Plain),
        Some(first) => {
            let number = count(troubles.len(), "problem");
            return labelled(
                "health",
                format!("plaintext {dropped}, {number} (p): {first}"),
                painted(model, Tone::Bad),
            );
        }
    };
    labelled("health", format!("plaintext {dropped}, {text}"), painted(model, tone))
}

fn traffic(model: &Model, report: &Report) -> String {
    let all = model.rates.iter().flatten().copied().reduce(Rate::plus);
    match (all, &report.tunnel) {
        (Some(all), _) => format!(
            "in {}/s, {} packets/s; out {}/s, {} packets/s",
            bytes(all.bytes_in as u64),
            short(all.packets_in, 1000.0),
            bytes(all.bytes_out as u64),
            short(all.packets_out, 1000.0)
        ),
        (None, Some(tunnel)) => format!(
            "received {}, sent {} since the tunnel's start",
            bytes(tunnel.received_bytes),
            bytes(tunnel.sent_bytes)
        ),
        (None, None) => "-".into(),
    }
}

fn shown(model: &Model) -> String {
    let all = model.peers().len();
    let turned = match (model.sort, model.reversed) {
        (Sort::State, false) => ", worst first",
        (Sort::State, true) => ", best first",
        (Sort::Name, false) => "",
        (Sort::Name, true) => ", from the end",
        (_, false) => ", most first",
        (_, true) => ", least first",
    };
    let mut text = match model.shown.len() {
        shown if shown == all => "all".to_owned(),
        shown => format!("{shown} of {all}"),
    };
    text += &format!(", by {}{turned}", model.sort.name());
    if model.only != Only::All {
        text += &format!("; state: {}", model.only.name());
    }
    if !model.filter.is_empty() {
        text += &format!("; with \"{}\"", model.filter);
    }
    text
}

/// A column beside the name.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
enum Column {
    State,
    In,
    Out,
    PacketsIn,
    PacketsOut,
    RoundTrip,
    Loss,
    Heard,
    Short,
    Generation,
    Carrier,
    Errors,
    Address,
}

impl Column {
    /// Which columns are shown on `width`, in their order, and what is left for the name. The list is by importance.
    fn fitting(width: u16) -> (u16, Vec<Self>) {
        let needed = [
            Self::State,
            Self::In,
            Self::Out,
            Self::RoundTrip,
            Self::Errors,
            Self::Loss,
            Self::Short,
            Self::PacketsIn,
            Self::PacketsOut,
            Self::Heard,
            Self::Carrier,
            Self::Generation,
            Self::Address,
        ];
        let (mut left, mut columns) = (width, Vec::new());
        for column in needed {
            // The whole generation in the place of the short one.
            let freed = match column {
                Self::Generation if columns.contains(&Self::Short) => Self::Short.wide() + 1,
                _ => 0,
            };
            let name = match column {
                Self::State | Self::In | Self::Out | Self::RoundTrip => 8,
                Self::Heard | Self::Carrier | Self::Generation | Self::Address => NAME + 7,
                _ => NAME,
            };
            let Some(now) = (left + freed)
                .checked_sub(column.wide() + 1)
                .filter(|left| *left >= name)
            else {
                continue;
            };
            left = now;
            columns.retain(|other| freed == 0 || *other != Self::Short);
            columns.push(column);
        }
        columns.sort_unstable();
        (left.min(LONG_NAME), columns)
    }

    fn wide(self) -> u16 {
        match self {
            Self::State | Self::Out | Self::PacketsOut => 7,
            Self::In | Self::PacketsIn | Self::RoundTrip | Self::Heard | Self::Errors => 6,
            Self::Loss => 4,
            Self::Carrier => 5,
            Self::Short => 9,
            Self::Generation => 21,
            Self::Address => 15,
        }
    }

    fn title(self) -> &'static str {
        match self {
            Self::State => "STATE",
            Self::In => "IN B/s",
            Self::Out => "OUT B/s",
            Self::PacketsIn => "IN p/s",
            Self::PacketsOut => "OUT p/s",
            Self::RoundTrip => "RTT ms",
            Self::Loss => "LOSS",
            Self::Heard => "HEARD",
            Self::Carrier => "CARR.",
            Self::Short => "GEN.",
            Self::Generation => "GENERATION",
            Self::Errors => "ERRORS",
            Self::Address => "ADDRESS",
        }
    }

    /// Which order shows in it.
    fn sort(self) -> Option<Sort> {
        match self {
            Self::State => Some(Sort::State),
            Self::In => Some(Sort::In),
            Self::Out => Some(Sort::Out),
            Self::RoundTrip => Some(Sort::RoundTrip),
            Self::Loss => Some(Sort::Loss),
            Self::Errors => Some(Sort::Errors),
            Self::PacketsIn | Self::PacketsOut | Self::Heard => None,
            Self::Carrier | Self::Short | Self::Generation | Self::Address => None,
        }
    }

    fn left(self) -> bool {
        matches!(
            self,
            Self::State | Self::Carrier | Self::Short | Self::Generation | Self::Address
        )
    }

    fn cell(self, peer: &PeerReport, rate: Option<Rate>) -> (String, Tone) {
        let none = || "-".to_owned();
        let tone = match self {
            Self::State => status::tone(peer),
            Self::Loss if peer.loss.unwrap_or_default() > 0.0 => Tone::Doubtful,
            Self::Errors if peer.errors > 0 => Tone::Doubtful,
            _ => Tone::Plain,
        };
        let per_second = |value: fn(Rate) -> f64, step| rate.map_or_else(none, |rate| short(value(rate), step));
        let text = match self {
            Self::State if peer.silent.is_some() => "silent".to_owned(),
            Self::State => peer.state.word().to_owned(),
            Self::In => per_second(|rate| rate.bytes_in, 1024.0),
            Self::Out => per_second(|rate| rate.bytes_out, 1024.0),
            Self::PacketsIn => per_second(|rate| rate.packets_in, 1000.0),
            Self::PacketsOut => per_second(|rate| rate.packets_out, 1000.0),
            Self::RoundTrip => peer.round_trip.map_or_else(none, milliseconds),
            Self::Loss => peer.loss.map_or_else(none, percent),
            Self::Heard => peer
                .heard
                .and_then(|heard| Duration::try_from_secs_f64(heard).ok())
                .map_or_else(none, span),
            Self::Carrier => peer.encap.clone().unwrap_or_else(none),
            Self::Short => peer.generation.as_deref().map_or_else(none, last_digits),
            Self::Generation => peer.generation.clone().unwrap_or_else(none),
            Self::Errors if rows::counted(peer) => short(peer.errors as f64, 1000.0),
            Self::Errors => none(),
            Self::Address => peer.address.clone(),
        };
        (clean(&text, false), tone)
    }
}

/// A generation by the last digits of its two epochs.
fn last_digits(generation: &str) -> String {
    let last = |epoch: &str| {
        let from = epoch.char_indices().rev().nth(3).map_or(0, |(at, _)| at);
        epoch[from..].to_owned()
    };
    generation.split('>').map(last).collect::<Vec<_>>().join(">")
}

fn list(model: &Model, width: u16, height: usize) -> Vec<Line<'static>> {
    let (name, columns) = Column::fitting(width);
    let bold = Style::new().add_modifier(Modifier::BOLD);
    let sorted = bold.add_modifier(Modifier::UNDERLINED);
    let style = |sort: Option<Sort>| if sort == Some(model.sort) { sorted } else { bold };
    let mut titles = cell("PEER", name, true, style(Some(Sort::Name)));
    for column in &columns {
        titles.push(Span::raw(" "));
        titles.extend(cell(column.title(), column.wide(), column.left(), style(column.sort())));
    }
    let mut lines = vec![Line::from(titles)];
    let seen = height.saturating_sub(1);
    let first = window(model.top, model.cursor, seen, model.shown.len());
    for (row, at) in model.shown.iter().enumerate().skip(first).take(seen) {
        let Some(peer) = model.peers().get(*at) else { continue };
        let rate = model.rates.get(*at).copied().flatten();
        let mut spans = cell(&clean(&peer.node, false), name, true, Style::new());
        for column in &columns {
            let (text, tone) = column.cell(peer, rate);
            spans.push(Span::raw(" "));
            spans.extend(cell(&text, column.wide(), column.left(), painted(model, tone)));
        }
        let line = Line::from(spans);
        lines.push(match row == model.cursor {
            true => line.style(Style::new().add_modifier(Modifier::REVERSED)),
            false => line,
        });
    }
    if model.shown.is_empty() {
        let why = match (&model.report, model.peers().is_empty()) {
            (None, _) => "",
            (_, true) => "no other node has a lease",
            (_, false) => "no peer is so: Esc shows all",
        };
        lines.push(Line::raw(why));
    }
    lines
}

/// A text in its column: the text, styled, and the blanks beside it.
fn cell(text: &str, wide: u16, left: bool, style: Style) -> Vec<Span<'static>> {
    let text = cut(text, usize::from(wide));
    let text = Span::styled(text, style);
    let blank = Span::raw(" ".repeat(usize::from(wide).saturating_sub(text.width())));
    if left { vec![text, blank] } else { vec![blank, text] }
}

fn foot(model: &Model, width: u16) -> Line<'static> {
    if model.typing {
        return Line::from(vec![
            Span::styled(
                format!("/{}", cut(&model.filter, usize::from(width).saturating_sub(30))),
                Style::new(),
            ),
            Span::styled(" ", Style::new().add_modifier(Modifier::REVERSED)),
            Span::raw("   Enter keeps, Esc drops"),
        ]);
    }
    let keys: &[&str] = match &model.page {
        Page::List => &[
            "q quit",
            "? help",
            "Enter detail",
            "/ text",
            "f state",
            match width {
                0..100 => "sort: s n i o r l e",
                _ => "sort: s state n name i in o out r RTT l loss e errors",
            },
        ],
        Page::Peer(_) => &["q back", "left, right: other peers", "up, down: scroll", "? help"],
        Page::Problems | Page::Help => &["q back", "up, down: scroll"],
    };
    let mut text = String::new();
    for key in keys {
        let more = if text.is_empty() {
            (*key).to_owned()
        } else {
            format!("  {key}")
        };
        if text.len() + more.len() <= usize::from(width) {
            text += &more;
        }
    }
    Line::styled(text, painted(model, Tone::Plain).add_modifier(Modifier::DIM))
}

/// `text` in lines of `width` columns where its words allow it.
pub(super) fn wrapped(text: &str, width: u16) -> Vec<String> {
    let text = table::wrap_to(&clean(text, false), 0, usize::from(width.max(8)));
    text.lines().map(str::to_owned).collect()
}
