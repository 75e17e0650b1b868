//! `kv_b_proj` of latent attention in mlx-lm's files, which have two matrices of it for each head:
//!
//! ```text
//! self_attn.embed_q       [h, r, p]    the rows of the keys, turned
//! self_attn.unembed_out   [h, y, r]    the rows of the values
//! ```
//!
//! Either may be packed. A head's matrices are read as `embed_q.N` and `unembed_out.N`.

use super::of_rows::names_of;
use super::{BaseFiles, BaseTensor};
use crate::error::ModelError;
use crate::files::stacked::{HEAD_KEYS, HEAD_VALUES};

/// A matrix that is made of those of heads.
pub(super) struct OfHeads<'a> {
    /// Of each head, what makes its keys [r, p] and what makes its values [y, r].
    heads: Vec<[BaseTensor<'a>; 2]>,
}

impl<'a> OfHeads<'a> {
    /// The matrix of this name and shape. `None`: it is another one, or the files have no heads of it.
    ///
    /// # Errors
    /// If they have other shapes or number types.
    pub(super) fn find(files: &'a BaseFiles, name: &str, shape: &[usize]) -> Result<Option<Self>, ModelError> {
        let Some(layer) = name.strip_suffix(".self_attn.kv_b_proj.weight") else { return Ok(None) };
        let (Some(set), &[rows, rank]) = (files.safetensors(), shape) else { return Ok(None) };
        let of_head = |stack: &str, head: usize| format!("{layer}{stack}{head}.weight");
        let heads = (0..).take_while(|&head| set.get(&of_head(HEAD_VALUES, head)).is_some()).count();
        let Some(first) = set.get(&of_head(HEAD_VALUES, 0)) else { return Ok(None) };
        let values = first.shape.first().copied().unwrap_or(0);
        let keys = (rows / heads).checked_sub(values).filter(|&keys| keys > 0 && rows.is_multiple_of(heads));
        let Some(keys) = keys else {
            let (path, name, expected) = (first.path().to_owned(), name.to_owned(), shape.to_vec());
            return Err(ModelError::Shape { path, name, found: vec![heads * values, rank], expected });
        };
        let part = |name: String, shape: [usize; 2]| {
            let stored = files.stored(&name, &shape)?;
            let tensor = |stored| BaseTensor {
                name,
                shape: shape.to_vec(),
                base: files.path(),
                stored,
                quantization: None,
                cut: None,
            };
            Ok::<_, ModelError>(stored.map(tensor))
        };
        let mut found = Vec::with_capacity(heads);
        for head in 0..heads {
            let of_keys = part(of_head(HEAD_KEYS, head), [rank, keys])?;
            let of_values = part(of_head(HEAD_VALUES, head), [values, rank])?;
            let (Some(of_keys), Some(of_values)) = (of_keys, of_values) else { return Ok(None) };
            found.push([of_keys, of_values]);
        }
        Ok(Some(OfHeads { heads: found }))
    }

    /// All of them. There is at least one head.
    pub(super) fn all(&self) -> impl Iterator<Item = &BaseTensor<'a>> {
        self.heads.iter().flatten()
    }

    /// The first of them.
    pub(super) fn first(&self) -> Option<&BaseTensor<'a>> {
        self.all().next()
    }

    /// Names of the tensors that make it.
    pub(super) fn parts(&self) -> Vec<String> {
        names_of(self.all())
    }

    /// The elements: of each head the rows of its keys, then those of its values.
    pub(super) fn values(&self) -> Result<Vec<f32>, ModelError> {
        let mut rows = Vec::new();
        for [of_keys, of_values] in &self.heads {
            let (turned, keys) = (of_keys.values()?, of_keys.shape[1]);
            for key in 0..keys {
                rows.extend(turned.iter().skip(key).step_by(keys));
            }
            rows.extend(of_values.values()?);
        }
        Ok(rows)
    }
}
