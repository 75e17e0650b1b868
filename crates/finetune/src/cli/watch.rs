//! Arguments of `watch`.

use std::path::PathBuf;

use clap::Args;

#[derive(Debug, Args)]
pub(crate) struct WatchArguments {
    /// Runs: directories, or HOST:DIR at other hosts, or the recipe of a run that is to begin
    #[arg(value_name = "RUN", required = true)]
    pub(crate) runs: Vec<String>,
    /// Print a table of how the runs stand and end
    #[arg(long)]
    pub(crate) once: bool,
    /// With --once: print one JSON object for each run
    #[arg(long, requires = "once")]
    pub(crate) json: bool,
    /// A configuration file for ssh, instead of the user's
    #[arg(long, value_name = "FILE")]
    pub(crate) ssh_config: Option<PathBuf>,
}
