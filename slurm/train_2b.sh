#!/usr/bin/env bash
# Pretrain the 2.1B model: sbatch slurm/train_2b.sh, from the repository's folder (docs/slurm.md).
#SBATCH --job-name=astropt-2b
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# Account and partition: export SBATCH_ACCOUNT=... SBATCH_PARTITION=...
set -euo pipefail

export ASTROPT_CONFIG=${ASTROPT_CONFIG:-2100m}
export ASTROPT_DATA=${ASTROPT_DATA-shards}
export ASTROPT_RUN=${ASTROPT_RUN:-runs/2100m}

# A job that is queued again goes on with the scripts of its first start.
cd "${ASTROPT_HOME:-$PWD}" || exit 2
kept=$ASTROPT_RUN/code/${SLURM_JOB_ID:-}/slurm/common.sh
[ -r "$kept" ] || kept=slurm/common.sh
# shellcheck source=slurm/common.sh
source "$kept" || exit 2 # no such file: submit from the repository, or set ASTROPT_HOME
train "$@"
