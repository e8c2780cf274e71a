"""Processes of a benchmark: ranks on the CPU, and the room that they need."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import psutil

from astropt_ds.config import Config
from astropt_ds.config_source import load_config
from astropt_ds.errors import UserError
from astropt_ds.flops import parameters


def zero3_config(source: str, ranks: int) -> Config:
    """A model's configuration at ZeRO-3 in fp32, with an image of 64 pixels a rank and step.

    Raises:
        UserError: no such preset or file.
    """
    overrides = ["zero.stage=3", "precision=fp32", "batch.micro=1", "data.image_size=64"]
    return load_config(source, [*overrides, f"batch.global_images={ranks}"])


def check_room(source: str, config: Config, scratch: Path, disk: int, memory: int) -> None:
    """See that there is as much disk and memory as a model needs, in bytes a parameter.

    Raises:
        UserError: there is not.
    """
    count = parameters(config.model)
    free = shutil.disk_usage(scratch).free, psutil.virtual_memory().available
    where = f"disk in {scratch.parent} (--scratch)", "memory"
    for place, there, needed in zip(where, free, (disk * count, memory * count), strict=True):
        if there < needed:
            raise UserError(
                f"--config {source}: needs {needed / 1e9:.1f} GB of {place}; "
                f"{there / 1e9:.1f} are free"
            )


def launch(ranks: int, module: str, *arguments: str) -> None:
    """Run a module on several CPU ranks, to its end.

    Raises:
        UserError: what a rank says that it ended by.
    """
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, "-m", module, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        if said:
            raise UserError(said[0].removeprefix("error: "))
        raise RuntimeError(done.stderr)
