//! Arguments of `finetune download`.

use clap::Args;

#[derive(Debug, Args)]
pub(crate) struct DownloadArguments {
    /// A model, adapter or dataset: OWNER/NAME, with @REVISION for a branch, a tag or a commit
    #[arg(value_name = "OWNER/NAME[@REVISION]")]
    pub(crate) repository: String,
    /// Fetch the files that match, such as '*.jsonl', instead of what is needed (may be repeated)
    #[arg(long, value_name = "PATTERN")]
    pub(crate) include: Vec<String>,
    /// It is a dataset. Otherwise a dataset is looked for if there is no model of that name
    #[arg(long)]
    pub(crate) dataset: bool,
    /// A branch, a tag or a commit
    #[arg(long, value_name = "REVISION")]
    pub(crate) revision: Option<String>,
    /// Print path, commit and files as one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}
