"""Layers that initialise themselves, and the tokenisers and heads made of them.

Every parameter is initialised in the constructor of the module that owns it, because under
DeepSpeed's ``zero.Init`` a parent finds only empty tensors, and from its own random stream, so
that the weights are the same at every ZeRO stage and number of ranks.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

INIT_STD = 0.02  # Radford et al. 2019 (GPT-2)


@dataclass(frozen=True)
class Init:
    """Normal initialisation from a generator seeded by (seed, parameter name).

    Attributes:
        seed: the run's seed.
        layers: blocks of the model, for the residual projections.
        name: of the module being built; ends in a dot unless empty.
    """

    seed: int
    layers: int
    name: str = ""

    def at(self, child: str) -> Init:
        """The same, for a child module."""
        return Init(self.seed, self.layers, f"{self.name}{child}.")

    def normal_(self, parameter: Tensor) -> None:
        """Fill the weight of this module in place.

        N(0, 0.02), except that projections back into the residual stream (``c_proj``) get
        0.02 / sqrt(2 layers) (Radford et al. 2019, section 2.3).
        """
        if parameter.is_meta:
            return
        residual = self.name.endswith("c_proj.")
        std = INIT_STD / (2 * self.layers) ** 0.5 if residual else INIT_STD
        digest = hashlib.sha256(f"{self.seed}/{self.name}weight".encode()).digest()
        # numpy, not torch: zero.Init replaces torch's constructors while the model is built
        generator = np.random.Generator(np.random.Philox(int.from_bytes(digest[:16], "little")))
        noise = generator.standard_normal(tuple(parameter.shape), dtype=np.float32)
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(noise * np.float32(std)))


class Linear(nn.Linear):
    """A linear layer initialised as AstroPT's: normal weight, zero bias."""

    def __init__(self, n_in: int, n_out: int, init: Init, bias: bool = False) -> None:
        super().__init__(n_in, n_out, bias=bias)
        init.normal_(self.weight)
        if bias:
            nn.init.zeros_(self.bias)

    def reset_parameters(self) -> None:
        """Nothing: the constructor initialises, and torch's default would only cost time."""


class Embedding(nn.Embedding):
    """A lookup table initialised as AstroPT's."""

    def __init__(self, entries: int, width: int, init: Init) -> None:
        super().__init__(entries, width)
        init.normal_(self.weight)

    def reset_parameters(self) -> None:
        """Nothing: the constructor initialises."""


class MLP(nn.Module):
    """Linear, tanh-GELU, linear, without biases.

    The block's feed-forward layer, and the ``aim`` tokeniser and head (El-Nouby et al. 2024).
    """

    def __init__(self, n_in: int, hidden: int, n_out: int, init: Init) -> None:
        super().__init__()
        self.c_fc = Linear(n_in, hidden, init.at("c_fc"))
        self.c_proj = Linear(hidden, n_out, init.at("c_proj"))

    def forward(self, x: Tensor) -> Tensor:
        """(..., n_in) to (..., n_out)."""
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Affine(nn.Module):
    """One linear layer without bias: the ``affine`` tokeniser and head."""

    def __init__(self, n_in: int, n_out: int, init: Init) -> None:
        super().__init__()
        self.c_fc = Linear(n_in, n_out, init.at("c_fc"))

    def forward(self, x: Tensor) -> Tensor:
        """(..., n_in) to (..., n_out)."""
        return self.c_fc(x)


def encoder(tokeniser: str, n_in: int, width: int, init: Init) -> nn.Module:
    """A tokeniser: patches (..., n_in) to embeddings (..., width)."""
    if tokeniser == "relu":
        return nn.Sequential(
            Linear(n_in, width, init.at("0"), bias=True),
            nn.ReLU(),
            Linear(width, width, init.at("2"), bias=True),
            nn.ReLU(),
        )
    if tokeniser == "aim":
        return MLP(n_in, 4 * width, width, init)
    return Affine(n_in, width, init)


def decoder(tokeniser: str, width: int, n_out: int, init: Init) -> nn.Module:
    """A head: embeddings (..., width) to predicted patches (..., n_out)."""
    if tokeniser == "relu":
        return nn.Sequential(
            Linear(width, 2 * width, init.at("0"), bias=True),
            nn.ReLU(),
            Linear(2 * width, width, init.at("2"), bias=True),
            nn.ReLU(),
            Linear(width, n_out, init.at("4"), bias=True),
        )
    if tokeniser == "aim":
        return MLP(width, 4 * width, n_out, init)
    return Affine(width, n_out, init)
