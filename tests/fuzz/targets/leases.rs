//! Leases as any store holds them: key and value, and what the backends make of them. The input is a key, a line's end, and
//! a value.

use std::sync::LazyLock;

use ringmail::admission::stated_name;
use ringmail::backend::{Macs, Plain, Site, extension, ipip, udp, vxlan};
use ringmail::lease::{Addresses, Network, NodeName, Range, Subnets};
use ringmail::store::format;
use ringmail::uplink::{LinkRoute, Uplink};
use serde_json::Value;

const VXLAN: vxlan::Settings = vxlan::Settings {
    vni: 1,
    port: vxlan::PORT,
    outer_mtu: None,
    gbp: false,
    learning: false,
    direct: true,
};

static NAME: LazyLock<NodeName> = LazyLock::new(|| NodeName::new("node1").expect("a name"));

fn network() -> Network {
    Network {
        v4: Some(Range {
            net: "10.244.0.0/16".parse().expect("a net"),
            subnet_len: 24,
            first: 1,
            last: 255,
        }),
        v6: Some(Range {
            net: "fd00:10:244::/48".parse().expect("a net"),
            subnet_len: 64,
            first: 1,
            last: 255,
        }),
    }
}

fn uplink() -> Uplink {
    let addresses = Addresses {
        v4: Some([192, 0, 2, 1].into()),
        v6: Some([0x2001, 0xdb8, 0, 0, 0, 0, 0, 1].into()),
    };
    let route = |net: &str| LinkRoute {
        net: net.parse().expect("a net"),
        direct: true,
    };
    Uplink {
        name: "eth0".into(),
        index: 2,
        mtu: 1500,
        local: addresses,
        public: addresses,
        routes: vec![route("192.0.2.0/25"), route("2001:db8::/64")],
    }
}

pub(crate) fn run(data: &[u8]) {
    let cut = data.iter().position(|byte| *byte == b'\n').unwrap_or(0);
    let (key, value) = (String::from_utf8_lossy(&data[..cut]), &data[cut..]);
    let subnets = match format::parse_key(&key) {
        Ok(subnets) => {
            let again = format::parse_key(&format::key(&subnets)).expect("a key that was made is read");
            assert_eq!(again, subnets);
            assert!(format::overlap(&subnets, &subnets));
            subnets
        }
        // The value shall be tried all the same.
        Err(error) => {
            assert!(!error.to_string().is_empty());
            Subnets {
                v4: Some("10.244.2.0/24".parse().expect("a net")),
                v6: Some("fd00:10:244:2::/64".parse().expect("a net")),
            }
        }
    };
    let named = |unnamed: &format::Unnamed<'_>| {
        let address = unnamed.public.iter().next().map(|address| address.to_string());
        stated_name(unnamed.data).or_else(|| NodeName::new(&address?).ok())
    };
    let Ok((lease, revision)) = format::decode_named(subnets, value, named) else {
        return;
    };
    let data = [&lease.data, &lease.v6_data].map(|data| data.value());
    if !data.iter().any(has_fraction) {
        let written = format::encode(&lease, revision);
        let (again, same) = format::decode(subnets, written.as_bytes()).expect("what was written is read");
        assert_eq!((&again, same), (&lease, revision));
        let flannels = format::encode_flannel(&lease);
        let named = |_: &format::Unnamed<'_>| Some(lease.node.clone());
        let (again, _) = format::decode_named(subnets, flannels.as_bytes(), named).expect("flannel's form too");
        assert_eq!(again, lease);
    }

    let (network, uplink) = (network(), uplink());
    let site = Site {
        name: &NAME,
        network: &network,
        own: network
            .subnets(keys::Slot::new(1).expect("a slot"))
            .expect("it has subnets"),
        uplink: &uplink,
        macs: Macs::default(),
    };
    for plain in [
        Plain::Vxlan(VXLAN),
        Plain::HostGw,
        Plain::Ipip(ipip::Settings { direct: false }),
        Plain::Udp(udp::Settings { port: 8285 }),
        Plain::Alloc,
        Plain::Extension(extension::Commands::default()),
    ] {
        let mut lease = lease.clone();
        // As if it were of this backend, so that its data are looked at.
        lease.backend = plain.lease_type().into();
        let served = plain.peer(&site, &lease);
        for subnet in lease.subnets.iter() {
            // Nothing outside of the mesh is ever routed.
            let route = ringmail::kernel::Key::Route(subnet);
            assert!(
                !served.objects.contains_key(&route) || network.net_of(subnet).is_some(),
                "{subnet}"
            );
        }
        drop(served.lacks.map(|why| why.to_string()));
    }
    let _ = vxlan::vtep(&lease.data);
    let input = extension::input(&data[0]);
    // Whatever a lease says is at most one word.
    assert_eq!(extension::words("/bin/true $DATA", &[("DATA", input.clone())]).len(), 2);
}

/// Whether there is a number in it that serde_json reads to the nearest few, not to the last bit. No backend's data have
/// any.
fn has_fraction(value: &Value) -> bool {
    match value {
        Value::Number(number) => number.is_f64(),
        Value::Array(items) => items.iter().any(has_fraction),
        Value::Object(members) => members.values().any(has_fraction),
        Value::Null | Value::Bool(_) | Value::String(_) => false,
    }
}
