#!/usr/bin/env bash
# Prints the environment in which GPU tests run on Mesa's lavapipe: a Vulkan driver that computes on
# the CPU.
#
#   eval "$(scripts/lavapipe/setup.sh DIR)"     # DIR: where the layer is built, such as target/lavapipe
#   scripts/lavapipe/setup.sh --check           # exit 0 if everything that it needs is installed
#
# Needs mesa-vulkan-drivers, libvulkan1, libvulkan-dev (for the layer, see layer.c) and a C
# compiler.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)

driver=
for candidate in /usr/share/vulkan/icd.d/lvp_icd*.json; do
    [ -e "$candidate" ] && driver=$candidate
done
if [ "${1:-}" = --check ]; then
    [ -n "$driver" ] && [ -e /usr/include/vulkan/vk_layer.h ] && ldconfig -p | grep -q libvulkan.so.1
    exit
fi
[ -n "$driver" ] || { echo "no lavapipe driver: install mesa-vulkan-drivers" >&2; exit 1; }

mkdir -p "${1:?a directory}"
out=$(cd "$1" && pwd)
cc -O1 -shared -fPIC -fvisibility=hidden -o "$out/liblayer.so" "$here/layer.c"
cat >"$out/layer.json" <<JSON
{"file_format_version": "1.2.0", "layer": {"name": "VK_LAYER_FINETUNE_no_device_address", "type": "GLOBAL",
 "library_path": "$out/liblayer.so", "api_version": "1.3.0", "implementation_version": "1",
 "description": "Hides buffer device addresses"}}
JSON
mkdir -p "$out/runtime"
cat <<SH
export VK_DRIVER_FILES='$driver' VK_ICD_FILENAMES='$driver' VK_LAYER_PATH='$out' VK_INSTANCE_LAYERS=VK_LAYER_FINETUNE_no_device_address
export XDG_RUNTIME_DIR='$out/runtime'
SH
