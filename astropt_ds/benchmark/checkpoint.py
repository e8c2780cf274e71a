"""What a checkpoint costs, measured: in the background, standing still, and DeepSpeed's own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from astropt_ds.benchmark.measure import ratio
from astropt_ds.config_source import load_config
from astropt_ds.errors import UserError
from astropt_ds.flops import parameters

# What the ranks time, each until the last of them has done it.
SAVE, STALL, DURABLE = "save, standing still", "background save: stall", "background save: durable"
STEP, STEP_BESIDE = "step", "step beside a save"
LOST = "background save: all it cost"
THEIRS, THEIRS_SYNCED = "deepspeed's save", "deepspeed's save, synced"
LOAD = "verify and load"
CONFIG, RESULT = "config.yaml", "result.json"  # of the ranks' folder
# One checkpoint at a time, of 12 bytes; all that the ranks hold, of 70 with two of them at 89m.
DISK_A_PARAMETER, MEMORY_A_PARAMETER = 16, 80


def measure_checkpoint(source: str, ranks: int, rounds: int, scratch: Path) -> dict[str, Any]:
    """Seconds of saves, steps and loads of a model on CPU ranks at ZeRO-3 in fp32.

    Args:
        source: a preset's name or a YAML file.
        ranks: processes.
        rounds: in which all take turns, after one that is not counted.
        scratch: an empty folder on the disk that is measured.

    Raises:
        UserError: no such preset, no room for it, or a rank could not write.
    """
    overrides = ["zero.stage=3", "precision=fp32", "batch.micro=1", "data.image_size=64"]
    config = load_config(source, [*overrides, f"batch.global_images={ranks}"])
    count = parameters(config.model)
    disk, memory = shutil.disk_usage(scratch).free, psutil.virtual_memory().available
    _check_room(f"disk in {scratch.parent} (--scratch)", disk, DISK_A_PARAMETER * count, source)
    _check_room("memory", memory, MEMORY_A_PARAMETER * count, source)
    (scratch / CONFIG).write_text(config.to_yaml())
    result = _launch(ranks, rounds, scratch)
    seconds = {name: values[1:] for name, values in result["seconds"].items()}
    return {
        "parameters": count,
        "seconds": {name: median(values) for name, values in seconds.items()},
        "gigabytes": {name: size / 1e9 for name, size in result["bytes"].items()},
        "first_stall_seconds": result["seconds"][STALL][0],  # the run's first save
        "stall_over_save": ratio(seconds, STALL, SAVE),
        "all_it_cost_over_save": ratio(seconds, LOST, SAVE),
        "step_beside_a_save_over_step": ratio(seconds, STEP_BESIDE, STEP),
        "save_over_deepspeeds": ratio(seconds, SAVE, THEIRS),
        "save_over_deepspeeds_synced": ratio(seconds, SAVE, THEIRS_SYNCED),
    }


def _check_room(where: str, free: int, needed: int, source: str) -> None:
    if free < needed:
        raise UserError(
            f"--config {source}: needs {needed / 1e9:.1f} GB of {where}; {free / 1e9:.1f} are free"
        )


def _launch(ranks: int, rounds: int, scratch: Path) -> dict[str, Any]:
    """What the ranks found: seconds of each round, the first one included, and bytes."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))
    module = ("-m", "astropt_ds.benchmark.saving", str(scratch), str(rounds))
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, *module]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        if said:
            raise UserError(said[0].removeprefix("error: "))
        raise RuntimeError(done.stderr)
    return json.loads((scratch / RESULT).read_text())
