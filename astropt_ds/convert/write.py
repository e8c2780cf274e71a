"""Model folders, made from any source."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from astropt_ds.convert.source import Source
from astropt_ds.files import staged
from astropt_ds.model import parameter_shapes
from astropt_ds.model_folder.folder import write_folder
from astropt_ds.model_folder.weights import as_bytes


def write_model_folder(source: Source, output: Path, dtype: torch.dtype | None = None) -> None:
    """Make a model folder; it appears whole or not at all, and the same bytes each time.

    Args:
        source: of the weights.
        output: the folder, which must not exist.
        dtype: of the weights in it; the source's if None.

    Raises:
        UserError: the source is damaged, or a value is too large for the dtype.
        OSError: the folder exists or cannot be written.
    """
    facts = dict(source.facts)
    with staged(output) as folder:
        folder.mkdir()
        tensors = _with_origin(source, facts)
        write_folder(folder, source.model, dtype or source.dtype, facts, tensors)


def _with_origin(source: Source, facts: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """The weights in order; once the last is taken the facts say where they came from."""
    digest = hashlib.sha256()
    for name, tensor in progress(source):
        if source.sha256 is None:
            digest.update(f"{name}{list(tensor.shape)}{tensor.dtype}".encode())
            digest.update(as_bytes(tensor))
        yield name, tensor
    if "source" not in facts:  # a model folder made from another keeps what that says
        sha256 = source.sha256 or digest.hexdigest()
        facts["source"] = {"format": source.format, "sha256": sha256}


def progress(source: Source) -> Iterator[tuple[str, Tensor]]:
    """Every weight by its name in our model, in order, with a bar on a terminal."""
    shapes = parameter_shapes(source.model)
    total = sum(map(math.prod, shapes.values()))
    with tqdm(total=total, unit=" parameters", unit_scale=True, disable=None) as bar:
        for name, shape in shapes.items():
            yield name, source.tensor(name)
            bar.update(math.prod(shape))
