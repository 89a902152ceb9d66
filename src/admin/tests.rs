//! The control socket between real ends, and the claim between real processes' sockets.

use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream as Blocking;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use serde_json::{Value, json};

use super::client::ask_within;
use super::*;
use crate::testing::Folder;

/// Short waits, so that a test of a stalling client takes no five seconds.
const SHORT: Patience = Patience {
    request: Duration::from_millis(300),
    answer: Duration::from_millis(300),
    reply: Duration::from_millis(300),
};

fn report() -> Report {
    serde_json::from_value(json!({
        "node": "node-a", "network": ["10.244.0.0/16"], "subnets": ["10.244.1.0/24"], "public": ["192.0.2.1"],
        "uplink": "eth0", "mtu": 1446, "cipher": "aes128gcm16", "encap": "false", "epoch": 1_764_000_000u64,
        "epoch_age": 4, "next_epoch": null, "psks": [], "complete": true, "problems": [], "rejected": {}, "peers": []
    }))
    .expect("a report")
}

/// A server in a folder of its own whose loop answers status and refuses rotation, on a thread with a runtime.
struct Server {
    folder: Folder,
    answered: Arc<AtomicUsize>,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Server {
    fn start() -> Self {
        let folder = Folder::new();
        let path = folder.path().to_owned();
        let answered = Arc::new(AtomicUsize::new(0));
        let count = answered.clone();
        let (stop, stopped) = oneshot::channel();
        let (ready, is_ready) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                let listener = listen(&path).unwrap();
                let (commands_in, mut commands) = mpsc::channel(4);
                tokio::spawn(async move {
                    let mut unanswered = Vec::new();
                    while let Some(command) = commands.recv().await {
                        count.fetch_add(1, Ordering::SeqCst);
                        match command {
                            Command::Status { reply } => drop(reply.send(report())),
                            Command::Rotate { reply } => drop(reply.send(Err("no PSK: give --psk-file".into()))),
                            // The loop that hangs, and the loop that drops what it was asked.
                            Command::Audit { reply } => unanswered.push(reply),
                            Command::Leases { reply } => drop(reply),
                            Command::Health { reply } => drop(reply),
                            Command::Measure { reply } => drop(reply),
                        }
                    }
                });
                ready.send(()).unwrap();
                tokio::select! {
                    () = serve_patiently(listener, commands_in, SHORT) => {}
                    _ = stopped => {}
                }
            });
        });
        is_ready.recv().unwrap();
        Self {
            folder,
            answered,
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    fn ask(&self, request: Request) -> Result<Value, AskError> {
        ask_within(self.folder.path(), request, Duration::from_secs(5))
    }

    fn connect(&self) -> Blocking {
        let stream = Blocking::connect(socket(self.folder.path())).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        stream
    }

    /// What the daemon replies to raw bytes.
    fn error_for(&self, bytes: &[u8]) -> String {
        let mut stream = self.connect();
        // It may have been refused and closed before all was written.
        let _ = stream.write_all(bytes);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut line = Vec::new();
        // The end is a reset where the server left bytes unread; the reply stands before it.
        let _ = stream.read_to_end(&mut line);
        let reply: Reply = serde_json::from_slice(&line).unwrap();
        assert_eq!(reply.answer, None);
        reply.error.unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.stop.take().unwrap().send(());
        self.thread.take().unwrap().join().unwrap();
    }
}

#[test]
fn a_question_is_answered_with_what_the_loop_says() {
    let server = Server::start();
    let answer = server.ask(Request::Status).unwrap();
    assert_eq!(serde_json::from_value::<Report>(answer).unwrap(), report());
    let refused = server.ask(Request::Rotate).unwrap_err();
    assert_eq!(refused.to_string(), "no PSK: give --psk-file");
}

#[test]
fn a_loop_that_hangs_or_has_gone_is_told_apart() {
    let server = Server::start();
    assert_eq!(
        server.ask(Request::Audit).unwrap_err().to_string(),
        "the daemon is too busy to answer: try again, and see its log"
    );
    assert_eq!(
        server.ask(Request::Leases).unwrap_err().to_string(),
        "the daemon is stopping"
    );
}

#[test]
fn the_socket_is_its_owners_alone_and_goes_with_the_server() {
    let server = Server::start();
    let path = socket(server.folder.path());
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
    let folder = server.folder.path().to_owned();
    let aside = std::fs::read_dir(&folder).unwrap().count();
    assert_eq!(aside, 1, "the temporary name is gone");
    drop(server);
    assert!(!path.exists());
}

#[test]
fn nonsense_is_answered_with_what_is_wrong_and_never_reaches_the_loop() {
    let server = Server::start();
    for (bytes, error) in [
        (&b"\x00\xff\xfe nonsense\n"[..], "the request is no JSON line"),
        (b"[]\n", "the request is no JSON line"),
        (b"{\"protocol\":1,\"ask\":\"explode\"}\n", "unknown request \"explode\""),
        (
            b"{\"protocol\":7,\"ask\":{\"new\":1}}\n",
            "the request is of protocol 7, this daemon",
        ),
        (
            b"{\"protocol\":1,\"ask\":\"status\"}",
            "the request ends without a line end",
        ),
        (b"", "the request ends without a line end"),
    ] {
        let found = server.error_for(bytes);
        assert!(found.starts_with(error), "{bytes:?}: {found}");
    }
    let long = [&b"{\"protocol\":1,\"ask\":\""[..], &vec![b'a'; 100_000]].concat();
    assert_eq!(
        server.error_for(&long[..REQUEST_MAX]),
        "the request is longer than 4096 bytes"
    );
    // Good but for its length.
    let padded = format!("{{\"protocol\":1,\"ask\":{}\"status\"}}\n", " ".repeat(REQUEST_MAX));
    assert_eq!(
        server.error_for(padded.as_bytes()),
        "the request is longer than 4096 bytes"
    );
    assert_eq!(server.answered.load(Ordering::SeqCst), 0);
    server.ask(Request::Status).unwrap();
}

#[test]
fn a_client_that_never_stops_writing_is_cut_off() {
    let server = Server::start();
    let mut stream = server.connect();
    let cut = (0..100_000).find(|_| stream.write_all(&[b'x'; 4096]).is_err());
    assert!(cut.is_some(), "400 MB were taken");
}

#[test]
fn a_client_that_stalls_is_told_and_holds_up_nobody() {
    let server = Server::start();
    let mut slow = server.connect();
    slow.write_all(b"{\"protocol\"").unwrap();
    let begun = Instant::now();
    server.ask(Request::Status).unwrap();
    assert!(begun.elapsed() < SHORT.request, "the others wait for the slow one");
    // It trickles: each byte comes in time, the whole does not.
    let mut reply = Vec::new();
    for _ in 0..10 {
        std::thread::sleep(Duration::from_millis(50));
        let _ = slow.write_all(b" ");
    }
    let _ = slow.read_to_end(&mut reply);
    let reply = String::from_utf8(reply).unwrap();
    assert!(reply.contains("no request came in time"), "{reply}");
}

#[test]
fn more_clients_than_slots_are_all_served() {
    let server = Server::start();
    let stalled: Vec<Blocking> = (0..CLIENTS).map(|_| server.connect()).collect();
    std::thread::scope(|scope| {
        let asking: Vec<_> = (0..200)
            .map(|_| scope.spawn(|| server.ask(Request::Status).is_ok()))
            .collect();
        assert!(asking.into_iter().all(|asked| asked.join().unwrap()));
    });
    drop(stalled);
    assert_eq!(server.answered.load(Ordering::SeqCst), 200);
}

#[test]
fn a_socket_left_by_a_killed_daemon_is_replaced() {
    let server = Server::start();
    let path = socket(server.folder.path());
    // What a killed process leaves: a bound name that nobody listens at.
    drop(std::os::unix::net::UnixListener::bind(server.folder.join("stale")).unwrap());
    std::fs::rename(server.folder.join("stale"), &path).unwrap();
    let gone = server.ask(Request::Status).unwrap_err();
    assert!(matches!(gone, AskError::NoDaemon(_)), "{gone}");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let _inside = runtime.enter();
    let listener = listen(server.folder.path()).unwrap();
    assert!(Blocking::connect(&path).is_ok());
    drop(listener);
    assert!(!path.exists());
}

#[test]
fn a_listener_leaves_its_successors_socket_alone() {
    let folder = Folder::new();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let _inside = runtime.enter();
    let first = listen(folder.path()).unwrap();
    let _second = listen(folder.path()).unwrap();
    drop(first);
    assert!(Blocking::connect(socket(folder.path())).is_ok());
}

#[test]
fn what_can_go_wrong_says_what_to_do_next() {
    let folder = Folder::new();
    let nobody = ask_within(folder.path(), Request::Status, Duration::from_secs(1)).unwrap_err();
    assert!(
        nobody
            .to_string()
            .contains("is ringmail running? See `systemctl status ringmail`"),
        "{nobody}"
    );

    let answers = |line: &'static [u8]| {
        let folder = Folder::new();
        let listener = std::os::unix::net::UnixListener::bind(socket(folder.path())).unwrap();
        let serving = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 256];
            let _ = stream.read(&mut request).unwrap();
            let _ = stream.write_all(line);
            std::thread::sleep(Duration::from_millis(if line.is_empty() { 500 } else { 0 }));
        });
        let error = ask_within(folder.path(), Request::Status, Duration::from_millis(200)).unwrap_err();
        serving.join().unwrap();
        error
    };
    let other = answers(b"{\"protocol\":2,\"version\":\"9.9.9\",\"answer\":{}}\n");
    assert!(
        other.to_string().contains("is ringmail 9.9.9 and speaks protocol 2"),
        "{other}"
    );
    let stranger = answers(b"SSH-2.0-OpenSSH\r\n");
    assert!(matches!(stranger, AskError::Garbage { .. }), "{stranger}");
    let silent = answers(b"");
    assert!(matches!(silent, AskError::Silent { .. }), "{silent}");

    let deep = folder.join(&"d".repeat(120));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let _inside = runtime.enter();
    let long = listen(&deep).unwrap_err();
    assert!(long.to_string().contains("give a shorter --run-dir"), "{long}");
}

#[test]
fn another_user_is_refused_by_its_credentials() {
    let (ours, theirs) = tokio_pair();
    assert_eq!(listen::admits(&ours), Ok(()), "root, or the same user");
    drop(theirs);
    if !nix::unistd::Uid::effective().is_root() {
        return;
    }
    // A socket pair's credentials are those of the moment it is made, so a thread that is another user then will do.
    let refused = std::thread::spawn(|| {
        let nobody = 65534;
        // SAFETY: setresuid with plain numbers; the raw system call changes this thread alone, which ends here.
        let changed = unsafe { nix::libc::syscall(nix::libc::SYS_setresuid, nobody, nobody, 0) };
        assert_eq!(changed, 0);
        let (stream, _other) = tokio_pair();
        // SAFETY: as above, back to root.
        let changed = unsafe { nix::libc::syscall(nix::libc::SYS_setresuid, 0, 0, 0) };
        assert_eq!(changed, 0);
        listen::admits(&stream)
    });
    let refused = refused.join().unwrap().unwrap_err();
    assert_eq!(refused, "user 65534 may not ask this daemon: run as root, with sudo");
}

fn tokio_pair() -> (UnixStream, UnixStream) {
    let runtime = Box::leak(Box::new(
        tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap(),
    ));
    let _inside = runtime.enter();
    UnixStream::pair().unwrap()
}

/// A thread in a network namespace of its own, where the abstract name is free.
fn apart<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    std::thread::spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("a network namespace needs root");
        work()
    })
    .join()
    .unwrap()
}

#[test]
fn a_second_daemon_is_refused_and_told_who_the_first_is() {
    apart(|| {
        let (first, second) = (Folder::new(), Folder::new());
        let claim = Single::claim(first.path()).unwrap();
        let written = std::fs::read_to_string(first.join("ringmail.pid")).unwrap();
        assert_eq!(written, format!("{}\n", std::process::id()));
        let refused = Single::claim(second.path()).unwrap_err().to_string();
        let (pid, folder) = (std::process::id(), first.path().display());
        assert!(refused.contains(&format!("pid {pid}")), "{refused}");
        // Other tests of this process may hold pid files too; with one daemon a process it is the right one.
        assert!(refused.contains("--run-dir /"), "{refused} {folder}");
        assert!(!second.join("ringmail.pid").exists(), "the refused one leaves nothing");
        drop(claim);
        assert!(!first.join("ringmail.pid").exists());
        Single::claim(second.path()).unwrap();
    });
}

#[test]
fn one_folder_is_one_daemons_even_across_network_namespaces() {
    let folder = Folder::new();
    let path = folder.path().to_owned();
    let (held, is_held) = std::sync::mpsc::channel();
    let (release, released) = std::sync::mpsc::channel::<()>();
    let there = path.clone();
    let holder = std::thread::spawn(move || {
        apart(move || {
            let claim = Single::claim(&there).unwrap();
            held.send(()).unwrap();
            let _ = released.recv();
            drop(claim);
        });
    });
    is_held.recv().unwrap();
    let again = path.clone();
    let refused = apart(move || Single::claim(&again).unwrap_err());
    let SingleError::Taken { other } = refused else {
        panic!("{refused}")
    };
    assert_eq!(other.pid, Some(i32::try_from(std::process::id()).unwrap()));
    assert_eq!(other.run_dir, Some(path.clone()));
    drop(release);
    holder.join().unwrap();
    apart(move || drop(Single::claim(&path).unwrap()));
}

#[test]
fn a_pid_file_that_a_killed_daemon_left_is_no_claim() {
    apart(|| {
        let folder = Folder::new();
        std::fs::write(folder.join("ringmail.pid"), "999999\nand more than before\n").unwrap();
        let _claim = Single::claim(folder.path()).unwrap();
        let written = std::fs::read_to_string(folder.join("ringmail.pid")).unwrap();
        assert_eq!(written, format!("{}\n", std::process::id()));
    });
}

#[test]
fn what_was_noted_is_read_back() {
    let folder = Folder::new();
    assert_eq!(Remembered::read(folder.path()).unwrap(), None);
    let note = Remembered {
        kube: None,
        lease_dir: Some("/var/lib/ringmail".into()),
        etcd: None,
        public: vec!["192.0.2.1".parse().unwrap()],
        node: NodeName::new("node-a").unwrap(),
        subnets: vec!["10.244.1.0/24".parse().unwrap(), "fd00:244:0:1::/64".parse().unwrap()],
        subnet_file: None,
    };
    note.write(&folder.join("deeper")).unwrap();
    assert_eq!(Remembered::read(&folder.join("deeper")).unwrap(), Some(note));
    std::fs::write(folder.join("state.json"), "{}").unwrap();
    let garbage = Remembered::read(folder.path()).unwrap_err();
    assert!(
        garbage.to_string().contains("give --lease-dir and --node-name"),
        "{garbage}"
    );
}

#[test]
fn claims_that_come_and_go_at_once_never_overlap() {
    let folder = Folder::new();
    let holders = Arc::new(AtomicUsize::new(0));
    let claimants: Vec<_> = (0..4)
        .map(|_| {
            let (path, holders) = (folder.path().to_owned(), holders.clone());
            std::thread::spawn(move || {
                apart(move || {
                    let claims = (0..2000).filter_map(|_| Single::claim_now(&path).ok());
                    claims
                        .map(|claim| {
                            assert_eq!(holders.fetch_add(1, Ordering::SeqCst), 0, "two hold one folder");
                            std::thread::yield_now();
                            holders.fetch_sub(1, Ordering::SeqCst);
                            drop(claim);
                        })
                        .count()
                })
            })
        })
        .collect();
    let claims: usize = claimants.into_iter().map(|claimant| claimant.join().unwrap()).sum();
    assert!(claims > 0);
}
