//! The way to the API server: a kubeconfig, a URL, or the Pod's own account; and calls that end.

use std::fmt;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::Duration;

use kube::api::{ApiResource, Object};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::time::timeout;

use super::notes::Keys;
use crate::lease::NodeName;
use crate::store::StoreError;

/// How long one call may take.
const LIMIT: Duration = Duration::from_secs(10);
/// How long a connection may take to be made.
const DIAL: Duration = Duration::from_secs(5);

/// Where the API server is, whose lease this process keeps, and what its annotations are called.
#[derive(Clone, Debug)]
pub struct Access {
    /// `--kubeconfig-file`.
    pub kubeconfig: Option<PathBuf>,
    /// `--kube-api-url`; goes before the kubeconfig's own, and before the Pod's.
    pub url: Option<String>,
    /// The annotations' names.
    pub keys: Keys,
    /// Which Node is this node's.
    pub own: Own,
}

/// Which Node is this node's.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Own {
    /// The one of this name.
    Named(NodeName),
    /// The one that this Pod runs on, as flannel's DaemonSet says it: `POD_NAMESPACE`, `POD_NAME`.
    OfPod {
        /// The Pod's namespace.
        namespace: String,
        /// Its name.
        name: String,
    },
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.url, &self.kubeconfig) {
            (Some(url), _) => f.write_str(url),
            (None, Some(file)) => write!(f, "{}", file.display()),
            (None, None) => f.write_str("the cluster around this Pod"),
        }
    }
}

/// What is read of a Node's `spec`.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Spec {
    /// Of servers before Kubernetes 1.16, and the first of the list.
    #[serde(rename = "podCIDR", default)]
    pub(super) pod_cidr: String,
    #[serde(rename = "podCIDRs", default)]
    pub(super) pod_cidrs: Vec<String>,
}

/// What the client is made of, and the client.
pub(super) struct Connector {
    config: Config,
    client: Mutex<Client>,
}

impl Connector {
    /// # Errors
    /// [`StoreError::Kube`] for a kubeconfig and a URL that can't be right, and where there is no cluster around.
    pub(super) async fn new(access: &Access) -> Result<Self, StoreError> {
        let mut config = config(access).await?;
        config.connect_timeout = Some(DIAL);
        // Who calls has the loop, and knows for how long a call is worth waiting for.
        config.default_retry = false;
        let client = Client::try_from(config.clone()).map_err(|error| StoreError::Kube {
            doing: "use the kubeconfig",
            why: text(&error),
            transient: false,
        })?;
        Ok(Self {
            config,
            client: Mutex::new(client),
        })
    }

    pub(super) fn server(&self) -> String {
        self.config.cluster_url.to_string()
    }

    pub(super) fn client(&self) -> Client {
        self.client.lock().expect("no holder panics").clone()
    }

    /// The Nodes; of each its metadata, [`Spec`], and what `S` takes of its status.
    pub(super) fn nodes<S: Clone + fmt::Debug + DeserializeOwned>(&self) -> Api<Object<Spec, S>> {
        let kind = ApiResource::erase::<k8s_openapi::api::core::v1::Node>(&());
        Api::all_with(self.client(), &kind)
    }

    /// Awaits a call, and not for ever: a connection that says nothing is given up, and with it the client that may have
    /// kept others like it.
    pub(super) async fn call<T>(
        &self,
        doing: &'static str,
        call: impl Future<Output = Result<T, kube::Error>>,
    ) -> Result<T, Failure> {
        match timeout(LIMIT, call).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => Err(Failure::of(doing, &error)),
            Err(_) => {
                self.forget();
                let why = format!(
                    "{} does not answer within {} s",
                    self.config.cluster_url,
                    LIMIT.as_secs()
                );
                Err(Failure::lost(doing, why))
            }
        }
    }

    /// A client for one call, whose connection goes with it.
    pub(super) fn once(&self, doing: &'static str) -> Result<Client, Failure> {
        Client::try_from(self.config.clone()).map_err(|error| Failure::lost(doing, text(&error)))
    }

    /// Gives all connections up.
    pub(super) fn forget(&self) {
        // It was made of the same before.
        if let Ok(client) = Client::try_from(self.config.clone()) {
            *self.client.lock().expect("no holder panics") = client;
        }
    }
}

/// A call that did not do it.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) error: StoreError,
    /// The server's own answer, as an HTTP status; `None` where it could not be asked.
    pub(super) code: Option<u16>,
}

impl Failure {
    pub(super) fn of(doing: &'static str, error: &kube::Error) -> Self {
        match error {
            kube::Error::Api(status) => Self::answered(doing, status.code, &status.message),
            other => Self::lost(doing, text(other)),
        }
    }

    /// The server has answered with a `code`.
    pub(super) fn answered(doing: &'static str, code: u16, message: &str) -> Self {
        let remedy = match code {
            401 => ": the credentials are not accepted: look at the kubeconfig, or at the Pod's service account",
            403 => ": give this account that right",
            _ => "",
        };
        let why = format!("{message} ({code}){remedy}");
        Self {
            error: match code {
                429 | 500.. => StoreError::KubeAway { doing, why },
                _ => StoreError::Kube {
                    doing,
                    why,
                    transient: true,
                },
            },
            code: Some(code),
        }
    }

    pub(super) fn lost(doing: &'static str, why: String) -> Self {
        Self {
            error: StoreError::KubeAway { doing, why },
            code: None,
        }
    }
}

impl From<Failure> for StoreError {
    fn from(failure: Failure) -> Self {
        failure.error
    }
}

async fn config(access: &Access) -> Result<Config, StoreError> {
    let wrong = |doing: &'static str, why: String| StoreError::Kube {
        doing,
        why,
        transient: false,
    };
    // What is asked of a server that nothing but its URL is known of.
    let bare = access.url.as_ref().map(|url| {
        let parsed = url.parse().ok().map(Config::new);
        let right = |config: &Config| {
            let url = &config.cluster_url;
            matches!(url.scheme_str(), Some("http" | "https")) && url.host().is_some()
        };
        parsed.filter(right).ok_or_else(|| {
            let why = format!("{url:?} is no URL of an API server: one such as https://192.0.2.1:6443 is needed");
            wrong("use --kube-api-url", why)
        })
    });
    let bare = bare.transpose()?;
    let url = bare.as_ref().map(|config| config.cluster_url.clone());
    let mut config = match (&access.kubeconfig, bare) {
        (Some(file), _) => {
            let unread = |error: kube::config::KubeconfigError| wrong("use --kubeconfig-file", text(&error));
            let read = Kubeconfig::read_from(file).map_err(unread)?;
            let options = KubeConfigOptions::default();
            Config::from_custom_kubeconfig(read, &options).await.map_err(unread)?
        }
        // The Pod's token goes to no server that anyone on the way can read along with.
        (None, Some(bare)) if bare.cluster_url.scheme_str() == Some("https") => Config::incluster().unwrap_or(bare),
        (None, Some(bare)) => bare,
        (None, None) => Config::incluster().map_err(|error| {
            let why = format!(
                "{}: outside of a Pod give --kubeconfig-file or --kube-api-url",
                text(&error)
            );
            wrong("find the cluster around this Pod", why)
        })?,
    };
    if let Some(url) = url {
        config.cluster_url = url;
    }
    Ok(config)
}

/// An error and its causes on one line, each once.
fn text(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) && more.len() < 300 {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = error.source();
    }
    text
}
