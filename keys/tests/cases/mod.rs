//! Reads `vectors.txt`, which `vectors.py` wrote, into cases of named values, and makes the crate's types of them.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::str::FromStr;

use keys::{Encap, EncapMode, Encoded, Epoch, EpochSecret, PublicKey, Slot, Statement};

pub(crate) struct Case(BTreeMap<&'static str, &'static str>);

pub(crate) fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = Vec::new();
    for line in include_str!("../vectors.txt")
        .lines()
        .filter(|line| !line.starts_with('#'))
    {
        let (name, value) = line.split_once(' ').expect("a name and its values");
        if name == "case" {
            cases.push(Case(BTreeMap::new()));
        }
        let fresh = cases
            .last_mut()
            .expect("the first line opens a case")
            .0
            .insert(name, value)
            .is_none();
        assert!(fresh, "{name} stands twice");
    }
    cases
}

impl Case {
    pub(crate) fn text(&self, name: &str) -> &'static str {
        self.0
            .get(name)
            .unwrap_or_else(|| panic!("{} has no {name}", self.0["case"]))
    }

    pub(crate) fn read<T: FromStr<Err: Debug>>(&self, name: &str) -> T {
        self.text(name).parse().expect(name)
    }

    pub(crate) fn list<T: FromStr<Err: Debug>>(&self, name: &str) -> Vec<T> {
        self.text(name)
            .split(' ')
            .map(|item| item.parse().expect(name))
            .collect()
    }

    pub(crate) fn bytes(&self, name: &str) -> Vec<u8> {
        bytes(self.text(name))
    }

    pub(crate) fn array<const N: usize>(&self, name: &str) -> [u8; N] {
        self.bytes(name).try_into().expect(name)
    }

    pub(crate) fn side(&self, side: &str) -> Side {
        let field = |name: &str| format!("{side}.{name}");
        let secret = secret(&self.bytes(&field("secret")));
        let mode = match self.text(&field("mode")) {
            "esp" => EncapMode::Esp,
            "udp" => EncapMode::Udp,
            "auto" => EncapMode::Auto,
            other => panic!("mode {other}"),
        };
        let statement = Statement {
            network: self.list("network"),
            node: self.read(&field("node")),
            subnets: self.list(&field("subnets")),
            addresses: self.list(&field("addresses")),
            cipher: self.read(&field("cipher")),
            encap: Encap {
                mode,
                port: self.read(&field("port")),
            },
            epoch: Epoch(self.read(&field("epoch"))),
            public: PublicKey(self.array(&field("public"))),
            kids: self.list(&field("kids")),
        };
        let encoded = statement.encode().expect("a valid statement");
        Side {
            secret,
            statement,
            encoded,
            slot: Slot::new(self.read(&field("slot"))).expect("a slot"),
        }
    }
}

pub(crate) struct Side {
    pub(crate) secret: EpochSecret,
    pub(crate) statement: Statement,
    pub(crate) encoded: Encoded,
    pub(crate) slot: Slot,
}

#[expect(
    deprecated,
    reason = "ring seals SecureRandom; its own source of fixed bytes is the only one there is"
)]
pub(crate) fn secret(bytes: &[u8]) -> EpochSecret {
    EpochSecret::generate(&ring::test::rand::FixedSliceRandom { bytes }).expect("fixed bytes do not fail")
}

pub(crate) fn bytes(hex: &str) -> Vec<u8> {
    let (digits, []) = hex.as_bytes().as_chunks::<2>() else {
        panic!("half a byte in {hex}")
    };
    digits
        .iter()
        .map(|&[high, low]| digit(high) << 4 | digit(low))
        .collect()
}

pub(crate) fn digit(digit: u8) -> u8 {
    match digit {
        b'0'..=b'9' => digit - b'0',
        b'a'..=b'f' => digit - b'a' + 10,
        other => panic!("{other} is no digit"),
    }
}
