//! The filters of `echo`: what our own hand did is kept out, what another did is not.

use std::cell::Cell;

use nix::libc;
use xfrm::{Connection, Monitor, Protocol, Xfrm};

use super::super::{echo, ipsec, route};
use super::{in_namespace, net};
use crate::kernel::{Guard, Key, Object, Op, Write};

fn seen(monitor: &mut Monitor) -> Vec<u16> {
    let mut kinds = Vec::new();
    monitor.read(&mut |message| kinds.push(message.kind)).expect("read");
    kinds
}

fn write(op: Op) -> Write {
    Write { op, secret: None }
}

#[test]
#[ignore = "needs root"]
fn routes_of_our_own_are_kept_out_of_the_queue_and_all_else_is_not() {
    in_namespace(|| {
        let mut ours = Connection::open(Protocol::Route).expect("open");
        let mut theirs = Connection::open(Protocol::Route).expect("open");
        let groups = [libc::RTNLGRP_IPV4_ROUTE, libc::RTNLGRP_LINK];
        let mut monitor = Monitor::open(Protocol::Route, &groups).expect("listen");
        echo::silence_routes(&monitor, ours.port());
        let make = |connection: &mut Connection, text: &str| {
            let op = Op::Make(Key::GuardRoute(net(text)), Object::Unreachable);
            assert!(route::apply(connection, &Default::default(), &[write(op)])[0].is_ok());
        };
        make(&mut ours, "10.1.0.0/16");
        assert!(seen(&mut monitor).is_empty());
        make(&mut theirs, "10.2.0.0/16");
        assert_eq!(seen(&mut monitor), [libc::RTM_NEWROUTE]);
        let gone = Op::Break(Key::GuardRoute(net("10.1.0.0/16")));
        assert!(route::apply(&mut theirs, &Default::default(), &[write(gone)])[0].is_ok());
        assert_eq!(seen(&mut monitor), [libc::RTM_DELROUTE]);
        let gone = Op::Break(Key::GuardRoute(net("10.2.0.0/16")));
        assert!(route::apply(&mut ours, &Default::default(), &[write(gone)])[0].is_ok());
        assert!(seen(&mut monitor).is_empty());
        super::ip("link set lo mtu 9000");
        assert_eq!(seen(&mut monitor), [libc::RTM_NEWLINK]);
    });
}

#[test]
#[ignore = "needs root"]
fn policies_of_our_own_are_kept_out_of_the_queue_and_others_are_not() {
    in_namespace(|| {
        let mut ours = Xfrm::open().expect("open");
        let mut theirs = Xfrm::open().expect("open");
        let mut events = xfrm::Events::open().expect("listen");
        echo::silence_xfrm(&events, ours.port());
        let objects = super::node();
        let guards: Vec<Write> = objects
            .iter()
            .filter(|(key, _)| matches!(key, Key::Guard(Guard::Block, _)))
            .map(|(key, object)| write(Op::Make(key.clone(), object.clone())))
            .collect();
        let (mine, other) = guards.split_at(1);
        let count = Cell::new(0);
        let mut read = || {
            count.set(0);
            events.read(&mut |_| count.set(count.get() + 1)).expect("read");
            count.get()
        };
        assert!(ipsec::apply_policies(&mut ours, mine)[0].is_ok());
        assert_eq!(read(), 0);
        assert!(ipsec::apply_policies(&mut theirs, &other[..1])[0].is_ok());
        assert_eq!(read(), 1);
    });
}
