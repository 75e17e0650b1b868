//! Arguments of `compare`.

use std::path::PathBuf;

use clap::Args;

#[derive(Debug, Args)]
pub(crate) struct CompareArguments {
    /// Directories of runs, at least two
    #[arg(value_name = "RUN", required = true, num_args = 2..)]
    pub(crate) runs: Vec<PathBuf>,
    /// Print settings and scores as one JSON object
    #[arg(long)]
    pub(crate) json: bool,
    /// Write a page with the curves of all runs
    #[arg(long, value_name = "FILE")]
    pub(crate) html: Option<PathBuf>,
}
