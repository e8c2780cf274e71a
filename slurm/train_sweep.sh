#!/usr/bin/env bash
# Pretrain the size ladder, a job each on the GPUs that it needs: bash slurm/train_sweep.sh [SIZE...]
# Or all on whole nodes, as one array: sbatch slurm/train_sweep.sh (docs/slurm.md).
#SBATCH --job-name=astropt-sweep
#SBATCH --array=0-7
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A-%a.out
# Account and partition: export SBATCH_ACCOUNT=... SBATCH_PARTITION=...
set -euo pipefail

SIZES=(1m 5m 12m 21m 89m 309m 830m 2100m)
GPUS=(1 1 1 2 4 8 8 8) # of one node

ASTROPT_HOME=${ASTROPT_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
source "$ASTROPT_HOME/slurm/common.sh" ||
  { echo "error: no slurm/common.sh in $ASTROPT_HOME: submit from the repository, or set ASTROPT_HOME" >&2; exit 2; }

# The sizes that are wanted, grouped by their GPUs: the tasks of an array all get the same.
submit() {
  local count index group wanted=" ${*:-${SIZES[*]}} "
  for index in $wanted; do
    [[ " ${SIZES[*]} " == *" $index "* ]] || die "$index: no such size; ${SIZES[*]} would be right"
  done
  for count in $(printf '%s\n' "${GPUS[@]}" | sort -nu); do
    group=""
    for index in "${!SIZES[@]}"; do
      [ "${GPUS[index]}" -ne "$count" ] || [[ "$wanted" != *" ${SIZES[index]} "* ]] || group+=",$index"
    done
    [ -z "$group" ] || $say sbatch --array="${group#,}" --ntasks-per-node="$count" \
      --gpus-per-node="$count" "$0"
  done
}

say=""
if [ "${1:-}" = --dry-run ]; then
  say="echo would run:"
  shift
fi
if [ -n "$say" ] || [ -z "${SLURM_ARRAY_TASK_ID:-}" ]; then
  submit "$@"
  exit
fi
export ASTROPT_CONFIG=${SIZES[SLURM_ARRAY_TASK_ID]}
export ASTROPT_DATA=${ASTROPT_DATA-shards}
export ASTROPT_RUN=${ASTROPT_RUN:-runs}/$ASTROPT_CONFIG
train "$@"
