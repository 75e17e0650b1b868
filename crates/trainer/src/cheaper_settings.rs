//! Settings that would take less memory, and how much less.

use std::fmt;

use finetune_model::{FloatType, LoraTarget, LoraTargets, PackedSizes, Placement, linear_layers};
use finetune_recipe::Recipe;
use finetune_store::human_bytes;

use crate::memory::{Precision, Sizing, Subject};
use crate::residency::on_the_disk;

/// Another value of a key.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Setting {
    /// Frozen matrices in 4 bits.
    Nf4,
    /// Layers stay in their files.
    FromDisk,
    /// Frozen matrices and activations in 16 bits.
    Bf16,
    /// Layers are computed again in the backward pass.
    Checkpointing,
    /// Rows of a micro-batch.
    MicroBatch(usize),
    /// Tokens of the longest row.
    Length(usize),
    /// The highest rank, and the branches with it.
    Rank(usize, LoraTargets),
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Setting::Nf4 => f.write_str("model.quantization = \"nf4\""),
            Setting::FromDisk => f.write_str("model.residency = \"disk\""),
            Setting::Bf16 => f.write_str("model.dtype = \"bf16\""),
            Setting::Checkpointing => f.write_str("train.gradient_checkpointing = true"),
            Setting::MicroBatch(rows) => write!(f, "train.micro_batch_size = {rows}"),
            Setting::Length(tokens) => write!(f, "data.max_seq_len = {tokens} with overlong = \"truncate\""),
            Setting::Rank(rank, _) => write!(f, "lora.rank = {rank}"),
        }
    }
}

/// A run with other settings.
pub(crate) struct Changed {
    recipe: Recipe,
    sizing: Sizing,
}

impl Changed {
    pub(crate) fn new(subject: &Subject<'_>, settings: &[&Setting]) -> Changed {
        let mut changed = Changed { recipe: subject.recipe.clone(), sizing: subject.sizing.clone() };
        settings.iter().for_each(|setting| changed.set(setting));
        if changed.sizing.placement.reads_layers() {
            changed.read_with_least_memory(subject);
        }
        changed
    }

    /// Takes the one of the ways on the disk that needs least.
    fn read_with_least_memory(&mut self, subject: &Subject<'_>) {
        let total = |placement: &Placement| {
            let sizing = Sizing { placement: placement.clone(), ..self.sizing.clone() };
            Subject { recipe: &self.recipe, sizing: &sizing, ..*subject }.estimate().total
        };
        if let Some(least) = on_the_disk(&self.sizing).into_iter().min_by_key(total) {
            self.sizing.placement = least;
        }
    }

    /// It with the rows of `subject`.
    pub(crate) fn subject<'a>(&'a self, subject: &Subject<'a>) -> Subject<'a> {
        Subject { recipe: &self.recipe, sizing: &self.sizing, ..*subject }
    }

    fn set(&mut self, setting: &Setting) {
        let Changed { recipe, sizing } = self;
        match setting {
            Setting::Nf4 => pack_in_4_bits(sizing),
            Setting::FromDisk => {
                (sizing.placement, sizing.at_once) = (sizing.placement.clone().with_layers_from_disk(true), 1);
            }
            Setting::Bf16 => sizing.placement = sizing.placement.clone().computing_in(FloatType::BF16),
            Setting::Checkpointing => recipe.train.gradient_checkpointing = true,
            Setting::MicroBatch(rows) => recipe.train.micro_batch_size = *rows,
            Setting::Length(tokens) => sizing.longest = *tokens,
            Setting::Rank(_, targets) => {
                if let Some(adaptation) = &mut sizing.adaptation {
                    adaptation.targets.clone_from(targets);
                }
            }
        }
    }
}

/// What settings come to.
pub(crate) struct Outcome {
    /// Bytes of memory.
    pub(crate) bytes: u64,
    /// Whether these are there.
    pub(crate) fits: bool,
    /// What else is to say of it, behind the settings.
    pub(crate) words: String,
}

impl Subject<'_> {
    /// Settings of which each takes less memory than what the run has.
    pub(crate) fn settings(&self) -> Vec<Setting> {
        let Subject { recipe, train: data, .. } = *self;
        let Sizing { adaptation, has_bf16, packed, placement, layers, .. } = self.sizing;
        let adaptation = adaptation.as_ref();
        let precision = Precision::new(self.sizing);
        let mut settings = Vec::new();
        if adaptation.is_some() && packed.elements == 0 {
            settings.push(Setting::Nf4);
        }
        if adaptation.is_some() && !placement.reads_layers() && !layers.is_empty() {
            settings.push(Setting::FromDisk);
        }
        if *has_bf16 && !precision.cpu && precision.compute == FloatType::F32 {
            settings.push(Setting::Bf16);
        }
        if !recipe.train.gradient_checkpointing {
            settings.push(Setting::Checkpointing);
        }
        let micro = recipe.train.micro_batch_size;
        if micro > 1 {
            settings.push(Setting::MicroBatch((micro.min(data.rows.len()) / 2).max(1)));
        }
        let half = data.counts.longest / 2;
        if half > 64 {
            settings.push(Setting::Length(half));
        }
        settings.extend(
            adaptation
                .and_then(|adaptation| lower_rank(&adaptation.targets))
                .map(|(rank, targets)| Setting::Rank(rank, targets)),
        );
        settings
    }

    /// What a smaller setting of each kind would take, in words. Those that help most come first.
    pub(crate) fn cheaper_settings(&self) -> Vec<String> {
        let now = self.estimate().total;
        let (settings, one_row) = (self.settings(), Setting::MicroBatch(1));
        let mut options: Vec<Vec<&Setting>> = settings.iter().map(|setting| vec![setting]).collect();
        let again = settings.iter().find(|setting| **setting == Setting::Checkpointing);
        if let Some(again) = again.filter(|_| self.recipe.train.micro_batch_size > 2) {
            options.push(vec![again, &one_row]);
        }
        let with = |settings: Vec<&Setting>| (self.taken_with(&settings), joined(&settings));
        let mut options: Vec<(u64, String)> = options.into_iter().map(with).collect();
        options.retain(|(bytes, _)| helps(*bytes, now));
        options.sort_by_key(|(bytes, _)| *bytes);
        options.into_iter().map(|(bytes, settings)| instead(&settings, bytes, now)).collect()
    }

    /// The same of settings with which the run fits into so many bytes: each that is enough by itself, otherwise as few
    /// together as are enough.
    pub(crate) fn settings_that_fit(&self, available: u64) -> Vec<String> {
        that_fit(self.settings(), self.estimate().total, &|settings| {
            let bytes = self.taken_with(settings);
            Outcome { bytes, fits: bytes <= available, words: String::new() }
        })
    }

    fn taken_with(&self, settings: &[&Setting]) -> u64 {
        Changed::new(self, settings).subject(self).estimate().total
    }
}

impl Setting {
    /// The key's least value, where that changes nothing but how much is computed at once.
    fn least(self) -> Setting {
        if let Setting::MicroBatch(_) = self { Setting::MicroBatch(1) } else { self }
    }
}

/// Of these settings each with which a run fits, in words; if none is enough, as few together as are; if all together
/// are not, that. `now`: bytes that it takes without them.
pub(crate) fn that_fit(settings: Vec<Setting>, now: u64, with: &dyn Fn(&[&Setting]) -> Outcome) -> Vec<String> {
    let words = |settings: &[&Setting], of: &Outcome| {
        let settings = format!("{}{}", joined(settings), of.words);
        instead(&settings, of.bytes, now)
    };
    let mut alone: Vec<(Setting, Outcome)> = Vec::new();
    for setting in settings {
        let outcome = with(&[&setting]);
        let least = setting.clone().least();
        match outcome.fits || least == setting {
            true => alone.push((setting, outcome)),
            false => alone.push((least.clone(), with(&[&least]))),
        }
    }
    // In their order, for what goes together.
    let all: Vec<Setting> = alone.iter().map(|(setting, _)| setting.clone().least()).collect();
    alone.sort_by_key(|(_, outcome)| outcome.bytes);
    let fitting = alone.iter().filter(|(_, outcome)| outcome.fits);
    let fitting: Vec<String> = fitting.map(|(setting, outcome)| words(&[setting], outcome)).collect();
    if !fitting.is_empty() || alone.is_empty() {
        return fitting;
    }
    let mut taken: Vec<&Setting> = all.iter().collect();
    let mut found = with(&taken);
    if !found.fits {
        return vec![format!("even with {}: about {}, which does not fit", joined(&taken), human_bytes(found.bytes))];
    }
    // Without those that are not needed: what helps least goes first.
    for (setting, _) in alone.iter().rev() {
        let fewer: Vec<&Setting> = taken.iter().copied().filter(|other| *other != setting).collect();
        let outcome = with(&fewer);
        if outcome.fits {
            (taken, found) = (fewer, outcome);
        }
    }
    vec![words(&taken, &found)]
}

/// Whether it is worth a word.
fn helps(bytes: u64, now: u64) -> bool {
    bytes < now - now / 50
}

fn instead(settings: &str, bytes: u64, now: u64) -> String {
    format!("{settings}: about {} instead of {}", human_bytes(bytes), human_bytes(now))
}

/// "a, b and c"
fn joined(settings: &[&Setting]) -> String {
    let words: Vec<String> = settings.iter().map(|setting| setting.to_string()).collect();
    match words.split_last() {
        Some((last, before)) if !before.is_empty() => format!("{} and {last}", before.join(", ")),
        _ => words.concat(),
    }
}

/// All linear layers in 4 bits, with a scale in f32 for each 64 elements: `nf4`.
fn pack_in_4_bits(sizing: &mut Sizing) {
    let pack = |packed: &mut PackedSizes, elements: u64| {
        packed.elements += elements;
        packed.bytes += elements / 2 + elements / 16;
        packed.largest = packed.largest.max(elements);
    };
    for linear in linear_layers(&sizing.config) {
        let elements = (linear.outputs * linear.inputs) as u64;
        pack(&mut sizing.packed, elements);
        let inside = linear.module.split_once(".layers.").and_then(|(_, inside)| inside.split('.').next());
        let Some(n) = inside.and_then(|n| n.parse::<usize>().ok()) else { continue };
        if let Some(layer) = sizing.layers.get_mut(n) {
            layer.dense = layer.dense.saturating_sub(elements);
            pack(&mut layer.packed, elements);
        }
    }
    sizing.loading = 4 * sizing.packed.largest;
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

    /// Bytes without settings, what each saves, bytes that are there, and what is said.
    #[test]
    fn as_few_settings_as_are_enough() {
        let settings = vec![Setting::Nf4, Setting::Checkpointing, Setting::MicroBatch(4), Setting::Length(128)];
        let saved = |setting: &&Setting| match setting {
            Setting::Nf4 => 40 << 20,
            Setting::Checkpointing => 30 << 20,
            Setting::MicroBatch(1) => 20 << 20,
            Setting::MicroBatch(_) => 10 << 20,
            _ => 1 << 20,
        };
        let now = 100 << 20;
        for (available, want) in [
            (
                90 << 20,
                &[
                    "model.quantization = \"nf4\": about 60.0 MiB instead of 100.0 MiB",
                    "train.gradient_checkpointing = true: about 70.0 MiB instead of 100.0 MiB",
                    "train.micro_batch_size = 4: about 90.0 MiB instead of 100.0 MiB",
                ][..],
            ),
            (
                85 << 20,
                &[
                    "model.quantization = \"nf4\": about 60.0 MiB instead of 100.0 MiB",
                    "train.gradient_checkpointing = true: about 70.0 MiB instead of 100.0 MiB",
                    "train.micro_batch_size = 1: about 80.0 MiB instead of 100.0 MiB",
                ],
            ),
            (
                75 << 20,
                &[
                    "model.quantization = \"nf4\": about 60.0 MiB instead of 100.0 MiB",
                    "train.gradient_checkpointing = true: about 70.0 MiB instead of 100.0 MiB",
                ],
            ),
            (
                35 << 20,
                &["model.quantization = \"nf4\" and train.gradient_checkpointing = true, in memory: about 30.0 MiB \
                   instead of 100.0 MiB"],
            ),
            (
                10 << 20,
                &["model.quantization = \"nf4\", train.gradient_checkpointing = true and \
                     train.micro_batch_size = 1, in memory: about 10.0 MiB instead of 100.0 MiB"],
            ),
            (
                1 << 20,
                &["even with model.quantization = \"nf4\", train.gradient_checkpointing = true, \
                     train.micro_batch_size = 1 and data.max_seq_len = 128 with overlong = \"truncate\": about 9.0 MiB, which does not fit"],
            ),
        ] {
            let with = |settings: &[&Setting]| {
                let bytes = now - settings.iter().map(saved).sum::<u64>();
                let words = if settings.len() > 1 { ", in memory".to_owned() } else { String::new() };
                Outcome { bytes, fits: bytes <= available, words }
            };
            assert_eq!(that_fit(settings.clone(), now, &with), want, "{available}");
        }
        assert_eq!(that_fit(Vec::new(), now, &|_| Outcome { bytes: now, fits: false, words: String::new() }), [""; 0]);
    }

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
