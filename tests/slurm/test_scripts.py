"""The batch scripts as text: what shells and users say of them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from astropt_ds import save_model
from astropt_ds.config_source import load_config
from astropt_ds.model import AstroPT
from tests.conftest import REPOSITORY

VENV = Path(sys.executable).parent.parent
SCRIPTS = sorted((REPOSITORY / "slurm").glob("*.sh"))


@pytest.mark.needs("slurm")
def test_shellcheck_has_nothing_to_say():
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(
        ["shellcheck", "--external-sources", *SCRIPTS],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_can_read_it(script):
    done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "script, arguments, words",
    [
        ("preflight.sh", (), "would run: srun --nodes=4 --ntasks=32 --kill-on-bad-exit=1"),
        ("embed.sh", ("--limit", "3"), "would run: srun --nodes=1 --ntasks=1 --kill-on-bad-exit=1"),
    ],
)
def test_the_other_scripts_have_dry_runs_too(shards, tmp_path, script, arguments, words):
    config = load_config("1m", ["model.layers=2", "model.width=32", "model.heads=2"])
    save_model(AstroPT(config.model), tmp_path / "model")
    if script == "embed.sh":
        where = ("--model", tmp_path / "model", "--data", shards, "--output", tmp_path / "table")
        arguments = (*where, *arguments)
    settings = {"ASTROPT_VENV": str(VENV), "ASTROPT_ACCELERATOR": "cpu", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        ["bash", f"slurm/{script}", "--dry-run", *arguments],
        cwd=REPOSITORY, env=settings, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and words in done.stdout, done.stdout + done.stderr
    assert not (tmp_path / "table").exists()


def test_a_dry_run_needs_no_slurm_and_says_what_would_run(shards, tmp_path):
    settings = {
        "ASTROPT_VENV": str(VENV),
        "ASTROPT_DATA": str(shards),
        "ASTROPT_RUN": str(tmp_path / "run"),
        "ASTROPT_OVERRIDES": "data.image_size=64 model.layers=1",
        "PATH": "/usr/bin:/bin",
    }
    done = subprocess.run(
        ["bash", "slurm/train_2b.sh", "--dry-run"],
        cwd=REPOSITORY, env=settings, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "320 images = 32 ranks x 10 x 1 accumulation" in done.stdout
    assert "srun --nodes=4 --ntasks=32 --kill-on-bad-exit=1" in done.stdout
    assert not (tmp_path / "run").exists()


def test_an_embedding_task_that_is_stopped_at_every_start_stops(tmp_path):
    """As where --time is not longer than --signal. In srun's place is what Slurm would do."""
    srun = tmp_path / "srun"
    srun.write_text("#!/bin/sh\nkill -USR1 $PPID\nsleep 1\nexit 138\n")
    srun.chmod(0o755)
    settings = {
        "ASTROPT_VENV": str(VENV),
        "ASTROPT_ACCELERATOR": "cpu",
        "SLURM_JOB_ID": "1",
        "SLURM_RESTART_COUNT": "3",
        "PATH": f"{tmp_path}:/usr/bin:/bin",
    }
    done = subprocess.run(
        ["bash", "slurm/embed.sh"], cwd=REPOSITORY, env=settings, capture_output=True, text=True
    )
    assert done.returncode == 2 and "a --time far beyond --signal's" in done.stderr


@pytest.mark.parametrize("script", ["train_2b.sh", "embed.sh", "preflight.sh"])
def test_without_a_job_the_script_names_sbatch(script):
    settings = {"ASTROPT_VENV": str(VENV), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        ["bash", f"slurm/{script}"], cwd=REPOSITORY, env=settings, capture_output=True, text=True
    )
    assert done.returncode == 2 and f"sbatch slurm/{script}" in done.stderr
