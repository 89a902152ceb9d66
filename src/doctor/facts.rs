//! What the doctor knows: everything that was read, as one value, with no secret in it.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use super::pod::Pod;
use crate::admin::Leases;
use crate::audit::Audit;
use crate::kernel::ROUTE_PROTOCOL;
use crate::node::report::{PeerReport, Report};

/// The kernel's counters of IPsec errors, below /proc.
pub const XFRM_STAT: &str = "net/xfrm_stat";
/// Counters of IP, ICMP, TCP and UDP, below /proc.
pub const SNMP: &str = "net/snmp";
/// More counters of TCP and IP, below /proc.
pub const NETSTAT: &str = "net/netstat";

/// Everything that was read.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Facts {
    /// The version of this program.
    pub version: String,
    /// When, seconds since 1970.
    pub now: u64,
    /// How long counters were watched, seconds.
    pub watched: f64,
    /// The Pod that doctor is called in; `None` outside.
    #[serde(default)]
    pub pod: Option<Pod>,
    /// Why no daemon answered; `None` where one did.
    pub unanswered: Option<Unanswered>,
    /// The daemon's report; `None` where there is no daemon.
    pub report: Option<Report>,
    /// Its report after the watch.
    pub later_report: Option<Report>,
    /// The kernel against the plan.
    pub audit: Option<Audit>,
    /// All leases.
    pub leases: Option<Leases>,
    /// The daemon's process, by its pid file.
    pub process: Option<Process>,
    /// What the daemon noted: the folder of leases.
    pub lease_dir: Option<PathBuf>,
    /// What the daemon noted: where subnet.env is.
    pub subnet_file: Option<PathBuf>,
    /// subnet.env.
    pub subnet_env: Option<String>,
    /// net-conf.json of the folder of leases, or the file; a PSK in it is taken out.
    pub conf: Option<Conf>,
    /// Texts of /proc and, with `/` in front, of elsewhere, by path; those that are not there are missing.
    pub texts: BTreeMap<String, String>,
    /// The counters among them again, after the watch.
    pub later: BTreeMap<String, String>,
    /// Every device of this network namespace.
    pub links: Vec<Link>,
    /// Every unicast, local, unreachable … route of it.
    pub routes: Vec<Route>,
    /// Every rule that chooses a table.
    pub rules: Vec<Rule>,
    /// Every IPsec policy, sockets' own left out.
    pub policies: Vec<Policy>,
    /// How many SAs are ringmail's, and how many another program's.
    pub associations: (usize, usize),
    /// By which device the kernel reaches a peer's public address, for peers that ESP goes to.
    pub reached_by: BTreeMap<IpAddr, String>,
    /// Whether a peer that data does not go to, or that is silent, answers an echo request at its public address.
    pub echoes: BTreeMap<IpAddr, bool>,
    /// UDP sockets by local port, for the ports that a backend wants.
    pub sockets: Vec<Socket>,
    /// What the packet filters hold.
    pub filters: Vec<FilterText>,
    /// The folder of the container runtime's network configurations.
    pub cni_folder: PathBuf,
    /// The files in it that a runtime would take, in its order.
    pub cni: Vec<CniFile>,
    /// Why this kernel can't carry ESP as configured; `None` where it can, or was not asked because a daemon runs.
    pub kernel_lacks: Option<String>,
    /// What could not be read, each with the reason.
    pub unread: Vec<String>,
}

/// Why no daemon answered.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Unanswered {
    /// Nobody is there; else somebody is, and does not answer as a daemon of this version does.
    pub absent: bool,
    /// The error's words.
    pub why: String,
}

/// A process, as /proc shows it.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Process {
    /// Its number.
    pub pid: u32,
    /// How many descriptors it has open.
    pub open: u64,
    /// How many it may have.
    pub limit: u64,
}

/// The network configuration.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub struct Conf {
    /// Where it was found.
    pub path: PathBuf,
    /// Its text; in the place of a PSK stands `(removed)`.
    pub text: String,
    /// How many subnets it gives out, by family; `None` where it can't be understood.
    pub capacity: Option<BTreeMap<String, u64>>,
}

/// A network device.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Link {
    /// Its number.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its kind, as `ip -d link` names it; empty for hardware.
    pub kind: String,
    /// Bytes.
    pub mtu: u32,
    /// Whether it is up.
    pub up: bool,
    /// The number of the bridge that it is a port of.
    pub master: Option<u32>,
}

/// A route.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Route {
    /// Where to.
    pub net: IpNet,
    /// `unicast`, `unreachable`, `local`, …
    pub kind: String,
    /// Its table: 254 is main, 255 local.
    pub table: u32,
    /// Who made it; ours is [`ROUTE_PROTOCOL`].
    pub protocol: u8,
    /// The device's name; of one with several ways the first's.
    pub link: Option<String>,
    /// The next hop.
    pub gateway: Option<IpAddr>,
    /// The lowest wins.
    pub metric: u32,
}

/// A rule that chooses a table.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Rule {
    /// 4 or 6.
    pub family: u8,
    /// The lowest is asked first.
    pub priority: u32,
    /// For packets from here; `None` for all.
    pub from: Option<IpNet>,
    /// For packets to here; `None` for all.
    pub to: Option<IpNet>,
    /// Whether it asks for more: a mark, a device, a protocol, a port, …
    pub narrow: bool,
    /// `lookup`, `blackhole`, `unreachable`, `prohibit`, or another word.
    pub action: String,
    /// The table, for `lookup`.
    pub table: u32,
}

/// An IPsec policy.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Policy {
    /// Whether ringmail made it.
    pub ours: bool,
    /// `in`, `fwd`, `out`.
    pub direction: String,
    /// From.
    pub from: IpNet,
    /// To.
    pub to: IpNet,
    /// Whether it is for one protocol, port or device alone.
    pub narrow: bool,
    /// The lowest wins.
    pub priority: u32,
    /// What it does, in words.
    pub action: String,
}

/// A UDP socket.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Socket {
    /// Its local port.
    pub port: u16,
    /// The owner's name; `None` for the kernel's own, or where the owner is not to be seen.
    pub program: Option<String>,
    /// The owner.
    pub pid: Option<u32>,
    /// Whether the kernel itself holds it: a VXLAN device's.
    pub kernel: bool,
}

/// What a packet filter holds.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct FilterText {
    /// How it was read.
    pub by: FilterKind,
    /// The program that changes it: `nft`, `iptables-legacy`, …
    pub program: String,
    /// The text.
    pub text: String,
}

/// The form of a packet filter's text.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum FilterKind {
    /// `nft -j list ruleset`.
    Nft,
    /// `iptables-save -c`.
    Iptables4,
    /// `ip6tables-save -c`.
    Iptables6,
}

/// A network configuration of the container runtime.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct CniFile {
    /// Its name.
    pub name: String,
    /// The plugins that it calls.
    pub plugins: Vec<String>,
}

impl CniFile {
    /// Whether it calls ringmail's plugin, under its own name or flannel's.
    pub fn is_ours(&self) -> bool {
        self.plugins
            .iter()
            .any(|name| name == "flannel" || name == "ringmail-cni")
    }
}

impl Facts {
    /// A text, empty where it is not there.
    pub fn text(&self, path: &str) -> &str {
        self.texts.get(path).map_or("", String::as_str)
    }

    /// The number that a text begins with.
    pub fn number(&self, path: &str) -> Option<u64> {
        self.text(path).split_whitespace().next()?.parse().ok()
    }

    /// The counters that rose while they were watched, and by how much.
    pub fn risen(&self, path: &str) -> BTreeMap<String, u64> {
        let Some(later) = self.later.get(path) else {
            return BTreeMap::new();
        };
        let before = all_counters(self.text(path));
        let rise = |(name, now): (String, u64)| {
            let by = now.saturating_sub(before.get(&name).copied().unwrap_or(0));
            (by > 0).then_some((name, by))
        };
        all_counters(later).into_iter().filter_map(rise).collect()
    }

    /// Every peer, where there is a report.
    pub fn peers(&self) -> &[PeerReport] {
        self.report.as_ref().map_or(&[], |report| report.peers.as_slice())
    }

    /// The own subnets.
    pub fn own(&self) -> Vec<IpNet> {
        parsed(self.report.iter().flat_map(|report| &report.subnets))
    }

    /// The mesh's ranges.
    pub fn network(&self) -> Vec<IpNet> {
        parsed(self.report.iter().flat_map(|report| &report.network))
    }

    /// Whether the mesh is encrypted, as far as there is a daemon to tell.
    pub fn encrypts(&self) -> bool {
        self.report.as_ref().is_some_and(|report| report.backend == "ipsec")
    }

    /// The uplink's name.
    pub fn uplink(&self) -> Option<&str> {
        self.report.as_ref()?.uplink.as_deref()
    }

    /// The devices that lead into the own subnets: the pods' bridge, or each pod's own device.
    pub fn pod_devices(&self) -> Vec<&str> {
        let own = self.own();
        let leads = self.routes.iter().filter(|route| {
            route.kind == "unicast" && !route.is_ours() && own.iter().any(|own| own.contains(&route.net))
        });
        let mut devices: Vec<&str> = leads.filter_map(|route| route.link.as_deref()).collect();
        devices.sort_unstable();
        devices.dedup();
        devices
    }

    /// A device by its name.
    pub fn link(&self, name: &str) -> Option<&Link> {
        self.links.iter().find(|link| link.name == name)
    }
}

impl Route {
    /// Whether ringmail made it.
    pub fn is_ours(&self) -> bool {
        self.protocol == ROUTE_PROTOCOL
    }
}

impl std::fmt::Display for Route {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.kind != "unicast" {
            write!(f, "{} ", self.kind)?;
        }
        write!(f, "{}", self.net)?;
        if let Some(gateway) = self.gateway {
            write!(f, " via {gateway}")?;
        }
        if let Some(link) = &self.link {
            write!(f, " dev {link}")?;
        }
        if self.table != 254 {
            write!(f, " table {}", self.table)?;
        }
        if self.metric != 0 {
            write!(f, " metric {}", self.metric)?;
        }
        Ok(())
    }
}

impl std::fmt::Display for Rule {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:", self.priority)?;
        let all = || "all".to_owned();
        write!(f, " from {}", self.from.map_or_else(all, |net| net.to_string()))?;
        if let Some(to) = self.to {
            write!(f, " to {to}")?;
        }
        write!(f, " {}", self.action)?;
        if self.action == "lookup" {
            write!(f, " {}", self.table)?;
        }
        Ok(())
    }
}

/// Nets from texts; what is none is left out.
pub fn parsed<'a>(texts: impl IntoIterator<Item = &'a String>) -> Vec<IpNet> {
    texts.into_iter().filter_map(|text| text.parse().ok()).collect()
}

/// Whether two nets have an address in common.
pub fn overlap(a: &IpNet, b: &IpNet) -> bool {
    a.contains(b) || b.contains(a)
}

/// The counters of a text of lines `name value`, in its order.
pub fn counters(text: &str) -> Vec<(String, u64)> {
    let one = |line: &str| {
        let mut words = line.split_whitespace();
        Some((words.next()?.to_owned(), words.next()?.parse().ok()?))
    };
    text.lines().filter_map(one).collect()
}

/// The counters of such a text, or of one whose lines come in pairs as in /proc/net/snmp: `Udp: InDatagrams …`, then
/// `Udp: 17 …`, named `Udp.InDatagrams`.
fn all_counters(text: &str) -> BTreeMap<String, u64> {
    let mut all: BTreeMap<String, u64> = counters(text).into_iter().collect();
    let lines: Vec<&str> = text.lines().collect();
    for pair in lines.chunks(2) {
        let [names, values] = pair else { continue };
        let (Some((kind, names)), Some((_, values))) = (names.split_once(": "), values.split_once(": ")) else {
            continue;
        };
        for (name, value) in names.split_whitespace().zip(values.split_whitespace()) {
            if let Ok(value) = value.parse() {
                all.insert(format!("{kind}.{name}"), value);
            }
        }
    }
    all
}
