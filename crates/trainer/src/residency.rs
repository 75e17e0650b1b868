//! Where the frozen matrices of the layers are, and how many micro-batches go through each layer together.

use finetune_model::Stage;
use finetune_recipe::{Method, ResidencyChoice};
use finetune_store::human_bytes;

use crate::memory::{Counted, Sizing, Subject};
use crate::numbers::counted;

/// Chooses for a run that may take `available` bytes, if that can be told. Returns what a user should know, too.
///
/// With layers from the disk, as many micro-batches go through each layer together as fit in memory: it is read
/// once for all of them. Neither choice changes a bit of the run.
pub(crate) fn choose(subject: &Subject<'_>, available: Option<u64>) -> (Sizing, Vec<String>) {
    choose_counted(subject, &subject.counted(), available)
}

/// The same of what is counted already.
pub(crate) fn choose_counted(
    subject: &Subject<'_>,
    counted: &Counted,
    available: Option<u64>,
) -> (Sizing, Vec<String>) {
    let recipe = subject.recipe;
    let in_memory = subject.sizing.clone();
    let can = recipe.train.method == Method::Lora && !in_memory.layers.is_empty();
    let fits = |sizing: &Sizing| {
        let estimate = Subject { sizing, ..*subject }.estimate_counted(counted);
        available.is_none_or(|available| estimate.total <= available)
    };
    let from_disk = |at_once: usize| Sizing {
        placement: in_memory.placement.clone().with_layers_from_disk(true),
        at_once,
        ..in_memory.clone()
    };
    let wanted = match recipe.model.residency {
        ResidencyChoice::Memory => false,
        ResidencyChoice::Disk => can,
        ResidencyChoice::Auto => can && !fits(&in_memory) && fits(&from_disk(1)),
    };
    // Ranks that hold a model together need several micro-batches on the way: each computes one of them.
    if !wanted && in_memory.placement.stage().is_none() {
        return (in_memory, Vec::new());
    }
    let with = |at_once: usize| if wanted { from_disk(at_once) } else { Sizing { at_once, ..in_memory.clone() } };
    let all = micro_batches(subject);
    let sizing = with(most_at_once(all, |at_once| fits(&with(at_once))));
    if !wanted {
        return (sizing, Vec::new());
    }
    let notice = notice(recipe.model.residency, &sizing, all);
    (sizing, std::iter::once(notice).chain(quantized_at_each_read(subject)).collect())
}

/// What becomes of the layers that a rank would hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OfLayers {
    /// Whether it would read them from the disk.
    pub(crate) reads: bool,
    /// Whether it has room for them, there or in memory.
    pub(crate) fits: bool,
}

/// What becomes of the layers of `stage` on a rank that may take `available` bytes.
pub(crate) fn of_layers(subject: &Subject<'_>, counted: &Counted, stage: Stage, available: Option<u64>) -> OfLayers {
    let placement = subject.sizing.placement.clone().with_stage(Some(stage));
    let sizing = Sizing { placement, ..subject.sizing.clone() };
    let (chosen, _) = choose_counted(&Subject { sizing: &sizing, ..*subject }, counted, available);
    let total = Subject { sizing: &chosen, ..*subject }.estimate_counted(counted).total;
    OfLayers { reads: chosen.placement.reads_layers(), fits: available.is_none_or(|available| total <= available) }
}

/// The most micro-batches, up to `all`, for which `fits` has room: at least one.
pub(crate) fn most_at_once(all: usize, fits: impl Fn(usize) -> bool) -> usize {
    let (mut at_once, mut too_many) = (1, all + 1);
    while too_many - at_once > 1 {
        let middle = at_once.midpoint(too_many);
        if fits(middle) { at_once = middle } else { too_many = middle }
    }
    at_once
}

/// Micro-batches of a step, if one rank computes them all.
pub(crate) fn micro_batches(subject: &Subject<'_>) -> usize {
    let train = &subject.recipe.train;
    train.global_batch_size.min(subject.train.rows.len()).div_ceil(train.micro_batch_size).max(1)
}

fn notice(choice: ResidencyChoice, sizing: &Sizing, micro_batches: usize) -> String {
    let groups = micro_batches.div_ceil(sizing.at_once) as u64;
    let why = if choice == ResidencyChoice::Auto { "as they do not fit in memory, " } else { "" };
    let groups = if groups == 1 { String::new() } else { format!(" for each of {}", counted(groups, "group")) };
    format!(
        "{why}the layers, {} in all, are read from the disk, twice a step{groups}; the bits are those of layers in memory",
        human_bytes(sizing.layer_bytes())
    )
}

/// Quantizing a layer again at each read costs time.
fn quantized_at_each_read(subject: &Subject<'_>) -> Option<String> {
    let quantization = subject.recipe.model.quantization.filter(|_| subject.sizing.loading > 0)?;
    let scheme = quantization.as_str();
    Some(format!(
        "each layer is packed as {scheme} again whenever it is read; `finetune quantize MODEL --to {scheme}` does it once, with the same bits"
    ))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use finetune_recipe::Recipe;

    use crate::device_plan::ThisHost;
    use crate::validate::{Validation, validate};

    fn look(keys: &str, memory: Option<u64>) -> Validation {
        let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/models");
        let text = format!(
            "output_dir = \"run\"\n[model]\npath = {:?}\ndevice = \"cpu\"\n{keys}[data]\ntrain = {:?}\n\
             [train]\nmicro_batch_size = 1\nglobal_batch_size = 4\n",
            models.join("qwen3"),
            models.join("qwen3/rows.jsonl"),
        );
        let recipe = Recipe::parse(&text, Path::new("r.toml"), &[], None).unwrap_or_else(|error| panic!("{error}"));
        validate(&recipe, &ThisHost { memory, ..ThisHost::default() }, &|_| {})
    }

    fn total(found: &Validation) -> u64 {
        assert!(found.problems.is_empty(), "{:?}", found.problems);
        found.estimate.expect("an estimate").total
    }

    fn is_from_disk(found: &Validation) -> bool {
        found.notices.iter().any(|notice| notice.contains("are read from the disk"))
    }

    /// (keys, bytes of memory, whether layers come from the disk, the groups that are named)
    #[test]
    fn memory_decides() {
        let (memory, disk) = ("residency = \"memory\"\n", "residency = \"disk\"\n");
        let in_memory = total(&look(memory, None));
        let all_at_once = total(&look(disk, None));
        // Just enough for one micro-batch at a time.
        let least =
            (1..all_at_once).rev().step_by(1024).take_while(|bytes| look(disk, Some(*bytes)).problems.is_empty());
        let least = least.last().unwrap_or(all_at_once);
        assert!(least < all_at_once && all_at_once < in_memory, "{least} {all_at_once} {in_memory}");
        for (keys, bytes, from_disk, groups) in [
            ("", None, false, None),
            ("", Some(in_memory), false, None),
            ("", Some(in_memory - 1), true, None),
            ("", Some(all_at_once), true, None),
            ("", Some(all_at_once - 1), true, Some("for each of 2 groups")),
            ("", Some(least), true, Some("for each of 4 groups")),
            (disk, None, true, None),
            (memory, Some(in_memory), false, None),
        ] {
            let found = look(keys, bytes);
            assert!(total(&found) <= bytes.unwrap_or(u64::MAX), "{keys} {bytes:?}");
            assert_eq!(is_from_disk(&found), from_disk, "{keys} {bytes:?}: {:?}", found.notices);
            let named = found.notices.iter().find(|notice| notice.contains("groups"));
            assert_eq!(named.is_some(), groups.is_some(), "{keys} {bytes:?}: {named:?}");
            assert!(groups.is_none_or(|groups| named.is_some_and(|named| named.contains(groups))), "{named:?}");
        }
    }
}
