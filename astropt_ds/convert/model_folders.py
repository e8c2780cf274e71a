"""Model folders as a source."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from astropt_ds.convert.source import Source
from astropt_ds.errors import UserError
from astropt_ds.model_folder.config_json import read_config, read_model_config
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
        facts = read_config(folder).get("training", {})
        if not isinstance(facts, dict):
            raise UserError(f"{folder / 'config.json'}: training={facts!r} is no object")
        super().__init__("model folder", "model-folder", model, self._weights.dtype, facts)

    def tensor(self, name: str, state: str = WEIGHT) -> Tensor:
        """See :meth:`Source.tensor`."""
        return self._weights.tensor(name)
