"""A model folder: config.json and model.safetensors, which every tool takes as a model."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from astropt_ds.config import ModelConfig
from astropt_ds.errors import UserError
from astropt_ds.files import sync_file, write_durably

CONFIG, WEIGHTS = "config.json", "model.safetensors"
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}  # as safetensors names them


def write_config(folder: Path, model: ModelConfig, dtype: torch.dtype, facts: dict) -> None:
    """Write config.json.

    Args:
        folder: the model's.
        model: all of it but ``init_from`` goes in.
        dtype: of the weights.
        facts: how the weights came to be, as JSON holds it; under ``training``.
    """
    config = {
        "model_type": "astropt",
        "dtype": str(dtype).removeprefix("torch."),
        **model.architecture(),
        "training": facts,
    }
    write_durably(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def write_weights(
    folder: Path,
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    tensors: Iterator[tuple[str, Tensor]],
) -> None:
    """Write model.safetensors tensor by tensor: no more than one is in memory at a time.

    The safetensors library would want all of them at once. The format is its own: the header's
    length, the header as JSON, and the tensors end to end.

    Args:
        folder: the model's.
        shapes: of all tensors, in the order in which they come.
        dtype: of the weights in the file.
        tensors: their names and values, of any floating dtype.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors are to start at a multiple of eight bytes
    with (folder / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for (expected, shape), (name, values) in zip(shapes.items(), tensors, strict=True):
            if name != expected or values.numel() != math.prod(shape):
                raise ValueError(f"{name} where {expected} was announced")
            flat = values.to(dtype).contiguous().view(-1).view(torch.uint8)
            file.write(flat.numpy().data)
    sync_file(folder / WEIGHTS)


def read_model_config(folder: Path) -> ModelConfig:
    """What config.json says of the model.

    Raises:
        UserError: there is none, or it is not one.
    """
    path = folder / CONFIG
    try:
        values = json.loads(path.read_text())
        return ModelConfig.model_validate(
            {key: values[key] for key in ModelConfig.model_fields if key in values}
        )
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}); a model folder, as those in a run's "
            "snapshots, has one"
        ) from None
    except ValidationError as error:
        wrong = ", ".join(".".join(map(str, item["loc"])) for item in error.errors())
        reason = f"missing or wrong: {wrong}"
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
    raise UserError(f"{path}: not the config.json of a model folder ({reason})")


def read_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """The weights, one by one.

    Raises:
        UserError: model.safetensors is missing or damaged.
    """
    path = folder / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dictionary)
                yield name, file.get_tensor(name)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except SafetensorError as error:
        raise UserError(f"{path}: is no whole safetensors file ({error})") from None
