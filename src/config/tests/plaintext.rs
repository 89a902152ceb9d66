//! `AllowPlaintextPeers`.

use super::*;

#[test]
fn plaintext_peers_are_allowed_by_word_alone_and_warned_of() {
    let read = |more: &str| {
        let conf = parse(&format!(
            r#"{{"Network": "10.244.0.0/16", "Backend": {{"Type": "ipsec", "PSKFile": "/run/psk"{more}}}}}"#
        ));
        let conf = conf.unwrap();
        (
            conf.backend.ipsec().expect("ipsec").tuning.plaintext.clone(),
            conf.warnings,
        )
    };
    for none in [
        "",
        r#", "AllowPlaintextPeers": false"#,
        r#", "AllowPlaintextPeers": null"#,
    ] {
        assert_eq!(read(none), (None, vec![]));
    }
    let warning = |backend: &str| {
        vec![format!(
            "Backend.AllowPlaintextPeers: peers of backend {backend} are served unencrypted; take it out when none is left"
        )]
    };
    let usual = vxlan::Settings::default();
    assert_eq!(
        read(r#", "AllowPlaintextPeers": true"#),
        (Some(Plain::Vxlan(usual.clone())), warning("vxlan"))
    );
    // The Backend as it was, whatever the order in it.
    let other = vxlan::Settings {
        vni: 4096,
        port: 4789,
        direct: true,
        ..usual
    };
    assert_eq!(
        read(r#", "AllowPlaintextPeers": {"VNI": 4096, "port": 4789, "DirectRouting": true, "type": "VXLAN"}"#),
        (Some(Plain::Vxlan(other)), warning("vxlan"))
    );
    assert_eq!(
        read(r#", "AllowPlaintextPeers": {"Type": "host-gw"}"#),
        (Some(Plain::HostGw), warning("host-gw"))
    );
    let odd = read(r#", "AllowPlaintextPeers": {"Type": "vxlan", "VNII": 7}"#).1;
    assert_eq!(
        odd[0],
        "unknown key \"AllowPlaintextPeers.VNII\" is ignored; did you mean VNI?"
    );
    let needed = "the Type that the other nodes have is needed, \"vxlan\" or \"host-gw\"; from another backend go to vxlan first";
    for (wrong, why) in [
        (
            r#""yes""#,
            "expected AllowPlaintextPeers to be true, false or the Backend of before".to_owned(),
        ),
        ("[1]", "expected AllowPlaintextPeers to be true".to_owned()),
        ("{}", format!("Backend.AllowPlaintextPeers has no Type: {needed}")),
        (
            r#"{"Type": "udp"}"#,
            format!("Backend.AllowPlaintextPeers has Type \"udp\": {needed}"),
        ),
        (
            r#"{"Type": "ipsec"}"#,
            format!("Backend.AllowPlaintextPeers has Type \"ipsec\": {needed}"),
        ),
        (
            r#"{"Type": "vxlam"}"#,
            "Type is \"vxlam\": unknown backend type".to_owned(),
        ),
        (
            r#"{"Type": "vxlan", "VNI": "1"}"#,
            "VNI is \"1\": a whole number".to_owned(),
        ),
        (
            r#"{"Type": "vxlan", "VNI": 16777215}"#,
            "VNI is 16777215: the device".to_owned(),
        ),
    ] {
        let text = format!(
            r#"{{"Network": "10.244.0.0/16", "Backend": {{"Type": "ipsec", "PSKFile": "/p", "AllowPlaintextPeers": {wrong}}}}}"#
        );
        let error = parse(&text).expect_err(wrong).to_string();
        assert!(error.contains(&why), "{wrong}: {error}");
    }
}
