//! The token by which the ranks of a group know each other, and what they have instead of one.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use finetune_allreduce::Secret;

use crate::membership::MembershipError;

/// The variable that names the file with the token, if no flag does.
pub(crate) const TOKEN_FILE: &str = "FINETUNE_TOKEN_FILE";

/// Longer files hold something else, or have no end.
const LONGEST: u64 = 64 << 10;

/// The token in `file`.
pub(crate) fn read(file: &Path) -> Result<String, MembershipError> {
    let failed = |source: io::Error| MembershipError::TokenFile { path: file.to_owned(), source };
    let mut text = String::new();
    let bytes = File::open(file).and_then(|file| file.take(LONGEST + 1).read_to_string(&mut text)).map_err(failed)?;
    if bytes as u64 > LONGEST {
        return Err(failed(io::Error::new(io::ErrorKind::InvalidData, "it is too long for a token")));
    }
    // Editors of Windows put a byte order mark in front.
    let token = text.trim_start_matches('\u{feff}').trim();
    match Secret::from_token(token) {
        Some(_) => Ok(token.to_owned()),
        None => Err(MembershipError::ShortToken { path: Some(file.to_owned()), length: token.len() }),
    }
}

/// The secret of the token. Without a token: the secret that only this user's processes on this
/// host share.
pub(crate) fn secret(token: Option<&str>, world: usize) -> Result<Secret, MembershipError> {
    match token {
        Some(token) => {
            let length = token.len();
            Secret::from_token(token).ok_or(MembershipError::ShortToken { path: None, length })
        }
        None if world == 1 => Ok(Secret::loopback()),
        None => Secret::of_user().map_err(|source| MembershipError::NoSecret { source }),
    }
}

/// A note about a token file that others can read. Kubernetes makes its files readable by a group,
/// so it is no error.
pub(crate) fn readable_by_others(file: &Path) -> Option<String> {
    let mode = file.metadata().ok()?.permissions().mode() & 0o777;
    (mode & 0o077 != 0).then(|| {
        format!(
            "the token file {} can be read by others (mode {mode:o}), and whoever reads it may join: chmod 600 {}",
            file.display(),
            file.display()
        )
    })
}
