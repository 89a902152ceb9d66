//! The Kubernetes store against a real API server with a real etcd. `tests/run kube` builds the server and runs these;
//! without it they are ignored.
//!
//! What flannel's own tests do with a cluster (the names are ours: F of its functional tests, E of its end-to-end tests), and
//! where it is done here:
//!
//! | scenario | test |
//! |---|---|
//! | F4: `public-ip-overwrite` becomes `public-ip` | `the_daemon_serves_flannels_cluster_with_flannels_flags` |
//! | F5: the manifest is accepted | `the_manifests_are_accepted_and_have_the_names_of_flannels_documentation` |
//! | E1, E4, E6: vxlan, host-gw, udp; pods of the plugin reach each other, the rules are these | `test_pods_of_the_plugin_talk_on_every_backend_and_over_a_minute_without_the_server` |
//! | E8: the same in both families | the same test; with nf_tables `test_masquerade.py` (host-gw-nftables) and `nft_lists_the_plain_table_as_it_is_meant` |
//! | E9: a pod is deleted and made anew | the same test |
//! | E10: the DaemonSet is restarted node by node, subnets stay | the same test |
//!
//! What a rollout of a DaemonSet and CoreDNS add needs a kubelet, and is not shown here.

#[expect(dead_code, reason = "the tests of the etcd store use the rest")]
#[path = "etcd/cluster.rs"]
mod cluster;
mod kube {
    mod daemon;
    mod deploy;
    mod double;
    pub(crate) mod events;
    mod faults;
    mod mesh;
    mod secret;
    pub(crate) mod server;
}

use std::time::Duration;

use ::kube::api::{Patch, PatchParams};
use ipnet::IpNet;
use kube::server::{RULES, Server, shared};
use ringmail::config::{Context, NetConf};
use ringmail::lease::{Addresses, BackendData, Lease, Network, NodeName, Roster, Subnets};
use ringmail::store::kube::{Access, Datapath, Keys, Kube, Own};
use ringmail::store::{Claim, Store, StoreError};
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

const V4: &str = r#""Network": "10.10.0.0/16""#;
const DUAL: &str = r#""Network": "10.10.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:10::/48""#;

fn network(text: &str) -> Network {
    let json = format!(r#"{{{text}, "Backend": {{"Type": "vxlan"}}}}"#);
    let context = Context {
        file: "test",
        psk_file: None,
        psk_secret: None,
    };
    NetConf::parse(&json, &context).expect("a configuration").network
}

pub(crate) fn name(text: &str) -> NodeName {
    NodeName::new(text).expect("a name")
}

fn subnets(text: &str) -> Subnets {
    text.split(' ')
        .map(|net| net.parse::<IpNet>().expect("a net"))
        .collect()
}

/// A lease of vxlan.
fn lease(node: &str, nets: &str, last: u8) -> Lease {
    let nets = subnets(nets);
    let data = |family: u8| json!({"VNI": 1, "VtepMAC": format!("02:00:00:00:{family:02x}:{last:02x}")});
    Lease {
        node: name(node),
        subnets: nets,
        public: Addresses {
            v4: nets.v4.map(|_| [192, 0, 2, last].into()),
            v6: nets.v6.map(|_| format!("fd00::{last:x}").parse().expect("an address")),
        },
        backend: "vxlan".into(),
        data: nets.v4.map_or(BackendData::NULL, |_| data(4).into()),
        v6_data: nets.v6.map_or(BackendData::NULL, |_| data(6).into()),
    }
}

async fn open(access: Access) -> Store {
    let opened = timeout(Duration::from_secs(20), Store::open_kube(access)).await;
    opened.expect("the API server answers").expect("it is opened")
}

fn claim() -> Claim {
    Claim {
        previous: None,
        public: Addresses::default(),
        random: 0,
    }
}

/// Waits until the roster is as `wanted`.
async fn shows(store: &Store, what: &str, wanted: impl FnMut(&Roster) -> bool) {
    let mut roster: watch::Receiver<Roster> = store.roster();
    let waited = timeout(Duration::from_secs(40), roster.wait_for(wanted)).await;
    assert!(waited.is_ok(), "{what}: {:?}", store.roster().borrow());
}

fn held(store: &Store, node: &str) -> Option<Lease> {
    store.roster().borrow().get(&name(node)).map(|held| Lease::clone(held))
}

#[tokio::test]
#[ignore = "needs kube-apiserver"]
async fn what_is_written_is_flannels_annotations_and_nothing_is_written_twice() {
    let server = shared().await;
    let prefix = "written.test/flannel-";
    server.add("written-1", "10.10.1.0/24").await;
    server.annotate("written-1", json!({"other.org/own": "stays"})).await;
    let store = open(server.access(prefix, "written-1")).await;
    let before = server.get("written-1").await.metadata.resource_version;
    let got = store
        .acquire(&name("written-1"), &network(V4), &claim())
        .await
        .expect("its podCIDR");
    assert_eq!((got.subnets, got.slot.get()), (subnets("10.10.1.0/24"), 1));
    assert!(got.previous.is_none());
    assert_eq!(
        server.get("written-1").await.metadata.resource_version,
        before,
        "a podCIDR is taken already"
    );

    let lease = lease("written-1", "10.10.1.0/24", 3);
    store.publish(&lease).await.expect("published");
    assert_eq!(
        held(&store, "written-1").as_ref(),
        Some(&lease),
        "the roster shows it on return"
    );
    assert_eq!(
        server.notes("written-1", prefix).await,
        "backend-data {\"VNI\":1,\"VtepMAC\":\"02:00:00:00:04:03\"}\nbackend-type vxlan\nkube-subnet-manager true\n\
         public-ip 192.0.2.3\n"
    );
    assert_eq!(server.notes("written-1", "other.org/").await, "own stays\n");

    let written = server.get("written-1").await.metadata.resource_version;
    for _ in 0..3 {
        store.publish(&lease).await.expect("nothing to do");
    }
    let again = open(server.access(prefix, "written-1")).await;
    let got = again
        .acquire(&name("written-1"), &network(V4), &claim())
        .await
        .expect("again");
    assert_eq!(got.previous.as_ref(), Some(&lease), "what an earlier process published");
    again.publish(&lease).await.expect("nothing to do");
    assert_eq!(
        server.get("written-1").await.metadata.resource_version,
        written,
        "nothing differs, nothing is written"
    );

    store
        .release(&name("written-1"), &subnets("10.10.9.0/24"))
        .await
        .expect("not ours");
    assert!(held(&store, "written-1").is_some());
    store
        .release(&name("written-1"), &lease.subnets)
        .await
        .expect("released");
    assert_eq!(server.notes("written-1", prefix).await, "");
    shows(&again, "the lease is gone", |roster| roster.leases().count() == 0).await;
}

#[tokio::test]
#[ignore = "needs kube-apiserver"]
async fn a_snapshot_then_changes_of_the_nodes_that_are_flannels() {
    let server = shared().await;
    let prefix = "changes.test";
    for (node, pods) in [
        ("changes-1", "10.10.1.0/24"),
        ("changes-2", "10.10.2.0/24"),
        ("changes-3", "10.10.3.0/24"),
    ] {
        server.add(node, pods).await;
    }
    // As flannel itself writes it, on a Node that was there before.
    let flannels = |last: u8| {
        json!({
            "changes.test/kube-subnet-manager": "true", "changes.test/backend-type": "vxlan",
            "changes.test/backend-data": format!("{{\"VNI\":1,\"VtepMAC\":\"02:00:00:00:04:{last:02x}\"}}"),
            "changes.test/public-ip": format!("192.0.2.{last}"),
        })
    };
    server.annotate("changes-2", flannels(2)).await;
    let store = open(server.access(prefix, "changes-1")).await;
    assert_eq!(held(&store, "changes-2"), Some(lease("changes-2", "10.10.2.0/24", 2)));
    assert_eq!(store.roster().borrow().leases().count(), 1);

    server.annotate("changes-3", flannels(3)).await;
    server.annotate("changes-2", flannels(4)).await;
    // A Node that the watch is the first to show: its podCIDR is no metadata.
    server.add("changes-4", "10.10.4.0/24").await;
    server.annotate("changes-4", flannels(5)).await;
    // One that is there before its podCIDR is.
    server.add("changes-5", "").await;
    server.annotate("changes-5", flannels(6)).await;
    shows(&store, "three of them", |roster| {
        roster.get(&name("changes-2")).map(|held| Lease::clone(held)) == Some(lease("changes-2", "10.10.2.0/24", 4))
            && roster.get(&name("changes-3")).is_some()
            && roster
                .get(&name("changes-4"))
                .is_some_and(|held| held.subnets == subnets("10.10.4.0/24"))
            && roster
                .rejected()
                .get("changes-5")
                .is_some_and(|why| why.contains("pod cidr not assigned"))
    })
    .await;
    let spec = json!({"spec": {"podCIDR": "10.10.5.0/24", "podCIDRs": ["10.10.5.0/24"]}});
    let assigned = server
        .nodes()
        .await
        .patch("changes-5", &PatchParams::default(), &Patch::Merge(spec))
        .await;
    assigned.expect("assigned");
    shows(&store, "the late one", |roster| {
        roster.get(&name("changes-5")).is_some() && roster.rejected().is_empty()
    })
    .await;

    server
        .annotate("changes-3", json!({"changes.test/kube-subnet-manager": null}))
        .await;
    server.remove("changes-2").await;
    shows(&store, "two of them gone", |roster| {
        roster.get(&name("changes-2")).is_none() && roster.get(&name("changes-3")).is_none()
    })
    .await;
}

#[tokio::test]
#[ignore = "needs kube-apiserver"]
async fn the_families_stand_apart() {
    let server = shared().await;
    let prefix = "dual.test";
    for node in ["dual-1", "dual-2", "dual-3"] {
        let last = &node[5..];
        server
            .add(node, &format!("10.10.{last}.0/24 fd00:10:0:{last}::/64"))
            .await;
    }
    let store = open(server.access(prefix, "dual-1")).await;
    let got = store
        .acquire(&name("dual-1"), &network(DUAL), &claim())
        .await
        .expect("both podCIDRs");
    assert_eq!(got.subnets, subnets("10.10.1.0/24 fd00:10:0:1::/64"));
    let both = lease("dual-1", "10.10.1.0/24 fd00:10:0:1::/64", 1);
    store.publish(&both).await.expect("published");
    assert_eq!(held(&store, "dual-1"), Some(both));
    assert!(
        server
            .notes("dual-1", "dual.test/")
            .await
            .contains("public-ipv6 fd00::1\n")
    );

    // A mesh of one family on Nodes with two, and an address that is none.
    let other = open(server.access(prefix, "dual-2")).await;
    let got = other
        .acquire(&name("dual-2"), &network(V4), &claim())
        .await
        .expect("one of them");
    assert_eq!(got.subnets, subnets("10.10.2.0/24"));
    other
        .publish(&lease("dual-2", "10.10.2.0/24", 2))
        .await
        .expect("published");
    let odd = json!({
        "dual.test/kube-subnet-manager": "true", "dual.test/backend-type": "vxlan", "dual.test/public-ip": "nowhere",
        "dual.test/backend-v6-data": "{}", "dual.test/public-ipv6": "fd00::3",
    });
    server.annotate("dual-3", odd).await;
    shows(&store, "each as it is", |roster| {
        let of = |node| roster.get(&name(node)).map(|held| held.subnets);
        of("dual-2") == Some(subnets("10.10.2.0/24")) && of("dual-3") == Some(subnets("fd00:10:0:3::/64"))
    })
    .await;
    let odd = store.roster().borrow().rejected().clone();
    assert_eq!(odd["dual-3"], "public-ip is \"nowhere\": an IPv4 address is needed");
    // Each family by itself: IPv4 alone changes, and IPv6 is given up.
    let mut moved = lease("dual-1", "10.10.1.0/24 fd00:10:0:1::/64", 1);
    moved.public.v4 = Some([192, 0, 2, 77].into());
    store.publish(&moved).await.expect("published");
    shows(&other, "IPv4 moved", |roster| {
        roster.get(&name("dual-1")).is_some_and(|held| **held == moved)
    })
    .await;
    store
        .publish(&lease("dual-1", "10.10.1.0/24", 1))
        .await
        .expect("published");
    shows(&other, "IPv6 gone", |roster| {
        roster
            .get(&name("dual-1"))
            .is_some_and(|held| **held == lease("dual-1", "10.10.1.0/24", 1))
    })
    .await;
}

#[tokio::test]
#[ignore = "needs kube-apiserver"]
async fn an_operators_annotations_are_wishes_of_the_own_node() {
    let server = shared().await;
    server.add("wishes-1", "10.10.1.0/24").await;
    server
        .annotate("wishes-1", json!({"wishes.test/node-public-ip": "10.0.0.7"}))
        .await;
    let kube = Kube::open(server.access("wishes.test", "wishes-1"))
        .await
        .expect("opened");
    let mut wishes = kube.wishes();
    assert_eq!(wishes.borrow().uplink.to_string(), "10.0.0.7");
    assert_eq!(wishes.borrow().advertised, Addresses::default());
    let overwrite = json!({"wishes.test/public-ip-overwrite": "172.18.0.2", "wishes.test/public-ipv6-overwrite": "x"});
    server.annotate("wishes-1", overwrite).await;
    let asked = timeout(
        Duration::from_secs(10),
        wishes.wait_for(|now| now.advertised.to_string() == "172.18.0.2"),
    );
    assert!(asked.await.is_ok(), "{:?}", kube.wishes().borrow());
}

#[tokio::test]
#[ignore = "needs kube-apiserver"]
async fn wiped_annotations_are_put_back_and_anothers_are_not_fought_over() {
    let server = shared().await;
    let prefix = "wiped.test/";
    server.add("wiped-1", "10.10.1.0/24").await;
    let store = open(server.access(prefix, "wiped-1")).await;
    store
        .acquire(&name("wiped-1"), &network(V4), &claim())
        .await
        .expect("acquired");
    let own = lease("wiped-1", "10.10.1.0/24", 1);
    store.publish(&own).await.expect("published");
    let written = server.notes("wiped-1", prefix).await;
    let all = ["kube-subnet-manager", "backend-type", "backend-data", "public-ip"];
    for wiped in [&all[..], &all[..1], &all[3..]] {
        let gone: serde_json::Map<_, _> = wiped
            .iter()
            .map(|note| (format!("{prefix}{note}"), Value::Null))
            .collect();
        server.annotate("wiped-1", gone.into()).await;
        shows(&store, "the loss is seen", |roster| {
            roster.get(&name("wiped-1")).is_none_or(|held| **held != own)
        })
        .await;
        store.publish(&own).await.expect("published again");
        assert_eq!(server.notes("wiped-1", prefix).await, written);
    }
    // Another hand: put right once, and not at its pace.
    server
        .annotate("wiped-1", json!({"wiped.test/public-ip": "192.0.2.66"}))
        .await;
    store.publish(&own).await.expect("put right");
    server
        .annotate("wiped-1", json!({"wiped.test/public-ip": "192.0.2.66"}))
        .await;
    let refused = store.publish(&own).await.expect_err("not at once again");
    assert!(
        refused.is_transient() && refused.to_string().contains("second daemon"),
        "{refused}"
    );
    sleep(Duration::from_secs(10)).await;
    store.publish(&own).await.expect("put right");
    assert_eq!(server.notes("wiped-1", prefix).await, written);
}

#[tokio::test]
#[ignore = "needs kube-apiserver"]
async fn a_node_made_anew_moves_its_lease_to_the_new_pod_cidr() {
    let server = shared().await;
    server.add("anew-1", "10.10.1.0/24").await;
    let store = open(server.access("anew.test", "anew-1")).await;
    let other = open(server.access("anew.test", "other")).await;
    store
        .acquire(&name("anew-1"), &network(V4), &claim())
        .await
        .expect("acquired");
    let own = lease("anew-1", "10.10.1.0/24", 1);
    store.publish(&own).await.expect("published");
    shows(&other, "published", |roster| roster.get(&name("anew-1")).is_some()).await;
    server.remove("anew-1").await;
    for store in [&store, &other] {
        shows(store, "deleted", |roster| roster.get(&name("anew-1")).is_none()).await;
    }
    let gone = store.publish(&own).await.expect_err("there is no Node");
    assert!(
        gone.is_transient() && gone.to_string().contains("the kubelet makes it"),
        "{gone}"
    );
    server.add("anew-1", "10.10.8.0/24").await;
    let moved = store.publish(&own).await.expect_err("it has another podCIDR");
    let StoreError::Moved { assigned, .. } = moved else {
        panic!("{moved}")
    };
    assert_eq!(assigned, subnets("10.10.8.0/24"));
    let got = store
        .acquire(&name("anew-1"), &network(V4), &claim())
        .await
        .expect("acquired");
    assert_eq!(got.subnets, assigned);
    let now = lease("anew-1", "10.10.8.0/24", 1);
    store.publish(&now).await.expect("published");
    for store in [&store, &other] {
        shows(store, "moved", |roster| {
            roster.get(&name("anew-1")).is_some_and(|held| **held == now)
        })
        .await;
    }
    assert_eq!(other.roster().borrow().leases().count(), 1);
}

#[tokio::test]
#[ignore = "needs kube-apiserver"]
async fn what_a_node_can_not_take_is_said_in_flannels_words() {
    let server = shared().await;
    for (node, pods, transient, text) in [
        ("odd-1", "", true, "node \"odd-1\" pod cidr not assigned"),
        (
            "odd-2",
            "10.99.1.0/24",
            false,
            "subnet \"10.10.0.0/16\" specified in the flannel net config doesn't contain \"10.99.1.0/24\" PodCIDR of the \"odd-2\" node",
        ),
        ("odd-3", "10.10.1.0/25", false, "set SubnetLen to 25 in net-conf.json"),
    ] {
        server.add(node, pods).await;
        let store = open(server.access("odd.test", node)).await;
        let refused = store
            .acquire(&name(node), &network(V4), &claim())
            .await
            .expect_err(node);
        assert!(
            refused.to_string().contains(text) && refused.is_transient() == transient,
            "{refused}"
        );
        server.remove(node).await;
    }
    server.add("odd-4", "10.10.4.0/24").await;
    let store = open(server.access("odd.test", "odd-4")).await;
    let refused = store
        .acquire(&name("odd-4"), &network(DUAL), &claim())
        .await
        .expect_err("one family of two");
    assert!(refused.to_string().contains("one subnet for each family"), "{refused}");
}

#[tokio::test]
#[ignore = "needs kube-apiserver"]
async fn the_condition_follows_the_datapath() {
    let server = shared().await;
    server.add("condition-1", "10.10.1.0/24").await;
    let kube = Kube::open(server.access("condition.test", "condition-1"))
        .await
        .expect("opened");
    let (datapath, follows) = watch::channel(Datapath::Starting);
    let reporting = tokio::spawn({
        let kube = kube.clone();
        async move { kube.report(follows).await }
    });
    let says = async |wanted: Option<(&str, &str)>| {
        let node = server.get("condition-1").await;
        let conditions = node.status.and_then(|status| status.conditions).unwrap_or_default();
        let found = conditions.into_iter().find(|one| one.type_ == "NetworkUnavailable");
        let found = found.map(|one| (one.status, one.message.unwrap_or_default()));
        match wanted {
            None => found.is_none(),
            Some((status, text)) => found.is_some_and(|(is, message)| is == status && message.contains(text)),
        }
    };
    let comes = async |what: &str, wanted| {
        for _ in 0..200 {
            if says(wanted).await {
                return;
            }
            sleep(Duration::from_millis(100)).await;
        }
        panic!("{what}");
    };
    sleep(Duration::from_millis(500)).await;
    assert!(says(None).await, "nothing is known yet");
    datapath.send_replace(Datapath::Works);
    comes("it works", Some(("False", "in order"))).await;
    // What is repaired at once is no news.
    let before = server.get("condition-1").await.metadata.resource_version;
    datapath.send_replace(Datapath::Broken("a hiccup".into()));
    sleep(Duration::from_secs(2)).await;
    datapath.send_replace(Datapath::Works);
    sleep(Duration::from_millis(500)).await;
    assert_eq!(server.get("condition-1").await.metadata.resource_version, before);
    // Another hand, such as a cloud's.
    let status = json!({"status": {"conditions": [{"type": "NetworkUnavailable", "status": "True", "reason": "X"}]}});
    let nodes = server.nodes().await;
    let set = nodes
        .patch_status("condition-1", &PatchParams::default(), &Patch::Strategic(status))
        .await;
    set.expect("set");
    comes("it is put right", Some(("False", "in order"))).await;
    datapath.send_replace(Datapath::Broken("the guard can't be made".into()));
    comes("it is broken for long", Some(("True", "the guard can't be made"))).await;
    server.remove("condition-1").await;
    server.add("condition-1", "10.10.1.0/24").await;
    comes(
        "a Node made anew says it too",
        Some(("True", "the guard can't be made")),
    )
    .await;
    datapath.send_replace(Datapath::Works);
    comes("it works again", Some(("False", "in order"))).await;
    reporting.abort();
}

#[tokio::test]
#[ignore = "needs kube-apiserver"]
async fn an_outage_keeps_the_roster_and_nothing_is_lost_or_kept_over_it() {
    let mut server = Server::start().await;
    let prefix = "flannel.alpha.coreos.com";
    let mut stores = Vec::new();
    for last in 1..=3_u8 {
        let node = format!("node-{last}");
        server.add(&node, &format!("10.10.{last}.0/24")).await;
        let store = open(server.access(prefix, &node)).await;
        store
            .acquire(&name(&node), &network(V4), &claim())
            .await
            .expect("acquired");
        store
            .publish(&lease(&node, &format!("10.10.{last}.0/24"), last))
            .await
            .expect("published");
        stores.push(store);
    }
    let store = &stores[0];
    shows(store, "all", |roster| roster.leases().count() == 3).await;

    server.down();
    let health = |store: &Store| (store.health().reading.is_some(), store.health().writing.is_some());
    for _ in 0..200 {
        if health(store).0 {
            break;
        }
        sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(health(store), (true, false));
    let mut changed = lease("node-1", "10.10.1.0/24", 9);
    let refused = store.publish(&changed).await.expect_err("it is away");
    assert!(refused.is_transient(), "{refused}");
    assert_eq!(health(store), (true, true));
    assert_eq!(
        store.roster().borrow().leases().count(),
        3,
        "an outage is no empty roster"
    );
    server.up();
    server.answers().await;
    shows(store, "as before", |roster| roster.leases().count() == 3).await;
    sooner_or_later(async || store.publish(&changed).await).await;
    for store in &stores {
        shows(store, "what was said after the outage", |roster| {
            roster.get(&name("node-1")).is_some_and(|held| **held == changed)
        })
        .await;
    }
    for _ in 0..300 {
        if health(store) == (false, false) {
            break;
        }
        sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(health(store), (false, false));

    // While a store is cut off a Node is deleted, one is changed, one is made; then history is thrown away.
    let away = open(server.access(prefix, "node-1")).await;
    let port = server.elsewhere(None).await;
    server.remove("node-2").await;
    changed.public.v4 = Some([192, 0, 2, 10].into());
    let mut late = lease("node-4", "10.10.4.0/24", 4);
    server.add("node-4", "10.10.4.0/24").await;
    let notes = json!({
        format!("{prefix}/kube-subnet-manager"): "true", format!("{prefix}/backend-type"): "vxlan",
        format!("{prefix}/backend-data"): late.data.to_string(), format!("{prefix}/public-ip"): "192.0.2.4",
    });
    server.annotate("node-4", notes).await;
    server
        .annotate("node-1", json!({format!("{prefix}/public-ip"): "192.0.2.10"}))
        .await;
    server.compact();
    server.elsewhere(Some(port)).await;
    late.v6_data = BackendData::NULL;
    shows(&away, "all that was missed", |roster| {
        roster.get(&name("node-2")).is_none()
            && roster.get(&name("node-4")).is_some_and(|held| **held == late)
            && roster.get(&name("node-1")).is_some_and(|held| **held == changed)
    })
    .await;
    assert_eq!(away.roster().borrow().leases().count(), 3);
}

#[tokio::test]
#[ignore = "needs kube-apiserver"]
async fn every_right_is_needed_and_no_other() {
    let server = Server::start().await;
    server.add("rights-1", "10.10.1.0/24").await;
    let rules: Vec<Value> = serde_json::from_str(RULES).expect("rules");
    let without = |resource: &str, verb: &str| {
        let mut rules = rules.clone();
        for rule in rules.iter_mut().filter(|rule| rule["resources"][0] == resource) {
            rule["verbs"].as_array_mut().expect("verbs").retain(|one| one != verb);
        }
        rules.retain(|rule| rule["verbs"] != json!([]));
        serde_json::to_string(&rules).expect("JSON")
    };
    // Everything that the daemon asks of the server; the word of the first call that it refuses.
    let attempt = async || -> Result<(), String> {
        let pod = Access {
            own: Own::OfPod {
                namespace: "default".into(),
                name: "none".into(),
            },
            ..server.access("rights.test", "rights-1")
        };
        // A Pod that is not there is an answer; one that must not be asked for is waited for.
        match timeout(Duration::from_secs(2), Kube::open(pod)).await {
            Ok(refused) => assert!(refused.expect_err("no Pod").to_string().contains("no such Pod")),
            Err(_) => return Err("pods get".into()),
        }
        let opened = timeout(
            Duration::from_secs(2),
            Kube::open(server.access("rights.test", "rights-1")),
        );
        let Ok(Ok(opened)) = opened.await else {
            return Err("nodes list".into());
        };
        let store = Store::Kube(opened.clone());
        let found = store.acquire(&name("rights-1"), &network(V4), &claim()).await;
        found.map_err(|error| error.to_string())?;
        sleep(Duration::from_secs(2)).await;
        if let Some(trouble) = store.health().reading {
            return Err(trouble.error);
        }
        let published = store.publish(&lease("rights-1", "10.10.1.0/24", 1)).await;
        published.map_err(|error| error.to_string())?;
        let released = store.release(&name("rights-1"), &subnets("10.10.1.0/24")).await;
        released.map_err(|error| error.to_string())?;
        kube::events::attempt(&server, &opened, "rights-1").await
    };
    attempt().await.expect("these rights are enough");
    for (resource, verb) in [
        ("pods", "get"),
        ("nodes", "list"),
        ("nodes", "get"),
        ("nodes", "watch"),
        ("nodes/status", "patch"),
        ("events", "create"),
        ("events", "patch"),
    ] {
        server.allow(&without(resource, verb)).await;
        // The server learns of a rule from its own watch.
        sleep(Duration::from_millis(500)).await;
        let refused = attempt().await.expect_err(&format!("{verb} {resource} is needed"));
        let resource = resource.split('/').next().expect("a word");
        assert!(
            refused.contains(verb) && refused.contains(resource),
            "{verb} {resource}: {refused}"
        );
    }
}

#[tokio::test]
#[ignore = "needs kube-apiserver"]
async fn who_is_not_known_is_told_and_waits() {
    let server = shared().await;
    let key = Keys::of("stranger.test").expect("a prefix");
    let access = Access {
        kubeconfig: Some(server.kubeconfig("nobody")),
        url: Some(server.url()),
        keys: key.clone(),
        own: Own::Named(name("stranger-1")),
    };
    assert!(
        timeout(Duration::from_secs(1), Store::open_kube(access.clone()))
            .await
            .is_err()
    );
    let wrong = async |access: Access| Store::open_kube(access).await.expect_err("can't be right").to_string();
    let mut other = access.clone();
    other.url = Some("127.0.0.1:6443".into());
    assert!(wrong(other.clone()).await.contains("is no URL of an API server"));
    other.kubeconfig = Some("/nowhere/kubeconfig".into());
    other.url = None;
    assert!(wrong(other.clone()).await.contains("/nowhere/kubeconfig"));
    other.kubeconfig = None;
    assert!(
        wrong(other)
            .await
            .contains("outside of a Pod give --kubeconfig-file or --kube-api-url")
    );
}

/// Repeats a call while its failure may go by itself, as the daemon does.
async fn sooner_or_later<T>(mut call: impl AsyncFnMut() -> Result<T, StoreError>) -> T {
    let trying = async {
        loop {
            match call().await {
                Ok(value) => break value,
                Err(error) => assert!(error.is_transient(), "{error}"),
            }
            sleep(Duration::from_millis(100)).await;
        }
    };
    timeout(Duration::from_secs(30), trying).await.expect("in time")
}
