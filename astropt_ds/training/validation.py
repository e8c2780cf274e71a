"""The loss on a fixed set, exact for any number of ranks, beside two baselines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from astropt_ds.data.loader import Galaxies
from astropt_ds.data.reader import Fault
from astropt_ds.errors import UserError
from astropt_ds.model import huber_per_image
from astropt_ds.training.engine import Engine

PICTURED = 6  # galaxies in the reconstruction picture


@dataclass(frozen=True)
class Validation:
    """What a validation found.

    Attributes:
        loss: mean Huber loss over the images that could be read.
        zeros: the same for predicting zeros, which is the mean of each patch.
        previous: the same for repeating the previous patch.
        n: images that could be read.
        faults: those that could not, of this rank.
        patches: (pictured, tokens, values) uint8, galaxies of this rank for a picture.
        predictions: (pictured, tokens - 1, values) fp32, standardised, of the same.
    """

    loss: float
    zeros: float
    previous: float
    n: int
    faults: list[Fault]
    patches: Tensor
    predictions: Tensor


def validate(engine: Engine, galaxies: Galaxies, alive: Callable[[], None]) -> Validation:
    """Run the model over the validation set. Collective.

    Each image's loss goes into its own slot and the slots are added in one order, so that the
    mean does not depend on how the images were dealt to the ranks.

    Args:
        engine: the model.
        galaxies: the data.
        alive: called after every batch.

    Raises:
        UserError: the data cannot be read on some rank, or no image could be.
    """
    images = galaxies.validation_images
    slots = torch.zeros(4, images, dtype=torch.float64)  # model, zeros, previous, weight
    faults: list[Fault] = []
    patches: list[Tensor] = []
    predictions: list[Tensor] = []
    problem = None
    for batch in galaxies.validation():
        predicted, tokens = engine.predict(batch)
        faults += batch.faults
        problem = problem or batch.problem
        good = batch.weights > 0
        rows = batch.rows[good]
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        guesses = (predicted, torch.zeros_like(targets), inputs)
        for slot, guess in enumerate(guesses):
            slots[slot, rows] = huber_per_image(guess, targets).double().cpu()[good]
        slots[3, rows] = 1.0
        if sum(map(len, patches)) < PICTURED:
            patches.append(batch.patches[good])
            predictions.append(predicted.cpu()[good])
        alive()
    engine.ranks.agree(problem)
    dist.all_reduce(slots)
    n = int(slots[3].sum())
    if n == 0:
        raise UserError(f"none of the {images} validation images could be read")
    loss, zeros, previous = (slots[:3].sum(dim=1) / n).tolist()
    pictured = torch.cat(patches)[:PICTURED], torch.cat(predictions)[:PICTURED]
    return Validation(loss, zeros, previous, n, faults, *pictured)
