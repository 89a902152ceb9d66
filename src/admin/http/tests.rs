//! A client on loopback, and a loop that is told what to say.

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use super::*;
use crate::admin::metrics::Measures;
use crate::admin::metrics::sample::measures;

fn vitals() -> Vitals {
    Vitals {
        kernel: Ok(()),
        datapath: Datapath::Works,
        uplink: None,
        problems: vec!["no lease yet".into()],
    }
}

/// A server, and the loop that answers with `vitals` and with the sample of measures, as often as it is asked.
async fn served(vitals: Option<Vitals>) -> SocketAddr {
    let listener = bind("127.0.0.1:0".parse().expect("an address")).await.expect("bound");
    let address = listener.local_addr().expect("an address");
    let way = Loop::default();
    if let Some(vitals) = vitals {
        let (commands_in, mut commands) = mpsc::channel(1);
        way.set(commands_in).expect("once");
        tokio::spawn(async move {
            while let Some(command) = commands.recv().await {
                match command {
                    Command::Health { reply } => drop(reply.send(vitals.clone())),
                    Command::Measure { reply } => drop(reply.send(measures())),
                    other => panic!("{other:?} is not asked for here"),
                }
            }
        });
    }
    tokio::spawn(serve(listener, way, Readings::default(), PerPeer::Hidden));
    address
}

/// What comes back for `request`: the head and the body.
async fn ask(address: SocketAddr, request: &str) -> (String, String) {
    let mut stream = TcpStream::connect(address).await.expect("connected");
    stream.write_all(request.as_bytes()).await.expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("read");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head and a body");
    (head.to_owned(), body.to_owned())
}

async fn get(address: SocketAddr, path: &str) -> (u16, String) {
    let (head, body) = ask(address, &format!("GET {path} HTTP/1.1\r\nHost: node\r\n\r\n")).await;
    (head[9..12].parse().expect("a status"), body)
}

#[tokio::test]
async fn health_and_readiness_follow_the_facts_and_say_why() {
    let starting = served(None).await;
    assert_eq!(get(starting, "/healthz").await.0, 200, "a restart would not help");
    let (status, body) = get(starting, "/readyz").await;
    assert_eq!((status, body.starts_with("starting: ")), (503, true), "{body}");

    let good = served(Some(vitals())).await;
    assert_eq!(
        get(good, "/healthz").await,
        (200, "the loop turns and the kernel answers\n".into())
    );
    let ready = "ready: lease held, the node's own datapath in order, subnet.env written";
    assert_eq!(get(good, "/readyz").await, (200, format!("{ready}\n")));
    assert_eq!(get(good, "/").await.0, 404);
    let (head, _) = ask(
        good,
        "POST /healthz HTTP/1.1\r\nHost: node\r\nContent-Length: 0\r\n\r\n",
    )
    .await;
    assert!(head.starts_with("HTTP/1.1 405"), "{head}");

    let cut_off = Vitals {
        uplink: Some("eth0 is down".into()),
        ..vitals()
    };
    let but = "; but there is no uplink now, other nodes may be out of reach: eth0 is down";
    assert_eq!(
        get(served(Some(cut_off)).await, "/readyz").await,
        (200, format!("{ready}{but}\n"))
    );
    let waiting = Vitals {
        datapath: Datapath::Starting,
        ..vitals()
    };
    assert_eq!(
        get(served(Some(waiting)).await, "/readyz").await,
        (503, "not ready yet: no lease yet\n".into())
    );
    let broken = Vitals {
        kernel: Err("no buffer space".into()),
        datapath: Datapath::Broken("node: make route: no such device".into()),
        ..vitals()
    };
    let broken = served(Some(broken)).await;
    assert_eq!(get(broken, "/healthz").await, (503, "no buffer space\n".into()));
    assert_eq!(
        get(broken, "/readyz").await,
        (503, "node: make route: no such device\n".into())
    );
}

#[tokio::test]
async fn a_loop_that_has_ended_is_not_healthy() {
    let listener = bind("127.0.0.1:0".parse().expect("an address")).await.expect("bound");
    let address = listener.local_addr().expect("an address");
    let way = Loop::default();
    way.set(mpsc::channel(1).0).expect("once");
    tokio::spawn(serve(listener, way, Readings::default(), PerPeer::Hidden));
    for path in ["/healthz", "/readyz"] {
        assert_eq!(get(address, path).await, (503, "the daemon's loop has ended\n".into()));
    }
}

#[tokio::test]
async fn clients_that_say_nothing_or_nonsense_do_not_keep_others_out() {
    let address = served(Some(vitals())).await;
    let mut silent = Vec::new();
    for _ in 0..CLIENTS - 1 {
        silent.push(TcpStream::connect(address).await.expect("connected"));
    }
    let mut stream = TcpStream::connect(address).await.expect("connected");
    stream.write_all(b"\x16\x03\x01 no HTTP\r\n\r\n").await.expect("sent");
    let _ = stream.read_to_end(&mut Vec::new()).await;
    assert_eq!(get(address, "/healthz").await.0, 200);
}

/// A server whose loop is the test.
async fn asked() -> (SocketAddr, mpsc::Receiver<Command>) {
    let listener = bind("127.0.0.1:0".parse().expect("an address")).await.expect("bound");
    let address = listener.local_addr().expect("an address");
    let way = Loop::default();
    let (commands_in, commands) = mpsc::channel(64);
    way.set(commands_in).expect("once");
    tokio::spawn(serve(listener, way, Readings::default(), PerPeer::Hidden));
    (address, commands)
}

/// The next question for measures.
async fn measure(commands: &mut mpsc::Receiver<Command>) -> oneshot::Sender<Measures> {
    match timeout(TURN / 2, commands.recv()).await {
        Ok(Some(Command::Measure { reply })) => reply,
        other => panic!("{other:?} in the place of the question for measures"),
    }
}

/// A reading that can be told from others.
fn numbered(probes: u64) -> Measures {
    Measures { probes, ..measures() }
}

fn has(body: &str, probes: u64) -> bool {
    body.contains(&format!("\nringmail_probes_sent_total {probes}\n"))
}

#[tokio::test]
async fn who_reads_metrics_again_and_again_does_not_keep_health_out() {
    let (address, mut commands) = asked().await;
    let readers: Vec<_> = (0..CLIENTS).map(|_| tokio::spawn(get(address, "/metrics"))).collect();
    // Some wait for the one reading; the others have gone with an answer.
    let reply = measure(&mut commands).await;
    let health = tokio::spawn(get(address, "/healthz"));
    match timeout(TURN / 2, commands.recv()).await {
        Ok(Some(Command::Health { reply })) => drop(reply.send(vitals())),
        other => panic!("{other:?} in the place of the question for health"),
    }
    assert_eq!(health.await.expect("no panic").0, 200);
    let _ = reply.send(measures());
    let mut answers = Vec::new();
    for reader in readers {
        answers.push(reader.await.expect("no panic").0);
    }
    answers.sort_unstable();
    assert_eq!(answers, [vec![200; READERS], vec![503; CLIENTS - READERS]].concat());
}

#[tokio::test]
async fn readers_at_one_time_and_soon_after_share_a_reading_that_took_long_and_later_ones_do_not() {
    let (address, mut commands) = asked().await;
    let readers: Vec<_> = (0..READERS).map(|_| tokio::spawn(get(address, "/metrics"))).collect();
    let reply = measure(&mut commands).await;
    // As with many peers.
    tokio::time::sleep(Duration::from_millis(400)).await;
    let _ = reply.send(numbered(4711));
    for reader in readers {
        let (status, body) = reader.await.expect("no panic");
        assert!(status == 200 && has(&body, 4711), "{status} {body}");
    }
    assert!(has(&get(address, "/metrics").await.1, 4711));
    assert!(commands.try_recv().is_err(), "the loop was asked once");
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let later = tokio::spawn(get(address, "/metrics"));
    let _ = measure(&mut commands).await.send(numbered(4712));
    assert!(has(&later.await.expect("no panic").1, 4712));
}

#[tokio::test]
async fn a_reading_that_takes_no_time_is_not_old_a_moment_later() {
    let (address, mut commands) = asked().await;
    for probes in [1, 2] {
        let begun = std::time::Instant::now();
        let reader = tokio::spawn(get(address, "/metrics"));
        let _ = measure(&mut commands).await.send(numbered(probes));
        assert!(has(&reader.await.expect("no panic").1, probes));
        tokio::time::sleep(begun.elapsed() * 4 + Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn who_asks_and_goes_away_leaves_the_reading_to_the_next() {
    let (address, mut commands) = asked().await;
    let mut gone = TcpStream::connect(address).await.expect("connected");
    gone.write_all(b"GET /metrics HTTP/1.1\r\nHost: node\r\n\r\n")
        .await
        .expect("sent");
    let reply = measure(&mut commands).await;
    drop(gone);
    let next = tokio::spawn(get(address, "/metrics"));
    let more = timeout(Duration::from_millis(300), commands.recv()).await;
    assert!(more.is_err(), "{more:?}");
    let _ = reply.send(numbered(7));
    assert!(has(&next.await.expect("no panic").1, 7));
}

#[tokio::test]
async fn a_port_that_is_taken_is_named_with_the_flags() {
    let taken = bind("127.0.0.1:0".parse().expect("an address")).await.expect("bound");
    let address = taken.local_addr().expect("an address");
    let text = bind(address).await.expect_err("taken").to_string();
    assert!(
        text.contains(&address.to_string()) && text.contains("--healthz-port"),
        "{text}"
    );
}

#[tokio::test]
async fn metrics_are_served_as_openmetrics_also_while_the_daemon_starts() {
    let request = "GET /metrics HTTP/1.1\r\nHost: node\r\n\r\n";
    let (head, body) = ask(served(Some(vitals())).await, request).await;
    assert!(head.contains("application/openmetrics-text"), "{head}");
    assert!(
        body.contains("\nringmail_configuration_refused 1.0\n") && body.ends_with("# EOF\n"),
        "{body}"
    );
    assert!(!body.contains("peer=\""), "{body}");
    let (_, starting) = ask(served(None).await, request).await;
    assert!(starting.contains("\nringmail_ready 0.0\n"), "{starting}");
}
