//! The Hugging Face hub, from the command line: a hub on loopback, and what a user sees.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use finetune_store::{TensorFile, encode_tensors};
use serde_json::{Map, Value};

use crate::folder::{CRASH_RECIPE, Folder, golden, metrics};
use crate::program::{Ended, finetune, free_port, run, start};
use loopback::{Access, Fault, Loopback, Store, What};

#[path = "../../crates/hub/tests/loopback/mod.rs"]
mod loopback;

/// A hub with a tiny model and rows for it, and a folder with a recipe that trains on them.
fn world() -> (Loopback, Folder) {
    let mut store = Store { token: Some("hf_tester".to_owned()), ..Store::default() };
    let read = |name: &str| std::fs::read(golden(name)).expect("a golden file");
    let (config, weights) = (read("qwen3/config.json"), read("qwen3/model.safetensors"));
    for name in ["acme/tiny", "acme/gated"] {
        store.add(
            "models",
            name,
            &[("config.json", &config), ("model.safetensors", &weights), ("README.md", b"# tiny")],
        );
    }
    store.repository("models", "acme/gated").access = Access::Gated;
    store.add(
        "datasets",
        "acme/rows",
        &[("train.jsonl", &read("qwen3/rows.jsonl")), ("test.jsonl", &read("llama/rows.jsonl"))],
    );
    (Loopback::start(store), Folder::with_recipe(CRASH_RECIPE))
}

/// `finetune ARGUMENTS` with this hub, and a cache in the folder.
fn with_hub(server: &Loopback, folder: &Folder, arguments: &[&str]) -> Command {
    let mut command = finetune(arguments);
    for other in
        ["HF_HOME", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME", "HF_TOKEN", "HF_TOKEN_PATH", "HTTP_PROXY", "http_proxy"]
    {
        command.env_remove(other);
    }
    command.env("HF_ENDPOINT", server.endpoint()).env("HF_HUB_CACHE", folder.path("cache"));
    command.env("HOME", folder.path("")).env("HF_HUB_OFFLINE", "0").current_dir(folder.path(""));
    command
}

fn done(server: &Loopback, folder: &Folder, arguments: &[&str]) -> Ended {
    run(&mut with_hub(server, folder, arguments)).expect(0)
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).expect("a file")).expect("JSON")
}

#[test]
fn download_prints_where_it_is() {
    let (server, folder) = world();
    let ended = done(&server, &folder, &["download", "acme/tiny"]);
    let path = ended.stdout.trim_end().to_owned();
    assert!(Path::new(&path).join("model.safetensors").is_file(), "{path}");
    let ended = ended.says("acme/tiny: 3 files, ").says("acme/tiny: 3 files done in ");
    ended.says("acme/tiny: commit ");
    let again = done(&server, &folder, &["download", "acme/tiny", "--json"]).says("all of it is here already");
    assert_eq!(again.json()["path"], path.as_str());
    assert_eq!(done(&server, &folder, &["download", "acme/tiny", "--quiet"]).stderr, "");
    // A dataset is found by the same command.
    let rows = done(&server, &folder, &["download", "acme/rows", "--include", "test*", "--json"]).json();
    assert_eq!(rows["files"], serde_json::json!(["test.jsonl"]));
    server.state().store.add("models", "acme/tiny", &[("config.json", b"{}"), ("model.safetensors", b"new")]);
    done(&server, &folder, &["download", "acme/tiny"]).says("main of acme/tiny has moved from ");
}

/// A run on a hub id gives the bits of a run on the same directory, and says which commit it was.
#[test]
fn a_run_fetches_its_model_and_remembers_the_commit() {
    let (server, folder) = world();
    folder.run("plain", &[]).expect(0);
    let arguments = ["run", "recipe.toml", "--output-dir", "run", "--set", "model.path=acme/tiny"];
    let first = done(&server, &folder, &[&arguments[..], &["--set", "train.max_steps=4"]].concat());
    first.says("acme/tiny: 3 files, ").says("tiny: LoRA of rank 4");
    let commit = server.state().store.repository("models", "acme/tiny").refs["main"].clone();
    let recipe = || std::fs::read_to_string(folder.path("run/recipe.toml")).expect("a recipe");
    assert!(recipe().contains(&format!("path = \"acme/tiny@{commit}\"")), "{}", recipe());
    // The branch moves, and the run goes on with the bytes that it began with.
    server.state().store.add("models", "acme/tiny", &[("config.json", b"{}"), ("model.safetensors", b"other")]);
    done(&server, &folder, &["download", "acme/tiny"]);
    done(&server, &folder, &[&arguments[..], &["--resume"]].concat()).says("has moved to commit ");
    assert!(recipe().contains(&commit), "{}", recipe());
    let losses = |name: &str| -> Vec<(Option<Value>, Option<Value>)> {
        metrics(&folder.path(name))
            .iter()
            .map(|row| (row.get("loss").cloned(), row.get("eval_loss").cloned()))
            .collect()
    };
    assert_eq!(losses("run"), losses("plain"));
    let config = json(&folder.path("run/adapter/adapter_config.json"));
    assert_eq!(
        (&config["base_model_name_or_path"], &config["revision"]),
        (&"acme/tiny".into(), &commit.as_str().into())
    );
    // Its own recipe means the same bytes, and so does its adapter, without a network.
    let mut again = with_hub(&server, &folder, &["run", "run/recipe.toml", "--output-dir", "again", "--quiet"]);
    run(again.env("HF_HUB_OFFLINE", "1")).expect(0);
    assert_eq!(losses("again"), losses("plain"));
    let mut eval = with_hub(&server, &folder, &["eval", "run", "--data", "eval.jsonl", "--json"]);
    run(eval.env("HF_HUB_OFFLINE", "1")).expect(0);
}

/// Two ranks of a host fetch once.
#[test]
fn of_two_ranks_one_fetches() {
    let (server, folder) = world();
    server.plan(Fault::get("/lfs/", What::Slow(20_000, std::time::Duration::from_millis(50))));
    let recipe = ["recipe.toml", "--output-dir", "run", "--set", "model.path=acme/tiny", "--set", "train.max_steps=2"];
    done(&server, &folder, &[&["launch", "-n", "2"][..], &recipe].concat());
    assert_eq!(server.count("GET", "/lfs/"), 1);
    // If the first cannot have it, the launch ends as it does, at once.
    server.plan(Fault::get("/api/models/acme/tiny", What::Status(403, vec![], "not you")));
    std::fs::remove_dir_all(folder.path("cache")).expect("a cache");
    let refused = run(&mut with_hub(&server, &folder, &[&["launch", "-n", "2"][..], &recipe].concat())).expect(2);
    refused.says("the hub forbids this for acme/tiny (not you)");
}

/// The file of a tensor: one for the embedding, one for each of three layers, one for the rest.
fn file_of(tensor: &str) -> String {
    let layer = tensor.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
    let number = match layer {
        Some(layer) => layer + 2,
        None if tensor.contains("embed_tokens") => 1,
        None => 5,
    };
    format!("model-{number:05}-of-00005.safetensors")
}

/// A hub with a model of three layers in five files, and a folder with rows for it.
fn world_of_shards() -> (Loopback, Folder) {
    let whole = TensorFile::open(&golden("qwen3_moe/model.safetensors")).expect("a golden model");
    let (mut map, mut shards) = (Map::new(), BTreeMap::<String, Vec<_>>::new());
    for name in whole.names() {
        let view = whole.get(name).expect("a tensor");
        let tensor = (name.to_owned(), view.dtype, view.shape.to_vec(), Cow::from(view.bytes().expect("its bytes")));
        map.insert(name.to_owned(), file_of(name).into());
        shards.entry(file_of(name)).or_default().push(tensor);
    }
    let read = |name: &str| std::fs::read(golden("qwen3_moe").join(name)).expect("a golden file");
    let index = serde_json::json!({ "weight_map": map }).to_string().into_bytes();
    let mut files =
        vec![("config.json".to_owned(), read("config.json")), ("model.safetensors.index.json".to_owned(), index)];
    for (name, tensors) in &shards {
        files.push((name.clone(), encode_tensors(tensors, &BTreeMap::new()).expect("a shard")));
    }
    let files: Vec<(&str, &[u8])> = files.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect();
    let mut store = Store::default();
    store.add("models", "acme/split", &files);
    let folder = Folder::with_recipe(&CRASH_RECIPE.replace("path = \"model\"", "path = \"acme/split\""));
    ["train.jsonl", "eval.jsonl"].iter().for_each(|name| folder.write(name, &read("rows.jsonl")));
    (Loopback::start(store), folder)
}

/// `finetune ARGUMENTS` with a cache of its own.
fn on_host(server: &Loopback, folder: &Folder, cache: &str, arguments: &[&str]) -> Command {
    let mut command = with_hub(server, folder, arguments);
    command.env("HF_HUB_CACHE", folder.path(cache));
    command
}

/// A run of two ranks, each with a cache of its own as on two hosts. How they ended.
fn on_two_hosts(server: &Loopback, folder: &Folder, offline: bool, words: &[&str]) -> [Ended; 2] {
    let port = free_port().to_string();
    let started = [0, 1].map(|rank| {
        let words = [&["run", "recipe.toml", "--set", "parallel.stages=2"][..], words].concat();
        let mut command = on_host(server, folder, &format!("cache-{rank}"), &words);
        command
            .env("RANK", rank.to_string())
            .env("WORLD_SIZE", "2")
            .env("LOCAL_RANK", "0")
            .env("LOCAL_WORLD_SIZE", "1");
        command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", &port).env_remove("FINETUNE_TOKEN_FILE");
        start(command.env("HF_HUB_OFFLINE", if offline { "1" } else { "0" }))
    });
    started.map(|running| running.wait())
}

/// The numbers of the files of weights in a cache.
fn weights_in(folder: &Folder, cache: &str) -> Vec<usize> {
    let snapshots = folder.path(cache).join("models--acme--split/snapshots");
    let list = |path: &Path| std::fs::read_dir(path).expect("a folder").map(|entry| entry.expect("an entry").path());
    let snapshot = list(&snapshots).next().expect("a snapshot");
    let number = |path: &Path| path.file_name()?.to_str()?.strip_prefix("model-")?.get(..5)?.parse().ok();
    let mut numbers: Vec<usize> = list(&snapshot).filter_map(|path| number(&path)).collect();
    numbers.sort_unstable();
    numbers
}

/// Bytes of these files of weights in a cache.
fn bytes_of(folder: &Folder, cache: &str, numbers: &[usize]) -> u64 {
    let snapshots = folder.path(cache).join("models--acme--split/snapshots");
    let mut entries = std::fs::read_dir(snapshots).expect("a folder");
    let snapshot = entries.next().expect("a snapshot").expect("an entry").path();
    let file = |number: &usize| snapshot.join(format!("model-{number:05}-of-00005.safetensors"));
    numbers.iter().map(|number| std::fs::metadata(file(number)).expect("a file").len()).sum()
}

/// Losses and the adapter of a run.
fn outcome(folder: &Folder, output: &str) -> (Vec<[Option<Value>; 2]>, Vec<u8>) {
    let losses = |row: &Value| ["loss", "eval_loss"].map(|key| row.get(key).cloned());
    let adapter = std::fs::read(folder.path(output).join("adapter/adapter_model.safetensors")).expect("an adapter");
    (metrics(&folder.path(output)).iter().map(losses).collect(), adapter)
}

/// Two hosts that hold the layers of a model together: each fetches the files of its layers, and the bits are those
/// of one process. One process goes on with the run, and fetches the rest.
#[test]
fn each_rank_fetches_the_files_of_its_layers() {
    let (server, folder) = world_of_shards();
    run(&mut on_host(&server, &folder, "cache-one", &["run", "recipe.toml", "--output-dir", "one"])).expect(0);
    assert_eq!(weights_in(&folder, "cache-one"), [1, 2, 3, 4, 5]);

    // A plan takes the headers, and says how many bytes each rank will fetch.
    let plan = ["plan", "recipe.toml", "--memory", "64G", "--hosts", "2", "--json"];
    let plan = run(&mut on_host(&server, &folder, "cache-plan", &plan)).expect(0).json();
    assert!(weights_in(&folder, "cache-plan").is_empty());
    for way in plan["ways"].as_array().expect("ways") {
        let base = [0, 1].map(|rank| way["ranks"][rank]["base"].as_u64().expect("bytes"));
        let files: [&[usize]; 2] = if way["stages"] == 2 { [&[1, 2, 4, 5], &[3, 5]] } else { [&[1, 2, 3, 4, 5]; 2] };
        assert_eq!(base, files.map(|numbers| bytes_of(&folder, "cache-one", numbers)), "{way}");
    }

    // Layers 0 and 2 are on rank 0, with embedding and output layer. The last norm is everywhere.
    let layers = ["--set", "parallel.layers=[2, 1]"];
    let words = [&["--output-dir", "two", "--set", "train.max_steps=4"], &layers[..]].concat();
    let [first, second] = on_two_hosts(&server, &folder, false, &words);
    first.expect(0).says("acme/split: the headers of 5 files of weights").says("the 3 layers are spread over 2 ranks");
    second.expect(0);
    assert_eq!(weights_in(&folder, "cache-0"), [1, 2, 4, 5]);
    assert_eq!(weights_in(&folder, "cache-1"), [3, 5]);

    // Without a network: the same again, and what is missing for anything else is named.
    let words = [&["--output-dir", "again"], &layers[..]].concat();
    for ended in on_two_hosts(&server, &folder, true, &words) {
        ended.expect(0);
    }
    let says = "model-00003-of-00005.safetensors is not here; it holds layer 1";
    let words = ["--output-dir", "other", "--set", "parallel.layers=[1, 2]"];
    let [first, second] = on_two_hosts(&server, &folder, true, &words);
    first.expect(2).says(says).says("finetune download acme/split@");
    second.expect(2);
    let mut eval = on_host(&server, &folder, "cache-0", &["eval", "two", "--data", "eval.jsonl"]);
    run(eval.env("HF_HUB_OFFLINE", "1")).expect(2).says(says).says("finetune download acme/split@");

    server.forget();
    run(&mut on_host(&server, &folder, "cache-1", &["run", "recipe.toml", "--output-dir", "two", "--resume"]))
        .expect(0);
    assert_eq!((weights_in(&folder, "cache-1"), server.count("GET", "/lfs/")), (vec![1, 2, 3, 4, 5], 3));
    let one = outcome(&folder, "one");
    assert!(outcome(&folder, "two") == one && outcome(&folder, "again") == one, "another outcome");
    // The adapter knows its base, and a merged model needs all of it.
    let mut export =
        on_host(&server, &folder, "cache-0", &["export", "two", "--format", "merged", "--output", "merged"]);
    run(&mut export).expect(0).says("acme/split: 1 file");
    assert_eq!(weights_in(&folder, "cache-0"), [1, 2, 3, 4, 5]);
}

/// Ranks of one host share its cache. What each rank reads of all layers is fetched as a whole, and said.
#[test]
fn where_each_rank_reads_all_layers_it_fetches_them() {
    let (server, folder) = world_of_shards();
    let launch = ["launch", "-n", "2", "recipe.toml", "--set", "parallel.stages=2", "--set", "train.max_steps=2"];
    let shared = done(&server, &folder, &[&launch[..], &["--output-dir", "shared"]].concat());
    assert!(!shared.stderr.contains("every host fetches all"), "{}", shared.stderr);
    assert_eq!(weights_in(&folder, "cache"), [1, 2, 3, 4, 5]);
    // The norms that DoRA begins with are those of a rank's own layers.
    let layers = ["--set", "parallel.layers=[2, 1]", "--set", "train.max_steps=2"];
    let words = [&["--output-dir", "dora", "--set", "lora.use_dora=true"], &layers[..]].concat();
    for ended in on_two_hosts(&server, &folder, false, &words) {
        ended.expect(0);
    }
    assert_eq!(weights_in(&folder, "cache-1"), [3, 5]);
    let words = [&["--output-dir", "further", "--set", "lora.init_from=shared/adapter"], &layers[..]].concat();
    let [first, second] = on_two_hosts(&server, &folder, false, &words);
    first.expect(0).says("every host fetches all files of weights: lora.init_from");
    second.expect(0);
    assert_eq!(weights_in(&folder, "cache-1"), [1, 2, 3, 4, 5]);
}

#[test]
fn rows_of_the_hub() {
    let (server, folder) = world();
    let rows = ["--set", "data.train=hf://acme/rows/train", "--set", "data.eval=hf://acme/rows/test"];
    folder.run("plain", &[]).expect(0);
    done(&server, &folder, &[&["run", "recipe.toml", "--output-dir", "run"][..], &rows].concat());
    assert_eq!(metrics(&folder.path("run")).len(), metrics(&folder.path("plain")).len());
    let loss = |row: &Value| row["eval_loss"].clone();
    let last = |name: &str| metrics(&folder.path(name)).iter().rev().map(loss).find(|loss| !loss.is_null());
    assert_eq!(last("run"), last("plain"));
    let shown = done(&server, &folder, &[&["inspect", "recipe.toml", "--json"][..], &rows].concat()).json();
    assert!(shown["origin"].as_str().expect("text").ends_with("train.jsonl:1"), "{shown}");
    done(&server, &folder, &[&["validate", "recipe.toml"][..], &rows].concat());
    let eval = done(&server, &folder, &["eval", "model", "--data", "hf://acme/rows/test", "--json"]).json();
    let plain = folder.finetune(&["eval", "model", "--data", "eval.jsonl", "--json"]).expect(0).json();
    assert_eq!(eval["loss"], plain["loss"]);
}

/// (variables, arguments, exit code, what is said)
#[test]
fn what_cannot_be_had_says_what_to_do() {
    let (server, folder) = world();
    let nobody = ("HF_ENDPOINT", "http://127.0.0.1:9");
    #[expect(clippy::type_complexity, reason = "a table of cases")]
    let cases: [(&[(&str, &str)], &[&str], i32, &[&str]); 7] = [
        (&[], &["download", "acme/gated"], 2, &["acme/gated is gated", "agree to the conditions at", "hf auth login"]),
        (&[], &["download", "acme/none"], 2, &["the hub has no model acme/none", "spelling"]),
        (&[("HF_HUB_OFFLINE", "1")], &["download", "acme/tiny"], 2, &["HF_HUB_OFFLINE forbids to fetch it"]),
        (&[nobody], &["download", "acme/tiny"], 3, &["cannot be reached", "HTTPS_PROXY"]),
        (&[("HF_TOKEN", "hf_wrong")], &["download", "acme/tiny"], 2, &["does not accept the token"]),
        (
            &[],
            &["validate", "recipe.toml", "--set", "model.path=modles/tiny"],
            2,
            &["there is no directory modles/tiny, and the hub has no model"],
        ),
        (
            &[],
            &["eval", "model", "--data", "hf://acme/rows/dev"],
            2,
            &["acme/rows has no rows", "hf://OWNER/NAME/SPLIT"],
        ),
    ];
    for (variables, arguments, code, says) in cases {
        let mut command = with_hub(&server, &folder, arguments);
        let mut ended = run(command.envs(variables.iter().copied())).expect(code);
        assert!(!ended.stderr.contains("hf_"), "a token is shown: {}", ended.stderr);
        for text in says {
            ended = ended.says(text);
        }
    }
    let mut command = with_hub(&server, &folder, &["download", "acme/gated"]);
    run(command.env("HF_TOKEN", "hf_tester")).expect(0);
}

/// What one puts there, another takes by its name.
#[test]
fn an_adapter_goes_up_and_comes_down() {
    let (server, folder) = world();
    done(&server, &folder, &["run", "recipe.toml", "--output-dir", "run", "--set", "model.path=acme/tiny"]);
    let upload = ["upload", "run", "tester/mine", "--private"];
    run(&mut with_hub(&server, &folder, &upload)).expect(2).says("there is no token");
    let ended = run(with_hub(&server, &folder, &upload).env("HF_TOKEN", "hf_tester")).expect(0);
    assert_eq!(ended.stdout, format!("{}/tester/mine\n", server.endpoint()));
    {
        let mut state = server.state();
        let there = state.store.repository("models", "tester/mine");
        assert_eq!(there.access, Access::Private);
        let names: Vec<&str> = there.files("main").keys().map(String::as_str).collect();
        assert_eq!(names, [".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"]);
    }
    let loss = |arguments: &[&str]| {
        let all = [&["eval"], arguments, &["--data", "eval.jsonl", "--json"]].concat();
        run(with_hub(&server, &folder, &all).env("HF_TOKEN", "hf_tester")).expect(0).json()["loss"].clone()
    };
    // Alone, the adapter names its base.
    for source in [&["tester/mine"][..], &["acme/tiny", "--adapter", "tester/mine"]] {
        assert_eq!(loss(source), loss(&["run"]), "{source:?}");
    }
    run(&mut with_hub(&server, &folder, &["upload", "none", "tester/mine"])).expect(2).says("there is no none");
}
