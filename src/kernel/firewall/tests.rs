//! The rules as values; in real kernels, see the modules below.

use super::*;

fn v4(text: &str) -> Ipv4Net {
    text.parse().unwrap()
}

pub(crate) fn dual_stack() -> Firewall {
    let own = Subnets {
        v4: Some(v4("10.244.1.0/24")),
        v6: Some("fd00:244:0:1::/64".parse().unwrap()),
    };
    Firewall {
        networks: vec!["10.244.0.0/16".parse().unwrap(), "fd00:244::/48".parse().unwrap()],
        own,
        bases: own.bases(),
        uplink: "wan".into(),
        masquerade: true,
        random_fully: true,
    }
}

#[test]
fn a_node_without_a_lease_has_the_guard_and_nothing_else() {
    let firewall = Firewall {
        own: Subnets::default(),
        bases: Addresses::default(),
        ..dual_stack()
    };
    let ways: Vec<Way> = firewall
        .rules()
        .into_iter()
        .map(|rule| match rule {
            Rule::Refuse(way, _) => way,
            Rule::Translate { .. } => panic!("{rule:?} without a lease"),
        })
        .collect();
    assert_eq!(ways, [Way::Arriving, Way::Arriving, Way::Leaving, Way::Leaving]);
}
