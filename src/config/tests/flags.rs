//! Flags and variables: Go's style, precedence, every wrong value's text.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt as _;

use proptest::prelude::*;

use crate::config::*;
use crate::lease::NodeName;
use crate::uplink::Iface;

fn environment(variables: &[(&str, &str)]) -> Environment {
    let variables = variables
        .iter()
        .map(|(name, value)| (OsString::from(name), OsString::from(value)));
    Environment {
        variables: variables.collect(),
        hostname: Some("host-a".into()),
    }
}

fn parse(arguments: &[&str], variables: &[(&str, &str)]) -> Result<Wanted, UsageError> {
    Flags::from_args(arguments.iter().map(OsString::from), &environment(variables))
}

pub(super) fn run(arguments: &[&str]) -> Flags {
    run_with(arguments, &[])
}

fn run_with(arguments: &[&str], variables: &[(&str, &str)]) -> Flags {
    match parse(arguments, variables) {
        Ok(Wanted::Run(flags)) => *flags,
        other => panic!("{arguments:?}: {other:?}"),
    }
}

const DIR: &str = "--lease-dir=/leases";

#[test]
fn defaults_are_flanneds() {
    let flags = run(&[DIR]);
    assert_eq!(flags.etcd_endpoints, "http://127.0.0.1:4001,http://127.0.0.1:2379");
    assert_eq!(flags.etcd_prefix, "/coreos.com/network");
    assert_eq!(flags.subnet_file.to_str(), Some("/run/flannel/subnet.env"));
    assert_eq!(flags.net_config_path.to_str(), Some("/etc/kube-flannel/net-conf.json"));
    assert_eq!(flags.kube_annotation_prefix, "flannel.alpha.coreos.com");
    assert_eq!(
        (
            flags.subnet_lease_renew_margin,
            flags.iptables_resync,
            flags.healthz_port
        ),
        (60, 5, 0)
    );
    assert_eq!(flags.healthz_ip.to_string(), "0.0.0.0");
    assert!(flags.set_node_network_unavailable && flags.iptables_forward_rules);
    assert!(!flags.ip_masq && !flags.kube_subnet_mgr && !flags.ip_blackhole_route && !flags.version);
    assert_eq!((flags.v, flags.run_dir.to_str()), (0, Some("/run/ringmail")));
    assert_eq!(flags.node_name.as_str(), "host-a");
    assert!(matches!(flags.store(), Ok(Store::Dir(folder)) if folder.to_str() == Some("/leases")));
    assert!(flags.warnings().is_empty());
}

#[test]
fn one_dash_and_two_dashes_equals_and_space_are_the_same() {
    for arguments in [
        ["--iface=eth1", "--ip-masq", "-v=2", DIR].as_slice(),
        &["-iface", "eth1", "-ip-masq=true", "-v", "2", DIR],
        &["--iface", "eth1", "--ip-masq=T", "--v", "2", "-lease-dir", "/leases"],
    ] {
        let flags = run(arguments);
        assert_eq!(flags.iface, [Iface::Name("eth1".into())]);
        assert!(flags.ip_masq);
        assert_eq!(flags.v, 2);
    }
    let list = run(&[
        DIR,
        "-iface",
        "10.0.0.1",
        "--iface=eth1",
        "--iface-regex=^10",
        "--iface-regex",
        "eth.*",
    ]);
    assert_eq!((list.iface.len(), list.iface_regex.len()), (2, 2));
    assert_eq!(list.iface[0], Iface::Address("10.0.0.1".parse().unwrap()));
    assert_eq!(
        run(&[DIR, "--v=1", "--v=3"]).v,
        3,
        "the last of a flag counts, as in Go"
    );
    assert_eq!(run(&[DIR, "--v", "-1"]).v, -1, "a value may begin with a dash");
    assert!(!run(&[DIR, "--ip-masq", "--ip-masq=false"]).ip_masq);
}

#[test]
fn a_flag_goes_before_its_variable_and_the_variable_before_the_default() {
    let variables = [
        ("FLANNELD_V", "5"),
        ("FLANNELD_IP_MASQ", "true"),
        ("FLANNELD_LOG_BACKTRACE_AT", "a:1"),
    ];
    let flags = run_with(&[DIR], &variables);
    assert_eq!(
        (flags.v, flags.ip_masq, flags.log_backtrace_at.as_str()),
        (5, true, "a:1")
    );
    assert_eq!(run_with(&[DIR, "-v=1"], &variables).v, 1);
    let iface = run_with(&[DIR, "--iface=a"], &[("FLANNELD_IFACE", "b")]).iface;
    assert_eq!(iface, [Iface::Name("a".into())], "a variable adds nothing to a flag");
    let empty = [
        ("FLANNELD_HEALTHZ_PORT", ""),
        ("FLANNELD_PUBLIC_IP", ""),
        ("NODE_NAME", ""),
    ];
    let flags = run_with(&[DIR, "--public-ip="], &empty);
    assert_eq!(
        (flags.healthz_port, flags.public_ip, flags.node_name.as_str()),
        (0, None, "host-a")
    );
    assert_eq!(run_with(&[DIR], &[("NODE_NAME", "n1")]).node_name.as_str(), "n1");
    assert_eq!(
        run_with(&[DIR, "--node-name=n2"], &[("NODE_NAME", "n1")])
            .node_name
            .as_str(),
        "n2"
    );
    assert_eq!(
        run_with(&[DIR], &[("FLANNELD_VERSION", "v0.28.9")]).v,
        0,
        "images carry it for other ends"
    );
}

/// The golden list: each wrong command line or environment and the whole text that it gets.
#[test]
fn every_wrong_flag_or_variable_is_refused_naming_it_the_value_and_what_would_be_right() {
    for (arguments, variables, text) in GOLDEN {
        let error = parse(arguments, variables).expect_err(text);
        assert_eq!(error.to_string(), *text, "{arguments:?} {variables:?}");
    }
    assert_eq!(UsageError::EXIT_CODE, 64);
}

type Wrong = (
    &'static [&'static str],
    &'static [(&'static str, &'static str)],
    &'static str,
);

const GOLDEN: &[Wrong] = &[
    (
        &["--ifac=eth0"],
        &[],
        "flag --ifac is unknown; did you mean --iface?; `ringmail run --help` lists all flags",
    ),
    (
        &["-x"],
        &[],
        "flag --x is unknown; `ringmail run --help` lists all flags",
    ),
    (
        &["--no-such-thing"],
        &[],
        "flag --no-such-thing is unknown; `ringmail run --help` lists all flags",
    ),
    (
        &["eth0"],
        &[],
        "argument \"eth0\" belongs to no flag; `ringmail run --help` lists all flags",
    ),
    (
        &["--ip-masq", "true"],
        &[],
        "argument \"true\" belongs to no flag; `ringmail run --help` lists all flags",
    ),
    (
        &["--", "-v"],
        &[],
        "argument \"--\" belongs to no flag; `ringmail run --help` lists all flags",
    ),
    (&["--iface"], &[], "flag --iface needs a value: --iface=NAME|IP"),
    (
        &["--healthz-port=x"],
        &[],
        "--healthz-port is \"x\": a port from 0 to 65535 is needed",
    ),
    (
        &["--healthz-port=65536"],
        &[],
        "--healthz-port is \"65536\": a port from 0 to 65535 is needed",
    ),
    (
        &[],
        &[("FLANNELD_HEALTHZ_PORT", "x")],
        "--healthz-port (from FLANNELD_HEALTHZ_PORT) is \"x\": a port from 0 to 65535 is needed",
    ),
    (
        &["--ip-masq=maybe"],
        &[],
        "--ip-masq is \"maybe\": true or false is needed",
    ),
    (&["--ip-masq="], &[], "--ip-masq is \"\": true or false is needed"),
    (
        &[],
        &[("FLANNELD_IP_MASQ", "ja")],
        "--ip-masq (from FLANNELD_IP_MASQ) is \"ja\": true or false is needed",
    ),
    (
        &["--public-ip=fd00::1"],
        &[],
        "--public-ip is \"fd00::1\": an IPv4 address of one host is needed",
    ),
    (
        &["--public-ip=127.0.0.1"],
        &[],
        "--public-ip is \"127.0.0.1\": an IPv4 address of one host is needed",
    ),
    (
        &["--public-ipv6=10.0.0.1"],
        &[],
        "--public-ipv6 is \"10.0.0.1\": an IPv6 address of one host is needed",
    ),
    (
        &["--iface-can-reach=here"],
        &[],
        "--iface-can-reach is \"here\": an IP address is needed",
    ),
    (
        &["--iface=a b"],
        &[],
        "--iface is \"a b\": an interface's name (1 to 127 characters without space or slash) or address is needed",
    ),
    (
        &["--iface-regex=eth("],
        &[],
        "--iface-regex is \"eth(\": could not compile the IP address regex; unclosed group",
    ),
    (
        &["--subnet-lease-renew-margin=1440"],
        &[],
        "--subnet-lease-renew-margin is \"1440\": Invalid subnet-lease-renew-margin option, out of acceptable range; \
         1 to 1439 minutes are needed",
    ),
    (
        &["--subnet-lease-renew-margin=0"],
        &[],
        "--subnet-lease-renew-margin is \"0\": Invalid subnet-lease-renew-margin option, out of acceptable range; \
         1 to 1439 minutes are needed",
    ),
    (
        &["--metrics-peers=some"],
        &[],
        "--metrics-peers is \"some\": true or false is needed",
    ),
    (
        &["--metrics=9600"],
        &[],
        "--metrics is \"9600\": an address and a port such as 127.0.0.1:9600 are needed",
    ),
    (
        &["--iptables-resync=-5"],
        &[],
        "--iptables-resync is \"-5\": a whole number of seconds is needed",
    ),
    (
        &[DIR],
        &[("NODE_NAME", "a/b")],
        "--node-name (from NODE_NAME) is \"a/b\": 1 to 253 printable ASCII characters without space or slash are needed",
    ),
    (
        &["--kube-subnet-mgr", "--kube-annotation-prefix=org"],
        &[],
        "--kube-annotation-prefix is \"org\": subnet/kube: prefix must be in a format: fqdn/[0-9a-z-_]*",
    ),
    (
        &[DIR, "--kube-subnet-mgr"],
        &[],
        "--kube-subnet-mgr and --lease-dir name two stores: leave one of them out",
    ),
    (
        &[DIR, "--psk-secret=psk"],
        &[],
        "--psk-secret is \"psk\": a namespace and a name such as kube-system/ringmail-psk are needed",
    ),
    (
        &[DIR, "--psk-secret=a/b", "--psk-file=/psk"],
        &[],
        "--psk-file and --psk-secret name two places of the PSK: leave one of them out",
    ),
    (
        &["--etcd-endpoints=127.0.0.1:2379"],
        &[],
        "--etcd-endpoints: \"127.0.0.1:2379\" is no URL of etcd: URLs such as \
         http://192.0.2.1:2379,http://192.0.2.2:2379 are needed",
    ),
    (
        &["--etcd-certfile=/c"],
        &[],
        "--etcd-certfile needs --etcd-keyfile beside it",
    ),
    (
        &["--etcd-cafile=/ca", "--etcd-endpoints=http://a:1"],
        &[],
        "--etcd-endpoints http://a:1: the files for TLS are given, so https:// is needed",
    ),
    (
        &["--etcd-username=u"],
        &[],
        "--etcd-username needs a password: the variable FLANNELD_ETCD_PASSWORD, or --etcd-password",
    ),
];

#[test]
fn a_host_name_that_is_none_asks_for_the_flag() {
    let nameless = Environment {
        variables: Vec::new(),
        hostname: None,
    };
    let error = Flags::from_args([OsString::from(DIR)], &nameless).unwrap_err();
    assert_eq!(
        error.to_string(),
        "this host has no name: give --node-name NAME or the variable NODE_NAME"
    );
    let odd = Environment {
        variables: Vec::new(),
        hostname: Some("a b".into()),
    };
    let error = Flags::from_args([OsString::from(DIR)], &odd).unwrap_err().to_string();
    assert!(
        error.starts_with("--node-name (from the host name) is \"a b\": 1 to 253 printable"),
        "{error}"
    );
    assert!(matches!(
        Flags::from_args(["--version".into()], &nameless),
        Ok(Wanted::Version)
    ));
    assert!(
        Environment::of_process()
            .variables
            .iter()
            .any(|(name, _)| name == "PATH")
    );
}

#[test]
fn help_and_version_need_nothing_else_and_help_names_the_variables() {
    for help in ["-h", "--help", "-help"] {
        let Ok(Wanted::Help(text)) = parse(&[help], &[("FLANNELD_V", "bad")]) else {
            panic!("{help}")
        };
        assert!(
            text.contains("[FLANNELD_IFACE_REGEX]") && text.contains("[NODE_NAME]"),
            "{text}"
        );
    }
    assert!(matches!(parse(&["-version"], &[]), Ok(Wanted::Version)));
}

#[test]
fn health_and_metrics_are_served_where_they_are_asked_for_and_once() {
    let places = |flags: &[&str]| {
        let flags: Vec<&str> = std::iter::once(DIR).chain(flags.iter().copied()).collect();
        run(&flags).http().iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert!(places(&[]).is_empty());
    assert_eq!(places(&["--healthz-port=8081"]), ["0.0.0.0:8081"]);
    let both = ["--healthz-ip=127.0.0.1", "--healthz-port=8081"];
    assert_eq!(
        places(&[both[0], both[1], "--metrics=127.0.0.1:8081"]),
        ["127.0.0.1:8081"]
    );
    assert_eq!(
        places(&[both[1], "--metrics=[::1]:9600"]),
        ["0.0.0.0:8081", "[::1]:9600"]
    );
    assert!(run(&[DIR]).metrics_peers && run(&[DIR, "--metrics-peers"]).metrics_peers);
    assert!(!run(&[DIR, "--metrics-peers=false"]).metrics_peers);
}

#[test]
fn what_has_no_effect_is_warned_of_only_where_it_was_given() {
    let flags = run(&[
        DIR,
        "--iptables-forward-rules=false",
        "--kubeconfig-file=/k",
        "--vmodule=x=1",
    ]);
    let warnings = flags.warnings();
    assert_eq!(warnings.len(), 2, "{warnings:?}");
    assert_eq!(
        run(&[DIR, "--iptables-resync=7", "--iptables-forward-rules"]).warnings(),
        Vec::<String>::new()
    );
    let secret = run(&[
        DIR,
        "--kubeconfig-file=/k",
        "--kube-api-url=https://a",
        "--psk-secret=a/b",
    ]);
    assert_eq!(secret.warnings(), Vec::<String>::new());
    assert_eq!(
        odd_variables(&environment(&[
            ("FLANNELD_IFAEC", "x"),
            ("FLANNELD_IFACE", "x"),
            ("FLANNELD_PORT_80_TCP", "x")
        ])),
        ["variable FLANNELD_IFAEC is ignored; did you mean FLANNELD_IFACE?"]
    );
}

#[test]
fn on_kubernetes_the_node_is_named_by_flag_variable_pod_or_host() {
    use crate::store::kube::Own;

    let pod = [("POD_NAMESPACE", "kube-flannel"), ("POD_NAME", "ds-x")];
    let named = |name: &str| Own::Named(NodeName::new(name).unwrap());
    let of_pod = Own::OfPod {
        namespace: "kube-flannel".into(),
        name: "ds-x".into(),
    };
    for (flag, variables, own) in [
        ("", &pod[..], of_pod),
        ("", &pod[..1], named("host-a")),
        ("--node-name=n", &pod, named("n")),
        ("", &[pod[0], pod[1], ("NODE_NAME", "m")], named("m")),
    ] {
        let arguments = [
            "--kube-subnet-mgr",
            "-kubeconfig-file",
            "/k",
            "--kube-annotation-prefix=org.com",
            flag,
        ];
        let given = if flag.is_empty() { &arguments[..4] } else { &arguments };
        let flags = run_with(given, variables);
        assert!(flags.warnings().is_empty(), "{:?}", flags.warnings());
        let Ok(Store::Kube(access)) = flags.store() else {
            panic!("{:?}", flags.store())
        };
        assert_eq!(access.own, own);
        assert_eq!(
            (access.keys.prefix(), access.to_string()),
            ("org.com/", "/k".to_owned())
        );
    }
}

#[test]
fn a_password_is_never_shown() {
    let password = "geheim-0815";
    let error = parse(&["--etcd-password", password], &[]).unwrap_err();
    assert!(!format!("{error} {error:?}").contains(password));
    let hidden =
        <Flags as clap::Parser>::try_parse_from(["x", "--node-name=n", "--etcd-password=geheim-0815"]).unwrap();
    assert!(!format!("{hidden:?}").contains(password));
    assert_eq!(hidden.etcd_password.as_ref().map(flags::Hidden::reveal), Some(password));
}

fn argument() -> impl Strategy<Value = Vec<u8>> {
    let names = [
        "--iface",
        "-v",
        "--ip-masq",
        "--public-ip",
        "--",
        "-",
        "--lease-dir",
        "--iface-regex",
        "--healthz-port=",
    ];
    prop_oneof![
        prop::collection::vec(any::<u8>(), 0..12),
        prop::sample::select(names.to_vec()).prop_map(|name| name.as_bytes().to_vec()),
        (prop::sample::select(names.to_vec()), any::<String>()).prop_map(|(n, v)| format!("{n}={v}").into_bytes()),
    ]
}

proptest! {
    #[test]
    fn arbitrary_arguments_and_variables_never_panic(
        arguments in prop::collection::vec(argument(), 0..6), value in prop::collection::vec(any::<u8>(), 0..8),
    ) {
        let environment = Environment {
            variables: vec![("FLANNELD_PUBLIC_IP".into(), OsString::from_vec(value.clone()))],
            hostname: Some(OsString::from_vec(value)),
        };
        drop(Flags::from_args(arguments.into_iter().map(OsString::from_vec), &environment));
    }

    #[test]
    fn normalising_twice_changes_nothing_more(arguments in prop::collection::vec(argument(), 0..6)) {
        let arguments: Vec<_> = arguments.into_iter().map(OsString::from_vec).collect();
        // A flag without a value at the end would take the word that now follows; there is none.
        let once = normalise(arguments);
        prop_assert_eq!(normalise(once.clone()), once);
    }
}
