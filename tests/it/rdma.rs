//! A whole training run over real RDMA verbs, in a virtual machine whose kernel has them
//! (`scripts/rdma-vm.sh`).

use std::process::Command;
use std::time::Duration;

use crate::folder::{CRASH_RECIPE, Folder, repository};
use crate::program::{BINARY, start};

/// Runs inside the virtual machine: the same recipe over TCP and over RDMA, with three ranks that
/// are all cabled to each other.
const INSIDE: &str = r#"
set -e
cd "$1"
row='"rxe0"'
cat > hosts.json <<END
[{"ssh": "localhost", "rdma": [null, $row, $row]},
 {"ssh": "localhost", "rdma": [$row, null, $row]},
 {"ssh": "localhost", "rdma": [$row, $row, null]}]
END
for backend in tcp rdma; do
    "$2" launch --hostfile hosts.json -- recipe.toml --output-dir $backend --set "distributed.backend=\"$backend\""
done
"#;

#[test]
fn a_run_over_rdma_makes_the_same_adapter() {
    let script = repository().join("scripts/rdma-vm.sh");
    let check = Command::new(&script).arg("--check").output().expect("the script");
    // The test of the verbs in the all-reduce crate says how to get such a kernel, and where it is
    // kept.
    if !check.status.success() || std::env::var_os("FINETUNE_RDMA_VM").is_none() {
        println!("SKIPPED: no kernel with RDMA devices. {}", String::from_utf8_lossy(&check.stderr).trim());
        return;
    }
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let program = std::path::Path::new(BINARY).parent().expect("a folder");
    let mut inside = start(
        Command::new(&script)
            .args(["-d", "loop", "-t", "240", "-s"])
            .arg(folder.path(""))
            .arg("-s")
            .arg(program)
            .args(["--", "bash", "-c", INSIDE, "inside"])
            .arg(folder.path(""))
            .arg(BINARY)
            .current_dir(program),
    );
    // It takes ten seconds alone. An emulated machine beside all other tests takes longer.
    assert!(inside.ends_within(Duration::from_secs(270)), "{}", inside.stderr());
    let ended = inside.wait().expect(0);
    let said = ended.stdout + &ended.stderr;
    assert!(said.contains("3 ranks joined over rdma"), "{said}");
    let adapter = |backend: &str| folder.result(backend).files["adapter/adapter_model.safetensors"].clone();
    assert!(adapter("rdma") == adapter("tcp"), "{said}");
    assert_eq!(folder.result("rdma").metrics, folder.result("tcp").metrics);
}
