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
# mlx.launch ends with 0 whatever its ranks end with: what it says about them is read instead. Nor does it hand a signal
# on: told to stop, this script tells one rank of this machine, and all ranks save and stop together.
set -u
recipe=${1:?usage: mlx-launch.sh RECIPE RUN_DIRECTORY [MLX.LAUNCH OPTIONS]}
run=${2:?usage: mlx-launch.sh RECIPE RUN_DIRECTORY [MLX.LAUNCH OPTIONS]}
shift 2
[ -z "${FINETUNE_TOKEN_FILE:-}" ] || set -- "$@" --env FINETUNE_TOKEN_FILE="$FINETUNE_TOKEN_FILE"
program=$(command -v finetune) || { echo "finetune is not in PATH" >&2; exit 2; } # mlx.launch wants its whole path

folder=$(mktemp -d) || exit 5
trap 'rm -rf "$folder"' EXIT
mkfifo "$folder/stderr" "$folder/stdin" || exit 5
tee "$folder/words" <"$folder/stderr" >&2 &
reader=$!
exec 3<>"$folder/stdin" # never ends: at the end of its input mlx.launch takes a whole processor to look for more
mlx.launch "$@" "$program" run "$recipe" --output-dir "$run" --resume 2>"$folder/stderr" <&3 &
launcher=$!

tell_a_rank() {
    ranks=$(pgrep -P "$launcher" -x finetune) || return
    kill -TERM "${ranks##*
}" # the last one: rank 0 may be the one that saves
}
stopped=
trap 'stopped=143; tell_a_rank' TERM
trap 'stopped=130; tell_a_rank' INT
wait "$launcher"
code=$?
while kill -0 "$launcher" 2>/dev/null; do # a signal ends `wait` early
    wait "$launcher"
    code=$?
done
wait "$reader"
if [ "$code" = 0 ]; then
    # The first rank that ended with something else: mlx.launch stops the others then.
    code=$(sed -n 's/.*Node with rank [0-9]* exited with code \(-\{0,1\}[0-9]*\).*/\1/p' "$folder/words" | head -n 1)
    code=${code:-0}
    [ "$code" -ge 0 ] || code=$((128 - code)) # a signal
fi
[ "$code" = 0 ] || [ -z "$stopped" ] || code=$stopped
exit "$code"
