//! subnet.env: text, modes, atomic and sparing writes, and reading it back.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

use proptest::prelude::*;

use crate::config::subnet_env::{SubnetEnv, Written, previous, previous_in};
use crate::lease::Subnets;
use crate::testing::Folder;

fn env(dual: bool) -> SubnetEnv {
    let six = r#""EnableIPv6": true, "IPv6Network": "2001:cafe:42::/56","#;
    let json = format!(r#"{{{} "Network": "10.42.0.0/16"}}"#, if dual { six } else { "" });
    let network = super::good(&json).network;
    let subnets = network.subnets(keys::Slot::new(1).unwrap()).unwrap();
    SubnetEnv {
        network,
        subnets,
        mtu: 1450,
        ip_masq: true,
    }
}

#[test]
fn the_text_is_flannels() {
    assert_eq!(
        env(true).text(),
        "FLANNEL_NETWORK=10.42.0.0/16\nFLANNEL_SUBNET=10.42.1.1/24\nFLANNEL_IPV6_NETWORK=2001:cafe:42::/56\n\
         FLANNEL_IPV6_SUBNET=2001:cafe:42:1::1/64\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
    );
    assert_eq!(
        SubnetEnv {
            ip_masq: false,
            ..env(false)
        }
        .text(),
        "FLANNEL_NETWORK=10.42.0.0/16\nFLANNEL_SUBNET=10.42.1.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n"
    );
}

#[test]
fn it_is_written_by_rename_with_flannels_modes_and_only_where_it_changes() {
    let folder = Folder::new();
    let path = folder.join("flannel/subnet.env");
    assert_eq!(env(true).write(&path).unwrap(), Written::New);
    let about = fs::metadata(&path).unwrap();
    assert_eq!(about.permissions().mode() & 0o777, 0o644);
    assert_eq!(
        fs::metadata(path.parent().unwrap()).unwrap().permissions().mode() & 0o777,
        0o755
    );
    assert_eq!(env(true).write(&path).unwrap(), Written::Unchanged);
    assert_eq!(
        fs::metadata(&path).unwrap().ino(),
        about.ino(),
        "an unchanged file is left alone"
    );
    assert_eq!(SubnetEnv { mtu: 1400, ..env(true) }.write(&path).unwrap(), Written::New);
    assert_ne!(
        fs::metadata(&path).unwrap().ino(),
        about.ino(),
        "a change comes as a new file"
    );
    assert_eq!(
        fs::read_dir(path.parent().unwrap()).unwrap().count(),
        1,
        "nothing is left beside it"
    );
    assert_eq!(previous(&path), env(true).subnets);
}

#[test]
fn a_place_that_cant_be_written_is_named_and_the_old_text_stays() {
    let folder = Folder::new();
    fs::write(folder.join("file"), "x").unwrap();
    let path = folder.join("file/subnet.env");
    let error = env(false).write(&path).unwrap_err();
    assert!(
        error.to_string().starts_with(&format!("write {}: ", path.display())),
        "{error}"
    );
    assert!(std::error::Error::source(&error).is_some());
    fs::create_dir(folder.join("subnet.env")).unwrap();
    env(false).write(&folder.join("subnet.env")).unwrap_err();
    assert_eq!(
        fs::read_dir(folder.path()).unwrap().count(),
        2,
        "the temporary file is gone"
    );
}

#[test]
fn the_previous_subnets_are_read_leniently() {
    let of = |text: &str| previous_in(text).to_string();
    assert_eq!(
        of("FLANNEL_SUBNET=10.42.1.1/24\nFLANNEL_IPV6_SUBNET=fd00::1/64\n"),
        "10.42.1.0/24 fd00::/64"
    );
    assert_eq!(
        of("export FLANNEL_SUBNET=\"bad, 10.42.1.1/24 ,10.42.2.1/24\"\r\n"),
        "10.42.1.0/24"
    );
    assert_eq!(of("FLANNEL_SUBNET=fd00::1/64\nFLANNEL_MTU=1\nnonsense\n=\n"), "");
    assert_eq!(
        previous(std::path::Path::new("/nonexistent/subnet.env")),
        Subnets::default()
    );
}

proptest! {
    #[test]
    fn arbitrary_text_never_panics(text in any::<String>(), net in "[0-9a-f.:/]{0,40}") {
        previous_in(&text);
        previous_in(&format!("FLANNEL_SUBNET={net}\nFLANNEL_IPV6_SUBNET={net}"));
    }

    #[test]
    fn what_is_written_is_read_back(slot in 1..=255u32) {
        let network = env(true).network;
        let subnets = network.subnets(keys::Slot::new(slot).unwrap()).unwrap();
        prop_assert_eq!(previous_in(&SubnetEnv { subnets, ..env(true) }.text()), subnets);
    }
}
