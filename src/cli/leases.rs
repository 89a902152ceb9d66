//! `ringmail leases`: all leases, as the daemon judges them, or as they lie in a folder or in etcd.

use std::path::{Path, PathBuf};

use clap::Args;

use super::etcd::{self, EtcdFlags};
use super::table::{Align, Style, Table, Tone, clean, wrap};
use super::{Common, Failure, Shown};
use crate::admin::{LeaseReport, Leases, Request, Verdict, ask};
use crate::lease::Completeness;
use crate::store::Store;

/// List all leases and what this node makes of them.
#[derive(Debug, Args)]
#[command(after_help = "\
With --lease-dir or --etcd-endpoints the store is read without the daemon. Nothing is verified then: that takes the PSK.

Exit code: 0; 1 where a lease is refused or unreadable; 69 where the store can't be read.

Examples:
  ringmail leases
  ringmail leases --lease-dir /var/lib/ringmail
  ringmail leases --etcd-endpoints http://192.0.2.1:2379")]
pub struct Arguments {
    #[command(flatten)]
    common: Common,
    /// Read this folder instead of asking the daemon.
    #[arg(long, value_name = "DIR")]
    lease_dir: Option<PathBuf>,
    #[command(flatten)]
    etcd: EtcdFlags,
}

pub(super) fn run(arguments: &Arguments, style: &Style) -> Result<Shown, Failure> {
    let Arguments {
        common,
        lease_dir,
        etcd,
    } = arguments;
    let leases = match (lease_dir, etcd.access()?) {
        (Some(folder), _) => of_folder(folder)?,
        (None, Some(access)) => {
            let opened = super::blocking(async { anyhow::Ok(unchecked(&Store::Etcd(etcd::open(access).await?))) });
            opened?.map_err(Failure::store)?
        }
        (None, None) => {
            let answer = ask(&common.run_dir, Request::Leases).map_err(Failure::other)?;
            serde_json::from_value(answer).map_err(Failure::other)?
        }
    };
    let good = |lease: &LeaseReport| lease.verdict != Verdict::Refused;
    let well = leases.complete && leases.rejected.is_empty() && leases.leases.iter().all(good);
    Ok(if common.json {
        Shown::json(&leases, well)
    } else {
        Shown::text(render(&leases, *style), well)
    })
}

/// The leases in the folder of the embedded store.
fn of_folder(folder: &Path) -> Result<Leases, Failure> {
    let store = super::blocking(Store::open_dir(folder))?.map_err(Failure::store)?;
    Ok(unchecked(&store))
}

/// The leases of a store.
fn unchecked(store: &Store) -> Leases {
    let roster = store.roster();
    let roster = roster.borrow();
    let report = |lease: &std::sync::Arc<_>| LeaseReport::new(lease, Verdict::Unchecked, None);
    Leases {
        own: None,
        complete: roster.completeness == Completeness::Complete,
        leases: roster.leases().map(report).collect(),
        rejected: roster.rejected().clone(),
    }
}

pub(super) fn render(leases: &Leases, style: Style) -> String {
    let mut text = String::new();
    if leases.leases.is_empty() {
        text += "no leases\n";
    } else {
        let columns = ["NODE", "SUBNET", "PUBLIC", "BACKEND", "EPOCH", "LEASE"];
        let mut table = Table::new(columns.map(|name| (name, Align::Left)));
        for lease in &leases.leases {
            rows(lease, &mut table);
        }
        text += &table.render(style);
    }
    for (entry, why) in &leases.rejected {
        let line = format!("rejected: {}: {}", clean(entry, false), clean(why, false));
        text += &style.paint(&wrap(&line, 0), Tone::Doubtful);
    }
    if !leases.complete {
        text += &style.paint("the store is not read whole yet: more may come\n", Tone::Doubtful);
    }
    text
}

fn rows(lease: &LeaseReport, table: &mut Table) {
    let (verdict, tone) = match lease.verdict {
        Verdict::Own => ("own", Tone::Good),
        Verdict::Verified => ("verified", Tone::Good),
        Verdict::Refused => ("refused", Tone::Bad),
        Verdict::Unchecked => ("unchecked", Tone::Plain),
    };
    let or = |text: Option<String>| text.filter(|text| !text.is_empty()).unwrap_or_else(|| "-".into());
    let epoch = or(lease.epoch.map(|epoch| epoch.to_string()));
    let backend = or(Some(lease.backend.clone()));
    let lines = lease.subnets.len().max(lease.public.len()).max(1);
    for at in 0..lines {
        let once = |text: &str| (if at == 0 { text.to_owned() } else { String::new() }, Tone::Plain);
        let listed = |items: &[String]| match items.get(at) {
            Some(item) => (item.clone(), Tone::Plain),
            None => once("-"),
        };
        let (verdict, _) = once(verdict);
        table.row([
            once(&lease.node),
            listed(&lease.subnets),
            listed(&lease.public),
            once(&backend),
            once(&epoch),
            (verdict, tone),
        ]);
    }
    if let Some(reason) = &lease.reason {
        table.note(reason);
    }
}
