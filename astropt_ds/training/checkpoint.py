"""Checkpoints that know no topology, and that are complete or absent.

A checkpoint is a folder ``step-NNNNNNNN`` with one safetensors file a rank, holding that rank's
fragments of the logical fp32 tensors (weights and AdamW's moments); ``manifest.json``: every
tensor's shape, the fragments that cover it, the files' checksums, and the run's counters; and
``complete`` with the manifest's own checksum. It is written beside its place and renamed, so that
a folder of that name is always whole; any ZeRO stage on any number of ranks reads what any other
wrote.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from astropt_ds.errors import UserError
from astropt_ds.files import sha256_file, sync_folder, write_durably
from astropt_ds.training.fragments import STATES, Fragment
from astropt_ds.training.ranks import Ranks

MANIFEST = "manifest.json"
MARKER = "complete"  # holds the manifest's sha256, as that holds the files'
FORMAT = "astropt_ds-checkpoint-1"
POINTER = "latest"


def save(run_dir: Path, step: int, fragments: list[Fragment], state: dict, ranks: Ranks) -> Path:
    """Write a checkpoint of all ranks and point to it. Collective.

    Args:
        run_dir: the run's folder; the checkpoint is ``checkpoints/step-NNNNNNNN`` below it.
        step: batches consumed.
        fragments: what this rank holds; it writes what it owns.
        state: counters and whatever else a resume needs, as JSON holds it; rank 0's is kept.

    Returns:
        The checkpoint's folder.

    Raises:
        UserError: a rank could not write, or the fragments do not cover the tensors. The staging
            folder stays, older checkpoints and the pointer are as they were.
    """
    final = run_dir / "checkpoints" / f"step-{step:08d}"
    staging = final.with_name(final.name + ".partial")
    with ranks.together():
        if ranks.main:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
    with ranks.together():
        mine = _write_fragments(staging / f"rank-{ranks.rank:05d}.safetensors", fragments)
    parts = ranks.gather(mine)
    with ranks.together():
        if ranks.main:
            manifest: dict[str, Any] = {
                "format": FORMAT,
                "step": step,
                "state": state,
                "files": {part["file"]: part["facts"] for part in parts},
                "tensors": _merge(parts),
            }
            _check_cover(manifest["tensors"])
            write_durably(staging / MANIFEST, json.dumps(manifest))
            write_durably(staging / MARKER, sha256_file(staging / MANIFEST) + "\n")
            sync_folder(staging)
            _replace_folder(staging, final)
            _point(run_dir, final.name)
    return final


def load(path: Path, fragments: list[Fragment]) -> dict[str, Any]:
    """Overwrite this rank's fragments from a verified checkpoint; returns its manifest.

    Reads the ranges this rank holds and nothing else.

    Raises:
        UserError: the checkpoint is of another model, or has holes.
    """
    manifest = read_manifest(path)
    tensors = manifest["tensors"]
    _check_cover(tensors)
    wanted = {fragment.name: fragment.shape for fragment in fragments}
    for name, shape in wanted.items():
        if name not in tensors or tuple(tensors[name]["shape"]) != shape:
            found = tensors.get(name, {}).get("shape", "nothing")
            raise UserError(f"{path}: tensor {name} is {found}; the model needs {list(shape)}")
    with ExitStack() as stack:
        files: dict[str, Any] = {}
        for fragment in fragments:
            start, stop = fragment.offset, fragment.offset + fragment.values.numel()
            for offset, length, file in tensors[fragment.name]["fragments"][fragment.state]:
                low, high = max(start, offset), min(stop, offset + length)
                if low >= high:
                    continue
                if file not in files:
                    files[file] = stack.enter_context(safe_open(path / file, framework="pt"))
                key = _key(fragment.state, fragment.name, offset)
                values = files[file].get_slice(key)[low - offset : high - offset]
                fragment.values[low - start : high - start].copy_(values)
    return manifest


def find(folder: Path, ranks: Ranks) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and a line on each newer one passed over. Collective.

    Args:
        folder: a run's folder, or one checkpoint.
    """
    found = [folder] if (folder / MANIFEST).is_file() else candidates(folder)
    passed_over: list[str] = []
    for candidate in ranks.gather(found)[0]:
        problem = verify(candidate, ranks)
        if problem is None:
            return candidate, passed_over
        passed_over.append(f"{candidate}: {problem}")
    return None, passed_over


def candidates(run_dir: Path) -> list[Path]:
    """Checkpoints of a run by their names alone, newest first."""
    return sorted((run_dir / "checkpoints").glob("step-????????"), reverse=True)


def verify(path: Path, ranks: Ranks) -> str | None:
    """What is wrong with a checkpoint, or None; the ranks share the reading. Collective."""
    problem = None
    try:
        files = sorted(read_manifest(path)["files"].items())
        for name, facts in files[ranks.rank :: ranks.size]:
            if not (path / name).is_file():
                problem = f"{name} is missing"
            elif (path / name).stat().st_size != facts["bytes"]:
                problem = f"{name} has {(path / name).stat().st_size} of {facts['bytes']} bytes"
            elif sha256_file(path / name) != facts["sha256"]:
                problem = f"{name} does not match its checksum"
    except (UserError, OSError) as error:
        problem = str(error)
    return next((problem for problem in ranks.gather(problem) if problem), None)


def read_manifest(path: Path) -> dict[str, Any]:
    """A checkpoint's manifest.

    Raises:
        UserError: there is none, or it is not one.
    """
    try:
        if sha256_file(path / MANIFEST) != (path / MARKER).read_text().strip():
            raise UserError(f"{path / MANIFEST} does not match its checksum")
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            raise UserError(f"{path / MANIFEST}: format {manifest['format']!r}, not {FORMAT!r}")
        for key in ("step", "state", "files", "tensors"):
            manifest[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path / MANIFEST}: not a checkpoint's manifest ({error!r})") from None
    return manifest


def _write_fragments(path: Path, fragments: list[Fragment]) -> dict[str, Any]:
    """Write this rank's file and describe it."""
    owned = [fragment for fragment in fragments if fragment.owned]
    tensors = {_key(f.state, f.name, f.offset): f.values.cpu().contiguous() for f in owned}
    try:
        save_file(tensors, path)
    except Exception as error:  # safetensors wraps the operating system's errors in its own
        raise UserError(f"{path}: cannot be written ({error})") from None
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return {
        "file": path.name,
        "facts": {"bytes": path.stat().st_size, "sha256": sha256_file(path)},
        "owned": [(f.name, f.state, f.shape, f.offset, f.values.numel()) for f in owned],
    }


def _key(state: str, name: str, offset: int) -> str:
    return f"{state}/{name}/{offset}"


def _merge(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Every logical tensor with its fragments [offset, length, file], in order."""
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


def _check_cover(tensors: dict[str, Any]) -> None:
    """Every element of every tensor lies in exactly one fragment."""
    for name, tensor in tensors.items():
        for state in STATES:
            end = 0
            for offset, length, _ in tensor["fragments"].get(state, []):
                if offset != end:
                    fault = "a hole" if offset > end else "an overlap"
                    raise UserError(f"checkpoint: {fault} in {state} of {name} at element {end}")
                end = offset + length
            if end != math.prod(tensor["shape"]):
                raise UserError(f"checkpoint: {state} of {name} ends at element {end}")


def _replace_folder(staging: Path, final: Path) -> None:
    """Rename into place, past a checkpoint of this step that did not verify at resume."""
    old = final.with_name(final.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    staging.rename(final)
    sync_folder(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def _point(run_dir: Path, name: str) -> None:
    temporary = run_dir / (POINTER + ".partial")
    write_durably(temporary, name + "\n")
    os.replace(temporary, run_dir / POINTER)
    sync_folder(run_dir)
