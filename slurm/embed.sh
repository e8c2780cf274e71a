#!/usr/bin/env bash
# Embed a catalogue by an array of tasks that share one table (docs/slurm.md):
# sbatch slurm/embed.sh --model runs/2100m --data shards --output table [options of tools/embed.py]
#SBATCH --job-name=astropt-embed
#SBATCH --array=0-7
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A-%a.out
# Account and partition: export SBATCH_ACCOUNT=... SBATCH_PARTITION=...
set -euo pipefail

: "${ASTROPT_PATIENCE:=90}" # see common.sh
cd "${ASTROPT_HOME:-$PWD}" || exit 2
source slurm/common.sh || exit 2 # no such file: submit from the repository, or set ASTROPT_HOME

prepare
if is_dry_run "$@"; then
  "${container[@]}" python tools/embed.py "$@"
  echo "would run: ${step[*]} python tools/embed.py ${*:2}"
  exit
fi
launch python tools/embed.py "$@"
case $signalled in
  "" | TERM) exit "$status" ;; # done, or wrong, or Slurm's affair; others do the parts that are left
  *)
    [ "$status" -ne 0 ] || exit 0
    [ "$SECONDS" -gt 120 ] || [ "${SLURM_RESTART_COUNT:-0}" -lt "$STARTS" ] ||
      die "$signalled $SECONDS s after a start, once more; a --time far beyond --signal's would be right"
    requeue "stopped"
    ;;
esac
