//! One repository at the other end: its commits, its listing, the bytes of its files. Errors of the
//! client become those of this crate here, and what may pass is tried again.

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use finetune_store::SafeName;
use futures::StreamExt;
use hf_hub::progress::ProgressHandler;
use hf_hub::repository::download::HFByteStream;
use hf_hub::repository::{CommitOperation, RepoTreeEntry};
use hf_hub::{HFClient, HFError, HFRepository, HFResult, RepoTypeDataset, RepoTypeModel, split_id};

use crate::error::HubError;
use crate::hub::Hub;
use crate::news::{Listener, News};
use crate::upload::Upload;

/// The most files of a repository that are listed. Datasets of images have more, and nothing here
/// reads them.
const MOST_FILES: usize = 200_000;

/// What a repository holds, as the hub sorts them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A model or an adapter.
    Model,
    /// Rows.
    Dataset,
}

impl Kind {
    /// The word for one of them.
    pub fn noun(self) -> &'static str {
        match self {
            Kind::Model => "model",
            Kind::Dataset => "dataset",
        }
    }

    /// What stands before the name in the address of a page.
    pub(crate) fn prefix(self) -> &'static str {
        match self {
            Kind::Model => "",
            Kind::Dataset => "datasets/",
        }
    }
}

/// A file as the hub lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Listed {
    /// Its path in the repository, of safe names.
    pub(crate) path: String,
    pub(crate) size: u64,
    /// Git's name of it, or of its pointer.
    pub(crate) oid: String,
    /// Whether it lies in large file storage.
    pub(crate) large: bool,
}

enum Handle {
    Model(HFRepository<RepoTypeModel>),
    Dataset(HFRepository<RepoTypeDataset>),
}

/// A repository at the other end.
pub(crate) struct Repository<'h> {
    pub(crate) hub: &'h Hub,
    pub(crate) id: String,
    pub(crate) kind: Kind,
    handle: Handle,
}

/// A request that went wrong.
pub(crate) struct Trouble {
    pub(crate) error: HubError,
    /// Whether another try may succeed.
    pub(crate) passes: bool,
    /// How long the hub wants to be left alone.
    pub(crate) wait: Option<Duration>,
}

/// Status, code and message of a refusal.
macro_rules! facts {
    ($context:expr) => {
        (
            $context.status.as_u16(),
            $context.error_code.clone().unwrap_or_default(),
            $context.server_message.clone().unwrap_or_default(),
            $context.url.clone(),
        )
    };
}

impl<'h> Repository<'h> {
    pub(crate) fn new(hub: &'h Hub, client: &HFClient, kind: Kind, id: &str) -> Repository<'h> {
        let (owner, name) = split_id(id);
        let handle = match kind {
            Kind::Model => Handle::Model(client.model(owner, name)),
            Kind::Dataset => Handle::Dataset(client.dataset(owner, name)),
        };
        Repository { hub, id: id.to_owned(), kind, handle }
    }

    /// The commit that a branch or tag stands for now.
    pub(crate) async fn commit(&self, revision: &str, listener: &Listener<'_>) -> Result<String, HubError> {
        let sha = self
            .asked(listener, async || match &self.handle {
                Handle::Model(handle) => handle.info().revision(revision).send().await.map(|info| info.sha),
                Handle::Dataset(handle) => handle.info().revision(revision).send().await.map(|info| info.sha),
            })
            .await
            .map_err(|error| of_revision(error, revision))?;
        match sha {
            Some(sha) if SafeName::parse(&sha).is_ok() => Ok(sha),
            _ => Err(self.answer(format!("{revision} has no commit"))),
        }
    }

    /// Every file of a commit.
    pub(crate) async fn listing(&self, commit: &str, listener: &Listener<'_>) -> Result<Vec<Listed>, HubError> {
        let entries = self
            .asked(listener, async || match &self.handle {
                Handle::Model(handle) => {
                    let entries = handle.list_tree().revision(commit).recursive(true).send()?;
                    self.collected(entries).await
                }
                Handle::Dataset(handle) => {
                    let entries = handle.list_tree().revision(commit).recursive(true).send()?;
                    self.collected(entries).await
                }
            })
            .await
            .map_err(|error| of_revision(error, commit))?;
        let mut files = Vec::new();
        for entry in entries {
            let RepoTreeEntry::File { oid, size, path, lfs, .. } = entry else { continue };
            if !is_safe(&path) || SafeName::parse(&oid).is_err() {
                return Err(self.answer(format!("it lists a file by the name {path:?}")));
            }
            files.push(Listed { path, size, oid, large: lfs.is_some() });
        }
        files.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(files)
    }

    /// A page of the listing has the time of one answer; a long listing has many pages.
    async fn collected(
        &self,
        entries: impl futures::Stream<Item = HFResult<RepoTreeEntry>>,
    ) -> HFResult<Vec<RepoTreeEntry>> {
        let mut entries = std::pin::pin!(entries.take(MOST_FILES));
        let mut all = Vec::new();
        while let Some(entry) = entries.next().await {
            all.push(entry?);
        }
        Ok(all)
    }

    /// The bytes of a file from `start` on, and how many the hub says that they are.
    pub(crate) async fn bytes(
        &self,
        file: &Listed,
        commit: &str,
        start: u64,
    ) -> Result<(Option<u64>, HFByteStream), Trouble> {
        let range = (start > 0).then_some(start..file.size);
        let (name, commit) = (file.path.clone(), commit.to_owned());
        let request = async move {
            match &self.handle {
                Handle::Model(handle) => {
                    handle.download_file_stream().filename(name).revision(commit).maybe_range(range).send().await
                }
                Handle::Dataset(handle) => {
                    handle.download_file_stream().filename(name).revision(commit).maybe_range(range).send().await
                }
            }
        };
        match tokio::time::timeout(self.hub.patience.silence, request).await {
            Ok(answer) => answer.map_err(|error| self.trouble(error)),
            Err(_) => Err(self.silent()),
        }
    }

    /// The first bytes of a file: so many, or all that it has if these are fewer.
    pub(crate) async fn start(
        &self,
        file: &Listed,
        commit: &str,
        bytes: u64,
        listener: &Listener<'_>,
    ) -> Result<Vec<u8>, HubError> {
        let bytes = bytes.min(file.size);
        if bytes == 0 {
            return Ok(Vec::new());
        }
        self.asked(listener, async || {
            let (name, commit, range) = (file.path.clone(), commit.to_owned(), 0..bytes);
            let (_, mut stream) = match &self.handle {
                Handle::Model(handle) => {
                    handle.download_file_stream().filename(name).revision(commit).range(range).send().await?
                }
                Handle::Dataset(handle) => {
                    handle.download_file_stream().filename(name).revision(commit).range(range).send().await?
                }
            };
            let mut start = Vec::new();
            // A hub that does not know ranges sends the whole file: the rest of it is not waited for.
            while (start.len() as u64) < bytes {
                let Some(piece) = stream.next().await else { break };
                start.extend_from_slice(&piece?);
            }
            start.truncate(bytes as usize);
            Ok(start)
        })
        .await
    }

    /// Makes a branch from main.
    pub(crate) async fn create_branch(&self, branch: &str) -> HFResult<()> {
        match &self.handle {
            Handle::Model(handle) => handle.create_branch().branch(branch).send().await,
            Handle::Dataset(handle) => handle.create_branch().branch(branch).send().await,
        }
    }

    /// Makes a commit. Returns its name, if the hub says it.
    pub(crate) async fn create_commit<H: ProgressHandler + 'static>(
        &self,
        operations: Vec<CommitOperation>,
        upload: &Upload,
        progress: Arc<H>,
    ) -> HFResult<Option<String>> {
        let branch = upload.branch.clone();
        let commit = match &self.handle {
            Handle::Model(handle) => {
                let commit = handle.create_commit().operations(operations).commit_message(&upload.message);
                commit.maybe_revision(branch).progress(progress).send().await?
            }
            Handle::Dataset(handle) => {
                let commit = handle.create_commit().operations(operations).commit_message(&upload.message);
                commit.maybe_revision(branch).progress(progress).send().await?
            }
        };
        Ok(commit.commit_oid)
    }

    /// Asks until there is an answer, or an error that stays.
    pub(crate) async fn asked<T>(
        &self,
        listener: &Listener<'_>,
        request: impl AsyncFn() -> HFResult<T>,
    ) -> Result<T, HubError> {
        let patience = self.hub.patience;
        let mut pause = patience.pause;
        for attempt in 1.. {
            let trouble = match tokio::time::timeout(patience.silence, request()).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(error)) => self.trouble(error),
                Err(_) => self.silent(),
            };
            let wait = trouble.wait.unwrap_or(pause);
            if !trouble.passes || attempt >= patience.tries || wait > patience.longest_pause {
                return Err(trouble.error);
            }
            listener(News::Again { name: &self.id, why: &trouble.error.to_string(), pause: wait });
            tokio::time::sleep(wait).await;
            pause *= 2;
        }
        unreachable!("the loop ends by returning")
    }

    pub(crate) fn silent(&self) -> Trouble {
        let error = HubError::Silent { endpoint: self.hub.endpoint.clone(), silence: self.hub.patience.silence };
        Trouble { error, passes: true, wait: None }
    }

    pub(crate) fn answer(&self, what: String) -> HubError {
        HubError::Answer { id: self.id.clone(), what }
    }

    /// What an error of the client means.
    pub(crate) fn trouble(&self, error: HFError) -> Trouble {
        let (status, code, message, url) = match error {
            HFError::Http { context } | HFError::AuthRequired { context } => facts!(context),
            HFError::Forbidden { context } | HFError::Conflict { context } => facts!(context),
            HFError::RepoNotFound { context: Some(context), .. }
            | HFError::RevisionNotFound { context: Some(context), .. }
            | HFError::EntryNotFound { context: Some(context), .. } => facts!(context),
            HFError::RepoNotFound { .. } => (404, String::new(), String::new(), String::new()),
            HFError::RevisionNotFound { .. } => (404, "RevisionNotFound".to_owned(), String::new(), String::new()),
            HFError::EntryNotFound { .. } => (404, "EntryNotFound".to_owned(), String::new(), String::new()),
            HFError::RateLimited { retry_after, .. } => {
                return Trouble { error: HubError::Limited { wait: retry_after }, passes: true, wait: retry_after };
            }
            HFError::Request { source, .. } if is_no_json(&source) => {
                return Trouble { error: self.answer(innermost(&source)), passes: false, wait: None };
            }
            HFError::Request { source, .. } => {
                let error = HubError::Unreachable { endpoint: self.hub.endpoint.clone(), what: innermost(&source) };
                // The client has tried to connect three times already.
                return Trouble { error, passes: !source.is_connect(), wait: None };
            }
            HFError::Xet { source, .. } => {
                let error =
                    HubError::Unreachable { endpoint: "large file storage".to_owned(), what: innermost(&*source) };
                return Trouble { error, passes: true, wait: None };
            }
            other => return Trouble { error: self.answer(other.to_string()), passes: false, wait: None },
        };
        let passes = status == 408 || status == 429 || status >= 500;
        // The client asks for it where the answer that has the file names its Xet hash. On the hub itself the redirect
        // before that answer does, which is no reason.
        if url.contains("/xet-read-token/") && !passes {
            let what =
                format!("a file lies in Xet storage, and the token to read it there is refused (status {status})");
            return Trouble { error: self.answer(what), passes, wait: None };
        }
        Trouble { error: self.refusal(status, &code, message), passes, wait: None }
    }

    fn refusal(&self, status: u16, code: &str, message: String) -> HubError {
        let (id, has_token) = (self.id.clone(), self.hub.has_token());
        match (status, code) {
            (401 | 403, "GatedRepo") => HubError::Gated { page: self.hub.page(self.kind, &id), id, has_token, message },
            (_, "RevisionNotFound") => HubError::NoRevision { id, revision: "of that name".to_owned() },
            (404, "EntryNotFound") => self.answer("it lists a file that it does not have".to_owned()),
            // A repository that is private looks like one that is not there.
            (401, _) if message.contains("Invalid credentials") => HubError::BadToken { message },
            (401 | 404, _) => HubError::Missing { id, kind: self.kind, has_token },
            (403, _) => HubError::Forbidden { id, message },
            (429, _) => HubError::Limited { wait: None },
            (400..=499, _) if status != 408 => HubError::Refused { id, status, message },
            _ => HubError::Server { status, message },
        }
    }
}

/// The error with the revision that was asked for.
fn of_revision(error: HubError, revision: &str) -> HubError {
    match error {
        HubError::NoRevision { id, .. } => HubError::NoRevision { id, revision: revision.to_owned() },
        error => error,
    }
}

/// Whether a whole answer came that is no JSON, such as the login page of a network.
fn is_no_json(error: &(dyn Error + 'static)) -> bool {
    let mut error = Some(error);
    while let Some(known) = error {
        if let Some(json) = known.downcast_ref::<serde_json::Error>() {
            return json.is_syntax() || json.is_data();
        }
        error = known.source();
    }
    false
}

/// What is behind an error, in the system's words.
fn innermost(error: &(dyn Error + 'static)) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}

/// Whether a path from the hub may become one in the cache.
fn is_safe(path: &str) -> bool {
    let part = |part: &str| {
        !part.is_empty() && part.len() <= 255 && part != "." && part != ".." && !part.contains(['\\', '\0', ':'])
    };
    path.len() <= 1024 && path.split('/').all(part) && !path.chars().any(char::is_control)
}

#[cfg(test)]
mod tests {
    use super::is_safe;

    #[test]
    fn paths_that_leave_their_folder_are_refused() {
        for path in ["a", "a/b.json", ".gitattributes", "with space/ü.txt"] {
            assert!(is_safe(path), "{path}");
        }
        for path in ["", "/etc/passwd", "../x", "a/../x", "a//b", "a/.", "a\\b", "C:x", "a\nb"] {
            assert!(!is_safe(path), "{path:?}");
        }
    }
}
