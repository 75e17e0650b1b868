//! A run as its directory and its report show it: everything but the directory itself.

use finetune_allreduce::Who;
use finetune_dataset::{ChatTokenizer, Dataset};
use finetune_model::{BaseName, Model};
use finetune_recipe::Recipe;

use crate::identity::Identity;
use crate::memory::Estimate;
use crate::state::TrainState;

/// Parts of a run, borrowed. [`crate::Run`] documents them.
#[derive(Clone, Copy)]
pub(crate) struct Snapshot<'a> {
    pub(crate) recipe: &'a Recipe,
    pub(crate) model: &'a Model,
    pub(crate) train: &'a Dataset,
    pub(crate) eval: Option<&'a Dataset>,
    pub(crate) tokenizer: Option<&'a ChatTokenizer>,
    /// Steps of the whole run.
    pub(crate) steps: u64,
    pub(crate) state: &'a TrainState,
    /// Each rank's host.
    pub(crate) who: &'a [Who],
    pub(crate) device: &'a str,
    pub(crate) estimate: &'a Estimate,
    pub(crate) identity: &'a Identity,
    pub(crate) base: &'a BaseName,
    pub(crate) base_digest: &'a str,
    pub(crate) date: &'a str,
    pub(crate) text: &'a [(String, Vec<u8>)],
    /// Says how much memory this process has had at most, in bytes.
    pub(crate) peak_memory: Option<fn() -> u64>,
    /// The commit that the program was built from, if it is known.
    pub(crate) commit: Option<&'a str>,
}
