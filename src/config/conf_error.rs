//! Why a net-conf.json is refused: flannel's texts, with the value and the remedy.

use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use keys::Slot;

use super::backend::types_hint;

/// Why a text is no configuration. Never holds a secret's bytes.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ConfError {
    /// The file can't be read.
    #[error("{file}: the network configuration can't be read")]
    Read {
        /// The file.
        file: String,
        /// The system's word.
        #[source]
        source: Arc<std::io::Error>,
    },
    /// No JSON, or a value that its key can't have.
    #[error("{file}:{line}:{column}: {text}")]
    Json {
        /// The file.
        file: String,
        /// The line, from 1.
        line: usize,
        /// The column, from 1.
        column: usize,
        /// What is wrong, and what would be right.
        text: String,
    },
    /// Values that can't be together.
    #[error("{file}: {rule}")]
    Rule {
        /// The file.
        file: String,
        /// Which rule they break.
        rule: Rule,
    },
}

/// The rules between the values of net-conf.json.
#[derive(Clone, Debug, Eq, PartialEq, thiserror::Error)]
pub enum Rule {
    /// Both families are off.
    #[error("none defined stack: EnableIPv4 and EnableIPv6 are both false, one must be true")]
    NoFamily,
    /// A family is on and has no range.
    #[error("please define a correct {0} parameter in the flannel config, such as {example:?}",
        example = if *.0 == "Network" { "10.244.0.0/16" } else { "fd00:244::/48" })]
    NoNetwork(&'static str),
    /// The range is not for ordinary hosts.
    #[error("{key} {net} overlaps {special}, which are no addresses for pods: choose another, such as {example}",
        example = if net.addr().is_ipv4() { "10.244.0.0/16" } else { "fd00:244::/48" })]
    Special {
        /// `Network` or `IPv6Network`.
        key: &'static str,
        /// Its value.
        net: IpNet,
        /// The range that it overlaps.
        special: IpNet,
    },
    /// The range can't be cut.
    #[error("{key} {net}: {key} is too small. Minimum useful network prefix is /{least}")]
    TooSmall {
        /// `network`, as flannel writes it, or `IPv6Network`.
        key: &'static str,
        /// Its value.
        net: IpNet,
        /// The longest prefix that is allowed.
        least: u8,
    },
    /// A subnet without room for addresses.
    #[error("{key} {len}: SubnetLen must be less than /{limit}")]
    SubnetTooLong {
        /// `SubnetLen` or `IPv6SubnetLen`.
        key: &'static str,
        /// Its value.
        len: u64,
        /// The first length that is too long.
        limit: u8,
    },
    /// A subnet too large for the range.
    #[error("{key} {len} in {net}: network must be able to accommodate at least four subnets, so at least {least}")]
    TooFewSubnets {
        /// `SubnetLen` or `IPv6SubnetLen`.
        key: &'static str,
        /// Its value.
        len: u64,
        /// The range.
        net: IpNet,
        /// The shortest length that is allowed.
        least: u8,
    },
    /// The first or last subnet lies outside.
    #[error("{key} {address}: {key} is not in the range of the {of} {net}")]
    OutOfRange {
        /// `SubnetMin`, `SubnetMax` and so on.
        key: &'static str,
        /// Its value.
        address: IpAddr,
        /// `Network` or `IPv6Network`.
        of: &'static str,
        /// The range.
        net: IpNet,
    },
    /// The first or last subnet is no subnet's base address.
    #[error("{key} is not on a SubnetLen boundary: {address}; with /{len} the nearest is {nearest}")]
    NotOnBoundary {
        /// `SubnetMin`, `SubnetMax` and so on.
        key: &'static str,
        /// Its value.
        address: IpAddr,
        /// The subnets' length.
        len: u8,
        /// The base address of the subnet that it lies in.
        nearest: IpAddr,
    },
    /// There is no subnet between the two.
    #[error("{min_key} {min} is above {max_key} {max}: exchange them")]
    MinAboveMax {
        /// `SubnetMin` or `IPv6SubnetMin`.
        min_key: &'static str,
        /// Its value.
        min: IpAddr,
        /// `SubnetMax` or `IPv6SubnetMax`.
        max_key: &'static str,
        /// Its value.
        max: IpAddr,
    },
    /// The first subnet is beyond what an SPI can name.
    #[error("{key} {address} is subnet number {index} of {net}: only the first {max} can be told apart",
        max = Slot::MAX.get() + 1)]
    TooHigh {
        /// `SubnetMin` or `IPv6SubnetMin`.
        key: &'static str,
        /// Its value.
        address: IpAddr,
        /// Its index in the range.
        index: u128,
        /// The range.
        net: IpNet,
    },
    /// The families give out different subnets.
    #[error(
        "no subnet number is given out by both families (IPv4 {}, IPv6 {}): a node holds the same number in \
         both; let SubnetMin and SubnetMax of both overlap", between(.v4), between(.v6)
    )]
    NothingInCommon {
        /// First and last number of IPv4.
        v4: (u32, u32),
        /// First and last number of IPv6.
        v6: (u32, u32),
    },
    /// No such type.
    #[error("unknown backend type: {0:?}; {hint}", hint = types_hint(.0))]
    UnknownType(String),
    /// Neither a backend nor a PSK.
    #[error(
        "there is no Backend and no PSK, and nothing is sent unencrypted by default: give --psk-file PATH \
         (`ringmail keygen` makes a key), or write the Backend's Type"
    )]
    NoBackend,
    /// ipsec without a key.
    #[error("backend ipsec has no PSK: give --psk-file PATH or Backend.PSKFile; `ringmail keygen` makes a key")]
    NoPsk,
    /// Two sources of keys.
    #[error("Backend has both PSK and PSKFile: keep PSKFile")]
    TwoPsks,
    /// The PSK in the text is none.
    #[error("Backend.PSK: {0}")]
    Psk(#[source] keys::PskError),
    /// A VNI whose device can't be named.
    #[error(
        "Backend.VNI is {vni}: the device {prefix}{vni} would have a name longer than the kernel's 15 characters; at most {most} is possible"
    )]
    Vni {
        /// Its value.
        vni: u32,
        /// What the device's name begins with.
        prefix: &'static str,
        /// The greatest that fits.
        most: u32,
    },
    /// Peers of a type that is never served beside ipsec.
    #[error(
        "Backend.AllowPlaintextPeers {}: the Type that the other nodes have is needed, \"vxlan\" or \"host-gw\"; from another \
         backend go to vxlan first", .0.map_or("has no Type".to_owned(), |kind| format!("has Type {kind:?}"))
    )]
    PlaintextType(Option<&'static str>),
    /// An MTU that IP does not allow.
    #[error("Backend.MTU is {mtu}: at least {least} is needed; leave it out to have it computed")]
    Mtu {
        /// Its value.
        mtu: u16,
        /// The least.
        least: u16,
    },
}

fn between(range: &(u32, u32)) -> String {
    format!("{} to {}", range.0, range.1)
}
