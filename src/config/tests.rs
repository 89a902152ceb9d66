//! net-conf.json: every rule and its text. Flags and subnet.env have their own files.

mod flags;
mod plaintext;
mod subnet_env;

use std::path::Path;
use std::time::Duration;

use keys::{Cipher, EncapMode};
use proptest::prelude::*;

use super::*;
use crate::backend::{Plain, vxlan};
use crate::lease::{Network, Range};

const PSK: &str = "0123456789abcdef0123456789abcdef";

fn parse(json: &str) -> Result<NetConf, ConfError> {
    NetConf::parse(
        json,
        &Context {
            file: "net-conf.json",
            psk_file: None,
            psk_secret: None,
        },
    )
}

fn with_file(json: &str) -> Result<NetConf, ConfError> {
    NetConf::parse(
        json,
        &Context {
            file: "net-conf.json",
            psk_file: Some(Path::new("/etc/ringmail/psk")),
            psk_secret: None,
        },
    )
}

fn good(json: &str) -> NetConf {
    with_file(json).unwrap_or_else(|error| panic!("{json}: {error}"))
}

fn error(json: &str) -> String {
    with_file(json).expect_err(json).to_string()
}

fn ipsec(backend: &str) -> Tuning {
    let conf = good(&format!(r#"{{"Network": "10.244.0.0/16", "Backend": {backend}}}"#));
    conf.backend.ipsec().expect("ipsec").tuning.clone()
}

fn v4(conf: &NetConf) -> Range<ipnet::Ipv4Net> {
    conf.network.v4.expect("IPv4 is on")
}

#[test]
fn flannels_own_examples_are_accepted_as_written() {
    let vxlan = parse(r#"{"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}}"#).unwrap();
    assert_eq!(vxlan.backend.name(), "vxlan");
    assert!(vxlan.warnings.is_empty());
    let host_gw = parse(r#"{"Network": "10.0.0.0/8", "Backend": {"Type": "host-gw", "DirectRouting": true}}"#).unwrap();
    assert!(matches!(host_gw.backend, Backend::Plain(Plain::HostGw)));
    assert!(host_gw.warnings.is_empty());
    let json =
        format!(r#"{{"Network": "10.50.0.0/16", "Backend": {{"Type": "ipsec", "PSK": "{PSK}", "UDPEncap": true}}}}"#);
    let conf = parse(&json).unwrap();
    let ipsec = conf.backend.ipsec().unwrap();
    assert_eq!(
        ipsec.tuning.encap,
        keys::Encap {
            mode: EncapMode::Udp,
            port: 4500
        }
    );
    let PskSource::Inline(psk) = &ipsec.psk else {
        panic!("the PSK is in the text")
    };
    assert_eq!(psk.kid(), keys::Psk::new(PSK.as_bytes(), "10.50.0.0/16").unwrap().kid());
    assert_eq!(
        conf.warnings.len(),
        1,
        "a PSK in the configuration is warned of: {:?}",
        conf.warnings
    );
}

#[test]
fn ipsec_is_the_default_only_where_a_psk_is_and_nothing_else_is_a_default() {
    assert!(matches!(
        good(r#"{"Network": "10.244.0.0/16"}"#).backend,
        Backend::Ipsec(_)
    ));
    assert!(matches!(
        good(r#"{"Network": "10.244.0.0/16", "Backend": null}"#).backend,
        Backend::Ipsec(_)
    ));
    for backend in [
        "",
        r#", "Backend": {}"#,
        r#", "Backend": null"#,
        r#", "Backend": {"MTU": 1400}"#,
    ] {
        let refused = parse(&format!(r#"{{"Network": "10.244.0.0/16"{backend}}}"#));
        assert!(
            matches!(
                refused,
                Err(ConfError::Rule {
                    rule: Rule::NoBackend,
                    ..
                })
            ),
            "{backend}: {refused:?}"
        );
    }
    let inline = format!(r#"{{"Network": "10.244.0.0/16", "Backend": {{"PSK": "{PSK}"}}}}"#);
    assert!(matches!(parse(&inline).unwrap().backend, Backend::Ipsec(_)));
}

#[test]
fn defaults_of_ipsec_are_the_documented_ones() {
    let ipsec = ipsec(r#"{"Type": "IPsec"}"#);
    assert_eq!(
        ipsec.encap,
        keys::Encap {
            mode: EncapMode::Esp,
            port: 4500
        }
    );
    assert_eq!(
        (ipsec.cipher, ipsec.rekey_after),
        (Cipher::Aes128Gcm16, Duration::from_secs(86400))
    );
    assert_eq!(ipsec.mtu, None);
    assert_eq!((ipsec.rekey.packets, ipsec.rekey.bytes), (1 << 33, 1 << 42));
    assert_eq!(ipsec.psk_grace, Duration::from_secs(3600));
    let Backend::Ipsec(Ipsec { psk, .. }) =
        good(r#"{"Network": "10.244.0.0/16", "Backend": {"Type": "IPsec"}}"#).backend
    else {
        panic!("ipsec")
    };
    assert!(matches!(psk, PskSource::File(path) if path == Path::new("/etc/ringmail/psk")));
}

#[test]
fn every_setting_of_ipsec_is_read() {
    let all = ipsec(
        r#"{"type": "ipsec", "udpencap": true, "ENCAPPORT": 4501, "EspProposal": "chacha20poly1305",
        "rekeyAfter": "1h30m", "mtu": 1400, "RekeyPackets": 1000, "rekeybytes": 1048576, "PskGrace": "90s"}"#,
    );
    assert_eq!((all.rekey.packets, all.rekey.bytes), (1000, 1 << 20));
    assert_eq!(all.psk_grace, Duration::from_secs(90));
    assert_eq!(
        all.encap,
        keys::Encap {
            mode: EncapMode::Udp,
            port: 4501
        }
    );
    assert_eq!(ipsec(r#"{"UDPEncap": "auto"}"#).encap.mode, EncapMode::Auto);
    assert_eq!(all.cipher, Cipher::ChaCha20Poly1305);
    assert_eq!((all.rekey_after, all.mtu), (Duration::from_secs(5400), Some(1400)));
    let file = parse(r#"{"Network": "10.244.0.0/16", "Backend": {"Type": "ipsec", "PSKFile": "/run/psk"}}"#).unwrap();
    assert!(matches!(&file.backend.ipsec().unwrap().psk, PskSource::File(path) if path == Path::new("/run/psk")));
    assert_eq!(ipsec_mtu(0), None, "0 is flannel's way to leave it out");
}

fn ipsec_mtu(mtu: u16) -> Option<u16> {
    ipsec(&format!(r#"{{"Type": "ipsec", "MTU": {mtu}}}"#)).mtu
}

#[test]
fn proposals_are_accepted_by_their_cipher_and_refused_without_authenticated_encryption() {
    for (proposal, cipher) in [
        ("aes128gcm16", Cipher::Aes128Gcm16),
        ("AES256GCM16", Cipher::Aes256Gcm16),
        ("aes128gcm16-sha256-prfsha256-ecp256", Cipher::Aes128Gcm16),
        ("aes256gcm128-esn-modp3072!", Cipher::Aes256Gcm16),
        ("chacha20poly1305-curve25519", Cipher::ChaCha20Poly1305),
        ("aes256gcm16-ecp256,aes128gcm16", Cipher::Aes256Gcm16),
    ] {
        assert_eq!(
            ipsec(&format!(r#"{{"ESPProposal": "{proposal}"}}"#)).cipher,
            cipher,
            "{proposal}"
        );
    }
    for proposal in [
        "aes128-sha256",
        "null",
        "3des-sha1",
        "aes128gcm8",
        "",
        "-",
        "aes128gcm16-aes128",
        "aes128ctr",
    ] {
        let text = error(&format!(
            r#"{{"Network": "10.244.0.0/16", "Backend": {{"ESPProposal": "{proposal}"}}}}"#
        ));
        assert!(
            text.contains("aes128gcm16, aes256gcm16, chacha20poly1305 are accepted"),
            "{proposal}: {text}"
        );
    }
}

#[test]
fn durations_are_gos() {
    use super::backend::duration;
    for (text, seconds) in [
        ("24h", 86400),
        ("90m", 5400),
        ("1h30m", 5400),
        ("1m", 60),
        ("1h0m5s", 3605),
    ] {
        assert_eq!(duration(text), Some(Duration::from_secs(seconds)), "{text}");
    }
    for text in [
        "",
        "24",
        "h",
        "1x",
        "-1h",
        "1m1h",
        "1h1h",
        "1.5h",
        " 1h",
        "99999999999999999999h",
        "9223372036854775807h",
    ] {
        assert_eq!(duration(text), None, "{text}");
    }
}

#[test]
fn a_network_is_cut_as_flannel_cuts_it() {
    for (json, len, first, last) in [
        (r#""Network": "10.244.0.0/16""#, 24, 1, 255),
        (r#""Network": "10.244.0.0/22""#, 24, 1, 3),
        (r#""Network": "10.244.0.0/23""#, 25, 1, 3),
        (r#""Network": "10.244.0.0/28""#, 30, 1, 3),
        (r#""Network": "10.244.0.0/16", "SubnetLen": 0"#, 24, 1, 255),
        (r#""Network": "10.244.0.0/16", "SubnetLen": 20"#, 20, 1, 15),
        (
            r#""Network": "10.0.0.0/8", "SubnetLen": 20, "SubnetMin": "10.10.0.0", "SubnetMax": "10.99.0.0""#,
            20,
            160,
            1584,
        ),
        (r#""Network": "10.244.0.0/16", "SubnetMin": "10.244.0.0""#, 24, 0, 255),
        (
            r#""Network": "10.244.0.0/16", "SubnetMin": "0.0.0.0", "SubnetMax": null"#,
            24,
            1,
            255,
        ),
    ] {
        let range = v4(&good(&format!("{{{json}}}")));
        assert_eq!(
            (range.subnet_len, range.first, range.last),
            (len, first, last),
            "{json}"
        );
    }
    let six = good(r#"{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:244::/48"}"#).network;
    let range = six.v6.expect("IPv6 is on");
    assert_eq!(
        (six.v4, range.subnet_len, range.first, range.last),
        (None, 64, 1, 65535)
    );
    let small = good(r#"{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00:244::/63"}"#)
        .network
        .v6;
    assert_eq!(small.map(|r| r.subnet_len), Some(65));
}

#[test]
fn more_subnets_than_an_spi_can_name_are_capped_with_a_warning() {
    let conf = good(r#"{"Network": "10.0.0.0/8", "SubnetLen": 30}"#);
    assert_eq!(v4(&conf).last, (1 << 19) - 3);
    assert!(
        conf.warnings[0].contains("has 4194304 subnets of /30: the first 524286"),
        "{:?}",
        conf.warnings
    );
    let six = good(r#"{"EnableIPv4": false, "EnableIPv6": true, "IPv6Network": "fd00::/8", "IPv6SubnetLen": 126}"#);
    assert_eq!(*six.network.slots().end(), (1 << 19) - 3);
}

#[test]
fn both_families_give_out_the_slots_that_they_have_in_common() {
    let conf = good(
        r#"{"EnableIPv6": true, "Network": "10.244.0.0/16", "IPv6Network": "fd00:244::/48",
            "IPv6SubnetMin": "fd00:244:0:10::", "SubnetMax": "10.244.128.0"}"#,
    );
    assert_eq!(conf.network.slots(), 16..=128);
    assert_eq!(conf.network.to_string(), "10.244.0.0/16,fd00:244::/48");
}

#[test]
fn odd_things_are_warned_of_and_nothing_else_is() {
    let conf = good(
        r#"{"Network": "10.244.3.0/16", "network": "10.244.3.0/16", "SubnetLne": 24, "Comment": {"deep": [1]},
            "IPv6Network": "fd00::/48", "Backend": {"Type": "ipsec", "UDPEncpa": true, "VNI": 1}}"#,
    );
    assert_eq!(
        conf.warnings,
        [
            "key Network is there more than once: the last one counts",
            "unknown key \"SubnetLne\" is ignored; did you mean SubnetLen?",
            "unknown key \"Comment\" is ignored",
            "IPv6Network is there but EnableIPv6 is not true: that family stays off",
            "Network 10.244.3.0/16 is read as 10.244.0.0/16",
            "unknown key \"Backend.UDPEncpa\" is ignored; did you mean UDPEncap?",
            "unknown key \"Backend.VNI\" is ignored",
        ]
    );
    assert!(
        good(r#"{"Network": "10.244.0.0/16", "EnableNFTables": true}"#)
            .warnings
            .is_empty()
    );
    assert!(good(r#"{"Network": "10.244.0.0/16", "EnableNFTables": true}"#).nftables);
}

/// The golden list: each wrong input and the whole text that it gets.
#[test]
fn every_wrong_network_configuration_is_refused_naming_key_value_and_remedy() {
    for (json, text) in GOLDEN {
        assert_eq!(error(json), format!("net-conf.json{text}"), "{json}");
    }
}

const GOLDEN: &[(&str, &str)] = &[
    ("", ":1:0: EOF while parsing a value"),
    ("{", ":1:1: EOF while parsing an object"),
    ("{\n  \"Network\": \"10.244.0.0/16\",\n}", ":3:1: trailing comma"),
    ("{\"Network\": \"10.244.0.0/16\"} x", ":1:30: trailing characters"),
    ("[]", ":1:2: an object { … } is needed"),
    ("null", ":1:4: an object { … } is needed"),
    (
        r#"{"Network": 7}"#,
        r#":1:13: Network is 7: invalid IPv4 CIDR format, one such as "10.244.0.0/16" is needed"#,
    ),
    (
        "{\n \"Network\": \"10.244.0.0\"}",
        r#":2:24: Network is "10.244.0.0": invalid IPv4 CIDR format, one such as "10.244.0.0/16" is needed"#,
    ),
    (
        r#"{"Network": "fd00::/48"}"#,
        r#":1:23: Network is "fd00::/48": invalid IPv4 CIDR format, one such as "10.244.0.0/16" is needed"#,
    ),
    (
        r#"{"IPv6Network": "10.0.0.0/8"}"#,
        r#":1:28: IPv6Network is "10.0.0.0/8": invalid IPv6 CIDR format, one such as "fd00:244::/48" is needed"#,
    ),
    (
        r#"{"EnableIPv6": "yes"}"#,
        r#":1:20: EnableIPv6 is "yes": true or false is needed"#,
    ),
    (
        r#"{"SubnetLen": -1}"#,
        ":1:16: SubnetLen is -1: a whole number from 0 to 4294967295 is needed",
    ),
    (
        r#"{"SubnetLen": "24"}"#,
        r#":1:18: SubnetLen is "24": a whole number from 0 to 4294967295 is needed"#,
    ),
    (
        r#"{"SubnetMin": []}"#,
        r#":1:16: SubnetMin is a list: an IPv4 address such as "10.244.1.0" is needed"#,
    ),
    (
        "{}",
        r#": please define a correct Network parameter in the flannel config, such as "10.244.0.0/16""#,
    ),
    (
        r#"{"Network": "0.0.0.0/0"}"#,
        r#": please define a correct Network parameter in the flannel config, such as "10.244.0.0/16""#,
    ),
    (
        r#"{"EnableIPv4": false, "EnableIPv6": true}"#,
        r#": please define a correct IPv6Network parameter in the flannel config, such as "fd00:244::/48""#,
    ),
    (
        r#"{"EnableIPv4": false}"#,
        ": none defined stack: EnableIPv4 and EnableIPv6 are both false, one must be true",
    ),
    (
        r#"{"Network": "127.1.0.0/16"}"#,
        ": Network 127.1.0.0/16 overlaps 127.0.0.0/8, which are no addresses for pods: choose another, such as \
         10.244.0.0/16",
    ),
    (
        r#"{"Network": "10.244.0.0/29"}"#,
        ": network 10.244.0.0/29: network is too small. Minimum useful network prefix is /28",
    ),
    (
        r#"{"EnableIPv6": true, "Network": "10.0.0.0/8", "IPv6Network": "fd00::/125"}"#,
        ": IPv6Network fd00::/125: IPv6Network is too small. Minimum useful network prefix is /124",
    ),
    (
        r#"{"Network": "10.244.0.0/16", "SubnetLen": 31}"#,
        ": SubnetLen 31: SubnetLen must be less than /31",
    ),
    (
        r#"{"EnableIPv6": true, "Network": "10.0.0.0/8", "IPv6Network": "fd00::/48", "IPv6SubnetLen": 127}"#,
        ": IPv6SubnetLen 127: SubnetLen must be less than /127",
    ),
    (
        r#"{"Network": "10.244.0.0/16", "SubnetLen": 17}"#,
        ": SubnetLen 17 in 10.244.0.0/16: network must be able to accommodate at least four subnets, so at least 18",
    ),
    (
        r#"{"Network": "10.244.0.0/16", "SubnetMin": "10.245.0.0"}"#,
        ": SubnetMin 10.245.0.0: SubnetMin is not in the range of the Network 10.244.0.0/16",
    ),
    (
        r#"{"Network": "10.244.0.0/16", "SubnetMax": "10.243.0.0"}"#,
        ": SubnetMax 10.243.0.0: SubnetMax is not in the range of the Network 10.244.0.0/16",
    ),
    (
        r#"{"EnableIPv6": true, "Network": "10.0.0.0/8", "IPv6Network": "fd00::/48", "IPv6SubnetMax": "fd01::"}"#,
        ": IPv6SubnetMax fd01::: IPv6SubnetMax is not in the range of the IPv6Network fd00::/48",
    ),
    (
        r#"{"Network": "10.244.0.0/16", "SubnetMin": "10.244.1.7"}"#,
        ": SubnetMin is not on a SubnetLen boundary: 10.244.1.7; with /24 the nearest is 10.244.1.0",
    ),
    (
        r#"{"Network": "10.244.0.0/16", "SubnetMin": "10.244.9.0", "SubnetMax": "10.244.8.0"}"#,
        ": SubnetMin 10.244.9.0 is above SubnetMax 10.244.8.0: exchange them",
    ),
    (
        r#"{"Network": "10.244.0.0/16", "SubnetMax": "10.244.0.0"}"#,
        ": SubnetMin 10.244.1.0 is above SubnetMax 10.244.0.0: exchange them",
    ),
    (
        r#"{"Network": "10.0.0.0/8", "SubnetLen": 30, "SubnetMin": "10.128.0.0"}"#,
        ": SubnetMin 10.128.0.0 is subnet number 2097152 of 10.0.0.0/8: only the first 524286 can be told apart",
    ),
    (
        r#"{"EnableIPv6": true, "Network": "10.244.0.0/16", "IPv6Network": "fd00::/48", "IPv6SubnetMin": "fd00:0:0:1000::"}"#,
        ": no subnet number is given out by both families (IPv4 1 to 255, IPv6 4096 to 65535): a node holds the same \
         number in both; let SubnetMin and SubnetMax of both overlap",
    ),
    (
        r#"{"Backend": "secret-in-the-wrong-place"}"#,
        ":1:39: Backend is a text: an object { … } is needed",
    ),
    (
        r#"{"Backend": {"Type": 1}}"#,
        r#":1:22: Type is 1: a text such as "ipsec" is needed"#,
    ),
    (
        r#"{"Backend": {"Type": "ipsce"}}"#,
        ":1:28: Type is \"ipsce\": unknown backend type: \"ipsce\"; the types are ipsec, vxlan, host-gw, udp, \
         wireguard, ipip, alloc, extension, tencent-vpc; did you mean \"ipsec\"?",
    ),
    (
        r#"{"Backend": {"PSK": 12345678}}"#,
        ":1:28: PSK is a number: a text of at least 32 bytes is needed: run `ringmail keygen`",
    ),
    (
        r#"{"Backend": {"UDPEncap": "maybe"}}"#,
        r#":1:32: UDPEncap is "maybe": true, false or "auto" is needed"#,
    ),
    (
        r#"{"Backend": {"EncapPort": 0}}"#,
        ":1:27: EncapPort is 0: a port from 1 to 65535 is needed",
    ),
    (
        r#"{"Backend": {"EncapPort": 65536}}"#,
        ":1:31: EncapPort is 65536: a port from 1 to 65535 is needed",
    ),
    (
        r#"{"Backend": {"RekeyAfter": "59s"}}"#,
        r#":1:32: RekeyAfter is "59s": a time such as "24h", "90m" or "1h30m", at least "1m", is needed"#,
    ),
    (
        r#"{"Backend": {"RekeyPackets": 999}}"#,
        ":1:32: RekeyPackets is 999: a whole number from 1000 to 8589934592 is needed",
    ),
    (
        r#"{"Backend": {"RekeyPackets": 8589934593}}"#,
        ":1:39: RekeyPackets is 8589934593: a whole number from 1000 to 8589934592 is needed",
    ),
    (
        r#"{"Backend": {"RekeyBytes": "1G"}}"#,
        r#":1:31: RekeyBytes is "1G": a whole number from 1048576 to 4398046511104 is needed"#,
    ),
    (
        r#"{"Backend": {"PSKGrace": "169h"}}"#,
        r#":1:31: PSKGrace is "169h": a time such as "1h", "10m" or "0s", at most "168h", is needed"#,
    ),
    (
        r#"{"Backend": {"ESPProposal": "aes128-sha256"}}"#,
        r#":1:43: ESPProposal is "aes128-sha256": no authenticated encryption; aes128gcm16, aes256gcm16, chacha20poly1305 are accepted"#,
    ),
    (
        r#"{"Backend": {"MTU": 70000}}"#,
        ":1:25: MTU is 70000: a whole number from 0 to 65535 is needed",
    ),
    (
        r#"{"Network": "10.244.0.0/16", "Backend": {"MTU": 500}}"#,
        ": Backend.MTU is 500: at least 576 is needed; leave it out to have it computed",
    ),
    (
        r#"{"EnableIPv6": true, "Network": "10.0.0.0/8", "IPv6Network": "fd00::/48", "Backend": {"MTU": 1279}}"#,
        ": Backend.MTU is 1279: at least 1280 is needed; leave it out to have it computed",
    ),
];

#[test]
fn a_secret_makes_ipsec_the_default_and_goes_before_the_backends_own_psk() {
    let secret = "kube-system/psk".parse().unwrap();
    let read = |backend: &str| {
        let context = Context {
            file: "net-conf.json",
            psk_file: None,
            psk_secret: Some(&secret),
        };
        let conf = NetConf::parse(&format!(r#"{{"Network": "10.244.0.0/16"{backend}}}"#), &context).unwrap();
        let ipsec = conf.backend.ipsec().expect("ipsec").clone();
        assert!(matches!(&ipsec.psk, PskSource::Secret(of) if *of == secret));
        conf.warnings
    };
    assert!(read("").is_empty());
    assert!(read(r#", "Backend": {"Type": "ipsec"}"#).is_empty());
    for own in [r#""PSKFile": "/run/psk""#.to_owned(), format!(r#""PSK": "{PSK}""#)] {
        let warnings = read(&format!(r#", "Backend": {{{own}}}"#));
        assert_eq!(warnings, ["--psk-secret counts: the Backend's own PSK is not used"]);
    }
}

#[test]
fn a_psk_that_is_short_doubled_or_missing_is_refused() {
    let text = |backend: &str| {
        parse(&format!(r#"{{"Network": "10.244.0.0/16", "Backend": {backend}}}"#))
            .expect_err(backend)
            .to_string()
    };
    assert_eq!(
        text(r#"{"PSK": "too-short"}"#),
        "net-conf.json: Backend.PSK: PSK is 9 bytes; at least 32 are needed: run `ringmail keygen`"
    );
    assert_eq!(
        text(r#"{"Type": "ipsec"}"#),
        "net-conf.json: backend ipsec has no PSK: give --psk-file PATH or Backend.PSKFile; `ringmail keygen` makes a key"
    );
    assert_eq!(
        text(&format!(r#"{{"PSK": "{PSK}", "PSKFile": "/run/psk"}}"#)),
        "net-conf.json: Backend has both PSK and PSKFile: keep PSKFile"
    );
}

#[test]
fn no_text_or_debug_output_holds_the_psk() {
    let json = format!(r#"{{"Network": "10.244.0.0/16", "Backend": {{"PSK": "{PSK}"}}}}"#);
    let conf = parse(&json).unwrap();
    assert!(!format!("{conf:?}").contains(PSK));
    for broken in [
        json.replace("PSK\":", "PSK\": ["),
        json.replace("}}", "}"),
        json.replace("\"Backend\": {\"PSK\":", "\"Backend\":")
            .replace("}}", "}"),
    ] {
        let error = parse(&broken).expect_err(&broken);
        assert!(!format!("{error} {error:?}").contains("0123456789"), "{error}");
    }
}

#[test]
fn an_uplink_address_inside_the_network_is_an_overlap() {
    let network: Network = good(r#"{"Network": "10.244.0.0/16"}"#).network;
    assert_eq!(
        check_overlap(&network, &["192.168.1.1".parse().unwrap(), "fd00::1".parse().unwrap()]),
        Ok(())
    );
    let overlap = check_overlap(
        &network,
        &["192.168.1.1".parse().unwrap(), "10.244.7.1".parse().unwrap()],
    );
    assert_eq!(
        overlap.unwrap_err().to_string(),
        "Network 10.244.0.0/16 holds 10.244.7.1, an address of the uplink: choose a Network apart from the nodes' own \
         addresses, or another uplink with --iface"
    );
}

#[test]
fn a_missing_file_is_named_with_its_cause() {
    let error = NetConf::load(Path::new("/nonexistent/net-conf.json"), None, None).unwrap_err();
    assert_eq!(
        error.to_string(),
        "/nonexistent/net-conf.json: the network configuration can't be read"
    );
    assert!(
        std::error::Error::source(&error)
            .expect("the cause")
            .to_string()
            .contains("No such file")
    );
}

#[test]
fn the_effective_configuration_shows_every_default_and_no_secret() {
    let json = format!(r#"{{"Network": "10.244.0.0/16", "Backend": {{"PSK": "{PSK}"}}}}"#);
    let value = report::effective(
        &flags::run(&["--lease-dir=/leases", "--etcd-password="]),
        &parse(&json).unwrap(),
    );
    let text = report::text(&value);
    assert!(!text.contains(PSK) && !value.to_string().contains(PSK));
    for line in [
        "Backend.Type",
        "Backend.PSK.kid",
        "Network.SubnetLen",
        "store.dir",
        "/leases",
        "aes128gcm16",
    ] {
        assert!(text.contains(line), "{line} is missing:\n{text}");
    }
}

/// JSON-like text that is near to what is meant, so that the parser is reached in depth.
fn near_json() -> impl Strategy<Value = String> {
    let key = prop::sample::select(vec![
        "Network",
        "IPv6Network",
        "EnableIPv6",
        "EnableIPv4",
        "SubnetLen",
        "IPv6SubnetLen",
        "SubnetMin",
        "SubnetMax",
        "IPv6SubnetMin",
        "IPv6SubnetMax",
        "Backend",
        "Type",
        "PSK",
        "UDPEncap",
        "ESPProposal",
        "RekeyAfter",
        "RekeyPackets",
        "RekeyBytes",
        "PSKGrace",
        "MTU",
        "x",
    ]);
    let net4 = (any::<u32>(), 0..40u8).prop_map(|(a, l)| format!("\"{}/{l}\"", std::net::Ipv4Addr::from(a)));
    let net6 = (any::<u128>(), 0..140u8).prop_map(|(a, l)| format!("\"{}/{l}\"", std::net::Ipv6Addr::from(a)));
    let leaf = prop_oneof![
        net4,
        net6,
        any::<u32>().prop_map(|a| format!("\"{}\"", std::net::Ipv4Addr::from(a))),
        any::<i64>().prop_map(|n| n.to_string()),
        (0..140u8).prop_map(|n| n.to_string()),
        any::<bool>().prop_map(|b| b.to_string()),
        any::<String>().prop_map(|s| serde_json::to_string(&s).unwrap()),
        Just("null".to_owned()),
        Just("\"ipsec\"".to_owned()),
    ];
    leaf.prop_recursive(3, 24, 8, move |inner| {
        prop::collection::vec((key.clone(), inner), 0..8).prop_map(|members| {
            let members: Vec<_> = members
                .into_iter()
                .map(|(key, value)| format!("\"{key}\": {value}"))
                .collect();
            format!("{{{}}}", members.join(", "))
        })
    })
}

proptest! {
    #[test]
    fn arbitrary_text_never_panics(text in any::<String>()) {
        drop(with_file(&text));
    }

    #[test]
    fn arbitrary_objects_never_panic_and_what_is_accepted_can_be_given_out(json in near_json()) {
        if let Ok(conf) = with_file(&json) {
            let slots = conf.network.slots();
            prop_assert!(!slots.is_empty());
            for slot in [*slots.start(), *slots.end()] {
                let slot = keys::Slot::new(slot).expect("slots are within what an SPI can name");
                let subnets = conf.network.subnets(slot).expect("every slot has subnets");
                prop_assert_eq!(conf.network.slot(&subnets), Ok(slot));
            }
        }
    }

    #[test]
    fn every_network_that_can_be_cut_is_cut_consistently(
        a in any::<u32>(), prefix in 1..=28u8, len in 2..=30u8, b in any::<u128>(), prefix6 in 1..=124u8, len6 in 2..=126u8,
    ) {
        let json = format!(
            r#"{{"EnableIPv6": true, "Network": "{}/{prefix}", "SubnetLen": {len}, "IPv6Network": "{}/{prefix6}", "IPv6SubnetLen": {len6}}}"#,
            std::net::Ipv4Addr::from(a), std::net::Ipv6Addr::from(b),
        );
        match with_file(&json) {
            Ok(conf) => {
                prop_assert!(len >= prefix + 2 && len6 >= prefix6 + 2);
                let last = keys::Slot::new(*conf.network.slots().end()).expect("capped");
                let subnets = conf.network.subnets(last).expect("the last slot has subnets");
                prop_assert_eq!(conf.network.slot(&subnets), Ok(last));
            }
            Err(error) => {
                let special = matches!(error, ConfError::Rule { rule: Rule::Special { .. }, .. });
                prop_assert!(special || len < prefix + 2 || len6 < prefix6 + 2, "{}", error);
            }
        }
    }
}
