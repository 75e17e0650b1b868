#!/bin/sh
# torchrun: one rank per worker. The same command on every machine:
#
#     torchrun.sh recipe.toml runs/support-bot --nproc-per-node 4                                       one machine
#     torchrun.sh recipe.toml /shared/runs/support-bot --nproc-per-node 4 --nnodes 2 \
#         --rdzv-backend c10d --rdzv-endpoint gpu01:29400 --rdzv-id support-bot                         several
#
# What comes after the run directory is for torchrun. On several machines the run directory is on storage that all
# share, and FINETUNE_TOKEN_FILE names a file with the run's token there that only this user reads:
#
#     (umask 077; head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n' > /shared/token)
#
# torchrun starts all ranks again when one fails, whatever its exit code, and itself ends with 1. So what is known to
# be hopeless is found before: `finetune validate` ends with 2 for a bad recipe, model or row.
set -u
recipe=${1:?usage: torchrun.sh RECIPE RUN_DIRECTORY [TORCHRUN OPTIONS]}
run=${2:?usage: torchrun.sh RECIPE RUN_DIRECTORY [TORCHRUN OPTIONS]}
shift 2

finetune --quiet validate "$recipe" >/dev/null || exit

# torchrun hands the signal on but ends with 1 whatever the ranks say, so this script remembers it.
stopped=
trap 'stopped=143; kill -TERM "$launcher"' TERM
trap 'stopped=130; kill -INT "$launcher"' INT
torchrun --no-python --max-restarts "${RESTARTS:-10}" "$@" finetune run "$recipe" --output-dir "$run" --resume &
launcher=$!
wait "$launcher"
code=$?
while kill -0 "$launcher" 2>/dev/null; do # a signal ends `wait` early
    wait "$launcher"
    code=$?
done
[ "$code" = 0 ] || [ -z "$stopped" ] || code=$stopped
exit "$code"
