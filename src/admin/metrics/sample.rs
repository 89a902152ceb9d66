//! Measures for tests.

use super::*;
use crate::node::{Flow, Rotations};
use crate::tunnel;

fn peer(node: &str, state: &str) -> serde_json::Value {
    serde_json::json!({
        "node": node, "subnets": ["10.244.2.0/24"], "address": "192.0.2.2", "state": state, "reason": null,
        "generation": null, "newest": null, "spi_out": null, "spi_in": null, "encap": "esp", "heard": null,
        "round_trip": null, "bytes_out": 0, "bytes_in": 0, "packets_out": 0, "packets_in": 0, "errors": 0
    })
}

/// A node with one peer that is up and one that is not, of which nothing is known and whose name is hostile.
pub(crate) fn measures() -> Measures {
    let mut up = peer("node-b", "up");
    let known =
        serde_json::json!({"heard": 7.5, "round_trip": 0.75, "loss": 0.25, "silent": "nothing", "full_size": true});
    let known = known.as_object().cloned().expect("an object");
    up.as_object_mut().expect("an object").extend(known);
    let report: Report = serde_json::from_value(serde_json::json!({
        "node": "node-a", "network": ["10.244.0.0/16"], "subnets": ["10.244.1.0/24"], "public": ["192.0.2.1"],
        "uplink": "eth0", "mtu": 1446, "backend": "ipsec", "cipher": "aes128gcm16", "encap": "false",
        "epoch": 1_764_000_001u64, "epoch_age": 11_520,
        "plaintext": {"arriving": {"packets": 3, "bytes": 300}, "leaving": {"packets": 0, "bytes": 0}}, "next_epoch": null,
        "psks": [
            {"kid": "0011223344556677", "withdrawn": false, "dropped_in": null, "have": 1, "nodes": 2, "missing": ["node-b"],
             "needed_by": []},
            {"kid": "8899aabbccddeeff", "withdrawn": true, "dropped_in": 100, "have": 2, "nodes": 2, "missing": [],
             "needed_by": ["node-b"]}
        ],
        "complete": true, "problems": ["no lease yet"], "rejected": {"x.json": "no JSON"},
        "peers": [up, peer("\"} 1\\", "refused")]
    }))
    .expect("a report");
    let mut report = report;
    report.tunnel = Some(tunnel::Counters {
        sent_packets: 7,
        sent_bytes: 700,
        ..tunnel::Counters::default()
    });
    let seen = |bounds, values: &[f64]| {
        let mut histogram = Histogram::new(bounds);
        values.iter().for_each(|value| histogram.observe(*value));
        histogram
    };
    let carried = Carried {
        sent: Flow {
            packets: 11,
            bytes: 1100,
        },
        received: Flow {
            packets: 12,
            bytes: 1200,
        },
        errors: 2,
    };
    let node = |name| NodeName::new(name).expect("a name");
    let mut rotations = Rotations::default();
    rotations.begun = [(Cause::Start, 1), (Cause::Asked, 2)].into();
    rotations.took = seen(&[0.1, 1.0], &[0.05, 0.5]);
    rotations.unfinished = 1;
    let generation = Generation {
        sender: ::keys::Epoch(1_764_000_001),
        receiver: ::keys::Epoch(1_764_000_099),
    };
    Measures {
        report,
        datapath: Datapath::Works,
        tally: Tally {
            passes: 4,
            writes: 4321,
            failures: 1,
            repaired: 5,
        },
        passes: seen(&[0.001, 0.1], &[0.0005, 0.002, 0.05, 3.0]),
        rotations,
        probes: 100,
        probes_left_out: 50,
        round_trips: seen(&[0.001, 0.01], &[0.0005, 0.002]),
        traffic: [(node("node-b"), carried)].into(),
        carried,
        generations: [(node("node-b"), generation)].into(),
        headroom: Some(Headroom {
            packets: 8_000_000_000,
            spent: 0.0625,
        }),
        rekey_after: Some(Duration::from_secs(86_400)),
        configuration_refused: true,
        unread: Some(Duration::from_millis(1500)),
        unwritten: None,
        store_failures: Failures { reading: 3, writing: 0 },
    }
}

pub(crate) fn host() -> Host {
    Host {
        memory: 20 << 20,
        processor: 1.25,
        began: 1_764_000_000.5,
        descriptors: 33,
        xfrm: vec![("XfrmInError".into(), 0), ("XfrmInNoStates".into(), 17)],
    }
}
