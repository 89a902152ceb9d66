//! What the head, the columns and the pages say of values that the golden files have not.

use std::time::Duration;

use ratatui::style::Color;

use super::{PLAIN, busy, drawn, model, press, text};
use crate::cli::table::Style;
use crate::cli::top::model::{Event, Model};
use crate::cli::top::view::cut;
use crate::kernel::firewall::{Counters, Tally};
use crate::node::report::{Report, State};
use crate::tunnel;

/// A model that has `report` alone.
fn of(report: Report) -> Model {
    let mut model = Model::new(Style { colour: true }, Duration::from_secs(1), (120, 40));
    model.update(Event::Report(Box::new(report)), Duration::from_secs(1));
    model
}

/// The colour in which the first `what` stands behind `label`, on one row.
#[track_caller]
fn colour(model: &Model, label: &str, what: &str) -> Color {
    let buffer = drawn(model, 120, 40);
    for y in 0..40 {
        let row: Vec<&str> = (0..120).map(|x| buffer[(x, y)].symbol()).collect();
        let all = row.concat();
        if let Some(at) = all.find(label).and_then(|at| Some(at + all[at..].find(what)?)) {
            let before = all[..at].chars().count();
            return buffer[(u16::try_from(before).unwrap_or_default(), y)].fg;
        }
    }
    panic!("no {what} behind {label} in\n{}", text(model, 120, 40));
}

fn line(model: &Model, label: &str) -> String {
    let all = text(model, 120, 40);
    all.lines()
        .find(|line| line.starts_with(label))
        .unwrap_or_default()
        .to_owned()
}

#[test]
fn the_head_says_what_is_not_known_or_not_encrypted() {
    let mut report = busy(0);
    (report.epoch, report.plaintext) = (None, None);
    let model = of(report.clone());
    assert!(line(&model, "node").ends_with(", no epoch"), "{}", line(&model, "node"));
    assert_eq!(line(&model, "health"), "health  plaintext -, no problem");
    assert_eq!(line(&model, "traffic"), "traffic -", "one report gives no rate");
    report.backend = "udp".into();
    report.tunnel = Some(tunnel::Counters {
        received_bytes: 2048,
        sent_bytes: 5_242_880,
        ..tunnel::Counters::default()
    });
    let model = of(report);
    assert!(
        line(&model, "node").ends_with(", udp: not encrypted"),
        "{}",
        line(&model, "node")
    );
    assert_eq!(
        line(&model, "traffic"),
        "traffic received 2.0 KiB, sent 5.0 MiB since the tunnel's start"
    );
}

#[test]
fn what_is_wrong_is_red_and_what_is_doubtful_yellow() {
    let mut report = busy(0);
    let model = of(report.clone());
    assert_eq!(colour(&model, "health", "plaintext"), Color::Reset);
    report.plaintext = Some(Counters {
        arriving: Tally::default(),
        leaving: Tally { packets: 1, bytes: 84 },
    });
    assert_eq!(
        colour(&of(report.clone()), "health", "plaintext 1, no problem"),
        Color::Red
    );
    report.problems = vec!["no lease yet".into()];
    assert_eq!(
        colour(&of(report.clone()), "health", "plaintext 1, 1 problem"),
        Color::Red
    );

    let peer = &mut report.peers[0];
    (peer.state, peer.errors, peer.loss, peer.full_size) = (State::Up, 4321, Some(0.25), Some(true));
    let mut model = of(report.clone());
    assert_eq!(colour(&model, "node-b", "up"), Color::Green);
    assert_eq!(colour(&model, "node-b", "25%"), Color::Yellow);
    assert_eq!(colour(&model, "node-b", "4.3K"), Color::Yellow);
    press(&mut model, "/node-b\n\n");
    assert_eq!(colour(&model, "state ", "up"), Color::Green);
    assert_eq!(colour(&model, "loss ", "25%"), Color::Yellow);
    assert_eq!(colour(&model, "errors ", "4321"), Color::Yellow);
    assert_eq!(
        colour(&model, "full size ", "packets of the mesh MTU pass"),
        Color::Reset
    );
    let peer = &mut report.peers[0];
    (peer.errors, peer.loss, peer.full_size) = (0, Some(0.0), Some(false));
    let mut model = of(report.clone());
    press(&mut model, "/node-b\n\n");
    assert_eq!(colour(&model, "loss ", "0%"), Color::Reset);
    assert_eq!(colour(&model, "errors ", "0"), Color::Reset);
    assert_eq!(
        colour(&model, "full size ", "packets of the mesh MTU do not pass"),
        Color::Red
    );
    assert_eq!(line(&model, "sent").split(',').next_back(), Some(" 1200 packets"));
    report.peers[0].state = State::Plain;
    let mut model = of(report);
    press(&mut model, "/node-b\n\n");
    assert_eq!(
        line(&model, "sent") + &line(&model, "errors"),
        "",
        "nothing is counted of it"
    );
}

#[test]
fn the_order_and_the_filters_are_said_in_words() {
    let mut model = model(120, 24);
    for (keys, words) in [
        ("s", "all, by state, best first"),
        ("n", "all, by name"),
        ("n", "all, by name, from the end"),
        ("i", "all, by bytes in, most first"),
        ("i", "all, by bytes in, least first"),
        ("f", "4 of 6, by bytes in, least first; state: not well"),
        (
            "/-d\n",
            "1 of 6, by bytes in, least first; state: not well; with \"-d\"",
        ),
        ("\x1b", "all, by bytes in, least first"),
    ] {
        press(&mut model, keys);
        assert_eq!(line(&model, "shown"), format!("shown   {words}"), "{keys:?}");
    }
}

#[test]
fn what_the_store_lacks_or_holds_wrongly_is_among_the_problems() {
    let mut report = busy(0);
    report.complete = false;
    report.rejected = [("x\x1b".to_owned(), "no JSON".to_owned())].into();
    let mut model = of(report);
    let health = "health  plaintext 0, 2 problems (p): the store is not read whole yet";
    assert_eq!(line(&model, "health"), health);
    press(&mut model, "p");
    let lines = text(&model, 120, 40);
    assert!(lines.contains("problem     rejected: x\u{fffd}: no JSON\n"), "{lines}");
    let mut alone = busy(0);
    alone.peers.clear();
    assert!(text(&of(alone), 120, 40).contains("\nno other node has a lease\n"));
}

#[test]
fn no_text_from_outside_reaches_the_terminal_unread_and_wide_letters_are_counted_as_such() {
    let mut report = busy(0);
    report.peers[0].node = "a\x1b[2Jb".into();
    report.peers[0].generation = Some("17\x1b>18".into());
    let mut model = of(report);
    let lines = text(&model, 120, 40);
    assert!(
        lines.contains("\na\u{fffd}[2Jb ") && lines.contains("17\u{fffd}>18"),
        "{lines}"
    );
    let now = model.now;
    model.update(Event::Away("gone\x1b[2J".into()), now);
    assert!(
        line(&model, "AWAY").ends_with(": gone\u{fffd}[2J"),
        "{}",
        line(&model, "AWAY")
    );
    assert_eq!(
        [cut("日本語", 6), cut("日本語", 5), cut("日本語", 4), cut("ab", 0)],
        ["日本語", "日本…", "日…", ""]
    );
}

/// 80 columns hold what matters; a name keeps 13 of them before the less important come, and 20 before those that an
/// ssh window has no room for.
#[test]
fn columns_come_one_after_the_other_and_leave_the_names_their_room() {
    let model = model(80, 24);
    for width in 40..=220_u16 {
        let lines = text(&model, width, 24);
        let title = lines.lines().find(|line| line.starts_with("PEER")).expect("titles");
        let name = title.find("STATE").expect("always") - 1;
        let has = |words: &[&str]| words.iter().any(|word| title.contains(word));
        if has(&["ERRORS", "LOSS", "GEN.", " p/s"]) {
            assert!(name >= 13, "{width}: {title}");
        }
        if has(&["HEARD", "CARR.", "GENERATION", "ADDRESS"]) {
            assert!(name >= 20, "{width}: {title}");
        }
        assert!(!(has(&["GEN."]) && has(&["GENERATION"])), "{width}: {title}");
        if width >= 80 {
            assert!(
                ["IN B/s", "OUT B/s", "RTT ms", "LOSS", "GEN", "ERRORS"]
                    .iter()
                    .all(|word| has(&[word])),
                "{title}"
            );
        }
    }
}

#[test]
fn the_help_says_how_often_the_daemon_is_asked() {
    for (interval, words) in [(Duration::from_secs(1), "1 s"), (Duration::from_millis(300), "300 ms")] {
        let mut model = Model::new(PLAIN, interval, (80, 60));
        press(&mut model, "?");
        let lines = text(&model, 80, 60);
        assert!(
            lines.contains(&format!("answers     asked every {words}, and no more than")),
            "{lines}"
        );
    }
}
