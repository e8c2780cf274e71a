"""DeepSpeed's own checkpoints as a source: any ZeRO stage, any number of ranks, universal ones.

They hold neither the model's heads nor its tokeniser: its configuration must be given.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from astropt_ds.config import ModelConfig
from astropt_ds.convert.source import Source
from astropt_ds.convert.zero_layouts import (
    MODEL_FILES,
    OPTIM_FILES,
    UNIVERSAL,
    Layout,
    open_layout,
)
from astropt_ds.errors import UserError
from astropt_ds.model import parameter_shapes
from astropt_ds.model_folder.weights import StoredAs, check_tensors, common_dtype
from astropt_ds.training.fragments import WEIGHT

POINTERS = ("latest", "latest_universal")  # each names a folder beside it
SCRIPT = "zero_to_fp32.py"  # which DeepSpeed leaves there, too


def is_zero(path: Path) -> bool:
    """Whether a folder is a checkpoint that DeepSpeed wrote or holds some, by what is in it."""
    return _is_tag(path) or bool(_tags(path)) or (path / SCRIPT).is_file()


def _is_tag(folder: Path) -> bool:
    patterns = (MODEL_FILES, OPTIM_FILES, f"{UNIVERSAL}/optimizer_state.pt")
    return any(any(folder.glob(pattern)) for pattern in patterns)


def _tags(path: Path) -> list[Path]:
    return sorted(child for child in path.iterdir() if child.is_dir() and _is_tag(child))


class ZeroSource(Source):
    """A checkpoint that DeepSpeed wrote.

    Args:
        path: its folder, or the one with the file ``latest`` that names it.
        model: whose weights they are; DeepSpeed's files do not tell.

    Raises:
        UserError: ``latest`` names none, it is damaged, or does not fit the model; all that is
            wrong is told together.
    """

    def __init__(self, path: Path, model: ModelConfig | None) -> None:
        folder = _checkpoint(path)
        self._layout = open_layout(folder)
        self._names = _our_names(self._layout.tensors)
        found = {ours: self._layout.tensors[theirs] for ours, theirs in self._names.items()}
        problems = list(self._layout.problems)
        if model is None:
            problems.append(
                "DeepSpeed's files do not tell the model; --config PRESET_OR_YAML does: they hold "
                + _suggested(found)
            )
            raise UserError(f"{folder}: " + "; ".join(problems))
        self._shapes = parameter_shapes(model)
        try:
            check_tensors(folder, found, self._shapes)
        except UserError as error:
            problems.append(str(error).removeprefix(f"{folder}: "))
        if problems:
            raise UserError(f"{folder}: " + "; ".join(problems))
        super().__init__(
            f"DeepSpeed checkpoint, {self._layout.what}",
            "deepspeed",
            model,
            common_dtype(found),
            {"step": self._layout.step},
            _optim(folder, self._layout),
        )

    def tensor(self, name: str, state: str = WEIGHT) -> Tensor:
        """See :meth:`Source.tensor`."""
        return self._layout.read(self._names[name], state).view(self._shapes[name])


def _checkpoint(path: Path) -> Path:
    """The checkpoint that a folder is, or that its ``latest`` names.

    Raises:
        UserError: it names none.
    """
    if _is_tag(path):
        return path
    tags = _tags(path)
    there = " or ".join(map(str, tags)) or "none is there"
    for pointer in (path / name for name in POINTERS):
        if pointer.is_file():
            name = pointer.read_text(errors="replace").strip()
            if path / name in tags:
                return path / name
            raise UserError(
                f"{pointer}: names {name!r}, which is no checkpoint of DeepSpeed's; {there}"
            )
    several = "several checkpoints" if len(tags) > 1 else "a checkpoint"
    raise UserError(f"{path}: {several}, but no file {POINTERS[0]} that names one; {there}")


def _our_names(stored: Iterable[str]) -> dict[str, str]:
    """The stored name of each tensor by its name in our model."""
    return {name: name for name in stored}


def _suggested(found: dict[str, StoredAs]) -> str:
    """What the shapes say of the model."""
    layers = {match[1] for name in found if (match := re.search(r"\bh\.(\d+)\.", name))}
    widths = [shape[-1] for name, (shape, _) in found.items() if name.endswith("ln_f.weight")]
    width = f" of width {widths[0]}" if widths else ""
    return f"{len(layers)} layers{width}"


def _optim(folder: Path, layout: Layout) -> dict[str, Any] | None:
    if layout.groups is None:
        return None
    try:
        found = {key: layout.groups[0][key] for key in ("lr", "betas", "eps")}
        return {**found, "weight_decay": max(group["weight_decay"] for group in layout.groups)}
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(f"{folder}: no groups of AdamW's ({error!r})") from None
