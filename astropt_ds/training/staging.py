"""Folders that several ranks write together and that appear whole, under their name, or not at all.

A folder is written beside its place, as ``NAME.partial``; each rank's fragments go into one
safetensors file of its own; a rename ends it.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from astropt_ds.errors import UserError
from astropt_ds.files import PARTIAL, sha256_file, sync_file, sync_folder
from astropt_ds.training.fragments import Fragment
from astropt_ds.training.ranks import Ranks

DOOMED = ".old"


@contextmanager
def staged(final: Path, ranks: Ranks) -> Iterator[Path]:
    """A folder to write in; what is left of it, and of dead ones beside it, is gone afterwards.

    Collective; so must be whatever fails in the block.
    """
    staging = final.with_name(final.name + PARTIAL)
    with ranks.together():
        if ranks.main:
            for leftover in (*final.parent.glob("*" + PARTIAL), *final.parent.glob("*" + DOOMED)):
                shutil.rmtree(leftover, ignore_errors=True)
            staging.mkdir(parents=True)
    try:
        yield staging
    finally:
        if ranks.main:  # where the disk was full it would stay so
            shutil.rmtree(staging, ignore_errors=True)


def write_fragments(folder: Path, fragments: list[Fragment], ranks: Ranks) -> list[dict[str, Any]]:
    """Write the fragments that each rank owns to its file, onto the disk. Collective.

    Returns:
        A description of every rank's file.

    Raises:
        UserError: a rank's cannot be written.
    """
    with ranks.together():
        mine = _write(folder / f"rank-{ranks.rank:05d}.safetensors", fragments)
    return ranks.gather(mine)


def _write(path: Path, fragments: list[Fragment]) -> dict[str, Any]:
    owned = [fragment for fragment in fragments if fragment.owned]
    tensors = {fragment_key(f.state, f.name, f.offset): f.values.cpu().contiguous() for f in owned}
    try:
        save_file(tensors, path)
    except Exception as error:  # safetensors wraps the operating system's errors in its own
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: cannot be written ({reason})") from None
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes it its owner's alone
    sync_file(path)
    return {
        "file": path.name,
        "facts": {"bytes": path.stat().st_size, "sha256": sha256_file(path)},
        "owned": [(f.name, f.state, f.shape, f.offset, f.values.numel()) for f in owned],
    }


def fragment_key(state: str, name: str, offset: int) -> str:
    """The name that a fragment has in its file."""
    return f"{state}/{name}/{offset}"


def merge(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Every logical tensor with its fragments [offset, length, file], in order.

    Args:
        parts: what :func:`write_fragments` returned.
    """
    tensors: dict[str, Any] = {}
    for part in parts:
        for name, state, shape, offset, length in part["owned"]:
            tensor = tensors.setdefault(
                name, {"shape": list(shape), "dtype": "float32", "fragments": {}}
            )
            tensor["fragments"].setdefault(state, []).append([offset, length, part["file"]])
    for tensor in tensors.values():
        for pieces in tensor["fragments"].values():
            pieces.sort()
    return tensors


def check_cover(tensors: dict[str, Any], states: Iterable[str]) -> None:
    """See that every element of every tensor lies in exactly one fragment, in each of the states.

    Raises:
        UserError: one does not.
    """
    for name, tensor in tensors.items():
        for state in states:
            end = 0
            for offset, length, _ in tensor["fragments"].get(state, []):
                if offset != end:
                    fault = "a hole" if offset > end else "an overlap"
                    raise UserError(f"checkpoint: {fault} in {state} of {name} at element {end}")
                end = offset + length
            if end != math.prod(tensor["shape"]):
                raise UserError(f"checkpoint: {state} of {name} ends at element {end}")


def whole(folder: Path, tensors: dict[str, Any], name: str, state: str) -> Tensor:
    """One logical tensor in one of its states, put together; fp32, or as its fragments are.

    Args:
        folder: where the ranks' files are.
        tensors: of the checkpoint, as :func:`merge` returns them.
        name: of the tensor.
        state: weight or moment.

    Raises:
        UserError: a file does not hold what the manifest tells.
    """
    pieces = []
    for offset, _, file in tensors[name]["fragments"][state]:
        try:
            # opened anew each time: the pages of a file that stays mapped count as memory
            with safe_open(folder / file, framework="pt") as stored:
                pieces.append(stored.get_tensor(fragment_key(state, name, offset)))
        except (OSError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{folder / file}: cannot be read ({reason})") from None
    return torch.cat(pieces).view(tensors[name]["shape"])


def replace_folder(staging: Path, final: Path) -> None:
    """Rename into place, durably, past what has the name already (it did not verify, say)."""
    sync_folder(staging)
    doomed = final.with_name(final.name + DOOMED)
    if final.exists():
        final.rename(doomed)
    try:
        staging.rename(final)
    except OSError:
        if doomed.exists():
            doomed.rename(final)
        raise
    sync_folder(final.parent)
    shutil.rmtree(doomed, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Delete a folder; cut off halfway, nothing is left under its name.

    Raises:
        OSError: it cannot be.
    """
    doomed = path.with_name(path.name + DOOMED)
    path.rename(doomed)
    shutil.rmtree(doomed)
