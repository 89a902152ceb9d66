//! The etcd store against real etcd servers, on loopback, each with a folder of its own. Needs Debian's etcd-server,
//! etcd-client and openssl; a machine without them has failed these tests.

mod etcd {
    pub(crate) mod cluster;
    pub(crate) mod relay;
    mod verbs;
}

use std::collections::BTreeSet;
use std::time::Duration;

use etcd::cluster::{Cluster, Tls, ctl};
use etcd::relay::Relay;
use ipnet::IpNet;
use ringmail::config::{Context, NetConf};
use ringmail::lease::{Addresses, BackendData, Lease, Network, NodeName, Roster, Subnets};
use ringmail::store::etcd::{Access, Endpoints, Lifetime, TTL};
use ringmail::store::{Claim, Store, StoreError};
use tokio::sync::watch;
use tokio::time::timeout;
use zeroize::Zeroizing;

const PREFIX: &str = "/coreos.com/network";
const DAY: Lifetime = Lifetime { ttl: TTL, margin: 3600 };

fn network(text: &str) -> Network {
    let json = format!(r#"{{"Network": "{text}", "Backend": {{"Type": "vxlan"}}}}"#);
    let context = Context {
        file: "test",
        psk_file: None,
        psk_secret: None,
    };
    NetConf::parse(&json, &context).expect("a configuration").network
}

fn name(text: &str) -> NodeName {
    NodeName::new(text).expect("a name")
}

fn public(last: u8) -> Addresses {
    Addresses {
        v4: Some([192, 0, 2, last].into()),
        v6: None,
    }
}

fn claim(last: u8, random: u64) -> Claim {
    Claim {
        previous: None,
        public: public(last),
        random,
    }
}

fn subnets(text: &str) -> Subnets {
    Subnets::from_iter([text.parse::<IpNet>().expect("a net")])
}

fn lease(node: &str, last: u8, net: Subnets) -> Lease {
    Lease {
        node: name(node),
        subnets: net,
        public: public(last),
        backend: "vxlan".into(),
        data: serde_json::json!({"VNI": 1, "VtepMAC": format!("02:00:00:00:00:{last:02x}")}).into(),
        v6_data: BackendData::NULL,
    }
}

async fn open(access: Access) -> Store {
    open_for(access, DAY).await
}

async fn open_for(access: Access, lifetime: Lifetime) -> Store {
    let opened = timeout(Duration::from_secs(20), Store::open_etcd(access, lifetime));
    opened.await.expect("etcd answers").expect("it is opened")
}

/// Waits until the roster is as `wanted`.
async fn shows(store: &Store, what: &str, wanted: impl FnMut(&Roster) -> bool) {
    let mut roster: watch::Receiver<Roster> = store.roster();
    let waited = timeout(Duration::from_secs(20), roster.wait_for(wanted)).await;
    assert!(waited.is_ok(), "{what}: {:?}", store.roster().borrow());
}

fn holds(roster: &Roster, node: &str) -> bool {
    roster.get(&name(node)).is_some()
}

/// Takes a subnet and publishes a lease on it.
async fn join(store: &Store, network: &Network, node: &str, last: u8, random: u64) -> Lease {
    let claim = claim(last, random);
    let held = sooner_or_later(async || store.acquire(&name(node), network, &claim).await).await;
    let lease = lease(node, last, held.subnets);
    sooner_or_later(async || store.publish(&lease).await).await;
    lease
}

/// Repeats a call while its failure may go by itself, as the daemon does.
async fn sooner_or_later<T>(mut call: impl AsyncFnMut() -> Result<T, StoreError>) -> T {
    let trying = async {
        loop {
            match call().await {
                Ok(value) => break value,
                Err(error) => assert!(error.is_transient(), "{error}"),
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    timeout(Duration::from_secs(30), trying).await.expect("in time")
}

#[tokio::test]
async fn what_is_written_is_flannels_key_value_and_lifetime() {
    let cluster = Cluster::one().await;
    let network = network("10.5.0.0/16");
    let store = open(cluster.access(PREFIX)).await;
    let net = subnets("10.5.52.0/24");
    let claim = Claim {
        previous: Some(net),
        ..claim(3, 0)
    };
    let held = store
        .acquire(&name("node-a"), &network, &claim)
        .await
        .expect("the subnet of before is free");
    assert_eq!(held.subnets, net);
    store.publish(&lease("node-a", 3, net)).await.expect("publish");
    let shown = store
        .roster()
        .borrow()
        .get(&name("node-a"))
        .map(|held| Lease::clone(held));
    assert_eq!(
        shown,
        Some(lease("node-a", 3, net)),
        "the roster shows it on return, by its own name"
    );
    let text = ctl(
        &cluster,
        &["get", "--print-value-only", &format!("{PREFIX}/subnets/10.5.52.0-24")],
    );
    assert_eq!(
        text.trim_end(),
        r#"{"PublicIP":"192.0.2.3","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:03"}}"#
    );
    let leases = ctl(&cluster, &["lease", "list"]);
    let id = leases.lines().last().expect("one lease");
    let left = ctl(&cluster, &["lease", "timetolive", id]);
    assert!(left.contains("granted with TTL(86400s)"), "{left}");
}

#[tokio::test]
async fn a_subnet_that_the_node_has_is_taken_again_and_one_that_does_not_fit_is_replaced() {
    let cluster = Cluster::one().await;
    let network = network("10.5.0.0/16");
    let first = join(&open(cluster.access(PREFIX)).await, &network, "node-a", 3, 17).await;
    let store = open(cluster.access(PREFIX)).await;
    let again = store
        .acquire(&name("node-a"), &network, &claim(3, 99))
        .await
        .expect("again");
    assert_eq!(again.subnets, first.subnets);
    let previous = again.previous.expect("what was published");
    assert_eq!((previous.backend, previous.data), (first.backend, first.data));
    let other = self::network("10.9.0.0/16");
    let moved = store
        .acquire(&name("node-a"), &other, &claim(3, 99))
        .await
        .expect("another Network");
    assert!(other.slot(&moved.subnets).is_ok());
    shows(&store, "the old key is gone", |roster| roster.leases().count() == 1).await;
}

#[tokio::test]
async fn fifty_nodes_at_once_get_fifty_subnets() {
    let cluster = Cluster::one().await;
    let network = network("10.5.0.0/16");
    let joining = (1..=50_u8).map(|last| {
        let access = cluster.access(PREFIX);
        async move {
            let store = open(access).await;
            // All begin to look at the same place.
            join(&store, &network, &format!("node-{last}"), last, 0).await.subnets
        }
    });
    let joined = futures_util::future::join_all(joining).await;
    let all: BTreeSet<Subnets> = joined.iter().copied().collect();
    assert_eq!(all.len(), 50, "a subnet was given out twice");
    let store = open(cluster.access(PREFIX)).await;
    shows(&store, "all of them", |roster| roster.leases().count() == 50).await;
}

#[tokio::test]
async fn three_nodes_race_for_two_subnets_and_the_third_is_told() {
    let cluster = Cluster::one().await;
    // Four subnets of which SubnetMin to SubnetMax are two.
    let json = r#"{"Network": "10.5.0.0/22", "SubnetLen": 24, "SubnetMin": "10.5.1.0", "SubnetMax": "10.5.2.0", "Backend": {"Type": "vxlan"}}"#;
    let context = Context {
        file: "test",
        psk_file: None,
        psk_secret: None,
    };
    let network = NetConf::parse(json, &context).expect("a configuration").network;
    let mut racing = Vec::new();
    for last in 1..=3_u8 {
        let access = cluster.access(PREFIX);
        racing.push(tokio::spawn(async move {
            let store = open(access).await;
            store
                .acquire(&name(&format!("node-{last}")), &network, &claim(last, 0))
                .await
        }));
    }
    let mut outcomes = Vec::new();
    for raced in racing {
        outcomes.push(raced.await.expect("no panic"));
    }
    let held: BTreeSet<Subnets> = outcomes.iter().flatten().map(|held| held.subnets).collect();
    assert_eq!(held.len(), 2);
    let refused: Vec<&StoreError> = outcomes.iter().filter_map(|outcome| outcome.as_ref().err()).collect();
    assert!(
        matches!(refused[..], [StoreError::Exhausted { total: 2, .. }]),
        "{refused:?}"
    );
}

#[tokio::test]
async fn a_reservation_is_its_nodes_and_stays_one() {
    let cluster = Cluster::one().await;
    let network = network("10.5.0.0/16");
    let key = format!("{PREFIX}/subnets/10.5.77.0-24");
    ctl(
        &cluster,
        &["put", &key, r#"{"PublicIP":"192.0.2.3","PublicIPv6":null}"#],
    );
    let other = open(cluster.access(PREFIX)).await;
    let taken = other
        .acquire(&name("node-b"), &network, &claim(4, 77 - 1))
        .await
        .expect("another subnet");
    assert_ne!(taken.subnets, subnets("10.5.77.0/24"));
    let store = open(cluster.access(PREFIX)).await;
    let lease = join(&store, &network, "node-a", 3, 5).await;
    assert_eq!(lease.subnets, subnets("10.5.77.0/24"));
    let json = ctl(&cluster, &["get", "-w", "json", &key]);
    assert!(!json.contains("\"lease\""), "it has no lifetime: {json}");
    store
        .release(&name("node-a"), &lease.subnets)
        .await
        .expect("nothing to do");
    assert!(
        !ctl(&cluster, &["get", &key]).is_empty(),
        "a reservation outlives its node"
    );
}

#[tokio::test]
async fn a_reservation_that_does_not_fit_the_network_is_left_to_its_operator() {
    let cluster = Cluster::one().await;
    let key = format!("{PREFIX}/subnets/10.9.1.0-24");
    let reserved = r#"{"PublicIP":"192.0.2.3","PublicIPv6":null}"#;
    ctl(&cluster, &["put", &key, reserved]);
    let store = open(cluster.access(PREFIX)).await;
    let network = network("10.5.0.0/16");
    let lease = join(&store, &network, "node-a", 3, 5).await;
    assert!(network.slot(&lease.subnets).is_ok());
    assert_eq!(ctl(&cluster, &["get", "--print-value-only", &key]).trim_end(), reserved);
}

#[tokio::test]
async fn a_subnet_whose_answer_was_lost_is_the_nodes_and_may_be_written_again() {
    let cluster = Cluster::one().await;
    let relay = Relay::to(&cluster.endpoints(), Duration::from_millis(700)).await;
    let access = Access {
        endpoints: Endpoints::parse(&relay.endpoint()).expect("a URL"),
        ..cluster.access(PREFIX)
    };
    let store = open(access).await;
    let first = join(&store, &network("10.5.0.0/16"), "node-a", 3, 5).await;
    let key = format!("{PREFIX}/subnets/{}", first.subnets.to_string().replace('/', "-"));
    let second = lease("node-a", 8, first.subnets);
    let writing = tokio::spawn({
        let (store, second) = (store.clone(), second.clone());
        async move { store.publish(&second).await }
    });
    // etcd has written it; the answer, which the relay still holds back, never comes.
    let written = async {
        while !ctl(&cluster, &["get", &key]).contains("02:00:00:00:00:08") {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(Duration::from_secs(10), written).await.expect("it is written");
    relay.swallow(true);
    let lost = writing.await.expect("no panic").expect_err("no answer came");
    assert!(lost.is_transient(), "{lost}");
    relay.swallow(false);
    // By now the node has something newer to say.
    let third = lease("node-a", 9, first.subnets);
    sooner_or_later(async || store.publish(&third).await).await;
    assert!(ctl(&cluster, &["get", &key]).contains("02:00:00:00:00:09"));
    // What this process did not write is another one's still.
    let foreign = ctl(&cluster, &["get", "--print-value-only", &key]).replace("00:09", "00:77");
    ctl(&cluster, &["put", &key, foreign.trim_end()]);
    let refused = store.publish(&first).await.expect_err("another process wrote it");
    assert!(matches!(refused, StoreError::Superseded { .. }), "{refused}");
}

#[tokio::test]
async fn what_another_writes_between_reading_and_writing_stays() {
    let cluster = Cluster::one().await;
    // Long enough to write in between: what the store has read reaches it so much later.
    let late = Duration::from_millis(1500);
    let relay = Relay::to(&cluster.endpoints(), late).await;
    let access = Access {
        endpoints: Endpoints::parse(&relay.endpoint()).expect("a URL"),
        ..cluster.access(PREFIX)
    };
    let store = open(access).await;
    let first = join(&store, &network("10.5.0.0/16"), "node-a", 3, 5).await;
    let key = format!("{PREFIX}/subnets/{}", first.subnets.to_string().replace('/', "-"));
    let theirs = r#"{"PublicIP":"192.0.2.66","PublicIPv6":null,"BackendType":"vxlan"}"#;
    let ours = ctl(&cluster, &["get", "--print-value-only", &key]);
    let meanwhile = async {
        tokio::time::sleep(late / 3).await;
        ctl(&cluster, &["put", &key, theirs]);
    };
    let changed = lease("node-a", 9, first.subnets);
    let (outcome, ()) = tokio::join!(store.publish(&changed), meanwhile);
    assert!(outcome.as_ref().is_err_and(StoreError::is_transient), "{outcome:?}");
    assert_eq!(ctl(&cluster, &["get", "--print-value-only", &key]).trim_end(), theirs);
    let refused = store.publish(&changed).await.expect_err("it is another node's");
    assert!(matches!(refused, StoreError::Stolen { .. }), "{refused}");
    // And so when the lease is given back.
    ctl(&cluster, &["put", &key, ours.trim_end()]);
    let alive_by = ctl(&cluster, &["lease", "grant", "1000"]);
    let alive_by = alive_by.split(' ').nth(1).expect("its number");
    ctl(
        &cluster,
        &["put", &format!("--lease={alive_by}"), &key, ours.trim_end()],
    );
    let node = name("node-a");
    let (outcome, ()) = tokio::join!(store.release(&node, &first.subnets), async {
        tokio::time::sleep(late / 3).await;
        ctl(&cluster, &["put", &key, theirs]);
    });
    outcome.expect("another node's is left as it is");
    assert_eq!(ctl(&cluster, &["get", "--print-value-only", &key]).trim_end(), theirs);
}

#[tokio::test]
async fn a_store_of_many_megabytes_is_read_and_watched() {
    let cluster = Cluster::one().await;
    let value = |last: u8| {
        let padding = "x".repeat(100_000);
        format!(r#"{{"PublicIP":"192.0.2.{last}","PublicIPv6":null,"BackendType":"vxlan","BackendData":"{padding}"}}"#)
    };
    for at in 1..=60 {
        ctl(
            &cluster,
            &["put", &format!("{PREFIX}/subnets/10.5.{at}.0-24"), &value(at)],
        );
    }
    let store = open(cluster.access(PREFIX)).await;
    shows(&store, "all of them", |roster| roster.leases().count() == 60).await;
    join(&store, &network("10.5.0.0/16"), "node-a", 201, 90).await;
    shows(&store, "its own too", |roster| roster.leases().count() == 61).await;
}

#[tokio::test]
async fn an_endpoint_that_is_not_there_costs_no_call() {
    // flannel's default endpoints are two, of which the first has been nobody's for years.
    let cluster = Cluster::one().await;
    let network = network("10.5.0.0/16");
    let endpoints = format!("http://127.0.0.1:9,{}", cluster.endpoints());
    let access = Access {
        endpoints: Endpoints::parse(&endpoints).expect("URLs"),
        ..cluster.access(PREFIX)
    };
    let store = open(access).await;
    let mut failed = Vec::new();
    for last in 1..=20 {
        let claim = claim(last, 0);
        let outcome = store.acquire(&name(&format!("node-{last}")), &network, &claim).await;
        failed.extend(outcome.err().map(|error| error.to_string()));
    }
    assert!(failed.is_empty(), "{failed:?}");
}

#[tokio::test]
async fn an_etcd_that_says_nothing_holds_up_no_call_for_long() {
    let cluster = Cluster::one().await;
    let network = network("10.5.0.0/16");
    let store = open(cluster.access(PREFIX)).await;
    let lease = join(&store, &network, "node-a", 3, 5).await;
    cluster.pause(0);
    let changed = self::lease("node-a", 9, lease.subnets);
    let answer = timeout(Duration::from_secs(12), store.publish(&changed)).await;
    cluster.resume(0);
    let refused = answer.expect("it is bounded").expect_err("nothing came");
    assert!(refused.is_transient(), "{refused}");
    assert!(holds(&store.roster().borrow(), "node-a"));
    sooner_or_later(async || store.publish(&changed).await).await;
}

#[tokio::test]
async fn files_for_tls_that_are_none_end_the_start() {
    let cluster = Cluster::one().await;
    let tls = Tls::new();
    let access = |ca, certificate| Access {
        endpoints: Endpoints::parse(&cluster.endpoints().replace("http:", "https:")).expect("URLs"),
        ca: Some(ca),
        certificate,
        ..cluster.access(PREFIX)
    };
    let (certificate, key) = tls.client();
    let missing = tls.ca().with_file_name("missing");
    for (access, flag) in [
        (access(missing.clone(), None), "--etcd-cafile"),
        (access(key.clone(), None), "--etcd-cafile"),
        (access(tls.ca(), Some((key.clone(), key.clone()))), "--etcd-certfile"),
        (
            access(tls.ca(), Some((certificate.clone(), certificate))),
            "--etcd-keyfile",
        ),
    ] {
        let opened = timeout(Duration::from_secs(10), Store::open_etcd(access, DAY)).await;
        let refused = opened.expect("it does not wait").expect_err("no way in");
        assert!(
            !refused.is_transient() && refused.to_string().contains(flag),
            "{refused}"
        );
    }
}

#[tokio::test]
async fn a_stolen_subnet_is_told_and_a_deleted_one_is_taken_again() {
    let cluster = Cluster::one().await;
    let network = network("10.5.0.0/16");
    let store = open(cluster.access(PREFIX)).await;
    let lease = join(&store, &network, "node-a", 3, 5).await;
    let subnet = lease.subnets.to_string().replace('/', "-");
    let key = format!("{PREFIX}/subnets/{subnet}");
    ctl(&cluster, &["del", &key]);
    shows(&store, "it is gone", |roster| !holds(roster, "node-a")).await;
    store.publish(&lease).await.expect("published again");
    shows(&store, "it is back", |roster| holds(roster, "node-a")).await;
    ctl(
        &cluster,
        &[
            "put",
            &key,
            r#"{"PublicIP":"192.0.2.66","PublicIPv6":null,"BackendType":"vxlan"}"#,
        ],
    );
    let refused = store.publish(&lease).await.expect_err("it is another node's");
    assert!(matches!(refused, StoreError::Stolen { .. }), "{refused}");
}

#[tokio::test]
async fn a_lease_is_renewed_while_its_node_runs_and_runs_out_when_not() {
    let cluster = Cluster::one().await;
    let network = network("10.5.0.0/16");
    let short = Lifetime { ttl: 4, margin: 1 };
    let watcher = open(cluster.access(PREFIX)).await;
    let store = open_for(cluster.access(PREFIX), short).await;
    join(&store, &network, "node-a", 3, 5).await;
    tokio::time::sleep(Duration::from_secs(9)).await;
    assert!(holds(&store.roster().borrow(), "node-a"), "it has been renewed twice");
    shows(&watcher, "it is there", |roster| roster.leases().count() == 1).await;
    drop(store);
    shows(&watcher, "it has run out", |roster| roster.leases().count() == 0).await;
}

#[tokio::test]
async fn nothing_is_lost_while_etcd_is_away_and_it_is_picked_up_again() {
    let mut cluster = Cluster::one().await;
    let network = network("10.5.0.0/16");
    let store = open(cluster.access(PREFIX)).await;
    let lease = join(&store, &network, "node-a", 3, 5).await;
    cluster.stop(0);
    let refused = store
        .publish(&self::lease("node-a", 9, lease.subnets))
        .await
        .expect_err("etcd is away");
    assert!(refused.is_transient(), "{refused}");
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(
        holds(&store.roster().borrow(), "node-a"),
        "an outage is no empty roster"
    );
    assert!(store.health().writing.is_some() && store.health().reading.is_some());
    cluster.start(0);
    cluster.answers().await;
    let other = open(cluster.access(PREFIX)).await;
    join(&other, &network, "node-b", 4, 50).await;
    shows(&store, "a peer that came later", |roster| roster.leases().count() == 2).await;
    store.publish(&lease).await.expect("it answers again");
    assert_eq!(store.health().writing, None);
}

#[tokio::test]
async fn a_compacted_history_is_followed_by_a_new_snapshot() {
    let mut cluster = Cluster::one().await;
    let network = network("10.5.0.0/16");
    let store = open(cluster.access(PREFIX)).await;
    join(&store, &network, "node-a", 3, 5).await;
    // While it does not listen, history goes by and is forgotten.
    cluster.pause(0);
    tokio::time::sleep(Duration::from_secs(1)).await;
    cluster.resume(0);
    for at in 0..20 {
        ctl(&cluster, &["put", "/elsewhere", &at.to_string()]);
    }
    let json = ctl(&cluster, &["get", "/elsewhere", "-w", "json"]);
    let revision = json
        .split("\"revision\":")
        .nth(1)
        .and_then(|rest| rest.split(',').next())
        .expect("a revision");
    ctl(&cluster, &["compact", revision.trim_end_matches('}')]);
    let other = open(cluster.access(PREFIX)).await;
    join(&other, &network, "node-b", 4, 50).await;
    shows(&store, "what came after the compaction", |roster| {
        roster.leases().count() == 2
    })
    .await;
    cluster.stop(0);
    cluster.start(0);
    cluster.answers().await;
    join(&other, &network, "node-b", 5, 60).await;
    shows(&store, "the change", |roster| {
        roster.leases().any(|lease| lease.public == public(5))
    })
    .await;
}

#[tokio::test]
async fn the_leader_of_three_may_go() {
    let mut cluster = Cluster::three().await;
    let network = network("10.5.0.0/16");
    let store = open(cluster.access(PREFIX)).await;
    join(&store, &network, "node-a", 3, 5).await;
    let leader = cluster.leader();
    cluster.stop(leader);
    let other = open(cluster.access(PREFIX)).await;
    let claim = claim(4, 50);
    let held = sooner_or_later(async || other.acquire(&name("node-b"), &network, &claim).await).await;
    shows(&store, "the newcomer", |roster| {
        roster.leases().any(|lease| lease.subnets == held.subnets)
    })
    .await;
    assert!(holds(&store.roster().borrow(), "node-a"));
}

#[tokio::test]
async fn a_member_of_three_that_hangs_is_left_for_another() {
    let mut cluster = Cluster::three().await;
    let network = network("10.5.0.0/16");
    for member in 0..3 {
        let store = open(cluster.access(PREFIX)).await;
        let lease = join(&store, &network, "node-a", 3, 5).await;
        cluster.pause(member);
        let changed = self::lease("node-a", 10 + u8::try_from(member).expect("few"), lease.subnets);
        // Whichever member this store is connected to, the leader among them: the others elect one.
        sooner_or_later(async || store.publish(&changed).await).await;
        shows(&store, "what was written", |roster| {
            roster
                .get(&name("node-a"))
                .is_some_and(|held| held.public == changed.public)
        })
        .await;
        cluster.resume(member);
        store.release(&name("node-a"), &lease.subnets).await.ok();
        cluster.answers().await;
    }
}

#[tokio::test]
async fn data_restored_from_an_older_snapshot_are_read_anew() {
    let mut cluster = Cluster::one().await;
    let network = network("10.5.0.0/16");
    let store = open(cluster.access(PREFIX)).await;
    let lease = join(&store, &network, "node-a", 3, 5).await;
    cluster.save();
    let other = open(cluster.access(PREFIX)).await;
    join(&other, &network, "node-b", 4, 50).await;
    let changed = self::lease("node-a", 9, lease.subnets);
    store.publish(&changed).await.expect("publish");
    shows(&store, "both", |roster| roster.leases().count() == 2).await;
    cluster.restore();
    cluster.answers().await;
    shows(&store, "what the snapshot had", |roster| roster.leases().count() == 1).await;
    // The own lease is an older one now: it may be written again.
    sooner_or_later(async || store.publish(&changed).await).await;
    shows(&store, "the newest", |roster| {
        roster.leases().any(|lease| lease.public == public(9))
    })
    .await;
}

#[tokio::test]
async fn in_a_new_cluster_of_lower_revisions_another_nodes_lease_is_not_overwritten() {
    let mut cluster = Cluster::one().await;
    let network = network("10.5.0.0/16");
    for at in 0..20 {
        ctl(&cluster, &["put", "/elsewhere", &at.to_string()]);
    }
    let store = open(cluster.access(PREFIX)).await;
    let lease = join(&store, &network, "node-a", 3, 5).await;
    cluster.empty();
    cluster.answers().await;
    let subnet = lease.subnets.to_string().replace('/', "-");
    let key = format!("{PREFIX}/subnets/{subnet}");
    let theirs = r#"{"PublicIP":"192.0.2.66","PublicIPv6":null,"BackendType":"vxlan"}"#;
    ctl(&cluster, &["put", &key, theirs]);
    let outcome = loop {
        match store.publish(&lease).await {
            Err(error) if error.is_transient() => tokio::time::sleep(Duration::from_millis(100)).await,
            outcome => break outcome,
        }
    };
    assert!(matches!(outcome, Err(StoreError::Stolen { .. })), "{outcome:?}");
    assert_eq!(ctl(&cluster, &["get", "--print-value-only", &key]).trim_end(), theirs);
}

#[tokio::test]
async fn a_user_that_an_etcd_without_authentication_does_not_ask_for_is_no_obstacle() {
    let cluster = Cluster::one().await;
    let access = Access {
        user: Some(("flannel".into(), Zeroizing::new("geheim-0815".into()))),
        ..cluster.access(PREFIX)
    };
    let store = open(access).await;
    join(&store, &network("10.5.0.0/16"), "node-a", 3, 5).await;
}

#[tokio::test]
async fn tls_with_the_authority_alone_with_a_certificate_and_without_either() {
    for client in [false, true] {
        let tls = Tls::new();
        let cluster = Cluster::secure(&tls, client).await;
        let access = Access {
            ca: Some(tls.ca()),
            certificate: client.then(|| tls.client()),
            ..cluster.access(PREFIX)
        };
        let store = open(access.clone()).await;
        join(&store, &network("10.5.0.0/16"), "node-a", 3, 5).await;
        let other = Tls::new();
        let mut strangers = vec![("another authority", Some(other.ca()), access.certificate.clone())];
        strangers.push(("the system's authorities", None, access.certificate.clone()));
        if client {
            strangers.push(("no certificate", Some(tls.ca()), None));
            strangers.push(("another authority's certificate", Some(tls.ca()), Some(other.client())));
        }
        for (what, ca, certificate) in strangers {
            let stranger = Access {
                ca,
                certificate,
                ..access.clone()
            };
            let opened = timeout(Duration::from_secs(3), Store::open_etcd(stranger, DAY)).await;
            assert!(!matches!(opened, Ok(Ok(_))), "{what} is no way in");
        }
    }
}

#[tokio::test]
async fn a_user_with_a_password_gets_in_and_a_wrong_password_ends_the_start() {
    let cluster = Cluster::one().await;
    for command in [
        "user add root:geheim-root",
        "user grant-role root root",
        "role add net",
        "role grant-permission net readwrite --prefix=true /coreos.com/network/",
        "user add flannel:geheim-0815",
        "user grant-role flannel net",
        "auth enable",
    ] {
        ctl(&cluster, &command.split(' ').collect::<Vec<_>>());
    }
    let with = |password: &str| Access {
        user: Some(("flannel".into(), Zeroizing::new(password.into()))),
        ..cluster.access(PREFIX)
    };
    let store = open(with("geheim-0815")).await;
    join(&store, &network("10.5.0.0/16"), "node-a", 3, 5).await;
    assert!(!format!("{:?} {store:?}", with("geheim-0815")).contains("geheim"));
    let refused = timeout(Duration::from_secs(20), Store::open_etcd(with("falsch"), DAY)).await;
    let refused = refused.expect("it is told").expect_err("a wrong password");
    assert!(!refused.is_transient(), "{refused}");
    let text = refused.to_string();
    assert!(text.contains("--etcd-password") && !text.contains("falsch"), "{text}");
}

#[tokio::test]
async fn the_configuration_is_watched() {
    let cluster = Cluster::one().await;
    let store = open(cluster.access(PREFIX)).await;
    assert_eq!(store.config().await.expect("read"), None);
    let mut changes = store.config_changes();
    ctl(&cluster, &["put", &format!("{PREFIX}/config"), "{}"]);
    let seen = timeout(Duration::from_secs(5), changes.wait_for(Option::is_some)).await;
    assert_eq!(seen.expect("in time").expect("it lives").as_deref(), Some("{}"));
    assert_eq!(store.config().await.expect("read").as_deref(), Some("{}"));
}

#[tokio::test]
async fn bad_keys_and_values_are_named_and_disturb_nobody() {
    let cluster = Cluster::one().await;
    for (key, value) in [
        ("10.5.1.7-24", "{}"),
        ("nonsense", "{}"),
        ("10.5.2.0-24", "no json"),
        ("10.5.3.0-24", "{}"),
    ] {
        ctl(&cluster, &["put", &format!("{PREFIX}/subnets/{key}"), value]);
    }
    let store = open(cluster.access(PREFIX)).await;
    join(&store, &network("10.5.0.0/16"), "node-a", 3, 5).await;
    let roster = store.roster().borrow().clone();
    assert_eq!(roster.leases().count(), 1);
    assert_eq!(roster.rejected().len(), 4, "{:?}", roster.rejected());
}
