//! What the operator asked for: flags and environment ([`flags`]), and flannel's net-conf.json ([`netconf`]).
//!
//! Everything is parsed once, here, into types that can't be wrong; inside the daemon nothing is checked again. A wrong
//! value is an error that names the key or flag, the value and what would be right; what is merely odd is a warning text.
//! The one thing to know: nothing here falls back to an unencrypted mode. Without a `Backend` there is ipsec or an error.

pub mod backend;
mod conf_error;
pub mod flags;
mod go_style;
mod json;
pub mod netconf;
mod plain;
pub mod report;
pub mod subnet_env;
#[cfg(test)]
mod tests;

pub use backend::{Backend, Ipsec, NotInThisVersion, PskSource, Tuning, UnencryptedType};
pub use conf_error::{ConfError, Rule};
pub use flags::{Environment, Flags, Store, Wanted};
pub use go_style::{UsageError, normalise, odd_variables};
pub use netconf::{Context, NetConf, Overlap, check_overlap};
pub use subnet_env::SubnetEnv;
