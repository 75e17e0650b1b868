//! Runs whose experts are read one by one, because two layers with all of theirs do not fit: the bits of a run with all
//! layers in memory.

mod common;

use std::sync::atomic::{AtomicU64, Ordering};

use common::{adapter, goldens, recipe, run_on, state};
use finetune_trainer::{Resume, Run, ThisHost};

/// Where ranks have their layers.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Layers {
    InMemory,
    WholeFromDisk,
    ByExperts,
}

/// On one rank and over two, with frozen experts and with trained ones: losses, norms of gradients, evaluations,
/// checkpoints and adapters.
#[test]
fn runs_by_experts_have_the_bits_of_runs_in_memory() {
    let cases: [(&str, &[&str]); 3] = [
        ("qwen3_moe", &["lora.rank=4"]),
        ("qwen3_moe", &["lora.rank=4", "lora.experts=true", "lora.dropout=0"]),
        ("deepseek_v3", &["lora.rank=4"]),
    ];
    for (family, lora) in cases {
        let folder = tempfile::tempdir().expect("a directory");
        let rows = goldens(family).join("rows.jsonl");
        let paths = [("model.path", goldens(family)), ("data.train", rows.clone()), ("data.eval", rows)];
        let paths = paths.map(|(key, path)| format!("{key}={path:?}"));
        let needed = AtomicU64::new(0);
        let told = |world: usize, memory: Option<u64>, layers: Layers| {
            let output = folder.path().join(format!("{world} {layers:?}"));
            let residency = if layers == Layers::InMemory { "model.residency=memory" } else { "model.residency=disk" };
            let stages = format!("parallel.stages={world}");
            let more = ["model.device=cpu", "distributed.virtual_ranks=2", residency, &stages];
            let sets: Vec<&str> = paths.iter().map(String::as_str).chain(lora.iter().copied()).chain(more).collect();
            let looked = |rank: usize, run: &mut Run| {
                if rank == 0 {
                    needed.store(run.estimate.total, Ordering::SeqCst);
                    assert_eq!(run.model.reads_layers(), layers != Layers::InMemory, "{family} {layers:?}");
                    let by_experts = run.model.placement().reads_experts();
                    assert_eq!(by_experts, layers == Layers::ByExperts, "{family} {layers:?}, {world} ranks");
                }
            };
            let host = ThisHost { memory, ..ThisHost::default() };
            let (told, outcomes) =
                run_on(&host, world, None, &Resume::No, |_| recipe(&output, &sets), looked, |_, _, _| {});
            assert!(outcomes.iter().all(Result::is_ok), "{family} {layers:?}, {world} ranks: {outcomes:?}");
            (told.losses(), told.norms(), told.evaluations, adapter(&output), state(&output))
        };
        let expected = told(1, None, Layers::InMemory);
        assert!(told(1, None, Layers::WholeFromDisk) == expected, "{family} {lora:?}: other bits from the disk");
        // Just what whole layers take, without the eighth to spare.
        let memory = Some(needed.load(Ordering::SeqCst));
        for world in [1, 2] {
            let by_experts = told(world, memory, Layers::ByExperts);
            assert!(by_experts == expected, "{family} {lora:?}, {world} ranks: other bits by experts");
        }
    }
}
