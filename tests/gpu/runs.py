"""Runs of the training command on the GPU, to their end or stopped once they have shown enough."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
import torch

from astropt_ds.config_source import load_config
from astropt_ds.memory import memory
from astropt_ds.training.metrics import read_metrics
from tests.conftest import REPOSITORY

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
]


def command(shards, run, *overrides):
    return [
        *(sys.executable, "-m", "astropt_ds.train", f"data.path={shards}", f"run.dir={run}"),
        *overrides,
    ]


def command_line(shards, run, *overrides):
    """The command, to its end."""
    line = command(shards, run, *overrides)
    return subprocess.run(line, cwd=REPOSITORY, capture_output=True, text=True, timeout=540)


def until(step, shards, run, *overrides, environment=None):
    """Its records up to a step, and what it said; it is killed there, before it saves anything."""
    log = run.with_suffix(".log")
    with log.open("w") as output:
        line = command(shards, run, *overrides, "run.steps=1000000")
        process = subprocess.Popen(
            line, cwd=REPOSITORY, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            deadline = time.monotonic() + 400
            while not (run / "metrics.jsonl").exists() or len(trained(run)) < step:
                said = log.read_text()[-3000:]
                assert process.poll() is None, said
                assert time.monotonic() < deadline, said
                time.sleep(0.1)
        finally:
            process.kill()
            process.wait()
    return trained(run)[:step], log.read_text()


def trained(run):
    """The records of its steps."""
    return [record for record in read_metrics(run) if record["kind"] == "train"]


def losses(records):
    return [record["loss"] for record in records]


def falls(found):
    """Whether a loss does, beyond its noise: all of the last third lie below the first's mean."""
    third = len(found) // 3
    return max(found[-third:]) < sum(found[:third]) / third


def planned(run):
    """Peak bytes of the plan of a run on one GPU, by the stage and micro-batch that it took."""
    settled = json.loads((run / "environment.json").read_text())
    config = load_config(run / "config.yaml", [f"zero.stage={settled['zero_stage']}"])
    return memory(config, 1, settled["micro_batch"], gpu=True).peak
