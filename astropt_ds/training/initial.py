"""A new run that starts from the weights of an existing model: continued pretraining."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from astropt_ds.config import ModelConfig
from astropt_ds.errors import UserError
from astropt_ds.model_folder.config_json import CONFIG, read_model_config
from astropt_ds.model_folder.weights import StoredWeights
from astropt_ds.training.fragments import WEIGHT, Fragment


def load_weights(folder: Path, model: ModelConfig, fragments: list[Fragment], verify: bool) -> None:
    """Overwrite the weights among this rank's fragments with those of a model folder.

    Args:
        folder: config.json and model.safetensors.
        model: the run's, which must be the folder's.
        fragments: what this rank holds of them.
        verify: whether checksums are compared, which is enough on one rank.

    Raises:
        UserError: no model folder, or one of another model; all that differs is named.
    """
    theirs, ours = read_model_config(folder).architecture(), model.architecture()
    differences = [
        f"model.{key} is {theirs[key]} there and {ours[key]} here"
        for key in ours
        if theirs[key] != ours[key]
    ]
    wanted: dict[str, list[Fragment]] = defaultdict(list)
    for fragment in fragments:
        if fragment.state == WEIGHT:
            wanted[fragment.name].append(fragment)
    if differences:
        raise UserError(f"model.init_from={folder}/{CONFIG}: " + "; ".join(differences))
    weights = StoredWeights(folder, model, verify)
    for name, held in wanted.items():
        tensor = weights.tensor(name)
        if not all(bound.isfinite() for bound in tensor.aminmax()):
            raise UserError(f"model.init_from={folder}: {name} has values that are not finite")
        for fragment in held:
            start = fragment.offset
            fragment.values.copy_(tensor.view(-1)[start : start + fragment.values.numel()])
