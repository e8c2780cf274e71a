"""AstroPT's .pt files as a source."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from astropt_ds.convert.source import Source
from astropt_ds.training.fragments import WEIGHT


class AstroPTSource(Source):
    """An AstroPT file."""

    def __init__(self, path: Path) -> None:
        raise NotImplementedError

    def tensor(self, name: str, state: str = WEIGHT) -> Tensor:
        """See :meth:`Source.tensor`."""
        raise NotImplementedError
