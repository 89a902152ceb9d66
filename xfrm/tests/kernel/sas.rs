//! SAs: made, read back, changed, removed, refused.

use xfrm::{Aead, Batch, Encap, Limits, Sa, SaDirection, SaId, Xfrm};

use crate::{CIPHERS, add, address, key, own_namespace, sa, sas};

#[test]
#[ignore = "needs a kernel with ESP: tests/run runs it in one"]
fn sas_of_every_cipher_family_and_encapsulation_are_shown_as_they_were_added_until_they_are_deleted() {
    own_namespace();
    let mut xfrm = Xfrm::open().unwrap();
    let mut wanted = Vec::new();
    for algorithm in CIPHERS {
        for (src, dst) in [("192.0.2.1", "192.0.2.2"), ("2001:db8::1", "2001:db8::2")] {
            for encap in [
                None,
                Some(Encap {
                    sport: 4500,
                    dport: 4501,
                }),
            ] {
                for (esn, replay_window) in [(true, 1024), (false, 32), (false, 64)] {
                    let (src, dst) = (address(src), address(dst));
                    let spi = 0x1000 + wanted.len() as u32;
                    wanted.push(Sa {
                        src,
                        dst,
                        encap,
                        esn,
                        replay_window,
                        algorithm: algorithm.clone(),
                        ..sa(spi)
                    });
                }
            }
        }
    }
    wanted.push(Sa {
        af_unspec: false,
        limits: Limits::default(),
        reqid: 0,
        ..sa(0x2000)
    });
    wanted.push(Sa {
        limits: Limits {
            soft_bytes: 5,
            hard_bytes: 6,
            ..Limits::default()
        },
        ..sa(0x2001)
    });
    let mut batch = Batch::new();
    wanted.iter().for_each(|sa| batch.add_sa(sa, &key(sa)));
    assert!(xfrm.execute(batch).iter().all(Result::is_ok));

    let mut found: Vec<Sa> = sas(&mut xfrm).into_iter().map(|info| info.sa).collect();
    found.sort_by_key(|sa| sa.spi);
    assert_eq!(found, wanted);
    for sa in &wanted {
        assert_eq!(xfrm.get_sa(&sa.id()).unwrap().map(|info| info.sa), Some(sa.clone()));
    }

    let mut batch = Batch::new();
    wanted.iter().for_each(|sa| batch.delete_sa(&sa.id()));
    assert!(xfrm.execute(batch).iter().all(Result::is_ok));
    assert_eq!(xfrm.dump_sas(), Ok(vec![]));
    assert_eq!(xfrm.get_sa(&wanted[0].id()), Ok(None));
    let mut batch = Batch::new();
    batch.delete_sa(&wanted[0].id());
    let error = xfrm.execute(batch).remove(0).unwrap_err();
    assert!(error.is_gone() && !error.exists() && !error.is_unknown(), "{error}");
}

#[test]
#[ignore = "needs a kernel with ESP: tests/run runs it in one"]
fn one_refused_sa_in_a_batch_of_three_hundred_is_the_only_one_refused() {
    own_namespace();
    let mut xfrm = Xfrm::open().unwrap();
    add(&mut xfrm, &sa(0x1000 + 150));
    let mut batch = Batch::new();
    (0..300).for_each(|index| batch.add_sa(&sa(0x1000 + index), &key(&sa(0x1000 + index))));
    let results = xfrm.execute(batch);
    assert_eq!(results.len(), 300);
    for (index, result) in results.iter().enumerate() {
        match result {
            Ok(()) => assert_ne!(index, 150),
            Err(error) => assert!(index == 150 && error.exists(), "{index}: {error}"),
        }
    }
    assert_eq!(sas(&mut xfrm).len(), 300);
}

#[test]
#[ignore = "needs a kernel with ESP: tests/run runs it in one"]
fn an_unknown_cipher_is_refused_in_the_kernels_own_words() {
    own_namespace();
    let mut xfrm = Xfrm::open().unwrap();
    let sa = Sa {
        algorithm: Aead {
            name: "rfc9999(none)".into(),
            ..Aead::AES_128_GCM_16
        },
        ..sa(0x1000)
    };
    let mut batch = Batch::new();
    batch.add_sa(&sa, &key(&sa));
    let error = xfrm.execute(batch).remove(0).unwrap_err();
    assert_eq!(error.to_string(), "Requested AEAD algorithm not found (ENOSYS)");
}

#[test]
#[ignore = "needs a kernel with ESP: tests/run runs it in one"]
fn an_update_changes_limits() {
    own_namespace();
    let mut xfrm = Xfrm::open().unwrap();
    add(&mut xfrm, &sa(0x1000));
    let limits = Limits {
        soft_packets: 3,
        hard_packets: 4,
        ..Limits::default()
    };
    let changed = Sa { limits, ..sa(0x1000) };
    let mut batch = Batch::new();
    batch.update_sa(&changed, &key(&changed));
    assert_eq!(xfrm.execute(batch), [Ok(())]);
    assert_eq!(xfrm.get_sa(&changed.id()).unwrap().unwrap().sa, changed);
}

#[test]
#[ignore = "needs a kernel with ESP: tests/run runs it in one"]
fn a_direction_is_held_by_the_kernels_that_know_one_and_left_out_by_the_others() {
    own_namespace();
    let mut xfrm = Xfrm::open().unwrap();
    let knows = xfrm.knows_direction().unwrap();
    let inward = Sa {
        direction: Some(SaDirection::In),
        ..sa(0x1000)
    };
    let outward = Sa {
        direction: Some(SaDirection::Out),
        replay_window: 0,
        ..sa(0x1001)
    };
    add(&mut xfrm, &inward);
    let held = xfrm.get_sa(&inward.id()).unwrap().unwrap().sa.direction;
    assert_eq!(held, knows.then_some(SaDirection::In));
    let mut batch = Batch::new();
    batch.add_sa(&outward, &key(&outward));
    match xfrm.execute(batch).remove(0) {
        Ok(()) => assert_eq!(xfrm.get_sa(&outward.id()).unwrap().unwrap().sa, outward),
        Err(error) => assert!(
            !knows && error.to_string() == "ESN replay window must be > 0 (EINVAL)",
            "{error}"
        ),
    }
}

#[test]
#[ignore = "needs a kernel with ESP: tests/run runs it in one"]
fn the_direction_of_an_sa_is_known_from_linux_6_10_on() {
    own_namespace();
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let version: Vec<u32> = release
        .split(['.', '-'])
        .take(2)
        .map(|part| part.trim().parse().unwrap())
        .collect();
    let mut xfrm = Xfrm::open().unwrap();
    let knows = xfrm.knows_direction().unwrap();
    assert_eq!(knows, (version[0], version[1]) >= (6, 10), "{release}");
    // Checked before the cipher is looked for, so without ESP too.
    let mut batch = Batch::new();
    for replay_window in [0, 1024] {
        let sa = Sa {
            direction: Some(SaDirection::Out),
            replay_window,
            ..sa(0x1000)
        };
        batch.add_sa(&sa, &key(&sa));
    }
    let results = xfrm.execute(batch);
    let said: Vec<_> = results
        .into_iter()
        .map(|result| result.map_err(|error| error.to_string()))
        .collect();
    let refused = |index: usize| {
        said[index]
            .as_ref()
            .is_err_and(|text| text.to_lowercase().contains("replay"))
    };
    assert_eq!([refused(0), refused(1)], [!knows, knows], "{said:?}");
}

#[test]
#[ignore = "needs a kernel with ESP: tests/run runs it in one"]
fn one_sa_of_many_is_removed_alone() {
    own_namespace();
    let mut xfrm = Xfrm::open().unwrap();
    (0..3).for_each(|index| add(&mut xfrm, &sa(0x1000 + index)));
    let mut batch = Batch::new();
    batch.delete_sa(&SaId {
        dst: address("192.0.2.2"),
        spi: 0x1001,
    });
    assert_eq!(xfrm.execute(batch), [Ok(())]);
    let mut left: Vec<_> = sas(&mut xfrm).into_iter().map(|info| info.sa.spi).collect();
    left.sort_unstable();
    assert_eq!(left, [0x1000, 0x1002]);
}
