//! What the process gives up before it holds any secret.

use nix::sys::prctl::set_dumpable;
use nix::sys::resource::{Resource, setrlimit};

use super::Failure;

/// Keeps keys out of core files and away from other processes of this user: not dumpable, so no core, no ptrace, and
/// /proc/self/mem is root's alone; and a core size of 0, which children inherit.
pub fn harden() -> Result<(), Failure> {
    let refused =
        |what: &'static str| move |errno: nix::Error| Failure::other(anyhow::Error::from(errno).context(what));
    set_dumpable(false).map_err(refused("forbid core dumps (PR_SET_DUMPABLE)"))?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(refused("forbid core files (RLIMIT_CORE)"))
}
