//! What each key does.

use std::time::Duration;

use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use ratatui::style::Modifier;

use super::{PLAIN, busy, drawn, model, names, press, text};
use crate::cli::top::model::{Event, Model, Next, Page};
use crate::cli::top::rows::{Only, Sort};
use crate::node::report::{PeerReport, Report, State};

fn hit(model: &mut Model, code: KeyCode) -> Next {
    with(model, code, KeyModifiers::NONE)
}

fn with(model: &mut Model, code: KeyCode, modifiers: KeyModifiers) -> Next {
    let now = model.now;
    model.update(Event::Key(KeyEvent::new(code, modifiers)), now)
}

/// Fifty peers by name, of which 17 are to be seen at a time.
fn many() -> Model {
    let mut report = busy(0);
    let peer = report.peers[0].clone();
    let named = |number: usize| PeerReport {
        node: format!("node-{number:02}"),
        ..peer.clone()
    };
    report.peers = (0..50).map(named).collect();
    let mut model = Model::new(PLAIN, Duration::from_secs(1), (80, 24));
    model.update(Event::Report(Box::new(report)), Duration::from_secs(1));
    press(&mut model, "n");
    model
}

#[test]
fn the_cursor_moves_by_rows_and_pages_and_not_out_of_the_list() {
    let mut model = many();
    for (code, cursor, top) in [
        (KeyCode::Up, 0, 0),
        (KeyCode::Down, 1, 0),
        (KeyCode::Char('j'), 2, 0),
        (KeyCode::Down, 3, 0),
        (KeyCode::Up, 2, 0),
        (KeyCode::Char('k'), 1, 0),
        (KeyCode::PageDown, 17, 1),
        (KeyCode::Char(' '), 33, 17),
        (KeyCode::PageUp, 17, 17),
        (KeyCode::Up, 16, 16),
        (KeyCode::End, 49, 33),
        (KeyCode::Down, 49, 33),
        (KeyCode::Up, 48, 33),
        (KeyCode::Home, 0, 0),
        (KeyCode::Char('G'), 49, 33),
        (KeyCode::PageDown, 49, 33),
        (KeyCode::Char('g'), 0, 0),
        (KeyCode::PageUp, 0, 0),
        (KeyCode::Left, 0, 0),
    ] {
        assert_eq!(hit(&mut model, code), Next::Stay);
        assert_eq!((model.cursor, model.top), (cursor, top), "{code}");
    }
    press(&mut model, "G^");
    let lines = text(&model, 80, 24);
    let rows: Vec<&str> = lines.lines().skip(6).take(17).map(|line| &line[..7]).collect();
    assert_eq!((rows[0], rows[16]), ("node-33", "node-49"), "{lines}");
    let marked = |model: &Model, modifier| {
        let buffer = drawn(model, 80, 24);
        let all = buffer
            .area
            .positions()
            .filter(|at| buffer[*at].modifier.contains(modifier));
        all.map(|at| (at.y, buffer[at].symbol().to_owned())).collect::<Vec<_>>()
    };
    let cursor = marked(&model, Modifier::REVERSED);
    assert!(cursor.iter().all(|(y, _)| *y == 6 + 15), "{cursor:?}");
    let cursor: String = cursor.into_iter().map(|(_, symbol)| symbol).collect();
    assert!(cursor.starts_with("node-48 "), "{cursor:?}");
    press(&mut model, "l");
    let title: String = marked(&model, Modifier::UNDERLINED)
        .into_iter()
        .map(|(_, symbol)| symbol)
        .collect();
    assert_eq!(title, "LOSS", "the column that sorts");
}

#[test]
fn a_terminal_that_becomes_smaller_or_a_list_that_becomes_shorter_keeps_the_cursor_in_sight() {
    let mut model = many();
    press(&mut model, "vvvvvvvvvvvvvvvv");
    assert_eq!((model.cursor, model.top), (16, 0));
    let now = model.now;
    model.update(Event::Resized(80, 10), now);
    let lines = text(&model, 80, 10);
    assert!(model.top > 10 && lines.contains("\nnode-16 "), "{lines}");
    press(&mut model, "G");
    model.update(Event::Report(Box::new(busy(0))), now);
    assert_eq!(model.cursor, 5);
}

#[test]
fn what_is_held_down_with_another_key_or_let_go_is_not_a_key() {
    let mut model = model(80, 24);
    for modifier in [KeyModifiers::CONTROL, KeyModifiers::ALT] {
        for letter in "qnf/p".chars() {
            assert_eq!(
                with(&mut model, KeyCode::Char(letter), modifier),
                Next::Stay,
                "{letter}"
            );
        }
    }
    let mut released = KeyEvent::new(KeyCode::Char('q'), KeyModifiers::NONE);
    released.kind = KeyEventKind::Release;
    let now = model.now;
    assert_eq!(model.update(Event::Key(released), now), Next::Stay);
    assert_eq!(hit(&mut model, KeyCode::Char('c')), Next::Stay);
    let untouched = (&Page::List, Sort::State, Only::All, false);
    assert_eq!((&model.page, model.sort, model.only, model.typing), untouched);
    assert_eq!(model.update(Event::Leave, now), Next::Leave);
    for before in ["", "/", "p", "\n"] {
        press(&mut model, before);
        assert_eq!(
            with(&mut model, KeyCode::Char('c'), KeyModifiers::CONTROL),
            Next::Leave,
            "{before}"
        );
        press(&mut model, "\x1b");
    }
}

#[test]
fn every_page_is_left_by_each_of_four_keys_and_takes_none_of_the_lists() {
    for (to, page) in [
        ("\n", Page::Peer("node-g".into())),
        ("?", Page::Help),
        ("h", Page::Help),
        ("p", Page::Problems),
    ] {
        for back in [KeyCode::Char('q'), KeyCode::Esc, KeyCode::Backspace, KeyCode::Enter] {
            let mut model = model(80, 24);
            press(&mut model, "/node\nf");
            press(&mut model, to);
            assert_eq!(model.page, page);
            press(&mut model, "/fi");
            assert_eq!(hit(&mut model, back), Next::Stay, "{back} on {page:?}");
            assert_eq!(model.page, Page::List, "{back} on {page:?}");
            let kept = (false, Only::Unwell, Sort::State, "node");
            assert_eq!(
                (model.typing, model.only, model.sort, model.filter.as_str()),
                kept,
                "{page:?}"
            );
        }
    }
    let mut model = model(80, 24);
    press(&mut model, "/node\nf\x1b");
    assert_eq!((model.only, model.filter.as_str()), (Only::All, ""));
}

#[test]
fn from_a_peer_the_arrows_go_to_those_beside_it_in_the_list() {
    let mut model = model(80, 24);
    press(&mut model, "i");
    let order: Vec<String> = names(&model).into_iter().map(str::to_owned).collect();
    assert_eq!(order[..2], ["node-d", "node-b"]);
    press(&mut model, "\n");
    let page = |at: usize| Page::Peer(order[at].clone());
    assert_eq!(hit(&mut model, KeyCode::Left), Next::Stay);
    assert_eq!(model.page, page(0));
    hit(&mut model, KeyCode::Right);
    assert_eq!((&model.page, model.cursor), (&page(1), 1));
    hit(&mut model, KeyCode::Left);
    assert_eq!((&model.page, model.cursor), (&page(0), 0));
    for _ in 0..9 {
        hit(&mut model, KeyCode::Right);
    }
    assert_eq!((&model.page, model.cursor), (&page(5), 5));
    // Another has come to stand above it meanwhile: the cursor is at the top, and the page's peer is not.
    press(&mut model, "qg\n");
    let mut next = busy(3);
    next.peers[0].bytes_in += 9_000_000_000;
    model.update(Event::Report(Box::new(next)), Duration::from_secs(4));
    assert_eq!(
        (names(&model)[..2].to_vec(), model.cursor),
        (vec!["node-b", "node-d"], 0)
    );
    let after = Page::Peer(names(&model)[2].to_owned());
    hit(&mut model, KeyCode::Right);
    assert_eq!(model.page, after);
}

#[test]
fn a_page_that_is_longer_than_the_terminal_is_scrolled_and_the_next_begins_at_its_top() {
    let mut model = model(80, 12);
    press(&mut model, "nvvv\n");
    let first = text(&model, 80, 12);
    assert!(first.contains("\npeer        node-e\n"), "{first}");
    hit(&mut model, KeyCode::Down);
    assert_eq!((model.top, model.cursor), (1, 3));
    let lines = text(&model, 80, 12);
    assert!(!lines.contains("\npeer  ") && lines.contains("\nstate  "), "{lines}");
    hit(&mut model, KeyCode::End);
    let end = model.top;
    let lines = text(&model, 80, 12);
    let last = lines.lines().nth(10).unwrap_or_default();
    assert!(end > 1 && last.starts_with("errors"), "{lines}");
    hit(&mut model, KeyCode::PageDown);
    assert_eq!(model.top, end, "no further");
    hit(&mut model, KeyCode::Right);
    assert_eq!(model.top, 0);
    press(&mut model, "G");
    assert!(model.top > 0);
    hit(&mut model, KeyCode::Home);
    assert_eq!(model.top, 0);
}

#[test]
fn what_is_typed_into_the_filter_can_be_taken_back() {
    let mut model = model(80, 24);
    press(&mut model, "/qd\x08");
    assert_eq!(
        (model.filter.as_str(), model.typing),
        ("q", true),
        "also letters that are keys"
    );
    press(&mut model, "\x08");
    assert_eq!((names(&model).len(), model.typing), (6, true));
    press(&mut model, "\x08");
    assert!(!model.typing);
    press(&mut model, "/node-d");
    for (code, modifiers) in [
        ('\u{7}', KeyModifiers::NONE),
        ('a', KeyModifiers::CONTROL),
        ('a', KeyModifiers::ALT),
    ] {
        with(&mut model, KeyCode::Char(code), modifiers);
    }
    assert_eq!((model.filter.as_str(), names(&model)), ("node-d", vec!["node-d"]));
    press(&mut model, "\x1b");
    assert_eq!(
        (model.filter.as_str(), model.typing, names(&model).len()),
        ("", false, 6)
    );
    press(&mut model, "/");
    press(&mut model, &"ä".repeat(61));
    assert_eq!(model.filter.chars().count(), 60);
}

#[test]
fn subnets_and_addresses_are_looked_through_too() {
    let mut model = model(80, 24);
    let peer = model.peer("node-d").expect("it is there").0.clone();
    press(&mut model, &format!("/{}\n", peer.address));
    assert_eq!(names(&model), ["node-d"]);
    press(&mut model, &format!("\x1b/{}\n", peer.subnets[0]));
    assert_eq!(names(&model), ["node-d"]);
}

/// Each with so many bytes in and out since the report before, and so many errors.
fn carrying(all: &[(&str, State, u64, u64, u64)]) -> Model {
    let report = |after: u64| -> Report {
        let mut report = busy(0);
        let peer = report.peers[0].clone();
        let each = all.iter().map(|(name, state, bytes_in, bytes_out, errors)| PeerReport {
            node: (*name).to_owned(),
            state: *state,
            bytes_in: after * bytes_in,
            bytes_out: after * bytes_out,
            errors: *errors,
            ..peer.clone()
        });
        report.peers = each.collect();
        report
    };
    let mut model = Model::new(PLAIN, Duration::from_secs(1), (80, 24));
    model.update(Event::Report(Box::new(report(0))), Duration::from_secs(1));
    model.update(Event::Report(Box::new(report(1))), Duration::from_secs(2));
    model
}

#[test]
fn the_largest_is_first_and_of_equals_the_names_decide_also_the_other_way_around() {
    let mut model = carrying(&[
        ("a", State::Up, 1000, 3000, 0),
        ("b", State::Up, 2000, 2000, 5),
        ("c", State::Up, 3000, 1000, 0),
        ("d", State::Refused, 9000, 9000, 99),
        ("e", State::Plain, 9000, 9000, 99),
    ]);
    for (keys, wanted) in [
        ("i", "cbade"),
        ("i", "abcde"),
        ("o", "abcde"),
        ("o", "cbade"),
        ("e", "bacde"),
        ("e", "acbde"),
        ("i", "cbade"),
        ("s", "deabc"),
        ("s", "abced"),
    ] {
        press(&mut model, keys);
        assert_eq!(
            names(&model).concat(),
            wanted,
            "{keys}: {:?} {}",
            model.sort,
            model.reversed
        );
    }
    assert_eq!(
        model.peer("e").and_then(|(_, rate)| rate),
        None,
        "nothing is counted of who is plain"
    );
}

#[test]
fn two_reports_at_one_moment_give_no_rate() {
    let mut model = model(80, 24);
    model.update(Event::Report(Box::new(busy(3))), Duration::from_micros(3_000_500));
    assert_eq!(model.peer("node-b").map(|(_, rate)| rate), Some(None));
}
