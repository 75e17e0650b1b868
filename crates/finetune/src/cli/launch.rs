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
    /// Port of rank 0, instead of a free one; or the first and last port at which all ranks listen, if a firewall lets
    /// only some through (a recipe has `distributed.ports`)
    #[arg(long, value_name = "PORT[-PORT]", value_parser = ports)]
    pub(crate) port: Option<(u16, u16)>,
    /// The recipe and the flags of `finetune run`, last; a `--` before them is allowed
    #[arg(trailing_var_arg = true, required = true, value_name = "RECIPE.toml [run flags]")]
    pub(crate) run: Vec<String>,
}

/// "29500" or "29500-29599".
fn ports(text: &str) -> Result<(u16, u16), String> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let port = |text: &str| text.parse::<u16>().ok().filter(|&port| port > 0);
    match (port(first), port(last)) {
        (Some(first), Some(last)) if first <= last => Ok((first, last)),
        _ => Err("a port from 1 to 65535 is expected, or the first and the last such as 29500-29599".to_owned()),
    }
}

impl LaunchArguments {
    /// The port of rank 0, if one is named.
    pub(crate) fn port_of_rank_0(&self) -> Option<u16> {
        self.port.filter(|(first, last)| first == last).map(|(first, _)| first)
    }

    /// The ports of all ranks, if a range is named.
    pub(crate) fn ports(&self) -> Option<(u16, u16)> {
        self.port.filter(|(first, last)| first < last)
    }
}
