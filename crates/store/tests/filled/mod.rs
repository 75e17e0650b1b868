//! Directories with files, written as a run writes its checkpoints.

use finetune_store::{Staging, StoreError};

/// A directory that was begun, with these files in it: names and bytes.
pub(crate) fn filled<'disk>(
    mut staging: Staging<'disk>,
    files: &[(&str, &[u8])],
) -> Result<Staging<'disk>, StoreError> {
    staging.expect_bytes(files.iter().map(|(_, bytes)| bytes.len() as u64).sum());
    for (name, bytes) in files {
        staging.write(name, bytes)?;
    }
    Ok(staging)
}
