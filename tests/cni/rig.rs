//! A folder with all that the plugin reads and writes, and calls of the built plugin.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::{Value, json};

/// One node's lease, IPv4.
pub(crate) const V4: &str =
    "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n";

/// IPv6 alone.
pub(crate) const V6: &str = "FLANNEL_IPV6_NETWORK=fd00:10:244::/48\nFLANNEL_IPV6_SUBNET=fd00:10:244:1::1/64\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n";

/// A delegate that notes each call in `$0.log`, a JSON object a line, and then does what `$0.does` says.
const STUB: &str = r#"#!/bin/sh
conf=$(cat)
printf '{"command":"%s","container":"%s","interface":"%s","netns":"%s","conf":%s}\n' \
    "$CNI_COMMAND" "$CNI_CONTAINERID" "$CNI_IFNAME" "$CNI_NETNS" "$conf" >>"$0.log"
[ -e "$0.does" ] && . "$0.does"
[ "$CNI_COMMAND" != ADD ] || echo '{"cniVersion":"1.0.0","ips":[]}'
"#;

/// What a call came to.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) good: bool,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Outcome {
    /// Its result, of a call that must have done well.
    #[track_caller]
    pub(crate) fn result(&self) -> Value {
        assert!(self.good, "{self:?}");
        serde_json::from_str(&self.stdout).expect("a result in JSON")
    }

    /// Did well and had nothing to say on standard output.
    #[track_caller]
    pub(crate) fn done(&self) {
        assert!(self.good && self.stdout.is_empty(), "{self:?}");
    }

    /// Code and message, of a call that must have failed.
    #[track_caller]
    pub(crate) fn error(&self) -> (u64, String) {
        assert!(!self.good, "{self:?}");
        let error: Value = serde_json::from_str(&self.stdout).expect("an error in JSON");
        let message = error["msg"].as_str().expect("a message").to_owned();
        (error["code"].as_u64().expect("a code"), message)
    }
}

/// A call of the plugin.
#[derive(Clone, Debug)]
pub(crate) struct Call<'a> {
    pub(crate) command: &'a str,
    pub(crate) container: &'a str,
    pub(crate) interface: &'a str,
    pub(crate) netns: String,
    pub(crate) conf: Value,
}

impl<'a> Call<'a> {
    pub(crate) fn new(command: &'a str, container: &'a str, conf: &Value) -> Self {
        Self {
            command,
            container,
            interface: "eth0",
            netns: "/nonexistent".to_owned(),
            conf: conf.clone(),
        }
    }

    pub(crate) fn interface(self, interface: &'a str) -> Self {
        Self { interface, ..self }
    }

    pub(crate) fn netns(self, netns: impl Into<String>) -> Self {
        let netns = netns.into();
        Self { netns, ..self }
    }
}

/// A node's files.
pub(crate) struct Rig {
    folder: PathBuf,
    plugins: PathBuf,
}

impl Rig {
    /// With a subnet.env and Debian's plugins.
    pub(crate) fn new(subnet_env: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let folder = std::env::temp_dir().join(format!("ringmail-cni-{}-{number}", std::process::id()));
        fs::create_dir(&folder).expect("the folder for temporary files is writable");
        let rig = Self {
            folder,
            plugins: std::env::var_os("CNI_PLUGINS")
                .unwrap_or_else(|| "/usr/lib/cni".into())
                .into(),
        };
        rig.lease(Some(subnet_env));
        rig
    }

    /// With a script in the place of `bridge`, that notes how it is called.
    pub(crate) fn with_stub(subnet_env: &str) -> Self {
        let mut rig = Self::new(subnet_env);
        rig.plugins = rig.path("bin");
        fs::create_dir(&rig.plugins).expect("a new folder");
        rig.stub("bridge");
        rig
    }

    /// Another script.
    pub(crate) fn stub(&self, kind: &str) {
        let path = self.plugins.join(kind);
        fs::write(&path, STUB).expect("a script");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("its mode");
    }

    /// What the script does beside taking notes, in shell.
    pub(crate) fn stub_does(&self, kind: &str, shell: &str) {
        fs::write(self.plugins.join(format!("{kind}.does")), shell).expect("a script");
    }

    /// What the script was called for, oldest first; forgotten with this.
    pub(crate) fn calls(&self, kind: &str) -> Vec<Value> {
        let path = self.plugins.join(format!("{kind}.log"));
        let text = fs::read_to_string(&path).unwrap_or_default();
        drop(fs::remove_file(path));
        text.lines()
            .map(|line| serde_json::from_str(line).expect(line))
            .collect()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// The folder of plugins, with a script in it.
    pub(crate) fn plugins(&self) -> &Path {
        &self.plugins
    }

    /// Changes subnet.env, or takes it away.
    pub(crate) fn lease(&self, subnet_env: Option<&str>) {
        match subnet_env {
            Some(text) => fs::write(self.path("subnet.env"), text).expect("subnet.env"),
            None => fs::remove_file(self.path("subnet.env")).expect("subnet.env"),
        }
    }

    /// The configuration of a network that keeps all it keeps in here.
    pub(crate) fn conf(&self, network: &str, version: &str) -> Value {
        json!({
            "name": network, "cniVersion": version, "type": "flannel",
            "subnetFile": self.path("subnet.env"), "dataDir": self.path("data"),
            "delegate": { "bridge": format!("br-{network}"), "hairpinMode": true, "isDefaultGateway": true },
            "ipam": { "dataDir": self.path("leases") },
        })
    }

    /// Names of files in a folder of the rig, sorted; none where there is no folder.
    pub(crate) fn names(&self, folder: &str) -> Vec<String> {
        let Ok(names) = fs::read_dir(self.path(folder)) else {
            return Vec::new();
        };
        let mut names: Vec<_> = names
            .map(|name| name.expect("a name").file_name().into_string().expect("UTF-8"))
            .collect();
        names.sort();
        names
    }

    /// Addresses that host-local has given out in a network.
    pub(crate) fn addresses(&self, network: &str) -> Vec<String> {
        let mut names = self.names(&format!("leases/{network}"));
        names.retain(|name| !name.starts_with("last_reserved_ip") && name != "lock");
        names
    }

    /// Who has `address`, as host-local wrote it.
    pub(crate) fn reservation(&self, network: &str, address: &str) -> String {
        fs::read_to_string(self.path(&format!("leases/{network}/{address}"))).expect("a reservation")
    }

    /// Gives `address` back by hand.
    pub(crate) fn free(&self, network: &str, address: &str) {
        fs::remove_file(self.path(&format!("leases/{network}/{address}"))).expect("a reservation");
    }

    /// Starts the plugin in this thread's namespace, as the leader of a process group.
    pub(crate) fn start(&self, call: &Call<'_>) -> Child {
        self.start_plugin(Path::new(env!("CARGO_BIN_EXE_ringmail-cni")), call)
    }

    fn start_plugin(&self, program: &Path, call: &Call<'_>) -> Child {
        let mut child = Command::new(program)
            .env("CNI_COMMAND", call.command)
            .env("CNI_CONTAINERID", call.container)
            .env("CNI_IFNAME", call.interface)
            .env("CNI_NETNS", &call.netns)
            .env("CNI_PATH", &self.plugins)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .expect("the plugin");
        let mut stdin = child.stdin.take().expect("its standard input");
        // Where it is not needed nobody may be left to read it.
        drop(stdin.write_all(call.conf.to_string().as_bytes()));
        child
    }

    /// Calls the plugin.
    pub(crate) fn call(&self, call: &Call<'_>) -> Outcome {
        Self::end(self.start(call))
    }

    /// Calls another plugin the same way.
    pub(crate) fn call_plugin(&self, program: &Path, call: &Call<'_>) -> Outcome {
        Self::end(self.start_plugin(program, call))
    }

    fn end(child: Child) -> Outcome {
        let done = child.wait_with_output().expect("its end");
        Outcome {
            good: done.status.success(),
            stdout: String::from_utf8(done.stdout).expect("UTF-8"),
            stderr: String::from_utf8(done.stderr).expect("UTF-8"),
        }
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.folder));
    }
}
