//! `g_idx`: the group of each column of a matrix, by which GPTQ and compressed-tensors say which
//! columns were packed together ("act-order").

use finetune_store::{Dtype, TensorView};

use super::module::{check_dtype, check_shape, wrong};
use crate::{Groups, PackedError};

/// The groups of the columns.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum GroupIndex {
    /// Column after column, all groups of one size.
    Ordinary,
    /// The group of each column.
    OfColumns(Vec<u32>),
}

/// What an index without information means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unset {
    /// -1 in all places: the ordinary groups.
    Ordinary,
    /// An error.
    Refused,
}

impl GroupIndex {
    /// Reads the index of `columns` columns in `count` groups. It is ordinary if column `j` is in
    /// group `j / size`.
    pub(super) fn read(
        tensor: &TensorView<'_>,
        columns: usize,
        count: usize,
        size: usize,
        unset: Unset,
    ) -> Result<Self, PackedError> {
        check_dtype(tensor, &[Dtype::I32])?;
        check_shape(tensor, &[columns])?;
        let bytes = tensor.bytes()?;
        let groups: Vec<i32> = bytes.as_chunks::<4>().0.iter().map(|bytes| i32::from_le_bytes(*bytes)).collect();
        if unset == Unset::Ordinary && groups.iter().all(|group| *group == -1) {
            return Ok(GroupIndex::Ordinary);
        }
        let in_range = |group: &i32| usize::try_from(*group).is_ok_and(|group| group < count);
        if let Some(column) = groups.iter().position(|group| !in_range(group)) {
            let what = format!("column {column} is in group {}, and there are {count}", groups[column]);
            return Err(wrong(tensor, what));
        }
        let groups: Vec<u32> = groups.into_iter().map(i32::cast_unsigned).collect();
        if groups.iter().enumerate().all(|(column, group)| *group as usize == column / size) {
            return Ok(GroupIndex::Ordinary);
        }
        if groups.iter().all(|group| *group == 0) {
            return Err(wrong(tensor, format!("all columns are in group 0, and there are {count} groups")));
        }
        Ok(GroupIndex::OfColumns(groups))
    }

    /// The groups of a matrix with `count` a row, if they are not the ordinary ones.
    pub(super) fn groups(self, count: usize) -> Option<Groups> {
        match self {
            GroupIndex::Ordinary => None,
            GroupIndex::OfColumns(group) => Some(Groups::OfColumns { group, count }),
        }
    }
}
