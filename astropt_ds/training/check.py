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
from astropt_ds.flops import parameters
from astropt_ds.gpus import GPUS
from astropt_ds.memory import memory
from astropt_ds.plan import UTILISATION, Choice, course, propose, settle
from astropt_ds.training.checkpoint import POINTER, read_manifest
from astropt_ds.training.ranks import uses_gpu
from astropt_ds.training.resume import check_fits

GB = 1e9
GPU = "h100"


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
    run = Path(config.run.dir)
    folder = nearest_folder(run)
    if not (folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)):
        raise UserError(f"run.dir={config.run.dir}: no folder can be made or written in {folder}")
    config.batch.split(ranks)  # refuses what cannot be split
    train, val = Survey(config, TRAINING), Survey(config, VALIDATION)
    warnings = []
    for survey in (train, val):
        survey.check(0, 1, config)
        side, patch = config.data.image_size, config.model.images.patch
        warnings += survey.warnings(side, config.data.max_bad_fraction, patch)
    if gpu_gb is None and uses_gpu():
        gpu_gb = torch.cuda.get_device_properties(0).total_memory / GB
    if gpu_gb is None:
        config = settle(config, ranks, None)
        micro, accumulation = config.batch.split(ranks)
        needs = memory(config, ranks, micro, gpu=False)
        warnings.append("no GPU here: planned for processors; --gpu-gb plans for GPUs")
    else:
        choice = propose(config, ranks, gpu_gb * GB)
        warnings += tight(choice, ranks, gpu_gb)
        config, micro, accumulation = choice.config, choice.micro, choice.accumulation
        needs = choice.memory
    images = config.batch.global_images
    yield f"model: {parameters(config.model):,} parameters, {config.precision}"
    yield (
        f"data: {len(train):,} images to train on, {len(val):,} to validate; "
        f"{config.run.steps:,} steps are {config.run.steps * images / len(train):.1f} epochs"
    )
    yield (
        f"batch: {images} images = {ranks} ranks x {micro} x {accumulation} accumulation; "
        f"the plan for each under ZeRO-{config.zero.level} is {needs.peak / GB:,.1f} GB, of which "
        f"{needs.state / GB:,.1f} GB are weights, gradients and optimizer"
    )
    work = course(config, ranks, GPUS[GPU], UTILISATION)
    yield (
        f"work: {work.gpu_hours:,.3g} GPU hours of {GPU.upper()} at {UTILISATION:.0%} of their "
        f"peak, {work.hours:,.3g} hours on {ranks}; tools/plan.py tells more"
    )
    yield from (f"warning: {text}" for text in warnings)
    pointer, begins = run / POINTER, "is new"
    if pointer.exists():
        path = run / "checkpoints" / pointer.read_text().strip()
        check_fits(path, read_manifest(path), config, train.hash)
        begins = f"goes on from {path.name}"
    yield f"run: {run} {begins}"


def tight(choice: Choice, ranks: int, gpu_gb: float) -> list[str]:
    """A warning where what is asked for may not fit.

    Raises:
        UserError: it certainly does not.
    """
    stage, needs = choice.config.zero.level, choice.memory
    gpus = f"{ranks} GPUs of {gpu_gb:g} GB"
    if needs.state > gpu_gb * GB:
        raise UserError(
            f"{gpus} are too few: zero.stage={stage} keeps {needs.state / GB:.1f} GB of weights, "
            "gradients and optimizer on each; more of them, a higher stage, or zero.offload=true "
            "would be right"
        )
    if choice.fits:
        return []
    return [
        f"zero.stage={stage} batch.micro={choice.micro} may not fit {gpus}: the plan is "
        f"{needs.peak / GB:.1f} GB on each; a smaller batch.micro, or auto, would be right"
    ]
