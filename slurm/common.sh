# What the batch scripts have in common; they source it. docs/slurm.md shows how they are used.
# shellcheck shell=bash

# What a site sets, all from the environment:
: "${ASTROPT_VENV:=$ASTROPT_HOME/.venv}" # the Python environment
: "${ASTROPT_SETUP:=}"                   # a file to source first: module load, NCCL's interfaces, ...
: "${ASTROPT_CONTAINER:=}"               # words before python: apptainer exec --nv image.sif
: "${ASTROPT_ACCELERATOR:=cuda}"         # cpu rehearses without GPUs
: "${ASTROPT_GPU_GB:=}"                  # memory of a GPU, where the login node has none to ask
: "${ASTROPT_OVERRIDES:=}"               # of the configuration: run.steps=100 optim.lr=1e-4
: "${ASTROPT_STAGE:=}"                   # a folder on each node's own disk, to train from

STARTS=3 # without a new checkpoint in between are a crash loop

die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

prepare() {
  cd "$ASTROPT_HOME" || die "ASTROPT_HOME=$ASTROPT_HOME: no such folder"
  if [ -n "$ASTROPT_SETUP" ]; then
    [ -r "$ASTROPT_SETUP" ] || die "ASTROPT_SETUP=$ASTROPT_SETUP: no file to source"
    # shellcheck source=/dev/null
    source "$ASTROPT_SETUP"
  fi
  read -ra container <<<"$ASTROPT_CONTAINER"
  read -ra overrides <<<"$ASTROPT_OVERRIDES"
  if [ ${#container[@]} -eq 0 ]; then
    [ -x "$ASTROPT_VENV/bin/python" ] ||
      die "ASTROPT_VENV=$ASTROPT_VENV: no Python environment; make venv in $ASTROPT_HOME makes one"
    export PATH="$ASTROPT_VENV/bin:$PATH"
  fi
  export DS_ACCELERATOR=$ASTROPT_ACCELERATOR
  # A task's threads are its processors; OpenMP would take all of the node for each.
  export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
  # Since 22.05 srun does not take this over from the job.
  export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
  # A rank whose peer is gone raises instead of waiting in NCCL; what went wrong there is in the log.
  export TORCH_NCCL_ASYNC_ERROR_HANDLING=1 NCCL_DEBUG=${NCCL_DEBUG:-WARN}
  # The log shows lines as they are written, and the code is the one that PYTHONPATH names.
  export PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1
  "${container[@]}" python -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    die "$("${container[@]}" python --version): 3.11 or newer would be right"
  # Not SLURM_NTASKS: it stays as it was when a queued job is given other nodes.
  nodes=${SLURM_JOB_NUM_NODES:-$(asked_for nodes)}
  tasks=$((nodes * ${SLURM_NTASKS_PER_NODE:-$(asked_for ntasks-per-node)}))
  signalled="" started=""
  # TERM is Slurm's own end of the job, which the tasks hear of by themselves.
  trap 'signalled=TERM' TERM
  trap 'pass_on USR1' USR1
  trap 'pass_on USR2' USR2
}

pass_on() {
  signalled=$1
  echo "$1 at $(date +%T): passed on"
  [ -z "$started" ] || kill "-$1" "$started" 2>/dev/null || true
}

# Run a command as the job's tasks; its exit code is in $status.
launch() {
  # One task's death ends all: the others would wait for it. Binding keeps a rank's threads and its
  # reading processes on its own cores.
  srun --nodes="$nodes" --ntasks="$tasks" --kill-on-bad-exit=1 --cpu-bind=cores \
    "${container[@]}" "$@" &
  started=$!
  # bash runs traps only while it waits, and each one ends the wait
  until wait "$started"; status=$?; ! kill -0 "$started" 2>/dev/null; do :; done
  started=""
}

requeue() {
  echo "$1: queued again"
  scontrol requeue "$SLURM_JOB_ID" ||
    die "job $SLURM_JOB_ID may not be requeued; sbatch with the same environment goes on"
}

# Train until the run is complete: whatever ends an attempt, the marker in the run's folder decides.
train() {
  [ $# -eq 0 ] || [ "$*" = --dry-run ] || die "$*: only --dry-run is known; ASTROPT_OVERRIDES takes key=value"
  [ $# -gt 0 ] || [ -n "${SLURM_JOB_ID:-}" ] || die "no job of Slurm: sbatch $0, or bash $0 --dry-run"
  prepare
  local code data=()
  [ -z "${ASTROPT_DATA:-}" ] || data=("data.path=$ASTROPT_DATA")
  [ "$ASTROPT_ACCELERATOR" != cuda ] || check_gpus
  PYTHONPATH=$ASTROPT_HOME "${container[@]}" python tools/check_run.py \
    --ranks "$tasks" ${ASTROPT_GPU_GB:+--gpu-gb "$ASTROPT_GPU_GB"} --config "$ASTROPT_CONFIG" \
    "${data[@]}" "run.dir=$ASTROPT_RUN" "${overrides[@]}" --save "${resolved:=$(mktemp)}" || exit
  if [ $# -gt 0 ]; then
    echo "would run: srun --nodes=$nodes --ntasks=$tasks --kill-on-bad-exit=1 --cpu-bind=cores" \
      "${container[*]} python -m astropt_ds.train --config $ASTROPT_CONFIG ${data[*]}" \
      "run.dir=$ASTROPT_RUN ${overrides[*]}"
    exit
  fi
  code=$ASTROPT_RUN/code/$SLURM_JOB_ID
  [ -d "$code" ] || snapshot "$code"
  export PYTHONPATH=$code
  stage
  is_stuck "$code" && die "$ASTROPT_RUN: $STARTS starts without a new checkpoint; the log above tells why"
  checkpoint >>"$code/starts"
  rm -f "$ASTROPT_RUN/requeue"

  launch python -m astropt_ds.train --config "$code/config.yaml" "${staged[@]}"

  if [ -f "$ASTROPT_RUN/complete" ]; then
    exit 0
  elif [ "$signalled" = TERM ]; then
    echo "TERM: Slurm ends the job, or has queued it again"
    exit 143
  elif is_stuck "$code"; then
    die "$ASTROPT_RUN: $STARTS starts without a new checkpoint; the log above tells why"
  elif [ -f "$ASTROPT_RUN/requeue" ]; then
    requeue "saved"
  else
    requeue "srun returned $status without a word of the run's"
  fi
}

# A number in the #SBATCH lines of the script, for use outside a job.
asked_for() {
  sed -n "s/^#SBATCH --$1=\([0-9]*\).*/\1/p" "$0"
}

check_gpus() {
  local gpus=${SLURM_GPUS_ON_NODE:-} tasks=${SLURM_NTASKS_PER_NODE:-}
  [ -z "$gpus" ] || [ -z "$tasks" ] || [ "$tasks" -le "$gpus" ] ||
    die "$tasks tasks and $gpus GPUs on a node; --ntasks-per-node=$gpus would be right"
}

# Code and configuration stay as they were when the job first started, whatever becomes of the checkout.
snapshot() {
  rm -rf "$1.partial"
  mkdir -p "$1.partial" || die "ASTROPT_RUN=$ASTROPT_RUN: no folder can be made there"
  cp -R astropt_ds ds_configs slurm tools pyproject.toml "$1.partial/"
  cp "$resolved" "$1.partial/config.yaml"
  (git describe --always --abbrev=40 --dirty 2>/dev/null || echo unknown) >"$1.partial/commit"
  mv "$1.partial" "$1"
}

# The shards on each node's own disk, where many small reads are fast.
stage() {
  staged=()
  [ -n "$ASTROPT_STAGE" ] || return 0
  # shellcheck disable=SC2016
  srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 \
    bash -c 'mkdir -p "$2" && rsync --archive "$1/" "$2/"' stage "$ASTROPT_DATA" "$ASTROPT_STAGE" ||
    die "ASTROPT_STAGE=$ASTROPT_STAGE: $ASTROPT_DATA could not be copied there"
  staged=("data.path=$ASTROPT_STAGE")
}

checkpoint() {
  cat "$ASTROPT_RUN/latest" 2>/dev/null || echo none
}

# Whether so many starts in a row began with the checkpoint that is still the newest.
is_stuck() {
  local last
  last=$(tail -n "$STARTS" "$1/starts" 2>/dev/null | grep -cxF "$(checkpoint)")
  [ "$last" -ge "$STARTS" ]
}
