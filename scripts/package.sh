#!/usr/bin/env bash
# package.sh - what a release hands out, from a binary that is built already. Nothing is compiled.
#
#   scripts/package.sh             finetune-VERSION-TARGET.tar.gz: binary, completions, manual pages
#   scripts/package.sh --wheel     a wheel for pip and uvx that carries the same binary
#   scripts/package.sh --formula   the Homebrew formula, with the checksums of the archives in OUTPUT
#
# Options: --binary FILE (default target/release/finetune), --output DIR (default target/dist).
# Each call renews OUTPUT/SHA256SUMS. The binary says its version and target itself, so it has to
# run here.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

what=archive binary=target/release/finetune output=target/dist
while [ $# -gt 0 ]; do
    case $1 in
        --wheel | --formula) what=${1#--} ;;
        --binary | --output)
            [ $# -gt 1 ] || { echo "package: $1 needs a value" >&2; exit 2; }
            printf -v "${1#--}" '%s' "$2"
            shift
            ;;
        -h | --help) sed -n '2,11s/^# \{0,1\}//p' "$0"; exit ;;
        *) echo "package: no option $1" >&2; exit 2 ;;
    esac
    shift
done
[ -x "$binary" ] || { echo "package: no program at $binary: cargo build --locked --release" >&2; exit 2; }
mkdir -p "$output"
about=$("$binary" --version)
version=$(sed -n 's/^finetune //p' <<<"$about")
target=$(sed -n 's/^target  *//p' <<<"$about")
[ -n "$version" ] && [ -n "$target" ] || { echo "package: $binary does not say its version and target" >&2; exit 1; }
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

checksums() {
    (cd "$output" && { sha256sum finetune*.tar.gz finetune*.whl 2>/dev/null || shasum -a 256 finetune*.tar.gz finetune*.whl; }) \
        2>/dev/null >"$work/SHA256SUMS" || true
    mv "$work/SHA256SUMS" "$output/SHA256SUMS"
}

# A copy of the binary without its tables of lines: a third of the size.
stripped() {
    if [ "$(uname -s)" = Darwin ]; then strip -x -o "$1" "$binary"; else strip -o "$1" "$binary"; fi
    chmod 755 "$1"
}

archive() {
    local name=finetune-$version-$target
    local folder=$work/$name
    mkdir -p "$folder/completions" "$folder/man/man1"
    stripped "$folder/finetune"
    cp LICENSE README.md CHANGELOG.md "$folder/"
    "$binary" completions bash >"$folder/completions/finetune.bash"
    "$binary" completions zsh >"$folder/completions/_finetune"
    "$binary" completions fish >"$folder/completions/finetune.fish"
    "$binary" man --output "$folder/man/man1" >/dev/null
    # The same files give the same bytes, where tar can do that.
    local same=()
    if tar --version 2>/dev/null | grep -q GNU; then
        same=(--sort=name --owner=0 --group=0 --numeric-owner "--mtime=@${SOURCE_DATE_EPOCH:-0}")
    fi
    tar -C "$work" "${same[@]+"${same[@]}"}" -cf - "$name" | gzip -6n >"$output/$name.tar.gz"
    echo "$output/$name.tar.gz"
}

case $what in
    archive) archive ;;
    wheel)
        stripped "$work/finetune"
        python3 scripts/make_wheel.py "$work/finetune" --version "$version" --target "$target" --output "$output"
        ;;
    formula)
        sed "s/^  version .*/  version \"$version\"/" packaging/homebrew/finetune.rb >"$output/finetune.rb"
        for target in aarch64-apple-darwin aarch64-unknown-linux-gnu x86_64-unknown-linux-gnu; do
            sum=$(sed -n "s/^\([0-9a-f]\{64\}\)  *\*\{0,1\}finetune-$version-$target\.tar\.gz$/\1/p" "$output/SHA256SUMS")
            [ -n "$sum" ] || { echo "package: $output/SHA256SUMS has no archive for $target" >&2; exit 1; }
            sed -i.old "s/CHECKSUM_OF_$target/$sum/" "$output/finetune.rb"
        done
        rm -f "$output/finetune.rb.old"
        echo "$output/finetune.rb"
        exit
        ;;
esac
checksums
