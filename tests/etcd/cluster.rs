//! Real etcd servers on free ports of loopback, in folders of their own, ended with the test.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use ringmail::store::etcd::{Access, Endpoints};

pub(crate) struct Cluster {
    folder: PathBuf,
    members: Vec<Member>,
    tls: Option<Files>,
}

struct Member {
    client: u16,
    peer: u16,
    data: PathBuf,
    child: Option<Child>,
}

#[derive(Clone)]
struct Files {
    ca: PathBuf,
    server: (PathBuf, PathBuf),
    client: (PathBuf, PathBuf),
    asked: bool,
}

fn folder() -> PathBuf {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let folder = std::env::temp_dir().join(format!("ringmail-etcd-{}-{number}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("a folder");
    folder
}

/// A port that nothing listens on, below those that the kernel gives out by itself, and never the same one twice: two
/// tests with one port would talk to one server.
pub(crate) fn port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    loop {
        let at = std::process::id() * 64 + NEXT.fetch_add(1, Ordering::Relaxed);
        let port = u16::try_from(15_000 + at % 17_000).expect("below 32000");
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

impl Cluster {
    pub(crate) async fn one() -> Self {
        Self::of(1, None).await
    }

    pub(crate) async fn three() -> Self {
        Self::of(3, None).await
    }

    /// One with TLS; `client`: it asks for a client's certificate.
    pub(crate) async fn secure(tls: &Tls, client: bool) -> Self {
        let files = Files {
            ca: tls.ca(),
            server: tls.pair("server"),
            client: tls.client(),
            asked: client,
        };
        Self::of(1, Some(files)).await
    }

    async fn of(count: usize, tls: Option<Files>) -> Self {
        let folder = folder();
        let member = |number: usize| Member {
            client: port(),
            peer: port(),
            data: folder.join(format!("data-{number}")),
            child: None,
        };
        let members = (0..count).map(member).collect();
        let mut cluster = Self { folder, members, tls };
        for number in 0..count {
            cluster.start(number);
        }
        cluster.answers().await;
        cluster
    }

    fn scheme(&self) -> &'static str {
        if self.tls.is_some() { "https" } else { "http" }
    }

    pub(crate) fn endpoints(&self) -> String {
        let url = |member: &Member| format!("{}://127.0.0.1:{}", self.scheme(), member.client);
        self.members.iter().map(url).collect::<Vec<_>>().join(",")
    }

    pub(crate) fn access(&self, prefix: &str) -> Access {
        Access {
            endpoints: Endpoints::parse(&self.endpoints()).expect("URLs"),
            prefix: prefix.into(),
            ca: None,
            certificate: None,
            user: None,
        }
    }

    pub(crate) fn start(&mut self, number: usize) {
        let all: Vec<String> = self
            .members
            .iter()
            .enumerate()
            .map(|(number, member)| format!("m{number}=http://127.0.0.1:{}", member.peer))
            .collect();
        let member = &self.members[number];
        let client = format!("{}://127.0.0.1:{}", self.scheme(), member.client);
        let peer = format!("http://127.0.0.1:{}", member.peer);
        let mut command = Command::new("etcd");
        command
            .args(["--name", &format!("m{number}"), "--data-dir"])
            .arg(&member.data)
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args([
                "--initial-cluster",
                &all.join(","),
                "--logger",
                "zap",
                "--log-level",
                "error",
            ]);
        if let Some(files) = &self.tls {
            command
                .arg("--cert-file")
                .arg(&files.server.0)
                .arg("--key-file")
                .arg(&files.server.1);
            if files.asked {
                command
                    .arg("--client-cert-auth")
                    .arg("--trusted-ca-file")
                    .arg(&files.ca);
            }
        }
        let log = std::fs::File::create(self.folder.join(format!("log-{number}"))).expect("a log");
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn();
        self.members[number].child = Some(child.expect("etcd is installed: apt install etcd-server"));
    }

    pub(crate) fn stop(&mut self, number: usize) {
        if let Some(mut child) = self.members[number].child.take() {
            child.kill().expect("it runs");
            child.wait().expect("it ends");
        }
    }

    fn signal(&self, number: usize, signal: Signal) {
        let child = self.members[number].child.as_ref().expect("it runs");
        kill(Pid::from_raw(child.id().cast_signed()), signal).expect("signalled");
    }

    pub(crate) fn pause(&self, number: usize) {
        self.signal(number, Signal::SIGSTOP);
    }

    pub(crate) fn resume(&self, number: usize) {
        self.signal(number, Signal::SIGCONT);
    }

    /// Waits until it serves. A member that could not start has failed the test.
    pub(crate) async fn answers(&mut self) {
        let end = Instant::now() + Duration::from_secs(30);
        while !self.ctl(&["get", "/nothing"]).1 {
            assert!(
                Instant::now() < end,
                "etcd does not serve: {}",
                self.ctl(&["get", "/nothing"]).0
            );
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        for child in self.members.iter_mut().filter_map(|member| member.child.as_mut()) {
            let ended = child.try_wait().expect("it was started");
            assert_eq!(ended, None, "an etcd ended: see the log in {}", self.folder.display());
        }
    }

    /// The number of the member that leads.
    pub(crate) fn leader(&self) -> usize {
        let (text, _) = self.ctl(&["endpoint", "status"]);
        let leads = |line: &&str| line.split(", ").nth(4) == Some("true");
        let line = text.lines().find(leads).unwrap_or_else(|| panic!("no leader: {text}"));
        let mine = |member: &Member| line.contains(&format!(":{},", member.client));
        self.members.iter().position(mine).expect("one of ours")
    }

    fn saved(&self) -> PathBuf {
        self.folder.join("saved")
    }

    /// Saves what the one member holds.
    pub(crate) fn save(&self) {
        ctl(self, &["snapshot", "save", self.saved().to_str().expect("a path")]);
    }

    /// Puts the one member back to what was saved, as an operator does after a disaster.
    pub(crate) fn restore(&mut self) {
        self.stop(0);
        let data = self.folder.join("restored");
        let peer = format!("http://127.0.0.1:{}", self.members[0].peer);
        let (text, done) = self.ctl(&[
            "snapshot",
            "restore",
            self.saved().to_str().expect("a path"),
            "--name",
            "m0",
            "--initial-cluster",
            &format!("m0={peer}"),
            "--initial-advertise-peer-urls",
            &peer,
            "--data-dir",
            data.to_str().expect("a path"),
        ]);
        assert!(done, "{text}");
        self.members[0].data = data;
        self.start(0);
    }

    /// Begins the one member anew, with nothing in it and the lowest revisions.
    pub(crate) fn empty(&mut self) {
        self.stop(0);
        self.members[0].data = self.folder.join("empty");
        self.start(0);
    }

    fn ctl(&self, arguments: &[&str]) -> (String, bool) {
        let mut command = Command::new("etcdctl");
        command
            .env("ETCDCTL_API", "3")
            .args(["--endpoints", &self.endpoints(), "--command-timeout=3s"]);
        if let Some(files) = &self.tls {
            command.arg("--cacert").arg(&files.ca);
            command
                .arg("--cert")
                .arg(&files.client.0)
                .arg("--key")
                .arg(&files.client.1);
        }
        let output = command
            .args(arguments)
            .output()
            .expect("etcdctl is installed: apt install etcd-client");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let said = String::from_utf8_lossy(&output.stderr);
        match output.status.success() {
            true => (text, true),
            false => (format!("{text}{said}"), false),
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        for number in 0..self.members.len() {
            self.stop(number);
        }
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// Runs etcdctl; it must succeed.
pub(crate) fn ctl(cluster: &Cluster, arguments: &[&str]) -> String {
    let (text, done) = cluster.ctl(arguments);
    assert!(done, "etcdctl {arguments:?}: {text}");
    text
}

impl Drop for Tls {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A certificate authority and what it has signed.
pub(crate) struct Tls(PathBuf);

impl Tls {
    pub(crate) fn new() -> Self {
        let tls = Self(folder());
        // The second address is that of a lab's wire.
        let extensions = "subjectAltName=IP:127.0.0.1,IP:192.168.77.254\nextendedKeyUsage=serverAuth,clientAuth\n";
        std::fs::write(tls.0.join("extensions"), extensions).expect("written");
        tls.openssl("req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=authority -keyout ca.key -out ca.crt");
        for name in ["server", "client"] {
            tls.openssl(&format!(
                "req -newkey rsa:2048 -nodes -subj /CN={name} -keyout {name}.key -out {name}.csr"
            ));
            tls.openssl(&format!(
                "x509 -req -in {name}.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 2 -extfile extensions -out {name}.crt"
            ));
        }
        tls
    }

    fn openssl(&self, command: &str) {
        let output = Command::new("openssl")
            .args(command.split(' '))
            .current_dir(&self.0)
            .output();
        let output = output.expect("openssl is installed");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    fn path(&self, name: &str) -> PathBuf {
        Path::new(&self.0).join(name)
    }

    pub(crate) fn ca(&self) -> PathBuf {
        self.path("ca.crt")
    }

    pub(crate) fn pair(&self, name: &str) -> (PathBuf, PathBuf) {
        (self.path(&format!("{name}.crt")), self.path(&format!("{name}.key")))
    }

    pub(crate) fn client(&self) -> (PathBuf, PathBuf) {
        self.pair("client")
    }
}
