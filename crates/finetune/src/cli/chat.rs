//! Arguments of `chat`.

use std::path::PathBuf;

use clap::Args;

use super::ModelArguments;

#[derive(Debug, Args)]
pub(crate) struct ChatArguments {
    #[command(flatten)]
    pub(crate) model: ModelArguments,
    /// The system prompt; by default the one that all training rows of a run begin with, if there
    /// is one. "" leaves it out
    #[arg(long, value_name = "TEXT", conflicts_with = "messages")]
    pub(crate) system: Option<String>,
    /// Begin with this conversation: a JSON list of {"role", "content"}, or an object with
    /// `messages` (and `tools`). A question at its end is answered first
    #[arg(long, value_name = "FILE")]
    pub(crate) messages: Option<PathBuf>,
    /// Stop an answer where this text comes up, which is left out (may be repeated)
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) stop: Vec<String>,
    /// Stop an answer after this many tokens
    #[arg(long, value_name = "N", default_value_t = 1024)]
    pub(crate) max_new_tokens: usize,
    /// 0 takes the most likely token each time; higher is more varied. By default what the model's
    /// generation_config.json says, otherwise 0
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    pub(crate) temperature: Option<f64>,
    /// Draw from the most likely tokens that together reach this probability. By default what the
    /// model's generation_config.json says, otherwise 1
    #[arg(long, value_name = "P")]
    pub(crate) top_p: Option<f64>,
    /// The same seed gives the same answers. Each answer adds 1 to it
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub(crate) seed: u64,
    /// Print each answer as one JSON object, with token ids and speed
    #[arg(long)]
    pub(crate) json: bool,
    /// Keep nothing of what is typed for the next time
    #[arg(long)]
    pub(crate) no_history: bool,
}
