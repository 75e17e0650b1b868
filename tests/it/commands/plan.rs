//! `finetune plan` says what fits where, and what it proposes runs in that memory.

use super::json_of;
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
}

/// Nothing fits: exit code 5, and what would take less.
#[test]
fn nothing_fits() {
    let folder = larger_model(LARGER_RECIPE);
    let ended = crate::program::run(
        crate::program::finetune(["plan", "recipe.toml", "--memory", "1M"]).current_dir(folder.path("")),
    );
    let ended = ended.expect(5);
    assert!(ended.stdout.contains("nothing fits") && ended.stdout.contains("hint        "), "{}", ended.stdout);
    for wrong in [["--memory", "much"], ["--memory", "1G,2G"], ["--hosts", "0"]] {
        let arguments = [&["plan", "recipe.toml"][..], &wrong].concat();
        crate::program::run(crate::program::finetune(arguments).current_dir(folder.path(""))).expect(2);
    }
}
