//! Settings that would take less memory, and how much less.

use finetune_model::{
    Adaptation, FloatType, LoraTarget, LoraTargets, ModelConfig, PackedSizes, Placement, linear_layers,
};
use finetune_store::human_bytes;

use crate::memory::{Precision, Sizing, StepShape, Subject, estimate};
use crate::residency::on_the_disk;

/// Leaves the layers in their files.
pub(crate) const FROM_DISK: &str = "model.residency = \"disk\"";

impl Subject<'_> {
    /// What a smaller setting of each kind would take, in words. Those that help most come first.
    pub(crate) fn cheaper_settings(&self) -> Vec<String> {
        let Subject { recipe, train: data, .. } = *self;
        let Sizing { config, adaptation, has_bf16, .. } = self.sizing;
        let adaptation = adaptation.as_ref();
        let precision = Precision::new(self.sizing);
        let (micro, checkpointing) = (recipe.train.micro_batch_size, recipe.train.gradient_checkpointing);
        let total = |micro: usize, checkpointing: bool, limit: usize, precision: Precision| {
            estimate(config, adaptation, &StepShape::new(self, micro, checkpointing, limit), precision).total
        };
        let now = total(micro, checkpointing, usize::MAX, precision);
        let mut options: Vec<(u64, String)> = Vec::new();
        if !checkpointing {
            options.push((total(micro, true, usize::MAX, precision), "train.gradient_checkpointing = true".to_owned()));
        }
        if micro > 1 {
            let fewer = (micro.min(data.rows.len()) / 2).max(1);
            options.push((
                total(fewer, checkpointing, usize::MAX, precision),
                format!("train.micro_batch_size = {fewer}"),
            ));
        }
        if micro > 2 && !checkpointing {
            options.push((
                total(1, true, usize::MAX, precision),
                "train.gradient_checkpointing = true and train.micro_batch_size = 1".to_owned(),
            ));
        }
        let half = data.counts.longest / 2;
        if half > 64 {
            let text = format!("data.max_seq_len = {half} with overlong = \"truncate\"");
            options.push((total(micro, checkpointing, half, precision), text));
        }
        if let Some((rank, targets)) = adaptation.and_then(|adaptation| lower_rank(&adaptation.targets)) {
            let fewer = adaptation.map(|adaptation| Adaptation { targets, ..adaptation.clone() });
            let step = StepShape::new(self, micro, checkpointing, usize::MAX);
            options.push((estimate(config, fewer.as_ref(), &step, precision).total, format!("lora.rank = {rank}")));
        }
        if *has_bf16 && !precision.cpu && precision.compute == FloatType::F32 {
            let narrow = Precision { compute: FloatType::BF16, held: FloatType::BF16, ..precision };
            options.push((total(micro, checkpointing, usize::MAX, narrow), "model.dtype = \"bf16\"".to_owned()));
        }
        if adaptation.is_some() && precision.packed.elements == 0 {
            let sizes = packed_in_4_bits(config);
            let packed = Precision { packed: sizes, loading: 4 * sizes.largest, ..precision };
            options.push((total(micro, checkpointing, usize::MAX, packed), "model.quantization = \"nf4\"".to_owned()));
        }
        if adaptation.is_some() && !self.sizing.placement.reads_layers() && !self.sizing.layers.is_empty() {
            let total = |placement: Placement| {
                let from_disk = Sizing { placement, ..self.sizing.clone() };
                Subject { sizing: &from_disk, ..*self }.estimate().total
            };
            let least = on_the_disk(self.sizing).into_iter().map(total).min();
            options.extend(least.map(|bytes| (bytes, FROM_DISK.to_owned())));
        }
        options.retain(|(bytes, _)| *bytes < now - now / 50);
        options.sort_by_key(|(bytes, _)| *bytes);
        options
            .into_iter()
            .map(|(bytes, setting)| format!("{setting}: about {} instead of {}", human_bytes(bytes), human_bytes(now)))
            .collect()
    }
}

/// Sizes of all linear layers in 4 bits, with a scale in f32 for each 64 elements: `nf4`.
fn packed_in_4_bits(config: &ModelConfig) -> PackedSizes {
    let elements = || linear_layers(config).into_iter().map(|layer| (layer.outputs * layer.inputs) as u64);
    let all: u64 = elements().sum();
    PackedSizes { elements: all, bytes: all / 2 + all / 16, largest: elements().max().unwrap_or(0) }
}

/// A usual rank and the branches with it, if some have a higher one.
fn lower_rank(targets: &LoraTargets) -> Option<(usize, LoraTargets)> {
    let highest = targets.iter().map(|target| target.rank).max().unwrap_or(0);
    let rank = if highest > 64 { 64 } else { highest / 2 };
    let fewer = |target: &LoraTarget| LoraTarget { rank: target.rank.min(rank), ..target.clone() };
    (rank >= 4).then(|| (rank, targets.iter().map(fewer).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 64 for a rank above it, half of any other, and nothing below 4.
    #[test]
    fn ranks_that_take_less() {
        for (rank, lower) in [(4096, Some(64)), (64, Some(32)), (16, Some(8)), (4, None)] {
            let target =
                LoraTarget { module: "q_proj".to_owned(), rank, alpha: 32.0, use_rslora: false, use_dora: false };
            assert_eq!(lower_rank(&vec![target]).map(|(rank, _)| rank), lower, "{rank}");
        }
    }
}
