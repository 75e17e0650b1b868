//! What lies where a model's file should be if a download went wrong.

use std::fmt::Display;
use std::path::Path;

/// Bytes of a file's start that are looked at.
pub const START_BYTES: u64 = 512;

/// Why bytes are no JSON, as a reader said it. Of text that an editor of Windows has saved, it only
/// says "expected value at line 1 column 1".
pub fn json_fault(bytes: &[u8], error: &impl Display) -> String {
    match bytes.starts_with(b"\xEF\xBB\xBF") {
        true => "it begins with a byte order mark, which JSON must not have: save it as UTF-8 without one".to_owned(),
        false => error.to_string(),
    }
}

/// Another thing in the place of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StandIn {
    /// What git leaves of a large file if git-lfs is not installed.
    LfsPointer,
    /// A page to log in at, or an error.
    WebPage,
    /// The hub's answer to a request that it refused.
    HubAnswer,
    /// A zip archive, as PyTorch writes them.
    Zip,
    /// A pickle of an older PyTorch.
    Pickle,
    /// A model in llama.cpp's format.
    Gguf,
    /// A gzip archive.
    Gzip,
}

impl StandIn {
    /// What a file is, by its first bytes, if it is not what its name says.
    pub fn of(start: &[u8]) -> Option<Self> {
        const ANSWERS: [&[u8]; 4] =
            [b"Entry not found", b"Repository not found", b"Access to model", b"Invalid username or password"];
        let text = start.trim_ascii_start();
        let page =
            |beginning: &[u8]| text.get(..beginning.len()).is_some_and(|own| own.eq_ignore_ascii_case(beginning));
        if start.starts_with(b"version https://git-lfs") {
            Some(Self::LfsPointer)
        } else if page(b"<!doctype html") || page(b"<html") {
            Some(Self::WebPage)
        } else if ANSWERS.iter().any(|answer| start.starts_with(answer)) {
            Some(Self::HubAnswer)
        } else if start.starts_with(b"PK\x03\x04") {
            Some(Self::Zip)
        } else if matches!(start, [0x80, 2..=5, third, ..] if *third != 0) {
            Some(Self::Pickle)
        } else if start.starts_with(b"GGUF") {
            Some(Self::Gguf)
        } else if start.starts_with(&[0x1f, 0x8b]) {
            Some(Self::Gzip)
        } else {
            None
        }
    }

    /// Its name with the article.
    pub fn describe(self) -> &'static str {
        match self {
            Self::LfsPointer => "a git-lfs pointer",
            Self::WebPage => "a web page",
            Self::HubAnswer => "an answer of the hub",
            Self::Zip => "a zip archive, as PyTorch writes them",
            Self::Pickle => "a pickle of PyTorch",
            Self::Gguf => "a GGUF file",
            Self::Gzip => "a gzip archive",
        }
    }

    /// How to get the file itself to `path`.
    pub(crate) fn hint(self, path: &Path) -> String {
        let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        match self {
            Self::LfsPointer => format!(
                "install git-lfs and run `git lfs pull` in {}, or fetch the file with `hf download`",
                directory.display()
            ),
            Self::WebPage | Self::HubAnswer => {
                "log in (`hf auth login`), agree to the terms on the model's page if it has any, and fetch the file again"
                    .to_string()
            }
            Self::Zip | Self::Pickle => {
                "a pickle can run code when it is read, so it is not read: get the safetensors revision, or convert it"
                    .to_string()
            }
            Self::Gguf => "GGUF holds weights for llama.cpp: get the original in safetensors".to_string(),
            Self::Gzip => "unpack it first".to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_downloads_leave_is_recognized() {
        let table: [(&[u8], Option<StandIn>); 12] = [
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", Some(StandIn::LfsPointer)),
            (b"<!DOCTYPE html>", Some(StandIn::WebPage)),
            (b"\n <HTML lang=en>", Some(StandIn::WebPage)),
            (b"Entry not found", Some(StandIn::HubAnswer)),
            (b"Access to model x/y is restricted.", Some(StandIn::HubAnswer)),
            (b"PK\x03\x04rest", Some(StandIn::Zip)),
            (b"\x80\x02}q", Some(StandIn::Pickle)),
            // A header of 640 bytes.
            (b"\x80\x02\0\0\0\0\0\0{", None),
            (b"GGUF\x03", Some(StandIn::Gguf)),
            (&[0x1f, 0x8b, 8], Some(StandIn::Gzip)),
            (b"{\"a\": 1}", None),
            (b"", None),
        ];
        for (start, want) in table {
            assert_eq!(StandIn::of(start), want, "{start:?}");
        }
    }
}
