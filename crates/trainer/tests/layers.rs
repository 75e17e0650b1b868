//! The layers of one model over several ranks, each a thread of this process. The result has the bits of one rank.

mod common;

use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use common::deeper::{at_least, deeper};
use common::{adapter, goldens, recipe, run, run_altered, run_on, state};
use finetune_allreduce::DeviceMatrix;
use finetune_trainer::{Outcome, Resume, ThisHost, TrainError};

/// Whether a rank reads its layers from the disk.
type OnDisk = fn(usize) -> bool;

/// The layers of one model over 1 to 4 ranks, and over twice two ranks, in families whose parts the tests of each number
/// of ranks have not: losses, norms of gradients, evaluations, checkpoints and adapters have the bits of one process,
/// whether layers are in memory or read from the disk.
#[test]
fn layers_over_several_ranks_give_the_bits_of_one_process() {
    let families = [
        "qwen3_5",
        "qwen3_next",
        "gpt_oss_mxfp4",
        "gpt_oss_mxfp4_experts",
        "glm4_moe_lite",
        "gemma2",
        "lfm2_moe",
        "olmo3",
    ];
    for family in families {
        let of_experts = r#"lora.target_modules=["v_proj", "experts"]"#;
        // Experts have no dropout, as in PEFT.
        let lora = if family.ends_with("_experts") {
            [of_experts, "lora.dropout=0"]
        } else {
            ["lora.rank=4", "lora.dropout=0.1"]
        };
        let folder = tempfile::tempdir().expect("a directory");
        let (_made, base) = at_least(&goldens(family), 4);
        let rows = goldens(family).join("rows.jsonl");
        let paths = [("model.path", base), ("data.train", rows.clone()), ("data.eval", rows)];
        let paths = paths.map(|(key, path)| format!("{key}={path:?}"));
        let told = |world: usize, stages: usize, on_disk: OnDisk| {
            let output = folder.path().join(format!("{world} {stages} {}", on_disk(0)));
            let of_rank = |rank: usize| {
                let residency = if on_disk(rank) { "model.residency=disk" } else { "model.residency=memory" };
                let stages = format!("parallel.stages={stages}");
                let more = ["model.device=cpu", lora[0], lora[1], "distributed.virtual_ranks=2", residency, &stages];
                recipe(&output, &paths.iter().map(String::as_str).chain(more).collect::<Vec<_>>())
            };
            let (told, outcomes) = run(world, None, &Resume::No, of_rank, |_, _| 0);
            assert!(outcomes.iter().all(Result::is_ok), "{family}, {world} ranks, {stages} stages: {outcomes:?}");
            (told.losses(), told.norms(), told.evaluations, adapter(&output), state(&output))
        };
        let expected = told(1, 1, |_| false);
        for (world, stages, on_disk) in
            [(2, 2, (|_| true) as OnDisk), (3, 3, |rank| rank == 1), (4, 4, |_| false), (4, 2, |rank| rank % 2 == 0)]
        {
            assert!(told(world, stages, on_disk) == expected, "{family}, {world} ranks, {stages} stages: other bits");
        }
    }
}

/// Numbers of layers that differ from rank to rank, also where a rank's layers are next to each other and where rank
/// 0 has not the first layer: losses, evaluations, checkpoints and adapters have the bits of one process. A run goes
/// on with another placement, and says in `run.json` which one it has.
#[test]
fn uneven_layers_give_the_bits_of_one_process() {
    let placements: [(&str, usize, &[usize], &[usize]); 8] = [
        ("llama", 2, &[2, 1], &[0, 1, 0]),
        ("llama", 2, &[1, 2], &[1, 0, 1]),
        ("gemma3", 4, &[1, 2], &[1, 0, 1]),
        ("qwen3_moe", 2, &[1, 2], &[1, 0, 1]),
        ("deepseek_v3", 2, &[1, 2], &[1, 0, 1]),
        ("qwen3_5", 2, &[3, 1], &[0, 0, 1, 0]),
        ("qwen3_5", 2, &[1, 3], &[1, 0, 1, 1]),
        ("qwen3_5", 3, &[1, 1, 2], &[2, 0, 1, 2]),
    ];
    for (family, world, counts, rank_of_layer) in placements {
        let folder = tempfile::tempdir().expect("a directory");
        let rows = goldens(family).join("rows.jsonl");
        let paths = [("model.path", goldens(family)), ("data.train", rows.clone()), ("data.eval", rows)];
        let paths = paths.map(|(key, path)| format!("{key}={path:?}"));
        let common = ["model.device=cpu", "lora.dropout=0.1", "distributed.virtual_ranks=2"];
        let recipe_of = |output: &Path, more: &[String]| {
            let sets = paths.iter().map(String::as_str).chain(common).chain(more.iter().map(String::as_str));
            recipe(output, &sets.collect::<Vec<_>>())
        };
        let spread = [format!("parallel.stages={}", counts.len()), format!("parallel.layers={counts:?}")];
        let told = |world: usize, more: &[String], on_disk: fn(usize) -> bool| {
            let output = folder.path().join(format!("{world} {} {} {}", more.len(), on_disk(0), on_disk(1)));
            let of_rank = |rank: usize| {
                let residency = if on_disk(rank) { "model.residency=disk" } else { "model.residency=memory" };
                recipe_of(&output, &[more, &[residency.to_owned()]].concat())
            };
            let (told, outcomes) = run(world, None, &Resume::No, of_rank, |_, _| 0);
            assert!(outcomes.iter().all(Result::is_ok), "{family}, {world} ranks, {counts:?}: {outcomes:?}");
            let facts = std::fs::read_to_string(output.join("run.json")).expect("run.json");
            let facts: serde_json::Value = serde_json::from_str(&facts).expect("JSON");
            (
                facts["rank_of_layer"].clone(),
                (told.losses(), told.norms(), told.evaluations, adapter(&output), state(&output)),
            )
        };
        let (none, expected) = told(1, &[], |_| false);
        assert!(none.is_null(), "{none}");
        for on_disk in [(|_| false) as fn(usize) -> bool, |_| true, |rank| rank == 1] {
            let (placement, got) = told(world, &spread, on_disk);
            assert_eq!(placement, serde_json::json!(rank_of_layer), "{family}, {counts:?}");
            assert!(got == expected, "{family}, {world} ranks, {counts:?}: other bits");
        }
        // Half of the run without, and half with: the number of ranks and the placement may change.
        let output = folder.path().join("resumed");
        let stop = |rank, step| if rank == 0 && step >= 3 { 15 } else { 0 };
        let (first, outcomes) = run(1, None, &Resume::No, |_| recipe_of(&output, &[]), stop);
        assert!(matches!(outcomes[..], [Ok(Outcome::Stopped { step: 3, .. })]), "{outcomes:?}");
        let (second, outcomes) = run(world, None, &Resume::Newest, |_| recipe_of(&output, &spread), |_, _| 0);
        assert!(outcomes.iter().all(Result::is_ok), "{family}, {counts:?}: {outcomes:?}");
        assert_eq!([first.losses(), second.losses()].concat(), expected.0, "{family}, {counts:?}");
        assert!(state(&output) == expected.4, "{family}, {counts:?}: another state");
    }
}

/// (ranks, ranks that hold the layers together), the first of which the others are compared with.
const SPREADS: [(usize, usize); 5] = [(1, 1), (2, 2), (3, 3), (4, 4), (4, 2)];

/// What is read of the disk: nothing, all layers, those of every second rank.
const RESIDENCIES: [(&str, OnDisk); 3] = [("memory", |_| false), ("disk", |_| true), ("mixed", |rank| rank % 2 == 1)];

/// Without momentum and clipping the first moment after a step is that step's gradient, to the bit, and each step has a
/// checkpoint.
const GRADIENTS_ARE_SAVED: [&str; 7] = [
    "optimizer.betas=[0.0, 0.999]",
    "train.max_grad_norm=0",
    "train.max_steps=4",
    "eval.every=2",
    "checkpoint.every=1",
    "checkpoint.keep_last=4",
    "distributed.virtual_ranks=2",
];

/// A model of at least four layers in each of [`SPREADS`] with each of [`RESIDENCIES`]: losses, gradients (as the moments
/// in the checkpoints have them), evaluations, all checkpoints and the adapter have the bits of one process.
fn expect_one_result(what: &str, model: &Path, rows: &Path, more: &[&str]) {
    let folder = tempfile::tempdir().expect("a directory");
    let paths = [("model.path", model), ("data.train", rows), ("data.eval", rows)];
    let paths = paths.map(|(key, path)| format!("{key}={path:?}"));
    let told = |world: usize, stages: usize, residency: &str, on_disk: OnDisk| {
        let output = folder.path().join(format!("{world} {stages} {residency}"));
        let what = format!("{what}, {more:?}, {world} ranks, {stages} stages, {residency}");
        let of_rank = |rank: usize| {
            let residency = if on_disk(rank) { "model.residency=disk" } else { "model.residency=memory" };
            let stages = format!("parallel.stages={stages}");
            let sets = ["model.device=cpu", residency, &stages].into_iter().chain(GRADIENTS_ARE_SAVED);
            let sets = paths.iter().map(String::as_str).chain(sets).chain(more.iter().copied());
            recipe(&output, &sets.collect::<Vec<_>>())
        };
        let (told, outcomes) = run(world, None, &Resume::No, of_rank, |_, _| 0);
        assert!(outcomes.iter().all(Result::is_ok), "{what}: {outcomes:?}");
        // What a rank says of its disk comes from that rank.
        for rank in told.steps.iter().flat_map(|row| &row.ranks) {
            assert_eq!(rank.reading_seconds.is_some(), on_disk(rank.rank), "{what}: {rank:?}");
        }
        let checkpoints = checkpoints(&output);
        assert_eq!(checkpoints.len(), 4, "{what}");
        (what, (told.losses(), told.norms(), told.evaluations, adapter(&output), checkpoints))
    };
    let (_, expected) = told(1, 1, "memory", |_| false);
    for (world, stages) in SPREADS {
        for (residency, on_disk) in RESIDENCIES {
            // One rank is either, and has been in memory.
            if (world == 1 && residency != "disk") || (world != 4 && residency == "mixed") {
                continue;
            }
            let (what, got) = told(world, stages, residency, on_disk);
            assert!(got == expected, "{what}: other bits");
        }
    }
}

/// Values and moments after each step, with the name of the checkpoint.
fn checkpoints(output: &Path) -> Vec<(String, [Vec<u8>; 2])> {
    let folder = output.join("checkpoints");
    let entries = std::fs::read_dir(&folder).expect("checkpoints");
    let mut names: Vec<String> =
        entries.map(|entry| entry.expect("an entry").file_name().into_string().expect("a name")).collect();
    names.sort();
    let files = ["adapter_model.safetensors", "optimizer.safetensors"];
    let read = |name: String| {
        let bytes = files.map(|file| std::fs::read(folder.join(&name).join(file)).expect("a file of the checkpoint"));
        (name, bytes)
    };
    names.into_iter().map(read).collect()
}

/// Dense layers, experts, windows and latent attention.
const FAMILIES: [&str; 5] = ["llama", "qwen3", "qwen3_moe", "gemma3", "deepseek_v3"];

#[test]
fn each_number_of_ranks_gives_the_bits_of_one_process() {
    for family in FAMILIES {
        let base = deeper(&goldens(family), 5);
        expect_one_result(family, base.path(), &goldens(family).join("rows.jsonl"), &[]);
    }
}

#[test]
fn each_number_of_ranks_gives_the_bits_of_one_process_packed_on_load() {
    for family in FAMILIES {
        let base = deeper(&goldens(family), 5);
        let rows = goldens(family).join("rows.jsonl");
        expect_one_result(family, base.path(), &rows, &["model.quantization=nf4"]);
    }
}

/// Files that mlx-lm, bitsandbytes and DeepSeek's own program have packed.
#[test]
fn each_number_of_ranks_gives_the_bits_of_one_process_packed_by_others() {
    let packed = goldens("../packed");
    for (form, base) in
        [("mlx4", "llama"), ("nf4", "llama"), ("mlx_experts", "qwen3_moe"), ("fp8_deepseek_v3", "deepseek_v3")]
    {
        let model = deeper(&packed.join(form), 5);
        expect_one_result(form, model.path(), &packed.join("bases").join(base).join("rows.jsonl"), &[]);
    }
}

/// Models of seven layers whose ranks have them next to each other, or in turn there and back, in memory or on the disk,
/// as they are and packed while they are loaded: the bits of one process on 1, 2, 3 and 4 ranks.
#[test]
fn every_placement_gives_the_bits_of_one_process() {
    let placements: [(usize, usize, &str, OnDisk, &[usize]); 8] = [
        (2, 2, "contiguous", |_| false, &[0, 0, 0, 0, 1, 1, 1]),
        (2, 2, "contiguous", |rank| rank == 1, &[0, 0, 0, 0, 1, 1, 1]),
        (3, 3, "contiguous", |_| true, &[0, 0, 0, 1, 1, 2, 2]),
        (4, 4, "contiguous", |_| false, &[0, 0, 1, 1, 2, 2, 3]),
        (4, 2, "contiguous", |rank| rank % 2 == 0, &[0, 0, 0, 0, 1, 1, 1]),
        (2, 2, "wave", |_| false, &[0, 1, 1, 0, 0, 1, 1]),
        (4, 4, "wave", |_| true, &[0, 1, 2, 3, 3, 2, 1]),
        (3, 3, "wave", |rank| rank == 2, &[0, 1, 2, 2, 1, 0, 0]),
    ];
    for family in ["llama", "qwen3_moe"] {
        let (base, rows) = (deeper(&goldens(family), 7), goldens(family).join("rows.jsonl"));
        let paths = [("model.path", base.path()), ("data.train", &rows), ("data.eval", &rows)];
        let paths = paths.map(|(key, path)| format!("{key}={path:?}"));
        for packed in [None, Some("model.quantization=nf4")] {
            let folder = tempfile::tempdir().expect("a directory");
            let told = |name: usize, world: usize, stages: usize, placement: &str, on_disk: OnDisk| {
                let output = folder.path().join(name.to_string());
                let of_rank = |rank: usize| {
                    let residency = if on_disk(rank) { "model.residency=disk" } else { "model.residency=memory" };
                    let spread = [format!("parallel.stages={stages}"), format!("parallel.placement={placement}")];
                    let more = ["model.device=cpu", "distributed.virtual_ranks=2", residency, &spread[0], &spread[1]];
                    let more = more.into_iter().chain(packed);
                    recipe(&output, &paths.iter().map(String::as_str).chain(more).collect::<Vec<_>>())
                };
                let (told, outcomes) = run(world, None, &Resume::No, of_rank, |_, _| 0);
                assert!(outcomes.iter().all(Result::is_ok), "{family}, {packed:?}, {world} ranks: {outcomes:?}");
                (rank_of_layer(&output), (told.losses(), told.evaluations, adapter(&output), state(&output)))
            };
            let (none, expected) = told(0, 1, 1, "contiguous", |_| false);
            assert!(none.is_null(), "{none}");
            for (n, (world, stages, placement, on_disk, ranks)) in placements.into_iter().enumerate() {
                let (placed, got) = told(n + 1, world, stages, placement, on_disk);
                let what = format!("{family}, {packed:?}, {world} ranks, {stages} stages, {placement}");
                assert_eq!(placed, serde_json::json!(ranks), "{what}");
                assert!(got == expected, "{what}: other bits");
            }
        }
    }
}

/// A run begins in a ring, goes on with layers next to each other, and ends with layers there and back.
#[test]
fn a_run_moves_between_placements() {
    let (base, rows) = (deeper(&goldens("llama"), 7), goldens("llama").join("rows.jsonl"));
    let paths = [("model.path", base.path()), ("data.train", &rows), ("data.eval", &rows)];
    let paths = paths.map(|(key, path)| format!("{key}={path:?}"));
    let folder = tempfile::tempdir().expect("a directory");
    let recipe_of = |output: &Path, stages: usize, placement: &str| {
        let spread = [format!("parallel.stages={stages}"), format!("parallel.placement={placement}")];
        let more = ["model.device=cpu", "distributed.virtual_ranks=2", &spread[0], &spread[1]];
        recipe(output, &paths.iter().map(String::as_str).chain(more).collect::<Vec<_>>())
    };
    let whole = folder.path().join("whole");
    let (want, outcomes) = run(1, None, &Resume::No, |_| recipe_of(&whole, 1, "auto"), |_, _| 0);
    assert!(outcomes.iter().all(Result::is_ok), "{outcomes:?}");
    let output = folder.path().join("moved");
    let mut losses = Vec::new();
    let parts = [(2, "ring", 2, &[0, 1, 0, 1, 0, 1, 0][..]), (3, "contiguous", 4, &[0, 0, 0, 1, 1, 2, 2])];
    for (stages, placement, until, ranks) in parts.into_iter().chain([(3, "wave", 6, &[0, 1, 2, 2, 1, 0, 0][..])]) {
        let stop = |rank, step| if rank == 0 && step >= until && until < 6 { 15 } else { 0 };
        let (told, outcomes) = run(stages, None, &Resume::Newest, |_| recipe_of(&output, stages, placement), stop);
        assert!(outcomes.iter().all(Result::is_ok), "{placement}: {outcomes:?}");
        assert_eq!(rank_of_layer(&output), serde_json::json!(ranks), "{placement}");
        losses.extend(told.losses());
    }
    assert_eq!(losses, want.losses());
    assert!(state(&output) == state(&whole), "another state");
}

/// Cables that lead from each rank to the next one, and not from the last to the first, have layers next to each other,
/// and with layers from the disk there and back. Where they are not used they say nothing.
#[test]
fn auto_follows_the_cables() {
    let (base, rows) = (deeper(&goldens("llama"), 7), goldens("llama").join("rows.jsonl"));
    let paths = [("model.path", base.path()), ("data.train", &rows), ("data.eval", &rows)];
    let paths = paths.map(|(key, path)| format!("{key}={path:?}"));
    let folder = tempfile::tempdir().expect("a directory");
    let chain = r#"[[null,"rdma_en2",null],["rdma_en2",null,"rdma_en3"],[null,"rdma_en3",null]]"#;
    let closed = r#"[[null,"rdma_en2","rdma_en3"],["rdma_en2",null,"rdma_en3"],["rdma_en2","rdma_en3",null]]"#;
    for (n, (cables, more, ranks)) in [
        (chain, &["model.residency=memory"][..], [0, 0, 0, 1, 1, 2, 2]),
        (chain, &["model.residency=disk"], [0, 1, 2, 2, 1, 0, 0]),
        (chain, &["parallel.layers=[2, 4, 1]"], [0, 0, 1, 1, 1, 1, 2]),
        (chain, &["distributed.backend=tcp"], [0, 1, 2, 0, 1, 2, 0]),
        (chain, &["parallel.placement=ring"], [0, 1, 2, 0, 1, 2, 0]),
        (closed, &[], [0, 1, 2, 0, 1, 2, 0]),
    ]
    .into_iter()
    .enumerate()
    {
        let output = folder.path().join(n.to_string());
        let sets = ["model.device=cpu", "parallel.stages=3", "train.max_steps=1"];
        let sets: Vec<&str> = paths.iter().map(String::as_str).chain(sets).chain(more.iter().copied()).collect();
        let cables = Some(DeviceMatrix::parse(cables).expect("cables"));
        let host = ThisHost { cables, ..ThisHost::default() };
        let (_, outcomes) = run_on(&host, 3, None, &Resume::No, |_| recipe(&output, &sets), |_, _| {}, |_, _, _| {});
        assert!(outcomes.iter().all(Result::is_ok), "{more:?}: {outcomes:?}");
        assert_eq!(rank_of_layer(&output), serde_json::json!(ranks), "{more:?}");
    }
}

/// The rank of each layer, as `run.json` has it.
fn rank_of_layer(output: &Path) -> serde_json::Value {
    let facts = std::fs::read_to_string(output.join("run.json")).expect("run.json");
    let facts: serde_json::Value = serde_json::from_str(&facts).expect("JSON");
    facts["rank_of_layer"].clone()
}

/// `"auto"` spreads a model that is a byte too large for each rank, and leaves it whole where it fits: the same bits.
#[test]
fn auto_spreads_what_has_no_room() {
    let (base, rows) = (deeper(&goldens("llama"), 5), goldens("llama").join("rows.jsonl"));
    let paths = [("model.path", base.path()), ("data.train", &rows), ("data.eval", &rows)];
    let paths = paths.map(|(key, path)| format!("{key}={path:?}"));
    let folder = tempfile::tempdir().expect("a directory");
    let needed = AtomicU64::new(0);
    let told = |name: &str, world: usize, memory: Option<u64>| {
        let output = folder.path().join(name);
        let more =
            ["model.device=cpu", "distributed.virtual_ranks=2", "model.residency=memory", "parallel.stages=auto"];
        let sets: Vec<&str> = paths.iter().map(String::as_str).chain(more).collect();
        let host = ThisHost { memory, ..ThisHost::default() };
        let looked = |_: usize, run: &mut finetune_trainer::Run| needed.store(run.estimate.total, Ordering::SeqCst);
        let (told, outcomes) =
            run_on(&host, world, None, &Resume::No, |_| recipe(&output, &sets), looked, |_, _, _| {});
        assert!(outcomes.iter().all(Result::is_ok), "{name}: {outcomes:?}");
        let facts = std::fs::read_to_string(output.join("run.json")).expect("run.json");
        let facts: serde_json::Value = serde_json::from_str(&facts).expect("JSON");
        let ranks = facts["rank_of_layer"].as_array().map(Vec::len);
        (ranks, (told.losses(), told.norms(), told.evaluations, adapter(&output), state(&output)))
    };
    let (alone, expected) = told("alone", 1, None);
    let whole = needed.load(Ordering::SeqCst);
    let (with_room, same) = told("with room", 2, Some(whole));
    let (without, spread) = told("without", 2, Some(whole - 1));
    assert_eq!((alone, with_room, without), (None, None, Some(5)), "{whole} bytes");
    assert!(needed.load(Ordering::SeqCst) < whole, "a rank takes less than the whole model");
    assert!(same == expected, "two ranks with the whole model: other bits");
    assert!(spread == expected, "two stages: other bits");
}

#[test]
fn other_numbers_of_layers_than_the_model_has_are_refused() {
    let folder = tempfile::tempdir().expect("a directory");
    for layers in ["[2, 1]", "[1, 9]"] {
        let sets = ["parallel.stages=2", &format!("parallel.layers={layers}")];
        let (_, outcomes) = run(2, None, &Resume::No, |_| recipe(folder.path(), &sets), |_, _| 0);
        for outcome in outcomes {
            match outcome {
                Err(TrainError::LayersOfRanks { layers: 2, .. } | TrainError::Group { .. }) => {}
                other => panic!("{layers}: {other:?}"),
            }
        }
    }
}

/// What can be trained beside plain LoRA, with the rank that has it: the embedding is of the first layer's, the last norm
/// and the output layer of the last one's. Each rank has values and moments of its own part alone, and the result is
/// that of one process.
#[test]
fn each_rank_has_what_it_trains() {
    let variants: [&[&str]; 4] = [
        &["lora.use_dora=true"],
        &[r#"lora.target_modules=["embed_tokens", "q_proj", "lm_head"]"#],
        &[r#"lora.target_modules=["q_proj"]"#, r#"lora.modules_to_save=["norm", "embed_tokens", "lm_head"]"#],
        &["lora.layers_to_transform=[1]", "train.max_grad_norm=0.01"],
    ];
    for family in ["llama", "gemma3"] {
        let rows = goldens(family).join("rows.jsonl");
        let paths = [("model.path", goldens(family)), ("data.train", rows.clone()), ("data.eval", rows)];
        let paths = paths.map(|(key, path)| format!("{key}={path:?}"));
        for variant in variants {
            let folder = tempfile::tempdir().expect("a directory");
            let told = |world: usize, stages: usize, residency: &str| {
                let output = folder.path().join(format!("{world} {stages} {residency}"));
                let stages = format!("parallel.stages={stages}");
                let more = ["model.device=cpu", "distributed.virtual_ranks=2", residency, &stages];
                let sets: Vec<&str> =
                    paths.iter().map(String::as_str).chain(more).chain(variant.iter().copied()).collect();
                let lengths = Mutex::new(vec![0; world]);
                let look = |rank: usize, run: &mut finetune_trainer::Run| {
                    let lengths_here = [
                        run.state.parameters.len(),
                        run.state.optimizer.first_moment.len(),
                        run.state.optimizer.second_moment.len(),
                    ];
                    assert_eq!(lengths_here, [run.model.layout().len(); 3]);
                    lengths.lock().expect("no panic")[rank] = lengths_here[0];
                };
                let (told, outcomes) =
                    run_altered(world, None, &Resume::No, |_| recipe(&output, &sets), |_, _| 0, look);
                assert!(outcomes.iter().all(Result::is_ok), "{family}, {variant:?}, {stages}: {outcomes:?}");
                let result = (told.losses(), told.norms(), told.evaluations, adapter(&output), state(&output));
                (lengths.into_inner().expect("no panic"), result)
            };
            let (whole, expected) = told(1, 1, "model.residency=memory");
            for (world, stages, residency) in
                [(2, 2, "model.residency=memory"), (2, 2, "model.residency=disk"), (4, 2, "model.residency=memory")]
            {
                let (lengths, got) = told(world, stages, residency);
                let what = format!("{family}, {variant:?}, {world} ranks, {residency}");
                assert_eq!(lengths[..stages].iter().sum::<usize>(), whole[0], "{what}: {lengths:?}");
                assert!(lengths.iter().all(|length| *length <= whole[0]), "{what}: {lengths:?}");
                assert!(got == expected, "{what}: other bits");
            }
        }
    }
}

/// The best checkpoint becomes the result, and early stopping ends the run, as on one process.
#[test]
fn the_best_checkpoint_is_that_of_one_process() {
    let folder = tempfile::tempdir().expect("a directory");
    let rows = goldens("llama").join("rows.jsonl");
    let paths = [("model.path", goldens("llama")), ("data.train", rows.clone()), ("data.eval", rows)];
    let paths = paths.map(|(key, path)| format!("{key}={path:?}"));
    // A rate at which the evaluation gets worse after the first one.
    for sets in [["checkpoint.result=best", "eval.every=1"], ["eval.early_stopping_patience=1", "eval.every=1"]] {
        let told = |world: usize, stages: usize| {
            let output = folder.path().join(format!("{world} {stages} {}", sets[0]));
            let stages = format!("parallel.stages={stages}");
            let more = ["model.device=cpu", "distributed.virtual_ranks=2", "optimizer.learning_rate=0.3", &stages];
            let all: Vec<&str> = paths.iter().map(String::as_str).chain(more).chain(sets).collect();
            let (told, outcomes) = run(world, None, &Resume::No, |_| recipe(&output, &all), |_, _| 0);
            let Some(Ok(Outcome::Finished { summary, .. })) = outcomes.first() else { panic!("{outcomes:?}") };
            (summary.result_step, told.losses(), told.evaluations, adapter(&output))
        };
        let expected = told(1, 1);
        for (world, stages) in [(2, 2), (4, 2)] {
            assert!(told(world, stages) == expected, "{sets:?}, {world} ranks: another result");
        }
    }
}

/// Ranks are compared with those that hold the same layers: a bit that changes in the memory of one of them ends the run
/// before anything is saved.
#[test]
fn ranks_with_the_same_layers_that_drift_apart_stop() {
    let folder = tempfile::tempdir().expect("a directory");
    let output = folder.path().join("run");
    let flip = |rank: usize, run: &mut finetune_trainer::Run| {
        if rank == 3 {
            let value =
                run.state.parameters.iter_mut().find(|value| **value != 0.0).expect("a branch that is not zero");
            *value = f32::from_bits(value.to_bits() ^ (1 << 10));
        }
    };
    let recipe = |_| recipe(&output, &["model.device=cpu", "parallel.stages=2"]);
    let (_, outcomes) = run_altered(4, None, &Resume::No, recipe, |_, _| 0, flip);
    for outcome in outcomes {
        let error = outcome.expect_err("a bit is another").to_string();
        assert!(error.starts_with("after step 2 the ranks no longer have the same numbers: rank 3 ("), "{error}");
        assert!(error.contains("has another state than rank 1"), "{error}");
    }
    assert_eq!(std::fs::read_dir(output.join("checkpoints")).expect("a directory").count(), 0, "nothing was saved");
}
