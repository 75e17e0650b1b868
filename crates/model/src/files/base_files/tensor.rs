//! A tensor of a base: what is known of it before it is read, and its elements, or the part of them that is here.

use std::path::Path;

use finetune_gguf::TensorType;
use finetune_packed::{PackedMatrix, quantize};
use finetune_store::{Dtype, TensorView};
use rayon::prelude::*;

use super::{BaseTensor, OfExpert, Stored};
use crate::error::ModelError;
use crate::files::by_row::PER_LAYER_TABLE;
use crate::files::finite::expect_finite;
use crate::files::floats::{dtype_of, numbers, to_finite_f32};
use crate::files::packing;
use crate::files::part::bytes_of_part;
use crate::files::taking_turns::FORMAT;
use crate::gguf::read::GgufStored;
use crate::slice::{Along, Cut};

impl Stored<'_> {
    pub(super) fn is_packed(&self) -> bool {
        match self {
            Stored::Packed(_) | Stored::Gguf(_, GgufStored::Packed { .. }) => true,
            Stored::OfStack(of_stack) => of_stack.is_packed(),
            Stored::OfExpert(expert) => expert.parts.iter().any(BaseTensor::is_packed_in_file),
            Stored::OfHeads(heads) => heads.all().any(BaseTensor::is_packed_in_file),
            Stored::OfRows(rows) => rows.all().any(BaseTensor::is_packed_in_file),
            Stored::Dense(_) | Stored::WithOne(_) | Stored::Gguf(..) => false,
        }
    }
}

impl<'a> BaseTensor<'a> {
    /// The same, of which only a part is read.
    pub(crate) fn part(self, cut: Option<Cut>) -> BaseTensor<'a> {
        BaseTensor { cut, ..self }
    }
}

impl BaseTensor<'_> {
    /// The file that it is in, or the base if several tensors make it.
    pub(crate) fn path(&self) -> &Path {
        match &self.stored {
            Stored::Dense(view) | Stored::WithOne(view) => view.path(),
            Stored::Packed(_) => self.base,
            Stored::OfStack(of_stack) => of_stack.view().path(),
            Stored::OfExpert(expert) => expert.parts.first().map_or(self.base, BaseTensor::path),
            Stored::OfHeads(heads) => heads.first().map_or(self.base, BaseTensor::path),
            Stored::OfRows(rows) => rows.first().map_or(self.base, BaseTensor::path),
            Stored::Gguf(base, _) => base.path_of(&self.name),
        }
    }

    /// Whether the file of a vector is here, and not only the header.
    pub(crate) fn is_here(&self) -> bool {
        match &self.stored {
            Stored::Dense(view) | Stored::WithOne(view) => view.is_here(),
            Stored::OfStack(of_stack) => of_stack.view().is_here(),
            Stored::OfHeads(heads) => heads.all().all(BaseTensor::is_here),
            Stored::OfRows(rows) => rows.all().all(BaseTensor::is_here),
            Stored::Packed(_) | Stored::OfExpert(_) | Stored::Gguf(..) => true,
        }
    }

    /// Whether its rows are read when they are needed.
    pub(crate) fn is_by_row(&self) -> bool {
        self.name == PER_LAYER_TABLE && self.view().is_some()
    }

    /// Whether it is read out of a stack of all experts that is written as it is read.
    pub(super) fn is_of_stack(&self) -> bool {
        matches!(self.stored, Stored::OfStack(_))
    }

    /// The stack of all experts that it is a part of, if such stacks are opened: its name and shape.
    pub(crate) fn stack(&self) -> Option<(&str, Vec<usize>)> {
        let Stored::OfExpert(OfExpert { stack, experts, .. }) = &self.stored else { return None };
        Some((stack, std::iter::once(*experts).chain(self.shape.iter().copied()).collect()))
    }

    /// The tensor of the files beside which it is written.
    pub(super) fn name_in_file(&self) -> &str {
        let parts = match &self.stored {
            Stored::OfExpert(OfExpert { parts, .. }) => parts,
            Stored::OfHeads(heads) => return heads.first().map_or(&self.name, |first| &first.name),
            Stored::OfRows(rows) => return rows.first().map_or(&self.name, |first| &first.name),
            _ => return &self.name,
        };
        match parts.first().map(|part| &part.stored) {
            Some(Stored::OfStack(of_stack)) => of_stack.view().name,
            _ => &self.name,
        }
    }

    /// Whether its file has a few bits of each element.
    pub(crate) fn is_packed_in_file(&self) -> bool {
        self.stored.is_packed()
    }

    /// Whether its file has it in MXFP4: an expert's matrix of gpt-oss, or one of a GGUF file.
    pub(crate) fn is_mxfp4_in_file(&self) -> bool {
        match &self.stored {
            Stored::OfStack(of_stack) => of_stack.is_packed(),
            Stored::Gguf(_, GgufStored::Packed { name, .. }) => *name == TensorType::Mxfp4.name(),
            _ => false,
        }
    }

    /// The number type of its elements in the file; `None` if it is packed there.
    pub(crate) fn dtype(&self) -> Option<Dtype> {
        match &self.stored {
            Stored::Dense(view) | Stored::WithOne(view) => Some(view.dtype),
            Stored::OfStack(of_stack) => of_stack.dtype(),
            Stored::OfExpert(expert) => expert.parts.first().and_then(BaseTensor::dtype),
            Stored::OfHeads(heads) => heads.first().filter(|_| !self.is_packed_in_file()).and_then(BaseTensor::dtype),
            Stored::OfRows(rows) => rows.first().filter(|_| !self.is_packed_in_file()).and_then(BaseTensor::dtype),
            Stored::Gguf(_, GgufStored::Dense(kind, _)) => Some(dtype_of(*kind)),
            Stored::Packed(_) | Stored::Gguf(..) => None,
        }
    }

    /// The tensor as it lies in a safetensors file, if that has all elements and they stay as they are.
    pub(crate) fn view(&self) -> Option<&TensorView<'_>> {
        match &self.stored {
            Stored::Dense(view) if self.quantization.is_none() => Some(view),
            _ => None,
        }
    }

    /// The same, if all of it is read.
    pub(crate) fn whole_view(&self) -> Option<&TensorView<'_>> {
        self.view().filter(|_| self.cut.is_none())
    }

    /// The bytes of the elements in this number type, if the file has them so and they stay as they are.
    ///
    /// # Errors
    /// If the file cannot be read. A number that is not finite is an error if `must_be_finite`.
    pub(crate) fn bytes_in(&self, dtype: Dtype, must_be_finite: bool) -> Result<Option<Vec<u8>>, ModelError> {
        if self.quantization.is_some() || self.dtype() != Some(dtype) {
            return Ok(None);
        }
        if let Stored::Gguf(base, _) = &self.stored {
            let bytes = base.dense_bytes(&self.name)?;
            return Ok(Some(match &self.cut {
                Some(cut) => cut.wide(dtype.size()).of(&bytes),
                None => bytes,
            }));
        }
        let Some(view) = self.view() else { return Ok(None) };
        if let Some(cut) = &self.cut {
            return Ok(Some(bytes_of_part(view, cut, must_be_finite)?));
        }
        let bytes = view.bytes()?;
        if must_be_finite {
            expect_finite(view, &bytes, 0)?;
        }
        Ok(Some(bytes))
    }

    /// What a packed matrix is packed as, in words.
    pub(crate) fn format(&self) -> Option<String> {
        match (&self.stored, self.quantization) {
            (Stored::Packed(packed), _) => Some(packed.format().to_string()),
            (Stored::OfStack(of_stack), _) if of_stack.is_packed() => Some(FORMAT.to_owned()),
            (Stored::OfExpert(expert), _) => expert.parts.first().and_then(BaseTensor::format),
            (Stored::OfHeads(heads), None) => heads.all().find_map(BaseTensor::format),
            (Stored::OfRows(rows), None) => rows.all().find_map(BaseTensor::format),
            (Stored::Gguf(_, GgufStored::Packed { name, .. }), _) => Some(format!("GGUF {name}")),
            (_, Some(scheme)) => Some(format!("{} while it is loaded", packing::scheme_word(scheme))),
            (_, None) => None,
        }
    }

    /// Bytes of a packed matrix in memory; `None` of a dense one.
    pub(crate) fn packed_bytes(&self) -> Option<u64> {
        match (&self.stored, self.quantization) {
            (Stored::Packed(packed), _) => Some(packed.memory()),
            (Stored::OfStack(of_stack), _) if of_stack.is_packed() => Some(of_stack.packed_bytes()),
            (Stored::OfExpert(expert), _) => expert.parts.iter().map(BaseTensor::packed_bytes).sum(),
            (Stored::OfRows(rows), None) => rows.packed_bytes(),
            (Stored::Gguf(_, GgufStored::Packed { bytes, .. }), _) => Some(*bytes as u64),
            (_, Some(scheme)) => Some(packing::quantized_bytes(scheme, &self.shape, self.dtype()?)),
            (_, None) => None,
        }
    }

    /// Bytes that are taken while it is packed: its elements in f32.
    pub(crate) fn loading_bytes(&self) -> u64 {
        let elements = self.shape.iter().product::<usize>() as u64;
        if self.quantization.is_some() { 4 * elements } else { 0 }
    }

    /// Names of the tensors that make it; none of a dense one.
    pub(crate) fn parts(&self) -> Vec<String> {
        match &self.stored {
            Stored::Packed(packed) => packed.parts().into_iter().map(str::to_owned).collect(),
            Stored::OfStack(of_stack) => of_stack.stacks(),
            Stored::OfExpert(expert) => expert.parts.iter().flat_map(BaseTensor::parts).collect(),
            Stored::OfHeads(heads) => heads.parts(),
            Stored::OfRows(rows) => rows.names(),
            Stored::Dense(_) | Stored::WithOne(_) | Stored::Gguf(..) => Vec::new(),
        }
    }

    /// The packed matrix, read or made. `None`: it is dense. A part has the elements that the whole has there.
    ///
    /// # Errors
    /// If the file cannot be read, or a number is not finite; if elements share scales with others that are not in
    /// the part.
    pub(crate) fn packed(&self) -> Result<Option<PackedMatrix>, ModelError> {
        let Some(whole) = self.whole_packed()? else { return Ok(None) };
        let Some(Cut { along, .. }) = &self.cut else { return Ok(Some(whole)) };
        let part = match along {
            Along::Rows(ranges) => whole.rows(ranges),
            Along::Columns(range) => whole.columns(range.clone()),
        };
        Ok(Some(part.map_err(|error| error.of(&self.name, Some(self.path())))?))
    }

    fn whole_packed(&self) -> Result<Option<PackedMatrix>, ModelError> {
        match &self.stored {
            Stored::Packed(packed) => return Ok(Some(packed.read()?)),
            Stored::OfStack(of_stack) if of_stack.is_packed() => return of_stack.packed(),
            Stored::Gguf(base, GgufStored::Packed { .. }) => return Ok(Some(base.packed(&self.name)?)),
            Stored::OfRows(rows) if rows.format().is_some() => return rows.packed(),
            Stored::Dense(_)
            | Stored::WithOne(_)
            | Stored::OfStack(_)
            | Stored::OfExpert(_)
            | Stored::OfHeads(_)
            | Stored::OfRows(_)
            | Stored::Gguf(..) => {}
        }
        let (Some(scheme), Some(dtype), &[rows, columns]) = (self.quantization, self.dtype(), self.shape.as_slice())
        else {
            return Ok(None);
        };
        let made = quantize(scheme, &self.whole_values()?, [rows, columns], packing::stored(dtype));
        Ok(Some(made.map_err(|error| error.of(&self.name, Some(self.path())))?))
    }

    /// The elements in f32, decoded if they are packed.
    ///
    /// # Errors
    /// If the file cannot be read, or a number is not finite.
    pub(crate) fn values(&self) -> Result<Vec<f32>, ModelError> {
        match self.packed()? {
            Some(matrix) => Ok(packing::decoded(&matrix)),
            None => self.stored_values(),
        }
    }

    /// The elements in f32 as the file has them.
    fn stored_values(&self) -> Result<Vec<f32>, ModelError> {
        match (&self.stored, &self.cut) {
            (Stored::Dense(view), Some(cut)) => Ok(numbers(&bytes_of_part(view, cut, true)?, view.dtype)),
            (_, Some(cut)) => Ok(cut.of(&self.whole_values()?)),
            (_, None) => self.whole_values(),
        }
    }

    /// All elements in f32 as the file has them.
    fn whole_values(&self) -> Result<Vec<f32>, ModelError> {
        match &self.stored {
            Stored::Dense(view) => to_finite_f32(view),
            Stored::WithOne(view) => Ok(to_finite_f32(view)?.into_iter().map(|value| value - 1.0).collect()),
            Stored::Packed(packed) => Ok(packing::decoded(&packed.read()?)),
            Stored::OfStack(of_stack) => of_stack.values(),
            Stored::OfExpert(expert) => expert.values(self.shape[0]),
            Stored::OfHeads(heads) => heads.values(),
            Stored::OfRows(rows) => rows.values(),
            Stored::Gguf(base, _) => base.dense_f32(&self.name),
        }
    }
}

impl OfExpert<'_> {
    /// The elements [i, o] as the stack has them, of parts [o / parts, i] whose outputs take turns.
    fn values(&self, inputs: usize) -> Result<Vec<f32>, ModelError> {
        let parts = self.parts.iter().map(BaseTensor::values).collect::<Result<Vec<_>, _>>()?;
        let turns = parts.len();
        let outputs: usize = parts.iter().map(|part| part.len() / inputs).sum();
        let mut values = vec![0.0; inputs * outputs];
        values.par_chunks_mut(outputs).enumerate().for_each(|(input, row)| {
            for (output, value) in row.iter_mut().enumerate() {
                *value = parts[output % turns][output / turns * inputs + input];
            }
        });
        Ok(values)
    }
}
