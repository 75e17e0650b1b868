//! The tensors of the files that are written, and what of the model each of them is made of.

use std::collections::{BTreeMap, BTreeSet};

use finetune_packed::{Scheme, file_tensors};
use finetune_store::{Dtype, TensorSpec};

use crate::adapter::mlx_names::MlxModule;
use crate::config::ModelConfig;
use crate::files::base_files::BaseFiles;
use crate::files::packing::stored;
use crate::merge::loader::Loader;
use crate::merge::stacks::{Stack, Stacks};
use crate::merge::{MergedTensor, Merging};

/// A tensor of the files that are written.
pub(super) struct Piece {
    pub(super) spec: TensorSpec,
    /// The number of the model's tensor that it is, or is a part of; or of those that it is made of, one
    /// behind the other.
    pub(super) tensors: Vec<usize>,
    /// How its matrices are packed, and which part of a packed one it has. `None`: it has plain numbers.
    pub(super) packed: Option<(Scheme, usize)>,
    /// Whether 1 is added to its numbers.
    pub(super) adds_one: bool,
    /// The half of the rows that it has, the first or the second. The second comes behind the first. `None`: all.
    pub(super) half: Option<usize>,
}

impl Piece {
    /// Plain numbers as the model has them.
    fn plain(spec: TensorSpec, tensors: Vec<usize>) -> Piece {
        Piece { spec, tensors, packed: None, adds_one: false, half: None }
    }
}

/// A model that is written.
pub(super) struct Written<'w> {
    pub(super) merging: &'w Merging<'w>,
    pub(super) config: &'w ModelConfig,
    pub(super) files: &'w BaseFiles,
    pub(super) tensors: &'w [MergedTensor<'w>],
    /// The number type that each of `tensors` is rounded to.
    pub(super) dtypes: &'w [Dtype],
    /// Names of the tensors that the base computes with.
    pub(super) used: &'w BTreeSet<String>,
}

impl Written<'_> {
    /// All pieces, in the order of the base's files. `loader`: who loads the form that matrices are packed in, if
    /// they are.
    pub(super) fn pieces(&self, loader: Option<&Loader<'_>>) -> Vec<Piece> {
        match loader {
            Some(loader) if loader.is_mlx() => self.for_mlx(loader),
            _ => self.for_transformers(loader),
        }
    }

    /// Under the names that the base's files have, or transformers has of them.
    fn for_transformers(&self, loader: Option<&Loader<'_>>) -> Vec<Piece> {
        let Written { config, files, tensors, .. } = *self;
        let mut pieces: Vec<Piece> = Vec::new();
        let mut last_stack = None;
        // Packed beside experts in plain numbers, transformers writes those of a text model one by one.
        let mut stacks = Stacks::of(config, files, tensors, loader.is_none() || config.wrapper.is_some());
        let names = files.names(config);
        for (number, (tensor, &dtype)) in tensors.iter().zip(self.dtypes).enumerate() {
            if let Some(made) = stacks.take(config, &tensor.name) {
                let piece = |Stack { name, shape, tensors }| Piece::plain(TensorSpec { name, dtype, shape }, tensors);
                pieces.extend(made.into_iter().map(piece));
                continue;
            }
            if let Some((name, shape)) = tensor.base.stack() {
                match pieces.last_mut() {
                    Some(Piece { tensors, .. }) if last_stack == Some(name) => tensors.push(number),
                    _ => {
                        let spec = TensorSpec { name: name.to_owned(), dtype, shape };
                        pieces.push(Piece::plain(spec, vec![number]));
                    }
                }
                last_stack = Some(name);
                continue;
            }
            let name = names.of(&tensor.name).into_owned();
            match loader.and_then(|loader| self.scheme_of(loader, number)) {
                Some(scheme) => pieces.extend(self.packed(scheme, &name, vec![number], None)),
                None => {
                    let spec = TensorSpec { name, dtype, shape: self.shape(number) };
                    pieces.push(Piece::plain(spec, vec![number]));
                }
            }
        }
        pieces
    }

    /// Under the names of mlx-lm, with experts in its stacks. It refuses files with more than it computes with: what
    /// no part of the model uses is left out.
    fn for_mlx(&self, loader: &Loader<'_>) -> Vec<Piece> {
        let mut stacks: BTreeMap<String, BTreeMap<usize, usize>> = BTreeMap::new();
        let is_used = |tensor: &MergedTensor<'_>| self.used.contains(&tensor.base.name);
        let tensors = || self.tensors.iter().enumerate().filter(|(_, tensor)| is_used(tensor));
        for (number, tensor) in tensors() {
            if let MlxModule { name, expert: Some(expert) } = loader.place(&tensor.name) {
                stacks.entry(name).or_default().insert(expert, number);
            }
        }
        let mut pieces = Vec::new();
        for (number, tensor) in tensors() {
            if let Some(names) = loader.halves(&tensor.name) {
                pieces.extend(self.halves(loader, number, &names));
                continue;
            }
            let MlxModule { name, expert } = loader.place(&tensor.name);
            let (numbers, experts) = match expert {
                // All of a stack stand where its first is.
                Some(_) => match stacks.remove(&name) {
                    Some(of_stack) => (of_stack.values().copied().collect(), Some(of_stack.len())),
                    None => continue,
                },
                None => (vec![number], None),
            };
            match self.scheme_of(loader, number) {
                Some(scheme) => pieces.extend(self.packed(scheme, &name, numbers, experts)),
                None => {
                    let shape = loader.shape(&tensor.name, &self.shape(number));
                    let shape = experts.into_iter().chain(shape).collect();
                    let spec = TensorSpec { name, dtype: self.dtypes[number], shape };
                    let adds_one = loader.adds_one(&tensor.name);
                    pieces.push(Piece { adds_one, ..Piece::plain(spec, numbers) });
                }
            }
        }
        pieces
    }

    /// The halves of the rows of a matrix, under names of their own: part by part the first, then the second.
    fn halves(&self, loader: &Loader<'_>, number: usize, names: &[String; 2]) -> Vec<Piece> {
        let mut shape = self.shape(number);
        shape[0] /= 2;
        let dtype = self.dtypes[number];
        let of_half = |half: usize| -> Vec<Piece> {
            let name = &names[half];
            let pieces = match self.scheme_of(loader, number) {
                Some(scheme) => self.packed_as(scheme, name, [shape[0], shape[1]], vec![number], None),
                None => {
                    let spec = TensorSpec { name: name.clone(), dtype, shape: shape.clone() };
                    vec![Piece::plain(spec, vec![number])]
                }
            };
            pieces.into_iter().map(|piece| Piece { half: Some(half), ..piece }).collect()
        };
        of_half(0).into_iter().zip(of_half(1)).flat_map(|(first, second)| [first, second]).collect()
    }

    /// How a tensor is packed, if it is.
    fn scheme_of(&self, loader: &Loader<'_>, number: usize) -> Option<Scheme> {
        let tensor = &self.tensors[number];
        match *self.merging.shape(tensor) {
            [rows, columns] if self.used.contains(&tensor.base.name) => loader.scheme_of(&tensor.name, [rows, columns]),
            _ => None,
        }
    }

    /// The parts of packed matrices of one shape. `experts`: how many are in a stack.
    fn packed(&self, scheme: Scheme, name: &str, tensors: Vec<usize>, experts: Option<usize>) -> Vec<Piece> {
        let shape = self.merging.shape(&self.tensors[tensors[0]]);
        self.packed_as(scheme, name, [shape[0], shape[1]], tensors, experts)
    }

    /// As [`Written::packed`], in this shape.
    fn packed_as(
        &self,
        scheme: Scheme,
        name: &str,
        shape: [usize; 2],
        tensors: Vec<usize>,
        experts: Option<usize>,
    ) -> Vec<Piece> {
        let specs = file_tensors(scheme, name, shape, stored(self.dtypes[tensors[0]]));
        let piece = |(part, TensorSpec { name, dtype, shape }): (usize, TensorSpec)| {
            let spec = TensorSpec { name, dtype, shape: experts.into_iter().chain(shape).collect() };
            Piece { packed: Some((scheme, part)), ..Piece::plain(spec, tensors.clone()) }
        };
        specs.into_iter().enumerate().map(piece).collect()
    }

    /// The shape of a tensor in a file for transformers.
    fn shape(&self, number: usize) -> Vec<usize> {
        let tensor = &self.tensors[number];
        let shape = self.merging.shape(tensor);
        let elements = shape.iter().product::<usize>();
        let as_there = self.files.shape_in_files(&tensor.name);
        as_there.filter(|there| there.iter().product::<usize>() == elements).unwrap_or(shape)
    }
}
