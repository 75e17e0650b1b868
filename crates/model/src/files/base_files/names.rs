//! What the tensors of a model are called in the files that it was read from, or that it is written to.

use std::borrow::Cow;
use std::collections::BTreeSet;

use finetune_store::TensorSet;

use super::{BaseFiles, Origin};
use crate::config::ModelConfig;
use crate::files::wrapper::{self, Spelling};

/// The names of a base's tensors in its files.
pub(crate) struct Names<'a> {
    files: Option<&'a TensorSet>,
    /// How the files of a multimodal model spell names of the text model. `None`: it is no multimodal model.
    spelling: Option<Spelling>,
    /// Names of tensors of its other parts.
    others: BTreeSet<String>,
}

impl Names<'_> {
    /// The name in the files of a tensor of this name in the model.
    pub(crate) fn of<'n>(&'n self, name: &'n str) -> Cow<'n, str> {
        let (Some(files), Some(spelling)) = (self.files, self.spelling) else { return name.into() };
        if self.others.contains(name) {
            return name.into();
        }
        match files.whole_of(name) {
            // mlx-lm's names of a text model become those of transformers.
            Some(whole) => whole.into(),
            // A part of a stack inside of a multimodal model is written alone.
            None if files.is_part(name) => wrapper::name_inside(name).into(),
            // What is made of several tensors is one.
            None if files.get(name).is_none() => spelling.name(name).into(),
            None => name.into(),
        }
    }
}

impl BaseFiles {
    /// The names in the files of a model of this config.
    pub(crate) fn names(&self, config: &ModelConfig) -> Names<'_> {
        let files = self.safetensors();
        let (Some(set), true) = (files, config.wrapper.is_some()) else {
            return Names { files, spelling: None, others: BTreeSet::new() };
        };
        let spelling = Spelling::of(set.names().filter_map(|name| set.source_of(name)));
        // Packed with the name of the weight that they are of, too.
        let weight = |name: &str| Some(format!("{}.weight", name.strip_suffix(".weight_packed")?));
        let both = |name: &str| std::iter::once(name.to_owned()).chain(weight(name));
        let others = set.left_out().flat_map(|view| both(view.name)).collect();
        Names { files, spelling: Some(spelling.unwrap_or(Spelling::Inside)), others }
    }

    /// The shape in the files of a tensor of this name in the model, where that is another one. A convolution
    /// has that of transformers, which mlx-lm turns into its own.
    pub(crate) fn shape_in_files(&self, name: &str) -> Option<Vec<usize>> {
        let shape = match &self.origin {
            Origin::Directory { files, .. } => files.shape_of_whole(files.whole_of(name)?)?,
            Origin::Gguf(base) => base.shape_in_directory(name)?,
        };
        match *shape {
            [channels, taps, 1] => Some(vec![channels, 1, taps]),
            ref shape => Some(shape.to_vec()),
        }
    }

    /// The stack of transformers that an expert's matrix of this name is read out of, if it is.
    pub(crate) fn stack_of(&self, name: &str) -> Option<&str> {
        let source = self.safetensors()?.source_of(name)?;
        (source.ends_with(".experts.gate_up_proj") || source.ends_with(".experts.down_proj")).then_some(source)
    }
}
