//! Faults of a server and of the way to it that a real server can't be made to have. These need no server.

use std::time::Duration;

use ringmail::store::Store;
use ringmail::store::kube::{Access, Keys, Own};
use tokio::time::sleep;

use super::double::{Double, Fault};
use crate::{held, name, open, shows};

async fn opened(double: &Double) -> Store {
    open(Access {
        kubeconfig: None,
        url: Some(double.url()),
        keys: Keys::of("double.test").expect("a prefix"),
        own: Own::Named(name("n1")),
    })
    .await
}

fn public(store: &Store, node: &str) -> Option<String> {
    held(store, node).map(|lease| lease.public.to_string())
}

async fn comes_to(store: &Store, node: &'static str, wanted: Option<&str>) {
    shows(store, node, |roster| {
        let public = roster.get(&name(node)).map(|lease| lease.public.to_string());
        public.as_deref() == wanted
    })
    .await;
}

#[tokio::test]
async fn a_410_in_the_stream_asks_for_a_new_list_and_a_deletion_that_nobody_told_of_is_seen() {
    let double = Double::start().await;
    double.put("n1", "10.0.1.0/24", "192.0.2.1");
    double.put("n2", "10.0.2.0/24", "192.0.2.2");
    let store = opened(&double).await;
    assert_eq!(store.roster().borrow().leases().count(), 2);
    double.delete("n2", false);
    double.put("n3", "10.0.3.0/24", "192.0.2.3");
    comes_to(&store, "n3", Some("192.0.2.3")).await;
    assert!(held(&store, "n2").is_some(), "nobody told");
    double.fail(Fault::Gone);
    comes_to(&store, "n2", None).await;
    assert_eq!(store.roster().borrow().leases().count(), 2);
    assert!(double.answered().0 >= 2);
    assert_eq!(store.health().reading, None, "that is no outage");
    double.fail(Fault::None);
    double.put("n1", "10.0.1.0/24", "192.0.2.9");
    comes_to(&store, "n1", Some("192.0.2.9")).await;
}

#[tokio::test]
async fn a_stream_that_is_cut_in_an_event_is_taken_up_again_where_it_was() {
    let double = Double::start().await;
    double.put("n1", "10.0.1.0/24", "192.0.2.1");
    let store = opened(&double).await;
    for last in 2..=5_u8 {
        double.fail(Fault::Cut);
        double.put("n2", "10.0.2.0/24", &format!("192.0.2.{last}"));
        comes_to(&store, "n2", Some(&format!("192.0.2.{last}"))).await;
    }
    let (lists, watches) = double.answered();
    assert_eq!(lists, 1, "what the watch can tell needs no list");
    let (began, newest) = double.began();
    assert_eq!(began, newest - 1, "only what was cut off is told again");
    assert!(watches >= 5, "each began anew: {watches}");
}

#[tokio::test]
async fn a_server_with_too_much_to_do_is_asked_less_and_less_often() {
    let double = Double::start().await;
    double.put("n1", "10.0.1.0/24", "192.0.2.1");
    let store = opened(&double).await;
    double.fail(Fault::Cut);
    double.put("n1", "10.0.1.0/24", "192.0.2.2");
    comes_to(&store, "n1", Some("192.0.2.2")).await;
    double.fail(Fault::Cut);
    double.put("n1", "10.0.1.0/24", "192.0.2.3");
    sleep(Duration::from_millis(50)).await;
    double.fail(Fault::Busy);
    for _ in 0..100 {
        if store.health().reading.is_some() {
            break;
        }
        sleep(Duration::from_millis(100)).await;
    }
    let trouble = store.health().reading.expect("it is told");
    assert!(trouble.error.contains("too many requests (429)"), "{}", trouble.error);
    assert_eq!(store.roster().borrow().leases().count(), 1);
    double.fail(Fault::None);
    comes_to(&store, "n1", Some("192.0.2.3")).await;
    assert_eq!(double.answered().0, 1, "no list");
    assert_eq!(store.health().reading, None);
}

#[tokio::test]
async fn an_event_that_comes_in_drops_is_one() {
    let double = Double::start().await;
    double.put("n1", "10.0.1.0/24", "192.0.2.1");
    let store = opened(&double).await;
    double.fail(Fault::Slow);
    for last in 2..=4_u8 {
        double.put("n2", "10.0.2.0/24", &format!("192.0.2.{last}"));
    }
    comes_to(&store, "n2", Some("192.0.2.4")).await;
    double.delete("n2", true);
    comes_to(&store, "n2", None).await;
    assert_eq!(public(&store, "n1").as_deref(), Some("192.0.2.1"));
}
