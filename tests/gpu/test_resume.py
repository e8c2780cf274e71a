"""Runs on an NVIDIA GPU that are saved and go on, or meet a bad update."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from astropt_ds.training.metrics import read_metrics
from tests.conftest import REPOSITORY
from tests.gpu.runs import command_line, losses, on_gpu, until

pytestmark = on_gpu


@pytest.mark.parametrize(
    "keys",
    [
        ("zero.stage=0", "precision=fp32"),
        ("zero.stage=1", "precision=bf16"),
        ("zero.stage=2", "precision=bf16"),
        ("zero.stage=3", "precision=bf16"),
        ("zero.stage=3", "precision=bf16", "zero.offload=true"),
    ],
)
def test_a_resumed_run_is_bit_identical(tiny, shards, tmp_path, keys):
    common = [*tiny, *keys, "--config", "1m"]
    whole = command_line(shards, tmp_path / "whole", *common, "run.steps=6")
    assert whole.returncode == 0, whole.stderr[-3000:]
    for steps in (3, 6):
        part = command_line(shards, tmp_path / "part", *common, f"run.steps={steps}")
        assert part.returncode == 0, part.stderr[-3000:]
    losses = [
        [r["loss"] for r in read_metrics(tmp_path / name) if r["kind"] == "train"]
        for name in ("whole", "part")
    ]
    assert len(losses[0]) == 6 and losses[0] == losses[1]


def test_the_2100m_model_goes_on_bit_for_bit(stamps, tmp_path):
    """Saved by 25 GB. Of attention only the plain kernel adds up in the same order each time."""
    keys = (
        *("--config", "2100m", "data.image_size=96", "attention.kernel=eager", "eval.images=8"),
        *("batch.global_images=8", "batch.micro=8", "schedule.warmup=5"),
    )
    saved = command_line(stamps, tmp_path / "part", *keys, "run.steps=3")
    try:
        assert saved.returncode == 0, saved.stderr[-3000:]
        resumed, said = until(6, stamps, tmp_path / "part", *keys)
    finally:
        shutil.rmtree(tmp_path / "part" / "checkpoints", ignore_errors=True)
    assert "resuming" in said and "at step 3" in said
    whole, _ = until(6, stamps, tmp_path / "whole", *keys)
    assert len(set(losses(whole))) == 6 and losses(resumed) == losses(whole)


def test_a_bad_update_is_skipped_and_moves_nothing(tmp_path):
    script = REPOSITORY / "tests" / "distributed" / "health_scenarios.py"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, script, tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "health.json").read_text())["skip"]
    assert {"0-fp32", "1-bf16", "2-bf16", "3-bf16", "3-offload-fp32"} <= results.keys()
    for name, found in results.items():
        for fault, outcome in found["faults"].items():
            assert outcome["skipped"] and not outcome["moved"], (name, fault)
        assert found["losses"] == found["undisturbed"], name
