//! The flags of `ringmail run`: all of flanneld's with its defaults and `FLANNELD_*` variables, and our own.
//!
//! A flag goes before its variable, a variable before the default. Flags and variables that are wrong stop the start; flannel
//! only logs a wrong variable and goes on with a default that nobody asked for.

use std::ffi::OsString;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;

use clap::{ArgAction, Parser};
use regex::Regex;
use zeroize::Zeroizing;

use super::go_style::{Source, UsageError, parse};
use crate::lease::{Addresses, Network, NodeName};
use crate::psk::SecretName;
use crate::store::etcd::{Access, Lifetime, TTL};
use crate::store::kube;
use crate::uplink::{Choice, Iface};

/// What `ringmail run` was told. Flags have the name of their field, with `-` for `_`.
#[derive(Clone, Debug, Parser)]
#[command(
    name = "ringmail run",
    disable_version_flag = true,
    disable_help_subcommand = true,
    args_override_self = true
)]
pub struct Flags {
    /// Store leases in this folder, one file each.
    #[arg(long, value_name = "DIR")]
    pub lease_dir: Option<PathBuf>,
    /// This node's name; else the variable NODE_NAME, else the host name.
    #[arg(long, value_name = "NAME", value_parser = node_name)]
    pub node_name: NodeName,
    /// The pre-shared key: a file, or a folder of them such as a mounted Secret.
    #[arg(long, value_name = "PATH")]
    pub psk_file: Option<PathBuf>,
    /// The pre-shared keys: a Secret of Kubernetes, watched through the API.
    #[arg(long, value_name = "NAMESPACE/NAME", value_parser = secret_name)]
    pub psk_secret: Option<SecretName>,
    /// Where the control socket and the pid file are.
    #[arg(long, value_name = "DIR", default_value = "/run/ringmail")]
    pub run_dir: PathBuf,
    /// Serve /metrics, /healthz and /readyz at this address and port.
    #[arg(long, value_name = "ADDR:PORT", value_parser = socket)]
    pub metrics: Option<SocketAddr>,
    /// Write series of single peers too, eleven a peer.
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "true", default_missing_value = "true",
        action = ArgAction::Set, value_parser = boolean)]
    pub metrics_peers: bool,

    /// etcd's addresses, separated by commas.
    #[arg(long, value_name = "URLS", default_value = ETCD_ENDPOINTS)]
    pub etcd_endpoints: String,
    /// The prefix of etcd's keys.
    #[arg(long, value_name = "KEY", default_value = ETCD_PREFIX)]
    pub etcd_prefix: String,
    /// The key of etcd's client certificate.
    #[arg(long, value_name = "FILE")]
    pub etcd_keyfile: Option<PathBuf>,
    /// The client certificate for etcd.
    #[arg(long, value_name = "FILE")]
    pub etcd_certfile: Option<PathBuf>,
    /// The certificate authority of etcd.
    #[arg(long, value_name = "FILE")]
    pub etcd_cafile: Option<PathBuf>,
    /// The user at etcd.
    #[arg(long, value_name = "NAME")]
    pub etcd_username: Option<String>,
    /// The user's password at etcd.
    #[arg(long, value_name = "TEXT", value_parser = hidden)]
    pub etcd_password: Option<Hidden>,

    /// The uplink's name or address; may be repeated, the first that can serve wins.
    #[arg(long, value_name = "NAME|IP", value_parser = iface, action = ArgAction::Append)]
    pub iface: Vec<Iface>,
    /// A regular expression on the uplink's address, then on its name; tried after --iface; may be repeated.
    #[arg(long, value_name = "REGEX", value_parser = pattern, action = ArgAction::Append)]
    pub iface_regex: Vec<Regex>,
    /// The uplink is the interface that leads to this address; tried last.
    #[arg(long, value_name = "IP", value_parser = address)]
    pub iface_can_reach: Option<IpAddr>,
    /// Where to write subnet.env.
    #[arg(long, value_name = "FILE", default_value = "/run/flannel/subnet.env")]
    pub subnet_file: PathBuf,
    /// The IPv4 address that other nodes send to.
    #[arg(long, value_name = "IP", value_parser = address4)]
    pub public_ip: Option<Ipv4Addr>,
    /// The IPv6 address that other nodes send to.
    #[arg(long, value_name = "IP", value_parser = address6)]
    pub public_ipv6: Option<Ipv6Addr>,
    /// Minutes before its end that a lease in etcd is renewed, 1 to 1439.
    #[arg(long, value_name = "MINUTES", default_value = "60", value_parser = renew_margin)]
    pub subnet_lease_renew_margin: u16,
    /// Masquerade what leaves the mesh.
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true",
        action = ArgAction::Set, value_parser = boolean)]
    pub ip_masq: bool,
    /// Masquerade without random ports.
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true",
        action = ArgAction::Set, value_parser = boolean)]
    pub ip_masq_fully_random_disable: bool,
    /// Store leases on the Nodes of Kubernetes.
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true",
        action = ArgAction::Set, value_parser = boolean)]
    pub kube_subnet_mgr: bool,
    /// The API server's address; else the kubeconfig's, else the cluster's around this Pod.
    #[arg(long, value_name = "URL")]
    pub kube_api_url: Option<String>,
    /// The kubeconfig file.
    #[arg(long, value_name = "FILE")]
    pub kubeconfig_file: Option<PathBuf>,
    /// The prefix of the annotations on Nodes.
    #[arg(long, value_name = "PREFIX", default_value = ANNOTATION_PREFIX)]
    pub kube_annotation_prefix: String,
    /// The network configuration.
    #[arg(long, value_name = "FILE", default_value = "/etc/kube-flannel/net-conf.json")]
    pub net_config_path: PathBuf,
    /// Keep the Node's condition NetworkUnavailable true to the datapath.
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "true", default_missing_value = "true",
        action = ArgAction::Set, value_parser = boolean)]
    pub set_node_network_unavailable: bool,
    /// Where to serve /healthz, /readyz and /metrics.
    #[arg(long, value_name = "IP", default_value = "0.0.0.0", value_parser = address)]
    pub healthz_ip: IpAddr,
    /// The port of /healthz, /readyz and /metrics; 0 is off.
    #[arg(long, value_name = "PORT", default_value = "0", value_parser = port)]
    pub healthz_port: u16,
    /// How often iptables, which tells nobody of changes, is looked at, in seconds.
    #[arg(long, value_name = "SECONDS", default_value = "5", value_parser = seconds)]
    pub iptables_resync: u32,
    /// flannel's accept rules for forwarded packets.
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "true", default_missing_value = "true",
        action = ArgAction::Set, value_parser = boolean)]
    pub iptables_forward_rules: bool,
    /// flannel's blackhole route for the node's own subnet.
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true",
        action = ArgAction::Set, value_parser = boolean)]
    pub ip_blackhole_route: bool,
    /// Print the version.
    #[arg(long, num_args = 0..=1, require_equals = true, default_value = "false", default_missing_value = "true",
        action = ArgAction::Set, value_parser = boolean)]
    pub version: bool,
    /// How much to log: 0, or more for more.
    #[arg(long, value_name = "LEVEL", default_value = "0", value_parser = level)]
    pub v: i32,
    /// klog's levels by file.
    #[arg(long, value_name = "TEXT")]
    pub vmodule: Option<String>,
    /// klog's stack trace at a line.
    #[arg(long = "log_backtrace_at", value_name = "FILE:LINE", default_value = ":0")]
    pub log_backtrace_at: String,
    /// `POD_NAMESPACE` and `POD_NAME`, where nothing but the host's name says who this node is.
    #[arg(skip)]
    pub pod: Option<(String, String)>,
}

/// flannel's default.
pub(crate) const ETCD_ENDPOINTS: &str = "http://127.0.0.1:4001,http://127.0.0.1:2379";
/// flannel's default.
pub(crate) const ETCD_PREFIX: &str = "/coreos.com/network";
const ANNOTATION_PREFIX: &str = "flannel.alpha.coreos.com";

/// What a command line asks for.
#[derive(Clone, Debug)]
pub enum Wanted {
    /// To run.
    Run(Box<Flags>),
    /// This text on standard output, and exit code 0.
    Help(String),
    /// The version on standard error, as flannel does, and exit code 0.
    Version,
}

/// Where leases are stored.
#[derive(Clone, Debug)]
pub enum Store {
    /// In a folder.
    Dir(PathBuf),
    /// In an etcd cluster.
    Etcd(Access, Lifetime),
    /// On the Nodes of a Kubernetes cluster.
    Kube(kube::Access),
}

/// What the process was given beside its arguments.
#[derive(Clone, Debug, Default)]
pub struct Environment {
    /// The variables.
    pub variables: Vec<(OsString, OsString)>,
    /// The host's name, where it has one.
    pub hostname: Option<OsString>,
}

impl Environment {
    /// That of this process.
    pub fn of_process() -> Self {
        let hostname = nix::unistd::gethostname()
            .ok()
            .filter(|name| !name.is_empty() && name != "(none)");
        Self {
            variables: std::env::vars_os().collect(),
            hostname,
        }
    }
}

impl Flags {
    /// Understands the arguments after `ringmail run`, completed from `environment`.
    ///
    /// # Errors
    /// [`UsageError`]; the exit code for it is [`UsageError::EXIT_CODE`].
    pub fn from_args(
        arguments: impl IntoIterator<Item = OsString>,
        environment: &Environment,
    ) -> Result<Wanted, UsageError> {
        let wanted = parse(arguments.into_iter().collect(), environment)?;
        if let Wanted::Run(flags) = &wanted {
            flags.store()?;
            flags.secret()?;
        }
        Ok(wanted)
    }

    /// Which store is asked for.
    ///
    /// # Errors
    /// [`UsageError::Store`]; never for flags that [`Flags::from_args`] gave.
    pub fn store(&self) -> Result<Store, UsageError> {
        match (&self.lease_dir, self.kube_subnet_mgr) {
            (Some(_), true) => {
                let why = "--kube-subnet-mgr and --lease-dir name two stores: leave one of them out";
                Err(UsageError::Store(why.into()))
            }
            (Some(folder), false) => Ok(Store::Dir(folder.clone())),
            (None, true) => self.kube(),
            (None, false) => self.etcd(),
        }
    }

    /// The Secret with the PSKs, and the cluster that it is in, where one is asked for.
    ///
    /// # Errors
    /// [`UsageError::Store`]; never for flags that [`Flags::from_args`] gave.
    pub fn secret(&self) -> Result<Option<(kube::Access, SecretName)>, UsageError> {
        let Some(secret) = &self.psk_secret else {
            return Ok(None);
        };
        if self.psk_file.is_some() {
            let why = "--psk-file and --psk-secret name two places of the PSK: leave one of them out";
            return Err(UsageError::Store(why.into()));
        }
        Ok(Some((self.cluster()?, secret.clone())))
    }

    /// The store of the Kubernetes cluster of the flags.
    fn kube(&self) -> Result<Store, UsageError> {
        self.cluster().map(Store::Kube)
    }

    /// The Kubernetes cluster of the flags.
    fn cluster(&self) -> Result<kube::Access, UsageError> {
        let prefix = &self.kube_annotation_prefix;
        let keys = kube::Keys::of(prefix)
            .map_err(|why| UsageError::Store(format!("--kube-annotation-prefix is {prefix:?}: {why}")))?;
        let own = match &self.pod {
            Some((namespace, name)) => kube::Own::OfPod {
                namespace: namespace.clone(),
                name: name.clone(),
            },
            None => kube::Own::Named(self.node_name.clone()),
        };
        Ok(kube::Access {
            kubeconfig: self.kubeconfig_file.clone(),
            url: self.kube_api_url.clone(),
            keys,
            own,
        })
    }

    /// The etcd cluster of the flags.
    fn etcd(&self) -> Result<Store, UsageError> {
        let password = self.etcd_password.as_ref();
        let password = password.map(|password| Zeroizing::new(password.reveal().to_owned()));
        let access = Access::of_flags(
            &self.etcd_endpoints,
            &self.etcd_prefix,
            self.etcd_cafile.clone(),
            (self.etcd_certfile.clone(), self.etcd_keyfile.clone()),
            (self.etcd_username.clone(), password),
        )
        .map_err(UsageError::Store)?;
        let lifetime = Lifetime {
            ttl: TTL,
            margin: i64::from(self.subnet_lease_renew_margin) * 60,
        };
        Ok(Store::Etcd(access, lifetime))
    }

    /// How the uplink is to be chosen for a mesh of this Network.
    pub fn choice(&self, mesh: Network) -> Choice {
        Choice {
            ifaces: self.iface.clone(),
            patterns: self.iface_regex.clone(),
            can_reach: self.iface_can_reach,
            public: Addresses {
                v4: self.public_ip,
                v6: self.public_ipv6,
            },
            mesh: Some(mesh),
        }
    }

    /// Where health and metrics are served: each place has both.
    pub fn http(&self) -> Vec<SocketAddr> {
        let health = (self.healthz_port != 0).then(|| SocketAddr::new(self.healthz_ip, self.healthz_port));
        let metrics = self.metrics.filter(|metrics| Some(*metrics) != health);
        health.into_iter().chain(metrics).collect()
    }

    /// A text for each flag that was given and has no effect here.
    pub fn warnings(&self) -> Vec<String> {
        let kube = "concerns --kube-subnet-mgr alone";
        let other = !self.kube_subnet_mgr;
        let nowhere = other && self.psk_secret.is_none();
        let asked = "concerns --kube-subnet-mgr and --psk-secret alone";
        let klog = "has no effect: -v sets how much is logged";
        let all = [
            (
                "subnet-lease-renew-margin",
                self.subnet_lease_renew_margin != 60 && (self.lease_dir.is_some() || self.kube_subnet_mgr),
                "concerns the etcd store alone",
            ),
            ("kube-api-url", nowhere && self.kube_api_url.is_some(), asked),
            ("kubeconfig-file", nowhere && self.kubeconfig_file.is_some(), asked),
            (
                "kube-annotation-prefix",
                other && self.kube_annotation_prefix != ANNOTATION_PREFIX,
                kube,
            ),
            (
                "set-node-network-unavailable",
                other && !self.set_node_network_unavailable,
                kube,
            ),
            ("vmodule", self.vmodule.is_some(), klog),
            ("log_backtrace_at", self.log_backtrace_at != ":0", klog),
        ];
        all.iter()
            .filter(|(_, given, _)| *given)
            .map(|(flag, _, why)| format!("--{flag} {why}"))
            .collect()
    }
}

/// A text that is not shown.
#[derive(Clone, Eq, PartialEq)]
pub struct Hidden(String);

impl Hidden {
    /// The text itself.
    pub fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Hidden {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[redacted]")
    }
}

// What each of these returns as an error is what would be right.

fn boolean(text: &str) -> Result<bool, &'static str> {
    // strconv.ParseBool
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err("true or false is needed"),
    }
}

fn node_name(text: &str) -> Result<NodeName, &'static str> {
    NodeName::new(text).map_err(|_| "1 to 253 printable ASCII characters without space or slash are needed")
}

fn socket(text: &str) -> Result<SocketAddr, &'static str> {
    text.parse()
        .map_err(|_| "an address and a port such as 127.0.0.1:9600 are needed")
}

fn secret_name(text: &str) -> Result<SecretName, crate::psk::BadSecretName> {
    text.parse()
}

fn hidden(text: &str) -> Result<Hidden, std::convert::Infallible> {
    Ok(Hidden(text.to_owned()))
}

fn iface(text: &str) -> Result<Iface, crate::uplink::BadIface> {
    text.parse()
}

fn pattern(text: &str) -> Result<Regex, String> {
    Regex::new(text).map_err(|error| {
        let error = error.to_string();
        let reason = error.lines().last().unwrap_or_default().trim_start_matches("error: ");
        format!("could not compile the IP address regex; {reason}")
    })
}

fn address(text: &str) -> Result<IpAddr, &'static str> {
    text.parse().map_err(|_| "an IP address is needed")
}

fn address4(text: &str) -> Result<Ipv4Addr, &'static str> {
    let address: Result<Ipv4Addr, _> = text.parse();
    address
        .ok()
        .filter(|a| is_reachable((*a).into()))
        .ok_or("an IPv4 address of one host is needed")
}

fn address6(text: &str) -> Result<Ipv6Addr, &'static str> {
    let address: Result<Ipv6Addr, _> = text.parse();
    address
        .ok()
        .filter(|a| is_reachable((*a).into()))
        .ok_or("an IPv6 address of one host is needed")
}

fn is_reachable(address: IpAddr) -> bool {
    let broadcast = address == IpAddr::V4(Ipv4Addr::BROADCAST);
    !(address.is_loopback() || address.is_multicast() || address.is_unspecified() || broadcast)
}

fn renew_margin(text: &str) -> Result<u16, &'static str> {
    let want = "Invalid subnet-lease-renew-margin option, out of acceptable range; 1 to 1439 minutes are needed";
    text.parse()
        .ok()
        .filter(|minutes| (1..=1439).contains(minutes))
        .ok_or(want)
}

fn port(text: &str) -> Result<u16, &'static str> {
    text.parse().map_err(|_| "a port from 0 to 65535 is needed")
}

fn seconds(text: &str) -> Result<u32, &'static str> {
    text.parse().map_err(|_| "a whole number of seconds is needed")
}

fn level(text: &str) -> Result<i32, &'static str> {
    text.parse().map_err(|_| "a whole number is needed")
}

/// The names of our own flags, which have no `FLANNELD_*` variable, and the variable that they have.
pub(super) fn variable(flag: &str) -> Option<String> {
    match flag {
        "node-name" => Some("NODE_NAME".into()),
        // Images carry FLANNELD_VERSION for other ends.
        "lease-dir" | "psk-file" | "psk-secret" | "run-dir" | "metrics" | "metrics-peers" | "version" | "help" => None,
        _ => Some(format!("FLANNELD_{}", flag.to_ascii_uppercase().replace('-', "_"))),
    }
}

/// Where a value of `flag` came from, in words.
pub(super) fn origin(flag: &str, source: Source) -> String {
    match (source, variable(flag)) {
        (Source::Variable, Some(variable)) => format!("--{flag} (from {variable})"),
        (Source::Hostname, _) => format!("--{flag} (from the host name)"),
        (Source::Flag | Source::Variable, _) => format!("--{flag}"),
    }
}
