//! The text against the golden file, and what no text may be.

use std::collections::BTreeSet;

use super::sample::{host, measures};
use super::*;

/// Names and help are what dashboards and alerts are made of: a change of them is a change for every operator.
#[test]
fn metrics_are_what_the_golden_file_says() {
    let text = text(Some(measures()), host(), PerPeer::Shown);
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/metrics.txt");
    if std::env::var_os("RINGMAIL_REWRITE_GOLDEN").is_some() {
        std::fs::write(&path, &text).expect("written");
    }
    let wanted = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        text.replace(env!("CARGO_PKG_VERSION"), "VERSION") == wanted.replace(env!("CARGO_PKG_VERSION"), "VERSION"),
        "{text}"
    );
}

/// The names and labels of all series.
fn series(text: &str) -> BTreeSet<&str> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .map(|line| line.rsplit_once(' ').expect("a name and a value").0)
        .collect()
}

#[test]
fn what_is_of_single_peers_can_be_left_out_and_nothing_else() {
    let shown = text(Some(measures()), host(), PerPeer::Shown);
    let hidden = text(Some(measures()), host(), PerPeer::Hidden);
    let (shown, hidden) = (series(&shown), series(&hidden));
    assert!(hidden.is_subset(&shown) && hidden.iter().all(|name| !name.contains("peer=\"")));
    let left: Vec<_> = shown.difference(&hidden).collect();
    assert!(left.iter().all(|name| name.contains("{peer=\"")), "{left:?}");
    let of = |peer: &str| left.iter().filter(|name| name.contains(peer)).count();
    assert_eq!(
        (of("peer=\"node-b\""), left.len()),
        (11, 12),
        "eleven a peer: {left:#?}"
    );
}

/// A lease's author chooses its node's name.
#[test]
fn a_peers_name_can_not_add_a_series() {
    let text = text(Some(measures()), host(), PerPeer::Shown);
    assert!(
        text.contains("ringmail_peer_state{peer=\"\\\"} 1\\\\\",state=\"refused\"} 1.0\n"),
        "{text}"
    );
}

/// Measures with so many peers, each with all that there can be of one.
fn crowd(peers: usize) -> Measures {
    let mut measures = measures();
    let (one, carried) = (measures.report.peers[0].clone(), measures.carried);
    let generation = *measures.generations.values().next().expect("one");
    measures.report.peers.clear();
    for number in 0..peers {
        let name = format!(
            "ip-10-0-{}-{}.eu-central-1.compute.internal",
            number / 256,
            number % 256
        );
        let node = NodeName::new(&name).expect("a name");
        measures.traffic.insert(node.clone(), carried);
        measures.generations.insert(node, generation);
        measures.report.peers.push(crate::node::report::PeerReport {
            node: name,
            ..one.clone()
        });
    }
    measures
}

/// With names as long as a cloud's; the time is printed for README's figures.
#[test]
fn a_peer_adds_few_bytes_and_none_where_single_peers_are_left_out() {
    let size = |peers, per_peer| {
        let (measures, began) = (crowd(peers), std::time::Instant::now());
        let size = text(Some(measures), host(), per_peer).len();
        println!("{peers} peers, {per_peer:?}: {size} bytes in {:?}", began.elapsed());
        size
    };
    let (few, many) = (size(1000, PerPeer::Shown), size(5000, PerPeer::Shown));
    assert!((many - few) / 4000 < 1200, "{} bytes a peer", (many - few) / 4000);
    let (few, many) = (size(1000, PerPeer::Hidden), size(5000, PerPeer::Hidden));
    assert!(few < 20_000 && many - few < 200, "{few} and {many} bytes");
}
