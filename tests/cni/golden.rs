//! What flannel's plugin makes of the same configurations: flannel.json, which measure.py wrote.

use serde_json::Value;

use crate::rig::{Call, Rig, V4};

const MEASURED: &str = include_str!("flannel.json");

#[test]
fn delegates_results_and_errors_are_those_of_flannels_plugin() {
    let cases: Vec<Value> = serde_json::from_str(MEASURED).unwrap();
    assert!(cases.len() > 70);
    for case in cases {
        let name = case["name"].as_str().unwrap();
        let rig = Rig::with_stub("");
        rig.stub("ptp");
        rig.lease(case["env"].as_str());
        let mut conf = case["conf"].clone();
        conf["subnetFile"] = rig.path("subnet.env").to_str().unwrap().into();
        conf["dataDir"] = rig.path("data").to_str().unwrap().into();
        let command = case["command"].as_str().unwrap();
        let outcome = rig.call(&Call::new(command, "c", &conf));
        let calls = [rig.calls("bridge"), rig.calls("ptp")].concat();
        let Some(delegate) = case.get("delegate") else {
            assert_eq!(outcome.good, case["exit"] == 0, "{name}: {outcome:?}");
            let said: Value =
                serde_json::from_str(&outcome.stdout.replace(rig.path("").to_str().unwrap(), "{dir}/")).unwrap();
            assert_eq!(said, case["says"], "{name}");
            assert_eq!(
                (calls.len(), rig.names("data").len()),
                (0, 0),
                "{name}: nothing was begun"
            );
            continue;
        };
        assert_eq!(calls.len(), 1, "{name}: {outcome:?}");
        assert_eq!(calls[0]["conf"], *delegate, "{name}");
        outcome.result();
        assert_eq!(outcome.stderr, "", "{name}");
    }
}

#[test]
fn called_by_hand_it_says_what_it_is() {
    let rig = Rig::with_stub(V4);
    let outcome = rig.call(&Call::new("", "", &Value::Null));
    outcome.done();
    assert!(outcome.stderr.starts_with("CNI Plugin flannel (ringmail-cni) version "));
    let versions = "CNI protocol versions supported: 0.1.0, 0.2.0, 0.3.0, 0.3.1, 0.4.0, 1.0.0, 1.1.0\n";
    assert!(outcome.stderr.ends_with(versions), "{}", outcome.stderr);
}
