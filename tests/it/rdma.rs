//! Whole runs over real RDMA verbs, in a virtual machine whose kernel has them (`scripts/rdma-vm.sh`).

use std::process::Command;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::folder::{CRASH_RECIPE, Folder, RunResult, repository};
use crate::program::{BINARY, Ended, start};

/// Begins what runs inside the virtual machine. `hosts N` writes a hostfile of N ranks that are all cabled to each
/// other.
const BEGIN: &str = r#"
set -e
cd "$1"
finetune=$2
hosts() {
    local world=$1 rank other row list=
    for ((rank = 0; rank < world; rank++)); do
        row=
        for ((other = 0; other < world; other++)); do
            if [ $other = $rank ]; then row+=', null'; else row+=', "rxe0"'; fi
        done
        list+=", {\"ssh\": \"localhost\", \"rdma\": [${row:2}]}"
    done
    echo "[${list:2}]" > hosts-$world.json
}
for world in 2 3 4; do hosts $world; done
"#;

/// One virtual machine at a time: each emulates two processors.
static ALONE: Mutex<()> = Mutex::new(());

/// What the commands `inside` make of a folder, in a virtual machine; none without one.
fn in_virtual_machine(folder: &Folder, inside: &str) -> Option<Ended> {
    let script = repository().join("scripts/rdma-vm.sh");
    let check = Command::new(&script).arg("--check").output().expect("the script");
    // The test of the verbs in the all-reduce crate says how to get such a kernel, and where it is
    // kept.
    if !check.status.success() || std::env::var_os("FINETUNE_RDMA_VM").is_none() {
        println!("SKIPPED: no kernel with RDMA devices. {}", String::from_utf8_lossy(&check.stderr).trim());
        return None;
    }
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let program = std::path::Path::new(BINARY).parent().expect("a folder");
    let mut running = start(
        Command::new(&script)
            .args(["-d", "loop", "-t", "540", "-s"])
            .arg(folder.path(""))
            .arg("-s")
            .arg(program)
            .args(["--", "bash", "-c", &[BEGIN, inside].concat(), "inside"])
            .arg(folder.path(""))
            .arg(BINARY)
            .current_dir(program),
    );
    // Each of them takes half a minute alone. An emulated machine beside all other tests takes longer.
    assert!(running.ends_within(Duration::from_secs(570)), "{}", running.stderr());
    Some(running.wait().expect(0))
}

#[test]
fn a_run_over_rdma_makes_the_same_adapter() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let inside = r#"
for backend in tcp rdma; do
    "$finetune" launch --hostfile hosts-3.json -- recipe.toml --output-dir $backend --set "distributed.backend=\"$backend\""
done
"#;
    let Some(ended) = in_virtual_machine(&folder, inside) else { return };
    let said = ended.stdout + &ended.stderr;
    assert!(said.contains("3 ranks joined over rdma"), "{said}");
    let adapter = |backend: &str| folder.result(backend).files["adapter/adapter_model.safetensors"].clone();
    assert!(adapter("rdma") == adapter("tcp"), "{said}");
    assert_eq!(folder.result("rdma").metrics, folder.result("tcp").metrics);
}

/// Layers over two and three ranks, and over two ranks twice: what goes between them goes over verbs, and adapters
/// and metrics have the bits of one process. So have answers.
#[test]
fn layers_over_rdma_have_the_bits_of_one_process() {
    let folder = crate::stages::folder();
    let inside = r#"
sets=(--set train.max_steps=3 --set eval.every=3 --set distributed.virtual_ranks=2)
"$finetune" run recipe.toml --output-dir one "${sets[@]}"
for spread in "2 2" "3 3" "4 2"; do
    read -r world stages <<< "$spread"
    "$finetune" launch --hostfile hosts-$world.json -- recipe.toml --output-dir "$spread" "${sets[@]}" \
        --set parallel.stages=$stages --set 'distributed.backend="rdma"'
done
"$finetune" launch --hostfile hosts-2.json -- recipe.toml --output-dir tcp "${sets[@]}" \
    --set parallel.stages=2 --set 'distributed.backend="tcp"' 2> said-over-tcp
asked=(base --device cpu --json --raw --prompt "Hello, Leon" --max-new-tokens 8)
"$finetune" generate "${asked[@]}" > answer-one
for world in 2 3; do
    "$finetune" launch --hostfile hosts-$world.json -- generate "${asked[@]}" > answer-$world
done
"#;
    // The virtual machine sees this folder, wherever the repository lies.
    std::fs::create_dir(folder.path("base")).expect("a new directory");
    for file in std::fs::read_dir(repository().join("datasets/quickstart/base")).expect("the quickstart's base") {
        let file = file.expect("an entry");
        let name = file.file_name().into_string().expect("a name");
        folder.write(&format!("base/{name}"), &std::fs::read(file.path()).expect("a file"));
    }
    let Some(ended) = in_virtual_machine(&folder, inside) else { return };
    let said = ended.stdout + &ended.stderr;
    let over_rdma = "between layers, tensors go from rank to rank over rdma\n";
    assert_eq!(said.matches(over_rdma).count(), 5, "three runs and two answers: {said}");
    let text = |name: &str| std::fs::read_to_string(folder.path(name)).expect("a file");
    assert!(text("said-over-tcp").contains("between layers, tensors go from rank to rank over tcp\n"), "{said}");
    let adapter = |result: &RunResult| result.files["adapter/adapter_model.safetensors"].clone();
    let want = folder.result("one");
    for spread in ["2 2", "3 3", "4 2", "tcp"] {
        let got = folder.result(spread);
        assert!(adapter(&got) == adapter(&want), "{spread}: {said}");
        assert_eq!(got.metrics, want.metrics, "{spread}");
    }
    for world in [2, 3] {
        assert_eq!(text(&format!("answer-{world}")), text("answer-one"), "{world} ranks");
    }
}

/// The cables of three ranks form a chain: sums go over TCP, and what goes between layers over verbs, from neighbour to
/// neighbour, to the bits of one process.
#[test]
fn layers_over_a_chain_go_over_rdma_between_neighbours() {
    let folder = crate::stages::folder();
    let inside = r#"
sets=(--set train.max_steps=3 --set eval.every=3 --set distributed.virtual_ranks=2)
"$finetune" run recipe.toml --output-dir one "${sets[@]}"
cat > chain.json <<END
[{"ssh": "localhost", "rdma": [null, "rxe0", null]},
 {"ssh": "localhost", "rdma": ["rxe0", null, "rxe0"]},
 {"ssh": "localhost", "rdma": [null, "rxe0", null]}]
END
"$finetune" launch --hostfile chain.json -- recipe.toml --output-dir chain "${sets[@]}" --set parallel.stages=3
"#;
    let Some(ended) = in_virtual_machine(&folder, inside) else { return };
    let said = ended.stdout + &ended.stderr;
    assert!(said.contains("1, 1 and 1 of them next to each other, as the cables form a chain"), "{said}");
    // The last rank tells all others a few numbers, and has no cable to the first.
    assert!(said.contains("tensors go from rank to rank over rdma; to and from rank 2 over tcp\n"), "{said}");
    let [one, chain] = ["one", "chain"].map(|output| folder.result(output));
    let adapter = |result: &RunResult| result.files["adapter/adapter_model.safetensors"].clone();
    assert!(adapter(&chain) == adapter(&one), "{said}");
    assert_eq!(chain.metrics, one.metrics);
}

/// A rank whose layers are waited for over verbs is killed, and in another run frozen: the others name it, in the
/// same time as over TCP.
#[test]
fn a_lost_stage_over_rdma_is_named_in_time() {
    let folder = crate::stages::folder();
    let inside = r#"
for signal in KILL STOP; do
    "$finetune" launch --hostfile hosts-3.json -- recipe.toml --output-dir $signal --set train.max_steps=100000 \
        --set eval.every=0 --set checkpoint.every=1 --set parallel.stages=3 --set 'distributed.backend="rdma"' \
        2> said-$signal &
    launcher=$!
    until [ "$(cat $signal/metrics.jsonl 2> /dev/null | wc -l)" -gt 1 ]; do
        kill -0 $launcher || { cat said-$signal; exit 1; }
        sleep 0.1
    done
    # The launcher starts ranks in their order.
    victim=$(ps -eo pid,args | grep -e "--assigned.*$signal" | grep -v grep | sed -n 3p | awk '{print $1}')
    began=$(date +%s%3N)
    kill -$signal $victim
    # What the survivors say, not what the launcher does with the stopped one.
    until grep -q "was lost" said-$signal; do
        kill -0 $launcher || { cat said-$signal; exit 1; }
        sleep 0.02
    done
    echo "$signal: $(($(date +%s%3N) - began)) ms"
    code=0
    wait $launcher || code=$?
    echo "$signal: code $code"
done
"#;
    let Some(ended) = in_virtual_machine(&folder, inside) else { return };
    let said = ended.stdout;
    for (signal, how, promised) in [("KILL", "its connections closed", 1), ("STOP", "it fell silent", 5)] {
        let text = std::fs::read_to_string(folder.path(&format!("said-{signal}"))).expect("a file");
        let line = text
            .lines()
            .find(|line| line.contains(" error: ") && line.contains("was lost: "))
            .unwrap_or_else(|| panic!("{text}"));
        assert!(line.contains("error: rank 2 (") && line.contains(how), "{line}");
        assert!(text.contains("--resume"), "{text}");
        assert!(said.contains(&format!("{signal}: code 3\n")), "{said}\n{text}");
        let took = said.lines().find_map(|line| line.strip_prefix(&format!("{signal}: "))?.strip_suffix(" ms"));
        let took: u64 = took.and_then(|took| took.parse().ok()).unwrap_or_else(|| panic!("{said}"));
        println!("{signal}: known after {took} ms");
        // An emulated kernel on a busy machine gets far more time than is promised. That a rank which was killed is not
        // waited for until it is silent is in `how`.
        assert!(took < (promised + 40) * 1000, "{signal}: {took} ms");
    }
}
