//! How the kernel's indexes read: in the words of `ip xfrm`, without what is left at "any".

use std::fmt;

use crate::{Direction, PolicyId, SaId, Selector};

impl fmt::Display for SaId {
    /// `dst 192.0.2.2 spi 0x00001041`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "dst {} spi 0x{:08x}", self.dst, self.spi)
    }
}

impl fmt::Display for Direction {
    /// `in`, `fwd`, `out`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::In => "in",
            Self::Fwd => "fwd",
            Self::Out => "out",
        })
    }
}

impl fmt::Display for Selector {
    /// `src 0.0.0.0/0 dst 10.244.2.0/24`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            src,
            dst,
            protocol,
            sport,
            dport,
            ifindex,
        } = self;
        write!(f, "src {src} dst {dst}")?;
        if *protocol != 0 {
            write!(f, " proto {protocol}")?;
        }
        for (word, port) in [("sport", sport), ("dport", dport)] {
            if let Some(port) = port {
                write!(f, " {word} {port}")?;
            }
        }
        if *ifindex != 0 {
            write!(f, " dev {ifindex}")?;
        }
        Ok(())
    }
}

impl fmt::Display for PolicyId {
    /// `dir out src 0.0.0.0/0 dst 10.244.2.0/24`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "dir {} {}", self.direction, self.selector)
    }
}
