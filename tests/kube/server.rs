//! A real API server of Kubernetes with an etcd of its own, on loopback, ended with the last test that uses it.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config};
use ringmail::store::kube::{Access, Keys, Own};
use serde_json::{Value, json};
use tokio::sync::Mutex;
use tokio::time::sleep;

use crate::cluster::{Cluster, Tls, ctl, port};
use crate::name;

/// What the daemon may do, and nothing else: flannel's ClusterRole, and Events.
pub(crate) const RULES: &str = r#"[
    {"apiGroups": [""], "resources": ["nodes"], "verbs": ["get", "list", "watch"]},
    {"apiGroups": [""], "resources": ["nodes/status"], "verbs": ["patch"]},
    {"apiGroups": [""], "resources": ["pods"], "verbs": ["get"]},
    {"apiGroups": [""], "resources": ["events"], "verbs": ["create", "patch"]}
]"#;

pub(crate) struct Server {
    etcd: Cluster,
    tls: Tls,
    port: u16,
    folder: PathBuf,
    bind: &'static str,
    child: Option<Child>,
}

/// The server that tests share which do it no harm. Each has annotations of its own.
pub(crate) async fn shared() -> Arc<Server> {
    static SHARED: Mutex<Weak<Server>> = Mutex::const_new(Weak::new());
    let mut shared = SHARED.lock().await;
    if let Some(server) = shared.upgrade() {
        return server;
    }
    let server = Arc::new(Server::start().await);
    *shared = Arc::downgrade(&server);
    server
}

/// A program that `tests/run kube` builds into the cache, or that `variable` names.
pub(crate) fn program(variable: &str, name: &str) -> PathBuf {
    let given = std::env::var_os(variable).map(PathBuf::from);
    let cache = || {
        let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
        let home = std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
        let cache = cache.or(home).expect("HOME");
        cache.join("ringmail-tools/bin").join(name)
    };
    let program = given.unwrap_or_else(cache);
    let shown = program.display();
    assert!(program.exists(), "{shown} is missing: `tests/run kube` builds it");
    program
}

impl Server {
    pub(crate) async fn start() -> Self {
        Self::start_at("127.0.0.1").await
    }

    /// One that listens at an address.
    pub(crate) async fn start_at(bind: &'static str) -> Self {
        let (etcd, tls) = (Cluster::one().await, Tls::new());
        let folder = tls.ca().parent().expect("a folder").to_owned();
        let tokens = "admin-token,admin,1,system:masters\nringmail-token,ringmail,2\nnobody-token,nobody,3\n";
        std::fs::write(folder.join("tokens.csv"), tokens).expect("written");
        let mut server = Self {
            etcd,
            tls,
            port: port(),
            folder,
            bind,
            child: None,
        };
        for user in ["admin", "ringmail", "nobody"] {
            server.write_kubeconfig(user);
        }
        server.up();
        server.answers().await;
        server.allow(RULES).await;
        server
    }

    fn write_kubeconfig(&self, user: &str) {
        let ca = self.tls.ca();
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: it\n\
             clusters: [{{name: it, cluster: {{server: \"{}\", certificate-authority: \"{}\"}}}}]\n\
             contexts: [{{name: it, context: {{cluster: it, user: {user}}}}}]\n\
             users: [{{name: {user}, user: {{token: {user}-token}}}}]\n",
            self.url(),
            ca.display()
        );
        std::fs::write(self.kubeconfig(user), text).expect("written");
    }

    pub(crate) fn kubeconfig(&self, user: &str) -> PathBuf {
        self.folder.join(format!("{user}.kubeconfig"))
    }

    /// A folder that goes with the server.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// The certificate of its authority.
    pub(crate) fn authority(&self) -> PathBuf {
        self.tls.ca()
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    pub(crate) fn url(&self) -> String {
        format!("https://127.0.0.1:{}", self.port)
    }

    /// Starts the program, if it does not run.
    pub(crate) fn up(&mut self) {
        let (certificate, key) = self.tls.pair("server");
        let path = |path: &PathBuf| path.display().to_string();
        let mut command = Command::new(program("RINGMAIL_APISERVER", "kube-apiserver-1.36.3"));
        command.args([
            format!("--etcd-servers={}", self.etcd.endpoints()),
            format!("--secure-port={}", self.port),
            format!("--tls-cert-file={}", path(&certificate)),
            format!("--tls-private-key-file={}", path(&key)),
            format!("--service-account-key-file={}", path(&key)),
            format!("--service-account-signing-key-file={}", path(&key)),
            format!("--token-auth-file={}", self.folder.join("tokens.csv").display()),
            format!("--cert-dir={}", self.folder.display()),
            format!("--bind-address={}", self.bind),
        ]);
        command.args([
            "--advertise-address=127.0.0.1",
            "--service-account-issuer=https://kubernetes.default.svc",
            "--service-cluster-ip-range=10.96.0.0/24",
            "--authorization-mode=RBAC",
            "--anonymous-auth=false",
            "--endpoint-reconciler-type=none",
            "--disable-admission-plugins=ServiceAccount",
            "--allow-privileged=true",
            // History is compacted when a test says so.
            "--etcd-compaction-interval=0",
        ]);
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.folder.join("log"))
            .expect("a log");
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn();
        self.child = Some(child.expect("it is a program"));
    }

    pub(crate) fn down(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().expect("it runs");
            child.wait().expect("it ends");
        }
    }

    pub(crate) async fn answers(&mut self) {
        let end = Instant::now() + Duration::from_secs(120);
        loop {
            if self.nodes().await.list(&ListParams::default().limit(1)).await.is_ok() {
                return;
            }
            let child = self.child.as_mut().expect("it was started");
            let ended = child.try_wait().expect("it was started");
            assert!(
                ended.is_none() && Instant::now() < end,
                "the API server does not serve: {}",
                self.log()
            );
            sleep(Duration::from_millis(200)).await;
        }
    }

    /// Moves to another port, so that whoever follows it is cut off; returns the one before, to move back to.
    pub(crate) async fn elsewhere(&mut self, to: Option<u16>) -> u16 {
        self.down();
        let before = std::mem::replace(&mut self.port, to.unwrap_or_else(port));
        self.write_kubeconfig("admin");
        self.up();
        self.answers().await;
        before
    }

    /// The end of its log.
    fn log(&self) -> String {
        let text = std::fs::read_to_string(self.folder.join("log")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }

    pub(crate) async fn client(&self, user: &str) -> Client {
        let read = Kubeconfig::read_from(self.kubeconfig(user)).expect("a kubeconfig");
        let config = Config::from_custom_kubeconfig(read, &KubeConfigOptions::default()).await;
        Client::try_from(config.expect("a configuration")).expect("a client")
    }

    pub(crate) fn access(&self, prefix: &str, own: &str) -> Access {
        Access {
            kubeconfig: Some(self.kubeconfig("ringmail")),
            url: None,
            keys: Keys::of(prefix).expect("a prefix"),
            own: Own::Named(name(own)),
        }
    }

    pub(crate) async fn nodes(&self) -> Api<Node> {
        Api::all(self.client("admin").await)
    }

    /// Lets the user ringmail do what `rules` say.
    pub(crate) async fn allow(&self, rules: &str) {
        let client = self.client("admin").await;
        let rules: Value = serde_json::from_str(rules).expect("rules");
        let role = json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole",
            "metadata": {"name": "ringmail"}, "rules": rules,
        });
        let binding = json!({
            "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding",
            "metadata": {"name": "ringmail"},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "ringmail"},
            "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "ringmail"}],
        });
        let by = PatchParams::apply("test").force();
        let roles: Api<k8s_openapi::api::rbac::v1::ClusterRole> = Api::all(client.clone());
        roles
            .patch("ringmail", &by, &Patch::Apply(&role))
            .await
            .expect("a role");
        let bindings: Api<k8s_openapi::api::rbac::v1::ClusterRoleBinding> = Api::all(client);
        bindings
            .patch("ringmail", &by, &Patch::Apply(&binding))
            .await
            .expect("a binding");
    }

    /// Makes a Node with podCIDRs, separated by spaces.
    pub(crate) async fn add(&self, name: &str, pods: &str) -> Node {
        let pods: Vec<&str> = pods.split(' ').filter(|net| !net.is_empty()).collect();
        let mut spec = json!({});
        if let Some(first) = pods.first() {
            spec = json!({"podCIDR": first, "podCIDRs": pods});
        }
        let node = json!({"metadata": {"name": name}, "spec": spec});
        let node: Node = serde_json::from_value(node).expect("a Node");
        self.nodes()
            .await
            .create(&PostParams::default(), &node)
            .await
            .expect("created")
    }

    pub(crate) async fn remove(&self, name: &str) {
        self.nodes()
            .await
            .delete(name, &DeleteParams::default())
            .await
            .expect("deleted");
    }

    /// Sets annotations; `null` removes.
    pub(crate) async fn annotate(&self, node: &str, annotations: Value) {
        let patch = json!({"metadata": {"annotations": annotations}});
        let patched = self
            .nodes()
            .await
            .patch(node, &PatchParams::default(), &Patch::Merge(patch))
            .await;
        patched.expect("annotated");
    }

    /// Makes a Pod on a Node.
    pub(crate) async fn add_pod(&self, name: &str, node: &str) {
        let pod = json!({
            "metadata": {"name": name, "namespace": "default"},
            "spec": {"nodeName": node, "containers": [{"name": "x", "image": "x"}]},
        });
        let pod: Pod = serde_json::from_value(pod).expect("a Pod");
        let pods: Api<Pod> = Api::namespaced(self.client("admin").await, "default");
        pods.create(&PostParams::default(), &pod).await.expect("created");
    }

    /// The status of a Node's condition NetworkUnavailable.
    pub(crate) async fn condition(&self, node: &str) -> Option<String> {
        let conditions = self.get(node).await.status?.conditions?;
        conditions
            .into_iter()
            .find(|one| one.type_ == "NetworkUnavailable")
            .map(|one| one.status)
    }

    /// Makes `count` Nodes, big-100 and so on, with these images on them; then flannel, with leases of `alloc`.
    pub(crate) async fn fill(&self, count: u32, images: &Value) {
        let nodes = self.nodes().await;
        let (by, prefix) = (PatchParams::default(), "flannel.alpha.coreos.com");
        for number in 0..count {
            let name = format!("big-{}", number + 100);
            let pods = format!("10.{}.{}.0/24", 1 + number / 256, number % 256);
            let node = json!({"metadata": {"name": name}, "spec": {"podCIDR": pods, "podCIDRs": [pods]}});
            let node: Node = serde_json::from_value(node).expect("a Node");
            nodes.create(&PostParams::default(), &node).await.expect("created");
            let patch = json!({
                "metadata": {"annotations": {
                    format!("{prefix}/kube-subnet-manager"): "true", format!("{prefix}/backend-type"): "",
                    format!("{prefix}/backend-data"): "null", format!("{prefix}/public-ip"): "192.168.77.9",
                }},
                "status": {"images": images},
            });
            nodes
                .patch_status(&name, &by, &Patch::Merge(patch))
                .await
                .expect("filled");
        }
    }

    /// Has the Nodes of [`Server::fill`] say that they are well, as kubelets do, one after the other and as many at a time as
    /// a server with a few thousand kubelets is asked by, for `long`; how often they said it.
    pub(crate) async fn beat(&self, count: u32, long: Duration) -> u32 {
        const AT_ONCE: usize = 8;
        let (nodes, by, end) = (self.nodes().await, PatchParams::default(), Instant::now() + long);
        let beats = (0..).take_while(|_| Instant::now() < end).map(|number: u32| {
            let now = format!(
                "2026-01-01T{:02}:{:02}:{:02}Z",
                number / 3600,
                number / 60 % 60,
                number % 60
            );
            let ready = json!({"type": "Ready", "status": "True", "reason": "KubeletReady", "lastHeartbeatTime": now});
            let (patch, name) = (
                json!({"status": {"conditions": [ready]}}),
                format!("big-{}", number % count + 100),
            );
            let (nodes, by) = (nodes.clone(), by.clone());
            async move {
                nodes
                    .patch_status(&name, &by, &Patch::Strategic(patch))
                    .await
                    .expect("said")
            }
        });
        let said = futures_util::stream::iter(beats).buffer_unordered(AT_ONCE).count();
        u32::try_from(said.await).expect("not so many")
    }

    pub(crate) async fn get(&self, node: &str) -> Node {
        self.nodes().await.get(node).await.expect("there")
    }

    /// The annotations of a Node below `prefix`, one a line.
    pub(crate) async fn notes(&self, node: &str, prefix: &str) -> String {
        let node = self.get(node).await;
        let mut text = String::new();
        for (name, value) in node.metadata.annotations.unwrap_or_default() {
            if let Some(note) = name.strip_prefix(prefix) {
                writeln!(text, "{note} {value}").expect("text");
            }
        }
        text
    }

    /// Throws the whole history of changes away.
    pub(crate) fn compact(&self) {
        let text = ctl(&self.etcd, &["get", "/nothing", "-w", "json"]);
        let answer: Value = serde_json::from_str(&text).expect("JSON");
        let revision = answer["header"]["revision"].as_u64().expect("a revision");
        ctl(&self.etcd, &["compact", &revision.to_string()]);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.down();
    }
}
