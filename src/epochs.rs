//! The rules of epochs: only the name of a generation, so far.

/// An ordered pair of epochs: the sender's and the receiver's. It names one SA.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Generation {
    /// The sender's epoch.
    pub sender: keys::Epoch,
    /// The receiver's epoch.
    pub receiver: keys::Epoch,
}
