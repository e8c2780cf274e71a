# What the batch scripts have in common; they source it. docs/slurm.md shows how they are used.
# shellcheck shell=bash

die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# What a site sets, all from the environment:
ASTROPT_HOME=$PWD # this repository; relative paths start here
: "${ASTROPT_VENV:=$ASTROPT_HOME/.venv}" # the Python environment
: "${ASTROPT_SETUP:=}"                   # a file to source first: module load, NCCL's interfaces, ...
: "${ASTROPT_CONTAINER:=}"               # words before python: apptainer exec --nv image.sif
: "${ASTROPT_ACCELERATOR:=cuda}"         # cpu rehearses without GPUs
: "${ASTROPT_GPU_GB:=}"                  # memory of a GPU, where there is none to ask
: "${ASTROPT_OVERRIDES:=}"               # of the configuration: run.steps=100 optim.lr=1e-4
: "${ASTROPT_STAGE:=}"                   # a folder on each node's own disk, to train from
: "${ASTROPT_PATIENCE:=480}"             # seconds for a save, less than --signal's; then it is given up

STARTS=3 # without a new checkpoint are a crash loop

prepare() {
  signalled="" started="" timer="" status=75
  # TERM is Slurm's own end of the job, which the tasks hear of by themselves.
  trap 'signalled=TERM' TERM
  trap 'pass_on USR1' USR1
  trap 'pass_on USR2' USR2
  # A shell that was itself a rank has handed these on.
  unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT
  if [ -n "$ASTROPT_SETUP" ]; then
    [ -r "$ASTROPT_SETUP" ] || die "ASTROPT_SETUP=$ASTROPT_SETUP: no file to source"
    set +eu # modules' own scripts are written for less
    # shellcheck source=/dev/null
    source "$ASTROPT_SETUP" || echo "warning: the last command in ASTROPT_SETUP=$ASTROPT_SETUP failed"
    set -eu
  fi
  read -ra container <<<"${ASTROPT_CONTAINER//$'\n'/ }"
  read -ra overrides <<<"${ASTROPT_OVERRIDES//$'\n'/ }"
  [[ " ${overrides[*]}" != *" run.dir="* ]] || die "ASTROPT_OVERRIDES: ASTROPT_RUN would be right for run.dir"
  [[ $ASTROPT_GPU_GB =~ ^[0-9.]*$ ]] || die "ASTROPT_GPU_GB=$ASTROPT_GPU_GB: a number would be right"
  data=(${ASTROPT_DATA:+"data.path=$ASTROPT_DATA"}) # empty: the configuration's own
  if [ ${#container[@]} -eq 0 ]; then
    [ -x "$ASTROPT_VENV/bin/python" ] ||
      die "ASTROPT_VENV=$ASTROPT_VENV: no Python environment; make venv in $ASTROPT_HOME makes one"
    export PATH="$ASTROPT_VENV/bin:$PATH"
  fi
  [[ $ASTROPT_ACCELERATOR =~ ^(cuda|cpu)$ ]] ||
    die "ASTROPT_ACCELERATOR=$ASTROPT_ACCELERATOR: cuda or cpu would be right"
  export DS_ACCELERATOR=$ASTROPT_ACCELERATOR
  # A task's threads are its processors; OpenMP would take all of the node for each.
  export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
  # Since 22.05 srun does not take this over from the job, nor, where sites say so, the environment.
  export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} SLURM_EXPORT_ENV=ALL
  export NCCL_DEBUG=${NCCL_DEBUG:-WARN} # what goes wrong between GPUs is in the log
  # The log shows lines as they are written, and the code is the one that PYTHONPATH names.
  export PYTHONUNBUFFERED=1 PYTHONSAFEPATH=1 PYTHONPATH=$ASTROPT_HOME
  version=$("${container[@]}" python --version) ||
    die "ASTROPT_CONTAINER=$ASTROPT_CONTAINER: no python there"
  [[ $version =~ ^Python\ 3\.(1[1-9]|[2-9].) ]] || die "$version: 3.11 or newer would be right"
  # Not SLURM_NTASKS: it stays as it was when a queued job is given other nodes.
  nodes=${SLURM_JOB_NUM_NODES:-$(asked_for nodes)}
  tasks_per_node=${SLURM_NTASKS_PER_NODE:-$(asked_for ntasks-per-node)}
  tasks=$((nodes * tasks_per_node))
  # One task's death ends all: the others would wait for it. Binding keeps a rank's threads and its
  # reading processes on its own cores.
  step=(srun "--nodes=$nodes" "--ntasks=$tasks" --kill-on-bad-exit=1 --cpu-bind=cores "${container[@]}")
}

# A number in the #SBATCH lines of the script, for use outside a job.
asked_for() {
  sed -n "s/^#SBATCH --$1=\([0-9]*\).*/\1/p" "slurm/${0##*/}"
}

# Whether this is a rehearsal; without --dry-run there must be a job.
is_dry_run() {
  [ "${1:-}" = --dry-run ] && return
  [ -n "${SLURM_JOB_ID:-}" ] || die "no job of Slurm: sbatch $0, or bash $0 --dry-run"
  return 1
}

pass_on() {
  echo "$1 at $(date +%T)${started:+: passed on}"
  signalled=$1
  [ -n "$started" ] || return 0
  kill "-$1" "$started" 2>/dev/null || true
  # One that hangs would take the job with it when its time is up; without srun it is queued again.
  [ -n "$timer" ] || { (sleep "$ASTROPT_PATIENCE" && kill -KILL "$started") >/dev/null 2>&1 & timer=$!; }
}

# Run a command as the job's tasks; its exit code is in $status.
launch() {
  [ -z "$signalled" ] || return 0 # the signal that would end it has come already
  "${step[@]}" "$@" &
  started=$!
  [[ $signalled != USR* ]] || pass_on "$signalled" # it came in between
  # bash runs traps only while it waits, and each one ends the wait
  until wait "$started"; status=$?; ! kill -0 "$started" 2>/dev/null; do :; done
  started=""
  [ -z "$timer" ] || kill "$timer" 2>/dev/null || true
}

requeue() {
  local job=$SLURM_JOB_ID pause
  # one task of an array has the number of the whole
  [ "$job" != "${SLURM_ARRAY_JOB_ID:-}" ] || job+=_$SLURM_ARRAY_TASK_ID
  for pause in 5 30 120 0; do # Slurm's controller may be busy
    echo "$1: to be queued again"
    scontrol requeue "$job" && return
    sleep "$pause"
  done
  die "job $job cannot be queued again, as told above; sbatch with the same environment goes on"
}

# Train until the run is complete: whatever ends an attempt, the marker in the run's folder decides.
train() {
  local code why
  prepare
  [ "${*#--dry-run}" = "" ] || die "$*: ASTROPT_OVERRIDES takes key=value, and --dry-run is all else"
  if is_dry_run "$@"; then
    DS_ACCELERATOR=cpu check # here need be no GPU
    echo "would run: ${step[*]} python -m astropt_ds.train --config RUN/code/JOB/config.yaml"
    exit
  fi
  code=$ASTROPT_RUN/code/$SLURM_JOB_ID
  [ -d "$code" ] || snapshot "$code"
  stage
  rm -f "$ASTROPT_RUN/complete" "$ASTROPT_RUN/requeue"

  PYTHONPATH=$code launch python -m astropt_ds.train --config "$code/config.yaml" "${staged[@]}"

  if [ -f "$ASTROPT_RUN/complete" ]; then
    exit 0
  elif [ "$signalled" = TERM ]; then
    echo "TERM: Slurm ends the job, or has queued it again"
    exit 143
  fi
  why="srun returned $status, and the run is neither complete nor saved to go on"
  if [ -f "$ASTROPT_RUN/requeue" ] || [ -n "$signalled" ]; then
    why=stopped
  fi
  checkpoint >>"$code/ends"
  is_stuck "$code/ends" &&
    die "$why: $ASTROPT_RUN has no new checkpoint after $STARTS starts; the log above tells why"
  requeue "$why"
}

check() {
  "${container[@]}" python tools/check_run.py --ranks "$tasks" \
    ${ASTROPT_GPU_GB:+--gpu-gb "$ASTROPT_GPU_GB"} --config "$ASTROPT_CONFIG" \
    "${data[@]}" "run.dir=$ASTROPT_RUN" "${overrides[@]}" "$@" || exit
}

# Code and configuration stay as they were when the job first started.
snapshot() {
  [ "$tasks_per_node" -le "${SLURM_GPUS_ON_NODE:-$tasks_per_node}" ] ||
    die "$tasks_per_node tasks and $SLURM_GPUS_ON_NODE GPUs on a node; as many would be right"
  rm -rf "$1.partial"
  check --save "$1.partial/config.yaml"
  cp -R astropt_ds ds_configs slurm tools pyproject.toml "$1.partial/"
  (git describe --always --exclude='*' --abbrev=40 --dirty 2>/dev/null || echo unknown) \
    >"$1.partial/commit"
  mv "$1.partial" "$1"
}

# The shards on each node's own disk, where many small reads are fast.
stage() {
  staged=()
  [ -n "$ASTROPT_STAGE" ] || return 0
  [ -d "$ASTROPT_DATA" ] || die "ASTROPT_STAGE: ASTROPT_DATA=$ASTROPT_DATA is no folder to copy"
  # shellcheck disable=SC2016
  srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 \
    bash -c 'mkdir -p "$2" && rsync --archive "$1/" "$2/"' stage "$ASTROPT_DATA" "$ASTROPT_STAGE" ||
    die "ASTROPT_STAGE=$ASTROPT_STAGE: $ASTROPT_DATA could not be copied there"
  staged=("data.path=$ASTROPT_STAGE")
}

checkpoint() {
  cat "$ASTROPT_RUN/latest" 2>/dev/null || echo none
}

# Whether so many starts in a row ended with the checkpoint that is still the newest.
is_stuck() {
  [ "$(tail -n "$STARTS" "$1" | grep -cxF "$(checkpoint)")" -ge "$STARTS" ]
}
