//! Which leases become peers, why the others do not, and what a probe is: against everything that a store or a wire can
//! hold.

mod sim;

use std::sync::Arc;
use std::time::Duration;

use keys::{Cipher, Encap, EncapMode, Epoch, EpochSecret, Psk, PublicKey, Statement};
use proptest::prelude::*;
use ring::rand::SystemRandom;
use ringmail::admission::{publish, verify};
use ringmail::epochs::Generation;
use ringmail::kernel::Objects;
use ringmail::lease::{BackendData, Lease, Subnets};
use ringmail::node::Node;
use ringmail::node::report::State;
use ringmail::probe::{self, Probe, Schedule};
use serde_json::json;
use sim::make::{self, Families};

/// What node `number` says in epoch `epoch`.
fn statement(number: u32, epoch: u64) -> Statement {
    let network = make::network(Families::V4);
    let secret = EpochSecret::generate(&SystemRandom::new()).expect("random numbers");
    Statement {
        network: network.nets().collect(),
        node: format!("node{number}"),
        subnets: make::subnets(&network, number).iter().collect(),
        addresses: vec![[192, 0, 2, u8::try_from(number).expect("small")].into()],
        cipher: Cipher::Aes128Gcm16,
        encap: Encap {
            mode: EncapMode::Esp,
            port: 4500,
        },
        epoch: Epoch(epoch),
        public: secret.public(),
        kids: vec![psk(1).kid()],
    }
}

fn psk(number: u8) -> Arc<Psk> {
    make::psk(number, &make::network(Families::V4))
}

/// The lease that says `statement`, tagged with PSK 1.
fn lease(statement: &Statement) -> Lease {
    Lease {
        node: make::name(&statement.node),
        subnets: statement.subnets.iter().copied().collect(),
        public: statement.addresses.iter().copied().collect(),
        backend: "ipsec".into(),
        data: publish(&statement.encode().expect("a good statement"), &[psk(1)]),
        v6_data: BackendData::NULL,
    }
}

/// Node 1 with an epoch of its own; time stands still.
fn node() -> Node {
    let network = make::network(Families::V4);
    let mut node = Node::new(make::settings("node1", network), &Objects::new());
    node.uplinked(make::uplink(Families::V4, 1));
    node.keyed(vec![psk(1)], Duration::ZERO);
    node.holds(make::subnets(&network, 1), make::slot(1));
    let secret = EpochSecret::generate(&SystemRandom::new()).expect("random numbers");
    node.begin_epoch(Epoch(100), secret, Duration::ZERO, 0.0);
    node
}

fn offer(node: &mut Node, lease: &Lease) {
    node.leased(&lease.node.clone(), Some(&Arc::new(lease.clone())), Duration::ZERO);
}

/// How node `number` stands, and why.
fn stands(node: &Node, number: u32) -> (State, Option<String>) {
    let report = node.report(&Default::default(), Duration::ZERO);
    let name = format!("node{number}");
    let peer = report
        .peers
        .into_iter()
        .find(|peer| peer.node == name)
        .expect("it is known");
    (peer.state, peer.reason)
}

/// Offers a bad lease of node 2 beside a good one of node 3: the text must be this, node 3 must be served all the
/// while, and node 2 as soon as its lease is good.
fn refused(bad: &Lease, text: &str) {
    let mut node = node();
    offer(&mut node, &lease(&statement(3, 7)));
    offer(&mut node, bad);
    assert_eq!(stands(&node, 2), (State::Refused, Some(text.to_owned())));
    assert_eq!(stands(&node, 3).0, State::Waiting, "others are unaffected");
    assert_eq!(node.slots().len(), 2, "itself and node 3");
    offer(&mut node, &lease(&statement(2, 8)));
    assert_eq!(stands(&node, 2).0, State::Waiting, "corrected, it is served");
    assert_eq!(node.refusals().count(), 0);
}

#[test]
fn a_good_lease_is_admitted() {
    let said = statement(2, 7);
    let admitted = verify(&lease(&said), &make::network(Families::V4), &[psk(1)]).expect("it is good");
    assert_eq!((admitted.statement, admitted.slot), (said, make::slot(2)));
}

#[test]
fn a_silent_lease_is_named_so() {
    let mut silent = lease(&statement(2, 7));
    silent.backend = String::new();
    silent.data = BackendData::NULL;
    refused(
        &silent,
        "it has taken a subnet and said nothing yet: its daemon is starting, or stopped before it began",
    );
}

#[test]
fn another_backend_is_named_so() {
    let mut other = lease(&statement(2, 7));
    other.backend = "udp".into();
    refused(&other, "backend type is \"udp\"; this mesh is \"ipsec\"");
    // A node that allows plaintext peers says so, and proves itself beside that.
    for plain in ["host-gw", "vxlan"] {
        other.backend = plain.into();
        verify(&other, &make::network(Families::V4), &[psk(1)]).expect("its statement counts");
    }
    other.data = json!({"VNI": 1, "VtepMAC": "02:00:00:00:00:01"}).into();
    refused(&other, "backend type is \"vxlan\"; this mesh is \"ipsec\"");
    other.backend = "x".repeat(1000);
    refused(
        &other,
        &format!("backend type is {:?}; this mesh is \"ipsec\"", "x".repeat(32)),
    );
}

#[test]
fn garbage_is_named_so() {
    let good = lease(&statement(2, 7));
    let with = |data| Lease { data, ..good.clone() };
    let said = good.data.value();
    let (statement, tags) = (&said["Statement"], &said["Tags"]);
    let table = [
        (json!(7), "invalid type: integer `7`, expected struct Published"),
        (
            json!({"Statement": 7, "Tags": []}),
            "invalid type: integer `7`, expected a string",
        ),
        (json!({"Tags": tags}), "missing field `Statement`"),
        (json!({"Statement": "%", "Tags": tags}), "Invalid symbol 37, offset 0."),
        (
            json!({"Statement": "AAAA", "Tags": tags}),
            "statement has version 0; this ringmail reads version 1",
        ),
        (
            json!({"Statement": statement, "Tags": []}),
            "a tag for each kid is needed",
        ),
        (
            json!({"Statement": statement, "Tags": ["AAAA"]}),
            "a tag is 32 bytes in base64",
        ),
        (
            json!({"Statement": statement, "Tags": ["%"]}),
            "a tag is 32 bytes in base64",
        ),
    ];
    for (data, why) in table {
        refused(&with(data.into()), &format!("BackendData is no statement: {why}"));
    }
}

#[test]
fn another_psk_is_named_by_kid_on_both_sides() {
    let mut said = statement(2, 7);
    said.kids = vec![psk(2).kid()];
    let mut other = lease(&said);
    other.data = publish(&said.encode().expect("good"), &[psk(2)]);
    let (theirs, ours) = (psk(2).kid(), psk(1).kid());
    refused(
        &other,
        &format!("no common PSK: it has {theirs}, this node has {ours}; give both nodes the same key"),
    );
}

#[test]
fn a_wrong_tag_is_named_with_its_psk() {
    let said = statement(2, 7);
    let mut forged = lease(&said);
    // It names the PSK that we hold, and was tagged with another.
    forged.data = publish(&said.encode().expect("good"), &[psk(2)]);
    let text = format!(
        "the tag of PSK {} does not verify: the lease was changed by someone without the key",
        psk(1).kid()
    );
    refused(&forged, &text);
    // Any one bit of the statement, whatever it does to its meaning.
    let good = lease(&said);
    let bytes = said.encode().expect("good").as_bytes().to_vec();
    for bit in 0..bytes.len() * 8 {
        let mut bytes = bytes.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        let mut forged = good.clone();
        let mut said = forged.data.value();
        said["Statement"] = json!(base64(&bytes));
        forged.data = said.into();
        assert!(
            verify(&forged, &make::network(Families::V4), &[psk(1)]).is_err(),
            "bit {bit}"
        );
    }
}

fn base64(bytes: &[u8]) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

#[test]
fn each_field_of_a_lease_that_contradicts_its_statement_is_named() {
    let good = lease(&statement(2, 7));
    let mut subnets = good.clone();
    subnets.subnets = make::subnets(&make::network(Families::V4), 9);
    refused(
        &subnets,
        "the lease says subnets 10.244.9.0/24, its statement says 10.244.2.0/24: the lease was changed",
    );
    let mut public = good.clone();
    public.public.v4 = Some([192, 0, 2, 66].into());
    refused(
        &public,
        "the lease says public addresses 192.0.2.66, its statement says 192.0.2.2: the lease was changed",
    );
    let mut none = good;
    none.subnets = Subnets::default();
    refused(
        &none,
        "the lease says subnets , its statement says 10.244.2.0/24: the lease was changed",
    );
    let mut node = node();
    let mut stolen = lease(&statement(5, 7));
    stolen.node = make::name("node2");
    offer(&mut node, &stolen);
    let text = "the lease says node node2, its statement says node5: the lease was changed";
    assert_eq!(stands(&node, 2), (State::Refused, Some(text.into())));
}

#[test]
fn another_network_and_another_subnet_length_are_named() {
    let mut said = statement(2, 7);
    said.network = vec!["10.0.0.0/8".parse().expect("a net")];
    refused(
        &lease(&said),
        "it is of Network 10.0.0.0/8, this node of 10.244.0.0/16: make net-conf.json the same",
    );
    let mut said = statement(2, 7);
    said.subnets = vec!["10.244.2.0/25".parse().expect("a net")];
    refused(
        &lease(&said),
        "subnet 10.244.2.0/25 is not a /24, the Network's SubnetLen",
    );
    said.subnets = vec!["10.245.2.0/24".parse().expect("a net")];
    refused(&lease(&said), "subnet 10.245.2.0/24 is not in the Network");
    said.subnets = vec!["fd00:10:244:2::/64".parse().expect("a net")];
    refused(
        &lease(&said),
        "subnets fd00:10:244:2::/64: one subnet for each family of the Network is needed",
    );
}

#[test]
fn a_lease_that_is_rolled_back_or_rewritten_leaves_the_last_good_one_in_use() {
    let (old, new) = (lease(&statement(2, 7)), lease(&statement(2, 9)));
    let serves = "the newest lease is refused, its last good one serves: ";
    let table = [
        (
            old,
            "epoch 7 is older than 9, which it had before: a lease was rolled back; publish a new one with `ringmail rotate` there",
        ),
        (
            lease(&statement(2, 9)),
            "epoch 9 was seen with another statement: two daemons use this node's name; give each its own --node-name",
        ),
    ];
    for (bad, text) in table {
        let mut node = node();
        offer(&mut node, &new);
        let before = stands(&node, 2);
        assert_eq!(before.0, State::Waiting);
        offer(&mut node, &bad);
        assert_eq!(stands(&node, 2), (State::Waiting, Some(format!("{serves}{text}"))));
        offer(&mut node, &lease(&statement(2, 10)));
        assert_eq!(stands(&node, 2), before, "a newer one heals it");
    }
}

#[test]
fn garbage_in_the_place_of_a_good_lease_leaves_the_good_one_in_use() {
    let mut node = node();
    let good = lease(&statement(2, 7));
    offer(&mut node, &good);
    offer(
        &mut node,
        &Lease {
            data: json!("x").into(),
            ..good
        },
    );
    let text = "the newest lease is refused, its last good one serves: BackendData is no statement: \
                invalid type: string \"x\", expected struct Published";
    assert_eq!(stands(&node, 2), (State::Waiting, Some(text.into())));
}

#[test]
fn of_two_nodes_that_claim_the_same_neither_is_served_until_one_gives_way() {
    let key = PublicKey(statement(9, 1).public.0);
    type Take = fn(&mut Statement, PublicKey);
    let table: [(Take, &str); 3] = [
        (|said, _| said.subnets = statement(2, 1).subnets, "subnet 10.244.2.0/24"),
        (
            |said, _| said.addresses = statement(2, 1).addresses,
            "public address 192.0.2.2",
        ),
        (|said, key| said.public = key, "its public key"),
    ];
    for (take, claim) in table {
        let mut node = node();
        offer(&mut node, &lease(&statement(4, 7)));
        let mut owner = statement(2, 7);
        let mut thief = statement(3, 7);
        take(&mut thief, key);
        if claim == "its public key" {
            owner.public = key;
        }
        offer(&mut node, &lease(&owner));
        assert_eq!(stands(&node, 2).0, State::Waiting);
        offer(&mut node, &lease(&thief));
        for (number, other) in [(2, 3), (3, 2)] {
            let text = format!("{claim} is also claimed by node{other}: remove one of the leases");
            assert_eq!(stands(&node, number), (State::Refused, Some(text)));
        }
        assert_eq!(stands(&node, 4).0, State::Waiting, "others are unaffected");
        node.leased(&make::name("node3"), None, Duration::ZERO);
        assert_eq!(stands(&node, 2).0, State::Waiting, "it is served again");
    }
}

#[test]
fn nodes_that_can_take_udp_may_share_a_public_address_and_one_of_plain_esp_may_not() {
    use EncapMode::{Auto, Esp, Udp};
    for (one, other, together) in [
        (Udp, Udp, true),
        (Auto, Auto, true),
        (Auto, Udp, true),
        (Auto, Esp, false),
        (Esp, Udp, false),
        (Esp, Esp, false),
    ] {
        let mut node = node();
        for (number, mode) in [(2, one), (3, other)] {
            let mut said = statement(number, u64::from(number));
            said.encap.mode = mode;
            said.addresses = statement(2, 1).addresses;
            offer(&mut node, &lease(&said));
        }
        let wanted = if together { State::Waiting } else { State::Refused };
        assert_eq!(
            [stands(&node, 2).0, stands(&node, 3).0],
            [wanted, wanted],
            "{one:?} and {other:?}"
        );
        // The one that stood in the way can do without an address of its own from its next epoch on.
        if !together && other != Esp {
            let mut said = statement(2, 60);
            said.encap.mode = Auto;
            offer(&mut node, &lease(&said));
            assert_eq!([stands(&node, 2).0, stands(&node, 3).0], [State::Waiting; 2]);
        }
    }
}

#[test]
fn who_claims_what_this_node_has_is_refused_and_this_node_told() {
    let mut node = node();
    let mut thief = statement(2, 7);
    thief.subnets = statement(1, 1).subnets;
    offer(&mut node, &lease(&thief));
    let text = "subnet 10.244.1.0/24 is also claimed by node1: remove one of the leases";
    assert_eq!(stands(&node, 2), (State::Refused, Some(text.into())));
    let problems = node.report(&Default::default(), Duration::ZERO).problems;
    assert_eq!(
        problems,
        ["subnet 10.244.1.0/24 of this node is also claimed by node2: remove that lease"]
    );
}

fn any_json() -> impl Strategy<Value = serde_json::Value> {
    let leaf = prop_oneof![
        Just(serde_json::Value::Null),
        any::<bool>().prop_map(serde_json::Value::from),
        any::<i64>().prop_map(serde_json::Value::from),
        ".{0,40}".prop_map(serde_json::Value::from),
        prop::collection::vec(any::<u8>(), 0..200).prop_map(|bytes| base64(&bytes).into()),
    ];
    leaf.prop_recursive(3, 24, 4, |inner| {
        let name = prop_oneof![Just("Statement".to_owned()), Just("Tags".to_owned()), ".{0,8}"];
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(serde_json::Value::from),
            prop::collection::hash_map(name, inner, 0..4)
                .prop_map(|map| serde_json::Value::Object(map.into_iter().collect())),
        ]
    })
}

fn generation() -> impl Strategy<Value = Generation> {
    (1..u64::MAX, 1..u64::MAX).prop_map(|(sender, receiver)| Generation {
        sender: Epoch(sender),
        receiver: Epoch(receiver),
    })
}

/// The probe keys of a pair: each end's.
fn probe_keys() -> (keys::ProbeKey, keys::ProbeKey) {
    let make_one = |number| {
        let secret = EpochSecret::generate(&SystemRandom::new()).expect("random numbers");
        let said = Statement {
            public: secret.public(),
            ..statement(number, 5)
        };
        let encoded = said.encode().expect("good");
        (secret, said.public, encoded)
    };
    let (a, b) = (make_one(1), make_one(2));
    let derive = |own: &(EpochSecret, PublicKey, keys::Encoded), peer: &(EpochSecret, PublicKey, keys::Encoded)| {
        keys::Pair::derive(&psk(1), &own.0, &own.2, &peer.1, &peer.2)
            .expect("good keys")
            .probe
    };
    (derive(&a, &b), derive(&b, &a))
}

proptest! {
    #[test]
    fn arbitrary_json_in_a_lease_is_refused_and_never_panics(data in any_json(), backend in prop_oneof![Just("ipsec".to_owned()), ".{0,8}"]) {
        let said = Lease { data: data.into(), backend, ..lease(&statement(2, 7)) };
        prop_assert!(verify(&said, &make::network(Families::V4), &[psk(1)]).is_err());
    }

    #[test]
    fn arbitrary_bytes_are_no_genuine_probe_and_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
        let (key, _) = probe_keys();
        let _ = Probe::parse(&bytes);
        prop_assert!(!Probe::genuine(&bytes, &key));
        let mut node = node();
        offer(&mut node, &lease(&statement(2, 7)));
        prop_assert!(node.probed([10, 244, 2, 0].into(), &bytes, Duration::ZERO).is_empty());
    }

    #[test]
    fn a_probe_comes_out_as_it_went_in(ask: bool, sent in generation(), data in prop::option::of(generation()), ticket: u64, padding in 1_usize..1500) {
        let (ours, theirs) = probe_keys();
        let probe = Probe { ask, sent, data, ticket };
        let bytes = probe.seal(&ours);
        prop_assert_eq!(Probe::parse(&bytes), Some(probe));
        prop_assert!(Probe::genuine(&bytes, &theirs));
        // Zeros may follow a question, and nothing else may.
        let mut padded = bytes.to_vec();
        padded.resize(probe::LEN + padding, 0);
        prop_assert_eq!(Probe::parse(&padded), Some(probe).filter(|_| ask));
        prop_assert!(Probe::genuine(&padded, &theirs));
        padded[probe::LEN + padding / 2] = 1;
        prop_assert_eq!(Probe::parse(&padded), None);
    }

    #[test]
    fn a_schedule_never_waits_longer_than_it_may_nor_less(
        jitters in prop::collection::vec((-1.0_f64..2.0, any::<bool>()), 1..60),
    ) {
        let mut schedule = Schedule::at_once(Duration::ZERO);
        let mut now = Duration::ZERO;
        for (jitter, settled) in jitters {
            now = schedule.due();
            schedule.sent(now, settled.then_some(probe::SETTLED), jitter);
            let wait = schedule.due() - now;
            let (least, most) = if settled { (11_250, 15_000) } else { (37, 60_000) };
            prop_assert!(wait >= Duration::from_millis(least) && wait <= Duration::from_millis(most), "{wait:?}");
        }
        prop_assert!(now <= schedule.due());
    }
}

#[test]
fn a_forged_probe_is_refused_whichever_bit_was_changed() {
    let (ours, theirs) = probe_keys();
    let at = |sender, receiver| Generation {
        sender: Epoch(sender),
        receiver: Epoch(receiver),
    };
    let bytes = Probe {
        ask: true,
        sent: at(5, 6),
        data: None,
        ticket: 9,
    }
    .seal(&ours);
    assert!(Probe::genuine(&bytes, &theirs));
    for bit in 0..probe::LEN * 8 {
        let mut forged = bytes;
        forged[bit / 8] ^= 1 << (bit % 8);
        assert!(!Probe::genuine(&forged, &theirs), "bit {bit}");
    }
    // Another pair's key, and one's own probe thrown back.
    assert!(!Probe::genuine(&bytes, &probe_keys().1));
    for length in 0..probe::LEN {
        assert_eq!(Probe::parse(&bytes[..length]), None);
    }
}

#[test]
fn an_unanswered_peer_is_probed_ever_more_slowly_and_a_settled_one_slowly() {
    let mut schedule = Schedule::at_once(Duration::ZERO);
    let mut waits = Vec::new();
    for _ in 0..24 {
        let now = schedule.due();
        schedule.sent(now, None, 0.0);
        let wait = schedule.due() - now;
        // Of a path that comes back it is known within a quarter of the time that it was gone.
        assert!(wait <= Duration::from_secs(10).max(now / 4), "{wait:?} at {now:?}");
        waits.push(wait.as_millis());
    }
    assert_eq!(
        waits[..11],
        [50, 100, 200, 400, 800, 1_600, 3_200, 6_400, 10_000, 10_000, 10_000]
    );
    assert_eq!(waits[20..], [60_000; 4]);
    // A sign of life brings the first waits back, once.
    let now = schedule.due() - Duration::from_secs(30);
    schedule.hope(now);
    assert_eq!(schedule.due(), now);
    schedule.sent(now, None, 0.0);
    let due = schedule.due();
    schedule.hope(now);
    assert_eq!(schedule.due(), due, "what is asked quickly is left as it is");
    let now = schedule.due();
    schedule.sent(now, Some(probe::SETTLED), 0.0);
    assert_eq!(schedule.due() - now, Duration::from_secs(15));
}

#[test]
fn a_probe_that_is_forged_in_a_peers_name_is_not_heard() {
    let mut node = node();
    offer(&mut node, &lease(&statement(2, 7)));
    let sent = Generation {
        sender: Epoch(7),
        receiver: Epoch(100),
    };
    let forged = Probe {
        ask: true,
        sent,
        data: Some(sent),
        ticket: 1,
    };
    let bytes = forged.seal(&probe_keys().0);
    assert!(node.probed([10, 244, 2, 0].into(), &bytes, Duration::ZERO).is_empty());
    let report = node.report(&Default::default(), Duration::ZERO);
    assert_eq!((report.peers[0].heard, report.peers[0].spi_in.as_ref()), (None, None));
}
