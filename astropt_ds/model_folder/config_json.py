"""config.json of a model folder: all that the model needs, and how it came to be."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from astropt_ds.config import ModelConfig
from astropt_ds.errors import UserError
from astropt_ds.files import write_durably
from astropt_ds.model_folder.release import Release
from astropt_ds.model_folder.remote_code import CLASSES
from astropt_ds.tokens import EPSILON

CONFIG = "config.json"
# The AstroPT generations that read a tokeniser's weights; the paper's is v1, PyPI's 2.0.9 a v2.
GENERATIONS = {"relu": "v1", "aim": "v2, v3", "affine": "v2, v3"}


def write_config(
    folder: Path, model: ModelConfig, dtype: torch.dtype, facts: dict, release: Release
) -> None:
    """Write config.json.

    Args:
        folder: the model's.
        model: all of it but ``init_from`` goes in.
        dtype: of the weights.
        facts: how the weights came to be, as JSON holds it; under ``training``.
        release: licence and data sets, so that they outlast a conversion.
    """
    config = {
        "model_type": "astropt",
        **CLASSES,
        "dtype": str(dtype).removeprefix("torch."),
        "generation": GENERATIONS[model.tokeniser],
        **model.architecture(),
        "preprocessing": preprocessing(model, facts),
        "training": facts,
        "release": asdict(release),
    }
    try:
        text = json.dumps(config, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"training facts that JSON cannot hold ({error}): {facts}") from None
    write_durably(folder / CONFIG, text + "\n")


def preprocessing(model: ModelConfig, facts: dict) -> dict[str, Any]:
    """From an image to tokens, in words and numbers; ``AstroPT.tokens`` does it."""
    found = {
        "pixels": "as stored: 8-bit colours 0 to 255, or fluxes; not scaled",
        "order": "spiral from the centre, grid walked "
        + ("row by row" if model.orientation == "rows" else "column by column (transposed)"),
        "standardisation": "each patch over its own values: (x - mean) / (std + epsilon)",
        "std": "unbiased",
        "epsilon": EPSILON,
    }
    if "image_size" in facts:
        found["image_size"] = facts["image_size"]
    return found


def read_model_config(folder: Path) -> ModelConfig:
    """What config.json says of the model.

    Raises:
        UserError: there is none, or it is not one.
    """
    values = read_config(folder)
    path = folder / CONFIG
    try:
        return ModelConfig.model_validate(
            {key: values[key] for key in ModelConfig.model_fields if key in values}
        )
    except ValidationError as error:
        wrong = ", ".join(".".join(map(str, item["loc"])) or item["msg"] for item in error.errors())
        reason = f"missing or wrong: {wrong}"
    raise UserError(f"{path}: not the config.json of a model folder ({reason})")


def read_config(folder: Path) -> dict[str, Any]:
    """All that config.json holds.

    Raises:
        UserError: there is none, or it is no JSON object.
    """
    path = folder / CONFIG
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); a model folder has one, as "
            "those in a run's snapshots and what tools/convert_checkpoint.py makes"
        ) from None
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not the config.json of a model folder ({reason})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: not the config.json of a model folder (no object)")
    return values
