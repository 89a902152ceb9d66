//! What others may ask without rights: `/healthz`, `/readyz` and `/metrics` over plain HTTP, in flannel's places.
//!
//! ```text
//!  kubelet ───── GET /healthz, /readyz ──▶ listener ── Command::Health ───▶ the daemon's loop
//!  Prometheus ── GET /metrics ───────────▶          ── Command::Measure ──▶
//! ```
//!
//! It answers from the daemon's first moment on, so that a probe does not end a daemon that waits for its store. Healthy is
//! a daemon whose loop turns and whose kernel answers: what a restart would not mend is for `/readyz`.

mod reading;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::time::timeout;
use tracing::{debug, warn};

use super::Command;
use super::metrics::{self, Host, PerPeer, Vitals};
use crate::repeats::{self, Repeats};
use crate::store::kube::Datapath;
use reading::READERS;

pub use reading::Readings;

/// Connections served at a time; more wait in the socket's queue.
const CLIENTS: usize = 16;
/// How long a connection may live: a request is answered in a moment.
const CONVERSATION: Duration = Duration::from_secs(30);
/// How long a client may take for its request's head.
const HEAD: Duration = Duration::from_secs(5);
/// How long the loop may take to answer before it counts as stuck.
const TURN: Duration = Duration::from_secs(10);
/// OpenMetrics 1.0, which Prometheus asks for and reads.
const METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
/// What is said while there is no loop yet.
const STARTING: &str = "starting: waiting for the store, the configuration or the uplink";

/// An address that can't be listened at.
#[derive(Debug, thiserror::Error)]
#[error("listen at {address} (--healthz-ip and --healthz-port, or --metrics): choose another")]
pub struct HttpError {
    /// The address.
    address: SocketAddr,
    /// The system's reason.
    source: std::io::Error,
}

/// The way to the daemon's loop, once there is one.
pub type Loop = Arc<OnceLock<mpsc::Sender<Command>>>;

/// Binds `address`.
pub async fn bind(address: SocketAddr) -> Result<TcpListener, HttpError> {
    TcpListener::bind(address)
        .await
        .map_err(|source| HttpError { address, source })
}

/// Serves until it is dropped. `readings` are shared by all listeners.
pub async fn serve(listener: TcpListener, way: Loop, readings: Readings, per_peer: PerPeer) {
    let (slots, mut failing) = (Arc::new(Semaphore::new(CLIENTS)), Repeats::default());
    loop {
        let slot = slots
            .clone()
            .acquire_owned()
            .await
            .expect("the semaphore is never closed");
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Descriptors may have run out: without a pause this would spin.
                if let Some(told) = failing.failed(&error.to_string(), repeats::now()) {
                    warn!(%error, times = told.times, seconds = told.seconds, "health and metrics: no connection taken");
                }
                tokio::time::sleep(Duration::from_millis(200)).await;
                continue;
            }
        };
        let (way, readings) = (way.clone(), readings.clone());
        tokio::spawn(async move {
            let _slot = slot;
            let service = service_fn(|request| answer(request, &way, &readings, per_peer));
            let mut server = http1::Builder::new();
            server
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD)
                .keep_alive(false);
            let served = server.serve_connection(TokioIo::new(stream), service);
            match timeout(CONVERSATION, served).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => debug!(%error, "health and metrics: a client went away"),
                Err(_) => debug!("health and metrics: a client did not take its answer"),
            }
        });
    }
}

async fn answer(
    request: Request<Incoming>,
    way: &Loop,
    readings: &Readings,
    per_peer: PerPeer,
) -> Result<Response<Full<Bytes>>, Infallible> {
    if ![Method::GET, Method::HEAD].contains(request.method()) {
        let mut refused = text(StatusCode::METHOD_NOT_ALLOWED, "GET is what is answered here");
        refused
            .headers_mut()
            .insert(ALLOW, HeaderValue::from_static("GET, HEAD"));
        return Ok(refused);
    }
    let vitals = ask(way, |reply| Command::Health { reply });
    let (well, why) = match request.uri().path() {
        "/healthz" => healthy(vitals.await),
        "/readyz" => ready(vitals.await),
        "/metrics" => {
            let way = way.clone();
            let made = readings.text(async move {
                let measures = ask(&way, |reply| Command::Measure { reply }).await.ok().flatten();
                metrics::text(measures, Host::read(), per_peer)
            });
            let Some(made) = made.await else {
                let why = format!("{READERS} others read metrics now: try again");
                return Ok(text(StatusCode::SERVICE_UNAVAILABLE, &why));
            };
            let mut response = Response::new(Full::from(made));
            response
                .headers_mut()
                .insert(CONTENT_TYPE, HeaderValue::from_static(METRICS));
            return Ok(response);
        }
        _ => return Ok(text(StatusCode::NOT_FOUND, "/healthz, /readyz and /metrics are here")),
    };
    let status = if well {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    Ok(text(status, &why))
}

/// What the loop tells; `None` while there is none yet. An error where it does not answer.
async fn ask<T>(way: &Loop, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<Option<T>, String> {
    let Some(commands) = way.get() else { return Ok(None) };
    let (reply, told) = oneshot::channel();
    let asked = async {
        commands.send(command(reply)).await.ok()?;
        told.await.ok()
    };
    match timeout(TURN, asked).await {
        Ok(Some(told)) => Ok(Some(told)),
        Ok(None) => Err("the daemon's loop has ended".into()),
        Err(_) => Err(format!("the daemon's loop has not answered for {} s", TURN.as_secs())),
    }
}

/// Whether a restart would not help, and the body's line.
fn healthy(vitals: Result<Option<Vitals>, String>) -> (bool, String) {
    match vitals {
        Ok(None) => (true, STARTING.into()),
        Ok(Some(Vitals { kernel: Err(why), .. })) | Err(why) => (false, why),
        Ok(Some(_)) => (true, "the loop turns and the kernel answers".into()),
    }
}

/// Whether pods have a network here, and the body's line. Without an uplink they still have one among themselves, and a
/// node that is not ready would mend nothing.
fn ready(vitals: Result<Option<Vitals>, String>) -> (bool, String) {
    match vitals {
        Ok(None) => (false, STARTING.into()),
        Ok(Some(Vitals {
            datapath,
            uplink,
            problems,
            ..
        })) => match datapath {
            Datapath::Works => {
                let but = uplink.map_or_else(String::new, |why| {
                    format!("; but there is no uplink now, other nodes may be out of reach: {why}")
                });
                let ready = "ready: lease held, the node's own datapath in order, subnet.env written";
                (true, ready.to_owned() + &but)
            }
            Datapath::Broken(why) => (false, why),
            Datapath::Starting => (false, format!("not ready yet: {}", problems.join("; "))),
        },
        Err(why) => (false, why),
    }
}

fn text(status: StatusCode, line: &str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(format!("{line}\n")));
    *response.status_mut() = status;
    let plain = HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, plain);
    response
}

#[cfg(test)]
mod tests;
