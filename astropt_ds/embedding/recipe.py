"""What an embedding is: the output of which blocks, over which tokens, and how these become one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from astropt_ds.config import ModelConfig
from astropt_ds.errors import UserError
from astropt_ds.model import block_index

ALL = "all"
# Layer and tokens of AstroPT's own embeddings, by tokeniser: v1 takes the first 64 tokens of the
# last block, v2 and v3 take all of block layers // 2; all average.
V1, V2 = ("last", 64), ("middle", ALL)
DEFAULTS: dict[str, tuple[str, int | str]] = {"relu": V1, "aim": V2, "affine": V2}


def _exp_decay(states: Tensor) -> Tensor:
    """Weights from 1 at the first token to 1/10 at the last, in geometric progression: AstroPT's
    reduction of that name."""
    weights = torch.logspace(0, -1, states.shape[1], device=states.device)
    return torch.einsum("ntw,t->nw", states, weights / weights.sum())


POOLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda states: states.mean(dim=1),
    "last": lambda states: states[:, -1],
    "exp_decay": _exp_decay,
    "max": lambda states: states.amax(dim=1),
    "none": lambda states: states,
}


@dataclass(frozen=True)
class Recipe:
    """A definition of embeddings.

    Attributes:
        layers: blocks, from 0, in rising order; an embedding is made of the output of each.
        pooling: a name in POOLINGS.
        tokens: of each image, from the centre on.
        reads: tokens that the model must read for them: those after change nothing, unless all
            tokens see all others.
        width: of the model.
    """

    layers: tuple[int, ...]
    pooling: str
    tokens: int
    reads: int
    width: int

    @property
    def columns(self) -> dict[str, tuple[int, ...]]:
        """The shape of each embedding by the name of its column."""
        shape = (self.tokens, self.width) if self.pooling == "none" else (self.width,)
        if len(self.layers) == 1:
            return {"embedding": shape}
        return {f"embedding_{layer}": shape for layer in self.layers}

    @property
    def values(self) -> int:
        """In all embeddings of an image."""
        return sum(math.prod(shape) for shape in self.columns.values())

    def pool(self, states: Tensor) -> Tensor:
        """(images, tokens, width) to (images, *shape), fp32."""
        return POOLINGS[self.pooling](states.float())


def make_recipe(
    model: ModelConfig,
    available: int,
    layers: Sequence[int | str] = (),
    pooling: str | None = None,
    tokens: int | str | None = None,
) -> Recipe:
    """The recipe that options ask for; what is not given is as the model's generation has it.

    Args:
        model: whose embeddings they are.
        available: tokens in an image.
        layers: ``last``, ``middle`` or numbers of blocks; negative ones count from the end.
        pooling: a name in POOLINGS; ``mean`` if None.
        tokens: how many, or ``all``.

    Raises:
        UserError: there is no such layer or pooling, or there are fewer tokens.
    """
    layer, most = DEFAULTS[model.tokeniser]
    try:
        numbers = {block_index(name, model.layers) for name in layers or (layer,)}
    except ValueError as error:
        raise UserError(f"--layer: {error}") from None
    pooling = pooling or "mean"
    if pooling not in POOLINGS:
        raise UserError(f"--pool {pooling}: one of {', '.join(POOLINGS)} would be right")
    if tokens is None:
        tokens = available if most == ALL else min(int(most), available)
    elif tokens == ALL:
        tokens = available
    if not isinstance(tokens, int) or not 1 <= tokens <= available:
        raise UserError(f"--tokens {tokens}: 1 to {available}, or {ALL}, would be right")
    reads = tokens if model.attention == "causal" else available
    return Recipe(tuple(sorted(numbers)), pooling, tokens, reads, model.width)
