"""Weights alone, on a schedule, as model folders: for studies of the course of a training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from astropt_ds.config import ModelConfig
from astropt_ds.config_run import SnapshotConfig
from astropt_ds.model import parameter_shapes
from astropt_ds.model_folder.folder import write_folder
from astropt_ds.training.fragments import WEIGHT, Fragment
from astropt_ds.training.ranks import Ranks
from astropt_ds.training.staging import (
    check_cover,
    merge,
    replace_folder,
    staged,
    whole,
    write_fragments,
)


def snapshot_steps(config: SnapshotConfig, last: int) -> set[int]:
    """The steps after which a snapshot is due.

    ``log`` is what AstroPT's studies of checkpoints use: 0, the last, and the rounded terms of a
    geometric series from 1 to the last, duplicates dropped.

    Args:
        config: schedule and count.
        last: the run's last step.
    """
    if config.schedule == "log":
        return {0, last, *np.geomspace(1, last, config.count - 1).round().astype(int).tolist()}
    if config.schedule == "even":
        return {*np.linspace(0, last, config.count).round().astype(int).tolist()}
    return {step for step in config.steps if step <= last}


def snapshot_path(run_dir: Path, step: int) -> Path:
    """Where the snapshot of a step is."""
    return run_dir / "snapshots" / f"step-{step:08d}"


def save(
    path: Path,
    model: ModelConfig,
    dtype: torch.dtype,
    facts: dict[str, Any],
    fragments: list[Fragment],
    ranks: Ranks,
) -> Path:
    """Write the weights of all ranks as one model folder. Collective.

    Each rank writes its fragments beside the place, and rank 0 puts them together, tensor by
    tensor: no rank ever holds the whole model.

    Args:
        path: the model folder.
        model: its configuration.
        dtype: of the weights in it.
        facts: what its config.json says of the training.
        fragments: what this rank holds; those of moments are left out.
        ranks: those that write.

    Returns:
        The path.

    Raises:
        UserError: a rank could not write; nothing is left of it.
    """
    weights = [replace(f, values=f.values.to(dtype)) for f in fragments if f.state == WEIGHT]
    with staged(path, ranks) as staging:
        parts = write_fragments(staging, weights, ranks)
        with ranks.together():
            if ranks.main:
                tensors = merge(parts)
                check_cover(tensors, [WEIGHT])
                names = parameter_shapes(model)
                values = ((name, whole(staging, tensors, name, WEIGHT)) for name in names)
                write_folder(staging, model, dtype, lambda: facts, values)
                for part in parts:
                    (staging / part["file"]).unlink()
                replace_folder(staging, path)
    return path
