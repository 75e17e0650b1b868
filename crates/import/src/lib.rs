//! Configurations of other tools as recipes.
//!
//! **Owns** what keys of axolotl, LLaMA-Factory, torchtune and mlx-lm mean here, and the text of
//! the recipe that comes out, with a comment on every line.
//!
//! **Must never know** files but the one it is given, and LLaMA-Factory's `dataset_info.json`
//! beside it.
//!
//! The rule over all others: no wrong value. A key whose value is not understood, or that has no
//! counterpart, is named in the recipe with its line and the reason. A default of the other tool
//! that differs from ours is written out.
//!
//! **Start reading** at [`import`], then at `draft.rs`, which collects the lines of the recipe, and
//! at one tool: `mlx_lm.rs` is the shortest. `yaml.rs` reads the text, `source.rs` says which of
//! its keys were looked at.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod axolotl;
mod draft;
mod error;
mod hugging_face;
mod llama_factory;
mod mlx_lm;
mod omega;
mod places;
mod reasons;
mod source;
mod text;
mod tool;
mod torchtune;
mod variables;
mod yaml;

use std::path::Path;

pub use draft::{Counts, Imported};
pub use error::ImportError;
pub use tool::Tool;

use draft::Draft;
use source::Source;

/// A longer configuration is refused, in bytes.
pub const LONGEST: usize = 1 << 20;

/// The recipe for a configuration of another tool.
///
/// `text` is the content of `file`, whose name stands in comments and errors. `from`: the tool, if
/// the user names it; else the keys tell.
///
/// # Errors
///
/// The text is no YAML, or not a training configuration of one of the four tools.
pub fn import(text: &str, file: &Path, from: Option<Tool>) -> Result<Imported, ImportError> {
    if text.len() > LONGEST {
        return Err(ImportError::TooLong { file: file.to_owned(), bytes: text.len(), limit: LONGEST });
    }
    let mut root = yaml::parse(text, file)?;
    let tool = match from {
        Some(tool) => tool,
        None => tool::recognize(&root, file)?,
    };
    if matches!(tool, Tool::Torchtune | Tool::LlamaFactory) {
        omega::resolve(&mut root);
    }
    tool.trains(&root).map_err(|what| ImportError::NoTraining { file: file.to_owned(), tool, what })?;
    let source = Source::new(&root);
    let mut draft = Draft::default();
    match tool {
        Tool::Axolotl => axolotl::map(&source, &mut draft),
        Tool::LlamaFactory => llama_factory::map(&source, &mut draft, file),
        Tool::Torchtune => torchtune::map(&source, &mut draft),
        Tool::MlxLm => mlx_lm::map(&source, &mut draft),
    }
    reasons::leftovers(tool, &source, &mut draft);
    draft.finish(tool, file)
}
