"""A training step, measured: this package's engine beside a plain loop and AstroPT's own.

All of them do the same: patches of uint8 are standardised, the model goes forward and backward
over them, the gradient is clipped, AdamW updates. One process, one thread, CPU seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from astropt_ds.benchmark.measure import Work, in_turns, peak_memory, ratio, spread
from astropt_ds.benchmark.reference import reference_model, reference_normalise
from astropt_ds.config import Config
from astropt_ds.config_source import load_config
from astropt_ds.data.batch import Batch
from astropt_ds.errors import UserError
from astropt_ds.flops import training_flops
from astropt_ds.model import AstroPT
from astropt_ds.optim import adamw
from astropt_ds.tokens import standardise
from astropt_ds.training.engine import Engine, partitioned
from astropt_ds.training.ranks import start

PLAIN, REFERENCE = "plain loop", "astropt 2.0.9"
PRODUCTS = "the largest product"
ENGINES = {
    "ZeRO-1": ("zero.stage=1", "precision=fp32"),
    "ZeRO-3": ("zero.stage=3", "precision=fp32"),
    "ZeRO-1, bf16": ("zero.stage=1", "precision=bf16"),
    "ZeRO-1, compiled": ("zero.stage=1", "precision=fp32", "compile=true"),
}
AGREE = 1e-3  # of the losses after as many steps; AstroPT rounds its tokens to fp16
AGREE_BF16 = 2e-2


def measure_training(
    source: str, images: int, rounds: int, against: bool, scratch: Path
) -> dict[str, Any]:
    """CPU seconds of a step, tokens a CPU second, and the ratios that are claimed.

    Args:
        source: a preset's name or a YAML file, of AstroPT's second generation.
        images: of 1024 tokens (or as the configuration has them) in a step.
        rounds: in which all take turns.
        against: measure AstroPT's own step, too.
        scratch: an empty folder.

    Raises:
        UserError: no such preset, AstroPT is not installed, or their losses differ.
    """
    torch.set_num_threads(1)
    configs = {name: _config(source, images, keys) for name, keys in ENGINES.items()}
    config = configs["ZeRO-1"]
    with start() as ranks:
        steps: dict[str, _Step] = {PLAIN: PlainLoop(config)}
        for name, each in configs.items():
            with partitioned(each, ranks):
                model = AstroPT(each.model, seed=each.seed)
            steps[name] = EngineStep(Engine(model, each, ranks))
        if against:
            steps[REFERENCE] = Reference(config, scratch)
        works = {name: _work(step, _batch(config)) for name, step in steps.items()}
        works[PRODUCTS] = _products(config)
        found = in_turns(works, rounds, {})
    _check({name: step.loss for name, step in steps.items()})
    tokens = images * config.tokens_per_image
    gigaflop = training_flops(config.model, config.tokens_per_image) * images / 1e9
    timed = {name: times for name, times in found.items() if name != PRODUCTS}
    result: dict[str, Any] = {
        "tokens_a_step": tokens,
        "cpu_s_a_step": {name: median(times) for name, times in timed.items()},
        "spread": {name: spread(times) for name, times in timed.items()},
        "tokens_a_cpu_second": {name: tokens / median(times) for name, times in timed.items()},
        "share_of_the_largest_products_speed": {
            name: gigaflop * ratio(found, PRODUCTS, name) for name in timed
        },
        "over_the_plain_loop": {name: ratio(found, name, PLAIN) for name in ENGINES},
        "fp32_over_bf16": ratio(found, "ZeRO-1", "ZeRO-1, bf16"),
        "peak_memory_gb": peak_memory() / 1e9,
    }
    if against:
        result["reference_over_ours"] = {name: ratio(found, REFERENCE, name) for name in ENGINES}
    return result


class _Step:
    """A way to make a step.

    Attributes:
        loss: before its last update.
    """

    loss: float

    def __call__(self, batch: Batch) -> None:
        """Update on a batch."""
        raise NotImplementedError


class EngineStep(_Step):
    """This package's engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def __call__(self, batch: Batch) -> None:
        """Update on a batch."""
        self.loss = self._engine.step([batch]).loss


class PlainLoop(_Step):
    """This package's model in the shortest loop: no DeepSpeed, nothing checked, nothing counted."""

    def __init__(self, config: Config) -> None:
        self._model = AstroPT(config.model, seed=config.seed)
        self._optimizer = adamw(self._model, config.optim)
        self._clip = config.optim.clip

    def __call__(self, batch: Batch) -> None:
        """Update on a batch."""
        tokens = standardise(batch.patches)
        _, loss = self._model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(self._model.parameters(), self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.loss = loss.item()


class Reference(_Step):
    """AstroPT's package as its training script uses it, with the same weights."""

    def __init__(self, config: Config, scratch: Path) -> None:
        self._model = reference_model(AstroPT(config.model, seed=config.seed), scratch).train()
        optim = config.optim
        self._optimizer = self._model.configure_optimizers(
            optim.weight_decay, optim.lr, optim.betas, "cpu"
        )
        self._clip = optim.clip

    def __call__(self, batch: Batch) -> None:
        """Update on a batch."""
        tokens = torch.stack([reference_normalise(x) for x in batch.patches.float()]).float()
        inputs = {"images": tokens[:, :-1]}
        length = inputs["images"].shape[1]
        inputs["images_positions"] = torch.arange(length).expand(len(tokens), length)
        _, loss = self._model(inputs, targets={"images": tokens[:, 1:]})
        loss.backward()
        nn.utils.clip_grad_norm_(self._model.parameters(), self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.loss = loss.item()


def _config(source: str, images: int, keys: tuple[str, ...]) -> Config:
    same = ("schedule.kind=constant", "schedule.warmup=0", "health.spike=ignore", "optim.lr=1e-4")
    sizes = (f"batch.global_images={images}", f"batch.micro={images}")
    return load_config(source, ["model.tokeniser=aim", *same, *sizes, *keys])


def _batch(config: Config) -> Batch:
    """A fixed one: after a few steps all ways have learnt the same of it."""
    images = config.batch.global_images
    shape = (images, config.tokens_per_image, config.model.images.input_size)
    patches = torch.randint(
        256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    return Batch(patches, torch.ones(images), torch.arange(images))


def _work(step: Callable[[Batch], None], batch: Batch) -> Work:
    def work() -> int:
        step(batch)
        return 1

    return work


def _products(config: Config) -> Work:
    """The largest product of a block in its shape; counts GFLOP in place of steps."""
    rows = config.batch.global_images * (config.tokens_per_image - 1)
    width = config.model.width
    a, b = torch.randn(rows, width), torch.randn(width, 4 * width)
    once = 2 * rows * width * 4 * width / 1e9
    times = max(1, round(50 / once))

    def work() -> int:
        for _ in range(times):
            torch.mm(a, b)
        return max(1, round(times * once))

    return work


def _check(losses: dict[str, float]) -> None:
    """See that all ways have done the same work."""
    for name, loss in losses.items():
        tolerance = AGREE_BF16 if "bf16" in name else AGREE
        if not abs(loss / losses[PLAIN] - 1) < tolerance:
            raise UserError(f"{name} has a loss of {loss:.6f}, the plain loop {losses[PLAIN]:.6f}")
