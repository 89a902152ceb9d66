//! Statements: any bytes are one or an error, and one that is read is written the same; and what admission makes of a lease
//! whose tag is right, whatever its statement says. The input is a statement, or changes to a good one: pairs of place
//! and value behind a zero.

use std::sync::{Arc, LazyLock};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use keys::{Cipher, Encap, EncapMode, Epoch, Kid, Psk, PublicKey, Slot, Statement};
use ringmail::admission::{self, Refusal};
use ringmail::lease::{Addresses, Lease, Network, NodeName, Range};

static NETWORK: LazyLock<Network> = LazyLock::new(|| Network {
    v4: Some(Range {
        net: "10.244.0.0/16".parse().expect("a net"),
        subnet_len: 24,
        first: 1,
        last: 255,
    }),
    v6: None,
});
static PSK: LazyLock<Arc<Psk>> =
    LazyLock::new(|| Arc::new(Psk::new(&[7; 32], &NETWORK.to_string()).expect("long enough")));

/// Node 2 as it would say it of itself.
fn good() -> Vec<u8> {
    let statement = Statement {
        network: NETWORK.nets().collect(),
        node: "node2".into(),
        subnets: NETWORK
            .subnets(Slot::new(2).expect("a slot"))
            .expect("subnets")
            .iter()
            .collect(),
        addresses: vec![[192, 0, 2, 2].into()],
        cipher: Cipher::Aes128Gcm16,
        encap: Encap {
            mode: EncapMode::Esp,
            port: 4500,
        },
        epoch: Epoch(1 << 31),
        public: PublicKey([9; 32]),
        kids: vec![PSK.kid(), Kid([3; 8])],
    };
    statement.encode().expect("a good statement").as_bytes().to_vec()
}

pub(crate) fn run(data: &[u8]) {
    let bytes = match data {
        [0, changes @ ..] => {
            let mut bytes = good();
            for change in changes.chunks_exact(2) {
                let at = usize::from(change[0]);
                match bytes.get_mut(at) {
                    Some(byte) => *byte = change[1],
                    None => bytes.push(change[1]),
                }
            }
            bytes
        }
        _ => data.to_vec(),
    };
    let statement = Statement::decode(&bytes);
    if let Ok(statement) = &statement {
        assert_eq!(
            statement.encode().expect("what is read can be written").as_bytes(),
            bytes
        );
    }
    let tag = PSK.tag(&bytes);
    let text = serde_json::json!({
        "Statement": BASE64.encode(&bytes),
        "Tags": [BASE64.encode(tag.as_bytes()), BASE64.encode([0; 32])],
    });
    drop(admission::stated_name(&text.clone().into()));
    let lease = Lease {
        node: NodeName::new("node2").expect("a name"),
        subnets: NETWORK.subnets(Slot::new(2).expect("a slot")).expect("subnets"),
        public: Addresses {
            v4: Some([192, 0, 2, 2].into()),
            v6: None,
        },
        backend: "ipsec".into(),
        data: text.into(),
        v6_data: serde_json::Value::Null.into(),
    };
    match admission::verify(&lease, &NETWORK, std::slice::from_ref(&PSK)) {
        Ok(admitted) => {
            // Only what the lease says too.
            assert_eq!(admitted.statement, statement.expect("it was read"));
            assert_eq!(admitted.statement.node, "node2");
            assert_eq!(admitted.statement.subnets, lease.subnets.iter().collect::<Vec<_>>());
        }
        Err(refusal) => drop(<Refusal as ToString>::to_string(&refusal)),
    }
}
