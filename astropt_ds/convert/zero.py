"""DeepSpeed's own checkpoints as a source: any ZeRO stage, any number of ranks, universal ones.

They hold neither the model's heads nor its tokeniser: its configuration must be given.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from astropt_ds.config import ModelConfig
from astropt_ds.convert.generations import COMPILED, generation_of, our_name
from astropt_ds.convert.source import Source
from astropt_ds.convert.torch_file import TorchFile
from astropt_ds.convert.zero_layouts import STUBS, Layout, Universal, Whole, known_layout
from astropt_ds.convert.zero_partitions import OPTIM_FILES, Partitioned
from astropt_ds.errors import UserError
from astropt_ds.model import parameter_shapes
from astropt_ds.model_folder.weights import StoredAs, check_tensors, common_dtype
from astropt_ds.training.fragments import WEIGHT

MODEL_FILES = "*mp_rank_*_model_states.pt"
UNIVERSAL = "zero"  # the folder that a universal checkpoint is known by
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
        self._layout = _open_layout(folder)
        with known_layout(folder):
            self._names = _our_names(folder, list(self._layout.tensors))
        found = {ours: self._layout.tensors[theirs] for ours, theirs in self._names.items()}
        problems = list(self._layout.problems)
        if model is None:
            problems.append(
                "DeepSpeed's files do not tell the model; --config PRESET_OR_YAML does: they hold "
                + _suggested(found)
            )
            raise _told(folder, problems)
        self._shapes = parameter_shapes(model)
        try:
            check_tensors(folder, found, self._shapes)
        except UserError as error:
            problems.append(str(error).removeprefix(f"{folder}: "))
        if problems:
            raise _told(folder, problems)
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


def _open_layout(folder: Path) -> Layout:
    """Open a checkpoint's folder.

    Raises:
        UserError: it is damaged, or of a kind that is not read.
    """
    headers = sorted(folder.glob(MODEL_FILES))
    alone = [path for path in headers if path.name.startswith("mp_rank_")]
    if not headers or (alone and len(headers) > 1):
        found = ", ".join(path.name for path in headers) or "none"
        raise UserError(
            f"{folder}: mp_rank_00_model_states.pt alone, or one of the form "
            f"zero_pp_rank_0_mp_rank_00_model_states.pt a rank would be right; found {found}"
        )
    if parallel := [p.name for p in folder.glob("*_mp_rank_*.pt") if "_mp_rank_00_" not in p.name]:
        raise UserError(f"{folder}: {parallel[0]} is of a tensor-parallel model, which is not read")
    header = TorchFile(headers[0], STUBS)
    with known_layout(header.path):
        if frozen := header.content["frozen_param_shapes"]:
            names = ", ".join(frozen)
            raise UserError(f"{header.path}: parameters were frozen, which is not read: {names}")
        if header.content["param_shapes"] is None:
            return Whole(header)
        if (folder / UNIVERSAL).is_dir():
            return Universal(header, folder / UNIVERSAL)
        return Partitioned(header, folder)


def _told(folder: Path, problems: list[str]) -> UserError:
    """All of them in a line; a damaged file's names may have line breaks."""
    return UserError(" ".join(f"{folder}: {'; '.join(problems)}".split()))


def _our_names(folder: Path, stored: list[str]) -> dict[str, str]:
    """The stored name of each tensor by its name in our model; AstroPT's own models have theirs."""
    plain = [name.replace(COMPILED, "") for name in stored]
    generation = generation_of(plain) or "v3"
    ours = [our_name(name, generation) for name in plain]
    if twice := {name for name in ours if ours.count(name) > 1}:
        names = ", ".join(sorted(twice))
        raise UserError(f"{folder}: with {COMPILED} and without, thus twice: {names}")
    return dict(zip(ours, stored, strict=True))


def _suggested(found: dict[str, StoredAs]) -> str:
    """What the shapes say of the model."""
    layers = {match[1] for name in found if (match := re.search(r"\bh\.(\d+)\.", name))}
    widths = [shape[-1] for name, (shape, _) in found.items() if name.endswith("ln_f.weight")]
    width = f" of width {widths[0]}" if widths else ""
    first = [name.removeprefix("encoders.images.") for name in found]
    kinds = {"0.bias": "relu", "c_proj.weight": "aim", "c_fc.weight": "affine"}
    tokeniser = next((f", tokeniser {kinds[name]}" for name in kinds if name in first), "")
    return f"{len(layers)} layers{width}{tokeniser}"


def _optim(folder: Path, layout: Layout) -> dict[str, Any] | None:
    if layout.groups is None:
        return None
    try:
        found = {key: layout.groups[0][key] for key in ("lr", "betas", "eps")}
        decay = max(group["weight_decay"] for group in layout.groups)
        return {**found, "weight_decay": decay, "updates": layout.updates}
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(f"{folder}: no groups of AdamW's ({error!r})") from None
