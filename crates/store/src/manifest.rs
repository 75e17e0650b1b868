//! The manifest of a directory: what was written into it, with the hash of every file and of the
//! manifest itself.

use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::disk::Disk;
use crate::error::StoreError;
use crate::hash::hex;
use crate::names::SafeName;

/// The name of the manifest in its directory.
pub const MANIFEST_NAME: &str = "manifest.json";
/// The most bytes of a manifest. That of a checkpoint has about 1 KiB.
pub const MAX_MANIFEST_BYTES: u64 = 1 << 20;
const FORMAT: u32 = 1;

/// What stands before the 64 digits of the hash at the end of every manifest. The hash is of all
/// bytes before it, so the file is plain JSON and yet no byte of it can change unseen.
const BEFORE_CHECKSUM: &str = ",\n  \"checksum\": \"";
const AFTER_CHECKSUM: &str = "\"\n}\n";
const CHECKSUM_BYTES: usize = 64;

/// What was written into a directory.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// The version of the manifest's own format.
    pub format: u32,
    /// What the directory is, in the caller's words: `checkpoint`, `adapter`, `model`.
    pub kind: String,
    /// What else the caller wants to know when it reads the directory again.
    pub fields: serde_json::Map<String, serde_json::Value>,
    /// The files of the directory, without the manifest.
    pub files: Vec<FileRecord>,
}

/// What a manifest says of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileRecord {
    /// Its name in the directory.
    pub name: String,
    /// Bytes of the file.
    pub size: u64,
    /// The blake3 hash of its bytes: 64 hexadecimal digits.
    pub blake3: String,
}

impl Manifest {
    /// `about` is an object with the text `kind`; its other entries become [`Manifest::fields`].
    pub(crate) fn new(path: &Path, about: &serde_json::Value, files: Vec<FileRecord>) -> Result<Self, StoreError> {
        let cannot = |what: &str| StoreError::CannotWrite { path: path.to_path_buf(), what: what.into() };
        let mut fields = about.as_object().cloned().ok_or_else(|| cannot("the description is not an object"))?;
        let kind = match fields.shift_remove("kind") {
            Some(serde_json::Value::String(kind)) => kind,
            _ => return Err(cannot("the description has no text \"kind\"")),
        };
        Ok(Self { format: FORMAT, kind, fields, files })
    }

    pub(crate) fn encode(&self, path: &Path) -> Result<Vec<u8>, StoreError> {
        let cannot = |what: String| StoreError::CannotWrite { path: path.to_path_buf(), what };
        let text = serde_json::to_string_pretty(self).map_err(|error| cannot(error.to_string()))?;
        let body = text.strip_suffix("\n}").unwrap_or(&text);
        let checksum = blake3::hash(body.as_bytes()).to_hex();
        let bytes = format!("{body}{BEFORE_CHECKSUM}{checksum}{AFTER_CHECKSUM}").into_bytes();
        if bytes.len() as u64 > MAX_MANIFEST_BYTES {
            return Err(cannot(format!("its manifest would have {} bytes", bytes.len())));
        }
        Ok(bytes)
    }

    /// Reads a manifest's bytes. `path` is for the message only.
    ///
    /// # Errors
    /// [`StoreError::Malformed`].
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Self, StoreError> {
        #[derive(Deserialize)]
        struct FormatOnly {
            format: u32,
        }
        let malformed = |what: String| StoreError::malformed(path, what);
        if bytes.len() as u64 > MAX_MANIFEST_BYTES {
            return Err(malformed(format!("{} bytes is too long for a manifest", bytes.len())));
        }
        let body = body_of(bytes).ok_or_else(|| malformed("its bytes do not match its own checksum".to_string()))?;
        let mut text = body.to_vec();
        text.extend_from_slice(b"\n}");
        // The format first: a later one may have fields that this program does not know.
        let FormatOnly { format } = serde_json::from_slice(&text).map_err(|error| malformed(error.to_string()))?;
        if format != FORMAT {
            return Err(malformed(format!("it has format {format}, this program reads format {FORMAT}")));
        }
        serde_json::from_slice(&text).map_err(|error| malformed(error.to_string()))
    }

    /// One of the caller's fields.
    pub fn field(&self, name: &str) -> Option<&serde_json::Value> {
        self.fields.get(name)
    }
}

fn body_of(bytes: &[u8]) -> Option<&[u8]> {
    let rest = bytes.strip_suffix(AFTER_CHECKSUM.as_bytes())?;
    let (rest, checksum) = rest.split_at_checked(rest.len().checked_sub(CHECKSUM_BYTES)?)?;
    let body = rest.strip_suffix(BEFORE_CHECKSUM.as_bytes())?;
    (blake3::hash(body).to_hex().as_bytes() == checksum).then_some(body)
}

/// Reads every byte of a directory again and compares it with the manifest. Files that the manifest
/// does not list are ignored.
///
/// # Errors
/// [`StoreError::Mismatch`] names the file that is missing, cut or changed.
/// [`StoreError::Malformed`] for the manifest itself, [`StoreError::UnsafeName`],
/// [`StoreError::Io`].
pub fn verify_directory(disk: &dyn Disk, path: &Path) -> Result<Manifest, StoreError> {
    let manifest = read_manifest(disk, path)?;
    for record in &manifest.files {
        let name = SafeName::parse(&record.name)?;
        let file = path.join(name.as_str());
        let size = disk.length(&file).map_err(|error| missing_or(path, &record.name, error))?;
        if size != record.size {
            return Err(StoreError::mismatch(
                path,
                &record.name,
                format!("has {size} bytes, its manifest says {}", record.size),
            ));
        }
        let hash = disk.hash(&file).map_err(|error| missing_or(path, &record.name, error))?;
        if hex(&hash) != record.blake3 {
            return Err(StoreError::mismatch(path, &record.name, "has other bytes than its manifest says"));
        }
    }
    Ok(manifest)
}

pub(crate) fn read_manifest(disk: &dyn Disk, path: &Path) -> Result<Manifest, StoreError> {
    let file = path.join(MANIFEST_NAME);
    let size = disk.length(&file).map_err(|error| missing_or(path, MANIFEST_NAME, error))?;
    if size > MAX_MANIFEST_BYTES {
        return Err(StoreError::malformed(&file, format!("{size} bytes is too long for a manifest")));
    }
    let bytes = disk.read(&file).map_err(|error| missing_or(path, MANIFEST_NAME, error))?;
    Manifest::parse(&file, &bytes)
}

fn missing_or(path: &Path, file: &str, error: io::Error) -> StoreError {
    if error.kind() == io::ErrorKind::NotFound {
        StoreError::mismatch(path, file, "is missing")
    } else {
        StoreError::reading(&path.join(file), error)
    }
}
