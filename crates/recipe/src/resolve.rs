//! The recipe written back as TOML with every default, and the digest of what fixes the numbers of
//! a run.

use std::fmt::Write;
use std::path::PathBuf;

use crate::keys::{KEYS, Key};
use crate::{EventFolder, Method, Recipe, path};

/// Changes when the same recipe would mean another run.
const DIGEST_VERSION: &str = "finetune recipe 1";

impl Recipe {
    /// The recipe as resolved: every default is written out, and paths are absolute so that they
    /// hold in any folder. It parses back to an equal recipe if this one's paths are absolute.
    pub fn to_toml(&self) -> String {
        let mut text = String::from("# The recipe as resolved, every default written out.\n");
        let mut table = "";
        for key in KEYS {
            // With full fine-tuning the keys of the adapter are refused.
            if key.table() == "lora" && self.train.method == Method::Full {
                continue;
            }
            let Some(value) = (key.written)(self) else {
                continue;
            };
            if key.table() != table {
                table = key.table();
                let _ = writeln!(text, "\n[{table}]");
            }
            let _ = writeln!(text, "{} = {value}", key.name());
        }
        text
    }

    /// Every key that fixes the numbers of a run with its value as TOML text, in the order of the
    /// documentation. A key that is unset has the value "none".
    ///
    /// Where the run writes, how long it trains and how often it evaluates do not count. The model
    /// and the rows are compared by content elsewhere. Of the paths that do count only the last
    /// name is taken.
    pub fn meaning(&self) -> Vec<(&'static str, String)> {
        let entry = |key: &Key| (key.path, (key.meaning)(self).unwrap_or_else(none));
        KEYS.iter().filter(|key| key.in_digest).map(entry).collect()
    }

    /// What ranks that train together must share: [`Recipe::meaning`], then the other keys that are
    /// shared, such as how often a run evaluates, saves and compares.
    pub fn shared(&self) -> Vec<(&'static str, String)> {
        let entry = |key: &Key| (key.path, (key.written)(self).unwrap_or_else(none));
        let more = KEYS.iter().filter(|key| key.shared && !key.in_digest).map(entry);
        self.meaning().into_iter().chain(more).collect()
    }

    /// Every key with its value as TOML text, in the order of the documentation. A key that is unset
    /// has the value "none".
    pub fn entries(&self) -> Vec<(&'static str, String)> {
        KEYS.iter().map(|key| (key.path, (key.written)(self).unwrap_or_else(none))).collect()
    }

    /// Where TensorBoard's event files go; `None` if none are written.
    pub fn event_folder(&self) -> Option<PathBuf> {
        match self.log.tensorboard.as_ref()? {
            EventFolder::Off => None,
            EventFolder::InRun => Some(self.output_dir.join("tensorboard")),
            EventFolder::Below(folder) => {
                let run = path::absolute(&self.output_dir);
                Some(folder.join(run.file_name().unwrap_or(run.as_os_str())))
            }
        }
    }

    /// BLAKE3 of [`Recipe::meaning`], 64 hexadecimal digits.
    pub fn digest(&self) -> String {
        let mut hasher = blake3::Hasher::new();
        hasher.update(DIGEST_VERSION.as_bytes());
        for (path, value) in self.meaning() {
            hasher.update(format!("\n{path} = {value}").as_bytes());
        }
        hasher.finalize().to_hex().to_string()
    }
}

/// The value of a key that is unset.
fn none() -> String {
    "none".to_owned()
}
