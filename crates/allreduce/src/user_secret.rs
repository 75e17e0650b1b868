//! A secret that all processes of one user on this machine can have, and no other user's. With it
//! ranks of one machine need no token.
//!
//! It lies in a file of a directory that only this user may enter. The loopback interface is open
//! to all users: without the secret any of them could take the place of a rank, or end the join.

use std::fs::{DirBuilder, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::random_bytes::{hex, new_token, random_bytes};

const FILE: &str = "allreduce-token";

/// The token of this user on this machine, made if there is none yet.
pub(crate) fn token() -> io::Result<String> {
    let path = directory()?.join(FILE);
    // Ranks start together: the first one makes the token, and the others find it.
    for _ in 0..100 {
        match read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => make(&path)?,
            read => return read,
        }
    }
    Err(io::Error::other(format!("{} cannot be made", path.display())))
}

/// `$XDG_RUNTIME_DIR/finetune`, or a directory of the user's own among the temporary files.
fn directory() -> io::Result<PathBuf> {
    let user = rustix::process::getuid().as_raw();
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|path| is_private(path));
    let path = match runtime {
        Some(runtime) => runtime.join("finetune"),
        None => std::env::temp_dir().join(format!("finetune-{user}")),
    };
    match DirBuilder::new().mode(0o700).create(&path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            return Err(io::Error::new(error.kind(), format!("{}: {error}", path.display())));
        }
        _ => {}
    }
    if is_private(&path) {
        return Ok(path);
    }
    Err(io::Error::new(
        io::ErrorKind::PermissionDenied,
        format!("{} is not a directory that only this user may enter", path.display()),
    ))
}

/// A directory, no link, that belongs to this user and is closed to all others.
fn is_private(path: &Path) -> bool {
    let user = rustix::process::getuid().as_raw();
    std::fs::symlink_metadata(path)
        .is_ok_and(|found| found.is_dir() && found.uid() == user && found.mode() & 0o077 == 0)
}

fn read(path: &Path) -> io::Result<String> {
    let no_follow = rustix::fs::OFlags::NOFOLLOW.bits().cast_signed();
    let file = OpenOptions::new().read(true).custom_flags(no_follow).open(path)?;
    let mut text = String::new();
    file.take(1024).read_to_string(&mut text)?;
    Ok(text)
}

/// Writes the file whole or not at all: a process that finds it can read it.
fn make(path: &Path) -> io::Result<()> {
    let random = |error: getrandom::Error| io::Error::other(error.to_string());
    let name = hex(&random_bytes().map_err(random)?[..8]);
    let unfinished = path.with_extension(name);
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&unfinished)?;
    let made =
        file.write_all(new_token().map_err(random)?.as_bytes()).and_then(|()| std::fs::hard_link(&unfinished, path));
    let _ = std::fs::remove_file(&unfinished);
    match made {
        // Another rank was faster.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        made => made,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_processes_of_a_user_have_the_same() {
        let tokens: Vec<String> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(|| token().unwrap())).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(tokens[0].len() >= 16 && tokens.iter().all(|token| *token == tokens[0]));
        let directory = directory().unwrap();
        assert!(is_private(&directory));
    }

    #[test]
    fn what_others_may_enter_is_not_private() {
        let directory = tempfile::tempdir().unwrap();
        for (mode, expected) in [(0o700, true), (0o750, false), (0o701, false), (0o777, false)] {
            let mode = std::os::unix::fs::PermissionsExt::from_mode(mode);
            std::fs::set_permissions(directory.path(), mode).unwrap();
            assert_eq!(is_private(directory.path()), expected);
        }
        let link = directory.path().join("link");
        std::os::unix::fs::symlink(directory.path(), &link).unwrap();
        assert!(!is_private(&link));
    }
}
