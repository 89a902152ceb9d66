//! Delegates that fail, states that are lost, old or broken, calls that are killed: with a script as the delegate.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::rig::{Call, Rig, V4};

const FAILS: &str = r#"echo '{"code": 77, "msg": "no way", "details": "d"}'; exit 1"#;

fn told(calls: &[Value]) -> Vec<String> {
    let line = |call: &Value| {
        let word = |key: &str| call[key].as_str().expect(key);
        let network = call["conf"]["name"].as_str().unwrap_or("-");
        format!(
            "{} {} {} {network}",
            word("command"),
            word("container"),
            word("interface")
        )
    };
    calls.iter().map(line).collect()
}

#[test]
fn a_del_whose_delegate_failed_is_done_again() {
    let rig = Rig::with_stub(V4);
    let conf = rig.conf("cbr0", "1.0.0");
    rig.call(&Call::new("ADD", "c", &conf)).result();
    let added = rig.calls("bridge").remove(0);
    assert_eq!(rig.names("data"), ["cbr0:c:eth0"]);
    rig.stub_does("bridge", FAILS);
    // Neither the configuration of now nor the lease matter.
    rig.lease(None);
    let other = rig.conf("cbr0", "0.3.1");
    for _ in 0..2 {
        assert_eq!(
            rig.call(&Call::new("DEL", "c", &other)).error(),
            (77, "no way".to_owned())
        );
        assert_eq!(rig.calls("bridge")[0]["conf"], added["conf"]);
        assert_eq!(rig.names("data"), ["cbr0:c:eth0"], "it is kept");
    }
    rig.stub_does("bridge", "");
    rig.call(&Call::new("DEL", "c", &other)).done();
    assert_eq!(rig.calls("bridge")[0]["conf"], added["conf"]);
    assert_eq!(rig.names("data"), [""; 0]);
}

#[test]
fn an_add_whose_delegate_failed_keeps_its_state_for_the_del() {
    let rig = Rig::with_stub(V4);
    let conf = rig.conf("cbr0", "1.0.0");
    rig.stub_does("bridge", &format!("[ $CNI_COMMAND != ADD ] || {{ {FAILS}; }}"));
    assert_eq!(
        rig.call(&Call::new("ADD", "c", &conf)).error(),
        (77, "no way".to_owned())
    );
    assert_eq!(rig.names("data"), ["cbr0:c:eth0"]);
    rig.call(&Call::new("DEL", "c", &conf)).done();
    assert_eq!(told(&rig.calls("bridge")), ["ADD c eth0 cbr0", "DEL c eth0 cbr0"]);
    assert_eq!(rig.names("data"), [""; 0]);
}

#[test]
fn two_networks_and_two_interfaces_of_one_container_stay_apart() {
    let rig = Rig::with_stub(V4);
    let (one, two) = (rig.conf("cbr0", "1.0.0"), rig.conf("net2", "1.0.0"));
    let attachments = [("eth0", &one), ("net1", &two), ("net2", &one)];
    for (interface, conf) in attachments {
        rig.call(&Call::new("ADD", "c", conf).interface(interface)).result();
    }
    rig.calls("bridge");
    for (interface, conf) in attachments {
        rig.call(&Call::new("DEL", "c", conf).interface(interface)).done();
    }
    let calls = rig.calls("bridge");
    assert_eq!(told(&calls), ["DEL c eth0 cbr0", "DEL c net1 net2", "DEL c net2 cbr0"]);
    assert_eq!(calls[1]["conf"]["bridge"], "br-net2");
}

#[test]
fn without_a_state_a_del_is_made_anew_and_without_a_lease_there_is_nothing_to_do() {
    let rig = Rig::with_stub(V4);
    let conf = rig.conf("cbr0", "1.0.0");
    rig.call(&Call::new("DEL", "c", &conf)).done();
    let calls = rig.calls("bridge");
    assert_eq!(told(&calls), ["DEL c eth0 cbr0"]);
    assert_eq!(
        calls[0]["conf"]["ipam"]["ranges"],
        json!([[{ "subnet": "10.244.1.0/24" }]])
    );
    rig.stub_does("bridge", FAILS);
    assert_eq!(rig.call(&Call::new("DEL", "c", &conf)).error().0, 77);
    rig.calls("bridge");
    rig.lease(None);
    let outcome = rig.call(&Call::new("DEL", "c", &conf));
    outcome.done();
    assert!(
        outcome.stderr.starts_with("nothing is kept of c in cbr0, "),
        "{outcome:?}"
    );
    assert_eq!(rig.calls("bridge"), [Value::Null; 0]);
}

#[test]
fn files_of_flannels_plugin_are_read() {
    let rig = Rig::with_stub(V4);
    let conf = rig.conf("cbr0", "1.0.0");
    fs::create_dir(rig.path("data")).unwrap();
    let old = json!({ "name": "cbr0", "type": "bridge", "bridge": "old" });
    fs::write(rig.path("data/c"), old.to_string()).unwrap();
    rig.stub_does("bridge", FAILS);
    rig.call(&Call::new("DEL", "c", &conf)).error();
    assert_eq!(rig.names("data"), ["c"]);
    rig.stub_does("bridge", "");
    rig.call(&Call::new("DEL", "c", &conf)).done();
    assert_eq!(rig.calls("bridge").pop().unwrap()["conf"], old);
    assert_eq!(rig.names("data"), [""; 0]);
    // That of another network is not ours: flannel's plugin has overwritten the one of this network.
    let other = json!({ "name": "net2", "type": "bridge" });
    fs::write(rig.path("data/c"), other.to_string()).unwrap();
    rig.call(&Call::new("DEL", "c", &conf)).done();
    assert_eq!(rig.calls("bridge").pop().unwrap()["conf"]["bridge"], "br-cbr0");
    assert_eq!(rig.names("data"), ["c"]);
}

#[test]
fn a_broken_state_is_made_anew_or_kept_and_named() {
    for (name, text) in [
        ("c", r#"{"type":"bri"#),
        ("cbr0:c:eth0", r#"{"type":"bri"#),
        ("cbr0:c:eth0", ""),
    ] {
        let rig = Rig::with_stub(V4);
        let conf = rig.conf("cbr0", "1.0.0");
        fs::create_dir(rig.path("data")).unwrap();
        let path = rig.path("data").join(name);
        fs::write(&path, text).unwrap();
        rig.lease(None);
        let (code, message) = rig.call(&Call::new("DEL", "c", &conf)).error();
        assert_eq!(code, 999);
        assert!(
            message.starts_with("failed to parse netconf: ") && message.contains(path.to_str().unwrap()),
            "{message}"
        );
        assert_eq!(rig.names("data"), [name]);
        rig.lease(Some(V4));
        rig.call(&Call::new("DEL", "c", &conf)).done();
        assert_eq!(told(&rig.calls("bridge")), ["DEL c eth0 cbr0"]);
        assert_eq!(rig.names("data"), [""; 0]);
    }
}

/// Starts an ADD and waits until its delegate is called.
fn begin(rig: &Rig, conf: &Value) -> std::process::Child {
    rig.stub_does("bridge", "[ $CNI_COMMAND != ADD ] || { touch \"$0.begun\"; sleep 60; }");
    let child = rig.start(&Call::new("ADD", "c", conf));
    let deadline = Instant::now() + Duration::from_secs(30);
    while !rig.plugins().join("bridge.begun").exists() {
        assert!(Instant::now() < deadline, "the delegate was not called");
        thread::sleep(Duration::from_millis(5));
    }
    child
}

#[test]
fn a_del_after_an_add_that_was_killed_knows_what_to_undo() {
    let rig = Rig::with_stub(V4);
    let conf = rig.conf("cbr0", "1.0.0");
    let mut child = begin(&rig, &conf);
    killpg(Pid::from_raw(child.id().try_into().unwrap()), Signal::SIGKILL).unwrap();
    child.wait().unwrap();
    rig.lease(None);
    rig.call(&Call::new("DEL", "c", &conf)).done();
    let calls = rig.calls("bridge");
    assert_eq!(told(&calls), ["ADD c eth0 cbr0", "DEL c eth0 cbr0"]);
    assert_eq!(calls[0]["conf"], calls[1]["conf"]);
    assert_eq!(rig.names("data"), [""; 0]);
}

#[test]
fn what_a_kill_left_of_writing_a_state_goes_with_the_del() {
    let rig = Rig::with_stub(V4);
    let conf = rig.conf("cbr0", "1.0.0");
    fs::create_dir(rig.path("data")).unwrap();
    fs::write(rig.path("data/.cbr0:c:eth0"), r#"{"type":"bri"#).unwrap();
    rig.call(&Call::new("DEL", "c", &conf)).done();
    assert_eq!(rig.names("data"), [""; 0]);
}

#[test]
fn nothing_of_the_configuration_is_shown() {
    let rig = Rig::with_stub(V4);
    let mut conf = rig.conf("cbr0", "1.0.0");
    conf["delegate"]["password"] = "hunter2".into();
    let outcomes = ["ADD", "DEL"].map(|command| rig.call(&Call::new(command, "c", &conf)));
    rig.call(&Call::new("ADD", "c", &conf));
    let mode = |name: &str| fs::metadata(rig.path(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode("data"), mode("data/cbr0:c:eth0")), (0o700, 0o600));
    for outcome in outcomes {
        assert_eq!((outcome.good, outcome.stderr.as_str()), (true, ""));
        assert!(!outcome.stdout.contains("hunter2"));
    }
}

#[test]
fn a_delegate_that_fails_without_a_proper_word_is_quoted() {
    let rig = Rig::with_stub(V4);
    let conf = rig.conf("cbr0", "1.0.0");
    for (does, message) in [
        ("exit 3", "netplugin failed with no error message: exit status: 3"),
        (
            "echo 'it \"broke\"' >&2; exit 1",
            r#"netplugin failed: "it \"broke\"\n""#,
        ),
        (
            "echo oops; exit 1",
            r#"netplugin failed but error parsing its diagnostic message "oops\n": expected value at line 1 column 1"#,
        ),
    ] {
        rig.stub_does("bridge", does);
        assert_eq!(rig.call(&Call::new("ADD", "c", &conf)).error(), (0, message.to_owned()));
    }
    // What it says beside its error is passed on.
    rig.stub_does("bridge", &format!("echo aside >&2; {FAILS}"));
    let outcome = rig.call(&Call::new("ADD", "c", &conf));
    assert_eq!((outcome.error().0, outcome.stderr.as_str()), (77, "aside\n"));
}

#[test]
fn large_configurations_and_answers_pass() {
    let rig = Rig::with_stub(V4);
    let mut conf = rig.conf("cbr0", "1.0.0");
    conf["delegate"]["large"] = "x".repeat(1 << 20).into();
    let much = "head -c 1000000 /dev/zero | tr '\\0' y >&2; printf '{\"cniVersion\":\"1.0.0\",\"z\":\"'; \
                head -c 1000000 /dev/zero | tr '\\0' z; echo '\"}'; exit 0";
    rig.stub_does("bridge", much);
    let outcome = rig.call(&Call::new("ADD", "c", &conf));
    assert_eq!(outcome.result()["z"].as_str().unwrap().len(), 1_000_000);
    assert_eq!(outcome.stderr.len(), 1_000_000);
}

#[test]
fn a_delegate_that_is_being_installed_is_waited_for() {
    let rig = Rig::with_stub(V4);
    let conf = rig.conf("cbr0", "1.0.0");
    let program = rig.plugins().join("true");
    fs::copy("/bin/true", &program).unwrap();
    let mut conf = conf;
    conf["delegate"]["type"] = "true".into();
    let written = fs::OpenOptions::new().append(true).open(&program).unwrap();
    let begun = Instant::now();
    thread::scope(|scope| {
        let done = scope.spawn(|| rig.call(&Call::new("DEL", "c", &conf)));
        thread::sleep(Duration::from_millis(400));
        drop(written);
        done.join().unwrap().done();
    });
    assert!(begun.elapsed() >= Duration::from_millis(400));
}

#[test]
fn the_runtimes_own_namespace_is_refused_before_anything_is_done() {
    let rig = Rig::with_stub(V4);
    let conf = rig.conf("cbr0", "1.0.0");
    for command in ["ADD", "DEL", "CHECK"] {
        let outcome = rig.call(&Call::new(command, "c", &conf).netns("/proc/self/ns/net"));
        let message = "plugin's netns and netns from CNI_NETNS should not be the same";
        assert_eq!(outcome.error(), (8, message.to_owned()));
    }
    assert_eq!((rig.calls("bridge").len(), rig.names("data").len()), (0, 0));
}

#[test]
fn status_says_whether_an_add_would_be_served() {
    let rig = Rig::with_stub(V4);
    let conf = rig.conf("cbr0", "1.1.0");
    let status = || rig.call(&Call::new("STATUS", "", &conf));
    status().done();
    let calls = rig.calls("bridge");
    assert_eq!(
        (calls[0]["command"].as_str(), &calls[0]["conf"]["mtu"]),
        (Some("STATUS"), &json!(1450))
    );
    rig.stub_does("bridge", FAILS);
    assert_eq!(status().error(), (77, "no way".to_owned()));
    rig.stub_does("bridge", "");
    rig.lease(Some("FLANNEL_MTU=1450\n"));
    let (code, message) = status().error();
    assert_eq!(code, 50);
    assert!(message.contains(" is missing FLANNEL_NETWORK, "), "{message}");
    rig.lease(None);
    let (code, message) = status().error();
    assert_eq!(code, 50);
    assert!(
        message.starts_with("failed to load flannel 'subnet.env' file: open "),
        "{message}"
    );
    rig.lease(Some(V4));
    fs::remove_file(rig.plugins().join("bridge")).unwrap();
    let (code, message) = status().error();
    assert_eq!(code, 50);
    assert!(
        message.starts_with("failed to find plugin \"bridge\" in path ["),
        "{message}"
    );
}

#[test]
fn check_asks_the_delegate_with_the_result_of_the_add() {
    let rig = Rig::with_stub(V4);
    let mut conf = rig.conf("cbr0", "0.3.1");
    rig.call(&Call::new("ADD", "c", &conf)).result();
    rig.calls("bridge");
    rig.lease(None);
    rig.stub_does("bridge", FAILS);
    conf["cniVersion"] = "1.0.0".into();
    let check = |conf: &Value| rig.call(&Call::new("CHECK", "c", conf)).error();
    assert_eq!(
        check(&conf),
        (7, "CHECK needs prevResult, the result of the ADD".to_owned())
    );
    conf["prevResult"] = json!({ "cniVersion": "1.0.0", "ips": [1] });
    assert_eq!(check(&conf), (77, "no way".to_owned()));
    let calls = rig.calls("bridge");
    assert_eq!(told(&calls), ["CHECK c eth0 cbr0"]);
    assert_eq!(calls[0]["conf"]["prevResult"], conf["prevResult"]);
    assert_eq!(calls[0]["conf"]["cniVersion"], "1.0.0");
    rig.stub_does("bridge", "");
    assert_eq!(check(&conf).0, 8, "there is no such namespace");
}

#[test]
fn gc_undoes_what_is_no_longer_valid_and_passes_the_list_on() {
    let rig = Rig::with_stub(V4);
    let mut conf = rig.conf("cbr0", "1.1.0");
    let other = rig.conf("net2", "1.1.0");
    for (container, interface, conf) in [
        ("a", "eth0", &conf),
        ("a", "net1", &conf),
        ("b", "eth0", &conf),
        ("c", "eth0", &other),
    ] {
        rig.call(&Call::new("ADD", container, conf).interface(interface))
            .result();
    }
    let old = |network: &str| json!({ "name": network, "type": "bridge" }).to_string();
    for (name, text) in [
        ("a", old("cbr0")),
        ("d", old("cbr0")),
        ("e", old("net2")),
        (".cbr0:f:eth0", "{".to_owned()),
    ] {
        fs::write(rig.path("data").join(name), text).unwrap();
    }
    rig.calls("bridge");
    let before = rig.names("data");
    assert_eq!(
        rig.call(&Call::new("GC", "", &conf)).error().0,
        7,
        "no list is not an empty one"
    );
    assert_eq!((rig.calls("bridge").len(), rig.names("data")), (0, before));

    conf["cni.dev/valid-attachments"] = json!([{ "containerID": "a", "ifname": "eth0" }]);
    rig.stub_does("bridge", &format!("[ \"$CNI_CONTAINERID\" != b ] || {{ {FAILS}; }}"));
    let error = rig.call(&Call::new("GC", "", &conf)).error();
    assert_eq!(error, (77, "b in cbr0: no way".to_owned()));
    let calls = rig.calls("bridge");
    let expected = ["DEL a net1 cbr0", "DEL b eth0 cbr0", "DEL d eth0 cbr0", "GC  eth0 cbr0"];
    assert_eq!(told(&calls), expected, "one that fails does not stop the others");
    assert!(calls.iter().take(3).all(|call| call["netns"] == ""));
    assert_eq!(
        calls[3]["conf"]["cni.dev/valid-attachments"],
        conf["cni.dev/valid-attachments"]
    );
    assert_eq!(
        rig.names("data"),
        ["a", "cbr0:a:eth0", "cbr0:b:eth0", "e", "net2:c:eth0"]
    );

    conf["cni.dev/valid-attachments"] = Value::Null;
    rig.stub_does("bridge", "");
    rig.call(&Call::new("GC", "", &conf)).done();
    assert_eq!(told(&rig.calls("bridge")).len(), 4);
    assert_eq!(rig.names("data"), ["e", "net2:c:eth0"]);
}
