//! The recipe: TOML text becomes a checked [`Recipe`].
//!
//! **Owns** the recipe's keys, their defaults and rules, errors that point at the character, hints
//! for a mistyped key or another tool's name for it, `--set`, the JSON schema for editors, and the
//! digest of what fixes the numbers of a run.
//!
//! **Never knows** what is in any other file, which devices exist, or a network. It asks the disk
//! two things only: whether `model.path` exists (else it is a hub id), and whether `data.train` is
//! a directory (it may then hold the evaluation rows).
//!
//! **Start reading** at `declare.rs`, the form in which `tables` declares every key, and at any
//! table. Then follow a text: `parse.rs` (TOML text to known keys), `read.rs` and `kind.rs` (values
//! to types), `check.rs` (rules between keys) and `resolve.rs` (writing it back, the digest).

#![forbid(unsafe_code)]

#[macro_use]
mod declare;

mod canonical;
mod check;
mod choices;
mod date;
mod duration;
mod hint;
pub mod keys;
mod kind;
mod parse;
mod path;
mod problem;
mod read;
pub mod reference;
mod resolve;
pub mod schema;
mod set;
mod tables;

use std::io::Read;
use std::path::Path;

pub use choices::{
    BackendChoice, DeviceChoice, DtypeChoice, EventFolder, Format, Method, OptimizerName, Overlong, PlacementChoice,
    Quantization, ResidencyChoice, ResultChoice, ScheduleName, SharesChoice, StagesChoice, TopologyChoice, TrainOn,
    WireChoice,
};
pub use kind::{COLUMN_KEYS, RESERVED_VARIABLES, Variable};
pub use path::{HUB_ROWS, is_hub_rows};
pub use problem::{Location, Problem, Problems, RecipeError};
pub use tables::{
    Checkpoint, Data, Distributed, Eval, Length, Log, Lora, Model, Optimizer, Parallel, Recipe, Schedule,
    TargetModules, Train, Warmup,
};

/// A recipe longer than this is refused, in bytes. A data file named by mistake is not read to its
/// end.
pub const LONGEST_RECIPE: u64 = 1 << 20;

impl Recipe {
    /// Reads the recipe at `path`.
    ///
    /// `sets` are the texts of `--set` ("lora.rank=8"). Their paths are relative to the recipe's
    /// folder, as in the file. `output_dir` replaces the recipe's and is relative to the current
    /// directory.
    ///
    /// # Errors
    ///
    /// The file cannot be read, is too long, or has problems: all of them are listed.
    pub fn load(path: &Path, sets: &[String], output_dir: Option<&Path>) -> Result<Recipe, RecipeError> {
        let unreadable = |source| RecipeError::Unreadable { path: path.to_path_buf(), source };
        let file = std::fs::File::open(path).map_err(unreadable)?;
        let mut bytes = Vec::new();
        // One byte more than the limit is read: a pipe has no length that could be asked for.
        file.take(LONGEST_RECIPE + 1).read_to_end(&mut bytes).map_err(unreadable)?;
        if bytes.len() as u64 > LONGEST_RECIPE {
            let length = std::fs::metadata(path).map_or(0, |metadata| metadata.len());
            let bytes = length.max(bytes.len() as u64);
            return Err(RecipeError::TooLong { path: path.to_path_buf(), bytes, limit: LONGEST_RECIPE });
        }
        let text = String::from_utf8(bytes).map_err(|error| {
            let before = &error.as_bytes()[..error.utf8_error().valid_up_to()];
            let line = before.iter().filter(|byte| **byte == b'\n').count() + 1;
            let column = before.iter().rev().take_while(|byte| **byte != b'\n').count() + 1;
            RecipeError::NotText { path: path.to_path_buf(), line, column }
        })?;
        Recipe::parse(&text, path, sets, output_dir)
    }

    /// As [`Recipe::load`], from text.
    ///
    /// `file` names the recipe in errors. Paths are relative to its folder.
    ///
    /// # Errors
    ///
    /// The text is too long, or has problems: all of them are listed.
    pub fn parse(text: &str, file: &Path, sets: &[String], output_dir: Option<&Path>) -> Result<Recipe, RecipeError> {
        if text.len() as u64 > LONGEST_RECIPE {
            let bytes = text.len() as u64;
            return Err(RecipeError::TooLong { path: file.to_path_buf(), bytes, limit: LONGEST_RECIPE });
        }
        let (given, problems) = parse::known_keys(text, sets);
        let mut reader = read::Reader::new(given, problems, file);
        let mut recipe = Recipe::read(&mut reader);
        if let Some(output_dir) = output_dir {
            recipe.output_dir = path::normalized(output_dir);
        }
        if !reader.stopped {
            check::rules(&recipe, &mut reader);
        }
        if reader.problems.is_empty() {
            return Ok(recipe);
        }
        Err(RecipeError::Problems(Problems::sorted(file, text, reader.problems)))
    }
}
