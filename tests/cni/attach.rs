//! Containers that are really attached, by Debian's `bridge` and `host-local`, in network namespaces of their own; with
//! `CNI_PLUGINS=/path` by those there.

use std::thread;
use std::time::Instant;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::namespace::Namespace;
use crate::rig::{Call, Outcome, Rig, V4, V6};

/// A node, and the containers on it.
struct Node {
    namespace: Namespace,
    rig: Rig,
}

impl Node {
    fn new(subnet_env: &str) -> Self {
        let namespace = Namespace::new();
        namespace.command("ip link set lo up");
        Self {
            namespace,
            rig: Rig::new(subnet_env),
        }
    }

    fn call(&self, call: &Call<'_>) -> Outcome {
        self.namespace.run(|| self.rig.call(call))
    }

    fn add(&self, container: &str, at: &Namespace, conf: &Value) -> Value {
        self.call(&Call::new("ADD", container, conf).netns(at.path())).result()
    }

    fn check(&self, container: &str, at: &Namespace, conf: &Value, added: &Value) -> Outcome {
        let mut conf = conf.clone();
        conf["prevResult"] = added.clone();
        self.call(&Call::new("CHECK", container, &conf).netns(at.path()))
    }

    /// How many containers' ends hang on the network's bridge.
    fn ports(&self, network: &str) -> usize {
        let (good, text) = self
            .namespace
            .try_command(&format!("ip -o link show master br-{network}"));
        if good { text.lines().count() } else { 0 }
    }
}

fn addresses(result: &Value) -> Vec<&str> {
    let ips = result["ips"].as_array().expect("addresses");
    ips.iter()
        .map(|ip| ip["address"].as_str().expect("an address"))
        .collect()
}

/// ADD, CHECK, DEL and a second DEL, with all that is to be seen in between.
fn whole_life(subnet_env: &str, expected: &[&str], gateways: &[&str]) {
    let node = Node::new(subnet_env);
    let conf = node.rig.conf("cbr0", "1.0.0");
    let pod = Namespace::new();
    let added = node.add("c", &pod, &conf);
    assert_eq!(addresses(&added), expected);
    assert_eq!(added["cniVersion"], "1.0.0");
    assert_eq!(node.ports("cbr0"), 1);
    assert!(pod.command("ip link show eth0").contains("mtu 1450"));
    for gateway in gateways {
        pod.command(&format!("ping -n -c 1 -W 5 {gateway}"));
        assert!(node.namespace.command("ip address show br-cbr0").contains(gateway));
    }
    assert_eq!(node.rig.addresses("cbr0").len(), expected.len());
    node.check("c", &pod, &conf, &added).done();

    for turn in 0..2 {
        node.call(&Call::new("DEL", "c", &conf).netns(pod.path())).done();
        assert_eq!(
            (node.ports("cbr0"), node.rig.addresses("cbr0").len()),
            (0, 0),
            "DEL {turn}"
        );
        assert!(!pod.try_command("ip link show eth0").0);
        assert_eq!(node.rig.names("data"), [""; 0]);
    }
    // With the namespace gone, and without a word of it.
    let other = Namespace::new();
    node.add("d", &other, &conf);
    drop(other);
    node.call(&Call::new("DEL", "d", &conf).netns("")).done();
    assert_eq!((node.rig.addresses("cbr0").len(), node.rig.names("data").len()), (0, 0));
}

#[test]
#[ignore = "needs root and containernetworking-plugins"]
fn cni_attaches_checks_and_detaches_by_ipv4() {
    whole_life(V4, &["10.244.1.2/24"], &["10.244.1.1"]);
}

#[test]
#[ignore = "needs root and containernetworking-plugins"]
fn cni_attaches_checks_and_detaches_by_ipv6() {
    whole_life(V6, &["fd00:10:244:1::2/64"], &["fd00:10:244:1::1"]);
}

#[test]
#[ignore = "needs root and containernetworking-plugins"]
fn cni_attaches_checks_and_detaches_by_both_families() {
    whole_life(
        &[V4, V6].concat(),
        &["10.244.1.2/24", "fd00:10:244:1::2/64"],
        &["10.244.1.1", "fd00:10:244:1::1"],
    );
}

#[test]
#[ignore = "needs root and containernetworking-plugins"]
fn cni_gives_a_route_to_each_of_two_networks() {
    let node = Node::new(&V4.replace("10.244.0.0/16", "10.244.0.0/16,10.245.0.0/16"));
    let mut conf = node.rig.conf("cbr0", "1.0.0");
    conf["delegate"]["isDefaultGateway"] = false.into();
    let pod = Namespace::new();
    let added = node.add("c", &pod, &conf);
    let routes = pod.command("ip route");
    for network in ["10.244.0.0/16", "10.245.0.0/16"] {
        assert!(
            routes.contains(&format!("{network} via 10.244.1.1 dev eth0")),
            "{routes}"
        );
    }
    node.check("c", &pod, &conf, &added).done();
    // Debian's bridge looks at the routes itself, but not for one that the result does not name.
    let mut unnamed = added.clone();
    unnamed["routes"] = json!([]);
    node.check("c", &pod, &conf, &unnamed).done();
    pod.command("ip route del 10.245.0.0/16");
    let message = "the container has no route to 10.245.0.0/16, which ADD made";
    assert_eq!(
        node.check("c", &pod, &conf, &unnamed).error(),
        (999, message.to_owned())
    );
    pod.command("ip route add default via 10.244.1.1");
    node.check("c", &pod, &conf, &unnamed).done();
}

#[test]
#[ignore = "needs root and containernetworking-plugins"]
fn cni_check_finds_what_is_not_as_add_made_it() {
    let node = Node::new(V4);
    let conf = node.rig.conf("cbr0", "1.0.0");
    let pod = Namespace::new();
    let added = node.add("c", &pod, &conf);
    // A chained plugin may have made it smaller.
    pod.command("ip link set eth0 mtu 1400");
    node.check("c", &pod, &conf, &added).done();
    pod.command("ip link set eth0 mtu 1500");
    let message = "eth0 has an MTU of 1500, and the network carries 1450: larger packets are lost";
    assert_eq!(node.check("c", &pod, &conf, &added).error(), (999, message.to_owned()));
    pod.command("ip address flush dev eth0");
    node.check("c", &pod, &conf, &added).error();
}

#[test]
#[ignore = "needs root and containernetworking-plugins"]
fn cni_attaches_a_container_to_two_networks_and_detaches_it_from_both() {
    let node = Node::new(V4);
    let (one, mut two) = (node.rig.conf("cbr0", "1.0.0"), node.rig.conf("net2", "1.0.0"));
    two["delegate"]["isDefaultGateway"] = false.into();
    let pod = Namespace::new();
    node.add("c", &pod, &one);
    let second = |command| Call::new(command, "c", &two).interface("net1").netns(pod.path());
    node.call(&second("ADD")).result();
    assert_eq!((node.ports("cbr0"), node.ports("net2")), (1, 1));
    node.call(&second("DEL")).done();
    assert_eq!((node.ports("cbr0"), node.ports("net2")), (1, 0));
    node.call(&Call::new("DEL", "c", &one).netns(pod.path())).done();
    let left = (
        node.ports("cbr0"),
        node.rig.addresses("cbr0").len(),
        node.rig.addresses("net2").len(),
    );
    assert_eq!(left, (0, 0, 0));
}

#[test]
#[ignore = "needs root and containernetworking-plugins"]
fn cni_attaches_by_the_configuration_of_deploy_and_hands_its_result_on_to_portmap() {
    let list: Value = serde_json::from_str(include_str!("../../deploy/cni-conf.json")).unwrap();
    let entry = |index: usize, more: Value| {
        let mut entry = list["plugins"][index].clone();
        let more = more.as_object().unwrap().clone();
        entry.as_object_mut().unwrap().extend(more);
        for key in ["name", "cniVersion"] {
            entry[key] = list[key].clone();
        }
        entry
    };
    let node = Node::new(V4);
    let ours = node.rig.conf("cbr0", "");
    let keys = ["subnetFile", "dataDir", "ipam"].map(|key| (key.to_owned(), ours[key].clone()));
    let conf = entry(0, Value::Object(keys.into_iter().collect()));
    let pod = Namespace::new();
    let added = node.add("c", &pod, &conf);
    assert!(pod.command("ip route").contains("default via 10.244.1.1 dev eth0"));
    assert!(node.namespace.command("bridge -d link show").contains("hairpin on"));
    node.check("c", &pod, &conf, &added).done();

    let ports = json!({ "portMappings": [{ "hostPort": 8080, "containerPort": 80, "protocol": "tcp" }] });
    let chained = entry(1, json!({ "prevResult": added, "runtimeConfig": ports }));
    let portmap = |command| {
        let call = Call::new(command, "c", &chained).netns(pod.path());
        node.namespace
            .run(|| node.rig.call_plugin(&node.rig.plugins().join("portmap"), &call))
    };
    assert_eq!(portmap("ADD").result()["ips"], added["ips"]);
    let rules = || {
        let (nft, iptables) = (
            node.namespace.try_command("nft list ruleset").1,
            node.namespace.command("iptables -t nat -S"),
        );
        nft + &iptables
    };
    assert!(rules().contains("10.244.1.2:80"), "{}", rules());
    portmap("DEL").done();
    node.call(&Call::new("DEL", "c", &conf).netns(pod.path())).done();
}

#[test]
#[ignore = "needs root and containernetworking-plugins"]
fn cni_gives_twenty_containers_at_once_an_address_each() {
    let node = Node::new(V4);
    let conf = node.rig.conf("cbr0", "1.0.0");
    let pods: Vec<_> = (0..20).map(|number| (format!("c{number}"), Namespace::new())).collect();
    let mut found: Vec<_> = thread::scope(|scope| {
        let adds: Vec<_> = pods
            .iter()
            .map(|(name, pod)| scope.spawn(|| addresses(&node.add(name, pod, &conf))[0].to_owned()))
            .collect();
        adds.into_iter().map(|add| add.join().unwrap()).collect()
    });
    found.sort();
    found.dedup();
    assert_eq!(found.len(), 20, "{found:?}");
    assert_eq!((node.ports("cbr0"), node.rig.names("data").len()), (20, 20));
    thread::scope(|scope| {
        for (name, pod) in &pods {
            scope.spawn(|| node.call(&Call::new("DEL", name, &conf).netns(pod.path())).done());
        }
    });
    let left = (
        node.ports("cbr0"),
        node.rig.addresses("cbr0").len(),
        node.rig.names("data").len(),
    );
    assert_eq!(left, (0, 0, 0));
}

#[test]
#[ignore = "needs root and containernetworking-plugins"]
fn cni_undoes_an_add_that_was_killed_anywhere() {
    let node = Node::new(V4);
    let conf = node.rig.conf("cbr0", "1.0.0");
    // How long one takes here, so that the ends are spread over all of it.
    let whole = (0..3).map(|_| {
        let pod = Namespace::new();
        let began = Instant::now();
        node.add("c", &pod, &conf);
        let took = began.elapsed();
        node.call(&Call::new("DEL", "c", &conf).netns(pod.path())).done();
        took
    });
    let whole = whole.max().expect("three of them");
    let mut killed = 0;
    for turn in 0..30u32 {
        let pod = Namespace::new();
        let add = Call::new("ADD", "c", &conf).netns(pod.path());
        let mut child = node.namespace.run(|| node.rig.start(&add));
        thread::sleep(whole * turn / 30);
        killpg(Pid::from_raw(child.id().try_into().unwrap()), Signal::SIGKILL).unwrap();
        killed += u32::from(!child.wait().unwrap().success());
        node.call(&Call::new("DEL", "c", &conf).netns(pod.path())).done();
        // host-local makes an address's file and then writes into it who has the address. Killed between the two it leaves
        // an empty file, which no DEL of its own will ever find: not ours to mend.
        let (nobodys, somebodys): (Vec<_>, Vec<_>) = node.rig.addresses("cbr0").into_iter().partition(|address| {
            let text = node.rig.reservation("cbr0", address);
            text.is_empty()
        });
        for address in nobodys {
            node.rig.free("cbr0", &address);
        }
        assert_eq!((somebodys, node.rig.names("data")), (vec![], vec![]), "after {turn}");
        // The container can be attached as if nothing had been.
        node.add("c", &pod, &conf);
        node.call(&Call::new("DEL", "c", &conf).netns(pod.path())).done();
    }
    assert!(killed >= 5, "{killed} of 30 were killed in the middle");
}

#[test]
#[ignore = "needs root and containernetworking-plugins"]
fn cni_gc_gives_back_the_addresses_of_containers_that_are_gone() {
    let node = Node::new(V4);
    let conf = node.rig.conf("cbr0", "1.0.0");
    let pods: Vec<_> = ["a", "b", "c"].map(|name| (name, Namespace::new())).into();
    for (name, pod) in &pods {
        node.add(name, pod, &conf);
    }
    drop(pods);
    let mut gc = node.rig.conf("cbr0", "1.1.0");
    gc["cni.dev/valid-attachments"] = json!([{ "containerID": "b", "ifname": "eth0" }]);
    let outcome = node.call(&Call::new("GC", "", &gc));
    assert_eq!(node.rig.addresses("cbr0"), ["10.244.1.3"]);
    assert_eq!(node.rig.names("data"), ["cbr0:b:eth0"]);
    // Debian 12's bridge is older than GC and says so in its way; a newer one is content.
    if !outcome.good {
        assert_eq!(outcome.error(), (3, "missing containerID".to_owned()));
    }
}
