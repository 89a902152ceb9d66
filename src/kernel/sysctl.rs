//! Kernel settings below /proc/sys.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

/// A setting and the value that it should have. Settings below `net` are of the calling thread's network namespace.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Sysctl {
    /// The path below /proc/sys with slashes (`net/ipv4/conf/eth0.7/rp_filter`: names of interfaces may hold dots).
    pub path: String,
    /// The value, without white space around it.
    pub value: String,
}

/// Why a setting is not as it should be.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// This kernel has no such setting.
    #[error(
        "/proc/sys/{path} is not in this kernel: load the module that brings it, or boot with its protocol enabled"
    )]
    Absent {
        /// The path below /proc/sys.
        path: String,
    },
    /// It can't be read.
    #[error("read /proc/sys/{path}")]
    Read {
        /// The path below /proc/sys.
        path: String,
        /// The system's reason.
        source: io::Error,
    },
    /// It can't be written here.
    #[error(
        "/proc/sys/{path} is {actual:?} and {value:?} is needed, but it can't be written here: \
         set it on the host (sysctl -w {path}={value}) or give the container a writable /proc/sys (privileged)"
    )]
    NotWritable {
        /// The path below /proc/sys.
        path: String,
        /// What it should be.
        value: String,
        /// What it is.
        actual: String,
        /// The system's reason.
        source: io::Error,
    },
    /// The kernel refused the value or keeps another.
    #[error(
        "/proc/sys/{path} is {actual:?} and does not take {value:?}: another program may hold it, or the kernel fixes it"
    )]
    Refused {
        /// The path below /proc/sys.
        path: String,
        /// What it should be.
        value: String,
        /// What it is.
        actual: String,
        /// The system's reason, where it gave one.
        source: Option<io::Error>,
    },
}

impl Sysctl {
    /// `path` below /proc/sys with slashes, and the value it should have.
    pub fn new(path: impl Into<String>, value: impl Into<String>) -> Self {
        Self {
            path: path.into(),
            value: value.into(),
        }
    }

    /// The value that the kernel holds, without white space around it.
    pub fn read(&self) -> Result<String, Error> {
        match fs::read_to_string(self.file()) {
            Ok(text) => Ok(text.trim().to_owned()),
            Err(error) if error.kind() == ErrorKind::NotFound => Err(Error::Absent {
                path: self.path.clone(),
            }),
            Err(source) => Err(Error::Read {
                path: self.path.clone(),
                source,
            }),
        }
    }

    /// Makes the setting hold the value; says whether it had to be changed. Writes nothing where the value is right
    /// already, so a read-only /proc/sys that is set up well is no error.
    pub fn write(&self) -> Result<bool, Error> {
        let actual = self.read()?;
        if actual == self.value {
            return Ok(false);
        }
        let (path, value) = (self.path.clone(), self.value.clone());
        match fs::write(self.file(), self.value.as_bytes()) {
            Ok(()) => {}
            Err(source)
                if matches!(
                    source.kind(),
                    ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem
                ) =>
            {
                return Err(Error::NotWritable {
                    path,
                    value,
                    actual,
                    source,
                });
            }
            Err(source) => {
                return Err(Error::Refused {
                    path,
                    value,
                    actual,
                    source: Some(source),
                });
            }
        }
        let actual = self.read()?;
        if actual == self.value {
            Ok(true)
        } else {
            Err(Error::Refused {
                path,
                value,
                actual,
                source: None,
            })
        }
    }

    fn file(&self) -> PathBuf {
        Path::new("/proc/sys").join(&self.path)
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::kernel::firewall::lab::Net;

    #[test]
    fn a_setting_that_is_right_needs_no_writing() {
        let kept = Sysctl::new("kernel/ostype", "Linux");
        assert!(
            !kept
                .write()
                .expect("the kernel's name stands there, and nobody may write it")
        );
    }

    #[test]
    fn a_setting_that_the_kernel_lacks_is_named() {
        let error = Sysctl::new("net/ipv4/ip_backward", "1")
            .write()
            .expect_err("no such setting");
        assert!(matches!(error, Error::Absent { .. }));
        assert!(
            error
                .to_string()
                .starts_with("/proc/sys/net/ipv4/ip_backward is not in this kernel: "),
            "{error}"
        );
    }

    #[test]
    #[ignore = "needs root and network namespaces"]
    fn sysctl_writes_in_the_namespace_of_the_thread_and_says_whether_it_did() {
        let (net, other) = (Net::new(), Net::new());
        let forward = Sysctl::new("net/ipv4/ip_forward", "1");
        assert_eq!(net.run(|| forward.read()).expect("read"), "0");
        assert!(net.run(|| forward.write()).expect("written"));
        assert!(!net.run(|| forward.write()).expect("right already"));
        assert_eq!(net.run(|| forward.read()).expect("read"), "1");
        assert_eq!(other.run(|| forward.read()).expect("read"), "0");
    }

    #[test]
    #[ignore = "needs root and network namespaces"]
    fn sysctl_names_the_value_that_a_setting_does_not_take() {
        let net = Net::new();
        let error = net
            .run(|| Sysctl::new("net/ipv4/ip_forward", "yes").write())
            .expect_err("no number");
        let text = error.to_string();
        assert!(matches!(error, Error::Refused { source: Some(_), .. }), "{error:?}");
        assert!(
            text.starts_with("/proc/sys/net/ipv4/ip_forward is \"0\" and does not take \"yes\""),
            "{text}"
        );
    }

    #[test]
    #[ignore = "needs root and mount namespaces"]
    fn sysctl_read_only_is_fine_where_the_value_is_right_and_else_says_what_to_do() {
        let net = Net::new();
        net.run(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).expect("a mount namespace");
            for arguments in [
                &["--make-rprivate", "/"][..],
                &["--bind", "/proc/sys", "/proc/sys"],
                &["-o", "remount,bind,ro", "/proc/sys"],
            ] {
                assert!(Command::new("mount").args(arguments).status().expect("mount").success());
            }
            assert!(!Sysctl::new("net/ipv4/ip_forward", "0").write().expect("right already"));
            let error = Sysctl::new("net/ipv4/ip_forward", "1").write().expect_err("read-only");
            assert!(matches!(error, Error::NotWritable { .. }), "{error:?}");
            assert!(error.to_string().contains("sysctl -w net/ipv4/ip_forward=1"), "{error}");
        });
    }
}
