//! net-conf.json and subnet.env: any text is a configuration or an error, with and without a PSK file, and never a panic.

use std::path::Path;

use ringmail::config::subnet_env::previous_in;
use ringmail::config::{Context, NetConf};
use ringmail::lease::Subnets;

pub(crate) fn run(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    for psk_file in [None, Some(Path::new("/etc/ringmail/psk"))] {
        let context = Context {
            file: "net-conf.json",
            psk_file,
            psk_secret: None,
        };
        match NetConf::parse(text, &context) {
            Ok(conf) => {
                // What was taken can be counted in: the first and the last subnet are there and are told by their slot.
                let slots = conf.network.slots();
                for number in [*slots.start(), *slots.end()] {
                    let slot = keys::Slot::new(number).expect("slots() gives slots");
                    let subnets = conf.network.subnets(slot).expect("a slot has subnets");
                    assert_eq!(conf.network.slot(&subnets).expect("subnets have a slot"), slot);
                }
                drop(conf.backend.served().map(|backend| format!("{backend:?}")));
            }
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    }
    let _: Subnets = previous_in(text);
}
