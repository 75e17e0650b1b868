//! Arguments of `init`.

use std::path::PathBuf;

use clap::Args;

#[derive(Debug, Args)]
pub(crate) struct InitArguments {
    /// Where to write; it is created if it is not there
    #[arg(value_name = "DIR", default_value = ".")]
    pub(crate) directory: PathBuf,
    /// The model to train: a directory or a hub id; without it the small one that comes with
    /// finetune
    #[arg(long, value_name = "MODEL")]
    pub(crate) model: Option<String>,
    /// Your rows; without them a small set of chats is written
    #[arg(long, value_name = "FILE")]
    pub(crate) data: Option<PathBuf>,
}
