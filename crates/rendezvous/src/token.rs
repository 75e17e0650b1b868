//! The token by which the ranks of a group know each other, and what they have instead of one.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use finetune_allreduce::Secret;

use crate::membership::MembershipError;

/// The variable that names the file with the token, if no flag does.
pub(crate) const TOKEN_FILE: &str = "FINETUNE_TOKEN_FILE";

/// The token in `file`.
pub(crate) fn read(file: &Path) -> Result<String, MembershipError> {
    let failed = |source: io::Error| MembershipError::TokenFile { path: file.to_owned(), source };
    Ok(std::fs::read_to_string(file).map_err(failed)?.trim().to_owned())
}

/// The secret of the token. Without a token: the secret that only this user's processes on this
/// host share.
pub(crate) fn secret(token: Option<&str>, world: usize) -> Result<Secret, MembershipError> {
    match token {
        Some(token) => Secret::from_token(token).ok_or(MembershipError::ShortToken),
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
