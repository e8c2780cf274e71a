"""Arrays on a real Slurm: sizes side by side on the same nodes, one table by many tasks."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from astropt_ds import read_embeddings, save_model
from astropt_ds.config_source import load_config
from astropt_ds.model import AstroPT
from tests.conftest import REPOSITORY
from tests.distributed.runs import damage, events, records, wait_for_step
from tests.slurm.conftest import NODES

pytestmark = pytest.mark.needs("slurm")
SIZES = {0: "1m", 3: "21m"}


def logs(folder):
    return "".join(path.read_text() for path in folder.glob("*.log"))


def test_the_sizes_train_side_by_side_and_each_is_requeued_alone(cluster, submit, tmp_path):
    run = tmp_path / "ladder"
    options = (*NODES, "--array=0,3")
    job = submit("train_sweep.sh", run, "run.steps=80", options=options)
    wait_for_step(run / "21m", 5)  # the last task, whose number is that of the array
    cluster.run("scancel", "--batch", "--signal=USR2", f"{job}_3")
    assert cluster.wait_for_end(job) == "COMPLETED", logs(tmp_path)
    times = []
    for size in SIZES.values():
        assert [r["step"] for r in records(run / size)] == list(range(1, 81)), logs(tmp_path)
        assert (run / size / "complete").exists()
        assert damage(run / size / "checkpoints" / "step-00000080") is None
        assert "2 x cpu" in events(run / size, "start")[0]["text"]
        assert len(events(run / size, "start")) == 1 + (size == "21m")
        steps = [r["time"] for r in records(run / size, "event")]
        times.append((min(steps), max(steps)))
    assert max(first for first, _ in times) < min(last for _, last in times)  # at once


def sweep(arguments, shards, path="/usr/bin:/bin"):
    """``bash slurm/train_sweep.sh`` where one logs in."""
    given = {
        "ASTROPT_VENV": str(Path(sys.executable).parent.parent),
        "ASTROPT_DATA": str(shards),
        "ASTROPT_OVERRIDES": "data.image_size=64",
        "PATH": path,
    }
    return subprocess.run(
        ["bash", "slurm/train_sweep.sh", *arguments],
        cwd=REPOSITORY, env=given, capture_output=True, text=True,
    )  # fmt: skip


def test_each_size_is_submitted_with_the_gpus_it_needs(shards, tmp_path):
    sbatch = tmp_path / "sbatch"
    sbatch.write_text('#!/bin/sh\necho "$@" >> "$(dirname "$0")/seen"\n')
    sbatch.chmod(0o755)
    done = sweep(["1m", "21m", "830m", "2100m"], shards, f"{tmp_path}:/usr/bin:/bin")
    assert done.returncode == 0, done.stderr
    assert "320 images = 2 ranks x" in done.stdout and "320 images = 8 ranks x" in done.stdout
    found = re.findall(
        r"--array=(\S+) --ntasks-per-node=(\d) --gpus", (tmp_path / "seen").read_text()
    )
    assert found == [("0", "1"), ("3", "2"), ("6,7", "8")]


def test_what_could_not_run_is_not_submitted(shards):
    for arguments, data, words in (
        (["3b"], shards, "3b: no such size; 1m 5m"),
        (["--dry-run", "1m"], "nowhere", "nowhere"),
    ):
        done = sweep(arguments, data)
        assert done.returncode == 2 and words in done.stderr and "sbatch" not in done.stdout


def test_a_task_beyond_the_sizes_is_refused(cluster, submit, tmp_path):
    job = submit("train_sweep.sh", tmp_path / "run", options=(*NODES, "--array=9"))
    assert cluster.wait_for_end(job) == "FAILED"
    assert "--array: 9 is no size; 0-7 would be right" in logs(tmp_path)


def test_an_array_of_tasks_makes_one_table_and_a_signal_requeues_one(
    cluster, submit, shards, tmp_path
):
    slow = tmp_path / "slow"  # the first task, when it first runs
    slow.write_text(
        f"""#!/bin/sh
        if [ "$SLURM_STEP_NUM_TASKS" ] && [ "$SLURM_ARRAY_TASK_ID$SLURM_RESTART_COUNT" = 0 ]; then
            touch {tmp_path}/sleeps; exec sleep 100
        fi
        exec "$@"
        """
    )
    slow.chmod(0o755)
    more = {
        "ASTROPT_CONTAINER": str(slow),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    model = AstroPT(load_config("1m", ["model.layers=2", "model.width=32", "model.heads=2"]).model)
    save_model(model, tmp_path / "model")
    arguments = ("--model", tmp_path / "model", "--data", shards, "--output", tmp_path / "table")
    one = ("--nodes=1", "--gpus-per-node=1", "--cpus-per-task=1", "--array=0-1")
    job = submit("embed.sh", tmp_path / "embed", options=one, arguments=arguments, **more)
    cluster.wait_for((tmp_path / "sleeps").exists)
    cluster.run("scancel", "--batch", "--signal=USR1", f"{job}_0")
    assert cluster.wait_for_end(job) == "COMPLETED", logs(tmp_path)
    assert len(read_embeddings(tmp_path / "table")) == 150
    assert cluster.job(f"{job}_0")["Restarts"] == "1" and cluster.job(f"{job}_1")["Restarts"] == "0"
