//! Events on the own Node, as `kubectl describe node` finds them.

use std::time::Duration;

use k8s_openapi::api::core::v1::Event;
use kube::Api;
use kube::api::{DeleteParams, ListParams};
use ringmail::store::kube::{Kube, Topic, Troubles};
use serde_json::json;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use super::mesh;
use super::server::{RULES, Server, shared};

/// The Events that `kubectl describe node` shows, oldest first.
async fn events(server: &Server, node: &str) -> Vec<Event> {
    let uid = server.get(node).await.metadata.uid.expect("a uid");
    let events: Api<Event> = Api::all(server.client("admin").await);
    let fields = format!("involvedObject.kind=Node,involvedObject.name={node},involvedObject.uid={uid}");
    let mut found = events
        .list(&ListParams::default().fields(&fields))
        .await
        .expect("listed")
        .items;
    let number = |event: &Event| {
        event
            .metadata
            .resource_version
            .as_ref()
            .and_then(|at| at.parse::<u64>().ok())
    };
    found.sort_by_key(number);
    found
}

/// A line an Event: type, reason, how often, message.
pub(crate) async fn described(server: &Server, node: &str) -> String {
    let line = |event: &Event| {
        let from = event.source.as_ref().and_then(|source| source.component.as_deref());
        assert_eq!(from, Some("ringmail"));
        assert!(event.first_timestamp.is_some() && event.last_timestamp.is_some());
        let text = |text: &Option<String>| text.clone().unwrap_or_default();
        format!(
            "{} {} x{}: {}\n",
            text(&event.type_),
            text(&event.reason),
            event.count.unwrap_or_default(),
            text(&event.message)
        )
    };
    events(server, node).await.iter().map(line).collect()
}

/// Waits until the Events of `node` are `wanted`.
async fn come_to(server: &Server, node: &str, wanted: &str) {
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        let shown = described(server, node).await;
        if shown == wanted {
            return;
        }
        assert!(Instant::now() < end, "wanted:\n{wanted}\nshown:\n{shown}");
        sleep(Duration::from_millis(50)).await;
    }
}

/// Tells of trouble that comes, goes and comes again; the word of what was refused.
pub(crate) async fn attempt(server: &Server, kube: &Kube, node: &str) -> Result<(), String> {
    let why = format!("attempt at {:?}", std::time::SystemTime::now());
    let wrong = Troubles::from([(Topic::Psk, why.clone())]);
    let (troubles, told) = watch::channel(wrong.clone());
    let telling = async {
        let shown = async |wanted: &str| {
            while !described(server, node).await.contains(wanted) {
                sleep(Duration::from_millis(50)).await;
            }
        };
        let warning = |count| format!("Warning PSKRefused x{count}: {why}\n");
        let first = timeout(Duration::from_secs(3), shown(&warning(1))).await;
        first.map_err(|_| "events create".to_owned())?;
        troubles.send_replace(Troubles::new());
        sleep(Duration::from_millis(500)).await;
        troubles.send_replace(wrong.clone());
        let second = timeout(Duration::from_secs(3), shown(&warning(2))).await;
        second.map_err(|_| "events patch".to_owned())
    };
    tokio::select! {
        () = kube.tell(told) => unreachable!("it goes on for ever"),
        outcome = telling => outcome,
    }
}

#[tokio::test]
#[ignore = "needs kube-apiserver"]
async fn what_comes_again_is_counted_on_one_event_and_one_that_is_gone_is_made_anew() {
    let server = shared().await;
    server.add("events-1", "10.10.1.0/24").await;
    let kube = Kube::open(server.access("events.test", "events-1"))
        .await
        .expect("opened");
    let wrong = Troubles::from([(Topic::Configuration, "it is no JSON".to_owned())]);
    let (troubles, told) = watch::channel(wrong.clone());
    let telling = tokio::spawn(async move { kube.tell(told).await });
    let refused = |count| format!("Warning ConfigurationRefused x{count}: it is no JSON\n");
    let accepted =
        |count| format!("Normal ConfigurationAccepted x{count}: the configuration is good again and in force\n");
    come_to(&server, "events-1", &refused(1)).await;
    troubles.send_replace(Troubles::new());
    come_to(&server, "events-1", &(refused(1) + &accepted(1))).await;
    troubles.send_replace(wrong.clone());
    come_to(&server, "events-1", &(accepted(1) + &refused(2))).await;
    let shown = events(&server, "events-1").await;
    let namespace = |event: &Event| event.metadata.namespace.clone();
    assert!(shown.iter().all(|event| namespace(event).as_deref() == Some("default")));
    // The server drops Events after an hour.
    let all: Api<Event> = Api::namespaced(server.client("admin").await, "default");
    for event in &shown {
        let name = event.metadata.name.as_deref().expect("a name");
        all.delete(name, &DeleteParams::default()).await.expect("deleted");
    }
    troubles.send_replace(Troubles::new());
    come_to(&server, "events-1", &accepted(1)).await;
    drop(troubles);
    timeout(Duration::from_secs(5), telling)
        .await
        .expect("it ends")
        .expect("no panic");
}

#[tokio::test]
#[ignore = "needs kube-apiserver"]
async fn who_may_not_write_events_goes_on_and_says_what_is_true_when_it_may() {
    let server = Server::start().await;
    server.add("mute-1", "10.10.1.0/24").await;
    let rules: Vec<serde_json::Value> = serde_json::from_str(RULES).expect("rules");
    let mute: Vec<_> = rules
        .iter()
        .filter(|rule| rule["resources"] != json!(["events"]))
        .collect();
    server.allow(&serde_json::to_string(&mute).expect("JSON")).await;
    sleep(Duration::from_millis(500)).await;
    let kube = Kube::open(server.access("mute.test", "mute-1")).await.expect("opened");
    let wrong = |why: &str| Troubles::from([(Topic::Psk, why.to_owned())]);
    let (troubles, told) = watch::channel(wrong("first"));
    let store = ringmail::store::Store::Kube(kube.clone());
    let telling = tokio::spawn(async move { kube.tell(told).await });
    sleep(Duration::from_secs(2)).await;
    assert_eq!(described(&server, "mute-1").await, "");
    assert_eq!(
        store.health(),
        ringmail::store::Health::default(),
        "that is no outage of the store"
    );
    troubles.send_replace(wrong("second"));
    server.allow(RULES).await;
    come_to(&server, "mute-1", "Warning PSKRefused x1: second\n").await;
    telling.abort();
}

#[test]
#[ignore = "needs kube-apiserver"]
fn the_daemon_tells_of_wrong_edits_a_moved_subnet_and_a_broken_datapath() {
    mesh::alone(async {
        let server = Server::start_at("0.0.0.0").await;
        server.add("told1", "10.10.1.0/24").await;
        let mut host = mesh::Host::new(&server, 1);
        let good = r#"{"Network": "10.10.0.0/16", "Backend": {"Type": "host-gw"}}"#;
        host.configure(good);
        host.start(&server, &[("NODE_NAME", "told1")]);
        let held = async || host.subnet_env().contains("FLANNEL_SUBNET=10.10.1.1/24");
        host.eventually("a lease is held", held).await;
        let shows = async |what: &'static str| {
            let shown = async || described(&server, "told1").await.contains(what);
            host.eventually(what, shown).await
        };
        assert_eq!(described(&server, "told1").await, "", "all is well");

        host.configure(r#"{"Network": "10.10.0.0/16", "Backend": {"Type": "host-gww"}}"#);
        let took =
            shows("Warning ConfigurationRefused x1: the new configuration is refused, the last good one is in force")
                .await;
        assert!(took < Duration::from_secs(5), "{took:?}");
        assert!(described(&server, "told1").await.contains("host-gww"));
        host.configure(good);
        shows("Normal ConfigurationAccepted x1").await;

        server.remove("told1").await;
        server.add("told1", "10.10.9.0/24").await;
        shows("Warning SubnetMoved x1: node told1 has podCIDR 10.10.9.0/24 now, not 10.10.1.0/24").await;
        shows("Normal SubnetTaken x1").await;

        // What can't be replaced by a file.
        host.block_subnet_env(true);
        let took = shows("Warning DatapathBroken x1: ").await;
        assert!(
            took > Duration::from_secs(9),
            "what is repaired at once is no news: {took:?}"
        );
        host.block_subnet_env(false);
        shows("Normal DatapathRestored x1").await;
        let shown = described(&server, "told1").await;
        assert_eq!(
            shown.lines().count(),
            4,
            "of the Node made anew, nothing twice:\n{shown}"
        );
    });
}

#[test]
#[ignore = "needs kube-apiserver"]
fn the_daemon_tells_of_a_command_that_fails_and_of_an_uplink_that_goes() {
    mesh::alone(async {
        let server = Server::start_at("0.0.0.0").await;
        server.add("told2", "10.10.2.0/24").await;
        let mut host = mesh::Host::new(&server, 2);
        // Another way to the server.
        host.plug("eth1", 102);
        let running = |command: &str| {
            let backend = json!({"Type": "extension", "PostStartupCommand": command});
            json!({"Network": "10.10.0.0/16", "Backend": backend}).to_string()
        };
        host.configure(&running("/bin/ls /the/secret"));
        host.start(&server, &[("NODE_NAME", "told2")]);
        let shown = async || described(&server, "told2").await;
        let shows = async |what: &str| host.eventually(what, async || shown().await.contains(what)).await;
        let held = async || host.subnet_env().contains("FLANNEL_SUBNET=10.10.2.1/24");
        host.eventually("a lease is held", held).await;
        host.by_eth0(false);
        let took =
            shows("Warning NoUplink x1: no uplink now, the last one stays in use: Failed to find interface").await;
        assert!(shown().await.contains("interface eth0 is down: `ip link set eth0 up`"));
        assert!(took > Duration::from_secs(9), "a moment without is no news: {took:?}");
        shows(
            "Warning CommandFailed x1: PostStartupCommand fails, and is tried again every 5 s: \"/bin/ls\": exit status: 2; \
             `ringmail status` on this node has what it printed",
        )
        .await;
        assert!(!shown().await.contains("/the/secret"), "what it printed is not for all");
        let status = host.status();
        assert!(
            status.contains("/the/secret") && status.contains("no uplink now"),
            "{status}"
        );

        host.configure(&running("/bin/true"));
        shows("Normal CommandsRun x1: no command of the extension backend fails any more").await;
        host.by_eth0(true);
        shows("Normal UplinkFound x1: there is an uplink again").await;
        let shown = shown().await;
        assert_eq!(shown.lines().count(), 4, "nothing else, and nothing twice:\n{shown}");
    });
}
