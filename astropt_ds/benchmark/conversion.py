"""What the conversion of a checkpoint costs: time and memory, beside DeepSpeed's own script."""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from astropt_ds.benchmark.launch import check_room, launch, zero3_config
from astropt_ds.benchmark.measure import ratio
from astropt_ds.flops import parameters

IDLE = "nothing, only the libraries"
OURS, TO_FILE = "our checkpoint to a model folder", "our checkpoint to an AstroPT v1 file"
THEIRS, SCRIPT = "deepspeed's to a model folder", "deepspeed's by its zero_to_fp32.py"
CONFIG, CHECKPOINT, DEEPSPEED = "config.yaml", "ours", "deepspeed"  # of the folder
# Both checkpoints and an output; what the ranks hold, and what DeepSpeed's script does.
DISK_A_PARAMETER, MEMORY_A_PARAMETER = 32, 26

CONVERT = """
import sys
from pathlib import Path
from astropt_ds.config_source import load_config
from astropt_ds.convert.find import open_source
from astropt_ds.convert.write import write_astropt, write_model_folder
source, output, told, to = sys.argv[1:]
source = open_source(Path(source), load_config(told).model if told else None)
write_model_folder(source, Path(output)) if to == "hub" else write_astropt(source, Path(output), to)
"""
IMPORT = "import torch, astropt_ds.convert.write"


def measure_conversion(source: str, ranks: int, rounds: int, scratch: Path) -> dict[str, Any]:
    """Seconds, CPU seconds and memory of conversions, each in a process of its own.

    Args:
        source: a preset's name or a YAML file, of a v1 model.
        ranks: that wrote the checkpoints, at ZeRO-3 in fp32.
        rounds: in which all take turns.
        scratch: an empty folder on the disk that is used.

    Raises:
        UserError: no such preset, or no room for it.
    """
    config = zero3_config(source, ranks)
    check_room(source, config, scratch, DISK_A_PARAMETER, MEMORY_A_PARAMETER)
    told = scratch / CONFIG
    told.write_text(config.to_yaml())
    launch(ranks, "astropt_ds.benchmark.convertible", str(scratch))
    ours, theirs, output = scratch / CHECKPOINT, scratch / DEEPSPEED, scratch / "output"
    script = [theirs / "zero_to_fp32.py", theirs, output, "--safe_serialization"]
    works: dict[str, list[Any]] = {
        IDLE: ["-c", IMPORT],
        OURS: ["-c", CONVERT, ours, output, "", "hub"],
        TO_FILE: ["-c", CONVERT, ours, output, "", "v1"],
        THEIRS: ["-c", CONVERT, theirs, output, told, "hub"],
        SCRIPT: script,
    }
    found: dict[str, dict[str, list[float]]] = {
        kind: {name: [] for name in works} for kind in ("seconds", "cpu_seconds", "peak_gigabytes")
    }
    for _ in range(rounds):
        for name, arguments in works.items():
            command = [sys.executable, *map(str, arguments)]
            for kind, value in _run(command, scratch / "printed").items():
                found[kind][name].append(value)
            shutil.rmtree(output) if output.is_dir() else output.unlink(missing_ok=True)
    return {
        "parameters": parameters(config.model),
        **{k: {n: median(v) for n, v in values.items()} for k, values in found.items()},
        "cpu_over_deepspeeds": ratio(found["cpu_seconds"], THEIRS, SCRIPT),
        "memory_over_deepspeeds": ratio(found["peak_gigabytes"], THEIRS, SCRIPT),
    }


def _run(command: list[str], printed: Path) -> dict[str, float]:
    """What a process took. Its memory is the most that was resident, and no less than ours."""
    start = time.perf_counter()
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    output = [(os.POSIX_SPAWN_OPEN, stream, str(printed), flags, 0o600) for stream in (1, 2)]
    process = os.posix_spawn(command[0], command, os.environ, file_actions=output)
    _, status, usage = os.wait4(process, 0)
    if status:
        raise RuntimeError(f"{command} failed: {printed.read_text()}")
    return {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_gigabytes": usage.ru_maxrss * 1024 / 1e9,
    }
