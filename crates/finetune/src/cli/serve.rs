//! Arguments of `serve`.

use std::path::PathBuf;

use clap::Args;

use super::ModelArguments;
use super::quantize::SchemeArgument;
use super::using::{DeviceArgument, DtypeArgument, ParallelArgument, ResidencyArgument};

#[derive(Debug, Args)]
pub(crate) struct ServeArguments {
    /// A model directory or hub id, which is the base; or a run, a checkpoint or an adapter, whose
    /// base gets the id of its directory, and the adapter that of the run
    #[arg(value_name = "RUN|MODEL_DIR")]
    pub(crate) model: PathBuf,
    /// An adapter under a model id of its own: a run, a checkpoint, an adapter's directory or its
    /// hub id (may be repeated)
    #[arg(long = "adapter", value_name = "NAME=DIR", value_parser = NamedAdapter::parse)]
    pub(crate) adapters: Vec<NamedAdapter>,
    /// Adapters below this directory may be loaded while the server runs
    #[arg(long, value_name = "DIR")]
    pub(crate) adapters_dir: Option<PathBuf>,
    /// The name or address to listen at
    #[arg(long, value_name = "HOST", default_value = "127.0.0.1")]
    pub(crate) host: String,
    /// The port to listen at; 0: a free one
    #[arg(long, value_name = "PORT", default_value_t = 8080)]
    pub(crate) port: u16,
    /// The first line of this file is the key that clients have to send
    #[arg(long, value_name = "FILE")]
    pub(crate) api_key_file: Option<PathBuf>,
    /// The most tokens of an answer whose request does not say
    #[arg(long, value_name = "N", default_value_t = 1024)]
    pub(crate) max_tokens: usize,
    /// The most requests that wait; more are refused
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub(crate) queue: usize,
    /// Seconds that a request may wait for its turn; then it is refused
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    pub(crate) max_wait: u64,
    /// The most requests that are answered at a time; by default 16, on a GPU 8
    #[arg(long, value_name = "N")]
    pub(crate) slots: Option<usize>,
    /// Propose up to N tokens (at most 7) that followed the last ones earlier in the text; the answers are the same
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(0..=7))]
    pub(crate) speculate: usize,
    /// Seconds that answers may go on once the server is asked to stop
    #[arg(long, value_name = "SECONDS", default_value_t = 5)]
    pub(crate) grace: u64,
    /// The base model, if it is not where the run or adapter says
    #[arg(long, value_name = "MODEL_DIR")]
    pub(crate) base: Option<PathBuf>,
    /// Use adapters on another base model than they were trained on all the same
    #[arg(long)]
    pub(crate) force: bool,
    /// A chat template to use instead of those that come with adapters and model
    #[arg(long, value_name = "FILE")]
    pub(crate) chat_template: Option<PathBuf>,
    /// Where to compute; auto: a GPU if there is one
    #[arg(long, value_enum, default_value_t = DeviceArgument::Auto)]
    pub(crate) device: DeviceArgument,
    /// Number type to compute in on a GPU; auto: what the model's file has. On a CPU, bf16 reads prompts in products of
    /// that type, if it has them (`finetune devices`)
    #[arg(long, value_enum, default_value_t = DtypeArgument::Auto)]
    pub(crate) dtype: DtypeArgument,
    /// Pack a 16-bit model while it is loaded; by default as the first adapter's base in training
    #[arg(long, value_enum, value_name = "SCHEME")]
    pub(crate) quantization: Option<SchemeArgument>,
    /// A rank that `finetune launch` started: its place comes on standard input
    #[arg(long, hide = true)]
    pub(crate) assigned: bool,
    /// How the ranks hold the model together, as `launch` was told
    #[arg(long, value_enum, hide = true, requires = "assigned", default_value_t = ParallelArgument::Stages)]
    pub(crate) parallel: ParallelArgument,
}

impl ServeArguments {
    /// What names the model. Its layers are in memory.
    pub(crate) fn model(&self) -> ModelArguments {
        ModelArguments {
            model: self.model.clone(),
            adapter: None,
            base: self.base.clone(),
            force: self.force,
            chat_template: self.chat_template.clone(),
            device: self.device,
            dtype: self.dtype,
            quantization: self.quantization,
            residency: ResidencyArgument::Memory,
        }
    }
}

/// An adapter and its model id.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NamedAdapter {
    pub(crate) name: String,
    pub(crate) path: PathBuf,
}

impl NamedAdapter {
    fn parse(text: &str) -> Result<NamedAdapter, String> {
        match text.split_once('=') {
            Some((name, path)) if !name.is_empty() && !path.is_empty() => {
                Ok(NamedAdapter { name: name.to_owned(), path: PathBuf::from(path) })
            }
            _ => Err("NAME=DIR is meant, such as support=runs/support".to_owned()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_adapters() {
        let named = |name: &str, path: &str| Ok(NamedAdapter { name: name.to_owned(), path: PathBuf::from(path) });
        assert_eq!(NamedAdapter::parse("a=runs/a"), named("a", "runs/a"));
        assert_eq!(NamedAdapter::parse("a=b=c"), named("a", "b=c"));
        for wrong in ["a", "=a", "a=", ""] {
            assert!(NamedAdapter::parse(wrong).is_err(), "{wrong}");
        }
    }
}
