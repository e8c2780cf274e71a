"""A model folder as a whole."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from astropt_ds.config import ModelConfig
from astropt_ds.files import write_durably
from astropt_ds.model_folder.card import CARD, Release, model_card
from astropt_ds.model_folder.config_json import write_config
from astropt_ds.model_folder.remote_code import MODULE, remote_code
from astropt_ds.model_folder.weights import write_weights


def write_folder(
    folder: Path,
    model: ModelConfig,
    dtype: torch.dtype,
    facts: dict,
    tensors: Iterable[tuple[str, Tensor]],
    release: Release = Release(),  # noqa: B008 (frozen)
) -> None:
    """Write all files of a model folder; the same input gives the same bytes.

    Args:
        folder: an empty one.
        model: whose weights they are.
        dtype: of the weights in it.
        facts: of the training, for config.json and the card; taken once the tensors are.
        tensors: as :func:`write_weights` has them.
        release: what only its owner can say.
    """
    write_weights(folder, model, dtype, tensors)
    write_config(folder, model, dtype, facts)
    write_durably(folder / f"{MODULE}.py", remote_code())
    write_durably(folder / CARD, model_card(model, dtype, facts, release))
