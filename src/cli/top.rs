//! `ringmail top`: the peers as they are now, in a terminal, until `q`.
//!
//! [`model`] is pure: keys and reports go in, and [`view`] says what the screen shows of it. Here are the threads that
//! bring keys, reports and signals, and the terminal, which is given back as it was however this ends.

mod model;
mod pages;
mod rows;
#[cfg(test)]
mod tests;
mod view;

use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use nix::sys::signal::{SigSet, Signal};
use ratatui::crossterm::event::{self, Event as Input};

use super::status::{self, Fetched};
use super::table::Style;
use super::{Failure, Shown, interval};
use model::{Event, Model, Next};

/// Watch the peers in the terminal: rates, round trips, loss, errors.
#[derive(Debug, Args)]
#[command(after_help = "\
Keys: q quits, the arrows move, Enter shows all of one peer, / filters by text, f by state, and a letter sorts; ? lists
them. The columns that fit are shown; 80 hold all that matters. NO_COLOR=1 leaves colours out.

Examples:
  ringmail top
  ringmail top --interval 5s")]
pub struct Arguments {
    /// The daemon's folder.
    #[arg(long, value_name = "DIR", default_value = crate::admin::RUN_DIR)]
    run_dir: PathBuf,
    /// How often to ask the daemon: 200ms to 1m.
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = often)]
    interval: Duration,
}

fn often(text: &str) -> Result<Duration, String> {
    interval::parse(text, Duration::from_millis(200), Duration::from_secs(60))
}

/// So long nothing may happen before what depends on the time alone is drawn anew.
const TICK: Duration = Duration::from_secs(1);

pub(super) fn run(arguments: &Arguments, style: Style) -> Result<Shown, Failure> {
    let Arguments { run_dir, interval } = arguments;
    let dumb = std::env::var_os("TERM").is_none_or(|term| term.is_empty() || term == "dumb");
    if dumb || !std::io::stdin().is_terminal() || !std::io::stdout().is_terminal() {
        return Err(Failure::usage(anyhow::anyhow!(
            "top needs a terminal that it can draw on: use `ringmail status --watch`, or `ringmail status --json`"
        )));
    }
    // What no waiting mends is better read where it stays.
    let first = status::look(run_dir)?;
    let ending = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP]);
    // Before any thread is there: all inherit it, and only the one that waits for them gets them.
    ending.thread_block().map_err(Failure::other)?;
    on_screen(|terminal| watch(terminal, first, run_dir, *interval, style, ending))?;
    Ok(Shown::from(String::new()))
}

/// Gives `work` the terminal, and takes it back as it was. Where `work` falls, or another thread meanwhile, ratatui's panic
/// hook has done so before anything is said of that.
fn on_screen(work: impl FnOnce(&mut ratatui::DefaultTerminal) -> Result<(), Failure>) -> Result<(), Failure> {
    let mut terminal = ratatui::try_init().map_err(refused)?;
    let shown = work(&mut terminal);
    let restored = ratatui::try_restore().map_err(refused);
    drop(terminal);
    shown.and(restored)
}

fn refused(error: std::io::Error) -> Failure {
    Failure::other(anyhow::Error::from(error).context("draw on the terminal"))
}

/// Shows what comes until someone wants to leave.
fn watch(
    terminal: &mut ratatui::DefaultTerminal,
    first: Fetched,
    run_dir: &Path,
    interval: Duration,
    style: Style,
    ending: SigSet,
) -> Result<(), Failure> {
    let began = Instant::now();
    let size = terminal.size().map_err(refused)?;
    let mut model = Model::new(style, interval, (size.width, size.height));
    let _ = model.update(Event::of(first), began.elapsed());
    let (sender, events) = mpsc::channel();
    bring(&sender, move |sender| {
        let _ = ending.wait();
        let _ = sender.send(Event::Leave);
    });
    bring(&sender, type_in);
    let folder = run_dir.to_owned();
    bring(&sender, move |sender| ask(&folder, interval, sender));
    loop {
        let draw = terminal.draw(|frame| view::render(&model, frame.area(), frame.buffer_mut()));
        draw.map_err(refused)?;
        let mut next = match events.recv_timeout(TICK) {
            Ok(event) => Some(event),
            Err(RecvTimeoutError::Timeout) => Some(Event::Tick),
            Err(RecvTimeoutError::Disconnected) => return Ok(()),
        };
        // All that has come is drawn once.
        while let Some(event) = next {
            if model.update(event, began.elapsed()) == Next::Leave {
                return Ok(());
            }
            next = events.try_recv().ok();
        }
    }
}

/// Has a thread bring events. One that panics ends the whole.
fn bring(sender: &Sender<Event>, work: impl FnOnce(&Sender<Event>) + Send + 'static) {
    struct Fallen(Sender<Event>);
    impl Drop for Fallen {
        fn drop(&mut self) {
            if thread::panicking() {
                let _ = self.0.send(Event::Leave);
            }
        }
    }
    let fallen = Fallen(sender.clone());
    thread::spawn(move || work(&fallen.0));
}

/// What is typed, and the terminal's size, until there is no terminal any more.
fn type_in(sender: &Sender<Event>) {
    loop {
        let event = match event::read() {
            Ok(Input::Key(key)) => Event::Key(key),
            Ok(Input::Resize(width, height)) => Event::Resized(width, height),
            Ok(_) => continue,
            Err(_) => Event::Leave,
        };
        let last = matches!(event, Event::Leave);
        if sender.send(event).is_err() || last {
            return;
        }
    }
}

/// What the daemon says, again and again.
fn ask(run_dir: &Path, interval: Duration, sender: &Sender<Event>) {
    let mut pause = interval;
    loop {
        thread::sleep(pause);
        let asked = Instant::now();
        let fetched = status::look(run_dir).unwrap_or_else(|failure| Fetched::Away(failure.to_string()));
        pause = pause_after(interval, asked.elapsed());
        if sender.send(Event::of(fetched)).is_err() {
            return;
        }
    }
}

/// How long to wait after an answer that `took` so long: who watches takes a fifth of the daemon's time at most.
fn pause_after(interval: Duration, took: Duration) -> Duration {
    interval.saturating_sub(took).max(took.saturating_mul(4))
}
