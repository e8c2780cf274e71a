"""Whether a run can be, before any rank of it is started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from astropt_ds.config import Config
from astropt_ds.data.loader import TRAINING, VALIDATION
from astropt_ds.data.survey import Survey
from astropt_ds.errors import UserError
from astropt_ds.files import nearest_folder
from astropt_ds.flops import PEAKS, parameters, training_flops
from astropt_ds.memory import state_bytes
from astropt_ds.training.checkpoint import POINTER
from astropt_ds.training.ranks import uses_gpu

GB = 1e9
GPU, MFU = "H100", 0.45  # what DeepSpeed and llm-foundry reach there with models of 3B to 8B


def check_run(config: Config, ranks: int, gpu_gb: float | None = None) -> Iterator[str]:
    """Say in lines what a run is, and refuse one that could not begin.

    Args:
        config: of the run.
        ranks: that are to run it, one a GPU.
        gpu_gb: memory of each GPU; of the one here, if there is one, where it is not given.

    Raises:
        UserError: the run's folder cannot be made, the data are not there or do not fit, the
            batch cannot be split over the ranks, or the state does not fit the GPUs.
    """
    if config.run.dir is None:
        raise UserError("run.dir is missing: a folder for the run, for example run.dir=runs/1m")
    folder = nearest_folder(Path(config.run.dir))
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise UserError(f"run.dir={config.run.dir}: no folder can be made or written in {folder}")
    micro, accumulation = config.batch.split(ranks)
    train, val = Survey(config, TRAINING), Survey(config, VALIDATION)
    warnings = []
    for survey in (train, val):
        survey.check(0, 1, config)
        side, patch = config.data.image_size, config.model.images.patch
        warnings += survey.warnings(side, config.data.max_bad_fraction, patch)
    state = state_bytes(config, ranks)
    if gpu_gb is None and uses_gpu():
        gpu_gb = torch.cuda.get_device_properties(0).total_memory / GB
    if gpu_gb is not None and state > gpu_gb * GB:
        raise UserError(
            f"{ranks} GPUs of {gpu_gb:g} GB are too few: zero.stage={config.zero.stage} keeps "
            f"{state / GB:.1f} GB of weights, gradients and optimizer on each; more of them, a "
            "higher stage, or zero.offload=true would be right"
        )
    images = config.batch.global_images
    flops = training_flops(config.model, config.tokens_per_image) * images * config.run.steps
    yield f"model: {parameters(config.model):,} parameters, {config.precision}"
    yield (
        f"data: {len(train):,} images to train on, {len(val):,} to validate; "
        f"{config.run.steps:,} steps are {config.run.steps * images / len(train):.1f} epochs"
    )
    yield (
        f"batch: {images} images = {ranks} ranks x {micro} x {accumulation} accumulation; "
        f"{state / GB:.1f} GB of state on each under ZeRO-{config.zero.stage}, and activations"
    )
    hours = flops / (MFU * PEAKS[GPU]["bf16"]) / 3600
    yield f"work: {flops:.3g} FLOPs, {hours:,.3g} GPU hours of an {GPU} at {MFU:.0%} of its peak"
    yield from (f"warning: {text}" for text in warnings)
    pointer = Path(config.run.dir) / POINTER
    begins = f"goes on from {pointer.read_text().strip()}" if pointer.exists() else "is new"
    yield f"run: {config.run.dir} {begins}"
