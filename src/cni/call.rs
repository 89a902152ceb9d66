//! What the runtime asks for, in the variables `CNI_…` (CNI 1.1.0, section 2, "Parameters").

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

use super::error::Error;

/// Versions of CNI that are served, oldest first; the last is the newest there is.
pub const VERSIONS: [&str; 7] = ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// The longest name of an interface, in bytes: IFNAMSIZ without its zero.
const INTERFACE_MAX: usize = 15;

/// What is to be done.
#[derive(Clone, Debug, Eq, PartialEq)]
pub enum Command {
    /// Attach a container.
    Add,
    /// Detach it.
    Del,
    /// See whether it is attached as it should be.
    Check,
    /// Would an ADD be served?
    Status,
    /// Remove what is of no attachment any more.
    Gc,
    /// Which versions of CNI are served?
    Version,
    /// Something else; it is refused once the configuration is known to be good, as Go's plugins do.
    Unknown(String),
}

impl Command {
    fn from_name(name: &str) -> Self {
        match name {
            "ADD" => Self::Add,
            "DEL" => Self::Del,
            "CHECK" => Self::Check,
            "STATUS" => Self::Status,
            "GC" => Self::Gc,
            "VERSION" => Self::Version,
            other => Self::Unknown(other.to_owned()),
        }
    }

    /// As `CNI_COMMAND` says it.
    pub fn name(&self) -> &str {
        match self {
            Self::Add => "ADD",
            Self::Del => "DEL",
            Self::Check => "CHECK",
            Self::Status => "STATUS",
            Self::Gc => "GC",
            Self::Version => "VERSION",
            Self::Unknown(name) => name,
        }
    }

    /// Concerns one attachment, so that container and interface are named.
    fn of_one(&self) -> bool {
        matches!(self, Self::Add | Self::Del | Self::Check)
    }

    fn needs(&self, variable: &str) -> bool {
        match variable {
            "CNI_CONTAINERID" | "CNI_IFNAME" => self.of_one(),
            "CNI_NETNS" => matches!(self, Self::Add | Self::Check),
            "CNI_PATH" => self.of_one() || matches!(self, Self::Gc | Self::Status),
            _ => false,
        }
    }
}

/// One call of the plugin.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Call {
    /// What is to be done.
    pub command: Command,
    /// The container, checked to be letters, digits, `_`, `.`, `-`; empty where the command names none.
    pub container: String,
    /// The interface in the container, checked to be without `/`, `:` and blanks; empty where the command names none.
    pub interface: String,
    /// The container's network namespace; none where it is gone.
    pub netns: Option<PathBuf>,
    /// Folders of plugins, separated by `:`.
    pub path: OsString,
    /// `CNI_NETNS_OVERRIDE`: the namespace may be the runtime's own.
    pub own_netns: bool,
}

impl Call {
    /// Reads the variables; `lookup` gives one. None: no command is given, somebody called the plugin by hand.
    ///
    /// # Errors
    /// Code 4, with the texts of Go's plugins: the variables that are missing, or what is wrong with one.
    pub fn read(lookup: impl Fn(&str) -> Option<OsString>) -> Result<Option<Self>, Error> {
        let text = |name: &str| lookup(name).unwrap_or_default().to_string_lossy().into_owned();
        let name = text("CNI_COMMAND");
        if name.is_empty() {
            return Ok(None);
        }
        let command = Command::from_name(&name);
        let (container, interface) = (text("CNI_CONTAINERID"), text("CNI_IFNAME"));
        if command.of_one() {
            if !container.is_empty() && !is_name(&container) {
                return Err(Error::new(Error::ENVIRONMENT, "invalid characters in containerID").with(container));
            }
            if !interface.is_empty() {
                check_interface(&interface)?;
            }
        }
        let missing: Vec<_> = ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"]
            .into_iter()
            .filter(|variable| command.needs(variable) && lookup(variable).is_none_or(|value| value.is_empty()))
            .collect();
        if !missing.is_empty() {
            let message = format!("required env variables [{}] missing", missing.join(","));
            return Err(Error::new(Error::ENVIRONMENT, message));
        }
        let netns = lookup("CNI_NETNS").filter(|path| !path.is_empty()).map(PathBuf::from);
        let own_netns = text("CNI_NETNS_OVERRIDE");
        Ok(Some(Self {
            own_netns: own_netns.eq_ignore_ascii_case("true") || own_netns == "1",
            path: lookup("CNI_PATH").unwrap_or_default(),
            command,
            container,
            interface,
            netns,
        }))
    }

    /// The folders of `CNI_PATH`.
    pub fn folders(&self) -> impl Iterator<Item = PathBuf> {
        std::env::split_paths(OsStr::new(&self.path)).filter(|folder| !folder.as_os_str().is_empty())
    }
}

/// A name of a container or network as CNI allows it: a letter or digit, then letters, digits, `_`, `.`, `-`. It is safe as
/// a part of a file's name.
pub fn is_name(text: &str) -> bool {
    let inside = |letter: u8| letter.is_ascii_alphanumeric() || b"_.-".contains(&letter);
    text.bytes().next().is_some_and(|first| first.is_ascii_alphanumeric()) && text.bytes().all(inside)
}

fn check_interface(name: &str) -> Result<(), Error> {
    let wrong = |message: &str| Err(Error::new(Error::ENVIRONMENT, message));
    if name.len() > INTERFACE_MAX {
        let details = format!("interface name should be less than {} characters", INTERFACE_MAX + 1);
        return wrong("interface name is too long").map_err(|error: Error| error.with(details));
    }
    if matches!(name, "." | "..") {
        return wrong("interface name is . or ..");
    }
    if name.contains(|letter: char| matches!(letter, '/' | ':') || letter.is_whitespace()) {
        return wrong("interface name contains / or : or whitespace characters");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Result<Option<Call>, Error> {
        Call::read(|name| {
            variables
                .iter()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| value.into())
        })
    }

    fn message(variables: &[(&str, &str)]) -> String {
        let error = read(variables).unwrap_err();
        assert_eq!(error.code, 4);
        error.message
    }

    #[test]
    fn each_command_names_the_variables_it_lacks() {
        assert_eq!(read(&[]), Ok(None));
        let all = "required env variables [CNI_CONTAINERID,CNI_NETNS,CNI_IFNAME,CNI_PATH] missing";
        assert_eq!(message(&[("CNI_COMMAND", "ADD")]), all);
        assert_eq!(message(&[("CNI_COMMAND", "CHECK"), ("CNI_PATH", "")]), all);
        let without_netns = "required env variables [CNI_CONTAINERID,CNI_IFNAME,CNI_PATH] missing";
        assert_eq!(message(&[("CNI_COMMAND", "DEL")]), without_netns);
        for name in ["GC", "STATUS"] {
            assert_eq!(
                message(&[("CNI_COMMAND", name)]),
                "required env variables [CNI_PATH] missing"
            );
        }
        for name in ["VERSION", "FOO"] {
            let call = read(&[("CNI_COMMAND", name)]).unwrap().unwrap();
            assert_eq!(call.command.name(), name);
        }
    }

    #[test]
    fn what_would_leave_the_folder_is_refused() {
        let with = |container: &str, interface: &str| {
            read(&[
                ("CNI_COMMAND", "DEL"),
                ("CNI_CONTAINERID", container),
                ("CNI_IFNAME", interface),
                ("CNI_PATH", "/p"),
            ])
            .map(|call| call.unwrap())
        };
        for container in ["../x", "a/b", "-a", ".a", "a b", "a:b", "ä", "a\n"] {
            let error = with(container, "eth0").unwrap_err();
            assert_eq!(
                (error.code, error.message.as_str(), error.details.as_str()),
                (4, "invalid characters in containerID", container)
            );
        }
        for interface in [".", "..", "a/b", "a:b", "a b", "a\u{a0}", "abcdefghijklmnop"] {
            assert_eq!(with("a", interface).unwrap_err().code, 4, "{interface}");
        }
        let call = with("a.B-9_", "abcdefghijklmno").unwrap();
        assert_eq!((call.container.as_str(), call.netns), ("a.B-9_", None));
    }
}
