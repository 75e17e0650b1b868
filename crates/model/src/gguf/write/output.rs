//! A file that is being written, and numbers in its types.

use std::path::Path;

use finetune_gguf::{Metadata, TensorInfo, TensorType, header, padding};
use finetune_store::{Disk, Dtype, Operation, StoreError};

use crate::error::ModelError;
use crate::files::finite::first_not_finite;

/// A file that is being written, tensor by tensor.
pub(super) struct Output<'a> {
    disk: &'a dyn Disk,
    path: &'a Path,
    /// Bytes of the file, for the message when the disk is full.
    total: u64,
    /// Bytes of the tensor that is being written.
    done: u64,
}

impl<'a> Output<'a> {
    pub(super) fn begin(
        disk: &'a dyn Disk,
        path: &'a Path,
        metadata: &Metadata,
        tensors: &[TensorInfo],
    ) -> Result<Output<'a>, ModelError> {
        let header = header(metadata, tensors)?;
        let sizes = tensors.iter().map(TensorInfo::bytes).collect::<Result<Vec<u64>, _>>()?;
        let total = header.len() as u64 + sizes.iter().sum::<u64>();
        let output = Output { disk, path, total, done: 0 };
        disk.write_file(path, &header).map_err(|source| output.failed(source))?;
        Ok(output)
    }

    fn failed(&self, source: std::io::Error) -> ModelError {
        StoreError::io(self.path, Operation::Write, self.total, source).into()
    }

    pub(super) fn append(&mut self, bytes: &[u8]) -> Result<(), ModelError> {
        self.done += bytes.len() as u64;
        self.disk.append_file(self.path, bytes).map_err(|source| self.failed(source))
    }

    /// Fills the tensor up to where the next one begins.
    pub(super) fn end_tensor(&mut self) -> Result<(), ModelError> {
        let zeros = vec![0; padding(self.done)];
        self.append(&zeros)?;
        self.done = 0;
        Ok(())
    }
}

/// Why numbers cannot be written.
pub(super) enum Problem {
    /// The number at this place is not finite in the type.
    NotFinite(usize),
    Other(ModelError),
}

/// Numbers in a type. One that is not finite in it is an error.
pub(super) fn encode(values: &[f32], kind: TensorType) -> Result<Vec<u8>, Problem> {
    let bytes = kind.encode(values).map_err(|error| Problem::Other(error.into()))?;
    let bad = match kind {
        TensorType::F16 => first_not_finite(&bytes, Dtype::F16),
        TensorType::BF16 => first_not_finite(&bytes, Dtype::BF16),
        // The largest number of f16 times 127.
        TensorType::Q8_0 => values.iter().position(|value| value.is_nan() || value.abs() >= 65_504.0 * 127.0),
        _ => first_not_finite(&bytes, Dtype::F32),
    };
    match bad {
        None => Ok(bytes),
        Some(element) => Err(Problem::NotFinite(element)),
    }
}
