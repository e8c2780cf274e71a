"""What an input is, by its content."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from astropt_ds.config import ModelConfig
from astropt_ds.convert.astropt import AstroPTSource
from astropt_ds.convert.checkpoints import CheckpointSource, is_checkpoint
from astropt_ds.convert.model_folders import FolderSource
from astropt_ds.convert.source import Source
from astropt_ds.convert.zero import ZeroSource, is_zero
from astropt_ds.errors import UserError
from astropt_ds.model_folder.config_json import CONFIG

ZIP, PICKLE = b"PK\x03\x04", b"\x80\x02"  # torch.save, and what it wrote once
KNOWN = (
    "a model folder (config.json), a run's folder or checkpoint, a checkpoint of DeepSpeed's own, "
    "or an AstroPT .pt file would be right"
)


def open_source(path: Path, model: ModelConfig | None = None) -> Source:
    """Open whatever holds a model's weights.

    Args:
        path: a model folder, a run's folder or one of its checkpoints, a checkpoint of DeepSpeed's
            own (also a universal one), or an AstroPT file of any generation.
        model: whose weights they are, where the input does not tell: DeepSpeed's checkpoints.

    Raises:
        UserError: it is none of these, is damaged, or does not fit the model.
    """
    if not path.exists():
        raise UserError(f"{path}: does not exist; {KNOWN}")
    if not os.access(path, os.R_OK):
        raise UserError(f"{path}: may not be read")
    if path.is_file() and (path.match("*_states.pt") or path.suffix in (".safetensors", ".json")):
        raise UserError(f"{path}: is a part; the folder that it belongs to would be right")
    makes: Callable[[Path], Source]
    if path.is_file() and _begins(path, ZIP):
        makes = AstroPTSource
    elif path.is_file() and _begins(path, PICKLE):
        raise UserError(
            f"{path}: a plain pickle, as torch before 1.6 wrote; saved anew by torch.save of a "
            "newer one, which opens it, it would be right"
        )
    elif (path / CONFIG).is_file():
        makes = FolderSource
    elif path.is_dir() and is_zero(path):
        return ZeroSource(path, model)
    elif path.is_dir() and is_checkpoint(path):
        makes = CheckpointSource
    else:
        raise UserError(f"{path}: not recognised; {KNOWN}")
    if model is not None:
        raise UserError(f"{path}: tells its own model; a configuration goes with DeepSpeed's alone")
    return makes(path)


def _begins(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic
