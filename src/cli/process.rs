//! What the process gives up before it holds any secret.

use nix::sys::prctl::set_dumpable;
use nix::sys::resource::{Resource, setrlimit};

use super::Failure;

/// Has the C library give memory back: one arena for all threads, since only a start keeps two of them busy, and a mapping
/// of its own for each large buffer, however many there were before. Of 5,000 peers' memory that is a tenth.
pub fn save_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt(3) takes two integers, and refuses what it does not know.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 128 << 10);
    }
}

/// Keeps keys out of core files and away from other processes of this user: not dumpable, so no core, no ptrace, and
/// /proc/self/mem is root's alone; and a core size of 0, which children inherit.
pub fn harden() -> Result<(), Failure> {
    let refused =
        |what: &'static str| move |errno: nix::Error| Failure::other(anyhow::Error::from(errno).context(what));
    set_dumpable(false).map_err(refused("forbid core dumps (PR_SET_DUMPABLE)"))?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(refused("forbid core files (RLIMIT_CORE)"))
}
