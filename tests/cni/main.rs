//! The CNI plugin as a runtime calls it: against what flannel's plugin was measured to do, with delegates that fail, and
//! with Debian's plugins in network namespaces.

mod attach;
mod faults;
mod golden;
#[path = "../namespace/mod.rs"]
mod namespace;
mod rig;
