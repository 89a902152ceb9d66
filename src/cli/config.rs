//! `ringmail config check`: what the daemon would make of its configuration, without running it.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Args;

use super::{Failure, Shown};
use zeroize::Zeroizing;

use crate::config::flags::{self, Environment, Flags, Wanted};
use crate::config::{Context, NetConf, PskSource, odd_variables, report};
use crate::psk;
use crate::store::Store;

/// Check net-conf.json and the flags, and show what they come to.
#[derive(Debug, Args)]
#[command(after_help = "\
Variables (FLANNELD_...) count as for the daemon, and its flags may follow FILE after `--`.

Exit code: 0 where the daemon would take it, 78 where it would not, 64 for a wrong flag.

Examples:
  ringmail config check
  ringmail config check ./net-conf.json --psk-file /etc/ringmail/psk
  ringmail config check -- --lease-dir /var/lib/ringmail --iface eth1")]
pub struct Arguments {
    /// The network configuration [default: what --net-config-path says]
    #[arg(value_name = "FILE")]
    file: Option<PathBuf>,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// The daemon's folder.
    #[arg(long, value_name = "DIR")]
    run_dir: Option<PathBuf>,
    /// The folder of leases.
    #[arg(long, value_name = "DIR")]
    lease_dir: Option<PathBuf>,
    /// The pre-shared key, a file or a folder of them.
    #[arg(long, value_name = "PATH")]
    psk_file: Option<PathBuf>,
    /// More flags of `ringmail run`.
    #[arg(last = true, value_name = "FLAGS")]
    flags: Vec<OsString>,
}

pub(super) fn run(arguments: &Arguments) -> Result<Shown, Failure> {
    check(arguments, &Environment::of_process())
}

fn check(arguments: &Arguments, environment: &Environment) -> Result<Shown, Failure> {
    let flags = flags(arguments, environment)?;
    let conf = net_conf(arguments, &flags)?;
    let backend = conf.backend.served().map_err(Failure::config)?;
    let mut value = report::effective(&flags, &conf);
    let mut warn = |warning: String| {
        if let Some(warnings) = value["warnings"].as_array_mut() {
            warnings.push(warning.into());
        }
    };
    odd_variables(environment).into_iter().for_each(&mut warn);
    if let Some(PskSource::File(path)) = backend.ipsec().map(|ipsec| &ipsec.psk) {
        let set = psk::load(path, &conf.network.to_string()).map_err(Failure::config)?;
        set.warnings.iter().map(ToString::to_string).for_each(&mut warn);
        value["Backend"]["PSK"]["kids"] = set.kids().iter().map(ToString::to_string).collect();
    }
    Ok(if arguments.json {
        Shown::json(&value, true)
    } else {
        Shown::from(render(&value))
    })
}

/// The configuration: FILE, else the store's, else the file of `--net-config-path`, as for the daemon.
fn net_conf(arguments: &Arguments, flags: &Flags) -> Result<NetConf, Failure> {
    let (psk_file, psk_secret) = (flags.psk_file.as_deref(), flags.psk_secret.as_ref());
    if let (None, Ok(flags::Store::Dir(folder))) = (&arguments.file, flags.store()) {
        let stored = super::blocking(async { Store::open_dir(&folder).await?.config().await })?;
        if let Some(json) = stored.map_err(Failure::store)?.map(Zeroizing::new) {
            let file = folder.join("net-conf.json").display().to_string();
            return NetConf::parse(
                &json,
                &Context {
                    file: &file,
                    psk_file,
                    psk_secret,
                },
            )
            .map_err(Failure::config);
        }
    }
    NetConf::load(&flags.net_config_path, psk_file, psk_secret).map_err(Failure::config)
}

/// The daemon's flags, as this command line and the environment give them.
fn flags(arguments: &Arguments, environment: &Environment) -> Result<Flags, Failure> {
    let given = [
        ("--net-config-path", &arguments.file),
        ("--run-dir", &arguments.run_dir),
        ("--lease-dir", &arguments.lease_dir),
        ("--psk-file", &arguments.psk_file),
    ];
    let mut all = arguments.flags.clone();
    for (flag, value) in given {
        if let Some(value) = value {
            all.extend([flag.into(), value.clone().into_os_string()]);
        }
    }
    let wanted = Flags::from_args(all, environment);
    match wanted.map_err(Failure::usage)? {
        Wanted::Run(flags) => Ok(*flags),
        Wanted::Help(_) | Wanted::Version => Err(Failure::usage(anyhow::anyhow!(
            "what follows `--` are flags of `ringmail run` to be checked"
        ))),
    }
}

/// The settings, and below them what is odd about them.
fn render(value: &serde_json::Value) -> String {
    let mut settings = value.clone();
    let warnings = settings.as_object_mut().and_then(|all| all.remove("warnings"));
    let mut text = report::text(&settings);
    for warning in warnings.iter().filter_map(|all| all.as_array()).flatten() {
        let warning = warning.as_str().unwrap_or_default();
        text += &super::table::wrap(&super::table::clean(&format!("warning: {warning}"), false), 0);
    }
    text
}
