//! Network namespaces for tests; all is gone with the last descriptor of one.

use std::fs::File;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::process::Command;
use std::thread;

use nix::sched::{CloneFlags, setns, unshare};

/// A network namespace.
pub(crate) struct Namespace(pub(crate) File);

impl Namespace {
    pub(crate) fn new() -> Self {
        let make = || {
            unshare(CloneFlags::CLONE_NEWNET).expect("root makes a network namespace");
            File::open("/proc/thread-self/ns/net").expect("the namespace")
        };
        Self(thread::spawn(make).join().expect("a namespace"))
    }

    /// Runs `work` in it, on a thread of its own.
    pub(crate) fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let inside = || {
            setns(self.0.as_fd(), CloneFlags::CLONE_NEWNET).expect("enter the namespace");
            work()
        };
        thread::scope(|scope| {
            scope
                .spawn(inside)
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// A command that must do well; what it prints.
    pub(crate) fn command(&self, line: &str) -> String {
        let (good, text) = self.try_command(line);
        assert!(good, "{line}: {text}");
        text
    }

    /// Whether a command does well, and what it prints.
    pub(crate) fn try_command(&self, line: &str) -> (bool, String) {
        self.run(|| {
            let mut words = line.split_whitespace();
            let done = Command::new(words.next().expect("a command"))
                .args(words)
                .output()
                .expect(line);
            let text = [done.stdout, done.stderr].concat();
            (done.status.success(), String::from_utf8_lossy(&text).into_owned())
        })
    }

    /// Where a program finds it while this process is there.
    pub(crate) fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }
}
