//! `ringmail cleanup`: in a simulated kernel that refuses, and in a real one.

use super::*;

/// A kernel that can be told to refuse a kind of object.
struct Stubborn {
    refuses: Option<Kind>,
    broken: Vec<Key>,
}

impl crate::kernel::Datapath for Stubborn {
    fn dump(&mut self) -> Result<Objects, WriteError> {
        Ok(Objects::new())
    }
    fn apply(&mut self, kind: Kind, writes: &mut [Write]) -> Vec<Result<(), WriteError>> {
        let refused = self.refuses == Some(kind);
        let result = |write: &mut Write| match &write.op {
            Op::Break(_) if refused => Err(WriteError::Unknown {
                op: write.op.to_string(),
            }),
            Op::Break(key) => {
                self.broken.push(key.clone());
                Ok(())
            }
            other => panic!("cleanup only breaks: {other}"),
        };
        writes.iter_mut().map(result).collect()
    }
    fn filter_stands(&mut self, _: Look) -> bool {
        true
    }

    fn filter_tells(&self) -> bool {
        true
    }
    fn answers(&mut self) -> Result<(), WriteError> {
        Ok(())
    }

    fn carried(&mut self) -> Result<Vec<(xfrm::SaId, u64)>, WriteError> {
        Ok(Vec::new())
    }

    fn counters(&mut self) -> Result<std::collections::BTreeMap<xfrm::SaId, crate::kernel::Counters>, WriteError> {
        Ok(Default::default())
    }
}

#[test]
fn cleanup_breaks_in_reverse_and_keeps_the_guard_while_anything_behind_it_stays() {
    let actual = audit::tests::desired();
    let mut whole = Stubborn {
        refuses: None,
        broken: vec![],
    };
    let mut outcome = cleanup::Outcome::default();
    assert!(!cleanup::clear(&mut whole, &actual, &mut outcome));
    let reversed: Vec<Key> = actual.keys().rev().cloned().collect();
    assert_eq!(whole.broken, reversed);
    assert_eq!((outcome.kernel.len(), outcome.failed.len()), (actual.len(), 0));
    for kind in [Kind::Route, Kind::Policy, Kind::Sa, Kind::Address, Kind::Link] {
        let mut stubborn = Stubborn {
            refuses: Some(kind),
            broken: vec![],
        };
        let mut outcome = cleanup::Outcome::default();
        assert!(cleanup::clear(&mut stubborn, &actual, &mut outcome), "{kind:?}");
        let behind = |key: &&Key| key.kind() > Kind::Guard && key.kind() != kind;
        let expected: Vec<Key> = actual.keys().rev().filter(behind).cloned().collect();
        assert_eq!(stubborn.broken, expected, "{kind:?}: the guard stays, all else goes");
    }
}

fn ip(arguments: &str) -> String {
    let output = Command::new("ip")
        .args(arguments.split(' '))
        .output()
        .expect("iproute2 is installed");
    assert!(
        output.status.success(),
        "ip {arguments}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// All that this namespace's kernel shows of what ringmail or the strangers of the test could have made; without what
/// settles by itself: a link's state, its multicast route, lifetimes. The firewall is not in it: `nft` may be missing.
fn kernel_text() -> String {
    let links = ip("-o link show");
    let links = links.lines().filter_map(|line| line.split(' ').nth(1));
    let addresses = ip("-o address show");
    let addresses = addresses.lines().filter_map(|line| line.split("valid_lft").next());
    let routes = ip("route show table all") + &ip("-6 route show table all");
    let routes = routes.lines().filter(|line| !line.contains("ff00::/8"));
    let policies = ip("xfrm policy list");
    let lines: Vec<&str> = links.chain(addresses).chain(routes).chain(policies.lines()).collect();
    lines.join("\n")
}

#[test]
fn cleanup_leaves_nothing_of_ours_and_all_that_is_not() {
    std::thread::spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("root makes a network namespace");
        ip("link set lo up");
        ip("link add eth0 type veth peer name far");
        for end in ["far", "eth0"] {
            // Without an address of its own making, which takes its time to settle.
            ip(&format!("link set {end} addrgenmode none"));
            ip(&format!("link set {end} up"));
        }
        ip("address add 192.0.2.1/24 dev eth0");
        // Strangers: a route, a policy and a device that are none of ours.
        ip("route add 10.99.0.0/16 via 192.0.2.254");
        ip("xfrm policy add dir out src 0.0.0.0/0 dst 10.98.0.0/16 priority 77 action block");
        ip("link add mine type bridge");
        let before = kernel_text();

        let desired = audit::tests::desired();
        let mut kernel = Netlink::open(&Options { prefer_nft: true }).unwrap();
        // This kernel may have no ESP: all but SAs, which real-kernel tests have.
        let mut made = 0;
        for (key, object) in desired
            .iter()
            .filter(|(key, _)| !matches!(key.kind(), Kind::Sa | Kind::Sysctl))
        {
            let index = nix::net::if_::if_nametoindex("eth0").unwrap();
            let (mut key, mut object) = (key.clone(), object.clone());
            if let (Key::Guard(_, id), Object::Policy(policy)) = (&mut key, &mut object)
                && id.selector.ifindex != 0
            {
                id.selector.ifindex = index;
                policy.id = *id;
            }
            let mut write = [Write {
                op: Op::Make(key.clone(), object),
                secret: None,
            }];
            kernel
                .apply(key.kind(), &mut write)
                .remove(0)
                .unwrap_or_else(|error| panic!("{key}: {error}"));
            made += 1;
        }
        drop(kernel);
        assert_ne!(kernel_text(), before);

        let folder = Folder::new();
        let run_dir = folder.join("run");
        let (leases, env) = (folder.join("leases"), folder.join("subnet.env"));
        std::fs::create_dir(&leases).unwrap();
        let node = crate::lease::NodeName::new("node-a").unwrap();
        let held = blocking(async {
            let store = crate::store::Store::open_dir(&leases).await.unwrap();
            let claim = crate::store::Claim {
                previous: None,
                public: Default::default(),
                random: 7,
            };
            let network = audit::tests::network();
            let held = store.acquire(&node, &network, &claim).await.unwrap();
            let other = crate::lease::NodeName::new("node-b").unwrap();
            store.acquire(&other, &network, &claim).await.unwrap();
            held
        })
        .unwrap();
        let text = crate::config::SubnetEnv {
            network: audit::tests::network(),
            subnets: held.subnets,
            mtu: 1446,
            ip_masq: true,
        };
        text.write(&env).unwrap();
        let note = crate::admin::Remembered {
            kube: None,
            lease_dir: Some(leases.clone()),
            etcd: None,
            public: Vec::new(),
            node,
            subnets: held.subnets.iter().collect(),
            subnet_file: Some(env.clone()),
        };
        note.write(&run_dir).unwrap();
        std::fs::write(run_dir.join("control.sock"), "").unwrap();

        let arguments = ["ringmail", "cleanup", "--json", "--run-dir", run_dir.to_str().unwrap()];
        // A running daemon is not cleaned up under.
        let daemon = crate::admin::Single::claim(&folder.join("elsewhere")).unwrap();
        let refused = execute(&arguments).unwrap_err();
        assert!(refused.to_string().contains("stop it first"), "{refused}");
        drop(daemon);
        assert!(env.exists());

        let shown = execute(&arguments).unwrap();
        assert_eq!(shown.code, 0, "{}", *shown.text);
        let outcome: serde_json::Value = serde_json::from_str(&shown.text).unwrap();
        assert_eq!(outcome["kernel"].as_array().unwrap().len(), made, "{outcome:#}");
        assert_eq!(kernel_text(), before);
        assert!(!env.exists() && !run_dir.exists());
        let left = std::fs::read_dir(&leases).unwrap().filter(|entry| {
            let name = entry.as_ref().unwrap().file_name().into_string().unwrap();
            name.contains("-24") || name.contains("-64")
        });
        assert_eq!(left.count(), 1, "the other node's lease stays");

        let again = execute(&["ringmail", "cleanup", "--run-dir", run_dir.to_str().unwrap()]).unwrap();
        assert_eq!(
            (again.code, again.text.lines().count()),
            (0, 1),
            "only the folder that it made: {}",
            *again.text
        );
        assert_eq!(kernel_text(), before);

        let (states, plugin) = (folder.join("states"), folder.join("flannel"));
        std::fs::create_dir_all(states.join("of-a-pod")).unwrap();
        std::fs::write(&plugin, "").unwrap();
        let also = [&states, &plugin].map(|path| format!("--also={}", path.display()));
        let also = [
            "ringmail",
            "cleanup",
            "--run-dir",
            run_dir.to_str().unwrap(),
            &also[0],
            &also[1],
        ];
        assert_eq!(execute(&also).unwrap().code, 1);
        assert!(plugin.exists(), "the pod's end needs it");
        std::fs::remove_dir(states.join("of-a-pod")).unwrap();
        assert_eq!(execute(&also).unwrap().code, 0);
        assert!(!states.exists() && !plugin.exists());
    })
    .join()
    .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}

#[test]
fn cleanup_leaves_another_programs_subnet_env() {
    std::thread::spawn(|| {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("root makes a network namespace");
        let folder = Folder::new();
        let env = folder.join("subnet.env");
        std::fs::write(&env, "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.9.1/24\n").unwrap();
        let run_dir = folder.join("run");
        let shown = execute(&[
            "ringmail",
            "cleanup",
            "--run-dir",
            run_dir.to_str().unwrap(),
            "--subnet-file",
            env.to_str().unwrap(),
        ])
        .unwrap();
        assert_eq!(shown.code, 0, "{}", *shown.text);
        assert!(env.exists());
        let missing = execute(&[
            "ringmail",
            "cleanup",
            "--run-dir",
            run_dir.to_str().unwrap(),
            "--lease-dir",
            "/nonexistent/folder",
            "--node-name",
            "node-a",
        ])
        .unwrap();
        assert_eq!(missing.code, 69, "{}", *missing.text);
    })
    .join()
    .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}
