//! The tables of docs/big-models.md that say which machines train which model are those of the
//! estimate. The shapes are those of the models' config.json on the hub, in `tests/goldens/configs`.

use std::path::Path;

use finetune_allreduce::DeviceMatrix;
use finetune_dataset::{Counts, Dataset, Ends, Origin, Row};
use finetune_model::{
    Device, EXPERTS_IN_MEMORY, FloatType, LayerSizes, ModelConfig, Order, PackedSizes, Placement, Seconds, Stage,
    choose, expected_tensors, not_in_stages,
};
use finetune_recipe::{PlacementChoice, Recipe, ResidencyChoice, StagesChoice};

use super::{Counted, Precision, Sizing, StepShape, Subject, estimate_of};
use crate::product_time::Multiplied;
use crate::residency::{most_at_once, on_the_disk};
use crate::stages::{self, Offer};

/// Name, the file of its config, and its parameters. The smallest model comes first.
const MODELS: [(&str, &str, u64); 10] = [
    ("Qwen3-8B", "qwen3-8b", 8_190_735_360),
    ("Gemma-3-27B", "gemma-3-27b", 27_009_346_304),
    ("Qwen3-30B-A3B", "qwen3-30b-a3b", 30_532_122_624),
    ("Qwen3-32B", "qwen3-32b", 32_762_123_264),
    ("Llama-3.3-70B", "llama-3.3-70b", 70_553_706_496),
    ("gpt-oss-120b", "gpt-oss-120b", 116_829_156_672),
    ("Qwen3-235B-A22B", "qwen3-235b-a22b", 235_093_634_560),
    ("Qwen3-Coder-480B-A35B", "qwen3-coder-480b-a35b", 480_154_875_392),
    ("DeepSeek-V3", "deepseek-v3", 671_026_419_200),
    ("Kimi-K2", "kimi-k2", 1_026_408_232_448),
];

/// GiB of memory of the machines, the fewest first.
const MEMORY: [u64; 6] = [16, 32, 64, 128, 256, 512];
/// Percent of a machine's memory that a run may take. Metal recommends about three quarters.
const USABLE_PERCENT: u64 = 75;
const MACHINES: [usize; 3] = [1, 2, 4];
/// Tokens of a row, and of a micro-batch.
const TOKENS: usize = 2048;
const MICRO_BATCHES: usize = 16;
/// Micro-batches that must have room together. With fewer, disks are read too often, and machines
/// wait for each other.
const FEWEST_AT_ONCE: usize = 4;

/// Bytes of a packed matrix: 4 bits a weight, and a scale and a bias of 16 bits for 64 weights.
fn packed_bytes(elements: u64) -> u64 {
    elements * 9 / 16
}

/// Where the layers of a model are.
#[derive(Clone, Copy)]
struct Way {
    machines: usize,
    from_disk: bool,
}

impl Way {
    /// In memory and from the disk, for each number of machines.
    fn all() -> impl Iterator<Item = Way> {
        MACHINES.into_iter().flat_map(|machines| [false, true].map(|from_disk| Way { machines, from_disk }))
    }
}

/// A model, and a step that is taken with it.
struct Training {
    recipe: Recipe,
    rows: Dataset,
    sizing: Sizing,
    counted: Counted,
    cpu: bool,
}

/// The matrices of each layer, all of them packed.
fn layers(config: &ModelConfig) -> Vec<LayerSizes> {
    let mut layers = vec![LayerSizes::default(); config.layers.len()];
    for (name, shape) in expected_tensors(config).iter().filter(|(_, shape)| shape.len() == 2) {
        let Some((_, rest)) = name.split_once(".layers.") else { continue };
        let layer = rest.split('.').next().and_then(|n| n.parse::<usize>().ok()).expect("the number of a layer");
        let elements = shape.iter().product::<usize>() as u64;
        layers[layer].add_size(&LayerSizes::of_matrix(name, elements, Some(packed_bytes(elements))));
    }
    layers
}

/// The embedding, and the output layer if that is another matrix. Neither is packed.
fn ends(config: &ModelConfig) -> [LayerSizes; 2] {
    let tensors = expected_tensors(config);
    ["embed_tokens.weight", "lm_head.weight"].map(|name| {
        let shape = tensors.iter().find(|(found, _)| found.ends_with(name)).map(|(_, shape)| shape);
        let dense = shape.map_or(0, |shape| shape.iter().product::<usize>() as u64);
        LayerSizes { dense, ..LayerSizes::default() }
    })
}

fn rows() -> Dataset {
    let row = Row {
        tokens: vec![0; TOKENS],
        trained: vec![true; TOKENS],
        origin: Origin { file: 0, line: 1, row: 0 },
        prompt_tokens: 0,
        prompt_text: String::new(),
        answer_text: String::new(),
    };
    Dataset {
        rows: vec![row; MICRO_BATCHES],
        files: Vec::new(),
        counts: Counts { tokens: (TOKENS * MICRO_BATCHES) as u64, ..Counts::default() },
        digest: String::new(),
        notices: Vec::new(),
        ends: Ends::default(),
        weights: Vec::new(),
    }
}

impl Training {
    fn new(name: &str, cpu: bool) -> Training {
        let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let path = repository.join(format!("tests/goldens/configs/{name}.json"));
        let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let config = ModelConfig::parse(&text, &path).unwrap_or_else(|error| panic!("{error}"));
        let text = "output_dir = \"run\"\n[model]\npath = \"base\"\n[data]\ntrain = \"rows.jsonl\"\n\
                    [lora]\nrank = 16\ntarget_modules = \"all-linear\"\n\
                    [train]\nmicro_batch_size = 1\nglobal_batch_size = 16\ngradient_checkpointing = true\n";
        let recipe = Recipe::parse(text, Path::new("r.toml"), &[], None).unwrap_or_else(|error| panic!("{error}"));
        let adaptation = choose(&recipe.lora, &config).unwrap_or_else(|error| panic!("{error}"));
        let layers = layers(&config);
        let of_layers = |size: fn(&PackedSizes) -> u64| layers.iter().map(move |layer| size(&layer.packed));
        let packed = PackedSizes {
            elements: of_layers(|packed| packed.elements).sum(),
            bytes: of_layers(|packed| packed.bytes).sum(),
            largest: of_layers(|packed| packed.largest).max().unwrap_or(0),
        };
        // A build without a GPU has no such device. What it computes in is what decides.
        let gpu = Placement::gpu(Device::flex(), FloatType::BF16);
        let placement = if cpu { Placement::cpu(None) } else { gpu };
        let sizing = Sizing {
            ends: ends(&config),
            embedding_by_row: !config.tied_embeddings,
            config,
            adaptation: Some(adaptation),
            text_bytes: 0,
            longest: usize::MAX,
            placement: placement.with_ends_where_used(true),
            stored: FloatType::BF16,
            packed,
            loading: 0,
            by_row: 0,
            layers,
            at_once: 1,
            shares: 1,
            has_bf16: true,
        };
        let counted = Counted::new(&sizing.config, sizing.adaptation.as_ref());
        Training { recipe, rows: rows(), sizing, counted, cpu }
    }

    /// Bytes that the machine needs which needs most. The first one has as many layers as any, and the embedding; that
    /// of the last layer has as many, the output layer and the logits.
    fn needed(&self, way: Way, at_once: usize) -> u64 {
        let last = (self.sizing.layers.len() - 1) % way.machines;
        self.needed_by(way, 0, at_once).max(self.needed_by(way, last, at_once))
    }

    /// Bytes that a machine needs.
    fn needed_by(&self, way: Way, machine: usize, at_once: usize) -> u64 {
        let stage = Stage::in_turn(self.sizing.layers.len(), way.machines, machine);
        let stage = (way.machines > 1).then_some(stage);
        let placements = match (way.from_disk, self.cpu) {
            (false, _) => vec![self.sizing.placement.clone()],
            (true, false) => vec![self.sizing.placement.clone().with_layers_from_disk(true)],
            // Experts one by one, where two layers do not fit.
            (true, true) => on_the_disk(&self.sizing),
        };
        let needed = |placement: Placement| self.needed_in(placement.with_stage(stage.clone()), at_once);
        placements.into_iter().map(needed).min().unwrap_or(0)
    }

    /// Bytes that a machine needs with this placement.
    fn needed_in(&self, placement: Placement, at_once: usize) -> u64 {
        let sizing = Sizing { placement, at_once, ..self.sizing.clone() };
        let subject = Subject { recipe: &self.recipe, train: &self.rows, eval: None, sizing: &sizing };
        let train = &self.recipe.train;
        let step = StepShape::new(&subject, train.micro_batch_size, train.gradient_checkpointing, usize::MAX);
        let precision = Precision { cpu: self.cpu, threads: 2, ..Precision::new(&sizing) };
        estimate_of(&sizing.config, &self.counted, sizing.placement.stage(), &step, precision).total
    }

    /// The smallest memory with which it fits, and behind it the groups that micro-batches go in, if
    /// they do not go through each layer together.
    fn least(&self, way: Way) -> (Option<u64>, String) {
        // One machine with all layers in memory computes one micro-batch after the other.
        let one_by_one = way.machines == 1 && !way.from_disk;
        let fits = |memory: u64, at_once: usize| self.needed(way, at_once) <= usable(memory);
        let fewest = if one_by_one { 1 } else { FEWEST_AT_ONCE };
        let Some(memory) = MEMORY.into_iter().find(|&memory| fits(memory, fewest)) else {
            return (None, "-".to_owned());
        };
        let at_once = most_at_once(MICRO_BATCHES, |at_once| fits(memory, at_once));
        let groups = if one_by_one { 1 } else { MICRO_BATCHES.div_ceil(at_once) };
        (Some(memory), if groups == 1 { memory.to_string() } else { format!("{memory} ({groups})") })
    }

    /// Bytes of the layers of the machine with most of them.
    fn layer_bytes(&self, machines: usize) -> u64 {
        (0..machines)
            .map(|mine| self.sizing.layers.iter().skip(mine).step_by(machines).map(|layer| layer.packed.bytes).sum())
            .max()
            .unwrap_or(0)
    }

    /// Bytes that a machine sends in a step from layer to layer, forward and back.
    fn sent(&self, machines: usize) -> u64 {
        let tensor = TOKENS * self.sizing.config.hidden_size * self.sizing.placement.compute().bytes();
        (2 * tensor * MICRO_BATCHES * (self.sizing.layers.len() - 1) / machines) as u64
    }

    /// Bytes of the whole base.
    fn base_bytes(&self) -> u64 {
        (self.counted.sizes.parameters - self.sizing.packed.elements) * 2 + self.sizing.packed.bytes
    }
}

fn usable(gibibytes: u64) -> u64 {
    (gibibytes << 30) * USABLE_PERCENT / 100
}

/// Billions, with one digit behind the point below ten.
fn billions(value: u64) -> String {
    let value = value as f64 / 1e9;
    if value < 9.95 { format!("{value:.1}") } else { format!("{value:.0}") }
}

/// A row for each model, and the least memory of each model and way.
fn models(cpu: bool) -> (String, Vec<Vec<Option<u64>>>) {
    let mut table = String::new();
    let mut all = Vec::new();
    for (name, file, _) in MODELS {
        let training = Training::new(file, cpu);
        let (least, cells): (Vec<_>, Vec<_>) = Way::all().map(|way| training.least(way)).unzip();
        let layers = MACHINES.map(|machines| billions(training.layer_bytes(machines))).join(", ");
        let sent = [2, 4].map(|machines| billions(training.sent(machines))).join(", ");
        let base = billions(training.base_bytes());
        table += &format!("| {name} | {base} | {} | {layers} | {sent} |\n", cells.join(" | "));
        all.push(least);
    }
    (table, all)
}

/// The largest model that fits in each memory, in each way.
fn largest(least: &[Vec<Option<u64>>]) -> String {
    let of_way = |memory: u64, way: usize| {
        let fits = |least: &Vec<Option<u64>>| least[way].is_some_and(|least| least <= memory);
        least.iter().rposition(fits).map_or("-", |model| MODELS[model].0)
    };
    let row = |memory: u64| {
        let cells: Vec<&str> = (0..Way::all().count()).map(|way| of_way(memory, way)).collect();
        format!("| {memory} | {} |\n", cells.join(" | "))
    };
    MEMORY.into_iter().map(row).collect()
}

/// A row for each model: its layers, the part of all products that is for the losses, and how busy 2, 4 and 8 ranks are
/// that hold it in turn. Every token is trained on, and all products are equally fast.
fn busy() -> String {
    let percent = |part: f64| format!("{:.0} %", 100.0 * part);
    let row = |(name, file, parameters): (&str, &str, u64)| {
        let config = Training::new(file, false).sizing.config;
        let (layers, all) = (config.layers.len(), Multiplied::of(&config, parameters));
        // Layers are computed again on the way back, losses are not.
        let forward = all.layers as f64 / layers as f64;
        let seconds = Seconds { forward, back: 2.0 * forward, head: 2.0 * all.output as f64, hop: 0.0 };
        let losses = seconds.head / (3 * all.layers + 2 * all.output) as f64;
        let busy = |ranks: usize| {
            let done = Stage::in_turn(layers, ranks, 0).simulate(MICRO_BATCHES, 0, Order::Layers, seconds);
            percent(done.expect("an end").busy)
        };
        format!("| {name} | {layers} | {} | {} |\n", percent(losses), [2, 4, 8].map(busy).join(" | "))
    };
    MODELS.into_iter().map(row).collect()
}

#[test]
fn shapes_have_the_parameters_of_the_models() {
    for (name, file, parameters) in MODELS {
        let Training { sizing: Sizing { config, adaptation, .. }, counted, .. } = Training::new(file, true);
        assert_eq!(counted.sizes.parameters, parameters, "{name}");
        let adaptation = adaptation.expect("an adaptation");
        assert_eq!(not_in_stages(&config, &adaptation), None, "{name} can be spread");
    }
}

/// The page with these rows in its four tables.
fn with_tables(page: &str, tables: &[String; 4]) -> String {
    let mut tables = tables.iter();
    let (mut made, mut is_row) = (String::new(), false);
    for (line, before) in page.lines().zip(std::iter::once("").chain(page.lines())) {
        is_row &= line.starts_with('|');
        if is_row {
            continue;
        }
        made += &format!("{line}\n");
        // The line below the heads of the columns.
        let heads = ["| model | layers |", "| model | base GB |", "| GB |"];
        if line.starts_with("| --- |") && heads.iter().any(|head| before.starts_with(head)) {
            made += tables.next().map_or("", String::as_str);
            is_row = true;
        }
    }
    assert_eq!(tables.next(), None, "docs/big-models.md has fewer tables");
    made
}

/// UPDATE_EXPECT=1 rewrites the tables.
#[test]
#[expect(clippy::disallowed_methods, reason = "a page of the source tree needs no durable write")]
fn the_page_says_which_machines_train_which_model() {
    let (on_gpus, least) = models(false);
    let (on_cpus, _) = models(true);
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/big-models.md");
    let page = std::fs::read_to_string(path).expect("docs/big-models.md");
    let tables = [busy(), on_gpus, largest(&least), on_cpus];
    let made = with_tables(&page, &tables);
    if std::env::var_os("UPDATE_EXPECT").is_some() {
        return std::fs::write(path, made).expect("docs/big-models.md");
    }
    let tables = tables.join("\n");
    assert!(page == made, "docs/big-models.md is stale, UPDATE_EXPECT=1 rewrites it. Its tables should be\n{tables}");
}

/// What is only on some machines does not count on the others.
#[test]
fn embedding_and_output_layer_count_where_they_are() {
    let way = Way { machines: 4, from_disk: false };
    // (config, the machines with the embedding, with the output layer)
    for (file, embedding, output) in [
        ("llama-3.3-70b", vec![0], vec![3]),
        // 61 layers: the first and the last are on the same machine.
        ("deepseek-v3", vec![0], vec![0]),
        // One matrix is both, on machines 0 and (62 - 1) % 4.
        ("gemma-3-27b", vec![0, 1], vec![]),
    ] {
        let training = Training::new(file, false);
        let everywhere = training.sizing.placement.clone().with_ends_where_used(false);
        let sizing = Sizing { placement: everywhere, ..training.sizing.clone() };
        let all = Training { sizing, ..Training::new(file, false) };
        let [of_embedding, of_output] = training.sizing.ends.map(|end| end.bytes(FloatType::BF16));
        assert!(of_embedding > 1 << 30, "{file}: {of_embedding} bytes of the embedding");
        assert_eq!(of_output > 0, !output.is_empty(), "{file}: {of_output} bytes of the output layer");
        for machine in 0..4 {
            let spared = all.needed_by(way, machine, 1) - training.needed_by(way, machine, 1);
            let without = |has: &[usize], bytes: u64| if has.contains(&machine) { 0 } else { bytes };
            assert_eq!(spared, without(&embedding, of_embedding) + without(&output, of_output), "{file}: {machine}");
        }
    }
}

/// Where layers come from the disk, the rows of an embedding that is no output layer stay there, and do not count on the
/// machine that has it.
#[test]
fn an_embedding_on_the_disk_does_not_count() {
    for (file, machines) in [("llama-3.3-70b", 1), ("llama-3.3-70b", 4), ("kimi-k2", 2), ("gemma-3-27b", 1)] {
        let (by_row, mut whole) = (Training::new(file, false), Training::new(file, false));
        whole.sizing.embedding_by_row = false;
        let is_tied = by_row.sizing.config.tied_embeddings;
        assert_eq!(by_row.sizing.embedding_by_row, !is_tied, "{file}");
        let of_embedding = by_row.sizing.ends[0].bytes(FloatType::BF16);
        assert!(of_embedding > 1 << 30, "{file}: {of_embedding} bytes of the embedding");
        for (from_disk, machine) in [false, true].into_iter().flat_map(|disk| (0..machines).map(move |n| (disk, n))) {
            let way = Way { machines, from_disk };
            let spared = whole.needed_by(way, machine, 1) - by_row.needed_by(way, machine, 1);
            let want = if from_disk && machine == 0 && !is_tied { of_embedding } else { 0 };
            assert_eq!(spared, want, "{file}: machine {machine} of {machines}, from the disk: {from_disk}");
        }
    }
}

/// A rank has room for as many layers as it offers to hold, and for no more.
#[test]
fn what_ranks_offer_is_what_fits() {
    let mut bounded = 0;
    for (file, gibibytes) in [("llama-3.3-70b", 24), ("llama-3.3-70b", 32), ("qwen3-30b-a3b", 9), ("gemma-3-27b", 512)]
    {
        let mut training = Training::new(file, true);
        training.recipe.model.residency = ResidencyChoice::Memory;
        let (layers, available) = (training.sizing.config.layers.len(), gibibytes << 30);
        let needed = |count: usize, has_last: bool| {
            let mine = |n: usize| (n > 0 && n <= count - usize::from(has_last)) || (has_last && n + 1 == layers);
            let of_layer = (0..layers).map(|n| usize::from(!mine(n))).collect();
            let placement = training.sizing.placement.clone().with_stage(Some(Stage { of_layer, mine: 0 }));
            let sizing = Sizing { placement, at_once: 1, ..training.sizing.clone() };
            let subject = Subject { recipe: &training.recipe, train: &training.rows, eval: None, sizing: &sizing };
            subject.estimate_counted(&training.counted).total
        };
        let (recipe, train, sizing) = (&training.recipe, &training.rows, &training.sizing);
        let offer = Offer::new(&Subject { recipe, train, eval: None, sizing }, None, Some(available), 4);
        for has_last in [false, true] {
            // One at a time. Where several go together, there is less room.
            let [of_several, room] = [0, 1].map(|way| offer.room[way][0][usize::from(has_last)]);
            assert!(of_several <= room, "{file}: {of_several} {room}");
            if room < layers {
                bounded += 1;
                assert!(room > 0 && needed(room, has_last) <= available, "{file}: {room} do not fit");
                assert!(needed(room + 1, has_last) > available, "{file}: {room} is not all");
            } else {
                assert!(needed(layers - 1 - usize::from(!has_last), has_last) <= available, "{file}");
            }
        }
        assert!(offer.room[1][0][1] <= offer.room[1][0][0], "{file}: logits take no room");
        let unlimited = Offer::new(&Subject { recipe, train, eval: None, sizing }, None, None, 4);
        assert!(unlimited.whole && unlimited.room.as_flattened().as_flattened().iter().all(|room| *room == layers));
    }
    assert!(bounded >= 4, "{bounded}");
}

/// With its experts read one by one, Kimi K2 takes the output layer, two layers without experts and a few experts: the
/// layer without experts is the largest of these.
#[test]
fn a_layer_larger_than_memory_is_read_by_experts() {
    let training = Training::new("kimi-k2", true);
    let [whole, by_experts] = <[Placement; 2]>::try_from(on_the_disk(&training.sizing)).expect("two ways");
    let held = FloatType::BF16;
    let [first, next] = [0, 1].map(|n| training.sizing.layers[n]);
    let weights = |placement: Placement| {
        let sizing = Sizing { placement, ..training.sizing.clone() };
        let subject = Subject { recipe: &training.recipe, train: &training.rows, eval: None, sizing: &sizing };
        subject.estimate_counted(&training.counted).weights
    };
    let experts = next.experts;
    assert_eq!(first.experts.bytes(held), 0);
    assert_eq!(experts.bytes(held), 384 * 3 * experts.largest(held));
    assert!(experts.bytes(held) > 9_500_000_000, "{}", experts.bytes(held));
    let two = |first: u64, next: u64| first + next;
    let of_whole = two(next.bytes(held), next.bytes(held));
    let without = two(first.bytes_without_experts(held), next.bytes_without_experts(held));
    let few = EXPERTS_IN_MEMORY as u64 * experts.largest(held);
    assert_eq!(weights(whole) - weights(by_experts.clone()), of_whole - without - few);
    // The output layer has 16 bits. The rows of the embedding stay in their file.
    let rest = weights(by_experts) - training.sizing.ends[1].bytes(held) - without - few;
    assert!(rest < 8 << 20, "norms of {rest} bytes");
}

/// Where cables form a chain, layers lie next to each other, and there and back where a rank has to read its own. The
/// numbers of layers may be the recipe's.
#[test]
fn layers_lie_there_and_back_where_they_do_not_fit() {
    let row =
        |rank: usize| (0..4).map(move |to: usize| if rank.abs_diff(to) == 1 { vec!["en2".to_owned()] } else { vec![] });
    let chain = DeviceMatrix::new((0..4).map(|rank| row(rank).collect()).collect()).expect("cables");
    let mut training = Training::new("llama-3.3-70b", true);
    training.recipe.parallel.stages = StagesChoice::Count(4);
    let lying = |recipe: &Recipe, available: Option<u64>| {
        let Training { rows: train, sizing, .. } = &training;
        let subject = Subject { recipe, train, eval: None, sizing };
        let chosen = stages::choose(&subject, available, &|| None, Some(&chain), None).expect("stages").expect("four");
        chosen.stage.of_layer.to_vec()
    };
    for counts in [vec![], vec![20, 24, 16, 20]] {
        let mut recipe = training.recipe.clone();
        recipe.parallel.layers = counts.clone();
        let (of_block, of_wave) = match counts.is_empty() {
            true => (Stage::contiguous(80, 4, 0), Stage::wave(&[20; 4], 0)),
            false => (Stage::in_order(&counts, 0), Stage::wave(&counts, 0)),
        };
        let (next_to_each_other, there_and_back) = (of_block.of_layer.to_vec(), of_wave.of_layer.to_vec());
        // What rank 0 needs for its layers in memory.
        let placement = training.sizing.placement.clone().with_stage(Some(of_block));
        let sizing = Sizing { placement, ..training.sizing.clone() };
        let subject = Subject { recipe: &recipe, train: &training.rows, eval: None, sizing: &sizing };
        let enough = subject.estimate_counted(&training.counted).total;
        assert_eq!(lying(&recipe, None), next_to_each_other, "{counts:?}: memory is not known");
        assert_eq!(lying(&recipe, Some(enough)), next_to_each_other, "{counts:?}: {enough} bytes");
        assert_eq!(lying(&recipe, Some(enough - 1)), there_and_back, "{counts:?}: a byte less");
        assert_eq!(
            lying(&recipe, Some(1 << 30)),
            next_to_each_other,
            "{counts:?}: nothing fits, which is refused later"
        );
        // What the recipe says is not changed.
        recipe.parallel.placement = PlacementChoice::Contiguous;
        assert_eq!(lying(&recipe, Some(enough - 1)), next_to_each_other, "{counts:?}: asked for");
    }
}
