//! File names, keys and values: round trips, flannel's own, arbitrary bytes.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use proptest::prelude::*;
use serde_json::json;

use super::super::folder::parse_file_name;
use super::*;

fn any_lease() -> impl Strategy<Value = Lease> {
    let v4 = (any::<u32>(), 0_u8..=32).prop_map(|(a, l)| ipnet::Ipv4Net::new(a.into(), l).unwrap().trunc());
    let v6 = (any::<u128>(), 0_u8..=128).prop_map(|(a, l)| ipnet::Ipv6Net::new(a.into(), l).unwrap().trunc());
    let subnets = (proptest::option::of(v4), proptest::option::of(v6))
        .prop_filter("a subnet", |(v4, v6)| v4.is_some() || v6.is_some())
        // flannel's way to say that there is no IPv4.
        .prop_filter("not flannel's IPv6-only key", |(v4, v6)| {
            v6.is_none() || v4.is_none_or(|n| n != Default::default())
        });
    let public = (proptest::option::of(1_u32..), proptest::option::of(1_u128..));
    let data = prop_oneof![
        Just(json!(null)),
        any::<i64>().prop_map(|n| json!({"n": n, "list": [n, null, true]})),
        any::<String>().prop_map(|s| json!({s.clone(): [s]})),
    ];
    ("[!-.0-~]{1,253}", subnets, public, any::<String>(), data.clone(), data).prop_map(
        |(name, (v4, v6), public, backend, data, v6_data)| Lease {
            node: node(&name),
            subnets: Subnets { v4, v6 },
            public: Addresses {
                v4: public.0.map(Into::into),
                v6: public.1.map(Into::into),
            },
            backend,
            data: data.into(),
            v6_data: v6_data.into(),
        },
    )
}

proptest! {
    #[test]
    fn a_lease_comes_back_as_it_was_written(lease in any_lease(), revision: u64) {
        let name = file_name(&lease.subnets);
        prop_assert_eq!(parse_file_name(name.as_ref()), Ok(lease.subnets));
        let back = format::decode(lease.subnets, format::encode(&lease, revision).as_bytes()).unwrap();
        prop_assert_eq!(back, (lease, revision));
    }

    #[test]
    fn no_name_makes_the_parser_panic_and_what_it_takes_it_writes_the_same(bytes: Vec<u8>, text in "[0-9a-f:.&-]{0,40}(\\.json)?") {
        for name in [OsString::from_vec(bytes.clone()), text.into()] {
            if let Ok(subnets) = parse_file_name(&name) {
                prop_assert_eq!(OsString::from(file_name(&subnets)), name);
            }
        }
    }

    #[test]
    fn no_content_makes_the_parser_panic(bytes: Vec<u8>, text in "[\\[{\"a-zA-Z0-9:,}\\] ]{0,80}") {
        let subnets = subnets("10.244.1.0-24");
        let _ = format::decode(subnets, &bytes);
        let _ = format::decode(subnets, text.as_bytes());
        let node = format!("{{\"Node\":\"a\",\"BackendData\":{text}}}");
        let _ = format::decode(subnets, node.as_bytes());
    }
}

#[test]
fn flannels_keys_and_values_are_read() {
    for (key, v4, v6) in [
        ("10.5.52.0-24", Some("10.5.52.0/24"), None),
        (
            "10.12.13.0-24&fd00:12:13::-56",
            Some("10.12.13.0/24"),
            Some("fd00:12:13::/56"),
        ),
        ("0.0.0.0-0&fd00:12:13::-56", None, Some("fd00:12:13::/56")),
        ("fd00:244:0:1::-64", None, Some("fd00:244:0:1::/64")),
    ] {
        let expected = Subnets {
            v4: v4.map(|n| n.parse().unwrap()),
            v6: v6.map(|n| n.parse().unwrap()),
        };
        assert_eq!(format::parse_key(key), Ok(expected), "{key}");
    }
    for key in [
        "",
        "&",
        "10.5.52.0",
        "10.5.52.0-",
        "10.5.52.0-+24",
        "fd00::-64&10.5.52.0-24",
        "10.5.0.0-16&",
        "a-1",
    ] {
        assert!(matches!(format::parse_key(key), Err(format::BadKey::Form(_))), "{key}");
    }
    let value = br#"{"Node":"n","PublicIP":"0.0.0.0","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}}"#;
    let (lease, revision) = format::decode(subnets("10.5.52.0-24"), value).unwrap();
    assert_eq!(
        (lease.public, lease.backend.as_str(), revision),
        (Addresses::default(), "vxlan", 0)
    );
    assert_eq!(lease.data.value(), json!({"VNI": 1, "VtepMAC": "c6:d2:32:6f:8f:44"}));
}
