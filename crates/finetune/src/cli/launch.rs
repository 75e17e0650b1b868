//! Arguments of `launch`.

use std::path::PathBuf;

use clap::{ArgGroup, Args};

use super::using::ParallelArgument;

#[derive(Debug, Args)]
#[command(group(ArgGroup::new("where").required(true).args(["ranks", "hostfile"])))]
pub(crate) struct LaunchArguments {
    /// Ranks to start on this machine
    #[arg(short = 'n', long = "ranks", value_name = "N")]
    pub(crate) ranks: Option<usize>,
    /// One rank per host of this file (MLX's JSON format), over ssh; the first host is rank 0 and
    /// writes the run
    #[arg(long, value_name = "FILE")]
    pub(crate) hostfile: Option<PathBuf>,
    /// Start again from the newest checkpoint when a rank was lost, at most so many times
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) max_restarts: u32,
    /// Bring the program, the recipe, the model and the rows to the hosts first
    #[arg(long, requires = "hostfile")]
    pub(crate) copy: bool,
    /// The program on the other hosts, if it lies elsewhere than here
    #[arg(long, value_name = "PATH", requires = "hostfile", conflicts_with = "copy")]
    pub(crate) program: Option<PathBuf>,
    /// The folder to start in on the other hosts, if not the same as here
    #[arg(long, value_name = "DIR", requires = "hostfile", conflicts_with = "copy")]
    pub(crate) directory: Option<PathBuf>,
    /// A configuration file for ssh, instead of the user's
    #[arg(long, value_name = "FILE", requires = "hostfile")]
    pub(crate) ssh_config: Option<PathBuf>,
    /// How ranks hold a model together, with `-- generate` and `-- serve`
    #[arg(long, value_enum, value_name = "HOW")]
    pub(crate) parallel: Option<ParallelArgument>,
    /// Port of rank 0, instead of a free one
    #[arg(long, value_name = "PORT")]
    pub(crate) port: Option<u16>,
    /// The recipe and the flags of `finetune run`, last; a `--` before them is allowed
    #[arg(trailing_var_arg = true, required = true, value_name = "RECIPE.toml [run flags]")]
    pub(crate) run: Vec<String>,
}
