//! Which files of a store folder changed, as inotify tells it.
//!
//! What inotify does not tell is part of the contract here: lost events and the end of the watch ask for the whole
//! folder. A mount over the folder, a renamed parent and changes made by other machines come without any event; the
//! reader's slow timer finds those.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::Path;

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tracing::warn;

use super::folder::{CONFIG, is_entry};

/// How much of the folder to look at.
#[derive(Debug)]
pub(super) enum Scope {
    /// These files.
    Files(BTreeSet<OsString>),
    /// The whole folder, which may be another one by now.
    All,
}

/// The folder's inotify watch. Without one (no instance or watch is left, the folder is missing) it stays silent.
#[derive(Debug)]
pub(super) struct FolderWatch {
    inotify: Option<AsyncFd<Descriptor>>,
    watched: Option<WatchDescriptor>,
}

/// An inotify instance as tokio wants to have it.
#[derive(Debug)]
struct Descriptor(Inotify);

impl AsRawFd for Descriptor {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl FolderWatch {
    /// A watch that is not attached yet; to be called in a tokio runtime.
    pub(super) fn new() -> Self {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK);
        let inotify = inotify.map_err(std::io::Error::from).and_then(|inotify| {
            // SAFETY: the descriptor is open and owned by the `Inotify`, which the `AsyncFd` owns and never swaps.
            let registered = unsafe { AsyncFd::register_with_interest(Descriptor(inotify), Interest::READABLE) };
            Ok(registered?)
        });
        let inotify = inotify
            .inspect_err(|error| {
                warn!(%error, "no inotify: going through the store folder every second; raise fs.inotify.max_user_instances");
            })
            .ok();
        Self { inotify, watched: None }
    }

    /// Whether changes are reported.
    pub(super) fn is_attached(&self) -> bool {
        self.watched.is_some()
    }

    /// Watches what is at `path` now, and nothing else.
    pub(super) fn attach(&mut self, path: &Path) {
        let Some(inotify) = &self.inotify else { return };
        // A file counts when it is complete (closed, moved, linked), or when its rights change. A file that is created
        // empty and written later is looked at twice, and doubted in between.
        let flags = AddWatchFlags::IN_CLOSE_WRITE
            | AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_MOVE
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_ATTRIB
            | AddWatchFlags::IN_DELETE_SELF
            | AddWatchFlags::IN_MOVE_SELF
            | AddWatchFlags::IN_ONLYDIR;
        // The kernel returns the descriptor it has for the same folder, so the old one goes after the new one is there.
        let attached = inotify.get_ref().0.add_watch(path, flags);
        if let Some(before) = self.watched.filter(|before| attached != Ok(*before)) {
            // Gone already, where its folder is.
            let _ = inotify.get_ref().0.rm_watch(before);
        }
        if attached == Err(Errno::ENOSPC) && self.watched.is_some() {
            warn!(
                "no inotify watch is left: going through the store folder every second; raise fs.inotify.max_user_watches"
            );
        }
        self.watched = attached.ok();
    }

    /// Waits for changes and names them.
    pub(super) async fn changes(&mut self) -> Scope {
        let Some(inotify) = &self.inotify else {
            return std::future::pending().await;
        };
        loop {
            let Ok(mut ready) = inotify.readable().await else {
                return std::future::pending().await;
            };
            match ready.try_io(|inotify| Ok(inotify.get_ref().0.read_events()?)) {
                Ok(Ok(events)) => {
                    if let Some(scope) = scope(&events, self.watched) {
                        return scope;
                    }
                }
                // A read that fails for good loses events.
                Ok(Err(_)) => return Scope::All,
                Err(_would_block) => {}
            }
        }
    }
}

/// How much to look at after `events`; `None` where none of them matters.
fn scope(events: &[InotifyEvent], watched: Option<WatchDescriptor>) -> Option<Scope> {
    let lost = AddWatchFlags::IN_Q_OVERFLOW;
    let replaced = AddWatchFlags::IN_DELETE_SELF
        | AddWatchFlags::IN_MOVE_SELF
        | AddWatchFlags::IN_UNMOUNT
        | AddWatchFlags::IN_IGNORED;
    let mut names = BTreeSet::new();
    for InotifyEvent {
        wd,
        mask,
        cookie: _,
        name,
    } in events
    {
        if mask.intersects(lost) || (watched == Some(*wd) && mask.intersects(replaced)) {
            return Some(Scope::All);
        }
        match name {
            // Kubernetes changes a mounted volume by turning this link, on which every file hangs.
            Some(name) if name == "..data" => return Some(Scope::All),
            Some(name) if is_entry(name) || name == CONFIG => {
                names.insert(name.clone());
            }
            Some(_) | None => {}
        }
    }
    (!names.is_empty()).then_some(Scope::Files(names))
}
