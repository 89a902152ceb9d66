//! The way to etcd: endpoints, TLS, credentials.
//!
//! One connection to one endpoint, made at the first call and anew after a failure, to the next endpoint then. Not to all
//! of them at once: etcd-client spreads its calls over every endpoint, those included that nobody listens at, and of
//! flannel's two default endpoints the first is one of these as a rule.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use etcd_client::{Certificate, Client, ConnectOptions, Identity, TlsOptions};
use tokio::time::timeout;
use zeroize::Zeroizing;

use crate::store::StoreError;

/// What is asked for an answer on an idle connection, and how long it may take.
const KEEP_ALIVE: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(5));
/// How long one endpoint may take to answer for the first time. Short, so that a call gets to the next one.
const DIAL: Duration = Duration::from_secs(2);
/// Where systems keep the authorities that they trust: Debian and Alpine, Fedora, openSUSE.
const AUTHORITIES: [&str; 3] = [
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
];

/// Where etcd is, and as whom we come. Never shows the password.
#[derive(Clone)]
pub struct Access {
    /// Its addresses.
    pub endpoints: Endpoints,
    /// What stands before every key.
    pub prefix: String,
    /// The certificate authority that signed etcd's certificate; those that the system trusts where absent.
    pub ca: Option<PathBuf>,
    /// Our own certificate and its key.
    pub certificate: Option<(PathBuf, PathBuf)>,
    /// User and password.
    pub user: Option<(String, Zeroizing<String>)>,
}

impl Access {
    /// Puts together what flags of these names give. `certificate`: the certificate and its key; `user`: name and password.
    ///
    /// # Errors
    /// What does not go together, and what is missing.
    pub fn of_flags(
        endpoints: &str,
        prefix: &str,
        ca: Option<PathBuf>,
        certificate: (Option<PathBuf>, Option<PathBuf>),
        user: (Option<String>, Option<Zeroizing<String>>),
    ) -> Result<Self, String> {
        let endpoints = Endpoints::parse(endpoints).map_err(|why| format!("--etcd-endpoints: {why}"))?;
        let certificate = match certificate {
            (Some(certificate), Some(key)) => Some((certificate, key)),
            (None, None) => None,
            (Some(_), None) => return Err("--etcd-certfile needs --etcd-keyfile beside it".into()),
            (None, Some(_)) => return Err("--etcd-keyfile needs --etcd-certfile beside it".into()),
        };
        if !endpoints.are_secure() && (certificate.is_some() || ca.is_some()) {
            let why = "the files for TLS are given, so https:// is needed";
            return Err(format!("--etcd-endpoints {endpoints}: {why}"));
        }
        let user = match user {
            (Some(user), Some(password)) => Some((user, password)),
            (None, None) => None,
            (Some(_), None) => {
                let why = "--etcd-username needs a password: the variable FLANNELD_ETCD_PASSWORD, or --etcd-password";
                return Err(why.into());
            }
            (None, Some(_)) => return Err("--etcd-password needs --etcd-username beside it".into()),
        };
        Ok(Self {
            endpoints,
            prefix: prefix.to_owned(),
            ca,
            certificate,
            user,
        })
    }
}

impl fmt::Debug for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Access({}, {})", self.endpoints, self.prefix)
    }
}

/// etcd's addresses: URLs of one scheme, at least one.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Endpoints(Vec<String>);

impl Endpoints {
    /// Understands a list separated by commas.
    ///
    /// # Errors
    /// What is wrong with it, and what would be right.
    pub fn parse(list: &str) -> Result<Self, String> {
        let all: Vec<String> = list
            .split(',')
            .map(str::trim)
            .filter(|url| !url.is_empty())
            .map(str::to_owned)
            .collect();
        let want = "URLs such as http://192.0.2.1:2379,http://192.0.2.2:2379 are needed";
        let scheme = |url: &String| {
            url.split_once("://")
                .map(|(scheme, rest)| (scheme.to_owned(), !rest.is_empty()))
        };
        let mut schemes: Vec<String> = Vec::new();
        for url in &all {
            match scheme(url) {
                Some((scheme, true)) if ["http", "https"].contains(&scheme.as_str()) => schemes.push(scheme),
                _ => return Err(format!("{url:?} is no URL of etcd: {want}")),
            }
        }
        schemes.dedup();
        match schemes.len() {
            0 => Err(want.to_owned()),
            1 => Ok(Self(all)),
            _ => Err("http and https side by side: one of the two is needed".to_owned()),
        }
    }

    /// Whether they are reached by TLS.
    pub fn are_secure(&self) -> bool {
        self.0.iter().any(|url| url.starts_with("https://"))
    }

    /// One by one.
    pub fn iter(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(String::as_str)
    }
}

impl fmt::Display for Endpoints {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join(","))
    }
}

pub(super) struct Connector {
    access: Access,
    options: ConnectOptions,
    /// The same for an etcd that has no authentication enabled, and so refuses a log-in.
    without_user: ConnectOptions,
    link: Mutex<Link>,
}

/// The connection.
#[derive(Default)]
struct Link {
    client: Option<Client>,
    /// Which endpoint it is to, or the next attempt goes to, modulo their number.
    at: usize,
    hopeless: Option<String>,
}

impl Connector {
    /// `first`: a random number, the endpoint to begin with.
    ///
    /// # Errors
    /// [`StoreError::Etcd`] for endpoints and files that can't be right.
    pub(super) async fn new(access: Access, first: usize) -> Result<Self, StoreError> {
        let mut options = ConnectOptions::new()
            .with_connect_timeout(DIAL)
            .with_keep_alive(KEEP_ALIVE.0, KEEP_ALIVE.1)
            .with_keep_alive_while_idle(true)
            .with_require_leader(true)
            .with_auto_token_refresh(true);
        if access.endpoints.are_secure() {
            options = options.with_tls(tls(&access)?);
        }
        let without_user = options.clone();
        if let Some((user, password)) = &access.user {
            options = options.with_user(user.clone(), password.as_str());
        }
        // Without a user this takes in URLs and files and sends nothing.
        let endpoints: Vec<&str> = access.endpoints.iter().collect();
        if let Err(error) = Client::connect(&endpoints, Some(without_user.clone())).await {
            return Err(StoreError::Etcd {
                doing: "use --etcd-endpoints, --etcd-cafile, --etcd-certfile and --etcd-keyfile",
                why: text(&error),
                transient: false,
            });
        }
        let link = Link {
            at: first,
            ..Link::default()
        };
        Ok(Self {
            access,
            options,
            without_user,
            link: Mutex::new(link),
        })
    }

    pub(super) fn endpoints(&self) -> &Endpoints {
        &self.access.endpoints
    }

    fn link(&self) -> std::sync::MutexGuard<'_, Link> {
        self.link.lock().expect("no holder panics")
    }

    /// A connection; made where there is none, to the first endpoint that answers within `limit`. The next attempt goes
    /// on where this one was cut off.
    pub(super) async fn client(&self, limit: Duration) -> Result<Client, StoreError> {
        if let Some(client) = self.link().client.clone() {
            return Ok(client);
        }
        let doing = "connect to etcd";
        let mut failures = Vec::new();
        let dialling = async {
            for _ in 0..self.access.endpoints.0.len() {
                let at = self.link().at % self.access.endpoints.0.len();
                let endpoint = self.access.endpoints.0[at].as_str();
                match timeout(DIAL, self.dial(endpoint)).await {
                    Ok(Ok(client)) => {
                        self.link().client = Some(client.clone());
                        return Some(client);
                    }
                    Ok(Err(error)) => {
                        self.failed(&error);
                        failures.push(format!("{endpoint}: {}", text(&error)));
                    }
                    Err(_) => {
                        self.forget();
                        failures.push(format!("{endpoint}: no answer within {} s", DIAL.as_secs()));
                    }
                }
            }
            None
        };
        if let Ok(Some(client)) = timeout(limit, dialling).await {
            return Ok(client);
        }
        Err(StoreError::Etcd {
            doing,
            why: failures.join("; "),
            transient: true,
        })
    }

    /// A connection to `endpoint`, which has answered.
    async fn dial(&self, endpoint: &str) -> Result<Client, etcd_client::Error> {
        let connected = match Client::connect([endpoint], Some(self.options.clone())).await {
            // As flannel's client does: who turns authentication on later restarts nothing.
            Err(error) if text(&error).contains("authentication is not enabled") => {
                Client::connect([endpoint], Some(self.without_user.clone())).await
            }
            outcome => outcome,
        };
        let mut client = connected?;
        // A connection is made by the first call. What etcd says to this one is of no interest, a refusal included.
        match client.get(format!("{}/config", self.access.prefix), None).await {
            Err(error) if is_lost(&error) => Err(error),
            _ => Ok(client),
        }
    }

    /// A call failed. Where the connection may be to blame the next one goes to the next endpoint, with new credentials.
    pub(super) fn failed(&self, error: &etcd_client::Error) {
        if is_lost(error) {
            self.forget();
        }
        if is_hopeless(error) {
            self.link().hopeless = Some(text(error));
        }
    }

    /// Gives the connection up: the next one is to the next endpoint.
    pub(super) fn forget(&self) {
        let mut link = self.link();
        link.client = None;
        link.at = link.at.wrapping_add(1);
    }

    /// Why etcd will never take us, where that is so.
    pub(super) fn hopeless(&self) -> Option<StoreError> {
        let why = self.link().hopeless.take()?;
        Some(StoreError::Etcd {
            doing: "log in at etcd",
            why: format!("{why}: correct --etcd-username and --etcd-password (FLANNELD_ETCD_PASSWORD)"),
            transient: false,
        })
    }
}

/// Whether another connection may do better: all but what etcd answers to the question itself.
fn is_lost(error: &etcd_client::Error) -> bool {
    // google.golang.org/grpc/codes: InvalidArgument, NotFound, AlreadyExists, PermissionDenied, ResourceExhausted,
    // FailedPrecondition, OutOfRange.
    const ANSWERS: [i32; 7] = [3, 5, 6, 7, 8, 9, 11];
    match error {
        etcd_client::Error::GRpcStatus(status) => !ANSWERS.contains(&i32::from(status.code())),
        etcd_client::Error::LeaseKeepAliveError(_) => false,
        _ => true,
    }
}

/// Credentials that etcd does not know.
fn is_hopeless(error: &etcd_client::Error) -> bool {
    let text = text(error);
    ["authentication failed", "user name is empty"]
        .iter()
        .any(|known| text.contains(known))
}

/// A failure of etcd in our words.
pub(super) fn refused(doing: &'static str, error: &etcd_client::Error) -> StoreError {
    StoreError::Etcd {
        doing,
        why: text(error),
        transient: true,
    }
}

fn text(error: &etcd_client::Error) -> String {
    let mut text = match error {
        etcd_client::Error::GRpcStatus(status) => status.message().to_owned(),
        other => other.to_string(),
    };
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) && more.len() < 200 {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = error.source();
    }
    text
}

fn tls(access: &Access) -> Result<TlsOptions, StoreError> {
    let wrong = |why: String| StoreError::Etcd {
        doing: "read the files for TLS",
        why,
        transient: false,
    };
    let read = |flag: &str, path: &Path, what: &str| {
        let shown = path.display();
        let pem = fs::read(path).map_err(|error| wrong(format!("{flag} {shown}: {error}")))?;
        let pem = Zeroizing::new(pem);
        let marked = pem.windows(what.len()).any(|window| window == what.as_bytes());
        let missing = || {
            wrong(format!(
                "{flag} {shown}: no \"-----BEGIN …{what}\" in it: PEM is needed"
            ))
        };
        marked.then_some(pem).ok_or_else(missing)
    };
    let (authority, certificate, key) = ("CERTIFICATE-----", "CERTIFICATE-----", "PRIVATE KEY-----");
    let system = || AUTHORITIES.iter().map(Path::new).find(|path| path.exists());
    let Some(ca) = access.ca.as_deref().or_else(system) else {
        let places = AUTHORITIES.join(", ");
        return Err(wrong(format!(
            "nothing to check etcd's certificate by: give --etcd-cafile; this system has none of {places}"
        )));
    };
    let authorities = Certificate::from_pem(read("--etcd-cafile", ca, authority)?.as_slice());
    let mut tls = TlsOptions::new().ca_certificate(authorities);
    if let Some((certificate_file, key_file)) = &access.certificate {
        let pem = read("--etcd-certfile", certificate_file, certificate)?;
        let private = read("--etcd-keyfile", key_file, key)?;
        tls = tls.identity(Identity::from_pem(pem.as_slice(), private.as_slice()));
    }
    Ok(tls)
}
