"""What all that holds a model's weights has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from astropt_ds.config import ModelConfig
from astropt_ds.model_folder.release import Release
from astropt_ds.training.fragments import WEIGHT


@dataclass
class Source(ABC):
    """An opened input, whose tensors have been checked against its model but not read.

    Attributes:
        what: it is, in words.
        format: of it, in a word that outlasts the words.
        model: whose weights it holds.
        dtype: of the weights; fp32 where they differ.
        facts: of the training, as a model folder's config.json holds them.
        optim: AdamW's lr, betas, eps, weight_decay and updates so far, where its moments are
            there too.
        lacks: why ``optim`` is None, where it is.
        sha256: of the file, where it is one; else that of the weights is taken as they are read.
        release: licence and data sets, where they are told.
    """

    what: str
    format: str
    model: ModelConfig
    dtype: torch.dtype
    facts: dict[str, Any] = field(default_factory=dict)
    optim: dict[str, Any] | None = None
    lacks: str = "holds no optimizer state"
    sha256: str | None = None
    release: Release = Release()  # noqa: RUF009 (frozen)

    @abstractmethod
    def tensor(self, name: str, state: str = WEIGHT) -> Tensor:
        """One tensor, by its name in our model, read when asked for.

        Args:
            name: as in :func:`~astropt_ds.model.parameter_shapes`.
            state: the weight or, where ``optim`` is not None, one of AdamW's moments.

        Returns:
            Of the model's shape, as it is stored.

        Raises:
            UserError: what is stored is damaged.
        """
