#!/bin/sh
# mlx.launch: one rank per host of an MLX hostfile, or several here.
#
#     mlx-launch.sh recipe.toml runs/support-bot -n 2                                    on this machine
#     FINETUNE_TOKEN_FILE=/shared/token mlx-launch.sh recipe.toml /shared/runs/support-bot \
#         --hostfile hosts.json --backend jaccl                                          RDMA over Thunderbolt
#
# What comes after the run directory is for mlx.launch; the same hostfile serves `finetune launch --hostfile`, which
# needs no Python and makes the token itself. With several hosts FINETUNE_TOKEN_FILE names a file that each host has
# at that path and only this user reads; that name, not the token, is handed to them. The run directory is rank 0's.
#
# mlx.launch ends with 0 whatever its ranks end with. What it says about them is read instead.
set -u
recipe=${1:?usage: mlx-launch.sh RECIPE RUN_DIRECTORY [MLX.LAUNCH OPTIONS]}
run=${2:?usage: mlx-launch.sh RECIPE RUN_DIRECTORY [MLX.LAUNCH OPTIONS]}
shift 2
[ -z "${FINETUNE_TOKEN_FILE:-}" ] || set -- "$@" --env FINETUNE_TOKEN_FILE="$FINETUNE_TOKEN_FILE"
program=$(command -v finetune) || { echo "finetune is not in PATH" >&2; exit 2; } # mlx.launch wants its whole path

words=$(mktemp) && pipe=$(mktemp -u) && mkfifo "$pipe" || exit 5
trap 'rm -f "$words" "$pipe"' EXIT
tee "$words" <"$pipe" >&2 &
reader=$!
mlx.launch "$@" "$program" run "$recipe" --output-dir "$run" --resume 2>"$pipe"
code=$?
wait "$reader"
if [ "$code" = 0 ]; then
    # The first rank that ended with something else: mlx.launch stops the others then.
    code=$(sed -n 's/.*Node with rank [0-9]* exited with code \(-\{0,1\}[0-9]*\).*/\1/p' "$words" | head -n 1)
    code=${code:-0}
    [ "$code" -ge 0 ] || code=$((128 - code)) # a signal
fi
exit "$code"
