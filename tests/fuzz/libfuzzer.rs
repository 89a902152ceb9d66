//! The target that the variable TARGET names, under libFuzzer.

#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;

mod targets;

static CHOSEN: LazyLock<targets::Target> = LazyLock::new(|| {
    let name = std::env::var("TARGET").unwrap_or_default();
    let found = targets::ALL.iter().find(|(target, _)| *target == name);
    let all = targets::ALL.map(|(target, _)| target).join(" ");
    found.unwrap_or_else(|| panic!("TARGET={name:?}: it is one of {all}")).1
});

fuzz_target!(|data: &[u8]| CHOSEN(data));
