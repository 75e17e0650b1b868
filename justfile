# The usual commands of this repository: `just` lists them. https://just.systems

# Lists the commands.
default:
    @just --list --unsorted

# Says what is missing here, and fetches the dependencies (once).
setup:
    @rustc --version || { echo "install Rust 1.95 or later: https://rustup.rs"; exit 1; }
    @command -v cc || { echo "install a C compiler: build-essential, or xcode-select --install"; exit 1; }
    @python3 --version || echo "no Python: scripts/ and .ci/ need 3.11 or later"
    cargo fetch --locked

# Format, lints and tests of the crates that need no burn: the loop while you work on them.
fast:
    .ci/fast

# Every test on the CPU. Arguments go to cargo: `just test --test goldens`.
test *arguments:
    cargo test --release --workspace {{arguments}}

# Lints of the whole workspace, as CI runs them.
lint:
    cargo clippy --locked --release --workspace --all-targets -- -D warnings

# The GPU backend on a Vulkan driver that computes on the CPU. For a real card: scripts/gpu-check.
gpu:
    .ci/gpu

# Matrix products, and collectives of two ranks. benches/*.py compare with other programs.
bench:
    cargo bench --workspace --bench matmul
    cargo run --release -- cluster bench -n 2

# All that CI does.
ci:
    .ci/run

# Archive, wheel and checksums for this machine, in target/dist, installed and run. RELEASE-CHECKLIST.md has the rest.
release: lint
    cargo build --locked --release
    scripts/check_packages.sh --output target/dist
    cat target/dist/SHA256SUMS
