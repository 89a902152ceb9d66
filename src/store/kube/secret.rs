//! The PSKs in a Secret, watched through the API.
//!
//! ```text
//!  list that one Secret ──▶ its keys ──▶ watch its metadata from there ──▶ it changed, or nobody knows: list again
//! ```
//! What is watched is metadata alone, and each list and watch has a connection of its own, which is given up as soon as
//! something came: so no buffer of a library that lives on has a key in it (the metadata of a Secret that `kubectl apply`
//! made has its content in an annotation), and those that are freed are wiped ([`crate::wiping`]).

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::{AsyncRead, AsyncReadExt as _, StreamExt as _, pin_mut};
use k8s_openapi::api::core::v1;
use kube::api::{ApiResource, ListParams, NotUsed, Object, WatchEvent, WatchParams};
use kube::core::Request;
use kube::{Api, Resource as _};
use tokio::sync::watch as channel;
use tokio::time::{sleep, timeout};
use tracing::debug;
use zeroize::Zeroizing;

use super::connect::{Connector, Failure};
use super::{Access, FIRST, SLOWEST, SPREAD};
use crate::psk::{Held, PskError, SecretError, SecretName, read_secret};
use crate::store::StoreError;
use crate::store::jitter::jittered;

/// The most bytes that are read: a Secret has 1 MiB at most, here in base64, and an annotation may say it again.
const MOST: usize = 4 << 20;
/// How long the server is asked to keep a watch open, seconds.
const WATCH: u32 = 300;
/// How long a watch may say nothing. The server sends a bookmark every minute.
const SILENCE: Duration = Duration::from_secs(150);
/// The least time between two readings: who writes a Secret as fast as he can shall not keep us at it.
const PACE: Duration = Duration::from_millis(200);

/// A Secret in a cluster. Cheap to clone.
#[derive(Clone)]
pub struct Secrets {
    connector: Arc<Connector>,
    secret: SecretName,
}

impl std::fmt::Debug for Secrets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Secrets({}, {})", self.connector.server(), self.secret)
    }
}

/// Why a watch ended.
enum End {
    /// The Secret has changed.
    Changed,
    /// The server has closed it, as it does after a while: it goes on there.
    Closed(String),
    /// It did not begin: the answer was none.
    Unread,
    /// It could not be asked, or did not go on.
    Broken(Failure),
}

impl Secrets {
    /// Prepares to read `secret`, where `access` says; nothing is asked yet.
    ///
    /// # Errors
    /// [`StoreError::Kube`] for a kubeconfig or URL that can't be right, and where there is no cluster around.
    pub async fn open(access: &Access, secret: SecretName) -> Result<Self, StoreError> {
        let connector = Arc::new(Connector::new(access).await?);
        Ok(Self { connector, secret })
    }

    /// The keys for the network of this name as they change; none and no error until the first answer. The task ends
    /// when the last receiver is gone. Must be called within a tokio runtime.
    pub fn watch(&self, network: String) -> channel::Receiver<Held> {
        let (sender, receiver) = channel::channel(Held { set: None, error: None });
        let secrets = self.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = sender.closed() => {}
                () = secrets.follow(&network, &sender) => {}
            }
        });
        receiver
    }

    async fn follow(&self, network: &str, sender: &channel::Sender<Held>) {
        // A failure stands until the watch is open: where only reading is allowed, it would come and go.
        let (mut wait, mut from, mut trouble) = (FIRST, None::<String>, None);
        loop {
            let began = Instant::now();
            let version = match from.take() {
                Some(version) => Ok(Some(version)),
                None => self.read(network, sender, trouble.as_ref()).await,
            };
            let end = match version {
                Ok(version) => {
                    let opened = || {
                        if let Some(trouble) = trouble.take() {
                            Held::recovered(sender, &trouble);
                        }
                    };
                    match version {
                        Some(version) => self.watch_from(version, opened).await,
                        None => End::Unread,
                    }
                }
                Err(failure) => End::Broken(failure),
            };
            match end {
                End::Changed => {
                    wait = FIRST;
                    sleep(PACE.saturating_sub(began.elapsed())).await;
                    continue;
                }
                End::Closed(version) => from = Some(version),
                End::Unread => {}
                // The server can't go on from there.
                End::Broken(Failure { code: Some(410), .. }) => debug!("the Secret is read anew"),
                End::Broken(failure) => {
                    let error = self.trouble(&failure);
                    Held::update(sender, Err(error.clone()), None);
                    trouble = Some(error);
                }
            }
            wait = if began.elapsed() > SLOWEST {
                FIRST
            } else {
                (wait * 2).min(SLOWEST)
            };
            sleep(jittered(wait, SPREAD)).await;
        }
    }

    fn trouble(&self, failure: &Failure) -> PskError {
        let why = failure.error.to_string();
        PskError::Secret {
            secret: self.secret.clone(),
            why: match (&failure.error, failure.code) {
                (_, Some(401 | 403)) => SecretError::Refused(why),
                _ => SecretError::Away(why),
            },
        }
    }

    /// Reads the Secret and publishes its keys; returns the version to watch from, where the answer has one.
    async fn read(
        &self,
        network: &str,
        sender: &channel::Sender<Held>,
        trouble: Option<&PskError>,
    ) -> Result<Option<String>, Failure> {
        let doing = "read the Secret of the PSKs";
        let path = v1::Secret::url_path(&(), Some(self.secret.namespace()));
        let only = ListParams::default().fields(&self.only());
        let request = Request::new(path).list(&only).map_err(kube::Error::BuildRequest);
        let request = request.map_err(|error| Failure::of(doing, &error))?;
        let client = self.connector.once(doing)?;
        let call = async {
            let stream = client.request_stream(request).await?;
            collect(stream).await.map_err(kube::Error::ReadEvents)
        };
        let (version, set) = match self.connector.call(doing, call).await? {
            Some(answer) => read_secret(&answer, &self.secret, network),
            None => {
                let secret = self.secret.clone();
                let why = SecretError::Huge(MOST);
                (String::new(), Err(PskError::Secret { secret, why }))
            }
        };
        Held::update(sender, set, trouble);
        Ok(Some(version).filter(|version| !version.is_empty()))
    }

    /// Follows the Secret after `version` until something happens. `opened` is told when the server agrees.
    async fn watch_from(&self, mut version: String, opened: impl FnOnce()) -> End {
        let doing = "watch the Secret of the PSKs";
        let kind = ApiResource::erase::<v1::Secret>(&());
        let client = match self.connector.once(doing) {
            Ok(client) => client,
            Err(failure) => return End::Broken(failure),
        };
        let secrets: Api<Object<NotUsed, NotUsed>> = Api::namespaced_with(client, self.secret.namespace(), &kind);
        let only = WatchParams::default().fields(&self.only()).timeout(WATCH);
        let stream = match self
            .connector
            .call(doing, secrets.watch_metadata(&only, &version))
            .await
        {
            Ok(stream) => stream,
            Err(failure) => return End::Broken(failure),
        };
        opened();
        pin_mut!(stream);
        loop {
            match timeout(SILENCE, stream.next()).await {
                Ok(Some(Ok(WatchEvent::Bookmark(mark)))) => version = mark.metadata.resource_version,
                Ok(Some(Ok(WatchEvent::Error(status)))) => {
                    return End::Broken(Failure::answered(doing, status.code, &status.message));
                }
                Ok(Some(Ok(WatchEvent::Added(_) | WatchEvent::Modified(_) | WatchEvent::Deleted(_)))) => {
                    return End::Changed;
                }
                // Its text may quote what it could not understand.
                Ok(Some(Err(kube::Error::SerdeError(_)))) => return End::Changed,
                Ok(Some(Err(error))) => return End::Broken(Failure::of(doing, &error)),
                Ok(None) => return End::Closed(version),
                Err(_) => {
                    let why = format!("nothing came for {} s", SILENCE.as_secs());
                    return End::Broken(Failure::lost(doing, why));
                }
            }
        }
    }

    /// The one Secret: a right to it by its name counts for a list and a watch that ask for no other.
    fn only(&self) -> String {
        format!("metadata.name={}", self.secret.name())
    }
}

/// Reads all of `stream`, wiped when it is dropped; `None` where it is more than [`MOST`].
async fn collect(stream: impl AsyncRead) -> std::io::Result<Option<Zeroizing<Vec<u8>>>> {
    pin_mut!(stream);
    let mut body = Zeroizing::new(vec![0; 64 << 10]);
    let mut length = 0;
    loop {
        match stream.read(&mut body[length..]).await? {
            0 => break,
            read => length += read,
        }
        if length == body.len() {
            if length >= MOST {
                return Ok(None);
            }
            // A vector that grew by itself would leave what it held behind.
            let mut larger = Zeroizing::new(vec![0; body.len() * 2]);
            larger[..length].copy_from_slice(&body);
            body = larger;
        }
    }
    body.truncate(length);
    Ok(Some(body))
}
