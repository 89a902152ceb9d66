//! `ringmail doctor`: what is wrong with this node and its mesh, and the command to run next.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use serde::Serialize;

use super::table::{Style, Tone, clean, count, wrap};
use super::{Common, Failure, Shown};
use crate::config::flags::Environment;
use crate::doctor::read::{Look, read};
use crate::doctor::{Finding, Severity, bundle, examine, notes};

/// Look for what is wrong with this node and its mesh, worst first, with the command to run.
#[derive(Debug, Args)]
#[command(after_help = "\
Looks at the daemon's report, the kernel, the packet filters and the machine; changes nothing. Where peers are silent,
it sends each one ping. Counters are watched for a moment: what only stands above zero is told below the findings.

Exit code: 0 where nothing is found, else 1.

JSON: {findings: [{severity: broken, degraded or notice, check, subject, title, evidence, why, command}], notes: [text]}

Examples:
  ringmail doctor
  ringmail doctor --json | jq -r '.findings[].command'
  ringmail doctor --bundle /root/ringmail.tar       all that an engineer needs, and no secret")]
pub struct Arguments {
    #[command(flatten)]
    common: Common,
    /// Also write a support bundle, a tar file, of mode 0600
    #[arg(long, value_name = "FILE")]
    bundle: Option<PathBuf>,
    /// Replace FILE where it is there already
    #[arg(long, requires = "bundle")]
    force: bool,
    /// How long counters are watched, seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 2, value_parser = clap::value_parser!(u64).range(0..=3600))]
    watch: u64,
    /// The folder of the container runtime's network configurations
    #[arg(long, value_name = "DIR", default_value = "/etc/cni/net.d")]
    cni_conf_dir: PathBuf,
}

/// What is shown as JSON.
#[derive(Serialize)]
struct Diagnosis<'a> {
    findings: &'a [Finding],
    notes: &'a [String],
}

pub(super) fn run(arguments: &Arguments, style: &Style, environment: &Environment) -> Result<Shown, Failure> {
    let look = Look {
        run_dir: &arguments.common.run_dir,
        cni_folder: &arguments.cni_conf_dir,
        watch: Duration::from_secs(arguments.watch),
        environment,
    };
    let facts = read(&look).map_err(Failure::other)?;
    let (findings, notes) = (examine(&facts), notes(&facts));
    let well = findings.is_empty();
    let mut text = String::new();
    if let Some(path) = &arguments.bundle {
        let shown = render(&findings, &notes, Style { colour: false });
        let entries = bundle::entries(&facts, &findings, &shown);
        bundle::write(path, &entries, facts.now, arguments.force)
            .context("the support bundle")
            .map_err(Failure::other)?;
        text = format!(
            "\nbundle: {}, without the log: its README.txt says where that is\n",
            path.display()
        );
    }
    Ok(if arguments.common.json {
        let (findings, notes) = (&findings[..], &notes[..]);
        Shown::json(&Diagnosis { findings, notes }, well)
    } else {
        Shown::text(render(&findings, &notes, *style) + &clean(&text, true), well)
    })
}

pub(super) fn render(findings: &[Finding], notes: &[String], style: Style) -> String {
    let mut text = String::new();
    for finding in findings {
        let (word, tone) = match finding.severity {
            Severity::Broken => ("broken", Tone::Bad),
            Severity::Degraded => ("degraded", Tone::Doubtful),
            Severity::Notice => ("notice", Tone::Plain),
        };
        text += &style.paint(&wrap(&clean(&format!("{word}: {}", finding.title), false), 0), tone);
        for (word, value) in [("seen", &finding.evidence), ("why", &finding.why)] {
            text += &wrap(&clean(&format!("{word}: {value}"), false), 4);
        }
        // In one line, to be copied.
        text += &format!("    run: {}\n\n", clean(&finding.command, false));
    }
    text += &match findings.len() {
        0 => style.paint("nothing is found\n", Tone::Good),
        number => count(number, "finding") + "\n",
    };
    for note in notes {
        text += &wrap(&clean(note, false), 2);
    }
    text
}
