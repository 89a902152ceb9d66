//! What `top` shows, as golden files in tests/golden/top, and that nothing typed or told makes it fall over.

mod keys;
mod shown;
mod terminal;

use std::time::{Duration, Instant};

use proptest::prelude::*;
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::buffer::Buffer;
use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};
use ratatui::style::Color;

use super::model::{Event, Model, Next, Page};
use super::pause_after;
use super::rows::{self, Only, Sort};
use super::view::{self, window};
use crate::cli::table::Style;
use crate::cli::tests::{golden, report};
use crate::kernel::firewall::{Counters, Tally};
use crate::node::report::{PeerReport, Report, State};

const PLAIN: Style = Style { colour: false };

fn drawn(model: &Model, width: u16, height: u16) -> Buffer {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal
        .draw(|frame| view::render(model, frame.area(), frame.buffer_mut()))
        .unwrap();
    terminal.backend().buffer().clone()
}

fn text(model: &Model, width: u16, height: u16) -> String {
    let buffer = drawn(model, width, height);
    let row = |y| {
        let cells: String = (0..width).map(|x| buffer[(x, y)].symbol()).collect();
        format!("{}\n", cells.trim_end())
    };
    (0..height).map(row).collect()
}

fn press(model: &mut Model, keys: &str) -> Next {
    let mut next = Next::Stay;
    for key in keys.chars() {
        let code = match key {
            '\n' => KeyCode::Enter,
            '\x1b' => KeyCode::Esc,
            '\x08' => KeyCode::Backspace,
            'v' => KeyCode::Down,
            '^' => KeyCode::Up,
            '>' => KeyCode::Right,
            key => KeyCode::Char(key),
        };
        let now = model.now;
        next = model.update(Event::Key(KeyEvent::new(code, KeyModifiers::NONE)), now);
    }
    next
}

/// The mesh of `status`'s tests, with one peer more and traffic.
fn busy(after: u64) -> Report {
    let mut report = report();
    report.backend = "ipsec".into();
    report.plaintext = Some(Counters::default());
    let mut peer = report.peers[0].clone();
    peer.node = "ip-10-0-12-34.eu-central-1.compute.internal".into();
    peer.loss = Some(0.125);
    peer.full_size = Some(false);
    peer.round_trip = Some(112.4);
    peer.bytes_in = 0;
    report.peers.push(peer);
    report.peers[0].loss = Some(0.0);
    for (at, peer) in report.peers.iter_mut().take(2).enumerate() {
        let share = after * (at as u64 + 1);
        peer.bytes_in += share * 12_500_000;
        peer.packets_in += share * 9000;
        peer.bytes_out += share * 40_000;
        peer.packets_out += share * 700;
    }
    report
}

/// Two reports two seconds apart, on a terminal of that size.
fn model(width: u16, height: u16) -> Model {
    let mut model = Model::new(PLAIN, Duration::from_secs(1), (width, height));
    model.update(Event::Report(Box::new(busy(0))), Duration::from_secs(1));
    model.update(Event::Report(Box::new(busy(2))), Duration::from_secs(3));
    model
}

fn names(model: &Model) -> Vec<&str> {
    model.shown.iter().map(|at| model.peers()[*at].node.as_str()).collect()
}

#[test]
fn the_list_fits_terminals_of_many_sizes() {
    for (width, height) in [(80, 24), (120, 30), (160, 30), (40, 10)] {
        golden(
            &format!("../top/list-{width}x{height}.txt"),
            &text(&model(width, height), width, height),
        );
    }
}

#[test]
fn the_other_pages_are_as_they_should_be() {
    let mut model = model(80, 24);
    press(&mut model, "n/node-d\n\n");
    assert_eq!(model.page, Page::Peer("node-d".into()));
    golden("../top/detail-80x24.txt", &text(&model, 80, 24));
    press(&mut model, "q\x1b?");
    golden("../top/help-80x30.txt", &text(&model, 80, 30));
    press(&mut model, "qp");
    assert_eq!(model.page, Page::Problems);
    assert!(text(&model, 80, 24).contains("problem     none"));
}

#[test]
fn a_peer_that_has_stopped_answering_is_called_silent_and_stands_above_those_that_answer() {
    let mut model = model(80, 24);
    let mut mesh = busy(3);
    for peer in &mut mesh.peers {
        peer.silent = (peer.node == "node-b").then_some(crate::node::report::Comes::Nothing);
    }
    model.update(Event::Report(Box::new(mesh)), Duration::from_secs(4));
    assert_eq!(names(&model)[..3], ["node-g", "node-f", "node-b"]);
    let shown = text(&model, 80, 24);
    assert!(shown.contains("node-b        silent "), "{shown}");
    assert!(shown.contains(", 1 of them silent\n"), "{shown}");
}

#[test]
fn a_daemon_that_is_away_is_said_and_picked_up_again() {
    let mut model = model(80, 24);
    let why = "no daemon answers at /run/ringmail/control.sock: is ringmail running?\x1b[2J";
    model.update(Event::Away(why.into()), Duration::from_secs(5));
    model.update(Event::Tick, Duration::from_secs(9));
    golden("../top/away-80x24.txt", &text(&model, 80, 24));
    let lines = text(&model, 40, 10);
    assert!(lines.starts_with("AWAY    seen 6 s ago: no daemon"), "{lines}");
    model.update(Event::Report(Box::new(busy(12))), Duration::from_secs(13));
    let lines = text(&model, 80, 24);
    assert!(!lines.contains("AWAY"), "{lines}");
    let rate = model.peer("node-b").unwrap().1.unwrap();
    assert_eq!(rate.bytes_in, 12_500_000.0, "over the ten seconds without an answer");
    let mut nothing = Model::new(PLAIN, Duration::from_secs(1), (80, 24));
    nothing.update(Event::Away(why.into()), Duration::from_secs(1));
    assert!(text(&nothing, 80, 24).contains("nothing seen: no daemon answers"));
}

#[test]
fn each_letter_sorts_and_the_same_again_turns_around() {
    let mut model = model(80, 24);
    let long = "ip-10-0-12-34.eu-central-1.compute.internal";
    assert_eq!(names(&model)[..2], ["node-g", "node-f"], "the worst first");
    press(&mut model, "n");
    assert_eq!((names(&model)[0], names(&model)[5]), (long, "node-g"));
    press(&mut model, "n");
    assert_eq!((names(&model)[0], names(&model)[5]), ("node-g", long));
    for (key, sort, first, last) in [
        ("i", Sort::In, "node-d", "node-g"),
        ("o", Sort::Out, "node-d", "node-g"),
        ("r", Sort::RoundTrip, long, "node-g"),
        ("l", Sort::Loss, "node-d", "node-g"),
        ("e", Sort::Errors, "node-d", "node-g"),
    ] {
        press(&mut model, key);
        assert_eq!(
            (model.sort, names(&model)[0], names(&model)[5]),
            (sort, first, last),
            "{key}"
        );
    }
    press(&mut model, "i");
    press(&mut model, "i");
    assert_eq!(names(&model)[5], "node-g", "what has no rate is last either way");
    assert_ne!(names(&model)[0], "node-d");
}

#[test]
fn filters_narrow_the_list_and_escape_widens_it() {
    let mut model = model(80, 24);
    press(&mut model, "/NODE-");
    assert_eq!(names(&model).len(), 5, "as it is typed");
    assert!(text(&model, 80, 24).ends_with("/NODE-    Enter keeps, Esc drops\n"));
    press(&mut model, "d\n");
    assert_eq!((names(&model), model.typing), (vec!["node-d"], false));
    let lines = text(&model, 80, 24);
    assert!(
        lines.contains("shown   1 of 6, by state, worst first; with \"NODE-d\""),
        "{lines}"
    );
    press(&mut model, "\x1b");
    assert_eq!(names(&model).len(), 6);
    press(&mut model, "/common psk\n");
    assert_eq!(names(&model), ["node-g"], "a reason is looked through too");
    press(&mut model, "\x1bff");
    assert_eq!(
        (model.only, names(&model)),
        (Only::State(State::Refused), vec!["node-g"])
    );
    press(&mut model, "\x1bf");
    assert_eq!(
        names(&model),
        ["node-g", "node-f", "node-e", "node-d"],
        "what is not well"
    );
    press(&mut model, "\x1b/nobody\n");
    assert!(text(&model, 80, 24).contains("no peer is so: Esc shows all"));
    assert_eq!(press(&mut model, "q"), Next::Leave);
}

#[test]
fn the_cursor_stays_on_its_peer_when_the_order_changes_and_at_the_top_when_it_is_there() {
    let mut model = model(80, 24);
    press(&mut model, "nvvv");
    assert_eq!(names(&model)[model.cursor], "node-e");
    press(&mut model, "s");
    assert_eq!(names(&model)[model.cursor], "node-e");
    press(&mut model, "g");
    let mut next = busy(3);
    next.peers.retain(|peer| peer.node != "node-g");
    model.update(Event::Report(Box::new(next)), Duration::from_secs(4));
    assert_eq!((model.cursor, names(&model)[0]), (0, "node-f"));
    press(&mut model, "\n>");
    assert_eq!(model.page, Page::Peer("node-e".into()), "the next in the list");
    let mut next = busy(3);
    next.peers.clear();
    model.update(Event::Report(Box::new(next)), Duration::from_secs(5));
    assert!(text(&model, 80, 24).contains("node-e has no lease any more"));
}

#[test]
fn a_count_that_falls_gives_no_rate() {
    let mut model = model(80, 24);
    let mut next = busy(3);
    next.peers[0].packets_out = 5;
    model.update(Event::Report(Box::new(next)), Duration::from_secs(4));
    assert_eq!(model.peer("node-b").unwrap().1, None);
    assert!(model.peer("node-d").unwrap().1.is_some());
    assert_eq!(
        model.peer("node-g").unwrap().1,
        None,
        "nothing is counted of who is refused"
    );
}

#[test]
fn what_is_wrong_is_in_the_head_and_plaintext_is_counted() {
    let mut model = model(80, 24);
    let mut next = busy(3);
    next.problems = vec!["no lease\x1b[2J yet".into(), "and more".into()];
    next.plaintext = Some(Counters {
        arriving: Tally { packets: 2, bytes: 100 },
        leaving: Tally { packets: 1, bytes: 50 },
    });
    model.update(Event::Report(Box::new(next)), Duration::from_secs(4));
    let lines = text(&model, 80, 24);
    assert!(
        lines.contains("health  plaintext 3, 2 problems (p): no lease\u{fffd}[2J yet\n"),
        "{lines}"
    );
    press(&mut model, "p");
    assert!(text(&model, 80, 24).contains("problem     and more"));
}

#[test]
fn colours_mark_states_and_are_left_out_where_nobody_wants_them() {
    let mut model = model(80, 24);
    let colours = |model: &Model| -> std::collections::BTreeSet<String> {
        drawn(model, 80, 24)
            .content()
            .iter()
            .map(|cell| format!("{:?}", cell.fg))
            .collect()
    };
    assert_eq!(colours(&model), [format!("{:?}", Color::Reset)].into());
    model.style = Style { colour: true };
    let wanted = [Color::Reset, Color::Green, Color::Yellow, Color::Red];
    assert_eq!(colours(&model), wanted.map(|colour| format!("{colour:?}")).into());
}

#[test]
fn numbers_are_short() {
    for (number, wanted) in [
        (0.0, "0"),
        (0.4, "0"),
        (87.2, "87"),
        (1023.4, "1023"),
        (1023.6, "1.0K"),
        (12_500_000.0, "12M"),
        (1_048_000.0, "1023K"),
        (-1.0, "0"),
        (1e300, "many"),
    ] {
        assert_eq!(rows::short(number, 1024.0), wanted, "{number}");
    }
    for number in [
        0.0,
        9.94,
        9.96,
        99.0,
        1234.0,
        1e6,
        99_949.0,
        1e9,
        1e15,
        f64::NAN,
        f64::INFINITY,
    ] {
        assert!(
            rows::short(number, 1000.0).len() <= 5,
            "{}",
            rows::short(number, 1000.0)
        );
        assert!(rows::milliseconds(number).len() <= 5, "{}", rows::milliseconds(number));
    }
    assert_eq!(
        [0.0, 0.001, 0.125, 1.0, 7.0].map(rows::percent),
        ["0%", "<1%", "12%", "100%", "100%"]
    );
}

#[test]
fn who_watches_takes_a_fifth_of_the_daemons_time_at_most() {
    let [tenth, one, two] = [100, 1000, 2000].map(Duration::from_millis);
    assert_eq!(pause_after(one, tenth), Duration::from_millis(900));
    assert_eq!(pause_after(one, two), Duration::from_secs(8));
    assert_eq!(pause_after(one, Duration::from_secs(5)), Duration::from_secs(20));
}

#[test]
fn the_window_follows_the_cursor_and_no_more() {
    assert_eq!(window(0, 0, 5, 3), 0);
    assert_eq!(window(0, 5, 5, 20), 1);
    assert_eq!(window(7, 6, 5, 20), 6);
    assert_eq!(window(7, 9, 5, 20), 7);
    assert_eq!(window(19, 19, 5, 20), 15);
    assert_eq!(window(3, 2, 0, 20), 2);
}

/// 5,000 peers: what follows from a report or a key stays far below what a person notices, even in this build.
#[test]
fn thousands_of_peers_stay_smooth() {
    let mesh = |after: u64| {
        let mut report = busy(after);
        let peers = report.peers.clone();
        report.peers = (0..5000)
            .map(|number| PeerReport {
                node: format!("node-{number:04}"),
                ..peers[number % peers.len()].clone()
            })
            .collect();
        Box::new(report)
    };
    let mut model = Model::new(PLAIN, Duration::from_secs(1), (80, 24));
    model.update(Event::Report(mesh(0)), Duration::from_secs(1));
    // The quickest of three: another program may have the processor meanwhile.
    let quickest = |work: &mut dyn FnMut()| {
        let each = (0..3).map(|_| {
            let began = Instant::now();
            work();
            began.elapsed()
        });
        each.min().unwrap_or_default()
    };
    let reports = (2..5).map(mesh).collect::<Vec<_>>();
    let mut reports = reports.into_iter().zip(2..);
    let report = quickest(&mut || {
        let (report, second) = reports.next().expect("one each");
        model.update(Event::Report(report), Duration::from_secs(second));
    });
    let slowest = |keys: &str, model: &mut Model| {
        let each = keys.chars().map(|key| {
            quickest(&mut || {
                press(model, &key.to_string());
                text(model, 80, 24);
            })
        });
        each.max().unwrap_or_default()
    };
    let keys = slowest("iiorlesnG^^^gvvv", &mut model);
    let pages = slowest("\n>q?pq", &mut model);
    press(&mut model, "/0042\n");
    println!("5,000 peers: a report {report:?}, a key {keys:?}, a page {pages:?}");
    assert_eq!(names(&model), ["node-0042"]);
    for time in [report, keys, pages] {
        assert!(time < Duration::from_secs(1), "{time:?}");
    }
}

fn any_peer() -> impl Strategy<Value = PeerReport> {
    let states = [
        State::Up,
        State::Moving,
        State::Kept,
        State::Waiting,
        State::Plain,
        State::Refused,
    ];
    let texts = (
        ".{0,20}",
        proptest::option::of(".{0,60}"),
        proptest::option::of(".{0,30}"),
    );
    let numbers = (
        any::<[u64; 5]>(),
        proptest::option::of(any::<f64>()),
        proptest::option::of(any::<f64>()),
    );
    (texts, numbers, proptest::sample::select(states.to_vec())).prop_map(
        |((node, reason, generation), (counts, time, share), state)| PeerReport {
            node,
            state,
            reason,
            generation,
            heard: time,
            round_trip: time,
            loss: share,
            bytes_out: counts[0],
            bytes_in: counts[1],
            packets_out: counts[2],
            packets_in: counts[3],
            errors: counts[4],
            ..report().peers[0].clone()
        },
    )
}

fn any_event() -> impl Strategy<Value = Event> {
    let key = prop_oneof![
        4 => any::<char>().prop_map(KeyCode::Char),
        8 => proptest::sample::select("qsniorlepfghGjk?/ ".chars().collect::<Vec<_>>()).prop_map(KeyCode::Char),
        8 => proptest::sample::select(vec![
            KeyCode::Enter, KeyCode::Esc, KeyCode::Backspace, KeyCode::Up, KeyCode::Down, KeyCode::Left, KeyCode::Right,
            KeyCode::PageUp, KeyCode::PageDown, KeyCode::Home, KeyCode::End, KeyCode::Tab, KeyCode::F(1),
        ]),
    ];
    let modifiers = any::<u8>().prop_map(KeyModifiers::from_bits_truncate);
    let modifiers = prop_oneof![4 => Just(KeyModifiers::NONE), 1 => modifiers];
    prop_oneof![
        12 => (key, modifiers).prop_map(|(code, modifiers)| Event::Key(KeyEvent::new(code, modifiers))),
        2 => (0_u16..200, 0_u16..60).prop_map(|(width, height)| Event::Resized(width, height)),
        3 => (proptest::collection::vec(any_peer(), 0..30), any::<bool>(), ".{0,40}").prop_map(|(peers, wrong, text)| {
            let mut report = busy(0);
            report.peers = peers;
            report.node = text.clone();
            if wrong {
                report.problems = vec![text.clone(); 3];
                report.cipher = text;
                (report.epoch, report.epoch_age) = (None, Some(u64::MAX));
            }
            Event::Report(Box::new(report))
        }),
        1 => ".{0,80}".prop_map(Event::Away),
        1 => Just(Event::Tick),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Also on a terminal whose size it has not heard of yet.
    #[test]
    fn no_key_and_no_report_makes_it_fall_over(
        events in proptest::collection::vec((any_event(), 0_u64..5000), 1..40),
        (width, height) in (0_u16..140, 0_u16..40),
    ) {
        let mut model = Model::new(Style { colour: true }, Duration::from_secs(1), (width, height));
        let mut now = Duration::ZERO;
        for (event, later) in events {
            now += Duration::from_millis(later);
            model.update(event, now);
            prop_assert!(model.cursor < model.shown.len().max(1));
            if width > 0 && height > 0 {
                drawn(&model, width, height);
            }
        }
    }
}
