//! What needs no daemon.

use super::super::*;

/// Runs the program; its exit code, and what it said on both outputs.
async fn ringmail(arguments: &[&str], password: &str) -> (Option<i32>, String) {
    let output = tokio::process::Command::new(env!("CARGO_BIN_EXE_ringmail"))
        .args(arguments)
        .env("FLANNELD_ETCD_PASSWORD", password)
        .output();
    let output = output.await.expect("it runs");
    let said = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8_lossy(&said).into_owned())
}

#[tokio::test]
async fn leases_are_listed_without_the_daemon() {
    let tls = Tls::new();
    let cluster = Cluster::secure(&tls, true).await;
    let (certificate, key) = tls.client();
    let (ca, endpoints) = (tls.ca(), cluster.endpoints());
    let text = |path: &std::path::Path| path.to_str().expect("a path").to_owned();
    let (ca, certificate, key) = (text(&ca), text(&certificate), text(&key));
    let access = Access {
        ca: Some(tls.ca()),
        certificate: Some(tls.client()),
        ..cluster.access("/other")
    };
    let lease = join(&open(access).await, &network("10.5.0.0/16"), "node-a", 3, 5).await;
    let all = [
        "leases",
        "--etcd-endpoints",
        &endpoints,
        "--etcd-prefix",
        "/other",
        "--etcd-cafile",
        &ca,
        "--etcd-certfile",
        &certificate,
        "--etcd-keyfile",
        &key,
    ];
    let (code, said) = ringmail(&all, "").await;
    assert_eq!(code, Some(0), "{said}");
    assert!(
        said.contains("192.0.2.3") && said.contains(&lease.subnets.to_string()),
        "{said}"
    );
    let (code, said) = ringmail(&all[..9], "").await;
    assert_eq!(code, Some(64), "{said}");
    assert!(said.contains("--etcd-certfile needs --etcd-keyfile"), "{said}");
    let (code, said) = ringmail(&["leases", "--etcd-endpoints", "http://127.0.0.1:9"], "").await;
    assert_eq!(code, Some(69), "{said}");
    assert!(said.contains("http://127.0.0.1:9 does not answer"), "{said}");
    let user = [
        "leases",
        "--etcd-endpoints",
        "http://127.0.0.1:9",
        "--etcd-username",
        "flannel",
    ];
    let (code, said) = ringmail(&user, "").await;
    assert_eq!(code, Some(64), "{said}");
    let (code, said) = ringmail(&user, "geheim-0815").await;
    assert!(code == Some(69) && !said.contains("geheim"), "{said}");
}

#[test]
fn endpoints_are_urls_of_one_scheme() {
    for good in [
        "http://127.0.0.1:2379",
        "https://a:2379, https://b:2379",
        "http://[::1]:2379",
    ] {
        assert!(Endpoints::parse(good).is_ok(), "{good}");
    }
    for bad in ["", ",", "127.0.0.1:2379", "ftp://a", "http://", "http://a,https://b"] {
        assert!(Endpoints::parse(bad).is_err(), "{bad}");
    }
}
