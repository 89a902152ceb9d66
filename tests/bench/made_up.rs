//! A mesh of nodes that are not there: real statements with real keys and tags, made before any clock runs.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use anyhow::{Context as _, Result};
use ipnet::{IpNet, Ipv4Net};
use keys::{
    Cipher, Encap, EncapMode, Encoded, Epoch, EpochSecret, Pair, ProbeKey, Psk, PublicKey, SaKey, Slot, Statement,
};
use ring::rand::SystemRandom;
use ringmail::admission::{self, Admitted};
use ringmail::backend::ipsec;
use ringmail::epochs::Generation;
use ringmail::lease::{Addresses, BackendData, Lease, Network, NodeName, Range, Subnets};
use ringmail::probe::{self, Probe};

/// Whom everything is measured on; the peers' slots come after its own.
const OWN_SLOT: u32 = 1;
/// The first epoch of each peer, far from zero as a real one (seconds since 1970).
const FIRST_EPOCH: u64 = 1_700_000_000;

/// What all nodes of the mesh have in common.
pub(crate) struct Mesh {
    pub(crate) network: Network,
    pub(crate) psk: Arc<Psk>,
}

/// One life of a peer's ephemeral key, and the lease that tells of it.
pub(crate) struct Life {
    secret: EpochSecret,
    encoded: Encoded,
    epoch: Epoch,
    pub(crate) lease: Arc<Lease>,
}

/// A node that is not there.
pub(crate) struct Peer {
    pub(crate) name: NodeName,
    slot: Slot,
    subnets: Subnets,
    public: Ipv4Addr,
    lives: u64,
    pub(crate) life: Life,
}

impl Mesh {
    /// 10.0.0.0/8 in /24, keyed with `psk`.
    pub(crate) fn new(psk: &[u8]) -> Result<Self> {
        let net = Ipv4Net::new(Ipv4Addr::new(10, 0, 0, 0), 8)?;
        let range = Range {
            net,
            subnet_len: 24,
            first: 1,
            last: 65_535,
        };
        let network = Network {
            v4: Some(range),
            v6: None,
        };
        let psk = Arc::new(Psk::new(psk, &network.to_string())?);
        Ok(Self { network, psk })
    }

    /// This node's own subnet and slot.
    pub(crate) fn own(&self) -> Result<(Subnets, Slot)> {
        let slot = Slot::new(OWN_SLOT)?;
        Ok((self.network.subnets(slot).context("a subnet of its own")?, slot))
    }

    /// `count` peers, each in its first life, at 172.16.0.1 and on.
    pub(crate) fn peers(&self, count: usize) -> Result<Vec<Peer>> {
        (1..=u32::try_from(count)?).map(|index| self.peer(index)).collect()
    }

    fn peer(&self, index: u32) -> Result<Peer> {
        let slot = Slot::new(OWN_SLOT + index)?;
        let subnets = self.network.subnets(slot).context("more peers than subnets")?;
        let public = Ipv4Addr::from(u32::from(Ipv4Addr::new(172, 16, 0, 0)) + index);
        let name = NodeName::new(&format!("peer-{index:05}"))?;
        let life = self.life(&name, subnets, public, Epoch(FIRST_EPOCH))?;
        Ok(Peer {
            name,
            slot,
            subnets,
            public,
            lives: 1,
            life,
        })
    }

    fn life(&self, name: &NodeName, subnets: Subnets, public: Ipv4Addr, epoch: Epoch) -> Result<Life> {
        let secret = EpochSecret::generate(&SystemRandom::new())?;
        let statement = Statement {
            network: self.network.nets().collect(),
            node: name.as_str().into(),
            subnets: subnets.iter().collect::<Vec<IpNet>>(),
            addresses: vec![IpAddr::V4(public)],
            cipher: Cipher::Aes128Gcm16,
            encap: Encap {
                mode: EncapMode::Esp,
                port: 4500,
            },
            epoch,
            public: secret.public(),
            kids: vec![self.psk.kid()],
        };
        let encoded = statement.encode()?;
        let lease = Lease {
            node: name.clone(),
            subnets,
            public: Addresses {
                v4: Some(public),
                v6: None,
            },
            backend: "ipsec".into(),
            data: admission::publish(&encoded, &[Arc::clone(&self.psk)]),
            v6_data: BackendData::NULL,
        };
        Ok(Life {
            secret,
            encoded,
            epoch,
            lease: Arc::new(lease),
        })
    }

    /// `peer` begins its next life.
    pub(crate) fn renew(&self, peer: &mut Peer) -> Result<()> {
        let epoch = Epoch(FIRST_EPOCH + peer.lives);
        peer.life = self.life(&peer.name, peer.subnets, peer.public, epoch)?;
        peer.lives += 1;
        Ok(())
    }

    /// What `lease`, this node's own, says to its peers.
    pub(crate) fn admit(&self, lease: &Lease) -> Result<Admitted> {
        Ok(admission::verify(
            lease,
            &self.network,
            std::slice::from_ref(&self.psk),
        )?)
    }

    fn derive(&self, life: &Life, own: &Admitted) -> Result<Pair> {
        let theirs: &PublicKey = &own.statement.public;
        Ok(Pair::derive(
            &self.psk,
            &life.secret,
            &life.encoded,
            theirs,
            &own.encoded,
        )?)
    }

    /// Both SA keys between a peer and this node, as a pass derives them.
    pub(crate) fn sa_keys(&self, peer: &Peer, own: &Admitted) -> Result<[SaKey; 2]> {
        let Pair { outbound, inbound, .. } = self.derive(&peer.life, own)?;
        let forth = generation(&peer.life, own);
        Ok([
            outbound.into_key(Cipher::Aes128Gcm16, ipsec::spi(peer.slot, forth, keys::Carrier::Esp)),
            inbound.key(
                Cipher::Aes128Gcm16,
                ipsec::spi(own.slot, forth.reverse(), keys::Carrier::Esp),
            ),
        ])
    }
}

impl Peer {
    /// The address that its probes come from.
    pub(crate) fn base(&self) -> Result<IpAddr> {
        self.subnets.bases().iter().next().context("a base address")
    }

    /// The key of its probes to this node.
    pub(crate) fn probe_key(&self, mesh: &Mesh, own: &Admitted) -> Result<ProbeKey> {
        Ok(mesh.derive(&self.life, own)?.probe)
    }

    /// A question of its, or an answer, which says that its data goes on this node's newest epoch.
    pub(crate) fn say(&self, own: &Admitted, key: &ProbeKey, ask: bool, ticket: u64) -> [u8; probe::LEN] {
        let sent = generation(&self.life, own);
        let probe = Probe {
            ask,
            sent,
            data: Some(sent),
            ticket,
        };
        probe.seal(key)
    }

    /// The probe with which it says that it has this node's newest epoch and sends its data on it.
    pub(crate) fn probe(&self, mesh: &Mesh, own: &Admitted, ticket: u64) -> Result<[u8; probe::LEN]> {
        Ok(self.say(own, &self.probe_key(mesh, own)?, false, ticket))
    }
}

/// The generation that the peer sends on.
fn generation(life: &Life, own: &Admitted) -> Generation {
    Generation {
        sender: life.epoch,
        receiver: own.statement.epoch,
    }
}
