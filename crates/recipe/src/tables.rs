//! The tables of the recipe. Every key is declared once: see `declare.rs` for the form.

mod checkpoint;
mod data;
mod distributed;
mod eval;
mod log;
mod lora;
mod model;
mod optimizer;
mod parallel;
mod schedule;
mod train;

use std::path::PathBuf;

use crate::kind::{Integer, OnePath};
use crate::read::Reader;

pub use checkpoint::Checkpoint;
pub use data::Data;
pub use distributed::Distributed;
pub use eval::Eval;
pub use log::Log;
pub use lora::{Lora, TargetModules};
pub use model::Model;
pub use optimizer::Optimizer;
pub use parallel::Parallel;
pub use schedule::{Schedule, Warmup};
pub use train::{Length, Train};

table! {
    []
    /// A checked recipe: every default is filled in, every path is joined to the recipe's folder.
    ///
    /// `recipes/README.md` documents each key. `seed` is 0 to 2^63 - 1, the range of TOML's
    /// integers.
    pub struct Recipe {
        /// the run directory: metrics, checkpoints, the final adapter
        output_dir: PathBuf = OnePath,
            computed(Reader::run_directory, "`runs/` and the recipe's file name without `.toml`"), Local, [
            "out_dir", "output", "output_path", "run_dir", "save_dir",
            "adapter_path" => "the final adapter is its folder `adapter`", "logging_dir",
            "adapter_file" => "the final adapter is its folder `adapter`",
        ];
        /// fixes the order of rows, the initial adapter and dropout
        seed: u64 = Integer(0), default(42), Digest, [
            "random_seed", "data_seed" => "one seed fixes everything", "train.data_seed",
        ];
    }
    with {
        model: Model,
        lora: Lora,
        data: Data,
        train: Train,
        optimizer: Optimizer,
        schedule: Schedule,
        eval: Eval,
        checkpoint: Checkpoint,
        log: Log,
        distributed: Distributed,
        parallel: Parallel,
    }
}
