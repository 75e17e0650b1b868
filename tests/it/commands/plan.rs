//! `finetune plan` says what fits where, and what it proposes runs in that memory.

use serde_json::Value;

use super::json_of;
use crate::folder::{Folder, golden};
use crate::memory::{LARGER_RECIPE, larger_model, peak};

#[test]
fn a_plan_says_what_fits() {
    let folder = larger_model(LARGER_RECIPE);
    let plan = |more: &[&str]| {
        let one = ["plan", "recipe.toml", "--json", "--set", "train.micro_batch_size=1"];
        json_of(&folder, &[&one[..], more].concat())
    };
    let all = plan(&["--memory", "64G"]);
    let ways = all["ways"].as_array().expect("ways");
    let named = |name: &str| ways.iter().find(|way| way["name"] == name).expect("a way");
    let memory_of = |name: &str| named(name)["memory"].as_u64().expect("bytes");
    let [fast, again, disk] = ["in memory", "in memory, layers computed again", "layers from the disk"];
    assert!(memory_of(fast) > memory_of(again), "{all}");
    assert_eq!(all["best"], 0, "{all}");
    assert_eq!(ways[0]["name"], fast, "the fastest way comes first: {all}");
    // Each layer is read twice, the last one once.
    let layers = all["layers"].as_u64().expect("bytes");
    assert_eq!(named(disk)["read"].as_u64(), Some(2 * layers - layers / 5), "{all}");

    // A slow disk is waited for, and a slow link too.
    let slow = plan(&["--memory", "64G", "--disk", "1K", "--hosts", "2", "--link", "1K"]);
    let way = slow["ways"].as_array().and_then(|ways| ways.iter().find(|way| way["name"] == disk)).expect("a way");
    for waited in ["reading_seconds", "sending_seconds"] {
        assert!(way[waited].as_f64().is_some_and(|seconds| seconds > 1.0), "{waited}: {slow}");
    }
    assert!(way["busy"].as_f64().is_some_and(|busy| busy < 0.5), "{slow}");

    // What is proposed runs in the memory that was said.
    let best = &ways[all["best"].as_u64().expect("a number") as usize];
    let sets = best["settings"].as_array().expect("keys").iter().filter_map(|set| set.as_str());
    let sets: Vec<&str> = sets.chain(["train.micro_batch_size=1"]).flat_map(|set| ["--set", set]).collect();
    let ended = folder.run("run", &sets).expect(0);
    let estimated = best["memory"].as_f64().expect("bytes") / f64::from(1 << 20);
    // How close estimates are is tested where nothing else is.
    assert!((estimated / peak(&ended.stderr) - 1.0).abs() < 0.4, "{estimated} MiB: {}", ended.stderr);
}

/// Machines of different memory: the one with little has few layers, and each has room for what it has.
#[test]
fn machines_that_differ_hold_different_numbers_of_layers() {
    let folder = larger_model(LARGER_RECIPE);
    let plan = |memory: &str| {
        let sets = ["--set", "train.micro_batch_size=1", "--set", "train.global_batch_size=1"];
        json_of(&folder, &[&["plan", "recipe.toml", "--json", "--hosts", "2", "--memory", memory][..], &sets].concat())
    };
    let spread = |plan: &serde_json::Value| {
        let ways = plan["ways"].as_array().expect("ways").clone();
        ways.into_iter().find(|way| way["name"] == "layers over machines, in memory").expect("a way")
    };
    let alike = spread(&plan("64G"));
    assert!(alike["layers"].is_null() && alike["fits"] == true, "{alike}");
    // With less memory layers are computed again. Rank 0 would have three of them: it gets room for two and a half.
    let layer = plan("64G")["layers"].as_u64().expect("bytes") / 5;
    let needed = |memory: u64| spread(&plan(&format!("{memory},64G")))["memory"].as_u64().expect("bytes");
    let small = needed(alike["memory"].as_u64().expect("bytes") - layer) - layer / 2;
    let found = plan(&format!("{small},64G"));
    let uneven = spread(&found);
    let layers: Vec<u64> =
        uneven["layers"].as_array().expect("layers").iter().filter_map(serde_json::Value::as_u64).collect();
    assert!(layers.len() == 2 && layers[0] < layers[1] && layers.iter().sum::<u64>() == 5, "{found}");
    assert_eq!(uneven["fits"], true, "{found}");
    assert!(uneven["memory"].as_u64().expect("bytes") > small, "the larger one holds more: {found}");
    let text = crate::program::run(
        crate::program::finetune(["plan", "recipe.toml", "--hosts", "2", "--memory", &format!("{small},64G")])
            .args(["--set", "train.micro_batch_size=1", "--set", "train.global_batch_size=1"])
            .current_dir(folder.path("")),
    );
    assert!(text.stdout.contains(&format!("in memory: {}, {}", layers[0], layers[1])), "{}", text.stdout);
}

/// Machines whose cables form a chain have layers next to each other, from their disks in turn there and back, and it is
/// said how much longer they are idle than in a ring.
#[test]
fn a_chain_of_machines_is_idle_for_longer() {
    let folder = larger_model(LARGER_RECIPE);
    let cabled = |last: &str, first: &str| {
        format!(
            r#"[{{"ssh": "localhost", "rdma": [null, "rdma_en2", {first}]}},
                {{"ssh": "localhost", "rdma": ["rdma_en2", null, "rdma_en3"]}},
                {{"ssh": "localhost", "rdma": [{last}, "rdma_en2", null]}}]"#
        )
    };
    folder.write("chain.json", cabled("null", "null").as_bytes());
    folder.write("ring.json", cabled("\"rdma_en3\"", "\"rdma_en3\"").as_bytes());
    let words = |hostfile: &'static str| {
        ["plan", "recipe.toml", "--hostfile", hostfile, "--memory", "64G", "--set", "train.micro_batch_size=1"]
    };
    let plan = |hostfile| json_of(&folder, &[&words(hostfile)[..], &["--json"]].concat());
    let spread = |plan: &serde_json::Value, name: &str| {
        let ways = plan["ways"].as_array().expect("ways").clone();
        ways.into_iter().find(|way| way["name"] == name).expect("a way")
    };
    let (chain, ring) = (plan("chain.json"), plan("ring.json"));
    assert_eq!(chain["machines"]["cables"][0], serde_json::json!([null, "rdma_en2", null]), "{chain}");
    for (name, placement) in
        [("layers over machines, in memory", "contiguous"), ("layers over machines, from disks", "wave")]
    {
        let (way, in_ring) = (spread(&chain, name), spread(&ring, name));
        assert_eq!(way["placement"], placement, "{way}");
        assert!(in_ring["placement"].is_null() && in_ring["busy_in_ring"].is_null(), "{in_ring}");
        let [busy, ring] = ["busy", "busy_in_ring"].map(|key| way[key].as_f64().expect("a part"));
        assert!(busy < ring && ring <= 1.0, "{way}");
    }
    // Of three machines the one in the middle sends most: a layer's output forward, and a gradient back.
    let sent = |plan: &serde_json::Value| spread(plan, "layers over machines, in memory")["sent"].as_u64();
    assert!(sent(&chain) < sent(&ring), "{chain} {ring}");
    let ended = folder.finetune(&words("chain.json")).expect(0);
    for text in
        ["layers over 3 machines, in memory, next to each other", "busy        layers over 3 machines, in memory"]
    {
        assert!(ended.stdout.contains(text), "{text}: {}", ended.stdout);
    }
    // Without cables a ring is assumed, and said, unless the placement is said.
    let assumed = |more: &[&str]| {
        let sets = [&["--hosts", "3", "--memory", "64G"], more].concat();
        plan_of(&folder, &sets)["notices"].to_string().contains("no cables are named")
    };
    assert!(assumed(&[]) && !assumed(&["--set", "parallel.placement=contiguous"]));
    assert!(!chain["notices"].to_string().contains("no cables are named"), "{chain}");
}

/// The recipe's numbers of layers are those of as many machines. Any other number of machines has others, and its
/// settings say them.
#[test]
fn a_plan_has_the_recipes_numbers_of_layers() {
    let folder = larger_model(LARGER_RECIPE);
    let sets = ["--hosts", "4", "--memory", "64G", "--link", "1M", "--set", "parallel.stages=2"];
    let plan = plan_of(&folder, &[&sets[..], &["--set", "parallel.layers=[4, 1]"]].concat());
    let of = |way: &Value, key: &str| -> Vec<u64> {
        way["ranks"].as_array().expect("ranks").iter().map(|rank| rank[key].as_u64().expect("a number")).collect()
    };
    let ways = || plan["ways"].as_array().expect("ways").iter();
    let spread = |stages: u64| ways().find(|way| way["stages"] == stages && way["read"] == 0).expect("a way");
    let two = spread(2);
    assert_eq!(two["layers"], serde_json::json!([4, 1]), "{two}");
    assert_eq!(of(two, "layers"), [4, 1, 4, 1]);
    let trained = plan["trained_parameters"].as_u64().expect("a number");
    assert_eq!(of(two, "trained"), [4 * trained / 5, trained / 5, 4 * trained / 5, trained / 5]);
    // Of two models each rank sends half of its values, and half of the sums: that with most layers most.
    let bytes = two["sending_seconds"].as_f64().expect("seconds") * 1e6 / 8.0;
    assert!((bytes / (4 * 4 * trained / 5) as f64 - 1.0).abs() < 1e-6, "{bytes}: {two}");
    let settings = |way: &Value| way["settings"].to_string();
    assert!(!settings(two).contains("parallel.layers"), "{two}");
    assert!(settings(spread(4)).contains("parallel.layers=[2, 1, 1, 1]"), "{plan}");

    // What is proposed for one machine with the whole model is a recipe, and takes what it does without stages.
    let whole = way(&plan, "in memory");
    let without = plan_of(&folder, &["--hosts", "4", "--memory", "64G", "--link", "1M"]);
    assert_eq!(whole["memory"], way(&without, "in memory")["memory"]);
    let words = ["parallel.stages=2", "parallel.layers=[4, 1]"];
    let set = whole["settings"].as_array().expect("settings").iter().filter_map(Value::as_str);
    let set: Vec<&str> = words.into_iter().chain(set).flat_map(|set| ["--set", set]).collect();
    assert!(set.contains(&"parallel.stages=1") && set.contains(&"parallel.layers=[5]"), "{whole}");
    folder.finetune(&[&["validate", "recipe.toml"][..], &set].concat()).expect(0);
    // Other numbers than the model has are refused, as by `run`.
    let wrong = [&["plan", "recipe.toml"][..], &sets, &["--set", "parallel.layers=[4, 2]"]].concat();
    let ended = folder.finetune(&wrong).expect(2);
    assert!(ended.stderr.contains("are 6 layers, and the model has 5"), "{}", ended.stderr);
}

/// Where two layers with all of their experts do not fit, experts are read one by one: that takes less memory, and
/// reads more.
#[test]
fn experts_one_by_one_are_planned() {
    let base = golden("qwen3_moe");
    let rows = base.join("rows.jsonl");
    let folder = Folder::empty();
    let recipe = format!(
        "output_dir = \"run\"\n[model]\npath = {base:?}\ndevice = \"cpu\"\n[data]\ntrain = {rows:?}\n\
         [train]\nglobal_batch_size = 4\nmicro_batch_size = 1\n"
    );
    folder.write("recipe.toml", recipe.as_bytes());
    let from_disk = |memory: &str| {
        let plan = json_of(&folder, &["plan", "recipe.toml", "--json", "--memory", memory]);
        let ways = plan["ways"].as_array().expect("ways").clone();
        let is_from_disk =
            |way: &Value| way["settings"].as_array().is_some_and(|keys| keys.contains(&"model.residency=disk".into()));
        ways.into_iter().find(is_from_disk).expect("a way")
    };
    let bytes = |way: &Value, key: &str| way[key].as_u64().expect("bytes");
    let whole = from_disk("64G");
    assert_eq!(whole["name"], "layers from the disk", "{whole}");
    // What that takes is not enough for it, as an eighth has to be spare.
    let by_experts = from_disk(&bytes(&whole, "memory").to_string());
    assert_eq!(by_experts["name"], "layers from the disk, experts one by one", "{by_experts}");
    assert_eq!(by_experts["fits"], true, "{by_experts}");
    assert!(bytes(&by_experts, "memory") < bytes(&whole, "memory"), "{whole} {by_experts}");
    assert!(bytes(&by_experts, "read") > bytes(&whole, "read"), "{whole} {by_experts}");
}

/// Nothing fits: exit code 5, and what would take less.
#[test]
fn nothing_fits() {
    let folder = larger_model(LARGER_RECIPE);
    let ended = crate::program::run(
        crate::program::finetune(["plan", "recipe.toml", "--memory", "1M"]).current_dir(folder.path("")),
    );
    let ended = ended.expect(5);
    assert!(ended.stdout.contains("nothing fits"), "{}", ended.stdout);
    assert!(ended.stdout.contains("hint        even with "), "no settings are enough: {}", ended.stdout);
    for wrong in [["--memory", "much"], ["--memory", "1G,2G"], ["--hosts", "0"]] {
        let arguments = [&["plan", "recipe.toml"][..], &wrong].concat();
        crate::program::run(crate::program::finetune(arguments).current_dir(folder.path(""))).expect(2);
    }
    for wrong in [["--memory", "64"], ["--disk", "3"], ["--link", "10"]] {
        let ended = folder.finetune(&[&["plan", "recipe.toml"][..], &wrong].concat()).expect(2);
        assert!(ended.stderr.contains("the unit is missing"), "{}", ended.stderr);
    }
}

/// With a little less than the smallest way takes, hints say what fits there, and it does. Ways that were looked at
/// already are no hints.
#[test]
fn what_is_proposed_where_nothing_fits_does_fit() {
    let folder = larger_model(LARGER_RECIPE);
    let plan = json_of(&folder, &["plan", "recipe.toml", "--json", "--memory", "64G"]);
    let ways = plan["ways"].as_array().expect("ways").iter();
    let smallest = ways.filter_map(|way| way["memory"].as_u64()).min().expect("a way");
    let memory = (smallest - 4096).to_string();
    let refused = folder.finetune(&["plan", "recipe.toml", "--json", "--memory", &memory]).expect(5).json();
    let hints: Vec<String> = serde_json::from_value(refused["hints"].clone()).expect("hints");
    assert!(hints.iter().all(|hint| !hint.contains("model.residency") && !hint.contains("checkpointing")), "{hints:?}");
    for (hint, fits) in [
        ("train.micro_batch_size = 4, ", ["--set", "train.micro_batch_size=4"]),
        ("model.quantization = \"nf4\", ", ["--set", "model.quantization=nf4"]),
        ("--hosts 2, each with ", ["--hosts", "2"]),
    ] {
        assert!(hints.iter().any(|said| said.starts_with(hint)), "{hint}: {hints:?}");
        folder.finetune(&[&["plan", "recipe.toml", "--memory", &memory][..], &fits].concat()).expect(0);
    }
}

/// What is assumed is marked, and what the recipe says of ranks and no way has is named.
#[test]
fn a_plan_says_what_it_assumes_and_passes_over() {
    let folder = larger_model(LARGER_RECIPE);
    let assumed =
        |more: &[&str]| plan_of(&folder, &[&["--memory", "64G"], more].concat())["machines"]["assumed"].clone();
    assert_eq!(assumed(&[]), serde_json::json!(["disk", "link"]));
    assert_eq!(assumed(&["--disk", "3G"]), serde_json::json!(["link"]));
    assert!(assumed(&["--disk", "3G", "--link", "10G"]).is_null());
    let sets = ["--hosts", "4", "--memory", "64G", "--disk", "3G", "--set", "parallel.stages=3"];
    let text = folder.finetune(&[&["plan", "recipe.toml"][..], &sets].concat()).expect(0).stdout;
    assert!(text.contains("a disk of 2.8 GiB/s, a link of 1.2 GiB/s (assumed, --link says it)"), "{text}");
    assert!(text.contains("parallel.stages = 3 is in no way below"), "{text}");
    // Four shares of a step are not for three models, but for one over three machines.
    let shares = ["--hosts", "3", "--set", "distributed.virtual_ranks=4"];
    let plan = plan_of(&folder, &[&["--memory", "64G"][..], &shares].concat());
    assert!(plan["ways"].as_array().expect("ways").iter().all(|way| way["stages"] == 3), "{plan}");
    assert!(plan["notices"].to_string().contains("distributed.virtual_ranks = 4 cannot be shared out"), "{plan}");
}

fn plan_of(folder: &Folder, more: &[&str]) -> Value {
    json_of(folder, &[&["plan", "recipe.toml", "--json", "--set", "train.micro_batch_size=1"][..], more].concat())
}

fn way<'a>(plan: &'a Value, name: &str) -> &'a Value {
    let ways = plan["ways"].as_array().expect("ways");
    ways.iter().find(|way| way["name"] == name).unwrap_or_else(|| panic!("{name}: {plan}"))
}

/// Memory and bytes on the disk of each rank, alike or not.
#[test]
fn a_plan_says_what_each_rank_takes() {
    let folder = larger_model(LARGER_RECIPE);
    let base = std::fs::metadata(folder.path("model/model.safetensors")).expect("a file").len();
    let plan = plan_of(&folder, &["--hosts", "3", "--memory", "64G,64G,32G"]);
    let validated = json_of(&folder, &["validate", "recipe.toml", "--json", "--set", "train.micro_batch_size=1"]);
    assert_eq!(plan["disk"], validated["disk"]["total"], "rank 0 has the run directory of `validate`");
    for way in plan["ways"].as_array().expect("ways") {
        let ranks = way["ranks"].as_array().expect("ranks");
        assert_eq!(ranks.len(), 3, "{way}");
        let of = |key: &str| -> Vec<u64> { ranks.iter().map(|rank| rank[key].as_u64().expect("a number")).collect() };
        assert_eq!(of("rank"), [0, 1, 2]);
        assert_eq!(of("available"), [64 << 30, 64 << 30, 32 << 30]);
        assert_eq!(of("memory").into_iter().max(), way["memory"].as_u64(), "{way}");
        assert_eq!(of("base"), [base; 3], "a directory is whole on each host: {way}");
        let (run, layers, stages) = (of("run"), of("layers"), way["stages"].as_u64().expect("a number"));
        // A host besides rank 0's keeps copies of the checkpoints.
        assert_eq!(Some(run[0]), plan["disk"].as_u64());
        assert!(run[0] > run[1] && run[1] > 0 && run[2] == 0, "{run:?}");
        assert_eq!(of("disk"), [base + run[0], base + run[1], base]);
        assert_eq!(layers.iter().sum::<u64>(), 15 / stages, "five layers of each model: {way}");
    }
    let alone = way(&plan, "in memory");
    assert_eq!(alone["ranks"][0]["memory"], validated["estimate"]["total"], "the number of `validate`");
    let text = folder.finetune(&["plan", "recipe.toml", "--hosts", "3", "--memory", "64G"]).expect(0).stdout;
    for line in ["rank 0 ", "rank 1 ", "rank 2 ", "exchange    gradients in f32, every step"] {
        assert!(text.contains(line), "{line}:\n{text}");
    }
}

/// What ranks send is as the recipe says, and a slow link is answered with what sends less.
#[test]
fn a_plan_counts_rounded_gradients_and_steps_made_alone() {
    let folder = larger_model(LARGER_RECIPE);
    let two = |link: &str, sets: &[&str]| {
        let sets = sets.iter().flat_map(|set| ["--set", set]);
        let arguments: Vec<&str> =
            ["--hosts", "2", "--memory", "64G", "--link", link].into_iter().chain(sets).collect();
        plan_of(&folder, &arguments)
    };
    let hints = |plan: &Value| -> Vec<String> { serde_json::from_value(plan["hints"].clone()).expect("hints") };
    let exact = two("1M", &[]);
    let trained = exact["trained_parameters"].as_u64().expect("a number");
    let numbers = |plan: &Value| {
        let way = way(plan, "in memory");
        (way["sent"].as_u64().expect("bytes"), way["sending_seconds"].as_f64().expect("seconds"))
    };
    // Of two ranks each sends half of the values, and half of the sums.
    let (bytes, seconds) = numbers(&exact);
    assert_eq!(bytes, 4 * trained);
    assert!((seconds / (bytes as f64 * 8.0 / 1e6) - 1.0).abs() < 1e-6, "{seconds}");
    let first = hints(&exact);
    assert!(first[0].starts_with("distributed.wire = \"bf16\": ") && first.len() == 2, "{first:?}");
    assert!(first[1].starts_with("distributed.sync_every = 20: "), "{first:?}");

    let rounded = two("1M", &["distributed.wire=bf16"]);
    assert_eq!((rounded["wire"].as_str(), rounded["sync_every"].as_u64()), (Some("bf16"), Some(1)));
    assert_eq!(numbers(&rounded), (bytes / 2, seconds / 2.0));
    assert!(hints(&rounded).iter().all(|hint| hint.starts_with("distributed.sync_every")), "{rounded}");

    // Parameters and two moments every ten steps, which nothing rounds.
    let alone = two("1M", &["distributed.wire=bf16", "distributed.sync_every=10"]);
    assert_eq!((alone["wire"].as_str(), alone["sync_every"].as_u64()), (Some("f32"), Some(10)));
    assert_eq!(numbers(&alone).0, 3 * bytes / 10);
    let spread = way(&alone, "layers over machines, in memory")["settings"].to_string();
    assert!(spread.contains("distributed.sync_every=1"), "ranks that share a model make each step together: {spread}");
    let grown = way(&alone, "in memory")["memory"].as_u64().expect("bytes");
    assert!(grown > way(&exact, "in memory")["memory"].as_u64().expect("bytes"), "each rank has a state of its own");

    assert!(hints(&two("1000G", &[])).is_empty(), "a fast link needs no change");
    let one = plan_of(&folder, &["--memory", "64G", "--link", "1K"]);
    assert!(hints(&one).is_empty() && numbers(&one).0 == 0, "one machine sends nothing: {one}");
    let text = folder
        .finetune(&["plan", "recipe.toml", "--hosts", "2", "--memory", "64G", "--set", "distributed.sync_every=10"])
        .expect(0);
    assert!(text.stdout.contains("exchange    averages in f32, every 10 steps"), "{}", text.stdout);
}

/// A config alone says sizes, to `plan` and to `validate`. Training needs the weights.
#[test]
fn a_config_alone_is_planned_for() {
    let folder = larger_model(LARGER_RECIPE);
    let whole = plan_of(&folder, &["--memory", "64G"]);
    let validated = json_of(&folder, &["validate", "recipe.toml", "--json"]);
    std::fs::remove_file(folder.path("model/model.safetensors")).expect("removed");
    for path in ["model", "model/config.json"] {
        let path = format!("model.path={path}");
        let bare = plan_of(&folder, &["--memory", "64G", "--set", &path]);
        for key in ["parameters", "trained_parameters", "layers", "steps", "disk"] {
            assert_eq!(bare[key], whole[key], "{path}: {key}");
        }
        for name in ["in memory", "in memory, layers computed again", "layers from the disk"] {
            let [bare, whole] = [&bare, &whole].map(|plan| way(plan, name));
            for key in ["memory", "fits", "read"] {
                assert_eq!(bare[key], whole[key], "{path}: {name}: {key}");
            }
        }
        assert!(bare["notices"][0].as_str().is_some_and(|notice| notice.contains("weights are not here")), "{bare}");
        let ended = folder.finetune(&["validate", "recipe.toml", "--json", "--set", &path]).expect(2).json();
        assert_eq!(ended["estimate"]["total"], validated["estimate"]["total"], "{path}");
        assert_eq!(ended["disk"]["total"], validated["disk"]["total"], "{path}");
        assert!(!ended["problems"].as_array().expect("problems").is_empty(), "{ended}");
        folder.finetune(&["run", "recipe.toml", "--set", &path]).expect(2);
    }

    // Without a tokenizer each row counts as long as it may be.
    folder.write("train.jsonl", b"{\"text\": \"one\"}\n{\"text\": \"two\"}\n{\"text\": \"three\"}\n");
    let assumed = plan_of(&folder, &["--memory", "64G", "--set", "data.max_seq_len=400"]);
    assert!(assumed["notices"][1].as_str().is_some_and(|notice| notice.contains("without a tokenizer")), "{assumed}");
    let memory = |plan: &Value| way(plan, "in memory")["memory"].as_f64().expect("bytes");
    assert!((memory(&assumed) / memory(&whole) - 1.0).abs() < 0.05, "rows of 400 tokens as before: {assumed}");
    folder.finetune(&["run", "recipe.toml"]).expect(2);
}
