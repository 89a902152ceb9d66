//! What an operator is told of on the Node, put together from those who notice it.

use tokio::sync::watch;

use super::doubts::Seen;
use super::extension::{self, CommandFailed};
use super::sources::LeaseTrouble;
use crate::psk;
use crate::reconcile::chain;
use crate::store::kube::{Datapath, Topic, Troubles};
use crate::uplink::{Uplink, UplinkError};

/// Who notices what.
pub(super) struct Sources {
    pub(super) misconfigured: watch::Receiver<Option<String>>,
    pub(super) psks: watch::Receiver<psk::Held>,
    pub(super) lease: watch::Receiver<LeaseTrouble>,
    pub(super) uplink: watch::Receiver<Result<Uplink, UplinkError>>,
    pub(super) commands: watch::Receiver<Vec<CommandFailed>>,
    pub(super) seen: watch::Receiver<Seen>,
    pub(super) datapath: watch::Receiver<Datapath>,
}

impl Sources {
    /// Keeps `told` at what is wrong, until nobody listens.
    pub(super) async fn follow(mut self, told: watch::Sender<Troubles>) {
        loop {
            let now = gather(
                self.misconfigured.borrow_and_update().as_deref(),
                self.psks.borrow_and_update().error.as_ref(),
                &self.lease.borrow_and_update(),
                self.uplink.borrow_and_update().as_ref().err(),
                &self.commands.borrow_and_update(),
                &self.seen.borrow_and_update(),
                &self.datapath.borrow_and_update(),
            );
            told.send_if_modified(|before| {
                let differs = *before != now;
                *before = now;
                differs
            });
            // A source that ended keeps its last value.
            tokio::select! {
                () = told.closed() => return,
                Ok(()) = self.misconfigured.changed() => {}
                Ok(()) = self.psks.changed() => {}
                Ok(()) = self.lease.changed() => {}
                Ok(()) = self.uplink.changed() => {}
                Ok(()) = self.commands.changed() => {}
                Ok(()) = self.seen.changed() => {}
                Ok(()) = self.datapath.changed() => {}
            }
        }
    }
}

fn gather(
    misconfigured: Option<&str>,
    psk: Option<&psk::PskError>,
    lease: &LeaseTrouble,
    uplink: Option<&UplinkError>,
    commands: &[CommandFailed],
    seen: &Seen,
    datapath: &Datapath,
) -> Troubles {
    let broken = match datapath {
        Datapath::Broken(why) => Some(why.clone()),
        Datapath::Starting | Datapath::Works => None,
    };
    let refused =
        misconfigured.map(|why| format!("the new configuration is refused, the last good one is in force: {why}"));
    let all = [
        (Topic::Configuration, refused.or_else(|| seen.unfit.clone())),
        (Topic::Alone, seen.doubts.psks.clone()),
        (Topic::Withdrawn, seen.doubts.withdrawn.clone()),
        (Topic::Epoch, seen.doubts.epoch.clone()),
        (
            Topic::Uplink,
            uplink.map(|error| format!("no uplink now, the last one stays in use: {}", chain(error))),
        ),
        (Topic::Subnet, lease.moved.clone()),
        (
            Topic::Lease,
            lease.refused.clone().or_else(|| seen.doubts.lease.clone()),
        ),
        (Topic::Peers, seen.doubts.peers.clone()),
        (Topic::Commands, extension::told(commands)),
        (Topic::Plaintext, seen.plaintext.clone()),
        (Topic::Datapath, broken),
    ];
    let all = all.into_iter().filter_map(|(topic, why)| Some((topic, why?)));
    all.chain(psk.and_then(of_keys)).collect()
}

/// What is wrong with the PSKs; that the API server can't be asked is nothing to tell it.
pub(super) fn of_keys(error: &psk::PskError) -> Option<(Topic, String)> {
    let text = || format!("the PSK can't be read, those in use stay: {}", chain(error));
    (!error.is_outage()).then(|| (Topic::Psk, text()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::report::Doubts;
    use crate::psk::{PskError, SecretError};
    use crate::uplink::Unfit;

    fn text(troubles: &Troubles) -> String {
        let each = troubles.iter().map(|(topic, why)| format!("{topic:?}: {why}"));
        each.collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn everything_that_is_noticed_is_told_and_that_the_server_is_away_is_not() {
        let lease = LeaseTrouble {
            moved: Some("moved".into()),
            refused: None,
        };
        let seen = Seen {
            unfit: Some("unfit".into()),
            plaintext: Some("plaintext".into()),
            doubts: Doubts {
                psks: Some("alone".into()),
                withdrawn: Some("needed".into()),
                epoch: Some("stalled".into()),
                lease: Some("claimed".into()),
                peers: Some("forged".into()),
            },
        };
        let secret = |why| PskError::Secret {
            secret: "a/b".parse().unwrap(),
            why,
        };
        let broken = Datapath::Broken("no link".into());
        let uplink = UplinkError::Unfit(Unfit::NoSuchName("eth9".into()), "eth0 192.0.2.1".into());
        let uplink = Some(&uplink);
        let commands = [CommandFailed {
            what: "SubnetAddCommand",
            peer: "b".into(),
            error: "it printed this".into(),
            brief: "exit status: 1".into(),
        }];
        let keys = secret(SecretError::Empty);
        let all = gather(None, Some(&keys), &lease, uplink, &commands, &seen, &broken);
        let rest = "Alone: alone\nWithdrawn: needed\nEpoch: stalled\n\
                    Uplink: no uplink now, the last one stays in use: no interface is called eth9 (interfaces: eth0 \
                    192.0.2.1)\nSubnet: moved\nLease: claimed\nPeers: forged\n\
                    Commands: SubnetAddCommand fails for node b, and is tried again every 5 s: exit status: 1; \
                    `ringmail status` on this node has what it printed\nPlaintext: plaintext\nDatapath: no link";
        let psk = "Psk: the PSK can't be read, those in use stay: PSK Secret a/b holds no key: put one in it that \
                   `ringmail keygen` made\n";
        assert_eq!(text(&all), format!("Configuration: unfit\n{psk}{rest}"));
        let away = secret(SecretError::Away("no route".into()));
        let all = gather(Some("no JSON"), Some(&away), &lease, uplink, &commands, &seen, &broken);
        let refused = "Configuration: the new configuration is refused, the last good one is in force: no JSON\n";
        assert_eq!(text(&all), format!("{refused}{rest}"));
        let (right, nothing) = (LeaseTrouble::default(), Seen::default());
        let nothing = gather(None, None, &right, None, &[], &nothing, &Datapath::Works);
        assert_eq!(nothing, Troubles::new());
    }
}
