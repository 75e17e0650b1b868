//! Arguments of `finetune upload`.

use std::path::PathBuf;

use clap::Args;

#[derive(Debug, Args)]
pub(crate) struct UploadArguments {
    /// A run (its result), a checkpoint, an adapter or a model directory
    #[arg(value_name = "RUN|DIR")]
    pub(crate) source: PathBuf,
    /// The repository: OWNER/NAME, or NAME for the owner of the token. It is made if it is not there
    #[arg(value_name = "OWNER/NAME")]
    pub(crate) repository: String,
    /// Only you see the repository, if it is made now
    #[arg(long)]
    pub(crate) private: bool,
    /// A branch, which is made if it is not there; by default main
    #[arg(long, value_name = "BRANCH")]
    pub(crate) revision: Option<String>,
    /// The message of the commit
    #[arg(long, short, value_name = "TEXT")]
    pub(crate) message: Option<String>,
    /// Print page and commit as one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}
