#!/usr/bin/env bash
# check_preemption.sh - a run of recipes/engines/slurm.sbatch is preempted, goes back into the queue
# and goes on.
#
#   slurm-here.sh --netns -n 2 -- check_preemption.sh recipe.toml run
#
# The recipe needs steps enough to be interrupted: it is preempted after its first ten. Two nodes
# with two ranks each. Exit code 0 if the job was restarted once and completed; its log goes to
# stderr.
set -euo pipefail
recipe=$1 run=$2
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

fail() {
    echo "check_preemption: $*" >&2
    cat "$log" >&2 || true
    exit 1
}

log=$run.log
job=$(sbatch --parsable --output="$log" --nodes=2 --ntasks-per-node=2 --cpus-per-task=2 \
    "$here/../recipes/engines/slurm.sbatch" "$recipe" "$run")
for ((try = 0; try < 300; try++)); do
    [ "$(cat "$run/metrics.jsonl" 2>/dev/null | wc -l)" -lt 10 ] || break
    sleep 0.1
done
[ "$try" -lt 300 ] || fail "no step was trained"
sbatch --wait --partition=urgent --nodes=2 --exclusive --output=/dev/null --wrap true >/dev/null
state=
for ((try = 0; try < 300; try++)); do
    state=$(scontrol --oneliner show job "$job" | sed -n 's/.* JobState=\([A-Z]*\) .* Restarts=\([0-9]*\) .*/\1 \2/p')
    case $state in COMPLETED* | FAILED* | CANCELLED* | TIMEOUT*) break ;; esac
    sleep 0.1
done
cat "$log" >&2
[ "$state" = "COMPLETED 1" ] || fail "the job is $state (state, restarts)"
