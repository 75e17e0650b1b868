#!/bin/sh
# Installs finetune from a release: macOS on Apple silicon, Linux on x86-64 and arm64 (glibc).
#
#   sh install.sh              the newest release, into ~/.local
#   sh install.sh 0.1.0        this one
#
# PREFIX               where bin/, share/man and completions go (default ~/.local)
# FINETUNE_REPOSITORY  owner/name on GitHub, if not the one below
# FINETUNE_DOWNLOADS   another place with archives and SHA256SUMS, also file:///folder
#
# The archive is unpacked only if its SHA-256 is the one in SHA256SUMS. Nothing else is changed:
# deleting the files that are listed at the end removes it again.
set -eu

repository=${FINETUNE_REPOSITORY:-OWNER/NAME}

main() {
    prefix=${PREFIX:-$HOME/.local}
    version=${1:-}
    case "$(uname -s)-$(uname -m)" in
        Darwin-arm64) target=aarch64-apple-darwin ;;
        Linux-x86_64) target=x86_64-unknown-linux-gnu ;;
        Linux-aarch64 | Linux-arm64) target=aarch64-unknown-linux-gnu ;;
        *) fail "no release for $(uname -s) on $(uname -m); build it: cargo install --locked --path crates/finetune" ;;
    esac
    if [ -n "${FINETUNE_DOWNLOADS:-}" ]; then
        from=$FINETUNE_DOWNLOADS
    elif [ "$repository" = OWNER/NAME ]; then
        fail "this copy does not know where its releases are: set FINETUNE_REPOSITORY=owner/name"
    elif [ -n "$version" ]; then
        from=https://github.com/$repository/releases/download/v$version
    else
        from=https://github.com/$repository/releases/latest/download
    fi

    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    fetch "$from/SHA256SUMS" "$work/SHA256SUMS"
    # A line is a checksum, a blank, a blank or a star, and a name.
    line=$(grep "[ *]finetune-${version:-[0-9][^ ]*}-$target\.tar\.gz\$" "$work/SHA256SUMS" | tail -n 1) ||
        fail "$from/SHA256SUMS names no archive ${version:+of version $version }for $target"
    name=${line##*[ *]}
    fetch "$from/$name" "$work/$name"
    expected=${line%% *}
    found=$(checksum "$work/$name")
    [ "$found" = "$expected" ] || fail "$name has SHA-256 $found, and SHA256SUMS says $expected: not installed"

    tar -C "$work" -xzf "$work/$name"
    folder=$work/${name%.tar.gz}
    put 755 "$folder/finetune" "$prefix/bin/finetune"
    put 644 "$folder/completions/finetune.bash" "$prefix/share/bash-completion/completions/finetune"
    put 644 "$folder/completions/_finetune" "$prefix/share/zsh/site-functions/_finetune"
    put 644 "$folder/completions/finetune.fish" "$prefix/share/fish/vendor_completions.d/finetune.fish"
    for page in "$folder"/man/man1/*.1; do
        put 644 "$page" "$prefix/share/man/man1/${page##*/}"
    done

    "$prefix/bin/finetune" --version ||
        fail "$prefix/bin/finetune does not run here: with an old glibc, build it (cargo install --locked --path crates/finetune)"
    echo "installed: $prefix/bin/finetune, completions and manual pages in $prefix/share"
    case ":$PATH:" in
        *":$prefix/bin:"*) ;;
        *) echo "$prefix/bin is not in your PATH: export PATH=\"$prefix/bin:\$PATH\"" ;;
    esac
}

fail() {
    echo "install: $*" >&2
    exit 1
}

# fetch URL FILE
fetch() {
    if command -v curl >/dev/null; then
        curl --fail --silent --show-error --location --retry 3 --connect-timeout 20 --output "$2" "$1" || fail "cannot fetch $1"
    elif command -v wget >/dev/null; then
        wget --quiet --tries=3 --timeout=20 --output-document="$2" "$1" || fail "cannot fetch $1"
    else
        fail "needs curl or wget"
    fi
}

checksum() {
    if command -v sha256sum >/dev/null; then sha256sum "$1"; else shasum -a 256 "$1"; fi | cut -d ' ' -f 1
}

# put MODE FROM TO: a running program keeps its old file.
put() {
    mkdir -p "$(dirname "$3")"
    cp "$2" "$3.new"
    chmod "$1" "$3.new"
    mv -f "$3.new" "$3"
}

# Everything is in functions, so that a script that was cut off on its way does nothing.
main "$@"
