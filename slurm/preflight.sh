#!/usr/bin/env bash
# See whether nodes are fit, a line each: sbatch slurm/preflight.sh (docs/slurm.md).
#SBATCH --job-name=astropt-preflight
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=00:15:00
#SBATCH --output=%x-%j.out
# Account and partition: export SBATCH_ACCOUNT=... SBATCH_PARTITION=...
set -euo pipefail

export ASTROPT_DATA=${ASTROPT_DATA-shards}

cd "${ASTROPT_HOME:-$PWD}" || exit 2
source slurm/common.sh || exit 2 # no such file: submit from the repository, or set ASTROPT_HOME

prepare
command=(python tools/preflight.py --config "${ASTROPT_CONFIG:-2100m}"
  "${data[@]}" "run.dir=${ASTROPT_RUN:-runs/2100m}" "${overrides[@]}")
if is_dry_run "$@"; then
  echo "would run: ${step[*]} ${command[*]}"
  exit
fi
launch "${command[@]}" "$@" # --least, --timeout
exit "$status"
