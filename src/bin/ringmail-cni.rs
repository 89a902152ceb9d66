//! The CNI plugin; all of it is in [`ringmail::cni`].

use std::io::{self, Write as _};
use std::process::ExitCode;

use ringmail::cni::{self, Answer};

fn main() -> ExitCode {
    // What can't be printed has no reader who could be told.
    match cni::run(|name| std::env::var_os(name), io::stdin()) {
        Ok(Answer::Result(text)) => match io::stdout().write_all(&text) {
            Ok(()) => ExitCode::SUCCESS,
            Err(_) => ExitCode::FAILURE,
        },
        Ok(Answer::About(text)) => {
            drop(io::stderr().write_all(text.as_bytes()));
            ExitCode::SUCCESS
        }
        Err(error) => {
            drop(io::stdout().write_all(&error.json()));
            ExitCode::FAILURE
        }
    }
}
