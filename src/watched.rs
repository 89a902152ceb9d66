//! A file or folder that changes by replacement: an editor, `mv` and Kubernetes all put a new one in the old one's place,
//! so the folders are watched, not the file. Where inotify shows nothing (a network file system, no watches left), the
//! reader's slow timer does.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsFd as _, AsRawFd, RawFd};
use std::path::Path;

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Returns when something changed that may concern what is watched; never where nothing is.
pub(crate) async fn changed(watched: Option<&Watched>) {
    match watched {
        Some(watched) => watched.changed().await,
        None => std::future::pending().await,
    }
}

/// The folders that a path leads through.
pub(crate) struct Watched {
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
    /// Watches what `path` leads to now. To be called in a tokio runtime; `None` where inotify can't be used, for want of
    /// descriptors or watches.
    pub(crate) fn new(path: &Path) -> Option<Self> {
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
                // Nothing more can be told apart: read again and make new watches.
                Err(_) => return,
            }
        }
    }

    fn matters(&self, event: &InotifyEvent) -> bool {
        let Some(name) = event.name.as_deref() else { return true };
        // The link that Kubernetes swaps to replace the content of a Secret or ConfigMap.
        let swap = name == OsStr::new("..data");
        self.folders
            .iter()
            .any(|(folder, only)| *folder == event.wd && (swap || only.as_deref().is_none_or(|only| only == name)))
    }
}
