//! subnet.env as flannel's plugin reads it: line by line, no quotes, no blanks, every entry good or none.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use ipnet::IpNet;

use super::error::{Error, system};

/// What the daemon says of the node's lease.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct SubnetFile {
    /// FLANNEL_NETWORK: ranges of the mesh, each once, without host bits.
    pub networks: Vec<IpNet>,
    /// FLANNEL_IPV6_NETWORK.
    pub networks6: Vec<IpNet>,
    /// FLANNEL_SUBNET: the node's own, without host bits.
    pub subnet: Option<IpNet>,
    /// FLANNEL_IPV6_SUBNET.
    pub subnet6: Option<IpNet>,
    /// FLANNEL_MTU: the mesh MTU in bytes.
    pub mtu: u32,
    /// FLANNEL_IPMASQ: the daemon masquerades, so that the delegate need not.
    pub masquerade: bool,
}

/// A key that stands without `=`; flannel's plugin panics of it.
const NO_VALUE: &str = "has no value: KEY=VALUE is needed";

impl SubnetFile {
    /// Reads the file.
    ///
    /// # Errors
    /// Code 999, with flannel's text.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let read = || {
            let mut text = Vec::new();
            let mut file = File::open(path).map_err(|error| system("open", path, &error))?;
            file.read_to_end(&mut text)
                .map_err(|error| system("read", path, &error))?;
            Self::parse(&String::from_utf8_lossy(&text), path)
        };
        read().map_err(|why| {
            Error::internal(format!(
                "failed to load flannel 'subnet.env' file: {why}. Check the flannel pod log for this node."
            ))
        })
    }

    /// Understands the text of the file at `path`.
    ///
    /// # Errors
    /// What flannel's plugin says of it.
    pub fn parse(text: &str, path: &Path) -> Result<Self, String> {
        let (mut networks, mut networks6) = (Vec::new(), Vec::new());
        let (mut subnet, mut subnet6, mut mtu, mut masquerade) = (None, None, None, None);
        for line in text.lines() {
            let (key, value) = match line.split_once('=') {
                Some((key, value)) => (key, Some(value)),
                None => (line, None),
            };
            let value = || value.ok_or_else(|| format!("{}: {key} {NO_VALUE}", path.display()));
            match key {
                "FLANNEL_NETWORK" => networks = nets(value()?)?,
                "FLANNEL_IPV6_NETWORK" => networks6 = nets(value()?)?,
                "FLANNEL_SUBNET" => subnet = Some(net(value()?)?),
                "FLANNEL_IPV6_SUBNET" => subnet6 = Some(net(value()?)?),
                "FLANNEL_MTU" => mtu = Some(number(value()?)?),
                "FLANNEL_IPMASQ" => masquerade = Some(value()? == "true"),
                _ => {}
            }
        }
        let missing: Vec<_> = [
            (
                networks.is_empty() && networks6.is_empty(),
                "FLANNEL_NETWORK, FLANNEL_IPV6_NETWORK",
            ),
            (
                subnet.is_none() && subnet6.is_none(),
                "FLANNEL_SUBNET, FLANNEL_IPV6_SUBNET",
            ),
            (mtu.is_none(), "FLANNEL_MTU"),
            (masquerade.is_none(), "FLANNEL_IPMASQ"),
        ]
        .into_iter()
        .filter_map(|(missing, names)| missing.then_some(names))
        .collect();
        let (Some(mtu), Some(masquerade), true) = (mtu, masquerade, missing.is_empty()) else {
            return Err(format!("{} is missing {}", path.display(), missing.join(", ")));
        };
        Ok(Self {
            networks,
            networks6,
            subnet,
            subnet6,
            mtu,
            masquerade,
        })
    }
}

fn nets(list: &str) -> Result<Vec<IpNet>, String> {
    let mut nets = Vec::new();
    for entry in list.split(',') {
        let net = net(entry)?;
        if !nets.contains(&net) {
            nets.push(net);
        }
    }
    Ok(nets)
}

fn net(text: &str) -> Result<IpNet, String> {
    text.parse::<IpNet>()
        .map(|net| net.trunc())
        .map_err(|_| format!("invalid CIDR address: {text}"))
}

/// As Go's `strconv.ParseUint` of 32 bits.
fn number(text: &str) -> Result<u32, String> {
    let wrong = |why| format!("strconv.ParseUint: parsing {text:?}: {why}");
    if text.is_empty() || !text.bytes().all(|digit| digit.is_ascii_digit()) {
        return Err(wrong("invalid syntax"));
    }
    text.parse().map_err(|_| wrong("value out of range"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> Result<SubnetFile, String> {
        SubnetFile::parse(text, Path::new("/s"))
    }

    #[test]
    fn what_the_daemon_writes_is_read() {
        let file = parse(
            "FLANNEL_NETWORK=10.42.0.0/16\nFLANNEL_SUBNET=10.42.1.1/24\nFLANNEL_IPV6_NETWORK=2001:cafe:42::/56\n\
             FLANNEL_IPV6_SUBNET=2001:cafe:42:1::1/64\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n",
        )
        .unwrap();
        assert_eq!(file.subnet.unwrap().to_string(), "10.42.1.0/24");
        assert_eq!(file.subnet6.unwrap().to_string(), "2001:cafe:42:1::/64");
        assert_eq!((file.mtu, file.masquerade), (1450, true));
        assert_eq!((file.networks.len(), file.networks6.len()), (1, 1));
    }

    #[test]
    fn a_key_without_a_value_is_an_error_and_no_panic() {
        for key in ["NETWORK", "SUBNET", "IPV6_NETWORK", "IPV6_SUBNET", "MTU", "IPMASQ"] {
            let text = format!("\nnonsense\nFLANNEL_{key}\n");
            assert_eq!(
                parse(&text).unwrap_err(),
                format!("/s: FLANNEL_{key} has no value: KEY=VALUE is needed")
            );
        }
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics(text in any::<String>(), value in "\\PC{0,20}") {
            drop(parse(&text));
            for key in ["NETWORK", "SUBNET", "IPV6_NETWORK", "IPV6_SUBNET", "MTU", "IPMASQ"] {
                drop(parse(&format!("FLANNEL_{key}={value}")));
            }
        }

        #[test]
        fn what_is_good_is_read_whatever_stands_around(
            base in any::<[u8; 4]>(), length in 0u8..=32, mtu in any::<u32>(), mask in any::<bool>(), odd in "[a-zA-Z_= ]{0,12}",
        ) {
            let address = std::net::Ipv4Addr::from(base);
            let text = format!(
                "{odd}\r\nFLANNEL_NETWORK={address}/{length},{address}/{length}\r\nFLANNEL_SUBNET={address}/{length}\nFLANNEL_MTU={mtu}\nFLANNEL_IPMASQ={mask}"
            );
            let file = parse(&text).unwrap();
            let net = IpNet::new(address.into(), length).unwrap().trunc();
            prop_assert_eq!((file.networks, file.subnet, file.mtu, file.masquerade), (vec![net], Some(net), mtu, mask));
        }
    }
}
