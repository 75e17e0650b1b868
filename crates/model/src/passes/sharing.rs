//! Which models' rows go through one base in one pass, and the passes in which they do.
//!
//! Models that are clones of one base with LoRA branches of their own share its products. Each row goes through
//! its own branches, and on the CPU has the bits that it has alone:
//!
//! - A product of the base of at most sixteen rows has one order of sums, and so has one of more rows if either they
//!   or its outputs are more than 64 (see `generate_rows` and [`finetune_kernels::matmul`]). Prompts share a pass only
//!   if each brings more than sixteen tokens, or more than 64 where a matrix has fewer outputs.
//! - A product with a branch is made of the rows of one adapter, or of one prompt, alone.
//! - Attention goes over each row's own keys.

use std::ops::Range;
use std::sync::Arc;

use finetune_kernels::FEW_ROWS;

use crate::adaptation::is_expert;
use crate::branch::EMBEDDING;
use crate::decoder::cache::{KeyValueCache, RowsCache, read_apart};
use crate::decoder::row_branches::{BranchTable, RowBranches};
use crate::error::ModelError;
use crate::model::{Model, Trained};

/// Most rows of a product with few outputs, on the CPU, whose order of sums is another one than that of many.
pub(crate) const FEW: usize = 64;

/// The next part of a prompt: the model that reads it, its tokens, and what was read before them.
pub(crate) struct PromptPart<'a> {
    pub(crate) model: &'a Model,
    pub(crate) tokens: &'a [u32],
    pub(crate) cache: &'a mut KeyValueCache,
}

impl Model {
    /// Whether rows of this model and of another one may go through it in one pass: both are clones of one base,
    /// and differ from it by LoRA branches alone.
    pub(crate) fn shares_passes_with(&self, other: &Model) -> bool {
        Arc::ptr_eq(&self.base, &other.base) && self.has_branches_alone() && other.has_branches_alone()
    }

    /// Whether it differs from its base by LoRA branches that rows can have of their own: no DoRA, none on the
    /// embedding or on experts, and nothing that is trained in full.
    fn has_branches_alone(&self) -> bool {
        let is_own = |module: &str| module != EMBEDDING && !is_expert(module);
        let has_such = match &self.trained {
            Trained::Nothing => true,
            Trained::Adapter(adaptation) => {
                let mut targets = adaptation.targets.iter();
                adaptation.saved.is_empty() && targets.all(|target| !target.use_dora && is_own(&target.module))
            }
            Trained::All => false,
        };
        has_such && !self.has_own_vocabulary
    }

    /// Whether a token's row depends on no other row but through attention, also in products of many rows: so on the
    /// CPU, without experts, whose products have as many rows as tokens choose them, and without states.
    pub(crate) fn has_rows_of_their_own(&self) -> bool {
        self.all_on_cpu() && self.takes_back() && self.config.experts.is_none()
    }

    /// Whether prompts of this model may be read together with those of models that it shares passes with.
    pub(crate) fn reads_together(&self) -> bool {
        // Latent attention reads a part in one of two ways, alone.
        self.has_rows_of_their_own() && self.config.latent.is_none() && self.has_branches_alone()
    }

    /// Most tokens of a part of a prompt that may not share a pass on the CPU: products of the base with as many rows
    /// may have another order of sums than those with more.
    pub(crate) fn shares_above(&self) -> usize {
        *self.shares_above.get_or_init(|| {
            // As in [`BranchTable::of`], the clone is for the walk.
            let mut weights = self.weights.clone();
            let outputs = weights.places().into_iter().filter(|place| !place.is_embedding);
            match outputs.map(|place| place.weight.shape[0]).min() {
                Some(fewest) if fewest > FEW => FEW_ROWS,
                _ => FEW,
            }
        })
    }

    fn branch_table(&self) -> Arc<BranchTable> {
        Arc::clone(self.branches.get_or_init(|| Arc::new(BranchTable::of(&self.weights))))
    }

    /// As [`Model::begin_rows`], of rows with different adapters: one model for each row. Rows of one model lie next
    /// to each other, and all of them share passes.
    pub(crate) fn begin_mixed_rows(
        models: &[Arc<Model>],
        tokens: &[u32],
        cache: &mut RowsCache,
    ) -> Result<Option<Vec<f32>>, ModelError> {
        let mut parts: Vec<(Range<usize>, Arc<BranchTable>)> = Vec::new();
        for same in models.chunk_by(Arc::ptr_eq) {
            let start = parts.last().map_or(0, |(rows, _)| rows.end);
            parts.push((start..start + same.len(), same[0].branch_table()));
        }
        models[0].begin_rows(tokens, cache, Some(RowBranches::new(parts)))
    }

    /// Begins a pass over parts of several prompts, which go through the base together and are added to their caches:
    /// logits [prompts, v] of the tokens after them. All models read together and share passes.
    pub(crate) fn begin_parts(parts: &mut [PromptPart<'_>]) -> Result<Option<Vec<f32>>, ModelError> {
        let model = parts[0].model;
        let (mut tokens, mut positions, mut lengths) = (Vec::new(), Vec::new(), Vec::new());
        let (mut wanted, mut branches) = (Vec::new(), Vec::new());
        for part in &*parts {
            let (first, count, past) = (tokens.len(), part.tokens.len(), part.cache.tokens().len());
            tokens.extend_from_slice(part.tokens);
            positions.extend((past..past + count).map(|position| position as u32));
            lengths.push((count, past + count));
            wanted.push(tokens.len() - 1);
            branches.push((first..tokens.len(), part.model.branch_table()));
        }
        let ropes = model.rope_tables(&positions, lengths.iter().copied());
        let branches = RowBranches::new(branches);
        let mut rows: Vec<_> = parts.iter_mut().map(|part| (&mut *part.cache, part.tokens)).collect();
        read_apart(&mut rows, &model.cache_windows(), |keys, layers| {
            model.next_logits(&tokens, ropes, keys, layers, &wanted, Some(branches))
        })
    }
}
