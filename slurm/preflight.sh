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

ASTROPT_HOME=${ASTROPT_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}
source "$ASTROPT_HOME/slurm/common.sh" ||
  { echo "error: no slurm/common.sh in $ASTROPT_HOME: submit from the repository, or set ASTROPT_HOME" >&2; exit 2; }

prepare
command=(python tools/preflight.py --config "${ASTROPT_CONFIG:-2100m}"
  "data.path=${ASTROPT_DATA-shards}" "run.dir=${ASTROPT_RUN:-runs/2100m}" "${overrides[@]}")
if is_dry_run "$@"; then
  echo "would run: ${step[*]} ${command[*]}"
  exit
fi
launch "${command[@]}" "$@" # --least, --timeout
exit "$status"
