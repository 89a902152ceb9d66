//! A relay between a store and its etcd that holds answers back, and loses them on demand.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::sleep;

pub(crate) struct Relay {
    port: u16,
    swallows: Arc<AtomicBool>,
    accepting: JoinHandle<()>,
}

impl Relay {
    /// In front of the etcd at `endpoint`; every answer comes `late`.
    pub(crate) async fn to(endpoint: &str, late: Duration) -> Self {
        let target = endpoint.trim_start_matches("http://").to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let port = listener.local_addr().expect("an address").port();
        let swallows = Arc::new(AtomicBool::new(false));
        let swallowing = swallows.clone();
        let accepting = tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let far = TcpStream::connect(&target).await.expect("etcd is there");
                tokio::spawn(carry(near, far, late, swallowing.clone()));
            }
        });
        Self {
            port,
            swallows,
            accepting,
        }
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Whether what etcd answers is lost from now on, for connections that were made before as well.
    pub(crate) fn swallow(&self, swallow: bool) {
        self.swallows.store(swallow, Ordering::SeqCst);
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

/// Carries both ways until one end closes. A connection that has lost an answer never carries another.
async fn carry(near: TcpStream, far: TcpStream, late: Duration, swallows: Arc<AtomicBool>) {
    let ((mut asks, mut hears), (mut answers, mut asked)) = (near.into_split(), far.into_split());
    let there = async { tokio::io::copy(&mut asks, &mut asked).await.map(drop) };
    let back = async {
        let (mut buffer, mut lost) = (vec![0; 65_536], false);
        loop {
            let length = answers.read(&mut buffer).await?;
            if length == 0 {
                return std::io::Result::Ok(());
            }
            sleep(late).await;
            lost |= swallows.load(Ordering::SeqCst);
            if !lost {
                hears.write_all(&buffer[..length]).await?;
            }
        }
    };
    tokio::select! {
        _ = there => {}
        _ = back => {}
    }
}
