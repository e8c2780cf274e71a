"""Model folders and AstroPT files, made from any source."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from astropt_ds.convert.astropt import NO_LOSS
from astropt_ds.convert.generations import (
    STAND_INS,
    inexpressible,
    upstream_name,
    upstream_order,
    write_model,
)
from astropt_ds.convert.source import Source
from astropt_ds.convert.torch_write import Announced, write_torch_file
from astropt_ds.errors import UserError, say
from astropt_ds.files import staged
from astropt_ds.model import parameter_shapes
from astropt_ds.model_folder.folder import write_folder
from astropt_ds.model_folder.release import Release
from astropt_ds.model_folder.weights import as_bytes, cast
from astropt_ds.training.fragments import MOMENTS, WEIGHT


def write_model_folder(
    source: Source,
    output: Path,
    dtype: torch.dtype | None = None,
    release: Release | None = None,
) -> None:
    """Make a model folder; it appears whole or not at all, and the same bytes each time.

    Args:
        source: of the weights.
        output: the folder, which must not exist.
        dtype: of the weights in it; the source's if None.
        release: licence and data sets, for the model card; the source's if None.

    Raises:
        UserError: the source is damaged, a value is too large for the dtype, or the folder exists
            or cannot be written.
    """
    with _written(output) as folder:
        folder.mkdir()
        weights = _Weights(source)
        given = release or source.release
        write_folder(folder, source.model, dtype or source.dtype, weights.facts, weights, given)


def write_astropt(
    source: Source,
    output: Path,
    generation: str,
    dtype: torch.dtype | None = None,
    optimizer: bool = False,
) -> None:
    """Make a .pt file that AstroPT's own code loads; it appears whole or not at all.

    Args:
        source: of the weights.
        output: the file, which must not exist.
        generation: ``v1``, ``v2`` or ``v3``.
        dtype: of the weights in it; the source's if None.
        optimizer: whether AdamW's state goes in, in fp32.

    Raises:
        UserError: the generation has no such model, the source no optimizer state, or it is
            damaged; or the file exists or cannot be written.
    """
    check_expressible(source, generation, optimizer)
    shapes = parameter_shapes(source.model)
    names = upstream_order(list(shapes), generation)
    args, registry = write_model(source.model, generation)
    step = source.facts.get("updates", source.facts.get("step", 0))
    losses = [source.facts.get(key) for key in ("best_val_loss", "val_loss")]
    with _written(output) as path, _bar(shapes, 3 if optimizer else 1) as bar:
        tensor = partial(_announced, source, shapes, bar)
        content = {
            "model": {
                upstream_name(name, generation): tensor(dtype or source.dtype, WEIGHT, name)
                for name in names
            },
            "optimizer": _adamw(source, names, shapes, tensor) if optimizer else None,
            "model_args": args,
            "modality_registry": registry,
            "iter_num": step,
            "best_val_loss": next((loss for loss in losses if loss is not None), NO_LOSS),
            "config": source.facts,
        }
        content = {key: value for key, value in content.items() if value is not None}
        write_torch_file(path, content, STAND_INS)


def check_expressible(source: Source, generation: str, optimizer: bool) -> None:
    """See that a source can become an AstroPT file.

    Args:
        source: of the weights.
        generation: of the file.
        optimizer: whether AdamW's state is to go in.

    Raises:
        UserError: it cannot; the reasons, and what would be right.
    """
    if reasons := inexpressible(source.model, generation):
        raise UserError(f"astropt-{generation} cannot express the model: {reasons}")
    if optimizer and source.optim is None:
        raise UserError(f"--optimizer: the {source.what} {source.lacks}")


def _adamw(
    source: Source,
    names: list[str],
    shapes: dict[str, tuple[int, ...]],
    tensor: Callable[[torch.dtype, str, str], Announced],
) -> dict[str, Any]:
    """The ``state_dict`` of AstroPT's AdamW: what decays is numbered first, then the rest."""
    settings = dict(source.optim or {})
    decay, updates = settings.pop("weight_decay"), float(settings.pop("updates"))
    split = [[n for n in names if (len(shapes[n]) >= 2) == decays] for decays in (True, False)]
    groups = [
        {"params": [torch.zeros(1) for _ in split[0]], "weight_decay": decay},
        {"params": [torch.zeros(1) for _ in split[1]], "weight_decay": 0.0},
    ]
    saved = torch.optim.AdamW(groups, **settings).state_dict()
    saved["state"] = {
        # a tensor each, since AdamW counts in place
        number: {
            "step": Announced((), torch.float32, lambda: torch.tensor(updates)),
            **{m: tensor(torch.float32, m, name) for m in MOMENTS},
        }
        for number, name in enumerate([*split[0], *split[1]])
    }
    return saved


def _announced(
    source: Source,
    shapes: dict[str, tuple[int, ...]],
    bar: tqdm,
    dtype: torch.dtype,
    state: str,
    name: str,
) -> Announced:
    def read() -> Tensor:
        values = cast(name, source.tensor(name, state), dtype)
        bar.update(values.numel())
        return values

    return Announced(shapes[name], dtype, read)


@contextmanager
def _written(output: Path) -> Iterator[Path]:
    """Where to write; a full disk or a name that is taken are the user's to mend."""
    try:
        with staged(output) as path:
            yield path
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror or error})") from None


def _bar(shapes: dict[str, tuple[int, ...]], states: int) -> tqdm:
    """A progress bar, on a terminal."""
    total = states * sum(map(math.prod, shapes.values()))
    return tqdm(total=total, unit=" parameters", unit_scale=True, disable=None)


class _Weights:
    """The weights of a source in order, and where they came from once the last is taken."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._digest = hashlib.sha256()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        shapes = parameter_shapes(self._source.model)
        wrong: list[str] = []
        with _bar(shapes, 1) as bar:
            for name in shapes:
                tensor = self._source.tensor(name)
                if self._source.sha256 is None:
                    self._digest.update(f"{name}{list(tensor.shape)}{tensor.dtype}".encode())
                    self._digest.update(as_bytes(tensor))
                if not all(bound.isfinite() for bound in tensor.aminmax()):
                    wrong.append(name)
                yield name, tensor
                bar.update(tensor.numel())
        if wrong:
            say(f"warning: values that are not finite, in {len(wrong)} tensors: {wrong[0]}, ...")

    def facts(self) -> dict[str, Any]:
        """Those of the source, and its checksum unless they hold an origin's already."""
        sha256 = self._source.sha256 or self._digest.hexdigest()
        return {"source": {"format": self._source.format, "sha256": sha256}, **self._source.facts}
