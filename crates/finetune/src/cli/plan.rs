//! Arguments of `finetune plan`.

use std::path::PathBuf;

use clap::Args;

use super::RecipeArguments;

#[derive(Debug, Args)]
pub(crate) struct PlanArguments {
    #[command(flatten)]
    pub(crate) recipe: RecipeArguments,
    /// How many machines there are, alike but for their memory; each is one rank
    #[arg(long, value_name = "N", default_value_t = 1, conflicts_with = "hostfile")]
    pub(crate) hosts: usize,
    /// The machines that the hostfile names; without --memory each is asked for its memory over ssh
    #[arg(long, value_name = "FILE")]
    pub(crate) hostfile: Option<PathBuf>,
    /// Memory of each machine, such as 64G, or 64G,64G,32G where they differ; by default that of this one
    #[arg(long, value_name = "BYTES")]
    pub(crate) memory: Option<String>,
    /// What a disk reads in a second, such as 2.8G; without it 2G is assumed
    #[arg(long, value_name = "BYTES")]
    pub(crate) disk: Option<String>,
    /// What a link between two machines carries in a second, in bits, such as 10G, which is assumed without it
    #[arg(long, value_name = "BITS")]
    pub(crate) link: Option<String>,
    /// Print the plan as one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}
