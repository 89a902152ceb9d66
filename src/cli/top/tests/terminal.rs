//! However it ends, the terminal is given back: shown on one of its own, that `script` makes.

use std::process::{Command, Stdio};
use std::sync::mpsc;

use crate::cli::Failure;
use crate::cli::top::model::Event;
use crate::cli::top::{bring, on_screen};

/// Tells the test that it is the one in the terminal, and who falls there.
const FALLS: &str = "RINGMAIL_TEST_FALLS";

/// Draws, and then ends as `who` has it.
fn end(who: &str) -> Result<(), Failure> {
    on_screen(|terminal| {
        terminal.draw(|_| {}).expect("drawn");
        match who {
            "nobody" => Ok(()),
            "itself" => panic!("it was made to fall"),
            _ => {
                let (sender, events) = mpsc::channel();
                bring(&sender, |_| panic!("it was made to fall"));
                drop(sender);
                match events.recv() {
                    Ok(Event::Leave) => Ok(()),
                    other => panic!("the end of a thread brings {other:?}"),
                }
            }
        }
    })
}

#[test]
fn who_falls_gives_the_terminal_back_before_anything_is_said_of_it() {
    if let Some(who) = std::env::var_os(FALLS) {
        end(&who.to_string_lossy()).unwrap_or_else(|failure| panic!("{failure}"));
        return;
    }
    let program = std::env::current_exe().expect("this program");
    let test = "cli::top::tests::terminal::who_falls_gives_the_terminal_back_before_anything_is_said_of_it";
    for (who, result) in [("nobody", "ok"), ("itself", "FAILED"), ("a thread", "ok")] {
        let end = format!("{FALLS}='{who}' {} --exact {test} --nocapture", program.display());
        let seen = Command::new("script")
            .args([
                "-qec",
                &format!("echo settings $(stty -g); {end}; echo settings $(stty -g)"),
                "/dev/null",
            ])
            .env("RUST_BACKTRACE", "0")
            .stdin(Stdio::null())
            .output();
        let seen = String::from_utf8_lossy(&seen.expect("script of bsdutils is installed").stdout).into_owned();
        let first = |what: &str| {
            seen.find(what)
                .unwrap_or_else(|| panic!("{who}: no {what:?} in {seen:?}"))
        };
        let last = |what: &str| {
            seen.rfind(what)
                .unwrap_or_else(|| panic!("{who}: no {what:?} in {seen:?}"))
        };
        let (taken, back) = (last("\x1b[?1049h"), first("\x1b[?1049l"));
        assert!(taken < back, "{who}: {seen:?}");
        assert!(
            last("\x1b[?25l") < last("\x1b[?25h"),
            "{who}: there is no cursor: {seen:?}"
        );
        let settings: Vec<&str> = seen.lines().filter(|line| line.starts_with("settings ")).collect();
        assert_eq!(settings.len(), 2, "{who}: {seen:?}");
        assert_eq!(
            settings[0], settings[1],
            "{who}: what is typed is to be seen again: {seen:?}"
        );
        assert!(seen.contains(&format!("test result: {result}")), "{who}: {seen:?}");
        if who != "nobody" {
            assert!(
                back < first("it was made to fall"),
                "{who}: what is said is to stay: {seen:?}"
            );
        }
    }
}
