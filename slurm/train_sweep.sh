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

export ASTROPT_DATA=${ASTROPT_DATA-shards}
size=${SIZES[${SLURM_ARRAY_TASK_ID:-0}]-}
run=${ASTROPT_RUN:-runs}/$size

# A job that is queued again goes on with the scripts of its first start.
cd "${ASTROPT_HOME:-$PWD}" || exit 2
kept=$run/code/${SLURM_JOB_ID:-}/slurm/common.sh
[ -r "$kept" ] || kept=slurm/common.sh
# shellcheck source=slurm/common.sh
source "$kept" || exit 2 # no such file: submit from the repository, or set ASTROPT_HOME

# Check the sizes that are wanted, and submit them grouped by their GPUs: the tasks of an array all
# get the same.
submit() {
  local count index group sizes=("$@")
  [ $# -gt 0 ] || sizes=("${SIZES[@]}")
  for size in "${sizes[@]}"; do
    [[ " ${SIZES[*]} " == *" $size "* ]] ||
      die "$size: no such size; ${SIZES[*]} would be right, after --dry-run"
  done
  prepare
  export DS_ACCELERATOR=cpu # here need be no GPU
  for index in "${!SIZES[@]}"; do
    if wanted "${SIZES[index]}"; then
      echo "${SIZES[index]} on ${GPUS[index]} GPUs"
      size=${SIZES[index]}
      tasks=${GPUS[index]} ASTROPT_CONFIG=$size ASTROPT_RUN=${ASTROPT_RUN:-runs}/$size check
    fi
  done
  for count in $(printf '%s\n' "${GPUS[@]}" | sort -nu); do
    group=""
    for index in "${!SIZES[@]}"; do
      [ "${GPUS[index]}" -ne "$count" ] || ! wanted "${SIZES[index]}" || group+=",$index"
    done
    [ -z "$group" ] || $say sbatch --array="${group#,}" --ntasks-per-node="$count" \
      --gpus-per-node="$count" slurm/train_sweep.sh
  done
}

wanted() {
  [[ " ${sizes[*]} " == *" $1 "* ]]
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
[ -n "$size" ] || die "--array: $SLURM_ARRAY_TASK_ID is no size; 0-$((${#SIZES[@]} - 1)) would be right"
export ASTROPT_CONFIG=$size ASTROPT_RUN=$run
train "$@"
