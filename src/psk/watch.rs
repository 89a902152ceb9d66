//! Following the keys' file or folder as it changes.
//!
//! The folders are watched, not the file: an editor, `mv` and Kubernetes all put a new file in the old one's place. Where
//! inotify shows nothing (a network file system, no watches left), a slow re-read does.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd as _, AsRawFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch as channel;
use tokio::task::spawn_blocking;
use tokio::time::{sleep, timeout};

use super::{PskError, PskSet, load};

/// The keys in use, and why a newer state of the file is not.
#[derive(Clone, Debug)]
pub struct Held {
    /// The last good set; `None` until there is one.
    pub set: Option<Arc<PskSet>>,
    /// Why the file can't be used as it is now; the set above stays in use.
    pub error: Option<PskError>,
}

impl Held {
    fn after(&self, read: Result<PskSet, PskError>) -> Self {
        match read {
            Ok(set) => Self {
                set: Some(Arc::new(set)),
                error: None,
            },
            Err(error) => Self {
                set: self.set.clone(),
                error: Some(error),
            },
        }
    }

    fn says_the_same(&self, other: &Self) -> bool {
        let text = |held: &Self| held.error.as_ref().map(ToString::to_string);
        self.set == other.set && text(self) == text(other)
    }
}

/// How long the file is left to settle after a change: a writer takes several steps.
const SETTLE: Duration = Duration::from_millis(50);

/// Reads the keys at `path` now, and again whenever it changes and every `reread` (60 s is a good value).
///
/// The receiver holds the first reading at once. A change is published when it makes a difference, and no sooner. The
/// task ends when the last receiver is gone. Must be called within a tokio runtime with I/O and time.
pub fn watch(path: PathBuf, network: String, reread: Duration) -> channel::Receiver<Held> {
    // Watched before read: a change between the two is then seen.
    let watched = Watched::new(&path);
    let first = Held { set: None, error: None }.after(load(&path, &network));
    let (sender, receiver) = channel::channel(first);
    tokio::spawn(follow(path, network, reread, sender, watched));
    receiver
}

async fn follow(
    path: PathBuf,
    network: String,
    reread: Duration,
    sender: channel::Sender<Held>,
    mut watched: Option<Watched>,
) {
    loop {
        tokio::select! {
            () = sender.closed() => return,
            _ = timeout(reread, changed(watched.as_ref())) => {}
        }
        sleep(SETTLE).await;
        // Watches are made anew each time: what a path leads to may be another folder now.
        let (path, network) = (path.clone(), network.clone());
        let read = spawn_blocking(move || (Watched::new(&path), load(&path, &network)));
        let Ok((now_watched, read)) = read.await else { return };
        watched = now_watched;
        sender.send_if_modified(|held| {
            let next = held.after(read);
            let differs = !held.says_the_same(&next);
            if differs {
                *held = next;
            }
            differs
        });
    }
}

/// Returns when something changed that may concern the keys.
async fn changed(watched: Option<&Watched>) {
    match watched {
        Some(watched) => watched.changed().await,
        None => std::future::pending().await,
    }
}

/// The folders that the keys' path leads through.
struct Watched {
    events: AsyncFd<Descriptor>,
    /// Each folder, and the one name in it that matters, where not all do.
    folders: Vec<(WatchDescriptor, Option<OsString>)>,
}

struct Descriptor(Inotify);

impl AsRawFd for Descriptor {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl Watched {
    /// `None` where inotify can't be used, for want of descriptors or watches.
    fn new(path: &Path) -> Option<Self> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).ok()?;
        let mask = AddWatchFlags::IN_CLOSE_WRITE
            | AddWatchFlags::IN_CREATE
            | AddWatchFlags::IN_DELETE
            | AddWatchFlags::IN_MOVE
            | AddWatchFlags::IN_ATTRIB
            | AddWatchFlags::IN_DELETE_SELF
            | AddWatchFlags::IN_MOVE_SELF
            | AddWatchFlags::IN_ONLYDIR;
        let mut folders = Vec::new();
        let real = path.canonicalize().ok();
        for path in [Some(path), real.as_deref()].into_iter().flatten() {
            if let Ok(watch) = inotify.add_watch(path, mask) {
                folders.push((watch, None));
            }
            let parent = path
                .parent()
                .map(|p| if p.as_os_str().is_empty() { Path::new(".") } else { p });
            let (Some(parent), Some(name)) = (parent, path.file_name()) else {
                continue;
            };
            if let Ok(watch) = inotify.add_watch(parent, mask) {
                folders.push((watch, Some(name.to_owned())));
            }
        }
        // SAFETY: the Descriptor owns its open file descriptor, and neither replaces nor closes it before it is dropped.
        let events = unsafe { AsyncFd::register_with_interest(Descriptor(inotify), Interest::READABLE) };
        Some(Self {
            events: events.ok()?,
            folders,
        })
    }

    async fn changed(&self) {
        loop {
            let Ok(mut ready) = self.events.readable().await else {
                return std::future::pending().await;
            };
            match self.events.get_ref().0.read_events() {
                Ok(events) if events.iter().any(|event| self.matters(event)) => return,
                Ok(_) => {}
                Err(nix::errno::Errno::EAGAIN) => ready.clear_ready(),
                // Nothing more can be told apart: read the keys and make new watches.
                Err(_) => return,
            }
        }
    }

    fn matters(&self, event: &InotifyEvent) -> bool {
        let Some(name) = event.name.as_deref() else { return true };
        // The link that Kubernetes swaps to replace a Secret's content.
        let swap = name == OsStr::new("..data");
        self.folders
            .iter()
            .any(|(folder, only)| *folder == event.wd && (swap || only.as_deref().is_none_or(|only| only == name)))
    }
}
