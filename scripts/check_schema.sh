#!/usr/bin/env bash
# check_schema.sh - taplo accepts our recipes by their JSON schema, and refuses wrong ones.
#
#   pip install taplo
#   scripts/check_schema.sh
#
# TAPLO names another program than `taplo`. Without one the check is skipped.
# Exit code 0: passed or skipped; 1: the schema accepts or refuses what it should not.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
taplo=${TAPLO:-taplo}
if ! command -v "$taplo" >/dev/null; then
    echo "SKIPPED: no taplo (pip install taplo)"
    exit 0
fi
schema=$PWD/recipes/recipe.schema.json
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

fail() {
    echo "check_schema: $*" >&2
    cat "$work/log" >&2
    exit 1
}

# Whether taplo accepts a file; what it says goes to the log.
accepts() { "$taplo" check --no-auto-config "$@" >"$work/log" 2>&1; }

for recipe in recipes/*.toml recipes/models/*.toml; do
    named=./recipe.schema.json
    [ "$(dirname "$recipe")" = recipes ] || named=../recipe.schema.json
    [ "$(head -n 1 "$recipe")" = "#:schema $named" ] || fail "$recipe does not name its schema"
    accepts "$recipe" || fail "$recipe is refused"
done

# Recipes of the tests that have every key.
for recipe in crates/recipe/tests/resolved.toml crates/recipe/tests/common/contract.toml; do
    accepts --schema "file://$schema" "$recipe" || fail "$recipe is refused"
done

# The shortest recipe with more lines below it, as a file of its own.
cp "$schema" "$work/recipe.schema.json"
write() {
    printf '#:schema ./recipe.schema.json\n[model]\npath = "gpt2"\n[data]\ntrain = "rows.jsonl"\n%b\n' "$1" >"$work/recipe.toml"
}

for lines in \
    'date = 2026-11-27' \
    'date = "2026-11-27"' \
    'eval = ["a.jsonl", "b.jsonl"]' \
    '[distributed]\nports = 29500\ntimeout = "500ms"' \
    '[distributed]\nports = "29500-29599"' \
    '[lora]\nrank_pattern = { q_proj = 8 }\nlayers_to_transform = 1\nalpha = 8' \
    '[lora]\ntarget_modules = ["q_proj"]\nlayers_to_transform = [0, 1]' \
    '[train]\nmax_steps = 5' \
    '[schedule]\nwarmup_ratio = 0.1'; do
    write "$lines"
    accepts "$work/recipe.toml" || fail "refused: $lines"
done

for lines in \
    '[lora]\nrnak = 8' \
    '[loar]\nrank = 8' \
    '[lora]\nrank = "8"' \
    '[lora]\nrank = 0' \
    '[lora]\nrank = 8.5' \
    '[lora]\ndropout = 1.0' \
    '[lora]\nrank_pattern = { q_proj = 0 }' \
    '[lora]\ntarget_modules = []' \
    'format = "chatml"' \
    'eval = " "' \
    'eval = []' \
    '[optimizer]\nbetas = [0.9]' \
    '[distributed]\ntimeout = 5' \
    '[distributed]\nports = 0' \
    '[log]\nprometheus = "9400"' \
    '[train]\nepochs = 1\nmax_steps = 5'; do
    write "$lines"
    if accepts "$work/recipe.toml"; then fail "accepted: $lines"; fi
done
printf '#:schema ./recipe.schema.json\n[model]\npath = "gpt2"\n' >"$work/recipe.toml"
if accepts "$work/recipe.toml"; then fail "accepted without [data]"; fi
echo "taplo and the schema agree with the recipes"
