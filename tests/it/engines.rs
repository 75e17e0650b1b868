//! `finetune run` under real launchers: Open MPI, torchrun, mlx.launch and Slurm, as
//! recipes/engines starts it.
//!
//! Each test needs its tools. If they are not there, it says SKIPPED and names them.
//! `FINETUNE_TORCHRUN` and `FINETUNE_MLX_LAUNCH` name these two programs if they are not in PATH.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::folder::{Folder, metrics, repository};
use crate::program::{BINARY, Ended, finetune, free_port, run};

/// Ranks of each run.
const RANKS: usize = 4;

/// A few steps on the quickstart's model and rows.
fn folder(steps: u32) -> Folder {
    let quickstart = repository().join("datasets/quickstart");
    let path = |name: &str| quickstart.join(name).display().to_string();
    let recipe = format!(
        "output_dir = \"run\"\n[model]\npath = \"{}\"\n[lora]\nrank = 8\n[data]\ntrain = \"{}\"\nmax_seq_len = 128\n\
         [train]\nmax_steps = {steps}\nglobal_batch_size = 16\nmicro_batch_size = 4\n[checkpoint]\nevery = 50\n",
        path("base"),
        path("train.jsonl"),
    );
    let folder = Folder::empty();
    folder.write("recipe.toml", recipe.as_bytes());
    folder
}

/// Prints without cargo's capture, which hides the output of passing tests.
fn skipped(test: &str, why: &str) {
    let _ = writeln!(std::io::stderr(), "SKIPPED: {test}: {why}");
}

fn engine(name: &str) -> PathBuf {
    repository().join("recipes/engines").join(name)
}

/// A program of this name: the one that the variable names, or one in PATH.
fn tool(name: &str, variable: &str) -> Option<PathBuf> {
    let named = std::env::var_os(variable).map(PathBuf::from);
    let path = std::env::var_os("PATH").unwrap_or_default();
    named.into_iter().chain(std::env::split_paths(&path).map(|folder| folder.join(name))).find(|path| path.is_file())
}

/// A script of scripts/ that can run here. If it cannot, says why not.
fn rig(test: &str, script: &str, arguments: &[&str]) -> Option<PathBuf> {
    let script = repository().join("scripts").join(script);
    let ended = run(Command::new(&script).args(arguments).arg("--check"));
    if ended.code == Some(0) {
        return Some(script);
    }
    skipped(test, ended.stderr.trim());
    None
}

/// A command whose PATH has `finetune` and a tool.
fn command(program: &Path, folder: &Folder, beside: Option<&Path>) -> Command {
    let mut path: Vec<PathBuf> =
        [Some(Path::new(BINARY)), beside].into_iter().flatten().filter_map(Path::parent).map(Path::to_owned).collect();
    path.extend(std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()));
    let mut command = Command::new(program);
    command.current_dir(folder.path("")).env("PATH", std::env::join_paths(path).expect("folders without colons"));
    command.env("RESTARTS", "0").env_remove("FINETUNE_FAILPOINT").env("NO_COLOR", "1");
    command
}

/// The adapter of a run. Checks that its metrics have every step once.
#[track_caller]
fn adapter(folder: &Folder, output: &str, steps: u64) -> Vec<u8> {
    let rows = metrics(&folder.path(output));
    let trained = rows.iter().filter(|row| row.get("loss").is_some()).filter_map(|row| row["step"].as_u64());
    assert_eq!(trained.collect::<Vec<_>>(), (1..=steps).collect::<Vec<_>>(), "{output}: steps in metrics.jsonl");
    let file = folder.path(output).join("adapter/adapter_model.safetensors");
    std::fs::read(&file).unwrap_or_else(|error| panic!("{}: {error}", file.display()))
}

/// The same ranks, started by hand with torchrun's variables.
#[track_caller]
fn by_hand(folder: &Folder, steps: u64) -> Vec<u8> {
    let port = free_port();
    let ranks: Vec<_> = (0..RANKS)
        .map(|rank| {
            let mut command = finetune(["run", "recipe.toml", "--output-dir", "by-hand"]);
            command.current_dir(folder.path("")).env("RANK", rank.to_string()).env("WORLD_SIZE", RANKS.to_string());
            command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port.to_string());
            crate::program::start(&mut command)
        })
        .collect();
    for rank in ranks {
        rank.wait().expect(0);
    }
    adapter(folder, "by-hand", steps)
}

/// Runs it and compares its adapter with that of the ranks that were started by hand.
#[track_caller]
fn same_adapter(folder: &Folder, command: &mut Command, output: &str) -> Ended {
    let ended = run(command).expect(0);
    assert!(adapter(folder, output, 4) == by_hand(folder, 4), "{output}: another adapter");
    ended
}

#[test]
fn mpirun() {
    let is_open_mpi = |program: &PathBuf| run(Command::new(program).arg("--version")).stdout.contains("Open MPI");
    let Some(program) = tool("mpirun", "FINETUNE_MPIRUN").filter(is_open_mpi) else {
        return skipped("engines::mpirun", "no Open MPI here (Debian: apt-get install openmpi-bin)");
    };
    let folder = folder(4);
    let options = ["recipe.toml", "mpi", "--allow-run-as-root", "--oversubscribe", "-np", "4"];
    same_adapter(&folder, command(&engine("mpirun.sh"), &folder, Some(&program)).args(options), "mpi");
}

#[test]
fn torchrun() {
    let Some(program) = tool("torchrun", "FINETUNE_TORCHRUN") else {
        return skipped("engines::torchrun", "no torchrun here (pip install torch; FINETUNE_TORCHRUN names it)");
    };
    let folder = folder(4);
    // `--standalone` takes a free port; two torchruns with the standard one would meet.
    let options = ["recipe.toml", "torch", "--standalone", "--nproc-per-node", "4"];
    same_adapter(&folder, command(&engine("torchrun.sh"), &folder, Some(&program)).args(options), "torch");
}

#[test]
fn mlx_launch() {
    let Some(program) = tool("mlx.launch", "FINETUNE_MLX_LAUNCH") else {
        return skipped("engines::mlx_launch", "no mlx.launch here (pip install mlx; FINETUNE_MLX_LAUNCH names it)");
    };
    let folder = folder(4);
    let port = (20_000 + std::process::id() % 1000 * 10).to_string();
    let options = ["recipe.toml", "mlx", "-n", "4", "--starting-port", &port];
    same_adapter(&folder, command(&engine("mlx-launch.sh"), &folder, Some(&program)).args(options), "mlx");
}

#[test]
fn srun() {
    let Some(rig) = rig("engines::srun", "slurm-here.sh", &[]) else { return };
    let folder = folder(4);
    let run = ["--", "srun", "-N", "2", "-n", "4", "finetune", "run", "recipe.toml", "--output-dir", "srun"];
    same_adapter(&folder, command(&rig, &folder, None).args(run), "srun");
}

/// Two nodes with networks of their own: the ranks need the token that the batch script makes.
#[test]
fn sbatch_on_two_nodes_preempted_and_queued_again() {
    const STEPS: u32 = 60;
    let test = "engines::sbatch_on_two_nodes_preempted_and_queued_again";
    let Some(rig) = rig(test, "slurm-here.sh", &["--netns"]) else { return };
    let folder = folder(STEPS);
    let check = repository().join("scripts/check_preemption.sh");
    let mut command = command(&rig, &folder, None);
    let ended = run(command.args(["--netns", "-n", "2", "--"]).arg(check).args(["recipe.toml", "sbatch"])).expect(0);
    ended.says("exit code 143: back into the queue").says("going on from");
    let steps = u64::from(STEPS);
    assert!(adapter(&folder, "sbatch", steps) == by_hand(&folder, steps), "another adapter after a preemption");
}

#[test]
fn hosts_over_ssh() {
    let Some(rig) = rig("engines::hosts_over_ssh", "sshd-here.sh", &[]) else { return };
    let folder = Folder::empty();
    let bench = "finetune cluster bench --json --max-bytes 1K --hostfile $SSHD_HERE/hosts.json";
    let ended = run(command(&rig, &folder, None).args(["-n", "2", "--", "sh", "-c", bench])).expect(0);
    assert_eq!(ended.json()["wrong"], 0, "{}", ended.stdout);
}
