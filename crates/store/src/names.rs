//! Names from outside (an index, a manifest, a hub listing) that may become file names.

use std::ffi::OsStr;
use std::fmt;
use std::path::{Path, PathBuf};

use crate::error::{Operation, StoreError};

const MAX_NAME_BYTES: usize = 96;

/// One file or directory name that means the same on every system and cannot leave its directory:
/// 1 to 96 bytes of `[A-Za-z0-9._-]`, no leading or trailing dot, no `..`, no Windows device.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct SafeName(String);

impl SafeName {
    /// Checks a name.
    ///
    /// # Errors
    /// [`StoreError::UnsafeName`].
    pub fn parse(name: &str) -> Result<Self, StoreError> {
        match fault_of(name) {
            None => Ok(Self(name.to_string())),
            // A hostile name may be long, and the message must not be.
            Some(what) => Err(StoreError::UnsafeName { name: name.chars().take(MAX_NAME_BYTES).collect(), what }),
        }
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for SafeName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

/// `root/name`, unless something is there already that leads out of `root`, such as a link.
///
/// # Errors
/// [`StoreError::UnsafeName`] for such a link, [`StoreError::Io`].
pub fn inside(root: &Path, name: &SafeName) -> Result<PathBuf, StoreError> {
    let path = root.join(name.as_str());
    let look = |path: &Path| path.canonicalize().map_err(|source| StoreError::io(path, Operation::Inspect, 0, source));
    // symlink_metadata, not exists(): a dangling link would decide where a new file goes.
    if path.symlink_metadata().is_ok() && !look(&path)?.starts_with(look(root)?) {
        return Err(StoreError::UnsafeName {
            name: name.to_string(),
            what: "it is a link that leads out of its directory",
        });
    }
    Ok(path)
}

/// Refuses a file of a model directory that is a link out of the directory. It is asked before the
/// file goes into an export or a copy: a downloaded directory would otherwise decide which of the
/// user's files are published. The links of a Hugging Face cache, whose snapshots point into its
/// `blobs/`, are allowed.
///
/// # Errors
/// [`StoreError::LinkOut`], [`StoreError::Io`].
pub fn stays_inside(directory: &Path, path: &Path) -> Result<(), StoreError> {
    let look = |path: &Path| path.canonicalize().map_err(|source| StoreError::io(path, Operation::Inspect, 0, source));
    let (target, root) = (look(path)?, look(directory)?);
    if target.starts_with(&root) || is_cache_blob(&target) {
        return Ok(());
    }
    Err(StoreError::LinkOut { path: path.to_path_buf(), target })
}

/// Whether a path ends with `models--owner--name/blobs/DIGEST`.
fn is_cache_blob(target: &Path) -> bool {
    let mut parts = target.iter().rev().skip(1);
    let in_blobs = parts.next() == Some(OsStr::new("blobs"));
    let repository = parts.next().and_then(OsStr::to_str).unwrap_or_default();
    in_blobs && ["models--", "datasets--", "spaces--"].iter().any(|kind| repository.starts_with(kind))
}

fn fault_of(name: &str) -> Option<&'static str> {
    if name.is_empty() {
        return Some("it is empty");
    }
    if name.len() > MAX_NAME_BYTES {
        return Some("it is longer than 96 bytes");
    }
    if !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte)) {
        return Some("it has a character other than letters, digits, '.', '_' and '-'");
    }
    if name.starts_with('.') {
        return Some("it starts with a dot");
    }
    if name.ends_with('.') {
        return Some("it ends with a dot, which Windows drops");
    }
    if name.contains("..") {
        return Some("it contains '..'");
    }
    if is_windows_device(name) {
        return Some("it is the name of a Windows device");
    }
    None
}

fn is_windows_device(name: &str) -> bool {
    // The extension does not matter: `nul.txt` is the device too.
    let stem = name.split('.').next().unwrap_or(name).to_ascii_uppercase();
    if ["CON", "PRN", "AUX", "NUL"].contains(&stem.as_str()) {
        return true;
    }
    match stem.strip_prefix("COM").or_else(|| stem.strip_prefix("LPT")) {
        Some(digit) => digit.len() == 1 && digit.as_bytes()[0].is_ascii_digit(),
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refuses_unsafe_names() {
        let long = "a".repeat(97);
        let very_long = "x".repeat(4096);
        let table = [
            "",
            ".",
            "..",
            "...",
            "/",
            "\\",
            "/etc/passwd",
            "\\\\host\\share",
            "C:\\x",
            "c:",
            "../x",
            "a/../../b",
            "a/b",
            "a\\b",
            "./a",
            "a/",
            ".hidden",
            ".lock",
            ".trash-x",
            "a..b",
            "a..",
            "a.",
            "a ",
            " a",
            "a\tb",
            "a\nb",
            "a\0b",
            "a:b",
            "a*b",
            "a?b",
            "a|b",
            "<a>",
            "~",
            "~root",
            "$HOME",
            "%2e%2e",
            "é",
            "e\u{301}",
            "ＣＯＮ",
            "a\u{202e}b",
            "CON",
            "con",
            "Nul.txt",
            "aux.tar.gz",
            "PRN",
            "com1",
            "COM9.safetensors",
            "lpt0",
            "LPT5.x",
            &long,
            &very_long,
        ];
        for name in table {
            let error = SafeName::parse(name).expect_err(name);
            assert!(error.to_string().len() < 600, "{name}: {error}");
        }
    }

    #[test]
    fn accepts_names_that_models_have() {
        for name in [
            "model.safetensors",
            "model-00001-of-00002.safetensors",
            "step-000600",
            "a",
            "A_b-1.2",
            "console",
            "COM10",
            "nullable.json",
            "-a",
            &"a".repeat(96),
        ] {
            assert_eq!(SafeName::parse(name).expect(name).as_str(), name);
        }
    }

    #[cfg(unix)]
    #[test]
    fn a_link_does_not_lead_out() {
        let outside = tempfile::tempdir().unwrap();
        let root = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink(outside.path(), root.path().join("link")).unwrap();
        std::os::unix::fs::symlink(root.path().join("a"), root.path().join("dangling")).unwrap();
        let name = |text| SafeName::parse(text).unwrap();
        assert!(inside(root.path(), &name("link")).is_err());
        assert!(inside(root.path(), &name("dangling")).is_err());
        assert_eq!(inside(root.path(), &name("new")).unwrap(), root.path().join("new"));
    }

    /// (where the link of a model directory leads, whether it may be copied)
    #[cfg(unix)]
    #[test]
    fn links_stay_in_the_directory_or_in_the_cache() {
        let top = tempfile::tempdir().unwrap();
        let at = |path: &str| top.path().join(path);
        for folder in ["model/sub", "hub/models--a--b/blobs", "hub/models--a--b/snapshots/1", "hub/other/blobs"] {
            std::fs::create_dir_all(at(folder)).unwrap();
        }
        let files =
            ["model/own.json", "model/sub/deep.json", "secret", "hub/models--a--b/blobs/12", "hub/other/blobs/12"];
        for file in files {
            std::fs::OpenOptions::new().write(true).create_new(true).open(at(file)).unwrap();
        }
        let table = [
            ("model/own.json", "own.json", true),
            ("model/a", "own.json", true),
            ("model/b", "sub/deep.json", true),
            ("model/c", "../secret", false),
            ("model/d", "../hub/models--a--b/blobs/12", true),
            ("model/e", "../hub/other/blobs/12", false),
            ("hub/models--a--b/snapshots/1/f", "../../blobs/12", true),
            ("hub/models--a--b/snapshots/1/g", "../../../../secret", false),
            ("model/h", "c", false),
        ];
        for (link, target, allowed) in table {
            let path = at(link);
            if !path.is_file() {
                std::os::unix::fs::symlink(target, &path).unwrap();
            }
            let found = stays_inside(path.parent().unwrap(), &path);
            assert_eq!(found.is_ok(), allowed, "{link} to {target}: {found:?}");
        }
        // The directory itself may be a link.
        std::os::unix::fs::symlink("model", at("alias")).unwrap();
        stays_inside(&at("alias"), &at("alias/own.json")).unwrap();
        assert!(stays_inside(&at("model"), &at("model/absent")).is_err());
    }
}
