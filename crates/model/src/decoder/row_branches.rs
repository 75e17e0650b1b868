//! Branches of rows that have adapters of their own, in a pass over one base.
//!
//! The base's products are made of all rows together. Rows of one adapter lie next to each other, and only they
//! go through its branches.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use burn::tensor::Tensor;
use finetune_kernels::row_branch::add_low_rank;
use finetune_kernels::{Weight, weight};

use crate::adaptation::is_expert;
use crate::branch::LoraBranch;
use crate::decoder::pass::Context;
use crate::tree::Decoder;

/// The branches of a model, by the numbers of their layers. Those of experts are not among them.
#[derive(Clone, Debug, Default)]
pub(crate) struct BranchTable(HashMap<u32, LoraBranch>);

impl BranchTable {
    pub(crate) fn of(weights: &Decoder) -> BranchTable {
        // A clone shares all values. It is the walk over the places that needs it.
        let mut weights = weights.clone();
        let places = weights.places().into_iter().filter(|place| !is_expert(place.module));
        BranchTable(places.filter_map(|place| Some((place.index, place.lora.take()?))).collect())
    }
}

/// Which rows of a pass go through which branches. Rows that are in no part have none.
#[derive(Clone, Debug, Default)]
pub(crate) struct RowBranches(Vec<(Range<usize>, Arc<BranchTable>)>);

impl RowBranches {
    /// Parts with numbers of rows that ascend, and do not overlap.
    pub(crate) fn new(parts: Vec<(Range<usize>, Arc<BranchTable>)>) -> RowBranches {
        RowBranches(parts)
    }

    /// The same of these rows alone, whose numbers ascend.
    pub(crate) fn of_rows(&self, rows: &[usize]) -> RowBranches {
        let place = |bound: usize| rows.partition_point(|&row| row < bound);
        let part = |(range, table): &(Range<usize>, Arc<BranchTable>)| {
            let own = place(range.start)..place(range.end);
            (!own.is_empty()).then(|| (own, Arc::clone(table)))
        };
        RowBranches(self.0.iter().filter_map(part).collect())
    }

    /// The branches of a layer, each with its rows.
    fn of(&self, index: u32) -> impl Iterator<Item = (Range<usize>, &LoraBranch)> {
        self.0.iter().filter_map(move |(rows, table)| Some((rows.clone(), table.0.get(&index)?)))
    }

    /// A linear layer with the branches of its rows: x [t, i], w [o, i] -> [t, o]
    pub(crate) fn linear(&self, index: u32, x: Tensor<2>, w: Weight, context: &Context) -> Tensor<2> {
        let mut y = weight::linear(x.clone(), w);
        for (rows, branch) in self.of(index) {
            let (a, b) = (context.parameter(branch.a.dense()), context.parameter(branch.b.dense()));
            y = add_low_rank(y, x.clone(), a, b, rows, branch.scale);
        }
        y
    }

    /// y [t, h, m] with what `low` makes of the rows of x [t, h, n] that have a branch of this layer.
    pub(crate) fn added(
        &self,
        index: u32,
        mut y: Tensor<3>,
        x: &Tensor<3>,
        low: impl Fn(&LoraBranch, Tensor<3>) -> Tensor<3>,
    ) -> Tensor<3> {
        let [_, heads, width] = y.dims();
        for (rows, branch) in self.of(index) {
            let part = |all: &Tensor<3>| all.clone().narrow(0, rows.start, rows.len());
            let some = part(&y) + low(branch, part(x));
            y = y.slice_assign([rows.clone(), 0..heads, 0..width], some);
        }
        y
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// (the numbers of the rows, what becomes of three parts: first row and number of rows)
    #[test]
    fn parts_of_some_rows() {
        let parts = [0..2, 2..3, 5..9].map(|rows| (rows, Arc::default()));
        let branches = RowBranches::new(parts.into());
        for (rows, want) in [
            (vec![0, 1, 2, 3, 4, 5, 6, 7, 8], vec![(0, 2), (2, 1), (5, 4)]),
            (vec![1, 2, 8], vec![(0, 1), (1, 1), (2, 1)]),
            (vec![3, 4, 6], vec![(2, 1)]),
            (vec![4], vec![]),
            (vec![], vec![]),
        ] {
            let parts = branches.of_rows(&rows).0;
            let got: Vec<(usize, usize)> = parts.into_iter().map(|(rows, _)| (rows.start, rows.len())).collect();
            assert_eq!(got, want, "{rows:?}");
        }
    }
}
