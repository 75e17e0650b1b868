//! Files of a directory to a repository, as one commit.

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use finetune_store::HubId;
use futures::future::{Either, select};
use hf_hub::progress::{FileStatus, ProgressEvent, ProgressHandler, UploadEvent};
use hf_hub::repository::CommitOperation;
use hf_hub::{HFError, RepoTypeModel};

use crate::error::HubError;
use crate::hub::Hub;
use crate::news::{Listener, News};
use crate::repository::{Kind, Repository};

/// Time between two looks at the progress of the client.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// An upload may be silent this many times as long as a download: the client hashes every file
/// first, and sends small ones in one piece.
const SILENCES: u32 = 20;

/// What is sent where.
#[derive(Clone, Debug)]
pub struct Upload {
    /// `OWNER/NAME`, or `NAME` for the owner of the token.
    pub repository: String,
    /// Names in the repository, and the files here.
    pub files: Vec<(String, PathBuf)>,
    /// A card (`README.md`), if the files have none.
    pub card: Option<Vec<u8>>,
    /// Whether a repository that is made for it is private.
    pub private: bool,
    /// The branch. It is made if it is not there. `None`: main.
    pub branch: Option<String>,
    /// The message of the commit.
    pub message: String,
}

/// What came of an upload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uploaded {
    /// The repository, with its owner.
    pub repository: String,
    /// Its page.
    pub page: String,
    /// The commit, if the hub says it.
    pub commit: Option<String>,
    /// Bytes of all files.
    pub bytes: u64,
}

impl Hub {
    /// Sends files to a repository for models, which is made if it is not there.
    ///
    /// # Errors
    /// Without a token, if the hub refuses something, or if the connection fails.
    pub fn upload(&self, upload: &Upload, listener: &Listener<'_>) -> Result<Uploaded, HubError> {
        let not_an_id = || HubError::NotAnId { text: upload.repository.clone() };
        let id = HubId::parse(&upload.repository).filter(|id| id.revision.is_none()).ok_or_else(not_an_id)?;
        if self.is_offline() {
            return Err(HubError::OfflineUpload);
        }
        let connection = self.connection("an upload", &id.name)?;
        if !self.has_token() {
            return Err(HubError::NoToken);
        }
        connection.block_on(async {
            let repository = self.repository(connection, Kind::Model, &id);
            let name = match id.name.contains('/') {
                true => id.name.clone(),
                false => {
                    let user = repository.asked(listener, async || connection.client.whoami().send().await).await?;
                    format!("{}/{}", user.username, id.name)
                }
            };
            let repository = Repository::new(self, &connection.client, Kind::Model, &name);
            let create = async || {
                let request = connection.client.create_repository().repo_id(&name).repo_type(RepoTypeModel);
                request.private(upload.private).exist_ok(true).send().await
            };
            repository.asked(listener, create).await?;
            if let Some(branch) = upload.branch.as_deref().filter(|branch| *branch != "main") {
                let branched = repository.asked(listener, async || repository.create_branch(branch).await).await;
                match branched {
                    // It is there already.
                    Ok(()) | Err(HubError::Refused { status: 409, .. }) => {}
                    Err(error) => return Err(error),
                }
            }
            let bytes = upload.files.iter().map(|(_, path)| path.metadata().map_or(0, |metadata| metadata.len())).sum();
            listener(News::Begin { id: &name, files: upload.files.len(), bytes, present: 0 });
            let commit = send(&repository, upload, listener).await?;
            listener(News::End);
            Ok(Uploaded { page: self.page(Kind::Model, &name), repository: name, commit, bytes })
        })
    }
}

/// The client's news, on their way from its threads to ours.
struct Teller {
    news: Sender<UploadEvent>,
    /// Milliseconds from the start to the last news.
    last: AtomicU64,
    start: Instant,
}

impl ProgressHandler for Teller {
    fn on_progress(&self, event: &ProgressEvent) {
        if let ProgressEvent::Upload(event) = event {
            self.last.store(self.start.elapsed().as_millis() as u64, Ordering::Relaxed);
            // The listener may be gone, at the end of a failed upload.
            let _ = self.news.send(event.clone());
        }
    }
}

/// The commit itself. The client sends large files first.
async fn send(
    repository: &Repository<'_>,
    upload: &Upload,
    listener: &Listener<'_>,
) -> Result<Option<String>, HubError> {
    let (sender, news) = channel();
    let teller = std::sync::Arc::new(Teller { news: sender, last: AtomicU64::new(0), start: Instant::now() });
    let files = upload.files.iter().map(|(name, path)| CommitOperation::add_file(name, path));
    let card = upload.card.iter().map(|card| CommitOperation::add_bytes("README.md", card.clone()));
    let operations = files.chain(card).collect();
    let commit = repository.create_commit(operations, upload, std::sync::Arc::clone(&teller));
    let mut commit = std::pin::pin!(commit);
    let limit = repository.hub.patience.silence * SILENCES;
    loop {
        let tick = std::pin::pin!(tokio::time::sleep(LOOK_EVERY));
        match select(commit, tick).await {
            Either::Left((outcome, _)) => {
                pass_on(&news, listener);
                return outcome.map_err(|error: HFError| repository.trouble(error).error);
            }
            Either::Right(((), unfinished)) => commit = unfinished,
        }
        pass_on(&news, listener);
        let last = Duration::from_millis(teller.last.load(Ordering::Relaxed));
        if teller.start.elapsed().saturating_sub(last) > limit {
            return Err(HubError::Silent { endpoint: repository.hub.endpoint.clone(), silence: limit });
        }
    }
}

fn pass_on(news: &Receiver<UploadEvent>, listener: &Listener<'_>) {
    for event in news.try_iter() {
        match event {
            UploadEvent::Progress { files, .. } => {
                for file in &files {
                    let (name, done, size) = (file.filename.as_str(), file.bytes_completed, file.total_bytes);
                    match file.status {
                        FileStatus::Complete => listener(News::Done { name }),
                        _ => listener(News::File { name, done, size }),
                    }
                }
            }
            UploadEvent::Committing => listener(News::Committing),
            UploadEvent::Start { .. } | UploadEvent::Complete => {}
        }
    }
}
