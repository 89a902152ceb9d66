//! What the workers and the owner of a tunnel share: routes, counters, state.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;

use super::counters::{Cell, Counters, Offload, Offloads};
use super::{Routes, State};

/// Shared by all workers of a tunnel and its owner.
#[derive(Debug)]
pub(super) struct Shared {
    /// The newest routes; held only for as long as it takes to clone or replace the `Arc`.
    routes: Mutex<Arc<Routes>>,
    /// Counts replacements, so that a worker asks for the lock only after one.
    version: AtomicU64,
    /// One a worker, so that no two threads write to one cache line.
    pub(super) cells: Vec<Cell>,
    offloads: Mutex<Offloads>,
    pub(super) state: watch::Sender<State>,
}

/// A worker's own view of the routes.
#[derive(Debug)]
pub(super) struct View {
    version: u64,
    pub(super) routes: Arc<Routes>,
}

impl Shared {
    pub(super) fn new(workers: usize, offloads: Offloads) -> Self {
        Self {
            routes: Mutex::new(Arc::new(Routes::default())),
            version: AtomicU64::new(0),
            cells: (0..workers).map(|_| Cell::default()).collect(),
            offloads: Mutex::new(offloads),
            state: watch::Sender::new(State::Running),
        }
    }

    pub(super) fn set_routes(&self, routes: Routes) {
        let routes = Arc::new(routes);
        let old = {
            let mut held = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
            // Under the lock, so that whoever sees the new number finds the new routes.
            self.version.fetch_add(1, Ordering::Release);
            std::mem::replace(&mut *held, routes)
        };
        // A large table is freed outside the lock.
        drop(old);
    }

    pub(super) fn view(&self) -> View {
        let held = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        View {
            version: self.version.load(Ordering::Acquire),
            routes: held.clone(),
        }
    }

    /// Brings a view up to date: one load of an atomic where nothing has changed.
    pub(super) fn refresh(&self, view: &mut View) -> bool {
        let stale = self.version.load(Ordering::Acquire) != view.version;
        if stale {
            *view = self.view();
        }
        stale
    }

    /// Says that the tunnel has ended; the first reason stays.
    pub(super) fn end(&self, state: State) {
        self.state.send_if_modified(|held| {
            let first = *held == State::Running;
            if first {
                *held = state;
            }
            first
        });
    }

    pub(super) fn ended(&self) -> bool {
        *self.state.borrow() != State::Running
    }

    /// Notes that an offload is no longer used, or is again.
    pub(super) fn note_udp_segment(&self, offload: Offload) {
        self.offloads.lock().unwrap_or_else(PoisonError::into_inner).udp_segment = offload;
    }

    /// Notes that the device refused large packets of this kind.
    pub(super) fn note_coalescing(&self, udp: bool, offload: Offload) {
        let mut held = self.offloads.lock().unwrap_or_else(PoisonError::into_inner);
        if udp {
            held.udp_coalescing = offload;
        } else {
            held.tcp_coalescing = offload;
        }
    }

    pub(super) fn counters(&self) -> Counters {
        let mut sum = Counters {
            offloads: self.offloads.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            ..Counters::default()
        };
        for cell in &self.cells {
            cell.add_to(&mut sum);
        }
        sum
    }
}
