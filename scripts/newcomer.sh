#!/usr/bin/env bash
# newcomer.sh - a newcomer's path, timed: from an archive to a chat with a model of one's own.
#
#   scripts/newcomer.sh [--binary FILE] [--model MODEL_DIR] [--data FILE]
#
# Without --model it is the quickstart's, which `finetune init` finds by itself. With --model and
# without --data the rows are those of `finetune init`. Prints each command with its seconds;
# the exit code is that of the first command that fails.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
repository=$PWD

binary=$PWD/target/release/finetune model='' data=''
while [ $# -gt 0 ]; do
    case $1 in
        --binary | --model | --data)
            [ $# -gt 1 ] || { echo "newcomer: $1 needs a value" >&2; exit 2; }
            printf -v "${1#--}" '%s' "$(realpath "$2")"
            shift
            ;;
        *) echo "newcomer: no option $1" >&2; exit 2 ;;
    esac
    shift
done
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

total=0
# timed WORDS COMMAND...: runs a command and prints its words with the seconds that it took.
timed() {
    local words=$1 begin end seconds
    shift
    begin=$(date +%s%N)
    "$@" >"$work/output" 2>&1 || { local code=$?; echo "failed ($code): $words"; cat "$work/output"; exit "$code"; }
    end=$(date +%s%N)
    total=$((total + end - begin))
    seconds=$(printf '%d.%02d' $(((end - begin) / 1000000000)) $(((end - begin) % 1000000000 / 10000000)))
    printf '%8s s  %s\n' "$seconds" "$words"
}

scripts/package.sh --binary "$binary" --output "$work/release" >/dev/null
timed "sh install.sh" env PREFIX="$work/prefix" FINETUNE_DOWNLOADS="file://$work/release" sh packaging/install.sh
export PATH="$work/prefix/bin:$PATH"
# The quickstart's model lies in the repository.
[ -n "$model" ] || model=$repository/datasets/quickstart/base
mkdir "$work/desk" && cd "$work/desk"
set -- init demo --model "$model"
[ -z "$data" ] || set -- "$@" --data "$data"
timed "finetune init demo --model MODEL${data:+ --data FILE}" finetune "$@"
timed "finetune validate demo/recipe.toml" finetune validate demo/recipe.toml
timed "finetune run demo/recipe.toml" finetune run demo/recipe.toml
run=$(dirname "$(find demo -name metrics.jsonl | head -n 1)")
# The first held-back row's question.
question=$(sed -n '1s/.*"role": *"user", *"content": *"\(\([^"\\]\|\\.\)*\)".*/\1/p' demo/data/valid.jsonl)
[ -n "$question" ] || question="Are you open on Sunday?"
chat() { printf '%s\n' "$question" | finetune chat "$run" --max-new-tokens 64; }
timed "finetune chat RUN" chat
echo "            < $question"
sed 's/^/            > /' "$work/output"
timed "finetune export RUN --format merged --output merged" finetune export "$run" --format merged --output merged
timed "finetune export RUN --format gguf --output gguf" finetune export "$run" --format gguf --output gguf
printf '%8s s  in all\n' "$(printf '%d.%02d' $((total / 1000000000)) $((total % 1000000000 / 10000000)))"
