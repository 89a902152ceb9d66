//! subnet.env: what flannel's CNI plugin and many scripts read of a node's lease. Text, mode and place are flannel's.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

use crate::lease::{Network, Subnets};

/// What subnet.env says.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct SubnetEnv {
    /// The Network.
    pub network: Network,
    /// The node's own subnets.
    pub subnets: Subnets,
    /// The mesh MTU in bytes.
    pub mtu: u32,
    /// `--ip-masq`: whether the daemon masquerades, so that the CNI plugin does not.
    pub ip_masq: bool,
}

/// Whether the file had to be written.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Written {
    /// It said the same before and was left alone.
    Unchanged,
    /// It is new.
    New,
}

/// subnet.env can't be written.
#[derive(Debug, thiserror::Error)]
#[error("write {}: the CNI plugin waits for it; is its folder writable?", path.display())]
pub struct WriteError {
    /// Where it belongs.
    pub path: PathBuf,
    /// The system's word.
    #[source]
    pub source: io::Error,
}

impl SubnetEnv {
    /// The file's exact text. A subnet stands with its first host address, the bridge's: base address + 1.
    pub fn text(&self) -> String {
        let mut text = String::new();
        let mut line = |key: &str, value: &dyn std::fmt::Display| text += &format!("FLANNEL_{key}={value}\n");
        if let (Some(range), Some(subnet)) = (self.network.v4, self.subnets.v4) {
            line("NETWORK", &range.net);
            line("SUBNET", &first_host(subnet.into()));
        }
        if let (Some(range), Some(subnet)) = (self.network.v6, self.subnets.v6) {
            line("IPV6_NETWORK", &range.net);
            line("IPV6_SUBNET", &first_host(subnet.into()));
        }
        line("MTU", &self.mtu);
        line("IPMASQ", &self.ip_masq);
        text
    }

    /// Makes `path` say this: by rename, so that a reader sees the old or the new text and never a part. Mode 0644;
    /// a missing folder is made with mode 0755.
    ///
    /// # Errors
    /// [`WriteError`]; the old file is then left as it was.
    pub fn write(&self, path: &Path) -> Result<Written, WriteError> {
        let text = self.text();
        if fs::read(path).is_ok_and(|old| old == text.as_bytes()) {
            return Ok(Written::Unchanged);
        }
        replace(path, text.as_bytes(), 0o644).map_err(|source| WriteError {
            path: path.to_owned(),
            source,
        })?;
        Ok(Written::New)
    }
}

/// The subnets that a subnet.env of an earlier run names, to ask the store for them again. What is missing or can't be
/// understood is left out: the file is a hint.
pub fn previous(path: &Path) -> Subnets {
    fs::read(path)
        .map(|bytes| previous_in(&String::from_utf8_lossy(&bytes)))
        .unwrap_or_default()
}

/// As [`previous`], of the file's text.
pub fn previous_in(text: &str) -> Subnets {
    let mut subnets = Subnets::default();
    for line in text.lines() {
        let line = line.trim();
        let Some((key, value)) = line.strip_prefix("export ").unwrap_or(line).split_once('=') else {
            continue;
        };
        let value = value.trim().trim_matches(['"', '\'']);
        // flannel's readers take a list, and so do we; its first good entry is the one in use.
        let mut nets = value.split(',').filter_map(|net| net.trim().parse::<IpNet>().ok());
        match key.trim() {
            "FLANNEL_SUBNET" => subnets.v4 = nets.find_map(v4).or(subnets.v4),
            "FLANNEL_IPV6_SUBNET" => subnets.v6 = nets.find_map(v6).or(subnets.v6),
            _ => {}
        }
    }
    subnets
}

fn v4(net: IpNet) -> Option<Ipv4Net> {
    if let IpNet::V4(net) = net {
        Some(net.trunc())
    } else {
        None
    }
}

fn v6(net: IpNet) -> Option<Ipv6Net> {
    if let IpNet::V6(net) = net {
        Some(net.trunc())
    } else {
        None
    }
}

fn first_host(subnet: IpNet) -> IpNet {
    let host = match subnet.network() {
        IpAddr::V4(base) => IpAddr::V4((u32::from(base) | 1).into()),
        IpAddr::V6(base) => IpAddr::V6((u128::from(base) | 1).into()),
    };
    IpNet::new(host, subnet.prefix_len()).expect("the length of a subnet of the same family")
}

/// Makes `path` a file of these bytes and this mode, by rename; a missing folder is made with mode 0755.
pub(crate) fn replace(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let folder = path
        .parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or_else(|| Path::new("."));
    DirBuilder::new().recursive(true).mode(0o755).create(folder)?;
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().ok_or(io::ErrorKind::InvalidInput)?);
    name.push(format!(".{}", std::process::id()));
    let temporary = folder.join(name);
    let written = write_new(&temporary, bytes, mode).and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        // It may not exist; the first error is the one to tell.
        drop(fs::remove_file(&temporary));
    }
    written
}

fn write_new(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    // A leftover of a killed process that had our pid; what is not there needs no removal.
    drop(fs::remove_file(path));
    let mut file: File = OpenOptions::new().write(true).create_new(true).mode(mode).open(path)?;
    // The umask does not decide who may read it.
    file.set_permissions(fs::Permissions::from_mode(mode))?;
    file.write_all(bytes)?;
    file.sync_all()
}
