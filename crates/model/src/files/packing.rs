//! What packed matrices of a base are, in words and in bytes, and the recipe's names of the forms that
//! a base can be packed in while it is read.

use finetune_kernels::FloatType;
use finetune_packed::{PackedMatrix, Scheme, Stored};
use finetune_store::Dtype;
use rayon::prelude::*;

use crate::adaptation::{is_expert, is_of_vocabulary, module_of};
use crate::branch::{EMBEDDING, OUTPUT};
use crate::files::base_files::BaseTensor;
use crate::lora::layer_of;

/// What is known of a base's matrices from the headers of its files.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BaseForm {
    /// How matrices are packed, for people: "MLX 4-bit, groups of 64; 212 of 272 matrices packed".
    /// `None`: none is.
    pub words: Option<String>,
    /// Sizes of all packed matrices.
    pub packed: PackedSizes,
    /// Sizes of those among embedding and output layer.
    pub vocabulary: PackedSizes,
    /// Bytes that are taken while the largest matrix is packed: its elements in f32.
    pub loading: u64,
    /// Elements of matrices whose rows stay in the files until they are needed.
    pub by_row: u64,
    /// Whether the embedding's rows stay in its file too where layers are read from the disk: it is not packed, and no
    /// output layer.
    pub embedding_by_row: bool,
    /// Whether matrices are packed in the files, and not only once they are read.
    pub is_packed_in_files: bool,
    /// The matrices of each layer.
    pub layers: Vec<LayerSizes>,
    /// The embedding, and the output layer if that is another matrix.
    pub ends: [LayerSizes; 2],
}

/// Sizes of the matrices of a layer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LayerSizes {
    /// Elements of those that are not packed.
    pub dense: u64,
    /// Those that are packed.
    pub packed: PackedSizes,
    /// Those of experts, which are among both.
    pub experts: ExpertSizes,
}

/// Sizes of the matrices of a layer's experts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExpertSizes {
    /// Elements of those that are not packed.
    pub dense: u64,
    /// Bytes of memory of those that are.
    pub packed: u64,
    /// Elements of the largest that is not packed.
    pub largest_dense: u64,
    /// Bytes of memory of the largest that is.
    pub largest_packed: u64,
}

impl ExpertSizes {
    /// Bytes in memory, if those that are not packed are held in this number type.
    pub fn bytes(&self, held: FloatType) -> u64 {
        self.dense * held.bytes() as u64 + self.packed
    }

    /// Bytes in memory of the largest.
    pub fn largest(&self, held: FloatType) -> u64 {
        self.largest_packed.max(self.largest_dense * held.bytes() as u64)
    }

    fn add(&mut self, other: &ExpertSizes) {
        self.dense += other.dense;
        self.packed += other.packed;
        self.largest_dense = self.largest_dense.max(other.largest_dense);
        self.largest_packed = self.largest_packed.max(other.largest_packed);
    }
}

impl LayerSizes {
    /// A matrix of this name and so many elements. `packed`: bytes of memory that they take if they are packed.
    pub fn of_matrix(name: &str, elements: u64, packed: Option<u64>) -> LayerSizes {
        let size = match packed {
            None => LayerSizes { dense: elements, ..LayerSizes::default() },
            Some(bytes) => {
                LayerSizes { packed: PackedSizes { elements, bytes, largest: elements }, ..LayerSizes::default() }
            }
        };
        if !is_expert(module_of(name)) {
            return size;
        }
        let (dense, packed) = (size.dense, size.packed.bytes);
        LayerSizes { experts: ExpertSizes { dense, packed, largest_dense: dense, largest_packed: packed }, ..size }
    }

    /// Bytes in memory of all but the experts.
    pub fn bytes_without_experts(&self, held: FloatType) -> u64 {
        self.bytes(held) - self.experts.bytes(held)
    }

    /// Bytes in memory, if those that are not packed are held in this number type.
    pub fn bytes(&self, held: FloatType) -> u64 {
        self.dense * held.bytes() as u64 + self.packed.bytes
    }

    /// Adds the matrices of another one.
    pub fn add_size(&mut self, other: &LayerSizes) {
        self.dense += other.dense;
        self.packed.add(&other.packed);
        self.experts.add(&other.experts);
    }

    fn add(&mut self, tensor: &BaseTensor<'_>) {
        let elements = tensor.shape.iter().product::<usize>() as u64;
        self.add_size(&LayerSizes::of_matrix(&tensor.name, elements, tensor.packed_bytes()));
    }
}

/// Sizes of packed matrices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PackedSizes {
    /// Elements of all of them.
    pub elements: u64,
    /// Bytes of memory that they take.
    pub bytes: u64,
    /// Elements of the largest.
    pub largest: u64,
}

impl BaseForm {
    /// Of these tensors, which are those of a model.
    pub(crate) fn of(tensors: &[BaseTensor<'_>]) -> BaseForm {
        let elements = |tensor: &BaseTensor<'_>| tensor.shape.iter().product::<usize>() as u64;
        let of_vocabulary = |tensor: &&BaseTensor<'_>| is_of_vocabulary(module_of(&tensor.name));
        let find = |module: &str| tensors.iter().find(|tensor| module_of(&tensor.name) == module);
        let is_in_file = |embedding: &BaseTensor<'_>| embedding.view().is_some();
        BaseForm {
            words: described(tensors.iter()),
            packed: PackedSizes::of(tensors.iter()),
            vocabulary: PackedSizes::of(tensors.iter().filter(of_vocabulary)),
            by_row: tensors.iter().filter(|tensor| tensor.is_by_row()).map(elements).sum(),
            embedding_by_row: find(OUTPUT).is_some() && find(EMBEDDING).is_some_and(is_in_file),
            loading: tensors.iter().map(BaseTensor::loading_bytes).max().unwrap_or(0),
            is_packed_in_files: tensors.iter().any(BaseTensor::is_packed_in_file),
            layers: layers_of(tensors),
            ends: [EMBEDDING, OUTPUT].map(|module| end_of(tensors, module)),
        }
    }

    /// Bytes of embedding and output layer in memory, if those that are not packed are held in this number type.
    /// `reads_layers`: whether layers are read from the disk, and perhaps the embedding with them.
    pub fn ends_bytes(&self, held: FloatType, reads_layers: bool) -> u64 {
        let [embedding, output] = self.ends.map(|end| end.bytes(held));
        if reads_layers && self.embedding_by_row { output } else { embedding + output }
    }
}

/// The size of the embedding or the output layer.
fn end_of(tensors: &[BaseTensor<'_>], module: &str) -> LayerSizes {
    let mut size = LayerSizes::default();
    for tensor in tensors.iter().filter(|tensor| tensor.shape.len() == 2 && module_of(&tensor.name) == module) {
        size.add(tensor);
    }
    size
}

/// The sizes of each layer's matrices.
fn layers_of(tensors: &[BaseTensor<'_>]) -> Vec<LayerSizes> {
    let mut layers: Vec<LayerSizes> = Vec::new();
    for tensor in tensors.iter().filter(|tensor| tensor.shape.len() == 2) {
        let Some(n) = layer_of(&tensor.name) else { continue };
        layers.resize(layers.len().max(n + 1), LayerSizes::default());
        layers[n].add(tensor);
    }
    layers
}

impl PackedSizes {
    pub(crate) fn add(&mut self, other: &PackedSizes) {
        self.elements += other.elements;
        self.bytes += other.bytes;
        self.largest = self.largest.max(other.largest);
    }

    fn of<'t, 'a: 't>(tensors: impl Iterator<Item = &'t BaseTensor<'a>>) -> PackedSizes {
        let mut sizes = PackedSizes::default();
        for (tensor, bytes) in tensors.filter_map(|tensor| Some((tensor, tensor.packed_bytes()?))) {
            let elements = tensor.shape.iter().product::<usize>() as u64;
            sizes.elements += elements;
            sizes.bytes += bytes;
            sizes.largest = sizes.largest.max(elements);
        }
        sizes
    }
}

/// Formats of the packed matrices among these tensors, the most frequent first, and how many matrices
/// are packed. `None`: none is.
pub(crate) fn described<'t, 'a: 't>(tensors: impl Iterator<Item = &'t BaseTensor<'a>>) -> Option<String> {
    described_of(tensors.filter(|tensor| tensor.shape.len() == 2).map(BaseTensor::format))
}

/// The same of matrices in these formats; `None`: not packed.
pub(super) fn described_of(matrix_formats: impl Iterator<Item = Option<String>>) -> Option<String> {
    let mut formats: Vec<(String, usize)> = Vec::new();
    let mut matrices = 0;
    for format in matrix_formats {
        matrices += 1;
        let Some(format) = format else { continue };
        match formats.iter_mut().find(|(known, _)| *known == format) {
            Some((_, count)) => *count += 1,
            None => formats.push((format, 1)),
        }
    }
    formats.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
    let packed: usize = formats.iter().map(|(_, count)| count).sum();
    let names = match formats.as_slice() {
        [] => return None,
        [(format, _)] => format.clone(),
        several => several.iter().map(|(format, count)| format!("{format} ({count})")).collect::<Vec<_>>().join(", "),
    };
    Some(format!("{names}; {packed} of {matrices} matrices packed"))
}

/// The forms that a base can be packed in while it is read, by their names in recipes.
const SCHEMES: [(&str, Scheme); 5] = [
    ("nf4", Scheme::Nf4),
    ("int8", Scheme::Int8),
    ("mlx4", Scheme::Mlx4),
    ("mlx8", Scheme::Mlx8),
    ("mxfp4", Scheme::Mxfp4),
];

/// The form of this name in recipes (`model.quantization`). `None`: there is none.
pub fn scheme_named(word: &str) -> Option<Scheme> {
    SCHEMES.iter().find(|(known, _)| *known == word).map(|(_, scheme)| *scheme)
}

/// The name in recipes of a form.
pub fn scheme_word(scheme: Scheme) -> &'static str {
    SCHEMES.iter().find(|(_, known)| *known == scheme).map_or("", |(word, _)| word)
}

/// The number type that a matrix is quantized from: that of its file.
pub(crate) fn stored(dtype: Dtype) -> Stored {
    match dtype {
        Dtype::F16 => Stored::F16,
        Dtype::BF16 => Stored::BF16,
        _ => Stored::F32,
    }
}

/// Bytes in memory of a matrix once it is packed.
pub(crate) fn quantized_bytes(scheme: Scheme, shape: &[usize], dtype: Dtype) -> u64 {
    match *shape {
        [rows, columns] => finetune_packed::memory(scheme, [rows, columns], stored(dtype)),
        _ => 0,
    }
}

/// All elements of a packed matrix in f32, row-major.
pub(crate) fn decoded(matrix: &PackedMatrix) -> Vec<f32> {
    let [rows, columns] = matrix.shape;
    let mut values = vec![0.0; rows * columns];
    values.par_chunks_mut(columns).enumerate().for_each(|(row, out)| matrix.decode_row(row, 0..columns, out));
    values
}

/// Whether two packed matrices have the same elements.
pub(crate) fn have_same_elements(a: &PackedMatrix, b: &PackedMatrix) -> bool {
    let [rows, columns] = a.shape;
    let row_of = |matrix: &PackedMatrix, row: usize| {
        let mut values = vec![0.0; columns];
        matrix.decode_row(row, 0..columns, &mut values);
        values
    };
    a.shape == b.shape && (0..rows).into_par_iter().all(|row| row_of(a, row) == row_of(b, row))
}
