//! A base of eight times the memory that the program may take: a control group of Linux limits it, page cache
//! included. Without the right to make one the run has no limit, and is only measured: its peak has to be near its
//! estimate, and that below the limit.
//!
//! `ulimit -v` cannot stand in for a group. It counts addresses, of which the program takes some 720 MiB before its first
//! weight (the stacks of its threads, what its allocator reserves, its own file), so that a base of eight times the
//! limit would have 6 GiB; and it counts no page cache.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use finetune_model::{ModelConfig, expected_tensors};
use finetune_random::Stream;
use serde_json::{Map, Value, json};

use crate::folder::{Folder, repository};
use crate::memory::peak;
use crate::program::{BINARY, finetune, run};

/// What the program may take, in bytes.
const LIMIT: u64 = 100 << 20;

/// A control group, version 1 or 2, whose processes take no more memory together than so many bytes.
pub(crate) struct MemoryGroup {
    path: PathBuf,
}

impl MemoryGroup {
    /// `None` if it cannot be had. The reason is printed. No two groups of these tests have the same name.
    pub(crate) fn start(name: &str, bytes: u64) -> Option<MemoryGroup> {
        match MemoryGroup::make(name, bytes) {
            Ok(group) => Some(group),
            Err(error) => {
                println!("SKIPPED: no control group that limits memory: {error}");
                None
            }
        }
    }

    fn make(name: &str, bytes: u64) -> std::io::Result<MemoryGroup> {
        let root = Path::new("/sys/fs/cgroup");
        let is_first = root.join("memory/memory.limit_in_bytes").exists();
        if !is_first {
            std::fs::write(root.join("cgroup.subtree_control"), "+memory")?;
        }
        let path = if is_first { root.join("memory") } else { root.to_path_buf() };
        let group = MemoryGroup { path: path.join(format!("finetune-test-{name}-{}", std::process::id())) };
        std::fs::create_dir(&group.path)?;
        let (limit, swap, of_swap) = match is_first {
            // Memory and swap together.
            true => ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes", bytes),
            false => ("memory.max", "memory.swap.max", 0),
        };
        std::fs::write(group.path.join(limit), bytes.to_string())?;
        // Not there if the kernel does not count swap.
        if group.path.join(swap).exists() {
            std::fs::write(group.path.join(swap), of_swap.to_string())?;
        }
        Ok(group)
    }

    /// Takes a process in, and all that it will start.
    pub(crate) fn take(&self, pid: u32) {
        std::fs::write(self.path.join("cgroup.procs"), pid.to_string()).expect("a process of ours");
    }

    /// `finetune ARGUMENTS` in this group.
    fn finetune(&self, folder: &Folder, arguments: &[&str]) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", r#"echo $$ > "$0" && exec "$@""#]).arg(self.path.join("cgroup.procs")).arg(BINARY);
        command.args(arguments).current_dir(folder.path("")).env("NO_COLOR", "1").env("HF_HUB_OFFLINE", "1");
        command
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        // Processes that were killed leave it a moment later.
        for _ in 0..100 {
            if std::fs::remove_dir(&self.path).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Writes a Llama in bf16 with so many layers of 6.5 MiB, one piece after the other.
pub(crate) fn write_model(directory: &Path, layers: usize) -> u64 {
    std::fs::create_dir(directory).expect("a new directory");
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 512, "intermediate_size": 1536,
        "num_hidden_layers": layers, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64,
        "vocab_size": 1024, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "hidden_act": "silu", "tie_word_embeddings": false, "attention_bias": false, "mlp_bias": false
    });
    std::fs::write(directory.join("config.json"), config.to_string()).expect("written");
    let tensors = expected_tensors(&ModelConfig::load(directory).expect("a config"));
    let (mut header, mut end) = (Map::new(), 0u64);
    for (name, shape) in &tensors {
        let begin = end;
        end += 2 * shape.iter().product::<usize>() as u64;
        header.insert(name.clone(), json!({"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}));
    }
    let header = Value::Object(header).to_string();
    let file = std::fs::File::create(directory.join("model.safetensors")).expect("a file");
    let mut file = std::io::BufWriter::new(file);
    let mut put = |bytes: &[u8]| file.write_all(bytes).expect("written");
    put(&(header.len() as u64).to_le_bytes());
    put(header.as_bytes());
    // The same numbers again and again, in other places of each matrix. bf16 is the upper half of f32.
    let upper = |value: &f32| ((value.to_bits() >> 16) as u16).to_le_bytes();
    let drawn: Vec<u8> = Stream::new(3, 1, 0, 0).uniform((1 << 20) + 7, 0.03).iter().flat_map(upper).collect();
    let mut numbers = drawn.iter().copied().cycle();
    for (_, shape) in &tensors {
        let bytes = 2 * shape.iter().product::<usize>();
        match shape.len() {
            1 => put(&upper(&1.0).repeat(bytes / 2)),
            _ => put(&numbers.by_ref().take(bytes).collect::<Vec<u8>>()),
        }
    }
    file.flush().expect("written");
    end
}

/// The quickstart's tokenizer for such a model, which knows as many tokens.
fn write_tokenizer(folder: &Folder) {
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        let file = repository().join("datasets/quickstart/base").join(name);
        folder.write(&format!("model/{name}"), &std::fs::read(file).expect("a file of the quickstart"));
    }
}

const RECIPE: &str = r#"output_dir = "run"
[model]
path = "model"
device = "cpu"
[lora]
rank = 1
target_modules = ["q_proj"]
[data]
train = "rows.jsonl"
[train]
max_steps = 2
global_batch_size = 1
[checkpoint]
every = 1
"#;

/// Rows for such a model.
pub(crate) fn rows() -> String {
    let row = |row: u32| {
        let ids: Vec<u32> = (0..16).map(|n| (row * 131 + n * 17) % 1024).collect();
        json!({"input_ids": ids, "labels": ids}).to_string() + "\n"
    };
    row(0) + &row(1)
}

/// The peak of a run is within 15 % of what it estimated, which is below the limit.
fn expect_near_its_estimate(stderr: &str) {
    let (_, rest) = stderr.split_once("(estimated ").unwrap_or_else(|| panic!("no estimate in {stderr}"));
    let estimate = rest.split_once(" MiB").and_then(|(number, _)| number.parse::<f64>().ok()).expect("a number of MiB");
    let peak = peak(stderr);
    assert!((estimate / peak - 1.0).abs() < 0.15, "{estimate} MiB estimated, {peak} MiB used");
    assert!(estimate < LIMIT as f64 / f64::from(1 << 20), "{estimate} MiB estimated");
}

/// It trains, is killed, goes on to the bits of a run without a limit, is evaluated and merged, and answers.
#[test]
fn a_base_of_eight_times_the_memory_trains_resumes_evaluates_and_is_merged() {
    let group = MemoryGroup::start("base", LIMIT);
    let folder = Folder::empty();
    let base = write_model(&folder.path("model"), 124);
    assert!(base >= 8 * LIMIT, "{base} bytes");
    folder.write("rows.jsonl", rows().as_bytes());
    folder.write("recipe.toml", RECIPE.as_bytes());
    run(finetune(["run", "recipe.toml", "--output-dir", "unlimited"]).current_dir(folder.path(""))).expect(0);

    // Without a limit the layers would be in memory.
    let disk: &[&str] = if group.is_some() { &[] } else { &["--set", "model.residency=disk"] };
    let train = [&["run", "recipe.toml", "--resume"], disk].concat();
    let limited = |arguments: &[&str]| match &group {
        Some(group) => group.finetune(&folder, arguments),
        None => {
            let mut command = finetune(arguments);
            command.current_dir(folder.path(""));
            command
        }
    };
    let killed = run(limited(&train).env("FINETUNE_FAILPOINT", "train.step:2"));
    assert!(killed.signal.is_some() && folder.path("run/checkpoints/step-000001").exists(), "{killed:?}");
    let ended = run(&mut limited(&train)).expect(0).says("(step 1)").says("are read from the disk");
    expect_near_its_estimate(&ended.stderr);
    let adapter = |run: &str| {
        std::fs::read(folder.path(&format!("{run}/adapter/adapter_model.safetensors"))).expect("an adapter")
    };
    assert!(adapter("run") == adapter("unlimited"), "other bits under the limit");

    if group.is_none() {
        println!("SKIPPED: these commands do not tell their peak, so only a group can hold them to the limit");
        return;
    }
    let evaluated = run(&mut limited(&["eval", "run", "--data", "rows.jsonl"])).expect(0);
    assert!(evaluated.stdout.contains("perplexity"), "{}", evaluated.stdout);
    let merge = ["export", "run", "--format", "merged", "--output", "merged"];
    let compared = run(&mut limited(&merge)).expect(0);
    assert!(compared.stdout.contains("merged and adapter agree"), "{}", compared.stdout);
    let merged = std::fs::metadata(folder.path("merged/model.safetensors")).map_or(0, |file| file.len());
    assert!(merged >= base, "{merged} bytes");

    write_tokenizer(&folder);
    let generate =
        ["generate", "model", "--adapter", "run", "--raw", "--prompt", "Hi", "--max-new-tokens", "2", "--json"];
    // Beside two layers there are the keys and values of all 124.
    let group = MemoryGroup::start("answers", LIMIT + LIMIT / 4).expect("a second group");
    let answer = run(&mut group.finetune(&folder, &generate)).expect(0).says("are read from the disk").json();
    assert_eq!(answer, folder.finetune(&generate).expect(0).json(), "other tokens under the limit");
}

/// A server has its model in memory. Where that has no room, the system would kill it.
#[test]
fn a_server_of_a_model_that_has_no_room_is_refused() {
    let Some(group) = MemoryGroup::start("serves", LIMIT) else { return };
    let folder = Folder::empty();
    let base = write_model(&folder.path("model"), 20);
    assert!(base > LIMIT, "{base} bytes");
    write_tokenizer(&folder);
    let serve = ["serve", "model", "--port", "0", "--device", "cpu"];
    run(&mut group.finetune(&folder, &serve))
        .expect(5)
        .says("of memory, and this process may have 100.0 MiB")
        .says("--quantization")
        .says("--residency disk");
}
