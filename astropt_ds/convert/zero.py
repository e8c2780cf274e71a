"""DeepSpeed's own checkpoints as a source."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from astropt_ds.config import ModelConfig
from astropt_ds.convert.source import Source
from astropt_ds.training.fragments import WEIGHT


def is_zero(path: Path) -> bool:
    """Whether a folder is a checkpoint that DeepSpeed wrote, by what is in it."""
    return False


class ZeroSource(Source):
    """A checkpoint that DeepSpeed wrote."""

    def __init__(self, path: Path, model: ModelConfig | None) -> None:
        raise NotImplementedError

    def tensor(self, name: str, state: str = WEIGHT) -> Tensor:
        """See :meth:`Source.tensor`."""
        raise NotImplementedError
