//! The control socket: what an operator's command asks of the running daemon.
//!
//! ```text
//!  ringmail status ── one JSON line ──▶ control.sock ── Command ──▶ the daemon's loop
//!                  ◀── one JSON line ──              ◀── oneshot ──
//! ```
//!
//! A connection carries one request and one reply, both bounded in size and time, so that a client that stalls or
//! talks nonsense costs one slot for a few seconds and nothing else. The socket is for root and for the daemon's own
//! user: by its mode (0600), and by the peer's credentials. [`ask`] is the other end; [`Single`] is why there is one
//! daemon a node; [`Remembered`] is what the daemon leaves in the folder for `ringmail cleanup`.

mod client;
pub mod http;
mod listen;
pub mod metrics;
mod remembered;
mod single;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::timeout;
use tracing::{debug, warn};

use crate::audit::Audit;
use crate::lease::{Lease, NodeName};
use crate::node::report::Report;
use crate::repeats::{self, Repeats};

use metrics::{Measures, Vitals};

pub use client::{AskError, ask};
pub use listen::{ListenError, Listener, listen};
pub use remembered::{RememberError, Remembered, RememberedEtcd, RememberedKube};
pub use single::{PID_FILE, Single, SingleError};

/// Where the daemon's socket and files are unless `--run-dir` says otherwise.
pub const RUN_DIR: &str = "/run/ringmail";

/// The version of what goes over the socket. A client and a daemon of different versions say so and stop.
pub const PROTOCOL: u32 = 1;

/// The largest request, bytes, line end included.
const REQUEST_MAX: usize = 4096;

/// The largest reply that a client takes, bytes: an audit of 5,000 peers is a tenth of it.
const REPLY_MAX: u64 = 64 << 20;

/// Connections served at a time; more wait in the socket's queue.
const CLIENTS: usize = 64;

/// How long each part of a conversation may take.
#[derive(Clone, Copy, Debug)]
struct Patience {
    /// The request, from the connection's first moment to its line end.
    request: Duration,
    /// The daemon's work.
    answer: Duration,
    /// The client's taking of the reply.
    reply: Duration,
}

const PATIENCE: Patience = Patience {
    request: Duration::from_secs(5),
    answer: Duration::from_secs(30),
    reply: Duration::from_secs(10),
};

/// What the daemon's loop is asked to do. A reply that nobody waits for any more is dropped without harm.
#[derive(Debug)]
pub enum Command {
    /// How the node and its peers stand.
    Status {
        /// Takes the picture.
        reply: oneshot::Sender<Report>,
    },
    /// Dump the kernel and compare it with the plan.
    Audit {
        /// Takes the findings, or why the kernel could not be read.
        reply: oneshot::Sender<Result<Audit, String>>,
    },
    /// Begin a new epoch now.
    Rotate {
        /// Takes the new epoch once it has begun, or why none can begin, with the remedy.
        reply: oneshot::Sender<Result<Rotation, String>>,
    },
    /// What health is made of, which costs the same for any number of peers. Not asked over the socket.
    Health {
        /// Takes it.
        reply: oneshot::Sender<Vitals>,
    },
    /// What metrics are made of. Not asked over the socket.
    Measure {
        /// Takes it.
        reply: oneshot::Sender<Measures>,
    },
    /// All leases, as this node judges them.
    Leases {
        /// Takes the list.
        reply: oneshot::Sender<Leases>,
    },
}

/// A new epoch has begun.
#[derive(Clone, Debug, Deserialize, Eq, PartialEq, Serialize)]
pub struct Rotation {
    /// Its number.
    pub epoch: u64,
    /// The epoch before it; `None` where this is the process's first.
    pub previous: Option<u64>,
}

/// Every lease that the store holds.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize)]
pub struct Leases {
    /// This node's name; `None` where a folder was read without a daemon.
    pub own: Option<String>,
    /// Whether the store was read whole.
    pub complete: bool,
    /// The leases, by node name.
    pub leases: Vec<LeaseReport>,
    /// What the store holds that is no lease → why.
    pub rejected: BTreeMap<String, String>,
}

/// One lease, and what is made of it.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct LeaseReport {
    /// Whose it is.
    pub node: String,
    /// The subnets that it holds, IPv4 first.
    pub subnets: Vec<String>,
    /// The addresses that the node is reached at, IPv4 first.
    pub public: Vec<String>,
    /// The backend's type, empty where the lease has none yet.
    pub backend: String,
    /// The epoch that its statement names, believed or not; `None` where there is no readable statement.
    pub epoch: Option<u64>,
    /// What came of it.
    pub verdict: Verdict,
    /// Why it is refused, with the remedy.
    pub reason: Option<String>,
}

/// What a node makes of a lease.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// This node's own.
    Own,
    /// Its tag verifies under a PSK that this node holds, and it is served.
    Verified,
    /// It is not believed.
    Refused,
    /// Nobody checked it: there was no PSK at hand.
    Unchecked,
}

impl Leases {
    /// The list of `leases` as the node `own` judges them; `refusal` gives the reason for each that it refuses.
    pub fn judged<'a>(
        own: &NodeName,
        leases: impl IntoIterator<Item = &'a Arc<Lease>>,
        refusal: impl Fn(&NodeName) -> Option<String>,
    ) -> Vec<LeaseReport> {
        let judge = |lease: &Arc<Lease>| match (lease.node == *own, refusal(&lease.node)) {
            (true, _) => LeaseReport::new(lease, Verdict::Own, None),
            (false, None) => LeaseReport::new(lease, Verdict::Verified, None),
            (false, reason) => LeaseReport::new(lease, Verdict::Refused, reason),
        };
        leases.into_iter().map(judge).collect()
    }
}

impl LeaseReport {
    /// `lease` with a verdict that was reached elsewhere.
    pub fn new(lease: &Lease, verdict: Verdict, reason: Option<String>) -> Self {
        Self {
            node: lease.node.to_string(),
            subnets: lease.subnets.iter().map(|net| net.to_string()).collect(),
            public: lease.public.iter().map(|address| address.to_string()).collect(),
            backend: lease.backend.clone(),
            epoch: stated_epoch(lease),
            verdict,
            reason,
        }
    }
}

/// The epoch that the lease's statement names; nothing is verified here.
fn stated_epoch(lease: &Lease) -> Option<u64> {
    use base64::Engine as _;
    let data = lease.data.value();
    let text = data.get("Statement")?.as_str()?;
    let bytes = base64::engine::general_purpose::STANDARD.decode(text).ok()?;
    Some(keys::Statement::decode(&bytes).ok()?.epoch.0)
}

/// What can be asked over the socket.
#[derive(Clone, Copy, Debug, Deserialize, Eq, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Request {
    /// [`Command::Status`]; the answer is a [`Report`].
    Status,
    /// [`Command::Audit`]; the answer is an [`Audit`].
    Audit,
    /// [`Command::Rotate`]; the answer is a [`Rotation`].
    Rotate,
    /// [`Command::Leases`]; the answer is [`Leases`].
    Leases,
}

/// The request's line.
#[derive(Debug, Deserialize, Serialize)]
struct Question {
    protocol: u32,
    /// A [`Request`], read only once the protocol is known to be ours.
    ask: serde_json::Value,
}

/// The reply's line: an answer or an error.
#[derive(Debug, Deserialize, Serialize)]
struct Reply {
    protocol: u32,
    /// The daemon's version.
    version: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    answer: Option<serde_json::Value>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

impl Reply {
    fn new(outcome: Result<serde_json::Value, String>) -> Self {
        let (answer, error) = match outcome {
            Ok(answer) => (Some(answer), None),
            Err(error) => (None, Some(error)),
        };
        Self {
            protocol: PROTOCOL,
            version: env!("CARGO_PKG_VERSION").into(),
            answer,
            error,
        }
    }
}

/// The socket in `run_dir`.
fn socket(run_dir: &Path) -> PathBuf {
    run_dir.join("control.sock")
}

/// Serves the control socket until the daemon's loop has gone: then it returns. To be spawned on the daemon's runtime;
/// dropping it ends all conversations.
pub async fn serve(listener: Listener, commands: mpsc::Sender<Command>) {
    serve_patiently(listener, commands, PATIENCE).await;
}

async fn serve_patiently(listener: Listener, commands: mpsc::Sender<Command>, patience: Patience) {
    let slots = Arc::new(Semaphore::new(CLIENTS));
    let mut talks = tokio::task::JoinSet::new();
    let mut failing = Repeats::default();
    loop {
        let slot = slots
            .clone()
            .acquire_owned()
            .await
            .expect("the semaphore is never closed");
        while talks.try_join_next().is_some() {}
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = commands.closed() => return,
        };
        match accepted {
            Ok(stream) => {
                let commands = commands.clone();
                talks.spawn(async move {
                    let _slot = slot;
                    talk(stream, &commands, patience).await;
                });
            }
            Err(error) => {
                // Descriptors may have run out: without a pause this would spin.
                if let Some(told) = failing.failed(&error.to_string(), repeats::now()) {
                    warn!(%error, times = told.times, seconds = told.seconds, "control socket: no connection taken");
                }
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
        }
    }
}

/// One conversation. What a client does wrong is its own trouble, and a debug line here.
async fn talk(mut stream: UnixStream, commands: &mpsc::Sender<Command>, patience: Patience) {
    let outcome = match listen::admits(&stream) {
        Err(refused) => Err(refused),
        Ok(()) => match timeout(patience.request, read_request(&mut stream)).await {
            Err(_) => Err("no request came in time: one line of JSON is expected".into()),
            Ok(Err(error)) => Err(error),
            Ok(Ok(request)) => timeout(patience.answer, answer(request, commands))
                .await
                .unwrap_or_else(|_| Err("the daemon is too busy to answer: try again, and see its log".into())),
        },
    };
    let mut line = serde_json::to_vec(&Reply::new(outcome)).expect("a reply becomes JSON");
    line.push(b'\n');
    let write = async {
        stream.write_all(&line).await?;
        stream.shutdown().await
    };
    match timeout(patience.reply, write).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => debug!(%error, "control socket: the client went away"),
        Err(_) => debug!("control socket: the client did not take its reply"),
    }
}

async fn read_request(stream: &mut UnixStream) -> Result<Request, String> {
    let mut line = Vec::new();
    let read = BufReader::new(stream.take(REQUEST_MAX as u64))
        .read_until(b'\n', &mut line)
        .await;
    read.map_err(|error| format!("the request can't be read: {error}"))?;
    if line.last() != Some(&b'\n') {
        return Err(if line.len() >= REQUEST_MAX {
            format!("the request is longer than {REQUEST_MAX} bytes")
        } else {
            "the request ends without a line end".into()
        });
    }
    let question: Question = serde_json::from_slice(&line).map_err(|error| {
        format!("the request is no JSON line {{\"protocol\":{PROTOCOL},\"ask\":\"status\"}}: {error}")
    })?;
    if question.protocol != PROTOCOL {
        return Err(format!(
            "the request is of protocol {}, this daemon (ringmail {}) speaks {PROTOCOL}: use the same version for both",
            question.protocol,
            env!("CARGO_PKG_VERSION")
        ));
    }
    Request::deserialize(&question.ask).map_err(|_| {
        format!(
            "unknown request {}: status, audit, rotate and leases are known",
            question.ask
        )
    })
}

async fn answer(request: Request, commands: &mpsc::Sender<Command>) -> Result<serde_json::Value, String> {
    match request {
        Request::Status => json(&send(commands, |reply| Command::Status { reply }).await?),
        Request::Audit => json(&send(commands, |reply| Command::Audit { reply }).await??),
        Request::Rotate => json(&send(commands, |reply| Command::Rotate { reply }).await??),
        Request::Leases => json(&send(commands, |reply| Command::Leases { reply }).await?),
    }
}

async fn send<T>(
    commands: &mpsc::Sender<Command>,
    command: impl FnOnce(oneshot::Sender<T>) -> Command,
) -> Result<T, String> {
    let stopping = "the daemon is stopping";
    let (reply, answer) = oneshot::channel();
    commands.send(command(reply)).await.map_err(|_| stopping)?;
    answer.await.map_err(|_| stopping.into())
}

fn json(answer: &impl Serialize) -> Result<serde_json::Value, String> {
    serde_json::to_value(answer).map_err(|error| format!("the answer can't be written as JSON: {error}"))
}
