//! What can be wrong with a packed matrix, with its file and tensor in every message.

use std::path::{Path, PathBuf};

use finetune_advice::Advice;
use finetune_store::StoreError;

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
pub enum PackedError {
    /// A file could not be read.
    #[error(transparent)]
    Store(#[from] StoreError),

    /// Tensors that do not make a packed matrix.
    #[error("{}{}: {what}", file(path.as_deref()), matrix(name))]
    Malformed {
        /// The file, if the matrix came from one.
        path: Option<PathBuf>,
        /// The name of the tensor, or of the weight that several tensors make. Empty as long as it
        /// is not known.
        name: String,
        /// What is wrong, as "scale 7 is NaN".
        what: String,
    },

    /// A format that is not read.
    #[error("{}{}: {format} is not read", file(path.as_deref()), matrix(name))]
    NotRead {
        /// The file, if the matrix came from one.
        path: Option<PathBuf>,
        /// The name of the tensor that shows the format.
        name: String,
        /// The format, as "HQQ".
        format: String,
        /// What to use in its place.
        instead: &'static str,
    },

    /// A matrix that has no packed form.
    #[error("{} cannot be quantized: {what}", matrix(name))]
    CannotQuantize {
        /// The name of the weight. Empty as long as it is not known.
        name: String,
        /// Why not.
        what: String,
    },

    /// A part of a matrix that has no packed form.
    #[error("{} cannot be split over ranks: {what}", matrix(name))]
    Indivisible {
        /// The name of the weight. Empty as long as it is not known.
        name: String,
        /// Why not.
        what: String,
    },
}

fn file(path: Option<&Path>) -> String {
    path.map_or_else(String::new, |path| format!("{}: ", path.display()))
}

fn matrix(name: &str) -> &str {
    if name.is_empty() { "the packed matrix" } else { name }
}

impl PackedError {
    pub(crate) fn malformed(what: impl Into<String>) -> Self {
        Self::Malformed { path: None, name: String::new(), what: what.into() }
    }

    pub(crate) fn cannot_quantize(what: impl Into<String>) -> Self {
        Self::CannotQuantize { name: String::new(), what: what.into() }
    }

    /// The same error with the name of the weight and the file that it is in, where they were
    /// unknown.
    #[must_use]
    pub fn of(mut self, weight: &str, file: Option<&Path>) -> Self {
        match &mut self {
            Self::Malformed { path, name, .. } | Self::NotRead { path, name, .. } => {
                *path = path.take().or_else(|| file.map(Path::to_path_buf));
                name_it(name, weight);
            }
            Self::CannotQuantize { name, .. } | Self::Indivisible { name, .. } => name_it(name, weight),
            Self::Store(_) => {}
        }
        self
    }
}

fn name_it(name: &mut String, weight: &str) {
    if name.is_empty() {
        weight.clone_into(name);
    }
}

impl Advice for PackedError {
    fn hints(&self) -> Vec<String> {
        match self {
            Self::Store(error) => error.hints(),
            Self::Malformed { .. } => vec![
                "the file is damaged, or written in another format than its names say: fetch it again, or quantize the 16-bit model with `finetune quantize`".to_string(),
            ],
            Self::NotRead { instead, .. } => vec![(*instead).to_string()],
            Self::Indivisible { .. } => vec![
                "take another number of ranks, or whole layers on each: `finetune launch --parallel stages`".to_string(),
            ],
            Self::CannotQuantize { .. } => vec![
                "the 16-bit model is damaged or not finished: fetch it again, or use it without `model.quantization`".to_string(),
            ],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_message_names_what_is_known() {
        let cases = [
            (PackedError::malformed("scale 7 is NaN"), "the packed matrix: scale 7 is NaN"),
            (PackedError::malformed("scale 7 is NaN").of("q_proj.weight", None), "q_proj.weight: scale 7 is NaN"),
            (
                PackedError::malformed("scale 7 is NaN").of("q_proj.weight", Some(Path::new("/m/a.safetensors"))),
                "/m/a.safetensors: q_proj.weight: scale 7 is NaN",
            ),
            (
                PackedError::cannot_quantize("element 3 of row 1 is inf").of("q_proj.weight", None).of("other", None),
                "q_proj.weight cannot be quantized: element 3 of row 1 is inf",
            ),
        ];
        for (error, message) in cases {
            assert_eq!(error.to_string(), message);
            assert!(!error.hints().is_empty());
        }
    }
}
