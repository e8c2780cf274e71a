"""What the training benchmark's process does: ``python -m astropt_ds.benchmark.steps FOLDER``.

All ways do the same: patches of uint8 are standardised, the model goes forward and backward over
them, the gradient is clipped, AdamW updates. One process, one thread, CPU seconds.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from astropt_ds.benchmark.measure import Work, in_turns
from astropt_ds.benchmark.reference import reference_model, reference_normalise
from astropt_ds.benchmark.training import (
    ENGINES,
    FOUND,
    PLAIN,
    PRODUCTS,
    REFERENCE,
    WANTED,
    step_config,
)
from astropt_ds.benchmark.work import products, random_batch
from astropt_ds.config import Config
from astropt_ds.data.batch import Batch
from astropt_ds.errors import UserError, run_cli
from astropt_ds.model import AstroPT
from astropt_ds.optim import adamw
from astropt_ds.tokens import standardise
from astropt_ds.training.engine import Engine, partitioned
from astropt_ds.training.ranks import start

AGREE = 0.02  # of what the plain loop's loss fell by; AstroPT rounds its tokens to fp16
AGREE_BF16 = 0.2


def main(argv: list[str]) -> None:
    """Measure, and write down what each round took."""
    folder = Path(argv[0])
    wanted = json.loads((folder / WANTED).read_text())
    source, images = wanted["source"], wanted["images"]
    configs = {name: step_config(source, images, keys) for name, keys in ENGINES.items()}
    config = next(iter(configs.values()))
    with start() as ranks:
        steps: dict[str, _Step] = {PLAIN: PlainLoop(config)}
        for name, each in configs.items():
            with partitioned(each, ranks):
                model = AstroPT(each.model, seed=each.seed)
            steps[name] = EngineStep(Engine(model, each, ranks))
        if wanted["against"]:
            steps[REFERENCE] = Reference(config, folder)
        # one batch throughout: after a few steps all ways have learnt the same of it
        batch = random_batch(config, images)
        works = {name: _work(step, batch) for name, step in steps.items()}
        works[PRODUCTS] = products(images * (config.tokens_per_image - 1), config.model.width, 50)
        found = in_turns(works, wanted["rounds"], {})
    _check({name: step.losses for name, step in steps.items()})
    (folder / FOUND).write_text(json.dumps(found))


class _Step(Protocol):
    """A way to make a step.

    Attributes:
        losses: before each update so far.
    """

    losses: list[float]

    def __call__(self, batch: Batch) -> None:
        """Update on a batch."""


class EngineStep:
    """This package's engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.losses: list[float] = []

    def __call__(self, batch: Batch) -> None:
        """Update on a batch."""
        self.losses.append(self._engine.step([batch]).loss)


class PlainLoop:
    """This package's model in the shortest loop: no DeepSpeed, nothing checked, nothing counted."""

    def __init__(self, config: Config) -> None:
        self._model = AstroPT(config.model, seed=config.seed)
        self._optimizer = adamw(self._model, config.optim)
        self._clip = config.optim.clip
        self.losses: list[float] = []

    def __call__(self, batch: Batch) -> None:
        """Update on a batch."""
        tokens = standardise(batch.patches)
        _, loss = self._model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(self._model.parameters(), self._clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.losses.append(loss.item())


class Reference:
    """AstroPT's package as its training script uses it, with the same weights."""

    def __init__(self, config: Config, scratch: Path) -> None:
        self._model = reference_model(AstroPT(config.model, seed=config.seed), scratch).train()
        optim = config.optim
        self._optimizer = self._model.configure_optimizers(
            optim.weight_decay, optim.lr, optim.betas, "cpu"
        )
        self._clip = optim.clip
        self.losses: list[float] = []

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
        self.losses.append(loss.item())


def _work(step: Callable[[Batch], None], batch: Batch) -> Work:
    def work() -> float:
        step(batch)
        return 1

    return work


def _check(losses: dict[str, list[float]]) -> None:
    """See that all ways have learnt the same."""
    falls = {name: each[0] - each[-1] for name, each in losses.items()}
    for name, fall in falls.items():
        tolerance = AGREE_BF16 if "bf16" in name else AGREE
        if not abs(fall / falls[PLAIN] - 1) < tolerance:
            raise UserError(
                f"the loss of {name} fell by {fall:.3g}, the plain loop's by {falls[PLAIN]:.3g}"
            )


if __name__ == "__main__":
    run_cli(main)
