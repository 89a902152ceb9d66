//! `ringmail audit`: the daemon's findings, or without one what the kernel alone can tell.

use clap::Args;

use super::table::{Align, Style, Table, Tone, clean, count, wrap};
use super::{Common, Failure, Shown};
use crate::admin::{AskError, Request, ask};
use crate::audit::{Association, Audit, Differs, Use, unplanned, unread};
use crate::kernel::Datapath as _;
use crate::kernel::netlink::{Netlink, Options};

/// Compare the kernel with the plan, explain every SA, look for ways that plaintext could go.
#[derive(Debug, Args)]
#[command(after_help = "\
Each difference comes with the command that shows it. Where no daemon answers, the kernel is read all the same; SAs
are then explained by number, and there is no plan to compare with.

Exit code: 0 where the kernel holds what is wanted and plaintext has no way, else 1; always 1 without a daemon. Plaintext
that the guard has dropped is told and does not count here, since it was stopped and anybody can forge it; `ringmail
status` exits 1 for it.

Examples:
  ringmail audit
  ringmail audit --json | jq .plaintext")]
pub struct Arguments {
    #[command(flatten)]
    common: Common,
}

pub(super) fn run(Arguments { common }: &Arguments, style: &Style) -> Result<Shown, Failure> {
    let (audit, alone) = match ask(&common.run_dir, Request::Audit) {
        Ok(answer) => (serde_json::from_value(answer).map_err(Failure::other)?, None),
        Err(error @ AskError::NoDaemon(_)) => (of_kernel()?, Some(error.to_string())),
        Err(error) => return Err(Failure::other(error)),
    };
    if let (true, Some(why)) = (common.json, &alone) {
        eprintln!("ringmail: {why}; there is no plan to compare with");
    }
    Ok(if common.json {
        Shown::json(&audit, audit.ok)
    } else {
        Shown::text(render(&audit, alone.as_deref(), *style), audit.ok)
    })
}

/// The audit of this network namespace's kernel, without a daemon.
fn of_kernel() -> Result<Audit, Failure> {
    let mut kernel = Netlink::open(&Options { prefer_nft: true }).map_err(Failure::other)?;
    let actual = kernel.dump().map_err(Failure::other)?;
    let audit = unplanned(&actual);
    if actual.is_empty() {
        return Ok(audit);
    }
    let (dropped, dropped_told) = match kernel.dropped() {
        Ok(dropped) => (Some(dropped), dropped.told("the uplink", &kernel.dropped_reset())),
        Err(error) => (None, Some(unread(&error))),
    };
    Ok(Audit {
        dropped,
        dropped_told,
        ..audit
    })
}

/// `alone` is why there is no daemon's plan, where there is none.
pub(super) fn render(audit: &Audit, alone: Option<&str>, style: Style) -> String {
    let objects: usize = audit.objects.values().sum();
    let kinds: Vec<String> = audit.objects.iter().map(|(kind, n)| format!("{kind} {n}")).collect();
    let kinds = if kinds.is_empty() {
        String::new()
    } else {
        format!(": {}", kinds.join(", "))
    };
    let node = audit.node.as_deref().unwrap_or("this node");
    let mut text = wrap(
        &clean(
            &format!(
                "{node}: {} of ringmail's in the kernel{kinds}",
                count(objects, "object")
            ),
            false,
        ),
        0,
    );
    if !audit.associations.is_empty() {
        text.push('\n');
        text += &associations(&audit.associations).render(style);
    }
    text.push('\n');
    text += &differences(audit, alone, style);
    text.push('\n');
    text + &plaintext(audit, alone, style) + &dropped(audit, style)
}

/// What the guard has dropped, where that is known or known not to be.
fn dropped(audit: &Audit, style: Style) -> String {
    match (&audit.dropped_told, &audit.dropped) {
        (Some(told), _) => style.paint(&wrap(&format!("dropped: {}", clean(told, false)), 0), Tone::Doubtful),
        (None, Some(_)) => style.paint(
            "dropped: nothing, no packet of the mesh came or went without ESP\n",
            Tone::Good,
        ),
        (None, None) => String::new(),
    }
}

fn associations(associations: &[Association]) -> Table {
    let mut table = Table::new([
        ("SPI", Align::Left),
        ("DIR", Align::Left),
        ("SENDER", Align::Left),
        ("RECEIVER", Align::Left),
        ("MOD 64", Align::Left),
        ("CIPHER", Align::Left),
        ("USE", Align::Left),
    ]);
    for sa in associations {
        let (word, tone) = usage(sa.usage);
        let epochs = match (sa.sender_epoch_mod64, sa.receiver_epoch_mod64) {
            (Some(sender), Some(receiver)) => format!("{sender}>{receiver}"),
            _ => "-".into(),
        };
        let cells = [&sa.spi, &sa.direction, &sa.sender, &sa.receiver, &epochs, &sa.cipher];
        let cells = cells.into_iter().map(|cell| (cell.clone(), Tone::Plain));
        table.row(cells.chain([(word.to_owned(), tone)]));
    }
    table
}

fn usage(usage: Use) -> (&'static str, Tone) {
    match usage {
        Use::Sending => ("sending", Tone::Good),
        Use::Probing => ("probing", Tone::Plain),
        Use::Idle => ("idle", Tone::Plain),
        Use::Receiving => ("receiving", Tone::Good),
        Use::Draining => ("draining", Tone::Plain),
        Use::Inherited => ("inherited", Tone::Doubtful),
        Use::Stray => ("stray", Tone::Bad),
        Use::Unplanned => ("unplanned", Tone::Doubtful),
    }
}

fn differences(audit: &Audit, alone: Option<&str>, style: Style) -> String {
    if let Some(why) = alone {
        let why = format!("differences: unknown, there is no plan to compare with: {why}");
        return style.paint(&wrap(&clean(&why, false), 0), Tone::Doubtful);
    }
    if audit.differences.is_empty() {
        return "differences: none, the kernel holds what is wanted\n".into();
    }
    let mut text = style.paint(&format!("differences: {}\n", audit.differences.len()), Tone::Bad);
    for difference in &audit.differences {
        let word = match difference.differs {
            Differs::Missing => "missing",
            Differs::Extra => "extra",
            Differs::Different => "different",
        };
        text += &wrap(&clean(&format!("{word}: {}", difference.object), false), 2);
        let sides = [("wanted", &difference.wanted), ("found", &difference.found)];
        for (side, value) in sides {
            if let Some(value) = value {
                text += &wrap(&clean(&format!("{side}: {value}"), false), 6);
            }
        }
        // In one line, to be copied.
        text += &format!("      show: {}\n", clean(&difference.show, false));
    }
    text
}

fn plaintext(audit: &Audit, alone: Option<&str>, style: Style) -> String {
    if audit.plaintext.is_empty() {
        return if audit.objects.is_empty() {
            let text = "plaintext: nothing of ringmail's is here to stop or send it\n";
            style.paint(text, Tone::Doubtful)
        } else if alone.is_some() {
            "plaintext: no way is seen; the firewall can't be judged without the daemon\n".into()
        } else {
            style.paint("plaintext: has no way out or in\n", Tone::Good)
        };
    }
    let mut text = style.paint(
        &format!("plaintext: {}\n", count(audit.plaintext.len(), "possible way")),
        Tone::Bad,
    );
    for way in &audit.plaintext {
        text += &wrap(&clean(way, false), 2);
    }
    text
}
