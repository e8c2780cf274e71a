"""Model folders as a source."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from astropt_ds.convert.source import Source
from astropt_ds.errors import UserError
from astropt_ds.model_folder.config_json import CONFIG, read_config, read_model_config
from astropt_ds.model_folder.release import Release
from astropt_ds.model_folder.weights import StoredWeights
from astropt_ds.training.fragments import WEIGHT


class FolderSource(Source):
    """A model folder.

    Args:
        folder: config.json and safetensors.

    Raises:
        UserError: it is none, or damaged.
    """

    def __init__(self, folder: Path) -> None:
        model = read_model_config(folder)
        self._weights = StoredWeights(folder, model)
        config = read_config(folder)
        facts, told = config.get("training", {}), config.get("release", {})
        try:
            release = Release(told["license"], tuple(told["datasets"])) if told else Release()
        except (KeyError, TypeError):
            raise UserError(
                f"{folder / CONFIG}: release={told} is no licence and data sets"
            ) from None
        if not isinstance(facts, dict):
            raise UserError(f"{folder / CONFIG}: training={facts!r} is no object")
        super().__init__(
            what="model folder",
            format="model-folder",
            model=model,
            dtype=self._weights.dtype,
            facts=facts,
            release=release,
        )

    def tensor(self, name: str, state: str = WEIGHT) -> Tensor:
        """See :meth:`Source.tensor`."""
        return self._weights.tensor(name)
