//! Packed weights in the safetensors files of a Hugging Face directory: the format of a weight, and
//! its matrix.
//!
//! Owns: the layouts of the formats, one file each. A weight's format is told by the tensors beside
//! it, since uploads mix formats; config.json may add what the tensors leave open, and must not
//! contradict them.
//! Must never know: which weights a model has.
//! Start reading at [`find`].
//!
//! Everything is read as if an attacker had written it. The header of the file has been checked by
//! `finetune-store`, so a tensor has the bytes that its shape says. All shapes are compared with
//! the model's before memory is taken. What is taken is at most four times the bytes of the tensors.

mod bitsandbytes;
mod compressed;
mod config;
mod family;
mod foreign;
mod format;
mod fp4;
mod gptq;
mod group_index;
mod mlx;
mod module;
mod numbers;
mod pattern;
mod scaled;
mod tables;
mod told;
mod told_shape;
mod unpack;

use std::fmt;
use std::path::PathBuf;

use finetune_store::TensorSet;

use crate::{PackedError, PackedMatrix};

pub use config::PackedConfig;
pub use format::{Format, Scales};
pub use fp4::{mxfp4_blocks, parts_of_mxfp4};
pub use told::{Place, Told, Weight};
pub use told_shape::told_shape;

use family::Family;
use module::Module;

/// What a format's file knows of a weight: its tensors, checked by their headers.
trait Layout: fmt::Debug + Send + Sync {
    /// What [`PackedMatrix::bytes`] of the matrix will be.
    fn memory(&self) -> u64;

    /// Reads the tensors.
    fn read(&self) -> Result<PackedMatrix, PackedError>;
}

/// A layout, and the format that it is of.
struct Found<'a> {
    format: Format,
    layout: Box<dyn Layout + 'a>,
}

/// A packed weight in a file, whose headers add up. Its numbers have not been read.
#[derive(Debug)]
pub struct PackedTensor<'a> {
    weight: String,
    path: Option<PathBuf>,
    /// All tensors that are of this weight, those that need not be read among them.
    parts: Vec<&'a str>,
    format: Format,
    layout: Box<dyn Layout + 'a>,
}

/// The packed weight of this name, such as `model.layers.0.self_attn.q_proj.weight`, of `[o, i]`.
/// `None`: the weight is there in plain floats, or not at all.
///
/// Reads headers and tensors of a few bytes only.
///
/// # Errors
/// [`PackedError::Malformed`] for tensors that do not add up or contradict config.json,
/// [`PackedError::NotRead`] for a format that is known and not read, [`PackedError::Store`] if a
/// tensor cannot be read.
pub fn find<'a>(
    files: &'a TensorSet,
    config: &PackedConfig,
    weight: &str,
    shape: [usize; 2],
) -> Result<Option<PackedTensor<'a>>, PackedError> {
    let module = Module::new(files, weight, shape);
    let Some(family) = Family::of(&module, config)? else { return Ok(None) };
    module.check_shape()?;
    let Found { format, layout } = match family {
        Family::Mlx => mlx::find(&module, config)?,
        Family::Bitsandbytes4 => bitsandbytes::find_4_bits(&module)?,
        Family::Bitsandbytes8 => bitsandbytes::find_int8(&module)?,
        Family::Compressed => compressed::find(&module, config)?,
        Family::Scaled => scaled::find(&module, config)?,
        Family::Gptq => gptq::find(&module, config)?,
        Family::Blocks => fp4::find_blocks(&module)?,
    };
    Ok(Some(PackedTensor { weight: weight.to_owned(), path: module.path(), parts: module.parts(), format, layout }))
}

impl PackedTensor<'_> {
    /// Reads the weight and checks its numbers.
    ///
    /// # Errors
    /// [`PackedError::Malformed`] for scales that are no numbers and codes that mean none,
    /// [`PackedError::Store`] if a tensor cannot be read.
    pub fn read(&self) -> Result<PackedMatrix, PackedError> {
        let matrix = self.layout.read().and_then(|matrix| matrix.check().map(|()| matrix));
        matrix.map_err(|error| error.of(&self.weight, self.path.as_deref()))
    }

    /// The names of all tensors of the file that are of this weight, in the order of the alphabet.
    pub fn parts(&self) -> Vec<&str> {
        self.parts.clone()
    }

    /// The format that the weight is in.
    pub fn format(&self) -> &Format {
        &self.format
    }

    /// Bytes that the matrix takes in memory, from the headers alone.
    pub fn memory(&self) -> u64 {
        self.layout.memory()
    }
}
