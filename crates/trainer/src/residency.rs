//! Where the frozen matrices of the layers are, and how many micro-batches go through each layer together.

use finetune_model::{ExpertSizes, Placement, Stage};
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
    let total = |sizing: &Sizing| Subject { sizing, ..*subject }.estimate_counted(counted).total;
    let fits = |sizing: &Sizing| available.is_none_or(|available| total(sizing) <= available);
    let placement = way_on_disk(&in_memory, available, |placement| {
        total(&Sizing { placement: placement.clone(), at_once: 1, ..in_memory.clone() })
    });
    let from_disk = |at_once: usize| Sizing { placement: placement.clone(), at_once, ..in_memory.clone() };
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

/// The ways in which the layers of a run can be left on the disk, the one that reads least first.
pub(crate) fn on_the_disk(sizing: &Sizing) -> Vec<Placement> {
    let whole = sizing.placement.clone().with_layers_from_disk(true);
    let one_by_one = whole.clone().with_experts_from_disk(true);
    let has_experts = sizing.layers.iter().any(|layer| layer.experts != ExpertSizes::default());
    match has_experts && one_by_one.reads_experts() {
        true => vec![whole, one_by_one],
        false => vec![whole],
    }
}

/// The one of these ways that is taken with so many bytes of memory. `total`: what one takes.
///
/// Whole layers are read once for all micro-batches, single experts for each, so whole layers are taken if there is
/// room for two. As an estimate may be a little off, that is with an eighth to spare where there is the other way.
pub(crate) fn way_on_disk(sizing: &Sizing, available: Option<u64>, total: impl Fn(&Placement) -> u64) -> Placement {
    let mut ways = on_the_disk(sizing).into_iter();
    let whole = ways.next().unwrap_or_else(|| sizing.placement.clone());
    match (ways.next(), available) {
        (Some(by_experts), Some(available)) => {
            let needed = total(&whole);
            let has_room = needed <= available - available / 8;
            if has_room || needed <= total(&by_experts) { whole } else { by_experts }
        }
        _ => whole,
    }
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
    let all = human_bytes(sizing.layer_bytes());
    let bits = "the bits are those of layers in memory";
    if !sizing.placement.reads_experts() {
        return format!("{why}the layers, {all} in all, are read from the disk, twice a step{groups}; {bits}");
    }
    let held = sizing.placement.held(sizing.stored);
    let experts = human_bytes(sizing.layers.iter().map(|layer| layer.experts.bytes(held)).sum());
    format!(
        "{why}the layers, {all} in all, are read from the disk, twice a step{groups}; of these the experts, {experts}, are read \
         one by one, as two whole layers do not fit either: {EXPERT_READS} times a step for each of {} that uses them; {bits}",
        counted(micro_batches as u64, "micro-batch")
    )
}

/// How often a micro-batch reads an expert that it uses: on the way forward, and on the way back for what is computed
/// again and for the gradients.
const EXPERT_READS: u64 = 3;

/// Bytes that a rank reads in a step, as far as its own layers go: each layer twice for each group of micro-batches,
/// but the last one, where a group turns back, once. Experts that are read one by one come on top, for each
/// micro-batch of about so many tokens.
pub(crate) fn read_in_step(sizing: &Sizing, micro_batches: usize, tokens: usize) -> u64 {
    let Sizing { placement, layers, config, .. } = sizing;
    if !placement.reads_layers() {
        return 0;
    }
    let held = placement.held(sizing.stored);
    let is_mine = |n: usize| placement.stage().is_none_or(|stage| stage.holds(n));
    let mine = || layers.iter().enumerate().filter(|(n, _)| is_mine(*n)).map(|(_, layer)| layer);
    let groups = micro_batches.div_ceil(sizing.at_once.max(1)) as u64;
    let twice = |bytes: Vec<u64>| groups * (2 * bytes.iter().sum::<u64>() - bytes.last().unwrap_or(&0));
    if !placement.reads_experts() {
        return twice(mine().map(|layer| layer.bytes(held)).collect());
    }
    let experts: u64 = mine().map(|layer| layer.experts.bytes(held)).sum();
    let used = config.experts.as_ref().map_or(1.0, |mixture| used_part(mixture.choices, mixture.count, tokens));
    let of_experts = (micro_batches as u64 * EXPERT_READS) as f64 * used * experts as f64;
    twice(mine().map(|layer| layer.bytes_without_experts(held)).collect()) + of_experts as u64
}

/// The part of `count` experts that so many tokens use, each with `choices` of its own, if none is preferred.
fn used_part(choices: usize, count: usize, tokens: usize) -> f64 {
    let of_token = choices as f64 / count.max(1) as f64;
    1.0 - (1.0 - of_token.min(1.0)).powi(tokens.min(i32::MAX as usize) as i32)
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

    use finetune_model::{FloatType, LayerSizes};
    use finetune_recipe::Recipe;

    use super::*;
    use crate::base_model::model_directory;
    use crate::device_plan::ThisHost;
    use crate::examine::{Examined, Extent, examine};
    use crate::validate::{Validation, validate};

    fn look(keys: &str, memory: Option<u64>) -> Validation {
        // Four layers, of which two are little enough.
        look_at("olmo3", keys, memory)
    }

    fn look_at(model: &str, keys: &str, memory: Option<u64>) -> Validation {
        validate(&recipe(model, keys), &ThisHost { memory, ..ThisHost::default() }, &|_| {})
    }

    fn recipe(model: &str, keys: &str) -> Recipe {
        let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/models");
        let text = format!(
            "output_dir = \"run\"\n[model]\npath = {:?}\ndevice = \"cpu\"\n{keys}[data]\ntrain = {:?}\n\
             [train]\nmicro_batch_size = 1\nglobal_batch_size = 4\n",
            models.join(model),
            models.join(model).join("rows.jsonl"),
        );
        Recipe::parse(&text, Path::new("r.toml"), &[], None).unwrap_or_else(|error| panic!("{error}"))
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

    /// The first and the last layer have experts, and would be in memory together.
    #[test]
    fn experts_are_read_one_by_one_where_two_layers_do_not_fit() {
        let (memory, disk) = ("residency = \"memory\"\n", "residency = \"disk\"\n");
        let look = |keys: &str, memory: Option<u64>| look_at("qwen3_moe", keys, memory);
        let fits = |bytes: u64| look(disk, Some(bytes)).problems.is_empty();
        let notice = |keys: &str, bytes: Option<u64>| {
            let found = look(keys, bytes);
            assert!(found.problems.is_empty(), "{:?}", found.problems);
            found.notices.into_iter().find(|notice| notice.contains("one by one"))
        };
        // What is just enough.
        let all_at_once = total(&look(disk, None));
        let (mut least, mut too_little) = (all_at_once, 0);
        while least - too_little > 64 {
            let middle = least.midpoint(too_little);
            if fits(middle) { least = middle } else { too_little = middle }
        }
        for keys in [disk, ""] {
            assert_eq!(notice(keys, None), None, "{keys}");
            // With an eighth to spare.
            assert_eq!(notice(keys, Some(all_at_once * 8 / 7 + 8)), None, "{keys}");
            let said = notice(keys, Some(least)).expect("experts one by one");
            assert!(said.contains("3 times a step for each of 4 micro-batches"), "{said}");
        }
        assert!(!look(memory, Some(least)).problems.is_empty(), "all layers in {least} bytes");
        // The others have none.
        assert!(look_at("qwen3", disk, Some(all_at_once)).notices.iter().all(|notice| !notice.contains("one by one")));
    }

    /// Of 384 experts of which a token chooses 8.
    #[test]
    fn more_tokens_use_more_experts() {
        for (tokens, part) in [(0, 0.0), (1, 8.0 / 384.0), (32, 0.490), (128, 0.933), (100_000, 1.0)] {
            let found = used_part(8, 384, tokens);
            assert!((found - part).abs() < 1e-3, "{tokens}: {found}");
        }
        assert_eq!(used_part(4, 4, 1), 1.0);
    }

    /// Whole layers are read for groups of micro-batches, experts for each.
    #[test]
    fn what_a_step_reads() {
        let recipe = recipe("qwen3_moe", "");
        let model = model_directory(&recipe);
        let examined = examine(Examined::default(), &recipe, model, &ThisHost::default(), Extent::Run, None, &|_| {});
        let sizing = examined.ready().unwrap_or_else(|error| panic!("{error}")).sizing;
        let ways = on_the_disk(&sizing);
        assert_eq!(ways.iter().map(Placement::reads_experts).collect::<Vec<_>>(), [false, true]);
        let read = |placement: &Placement, at_once: usize, micro_batches: usize| {
            let sizing = Sizing { placement: placement.clone(), at_once, ..sizing.clone() };
            read_in_step(&sizing, micro_batches, 100_000)
        };
        let held = sizing.placement.held(sizing.stored);
        let sum =
            |size: fn(&LayerSizes, FloatType) -> u64| sizing.layers.iter().map(|layer| size(layer, held)).sum::<u64>();
        let last = sizing.layers.last().expect("layers");
        let whole = 2 * sum(LayerSizes::bytes) - last.bytes(held);
        assert_eq!([1, 4].map(|at_once| read(&ways[0], at_once, 4)), [4 * whole, whole]);
        let others = 2 * sum(LayerSizes::bytes_without_experts) - last.bytes_without_experts(held);
        let experts = sizing.layers.iter().map(|layer| layer.experts.bytes(held)).sum::<u64>();
        assert!(experts > 0 && experts < sum(LayerSizes::bytes));
        assert_eq!(
            [1, 4].map(|micro_batches| read(&ways[1], 4, micro_batches)),
            [1, 4].map(|n| others + 3 * n * experts)
        );
        assert_eq!(read(&sizing.placement, 4, 4), 0, "layers in memory");
    }
}
