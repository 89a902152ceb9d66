//! What the view knows, and how it changes: by a key, by a report, by time.

use std::time::Duration;

use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyEventKind, KeyModifiers};

use super::rows::{self, Only, Rate, Sort};
use super::view;
use crate::cli::status::Fetched;
use crate::cli::table::Style;
use crate::node::report::{PeerReport, Report};

/// What may happen.
#[derive(Clone, Debug)]
pub(super) enum Event {
    Key(KeyEvent),
    /// The terminal has so many columns and rows.
    Resized(u16, u16),
    Report(Box<Report>),
    /// The daemon did not answer, and why.
    Away(String),
    Tick,
    Leave,
}

impl Event {
    pub(super) fn of(fetched: Fetched) -> Self {
        match fetched {
            Fetched::Report(report) => Self::Report(report),
            Fetched::Away(why) => Self::Away(why),
        }
    }
}

/// Whether to go on.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(super) enum Next {
    Stay,
    Leave,
}

/// What is shown.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Page {
    List,
    /// All of one peer, by name.
    Peer(String),
    /// What is wrong with the node.
    Problems,
    Help,
}

/// A filter's text is no longer than this, in characters.
const LONGEST: usize = 60;

/// All that the view follows from.
#[derive(Clone, Debug)]
pub(super) struct Model {
    pub(super) style: Style,
    pub(super) interval: Duration,
    size: (u16, u16),
    pub(super) now: Duration,
    /// The last report, and when it came.
    pub(super) report: Option<(Box<Report>, Duration)>,
    /// The rate of each of its peers.
    pub(super) rates: Vec<Option<Rate>>,
    /// Why the daemon did not answer last.
    pub(super) away: Option<String>,
    pub(super) page: Page,
    pub(super) sort: Sort,
    pub(super) reversed: bool,
    pub(super) only: Only,
    pub(super) filter: String,
    /// Whether what is typed goes into the filter.
    pub(super) typing: bool,
    /// Which peers are in the list, in its order, as places in the report.
    pub(super) shown: Vec<usize>,
    /// Where the cursor is in the list.
    pub(super) cursor: usize,
    /// The first row that is to be seen, of the list or of another page.
    pub(super) top: usize,
}

impl Model {
    pub(super) fn new(style: Style, interval: Duration, size: (u16, u16)) -> Self {
        Self {
            style,
            interval,
            size,
            now: Duration::ZERO,
            report: None,
            rates: Vec::new(),
            away: None,
            page: Page::List,
            sort: Sort::State,
            reversed: false,
            only: Only::All,
            filter: String::new(),
            typing: false,
            shown: Vec::new(),
            cursor: 0,
            top: 0,
        }
    }

    /// Takes what happened at `now`.
    pub(super) fn update(&mut self, event: Event, now: Duration) -> Next {
        self.now = now;
        match event {
            Event::Key(key) => return self.key(key),
            Event::Resized(width, height) => self.size = (width, height),
            Event::Report(report) => self.take(report),
            Event::Away(why) => self.away = Some(why),
            Event::Tick => {}
            Event::Leave => return Next::Leave,
        }
        self.settle();
        Next::Stay
    }

    pub(super) fn peers(&self) -> &[PeerReport] {
        self.report.as_ref().map_or(&[], |(report, _)| &report.peers)
    }

    /// The peer of this name and its rate.
    pub(super) fn peer(&self, name: &str) -> Option<(&PeerReport, Option<Rate>)> {
        let at = self.peers().iter().position(|peer| peer.node == name)?;
        Some((&self.peers()[at], self.rates.get(at).copied().flatten()))
    }

    fn selected(&self) -> Option<&str> {
        let peer = self.peers().get(*self.shown.get(self.cursor)?)?;
        Some(&peer.node)
    }

    fn take(&mut self, report: Box<Report>) {
        let selected = self.selected().map(str::to_owned);
        self.rates = match &self.report {
            Some((before, at)) => rows::rates(&before.peers, &report.peers, self.now.saturating_sub(*at)),
            None => vec![None; report.peers.len()],
        };
        self.away = None;
        self.report = Some((report, self.now));
        self.list(selected.as_deref());
    }

    /// Makes the list anew, with the cursor on the peer that it was on, where that is still in it.
    fn list(&mut self, selected: Option<&str>) {
        let text = self.filter.to_lowercase();
        let peers = self.peers();
        let wanted = |at: &usize| self.only.has(&peers[*at]) && rows::matches(&peers[*at], &text);
        let shown = (0..peers.len()).filter(wanted).collect();
        let shown = rows::sorted(peers, &self.rates, shown, self.sort, self.reversed);
        // Who has not moved watches the top, whoever comes to stand there.
        let same = selected.filter(|_| self.cursor > 0);
        let found = same.and_then(|name| shown.iter().position(|at| peers[*at].node == name));
        self.cursor = found.unwrap_or(self.cursor);
        self.shown = shown;
    }

    fn relist(&mut self) {
        let selected = self.selected().map(str::to_owned);
        self.list(selected.as_deref());
        self.settle();
    }

    /// Keeps the cursor in the list and what is seen around it.
    fn settle(&mut self) {
        self.cursor = self.cursor.min(self.shown.len().saturating_sub(1));
        let seen = view::body_rows(self, self.size);
        let rows = match &self.page {
            Page::List => self.shown.len(),
            Page::Peer(_) | Page::Problems | Page::Help => view::page_rows(self, self.size.0),
        };
        self.top = match self.page {
            Page::List => view::window(self.top, self.cursor, seen, rows),
            Page::Peer(_) | Page::Problems | Page::Help => self.top.min(rows.saturating_sub(seen)),
        };
    }

    fn key(&mut self, key: KeyEvent) -> Next {
        if key.kind == KeyEventKind::Release {
            return Next::Stay;
        }
        if key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL) {
            return Next::Leave;
        }
        if self.typing {
            self.typed(key);
            return Next::Stay;
        }
        if key.modifiers.intersects(KeyModifiers::CONTROL | KeyModifiers::ALT) {
            return Next::Stay;
        }
        let list = self.page == Page::List;
        match key.code {
            KeyCode::Char('q') if list => return Next::Leave,
            KeyCode::Esc if list => {
                self.filter.clear();
                self.only = Only::All;
                self.relist();
            }
            KeyCode::Char('q') | KeyCode::Esc | KeyCode::Backspace => self.turn_to(Page::List),
            KeyCode::Enter if list => {
                if let Some(name) = self.selected().map(str::to_owned) {
                    self.turn_to(Page::Peer(name));
                }
            }
            KeyCode::Enter => self.turn_to(Page::List),
            KeyCode::Char('?' | 'h') => self.turn_to(Page::Help),
            KeyCode::Char('p') => self.turn_to(Page::Problems),
            KeyCode::Char('/') if list => self.typing = true,
            KeyCode::Char('f') if list => {
                self.only = self.only.next();
                self.relist();
            }
            KeyCode::Left if !list => self.beside(false),
            KeyCode::Right if !list => self.beside(true),
            KeyCode::Up | KeyCode::Char('k') => self.go(-1),
            KeyCode::Down | KeyCode::Char('j') => self.go(1),
            KeyCode::PageUp => self.go(-self.page_step()),
            KeyCode::PageDown | KeyCode::Char(' ') => self.go(self.page_step()),
            KeyCode::Home | KeyCode::Char('g') => self.go(isize::MIN),
            KeyCode::End | KeyCode::Char('G') => self.go(isize::MAX),
            KeyCode::Char(letter) if list => {
                if let Some(sort) = Sort::of(letter) {
                    self.reversed = self.sort == sort && !self.reversed;
                    self.sort = sort;
                    self.relist();
                }
            }
            _ => {}
        }
        Next::Stay
    }

    fn typed(&mut self, key: KeyEvent) {
        match key.code {
            KeyCode::Enter => self.typing = false,
            KeyCode::Esc => {
                self.typing = false;
                self.filter.clear();
            }
            KeyCode::Backspace if self.filter.pop().is_none() => self.typing = false,
            KeyCode::Char(letter)
                if !letter.is_control()
                    && !key.modifiers.intersects(KeyModifiers::CONTROL | KeyModifiers::ALT)
                    && self.filter.chars().count() < LONGEST =>
            {
                self.filter.push(letter);
            }
            _ => {}
        }
        self.relist();
    }

    fn turn_to(&mut self, page: Page) {
        self.page = page;
        self.top = 0;
        self.settle();
    }

    /// From one peer's page to that of the next in the list, or of the one before.
    fn beside(&mut self, next: bool) {
        let Page::Peer(name) = &self.page else { return };
        let peers = self.peers();
        let at = self.shown.iter().position(|at| peers[*at].node == *name);
        let at = at.unwrap_or(self.cursor);
        let to = if next {
            at.saturating_add(1)
        } else {
            at.saturating_sub(1)
        };
        self.cursor = to.min(self.shown.len().saturating_sub(1));
        if let Some(name) = self.selected().map(str::to_owned) {
            self.turn_to(Page::Peer(name));
        }
    }

    fn page_step(&self) -> isize {
        let seen = view::body_rows(self, self.size);
        isize::try_from(seen).unwrap_or(isize::MAX).saturating_sub(1).max(1)
    }

    fn go(&mut self, by: isize) {
        let from = if self.page == Page::List {
            &mut self.cursor
        } else {
            &mut self.top
        };
        *from = from.saturating_add_signed(by);
        self.settle();
    }
}
