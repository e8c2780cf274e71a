"""What a checkpoint costs, measured: in the background, standing still, and DeepSpeed's own."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

from astropt_ds.benchmark.launch import check_room, launch, zero3_config
from astropt_ds.benchmark.measure import ratio
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
    config = zero3_config(source, ranks)
    check_room(source, config, scratch, DISK_A_PARAMETER, MEMORY_A_PARAMETER)
    (scratch / CONFIG).write_text(config.to_yaml())
    launch(ranks, "astropt_ds.benchmark.saving", str(scratch), str(rounds))
    result = json.loads((scratch / RESULT).read_text())
    seconds = {name: values[1:] for name, values in result["seconds"].items()}
    return {
        "parameters": parameters(config.model),
        "seconds": {name: median(values) for name, values in seconds.items()},
        "gigabytes": {name: size / 1e9 for name, size in result["bytes"].items()},
        "first_stall_seconds": result["seconds"][STALL][0],  # the run's first save
        "stall_over_save": ratio(seconds, STALL, SAVE),
        "all_it_cost_over_save": ratio(seconds, LOST, SAVE),
        "step_beside_a_save_over_step": ratio(seconds, STEP_BESIDE, STEP),
        "save_over_deepspeeds": ratio(seconds, SAVE, THEIRS),
        "save_over_deepspeeds_synced": ratio(seconds, SAVE, THEIRS_SYNCED),
    }
