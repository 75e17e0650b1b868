#!/bin/sh
# Open MPI: one rank per process.
#
#     mpirun.sh recipe.toml runs/support-bot -np 4                                            on this machine
#     MASTER_ADDR=gpu01 mpirun.sh recipe.toml /shared/runs/support-bot --hostfile hosts -np 8   on several
#
# What comes after the run directory is for mpirun. On several machines MASTER_ADDR names the one of rank 0 (the first
# of the hostfile), and the run directory is on storage that all share. Starts again where that can help, at most
# $RESTARTS times.
set -u
recipe=${1:?usage: mpirun.sh RECIPE RUN_DIRECTORY [MPIRUN OPTIONS]}
run=${2:?usage: mpirun.sh RECIPE RUN_DIRECTORY [MPIRUN OPTIONS]}
shift 2
restarts=${RESTARTS:-10}
program=$(command -v finetune) || { echo "finetune is not in PATH" >&2; exit 2; } # at the same path on all machines

# The token that lets a process join this run: a file that only this user reads. Its name may be seen, its content not.
mkdir -p "$(dirname "$run")"
FINETUNE_TOKEN_FILE=$(cd "$(dirname "$run")" && pwd)/.$(basename "$run").token-$$
export FINETUNE_TOKEN_FILE
(umask 077 && head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n' >"$FINETUNE_TOKEN_FILE") || exit 5
trap 'rm -f "$FINETUNE_TOKEN_FILE"' EXIT

# mpirun hands the signal on but ends with 1 whatever the ranks say, so this script remembers it.
stopped=
trap 'stopped=143; kill -TERM "$launcher"' TERM
trap 'stopped=130; kill -INT "$launcher"' INT
while :; do
    # Ranks that are told to stop save first: 20 seconds for that instead of one. When mpirun ends a job it waits so long
    # before it tells them, and so long after: after a failure too.
    mpirun --mca odls_base_sigkill_timeout 20 -x FINETUNE_TOKEN_FILE ${MASTER_ADDR:+-x MASTER_ADDR} "$@" \
        "$program" run "$recipe" --output-dir "$run" --resume &
    launcher=$!
    wait "$launcher"
    code=$? # that of the first rank that failed: mpirun ends the others
    while kill -0 "$launcher" 2>/dev/null; do # a signal ends `wait` early
        wait "$launcher"
        code=$?
    done
    [ "$code" = 0 ] || [ -z "$stopped" ] || code=$stopped
    case $code in
    # A rank was lost; killed. The same command may succeed.
    3 | 137) [ "$restarts" -gt 0 ] || exit "$code" ;;
    # 0 done. 1 a bug, or mpirun's own; 2 bad input; 4 loss not finite; 5 disk or memory full; 130, 143 told to stop.
    *) exit "$code" ;;
    esac
    restarts=$((restarts - 1))
    echo "exit code $code: starting again ($restarts restarts left)" >&2
    sleep 5
done
