//! A base of eight times the memory that the program may take: a control group of Linux limits it, page cache
//! included. Without the right to make one the test says that it was skipped.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use finetune_model::{ModelConfig, expected_tensors};
use finetune_random::Stream;
use serde_json::{Map, Value, json};

use crate::folder::Folder;
use crate::program::{BINARY, finetune, run};

/// What the program may take, in bytes.
const LIMIT: u64 = 100 << 20;

/// A control group, version 1 or 2, whose processes take no more memory than [`LIMIT`] together.
struct MemoryGroup {
    path: PathBuf,
}

impl MemoryGroup {
    /// `None` if it cannot be had. The reason is printed.
    fn start() -> Option<MemoryGroup> {
        match MemoryGroup::make() {
            Ok(group) => Some(group),
            Err(error) => {
                println!("SKIPPED: no control group that limits memory: {error}");
                None
            }
        }
    }

    fn make() -> std::io::Result<MemoryGroup> {
        let root = Path::new("/sys/fs/cgroup");
        let is_first = root.join("memory/memory.limit_in_bytes").exists();
        if !is_first {
            std::fs::write(root.join("cgroup.subtree_control"), "+memory")?;
        }
        let path = if is_first { root.join("memory") } else { root.to_path_buf() };
        let group = MemoryGroup { path: path.join(format!("finetune-test-{}", std::process::id())) };
        std::fs::create_dir(&group.path)?;
        let (limit, swap, of_swap) = match is_first {
            // Memory and swap together.
            true => ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes", LIMIT),
            false => ("memory.max", "memory.swap.max", 0),
        };
        std::fs::write(group.path.join(limit), LIMIT.to_string())?;
        // Not there if the kernel does not count swap.
        if group.path.join(swap).exists() {
            std::fs::write(group.path.join(swap), of_swap.to_string())?;
        }
        Ok(group)
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
        let _ = std::fs::remove_dir(&self.path);
    }
}

/// Writes a Llama in bf16 with so many layers of 6.5 MiB, one piece after the other.
fn write_model(directory: &Path, layers: usize) -> u64 {
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

/// It trains, is killed, goes on to the bits of a run without a limit, is evaluated and merged.
#[test]
fn a_base_of_eight_times_the_memory_trains_resumes_evaluates_and_is_merged() {
    let Some(group) = MemoryGroup::start() else { return };
    let folder = Folder::empty();
    let base = write_model(&folder.path("model"), 124);
    assert!(base >= 8 * LIMIT, "{base} bytes");
    let row = |row: u32| {
        let ids: Vec<u32> = (0..16).map(|n| (row * 131 + n * 17) % 1024).collect();
        json!({"input_ids": ids, "labels": ids}).to_string() + "\n"
    };
    folder.write("rows.jsonl", (row(0) + &row(1)).as_bytes());
    folder.write("recipe.toml", RECIPE.as_bytes());
    run(finetune(["run", "recipe.toml", "--output-dir", "unlimited"]).current_dir(folder.path(""))).expect(0);

    let train = ["run", "recipe.toml", "--resume"];
    let killed = run(group.finetune(&folder, &train).env("FINETUNE_FAILPOINT", "train.step:2"));
    assert!(killed.signal.is_some() && folder.path("run/checkpoints/step-000001").exists(), "{killed:?}");
    run(&mut group.finetune(&folder, &train)).expect(0).says("(step 1)").says("are read from the disk");
    let adapter = |run: &str| {
        std::fs::read(folder.path(&format!("{run}/adapter/adapter_model.safetensors"))).expect("an adapter")
    };
    assert!(adapter("run") == adapter("unlimited"), "other bits under the limit");

    let evaluated = run(&mut group.finetune(&folder, &["eval", "run", "--data", "rows.jsonl"])).expect(0);
    assert!(evaluated.stdout.contains("perplexity"), "{}", evaluated.stdout);
    let merge = ["export", "run", "--format", "merged", "--output", "merged"];
    let compared = run(&mut group.finetune(&folder, &merge)).expect(0);
    assert!(compared.stdout.contains("merged and adapter agree"), "{}", compared.stdout);
    let merged = std::fs::metadata(folder.path("merged/model.safetensors")).map_or(0, |file| file.len());
    assert!(merged >= base, "{merged} bytes");
}
