//! The daemon itself over a real API server: nodes as network namespaces on a bridge, all in a network of the test's own.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpStream};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::server::Server;

/// Where the API server is, as the nodes see it.
const WIRE: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 254);

/// Runs `work` on this thread, in a network of its own that has loopback and a bridge, and with a /run of its own.
pub(crate) fn alone(work: impl Future<Output = ()>) {
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("root makes namespaces");
    command("mount --make-rprivate /");
    command("mount -t tmpfs tmpfs /run");
    command("ip link set lo up");
    command("ip link add wire type bridge");
    command(&format!("ip address add {WIRE}/24 dev wire"));
    command("ip link set wire up");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime").block_on(work);
}

fn command(line: &str) -> String {
    let (good, text) = attempt(line);
    assert!(good, "{line}: {text}");
    text
}

fn attempt(line: &str) -> (bool, String) {
    let mut words = line.split_whitespace();
    let done = Command::new(words.next().expect("a command"))
        .args(words)
        .output()
        .expect(line);
    let text = [done.stdout, done.stderr].concat();
    (done.status.success(), String::from_utf8_lossy(&text).into_owned())
}

/// What flannel's DaemonSet gives its daemon.
const FLAGS: [&str; 3] = ["run", "--kube-subnet-mgr", "--ip-masq"];

/// What a Pod gives its container.
pub(crate) struct Pod {
    /// Of its service account.
    pub(crate) token: String,
    pub(crate) arguments: Vec<String>,
    /// `None`: all there are, and a root file system to write to.
    pub(crate) capabilities: Option<Vec<String>>,
}

impl Default for Pod {
    fn default() -> Self {
        Self {
            token: "ringmail-token".into(),
            arguments: FLAGS.map(String::from).into(),
            capabilities: None,
        }
    }
}

/// Makes the files that a Pod of the account with this token finds.
pub(crate) fn enter(server: &Server, token: &str) {
    let account = Path::new("/run/secrets/kubernetes.io/serviceaccount");
    fs::create_dir_all(account).expect("a folder");
    fs::write(account.join("token"), token).expect("written");
    fs::write(account.join("namespace"), "default").expect("written");
    fs::copy(server.authority(), account.join("ca.crt")).expect("copied");
}

/// A node and its daemon.
pub(crate) struct Host {
    network: File,
    folder: PathBuf,
    daemon: Option<Child>,
    /// What the daemon was told by variables.
    variables: Vec<(String, String)>,
}

impl Host {
    /// Node `number`, at 192.168.77.`number`.
    pub(crate) fn new(server: &Server, number: u8) -> Self {
        let make = || {
            unshare(CloneFlags::CLONE_NEWNET).expect("root makes a network namespace");
            File::open("/proc/thread-self/ns/net").expect("the namespace")
        };
        let network = std::thread::spawn(make).join().expect("a namespace");
        let host = Self {
            network,
            folder: server.folder().join(format!("node-{number}")),
            daemon: None,
            variables: Vec::new(),
        };
        fs::create_dir_all(host.folder.join("conf")).expect("a folder");
        host.expect("ip link set lo up");
        host.plug("eth0", number);
        host.by_eth0(true);
        host
    }

    /// An interface on the wire, at 192.168.77.`last`.
    pub(crate) fn plug(&self, interface: &str, last: u8) {
        let there = format!("/proc/{}/fd/{}", std::process::id(), self.network.as_raw_fd());
        command(&format!(
            "ip link add port{last} type veth peer name {interface} netns {there}"
        ));
        command(&format!("ip link set port{last} master wire up"));
        self.expect(&format!("ip address add 192.168.77.{last}/24 dev {interface}"));
        self.expect(&format!("ip link set {interface} up"));
    }

    /// The uplink goes up, with the default route, or down.
    pub(crate) fn by_eth0(&self, up: bool) {
        if up {
            self.expect("ip link set eth0 up");
            self.expect(&format!("ip route add default via {WIRE} dev eth0"));
        } else {
            self.expect("ip link set eth0 down");
        }
    }

    /// Runs `work` in the node's network.
    fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let there = || {
            setns(self.network.as_fd(), CloneFlags::CLONE_NEWNET).expect("enter the namespace");
            work()
        };
        std::thread::scope(|scope| scope.spawn(there).join().expect("no panic"))
    }

    fn expect(&self, line: &str) {
        let (good, text) = self.attempt(line);
        assert!(good, "{line}: {text}");
    }

    pub(crate) fn attempt(&self, line: &str) -> (bool, String) {
        self.inside(|| attempt(line))
    }

    /// Puts net-conf.json in its place as the kubelet does: a new folder, and a link to it that is turned.
    pub(crate) fn configure(&self, json: &str) {
        let conf = self.folder.join("conf");
        let now = format!("..{}", fs::read_dir(&conf).expect("a folder").count());
        fs::create_dir(conf.join(&now)).expect("a folder");
        fs::write(conf.join(&now).join("net-conf.json"), json).expect("written");
        symlink(&now, conf.join("..data_tmp")).expect("a link");
        fs::rename(conf.join("..data_tmp"), conf.join("..data")).expect("turned");
        if !conf.join("net-conf.json").exists() {
            symlink("..data/net-conf.json", conf.join("net-conf.json")).expect("a link");
        }
    }

    /// Starts the daemon with flannel's own flags; `names` are the variables that say who it is.
    pub(crate) fn start(&mut self, server: &Server, names: &[(&str, &str)]) {
        let url = format!("--kube-api-url=https://{WIRE}:{}", server.port());
        let kubeconfig = format!("--kubeconfig-file={}", server.kubeconfig("ringmail").display());
        let daemon = Command::new(env!("CARGO_BIN_EXE_ringmail"));
        self.spawn(
            daemon,
            &[&FLAGS.map(String::from)[..], &[url, kubeconfig]].concat(),
            names,
        );
    }

    /// The same as in a Pod of the user ringmail: the API server is found by the variables and files that every Pod has.
    pub(crate) fn start_in_pod(&mut self, server: &Server, names: &[(&str, &str)]) {
        self.start_as(server, &Pod::default(), names);
    }

    /// Starts the daemon as a Pod's container.
    pub(crate) fn start_as(&mut self, server: &Server, pod: &Pod, names: &[(&str, &str)]) {
        enter(server, &pod.token);
        let (wire, port) = (WIRE.to_string(), server.port().to_string());
        let around = [
            ("KUBERNETES_SERVICE_HOST", wire.as_str()),
            ("KUBERNETES_SERVICE_PORT", port.as_str()),
        ];
        let daemon = match &pod.capabilities {
            None => Command::new(env!("CARGO_BIN_EXE_ringmail")),
            Some(capabilities) => self.confined(capabilities),
        };
        self.spawn(daemon, &pod.arguments, &[names, &around].concat());
    }

    /// The daemon with these capabilities and no way to more, and nothing but its own folder to write to, as in a container
    /// whose root file system and /proc/sys are read-only.
    fn confined(&self, capabilities: &[String]) -> Command {
        // What the kubelet has done on a node before any Pod is there.
        assert!(self.attempt("sysctl -qw net.ipv4.ip_forward=1").0);
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "sh", "-ec"])
            .arg(
                "mount --bind \"$1\" \"$1\"; mount -o remount,bind,ro /; mount --bind /proc/sys /proc/sys; \
                 mount -o remount,bind,ro /proc/sys; shift; exec setpriv \"$@\"",
            )
            .arg("sh")
            .arg(&self.folder)
            .args(["--no-new-privs", "--inh-caps=-all"])
            .arg(format!("--bounding-set=-all,+{}", capabilities.join(",+")))
            .arg(env!("CARGO_BIN_EXE_ringmail"));
        command
    }

    fn spawn(&mut self, mut daemon: Command, flags: &[String], variables: &[(&str, &str)]) {
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        self.variables = variables.iter().map(owned).collect();
        let at = |name: &str| self.folder.join(name);
        let log = File::options()
            .create(true)
            .append(true)
            .open(at("log"))
            .expect("a log");
        daemon
            .args(flags)
            .arg("--iface=eth0")
            .arg("--net-config-path")
            .arg(at("conf/net-conf.json"))
            .arg("--run-dir")
            .arg(at("run"))
            .arg("--subnet-file")
            .arg(at("subnet.env"))
            .env_remove("NODE_NAME")
            .env_remove("NOTIFY_SOCKET")
            .envs(variables.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        self.daemon = Some(self.inside(move || daemon.spawn().expect("the daemon")));
    }

    /// Ends the daemon.
    pub(crate) fn stop(&mut self, signal: Signal) {
        let Some(mut daemon) = self.daemon.take() else { return };
        kill(Pid::from_raw(daemon.id().cast_signed()), signal).expect("it runs");
        daemon.wait().expect("it ends");
    }

    /// A line of `/proc/<pid>/status`, in KiB.
    pub(crate) fn memory(&self, line: &str) -> u64 {
        let pid = self.daemon.as_ref().expect("it runs").id();
        let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("it runs");
        let found = status.lines().find(|text| text.starts_with(line)).expect(line);
        found
            .split_whitespace()
            .nth(1)
            .expect("a number")
            .parse()
            .expect("a number")
    }

    /// Processor time of the daemon so far.
    pub(crate) fn processor(&self) -> Duration {
        let pid = self.daemon.as_ref().expect("it runs").id();
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("it runs");
        let fields: Vec<&str> = stat.rsplit(')').next().expect("fields").split_whitespace().collect();
        let ticks: u64 = fields[11].parse::<u64>().expect("a number") + fields[12].parse::<u64>().expect("a number");
        Duration::from_millis(ticks * 10)
    }

    /// Bytes that have come to the node.
    pub(crate) fn received(&self) -> u64 {
        let (_, devices) = self.attempt("cat /proc/net/dev");
        let counts = devices.split_once("eth0:").expect("its uplink").1;
        let bytes = counts.split_whitespace().next().expect("a number");
        bytes.parse().expect("a number")
    }

    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.folder.join("log")).unwrap_or_default()
    }

    pub(crate) fn subnet_env(&self) -> String {
        fs::read_to_string(self.folder.join("subnet.env")).unwrap_or_default()
    }

    /// Puts a folder in the place of subnet.env, which no file can replace; or takes it away.
    pub(crate) fn block_subnet_env(&self, block: bool) {
        let path = self.folder.join("subnet.env");
        if block {
            fs::remove_file(&path).expect("it is there");
            fs::create_dir_all(path.join("in the way")).expect("a folder");
        } else {
            fs::remove_dir_all(&path).expect("it is there");
        }
    }

    /// What `ringmail status` says.
    pub(crate) fn status(&self) -> String {
        self.ask("status").1
    }

    /// Asks the daemon by a verb and its flags: whether it did well, and what it said.
    pub(crate) fn ask(&self, verb: &str) -> (bool, String) {
        let (program, run) = (env!("CARGO_BIN_EXE_ringmail"), self.folder.join("run"));
        self.attempt(&format!("{program} {verb} --run-dir {}", run.display()))
    }

    /// The status of what the daemon serves at an address and port of the host; `None` where nobody listens.
    pub(crate) fn get(&self, place: &str, path: &str) -> Option<u16> {
        self.inside(|| {
            let mut stream = TcpStream::connect(place).ok()?;
            write!(stream, "GET {path} HTTP/1.1\r\nHost: {place}\r\n\r\n").ok()?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer).ok()?;
            answer.split(' ').nth(1)?.parse().ok()
        })
    }

    /// Takes away what the daemon made; it must do well.
    pub(crate) fn cleanup(&self) -> String {
        let (good, text) = self.try_cleanup(&[]);
        assert!(good, "{text}");
        text
    }

    /// The same with more flags: whether it did well, and what it said.
    pub(crate) fn try_cleanup(&self, flags: &[String]) -> (bool, String) {
        let mut cleanup = Command::new(env!("CARGO_BIN_EXE_ringmail"));
        cleanup
            .args(["cleanup", "--run-dir"])
            .arg(self.folder.join("run"))
            .args(flags);
        cleanup.envs(self.variables.iter().map(|(name, value)| (name, value)));
        let done = self.inside(move || cleanup.output().expect("it is a program"));
        let text = String::from_utf8_lossy(&[done.stdout, done.stderr].concat()).into_owned();
        (done.status.success(), text)
    }

    /// Waits until `wanted` holds; how long that took.
    pub(crate) async fn eventually(&self, what: &str, mut wanted: impl AsyncFnMut() -> bool) -> Duration {
        let began = Instant::now();
        while !wanted().await {
            assert!(began.elapsed() < Duration::from_secs(60), "{what}:\n{}", self.log());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        began.elapsed()
    }

    /// Waits for an answer to a ping.
    pub(crate) async fn reaches(&self, address: &str) {
        let what = format!("a ping to {address}");
        let ping = format!("ping -n -c 1 -W 1 {address}");
        self.eventually(&what, async || self.attempt(&ping).0).await;
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if let Some(daemon) = &mut self.daemon {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }
}
