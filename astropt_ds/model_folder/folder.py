"""A model folder as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from astropt_ds.config import ModelConfig
from astropt_ds.files import write_durably
from astropt_ds.model_folder.card import CARD, model_card
from astropt_ds.model_folder.config_json import write_config
from astropt_ds.model_folder.release import Release
from astropt_ds.model_folder.remote_code import MODULE, remote_code
from astropt_ds.model_folder.weights import write_weights


def write_folder(
    folder: Path,
    model: ModelConfig,
    dtype: torch.dtype,
    facts: Callable[[], dict[str, Any]],
    tensors: Iterable[tuple[str, Tensor]],
    release: Release = Release(),  # noqa: B008 (frozen)
) -> None:
    """Write all files of a model folder; the same input gives the same bytes.

    Args:
        folder: an empty one.
        model: whose weights they are.
        dtype: of the weights in it.
        facts: returns those of the training, for config.json and the card, once the tensors are
            taken: what came of them may be among these.
        tensors: as :func:`write_weights` has them.
        release: what only its owner can say.
    """
    write_weights(folder, model, dtype, tensors)
    told = facts()
    write_config(folder, model, dtype, told, release)
    write_durably(folder / f"{MODULE}.py", remote_code())
    write_durably(folder / CARD, model_card(model, dtype, told, release))
