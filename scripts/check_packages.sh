#!/usr/bin/env bash
# check_packages.sh - what a release hands out installs and runs: archive, install script, wheel,
# formula. Made from a binary that is built already (scripts/package.sh), in seconds.
#
#   scripts/check_packages.sh [--binary FILE] [--output DIR]
#
# DIR (default target/packages) keeps archive and wheel. A wheel that is there already is tried
# instead of one of ours. Exit code 0: all of them work; what is missing to try is SKIPPED.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

binary=target/release/finetune output=target/packages
while [ $# -gt 0 ]; do
    case $1 in
        --binary | --output)
            [ $# -gt 1 ] || { echo "check_packages: $1 needs a value" >&2; exit 2; }
            printf -v "${1#--}" '%s' "$2"
            shift
            ;;
        *) echo "check_packages: no option $1" >&2; exit 2 ;;
    esac
    shift
done
mkdir -p "$output"
output=$(cd "$output" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
fail() {
    echo "check_packages: $*" >&2
    exit 1
}

archive=$(scripts/package.sh --binary "$binary" --output "$output")
wheel=$(find "$output" -name '*.whl' | head -n 1)
[ -n "$wheel" ] || wheel=$(scripts/package.sh --wheel --binary "$binary" --output "$output")
version=$("$binary" -V)
says_version() { [ "$("$1" --version | head -n 1)" = "$version" ] || fail "$1 is not $version"; }

name=$(basename "$archive" .tar.gz)
tar -C "$work" -xzf "$archive"
says_version "$work/$name/finetune"
for file in LICENSE README.md CHANGELOG.md completions/finetune.bash completions/_finetune \
    completions/finetune.fish man/man1/finetune.1 man/man1/finetune-run.1 man/man1/finetune-cluster-bench.1; do
    [ -s "$work/$name/$file" ] || fail "the archive lacks $file"
done
echo "archive: $(du -h "$archive" | cut -f 1), $(find "$work/$name/man" -name '*.1' | wc -l) manual pages"

PREFIX=$work/prefix FINETUNE_DOWNLOADS=file://$output sh packaging/install.sh >"$work/install.log" || fail "install.sh failed"
says_version "$work/prefix/bin/finetune"
[ -s "$work/prefix/share/man/man1/finetune.1" ] || fail "install.sh has left out the manual pages"
mkdir "$work/damaged"
cp "$output/SHA256SUMS" "$work/damaged/"
{ head -c 1000 "$archive"; echo; tail -c +1002 "$archive"; } >"$work/damaged/$name.tar.gz"
if PREFIX=$work/other FINETUNE_DOWNLOADS=file://$work/damaged sh packaging/install.sh >"$work/install.log" 2>&1; then
    fail "install.sh has installed a damaged archive"
fi
grep -q 'SHA256SUMS says' "$work/install.log" && [ ! -e "$work/other" ] || fail "install.sh: $(cat "$work/install.log")"
echo "install.sh: installs, and refuses a damaged archive"

if python3 -m venv "$work/venv" >"$work/venv.log" 2>&1; then
    "$work/venv/bin/pip" install --quiet --disable-pip-version-check --no-index "$wheel"
    says_version "$work/venv/bin/finetune"
    "$work/venv/bin/finetune" --quiet run recipes/quickstart.toml --output-dir "$work/run" \
        --set train.max_steps=5 --set eval.exact_match=0 --set eval.samples=0 >/dev/null
    [ -s "$work/run/adapter/adapter_model.safetensors" ] || fail "the wheel's program has trained nothing"
    echo "wheel: $(basename "$wheel") installs and trains"
else
    echo "SKIPPED: no Python virtual environment can be made here, so the wheel was not installed"
fi

# The other systems' archives are stand-ins here.
mkdir "$work/formula"
for target in aarch64-apple-darwin aarch64-unknown-linux-gnu x86_64-unknown-linux-gnu; do
    echo "$target" >"$work/formula/finetune-${version#finetune }-$target.tar.gz"
done
(cd "$work/formula" && { sha256sum ./*.tar.gz || shasum -a 256 ./*.tar.gz; } 2>/dev/null | sed 's|\./||' >SHA256SUMS)
scripts/package.sh --formula --binary "$binary" --output "$work/formula" >/dev/null
if grep -q CHECKSUM_OF "$work/formula/finetune.rb"; then fail "the formula lacks a checksum"; fi
if command -v ruby >/dev/null; then ruby -c "$work/formula/finetune.rb" >/dev/null; else echo "SKIPPED: no ruby to parse the formula"; fi
if command -v shellcheck >/dev/null; then
    shellcheck packaging/install.sh scripts/package.sh scripts/check_packages.sh
else
    echo "SKIPPED: no shellcheck"
fi
echo "formula: filled in"
