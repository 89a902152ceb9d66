//! A connection to the kernel's IPsec.

use netlink_packet_xfrm::constants::{XFRM_MSG_GETPOLICY, XFRM_MSG_GETSA};

use crate::{
    Batch, Connection, Error, ForeignPolicy, ForeignSa, Policy, Protocol, SaId, SaInfo, policy,
    sa::{self, XFRMA_SA_DIR, user_id},
};

/// What was found in the kernel: something that our types express, or something that they do not.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Parsed<T, F> {
    /// Expressed in full. That does not make it ours; its reqid does.
    Known(T),
    /// Someone else's, with features that we have no words for.
    Other(F),
}

impl<T, F> Parsed<T, F> {
    /// What our types express, if they do.
    pub fn known(self) -> Option<T> {
        match self {
            Self::Known(known) => Some(known),
            Self::Other(_) => None,
        }
    }
}

/// The kernel's IPsec in the network namespace where it was opened.
pub struct Xfrm(Connection);

impl Xfrm {
    /// Opens a connection in the network namespace of the calling thread.
    pub fn open() -> Result<Self, Error> {
        Connection::open(Protocol::Xfrm).map(Self)
    }

    pub(crate) fn connection(&mut self) -> &mut Connection {
        &mut self.0
    }

    /// The port that notifications of our own changes carry.
    pub fn port(&self) -> u32 {
        self.0.port()
    }

    /// An empty batch; see [`Connection::batch`].
    pub fn batch(&mut self, bytes: usize) -> Batch {
        self.0.batch(bytes)
    }

    /// Carries out the requests; see [`Connection::execute`].
    pub fn execute(&mut self, batch: Batch) -> Vec<Result<(), Error>> {
        self.0.execute(batch)
    }

    /// Every SA in this network namespace.
    pub fn dump_sas(&mut self) -> Result<Vec<Parsed<SaInfo, ForeignSa>>, Error> {
        let found = self
            .0
            .dump(XFRM_MSG_GETSA, |_| {}, |message| Some(sa::parse(&message)))?;
        found.into_iter().collect()
    }

    /// What `of` makes of every SA in this network namespace; those that [`crate::Sa`] cannot express are left out. For many
    /// SAs of which little is wanted: only that is kept.
    pub fn map_sas<T>(&mut self, mut of: impl FnMut(SaInfo) -> Option<T>) -> Result<Vec<T>, Error> {
        let found = self.0.dump(
            XFRM_MSG_GETSA,
            |_| {},
            |message| match sa::parse(&message) {
                Ok(parsed) => parsed.known().and_then(&mut of).map(Ok),
                Err(error) => Some(Err(error)),
            },
        )?;
        found.into_iter().collect()
    }

    /// Every policy in this network namespace.
    pub fn dump_policies(&mut self) -> Result<Vec<Parsed<Policy, ForeignPolicy>>, Error> {
        let found = self
            .0
            .dump(XFRM_MSG_GETPOLICY, |_| {}, |message| Some(policy::parse(&message)))?;
        found.into_iter().collect()
    }

    /// One SA as the kernel holds it, `None` if it is gone or has features that [`crate::Sa`] cannot express.
    ///
    /// The way to learn what held of an addition: the kernel leaves out what it does not know without an error.
    pub fn get_sa(&mut self, id: &SaId) -> Result<Option<SaInfo>, Error> {
        let found = self.0.get(
            XFRM_MSG_GETSA,
            0,
            |writer| writer.emit(&user_id(id)),
            |message| Some(sa::parse(&message)),
        );
        match found {
            Ok(Some(parsed)) => parsed.map(|parsed| parsed.known()),
            Ok(None) => Ok(None),
            Err(error) if error.is_gone() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Whether the kernel knows the direction of an SA (linux 6.10).
    ///
    /// Asks for an SA that cannot be, with a direction that cannot be: a kernel that checks the direction says so, one that
    /// ignores it finds no such SA. Changes nothing and needs no ESP.
    pub fn knows_direction(&mut self) -> Result<bool, Error> {
        let nowhere = SaId {
            dst: std::net::Ipv4Addr::UNSPECIFIED.into(),
            spi: 0,
        };
        let answer = self.0.get(
            XFRM_MSG_GETSA,
            0,
            |writer| {
                writer.emit(&user_id(&nowhere));
                writer.attribute(XFRMA_SA_DIR, &[u8::MAX]);
            },
            |_| Some(()),
        );
        match answer {
            Ok(_) => Ok(false),
            Err(error) if error.is_gone() => Ok(false),
            Err(Error::Kernel(error)) if matches!(error.errno, nix::libc::ERANGE | nix::libc::EINVAL) => Ok(true),
            Err(error) => Err(error),
        }
    }
}
