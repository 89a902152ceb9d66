//! What is fuzzed: each target takes any bytes, and panics where something is wrong.

mod doctor;
mod leases;
mod netconf;
mod probes;
mod statements;
mod tunnel;

/// A target.
pub(crate) type Target = fn(&[u8]);

/// All of them, by their names.
pub(crate) const ALL: [(&str, Target); 6] = [
    ("doctor", doctor::run),
    ("leases", leases::run),
    ("netconf", netconf::run),
    ("probes", probes::run),
    ("statements", statements::run),
    ("tunnel", tunnel::run),
];
