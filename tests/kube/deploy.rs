//! What deploy/ holds for Kubernetes, against a real API server: the manifests, their rights, and the chart.

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use http::{Method, Request};
use kube::Client;
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tokio::time::sleep;

use super::events::described;
use super::mesh::{self, Host, Pod};
use super::server::{Server, program, shared};

const REPOSITORY: &str = env!("CARGO_MANIFEST_DIR");
const ROLES: &str = "/apis/rbac.authorization.k8s.io/v1/clusterroles";
const TELLING: &str = "/apis/rbac.authorization.k8s.io/v1/namespaces/default/roles/ringmail";
const DAEMON: &str = "/apis/apps/v1/namespaces/kube-system/daemonsets/kube-flannel-ds";
const CLEANUP: &str = "/apis/apps/v1/namespaces/kube-system/daemonsets/ringmail-cleanup";
const CONFIG: &str = "/api/v1/namespaces/kube-system/configmaps/kube-flannel-cfg";

fn read(path: &str) -> String {
    let path = Path::new(REPOSITORY).join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// A document of a manifest, and where it belongs at the API server.
#[derive(Clone)]
struct Document {
    path: String,
    yaml: String,
}

/// The documents of a manifest, by their path.
fn documents(manifest: &str) -> Vec<Document> {
    let of = |yaml: &str| {
        let value = |key: &str| {
            let line = yaml.lines().find_map(|line| line.strip_prefix(key));
            line.unwrap_or_default().trim().to_owned()
        };
        let rights = "/apis/rbac.authorization.k8s.io/v1";
        let (place, namespace, plural) = match value("kind:").as_str() {
            "ServiceAccount" => ("/api/v1", "kube-system", "serviceaccounts"),
            "ConfigMap" => ("/api/v1", "kube-system", "configmaps"),
            "DaemonSet" => ("/apis/apps/v1", "kube-system", "daemonsets"),
            "ClusterRole" => (rights, "", "clusterroles"),
            "ClusterRoleBinding" => (rights, "", "clusterrolebindings"),
            // Events of what is in no namespace, such as a Node, are there.
            "Role" => (rights, "default", "roles"),
            "RoleBinding" => (rights, "default", "rolebindings"),
            other => panic!("a manifest holds no {other:?}"),
        };
        assert_eq!(value("  namespace:"), namespace, "{yaml}");
        let within = match namespace {
            "" => String::new(),
            namespace => format!("/namespaces/{namespace}"),
        };
        Document {
            path: format!("{place}{within}/{plural}/{}", value("  name:")),
            yaml: format!("{yaml}\n"),
        }
    };
    let parts = manifest.split("\n---\n").filter(|part| part.contains("\nkind: "));
    let all: Vec<Document> = parts.map(of).collect();
    assert!(!all.is_empty(), "{manifest}");
    all
}

/// What the manifests in deploy/ hold.
fn manifest(name: &str) -> Vec<Document> {
    documents(&read(&format!("deploy/{name}")))
}

async fn call(client: &Client, method: Method, path: &str, kind: &str, body: &str) -> Result<Value, kube::Error> {
    let request = Request::builder().method(method).uri(path).header("Content-Type", kind);
    client
        .request(request.body(body.as_bytes().to_vec()).expect("a request"))
        .await
}

/// Server-side apply of a document as it stands, `how` it says; a field that the server does not know is an error.
async fn apply(client: &Client, document: &Document, how: &str) -> Value {
    let path = format!(
        "{}?fieldManager=test&force=true&fieldValidation=Strict{how}",
        document.path
    );
    let applied = call(
        client,
        Method::PATCH,
        &path,
        "application/apply-patch+yaml",
        &document.yaml,
    )
    .await;
    applied.unwrap_or_else(|error| panic!("{}: {error}", document.path))
}

async fn get(client: &Client, path: &str) -> Value {
    let found = call(client, Method::GET, path, "", "").await;
    found.unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// A Role's rules as (resource, verb).
fn rights(role: &Value) -> Vec<(String, String)> {
    let list = |value: &Value| -> Vec<String> { serde_json::from_value(value.clone()).expect("a list of words") };
    let mut rights = Vec::new();
    for rule in role["rules"].as_array().expect("rules") {
        assert_eq!(rule["apiGroups"], json!([""]));
        for resource in list(&rule["resources"]) {
            rights.extend(list(&rule["verbs"]).into_iter().map(|verb| (resource.clone(), verb)));
        }
    }
    rights
}

/// Leaves these rights to the accounts with the role at this path.
async fn allow(client: &Client, role: &str, rights: &[(String, String)]) {
    let rule =
        |(resource, verb): &(String, String)| json!({"apiGroups": [""], "resources": [resource], "verbs": [verb]});
    let rules: Vec<Value> = rights.iter().map(rule).collect();
    let body = json!({ "rules": rules }).to_string();
    let patched = call(client, Method::PATCH, role, "application/merge-patch+json", &body).await;
    patched.expect("patched");
    // The server learns of it by watching.
    sleep(Duration::from_secs(1)).await;
}

/// `all` without `one`.
fn without(all: &[(String, String)], one: &(String, String)) -> Vec<(String, String)> {
    all.iter().filter(|other| *other != one).cloned().collect()
}

/// A token of a ServiceAccount.
async fn token(client: &Client, account: &str) -> String {
    let path = format!("/api/v1/namespaces/kube-system/serviceaccounts/{account}/token");
    let request = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}).to_string();
    let token = call(client, Method::POST, &path, "application/json", &request)
        .await
        .expect("a token");
    token["status"]["token"].as_str().expect("a token").to_owned()
}

/// What the DaemonSet gives its container, with a token of its ServiceAccount.
async fn pod(client: &Client) -> Pod {
    let spec = get(client, DAEMON).await["spec"]["template"]["spec"].clone();
    let container = &spec["containers"][0];
    let words = |value: &Value| -> Vec<String> { serde_json::from_value(value.clone()).expect("words") };
    let capabilities = &container["securityContext"]["capabilities"];
    assert_eq!(capabilities["drop"], json!(["ALL"]));
    Pod {
        token: token(client, spec["serviceAccountName"].as_str().expect("an account")).await,
        arguments: words(&container["args"]),
        capabilities: Some(
            words(&capabilities["add"])
                .iter()
                .map(|name| name.to_lowercase())
                .collect(),
        ),
    }
}

/// flannel's own scenario F5 is that its manifest is accepted.
#[tokio::test]
#[ignore = "needs kube-apiserver"]
async fn the_manifests_are_accepted_and_have_the_names_of_flannels_documentation() {
    let server = Server::start().await;
    let client = server.client("admin").await;
    for name in ["ringmail.yml", "cleanup.yml"] {
        for document in manifest(name) {
            apply(&client, &document, "&dryRun=All").await;
            let made = apply(&client, &document, "").await;
            let again = apply(&client, &document, "").await;
            let version = |object: &Value| object["metadata"]["resourceVersion"].clone();
            assert_eq!(version(&made), version(&again), "{}", document.path);
        }
    }
    // kubectl get daemonset, configmap -n kube-system -l app=flannel; get pods -l app=flannel; logs -c kube-flannel
    for kind in [
        "/apis/apps/v1/namespaces/kube-system/daemonsets",
        "/api/v1/namespaces/kube-system/configmaps",
    ] {
        let found = get(&client, &format!("{kind}?labelSelector=app%3Dflannel")).await;
        assert_eq!(found["items"].as_array().map(Vec::len), Some(1), "{kind}");
    }
    let template = get(&client, DAEMON).await["spec"]["template"].clone();
    assert_eq!(template["metadata"]["labels"], json!({"app": "flannel"}));
    let spec = &template["spec"];
    assert_eq!(spec["containers"][0]["name"], "kube-flannel");
    assert_eq!(spec["securityContext"]["seccompProfile"]["type"], "RuntimeDefault");
    assert_eq!(spec["volumes"][5]["secret"]["defaultMode"], 0o400);
    for container in spec["initContainers"]
        .as_array()
        .into_iter()
        .chain(spec["containers"].as_array())
        .flatten()
    {
        let context = &container["securityContext"];
        assert_eq!(context["readOnlyRootFilesystem"], true, "{container}");
        assert_eq!(context["allowPrivilegeEscalation"], false, "{container}");
        assert_ne!(context["privileged"], true, "{container}");
    }
    // Another Secret than the one that an operator makes would be a key that everybody knows.
    let whole = read("deploy/ringmail.yml");
    assert!(!whole.contains("kind: Secret") && !whole.contains("\"PSK\""));
    let data = get(&client, CONFIG).await["data"].clone();
    let conflist = data["cni-conf.json"].as_str().expect("a conflist");
    assert_eq!(conflist, read("deploy/cni-conf.json"));
    check(data["net-conf.json"].as_str().expect("a configuration"));
}

const GOOD: &str = r#"{"Network": "10.244.0.0/16", "EnableNFTables": true, "Backend": {"Type": "vxlan"}}"#;
const WRONG: &str = r#"{"Network": "10.244.0.0/16", "EnableNFTables": true, "Backend": {"Type": "vxlam"}}"#;

/// Edits the configuration and waits for an Event.
async fn told_of_an_edit(server: &Server, host: &Host, json: &str, wanted: &str) {
    host.configure(json);
    let told = async || described(server, "node1").await.contains(wanted);
    host.eventually(wanted, told).await;
}

#[test]
#[ignore = "needs kube-apiserver"]
fn the_daemonsets_rights_and_capability_are_enough_and_each_is_needed() {
    mesh::alone(async {
        let server = Server::start_at("0.0.0.0").await;
        let client = server.client("admin").await;
        for document in manifest("ringmail.yml") {
            apply(&client, &document, "").await;
        }
        let role = format!("{ROLES}/ringmail");
        let full = rights(&get(&client, &role).await);
        let telling = rights(&get(&client, TELLING).await);
        let pod = pod(&client).await;
        let mut hosts = Vec::new();
        for number in 1..=2_u8 {
            server
                .add(&format!("node{number}"), &format!("10.244.{number}.0/24"))
                .await;
            let host = Host::new(&server, number);
            host.configure(GOOD);
            hosts.push(host);
        }
        let [mut first, mut second]: [Host; 2] = hosts.try_into().ok().expect("two of them");
        let probes = get(&client, DAEMON).await["spec"]["template"]["spec"]["containers"][0].clone();
        let probe = |host: &Host, name: &str| {
            let place = &probes[name]["httpGet"];
            let text = |name: &str| place[name].as_str().expect("a text").to_owned();
            let port = place["port"].as_u64().expect("a port");
            host.get(&format!("{}:{port}", text("host")), &text("path")) == Some(200)
        };

        // Enough: all that the daemon does on a node of a cluster.
        for name in ["livenessProbe", "readinessProbe"] {
            assert!(!probe(&first, name), "{name} of a daemon that does not run");
        }
        first.start_as(&server, &pod, &[("NODE_NAME", "node1")]);
        second.start_as(&server, &pod, &[("NODE_NAME", "node2")]);
        first.reaches("10.244.2.0").await;
        let settled = async || server.condition("node1").await == Some("False".into());
        first.eventually("the condition", settled).await;
        for name in ["livenessProbe", "readinessProbe"] {
            assert!(probe(&first, name), "{name}: {}", first.status());
        }
        let own = json!({"flannel.alpha.coreos.com/kube-subnet-manager": null});
        server.annotate("node1", own).await;
        let again = async || {
            server
                .notes("node1", "flannel.alpha.coreos.com/")
                .await
                .contains("manager true")
        };
        first.eventually("annotations are put back", again).await;
        for count in ["x1", "x2"] {
            told_of_an_edit(&server, &first, WRONG, &format!("ConfigurationRefused {count}")).await;
            told_of_an_edit(&server, &first, GOOD, &format!("ConfigurationAccepted {count}")).await;
        }
        first.stop(Signal::SIGTERM);
        assert!(!first.log().contains("(403)"), "{}", first.log());
        assert!(first.cleanup().contains("lease"), "{}", first.log());

        // Needed: without any one of them the daemon names what it was refused.
        for right in &full {
            allow(&client, &role, &without(&full, right)).await;
            first.start_as(&server, &pod, &[("NODE_NAME", "node1")]);
            let refused = format!("cannot {} resource \"{}\"", right.1, right.0);
            let named = async || first.log().replace('\\', "").contains(&refused);
            first.eventually(&format!("{refused} is said"), named).await;
            first.stop(Signal::SIGTERM);
            allow(&client, &role, &full).await;
            first.cleanup();
        }
        for right in &telling {
            allow(&client, TELLING, &without(&telling, right)).await;
            first.start_as(&server, &pod, &[("NODE_NAME", "node1")]);
            first.reaches("10.244.2.0").await;
            if right.1 == "patch" {
                told_of_an_edit(&server, &first, WRONG, "ConfigurationRefused x1").await;
                told_of_an_edit(&server, &first, GOOD, "ConfigurationAccepted x1").await;
            }
            first.configure(WRONG);
            let refused = format!("cannot {} resource \"events\"", right.1);
            let named = async || first.log().replace('\\', "").contains(&refused);
            first.eventually(&format!("{refused} is said"), named).await;
            first.configure(GOOD);
            first.stop(Signal::SIGTERM);
            first.cleanup();
        }
        // And without the capability.
        let none = Pod {
            capabilities: Some(vec!["net_raw".into()]),
            ..pod
        };
        first.start_as(&server, &none, &[("NODE_NAME", "node1")]);
        let named = async || first.log().contains("CAP_NET_ADMIN is missing");
        first.eventually("what is missing is named", named).await;
    });
}

#[test]
#[ignore = "needs kube-apiserver"]
fn the_cleanups_rights_are_enough_and_each_is_needed_and_it_may_be_repeated() {
    mesh::alone(async {
        let server = Server::start_at("0.0.0.0").await;
        let client = server.client("admin").await;
        for document in manifest("cleanup.yml") {
            apply(&client, &document, "").await;
        }
        server.add("node1", "10.244.1.0/24").await;
        let mut host = Host::new(&server, 1);
        host.configure(r#"{"Network": "10.244.0.0/16", "Backend": {"Type": "alloc"}}"#);
        host.start_in_pod(&server, &[("NODE_NAME", "node1")]);
        let leased = async || {
            server
                .notes("node1", "flannel.alpha.coreos.com/")
                .await
                .contains("manager true")
        };
        host.eventually("a lease", leased).await;
        host.stop(Signal::SIGTERM);

        mesh::enter(&server, &token(&client, "ringmail-cleanup").await);
        let full = rights(&get(&client, &format!("{ROLES}/ringmail-cleanup")).await);
        for right in &full {
            allow(&client, &format!("{ROLES}/ringmail-cleanup"), &without(&full, right)).await;
            let (good, said) = host.try_cleanup(&[]);
            assert!(!good && said.contains("still there"), "without {right:?}: {said}");
        }
        assert!(leased().await, "it could not be given back");
        allow(&client, &format!("{ROLES}/ringmail-cleanup"), &full).await;
        // What it is told to remove too, on this node's own files.
        let daemon = get(&client, CLEANUP).await;
        let arguments = &daemon["spec"]["template"]["spec"]["initContainers"][0]["args"];
        let words: Vec<String> = serde_json::from_value(arguments.clone()).expect("words");
        let root = server.folder().join("root");
        let also = |word: &String| word.strip_prefix("--also=/").map(|path| root.join(path));
        let paths: Vec<_> = words.iter().filter_map(also).collect();
        for path in &paths {
            std::fs::create_dir_all(path).expect("a folder in its place");
        }
        let flags: Vec<String> = paths.iter().map(|path| format!("--also={}", path.display())).collect();
        assert_eq!((words[0].as_str(), words.len()), ("cleanup", 1 + flags.len()));
        let (good, said) = host.try_cleanup(&flags);
        assert!(good, "{said}");
        assert!(!leased().await, "{said}");
        assert!(paths.iter().all(|path| !path.exists()), "{said}");
    });
}

/// What `ringmail config check` says of a net-conf.json.
fn check(json: &str) -> Value {
    let psk = concat!(env!("CARGO_TARGET_TMPDIR"), "/deploy.psk");
    std::fs::write(psk, "0123456789abcdef".repeat(4)).expect("written");
    let mut check = Command::new(env!("CARGO_BIN_EXE_ringmail"));
    check.args(["config", "check", "/dev/stdin", "--json", "--psk-file", psk]);
    let (good, text) = fed(check, json);
    assert!(good, "{json}: {text}");
    serde_json::from_str(&text).expect("JSON")
}

/// Runs a command with `input`; whether it did well, and its standard output, else what it said.
fn fed(mut command: Command, input: &str) -> (bool, String) {
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().expect("it is a program");
    let mut pipe = child.stdin.take().expect("a pipe");
    pipe.write_all(input.as_bytes()).expect("it reads");
    drop(pipe);
    let done = child.wait_with_output().expect("it ends");
    let said = if done.status.success() {
        done.stdout
    } else {
        done.stderr
    };
    (done.status.success(), String::from_utf8(said).expect("text"))
}

/// The chart, rendered with these values.
fn rendered(values: &Value) -> Vec<Document> {
    let mut helm = Command::new(program("RINGMAIL_HELM", "helm-4.3.2"));
    let chart = Path::new(REPOSITORY).join("deploy/chart");
    helm.args(["template", "ringmail", "--namespace=kube-system", "--values=-"])
        .arg(chart);
    let (good, text) = fed(helm, &values.to_string());
    assert!(good, "{values}: {text}");
    documents(&text)
}

/// What of an object is not the server's own, nor who wrote it.
fn essence(mut object: Value) -> Value {
    let all = object.as_object_mut().expect("an object");
    all.remove("status");
    let metadata = all["metadata"].as_object_mut().expect("metadata");
    metadata.retain(|key, _| ["name", "namespace", "labels"].contains(&key.as_str()));
    object
}

#[tokio::test]
#[ignore = "needs kube-apiserver"]
async fn the_chart_as_it_is_comes_to_the_manifest() {
    let server = shared().await;
    let client = server.client("admin").await;
    let (mut chart, mut manifest) = (rendered(&json!({})), manifest("ringmail.yml"));
    chart.sort_by(|a, b| a.path.cmp(&b.path));
    manifest.sort_by(|a, b| a.path.cmp(&b.path));
    assert_eq!(chart.len(), manifest.len());
    for (one, other) in chart.iter().zip(&manifest) {
        let (one, other) = (
            apply(&client, one, "&dryRun=All").await,
            apply(&client, other, "&dryRun=All").await,
        );
        assert_eq!(essence(one), essence(other));
    }
}

#[tokio::test]
#[ignore = "needs kube-apiserver"]
async fn the_chart_takes_every_option_of_every_backend_to_the_daemon() {
    let server = shared().await;
    let client = server.client("admin").await;
    let backends = [
        json!({
            "Type": "ipsec", "UDPEncap": "auto", "EncapPort": 4501, "ESPProposal": "aes256gcm16", "RekeyAfter": "7200s",
            "AllowPlaintextPeers": {
                "Type": "vxlan", "VNI": 7, "Port": 8473, "GBP": false, "Learning": false, "DirectRouting": true, "MTU": 1450,
            },
            "RekeyPackets": 8_589_934_592_u64, "RekeyBytes": 4_398_046_511_104_u64, "PSKGrace": "60s", "MTU": 1400,
        }),
        json!({
            "Type": "vxlan", "VNI": 7, "Port": 8472, "GBP": true, "Learning": true, "DirectRouting": true, "MTU": 1450,
        }),
        json!({"Type": "host-gw"}),
        json!({"Type": "udp", "Port": 8286}),
        json!({"Type": "ipip", "DirectRouting": true}),
        json!({"Type": "alloc"}),
        json!({
            "Type": "extension", "PreStartupCommand": "a && b", "PostStartupCommand": "c '<d>'",
            "SubnetAddCommand": "tee \"/x y\"", "SubnetRemoveCommand": "{{ .Values }}",
        }),
    ];
    let documented = read("deploy/chart/values.yaml");
    for backend in backends {
        let conf = json!({
            "Network": "10.244.0.0/16", "SubnetLen": 25, "SubnetMin": "10.244.1.0", "SubnetMax": "10.244.9.0",
            "EnableIPv6": true, "IPv6Network": "fd00:244::/48", "IPv6SubnetLen": 80, "IPv6SubnetMin": "fd00:244:0:0:1::",
            "IPv6SubnetMax": "fd00:244:0:0:9::", "EnableNFTables": true, "Backend": backend,
        });
        let values = json!({
            "netConf": conf, "args": ["--iface=eth1"], "verbosity": 1, "image": {"repository": "r.example.org/x", "tag": "t"},
            "imagePullSecrets": [{"name": "s"}], "podAnnotations": {"a": "b"}, "maxUnavailable": "10%",
            "healthz": {"ip": "0.0.0.0", "port": 9600},
        });
        for document in rendered(&values) {
            let made = apply(&client, &document, "&dryRun=All").await;
            if made["kind"] == "ConfigMap" {
                let found = check(made["data"]["net-conf.json"].as_str().expect("a configuration"));
                let settings = found["Backend"].as_object().expect("a backend");
                for (key, value) in backend.as_object().expect("a backend") {
                    assert!(documented.contains(key), "{key} is not in values.yaml");
                    assert_eq!(settings.get(key), Some(value), "{key}: {found}");
                }
                let range = json!({"net": "fd00:244::/48", "SubnetLen": 80, "first": 1, "last": 9});
                assert_eq!(found["IPv6Network"], range);
                assert_eq!(
                    (&found["Network"]["SubnetLen"], &found["EnableNFTables"]),
                    (&json!(25), &json!(true))
                );
            }
            if made["kind"] == "DaemonSet" {
                let container = &made["spec"]["template"]["spec"]["containers"][0];
                assert_eq!(container["image"], "r.example.org/x:t");
                let words = [
                    "run",
                    "--kube-subnet-mgr",
                    "--ip-masq",
                    "--psk-file=/etc/ringmail/psk",
                    "--healthz-ip=0.0.0.0",
                    "--healthz-port=9600",
                    "--v=1",
                    "--iface=eth1",
                ];
                assert_eq!(container["args"], json!(words));
                for probe in ["livenessProbe", "readinessProbe"] {
                    assert_eq!(container[probe]["httpGet"]["port"], 9600);
                }
                let port = &container["ports"][0];
                assert_eq!(
                    (&port["name"], &port["containerPort"]),
                    (&json!("metrics"), &json!(9600))
                );
                // /dev/net/tun is a device, which only a privileged container gets.
                assert_eq!(container["securityContext"]["privileged"], backend["Type"] == "udp");
            }
        }
    }
    let without = rendered(&json!({"cni": {"install": false}}));
    assert!(without.iter().all(|document| !document.yaml.contains("/opt/cni/bin")));
}
