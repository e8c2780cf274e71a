"""sbatch slurm/train_2b.sh on a real Slurm: it trains, and goes on whatever ends it."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.conftest import REPOSITORY
from tests.distributed.runs import damage, events, losses, records, wait_for_step
from tests.slurm.conftest import NODES

pytestmark = pytest.mark.needs("slurm")
SCRIPT = "train_2b.sh"
COURSE = ("run.steps=90", "checkpoint.every=30", "eval.every=30", "health.pace_every=30")
WHOLE = (*COURSE, "schedule.decay_until=90")


def tasks_of(job):
    """The processes of a job's ranks, the first first."""
    found = {}
    for process in psutil.process_iter(["cmdline", "environ"]):
        given, command = process.info["environ"] or {}, process.info["cmdline"] or [""]
        mine = given.get("SLURM_JOB_ID") == job and "astropt_ds.train" in command
        if mine and Path(command[0]).name.startswith("python"):
            found[int(given["SLURM_PROCID"])] = process
    return [found[rank] for rank in sorted(found)]


def processes_of(job):
    return [
        process
        for process in psutil.process_iter(["environ"])
        if (process.info["environ"] or {}).get("SLURM_JOB_ID") == job
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("slurm")


@pytest.fixture(scope="module")
def noted(folder):
    """What makes ranks note their galaxies, in a folder of the job: words before python."""
    program = REPOSITORY / "tests" / "distributed" / "torture_train.py"
    script = folder / "noted"
    script.write_text(
        f"""#!/bin/sh
        if [ "$2 $3" = "-m astropt_ds.train" ]; then
            shift 3; mkdir -p {folder}/notes-$SLURM_JOB_ID
            set -- python {program} {folder}/notes-$SLURM_JOB_ID "$@"
        fi
        exec "$@"
        """
    )
    script.chmod(0o755)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {"ASTROPT_CONTAINER": str(script), "PATH": path}


def galaxies(folder, job):
    """{(rank, step): sample numbers} of all starts of a job."""
    found = {}
    for path in (folder / f"notes-{job}").iterdir():
        for line in path.read_text().splitlines():
            note = json.loads(line)
            key = path.name.split("-")[0], note["step"]
            assert key not in found  # none is consumed twice
            found[key] = note["rows"]
    return found


@pytest.fixture(scope="module")
def whole(cluster, submit, folder, noted):
    """A run that nothing disturbs, submitted from a shell that was a rank of another."""
    job = submit(SCRIPT, folder / "whole", *WHOLE, **noted, RANK="0", MASTER_ADDR="nowhere")
    assert cluster.wait_for_end(job) == "COMPLETED", (folder / "whole.log").read_text()
    return folder / "whole", job


def test_two_nodes_train_validate_and_complete(whole):
    run = whole[0]
    assert [r["step"] for r in records(run)] == list(range(1, 91))
    assert [r["step"] for r in records(run, "val")] == [0, 30, 60, 90]
    assert events(run, "pace")[0]["host"] == ["astro1", "astro2"]
    assert (run / "complete").exists() and damage(run / "checkpoints" / "step-00000090") is None


def test_the_code_and_configuration_that_ran_are_kept(whole):
    run, job = whole
    kept = run / "code" / job
    assert (kept / "astropt_ds" / "train.py").exists()
    assert "steps: 90" in (kept / "config.yaml").read_text()
    known = json.loads((run / "environment.json").read_text())
    assert known["commit"] == (kept / "commit").read_text().strip()


def test_a_signal_saves_requeues_and_the_same_job_goes_on_with_the_same_code(
    cluster, submit, folder, whole, noted
):
    """And another job on the same nodes notices nothing."""
    run, home = folder / "signal", folder / "checkout"
    for name in ("astropt_ds", "ds_configs", "slurm", "tools"):
        shutil.copytree(REPOSITORY / name, home / name, symlinks=True)
    shutil.copy(REPOSITORY / "pyproject.toml", home)
    job = submit(SCRIPT, run, *WHOLE, **noted, ASTROPT_HOME=str(home))
    other = submit(SCRIPT, folder / "other", *WHOLE)
    wait_for_step(run, 20)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    cluster.wait_for(lambda: cluster.job(job)["Restarts"] == "1")
    for file in ("astropt_ds/train.py", "slurm/common.sh"):
        (home / file).write_text("a checkout in the middle of an edit (")
    assert "saved at step" in (run / "requeue").read_text()
    assert cluster.wait_for_end(job) == "COMPLETED"
    assert len(events(run, "start")) == 2 and losses(run) == losses(whole[0])
    assert galaxies(folder, job) == galaxies(folder, whole[1])
    log = run.with_suffix(".log").read_text()  # appended to
    assert "USR1" in log and "starting at step 0" in log and "complete at step 90" in log

    assert cluster.wait_for_end(other) == "COMPLETED"
    times = [[r["time"] for r in records(folder / name)] for name in ("signal", "other")]
    assert times[0][0] < times[1][-1] and times[1][0] < times[0][-1]  # at once
    assert len(events(folder / "other", "start")) == 1
    assert losses(folder / "other") == losses(whole[0])


def test_scancel_leaves_no_process_and_a_checkpoint_that_one_node_goes_on_from(
    cluster, submit, folder, whole
):
    run = folder / "cancelled"
    job = submit(SCRIPT, run, *WHOLE)
    wait_for_step(run, 20)
    cluster.run("scancel", job)
    assert cluster.wait_for_end(job) == "CANCELLED"
    assert not processes_of(job)
    saved = run / "checkpoints" / (run / "latest").read_text().strip()
    assert damage(saved) is None and not (run / "complete").exists()
    one, stage = ("--nodes=1", *NODES[1:]), folder / "disk" / "shards"
    again = submit(SCRIPT, run, *WHOLE, options=one, ASTROPT_STAGE=str(stage))
    assert cluster.wait_for_end(again) == "COMPLETED", run.with_suffix(".log").read_text()
    assert f"path: {stage}" in (run / "config.yaml").read_text()  # read from the node's own disk
    np.testing.assert_allclose(losses(run), losses(whole[0]), atol=1e-5)


def test_the_death_of_a_rank_ends_the_step_on_all_nodes_and_the_job_requeues_on_one(
    cluster, submit, folder, whole
):
    run = folder / "killed"
    job = submit(SCRIPT, run, *WHOLE)
    wait_for_step(run, 35)
    ranks = tasks_of(job)
    assert len(ranks) == 2
    ranks[1].send_signal(signal.SIGKILL)
    assert not psutil.wait_procs(ranks, timeout=30)[1]
    cluster.wait_for(lambda: cluster.job(job)["JobState"] == "PENDING", 30)
    cluster.run("scontrol", "update", f"JobId={job}", "NumNodes=1-1", "NumTasks=1", "NumCPUs=1")
    assert cluster.wait_for_end(job) == "COMPLETED", run.with_suffix(".log").read_text()
    assert cluster.job(job)["NumNodes"] == "1"
    np.testing.assert_allclose(losses(run), losses(whole[0]), atol=1e-5)
    assert "resuming" in events(run, "start")[-1]["text"]


@pytest.mark.parametrize("node", ["astro1", pytest.param("astro2", marks=pytest.mark.slow)])
def test_a_node_that_dies_and_comes_back(cluster, submit, folder, whole, node):
    """The first has the batch script, too."""
    run = folder / node
    job = submit(SCRIPT, run, *WHOLE)
    wait_for_step(run, 35)
    cluster.kill_node(node)
    cluster.wait_for(lambda: cluster.job(job)["Restarts"] == "1")
    cluster.start_node(node)
    assert cluster.wait_for_end(job) == "COMPLETED", run.with_suffix(".log").read_text()
    assert [r["step"] for r in records(run)] == list(range(1, 91))
    assert losses(run) == losses(whole[0])


@pytest.mark.parametrize(
    "name, fault",
    [
        ("crash", "exit 7"),
        # as where --time is not longer than --signal; the save hangs
        ("hang", "trap '' USR1; scancel --batch --signal=USR1 $SLURM_JOB_ID; sleep 60"),
    ],
)
def test_a_run_that_gets_nowhere_stops_after_three_starts(cluster, submit, folder, name, fault):
    script = folder / name  # of the tasks alone, not of what the batch script looks at first
    script.write_text(f'#!/bin/sh\n[ -z "$SLURM_STEP_NUM_TASKS" ] || {{ {fault}; }}\nexec "$@"\n')
    script.chmod(0o755)
    run = folder / f"run-{name}"
    environment = {"ASTROPT_CONTAINER": str(script), "ASTROPT_PATIENCE": "1"}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    job = submit(SCRIPT, run, *WHOLE, **environment, PATH=path)
    assert cluster.wait_for_end(job) == "FAILED"
    log = run.with_suffix(".log").read_text()
    assert "no new checkpoint after 3 starts" in log, log
    assert cluster.job(job)["Restarts"] == "2"
    assert not processes_of(job)


@pytest.mark.parametrize(
    "more, words",
    [
        ({"ASTROPT_DATA": "/nowhere"}, "/nowhere"),
        ({"ASTROPT_DATA": "", "ASTROPT_STAGE": "/tmp/stage"}, "data.path is missing"),
        ({"ASTROPT_VENV": "/nowhere"}, "ASTROPT_VENV=/nowhere: no Python environment"),
        ({"ASTROPT_CONFIG": "3b"}, "--config 3b: no such preset"),
        ({"ASTROPT_GPU_GB": "0.0001"}, "2 GPUs of 0.0001 GB are too few"),
        ({"ASTROPT_SETUP": "/nowhere"}, "ASTROPT_SETUP=/nowhere"),
        ({"ASTROPT_HOME": "/nowhere"}, "/nowhere: No such file"),
        ({"ASTROPT_CONTAINER": "nosuch run"}, "ASTROPT_CONTAINER=nosuch run: no python there"),
        ({"ASTROPT_GPU_GB": "80GB"}, "ASTROPT_GPU_GB=80GB: a number"),
        ({"ASTROPT_OVERRIDES": "run.dir=runs/1m"}, "ASTROPT_RUN would be right"),
        ({"ASTROPT_RUN": "/etc/hostname/run"}, "run.dir=/etc/hostname/run: no folder can be made"),
        ({"ASTROPT_ACCELERATOR": "gpu"}, "ASTROPT_ACCELERATOR=gpu: cuda or cpu"),
        ({"ASTROPT_ACCELERATOR": "cuda", "CUDA_VISIBLE_DEVICES": ""}, "torch sees no GPU"),
    ],
)
def test_wrong_use_fails_in_the_first_seconds_with_one_line(cluster, submit, folder, more, words):
    run = folder / f"wrong-{'-'.join(more)}-{len(words)}"
    job = submit(SCRIPT, run, *WHOLE, **more)
    assert cluster.wait_for_end(job, 40) == "FAILED"
    log = run.with_suffix(".log").read_text()
    assert words in log and "Traceback" not in log, log
    assert cluster.job(job)["Restarts"] == "0" and not run.exists()


def test_more_tasks_than_gpus_are_refused(cluster, submit, folder):
    run, options = folder / "crowded", ("--nodes=1", "--ntasks-per-node=2", *NODES[2:])
    job = submit(SCRIPT, run, *WHOLE, options=options)
    assert cluster.wait_for_end(job, 40) == "FAILED"
    assert "2 tasks and 1 GPUs on a node" in run.with_suffix(".log").read_text()
