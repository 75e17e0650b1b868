//! The layers of one model over several ranks: a run is the same whatever their number, also where one is lost.

use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::deeper::at_least;
use crate::failpoints::{OF_EVERY_PIECE, OF_EVERY_READ, OF_EVERY_STAGE, OF_EVERY_TENSOR};
use crate::folder::{CRASH_RECIPE, Folder, RunResult, golden};
use crate::launch::{THREE_ATTEMPTS, lost_in_each_attempt};
use crate::program::run;

/// Two shares of a step, whoever computes them.
const SHARES: [&str; 2] = ["--set", "distributed.virtual_ranks=2"];

/// (ranks, ranks that hold the layers together). The model has three layers.
const SPREADS: [(usize, usize); 4] = [(1, 1), (2, 2), (3, 3), (4, 2)];

/// The folder of the crash tests with a model of three layers, which have experts.
pub(crate) fn folder() -> Folder {
    folder_of("qwen3_moe")
}

/// The same with the golden model of a family.
pub(crate) fn folder_of(family: &str) -> Folder {
    folder_with(&golden(family), &golden(family).join("rows.jsonl"))
}

/// The same with a model and rows.
fn folder_with(model: &Path, rows: &Path) -> Folder {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let of_model = ["config.json", "model.safetensors"].map(|name| (model.join(name), format!("model/{name}")));
    let of_rows = ["train.jsonl", "eval.jsonl"].map(|name| (rows.to_owned(), name.to_owned()));
    for (from, to) in of_model.into_iter().chain(of_rows) {
        folder.write(&to, &std::fs::read(from).expect("a golden file"));
    }
    folder
}

fn launch(folder: &Folder, spread: (usize, usize), output: &str, more: &[&str]) -> Command {
    let (ranks, stages) = (spread.0.to_string(), format!("parallel.stages={}", spread.1));
    let words = ["--set", &stages];
    folder.launch(&["-n", &ranks], output, &[&SHARES[..], &words, more].concat())
}

/// Checkpoints hold the recipe, which says how many stages there are. So that file is not compared.
pub(crate) fn expect_same(got: &RunResult, want: &RunResult, what: &str) {
    assert_eq!(got.metrics, want.metrics, "{what}");
    let names = |outcome: &RunResult| -> Vec<String> { outcome.files.keys().cloned().collect() };
    assert_eq!(names(got), names(want), "{what}");
    let compared = got.files.iter().filter(|(name, _)| name.ends_with(".safetensors"));
    let mut count = 0;
    for (name, bytes) in compared {
        count += 1;
        assert!(*bytes == want.files[name], "{what}: another {name}");
    }
    assert!(count > 0, "{what}: nothing to compare");
}

#[test]
fn the_number_of_stages_changes_no_bit() {
    let folder = folder();
    run(&mut launch(&folder, (1, 1), "one", &[])).expect(0);
    let want = folder.result("one");
    for (ranks, stages) in &SPREADS[1..] {
        for residency in ["memory", "disk"] {
            let output = format!("{ranks} {stages} {residency}");
            let residency = format!("model.residency={residency}");
            let ended = run(&mut launch(&folder, (*ranks, *stages), &output, &["--set", &residency])).expect(0);
            ended.says(&format!("the 3 layers are spread over {stages} ranks"));
            expect_same(&folder.result(&output), &want, &output);
        }
    }
}

/// Windows, latent attention, and a file that mlx-lm has packed, in real processes.
#[test]
fn the_number_of_stages_changes_no_bit_of_other_models() {
    let packed = golden("../packed");
    for (model, rows) in [
        (golden("gemma3"), golden("gemma3")),
        (golden("deepseek_v3"), golden("deepseek_v3")),
        (packed.join("mlx4"), packed.join("bases/llama")),
    ] {
        let (_made, deep) = at_least(&model, 3);
        let folder = folder_with(&deep, &rows.join("rows.jsonl"));
        run(&mut launch(&folder, (1, 1), "one", &[])).expect(0);
        let want = folder.result("one");
        for (ranks, residency) in [(2, "memory"), (3, "disk")] {
            let output = format!("{ranks} {residency}");
            let set = format!("model.residency={residency}");
            let ended = run(&mut launch(&folder, (ranks, ranks), &output, &["--set", &set])).expect(0);
            ended.says(&format!("the 3 layers are spread over {ranks} ranks"));
            expect_same(&folder.result(&output), &want, &format!("{}, {output}", model.display()));
        }
    }
}

/// Ranks that hold a model together are killed while the launcher may start them again. It goes on by itself, to the same
/// bits.
#[test]
fn restarts_of_stages_go_on_by_themselves() {
    let folder = folder();
    run(&mut launch(&folder, (1, 1), "undisturbed", &THREE_ATTEMPTS)).expect(0);
    let words = [&SHARES[..], &["--set", "parallel.stages=3"], &THREE_ATTEMPTS].concat();
    for rank in [1, 0] {
        let output = format!("run-{rank}");
        let mut launch = folder.launch(&["-n", "3", "--max-restarts", "9"], &output, &words);
        let ended = run(launch.env("FINETUNE_FAILPOINT", lost_in_each_attempt(rank))).expect(0);
        assert_eq!(ended.stderr.matches("starting again from the newest checkpoint").count(), 2, "{}", ended.stderr);
        expect_same(&folder.result(&output), &folder.result("undisturbed"), &output);
    }
}

/// Numbers of layers as the recipe says them: printed, recorded, and without influence on bits, also where a resume
/// has others.
#[test]
fn uneven_layers_change_no_bit() {
    let folder = folder();
    run(&mut launch(&folder, (1, 1), "one", &[])).expect(0);
    let want = folder.result("one");
    for (spread, layers, words, rank_of_layer) in [
        ((2, 2), "[2, 1]", "2 and 1 of them in turn, as parallel.layers says", [0, 1, 0]),
        ((4, 2), "[1, 2]", "1 and 2 of them in turn, as parallel.layers says", [1, 0, 1]),
    ] {
        let set = format!("parallel.layers={layers}");
        let ended = run(&mut launch(&folder, spread, layers, &["--set", &set])).expect(0);
        ended.says("the 3 layers are spread over 2 ranks").says(words);
        expect_same(&folder.result(layers), &want, layers);
        let facts = std::fs::read_to_string(folder.path(layers).join("run.json")).expect("run.json");
        let facts: serde_json::Value = serde_json::from_str(&facts).expect("JSON");
        assert_eq!(facts["rank_of_layer"], serde_json::json!(rank_of_layer));
        let output = format!("stopped {layers}");
        let ended = run(launch(&folder, spread, &output, &["--set", &set]).env("FINETUNE_FAILPOINT", "hops.send:9@0"));
        assert!(matches!(ended.code, Some(0 | 3)), "{}", ended.stderr);
        run(&mut launch(&folder, (3, 3), &output, &["--resume"])).expect(0);
        expect_same(&folder.result(&output), &want, &output);
    }
}

/// Layers next to each other, and in turn there and back: printed, recorded, and without influence on bits, also where
/// a run goes on with another placement. The model has four layers.
#[test]
fn the_placement_changes_no_bit() {
    let folder = folder_of("qwen3_5");
    run(&mut launch(&folder, (1, 1), "one", &[])).expect(0);
    let want = folder.result("one");
    for (spread, placement, words, rank_of_layer) in [
        ((2, 2), "contiguous", "2 and 2 of them next to each other;", [0, 0, 1, 1]),
        ((3, 3), "contiguous", "2, 1 and 1 of them next to each other;", [0, 0, 1, 2]),
        ((4, 2), "wave", "2 and 2 of them in turn there and back;", [0, 1, 1, 0]),
    ] {
        let set = format!("parallel.placement={placement}");
        for residency in ["memory", "disk"] {
            let output = format!("{placement} {} {residency}", spread.0);
            let residency = format!("model.residency={residency}");
            let ended = run(&mut launch(&folder, spread, &output, &["--set", &set, "--set", &residency])).expect(0);
            ended.says(words);
            expect_same(&folder.result(&output), &want, &output);
            let facts = std::fs::read_to_string(folder.path(&output).join("run.json")).expect("run.json");
            let facts: serde_json::Value = serde_json::from_str(&facts).expect("JSON");
            assert_eq!(facts["rank_of_layer"], serde_json::json!(rank_of_layer), "{output}");
        }
        // Killed, and resumed in a ring.
        let output = format!("killed {placement} {}", spread.0);
        let ended =
            run(launch(&folder, spread, &output, &["--set", &set]).env("FINETUNE_FAILPOINT", "hops.receive:9@1"));
        ended.expect(3).says("was killed by signal 6");
        run(&mut launch(&folder, (2, 2), &output, &["--resume"])).expect(0);
        expect_same(&folder.result(&output), &want, &output);
    }
}

/// A hostfile whose cables lead from each rank to the next one, and not from the last to the first, has layers next to
/// each other; the recipe may say otherwise.
#[test]
fn cables_that_form_a_chain_are_seen() {
    let folder = folder_of("qwen3_5");
    run(&mut launch(&folder, (1, 1), "one", &[])).expect(0);
    let chain = r#"[{"ssh": "localhost", "rdma": [null, "rdma_en2", null]},
        {"ssh": "localhost", "rdma": ["rdma_en2", null, "rdma_en3"]}, {"ssh": "localhost", "rdma": [null, "rdma_en2", null]}]"#;
    folder.write("chain.json", chain.as_bytes());
    for (output, more, words) in [
        ("chain", &[][..], "2, 1 and 1 of them next to each other, as the cables form a chain"),
        ("disk", &["--set", "model.residency=disk"], "of them in turn there and back, as the cables form a chain"),
        ("ring", &["--set", "parallel.placement=ring"], "layer n is on the (n mod 3)th"),
    ] {
        let words_of_run = [&SHARES[..], &["--set", "parallel.stages=3"], more].concat();
        let ended = run(&mut folder.launch(&["--hostfile", "chain.json"], output, &words_of_run)).expect(0);
        ended.says(words);
        expect_same(&folder.result(output), &folder.result("one"), output);
    }
}

/// Each rank is killed while it sends or receives. The run goes on with another number of ranks and stages, to the
/// same bits.
#[test]
fn a_lost_stage_changes_no_bit() {
    let folder = folder();
    run(&mut launch(&folder, (1, 1), "undisturbed", &[])).expect(0);
    let want = folder.result("undisturbed");
    let kills = AtomicUsize::new(0);
    for (place, spread) in SPREADS.iter().enumerate().skip(1) {
        for rank in 0..spread.0 {
            for (point, hit) in OF_EVERY_STAGE.iter().flat_map(|point| [1, 9, 40].map(|hit| (point, hit))) {
                let failpoint = format!("{point}:{hit}@{rank}");
                let output = format!("{} {} {failpoint}", spread.0, spread.1);
                let ended = run(launch(&folder, *spread, &output, &[]).env("FINETUNE_FAILPOINT", &failpoint));
                match ended.code {
                    Some(3) => {
                        kills.fetch_add(1, Ordering::Relaxed);
                        ended.says(&format!("rank {rank} (")).says("was killed by signal 6").says("--resume");
                    }
                    // The rank did not pass the point so often.
                    code => assert_eq!(code, Some(0), "{output}: {}", ended.stderr),
                }
                let other = SPREADS[(place + hit) % SPREADS.len()];
                run(&mut launch(&folder, other, &output, &["--resume"])).expect(0);
                expect_same(&folder.result(&output), &want, &output);
            }
        }
    }
    let kills = kills.into_inner();
    println!("{kills} ranks killed, no bit differs");
    assert!(kills > 20, "only {kills} ranks were killed");
}

/// A run over four stages is killed, goes on as one process with its layers on the disk, over three stages and over
/// four again, and each but the last is killed too.
#[test]
fn a_run_moves_from_four_stages_to_one_to_three_and_back() {
    // Of four layers.
    let folder = folder_of("qwen3_5");
    run(&mut launch(&folder, (1, 1), "undisturbed", &[])).expect(0);
    let disk = ["--set", "model.residency=disk"];
    let parts: [(usize, &[&str], Option<&str>); 4] = [
        (4, &[], Some("hops.send:26@1")),
        (1, &disk, Some("layers.read:30@0")),
        (3, &[], Some("hops.receive:20@2")),
        (4, &disk, None),
    ];
    for (stages, more, failpoint) in parts {
        let mut command = launch(&folder, (stages, stages), "run", &[&["--resume"], more].concat());
        match failpoint {
            Some(failpoint) => {
                let ended = run(command.env("FINETUNE_FAILPOINT", failpoint));
                assert!(ended.stderr.contains("killed by signal 6"), "{failpoint}: {}", ended.stderr);
            }
            None => drop(run(&mut command).expect(0).says("(step ")),
        }
    }
    expect_same(&folder.result("run"), &folder.result("undisturbed"), "four, one, three, four");
}

/// Killed while a checkpoint is made of what all ranks have, on a rank that sends its part or on the one that writes, a
/// run goes on over another number of stages, to the same bits.
#[test]
fn a_kill_while_a_checkpoint_is_gathered_changes_no_bit() {
    let folder = folder();
    run(&mut launch(&folder, (1, 1), "undisturbed", &[])).expect(0);
    let want = folder.result("undisturbed");
    for (spread, failpoint, next) in [
        // The values of the first checkpoint, the second moments of it, and the values of the second.
        ((3, 3), format!("{OF_EVERY_PIECE}:1@1"), (1, 1)),
        ((3, 3), format!("{OF_EVERY_PIECE}:3@2"), (2, 2)),
        ((4, 2), format!("{OF_EVERY_PIECE}:4@1"), (3, 3)),
        ((2, 2), format!("{OF_EVERY_TENSOR}:20@0"), (3, 3)),
        ((3, 3), format!("{OF_EVERY_TENSOR}:90@0"), (4, 2)),
    ] {
        let output = format!("{} {} {failpoint}", spread.0, spread.1);
        let ended = run(launch(&folder, spread, &output, &[]).env("FINETUNE_FAILPOINT", &failpoint));
        assert!(ended.stderr.contains("killed by signal 6"), "{output}: {}", ended.stderr);
        run(&mut launch(&folder, next, &output, &["--resume"])).expect(0);
        expect_same(&folder.result(&output), &want, &output);
    }
}

/// Killed while a layer is read, a run goes on with its layers in memory, to the same bits.
#[test]
fn a_kill_while_layers_are_read_changes_no_bit() {
    let folder = folder();
    run(&mut launch(&folder, (1, 1), "undisturbed", &[])).expect(0);
    let want = folder.result("undisturbed");
    for (spread, read) in [((1, 1), 1), ((1, 1), 25), ((2, 2), 2), ((2, 2), 19)] {
        let failpoint = format!("{OF_EVERY_READ}:{read}@0");
        let output = format!("{} {failpoint}", spread.1);
        let mut first = launch(&folder, spread, &output, &["--set", "model.residency=disk"]);
        let ended = run(first.env("FINETUNE_FAILPOINT", &failpoint));
        assert!(ended.stderr.contains("killed by signal 6"), "{output}: {}", ended.stderr);
        run(&mut launch(&folder, (3, 3), &output, &["--resume"])).expect(0);
        expect_same(&folder.result(&output), &want, &output);
    }
}

/// With room for the whole model on each rank, `"auto"` leaves it whole, and says nothing of stages.
#[test]
fn auto_leaves_a_model_whole_that_has_room() {
    let folder = folder();
    run(&mut launch(&folder, (1, 1), "one", &[])).expect(0);
    let words = [&SHARES[..], &["--set", "parallel.stages=auto"]].concat();
    let ended = run(&mut folder.launch(&["-n", "2"], "auto", &words)).expect(0);
    assert!(!ended.stderr.contains("are spread over"), "{}", ended.stderr);
    expect_same(&folder.result("auto"), &folder.result("one"), "auto");
}

/// (keys, what the refusal says)
#[test]
fn what_cannot_be_spread_is_refused() {
    let folder = folder();
    let cases: [(&str, &[&str], &str); 6] = [
        (
            "3",
            &["parallel.stages=2"],
            "parallel.stages = 2 ranks hold a model together, and 3 ranks are no multiple of it",
        ),
        ("4", &["parallel.stages=4"], "the model has 3 layers, fewer than 4 stages"),
        (
            "2",
            &["parallel.stages=2", "parallel.layers=[2, 2]"],
            "parallel.layers = [2, 2] are 4 layers, and the model has 3",
        ),
        ("2", &["parallel.layers=[2, 1]"], "`parallel.layers` has the layers of 2 ranks"),
        ("2", &["parallel.stages=2", "train.method=full"], "spreads frozen layers over ranks"),
        ("4", &["parallel.stages=2", "distributed.virtual_ranks=3"], "cannot be shared out evenly among 4 ranks"),
    ];
    for (ranks, sets, want) in cases {
        let words: Vec<&str> = sets.iter().flat_map(|set| ["--set", set]).collect();
        let ended = run(&mut folder.launch(&["-n", ranks], "refused", &words)).expect(2);
        ended.says(want);
    }
}
