//! The daemon with flannel's flags over a real API server.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tokio::time::sleep;

use super::mesh;
use super::server::Server;

/// Node objects weigh what real ones do: 50 images of two names each.
fn images() -> Value {
    let image = |number: u32| {
        let digest = format!("{number:064x}");
        json!({
            "names": [
                format!("registry.example.org/team-{number}/some-service-{number}@sha256:{digest}"),
                format!("registry.example.org/team-{number}/some-service-{number}:v1.2.{number}"),
            ],
            "sizeBytes": 123_456_789,
        })
    };
    (0..50).map(image).collect()
}

#[test]
#[ignore = "needs kube-apiserver"]
fn the_daemon_serves_flannels_cluster_with_flannels_flags() {
    mesh::alone(async {
        let mut server = Server::start_at("0.0.0.0").await;
        let prefix = "flannel.alpha.coreos.com/";
        let conf = |backend: &str| format!(r#"{{"Network": "10.10.0.0/16", "Backend": {{"Type": "{backend}"}}}}"#);
        let mut hosts = Vec::new();
        for number in 1..=2_u8 {
            server
                .add(&format!("flannel{number}"), &format!("10.10.{number}.0/24"))
                .await;
            let host = mesh::Host::new(&server, number);
            host.configure(&conf("vxlan"));
            hosts.push(host);
        }
        // As flannel's DaemonSet says who it is, and as everyone else does.
        server.add_pod("kube-flannel-ds-x", "flannel1").await;
        hosts[0].start_in_pod(
            &server,
            &[("POD_NAMESPACE", "default"), ("POD_NAME", "kube-flannel-ds-x")],
        );
        hosts[1].start(&server, &[("NODE_NAME", "flannel2")]);
        hosts[0].reaches("10.10.2.0").await;
        let env = "FLANNEL_NETWORK=10.10.0.0/16\nFLANNEL_SUBNET=10.10.1.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n";
        assert_eq!(hosts[0].subnet_env(), env);
        let up = async || server.condition("flannel1").await == Some("False".into());
        hosts[0].eventually("the condition", up).await;

        // flannel's own scenario, F4.
        server
            .annotate(
                "flannel2",
                json!({format!("{prefix}public-ip-overwrite"): "172.18.0.2"}),
            )
            .await;
        let overwritten = async || {
            server
                .notes("flannel2", prefix)
                .await
                .contains("public-ip 172.18.0.2\n")
        };
        hosts[1].eventually("the address is advertised", overwritten).await;
        server
            .annotate("flannel2", json!({format!("{prefix}public-ip-overwrite"): null}))
            .await;
        let back = async || {
            server
                .notes("flannel2", prefix)
                .await
                .contains("public-ip 192.168.77.2\n")
        };
        hosts[1].eventually("the own address is back", back).await;
        hosts[0].reaches("10.10.2.0").await;

        // Wiped, and made anew with another podCIDR.
        let gone = |note: &str| json!({format!("{prefix}{note}"): null});
        let written = server.notes("flannel2", prefix).await;
        server.annotate("flannel2", gone("kube-subnet-manager")).await;
        server.annotate("flannel2", gone("backend-data")).await;
        let again = async || server.notes("flannel2", prefix).await == written;
        hosts[1].eventually("annotations are put back", again).await;
        server.remove("flannel2").await;
        server.add("flannel2", "10.10.9.0/24").await;
        let moved = async || hosts[1].subnet_env().contains("FLANNEL_SUBNET=10.10.9.1/24\n");
        hosts[1].eventually("the subnet is another", moved).await;
        hosts[0].reaches("10.10.9.0").await;

        // The ConfigMap changes: a wrong edit, then another backend. Faster than the slow timer would be.
        for host in &hosts {
            host.configure("{");
        }
        let refused = async || hosts[0].status().contains("the last good one is in force");
        let took = hosts[0].eventually("a wrong edit is told", refused).await;
        for host in &hosts {
            host.configure(&conf("host-gw"));
        }
        let routed = async || {
            hosts[0]
                .attempt("ip route show 10.10.9.0/24")
                .1
                .contains("via 192.168.77.2 dev eth0")
        };
        let took = took.max(hosts[0].eventually("another backend", routed).await);
        assert!(took < Duration::from_secs(4), "inotify told: {took:?}");
        let host_gw = async || {
            server
                .notes("flannel1", prefix)
                .await
                .contains("backend-type host-gw\n")
        };
        hosts[0].eventually("the lease says so", host_gw).await;

        // The API server is away: what was stays, a daemon is ended, and one changes nothing by coming back.
        server.down();
        let outage = async || hosts[0].status().contains("the store can't be read");
        hosts[0].eventually("the outage is told", outage).await;
        hosts[1].stop(Signal::SIGKILL);
        hosts[0].reaches("192.168.77.2").await;
        assert!(
            hosts[0]
                .attempt("ip route show 10.10.9.0/24")
                .1
                .contains("via 192.168.77.2")
        );
        hosts[1].start(&server, &[("NODE_NAME", "flannel2")]);
        sleep(Duration::from_secs(1)).await;
        server.up();
        server.answers().await;
        let well = async || hosts[1].status().contains("flannel1") && !hosts[0].status().contains("the store can't be");
        hosts[1].eventually("all is well", well).await;
        let before = server.notes("flannel2", prefix).await;
        sleep(Duration::from_secs(1)).await;
        assert_eq!(server.notes("flannel2", prefix).await, before);
        for host in &mut hosts {
            host.stop(Signal::SIGTERM);
            assert!(host.cleanup().contains("lease"), "{}", host.log());
            assert_eq!(host.subnet_env(), "");
        }
        for node in ["flannel1", "flannel2"] {
            assert_eq!(server.notes(node, prefix).await, "");
        }
    });
}

#[test]
#[ignore = "needs kube-apiserver"]
fn a_thousand_nodes_with_fifty_images_cost_little_memory_and_their_heartbeats_little_time() {
    const NODES: u32 = 1000;
    mesh::alone(async {
        let server = Server::start_at("0.0.0.0").await;
        server.add("big-1", "10.10.0.0/24").await;
        let mut host = mesh::Host::new(&server, 1);
        // A Network of 4,096 subnets.
        host.configure(r#"{"Network": "10.0.0.0/12", "SubnetLen": 24, "Backend": {"Type": "alloc"}}"#);
        let start = |host: &mut mesh::Host| host.start(&server, &[("NODE_NAME", "big-1")]);
        start(&mut host);
        let ready = async |host: &mesh::Host| {
            host.eventually("a lease is held", async || host.subnet_env().contains("FLANNEL_SUBNET"))
                .await;
        };
        ready(&host).await;
        let lone = host.memory("VmRSS:");
        let images = images();
        server.fill(NODES, &images).await;
        let all = async |host: &mesh::Host| {
            let shows = async || host.status().contains("big-1099");
            host.eventually("all are there", shows).await;
        };
        all(&host).await;
        let (watched, peak, spent) = (host.memory("VmRSS:"), host.memory("VmHWM:"), host.processor());
        host.stop(Signal::SIGTERM);
        start(&mut host);
        all(&host).await;
        let (listed, highest) = (host.memory("VmRSS:"), host.memory("VmHWM:"));
        println!(
            "measured: resident KiB: alone {lone}; after {NODES} Nodes came {watched} (peak {peak}, {spent:?} of processor time); \
             after a list {listed} (peak {highest})"
        );
        let weight = serde_json::to_string(&images).expect("JSON").len();
        assert!(weight > 10_000, "a real Node weighs more than {weight} bytes");
        assert!(
            highest.max(peak) < lone + 24 * 1024,
            "memory grows with the Nodes' size"
        );

        // Kubelets say that their Nodes are well; nothing of it is news to the mesh, and what is comes through at once.
        let (spent, came, began) = (host.processor(), host.received(), Instant::now());
        let beats = server.beat(NODES, Duration::from_secs(10)).await;
        let other = json!({"flannel.alpha.coreos.com/public-ip": "192.168.77.10"});
        server.annotate("big-1099", other).await;
        let shows = async || host.ask("leases").1.contains("192.168.77.10");
        let after = host.eventually("what comes after the heartbeats is seen", shows).await;
        let (took, spent, came) = (began.elapsed(), host.processor() - spent, host.received() - came);
        let (each, bytes) = (spent / beats, came / u64::from(beats));
        println!(
            "measured: {beats} heartbeats of {NODES} Nodes in {took:?}, {:.0} a second, {bytes} bytes each at the daemon, {spent:?} of \
             its processor time, {each:?} each; a change is seen {after:?} after the last; resident KiB {}, peak {}",
            f64::from(beats) / took.as_secs_f64(),
            host.memory("VmRSS:"),
            host.memory("VmHWM:")
        );
        assert!(beats > 200, "the server took {beats} of them");
        assert!(bytes > 200, "they were watched: {bytes} bytes each");
        assert!(
            bytes < u64::try_from(weight).expect("small") / 2,
            "images came along: {bytes} bytes each"
        );
        assert!(
            each < Duration::from_millis(5) && after < Duration::from_secs(5),
            "{each:?}, {after:?}"
        );
        assert!(
            host.memory("VmHWM:") < lone + 24 * 1024,
            "memory grows with the heartbeats"
        );
    });
}
