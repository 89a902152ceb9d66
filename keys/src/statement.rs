//! What a node says about itself, and the one way to write it.
//!
//! ```text
//! statement = version, then the fields of this table in its order, each behind its length (u16, big endian)
//!
//! version    1 byte                      1
//! network    nets, 1 to 8                the Network, all of its families
//! node       1 to 253 bytes              printable ASCII without space and slash
//! subnets    nets, 1 to 8                this node's subnets
//! addresses  addresses, 1 to 8           where the node is reached on the uplink
//! cipher     1 byte                      Cipher::wire_id: what this node sends with
//! encap      mode u8, port u16           mode 0 esp, 1 udp, 2 auto; port is not 0 unless the mode is esp
//! epoch      u64
//! public     32 bytes                    X25519 (RFC 7748), u below 2^255 - 19
//! kids       8 bytes each, 1 to 64       the PSKs that the node holds, newest first
//!
//! net        family u8 (4 or 6), prefix length u8, address (4 or 16 bytes) with all host bits zero
//! address    family u8 (4 or 6), 4 or 16 bytes
//! ```
//! Numbers are big endian. Nothing follows the last field. There is one encoding per statement: bytes that decode are
//! the bytes that encoding gives back. So a digest or tag of the bytes is one of the statement.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use ring::digest;
use thiserror::Error;

use crate::{Cipher, Epoch, Kid, PublicKey};

/// What a node says about itself for one epoch. A statement never changes: whatever changes makes a new epoch.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Statement {
    /// The Network, one net per family; 1 to 8, host bits zero.
    pub network: Vec<IpNet>,
    /// The node's name: 1 to 253 bytes of printable ASCII without space and slash.
    pub node: String,
    /// The node's subnets; 1 to 8, host bits zero.
    pub subnets: Vec<IpNet>,
    /// The public addresses; 1 to 8.
    pub addresses: Vec<IpAddr>,
    /// The cipher that the node sends with. What it receives with is in its peers' statements, so that nodes with
    /// different ciphers understand each other during a change.
    pub cipher: Cipher,
    /// How ESP reaches this node.
    pub encap: Encap,
    /// The epoch that this statement opens.
    pub epoch: Epoch,
    /// The epoch's public key.
    pub public: PublicKey,
    /// The PSKs that the node holds, newest first; 1 to 64.
    pub kids: Vec<Kid>,
}

impl Statement {
    /// The most bytes that a statement may have.
    pub const MAX_LEN: usize = 4096;

    /// The canonical encoding.
    ///
    /// # Errors
    /// [`StatementError`], when a field is outside of what its comment allows.
    pub fn encode(&self) -> Result<Encoded, StatementError> {
        let Self {
            network,
            node,
            subnets,
            addresses,
            cipher,
            encap,
            epoch,
            public,
            kids,
        } = self;
        let mut bytes = vec![VERSION];
        frame(&mut bytes, Field::Network, &nets(Field::Network, network)?)?;
        frame(&mut bytes, Field::Node, check_node(node)?.as_bytes())?;
        frame(&mut bytes, Field::Subnets, &nets(Field::Subnets, subnets)?)?;
        let count = check_count(Field::Addresses, addresses.len())?;
        let mut list = Vec::with_capacity(count * 17);
        for &address in addresses {
            list.push(family(address));
            put_address(&mut list, address);
        }
        frame(&mut bytes, Field::Addresses, &list)?;
        frame(&mut bytes, Field::Cipher, &[cipher.wire_id()])?;
        let [high, low] = check_encap(*encap)?.port.to_be_bytes();
        frame(&mut bytes, Field::Encap, &[encap.mode.wire_id(), high, low])?;
        frame(&mut bytes, Field::Epoch, &epoch.0.to_be_bytes())?;
        frame(&mut bytes, Field::Public, &check_public(*public)?.0)?;
        check_count(Field::Kids, kids.len())?;
        let list: Vec<u8> = kids.iter().flat_map(|kid| kid.0).collect();
        frame(&mut bytes, Field::Kids, &list)?;
        Ok(Encoded::seal(bytes, *public))
    }

    /// Reads a statement. Takes any bytes; says nothing about who wrote them: verify the tag over the same bytes.
    ///
    /// # Errors
    /// [`StatementError`], for whatever [`Statement::encode`] does not make.
    pub fn decode(bytes: &[u8]) -> Result<Self, StatementError> {
        if bytes.len() > Self::MAX_LEN {
            return Err(StatementError::TooLong(bytes.len()));
        }
        let mut rest = Reader(bytes);
        match rest.take(Field::Version, 1)? {
            [VERSION] => {}
            version => return Err(StatementError::Version(version[0])),
        }
        let network = read_nets(Field::Network, rest.frame(Field::Network)?)?;
        let node = std::str::from_utf8(rest.frame(Field::Node)?).map_err(|_| StatementError::Node)?;
        let node = check_node(node)?.to_owned();
        let subnets = read_nets(Field::Subnets, rest.frame(Field::Subnets)?)?;
        let addresses = read_addresses(rest.frame(Field::Addresses)?)?;
        let [cipher] = rest.fixed(Field::Cipher)?;
        let cipher = Cipher::from_wire_id(cipher).ok_or(StatementError::Cipher(cipher))?;
        let [mode, high, low] = rest.fixed(Field::Encap)?;
        let mode = EncapMode::from_wire_id(mode).ok_or(StatementError::EncapMode(mode))?;
        let encap = check_encap(Encap {
            mode,
            port: u16::from_be_bytes([high, low]),
        })?;
        let epoch = Epoch(u64::from_be_bytes(rest.fixed(Field::Epoch)?));
        let public = check_public(PublicKey(rest.fixed(Field::Public)?))?;
        let kids = read_kids(rest.frame(Field::Kids)?)?;
        match rest.0.len() {
            0 => Ok(Self {
                network,
                node,
                subnets,
                addresses,
                cipher,
                encap,
                epoch,
                public,
                kids,
            }),
            more => Err(StatementError::Trailing(more)),
        }
    }
}

/// A statement's canonical bytes. Only [`Statement::encode`] and a strict reading of received bytes make one.
#[derive(Clone, Eq, PartialEq)]
pub struct Encoded {
    bytes: Box<[u8]>,
    digest: [u8; 32],
    public: PublicKey,
}

impl Encoded {
    /// The bytes: what is tagged and published.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// SHA-256 of the bytes: what enters the derivation of keys.
    pub fn digest(&self) -> [u8; 32] {
        self.digest
    }

    /// The public key that the statement names.
    pub fn public(&self) -> PublicKey {
        self.public
    }

    fn seal(bytes: Vec<u8>, public: PublicKey) -> Self {
        let hash = digest::digest(&digest::SHA256, &bytes);
        let digest = hash.as_ref().try_into().expect("SHA-256 gives 32 bytes");
        let bytes = bytes.into();
        Self { bytes, digest, public }
    }
}

impl TryFrom<&[u8]> for Encoded {
    type Error = StatementError;

    /// Takes received bytes if [`Statement::decode`] does.
    fn try_from(bytes: &[u8]) -> Result<Self, StatementError> {
        Ok(Self::seal(bytes.to_vec(), Statement::decode(bytes)?.public))
    }
}

impl fmt::Debug for Encoded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Encoded")
            .field("len", &self.bytes.len())
            .finish_non_exhaustive()
    }
}

/// The Network as one string, which every [`Psk`](crate::Psk) is bound to: `10.244.0.0/16` or, with two families,
/// `10.244.0.0/16,fd00:244::/48`, in the order of the statement.
pub fn network_name(network: &[IpNet]) -> String {
    network.iter().map(IpNet::to_string).collect::<Vec<_>>().join(",")
}

/// How ESP reaches a node.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Encap {
    /// Plain, in UDP, or as the path allows.
    pub mode: EncapMode,
    /// The UDP port; may be 0 only with [`EncapMode::Esp`], which has no use for it.
    pub port: u16,
}

/// Plain ESP, or ESP in UDP (RFC 3948).
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum EncapMode {
    /// IP protocol 50.
    Esp,
    /// Always in UDP.
    Udp,
    /// Plain ESP, and UDP for a peer that ESP does not reach.
    Auto,
}

impl EncapMode {
    const ALL: [Self; 3] = [Self::Esp, Self::Udp, Self::Auto];

    fn wire_id(self) -> u8 {
        match self {
            Self::Esp => 0,
            Self::Udp => 1,
            Self::Auto => 2,
        }
    }

    fn from_wire_id(id: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|mode| mode.wire_id() == id)
    }
}

/// The parts of a statement, for errors.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Field {
    /// Format version.
    Version,
    /// The Network.
    Network,
    /// The node's name.
    Node,
    /// The node's subnets.
    Subnets,
    /// The node's public addresses.
    Addresses,
    /// The cipher it sends with.
    Cipher,
    /// Encapsulation mode and port.
    Encap,
    /// Epoch number.
    Epoch,
    /// X25519 public key.
    Public,
    /// Names of PSKs.
    Kids,
}

impl Field {
    /// The most entries of a list; 1 for what is no list.
    const fn max(self) -> usize {
        match self {
            Self::Network | Self::Subnets | Self::Addresses => 8,
            Self::Kids => 64,
            Self::Version | Self::Node | Self::Cipher | Self::Encap | Self::Epoch | Self::Public => 1,
        }
    }
}

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Version => "version",
            Self::Network => "network",
            Self::Node => "node",
            Self::Subnets => "subnets",
            Self::Addresses => "addresses",
            Self::Cipher => "cipher",
            Self::Encap => "encap",
            Self::Epoch => "epoch",
            Self::Public => "public",
            Self::Kids => "kids",
        })
    }
}

/// Why bytes or fields are no statement.
#[derive(Clone, Copy, Debug, Eq, Error, PartialEq)]
pub enum StatementError {
    /// A format of another version of ringmail.
    #[error("statement has version {0}; this ringmail reads version {VERSION}")]
    Version(u8),
    /// More than [`Statement::MAX_LEN`] bytes.
    #[error("statement is {0} bytes; at most {max} are allowed", max = Statement::MAX_LEN)]
    TooLong(usize),
    /// The bytes end inside a field.
    #[error("statement ends inside its {0}")]
    Short(Field),
    /// A field's length does not fit its content.
    #[error("statement's {0} is {1} bytes, which its content does not fill")]
    Len(Field, usize),
    /// Bytes after the last field.
    #[error("statement has {0} bytes after its end")]
    Trailing(usize),
    /// A list that is empty or too long.
    #[error("statement has {1} entries in its {0}; 1 to {max} are allowed", max = .0.max())]
    Count(Field, usize),
    /// A name that is empty, too long, or has a character it may not have.
    #[error("statement's node name is not 1 to 253 characters of printable ASCII without space and slash")]
    Node,
    /// An address family other than 4 and 6.
    #[error("statement's {0} has address family {1}; 4 and 6 are known")]
    Family(Field, u8),
    /// A prefix longer than the address, or with host bits that are not zero.
    #[error("statement's {0} has a net with a prefix too long or host bits that are not zero")]
    Net(Field),
    /// A byte that stands for no cipher.
    #[error("statement's cipher {0} is unknown")]
    Cipher(u8),
    /// A byte that stands for no encapsulation mode.
    #[error("statement's encapsulation mode {0} is unknown")]
    EncapMode(u8),
    /// UDP encapsulation on port 0.
    #[error("statement's encapsulation port is 0")]
    EncapPort,
    /// A public key that is not written in the one way that counts.
    #[error("statement's public key is not below 2^255 - 19")]
    Public,
}

fn frame(bytes: &mut Vec<u8>, field: Field, content: &[u8]) -> Result<(), StatementError> {
    let len = u16::try_from(content.len()).map_err(|_| StatementError::Len(field, content.len()))?;
    bytes.extend_from_slice(&len.to_be_bytes());
    bytes.extend_from_slice(content);
    Ok(())
}

fn nets(field: Field, nets: &[IpNet]) -> Result<Vec<u8>, StatementError> {
    let mut list = Vec::with_capacity(check_count(field, nets.len())? * 18);
    for net in nets {
        if net.trunc() != *net {
            return Err(StatementError::Net(field));
        }
        list.extend([family(net.addr()), net.prefix_len()]);
        put_address(&mut list, net.addr());
    }
    Ok(list)
}

fn family(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => 4,
        IpAddr::V6(_) => 6,
    }
}

fn put_address(list: &mut Vec<u8>, address: IpAddr) {
    match address {
        IpAddr::V4(address) => list.extend(address.octets()),
        IpAddr::V6(address) => list.extend(address.octets()),
    }
}

fn check_node(node: &str) -> Result<&str, StatementError> {
    let allowed = |b: u8| b.is_ascii_graphic() && b != b'/';
    if (1..=253).contains(&node.len()) && node.bytes().all(allowed) {
        Ok(node)
    } else {
        Err(StatementError::Node)
    }
}

fn check_count(field: Field, count: usize) -> Result<usize, StatementError> {
    if (1..=field.max()).contains(&count) {
        Ok(count)
    } else {
        Err(StatementError::Count(field, count))
    }
}

fn check_encap(encap: Encap) -> Result<Encap, StatementError> {
    match encap {
        Encap {
            mode: EncapMode::Udp | EncapMode::Auto,
            port: 0,
        } => Err(StatementError::EncapPort),
        Encap {
            mode: EncapMode::Esp | EncapMode::Udp | EncapMode::Auto,
            ..
        } => Ok(encap),
    }
}

/// X25519 reduces u and ignores its top bit, so one key has several spellings (RFC 7748 section 5). Two nodes with the
/// same key are found by comparing bytes: only the reduced spelling is taken.
fn check_public(public: PublicKey) -> Result<PublicKey, StatementError> {
    let [lowest, middle @ .., highest] = &public.0;
    let above = *highest == 0x7f && middle.iter().all(|&b| b == 0xff) && *lowest >= 0xed;
    if *highest > 0x7f || above {
        Err(StatementError::Public)
    } else {
        Ok(public)
    }
}

/// The bytes not yet read.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, field: Field, len: usize) -> Result<&'a [u8], StatementError> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or(StatementError::Short(field))?;
        self.0 = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, field: Field) -> Result<[u8; N], StatementError> {
        Ok(self
            .take(field, N)?
            .try_into()
            .expect("take gives as many bytes as asked for"))
    }

    fn frame(&mut self, field: Field) -> Result<&'a [u8], StatementError> {
        let len = u16::from_be_bytes(self.array(field)?);
        self.take(field, usize::from(len))
    }

    fn fixed<const N: usize>(&mut self, field: Field) -> Result<[u8; N], StatementError> {
        let content = self.frame(field)?;
        content
            .try_into()
            .map_err(|_| StatementError::Len(field, content.len()))
    }

    fn family(&mut self, field: Field) -> Result<Family, StatementError> {
        match self.array(field)? {
            [4] => Ok(Family::V4),
            [6] => Ok(Family::V6),
            [other] => Err(StatementError::Family(field, other)),
        }
    }

    fn address(&mut self, field: Field, family: Family) -> Result<IpAddr, StatementError> {
        Ok(match family {
            Family::V4 => Ipv4Addr::from(self.array::<4>(field)?).into(),
            Family::V6 => Ipv6Addr::from(self.array::<16>(field)?).into(),
        })
    }
}

enum Family {
    V4,
    V6,
}

fn read_nets(field: Field, content: &[u8]) -> Result<Vec<IpNet>, StatementError> {
    let mut rest = Reader(content);
    let mut nets = Vec::new();
    while !rest.0.is_empty() {
        let family = rest.family(field)?;
        let [prefix] = rest.array(field)?;
        let address = rest.address(field, family)?;
        let net = IpNet::new(address, prefix).ok().filter(|net| net.trunc() == *net);
        nets.push(net.ok_or(StatementError::Net(field))?);
        check_count(field, nets.len())?;
    }
    check_count(field, nets.len())?;
    nets.shrink_to_fit();
    Ok(nets)
}

fn read_addresses(content: &[u8]) -> Result<Vec<IpAddr>, StatementError> {
    let mut rest = Reader(content);
    let mut addresses = Vec::new();
    while !rest.0.is_empty() {
        let family = rest.family(Field::Addresses)?;
        addresses.push(rest.address(Field::Addresses, family)?);
        check_count(Field::Addresses, addresses.len())?;
    }
    check_count(Field::Addresses, addresses.len())?;
    addresses.shrink_to_fit();
    Ok(addresses)
}

fn read_kids(content: &[u8]) -> Result<Vec<Kid>, StatementError> {
    let (kids, []) = content.as_chunks::<8>() else {
        return Err(StatementError::Len(Field::Kids, content.len()));
    };
    check_count(Field::Kids, kids.len())?;
    Ok(kids.iter().copied().map(Kid).collect())
}

/// The format above. Any change of it is another version.
const VERSION: u8 = 1;
