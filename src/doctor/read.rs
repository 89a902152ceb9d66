//! Fills the facts: asks the daemon, reads the kernel, the packet filters and files. Changes nothing and judges nothing;
//! what can't be read is noted and left out.

mod echo;
mod files;
mod filters;
mod net;

#[cfg(test)]
pub(super) use files::conf;
#[cfg(test)]
pub(super) use filters::read as filters_now;

use std::fs;
use std::net::IpAddr;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use xfrm::{Action, Direction, ForeignPolicy, Parsed, Xfrm};

use super::facts::{Facts, NETSTAT, Policy, SNMP, Unanswered, XFRM_STAT};
use super::pod::{NAMESPACE, Pod};
use crate::admin::{AskError, Remembered, Request, ask};
use crate::config::flags::Environment;
use crate::kernel::netlink::{Netlink, Options};
use crate::kernel::{Guard, priority, reqid_slot};
use crate::lease::Addresses;
use crate::node::report::{PeerReport, State};
use crate::reconcile::chain;

/// How to look.
#[derive(Clone, Debug)]
pub struct Look<'a> {
    /// The daemon's folder.
    pub run_dir: &'a Path,
    /// The folder of the container runtime's network configurations.
    pub cni_folder: &'a Path,
    /// How long counters are watched.
    pub watch: Duration,
    /// What tells whether this is a Pod, and which.
    pub environment: &'a Environment,
}

/// Texts below /proc, read once.
const TEXTS: [&str; 11] = [
    "cpuinfo",
    "meminfo",
    "version",
    "modules",
    "crypto",
    "net/stat/arp_cache",
    "net/stat/ndisc_cache",
    "sys/net/netfilter/nf_conntrack_count",
    "sys/net/netfilter/nf_conntrack_max",
    "sys/net/ipv4/neigh/default/gc_thresh3",
    "sys/net/ipv6/neigh/default/gc_thresh3",
];

/// Texts below /proc whose counters are watched.
const WATCHED: [&str; 3] = [XFRM_STAT, SNMP, NETSTAT];

/// So many peers' ways are looked up, and so many that are silent are asked for an echo.
const PEERS: usize = 64;

/// Reads everything; takes as long as counters are watched, and a second more where peers are silent.
///
/// # Errors
/// Only that the daemon's socket is not for this user: what is left would be half a picture.
pub fn read(look: &Look<'_>) -> Result<Facts, AskError> {
    let mut facts = Facts {
        version: env!("CARGO_PKG_VERSION").into(),
        now: seconds_since_1970(),
        cni_folder: look.cni_folder.into(),
        pod: Pod::of(look.environment, fs::read_to_string(NAMESPACE).ok().as_deref()),
        ..Facts::default()
    };
    ask_daemon(look.run_dir, &mut facts)?;
    for path in WATCHED {
        facts.texts.extend(text(path));
    }
    let begun = std::time::Instant::now();
    files::read(look, Remembered::read(look.run_dir), &mut facts);
    facts.texts.extend(TEXTS.into_iter().filter_map(text));
    if let Err(error) = net::read(&mut facts) {
        facts.unread.push(format!("devices, routes and rules: {error}"));
    }
    settings(&mut facts);
    ipsec(&mut facts);
    filters::read(&mut facts);
    files::sockets(&mut facts);
    kernel(&mut facts);
    let silent = some_of(&mut facts, "whether {} more silent peers answer ping", |peer| {
        peer.state == State::Waiting || peer.silent.is_some()
    });
    match echo::ask(&silent) {
        Ok(echoes) => facts.echoes = echoes,
        Err(error) => facts.unread.push(format!("whether silent peers answer ping: {error}")),
    }
    sleep(look.watch.saturating_sub(begun.elapsed()));
    facts.watched = begun.elapsed().as_secs_f64();
    facts.later = WATCHED.into_iter().filter_map(text).collect();
    if facts.report.is_some() {
        let later = ask(look.run_dir, Request::Status).ok();
        facts.later_report = later.and_then(|answer| serde_json::from_value(answer).ok());
    }
    Ok(facts)
}

/// The addresses of the first peers of a kind. Of how many more there are nothing is asked, and `what` says so.
fn some_of(facts: &mut Facts, what: &str, kind: impl Fn(&PeerReport) -> bool) -> Vec<IpAddr> {
    let peers = facts.peers().iter().filter(|peer| kind(peer));
    let mut addresses: Vec<IpAddr> = peers.filter_map(|peer| peer.address.parse().ok()).collect();
    let more = addresses.len().saturating_sub(PEERS);
    if more > 0 {
        let what = what.replace("{}", &more.to_string());
        facts
            .unread
            .push(format!("{what}, since only the first {PEERS} are asked about"));
        addresses.truncate(PEERS);
    }
    addresses
}

fn seconds_since_1970() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

/// A text below /proc, with its path.
fn text(path: &str) -> Option<(String, String)> {
    let bytes = fs::read(Path::new("/proc").join(path)).ok()?;
    Some((path.to_owned(), String::from_utf8_lossy(&bytes).into_owned()))
}

fn ask_daemon(run_dir: &Path, facts: &mut Facts) -> Result<(), AskError> {
    let value = match ask(run_dir, Request::Status) {
        Ok(answer) => serde_json::from_value(answer).map_err(|error| error.to_string()),
        Err(error @ AskError::Denied(_)) => return Err(error),
        Err(error) => {
            facts.unanswered = Some(Unanswered {
                absent: matches!(error, AskError::NoDaemon(_)),
                why: error.to_string(),
            });
            return Ok(());
        }
    };
    match value {
        Ok(report) => facts.report = Some(report),
        Err(why) => facts.unanswered = Some(Unanswered { absent: false, why }),
    }
    match ask(run_dir, Request::Audit) {
        Ok(answer) => facts.audit = serde_json::from_value(answer).ok(),
        Err(error) => facts.unread.push(format!("the audit: {error}")),
    }
    match ask(run_dir, Request::Leases) {
        Ok(answer) => facts.leases = serde_json::from_value(answer).ok(),
        Err(error) => facts.unread.push(format!("the leases: {error}")),
    }
    Ok(())
}

/// Settings of every device.
fn settings(facts: &mut Facts) {
    let names = facts.links.iter().map(|link| link.name.clone());
    let names: Vec<String> = names.chain(["all".to_owned(), "default".to_owned()]).collect();
    for name in names {
        for setting in ["rp_filter", "forwarding"] {
            facts.texts.extend(text(&format!("sys/net/ipv4/conf/{name}/{setting}")));
        }
    }
    facts.texts.extend(text("sys/net/ipv4/ip_forward"));
    facts.texts.extend(text("sys/net/ipv6/conf/all/forwarding"));
}

/// Policies, and how many SAs there are: no key is kept.
fn ipsec(facts: &mut Facts) {
    let mut xfrm = match Xfrm::open() {
        Ok(xfrm) => xfrm,
        Err(error) => return facts.unread.push(format!("IPsec policies: {error}")),
    };
    match xfrm.dump_policies() {
        Ok(all) => facts.policies = all.iter().filter_map(policy).collect(),
        Err(error) => facts.unread.push(format!("IPsec policies: {error}")),
    }
    match xfrm.dump_sas() {
        Ok(all) => {
            for sa in &all {
                let reqid = match sa {
                    Parsed::Known(info) => info.sa.reqid,
                    Parsed::Other(foreign) => foreign.reqid,
                };
                match reqid_slot(reqid) {
                    Some(_) => facts.associations.0 += 1,
                    None => facts.associations.1 += 1,
                }
            }
        }
        Err(error) => facts.unread.push(format!("SAs: {error}")),
    }
}

fn policy(parsed: &Parsed<xfrm::Policy, ForeignPolicy>) -> Option<Policy> {
    let (direction, selector, number, action, ours) = match parsed {
        Parsed::Known(policy) => {
            let action = match (policy.action, policy.template) {
                (Action::Block, _) => "block".to_owned(),
                (Action::Allow, None) => "allow".to_owned(),
                (Action::Allow, Some(template)) => {
                    format!("tunnel {} > {} reqid {}", template.src, template.dst, template.reqid)
                }
            };
            let by_reqid = policy
                .template
                .is_some_and(|template| reqid_slot(template.reqid).is_some());
            let ours =
                by_reqid || Guard::of_priority(policy.priority).is_some() || policy.priority == priority::PLAINTEXT;
            (policy.id.direction, policy.id.selector, policy.priority, action, ours)
        }
        Parsed::Other(ForeignPolicy {
            direction,
            selector,
            priority,
            reason,
        }) => ((*direction)?, (*selector)?, *priority, format!("with {reason}"), false),
    };
    let direction = match direction {
        Direction::In => "in",
        Direction::Fwd => "fwd",
        Direction::Out => "out",
    };
    Some(Policy {
        ours,
        direction: direction.into(),
        from: selector.src,
        to: selector.dst,
        narrow: selector.protocol != 0 || selector.sport.is_some() || selector.dport.is_some() || selector.ifindex != 0,
        priority: number,
        action,
    })
}

/// Where no daemon runs: whether the kernel takes what one would ask for.
fn kernel(facts: &mut Facts) {
    if facts.unanswered.is_none() {
        return;
    }
    let conf = facts.conf.as_ref();
    let conf: serde_json::Value = conf
        .and_then(|conf| serde_json::from_str(&conf.text).ok())
        .unwrap_or_default();
    let backend = conf["Backend"]["Type"].as_str().unwrap_or("ipsec");
    if backend != "ipsec" {
        return;
    }
    let proposal = conf["Backend"]["ESPProposal"].as_str().unwrap_or("aes128gcm16");
    let cipher = keys::Cipher::ALL
        .into_iter()
        .find(|cipher| cipher.to_string() == proposal);
    let Some(cipher) = cipher else { return };
    let loopback: Addresses = [std::net::IpAddr::from([127, 0, 0, 1])].into_iter().collect();
    let tried = match Netlink::open(&Options { prefer_nft: true }) {
        Ok(mut kernel) => kernel
            .preflight(cipher, &loopback)
            .map(drop)
            .map_err(|error| chain(&error)),
        Err(error) => Err(chain(&error)),
    };
    facts.kernel_lacks = tried.err();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::notes;
    use crate::doctor::tests::healthy;

    /// So many peers, at addresses of loopback.
    fn many(count: u8) -> Facts {
        let mut facts = Facts {
            report: healthy().report,
            ..Facts::default()
        };
        let report = facts.report.as_mut().expect("it has one");
        let one = report.peers[0].clone();
        report.peers = (0..count)
            .map(|number| PeerReport {
                address: format!("127.0.0.{number}"),
                ..one.clone()
            })
            .collect();
        facts
    }

    #[test]
    fn what_is_not_asked_of_very_many_peers_is_said() {
        for (count, more) in [(64, None), (65, Some(1)), (100, Some(36))] {
            let mut facts = many(count);
            let asked = some_of(&mut facts, "whether {} more answer", |_| true);
            assert_eq!(asked.len(), 64);
            let expected = more.map(|more| {
                format!("not looked at: whether {more} more answer, since only the first 64 are asked about")
            });
            assert_eq!(notes(&facts), Vec::from_iter(expected));
            let mut facts = many(count);
            assert_eq!(some_of(&mut facts, "", |peer| peer.address == "127.0.0.9").len(), 1);
            assert!(facts.unread.is_empty());
        }
    }

    #[test]
    fn the_ways_of_very_many_peers_are_not_looked_up_and_that_is_said() {
        let mut facts = many(70);
        net::read(&mut facts).expect("netlink answers");
        let expected =
            "not looked at: by which device 6 more peers are reached, since only the first 64 are asked about";
        assert_eq!(notes(&facts), [expected]);
    }
}
