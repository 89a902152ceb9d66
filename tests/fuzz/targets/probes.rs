//! Probes: any datagram is one or none, and only what the peer sealed is genuine. The input is a datagram, or changes to one
//! that the peer sealed: behind a zero whether it asks, how many zeros follow it (two bytes), then pairs of place and value,
//! the place counted from either end.

use std::sync::LazyLock;

use keys::{Cipher, Encap, EncapMode, Encoded, Epoch, EpochSecret, Pair, ProbeKey, Psk, Statement};
use ring::rand::SystemRandom;
use ringmail::epochs::Generation;
use ringmail::probe::{LEN, Probe};

/// Our key, and the peer's.
static KEYS: LazyLock<[ProbeKey; 2]> = LazyLock::new(|| {
    let psk = Psk::new(&[7; 32], "10.244.0.0/16").expect("long enough");
    let secrets = [0, 1].map(|_| EpochSecret::generate(&SystemRandom::new()).expect("random numbers"));
    let [ours, theirs] = [0, 1].map(|number| statement(number, &secrets[number as usize], &psk));
    let [own, peer] = &secrets;
    let forth = Pair::derive(&psk, own, &ours, &theirs.public(), &theirs).expect("keys");
    let back = Pair::derive(&psk, peer, &theirs, &ours.public(), &ours).expect("keys");
    [forth.probe, back.probe]
});

fn statement(number: u8, secret: &EpochSecret, psk: &Psk) -> Encoded {
    let statement = Statement {
        network: vec!["10.244.0.0/16".parse().expect("a net")],
        node: format!("node{number}"),
        subnets: vec![format!("10.244.{number}.0/24").parse().expect("a net")],
        addresses: vec![[192, 0, 2, number].into()],
        cipher: Cipher::Aes128Gcm16,
        encap: Encap {
            mode: EncapMode::Esp,
            port: 4500,
        },
        epoch: Epoch(1 << 31),
        public: secret.public(),
        kids: vec![psk.kid()],
    };
    statement.encode().expect("a good statement")
}

pub(crate) fn run(data: &[u8]) {
    let [ours, theirs] = &*KEYS;
    let datagram = match data {
        [0, ask, high, low, changes @ ..] => {
            let generation = Generation {
                sender: Epoch(1 << 31),
                receiver: Epoch(3),
            };
            let probe = Probe {
                ask: ask & 1 == 1,
                sent: generation,
                data: (ask & 2 == 2).then_some(generation),
                ticket: 5,
            };
            let mut datagram = probe.seal(theirs).to_vec();
            datagram.resize(LEN + usize::from(u16::from_be_bytes([*high, *low])), 0);
            assert!(Probe::genuine(&datagram, ours) && !Probe::genuine(&datagram, theirs));
            let as_sent = datagram.len() == LEN || probe.ask;
            assert_eq!(Probe::parse(&datagram), as_sent.then_some(probe));
            for change in changes.chunks_exact(2) {
                let place = usize::from(change[0]);
                let from_end = |place: usize| datagram.len().checked_sub(place - 127);
                let at = if place < 128 { Some(place) } else { from_end(place) };
                if let Some(byte) = at.and_then(|at| datagram.get_mut(at)) {
                    *byte = change[1];
                }
            }
            datagram
        }
        _ => data.to_vec(),
    };
    let genuine = Probe::genuine(&datagram, ours);
    let Some(probe) = Probe::parse(&datagram) else {
        return;
    };
    let (bytes, padding) = datagram.split_at(LEN);
    assert!(padding.is_empty() || probe.ask, "an answer is never longer");
    assert!(padding.iter().all(|byte| *byte == 0), "nothing is said in the padding");
    // There is one way to say it, and only the peer has the key.
    assert_eq!(genuine, probe.seal(theirs) == bytes);
    assert_eq!(probe.seal(theirs)[..46], bytes[..46]);
    assert_eq!(Probe::parse(bytes), Some(probe));
    assert!(
        !Probe::genuine(&probe.seal(ours), ours),
        "one that comes back is not the peer's"
    );
}
