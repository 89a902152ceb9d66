//! What the Events on the own Node are to say: pure. What became wrong is told once, and once more when it is right
//! again; what lasts is not repeated, and what comes again raises the count of the Event that is there.
//!
//! A budget bounds how many there are, whatever happens. What it holds back is not kept: when there is room again, what
//! is true then is told.

use std::collections::BTreeMap;
use std::time::Duration;

/// How many Events may follow one another, and how long it takes until there is room for one more.
const BURST: u32 = 10;
const EVERY: Duration = Duration::from_secs(60);
/// For how long a server keeps an Event (`--event-ttl`), by its default. What is older is made anew.
const KEPT: Duration = Duration::from_secs(3600);
/// How long a text may be, characters: the most that an Event of `events.k8s.io` may hold.
const LONGEST: usize = 1000;

/// What can be wrong, as far as an operator is told of it on the Node.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum Topic {
    /// The configuration that is there now; the last good one is in force.
    Configuration,
    /// The PSKs that are there now; the last good ones are in use.
    Psk,
    /// The PSKs in use are those of no other node.
    Alone,
    /// A PSK that was taken away is still needed by others.
    Withdrawn,
    /// No new epoch can begin.
    Epoch,
    /// The interface that carries the mesh.
    Uplink,
    /// The own subnet has moved.
    Subnet,
    /// The own lease.
    Lease,
    /// Leases of other nodes.
    Peers,
    /// The operator's commands of the extension backend.
    Commands,
    /// Plaintext of the mesh at the uplink, which the guard drops.
    Plaintext,
    /// The datapath.
    Datapath,
}

/// What is wrong, and why; what is not in it is right.
pub type Troubles = BTreeMap<Topic, String>;

impl Topic {
    const ALL: [Self; 12] = [
        Self::Configuration,
        Self::Psk,
        Self::Alone,
        Self::Withdrawn,
        Self::Epoch,
        Self::Uplink,
        Self::Subnet,
        Self::Lease,
        Self::Peers,
        Self::Commands,
        Self::Plaintext,
        Self::Datapath,
    ];

    /// How long something must be so before it is told: what is repaired at once is no news.
    const fn grace(self) -> Duration {
        Duration::from_secs(match self {
            Self::Configuration | Self::Psk | Self::Subnet | Self::Plaintext => 0,
            // What fails is tried again every 5 s.
            Self::Commands | Self::Datapath | Self::Epoch | Self::Lease | Self::Uplink | Self::Withdrawn => 10,
            // Two nodes do not see a change at the same moment.
            Self::Alone | Self::Peers => 60,
        })
    }

    /// The reason where it is wrong, and where it is right again; and what is said then.
    const fn words(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Self::Configuration => (
                "ConfigurationRefused",
                "ConfigurationAccepted",
                "the configuration is good again and in force",
            ),
            Self::Psk => (
                "PSKRefused",
                "PSKAccepted",
                "the pre-shared keys are good again and in use",
            ),
            Self::Alone => (
                "PSKOfNoOther",
                "PSKShared",
                "other nodes have a pre-shared key of this one",
            ),
            Self::Withdrawn => (
                "PSKStillNeeded",
                "PSKLetGo",
                "no pre-shared key that was taken from this node is held any more for nodes that have no newer one",
            ),
            Self::Epoch => (
                "EpochStalled",
                "EpochsGoOn",
                "nothing keeps a new epoch from beginning any more",
            ),
            Self::Uplink => ("NoUplink", "UplinkFound", "there is an uplink again"),
            Self::Subnet => (
                "SubnetMoved",
                "SubnetTaken",
                "the lease of the Node's podCIDR is published",
            ),
            Self::Lease => ("LeaseRefused", "LeaseHeld", "the lease of this node stands"),
            Self::Peers => (
                "PeerLeaseRefused",
                "PeerLeasesAccepted",
                "no lease of another node is refused any more",
            ),
            Self::Commands => (
                "CommandFailed",
                "CommandsRun",
                "no command of the extension backend fails any more",
            ),
            Self::Plaintext => (
                "PlaintextDropped",
                "PlaintextCleared",
                "the guard counts no dropped plaintext any more",
            ),
            Self::Datapath => ("DatapathBroken", "DatapathRestored", "the datapath is in order again"),
        }
    }
}

/// One thing to say.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) struct News {
    topic: Topic,
    /// `Warning`, or else `Normal`.
    pub(super) warning: bool,
    pub(super) reason: &'static str,
    pub(super) message: String,
    /// The Event that said the same before, and how often by now; there may be no such Event any more.
    pub(super) again: Option<(String, i32)>,
}

/// What follows from the troubles.
#[derive(Clone, Debug, Eq, PartialEq)]
pub(super) enum Next {
    /// This is to be said now.
    Say(News),
    /// Nothing, before that time at the earliest.
    Wait(Option<Duration>),
}

/// What has been said.
#[derive(Debug, Default)]
pub(super) struct Said {
    /// What is known of each topic to be wrong.
    told: BTreeMap<Topic, String>,
    /// Since when a topic stands otherwise than it was told.
    since: BTreeMap<Topic, Duration>,
    /// The last Event of each reason.
    events: BTreeMap<&'static str, Event>,
    /// When the budget is whole again.
    whole: Duration,
}

#[derive(Debug)]
struct Event {
    name: String,
    message: String,
    count: i32,
    at: Duration,
}

impl Said {
    /// What to say of `troubles` at `now`, of whatever clock.
    pub(super) fn next(&mut self, troubles: &Troubles, now: Duration) -> Next {
        let mut due: Option<(Duration, Topic)> = None;
        for topic in Topic::ALL {
            let shown = troubles.get(&topic).map(|why| shorten(why));
            if shown == self.told.get(&topic).map(String::as_str) {
                self.since.remove(&topic);
                continue;
            }
            let at = *self.since.entry(topic).or_insert(now) + topic.grace();
            if due.is_none_or(|(earliest, _)| at < earliest) {
                due = Some((at, topic));
            }
        }
        let Some((at, topic)) = due else {
            return Next::Wait(None);
        };
        let room = self.whole.saturating_sub(EVERY * (BURST - 1));
        match at.max(room) {
            at if at > now => Next::Wait(Some(at)),
            _ => Next::Say(self.news(topic, troubles, now)),
        }
    }

    fn news(&self, topic: Topic, troubles: &Troubles, now: Duration) -> News {
        let (wrong, right, message) = topic.words();
        let (warning, reason, message) = match troubles.get(&topic) {
            Some(why) => (true, wrong, shorten(why)),
            None => (false, right, message),
        };
        let before = self.events.get(reason);
        let before = before.filter(|event| event.message == message && now < event.at + KEPT);
        News {
            topic,
            warning,
            reason,
            message: message.to_owned(),
            again: before.map(|event| (event.name.clone(), event.count + 1)),
        }
    }

    /// The Event `name` says `news` since `now`, for the `count`th time.
    pub(super) fn said(&mut self, news: News, name: String, count: i32, now: Duration) {
        self.since.remove(&news.topic);
        if news.warning {
            self.told.insert(news.topic, news.message.clone());
        } else {
            self.told.remove(&news.topic);
        }
        let event = Event {
            name,
            message: news.message,
            count,
            at: now,
        };
        self.events.insert(news.reason, event);
        self.whole = self.whole.max(now) + EVERY;
    }
}

/// The first [`LONGEST`] characters.
fn shorten(text: &str) -> &str {
    text.char_indices().nth(LONGEST).map_or(text, |(end, _)| &text[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn secs(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn troubles(all: &[(Topic, &str)]) -> Troubles {
        all.iter().map(|(topic, why)| (*topic, (*why).to_owned())).collect()
    }

    /// What is said at `now`, and it is said.
    fn say(said: &mut Said, troubles: &Troubles, now: Duration) -> Option<String> {
        let Next::Say(news) = said.next(troubles, now) else {
            return None;
        };
        let (name, count) = news
            .again
            .clone()
            .unwrap_or_else(|| (format!("at-{}", now.as_secs()), 1));
        let kind = if news.warning { "Warning" } else { "Normal" };
        let text = format!("{kind} {} x{count} {name}: {}", news.reason, news.message);
        said.said(news, name, count, now);
        Some(text)
    }

    #[test]
    fn what_became_wrong_is_told_once_and_once_more_when_it_is_right() {
        let (mut said, none) = (Said::default(), Troubles::new());
        let wrong = troubles(&[(Topic::Configuration, "no JSON")]);
        assert_eq!(said.next(&none, secs(1)), Next::Wait(None), "all is well");
        let text = "Warning ConfigurationRefused x1 at-2: no JSON";
        assert_eq!(say(&mut said, &wrong, secs(2)).as_deref(), Some(text));
        assert_eq!(said.next(&wrong, secs(3000)), Next::Wait(None), "it lasts");
        let other = troubles(&[(Topic::Configuration, "no Network"), (Topic::Psk, "empty")]);
        let text = "Warning ConfigurationRefused x1 at-3001: no Network";
        assert_eq!(say(&mut said, &other, secs(3001)).as_deref(), Some(text));
        let text = "Warning PSKRefused x1 at-3001: empty";
        assert_eq!(say(&mut said, &other, secs(3001)).as_deref(), Some(text));
        let text = "Normal ConfigurationAccepted x1 at-3002: the configuration is good again and in force";
        assert_eq!(say(&mut said, &none, secs(3002)).as_deref(), Some(text));
        let text = "Normal PSKAccepted x1 at-3003: the pre-shared keys are good again and in use";
        assert_eq!(say(&mut said, &none, secs(3003)).as_deref(), Some(text));
        assert_eq!(said.next(&none, secs(3004)), Next::Wait(None));
    }

    #[test]
    fn what_comes_again_is_counted_while_the_server_has_the_event() {
        let (mut said, none) = (Said::default(), Troubles::new());
        let wrong = troubles(&[(Topic::Psk, "empty")]);
        for (at, count) in [(10, 1), (100, 2), (3600, 3)] {
            let text = format!("Warning PSKRefused x{count} at-10: empty");
            assert_eq!(say(&mut said, &wrong, secs(at)), Some(text));
            say(&mut said, &none, secs(at + 1)).expect("it is right again");
        }
        let text = "Warning PSKRefused x1 at-7200: empty";
        assert_eq!(
            say(&mut said, &wrong, secs(7200)).as_deref(),
            Some(text),
            "it is gone from the server"
        );
    }

    #[test]
    fn what_is_repaired_at_once_is_no_news() {
        let (mut said, none) = (Said::default(), Troubles::new());
        let broken = |why| troubles(&[(Topic::Datapath, why)]);
        assert_eq!(said.next(&broken("no link"), secs(5)), Next::Wait(Some(secs(15))));
        assert_eq!(said.next(&none, secs(6)), Next::Wait(None));
        assert_eq!(said.next(&broken("no link"), secs(14)), Next::Wait(Some(secs(24))));
        // Another text every time does not put it off.
        assert_eq!(said.next(&broken("no route"), secs(23)), Next::Wait(Some(secs(24))));
        let text = "Warning DatapathBroken x1 at-24: no rule";
        assert_eq!(say(&mut said, &broken("no rule"), secs(24)).as_deref(), Some(text));
        assert_eq!(
            said.next(&none, secs(25)),
            Next::Wait(Some(secs(35))),
            "nor does it flap"
        );
        let text = "Normal DatapathRestored x1 at-35: the datapath is in order again";
        assert_eq!(say(&mut said, &none, secs(35)).as_deref(), Some(text));
    }

    #[test]
    fn events_are_ten_at_once_and_one_a_minute_and_the_last_says_what_is_true() {
        let mut said = Said::default();
        let (mut times, mut last) = (Vec::new(), String::new());
        for second in 0..1200 {
            let why = format!("attempt {second}");
            if let Some(text) = say(&mut said, &troubles(&[(Topic::Psk, &why)]), secs(second)) {
                times.push(second);
                last = text;
            }
        }
        assert_eq!(times[..10], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
        assert!(times[10..].windows(2).all(|pair| pair[1] - pair[0] == 60), "{times:?}");
        assert_eq!(times.len(), 10 + 19, "{times:?}");
        assert!(
            last.ends_with(&format!("attempt {}", times.last().expect("some"))),
            "{last}"
        );
    }

    #[test]
    fn a_long_text_is_cut_and_told_once() {
        let mut said = Said::default();
        let long = troubles(&[(Topic::Psk, &"ä".repeat(5000))]);
        let text = say(&mut said, &long, secs(1)).expect("said");
        assert_eq!(text.chars().filter(|letter| *letter == 'ä').count(), LONGEST);
        assert_eq!(said.next(&long, secs(2)), Next::Wait(None));
    }
}
