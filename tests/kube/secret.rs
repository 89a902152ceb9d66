//! The PSKs of a Secret, watched through a real API server.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::api::rbac::v1::{Role, RoleBinding};
use kube::Api;
use kube::api::{DeleteParams, ObjectMeta, Patch, PatchParams};
use ringmail::psk::{Held, PskSet};
use ringmail::store::kube::{Access, Keys, Own, Secrets};
use serde_json::json;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use super::double::{Double, Fault};
use super::server::{Server, shared};

const NET: &str = "10.10.0.0/16";

/// The text of a key.
fn key(number: u8) -> String {
    format!("{number:02}-0123456789abcdef0123456789abcdef")
}

fn kid(number: u8) -> String {
    keys::Psk::new(key(number).as_bytes(), NET)
        .expect("a key")
        .kid()
        .to_string()
}

/// Lets the user ringmail have these `verbs` on the Secret `name` of the namespace default.
async fn permit(server: &Server, name: &str, verbs: &[&str]) {
    let role = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "Role", "metadata": {"name": name},
        "rules": [{"apiGroups": [""], "resources": ["secrets"], "resourceNames": [name], "verbs": verbs}],
    });
    let binding = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding", "metadata": {"name": name},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": name},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "ringmail"}],
    });
    let (client, by) = (server.client("admin").await, PatchParams::apply("test").force());
    let roles: Api<Role> = Api::namespaced(client.clone(), "default");
    roles.patch(name, &by, &Patch::Apply(&role)).await.expect("a role");
    let bindings: Api<RoleBinding> = Api::namespaced(client, "default");
    bindings
        .patch(name, &by, &Patch::Apply(&binding))
        .await
        .expect("a binding");
    // The server learns of a rule from its own watch.
    sleep(Duration::from_millis(500)).await;
}

/// Makes the Secret, or gives it other entries.
async fn put(server: &Server, name: &str, entries: &[(&str, String)]) {
    let data: BTreeMap<_, _> = entries
        .iter()
        .map(|(entry, text)| ((*entry).to_owned(), ByteString(text.clone().into_bytes())))
        .collect();
    let secret = Secret {
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            // As `kubectl apply` has it.
            annotations: Some([("last-applied".to_owned(), format!("{entries:?}"))].into()),
            ..ObjectMeta::default()
        },
        data: Some(data),
        ..Secret::default()
    };
    let secrets: Api<Secret> = Api::namespaced(server.client("admin").await, "default");
    let by = PatchParams::apply("test").force();
    secrets.patch(name, &by, &Patch::Apply(&secret)).await.expect("written");
}

async fn delete(server: &Server, name: &str) {
    let secrets: Api<Secret> = Api::namespaced(server.client("admin").await, "default");
    secrets.delete(name, &DeleteParams::default()).await.expect("deleted");
}

async fn open(server: &Server, name: &str) -> Secrets {
    let secret = format!("default/{name}").parse().expect("a Secret");
    let access = server.access("secrets.test", "none");
    Secrets::open(&access, secret).await.expect("a cluster")
}

/// The names of the keys, newest first, and what is wrong.
fn shown(held: &Held) -> (Vec<String>, String) {
    let kids = |set: &PskSet| set.kids().iter().map(ToString::to_string).collect();
    let kids = held.set.as_ref().map(|set| kids(set));
    let error = held.error.as_ref().map(ToString::to_string);
    let told = format!("{held:?} {error:?}");
    assert!(
        !told.contains("0123456789abcdef") && !told.contains("MDEyMzQ1Njc4"),
        "{told}"
    );
    (kids.unwrap_or_default(), error.unwrap_or_default())
}

/// Waits for these keys with this error (a part of it; none where it is empty); how long that took.
async fn comes_to(held: &mut watch::Receiver<Held>, numbers: &[u8], error: &str) -> Duration {
    let began = Instant::now();
    let kids: Vec<_> = numbers.iter().map(|number| kid(*number)).collect();
    let wanted = |held: &Held| {
        let (held, told) = shown(held);
        held == kids && told.contains(error) && told.is_empty() == error.is_empty()
    };
    let waited = timeout(Duration::from_secs(40), held.wait_for(wanted)).await;
    let waited = waited.is_ok_and(|seen| seen.is_ok());
    assert!(waited, "wanted {kids:?} {error:?}: {:?}", shown(&held.borrow()));
    began.elapsed()
}

const SECOND: Duration = Duration::from_secs(1);

#[tokio::test]
#[ignore = "needs kube-apiserver"]
async fn a_secret_is_followed_within_a_second_whatever_happens_to_it() {
    let server = shared().await;
    permit(&server, "followed", &["list", "watch"]).await;
    put(&server, "followed", &[("key-9", key(9) + "\n")]).await;
    put(&server, "another", &[("key-66", key(66))]).await;
    let mut held = open(&server, "followed").await.watch(NET.into());
    comes_to(&mut held, &[9], "").await;

    put(&server, "followed", &[("key-9", key(9)), ("key-10", key(10))]).await;
    assert!(comes_to(&mut held, &[10, 9], "").await < SECOND);
    put(&server, "followed", &[("key-10", key(10))]).await;
    assert!(comes_to(&mut held, &[10], "").await < SECOND);
    // Wrong edits.
    put(
        &server,
        "followed",
        &[("key-10", key(10)), ("key-11", "hunter2".into())],
    )
    .await;
    assert!(comes_to(&mut held, &[10], "has no key in its entry \"key-11\": PSK is 7 bytes").await < SECOND);
    put(&server, "followed", &[]).await;
    assert!(comes_to(&mut held, &[10], "Secret default/followed holds no key").await < SECOND);
    put(&server, "followed", &[("key-12", key(12))]).await;
    assert!(comes_to(&mut held, &[12], "").await < SECOND);
    // Deleted and made anew.
    delete(&server, "followed").await;
    assert!(comes_to(&mut held, &[12], "does not exist").await < SECOND);
    put(&server, "followed", &[("key-13", key(13))]).await;
    assert!(comes_to(&mut held, &[13], "").await < SECOND);
    // A burst: the last counts.
    for number in 20..40 {
        put(&server, "followed", &[("key", key(number))]).await;
    }
    assert!(comes_to(&mut held, &[39], "").await < SECOND);
}

#[tokio::test]
#[ignore = "needs kube-apiserver"]
async fn an_outage_takes_no_key_away_and_what_was_missed_is_read() {
    let mut server = Server::start().await;
    permit(&server, "away", &["list", "watch"]).await;
    put(&server, "away", &[("key-1", key(1))]).await;
    let mut held = open(&server, "away").await.watch(NET.into());
    comes_to(&mut held, &[1], "").await;
    server.down();
    comes_to(&mut held, &[1], "Secret default/away can't be read now: ").await;
    assert!(
        held.borrow()
            .error
            .as_ref()
            .is_some_and(ringmail::psk::PskError::is_outage)
    );
    // Nobody tells of the change, and the history of it is gone.
    let port = server.elsewhere(None).await;
    put(&server, "away", &[("key-2", key(2))]).await;
    server.compact();
    server.elsewhere(Some(port)).await;
    let took = comes_to(&mut held, &[2], "").await;
    println!("read {took:?} after the server was back");
    put(&server, "away", &[("key-3", key(3))]).await;
    assert!(comes_to(&mut held, &[3], "").await < SECOND);
}

/// A real server goes on where a Secret's watch was unless more was changed meanwhile than it remembers: the double does it at
/// once, in the middle of a watch, and when one that has ended is taken up again.
#[tokio::test]
async fn a_410_on_the_secrets_watch_has_the_secret_read_anew_and_is_no_trouble() {
    let double = Double::start().await;
    let access = Access {
        kubeconfig: None,
        url: Some(double.url()),
        keys: Keys::of("double.test").expect("a prefix"),
        own: Own::Named(crate::name("n1")),
    };
    let put = |number: u8, told| double.put_secret("psk", &STANDARD.encode(key(number)), told);
    put(1, true);
    let secrets = Secrets::open(&access, "default/psk".parse().expect("a Secret")).await;
    let mut held = secrets.expect("a cluster").watch(NET.into());
    comes_to(&mut held, &[1], "").await;
    let mut each = held.clone();
    let troubled = tokio::spawn(async move {
        let trouble = each.wait_for(|held| held.error.is_some()).await;
        trouble.map(|held| shown(&held)).ok()
    });
    for (number, fault) in [(2, Fault::Gone), (4, Fault::Closed)] {
        // Nobody tells of it; the watch goes on from before it.
        put(number, false);
        sleep(Duration::from_millis(300)).await;
        assert_eq!(shown(&held.borrow()).0, [kid(number - 1)]);
        double.fail(fault);
        comes_to(&mut held, &[number], "").await;
        double.fail(Fault::None);
        put(number + 1, true);
        comes_to(&mut held, &[number + 1], "").await;
    }
    if troubled.is_finished() {
        panic!("{:?}", troubled.await);
    }
    troubled.abort();
}

#[tokio::test]
#[ignore = "needs kube-apiserver"]
async fn rights_to_that_one_secret_are_enough_and_both_are_needed() {
    let server = shared().await;
    put(&server, "rights", &[("key-1", key(1))]).await;
    put(&server, "others", &[("key-1", key(1))]).await;
    permit(&server, "rights", &["watch"]).await;
    let mut held = open(&server, "rights").await.watch(NET.into());
    comes_to(&mut held, &[], "cannot list resource \"secrets\"").await;
    permit(&server, "rights", &["list"]).await;
    comes_to(&mut held, &[1], "cannot watch resource \"secrets\"").await;
    // It stays told while it is so, with every reading between.
    for _ in 0..30 {
        sleep(Duration::from_millis(100)).await;
        assert!(held.borrow().error.is_some());
    }
    permit(&server, "rights", &["list", "watch"]).await;
    comes_to(&mut held, &[1], "").await;
    let mut other = open(&server, "others").await.watch(NET.into());
    comes_to(&mut other, &[], "cannot list resource \"secrets\"").await;
}
