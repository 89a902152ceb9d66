//! A small double of the API server for what a real one can't be made to do. It speaks HTTP/1.1 without TLS, knows Nodes
//! and Secrets, lists and watches, and fails as it is told.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::sleep;

/// What the double does wrong.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) enum Fault {
    /// Nothing.
    #[default]
    None,
    /// Open watches end with a 410 in the stream, and none begins before the newest version.
    Gone,
    /// Open watches end as they do after a while, and none begins before the newest version.
    Closed,
    /// Whoever asks is told to come back later.
    Busy,
    /// The next event is cut off in its middle, and its connection with it.
    Cut,
    /// Events come a few bytes at a time.
    Slow,
}

#[derive(Default)]
struct State {
    version: u64,
    /// By where they are, `nodes` or `secrets`, and by name.
    objects: BTreeMap<(&'static str, String), Value>,
    /// What happened: version, where, kind, object.
    events: Vec<(u64, &'static str, &'static str, Value)>,
    fault: Fault,
    lists: usize,
    watches: usize,
    /// Which version the last watch began at.
    began: u64,
}

/// The double; it ends with this.
pub(crate) struct Double {
    port: u16,
    state: Arc<Mutex<State>>,
    changed: watch::Sender<()>,
    accepting: JoinHandle<()>,
}

impl Double {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let state = Arc::new(Mutex::new(State {
            version: 100,
            ..State::default()
        }));
        let changed = watch::Sender::new(());
        let (served, told) = (state.clone(), changed.clone());
        let accepting = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (state, changes) = (served.clone(), told.subscribe());
                // A client that has gone is no failure of a test.
                tokio::spawn(async move { serve(stream, &state, changes).await.ok() });
            }
        });
        Self {
            port,
            state,
            changed,
            accepting,
        }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder panics")
    }

    /// How many lists and watches were answered.
    pub(crate) fn answered(&self) -> (usize, usize) {
        let state = self.state();
        (state.lists, state.watches)
    }

    /// Which version the last watch began at, and the newest there is.
    pub(crate) fn began(&self) -> (u64, u64) {
        let state = self.state();
        (state.began, state.version)
    }

    pub(crate) fn fail(&self, fault: Fault) {
        self.state().fault = fault;
        self.changed.send_replace(());
    }

    /// Puts a Node with a lease of host-gw.
    pub(crate) fn put(&self, name: &str, pods: &str, public: &str) {
        let node = json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": {"name": name, "uid": name, "annotations": {
                "double.test/kube-subnet-manager": "true", "double.test/backend-type": "host-gw",
                "double.test/backend-data": "null", "double.test/public-ip": public,
            }},
            "spec": {"podCIDR": pods, "podCIDRs": [pods]},
        });
        self.change(NODES, name, Some(node), true);
    }

    /// Puts a Secret of one entry, given in base64; `told`: watches hear of it.
    pub(crate) fn put_secret(&self, name: &str, entry: &str, told: bool) {
        let secret = json!({
            "apiVersion": "v1", "kind": "Secret", "data": {"key-1": entry},
            "metadata": {"name": name, "namespace": "default", "uid": name},
        });
        self.change(SECRETS, name, Some(secret), told);
    }

    /// Deletes a Node; `told`: watches hear of it.
    pub(crate) fn delete(&self, name: &str, told: bool) {
        self.change(NODES, name, None, told);
    }

    fn change(&self, place: &'static str, name: &str, now: Option<Value>, told: bool) {
        let mut state = self.state();
        state.version += 1;
        let (version, key) = (state.version, (place, name.to_owned()));
        let there = state.objects.remove(&key);
        let kind = match (&there, &now) {
            (_, None) => "DELETED",
            (None, _) => "ADDED",
            _ => "MODIFIED",
        };
        let mut object = now.clone().or(there).expect("it is there");
        object["metadata"]["resourceVersion"] = version.to_string().into();
        if now.is_some() {
            state.objects.insert(key, object.clone());
        }
        if told {
            state.events.push((version, place, kind, object));
        }
        drop(state);
        self.changed.send_replace(());
    }
}

const NODES: &str = "nodes";
const SECRETS: &str = "secrets";

impl Drop for Double {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// Answers one connection, request by request.
async fn serve(mut stream: TcpStream, state: &Mutex<State>, mut changes: watch::Receiver<()>) -> std::io::Result<()> {
    loop {
        let Some(path) = request(&mut stream).await? else {
            return Ok(());
        };
        let asked = |name: &str| {
            let query = path.split_once('?').map_or("", |(_, query)| query);
            let pair = query
                .split('&')
                .find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='));
            pair.unwrap_or_default().to_owned()
        };
        let (code, body, from) = {
            let mut state = state.lock().expect("no holder panics");
            let from: u64 = asked("resourceVersion").parse().unwrap_or(0);
            let plain = path.split('?').next().unwrap_or_default();
            let place = if plain.ends_with("/secrets") { SECRETS } else { NODES };
            match (state.fault, asked("watch") == "true" || asked("watch") == "1") {
                (Fault::Busy, _) => (429, status(429, "too many requests"), None),
                (Fault::Gone | Fault::Closed, true) if from < state.version => {
                    (410, status(410, "too old resource version"), None)
                }
                (_, true) => {
                    state.watches += 1;
                    state.began = from;
                    (200, Value::Null, Some((place, from)))
                }
                (_, false) => match plain.strip_prefix("/api/v1/nodes/") {
                    Some(name) => match state.objects.get(&(NODES, name.to_owned())) {
                        Some(node) => (200, node.clone(), None),
                        None => (404, status(404, "not found"), None),
                    },
                    None => {
                        state.lists += 1;
                        let there = state.objects.iter().filter(|((at, _), _)| *at == place);
                        let items: Vec<&Value> = there.map(|(_, object)| object).collect();
                        let (version, kind) = (
                            state.version.to_string(),
                            if place == NODES { "NodeList" } else { "SecretList" },
                        );
                        let list = json!({
                            "apiVersion": "v1", "kind": kind, "metadata": {"resourceVersion": version}, "items": items,
                        });
                        (200, list, None)
                    }
                },
            }
        };
        match from {
            Some((place, from)) => return follow(stream, state, &mut changes, place, from).await,
            None => {
                let body = body.to_string();
                let head = format!(
                    "HTTP/1.1 {code} x\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n",
                    body.len()
                );
                stream.write_all(format!("{head}{body}").as_bytes()).await?;
            }
        }
    }
}

fn status(code: u16, message: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Status", "status": "Failure", "code": code, "message": message})
}

/// The path that the next request asks for; none has a body.
async fn request(stream: &mut TcpStream) -> std::io::Result<Option<String>> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0; 1];
        if stream.read(&mut byte).await? == 0 {
            return Ok(None);
        }
        head.push(byte[0]);
    }
    let head = String::from_utf8_lossy(&head).into_owned();
    Ok(head.split(' ').nth(1).map(str::to_owned))
}

/// Tells of what happens in `place` after `from`.
async fn follow(
    mut stream: TcpStream,
    state: &Mutex<State>,
    changes: &mut watch::Receiver<()>,
    place: &str,
    mut from: u64,
) -> std::io::Result<()> {
    let head = "HTTP/1.1 200 x\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n";
    stream.write_all(head.as_bytes()).await?;
    loop {
        let (next, fault) = {
            let state = state.lock().expect("no holder panics");
            let after = |(version, at, _, _): &&(u64, &str, &str, Value)| *version > from && *at == place;
            let next = state.events.iter().find(after).cloned();
            (next, state.fault)
        };
        if fault == Fault::Closed {
            return stream.write_all(b"0\r\n\r\n").await;
        }
        if fault == Fault::Gone {
            let event = json!({"type": "ERROR", "object": status(410, "too old resource version")});
            return chunk(&mut stream, format!("{event}\n").as_bytes()).await;
        }
        let Some((version, _, kind, object)) = next else {
            if changes.changed().await.is_err() {
                return Ok(());
            }
            continue;
        };
        let line = format!("{}\n", json!({"type": kind, "object": object}));
        match fault {
            Fault::Cut => {
                state.lock().expect("no holder panics").fault = Fault::None;
                return chunk(&mut stream, &line.as_bytes()[..line.len() / 2]).await;
            }
            Fault::Slow => {
                for part in line.as_bytes().chunks(32) {
                    chunk(&mut stream, part).await?;
                    sleep(Duration::from_millis(5)).await;
                }
            }
            _ => chunk(&mut stream, line.as_bytes()).await?,
        }
        from = version;
    }
}

async fn chunk(stream: &mut TcpStream, bytes: &[u8]) -> std::io::Result<()> {
    stream.write_all(format!("{:x}\r\n", bytes.len()).as_bytes()).await?;
    stream.write_all(bytes).await?;
    stream.write_all(b"\r\n").await
}
