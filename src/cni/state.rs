//! What is kept of an ADD for its DEL: the delegate's configuration, byte for byte, in a file of its own for every
//! attachment.
//!
//! The file's name is `network:container:interface`; none of the three may contain a `:`. flannel's plugin names its file
//! by the container alone, so that two attachments of one container overwrite each other's; those files are read, and
//! nothing is written under such a name.
//!
//! Nothing is flushed to the disk, which would cost every container some milliseconds: a state that a power failure takes,
//! or leaves empty, is made anew by the DEL, and `host-local` does not flush its addresses either.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::call::is_name;
use super::delegate::Delegate;
use super::error::{Error, system};

/// One attachment.
#[derive(Clone, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub struct Key {
    /// The network's name.
    pub network: String,
    /// The container's ID.
    pub container: String,
    /// The interface in the container; none in a file of flannel's plugin, which does not say.
    pub interface: Option<String>,
}

impl Key {
    fn file(&self) -> String {
        match &self.interface {
            Some(interface) => format!("{}:{}:{interface}", self.network, self.container),
            None => self.container.clone(),
        }
    }

    /// That of a file's name; none for what is no file of ours. Inverse of [`Key::file`].
    fn of_file(name: &str) -> Option<Self> {
        let mut parts = name.split(':');
        let (network, container, interface) = (parts.next()?, parts.next()?, parts.next()?);
        let good = parts.next().is_none() && is_name(network) && is_name(container) && !interface.is_empty();
        good.then(|| Self {
            network: network.to_owned(),
            container: container.to_owned(),
            interface: Some(interface.to_owned()),
        })
    }
}

/// What is kept of an attachment.
#[derive(Clone, Debug, PartialEq)]
pub struct Saved {
    /// Whose it is.
    pub key: Key,
    /// The file.
    pub path: PathBuf,
    /// What the delegate was given, exactly.
    pub text: Vec<u8>,
    /// The same understood; none if it can't be: cut off by a power failure, or edited.
    pub delegate: Option<Delegate>,
}

impl Saved {
    /// Forgets it. It may be gone already.
    ///
    /// # Errors
    /// Code 5: the file stays, so its DEL would be done again.
    pub fn remove(&self) -> Result<(), Error> {
        match fs::remove_file(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Error::new(Error::IO, system("remove", &self.path, &error)))
            }
            _ => Ok(()),
        }
    }

    /// A file of flannel's plugin says its network in the configuration alone.
    fn is_of_its_network(&self) -> bool {
        let named = self.delegate.as_ref().and_then(|delegate| delegate.json.get("name"));
        self.key.interface.is_some() || named.and_then(Value::as_str) == Some(self.key.network.as_str())
    }
}

/// The folder of states, `dataDir`.
#[derive(Clone, Copy, Debug)]
pub struct States<'a> {
    folder: &'a Path,
}

impl<'a> States<'a> {
    /// Those in `folder`, which need not be there.
    pub fn new(folder: &'a Path) -> Self {
        Self { folder }
    }

    /// Keeps `text`: all of it or, whenever the process is killed, what was there before. The folder is made with mode 0700,
    /// the file with 0600.
    ///
    /// # Errors
    /// Code 999 with the system's word.
    pub fn save(&self, key: &Key, text: &[u8]) -> Result<(), Error> {
        let path = self.folder.join(key.file());
        let aside = self.aside(key);
        let failed = |call: &'static str, path: &Path| {
            let path = path.to_owned();
            move |error: io::Error| Error::internal(system(call, &path, &error))
        };
        let mut file = match create(&aside) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let made = DirBuilder::new().recursive(true).mode(0o700).create(self.folder);
                made.map_err(failed("mkdir", self.folder))?;
                create(&aside)
            }
            created => created,
        }
        .map_err(failed("open", &aside))?;
        let written = file.write_all(text).map_err(failed("write", &aside));
        let written = written.and_then(|()| fs::rename(&aside, &path).map_err(failed("rename", &aside)));
        if written.is_err() {
            // The first error is the one to tell.
            drop(fs::remove_file(&aside));
        }
        written
    }

    /// What is kept of an attachment: in its own file, else in one of flannel's plugin for this network.
    ///
    /// # Errors
    /// Code 5: a file is there and can't be read.
    pub fn find(&self, key: &Key) -> Result<Option<Saved>, Error> {
        if let Some(saved) = self.read(key.clone())? {
            return Ok(Some(saved));
        }
        let key = Key {
            interface: None,
            ..key.clone()
        };
        // One that can't be understood may be that of any network; it goes with the first that is detached.
        Ok(self
            .read(key)?
            .filter(|saved| saved.is_of_its_network() || saved.delegate.is_none()))
    }

    /// Everything that is kept of a network's attachments. What can't be read is left out and named; a file of flannel's
    /// plugin that can't be understood is left out, for nobody knows whose it is.
    pub fn all(&self, network: &str) -> (Vec<Saved>, Vec<Error>) {
        let (mut found, mut errors) = (Vec::new(), Vec::new());
        let names = match fs::read_dir(self.folder) {
            Ok(names) => names,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return (found, errors),
            Err(error) => return (found, vec![Error::new(Error::IO, system("open", self.folder, &error))]),
        };
        for name in names
            .filter_map(Result::ok)
            .filter_map(|entry| entry.file_name().into_string().ok())
        {
            let key = match Key::of_file(&name) {
                Some(key) if key.network == network => key,
                None if is_name(&name) => Key {
                    network: network.to_owned(),
                    container: name,
                    interface: None,
                },
                _ => continue,
            };
            match self.read(key) {
                Ok(saved) => found.extend(saved.filter(Saved::is_of_its_network)),
                Err(error) => errors.push(error),
            }
        }
        found.sort_by(|one, other| one.key.cmp(&other.key));
        (found, errors)
    }

    /// Removes what an ADD that was killed while it wrote has left, of an attachment.
    pub fn clear_aside(&self, key: &Key) {
        // It is hardly ever there, and does no harm.
        drop(fs::remove_file(self.aside(key)));
    }

    /// The same of all attachments of a network. Nothing of the network may be in progress, as at a GC.
    pub fn clear_all_aside(&self, network: &str) {
        let Ok(names) = fs::read_dir(self.folder) else { return };
        for name in names
            .filter_map(Result::ok)
            .filter_map(|entry| entry.file_name().into_string().ok())
        {
            if let Some(key) = name
                .strip_prefix('.')
                .and_then(Key::of_file)
                .filter(|key| key.network == network)
            {
                self.clear_aside(&key);
            }
        }
    }

    /// Where a state is written before it gets its name. One attachment has one ADD at a time (CNI 1.1.0, section 3).
    fn aside(&self, key: &Key) -> PathBuf {
        self.folder.join(format!(".{}", key.file()))
    }

    fn read(&self, key: Key) -> Result<Option<Saved>, Error> {
        let path = self.folder.join(key.file());
        match fs::read(&path) {
            Ok(text) => Ok(Some(Saved {
                delegate: Delegate::from_saved(&text),
                key,
                path,
                text,
            })),
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
            Err(error) => Err(Error::new(Error::IO, system("read", &path, &error))),
        }
    }
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use proptest::prelude::*;

    use super::*;
    use crate::testing::Folder;

    fn key(network: &str, container: &str, interface: &str) -> Key {
        Key {
            network: network.to_owned(),
            container: container.to_owned(),
            interface: Some(interface.to_owned()),
        }
    }

    fn names(folder: &Folder) -> Vec<String> {
        let names = fs::read_dir(folder.join("data")).unwrap();
        let mut names: Vec<_> = names
            .map(|name| name.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn each_attachment_has_a_file_of_its_own_with_flannels_modes() {
        let folder = Folder::new();
        let data = folder.join("data");
        let states = States::new(&data);
        for (network, interface) in [("cbr0", "eth0"), ("net2", "net1"), ("cbr0", "net1")] {
            let text = format!(r#"{{"type":"bridge","name":"{network}","for":"{interface}"}}"#);
            states.save(&key(network, "c", interface), text.as_bytes()).unwrap();
        }
        assert_eq!(names(&folder), ["cbr0:c:eth0", "cbr0:c:net1", "net2:c:net1"]);
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&data), mode(&data.join("cbr0:c:eth0"))), (0o700, 0o600));
        let saved = states.find(&key("cbr0", "c", "net1")).unwrap().unwrap();
        assert_eq!(saved.delegate.as_ref().unwrap().json["for"], "net1");
        saved.remove().unwrap();
        saved.remove().unwrap();
        assert_eq!(states.find(&key("cbr0", "c", "net1")).unwrap(), None);
        assert_eq!(states.all("cbr0").0.len(), 1);
    }

    #[test]
    fn a_file_of_flannels_plugin_is_read_for_its_network_alone() {
        let folder = Folder::new();
        fs::create_dir(folder.join("data")).unwrap();
        fs::write(folder.join("data/c"), r#"{"type":"bridge","name":"cbr0"}"#).unwrap();
        let data = folder.join("data");
        let states = States::new(&data);
        assert!(states.find(&key("cbr0", "c", "eth0")).unwrap().is_some());
        assert_eq!(states.find(&key("net2", "c", "eth0")).unwrap(), None);
        assert_eq!(states.all("net2").0, []);
        assert_eq!(states.all("cbr0").0[0].key.interface, None);
        // What can't be understood may be any network's, and is none's to collect.
        fs::write(folder.join("data/d"), "{").unwrap();
        assert!(states.find(&key("net2", "d", "eth0")).unwrap().is_some());
        assert_eq!((states.all("net2").0.len(), states.all("cbr0").0.len()), (0, 1));
        // One's own goes first.
        states.save(&key("cbr0", "c", "eth0"), br#"{"type":"ptp"}"#).unwrap();
        let saved = states.find(&key("cbr0", "c", "eth0")).unwrap().unwrap();
        assert_eq!(saved.delegate.unwrap().kind, "ptp");
    }

    #[test]
    fn what_a_killed_add_left_is_passed_over_and_cleared() {
        let folder = Folder::new();
        let data = folder.join("data");
        let states = States::new(&data);
        states.save(&key("cbr0", "c", "eth0"), b"{}").unwrap();
        for name in [".cbr0:d:eth0", ".other:d:eth0", "no name", ".x"] {
            fs::write(data.join(name), "{").unwrap();
        }
        let (found, errors) = states.all("cbr0");
        assert_eq!((found.len(), errors), (1, vec![]));
        assert_eq!(found[0].delegate, None, "without a type it is no delegate");
        states.clear_all_aside("cbr0");
        assert_eq!(names(&folder), [".other:d:eth0", ".x", "cbr0:c:eth0", "no name"]);
    }

    #[test]
    fn a_place_that_cant_be_written_or_read_is_named_and_nothing_is_left() {
        let folder = Folder::new();
        fs::write(folder.join("file"), "").unwrap();
        let under = folder.join("file/data");
        let error = States::new(&under).save(&key("n", "c", "i"), b"{}").unwrap_err();
        assert_eq!(error.code, 999);
        assert!(error.message.ends_with(": not a directory"), "{}", error.message);
        assert_eq!(States::new(&under).find(&key("n", "c", "i")), Ok(None));
        let data = folder.join("data");
        fs::create_dir_all(data.join("n:c:i")).unwrap();
        let error = States::new(&data).find(&key("n", "c", "i")).unwrap_err();
        assert_eq!(
            error.message,
            format!("read {}: is a directory", data.join("n:c:i").display())
        );
        States::new(&data).save(&key("n", "c", "i"), b"{}").unwrap_err();
        assert_eq!(names(&folder), ["n:c:i"]);
        assert_eq!(States::new(&data).all("n").1.len(), 1);
    }

    proptest! {
        #[test]
        fn a_files_name_says_whose_it_is(
            network in "[a-zA-Z0-9][a-zA-Z0-9_.-]{0,30}", container in "[a-z0-9][a-zA-Z0-9_.-]{0,30}", interface in "[^/:\\s\0]{1,15}",
        ) {
            let key = key(&network, &container, &interface);
            prop_assert_eq!(Key::of_file(&key.file()), Some(key.clone()));
            // Never that of a file of flannel's plugin.
            prop_assert!(!is_name(&key.file()));
        }

        #[test]
        fn arbitrary_names_and_contents_never_panic(name in any::<String>(), text in any::<Vec<u8>>()) {
            drop(Key::of_file(&name));
            drop(Delegate::from_saved(&text));
        }
    }
}
