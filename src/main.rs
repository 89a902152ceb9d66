//! Stand-in.
use ringmail::config::flags::{Environment, Wanted};
fn main() {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(tracing_subscriber::EnvFilter::from_env("RINGMAIL_LOG"))
        .init();
    let mut args: Vec<std::ffi::OsString> = std::env::args_os().skip(1).collect();
    let verb = args.remove(0);
    if verb == "run" {
        match ringmail::config::Flags::from_args(args, &Environment::of_process()) {
            Ok(Wanted::Run(flags)) => {
                if let Err(e) = ringmail::daemon::run(&flags) {
                    eprintln!("ERR {:#}", anyhow::Error::new(e));
                    std::process::exit(1)
                }
            }
            other => println!("{other:?}"),
        }
    } else if verb == "keygen" {
        print!("{}", *ringmail::psk::keygen().unwrap());
    } else {
        let dir = args[1].clone();
        let req = match verb.to_str().unwrap() {
            "status" => ringmail::admin::Request::Status,
            "audit" => ringmail::admin::Request::Audit,
            "rotate" => ringmail::admin::Request::Rotate,
            _ => ringmail::admin::Request::Leases,
        };
        println!(
            "{:#}",
            ringmail::admin::ask(std::path::Path::new(&dir), req)
                .map_err(|e| e.to_string())
                .unwrap_or_else(|e| e.into())
        );
    }
}
