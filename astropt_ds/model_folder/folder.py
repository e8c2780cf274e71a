"""A model folder as a whole."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from astropt_ds.config import ModelConfig
from astropt_ds.model_folder.config_json import write_config
from astropt_ds.model_folder.weights import write_weights


def write_folder(
    folder: Path,
    model: ModelConfig,
    dtype: torch.dtype,
    facts: dict,
    tensors: Iterable[tuple[str, Tensor]],
) -> None:
    """Write all files of a model folder; the same input gives the same bytes.

    Args:
        folder: an empty one.
        model: whose weights they are.
        dtype: of the weights in it.
        facts: of the training, for config.json and the card; taken once the tensors are.
        tensors: as :func:`write_weights` has them.
    """
    write_weights(folder, model, dtype, tensors)
    write_config(folder, model, dtype, facts)
