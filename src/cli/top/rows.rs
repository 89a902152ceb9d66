//! What a row of the list is sorted and filtered by, and its numbers.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::time::Duration;

use crate::cli::status;
use crate::node::report::{PeerReport, State};

/// What crosses in a second.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Rate {
    pub(super) bytes_in: f64,
    pub(super) bytes_out: f64,
    pub(super) packets_in: f64,
    pub(super) packets_out: f64,
}

impl Rate {
    /// What `before` and `now`, so far apart, come to. `None` where a count has fallen: an old SA is gone and its count
    /// with it.
    fn between(before: &PeerReport, now: &PeerReport, apart: Duration) -> Option<Self> {
        let seconds = apart.as_secs_f64();
        let rate = |before: u64, now: u64| Some(now.checked_sub(before)? as f64 / seconds);
        if seconds < 0.001 || !counted(now) {
            return None;
        }
        Some(Self {
            bytes_in: rate(before.bytes_in, now.bytes_in)?,
            bytes_out: rate(before.bytes_out, now.bytes_out)?,
            packets_in: rate(before.packets_in, now.packets_in)?,
            packets_out: rate(before.packets_out, now.packets_out)?,
        })
    }

    pub(super) fn plus(self, other: Self) -> Self {
        Self {
            bytes_in: self.bytes_in + other.bytes_in,
            bytes_out: self.bytes_out + other.bytes_out,
            packets_in: self.packets_in + other.packets_in,
            packets_out: self.packets_out + other.packets_out,
        }
    }
}

/// Whether the kernel keeps a count for the peer.
pub(super) fn counted(peer: &PeerReport) -> bool {
    !matches!(peer.state, State::Plain | State::Refused)
}

/// The rate of each of `now`, in their order.
pub(super) fn rates(before: &[PeerReport], now: &[PeerReport], apart: Duration) -> Vec<Option<Rate>> {
    let before: BTreeMap<&str, &PeerReport> = before.iter().map(|peer| (peer.node.as_str(), peer)).collect();
    let rate = |peer: &PeerReport| Rate::between(before.get(peer.node.as_str())?, peer, apart);
    now.iter().map(rate).collect()
}

/// What the list is sorted by.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Sort {
    State,
    Name,
    In,
    Out,
    RoundTrip,
    Loss,
    Errors,
}

impl Sort {
    /// Each with its key and its name.
    pub(super) const ALL: [(char, Self, &'static str); 7] = [
        ('s', Self::State, "state"),
        ('n', Self::Name, "name"),
        ('i', Self::In, "bytes in"),
        ('o', Self::Out, "bytes out"),
        ('r', Self::RoundTrip, "round trip"),
        ('l', Self::Loss, "loss"),
        ('e', Self::Errors, "errors"),
    ];

    pub(super) fn of(key: char) -> Option<Self> {
        Self::ALL
            .into_iter()
            .find(|(of, ..)| *of == key)
            .map(|(_, sort, _)| sort)
    }

    pub(super) fn name(self) -> &'static str {
        Self::ALL
            .into_iter()
            .find(|(_, sort, _)| *sort == self)
            .map_or("", |(.., name)| name)
    }

    fn value(self, peer: &PeerReport, rate: Option<Rate>) -> Option<f64> {
        match self {
            // One that is silent stands between those that are served with a doubt and those that are not.
            Self::State => Some(f64::from(peer.state as u8) + if peer.silent.is_some() { 2.5 } else { 0.0 }),
            Self::Name => None,
            Self::In => rate.map(|rate| rate.bytes_in),
            Self::Out => rate.map(|rate| rate.bytes_out),
            Self::RoundTrip => peer.round_trip,
            Self::Loss => peer.loss,
            Self::Errors => counted(peer).then_some(peer.errors as f64),
        }
    }
}

/// The largest or worst first, names from A; turned around where `reversed`. What has no value is last either way.
pub(super) fn sorted(
    peers: &[PeerReport],
    rates: &[Option<Rate>],
    mut shown: Vec<usize>,
    sort: Sort,
    reversed: bool,
) -> Vec<usize> {
    let value = |at: &usize| sort.value(&peers[*at], rates.get(*at).copied().flatten());
    let keys: Vec<Option<f64>> = (0..peers.len()).map(|at| value(&at)).collect();
    let turned = |order: Ordering| if reversed { order.reverse() } else { order };
    shown.sort_by(|a, b| {
        let by_value = match (keys[*a], keys[*b]) {
            (Some(a), Some(b)) => turned(b.total_cmp(&a)),
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (None, None) => Ordering::Equal,
        };
        let names = peers[*a].node.cmp(&peers[*b].node);
        by_value.then_with(|| if sort == Sort::Name { turned(names) } else { names })
    });
    shown
}

/// Which states are shown.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Only {
    All,
    /// What there is something to say of.
    Unwell,
    State(State),
}

impl Only {
    /// All of them, in the order in which a key goes through them.
    const EACH: [Self; 8] = [
        Self::All,
        Self::Unwell,
        Self::State(State::Refused),
        Self::State(State::Waiting),
        Self::State(State::Kept),
        Self::State(State::Moving),
        Self::State(State::Plain),
        Self::State(State::Up),
    ];

    pub(super) fn next(self) -> Self {
        let at = Self::EACH.iter().position(|each| *each == self).unwrap_or_default();
        Self::EACH[(at + 1) % Self::EACH.len()]
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::All => "",
            Self::Unwell => "not well",
            Self::State(state) => state.word(),
        }
    }

    pub(super) fn has(self, peer: &PeerReport) -> bool {
        match self {
            Self::All => true,
            Self::Unwell => !status::well_peer(peer),
            Self::State(state) => peer.state == state,
        }
    }
}

/// Whether `text`, in lower case, is in what names the peer or says why it is not up.
pub(super) fn matches(peer: &PeerReport, text: &str) -> bool {
    let has = |field: &str| field.to_lowercase().contains(text);
    text.is_empty()
        || has(&peer.node)
        || has(&peer.address)
        || peer.subnets.iter().any(|net| has(net))
        || peer.reason.as_deref().is_some_and(has)
}

/// A number in five columns at most: `0`, `87`, `1.2K`, `340M`; `step` is 1024 for bytes, 1000 for packets.
pub(super) fn short(number: f64, step: f64) -> String {
    let mut number = number.max(0.0);
    for unit in ["", "K", "M", "G", "T"] {
        let digits = if number < 9.95 && !unit.is_empty() { 1 } else { 0 };
        // What would be rounded to the step is 1.0 of the next unit.
        if number < step - 0.5 {
            return format!("{number:.digits$}{unit}");
        }
        number /= step;
    }
    "many".into()
}

/// Milliseconds in five columns at most.
pub(super) fn milliseconds(time: f64) -> String {
    match time {
        ..9.995 => format!("{:.2}", time.max(0.0)),
        ..99.95 => format!("{time:.1}"),
        ..99_999.0 => format!("{time:.0}"),
        _ => "long".into(),
    }
}

/// A share as percent.
pub(super) fn percent(share: f64) -> String {
    let share = (share * 100.0).clamp(0.0, 100.0);
    // One of many lost is not none.
    if share > 0.0 && share < 1.0 {
        "<1%".into()
    } else {
        format!("{share:.0}%")
    }
}
