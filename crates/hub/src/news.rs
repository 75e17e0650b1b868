//! What a transfer tells while it goes on.

use std::time::Duration;

/// One piece of news. Bytes are those of files, not of the network.
#[derive(Clone, Copy, Debug)]
pub enum News<'a> {
    /// A transfer begins.
    Begin {
        /// The repository.
        id: &'a str,
        /// Files that are fetched or sent.
        files: usize,
        /// Their bytes.
        bytes: u64,
        /// Bytes of them that were here already.
        present: u64,
    },
    /// A file has come or gone so far.
    File {
        /// Its name in the repository.
        name: &'a str,
        /// Bytes that are there.
        done: u64,
        /// Bytes of the whole.
        size: u64,
    },
    /// A file is complete and checked.
    Done {
        /// Its name in the repository.
        name: &'a str,
    },
    /// A try has failed, and another one follows.
    Again {
        /// What was tried.
        name: &'a str,
        /// Why it failed.
        why: &'a str,
        /// Time until the next try.
        pause: Duration,
    },
    /// Another process fetches the same repository.
    Waiting {
        /// The repository.
        id: &'a str,
    },
    /// All bytes are there; the hub makes a commit of them.
    Committing,
    /// Something that the user should know.
    Note(&'a str),
    /// The transfer has ended well.
    End,
}

/// Who hears the news.
pub type Listener<'a> = dyn Fn(News<'_>) + 'a;
